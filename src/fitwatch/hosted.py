"""What the checkpoint of another library keeps of a fit, beside its model and its optimizer."""

from collections.abc import Mapping

from attrs import asdict

from fitwatch import ranks
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.primitives import plain_data
from fitwatch.restoring import restore_counters
from fitwatch.state import State

_FORMAT = 1
_PARTS = ("callbacks", "progress", "history", "train_loss")


def state_dict(state: State) -> StateDict:
    """Return callbacks, counters, history and the training loss since the last evaluation. All ranks call it."""
    state.train_loss.pull()
    since = state.train_loss.since_evaluation
    content: StateDict = {
        "format": _FORMAT,
        "callbacks": state.callbacks.state_dict() if state.callbacks is not None else {},
        "progress": asdict(state.progress),
        "history": [dict(entry) for entry in state.history.entries],
        "train_loss": ranks.sums([since.total, since.weight]),
    }
    plain: StateDict = plain_data(content)
    return plain


def check(content: object) -> None:
    """Check that something is what `state_dict` returned.

    Raises:
        ValueError: It is not, or another version returned it.
    """
    if isinstance(content, Mapping):
        lacking = [part for part in _PARTS if part not in content]
        if content.get("format") == _FORMAT and not lacking:
            return
        given = f"it has the keys {', '.join(map(repr, content))}" if content else "it is empty"
    else:
        given = f"got {content!r:.80}"
    raise ValueError(
        f"this is not the state of a watch, of format {_FORMAT}, as watch.state_dict() returns it: {given}"
    )


def load_state_dict(content: StateDict, state: State) -> None:
    """Restore what `state_dict` returned and `check` accepts, before training starts.

    Raises:
        ValueError: It does not fit the callbacks.
    """
    if state.callbacks is not None:
        state.callbacks.load_state_dict(content["callbacks"])
    restore_counters(content, state)
    state.resumed = True
