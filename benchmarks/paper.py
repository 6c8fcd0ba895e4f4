"""What the losses cost in the end: the experiments of Ho & Wookey (2020, arXiv 2001.00570), and four real data sets.

A. One digit against all others, 630 positives; missing one costs 2000, a false alarm 100; 784-10-1.
B. Ten digits, calling digit i a j costs 20, any other mistake 1, for all 90 pairs; 784-50-20-10.
C. German credit, Caravan, hypothyroid and page blocks; ten splits each; best epoch by the validation loss.

Everything is trained by `fitwatch.Trainer`, the same cell, split and initial weights for every method. Thresholds are
tuned on validation data, costs measured on test data. Finished cells are kept in benchmarks/.data/paper.jsonl, so
that an interrupted run goes on.

    python benchmarks/paper.py [--quick] [--only A B C] [--write]
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import time

import paper_data
import tables
import torch
from torch import nn

import fitwatch as fw

RESULTS = paper_data.CACHE / "paper.jsonl"
SEEDS, SPLITS, BATCHES = 3, 10, 3
FN, FP = 2000.0, 100.0
REAL = {  # the costs: published for German credit, assumed for the others
    "german": fw.CostMatrix(5, 1, classes=["good", "bad"]),
    "caravan": fw.CostMatrix(15, 1, classes=["no", "buys"]),
    "hypothyroid": fw.CostMatrix(20, 1, classes=["healthy", "ill"]),
    # text called something else is looked at once more; a graphic or a line called text is lost
    "page_blocks": fw.CostMatrix(
        [[0, 1, 1, 1, 1], [5, 0, 1, 1, 1], [20, 5, 0, 5, 5], [10, 2, 2, 0, 2], [10, 2, 2, 2, 0]],
        classes=["text", "horizontal line", "graphic", "vertical line", "picture"],
    ),
}
METHODS = ["ce", "balanced", "weighted", "real", "focal", "adjusted", "expected"]
NAMES = {
    "ce": "cross-entropy",
    "ce optimal": "cross-entropy, cost-optimal decision",
    "ce tuned": "cross-entropy, threshold tuned on validation",
    "balanced": "balanced class weights",
    "weighted": "class weights from the costs",
    "real": "**real-world-weight cross-entropy**",
    "focal": "focal, gamma 2",
    "adjusted": "logit adjustment, tau 1",
    "expected": "expected cost",
}


class Batches:
    """Shuffled batches of tensors in memory."""

    def __init__(self, x, y, size, seed=None):
        self.x, self.y, self.size = x, y, size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self):
        return math.ceil(len(self.y) / self.size)

    def __iter__(self):
        n = len(self.y)
        order = torch.arange(n) if self.generator is None else torch.randperm(n, generator=self.generator)
        return ((self.x[i], self.y[i]) for i in order.split(self.size))


def loss_of(method, costs, counts, *, one_logit):
    """The loss and the callbacks of a method."""
    plain = fw.BinaryCrossEntropy() if one_logit else fw.CrossEntropy()
    if method == "balanced":
        return plain, [fw.WeightedLoss("balanced", counts=counts)]
    if method == "weighted":  # a class counts what its mistakes cost in the mean
        return fw.CrossEntropy(costs.matrix.sum(1) / (costs.num_classes - 1)), []
    losses = {
        "ce": lambda: plain,
        "real": lambda: fw.RealWorldCrossEntropy(costs),
        "focal": lambda: fw.Focal(2.0),
        "adjusted": lambda: fw.LogitAdjusted(counts),
        "expected": lambda: fw.ExpectedCost(costs),
    }
    return losses[method](), []


def train(sizes, loss, callbacks, batches, val=None, *, seed, epochs):
    """A trained multi-layer perceptron."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)  # as in Keras, which the paper used
        nn.init.zeros_(layers[-2].bias)
    net = nn.Sequential(*layers[:-1], *([nn.Flatten(0)] if sizes[-1] == 1 else []))
    optimizer = torch.optim.Adam(net.parameters(), eps=1e-7)
    fw.Trainer(net, optimizer, loss, callbacks=callbacks, device="cpu", log_every=10**6).fit(
        batches, val, epochs=epochs
    )
    return net.eval()


@torch.no_grad()
def probabilities(net, x):
    z = net(x).double()
    return torch.stack([(-z).sigmoid(), z.sigmoid()], 1) if z.dim() == 1 else z.softmax(1)


def counts_of(predicted, y, number):
    return torch.bincount(y * number + predicted, minlength=number**2).view(number, number)


