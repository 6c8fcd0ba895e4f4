"""Early stopping: what goes wrong elsewhere, each exit, and a resume."""

import logging
import math

import pytest
import torch
from torch import nn

import fitwatch as fw
from tests.test_early_stopping import Scripted

NAN = math.nan


class ByValidation(Scripted):
    """The n-th validation gives the n-th loss, however many steps lie between."""

    def validation_step(self, batch):
        return torch.tensor(float(self.losses[len(self.state.history)]))


class Seen(Scripted):
    """Shows its validation batches to the metrics."""

    def validation_step(self, batch):
        self.update_metrics(batch, batch)
        return super().validation_step(batch)


class Errors(fw.Callback):
    """Announces a standard error of the validation loss, and puts it among the metrics."""

    def __init__(self, errors):
        self.errors = errors

    def on_fit_start(self, state):
        state.history.names.add("val/loss_se")

    def on_validation_end(self, state):
        state.metrics["val/loss_se"] = self.errors[len(state.history) - 1]


class At(fw.Callback):
    """Does something in one hook of epoch 3."""

    def __init__(self, hook, do):
        self.do = do
        setattr(self, hook, self.act)

    def act(self, state):
        if state.progress.epoch >= 3:
            self.do(state)


# -- what goes wrong elsewhere ---------------------------------------------------------------------------------------


def test_nan_is_no_improvement_so_a_run_that_turned_nan_stops():
    """Where NaN counts as improvement the best is NaN and the run never stops; here patience 3 ends it, best 2."""
    trainer = Scripted([3, 2, *[NAN] * 20], fw.EarlyStopping(patience=3))
    result = trainer.go()
    assert (len(result.history), result.best.metrics["val/loss"], trainer.weight) == (5, 2.0, 2.0)


def test_a_first_nan_does_not_stick_as_best():
    """Where the best sticks at a first NaN training stops while it improves; here it goes on to the end."""
    trainer = Scripted([NAN, 6, 5, 4, 3, 2, 1], fw.EarlyStopping(patience=2))
    result = trainer.go()
    assert (result.stop_reason, len(result.history), trainer.weight) == (None, 7, 7.0)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_relative_min_delta_points_the_right_way_for_negative_scores(mode):
    """The bound best * (1 - delta) lies on the wrong side of a negative best: gains of 5 % would count, or losses of 5 %."""
    sign = 1 if mode == "max" else -1
    gains = [-100.0 + 5 * i * sign for i in range(6)]  # 5 % of the first each: every third is an improvement of 10 %
    stop = fw.EarlyStopping(rule=fw.rules.Patience(mode=mode, patience=2, min_delta=0.12, relative=True))
    assert len(Scripted(gains, stop).go().history) == 3
    stop = fw.EarlyStopping(rule=fw.rules.Patience(mode=mode, patience=2, min_delta=0.08, relative=True))
    assert Scripted(gains, stop).go().stop_reason is None


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_is_the_number_of_evaluations_without_improvement_not_one_more(patience):
    """Patience n stops at the n-th evaluation in a row without improvement, where > in place of >= waits for n + 1."""
    result = Scripted([1.0, *[2.0] * 9], fw.EarlyStopping(patience=patience)).go()
    assert len(result.history) == 1 + patience


def test_patience_counts_validations_not_epochs_or_steps():
    """With a validation every 2 of 5 steps, patience 3 ends training 6 steps after the best validation, in mid-epoch."""
    trainer = ByValidation([5, 4, 3, 9, 9, 9, 9], fw.EarlyStopping(patience=3))
    one = torch.zeros(1, 1)
    result = trainer.fit([one] * 5, [one], epochs=9, validate_every=2)
    assert [entry["step"] for entry in result.history] == [2, 4, 6, 8, 10, 12]
    assert (trainer.state.progress.step, result.best.step, trainer.weight) == (12, 6, 6.0)


