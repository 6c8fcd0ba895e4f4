"""Training resumes from any step, to the bit."""

import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, WeightedRandomSampler

import fitwatch as fw
from fitwatch.data.position import random_states
from fitwatch.files import seal

N, BATCH, EPOCHS = 45, 8, 2  # six batches per epoch, the last one short
STEPS = EPOCHS * 6


class Killed(BaseException):
    """Stands for a kill: nothing is saved after it."""


class Kill(fw.Callback):
    """Ends training in the batch after a step; counts the examples seen."""

    def __init__(self, step=None):
        self.step = step

    def on_batch_end(self, state):
        if state.progress.step == self.step:
            raise Killed


class Records(fw.Callback):
    """Keeps what is logged, by step; a resumed run goes on with what was logged up to its checkpoint."""

    def __init__(self):
        self.seen = {}

    def on_log(self, state):
        for r in state.records:
            if isinstance(r.value, float):
                self.seen[r.step, r.name] = r.value

    def state_dict(self):
        return {"seen": [[*key, value] for key, value in self.seen.items()]}

    def load_state_dict(self, state_dict):
        self.seen = {(step, name): value for step, name, value in state_dict["seen"]}


def tensors():
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(N, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


class Augmented(Dataset):
    """Draws from the global generators of torch, NumPy and Python."""

    def __init__(self):
        self.x, self.y = tensors()

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(4) + 0.1 * np.random.rand() + 0.1 * random.random(), self.y[i]  # noqa: NPY002, S311


class OwnGenerators(Augmented):
    """Draws from generators of its own, under any name."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = np.random.default_rng(3), random.Random(4), torch.Generator().manual_seed(5)  # noqa: S311
        self.d = np.random.RandomState(6)

    def __getitem__(self, i):
        noise = self.a.normal() + self.b.random() + torch.rand((), generator=self.c).item() + self.d.rand()
        return self.x[i] + 0.1 * noise, self.y[i]


class NumPySampler(Sampler):
    """Shuffles with a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(7)

    def __iter__(self):
        return iter(self.rng.permutation(N).tolist())

    def __len__(self):
        return N


class Within(Dataset):
    """Holds a data set, and a transform that draws, with generators of their own."""

    def __init__(self):
        self.dataset = OwnGenerators()
        self.transform = Noisy()

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y = self.dataset[i]
        return self.transform(x), y


class Noisy:
    def __init__(self):
        self.rng = np.random.default_rng(8)

    def __call__(self, x):
        return x + 0.1 * self.rng.normal()


class HiddenSampler(NumPySampler):
    """Has its order in a state that only it knows."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict):
        self.epoch = state_dict["epoch"]


class StatefulLoader:
    """Goes on by itself, as torchdata's StatefulDataLoader."""

    def __init__(self):
        self.at = self.epoch = 0

    def __iter__(self):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).split(BATCH)
        x, y = tensors()
        while self.at < len(order):
            rows = order[self.at]
            self.at += 1
            yield x[rows], y[rows]
        self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state_dict):
        self.at, self.epoch = state_dict["at"], state_dict["epoch"]


class Stream:
    """Yields the same batches each time, and has no length."""

    def __iter__(self):
        x, y = tensors()
        return iter(list(zip(x.split(BATCH), y.split(BATCH), strict=True)))


def loader(dataset=None, **options):
    options.setdefault("shuffle", "sampler" not in options)
    return DataLoader(dataset or TensorDataset(*tensors()), BATCH, **options)


LOADERS = {
    "shuffled": loader,
    "own generator": lambda: loader(generator=torch.Generator().manual_seed(9)),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(torch.ones(N), N)),
    "augmented": lambda: loader(Augmented()),
    "data set with generators": lambda: loader(OwnGenerators()),
    "sampler with a generator": lambda: loader(sampler=NumPySampler()),
    "sampler with a state": lambda: loader(sampler=HiddenSampler()),
    "data set within a subset": lambda: loader(torch.utils.data.Subset(Within(), range(N))),
    "stateful loader": StatefulLoader,
    "list": lambda: list(Stream()),
    "no length": Stream,
}


