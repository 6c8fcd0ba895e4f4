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


def same(one, other):
    """Whether two verdicts are equal to the last digit; figures that are not known yet are NaN in both."""
    return repr(one) == repr(other)


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
    assert verdict.rise == pytest.approx(val[-1] - val[verdict.reference])
    assert verdict.smoothed_rise > verdict.threshold > 0


def test_noise_free_onset_is_the_turn():
    """Without noise the onset is the minimum, to an evaluation: not where the lagging mean turns."""
    train, val = overfit(noise=0.0)
    assert abs(diagnose(train, val).onset - 40) <= 1


def alarms(curve, level, **options):
    """The share of seeds for which the rule fires on this curve, at any evaluation."""
    seeds = range(300 if level else 1)
    return np.mean([diagnose(*curve(100, level, seed), **options).detected is not None for seed in seeds])


@pytest.mark.parametrize("curve", [flat, healthy])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03, 0.05])
def test_curves_without_a_rise_are_seldom_flagged(curve, noise):
    """Of 300 noisy curves without a rise at most 2 % are called overfitting, where noise is up to 5 % of the loss."""
    assert alarms(curve, noise) <= (0.02 if noise else 0)


def test_louder_noise_needs_a_steeper_slope():
    """Of 300 flat curves with noise of 10 % at most 6 % are called overfitting, and none with larger multiples."""
    assert alarms(flat, 0.1) <= 0.06
    assert alarms(flat, 0.1, trend=1.4, noise=2.0) == 0


def test_a_short_run_that_nearly_doubles_its_loss_is_overfitting():
    """A validation loss that goes from .15 to .28 in ten noisy evaluations, of fifteen in all, is found."""
    val = [0.36, 0.17, 0.157, 0.165, 0.15, 0.183, 0.189, 0.232, 0.182, 0.228, 0.227, 0.256, 0.292, 0.254, 0.282]
    verdict = diagnose([0.3 * 0.85**i for i in range(15)], val)
    assert verdict.overfitting
    assert verdict.onset == 4


def test_a_slope_is_told_from_noise_by_its_steadiness():
    """A loss that rises by 1 % per evaluation is seen through noise of 10 %, but seldom if a slope excuses nothing."""

    def rising(seed):
        i = np.arange(100)
        level = 0.5 * (1 + 0.01 * np.maximum(i - 30, 0)) + 0.5 * np.maximum(0, 1 - i / 30) ** 2
        return np.exp(-i / 40), level * (1 + 0.1 * np.random.default_rng(seed).standard_normal(100))

    assert np.mean([diagnose(*rising(seed), noise=2.4).overfitting for seed in range(100)]) > 0.95
    assert np.mean([diagnose(*rising(seed), noise=2.4, trend=1e9).overfitting for seed in range(100)]) < 0.1


def test_a_jump_to_a_higher_level_needs_no_slope():
    """A validation loss that jumps far above its noise and stays there is overfitting, with or without noise."""
    i = np.arange(60)
    for noise in (0.0, 0.02):
        val = np.where(i < 30, 0.5 + 0.5 * np.exp(-i / 5), 0.7) + noise * np.random.default_rng(0).standard_normal(60)
        assert diagnose(np.exp(-i / 20), val).overfitting


def test_a_single_outlier_is_not_a_rise():
    """One loss 20 % above a flat curve with 1 % of noise is seldom taken for overfitting."""
    fooled = []
    for seed in range(100):
        train, val = flat(100, 0.01, seed)
        val[60] += 0.2
        fooled.append(diagnose(train, val).detected is not None)
    assert np.mean(fooled) <= 0.05


def stepped(n, noise, seed):
    """Healthy losses that fall to one floor, and to a lower one after the learning rate drops half-way."""
    rng = np.random.default_rng(seed)
    i = np.arange(n)
    at = n // 2
    floor = np.where(i < at, 0.6 + 0.4 * np.exp(-i / 8), 0.45 + 0.15 * np.exp(-np.maximum(i - at, 0) / 3))
    return 0.8 * floor + 0.002 * rng.standard_normal(n), floor + noise * rng.standard_normal(n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("curve", "noise", "most"),
    [(flat, 0.05, 20), (flat, 0.03, 20), (flat, 0.01, 20), (stepped, 0.05, 20), (stepped, 0.01, 0)],
)
def test_false_alarms_over_a_thousand_seeds(curve, noise, most):
    """Flat noise fires for at most 2 % of 1,000 seeds, and a healthy run with a step in the learning rate for none."""
    assert sum(diagnose(*curve(100, noise, seed)).detected is not None for seed in range(1000)) <= most