def test_a_stop_is_no_exception_that_later_callbacks_miss():
    """Callbacks after it in the list get every hook of the stopping evaluation, and the records of it."""
    calls, steps = [], []

    class Later(fw.Callback):
        def on_validation_end(self, state):
            calls.append("on_validation_end")

        def on_log(self, state):
            steps.extend(r.step for r in state.records if r.name == "val/loss")

        def on_epoch_end(self, state):
            calls.append("on_epoch_end")

        def on_fit_end(self, state):
            calls.append("on_fit_end")
            assert state.stop_reason.startswith("early stopping")

    Scripted([1, 2, 3, 4], fw.EarlyStopping(patience=2), Later()).go()
    assert calls == ["on_validation_end", "on_epoch_end"] * 3 + ["on_fit_end"]
    assert steps == [1, 2, 3]


def test_standard_errors_that_are_not_measured_are_refused_before_step_1():
    """min_delta="1se" without <monitor>_se is an error before training that lists what will be measured."""
    trainer = Scripted([1, 2], fw.EarlyStopping("val/loss_vs_baseline", min_delta="1se"))
    trainer.callbacks = [Names("val/loss_vs_baseline"), *trainer.callbacks]
    with pytest.raises(
        ValueError, match="standard errors monitors 'val/loss_vs_baseline_se', which .* not measure.*train/loss, val"
    ):
        trainer.go()
    assert (trainer.weight, trainer.state.progress.step) == (0.0, 0)


class Names(fw.Callback):
    """Announces a metric that never comes."""

    def __init__(self, name):
        self.name = name

    def on_fit_start(self, state):
        state.history.names.add(self.name)


def test_a_metric_that_was_announced_and_does_not_come_is_an_error_that_lists_the_others():
    """What a callback announced and did not measure is an error at the first evaluation, with the names there are."""
    trainer = Scripted([1, 2], Names("val/cost"), fw.EarlyStopping("val/cost"))
    with pytest.raises(
        ValueError, match="monitors 'val/cost', which was not measured; available are train/loss, val/loss"
    ):
        trainer.go()


# -- every exit restores the best -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_epoch_start", "on_gradients_ready", "on_validation_start", "on_validation_end"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None], ids=str)
def test_the_best_is_restored_on_any_exit(hook, before, error):
    """Ctrl-C, an error and another callback's stop, from any hook and place in the list: the model is that of epoch 1."""

    def act(state):
        if error is not None:
            raise error("planted")
        state.request_stop("planted")

    callbacks = [At(hook, act), fw.EarlyStopping(patience=99)]
    trainer = Scripted([5, 1, 3, 4, 4], *callbacks[:: 1 if before else -1])
    if error is None:
        assert trainer.go().stop_reason == "planted"
    else:
        with pytest.raises(error, match="planted"):
            trainer.go()
    assert trainer.weight == 2.0
    assert trainer.callbacks[before].reason is None  # it was not this one that stopped


@pytest.mark.parametrize("limit", [{"epochs": 4}, {"max_steps": 4}])
def test_the_best_is_restored_at_the_end_of_training(limit):
    """Where training runs its course, by epochs or steps, the model is that of epoch 1 and there is no reason."""
    stop = fw.EarlyStopping(patience=99)
    trainer = Scripted([5, 1, 3, 4], stop)
    loader = [torch.zeros(1, 1)]
    assert trainer.fit(loader, loader, **limit).stop_reason is None
    assert (trainer.weight, stop.reason) == (2.0, None)


