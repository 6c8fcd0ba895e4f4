"""Values of NumPy and 0-dim tensors: plain numbers as options and in files, and no file that can't be read again."""

import enum
from collections import Counter, OrderedDict
from decimal import Decimal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw
from fitwatch import rules, saving
from fitwatch.rules.overfitting import OverfittingRule


class Pair(NamedTuple):
    a: int
    b: int


class Colour(enum.IntEnum):
    RED = 3


class Word(enum.StrEnum):
    YES = "yes"


VALUES = [
    (np.float64(0.1), 0.1),
    (np.float32(0.5), 0.5),
    (np.float16(0.5), 0.5),
    (np.longdouble(0.25), 0.25),
    (np.int64(-3), -3),
    (np.uint8(200), 200),
    (np.bool_(True), True),
    (np.str_("x"), "x"),
    (np.complex128(1 + 2j), 1 + 2j),
    (np.arange(3), torch.arange(3)),
    (np.zeros((2, 0), np.float32), torch.zeros(2, 0)),
    (np.array(2.5), torch.tensor(2.5, dtype=torch.float64)),
    (np.arange(6.0).reshape(2, 3)[:, ::-1], torch.tensor([[2.0, 1, 0], [5, 4, 3]], dtype=torch.float64)),
    (np.arange(3, dtype=">i4"), torch.arange(3, dtype=torch.int32)),
    (np.array([0.5], np.longdouble), torch.tensor([0.5], dtype=torch.float64)),
    (np.array([True, False]), torch.tensor([True, False])),
    (np.array(["a", "b"]), ["a", "b"]),
    (np.array([1, None, "x"], dtype=object), [1, None, "x"]),
    ([np.int32(1), (np.float64(2.0), {"k": np.int8(3)})], [1, (2.0, {"k": 3})]),
    ({np.int64(4): np.float32(1.0)}, {4: 1.0}),
    ({np.int64(4), np.int64(5)}, {4, 5}),
    (Counter({np.int64(2): 1}), Counter({2: 1})),
    (OrderedDict(a=np.int64(2)), OrderedDict(a=2)),
    (Pair(np.int64(1), 2), (1, 2)),
    (Colour.RED, 3),
    (Word.YES, "yes"),
]


def equal(a, b):
    """Compare two values with their types, as torch and Python do."""
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(b, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[k], b[k]) for k in b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(("given", "expected"), VALUES)
def test_values_of_numpy_come_back_plain(tmp_path, given, expected):
    """Wherever a value of NumPy stands, the file holds the plain number, tensor or list that it stands for."""
    saving.write(tmp_path / "a.pt", {"format": saving.FORMAT, "deep": [{"value": given}]})
    (found,) = saving.read(tmp_path / "a.pt")["deep"]
    assert equal(found["value"], expected)


def test_plain_content_is_written_as_it_is():
    """Content without such values is the very same object afterwards, its tensors too."""
    content = {"a": [torch.ones(2), (1, 2.0, None, b"x")], "b": OrderedDict(c={1, 2}), "d": Counter([1]), "e": 1j}
    assert saving.plain_data(content) is content


@pytest.mark.parametrize(
    "options", [{"every_epochs": None}, {"every_epochs": 2}, {"every_epochs": None, "every_steps": 2}]
)
def test_every_file_can_be_read_and_resumed(tmp_path, data, options):
    """With values of NumPy in the optimizer, a callback and the history, each file reads, and the fit resumes to the bit."""

    class Curve(fw.Callback):
        def __init__(self):
            self.seen = np.zeros(3)

        def on_fit_start(self, state):
            state.history.names.add("val/auc")

        def on_validation_end(self, state):
            state.metrics["val/auc"] = np.float64(state.metrics["val/loss"])
            self.seen = self.seen + np.arange(3.0)

        def state_dict(self):
            return {"seen": self.seen, "best": np.float32(1.0)}

        def load_state_dict(self, state_dict):
            self.seen = np.asarray(state_dict["seen"])

    def fit(folder, epochs):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = torch.optim.Adam(model.parameters(), np.float64(0.1), betas=(np.float64(0.5), np.float64(0.9)))
        callbacks = [curve := Curve(), fw.EarlyStopping("val/auc", mode="min"), fw.Checkpoint(folder, **options)]
        trainer = fw.Trainer(model, optimizer, callbacks=callbacks, device="cpu", seed=0)
        result = trainer.fit(DataLoader(data, 16), DataLoader(data, 64), epochs=epochs, resume=resume)
        return result.history, model.weight, curve.seen.tolist()

    resume = None
    expected = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2)
    files = list((tmp_path / "b").iterdir())
    assert "best.pt" in {file.name for file in files}
    for file in files:
        assert type(saving.read(file)["optimizer"]["param_groups"][0]["lr"]) is float
    if options["every_epochs"]:
        resume = "auto"
        history, weight, seen = fit(tmp_path / "b", 4)
        assert expected[0] == history
        assert torch.equal(expected[1], weight)
        assert expected[2] == seen


class Thing:
    pass


