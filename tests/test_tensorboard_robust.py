"""Event files after a kill, a full disk, a missing folder and a resumption."""

import io
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

import fitwatch as fw
from fitwatch.tensorboard.frames import FrameWriter
from tests._events import bars, curve, points, read, texts
from tests._server import get, noisy_data, overfitting_trainer, serve


def python(code):
    """Run code in a separate process and capture its stderr."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_process_that_is_killed_loses_nothing_and_a_forked_child_writes_nothing(tmp_path):
    """After SIGKILL in epoch 3, every point of epochs 0 to 2 is there once, although a forked child had the files too."""
    ended = python(f"""
        import os, signal
        import fitwatch as fw
        from tests._server import noisy_data, overfitting_trainer

        class Die(fw.Callback):
            def on_epoch_start(self, state):
                if state.progress.epoch == 1:
                    child = os.fork()
                    if not child:
                        trainer.callbacks[-1].on_log(state)
                        trainer.callbacks[-1].on_fit_end(state)
                        os._exit(0)
                    assert os.waitpid(child, 0)[1] == 0
            def on_step_end(self, state):
                if state.progress.step == 21:
                    os.kill(os.getpid(), signal.SIGKILL)

        trainer = overfitting_trainer({str(tmp_path)!r}, callbacks=[Die()])
        trainer.fit(*noisy_data(), epochs=5)
    """)
    assert ended.returncode == -signal.SIGKILL
    for run in ("train", "val"):
        assert [step for step, _ in points(tmp_path / "run" / run, "loss")] == [6, 12, 18]
    assert [step for step, _ in points(tmp_path / "run/train", "optim/lr")] == list(range(2, 21, 2))
    assert not (tmp_path / "run/best").exists()


def test_workers_of_a_loader_do_not_hang_it(tmp_path):
    """With forked workers in both loaders, started while the files are open, a fit ends with complete curves."""
    ended = python(f"""
        from torch.utils.data import DataLoader
        from tests._server import noisy_data, overfitting_trainer

        train, val = (DataLoader(l.dataset, 16, num_workers=2, multiprocessing_context="fork") for l in noisy_data())
        overfitting_trainer({str(tmp_path)!r}).fit(train, val, epochs=2)
    """)
    assert ended.returncode == 0, ended.stderr
    assert [step for step, _ in points(tmp_path / "run/val", "loss")] == [6, 12]


def test_a_full_disk_ends_the_fit_with_the_epoch_saved(tmp_path):
    """On a full disk the error names the file, the epoch is completed and saved, and the fit can be resumed from it."""
    code = """
        import resource
        import fitwatch as fw
        from tests._server import noisy_data, overfitting_trainer

        class Much(fw.Callback):
            def on_step_end(self, state):
                if state.progress.epoch_step == 2:
                    state.log("train/report/much", "x" * 30_000)

        def trainer():
            checkpoint = fw.Checkpoint(FOLDER + "/saved", best=False)
            return overfitting_trainer(FOLDER, callbacks=[Much(), checkpoint])

        if LIMITED:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
        result = trainer().fit(*noisy_data(), epochs=6, resume="auto")
        assert [entry["epoch"] for entry in result.history] == list(range(6))
    """
    first = python(code.replace("FOLDER", repr(str(tmp_path))).replace("LIMITED", "True"))
    assert first.returncode == 1
    assert re.search(rf"OSError: .*{re.escape(str(tmp_path))}/run/train/events.out.*File too large", first.stderr)
    # The fourth text does not fit: epoch 3 was trained to its end, and saved, after that.
    assert [file.name for file in (tmp_path / "saved").iterdir()] == ["epoch-4.pt"]
    assert [step for step, _ in points(tmp_path / "run/train", "loss")] == [6, 12, 18]
    second = python(code.replace("FOLDER", repr(str(tmp_path))).replace("LIMITED", "False"))
    assert second.returncode == 0, second.stderr
    steps = [step for step, _ in points(tmp_path / "run/train", "loss")]
    assert steps == [6, 12, 18, 30, 36]  # one was lost


def test_a_full_disk_in_the_last_epoch_is_an_error_too(tmp_path):
    """A fit whose last points could not be written ends with an error."""
    ended = python(f"""
        import resource
        import fitwatch as fw
        from tests._server import noisy_data, overfitting_trainer

        class Fill(fw.Callback):
            def on_validation_start(self, state):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, -1))

        overfitting_trainer({str(tmp_path)!r}, callbacks=[Fill()]).fit(*noisy_data(), epochs=1)
    """)
    assert ended.returncode == 1
    assert re.search(rf"OSError: .*TensorBoard can't write to {re.escape(str(tmp_path))}/run/", ended.stderr)


@pytest.mark.parametrize("last", [False, True])
def test_a_folder_removed_in_training_ends_the_fit_like_a_full_disk(tmp_path, caplog, last):
    """Within an epoch the loss of the curves is logged; the epoch is completed and saved, and then the fit ends."""

    class Remove(fw.Callback):
        def on_epoch_start(self, state):
            if state.progress.epoch == 2:
                shutil.rmtree(tmp_path / "runs/run")

    trainer = overfitting_trainer(tmp_path / "runs", callbacks=[Remove(), fw.Checkpoint(tmp_path / "saved")])
    with pytest.raises(OSError, match=r"can't write to .*/runs/run/train/.*removed or renamed"):
        trainer.fit(*noisy_data(), epochs=3 if last else 30)
    assert trainer.state.progress.epoch == 3
    assert (tmp_path / "saved/epoch-3.pt").exists()
    assert caplog.text.count("removed or renamed") == 1
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can create a folder")
def test_a_folder_that_cannot_be_written_to_is_refused_before_step_1():
    """If the folder can't be created, even by root, the error names it before the first step."""
    trainer = overfitting_trainer("/proc/self/runs")
    with pytest.raises(OSError, match="/proc/self/runs/run"):
        trainer.fit(*noisy_data(), epochs=1)
    assert trainer.state.progress.step == 0


