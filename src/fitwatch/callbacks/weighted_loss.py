"""Class weights from the distribution of the training data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from tqdm.auto import tqdm

from fitwatch._options import integer, one_of
from fitwatch.callback import Callback
from fitwatch.checkpoint import rng_state, set_rng_state
from fitwatch.loading import exposed_targets, generators_of, input_and_target, length
from fitwatch.losses import BinaryCrossEntropy
from fitwatch.state import State
from fitwatch.weighting import SCHEMES, as_class_weights, class_weights, count_classes


def _weights(spec: Any) -> str | Tensor:
    if isinstance(spec, str):
        if spec not in SCHEMES:
            raise ValueError(f"weights must be one of {', '.join(SCHEMES)}, a tensor or a dict, got {spec!r}")
        return spec
    return as_class_weights(spec)


@define(eq=False, slots=False)
class WeightedLoss(Callback):
    """Gives the loss class weights when fitting starts, and logs them as a table beside the class counts.

    The targets are read from the training data set where it exposes ``targets``, ``labels`` or ``tensors``, else by
    one pass over the loader, which leaves the random generators as they were.

    Counts are those of the data set: a sampler that balances the batches already is not taken into account.

    With `BinaryCrossEntropy` the two weights become ``pos_weight`` = w_1 / w_0.

    Args:
        weights: ``"balanced"``, ``"inverse"``, ``"sqrt_inverse"``, ``"median_frequency"`` or ``"effective_number"``
            (see `class_weights`), or the weights themselves: a tensor or sequence of shape (C,), or a dict
            class -> weight.
        num_classes: C, where the training data may lack the last classes. Default: the largest label + 1.
        absent: What a class without examples means: ``"error"``, or ``"zero"`` to give it weight 0.
        beta: Of ``"effective_number"``, in [0, 1).

    Raises:
        ValueError: An unknown scheme; weights that are negative, not finite or all zero; when fitting starts: a class
            without examples.
        TypeError: When fitting starts: the loss takes no class weights, an example has several labels, or the loader is
            an iterator, which counting would use up.
    """

    weights: str | Tensor | Sequence[float] | Mapping[int, float] = field(default="balanced", converter=_weights)
    num_classes: int | None = field(default=None, kw_only=True, validator=integer(2, or_none=True))
    absent: str = field(default="error", kw_only=True, validator=one_of("error", "zero"))
    beta: float = field(default=0.999, kw_only=True)

    @beta.validator
    def _check_beta(self, _: Any, value: Any) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"beta must be in [0, 1), got {value!r}")

    def __attrs_post_init__(self) -> None:
        self._saved: dict[str, Tensor | None] | None = None

    def on_fit_start(self, state: State) -> None:
        """Count, weigh, and put the weights into ``state.loss``."""
        if not hasattr(state.loss, "weighted"):
            raise TypeError(
                f"WeightedLoss needs a loss that takes class weights, such as fitwatch.CrossEntropy or "
                f"torch.nn.CrossEntropyLoss, got {type(state.loss).__name__}"
            )
        keep = state.resumed and isinstance(self.weights, str)  # a resumed run keeps the weights that it counted
        if self._saved is None or not keep:
            self._saved = self._find(state)
        weights, counts = self._saved["weights"], self._saved["counts"]
        assert weights is not None
        state.loss = state.loss.weighted(weights)
        state.settings["class_weights"] = self.weights if isinstance(self.weights, str) else "given"
        state.log("train/report/class_weights", _table(weights, counts))

    def _find(self, state: State) -> dict[str, Tensor | None]:
        if isinstance(self.weights, Tensor):
            return {"weights": self.weights, "counts": None}
        classes = 2 if isinstance(state.loss, BinaryCrossEntropy) else self.num_classes
        ignore = getattr(state.loss, "ignore_index", None)
        targets = exposed_targets(state.train_loader)
        if classes == 2 and targets is not None and targets.ndim > 1 and targets.shape[1] > 1:
            raise TypeError(
                f"WeightedLoss weighs classes that exclude each other, got {targets.shape[1]} labels an example; "
                "give BinaryCrossEntropy a pos_weight of one value per label instead"
            )
        counts = (
            _count_by_pass(state.train_loader, classes, ignore)
            if targets is None
            else count_classes(targets, num_classes=classes, ignore_index=ignore)
        )
        scheme = str(self.weights)
        return {
            "weights": class_weights(counts, scheme, beta=self.beta, absent=self.absent),
            "counts": counts,
        }

    def state_dict(self) -> dict[str, Any]:
        """The weights and counts in force."""
        return {"saved": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self._saved = state_dict["saved"]


def _count_by_pass(loader: Iterable[Any], classes: int | None, ignore: int | None) -> Tensor:
    if isinstance(loader, Iterator):  # and not iter(loader): a DataLoader would draw a random number
        raise TypeError(
            "WeightedLoss can't count the targets of an iterator, which a pass would use up; "
            "give it the weights, or a loader that can be iterated again"
        )
    kept = [(g, g.get_state()) for g in generators_of(loader)]
    before = rng_state()  # drawing batches moves the generators; training must not notice
    counts = torch.zeros(classes or 0, dtype=torch.float64)
    for batch in tqdm(loader, desc="counting classes", total=length(loader), disable=None, leave=False):
        new = count_classes(input_and_target(batch)[1], num_classes=classes, ignore_index=ignore).cpu()
        counts = torch.cat([counts, counts.new_zeros(max(0, len(new) - len(counts)))])
        counts[: len(new)] += new
    set_rng_state(before)
    for generator, state in kept:
        generator.set_state(state)
    return counts


def _table(weights: Tensor, counts: Tensor | None) -> str:
    rows = ["| class | examples | weight |", "|---|---|---|"]
    for label, weight in enumerate(weights.tolist()):
        rows.append(f"| {label} | {'' if counts is None else f'{counts[label].item():g}'} | {weight:.4g} |")
    return "\n".join(rows)
