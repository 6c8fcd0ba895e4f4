"""Every loss of classes against its formula, in Python's own floats: values, gradients, precision, masks and weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fitwatch as fw
from tests import _formulas as formulas
from tests._losses import assert_same, costs_of, labels, logits, value_and_gradient, weights_of

COUNTS = [400.0, 60, 25, 9]
WEIGHT = weights_of(4)
FN, FP = costs_of(4)
MATRIX = fw.CostMatrix(FN, FP).matrix
W = WEIGHT.tolist()

# name -> (the loss, its class weights or None, w_y times the loss of one position)
CASES = {
    "cross-entropy": (lambda **o: fw.CrossEntropy(WEIGHT, **o), W, lambda z, y: formulas.cross_entropy(z, y, W)),
    "smoothed": (
        lambda **o: fw.CrossEntropy(WEIGHT, label_smoothing=0.2, **o),
        W,
        lambda z, y: formulas.cross_entropy(z, y, W, smoothing=0.2),
    ),
    "focal": (lambda **o: fw.Focal(2.0, **o), None, lambda z, y: formulas.focal(z, y, 2)),
    "focal, weighted": (
        lambda **o: fw.Focal(0.5, weight=WEIGHT, **o),
        W,
        lambda z, y: W[y] * formulas.focal(z, y, 0.5),
    ),
    "logit adjustment": (
        lambda **o: fw.LogitAdjusted(torch.tensor(COUNTS, dtype=torch.float64), tau=1.3, **o),
        None,
        lambda z, y: formulas.logit_adjusted(z, y, COUNTS, 1.3),
    ),
    "logit adjustment, weighted, smoothed": (
        lambda **o: fw.LogitAdjusted(
            torch.tensor(COUNTS, dtype=torch.float64), weight=WEIGHT, label_smoothing=0.1, **o
        ),
        W,
        lambda z, y: formulas.logit_adjusted(z, y, COUNTS, 1, weight=W, smoothing=0.1),
    ),
    "LDAM": (
        lambda **o: fw.LDAM(torch.tensor(COUNTS, dtype=torch.float64), max_margin=0.7, scale=3.0, **o),
        None,
        lambda z, y: formulas.ldam(z, y, COUNTS, 0.7, 3),
    ),
    "LDAM, weighted": (
        lambda **o: fw.LDAM(torch.tensor(COUNTS, dtype=torch.float64), weight=WEIGHT, **o),
        W,
        lambda z, y: W[y] * formulas.ldam(z, y, COUNTS, 0.5, 30),
    ),
    "expected cost": (
        lambda **o: fw.ExpectedCost(MATRIX, **o),
        None,
        lambda z, y: formulas.expected_cost(z, y, MATRIX.tolist()),
    ),
    "real world": (
        lambda **o: fw.RealWorldCrossEntropy(FN, FP, **o),
        None,
        lambda z, y: formulas.real_world(z, y, FN.tolist(), FP.tolist()),
    ),
}
every_loss = pytest.mark.parametrize("name", CASES)


def reference(name, output, target, ignore_index=None):
    """Totals and weights of the examples, from the formula of each position."""
    _, weight, formula = CASES[name]
    output = output.detach().double()
    if output.dim() == 1:
        output, target = output.unsqueeze(0), target.unsqueeze(0)
    rows = output.movedim(1, -1).flatten(1, -2) if output.dim() > 2 else output.unsqueeze(1)
    totals, weights = [], []
    for example, classes in zip(rows.tolist(), target.reshape(len(target), -1).tolist(), strict=True):
        kept = [(z, y) for z, y in zip(example, classes, strict=True) if y != ignore_index]
        totals.append(sum(formula(z, y) for z, y in kept))
        weights.append(sum(1.0 if weight is None else weight[y] for _, y in kept))
    return torch.tensor(totals, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


@every_loss
@pytest.mark.parametrize("shape", [(9, 4), (5, 4, 3), (3, 4, 2, 2), (4,)])
@pytest.mark.parametrize("ignored", [False, True])
def test_every_way_to_call_a_loss_gives_its_formula(name, shape, ignored):
    """forward, sums and per_example equal the formula, position by position, and leave ignored positions out."""
    output = logits(*shape, scale=1.0)
    target = labels(shape[:1] + shape[2:] if len(shape) > 1 else (), 4)
    ignore_index = None
    if ignored and target.dim():
        ignore_index = -7
        target.flatten()[::3] = -7
    loss = CASES[name][0](**({} if ignore_index is None else {"ignore_index": -7}))
    totals, weights = reference(name, output, target, ignore_index)
    total, weight = loss.sums(output, target)
    losses, each = loss.per_example(output, target)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(total, totals.sum(), **close)
    torch.testing.assert_close(torch.as_tensor(weight, dtype=torch.float64), weights.sum(), **close)
    torch.testing.assert_close(loss(output, target), totals.sum() / weights.sum(), **close)
    torch.testing.assert_close(each, weights, **close)
    torch.testing.assert_close(losses * each, torch.where(weights > 0, totals, 0), **close)


@every_loss
def test_gradients_are_those_of_finite_differences(name):
    """Gradients of the mean, of a sum and of single examples, with and without weights of the examples, are right."""
    loss, target, w = CASES[name][0](), labels((4, 2), 4), torch.tensor([1.0, 0, 0.3, 2], dtype=torch.float64)
    for output, y in ((logits(4, 4, scale=0.5), target[:, 0]), (logits(4, 4, 2, scale=0.5), target)):
        for function in (
            loss,
            lambda x, y: loss.sums(x, y).total,
            lambda x, y: loss.per_example(x, y)[0],
            lambda x, y: loss(x, y, w),
        ):
            # a second backward pass through the real-world loss computes its gradient anew, with other roundings
            assert torch.autograd.gradcheck(function, (output, y), nondet_tol=1e-12)


@every_loss
@pytest.mark.parametrize("level", [0.0, 4096.0])
def test_logits_of_scale_100_in_float32(name, level):
    """Value and gradient in float32 equal float64 to 2e-6, also with a large constant added to all logits."""
    # sixteenths, so that the sum with the constant is exact
    output = ((logits(256, 4, scale=100.0) * 16).detach().round() / 16 + level).float()
    target = labels((256,), 4)
    exact, loss = CASES[name][0](), CASES[name][0]().float()
    expected, expected_gradient = value_and_gradient(lambda x: exact(x, target), output.double() - level)
    totals, weights = reference(name, output.double() - level, target)
    torch.testing.assert_close(expected, totals.sum() / weights.sum(), rtol=1e-12, atol=0)
    value, gradient = value_and_gradient(lambda x: loss(x, target), output)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    largest = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=2e-6 * largest)


@every_loss
def test_bfloat16_outputs_and_autocast(name):
    """Under autocast a loss of bfloat16 outputs is the float32 loss of the same numbers; gradients come in bfloat16."""
    output, target = logits(64, 4, scale=20.0, dtype=torch.bfloat16), labels((64,), 4)
    loss = CASES[name][0]().float()
    expected = loss(output.detach().float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(output, target)
        total, weight = loss.sums(output, target)
    assert value.dtype is total.dtype is torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(total / weight, expected)
    value.backward()
    assert output.grad.dtype is torch.bfloat16
    assert output.grad.isfinite().all()


@every_loss
def test_weights_of_examples_are_repetitions(name):
    """Weights 2, 0, 3, ... equal repeating or dropping the examples; any weights multiply the formula."""
    loss = CASES[name][0]()
    output, target, times = logits(8, 4, scale=1.0), labels((8,), 4), torch.tensor([2, 0, 3, 1, 0, 1, 1, 4])
    index = torch.arange(8).repeat_interleave(times)
    assert_same(lambda x: loss(x[index], target[index]), lambda x: loss(x, target, times), output)
    w = torch.rand(8, dtype=torch.float64)
    totals, weights = reference(name, output, target)
    for scale in (w, w.float().double()):
        expected = (totals * scale).sum() / (weights * scale).sum()
        torch.testing.assert_close(loss(output, target, scale), expected, rtol=1e-12, atol=0)
    losses, each = loss.per_example(output, target, w)
    torch.testing.assert_close(each, weights * w)
    torch.testing.assert_close(losses * each, totals * w)


@every_loss
def test_masks_of_positions_are_ignored_positions(name):
    """A mask of 0 and 1 over positions equals ignore_index there; a weight of the example holds for all its positions."""
    output, target = logits(5, 4, 3, scale=1.0), labels((5, 3), 4)
    mask = torch.rand(5, 3) > 0.4
    ignored = torch.where(mask, target, -7)
    assert_same(
        lambda x: CASES[name][0](ignore_index=-7)(x, ignored), lambda x: CASES[name][0]()(x, target, mask), output
    )
    w = torch.rand(5, dtype=torch.float64)
    loss = CASES[name][0]()
    assert_same(lambda x: loss(x, target, w[:, None].expand(5, 3)), lambda x: loss(x, target, w), output)


@every_loss
def test_sums_add_up_over_ragged_batches(name):
    """Sums over parts of a batch sorted by class, with weights of the examples, add up to those of the whole batch."""
    loss, output, target = CASES[name][0](), logits(40, 4, scale=1.0), labels((40,), 4).sort().values
    w = torch.rand(40, dtype=torch.float64)
    cut = [1, 20, 2, 17]

    def in_parts(x):
        parts = [loss.sums(*part) for part in zip(x.split(cut), target.split(cut), w.split(cut), strict=True)]
        return sum(part.total for part in parts) / sum(part.weight for part in parts)

    assert_same(lambda x: loss(x, target, w), in_parts, output)


# -- one logit ---------------------------------------------------------------------------------------------------------

COSTS = fw.CostMatrix(20, 3)
BINARY = {
    "focal": (lambda: fw.Focal(1.5), lambda z, y: formulas.focal(z, y, 1.5)),
    "logit adjustment": (
        lambda: fw.LogitAdjusted([90, 10], tau=0.5),
        lambda z, y: formulas.logit_adjusted(z, y, [90.0, 10], 0.5),
    ),
    "LDAM": (lambda: fw.LDAM([81, 16], max_margin=0.6, scale=2.0), lambda z, y: formulas.ldam(z, y, [81, 16], 0.6, 2)),
    "expected cost": (
        lambda: fw.ExpectedCost(COSTS),
        lambda z, y: formulas.expected_cost(z, y, COSTS.matrix.tolist()),
    ),
    "real world": (
        lambda: fw.RealWorldCrossEntropy(20, 3),
        lambda z, y: formulas.real_world(z, y, [3.0, 20], [[0.0, 0], [0, 0]]),
    ),
    "real world, matrix": (
        lambda: fw.RealWorldCrossEntropy(COSTS),
        lambda z, y: formulas.real_world(z, y, [3.0, 20], [[0.0, 0], [0, 0]]),
    ),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_one_logit_is_the_second_of_two(name, scale):
    """One logit z, (N,) or (N, 1), targets of any dtype, gives the formula of the logits (0, z), at any scale."""
    build, formula = BINARY[name]
    loss, output, target = build().double(), logits(30, scale=scale), labels((30,), 2)
    expected = [formula([0.0, z], y) for z, y in zip(output.tolist(), target.tolist(), strict=True)]
    for x, y in (
        (output, target.double()),
        (output[:, None], target[:, None].float()),
        (output, target),
        (output, target.bool()),
    ):
        losses, weights = loss.per_example(x, y)
        assert weights.tolist() == [1.0] * 30
        # counts are kept in float32; below 1e-15 a log-softmax is 0
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-15)
        torch.testing.assert_close(loss(x, y), losses.mean())
    two = torch.stack([torch.zeros_like(output), output], 1)
    torch.testing.assert_close(loss(two, target), loss(output, target.double()))
    single = build()
    for dtype in (torch.float32, torch.bfloat16):
        less = output.detach().to(dtype).requires_grad_()
        value = single(less, target.to(dtype))
        assert value.dtype is torch.float32
        torch.testing.assert_close(value.double(), loss(less.detach().double(), target.double()), rtol=2e-6, atol=0)
        value.backward()
        assert less.grad.isfinite().all()


def test_class_weights_of_one_logit():
    """With one logit the weights are those of classes 0 and 1: the paper's alpha is [1 - alpha, alpha]."""
    z, y = logits(30), labels((30,), 2)
    alpha, p = 0.25, z.detach().sigmoid()
    pt, at = torch.where(y == 1, p, 1 - p), torch.where(y == 1, alpha, 1 - alpha)
    expected = (-at * (1 - pt) ** 2 * pt.log()).sum()
    loss = fw.Focal(2.0, weight=torch.tensor([1 - alpha, alpha], dtype=torch.float64))
    torch.testing.assert_close(loss.sums(z, y.double()).total, expected)


