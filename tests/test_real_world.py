"""The real-world-weight cross-entropy equals its formula, and other losses where it should."""

import pytest
import torch
import torch.nn.functional as F

from fitwatch.losses import RealWorldCrossEntropy
from tests._losses import assert_same, costs_of, labels, logits, value_and_gradient, weights_of


def reference(output, target, fn, fp):
    """The loss in float64, with log(1 - p_j) as logsumexp over the other classes minus logsumexp over all."""
    z = output.double()
    everything = z.logsumexp(1)
    total = 0
    for i, y in enumerate(target.tolist()):
        total = total - fn[y] * (z[i, y] - everything[i])
        for j in range(z.shape[1]):
            if j != y:
                others = torch.cat([z[i, :j], z[i, j + 1 :]]).logsumexp(0)
                total = total - fp[y, j] * (others - everything[i])
    return total / len(target)


@pytest.mark.parametrize("scale", [0.01, 1, 10, 100])
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_real_world_equals_the_formula_at_any_scale(num_classes, scale):
    """Value and gradient in float32 equal the float64 formula to about 1e-6, for logits of scale up to 100."""
    fn, fp = costs_of(num_classes)
    output, target = logits(64, num_classes, scale=scale, dtype=torch.float32), labels((64,), num_classes)
    expected, expected_gradient = value_and_gradient(lambda x: reference(x, target, fn, fp), output.double())
    loss = RealWorldCrossEntropy(fn.float(), fp.float())
    value, gradient = value_and_gradient(lambda x: loss(x, target), output)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    largest = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-6 * largest)


def test_real_world_does_not_depend_on_the_level_of_the_logits():
    """In float32 a constant of 2^12 on all logits changes neither value nor gradient by more than 1e-6."""
    fn, fp = costs_of(4)
    # quarters, so that the sum with the constant is exact
    output, target = (logits(64, 4, scale=5, dtype=torch.float32) * 4).detach().round() / 4, labels((64,), 4)
    loss = RealWorldCrossEntropy(fn, fp)
    plain, raised = (value_and_gradient(lambda x: loss(x, target), output + level) for level in (0, 4096))
    for one, other in zip(plain, raised, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gap", [5.0, 17, 40, 90, 1000])
def test_the_worst_mistakes_keep_their_gradient(gap):
    """A wrong class that leads by any gap costs fp * gap and more, with gradient fp on it and nothing that is nan."""
    output = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True)
    loss = RealWorldCrossEntropy([0, 0, 0], [[0, 0, 0], [3, 0, 0], [0, 0, 0]])
    value = loss(output, torch.tensor([1]))
    value.backward()
    assert value.item() == pytest.approx(3 * (gap - torch.log(torch.tensor(2.0)).item()), rel=0.01)
    assert output.grad[0, 0].item() == pytest.approx(3, rel=0.02)
    assert output.grad[0, 1:].tolist() == pytest.approx([-1.5, -1.5], rel=0.02)


@pytest.mark.parametrize("gap", [40.0, 1000.0])
def test_the_worst_binary_mistakes_keep_their_gradient(gap):
    """A binary logit that is wrong by any gap has the gradient of its cost, in both directions."""
    output = torch.tensor([gap, -gap], requires_grad=True)
    RealWorldCrossEntropy(20, 3).sums(output, torch.tensor([0, 1])).total.backward()
    assert output.grad.tolist() == pytest.approx([3, -20])


def test_a_confident_correct_answer_costs_nothing():
    """A correct class that leads by 200 has loss 0 and a finite gradient, although 1 - p is 0."""
    output = torch.tensor([[200.0, 0, 0]], requires_grad=True)
    value = RealWorldCrossEntropy([1.0, 1, 1], 1 - torch.eye(3))(output, torch.tensor([0]))
    value.backward()
    assert value.item() == 0
    assert output.grad.tolist() == [[0, 0, 0]]


def test_without_false_positive_costs_it_is_cross_entropy():
    """B = 0 and a = 1 is cross-entropy; B = 0 is class-weighted cross-entropy divided by N."""
    output, target, w = logits(9, 4), labels((9,), 4), weights_of(4)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    plain, weighted = RealWorldCrossEntropy(torch.ones_like(w), nothing), RealWorldCrossEntropy(w, nothing)
    assert_same(lambda x: F.cross_entropy(x, target), lambda x: plain(x, target), output)
    assert_same(lambda x: F.cross_entropy(x, target, w, reduction="sum") / 9, lambda x: weighted(x, target), output)


@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, 1, 3)])
def test_binary_real_world_is_binary_cross_entropy(shape):
    """The binary form is fp_cost times BCE with pos_weight = fn_cost / fp_cost, per example too."""
    output, target = logits(*shape, scale=30), labels(shape, 2)
    loss = RealWorldCrossEntropy(20, 4)

    def expected(x):
        return 4 * F.binary_cross_entropy_with_logits(x, target.double(), pos_weight=torch.tensor(5.0))

    def by_example(x):
        losses, weights = loss.per_example(x, target)
        assert losses.shape == weights.shape == (9,)
        return (losses * weights).sum() / weights.sum()

    assert_same(expected, lambda x: loss(x, target), output)
    assert_same(expected, by_example, output)


