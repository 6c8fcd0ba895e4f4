"""What is checked before step 1: the optimizer, the loaders and the first batch."""

import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler, random_split

import fitwatch as fw
from fitwatch.engine.checks import CHECKS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(n=96, classes=3, first=0):
    x = torch.randn(n, 4)
    return x, torch.arange(n) % classes + first


def model_of(outputs=3, *tail):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs), *tail)


def warnings_of(caplog, model, train, val=None, *, loss=None, optimizer=None, skip=(), hand=False):
    """Return the names of the checks that warned in a fit of one epoch."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01)
    with caplog.at_level(logging.WARNING, "fitwatch"):
        if hand:
            with fw.Watch(model, optimizer, loss=loss, train_loader=train, val_loader=val, skip_checks=skip) as watch:
                for _ in watch.epochs(1):
                    for x, y in watch.train():
                        watch.loss(model(x), y).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                    if val is not None:
                        watch.validate()
        else:
            fw.Trainer(model, optimizer, loss, skip_checks=skip, device="cpu").fit(train, val, epochs=1)
    texts = [record.getMessage() for record in caplog.records if "skip_checks=" in record.getMessage()]
    caplog.clear()
    return [text.split('skip_checks=["')[1].split('"')[0] for text in texts]


def loader_of(*tensors, **options):
    return DataLoader(TensorDataset(*tensors), batch_size=16, **options)


@pytest.mark.parametrize("hand", [False, True])
def test_a_sound_setup_warns_of_nothing(caplog, hand):
    """Disjoint halves of a data set, an unshuffled validation and logits give no warning."""
    x, y = inputs()
    data = TensorDataset(x, y)
    train, val = random_split(data, [64, 32])
    loaders = DataLoader(train, 16, shuffle=True), DataLoader(val, 16)
    assert warnings_of(caplog, model_of(), *loaders, hand=hand) == []
    assert warnings_of(caplog, model_of(), loader_of(x[:64], y[:64]), loader_of(x[64:], y[64:]), hand=hand) == []


@pytest.mark.parametrize("hand", [False, True])
def test_trainable_parameters_outside_the_optimizer_are_named(caplog, hand):
    """A backbone that the optimizer does not hold is named, and a frozen one is not."""
    x, y = inputs()
    model = model_of()
    head = torch.optim.SGD(model[2].parameters(), 0.1)
    assert warnings_of(caplog, model, loader_of(x, y), optimizer=head, hand=hand) == ["untrained_parameters"]
    model[0].requires_grad_(False)
    assert warnings_of(caplog, model, loader_of(x, y), optimizer=head, hand=hand) == []


def test_the_message_names_the_parameters(caplog):
    """At most three names are shown, with their number and what to write."""
    model = nn.ModuleList([model_of(), model_of()])
    optimizer = torch.optim.SGD(model[0][0].parameters(), 0.1)

    class First(fw.Trainer):
        def training_step(self, batch):
            return self.compute_loss(self.model[0](batch[0]), batch[1])

    First(model, optimizer, device="cpu").fit([inputs()], epochs=1)
    assert (
        "does not hold 6 trainable parameters of the model (`0.2.weight`, `0.2.bias`, `1.0.weight`, ...)" in caplog.text
    )
    assert "model.parameters()" in caplog.text


def shared_cases():
    x, y = inputs()
    data = TensorDataset(x, y)
    loader = DataLoader(data, 16)
    batches = [(x, y)]
    return {
        "one loader": (loader, loader, "the same object"),
        "one list": (batches, batches, "the same object"),
        "one data set": (loader, DataLoader(data, 32), "all 96 validation examples"),
        "a part of it": (loader, DataLoader(Subset(data, range(10, 20)), 10), "all 10 validation examples"),
        "overlapping parts": (
            DataLoader(Subset(data, range(60)), 20),
            DataLoader(Subset(data, range(50, 80)), 10),
            "10 of 30 validation examples",
        ),
        "parts of parts": (
            DataLoader(Subset(Subset(data, range(60)), range(30)), 10),
            DataLoader(Subset(data, range(29, 39)), 10),
            "1 of 10 validation examples",
        ),
        "samplers over one data set": (
            DataLoader(data, 16, sampler=SubsetRandomSampler(range(64))),
            DataLoader(Subset(data, range(60, 96)), 16),
            "4 of 36 validation examples",
        ),
        "rows of one tensor": (loader_of(x[:64], y[:64]), loader_of(x[48:], y[48:]), "16 of 48 validation examples"),
    }


@pytest.mark.parametrize("case", shared_cases())
def test_shared_examples_are_counted(caplog, case):
    """Validation examples that are training examples are told with their number."""
    train, val, text = shared_cases()[case]
    fw.Trainer(model := model_of(), torch.optim.SGD(model.parameters(), 0.1), device="cpu").fit(train, val, epochs=1)
    assert text in caplog.text
    assert "random_split" in caplog.text


def test_samplers_over_disjoint_parts_share_nothing(caplog):
    """Two samplers over one data set that draw different examples are not a leak."""
    data = TensorDataset(*inputs())
    train = DataLoader(data, 16, sampler=SubsetRandomSampler(range(64)))
    val = DataLoader(data, 16, sampler=range(64, 96))
    assert "shared_examples" not in warnings_of(caplog, model_of(), train, DataLoader(Subset(data, range(64, 96)), 16))
    assert "shared_examples" not in warnings_of(caplog, model_of(), train, val)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: {"shuffle": True},
        lambda data: {"sampler": WeightedRandomSampler(torch.ones(len(data)), len(data))},
        lambda data: {"sampler": SubsetRandomSampler(range(len(data)))},
    ],
)
def test_a_shuffled_validation_is_told(caplog, sampler):
    """Every sampler that draws a new order each time is told, before training."""
    x, y = inputs()
    val = TensorDataset(x[64:], y[64:])
    loader = DataLoader(val, 16, **sampler(val))
    assert warnings_of(caplog, model_of(), loader_of(x[:64], y[:64]), loader) == ["validation_order"]


def test_a_last_batch_of_one_is_told_if_the_model_normalizes_batches(caplog):
    """BatchNorm, an uneven length and no drop_last: told before the error, whose note says the same."""
    x, y = inputs(97)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    with pytest.raises(ValueError, match="more than 1 value per channel") as info:
        trainer.fit(loader_of(x, y), epochs=1)
    assert "drop_last=True" in caplog.text
    assert any("drop_last=True" in note for note in info.value.__notes__)
    caplog.clear()
    assert warnings_of(caplog, model, loader_of(x, y, drop_last=True)) == []
    assert warnings_of(caplog, model_of(), loader_of(x, y)) == []


@pytest.mark.parametrize("hand", [False, True])
@pytest.mark.parametrize(
    ("loss", "tail", "outputs"),
    [
        (None, nn.Softmax(1), 3),
        (nn.CrossEntropyLoss(), nn.Softmax(1), 3),
        (fw.losses.Focal(), nn.Softmax(1), 3),
        (nn.NLLLoss(), nn.Identity(), 3),
        (nn.NLLLoss(), nn.Softmax(1), 3),
        (nn.BCEWithLogitsLoss(), nn.Sigmoid(), 1),
    ],
)
def test_probabilities_in_place_of_logits_are_told(caplog, loss, tail, outputs, hand):
    """A softmax or sigmoid before a loss that has its own, and logits before NLLLoss, are told at the first batch."""
    x, y = inputs()
    if outputs == 1:
        y = (y > 0).float().unsqueeze(1)
    assert warnings_of(caplog, model_of(outputs, tail), loader_of(x, y), loss=loss, hand=hand) == ["probabilities"]
    right = nn.LogSoftmax(1) if isinstance(loss, nn.NLLLoss) else nn.Identity()
    assert warnings_of(caplog, model_of(outputs, right), loader_of(x, y), loss=loss, hand=hand) == []


def test_labels_from_one_are_told(caplog):
    """Labels 1, 2, 3 with four outputs train a class that never occurs; labels 0, 1, 2 do not."""
    assert warnings_of(caplog, model_of(4), loader_of(*inputs(first=1))) == ["labels"]
    assert warnings_of(caplog, model_of(4), [inputs(first=1)]) == ["labels"]
    assert warnings_of(caplog, model_of(4), loader_of(*inputs())) == []
    x, y = inputs(first=1)
    y[:2] = torch.tensor([-100, 0])  # one is ignored, and one is 0
    assert warnings_of(caplog, model_of(4), loader_of(x, y)) == []


def test_each_check_can_be_skipped_by_name(caplog):
    """A named check does not warn, the others do, and an unknown name is refused."""
    x, y = inputs()
    loader = loader_of(x, y, shuffle=True)
    other = loader_of(x, y, shuffle=True)
    model = model_of(3, nn.Softmax(1))
    assert warnings_of(caplog, model, loader, other, skip=["shared_examples", "probabilities"]) == ["validation_order"]
    assert warnings_of(caplog, model, loader, loader, skip="shared_examples") == ["probabilities"]
    with pytest.raises(ValueError, match="skip_checks takes names among untrained_parameters, .*got 'softmax'"):
        fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), skip_checks=["softmax"])


def test_checks_change_nothing():
    """Weights and random numbers after a fit are the same with all checks and with none."""

    def fit(skip):
        torch.manual_seed(1)
        x, y = inputs(first=1)
        model = model_of(4, nn.Softmax(1))
        loader = loader_of(x, y, shuffle=True)
        fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), skip_checks=skip, device="cpu").fit(
            loader, loader_of(x, y, shuffle=True), epochs=2
        )
        return [*model.state_dict().values(), torch.rand(3)]

    names = CHECKS
    assert all(torch.equal(a, b) for a, b in zip(fit(()), fit(names), strict=True))


def test_an_error_in_a_training_step_says_where():
    """An exception carries the epoch, the batch and the number of steps."""
    x, y = inputs(8)
    model = model_of()
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    with pytest.raises(IndexError) as info:
        trainer.fit([(x, y), (x, y + 3)], epochs=1)
    assert "raised in training: epoch 1, batch index 1, after 1 steps" in info.value.__notes__


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, lambda p: Ascent(p, {})])
def test_an_optimizer_that_needs_a_closure_is_refused(optimizer):
    """LBFGS, and any optimizer whose step has a required argument, is refused with the way out."""
    model = model_of()
    with pytest.raises(TypeError, match="needs a closure.*plain loop"):
        fw.Trainer(model, optimizer(model.parameters()))


class Ascent(torch.optim.Optimizer):
    def step(self, closure):
        """Evaluate twice."""


def test_a_closure_in_a_hand_written_loop_is_refused():
    """optimizer.step(closure) would evaluate the batch again unseen."""
    x, y = inputs(8)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fw.Watch(model, optimizer, train_loader=[(x, y)]) as watch:
        for _ in watch.epochs(1):
            loss = watch.loss(model(x), y)
            loss.backward()
            with pytest.raises(RuntimeError, match="without a closure"):
                optimizer.step(lambda value=loss: value)
            optimizer.step()
    assert watch.state.progress.step == 1


def test_several_optimizers_or_schedulers_are_refused_with_the_way():
    """A list names SequentialLR and ChainedScheduler, or what to do with a second optimizer."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    with pytest.raises(TypeError, match="one scheduler, got 2.*SequentialLR.*ChainedScheduler"):
        fw.Trainer(model, optimizer, scheduler=schedulers)
    with pytest.raises(TypeError, match="one optimizer, got 2.*state_dict"):
        fw.Watch(model, [optimizer, optimizer])


