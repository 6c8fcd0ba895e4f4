"""Class weights from the training data."""

import math
import statistics
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fitwatch as fw
from fitwatch.losses.imbalanced import LDAM, ExpectedCost, Focal, LogitAdjusted
from fitwatch.losses.weighting import SCHEMES


def fit(model, loader, spec="balanced", loss=None, **options):
    """Train one epoch at learning rate 0 and return the current loss."""
    callback = fw.WeightedLoss(spec, **options)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.0), loss, callbacks=[callback], device="cpu")
    result = trainer.fit(loader, loader, epochs=1)
    return trainer.state.loss, result


class Images(Dataset):
    """Exposes its targets and raises if an example is read."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        raise AssertionError("an example was read")


class Hidden(Dataset):
    """Exposes no targets."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


class Stream(IterableDataset):
    """Has no length and no index."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def weighed(loss, loader, spec="balanced", **options):
    """Return the loss with the weights set by the callback."""
    model = nn.Linear(1, 1)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters()), loss=loss, train_loader=loader)
    fw.WeightedLoss(spec, **options).on_fit_start(state)
    return state.loss


def formula(scheme, counts):
    """Compute the published weights in a loop."""
    total, size = sum(counts), len(counts)
    of = {
        "balanced": lambda n: total / (size * n),
        "inverse": lambda n: total / n,
        "sqrt_inverse": lambda n: math.sqrt(total / n),
        "median_frequency": lambda n: statistics.median(counts) / n,
        "effective_number": lambda n: (1 - 0.999) / (1 - 0.999**n),
    }[scheme]
    return [of(n) for n in counts]


def as_loaders(x, y):
    """Return the same examples in every form that can be counted."""
    data = TensorDataset(x, y)
    return {
        "loader": DataLoader(data, 16, shuffle=True),
        "batches": list(DataLoader(data, 16)),
        "subset": DataLoader(Subset(TensorDataset(torch.cat([x, x]), torch.cat([y, y])), range(len(y))), 16),
        "parts": DataLoader(ConcatDataset([TensorDataset(x[:9], y[:9]), TensorDataset(x[9:], y[9:])]), 16),
        "hidden": DataLoader(Hidden(data), 16),
        "stream": DataLoader(Stream(Hidden(data)), 16),
    }


EXPECTED = torch.tensor([64 / (3 * 40), 64 / (3 * 16), 64 / (3 * 8)])


@pytest.mark.parametrize("kind", ["tensors", "subset", "list of batches", "hidden"])
def test_balanced_weights_are_counted_from_any_loader(model, data, kind):
    """Counts 40, 16, 8 give weights N / (K n_c), whether the data set exposes them or not."""
    loaders = {
        "tensors": DataLoader(data, 16),
        "subset": DataLoader(Subset(data, list(range(40)) + list(range(40, 64))), 16),
        "list of batches": list(DataLoader(data, 16)),
        "hidden": DataLoader(Hidden(data), 16),
    }
    loss, _ = fit(model, loaders[kind])
    assert torch.allclose(EXPECTED, loss.weight)


def test_exposed_targets_are_not_read_one_by_one(model):
    """A data set that exposes targets is counted without reading an example."""
    callback = fw.WeightedLoss("balanced")
    state = fw.State(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        loss=fw.CrossEntropy(),
        train_loader=DataLoader(Images([0] * 40 + [1] * 16 + [2] * 8), 16),
    )
    callback.on_fit_start(state)
    assert torch.allclose(EXPECTED, state.loss.weight)


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_counting_pass_leaves_the_random_generators_alone(model, data, generator):
    """A counting pass over a shuffling loader does not change training by a bit."""

    def run(spec):
        torch.manual_seed(5)
        if generator is not None:
            generator.manual_seed(7)
        net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        loader = DataLoader(Hidden(data), 16, shuffle=True, generator=generator)
        fw.Trainer(net, torch.optim.SGD(net.parameters(), 0.1), callbacks=[fw.WeightedLoss(spec)], device="cpu").fit(
            loader, epochs=2
        )
        return net[0].weight

    assert torch.equal(run(EXPECTED), run("balanced"))


def test_binary_cross_entropy_gets_a_pos_weight(data):
    """With binary cross-entropy, balanced weights are pos_weight = n_neg / n_pos."""
    x, y = data.tensors
    model = nn.Linear(4, 1).double()
    for loss in (fw.BinaryCrossEntropy(), nn.BCEWithLogitsLoss()):
        used, _ = fit(model, [(x, (y == 2).double()[:, None])], loss=loss)
        assert used.pos_weight.item() == pytest.approx(56 / 8)


def test_given_weights_and_the_unweighted_loss(model, data):
    """Weights given as a dict reach torch's own loss, and the history has the loss with and without weights."""
    loss, result = fit(model, DataLoader(data, 16), {0: 1.0, 1: 2.0, 2: 5.0}, loss=nn.CrossEntropyLoss())
    x, y = data.tensors
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    entry = result.history[0]
    assert torch.equal(weight.float(), loss.weight)
    assert entry["val/loss"] == pytest.approx(nn.functional.cross_entropy(model(x), y, weight=weight).item(), rel=1e-12)
    assert entry["val/loss_unweighted"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-12)