UNREADABLE = [
    Thing(),
    lambda: None,
    np.datetime64("2020-01-01"),
    np.ma.array([1]),
    frozenset([1]),
    range(3),
    Decimal(1),
]


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "options", [{"every_epochs": None}, {"every_epochs": 2}, {"every_epochs": None, "every_steps": 2}]
)
def test_a_state_that_cannot_be_read_again_is_refused_by_key(tmp_path, data, options, value):
    """Whichever file is due, the error names the key, and nothing unreadable stays in the folder."""

    class Bad(fw.Callback):
        def state_dict(self):
            return {"fine": 1, "who": [0, value]}

    model = nn.Linear(4, 3).double()
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[Bad(), fw.Checkpoint(tmp_path / "bad", **options)],
        device="cpu",
    )
    with pytest.raises(
        ValueError, match=rf"pt was not written: callbacks\.Bad\.who\.1 is .*type {type(value).__name__},"
    ):
        trainer.fit([data.tensors], [data.tensors], epochs=2)
    assert list((tmp_path / "bad").iterdir()) == []


def integers(value):
    return [np.int64(value), np.uint8(value), np.int32(value), np.array(value), torch.tensor(value)]


def floats(value):
    return [
        np.float64(value),
        np.float32(value),
        np.float16(value),
        np.array(value),
        torch.tensor(value),
        Decimal(value),
    ]


def stored(name, value):
    """Give the option to what takes it, and return what is kept."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters())
    owners = {
        **dict.fromkeys(
            ("accumulate", "log_every", "seed", "clip_norm"), lambda **k: fw.Trainer(model, optimizer, **k)
        ),
        **dict.fromkeys(("max_steps",), lambda **k: fw.Watch(model, optimizer, **k).state.plan),
        **dict.fromkeys(("keep", "every_steps", "every_epochs"), lambda **k: fw.Checkpoint("x", **k)),
        **dict.fromkeys(
            ("patience", "window", "min_delta", "baseline"), lambda **k: rules.Patience(**{"patience": 3, **k})
        ),
        **dict.fromkeys(("warmup", "min_rise", "hold"), OverfittingRule),
        **dict.fromkeys(("readings", "exploding", "vanishing"), rules.GradientRule),
        **dict.fromkeys(("every", "histogram_every"), fw.GradientNorm),
        **dict.fromkeys(("start_epoch", "ramp_epochs", "num_classes"), fw.WeightedLoss),
        "probe_examples": fw.OverfittingDetector,
        "ignore_index": fw.CrossEntropy,
    }
    return getattr(owners[name](**{name: value}), name)


INTEGERS = ["accumulate", "log_every", "seed", "max_steps", "keep", "every_steps", "every_epochs", "patience", "window",
            "warmup", "readings", "every", "histogram_every", "start_epoch", "ramp_epochs", "num_classes",
            "probe_examples", "ignore_index"]  # fmt: skip
FLOATS = ["clip_norm", "min_delta", "baseline", "min_rise", "hold", "exploding"]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_numpy_are_options(name):
    """Each integer option takes integers of NumPy and 0-dim tensors, and keeps a plain one; floats and bools it refuses."""
    for value in integers(11):
        assert type(stored(name, value)) is int
        assert stored(name, value) == 11
    if name == "ignore_index":
        return
    for value in (*floats(3.0)[:-1], np.bool_(True), True, np.array([3]), torch.tensor([3]), "3"):
        with pytest.raises(TypeError, match=f"{name} must be an integer.*got"):
            stored(name, value)


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_of_numpy_are_options(name):
    """Each real option takes numbers of NumPy, 0-dim tensors and decimals, and keeps a plain one; bools it refuses."""
    for value in (*floats(2.5), *integers(2)):
        assert type(stored(name, value)) in (int, float)
        assert stored(name, value) == float(value)
    for value in (np.bool_(True), torch.tensor(True), np.array([2.5]), torch.tensor([2.5]), "many", 2 + 1j):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be a"):
            stored(name, value)


@pytest.mark.parametrize("epochs", integers(2))
def test_limits_of_numpy_count(data, epochs):
    """`fit` and `Watch.epochs` take integers of NumPy as limits, and train as many epochs and steps."""
    model = nn.Linear(4, 3).double()
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    loader = DataLoader(data, 16)
    assert len(trainer.fit(loader, loader, epochs=epochs, max_steps=epochs + 98, validate_every=epochs).history) == 4
    assert type(trainer.state.plan.max_steps) is type(trainer.state.plan.epochs) is int
    with fw.Watch(model, trainer.optimizer) as watch:
        for _ in watch.epochs(epochs):
            watch.loss(model(data.tensors[0]), data.tensors[1]).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    assert watch.state.progress.epoch == 2
    for wrong in (3.0, np.float64(3), True, np.bool_(True), 0, np.int64(0), "3"):
        with pytest.raises(ValueError, match="epochs must be an integer of 1 or more"):
            trainer.fit(loader, epochs=wrong)


def test_flags_and_names_of_numpy_are_options():
    """A bool or a string of NumPy, as a random choice gives it, is kept as a plain one."""
    stop = fw.EarlyStopping(np.str_("val/loss"), restore_best=np.bool_(False))
    assert (type(stop.monitor), stop.restore_best) == (str, False)
    assert stop.restore_best is False
    with pytest.raises(TypeError, match="restore_best must be of type bool, got 1"):
        fw.EarlyStopping(restore_best=1)
