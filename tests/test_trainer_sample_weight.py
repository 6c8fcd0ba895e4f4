"""Batches that carry weights of the examples, against one big batch in float64 and the formula of the weighted mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from tests.test_trainer_exact import FN, FP, WEIGHT, KeepGradients, close, examples, network, real_world_reference

COUNTS = torch.tensor([19.0, 7, 4], dtype=torch.float64)


def of_classes(each):
    """sum(w l) / sum(w) with class weights and weights of the examples."""

    def reference(output, target, w):
        total, divisor = each(output, target)
        return (w * total).sum() / (w * divisor).sum()

    return reference


def cross_entropy(output, target):
    return F.cross_entropy(output, target, WEIGHT, reduction="none"), WEIGHT[target]


def binary(output, target):
    z, y = output, target
    losses = -(7 * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
    return losses.squeeze(1), torch.ones(len(z), dtype=torch.float64)


def squared(output, target):
    return ((output - target) ** 2).squeeze(1), torch.ones(len(output), dtype=torch.float64)


def real_world(output, target):
    losses = [real_world_reference(output[i : i + 1], target[i : i + 1]) for i in range(len(target))]
    return torch.stack(losses), torch.ones(len(target), dtype=torch.float64)


def adjusted(output, target):
    prior = (COUNTS / COUNTS.sum()).log()
    return F.cross_entropy(output + prior, target, reduction="none"), torch.ones(len(target), dtype=torch.float64)


def focal(output, target):
    p = output.softmax(1).gather(1, target[:, None])[:, 0]
    return -WEIGHT[target] * (1 - p) ** 2 * p.log(), WEIGHT[target]


LOSSES = {
    "cross-entropy": (lambda: fw.CrossEntropy(WEIGHT), cross_entropy, 3),
    "torch cross-entropy": (lambda: nn.CrossEntropyLoss(WEIGHT), cross_entropy, 3),
    "binary": (lambda: fw.BinaryCrossEntropy(7.0), binary, 1),
    "torch squared error": (nn.MSELoss, squared, 1),
    "real world": (lambda: fw.RealWorldCrossEntropy(FN.double(), FP.double()), real_world, 3),
    "logit adjustment": (lambda: fw.LogitAdjusted(COUNTS), adjusted, 3),
    "focal": (lambda: fw.Focal(2.0, weight=WEIGHT), focal, 3),
}
FORMS = {
    "tuple": lambda x, y, w: (x, y, w),
    "list": lambda x, y, w: [x, y, w],
    "dict": lambda x, y, w: {"input": x, "target": y, "sample_weight": w},
}
CUTS = {"one": [30], "ragged": [3, 1, 11, 15], "short last window": [7, 7, 7, 7, 2]}


def example_weights():
    w = torch.rand(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    w[[0, 5, 20, 29]] = 0
    w[3:4] = 0  # a whole batch of the ragged cut without weight
    return w


def batches(sizes, form, *tensors):
    return [FORMS[form](*part) for part in zip(*(t.split(sizes) for t in tensors), strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_training_and_validation_are_one_big_weighted_batch(name, cut, form):
    """Gradients, parameters after 5 steps, train/loss and val/loss equal those of one big weighted batch to 1e-12."""
    make, each, outputs = LOSSES[name]
    reference = of_classes(each)
    x, y = examples(binary=outputs == 1)
    w, ours, theirs, keep = example_weights(), network(outputs), network(outputs), KeepGradients()
    loader = batches(CUTS[cut], form, x, y, w)
    trainer = fw.Trainer(
        ours,
        torch.optim.SGD(ours.parameters(), 0.1),
        make(),
        callbacks=[keep],
        accumulate=len(loader),
        device="cpu",
    )
    result = trainer.fit(loader, batches([11, 2, 17], form, x, y, w), epochs=5)

    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for step in range(5):
        optimizer.zero_grad()
        loss = reference(theirs(x), y, w)
        loss.backward()
        assert close([p.grad for p in theirs.parameters()], keep.seen[step])
        assert result.history[step]["train/loss"] == pytest.approx(loss.item(), rel=1e-12)
        optimizer.step()
        with torch.no_grad():
            expected = reference(theirs(x), y, w).item()
        assert result.history[step]["val/loss"] == pytest.approx(expected, rel=1e-12)
    assert close(list(theirs.parameters()), list(ours.parameters()))


def test_the_unweighted_loss_keeps_the_weights_of_the_examples(data):
    """val/loss_unweighted drops class weights only; counting weighs the classes by their examples' weights."""
    x, y = data.tensors
    w = torch.rand(64, dtype=torch.float64)
    sums = torch.stack([w[y == c].sum() for c in range(3)])
    class_weight = w.sum() / (3 * sums)
    model = nn.Linear(4, 3).double()
    loader = DataLoader(TensorDataset(x, y, w), 10)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.0), callbacks=[fw.WeightedLoss()], device="cpu")
    entry = trainer.fit(loader, loader, epochs=1).history[0]
    nll = F.cross_entropy(model(x), y, reduction="none").detach()
    weighted = (w * class_weight[y] * nll).sum() / (w * class_weight[y]).sum()
    assert entry["val/loss"] == pytest.approx(weighted.item(), rel=1e-6)  # class weights are float32
    assert entry["val/loss_unweighted"] == pytest.approx(((w * nll).sum() / w.sum()).item(), rel=1e-12)


