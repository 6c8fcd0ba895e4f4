"""No step with non-finite gradients reaches the weights."""

import itertools
import logging
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch.engine.guard import all_finite
from fitwatch.rules import SpikeRule

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


class Bad(fw.Trainer):
    """Multiplies the loss, or one gradient, of given batches by a bad value."""

    where, value, at = "loss", math.nan, (3,)

    def training_step(self, batch):
        loss = super().training_step(batch)
        progress = self.state.progress
        if progress.epoch_batch + 10 * progress.epoch not in self.at:
            return loss
        if self.where == "loss":
            return loss * self.value
        self.model[0].bias.register_hook(lambda g: g * self.value) if self.where == "gradient" else None
        if self.where == "outputs":
            return self.compute_loss(self.model(batch[0]) * self.value, batch[1])
        return loss


def batches(n=10):
    torch.manual_seed(0)
    return [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(n)]


def trainer_of(optimizer="SGD", where="loss", value=math.nan, at=(3,), **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    trainer = Bad(model, OPTIMIZERS[optimizer](model.parameters()), device="cpu", **options)
    trainer.where, trainer.value, trainer.at = where, value, at
    return trainer


def snapshot(trainer):
    state = trainer.optimizer.state_dict()["state"]
    held = [v for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in (*trainer.model.state_dict().values(), *held)]


class Snapshots(fw.Callback):
    """Keeps the weights and the optimizer's state after each step."""

    def __init__(self):
        self.taken = []
        self.trainer = None

    def on_step_end(self, state):
        self.taken.append(snapshot(self.trainer))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "outputs"])
def test_a_bad_step_raises_before_the_weights_change(where, value, clip_norm, accumulate):
    """The error names step, epoch, batch and parameter, and the weights are those of the step before."""
    keep = Snapshots()
    trainer = trainer_of(where=where, value=value, clip_norm=clip_norm, accumulate=accumulate, callbacks=keep)
    keep.trainer = trainer
    with pytest.raises(FloatingPointError) as info:
        trainer.fit(batches(), epochs=1)
    step = 3 // accumulate + 1
    assert f"step {step} (epoch 1, batch index 3)" in str(info.value)
    assert "`0.weight`" in str(info.value)
    assert f"still those of step {step - 1}" in str(info.value)
    assert trainer.state.progress.step == step - 1
    assert all(torch.equal(a, b) for a, b in zip(keep.taken[-1], snapshot(trainer), strict=True))


def test_a_bad_gradient_under_a_finite_loss_is_named(caplog):
    """A single bad gradient is named alone, and the inspector's finding of that step is not lost."""
    trainer = trainer_of(where="gradient", callbacks=fw.GradientNorm())
    with pytest.raises(FloatingPointError, match=r"in 1 parameter \(`0.bias`\)"):
        trainer.fit(batches(), epochs=1)
    assert "the gradient of `0.bias` is not finite" in caplog.text


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(optimizer, caplog):
    """Weights and optimizer state are, to the bit, those of a fit without the bad batches."""
    at = (3, 4, 12)
    trainer = trainer_of(optimizer, at=at, nonfinite="skip")
    counts = []

    class Count(fw.Callback):
        def on_log(self, state):
            counts.extend(r.value for r in state.records if r.name == "train/skipped_steps")

    trainer.callbacks = [Count()]
    with caplog.at_level(logging.WARNING, "fitwatch"):
        trainer.fit(data := batches(), epochs=2)
    assert counts[-1] == 3
    assert sum("is left out, and train/skipped_steps counts" in r.getMessage() for r in caplog.records) == 1
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = fw.Trainer(model, OPTIMIZERS[optimizer](model.parameters()), device="cpu")
    good = [b for i, b in enumerate(itertools.chain(data, data)) if i not in at]
    plain.fit(good, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(trainer), snapshot(plain), strict=True))