def test_a_step_in_the_learning_rate_is_never_flagged():
    """Of 200 healthy runs with a step in the learning rate none is called overfitting."""
    assert not any(diagnose(*stepped(100, 0.01, seed)).detected is not None for seed in range(200))


def test_flat_noise_fools_a_rule_that_ignores_noise():
    """The flat curves above are hard: a rule with the 4 % alone, ignoring noise, fires on most of them."""
    flagged = [diagnose(*flat(200, 0.1, seed), noise=0, errors=0).detected is not None for seed in range(20)]
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
    assert "Both losses have risen" in verdict.evidence


def test_statuses_of_healthy_curves():
    """Few points are a warm-up, a falling loss improves, a flat one is a plateau while training is better."""
    train, val = healthy(300, 0.01, 0)
    seen = [v.status for v in verdicts(train, val)]
    assert seen[:8] == ["warming up"] * 8
    assert set(seen[8:40]) == {"improving"}
    assert set(seen) == {"warming up", "improving", "plateau"}
    assert np.mean([s == "plateau" for s in seen[-100:]]) > 0.9


@pytest.mark.parametrize(
    ("train", "val", "status"),
    [
        (0.9, 0.9, "underfitting"),
        (0.9, 1.2, "plateau"),  # a gap: the model learned what validation does not have
        (0.8, 0.8, "plateau"),  # better than the best constant prediction
    ],
)
def test_flat_losses_without_a_gap_are_underfitting(train, val, status):
    """Two flat losses that are equal and do not beat the baseline are underfitting; else they are a plateau."""
    rng = np.random.default_rng(1)
    i = np.arange(80)
    noise = 0.003 * rng.standard_normal((2, 80))
    start = np.exp(-i / 2.0)
    curves = train + (2 - train) * start + train * noise[0], val + (2 - val) * start + val * noise[1]
    verdict = diagnose(*curves, baseline=0.92)
    assert verdict.status == status
    assert diagnose(*curves).status == "plateau"  # without a baseline there is no reason
    assert ("the model underfits" in verdict.evidence) == (status == "underfitting")


@pytest.mark.parametrize(("train", "says"), [(0.9, True), (0.6, False)])
def test_a_plateau_without_a_gap_says_that_nothing_more_is_learned(train, says):
    """Flat losses without a gap learn nothing more, which is no underfitting; with a gap the evidence does not say so."""
    rng = np.random.default_rng(1)
    verdict = diagnose(train + 0.01 * rng.standard_normal(60), 0.9 + 0.01 * rng.standard_normal(60))
    assert verdict.status == "plateau"
    assert ("no gap between them: nothing more is learned" in verdict.evidence) == says


def test_falling_training_is_not_underfitting():
    """A flat validation loss is a plateau while the training loss above it still falls."""
    rng = np.random.default_rng(0)
    val = 0.9 + 1.1 * np.exp(-np.arange(80) / 2) + 0.005 * rng.standard_normal(80)
    assert diagnose(np.linspace(2, 0.9, 80), val).status == "plateau"


def test_a_large_rise_needs_fewer_evaluations_than_a_small_one():
    """An evaluation far above the threshold counts for 1.9, so that two decide; rises that just exceed it need more."""
    train = np.linspace(1, 0.1, 60)
    for slope, hold in ((0.5, 2), (0.5, 6), (0.008, 2), (0.008, 6)):
        val = np.where(np.arange(60) < 30, 1.0 - 0.01 * np.arange(60), 0.7 + slope * (np.arange(60) - 30))
        seen = verdicts(train, val, hold=hold)
        first = next(i for i, v in enumerate(seen) if v.overfitting)
        counted = [v for v in seen[: first + 1] if v.smoothed_rise > v.threshold]
        total = sum(min(1.9, v.smoothed_rise / v.threshold) for v in counted)
        assert total >= hold
        assert total - min(1.9, counted[-1].smoothed_rise / counted[-1].threshold) < hold
        if slope > 0.1:
            assert len(counted) == math.ceil(hold / 1.9)


