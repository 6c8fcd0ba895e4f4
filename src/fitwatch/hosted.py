"""What the checkpoint of another library keeps of a fit, beside its model and its optimizer."""

from attrs import asdict

from fitwatch import ranks
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.primitives import plain_data
from fitwatch.state import State

_FORMAT = 1


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


def load_state_dict(content: StateDict, state: State) -> None:
    """Restore what `state_dict` returned, before training starts.

    Raises:
        ValueError: It is none of a fit, was returned by another version, or does not fit the callbacks.
    """
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"this is not the state of a watch, of format {_FORMAT}, as watch.state_dict() returns it: "
            f"it has the keys {', '.join(map(repr, content))}"
        )
    if state.callbacks is not None:
        state.callbacks.load_state_dict(content["callbacks"])
    for name, value in content["progress"].items():
        setattr(state.progress, name, value)
    state.history.entries = [dict(entry) for entry in content["history"]]
    if ranks.rank() == 0:  # the sums of all ranks
        state.train_loss.since_evaluation.total, state.train_loss.since_evaluation.weight = content["train_loss"]
    state.resumed = True
