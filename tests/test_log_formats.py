"""The logs of other trainers: tables, JSON, and the folders of MLflow and DVCLive."""

import csv
import gzip
import json
import math

import pytest

import fitwatch as fw
from fitwatch.logs import LogError, NoLogsError, diagnose_logs
from tests.test_logs import TRAIN, VAL, write

EPOCHS = range(60)
CURVES = {"loss": TRAIN, "val_loss": VAL}


def only(report):
    """The one verdict there is."""
    (one,) = report.judged
    assert len(report.runs) == 1
    return one


def check(one, *, train, val, run=None, axis=None, first=0, apart=1):
    """The run was judged by these two series, with the verdict on the curves which were written, at these steps."""
    assert (one.train, one.val) == (train, val)
    assert one.losses == VAL
    expected = fw.diagnose(TRAIN, VAL)
    assert (one.verdict.status, one.verdict.onset, one.verdict.best) == ("overfitting", expected.onset, expected.best)
    assert one.steps == [first + apart * epoch for epoch in EPOCHS]
    assert run in (None, one.run)
    assert axis in (None, one.axis)


def write_table(path, columns, *, delimiter=","):
    """A table with these columns: name -> one value for each row, None for an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def test_ultralytics(tmp_path):
    """results.csv has box, cls and dfl losses, with padded names in its first versions: judged is their sum."""
    for name, pad in (("train", 0), ("train2", 14)):
        third = [[value / 4 for value in curve] for curve in (TRAIN, VAL)]
        half = [[value / 2 for value in curve] for curve in (TRAIN, VAL)]
        parts = {"box": third, "cls": third, "dfl": half}
        columns = {"epoch": EPOCHS, "time": EPOCHS}
        columns |= {f"train/{part}_loss".rjust(pad): curves[0] for part, curves in parts.items()}
        columns |= {"metrics/mAP50(B)": TRAIN, "metrics/precision(B)": TRAIN}
        columns |= {f"val/{part}_loss".rjust(pad): curves[1] for part, curves in parts.items()}
        write_table(tmp_path / "detect" / name / "results.csv", {**columns, "lr/pg0": TRAIN})
        (tmp_path / "detect" / name / "args.yaml").write_text("task: detect\n")
    report = diagnose_logs(tmp_path)
    assert [one.run for one in report.runs] == ["detect/train", "detect/train2"]
    for one in report.judged:
        assert one.val == "val/box_loss + val/cls_loss + val/dfl_loss"
        assert one.losses == pytest.approx(VAL, rel=1e-12)
        assert (one.axis, one.verdict.onset) == ("epoch", fw.diagnose(TRAIN, VAL).onset)
        assert "sum of its 3 parts" in one.notes[0]


@pytest.mark.parametrize("hole", ["", "nan"])
def test_lightning(tmp_path, hole):
    """metrics.csv has training and validation in different rows, with holes that are empty or NaN, and two counts."""
    rows = []
    for epoch in EPOCHS:
        rows += [[epoch, 20 * epoch + 9, 5.0, hole, hole], [epoch, 20 * epoch + 19, hole, hole, VAL[epoch]]]
        rows += [[epoch, 20 * epoch + 19, hole, TRAIN[epoch], hole]]
    columns = dict(
        zip(("epoch", "step", "train_loss_step", "train_loss_epoch", "val_loss"), zip(*rows, strict=True), strict=True)
    )
    write_table(tmp_path / "lightning_logs/version_0/metrics.csv", columns)
    one = only(diagnose_logs(tmp_path))
    check(one, train="train_loss_epoch", val="val_loss", run="lightning_logs/version_0", first=19, apart=20)
    assert one.notes == []


def test_nan_in_a_table_is_a_loss(tmp_path):
    """A loss that is NaN from some epoch on, or once, is no hole: the verdict is that on the curve."""
    for name, curve in (("end", [*VAL[:50], *[math.nan] * 10]), ("once", [*VAL[:30], math.nan, *VAL[31:]])):
        write_table(tmp_path / f"{name}.csv", {"epoch": EPOCHS, "loss": TRAIN, "val_loss": curve})
        one = only(diagnose_logs(tmp_path / f"{name}.csv"))
        assert len(one.losses) == 60
        assert fw.diagnose(TRAIN, curve).status == one.verdict.status


def test_hugging_face(tmp_path):
    """trainer_state.json: of several checkpoints the last has all; the mean loss at the end is no point of the curve."""
    history = []
    for i, (train, val) in enumerate(zip(TRAIN, VAL, strict=True), 1):
        history.append({"epoch": i / 2, "step": 50 * i, "loss": train, "grad_norm": 1.0, "learning_rate": 1e-4})
        history.append({"epoch": i / 2, "step": 50 * i, "eval_loss": val, "eval_runtime": 1.5})
    history.append({"epoch": 30.0, "step": 3000, "train_loss": 9.0, "train_runtime": 100.0, "total_flos": 1e18})
    for folder, count in (("out/checkpoint-900", 36), ("out/checkpoint-3000", 120)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"problem_type": null, "loss": "ce"}')
        state = {"best_metric": 0.5, "global_step": 3000, "log_history": history[:count]}
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps(state))
    check(only(diagnose_logs(tmp_path)), train="loss", val="eval_loss", run="out", first=50, apart=50, axis="step")
    state = {"log_history": history}
    (tmp_path / "out/trainer_state.json").write_text(json.dumps(state))
    check(only(diagnose_logs(tmp_path)), train="loss", val="eval_loss", run="out", first=50, apart=50)
    write(tmp_path / "out/runs/Dec01", {"train/loss": TRAIN, "eval/loss": VAL})
    assert only(diagnose_logs(tmp_path)).run == "out/runs/Dec01"


def test_keras(tmp_path):
    """CSVLogger, and the dictionary of a History."""
    curves = {"accuracy": TRAIN, "loss": TRAIN, "val_accuracy": TRAIN, "val_loss": VAL}
    write_table(tmp_path / "a/training.log", {"epoch": EPOCHS, **curves})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/history.json").write_text(json.dumps(curves))
    logger, history = diagnose_logs(tmp_path).judged
    check(logger, train="loss", val="val_loss", run="a", axis="epoch")
    check(history, train="loss", val="val_loss", run="b")


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding"),
    [("a.csv", ",", "utf-8"), ("a.tsv", "\t", "utf-8"), ("a.csv", ";", "utf-8-sig"), ("a.txt", ",", "utf-16")],
)
def test_tables_of_any_kind(tmp_path, name, delimiter, encoding):
    """Commas, tabs and semicolons with decimal commas, and any encoding, are told by the content."""
    write_table(tmp_path / name, {"Epoch": EPOCHS, "Train Loss": TRAIN, "Valid Loss": VAL}, delimiter=delimiter)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(".", ",") if delimiter == ";" else text, encoding=encoding)
    check(only(diagnose_logs(tmp_path)), train="Train Loss", val="Valid Loss", run=".", axis="epoch")


def test_json_lines(tmp_path):
    """Objects by line, flat, nested, or with the role in a field of its own; a line that is cut off is passed over."""
    kinds = {
        "flat": [{"epoch": i, "train_loss": TRAIN[i], "val_loss": VAL[i]} for i in EPOCHS],
        "nested": [{"epoch": i, "train": {"loss": TRAIN[i]}, "val": {"loss": VAL[i]}} for i in EPOCHS],
        "mode": [{"env_info": "x", "seed": None}]
        + [
            {"mode": mode, "epoch": i, "iter": 10, "loss": curve[i]}
            for i in EPOCHS
            for mode, curve in (("train", TRAIN), ("val", VAL))
        ],
    }
    for name, rows in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 60, "tra')
        one = only(diagnose_logs(tmp_path / f"{name}.jsonl"))
        train, val = ("train_loss", "val_loss") if name == "flat" else ("train/loss", "val/loss")
        check(one, train=train, val=val, axis="epoch")


def test_a_table_with_a_row_for_each_value(tmp_path):
    """The name of the value, or its role, stands in a column."""
    pairs = (("train", TRAIN), ("val", VAL))
    rows = [(i, f"{role}/loss", curve[i]) for role, curve in pairs for i in EPOCHS]
    write_table(tmp_path / "a.csv", dict(zip(("step", "metric", "value"), zip(*rows, strict=True), strict=True)))
    rows = [(i, role, curve[i], 0.5) for i in EPOCHS for role, curve in pairs]
    write_table(tmp_path / "b.csv", dict(zip(("epoch", "split", "loss", "acc"), zip(*rows, strict=True), strict=True)))
    for one in diagnose_logs(tmp_path).judged:
        check(one, train="train/loss", val="val/loss")


def test_a_file_for_each_curve(tmp_path):
    """The CSV files that TensorBoard exports, and those of CatBoost, are one run in one folder."""
    for kind, names, columns in (
        ("tensorboard", ("run-x_train-tag-loss.csv", "run-x_val-tag-loss.csv"), ("Wall time", "Step", "Value")),
        ("catboost", ("learn_error.tsv", "test_error.tsv"), ("time", "iter", "Logloss")),
    ):
        for name, curve in zip(names, (TRAIN, VAL), strict=True):
            values = dict(zip(columns, (EPOCHS, EPOCHS, curve), strict=True))
            write_table(tmp_path / kind / name, values, delimiter="\t" if kind == "catboost" else ",")
    catboost, tensorboard = diagnose_logs(tmp_path).judged
    check(catboost, train="learn_error/Logloss", val="test_error/Logloss", run="catboost")
    check(tensorboard, train="run-x_train-tag-loss", val="run-x_val-tag-loss", run="tensorboard")


def test_two_runs_in_one_table(tmp_path):
    """A table that a second training has appended to, with or without a header, holds two runs; a resumed one is one."""
    columns = {"epoch": EPOCHS, "loss": TRAIN, "val_loss": VAL}
    write_table(tmp_path / "a/log.csv", columns)
    text = (tmp_path / "a/log.csv").read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/log.csv").write_text(text + text)
    (tmp_path / "c").mkdir()
    lines = text.splitlines(keepends=True)
    (tmp_path / "c/log.csv").write_text("".join([*lines, *lines[1:]]))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/log.csv").write_text("".join([*lines[:31], lines[0], *lines[31:]]))
    report = diagnose_logs(tmp_path)
    assert [one.run for one in report.judged] == ["a", "b#1", "b#2", "c#1", "c#2", "d"]
    for one in report.judged:
        check(one, train="loss", val="val_loss")


def test_mlflow(tmp_path):
    """A file for each metric with lines of time, value and step; names with slashes; the user's name of the run."""
    for run, (train, val) in {"aaa": ("train_loss", "val_loss"), "bbb": ("train/loss", "val/loss")}.items():
        folder = tmp_path / "mlruns/0" / run
        for name, curve in ((train, TRAIN), (val, VAL), ("lr", TRAIN)):
            file = folder / "metrics" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{1700000000000 + i} {value!r} {i}\n" for i, value in enumerate(curve)))
        (folder / "tags").mkdir()
        (folder / "tags/mlflow.runName").write_text("bold-shark-1")
        (folder / "params").mkdir()
        (folder / "params/epochs").write_text("60")
        (folder / "meta.yaml").write_text("name: x\n")
    first, second = diagnose_logs(tmp_path).judged
    check(first, train="train_loss", val="val_loss", run="mlruns/0/aaa")
    check(second, train="train/loss", val="val/loss", run="mlruns/0/bbb")
    assert first.notes == ["its name in MLflow is bold-shark-1"]


