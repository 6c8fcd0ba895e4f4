"""The overfitting detector in a fit: its probe of the training set, what reaches the rule, and what it does."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

import fitwatch as fw

WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)


def network(seed=0, dropout=0.5):
    """A small network in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3)).double()


def examples(count=64, seed=1):
    """Features and random labels of three classes: whoever fits the labels overfits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


X, Y = examples()
VX, VY = examples(20, 2)


def make(*callbacks, loss=None, lr=0.05, dropout=0.5, kind=fw.Trainer, **options):
    """A trainer of a new network."""
    model = network(dropout=dropout)
    return kind(model, torch.optim.Adam(model.parameters(), lr), loss, callbacks=callbacks, device="cpu", **options)


def reference(model, x, y, weights=None):
    """The loss in eval mode, by torch's own function."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return F.cross_entropy(model(x), y, weights).item()


class Stream(IterableDataset):
    """The examples in order, with no index to ask for."""

    def __iter__(self):
        return zip(X, Y, strict=True)


class Batches:
    """A loader of one's own that can be iterated again."""

    def __iter__(self):
        return zip(X.split(8), Y.split(8), strict=True)


class Watch(fw.Callback):
    """Keeps weights, verdicts and logged values; stands before the detector and looks at what is there after it."""

    def __init__(self):
        self.weights, self.verdicts, self.logged, self.texts, self.bars = [], [], {}, [], []

    def on_validation_start(self, state):
        self.weights.append(copy.deepcopy(state.model))

    def on_log(self, state):
        for record in state.records:
            if isinstance(record.value, fw.records.Marker):
                self.bars.append(record)
            elif isinstance(record.value, str):
                self.texts.append(record)
            else:
                self.logged.setdefault(record.name, []).append(record.value)

    def on_epoch_end(self, state):
        self.verdicts.append(state.verdict)


