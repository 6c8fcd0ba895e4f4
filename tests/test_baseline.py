"""The baseline of a loss equals the loss of the best constant prediction, found independently."""

import math

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from fitwatch.losses.baseline import Baseline, TargetSums
from fitwatch.measuring.expected_baseline import expected_baseline
from tests._losses import labels, logits

Y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
W = torch.tensor([1.0, 2, 7], dtype=torch.float64)
COSTS = fw.CostMatrix([1.0, 2, 5], [[0.0, 1, 0], [3, 0, 0], [0, 8, 0]])


def baseline_of(loss, output, target, sample_weight=None, *, cut=None):
    """Baseline from batches of targets; only the shape of the outputs is used."""
    sums = TargetSums(loss)
    given = [output, target] if sample_weight is None else [output, target, sample_weight]
    for batch in zip(*(part.split(cut or len(target)) for part in given), strict=True):
        sums.update(*batch)
    return sums.baseline()


def entropy(q):
    return -(q * q.log()).sum().item()


def best_on_a_grid(loss, y):
    """Least loss of a constant prediction of three classes, on a refined grid of probabilities."""
    centre, width, steps = torch.tensor([1 / 3, 1 / 3], dtype=torch.float64), 1 / 3, torch.linspace(-1, 1, 61)
    for _ in range(5):
        p = centre + width * torch.cartesian_prod(steps, steps).double()
        p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
        p = p[(p > 0).all(1)]
        total = weight = 0
        for c in range(3):
            losses, weights = loss.per_example(p.log(), torch.full((len(p),), c))
            total, weight = total + (y == c).sum() * losses * weights, weight + (y == c).sum() * weights
        best = (total / weight).argmin()
        centre, width = p[best, :2], width / 10
    return (total / weight)[best].item()


def test_without_weights_it_is_the_entropy_of_the_shares():
    """Plain cross-entropy has the entropy of the class shares and ln C, over any batches."""
    for cut in (100, 7):
        found = baseline_of(fw.CrossEntropy(), torch.zeros(100, 3), Y, cut=cut)
        assert found.constant == pytest.approx(entropy(SHARES), rel=1e-12)
        assert found.uniform == pytest.approx(math.log(3), rel=1e-12)
    nll = baseline_of(nn_loss := fw.losses.as_loss(nn.NLLLoss()), torch.zeros(100, 3), Y)
    assert type(nn_loss).__name__ == "NegativeLogLikelihood"
    assert nll.constant == pytest.approx(entropy(SHARES), rel=1e-12)


def test_with_weights_it_is_the_entropy_of_the_weighted_shares():
    """Class weights and weights of the examples make the shares; balanced weights make both baselines ln C."""
    q = W * SHARES / (W * SHARES).sum()
    found = baseline_of(fw.CrossEntropy(W), torch.zeros(100, 3), Y, cut=9)
    assert found.constant == pytest.approx(entropy(q), rel=1e-9)
    assert found.uniform == pytest.approx(math.log(3), rel=1e-12)
    same = baseline_of(fw.CrossEntropy(), torch.zeros(100, 3), Y, W[Y], cut=9)
    assert same.constant == pytest.approx(entropy(q), rel=1e-9)
    balanced = baseline_of(fw.CrossEntropy(fw.class_weights([50, 30, 20])), torch.zeros(100, 3), Y)
    assert balanced.constant == pytest.approx(math.log(3), rel=1e-9)
    assert baseline_of(fw.LogitAdjusted([50, 30, 20]), torch.zeros(100, 3), Y).constant == pytest.approx(
        entropy(SHARES), rel=1e-9
    )


