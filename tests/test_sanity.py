"""The trial validation before step 1: it finds mistakes early, and leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import fitwatch as fw

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(60) % 3


class Restless(nn.Module):
    """Changes a buffer, replaces another, and draws from every generator, also in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("wide", torch.zeros(1).expand(3))

    def forward(self, x):
        self.seen += 1
        self.last = x.sum()
        noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002, S311
        return self.inner(x) + 1e-3 * noise * self.seen


class Augmented(TensorDataset):
    """Augments with random numbers of every kind, among them a generator of its own."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.own = np.random.default_rng(1)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.rand(()) + 0.1 * np.random.random() + 0.1 * self.own.random(), y  # noqa: NPY002


class Counting:
    """A metric that remembers over resets."""

    def __init__(self):
        self.computed = 0

    def reset(self):
        self.n = 0

    def update(self, outputs, targets):
        self.n += len(targets)

    def compute(self):
        self.computed += 1
        return {"n": self.n, "computed": self.computed}


def loaders(kind, workers):
    data = Augmented(X, Y)
    own = torch.Generator().manual_seed(5)
    options = {
        "shuffled": {"shuffle": True},
        "own generator": {"shuffle": True, "generator": own},
        "subset": {"sampler": SubsetRandomSampler(range(40), generator=own)},
        "in order": {},
    }[kind]
    val = DataLoader(data, 8, num_workers=workers, persistent_workers=workers > 0, **options)
    return DataLoader(data, 16, shuffle=True), val


def outcome(steps, kind, workers, by="trainer"):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    model = Restless()
    model.inner[1].eval()
    train, val = loaders(kind, workers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callbacks = [
        fw.WeightedLoss("balanced"),
        fw.RealWorldCost([[0, 1, 1], [5, 0, 1], [1, 1, 0]]),
        fw.EarlyStopping(restore_best=False),
    ]
    metrics = {"count": Counting(), "mean": lambda o, t: o.mean()}
    if by == "trainer":
        trainer = fw.Trainer(
            model, optimizer, callbacks=callbacks, metrics=metrics, device="cpu", sanity_steps=steps, seed=None
        )
        history = trainer.fit(train, val, epochs=3).history
    else:

        def step(batch):
            watch.loss(model(batch[0]), batch[1])

        options = {"metrics": metrics, "validation_step": step, "sanity_steps": steps}
        with fw.Watch(model, optimizer, callbacks, train_loader=train, val_loader=val, **options) as watch:
            for _ in watch.epochs(3):
                for inputs, targets in watch.train():
                    watch.loss(model(inputs), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                watch.validate()
        history = watch.result.history
    drawn = (torch.rand(()).item(), random.random(), np.random.random())  # noqa: NPY002, S311
    return history, model.state_dict(), drawn


@pytest.mark.parametrize("by", ["trainer", "watch"])
@pytest.mark.parametrize(
    ("kind", "workers"),
    [("shuffled", 0), ("own generator", 0), ("subset", 0), ("in order", 0), ("shuffled", 2), ("own generator", 2)],
)
def test_the_trial_leaves_no_trace(kind, workers, by):
    """Histories, weights, buffers and the next random numbers are equal to the bit with and without the trial."""
    history, weights, drawn = outcome(2, kind, workers, by)
    expected, others, then = outcome(0, kind, workers, by)
    assert history == expected
    assert drawn == then
    assert all(torch.equal(weights[name], others[name]) for name in others)


def trainer_of(kind=fw.Trainer, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    return kind(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu", **options)


def broken(outputs, targets):
    raise ValueError("planted")


@pytest.mark.parametrize("metric", [broken, lambda o, t: "high", lambda o, t: o[:, 7]])
def test_a_broken_metric_is_found_before_step_1(metric):
    """What would fail after the first epoch fails before step 1, and says so once, with the option that leaves it out."""
    trainer = trainer_of(metrics={"broken": metric})
    weights = copy.deepcopy(trainer.model.state_dict())
    train, val = loaders("in order", 0)
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        trainer.fit(train, val, epochs=1)
    assert trainer.state.progress.step == 0
    assert all(torch.equal(weights[n], w) for n, w in trainer.model.state_dict().items())
    notes = " ".join(caught.value.__notes__)
    assert "sanity_steps=0" in notes
    assert f"{caught.value} {notes}".count("before step 1") == 1
    if not isinstance(caught.value, IndexError):
        assert "in a trial validation of 2 batches before step 1: " in str(caught.value)
    trainer = trainer_of(metrics={"broken": metric}, sanity_steps=0)
    with pytest.raises((ValueError, TypeError, IndexError)):
        trainer.fit(train, val, epochs=1)
    assert trainer.state.progress.step == 4


def test_outputs_that_cannot_be_joined_are_found_before_step_1():
    """Two batches of different length show it, in a list of batches too."""
    batches = [(torch.randn(4, 4, n).double(), torch.randint(3, (4, n))) for n in (5, 7)]

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.a(x.transpose(1, 2)).transpose(1, 2)

    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = fw.Trainer(model, optimizer, metrics={"zero": lambda o, t: 0.0}, device="cpu")
    with pytest.raises(ValueError, match="before step 1: the metric 'zero' is a function of all outputs"):
        trainer.fit(batches, batches, epochs=1)
    assert trainer.state.progress.step == 0


def test_the_names_of_a_vector_are_known_before_step_1():
    """Monitoring a vector as a whole, or a class that it lacks, is refused with the names that there are."""
    train, val = loaders("in order", 0)
    for monitor in ("val/each", "val/each/3"):
        stop = fw.EarlyStopping(monitor, mode="max")
        trainer = trainer_of(metrics={"each": lambda o, t: o.mean(0)}, callbacks=[stop])
        with pytest.raises(ValueError, match=r"will not measure; it will measure .*val/each/0, val/each/1, val/each/2"):
            trainer.fit(train, val, epochs=1)
        assert trainer.state.progress.step == 0


def test_what_a_subclass_keeps_is_not_touched():
    """A validation_step that counts, collects and consumes an iterator sees the real validations only."""

    class Collecting(fw.Trainer):
        def validation_step(self, batch):
            self.count += 1
            self.sizes.append(len(batch[0]))
            next(self.script)
            return super().validation_step(batch)

    trainer = trainer_of(Collecting)
    trainer.count, trainer.sizes, trainer.script = 0, [], iter(range(8))
    train, val = loaders("in order", 0)
    trainer.fit(train, val, epochs=1)
    assert (trainer.count, trainer.sizes) == (8, [8] * 7 + [4])


class Stream(IterableDataset):
    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from zip(X, Y, strict=True)


class Once(torch.utils.data.Sampler):
    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(range(60))

    def __len__(self):
        return 60


def test_loaders_that_a_trial_would_exhaust_are_left_out():
    """A stream, an iterable of unknown kind and a sampler of the user are read by the real validation only."""
    train, _ = loaders("in order", 0)
    stream, sampler = Stream(), Once()
    trainer_of().fit(train, DataLoader(stream, 8), epochs=1)
    trainer_of().fit(train, DataLoader(TensorDataset(X, Y), 8, sampler=sampler), epochs=1)
    assert (stream.passes, sampler.passes) == (1, 1)
    result = trainer_of().fit(train, iter([(X, Y)]), epochs=1)
    assert len(result.history) == 1


@pytest.mark.parametrize(("steps", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_sanity_steps_is_checked(steps, kind):
    """A count out of range or of another type is refused by Trainer and Watch."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(kind, match="sanity_steps must be"):
        fw.Trainer(model, optimizer, sanity_steps=steps)
    with pytest.raises(kind, match="sanity_steps must be"):
        fw.Watch(model, optimizer, sanity_steps=steps)


def test_a_loop_that_validates_in_its_own_way_is_not_tried():
    """Without a validation_step the Watch can't know what a hand-written validation does, and tries nothing."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = [{"features": X[:8].float(), "label": Y[:8]}]
    with fw.Watch(model, optimizer, train_loader=rows, val_loader=rows) as watch:
        for _ in watch.epochs(1):
            for row in watch.train():
                watch.loss(model(row["features"]), row["label"]).backward()
                optimizer.step()
                optimizer.zero_grad()
            with watch.validating():
                for row in rows:
                    watch.loss(model(row["features"]), row["label"])
    assert len(watch.result.history) == 1
