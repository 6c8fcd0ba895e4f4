"""The records that any writer gets: events with a text, times, and the summary after the end."""

import csv
import math
import time

import pytest
import torch
from torch import nn

import fitwatch as fw
from tests._events import read


class Writer(fw.Callback):
    """Keeps all records, and what the state said."""

    def __init__(self, *, summarizes=True):
        self.calls, self.summarizes = [], summarizes

    def on_fit_start(self, state):
        if self.summarizes:
            state.summarize()

    def on_log(self, state):
        self.calls.append((state.ended, list(state.records)))

    def on_fit_end(self, state):
        self.calls.append(("closed", []))


class Late(fw.Callback):
    """Adds a setting as late as it may, and one value that no chart can show."""

    def on_fit_start(self, state):
        state.settings["late"] = "set"

    def on_step_end(self, state):
        state.log("train/odd", math.inf if state.progress.step == 3 else 1.0, reduce="last")


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    y = (x[:, 0] + torch.randn(120, generator=generator) > 0.5).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    loaders = list(zip(x[:60].split(20), y[:60].split(20), strict=True)), [(x[60:], y[60:])]
    return model, torch.optim.Adam(model.parameters(), 0.02), loaders


def fit(*callbacks, epochs=12, **options):
    model, optimizer, loaders = problem()
    trainer = fw.Trainer(model, optimizer, callbacks=callbacks, device="cpu", log_every=1)
    return trainer, trainer.fit(*loaders, epochs=epochs, **options), loaders


def test_the_last_on_log_has_the_summary():
    """After training, and before on_fit_end, a writer gets best values, baseline, confusion matrix, curve and report."""
    writer = Writer()
    started = time.time()
    trainer, result, (_, val) = fit(fw.EarlyStopping(patience=3, restore_best=True), writer)
    assert [kind for kind, _ in writer.calls[-3:]] == [False, True, "closed"]
    summary = {record.name: record for record in writer.calls[-2][1]}
    best = result.best
    assert {name: summary[f"best/{name}"].value for name in best.metrics if name != "step"} == {
        name: value for name, value in best.metrics.items() if name != "step"
    }
    assert all(record.step == best.step for name, record in summary.items() if name.startswith("best/"))
    assert summary["baseline/val/loss"].value == trainer.state.baseline.constant
    assert result.stop_reason in summary["report/end"].value
    assert all(started <= record.time <= time.time() for record in summary.values())
    # The best weights are restored by now: precision and recall of class 1 at the threshold 1/2, counted another way.
    (x, y), curve = val[0], summary["best/pr_curve/1"].value
    chosen = trainer.model(x).softmax(1)[:, 1] >= 0.5
    hits = float((chosen & (y == 1)).sum())
    assert (curve.x_name, curve.y_name) == ("recall", "precision")
    assert (curve.x[64], curve.y[64]) == pytest.approx((hits / float(y.sum()), hits / float(chosen.sum())))
    assert summary["best/confusion"].value.png.startswith(b"\x89PNG")


def test_without_a_request_there_is_no_summary():
    """A callback that does not ask gets no further on_log."""
    writer = Writer(summarizes=False)
    fit(writer, epochs=2)
    assert not any(ended is True for ended, _ in writer.calls)


def test_the_summary_survives_an_error_and_does_not_hide_it():
    """After an error the report names it, and a writer that fails in the last on_log hides neither it nor on_fit_end."""

    class Breaks(fw.Callback):
        def on_epoch_end(self, state):
            raise ZeroDivisionError("oops")

    class Full(Writer):
        def on_log(self, state):
            super().on_log(state)
            if state.ended:
                raise OSError("disk full")

    writer, full = Writer(), Full()
    with pytest.raises(ZeroDivisionError) as caught:
        fit(writer, full, Breaks())
    assert "ZeroDivisionError('oops')" in writer.calls[-2][1][-1].value
    assert writer.calls[-1][0] == full.calls[-1][0] == "closed"
    assert any("disk full" in note for note in caught.value.__notes__)