class SkipsOdd(fw.Trainer):
    """Leaves out each batch whose first input is negative."""

    def training_step(self, batch):
        return None if batch[0][0, 0] < 0 else super().training_step(batch)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_that_returns_none_leaves_the_batch_out(accumulate):
    """The weights are those of a plain loop over the same groups of batches without those left out."""
    torch.manual_seed(0)
    x, y = inputs(88)
    loader = list(zip(x.split(8), y.split(8), strict=True))
    kept = [bool(a[0, 0] >= 0) for a, _ in loader]
    assert 2 < sum(kept) < len(kept) - 2
    model, plain = model_of(), model_of()
    plain.load_state_dict(model.state_dict())
    counts = []

    class Count(fw.Callback):
        def on_log(self, state):
            counts.extend(r.value for r in state.records if r.name == "train/skipped_batches")

    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    trainer = SkipsOdd(model, optimizer, accumulate=accumulate, callbacks=Count(), device="cpu")
    trainer.fit(loader, epochs=1)
    optimizer, steps = torch.optim.SGD(plain.parameters(), 0.5, momentum=0.9), 0
    for start in range(0, len(loader), accumulate):
        group = [b for b, keep in zip(loader, kept, strict=True)][start : start + accumulate]
        group = [b for b, keep in zip(group, kept[start : start + accumulate], strict=True) if keep]
        if group:
            steps += 1
            optimizer.zero_grad()
            out = torch.cat([plain(a) for a, _ in group])
            nn.functional.cross_entropy(out, torch.cat([b for _, b in group])).backward()
            optimizer.step()
    assert trainer.state.progress.step == steps
    assert counts[-1] == len(kept) - sum(kept)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


