"""Several runs: settings in one table, trials in one row, one link that compares them."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from torch import nn

import fitwatch as fw
from tests._events import read
from tests._server import get, noisy_data, overfitting_trainer, post, serve

STATUSES = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a complete run, a failed one of another kind, and three trials of one group."""
    folder = tmp_path_factory.mktemp("runs")
    overfitting_trainer(folder, name="full").fit(*noisy_data(), epochs=3)

    class Fail(fw.Callback):
        def on_epoch_end(self, state):
            raise RuntimeError("planted")

    model = nn.Sequential(nn.Linear(10, 1), nn.Flatten(0))
    page = fw.TensorBoard(folder, name="failed", show_link=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = fw.Trainer(
        model, optimizer, fw.BinaryCrossEntropy(), callbacks=[page, Fail()], scheduler=scheduler, clip_norm=1.0
    )
    loader = [(x, y.float()) for x, y in noisy_data()[0]]
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(loader, loader, epochs=1)

    for seed in range(3):
        trial = overfitting_trainer(folder, name=f"trial-{seed}")
        trial.seed = seed
        trial.callbacks[-1].group = "trials"
        trial.fit(*noisy_data(), epochs=2)
    return folder


def table(address):
    """Return the columns of the HParams page, and its rows by name."""
    body = {"experimentName": "", "startIndex": 0, "sliceSize": 50, "colParams": [], "allowedStatuses": STATUSES}
    experiment = post(address, "hparams/experiment", {"experimentName": ""})
    columns = [sorted(h["name"] for h in experiment["hparamInfos"])]
    columns.append(sorted((m["name"]["group"], m["name"]["tag"]) for m in experiment["metricInfos"]))
    return columns, {g["name"]: g for g in post(address, "hparams/session_groups", body)["sessionGroups"]}


def test_the_table_of_settings_stays_put(folder):
    """Two server starts give the same columns and rows; every row has every setting, even that of the failed run."""
    tables = []
    for _ in range(2):
        with serve(folder) as address:
            tables.append(table(address))
    settings = [{name: row["hparams"] for name, row in rows.items()} for _, rows in tables]  # sessions have no order
    assert (tables[0][0], settings[0]) == (tables[1][0], settings[1])
    columns, rows = tables[0]
    assert set(rows) == {"full", "failed", "trials"}
    assert {"lr", "optimizer", "loss_function", "class_weights", "clip_norm", "seed"} <= set(columns[0])
    assert all(sorted(row["hparams"]) == columns[0] for row in (rows["full"], rows["failed"]))
    assert [s["status"] for s in rows["failed"]["sessions"]] == ["STATUS_FAILURE"]
    assert sorted(s["name"] for s in rows["trials"]["sessions"]) == [f"trial-{seed}/best" for seed in range(3)]


def test_a_group_has_the_mean_of_its_trials(folder):
    """The loss in a group's row is the mean of the best losses of its runs."""
    losses = [read(folder / f"trial-{seed}/best").Scalars("loss")[0].value for seed in range(3)]
    assert len(set(losses)) == 3
    with serve(folder) as address:
        row = table(address)[1]["trials"]
    [loss] = [m["value"] for m in row["metricValues"] if m["name"]["tag"] == "loss"]
    assert loss == pytest.approx(sum(losses) / 3)


def test_the_link_that_compares(folder):
    """The link shows validation curves and dots of this process's runs, one color per run, and pins tags with data."""
    trainer = overfitting_trainer(folder, name="last")
    trainer.fit(*noisy_data(), epochs=1)
    parts = urlsplit(trainer.callbacks[-1].link(compare=True))
    query = parse_qs(parts.query, strict_parsing=True)
    [shown] = query["runFilter"]
    runs = ["last", *(path.name for path in folder.iterdir() if path.name != "last")]
    assert all(re.search(shown, f"{run}/val") and not re.search(shown, f"{run}/train") for run in runs)
    assert not re.search(shown, "older/val")
    assert not re.search(shown, "last-2/val")
    assert query["runColorGroup"] == ["regex:^([^/]+)/"]
    assert query["smoothing"] == ["0"]
    pins = [card["tag"] for card in json.loads(query["pinnedCards"][0])]
    assert pins == ["loss_vs_baseline", "loss", "metrics/accuracy", "overfit/gap"]
    assert set(pins) <= set(read(folder / "last/val").Tags()["scalars"])


def test_the_link_that_compares_is_printed_where_there_are_others(tmp_path, capsys):
    """The first run in a folder prints only its own link, the second also the link that compares."""
    for name, times in (("first", 0), ("second", 1)):
        trainer = overfitting_trainer(tmp_path, name=name)
        trainer.callbacks[-1].show_link = True
        trainer.fit(*noisy_data(), max_steps=2)
        assert capsys.readouterr().out.count(trainer.callbacks[-1].link(compare=True)) == times


def test_the_monitored_metric_is_pinned_first(tmp_path):
    """The link pins the monitored metric, or else the user's first."""

    def pins(**options):
        torch.manual_seed(0)
        model = nn.Linear(10, 2)
        stop = [fw.EarlyStopping(options["monitor"], mode="max")] if options else []
        page = fw.TensorBoard(tmp_path, show_link=False)
        metrics = {name: lambda outputs, targets: outputs.mean() for name in ("z", "a", "m")}
        trainer = fw.Trainer(model, torch.optim.SGD(model.parameters()), callbacks=[*stop, page], metrics=metrics)
        trainer.fit(*noisy_data(), max_steps=1)
        return [card["tag"] for card in json.loads(parse_qs(urlsplit(page.link()).query)["pinnedCards"][0])]

    assert pins()[1] == "metrics/z"
    assert pins(monitor="val/m")[1] == "metrics/m"


def test_the_layout_grows_with_the_curves(tmp_path):
    """A curve that starts late gets its chart, since the server shows the newest layout."""

    class Late(fw.Callback):
        def on_step_end(self, state):
            if state.progress.epoch == 1:
                state.log("train/params/zero_share/0", 0.5)

    overfitting_trainer(tmp_path, callbacks=[Late()]).fit(*noisy_data(), epochs=2)
    for options in ((), ("--load_fast=false",)):
        with serve(tmp_path, *options) as address:
            page = get(address, "custom_scalars/layout")
        titles = [chart["title"] for category in page["category"] for chart in category["chart"]]
        assert "share of exact zeros, per layer" in titles


def test_the_end_report_is_a_table_to_paste(tmp_path):
    """The end report has the best epoch's values, train beside validation, and how the fit ended, with the run's name."""
    result = (trainer := overfitting_trainer(tmp_path, name="mine")).fit(*noisy_data(), epochs=4)
    [event] = read(tmp_path / "mine/best").Tensors("report/end")
    report = event.tensor_proto.string_val[0].decode()
    best = result.best
    where = f"mine, best epoch {best.epoch + 1} (by val/loss), step {best.step}"
    assert report.startswith(f"| {where} | train | val |\n|---|---|---|\n")
    assert f"| loss | {best.metrics['train/loss']:.6g} | {best.metrics['val/loss']:.6g} |" in report
    assert f"| accuracy |  | {best.metrics['val/accuracy']:.6g} |" in report
    assert f"| val/loss of the best constant prediction | {result.baseline.constant:.6g} |" in report
    assert f"| epochs, steps | 4, {trainer.state.progress.step} |" in report
    assert "| ended by | the end of training |" in report
    assert f"| verdict | {result.verdict.summary} {result.verdict.evidence} |" in report


@pytest.mark.parametrize("group", [3, ["a"]])
def test_a_group_that_is_no_name_is_refused(group):
    """A group must be a string."""
    with pytest.raises(TypeError, match="group"):
        fw.TensorBoard("runs", group=group)


def test_the_comparison_is_about_the_runs_of_this_process(tmp_path):
    """Runs that were in the folder before are not shown beside two new ones; beside a single new one they are."""
    overfitting_trainer(tmp_path / "earlier", name="old").fit(*noisy_data(), max_steps=2)
    (tmp_path / "runs").mkdir()
    (tmp_path / "earlier/old").rename(tmp_path / "runs/old")
    shown = []
    for name in ("a.b", "c"):
        trainer = overfitting_trainer(tmp_path / "runs", name=name)
        trainer.fit(*noisy_data(), max_steps=2)
        link = trainer.callbacks[-1].link(compare=True)
        shown.append(parse_qs(urlsplit(link).query)["runFilter"][0])
    assert [bool(re.search(shown[0], f"{run}/val")) for run in ("old", "a.b")] == [True, True]
    assert [bool(re.search(shown[1], f"{run}/val")) for run in ("old", "a.b", "c", "aXb")] == [False, True, True, False]


def test_the_table_has_columns_of_the_user_and_the_peak_of_the_learning_rate(tmp_path):
    """Own columns stand beside the settings; the peak is that of the schedule, though it starts far below."""
    torch.manual_seed(0)
    model = nn.Linear(10, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    board = fw.TensorBoard(tmp_path, show_link=False, hparams={"width": torch.tensor(64), "data": "v2", "aug": None})
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=12)
    fw.Trainer(model, optimizer, callbacks=board, scheduler=scheduler, device="cpu").fit(*noisy_data(), epochs=2)
    warm = torch.optim.SGD(model.parameters(), 0.1)
    rise = torch.optim.lr_scheduler.LambdaLR(warm, lambda step: 1 + step)
    other = fw.TensorBoard(tmp_path, name="other", show_link=False)
    fw.Trainer(model, warm, callbacks=other, scheduler=rise, log_every=1, device="cpu").fit(*noisy_data(), epochs=1)
    with serve(tmp_path) as address:
        _, found = table(address)
    rows = {name: row["hparams"] for name, row in found.items()}
    assert (rows["run"]["width"], rows["run"]["data"], rows["run"]["aug"]) == (64, "v2", "none")
    assert (rows["run"]["lr"], rows["run"]["peak_lr"]) == (pytest.approx(0.02), pytest.approx(0.5))
    assert rows["other"]["peak_lr"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("hparams", "error", "match"),
    [
        (["width"], TypeError, "must be a dict"),
        ({1: 2}, TypeError, "names of columns must be non-empty strings"),
        ({"layers": [1, 2]}, TypeError, r"hparams\['layers'\] must be a number.*got \[1, 2\]"),
    ],
)
def test_wrong_columns_are_refused_at_once(tmp_path, hparams, error, match):
    """What is no column is refused when the callback is made, and the name of a setting when fitting starts."""
    with pytest.raises(error, match=match):
        fw.TensorBoard(tmp_path, hparams=hparams)
    model = nn.Linear(10, 2)
    taken = fw.TensorBoard(tmp_path / "runs", hparams={"lr": 3})
    with pytest.raises(ValueError, match="column 'lr', which is a setting of the fit"):
        fw.Trainer(model, torch.optim.SGD(model.parameters()), callbacks=taken).fit(*noisy_data(), epochs=1)
    assert not (tmp_path / "runs").exists()


def test_the_card_says_what_the_baseline_is(folder):
    """The card of loss_vs_baseline has a description."""
    with serve(folder) as address:
        tags = get(address, "scalars/tags")
    assert "best constant prediction" in tags["full/val"]["loss_vs_baseline"]["description"]