def chosen(probe_of, wanted):
    """The indices that a probe has drawn: a permutation of the eligible ones by its own, constant seed."""
    order = torch.randperm(len(probe_of), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(probe_of)[order[:wanted]]


PART = list(range(0, 64, 2))
LOADERS = {
    "data set": (lambda: DataLoader(TensorDataset(X, Y), 16, shuffle=True), chosen(range(64), 20)),
    "subset": (lambda: DataLoader(TensorDataset(X, Y), 16, sampler=SubsetRandomSampler(PART)), chosen(PART, 20)),
    "list": (
        lambda: list(zip(X.split(8), Y.split(8), strict=True)),
        torch.cat([torch.arange(64).split(8)[i] for i in chosen(range(8), 2).tolist()]),
    ),
    "stream": (lambda: DataLoader(Stream(), 8), torch.arange(16)),
    "iterable": (Batches, torch.arange(16)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_probe_is_the_loss_of_fixed_training_examples_in_eval_mode(loader, weights):
    """At every epoch the probe equals torch's loss of the same training examples, without dropout, with the weights."""
    build, rows = LOADERS[loader]
    watch = Watch()
    trainer = make(watch, fw.OverfittingDetector(), loss=fw.CrossEntropy(weights))
    result = trainer.fit(build(), [(VX, VY)], epochs=4)
    expected = [reference(m, X[rows], Y[rows], weights) for m in watch.weights]
    actual = [entry["val/loss"] - verdict.gap for entry, verdict in zip(result.history, watch.verdicts, strict=True)]
    assert actual == pytest.approx(expected, rel=1e-12)
    assert watch.logged["val/overfit/train_loss"] == pytest.approx(expected, rel=1e-6)  # written as float32
    last = reference(watch.weights[-1], VX, VY, weights) - expected[-1]
    assert result.verdict.gap == pytest.approx(last, rel=1e-9)
    assert "like for like" not in result.verdict.evidence


@pytest.mark.parametrize(("options", "size"), [({}, 20), ({"probe_examples": 7}, 7), ({"probe_examples": 1000}, 64)])
def test_size_and_choice_of_the_probe(options, size):
    """As many as the validation set by default, else as many as asked for, as far as there are some; always the same."""
    rows = chosen(range(64), size)
    for seed in (0, 5):  # of the global generator, which the choice does not depend on
        watch = Watch()
        trainer, loader = make(watch, fw.OverfittingDetector(**options)), LOADERS["data set"][0]()
        torch.manual_seed(seed)
        trainer.fit(loader, [(VX, VY)], epochs=2)
        expected = [reference(m, X[rows], Y[rows]) for m in watch.weights]
        assert watch.logged["val/overfit/train_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_probe_is_no_larger_than_2000():
    """A validation set of 2,500 examples gets a probe of 2,000, since more would only cost time."""
    x, y = examples(2500, 3)
    watch = Watch()
    make(watch, fw.OverfittingDetector()).fit(DataLoader(TensorDataset(x, y), 500), [(x, y)], epochs=1)
    rows = chosen(range(2500), 2000)
    assert watch.logged["val/overfit/train_loss"] == pytest.approx([reference(watch.weights[0], x[rows], y[rows])])


def test_without_a_probe_the_verdict_says_so():
    """probe_examples=0 compares with the running loss, and says that the gap is not like for like."""
    watch = Watch()
    result = make(watch, fw.OverfittingDetector(probe_examples=0)).fit([(X, Y)], [(VX, VY)], epochs=3)
    assert "not like for like" in result.verdict.evidence
    assert "probe_examples is 0" in result.verdict.evidence
    assert result.verdict.gap == result.history[-1]["val/loss"] - result.history[-1]["train/loss"]


def test_a_batch_without_tensors_is_no_probe():
    """Where nobody can tell the size of a batch, the verdict says so in place of an error."""

    class Named:
        def __init__(self, x, y):
            self.x, self.y = x, y

    class Own(fw.Trainer):
        def training_step(self, batch):
            return self.compute_loss(self.model(batch.x), batch.y)

        validation_step = training_step

    for loader in ([Named(X, Y)], iter_again(Named(X, Y))):
        result = make(fw.OverfittingDetector(), kind=Own).fit(loader, [Named(VX, VY)], epochs=2)
        assert "can't count the examples in a Named" in result.verdict.evidence


def iter_again(batch):
    """A loader of one batch that is no list."""

    class Again:
        def __iter__(self):
            return iter([batch])

    return Again()


class Noisy(Dataset):
    """Examples with random augmentation, from torch's and numpy's global generators."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(4) + 0.1 * np.random.standard_normal(), Y[i]  # noqa: NPY002 - the global one


@pytest.mark.parametrize("every", [None, 3])
def test_training_is_the_same_with_and_without_the_detector(every):
    """Dropout, shuffling and random augmentation draw the same numbers: the weights are equal to the bit."""
    ends = []
    for callbacks in ((), (fw.OverfittingDetector(),)):
        trainer = make(*callbacks, seed=3)
        loader = DataLoader(Noisy(), 8, shuffle=True)
        result = trainer.fit(loader, DataLoader(TensorDataset(VX, VY), 5), epochs=4, validate_every=every)
        ends.append((*trainer.model.state_dict().values(), torch.tensor([e["val/loss"] for e in result.history])))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_metrics_are_measured_on_the_probe_and_those_of_validation_are_not_disturbed():
    """`train/<metric>` is the metric on the probe; an object still holds the validation set's figures after it."""

    class Errors:
        def reset(self):
            self.wrong, self.count = 0.0, 0

        def update(self, outputs, targets):
            self.wrong += (outputs.argmax(1) != targets).sum().item()
            self.count += len(targets)

        def compute(self):
            return self.wrong / self.count

    watch, errors = Watch(), Errors()
    metrics = {"accuracy": lambda o, t: (o.argmax(1) == t).double().mean(), "errors": errors}
    trainer = make(
        watch,
        fw.OverfittingDetector(),
        fw.RealWorldCost([[0, 1, 1], [2, 0, 2], [3, 3, 0]]),
        metrics=metrics,
    )
    result = trainer.fit(LOADERS["data set"][0](), [(VX, VY)], epochs=3)
    rows = chosen(range(64), 20)
    for i, model in enumerate(watch.weights):
        model.eval()
        on_probe = (model(X[rows]).argmax(1) == Y[rows]).double().mean().item()
        on_val = (model(VX).argmax(1) == VY).double().mean().item()
        assert watch.logged["train/accuracy"][i] == pytest.approx(on_probe, rel=1e-6)
        assert watch.logged["train/errors"][i] == pytest.approx(1 - on_probe, rel=1e-6)
        assert result.history[i]["val/accuracy"] == pytest.approx(on_val)
        costs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[VY] * (model(VX).argmax(1) != VY)
        assert result.history[i]["val/cost"] == pytest.approx(costs.mean().item())
    assert errors.count == len(VY)


MULTI = (VX[:, :3] > 0).double()


@pytest.mark.parametrize(
    ("loss", "batch", "known"),
    [
        (fw.CrossEntropy(), (VX, VY), True),
        (fw.CrossEntropy(WEIGHTS), (VX, VY), True),
        (fw.CrossEntropy(), (VX, VY, torch.linspace(0, 2, 20, dtype=torch.float64)), True),
        (fw.BinaryCrossEntropy(), (VX, MULTI), True),
        (F.cross_entropy, (VX, VY), False),
    ],
    ids=["plain", "class weights", "sample weights", "several labels", "function"],
)
def test_losses_of_examples_reach_the_rule(loss, batch, known):
    """The error of the rise is that of the pairs for every loss that has them, and that of the curve for a function."""
    watch = Watch()
    trainer = make(watch, fw.OverfittingDetector(), loss=loss)
    wrong = 1 - MULTI if isinstance(loss, fw.BinaryCrossEntropy) else (VY + 1) % 3  # so that validation gets worse
    verdict = trainer.fit([batch], [(batch[0], wrong, *batch[2:])], epochs=8).verdict
    assert (trainer.callbacks[1].rule.examples == 20) == known
    assert verdict.reference < 7
    assert math.isfinite(verdict.rise_se)
    if known:
        influence = []
        for model in (watch.weights[verdict.reference], watch.weights[-1]):
            with torch.no_grad():
                outputs = model.eval()(batch[0])
            if isinstance(loss, fw.BinaryCrossEntropy):
                losses = F.binary_cross_entropy_with_logits(outputs, wrong, reduction="none").mean(1)
                w = torch.ones(20)
            else:
                losses = F.cross_entropy(outputs, wrong, reduction="none")
                w = torch.ones(20, dtype=torch.float64) if loss.weight is None else loss.weight[wrong]
                w = w * batch[2] if len(batch) == 3 else w
            influence.append(w / w.sum() * (losses - (w * losses).sum() / w.sum()))
        plain = ((influence[1] - influence[0]).square().sum() * 20 / 19).sqrt().item()
        assert plain < verdict.rise_se < 2.5 * plain  # the corrections for long tails have tests of their own


def test_an_own_validation_step_with_its_own_loss_is_judged_by_means():
    """A step that computes the loss itself gives the means, and they are judged."""

    class Own(fw.Trainer):
        def validation_step(self, batch):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    trainer = make(fw.OverfittingDetector(), kind=Own, dropout=0.0)
    result = trainer.fit(LOADERS["data set"][0](), [(VX, VY)], epochs=40)
    assert trainer.callbacks[0].rule.examples == 0
    assert result.verdict.overfitting


@pytest.mark.parametrize("loader", LOADERS)
def test_validation_within_the_first_epoch(loader):
    """Validated after every step, the probe is there from the first one on, and indices are those of the history."""
    watch = Watch()
    result = make(watch, fw.OverfittingDetector(), dropout=0.0).fit(
        LOADERS[loader][0](), [(VX, VY)], epochs=30, validate_every=2
    )
    assert len(watch.logged["val/overfit/train_loss"]) == len(result.history)
    assert result.verdict.best == min(range(len(result.history)), key=lambda i: result.history[i]["val/loss"])
    assert "like for like" not in result.verdict.evidence


@pytest.mark.parametrize("action", ["warn", "stop", "restore"])
def test_actions(action):
    """Action "warn" goes on, "stop" ends training when it is detected, "restore" ends with the best weights."""
    watch = Watch()
    trainer = make(watch, fw.OverfittingDetector(action=action), dropout=0.0)
    result = trainer.fit(LOADERS["data set"][0](), [(VX, VY)], epochs=40)
    verdict = result.verdict
    assert verdict.overfitting
    assert len(result.history) == (40 if action == "warn" else verdict.detected + 1)
    assert (result.stop_reason is None) == (action == "warn")
    best = min(range(len(result.history)), key=lambda i: result.history[i]["val/loss"])
    kept = watch.weights[best if action == "restore" else -1]
    expected, actual = kept.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert best < len(result.history) - 1


def test_a_healthy_run_is_not_restored():
    """Action "restore" leaves the weights alone where nothing overfits."""
    watch = Watch()
    trainer = make(watch, fw.OverfittingDetector(action="restore"), lr=1e-4)
    assert not trainer.fit([(X, Y)], [(X, Y)], epochs=12).verdict.overfitting
    expected, actual = watch.weights[-1].state_dict(), trainer.model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_change_is_told_once_with_remedies_that_fit_the_run(caplog):
    """One warning, one bar at the onset, and one text with decay, dropout, parameters per example and best epoch."""
    watch = Watch()
    trainer = make(watch, fw.OverfittingDetector(), dropout=0.25)
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.0125
    with caplog.at_level(logging.WARNING, "fitwatch"):
        result = trainer.fit(LOADERS["data set"][0](), [(VX, VY)], epochs=40)
    verdict = result.verdict
    assert (verdict.status, verdict.overfitting) == ("overfitting", True)
    assert len([r for r in caplog.records if "verfitting since epoch " in r.message]) == 1
    onset = result.history[verdict.onset]
    (bar,) = watch.bars
    assert (bar.name, bar.step) == ("overfitting", onset["step"])
    assert (bar.value.low, bar.value.high) == (onset["train/loss"], onset["val/loss"])
    assert bar.value.decided == result.history[verdict.detected]["step"]
    (text,) = [t for t in watch.texts if t.name == "val/overfit/verdict"]
    assert text.step == result.history[verdict.detected]["step"]
    best = min(result.history[: verdict.detected + 1], key=lambda e: e["val/loss"])
    for words in (
        "verfitting since epoch ",
        "weight decay 0.0125, dropout 0.25",
        f"259 parameters, {259 / 64:.3g} for each training example",
        f"best at epoch {best['epoch'] + 1}, step {best['step']}, with a loss of {best['val/loss']:.4g}",
    ):
        assert words in text.value


def test_a_resumed_fit_gives_the_verdicts_of_a_whole_one(tmp_path):
    """Resumed in the middle, evidence, errors and all are those of an uninterrupted fit, and the best is restored."""
    ends = []
    for cut in (None, 5):
        watch = Watch()
        folder = tmp_path / str(cut)

        def fit(epochs, watch=watch, folder=folder, resume=None):
            torch.manual_seed(0)
            detector = fw.OverfittingDetector(action="restore")
            trainer = make(watch, detector, fw.Checkpoint(folder, keep=1), seed=1, dropout=0.1)
            loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=torch.Generator().manual_seed(4))
            return trainer, trainer.fit(loader, [(VX, VY)], epochs=epochs, resume=resume)

        if cut is not None:
            fit(cut)
        trainer, result = fit(40, resume=None if cut is None else "auto")
        assert result.verdict.overfitting
        assert result.verdict.detected > 5
        ends.append(([repr(v) for v in watch.verdicts], result.stop_reason, trainer.model.state_dict()))
    assert ends[0][:2] == ends[1][:2]
    assert all(torch.equal(ends[0][2][name], ends[1][2][name]) for name in ends[0][2])


def test_verdicts_do_not_depend_on_batches_or_the_scale_of_weights():
    """Validation batches of 1, 7 and 64, and class weights times a constant, give the same verdict and figures."""
    seen = []
    for size, scale in ((64, 1), (1, 1), (7, 1), (64, 1000.0)):
        watch = Watch()
        trainer = make(watch, fw.OverfittingDetector(), loss=fw.CrossEntropy(WEIGHTS * scale), dropout=0.0)
        val = DataLoader(TensorDataset(VX, VY), size)
        seen.append(trainer.fit(DataLoader(TensorDataset(X, Y), 16), val, epochs=30).verdict)
    for verdict in seen[1:]:
        for name in ("overfitting", "status", "onset", "detected", "best", "reference", "examples_needed"):
            assert getattr(seen[0], name) == getattr(verdict, name)
        for name in ("gap", "rise", "rise_se", "smoothed_rise", "threshold"):
            assert getattr(verdict, name) == pytest.approx(getattr(seen[0], name), rel=1e-6)
    assert seen[0].overfitting


def test_a_validation_set_that_changes_its_size_is_judged_by_means(caplog):
    """Another number of examples can't be paired: one warning for the fit, and no error."""
    sizes = iter([20, 20, 15, 20, 10, 20, 20, 20])

    class Changing:
        def __iter__(self):
            n = next(sizes)
            return iter([(VX[:n], VY[:n])])

    with caplog.at_level(logging.WARNING, "fitwatch"):
        result = make(fw.OverfittingDetector()).fit([(X, Y)], Changing(), epochs=8)
    assert len([r for r in caplog.records if "can't pair them" in r.message]) == 1
    assert len(result.history) == 8


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_standard_error_of_the_validation_loss(weights):
    """min_delta="1se" measures val/loss_se: sqrt(sum(a^2) N / (N - 1)) of the influences, with room for a long tail."""
    watch = Watch()
    stop = fw.EarlyStopping(min_delta="1se", patience=50)
    result = make(watch, stop, loss=fw.CrossEntropy(weights)).fit([(X, Y)], [(VX, VY)], epochs=4)
    for entry, model in zip(result.history, watch.weights, strict=True):
        with torch.no_grad():
            losses = F.cross_entropy(model.eval()(VX), VY, reduction="none").numpy()
        w = np.ones(20) if weights is None else weights[VY].numpy()
        a = w * (losses - np.average(losses, weights=w)) / w.sum()
        kurtosis = 20 * (a**4).sum() / (a**2).sum() ** 2
        nu = 2 * 20 / (kurtosis - 1)
        wider = (2 + (2**3 + 2) / 4 / nu + (5 * 2**5 + 16 * 2**3 + 6) / 96 / nu**2
                 + (3 * 2**7 + 19 * 2**5 + 17 * 2**3 - 30) / 384 / nu**3) / 2  # fmt: skip
        variance = (a**2).sum() * 20 / 19 + (a**2).max()
        assert entry["val/loss_se"] == pytest.approx(wider * math.sqrt(variance), rel=1e-9)


def test_a_loss_without_examples_has_no_standard_error():
    """min_delta="1se" with a function as the loss is an error before training, which lists what will be measured."""
    trainer = make(fw.EarlyStopping(min_delta="1se"), loss=F.cross_entropy)
    with pytest.raises(ValueError, match="standard errors monitors 'val/loss_se', which this fit will not measure"):
        trainer.fit([(X, Y)], [(VX, VY)], epochs=2)
    assert trainer.state.progress.step == 0


class CannotMeasure(fw.Callback):
    """Stands before the detector, and takes away what measures other batches."""

    def on_fit_start(self, state):
        state.validation.measure = None


def loop_of_ones_own(loader, *callbacks, through_watch):
    """Two epochs by hand; the watch, and the loss of all batches of the second in train mode."""
    model, losses = network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fw.Watch(model, optimizer, callbacks, train_loader=loader, val_loader=[(VX, VY)]) as watch:
        for _ in watch.epochs(2):
            losses.append([])
            for x, y in watch.train() if through_watch else loader:
                loss = watch.loss(model(x), y)
                losses[-1].append(loss.item() * len(y))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with watch.validating():
                watch.loss(model(VX), VY)
    return watch, sum(losses[-1]) / len(Y)


@pytest.mark.parametrize(
    ("loader", "through_watch", "before", "reason"),
    [
        ("iterable", False, (), "the loop does not take its batches from watch.train()"),
        ("stream", False, (), "the loop does not take its batches from watch.train()"),
        ("iterable", True, (CannotMeasure(),), "this loop can't measure other batches"),
        ("data set", True, (CannotMeasure(),), "this loop can't measure other batches"),
    ],
)
def test_a_hand_written_loop_that_gives_no_examples_has_no_probe(loader, through_watch, before, reason):
    """Where a loop can't give training examples or measure them, the running loss is compared, and the verdict says why."""
    watch, running = loop_of_ones_own(
        LOADERS[loader][0](), *before, fw.OverfittingDetector(), through_watch=through_watch
    )
    newest, verdict = watch.result.history[-1], watch.result.verdict
    assert f"not like for like: the training loss is the running one, since {reason}." in verdict.evidence
    assert verdict.gap == newest["val/loss"] - newest["train/loss"]
    assert newest["train/loss"] == pytest.approx(running, rel=1e-12)


@pytest.mark.parametrize(
    ("loader", "through_watch"),
    [*((name, True) for name in LOADERS), ("data set", False), ("subset", False), ("list", False)],
)
def test_a_hand_written_loop_has_the_probe_of_the_trainer(loader, through_watch):
    """Over watch.train(), or over a loader that can be asked for examples, a loop has the same fixed examples."""
    build, rows = LOADERS[loader]
    seen = Watch()
    watch, _ = loop_of_ones_own(build(), seen, fw.OverfittingDetector(), through_watch=through_watch)
    expected = [reference(m, X[rows], Y[rows]) for m in seen.weights]
    actual = [e["val/loss"] - v.gap for e, v in zip(watch.result.history, seen.verdicts, strict=True)]
    assert actual == pytest.approx(expected, rel=1e-12)
    assert "like for like" not in watch.result.verdict.evidence


def test_the_detector_needs_a_validation_set():
    """Without a val_loader there is nothing to compare: an error before the first step."""
    with pytest.raises(ValueError, match="compares training and validation loss: it needs a val_loader"):
        make(fw.OverfittingDetector()).fit([(X, Y)], epochs=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"action": "halt"}, ValueError, "action must be one of 'warn', 'stop', 'restore', got 'halt'"),
        ({"probe_examples": -1}, ValueError, "probe_examples must be 0 or more"),
        ({"probe_examples": 2.0}, TypeError, "probe_examples must be an integer"),
        ({"rule": 3}, TypeError, "rule must be of type OverfittingRule"),
    ],
)
def test_options_are_checked(options, error, message):
    """Each wrong option is refused when the detector is built."""
    with pytest.raises(error, match=message):
        fw.OverfittingDetector(**options)


