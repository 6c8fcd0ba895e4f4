"""Laws that hold for any batch sizes, windows, weights and stop points."""

import math
import tempfile

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def network(seed=0, drop=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(drop), nn.Linear(6, 3)).double()


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


@few
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    accumulate=st.integers(1, 5),
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_step_is_that_of_one_large_batch(sizes, accumulate, weights, seed):
    """However the examples of a step are split, weighted and cut short, the weights move as with all at once."""
    x, y = examples(sum(sizes), seed)
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    ours, theirs = network(seed), network(seed)
    loss = fw.CrossEntropy(torch.tensor(weights, dtype=torch.float64))
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    fw.Trainer(ours, optimizer, loss, accumulate=accumulate, device="cpu", quiet=True).fit(parts, epochs=1)
    plain = torch.optim.SGD(theirs.parameters(), 0.1)
    for start in range(0, len(parts), accumulate):
        inputs, targets = (torch.cat(part) for part in zip(*parts[start : start + accumulate], strict=True))
        plain.zero_grad()
        nn.functional.cross_entropy(theirs(inputs), targets, torch.tensor(weights, dtype=torch.float64)).backward()
        plain.step()
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@few
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 99), masked=st.booleans())
def test_a_validation_loss_does_not_depend_on_the_batches(sizes, seed, masked):
    """Each example counts once, with its weight, in batches of any sizes."""
    x, y = examples(sum(sizes), seed)
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    w[1:] = torch.where(torch.arange(1, len(x)) % 3 == 0, 0.0, w[1:]) if masked else w[1:]
    model = network(seed)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu", quiet=True)
    found = trainer.validate(list(zip(x.split(sizes), y.split(sizes), w.split(sizes), strict=True)))["val/loss"]
    model.eval()
    losses = nn.functional.cross_entropy(model(x), y, reduction="none").detach()
    torch.testing.assert_close(found, float((w * losses).sum() / w.sum()), rtol=1e-12, atol=0)


@few
@given(
    batch_size=st.integers(1, 9),
    accumulate=st.integers(1, 3),
    stop=st.floats(0, 0.99),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_fit_that_is_cut_off_anywhere_ends_as_the_whole_one(batch_size, accumulate, stop, shuffle, seed):
    """Resumed from any step, weights, momentum and losses are those of the whole fit, to the bit."""
    data = TensorDataset(*examples(20, seed))
    steps = 2 * math.ceil(math.ceil(len(data) / batch_size) / accumulate)

    def fit(folder, until, **how):
        model = network(seed, drop=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        trainer = fw.Trainer(
            model,
            optimizer,
            callbacks=fw.Checkpoint(folder, every_steps=1),
            accumulate=accumulate,
            device="cpu",
            seed=seed,
            quiet=True,
        )
        result = trainer.fit(DataLoader(data, batch_size, shuffle=shuffle), epochs=2, max_steps=until, **how)
        moments = [v for s in optimizer.state.values() for v in s.values()]
        return [*model.parameters(), *moments], result.history

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as cut:
        expected, history = fit(whole, steps)
        fit(cut, 1 + int(stop * (steps - 1)))
        found, again = fit(cut, steps, resume="auto")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert again[-1] == history[-1]