COSTS = [[0.0, 1, 2], [3, 0, 1], [1, 5, 0]]


@pytest.mark.parametrize(
    ("loss", "tail", "outputs"),
    [
        (fw.RealWorldCrossEntropy(COSTS), nn.Softmax(1), 3),
        (fw.losses.ExpectedCost(COSTS), nn.Softmax(1), 3),
        (nn.functional.cross_entropy, nn.Softmax(1), 3),
        (partial(nn.functional.cross_entropy, label_smoothing=0.1), nn.Softmax(1), 3),
        (nn.functional.nll_loss, nn.Softmax(1), 3),
        (nn.functional.binary_cross_entropy_with_logits, nn.Sigmoid(), 1),
        (fw.RealWorldCrossEntropy(2, 1), nn.Sigmoid(), 1),
        (fw.losses.ExpectedCost([[0.0, 1], [2, 0]]), nn.Sigmoid(), 1),
        (fw.losses.Focal(), nn.Sigmoid(), 1),
        (fw.losses.LogitAdjusted([3, 2]), nn.Sigmoid(), 1),
    ],
)
def test_probabilities_are_told_for_costs_one_logit_and_functions(caplog, loss, tail, outputs):
    """Losses of costs, losses that take one logit and torch's functions are covered, and the right outputs are quiet."""
    x, y = inputs()
    if outputs == 1:
        y = (y > 0).float().unsqueeze(1)
    assert warnings_of(caplog, model_of(outputs, tail), loader_of(x, y), loss=loss) == ["probabilities"]
    right = nn.LogSoftmax(1) if loss is nn.functional.nll_loss else nn.Identity()
    assert warnings_of(caplog, model_of(outputs, right), loader_of(x, y), loss=loss) == []


