"""The overfitting rule: curves in, verdict out."""

import json
import math

import numpy as np
import pytest

from fitwatch.rules.overfitting import OverfittingRule, Verdict, diagnose


def overfit(n=120, turn=40, noise=0.02, seed=0):
    """Curves whose validation loss falls to .5 at ``turn`` and rises from there; training falls throughout."""
    i = np.arange(n)
    val = np.where(i < turn, 0.5 + 0.5 * (1 - i / turn) ** 2, 0.5 + 0.4 * (i - turn) / turn)
    rng = np.random.default_rng(seed)
    return np.exp(-i / 40) + 0.002 * rng.standard_normal(n), val + noise * rng.standard_normal(n)


def flat(n, noise, seed):
    """A flat noisy validation loss beside a falling training loss."""
    return np.linspace(1, 0.3, n), 1 + noise * np.random.default_rng(seed).standard_normal(n)


def healthy(n, noise, seed):
    """Both losses fall to a floor, validation slower."""
    i = np.arange(n)
    rng = np.random.default_rng(seed)
    return 0.2 + np.exp(-i / 20), 0.4 + np.exp(-i / 25) + noise * rng.standard_normal(n)


def verdicts(train, val, **options):
    """The verdict after every point."""
    rule = OverfittingRule(**options)
    return [rule.update(t, v) for t, v in zip(train, val, strict=True)]


def facts(verdict):
    """All that a verdict decides, without the figures in the unit of the loss."""
    return verdict.overfitting, verdict.status, verdict.onset, verdict.detected, verdict.best


@pytest.mark.parametrize("seed", range(10))
def test_overfit_curve_is_flagged_with_onset_near_its_minimum(seed):
    """A validation loss that turns at evaluation 40 is overfitting, found soon, and said to have turned near there."""
    train, val = overfit(seed=seed)
    verdict = diagnose(train, val)
    assert verdict.overfitting
    assert verdict.status == "overfitting"
    assert abs(verdict.onset - 40) <= 10
    assert verdict.onset < verdict.detected <= 65
    assert verdict.best == int(val.argmin())
    assert verdict.gap == pytest.approx(val[-1] - train[-1])
    assert verdict.rise > verdict.threshold > 0


def test_noise_free_onset_is_the_exact_turn():
    """Without noise the onset is the very minimum, not where the lagging mean turns."""
    train, val = overfit(noise=0.0)
    assert diagnose(train, val).onset == 40


@pytest.mark.parametrize("curve", [flat, healthy])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_curves_without_a_rise_are_seldom_flagged(curve, noise):
    """Over many seeds, at most one noisy curve in eleven without a rise is called overfitting."""
    flagged = [diagnose(*curve(n, noise, seed)).detected is not None for n in (40, 100, 200) for seed in range(60)]
    assert np.mean(flagged) <= (0.09 if noise else 0)


def test_flat_noise_fools_a_rule_that_ignores_noise():
    """The flat curves above are no easy case: a rule that only looks at the 6 % rise, not at the noise, fires on most."""
    flagged = [diagnose(*flat(200, 0.1, seed), noise=0).overfitting for seed in range(20)]
    assert np.mean(flagged) > 0.8


def test_learning_rate_decay_is_not_overfitting():
    """A step down of both losses, and a hump that training shares, are not overfitting."""
    rng = np.random.default_rng(0)
    i = np.arange(150)
    step = np.where(i < 50, 1.0, np.where(i < 100, 0.6, 0.4))
    train, val = step * 0.9 + 0.01 * rng.standard_normal(150), step + 0.03 * rng.standard_normal(150)
    assert diagnose(train, val).detected is None
    hump = 0.5 + 0.3 * np.exp(-(((i - 75) / 15) ** 2))
    assert diagnose(hump * 0.9, hump).detected is None


def test_rise_of_both_losses_is_diverging():
    """If training rises with validation, the status says so, and it isn't overfitting."""
    i = np.arange(80)
    val = np.where(i < 40, 1 - i / 80, 0.5 + (i - 40) / 40)
    verdict = diagnose(val * 0.9, val)
    assert (verdict.overfitting, verdict.status) == (False, "diverging")
    assert "did not fall" in verdict.evidence


def test_statuses_of_healthy_curves():
    """Few points are a warm-up, a falling loss improves, a flat one is a plateau."""
    train, val = healthy(300, 0.01, 0)
    seen = [v.status for v in verdicts(train, val)]
    assert seen[:5] == ["warming up"] * 5
    assert set(seen[5:40]) == {"improving"}
    assert set(seen) == {"warming up", "improving", "plateau"}
    assert np.mean([s == "plateau" for s in seen[-100:]]) > 0.9


