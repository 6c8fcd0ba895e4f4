"""Checkpoint files under faults: flipped bits, kills, full disks, links, a second fit, hostile content."""

import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fitwatch as fw
from fitwatch import files, locking, saving
from fitwatch.callbacks import checkpoint as checkpoint_module
from fitwatch.helpers.primitives import copied_to_host


class Keep(fw.Callback):
    """Has a state, and an attribute that is not in it."""

    def __init__(self):
        self.seen, self.other = [0], 0

    def on_step_end(self, state):
        self.seen.append(state.progress.step)

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict):
        self.other = 1
        self.seen[:] = state_dict["seen"]
        if "poison" in state_dict:
            raise ValueError("poisoned")


def make(folder=None, hook=None, seed=4, **options):
    """A small fit with everything in it that a checkpoint restores."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3))
    if hook is not None:
        model[3].register_load_state_dict_pre_hook(hook)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    data = TensorDataset(x, y)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    trainer = fw.Trainer(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        callbacks=[Keep(), fw.EarlyStopping(), *([fw.Checkpoint(folder, **options)] if folder else [])],
        seed=seed,
        device="cpu",
    )
    return trainer, DataLoader(data, 8, sampler=sampler), DataLoader(data, 24)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file saved within an epoch, so that it has a place too."""
    folder = tmp_path_factory.mktemp("saved")
    trainer, train, val = make(folder, every_steps=2, keep=9)
    trainer.fit(train, val, epochs=2)
    return folder / "step-4.pt"


def shown(trainer, loader):
    """All that a refused resume must leave as it was."""
    keep, stopping = trainer.callbacks[:2]
    return repr(
        [
            [(n, v.tolist()) for n, v in trainer.model.state_dict().items()],
            [p.requires_grad for p in trainer.model.parameters()],
            trainer.optimizer.state_dict(),
            trainer.scheduler.state_dict(),
            [keep.seen, keep.other, stopping.state_dict()],
            [torch.get_rng_state().tolist(), loader.sampler.generator.get_state().tolist()],
        ]
    )


# -- flipped bits ------------------------------------------------------------------------------------------------------


def flipped(path, bit, target):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    target.write_bytes(content)
    return target


