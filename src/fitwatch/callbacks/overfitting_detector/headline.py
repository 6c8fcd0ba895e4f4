"""The verdict in one line, with epochs counted from 1."""

import math
from collections.abc import Mapping, Sequence

from fitwatch.rules.overfitting import Verdict

_SURE = 0.977  # the confidence of a rise of two standard errors


def headline(verdict: Verdict, history: Sequence[Mapping[str, float]]) -> str:
    """Return what a verdict on the evaluations of ``history`` says, in one sentence without figures in brackets."""
    loss = history[-1]["val/loss"]
    if verdict.overfitting and verdict.onset is not None:
        sure = verdict.confidence is None or verdict.confidence >= _SURE
        return f"{'Overfitting' if sure else 'Possible overfitting'} since {place(history, verdict.onset)}: " + _rise(
            history[verdict.onset]["val/loss"], loss
        )
    if verdict.status == "diverging":
        last = place(history, len(history) - 1)
        level = f"the validation loss is {loss:.4g}" if math.isfinite(loss) else f"the validation loss became {loss}"
        return f"Diverging: {level} at {last}."
    best = (
        ""
        if verdict.best is None
        else f", best {history[verdict.best]['val/loss']:.4g} at " + place(history, verdict.best)
    )
    return {
        "improving": f"No overfitting: the validation loss is still falling{best}.",
        "plateau": f"No overfitting: the validation loss has levelled off{best}.",
        "underfitting": f"Underfitting: the validation loss is no better than that of a constant prediction{best}.",
    }.get(verdict.status, f"Too early for a verdict, after {len(history)} evaluations{best}.")


def place(history: Sequence[Mapping[str, float]], index: int) -> str:
    """Name an evaluation for people: by its epoch, from 1, if each epoch has one evaluation, else by its step."""
    epochs = [entry["epoch"] for entry in history]
    if len(set(epochs)) < len(epochs):
        return f"step {history[index]['step']:,.0f}"
    return f"epoch {history[index]['epoch'] + 1:.0f}"


def _rise(then: float, now: float) -> str:
    change = ""
    if 0 < then < now:
        change = f" +{now / then - 1:.0%}" if now < 11 * then else f" {now / then:,.0f}-fold"
    return f"validation loss{change} ({then:.4g} -> {now:.4g})."
