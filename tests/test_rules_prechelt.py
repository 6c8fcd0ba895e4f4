"""Prechelt's rules GL, PQ and UP, against the formulas of the paper."""

import json
import math

import numpy as np
import pytest

import fitwatch as fw

NAN, INF = math.nan, math.inf


def curves(seed):
    """A training loss that falls, and a validation loss that falls and then may rise, both noisy."""
    rng = np.random.default_rng(seed)
    t = np.arange(80)
    noise = 1 + rng.uniform(0.005, 0.05) * rng.standard_normal((2, 80))
    train = (0.05 + 0.9 ** (t * rng.uniform(0.3, 1))) * noise[0]
    val = (
        0.4 + 0.9 ** (t * rng.uniform(0.5, 2)) + rng.uniform(0, 0.01) * np.maximum(0, t - rng.integers(10, 60))
    ) * noise[1]
    return train, val


def gl(val, t):
    """100 (E(t) / min E - 1), the minimum over the epochs 1 to t."""
    return 100 * (val[t - 1] / min(val[:t]) - 1)


def gl_stops(train, val, alpha):
    return next((t for t in range(1, len(val) + 1) if gl(val, t) > alpha), None)


def pq_stops(train, val, alpha, k):
    def p(t):
        return 1000 * (sum(train[t - k : t]) / (k * min(train[t - k : t])) - 1)

    return next((t for t in range(k, len(val) + 1, k) if gl(val, t) / p(t) > alpha), None)


def up_stops(train, val, s, k):
    """UP_1 stops after an end-of-strip t with E(t) > E(t - k); UP_s if UP_{s-1} does at t - k, and E(t) > E(t - k)."""

    def up(s, t):
        return s == 0 or (t - k >= k and val[t - 1] > val[t - k - 1] and up(s - 1, t - k))

    return next((t for t in range(k, len(val) + 1, k) if up(s, t)), None)


def stops(rule, train, val):
    """The epoch, from 1, after which the rule stops."""
    return next((t for t, (a, b) in enumerate(zip(train, val, strict=True), 1) if rule.update(b, train_loss=a)), None)


RULES = [
    *((fw.rules.GL(alpha), gl_stops, (alpha,)) for alpha in (1, 3, 5, 20)),
    *((fw.rules.PQ(alpha, k=k), pq_stops, (alpha, k)) for alpha in (0.1, 0.5, 2) for k in (3, 5)),
    *((fw.rules.UP(s, k=k), up_stops, (s, k)) for s in (1, 2, 4) for k in (1, 3, 5)),
]


@pytest.mark.parametrize(("rule", "reference", "options"), RULES, ids=[repr(rule) for rule, *_ in RULES])
def test_the_rules_stop_where_the_formulas_do(rule, reference, options):
    """On 60 pairs of curves each rule stops at the epoch given by the formula; some curves never stop."""
    expected, actual = [], []
    for seed in range(60):
        train, val = curves(seed)
        rule.reset()
        expected.append(reference(train, val, *options))
        actual.append(stops(rule, train, val))
        assert rule.best == val[: actual[-1]].min()
    assert expected == actual
    assert any(expected)
    assert len(set(expected)) > 3


@pytest.mark.parametrize(
    ("rule", "train", "val", "sentence"),
    [
        (fw.rules.GL(5), [1, 1, 1], [0.5, 0.52, 0.55], "10% above the minimum of 0.5 (5% allowed)"),
        (
            fw.rules.PQ(1, k=2),
            [1.0, 1.0, 0.5, 0.502],
            [0.5, 0.5, 0.6, 0.55],
            "10% above the minimum of 0.5 with a training progress of 2 per mille: the quotient 5 exceeds 1",
        ),
        (fw.rules.UP(2, k=1), [1, 1, 1], [0.5, 0.6, 0.7], "risen to 0.7 over 2 consecutive strips of 1 evaluation"),
    ],
    ids=repr,
)
def test_reason_and_sentence(rule, train, val, sentence):
    """The reason is RISEN, and the sentence has the figures; neither is there before."""
    for a, b in zip(train[:-1], val[:-1], strict=True):
        assert not rule.update(b, train_loss=a)
        assert (rule.reason, rule.sentence) == (None, None)
    assert rule.update(val[-1], train_loss=train[-1])
    assert (rule.reason, rule.sentence) == (fw.rules.StopReason.RISEN, sentence)


