"""Classes are counted in targets, data sets and loaders, by reading as little as possible."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)

from fitwatch.data.counting import count_classes
from tests._ids import plain


class Exposed(Dataset):
    """Exposes its targets; reading an example is an error."""

    def __init__(self, targets, name="targets"):
        setattr(self, name, targets)
        self.size = len(targets)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        raise AssertionError("an example was read")


class Hidden(Dataset):
    """Exposes nothing: its examples have to be read."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


class Stream(IterableDataset):
    """Has neither length nor index."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def by_hand(targets, weights, num_classes):
    """The sums of the weights of each class, in a loop."""
    sums = [0.0] * num_classes
    for label, weight in zip(targets, weights, strict=True):
        sums[label] += weight
    return sums


GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(60, 2, generator=GENERATOR)
Y = torch.randint(0, 4, (60,), generator=GENERATOR)
W = torch.rand(60, generator=GENERATOR).double() * (torch.arange(60) % 5 > 0)  # every fifth is masked
COUNTS = by_hand(Y.tolist(), [1] * 60, 4)
SUMS = by_hand(Y.tolist(), W.tolist(), 4)


# -- targets -----------------------------------------------------------------------------------------------------------


def test_count_classes_counts_indices_of_any_shape():
    """Integer labels of any form and shape are counted as Python counts them."""
    y = torch.randint(0, 5, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    expected = [y.flatten().tolist().count(c) for c in range(5)]
    for targets in (y, y.int(), y.byte(), y.tolist(), y.numpy(), y.numpy().astype(np.uint16)):
        counts = count_classes(targets)
        assert (counts.tolist(), counts.dtype) == (expected, torch.int64)
    assert count_classes(y, num_classes=7).tolist() == [*expected, 0, 0]


def test_count_classes_leaves_ignored_labels_out():
    """Labels to ignore do not count, whether they are negative, in range or beyond."""
    for ignored in (-100, 1, 255):
        assert count_classes([0, 2, ignored, 2], ignore_index=ignored, num_classes=3).tolist() == [1, 0, 2]


def test_count_classes_of_binary_targets():
    """Bools and floats that are all 0 or 1 are two classes, even where only one occurs."""
    assert count_classes([True, False, True]).tolist() == [1, 2]
    assert count_classes(torch.tensor([0.0, 0, 1])).tolist() == [2, 1]
    assert count_classes(torch.zeros(3, 1)).tolist() == [3, 0]


def test_count_classes_of_probabilities():
    """Rows of probabilities are summed in float64."""
    rows = torch.tensor([[0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    counts = count_classes(rows)
    assert (counts.tolist(), counts.dtype) == ([0.75, 1, 0.25], torch.float64)
    bf16 = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)).softmax(1).bfloat16()
    assert count_classes(bf16).tolist() == pytest.approx(bf16.double().sum(0).tolist())


def test_count_classes_of_nothing():
    """Empty targets have zero counts if the number of classes is known, and raise an error otherwise."""
    for empty in ([], torch.zeros(0, dtype=torch.int64), torch.zeros(0)):
        assert count_classes(empty, num_classes=2).tolist() == [0, 0]
        with pytest.raises(ValueError, match="no targets to count"):
            count_classes(empty)
    with pytest.raises(ValueError, match="no targets to count"):
        count_classes([-1, -1], ignore_index=-1)


@pytest.mark.parametrize(
    ("targets", "options", "match"),
    [
        ([0, 1, 5], {"num_classes": 3}, "label 5 at index 2 .*0..2"),
        ([[0, 1], [-1, 1]], {}, "label -1 at index 2 .*at least 0"),
        ([-1, 0, -2], {"ignore_index": -1, "num_classes": 2}, "label -2 at index 2 .*0..1 and ignore_index=-1"),
        ([0.0, 1.0, 2.0], {}, "must be integers, got 2.0 at index 2"),
        ([0.0, float("nan")], {}, "nan at index 1"),
        ([[0.5, 0.5], [0.5, 0.9]], {}, "row 1"),
        ([[1.5, -0.5]], {}, "row 0"),
        ([[0.5, 0.5]], {"num_classes": 3}, "2 classes, not 3"),
    ],
)
def test_count_classes_refuses(targets, options, match):
    """A label out of range is named with its index in the targets as given, and floats must be labels or rows of p."""
    with pytest.raises(ValueError, match=match):
        count_classes(targets, **options)


def test_lists_of_more_than_integers_are_read_as_torch_reads_them():
    """A list that starts with an integer may continue with floats or bools."""
    assert count_classes([0, 1.0, 1]).tolist() == [1, 2]
    assert count_classes([0, True, 2]).tolist() == [1, 1, 1]
    assert count_classes([0, np.int64(2)]).tolist() == [1, 0, 1]
    assert count_classes([torch.tensor(1), torch.tensor(0)]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="got 0.5 at index 1"):
        count_classes([0, 0.5])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_labels_are_counted_one_by_one(dtype):
    """With multi_label, targets (N, K) in any dtype give the negatives and positives of each label."""
    y = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]]).to(dtype)
    for targets in (y, y.tolist(), y.numpy()):
        counts = count_classes(targets, multi_label=True)
        assert (counts.tolist(), counts.dtype) == ([[3, 1], [3, 1], [0, 4]], torch.int64)
    for one in (y[:, 0], y[:, :1], y[:, 0].view(4, 1, 1)):
        assert count_classes(one, multi_label=True).tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("targets", "options", "error", "match"),
    [
        ([[0, 1], [2, 0]], {}, ValueError, "0 or 1, got 2 at index 2"),
        ([[0, 1], [0.5, 0]], {}, ValueError, "got 0.5 at index 2"),
        ([[0, 1]], {"num_classes": 3}, ValueError, "2 labels, not 3"),
        ([[0, 1]], {"ignore_index": -1}, ValueError, "no ignore_index, got -1: .* weight of 0"),
        ([(X, torch.ones(2, 3)), (X, torch.ones(2, 2))], {}, ValueError, "have 2 labels, but earlier ones have 3"),
    ],
)
def test_labels_are_refused(targets, options, error, match):
    """Labels that are not 0 or 1, and numbers of labels that do not fit, are refused."""
    with pytest.raises(error, match=match):
        count_classes(targets, multi_label=True, **options)


# -- data sets and loaders ---------------------------------------------------------------------------------------------

SHOWN = {
    "tensors": TensorDataset(X, Y),
    "targets": Exposed(Y),
    "labels": Exposed(Y, "labels"),
    "list": Exposed(Y.tolist()),
    "array": Exposed(Y.numpy()),
    "subset": Subset(Exposed(Y.tolist()), list(range(60))),
    "nested subset": Subset(Subset(Exposed([9, *Y.tolist()]), range(1, 61)), np.arange(60)),
    "split": ConcatDataset(random_split(Exposed(Y.tolist()), [20, 40])),
    "parts": ConcatDataset([Exposed(Y[:7]), Exposed(Y[7:].numpy())]),
    "loader": DataLoader(Exposed(Y), 8, shuffle=True),
    "sampler": DataLoader(Exposed([*Y.tolist(), 9]), 8, sampler=SubsetRandomSampler(range(60))),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_targets_that_are_shown_are_counted_without_reading_an_example(kind):
    """Exposed targets, also through subsets, concatenations and samplers, are counted without calling __getitem__."""
    counts = count_classes(SHOWN[kind])
    assert (counts.tolist(), counts.dtype) == (COUNTS, torch.int64)


def test_a_million_targets_are_counted_without_reading_an_example():
    """A list of a million integers, and half of it by a list of indices, are counted from the list."""
    targets = [0, 1, 1, 2] * 250_000
    assert count_classes(Exposed(targets)).tolist() == [250_000, 500_000, 250_000]
    half = Subset(Exposed(targets), list(range(0, 1_000_000, 2)))
    assert count_classes(half).tolist() == [250_000, 250_000]


READ = {
    "data set": Hidden(list(zip(X, Y.tolist(), strict=True))),
    "tensors as targets": Hidden(list(zip(X, Y, strict=True))),
    "mappings": Hidden([{"input": x, "target": y} for x, y in zip(X, Y, strict=True)]),
    "stream": Stream(list(zip(X, Y, strict=True))),
    "loader": DataLoader(Hidden(list(zip(X, Y, strict=True))), 8),
    "loader of a stream": DataLoader(Stream(list(zip(X, Y, strict=True))), 8),
    "batches": list(DataLoader(TensorDataset(X, Y), 8)),
    "mappings of batches": [{"input": x, "target": y} for x, y in DataLoader(TensorDataset(X, Y), 8)],
    "a part is hidden": ConcatDataset([TensorDataset(X[:9], Y[:9]), Hidden(list(zip(X[9:], Y[9:], strict=True)))]),
    "examples in a list": list(zip(X, Y.tolist(), strict=True)),
}


@pytest.mark.parametrize("kind", READ)
def test_hidden_targets_are_counted_in_one_pass(kind):
    """Data sets that expose no targets, streams, and loaders of tuples or mappings are read once."""
    assert count_classes(READ[kind]).tolist() == COUNTS


WEIGHED = {
    "tensors": TensorDataset(X, Y, W),
    "subset": Subset(TensorDataset(X, Y, W), range(60)),
    "parts": ConcatDataset([TensorDataset(X[:9], Y[:9], W[:9]), TensorDataset(X[9:], Y[9:], W[9:])]),
    "data set": Hidden(list(zip(X, Y.tolist(), W.tolist(), strict=True))),
    "mappings": Hidden([{"input": x, "target": y, "sample_weight": w} for x, y, w in zip(X, Y, W, strict=True)]),
    "stream": Stream(list(zip(X, Y, W, strict=True))),
    "loader": DataLoader(TensorDataset(X, Y, W), 8, shuffle=True),
    "batches": list(DataLoader(TensorDataset(X, Y, W), 8)),
}


@pytest.mark.parametrize("kind", WEIGHED)
def test_weights_of_the_examples_are_summed(kind):
    """Where the data carries weights, a class counts the sum of its weights, and a masked example nothing."""
    counts = count_classes(WEIGHED[kind])
    assert counts.dtype is torch.float64
    assert counts.tolist() == pytest.approx(SUMS, rel=1e-12)


def test_weights_of_positions_probabilities_and_labels():
    """Positions share the weight of their example or have their own; so do labels; probabilities are weighed by row."""
    y = torch.tensor([[0, 1, -1], [2, 2, 1]])
    x, shared, own = torch.zeros(2, 1), torch.tensor([0.5, 2]), torch.tensor([[1, 0, 1], [0.5, 0.25, 3]])
    assert count_classes(TensorDataset(x, y, shared), ignore_index=-1).tolist() == [0.5, 2.5, 4]
    assert count_classes(TensorDataset(x, y, own), ignore_index=-1).tolist() == [1, 3, 0.75]
    rows = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    assert count_classes(TensorDataset(x, rows, shared)).tolist() == [0.125 + 1, 0.375 + 1]
    labels = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = {shared: [[0.5, 2], [0, 2.5], [2, 0.5]], own: [[1, 0.5], [0, 0.25], [3, 1]]}
    for weight, counts in expected.items():
        for data in (TensorDataset(x, labels, weight), Hidden(list(zip(x, labels, weight, strict=True)))):
            assert count_classes(data, multi_label=True).tolist() == counts
    one = TensorDataset(x, labels[:, 0].float(), shared)
    assert count_classes(one, multi_label=True).tolist() == [[0.5, 2]]


def test_labels_that_are_not_known_are_not_counted():
    """A NaN label of weight 0 counts neither as positive nor as negative."""
    labels = torch.tensor([[1, torch.nan], [0, 1], [torch.nan, 0]])
    data = TensorDataset(torch.zeros(3, 1), labels, (~labels.isnan()).float())
    assert count_classes(data, multi_label=True).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="0 or 1, got nan at index 1"):
        count_classes(labels, multi_label=True)


def test_rows_of_probabilities_are_read_from_single_examples():
    """The target of a single example may be a row of probabilities, or of labels."""
    rows = [[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]
    assert count_classes(Hidden([(0, row) for row in rows])).tolist() == [0.75, 1, 0.25]
    assert count_classes(Hidden([(0, [1, 0]), (0, [1, 1])]), multi_label=True).tolist() == [[0, 2], [1, 1]]


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": [0, 1]},
        {"targets": ["cat"] * 60},
        {"targets": [{"boxes": 1}] * 60},
        {"targets": [0] * 60, "target_transform": lambda y: y},
        {"targets": "0"},
        {"targets": lambda: 0},
    ],
    ids=["another length", "strings", "mappings", "target_transform", "a string", "a method"],
)
def test_attributes_that_are_not_the_targets_are_not_taken(attributes):
    """Labels of another length, names, and targets under a target_transform are counted by a pass instead."""
    dataset = Hidden(list(zip(X, Y.tolist(), strict=True)))
    for name, value in attributes.items():
        setattr(dataset, name, value)
    assert count_classes(dataset).tolist() == COUNTS
    assert count_classes(Subset(dataset, range(60))).tolist() == COUNTS


def test_batches_may_know_fewer_classes_or_none():
    """Classes that appear late, and batches without labels that count, do not affect a pass."""
    y = [torch.tensor([-1, -1]), torch.tensor([0, -1]), torch.tensor([2, 0]), torch.tensor([1])]
    assert count_classes([(X, part) for part in y], ignore_index=-1).tolist() == [2, 1, 1]
    assert count_classes([(X, part) for part in y], ignore_index=-1, num_classes=4).tolist() == [2, 1, 1, 0]


def test_a_loader_without_targets_is_like_no_targets():
    """A loader that gives nothing to count gives zeros where the number of classes is known, else an error."""
    for data in (Stream([]), [(X, torch.tensor([-1]))]):
        assert count_classes(data, num_classes=2, ignore_index=-1).tolist() == [0, 0]
        with pytest.raises(ValueError, match="no targets to count"):
            count_classes(data, ignore_index=-1)
    assert count_classes(Stream([]), num_classes=2, multi_label=True).tolist() == [[0, 0], [0, 0]]


class Noisy(Dataset):
    """Draws a random number for each example."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.rand(()), i % 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_leaves_the_generators_alone_also_when_it_fails(workers):
    """A loader draws the same batches after a pass, complete or interrupted, as without one."""

    def drawn(*, counting):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(7)
        loader = DataLoader(
            Noisy(), 4, shuffle=True, generator=generator, num_workers=workers, persistent_workers=workers > 0
        )
        if counting:
            assert count_classes(loader).tolist() == [4, 4]
            with pytest.raises(ValueError, match="label 1 .* is out of range") as caught:
                count_classes(loader, num_classes=1)
            assert caught.value.__notes__ == ["in batch 0 of the pass that counts the classes"]
            count_classes(Noisy())
        return [torch.stack(list(batch)) for batch in loader] + [torch.rand(3)]

    for with_pass, without in zip(drawn(counting=True), drawn(counting=False), strict=True):
        assert torch.equal(with_pass, without)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (None, TypeError, "in a loader of batches .input, target., got None"),
        ("targets", TypeError, "got a str that is not an array"),
        (["cat", "dog"], TypeError, "got a list that is not an array"),
        ([X, X[:5]], TypeError, "got a list that is not an array"),
        ([[X, Y, Y, Y]], TypeError, "a batch must be a tuple .*got a list of 4"),
        ([{"x": X}], TypeError, "a batch must be .* with the keys 'x'"),
        (Hidden([(0, "cat")]), TypeError, "str"),
        (iter([(X, Y)]), TypeError, "iterator"),
        (TensorDataset(X, Y, -W - 1), ValueError, "sample_weight must be finite and at least 0"),
        (TensorDataset(X, Y, X), ValueError, r"sample_weight must have shape \(60,\)"),
    ],
    ids=plain,
)
def test_invalid_data_is_refused(data, error, match):
    """Data without targets, iterators and invalid weights are refused with the value given."""
    with pytest.raises(error, match=match):
        count_classes(data)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_masked_float_label_is_not_looked_at(shape):
    """A nan label of weight 0 counts nothing, as the losses leave it out."""
    labels = torch.tensor([0.0, math.nan, 1, 1]).reshape(shape)
    data = TensorDataset(torch.zeros(4, 1), labels, torch.tensor([1.0, 0, 2, 1]))
    assert count_classes(data).tolist() == [1, 3]
