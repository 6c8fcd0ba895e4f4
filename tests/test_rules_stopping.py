"""Patience: when to stop."""

import json
import math

import numpy as np
import pytest

from fitwatch.rules import Patience, StopReason

NAN, INF = math.nan, math.inf


def stops_at(values, *, warm_up=0, errors=None, **options):
    """Index of the evaluation that stops, or None; the first `warm_up` ones are the warm-up."""
    rule = Patience(**options)
    errors = errors or [None] * len(values)
    stops = [
        rule.update(v, standard_error=e, warm_up=i < warm_up)
        for i, (v, e) in enumerate(zip(values, errors, strict=True))
    ]
    return stops.index(True) if True in stops else None


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 2, 2, 2, 2], {"patience": 3}, 4),  # the third in a row, as in Keras and Lightning
        ([3, 2, 2, 2, 1, 1, 1, 1], {"patience": 3}, 7),
        ([3, 2, 1, 0], {"patience": 1}, None),
        ([1, 1], {"patience": 1}, 1),
        ([1, 2, 3, 3, 3], {"patience": 2, "mode": "max"}, 4),
        ([1, 0.95, 0.9, 0.85, 0.8, 0.75], {"patience": 3, "min_delta": 0.08}, None),  # small gains add up
        ([1, 0.99, 0.98, 0.97], {"patience": 3, "min_delta": 0.08}, 3),
        ([1, 0.5, 0.5], {"patience": 1, "min_delta": 0.5}, 1),  # must exceed, not equal
        # relative, also for negative values, where best * (1 - delta) points the wrong way
        ([-100, -105, -108, -109], {"patience": 3, "min_delta": 0.1, "relative": True}, 3),
        ([-100, -111, -123, -136, -150], {"patience": 1, "min_delta": 0.1, "relative": True}, None),
        ([-100, -95, -85, -75], {"patience": 1, "min_delta": 0.1, "relative": True, "mode": "max"}, 1),
        ([-100, -89, -80, -71], {"patience": 1, "min_delta": 0.1, "relative": True, "mode": "max"}, None),
        ([0, -1e-9, -1], {"patience": 1, "min_delta": 0.1, "relative": True}, None),
        # NaN
        ([NAN, 3, 2, 1, 0], {"patience": 2}, None),  # Keras and others get stuck on a first NaN
        ([NAN] * 5, {"patience": 3}, 2),
        ([3, 2, NAN, NAN, NAN, NAN], {"patience": 3}, 4),  # Ignite never stops
        ([3, 2, NAN, 1, NAN, 0.5], {"patience": 2}, None),
        ([3, 2, -INF, 1, 0], {"patience": 2}, None),
        ([3, INF, INF], {"patience": 2, "mode": "max"}, 2),
        # warm-up
        ([1, 2, 2, 2, 2, 2], {"patience": 2, "warm_up": 3}, 4),
        ([1, 2, 3], {"patience": 2, "warm_up": 1}, 2),
        ([NAN] * 6, {"patience": 2, "warm_up": 2}, 3),
        ([5, 1, 2, 2, 2], {"patience": 1, "warm_up": 2}, 2),  # what warm-up reached must be improved on
        (
            [NAN, 9, 0, 9, 3],
            {"patience": 9, "warm_up": 3, "check_finite": True, "stopping_threshold": 1, "divergence_threshold": 5},
            3,
        ),  # nothing stops a warm-up
        # gains at once, as Ignite counts them: over the best value, not over the last improvement
        ([1, 0.95, 0.9, 0.85, 0.8, 0.75], {"patience": 3, "min_delta": 0.08, "cumulative": False}, 3),
        ([1, 0.95, 0.86, 0.85, 0.84], {"patience": 2, "min_delta": 0.08, "cumulative": False}, 4),
        ([1, 0.95, 1.2, 0.9, 0.88], {"patience": 4, "min_delta": 0.08, "cumulative": False}, 4),
        ([1, 1.05, 1.1, 1.15], {"patience": 3, "min_delta": 0.08, "cumulative": False, "mode": "max"}, 3),
        # smoothing: means of three are 4, 3, 3, 2, 7/3, 2, 5/3
        ([4, 2, 3, 1, 3, 2, 0], {"patience": 2, "window": 3}, 5),
        ([4, 2, 3, 1, 3, 2, 0], {"patience": 3, "window": 3}, None),
        ([4, NAN, 2, 3, 1, 3, 2, 0], {"patience": 2, "window": 3}, 6),  # a NaN is not in the mean
        # a baseline must be beaten before anything counts as improvement
        ([5, 4, 3, 2], {"patience": 3, "baseline": 2.5}, 2),
        ([5, 4, 2, 3, 3, 3], {"patience": 3, "baseline": 2.5}, 5),
        ([5, 4, 2.4, 3], {"patience": 3, "baseline": 2.5, "min_delta": 0.2}, 2),
        ([0.1, 0.3, 0.4], {"patience": 2, "baseline": 0.5, "mode": "max"}, 1),
        # thresholds: the target is reached at equality, and is no limit for infinities
        ([3, 2, 1, 0], {"patience": 9, "stopping_threshold": 1.0}, 2),
        ([0.5, 1.0], {"patience": 9, "stopping_threshold": 1.0, "mode": "max"}, 1),
        ([3, -INF, 2], {"patience": 9, "stopping_threshold": 1.0}, None),
        ([3, 5, 5.1], {"patience": 9, "divergence_threshold": 5}, 2),
        ([3, INF], {"patience": 9, "divergence_threshold": 5}, 1),
        ([3, 1, 0.9], {"patience": 9, "divergence_threshold": 1, "mode": "max"}, 2),
        ([3, NAN, 2], {"patience": 9, "divergence_threshold": 5}, None),
        # the first value that is not finite
        ([3, 2, NAN, 1], {"patience": 9, "check_finite": True}, 2),
        ([3, -INF], {"patience": 9, "check_finite": True}, 1),
        ([NAN, 1], {"patience": 9, "check_finite": True}, 0),
    ],
)
def test_stop_comes_at_the_expected_evaluation(values, options, expected):
    """Each option alone, with the evaluation counted out by hand."""
    assert stops_at(values, **options) == expected


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [1, 3, 8])
def test_stop_agrees_with_a_search_over_the_whole_sequence(mode, patience):
    """With min_delta 0, it stops at the first point whose last `patience` values do not beat the best before them."""
    for seed in range(30):
        values = np.random.default_rng(seed).standard_normal(60).round(1)
        x = values if mode == "min" else -values
        ends = (i for i in range(patience, 60) if x[i - patience + 1 : i + 1].min() >= x[: i - patience + 1].min())
        assert stops_at(values, patience=patience, mode=mode) == next(ends, None)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_strict_best_is_kept_apart_from_the_reference(mode):
    """A gain below min_delta resets no wait, but it is the best all the same."""
    sign = 1 if mode == "min" else -1
    rule = Patience(patience=5, min_delta=0.1, mode=mode)
    for value in (1.0, 0.95, NAN, 0.92, 0.97):
        rule.update(sign * value)
    assert (rule.best, rule.wait, rule.evaluations) == (sign * 0.92, 4, 5)