def test_a_second_fit_is_judged_anew_on_request():
    """With reset=True the rule of a second fit has its options and none of the first one's evaluations."""
    detector = fw.OverfittingDetector(rule=fw.rules.OverfittingRule(hold=3))
    trainer = make(detector, dropout=0.0)
    assert trainer.fit(LOADERS["data set"][0](), [(VX, VY)], epochs=40).verdict.overfitting
    again = trainer.fit(LOADERS["data set"][0](), [(VX, VY)], epochs=2, reset=True)
    assert (again.verdict.status, detector.rule.hold) == ("warming up", 3)


def test_the_rule_that_was_given_is_the_one_that_judges():
    """The user's object has what the fit showed it, whatever it saw before; its state is that of a rule never used."""
    states = []
    for before in (0, 12):
        rule = fw.rules.OverfittingRule(hold=3)
        for i in range(before):
            rule.update(1.0, 1.0 + i, losses=[1.0, 2.0 + i])
        detector = fw.OverfittingDetector(rule=rule)
        make(detector).fit([(X, Y)], [(VX, VY)], epochs=3)
        assert detector.rule is rule
        assert rule.examples == 20
        states.append(repr(rule.state_dict()))
    assert states[0] == states[1]


def test_a_batch_sampler_of_ones_own_over_a_part_of_the_set():
    """The probe is drawn from the part that the sampler within a batch sampler has."""
    sampler = torch.utils.data.BatchSampler(SubsetRandomSampler(PART), 8, drop_last=False)
    watch = Watch()
    make(watch, fw.OverfittingDetector()).fit(
        DataLoader(TensorDataset(X, Y), batch_sampler=sampler), [(VX, VY)], epochs=1
    )
    rows = chosen(PART, 20)
    assert watch.logged["val/overfit/train_loss"] == pytest.approx([reference(watch.weights[0], X[rows], Y[rows])])


