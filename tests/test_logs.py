"""Loss curves out of event files: of torch's writer, of TensorFlow's tensors, of our own callback."""

import math
import re
import struct
import time
from itertools import pairwise

import attrs
import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

import fitwatch as fw
from fitwatch.logs import Diagnosis, LogError, NoLogsError, Unusable
from fitwatch.logs import diagnose_logs as diagnose_paths
from fitwatch.logs.finding import collect
from tests._server import noisy_data, overfitting_trainer

# A model that overfits: validation turns at the twentieth of 60 evaluations, training goes on falling.
TRAIN = [float(np.float32(math.exp(-i / 15))) for i in range(60)]
VAL = [float(np.float32(0.5 + ((i - 20) / 40) ** 2 + 0.002 * (-1) ** i)) for i in range(60)]


def diagnose_logs(folder, **options):
    """The verdicts alone."""
    return diagnose_paths(folder, **options).runs


def read(folder):
    """The points of every series: folder -> tag -> (step, value)."""
    return {
        run: {tag: list(zip(curve.steps, curve.values, strict=True)) for tag, curve in tags.items()}
        for run, tags in collect([folder]).logged.items()
    }


def write(folder, curves, **options):
    """Event files of torch's writer: tag -> values, or -> points (step, value)."""
    with SummaryWriter(str(folder), **options) as writer:
        for tag, values in curves.items():
            for step, value in values if isinstance(values[0], tuple) else enumerate(values):
                writer.add_scalar(tag, value, step)


def write_tensors(folder, tag, values):
    """Event files as TensorFlow writes them: a scalar is a tensor of rank 0, which the first of its tag says."""
    writer = EventFileWriter(str(folder))
    for step, value in enumerate(values):
        summary = scalar_pb(tag, value)
        if step:
            summary.value[0].ClearField("metadata")
        writer.add_event(Event(step=step, summary=summary))
        writer.add_event(Event(step=step, summary=histogram_pb("weights", [value, 1.0, 2.0])))
    writer.close()


def only(found):
    """The one verdict there is."""
    (one,) = found
    assert isinstance(one, Diagnosis), one
    return one


def check(one, *, train, val):
    """The run was judged by these two series, and the verdict is that on the curves which were written."""
    assert (train, val) == (one.train, one.val)
    assert fw.diagnose(TRAIN, VAL) == one.verdict
    assert one.verdict.overfitting
    assert one.losses == VAL


def test_two_tags_of_one_file(tmp_path):
    """Tags of many habits are told apart: which is the training loss, which the validation loss."""
    habits = [
        ("train/loss", "eval/loss"),
        ("Loss/train", "Loss/test"),
        ("loss", "val_loss"),
        ("train_loss", "valid_loss"),
        ("Training Loss", "Validation Loss"),
        ("trainLoss", "valLoss"),
        ("train/total_loss", "val/loss"),
        ("train/train_loss", "train/val_loss"),
        ("train/CrossEntropyLoss", "val/CrossEntropyLoss"),
        ("epoch_loss", "epoch_val_loss"),
    ]
    for i, (train, val) in enumerate(habits):
        write(tmp_path / str(i), {train: TRAIN, val: VAL, "train/lr": [1.0] * 60, "val/acc": TRAIN})
        check(only(diagnose_logs(tmp_path / str(i))), train=train, val=val)


def test_the_loss_of_an_epoch_comes_before_that_of_a_step(tmp_path):
    """As Lightning logs: of train_loss_step and train_loss_epoch the latter is taken; epoch and hp_metric are no losses."""
    every_step = [(step, 9.0) for step in range(600)]
    by_epoch = {"train_loss_epoch": TRAIN, "val_loss": VAL, "epoch": list(range(60))}
    at_its_end = {tag: [(10 * i + 9, value) for i, value in enumerate(values)] for tag, values in by_epoch.items()}
    version = tmp_path / "lightning_logs" / "version_0"
    write(version, {"hp_metric": [-1.0], "train_loss_step": every_step, **at_its_end})
    one = only(diagnose_logs(tmp_path))
    check(one, train="train_loss_epoch", val="val_loss")
    assert ("lightning_logs/version_0", list(range(9, 600, 10))) == (one.run, one.steps)