def fit(folder, make, *, kill=None, every=1, by_hand=False, epochs=EPOCHS, **options):
    """Train, or resume if the folder has a checkpoint; return all that must be equal."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    records = Records()
    callbacks = [
        fw.EarlyStopping("val/loss", patience=99, restore_best=False),
        fw.GradientNorm(),
        records,
        Kill(kill),
        fw.Checkpoint(folder, every_steps=every, keep=3),
    ]
    x, y = tensors()
    val, train = [(x[:20] + 1, y[:20])], make()
    validate_every = options.pop("validate_every", None)
    common = {"callbacks": callbacks, "scheduler": scheduler, "log_every": 2, **options}
    if by_hand:
        with fw.Watch(model, optimizer, train_loader=train, val_loader=val, resume="auto", **common) as watch:
            for _ in watch.epochs(epochs):
                for a, b in watch.train():
                    watch.loss(model(a), b).backward()
                    if watch.step_due:
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                if watch.step_open:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                watch.validate()
        state = watch.state
    else:
        trainer = fw.Trainer(model, optimizer, device="cpu", **common)
        trainer.fit(train, val, epochs=epochs, resume="auto", validate_every=validate_every)
        state = trainer.state
    held = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return {
        "weights": [*model.state_dict().values(), *held],
        "history": list(state.history),
        "records": records.seen,
        "lr": optimizer.param_groups[0]["lr"],
        "random": [torch.rand(1).item(), random.random(), np.random.rand()],  # noqa: NPY002, S311
        "steps": state.progress.step,
    }


def assert_same(a, b):
    assert all(torch.equal(s, t) for s, t in zip(a.pop("weights"), b.pop("weights"), strict=True))
    assert a == b


def killed_and_resumed(tmp_path, make, kill, **options):
    folder = tmp_path / f"killed-{kill}"
    with pytest.raises(Killed):
        fit(folder, make, kill=kill, **options)
    return fit(folder, make, **options)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_resumes_from_every_step(tmp_path, by_hand, accumulate):
    """Killed after any step, the resumed run equals the whole one: weights, optimizer, history, logs, random numbers."""
    options = {"by_hand": by_hand, "accumulate": accumulate}
    steps = STEPS // accumulate
    for kill in range(1, steps):
        whole = fit(tmp_path / f"whole-{kill}", loader, **options)
        assert whole["steps"] == steps
        assert_same(whole, killed_and_resumed(tmp_path, loader, kill, **options))


@pytest.mark.parametrize("kind", LOADERS)
def test_every_kind_of_loader_resumes_within_an_epoch(tmp_path, kind):
    """In the first epoch, at its end, and in the second one."""
    for kill in (2, 6, 9):
        whole = fit(tmp_path / f"whole-{kill}", LOADERS[kind])
        assert_same(whole, killed_and_resumed(tmp_path, LOADERS[kind], kill))


@pytest.mark.parametrize(
    "options",
    [{"fast_loading": False}, {"every": 3}, {"validate_every": 4}, {"clip_norm": 0.1}],
    ids=lambda o: next(iter(o)),
)
def test_options_resume_too(tmp_path, options):
    """Without fast loading, with fewer saves, with validations within an epoch, with clipping."""
    for kill in (4, 7, 10):
        whole = fit(tmp_path / f"whole-{kill}", loader, **options)
        assert_same(whole, killed_and_resumed(tmp_path, loader, kill, **options))


class Draws(fw.Callback):
    """Draws random numbers where a fit and an epoch start."""

    def on_fit_start(self, state):
        torch.rand(3)
        np.random.rand()  # noqa: NPY002

    on_epoch_start = on_fit_start


def small(folder, scheduler, kill=None, *, interval=None, epochs=3, callbacks=(), make=loader, **options):
    """Train a small model, saving each step; return the weights, the history and the learning rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = tensors()
    made = scheduler(optimizer)
    parts = [*callbacks, Kill(kill), fw.Checkpoint(folder, every_steps=1, every_epochs=None, keep=99)]
    trainer = fw.Trainer(
        model, optimizer, callbacks=parts, scheduler=made, scheduler_interval=interval, device="cpu", **options
    )
    trainer.fit(make(), [(x[:20] + 1, y[:20])], epochs=epochs, resume="auto")
    return model[0].weight.detach().clone(), list(trainer.state.history), optimizer.param_groups[0]["lr"]


