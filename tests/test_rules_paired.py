"""The standard error of a rise, from the losses of the same examples at two evaluations."""

import math

import numpy as np
import pytest
import torch

from fitwatch.rules.overfitting import OverfittingRule, diagnose
from fitwatch.rules.paired import PairedRise, influences, standard_error


def plain_variance(difference, weights):
    """The variance of the weighted mean of differences: sum of (w (d - mean) / sum(w))^2, with N / (N - 1)."""
    share = weights / weights.sum()
    count = len(difference)
    mean = (share * difference).sum()
    return (share**2 * (difference - mean) ** 2).sum() * count / (count - 1)


def missed(difference, weights):
    """What one more example like the most extreme one would add to that variance."""
    share = weights / weights.sum()
    return (share**2 * (difference - (share * difference).sum()) ** 2).max()


def widening(difference, weights):
    """Half of Student's quantile where the normal one is 2, for the degrees of freedom of the variance."""
    part = weights * (difference - np.average(difference, weights=weights))
    kurtosis = np.mean(part**4) / np.mean(part**2) ** 2
    nu = max(1.5, 2 * len(part) / (kurtosis - 1))
    z = 2.0  # Abramowitz & Stegun 26.7.5, term by term
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return (z + g1 / nu + g2 / nu**2 + g3 / nu**3) / z


def expected_error(before, now, weights):
    """The error as a whole, in numpy."""
    d = now - before
    return widening(d, weights) * math.sqrt(plain_variance(d, weights) + missed(d, weights))


def sample(count, seed=0, tail=1.0):
    """Losses of examples at two evaluations, alike but for noise and a small rise, and weights."""
    rng = np.random.default_rng(seed)
    before = rng.lognormal(-1, tail, count)
    return before, before + rng.normal(0.05, 0.2, count) * before, rng.uniform(0.5, 3, count)


def error(before, now, weights=None):
    """What the rule would be given for the second evaluation, with the first as the reference."""
    paired = PairedRise()
    paired.add(before, weights, reference=None)
    paired.add(now, weights, reference="last")
    return paired.error


@pytest.mark.parametrize("count", [5, 30, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_that_of_the_formula(count, weighted):
    """With and without weights the error is the one that numpy gives from the published formulas."""
    before, now, weights = sample(count)
    weights = weights if weighted else None
    expected = expected_error(before, now, np.ones(count) if weights is None else weights)
    assert error(before, now, weights) == pytest.approx(expected, rel=1e-12)


def test_the_widening_is_that_of_students_t():
    """The factor is half of the two-sided 95.45 % quantile of Student's t, from tables, to a per cent."""
    count = 100_000
    for many, quantile in ((2, 2.869), (5, 2.284), (15, 2.087), (50, 2.026)):
        # the kurtosis is count / many, so the degrees of freedom are 2 many
        parts = torch.cat([torch.ones(many), torch.zeros(count - many)]).double()
        plain = math.sqrt(many * count / (count - 1) + 1)
        assert 2 * standard_error(parts) / plain == pytest.approx(quantile, rel=0.01)


def test_the_error_is_near_that_of_the_bootstrap():
    """For 500 examples without a long tail the error is within a tenth of the bootstrap's."""
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, 500)
    now = before + rng.normal(0.02, 0.1, 500)
    drawn = rng.integers(0, 500, (4000, 500))
    bootstrap = (now - before)[drawn].mean(1).std()
    assert error(before, now) == pytest.approx(bootstrap, rel=0.1)


@pytest.mark.parametrize("count", [30, 100, 1000])
@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda rng, shape: rng.normal(0.1, 1, shape), 0.1),
        (lambda rng, shape: rng.exponential(1, shape), 1.0),
        (lambda rng, shape: rng.standard_t(3, shape), 0.0),
    ],
    ids=["normal", "exponential", "Student's t of 3"],
)
def test_two_standard_errors_cover_the_truth(draw, mean, count):
    """Over 2,000 samples, the mean is within two errors of the truth in 93 % or more, with long tails too."""
    samples = torch.as_tensor(draw(np.random.default_rng(1), (2000, count)))
    zero = torch.zeros(count)
    covered = [
        abs(float(s.mean()) - mean) < 2 * standard_error(influences(s, None) - influences(zero, None)) for s in samples
    ]
    assert np.mean(covered) >= 0.93