@settings(max_examples=1000, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_no_flipped_bit_is_read(saved, data):
    """Of 1,000 single bits anywhere in a file, none is read silently: the error names the file."""
    bit = data.draw(st.integers(0, 8 * saved.stat().st_size - 1))
    target = flipped(saved, bit, saved.with_name("flipped.bin"))
    with pytest.raises(saving.DamagedError, match=r"flipped\.bin"):
        saving.read(target)


def test_no_flipped_bit_of_the_ends_is_read(saved):
    """Each bit of the zip file's last records and of the checksum, and each of its first header."""
    size = saved.stat().st_size
    for bit in [*range(8 * 64), *range(8 * (size - 120), 8 * size)]:
        with pytest.raises(saving.DamagedError, match=r"flipped\.bin"):
            saving.read(flipped(saved, bit, saved.with_name("flipped.bin")))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_no_cut_file_is_read(saved, data):
    """A file that ends anywhere before its end is refused."""
    target = saved.with_name("cut.bin")
    target.write_bytes(saved.read_bytes()[: data.draw(st.integers(0, saved.stat().st_size - 1))])
    with pytest.raises(saving.DamagedError, match=r"cut\.bin"):
        saving.read(target)


def test_a_file_without_a_checksum(saved, tmp_path):
    """A file of format 2 had none and is read, unless a value was changed; one of format 3 must have it."""
    content = saving.read(saved)
    torch.save({**content, "format": 2}, tmp_path / "old.pt")
    assert saving.read(tmp_path / "old.pt")["progress"] == content["progress"]
    raw = (tmp_path / "old.pt").read_bytes()
    place = raw.index(content["model"]["0.weight"].numpy().tobytes())
    with pytest.raises(saving.DamagedError, match="does not have its checksum"):
        saving.read(flipped(tmp_path / "old.pt", 8 * place + 3, tmp_path / "flipped.bin"))
    torch.save(content, tmp_path / "new.pt")
    with pytest.raises(saving.DamagedError, match="has no checksum"):
        saving.read(tmp_path / "new.pt")


def test_torch_reads_the_file(saved):
    """The checksum is the comment of the zip file, so torch.load needs nothing of fitwatch."""
    content = torch.load(saved, weights_only=True, mmap=True)
    assert all(torch.equal(v, content["model"][n]) for n, v in saving.read(saved)["model"].items())


# -- what does not fit -------------------------------------------------------------------------------------------------

OPTIMIZER = ("optimizer", "state", 0)
WRONG = [
    (("format",), 3.5),
    (("model",), [1]),
    (("model", "0.weight"), torch.zeros(5, 3)),
    (("model", "0.weight"), torch.zeros(5, 4).double()),
    (("model", "0.weight"), "weights"),
    (("model", "3.bias"), None),
    (("model", "more"), torch.zeros(1)),
    (("trained",), {"0.weight": torch.zeros(1)}),
    (("loss",), 3),
    (("optimizer", "param_groups"), []),
    (("optimizer", "param_groups", 0, "lr"), "fast"),
    (("optimizer", "param_groups", 0, "lr"), float("nan")),
    (("optimizer", "param_groups", 0, "lr"), -1.0),
    (("optimizer", "param_groups", 0, "eps"), [1]),
    (("optimizer", "param_groups", 0, "params"), [0, 0, 1, 2, 3, 4]),
    (("optimizer", "state"), [1]),
    ((*OPTIMIZER, "exp_avg"), torch.zeros(4, 5)),
    ((*OPTIMIZER, "step"), torch.tensor(-1.0)),
    ((*OPTIMIZER, "step"), torch.tensor(float("inf"))),
    (("optimizer", "state", 77), {}),
    (("scheduler", "last_epoch"), -5),
    (("scheduler", "last_epoch"), "../victim"),
    (("scheduler", "base_lrs"), 0.1),
    (("groups",), [["0.weight"]]),
    (("groups",), "names"),
    (("frozen",), [3]),
    (("generators", 0), torch.zeros(3)),
    (("callbacks", "Keep"), {"seen": [5], "poison": True}),
    (("callbacks", "EarlyStopping", "rule"), {"best": 1}),
    (("guard", "skipped"), -1),
    (("guard", "in_a_row"), None),
    (("settings", "lr"), 0.1),
    (("progress", "step"), -1),
    (("progress", "step"), 10**400),
    (("progress", "step"), True),
    (("progress", "epoch_batch"), None),
    (("progress", "epoch_step"), 99),
    (("progress", "more"), 1),
    (("history", 0, "epoch"), 1.5),
    (("history", 0, "val/loss"), "low"),
    (("train_loss",), [1.0]),
    (("rng",), {"torch": 1}),
    (("rng", "torch"), torch.zeros(7, dtype=torch.uint8)),
    (("rng", "python"), [3, [1, 2], None]),
    (("position", "live"), ["../victim"]),
    (("position", "started", "rng"), {}),
    (("position", "started", "sources"), []),
    (("other_ranks",), [{}]),
]


def changed(content, key, value):
    part = content
    for name in key[:-1]:
        part = part[name]
    part[key[-1]] = value
    return content


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else "")
def test_what_does_not_fit_changes_nothing(saved, tmp_path, key, value):
    """One ValueError names the file and the key, and model, optimizer, scheduler, callbacks and generators are as before."""
    path = tmp_path / "wrong.pt"
    saving.write(path, changed(saving.read(saved), key, value))
    trainer, train, val = make(seed=None)
    before = shown(trainer, train)
    named = [part for part in key if isinstance(part, str)][-1]
    named = {"torch": "rng", "python": "rng", "rule": "EarlyStopping"}.get(named, named)
    with pytest.raises(ValueError, match=rf"wrong\.pt.*{named}"):
        trainer.fit(train, val, epochs=2, resume=path)
    assert shown(trainer, train) == before
    assert trainer.state.progress.step == 0
    assert len(trainer.state.history) == 0


