"""Sparse gradients of embeddings: training with them equals training with dense ones."""

import math

import pytest
import torch
from torch import nn

import fitwatch as fw

IDS = torch.randint(50, (64, 6), generator=torch.Generator().manual_seed(0))
Y = torch.randint(2, (64,), generator=torch.Generator().manual_seed(1))


class Bag(nn.Module):
    """Embeddings and a head; ids repeat within an example and between micro-batches."""

    def __init__(self, kind, *, sparse):
        super().__init__()
        torch.manual_seed(1)
        self.embed = kind(50, 8, sparse=sparse)
        self.out = nn.Linear(8, 2)

    def forward(self, ids):
        rows = self.embed(ids)
        return self.out(rows if rows.dim() == 2 else rows.mean(1))


OPTIONS = {
    "plain": {},
    "clipped": {"clip_norm": 0.05},
    "hardly clipped": {"clip_norm": 0.3},
    "not clipped": {"clip_norm": 1e9},
    "accumulated": {"accumulate": 2},
    "accumulated and clipped": {"accumulate": 2, "clip_norm": 0.05},
    "fp16": {"precision": "fp16", "accumulate": 2, "clip_norm": 0.05},
}


def trained(kind, *, sparse, precision="fp32", **options):
    """The weights after two epochs, and the norms of all steps."""
    model = Bag(kind, sparse=sparse)
    model = model if precision == "fp16" else model.double()
    norms = []

    class Norms(fw.Callback):
        def on_log(self, state):
            norms.extend(r.value for r in state.records if "grad_norm" in r.name and isinstance(r.value, float))

    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        callbacks=[fw.GradientNorm(), Norms()],
        log_every=1,
        precision=precision,
        device="cpu",
        **options,
    )
    trainer.fit(list(zip(IDS.split(16), Y.split(16), strict=True)), epochs=2)
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [nn.EmbeddingBag, nn.Embedding], ids=lambda kind: kind.__name__)
def test_sparse_and_dense_gradients_train_alike(kind, name):
    """Weights and gradient norms are those of sparse=False, with clipping, accumulation and fp16."""
    weights, norms = trained(kind, sparse=True, **OPTIONS[name])
    expected, reference = trained(kind, sparse=False, **OPTIONS[name])
    tolerance = {"rtol": 2e-3, "atol": 1e-5} if name == "fp16" else {"rtol": 1e-12, "atol": 1e-14}
    for one, other in zip(expected, weights, strict=True):
        torch.testing.assert_close(other, one, **tolerance)
    assert len(norms) == len(reference) > 0
    assert all(
        math.isclose(a, b, rel_tol=1e-2 if name == "fp16" else 1e-6) for a, b in zip(norms, reference, strict=True)
    )


def test_a_watch_clips_sparse_gradients():
    """In a hand-written loop, too, the clipped step is that of dense gradients."""

    def run(*, sparse):
        model = Bag(nn.EmbeddingBag, sparse=sparse).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loader = list(zip(IDS.split(16), Y.split(16), strict=True))
        with fw.Watch(model, optimizer, train_loader=loader, clip_norm=0.05) as watch:
            for _ in watch.epochs(2):
                for ids, y in watch.train():
                    watch.loss(model(ids), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return model.embed.weight.detach(), watch.state.total_norm

    for one, other in zip(run(sparse=False), run(sparse=True), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


def test_only_sparse_gradients():
    """A model of nothing but sparse embeddings takes a clipped step."""
    model = nn.EmbeddingBag(50, 2, sparse=True).double()
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = fw.Trainer(model, optimizer, clip_norm=0.01, device="cpu")
    trainer.fit([(IDS[:16], Y[:16])], epochs=1)
    assert float((model.weight.detach() - start).norm()) == pytest.approx(0.01, rel=1e-3)