SCHEDULES = {
    "per epoch": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=18),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("make", [loader, Stream], ids=["length", "no length"])
def test_every_schedule_resumes_from_every_step(tmp_path, kind, make):
    """Also from the last step of an epoch, whose validation and scheduler step are still to come."""
    whole = small(tmp_path / "whole", SCHEDULES[kind], make=make)
    for kill in (1, 5, 6, 7, 11, 12):
        folder = tmp_path / str(kill)
        with pytest.raises(Killed):
            small(folder, SCHEDULES[kind], kill, make=make)
        weight, *rest = small(folder, SCHEDULES[kind], make=make)
        assert torch.equal(weight, whole[0])
        assert rest == list(whole[1:])


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [Draws()]},
        {"precision": "fp16", "accumulate": 2, "loss": fw.CrossEntropy([0.3, 1.7])},
        {"precision": "fp16", "accumulate": 4},
    ],
    ids=["callback that draws", "fp16 with weights", "fp16 with a short last step"],
)
def test_what_else_draws_or_guesses_resumes(tmp_path, options):
    """A callback that draws random numbers, and the guessed weight of an fp16 step, leave the resumed run as it was."""
    whole = small(tmp_path / "whole", SCHEDULES["per epoch"], **options)
    for kill in range(1, 5):
        folder = tmp_path / str(kill)
        with pytest.raises(Killed):
            small(folder, SCHEDULES["per epoch"], kill, **options)
        weight, *rest = small(folder, SCHEDULES["per epoch"], **options)
        assert torch.equal(weight, whole[0])
        assert rest == list(whole[1:])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_resume_within_an_epoch(tmp_path, persistent):
    """Worker processes read the skipped batches again, so that their random numbers go on; persistent ones are named."""
    data = Augmented if not persistent else lambda: TensorDataset(*tensors())

    def make():
        return loader(data(), num_workers=2, persistent_workers=persistent, multiprocessing_context="fork")

    for kill in (3, 8):
        whole = fit(tmp_path / f"whole-{kill}", make)
        assert_same(whole, killed_and_resumed(tmp_path, make, kill))


def test_skipped_batches_are_not_loaded(tmp_path):
    """The data set is asked only for the examples that are still to come."""
    read = []

    class Counting(Augmented):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    with pytest.raises(Killed):
        fit(tmp_path, lambda: loader(Counting()), kill=4, epochs=1)
    first, read[:] = list(read), []
    fit(tmp_path, lambda: loader(Counting()), epochs=1)
    assert len(read) == N - 4 * BATCH
    assert sorted(first[: 4 * BATCH] + read) == list(range(N))


def test_a_loader_without_a_state_is_named(tmp_path, caplog):
    """An iterable that is read again up to its place gives a warning; a stateful one does not."""
    for make, told in ((Stream, True), (StatefulLoader, False)):
        caplog.clear()
        killed_and_resumed(tmp_path / make.__name__, make, 3)
        assert any("has no state_dict: 3 batches are read again" in r.getMessage() for r in caplog.records) == told


