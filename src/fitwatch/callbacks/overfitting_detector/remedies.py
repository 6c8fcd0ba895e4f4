"""Remedies for a verdict, with the current settings of the run."""

from collections.abc import Iterator

from torch import nn

from fitwatch.advice import TOPICS
from fitwatch.callbacks.early_stopping import EarlyStopping
from fitwatch.helpers.modules import unwrap
from fitwatch.rules.overfitting import Verdict
from fitwatch.state import State


def card(verdict: Verdict, state: State, train_examples: int | None) -> str:
    """Return the verdict, its evidence, and remedies for the run, in Markdown.

    Args:
        verdict: The verdict.
        state: State of the fit.
        train_examples: Size of the training set; None if unknown.
    """
    remedies = "\n".join(f"- {remedy}" for remedy in _remedies(verdict, state, train_examples))
    return f"**{verdict.summary}** {verdict.evidence}\n\n{remedies}{_more(verdict)}".rstrip()


def _more(verdict: Verdict) -> str:
    return f"\n- More: `fitwatch help {verdict.status}`." if verdict.status in TOPICS else ""


def _remedies(verdict: Verdict, state: State, train_examples: int | None) -> Iterator[str]:
    decay = sorted({float(group.get("weight_decay", 0.0)) for group in state.optimizer.param_groups})
    modules = unwrap(state.model).modules()
    dropout = sorted({m.p for m in modules if isinstance(m, (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout))})
    now = f"weight decay {_listed(decay)}, dropout {_listed(dropout) if dropout else 'none'}"
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    per_example = f", {parameters / train_examples:,.3g} for each training example" if train_examples else ""
    if verdict.cause == "confidence":
        yield (
            "Calibration: fw.Calibrated(model, result.calibration) takes the excess confidence away, and training may "
            "go on."
        )
    if verdict.status == "overfitting":
        yield f"More regularization: this run has {now}."
        yield f"A smaller model, or more data: this one has {parameters:,} parameters{per_example}."
        if verdict.best is not None:
            best = state.history[verdict.best]
            where = f"epoch {best['epoch'] + 1:g}, step {best['step']:g}, with a loss of {best['val/loss']:.4g}"
            if _restores(state):
                by = state.history.monitor
                yield f"The best weights (by {by}) will be restored at the end; validation was best at {where}."
            else:
                yield f"Early stopping with the best weights: validation was best at {where}."
    if verdict.status == "underfitting":
        yield f"A larger model or a higher learning rate: this one has {parameters:,} parameters{per_example}."
        yield f"Less regularization: this run has {now}."
    if verdict.status == "diverging":
        clip = state.plan.clip_norm
        clipping = "gradient clipping (clip_norm=)" if clip is None else f"a clip_norm below {clip:g}"
        yield f"A lower learning rate (now {state.optimizer.param_groups[0]['lr']:.3g}), or {clipping}."
    if verdict.examples_needed is not None:
        yield (
            "Cross-validation, or a larger validation set: by its standard error this rise may be chance; about "
            f"{verdict.examples_needed:,} examples would settle it."
        )


def _restores(state: State) -> bool:
    """Return whether a callback restores the best weights, so that early stopping need not be advised."""
    attached = getattr(state.callbacks, "callbacks", ())
    return any(
        c.restore_best if isinstance(c, EarlyStopping) else getattr(c, "action", None) == "restore" for c in attached
    )


def _listed(values: list[float]) -> str:
    return " and ".join(f"{value:g}" for value in values)
