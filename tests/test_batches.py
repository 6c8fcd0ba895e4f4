"""Batches: how many examples they hold, how they are moved, and what their parts mean."""

import collections
import dataclasses
import logging
import types
from contextlib import nullcontext
from typing import NamedTuple

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import fitwatch as fw
from fitwatch.data import batches, count_classes

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Data:
    x: torch.Tensor
    name: str


@attrs.frozen
class Attrs:
    x: torch.Tensor
    more: list


class Named(NamedTuple):
    x: torch.Tensor
    y: int


class MyList(list):
    def __init__(self, items, extra):
        super().__init__(items)
        self.extra = extra


class MyTuple(tuple):
    __slots__ = ()


class Movable:
    def __init__(self, x, *, returns):
        self.x, self.returns = x, returns

    def to(self, device):
        if self.returns:
            return Movable(self.x.to(device), returns=True)
        self.x = self.x.to(device)
        return None


class Opaque:
    def __init__(self, x):
        self.x = x


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Strict(tuple):
    __slots__ = ()

    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


ONE = torch.ones(2)
CONTAINERS = {
    "tuple": ((ONE, "a"), lambda b: b[0]),
    "list": ([ONE, None], lambda b: b[0]),
    "named tuple": (Named(ONE, 3), lambda b: b.x),
    "dict": ({"x": ONE, 3: 4}, lambda b: b["x"]),
    "ordered": (collections.OrderedDict(x=ONE), lambda b: b["x"]),
    "default": (collections.defaultdict(list, x=ONE), lambda b: b["x"]),
    "user dict": (collections.UserDict(x=ONE), lambda b: b["x"]),
    "user list": (collections.UserList([ONE]), lambda b: b[0]),
    "proxy": (types.MappingProxyType({"x": ONE}), lambda b: b["x"]),
    "deque": (collections.deque([ONE], maxlen=3), lambda b: b[0]),
    "set": ({ONE}, lambda b: next(iter(b))),
    "frozenset": (frozenset({ONE}), lambda b: next(iter(b))),
    "dataclass": (Data(ONE, "a"), lambda b: b.x),
    "attrs": (Attrs(ONE, [ONE]), lambda b: b.more[0]),
    "own list": (MyList([ONE], 7), lambda b: b[0]),
    "own tuple": (MyTuple([ONE]), lambda b: b[0]),
    "packed": (pack_sequence([torch.ones(3), torch.ones(2)]), lambda b: b.data),
    "movable": (Movable(ONE, returns=True), lambda b: b.x),
    "moves itself": (Movable(ONE, returns=False), lambda b: b.x),
    "torch's": (torch.ones(3, 2).max(1), lambda b: b.indices),
    "array": (np.ones(3, dtype=np.float32), lambda b: b),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_are_moved_in_any_container(name):
    """A container comes back in its own type with its tensors moved, also inside another container."""
    batch, read = CONTAINERS[name]
    moved = batches.to_device((batch, {"in": batch}), META)
    for one in (moved[0], moved[1]["in"]):
        assert read(one).device == META
        assert type(one) is type(batch) or name == "array"
    if name == "own list":
        assert moved[0].extra == 7
        assert batch[0].device == torch.device("cpu")  # the user's own is left alone


@pytest.mark.parametrize(
    "batch",
    [torch.Size([3, 4]), {"a"}, "text", None, 3.5, range(4), [1, [2, "b"]], object()],
    ids=lambda b: type(b).__name__,
)
def test_what_holds_no_tensor_is_left_as_it_is(batch):
    """Other values are handed on as the same objects."""
    assert batches.to_device((batch,), META)[0] is batch


@pytest.mark.parametrize(
    ("batch", "name"), [(Opaque(ONE), "Opaque.x"), (Slots([ONE]), "Slots.x"), (Strict(ONE, 2), "Strict")]
)
def test_tensors_that_cannot_be_moved_are_refused(batch, name):
    """A tensor in an object that can't be rebuilt is an error that names its type, not left where it is."""
    with pytest.raises(TypeError, match=name):
        batches.to_device([batch], META)
    assert batches.move([batch], torch.device("cpu"))[0] is batch  # where it is already


def pack(n):
    return pack_sequence([torch.ones(5 - i, 2) for i in range(n)])


SIZES = {
    "pair": ((torch.ones(5, 2), torch.ones(5)), 5),
    "triple": ((torch.ones(5, 2), torch.ones(5), torch.ones(5)), 5),
    "dict": ({"a": torch.ones(5, 2), "b": [torch.ones(5), torch.ones(5)]}, 5),
    "dataclass": (Data(torch.ones(5), "a"), 5),
    "user dict": (collections.UserDict(a=torch.ones(5), b=torch.ones(5, 1)), 5),
    "with a number": ({"a": torch.ones(5, 2), "b": torch.ones(5), "temperature": torch.tensor(2.0)}, 5),
    "one example": ((torch.ones(3, 8), torch.tensor(1)), 1),
    "packed": ((pack(4), torch.ones(4)), 4),
    "detection": ((torch.ones(4, 3, 8), [{"boxes": torch.ones(n, 4)} for n in (1, 2, 2, 9)]), 4),
    "pair of dicts": ([{"a": torch.ones(5, 2)}, {"b": torch.ones(5)}], 5),
}


@pytest.mark.parametrize("name", SIZES)
def test_examples_are_counted_where_all_tensors_agree(name):
    """The number of examples is the first dimension that all tensors share."""
    batch, size = SIZES[name]
    assert batches.batch_size(batch) == size


X, Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
UNCLEAR = {
    "edges": {"x": X, "y": Y, "edges": torch.zeros(2, 7)},
    "edges first": {"edges": torch.zeros(2, 7), "x": X, "y": Y},
    "time first": (torch.zeros(9, 12, 8), Y),
    "names": {"x": X, "y": Y, "names": torch.arange(2)},
    "detection": ([torch.ones(3, 8, 8)] * 4, [{"boxes": torch.ones(n, 4)} for n in (1, 2, 2, 9)]),
    "nothing": {"x": "text"},
}


class Own(fw.Trainer):
    """Steps that return a mean."""

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.model(X), Y)

    validation_step = training_step


