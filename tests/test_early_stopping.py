"""Early stopping and the overfitting detector in a fit."""

import logging
import math

import pytest
import torch
from attrs import evolve
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw


class Scripted(fw.Trainer):
    """Validation losses come from a list, and the model's one weight counts the epochs."""

    def __init__(self, losses, *callbacks, train_losses=None, **options):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        super().__init__(
            model, torch.optim.SGD(model.parameters(), 1.0), callbacks=list(callbacks), device="cpu", **options
        )
        self.losses, self.train_losses = losses, train_losses

    def training_step(self, batch):
        epoch = self.state.progress.epoch
        value = self.train_losses[epoch] if self.train_losses else 0.0
        weight = self.model.weight.sum()
        return -weight + weight.detach() + value  # the gradient is -1: each step adds 1 to the weight

    def validation_step(self, batch):
        return torch.tensor(float(self.losses[self.state.progress.epoch]))

    def go(self, **options):
        loader = [torch.zeros(1, 1)]
        return self.fit(loader, [torch.zeros(1, 1)], epochs=len(self.losses), **options)

    @property
    def weight(self):
        return self.model.weight.item()


def test_it_stops_after_patience_and_restores_the_best():
    """Patience 3 stops at the third evaluation in a row without improvement, and the model is that of the best epoch."""
    trainer = Scripted([5, 4, 3, 3.5, 3.5, 3.5, 1], fw.EarlyStopping("val/loss", patience=3))
    result = trainer.go()
    assert len(result.history) == 6
    assert "val/loss" in result.stop_reason
    assert "3 evaluations" in result.stop_reason
    assert (result.best.epoch, trainer.weight) == (2, 3.0)


def test_the_best_is_restored_when_training_runs_its_course():
    """Also without a stop the model ends with its best weights, unless told otherwise."""
    trainer = Scripted([5, 1, 3], fw.EarlyStopping(patience=10))
    assert trainer.go().stop_reason is None
    assert trainer.weight == 2.0
    trainer = Scripted([5, 1, 3], fw.EarlyStopping(patience=10, restore_best=False))
    trainer.go()
    assert trainer.weight == 3.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_best_is_restored_after_an_exception(error):
    """On Ctrl-C or an error the exception reaches the caller, and the model has its best weights."""

    class Fail(fw.Callback):
        def on_epoch_start(self, state):
            if state.progress.epoch == 3:
                raise error("planted")

    trainer = Scripted([5, 1, 3, 4], fw.EarlyStopping(patience=10), Fail())
    with pytest.raises(error, match="planted"):
        trainer.go()
    assert trainer.weight == 2.0


def test_the_strictly_best_is_restored_whatever_min_delta_is():
    """Gains below min_delta use up patience, yet the weights restored are those of the lowest value."""
    trainer = Scripted([5, 4.9, 4.8, 4.7, 4.6], fw.EarlyStopping(patience=2, min_delta=0.5))
    result = trainer.go()
    assert len(result.history) == 3
    assert trainer.weight == 3.0


def test_relative_min_delta_and_max_mode():
    """In max mode with a relative min_delta of 10 %, 1.05 after 1.0 is no improvement, 1.2 is."""
    rule = fw.rules.Patience(mode="max", patience=2, min_delta=0.1, relative=True)
    trainer = Scripted([1.0, 1.05, 1.2, 1.21, 1.22], fw.EarlyStopping(rule=rule))
    result = trainer.go()
    assert len(result.history) == 5
    assert trainer.weight == 5.0  # 1.22 is the highest
    assert result.best.epoch == 4


def test_warm_up_epochs_do_not_count():
    """Before start_epoch nothing counts against the patience."""
    result = Scripted([1, 2, 3, 4, 5, 6, 7], fw.EarlyStopping(patience=2, start_epoch=3)).go()
    assert len(result.history) == 5


def test_nan_is_never_best():
    """NaN first, then improving: no stop, and the best is the lowest number."""
    trainer = Scripted([float("nan"), 3, 2, 2.5], fw.EarlyStopping(patience=2))
    result = trainer.go()
    assert result.stop_reason is None
    assert (result.best.epoch, trainer.weight) == (2, 3.0)