def test_limits_where_a_formula_divides_by_zero():
    """Any rise above a minimum of 0 is infinite; PQ without progress stops at any rise; with infinite progress never."""
    assert stops(fw.rules.GL(5), [1, 1, 1], [0.0, 0.0, 1e-9]) == 3
    assert stops(fw.rules.PQ(0.5, k=2), [0.1] * 4, [1, 1, 1, 1]) is None
    assert stops(fw.rules.PQ(0.5, k=2), [0.1] * 4, [1, 1, 1, 1.001]) == 4
    assert (
        stops(fw.rules.PQ(0.5, k=3), [0.173] * 3, [1, 1, 1.001]) == 3
    )  # the mean of these is rounded to less than 0.173
    assert stops(fw.rules.PQ(0.5, k=2), [0.0, 0.1, 0.0, 0.1], [1, 1, 1, 5]) is None
    assert stops(fw.rules.PQ(0.5, k=2), [0.0] * 4, [1, 1, 1, 5]) == 4


def test_thresholds_must_be_exceeded():
    """A loss of exactly alpha percent above the minimum does not stop GL, nor a flat curve UP."""
    assert stops(fw.rules.GL(50), [1] * 3, [1, 1.5, 1.5]) is None
    assert stops(fw.rules.UP(1, k=1), [1] * 3, [1, 1, 1]) is None


@pytest.mark.parametrize("rule", [fw.rules.GL(5), fw.rules.PQ(1), fw.rules.UP(2)], ids=repr)
def test_a_value_that_is_not_finite_stops_at_once(rule):
    """All three rules stop at a non-finite value, and never take it as the best."""
    for value in (NAN, INF, -INF):
        rule.reset()
        assert not rule.update(1.0, train_loss=1.0)
        assert rule.update(value, train_loss=1.0)
        assert (rule.reason, rule.best) == (fw.rules.StopReason.NOT_FINITE, 1.0)
        assert rule.sentence == f"the value is {value} at evaluation 2"
    assert rule.update(1.0, train_loss=NAN)
    assert rule.sentence == "the train_loss is nan at evaluation 3"


@pytest.mark.parametrize(
    ("rule", "stop"), [(fw.rules.GL(5), 7), (fw.rules.PQ(0.5, k=2), 8), (fw.rules.UP(2, k=2), 10)], ids=repr
)
def test_nothing_stops_during_warm_up(rule, stop):
    """Six evaluations of warm-up do not stop a rising curve, and their rises do not count; then it stops as usual."""
    answers = [rule.update(1.0 + 0.1 * i, train_loss=1.0, warm_up=i < 6) for i in range(12)]
    assert answers.index(True) + 1 == stop


@pytest.mark.parametrize("rule", [fw.rules.GL(8), fw.rules.PQ(0.4, k=3), fw.rules.UP(2, k=3)], ids=repr)
def test_state_round_trip_goes_on_within_a_strip(rule):
    """After an interruption anywhere in a strip, each evaluation gives the same stop, best, reason and sentence."""
    train, val = curves(0)

    def go(rule, points):
        return [(rule.update(b, train_loss=a), rule.best, rule.reason, rule.sentence) for a, b in points]

    points = list(zip(train.tolist(), val.tolist(), strict=True))
    expected = go(rule, points)
    assert any(stop for stop, *_ in expected)
    for cut in range(0, 80, 7):
        rule.reset()
        go(rule, points[:cut])
        saved = json.loads(json.dumps(rule.state_dict()))
        rule.reset()
        rule.load_state_dict(saved)
        assert expected[cut:] == go(rule, points[cut:])


def test_what_the_rules_can_not_use_is_refused():
    """Negative errors, a missing training loss, and options out of range are refused with what was given."""
    with pytest.raises(ValueError, match="GL needs errors of 0 or more: the value is -0.5"):
        fw.rules.GL(5).update(-0.5)
    with pytest.raises(ValueError, match="PQ needs errors of 0 or more: the train_loss is -1.0"):
        fw.rules.PQ(1).update(0.5, train_loss=-1)
    with pytest.raises(ValueError, match="PQ needs the train_loss of each evaluation, got None"):
        fw.rules.PQ(1).update(0.5)
    for make, name in [
        (lambda: fw.rules.GL(-1), "alpha"),
        (lambda: fw.rules.PQ(NAN), "alpha"),
        (lambda: fw.rules.PQ(1, k=0), "k"),
        (lambda: fw.rules.UP(0), "s"),
        (lambda: fw.rules.UP(2, k=0), "k"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make()
    with pytest.raises(TypeError, match="^s must be an integer"):
        fw.rules.UP(1.5)
    with pytest.raises(TypeError):
        fw.rules.PQ(1, 5)
