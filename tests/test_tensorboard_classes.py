"""The confusion matrix and the precision-recall curves of the best epoch."""

import io

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from fitwatch.tensorboard.classifier import STEPS, ClassCounts, curve
from fitwatch.tensorboard.diagram import reliability_image
from tests._events import read
from tests._server import noisy_data, overfitting_trainer


def reference(probabilities, positive, weights):
    """Compute the six rows of a curve from the definition, in float64."""
    rows = []
    for i in range(STEPS + 1):
        yes = probabilities.double() >= i / STEPS
        tp, fp = (weights * positive)[yes].sum(), (weights * (1 - positive))[yes].sum()
        fn, tn = (weights * positive)[~yes].sum(), (weights * (1 - positive))[~yes].sum()
        precision = tp / (tp + fp) if tp + fp else torch.tensor(0.0)
        recall = tp / (tp + fn) if tp + fn else torch.tensor(0.0)
        rows.append([float(v) for v in (tp, fp, tn, fn, precision, recall)])
    return torch.tensor(rows, dtype=torch.float64).T


def count(loss, outputs, targets, weights=None):
    """Count ragged batches and return the counts."""
    state = fw.State(model=nn.Linear(1, 1), optimizer=None, loss=loss)
    counts = ClassCounts(state)
    for part in torch.arange(len(outputs)).split(7):
        counts.update(outputs[part], targets[part], None if weights is None else weights[part])
    return counts.counts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["two logits", "one logit", "one column", "five classes", "three labels"])
def test_the_counts_are_those_of_the_definition(kind, weighted):
    """Matrix and curves equal their definitions, also with weights, ignored targets and probabilities on a threshold."""
    generator = torch.Generator().manual_seed(2)
    n = 200
    weights = torch.rand(n, generator=generator).double() if weighted else torch.ones(n, dtype=torch.float64)
    columns = {"two logits": 2, "five classes": 5, "three labels": 3}.get(kind, 1)
    logits = 2 * torch.randn(n, columns, generator=generator)
    logits[:20] = 0.0  # a probability that is a threshold
    if kind in ("two logits", "five classes"):
        targets = torch.randint(columns, (n,), generator=generator)
        targets[::9] = -100
        counts = count(fw.Focal(), logits, targets, weights if weighted else None)
        kept = targets != -100
        probabilities, weights = logits[kept].softmax(1), weights[kept]
        positive = nn.functional.one_hot(targets[kept], columns).double()
        expected = fw.losses.confusion_matrix(logits[kept].argmax(1), targets[kept], columns, sample_weight=weights)
        if columns == 2:
            probabilities, positive = probabilities[:, 1:], positive[:, 1:]
    else:
        targets = torch.randint(2, (n, columns), generator=generator).float()
        positive, probabilities = targets.double(), logits.sigmoid()
        if kind == "one logit":
            logits, targets = logits[:, 0], targets[:, 0]
        counts = count(fw.BinaryCrossEntropy(), logits, targets, weights if weighted else None)
        predicted, true = (logits.reshape(-1) > 0).long(), targets.reshape(-1).long()
        if columns == 1:
            expected = fw.losses.confusion_matrix(predicted, true, 2, sample_weight=weights)
    if kind == "three labels":
        assert counts.matrix is None
    else:
        torch.testing.assert_close(counts.matrix, expected, check_dtype=False)
    assert len(counts.scores) == positive.shape[1]
    for k, scores in enumerate(counts.scores):
        expected = reference(probabilities[:, k], positive[:, k], weights)
        torch.testing.assert_close(torch.tensor(curve(scores), dtype=torch.float64), expected)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (fw.MeanSquaredError(), torch.randn(9), torch.randn(9)),
        (lambda output, target: output.mean(), torch.randn(9, 2), torch.zeros(9).long()),
        (fw.CrossEntropy(), torch.randn(9, 3), torch.rand(9, 3)),
        (fw.CrossEntropy(), torch.randn(9, 3, 4), torch.zeros(9, 4).long()),
        (fw.CrossEntropy(), {"logits": 1}, torch.zeros(9)),
        (fw.CrossEntropy(), torch.randn(9, 101), torch.zeros(9).long()),
    ],
    ids=["regression", "own loss", "soft labels", "a class for each position", "a dict", "101 classes"],
)
def test_what_is_no_small_classifier_is_not_counted(loss, outputs, targets):
    """Outputs other than logits of at most 100 classes are not counted, without an error."""
    counts = ClassCounts(fw.State(model=nn.Linear(1, 1), optimizer=None, loss=loss))
    counts.update(outputs, targets)
    assert counts.counts is None