@pytest.mark.parametrize(
    "loss",
    [
        fw.CrossEntropy(W, label_smoothing=0.2),
        fw.Focal(2.0),
        fw.Focal(1.0, weight=W),
        fw.LDAM([50, 30, 20], max_margin=1.0, scale=1.0, weight=W),
        fw.LogitAdjusted([5, 3, 9], tau=2.0, weight=W),
        fw.RealWorldCrossEntropy(COSTS),
        fw.ExpectedCost(COSTS),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_of_any_loss_it_is_the_best_constant(loss):
    """Weights, smoothing, margins and costs: the baseline is the best of a grid of probabilities, uniform that of zeros."""
    found = baseline_of(loss, torch.zeros(100, 3), Y, cut=33)
    best = best_on_a_grid(loss.double(), Y)
    assert found.constant <= best + 1e-9
    assert found.constant == pytest.approx(best, rel=2e-2 if isinstance(loss, fw.ExpectedCost) else 1e-4)
    zeros = loss(torch.zeros(100, 3, dtype=torch.float64), Y).item()
    assert found.uniform == pytest.approx(zeros, rel=1e-9)
    assert found.constant <= found.uniform


def test_expected_cost_has_the_cheapest_constant():
    """The baseline of the expected cost is the cost of always predicting the cheapest class."""
    found = baseline_of(fw.ExpectedCost(COSTS), torch.zeros(100, 3), Y)
    assert found.constant == pytest.approx(COSTS.cheapest_constant([50, 30, 20])[1])


def test_labels_have_a_constant_each():
    """Binary cross-entropy over K labels has the mean of the weighted entropies; masked labels do not count."""
    y = torch.stack([Y == 0, Y == 1, Y == 2], 1).double()
    known = torch.rand(100, 3) > 0.3
    pos_weight = torch.tensor([2.0, 1, 0.5], dtype=torch.float64)
    total = 0.0
    for k in range(3):
        n, p = (known[:, k] & (y[:, k] == 0)).sum(), (known[:, k] & (y[:, k] == 1)).sum() * pos_weight[k]
        q = torch.stack([n, p]) / (n + p)
        total += (n + p).item() * entropy(q)
    for target in (y, torch.where(known, y, torch.nan)):
        found = baseline_of(fw.BinaryCrossEntropy(pos_weight), torch.zeros(100, 3), target, known.double(), cut=11)
        assert found.constant == pytest.approx(total / known.sum().item(), rel=1e-9)
    plain = baseline_of(fw.BinaryCrossEntropy(), torch.zeros(100, 1), y[:, :1])
    assert plain.constant == pytest.approx(math.log(2), rel=1e-9)
    assert plain.uniform == pytest.approx(math.log(2), rel=1e-12)
    for loss in (fw.Focal(2.0), fw.RealWorldCrossEntropy(3.0, 1.0), fw.LogitAdjusted([1, 4])):
        one = baseline_of(loss, torch.zeros(100), (Y == 2).double())
        z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
        ones, zeros = torch.ones_like(z), torch.zeros_like(z)
        curve = 0.2 * loss.double().per_example(z, ones)[0] + 0.8 * loss.per_example(z, zeros)[0]
        assert one.constant == pytest.approx(curve.min().item(), rel=1e-5)


def test_probabilities_as_targets():
    """Rows of probabilities have the cross-entropy of their mean with itself, weighted by example."""
    rows, w = torch.rand(100, 3, dtype=torch.float64).softmax(1), torch.rand(100, dtype=torch.float64)
    q = (rows * w[:, None]).sum(0) / w.sum()
    found = baseline_of(fw.CrossEntropy(), torch.zeros(100, 3), rows, w, cut=8)
    assert found.constant == pytest.approx(entropy(q), rel=1e-9)


def test_positions_and_ignored_labels():
    """Pixels count one by one, with the weight of their image; ignored ones do not count."""
    y = labels((10, 4, 5), 3)
    y[0] = -100
    w = torch.rand(10, dtype=torch.float64)
    counts = torch.stack([((y == c).sum((1, 2)) * w).sum() for c in range(3)])
    found = baseline_of(fw.CrossEntropy(), torch.zeros(10, 3, 4, 5), y, w, cut=3)
    assert found.constant == pytest.approx(entropy(counts / counts.sum()), rel=1e-9)


@pytest.mark.parametrize("level", [0.0, 1e9])
def test_of_a_squared_error_it_is_the_weighted_variance(level):
    """The squared error has the weighted variance of the targets, of each column by itself, wherever they lie."""
    y = logits(100, 2).detach() + torch.tensor([level, -3.0])
    w = torch.rand(100, dtype=torch.float64)
    w[0] = 0
    mean = (y * w[:, None]).sum(0) / w.sum()
    expected = (w[:, None] * (y - mean) ** 2).sum() / (2 * w.sum())
    found = baseline_of(fw.MeanSquaredError(), torch.zeros(100, 2), y, w, cut=13)
    assert found.constant == pytest.approx(expected.item(), rel=1e-6 if level else 1e-12)
    assert math.isnan(found.uniform)
    known = torch.rand(100, 2) > 0.4
    holes = torch.where(known, y, torch.nan)
    by_column = [(y[known[:, k], k].var(correction=0) * known[:, k].sum()).item() for k in range(2)]
    found = baseline_of(fw.MeanSquaredError(), torch.zeros(100, 2), holes, known, cut=13)
    assert found.constant == pytest.approx(sum(by_column) / known.sum().item(), rel=1e-6 if level else 1e-12)


def test_absent_classes_and_a_single_one():
    """A class without examples has share 0; with a single class the loss has no share of the baseline."""
    found = baseline_of(fw.CrossEntropy(), torch.zeros(100, 5), Y)
    assert found.constant == pytest.approx(entropy(SHARES), rel=1e-9)
    assert found.uniform == pytest.approx(math.log(5))
    alone = baseline_of(fw.CrossEntropy(), torch.zeros(9, 3), torch.zeros(9, dtype=torch.int64))
    assert alone.constant == pytest.approx(0, abs=1e-9)
    assert math.isnan(alone.left(0.3))
    assert Baseline(constant=0.8, uniform=1.0).left(0.2) == pytest.approx(0.25)


def test_custom_losses_and_too_many_classes_have_no_baseline():
    """Functions, custom losses, 301 classes and empty targets have no baseline."""

    class Mine(fw.losses.Loss):
        def unreduced(self, output, target):
            return (output.argmax(1) != target).double(), 1.0

    assert baseline_of(F.cross_entropy, torch.zeros(100, 3), Y) is None
    assert baseline_of(Mine(), torch.zeros(100, 3), Y) is None
    assert baseline_of(fw.CrossEntropy(), torch.zeros(100, 301), Y) is None
    assert TargetSums(fw.CrossEntropy()).baseline() is None


def test_too_many_classes_are_given_up_at_once():
    """With 301 classes the targets are not read: meta tensors, which have no values, pass."""
    for target in (torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, 301, device="meta")):
        sums = TargetSums(fw.CrossEntropy())
        sums.update(torch.empty(8, 301, device="meta"), target)
        assert sums.baseline() is None


# -- in a fit ----------------------------------------------------------------------------------------------------------


def text(run, sub_run, tag):
    events = EventAccumulator(str(run / sub_run)).Reload()
    return events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_fit_shows_it_at_the_start_in_the_history_and_at_the_end(tmp_path, ignored):
    """The start report, every evaluation, the result, the end table and the dashed line have the weighted entropy."""
    x, y = torch.randn(100, 4), Y.clone()
    if ignored:
        y[:25] = -100
    val = TensorDataset(x, y)
    counts = torch.bincount(y[y >= 0]).double()
    model = nn.Linear(4, 3)
    board = fw.TensorBoard(tmp_path, show_link=False)
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.WeightedLoss(W), board], device="cpu"
    )
    result = trainer.fit(DataLoader(val, 10), DataLoader(val, 32), epochs=3)
    expected = entropy(W * counts / (W * counts).sum())
    assert result.baseline.constant == pytest.approx(expected, rel=1e-6)
    assert result.baseline.uniform == pytest.approx(math.log(3), rel=1e-6)
    for entry in result.history:
        assert entry["val/loss_vs_baseline"] == pytest.approx(entry["val/loss"] / expected, rel=1e-6)
    run = tmp_path / "run"
    for sub_run, tag in (("train", "report/start"), ("best", "report/end")):
        report = text(run, sub_run, tag)
        assert f"| val/loss of the best constant prediction | {expected:.6g} |" in report
        assert f"| val/loss of equal logits | {math.log(3):.6g} |" in report
    line = EventAccumulator(str(run / "baseline")).Reload().Scalars("loss")
    drawn = [e.value for e in line if math.isfinite(e.value)]
    assert drawn == [pytest.approx(expected, rel=1e-6)] * len(drawn)
    assert len(drawn) >= 3