# -- options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "options", "reason", "sentence", "best"),
    [
        ([5, 4, 4, 4], {"patience": 2}, fw.rules.StopReason.PATIENCE, "no improvement over 4 in 2 evaluations", 2),
        ([5, 4, 1, 1], {"rule": fw.rules.Patience(patience=10, stopping_threshold=2.0)},
         fw.rules.StopReason.THRESHOLD, "1 has reached the threshold of 2", 3),
        ([5, 4, 9, 1], {"rule": fw.rules.Patience(patience=10, divergence_threshold=6.0)},
         fw.rules.StopReason.DIVERGED, "9 is worse than the divergence threshold of 6", 2),
        ([5, 4, NAN, 1], {"rule": fw.rules.Patience(patience=10, check_finite=True)},
         fw.rules.StopReason.NOT_FINITE, "the value is nan at evaluation 3", 2),
        ([5, 4, 5, 1], {"rule": fw.rules.GL(20)}, fw.rules.StopReason.RISEN,
         "25% above the minimum of 4 (20% allowed)", 2),
        ([5, 4, 4, 4], {"rule": fw.rules.Patience(patience=2)}, fw.rules.StopReason.PATIENCE,
         "no improvement over 4 in 2 evaluations", 2),
        ([5, 4, 3, 4], {"rule": fw.rules.Patience(patience=2, baseline=2.0)}, fw.rules.StopReason.PATIENCE,
         "no improvement over 2 in 2 evaluations", 2),
        ([5, 4, 3.9, 4], {"rule": fw.rules.Patience(patience=1, min_delta=0.5, cumulative=False)},
         fw.rules.StopReason.PATIENCE, "no single improvement over 3.9 by more than 0.5 in 1 evaluation", 3),
        ([4, 1, 8, 8], {"rule": fw.rules.Patience(patience=1, window=2)}, fw.rules.StopReason.PATIENCE,
         "no improvement over 2.5 (mean of 2) in 1 evaluation", 2),  # the single best, not that of the mean
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_reason_is_an_enum_and_the_result_has_the_sentence(losses, options, reason, sentence, best):
    """Each option ends the fit for its own reason, as an enum and in words, and the best weights are restored."""
    stop = fw.EarlyStopping(**options)
    trainer = Scripted(losses, stop)
    result = trainer.go()
    assert (stop.reason, result.stop_reason) == (reason, f"early stopping on val/loss: {sentence}")
    assert trainer.weight == best


def test_a_second_fit_forgets_the_reason():
    """The reason is that of the newest fit: none, where the second one runs its course."""
    stop = fw.EarlyStopping(rule=fw.rules.Patience(patience=10, stopping_threshold=2.0))
    trainer = Scripted([3, 1, 5, 5], stop)
    trainer.go()
    assert stop.reason is fw.rules.StopReason.THRESHOLD
    assert trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=1).stop_reason is None
    assert stop.reason is None


def test_nothing_stops_before_start_epoch_and_the_best_of_it_is_kept():
    """Thresholds and NaN stop no warm-up, while the best weights may come from it."""
    rule = fw.rules.Patience(patience=2, stopping_threshold=0.5, divergence_threshold=8.0, check_finite=True)
    stop = fw.EarlyStopping(start_epoch=4, rule=rule)
    trainer = Scripted([9, 0.1, NAN, 9, 2, 2, 2], stop)
    assert len(trainer.go().history) == 6
    assert (stop.reason, trainer.weight) == (fw.rules.StopReason.PATIENCE, 2.0)


def test_one_standard_error():
    """Gains of 0.1 stop training where the standard error is 0.2, and do not where it is 0.05."""
    losses = [1 - 0.1 * i for i in range(7)]
    for error, validations in ((0.2, 3), (0.05, 7)):
        trainer = Scripted(losses, Errors([error] * 7), fw.EarlyStopping(patience=2, min_delta="1se"))
        assert len(trainer.go().history) == validations
        assert trainer.weight == validations  # the lowest, whatever counts as improvement


@pytest.mark.parametrize("rule", [fw.rules.GL(4), fw.rules.PQ(0.05, k=2), fw.rules.UP(2, k=2)], ids=repr)
def test_a_rule_of_prechelt_in_a_fit(rule):
    """A fit ends at the evaluation at which the rule alone, given the two curves, says stop; the best is restored."""
    val = [2.0 - 0.1 * i for i in range(10)] + [1.11 + 0.02 * i for i in range(20)]
    train = [2.0 - 0.05 * i for i in range(30)]
    alone = [rule.update(v, train_loss=t) for t, v in zip(train, val, strict=True)].index(True)
    trainer = Scripted(val, fw.EarlyStopping(rule=rule), train_losses=train)
    result = trainer.go()
    assert 10 < alone < 29
    assert len(result.history) == alone + 1
    assert (result.best.epoch, trainer.weight) == (9, 10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": fw.rules.PQ(1.0), "patience": 3},
         r"patience and min_delta are options of the rule: set them there, got rule=PQ\(alpha=1.0, k=5\)"),
        ({"rule": fw.rules.Patience(patience=3), "min_delta": 0.5},
         r"patience and min_delta are options of the rule: set them there, got rule=Patience\(mode='min', patience=3"),
        ({"rule": fw.rules.GL(5), "mode": "max"}, "mode must be the rule's, 'min', got 'max'"),
        ({"rule": fw.rules.Patience(patience=3, mode="max"), "mode": "min"}, "mode must be the rule's, 'max', got 'min'"),
        ({"min_delta": "one"}, "min_delta"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options, message):
    """Options that a rule brings itself, another mode and values out of range are refused when it is built."""
    with pytest.raises(ValueError, match=message):
        fw.EarlyStopping(**options)
    with pytest.raises(TypeError, match="rule must be of type StoppingRule"):
        fw.EarlyStopping(rule=fw.rules.GL)
    with pytest.raises(ValueError, match="stopping_threshold must be better"):
        fw.EarlyStopping(rule=fw.rules.Patience(patience=10, stopping_threshold=2, divergence_threshold=1))
    with pytest.raises(ValueError, match="window"):
        fw.EarlyStopping(rule=fw.rules.Patience(patience=10, window=0))