@pytest.mark.parametrize("missing", sorted({key[0] for key, _ in WRONG} - {"format", "groups", "frozen", "guard"}))
def test_a_missing_key_is_named(saved, tmp_path, missing):
    """Each key that a save writes must be there."""
    content = saving.read(saved)
    del content[missing]
    saving.write(tmp_path / "wrong.pt", content)
    trainer, train, val = make()
    with pytest.raises(ValueError, match=rf"wrong\.pt is not a valid checkpoint: {missing} must be"):
        trainer.fit(train, val, epochs=2, resume=tmp_path / "wrong.pt")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_resume_that_is_interrupted_changes_nothing(saved, error):
    """Ctrl-C, or an error, when half of the weights are loaded: the model has all of its own weights again."""

    def interrupt(*_):
        raise error("planted")

    trainer, train, val = make(hook=interrupt, seed=None)
    before = shown(trainer, train)
    with pytest.raises((KeyboardInterrupt, ValueError), match="planted"):
        trainer.fit(train, val, epochs=2, resume=saved)
    assert shown(trainer, train) == before


def test_a_signal_within_a_resume_waits(saved):
    """SIGINT while the weights are loaded ends the fit when all of them are, those of the file."""

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    trainer, train, val = make(hook=interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(train, val, epochs=2, resume=saved)
    expected = saving.read(saved)["model"]
    assert all(torch.equal(v, expected[n]) for n, v in trainer.model.state_dict().items())


def test_an_interrupted_restore_of_the_best_weights_mixes_nothing():
    """Ctrl-C in the middle of putting the best weights back leaves all of them, and is raised."""
    best, armed = {}, []

    class Stop(fw.Callback):
        def on_validation_end(self, state):
            if state.history.is_best:
                best.update({n: v.clone() for n, v in state.model.state_dict().items()})
            if state.progress.epoch == 3:
                armed.append(True)

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    trainer, train, val = make(hook=interrupt)
    worse = [(x, (y + 1) % 3) for x, y in val]
    trainer.callbacks = [Stop(), fw.EarlyStopping(patience=9)]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(train, worse, epochs=4)
    assert trainer.state.history[-1]["val/loss"] > trainer.state.history[0]["val/loss"]
    assert all(torch.equal(v, best[n]) for n, v in trainer.model.state_dict().items())


# -- resume="auto" -----------------------------------------------------------------------------------------------------


def damage(path, how):
    if how == "flipped":
        flipped(path, 8 * (path.stat().st_size // 2), path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_text("not a checkpoint")


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "other"])
@pytest.mark.parametrize("damaged", [1, 2, 5])
def test_auto_starts_from_the_newest_whole_file(tmp_path, caplog, how, damaged):
    """Damaged files are put aside and named; training goes on from the newest whole one, or from the beginning."""
    trainer, train, val = make(tmp_path, every_steps=2, keep=2)
    whole = trainer.fit(train, val, epochs=2).history
    newest = ["epoch-2.pt", "step-6.pt", "step-4.pt", "epoch-1.pt"]
    for name in newest[:damaged]:
        damage(tmp_path / name, how)
    again, train, val = make(tmp_path, every_steps=2, keep=2)
    assert again.fit(train, val, epochs=2, resume="auto").history == whole
    found = again.state.resumed_from
    assert (None if found is None else found.name) == (newest[damaged] if damaged < 4 else None)
    for name in newest[:damaged]:
        assert f"{name} is" in caplog.text or f"{name} can't be read" in caplog.text or f"{name}," in caplog.text
        assert (tmp_path / f"{name}.damaged").exists()
    assert ("training starts from the beginning" in caplog.text) is (damaged == 5)


def test_auto_keeps_what_was_damaged_before(tmp_path):
    """A second damaged file of one name does not replace the first."""
    for content in ("first", "second"):
        (tmp_path / "epoch-1.pt").write_text(content)
        trainer, train, val = make(tmp_path, every_epochs=None)
        trainer.fit(train, val, epochs=1, resume="auto")
    assert (tmp_path / "epoch-1.pt.damaged").read_text() == "first"
    assert (tmp_path / "epoch-1.pt.damaged-2").read_text() == "second"


def test_auto_does_not_give_up_a_file_of_another_format(tmp_path):
    """A whole file of another format is refused by name, as it is without "auto", and stays."""
    saving.write(tmp_path / "epoch-1.pt", {"format": 1})
    trainer, train, val = make(tmp_path)
    with pytest.raises(ValueError, match=r"epoch-1\.pt was written by fitwatch 0\.1"):
        trainer.fit(train, val, epochs=1, resume="auto")
    assert (tmp_path / "epoch-1.pt").exists()


# -- retention ---------------------------------------------------------------------------------------------------------


def test_only_files_of_fitwatch_are_deleted(tmp_path):
    """A user's own files with names like those of checkpoints stay, and so does what links lead to."""
    mine = [
        tmp_path / name for name in ("epoch-0.pt", "step-01.pt", "epoch-².pt", "step-1.pt.part-x", "epoch-1.pt.bak")
    ]
    for file in mine:
        file.write_text("mine")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "step-1.pt.part-999999999").symlink_to(tmp_path / "victim")
    trainer, train, val = make(tmp_path, every_steps=1)
    with pytest.raises(FileExistsError, match=r"epoch-0\.pt"):
        trainer.fit(train, val, epochs=2)
    mine.pop(0).rename(tmp_path / "elsewhere")

    class Add(fw.Callback):
        def on_epoch_start(self, state):
            for name in ("epoch-0.pt", "epoch-99.pt"):
                (tmp_path / name).write_text("mine")

    trainer, train, val = make(tmp_path, every_steps=1)
    trainer.callbacks = [Add(), *trainer.callbacks]
    trainer.fit(train, val, epochs=2)
    assert all(file.read_text() == "mine" for file in [*mine, tmp_path / "victim", *tmp_path.glob("epoch-*[09].pt")])
    assert {"step-6.pt", "epoch-2.pt"} <= {f.name for f in tmp_path.iterdir()}
    assert {"epoch-0.pt", "epoch-99.pt"} <= {f.name for f in tmp_path.iterdir()}
    assert not {"step-5.pt", "epoch-1.pt"} & {f.name for f in tmp_path.iterdir()}


