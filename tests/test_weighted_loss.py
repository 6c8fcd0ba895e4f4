"""Class weights from the training data."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import fitwatch as fw


def fit(model, loader, spec="balanced", loss=None, **options):
    """One epoch at learning rate 0; gives the loss in force."""
    callback = fw.WeightedLoss(spec, **options)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.0), loss, callbacks=[callback], device="cpu")
    result = trainer.fit(loader, loader, epochs=1)
    return trainer.state.loss, result


class Images(Dataset):
    """Reading an example is an error: its targets are exposed."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        raise AssertionError("an example was read")


class Hidden(Dataset):
    """Exposes nothing."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


EXPECTED = torch.tensor([64 / (3 * 40), 64 / (3 * 16), 64 / (3 * 8)])


@pytest.mark.parametrize("kind", ["tensors", "subset", "list of batches", "hidden"])
def test_balanced_weights_are_counted_from_any_loader(model, data, kind):
    """Counts 40, 16, 8 give weights N / (K n_c), read from the data set or by a pass."""
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
    """Training after a counting pass over a shuffling loader is that without one, to the bit."""

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


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": [0, 1]},
        {"targets": ["cat"] * 64},
        {"targets": [0] * 64, "target_transform": lambda y: y},
        {"targets": "0"},
    ],
    ids=["names of classes", "strings", "target_transform", "string"],
)
def test_exposed_targets_that_are_not_the_loaders_are_not_taken(model, data, attributes):
    """Labels of another length, strings, and targets under a target_transform are counted by a pass instead."""
    dataset = Hidden(data)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    loss, _ = fit(model, DataLoader(dataset, 16))
    assert torch.allclose(EXPECTED, loss.weight)


def test_multi_label_targets_are_refused():
    """Several labels an example are refused with what to do instead."""
    dataset = TensorDataset(torch.zeros(8, 4).double(), torch.ones(8, 3).double())
    with pytest.raises(TypeError, match="3 labels an example.*pos_weight"):
        fit(nn.Linear(4, 3).double(), DataLoader(dataset, 4), loss=fw.BinaryCrossEntropy())


def test_binary_cross_entropy_gets_a_pos_weight(data):
    """With binary cross-entropy, balanced weights are pos_weight = n_neg / n_pos."""
    x, y = data.tensors
    model = nn.Linear(4, 1).double()
    for loss in (fw.BinaryCrossEntropy(), nn.BCEWithLogitsLoss()):
        used, _ = fit(model, [(x, (y == 2).double()[:, None])], loss=loss)
        assert used.pos_weight.item() == pytest.approx(56 / 8)


def test_given_weights_and_the_unweighted_loss_beside(model, data):
    """A dict is taken as it is, torch's own loss gets it, and history has the loss with and without weights."""
    loss, result = fit(model, DataLoader(data, 16), {0: 1.0, 1: 2.0, 2: 5.0}, loss=nn.CrossEntropyLoss())
    x, y = data.tensors
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    entry = result.history[0]
    assert torch.equal(weight.float(), loss.weight)
    assert entry["val/loss"] == pytest.approx(nn.functional.cross_entropy(model(x), y, weight=weight).item(), rel=1e-12)
    assert entry["val/loss_unweighted"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-12)


def test_an_absent_class_is_an_error_or_gets_weight_0(data):
    """A class without examples is named; with absent="zero" its weight is 0 and training goes on."""
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
    """Unknown schemes, and weights that are negative, NaN, all zero or incomplete, are refused at once."""
    with pytest.raises(ValueError, match=named):
        fw.WeightedLoss(spec)


def test_weights_of_the_wrong_length_are_refused(model, data):
    """Two weights for three classes are an error that names both numbers."""
    with pytest.raises(ValueError, match="(?s)2.*3|3.*2"):
        fit(model, DataLoader(data, 16), [1.0, 2.0])


def test_losses_that_take_no_weights_are_refused(model, data):
    """A user's own loss and a loss that carries costs are refused by name."""
    with pytest.raises(TypeError, match="class weights.*MSELoss"):
        fit(model, DataLoader(data, 16), loss=nn.MSELoss())
    with pytest.raises(TypeError, match="costs"):
        fit(model, DataLoader(data, 16), loss=fw.RealWorldCrossEntropy(torch.ones(3), torch.zeros(3, 3)))


def test_an_iterator_is_not_used_up_by_counting(model, data):
    """A generator can't be counted without using it up: an error, and it is still whole."""
    generator = (batch for batch in DataLoader(data, 16))
    with pytest.raises(TypeError, match="iterator"):
        fit(model, generator)
    assert len(list(generator)) == 4


def test_counts_come_from_the_data_not_from_the_sampler(model, data):
    """A sampler that balances the batches does not hide the imbalance of the data set."""
    sampler = WeightedRandomSampler([1.0] * 40 + [2.5] * 16 + [5.0] * 8, 64)
    loss, _ = fit(model, DataLoader(data, 16, sampler=sampler))
    assert torch.allclose(EXPECTED, loss.weight)


def test_a_split_by_sampler_is_counted_as_drawn(model, data):
    """A SubsetRandomSampler that draws a part of the data set has that part counted."""
    part = [*range(20), *range(40, 50), *range(56, 60)]  # 20, 10 and 4 examples
    loss, _ = fit(model, DataLoader(data, 16, sampler=SubsetRandomSampler(part)))
    assert torch.allclose(torch.tensor([34 / 60, 34 / 30, 34 / 12]), loss.weight)


def test_a_resumed_run_keeps_the_weights_it_counted(tmp_path, model, data):
    """On resume with other data the counted weights stay; weights given anew are taken."""

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
