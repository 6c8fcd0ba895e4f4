"""What calibration brings after training: six real data sets, small networks, plain and balanced weights.

A network is trained by `fitwatch.Trainer` on a few hundred examples; after each epoch the logits of a validation pool
of 1,000 and of a hidden test set are kept. For validation sets of N = 60, 200 and 1,000 of the pool, the epoch with the
lowest validation loss is restored, calibrated on the same N examples, and measured on the test set:

- the log-loss and the cost of cost-optimal decisions, before and after (missing the rarest class costs 10, any other
  mistake 1), and for two classes with a threshold tuned on the N examples;
- restoring by `val/refined_loss` instead;
- for runs whose validation loss ends 5 % above its minimum, the share of the rise that calibration undoes: how often
  its interval of two standard errors holds the value on the test set.

Differences are paired, each as a share of the second figure of its run; their standard errors are clustered by
configuration (each has two seeds). Finished runs are kept in benchmarks/.data/calibration.pt.

    python benchmarks/calibration.py [--configurations 48] [--workers 1] [--write]
"""

import argparse
import itertools
import math
import multiprocessing
import random
import statistics
import time

import paper_data
import tables
import torch
from torch import nn

import fitwatch as fw
from fitwatch.calibration.affine import fit_affine
from fitwatch.calibration.attribution import Pair, attribute
from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import cross_fitted, fit_temperature

SIZES, SEEDS, POOL, TEST = (60, 200, 1000), 2, 1000, 3000
DATA = {}


def mnist():
    images, labels = paper_data.mnist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:6000]
    return nn.functional.avg_pool2d(images[order].view(-1, 1, 28, 28), 2).flatten(1), labels[order]


SETS = {
    "mnist": mnist,
    "satimage": paper_data.satimage,
    "page_blocks": paper_data.page_blocks,
    "hypothyroid": paper_data.hypothyroid,
    "caravan": paper_data.caravan,
    "default": paper_data.default,
}


class Logits(fw.Callback):
    """Keeps the logits of some inputs after each epoch."""

    def __init__(self, inputs):
        self.inputs, self.kept = inputs, []

    @torch.no_grad()
    def on_validation_end(self, state):
        state.model.eval()
        self.kept.append([state.model(x) for x in self.inputs])
        state.model.train()


def settings(number):
    draw = random.Random(number)  # noqa: S311 - no secret
    return {
        "dataset": list(SETS)[number % len(SETS)],
        "n_train": draw.choice([200, 400, 800]),
        "width": draw.choice([16, 64, 128]),
        "depth": draw.choice([1, 2]),
        "dropout": draw.choice([0.0, 0.0, 0.3]),
        "weight_decay": draw.choice([0.0, 1e-2]),
        "lr": draw.choice([1e-3, 3e-3, 1e-2]),
        "batch": draw.choice([16, 32, 64]),
        "epochs": draw.choice([30, 60]),
    }


def train(options, seed, *, balanced):
    """The class weights, or None; the logits of pool and test after each epoch; and their targets."""
    x, y = DATA[options["dataset"]]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    n, number = options["n_train"], int(y.max()) + 1
    first = torch.stack([order[(y[order] == c).nonzero()[0, 0]] for c in range(number)])  # no class without examples
    order = torch.cat([first, order[~torch.isin(order, first)]])
    rows = order[:n], order[n : n + POOL], order[n + POOL : n + POOL + TEST]
    mean, std = x[rows[0]].mean(0), x[rows[0]].std(0)
    x = ((x - mean) / torch.where(std > 1e-6, std, 1)).clamp(-10, 10)
    torch.manual_seed(seed)
    sizes, layers = [x.shape[1], *[options["width"]] * options["depth"], number], []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(options["dropout"])]
    net = nn.Sequential(*layers[:-2])
    optimizer = torch.optim.AdamW(net.parameters(), options["lr"], weight_decay=options["weight_decay"])
    weights = fw.class_weights(torch.bincount(y[rows[0]], minlength=number), "balanced") if balanced else None
    keeper = Logits([x[rows[1]], x[rows[2]]])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x[rows[0]], y[rows[0]]), options["batch"], shuffle=True
    )
    trainer = fw.Trainer(
        net, optimizer, fw.CrossEntropy(weights), callbacks=keeper, device="cpu", log_every=10**6, seed=seed
    )
    trainer.fit(loader, [(x[rows[1]][:64], y[rows[1]][:64])], epochs=options["epochs"])
    return weights, keeper.kept, y[rows[1]], y[rows[2]]