@pytest.mark.parametrize("make", [overfit, lambda: flat(100, 0.1, 3), lambda: healthy(100, 0.05, 1)])
def test_verdict_at_each_point_uses_the_past_only(make):
    """Running the rule point by point gives what diagnosing each prefix alone gives, so nothing looks ahead."""
    train, val = make()
    for k, verdict in enumerate(verdicts(train, val), start=1):
        assert verdict == diagnose(train[:k], val[:k])


def test_first_firing_stays_and_so_does_the_verdict_while_the_rise_lasts():
    """From its first firing on, the rule names that evaluation, and while validation keeps rising it says overfitting."""
    seen = verdicts(*overfit())
    first = next(i for i, v in enumerate(seen) if v.overfitting)
    assert all(v.detected is None and v.onset is None for v in seen[:first])
    assert {v.detected for v in seen[first:]} == {first}
    assert all(v.overfitting for v in seen[first:])


def test_the_verdict_is_taken_back_after_a_clear_new_minimum():
    """A later, clearly lower minimum ends the verdict, but not the record of its first firing."""
    i = np.arange(160)
    val = np.interp(i, [0, 40, 70, 159], [1.0, 0.6, 0.8, 0.3])
    train = np.linspace(1, 0.1, 160)
    before, after = diagnose(train[:70], val[:70]), diagnose(train, val)
    assert (before.overfitting, before.status) == (True, "overfitting")
    assert (after.overfitting, after.status, after.onset) == (False, "improving", None)
    assert after.detected == before.detected < 70


@pytest.mark.parametrize("scale", [100.0, 1e-6, 1e6])
@pytest.mark.parametrize("make", [overfit, lambda: flat(100, 0.1, 3), lambda: [c - 0.6 for c in overfit()]])
def test_verdict_does_not_depend_on_the_unit_of_the_loss(make, scale):
    """Both losses times a constant give the same verdicts, and figures times that constant."""
    train, val = make()
    for one, other in zip(verdicts(train, val), verdicts(scale * train, scale * val), strict=True):
        assert facts(one) == facts(other)
        assert other.rise == pytest.approx(scale * one.rise, rel=1e-6, abs=scale * 1e-12)
        assert other.threshold == pytest.approx(scale * one.threshold, rel=1e-6)


def test_negative_losses_are_judged_wherever_their_zero_lies():
    """A likelihood loss, negative at its end, gives one verdict however far it is shifted."""
    train, val = overfit()
    shifted = [diagnose(train - shift, val - shift) for shift in (1, 10, 1000)]
    assert all(v.overfitting for v in shifted)
    assert len({(v.onset, v.detected, v.best) for v in shifted}) == 1
    train, val = healthy(100, 0.02, 0)
    assert not any(diagnose(train - shift, val - shift).overfitting for shift in (1, 10, 1000))


def test_rise_close_to_zero_is_negligible():
    """A loss that fell to 1e-7 and rose to 1e-5 has multiplied, but lost nothing of what was learnt."""
    val = np.interp(np.arange(100), [0, 20, 99], [2.3, 1e-7, 1e-5])
    verdict = diagnose(np.linspace(2, 0, 100), val)
    assert not verdict.overfitting


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_validation_loss_is_diverging_and_leaves_no_trace(bad):
    """A non-finite loss is reported, is never the best, and does not disturb what is judged afterwards."""
    train, val = overfit()
    at = [0, 20, 41, 119]
    seen = verdicts(np.insert(train, at, 0.5), np.insert(val, at, bad))
    assert [i for i, v in enumerate(seen) if v.status == "diverging"] == [0, 21, 43, 122]
    assert seen[0].best is None
    assert not math.isfinite(seen[0].gap)
    clean = diagnose(train, val)
    assert seen[-1].overfitting
    # 3 points were inserted before the turn's end or the detection
    assert seen[-1].detected == clean.detected + 3
    assert seen[-1].rise == pytest.approx(clean.rise, rel=0.05)
    assert all(math.isfinite(seen[i].rise) for i in range(len(seen)))


def test_all_nan_never_crashes():
    """Curves of NaN only give a verdict that claims nothing."""
    verdict = diagnose([math.nan] * 30, [math.nan] * 30)
    assert facts(verdict) == (False, "diverging", None, None, None)
    assert "nan" in verdict.evidence