@pytest.mark.parametrize("height", [0.4, 0.7, 3.0])
@pytest.mark.parametrize("at", [12, 20, 35])
def test_an_outlier_is_no_rise(height, at):
    """One loss far above a curve that falls smoothly fires nothing, though the smoothed curve carries it along."""
    i = np.arange(50)
    for seed in range(20):
        val = (0.3 + 0.7 * 0.8**i) * (1 + 0.005 * np.random.default_rng(seed).standard_normal(50))
        val[at] = height
        assert diagnose(0.9 * 0.93**i, val).detected is None


def test_negative_losses_that_do_not_fall_have_a_scale():
    """Flat noise about -1 gives no more alarms than a few, and a verdict whose rise is gone is taken back."""
    i = np.arange(100)
    fired = [
        diagnose(1 - i / 200, -1 + 0.01 * np.random.default_rng(seed).standard_normal(100)).detected is not None
        for seed in range(100)
    ]
    assert sum(fired) <= 6
    val = np.concatenate([[-1.0], np.full(12, -1.2), np.full(6, -1.0), np.full(60, -1.2)])
    verdict = diagnose(np.linspace(1, 0.1, len(val)), val)
    assert verdict.detected is not None
    assert not verdict.overfitting


def test_the_evidence_reports_a_rise_that_has_shrunk():
    """Between the limit that withdraws a verdict and the threshold, the evidence claims no significant rise."""
    i = np.arange(200)
    val = np.interp(i, [0, 40, 70, 120], [1.0, 0.6, 0.8, 0.632])
    verdict = diagnose(np.linspace(1, 0.1, 200), val)
    assert verdict.overfitting
    assert verdict.threshold > verdict.smoothed_rise > 0
    assert "has shrunk but not disappeared" in verdict.evidence


@pytest.mark.parametrize("make", [overfit, lambda: flat(100, 0.1, 3), lambda: healthy(100, 0.05, 1)])
def test_verdict_at_each_point_uses_the_past_only(make):
    """Running the rule point by point gives what diagnosing each prefix alone gives, so nothing looks ahead."""
    train, val = make()
    for k, verdict in enumerate(verdicts(train, val), start=1):
        assert same(verdict, diagnose(train[:k], val[:k]))


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


@pytest.mark.parametrize(("end", "overfitting"), [(0.62, False), (0.64, True)])
def test_the_verdict_holds_until_half_of_a_rise_that_counts_is_gone(end, overfitting):
    """After a hump the smoothed loss is 1 % above its minimum, or 5 %: only the latter is overfitting."""
    i = np.arange(200)
    val = np.interp(i, [0, 40, 70, 120], [1.0, 0.6, 0.8, end])
    seen = verdicts(np.linspace(1, 0.1, 200), val)
    assert seen[70].overfitting
    assert seen[-1].overfitting is overfitting
    assert (seen[-1].onset is None) is not overfitting
    assert seen[-1].detected == seen[70].detected


@pytest.mark.parametrize("scale", [100.0, 1e-6, 1e6])
@pytest.mark.parametrize(
    "make", [overfit, lambda: flat(100, 0.03, 3), lambda: flat(100, 0.1, 3), lambda: [c - 0.6 for c in overfit()]]
)
@pytest.mark.parametrize("paired", [False, True])
def test_verdict_does_not_depend_on_the_unit_of_the_loss(make, scale, paired):
    """All losses times a constant give the same verdicts, and figures times that constant."""
    train, val = make()
    spread = np.random.default_rng(1).normal(0, 0.3, (len(val), 50))
    examples = val[:, None] + spread - spread.mean(1, keepdims=True) if paired else [None] * len(val)
    rules = OverfittingRule(), OverfittingRule()
    for t, v, losses in zip(train, val, examples, strict=True):
        one = rules[0].update(t, v, losses=losses)
        other = rules[1].update(scale * t, scale * v, losses=None if losses is None else scale * losses)
        assert facts(one) == facts(other)
        assert one.examples_needed is None or abs(one.examples_needed - other.examples_needed) <= 1  # rounded up
        for figure in ("rise", "rise_se", "smoothed_rise", "threshold", "gap"):
            expected = scale * getattr(one, figure)
            assert getattr(other, figure) == pytest.approx(expected, rel=1e-6, abs=scale * 1e-12, nan_ok=True)


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
    assert diagnose(np.insert(train, at[:3], 0.5), np.insert(val, at[:3], bad)).rise == pytest.approx(clean.rise)
    assert all(math.isfinite(v.smoothed_rise) for v in seen)