def auroc(scores, positive):
    """Area under the ROC curve, by ranks; NaN without both kinds."""
    order = scores.argsort()
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    n = int(positive.sum())
    if not 0 < n < len(order):
        return math.nan
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(order) - n)))


def ranking(p, y):
    """AUROC of class 1 of two, else the mean of each class against the others."""
    shown = [1] if p.shape[1] == 2 else range(p.shape[1])
    known = [a for k in shown if not math.isnan(a := auroc(p[:, k], y == k))]
    return statistics.fmean(known) if known else math.nan


def cost_matrix(y, number):
    costs = 1 - torch.eye(number, dtype=torch.float64)
    costs[torch.bincount(y, minlength=number).argmin()] *= 10
    return costs


def cost(p, y, costs):
    return float(costs[y, (p @ costs).argmin(1)].mean())


def tuned(p, y, costs):
    """The threshold on p of class 1 that costs least; half-way between two of the values."""
    p, order = p.sort()
    y = y[order]
    missed = torch.cat([torch.zeros(1), y.cumsum(0)])
    alarms = (y == 0).sum() - torch.cat([torch.zeros(1), (1 - y).cumsum(0)])
    best = int((missed * costs[1, 0] + alarms * costs[0, 1]).argmin())
    edges = torch.cat([p.new_zeros(1), p, p.new_ones(1)])
    return (edges[best] + edges[best + 1]) / 2


def judge(weights, kept, y_val, y_test, size):
    """The figures of one run for a validation set of ``size`` examples."""
    y, shift = y_val[:size], None if weights is None else weights.log()
    loss = fw.CrossEntropy(weights)
    curve = [float(loss(val[:size], y)) for val, _ in kept]
    best = min(range(len(curve)), key=curve.__getitem__)
    val = [Rows.of(v[:size], y, shift=shift) for v, _ in kept]
    t = [fit_temperature(rows) for rows in val]
    refined = [rows.losses(cross_fitted(rows, one)) for rows, one in zip(val, t, strict=True)]
    costs = cost_matrix(y_test, kept[0][0].shape[1])

    def test(epoch):
        return Rows.of(kept[epoch][1], y_test, shift=shift)

    raw_z, rows = kept[best][1].double(), test(best)
    p_raw, p = raw_z.softmax(1), (rows.logits / t[best]).softmax(0).T
    affine_t, bias = fit_affine(val[best], start=t[best])
    p_affine = (rows.logits / affine_t + bias[:, None]).softmax(0).T
    found = {
        "raw": float(Rows.of(raw_z, y_test).losses().mean()),
        "calibrated": float(rows.losses(1 / t[best]).mean()),
        "affine": float(-p_affine[range(len(y_test)), y_test].log().mean()),
        "raw cost": cost(p_raw, y_test, costs),
        "calibrated cost": cost(p, y_test, costs),
        "affine cost": cost(p_affine, y_test, costs),
    }
    if len(costs) == 2:
        threshold = tuned(kept[best][0][:size].double().softmax(1)[:, 1], y, costs)
        found["tuned cost"] = float(costs[y_test, (p_raw[:, 1] > threshold).long()].mean())
    by_refined = min(range(len(refined)), key=lambda e: float(refined[e].mean()))
    other = test(by_refined)
    found["restored by refined"] = float(other.losses(1 / t[by_refined]).mean())
    found["auroc"] = ranking(p, y_test)
    found["auroc by refined"] = ranking((other.logits / t[by_refined]).softmax(0).T, y_test)
    # the share of the rise that calibration undoes, at the end
    raw = [rows.losses() for rows in val]
    lowest = min(range(len(raw)), key=lambda e: float(raw[e].mean()))
    if float(raw[-1].mean()) > 1.05 * float(raw[lowest].mean()):
        w = torch.ones(size)
        seen = attribute(Pair(raw[lowest], refined[lowest]), Pair(raw[-1], refined[-1]), w)
        a, b = test(lowest), test(-1)
        true = attribute(
            Pair(a.losses(), a.losses(1 / t[lowest])), Pair(b.losses(), b.losses(1 / t[-1])), torch.ones(len(a))
        )
        found |= {
            "share": seen.share,
            "share_se": seen.share_se,
            "true share": true.share,
            "true share_se": true.share_se,
            "cause": seen.cause(0.04),
            "true cause": true.cause(0.04),
            "true refined": true.refined_rise / true.refined_before,
            "refined": seen.refined_rise / seen.refined_before,
            "refined_se": seen.refined_rise_se / seen.refined_before,
        }
    return found


