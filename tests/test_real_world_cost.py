"""`RealWorldCost` agrees with counting by hand, in its values and pictures."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fitwatch as fw
from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import cross_fitted, fit_temperature, folds
from fitwatch.tensorboard.confusion import confusion_image

COSTS = fw.CostMatrix([1.0, 2, 9], [[0.0, 0, 1], [4, 0, 0], [0, 3, 0]], classes=["low", "mid", "high"])


def data(n=120, num_classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return x, (x @ torch.randn(4, num_classes, generator=generator)).argmax(1)


def trainer_of(*callbacks, outputs=3, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, outputs)
    return fw.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=callbacks, **options)


def test_both_costs_are_those_of_the_decisions_and_can_be_monitored():
    """In every epoch val/cost is the cost of arg-max and val/cost_optimal that of the least expected cost."""
    x, y = data()
    loader = list(zip(x.split(50), y.split(50), strict=True))
    trainer = trainer_of(fw.RealWorldCost(COSTS), fw.EarlyStopping("val/cost", patience=3, restore_best=False))
    result = trainer.fit(loader, loader, epochs=3)
    with torch.no_grad():
        logits = trainer.model(x)
    by_hand = {"val/cost": 0.0, "val/cost_optimal": 0.0}
    for p, target in zip(logits.double().softmax(1).tolist(), y.tolist(), strict=True):
        expected = [sum(p[k] * COSTS.matrix[k, j].item() for k in range(3)) for j in range(3)]
        by_hand["val/cost"] += COSTS.matrix[target, p.index(max(p))].item() / 120
        by_hand["val/cost_optimal"] += COSTS.matrix[target, expected.index(min(expected))].item() / 120
    for name, cost in by_hand.items():
        assert result.history[-1][name] == pytest.approx(cost)
    assert result.best.metrics == min(result.history, key=lambda entry: entry["val/cost"])


def test_one_logit_positions_weights_and_ignored_labels():
    """The cost is right for a single logit, segmentation outputs, sample weights and ignored labels."""
    x, y = data(num_classes=2)
    weight = (torch.arange(120) % 3).float()
    costs = fw.CostMatrix(20, 1)
    loader = [(x, y.float().unsqueeze(1), weight)]
    trainer = trainer_of(fw.RealWorldCost(costs), loss=fw.BinaryCrossEntropy(), outputs=1)
    result = trainer.fit(loader, loader, epochs=1)
    with torch.no_grad():
        positive = trainer.model(x).squeeze(1) > 0
    paid = torch.where(positive & (y == 0), 1.0, torch.where(~positive & (y == 1), 20.0, 0.0))
    assert result.history[-1]["val/cost"] == pytest.approx(((paid * weight).sum() / weight.sum()).item())

    torch.manual_seed(0)
    images, masks = torch.randn(6, 2, 5, 5), torch.randint(0, 3, (6, 5, 5))
    masks[:, 0] = -100
    model = nn.Conv2d(2, 3, 1)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=fw.RealWorldCost(COSTS))
    result = trainer.fit([(images, masks)], [(images, masks)], epochs=1)
    with torch.no_grad():
        called = model(images).argmax(1)
    kept = masks >= 0
    expected = COSTS.matrix[masks[kept], called[kept]].mean().item()
    assert result.history[-1]["val/cost"] == pytest.approx(expected)


def test_pictures_and_table_of_the_best_evaluation(tmp_path):
    """Each new best evaluation logs both confusion matrices as PNG and a table of the savings."""
    x, y = data()
    trainer = trainer_of(fw.RealWorldCost(COSTS), fw.TensorBoard(tmp_path, show_link=False))
    trainer.fit([(x, y)], [(x, y)], epochs=3)
    events = EventAccumulator(str(tmp_path / "run" / "val"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"decisions/cost", "decisions/cost_optimal"}
    pictures = events.Images("decisions/cost")
    assert [event.step for event in pictures] == [1, 2, 3]  # the loss falls in each of the three epochs
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as picture:
        assert (picture.format, picture.size) == ("PNG", (pictures[-1].width, pictures[-1].height))
    table = events.Tensors("report/costs")[-1].tensor_proto.string_val[0].decode()
    constant = min((COSTS.matrix[y, j]).mean().item() for j in range(3))
    cost = trainer.state.history[-1]["val/cost"]
    assert f"| most probable class | {cost:.6g} | {1 - cost / constant:.1%} |" in table
    assert f"{constant:.6g}" in table


def test_it_is_refused_before_the_first_step():
    """A missing validation set, a metric of the same name and unsuitable costs raise a descriptive error."""
    x, y = data()
    with pytest.raises(ValueError, match="no val_loader"):
        trainer_of(fw.RealWorldCost(COSTS)).fit([(x, y)], epochs=1)
    with pytest.raises(ValueError, match="two metrics named 'cost'"):
        trainer_of(fw.RealWorldCost(COSTS), metrics={"cost": lambda o, t: 0.0}).fit([(x, y)], [(x, y)], epochs=1)
    with pytest.raises(ValueError, match="zero diagonal"):
        fw.RealWorldCost([[1, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"outputs of shape \(120, 3\) have 3 classes, the costs have 2"):
        trainer_of(fw.RealWorldCost([[0, 1], [1, 0]])).fit([(x, y)], [(x, y)], epochs=1)


def channels(picture):
    """Return the pixels of a picture as integers, shape (height, width, 3)."""
    with Image.open(io.BytesIO(picture.png)) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB"))).long()
    assert (pixels.shape[1], pixels.shape[0]) == (picture.width, picture.height)
    return pixels


@pytest.mark.parametrize("number", [2, 5, 6, 20, 21, 40])
def test_the_picture_is_blue_on_the_diagonal_and_orange_beside_it(number):
    """A cell with its whole row is blue on the diagonal and orange beside it, an empty one is white."""
    counts = torch.diag(torch.full((number,), 50.0))
    counts[0] = counts[0].roll(1)
    pixels = channels(confusion_image(counts, [f"a long name of class {i}" for i in range(number)]))
    assert pixels.shape[1] < 1400
    red, _, blue = pixels.unbind(2)
    assert bool((blue > red + 100).any())
    assert bool((red > blue + 150).any())
    assert bool((pixels == 255).all(2).any())


@pytest.mark.parametrize("number", [2, 10])
@pytest.mark.parametrize("costs", [False, True])
def test_mistakes_of_a_rare_class_are_as_dark_as_those_of_a_common_one(number, costs):
    """The colour is the share of the row: a class that is a thousand times as frequent looks the same."""
    counts = torch.diag(torch.full((number,), 6.0))
    counts[0, 1] = counts[1, 0] = 4
    counts[1] *= 1000
    prices = torch.ones(number, number).fill_diagonal_(0) * 7 if costs else None
    pixels = channels(confusion_image(counts, ["x"] * number, prices)).reshape(-1, 3)
    colours, areas = pixels.unique(dim=0, return_counts=True)
    shown = {
        tuple(c) for c, n in zip(colours.tolist(), areas.tolist(), strict=True) if n > 1500 and max(c) - min(c) > 40
    }
    assert len(shown) == (2 if number == 2 else 3)  # with ten classes there are whole rows, too


def test_the_picture_takes_empty_rows_large_numbers_and_weights():
    """Empty rows, millions and fractions are drawn, with and without costs."""
    counts = torch.tensor([[1234567.0, 2.5], [0, 0]])
    for costs in (None, torch.tensor([[0.0, 3], [1, 0]])):
        assert confusion_image(counts, ["a", "b"], costs, title="a title").png.startswith(b"\x89PNG")


def test_early_stopping_follows_the_cost():
    """Training stops when the cost does not fall, and the weights with the lowest cost are restored."""
    x, y = data()
    for name in ("val/cost", "val/cost_optimal"):
        # also where the callback that measures stands behind the one that monitors
        trainer = trainer_of(fw.EarlyStopping(name, patience=3), fw.RealWorldCost(COSTS), seed=0)
        trainer.optimizer.param_groups[0]["lr"] = 30.0
        result = trainer.fit([(x, y)], [(x, y)], epochs=100)
        costs = [entry[name] for entry in result.history]
        assert name in result.stop_reason
        assert costs.index(min(costs)) == result.best.epoch == len(costs) - 4
        assert trainer.validate([(x, y)])[name] == pytest.approx(min(costs))


def test_no_target_that_counts_has_no_cost():
    """If all validation targets are ignored or have weight 0, the cost is nan and nothing is drawn."""
    x, y = data()
    for val in ((x, torch.full_like(y, -100)), (x, y, torch.zeros(120))):
        callbacks = fw.RealWorldCost(COSTS), fw.EarlyStopping("train/loss", patience=9)
        result = trainer_of(*callbacks).fit([(x, y)], [val], epochs=2)
        assert all(math.isnan(entry["val/cost"]) for entry in result.history)
        assert len(result.history) == 2


def test_nothing_waits_for_the_device_before_the_end():
    """Both decisions accept batches of meta tensors, so no value is read before the end."""
    callback = fw.RealWorldCost(COSTS)
    state = trainer_of().state
    state.val_loader = [()]
    callback.on_fit_start(state)
    for shape, weight_shape in (((8, 3), (8,)), ((8, 3, 2, 2), (8,)), ((8, 3, 2, 2), (8, 2, 2))):
        outputs, targets = torch.empty(shape, device="meta"), torch.empty(8, *shape[2:], device="meta").long()
        for name in ("cost", "cost_optimal"):
            metric = state.validation.metrics[name]
            metric.reset()
            metric.update(outputs, targets)
            metric.update(outputs, targets, torch.empty(weight_shape, device="meta"))


def test_targets_are_checked_once_at_the_end():
    """An invalid target is reported at the end of the validation, unless its weight is 0."""
    callback = fw.RealWorldCost(COSTS)
    state = trainer_of().state
    state.val_loader = [()]
    callback.on_fit_start(state)
    metric = state.validation.metrics["cost"]
    outputs, targets = torch.eye(3).repeat(2, 1), torch.tensor([0, 0, 2, -1, 9, -100])
    metric.update(outputs, targets, torch.tensor([1.0, 2, 1, 0, 0, 1]))
    paid = COSTS.matrix[0, 1].item() * 2
    assert float(metric.compute()) == pytest.approx(paid / 4)
    metric.update(outputs, targets.float() / 2, torch.tensor([0.0, 0, 0, 3, 0, 0]))
    with pytest.raises(
        ValueError, match=r"targets with weight 3 of 7 are not class indices: allowed are 0\.\.2 and -100"
    ):
        metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match="got 5 targets for 6 decisions"):
        metric.update(outputs, targets[:5])


def of_two_classes(loss, n=400, column=False):
    """Return the trainer, the result, and the outputs and targets of the validation set."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator)
    y = (x[:, 0] + torch.randn(n, generator=generator) > 1.2).long()
    targets = y.float().unsqueeze(1) if column else y
    trainer = trainer_of(fw.RealWorldCost([[0, 1], [8, 0]]), outputs=1 if column else 2, loss=loss)
    result = trainer.fit([(x[:100], targets[:100])] * 20, [(x[100:], targets[100:])], epochs=3)
    with torch.no_grad():
        return trainer, result, trainer.model(x[100:]).double(), y[100:]