def test_eleven_classes_have_a_matrix_and_no_curves():
    """Eleven classes are too many for readable curves."""
    counts = count(fw.CrossEntropy(), torch.eye(11).repeat(3, 1), torch.arange(11).repeat(3))
    assert counts.scores is None
    assert counts.matrix.tolist() == (3 * torch.eye(11)).tolist()


def shown(run):
    """Return the tags of images and precision-recall curves in the sub-run best."""
    tags = read(run / "best").Tags()
    return sorted([*tags["images"], *(tag for tag in tags["tensors"] if tag.startswith("pr_curve"))])


def test_the_page_shows_the_best_epoch(tmp_path):
    """The curve on the page is that of the restored best model, at the step of the best epoch."""
    trainer = overfitting_trainer(tmp_path)
    train, val = noisy_data()
    result = trainer.fit(train, val, epochs=60)
    assert result.stop_reason
    pictures = ["report/confusion", "report/confusion_calibrated", "report/reliability"]
    assert shown(tmp_path / "run") == ["pr_curve/1", *pictures]
    [event] = read(tmp_path / "run/best").Tensors("pr_curve/1")
    assert event.step == result.best.step
    x, y = val.dataset.tensors
    with torch.no_grad():
        probabilities = trainer.model.eval()(x).softmax(1)[:, 1]
    expected = reference(probabilities, y.double(), torch.ones(len(y)))
    torch.testing.assert_close(torch.tensor(make_ndarray(event.tensor_proto)), expected.float())
    [image] = read(tmp_path / "run/best").Images("report/confusion")
    assert image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("later", [0, 3])
def test_the_best_epoch_before_a_resumption_is_shown(tmp_path, later):
    """Resumed right after its best epoch or later, a run still shows the curve of that epoch."""

    def make():
        return overfitting_trainer(tmp_path, patience=30, callbacks=[fw.Checkpoint(tmp_path / "saved", keep=99)])

    whole = make().fit(*noisy_data(), epochs=16)
    [before] = read(tmp_path / "run/best").Tensors("pr_curve/1")
    done = whole.best.epoch + 1 + later
    resumed = make().fit(*noisy_data(), epochs=16, resume=tmp_path / f"saved/epoch-{done}.pt")
    assert resumed.best.epoch == whole.best.epoch < 13
    [after] = read(tmp_path / "run/best").Tensors("pr_curve/1")
    assert (after.step, after.tensor_proto) == (before.step, before.tensor_proto)


def test_other_models_show_neither(tmp_path):
    """A regression has neither a confusion matrix nor precision-recall curves."""
    model = nn.Linear(3, 1)
    x = torch.randn(20, 3)
    loader = DataLoader(TensorDataset(x, x[:, :1]), 6)
    page = fw.TensorBoard(tmp_path, show_link=False)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), fw.MeanSquaredError(), callbacks=[page])
    trainer.fit(loader, loader, epochs=2)
    assert shown(tmp_path / "run") == []


