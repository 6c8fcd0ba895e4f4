"""Healthy trainings that look faulty for a while raise few or no gradient warnings."""

import pytest
import torch
from torch import nn

import fitwatch as fw


class Texts(fw.Callback):
    """Keeps the warnings, the notes, and the numbers by name."""

    def __init__(self):
        self.warnings, self.notes, self.numbers = [], [], {}

    def on_log(self, state):
        for record in state.records:
            if record.name == "train/report/warnings":
                self.warnings += record.value.split("\n\n")
            elif record.name == "train/report/gradients":
                self.notes += record.value.split("\n\n")
            elif isinstance(record.value, float):
                self.numbers.setdefault(record.name, []).append(record.value)


class Plain(fw.Trainer):
    """Uses the model output as the loss."""

    def training_step(self, batch):
        return self.model(*batch)


def fit(model, batches, optimizer, *, before=(), after=(), trainer=fw.Trainer, options=None, epochs=1, **more):
    """Train and return the texts and the trainer."""
    texts = Texts()
    callbacks = [*before, fw.GradientNorm(**(options or {})), *after, texts]
    made = trainer(model, optimizer, more.pop("loss", None), callbacks=callbacks, device="cpu", **more)
    made.fit(batches, epochs=epochs)
    return texts, made


def regression(count, *, size=16, features=6):
    x = torch.randn(count * size, features)
    y = x @ torch.randn(features, 1) + 0.3 * torch.randn(len(x), 1)
    return list(zip(x.split(size), y.split(size), strict=True))


class RareExpert(nn.Module):
    """An expert that has a gradient in few batches."""

    def __init__(self, limit):
        super().__init__()
        self.common, self.rare, self.out, self.limit = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 1), limit

    def forward(self, x):
        chosen = x[:, 0] > self.limit
        hidden = self.common(x).relu()
        if chosen.any():
            hidden = hidden.index_add(0, chosen.nonzero()[:, 0], self.rare(x[chosen]))
        return self.out(hidden)


class RareCategory(nn.Module):
    """An embedding whose gradient is zero unless a batch has a rare category."""

    def __init__(self, limit):
        super().__init__()
        self.common, self.rare, self.out = nn.Linear(6, 8), nn.Embedding(2, 8, padding_idx=0), nn.Linear(8, 1)
        self.limit = limit

    def forward(self, x):
        return self.out(self.common(x).relu() + self.rare((x[:, 0] > self.limit).long()))