def test_a_disk_that_is_full_from_the_start_is_refused_before_step_1(tmp_path):
    """If the folder can be created but not written, the fit fails before the first step."""
    ended = python(f"""
        import resource
        from tests._server import noisy_data, overfitting_trainer

        trainer = overfitting_trainer({str(tmp_path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, -1))
        try:
            trainer.fit(*noisy_data(), epochs=1)
        finally:
            assert trainer.state.progress.step == 0
    """)
    assert re.search(rf"OSError: .*TensorBoard can't write to {re.escape(str(tmp_path))}/run", ended.stderr)


# -- resume: three readers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Return the folder and the history of a run of 18 epochs, resumed at 10 to stop at 12 with a longer log window."""
    folder = tmp_path_factory.mktemp("runs")

    class Tell(fw.Callback):
        def on_validation_end(self, state):
            if state.progress.epoch in (3, 15):
                state.log("val/report/warnings", f"told in epoch {state.progress.epoch}")

    def make(log_every):
        saved = fw.Checkpoint(folder.parent / "saved", keep=99)
        trainer = overfitting_trainer(folder, callbacks=[Tell(), saved])
        trainer.log_every = log_every
        return trainer

    make(2).fit(*noisy_data(), epochs=60)
    assert max(step for step, _ in points(folder / "run/train", "optim/lr")) > 84
    assert len(texts(folder / "run/val", "report/warnings")) >= 2
    result = make(3).fit(*noisy_data(), epochs=12, resume=folder.parent / "saved/epoch-10.pt")
    return folder, result.history


LR_STEPS = [*range(2, 61, 2), *range(63, 73, 3)]


def test_resumed_curves_in_the_files(resumed):
    """EventAccumulator finds each point once, and no point, bar, text or dot from beyond the point of resumption."""
    folder, history = resumed
    for run in ("train", "val"):
        assert points(folder / "run" / run, "loss") == curve(history, f"{run}/loss")
    assert [step for step, _ in points(folder / "run/train", "optim/lr")] == LR_STEPS
    assert texts(folder / "run/val", "report/warnings") == [(24, "told in epoch 3")]
    assert bars(folder / "run") == []
    assert all(step <= 72 for run in ("train", "val", "best", "baseline") for step in steps_of(folder / "run" / run))


def steps_of(folder):
    """Return the steps of all scalars."""
    events = read(folder)
    return [event.step for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


@pytest.mark.parametrize("options", [(), ("--load_fast=false",)], ids=["default", "slow"])
def test_resumed_curves_in_the_server(resumed, options):
    """Both TensorBoard servers show each point once and nothing old from beyond the point of resumption."""
    folder, history = resumed
    with serve(folder, *options) as address:

        def served(run, tag):
            return [(step, value) for _, step, value in get(address, "scalars/scalars", run=run, tag=tag)]

        for run in ("train", "val"):
            assert served(f"run/{run}", "loss") == curve(history, f"{run}/loss")
        assert [step for step, _ in served("run/train", "optim/lr")] == LR_STEPS
        assert get(address, "scalars/tags").keys() == {f"run/{part}" for part in ("train", "val", "best", "baseline")}
        warnings = get(address, "text/text", run="run/val", tag="report/warnings")
        assert [text["step"] for text in warnings] == [24]


def test_frames_are_those_of_tensorboard():
    """For contents of all lengths around a block, the bytes are those of tensorboard's own writer."""
    for length in (0, 1, 3, 4, 5, 100, 511, 512, 513, 515, 516, 1024, 5000):
        content = bytes((7 * i * i + length) % 256 for i in range(length))
        ours, theirs = io.BytesIO(), io.BytesIO()
        FrameWriter(ours).write(content)
        RecordWriter(theirs).write(content)
        assert ours.getvalue() == theirs.getvalue()
