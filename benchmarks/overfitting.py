"""How well the overfitting verdict is, on trainings of our own whose truth is known, beside the rules of the field.

`overfitting_runs.py` trains 240 small networks with fitwatch and labels each by a large hidden test set. Here each is
judged from what a user would have: the training curve and a part of the validation examples, stratified by class, of
30, 60 or 120, or of 1,000. Intervals are 95 %, from 1,000 bootstrap samples of the trainings.

    python benchmarks/overfitting.py [--runs 240] [--workers 2] [--write]
"""

import argparse
import itertools
import json
import math
import random
import statistics
from collections import Counter

import numpy as np
import overfitting_runs
import tables
import torch

import fitwatch as fw

SMALL, LARGE = (30, 60, 120), (1000,)
QUICK = {"span": 2, "min_rise": 0.03}  # less smoothing, and a smaller rise counts


# -- the runs ----------------------------------------------------------------------------------------------------------


class Run:
    """A training as a user with ``size`` validation examples sees it; the truth beside it."""

    def __init__(self, facts, arrays, size):
        draw = np.random.default_rng(1000 * facts["seed"] + size)
        rows = stratified(arrays["val_targets"], size, draw)
        self.seed, self.dataset = facts["seed"], facts["dataset"]
        truth = overfitting_runs.label(arrays["probe"], arrays["test"], arrays["test_weights"])
        self.overfit = {"overfit": True, "healthy": False, "neither": None}[truth["label"]]
        self.running = arrays["running"].astype(float).tolist()
        self.probe = arrays["probe"].astype(float).tolist()
        self.losses = torch.from_numpy(arrays["val"][:, rows].astype(float))
        self.weights = torch.from_numpy(arrays["val_weights"][rows].astype(float))
        self.val = (self.losses @ self.weights / self.weights.sum()).tolist()
        weights = arrays["test_weights"].astype(float)
        self.test_losses, self.test_weights = arrays["test"], weights
        self.test = arrays["test"] @ weights / weights.sum()
        self.optimum = truth["optimum"]


def stratified(targets, size, draw):
    """``size`` rows with the shares of the classes in the whole, rounded by lot."""
    shuffled = draw.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    start = draw.uniform(0, len(targets) / size)
    return by_class[(start + np.arange(size) * len(targets) / size).astype(int)]


def load(runs, sizes):
    found = []
    for number in range(runs):
        arrays = dict(np.load(overfitting_runs.FOLDER / f"run_{number:04d}.npz"))
        facts = json.loads(str(arrays["facts"]))
        found += [Run(facts, arrays, size) for size in sizes if size <= len(arrays["val_targets"])]
    return found


# -- the rules: each gives (flagged in the end, first evaluation at which it fired or None, last verdict or None) ------


def ours(run, *, paired, **options):
    rule = fw.rules.OverfittingRule(**options)
    for train, val, losses in zip(run.probe if paired else run.running, run.val, run.losses, strict=True):
        verdict = rule.update(train, val, **({"losses": losses, "weights": run.weights} if paired else {}))
    return verdict.overfitting, verdict.detected, verdict


def oracle(run):
    """Our rule shown the loss of the hidden test set: what no validation set, however large, would better."""
    rule = fw.rules.OverfittingRule()
    for train, test in zip(run.probe, run.test.tolist(), strict=True):
        verdict = rule.update(train, test, standard_error=0.0)
    return verdict.overfitting, verdict.detected, verdict


def stopping(make):
    """A stopping rule taken for a detector: what stops is overfit."""

    def judge(run):
        rule = make()
        for index, (train, val) in enumerate(zip(run.running, run.val, strict=True)):
            if rule.update(val, train_loss=train):
                return True, index, None
        return False, None, None

    return judge


def gap_rule(run):
    """SageMaker Debugger's "Overfit": (val - train) / train above .1."""
    fired = [i for i, (t, v) in enumerate(zip(run.running, run.val, strict=True)) if v - t > 0.1 * t]
    return bool(fired), fired[0] if fired else None, None


