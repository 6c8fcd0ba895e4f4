"""Trainer.predict and Trainer.test."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw


def trainer_of(model, loss=None, **options):
    return fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, device="cpu", **options)


def network(columns=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, columns))


X = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(37) % 3


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X, Y), 8),
        DataLoader(TensorDataset(X), 8),
        DataLoader(X, 8),
        [{"input": X[:20], "target": Y[:20]}, {"input": X[20:]}],
        [[X[:20], Y[:20], torch.ones(20)], [X[20:], Y[20:], torch.ones(17)]],
        (part for part in X.split(10)),
    ],
)
def test_predict_takes_batches_with_and_without_targets(loader):
    """All forms of batches give the model's outputs in eval mode, in order, without gradients; modes stay."""
    model = network()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    outputs = trainer_of(model).predict(loader)
    assert [m.training for m in model.modules()] == modes
    assert not outputs.requires_grad
    assert torch.allclose(outputs, model.eval()(X), atol=1e-6)


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: torch.Tensor | None = None


class Pair(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass", "namedtuple", "nested"])
def test_predict_joins_every_container(kind):
    """Tuples, lists, dicts, dataclasses and nests of them come back as they are, with joined tensors."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 5)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return {
                "tuple": (a, b),
                "list": [a, b],
                "dict": {"a": a, "b": b},
                "dataclass": Out(a),
                "namedtuple": Pair(a, b),
                "nested": {"a": (a, {"b": b})},
            }[kind]

    model = Model()
    joined, whole = trainer_of(model).predict(DataLoader(X, 10)), model(X)
    assert type(joined) is type(whole)
    flat = {
        "tuple": list,
        "list": lambda o: o,
        "dict": lambda o: [o["a"], o["b"]],
        "dataclass": lambda o: [o.logits],
        "namedtuple": lambda o: [o.logits, o.aux],
        "nested": lambda o: [o["a"][0], o["a"][1]["b"]],
    }[kind]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(flat(joined), flat(whole), strict=True))


@pytest.mark.parametrize(
    ("loss", "columns", "expected"),
    [
        (None, 3, lambda z: z.softmax(1)),
        (nn.CrossEntropyLoss(), 3, lambda z: z.softmax(1)),
        (fw.Focal(), 1, lambda z: z.sigmoid()),
        (fw.BinaryCrossEntropy(), 3, lambda z: z.sigmoid()),
        (nn.BCEWithLogitsLoss(), 1, lambda z: z.sigmoid()),
        (nn.NLLLoss(), 3, lambda z: z.exp()),
    ],
)
def test_probabilities_follow_from_the_loss(loss, columns, expected):
    """proba=True applies softmax to logits of classes, sigmoid to one logit or to labels, exp to log-probabilities."""
    model = network(columns)
    found = trainer_of(model, loss).predict(DataLoader(X, 10), proba=True)
    assert torch.allclose(found, expected(model.eval()(X)), atol=1e-6)


def test_half_precision_gives_float32_probabilities():
    """Probabilities of a model in bfloat16 sum to 1 within the precision of float32."""
    model = nn.Linear(4, 3).bfloat16()
    found = trainer_of(model).predict(DataLoader(X.bfloat16(), 10), proba=True)
    assert found.dtype is torch.float32
    assert torch.allclose(found.sum(1), torch.ones(37), atol=1e-6)


def test_what_cannot_be_predicted_is_refused():
    """No batch, varying lengths, a loss without probabilities, several outputs with proba: errors with what to do."""
    model = network()
    with pytest.raises(ValueError, match="loader is empty"):
        trainer_of(model).predict([])
    with pytest.raises(ValueError, match="nothing to predict"):
        trainer_of(model).predict(iter([]))
    with pytest.raises(TypeError, match="loader must be an iterable"):
        trainer_of(model).predict(3)
    for rows in (X[:5], X[:5].numpy(), X[0]):
        with pytest.raises(TypeError, match=r"rows would be taken as a batch: wrap it in a list"):
            trainer_of(model).predict(rows)
    assert trainer_of(model).predict([X[:5]]).shape == (5, 3)
    loader, examples = DataLoader(X, 10), TensorDataset(X, X[:, 0].long())
    for several in ({"a": loader}, [loader, loader]):
        with pytest.raises(TypeError, match="must be one loader, got a .*: call predict for each"):
            trainer_of(model).predict(several)
    for call in (trainer_of(model).predict, trainer_of(model).test, trainer_of(model).validate):
        with pytest.raises(TypeError, match=r"got TensorDataset: wrap it in DataLoader\("):
            call(examples)
    with pytest.raises(ValueError, match=r"different shapes: \(2, 5\), \(2, 7\).*Pad them"):
        _of(lambda x: x, model).predict([torch.ones(2, 5), torch.ones(2, 7)])
    with pytest.raises(ValueError, match="proba=True needs a loss that says what the outputs are"):
        trainer_of(model, lambda o, t: o.mean()).predict(DataLoader(X, 10), proba=True)
    with pytest.raises(TypeError, match="one tensor, got tuple"):
        _of(lambda x: (x, x), model).predict(DataLoader(X, 10), proba=True)


def _of(step, model):
    class Mine(fw.Trainer):
        def prediction_step(self, batch):
            return step(batch)

    return Mine(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")


def test_test_is_named_for_the_test_set():
    """It returns what validate returns, under test/, also after a fit, and enters nothing into the history."""
    trainer = trainer_of(network(), metrics={"accuracy": lambda o, t: (o.argmax(1) == t).float().mean()})
    loader = DataLoader(TensorDataset(X, Y), 8)
    result = trainer.fit(loader, loader, epochs=1)
    found = trainer.test(loader)
    assert found == {name.replace("val/", "test/"): value for name, value in trainer.validate(loader).items()}
    assert {"test/loss", "test/accuracy"} <= found.keys()
    assert len(result.history) == len(trainer.state.history) == 1


def test_a_watch_predicts_too():
    """Watch.predict gives the same outputs as the model itself."""
    model = network()
    watch = fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1))
    assert torch.allclose(watch.predict(DataLoader(X, 10)), model.eval()(X), atol=1e-6)
