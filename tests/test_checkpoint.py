"""Checkpoints: whole or absent, data only, and training resumed from them to the bit."""

import contextlib
import errno
import math
import os
import pickle
import random
import re
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import fitwatch as fw
from fitwatch import saving
from fitwatch.helpers import health


class Noisy(fw.Trainer):
    """Draws from all three global generators at every step."""

    def training_step(self, batch):
        x, y = batch
        noise = torch.randn_like(x) + random.random() + np.random.rand()  # noqa: S311, NPY002
        return self.compute_loss(self.model(x + 0.1 * noise), y)


class Crash(fw.Callback):
    """Raises at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_start(self, state):
        if state.progress.epoch == self.epoch:
            raise RuntimeError("planted")


def make(folder, data, crash=None, generator=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    trainer = Noisy(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
        callbacks=[
            fw.WeightedLoss("balanced"),
            fw.EarlyStopping(patience=50),
            fw.OverfittingDetector(),
            fw.Checkpoint(folder, **options),
            *([Crash(crash)] if crash is not None else []),
        ],
        seed=4,
        device="cpu",
    )
    loader = DataLoader(data, 16, shuffle=True, generator=generator)
    return trainer, loader, DataLoader(data, 64)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("how", ["path", "auto"])
def test_resume_at_an_epoch_is_bit_equal(tmp_path, data, how, own_generator):
    """Six epochs cut off after three and resumed in fresh objects equal six in one go: weights, optimizer, history."""

    def generator():
        return torch.Generator().manual_seed(8) if own_generator else None

    whole, train, val = make(tmp_path / "a", data, generator=generator())
    expected = whole.fit(train, val, epochs=6)
    cut, train, val = make(tmp_path / "b", data, crash=3, generator=generator())
    with pytest.raises(RuntimeError, match="planted"):
        cut.fit(train, val, epochs=6)

    torch.manual_seed(12345)
    random.seed(12345)
    np.random.seed(12345)  # noqa: NPY002
    resumed, train, val = make(tmp_path / "b", data, generator=generator())
    result = resumed.fit(train, val, epochs=6, resume="auto" if how == "auto" else tmp_path / "b" / "epoch-3.pt")
    assert expected.history == result.history
    assert expected.best == result.best
    assert expected.verdict == result.verdict
    finished, train, val = make(tmp_path / "b", data, generator=generator())
    assert expected.verdict == finished.fit(train, val, epochs=6, resume="auto").verdict
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.state.progress.step == 24
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


def test_auto_starts_fresh_where_there_is_nothing(tmp_path, data):
    """resume="auto" in an empty folder trains from the beginning."""
    trainer, train, val = make(tmp_path / "new", data)
    assert len(trainer.fit(train, val, epochs=2, resume="auto").history) == 2


def test_files_kept(tmp_path, data):
    """keep=2 leaves the two newest of each kind, and best.pt holds the weights of the best epoch."""
    trainer, train, val = make(tmp_path, data, keep=2, every_steps=3)
    result = trainer.fit(train, val, epochs=5)
    assert {"epoch-4.pt", "epoch-5.pt", "step-15.pt", "step-18.pt", "best.pt"} == {f.name for f in tmp_path.iterdir()}
    best = saving.read(tmp_path / "best.pt")
    assert result.best.step == best["progress"]["step"]
    for name, value in trainer.model.state_dict().items():  # early stopping restored the same epoch
        assert torch.equal(value, best["model"][name])


def test_what_does_not_fit_is_refused(tmp_path, data):
    """A missing file, another model, another format and a missing scheduler are errors that name the path."""
    trainer, train, val = make(tmp_path, data)
    trainer.fit(train, val, epochs=1)
    path = tmp_path / "epoch-1.pt"
    other = nn.Linear(4, 3).double()
    with pytest.raises(ValueError, match="epoch-1.pt was saved with a scheduler"):
        fw.Trainer(other, torch.optim.AdamW(other.parameters())).fit(train, val, epochs=2, resume=path)
    optimizer = torch.optim.AdamW(other.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    with pytest.raises(ValueError, match=r"epoch-1.pt does not fit this training: model\['weight'\] is missing"):
        fw.Trainer(other, optimizer, scheduler=scheduler).fit(train, val, epochs=2, resume=path)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        trainer.fit(train, val, epochs=2, resume=tmp_path / "nowhere.pt")
    content = saving.read(path)
    saving.write(tmp_path / "new.pt", {**content, "format": 99})
    with pytest.raises(
        ValueError, match=r"new.pt was written by .*\(checkpoint format 99\).*reads formats 2 and 3 only"
    ):
        trainer.fit(train, val, epochs=2, resume=tmp_path / "new.pt")
    (tmp_path / "part.pt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="part.pt can't be read"):
        trainer.fit(train, val, epochs=2, resume=tmp_path / "part.pt")


def test_a_checkpoint_of_format_1_is_refused_with_both_versions(tmp_path, data):
    """A file of fitwatch 0.1, which named no version, is refused by a sentence that names 0.1 and this version."""
    trainer, train, val = make(tmp_path, data)
    trainer.fit(train, val, epochs=1)
    content = saving.read(tmp_path / "epoch-1.pt")
    assert (content["format"], content.pop("version")) == (3, fw.__version__)
    old = tmp_path / "old.pt"
    saving.write(old, {**content, "format": 1})
    again, train, val = make(tmp_path / "again", data)
    sentence = (
        f"{old} was written by fitwatch 0.1 (checkpoint format 1), and this is fitwatch {fw.__version__}, which reads "
        "formats 2 and 3 only: finish that training with the version that started it, or load the weights alone: "
        "torch.load(path)['model']"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        again.fit(train, val, epochs=2, resume=old)
    assert again.state.progress.step == 0
    weights = torch.load(old)["model"]
    assert all(torch.equal(weights[name], value) for name, value in content["model"].items())


def test_code_in_a_checkpoint_does_not_run(tmp_path, data):
    """A poisoned file is refused, and its payload has not run."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"format": saving.FORMAT, "model": Payload()}, tmp_path / "epoch-9.pt")
    with (tmp_path / "epoch-10.pt").open("wb") as file:
        pickle.dump(Payload(), file)
    for name in ("epoch-9.pt", "epoch-10.pt"):
        with pytest.raises(ValueError, match=name):
            saving.read(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_a_folder_that_cannot_be_made_is_an_error_before_step_1(tmp_path, data):
    """A file in the way of the folder is an error that names the path, before training."""
    (tmp_path / "file").write_text("")
    trainer, train, val = make(tmp_path / "file" / "checkpoints", data)
    with pytest.raises(OSError, match="file/checkpoints"):
        trainer.fit(train, val, epochs=1)
    assert trainer.state.progress.step == 0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """When a write fails, the error names the path, the old file still reads, and nothing is left behind."""
    path = tmp_path / "a.pt"
    saving.write(path, {"format": saving.FORMAT, "value": 1})

    with pytest.raises(ValueError, match=r"a\.pt was not written: value is <function"):
        saving.write(path, {"format": saving.FORMAT, "value": lambda: None})
    assert saving.read(path)["value"] == 1
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_save_leaves_a_complete_checkpoint(tmp_path):
    """Killed at any moment of endless saving, a process leaves a file that reads, of one of the saves whole."""
    code = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from fitwatch import saving
        from fitwatch.helpers import health
        for i in range(10**9):
            content = {"format": saving.FORMAT, "a": torch.full((500_000,), i), "b": torch.full((500_000,), i)}
            saving.write(Path(sys.argv[1]), content)
            print(i, flush=True)
        """
    )
    for attempt in range(8):
        path = tmp_path / f"{attempt}.pt"
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
            for _ in range(attempt + 1):
                process.stdout.readline()
            try:
                process.wait(timeout=0.002 * attempt)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        content = saving.read(path)
        assert len(set(content["a"].tolist()) | set(content["b"].tolist())) == 1


def test_resume_asked_for_fewer_epochs_than_are_done_trains_no_more(tmp_path, data):
    """A fit of 2 epochs resumed after 3 ends at once, with the history it had."""
    trainer, train, val = make(tmp_path, data)
    trainer.fit(train, val, epochs=3)
    again, train, val = make(tmp_path, data)
    assert len(again.fit(train, val, epochs=2, resume="auto").history) == 3
    assert again.state.progress.step == 12


def test_a_folder_of_another_run_is_refused(tmp_path, data):
    """A fresh fit does not mix its checkpoints with those of an earlier run, which stay as they were."""
    trainer, train, val = make(tmp_path, data)
    trainer.fit(train, val, epochs=2)
    before = (tmp_path / "epoch-2.pt").read_bytes()
    other, train, val = make(tmp_path, data)
    with pytest.raises(FileExistsError, match=r'epoch-2.pt of an earlier run.*resume="auto"'):
        other.fit(train, val, epochs=1)
    assert (tmp_path / "epoch-2.pt").read_bytes() == before


def test_a_training_that_had_stopped_does_not_go_on(tmp_path, data):
    """Resuming a training that early stopping had ended trains no more, and gives its reason, history and weights."""

    def again():
        trainer, train, val = make(tmp_path, data)
        trainer.callbacks = [fw.EarlyStopping(patience=1, min_delta=10.0), fw.Checkpoint(tmp_path)]
        return trainer, trainer.fit(train, val, epochs=9, resume="auto")

    (first, stopped), (second, resumed) = again(), again()
    assert stopped.stop_reason == resumed.stop_reason
    assert "early stopping" in stopped.stop_reason
    assert stopped.history == resumed.history
    assert len(stopped.history) == 2
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [0, 1])
def test_the_place_of_checkpoint_in_the_list_does_not_matter(tmp_path, data, order):
    """Without validation, with Checkpoint before or after EarlyStopping, a resumed training stops where a whole one does."""

    def fit(folder, epochs, resume=None):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        callbacks = [fw.EarlyStopping("train/loss", patience=2, min_delta=10.0), fw.Checkpoint(folder)]
        trainer = fw.Trainer(
            model, torch.optim.SGD(model.parameters(), 0.1), callbacks=callbacks[:: 1 - 2 * order], device="cpu"
        )
        return trainer.fit(DataLoader(data, 16), epochs=epochs, resume=resume), model

    whole, expected = fit(tmp_path / "a", 9)
    fit(tmp_path / "b", 2)
    resumed, actual = fit(tmp_path / "b", 9, resume="auto")
    assert whole.history == resumed.history
    assert torch.equal(expected.weight, actual.weight)
    assert (tmp_path / "b" / "best.pt").exists()


def test_resuming_from_an_older_file_puts_the_newer_ones_aside(tmp_path, data):
    """After a resume from epoch 1, "auto" does not find epochs of the abandoned training."""
    trainer, train, val = make(tmp_path, data, keep=5)
    trainer.fit(train, val, epochs=4)
    trainer, train, val = make(tmp_path, data, keep=5, crash=2)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(train, val, epochs=4, resume=tmp_path / "epoch-1.pt")
    assert {"epoch-1.pt", "epoch-2.pt", "epoch-3.pt.old", "epoch-4.pt.old", "best.pt"} - {
        f.name for f in tmp_path.iterdir()
    } == set()
    assert trainer.callbacks[3].latest().name == "epoch-2.pt"


def test_auto_takes_the_newest_file_of_both_kinds(tmp_path, data):
    """resume="auto" goes on from step files alone, and from whichever of a step and an epoch file is newer."""
    trainer, train, val = make(tmp_path, data, every_epochs=None, every_steps=3)
    trainer.fit(train, val, max_steps=3)
    again, train, val = make(tmp_path, data, every_steps=3)
    again.fit(train, val, epochs=2, resume="auto")
    assert again.state.resumed_from.name == "step-3.pt"
    assert {"step-6.pt", "epoch-2.pt"} <= {f.name for f in tmp_path.iterdir()}
    third, train, val = make(tmp_path, data, every_steps=3)
    third.fit(train, val, epochs=3, resume="auto")
    assert third.state.resumed_from.name == "epoch-2.pt"


def test_the_generator_of_a_batch_sampler_is_resumed(tmp_path, data):
    """A loader whose batch sampler draws from a generator of its own resumes to the bit."""

    def fit(folder, epochs, resume=None):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 16, drop_last=False))
        trainer = fw.Trainer(
            model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.Checkpoint(folder)], device="cpu"
        )
        trainer.fit(loader, epochs=epochs, resume=resume)
        return model.weight

    expected = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2)
    assert torch.equal(expected, fit(tmp_path / "b", 4, resume="auto"))


def test_a_compiled_model_and_itself_share_checkpoints(tmp_path, data):
    """The checkpoint of a compiled model has the plain names, and loads into the plain model."""
    model = nn.Linear(4, 3).double()
    compiled = torch.compile(model, backend="eager")
    fw.Trainer(
        compiled, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.Checkpoint(tmp_path)], device="cpu"
    ).fit(DataLoader(data, 16), epochs=1)
    saved = saving.read(tmp_path / "epoch-1.pt")["model"]
    assert set(saved) == {"weight", "bias"}
    assert torch.equal(saved["weight"], model.weight)


def test_what_a_loss_learns_is_resumed(tmp_path, data):
    """A loss with a parameter of its own, trained beside the model, resumes to the bit."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output, target):
            return nn.functional.cross_entropy(output * self.scale, target)

    def fit(folder, epochs, resume=None):
        torch.manual_seed(0)
        model, loss = nn.Linear(4, 3).double(), Learned().double()
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.1)
        fw.Trainer(model, optimizer, loss, callbacks=[fw.Checkpoint(folder)], device="cpu").fit(
            DataLoader(data, 16), epochs=epochs, resume=resume
        )
        return loss.scale

    expected = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2)
    assert torch.equal(expected, fit(tmp_path / "b", 4, resume="auto"))


