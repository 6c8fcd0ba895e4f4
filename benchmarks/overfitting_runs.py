"""Labelled trainings for `overfitting.py`: real data, small networks, and a hidden test set that says what was true.

Every run is trained by `fitwatch.Trainer` on a few hundred examples. After each epoch the losses of all validation
examples are kept, and the mean and the losses of the hidden test examples for the label: overfit if the smoothed test
loss ends more than 5 % above its minimum, by more than 3 standard errors of the paired difference, while the loss of
the training set in eval mode fell; healthy if it ends less than 2 % above; else neither. The running training loss
would not do for the label: that of the first epoch is of weights before they were trained. A run is a file in
benchmarks/.data/overfitting.

    python benchmarks/overfitting_runs.py [--runs 240] [--workers 2]
"""

import argparse
import itertools
import json
import math
import multiprocessing
import random

import numpy as np
import paper_data
import torch
import torch.nn.functional as F
from torch import nn

import fitwatch as fw

FOLDER = paper_data.CACHE / "overfitting"
VAL, TEST = 2000, 5000  # at most; the validation sets of the benchmark are parts of the former


def mnist():
    images, labels = paper_data.mnist()
    return F.avg_pool2d(images.view(-1, 1, 28, 28), 2).flatten(1), labels


SETS = {  # name -> data; none of these is among the sets of small tables that such rules are usually tried on
    "mnist": mnist,
    "page_blocks": paper_data.page_blocks,
    "hypothyroid": paper_data.hypothyroid,
    "caravan": paper_data.caravan,
    "default": paper_data.default,
}


class Recorder(fw.Callback):
    """Keeps what is needed to judge a run."""

    def __init__(self, train, val, test):
        self.sets, self.curves = (train, val, test), ([], [], [])

    @torch.no_grad()
    def on_validation_end(self, state):
        state.model.eval()
        for (x, y), kept in zip(self.sets, self.curves, strict=True):
            losses, weights = state.loss.per_example(state.model(x), y)
            kept.append((losses.numpy(), weights.numpy()))
        state.model.train()


def settings(number):
    """The options of run ``number``."""
    draw = random.Random(number)  # noqa: S311 - no secret
    name = list(SETS)[number % len(SETS)]
    return {
        "dataset": name,
        "seed": number,
        "n_train": draw.choice([100, 200, 400, 800]),
        "width": draw.choice([8, 32, 128]),
        "depth": draw.choice([1, 2]),
        "dropout": draw.choice([0.0, 0.0, 0.3, 0.5]),
        "weight_decay": draw.choice([0.0, 1e-3, 1e-2, 1e-1]),
        "optimizer": draw.choice(["sgd", "adamw"]),
        "lr": draw.choice([1e-3, 3e-3, 1e-2]),
        "schedule": draw.choice(["constant", "cosine", "step"]),
        "label_noise": draw.choice([0.0, 0.0, 0.0, 0.2]),
        "batch": draw.choice([16, 32, 128]),
        "epochs": draw.choice([40, 80, 150, 250]),
        "class_weights": draw.choice([False, False, True]),
    }