def test_an_absent_class_is_an_error_or_gets_weight_0(data):
    """A class without examples is an error that names it, or gets weight 0 with absent="zero"."""
    x, y = data.tensors
    model = nn.Linear(4, 4).double()
    loader = [(x, torch.where(y == 1, 3, y))]
    with pytest.raises(ValueError, match="class 1 is absent"):
        fit(model, loader)
    loss, result = fit(model, loader, absent="zero")
    assert loss.weight[1] == 0
    assert torch.isfinite(torch.tensor(result.history[0]["val/loss"]))
    with pytest.raises(ValueError, match="class 3 is absent"):
        fit(model, [(x, y)], num_classes=4)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(torch.ones(4)), fw.LogitAdjusted([4, 3, 2, 1]), fw.LDAM([4, 3, 2, 1])],
    ids=lambda loss: type(loss).__name__,
)
def test_a_last_class_that_the_loss_knows_is_counted_as_absent(data, loss):
    """A loss with values for four classes reveals before step 1 that the fourth is absent."""
    x, y = data.tensors
    model = nn.Linear(4, 4).double()
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, device="cpu")
    trainer.callbacks = [fw.WeightedLoss()]
    with pytest.raises(ValueError, match="class 3 is absent from the training data"):
        trainer.fit([(x, y)], epochs=1)
    assert trainer.state.progress.step == 0
    trainer.callbacks = [fw.WeightedLoss(absent="zero")]
    trainer.fit([(x, y)], epochs=1)
    assert trainer.state.loss.weight.tolist() == pytest.approx([64 / (3 * n) for n in (40, 16, 8)] + [0.0])


def test_more_outputs_than_counted_classes_are_explained(data):
    """If only the outputs reveal C, the error at step 1 names the absent classes and the options to set."""
    x, y = data.tensors
    with pytest.raises(ValueError, match=r"WeightedLoss counted .* class 3 did not.* num_classes=4 and absent='zero'"):
        fit(nn.Linear(4, 4).double(), [(x, y)])
    with pytest.raises(ValueError, match="classes 3 to 5 did not occur"):
        fit(nn.Linear(4, 6).double(), [(x, y)])
    loss, _ = fit(nn.Linear(4, 6).double(), [(x, y)], num_classes=6, absent="zero")  # as the error says
    assert loss.weight.tolist() == pytest.approx([64 / (3 * n) for n in (40, 16, 8)] + [0.0] * 3)
    loss, _ = fit(nn.Linear(4, 4).double(), [(x, y)], counts=[40, 16, 8, 2])
    assert loss.weight[3] == pytest.approx(66 / (4 * 2))


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("balance", "balanced.*'balance'"),
        (torch.tensor([1.0, -1.0, 1.0]), "-1"),
        (torch.tensor([1.0, float("nan"), 1.0]), "nan"),
        (torch.zeros(3), "0"),
        ({0: 1.0, 2: 1.0}, "1"),
    ],
    ids=str,
)
def test_bad_weights_are_refused_when_built(spec, named):
    """Unknown schemes and negative, NaN, all-zero or incomplete weights are refused by the constructor."""
    with pytest.raises(ValueError, match=named):
        fw.WeightedLoss(spec)


def test_weights_of_the_wrong_length_are_refused(model, data):
    """Two weights for three classes raise an error that names both numbers."""
    with pytest.raises(ValueError, match="(?s)2.*3|3.*2"):
        fit(model, DataLoader(data, 16), [1.0, 2.0])


def test_losses_that_take_no_weights_are_refused(model, data):
    """A function, an unsuitable loss and a loss with costs are refused by name before any counting."""
    for loss, name in ((nn.MSELoss(), "MeanSquaredError"), (nn.functional.cross_entropy, "function")):
        with pytest.raises(TypeError, match=f"class weights.*{name}"):
            fit(model, iter([1]), loss=loss)  # which counting would refuse
    with pytest.raises(TypeError, match="class weights.*ExpectedCost"):
        fit(model, iter([1]), loss=ExpectedCost(1 - torch.eye(3)))
    with pytest.raises(TypeError, match="class weights.*RealWorldCrossEntropy"):
        fit(model, DataLoader(data, 16), loss=fw.RealWorldCrossEntropy(torch.ones(3), torch.zeros(3, 3)))