def test_all_costs_one_is_binary_cross_entropy_on_softmax():
    """With a = 1 and B = 1 - I it is BCE, summed over the classes, between softmax outputs and one-hot targets."""
    output, target = logits(9, 4), labels((9,), 4)
    loss = RealWorldCrossEntropy(torch.ones(4), 1 - torch.eye(4))

    def expected(x):
        return F.binary_cross_entropy(x.softmax(1), F.one_hot(target, 4).double(), reduction="sum") / 9

    assert_same(expected, lambda x: loss(x, target), output)


def test_two_classes_are_weighted_cross_entropy():
    """With two softmax outputs the loss is cross-entropy with weights a + rowsum(B), divided by N."""
    output, target = logits(9, 2), labels((9,), 2)
    fn, fp = costs_of(2)
    loss = RealWorldCrossEntropy(fn, fp)
    weight = fn + fp.sum(1)
    assert_same(lambda x: F.cross_entropy(x, target, weight, reduction="sum") / 9, lambda x: loss(x, target), output)


def test_real_world_has_no_class_weights_but_costs():
    """Weights are refused; without weights the loss is plain cross-entropy; unit costs do not count as weights."""
    output, target = logits(9, 3), labels((9,), 3)
    loss = RealWorldCrossEntropy(*costs_of(3))
    with pytest.raises(TypeError, match="takes no class weights"):
        loss.weighted(torch.ones(3))
    assert (loss.has_weights, loss.unweighted().has_weights) == (True, False)
    torch.testing.assert_close(loss.unweighted()(output, target), F.cross_entropy(output, target))
    binary = RealWorldCrossEntropy(5, 2)
    assert (binary.has_weights, binary.unweighted().has_weights) == (True, False)
    y = labels((9,), 2).double()
    z = logits(9)
    torch.testing.assert_close(binary.unweighted()(z, y), F.binary_cross_entropy_with_logits(z, y))


def test_costs_as_numbers_are_not_rounded_to_bfloat16():
    """Two numbers with bfloat16 outputs of two classes, or of one, are the numbers as given."""
    output, target = logits(9, 2, dtype=torch.bfloat16).detach(), labels((9,), 2)
    loss = RealWorldCrossEntropy(20.3, 1.7)
    weight = torch.tensor([1.7, 20.3])
    expected = F.cross_entropy(output.float(), target, weight, reduction="sum") / 9
    torch.testing.assert_close(loss(output, target), expected)
    z = output[:, 1].float()
    binary = F.binary_cross_entropy_with_logits(z, target.float(), pos_weight=torch.tensor(20.3 / 1.7))
    torch.testing.assert_close(loss(output[:, 1], target), 1.7 * binary)


@pytest.mark.parametrize("shape", [(9, 5), (400, 50)])  # the second beyond what is computed at once
def test_sums_and_mean_are_summed_up_by_the_kernel(shape):
    """Gradients of the mean, the sum and single losses agree, also in a large batch, when repeated, and at second order."""
    fn, fp = costs_of(shape[1])
    output, target = logits(*shape), labels(shape[:1], shape[1])
    loss = RealWorldCrossEntropy(fn, fp)

    def each(x):
        return loss.per_example(x, target)[0]

    assert_same(lambda x: each(x).mean(), lambda x: loss(x, target), output)
    assert_same(lambda x: each(x).sum(), lambda x: loss.sums(x, target).total, output)
    assert_same(lambda x: 3 * each(x).mean(), lambda x: 3 * loss(x, target), output)
    assert loss.sums(output, target).weight == shape[0]
    value = loss(output, target)
    first, second = (torch.autograd.grad(value, output, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(second, first)
    with torch.no_grad():
        torch.testing.assert_close(loss(output, target), value.detach())
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, target))(output.detach()), first)
    product = torch.autograd.functional.hvp(lambda x: loss(x, target), output.detach(), first)[1]
    moved = [value_and_gradient(lambda x: loss(x, target), output + step * first)[1] for step in (1e-5, -1e-5)]
    torch.testing.assert_close(product, (moved[0] - moved[1]) / 2e-5, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("ignored", [0, 2])
def test_a_class_may_be_ignored(ignored):
    """Positions of an ignored class do not count, whether outputs are (N, C) or (N, C, 1): the rest is the loss."""
    fn, fp = costs_of(3)
    output, target = logits(9, 3), labels((9,), 3)
    kept = target != ignored
    assert 0 < kept.sum() < 9
    loss, plain = RealWorldCrossEntropy(fn, fp, ignore_index=ignored), RealWorldCrossEntropy(fn, fp)
    assert_same(lambda x: plain(x[kept], target[kept]), lambda x: loss(x, target), output)
    assert_same(lambda x: plain(x[kept], target[kept]), lambda x: loss(x[:, :, None], target[:, None]), output)
    assert_same(lambda x: plain.sums(x[kept], target[kept]).total, lambda x: loss.sums(x, target).total, output)
    assert loss.sums(output, target).weight == kept.sum()
    assert loss.per_example(output, target)[1].tolist() == kept.tolist()