def tuned_threshold(p, y, costs):
    """The threshold on p of class 1 that costs least on these examples; half-way between two of their values."""
    p, order = p.sort()
    y = y[order]
    missed = torch.cat([torch.zeros(1), y.cumsum(0)])  # positives below the threshold
    alarms = (y == 0).sum() - torch.cat([torch.zeros(1), (1 - y).cumsum(0)])
    best = int((missed * costs[1, 0] + alarms * costs[0, 1]).argmin())
    edges = torch.cat([p.new_zeros(1), p, p.new_ones(1)])
    return (edges[best] + edges[best + 1]) / 2


def evaluate(net, method, test, val, costs):
    """Method -> confusion matrix on the test set; cross-entropy has other decisions too."""
    matrix, number = costs.matrix.double(), costs.num_classes
    p = probabilities(net, test[0])
    found = {method: counts_of(p.argmax(1), test[1], number)}
    if method == "ce":
        found["ce optimal"] = counts_of((p @ matrix).argmin(1), test[1], number)
        if number == 2:
            threshold = tuned_threshold(probabilities(net, val[0])[:, 1], val[1], costs.matrix)
            found["ce tuned"] = counts_of((p[:, 1] > threshold).long(), test[1], number)
    return found


# -- the experiments: each gives tasks, and each task rows of results ------------------------------------------------


def tasks_a(quick):
    cells = [(0, 0), (8, 1)] if quick else [(digit, batch) for digit in range(10) for batch in range(BATCHES)]
    methods = [m for m in METHODS if m != "weighted"]  # of two classes it is the real-world loss, times a constant
    return [("A", *cell, seed, m) for seed in range(1 if quick else SEEDS) for cell in cells for m in methods]


