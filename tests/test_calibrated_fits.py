"""What a fit measures and hands over of its calibration, against the same figures from the plain outputs."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import cross_fitted, fit_temperature
from fitwatch.measuring import kept_logits
from fitwatch.measuring.kept_logits import KeptLogits

NAMES = {"val/log_loss", "val/refined_loss", "val/refined_loss_se", "val/temperature", "val/calibration_error"}


def examples(n=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] * x[:, 2] + torch.randn(n, generator=generator) > 0.7).long()
    return x, y


def loaders(n=100, size=None, **target):
    x, y = examples()
    y = y.to(**target) if target else y
    y = y.reshape(-1, *size) if size else y
    return (
        DataLoader(TensorDataset(x[:n], y[:n]), 16, shuffle=True),
        DataLoader(TensorDataset(x[n:], y[n:]), 64),
    )


def network(outputs=2, *more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, outputs), *more)


def trainer_of(model, loss=None, *callbacks, lr=0.01):
    return fw.Trainer(model, torch.optim.Adam(model.parameters(), lr), loss, callbacks=callbacks, device="cpu", seed=0)


@torch.no_grad()
def outputs_of(model, loader):
    return model(torch.cat([x for x, _ in loader])), torch.cat([y for _, y in loader])


def test_the_figures_are_those_of_the_outputs():
    """After each epoch the temperature and the refined loss are those fitted to the outputs by hand."""
    train, val = loaders()
    model = network()
    seen = []

    class Keep(fw.Callback):
        def on_validation_end(self, state):
            seen.append(outputs_of(state.model, val))

    result = trainer_of(model, None, fw.OverfittingDetector(), Keep()).fit(train, val, epochs=5)
    for entry, (z, y) in zip(result.history, seen, strict=True):
        rows = Rows.of(z, y)
        t = fit_temperature(rows)
        assert entry["val/temperature"] == pytest.approx(t, rel=1e-9)
        each = F.cross_entropy(z.double() * cross_fitted(rows, t)[:, None], y, reduction="none")
        assert entry["val/refined_loss"] == pytest.approx(float(each.mean()), rel=1e-9)
        assert entry.keys() >= NAMES
        difference = each - F.cross_entropy(z.double(), y, reduction="none")
        assert entry["val/refined_loss_se"] == pytest.approx(float(difference.std()) / 20, rel=0.25)


@pytest.mark.parametrize(
    ("loss", "size", "outputs"),
    [
        (fw.CrossEntropy([1.0, 3.0]), None, 2),
        (fw.Focal(2.0, weight=[1.0, 3.0]), None, 2),
        (fw.LogitAdjusted([400, 100]), None, 2),
        (fw.BinaryCrossEntropy(3.0), (1,), 1),
    ],
)
def test_class_weights_are_taken_off_first(loss, size, outputs):
    """The fit is unweighted, on logits without what class weights add to them: log w, or the adjustment."""
    train, val = loaders(size=size, dtype=torch.float32 if size else torch.int64)
    model = network(outputs)
    result = trainer_of(model, loss, fw.OverfittingDetector()).fit(train, val, epochs=3)
    z, y = outputs_of(model, val)
    shift = {2: torch.tensor([0.0, math.log(3)]), 1: torch.tensor([math.log(3)])}[outputs]
    if isinstance(loss, fw.LogitAdjusted):
        shift = -torch.tensor([0.8, 0.2]).log()
    rows = Rows.of(z - shift, y)
    t = fit_temperature(rows)
    assert result.calibration.temperature == pytest.approx(t, rel=1e-5)
    assert result.history[-1]["val/refined_loss"] == pytest.approx(
        float(rows.losses(cross_fitted(rows, t)).mean()), rel=1e-5
    )
    torch.testing.assert_close(result.calibration.logits(z), (z - shift) / t, atol=1e-5, rtol=1e-5)


def test_sample_weights_and_ignored_labels_count_in_the_fit():
    """An example of weight 2 counts twice, one of weight 0 or with the ignored label not at all."""
    x, y = examples()
    weight = (torch.arange(500) % 3).float()
    target = torch.where(torch.arange(500) % 7 == 0, -100, y)
    batch = [(x, target, weight)]
    model = network()
    result = trainer_of(model, fw.CrossEntropy(), fw.OverfittingDetector()).fit(batch, batch, epochs=3)
    index = torch.arange(500).repeat_interleave(weight.long())
    index = index[target[index] >= 0]
    with torch.no_grad():
        z = model(x)[index]
    rows = Rows.of(z, y[index])
    counted = target >= 0
    scale = weight[counted].sum() / (weight[counted] > 0).sum()  # weights are relative: the prior counts as before
    assert result.history[-1]["val/temperature"] == pytest.approx(
        fit_temperature(Rows(rows.logits, rows.targets, rows.weights / scale.double())), rel=1e-6
    )


def test_one_option_turns_it_off_and_nothing_else_changes():
    """Without it the history is the same to the bit, apart from its own figures; so are the weights."""
    histories, weights = [], []
    for on in (True, False):
        train, val = loaders()
        model = network(2, nn.Dropout(0.0))
        result = trainer_of(model, None, fw.OverfittingDetector(calibration=on)).fit(train, val, epochs=4)
        histories.append(result.history)
        weights.append(list(model.state_dict().values()))
        assert (result.calibration is not None) is on
    assert [{k: v for k, v in entry.items() if k not in NAMES} for entry in histories[0]] == histories[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_loss_without_logits_measures_nothing():
    """A squared error has no calibration, and predict(calibrated=True) says what is missing."""
    x, _ = examples()
    model = network(1)
    trainer = trainer_of(model, nn.MSELoss(), fw.OverfittingDetector())
    result = trainer.fit([(x, x[:, :1])], [(x, x[:, :1])], epochs=2)
    assert result.calibration is None
    assert not NAMES & result.history[-1].keys()
    with pytest.raises(ValueError, match="calibrated=True needs the calibration of the last fit"):
        trainer.predict([x], calibrated=True)
    with pytest.raises(ValueError, match="monitors 'val/refined_loss', which this fit will not measure"):
        trainer_of(model, nn.MSELoss(), fw.EarlyStopping("val/refined_loss")).fit(
            [(x, x[:, :1])], [(x, x[:, :1])], epochs=1
        )


def test_outputs_that_do_not_fit_are_named():
    """A class for each pixel is not measured: the verdict says so, and so does early stopping on the refined loss."""
    images, masks = torch.randn(6, 2, 5, 5), torch.randint(0, 3, (6, 5, 5))
    model = nn.Conv2d(2, 3, 1)
    result = trainer_of(model, None, fw.OverfittingDetector()).fit([(images, masks)], [(images, masks)], epochs=2)
    assert "The calibration is not measured, since outputs of shape (6, 3, 5, 5)" in result.verdict.evidence
    with pytest.raises(ValueError, match=r"'val/refined_loss', which was not measured \(outputs of shape"):
        trainer_of(model, None, fw.EarlyStopping("val/refined_loss")).fit(
            [(images, masks)], [(images, masks)], epochs=2
        )


@pytest.mark.parametrize("monitor", ["val/loss", "val/refined_loss"])
def test_the_calibration_is_that_of_the_restored_weights(monitor, tmp_path):
    """After restoring, result.calibration, predict and best.pt fit the restored model; Calibrated applies it."""
    train, val = loaders()
    model = network()
    trainer = trainer_of(
        model, None, fw.OverfittingDetector(), fw.EarlyStopping(monitor, patience=50), fw.Checkpoint(tmp_path)
    )
    result = trainer.fit(train, val, epochs=25)
    assert result.best.epoch < 20
    z, y = outputs_of(model, val)
    found = result.calibration
    assert found.temperature == pytest.approx(fit_temperature(Rows.of(z, y)), rel=1e-6)
    assert found.calibrated_log_loss == result.best.metrics["val/refined_loss"]
    probabilities = trainer.predict(val, proba=True, calibrated=True)
    torch.testing.assert_close(probabilities, (z / found.temperature).softmax(1))
    assert F.nll_loss(probabilities.log(), y) < F.cross_entropy(z, y)
    wrapped = fw.Calibrated(model, found).eval()
    torch.testing.assert_close(wrapped(next(iter(val))[0]), trainer.predict(val, calibrated=True)[:64])
    biased = fw.Calibrated(model, found, biases=True)
    torch.testing.assert_close(biased(next(iter(val))[0]), z[:64] / found.biased_temperature + found.biases)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)["calibration"]
    assert fw.Calibration.from_state_dict(saved).temperature == found.temperature
    with torch.no_grad():
        shapes = {"args": ({0: torch.export.Dim("batch")},)}
        exported = torch.export.export(wrapped, (torch.zeros(3, 6),), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(torch.ones(5, 6)), wrapped(torch.ones(5, 6)))
        torch.testing.assert_close(exported(torch.ones(3, 6)), wrapped(torch.ones(3, 6)))
    other = fw.Calibrated(network(), fw.Calibration.from_state_dict({**saved, "temperature": 9.0}))
    other.load_state_dict(wrapped.state_dict())
    torch.testing.assert_close(other(torch.ones(3, 6)), wrapped(torch.ones(3, 6)))


def test_a_resumed_fit_has_the_same_figures_and_the_same_calibration(tmp_path):
    """Interrupted and resumed, history, verdict and calibration are those of a fit in one go, to the bit."""

    def fit(folder, epochs, **options):
        train, val = loaders()
        model = network()
        rule = fw.rules.OverfittingRule(min_rise=0.01)
        callbacks = [fw.OverfittingDetector(rule=rule), fw.EarlyStopping(patience=90), fw.Checkpoint(folder)]
        return trainer_of(model, None, *callbacks).fit(train, val, epochs=epochs, **options)

    whole = fit(tmp_path / "a", 24)
    fit(tmp_path / "b", 16)
    resumed = fit(tmp_path / "b", 24, resume="auto")
    assert resumed.history == whole.history
    assert resumed.verdict == whole.verdict
    assert resumed.verdict.overfitting
    assert resumed.verdict.cause is not None
    assert resumed.calibration.temperature == whole.calibration.temperature
    assert torch.equal(resumed.calibration.biases, whole.calibration.biases)


def test_decisions_stay_without_class_weights_and_move_with_them():
    """A temperature alone keeps every decision; taking class weights off moves them to the common class."""
    for loss in (fw.CrossEntropy(), fw.CrossEntropy([1.0, 4.0])):
        train, val = loaders()
        model = network()
        found = trainer_of(model, loss, fw.OverfittingDetector()).fit(train, val, epochs=4).calibration
        z, y = outputs_of(model, val)
        for name, logits in {
            "outputs": z,
            "calibrated": found.logits(z),
            "biased": found.logits(z, biases=True),
        }.items():
            assert torch.equal(found.decisions[name].long(), fw.losses.confusion_matrix(logits.argmax(1), y, 2))
        same = torch.equal(found.decisions["outputs"], found.decisions["calibrated"])
        assert same is not loss.has_weights
    assert found.decisions["calibrated"][:, 0].sum() > found.decisions["outputs"][:, 0].sum()


def test_several_labels_share_a_temperature():
    """For labels that do not exclude each other, the outputs keep their shape and get the sigmoid."""
    x, y = examples()
    y = torch.stack([y, 1 - y, (x[:, 3] > 0).long()], 1).float()
    model = network(3)
    trainer = trainer_of(model, fw.BinaryCrossEntropy(torch.tensor([1.0, 2.0, 3.0])), fw.OverfittingDetector())
    found = trainer.fit([(x[:100], y[:100])], [(x[100:], y[100:])], epochs=5).calibration
    z = model(x[100:]).detach() - torch.tensor([1.0, 2.0, 3.0]).log()
    assert found.temperature == pytest.approx(fit_temperature(Rows.of(z, y[100:])), rel=1e-5)
    torch.testing.assert_close(
        trainer.predict([x[100:]], proba=True, calibrated=True), (z / found.temperature).sigmoid()
    )


def test_wrong_models_and_calibrations_are_refused():
    """No calibration, outputs of another shape, and a model with several outputs are errors that say what to do."""
    _, val = loaders()
    model = network()
    with pytest.raises(TypeError, match="result.calibration is None"):
        fw.Calibrated(model, None)
    found = trainer_of(model, None, fw.OverfittingDetector()).fit(val, val, epochs=1).calibration
    with pytest.raises(ValueError, match=r"for outputs of shape \(N, 2\), got \(4, 3\)"):
        fw.Calibrated(network(3), found)(torch.zeros(4, 6))
    with pytest.raises(TypeError, match="one tensor of logits"):
        fw.Calibrated(nn.LSTM(6, 2), found)(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="a calibration must have temperature"):
        fw.Calibration.from_state_dict({"temperature": 1.0})
    with pytest.raises(ValueError, match="finite and above 0"):
        fw.Calibration.from_state_dict({**found.state_dict(), "temperature": 0.0})
    for name, value in (("biased_temperature", "a"), ("temperature", None), ("shift", "a")):
        with pytest.raises(ValueError, match="this is not a calibration"):
            fw.Calibration.from_state_dict({**found.state_dict(), name: value})
    with pytest.raises(TypeError, match="model must be a module"):
        fw.Calibrated("model", found)
    with pytest.raises(TypeError, match="one tensor of logits"):
        found.logits([[0.0, 1.0]])


def test_of_many_logits_a_fixed_part_is_kept(monkeypatch):
    """Above the limit a random part of the examples stays: bounded, the same each time, and of any batch size's scale."""
    monkeypatch.setattr(kept_logits, "MOST", 3000)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 3, generator=generator) * 4
    y = (z / 2).softmax(1).multinomial(1, generator=generator).squeeze(1)
    parts = []
    for _ in range(2):
        kept = KeptLogits(fw.CrossEntropy(), fw.CrossEntropy())
        for a, b in zip(z.split(64), y.split(64), strict=True):
            kept.add(a, b, None)
            assert sum(batch[0].numel() for batch, _ in kept._kept) <= 3000
        parts.append(kept.refined())
    assert torch.equal(parts[0].rows.logits, parts[1].rows.logits)
    assert 400 < len(parts[0].rows) <= 1000
    assert parts[0].temperature == pytest.approx(2, rel=0.25)