@pytest.mark.parametrize("log_every", [5, 20, 50])
@pytest.mark.parametrize("make", [RareExpert, RareCategory])
def test_a_rarely_used_layer_gives_few_warnings(make, log_every):
    """A layer used in 3 % of 2,000 steps gives at most three warnings, none of them frozen or exploding."""
    model = make(limit=2.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    texts, _ = fit(model, regression(500), optimizer, loss=nn.MSELoss(), epochs=4, log_every=log_every)
    faults = [text for text in texts.warnings if not text.startswith("No longer")]
    assert len(faults) <= 3
    assert not [text for text in faults if text.startswith(("Frozen", "Exploding"))]


class Alternating(nn.Module):
    """A GAN whose generator has a gradient in every other run of five steps."""

    def __init__(self):
        super().__init__()
        self.g, self.d, self.calls = nn.Linear(3, 6), nn.Linear(6, 1), 0

    def forward(self, x, _):
        self.calls += 1
        made = self.g(torch.randn(len(x), 3))
        if (self.calls - 1) // 5 % 2:
            return -nn.functional.logsigmoid(self.d(made)).mean()
        return -(nn.functional.logsigmoid(self.d(x)) + nn.functional.logsigmoid(-self.d(made.detach()))).mean()


def test_parts_trained_in_turn_are_soon_left_alone():
    """With windows as long as the turns of a GAN, 40 windows give at most two warnings."""
    model = Alternating()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    texts, _ = fit(model, regression(400), optimizer, trainer=Plain, log_every=5)
    assert len([text for text in texts.warnings if text.startswith("No gradient")]) <= 2
    assert "No longer without a gradient: `g`." in texts.warnings[1]


def test_a_learning_rate_of_zero_is_a_note():
    """A learning rate of 0 for twenty steps, then 0.1, gives notes with the right rate but no warning."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 20))
    texts, _ = fit(model, regression(40), optimizer, loss=nn.MSELoss(), scheduler=schedule, log_every=10)
    assert texts.warnings == []
    first, second = texts.notes
    assert first == "Not trained: `0`, `2` (its learning rate is 0)."
    assert second.startswith("Now trained")


class Freeze(fw.Callback):
    """Freezes a layer at the start of the second epoch, or after a batch of it."""

    def __init__(self, at):
        self.at = at

    def on_epoch_start(self, state):
        if state.progress.epoch == 1 and self.at == 0:
            state.model[0].requires_grad_(requires_grad=False)

    def on_batch_end(self, state):
        if state.progress.epoch == 1 and state.progress.epoch_batch == self.at:
            state.model[0].requires_grad_(requires_grad=False)


@pytest.mark.parametrize("at", [0, 10])
def test_layers_that_a_later_callback_freezes(at):
    """A layer frozen by a later callback, at or after the start of an epoch, is noted with the reason."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    texts, trainer = fit(model, regression(20), optimizer, after=[Freeze(at)], loss=nn.MSELoss(), epochs=3, log_every=5)
    assert texts.warnings == []
    assert texts.notes == ["Not trained: `0` (requires_grad is False)."]
    assert trainer.state.report["layers not healthy"]() == "none"
    assert trainer.state.report["layers not trained"]() == "`0`"


class Scaled(nn.Module):
    """A residual branch whose scale starts at 1e-6, as in ConvNeXt."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.scale = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x):
        return x + self.scale * self.b(nn.functional.gelu(self.a(self.norm(x))))


def test_branches_that_start_near_zero_may_grow_while_the_rate_rises():
    """With LayerScale and a long warm-up the small early gradients do not count as vanishing."""
    model = nn.Sequential(nn.Linear(6, 8), Scaled(8), Scaled(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 1000))
    texts, _ = fit(model, regression(200), optimizer, loss=nn.MSELoss(), scheduler=schedule, log_every=10)
    assert texts.warnings == []


def test_a_vanishing_gradient_is_named_in_a_long_warm_up():
    """Ten sigmoid layers are reported after 100 steps even if the learning rate still rises."""
    layers = [part for _ in range(10) for part in (nn.Linear(6, 6), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 1000))
    texts, _ = fit(model, regression(110), optimizer, loss=nn.MSELoss(), scheduler=schedule, log_every=10)
    assert texts.warnings[0].startswith("Vanishing gradient in `0`")
    assert "(steps 91 to 100)" in texts.warnings[0]


def test_a_bias_before_a_batch_norm_is_not_vanishing():
    """Its gradient is only rounding noise, which is not reported even with one layer per parameter."""
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    texts, _ = fit(model, regression(100), optimizer, loss=nn.MSELoss(), options={"layers": ".*"}, log_every=10)
    assert texts.warnings == []


def test_a_window_of_overflows_logs_no_norm_of_a_layer():
    """A window in which the GradScaler skipped every step logs neither layer norms nor the total."""

    class Overflow(fw.Callback):
        def on_batch_end(self, state):
            if state.progress.step in (2, 3):
                state.model[0].weight.grad.fill_(float("inf"))

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    texts, _ = fit(
        model, regression(6), optimizer, before=[Overflow()], loss=nn.MSELoss(), precision="fp16", log_every=2
    )
    shares = texts.numbers["train/optim/skipped_share"]
    assert shares[1:] == [1.0, 0.0]  # the scale it begins with may overflow as well
    for name in ("optim/grad_norm", "params/grad_norm/0", "params/grad_norm_max/0", "params/zero_share/2"):
        assert len(texts.numbers[f"train/{name}"]) == 2
        assert all(0 <= value < float("inf") for value in texts.numbers[f"train/{name}"])
    assert min(texts.numbers["train/params/grad_norm_max/0"]) > 0


def test_the_rule_given_is_the_one_that_decides():
    """A rule passed in is used in two fits and reset before the second."""
    rule = fw.rules.GradientRule(vanishing=1e-4)
    model = nn.Linear(6, 1)
    optimizer, norm = torch.optim.SGD(model.parameters(), 0.1), fw.GradientNorm(rule=rule)
    trainer = fw.Trainer(model, optimizer, nn.MSELoss(), callbacks=[norm], device="cpu")
    trainer.fit(regression(10), epochs=1)
    trainer.fit(regression(15), epochs=1)
    assert norm.rule is rule
    assert rule.norms.total == 15
    assert rule.vanishing == 1e-4


@pytest.mark.parametrize("hidden", [None, 32])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_training_again_with_the_suggested_clip_norm_changes_little(hidden, noise):
    """Training clipped to the suggested value clips under a tenth of its steps and reaches the same loss."""
    x = torch.randn(3200, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 2, dtype=torch.float64)
    y += noise * torch.randn_like(y)
    batches = list(zip(x.split(32), y.split(32), strict=True))

    def run(clip_norm):
        torch.manual_seed(1)
        layers = [nn.Linear(6, 2)] if hidden is None else [nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 2)]
        model, norm, texts = nn.Sequential(*layers).double(), fw.GradientNorm(), Texts()
        optimizer = torch.optim.SGD(model.parameters(), 0.1 if hidden is None else 0.05)
        trainer = fw.Trainer(model, optimizer, nn.MSELoss(), callbacks=[norm, texts], clip_norm=clip_norm, device="cpu")
        result = trainer.fit(batches, epochs=5)
        return norm.suggested_clip_norm, result.history[-1]["train/loss"], texts

    suggested, loss, _ = run(None)
    _, clipped_loss, texts = run(suggested)
    shares = texts.numbers["train/optim/clipped_share"]
    assert sum(shares) / len(shares) < 0.1
    assert pytest.approx(loss, rel=0.1, abs=1e-20) == clipped_loss