def test_a_hand_written_loop_is_guarded_too():
    """optimizer.step() raises before it changes the weights, or changes nothing with "skip"."""
    x, y = batches(1)[0]
    for nonfinite in ("raise", "skip"):
        model = nn.Linear(4, 3)
        before = model.weight.detach().clone()
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        with fw.Watch(model, optimizer, train_loader=[(x, y)], nonfinite=nonfinite) as watch:
            for _ in watch.epochs(1):
                watch.loss(model(x) * math.inf, y).backward()
                if nonfinite == "raise":
                    with pytest.raises(FloatingPointError, match="step 1 "):
                        optimizer.step()
                    break
                optimizer.step()
                optimizer.zero_grad()
        assert torch.equal(before, model.weight)
        assert watch.state.progress.step == (0 if nonfinite == "raise" else 1)


def test_before_step_tells_whether_the_step_counts():
    """watch.before_step() is False for a step that is left out, for a scheduler that must not move."""
    x, y = batches(1)[0]
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    with fw.Watch(model, optimizer, train_loader=[(x, y)] * 2, nonfinite="skip") as watch:
        for _ in watch.epochs(1):
            for factor in (math.nan, 1.0):
                watch.loss(model(x) * factor, y).backward()
                seen.append(watch.before_step())
                optimizer.step()
                optimizer.zero_grad()
    assert seen == [False, True]


def test_a_scheduler_waits_for_a_step_that_counts():
    """A per-step scheduler moves only after steps that were taken."""
    trainer = trainer_of(at=(0, 1, 2, 3), nonfinite="skip")
    torch.manual_seed(1)
    model = trainer.model
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    again = Bad(model, optimizer, scheduler=scheduler, nonfinite="skip", device="cpu")
    again.at = (0, 1, 2, 3)
    again.fit(batches(), epochs=1)
    assert optimizer.param_groups[0]["lr"] == 0.5**6


def test_fifty_skipped_steps_in_a_row_end_training():
    """A fit whose every step is left out is no success."""
    trainer = trainer_of(at=range(10**6), nonfinite="skip")
    with pytest.raises(FloatingPointError, match="the last 50 steps were left out"):
        trainer.fit(batches(), epochs=9)
    assert trainer.state.progress.step == 49


