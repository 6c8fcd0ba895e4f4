"""Temperatures, biases and calibration errors agree with torch's own functions and with published packages."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from fitwatch.calibration.affine import fit_affine
from fitwatch.calibration.refined import Refined
from fitwatch.calibration.reliability import BINS, calibration_error, reliability
from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import PRIOR_SD, cross_fitted, fit_temperature


def classes(n=400, c=4, hidden=2.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, c, generator=generator, dtype=torch.float64) * 4
    return z, (z / hidden).softmax(1).multinomial(1, generator=generator).squeeze(1)


def labels(n=300, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator, dtype=torch.float64) * 3
    return z, (torch.rand(n, k, generator=generator, dtype=torch.float64) < (z / 2).sigmoid()).double()


def lowest(function, low=-6.0, high=6.0):
    """Golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    for _ in range(120):
        if function(a) < function(b):
            high, b = b, a
            a = high - ratio * (high - low)
        else:
            low, a = a, b
            b = low + ratio * (high - low)
    return (low + high) / 2


def cross_entropy(z, y, weight=None):
    w = torch.ones(len(z), dtype=z.dtype) if weight is None else weight
    if y.shape == z.shape:
        each = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        return (each * (w if z.dim() == 1 else w[:, None])).sum() / w.mean()
    return (F.cross_entropy(z, y, reduction="none") * w).sum() / w.mean()


CASES = {
    "classes": classes(),
    "two classes": classes(c=2, seed=1),
    "underconfident": classes(hidden=0.4, seed=2),
    "one logit": tuple(t[:, 0] for t in labels(k=1, seed=3)),
    "one column": labels(k=1, seed=4),
    "labels": labels(),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_temperature_is_that_of_a_search_over_torchs_loss(case, prior, weighted):
    """Temperature and loss are those that a golden-section search on torch's cross-entropy finds, to 1e-6."""
    z, y = CASES[case]
    weight = torch.rand(len(z), generator=torch.Generator().manual_seed(9), dtype=z.dtype) if weighted else None

    def objective(log_t):
        penalty = log_t**2 / (2 * PRIOR_SD**2) if prior else 0.0
        return float(cross_entropy(z / math.exp(log_t), y, weight)) + penalty

    rows = Rows.of(z, y, weight)
    found = fit_temperature(rows, prior=prior)
    assert found == pytest.approx(math.exp(lowest(objective)), rel=1e-6)
    each = rows.losses(1 / found) @ rows.weights * rows.positions
    assert float(each) == pytest.approx(float(cross_entropy(z / found, y, weight)), rel=1e-12)
    for start in (0.05, 0.9, 1.1, 20.0):
        assert fit_temperature(rows, start=start, prior=prior) == pytest.approx(found, rel=1e-8)


def test_the_temperature_is_that_of_scikit_learn():
    """For fixed logits without the prior it is the temperature that scikit-learn 1.9.1 finds, to 1e-6."""
    z = torch.tensor([[(i * (j + 2)) % 7 - 3.0 + 0.5 * j for j in range(3)] for i in range(40)], dtype=torch.float64)
    y = torch.tensor([int(z[i].argmax()) if i % 3 else (i // 3) % 3 for i in range(40)])
    rows = Rows.of(z, y)
    assert fit_temperature(rows, prior=False) == pytest.approx(SKLEARN_T, rel=1e-6)
    assert float(rows.losses(1 / SKLEARN_T).mean()) == pytest.approx(SKLEARN_LOSS, rel=1e-9)


SKLEARN_T, SKLEARN_LOSS = 1.7425659800727842, 0.8221383009051285


def test_examples_without_a_mistake_stay_finite():
    """The prior keeps the temperature of a perfect classifier moderate; without it the fit ends within its bracket."""
    z = torch.eye(3, dtype=torch.float64).repeat(20, 1)
    rows = Rows.of(z, z.argmax(1))
    assert 0.1 < fit_temperature(rows) < 0.5
    assert math.exp(-7) <= fit_temperature(rows, prior=False) < 0.02
    assert fit_temperature(Rows.of(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))) == 1.0


def test_masked_classes_and_large_logits_keep_the_fit_finite():
    """A logit of -inf at classes that can't occur, and logits of 1e5, change nothing and give no nan."""
    z, y = classes()
    masked = torch.cat([z, torch.full((len(z), 1), -torch.inf, dtype=z.dtype)], 1)
    assert fit_temperature(Rows.of(masked, y)) == pytest.approx(fit_temperature(Rows.of(z, y)), rel=1e-12)
    assert math.isfinite(fit_temperature(Rows.of(z + 1e5, y)))
    assert fit_temperature(Rows.of(z + 1e5, y)) == pytest.approx(fit_temperature(Rows.of(z, y)), rel=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e20])
def test_huge_logits_keep_their_loss(size):
    """After a divergence the log-losses are those of torch, however large, and the fits stay finite."""
    generator = torch.Generator().manual_seed(0)
    z = size * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (200,), generator=generator)
    labels = torch.nn.functional.one_hot(classes, 3).double()
    for y, loss in (
        (classes, torch.nn.functional.cross_entropy(z, classes)),
        (labels, torch.nn.functional.binary_cross_entropy_with_logits(z, labels)),
    ):
        rows = Rows.of(z, y)
        refined = Refined.of(rows, rows, None, start=1.0)
        assert refined.log_loss == pytest.approx(float(loss), rel=1e-12)
        found = refined.calibration()
        assert math.isfinite(found.biased_temperature)
        assert found.biases.isfinite().all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 7, 60, 300])
