"""The ten hooks and their contract."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from fitwatch import ranks
from fitwatch.helpers.aliases import StateDict
from fitwatch.state import State

HOOKS = (
    "on_fit_start",
    "on_epoch_start",
    "on_batch_end",
    "on_gradients_ready",
    "on_step_end",
    "on_log",
    "on_validation_start",
    "on_validation_end",
    "on_epoch_end",
    "on_fit_end",
)


class Callback:
    """Ten hooks that do nothing; override those you need. Each receives the `State` and returns nothing.

    The loop, which is the contract (a test runs this text and compares it with a recorded fit)::

        on_fit_start                          # device ready, checkpoint loaded; may replace state.loss
        for epoch in epochs:
            on_epoch_start                    # the model is in train mode
            for window in windows:            # accumulate batches each; the last window may be shorter
                for batch in window:
                    training_step             # forward and backward of one micro-batch
                    on_batch_end
                on_gradients_ready            # whole, unscaled, not yet clipped: the place to read gradients
                optimizer_step                # clip, optimizer.step, scheduler.step, zero_grad
                on_step_end                   # progress.step counts the step already
                if window.closes_log:         # every log_every steps of an epoch
                    on_log                    # state.records is fresh
                if window.validates:          # every validate_every steps, if given
                    on_validation_start
                    validate
                    on_validation_end         # state.metrics is fresh: decide here
                    on_log
                if window.stops:              # after request_stop or at max_steps
                    break
            if epoch.validates:               # with a val_loader, unless this step was validated or a stop asked for
                on_validation_start
                validate
                on_validation_end
                on_log
            on_epoch_end                      # counted in progress.epoch unless it was cut short
            if epoch.unlogged:                # something was logged since the last on_log
                on_log
            if epoch.stops:
                break
        on_fit_end                            # always, also after an exception, in reverse order

    Without a validation set ``state.metrics`` is fresh at ``on_epoch_end``, with ``train/loss`` alone. Callbacks run
    in list order (a `Checkpoint` after the others), only those that override a hook are called for it, and an
    exception in one ends the fit through ``on_fit_end``, with a note that names callback and hook.

    With several ranks, every rank runs all hooks, except that a callback with ``main_only`` runs on rank 0 only.
    Losses, metrics and gradients then cover all ranks; other logged values are those of rank 0.

    Defining a class with a method ``on_*`` that is not a hook raises a TypeError.
    """

    runs_last: ClassVar[bool] = False  # after all other callbacks, because it saves their state
    main_only: ClassVar[bool] = False  # on rank 0 only, because it writes or draws

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            if name.startswith("on_") and name not in HOOKS:
                close = difflib.get_close_matches(name, HOOKS, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise TypeError(f"{cls.__name__}.{name} is no hook; {hint}The hooks are {', '.join(HOOKS)}")
            if inspect.iscoroutinefunction(getattr(cls, name)):
                raise TypeError(f"{cls.__name__}.{name} is async, and hooks are called, not awaited: write it with def")

    def on_fit_start(self, state: State) -> None:
        """Called before training starts."""

    def on_epoch_start(self, state: State) -> None:
        """Called at the start of an epoch."""

    def on_batch_end(self, state: State) -> None:
        """Called after the backward pass of a micro-batch."""

    def on_gradients_ready(self, state: State) -> None:
        """Called when the gradients of a step are complete, before clipping."""

    def on_step_end(self, state: State) -> None:
        """Called after a step of the optimizer."""

    def on_log(self, state: State) -> None:
        """Called with ``state.records`` holding everything logged since the last call."""

    def on_validation_start(self, state: State) -> None:
        """Called before a pass over the validation set."""

    def on_validation_end(self, state: State) -> None:
        """Called after a validation, with ``train/loss`` and ``val/loss`` in ``state.metrics``."""

    def on_epoch_end(self, state: State) -> None:
        """Called at the end of an epoch, after its validation."""

    def on_fit_end(self, state: State) -> None:
        """Called when training ends for any reason: see ``state.stop_reason`` and ``state.error``."""

    def state_dict(self) -> StateDict:
        """Return what a checkpoint keeps: tensors, numbers, strings, and lists and dicts of them.

        Scalars of NumPy are saved as plain numbers, and its arrays as tensors.
        """
        return {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""


class Callbacks(Callback):
    """Combines several callbacks into one and calls them in list order.

    Args:
        callbacks: The callbacks, or a single one; a nested `Callbacks` is flattened.

    Raises:
        TypeError: An element is not a `Callback` instance.
        ValueError: An instance is given twice.
    """

    def __init__(self, callbacks: Iterable[Callback] | Callback = ()) -> None:
        self.callbacks: list[Callback] = []
        given: Iterable[object] = callbacks if isinstance(callbacks, Iterable) else [callbacks]
        for c in given:
            if not isinstance(c, Callback):
                hint = f" (write {c.__name__}())" if isinstance(c, type) else ""
                raise TypeError(f"callbacks must hold Callback instances, got {c!r}{hint}")
            self.callbacks += c.callbacks if isinstance(c, Callbacks) else [c]
        for i, c in enumerate(self.callbacks):
            if any(c is other for other in self.callbacks[:i]):
                raise ValueError(f"the same {type(c).__name__} is given twice as a callback: each hook would run twice")
        self._hooks = self._bound()

    def _bound(self) -> dict[str, list[Callable[[State], None]]]:
        """The methods to call for each hook on this rank, in order."""
        called = [c for c in self.callbacks if not (c.main_only and ranks.rank())]
        called.sort(key=lambda c: c.runs_last)
        return {name: [getattr(c, name) for c in called if _overrides(c, name)] for name in HOOKS}

    def _run(self, name: str, state: State) -> None:
        method = None
        try:
            for method in self._hooks[name]:
                method(state)
        except Exception as error:
            error.add_note(f"raised by {_owner(method)}.{name}")
            raise

    def on_fit_start(self, state: State) -> None:  # noqa: D102
        self._hooks = self._bound()  # the rank is known only now
        self._run("on_fit_start", state)

    def on_epoch_start(self, state: State) -> None:  # noqa: D102
        self._run("on_epoch_start", state)

    def on_batch_end(self, state: State) -> None:  # noqa: D102
        self._run("on_batch_end", state)

    def on_gradients_ready(self, state: State) -> None:  # noqa: D102
        self._run("on_gradients_ready", state)

    def on_step_end(self, state: State) -> None:  # noqa: D102
        self._run("on_step_end", state)

    def on_log(self, state: State) -> None:  # noqa: D102
        self._run("on_log", state)

    def on_validation_start(self, state: State) -> None:  # noqa: D102
        self._run("on_validation_start", state)

    def on_validation_end(self, state: State) -> None:  # noqa: D102
        self._run("on_validation_end", state)

    def on_epoch_end(self, state: State) -> None:  # noqa: D102
        self._run("on_epoch_end", state)

    def on_fit_end(self, state: State) -> None:
        """Run all in reverse order, even if some raise; then raise the first error, with the others as notes."""
        first: BaseException | None = None
        for method in reversed(self._hooks["on_fit_end"]):
            try:
                method(state)
            except BaseException as error:  # noqa: BLE001 - raised again below, after all have run
                if first is None:
                    first = error
                    first.add_note(f"raised by {_owner(method)}.on_fit_end")
                else:
                    first.add_note(f"then {_owner(method)}.on_fit_end raised {error!r}")
        if first is not None:
            raise first

    def state_dict(self) -> StateDict:
        """Return each callback's state under its class name; the second of a class is ``Name#2``, and so on."""
        return {name: c.state_dict() for name, c in self.named()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore each callback; one that was not saved keeps its fresh state.

        Raises:
            ValueError: A state does not fit its callback; the message names the callback.
        """
        for name, callback in self.named():
            if name in state_dict:
                try:
                    callback.load_state_dict(state_dict[name])
                except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    why = str(error) if isinstance(error, ValueError) else repr(error)
                    raise ValueError(f"the state of {name} can't be restored: {why}") from error

    def named(self) -> list[tuple[str, Callback]]:
        """Return the callbacks with the names that their states have in a checkpoint."""
        names: list[str] = []
        for c in self.callbacks:
            kind = type(c).__name__
            before = sum(name.split("#")[0] == kind for name in names)
            names.append(f"{kind}#{before + 1}" if before else kind)
        return list(zip(names, self.callbacks, strict=True))


def _owner(method: Any) -> str:
    return type(getattr(method, "__self__", method)).__name__


def _overrides(callback: Callback, name: str) -> bool:
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(Callback, name)