def test_saves_by_the_clock(tmp_path):
    """every_minutes saves once the time has passed, counted from the last save of any kind."""
    for minutes, names in ((1e-9, {"step-6.pt"}), (60, set())):
        folder = tmp_path / str(minutes)
        trainer, train, val = make(folder, every_minutes=minutes)
        trainer.fit(train, val, epochs=2)
        assert {f.name for f in folder.iterdir()} == {"epoch-2.pt", "best.pt"} | names
    with pytest.raises(ValueError, match="every_minutes must be finite and greater than 0"):
        fw.Checkpoint(tmp_path, every_minutes=0)


# -- one fit per folder ------------------------------------------------------------------------------------------------

LIVE = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from fitwatch.locking import FolderLock
    lock = FolderLock(Path(sys.argv[1]))
    lock.acquire()
    print("locked", flush=True)
    sys.stdin.read()
    """
)


def test_a_second_fit_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    """The error names host and process, before anything is changed; a killed process locks nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        for resume in (None, "auto"):
            (tmp_path / "epoch-1.pt").write_text("damaged")
            trainer, train, val = make(tmp_path)
            match = f"is in use by the fit of process {process.pid} on host {socket.gethostname()}"
            with pytest.raises(RuntimeError, match=match):
                trainer.fit(train, val, epochs=1, resume=resume)
        assert {f.name for f in tmp_path.iterdir()} == {"fit.lock", "epoch-1.pt"}
    finally:
        process.kill()
    process.communicate()
    trainer, train, val = make(tmp_path)
    trainer.fit(train, val, epochs=1, resume="auto")
    assert {f.name for f in tmp_path.iterdir()} == {"epoch-1.pt", "epoch-1.pt.damaged", "best.pt"}


def test_a_fit_within_a_fit_needs_a_folder_of_its_own(tmp_path):
    """Two fits of one process in one folder are refused too, and a fit that failed gives the folder free."""

    class Nested(fw.Callback):
        def on_epoch_start(self, state):
            trainer, train, val = make(tmp_path)
            trainer.fit(train, val, epochs=1)

    trainer, train, val = make(tmp_path)
    trainer.callbacks = [Nested(), *trainer.callbacks]
    with pytest.raises(RuntimeError, match="is in use by another fit of this process"):
        trainer.fit(train, val, epochs=1)
    trainer, train, val = make(tmp_path)
    trainer.fit(train, val, epochs=1)