def test_of_several_losses_the_plain_one_is_taken(tmp_path):
    """A part of the loss, or one summary value at the end of training, doesn't stand in the way of the loss itself."""
    parts = {"train/aux_loss": VAL, "val/aux_loss": TRAIN, "train/avg_loss": [(59, 0.5)]}
    write(tmp_path, {**parts, "train/loss": TRAIN, "val/loss": VAL})
    check(only(diagnose_logs(tmp_path)), train="train/loss", val="val/loss")


def test_a_run_within_a_run(tmp_path):
    """A folder below a run is judged too if it has a pair of losses of its own."""
    for folder in (tmp_path / "outer", tmp_path / "outer" / "inner"):
        write(folder, {"train/loss": TRAIN, "val/loss": VAL})
    assert [one.run for one in diagnose_logs(tmp_path)] == ["outer", "outer/inner"]


def test_training_points_are_averaged_up_to_each_evaluation(tmp_path):
    """Training logged every 10 steps, validation every 25: each evaluation has the mean of the points since the last."""
    train = [(step, math.exp(-step / 400)) for step in range(10, 1501, 10)]
    val = [(25 * (i + 1), value) for i, value in enumerate(VAL)]
    write(tmp_path, {"train/loss": train, "eval/loss": val, "train/train_loss": [(1500, 0.5)]})
    steps, values = np.array(train).T
    edges = [0, *(step for step, _ in val)]
    means = [values[(steps > a) & (steps <= b)].astype(np.float32).mean(dtype=np.float64) for a, b in pairwise(edges)]
    verdict = only(diagnose_logs(tmp_path)).verdict
    expected = fw.diagnose(means, VAL)
    assert (expected.status, expected.onset) == (verdict.status, verdict.onset)
    assert expected.gap == pytest.approx(verdict.gap, rel=1e-12)
    assert math.isfinite(verdict.gap)


def test_an_evaluation_without_training_points_has_a_nan(tmp_path):
    """Validation before the first training point, and training logged more rarely: those losses count as not measured."""
    write(tmp_path, {"train/loss": list(enumerate(TRAIN))[1::3], "val/loss": VAL})
    expected = fw.diagnose([loss if i % 3 == 1 else math.nan for i, loss in enumerate(TRAIN)], VAL)
    verdict = only(diagnose_logs(tmp_path)).verdict
    assert (expected.evidence, expected.onset) == (verdict.evidence, verdict.onset)


def test_nan_is_kept(tmp_path):
    """A NaN of the validation loss is an evaluation, and the last one makes the verdict that it makes elsewhere."""
    write(tmp_path, {"train/loss": TRAIN, "val/loss": [*VAL[:-1], math.nan]})
    one = only(diagnose_logs(tmp_path))
    assert (len(one.losses), one.verdict.status) == (60, "diverging")
    assert math.isnan(one.losses[-1])


def test_tensors_as_keras_writes_them(tmp_path):
    """Sub-runs train and validation with the tag epoch_loss, as tensors; batch_loss and histograms are passed over."""
    write_tensors(tmp_path / "fit" / "train", "epoch_loss", TRAIN)
    write_tensors(tmp_path / "fit" / "train", "batch_loss", [9.0] * 100)
    write_tensors(tmp_path / "fit" / "validation", "epoch_loss", VAL)
    write_tensors(tmp_path / "fit" / "validation", "evaluation_loss_vs_iterations", [9.0] * 60)
    assert {"epoch_loss", "batch_loss"} == set(read(tmp_path)["fit/train"])
    one = only(diagnose_logs(tmp_path))
    check(one, train="train/epoch_loss", val="validation/epoch_loss")
    assert one.run == "fit"


def test_lines_of_add_scalars(tmp_path):
    """add_scalars makes a sub-run for each line: they belong to the run that wrote them, whatever the lines are called."""
    for main, train, val in (("data/loss", "train", "val"), ("Loss", "train_loss", "validation_loss")):
        folder = tmp_path / train
        with SummaryWriter(str(folder)) as writer:
            for step, losses in enumerate(zip(TRAIN, VAL, strict=True)):
                writer.add_scalars(main, dict(zip((train, val), losses, strict=True)), step)
                writer.add_scalar("lr", 0.1, step)
        sub_run = main.replace("/", "_")
        check(only(diagnose_logs(folder)), train=f"{sub_run}_{train}/{main}", val=f"{sub_run}_{val}/{main}")