def test_hidden_targets_are_known_after_the_first_validation(tmp_path):
    """If no data set exposes its targets, the end table has the baseline but the start report does not."""
    batches = list(zip(torch.randn(100, 4).split(30), torch.randn(100, 1).split(30), strict=True))
    model = nn.Linear(4, 1)
    board = fw.TensorBoard(tmp_path, show_link=False)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.01), nn.MSELoss(), callbacks=[board])
    result = trainer.fit(batches, batches, epochs=1)
    variance = torch.cat([y for _, y in batches]).double().var(correction=0).item()
    assert result.baseline.constant == pytest.approx(variance)
    assert "best constant" not in text(tmp_path / "run", "train", "report/start")
    end = text(tmp_path / "run", "best", "report/end")
    assert f"| val/loss of the best constant prediction | {variance:.6g} |" in end
    assert "equal logits" not in end


@pytest.mark.parametrize("own_step", [None, "shows no targets", "shows targets"])
def test_a_fit_without_a_baseline_never_speaks_of_one(tmp_path, own_step):
    """A torch loss without a baseline, or a validation_step with a custom loss, logs no share of the baseline."""

    class Own(fw.Trainer):
        def validation_step(self, batch):
            outputs = self.model(batch[0])
            if own_step == "shows targets":
                self.update_metrics(outputs, batch[1])
            return F.mse_loss(outputs, batch[1])

    batches = [(torch.randn(30, 4), torch.randn(30, 1))]
    model = nn.Linear(4, 1)
    board = fw.TensorBoard(tmp_path, show_link=False)
    loss = nn.MSELoss() if own_step else nn.SmoothL1Loss()
    trainer = (Own if own_step else fw.Trainer)(
        model, torch.optim.SGD(model.parameters(), 0.01), loss, callbacks=[board], device="cpu"
    )
    result = trainer.fit(batches, batches, epochs=3)
    assert result.baseline is None
    assert all(entry.keys() == {"epoch", "step", "train/loss", "val/loss"} for entry in result.history)
    assert not (tmp_path / "run" / "baseline").exists()
    assert "best constant" not in text(tmp_path / "run", "best", "report/end")


