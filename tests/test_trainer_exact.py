"""The loop against references computed another way: one big batch, torch's own loop, sums in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from fitwatch.engine.step import inverse

WEIGHT = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
FN, FP = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]])


def network(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def examples(binary):
    """30 examples sorted by class, so that micro-batches differ in weight as much as they can."""
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor([0] * 19 + [1] * 7 + [2] * 4)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64) + y[:, None]
    return x, (y > 0).double()[:, None] if binary else y


def weighted_reference(output, target):
    return nn.functional.cross_entropy(output, target, weight=WEIGHT)


def binary_reference(output, target):
    return nn.functional.binary_cross_entropy_with_logits(
        output, target, pos_weight=torch.tensor(7.0, dtype=torch.float64)
    )


def real_world_reference(output, target):
    p = output.softmax(1)
    a, b = FN.double()[target], FP.double()[target]
    return -(a * p.gather(1, target[:, None])[:, 0].log() + (b * (1 - p).log()).sum(1)).mean()


LOSSES = {
    "cross-entropy": (lambda: fw.CrossEntropy(WEIGHT), weighted_reference, 3),
    "torch cross-entropy": (lambda: nn.CrossEntropyLoss(WEIGHT), weighted_reference, 3),
    "binary": (lambda: fw.BinaryCrossEntropy(pos_weight=7.0), binary_reference, 1),
    "torch binary": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(7.0, dtype=torch.float64)),
        binary_reference,
        1,
    ),
    "real world": (lambda: fw.RealWorldCrossEntropy(FN, FP), real_world_reference, 3),
    "a user's mean": (
        lambda: lambda o, t: ((o.mean(1) - t) ** 2).mean(),
        lambda o, t: ((o.mean(1) - t) ** 2).mean(),
        3,
    ),
}
CUTS = {"even": [10, 10, 10], "uneven": [3, 1, 11, 15], "one by one": [1] * 30, "short last window": [7, 7, 7, 7, 2]}


class KeepGradients(fw.Callback):
    def __init__(self):
        self.seen = []

    def on_gradients_ready(self, state):
        self.seen.append([p.grad.clone() for p in state.model.parameters()])


def close(expected, actual):
    scale = max(float(e.detach().abs().max()) for e in expected)
    return all(float((e - a).detach().abs().max()) <= 1e-12 * scale for e, a in zip(expected, actual, strict=True))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_window_of_micro_batches_is_one_big_batch(name, cut):
    """Gradients, and the parameters after 10 steps, equal those of one big batch to 1e-12, however it is cut."""
    loss, reference, outputs = LOSSES[name]
    x, y = examples(binary=outputs == 1)
    ours, theirs = network(outputs), network(outputs)
    sizes = CUTS[cut]
    loader = list(zip(x.split(sizes), y.split(sizes), strict=True))
    keep = KeepGradients()
    trainer = fw.Trainer(
        ours, torch.optim.SGD(ours.parameters(), 0.1), loss(), callbacks=[keep], accumulate=len(sizes), device="cpu"
    )
    trainer.fit(loader, epochs=10)

    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for step in range(10):
        optimizer.zero_grad()
        reference(theirs(x), y).backward()
        assert close([p.grad for p in theirs.parameters()], keep.seen[step])
        optimizer.step()
    assert close(list(theirs.parameters()), list(ours.parameters()))


@pytest.mark.parametrize("name", LOSSES)
def test_a_short_last_window_is_a_step_of_its_own(name):
    """With 5 batches and accumulate 3, the second step is that of the last 2 batches as one."""
    loss, reference, outputs = LOSSES[name]
    x, y = examples(binary=outputs == 1)
    ours, theirs = network(outputs), network(outputs)
    sizes = [7, 7, 7, 7, 2]
    trainer = fw.Trainer(ours, torch.optim.SGD(ours.parameters(), 0.1), loss(), accumulate=3, device="cpu")
    trainer.fit(list(zip(x.split(sizes), y.split(sizes), strict=True)), epochs=2)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for _ in range(2):
        for window in (slice(0, 21), slice(21, 30)):
            optimizer.zero_grad()
            reference(theirs(x[window]), y[window]).backward()
            optimizer.step()
    assert close(list(theirs.parameters()), list(ours.parameters()))


@pytest.mark.parametrize("size", [1, 7, 16, 30])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_reported_losses_do_not_depend_on_the_batches(name, size, accumulate):
    """At learning rate 0, train/loss and val/loss equal the loss of the whole set as one batch to 1e-12."""
    loss, reference, outputs = LOSSES[name]
    x, y = examples(binary=outputs == 1)
    model = network(outputs)
    expected = reference(model(x), y).item()
    loader = DataLoader(TensorDataset(x, y), size)
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        loss(),
        accumulate=accumulate,
        metrics={"above": lambda o, t: (o.max(1).values > 0).double().std()},
        log_every=2,
        device="cpu",
    )
    result = trainer.fit(loader, loader, epochs=2)
    for entry in result.history:
        assert entry["train/loss"] == pytest.approx(expected, rel=1e-12)
        assert entry["val/loss"] == pytest.approx(expected, rel=1e-12)
        assert entry["val/above"] == pytest.approx((model(x).max(1).values > 0).double().std().item(), rel=1e-12)
    assert trainer.validate(loader)["val/loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loader", ["list", "DataLoader"])
@pytest.mark.parametrize(
    "make_loss", [lambda: None, nn.CrossEntropyLoss, fw.CrossEntropy, lambda: nn.functional.cross_entropy]
)
def test_without_weights_it_is_the_plain_loop_to_the_bit(make_loss, loader):
    """With weights off and accumulate 1, 3 epochs of shuffling, dropout and Adam end in the plain loop's own bits."""
    x, y = examples(binary=False)
    x = x.float()

    def start():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        data = DataLoader(TensorDataset(x, y), 8, shuffle=True)
        if loader == "list":
            data = list(data)
        return net, torch.optim.Adam(net.parameters(), 0.01), data

    net, optimizer, data = start()
    for _ in range(3):
        for inputs, targets in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()

    ours, optimizer, data = start()
    fw.Trainer(ours, optimizer, make_loss(), device="cpu").fit(data, epochs=3)
    for expected, actual in zip(net.parameters(), ours.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_a_window_without_weight_moves_nothing():
    """Batches whose targets are all ignored, or of classes of weight 0, change no weight, and end in an error."""
    model = network(3)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 4, dtype=torch.float64)
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), fw.CrossEntropy([0.0, 1.0, 1.0]), device="cpu"
    )
    with pytest.raises(ValueError, match="no example of the last 2 steps counted"):
        trainer.fit([(x, torch.tensor([0, 0, -100, 0])), (x, torch.full((4,), -100))], epochs=1)
    assert trainer.state.progress.step == 2
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_scales_the_whole_gradient_of_the_step(accumulate):
    """clip_norm scales the accumulated gradient to that norm; on_gradients_ready sees it before."""
    x, y = examples(binary=False)
    ours, theirs = network(3), network(3)
    keep = KeepGradients()
    fw.Trainer(
        ours,
        torch.optim.SGD(ours.parameters(), 1.0),
        fw.CrossEntropy(WEIGHT),
        callbacks=[keep],
        accumulate=accumulate,
        clip_norm=0.01,
        device="cpu",
    ).fit(list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)), epochs=1)
    weighted_reference(theirs(x), y).backward()
    assert close([p.grad for p in theirs.parameters()], keep.seen[0])
    moved = torch.cat([(a - b).flatten() for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_float16_with_a_scaler_gives_the_same_gradient(accumulate):
    """Under fp16, once the scaler has found its scale, callbacks see the big batch's gradient to half precision."""
    x, y = examples(binary=False)
    ours, theirs = network(3).float(), network(3).float()
    keep = KeepGradients()
    trainer = fw.Trainer(
        ours,
        torch.optim.SGD(ours.parameters(), 0.0),
        fw.CrossEntropy(WEIGHT),
        callbacks=[keep],
        accumulate=accumulate,
        precision="fp16",
        device="cpu",
    )
    # an ignored batch comes first: the guess of the weight must survive it
    loader = [(x.float()[:2], torch.full((2,), -100))] * (accumulate > 1)
    loader += list(zip(x.float().chunk(accumulate), y.chunk(accumulate), strict=True))[: accumulate - len(loader)]
    loader = loader * 2  # two windows an epoch: the second is divided by the guess that the first left
    if accumulate > 1:
        loader[-1] = (x.float()[20:], y[20:])
    window = loader[-accumulate:]
    seen = torch.cat([inputs for inputs, _ in window]), torch.cat([targets for _, targets in window])
    trainer.fit(loader, epochs=8)
    nn.functional.cross_entropy(theirs(seen[0]), seen[1], weight=WEIGHT.float()).backward()
    for expected, actual in zip(theirs.parameters(), keep.seen[-1], strict=True):
        assert torch.allclose(expected.grad, actual, rtol=0.02, atol=2e-3)


def test_bfloat16_runs_the_model_in_bfloat16_and_the_loss_in_float32():
    """Under bf16 the model's outputs are bfloat16, and the loss is close to that of float32."""
    x, y = examples(binary=False)
    model = network(3).float()
    seen = []

    class Look(fw.Trainer):
        def compute_loss(self, output, target):
            seen.append(output.dtype)
            return super().compute_loss(output, target)

    expected = nn.functional.cross_entropy(model(x.float()), y).item()
    trainer = Look(model, torch.optim.SGD(model.parameters(), 0.0), precision="bf16", device="cpu")
    result = trainer.fit([(x.float(), y)], epochs=1)
    assert set(seen) == {torch.bfloat16}
    assert result.history[0]["train/loss"] == pytest.approx(expected, rel=0.01)


def test_layers_of_different_precision_are_divided_in_full_precision():
    """Under accumulation the float64 gradients of a model whose first layer is bfloat16 are exact to 1e-12."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(self.first(x.bfloat16()).double())

    x, y = examples(binary=False)
    ours, theirs = Mixed(), Mixed()
    keep = KeepGradients()
    fw.Trainer(
        ours,
        torch.optim.SGD(ours.parameters(), 0.1),
        fw.CrossEntropy(WEIGHT),
        callbacks=[keep],
        accumulate=3,
        device="cpu",
    ).fit(list(zip(x.split([7, 11, 12]), y.split([7, 11, 12]), strict=True)), epochs=1)
    weighted_reference(theirs(x), y).backward()
    assert close([theirs.head.weight.grad, theirs.head.bias.grad], keep.seen[0][2:])


@pytest.mark.parametrize("weight", [torch.float32, torch.float64, None])
def test_off_the_cpu_the_weight_is_not_read(weight):
    """On a device whose values can't be read (meta) 1 / weight is taken without a look, in the loss's own dtype."""
    loss = torch.zeros((), device="meta", dtype=torch.float64)
    given = 7.0 if weight is None else torch.ones((), device="meta", dtype=weight)
    scale = inverse(given, loss)
    assert (scale.device.type, scale.dtype, scale.shape) == ("meta", torch.float64, ())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_penalty_and_a_factor_act_on_the_mean(accumulate):
    """2 loss + penalty in a step has the gradient of 2 mean + penalty over all of its micro-batches, weights included."""
    torch.manual_seed(0)
    x, y, w = torch.randn(30, 4).double(), torch.randint(3, (30,)), torch.tensor([1.0, 2, 5]).double()
    model = nn.Linear(4, 3).double()
    reference = copy.deepcopy(model)

    class Penalised(fw.Trainer):
        def training_step(self, batch):
            penalty = sum(p.square().sum() for p in self.model.parameters())
            return 2 * self.compute_loss(self.model(batch[0]), batch[1]) + 0.1 * penalty

    loss = fw.CrossEntropy(w)
    trainer = Penalised(
        model, torch.optim.SGD(model.parameters(), 0.5), loss, accumulate=accumulate, device="cpu", log_every=1
    )
    batches = [(x, y)] if accumulate == 1 else list(zip(x.split((7, 20, 3)), y.split((7, 20, 3)), strict=True))
    trainer.fit(batches, epochs=1)
    total = 2 * F.cross_entropy(reference(x), y, w) + 0.1 * sum(p.square().sum() for p in reference.parameters())
    total.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * q.grad, rtol=1e-12, atol=1e-12)


def test_sums_of_two_losses_are_refused():
    """Two fractions can't be added by their parts."""
    one = fw.LossSum(torch.tensor(1.0), 2)
    with pytest.raises(TypeError, match="add their means"):
        one + one