def test_all_nan_never_crashes():
    """Curves of NaN only give a verdict that claims nothing."""
    verdict = diagnose([math.nan] * 30, [math.nan] * 30)
    assert facts(verdict) == (False, "diverging", None, None, None)
    assert "NaN" in verdict.evidence


def test_without_a_finite_training_loss_there_is_no_overfitting():
    """A rise alone does not tell overfitting, and the evidence says what is missing."""
    _, val = overfit()
    verdict = diagnose([math.nan] * 120, val)
    assert not verdict.overfitting
    assert "has risen, but there is no finite training loss" in verdict.evidence


def test_a_rise_that_is_not_overfitting_says_why():
    """A rise that is too short, or without a fall in training loss, is explained."""
    val = np.concatenate([np.linspace(1, 0.5, 20), [0.8]])
    assert "not for long enough yet" in diagnose(np.linspace(1, 0.2, 21), val, hold=6).evidence
    train = np.concatenate([np.linspace(1, 0.2, 20), [0.27, 0.27, 0.27]])
    assert "the training loss has not fallen" in diagnose(train, [*val, 0.8, 0.8]).evidence


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
        after = [second.update(t, v) for t, v in zip(train[cut:], val[cut:], strict=True)]
        assert all(same(one, other) for one, other in zip(whole[cut:], after, strict=True))


def test_state_is_a_copy_that_does_not_grow():
    """The state is as large after 5,000 evaluations as after 50, and later updates do not change it."""
    rule = OverfittingRule()
    sizes = []
    for i in range(5000):
        rule.update(1.0, 1.0 + i % 7)
        if i in (49, 4999):
            sizes.append(len(json.dumps(rule.state_dict()).split(",")))
    assert sizes[0] == sizes[1] < 120
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
    """The evidence gives onset, rise and threshold, and says so if there are too few points."""
    train, val = overfit()
    verdict = diagnose(train, val)
    for figure in (
        f"Since evaluation {verdict.onset}",
        f"risen by {verdict.rise:.4g} ± {verdict.rise_se:.2g} (standard error)",
        f"{verdict.smoothed_rise:.4g} (",
        f"the threshold is {verdict.threshold:.3g}.",
        "while the training loss went from",
    ):
        assert figure in verdict.evidence
    few = diagnose(train[:4], val[:4])
    assert few.status == "warming up"
    assert few.threshold == math.inf
    assert "4 finite" in few.evidence
    assert "still falling" in diagnose(*healthy(60, 0.01, 0)).evidence
    assert "and the noise per evaluation 0.0" in diagnose(*healthy(60, 0.01, 0)).evidence
    for v in [verdict, few]:
        assert v.evidence.endswith(".")


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([], [], "empty"),
        ([1.0, 2.0], [1.0], "2 points but val_losses has 1"),
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
        ("errors", -0.1),
        ("noise", -1),
        ("trend", -0.1),
        ("warmup", 3),
        ("span", 0),
        ("hold", 0),
        ("window", 4),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    """An option out of range is refused when the rule is built, with its name."""
    with pytest.raises(ValueError, match=name):
        OverfittingRule(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("span", 2.5), ("hold", True), ("noise", "2"), ("warmup", 8.0)])
def test_options_of_the_wrong_type_are_refused(name, value):
    """An option of the wrong type is refused, and so are unknown and positional ones."""
    with pytest.raises((TypeError, ValueError), match=name):
        diagnose([1.0], [1.0], **{name: value})
    with pytest.raises(TypeError):
        diagnose([1.0], [1.0], patience=3)
    with pytest.raises(TypeError):
        OverfittingRule(0.1)