def smoothed_rise(run):
    """An exponential mean over 5 that stands 5 % above its minimum for 3 evaluations, while training falls."""
    mean = train_mean = None
    least, train_then, lasted = math.inf, math.inf, 0
    for index, (train, val) in enumerate(zip(run.running, run.val, strict=True)):
        mean = val if mean is None else mean + (val - mean) / 3
        train_mean = train if train_mean is None else train_mean + (train - train_mean) / 3
        if mean < least:
            least, train_then = mean, train_mean
        lasted = lasted + 1 if mean > 1.05 * least and train_mean < train_then else 0
        if lasted == 3:
            return True, index, None
    return False, None, None


RULES = {
    "**fitwatch, with the losses of the examples**": lambda run: ours(run, paired=True),
    "**fitwatch, curves alone**": lambda run: ours(run, paired=False),
    "fitwatch, with the losses, `span=2, min_rise=0.03`": lambda run: ours(run, paired=True, **QUICK),
    "fitwatch, shown the hidden test set": oracle,
    "smoothed rise of 5 %, for 3 evaluations": smoothed_rise,
    "Prechelt GL, 5 %": stopping(lambda: fw.rules.GL(alpha=5)),
    "Prechelt UP, 3 strips": stopping(lambda: fw.rules.UP(s=3)),
    "patience 3": stopping(lambda: fw.rules.Patience(patience=3)),
    "patience 10": stopping(lambda: fw.rules.Patience(patience=10)),
    "gap above 10 %": gap_rule,
}


# -- scores ------------------------------------------------------------------------------------------------------------


def mean_f1(pairs):
    """Mean of the F1 of both classes, of (truth, flag) pairs."""
    n = Counter(pairs)
    f1 = [
        2 * n[side, side] / max(1, 2 * n[side, side] + n[not side, side] + n[side, not side]) for side in (True, False)
    ]
    return sum(f1) / 2


def score(runs, rule):
    judged = [(run, *rule(run)) for run in runs]
    labelled = [(run, flag, first) for run, flag, first, _ in judged if run.overfit is not None]
    by_training = {}
    for run, flag, _ in labelled:
        by_training.setdefault(run.seed, []).append((run.overfit, flag))
    draw = random.Random(0)  # noqa: S311 - no secret
    samples = [
        mean_f1(list(itertools.chain(*draw.choices(list(by_training.values()), k=len(by_training)))))
        for _ in range(1000)
    ]
    low, high = np.quantile(samples, [0.025, 0.975])
    delays = [first - run.optimum for run, _, first in labelled if run.overfit and first is not None]
    healthy = [(flag, first is not None) for run, flag, first in labelled if not run.overfit]
    regrets = []
    for run, _, first, _ in judged:
        seen = run.val if first is None else run.val[: first + 1]
        regrets.append(run.test[int(np.argmin(seen))] / run.test.min() - 1)
    return {
        "mean F1": f"{mean_f1([(run.overfit, flag) for run, flag, _ in labelled]):.3f} ({low:.2f} to {high:.2f})",
        "found": f"{statistics.fmean(flag for run, flag, _ in labelled if run.overfit):.2f}",
        "false alarms": "{:.2f} ({:.2f})".format(*map(statistics.fmean, zip(*healthy, strict=True))),
        "delay": f"{statistics.median(d for d in delays if d >= 0):g}",
        "too early": f"{statistics.fmean(d < 0 for d in delays):.2f}",
        "regret": f"{statistics.fmean(regrets):.1%}",
    }