def test_dvclive(tmp_path):
    """A table for each metric, with and without a time stamp, in subfolders."""
    for run, stamp in (("a", True), ("b", False)):
        for side, curve in (("train", TRAIN), ("val", VAL)):
            times = {"timestamp": [1700000000000 + i for i in EPOCHS]} if stamp else {}
            path = tmp_path / run / "dvclive/plots/metrics" / side / "loss.tsv"
            write_table(path, {**times, "step": EPOCHS, "loss": curve}, delimiter="\t")
        (tmp_path / run / "dvclive/metrics.json").write_text('{"step": 59, "train": {"loss": 0.1}, "val": {"loss": 1}}')
    first, second = diagnose_logs(tmp_path).judged
    check(first, train="train/loss", val="val/loss", run="a/dvclive")
    check(second, train="train/loss", val="val/loss", run="b/dvclive")


def test_the_same_training_in_two_formats_is_one_run(tmp_path):
    """Event files and a table in one folder are judged once; where the event files lack the losses, the table is."""
    write_table(tmp_path / "a/results.csv", {"epoch": EPOCHS, "train/loss": TRAIN, "val/loss": VAL})
    write(tmp_path / "a", {"train/loss": TRAIN, "val/loss": VAL})
    write_table(tmp_path / "b/results.csv", {"epoch": EPOCHS, "train/loss": TRAIN, "val/loss": VAL})
    write(tmp_path / "b", {"lr": TRAIN})
    report = diagnose_logs(tmp_path)
    assert [one.run for one in report.runs] == ["a", "b/results.csv"]
    for one in report.judged:
        check(one, train="train/loss", val="val/loss")