def test_folders_that_differ_in_the_role_only(tmp_path):
    """exp_train and exp_val are one run, where each holds one side; a folder that holds both sides is a run by itself."""
    write(tmp_path / "a" / "exp_train", {"loss": TRAIN})
    write(tmp_path / "a" / "exp_val", {"loss": VAL})
    one = only(diagnose_logs(tmp_path / "a"))
    check(one, train="exp_train/loss", val="exp_val/loss")
    assert one.run == "exp"
    for name in ("exp_train", "exp_val"):
        write(tmp_path / "b" / name, {"train/loss": TRAIN, "val/loss": VAL})
    assert [one.run for one in diagnose_logs(tmp_path / "b")] == ["exp_train", "exp_val"]


def test_the_pages_of_our_own_callback(tmp_path):
    """Dots, bars and the dashed line are no runs: each training is one, with the history of its result and the verdict on it."""
    trainer = overfitting_trainer(tmp_path, patience=30)
    results = [trainer.fit(*noisy_data(), epochs=60)]
    assert {"baseline", "best", "overfitting", "train", "val"} <= {path.name for path in (tmp_path / "run").iterdir()}
    results.append(overfitting_trainer(tmp_path, patience=3).fit(*noisy_data(), epochs=60))
    found = diagnose_logs(tmp_path)
    assert [one.run for one in found] == ["run", "run-2"]
    for one, result in zip(found, results, strict=True):
        assert (one.train, one.val) == ("train/loss", "val/loss")
        assert [entry["step"] for entry in result.history] == one.steps
        assert [float(np.float32(entry["val/loss"])) for entry in result.history] == one.losses
        curves = [[entry[name] for entry in result.history] for name in ("train/loss", "val/loss")]
        expected = fw.diagnose(*curves)  # what the curves tell; the fit's own verdict knows the examples and a probe
        assert (expected.status, expected.onset) == (one.verdict.status, one.verdict.onset)
        assert (expected.detected, result.best.step) == (one.verdict.detected, one.steps[one.verdict.best])
    assert results[0].verdict.overfitting
    with pytest.raises(LogError, match="there are run, run-2$"):
        diagnose_logs(tmp_path, run="run-3")
    alone = only(diagnose_logs(tmp_path / "run"))  # the folder of the run itself
    assert attrs.evolve(found[0], run=".") == alone


def test_a_restart_replaces_what_it_writes_again(tmp_path):
    """Of points that a second writer wrote again, the later count: with a purge from that step on, and without one."""
    for name, options in (("purged", {"purge_step": 40}), ("rewritten", {})):
        folder = tmp_path / name
        write(folder, {"train/loss": TRAIN[:50], "val/loss": [*VAL[:40], *[7.0] * 10]}, filename_suffix=".1")
        again = {"train/loss": list(enumerate(TRAIN))[40:], "val/loss": list(enumerate(VAL))[40:]}
        write(folder, again, filename_suffix=".2", **options)
        assert len(list(folder.iterdir())) == 2
        check(only(diagnose_logs(folder)), train="train/loss", val="val/loss")


def test_a_purge_is_of_all_tags(tmp_path):
    """A restart that purges drops the points of tags too that it doesn't write again."""
    write(tmp_path, {"a": TRAIN, "b": TRAIN}, filename_suffix=".1")
    write(tmp_path, {"a": [(30, 1.0)]}, filename_suffix=".2", purge_step=30)
    assert [len(points) for points in read(tmp_path)["."].values()] == [31, 30]


def test_a_file_that_ends_in_mid_record(tmp_path):
    """What was written before the writing process was killed counts."""
    write(tmp_path, {"val/loss": VAL})
    (file,) = tmp_path.iterdir()
    whole = read(tmp_path)["."]["val/loss"]
    content = file.read_bytes()
    assert struct.unpack("<Q", content[:8])[0] < len(content)
    file.write_bytes(content[:-3])
    assert whole[:-1] == read(tmp_path)["."]["val/loss"]


def test_a_link_in_a_circle(tmp_path):
    """Links to folders are followed, and one to its own parent ends."""
    write(tmp_path / "elsewhere", {"train/loss": TRAIN, "val/loss": VAL})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert [one.run for one in diagnose_logs(tmp_path / "runs")] == ["linked"]