def test_an_iterator_is_not_exhausted_by_counting(model, data):
    """A generator, which counting would exhaust, is refused before its first batch is read."""
    generator = (batch for batch in DataLoader(data, 16))
    with pytest.raises(TypeError, match="iterator"):
        fit(model, generator)
    assert len(list(generator)) == 4


def test_counts_come_from_the_data_not_from_the_sampler(model, data, caplog):
    """The counts ignore a sampler that balances the batches, and a warning says that both weight rare classes."""
    sampler = WeightedRandomSampler([1.0] * 40 + [2.5] * 16 + [5.0] * 8, 64)
    loss, _ = fit(model, DataLoader(data, 16, sampler=sampler))
    assert torch.allclose(EXPECTED, loss.weight)
    assert "rare classes are weighted twice" in caplog.text


def test_a_split_by_sampler_is_counted_as_drawn(model, data):
    """With a SubsetRandomSampler only the examples it draws are counted."""
    part = [*range(20), *range(40, 50), *range(56, 60)]  # 20, 10 and 4 examples
    loss, _ = fit(model, DataLoader(data, 16, sampler=SubsetRandomSampler(part)))
    assert torch.allclose(torch.tensor([34 / 60, 34 / 30, 34 / 12]), loss.weight)


def test_a_resumed_run_keeps_the_weights_it_counted(tmp_path, model, data):
    """Resuming with other data keeps the counted weights, but uses new weights if they are given."""

    def run(spec, loader, resume=None):
        trainer = fw.Trainer(
            model,
            torch.optim.SGD(model.parameters(), 0.0),
            callbacks=[fw.WeightedLoss(spec), fw.Checkpoint(tmp_path)],
            device="cpu",
        )
        trainer.fit(loader, epochs=1 if resume is None else 2, resume=resume)
        return trainer.state.loss.weight

    run("balanced", DataLoader(data, 16))
    half = DataLoader(Subset(data, range(0, 64, 3)), 16)
    assert torch.allclose(EXPECTED, run("balanced", half, resume=tmp_path / "epoch-1.pt"))
    assert torch.equal(torch.tensor([1.0, 2.0, 50.0]), run([1.0, 2.0, 50.0], half, resume=tmp_path / "epoch-2.pt"))


# -- schemes, kinds of targets, sources --------------------------------------------------------------------------------

SOURCES = ["loader", "batches", "subset", "parts", "hidden", "stream", "counts"]
X = torch.zeros(64, 1)
Y = torch.tensor([0] * 40 + [1] * 16 + [2] * 8)
LABELS = torch.stack([Y == 0, Y == 2, Y > 0], 1)  # 40, 8 and 24 positives
PAIRS = [[24, 40], [56, 8], [40, 24]]