def test_a_skipped_step_does_not_count_in_the_loss():
    """The training loss, of the window and of the epoch, is that of the other batches."""
    result = trainer_of(at=(3, 4), nonfinite="skip", clip_norm=1.0).fit(data := batches(), epochs=1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = fw.Trainer(model, OPTIMIZERS["SGD"](model.parameters()), clip_norm=1.0, device="cpu")
    good = plain.fit([b for i, b in enumerate(data) if i not in (3, 4)], epochs=1)
    assert result.history[-1]["train/loss"] == good.history[-1]["train/loss"]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_limit_counts_steps_in_a_row(clip_norm):
    """Every third step may be bad for ever."""
    trainer = trainer_of(at=range(0, 10**6, 3), nonfinite="skip", clip_norm=clip_norm)
    trainer.fit(batches(), epochs=18)
    assert trainer.state.progress.step == 180


def test_a_disabled_scaler_leaves_the_guard_on():
    """GradScaler(enabled=False) checks nothing, so the watch does."""
    x, y = batches(1)[0]
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with fw.Watch(model, optimizer, scaler=scaler, train_loader=[(x, y)]) as watch:
        for _ in watch.epochs(1):
            scaler.scale(watch.loss(model(x) * math.nan, y)).backward()
            with pytest.raises(FloatingPointError, match="step 1 "):
                watch.before_step()
            break


def test_clipping_does_not_hide_which_gradient_is_bad():
    """The parameter is named as without clipping, which would spread the NaN."""
    trainer = trainer_of(where="gradient", clip_norm=1.0)
    with pytest.raises(FloatingPointError, match=r"in 1 parameter \(`0.bias`\)"):
        trainer.fit(batches(), epochs=1)


def test_fp16_that_never_fits_ends_training():
    """Under a GradScaler that skips every step, training ends with an error that names the scale."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    trainer = Bad(model, torch.optim.SGD(model.parameters(), 0.1), precision="fp16", device="cpu")
    trainer.where, trainer.value, trainer.at = "loss", math.inf, range(10**6)
    with pytest.raises(FloatingPointError, match="fp16 overflowed, even at a scale of"):
        trainer.fit(batches(), epochs=9)


def test_ignore_lets_the_weights_be_ruined():
    """With "ignore" training goes on until the weights are not finite, and stops with that reason."""
    result = trainer_of(nonfinite="ignore").fit(batches(), epochs=2)
    assert "non-finite weights" in result.stop_reason


def test_other_values_are_refused():
    """An unknown value names those that are allowed."""
    with pytest.raises(ValueError, match="nonfinite must be one of 'raise', 'skip', 'spike', 'ignore', got 'warn'"):
        trainer_of(nonfinite="warn")
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1), nonfinite=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_gradients_are_left_as_they_are(dtype):
    """The check changes no bit of finite values, denormal and huge ones included, and finds each bad one."""
    largest = torch.finfo(dtype).max
    values = torch.tensor([1e-45, -0.0, 3.3, largest, -largest, torch.finfo(dtype).tiny / 2], dtype=dtype)
    before = values.clone()
    assert all_finite([values, torch.ones(0, dtype=dtype), torch.ones(3, 4, dtype=dtype).T])
    assert torch.equal(values.view(torch.uint8), before.view(torch.uint8))
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite([torch.ones(5, dtype=dtype), torch.tensor([1.0, bad], dtype=dtype)])
    entries = torch.tensor([1.0, math.nan], dtype=dtype)
    sparse = torch.sparse_coo_tensor([[0, 2]], entries, (4,), check_invariants=True)
    assert not all_finite([sparse])
    assert not all_finite([torch.tensor([complex(0, math.nan)])])


def test_the_exit_code_tells():
    """A script whose loss turns NaN ends with an exit code other than 0."""
    code = (
        "import torch, fitwatch as fw; x = torch.randn(8, 4); x[0, 0] = float('nan'); m = torch.nn.Linear(4, 2);"
        "fw.Trainer(m, torch.optim.SGD(m.parameters(), .1)).fit([(x, torch.zeros(8).long())], epochs=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FloatingPointError: step 1 " in done.stderr


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("place", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("by_watch", [False, True])
def test_weights_that_are_not_finite_are_refused_before_step_1(caplog, nonfinite, place, by_watch):
    """A NaN in the initial weights is one error that names it, with nothing trained and no warning about losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model.state_dict()[place].view(-1)[0] = math.nan
    optimizer, batches = torch.optim.SGD(model.parameters(), 0.1), [(torch.randn(6, 4), torch.arange(6) % 3)]
    message = f"non-finite weights before step 1 \\(`{place}` is the first\\)"

    def train():
        if not by_watch:
            fw.Trainer(model, optimizer, device="cpu", nonfinite=nonfinite).fit(batches, batches, epochs=1)
        with fw.Watch(model, optimizer, train_loader=batches, val_loader=batches, nonfinite=nonfinite) as watch:
            watch.epochs(1)

    with pytest.raises(ValueError, match=message):
        train()
    assert not caplog.records


def test_frozen_infinities_are_no_error():
    """A frozen parameter may be infinite on purpose."""
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("mask", nn.Parameter(torch.tensor(-math.inf), requires_grad=False))
    batches = [(torch.randn(6, 4), torch.arange(6) % 3)]
    result = fw.Trainer(model, torch.optim.SGD(model[0].parameters(), 0.1), device="cpu").fit(batches, epochs=1)
    assert result.stop_reason is None


FUSED = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, fused=True),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", FUSED)
def test_a_fused_optimizer_leaves_bad_steps_out_on_the_device(optimizer, accumulate, monkeypatch):
    """Where reading a value would wait, weights and state stay those before the bad step until the error comes."""
    monkeypatch.setattr("fitwatch.engine.guard.READ_FREELY", frozenset())  # as on a GPU
    keep = Snapshots()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"device": "cpu", "accumulate": accumulate, "log_every": 50}
    trainer = Bad(model, FUSED[optimizer](model.parameters()), callbacks=keep, **options)
    keep.trainer, trainer.at = trainer, (14,)
    with pytest.raises(FloatingPointError) as info:
        trainer.fit(batches(), epochs=3)
    step = 14 // accumulate + 1
    assert f"step {step} had non-finite gradients" in str(info.value)
    assert f"still those of step {step - 1}." in str(info.value)
    assert all(torch.equal(a, b) for a, b in zip(keep.taken[step - 2], snapshot(trainer), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not hasattr(trainer.optimizer, "found_inf")


def test_no_file_and_no_validation_comes_after_a_bad_step_on_the_device(tmp_path, monkeypatch):
    """The flag is read before each validation and each save."""
    monkeypatch.setattr("fitwatch.engine.guard.READ_FREELY", frozenset())
    trainer = trainer_of("fused AdamW", at=(13,), callbacks=fw.Checkpoint(tmp_path, every_steps=5))
    with pytest.raises(FloatingPointError, match="step 14 had"):
        trainer.fit(batches(), batches(2), epochs=3)
    assert len(trainer.state.history) == 1
    assert sorted(f.name for f in tmp_path.glob("*-*.pt")) == ["epoch-1.pt", "step-10.pt"]


def test_a_good_fit_with_a_fused_optimizer_is_that_of_the_plain_loop(monkeypatch):
    """The flag changes no bit of weights and optimizer state."""
    monkeypatch.setattr("fitwatch.engine.guard.READ_FREELY", frozenset())
    trainer = trainer_of("fused AdamW", at=())
    trainer.fit(data := batches(), epochs=2)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = OPTIMIZERS["fused AdamW"](model.parameters())
    for x, y in data * 2:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True))