def test_pairs_are_more_exact_than_two_samples():
    """In order the error is that of the difference; shuffled, that of two independent samples, which is larger."""
    rng = np.random.default_rng(0)
    before = rng.exponential(1, 1000)
    now = before + rng.normal(0.05, 0.1, 1000)
    two_samples = math.hypot(before.std() / math.sqrt(1000), now.std() / math.sqrt(1000))
    assert error(before, now) < two_samples / 5
    assert error(before, rng.permutation(now)) == pytest.approx(two_samples, rel=0.1)


def test_weights_have_no_scale():
    """Weights times a constant give the same error, and losses times a constant the error times that constant."""
    before, now, weights = sample(50)
    assert error(before, now, 1000 * weights) == pytest.approx(error(before, now, weights), rel=1e-12)
    assert error(1e-6 * before, 1e-6 * now, weights) == pytest.approx(1e-6 * error(before, now, weights), rel=1e-12)


def test_an_example_of_weight_0_does_not_pull():
    """The loss of an example of weight 0 makes no difference."""
    before, now, weights = sample(50)
    weights[7] = 0
    wild = now.copy()
    wild[7] = 1e6
    assert error(before, wild, weights) == error(before, now, weights)


def test_errors_that_are_not_known_are_nan():
    """One example, or a loss that is not finite, gives no error; losses that did not change give 0."""
    assert math.isnan(error([1.0], [2.0]))
    assert math.isnan(error([1.0, 2.0], [2.0, math.inf]))
    assert error([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        (np.ones((2, 2)), None, r"shape \(N,\).*\(2, 2\)"),
        (np.ones(3), np.ones(2), r"\(3,\) and \(2,\)"),
        (np.ones(0), None, "N at least 1"),
    ],
)
def test_wrong_shapes_are_refused(losses, weights, message):
    """Losses of no shape (N,), or with other weights, are refused with both shapes."""
    with pytest.raises(ValueError, match=message):
        OverfittingRule().update(1.0, 1.0, losses=losses, weights=weights)


def test_another_number_of_examples_is_refused():
    """The examples must be the same, so their number can't change; without losses in between, new pairs begin."""
    rule = OverfittingRule()
    rule.update(1.0, 1.0, losses=np.ones(5))
    with pytest.raises(ValueError, match="the same 5 examples as before, got 4"):
        rule.update(1.0, 1.0, losses=np.ones(4))
    rule.update(1.0, 1.0)
    rule.update(1.0, 1.0, losses=np.ones(4))
    assert rule.examples == 4


def examples_of(curve, count, spread, seed=0):
    """Losses of examples whose mean is the curve; their changes differ by ``spread`` from one to the next."""
    rng = np.random.default_rng(seed)
    own = rng.normal(0, 0.1, count)
    noise = rng.normal(0, spread, (len(curve), count)) * np.linspace(0, 1, len(curve))[:, None]
    together = own + noise
    return curve[:, None] + together - together.mean(1, keepdims=True)


def slow_turn(n=60, turn=25, slope=0.001):
    """A training loss that falls, and a validation loss that turns and rises a little."""
    i = np.arange(n)
    return np.linspace(1, 0.2, n), np.where(i < turn, 0.8 - 0.3 * i / turn, 0.5 + slope * (i - turn))


def test_the_error_of_the_rise_is_from_the_reference():
    """The verdict's error is the formula's, between the last evaluation and the one that `reference` names."""
    train, val = slow_turn()
    losses = examples_of(val, 80, 0.5)
    verdict = diagnose(train, val, example_losses=losses)
    expected = expected_error(losses[verdict.reference], losses[-1], np.ones(80))
    assert verdict.rise_se == pytest.approx(expected, rel=1e-12)
    assert verdict.rise == pytest.approx(losses[-1].mean() - losses[verdict.reference].mean())


def test_examples_needed_does_not_depend_on_how_many_there_are():
    """How many examples it takes is a property of the problem: four times the sample says about the same number."""
    train, val = slow_turn()
    few, many = (diagnose(train, val, example_losses=examples_of(val, n, 0.8)).examples_needed for n in (500, 2000))
    assert many > 2000
    assert few == pytest.approx(many, rel=0.15)
    four_times = diagnose(train, val, example_losses=examples_of(val, 2000, 1.6)).examples_needed
    assert four_times == pytest.approx(4 * many, rel=0.15)


