"""Compares three trainings and one decision rule on a real, imbalanced data set whose mistakes differ in cost.

Prints a table, its conclusion, and a link to TensorBoard. The validation set selects the epoch; recall and cost are
measured on a test set that no training has seen.
"""

import logging
import time
from pathlib import Path

import hypothyroid
import torch
from hypothyroid import CLASSES, FALSE_ALARM, MISSED
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw

train_set, val_set, test_set = hypothyroid.load()
COSTS = fw.CostMatrix(MISSED, FALSE_ALARM, classes=CLASSES)
RIVAL = "cross-entropy, decided by cost"


def train(folder, name, loss, *callbacks):
    """Train once; return the result, the outputs on the test set, and the TensorBoard callback."""
    torch.manual_seed(1)
    page = fw.TensorBoard(folder, name=name, show_link=False)
    model = nn.Sequential(nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    trainer = fw.Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        loss,
        callbacks=[
            *callbacks,
            fw.GradientNorm(),
            fw.OverfittingDetector(),
            fw.EarlyStopping("val/loss", patience=10),
            fw.RealWorldCost(COSTS),
            fw.ProgressBar(),
            page,
        ],
        classes=CLASSES,
        log_every=10,
        seed=1,
        quiet=True,
    )
    result = trainer.fit(
        DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=1024), epochs=60
    )
    return result, trainer.predict([test_set.tensors[0]]), page


def row(result, decisions):
    """Return the cells of a row, and the cost of each patient of the test set."""
    targets = test_set.tensors[1]
    counts = fw.losses.confusion_matrix(decisions, targets, 2)
    recalls = [f"{recall:.3f}" for recall in counts.diag() / counts.sum(1)]
    costs = COSTS.per_example(decisions, targets)
    onset = f"overfits since epoch {result.verdict.onset + 1}" if result.verdict.overfitting else result.verdict.status
    return [*recalls, f"{costs.mean():.3f}", result.best.epoch + 1, onset], costs


def conclusion(costs):
    """Return a sentence on the cheapest row, and on the rival that uses plain training and needs no new loss."""
    mean = {name: float(each.mean()) for name, each in costs.items()}
    winner = min(mean, key=mean.get)
    other = min((name for name in mean if name != winner), key=mean.get) if winner == RIVAL else RIVAL
    difference = costs[other] - costs[winner]
    error = float(difference.std() / len(difference) ** 0.5)
    sure = "" if abs(float(difference.mean())) > 2 * error else ", too little to be sure"
    text = f"{mean[winner]:.3f} a patient against {mean[other]:.3f} ({difference.mean():.3f} ± {error:.3f}{sure})"
    if winner == RIVAL:
        return f"The honest rival wins, plain cross-entropy that decides by cost afterwards: {text} with {other}."
    return f"{winner} wins: {text} with the honest rival, plain cross-entropy that decides by cost afterwards."


def main():
    torch.set_num_threads(1)  # the fastest for tensors as small as these
    logging.getLogger("fitwatch").setLevel(logging.ERROR)  # the verdicts are in the table
    started, folder = time.perf_counter(), Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    cases = int(train_set.tensors[1].sum())
    print("Which training makes the cheapest decisions, if a missed case costs 20 times a false alarm?")
    print(f"{len(train_set):,} patients to train on, {cases} of them hypothyroid; {len(val_set)} to validate,", end=" ")
    print(f"{len(test_set)} to test\n")
    plain, outputs, page = train(folder, "cross-entropy", fw.CrossEntropy())
    weighted, weighted_outputs, _ = train(folder, "class-weights", fw.CrossEntropy(), fw.WeightedLoss("balanced"))
    real, real_outputs, _ = train(folder, "real-world-costs", fw.RealWorldCrossEntropy(COSTS))

    found = {
        "cross-entropy": row(plain, outputs.argmax(1)),
        RIVAL: row(plain, fw.cost_optimal_decision(outputs.softmax(1), COSTS)),
        "class weights": row(weighted, weighted_outputs.argmax(1)),
        "real-world costs": row(real, real_outputs.argmax(1)),
    }
    costs = {name: each for name, (_, each) in found.items()}
    winner = min(costs, key=lambda name: float(costs[name].mean()))
    head = ["", "", *(f"recall {name}" for name in CLASSES), "cost", "best epoch", "verdict"]
    rows = [["->" if name == winner else "", name, *cells] for name, (cells, _) in found.items()]
    widths = [max(len(str(line[i])) for line in [head, *rows]) for i in range(len(head))]
    print()
    for line in [head, ["-" * w for w in widths], *rows]:
        print("  ".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    answer, constant = COSTS.cheapest_constant(fw.data.count_classes(test_set))
    print(f"\ncost: per patient of the test set; calling all of them {CLASSES[answer]} costs {constant:.3f}.")
    print(conclusion(costs))
    print(
        f"\nThree trainings in {time.perf_counter() - started:.0f} s. `.venv/bin/fitwatch open {folder}` shows them, or"
    )
    print(f"`.venv/bin/tensorboard --logdir {folder}` and this link:\n{page.link(compare=True)}")


if __name__ == "__main__":
    main()
