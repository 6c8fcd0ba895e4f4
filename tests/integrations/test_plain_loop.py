"""A hand-written loop meets the contract: the guests stand on the same calls."""

import copy

import pytest
import torch
from torch import nn

import fitwatch as fw
from tests.integrations._contract import Problem, same_as_trainer


def plain_loop(problem, epochs):
    options = {"clip_norm": problem.clip_norm, "accumulate": problem.accumulate, "log_every": 5}
    with fw.Watch(problem.model, problem.optimizer, problem.callbacks, **problem.loaders, **options) as watch:
        for _ in watch.epochs(epochs):
            for x, y in problem.train_loader:
                watch.loss(problem.model(x), y).backward()
                if watch.step_due or watch.state.progress.epoch_batch == len(problem.train_loader) - 1:
                    problem.optimizer.step()
                    problem.optimizer.zero_grad()
            with watch.validating():
                for x, y in problem.val_loader:
                    watch.loss(problem.model(x), y)
    return watch.result


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_plain_loop_meets_the_contract(accumulate):
    """A loop over its own loaders gives the Trainer's figures, bit for bit."""
    same_as_trainer(plain_loop, accumulate=accumulate)


def host_loop(problem, epochs):
    """The calls that a guest makes: epochs that it starts itself, a closure, a loss that the host divides."""
    parts = {**problem.loaders, "clip_norm": problem.clip_norm, "accumulate": problem.accumulate, "log_every": 5}
    watch = fw.Watch(problem.model, problem.optimizer, problem.callbacks, divided=True, **parts)
    with watch:
        for epoch in range(epochs):
            watch.start_epoch(epochs, epoch=epoch)
            for i, (x, y) in enumerate(problem.train_loader):

                def closure(x=x, y=y, first=i % problem.accumulate == 0):
                    loss = watch.loss(problem.model(x), y) / problem.accumulate
                    if first:
                        problem.optimizer.zero_grad()
                    loss.backward()
                    return loss

                if (i + 1) % problem.accumulate == 0 or i + 1 == len(problem.train_loader):
                    problem.optimizer.step(closure)
                    watch.end_step()
                else:
                    closure()
            with watch.validating():
                for x, y in problem.val_loader:
                    watch.loss(problem.model(x), y)
            watch.end_epoch()
            if watch.stops:
                break
    return watch.result


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_calls_of_a_guest_meet_the_contract(accumulate):
    """Epochs started from outside, steps with a closure and divided losses give the Trainer's figures."""
    same_as_trainer(host_loop, accumulate=accumulate)


def test_a_state_dict_continues_the_fit():
    """Half a fit, what a host saves of it, and the other half give the history and the verdict of a whole one."""

    def halves(problem, epochs):
        options = {**problem.loaders, "clip_norm": problem.clip_norm, "log_every": 5}
        with fw.Watch(problem.model, problem.optimizer, problem.callbacks, **options) as first:
            train(problem, first, range(5))
            host = problem.model.state_dict(), problem.optimizer.state_dict()
            host = copy.deepcopy(host)  # the best weights are restored below
            saved = first.state_dict()
        problem.model.load_state_dict(host[0])
        problem.optimizer.load_state_dict(host[1])
        fresh = Problem()
        second = fw.Watch(problem.model, problem.optimizer, fresh.callbacks, **options)
        second.load_state_dict(saved)
        with second:
            assert second.state.resumed
            train(problem, second, range(5, epochs))
        problem.recorder.numbers |= fresh.recorder.numbers
        return second.result

    same_as_trainer(halves)


def train(problem, watch, epochs):
    for epoch in epochs:
        watch.start_epoch(epoch=epoch)
        for x, y in problem.train_loader:
            watch.loss(problem.model(x), y).backward()
            problem.optimizer.step()
            problem.optimizer.zero_grad()
        with watch.validating():
            for x, y in problem.val_loader:
                watch.loss(problem.model(x), y)
        watch.end_epoch()
        if watch.stops:
            break


def test_a_loss_multiplied_by_anything_else_is_refused():
    """With divided=True, only the share of a micro-batch may multiply the loss."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with fw.Watch(model, optimizer, train_loader=[(x, y)] * 4, accumulate=4, divided=True) as watch:
        watch.start_epoch()
        (watch.loss(model(x), y) / 3).backward()  # a short last step
        with pytest.raises(RuntimeError, match="multiplied by 0.7.*1/4 is expected"):
            first_of(model, x, y)
        watch.state.request_stop("enough")


def first_of(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fw.Watch(model, optimizer, train_loader=[(x, y)] * 4, accumulate=4, divided=True) as watch:
        watch.start_epoch()
        (watch.loss(model(x), y) * 0.7).backward()


@pytest.mark.parametrize("call", ["end_epoch", "start_epoch"])
def test_epochs_out_of_order_are_refused(call):
    """Ending an epoch that was not started, and starting one within another, name the missing call."""
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    watch = fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1), train_loader=[(x, y)])
    with watch:
        if call == "start_epoch":
            watch.start_epoch()
        with pytest.raises(RuntimeError, match=r"end_epoch\(\)"):
            getattr(watch, call)()
        watch.state.request_stop("enough")


def test_wrong_states_and_epochs_are_refused():
    """What is no state of a watch is refused before training, and so is an index that is no epoch."""
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    watch = fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1), train_loader=[(x, y)])
    whole = watch.state_dict()
    assert watch.load_state_dict(whole) is None
    for wrong in (None, {}, "state", {"a": 1}, {**whole, "format": 0}, {k: whole[k] for k in ("format", "callbacks")}):
        with pytest.raises(ValueError, match="this is not the state of a watch"):
            watch.load_state_dict(wrong)
    with watch:
        for wrong in (-1, 1.5, True, "1"):
            with pytest.raises(ValueError, match="epoch must be an integer of 0 or more"):
                watch.start_epoch(epoch=wrong)
        watch.start_epoch(epoch=torch.tensor(2))
        assert watch.state.progress.epoch == 2
        watch.state.request_stop("enough")