def train(options):
    """Training losses, running and of a probe, and the losses of all validation and test examples, (epochs, N)."""
    torch.set_num_threads(1)
    torch.manual_seed(options["seed"])
    x, y = DATA[options["dataset"]]
    order = torch.randperm(len(y))
    n, classes = options["n_train"], int(y.max()) + 1
    rows = order[:n], order[n : n + VAL], order[n + VAL : n + VAL + TEST]
    if len(y) < n + VAL + TEST:  # of a small set two thirds of the rest are the hidden test set
        third = (len(y) - n) // 3
        rows = order[:n], order[n : n + third], order[n + third :]
    mean, std = x[rows[0]].mean(0), x[rows[0]].std(0)
    x = ((x - mean) / torch.where(std > 1e-6, std, 1)).clamp(-10, 10)
    parts = [(x[r], y[r].clone()) for r in rows]
    wrong = torch.rand(n) < options["label_noise"]
    parts[0][1][wrong] = torch.randint(classes, (int(wrong.sum()),))
    sizes = [x.shape[1], *[options["width"]] * options["depth"], classes]
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(options["dropout"])]
    net = nn.Sequential(*layers[:-2])
    decay = options["weight_decay"]
    if options["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), 3 * options["lr"], momentum=0.9, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), options["lr"], weight_decay=decay)
    scheduler = {
        "constant": lambda: None,
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["epochs"]),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [options["epochs"] // 2], gamma=0.1),
    }[options["schedule"]]()
    counts = torch.bincount(y, minlength=classes)
    weights = fw.class_weights(counts, "sqrt_inverse") if options["class_weights"] else None
    recorder = Recorder(*parts)
    trainer = fw.Trainer(
        net,
        optimizer,
        fw.CrossEntropy(weights),
        callbacks=recorder,
        scheduler=scheduler,
        scheduler_interval="epoch",
        device="cpu",
        log_every=10**6,
    )
    cut = torch.arange(n).split(options["batch"])
    batches = [(parts[0][0][i], parts[0][1][i]) for i in cut]
    result = trainer.fit(Shuffled(batches, *parts[0], options["batch"]), [parts[1]], epochs=options["epochs"])
    running = np.array([entry["train/loss"] for entry in result.history], np.float32)
    (probe, pw), (val, vw), (test, tw) = (tuple(np.stack(c) for c in zip(*k, strict=True)) for k in recorder.curves)
    probe_mean = (probe * pw).sum(1) / pw.sum(1)
    return {
        "running": running,
        "probe": probe_mean,
        "val": val,
        "val_weights": vw[0],
        "val_targets": parts[1][1].numpy(),
        "test": test,
        "test_weights": tw[0],
    }


class Shuffled:
    """Shuffled batches of tensors in memory."""

    def __init__(self, batches, x, y, size):
        self.x, self.y, self.size, self.number = x, y, size, len(batches)

    def __len__(self):
        return self.number

    def __iter__(self):
        return ((self.x[i], self.y[i]) for i in torch.randperm(len(self.y)).split(self.size))


def smoothed(curve):
    """Centred moving average, for the label only."""
    width = max(3, len(curve) // 40) | 1
    return np.convolve(np.pad(curve, width // 2, mode="edge"), np.ones(width) / width, "valid")


def label(train, test, weights):
    """What was true: the label, the epoch of the optimum, the rise at the end, and its z."""
    curve = smoothed((test * weights).sum(1) / weights.sum())
    best = int(curve.argmin())
    rise = curve[-1] / curve[best] - 1
    width = max(3, len(curve) // 40) | 1
    near = test[max(0, best - width // 2) : best + width // 2 + 1].mean(0)
    moved = (test[-width // 2 :].mean(0) - near) * weights
    z = moved.mean() / max(moved.std() / math.sqrt(len(moved)), 1e-12)
    fell = train[-3:].mean() < train[max(0, best - 1) : best + 2].mean()
    name = "overfit" if rise > 0.05 and z > 3 and fell else "healthy" if rise < 0.02 else "neither"
    return {"label": name, "optimum": best, "rise": float(rise), "z": float(z)}


def work(number):
    path = FOLDER / f"run_{number:04d}.npz"
    if not path.exists():
        options = settings(number)
        arrays = train(options)
        np.savez(path.with_suffix(".part.npz"), facts=json.dumps(options), **arrays)
        path.with_suffix(".part.npz").rename(path)
    return number


DATA = {}


def make(runs, workers):
    """Train what is not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    DATA.update({name: read() for name, read in SETS.items()})
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for done, _ in enumerate(pool.imap_unordered(work, range(runs)), 1):
            if done % 20 == 0:
                print(f"{done} of {runs} runs", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--workers", type=int, default=2)
    make(**vars(parser.parse_args()))
