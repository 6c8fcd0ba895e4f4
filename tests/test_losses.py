"""Losses equal torch's and add up exactly, whatever the cut."""

import pytest
import torch
import torch.nn.functional as F

from fitwatch.losses import BinaryCrossEntropy, CrossEntropy, LossSum, RealWorldCrossEntropy
from tests._losses import SHAPES, assert_same, labels, logits, target_for, value_and_gradient, weights_of


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(shape, kind, smoothing, weighted):
    """Value, gradient and the fraction equal torch's for every rank, target, weight and smoothing."""
    output, target = logits(*shape), target_for(shape, kind)
    weight = weights_of(5) if weighted else None
    ignore = -1 if kind == "ignored" else -100
    loss = CrossEntropy(weight, label_smoothing=smoothing, ignore_index=ignore)

    def expected(x):
        return F.cross_entropy(x, target, weight, label_smoothing=smoothing, ignore_index=ignore)

    assert_same(expected, lambda x: loss(x, target), output)
    assert_same(expected, lambda x: loss.sums(x, target).mean, output)
    total = F.cross_entropy(output, target, weight, label_smoothing=smoothing, ignore_index=ignore, reduction="sum")
    torch.testing.assert_close(loss.sums(output, target).total, total)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_per_example_adds_up(shape, kind, smoothing):
    """Losses and weights of the examples, both (N,), have torch's loss as their weighted mean."""
    output, target, weight = logits(*shape), target_for(shape, kind), weights_of(5)
    ignore = -1 if kind == "ignored" else -100
    loss = CrossEntropy(weight, label_smoothing=smoothing, ignore_index=ignore)
    options = {"label_smoothing": smoothing, "ignore_index": ignore}
    count = shape[0] if len(shape) > 1 else 1

    def mean(x):
        losses, weights = loss.per_example(x, target)
        assert losses.shape == weights.shape == (count,)
        return (losses * weights).sum() / weights.sum()

    assert_same(lambda x: F.cross_entropy(x, target, weight, **options), mean, output)


def test_cross_entropy_per_example_is_the_loss_of_a_batch_of_one():
    """The loss of an example is torch's loss of it alone, its weight the sum over its pixels, 0 if all ignored."""
    output, target, weight = logits(4, 5, 3), labels((4, 3), 5), weights_of(5)
    target[2] = -100
    losses, weights = CrossEntropy(weight).per_example(output, target)
    for i in (0, 1, 3):
        torch.testing.assert_close(losses[i], F.cross_entropy(output[i : i + 1], target[i : i + 1], weight))
        torch.testing.assert_close(weights[i], sum(weight[y] for y in target[i]))
    assert (losses[2].item(), weights[2].item()) == (0, 0)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), output)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cuts", [(100,), (37, 63), (1, 2, 3, 94), (99, 1), (20,) * 5])
def test_sums_add_up_over_any_cut_of_a_sorted_batch(cuts, smoothing):
    """Sums over the parts of a batch sorted by class give the loss and gradient of the whole, in float64 to 1e-12."""
    output, target, weight = logits(100, 3), torch.arange(100).div(50, rounding_mode="floor"), weights_of(3)
    target[97:] = 2
    loss = CrossEntropy(weight, label_smoothing=smoothing)

    def in_parts(x):
        parts = [loss.sums(*part) for part in zip(x.split(cuts), target.split(cuts), strict=True)]
        return sum(part.total for part in parts) / sum(part.weight for part in parts)

    whole = value_and_gradient(lambda x: F.cross_entropy(x, target, weight, label_smoothing=smoothing), output)
    parts = value_and_gradient(in_parts, output)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-15)


def test_a_batch_that_is_all_ignored():
    """A batch without a label that counts gives torch's nan as a mean and (0, 0) as sums."""
    target = torch.full((3,), -100)
    loss = CrossEntropy()
    assert loss(logits(3, 2), target).isnan()
    assert [x.item() for x in loss.sums(logits(3, 2), target)] == [0, 0]
    losses, weights = loss.per_example(logits(3, 2), target)
    assert losses.tolist() == weights.tolist() == [0, 0, 0]


