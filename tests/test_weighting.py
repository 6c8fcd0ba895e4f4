"""Class weights follow from class counts, and impossible counts are refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fitwatch.losses.weighting import SCHEMES, as_class_weights, class_weights, normalized

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
    """Under balanced weights the labels of every class weigh N / K together."""
    y = torch.tensor([0] * 50 + [1] * 7 + [2] * 3)
    weight = class_weights([50, 7, 3])[y]
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
        (([[1, 2, 3]],), {}, r"\(K, 2\) .* shape \(1, 3\)"),
        (([[[1, 2]]],), {}, r"shape \(1, 1, 2\)"),
        (([[1, -2]],), {}, "at least 0"),
        (([],), {}, r"shape \(0,\)"),
        (([0, 0],), {"absent": "zero"}, "all 2 classes have count 0"),
        (([[0, 0]] * 3,), {"absent": "zero"}, "all 3 labels have count 0"),
    ],
)
def test_class_weights_refuses(arguments, options, match):
    """Unknown schemes, options out of range and impossible counts are refused with the value given."""
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
    """Invalid weights, and mappings with keys other than 0..K-1, are refused."""
    with pytest.raises(ValueError, match=match):
        as_class_weights(weights)


FORMULAS = {
    "balanced": lambda n, rest: (n + rest) / (2 * n),
    "inverse": lambda n, rest: (n + rest) / n,
    "sqrt_inverse": lambda n, rest: math.sqrt((n + rest) / n),
    "median_frequency": lambda n, rest: (n + rest) / 2 / n,
    "effective_number": lambda n, rest: (1 - 0.999) / (1 - 0.999**n),
}
LABELS = [[90, 10], [50, 50], [3, 97]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_label_is_a_problem_of_two_classes(scheme):
    """Counts of shape (K, 2) give each label the formula of its own two counts."""
    weights = class_weights(LABELS, scheme)
    formula = FORMULAS[scheme]
    expected = [[formula(a, b), formula(b, a)] for a, b in LABELS]
    assert (weights.shape, weights.dtype) == ((3, 2), torch.float32)
    for row, numbers in zip(weights.tolist(), expected, strict=True):
        assert row == pytest.approx(numbers, rel=1e-6)


def test_a_label_that_lacks_a_class():
    """A missing class of a label is named; with absent="zero" both its weights are 1, and other labels keep theirs."""
    counts = [[90, 10], [100, 0], [0, 0]]
    named = "^the positives of label 1, the negatives of label 2, the positives of label 2 are absent.*for weight 1$"
    with pytest.raises(ValueError, match=named):
        class_weights(counts)
    for normalize in (False, True):
        rows = class_weights(counts, absent="zero", normalize=normalize).tolist()
        assert rows[0] == pytest.approx([100 / 180, 100 / 20])
        assert rows[1:] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_normalized_weights_have_a_mean_of_1(scheme):
    """With normalize the mean weight over the data is 1, of each label by itself, and the ratios stay."""
    for counts in (COUNTS, [5000, 0, 3], LABELS):
        plain = class_weights(counts, scheme, absent="zero").double()
        scaled = class_weights(counts, scheme, absent="zero", normalize=True).double()
        numbers = torch.tensor(counts, dtype=torch.float64)
        for n, w, before in zip(
            numbers.view(-1, numbers.shape[-1]),
            scaled.view(-1, numbers.shape[-1]),
            plain.view(-1, numbers.shape[-1]),
            strict=True,
        ):
            assert sum(n * w).item() / sum(n).item() == pytest.approx(1, rel=1e-6)
            assert (w / w[0]).tolist() == pytest.approx((before / before[0]).tolist(), rel=1e-6)


def test_normalized_scales_given_weights():
    """Weights of shape (2,) are scaled for each label; other lengths, and weights without any example, are refused."""
    scaled = normalized(torch.tensor([1.0, 3.0]), torch.tensor([[3, 1], [1, 3]]))
    assert scaled.tolist() == [pytest.approx([4 / 6, 12 / 6]), pytest.approx([4 / 10, 12 / 10])]
    with pytest.raises(ValueError, match="3 class weights, and counts of 2 classes"):
        normalized(torch.ones(3), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="every example has weight 0"):
        normalized(torch.tensor([0.0, 1.0]), torch.tensor([5, 0]))
