"""Early stopping in standard errors of the gain, from the losses of the same examples at both evaluations."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fitwatch as fw
from tests.test_rules_paired import expected_error

CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)


def curves(seed, evaluations=40, examples=50):
    """Losses of examples, shape (evaluations, examples), that differ much, fall little, and are noisy; and weights."""
    rng = np.random.default_rng(seed)
    fall = 0.5 * np.exp(-np.arange(evaluations) / rng.uniform(2, 20))[:, None]
    rows = rng.exponential(1.0, examples) + fall + rng.normal(0, rng.uniform(0.02, 0.3), (evaluations, examples))
    return rows, rng.uniform(0.1, 3.0, examples)


def plain(rows, weights, count, *, mode="min", window=1, cumulative=True, baseline=None):
    """The waits by the definition: the mean of the last evaluations against that of the reference, paired."""
    sign, wait, seen = 1 if mode == "min" else -1, 0, []
    level, before = baseline, np.zeros(rows.shape[1])  # a fixed number has no error
    for i in range(len(rows)):
        now = rows[max(0, i - window + 1) : i + 1].mean(0)
        mean = np.average(now, weights=weights)
        gain = math.inf if level is None else sign * (level - mean)
        improved = level is None or gain > count * expected_error(before, now, weights)
        if improved or (not cumulative and gain > 0):
            level, before = mean, now
        wait = 0 if improved else wait + 1
        seen.append(wait)
    return seen


def waits(rule, rows, weights, errors=None):
    """Those of the rule."""
    seen = []
    for i, row in enumerate(rows):
        error = None if errors is None else errors[i]
        rule.update(np.average(row, weights=weights), losses=row, weights=weights, standard_error=error)
        seen.append(rule.wait)
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "max"}, {"window": 3}, {"cumulative": False}, {"cumulative": False, "window": 4}, {"baseline": 1.3}],
    ids=str,
)
@pytest.mark.parametrize("count", [0.5, 1, 2])
def test_a_gain_is_judged_by_its_own_standard_error(options, count):
    """On 20 sets of curves the rule waits as the definition says, in float64, in whatever order the examples stand."""
    lengths = set()
    for seed in range(20):
        rows, weights = curves(seed)
        rows = -rows if "mode" in options else rows  # so that there is something to improve
        order = np.random.default_rng(seed).permutation(len(weights))
        expected = plain(rows, weights, count, **options)
        for columns in (slice(None), order):
            rule = fw.rules.Patience(patience=99, min_delta=f"{count}se", **options)
            assert expected == waits(rule, rows[:, columns], weights[columns])
        lengths.add(max(expected))
    assert len(lengths) > 5  # they are not all alike


def test_examples_that_differ_much_and_fall_together():
    """Losses from 0 to 10 that all fall by 0.01: nothing to one standard error of the mean, certain to that of the gain."""
    rows = np.linspace(0, 10, 200) - 0.01 * np.arange(9)[:, None] * np.linspace(0.9, 1.1, 200)
    paired, unpaired = (fw.rules.Patience(patience=4, min_delta="2se") for _ in range(2))
    for row in rows:
        paired.update(row.mean(), losses=row)
        unpaired.update(row.mean(), standard_error=row.std(ddof=1) / math.sqrt(200))
    assert (paired.wait, paired.reason) == (0, None)
    assert (unpaired.wait, unpaired.reason) == (8, fw.rules.StopReason.PATIENCE)
    for _ in range(4):
        paired.update(rows[-1].mean() + 0.001, losses=rows[-1] + 0.001)
    assert "(2 standard errors of the difference)" in paired.sentence
    assert "of the difference" not in unpaired.sentence


def test_without_pairs_the_standard_error_of_the_value_decides():
    """Another number of examples, or none, is judged by the error that is given, else by that of the new value alone."""
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    alone = expected_error(np.zeros(5), losses, np.ones(5))
    cases = ((0.5, 0.4, True), (0.5, 0.6, False), (1.01 * alone, None, True), (0.99 * alone, None, False))
    for gain, given, improved in cases:
        rule = fw.rules.Patience(patience=9, min_delta="1se")
        rule.update(losses.mean() + gain, losses=np.arange(7.0))
        rule.update(losses.mean(), losses=losses, standard_error=given)
        assert (rule.wait == 0) is improved
    rule = fw.rules.Patience(patience=1, min_delta="1se")
    rule.update(3.0, losses=losses)
    rule.update(2.9, standard_error=0.2)
    assert rule.sentence == "no improvement over 3 by more than 0.2 (1 standard error) in 1 evaluation"


def test_a_nan_between_two_evaluations_changes_no_pairs():
    """The loss of one example is NaN once: that evaluation waits, and those after it are judged as without it."""
    rows, weights = curves(0)
    broken = rows.copy()
    broken[7, 3] = math.nan
    clean = fw.rules.Patience(patience=99, min_delta="1se")
    rule = fw.rules.Patience(patience=99, min_delta="1se")
    expected = waits(clean, np.delete(rows, 7, 0), weights)
    seen = waits(rule, broken, weights)
    after = expected.index(0, 7)  # from the next improvement on the counts are the same
    assert expected[after:] == seen[after + 1 :]
    assert seen[7] == seen[6] + 1


def test_one_example_alone_is_refused():
    """Of one example no error is known, so nothing would ever be an improvement."""
    with pytest.raises(ValueError, match="got nan .undefined for a single example"):
        fw.rules.Patience(patience=99, min_delta="1se").update(3.0, losses=[3.0])


@pytest.mark.parametrize("window", [1, 3])
def test_the_state_holds_the_pairs(window):
    """Interrupted after any evaluation, a rule goes on with the same waits."""
    rows, weights = curves(4)
    options = {"patience": 99, "min_delta": "1se", "window": window}
    expected = waits(fw.rules.Patience(**options), rows, weights)
    for cut in (1, 5, 20):
        first, second = fw.rules.Patience(**options), fw.rules.Patience(**options)
        waits(first, rows[:cut], weights)
        second.load_state_dict(first.state_dict())
        assert expected[cut:] == waits(second, rows[cut:], weights)


def test_losses_of_a_wrong_shape_are_refused():
    """Losses and weights of the examples must have one shape, (N,); the error has both."""
    with pytest.raises(ValueError, match=r"shape \(N,\).* got \(3,\) and \(2,\)"):
        fw.rules.Patience(patience=1, min_delta="1se").update(1.0, losses=[1.0, 2.0, 3.0], weights=[1.0, 1.0])


# -- in a fit ----------------------------------------------------------------------------------------------------------


class Watch(fw.Callback):
    """Keeps the model of each validation, and how long each of the rules has waited."""

    def __init__(self, *stops):
        self.stops, self.models, self.waits = stops, [], []

    def on_validation_start(self, state):
        self.models.append(copy.deepcopy(state.model).eval())

    def on_epoch_end(self, state):
        self.waits.append([stop.rule.wait for stop in self.stops])


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return x, ((x[:, 0] + noise > 0).long() + (x[:, 1] > 1)).clamp(max=2)


X, Y = examples(64, 1)
VX, VY = examples(50, 2)
VAL = list(zip(VX.split(16), VY.split(16), strict=True))


def make(*callbacks, weights=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return fw.Trainer(model, optimizer, fw.CrossEntropy(weights), callbacks=list(callbacks), device="cpu")


def losses_of(models):
    """Torch's own losses of the validation examples, shape (models, examples)."""
    with torch.no_grad():
        return np.stack([F.cross_entropy(model(VX), VY, reduction="none").numpy() for model in models])


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_a_fit_pairs_the_examples_of_its_validations(weights):
    """It waits as the definition says on torch's losses; by the error of the loss alone fewer gains would count."""
    stop, other = (fw.EarlyStopping(min_delta="1se", patience=99) for _ in range(2))
    watch = Watch(stop, other)
    result = make(stop, other, watch, weights=weights).fit([(X, Y)], VAL, epochs=40)
    rows = losses_of(watch.models)
    expected = plain(rows, np.ones(50) if weights is None else weights[VY].numpy(), 1)
    assert expected == [wait for wait, _ in watch.waits] == [wait for _, wait in watch.waits]
    alone = fw.rules.Patience(patience=99, min_delta="1se")
    unpaired = []
    for entry in result.history:
        alone.update(entry["val/loss"], standard_error=entry["val/loss_se"])
        unpaired.append(alone.wait)
    assert unpaired.count(0) < expected.count(0) - 5


