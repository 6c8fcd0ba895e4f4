"""What a step costs: fitwatch against a plain loop that does the same work, paired in one run.

An MLP 20-32-2 on batches of 32, CPU time of the process on one thread. Every round times the contenders one after
the other; a ratio is taken within a round, and the median over the rounds is printed. Set-up and tear-down are left
out: the clock runs from step 50 of the first epoch to step 50 of the last.

    python benchmarks/overhead.py [--rounds 15]
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import threading
import time

KEEP = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in KEEP.items()):
    # glibc gives memory back at every step, which is most of the noise: both sides run with it told to keep it.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})  # noqa: S606

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import fitwatch as fw

BATCH, STEPS, EPOCHS, WARM, EVERY = 32, 300, 5, 50, 50


class Net(nn.Sequential):
    """Takes the CPU time at two of its training forwards."""

    def __init__(self):
        super().__init__(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
        self.calls, self.marks = 0, []

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls in (WARM, WARM + (EPOCHS - 1) * STEPS):
                self.marks.append(time.process_time())
        return super().forward(x)


def task(loader, weight=None):
    torch.manual_seed(0)
    net = Net()
    generator = torch.Generator().manual_seed(1)
    sets = []
    for batches in (STEPS, 10):
        x = torch.randn(batches * BATCH, 20, generator=generator)
        sets.append(TensorDataset(x, (x[:, 0] > 0).long()))
    if loader == "list":
        train, val = (list(zip(*(t.split(BATCH) for t in s.tensors), strict=True)) for s in sets)
    else:
        train, val = (DataLoader(s, BATCH) for s in sets)
    return net, torch.optim.SGD(net.parameters(), lr=0.05), nn.CrossEntropyLoss(weight), train, val


def plain_bare(loader):
    net, optimizer, loss, train, _ = task(loader)
    for _ in range(EPOCHS):
        for x, y in train:
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
    return net


def trainer_bare(loader):
    net, optimizer, loss, train, _ = task(loader)
    fw.Trainer(net, optimizer, loss, device="cpu").fit(train, epochs=EPOCHS)
    return net


WEIGHT = torch.tensor([0.5, 1.5])


def plain_equipped(loader):
    net, optimizer, loss, train, val = task(loader, WEIGHT)
    with tempfile.TemporaryDirectory() as folder:
        writer, parameters = SummaryWriter(folder), list(net.parameters())
        step, best, bad = 0, math.inf, 0
        for _ in range(EPOCHS):
            net.train()
            for x, y in tqdm(train):
                optimizer.zero_grad()
                value = loss(net(x), y)
                value.backward()
                if (step + 1) % EVERY == 0:
                    writer.add_scalar("train/loss", value.item(), step)
                    writer.add_scalar("train/grad_norm", get_total_norm([p.grad for p in parameters]).item(), step)
                optimizer.step()
                step += 1
            net.eval()
            total = count = 0
            with torch.no_grad():
                for x, y in val:
                    total += loss(net(x), y).item() * len(y)
                    count += len(y)
            writer.add_scalar("val/loss", total / count, step)
            bad = 0 if total / count < best else bad + 1
            best = min(best, total / count)
            if bad > 10**6:
                break
        writer.close()
    return net


def trainer_equipped(loader, norm_every=EVERY):
    net, optimizer, loss, train, val = task(loader)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [
            fw.WeightedLoss(WEIGHT),
            fw.GradientNorm(every=norm_every, per_layer=False),
            fw.EarlyStopping("val/loss", patience=10**6),
            fw.ProgressBar(),
            fw.TensorBoard(folder, show_link=False),
        ]
        fw.Trainer(net, optimizer, loss, callbacks=callbacks, log_every=EVERY, device="cpu").fit(
            train, val, epochs=EPOCHS
        )
    return net


def trainer_every_norm(loader):
    return trainer_equipped(loader, norm_every=1)


PAIRS = [
    ("bare", trainer_bare, plain_bare),
    ("equipped", trainer_equipped, plain_equipped),
    ("equipped, gradient norm at every step", trainer_every_norm, plain_equipped),
]


def measure(contender, loader):
    first, last = contender(loader).marks
    return (last - first) / ((EPOCHS - 1) * STEPS) * 1e6


def live_terminal():
    """Make standard error a terminal that nobody sees, so that both progress bars are drawn."""
    master, slave = os.openpty()
    sys.stderr = os.fdopen(slave, "w")
    threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(master, 4096), b"")], daemon=True).start()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    live_terminal()
    print(
        "| MLP 20-32-2, batch 32 | loader | plain loop, µs | fitwatch, µs | ratio | range |\n|---|---|---|---|---|---|"
    )
    for title, ours, plain in PAIRS:
        for loader in ("list", "DataLoader"):
            samples = []
            for i in range(rounds + 1):
                order = (plain, ours) if i % 2 else (ours, plain)
                times = {contender: measure(contender, loader) for contender in order}
                samples.append((times[plain], times[ours]))
            samples = samples[1:]  # the first warms up
            ratios = sorted(b / a for a, b in samples)
            a, b = (statistics.median(column) for column in zip(*samples, strict=True))
            low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
            print(f"| {title} | {loader} | {a:.0f} | {b:.0f} | **{middle:.3f}** | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
