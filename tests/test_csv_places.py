"""The CSV log in a folder that others change: nothing is lost in silence, and no file of others is touched."""

import csv
import shutil

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch import saving

BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(k)), torch.arange(8) % 2) for k in range(4)]


def fit(folder, steps, *callbacks, resume=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    own = [fw.CSVLog(folder / "log.csv"), fw.Checkpoint(folder / "saved", every_steps=1)]
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[*callbacks, *own], log_every=1, device="cpu"
    )
    trainer.fit(BATCHES, max_steps=steps, resume=resume)


def curve(path):
    with path.open(newline="") as file:
        return [(row["step"], row["value"]) for row in csv.DictReader(file) if row["name"] == "train/optim/loss"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_log_that_is_removed_ends_the_fit(tmp_path, renamed):
    """The error names the file; with the file renamed, later rows would go where nobody looks."""

    class Remove(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 2:
                file = tmp_path / "log.csv"
                file.rename(tmp_path / "moved.csv") if renamed else file.unlink()

    with pytest.raises(FileNotFoundError, match=r"CSVLog can't go on, since its file was removed or renamed.*log\.csv"):
        fit(tmp_path, 4, Remove())


@pytest.mark.parametrize("cut", ["1", "2,17", "", "2,17.5,train/loss"])
def test_a_row_that_was_cut_off_is_left_out(tmp_path, cut):
    """A crash or a full disk leaves half a row, and the resumed fit goes on after the whole ones."""
    whole = tmp_path / "whole"
    fit(whole, 4)
    fit(tmp_path, 2)
    with (tmp_path / "log.csv").open("a") as file:
        file.write(cut)
    fit(tmp_path, 4, resume="auto")
    assert curve(tmp_path / "log.csv") == curve(whole / "log.csv")


@pytest.mark.parametrize("link", [False, True])
def test_a_checkpoint_that_names_a_file_of_others_leaves_it_alone(tmp_path, link):
    """A table of another kind, or a link, is not cut: the log gets a file of its own."""
    fit(tmp_path, 2)
    mine = tmp_path / "elsewhere" / "mine.csv" if link else tmp_path / "mine.csv"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("step,time,name,value\n9,1,a,1\n" if link else "step,dose\n9,1.5\n")
    if link:
        (tmp_path / "mine.csv").symlink_to(mine)
    before = mine.read_text()
    content = saving.read(tmp_path / "saved/step-2.pt")
    content["callbacks"]["CSVLog"]["name"] = "mine.csv"
    saving.write(tmp_path / "saved/step-2.pt", content)
    fit(tmp_path, 4, resume="auto")
    assert mine.read_text() == before
    assert (tmp_path / "log-2.csv").is_file()


def test_a_lock_that_is_deleted_is_written_again(tmp_path, caplog):
    """The folder of the checkpoints was emptied in the fit: a warning says so, and a second fit is still refused."""

    class Empty(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 2:
                shutil.rmtree(tmp_path / "saved")
            if state.progress.step == 4:
                with pytest.raises(RuntimeError, match="in use by another fit of this process"):
                    fit(tmp_path, 1, resume="auto")

    fit(tmp_path, 4, Empty())
    assert "fit.lock was deleted during the fit, perhaps with checkpoints beside it" in caplog.text
    assert max(f.name for f in (tmp_path / "saved").glob("*.pt")) == "step-4.pt"