def calibration(runs):
    """How often the true rise is within two standard errors of the reported one."""
    rows = []
    for run in runs:
        verdict = ours(run, paired=True)[2]
        last = len(run.val) - 1
        if verdict.reference is None or verdict.reference >= last - 1 or not math.isfinite(verdict.rise_se):
            continue
        truth = run.test[last] - run.test[verdict.reference]
        deviations = run.test_weights * (run.test_losses[last] - run.test_losses[verdict.reference] - truth)
        own = math.sqrt((deviations**2).sum()) / run.test_weights.sum()  # the hidden set is a sample too
        off = abs(verdict.rise - truth)
        rows.append((off < 2 * verdict.rise_se, off < 2 * math.hypot(verdict.rise_se, own)))
    plain, both = (statistics.fmean(column) for column in zip(*rows, strict=True))
    return [str(len(rows)), f"{plain:.1%}", f"{both:.1%}"]


def noise(level, seeds, *, step, epochs=100, **options):
    """False alarms on curves that only look alive: flat, or with a step in the learning rate half-way."""
    count, epochs, flagged = epochs, np.arange(epochs), 0
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        early = 0.5 + 0.8 * np.exp(-epochs / 8)
        base = np.where(epochs < 50, early, 0.42 + 0.08 * np.exp(-(epochs - 50) / 3)) if step else np.full(count, 0.7)
        quiet = np.where(epochs < 50, 1, 0.25) if step else 1
        val = base * (1 + level * quiet * draw.standard_normal(count))
        train = 0.9 * base if step else 0.3 + 0.5 * np.exp(-epochs / 20)
        flagged += fw.diagnose(train, val, **options).detected is not None
    return flagged / seeds


# -- the report --------------------------------------------------------------------------------------------------------


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def report(number, seeds):
    parts = []
    for title, sizes in (("30, 60 and 120 validation examples", SMALL), ("1,000 validation examples", LARGE)):
        runs = load(number, sizes)
        counts = Counter(run.overfit for run in runs)
        print(title, dict(counts), flush=True)
        rows = [[name, *score(runs, rule).values()] for name, rule in RULES.items()]
        head = ["rule", "mean F1 (95 %)", "found", "false alarms (ever)", "delay, epochs", "too early", "regret"]
        parts.append(
            f"**{title}**: {len(runs)} cases, of which {counts[True]} overfit, {counts[False]} are healthy and "
            f"{counts[None]} neither.\n\n{table(head, rows)}"
        )
    rows = []
    for size in (*SMALL, 500, *LARGE):
        runs = load(number, (size,))
        rows.append([f"{size:,}", *calibration(runs)])
    head = ["validation examples", "runs", "true rise within two standard errors", "the error of the truth counted too"]
    parts.append(f"**Calibration** of the reported rise, at the end of each run.\n\n{table(head, rows)}")
    by_set = []
    for name in overfitting_runs.SETS:
        cells = []
        for sizes in (SMALL, LARGE):
            runs = [run for run in load(number, sizes) if run.dataset == name and run.overfit is not None]
            cells.append(f"{mean_f1([(run.overfit, ours(run, paired=True)[0]) for run in runs]):.2f}" if runs else "")
        by_set.append([name.replace("_", " "), *cells])
    parts.append("**Mean F1 by data set.**\n\n" + table(["data set", "small sets", "1,000"], by_set))
    rows = [
        [
            f"{level:.0%}",
            f"{noise(level, seeds, step=False):.1%}",
            f"{noise(level, seeds, step=False, epochs=200):.1%}",
            f"{noise(level, seeds, step=True):.1%}",
            f"{noise(level, seeds, step=False, **QUICK):.1%}",
        ]
        for level in (0.01, 0.02, 0.03, 0.05, 0.1)
    ]
    head = ["noise of an evaluation", "flat curve", "flat curve of 200", "step in the learning rate"]
    head.append("flat curve, `span=2, min_rise=0.03`")
    parts.append(
        f"**False alarms on {seeds:,} made-up curves** without a rise, of 100 evaluations or 200.\n\n"
        f"{table(head, rows)}"
    )
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    overfitting_runs.make(options.runs, options.workers)
    text = report(options.runs, options.seeds)
    print(text)
    if options.write:
        tables.write("overfitting", text)


if __name__ == "__main__":
    main()
