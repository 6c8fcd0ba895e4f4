"""The order of the hooks."""

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch.callback import HOOKS


class Tracer(fw.Callback):
    """Records every hook; `fail` names one that raises, `stop_at` a step that asks for the end."""

    def __init__(self, trace, fail=None, stop_at=None):
        self.trace, self.fail, self.stop_at = trace, fail, stop_at

    def _seen(self, name, state):
        self.trace.append(name)
        if name == "on_step_end" and state.progress.step == self.stop_at:
            state.request_stop("enough")
        if name == self.fail:
            raise OSError("planted")


for _hook in HOOKS:
    setattr(Tracer, _hook, (lambda name: lambda self, state: self._seen(name, state))(_hook))


def fit(trace, *, batches=5, epochs=2, accumulate=1, log_every=2, val=True, fail=None, stop_at=None, **options):
    model = nn.Linear(3, 2)
    tracer = Tracer(trace, fail, stop_at)
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[tracer],
        accumulate=accumulate,
        log_every=log_every,
    )
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(batches)]
    trainer.fit(loader, loader[:2] if val else None, epochs=epochs, **options)


def documented(
    *,
    batches=5,
    epochs=2,
    accumulate=1,
    log_every=2,
    val=True,
    stop_at=None,
    validate_every=None,
    max_steps=None,
):
    """Run the pseudocode of Callback's docstring; a bare name in it is an event."""
    text = inspect.getdoc(fw.Callback)
    block = text[text.index("    on_fit_start") :]
    block = textwrap.dedent(block[: block.index("\n\n")])
    ast.parse(block)
    step = 0
    steps = -(-batches // accumulate)
    trace = []

    def windows():
        nonlocal step
        for i in range(steps):
            step += 1
            size = min(accumulate, batches - i * accumulate)
            yield Window(
                range(size),
                closes_log=(i + 1) % log_every == 0,
                validates=validate_every is not None and step % validate_every == 0,
                stops=step in (stop_at, max_steps),
            )

    class Window(SimpleNamespace):
        def __init__(self, batches, **given):
            super().__init__(batches=batches, **given)

        def __iter__(self):
            return iter(self.batches)

    def epoch_numbers():
        for i in range(epochs):
            yield Epoch(i)

    class Epoch:
        def __init__(self, i):
            self.i = i

        stops = property(lambda self: step in (stop_at, max_steps))
        last = property(lambda self: self.stops or self.i == epochs - 1)
        validates = property(
            lambda self: (
                val and step != stop_at and (validate_every is None or (self.last and step % validate_every != 0))
            )
        )
        # without validation the epoch's own metrics are logged; with it only an open window is
        unlogged = property(lambda self: not val or (not self.validates and not self.closed))
        closed = property(
            lambda self: (step - self.i * steps) % log_every == 0 or (validate_every and step % validate_every == 0)
        )

    class Names(dict):
        def __missing__(self, name):
            if name == "windows":
                return windows()
            if name == "epochs":
                return epoch_numbers()
            trace.append(name)
            return None

    exec(compile(block, "Callback", "exec"), {}, Names())  # noqa: S102
    return [name for name in trace if name.startswith("on_")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 5},
        {"accumulate": 9},
        {"log_every": 1},
        {"log_every": 100},
        {"val": False},
        {"val": False, "accumulate": 2, "log_every": 3},
        {"validate_every": 3},
        {"validate_every": 2, "accumulate": 2},
        {"max_steps": 7},
        {"max_steps": 5},
        {"max_steps": 7, "val": False},
        {"stop_at": 3},
        {"stop_at": 7, "val": False},
        {"stop_at": 4, "accumulate": 2},
        {"stop_at": 4, "validate_every": 4},
    ],
    ids=str,
)
def test_hooks_follow_the_documented_loop(options):
    """The hooks of a fit come in the order that the pseudocode in Callback's docstring gives."""
    trace = []
    fit(trace, **options)
    assert documented(**options) == trace


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_in_a_hook_ends_the_fit_through_on_fit_end(hook):
    """An exception in any hook reaches the caller, names callback and hook, and on_fit_end has run."""
    trace = []
    with pytest.raises(OSError, match="planted") as caught:
        fit(trace, fail=hook)
    assert f"raised by Tracer.{hook}" in caught.value.__notes__
    expected = documented()
    assert expected[: expected.index(hook) + 1] + ["on_fit_end"] * (hook != "on_fit_end") == trace