def test_columns_by_name(tmp_path):
    """Columns that no guess would find are named; one that does not exist is refused with those there are."""
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS, "a": TRAIN, "b": VAL, "score": TRAIN})
    check(only(diagnose_logs(tmp_path / "log.csv", train="a", val="b")), train="a", val="b")
    with pytest.raises(LogError, match="no series is named 'c'; there are log.csv/a, log.csv/b"):
        diagnose_logs(tmp_path / "log.csv", train="a", val="c")


def test_other_tables_are_passed_over(tmp_path):
    """Tables of data, settings and results beside the logs are no runs; one that is named says what is wrong with it."""
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS, "loss": TRAIN, "val_loss": VAL})
    write_table(tmp_path / "labels.csv", {"image": list("abc"), "label": [0, 1, 2]})
    write_table(tmp_path / "scores.csv", {"id": [1, 2, 3], "score": [0.5, 0.25, 0.125]})
    (tmp_path / "config.json").write_text('{"loss": "ce", "loss_weight": 1.0}')
    (tmp_path / "notes.txt").write_text("the loss is fine\n")
    (tmp_path / "accounts.csv").write_text("account,map,return\n" + "1,2,3\n" * 3)
    report = diagnose_logs(tmp_path)
    assert ([one.run for one in report.runs], report.skipped) == (["."], [])
    with pytest.raises(NoLogsError, match="notes.txt: has no header with the names of columns"):
        diagnose_logs(tmp_path / "notes.txt")
    (unusable,) = diagnose_logs(tmp_path / "labels.csv").runs
    assert "only one series, label" in unusable.problem