@pytest.mark.parametrize("cut", [1, 6, 11])
def test_a_resumed_fit_decides_as_one_that_was_never_interrupted(tmp_path, cut):
    """Interrupted after any epoch, it stops at the same one, for the same reason, to the last digit of the figures."""

    def parts(*more):
        stop = fw.EarlyStopping(rule=fw.rules.Patience(min_delta="1se", patience=4, window=2))
        return stop, make(stop, *more)

    stop, whole = parts()
    expected = whole.fit([(X, Y)], VAL, epochs=80)
    assert stop.reason is fw.rules.StopReason.PATIENCE
    assert "of the difference" in expected.stop_reason
    assert len(expected.history) > 12
    parts(fw.Checkpoint(tmp_path))[1].fit([(X, Y)], VAL, epochs=cut)
    stop, resumed = parts(fw.Checkpoint(tmp_path))
    result = resumed.fit([(X, Y)], VAL, epochs=80, resume="auto")
    assert (expected.stop_reason, len(expected.history)) == (result.stop_reason, len(result.history))
    assert stop.reason is fw.rules.StopReason.PATIENCE


def test_a_validation_of_other_data_in_between_breaks_no_pair():
    """A callback before it that validates on other data, as many examples, does not change what is compared."""

    class Elsewhere(fw.Callback):
        def on_validation_end(self, state):
            trainer.validate([(X[:50], Y[:50])])

    seen = []
    for before in ([], [Elsewhere()]):
        stop = fw.EarlyStopping(min_delta="1se", patience=99)
        watch = Watch(stop)
        trainer = make(*before, stop, watch)
        trainer.fit([(X, Y)], VAL, epochs=30)
        seen.append(watch.waits)
    assert seen[0] == seen[1]


def test_a_standard_error_of_ones_own_counts():
    """What a callback before it announces as val/loss_se decides alone: an infinite one allows no improvement."""

    class Own(fw.Callback):
        def on_fit_start(self, state):
            state.history.names.add("val/loss_se")

        def on_validation_end(self, state):
            state.metrics["val/loss_se"] = math.inf

    stop = fw.EarlyStopping(min_delta="1se", patience=3)
    result = make(Own(), stop).fit([(X, Y)], VAL, epochs=30)
    assert len(result.history) == 4
    assert "by more than inf (1 standard error)" in result.stop_reason
