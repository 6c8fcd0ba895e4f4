"""Losses are modules like torch's, and torch's become losses."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fitwatch.losses import (
    LDAM,
    BinaryCrossEntropy,
    CrossEntropy,
    ExpectedCost,
    Focal,
    LogitAdjusted,
    Loss,
    LossSum,
    MeanSquaredError,
    RealWorldCrossEntropy,
    as_loss,
)
from tests._losses import assert_same, labels, logits, refused, target_for, weights_of


def every_loss():
    """One loss of each kind, with outputs and targets."""
    y, b = labels((8,), 3), labels((8,), 2)
    return [
        (CrossEntropy([1.0, 2, 3]), logits(8, 3), y),
        (CrossEntropy([1.0, 2, 3], label_smoothing=0.1), logits(8, 3), y),
        (CrossEntropy([1.0, 2, 3]), logits(8, 3), target_for((8, 3), "probabilities")),
        (CrossEntropy([1.0, 2, 3]), logits(8, 3, 2), labels((8, 2), 3)),
        (BinaryCrossEntropy(2), logits(8), b),
        (RealWorldCrossEntropy(2, 1), logits(8), b),
        (RealWorldCrossEntropy([1.0, 2, 3], 1 - torch.eye(3)), logits(8, 3), y),
        (as_loss(nn.NLLLoss(torch.tensor([1.0, 2, 3]))), logits(8, 3), y),
        (Focal(1.5, weight=[1.0, 2, 3]), logits(8, 3), y),
        (LogitAdjusted([5.0, 2, 1], weight=[1.0, 2, 3]), logits(8, 3), y),
        (LDAM([5.0, 2, 1], weight=[1.0, 2, 3]), logits(8, 3), y),
        (ExpectedCost([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]]), logits(8, 3), y),
        (MeanSquaredError(), logits(8, 3), logits(8, 3, seed=4).detach()),
    ]


CASES = range(len(every_loss()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_computed_in_float32(case, dtype):
    """Outputs in half precision give the float32 loss of the same numbers, and a gradient in their own dtype."""
    loss, output, target = every_loss()[case]
    half = output.detach().to(dtype).requires_grad_()
    value = loss(half, target)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, loss(half.detach().float(), target))
    value.backward()
    assert half.grad.dtype is dtype
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_losses_are_well_behaved_modules(case):
    """Copies, pickles, state dicts and dtypes carry the weights, and no gradient is kept under no_grad."""
    loss, output, target = every_loss()[case]
    expected = loss(output, target)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss).to("cpu", torch.float64)):  # noqa: S301
        torch.testing.assert_close(twin(output, target), expected)
    twin.load_state_dict(loss.state_dict())
    torch.testing.assert_close(twin(output, target), expected)
    with torch.no_grad():
        assert not loss.sums(output, target).total.requires_grad
    assert not list(loss.parameters())
    assert isinstance(loss.sums(output, target), LossSum)
    assert type(loss).__name__ in repr(loss)
    assert loss(output.detach().float(), target).dtype is torch.float32


def test_buffers_follow_the_module():
    """Weights and costs are buffers that move and cast with the module."""
    loss = nn.ModuleList(
        [CrossEntropy([1.0, 2]), BinaryCrossEntropy(2), RealWorldCrossEntropy([1.0, 1], [[0, 1], [1, 0]])]
    )
    names = {"0.weight", "1.pos_weight", "2.fn_cost", "2.fp_cost"}
    assert {name for name, _ in loss.named_buffers()} == names
    assert {buffer.dtype for buffer in loss.double().buffers()} == {torch.float64}
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}


def test_as_loss_makes_torchs_losses_exact():
    """Torch's own losses become losses with sums and the same value, gradient, weights and options."""
    output, target, w = logits(8, 3), labels((8,), 3), weights_of(3)
    target[:2] = -1
    binary = labels((8, 3), 2).double()
    for theirs, y in [
        (nn.CrossEntropyLoss(w, label_smoothing=0.1, ignore_index=-1), target),
        (nn.CrossEntropyLoss(ignore_index=-1), target),
        (nn.NLLLoss(w, ignore_index=-1), target),
        (nn.BCEWithLogitsLoss(pos_weight=w), binary),
        (nn.BCEWithLogitsLoss(), binary),
        (nn.MSELoss(), logits(8, 3, seed=4).detach()),
    ]:
        ours = as_loss(theirs)
        assert isinstance(ours, Loss)
        assert_same(lambda x, theirs=theirs, y=y: theirs(x, y), lambda x, ours=ours, y=y: ours(x, y), output)
    assert type(as_loss(None)) is CrossEntropy


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (7, 5, 3, 2), (5,)])
def test_nll_loss_is_torchs(shape):
    """The loss on log-probabilities equals nn.NLLLoss for every rank, per example too, and takes no probabilities."""
    output, target, w = logits(*shape), target_for(shape, "ignored"), weights_of(5)
    theirs, ours = nn.NLLLoss(w, ignore_index=-1), as_loss(nn.NLLLoss(w, ignore_index=-1))

    def by_example(x):
        losses, weights = ours.per_example(x, target)
        return (losses * weights).sum() / weights.sum()

    assert_same(lambda x: theirs(x, target), lambda x: ours(x, target), output)
    assert_same(lambda x: theirs(x, target), by_example, output)
    refused(ours, output, output.detach(), ValueError, "expected class indices")
    assert ours.unweighted().has_weights is False
    torch.testing.assert_close(ours.unweighted()(output, target), nn.NLLLoss(ignore_index=-1)(output, target))


