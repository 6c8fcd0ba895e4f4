"""The gradient-norm inspector."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw


class Keep(fw.Callback):
    """Keeps every gradient, and every record."""

    def __init__(self):
        self.gradients, self.records, self.clipped = [], [], []

    def on_gradients_ready(self, state):
        self.gradients.append(
            {n: p.grad.double().clone() for n, p in state.model.named_parameters() if p.grad is not None}
        )

    def on_log(self, state):
        self.records += state.records


def run(model, data, *, log_every=3, **options):
    keep = Keep()
    trainer = fw.Trainer(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1),
        callbacks=[fw.GradientNorm(**options), keep],
        log_every=log_every,
        clip_norm=1e-3,
        device="cpu",
    )
    trainer.fit(DataLoader(data, 8), epochs=1)
    return keep


def values(keep, name):
    return {r.step: r.value for r in keep.records if r.name == name}


def test_total_norms_of_the_window_are_torchs(model, data):
    """Mean and max over each window, the short last one too, equal torch's own total norms before clipping, in float64."""
    keep = run(model, data)
    norms = [torch.nn.utils.get_total_norm(g.values()).item() for g in keep.gradients]
    windows = {3: norms[0:3], 6: norms[3:6], 8: norms[6:8]}
    mean, largest = values(keep, "train/optim/grad_norm"), values(keep, "train/optim/grad_norm_max")
    assert set(windows) == set(mean) == set(largest)
    for step, window in windows.items():
        assert mean[step] == pytest.approx(sum(window) / len(window), rel=1e-12)
        assert largest[step] == pytest.approx(max(window), rel=1e-12)


def test_norms_per_layer(model, data):
    """A layer's figure is the window's mean of the norm of its weight and bias together."""
    keep = run(model, data, log_every=4)
    for layer in ("0", "2"):
        norms = [torch.cat([g[f"{layer}.weight"].flatten(), g[f"{layer}.bias"]]).norm().item() for g in keep.gradients]
        logged = values(keep, f"train/params/grad_norm/{layer}")
        assert {
            4: pytest.approx(sum(norms[:4]) / 4, rel=1e-12),
            8: pytest.approx(sum(norms[4:]) / 4, rel=1e-12),
        } == logged


def test_every_reads_only_those_steps(model, data):
    """With every=4 the figures are those of steps 4 and 8 alone."""
    keep = run(model, data, log_every=8, every=4, per_layer=False)
    norms = [torch.nn.utils.get_total_norm(g.values()).item() for g in keep.gradients]
    assert {8: pytest.approx((norms[3] + norms[7]) / 2, rel=1e-12)} == values(keep, "train/optim/grad_norm")
    assert not [r for r in keep.records if "params" in r.name]


def test_frozen_unused_and_half_precision_parameters(data):
    """Frozen layers are left out, unused ones count 0, and float16 norms are taken in float32, where they don't overflow."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = (nn.Linear(4, 3).double() for _ in range(3))
            self.frozen.requires_grad_(requires_grad=False)

        def forward(self, x):
            return self.used(x) + self.frozen(x)

    model = Net()
    keep = run(model, data, log_every=8)
    names = {r.name for r in keep.records if "params" in r.name}
    assert {"train/params/grad_norm/used", "train/params/grad_norm/unused"} == names
    assert values(keep, "train/params/grad_norm/unused") == {8: 0.0}

    half = nn.Linear(4, 1, bias=False).half()
    half.weight.grad = torch.full_like(half.weight, 60000.0)
    state = fw.State(model=half, optimizer=torch.optim.SGD(half.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    norm.on_gradients_ready(state)
    state.flush()
    logged = {r.name: r.value for r in state.records}
    assert logged["train/optim/grad_norm"] == pytest.approx(2 * half.weight.grad[0, 0].item(), rel=1e-6)


def test_only_what_the_optimizer_moves_is_read(data):
    """Training a head alone, the backbone's gradients, which nobody clears, are not in the figures."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).double()
    keep = Keep()
    optimizer = torch.optim.SGD(model[1].parameters(), 0.0)
    fw.Trainer(model, optimizer, callbacks=[fw.GradientNorm(), keep], log_every=1, device="cpu").fit(
        [(data.tensors[0], data.tensors[1])] * 4, epochs=1
    )
    norms = values(keep, "train/optim/grad_norm")
    head = torch.cat([keep.gradients[0]["1.weight"].flatten(), keep.gradients[0]["1.bias"]]).norm().item()
    assert [pytest.approx(head, rel=1e-12)] * 4 == list(norms.values())
    assert not [r for r in keep.records if r.name == "train/params/grad_norm/0"]


def test_sparse_gradients(data):
    """The norm of a sparse gradient is that of its dense form."""
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).pow(2).sum().backward()
    state = fw.State(model=embedding, optimizer=torch.optim.SGD(embedding.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    norm.on_gradients_ready(state)
    state.flush()
    expected = embedding.weight.grad.to_dense().norm().item()
    assert {r.name: r.value for r in state.records}["train/optim/grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_a_nan_is_not_hidden_by_the_maximum(data):
    """A NaN in one step of a window shows in both mean and max."""
    model = nn.Linear(2, 2)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    for value in (1.0, float("nan"), 2.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        norm.on_gradients_ready(state)
    state.flush()
    logged = {r.name: r.value for r in state.records}
    assert logged["train/optim/grad_norm"] != logged["train/optim/grad_norm"]
    assert logged["train/optim/grad_norm_max"] != logged["train/optim/grad_norm_max"]


def test_gradients_are_left_as_they_are(model, data):
    """Training with the inspector ends in the same bits as without."""
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    other.load_state_dict(model.state_dict())
    run(model, data)
    fw.Trainer(other, torch.optim.SGD(other.parameters(), 0.1), clip_norm=1e-3, device="cpu").fit(
        DataLoader(data, 8), epochs=1
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_options_are_checked():
    """Every must be 1 or more."""
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        fw.GradientNorm(every=0)