class Exact(fw.Trainer):
    """Steps that return sums."""

    def training_step(self, batch):
        return self.compute_loss(self.model(X), Y)

    validation_step = training_step


class Sized(Own):
    def batch_size(self, batch):
        return 12


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_mean_over_an_unknown_number_of_examples_is_refused(name):
    """Where tensors disagree, a scalar loss is refused before the first step; sums, or batch_size, make it clear."""

    def fit(kind):
        torch.manual_seed(1)
        model = nn.Linear(8, 2)
        start = model.weight.detach().clone()
        trainer = kind(model, torch.optim.SGD(model.parameters(), lr=0.1))
        try:
            return trainer.fit([UNCLEAR[name]] * 2, [UNCLEAR[name]], epochs=2).history[-1]["val/loss"]
        except TypeError:
            assert torch.equal(model.weight, start)
            raise

    with pytest.raises(TypeError, match=r"override batch_size\(batch\)"):
        fit(Own)
    assert fit(Exact) == pytest.approx(fit(Sized), rel=1e-6)


def test_a_watch_says_how_to_give_the_number_of_examples():
    """A loss that returns a mean needs outputs and targets that agree, or examples=; sums need neither."""

    def train(loss, use):
        torch.manual_seed(1)
        model = nn.Linear(8, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with fw.Watch(model, optimizer, loss=loss, train_loader=[(X, Y)], val_loader=[(X, Y)]) as watch:
            for _ in watch.epochs(1):
                for x, y in watch.train():
                    use(watch, model(x), y)
                    optimizer.step()
                    optimizer.zero_grad()
                with watch.validating():
                    watch.measured(nn.functional.cross_entropy(model(X), Y), examples=len(Y))
        return watch.result.history[-1]["train/loss"]

    def mean(output, target):
        return nn.functional.cross_entropy(output, target[0])

    with pytest.raises(TypeError, match=r"watch.backward\(watch.sums\(output, target\), examples=...\)"):
        train(mean, lambda watch, output, y: watch.loss(output, y[None]).backward())
    given = train(mean, lambda watch, output, y: watch.backward(watch.sums(output, y[None]), examples=len(y)))
    whole = train(None, lambda watch, output, y: watch.loss(output, y).backward())
    assert given == pytest.approx(whole, rel=1e-6)


def fit_of(loader, *callbacks, kind=fw.Trainer, val=None):
    torch.manual_seed(2)
    model = nn.Linear(8, 2)
    trainer = kind(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=callbacks, seed=0)
    result = trainer.fit(loader, [(X, Y)] if val is None else val, epochs=2)
    return model.weight.detach(), result.history[-1]


INDEX = torch.arange(12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("size", [3, 4, 12])
def test_an_index_is_not_taken_as_weights(size, shuffled, dtype):
    """Integers that tell the examples apart are refused as weights, in Trainer and Watch, in training and validation."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)) if shuffled and size == 12 else INDEX
    parts = [tuple(t[order].split(size)) for t in (X, Y, INDEX.to(dtype))]
    loader = list(zip(*parts, strict=True))
    for train, val in ((loader, None), ([(X, Y)], loader)):
        with pytest.raises(ValueError, match="index of the examples.*override training_step"):
            fit_of(train, val=val)
    model = nn.Linear(8, 2)
    watch = fw.Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), train_loader=loader, val_loader=loader)
    with watch, pytest.raises(ValueError, match="index of the examples"):
        watch.validate()


def test_weights_in_integers_stay_weights(caplog):
    """Counts weigh the examples as the same numbers in floats do, and one line says that there are weights."""
    caplog.set_level(logging.INFO, "fitwatch")
    counts = torch.randint(1, 4, (12,), generator=torch.Generator().manual_seed(0))
    found, history = fit_of([(X, Y, counts)] * 2)
    assert sum("pass them as floats" in r.message for r in caplog.records) == 1
    expected, reference = fit_of([(X, Y, counts.float())] * 2)
    assert torch.equal(found, expected)
    assert history == reference
    assert sum("carry a weight for each example" in r.message for r in caplog.records) == 2  # once in each fit
    named = [{"input": X, "target": Y, "sample_weight": INDEX}]
    assert not torch.equal(fit_of(named)[0], fit_of([(X, Y)])[0])  # by its name there is no doubt


THIRDS = {
    "shuffled index": (torch.randperm(12, generator=torch.Generator().manual_seed(3)), "refused"),
    "small integers": (torch.randperm(12, generator=torch.Generator().manual_seed(3)).to(torch.int16), "refused"),
    "index in floats": (INDEX.flip(0).float(), "numbers 0 to 11, each once"),
    "groups": (INDEX // 4 + 10, "here integers"),
    "domains": (INDEX % 2, "here integers"),
    "counts": (INDEX % 3 + 1, "here integers"),
    "floats": (INDEX % 3 + 0.5, ""),
    "a mask of positions": (torch.ones(12, 3, dtype=torch.int64), ""),
}


@pytest.mark.parametrize("kind", ["exposed", "subset", "joined", "list"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", THIRDS)
def test_the_whole_third_part_is_judged_before_the_first_step(case, size, kind, caplog):
    """An index is refused even if a batch of it looks like weights; other integers and floats that count up are told."""
    third, expected = THIRDS[case]
    positions = third.dim() > 1
    x, y = (X[:, :6].reshape(12, 2, 3), INDEX[:, None].expand(12, 3) % 2) if positions else (X, Y)
    data = TensorDataset(x, y, third)
    loader = {
        "exposed": DataLoader(data, size),
        "subset": DataLoader(Subset(data, range(12)), size),
        "joined": DataLoader(ConcatDataset([data]), size),
        "list": list(zip(*(t.split(size) for t in data.tensors), strict=True)),
    }[kind]
    for train, val in ((loader, None), ([(x, y)], loader)):
        caplog.clear()
        model = nn.Conv1d(2, 2, 1) if positions else nn.Linear(8, 2)
        before = model.weight.detach().clone()
        trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
        with pytest.raises(ValueError, match="index of the examples") if expected == "refused" else nullcontext():
            trainer.fit(train, val, epochs=1)
        told = [r.getMessage() for r in caplog.records if "sample_weight" in r.getMessage()]
        if expected == "refused":
            assert torch.equal(model.weight, before)
        else:
            assert [expected in text for text in told] == [True] * bool(expected)


@pytest.mark.parametrize("case", THIRDS)
def test_a_hand_written_loop_has_its_weights_judged(case, caplog):
    """`watch.loss` with a third argument refuses an index and tells of integers, as a Trainer does."""
    third, expected = THIRDS[case]
    if third.dim() > 1:
        return
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = fw.Watch(model, optimizer, train_loader=DataLoader(TensorDataset(X, Y, third), 2))
    with pytest.raises(ValueError, match="index of the examples") if expected == "refused" else nullcontext(), watch:
        for _ in watch.epochs(1):
            for x, y, w in watch.train():
                watch.loss(model(x), y, w).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert ("sample_weight" in caplog.text) == (expected not in ("", "refused"))


def test_weights_from_elsewhere_may_stand_beside_an_index():
    """Weights that a loop looks up by the index of the examples are weights."""
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    table = torch.linspace(0.5, 2, 12)
    with fw.Watch(model, optimizer, train_loader=DataLoader(TensorDataset(X, Y, INDEX), 4)) as watch:
        for _ in watch.epochs(1):
            for x, y, i in watch.train():
                loss = watch.loss(model(x), y, table[i])
                each = nn.functional.cross_entropy(model(x), y, reduction="none")
                assert loss.item() == pytest.approx(((table[i] * each).sum() / table[i].sum()).item())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()


class Triples(torch.utils.data.Dataset):
    def __init__(self, third):
        self.third = third

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return X[i], Y[i], self.third[i]


@pytest.mark.parametrize("data", ["exposed", "subset", "joined", "items", "batches"])
def test_classes_are_not_weighed_by_an_index(data, caplog):
    """An index beside the targets does not count the classes, and a warning says so; counts in integers do."""

    def of(third):
        whole = TensorDataset(X, Y, third)
        return {
            "exposed": whole,
            "subset": DataLoader(Subset(whole, list(range(1, 11))), 3),
            "joined": ConcatDataset([whole, whole]),
            "items": Triples(third),
            "batches": list(zip(X.split(3), Y.split(3), third.split(3), strict=True)),
        }[data]

    factor = 2 if data == "joined" else 1
    size = 10 if data == "subset" else 12
    assert count_classes(of(INDEX)).tolist() == [size * factor / 2] * 2
    assert "look like an index" in caplog.text
    caplog.clear()
    counts = torch.tensor([1, 2, 3, 3] * 3)
    y, w = (Y[1:11], counts[1:11]) if data == "subset" else (Y, counts)
    assert count_classes(of(counts)).tolist() == [factor * w[y == c].sum().item() for c in (0, 1)]
    assert not caplog.records


ARRAYS = {
    "pairs": lambda x, y: (x.numpy(), y.numpy()),
    "lists": lambda x, y: [x.numpy(), y.numpy()],
    "mixed": lambda x, y: (x, y.numpy()),
    "read-only": lambda x, y: tuple(
        np.frombuffer(t.numpy().tobytes(), t.numpy().dtype).reshape(t.shape) for t in (x, y)
    ),
    "reversed": lambda x, y: (x.flip(0).numpy()[::-1], y.flip(0).numpy()[::-1]),
    "dict": lambda x, y: {"input": x.numpy(), "target": y.numpy()},
    "other endian": lambda x, y: (x.numpy().astype(">f4"), y.numpy()),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_train_as_tensors_do(form):
    """Batches of NumPy arrays give the same training, validation, probe and class counts as tensors, without a warning."""

    def fit(make):
        loader = [make(x, y) for x, y in zip(X.split(4), Y.split(4), strict=True)]
        detector = fw.OverfittingDetector()
        weight, history = fit_of(loader, fw.WeightedLoss("balanced"), detector, val=loader)
        assert detector._probe.reason is None
        return weight, history

    weight, history = fit(ARRAYS[form])
    expected, reference = fit(lambda x, y: (x, y))
    assert torch.equal(weight, expected)
    assert history == reference


def test_a_watch_hands_out_tensors_for_arrays():
    """The batches of watch.train() hold tensors where the loader has arrays; strings stay."""
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [{"x": X.numpy(), "y": Y.numpy(), "name": np.array(["a", "b"])}]
    with fw.Watch(model, optimizer, train_loader=loader) as watch:
        for _ in watch.epochs(1):
            for batch in watch.train():
                assert isinstance(batch["name"], np.ndarray)
                watch.loss(model(batch["x"]), batch["y"]).backward()
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    "form", [(X.tolist(), Y.tolist()), [X, Y.tolist()], [X.tolist(), Y]], ids=["both", "target", "input"]
)
def test_lists_of_numbers_are_refused(form):
    """A list of numbers as input or target is an error that says what to write, in training and validation."""
    for train, val in (([form], None), ([(X, Y)], [form])):
        with pytest.raises(TypeError, match=r"list of numbers.*torch.tensor"):
            fit_of(train, val=val)