@pytest.mark.parametrize("hand", [False, True])
def test_parameters_of_the_loss_outside_the_optimizer_are_named(caplog, hand):
    """A trainable temperature in the loss that no optimizer holds is named; one that is held, or frozen, is not."""

    class Tempered(fw.CrossEntropy):
        def __init__(self):
            super().__init__()
            self.log_t = nn.Parameter(torch.zeros(()))

        def sums(self, output, target, sample_weight=None):
            return super().sums(output * self.log_t.exp(), target, sample_weight)

    model, loss = model_of(), Tempered()
    assert warnings_of(caplog, model, loader_of(*inputs()), loss=loss, hand=hand) == ["untrained_parameters"]
    both = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.1)
    assert warnings_of(caplog, model, loader_of(*inputs()), loss=loss, optimizer=both, hand=hand) == []
    loss.requires_grad_(False)
    assert warnings_of(caplog, model, loader_of(*inputs()), loss=loss, hand=hand) == []


def test_labels_from_one_are_right_if_class_0_is_ignored(caplog):
    """With ignore_index=0, labels 1 and 2 are all that can count."""
    x, y = inputs(classes=2, first=1)
    assert warnings_of(caplog, model_of(3), loader_of(x, y), loss=fw.CrossEntropy(ignore_index=0)) == []
    assert warnings_of(caplog, model_of(3), loader_of(x, y)) == ["labels"]