@pytest.mark.parametrize("first", [1.0, 20.0, 1000.0])
def test_a_large_first_loss_hides_no_rise(first):
    """Inputs that nobody scaled give a first loss of any size; the rise that follows is told as soon."""
    val = [first, 0.7, 0.6, 0.5, *(0.5 + 0.02 * t for t in range(1, 30))]
    verdict = diagnose([0.9**t for t in range(33)], val)
    assert verdict.overfitting
    assert verdict.detected <= 12


@pytest.mark.parametrize("fall", [[2.0, 1.0], np.linspace(2, 0.5, 10).tolist()])
def test_a_flat_loss_is_soon_a_plateau(fall):
    """A fall of long ago does not make a loss that is flat since then an improving one."""
    n = len(fall) + 40
    seen = verdicts([0.95**t for t in range(n)], [*fall, *[0.5] * 40])
    assert all(v.status == "plateau" for v in seen[len(fall) + 10 :])


def test_one_low_loss_takes_no_verdict_back():
    """A clear overfitting with one loss near the old minimum stays one, with its onset."""
    val = np.concatenate([np.linspace(1, 0.6, 13), np.linspace(0.65, 2.4, 40)])
    train = np.linspace(1, 0.1, len(val))
    val[40] = 0.65
    seen = verdicts(train, val)
    assert all(v.overfitting for v in seen[25:])
    assert len({v.onset for v in seen[25:]}) == 1


def calming(seed, shape, n=100):
    """A flat loss whose noise of 5 % calms with the learning rate, beside a falling training loss."""
    i = np.arange(n) / n
    rate = {
        "cosine": (1 + np.cos(np.pi * i)) / 2,
        "one-cycle": np.where(i < 0.3, (1 - np.cos(np.pi * i / 0.3)) / 2, (1 + np.cos(np.pi * (i - 0.3) / 0.7)) / 2),
        "step": np.where(i < 0.5, 1, 0.1),
    }[shape]
    noise = 0.05 * rate * np.random.default_rng(seed).standard_normal(n)
    return np.linspace(1, 0.3, n), 0.7 * (1 + noise)


@pytest.mark.parametrize("shape", ["cosine", "one-cycle", "step"])
def test_noise_that_calms_is_no_rise(shape):
    """A lucky minimum of the noisy part stays luck when the noise calms: at most 3 % of 200 curves fire."""
    assert np.mean([diagnose(*calming(seed, shape)).detected is not None for seed in range(200)]) <= 0.03


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("height", [1.5, 3, 10])
def test_a_spike_changes_no_verdict(height, both):
    """One spike anywhere in a flat curve, or in both curves, makes at most 2 % of 150 overfitting or diverging."""
    told = []
    for seed in range(150):
        train, val = flat(60, 0.05, 1000 + seed)
        at = seed * 60 // 150
        val[at] *= height
        train[at] *= height if both else 1
        verdict = diagnose(train, val)
        told.append(verdict.detected is not None or (verdict.status == "diverging" and at < 59))
    assert np.mean(told) <= 0.02


def test_a_spike_in_both_losses_that_is_gone_is_not_diverging():
    """After a spike in both falling losses, with or without noise, the verdict is that of the curve without it."""
    for noise in (0.0, 0.002):
        i = np.arange(23)
        val = 0.91 - 0.01 * i + noise * np.random.default_rng(0).standard_normal(23)
        train = val.copy()
        val[21], train[21] = 1.6, 1.1
        assert diagnose(train, val).status == "improving"


def small_rise(seed, share, n=100):
    """A loss that falls, turns at 40 % and rises by ``share``, ten times the noise; training falls throughout."""
    i, turn = np.arange(n), 2 * n // 5
    val = 0.5 + 0.5 * np.maximum(0, 1 - i / turn) ** 3 + 0.5 * share * np.clip((i - turn) / (n - 1 - turn), 0, 1)
    return 0.3 + 0.5 * np.exp(-i / 20), val + 0.05 * share * np.random.default_rng(seed).standard_normal(n)


def test_a_clear_rise_is_found_though_small():
    """Of 100 rises between 4.5 and 8 %, each ten times the noise, 90 % or more are found."""
    rises = np.linspace(0.045, 0.08, 100)
    assert np.mean([diagnose(*small_rise(seed, rise)).overfitting for seed, rise in enumerate(rises)]) >= 0.9