def test_cross_fitting_is_that_of_refitting_each_fold(case, count):
    """The scale of an example is that of a fit to the other folds, which never saw it."""
    z, y = (t[:count] for t in CASES[case])
    rows = Rows.of(z, y)
    scales = cross_fitted(rows, fit_temperature(rows))
    for scale in scales.unique():
        others = scales != scale
        exact = 1 / fit_temperature(rows.part(others)) if bool(others.any()) else 1.0
        assert float(scale) == pytest.approx(exact, rel=1e-3)
    assert len(scales.unique()) <= 5


def test_one_step_is_enough_for_many_examples():
    """With many logits, the temperatures of the folds, found by one step, are within 1e-4 of their own fits."""
    z, y = classes(n=20_000)
    rows = Rows.of(z, y)
    scales = cross_fitted(rows, fit_temperature(rows))
    for scale in scales.unique():
        assert float(scale) == pytest.approx(1 / fit_temperature(rows.part(scales != scale)), rel=1e-4)


def test_cross_fitted_losses_are_not_optimistic():
    """Over many small samples, the cross-fitted loss is above that of the fit on all examples, near that on new ones."""
    z, y = classes(n=40_000, hidden=3.0)
    fresh = Rows.of(z[20_000:], y[20_000:])
    optimism, error = [], []
    for i in range(200):
        rows = Rows.of(z[i * 40 : (i + 1) * 40], y[i * 40 : (i + 1) * 40])
        t = fit_temperature(rows)
        held_out = float(rows.losses(cross_fitted(rows, t)).mean())
        optimism.append(held_out - float(rows.losses(1 / t).mean()))
        error.append(held_out - float(fresh.losses(1 / t).mean()))
    assert min(optimism) > 0
    assert abs(sum(error) / 200) < 0.03  # three standard errors of the mean of 200 samples


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("case", ["classes", "two classes", "labels", "one column"])
def test_scale_and_biases_are_those_of_lbfgs(case, prior):
    """Temperature and biases are those that torch's LBFGS finds on torch's cross-entropy."""
    z, y = CASES[case]
    theta = torch.zeros(1 + z.shape[1], dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(z * (-theta[0]).exp() + theta[1:], y)
        if prior:
            loss = loss + theta.square().sum() / (2 * PRIOR_SD**2)
        loss.backward()
        return loss

    optimizer.step(closure)
    t, bias = fit_affine(Rows.of(z, y), prior=prior)
    wanted = theta[1:].detach()
    assert t == pytest.approx(float(theta[0].detach().exp()), rel=1e-6)
    torch.testing.assert_close(
        bias, wanted - wanted.mean() if case in ("classes", "two classes") else wanted, atol=1e-6, rtol=0
    )


def test_the_calibration_error_is_that_of_torchmetrics():
    """Of classes it is torchmetrics' multiclass error, of one logit its binary one."""
    z, y = classes(n=500)
    theirs = MulticlassCalibrationError(num_classes=4, n_bins=BINS)(z, y)
    assert calibration_error(reliability(Rows.of(z, y))) == pytest.approx(float(theirs), abs=1e-6)
    z, y = (t[:, 0] for t in labels(n=500, k=1))
    theirs = BinaryCalibrationError(n_bins=BINS)(z.sigmoid(), y.long())
    assert calibration_error(reliability(Rows.of(z, y))) == pytest.approx(float(theirs), abs=1e-6)
