"""Train mode and eval mode: what the user sets stays, before, during and after a fit."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw


def parts(*, frozen=True):
    """A backbone with a BatchNorm and dropout, and a head."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    backbone.requires_grad_(not frozen)
    return nn.Sequential(backbone, nn.Linear(8, 3)).double()


def by_trainer(model, data, *callbacks, epochs=2, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    trainer = fw.Trainer(model, optimizer, callbacks=callbacks, device="cpu")
    trainer.fit(DataLoader(data, 16), DataLoader(data, 64), epochs=epochs, **options)
    return trainer


def by_watch(model, data, *callbacks, epochs=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    loaders = {"train_loader": DataLoader(data, 16), "val_loader": DataLoader(data, 64)}
    with fw.Watch(model, optimizer, callbacks, **loaders) as watch:
        for _ in watch.epochs(epochs):
            for inputs, targets in watch.train():
                watch.loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            watch.validate()


class Seen(fw.Callback):
    """Keeps the modes of all modules at every step."""

    def __init__(self):
        self.modes = []

    def on_step_end(self, state):
        self.modes.append([m.training for m in state.model.modules()])


@pytest.mark.parametrize("run", [by_trainer, by_watch])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_in_eval_mode_keeps_its_statistics(data, run, frozen, compiled):
    """A backbone that the user put into eval mode has the statistics and modes it had, also in a second fit."""
    model = parts(frozen=frozen)
    model[0].eval()
    before = copy.deepcopy(dict(model.named_buffers()))
    outer = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        seen = Seen()
        run(outer, data, seen)
        assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
        assert not any(m.training for m in model.modules())  # ready for predictions
        assert [modes[-6:] for modes in seen.modes] == [[False] * 5 + [True]] * 8


@pytest.mark.parametrize("run", [by_trainer, by_watch])
def test_a_model_left_in_eval_mode_by_an_evaluation_trains(data, run):
    """If the whole model is in eval mode when training starts, it trains, but a frozen part stays in eval mode."""
    model, seen = parts(frozen=False).eval(), Seen()
    run(model, data, seen)
    assert all(all(modes) for modes in seen.modes)
    assert int(model[0][1].num_batches_tracked) == 8

    model, seen = parts(frozen=True).eval(), Seen()
    run(model, data, seen)
    assert {tuple(modes) for modes in seen.modes} == {(True, False, False, False, False, False, True)}


def test_an_evaluation_by_hand_between_epochs_changes_nothing(data):
    """A loop that calls model.eval() for an evaluation of its own, and not model.train() after it, trains as before."""

    class Evaluate(fw.Callback):
        def on_epoch_end(self, state):
            state.model.eval()

    seen, model = Seen(), parts(frozen=False)
    model[0][3].eval()
    by_watch(model, data, seen, Evaluate())
    by_watch(model, data, seen, Evaluate())
    assert {tuple(modes) for modes in seen.modes} == {(True, True, True, True, True, False, True)}
    assert len(seen.modes) == 16


def test_modes_set_by_callbacks_stay(data):
    """What a callback sets in on_fit_start or on_epoch_start holds until it sets something else."""

    class Thaw(fw.Callback):
        def on_fit_start(self, state):
            state.model[0].eval()

        def on_epoch_start(self, state):
            if state.progress.epoch == 2:
                state.model[0].train()

    seen = Seen()
    by_trainer(parts(frozen=False), data, Thaw(), seen, epochs=4, validate_every=3)
    assert [modes[2] for modes in seen.modes] == [False] * 8 + [True] * 8


def test_a_models_own_train_method_is_heard(data):
    """A model whose train() keeps its BatchNorm in eval mode, as many do, keeps it so."""

    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0][1].eval()
            return self

    model, seen = Stubborn(*parts(frozen=False)), Seen()
    before = model[0][1].running_mean.clone()
    by_trainer(model, data, seen)
    assert torch.equal(model[0][1].running_mean, before)
    assert {tuple(modes) for modes in seen.modes} == {(True, True, True, False, True, True, True)}


@pytest.mark.parametrize("run", [by_trainer, by_watch])
def test_frozen_layers_whose_statistics_move_are_named_once(data, run, caplog):
    """A frozen BatchNorm in train mode is named in one warning that says what to call; in eval mode in none."""
    with caplog.at_level(logging.WARNING, "fitwatch"):
        run(parts(), data)
    said = [r.getMessage() for r in caplog.records if "frozen" in r.getMessage()]
    (only,) = said
    assert only == (
        "all parameters of 0 are frozen, but the running statistics of 0.1 change, since it is in train mode: to keep "
        "them, call .eval() on 0 before training"
    )
    caplog.clear()
    model = parts()
    model[0].eval()
    run(model, data)
    run(parts(frozen=False), data)
    assert not any("frozen" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("run", [by_trainer, by_watch])
@pytest.mark.parametrize("stopping", [True, False])
def test_predictions_after_a_fit_are_deterministic(data, run, stopping):
    """After a fit dropout is off, whether or not weights were restored, so equal inputs give equal outputs."""
    model = parts(frozen=False)
    run(model, data, *([fw.EarlyStopping()] if stopping else []))
    x = data.tensors[0]
    assert torch.equal(model(x), model(x))


def test_a_watch_that_trained_nothing_leaves_the_modes(data):
    """If entering fails, or no epoch began, the model has the modes it had."""
    model = parts()
    model[0].eval()
    before = [m.training for m in model.modules()]
    with fw.Watch(model, torch.optim.SGD(model[1].parameters(), 0.1), train_loader=DataLoader(data, 16)):
        pass
    assert [m.training for m in model.modules()] == before


ALL = (True,) * 7
HEAD = (True, *[False] * 5, True)


@pytest.mark.parametrize("run", [by_trainer, by_watch])
def test_a_part_that_is_thawed_between_fits_joins_the_others(data, run):
    """After a fit with the backbone in eval mode, backbone.train() alone makes everything train."""
    model, seen = parts(frozen=False), Seen()
    model[0].eval()
    run(model, data, seen, epochs=1)
    model[0].train()
    run(model, data, seen, epochs=1)
    assert [tuple(modes) for modes in seen.modes] == [HEAD] * 4 + [ALL] * 4


@pytest.mark.parametrize("run", [by_trainer, by_watch])
def test_a_part_that_is_set_between_fits_rests(data, run):
    """A part in eval mode inside one in train mode rests in the next fit, whatever the fit before has left."""
    model, seen = parts(frozen=False), Seen()
    run(model, data, seen, epochs=1)
    model.train()
    model[0].eval()
    run(model, data, seen, epochs=1)
    model[0].train()
    model[0][1].eval()
    run(model, data, seen, epochs=1)
    norm_rests = (True, True, True, False, True, True, True)
    assert [tuple(modes) for modes in seen.modes] == [ALL] * 4 + [HEAD] * 4 + [norm_rests] * 4


@pytest.mark.parametrize("run", [by_trainer, by_watch])
def test_two_fits_have_the_modes_of_one(data, run):
    """A frozen part left in train mode stays in it, in the second fit as in the second epoch."""
    one, two, seen, again = parts(), parts(), Seen(), Seen()
    run(one, data, seen, epochs=2)
    for _ in range(2):
        run(two, data, again, epochs=1)
    assert seen.modes == again.modes
    for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        if "running" in name or "batches" in name:
            assert torch.equal(value, other), name


def test_a_part_frozen_between_fits_rests(data):
    """A part that is frozen after it has trained goes into eval mode in the next fit, and dropout alone does not."""
    model, seen = parts(frozen=False), Seen()
    by_trainer(model, data, seen, epochs=1)
    model[0][3].train()  # for predictions with dropout
    by_trainer(model, data, seen, epochs=1)
    model[0].requires_grad_(False)
    by_trainer(model, data, seen, epochs=1)
    assert [tuple(modes) for modes in seen.modes] == [ALL] * 8 + [HEAD] * 4
