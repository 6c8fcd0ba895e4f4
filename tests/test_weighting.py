"""Class counts become class weights, and impossible ones are refused by name."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fitwatch.weighting import SCHEMES, as_class_weights, class_weights, count_classes

COUNTS = [5000, 120, 3, 77]


def test_schemes_are_the_published_names():
    """The names of the schemes are those that class_weights takes."""
    assert SCHEMES == ("balanced", "inverse", "sqrt_inverse", "median_frequency", "effective_number")


@pytest.mark.parametrize(
    ("scheme", "formula"),
    [
        ("balanced", lambda n: 5200 / (4 * n)),
        ("inverse", lambda n: 5200 / n),
        ("sqrt_inverse", lambda n: math.sqrt(5200 / n)),
        ("median_frequency", lambda n: (77 + 120) / 2 / n),
        ("effective_number", lambda n: (1 - 0.999) / (1 - 0.999**n)),
    ],
)
def test_each_scheme_is_its_formula(scheme, formula):
    """The weights are the published formula of each count, in float32."""
    weights = class_weights(COUNTS, scheme)
    assert weights.dtype is torch.float32
    assert weights.tolist() == pytest.approx([formula(n) for n in COUNTS], rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_may_be_anything_with_numbers(scheme):
    """Lists, tensors and read-only arrays of the same counts give the same weights."""
    array = np.array(COUNTS)
    array.flags.writeable = False
    expected = class_weights(COUNTS, scheme).tolist()
    assert class_weights(torch.tensor(COUNTS), scheme).tolist() == expected
    assert class_weights(torch.tensor(COUNTS, dtype=torch.float64), scheme).tolist() == expected
    assert class_weights(array, scheme).tolist() == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rare_classes_weigh_more_and_equal_classes_alike(scheme):
    """Under every scheme the weight falls with the count, and equal counts have equal weights."""
    weights = class_weights([10, 100, 100, 1000], scheme).tolist()
    assert weights[0] > weights[1] == weights[2] > weights[3] > 0


@pytest.mark.parametrize("beta", [0, 0.5, 0.9999, 1 - 2.0**-40, 1 - 2.0**-53])
def test_effective_number_keeps_its_digits(beta):
    """For beta up to the float below 1 the weights equal exact rational arithmetic."""
    b = Fraction(beta)
    exact = [float((1 - b) / (1 - b**n)) for n in (1, 2, 7)]
    assert class_weights([1, 2, 7], "effective_number", beta=beta).tolist() == pytest.approx(exact, rel=1e-6)


def test_balanced_weights_balance():
    """Under balanced weights the counted labels of every class weigh N / K together."""
    y = torch.tensor([0] * 50 + [1] * 7 + [2] * 3)
    weight = class_weights(count_classes(y))[y]
    assert [weight[y == c].sum().item() for c in range(3)] == pytest.approx([20, 20, 20])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_absent_class(scheme):
    """A class without examples is an error by default; on request it gets 0 and the others the weights without it."""
    with pytest.raises(ValueError, match=r"^class 1 is absent from the training data"):
        class_weights([50, 0, 5], scheme)
    with pytest.raises(ValueError, match=r"^classes 0, 2 are absent"):
        class_weights([0, 5, 0], scheme)
    first, second = class_weights([50, 5], scheme).tolist()
    assert class_weights([50, 0, 5], scheme, absent="zero").tolist() == [first, 0, second]


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (([1, 2], "balance"), {}, "'balance'; allowed are 'balanced', 'inverse', 'sqrt_inverse', 'median_frequency'"),
        (([1, 2],), {"absent": "skip"}, "'error' or 'zero', got 'skip'"),
        (([1, 2],), {"beta": 1.0}, r"in \[0, 1\), got 1.0"),
        (([1, 2],), {"beta": float("nan")}, "got nan"),
        (([1, -2],), {}, "at least 0"),
        (([1, float("nan")],), {}, "finite"),
        (([1, float("inf")],), {}, "finite"),
        (([[1, 2]],), {}, r"shape \(1, 2\)"),
        (([],), {}, r"shape \(0,\)"),
        (([0, 0],), {"absent": "zero"}, "all 2 classes have count 0"),
    ],
)
def test_class_weights_refuses(arguments, options, match):
    """Unknown schemes, options out of range and impossible counts are refused with what was given."""
    with pytest.raises(ValueError, match=match):
        class_weights(*arguments, **options)


def test_as_class_weights_takes_tensors_sequences_and_mappings():
    """The same weights in any form, and in any order of the keys, give the same new tensor."""
    given = torch.tensor([1.0, 2, 3], requires_grad=True)
    for weights in (given, [1, 2, 3], (1.0, 2.0, 3.0), {2: 3, 0: 1, 1: 2.0}, np.array([1, 2, 3])):
        result = as_class_weights(weights)
        assert (result.tolist(), result.dtype, result.requires_grad) == ([1, 2, 3], torch.float32, False)
    assert as_class_weights(given).data_ptr() != given.data_ptr()
    assert as_class_weights(torch.ones(2, dtype=torch.float64)).dtype is torch.float64
    assert as_class_weights(torch.ones(2, dtype=torch.float16)).dtype is torch.float32


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({0: 1.0, 2: 2.0}, r"0..1 as keys.*missing \[1\], unexpected \[2\]"),
        ({1: 1.0, 2: 2.0}, r"missing \[0\], unexpected \[2\]"),
        ({"a": 1.0}, r"missing \[0\], unexpected \['a'\]"),
        ({}, r"shape \(0,\)"),
        ([1, -1], "at least 0"),
        ([1, float("inf")], "finite"),
        ([0, 0], "not all be 0"),
        (2.0, r"shape \(\)"),
    ],
)
def test_as_class_weights_refuses(weights, match):
    """Weights that are no weights, and mappings with other keys than 0..K-1, are refused."""
    with pytest.raises(ValueError, match=match):
        as_class_weights(weights)


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
    """No targets are zeros where the number of classes is known, and an error where it is not."""
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
        ([0.0, 1.0, 2.0], {}, "must be integers; got 2.0 at index 2"),
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