@pytest.mark.parametrize("every_steps", [None, 1])
def test_non_finite_weights_replace_no_good_file(tmp_path, every_steps):
    """When weights turn NaN in the third epoch, the files before stay, and no NaN is best by a finite metric."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.cat([torch.zeros(36), torch.ones(4)]).long()
    x[36:] += 9

    class Spoilt(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 6:
                with torch.no_grad():
                    state.model.weight[:] = math.nan

    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.bias[1] += 50  # all are taken for class 1, which is worse than what arg-max makes of NaN
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 1e-3),
        callbacks=[
            fw.EarlyStopping("val/accuracy", mode="max"),
            Spoilt(),
            fw.Checkpoint(tmp_path, every_steps=every_steps),
        ],
        metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).double().mean()},
        device="cpu",
    )
    result = trainer.fit([(x.clone(), y)] * 2, [(x, y)], epochs=9)
    assert "non-finite weights at step 6 (weight is the first)" in result.stop_reason
    assert len(result.history) == 2
    assert health.not_finite(trainer.model) is None  # restored
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"epoch-2.pt", "best.pt"} | ({"step-5.pt"} if every_steps else set())
    for name in files:
        assert all(p.isfinite().all() for p in saving.read(tmp_path / name)["model"].values())


def best_step(folder):
    return saving.read(folder / "best.pt")["progress"]["step"]


def planned(folder, values, **options):
    """A trainer whose validation losses are ``values``, one after the other over all of its fits."""
    model, losses = nn.Linear(4, 3).double(), iter(values)

    class Planned(fw.Trainer):
        def validation_step(self, batch):
            return torch.tensor(next(losses))

    return Planned(
        model,
        torch.optim.SGD(model.parameters(), 1e-3),
        callbacks=[fw.Checkpoint(folder, **options)],
        device="cpu",
        sanity_steps=0,
    )


def test_a_second_fit_replaces_the_best_by_a_better_one_only(tmp_path, data):
    """The history goes on in each fit of a Trainer, and best.pt is the best of all of them."""
    loader = [data.tensors]
    trainer = planned(tmp_path, [0.9, 0.5, 0.7, 0.8, 0.6, 0.4])
    trainer.fit(loader, loader, epochs=3)
    trainer.fit(loader, loader, epochs=2)
    assert best_step(tmp_path) == 2
    trainer.fit(loader, loader, epochs=1)
    assert best_step(tmp_path) == 6


def test_the_best_of_another_run_is_put_aside(tmp_path, data):
    """Where only best.pt is kept, a new run in the folder does not overwrite it."""
    loader = [data.tensors]
    planned(tmp_path, [0.9, 0.5], every_epochs=None).fit(loader, loader, epochs=2)
    planned(tmp_path, [0.7], every_epochs=None).fit(loader, loader, epochs=1)
    assert best_step(tmp_path) == 1
    assert saving.read(tmp_path / "best.pt.old")["progress"]["step"] == 2


def test_the_best_of_a_future_that_is_given_up_is_put_aside(tmp_path, data):
    """Resumed from an older file, the best of what came after it is best.pt.old; an older best stays."""
    loader = [data.tensors]
    planned(tmp_path, [0.9, 0.8, 0.85, 0.5], keep=9).fit(loader, loader, epochs=4)
    planned(tmp_path, [0.95], keep=9).fit(loader, loader, epochs=4, resume=tmp_path / "epoch-3.pt")
    assert saving.read(tmp_path / "best.pt.old")["progress"]["step"] == 4
    assert not (tmp_path / "best.pt").exists()  # nothing since is better than the 0.8 of step 2
    planned(tmp_path, [0.7], keep=9).fit(loader, loader, epochs=5, resume="auto")
    assert best_step(tmp_path) == 5


def test_changed_settings_are_named_on_resume(tmp_path, data, caplog):
    """Other class weights, another lr and another accumulate give one warning; the same give none."""

    def go(epochs, *callbacks, lr=0.1, **options):
        model = nn.Linear(4, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr)
        trainer = fw.Trainer(model, optimizer, callbacks=[*callbacks, fw.Checkpoint(tmp_path)], device="cpu", **options)
        trainer.fit([data.tensors], [data.tensors], epochs=epochs, resume="auto")
        return [record.getMessage() for record in caplog.records if "different settings" in record.getMessage()]

    assert not go(1)
    assert not go(2)
    (said,) = go(3, fw.WeightedLoss(), lr=0.2, accumulate=2)
    assert "lr 0.2 (was 0.1, which is kept), class_weights balanced (was none), accumulate 2 (was 1)" in said


def test_another_optimizer_is_refused_on_resume(tmp_path, data):
    """The state of Adam is nothing for SGD: refused by name, before the first step."""
    for kind in (torch.optim.Adam, torch.optim.SGD):
        model = nn.Linear(4, 3).double()
        trainer = fw.Trainer(model, kind(model.parameters(), 0.1), callbacks=fw.Checkpoint(tmp_path), device="cpu")
        if kind is torch.optim.Adam:
            trainer.fit([data.tensors], epochs=1)
            continue
        with pytest.raises(ValueError, match="was saved with the optimizer Adam, and this fit has SGD"):
            trainer.fit([data.tensors], epochs=2, resume="auto")


def test_ctrl_c_within_a_save_is_ctrl_c(tmp_path):
    """A KeyboardInterrupt while the file is written stays one, and leaves the old file and no part of the new one."""

    def interrupt(*_):
        raise KeyboardInterrupt

    def write_on():
        while True:
            saving.write(tmp_path / "a.pt", content)

    content = {str(i): torch.zeros(100_000) for i in range(100)}
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for k in range(1, 9):
            saving.write(tmp_path / "a.pt", {"x": 1})
            signal.setitimer(signal.ITIMER_REAL, 0.02 + 0.003 * k)
            with pytest.raises(KeyboardInterrupt):
                write_on()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


class Plain(Dataset):
    """Examples without randomness, as a worker process sees them."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.tensor([i, 1.0, -i, 0.5], dtype=torch.float64) / 64, i % 3