def test_tags_by_name(tmp_path):
    """Named series are taken as they are, with or without a sub-run in the name, in every run that has both."""
    for run in ("a", "b"):
        write(tmp_path / run, {"fit/energy": TRAIN, "check/energy": VAL, "train/loss": VAL, "val/loss": TRAIN})
    write(tmp_path / "c" / "left", {"energy": TRAIN})
    write(tmp_path / "c" / "right", {"energy": VAL})
    found = diagnose_logs(tmp_path, train="fit/energy", val="check/energy")
    assert [one.run for one in found] == ["a", "b"]
    for one in found:
        check(one, train="fit/energy", val="check/energy")
    one = only(diagnose_logs(tmp_path, train="left/energy", val="right/energy"))
    check(one, train="left/energy", val="right/energy")
    assert one.run == "c"
    check(
        only(diagnose_logs(tmp_path, train="c/left/energy", val="c/right/energy")),
        train="c/left/energy",
        val="c/right/energy",
    )


def test_one_run_of_many(tmp_path):
    """A run is chosen by its name; a wrong name is answered with those there are."""
    for run in ("a", "b/deep"):
        write(tmp_path / run, {"train/loss": TRAIN, "val/loss": VAL})
    assert [one.run for one in diagnose_logs(tmp_path, run="b/deep")] == ["b/deep"]
    with pytest.raises(LogError, match="there is no run 'b'; there are a, b/deep"):
        diagnose_logs(tmp_path, run="b")


def test_a_run_that_can_not_be_judged_says_why(tmp_path):
    """A missing side, a single series, too few points and two step axes each have their own message."""
    write(tmp_path / "axes", {"train/loss": [(10 * i, loss) for i, loss in enumerate(TRAIN)], "val/loss": VAL})
    write(tmp_path / "few", {"train/loss": TRAIN[:2], "val/loss": VAL[:2]})
    write(tmp_path / "no val", {"train/loss": TRAIN, "train/acc": TRAIN, "lr": TRAIN})
    write(tmp_path / "single", {"loss": TRAIN})
    write(tmp_path / "unlike", {"alpha": TRAIN, "beta": VAL})
    found = diagnose_logs(tmp_path)
    assert all(isinstance(one, Unusable) for one in found)
    assert {one.run: one.problem for one in found} == {
        "axes": "val/loss ends at step 59 and train/loss at step 590: log both against the same step count",
        "few": "val/loss has 2 points: too few",
        "no val": "no validation loss among train/loss, lr, train/acc",
        "single": "only one series, loss: a training and a validation loss are needed",
        "unlike": "no training and validation loss found by name among alpha, beta: name them with --train and --val",
    }


def test_what_is_no_log_is_refused(tmp_path):
    """No folder, no logs, no scalars, unknown tags, one tag twice: a clear error each."""
    with pytest.raises(LogError, match="there is no folder or file .*missing"):
        diagnose_logs(tmp_path / "missing")
    with pytest.raises(NoLogsError, match="contain no logs"):
        diagnose_logs(tmp_path)
    with SummaryWriter(str(tmp_path / "text")) as writer:
        writer.add_text("note", "no number")
    with pytest.raises(NoLogsError, match="contain a file without curves"):
        diagnose_logs(tmp_path)
    write(tmp_path / "run", {"train/loss": TRAIN, "val/loss": VAL, **{f"norm/{i}": [1.0] for i in range(30)}})
    write(tmp_path / "other", {"lonely": [1.0]})
    with pytest.raises(
        LogError, match="no series is named 'eval/loss'; there are run/train/loss, run/val/loss, .* more"
    ):
        diagnose_logs(tmp_path, train="train/loss", val="eval/loss")
    with pytest.raises(LogError, match="no run has both 'train/loss' and 'lonely'"):
        diagnose_logs(tmp_path, train="train/loss", val="lonely")
    with pytest.raises(LogError, match="can't be the same series, 'loss'"):
        diagnose_logs(tmp_path, train="loss", val="loss")


def test_a_link_that_leads_nowhere_is_passed_over(tmp_path):
    """A dangling link among the event files, as of a run that was moved away, keeps no other run from its verdict."""
    write(tmp_path / "a", {"loss": TRAIN, "val_loss": VAL})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/events.out.tfevents.1.x").symlink_to(tmp_path / "nowhere")
    (one,) = diagnose_logs(tmp_path)
    assert one.verdict.overfitting