def test_a_nan_in_the_middle_of_overfitting_draws_no_second_bar():
    """A validation loss that is NaN once changes the status to diverging and back, and the onset keeps its one bar."""

    class Made(fw.Trainer):
        def validation_step(self, batch):
            epoch = self.state.progress.epoch
            return torch.tensor(math.nan if epoch == 18 else 1 - 0.1 * epoch if epoch < 5 else 0.5 + 0.05 * epoch)

    watch = Watch()
    make(watch, fw.OverfittingDetector(probe_examples=0), kind=Made).fit([(X, Y)], [(VX, VY)], epochs=22)
    statuses = [verdict.status for verdict in watch.verdicts]
    assert statuses[17:20] == ["overfitting", "diverging", "overfitting"]
    assert [bar.name for bar in watch.bars] == ["overfitting"]


def resumable(folder, *callbacks):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    losses = [1.0, 0.9, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]

    class Planned(fw.Trainer):
        def validation_step(self, batch):
            return torch.tensor(losses[len(self.state.history)])

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Planned(model, optimizer, callbacks=[*callbacks, fw.Checkpoint(folder)], device="cpu")


def test_weights_that_were_not_kept_can_not_be_restored_after_a_resume(tmp_path):
    """A training that began with action="warn" is not resumed with "restore": its best weights are gone."""
    loader = [(torch.randn(20, 4), torch.arange(20) % 2)]
    resumable(tmp_path, fw.OverfittingDetector()).fit(loader, loader, epochs=4)
    with pytest.raises(ValueError, match=r'can\'t resume with action="restore".*lacks the best weights'):
        resumable(tmp_path, fw.OverfittingDetector(action="restore")).fit(loader, loader, epochs=9, resume="auto")


