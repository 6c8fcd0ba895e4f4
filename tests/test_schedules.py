"""When a scheduler steps, and what is told if its options do not fit the fit."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import fitwatch as fw

BATCHES, EPOCHS = 10, 6


def fit(scheduler, *, interval=None, epochs=EPOCHS, fits=1, resume=None, **options):
    """Return the number of times that a scheduler stepped."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    made = scheduler(optimizer)
    batch = torch.randn(8, 4), torch.arange(8) % 3
    trainer = fw.Trainer(
        model, optimizer, scheduler=made, scheduler_interval=interval, device="cpu", skip_checks=("labels",), **options
    )
    for _ in range(fits):
        trainer.fit([batch] * BATCHES, epochs=epochs, resume=resume)
    return getattr(made, "last_epoch", None)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (lambda o: schedulers.StepLR(o, 3), EPOCHS),
        (lambda o: schedulers.MultiStepLR(o, [2, 4]), EPOCHS),
        (lambda o: schedulers.ExponentialLR(o, 0.9), EPOCHS),
        (lambda o: schedulers.CosineAnnealingLR(o, EPOCHS), EPOCHS),
        (lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3), EPOCHS),
        (lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=EPOCHS * BATCHES), EPOCHS * BATCHES),
        (lambda o: schedulers.LambdaLR(o, lambda step: 1.0), EPOCHS * BATCHES),
        (lambda o: schedulers.LinearLR(o, total_iters=5), EPOCHS * BATCHES),
        (
            lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 55)], [5]),
            EPOCHS * BATCHES,
        ),
        (
            lambda o: schedulers.SequentialLR(o, [schedulers.StepLR(o, 1), schedulers.CosineAnnealingLR(o, 5)], [2]),
            EPOCHS,
        ),
    ],
)
def test_the_interval_follows_the_class(caplog, scheduler, steps):
    """Schedulers whose options are usually epochs step after each epoch, all others after each step, and it is told."""
    with caplog.at_level(logging.INFO, "fitwatch"):
        assert fit(scheduler) == steps
    told = [r for r in caplog.records if "as is usual for it" in r.getMessage()]
    assert len(told) == 1
    assert f"after every {'epoch' if steps == EPOCHS else 'step'}" in told[0].getMessage()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_given_interval_holds(caplog, interval):
    """An explicit interval is used as it is, and nothing is told about a choice."""
    with caplog.at_level(logging.INFO, "fitwatch"):
        assert fit(lambda o: schedulers.LambdaLR(o, lambda n: 1.0), interval=interval) == (
            EPOCHS if interval == "epoch" else EPOCHS * BATCHES
        )
    assert "as is usual" not in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "interval", "text"),
    [
        (lambda o: schedulers.StepLR(o, 3, 0.1), "step", "step_size=3 multiplies the learning rate by 1e-20"),
        (lambda o: schedulers.ExponentialLR(o, 0.5), "step", "gamma=0.5 multiplies the learning rate by 9e-19"),
        (lambda o: schedulers.MultiStepLR(o, [2, 5]), "step", r"milestones=\[2, 5\] its last change comes after 5"),
        (
            lambda o: schedulers.CosineAnnealingLR(o, EPOCHS),
            "step",
            "T_max=6 makes the learning rate fall and rise 5 times",
        ),
        (lambda o: schedulers.CosineAnnealingLR(o, 60), None, "it covers 10.00% of T_max=60"),
        (lambda o: schedulers.StepLR(o, 30), None, "step_size=30 it never changes"),
        (lambda o: schedulers.PolynomialLR(o, 6), None, "the learning rate is 0 from 6 on"),
        (lambda o: schedulers.LinearLR(o, 1.0, 0.0, 6), None, "the learning rate is 0 from 6 on"),
        (lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=600), None, "it covers 10.00% of total_steps=600"),
        (lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 30)]), None, "step_size=30 it never changes"),
        (lambda o: schedulers.MultiStepLR(o, [20, 40]), None, r"milestones=\[20, 40\] it never changes"),
    ],
)
def test_options_in_the_other_unit_are_told(caplog, scheduler, interval, text):
    """Options that are plainly epochs at a scheduler that steps with the optimizer, or the reverse, give a warning."""
    fit(scheduler, interval=interval)

    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert re.search(text, record.getMessage())
    assert "60" in record.getMessage()
    assert "6 " in record.getMessage()


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [
        (lambda o: schedulers.CosineAnnealingLR(o, 60), "step"),
        (lambda o: schedulers.StepLR(o, 20), "step"),
        (lambda o: schedulers.ExponentialLR(o, 0.99), "step"),
        (lambda o: schedulers.MultiStepLR(o, [20, 40]), "step"),
        (lambda o: schedulers.StepLR(o, 100), None),  # a fit that ends early
    ],
)
def test_options_that_fit_are_not_told(caplog, scheduler, interval):
    """Options in the right unit give no warning."""
    fit(scheduler, interval=interval)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_resumed_fit_is_judged_as_a_whole(tmp_path, caplog):
    """What a scheduler has done before counts: the rest of a sound plan gives no warning."""
    for make in (lambda o: schedulers.CosineAnnealingLR(o, 10), lambda o: schedulers.StepLR(o, 6)):
        folder = tmp_path / str(id(make))
        fit(make, epochs=8, callbacks=[fw.Checkpoint(folder)])
        caplog.clear()
        fit(make, epochs=10, callbacks=[fw.Checkpoint(folder)], resume="auto")
        assert not [r for r in caplog.records if "steps after every" in r.getMessage() and r.levelname == "WARNING"]


def test_one_cycle_that_is_too_short_is_refused_before_step_1():
    """Both numbers are named, and what to write, before a step is taken."""
    with pytest.raises(ValueError, match="created for 40 steps, and this fit takes 60 steps: .*total_steps=60"):
        fit(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=40))
    with pytest.raises(ValueError, match="created for 60 steps, and this fit takes 60 steps after 60 before: .*=120"):
        fit(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=60), fits=2)
    assert fit(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=30), accumulate=2) == 30
    assert fit(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=6), interval="epoch") == 6