def test_points_that_were_replaced_are_counted(tmp_path):
    """After a restart, the older points that the newer ones replace are named with their number."""
    write(tmp_path, {"train/loss": TRAIN[:25], "val/loss": VAL[:25]}, filename_suffix=".a")
    time.sleep(1.1)  # the name of an event file has the second
    later = {"train/loss": list(enumerate(TRAIN))[20:], "val/loss": list(enumerate(VAL))[20:]}
    write(tmp_path, later, filename_suffix=".b")
    one = only(diagnose_logs(tmp_path))
    check(one, train="train/loss", val="val/loss")
    assert one.notes == [
        "5 points of train/loss are left out: a resumed run wrote these steps again",
        "5 points of val/loss are left out: a resumed run wrote these steps again",
    ]


def test_a_forgotten_step_is_named(tmp_path):
    """Points that all stand at step 0 are judged in order of time, and the note says so."""
    write(tmp_path, {"train/loss": [(0, v) for v in TRAIN], "val/loss": [(0, v) for v in VAL]})
    one = only(diagnose_logs(tmp_path))
    assert fw.diagnose(TRAIN, VAL).onset == one.verdict.onset
    assert one.axis == "point"
    assert all("stand at step 0" in note and "was global_step forgotten?" in note for note in one.notes)


def test_two_trainings_in_one_folder_are_told_apart_by_file(tmp_path):
    """Two processes in one folder, and a run that was started over, are two runs each; every one has all its points."""
    writers = [SummaryWriter(str(tmp_path / "a"), filename_suffix=suffix) for suffix in (".a", ".b")]
    for step, (train, val) in enumerate(zip(TRAIN, VAL, strict=True)):
        for writer in writers:
            writer.add_scalar("train/loss", train, step)
            writer.add_scalar("val/loss", val, step)
    for writer in writers:
        writer.close()
    for suffix, count in ((".a", 60), (".b", 12)):
        curves = {"train/loss": list(enumerate(TRAIN[:count], 1)), "val/loss": list(enumerate(VAL[:count], 1))}
        write(tmp_path / "b", curves, filename_suffix=suffix)
    found = diagnose_logs(tmp_path)
    assert [(one.run, len(one.steps)) for one in found] == [("a#1", 60), ("a#2", 60), ("b#1", 60), ("b#2", 12)]
    assert [re.search(r"number . of 2 runs .* by file: .*(\.[ab])$", one.notes[0])[1] for one in found] == [
        ".a",
        ".b",
        ".a",
        ".b",
    ]


def test_a_run_started_over_in_sub_runs(tmp_path):
    """Where train and val have a folder each, the newest training keeps the name, and each older one has its number."""
    for suffix in (".a", ".b"):
        write(tmp_path / "fit/train", {"epoch_loss": TRAIN}, filename_suffix=suffix)
        write(tmp_path / "fit/validation", {"epoch_loss": VAL}, filename_suffix=suffix)
    found = diagnose_logs(tmp_path)
    assert sorted(one.run for one in found) == ["fit", "fit#1"]
    for one in found:
        check(one, train="train/epoch_loss", val="validation/epoch_loss")


def test_the_best_model_evaluated_again_at_the_end(tmp_path):
    """A second value at the last step, in the same file or in one of its own, is left out: it is the best one's."""
    again = [(59, min(VAL))]
    write(tmp_path / "one", {"train/loss": TRAIN, "val/loss": [*enumerate(VAL), *again]})
    write(tmp_path / "two", {"train/loss": TRAIN, "val/loss": VAL}, filename_suffix=".a")
    write(tmp_path / "two", {"val/loss": again}, filename_suffix=".b")
    for one in diagnose_logs(tmp_path):
        check(one, train="train/loss", val="val/loss")
        assert one.notes == ["a point of val/loss repeats a step and is left out: the first of a step counts"]


def test_several_points_at_each_step_are_averaged(tmp_path):
    """A loss that is logged for every batch of the validation, with the epoch as its step, has one point an epoch."""
    batches = [(step, value + shift) for step, value in enumerate(VAL) for shift in (-0.125, 0.125, 0.0)]
    write(tmp_path, {"train/loss": TRAIN, "val/loss": batches})
    one = only(diagnose_logs(tmp_path))
    assert one.losses == pytest.approx(VAL, rel=1e-6)
    assert one.notes == ["60 steps have several points of val/loss, which are averaged"]