def sources(y, source, counts):
    """Return a loader, and the counts if they are given instead of counted."""
    if source == "counts":
        return iter([]), {"counts": counts}  # counting an iterator would be refused
    return as_loaders(X, y)[source], {}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_classes_are_weighted_by_every_scheme(scheme, source):
    """Class weights follow the formula of the scheme, with and without ignored targets."""
    loader, given = sources(Y, source, [40, 16, 8])
    assert weighed(fw.CrossEntropy(), loader, scheme, **given).weight.tolist() == pytest.approx(
        formula(scheme, [40, 16, 8]), rel=1e-6
    )
    y = torch.where(torch.arange(64) % 4 == 0, 9, Y)
    loader, given = sources(y, source, [30, 12, 6])
    loss = weighed(fw.CrossEntropy(ignore_index=9), loader, scheme, **given)
    assert loss.weight.tolist() == pytest.approx(formula(scheme, [30, 12, 6]), rel=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_are_weighted_by_every_scheme(scheme, source):
    """Binary cross-entropy gets one pos_weight per label."""
    loader, given = sources(LABELS[:, 1].double(), source, [56, 8])
    low, high = formula(scheme, [56, 8])
    assert weighed(fw.BinaryCrossEntropy(), loader, scheme, **given).pos_weight.item() == pytest.approx(high / low)
    loader, given = sources(LABELS.double(), source, PAIRS)
    loss = weighed(fw.BinaryCrossEntropy(), loader, scheme, **given)
    expected = [high / low for low, high in (formula(scheme, pair) for pair in PAIRS)]
    assert loss.pos_weight.tolist() == pytest.approx(expected, rel=1e-6)
    assert loss._neg_weight is None


@pytest.mark.parametrize(
    "y", [LABELS[:, 1].double(), LABELS[:, 1:2].float(), LABELS[:, 1].long()], ids=["N", "N1", "int"]
)
def test_losses_of_one_logit_get_the_weights_of_two_classes(y):
    """A loss with one logit and class weights gets two of them from targets of 0 and 1."""
    loss = weighed(Focal(), as_loaders(X, y)["loader"], "inverse")
    assert loss.weight.tolist() == pytest.approx([64 / 56, 64 / 8])


def test_masks_of_one_label_are_one_problem_of_two_classes():
    """Binary cross-entropy over pixels gets a single pos_weight for all pixels."""
    y = torch.zeros(2, 1, 4, 4)
    y[0, 0, 0, :2] = 1
    for shape in ((2, 1, 4, 4), (2, 4, 4)):
        assert weighed(fw.BinaryCrossEntropy(), [(X, y.view(shape))]).pos_weight.item() == pytest.approx(30 / 2)


def test_weights_of_the_examples_count():
    """Counts are sums of sample weights, so masking half of a class halves its count."""
    w = torch.where((Y == 0) & (torch.arange(64) % 2 == 0), 0.0, 1.0)
    for loader in (DataLoader(TensorDataset(X, Y, w), 16), list(DataLoader(TensorDataset(X, Y, w), 16))):
        loss = weighed(fw.CrossEntropy(), loader)
        assert loss.weight.tolist() == pytest.approx(formula("balanced", [20, 16, 8]), rel=1e-6)
    mask = torch.ones(64, 3)
    mask[:10, 1] = 0  # ten negatives of label 1 that nobody looked at
    loss = weighed(fw.BinaryCrossEntropy(), DataLoader(TensorDataset(X, LABELS.float(), mask), 16))
    assert loss.pos_weight.tolist() == pytest.approx([24 / 40, 46 / 8, 40 / 24])


def test_a_label_that_lacks_a_class_is_an_error_or_keeps_weight_1():
    """A label without positives is an error that names it, or gets pos_weight 1 with absent="zero"."""
    y = LABELS.double() * torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match="the positives of label 1 are absent"):
        weighed(fw.BinaryCrossEntropy(), [(X, y)])
    loss = weighed(fw.BinaryCrossEntropy(), [(X, y)], absent="zero")
    assert loss.pos_weight.tolist() == pytest.approx([24 / 40, 1, 40 / 24])


@pytest.mark.parametrize("counts", [[1, -1], [[1, 2, 3]], [math.nan, 1], []], ids=str)
def test_bad_counts_are_refused_when_built(counts):
    """Invalid counts, and counts together with weights, are refused by the constructor."""
    with pytest.raises(ValueError, match="counts must"):
        fw.WeightedLoss(counts=counts)
    with pytest.raises(ValueError, match="the weights are given"):
        fw.WeightedLoss([1.0, 2.0], counts=[3, 4])


def test_counts_that_do_not_fit_the_loss_are_refused():
    """Label counts for a loss over classes, or three class counts for a binary loss, raise a descriptive error."""
    with pytest.raises(ValueError, match=r"shape \(C,\).*\(3, 2\)"):
        weighed(fw.CrossEntropy(), [], counts=PAIRS)
    with pytest.raises(ValueError, match="two classes"):
        weighed(fw.BinaryCrossEntropy(), [], counts=[1, 2, 3])


# -- the mean weight ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*SCHEMES, [1.0, 5.0, 2.0]], ids=str)
def test_normalize_gives_classes_a_mean_weight_of_1(spec):
    """With normalize the mean weight over the examples is 1, for schemes and for given weights."""
    for loader in (as_loaders(X, Y)["loader"], as_loaders(X, Y)["stream"]):
        weight = weighed(fw.CrossEntropy(), loader, spec, normalize=True).weight
        assert weight[Y].double().mean().item() == pytest.approx(1, rel=1e-6)
        plain = formula(spec, [40, 16, 8]) if isinstance(spec, str) else spec
        assert (weight / weight[0]).tolist() == pytest.approx([w / plain[0] for w in plain], rel=1e-6)