def test_a_clear_rise_below_what_matters_is_mentioned():
    """A clear rise of 2.5 % is no overfitting, but the evidence says since when it rises, and what would count."""
    verdict = diagnose(*small_rise(0, 0.025))
    assert verdict.status == "plateau"
    assert f"rising since evaluation {verdict.reference}" in verdict.evidence
    assert "which is less than the 4% that count" in verdict.evidence


def test_three_evaluations_have_an_answer():
    """From the third evaluation on, the evidence names the best, the change since, and what training did."""
    verdict = diagnose([0.6, 0.35, 0.2, 0.1, 0.05], [0.5, 0.42, 0.47, 0.58, 0.71])
    assert verdict.status == "warming up"
    assert "a verdict needs at least 9" in verdict.evidence
    assert "evaluation 1 is the best, with 0.42; since then the validation loss has risen by 69.0%" in verdict.evidence
    assert "the training loss has fallen" in verdict.evidence
    assert "the lowest so far" in diagnose([3, 2, 1], [3, 2, 1]).evidence


def test_examples_make_a_short_run_sure():
    """With the losses of the examples a large rise is overfitting at the fourth evaluation; noise among them is not."""
    train, val = [0.6, 0.35, 0.2, 0.1, 0.05], np.array([0.5, 0.42, 0.47, 0.58, 0.71])
    draw = np.random.default_rng(0)
    own = draw.exponential(1, 400) - 1
    sure = val[:, None] * (1 + 0.1 * own)
    verdict = diagnose(train, sure.mean(1), example_losses=sure)
    assert (verdict.overfitting, verdict.onset, verdict.detected) == (True, 1, 3)
    unsure = val[:, None] + draw.normal(0, 3, (5, 400))
    unsure += (val - unsure.mean(1))[:, None]
    assert not diagnose(train, val, example_losses=unsure).overfitting


def test_after_divergence_no_verdict_is_plateau():
    """Losses far above all that was learned, or above the baseline from the start, are diverging, however noisy."""
    rng = np.random.default_rng(0)
    learned = np.exp(-np.arange(10) / 5)
    gone = 5000 * (1 + rng.uniform(-0.8, 0.8, 20))
    assert diagnose(np.append(learned, gone), np.append(learned, gone)).status == "diverging"
    for learned in (np.array([0.7]), np.array([0.7, 0.6])):  # at once
        curve = np.append(learned, gone)
        assert diagnose(curve, curve).status == "diverging"
    verdict = diagnose(gone, gone, baseline=0.7)
    assert verdict.status in ("diverging", "overfitting")
    flat_high = np.full(20, 5270.0)
    verdict = diagnose(flat_high, flat_high, baseline=0.69)
    assert verdict.status == "diverging"
    assert "7,638 times that of the best constant prediction" in verdict.evidence


def test_large_percentages_are_factors():
    """A loss that has risen 500-fold is said to be that, not 49,900 %."""
    val = [*np.linspace(1, 0.01, 12), *np.full(12, 5.0)]
    evidence = diagnose(np.linspace(1, 0.001, 24), val).evidence
    assert "-fold" in evidence
    assert "00.0%" not in evidence


STEEP = {
    "loss": (
        [0.585, 0.32, 0.165, 0.12, 0.105, 0.083, 0.083, 0.072, 0.065, 0.055, 0.052, 0.05, 0.045],
        [0.43, 0.198, 0.158, 0.162, 0.19, 0.228, 0.22, 0.215, 0.195, 0.26, 0.253, 0.29, 0.291],
    ),
    "cost": (
        [1.088, 0.6, 0.35, 0.28, 0.24, 0.2, 0.18, 0.17, 0.15, 0.13, 0.12, 0.1, 0.087],
        [0.776, 0.32, 0.299, 0.31, 0.33, 0.43, 0.42, 0.36, 0.37, 0.5, 0.44, 0.47, 0.543],
    ),
}


@pytest.mark.parametrize("name", STEEP)
def test_a_steep_start_is_no_noise(name):
    """In a short run the fall of the first evaluations does not hide a rise by four fifths after it."""
    verdict = diagnose(*STEEP[name])
    assert verdict.overfitting
    assert verdict.onset == 2
    falling = [0.2 + 0.8 * 0.6**i for i in range(13)]
    assert not diagnose(falling, [0.3 + loss for loss in falling]).overfitting