def work(task):
    torch.set_num_threads(1)
    number, seed, balanced = task
    run = train(settings(number), 1000 * number + seed, balanced=balanced)
    return task, {size: judge(*run, size) for size in SIZES}


# -- the tables ------------------------------------------------------------------------------------------------------


def clustered(values):
    """Mean and standard error of values by configuration: {configuration: [value of each seed]}."""
    means = [statistics.fmean(v) for v in values.values()]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def differences(results, arm, size, one, two, *, relative=True):
    """The difference of two figures over all runs that have both, in % of the second or in points."""
    values, flat = {}, []
    for (number, _, balanced), by_size in results.items():
        found = by_size[size]
        if balanced == arm and one in found and two in found and not math.isnan(found[one] + found[two]):
            difference = found[one] - found[two]
            values.setdefault(number, []).append(100 * difference / (found[two] if relative else 1))
            flat.append(difference)
    return *clustered(values), max(flat), sum(v < 0 for v in flat), len(flat)


COMPARED = [
    ("log-loss: calibrated - raw", "calibrated", "raw"),
    ("log-loss: with biases - raw", "affine", "raw"),
    ("cost: calibrated - raw", "calibrated cost", "raw cost"),
    ("cost, two classes: tuned threshold - calibrated", "tuned cost", "calibrated cost"),
    ("log-loss, calibrated: restored by refined - by raw loss", "restored by refined", "calibrated"),
]


def report(results):
    lines = [
        "| weights | N | test set: difference in | mean, % | SE | better in | worst run |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, name in ((False, "none"), (True, "balanced")):
        for title, one, two in COMPARED:
            for size in SIZES:
                mean, error, worst, better, count = differences(results, arm, size, one, two)
                lines.append(
                    f"| {name} | {size:,} | {title} | {mean:+.1f} | {error:.1f} | {better} of {count} | {worst:+.3f} |"
                )
        for size in SIZES:
            mean, error, *_ = differences(results, arm, size, "auroc by refined", "auroc", relative=False)
            lines.append(
                f"| {name} | {size:,} | AUROC, points: by refined - by raw loss | {mean:+.2f} | {error:.2f} | | |"
            )
    lines += ["", *coverage(results)]
    return "\n".join(lines)


def coverage(results):
    lines = [
        "| weights | N | runs that rose | share undone | held | both errors | model / confidence / open | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, name in ((False, "none"), (True, "balanced")):
        for size in SIZES:
            runs = [r[size] for (_, _, balanced), r in results.items() if balanced == arm and "share" in r[size]]
            if not runs:
                continue
            known = [r for r in runs if not math.isnan(r["true share"])]
            alone, both = (
                sum(
                    abs(r["share"] - r["true share"]) <= 2 * math.hypot(r["share_se"], test * r["true share_se"])
                    for r in known
                )
                for test in (0, 1)
            )
            told = [r["cause"] for r in runs]
            wrong = sum({r["cause"], r["true cause"]} == {"model", "confidence"} for r in runs)
            shares = [r["true share"] for r in known]
            kinds = " / ".join(str(told.count(kind)) for kind in ("model", "confidence", "open"))
            lines.append(
                f"| {name} | {size:,} | {len(runs)} | {statistics.median(shares):.0%} | "
                f"{alone / len(known):.0%} | {both / len(known):.0%} | {kinds} | {wrong} |"
            )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=48)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    paper_data.CACHE.mkdir(exist_ok=True)
    DATA.update({name: read() for name, read in SETS.items()})
    kept = paper_data.CACHE / "calibration.pt"
    results, began = torch.load(kept) if kept.exists() else {}, time.monotonic()
    tasks = [(n, s, b) for n in range(options.configurations) for s in range(SEEDS) for b in (False, True)]
    tasks = [task for task in tasks if task not in results]
    with multiprocessing.get_context("fork").Pool(options.workers) as pool:
        for number, (task, found) in enumerate(pool.imap_unordered(work, tasks), 1):
            results[task] = found
            if number % 20 == 0:
                left = (time.monotonic() - began) / number * (len(tasks) - number)
                print(f"{number} of {len(tasks)}, {left / 60:.1f} minutes left", flush=True)
                torch.save(results, kept)
    torch.save(results, kept)
    text = report(dict(sorted(results.items())))
    print(text)
    if options.write:
        tables.write("calibration", text)


if __name__ == "__main__":
    main()
