"""Resuming optimizer and scheduler: whose options hold, what is named, what is refused; groups added in training."""

import re

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

import fitwatch as fw
from fitwatch import saving


def fit(
    folder, data, epochs, schedule=None, *, resume=None, options_from="checkpoint", kind=torch.optim.SGD, **options
):
    """Train a small model, one scheduler step per epoch; return the trainer and the learning rates after each epoch."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = kind(model.parameters(), **{"lr": 0.1, **options})
    rates = []

    class Rates(fw.Callback):
        def on_epoch_end(self, state):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = fw.Trainer(
        model,
        optimizer,
        scheduler=None if schedule is None else schedule(optimizer),
        scheduler_interval="epoch",
        callbacks=[fw.Checkpoint(folder), Rates()],
        device="cpu",
    )
    trainer.fit(DataLoader(data, 32), DataLoader(data, 64), epochs=epochs, resume=resume, options_from=options_from)
    return trainer, rates


def sequence(a, b, milestone):
    return lambda o: schedulers.SequentialLR(o, [a(o), b(o)], [milestone])


def warm_up(steps):
    return lambda o: schedulers.LinearLR(o, 0.1, 1.0, steps)


def decay(gamma):
    return lambda o: schedulers.ExponentialLR(o, gamma)


def cosine(steps):
    return lambda o: schedulers.CosineAnnealingLR(o, steps)


def cycle(**options):
    return lambda o: schedulers.OneCycleLR(o, **{"max_lr": 1.0, "total_steps": 20, **options})


PAIRS = {  # before, after, the options that differ
    "step": (lambda o: schedulers.StepLR(o, 2, 0.1), lambda o: schedulers.StepLR(o, 3, 0.5), ["step_size", "gamma"]),
    "milestones": (lambda o: schedulers.MultiStepLR(o, [2]), lambda o: schedulers.MultiStepLR(o, [6]), ["milestones"]),
    "constant": (lambda o: schedulers.ConstantLR(o, 0.5, 2), lambda o: schedulers.ConstantLR(o, 0.5, 7), ["total_iters"]),
    "linear": (warm_up(4), warm_up(8), ["total_iters"]),
    "exponential": (decay(0.9), decay(0.5), ["gamma"]),
    "polynomial": (lambda o: schedulers.PolynomialLR(o, 8), lambda o: schedulers.PolynomialLR(o, 8, 2.0), ["power"]),
    "cosine": (cosine(4), cosine(8), ["T_max"]),
    "restarts": (
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 2),
        ["T_0", "T_mult"],
    ),
    "cyclic": (
        lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=3),
        lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=5),
        ["total_size"],
    ),
    "one cycle": (cycle(), cycle(pct_start=0.6), ["schedule_phases"]),
    "sequence": (sequence(warm_up(2), cosine(8), 2), sequence(warm_up(3), cosine(9), 3), ["milestones", "T_max"]),
    "chain": (
        lambda o: schedulers.ChainedScheduler([warm_up(2)(o), decay(0.9)(o)], o),
        lambda o: schedulers.ChainedScheduler([warm_up(2)(o), decay(0.5)(o)], o),
        ["gamma"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_options_of_a_scheduler_are_named_and_those_of_the_checkpoint_hold(tmp_path, data, caplog, name):
    """With the same options nothing is said; with others each is named, and the learning rates are as if uninterrupted."""
    before, after, differing = PAIRS[name]
    options = {"momentum": 0.9}
    expected = fit(tmp_path / "a", data, 8, before, **options)[1]
    for folder, schedule in (("b", before), ("c", after)):
        fit(tmp_path / folder, data, 4, before, **options)
        caplog.clear()
        _, rates = fit(tmp_path / folder, data, 8, schedule, resume="auto", **options)
        assert rates == expected[4:]
        said = [record.getMessage() for record in caplog.records if "different settings" in record.getMessage()]
        assert len(said) == (schedule is after)
    for option in differing:
        assert re.search(rf"scheduler {option} .* \(was .*which is kept\)", said[0])
    assert said[0].endswith('options_from="script" takes those of the script')


@pytest.mark.parametrize("name", PAIRS)
def test_with_options_from_the_script_the_rates_are_those_of_the_new_schedule(tmp_path, data, caplog, name):
    """After the resumption the learning rates equal those of a run that had the new options from the start."""
    before, after, differing = PAIRS[name]
    expected = fit(tmp_path / "a", data, 8, after, momentum=0.9)[1]
    fit(tmp_path / "b", data, 4, before, momentum=0.9)
    caplog.clear()
    trainer, rates = fit(tmp_path / "b", data, 8, after, resume="auto", options_from="script", momentum=0.9)
    assert rates == pytest.approx(expected[4:], rel=1e-12)
    assert trainer.optimizer.state_dict()["state"]  # the momenta are those of the checkpoint
    (said,) = [record.getMessage() for record in caplog.records if "different settings" in record.getMessage()]
    assert all(option in said for option in differing)
    assert "kept" not in said


def test_a_plateau_keeps_what_it_has_reduced(tmp_path, data, caplog):
    """With options from the script the counters and the reduced rate stay, and later reductions have the new factor."""

    def plateau(factor):
        return lambda o: schedulers.ReduceLROnPlateau(o, factor=factor, patience=0, threshold=1e9)

    fit(tmp_path, data, 3, plateau(0.5))
    kept = fit(tmp_path, data, 4, plateau(0.1), resume="auto")[1]
    assert kept == [0.1 * 0.5**4]  # one reduction per evaluation
    _, rates = fit(tmp_path, data, 6, plateau(0.1), resume="auto", options_from="script")
    assert rates == pytest.approx([0.1 * 0.5**4 * 0.1, 0.1 * 0.5**4 * 0.01])
    assert "scheduler factor 0.1 (was 0.5)" in caplog.text


def test_another_scheduler_is_refused(tmp_path, data):
    """Another class, or other schedulers within one, take no state over: the error names both and the ways out."""
    fit(tmp_path / "a", data, 1, PAIRS["step"][0])
    with pytest.raises(
        ValueError,
        match=r"epoch-1.pt was saved with the scheduler StepLR, and this fit has Exp.*resume with StepLR, or .*weights",
    ):
        fit(tmp_path / "a", data, 2, decay(0.9), resume="auto")
    fit(tmp_path / "b", data, 1, sequence(warm_up(2), cosine(8), 2))
    with pytest.raises(ValueError, match="the schedulers within the scheduler were others"):
        fit(tmp_path / "b", data, 2, sequence(warm_up(2), decay(0.9), 2), resume="auto")
    with pytest.raises(ValueError, match="saved with a scheduler"):
        fit(tmp_path / "a", data, 2, resume="auto")
    with pytest.raises(ValueError, match=r"saved with the optimizer SGD, and this fit has Adam.*resume with SGD"):
        fit(tmp_path / "a", data, 2, PAIRS["step"][0], kind=torch.optim.Adam, resume="auto")


def test_a_scheduler_of_ones_own_is_compared_by_the_names_of_its_options(tmp_path, data, caplog):
    """Counters of a scheduler that fitwatch does not know are no options; arguments of its class are."""

    class Own:
        def __init__(self, optimizer, speed):
            self.optimizer, self.speed, self.counted = optimizer, speed, 0

        def step(self):
            self.counted += 1

        def state_dict(self):
            return {"speed": self.speed, "counted": self.counted}

        def load_state_dict(self, state):
            self.__dict__ |= state

    fit(tmp_path, data, 2, lambda o: Own(o, 1))
    fit(tmp_path, data, 3, lambda o: Own(o, 1), resume="auto")
    assert "different settings" not in caplog.text
    trainer, _ = fit(tmp_path, data, 4, lambda o: Own(o, 2), resume="auto")
    assert "scheduler speed 2 (was 1, which is kept);" in caplog.text
    assert (trainer.scheduler.speed, trainer.scheduler.counted) == (1, 4)
    with pytest.raises(ValueError, match='options_from="script" needs a fresh scheduler of torch'):
        fit(tmp_path, data, 5, lambda o: Own(o, 2), resume="auto", options_from="script")


@pytest.mark.parametrize("how", ["checkpoint", "script"])
def test_options_of_the_optimizer(tmp_path, data, caplog, how):
    """Options of every group that differ are named, and those hold that were asked for; the moments go on in any case."""

    def go(epochs, resume, lr, betas, decay):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": lr, "weight_decay": decay}]
        optimizer = torch.optim.AdamW(groups, betas=betas)
        watch = fw.Watch(
            model,
            optimizer,
            fw.Checkpoint(tmp_path),
            resume=resume,
            options_from=how,
            train_loader=DataLoader(data, 32),
        )
        with watch:
            for _ in watch.epochs(epochs):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return optimizer

    go(1, None, 0.1, (0.9, 0.999), 0.0)
    go(2, "auto", 0.1, (0.9, 0.999), 0.0)
    assert "different settings" not in caplog.text
    optimizer = go(3, "auto", 0.2, (0.5, 0.9), 0.3)
    first, second = optimizer.param_groups
    kept = ", which is kept" if how == "checkpoint" else ""
    for name in ("optimizer betas (0.5, 0.9) (was (0.9, 0.999)", "optimizer group 1 lr 0.2 (was 0.1"):
        assert f"{name}{kept})" in caplog.text
    assert f"optimizer group 1 weight_decay 0.3 (was 0.0{kept})" in caplog.text
    assert first["betas"] == ((0.9, 0.999) if kept else (0.5, 0.9))
    assert (second["lr"], second["weight_decay"]) == ((0.1, 0.0) if kept else (0.2, 0.3))
    assert all(state["step"] == 6 for state in optimizer.state.values())


def test_options_from_elsewhere_are_refused():
    """options_from is the checkpoint or the script."""
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="options_from must be 'checkpoint' or 'script', got 'file'"):
        fw.Watch(model, torch.optim.SGD(model.parameters()), options_from="file")


# -- parameter groups --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.back = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.back(x).tanh())


class Unfreeze(fw.Callback):
    """Trains the first layer from an epoch on, by one of the ways that torch offers."""

    def __init__(self, how):
        self.how = how

    def on_epoch_start(self, state):
        if state.progress.epoch != 1:
            return
        back, optimizer = state.model.back, state.optimizer
        back.requires_grad_(True)
        if self.how == "add":
            optimizer.add_param_group({"params": list(back.parameters()), "lr": 0.02, "weight_decay": 0.1})
        if self.how == "named":
            optimizer.add_param_group({"params": list(back.named_parameters("back")), "lr": 0.02})
        if self.how == "twice":
            optimizer.add_param_group({"params": [back.bias]})
            optimizer.add_param_group({"params": [back.weight], "lr": 0.02})
        if self.how == "extend":
            optimizer.param_groups[0]["params"].extend(back.parameters())


@pytest.mark.parametrize("how", ["add", "named", "twice", "extend", "grad"])
@pytest.mark.parametrize("loop", ["Trainer", "Watch"])
def test_layers_unfrozen_in_training_are_resumed(tmp_path, data, how, loop, caplog):
    """Resumed after the unfreezing, a fit equals one in one go: weights, moments, groups, requires_grad."""

    def go(folder, epochs, resume=None):
        torch.manual_seed(0)
        model = Net().double()
        model.back.requires_grad_(False)
        trained = model if how == "grad" else model.head
        named = trained.named_parameters("head") if how == "named" else trained.parameters()
        optimizer = torch.optim.Adam(named, 0.05)
        callbacks, loader = [Unfreeze(how), fw.GradientNorm(), fw.Checkpoint(folder)], DataLoader(data, 16)
        if loop == "Trainer":
            trainer = fw.Trainer(model, optimizer, callbacks=callbacks, device="cpu")
            trainer.fit(loader, epochs=epochs, resume=resume)
            return model, optimizer
        with fw.Watch(model, optimizer, callbacks, train_loader=loader, resume=resume) as watch:
            for _ in watch.epochs(epochs):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return model, optimizer

    model, optimizer = go(tmp_path / "a", 4)
    go(tmp_path / "b", 2)
    again, resumed = go(tmp_path / "b", 4, "auto")
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert a.requires_grad
        assert b.requires_grad
        assert torch.equal(a, b)
    one, other = optimizer.state_dict(), resumed.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for key, state in one["state"].items():
        assert all(torch.equal(state[name], other["state"][key][name]) for name in state)
    assert "back.weight and 1 more parameters trainable, as in the checkpoint" in caplog.text


def test_a_script_that_starts_with_all_groups_resumes_too(tmp_path, data):
    """Whoever builds the optimizer with the groups that it ended with gets the same as who does not."""

    def go(epochs, resume=None):
        torch.manual_seed(0)
        model = Net().double()
        optimizer = torch.optim.Adam([*reversed(list(model.head.parameters()))] if resume else model.head.parameters())
        if resume:
            optimizer.add_param_group({"params": list(model.back.parameters()), "lr": 0.02})
        trainer = fw.Trainer(model, optimizer, callbacks=[Unfreeze("" if resume else "add"), fw.Checkpoint(tmp_path)])
        trainer.fit(DataLoader(data, 16), epochs=epochs, resume=resume)
        return optimizer

    go(2)
    order = go(3, "auto").param_groups[0]["params"]
    assert [tuple(p.shape) for p in order] == [(3, 8), (3,)]  # by name, in the order of the checkpoint


def test_groups_that_cannot_be_matched_are_refused(tmp_path, data):
    """Parameters of the same shapes are not mixed up: other groups than those saved are refused by the parameter's name."""

    def go(groups, resume=None):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 3)}).double()
        model.forward = lambda x: model["c"](model["b"](model["a"](x)))
        optimizer = torch.optim.Adam([{"params": [p for k in g for p in model[k].parameters()]} for g in groups])
        trainer = fw.Trainer(model, optimizer, callbacks=fw.Checkpoint(tmp_path), device="cpu")
        trainer.fit(DataLoader(data, 16), epochs=1 if resume is None else 2, resume=resume)

    go(["a", "bc"])
    with pytest.raises(
        ValueError,
        match=r"group 0 of the optimizer did not hold 'b.weight', but 'a.weight', 'a.bias'\. Create the optimizer with",
    ):
        go(["b", "ac"], "auto")
    with pytest.raises(ValueError, match="the optimizer had 2 parameter groups, and this one has 3"):
        go(["a", "b", "c"], "auto")
    go(["a"], "auto")


def test_a_learned_loss_added_in_training_is_resumed(tmp_path, data):
    """Parameters of the loss have names too, so a group of them is restored."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, output, target):
            return nn.functional.cross_entropy(output * self.scale, target)

    class Add(fw.Callback):
        def on_epoch_start(self, state):
            if state.progress.epoch == 1:
                state.optimizer.add_param_group({"params": list(state.loss.parameters())})

    def go(folder, epochs, resume=None):
        torch.manual_seed(0)
        model, loss = nn.Linear(4, 3).double(), Scaled()
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        trainer = fw.Trainer(model, optimizer, loss, callbacks=[Add(), fw.Checkpoint(folder)], device="cpu")
        trainer.fit(DataLoader(data, 16), epochs=epochs, resume=resume)
        return trainer.state.loss

    expected = go(tmp_path / "a", 4)
    go(tmp_path / "b", 2)
    actual = go(tmp_path / "b", 4, "auto")
    assert [p.item() for p in expected.parameters()] == [p.item() for p in actual.parameters()]
    assert saving.read(tmp_path / "b/epoch-4.pt")["groups"][1][0].endswith("scale")
