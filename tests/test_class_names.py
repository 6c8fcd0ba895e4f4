"""Names of classes: where they appear, and what is measured for each class."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAveragePrecision, MulticlassPrecision, MulticlassRecall

import fitwatch as fw
from fitwatch.measuring.per_class import per_class
from tests._events import points, read, texts

NAMES = ["oak", "ash", "elm"]


def data(classes=3, n=120, seed=0):
    """Return noisy inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    y = (x[:, :classes] + torch.randn(n, classes, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), 16)


def trainer_of(*callbacks, classes=NAMES, outputs=3, **options):
    """Return a trainer of a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(4, outputs)
    return fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), callbacks=callbacks, classes=classes, device="cpu", **options
    )


def theirs(logits, positive, decided, weights=None):
    """Return recall, precision and average precision of each column, threshold by threshold from their definitions."""
    found = {"recall": [], "precision": [], "average_precision": []}
    w = torch.ones(len(logits)).double() if weights is None else weights.double()
    scores = logits.double().softmax(1).float() if logits.shape[1] > 1 else logits  # float: equal rows tie
    for k in range(logits.shape[1]):
        y = positive[:, k].double() * w
        hits = float(y[decided[:, k].bool()].sum())
        found["recall"].append(hits / float(y.sum()))
        found["precision"].append(hits / float(w[decided[:, k].bool()].sum()))
        area = before = 0.0
        for threshold in sorted(set(scores[:, k].tolist()), reverse=True):
            chosen = scores[:, k] >= threshold
            recall = float(y[chosen].sum() / y.sum())
            area += (recall - before) * float(y[chosen].sum() / w[chosen].sum())
            before = recall
        found["average_precision"].append(area)
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["classes", "positions", "ignored", "float16", "one logit", "one column", "labels"])
def test_the_figures_of_each_class_are_those_of_the_definition(kind, weighted):
    """Recall, precision and average precision agree for all kinds of outputs, with ties, weights and ignored labels."""
    generator = torch.Generator().manual_seed(4)
    n = 300
    weights = torch.rand(n, generator=generator) if weighted else None
    loss = fw.BinaryCrossEntropy() if kind in ("one logit", "one column", "labels") else fw.CrossEntropy()
    z = torch.randn(n, 3, generator=generator)
    z[100:200] = z[:100]  # ties
    shown = weights
    if kind in ("one logit", "one column"):
        z = z[:, :1] + 0.25
        y = torch.randint(2, (n, 1), generator=generator).float()
        names = NAMES[:2]
        both, hot = torch.cat([-z, z], 1) / 2, torch.cat([1 - y, y], 1)
        expected = theirs(both, hot, both > 0, shown)
        outputs, targets = (z[:, 0], y[:, 0]) if kind == "one logit" else (z, y)
    elif kind == "labels":
        names, outputs, targets = NAMES, z, torch.randint(2, (n, 3), generator=generator).float()
        parts = [theirs(z[:, [k]], targets[:, [k]], z[:, [k]] > 0, shown) for k in range(3)]
        expected = {name: [part[name][0] for part in parts] for name in parts[0]}
    else:
        names, targets = NAMES, torch.randint(3, (n,), generator=generator)
        z = z.half().float() if kind == "float16" else z
        outputs = z.half() if kind == "float16" else z
        kept = torch.ones(n, dtype=torch.bool)
        if kind == "ignored":
            targets[::5] = -100
            kept = targets != -100
        shown = None if weights is None else weights[kept]
        hot = nn.functional.one_hot(targets[kept], 3)
        expected = theirs(z[kept], hot, nn.functional.one_hot(z[kept].argmax(1), 3), shown)
        if kind == "positions":
            outputs, targets = z.reshape(30, 10, 3).movedim(2, 1), targets.reshape(30, 10)
            weights = None if weights is None else weights.reshape(30, 10)
    metrics = per_class(loss, names, taken=())
    assert {name: metric(outputs, targets, weights) for name, metric in metrics.items()} == {
        name: pytest.approx(values, rel=1e-6) for name, values in expected.items()
    }


def test_a_class_without_examples_and_one_that_is_never_predicted():
    """Without examples recall and average precision are NaN; the precision of a class never predicted is 0."""
    z = torch.tensor([[2.0, 1, 0], [1, 2, 0], [3, 1, 0]])
    found = {name: metric(z, torch.tensor([0, 1, 1])) for name, metric in per_class(fw.Focal(), NAMES, ()).items()}
    assert found["recall"][:2] == [1.0, 0.5]
    assert math.isnan(found["recall"][2])
    assert math.isnan(found["average_precision"][2])
    assert found["precision"] == [0.5, 1.0, 0.0]


def test_names_are_in_the_history_and_can_be_monitored():
    """Every evaluation has the three figures of each class; early stopping and a second loader use the names too."""
    stop = fw.EarlyStopping("val/recall/elm", mode="max")
    other = data(seed=1)
    trainer = trainer_of(stop, outputs=3)
    result = trainer.fit(data(), {"near": data(), "far": other}, epochs=2)
    for entry in result.history:
        for kind in ("recall", "precision", "average_precision"):
            assert {f"val/{kind}/{name}" for name in NAMES} <= entry.keys()
            assert {f"val/far/{kind}/{name}" for name in NAMES} <= entry.keys()
    measured = trainer.validate(other)
    z, y = trainer.predict(other), other.dataset.tensors[1]
    for kind, metric in (
        ("recall", MulticlassRecall),
        ("precision", MulticlassPrecision),
        ("average_precision", MulticlassAveragePrecision),
    ):
        reference = metric(3, average=None)(z, y).tolist()
        assert [measured[f"val/{kind}/{name}"] for name in NAMES] == pytest.approx(reference)


def test_without_names_nothing_more_is_measured():
    """A fit without names measures what it did before; so does one with a loss of the user's."""
    plain = trainer_of(classes=None).fit(data(), data(), epochs=1)
    own = trainer_of(loss=nn.functional.cross_entropy).fit(data(), data(), epochs=1)
    assert {"epoch", "step", "train/loss", "val/loss", "val/loss_vs_baseline"} == plain.history[0].keys()
    assert not [name for name in own.history[0] if name.count("/") > 1]