def test_without_a_finite_training_loss_there_is_no_overfitting():
    """A rise alone does not tell overfitting, and the evidence says what is missing."""
    _, val = overfit()
    verdict = diagnose([math.nan] * 120, val)
    assert not verdict.overfitting
    assert "no finite training loss" in verdict.evidence


def test_huge_losses_never_crash():
    """Losses at the edge of floating point give a verdict, not an error."""
    rng = np.random.default_rng(0)
    val = 1.7e308 * rng.choice([-1.0, 1.0], 60)
    assert isinstance(diagnose(val, val), Verdict)


def test_state_round_trip_continues_as_if_never_interrupted():
    """Stopping anywhere and going on from the saved state gives the same verdicts, evidence included."""
    train, val = overfit()
    whole = verdicts(train, val)
    for cut in (0, 3, 30, 55, 100):
        first = OverfittingRule()
        for t, v in zip(train[:cut], val[:cut], strict=True):
            first.update(t, v)
        second = OverfittingRule()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.update(t, v) for t, v in zip(train[cut:], val[cut:], strict=True)] == whole[cut:]


def test_state_is_a_copy_that_does_not_grow():
    """The state is as large after 2000 evaluations as after 100, and later updates do not change it."""
    rule = OverfittingRule()
    sizes = []
    for i in range(2000):
        rule.update(1.0, 1.0 + i % 7)
        sizes.append(len(json.dumps(rule.state_dict()["recent"]).split(",")))
    assert sizes[-1] == sizes[100]
    state = rule.state_dict()
    before = json.dumps(state)
    rule.update(1.0, 0.5)
    assert json.dumps(state) == before


def test_foreign_state_is_refused_with_its_keys():
    """A state with other keys is refused and the keys are named."""
    state = OverfittingRule().state_dict()
    state["surprise"] = state.pop("best")
    with pytest.raises(ValueError, match=r"best.*surprise"):
        OverfittingRule().load_state_dict(state)


def test_evidence_carries_the_figures():
    """The sentence says since when, by how much and against what, and is honest before there are enough points."""
    train, val = overfit()
    verdict = diagnose(train, val)
    for figure in (f"evaluation {verdict.onset}", f"{verdict.rise:.4g}", f"{verdict.threshold:.4g}", "noise", "fell"):
        assert figure in verdict.evidence
    few = diagnose(train[:4], val[:4])
    assert few.status == "warming up"
    assert few.threshold == math.inf
    assert "4 finite" in few.evidence
    assert "No rise" in diagnose(*healthy(60, 0.01, 0)).evidence
    for v in [verdict, few]:
        assert v.evidence.endswith(".")


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([], [], "empty"),
        ([1.0, 2.0], [1.0], "2 points and val_losses 1"),
        ([1.0, "2.0"], [1.0, 2.0], r"train_losses\[1\] must be a number, not '2.0'"),
        ([1.0], [None], r"val_losses\[0\] must be a number"),
        ([1.0], [10**400], r"val_losses\[0\] must be a number"),
        (3.0, [1.0], "train_losses must be a sequence"),
    ],
)
def test_curves_that_are_none_are_refused(train, val, message):
    """Empty, uneven or non-numeric curves raise an error that says which and where."""
    with pytest.raises(ValueError, match=message):
        diagnose(train, val)


def test_curves_may_be_any_sequence_of_numbers():
    """Lists, tuples, ints and numpy arrays of float32 are all curves."""
    val = [4, 3, 2, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    train = tuple(range(14, 0, -1))
    expected = diagnose([float(t) for t in train], [float(v) for v in val])
    assert expected.overfitting
    assert diagnose(train, val) == expected
    assert diagnose(np.array(train, np.float32), np.array(val, np.float32)) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_rise", 0),
        ("min_rise", math.inf),
        ("min_rise", math.nan),
        ("noise", -1),
        ("span", 0),
        ("hold", 0),
        ("window", 4),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    """An option out of range is refused when the rule is built, with its name."""
    with pytest.raises(ValueError, match=name):
        OverfittingRule(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("span", 2.5), ("hold", True), ("noise", "2")])
def test_options_of_the_wrong_type_are_refused(name, value):
    """An option of the wrong type is refused, and so are unknown and positional ones."""
    with pytest.raises((TypeError, ValueError), match=name):
        diagnose([1.0], [1.0], **{name: value})
    with pytest.raises(TypeError):
        diagnose([1.0], [1.0], patience=3)
    with pytest.raises(TypeError):
        OverfittingRule(0.1)