def test_an_event_says_what_happened_and_when_that_was_decided():
    """The marker of early stopping has its sentence, the step of the evaluation, and the step of the decision."""
    writer = Writer()
    _, result, _ = fit(fw.OverfittingDetector(), fw.EarlyStopping(patience=3), writer, epochs=60)
    events = {r.name: r for _, records in writer.calls for r in records if isinstance(r.value, fw.records.Marker)}
    stop = events["early stop"]
    assert result.stop_reason.endswith(stop.value.text)
    assert stop.value.decided == stop.step == result.history[-1]["step"]
    if "overfitting" in events:
        assert events["overfitting"].value.text
        assert events["overfitting"].value.decided > events["overfitting"].step


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_file_has_everything(tmp_path):
    """Settings come first, numbers keep all digits, infinite ones too, and the summary comes last."""
    log = fw.CSVLog(tmp_path / "log.csv")
    _, result, _ = fit(log, Late(), fw.EarlyStopping(patience=3))
    rows = rows_of(log.file)
    assert {"name": "setting/late", "value": "set"}.items() <= {**rows[0], **find(rows, "setting/late")[0]}.items()
    losses = [float(row["value"]) for row in find(rows, "val/loss")]
    assert losses == [entry["val/loss"] for entry in result.history]
    assert [row["value"] for row in find(rows, "train/odd")][:4] == ["1.0", "1.0", "inf", "1.0"]
    assert float(find(rows, "best/val/loss")[0]["value"]) == result.best.metrics["val/loss"]
    assert rows[-1]["name"] == "report/end"


def find(rows, name):
    return [row for row in rows if row["name"] == name]


def test_no_csv_file_is_lost(tmp_path):
    """A second fit gets a file of its own."""
    first, second = fw.CSVLog(tmp_path / "log.csv"), fw.CSVLog(tmp_path / "log.csv")
    fit(first, epochs=1)
    before = first.file.read_bytes()
    fit(second, epochs=1)
    assert (first.file.name, second.file.name) == ("log.csv", "log-2.csv")
    assert first.file.read_bytes() == before


def test_a_resumed_fit_continues_its_csv_file(tmp_path):
    """The file of a resumed fit has the rows of a whole one: those beyond the checkpoint are gone, no settings twice."""
    whole = fw.CSVLog(tmp_path / "whole.csv")
    fit(whole, epochs=6)

    class Crash(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 11:
                raise ZeroDivisionError

    def parts():
        return (fw.CSVLog(tmp_path / "parts.csv"), fw.Checkpoint(tmp_path / "saved"))

    with pytest.raises(ZeroDivisionError):
        fit(*parts(), Crash(), epochs=6)
    again, checkpoint = parts()
    fit(again, checkpoint, epochs=6, resume="auto")
    assert again.file.name == "parts.csv"

    def table(path):
        return [(r["step"], r["name"], r["value"]) for r in rows_of(path) if r["name"] != "report/end"]

    assert table(again.file) == table(whole.file)


@pytest.mark.parametrize(
    "tail", [b"3,17000", b"3,1700.0,val/loss,0.6", b"\n", b"\0\0\0", b"\xff,1,2,3\r\n", b"x,1,a,b\r\n"]
)
def test_a_file_that_a_crash_has_cut_off_is_continued(tmp_path, tail):
    """A last row that was not written whole, and bytes that are none, are dropped; all other rows stay."""

    def parts():
        return (fw.CSVLog(tmp_path / "log.csv"), fw.Checkpoint(tmp_path / "saved"))

    first, saver = parts()
    fit(first, saver, epochs=2)
    curves = [r for r in rows_of(first.file) if not r["name"].startswith(("best/", "baseline/", "report/"))]
    with first.file.open("ab") as file:
        file.write(tail)
    again, saver = parts()
    fit(again, saver, epochs=3, resume="auto")
    rows = rows_of(again.file)
    assert rows[: len(curves)] == curves
    assert [r["step"] for r in rows if r["name"] == "val/loss"] == ["3", "6", "9"]


def test_tensorboard_draws_the_summary_itself(tmp_path):
    """Beside a writer that asks for the summary, TensorBoard writes the same tags as alone."""
    alone, beside = (fw.TensorBoard(tmp_path / name, show_link=False) for name in ("alone", "beside"))
    fit(alone)
    fit(beside, Writer())
    for run in ("train", "val", "best"):
        assert read(alone.run_dir / run).Tags() == read(beside.run_dir / run).Tags()