def test_pointers_and_databases_say_what_to_do(tmp_path):
    """A Git LFS pointer and MLflow's database are named with what helps, and the other files are judged."""
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS, "loss": TRAIN, "val_loss": VAL})
    (tmp_path / "events.out.tfevents.1.host").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(100))
    report = diagnose_logs(tmp_path)
    check(only(report), train="loss", val="val_loss")
    assert [reason for text in report.skipped for reason in ("git lfs pull", "mlruns") if reason in text] == [
        "git lfs pull",
        "mlruns",
    ]


def test_duplicate_columns_are_kept_apart(tmp_path):
    """Of two columns of one name, the first keeps the name and the second gets a number; neither hides the other."""
    header = "epoch,loss,val_loss,loss,val_loss"
    rows = [f"{i},{TRAIN[i]},{VAL[i]},7,8" for i in EPOCHS]
    (tmp_path / "log.csv").write_text("\n".join([header, *rows]))
    check(only(diagnose_logs(tmp_path)), train="loss", val="val_loss", axis="epoch")
    again = only(diagnose_logs(tmp_path, train="loss.1", val="val_loss.1"))
    assert (again.losses, again.verdict.status) == ([8.0] * 60, "plateau")


@pytest.mark.parametrize("delimiter", ["\t", ";", ","])
def test_decimal_commas(tmp_path, delimiter):
    """Numbers with a decimal comma are read with any delimiter, quoted where it is a comma too."""
    columns = {name: [str(value).replace(".", ",") for value in curve] for name, curve in CURVES.items()}
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS, **columns}, delimiter=delimiter)
    check(only(diagnose_logs(tmp_path)), train="loss", val="val_loss", axis="epoch")