@pytest.mark.parametrize("spec", [*SCHEMES, [1.0, 5.0]], ids=str)
@pytest.mark.parametrize("labels", [1, 3])
def test_normalize_gives_labels_a_mean_weight_of_1(spec, labels):
    """With normalize the weights of each label have a mean of 1 and keep their ratio."""
    y = LABELS[:, :labels].double()
    loss = weighed(fw.BinaryCrossEntropy(), [(X, y)], spec, normalize=True)
    losses, _ = loss.unreduced(torch.zeros_like(y), y)
    weights = losses / math.log(2)  # the loss of every element is ln 2
    assert weights.mean(0).tolist() == pytest.approx([1] * labels, rel=1e-6)
    for label in range(labels):
        low, high = formula(spec, PAIRS[label]) if isinstance(spec, str) else spec
        ratio = weights[y[:, label] == 1, label][0] / weights[y[:, label] == 0, label][0]
        assert ratio.item() == pytest.approx(high / low, rel=1e-6)


# -- the schedule ------------------------------------------------------------------------------------------------------


class Watch(fw.Callback):
    """Records the weights of each epoch, the validation loss computed by hand, and the texts."""

    def __init__(self, x, y, full):
        self.x, self.y, self.full = x, y, full
        self.weights, self.validated, self.texts = {}, [], []

    def on_batch_end(self, state):
        self.weights.setdefault(state.progress.epoch, []).append(state.loss.weight)

    def on_validation_end(self, state):
        state.model.eval()
        with torch.no_grad():
            expected = F.cross_entropy(state.model(self.x), self.y, weight=self.full)
            unweighted = F.cross_entropy(state.model(self.x), self.y)
        state.model.train()
        self.validated.append((state.metrics, expected.item(), unweighted.item()))

    def on_log(self, state):
        self.texts += [r.value for r in state.records if r.name == "train/report/class_weights"]


