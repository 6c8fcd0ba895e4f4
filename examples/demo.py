"""Compares three losses on a real, imbalanced data set whose mistakes differ in cost.

Prints a table, the verdict of each run, and the links to TensorBoard. The validation set selects the epoch; recall and
cost are measured on a test set that no run has seen.
"""

import hypothyroid
import torch
from hypothyroid import CLASSES, FALSE_ALARM, MISSED
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw

train_set, val_set, test_set = hypothyroid.load()
COSTS = fw.CostMatrix(MISSED, FALSE_ALARM, classes=CLASSES)


def train(name, loss, *callbacks):
    """Train once; return the result, the outputs on the test set, and the TensorBoard callback."""
    torch.manual_seed(1)
    page = fw.TensorBoard("runs", name=name, show_link=False)
    model = nn.Sequential(nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    trainer = fw.Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        loss,
        callbacks=[
            *callbacks,
            fw.GradientNorm(),
            fw.OverfittingDetector(),
            fw.EarlyStopping("val/loss", patience=20),
            fw.RealWorldCost(COSTS),
            fw.ProgressBar(),
            page,
        ],
        log_every=10,
        seed=1,
    )
    print(f"{name} ...")
    result = trainer.fit(
        DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=1024), epochs=60
    )
    model.eval()
    with torch.no_grad():
        return result, model(test_set.tensors[0].to(trainer.device)).cpu(), page


def row(name, result, predicted):
    targets = test_set.tensors[1]
    counts = fw.losses.confusion_matrix(predicted, targets, 2)
    recalls = (counts.diag() / counts.sum(1)).tolist()
    cost = COSTS.per_example(predicted, targets).mean().item()
    stopped = "patience" if result.stop_reason else "all epochs"
    onset = f"overfits since epoch {result.verdict.onset}" if result.verdict.overfitting else result.verdict.status
    best = result.best.metrics
    loss, left = f"{best['val/loss']:.3f}", f"{best['val/loss_left']:.0%}"
    return [name, loss, left, *(f"{r:.3f}" for r in recalls), f"{cost:.3f}", result.best.epoch, stopped, onset]


def main():
    cases = int(train_set.tensors[1].sum())
    print(f"hypothyroid: {len(train_set)} patients to train on, {cases} of them ill;", end=" ")
    print(f"{len(val_set)} to validate, {len(test_set)} to test")
    print(f"cost of a missed case {MISSED:g}, of a false alarm {FALSE_ALARM:g}\n")
    plain, plain_outputs, page = train("cross-entropy", fw.CrossEntropy())
    weighted, weighted_outputs, _ = train("class-weights", fw.CrossEntropy(), fw.WeightedLoss("balanced"))
    real, real_outputs, _ = train("real-world-costs", fw.RealWorldCrossEntropy(COSTS))

    recalls = [f"recall {name}" for name in CLASSES]
    head = ["loss", "val loss", "left", *recalls, "cost", "best epoch", "stop", "verdict"]
    optimal = fw.cost_optimal_decision(plain_outputs.softmax(1), COSTS)
    rows = [
        row("cross-entropy", plain, plain_outputs.argmax(1)),
        row("  decided by cost", plain, optimal),
        row("class weights", weighted, weighted_outputs.argmax(1)),
        row("real-world costs", real, real_outputs.argmax(1)),
    ]
    widths = [max(len(str(line[i])) for line in [head, *rows]) for i in range(len(head))]
    print()
    for line in [head, ["-" * w for w in widths], *rows]:
        print("  ".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    print("\nval loss: its scale depends on the weights of the run. left: as a share of the loss of the best")
    print("constant prediction. cost: per patient of the test set;", end=" ")
    answer, constant = COSTS.cheapest_constant(fw.data.count_classes(test_set))
    print(f"predicting {CLASSES[answer]} for all of them costs {constant:.3f}.")
    print("Epochs count from 0. Verdicts at the end of each run:")
    for name, result in (("cross-entropy", plain), ("class weights", weighted), ("real-world costs", real)):
        print(f"{name}: {result.verdict.evidence}")
    print(f"\nTensorBoard: .venv/bin/tensorboard --logdir runs\n  {page.link()}")
    print(f"all three runs:\n  {page.link(compare=True)}")


if __name__ == "__main__":
    main()