def test_the_schedule_has_the_baseline_of_the_full_weights():
    """With scheduled class weights the baseline is that of the validation loss from the first epoch on."""
    x = torch.randn(100, 4)
    model = nn.Linear(4, 3)
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.WeightedLoss(W, start_epoch=1)], device="cpu"
    )
    result = trainer.fit([(x, Y)], [(x, Y)], epochs=2)
    expected = entropy(W * SHARES / (W * SHARES).sum())
    assert result.baseline.constant == pytest.approx(expected, rel=1e-6)
    for entry in result.history:
        assert entry["val/loss_vs_baseline"] == pytest.approx(entry["val/loss"] / expected, rel=1e-6)


def test_wrong_labels_in_validation_are_named():
    """A label out of range in the validation set is explained as in training, not by a failed count."""
    x = torch.randn(4, 4)
    model = nn.Linear(4, 3)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    with pytest.raises(IndexError, match=r"label 3 at index 1 of the batch is out of range: allowed are 0\.\.2"):
        trainer.fit([(x, torch.tensor([0, 1, 2, 0]))], [(x, torch.tensor([0, 3, 2, 0]))], epochs=1)


# -- before and after the first validation -----------------------------------------------------------------------------


def fit(loss, dataset, outputs, *callbacks, epochs=1, collate_fn=None, **options):
    """Fit with the same training and validation data, and the baseline expected before it."""
    torch.manual_seed(0)
    model = nn.Linear(4, outputs)
    loader = DataLoader(dataset, 10, collate_fn=collate_fn)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, callbacks=callbacks, device="cpu")
    return trainer.fit(loader, loader, epochs=epochs, **options), expected_baseline(loss, loader, loader)