def test_commas_that_group_thousands(tmp_path):
    """In 1,234.5 the comma groups; a single comma in a table with semicolons is that of a decimal."""
    big = {name: [1e4 * (1 + value) for value in curve] for name, curve in CURVES.items()}
    grouped = {name: [f"{value:,.6f}" for value in curve] for name, curve in big.items()}
    write_table(tmp_path / "a" / "log.csv", {"epoch": EPOCHS, **grouped})
    assert only(diagnose_logs(tmp_path / "a")).losses == pytest.approx(big["val_loss"], abs=1e-6)
    decimals = {name: [f"{1 + value:.3f}".replace(".", ",") for value in curve] for name, curve in CURVES.items()}
    write_table(tmp_path / "b" / "log.csv", {"epoch": EPOCHS, **decimals}, delimiter=";")
    assert only(diagnose_logs(tmp_path / "b")).losses == pytest.approx([1 + value for value in VAL], abs=6e-4)


def test_commas_are_those_of_their_column(tmp_path):
    """A list of two numbers in another column does not turn the thousands of the steps into decimals."""
    columns = {"step": [f"{1000 * (i + 1):,}" for i in EPOCHS], **CURVES, "kernel": ["3,3"] * 60}
    write_table(tmp_path / "log.csv", columns)
    check(only(diagnose_logs(tmp_path)), train="loss", val="val_loss", axis="step", first=1000, apart=1000)


@pytest.mark.parametrize("name", ["fold{}_{}_loss", "{1}/seed_{0}/loss"])
def test_folds_are_judged_one_by_one(tmp_path, name):
    """The losses of folds or seeds in one table are not the parts of a loss: each has a verdict."""
    curves = {("1", "train"): TRAIN, ("1", "val"): VAL, ("2", "train"): TRAIN, ("2", "val"): TRAIN}
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS} | {name.format(*key): curve for key, curve in curves.items()})
    found = {one.part: one.verdict.status for one in diagnose_logs(tmp_path).judged}
    assert found == {name.format("1", "val"): "overfitting", name.format("2", "val"): "improving"}


def test_cells_that_are_no_numbers_are_named(tmp_path):
    """A cell of text among the losses is left out with a note that shows it; empty cells are not worth one."""
    losses = [f"{VAL[i]}" if i not in (3, 7) else "1.5 (best)" for i in EPOCHS]
    train = [f"{TRAIN[i]}" if i not in (4, 8) else ("", "None")[i == 8] for i in EPOCHS]
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS, "loss": train, "val_loss": losses})
    one = only(diagnose_logs(tmp_path))
    assert len(one.losses) == 58
    assert [note for note in one.notes if "cells" in note] == [
        "2 cells of val_loss left out, since not a number: 1.5 (best)"
    ]