def test_every_loader_of_a_dict_is_checked(caplog):
    """A second validation loader that shares examples, and a third that shuffles, are told by name."""
    x, y = inputs()
    val = {
        "first": loader_of(x[64:80], y[64:80]),
        "shared": loader_of(x[40:64], y[40:64]),
        "mixed": loader_of(x[80:], y[80:], shuffle=True),
    }
    trainer = fw.Trainer(model := model_of(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    trainer.fit(loader_of(x[:60], y[:60]), val, epochs=1)
    told = [r.getMessage() for r in caplog.records if "skip_checks" in r.getMessage()]
    assert [
        "20 of 24 validation examples in val_loader['shared']" in told[0],
        "val_loader['mixed'] shuffles" in told[1],
    ] == [
        True,
        True,
    ]
    assert len(told) == 2


def listed():
    x, y = inputs()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    named = [{"input": a, "target": b} for a, b in batches]
    arrays = [(a.numpy(), b) for a, b in batches]
    return {
        "the same batches": (batches, batches[4:], "all 64 validation"),
        "other tuples of the same tensors": (batches, [(a, b) for a, b in batches[10:]], "all 16 validation"),
        "other cuts of one tensor": (batches[:6], [(x[40:60], y[40:60])], "8 of 20 validation"),
        "dicts": (named[:6], named[5:], "8 of 56 validation"),
        "arrays": (arrays[:6], arrays[5:], "8 of 56 validation"),
        "a list and a loader": (batches[:6], loader_of(x[40:], y[40:]), "8 of 56 validation"),
        "a subset": (batches[:6], DataLoader(Subset(TensorDataset(x, y), range(46, 96, 2)), 5), "1 of 25 validation"),
        "disjoint": (batches[:6], batches[6:], None),
        "copies": (batches, [(a.clone(), b) for a, b in batches], None),
        "disjoint arrays": (arrays[:6], arrays[6:], None),
    }


@pytest.mark.parametrize("case", listed())
def test_shared_examples_are_counted_in_lists(caplog, case):
    """Lists of batches that share tensors or their memory are told with the number of examples, and copies are not."""
    train, val, text = listed()[case]
    fw.Trainer(model := model_of(), torch.optim.SGD(model.parameters(), 0.1), device="cpu").fit(train, val, epochs=1)
    assert (text in caplog.text) if text else ("validation examples" not in caplog.text)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("loss", "warns"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1])), True),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5])), False),
        (fw.losses.Focal(weight=[5.0, 1]), True),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(0.2)), True),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([5.0])), False),
    ],
)
def test_swapped_weights_of_the_loss_are_told(caplog, loss, warns, listed):
    """Weights given to the loss itself that fall with rarity are told, in a list of batches as in a data set."""
    x, y = inputs()
    y = (torch.arange(96) % 8 == 0).long()
    binary = isinstance(loss, nn.BCEWithLogitsLoss)
    y = y.float().unsqueeze(1) if binary else y
    loader = list(zip(x.split(16), y.split(16), strict=True)) if listed else loader_of(x, y)
    found = warnings_of(caplog, model_of(1 if binary else 2), loader, loss=loss)
    assert found == ["class_weights"] * warns
