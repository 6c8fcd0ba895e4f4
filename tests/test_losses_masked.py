"""Positions without weight add nothing to the value and the gradient, whatever the model gave for them."""

import math

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch.losses import LDAM, ExpectedCost, Focal, LogitAdjusted, MeanSquaredError, NegativeLogLikelihood

COSTS = [[0.0, 1, 2], [3, 0, 1], [1, 5, 0]]
BY_CLASS = {
    "cross-entropy": fw.CrossEntropy,
    "weighted": lambda **o: fw.CrossEntropy([1.0, 2, 3], **o),
    "smoothed": lambda **o: fw.CrossEntropy([1.0, 2, 3], label_smoothing=0.1, **o),
    "log-likelihood": lambda **o: NegativeLogLikelihood([1.0, 2, 3], **o),
    "focal": lambda **o: Focal(weight=[1.0, 2, 3], **o),
    "adjusted": lambda **o: LogitAdjusted([5, 3, 2], **o),
    "margin": lambda **o: LDAM([5, 3, 2], **o),
    "expected cost": lambda **o: ExpectedCost(COSTS, **o),
    "real world": lambda **o: fw.RealWorldCrossEntropy(COSTS, **o),
}
BAD = [math.nan, math.inf, -math.inf]
SHAPES = [(6, 3), (6, 3, 4), (6, 3, 3), (6, 3, 2, 3)]


class Mine(fw.losses.Loss):
    """A user's loss of probabilities, which must stay in their range; classes come last."""

    def unreduced(self, output, target):
        return -output.log().gather(-1, target.unsqueeze(-1)).squeeze(-1), 1.0


def outputs(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(shape, seed=1):
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, output, *rest):
    output = output.clone().requires_grad_()
    total, weight = loss.sums(output, *rest)
    total.backward()
    return total.detach(), torch.as_tensor(weight, dtype=torch.float64), output.grad


def assert_masked(loss, output, bad, target, counts, *, classes_first=True, sample_weight=None, marked=None):
    """With bad outputs the sums are those with good ones, and so is the gradient, which is 0 there."""
    rest = (marked if marked is not None else target,) if sample_weight is None else (target, sample_weight)
    expected = value_and_gradient(loss, output, *rest)
    found = value_and_gradient(loss, bad, *rest)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    keep = counts.unsqueeze(1) if classes_first else counts.unsqueeze(-1)
    assert (found[2][(~keep).expand_as(output)] == 0).all()
    losses, weights = loss.per_example(bad, *rest)
    assert losses.isfinite().all()
    torch.testing.assert_close((losses * weights).sum(), found[0], rtol=1e-12, atol=1e-12)


def spoilt(output, counts, bad, *, classes_first=True):
    keep = counts.unsqueeze(1) if classes_first else counts.unsqueeze(-1)
    return torch.where(keep, output, bad)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BY_CLASS)
def test_ignored_positions_may_be_of_any_value(name, shape, bad):
    """ignore_index leaves out a position whose outputs are nan or infinite, in value and gradient."""
    output, target = outputs(shape), labels(shape[:1] + shape[2:])
    counts = torch.ones_like(target, dtype=torch.bool)
    counts.view(-1)[::3] = False
    for index in (-100, -1):
        marked = torch.where(counts, target, index)
        loss = BY_CLASS[name](ignore_index=index)
        assert_masked(loss, output, spoilt(output, counts, bad), target, counts, marked=marked)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BY_CLASS)
def test_weight_0_masks_any_value(name, shape, bad):
    """A weight of 0, of an example or a position, leaves out outputs that are nan or infinite."""
    output, target = outputs(shape), labels(shape[:1] + shape[2:])
    loss = BY_CLASS[name]()
    for given in {target.shape[:1], target.shape}:
        weight = torch.rand(given, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
        weight.view(-1)[::3] = 0
        counts = (weight != 0).reshape(*given, *[1] * (target.dim() - len(given))).expand(target.shape)
        assert_masked(loss, output, spoilt(output, counts, bad), target, counts, sample_weight=weight)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["cross-entropy", "focal", "margin", "log-likelihood"])
def test_a_class_of_weight_0_may_have_any_outputs(name, bad):
    """Examples of a class with weight 0 add nothing, in value and gradient, also after a load of such weights."""
    kinds = {"cross-entropy": fw.CrossEntropy, "log-likelihood": NegativeLogLikelihood}
    make = {"focal": lambda w: Focal(weight=w), "margin": lambda w: LDAM([5, 3, 2], weight=w), **kinds}[name]
    loaded = make([1.0, 1, 1])
    value_and_gradient(loaded, outputs((6, 3)), labels((6,)))
    loaded.load_state_dict(make([1.0, 0, 3]).state_dict())
    for loss in (make([1.0, 0, 3]), make([1.0, 1, 1]).weighted(torch.tensor([1.0, 0, 3])), loaded):
        for shape in SHAPES:
            output, target = outputs(shape), labels(shape[:1] + shape[2:])
            counts = target != 1
            assert_masked(loss, output, spoilt(output, counts, bad), target, counts)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("loss", [fw.BinaryCrossEntropy(), fw.BinaryCrossEntropy(3.0), MeanSquaredError()], ids=str)