def test_tensorboard_locks_its_run_too(tmp_path):
    """Two forks can't go on in one run folder at the same time."""
    trainer, train, val = make(tmp_path / "saved")
    trainer.callbacks = [*trainer.callbacks, fw.TensorBoard(tmp_path / "runs", show_link=False)]
    trainer.fit(train, val, epochs=1)
    lock = locking.FolderLock(tmp_path / "runs/run")
    lock.acquire()
    try:
        fork, train, val = make(tmp_path / "fork")
        fork.callbacks = [*fork.callbacks, fw.TensorBoard(tmp_path / "runs", show_link=False)]
        with pytest.raises(RuntimeError, match="runs/run is in use by another fit"):
            fork.fit(train, val, epochs=2, resume=tmp_path / "saved/epoch-1.pt")
    finally:
        lock.release()
    fork.fit(train, val, epochs=2, resume=tmp_path / "saved/epoch-1.pt")
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["run"]


def stale(folder, **changes):
    """Write the lock of a fit that has this process's number."""
    lock = locking.FolderLock(folder)
    lock.acquire()
    content = json.loads((folder / "fit.lock").read_bytes())
    lock.release()
    (folder / "fit.lock").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": "7"}, {"pid": "x"}])
def test_the_lock_of_a_dead_process_counts_for_nothing(tmp_path, changes):
    """A number that no process has, one that another process has by now, and a file that is no lock."""
    stale(tmp_path, **changes)
    lock = locking.FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("changes", [{"host": "other"}, {"place": "another container"}])
def test_a_lock_of_another_machine_is_watched(tmp_path, monkeypatch, caplog, changes, renewed):
    """It is taken over when it has shown no sign of life for a while, and refused as soon as it shows one."""
    monkeypatch.setattr(locking, "_SILENT", 30.0 if renewed else 1.0)
    stale(tmp_path, **changes)
    lock = locking.FolderLock(tmp_path)
    if renewed:
        timer = threading.Timer(1.0, os.utime, [tmp_path / "fit.lock"])
        timer.start()
        with pytest.raises(RuntimeError, match="is in use by"):
            lock.acquire()
        timer.join()
    else:
        lock.acquire()
        lock.release()
    assert "waiting" in caplog.text


def test_a_fit_whose_folder_was_taken_over_ends(tmp_path):
    """A fit that was taken for dead saves nothing more over the files of the new one."""

    class Take(fw.Callback):
        def on_validation_end(self, state):
            stale(tmp_path / "other", host="other")
            (tmp_path / "other/fit.lock").replace(tmp_path / "saved/fit.lock")

    (tmp_path / "other").mkdir()
    trainer, train, val = make(tmp_path / "saved")
    trainer.callbacks = [Take(), *trainer.callbacks]
    with pytest.raises(RuntimeError, match="is in use by the fit of process .* on host other"):
        trainer.fit(train, val, epochs=1)
    assert [f.name for f in (tmp_path / "saved").iterdir()] == ["fit.lock"]


def test_a_running_lock_is_renewed(tmp_path, monkeypatch):
    """While a fit runs, the time of the file moves."""
    monkeypatch.setattr(locking, "_RENEWED", 0.05)
    lock = locking.FolderLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / "fit.lock", (1, 1))
    while (tmp_path / "fit.lock").stat().st_mtime < 2:
        time.sleep(0.02)
    lock.release()


# -- links -------------------------------------------------------------------------------------------------------------