def test_a_decided_rise_needs_no_more_examples():
    """Where two standard errors are less than the least rise, or the rise is far above both, nothing is asked for."""
    train, val = slow_turn()
    exact = diagnose(train, val, example_losses=examples_of(val, 500, 0.05))
    assert exact.examples_needed is None
    assert "so few" not in exact.evidence
    clear = diagnose(*slow_turn(slope=0.02), example_losses=examples_of(slow_turn(slope=0.02)[1], 500, 0.8))
    assert (clear.overfitting, clear.examples_needed) == (True, None)
    open_ = diagnose(train, val, example_losses=examples_of(val, 500, 0.8))
    assert f"about {open_.examples_needed:,} are needed to be sure" in open_.evidence
    assert open_.examples_needed == math.ceil(500 * (2 * open_.rise_se / max(open_.rise, 0.04 * minimum())) ** 2)


def minimum():
    """The minimum of its smoothed curve."""
    rule = OverfittingRule()
    train, val = slow_turn()
    for t, v in zip(train, val, strict=True):
        rule.update(t, v)
    return rule._minimum


def test_a_falling_loss_asks_for_no_more_examples():
    """At a new minimum of the smoothed curve there is no rise to be sure of, however few examples there are."""
    val = 1 - 0.01 * np.arange(30)
    verdict = diagnose(val, val, example_losses=examples_of(val, 40, 2.0))
    assert verdict.status == "improving"
    assert verdict.examples_needed is None


@pytest.mark.parametrize("given", [0.0, 0.05, 0.5])
def test_standard_errors_alone_are_those_of_two_samples(given):
    """A standard error of each loss makes the rise's the root of the sum of squares, and raises the threshold."""
    train, val = slow_turn(slope=0.005)
    rule = OverfittingRule()
    for t, v in zip(train, val, strict=True):
        verdict = rule.update(t, v, standard_error=given)
    assert verdict.rise_se == pytest.approx(math.sqrt(2) * given)
    least = 0.04 * min(OverfittingRule.__attrs_attrs__, key=lambda a: a.name != "min_rise").default / 0.04
    minimum = (verdict.threshold**2 - (0.25 * math.sqrt(2) * given) ** 2) ** 0.5 / least
    assert 0.5 < minimum < 0.6  # the smoothed minimum of the curve, which has no noise


def test_a_larger_error_needs_a_larger_rise():
    """The same curve is overfitting on exact losses and not on a small sample."""
    train, val = slow_turn(slope=0.003)
    exact, vague = (diagnose(train, val, example_losses=examples_of(val, 40, s)) for s in (0.01, 4.0))
    assert exact.overfitting
    assert not vague.overfitting
    assert vague.threshold > exact.threshold
    assert vague.examples_needed > 40
    assert diagnose(train, val, example_losses=examples_of(val, 40, 4.0), errors=0).overfitting


def test_state_round_trip_keeps_the_pairs():
    """Going on from a state gives the same verdicts, and holds two vectors, however long the run was."""
    train, val = slow_turn()
    losses = torch.as_tensor(examples_of(val, 30, 0.5))
    whole, first = OverfittingRule(), OverfittingRule()
    expected = [repr(whole.update(t, v, losses=x)) for t, v, x in zip(train, val, losses, strict=True)]
    for t, v, x in zip(train[:40], val[:40], losses[:40], strict=True):
        first.update(t, v, losses=x)
    state = first.state_dict()
    vectors = [x for x in state["paired"].values() if isinstance(x, torch.Tensor)]
    assert [x.numel() for x in vectors] == [30, 30]
    second = OverfittingRule()
    second.load_state_dict(state)
    after = [repr(second.update(t, v, losses=x)) for t, v, x in zip(train[40:], val[40:], losses[40:], strict=True)]
    assert expected[40:] == after


def test_rows_of_example_losses_must_match_the_curve():
    """As many rows as evaluations, or the counts are named."""
    with pytest.raises(ValueError, match="example_losses has 1 rows but val_losses has 2"):
        diagnose([1.0, 0.9], [1.0, 0.9], example_losses=[np.ones(3)])