def test_training_by_step_and_validation_by_epoch(tmp_path):
    """Where one side counts steps and the other epochs, the times of writing say which training points belong to which."""
    with SummaryWriter(str(tmp_path)) as writer:
        for epoch, (train, val) in enumerate(zip(TRAIN, VAL, strict=True)):
            for batch in range(10):
                writer.add_scalar("train/loss", train, 10 * epoch + batch, walltime=1e9 + 20 * epoch + batch)
            writer.add_scalar("val/loss", val, epoch, walltime=1e9 + 20 * epoch + 15)
    one = only(diagnose_logs(tmp_path))
    check(one, train="train/loss", val="val/loss")
    assert (one.axis, one.steps, one.train_losses) == ("epoch", list(range(60)), pytest.approx(TRAIN))
    assert one.notes == ["train/loss and val/loss count differently, and are aligned by the time of writing"]


def test_parts_of_a_loss_are_summed(tmp_path):
    """Without a total, the verdict is that on the sum of the parts, which a note says; each=True judges every part."""
    falling = [value / 4 for value in TRAIN]
    parts = {"train/box_loss": TRAIN, "val/box_loss": VAL, "train/cls_loss": falling, "val/cls_loss": falling}
    write(tmp_path, parts)
    one = only(diagnose_logs(tmp_path))
    assert (one.train, one.val) == ("train/box_loss + train/cls_loss", "val/box_loss + val/cls_loss")
    assert one.losses == pytest.approx([a + b for a, b in zip(VAL, falling, strict=True)])
    assert "sum of its 2 parts" in one.notes[0]
    box, cls = diagnose_logs(tmp_path, each=True)
    assert (box.part, cls.part) == ("val/box_loss", "val/cls_loss")
    assert (box.verdict.status, cls.verdict.status) == ("overfitting", "improving")


def test_several_validation_sets_are_judged_one_by_one(tmp_path):
    """One training loss and the losses of two validation sets, as Lightning and Hugging Face name them, are two verdicts."""
    for i, (train, sets) in enumerate(
        [
            ("train_loss", ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]),
            ("loss", ["eval_squad_loss", "eval_wiki_loss"]),
        ]
    ):
        write(tmp_path / str(i), {train: TRAIN, sets[0]: VAL, sets[1]: [value + 1 for value in TRAIN]})
        found = diagnose_logs(tmp_path / str(i))
        assert [(one.part, one.verdict.overfitting) for one in found] == [(sets[0], True), (sets[1], False)]


def test_errors_that_are_not_called_a_loss(tmp_path):
    """A mean squared error, a perplexity and the like are judged by their names; of several, one, and the note has the others."""
    for i, (train, val) in enumerate(
        [
            ("train/mse", "val/mse"),
            ("train_nll", "valid_nll"),
            ("train/ppl", "val/ppl"),
            ("tr_loss", "vl_loss"),
            ("train/cross_entropy", "dev/cross_entropy"),
            ("training/RMSE", "validation/RMSE"),
        ]
    ):
        write(tmp_path / str(i), {train: TRAIN, val: VAL, "lr": TRAIN})
        check(only(diagnose_logs(tmp_path / str(i))), train=train, val=val)
    write(tmp_path / "two", {"train/mse": TRAIN, "val/mse": VAL, "train/mae": VAL, "val/mae": TRAIN})
    one = only(diagnose_logs(tmp_path / "two"))
    check(one, train="train/mse", val="val/mse")
    assert "val/mae" in one.notes[0]


def test_higher_is_better(tmp_path):
    """An accuracy is judged by what is missing to 1, or to 100: named as such, or by its name; unnamed it is refused."""
    for top in (1.0, 100.0):
        train, val = ([top * (1 - value / 2) for value in curve] for curve in (TRAIN, VAL))
        write(tmp_path / f"{top:g}", {"train/acc": train, "val/acc": val})
        (refused,) = diagnose_logs(tmp_path / f"{top:g}")
        assert refused.problem.endswith("higher is better: --metric val/acc --higher-is-better")
        for options in ({"val": "val/acc", "higher_is_better": True}, {"val": "val/acc"}, {"val": "acc"}):
            one = only(diagnose_logs(tmp_path / f"{top:g}", **options))
            assert one.verdict.overfitting
            assert (one.train, one.verdict.best) == ("train/acc", val.index(max(val)))
            assert one.losses == pytest.approx([top * value / 2 for value in VAL], rel=1e-4)
            assert "higher is better" in one.notes[0]