# -- special cases -----------------------------------------------------------------------------------------------------


def test_special_cases_are_cross_entropy():
    """Focal with gamma 0, logit adjustment with tau 0, and LDAM without margin at scale 1 equal weighted cross-entropy."""
    output, target = logits(12, 4), labels((12,), 4)
    for loss in (
        fw.Focal(0.0, weight=WEIGHT),
        fw.LogitAdjusted(COUNTS, tau=0.0, weight=WEIGHT),
        fw.LDAM(COUNTS, max_margin=0.0, scale=1.0, weight=WEIGHT),
    ):
        assert_same(lambda x: F.cross_entropy(x, target, WEIGHT), lambda x, loss=loss: loss(x, target), output)


def test_tau_1_is_the_balanced_softmax():
    """At tau = 1 the loss is -log(n_y e^z_y / sum of n_j e^z_j), for any multiple of the counts; for probabilities too."""
    output, target = logits(12, 4), labels((12,), 4)
    n = torch.tensor(COUNTS, dtype=torch.float64)

    def balanced(x):
        e = n * x.exp()
        return -(e.gather(1, target[:, None])[:, 0] / e.sum(1)).log().mean()

    for counts in (n, n / 7):
        assert_same(balanced, lambda x, counts=counts: fw.LogitAdjusted(counts)(x, target), output)
    rows = F.one_hot(target, 4).double()
    assert_same(balanced, lambda x: fw.LogitAdjusted(n)(x, rows), output)