@pytest.mark.parametrize(
    ("loss", "column", "shift"),
    [
        (fw.CrossEntropy(), False, [0.0, 0.0]),
        (fw.CrossEntropy([1.0, 5.0]), False, [0.0, math.log(5)]),
        (fw.BinaryCrossEntropy(5.0), True, [math.log(5)]),
    ],
)
def test_calibrated_costs_are_those_of_calibrated_probabilities(loss, column, shift):
    """val/cost_calibrated is the cost of the least expected cost, by logits without class weights over a temperature."""
    trainer, result, z, y = of_two_classes(loss, column=column)
    costs = torch.tensor([[0.0, 1.0], [8.0, 0.0]], dtype=torch.float64)
    rows = Rows.of(z - torch.tensor(shift), y.double().unsqueeze(1) if column else y)
    scaled = (z - torch.tensor(shift)) * cross_fitted(rows, fit_temperature(rows))[:, None]
    p = torch.cat([(-scaled).sigmoid(), scaled.sigmoid()], 1) if column else scaled.softmax(1)
    decided = fw.cost_optimal_decision(p, costs)
    assert result.history[-1]["val/cost_calibrated"] == pytest.approx(float(costs[y, decided].mean()))
    calibrated = trainer.state.calibration.probabilities(z)
    assert calibrated.shape == z.shape
    assert fw.cost_optimal_decision(calibrated, costs).shape == y.shape