def test_best_is_tracked_during_warm_up_and_never_non_finite():
    """The warm-up counts no waiting, but what it reached is the best; no NaN or infinity ever is."""
    rule = Patience(patience=1)
    assert [rule.update(v, warm_up=True) for v in (NAN, 0.5, -INF, 2.0)] == [False] * 4
    assert (rule.best, rule.wait) == (0.5, 0)
    nothing = Patience(patience=2, mode="max")
    nothing.update(INF)
    assert nothing.best is None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_min_delta_in_standard_errors(mode):
    """A gain counts if it is more than k times the standard error of the new value: 0.1, then 0.3, then 0.1 again."""
    sign = 1 if mode == "min" else -1
    values = [sign * v for v in (1.0, 0.85, 0.6, 0.5, 0.39)]
    errors = [0.1, 0.1, 0.3, 0.1, 0.1]

    def wait(min_delta):
        rule, waits = Patience(patience=9, min_delta=min_delta, mode=mode), []
        for value, error in zip(values, errors, strict=True):
            rule.update(value, standard_error=error)
            waits.append(rule.wait)
        return waits

    assert wait("1se") == [0, 0, 1, 0, 0]
    assert wait("2se") == [0, 1, 2, 0, 1]
    assert wait("1.2se") == [0, 0, 1, 0, 1]
    assert wait(".5se") == [0, 0, 0, 0, 0]