@pytest.mark.parametrize("mode", [None, "max"])
def test_the_mode_of_a_rule_is_that_of_the_metric(mode):
    """With a rule that looks for the highest value, mode may be left out; the best evaluation is the highest too."""
    stop = fw.EarlyStopping("val/accuracy", mode=mode, rule=fw.rules.Patience(mode="max", patience=2))
    assert stop.mode == "max"
    values = [0.3, 0.9, 0.5, 0.4, 0.8]
    trainer = Seen([1] * 5, stop, metrics={"accuracy": lambda o, t: values[trainer.state.progress.epoch]})
    result = trainer.go()
    assert (len(result.history), result.best.epoch, trainer.weight) == (4, 1, 2.0)
    assert (trainer.state.history.monitor, trainer.state.history.mode) == ("val/accuracy", "max")


# -- resume ------------------------------------------------------------------------------------------------------------

VAL = [5, 4, NAN, 4.5, 3.9, 3.95, 4.2, 4.4, 4.3, 4.6, 4.7, 4.8]
TRAIN = [5 - 0.4 * i for i in range(12)]


def resumable(folder, stop, val=VAL):
    return Scripted(val, stop, fw.Checkpoint(folder), train_losses=TRAIN)


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda: fw.EarlyStopping(patience=4), 9),
        (lambda: fw.EarlyStopping(patience=3, min_delta=0.5, start_epoch=4), 7),
        (lambda: fw.EarlyStopping(rule=fw.rules.Patience(patience=3, window=3, cumulative=False)), 10),
        (lambda: fw.EarlyStopping(rule=fw.rules.Patience(patience=5)), 10),
        (lambda: fw.EarlyStopping(rule=fw.rules.PQ(0.04, k=3)), 9),
        (lambda: fw.EarlyStopping(rule=fw.rules.UP(2, k=2)), 10),
    ],
)
@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_the_counter_survives_a_resume(tmp_path, make, length, cut):
    """Interrupted after any epoch, the resumed training stops at the same one, for the same reason, with the same best."""
    stop, loader = make(), [torch.zeros(1, 1)]
    val = VAL if isinstance(stop.rule, fw.rules.Patience) else [3.99 if math.isnan(v) else v for v in VAL]
    whole = Scripted(val, make(), train_losses=TRAIN)
    expected = whole.go()
    assert len(expected.history) == length
    resumable(tmp_path, make(), val).fit(loader, loader, epochs=cut)
    resumed = resumable(tmp_path, stop, val)
    result = resumed.go(resume="auto")
    assert length == len(result.history)
    assert expected.stop_reason == result.stop_reason
    assert whole.callbacks[0].reason is stop.reason
    assert whole.weight == resumed.weight


def test_a_stopped_training_stays_stopped_for_the_same_reason(tmp_path):
    """Resumed after it had stopped, it makes no step and gives the reason again, the enum and the sentence."""
    first, stop = (fw.EarlyStopping(rule=fw.rules.Patience(patience=10, stopping_threshold=4.0)) for _ in range(2))
    first = resumable(tmp_path, first).go()
    trainer = resumable(tmp_path, stop)
    again = trainer.go(resume="auto")
    assert first.stop_reason == again.stop_reason == "early stopping on val/loss: 4 has reached the threshold of 4"
    assert (stop.reason, trainer.state.progress.step, trainer.weight) == (fw.rules.StopReason.THRESHOLD, 2, 2.0)