def test_a_score_beside_a_training_loss(tmp_path):
    """A score of the validation alone is judged beside the training loss."""
    write(tmp_path, {"train/loss": TRAIN, "val/f1": [1 - value / 2 for value in VAL]})
    one = only(diagnose_logs(tmp_path, val="val/f1", higher_is_better=True))
    assert (one.train, one.val, one.verdict.overfitting) == ("train/loss", "val/f1", True)


def test_losses_in_different_units(tmp_path):
    """A training loss summed over the batch and a mean validation loss have no gap; curves that only part later have one."""
    write(tmp_path / "sum", {"train/loss": [32 * value for value in TRAIN], "val/loss": VAL})
    write(tmp_path / "mean", {"train/loss": TRAIN, "val/loss": VAL})
    mean, summed = diagnose_logs(tmp_path)
    assert (mean.one_unit, mean.notes) == (True, [])
    assert not summed.one_unit
    assert "different units" in summed.notes[0]
    assert summed.verdict.onset == mean.verdict.onset


def test_a_run_that_is_called_train(tmp_path):
    """A folder with both losses inside is a run, whatever its name; beside others, as Ultralytics numbers them."""
    for name in ("train", "train2", "val"):
        write(tmp_path / "detect" / name, {"train/loss": TRAIN, "val/loss": VAL})
    found = diagnose_logs(tmp_path)
    assert [one.run for one in found] == ["detect/train", "detect/train2", "detect/val"]
    check(only(diagnose_logs(tmp_path, run="detect/train")), train="train/loss", val="val/loss")


def test_a_few_evaluations_have_an_answer(tmp_path):
    """From three evaluations on, there is the best, what came after it, and that they are too few to be sure."""
    write(tmp_path, {"train/loss": [0.6, 0.35, 0.2, 0.1, 0.05], "eval/loss": [0.5, 0.42, 0.47, 0.58, 0.71]})
    one = only(diagnose_logs(tmp_path))
    assert (one.verdict.best, one.wasted) == (1, 3)
    assert one.wasted_share == pytest.approx(3 / 5)
    assert one.change == pytest.approx(0.71 / 0.42 - 1, rel=1e-5)


def test_damage_in_a_sub_run_is_noted(tmp_path):
    """What could not be read of a sub-run is a note of its run, wherever the sub-run lies."""
    for name in ("a/train", "a/val", "b_train", "b_val"):
        write(tmp_path / name, {"loss": TRAIN if name.endswith("train") else VAL})
    for name in ("a/val", "b_val"):
        (file,) = (tmp_path / name).iterdir()
        file.write_bytes(file.read_bytes()[:-3])
    found = diagnose_logs(tmp_path)
    assert [one.run for one in found] == ["a", "b"]
    assert all("bytes are not a whole record" in one.notes[0] for one in found)


def test_runs_are_in_natural_order(tmp_path):
    """run2 comes before run10."""
    for name in ("run10", "run2", "run1"):
        write(tmp_path / name, {"train/loss": TRAIN, "val/loss": VAL})
    assert [one.run for one in diagnose_logs(tmp_path)] == ["run1", "run2", "run10"]


def test_several_paths_and_patterns(tmp_path):
    """Folders, files and patterns are read together, and the runs are named by their paths."""
    for name in ("a", "b", "c"):
        write(tmp_path / name, {"train/loss": TRAIN, "val/loss": VAL})
    (file,) = (tmp_path / "c").iterdir()
    found = diagnose_paths(str(tmp_path / "[ab]"), file).runs
    assert [one.run for one in found] == [str(tmp_path / "a"), str(tmp_path / "b"), str(file)]
    check(only(diagnose_logs(file)), train="train/loss", val="val/loss")


def test_points_that_do_not_count_are_named(tmp_path):
    """Non-finite points, evaluations without training points, and training points after the end are counted."""
    val = [*VAL[:50], *[math.nan] * 10]
    train = [(step + 1, value) for step, value in enumerate(TRAIN) if not 10 <= step < 13]
    write(tmp_path, {"train/loss": train, "val/loss": val})
    assert only(diagnose_logs(tmp_path)).notes == [
        "10 of 60 points of val/loss are NaN or infinite, since step 50",
        "4 of 60 evaluations have no training loss since the one before",
        "1 of 57 training points come after the last evaluation and are not used",
    ]


def test_complete_curves_have_no_notes(tmp_path):
    """Where everything counts, nothing is said."""
    write(tmp_path, {"train/loss": TRAIN, "val/loss": VAL})
    assert only(diagnose_logs(tmp_path)).notes == []