def test_standard_errors_of_a_flat_noisy_curve():
    """On 500 curves that are flat but for noise, "1se" and "2se" stop where a search by the definition says."""
    rng = np.random.default_rng(0)
    for k in (1, 2):
        for _ in range(250):
            values, errors = 1 + 0.1 * rng.standard_normal(40), rng.uniform(0.01, 0.2, 40)
            reference, wait, expected = None, 0, None
            for i, (value, error) in enumerate(zip(values, errors, strict=True)):
                if reference is None or reference - value > k * error:
                    reference, wait = value, 0
                else:
                    wait += 1
                if wait == 8:
                    expected = i
                    break
            assert stops_at(values, errors=list(errors), patience=8, min_delta=f"{k}se") == expected


def test_a_standard_error_that_is_missing_or_nan():
    """Without a standard error the rule refuses the value; a later one of NaN makes no improvement."""
    with pytest.raises(ValueError, match="min_delta='1se' needs the standard_error of each value, got None"):
        Patience(patience=1, min_delta="1se").update(1.0)
    assert stops_at([1, 0], errors=[0.1, NAN], patience=1, min_delta="1se") == 1


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("window", [2, 5])
def test_smoothing_is_patience_on_the_running_mean(mode, window):
    """With a window it stops where plain patience stops on the running means, and the best stays that of single values."""
    for seed in range(20):
        values = np.random.default_rng(seed).standard_normal(60)
        means = [values[max(0, i - window + 1) : i + 1].mean() for i in range(60)]
        options = {"patience": 6, "mode": mode, "min_delta": 0.05}
        assert stops_at(values, window=window, **options) == stops_at(means, **options)
        rule = Patience(window=window, **options)
        for value in values:
            rule.update(value)
        assert rule.best == (min if mode == "min" else max)(values)


def test_cumulative_or_at_once():
    """Gains of 0.05 against a min_delta of 0.08: every second one is an improvement where they add up, none at once."""
    values = [1 - 0.05 * i for i in range(9)]
    waits = {}
    for cumulative in (True, False):
        rule = Patience(patience=99, min_delta=0.08, cumulative=cumulative)
        waits[cumulative] = [rule.update(v) or rule.wait for v in values]
    assert waits == {True: [0, 1, 0, 1, 0, 1, 0, 1, 0], False: [0, 1, 2, 3, 4, 5, 6, 7, 8]}


PATIENCE, THRESHOLD, DIVERGED, NOT_FINITE, _ = StopReason


@pytest.mark.parametrize(
    ("values", "options", "reason", "sentence"),
    [
        ([0.7334] + [0.733] * 10, {"patience": 10, "min_delta": 0.001}, PATIENCE,
         "no improvement over 0.7334 by more than 0.001 in 10 evaluations"),
        ([2.0, 2.0], {"patience": 1}, PATIENCE, "no improvement over 2 in 1 evaluation"),
        ([2.0, 2.0, 2.0], {"patience": 2, "min_delta": 0.01, "relative": True}, PATIENCE,
         "no improvement over 2 by more than 1% in 2 evaluations"),
        ([2.0, 1.9], {"patience": 1, "min_delta": 0.5, "cumulative": False, "window": 2}, PATIENCE,
         "no single improvement over 1.95 (mean of 2) by more than 0.5 in 1 evaluation"),
        ([2.0, 1.9], {"patience": 1, "min_delta": "1se"}, PATIENCE,
         "no improvement over 2 by more than 0.25 (1 standard error) in 1 evaluation"),
        ([2.0, 1.9], {"patience": 1, "min_delta": "1.5se"}, PATIENCE,
         "no improvement over 2 by more than 0.375 (1.5 standard errors) in 1 evaluation"),
        ([2.0, 1.9], {"patience": 2, "baseline": 1.5}, PATIENCE, "no improvement over 1.5 in 2 evaluations"),
        ([NAN] * 3, {"patience": 3}, PATIENCE, "no finite value in 3 evaluations"),
        ([2.0, 0.9], {"patience": 3, "stopping_threshold": 1}, THRESHOLD, "0.9 has reached the threshold of 1"),
        ([2.0, 9.0], {"patience": 3, "divergence_threshold": 5.0}, DIVERGED,
         "9 is worse than the divergence threshold of 5"),
        ([2.0, NAN], {"patience": 1, "check_finite": True}, NOT_FINITE, "the value is nan at evaluation 2"),
    ],
)  # fmt: skip
def test_reason_and_sentence_give_the_figures(values, options, reason, sentence):
    """Reason and sentence are set at the stop, with the figures, and not before."""
    rule = Patience(**options)
    for value in values[:-1]:
        assert not rule.update(value, standard_error=0.25)
        assert (rule.reason, rule.sentence) == (None, None)
    assert rule.update(values[-1], standard_error=0.25)
    assert (rule.reason, rule.sentence) == (reason, sentence)