def test_a_loop_over_its_own_loader_cannot_resume_within_an_epoch(tmp_path, caplog):
    """Its place is unknown: a file saved within an epoch is refused or put aside, and a watch asks for watch.train()."""

    def go(own, **options):
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batches = list(Stream())
        checkpoint = fw.Checkpoint(tmp_path, every_steps=1, keep=3)
        with fw.Watch(model, optimizer, checkpoint, train_loader=batches, max_steps=3, **options) as watch:
            for _ in watch.epochs():
                for x, y in batches if own else watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    watch.end_step()
                    if watch.stops:
                        break

    go(own=True)
    with pytest.raises(ValueError, match=r"step-3.pt was saved within an epoch .*iterate over watch.train\(\)"):
        go(own=False, resume=tmp_path / "step-3.pt")
    go(own=False, resume="auto")
    assert sorted(f.name for f in tmp_path.glob("step-*.old")) == [f"step-{k}.pt.old" for k in (1, 2, 3)]
    assert caplog.text.count("a loop over its own loader, whose place is unknown") == 3
    assert "training starts from the beginning" in caplog.text
    with pytest.raises(RuntimeError, match=r"training resumes within an epoch.*watch.train\(\)"):
        go(own=True, resume=tmp_path / "step-2.pt")


def test_a_loader_with_other_generators_is_refused(tmp_path):
    """A sampler that has gained a generator since the checkpoint can't be resumed to the bit."""
    with pytest.raises(Killed):
        fit(tmp_path, loader, kill=3)
    with pytest.raises(ValueError, match="0 random generators .*there are 1"):
        fit(tmp_path, lambda: loader(sampler=NumPySampler()))


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, time
    import torch
    from torch import nn
    import fitwatch as fw

    class Slow(fw.Callback):
        def on_batch_end(self, state):
            print("batch", state.progress.step, flush=True)
            time.sleep(0.05)

        def on_fit_end(self, state):
            print("end", state.stop_reason, flush=True)

    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.arange(64) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    callbacks = [Slow(), fw.EarlyStopping(patience=9), fw.Checkpoint(sys.argv[1])]
    trainer = fw.Trainer(model, torch.optim.Adam(model.parameters()), callbacks=callbacks, seed=0, device="cpu")
    result = trainer.fit(loader, [(x + 1, y)], epochs=2, resume="auto")
    print("done", result.history[-1]["val/loss"], len(result.history), trainer.state.progress.step)
    """
)


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def interrupted(folder, number, after, times=1):
    """Send a signal after some batches; return the exit code, the output and the errors."""
    seen = []
    with start(folder) as process:
        for line in process.stdout:
            seen.append(line)
            if len(seen) == after:
                for _ in range(times):
                    process.send_signal(number)
                    time.sleep(0.01)
        errors = process.stderr.read()
    return process.returncode, "".join(seen), errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, number, code):
    """SIGTERM and Ctrl-C finish the step, save it, say how to go on, and exit with 143 or 130; the sum is the whole."""
    whole = start(tmp_path / "whole").communicate()[0].splitlines()[-1]
    exit_code, output, errors = interrupted(tmp_path / "cut", number, 5)
    assert exit_code == code  # -2: Python ends itself by SIGINT, which a shell shows as 130
    assert f"end interrupted by {signal.Signals(number).name}" in output
    [saved] = (tmp_path / "cut").glob("step-*.pt")
    step = int(saved.stem.split("-")[1])
    assert 5 <= step <= 6
    assert f"saved {saved}" in errors
    assert 'resume="auto"' in errors
    again = start(tmp_path / "cut").communicate()[0].splitlines()
    assert again[0] == f"batch {step}"
    assert again[-1] == whole


def test_a_second_signal_ends_at_once(tmp_path):
    """A second Ctrl-C raises KeyboardInterrupt without waiting for the step, and callbacks still clean up."""
    exit_code, output, errors = interrupted(tmp_path, signal.SIGINT, 5, times=2)
    assert exit_code == -2
    assert "KeyboardInterrupt" in errors
    assert "end " in output


class Signal(fw.Callback):
    """Sends a signal to this process after a step."""

    def __init__(self, step, then=None):
        self.step, self.then = step, then

    def on_step_end(self, state):
        if state.progress.step == self.step:
            signal.raise_signal(signal.SIGINT)
            if self.then is not None:
                raise self.then


def test_a_signal_at_the_last_step_of_an_epoch_loses_no_validation(tmp_path):
    """The file is that of the step, and the resumed run validates the epoch and steps its scheduler."""
    whole = small(tmp_path / "whole", SCHEDULES["per epoch"])
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "cut", SCHEDULES["per epoch"], callbacks=[Signal(6)])
    weight, *rest = small(tmp_path / "cut", SCHEDULES["per epoch"])
    assert torch.equal(weight, whole[0])
    assert rest == list(whole[1:])


def test_an_error_after_a_signal_does_not_hide_it(tmp_path):
    """Ctrl-C is raised from the error of the step, so that a loop over fits that catches errors ends."""
    with pytest.raises(KeyboardInterrupt) as info:
        small(tmp_path, SCHEDULES["per epoch"], callbacks=[Signal(3, ValueError("late"))])
    assert isinstance(info.value.__cause__, ValueError)


def test_a_signal_in_a_fit_within_a_fit_ends_both_with_a_save(tmp_path):
    """The inner fit ends, and the outer one finishes its step and saves it."""

    class Inner(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 4:
                small(tmp_path / "inner", SCHEDULES["per epoch"], callbacks=[Signal(2)])

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "outer", SCHEDULES["per epoch"], callbacks=[Inner()])
    steps = sorted(int(f.stem.split("-")[1]) for f in (tmp_path / "outer").glob("step-*.pt"))
    assert steps[-1] in (4, 5)
    assert not (tmp_path / "inner" / "step-4.pt").exists()


def test_a_loop_over_its_own_loader_goes_on_from_its_last_epoch(tmp_path):
    """Ctrl-C ends it with the epoch, without a step file that nothing can resume from."""

    def go(*callbacks):
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batches = list(Stream())
        parts = [*callbacks, fw.Checkpoint(tmp_path, every_steps=4)]
        with fw.Watch(model, optimizer, parts, train_loader=batches, resume="auto") as watch:
            for _ in watch.epochs(3):
                for x, y in batches:
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return watch.state

    with pytest.raises(KeyboardInterrupt):
        go(Signal(8))
    state = go()
    assert state.resumed_from.name == "epoch-2.pt"
    assert state.progress.step == 18


def test_handlers_are_put_back():
    """After a fit the handlers are those of before, also after an error, and in another thread none are set."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    during = []

    class See(fw.Callback):
        def on_step_end(self, state):
            during.append(signal.getsignal(signal.SIGTERM))
            if state.progress.step == 2:
                raise ValueError("an error")

    model = nn.Linear(4, 2)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=See(), device="cpu")
    with pytest.raises(ValueError, match="an error"):
        trainer.fit(list(Stream()), epochs=1)
    assert during[0] != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_examples_of_a_list_are_not_searched_for_generators():
    """A data set may be a list of millions of examples: only what holds the list is looked at."""

    class Untouchable(list):
        def __iter__(self):
            raise AssertionError("the examples were read")

    examples = Untouchable([tensors()] * 4)
    assert random_states(DataLoader(examples, 2), DataLoader(torch.utils.data.Subset(examples, [0, 1]), 2)) == []


def test_a_metric_that_had_another_name_continues(tmp_path):
    """A checkpoint with val/loss_left in its history and its early stopping resumes under the present name."""

    def make():
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        callbacks = [fw.EarlyStopping("val/loss_vs_baseline", patience=50), fw.Checkpoint(tmp_path, keep=9)]
        return fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=callbacks, device="cpu")

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
    whole = make().fit(batches, batches, epochs=4)
    saved = torch.load(tmp_path / "epoch-2.pt", weights_only=True)
    for entry in saved["history"]:
        entry["val/loss_left"] = entry.pop("val/loss_vs_baseline")
    saved["callbacks"]["EarlyStopping"]["options"]["monitor"] = "'val/loss_left'"
    torch.save(saved, tmp_path / "before.pt")
    with (tmp_path / "before.pt").open("r+b") as file:
        seal(file.fileno())
    resumed = make().fit(batches, batches, epochs=4, resume=tmp_path / "before.pt")
    assert resumed.history == whole.history