def test_as_loss_leaves_the_users_own_alone():
    """Subclasses, functions, other modules, objects with sums and losses without an exact form are returned unchanged."""

    class Mine(nn.CrossEntropyLoss):
        pass

    class Sums:
        def sums(self, output, target):
            return LossSum(output.sum(), 1)

    for loss in (
        Mine(reduction="sum"),
        nn.L1Loss(),
        nn.KLDivLoss(reduction="batchmean"),
        F.cross_entropy,
        CrossEntropy(),
        Sums(),
        nn.BCEWithLogitsLoss(weight=torch.ones(3)),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 1, 1)),
    ):
        assert as_loss(loss) is loss


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.NLLLoss, nn.MSELoss])
def test_as_loss_refuses_other_reductions(kind):
    """A torch loss that sums, or does not reduce, is refused with the reason."""
    with pytest.raises(ValueError, match=r"reduction='sum'.*depends on the batch size"):
        as_loss(kind(reduction="sum"))
    with pytest.raises(ValueError, match=r"reduction='none'.*not a scalar"):
        as_loss(kind(reduction="none"))


def test_as_loss_refuses_what_is_not_a_function():
    """A string is refused, and the class of a loss where an instance is needed."""
    with pytest.raises(TypeError, match="got 'ce'"):
        as_loss("ce")
    with pytest.raises(TypeError, match=r"use CrossEntropyLoss\(\)"):
        as_loss(nn.CrossEntropyLoss)


def test_weighted_and_unweighted_change_the_class_weights_alone():
    """Class losses get other weights, or none, and keep their options; the original does not change."""
    output, target, w = logits(8, 3), labels((8,), 3), weights_of(3)
    target[0] = -7
    for build in (
        lambda **o: Focal(1.5, ignore_index=-7, **o),
        lambda **o: LogitAdjusted([5.0, 2, 1], tau=0.7, label_smoothing=0.1, ignore_index=-7, **o),
        lambda **o: LDAM([5.0, 2, 1], max_margin=0.3, scale=5.0, ignore_index=-7, **o),
    ):
        plain, heavy = build(), build(weight=w)
        weighted = plain.weighted(w)
        assert (plain.has_weights, weighted.has_weights, weighted.unweighted().has_weights) == (False, True, False)
        torch.testing.assert_close(weighted(output, target), heavy(output, target))
        torch.testing.assert_close(heavy.unweighted()(output, target), plain(output, target))
        assert heavy.has_weights
    for loss in (ExpectedCost(1 - torch.eye(3)), MeanSquaredError()):
        assert loss.unweighted() is loss
        with pytest.raises(TypeError, match=f"{type(loss).__name__} takes no class weights"):
            loss.weighted(w)


def test_a_custom_loss_is_exact_after_one_method():
    """A custom loss that implements only `unreduced` has the right mean, sums and losses per example."""

    class Brier(Loss):
        def unreduced(self, output, target):
            return (output.softmax(1) - F.one_hot(target, 3)).square().sum(1), 1.0

    output, target, w = logits(8, 3), labels((8,), 3), torch.rand(8, dtype=torch.float64)
    each = (output.softmax(1) - torch.eye(3, dtype=torch.float64)[target]).square().sum(1)
    loss = Brier()
    torch.testing.assert_close(loss(output, target), each.mean())
    torch.testing.assert_close(loss(output, target, w), (w * each).sum() / w.sum())
    assert loss.sums(output, target).weight == 8
    torch.testing.assert_close(loss.per_example(output, target, w), (each, w))


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (lambda kind: kind(CrossEntropy)([1.0, 2]), [3.0, 4]),
        (lambda kind: kind(Focal)(2.0, weight=[1.0, 2]), [3.0, 4]),
        (lambda kind: kind(BinaryCrossEntropy)(2.0), [3.0, 4]),
        (lambda kind: kind(RealWorldCrossEntropy)([1.0, 2], [[0.0, 1], [2, 0]]), None),
        (lambda kind: kind(RealWorldCrossEntropy)(2.0, 1.0), None),
    ],
)
def test_other_weights_leave_a_loss_as_it_is_and_share_what_it_learns(build, weights):
    """A reweighted loss shares the parameters of the original, which keeps its weights and dtype."""

    def learning(base):
        class Learning(base):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.temperature = nn.Parameter(torch.ones(()))

        return Learning

    loss = build(learning)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    twins = [loss.unweighted()] + ([] if weights is None else [loss.weighted(torch.tensor(weights))])
    for twin in twins:
        assert type(twin) is type(loss)
        assert twin.temperature is loss.temperature
        twin.double()
    assert loss.has_weights
    assert not twins[0].has_weights
    assert [name for name, _ in loss.named_buffers()] == list(before)
    for name, buffer in loss.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
