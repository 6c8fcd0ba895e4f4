"""Event files of real fits, read back from disk and through a running server."""

import itertools
import json
import math
import re
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from tests._events import bars, curve, points, read, texts
from tests._server import get, noisy_data, overfitting_trainer, post, serve

BARS = ("overfitting", "early stop")


def served(address, run, tag):
    """Return the points of a curve as served."""
    return [(step, value) for _, step, value in get(address, "scalars/scalars", run=run, tag=tag)]


def tensorboard(trainer):
    return trainer.callbacks[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return one folder of runs: a plain one, one resumed at epoch 10 of 18 after its end, and one of two fits."""
    folder, checkpoints = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("checkpoints")
    plain = overfitting_trainer(folder)
    result = plain.fit(*noisy_data(), epochs=60)

    first = overfitting_trainer(folder, name="resumed", callbacks=[fw.Checkpoint(checkpoints, keep=100)])
    first.fit(*noisy_data(), epochs=60)
    before = bars(folder / "resumed")
    resumed = overfitting_trainer(folder, name="resumed", callbacks=[fw.Checkpoint(checkpoints, keep=100)])
    again = resumed.fit(*noisy_data(), epochs=12, resume=checkpoints / "epoch-10.pt")

    twice = overfitting_trainer(folder, name="twice", patience=2)
    both = [twice.fit(*noisy_data(), epochs=60) for _ in range(2)]
    return SimpleNamespace(
        folder=folder, run=folder / "run", result=result, trainer=plain, before=before, again=again, both=both
    )


@pytest.fixture(scope="module")
def address(runs):
    """Serve all of them."""
    with serve(runs.folder) as address:
        yield address


# -- one run, read from disk ---------------------------------------------------------------------------------------


def test_the_training_overfits_and_stops(runs):
    """The fit of these tests has a best epoch in the middle, overfitting and an early stop."""
    assert runs.result.verdict.overfitting
    assert "early stopping" in runs.result.stop_reason
    assert 0 < runs.result.best.epoch < len(runs.result.history) - 1


def test_train_and_val_loss_share_a_tag_and_equal_the_history(runs):
    """`loss` of the sub-runs train and val is result.history, point by point, in float32."""
    for run in ("train", "val"):
        assert points(runs.run / run, "loss") == curve(runs.result.history, f"{run}/loss")
    assert points(runs.run / "val", "metrics/accuracy") == curve(runs.result.history, "val/accuracy")
    assert points(runs.run / "val", "loss_unweighted") == curve(runs.result.history, "val/loss_unweighted")


def test_optimizer_and_gradients_stand_in_train(runs):
    """Learning rate and gradient norms, total and per layer, have a point per log window; the maximum is never below the mean."""
    steps = list(range(2, runs.trainer.state.progress.step + 1, 2))
    layers = ["params/grad_norm/0", "params/grad_norm/2"]
    for tag in ("optim/lr", "optim/grad_norm", "optim/grad_norm_max", *layers):
        assert [step for step, _ in points(runs.run / "train", tag)] == steps, tag
    mean, largest = (points(runs.run / "train", f"optim/{name}") for name in ("grad_norm", "grad_norm_max"))
    assert all(high >= low > 0 for (_, high), (_, low) in zip(largest, mean, strict=True))
    assert {value for _, value in points(runs.run / "train", "optim/lr")} == {float(np.float32(0.002))}


def test_the_evidence_of_overfitting_stands_in_val(runs):
    """The gap is validation minus probe loss at every evaluation; rise, threshold and both losses are there too."""
    gap, probe = (points(runs.run / "val", f"overfit/{name}") for name in ("gap", "train_loss"))
    assert [step for step, _ in probe] == [entry["step"] for entry in runs.result.history]
    expected = [entry["val/loss"] - loss for entry, (_, loss) in zip(runs.result.history, probe, strict=True)]
    assert [value for _, value in gap] == pytest.approx(expected, abs=1e-6)
    assert points(runs.run / "val", "overfit/val_loss") == curve(runs.result.history, "val/loss")
    rise, threshold = (
        dict(points(runs.run / "val", "overfit/rise")),
        dict(points(runs.run / "val", "overfit/threshold")),
    )
    detected = runs.result.history[runs.result.verdict.detected]["step"]
    assert rise[detected] > threshold[detected]


def test_the_dot_is_the_best_evaluation(runs):
    """The sub-run best has one point of the loss and of each metric, at the step of result.best and with its values."""
    best = runs.result.best
    for tag, name in (("loss", "val/loss"), ("metrics/accuracy", "val/accuracy")):
        assert points(runs.run / "best", tag) == [(best.step, float(np.float32(best.metrics[name])))]
    assert points(runs.run / "best", "report/best_epoch") == [(best.step, best.epoch)]
    gap = best.metrics["val/loss"] - best.metrics["train/loss"]
    assert points(runs.run / "best", "report/gap_at_best") == [(best.step, pytest.approx(gap, rel=1e-6))]


def test_a_bar_spans_the_two_losses(runs):
    """Each bar is two points, (step, train loss) and (step + 1, validation loss): at the onset, and at the stop."""
    history = runs.result.history
    for name, entry in (("overfitting", history[runs.result.verdict.onset]), ("early stop", history[-1])):
        low, high = (float(np.float32(entry[f"{part}/loss"])) for part in ("train", "val"))
        assert points(runs.run / name, "loss") == [(entry["step"], low), (entry["step"] + 1, high)]


def test_the_texts(runs):
    """Settings and class weights are Markdown tables, and the overfitting warning is a text."""
    [(step, report)] = texts(runs.run / "train", "report/start")
    assert step == 0
    for row in (
        "| setting | value |\n|---|---|",
        "| optimizer | Adam |",
        "| lr | 0.002 |",
        "| class_weights | balanced |",
    ):
        assert row in report
    [(_, weights)] = texts(runs.run / "train", "report/class_weights")
    targets = noisy_data()[0].dataset.tensors[1]
    for label, count in enumerate(targets.bincount().tolist()):
        assert f"| {label} | {count} | {len(targets) / 2 / count:.4g} |" in weights
    [(step, warning)] = texts(runs.run / "val", "overfit/verdict")
    assert step == runs.result.history[runs.result.verdict.detected]["step"]
    assert "verfitting since epoch" in warning


def test_one_event_per_window_and_sub_run(runs):
    """A file holds its version, the texts of step 0, one event per log window and evaluation, and the seconds of each epoch."""
    count = {}
    for folder in runs.run.iterdir():
        [file] = folder.iterdir()
        count[folder.name] = sum(1 for _ in RawEventFileLoader(str(file)).Load())
    evaluations, windows = len(runs.result.history), runs.trainer.state.progress.step // 2
    assert count == {
        "train": 3 + windows + 2 * evaluations,
        "val": 1 + evaluations,
        "baseline": 1 + 5,
        "best": 2,
        "overfitting": 3,
        "early stop": 3,
    }


def test_the_baseline_is_a_line_of_few_points(runs):
    """The baseline is a level line from step 0 to the end, with points at the evaluations 1, 4, 16, ..."""
    baseline = points(runs.run / "baseline", "loss")
    assert {value for _, value in baseline} == {float(np.float32(runs.result.baseline.constant))}
    last = runs.result.history[-1]["step"]
    assert [step for step, _ in baseline] == [0, 6, 24, 96, last]


def test_the_baseline_ends_where_it_would_press_the_curves_down(tmp_path):
    """The line of the baseline ends at the last evaluation whose loss is at least half of it."""
    x = torch.randn(64, 10)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
    trainer = overfitting_trainer(tmp_path, lr=0.02, patience=50)
    history = trainer.fit(loader, loader, epochs=12).history
    level = trainer.state.baseline.constant
    above = [entry["step"] for entry in history if entry["val/loss"] >= level / 2]
    assert 0 < len(above) < len(history)
    assert [step for step, _ in points(tmp_path / "run/baseline", "loss")][-1] == above[-1]


def test_a_hundred_epochs_leave_six_files(tmp_path):
    """With every callback attached, an overfitting run of a hundred epochs has one file in each of six sub-runs."""

    class Stop(fw.Callback):
        def on_validation_end(self, state):
            if state.progress.epoch == 99:
                state.mark("early stop", state.metrics)

    callbacks = [fw.RealWorldCost([[0, 1], [5, 0]]), fw.Checkpoint(tmp_path / "saved"), fw.ProgressBar(), Stop()]
    result = overfitting_trainer(tmp_path, patience=200, callbacks=callbacks).fit(*noisy_data(), epochs=100)
    assert len(result.history) == 100
    assert sorted(f.parent.name for f in (tmp_path / "run").rglob("*") if f.is_file()) == [
        "baseline",
        "best",
        "early stop",
        "overfitting",
        "train",
        "val",
    ]


# -- one run, as served --------------------------------------------------------------------------------------------


def test_the_server_gives_the_same_curves(runs, address):
    """The server returns train and validation loss under one tag, equal to result.history, and the dot and the bars."""
    for run in ("train", "val"):
        assert served(address, f"run/{run}", "loss") == curve(runs.result.history, f"{run}/loss")
    best = runs.result.best
    assert served(address, "run/best", "loss") == [(best.step, float(np.float32(best.metrics["val/loss"])))]
    for bar in BARS:
        assert served(address, f"run/{bar}", "loss") == points(runs.run / bar, "loss")


def test_every_chart_of_the_custom_page_has_a_line(address):
    """The layout has three categories, and each chart has a series that matches a tag that this run logged."""
    page = get(address, "custom_scalars/layout")
    assert [c["title"] for c in page["category"]] == ["1 Overfitting", "2 Gradients", "3 Optimizer"]
    tags = get(address, "scalars/tags")
    tags = {*tags["run/train"], *tags["run/val"]}
    for chart in (chart for category in page["category"] for chart in category["chart"]):
        if patterns := chart.get("multiline", {}).get("tag", ()):
            assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), chart["title"]
        for series in chart.get("margin", {}).get("series", ()):  # plain names, not patterns
            assert set(series.values()) <= tags


def test_the_hparams_row(runs, address):
    """The HParams table has one row per run, with its name, its settings and the metrics of its best evaluation."""
    statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    body = {"experimentName": "", "startIndex": 0, "sliceSize": 10, "colParams": [], "allowedStatuses": statuses}
    groups = {g["name"]: g for g in post(address, "hparams/session_groups", body)["sessionGroups"]}
    assert set(groups) == {"run", "resumed", "twice"}
    row = groups["run"]
    settings = {k: v for k, v in runs.trainer.state.settings.items() if k != "device"}
    assert row["hparams"] == settings | {"peak_lr": settings["lr"]}
    assert [s["status"] for s in row["sessions"]] == ["STATUS_SUCCESS"]
    values = {m["name"]["tag"]: m["value"] for m in row["metricValues"]}
    assert values["loss"] == float(np.float32(runs.result.best.metrics["val/loss"]))
    assert values["report/best_epoch"] == runs.result.best.epoch


def test_the_texts_are_served(address):
    """The Text page has the start report as an HTML table, the class weights and the warning."""
    tags = get(address, "text/tags")
    assert sorted(tags["run/train"]) == ["report/class_weights", "report/start"]
    assert tags["run/val"] == ["overfit/verdict"]
    [report] = get(address, "text/text", run="run/train", tag="report/start")
    assert "<th>setting</th>" in report["text"]
    assert "<td>Adam</td>" in report["text"]


# -- resume, and a second fit --------------------------------------------------------------------------------------


def test_a_resumed_fit_goes_on_in_its_folder_without_overlap(runs, address):
    """A run resumed at epoch 10 of 18 to stop at 12 has 12 points per curve, those of the resumed history, on disk and served."""
    assert not (runs.folder / "resumed-2").exists()
    history = runs.again.history
    assert [entry["epoch"] for entry in history] == list(range(12))
    for run in ("train", "val"):
        assert points(runs.folder / "resumed" / run, "loss") == curve(history, f"{run}/loss")
        assert served(address, f"resumed/{run}", "loss") == curve(history, f"{run}/loss")
    steps = [step for step, _ in points(runs.folder / "resumed/train", "optim/lr")]
    assert steps == list(range(2, 12 * 6 + 1, 2))


def test_a_resumed_fit_loses_the_bars_that_did_not_happen(runs, address):
    """Bars drawn after the point of resumption are removed, even one with an onset before it; there is a single dot."""
    assert runs.before == sorted(BARS)
    assert bars(runs.folder / "resumed") == []
    assert len(points(runs.folder / "resumed/best", "loss")) == 1
    assert served(address, "resumed/best", "loss")[0][0] == runs.again.best.step


def test_bars_before_the_point_of_resumption_stay(tmp_path):
    """Resuming keeps earlier bars and the user's own files in the run's folder, and replaces later bars."""

    class Mark(fw.Callback):
        def on_epoch_end(self, state):
            if state.progress.epoch in (1, 3):
                state.mark(f"event {state.progress.epoch}", state.metrics)

    def make():
        return overfitting_trainer(tmp_path, callbacks=[Mark(), fw.Checkpoint(tmp_path / "saved", keep=9)])

    make().fit(*noisy_data(), epochs=4)
    assert bars(tmp_path / "run") == ["event 1", "event 3"]
    (tmp_path / "run/mine").mkdir()
    (tmp_path / "run/mine/notes.txt").write_text("kept")
    make().fit(*noisy_data(), epochs=3, resume=tmp_path / "saved/epoch-2.pt")
    assert bars(tmp_path / "run") == ["event 1", "event 3", "mine"]
    assert points(tmp_path / "run/event 1", "loss")[0][0] == 6
    assert len(points(tmp_path / "run/event 3", "loss")) == 2
    assert (tmp_path / "run/mine/notes.txt").read_text() == "kept"


def test_a_second_fit_continues_the_curve(runs):
    """Two fits of one trainer continue one curve in one folder; the second fit has a separate bar."""
    folder = runs.folder / "twice"
    assert not (runs.folder / "twice-2").exists()
    history = runs.both[1].history  # that of both
    assert points(folder / "val", "loss") == curve(history, "val/loss")
    assert points(folder / "train", "loss") == curve(history, "train/loss")
    assert {"early stop", "early stop 2"} <= set(bars(folder))
    for name, result in zip(("early stop", "early stop 2"), runs.both, strict=True):
        step = result.history[-1]["step"]
        assert [s for s, _ in points(folder / name, "loss")] == [step, step + 1]
    assert [s for s, _ in points(folder / "best", "loss")] == [runs.both[1].best.step]


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_name_in_use_gets_a_number(tmp_path):
    """Runs with the same name get numbered folders, also if one callback serves several trainers."""
    first = overfitting_trainer(tmp_path)
    first.fit(*noisy_data(), max_steps=2)
    for expected in ("run-2", "run-3"):
        trainer = overfitting_trainer(tmp_path)
        trainer.callbacks[-1] = tensorboard(first)
        trainer.fit(*noisy_data(), max_steps=2)
        assert tensorboard(first).run_dir == tmp_path / expected
        assert f"/{expected}/" not in tensorboard(first).link()
        assert expected in tensorboard(first).link()
    assert [step for step, _ in points(tmp_path / "run/val", "loss")] == [2]


@pytest.mark.parametrize("obstacle", ["logs", "logs/run"])
def test_a_path_that_cannot_be_a_folder_is_refused_before_step_1(tmp_path, obstacle):
    """If a file blocks the folder or its parent, OSError names the folder before the first step."""
    (tmp_path / obstacle).parent.mkdir(exist_ok=True)
    (tmp_path / obstacle).write_text("in the way")
    trainer = overfitting_trainer(tmp_path / "logs")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "logs/run"))):
        trainer.fit(*noisy_data(), epochs=1)
    assert trainer.state.progress.step == 0


def test_a_refused_fit_leaves_no_folder(tmp_path, capsys):
    """A fit that is refused before its first step leaves no empty folder, so the corrected fit gets the plain name."""
    trainer = overfitting_trainer(tmp_path, callbacks=[fw.EarlyStopping("val/nonesuch", mode="min")])
    with pytest.raises(ValueError, match="nonesuch"):
        trainer.fit(*noisy_data(), epochs=1)
    assert list(tmp_path.iterdir()) == []
    trainer = overfitting_trainer(tmp_path)
    trainer.fit(*noisy_data(), max_steps=2)
    assert tensorboard(trainer).run_dir == tmp_path / "run"


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", 3])
def test_a_name_that_is_no_folder_name_is_refused(name):
    """A run name must be a single path component."""
    with pytest.raises((ValueError, TypeError), match="name"):
        fw.TensorBoard("runs", name=name)


# -- what may go wrong ---------------------------------------------------------------------------------------------


def test_values_that_are_not_finite(tmp_path):
    """Non-finite and huge values do not end the fit; a text names the first of each curve once."""

    class Odd(fw.Callback):
        def on_step_end(self, state):
            state.log("train/odd", float("inf"))
            state.log("train/huge", 1e300)

    x, y = torch.randn(32, 10), torch.arange(32) % 2
    spoilt = x.clone()
    spoilt[5] = float("nan")
    train, val = (DataLoader(TensorDataset(inputs, y), 16) for inputs in (x, spoilt))
    trainer = overfitting_trainer(tmp_path, callbacks=[Odd()])
    result = trainer.fit(train, val, epochs=3)
    assert result.best is None
    assert [math.isnan(value) for _, value in points(tmp_path / "run/val", "loss")] == [True] * 3
    assert [value for _, value in points(tmp_path / "run/train", "metrics/odd")] == [math.inf] * 3
    # of several texts at one step the last has all
    said = (dict(texts(tmp_path / "run" / side, "report/warnings")).values() for side in ("train", "val"))
    warnings = "\n".join(itertools.chain(*said))
    assert warnings.count("at step 2: `loss` (nan)") == warnings.count("`metrics/odd` (inf)") == 1
    assert warnings.count("`loss`") == 1
    assert points(tmp_path / "run/best", "report/seconds")[0][0] == 6  # a row in the HParams table all the same


def test_two_warnings_at_one_step_are_both_kept(tmp_path):
    """Texts logged under one tag at one step become one text, since the server keeps one per step."""

    class Warn(fw.Callback):
        def on_validation_end(self, state):
            state.log("val/report/warnings", "first")
            state.log("val/report/warnings", "second")

    overfitting_trainer(tmp_path, callbacks=[Warn()]).fit(*noisy_data(), epochs=1)
    assert texts(tmp_path / "run/val", "report/warnings") == [(6, "first\n\nsecond")]


def test_an_error_still_closes_the_run(tmp_path):
    """A failed fit has its curves, its dot and a row with the status failure."""

    class Fail(fw.Callback):
        def on_epoch_start(self, state):
            if state.progress.epoch == 2:
                raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        overfitting_trainer(tmp_path, callbacks=[Fail()]).fit(*noisy_data(), epochs=4)
    assert len(points(tmp_path / "run/val", "loss")) == 2
    assert len(points(tmp_path / "run/best", "loss")) == 1
    end = read(tmp_path / "run/best").SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    assert b"\x08\x02" in end  # status 2: failure


def test_without_a_validation_set_or_plug_ins(tmp_path):
    """A fit without validation has one loss curve, its dot, and a custom page without empty charts."""
    torch.manual_seed(0)
    model = nn.Linear(10, 2)
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[fw.TensorBoard(tmp_path, show_link=False)],
        log_every=2,
    )
    result = trainer.fit(noisy_data()[0], epochs=3)
    assert points(tmp_path / "run/train", "loss") == curve(result.history, "train/loss")
    assert points(tmp_path / "run/best", "loss") == [curve(result.history, "train/loss")[result.best.epoch]]
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["best", "train"]
    layout = read(tmp_path / "run/train").Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"learning rate" in layout
    assert b"Gradients" not in layout


def test_the_start_report_waits_for_all_callbacks(tmp_path):
    """The start report names the class weights even if TensorBoard precedes WeightedLoss in the list."""
    trainer = overfitting_trainer(tmp_path)
    trainer.callbacks.insert(0, trainer.callbacks.pop())
    trainer.fit(*noisy_data(), max_steps=2)
    assert "| class_weights | balanced |" in texts(tmp_path / "run/train", "report/start")[0][1]


# -- the link ------------------------------------------------------------------------------------------------------


def test_the_link_opens_this_run_unsmoothed_with_pins(runs):
    """Smoothing is 0, the filter matches the sub-runs of this run alone, the loss is pinned first, and every pin has data."""
    parts = urlsplit(tensorboard(runs.trainer).link(port=1234))
    assert (parts.scheme, parts.netloc, parts.fragment) == ("http", "localhost:1234", "timeseries")
    query = parse_qs(parts.query, strict_parsing=True)
    assert query["smoothing"] == ["0"]
    assert query["runFilter"] == ["^run/"]
    [pins] = query["pinnedCards"]
    pins = json.loads(pins)
    assert pins[0] == {"plugin": "scalars", "tag": "loss"}
    logged = {tag for run in ("train", "val") for tag in read(runs.run / run).Tags()["scalars"]}
    assert [pin["plugin"] for pin in pins] == ["scalars"] * len(pins)
    assert {"metrics/accuracy", "overfit/gap", "optim/grad_norm_max"} <= {pin["tag"] for pin in pins} <= logged


@pytest.mark.parametrize("name", ["a+b (1)", "v1.0", "größe|x"])
def test_the_link_takes_the_name_literally(name):
    """A name with special characters of regular expressions or addresses matches only itself."""
    link = fw.TensorBoard("runs", name=name).link()
    assert link.isascii()
    [only] = parse_qs(urlsplit(link).query)["runFilter"]
    assert re.search(only, f"{name}/val")
    assert not any(
        re.search(only, f"{other}/val") for other in (f"{name}-2", f"my {name}", name.replace(".", "x") + "x")
    )


def test_command_and_link_are_printed_at_the_start(tmp_path, capsys):
    """The command, with the folder quoted for the shell, and the link are printed; the result has the link too."""
    folder = tmp_path / "all my runs"
    trainer = overfitting_trainer(folder)
    tensorboard(trainer).show_link = True
    result = trainer.fit(*noisy_data(), max_steps=2)
    printed = capsys.readouterr()
    assert printed.out.count(f"tensorboard --logdir '{folder}'\n") == 1
    assert printed.out.count("http://") == 1
    assert result.links["TensorBoard"] == tensorboard(trainer).link()
    assert printed.err.count(tensorboard(trainer).link()) == 1
