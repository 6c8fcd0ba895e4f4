"""What the losses cost: forward and backward, as ratios to torch and to the plain formula, paired in one run.

The loss alone, without a model. CPU time of the process, all threads together. Every round times the contenders one
after the other, in an order that changes from round to round; a ratio is taken within a round, and the median over the
rounds is printed, with the middle half of them. Peak memory is that of a process of its own, above its inputs.

    python benchmarks/losses.py [--rounds 40] [--write]
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__" and os.environ.get("OMP_WAIT_POLICY") != "passive":
    # A thread that waits for the other one would else spin, and its time would count as work.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})  # noqa: S606

import tables
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import fitwatch as fw
from fitwatch.engine.step import inverse

SMALL, LARGE = (128, 10), (8192, 1000)
REPEATS = {SMALL: 150, LARGE: 1}  # in a sample, so that it takes some tens of milliseconds


def task(shape):
    """Logits, an endless supply of class indices, class weights, and costs of misses and of single mistakes."""
    generator = torch.Generator().manual_seed(0)
    n, classes = shape
    z = torch.randn(n, classes, generator=generator).mul_(2).requires_grad_()
    # other targets in every step, as in a training: so the weight to divide by is another one, too
    y = [torch.randint(0, classes, (n,), generator=generator) for _ in range(100)]
    weight = torch.rand(classes, generator=generator) + 0.5
    fp = torch.rand(classes, classes, generator=generator).fill_diagonal_(0)
    return z, itertools.cycle(y).__next__, weight, fp


def torchs(shape):
    z, targets, weight, _ = task(shape)

    def step():
        z.grad = None
        F.cross_entropy(z, targets(), weight=weight).backward()

    return step


def as_module(shape):
    z, targets, weight, _ = task(shape)
    loss = fw.CrossEntropy(weight)

    def step():
        z.grad = None
        loss(z, targets()).backward()

    return step


def in_the_trainer(shape):
    z, targets, weight, _ = task(shape)
    loss = fw.CrossEntropy(weight)

    def step():
        z.grad = None
        total, divisor = loss.sums(z, targets())
        torch.autograd.backward(total, inverse(divisor, total))

    return step


def plain_formula(shape):
    z, targets, fn, fp = task(shape)

    def step():
        z.grad, y = None, targets()
        p = F.softmax(z, 1)
        of_the_class = p.gather(1, y.unsqueeze(1)).squeeze(1)
        loss = -(fn[y] * torch.log(of_the_class) + (fp[y] * torch.log(1 - p)).sum(1)).mean()
        loss.backward()

    return step


def one_hot_formula(shape):
    """As the authors of the loss write it, with one-hot targets and a product of matrices; without their clipping."""
    z, targets, fn, fp = task(shape)

    def step():
        z.grad, y = None, targets()
        p, hot = F.softmax(z, 1), F.one_hot(y, z.shape[1]).to(z.dtype)
        loss = -(hot * fn * torch.log(p) + (hot @ fp) * torch.log(1 - p)).sum(1).mean()
        loss.backward()

    return step


def real_world(shape):
    z, targets, fn, fp = task(shape)
    loss = fw.RealWorldCrossEntropy(fn, fp)

    def step():
        z.grad = None
        loss(z, targets()).backward()

    return step


CONTENDERS = {
    "torch": torchs,
    "module": as_module,
    "trainer": in_the_trainer,
    "one-hot": one_hot_formula,
    "formula": plain_formula,
    "real world": real_world,
}
ROWS = [  # title, contender, reference, aims by shape
    ("`CrossEntropy(weight)`, called", "module", "torch", {SMALL: 1.10, LARGE: 1.02}),
    ("`CrossEntropy(weight)`, as the Trainer does", "trainer", "torch", {SMALL: 1.10, LARGE: 1.02}),
    ("`RealWorldCrossEntropy(fn, fp)`", "real world", "one-hot", {SMALL: 1.15, LARGE: 0.30}),
    ("`RealWorldCrossEntropy(fn, fp)`", "real world", "formula", {SMALL: 1.15, LARGE: None}),
]
REFERENCES = {"torch": "`F.cross_entropy(weight=)`", "one-hot": "formula, one-hot", "formula": "formula, by index"}


def sample(step, repeats):
    begin = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - begin) / repeats


def times(shape, rounds):
    """Seconds of every contender in every round."""
    steps = {name: make(shape) for name, make in CONTENDERS.items()}
    seconds = {name: [] for name in steps}
    names = list(steps)
    for i in range(-2, rounds):  # the first two warm up
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            taken = sample(steps[name], REPEATS[shape])
            if i >= 0:
                seconds[name].append(taken)
    return seconds


def aim(ratio):
    return "" if ratio is None else f"{ratio:.2f}"


def microseconds(seconds):
    return f"{statistics.median(seconds) * 1e6:,.0f}"


def speed(rounds):
    """The rows of the table of times."""
    default = torch.get_num_threads()
    for threads in sorted({1, default}):
        torch.set_num_threads(threads)
        for shape in (SMALL, LARGE):
            seconds = times(shape, rounds)
            for title, ours, theirs, aims in ROWS:
                ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                yield (
                    f"| {title} | {list(shape)} | {threads} | {REFERENCES[theirs]}, {microseconds(seconds[theirs])} | "
                    f"{microseconds(seconds[ours])} | **{middle:.2f}** | {low:.2f} to {high:.2f} | {aim(aims[shape])} |"
                )
    torch.set_num_threads(default)


# -- memory ------------------------------------------------------------------------------------------------------------


def status(field):
    """Of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(name):
    """MiB that a step takes at most above its inputs; to be asked in a fresh process."""
    torch.set_num_threads(1)
    CONTENDERS[name](SMALL)()  # loads what torch loads late
    step = CONTENDERS[name](LARGE)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step()
    return status("VmHWM") - before