def test_equal_costs_expect_the_error_rate():
    """With all mistakes at cost 1 the expected cost is the probability of an error."""
    output, target = logits(12, 4), labels((12,), 4)
    wrong = 1 - output.softmax(1).gather(1, target[:, None]).mean()
    torch.testing.assert_close(fw.ExpectedCost(1 - torch.eye(4))(output, target), wrong)


def test_the_rarest_class_has_the_largest_margin():
    """Margins are max_margin for the rarest class, and fall with the fourth root of the count."""
    margin = fw.LDAM([16, 81, 1], max_margin=0.6).margin
    assert margin.tolist() == pytest.approx([0.3, 0.2, 0.6])


def test_smoothing_mass_is_weighted():
    """With weights, e/K of each class's own weight goes to it, and the total is divided by the weights of the labels."""
    z = torch.tensor([[1.0, 0, -1], [0, 2, 0]], dtype=torch.float64)
    y, w, e = torch.tensor([2, 2]), torch.tensor([1.0, 2, 10], dtype=torch.float64), 0.3
    nll = -z.log_softmax(1)
    total = sum((1 - e) * w[c] * nll[i, c] + e / 3 * (w * nll[i]).sum() for i, c in enumerate(y.tolist()))
    smoothed = total / (w[2] + w[2])
    torch.testing.assert_close(fw.CrossEntropy(w, label_smoothing=e)(z, y), smoothed)
    torch.testing.assert_close(nn.CrossEntropyLoss(w, label_smoothing=e)(z, y), smoothed)
    unweighted_mass = sum(w[c] * ((1 - e) * nll[i, c] + e / 3 * nll[i].sum()) for i, c in enumerate(y.tolist()))
    assert abs(unweighted_mass / (w[2] + w[2]) - smoothed) > 0.1  # the other meaning that one could expect


