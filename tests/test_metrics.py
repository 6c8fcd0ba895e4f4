"""What metrics may take and return."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import fitwatch as fw

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(50) % 3
VAL = DataLoader(TensorDataset(X, Y), 8)


@dataclasses.dataclass(frozen=True)
class Out:
    logits: torch.Tensor
    aux: dict


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.kind = nn.Linear(4, 3).double(), kind

    def forward(self, x):
        z = self.a(x)
        return {
            "tensor": z,
            "tuple": (z, [2 * z]),
            "dict": {"z": z, "more": (2 * z,)},
            "dataclass": Out(z, {"b": 2 * z}),
        }[self.kind]


def logits(outputs):
    """Both logits in the outputs of a `Model`."""
    if isinstance(outputs, torch.Tensor):
        return outputs, 2 * outputs
    if isinstance(outputs, tuple):
        return outputs[0], outputs[1][0]
    return (outputs["z"], outputs["more"][0]) if isinstance(outputs, dict) else (outputs.logits, outputs.aux["b"])


def loss(outputs, targets):
    return nn.functional.cross_entropy(logits(outputs)[0], targets)


def recall(outputs, targets):
    first, second = logits(outputs)
    assert torch.equal(2 * first, second)
    assert not first.requires_grad
    return torch.stack([(first.argmax(1)[targets == k] == k).double().mean() for k in range(3)])


class Recall:
    """The same, batch by batch."""

    def reset(self):
        self.hits, self.all = torch.zeros(3), torch.zeros(3)

    def update(self, outputs, targets):
        found = logits(outputs)[0].argmax(1)
        for k in range(3):
            self.hits[k] += (found[targets == k] == k).sum()
            self.all[k] += (targets == k).sum()

    def compute(self):
        return {k: self.hits[i] / self.all[i] for i, k in enumerate("abc")}


def measure(kind="tensor", by="trainer", val=VAL, **metrics):
    model = Model(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if by == "trainer":
        return model, fw.Trainer(model, optimizer, loss, metrics=metrics, device="cpu").validate(val)
    return model, fw.Watch(model, optimizer, loss=loss, metrics=metrics, val_loader=val).evaluate(val)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass"])
@pytest.mark.parametrize("by", ["trainer", "watch"])
def test_metrics_take_any_outputs_and_return_vectors_and_dicts(kind, by):
    """Vectors become name/index, dicts name/key, for every container, with the values of the whole set."""
    model, found = measure(kind, by, each=recall, named=Recall())
    with torch.no_grad():
        expected = recall(model(X), Y)
    assert [found[f"val/each/{k}"] for k in range(3)] == expected.tolist()
    assert [found[f"val/named/{k}"] for k in "abc"] == pytest.approx(expected.tolist())
    assert not {"val/each", "val/named"} & found.keys()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.5), {"": 0.5}),
        (torch.tensor([0.5]), {"": 0.5}),
        (torch.tensor(True), {"": 1.0}),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), {"": 0.5}),
        (np.float32(0.5), {"": 0.5}),
        (np.array(0.5), {"": 0.5}),
        (np.array([0.5]), {"": 0.5}),
        (True, {"": 1.0}),
        (3, {"": 3.0}),
        (np.array([1, 2]), {"/0": 1.0, "/1": 2.0}),
        ([1.0, np.float64(2)], {"/0": 1.0, "/1": 2.0}),
        (torch.tensor([1, 2, 3]), {"/0": 1.0, "/1": 2.0, "/2": 3.0}),
        ({"p": torch.tensor([1.0, 2.0]), "q": {"r": 3}}, {"/p/0": 1.0, "/p/1": 2.0, "/q/r": 3.0}),
    ],
)
def test_values_become_numbers(value, expected):
    """Scalars of torch, NumPy and Python are one number; vectors and dicts, also nested, are several."""
    _, found = measure(m=lambda o, t: value)
    assert {n.removeprefix("val/m"): v for n, v in found.items() if n.startswith("val/m")} == expected


@pytest.mark.parametrize(
    "value", [None, "high", torch.ones(2, 2), np.ones((2, 2)), [], {}, torch.ones(0), 1j, ["a", "b"]]
)
def test_other_values_are_refused_by_name(value):
    """What is no number, vector or dict is an error that names the metric and what it may be."""
    with pytest.raises(TypeError, match=r"the metric 'm.*' must be a number, a vector with a number for each class"):
        measure(m=lambda o, t: value)


def test_vectors_have_the_names_of_the_classes():
    """The names in dataset.classes, also within a Subset, name a vector of their number, and no other."""
    data = TensorDataset(X, Y)
    data.classes = ["cat", "dog", "owl"]
    val = DataLoader(Subset(data, range(30)), 8)
    _, found = measure(by="watch", val=val, each=recall, two=lambda o, t: [1, 2])
    assert [n for n in found if "each" in n or "two" in n] == [
        "val/each/cat",
        "val/each/dog",
        "val/each/owl",
        "val/two/0",
        "val/two/1",
    ]


def test_a_part_of_a_vector_can_be_monitored():
    """Early stopping monitors one class of a vector; a name that no metric starts with is refused before step 1."""
    model = Model("tensor")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stop = fw.EarlyStopping("val/each/2", mode="max")
    trainer = fw.Trainer(model, optimizer, loss, metrics={"each": recall}, callbacks=[stop], device="cpu")
    result = trainer.fit(VAL, VAL, epochs=3)
    assert stop.rule.best == max(entry["val/each/2"] for entry in result.history)
    wrong = fw.EarlyStopping("val/every/2", mode="max")
    trainer = fw.Trainer(model, optimizer, loss, metrics={"each": recall}, callbacks=[wrong], device="cpu")
    with pytest.raises(ValueError, match="monitors 'val/every/2', which this fit will not measure"):
        trainer.fit(VAL, VAL, epochs=1)


def test_outputs_of_varying_length_need_an_object():
    """A function over outputs that can't be joined is refused with the metric's name and the way out; an object works."""
    batches = [(torch.randn(4, length, 4).double(), torch.randint(3, (4, length))) for length in (5, 7)]

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.a(x).transpose(1, 2)

    class Accuracy:
        def reset(self):
            self.seen = []

        def update(self, outputs, targets):
            self.seen.append((outputs.argmax(1) == targets).flatten())

        def compute(self):
            return torch.cat(self.seen).double().mean()

    model = Tagger()

    def trainer(metric):
        return fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), metrics={"accuracy": metric}, device="cpu")

    with pytest.raises(ValueError, match=r"the metric 'accuracy' is .*\(4, 3, 5\), \(4, 3, 7\).*Write it as an object"):
        trainer(lambda o, t: 0.0).validate(batches)
    hits = torch.cat([(model(x).argmax(1) == y).flatten() for x, y in batches]).double().mean()
    assert trainer(Accuracy()).validate(batches)["val/accuracy"] == hits.item()


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_all_callbacks_work_with_several_outputs(kind, tmp_path):
    """Detector, standard errors, TensorBoard and sample weights of metrics take tuples, dicts and dataclasses."""
    model = Model(kind)
    callbacks = [
        fw.GradientNorm(),
        fw.OverfittingDetector(),
        fw.EarlyStopping(),
        fw.TensorBoard(tmp_path, show_link=False),
    ]

    def weighted(outputs, targets, sample_weight):
        return sample_weight.sum()

    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        loss,
        callbacks=callbacks,
        metrics={"each": recall, "weighted": weighted},
        device="cpu",
    )
    result = trainer.fit(VAL, VAL, epochs=2)
    assert result.verdict is not None
    assert result.history[-1]["val/weighted"] == 50
    assert "val/each/2" in result.best.metrics


class Count:
    """Counts the examples."""

    def reset(self):
        self.n = 0

    def update(self, outputs, targets):
        self.n += len(targets)

    def compute(self):
        return self.n


@pytest.mark.parametrize("hand", [False, True])
@pytest.mark.parametrize(
    ("metrics", "match"),
    [
        ([lambda o, t: 1.0], "metrics must be a dict name -> function.*got list"),
        (lambda o, t: 1.0, "metrics must be a dict name -> function.*got function"),
        ({"r": Count}, r"metrics\['r'\] is the class Count: use an instance, Count\(...\)"),
    ],
)
def test_metrics_of_another_form_are_refused_at_once(metrics, match, hand):
    """A list, a lone function and a class instead of an instance are refused by Trainer and Watch when made."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match=match):
        (fw.Watch if hand else fw.Trainer)(model, optimizer, metrics=metrics)


@pytest.mark.parametrize(
    "metrics",
    [
        {"r": lambda o, t: {"a": 1.0}, "r/a": lambda o, t: 2.0},
        {"r/0": lambda o, t: 2.0, "r": lambda o, t: torch.tensor([1.0, 2.0])},
        {"r": lambda o, t: {"a/b": 1.0, "a": {"b": 2.0}}},
        {"r": lambda o, t: {1: 1.0, "1": 2.0}},
    ],
)
def test_two_values_of_one_name_are_refused(metrics):
    """A part of a metric never overwrites another metric or another part."""
    model = torch.nn.Linear(2, 2)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), metrics=metrics, device="cpu")
    with pytest.raises(ValueError, match="name"):
        trainer.validate([(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))])