def memory():
    """The rows of the table of peaks."""
    command = [sys.executable, __file__, "--peak"]
    found = {
        name: float(subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout)
        for name in CONTENDERS
    }
    for (title, ours, theirs, _), wanted in zip(ROWS, (None, None, 1.0, 1.0), strict=True):
        yield (
            f"| {title} | {list(LARGE)} | {REFERENCES[theirs]}, {found[theirs]:.0f} | {found[ours]:.0f} | "
            f"**{found[ours] / found[theirs]:.2f}** | {aim(wanted)} |"
        )


# -- counting ----------------------------------------------------------------------------------------------------------


class Images:
    """Shows its targets as a list, as the data sets of torchvision do."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def counting(rounds):
    """The rows of the table of counts."""
    y = torch.randint(0, 10, (1_000_000,), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(torch.zeros(1_000_000, 1), y)
    half, _ = random_split(data, [500_000, 500_000])
    for title, source in (
        ("`TensorDataset` of a million", data),
        ("`DataLoader` of it", DataLoader(data, 128, shuffle=True)),
        ("`random_split` of it in halves, one of them", half),
        ("a list of a million integers", y.tolist()),
    ):
        seconds = [sample(lambda source=source: fw.data.count_classes(source), 1) for _ in range(rounds)]
        yield f"| {title} | {statistics.median(seconds):.3f} | {max(seconds):.3f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak))
        return
    rows = [
        "| forward and backward | logits | threads | reference, µs | fitwatch, µs | ratio | middle half | aim |",
        "|---|---|---|---|---|---|---|---|",
        *speed(arguments.rounds),
        "",
        "| peak memory | logits | reference, MiB | fitwatch, MiB | ratio | aim |",
        "|---|---|---|---|---|---|",
        *memory(),
        "",
        "| `count_classes` | seconds, median | at most |",
        "|---|---|---|",
        *counting(15),
    ]
    text = "\n".join(rows)
    print(text)
    if arguments.write:
        tables.write("losses", text)


if __name__ == "__main__":
    main()