def test_with_more_patience_a_stopped_training_goes_on(tmp_path, caplog):
    """More patience on resume: the counter goes on from where it was, and a warning names the change."""
    resumable(tmp_path, fw.EarlyStopping(patience=2)).go()
    with caplog.at_level(logging.WARNING, "fitwatch"):
        result = resumable(tmp_path, fw.EarlyStopping(patience=4)).go(resume="auto")
    assert len(result.history) == 9
    assert "no improvement over 3.9 in 4 evaluations" in result.stop_reason
    said = [r.getMessage() for r in caplog.records if "is nan" not in r.getMessage()]
    assert said == ["EarlyStopping resumes with different options: patience 4 (was 2)"]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (lambda: fw.EarlyStopping("train/loss"), "its monitor is 'train/loss' but was 'val/loss' in the checkpoint"),
        (lambda: fw.EarlyStopping(mode="max"), "its mode is 'max' but was 'min' in the checkpoint"),
        (lambda: fw.EarlyStopping(rule=fw.rules.GL(50)), "its rule is GL but was Patience in the checkpoint"),
        (lambda: fw.EarlyStopping(patience=9), "restore_best=True: the checkpoint was saved with restore_best=False"),
    ],
)
def test_a_resume_with_counters_of_another_meaning_is_refused(tmp_path, stop, message):
    """Another metric, mode or rule can't take over the counters, and weights that were not kept can't be restored."""
    loader = [torch.zeros(1, 1)]
    resumable(tmp_path, fw.EarlyStopping(restore_best=False)).fit(loader, loader, epochs=2)
    with pytest.raises(ValueError, match=f"EarlyStopping can't resume.*{message}"):
        resumable(tmp_path, stop()).go(resume="auto")


def test_without_restore_best_a_resumed_training_keeps_its_last_weights(tmp_path):
    """Best weights that the checkpoint has are not restored where restore_best is switched off, and none are kept."""
    loader = [torch.zeros(1, 1)]
    resumable(tmp_path, fw.EarlyStopping(patience=99)).fit(loader, loader, epochs=2)
    trainer = resumable(tmp_path, fw.EarlyStopping(patience=99, restore_best=False))
    trainer.fit(loader, loader, epochs=4, resume="auto")
    assert trainer.weight == 4.0
    stop = fw.EarlyStopping(patience=99, restore_best=False)
    kept = []
    Scripted(VAL, stop, At("on_validation_end", lambda state: kept.append(stop.state_dict()["best"]))).go()
    assert kept
    assert set(kept) == {None}


def test_one_that_is_new_at_a_resume_says_what_it_does_not_know(tmp_path, caplog):
    """EarlyStopping added to a resumed training warns that the evaluations before are not among its best."""
    loader = [torch.zeros(1, 1)]
    resumable(tmp_path, fw.OverfittingDetector(probe_examples=0)).fit(loader, loader, epochs=2)
    with caplog.at_level(logging.WARNING, "fitwatch"):
        resumable(tmp_path, fw.EarlyStopping(patience=9)).fit(loader, loader, epochs=3, resume="auto")
    said = [r.getMessage() for r in caplog.records if "was not in the checkpoint" in r.getMessage()]
    assert len(said) == 1
    assert "the 2 evaluations so far" in said[0]


def test_ctrl_c_within_the_end_of_a_fit_still_restores():
    """Ctrl-C that comes while another callback ends the fit goes on only when the best weights are back."""

    class Interrupted(fw.Callback):
        def on_fit_end(self, state):
            raise KeyboardInterrupt

    model = nn.Linear(1, 1)
    seen = []

    class Watch(fw.Callback):
        def on_validation_end(self, state):
            seen.append(model.weight.item())

    x, y = torch.ones(4, 1), torch.ones(4, 1)
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 3.0),  # diverges: the first evaluation is the best
        nn.MSELoss(),
        callbacks=[fw.EarlyStopping(patience=9), Watch(), Interrupted()],
        device="cpu",
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit([(x, y)], [(x, y)], epochs=4)
    assert model.weight.item() == seen[0] != seen[-1]