def test_a_metric_of_the_user_keeps_its_name():
    """A metric called recall is the user's own; precision and average precision are added."""
    trainer = trainer_of(metrics={"recall": lambda z, y: (z.argmax(1) == y).double().mean()})
    entry = trainer.fit(data(), data(), epochs=1).history[0]
    assert "val/recall/oak" not in entry
    assert {"val/recall", "val/precision/oak", "val/average_precision/oak"} <= entry.keys()


def test_a_watch_takes_names_too():
    """A loop of one's own measures the same figures as the Trainer."""
    trained = trainer_of().fit(data(), data(), epochs=1).history
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer, train, val = torch.optim.SGD(model.parameters(), 0.1), data(), data()
    with fw.Watch(model, optimizer, train_loader=train, val_loader=val, classes=tuple(NAMES)) as watch:
        for _ in watch.epochs(1):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            with watch.validating():
                for x, y in val:
                    watch.loss(model(x), y)
    assert list(watch.state.history) == trained


@pytest.mark.parametrize(
    ("classes", "error", "match"),
    [
        ("oak", TypeError, "classes must be a list of names.*got 'oak'"),
        ([0, 1, 2], TypeError, "classes must be names, that is strings"),
        (["oak"], ValueError, "two or more names"),
        (["oak", "oak"], ValueError, "all different"),
        (["oak", " "], ValueError, "none empty"),
    ],
)
def test_wrong_names_are_refused_at_once(classes, error, match):
    """What can't name classes is refused when the Trainer is made."""
    with pytest.raises(error, match=match):
        trainer_of(classes=classes)


@pytest.mark.parametrize("validates", [False, True])
def test_another_number_of_classes_is_refused_before_step_1(validates):
    """Two names for three outputs are an error before the first step, with and without a validation."""
    trainer = trainer_of(classes=NAMES[:2])
    with pytest.raises(ValueError, match=r"classes has 2 names, oak, ash, but the model has 3 outputs"):
        trainer.fit(data(), data() if validates else None, epochs=1)
    assert trainer.state.progress.step == 0


def test_the_page_has_the_names(tmp_path):
    """Curves, the table of weights, the precision-recall curves and the end table have the names of the classes."""
    board = fw.TensorBoard(tmp_path, show_link=False)
    result = trainer_of(fw.WeightedLoss("balanced"), board).fit(data(), data(), epochs=2)
    run = tmp_path / "run"
    assert points(run / "val", "recall/ash") == [
        (entry["step"], pytest.approx(entry["val/recall/ash"])) for entry in result.history
    ]
    [(_, weights)] = texts(run / "train", "report/class_weights")
    assert [line.split(" | ")[0] for line in weights.splitlines()[2:]] == [f"| {name}" for name in NAMES]
    tags = read(run / "best").Tags()["tensors"]
    assert {f"pr_curve/{name}" for name in NAMES} <= set(tags)
    [(_, report)] = texts(run / "best", "report/end")
    best = result.best.metrics
    figures = " | ".join(f"{best[f'val/{kind}/elm']:.4g}" for kind in ("recall", "precision", "average_precision"))
    assert f"| elm | {figures} |" in report
    assert "| class, at the best epoch | recall | precision | average precision |" in report


def test_one_confusion_matrix_is_drawn(tmp_path):
    """With costs the matrix of the decisions is drawn once, with the costs; without them on the best evaluation."""
    for costs in ([], [fw.RealWorldCost(fw.CostMatrix(5, 1))]):
        board = fw.TensorBoard(tmp_path, show_link=False)
        trainer_of(*costs, board, classes=["no", "yes"], outputs=2).fit(data(2), data(2), epochs=2)
        plain = "report/confusion" in read(board.run_dir / "best").Tags()["images"]
        priced = "decisions/cost" in read(board.run_dir / "val").Tags()["images"]
        assert (plain, priced) == (not costs, bool(costs))
