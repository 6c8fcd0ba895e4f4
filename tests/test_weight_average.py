"""WeightAverage, and that what counts as the best are the weights that were measured."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import DataLoader

import fitwatch as fw


def network(seed=0, *, norm=False, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def trainer_of(model, *callbacks, lr=0.1, **options):
    return fw.Trainer(model, torch.optim.SGD(model.parameters(), lr), callbacks=callbacks, device="cpu", **options)


class Swap(fw.Callback):
    """A user's own average over the steps, as one writes it: swapped for validation, with nothing said of order."""

    def on_fit_start(self, state):
        self.average = [t.detach().clone() for t in state.model.state_dict().values()]

    def on_step_end(self, state):
        for average, now in zip(self.average, state.model.state_dict().values(), strict=True):
            average.copy_(average * 0.9 + now * 0.1)

    def on_validation_start(self, state):
        for here, average in zip(state.model.state_dict().values(), self.average, strict=True):
            kept = here.clone()
            here.copy_(average)
            average.copy_(kept)

    on_validation_end = on_validation_start


class TwoFaced(torch.optim.SGD):
    """Has other weights in eval mode than in train mode, as optimizers without a schedule do."""

    def _shift(self, by):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.data += by  # unseen by the version counter

    def eval(self):
        self._shift(0.5)

    def train(self):
        self._shift(-0.5)


class Modes(fw.Callback):
    """Puts such an optimizer into eval mode for validation."""

    def on_validation_start(self, state):
        state.optimizer.eval()

    def on_validation_end(self, state):
        state.optimizer.train()


@pytest.mark.parametrize("swapper", [Swap, Modes, fw.WeightAverage])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("norm", [False, True])
def test_the_best_is_what_was_measured(data, tmp_path, swapper, order, norm):
    """Early stopping's weights and best.pt have the loss that made them the best, whatever the order of callbacks."""
    model = network(norm=norm)
    swap = fw.WeightAverage(0.9) if swapper is fw.WeightAverage else swapper()
    parts = [swap, fw.EarlyStopping(patience=50), fw.Checkpoint(tmp_path)]
    optimizer = (TwoFaced if swapper is Modes else torch.optim.SGD)(model.parameters(), 0.5)
    trainer = fw.Trainer(model, optimizer, callbacks=[parts[i] for i in order], device="cpu")
    val = DataLoader(data, 64)
    result = trainer.fit(DataLoader(data, 16, shuffle=True), val, epochs=6)
    best = result.best.metrics["val/loss"]
    fresh = network(seed=9, norm=norm)
    fresh.load_state_dict(torch.load(tmp_path / "best.pt")["model"])
    assert trainer_of(fresh).validate(val)["val/loss"] == best
    assert trainer.validate(val)["val/loss"] == best