def test_masked_elements_may_have_any_output_and_target(loss, bad):
    """Losses of one output per position leave out masked ones, for weights of examples, of rows and of positions."""
    for shape, given in [((6,), (6,)), ((6, 3), (6,)), ((6, 3), (6, 1)), ((6, 3), (6, 3)), ((6, 1, 4), (6, 1, 4))]:
        output, target = outputs(shape), (outputs(shape, 3) > 0).double()
        weight = torch.ones(given, dtype=torch.float64)
        weight.view(-1)[::2] = 0
        counts = weight.reshape(*given, *[1] * (len(shape) - len(given))).expand(shape) != 0
        expected = value_and_gradient(loss, output, target, weight)
        for marked in (target, torch.where(counts, target, math.nan)):
            found = value_and_gradient(loss, torch.where(counts, output, bad), marked, weight)
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3), (6, 3, 3)], ids=str)
def test_a_users_loss_masks_outputs_and_keeps_their_range(shape):
    """A loss with a logarithm and its classes last is masked too, and good outputs are handed over unchanged."""
    loss, output, target = Mine(), outputs(shape).softmax(-1), labels(shape[:-1])
    weights = [torch.tensor([0.0, 1, 1, 0, 2, 1])]
    if shape[1] != shape[-1]:  # else it is open which dimension the weights belong to
        weights.append(torch.randint(2, shape[:-1], generator=torch.Generator().manual_seed(3)).double())
    for weight in weights:
        counts = (weight != 0).reshape(*weight.shape, *[1] * (target.dim() - weight.dim())).expand(target.shape)
        for bad in BAD:
            broken = spoilt(output, counts, bad, classes_first=False)
            assert_masked(loss, output, broken, target, counts, classes_first=False, sample_weight=weight)


def test_weights_that_fit_two_dimensions_cut_off_nothing_that_counts():
    """With as many positions as classes in a user's loss, gradients are those of the plain formula."""
    loss, output, target = Mine(), outputs((6, 3, 3)).softmax(-1), labels((6, 3))
    weight = torch.randint(2, (6, 3), generator=torch.Generator().manual_seed(3)).double()
    reference = output.clone().requires_grad_()
    (-reference.log().gather(-1, target.unsqueeze(-1)).squeeze(-1) * weight).sum().backward()
    torch.testing.assert_close(value_and_gradient(loss, output, target, weight)[2], reference.grad)


def test_nan_of_an_example_that_counts_stays_visible():
    """Masking hides no nan of an example with weight."""
    output, target = outputs((6, 3)), labels((6,))
    output[1] = math.nan
    marked = torch.where(torch.arange(6) == 0, -100, target)
    for loss in (fw.CrossEntropy(), fw.CrossEntropy([1.0, 2, 3]), Focal()):
        assert loss.sums(output, marked).total.isnan()
        assert loss.sums(output, target, torch.tensor([0.0, 1, 1, 1, 1, 1])).total.isnan()


def test_masks_work_under_vmap_and_compile():
    """torch.func.vmap and a compiled graph leave out ignored positions, too."""
    output, target = outputs((4, 6, 3)), labels((4, 6))
    target[:, 0] = -100
    output[:, 0] = math.nan
    loss = fw.CrossEntropy()
    expected = torch.stack([loss.sums(o, t).total for o, t in zip(output, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda o, t: loss.sums(o, t).total)(output, target), expected)
    gradient = torch.func.vmap(torch.func.grad(lambda o, t: loss.sums(o, t).total))(output, target)
    assert gradient.isfinite().all()
    compiled = torch.compile(lambda o, t: loss.sums(o, t).total, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(output[0], target[0]), expected[0])


class Blank(nn.Module):
    """Gives nan for rows that are all 0, as attention over nothing does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.where((x == 0).all(-1, keepdim=True), math.nan, self.layer(x))


@pytest.mark.parametrize("by", ["index", "weight"])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, Focal])
def test_training_and_validation_leave_masked_examples_out(kind, by):
    """A fit with nan outputs for masked examples, watched by all observers, equals one without these examples."""
    x, y = outputs((40, 4)).float(), labels((40,))
    masked = torch.arange(40) % 5 == 0
    x[masked] = 0

    def fit(parts):
        torch.manual_seed(0)
        model = Blank()
        callbacks = [fw.OverfittingDetector(), fw.EarlyStopping("val/loss", min_delta="1se")]
        trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), kind(), callbacks=callbacks)
        result = trainer.fit([parts], [parts], epochs=2)
        return result.history[-1], model.layer.weight.detach()

    whole = (x, torch.where(masked, -100, y)) if by == "index" else (x, y, (~masked).float())
    history, weight = fit(whole)
    expected, reference = fit((x[~masked], y[~masked]))
    assert math.isfinite(history["val/loss_se"])
    for name in ("train/loss", "val/loss"):
        assert history[name] == pytest.approx(expected[name], rel=1e-5)
    torch.testing.assert_close(weight, reference)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("loss", [
    Focal(), LogitAdjusted([3, 2]), LDAM([3, 2]), ExpectedCost([[0.0, 1], [2, 0]]), fw.RealWorldCrossEntropy(2, 1),
    fw.RealWorldCrossEntropy([[0.0, 1], [2, 0]]), fw.BinaryCrossEntropy(), MeanSquaredError(),
], ids=lambda loss: type(loss).__name__)  # fmt: skip
def test_a_masked_target_of_one_logit_is_not_looked_at(loss, shape):
    """One logit with a nan target of weight 0 has the sums and the gradient that it has with a valid target."""
    output, target = outputs(shape), (outputs(shape, 3) > 0).double()
    bad, weight = target.clone(), torch.tensor([1.0, 2, 0, 1, 0, 3], dtype=torch.float64)
    bad[2], bad[4] = math.nan, 7.0
    if isinstance(loss, (fw.BinaryCrossEntropy, MeanSquaredError)):
        weight = weight.reshape(shape)
    expected, found = (value_and_gradient(loss, output, t, weight) for t in (target, bad))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)
    one, other = (loss.per_example(output, t, weight) for t in (target, bad))
    torch.testing.assert_close(other, one)
