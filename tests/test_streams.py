"""Streams without an end: there is always a file to resume from."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fitwatch as fw
from fitwatch import saving


class Stream(IterableDataset):
    """The same examples in each pass, without an end."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.randn(4, generator=generator)
            yield x, (x[0] > 0).long()


def batches():
    """A generator without an end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(8, 4, generator=generator)
        yield x, (x[:, 0] > 0).long()


VAL = [next(batches())]


class Crash(fw.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, state):
        if state.progress.step == self.step:
            raise RuntimeError("planted")


def fit(folder, steps, *, loader=None, crash=None, resume=None, validate_every=5, val=VAL, callbacks=(), **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    crashes = [] if crash is None else [Crash(crash)]
    checkpoint = fw.Checkpoint(folder, **options)
    trainer = fw.Trainer(
        model, torch.optim.Adam(model.parameters(), 0.1), callbacks=[*callbacks, checkpoint, *crashes], device="cpu"
    )
    trainer.fit(
        DataLoader(Stream(), 8) if loader is None else loader,
        val,
        max_steps=steps,
        validate_every=validate_every if val else None,
        resume=resume,
    )
    return trainer


def files(folder):
    return sorted(file.name for file in folder.glob("*.pt") if file.name != "best.pt")


@pytest.mark.parametrize("kind", ["dataset", "generator"])
def test_a_crash_of_a_stream_leaves_a_file_to_resume_from(tmp_path, caplog, kind):
    """With the default Checkpoint the file is one step newer than the last evaluation, and the fit goes on from it."""

    def loader():
        return DataLoader(Stream(), 8) if kind == "dataset" else batches()

    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path, 20, loader=loader(), crash=13)
    assert "train_loader has no length" in caplog.text
    assert files(tmp_path) == ["step-11.pt"]
    saved = saving.read(tmp_path / "step-11.pt")
    trainer = fit(tmp_path, 20, loader=loader(), resume="auto")
    assert "has no state_dict: 11 batches are read again and skipped" in caplog.text
    assert [entry["step"] for entry in trainer.state.history] == [5, 10, 15, 20]
    assert trainer.state.history[:2] == saved["history"]
    assert files(tmp_path) == ["step-20.pt"]
    assert trainer.optimizer.state[trainer.model.weight]["step"] == 20


def test_a_resumed_stream_goes_on_at_its_place(tmp_path):
    """A stream that yields the same batches each time resumes to the bit."""
    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path / "cut", 20, crash=13)
    resumed, whole = fit(tmp_path / "cut", 20, resume="auto"), fit(tmp_path / "whole", 20)
    assert list(resumed.state.history) == list(whole.state.history)
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_without_validation_it_is_saved_at_a_fixed_interval(tmp_path):
    """A stream that is never evaluated is saved every 1,000 steps, and when the fit ends."""
    seen = []

    class See(fw.Callback):
        def on_step_end(self, state):
            seen.extend(name for name in files(tmp_path) if name not in seen)

    fit(tmp_path, 2005, val=None, loader=iter([VAL[0]] * 2010), callbacks=[See()])
    assert [*seen, *files(tmp_path)] == ["step-1000.pt", "step-2000.pt", "step-2005.pt"]


def test_the_given_interval_holds(tmp_path, caplog):
    """With every_steps those files alone are written, and resumed from; without epochs or steps there is only the best."""
    fit(tmp_path / "a", 12, every_steps=4)
    assert files(tmp_path / "a") == ["step-12.pt"]
    assert fit(tmp_path / "a", 14, every_steps=4, resume="auto").state.progress.step == 14
    fit(tmp_path / "b", 12, every_epochs=None)
    assert files(tmp_path / "b") == []
    assert "train_loader has no length" not in caplog.text


def test_a_loader_without_a_length_that_ends_has_epochs(tmp_path):
    """Where the epochs end, the file of the last complete one is the newest, until training went on after it."""

    class Finite(IterableDataset):
        def __iter__(self):
            return (pair for x, y in [VAL[0]] * 3 for pair in zip(x, y, strict=True))

    trainer = fit(tmp_path, 6, loader=DataLoader(Finite(), 8), validate_every=None)
    assert trainer.state.progress.epoch in (1, 2)
    checkpoint = trainer.callbacks[0]
    newest = checkpoint.latest()
    assert saving.read(newest)["progress"]["step"] == 6
    again = fit(tmp_path, 8, loader=DataLoader(Finite(), 8), validate_every=None, resume="auto")
    assert again.state.progress.step == 8


def test_a_stream_under_a_watch_resumes(tmp_path):
    """A hand-written loop over a stream gets the same files, and resumes from them."""

    def go(steps, resume):
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loader = DataLoader(Stream(), 8)
        with fw.Watch(
            model, optimizer, fw.Checkpoint(tmp_path), train_loader=loader, max_steps=steps, resume=resume
        ) as watch:
            for _ in watch.epochs():
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return watch.state.progress.step

    assert go(3, None) == 3
    assert files(tmp_path) == ["step-3.pt"]
    assert go(5, "auto") == 5