def test_a_detector_that_is_new_at_a_resume_counts_as_the_history_does(tmp_path):
    """Its onset and its best are indices of the fit's history, though it saw the later part only."""
    loader = [(torch.randn(20, 4), torch.arange(20) % 2)]
    resumable(tmp_path).fit(loader, loader, epochs=2)
    result = resumable(tmp_path, fw.OverfittingDetector(probe_examples=0)).fit(loader, loader, epochs=14, resume="auto")
    assert result.verdict.best == result.best.epoch == 2
    assert len(result.history) == 14
    assert result.verdict.detected is None or result.verdict.detected < 14
    assert result.verdict.reference >= 2


def test_the_probe_is_no_larger_than_a_validation_that_shows_no_examples():
    """With a validation_step that feeds no metrics, the size of the data set of the val_loader limits the probe."""
    seen = []

    class Own(fw.Trainer):
        def validation_step(self, batch):
            seen.append(len(batch[1]))
            return self.compute_loss(self.model(batch[0]), batch[1])

    model = nn.Linear(4, 2)
    train, val = (DataLoader(TensorDataset(torch.randn(n, 4), torch.arange(n) % 2), batch_size=8) for n in (200, 24))
    trainer = Own(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=fw.OverfittingDetector(), device="cpu")
    trainer.sanity_steps = 0  # a trial would be seen too
    trainer.fit(train, val, epochs=1)
    assert sum(seen) == 2 * 24