def test_one_hot_targets_are_divided_by_their_number():
    """The same labels as indices are divided by the sum of their weights, one-hot by N, in torch and here."""
    output, target, w = logits(20, 3), labels((20,), 3), torch.tensor([1.0, 5, 20], dtype=torch.float64)
    rows = F.one_hot(target, 3).double()
    nll = -output.detach().log_softmax(1).gather(1, target[:, None])[:, 0]
    by_weight, by_number = (w[target] * nll).sum() / w[target].sum(), (w[target] * nll).sum() / 20
    assert by_number > 3 * by_weight
    for loss in (nn.CrossEntropyLoss(w), fw.CrossEntropy(w)):
        torch.testing.assert_close(loss(output, target).detach(), by_weight)
        torch.testing.assert_close(loss(output, rows).detach(), by_number)


# -- masks of what is not known ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [fw.MeanSquaredError(), fw.BinaryCrossEntropy(2.0)])
def test_targets_that_are_not_known_may_be_nan_where_they_weigh_nothing(loss):
    """A NaN target of weight 0 adds nothing to value and gradient, which are those of the other positions alone."""
    output, target = logits(6, 3), labels((6, 3), 2).double()
    known = torch.rand(6, 3) > 0.3
    holes = torch.where(known, target, torch.nan)
    n = known.sum()
    value, gradient = value_and_gradient(lambda x: loss(x, holes, known), output)
    one, other = value_and_gradient(lambda x: loss(x[known], target[known]), output)
    torch.testing.assert_close(value, one)
    torch.testing.assert_close(gradient, other)
    assert loss.sums(output, holes, known).weight == n
    rows = torch.tensor([1, 0, 1, 1, 0, 1])
    holes = torch.where(rows[:, None] > 0, target, torch.nan)
    torch.testing.assert_close(loss(output, holes, rows), loss(output[rows > 0], target[rows > 0]))
    assert loss(output, torch.where(known, target, torch.nan)).isnan()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: fw.Focal(-1.0), "gamma must be a finite number of 0 or more, got -1.0"),
        (lambda: fw.Focal(float("nan")), "gamma must .* got nan"),
        (lambda: fw.Focal(weight=[1.0, -1]), "at least 0"),
        (lambda: fw.Focal(ignore_index=None), "integer, got None"),
        (lambda: fw.LogitAdjusted([3, 0]), r"greater than 0 for every class, got \[3.0, 0.0\]"),
        (lambda: fw.LogitAdjusted([[1, 2]]), r"shape \(C,\) with C >= 2, got shape \(1, 2\)"),
        (lambda: fw.LogitAdjusted([3]), "C >= 2"),
        (lambda: fw.LogitAdjusted([3, 4], tau=-0.1), "tau must .* got -0.1"),
        (lambda: fw.LDAM([3, float("inf")]), "finite"),
        (lambda: fw.LDAM([3, 4], max_margin=-1), "max_margin must"),
        (lambda: fw.LDAM([3, 4], scale=0), "scale must be greater than 0"),
        (lambda: fw.ExpectedCost([[0, 1], [1, 1]]), "zero diagonal"),
        (lambda: fw.ExpectedCost([1.0, 2]), r"shape \(C, C\)"),
    ],
)
def test_options_out_of_range_are_refused(build, match):
    """Invalid options are refused at construction, with the value given."""
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize("name", ["focal", "logit adjustment", "LDAM", "expected cost"])
def test_outputs_and_targets_that_do_not_fit_are_refused(name):
    """Errors name shapes, numbers of classes and labels, as those of cross-entropy do."""
    loss, y = CASES[name][0](), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2,\)"):
        loss(torch.zeros(3, 4), y[:2])
    if name != "focal":
        with pytest.raises(ValueError, match="4 class weights or costs.*3 classes"):
            loss(torch.zeros(3, 3), y)
    with pytest.raises(IndexError, match=r"label 4 at index 1 .*0\.\.3 and ignore_index=-100"):
        loss(torch.zeros(3, 4), torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match="must be 0 or 1, got 2.0 at index 2"):
        BINARY[name][0]()(torch.zeros(3), torch.tensor([0.0, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_takes_masked_logits(gamma, dtype):
    """A logit of -inf removes its class from value and gradient; a single remaining class has loss 0."""
    loss, y = fw.Focal(gamma), labels((7,), 2)
    output = logits(7, 2, dtype=dtype)
    for masked in (1, 2):
        gone = torch.full((7, masked), -torch.inf, dtype=dtype)
        assert_same(lambda x: loss(x, y), lambda x, gone=gone: loss(torch.cat([x, gone], 1), y), output)
        value, gradient = value_and_gradient(
            lambda x: loss(x, torch.zeros_like(y)), torch.cat([output[:, :1].detach(), gone], 1)
        )
        assert value == 0
        assert not gradient.any()
    assert loss(torch.tensor([-torch.inf], dtype=dtype), torch.tensor([0])) == 0
    assert loss(torch.tensor([[-torch.inf, 1.0]], dtype=dtype), torch.tensor([0])) == torch.inf