def scheduled(data, epochs, *, lr=0.1, folder=None, resume=None, spec="balanced", **options):
    """Fit with a schedule, always from the same initial weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    watch = Watch(*data.tensors, EXPECTED.double())
    callbacks = [fw.WeightedLoss(spec, **options), watch, *([fw.Checkpoint(folder)] if folder else [])]
    trainer = fw.Trainer(net, torch.optim.SGD(net.parameters(), lr, momentum=0.9), callbacks=callbacks, device="cpu")
    loader = DataLoader(data, 16, shuffle=True)
    trainer.fit(loader, DataLoader(data, 16), epochs=epochs, resume=resume)
    return watch, trainer


@pytest.mark.parametrize(
    ("options", "powers"),
    [
        ({"start_epoch": 2}, [0, 0, 1, 1]),
        ({"ramp_epochs": 1}, [1 / 2, 1, 1, 1]),
        ({"start_epoch": 1, "ramp_epochs": 2}, [0, 1 / 3, 2 / 3, 1]),
    ],
    ids=str,
)
def test_weights_follow_the_schedule(data, options, powers):
    """Every batch of an epoch uses the weights to the power of that epoch; power 0 is the unweighted loss."""
    watch, _ = scheduled(data, 4, **options)
    for epoch, power in enumerate(powers):
        for weight in watch.weights[epoch]:
            assert (weight is None) == (power == 0)
            if power:
                expected = [w**power for w in EXPECTED.tolist()]
                assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_validation_has_the_full_weights_from_the_first_epoch(data):
    """val/loss uses the full weights in every epoch, next to the unweighted loss."""
    watch, _ = scheduled(data, 4, start_epoch=1, ramp_epochs=2)
    assert len(watch.validated) == 4
    for metrics, expected, unweighted in watch.validated:
        assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["val/loss_unweighted"] == pytest.approx(unweighted, rel=1e-12)


def test_without_a_schedule_validation_measures_the_loss_of_training(data):
    """Only a schedule sets a separate validation loss."""
    _, trainer = scheduled(data, 1)
    assert trainer.state.eval_loss is None
    _, trainer = scheduled(data, 1, start_epoch=1)
    assert trainer.state.eval_loss.has_weights
    assert not trainer.state.loss.has_weights


def test_the_ramp_keeps_the_mean_weight_and_the_zeros(data):
    """In every epoch of a ramp the normalized mean weight is 1 and a weight of 0 is 0."""
    watch, _ = scheduled(data, 4, spec=[1.0, 0.0, 4.0], normalize=True, start_epoch=1, ramp_epochs=2)
    y = data.tensors[1]
    assert watch.weights[0][0] is None
    for epoch, power in ((1, 1 / 3), (2, 2 / 3), (3, 1)):
        weight = watch.weights[epoch][0]
        assert weight[y].double().mean().item() == pytest.approx(1, rel=1e-6)
        assert weight[1] == 0
        assert (weight[2] / weight[0]).item() == pytest.approx(4**power, rel=1e-6)


def test_a_schedule_of_labels():
    """With K labels pos_weight has the power of the epoch; with normalize the weights of both sides do."""
    for normalize in (False, True):
        model = nn.Linear(1, 3).double()
        state = fw.State(
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            loss=fw.BinaryCrossEntropy(),
            train_loader=[(X, LABELS.double())],
        )
        callback = fw.WeightedLoss(normalize=normalize, start_epoch=1, ramp_epochs=1)
        callback.on_fit_start(state)
        assert not state.loss.has_weights
        state.progress.epoch = 1
        callback.on_epoch_start(state)
        ratio = state.loss.pos_weight / (state.loss._neg_weight if normalize else 1)
        assert ratio.tolist() == pytest.approx([math.sqrt(low / high) for low, high in PAIRS], rel=1e-6)
        y = LABELS.double()
        losses, _ = state.loss.unreduced(torch.zeros_like(y), y)
        if normalize:
            assert (losses / math.log(2)).mean(0).tolist() == pytest.approx([1, 1, 1], rel=1e-6)


def test_the_report_describes_the_schedule(data):
    """The report has counts and schedule, and a text when the weights start to grow and when they are complete."""
    watch, _ = scheduled(data, 5, start_epoch=1, ramp_epochs=2)
    table, begin, full = watch.texts
    assert "| 0 | 40 | 0.5333 |" in table
    assert table.endswith(
        "In training, the weights grow from epoch 2 and have their full values from epoch 4. "
        "Before that, training is unweighted. Validation always uses the full weights."
    )
    assert begin == "Epoch 1: the class weights start to grow."
    assert full == "Epoch 3: the class weights reach their full values."
    assert len(scheduled(data, 3)[0].texts) == 1
    assert len(scheduled(data, 3, start_epoch=1)[0].texts) == 2


def test_the_report_of_labels():
    """Each label has a row with the counts and weights of both sides."""
    model = nn.Linear(1, 1)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters()), loss=fw.BinaryCrossEntropy())
    fw.WeightedLoss(counts=[[3_000_001, 10], [5, 15]]).on_fit_start(state)
    state.log.close_window({})
    assert state.records[0].value.splitlines()[0].startswith("| label | negatives | positives |")
    assert state.records[0].value.splitlines()[2:] == [
        "| 0 | 3000001 | 10 | 0.5 | 1.5e+05 |",
        "| 1 | 5 | 15 | 2 | 0.6667 |",
    ]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_continues_the_schedule(tmp_path, data, cut):
    """A run resumed before, in or after the ramp ends with the same parameters as an uninterrupted one."""
    options = {"start_epoch": 1, "ramp_epochs": 2, "normalize": True}
    whole, expected = scheduled(data, 5, **options)
    scheduled(data, cut, folder=tmp_path, **options)
    rest, trainer = scheduled(data, 5, folder=tmp_path, resume="auto", **options)
    assert sorted(rest.weights) == list(range(cut, 5))
    for epoch, weights in rest.weights.items():
        for one, other in zip(weights, whole.weights[epoch], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    for one, other in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [e["val/loss"] for e in trainer.state.history] == [e["val/loss"] for e in expected.state.history]


def test_a_resumed_run_keeps_the_counts_that_normalized_given_weights(tmp_path, data):
    """Normalized given weights do not change if the data set has changed before resuming."""
    before, _ = scheduled(data, 1, folder=tmp_path, spec=[1.0, 2.0, 5.0], normalize=True)
    other = TensorDataset(data.tensors[0][::3], data.tensors[1][::3])
    after, _ = scheduled(other, 2, folder=tmp_path, resume="auto", spec=[1.0, 2.0, 5.0], normalize=True)
    assert torch.equal(before.weights[0][0], after.weights[1][0])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"start_epoch": -1}, ValueError, "start_epoch must be 0 or more, got -1"),
        ({"ramp_epochs": 1.5}, TypeError, "ramp_epochs must be an integer of 0 or more, got 1.5"),
        ({"normalize": 1}, TypeError, "normalize must be of type bool, got 1"),
    ],
)
def test_options_out_of_range_are_refused(options, error, match):
    """start_epoch and ramp_epochs must be integers of 0 or more."""
    with pytest.raises(error, match=match):
        fw.WeightedLoss(**options)


@pytest.mark.parametrize("start_epoch", [0, 1, 2])
def test_parameters_of_the_loss_are_trained(start_epoch):
    """A temperature in the loss is trained as in a loop by hand, with and without a schedule."""

    class Tempered(fw.CrossEntropy):
        def __init__(self):
            super().__init__()
            self.log_t = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def sums(self, output, target, sample_weight=None):
            return super().sums(output * self.log_t.exp(), target, sample_weight)

        def unreduced(self, output, target):
            return super().unreduced(output * self.log_t.exp(), target)

    x, y = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 7 % 3
    weights = fw.class_weights(torch.bincount(y)).double()
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    twin, log_t = nn.Linear(4, 3).double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD([*twin.parameters(), log_t], 0.5)
    for epoch in range(3):
        loss = F.cross_entropy(twin(x) * log_t.exp(), y, weights if epoch >= start_epoch else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(log_t.item()) > 0.01

    given = Tempered()
    trainer = fw.Trainer(
        model,
        torch.optim.SGD([*model.parameters(), *given.parameters()], 0.5),
        given,
        callbacks=[fw.WeightedLoss("balanced", start_epoch=start_epoch)],
        device="cpu",
    )
    trainer.fit([(x, y)], [(x, y)], epochs=3)
    assert trainer.state.loss.log_t is given.log_t
    torch.testing.assert_close(given.log_t.detach(), log_t.detach(), rtol=1e-5, atol=0)  # the weights are float32


@pytest.mark.parametrize("asks", [False, True])
def test_unused_weights_give_a_warning(model, data, caplog, asks):
    """A training_step that uses self.loss directly gives a single warning that the weights are unused."""

    class Own(fw.Trainer):
        def training_step(self, batch):
            outputs = self.model(batch[0])
            return self.compute_loss(outputs, batch[1]) if asks else self.loss(outputs, batch[1])

    trainer = Own(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=fw.WeightedLoss(), device="cpu")
    trainer.fit(DataLoader(data, 16), [tuple(t.clone() for t in data[:])], epochs=3)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not asks)
    assert all("the training step does not use it: compute the loss with self.compute_loss" in one for one in said)


WORDS = ("has weights already", "rarer classes have smaller weights")


def said(caplog, loss, spec, loader, **options):
    """The warnings of a fit that has these words."""
    caplog.clear()
    model = nn.Linear(4, 1 if isinstance(loss, (fw.BinaryCrossEntropy, nn.BCEWithLogitsLoss)) else 3).double()
    callback = fw.WeightedLoss(spec, **options)
    fw.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, callbacks=callback).fit(loader, epochs=2)
    return [r.getMessage() for r in caplog.records if any(word in r.getMessage() for word in WORDS)]


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(torch.tensor([1.0, 500, 2])), fw.CrossEntropy([1.0, 500, 2]), Focal(weight=[1.0, 500, 2])],
    ids=lambda loss: type(loss).__name__,
)
def test_weights_that_replace_those_of_the_loss_are_said_once(data, caplog, loss):
    """A loss with weights of its own gives one warning, with both vectors; a loss without gives none."""
    loader = DataLoader(data, 16)
    (message,) = said(caplog, loss, [3.0, 4, 5], loader)
    assert "[1, 500, 2]" in message
    assert "[3, 4, 5]" in message
    assert said(caplog, LogitAdjusted([3, 2, 1]), "balanced", loader) == []
    assert said(caplog, None, "balanced", loader) == []


def test_a_pos_weight_that_is_replaced_is_said(data, caplog):
    """The pos_weight of a binary loss is named, too."""
    x, y = data.tensors
    loader = [(x, (y > 0).double()[:, None])]
    (message,) = said(caplog, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(7.0)), "balanced", loader)
    assert "pos_weight=[7]" in message


class Unread:
    """Batches that show neither their targets nor their number."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("weights", "warns"),
    [([5.0, 1, 0.5], True), ([0.5, 1, 5], False), ([1.0, 1, 1], False), ([2.0, 1, 1.5], True), ([1.0, 1, 3], False)],
    ids=str,
)
def test_weights_that_fall_with_rarity_are_said(data, caplog, weights, warns):
    """With 40, 16 and 8 examples, weights that fall in the same order give a warning with weights and counts."""
    messages = said(caplog, None, weights, DataLoader(data, 16))
    assert len(messages) == warns
    assert all("[40, 16, 8]" in message for message in messages)
    listed = [tuple(data[:40]), tuple(data[40:])]
    assert len(said(caplog, None, weights, listed)) == warns
    hidden = Unread(listed)  # not exposed: no pass over the data only for a warning
    assert said(caplog, None, weights, hidden) == []
    assert len(said(caplog, None, weights, hidden, normalize=True)) == warns  # which counts anyway