@pytest.mark.parametrize(("epochs", "every", "warns"), [(5, None, True), (9, None, False), (5, 3, False)])
def test_a_fit_with_too_few_validations_says_so_at_its_start(epochs, every, warns, caplog):
    """Five validations are too few for a verdict, which is said before the first step; nine, or more by steps, are not."""
    seen = []

    class First(fw.Callback):
        def on_batch_end(self, state):
            seen.append([r.message for r in caplog.records if "evaluations are planned" in r.message])

    with caplog.at_level(logging.WARNING, "fitwatch"):
        make(fw.OverfittingDetector(), First()).fit(
            DataLoader(TensorDataset(X, Y), 8), [(VX, VY)], epochs=epochs, validate_every=every
        )
    assert [len(messages) for messages in (seen[0], seen[-1])] == [warns, warns]
    if warns:
        assert "5 evaluations are planned, but OverfittingDetector needs 9" in seen[0][0]
        assert "validate_every=STEPS" in seen[0][0]


@pytest.mark.parametrize("lr", [0.0, 0.05])
def test_the_report_says_that_the_baseline_is_not_beaten(lr):
    """Unless a validation loss is below that of the best constant prediction, the report has both figures."""
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[:, :3].argmax(1)
    trainer = make(fw.OverfittingDetector(), lr=lr, dropout=0.0)
    result = trainer.fit(DataLoader(TensorDataset(x[:64], y[:64]), 8), [(x[64:], y[64:])], epochs=10)
    lowest = min(entry["val/loss"] for entry in result.history)
    said = trainer.state.report.get("baseline", "")
    if lr:
        assert said == ""
    else:
        assert said.startswith(f"not beaten: the lowest val/loss is {lowest:.4g}, that of the best constant prediction")