def test_an_empty_batch():
    """A batch of no examples has sums (0, 0) and empty losses per example."""
    for loss, output, target in [
        (CrossEntropy(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (CrossEntropy(), torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)),
        (BinaryCrossEntropy(2), torch.zeros(0, 1), torch.zeros(0, 1)),
        (RealWorldCrossEntropy(torch.ones(3), 1 - torch.eye(3)), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    ]:
        assert [float(x) for x in loss.sums(output, target)] == [0, 0]
        assert [len(x) for x in loss.per_example(output, target)] == [0, 0]


def test_uint8_labels_are_taken_as_torch_takes_them():
    """Class indices of uint8 give the loss of the same indices in int64."""
    output, target = logits(6, 3), labels((6,), 3)
    torch.testing.assert_close(CrossEntropy()(output, target.byte()), F.cross_entropy(output, target))


def test_gradcheck():
    """Analytic gradients equal finite differences for targets that are probabilities, and for binary losses."""
    binary = torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)
    for loss, output, target in [
        (CrossEntropy(weights_of(3)), logits(4, 3), target_for((4, 3), "probabilities")),
        (BinaryCrossEntropy(3), logits(4), binary),
        (RealWorldCrossEntropy(3, 0.5), logits(4), binary),
    ]:
        for function in (loss, lambda x, y, loss=loss: loss.per_example(x, y)[0]):
            assert torch.autograd.gradcheck(function, (output, target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize(
    ("shape", "pos_weight"), [((9,), None), ((9,), 2.5), ((9, 1), [2.5]), ((9, 4), 3), ((9, 4), 4)]
)
def test_binary_cross_entropy_is_torchs(shape, pos_weight, dtype):
    """Value, gradient, the fraction and the examples equal torch's for targets of any dtype."""
    if pos_weight == 4:
        pos_weight = weights_of(4)
    output, target = logits(*shape), labels(shape, 2).to(dtype)
    loss = BinaryCrossEntropy(pos_weight)
    weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=torch.float64)

    def expected(x):
        return F.binary_cross_entropy_with_logits(x, target.double(), pos_weight=weight)

    def by_example(x):
        losses, weights = loss.per_example(x, target)
        assert losses.shape == weights.shape == (9,)
        return (losses * weights).sum() / weights.sum()

    assert_same(expected, lambda x: loss(x, target), output)
    assert_same(expected, by_example, output)
    assert loss.sums(output, target).weight == output.numel()


def test_binary_unbatched():
    """One logit without a batch dimension gives torch's loss of it, and one example."""
    output, target = logits(1).squeeze(), torch.tensor(1)
    expected = F.binary_cross_entropy_with_logits(output, target.double())
    losses, weights = BinaryCrossEntropy().per_example(output, target)
    torch.testing.assert_close(losses, expected.reshape(1))
    torch.testing.assert_close(BinaryCrossEntropy()(output, target), expected)
    assert weights.tolist() == [1]


def test_binary_weighted_takes_the_weights_of_two_classes():
    """Two class weights give pos_weight = w1 / w0; other numbers of weights and a zero are refused."""
    output, target = logits(9), labels((9,), 2)
    loss = BinaryCrossEntropy(7).weighted(torch.tensor([0.5, 2]))
    expected = F.binary_cross_entropy_with_logits(output, target.double(), pos_weight=torch.tensor(4.0))
    torch.testing.assert_close(loss(output, target), expected)
    for wrong in ([1.0, 2, 3], [0.0, 1]):
        with pytest.raises(ValueError, match="the weights of two classes, shape .* greater than 0"):
            loss.weighted(torch.tensor(wrong))


def test_weights_are_copied():
    """A later change of the user's tensor does not change the loss."""
    weight = torch.tensor([1.0, 2])
    loss = CrossEntropy(weight)
    weight.zero_()
    assert loss.weight.tolist() == [1, 2]


def test_weighted_and_unweighted_keep_the_other_options():
    """A loss with other weights, or none, keeps its kind, smoothing and ignored index, and leaves the first alone."""
    output, target = logits(8, 3), labels((8,), 3)
    target[0] = -7
    loss = CrossEntropy(label_smoothing=0.1, ignore_index=-7)
    options = {"label_smoothing": 0.1, "ignore_index": -7}
    w = weights_of(3)
    weighted = loss.weighted(w)
    assert (loss.has_weights, weighted.has_weights, weighted.unweighted().has_weights) == (False, True, False)
    torch.testing.assert_close(weighted(output, target), F.cross_entropy(output, target, w, **options))
    torch.testing.assert_close(weighted.unweighted()(output, target), F.cross_entropy(output, target, **options))
    binary = BinaryCrossEntropy(2)
    assert (binary.has_weights, binary.unweighted().has_weights, binary.has_weights) == (True, False, True)


def test_user_subclass_keeps_its_class():
    """The weighted copy of a user's subclass is of that subclass, whatever its constructor takes."""

    class Mine(CrossEntropy):
        def __init__(self, name):
            super().__init__()
            self.name = name

    mine = Mine("a").weighted(torch.tensor([1.0, 2]))
    assert (type(mine), mine.name, mine.has_weights) == (Mine, "a", True)


def test_loss_sum_mean():
    """The mean of a sum is its total over its weight, and nan for a weight of 0."""
    assert LossSum(torch.tensor(6.0), 4).mean.item() == 1.5
    assert LossSum(torch.tensor(0.0), 0).mean.isnan()