def run_a(digit, batch, seed, method):
    x, labels = DATA["mnist"]
    positives = (labels == digit).nonzero().flatten()[batch * 630 : (batch + 1) * 630]
    chosen = torch.cat([positives, (labels != digit).nonzero().flatten()])
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1))]
    test, rest = chosen[: len(chosen) // 4], chosen[len(chosen) // 4 :]
    val, train_set = rest[: len(rest) // 10], rest[len(rest) // 10 :]
    y = (labels == digit).long()
    costs, counts = fw.CostMatrix(FN, FP), y[train_set].bincount(minlength=2)
    loss, callbacks = loss_of(method, costs, counts, one_logit=True)
    batches = Batches(x[train_set], y[train_set].float(), 100, seed)
    net = train((784, 10, 1), loss, callbacks, batches, seed=seed, epochs=10)
    for name, n in evaluate(net, method, (x[test], y[test]), (x[val], y[val]), costs).items():
        cost = float((n * costs.matrix).sum() / n.sum())
        yield {"method": name, "cost": cost, "missed": int(n[1, 0]), "alarms": int(n[0, 1])}


def tasks_b(quick):
    pairs = [(i, j) for i in range(10) for j in range(10) if i != j]
    pairs = [(4, 9), (3, 5)] if quick else pairs
    seeds = range(1 if quick else SEEDS)
    free = [("B", None, None, seed, m) for seed in seeds for m in ("ce", "balanced", "focal", "adjusted")]
    return free + [("B", i, j, seed, m) for seed in seeds for i, j in pairs for m in ("weighted", "real", "expected")]


def pair_costs(i, j):
    matrix = 1 - torch.eye(10)
    matrix[i, j] = 20
    return fw.CostMatrix(matrix)


def run_b(i, j, seed, method):
    x, y = DATA["mnist"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    test, rest = order[: len(order) // 4], order[len(order) // 4 :]
    train_set = rest[len(rest) // 10 :]
    pairs = [(i, j)] if i is not None else [(a, b) for a in range(10) for b in range(10) if a != b]
    loss, callbacks = loss_of(method, pair_costs(*pairs[0]), y[train_set].bincount(), one_logit=False)
    batches = Batches(x[train_set], y[train_set], 100, seed)
    net = train((784, 50, 20, 10), loss, callbacks, batches, seed=seed, epochs=10)
    for a, b in pairs:
        costs = pair_costs(a, b)
        for name, n in evaluate(net, method, (x[test], y[test]), None, costs).items():
            cost = float((n * costs.matrix).sum() / n.sum())
            yield {"method": name, "pair": [a, b], "cost": cost, "targeted": int(n[a, b])}


def tasks_c(quick):
    splits = range(1 if quick else SPLITS)
    return [("C", name, split, 0, m) for name in REAL for split in splits for m in METHODS]


def run_c(name, split, _seed, method):
    x, y = DATA[name]
    generator, costs = torch.Generator().manual_seed(split), REAL[name]
    parts = [[], [], []]  # training, validation, test: 60, 20, 20 % of each class
    for label in range(costs.num_classes):
        rows = (y == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = [round(0.6 * len(rows)), round(0.8 * len(rows))]
        for part, piece in zip(parts, rows.tensor_split(cut), strict=True):
            part.append(piece)
    train_set, val, test = (torch.cat(part) for part in parts)
    mean, std = x[train_set].mean(0), x[train_set].std(0).clamp_min(1e-6)
    x = (x - mean) / std
    loss, callbacks = loss_of(method, costs, y[train_set].bincount(), one_logit=False)
    callbacks = [*callbacks, fw.EarlyStopping("val/loss", patience=15)]
    val_batches = Batches(x[val], y[val], 4096)
    batches = Batches(x[train_set], y[train_set], 32, split)
    sizes = (x.shape[1], 32, costs.num_classes)
    net = train(sizes, loss, callbacks, batches, val_batches, seed=split, epochs=100)
    for name_, n in evaluate(net, method, (x[test], y[test]), (x[val], y[val]), costs).items():
        yield {"method": name_, "cost": float((n * costs.matrix).sum() / n.sum())}


DATA = {}
RUNS = {"A": run_a, "B": run_b, "C": run_c}
TASKS = {"A": tasks_a, "B": tasks_b, "C": tasks_c}


def work(task):
    torch.set_num_threads(1)
    return task, list(RUNS[task[0]](*task[1:]))


def run(parts, *, quick, workers):
    done = {tuple(json.loads(line)["task"]) for line in RESULTS.read_text().splitlines()} if RESULTS.exists() else set()
    tasks = [task for part in parts for task in TASKS[part](quick) if task not in done]
    for name in {"mnist"} if set(parts) & set("AB") else ():
        DATA[name] = paper_data.mnist()
    if "C" in parts:
        DATA.update({name: getattr(paper_data, name)() for name in REAL})
    print(f"{len(tasks)} trainings to do")
    began = time.monotonic()
    with multiprocessing.get_context("fork").Pool(workers) as pool, RESULTS.open("a") as file:
        for number, (task, rows) in enumerate(pool.imap_unordered(work, tasks), 1):
            file.write(json.dumps({"task": task, "rows": rows}) + "\n")
            file.flush()
            if number % 20 == 0 or number == len(tasks):
                left = (time.monotonic() - began) / number * (len(tasks) - number)
                print(f"{number} of {len(tasks)}, {left / 60:.1f} minutes left", flush=True)


# -- the tables ------------------------------------------------------------------------------------------------------


def collect():
    """Part -> method -> cell -> the rows of its seeds."""
    found = {}
    for line in RESULTS.read_text().splitlines():
        entry = json.loads(line)
        part, one, two, _, _ = entry["task"]
        for row in entry["rows"]:
            group = f"C {one}" if part == "C" else part
            cell = two if part == "C" else tuple(row.get("pair", (one, two)))
            found.setdefault(group, {}).setdefault(row["method"], {}).setdefault(cell, []).append(row)
    return found


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


def table(methods, fields):
    """A Markdown table: cost, further fields, and the comparison with cross-entropy, cell by cell."""

    def by_cell(method, field):
        return {cell: statistics.fmean(row[field] for row in rows) for cell, rows in methods[method].items()}

    base = by_cell("ce", "cost")
    lines = [
        f"| method | cost | sd | {''.join(f'{title} | ' for title in fields.values())}below CE | difference to CE |",
        f"|---|---|---|{'---|' * len(fields)}---|---|",
    ]
    for method in (m for m in NAMES if m in methods):
        cost = by_cell(method, "cost")
        others = "".join(f"{statistics.fmean(by_cell(method, field).values()):.2f} | " for field in fields)
        differences = [cost[cell] - base[cell] for cell in cost]
        mean, half = statistics.fmean(differences), 1.96 * spread(differences) / math.sqrt(len(differences))
        paired = (
            ["", ""]
            if method == "ce"
            else [
                f"{sum(d < 0 for d in differences)} of {len(differences)}",
                f"{mean:+.4g} ± {half:.2g}",
            ]
        )
        values = [f"{statistics.fmean(cost.values()):.4g}", f"{spread(list(cost.values())):.2g}"]
        lines.append(f"| {NAMES[method]} | {' | '.join(values)} | {others}{' | '.join(paired)} |")
    return "\n".join(lines)


def report():
    found, parts = collect(), []
    if "A" in found:
        fields = {"missed": "missed", "alarms": "false alarms"}
        parts += ["**A. One digit against the others.**", table(found["A"], fields)]
    if "B" in found:
        parts += ["**B. Ten digits, one dear pair.**", table(found["B"], {"targeted": "targeted mistakes"})]
    for name in REAL:
        if f"C {name}" in found:
            parts += [f"**C. {name.replace('_', ' ')}.**", table(found[f"C {name}"], {})]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--quick", action="store_true", help="a few cells")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    paper_data.CACHE.mkdir(exist_ok=True)
    run(options.only, quick=options.quick, workers=options.workers)
    text = report()
    print(text)
    if options.write:
        tables.write("paper", text)


if __name__ == "__main__":
    main()
