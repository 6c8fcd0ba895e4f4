"""fitwatch's records in Weights & Biases, offline."""

import json
import struct

import pytest

import fitwatch as fw
from tests.test_summary import Late, fit

wandb = pytest.importorskip("wandb", reason="wandb is in the extra of this name")
from fitwatch.integrations.wandb import WandbLog  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def chunks(data):
    """The records of the file: blocks of 32 KiB, each of chunks with checksum, length and kind (whole or a part)."""
    whole, at = b"", 7
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def records_of(folder):
    """The history rows, the summary and the settings in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2 as pb  # noqa: PLC0415 - only where wandb is installed

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows, summary, config = [], {}, {}
    for chunk in chunks(path.read_bytes()):
        record = pb.Record.FromString(chunk)
        if record.WhichOneof("record_type") == "history":
            rows.append(items(record.history.item))
        summary |= items(record.summary.update)
        config |= items(record.config.update) | items(record.run.config.update)
    return rows, summary, config


def items(group):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in group}


def test_an_offline_run_has_curves_settings_events_and_the_summary(tmp_path):
    """Numbers with their steps, settings, the stop and the summary are in the file; an infinite value is one."""
    log = WandbLog(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    _, result, _ = fit(log, Late(), fw.EarlyStopping(patience=3))
    wandb.teardown()  # the last rows are in the file
    rows, summary, config = records_of(tmp_path)
    losses = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
    assert losses == [(e["step"], e["val/loss"]) for e in result.history]
    assert config["late"] == "set"
    odd = [row["train/odd"] for row in rows if "train/odd" in row]
    assert float(odd[2]) == float("inf")
    assert result.stop_reason.partition(": ")[2] in summary["early stop"]["text"]
    assert summary["best/val/loss"] == result.best.metrics["val/loss"]