NAMES = {"whole": "epoch-1.pt", "part": f"epoch-1.pt.part-{os.getpid()}", "best": "best.pt", "lock": "fit.lock"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_no_link_is_followed(tmp_path, name):
    """A link in the place of a file that a fit writes is replaced or refused, and what it leads to stays."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).symlink_to(tmp_path / "victim")
    trainer, train, val = make(tmp_path / "saved")
    try:
        trainer.fit(train, val, epochs=1, resume="auto")
        assert saving.read(tmp_path / "saved/epoch-1.pt")["progress"]["epoch"] == 1
    except OSError as error:
        assert name == "fit.lock" and error.__cause__.errno == errno.ELOOP  # noqa: PT017, PT018 - one of both
    assert (tmp_path / "victim").read_text() == "mine"


# -- writing in the background -----------------------------------------------------------------------------------------


def test_a_file_written_in_the_background_is_the_same(tmp_path, monkeypatch):
    """The weights change while it is written, and it has those of its step; older files go afterwards."""
    results = [None] * 3
    real = saving.write

    def slow(path, content):
        if threading.current_thread() is not threading.main_thread():
            seen.append(path.name)
            time.sleep(0.05)  # some steps
        real(path, content)

    monkeypatch.setattr(saving, "write", slow)
    for k, large in enumerate((1 << 60, 0, 0)):
        seen = []
        monkeypatch.setattr(checkpoint_module, "_LARGE", large)
        trainer, train, val = make(tmp_path / str(k), every_steps=2, keep=9, background=k < 2)
        trainer.fit(train, val, epochs=2)
        assert bool(seen) is (k == 1)
        results[k] = {f.name: str(saving.read(f)) for f in sorted((tmp_path / str(k)).iterdir())}
    assert results[0] == results[1] == results[2]
    assert {"step-2.pt", "step-4.pt", "step-6.pt", "epoch-1.pt", "epoch-2.pt", "best.pt"} == set(results[0])


@pytest.mark.parametrize("step", [2, 6])
def test_an_error_in_the_background_ends_the_fit(tmp_path, monkeypatch, step):
    """It is raised after a later step, or at the end of the fit, and the file before stays."""
    monkeypatch.setattr(checkpoint_module, "_LARGE", 0)
    real = saving.write

    def fails(path, content):
        if path.name == f"step-{step}.pt":
            raise OSError(errno.ENOSPC, "planted")
        real(path, content)

    monkeypatch.setattr(saving, "write", fails)
    trainer, train, val = make(tmp_path, every_steps=2, every_epochs=None, best=False)
    with pytest.raises(OSError, match="planted"):
        trainer.fit(train, val, epochs=2)
    assert {f.name for f in tmp_path.iterdir()} == ({"step-4.pt"} if step == 6 else set())


def test_a_copy_keeps_what_a_file_keeps():
    """Tied, transposed, expanded, conjugate and sparse tensors, and the versions in a state dict; nothing is shared."""
    w = torch.randn(5, 4)
    content = {
        "tied": [w, (w.t(), w[1:3])],
        "expanded": torch.ones(1).expand(1_000_000),
        "state": nn.BatchNorm1d(3).state_dict(),
        "odd": [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2).bfloat16()],
        "plain": [1, "a", None, {2: 3.0}],
    }
    expected = str(content)
    copied = copied_to_host(content)
    assert str(copied) == expected
    assert copied["tied"][0].untyped_storage().data_ptr() == copied["tied"][1][0].untyped_storage().data_ptr()
    assert copied["expanded"].untyped_storage().nbytes() == 4
    assert copied["state"]._metadata == content["state"]._metadata
    w.zero_()
    content["state"]["running_var"].zero_()
    assert str(copied) == expected


# -- the disk ----------------------------------------------------------------------------------------------------------


def in_child(function):
    """Run a function in a forked process; return its number."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # as the workers of a loader do: the threads of the parent are not here
        try:
            function()
        finally:
            os._exit(7)
    return child


def killed_saves(folder, size, kills):
    """Kill endless saving at moments spread over one save; return how often the file was whole, of one save."""
    path, whole = folder / "epoch-1.pt", 0
    for k in range(kills):
        ours, theirs = os.pipe()

        def save_on(told=theirs):
            for i in range(10**9):
                values = {name: torch.full((size,), i) for name in "ab"}
                saving.write(path, {"format": saving.FORMAT, **values})
                os.write(told, b".")

        child = in_child(save_on)
        os.close(theirs)  # so that the end of the child ends the waiting here
        assert os.read(ours, 1) == b"."
        started = time.monotonic()
        assert os.read(ours, 1) == b"."
        time.sleep((time.monotonic() - started) * k / kills)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        content = saving.read(path)
        whole += bool((torch.stack([content["a"], content["b"]]) == content["a"][0]).all())
        files.remove_parts(folder)
        assert {f.name for f in folder.iterdir()} <= {"epoch-1.pt", f"epoch-1.pt.part-{child}"}
    return whole


def test_a_kill_in_a_save_leaves_a_whole_file(tmp_path):
    """Killed at twenty moments over a save, the file is whole, of one save or the next."""
    assert killed_saves(tmp_path, 100_000, 20) == 20


@pytest.mark.slow
def test_a_kill_in_a_large_save_leaves_a_whole_file(tmp_path):
    """The same for fifty moments over a file of 300 MB."""
    assert killed_saves(tmp_path, 300_000_000 // 16, 50) == 50


def test_the_order_of_a_save(tmp_path, monkeypatch):
    """Flush of the file, rename, flush of the folder; and only then the older file is deleted."""
    events, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def noting(name):
        def note(first, *more, **options):
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(first).st_mode)
            events.append(f"{name} {'folder' if folder else 'file' if name == 'fsync' else Path(first).name}")
            return real[name](first, *more, **options)

        return note

    trainer, train, val = make(tmp_path, best=False)
    for name in real:
        monkeypatch.setattr(os, name, noting(name))
    trainer.fit(train, val, epochs=2)
    saves = [e for e in events if "fit.lock" not in e and not e.endswith(f"unlink epoch-2.pt.part-{os.getpid()}")]
    part = f"replace epoch-2.pt.part-{os.getpid()}"
    assert saves[-4:] == ["fsync file", part, "fsync folder", "unlink epoch-1.pt"]


@pytest.mark.parametrize("limit", [1, 4000, 60_000])
def test_a_full_disk_in_a_save_leaves_the_file_before(tmp_path, limit):
    """Full at the start, in the middle or at the end of a file: the error names it, and the older one is whole."""
    path = tmp_path / "a.pt"
    saving.write(path, {"format": saving.FORMAT, "value": 1})

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            saving.write(path, {"format": saving.FORMAT, "value": 2, "weights": torch.zeros(20_000)})
        except OSError as error:
            os._exit(5 if str(error).startswith(f"could not write the checkpoint {path}: ") else 6)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(fill), 0)[1]) == 5
    assert saving.read(path)["value"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_ends_the_fit_with_the_last_file_whole(disk):
    """A fit on a disk without room for its second file ends with an error, and resumes from the first."""

    class Fill(fw.Callback):
        def on_epoch_start(self, state):
            if state.progress.epoch == 1:
                with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
                    file.write(bytes(1 << 21))

    trainer, train, val = make(disk / "saved", best=False)
    trainer.callbacks = [Fill(), *trainer.callbacks]
    with pytest.raises(OSError, match=r"could not write the checkpoint .*epoch-2\.pt"):
        trainer.fit(train, val, epochs=3)
    assert [f.name for f in (disk / "saved").iterdir()] == ["epoch-1.pt"]
    (disk / "filler").unlink()
    trainer, train, val = make(disk / "saved", best=False)
    trainer.fit(train, val, epochs=3, resume="auto")
    assert trainer.state.resumed_from.name == "epoch-1.pt"


def test_a_folder_that_can_only_be_read_is_refused_before_step_1(disk):
    """The error names the folder, and nothing is trained."""
    (disk / "saved").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    trainer, train, val = make(disk / "saved")
    with pytest.raises(OSError, match=r"can't create or write to the checkpoint folder .*disk/saved"):
        trainer.fit(train, val, epochs=1)
    assert trainer.state.progress.step == 0


def test_parts_of_dead_processes_alone_are_removed(tmp_path, caplog):
    """What a killed save left goes; the part of a process that runs stays."""
    caplog.set_level(logging.ERROR)
    for pid in (2**22 + 1, os.getppid()):
        (tmp_path / f"epoch-3.pt.part-{pid}").write_text("part")
    files.remove_parts(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [f"epoch-3.pt.part-{os.getppid()}"]
