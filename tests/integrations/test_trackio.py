"""fitwatch's records in Trackio."""

import contextlib
import json
import sqlite3

import pytest

import fitwatch as fw
from tests.test_summary import Late, fit

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_run_has_curves_events_and_the_summary(tmp_path, monkeypatch):
    """Numbers with their steps, the stop and the summary come back; an infinite value is one."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="trackio is in the extra of this name")
    from fitwatch.integrations.trackio import TrackioLog  # noqa: PLC0415 - it reads the folder when it is imported

    log = TrackioLog("guests", name="mine", embed=False)
    _, result, _ = fit(log, Late(), fw.EarlyStopping(patience=3))
    with contextlib.closing(sqlite3.connect(tmp_path / "guests.db")) as store:
        rows = [(step, json.loads(text)) for step, text in store.execute("select step, metrics from metrics")]
        settings = json.loads(store.execute("select config from configs").fetchone()[0])
    losses = [(step, row["val/loss"]) for step, row in rows if "val/loss" in row]
    assert losses == [(e["step"], e["val/loss"]) for e in result.history]
    assert settings["late"] == "set"
    assert float(next(row["train/odd"] for step, row in rows if step == 3 and "train/odd" in row)) == float("inf")
    assert any(result.stop_reason.partition(": ")[2] in str(row.get("early stop")) for _, row in rows)
    assert any(row.get("best/val/loss") == result.best.metrics["val/loss"] for _, row in rows)