class Augmented(Plain):
    """The same with noise that the worker draws."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(4), y


@pytest.mark.parametrize(
    ("loop", "dataset", "persistent", "generator", "equal"),
    [
        ("Trainer", Plain, True, False, True),
        ("Watch", Plain, True, True, True),
        ("Watch", Augmented, False, False, True),
        ("Trainer", Augmented, True, False, False),
    ],
)
def test_workers_resume_to_the_bit_or_are_named(tmp_path, caplog, loop, dataset, persistent, generator, equal):
    """The order of examples and dropout are resumed with persistent workers too; what they draw is not, and is named."""

    def fit(folder, epochs, resume=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        options = {"num_workers": 2, "persistent_workers": persistent}
        own = torch.Generator().manual_seed(3) if generator else None
        train = DataLoader(dataset(), 16, shuffle=True, generator=own, **options)
        loaders, callbacks = (train, DataLoader(Plain(), 32, **options)), fw.Checkpoint(folder)
        if loop == "Trainer":
            trainer = fw.Trainer(model, optimizer, callbacks=callbacks, device="cpu")
            return trainer.fit(*loaders, epochs=epochs, resume=resume).history
        with fw.Watch(model, optimizer, callbacks, train_loader=train, val_loader=loaders[1], resume=resume) as watch:
            for _ in watch.epochs(epochs):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                watch.validate()
        return watch.result.history

    expected = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2)
    assert "persistent_workers" not in caplog.text
    assert (fit(tmp_path / "b", 4, "auto") == expected) is equal
    assert ("persistent_workers=True in train_loader and val_loader" in caplog.text) is persistent


@pytest.mark.parametrize("refused", ["open", "fsync"])
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch, refused):
    """Where a folder can't be opened (Windows) or flushed (some mounts), the file is complete and the training goes on."""
    real_open, real_fsync = os.open, os.fsync

    def no_open(path, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *args, **options)

    def no_fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    monkeypatch.setattr(os, refused, no_open if refused == "open" else no_fsync)
    saving.write(tmp_path / "a.pt", {"format": saving.FORMAT, "value": 3})
    assert saving.read(tmp_path / "a.pt")["value"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("code", "fails"), [("EINVAL", False), ("ENOTSUP", False), ("ENOSYS", False), ("ENOSPC", True), ("EIO", True)]
)
def test_a_full_or_broken_disk_stays_an_error(tmp_path, monkeypatch, code, fails):
    """A file system without fsync is accepted; a full or broken disk is an error, and the older file stays."""
    saving.write(tmp_path / "a.pt", {"format": saving.FORMAT, "value": 1})

    def broken(descriptor):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"could not write the checkpoint .*a\.pt") if fails else contextlib.nullcontext():
        saving.write(tmp_path / "a.pt", {"format": saving.FORMAT, "value": 2})
    assert saving.read(tmp_path / "a.pt")["value"] == (1 if fails else 2)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