def test_counts_that_are_swapped_are_said(data, caplog):
    """Given counts in the wrong order weigh the rarer classes less than the data has them, and are told."""
    for loader in (DataLoader(data, 16), [tuple(data[:40]), tuple(data[40:])]):
        (message,) = said(caplog, None, "balanced", loader, counts=[8, 16, 40])
        assert "[40, 16, 8]" in message
        assert said(caplog, None, "balanced", loader, counts=[400, 160, 80]) == []


def test_a_class_without_examples_may_have_weight_0(data, caplog):
    """An absent class of weight 0 is no sign of swapped classes."""
    x, y = data.tensors
    kept = y != 1
    assert said(caplog, None, [1.0, 0, 5], DataLoader(TensorDataset(x[kept], y[kept]), 16)) == []


@pytest.mark.parametrize("kind", [dict, Counter])
def test_counts_may_be_a_mapping(data, kind):
    """A dict or Counter class -> count is the list of counts, with 0 for missing classes."""
    counts = kind({0: 40, 2: 8, 1: 16})
    for normalize in (False, True):
        found = fw.class_weights(counts, normalize=normalize)
        assert torch.equal(found, fw.class_weights([40, 16, 8], normalize=normalize))
    lacking = kind({0: 40, 2: 8})
    assert torch.equal(fw.class_weights(lacking, absent="zero"), fw.class_weights([40, 0, 8], absent="zero"))
    loader = DataLoader(data, 16)
    assert torch.equal(
        weighed(fw.CrossEntropy(), loader, counts=counts).weight,
        weighed(fw.CrossEntropy(), loader, counts=[40, 16, 8]).weight,
    )
    last = weighed(fw.CrossEntropy(), loader, counts=kind({0: 40, 1: 8}), num_classes=3, absent="zero")
    assert torch.equal(last.weight, fw.class_weights([40, 8, 0], absent="zero"))
    for loss in (LogitAdjusted, LDAM):
        assert str(loss(counts)) == str(loss([40, 16, 8]))
    costs = fw.CostMatrix([[0.0, 1, 5], [1, 0, 1], [9, 1, 0]])
    assert costs.cheapest_constant(kind({0: 40, 1: 8})) == costs.cheapest_constant([40, 8, 0])