def test_a_copy_is_kept_not_the_models_own_memory():
    """Outputs that a step overwrites after the metrics have seen them do not reach the fit."""
    kept = KeptLogits(fw.CrossEntropy(), fw.CrossEntropy())
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    kept.add(z, torch.tensor([0, 1]), None)
    wanted = Rows.of(z.clone(), torch.tensor([0, 1]))
    z.fill_(torch.nan)
    assert torch.equal(kept.refined().rows.logits, wanted.logits)


def test_outputs_that_are_not_finite_give_nan_and_no_error():
    """A diverging model has no refined loss at that evaluation; training goes on."""
    kept = KeptLogits(fw.CrossEntropy(), fw.CrossEntropy())
    kept.add(torch.tensor([[torch.nan, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), None)
    assert kept.refined() is None
    assert kept.unknown is None


def overconfident(scale, n=3000, worse=0.0):
    """A step after which a model is surer of the same ranking, or ranks worse."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(n, 3, generator=generator) * 1.5
    y = z.softmax(1).multinomial(1, generator=generator).squeeze(1)
    noise = torch.randn(n, 3, generator=generator)
    return [(z * (1 + scale * i) + worse * i * noise, y) for i in range(30)]


class Given(nn.Module):
    """Returns prepared logits, other ones in each epoch; its parameter only makes the training loss fall."""

    def __init__(self, steps):
        super().__init__()
        self.bias, self.steps, self.epoch = nn.Parameter(torch.zeros(())), steps, 0

    def forward(self, index):
        z = self.steps[self.epoch][0]
        if index.numel() != len(z):  # the training batch: ever surer of class 0
            return torch.tensor([[1.0 + self.epoch, 0.0, 0.0]]) + self.bias * 0
        return z + self.bias * 0


class NextEpoch(fw.Callback):
    def on_epoch_end(self, state):
        state.model.epoch = min(state.model.epoch + 1, 29)


@pytest.mark.parametrize(
    ("scale", "worse", "n", "cause"),
    [(0.2, 0.0, 3000, "confidence"), (0.05, 0.15, 3000, "model"), (0.2, 0.03, 60, "open")],
)
def test_the_verdict_says_which_part_rose(scale, worse, n, cause):
    """Scaled logits are confidence, which a temperature undoes; noise makes the model worse; few examples leave it open."""
    steps = overconfident(scale, n, worse)
    model = Given(steps)
    val = [(torch.zeros(n), steps[0][1])]
    train = [(torch.zeros(1), torch.zeros(1, dtype=torch.int64))]
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        callbacks=[NextEpoch(), fw.OverfittingDetector(probe_examples=1)],
        device="cpu",
    )
    verdict = trainer.fit(train, val, epochs=25).verdict
    assert verdict.overfitting
    assert verdict.cause == cause
    if cause == "confidence":
        assert verdict.calibration_share == pytest.approx(1, abs=0.05)
        assert "it is overconfident only" in verdict.evidence
    if cause == "model":
        assert verdict.refined_rise > 2 * verdict.refined_rise_se
        assert "worse." in verdict.evidence
    if cause == "open":
        assert "validation examples would tell" in verdict.evidence


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_figures(tmp_path):
    """Two processes measure what one does, also of a part of the logits."""
    script = Path(__file__).with_name("_ranks.py")
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        subprocess.run(
            [sys.executable, *launch, str(script), str(folder), "calibrated"], check=True, capture_output=True
        )
        found.append(torch.load(folder / "calibrated-0.pt", weights_only=False))
    for whole, parts in zip(*(f["history"] for f in found), strict=True):
        assert whole.keys() >= NAMES
        assert whole["val/temperature"] == pytest.approx(parts["val/temperature"], rel=1e-9)
        assert whole["val/refined_loss"] == pytest.approx(parts["val/refined_loss"], rel=1e-9)
    assert found[0]["examples"] == found[1]["examples"]


def test_a_hand_written_loop_has_the_same_figures():
    """With Watch, in a plain loop, history, verdict and calibration are those of the Trainer."""
    x, y = examples()
    train, val = [(x[:100], y[:100])] * 5, list(zip(x[100:].split(64), y[100:].split(64), strict=True))
    model = network()
    expected = trainer_of(model, None, fw.OverfittingDetector(probe_examples=0)).fit(train, val, epochs=6)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    detector = fw.OverfittingDetector(probe_examples=0)
    with fw.Watch(model, optimizer, [detector], train_loader=train, val_loader=val) as watch:
        for _ in watch.epochs(6):
            for inputs, targets in watch.train():
                watch.loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            with watch.validating():
                for inputs, targets in val:
                    watch.loss(model(inputs), targets)
    assert watch.result.history == expected.history
    assert watch.result.calibration.temperature == expected.calibration.temperature


def test_steps_after_the_last_evaluation_leave_no_calibration():
    """A calibration of older weights is not handed over."""
    x, y = examples()
    train, val = [(x[:100], y[:100])] * 5, [(x[100:], y[100:])]
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with fw.Watch(model, optimizer, [fw.OverfittingDetector()], train_loader=train, val_loader=val) as watch:
        for epoch in watch.epochs(2):
            for inputs, targets in watch.train():
                watch.loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            if epoch == 0:
                watch.validate()
                assert watch.state.calibration is not None
    assert watch.result.calibration is None


def test_early_stopping_on_the_refined_loss_compares_the_same_examples():
    """min_delta in standard errors is that of the paired gain of the refined losses; no detector is needed."""
    train, val = loaders()
    model = network()
    stop = fw.EarlyStopping("val/refined_loss", patience=3, min_delta="1se")
    result = trainer_of(model, None, stop).fit(train, val, epochs=40)
    assert "of the difference" in result.stop_reason
    assert result.best.metrics["val/refined_loss"] == min(e["val/refined_loss"] for e in result.history)
    assert result.calibration is not None


def test_a_metric_of_the_same_name_is_the_users():
    """A metric called log_loss or temperature keeps its value; the calibration is measured beside it."""
    train, val = loaders()
    model = network()
    trainer = fw.Trainer(
        model,
        torch.optim.Adam(model.parameters(), 0.01),
        callbacks=fw.OverfittingDetector(),
        metrics={"temperature": lambda o, t: -5.0},
        device="cpu",
    )
    result = trainer.fit(train, val, epochs=2)
    assert [entry["val/temperature"] for entry in result.history] == [-5.0, -5.0]
    assert result.calibration.temperature > 0


def test_half_precision_outputs_are_calibrated_in_float32():
    """A model in bfloat16 gives float32 calibrated logits that do not lose the scale."""
    train, val = loaders()
    found = trainer_of(network(), None, fw.OverfittingDetector()).fit(train, val, epochs=2).calibration
    half = fw.Calibrated(network().to(torch.bfloat16), found)
    z = half.model(torch.ones(3, 6, dtype=torch.bfloat16))
    assert half(torch.ones(3, 6, dtype=torch.bfloat16)).dtype is torch.float32
    torch.testing.assert_close(half(torch.ones(3, 6, dtype=torch.bfloat16)), z.float() / found.temperature)
