"""Plain loaders are read fast, with the same batches and the same random numbers."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fitwatch as fw
from fitwatch.data.loading import read

N = 50


def dataset(*more):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long(), *more)


def generator():
    return torch.Generator().manual_seed(5)


PLAIN = {
    "in order": lambda: DataLoader(dataset(), 8),
    "shuffled": lambda: DataLoader(dataset(), 8, shuffle=True),
    "own generator": lambda: DataLoader(dataset(), 8, shuffle=True, generator=generator()),
    "drop_last": lambda: DataLoader(dataset(), 8, shuffle=True, drop_last=True),
    "with replacement": lambda: DataLoader(dataset(), 8, sampler=RandomSampler(dataset(), replacement=True)),
    "weighted": lambda: DataLoader(dataset(), 8, sampler=WeightedRandomSampler(torch.rand(N), 70)),
    "part": lambda: DataLoader(dataset(), 8, sampler=SubsetRandomSampler(range(10, 40))),
    "subset": lambda: DataLoader(Subset(dataset(), range(20, 45)), 8, shuffle=True),
    "subset of a subset": lambda: DataLoader(Subset(Subset(dataset(), range(5, 50, 2)), [3, 1, 1, 0, 9]), 2),
    "three tensors of other dtypes": lambda: DataLoader(
        dataset(torch.arange(N, dtype=torch.uint8), torch.rand(N, 3, 2, 2, dtype=torch.float64)), 8, shuffle=True
    ),
    "one tensor": lambda: DataLoader(TensorDataset(torch.rand(N, 2)), 8),
    "own batch sampler": lambda: DataLoader(dataset(), batch_sampler=[[3, 1], [-1, 0, 2], [7]]),
}


def same(a, b):
    return (
        type(a) is type(b)
        and len(a) == len(b)
        and all(
            torch.equal(s, t) and s.dtype is t.dtype and s.stride() == t.stride() for s, t in zip(a, b, strict=True)
        )
    )


@pytest.mark.parametrize("kind", PLAIN)
def test_batches_and_random_numbers_are_the_loaders(kind):
    """Three epochs give the loader's own batches, and leave the random generators where it leaves them."""
    seen = []
    for fast in (True, False):
        torch.manual_seed(1)
        loader = PLAIN[kind]()
        torch.manual_seed(2)
        epochs = [list(read(loader, fast=fast)) for _ in range(3)]
        drawn = None if loader.generator is None else loader.generator.get_state()
        seen.append((epochs, torch.get_rng_state(), drawn))
    (fast_epochs, *fast_rng), (epochs, *rng) = seen
    for a, b in zip(itertools.chain(*fast_epochs), itertools.chain(*epochs), strict=True):
        assert same(a, b)
    assert all(s is t is None or torch.equal(s, t) for s, t in zip(fast_rng, rng, strict=True))
    assert type(read(PLAIN[kind]())) is map


class Doubled(TensorDataset):
    """Gives other examples than its tensors."""

    def __getitem__(self, index):
        return tuple(t * 2 for t in super().__getitem__(index))


class Noise(Dataset):
    """Draws random numbers."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.rand(3), index


class OwnLoader(DataLoader):
    """Gives other batches than a DataLoader."""

    def __iter__(self):
        return iter(["other"])


OTHERS = {
    "subclass of TensorDataset": lambda: DataLoader(Doubled(*dataset().tensors), 8),
    "subset of a subclass": lambda: DataLoader(Subset(Doubled(*dataset().tensors), range(9)), 4),
    "data set that draws": lambda: DataLoader(Noise(), 8),
    "own collate_fn": lambda: DataLoader(dataset(), 8, collate_fn=list),
    "no batches": lambda: DataLoader(dataset(), batch_size=None),
    "subclass of DataLoader": lambda: OwnLoader(dataset(), 8),
    "strides": lambda: DataLoader(TensorDataset(torch.rand(4, N).T), 8),
    "list": lambda: [1, 2],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_loader_is_left_to_itself(kind):
    """Whatever could give other batches than its tensors is iterated as it is."""
    torch.manual_seed(0)
    expected = list(OTHERS[kind]())
    torch.manual_seed(0)
    batches = read(OTHERS[kind]())
    assert type(batches) is not map
    assert str(list(batches)) == str(expected)


def test_an_index_out_of_range_is_the_loaders_error():
    """A sampler that draws too far gets the data set's own error."""
    loader = DataLoader(dataset(), 2, sampler=[0, N])
    with pytest.raises(IndexError):
        list(read(loader))


def fit(loader, val, *, fast, by_hand=False):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    callbacks = [fw.OverfittingDetector(), fw.EarlyStopping("val/loss", patience=2)]
    if by_hand:
        options = {"train_loader": loader, "val_loader": val, "fast_loading": fast}
        with fw.Watch(model, optimizer, callbacks, **options) as watch:
            for _ in watch.epochs(4):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                watch.validate()
        history = watch.result.history
    else:
        trainer = fw.Trainer(model, optimizer, callbacks=callbacks, fast_loading=fast, seed=2, device="cpu")
        history = trainer.fit(loader, val, epochs=4).history
    return list(history), [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", ["shuffled", "weighted", "subset", "drop_last", "part", "own generator"])
def test_a_fit_is_the_same_to_the_bit(kind, by_hand):
    """History, weights and random numbers are the same with and without fast loading."""
    runs = []
    for fast in (True, False):
        torch.manual_seed(1)
        runs.append(fit(PLAIN[kind](), DataLoader(dataset(), 16), fast=fast, by_hand=by_hand))
    (history, weights, rng), (other_history, other_weights, other_rng) = runs
    assert history == other_history
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert torch.equal(rng, other_rng)


def test_a_fast_fit_is_the_plain_loop():
    """A fit over a shuffled loader has the weights of a loop written by hand over the same loader."""
    torch.manual_seed(1)
    model, plain = nn.Linear(4, 2), nn.Linear(4, 2)
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(2)
    fw.Trainer(model, optimizer, device="cpu").fit(DataLoader(dataset(), 8, shuffle=True), epochs=3)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    torch.manual_seed(2)
    loader = DataLoader(dataset(), 8, shuffle=True)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