@pytest.mark.parametrize("counts", [{"cat": 3, "dog": 4}, {-1: 3, 0: 4}, {0.5: 3}], ids=str)
def test_counts_by_name_are_refused(counts):
    """Keys that are no class indices are named, everywhere that counts are taken."""
    for take in (fw.class_weights, lambda c: fw.WeightedLoss(counts=c), LogitAdjusted, LDAM):
        with pytest.raises(ValueError, match="class indices 0, 1, ... as keys"):
            take(counts)


def test_batches_that_cannot_be_counted_ask_for_the_counts(data):
    """With batches of its own format, WeightedLoss says that it takes counts, and then trains with them."""
    x, y = data.tensors
    loader = [{"ids": x, "tags": y}]

    class Own(fw.Trainer):
        def training_step(self, batch):
            return self.compute_loss(self.model(batch["ids"]), batch["tags"])

    def run(**options):
        model = nn.Linear(4, 3).double()
        trainer = Own(model, torch.optim.SGD(model.parameters()), callbacks=fw.WeightedLoss("balanced", **options))
        trainer.fit(loader, epochs=1)
        return trainer.state.loss.weight

    with pytest.raises(TypeError, match=r"can't count the classes: .*'tags'.*counts=\[900, 100\]"):
        run()
    assert torch.equal(run(counts=Counter(y.tolist())), fw.class_weights([40, 16, 8]))


class OwnLoss(fw.Trainer):
    def training_step(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [fw.Trainer, OwnLoss])
def test_only_a_training_step_shows_whether_the_loss_is_used(model, data, caplog, kind):
    """After a validation before step 1, a step that uses the weighted loss is not warned about; another is, once."""
    loader = DataLoader(data, 16)
    trainer = kind(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.WeightedLoss()], device="cpu")
    trainer.fit(loader, loader, epochs=2, validate_first=True)
    assert caplog.text.count("a callback has replaced the loss") == (kind is OwnLoss)


def test_a_watch_that_validates_first_is_not_warned(model, data, caplog):
    """watch.validate() before the first epoch does not say that the loop ignores the weighted loss."""
    loader, optimizer = DataLoader(data, 16), torch.optim.SGD(model.parameters(), 0.1)
    with fw.Watch(model, optimizer, fw.WeightedLoss(), train_loader=loader, val_loader=loader) as watch:
        watch.validate()
        for _ in watch.epochs(1):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            watch.validate()
    assert "replaced the loss" not in caplog.text