def test_it_keeps_stopping_until_there_is_an_improvement():
    """Further evaluations stop again until the value improves; then the reason is cleared."""
    rule = Patience(patience=1)
    assert [rule.update(v) for v in (1, 2, 2, 0.5)] == [False, True, True, False]
    assert rule.reason is None


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        ({"patience": 4, "min_delta": 0.1}, 5),
        ({"patience": 4, "window": 3, "cumulative": False, "min_delta": 0.3}, 8),
        ({"patience": 3, "baseline": 1.0}, 2),
        ({"patience": 9, "check_finite": True}, 2),
    ],
    ids=str,
)
def test_state_round_trip_keeps_the_counter(options, stop):
    """Interrupted anywhere, it stops at the same evaluation as if never interrupted, for the same reason."""
    values = [3.0, 2.0, NAN, 2.5, 1.95, 1.97, 2.2, 2.1, 2.3]
    whole = Patience(**options)
    expected = [(whole.update(v), whole.best, whole.wait, whole.reason, whole.sentence) for v in values]
    assert [stop for stop, *_ in expected].index(True) == stop
    for cut in range(len(values)):
        first, second = Patience(**options), Patience(**options)
        for v in values[:cut]:
            first.update(v)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        again = [(second.update(v), second.best, second.wait, second.reason, second.sentence) for v in values[cut:]]
        assert again == expected[cut:]


def test_reset_forgets_everything():
    """After a reset the rule equals a new one: no best, no counter, no reason, no reference."""
    options = {"patience": 1, "window": 2, "baseline": 9.0, "mode": "min"}
    rule = Patience(**options)
    rule.update(1.0)
    rule.update(2.0)
    assert rule != Patience(**options)
    rule.reset()
    assert rule == Patience(**options)
    assert not rule.update(5.0)
    assert rule.best == 5.0


def test_foreign_state_is_refused_with_its_keys():
    """A state with other keys is refused and the keys are named."""
    state = Patience(patience=1).state_dict() | {"surprise": 1}
    del state["evaluations"]
    with pytest.raises(ValueError, match=r"not a state of Patience: .*'evaluations', 'surprise'"):
        Patience(patience=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"patience": 0}, "patience"),
        ({"patience": 3, "min_delta": -0.1}, "min_delta"),
        ({"patience": 3, "min_delta": NAN}, "min_delta"),
        ({"patience": 3, "window": 0}, "window"),
        ({"patience": 3, "baseline": INF}, "baseline must be finite"),
        ({"patience": 3, "stopping_threshold": NAN}, "stopping_threshold"),
        ({"patience": 3, "divergence_threshold": NAN}, "divergence_threshold"),
        ({"patience": 3, "stopping_threshold": 2, "divergence_threshold": 2}, "better than divergence_threshold"),
        ({"patience": 3, "stopping_threshold": 1, "divergence_threshold": 2, "mode": "max"}, "stopping_threshold"),
        ({"patience": 3, "min_delta": "1sd"}, "min_delta must be .* like \"1se\", got '1sd'"),
        ({"patience": 3, "min_delta": "se"}, "min_delta"),
        ({"patience": 3, "min_delta": "-1se"}, "min_delta"),
        ({"patience": 3, "min_delta": "0se"}, "min_delta"),
        ({"patience": 3, "min_delta": "1se", "relative": True}, "relative"),
        ({"patience": 3, "mode": "auto"}, "mode"),
    ],
)
def test_options_out_of_range_are_refused(options, name):
    """An option out of range is refused when the rule is built, with its name."""
    with pytest.raises(ValueError, match=name):
        Patience(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"patience": 2.0}, "patience"),
        ({"patience": 1, "relative": "no"}, "relative"),
        ({"patience": 1, "cumulative": 1}, "cumulative"),
        ({"patience": 1, "check_finite": None}, "check_finite"),
        ({"patience": 1, "baseline": "auto"}, "baseline"),
        ({"patience": 1, "min_delta": None}, "min_delta"),
        ({}, "patience"),
    ],
)
def test_options_of_the_wrong_type_are_refused(options, name):
    """An option of the wrong type, or a missing patience, is refused; positional ones are too."""
    with pytest.raises(TypeError, match=name):
        Patience(**options)
    with pytest.raises(TypeError):
        Patience(3)