def test_without_validation_it_follows_the_training_loss():
    """With no validation set, it decides at the end of the epoch on train/loss."""
    trainer = Scripted([0] * 6, fw.EarlyStopping("train/loss", patience=1), train_losses=[3, 2, 2.5, 1, 1, 1])
    result = trainer.fit([torch.zeros(1, 1)], epochs=6)
    assert len(result.history) == 3
    assert trainer.weight == 2.0


@pytest.mark.parametrize("monitor", ["val/los", "val/accuracy", "loss"])
def test_a_metric_that_will_not_exist_is_refused_before_step_1(monitor):
    """An unknown metric is an error before training, and the message lists the metrics that there will be."""
    trainer = Scripted([1, 2], fw.EarlyStopping(monitor), metrics={"recall": lambda o, t: 0.0})
    with pytest.raises(ValueError, match=f"(?s)EarlyStopping monitors '{monitor}'.*train/loss, val/loss, val/recall"):
        trainer.go()
    assert trainer.weight == 0.0
    with pytest.raises(ValueError, match=r"will measure train/loss(\n|$)"):
        Scripted([1], fw.EarlyStopping()).fit([torch.zeros(1, 1)], epochs=1)


def test_a_second_fit_begins_with_fresh_patience():
    """The waiting of the first fit does not count in the second; the value to improve on is still that of the first."""
    stop = fw.EarlyStopping(patience=2)
    trainer = Scripted([1, 2, 3] + [4] * 10, stop)
    assert len(trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=10).history) == 3
    assert len(trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=10).history) == 3 + 2
    assert len(trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=10, reset=True).history) == 3


@pytest.mark.parametrize(
    "options",
    [{"patience": 0}, {"mode": "best"}, {"min_delta": -1.0}, {"start_epoch": -1}, {"min_delta": float("nan")}],
    ids=str,
)
def test_bad_options_are_refused(options):
    """Options out of range are refused when the callback is built, by name."""
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        fw.EarlyStopping(**options)


def test_a_metric_whose_direction_is_unknown_needs_a_mode():
    """val/accuracy without mode is refused before step 1: "min" would restore the worst weights."""
    metrics = {"accuracy": lambda o, t: 0.0}
    trainer = Scripted([1, 2], fw.EarlyStopping("val/accuracy"), metrics=metrics)
    with pytest.raises(ValueError, match='EarlyStopping monitors .val/accuracy.: pass mode="min" or mode="max"'):
        trainer.go()
    assert trainer.weight == 0.0


OVERFIT = [2.0 - 0.1 * i for i in range(12)] + [0.9 + 0.05 * i for i in range(18)]
FALLING = [2.0 - 0.05 * i for i in range(30)]


def test_the_detector_says_since_when(caplog):
    """A validation loss that turns at evaluation 12 while training falls gives one warning, one bar and that onset."""
    records = []

    class Keep(fw.Callback):
        def on_log(self, state):
            records.extend(state.records)

    with caplog.at_level(logging.WARNING, "fitwatch"):
        detector = fw.OverfittingDetector(probe_examples=0)  # a scripted validation loss is that of any batch
        result = Scripted(OVERFIT, detector, Keep(), train_losses=FALLING).go()
    verdict = result.verdict
    assert verdict.overfitting
    assert abs(verdict.onset - 12) <= 1
    assert verdict.onset < verdict.detected < 25
    assert len(caplog.records) == 1
    assert verdict.gap == pytest.approx(OVERFIT[-1] - FALLING[-1])
    entry = result.history[verdict.onset]
    bars = [r for r in records if isinstance(r.value, fw.records.Marker)]
    (bar,) = bars
    assert (bar.name, bar.step) == ("overfitting", entry["step"])
    assert (bar.value.low, bar.value.high) == (entry["train/loss"], entry["val/loss"])
    assert bar.value.decided == result.history[verdict.detected]["step"]
    assert "validation loss has risen" in bar.value.text
    assert [pytest.approx(v - t, abs=1e-6) for v, t in zip(OVERFIT, FALLING, strict=True)] == [
        r.value for r in records if r.name == "val/overfit/gap"
    ]
    curves = [[entry[name] for entry in result.history] for name in ("train/loss", "val/loss")]
    assert evolve(verdict, evidence="", summary="") == evolve(fw.diagnose(*curves), evidence="", summary="")