def calibrated_run(folder, *callbacks, epochs=25):
    """Train a network that becomes overconfident, and return the trainer and the accumulators of val and best."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] * x[:, 2] + torch.randn(500, generator=generator) > 0.7).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    board = fw.TensorBoard(folder, show_link=False)
    trainer = fw.Trainer(model, torch.optim.Adam(model.parameters(), 0.01), callbacks=[*callbacks, board], device="cpu")
    trainer.fit([(x[:100], y[:100])] * 4, [(x[100:], y[100:])], epochs=epochs)
    size = {"images": 0, "tensors": 0, "scalars": 0}
    return trainer, *(EventAccumulator(str(board.run_dir / run), size).Reload() for run in ("val", "best"))


def test_the_refined_loss_is_on_the_loss_chart_where_it_differs(tmp_path):
    """The curve has a point at those evaluations where it differs from the log-loss by two standard errors."""
    trainer, val, _ = calibrated_run(tmp_path, fw.OverfittingDetector())
    wanted = {
        entry["step"]: entry["val/refined_loss"]
        for entry in trainer.state.history
        if abs(entry["val/refined_loss"] - entry["val/log_loss"]) > 2 * entry["val/refined_loss_se"]
    }
    assert 0 < len(wanted) < 25
    assert {point.step: point.value for point in val.Scalars("refined_loss")} == pytest.approx(wanted)


def test_the_best_evaluation_has_a_reliability_diagram(tmp_path):
    """It is one image with both diagrams; with class weights there are the calibrated decisions too, and both figures."""
    for weights in ([], [fw.WeightedLoss("balanced")]):
        trainer, _, best = calibrated_run(
            tmp_path, *weights, fw.OverfittingDetector(), fw.RealWorldCost([[0, 1], [5, 0]]), epochs=5
        )
        images = set(best.Tags()["images"])
        assert "report/reliability" in images
        assert ("report/confusion_calibrated" in images) is bool(weights)
        with Image.open(io.BytesIO(best.Images("report/reliability")[0].encoded_image_string)) as picture:
            assert picture.format == "PNG"
            assert picture.width > 2 * 260
        report = best.Tensors("report/end")[0].tensor_proto.string_val[0].decode()
        entry = trainer.state.history.best
        assert f"| log-loss | {entry['val/log_loss']:.6g} |" in report
        assert f"| calibrated log-loss | {entry['val/refined_loss']:.6g} (" in report
        assert f"| calibrated cost | {entry['val/cost_calibrated']:.6g} |" in report


def test_the_diagram_shows_how_far_truth_is_from_confidence():
    """A calibrated table has no orange; one whose predictions come true half as often as they say is half orange."""
    weight = torch.ones(15, dtype=torch.float64)
    confidence = (torch.arange(15) + 0.5) / 15
    good, bad = torch.stack([weight, confidence, confidence]), torch.stack([weight, confidence, confidence / 2])
    orange = []
    for tables in (torch.stack([good, good]), torch.stack([bad, good])):
        with Image.open(io.BytesIO(reliability_image(tables).png)) as picture:
            colours = {colour: n for n, colour in picture.convert("RGB").getcolors(1 << 24)}
        orange.append(colours.get((244, 180, 148), 0))
    assert orange[0] < orange[1] / 10


def test_a_test_is_on_the_page_and_in_the_result(tmp_path):
    """What trainer.test measures is written at the step of the restored weights, in the end report and in the result."""
    trainer = overfitting_trainer(tmp_path, patience=3)
    train, val = noisy_data()
    result = trainer.fit(train, val, epochs=30)
    assert result.test == {}
    before = str(result)
    test = noisy_data(seed=9)[1]
    values = trainer.test(test)
    assert result.test == values
    assert str(result).splitlines()[:-1] == before.splitlines()
    assert f"test/accuracy {values['test/accuracy']:.4g}" in str(result).splitlines()[-1]
    best = read(tmp_path / "run/best")
    for name, value in values.items():
        [point] = best.Scalars(name)
        assert (point.step, point.value) == (result.best.step, pytest.approx(value))
    report = best.Tensors("report/end")[-1].tensor_proto.string_val[0].decode()
    assert f"| test/accuracy | {values['test/accuracy']:.6g} |" in report
    assert best.Scalars("report/seconds")  # of the fit
    trainer.fit(train, val, epochs=1)
    assert trainer.state.test == {}


def test_a_test_that_cannot_be_written_is_still_returned(tmp_path, caplog):
    """If the run's folder is gone, an error says so, and the values are returned; without a fit nothing is written."""
    trainer = overfitting_trainer(tmp_path)
    train, val = noisy_data()
    assert trainer.test(val)["test/loss"] > 0
    assert list(tmp_path.iterdir()) == []
    trainer.fit(train, val, epochs=1)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert trainer.test(val)["test/loss"] > 0
    assert "TensorBoard can't write the test to" in caplog.text
    assert not (tmp_path / "run").exists()
