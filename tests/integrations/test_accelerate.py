"""A loop under Accelerate meets the contract: `Watch` is the guest, without any code of ours."""

import pytest

import fitwatch as fw
from tests.integrations._contract import same_as_trainer

accelerate = pytest.importorskip("accelerate", reason="accelerate is in the extra of this name")

pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(problem, **options):
    """The parts of a training; the watch needs torch's own optimizer."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model, optimizer, train, val = accelerator.prepare(
        problem.model, problem.optimizer, problem.train_loader, problem.val_loader
    )
    return accelerator, model, optimizer, {"train_loader": train, "val_loader": val}


def validate(watch, model, loader):
    with watch.validating():
        for x, y in loader:
            watch.loss(model(x), y)


def steps_by_the_watch(problem, epochs):
    accelerator, model, optimizer, loaders = prepared(problem)
    options = {"clip_norm": problem.clip_norm, "accumulate": problem.accumulate, "log_every": 5}
    with fw.Watch(model, optimizer.optimizer, problem.callbacks, **loaders, **options) as watch:
        for _ in watch.epochs(epochs):
            for x, y in watch.train():
                accelerator.backward(watch.loss(model(x), y))
                if watch.step_due:
                    optimizer.step()
                    optimizer.zero_grad()
            if watch.step_open:  # the last step is shorter, and the length of a prepared loader is not certain
                optimizer.step()
                optimizer.zero_grad()
            validate(watch, model, loaders["val_loader"])
    return watch.result


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loop_under_accelerate_meets_the_contract(accumulate):
    """Prepared parts and accelerator.backward give the Trainer's figures, bit for bit, also under accumulation."""
    same_as_trainer(steps_by_the_watch, accumulate=accumulate)


def steps_by_accelerate(problem, epochs):
    steps = problem.accumulate
    accelerator, model, optimizer, loaders = prepared(problem, gradient_accumulation_steps=steps)
    options = {"clip_norm": problem.clip_norm, "accumulate": steps, "divided": True, "log_every": 5}
    with fw.Watch(model, optimizer.optimizer, problem.callbacks, **loaders, **options) as watch:
        for _ in watch.epochs(epochs):
            for x, y in loaders["train_loader"]:
                with accelerator.accumulate(model):
                    accelerator.backward(watch.loss(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
            validate(watch, model, loaders["val_loader"])
    return watch.result


@pytest.mark.parametrize(("accumulate", "tolerance"), [(1, 0.0), (4, 1e-6)])
def test_accumulation_by_accelerate_meets_the_contract(accumulate, tolerance):
    """Where Accelerate divides the losses and leaves steps out, divided=True makes the gradient exact."""
    same_as_trainer(steps_by_accelerate, accumulate=accumulate, tolerance=tolerance)