@pytest.mark.parametrize(
    "loss",
    [
        fw.RealWorldCrossEntropy(COSTS),
        fw.CrossEntropy(W.tolist()),
        fw.LogitAdjusted([50, 30, 20]),
        fw.LDAM([50, 30, 20], max_margin=1.0, scale=1.0),
        fw.ExpectedCost(COSTS),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_class_without_examples_is_one_of_the_loss(loss):
    """If the last class is absent, a loss that fixes C expects the baseline that the first validation measures."""
    result, expected = fit(loss, TensorDataset(torch.randn(40, 4), torch.arange(40) % 7 % 2), 3)
    assert expected.constant == pytest.approx(result.baseline.constant, rel=1e-9)
    assert expected.uniform == pytest.approx(result.baseline.uniform, rel=1e-9)
    assert expected.uniform == pytest.approx(baseline_of(loss, torch.zeros(40, 3), torch.arange(40) % 7 % 2).uniform)


def test_nothing_is_expected_where_it_can_only_be_guessed():
    """A single class, a label out of range, and a custom loss that fails on the guess give no expected baseline."""

    class Scaled(fw.CrossEntropy):
        def unreduced(self, output, target):
            return super().unreduced(output * torch.ones(3, dtype=output.dtype), target)

    x, y = torch.randn(40, 4), torch.arange(40) % 2
    for loss, target in ((fw.CrossEntropy(), y * 0), (Scaled(), y)):
        result, expected = fit(loss, TensorDataset(x, target), 3)
        assert expected is None
        assert result.baseline.uniform == pytest.approx(math.log(3))
    zero = fw.WeightedLoss("balanced", num_classes=3, absent="zero")
    assert fit(fw.CrossEntropy(), TensorDataset(x, y), 3, zero)[0].baseline.uniform == pytest.approx(math.log(3))
    with pytest.raises(IndexError, match=r"label 3 .* allowed are 0\.\.2"):
        fit(fw.CrossEntropy(W.tolist()), TensorDataset(x, y * 3), 3)


def test_nothing_is_expected_of_labels_that_a_collate_function_may_map():
    """With an own collate_fn the data set's labels are not the targets: the first validation finds the baseline."""

    def parity(examples):
        x, y = zip(*examples, strict=True)
        return torch.stack(x), torch.stack(y) % 2

    y = torch.arange(40) % 10 % 7
    for weights in ([1.0, 3], None):  # with and without a C that the labels contradict
        result, expected = fit(fw.CrossEntropy(weights), TensorDataset(torch.randn(40, 4), y), 2, collate_fn=parity)
        assert expected is None
        q = torch.bincount(y % 2) * torch.tensor(weights or [1.0, 1], dtype=torch.float64)
        assert result.baseline.constant == pytest.approx(entropy(q / q.sum()), rel=1e-6)


def test_a_resumed_fit_measures_it_again(tmp_path):
    """After a resume the baseline covers the five classes of the outputs, not just the three with labels."""
    data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)

    def run(name, epochs, **options):
        return fit(
            fw.CrossEntropy(label_smoothing=0.1), data, 5, fw.Checkpoint(tmp_path / name), epochs=epochs, **options
        )[0]

    whole = run("whole", 4)
    run("cut", 2)
    resumed = run("cut", 4, resume="auto")
    assert whole.baseline.uniform == pytest.approx(math.log(5))
    assert resumed.baseline == whole.baseline
    assert resumed.history == whole.history