class Spiking(fw.Trainer):
    """Multiplies the loss of some steps by 1e4."""

    at = ()

    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss * 1e4 if self.state.progress.step in self.at else loss


def spiking(at, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    trainer = Spiking(model, torch.optim.SGD(model.parameters(), 0.01), device="cpu", **options)
    trainer.at = at
    return trainer


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_spike_is_left_out(clip_norm):
    """With "spike" the weights are those of a fit without the batches whose gradient norm is far above the others."""
    trainer = spiking((150, 170), nonfinite="spike", clip_norm=clip_norm)
    trainer.fit(data := batches(), epochs=20)
    plain = spiking((), nonfinite="raise", clip_norm=clip_norm)
    plain.fit([b for i, b in enumerate(data * 20) if i not in (150, 170)], epochs=1)
    assert trainer.state.guard.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(snapshot(trainer), snapshot(plain), strict=True))


def test_what_spikes_are_told_by_is_resumed(tmp_path):
    """A fit that is cut off before a spike leaves it out after resuming, and goes on counting."""

    def fit(folder, steps, **how):
        trainer = spiking((100, 150), nonfinite="spike", callbacks=fw.Checkpoint(folder, every_steps=10))
        trainer.fit(batches(), max_steps=steps, **how)
        return trainer

    whole = fit(tmp_path / "whole", 200)
    fit(tmp_path / "cut", 140)
    resumed = fit(tmp_path / "cut", 200, resume="auto")
    assert resumed.state.guard.skipped == whole.state.guard.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(snapshot(whole), snapshot(resumed), strict=True))


def test_a_norm_is_a_spike_beyond_six_robust_deviations():
    """The limit is median + 6 x 1.4826 MAD of the last 128 norms, computed here by torch."""
    generator = torch.Generator().manual_seed(0)
    norms = (5 + torch.randn(400, generator=generator)).abs().tolist()
    norms[300] = 40.0
    rule, found = SpikeRule(), []
    for i, norm in enumerate(norms):
        if rule.update(norm):
            found.append(i)
        if i >= 127:
            last = torch.tensor(norms[i - 127 : i + 1], dtype=torch.float64)
            low, high = last.sort().values[63:65]
            away = (last - (low + high) / 2).abs().sort().values[63:65].mean()
            assert rule.limit == pytest.approx(float((low + high) / 2 + 6 * 1.4826 * away), rel=1e-12)
    assert found == [300]