def test_an_export_of_several_runs(tmp_path):
    """A table of Weights & Biases with the columns of two runs gives a verdict for each, and no sum of them."""
    columns = {"Step": EPOCHS}
    for run, val in (("brisk-owl-1", VAL), ("calm - sky-2", TRAIN)):
        for metric, curve in (("train_loss", TRAIN), ("val_loss", val)):
            columns |= {f"{run} - {metric}{end}": curve for end in ("", "__MIN", "__MAX")}
    write_table(tmp_path / "wandb.csv", columns)
    overfit, good = diagnose_logs(tmp_path).judged
    check(overfit, train="brisk-owl-1 - train_loss", val="brisk-owl-1 - val_loss", run=".#brisk-owl-1")
    assert (good.run, good.losses, good.verdict.status) == (".#calm - sky-2", TRAIN, "improving")


def test_names_that_are_asked_for_make_a_table(tmp_path):
    """In a folder, a table whose columns have no known name is read if --train or --val names one of them."""
    write_table(tmp_path / "log.csv", {"epoch": EPOCHS, "train_cost": TRAIN, "val_cost": VAL})
    with pytest.raises(NoLogsError):
        diagnose_logs(tmp_path)
    for names in ({"train": "train_cost", "val": "val_cost"}, {"val": "val_cost"}):
        check(only(diagnose_logs(tmp_path, **names)), train="train_cost", val="val_cost", axis="epoch")
    (tmp_path / "log.csv").unlink()
    rows = [{"epoch": i, "fit": {"train_cost": TRAIN[i], "val_cost": VAL[i]}} for i in EPOCHS]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check(only(diagnose_logs(tmp_path, val="fit/val_cost")), train="fit/train_cost", val="fit/val_cost")


def test_a_score_beside_the_parts_of_a_loss(tmp_path):
    """A score without one for the training is judged beside the sum of the training losses."""
    score = [1 - value / 2 for value in VAL]
    parts = {f"{role}/{part}_loss": TRAIN for role in ("train", "val") for part in ("box", "cls")}
    write_table(tmp_path / "results.csv", {"epoch": EPOCHS, **parts, "metrics/mAP50(B)": score})
    one = only(diagnose_logs(tmp_path, val="metrics/mAP50(B)", higher_is_better=True))
    assert one.train == "train/box_loss + train/cls_loss"
    assert one.train_losses == [2 * value for value in TRAIN]
    assert one.losses == pytest.approx([value / 2 for value in VAL])
    assert (one.verdict.status, one.verdict.best) == ("overfitting", fw.diagnose(TRAIN, VAL).best)


def test_a_trainer_state_that_says_nothing_is_named(tmp_path):
    """A trainer_state.json that is cut off, or has a single evaluation, is named with the reason."""
    state = json.dumps({"log_history": [{"loss": 1.0, "step": 1}, {"eval_loss": 1.0, "step": 1}]})
    (tmp_path / "trainer_state.json").write_text(state[:40])
    with pytest.raises(NoLogsError, match=r"trainer_state.json: is neither a whole JSON document"):
        diagnose_logs(tmp_path)
    (tmp_path / "trainer_state.json").write_text(state)
    assert [one.problem for one in diagnose_logs(tmp_path).runs] == ["eval_loss has 1 point: too few"]


def test_compressed_files_say_what_to_do(tmp_path):
    """A file that is compressed is refused by that reason, whatever its name."""
    for name, content in (("log.csv", gzip.compress(b"epoch,loss,val_loss")), ("log2.csv", b"PK\x03\x04...")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NoLogsError, match=f"{name}: compressed: unpack it first"):
            diagnose_logs(tmp_path / name)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_elbo_of_either_sign(tmp_path, sign):
    """An ELBO is judged in the direction in which its training curve goes, and a note says if that is upwards."""
    curves = {"train/elbo": [sign * value for value in TRAIN], "val/elbo": [sign * value for value in VAL]}
    write(tmp_path, curves)
    one = only(diagnose_logs(tmp_path))
    assert one.losses == VAL
    assert (one.verdict.status, one.verdict.best) == ("overfitting", fw.diagnose(TRAIN, VAL).best)
    assert any("bound" in note for note in one.notes) == (sign < 0)