def test_the_verdict_restores_what_was_measured(data):
    """action="restore" restores the weights of the lowest validation loss as they were measured."""
    model = network()
    rule = fw.rules.OverfittingRule(min_rise=1e-6, errors=0.0, noise=0.0, span=1)
    detector = fw.OverfittingDetector(rule=rule, action="restore", probe_examples=0)
    trainer = trainer_of(model, Swap(), detector, lr=0.5)
    x, y = data.tensors
    noisy = [(x[:24], torch.randint(3, (24,)))]
    result = trainer.fit(noisy, [(x, y)], epochs=60)
    assert result.verdict.overfitting
    best = min(entry["val/loss"] for entry in result.history)
    assert trainer.validate([(x, y)])["val/loss"] == best


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("start_epoch", [0, 2])
def test_weight_average_equals_torchs_average(model, data, decay, start_epoch):
    """The model ends with the average that torch's AveragedModel makes in a plain loop of the same steps."""
    twin = copy.deepcopy(model)
    loader = DataLoader(data, 16)
    trainer_of(model, fw.WeightAverage(decay, start_epoch=start_epoch)).fit(loader, DataLoader(data, 64), epochs=4)
    function = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
    average, optimizer = AveragedModel(twin, multi_avg_fn=function), torch.optim.SGD(twin.parameters(), 0.1)
    for epoch in range(4):
        for x, y in loader:
            nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if epoch >= start_epoch:
                average.update_parameters(twin)
    for ours, theirs in zip(model.parameters(), average.module.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_weight_average_leaves_training_alone(model, data):
    """Training losses are equal to the bit with and without the average: only validation sees it."""
    seen = []
    for callbacks in ([fw.WeightAverage(0.5)], []):
        trainer = trainer_of(copy.deepcopy(model), *callbacks)
        seen.append(
            [e["train/loss"] for e in trainer.fit(DataLoader(data, 16), DataLoader(data, 64), epochs=4).history]
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("decay", [0.5, None])
def test_statistics_are_averaged_and_other_buffers_are_not(data, decay):
    """The running mean is the average of those after each step; a counter, a mask and infinities are the model's own."""
    model = network(norm=True)
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("far", torch.tensor([float("inf"), 1.0]))
    means = []

    class Keep(fw.Callback):
        def on_step_end(self, state):
            means.append(model[1].running_mean.clone())

    trainer_of(model, fw.WeightAverage(decay), Keep()).fit(DataLoader(data, 16), epochs=2)
    expected = means[0]
    for mean in means[1:]:
        expected = 0.5 * expected + 0.5 * mean
    if decay is None:
        expected = torch.stack(means).mean(0)
    assert torch.allclose(model[1].running_mean, expected, rtol=1e-12)
    assert int(model[1].num_batches_tracked) == len(means) == 8
    assert model.mask.tolist() == [True, False]
    assert model.far.tolist() == [float("inf"), 1.0]


@pytest.mark.parametrize("decay", [0.9, None])
def test_weight_average_resumes_to_the_bit(data, tmp_path, decay):
    """Interrupted after two epochs of five and resumed, history and final weights are those of one go."""

    def run(epochs, folder):
        model = network(norm=True)
        trainer = trainer_of(model, fw.Checkpoint(tmp_path / folder), fw.WeightAverage(decay), fw.EarlyStopping())
        history = trainer.fit(DataLoader(data, 16), DataLoader(data, 64), epochs=epochs, resume="auto").history
        return history, model.state_dict()

    run(2, "cut")
    (history, weights), (expected, once) = run(5, "cut"), run(5, "whole")
    assert history == expected
    assert all(torch.equal(weights[name], once[name]) for name in once)


def test_best_has_the_weights_in_training_too(model, data, tmp_path):
    """If best.pt has an average as its model, it keeps the weights to resume with beside it; otherwise it has none."""
    plain = copy.deepcopy(model)
    loader = [data.tensors] * 4
    trainer_of(model, fw.WeightAverage(0.5), fw.Checkpoint(tmp_path / "a")).fit(loader, loader, epochs=1)
    trainer_of(plain, fw.Checkpoint(tmp_path / "b")).fit(loader, loader, epochs=1)
    averaged, alone = (torch.load(tmp_path / name / "best.pt") for name in "ab")
    assert alone["trained"] is None
    assert all(torch.equal(averaged["trained"][name], w) for name, w in plain.state_dict().items())
    assert all(torch.equal(averaged["model"][name], w) for name, w in model.state_dict().items())


def test_weight_average_on_a_watch_after_an_error(model, data):
    """After an exception within a validation the model of a hand-written loop still ends with the average."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    after = []

    class Keep(fw.Callback):
        def on_step_end(self, state):
            after.append([p.detach().clone() for p in model.parameters()])

    x, y = data.tensors
    parts = [fw.WeightAverage(None), Keep()]
    watch = fw.Watch(model, optimizer, parts, train_loader=[(x, y)] * 3, val_loader=[(x, y)])

    def loop():
        with watch:
            for _ in watch.epochs(1):
                for inputs, targets in watch.train():
                    watch.loss(model(inputs), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                with watch.validating():
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    expected = [torch.stack(parts).mean(0) for parts in zip(*after, strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: fw.WeightAverage(1.0), ValueError, "decay must be below 1"),
        (lambda: fw.WeightAverage(-0.1), ValueError, "decay must be finite and 0 or more"),
        (lambda: fw.WeightAverage("0.9"), TypeError, "decay must be a number"),
        (lambda: fw.WeightAverage(start_epoch=-1), ValueError, "start_epoch must be 0 or more"),
    ],
)
def test_weight_average_refuses_bad_options(make, kind, match):
    """An option out of range or of another type is an error that names it."""
    with pytest.raises(kind, match=match):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_average_refuses_half_precision(dtype):
    """Half precision swallows the small changes of an average, so it is refused with what to do."""
    model = network(dtype=dtype)
    x, y = torch.randn(8, 4).to(dtype), torch.randint(3, (8,))
    with pytest.raises(TypeError, match=r"can't average 0\.weight.*use autocast"):
        trainer_of(model, fw.WeightAverage()).fit([(x, y)], epochs=1)