def test_the_tuned_threshold_never_sees_the_example_that_it_decides():
    """val/cost_tuned is that of thresholds found on the other folds by trying all; its error is that of the pairs."""
    _, result, z, y = of_two_classes(fw.CrossEntropy())
    score, fold, paid = z[:, 1] - z[:, 0], folds(len(y)), torch.zeros(len(y), dtype=torch.float64)

    def cost(chosen, threshold):
        positive = score[chosen] > threshold
        return torch.where(positive & (y[chosen] == 0), 1.0, torch.where(~positive & (y[chosen] == 1), 8.0, 0.0))

    for k in range(5):
        tried = [-math.inf, *score[fold != k].sort().values.tolist()]
        totals = [float(cost(fold != k, t).sum()) for t in tried]
        best = totals.index(min(totals))
        between = (tried[best] + tried[best + 1]) / 2 if 0 < best < len(tried) - 1 else tried[best]
        paid[fold == k] = cost(fold == k, between).double()
    entry = result.history[-1]
    assert entry["val/cost_tuned"] == pytest.approx(float(paid.mean()))
    assert 0 <= entry["val/cost_tuned_se"] < 0.2


def test_class_weights_and_a_cost_optimal_decision_are_warned_of_once(caplog):
    """With class weights the prior counts twice: one warning says what to use instead; without weights there is none."""
    of_two_classes(fw.CrossEntropy())
    assert not [r for r in caplog.records if "class frequencies twice" in r.getMessage()]
    of_two_classes(fw.CrossEntropy([1.0, 5.0]))
    (warning,) = [r.getMessage() for r in caplog.records if "class frequencies twice" in r.getMessage()]
    assert "val/cost_calibrated takes the weights off first" in warning


def test_calibrated_costs_can_be_left_out():
    """One option turns them off, and a loss that gives no logits has none."""
    x, y = data()
    for cost, loss in [
        (fw.RealWorldCost(COSTS, calibrated=False), None),
        (fw.RealWorldCost(COSTS), fw.RealWorldCrossEntropy(COSTS)),
    ]:
        result = trainer_of(cost, loss=loss).fit([(x, y)], [(x, y)], epochs=1)
        assert {"val/cost", "val/cost_optimal"} <= result.history[-1].keys()
        assert not [name for name in result.history[-1] if "calibrated" in name or "refined" in name]