def test_a_healthy_run_gives_no_warning(caplog):
    """Two falling curves give a verdict of improving and no warning."""
    with caplog.at_level(logging.WARNING, "fitwatch"):
        result = Scripted([x + 0.1 for x in FALLING], fw.OverfittingDetector(), train_losses=FALLING).go()
    assert not result.verdict.overfitting
    assert result.verdict.status == "improving"
    assert not caplog.records


def test_the_detector_needs_a_validation_set(model, data):
    """Without a validation set the detector refuses to start."""
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.OverfittingDetector()])
    with pytest.raises(ValueError, match="val_loader"):
        trainer.fit(DataLoader(data, 16), epochs=1)


def test_buffers_are_restored_with_the_weights(data):
    """The statistics of a BatchNorm are those of the best epoch too."""
    kept = {}

    class Keep(fw.Callback):
        def on_validation_end(self, state):
            kept[state.metrics["val/loss"]] = {n: b.clone() for n, b in state.model.named_buffers()}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 2.0), callbacks=[fw.EarlyStopping(patience=3), Keep()], device="cpu"
    )
    trainer.fit(DataLoader(data, 16), DataLoader(data, 64), epochs=8)
    best = kept[min(kept)]
    assert min(kept) != list(kept)[-1]
    assert all(torch.equal(best[name], buffer) for name, buffer in model.named_buffers())
    assert trainer.validate(DataLoader(data, 64))["val/loss"] == pytest.approx(min(kept), rel=1e-12)


def test_a_second_fit_that_fails_to_start_leaves_the_weights_alone():
    """When another callback refuses the second fit, the best weights of the first are not restored over the user's."""

    class Refuse(fw.Callback):
        def on_fit_start(self, state):
            if state.progress.step:
                raise RuntimeError("planted")

    trainer = Scripted([3, 2, 1, 1], Refuse(), fw.EarlyStopping())
    trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=2)
    nn.init.constant_(trainer.model.weight, 7.0)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=2)
    assert trainer.weight == 7.0


@pytest.mark.parametrize("rule", [fw.rules.Patience(patience=1), fw.rules.GL(1000), fw.rules.UP(1, k=1)])
def test_an_evaluation_without_a_training_loss_does_not_count(rule):
    """With train/loss as the metric, a validation before step 1 of any fit neither stops training nor counts."""
    trainer = Scripted([1] * 3, fw.EarlyStopping("train/loss", rule=rule), train_losses=[3, 2, 1, 0.5, 0.4, 0.3])
    for fits in (1, 2):
        trainer.losses = [1] * 3 * (fits + 1)
        loader = [torch.zeros(1, 1)]
        result = trainer.fit(loader, list(loader), epochs=3, validate_first=True)
        assert (trainer.state.progress.epoch, result.stop_reason) == (3 * fits, None)
        assert rule.evaluations == 3 * fits


def test_two_evaluations_at_one_step_count_once():
    """In a loop that validates twice after a step, the second has no training loss, and does not count against it."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(torch.ones(2, 1), torch.full((2, 1), 5.0))]
    stopping = fw.EarlyStopping("train/loss", patience=1)
    with fw.Watch(model, optimizer, stopping, loss=nn.MSELoss(), train_loader=batches, val_loader=batches) as watch:
        watch.validate()
        for _ in watch.epochs(3):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            watch.validate()
            watch.validate()
    assert watch.state.progress.step == 3
    assert stopping.rule.evaluations == 3


def test_a_training_loss_that_becomes_nan_counts():
    """A NaN of training itself is no missing value: it stops training."""
    stopping = fw.EarlyStopping("train/loss", patience=2)
    trainer = Scripted([1] * 4, stopping, train_losses=[3, math.nan, math.nan, 1], nonfinite="ignore")
    assert len(trainer.go(validate_first=True).history) == 4