def test_a_new_level_is_no_spike():
    """After 20 spikes in a row the norms have a new level; a constant norm makes no spike of rounding."""
    rule = SpikeRule()
    assert not any(rule.update(1.0 + 1e-6 * (i % 2)) for i in range(200))
    found = [rule.update(10.0) for i in range(60)]
    assert found == [True] * 20 + [False] * 40


def test_spikes_are_not_told_under_a_scaler():
    """The GradScaler decides by itself, so "spike" is refused with fp16."""
    with pytest.raises(ValueError, match='nonfinite="spike" needs'):
        spiking((), nonfinite="spike", precision="fp16")


def test_the_error_says_where_the_data_are_bad():
    """A NaN in the input is found in the batch, and the loss is told."""
    data = batches()
    data[3][0][5, 2] = math.nan
    trainer = trainer_of(at=())
    with pytest.raises(FloatingPointError) as info:
        trainer.fit(data, epochs=1)
    assert "1 of 32 values in a tensor of shape (8, 4) of its last batch (state.batch) are not finite" in str(
        info.value
    )
    assert "the first at [5, 2]" in str(info.value)
    assert "its loss is nan" in str(info.value)
    assert trainer.state.batch is data[3]


@pytest.mark.parametrize("kind", ["total", "weight"])
@pytest.mark.parametrize(("accumulate", "clip_norm"), [(1, None), (2, 1.0)])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_counts_though_its_gradients_are(kind, accumulate, clip_norm, value):
    """A constant of infinity or NaN in the loss, or in its weight, ends the fit, or leaves out the step alone."""

    class Constant(fw.Trainer):
        def training_step(self, batch):
            loss = super().training_step(batch)
            if batch is not bad:
                return loss
            total, weight = loss
            return fw.LossSum(total + value, weight) if kind == "total" else fw.LossSum(total, weight * value)

    def fit(nonfinite):
        torch.manual_seed(1)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        trainer = Constant(
            model, optimizer, nonfinite=nonfinite, accumulate=accumulate, clip_norm=clip_norm, device="cpu"
        )
        error = None
        try:
            trainer.fit(data, epochs=1)
        except FloatingPointError as raised:
            error = str(raised)
        return snapshot(trainer), trainer.state, error

    data = batches()
    bad = data[3]
    step = 4 if accumulate == 1 else 2
    _, state, error = fit("raise")
    assert error.startswith(f"step {step} (")
    assert f"The weights are still those of step {step - 1}." in error
    assert state.progress.step == step - 1
    weights, state, error = fit("skip")
    assert error is None
    assert (state.guard.skipped, state.progress.step) == (1, 10 // accumulate)
    assert math.isfinite(state.history[0]["train/loss"])
    del data[3 if accumulate == 1 else 2 : 4]
    left_out, _, _ = fit("raise")
    assert all(map(torch.equal, weights, left_out))


def test_a_loop_sees_a_loss_that_is_not_finite():
    """`watch.loss` with a true label whose logit is -inf: the loss is infinite, its gradients are finite."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.weight.detach().clone()

    def train():
        with fw.Watch(model, optimizer, train_loader=batches(1), max_steps=1) as watch:
            for _ in watch.epochs():
                for x, y in watch.train():
                    mask = torch.zeros(8, 3).masked_fill(torch.arange(3) == 1, -math.inf)
                    watch.loss(model(x) + mask, y).backward()
                    optimizer.step()

    with pytest.raises(FloatingPointError, match=r"finite gradients, and its loss is inf\. The weights"):
        train()
    assert torch.equal(before, model.weight)