def test_masks_of_pixels_train_as_if_the_others_were_not_there():
    """Masks (N, H, W) in the batch give the gradient of the kept pixels, also where the targets below them are NaN."""
    x, y = torch.randn(6, 2, 4, 4).double(), torch.randn(6, 1, 4, 4).double()
    mask = torch.rand(6, 1, 4, 4) > 0.4
    holes = torch.where(mask, y, torch.nan)
    torch.manual_seed(0)
    model, keep = nn.Conv2d(2, 1, 1).double(), KeepGradients()
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        nn.MSELoss(),
        callbacks=[keep],
        accumulate=2,
        device="cpu",
    )
    loader = list(zip(x.split([4, 2]), holes.split([4, 2]), mask.split([4, 2]), strict=True))
    result = trainer.fit(loader, loader, epochs=1)
    expected = F.mse_loss(model(x)[mask], y[mask])
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert close(gradients, keep.seen[0])
    assert result.history[0]["val/loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert result.baseline.constant == pytest.approx(y[mask].var(correction=0).item(), rel=1e-12)


def test_metrics_get_the_weights_they_ask_for(data):
    """A metric function and an update with a parameter sample_weight get the weights of all examples; others do not."""
    x, y = data.tensors
    w = torch.rand(64, dtype=torch.float64)

    class Share:
        def reset(self):
            self.hit = self.all = 0.0

        def update(self, outputs, targets, sample_weight):
            self.hit += (sample_weight * (outputs.argmax(1) == targets)).sum()
            self.all += sample_weight.sum()

        def compute(self):
            return self.hit / self.all

    model = nn.Linear(4, 3).double()
    metrics = {
        "plain": lambda outputs, targets: (outputs.argmax(1) == targets).double().mean(),
        "weighted": lambda outputs, targets, sample_weight: (
            (sample_weight * (outputs.argmax(1) == targets)).sum() / sample_weight.sum()
        ),
        "object": Share(),
    }
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.0), metrics=metrics, device="cpu")
    values = trainer.validate(DataLoader(TensorDataset(x, y, w), 9))
    hit = (model(x).argmax(1) == y).double()
    assert values["val/plain"] == pytest.approx(hit.mean().item())
    for name in ("weighted", "object"):
        assert values[f"val/{name}"] == pytest.approx(((w * hit).sum() / w.sum()).item())


def test_weights_that_cannot_be_taken_are_refused(data):
    """A loss that gives a mean, weights of another shape, and negative ones are errors that say so."""
    x, y = data.tensors
    model = nn.Linear(4, 3).double()

    def fit(loss, w):
        trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, device="cpu")
        trainer.fit([(x, y, w)], epochs=1)

    with pytest.raises(TypeError, match="has a sample_weight, which cross_entropy cannot take"):
        fit(F.cross_entropy, torch.ones(64))
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(64,\).*got shape \(63,\)"):
        fit(None, torch.ones(63))
    with pytest.raises(ValueError, match="at least 0, got -1.0 at index 2"):
        fit(None, torch.tensor([1.0, 1, -1] + [1] * 61))
    with pytest.raises(TypeError, match="sample_weight must be a tensor, got list"):
        fit(None, [1.0] * 64)
    fit(F.cross_entropy, None)  # a third part of None is no weight
