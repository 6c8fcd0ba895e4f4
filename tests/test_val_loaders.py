"""Several validation loaders by name, and a validation before the first step."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from tests._events import points

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(60) % 3
A, B = DataLoader(TensorDataset(X[:20], Y[:20]), 8), DataLoader(TensorDataset(X[20:50], Y[20:50]), 8)
TRAIN = DataLoader(TensorDataset(X[30:], Y[30:]), 10)


def new(*callbacks, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.5), callbacks=callbacks, device="cpu", **options)


def each(outputs, targets):
    return torch.stack([(outputs.argmax(1)[targets == k] == k).double().mean() for k in range(3)])


def equipped(tmp_path):
    stop = fw.EarlyStopping("val/b/loss", patience=50)
    return [fw.WeightedLoss("balanced"), fw.OverfittingDetector(), stop, fw.TensorBoard(tmp_path, show_link=False)]


def test_all_loaders_are_measured_and_the_first_decides(tmp_path):
    """val/a/... and val/b/... are what a fit with each alone measures, and val/... is the first's, to the bit."""
    trainer = new(*equipped(tmp_path / "both"), metrics={"each": each})
    result = trainer.fit(TRAIN, {"a": A, "b": B}, epochs=4)
    for name, loader in (("a", A), ("b", B)):
        alone = new(fw.WeightedLoss("balanced"), metrics={"each": each}).fit(TRAIN, loader, epochs=4)
        for entry, expected in zip(result.history, alone.history, strict=True):
            for key in ("loss", "loss_unweighted", "each/0", "each/2"):
                assert entry[f"val/{name}/{key}"] == expected[f"val/{key}"]
                if name == "a":
                    assert entry[f"val/{key}"] == expected[f"val/{key}"]
    single = new(fw.WeightedLoss("balanced"), fw.OverfittingDetector(), metrics={"each": each})
    assert single.fit(TRAIN, A, epochs=4).verdict == result.verdict
    best = min(result.history, key=lambda entry: entry["val/b/loss"])
    assert result.best.metrics == best
    assert trainer.validate(B)["val/loss"] == best["val/b/loss"]
    drawn = points(tmp_path / "both" / "run" / "val", "b/loss")
    assert drawn == [(e["step"], pytest.approx(e["val/b/loss"])) for e in result.history]


def test_a_watch_measures_all_with_validate():
    """watch.validate() measures all loaders; validating() can't know which loader its batches are from, and says so."""
    trainer = new(metrics={"each": each})
    history = trainer.fit(TRAIN, {"a": A, "b": B}, epochs=1).history
    again = new()
    model, optimizer = again.model, again.optimizer
    options = {"train_loader": TRAIN, "val_loader": {"a": A, "b": B}, "metrics": {"each": each}}
    with fw.Watch(model, optimizer, **options) as watch:
        for _ in watch.epochs(1):
            for inputs, targets in watch.train():
                watch.loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            with pytest.raises(ValueError, match=r"has several: call watch\.validate\(\)"):
                watch.validating()
            watch.validate()
    assert watch.result.history == history


@pytest.mark.parametrize(
    ("loaders", "kind", "match"),
    [
        ({}, ValueError, "val_loader is an empty dict"),
        ({"a/b": A}, ValueError, "named 'a/b': a name must not be empty, contain a slash"),
        ({"loss": A}, ValueError, "named 'loss'"),
        ({"each": A}, ValueError, "named 'each'"),
        ({1: A}, TypeError, "names must be strings, got 1"),
        ({"a": A, "b": []}, ValueError, r"val_loader\['b'\] is empty"),
        ({"a": [], "b": A}, ValueError, r"val_loader\['a'\] is empty"),
        ({"a": A, "b": 3}, TypeError, r"val_loader\['b'\] must be an iterable of batches"),
        ({"a": A, "b": None}, TypeError, r"val_loader\['b'\] must be an iterable of batches, got NoneType"),
        ({"a": None}, TypeError, r"val_loader\['a'\] must be an iterable of batches, got NoneType"),
        ({"a": A, "b": {"c": A}}, TypeError, r"val_loader\['b'\] must be one loader, got a dict"),
    ],
)
def test_bad_names_and_loaders_are_refused(loaders, kind, match):
    """Names that would collide with others, and values that are no loaders, are errors before step 1."""
    with pytest.raises(kind, match=match):
        new(metrics={"each": each}).fit(TRAIN, loaders, epochs=1)


def test_a_monitored_loader_must_exist():
    """A misspelt loader is refused before step 1, with the names that there are."""
    with pytest.raises(ValueError, match=r"monitors 'val/c/loss', which this fit will not measure; .*val/b/loss"):
        new(fw.EarlyStopping("val/c/loss")).fit(TRAIN, {"a": A, "b": B}, epochs=1)
    with pytest.raises(TypeError, match="one loader is measured at a time"):
        new().validate({"a": A})


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_validate_first_measures_the_untrained_model(tmp_path, several, stream):
    """The first entry, at step 0, is what validate returns before the fit; the rest is as without it."""
    val = {"a": A, "b": B} if several else A
    train = (batch for _ in range(3) for batch in TRAIN) if stream else TRAIN
    before = new().validate(A)["val/loss"]
    detector = fw.OverfittingDetector(calibration=False)  # which the fit without it does not measure
    callbacks = [detector, fw.EarlyStopping(rule=fw.rules.PQ(1e6)), fw.Checkpoint(tmp_path / "c")]
    board = fw.TensorBoard(tmp_path / "runs", show_link=False)
    options = {"max_steps": 9} if stream else {"epochs": 3}
    first = new(*callbacks, board).fit(train, val, validate_first=True, **options)
    rest = new().fit([*TRAIN] * 3 if stream else TRAIN, val, **options).history
    assert (first.history[0]["epoch"], first.history[0]["step"]) == (0, 0)
    assert first.history[0]["val/loss"] == before
    assert math.isnan(first.history[0]["train/loss"])
    assert first.history[1:] == rest
    assert "not like for like" not in first.verdict.evidence
    steps = [e["step"] for e in first.history]
    assert [s for s, _ in points(tmp_path / "runs/run/val", "loss")] == steps
    assert [s for s, _ in points(tmp_path / "runs/run/train", "loss")] == steps[1:]


@pytest.mark.parametrize("rule", [fw.rules.GL(50), fw.rules.UP(3), fw.rules.Patience(patience=3)])
def test_rules_take_a_first_evaluation_without_a_training_loss(rule):
    """No stopping rule takes the missing training loss of step 0 for a non-finite one."""
    result = new(fw.EarlyStopping(rule=rule)).fit(TRAIN, A, epochs=3, validate_first=True)
    assert result.stop_reason is None
    assert len(result.history) == 4
    with pytest.raises(ValueError, match="validate_first needs a val_loader"):
        new().fit(TRAIN, epochs=1, validate_first=True)


def test_validate_first_of_a_resumed_fit_is_left_out(tmp_path):
    """A resumed fit has the history of one go, with the evaluation at step 0 once."""

    def run(epochs):
        trainer = new(fw.Checkpoint(tmp_path))
        return trainer.fit(TRAIN, A, epochs=epochs, validate_first=True, resume="auto").history

    run(1)
    assert [entry["step"] for entry in run(3)] == [0, 3, 6, 9]
