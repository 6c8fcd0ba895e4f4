"""Class weights from the distribution of the training data."""

import logging
from collections.abc import Mapping, Sequence

from attrs import Attribute, define, field
from torch import Tensor
from torch.nn import functional
from torch.utils.data import WeightedRandomSampler

from fitwatch.callback import Callback
from fitwatch.data.batches import sampler_of
from fitwatch.data.counting import count_over_ranks, loss_counts
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.markdown import table
from fitwatch.helpers.options import instance, integer, one_of
from fitwatch.losses import BinaryCrossEntropy, Loss
from fitwatch.losses.base import ClassLoss
from fitwatch.losses.weighting import (
    SCHEMES,
    Counts,
    as_class_weights,
    as_counts,
    class_weights,
    favours_common,
    normalized,
)
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

_Found = tuple[Tensor, Tensor | None]  # full weights, and the counts if they are known


def _weights(spec: str | Tensor | Sequence[float] | Mapping[int, float]) -> str | Tensor:
    if isinstance(spec, str):
        if spec not in SCHEMES:
            raise ValueError(f"weights must be one of {', '.join(SCHEMES)}, a tensor or a dict, got {spec!r}")
        return spec
    return as_class_weights(spec)


def _counts(given: Counts | None) -> Tensor | None:
    return None if given is None else as_counts(given)


@define(eq=False, slots=False)
class WeightedLoss(Callback):
    """Gives the loss class weights when fitting starts, and logs them in a table with the class counts.

    Classes are counted as by `count_classes`: without reading an example if the training data set exposes its targets,
    else in one pass over the loader that leaves the random generators unchanged. Sample weights count if available.
    The counts describe the data set; a sampler that balances the batches does not affect them.

    For `BinaryCrossEntropy`, ``pos_weight`` = w_1 / w_0: one per label for targets of shape (N, K) with K >= 2, else a
    single one.

    ``start_epoch`` and ``ramp_epochs`` defer the weights (deferred re-weighting, Cao et al. 2019, arXiv 1906.07413,
    section 3.3). Training is unweighted before ``start_epoch``. From then on it uses the weights to the power
    t = (epoch - start_epoch + 1) / (ramp_epochs + 1), at most 1: class weights are ratios, and ``"sqrt_inverse"`` is
    halfway to ``"inverse"``. A weight of 0 is 0 from ``start_epoch`` on. ``val/loss`` always has the full weights, so
    that it is comparable between epochs; ``train/loss`` has those of its epoch.

    A resumed run keeps the weights of a scheme, even if the data set has changed.

    Args:
        weights: ``"balanced"``, ``"inverse"``, ``"sqrt_inverse"``, ``"median_frequency"`` or ``"effective_number"``
            (see `class_weights`), or the weights: a tensor or sequence of shape (C,), or a dict class -> weight.
        counts: Counts for a scheme, instead of counting: shape (C,), a mapping class -> count (such as a `Counter`), or
            shape (K, 2) for the negatives and positives of K labels.
        num_classes: C, if the training data may lack the last classes. Default: that of the weights, costs or counts
            of the loss, else the largest label + 1.
        absent: How to treat a class without examples: ``"error"``, or ``"zero"`` to give it weight 0 (see
            `class_weights` for labels).
        beta: Parameter of ``"effective_number"``, in [0, 1).
        normalize: Whether to scale the weights to a mean of 1 over the data, which preserves the scale of a loss that
            does not divide by their sum. `BinaryCrossEntropy` then weights the negatives too.
        start_epoch: First epoch with weights, from 0.
        ramp_epochs: Number of epochs, from ``start_epoch`` on, in which they grow.

    Raises:
        ValueError: The scheme is unknown; weights or counts are negative or not finite; all weights are 0; counts are
            given together with weights; when fitting starts: a class has no examples.
        TypeError: When fitting starts: the loss does not support class weights, or the loader is an iterator, which
            counting would exhaust.
    """

    weights: str | Tensor | Sequence[float] | Mapping[int, float] = field(default="balanced", converter=_weights)
    counts: Tensor | None = field(default=None, kw_only=True, converter=_counts)
    num_classes: int | None = field(default=None, kw_only=True, validator=integer(2, or_none=True))
    absent: str = field(default="error", kw_only=True, validator=one_of("error", "zero"))
    beta: float = field(default=0.999, kw_only=True)
    normalize: bool = field(default=False, kw_only=True, validator=instance(bool))
    start_epoch: int = field(default=0, kw_only=True, validator=integer(0))
    ramp_epochs: int = field(default=0, kw_only=True, validator=integer(0))

    @counts.validator
    def _check_counts(self, _: "Attribute[Tensor | None]", value: Tensor | None) -> None:
        if value is not None and isinstance(self.weights, Tensor):
            raise ValueError("counts are for a scheme, but the weights are given: omit one of them")

    @beta.validator
    def _check_beta(self, _: "Attribute[float]", value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"beta must be in [0, 1), got {value!r}")

    def __attrs_post_init__(self) -> None:
        self._found: _Found | None = None
        self._warned = False
        self._loss: Loss  # as given to the Trainer

    @property
    def _full_epoch(self) -> int:
        """First epoch with the full weights; 0 without a schedule."""
        return self.start_epoch + self.ramp_epochs

    def on_fit_start(self, state: State) -> None:
        """Compute the weights and set ``state.loss`` and, with a schedule, ``state.eval_loss``."""
        if not isinstance(state.loss, Loss) or type(state.loss).weighted is Loss.weighted:
            raise TypeError(
                "WeightedLoss needs a loss that supports class weights, such as fitwatch.CrossEntropy or "
                f"torch.nn.CrossEntropyLoss, got {type(state.loss).__name__}"
            )
        self._loss = state.loss
        self._found = self._find(state)
        self._warn(state)
        if isinstance(self.weights, str) and isinstance(sampler_of(state.train_loader), WeightedRandomSampler):
            logger.warning(
                "train_loader has a WeightedRandomSampler, and WeightedLoss weights the classes too: rare classes are "
                "weighted twice"
            )
        state.settings["class_weights"] = self.weights if isinstance(self.weights, str) else "given"
        text = _table(*self._found, state.validation.class_names(len(self._found[0])))
        state.loss = self._loss_in(state.progress.epoch)
        if self._full_epoch:
            state.eval_loss = self._loss_in(self._full_epoch)
            text += f"\n\n{self._plan()}"
        state.log("train/report/class_weights", text)

    def on_epoch_start(self, state: State) -> None:
        """With a schedule, set the loss with the weights of this epoch."""
        if not self._full_epoch:
            return
        epoch = state.progress.epoch
        state.loss = self._loss_in(epoch).to(state.device)
        if epoch == self._full_epoch:
            state.log("train/report/class_weights", f"Epoch {epoch}: the class weights reach their full values.")
        elif epoch == self.start_epoch:
            state.log("train/report/class_weights", f"Epoch {epoch}: the class weights start to grow.")

    def state_dict(self) -> StateDict:
        """Return the full weights and the counts."""
        return {"saved": self._found}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""
        self._found = state_dict["saved"]

    def _find(self, state: State) -> _Found:
        """Compute the full weights, and the counts if they are needed."""
        saved = self._found if state.resumed else None
        if isinstance(self.weights, Tensor):
            if not self.normalize:
                return self.weights, None
            known = None if saved is None else saved[1]
            counts = self._count(state, len(self.weights)) if known is None else known
            return normalized(self.weights, counts), counts
        if saved is not None and self.counts is None:
            return saved
        counts = self._count(state, self.num_classes) if self.counts is None else self._given_counts(self.counts)
        weights = class_weights(counts, str(self.weights), beta=self.beta, absent=self.absent, normalize=self.normalize)
        return weights, counts

    def _given_counts(self, counts: Tensor) -> Tensor:
        lacking = 0 if self.num_classes is None or counts.dim() > 1 else max(0, self.num_classes - len(counts))
        return functional.pad(counts, (0, lacking))

    def _warn(self, state: State) -> None:
        """Warn if the weights replace those of the loss, or favour the common classes."""
        assert self._found is not None
        weights, counts = self._found
        name = "weight" if isinstance(self._loss, ClassLoss) else "pos_weight"
        own = getattr(self._loss, name, None)
        if isinstance(own, Tensor):
            logger.warning(
                "the loss has weights already, %s=%s: WeightedLoss replaces them by the class weights %s. Give one of "
                "the two",
                name,
                _short(own),
                _short(weights),
            )
        if weights.dim() == 1 and (isinstance(self.weights, Tensor) or self.counts is not None):
            if counts is None or self.counts is not None:
                counts = loss_counts(self._loss, state.train_loader, len(weights))  # without a pass over the data
            if counts is not None and counts.shape == weights.shape and favours_common(weights, counts):
                logger.warning(
                    "rarer classes have smaller weights. The weights are %s, the counts %s; are the classes swapped?",
                    _short(weights),
                    _short(counts),
                )

    def _count(self, state: State, num_classes: int | None) -> Tensor:
        try:
            return self._counted(state, num_classes)
        except TypeError as error:
            why = str(error).partition("; for other batches")[0]
            raise TypeError(
                f"WeightedLoss can't count the classes: {why}. Give it the counts, as in WeightedLoss('balanced', "
                "counts=[900, 100]), or a dict class -> count"
            ) from error

    def _counted(self, state: State, num_classes: int | None) -> Tensor:
        if isinstance(self._loss, BinaryCrossEntropy):
            counts = count_over_ranks(state.train_loader, multi_label=True)
            return counts[0] if len(counts) == 1 else counts
        ignore_index = getattr(self._loss, "ignore_index", None)
        counts = count_over_ranks(state.train_loader, num_classes=num_classes, ignore_index=ignore_index)
        fixed = self._loss.fixed_classes
        if num_classes is None and fixed is not None and len(counts) < fixed:
            counts = functional.pad(counts, (0, fixed - len(counts)))  # the last classes are absent
        return counts

    def _loss_in(self, epoch: int) -> Loss:
        """Return the loss with the weights of an epoch."""
        assert self._found is not None
        weights, counts = self._found
        power = (epoch - self.start_epoch + 1) / (self.ramp_epochs + 1)
        if power <= 0:
            return self._loss.unweighted()
        if power < 1:
            weights = weights**power
            if counts is not None and self.normalize:
                weights = normalized(weights, counts)
        if isinstance(self._loss, BinaryCrossEntropy):
            return self._loss.weighted(weights, keep_scale=self.normalize)
        return self._loss.weighted(weights)

    def _plan(self) -> str:
        ramp = f"grow from epoch {self.start_epoch + 1} and " if self.ramp_epochs else ""
        before = " Before that, training is unweighted." if self.start_epoch else ""
        return (
            f"In training, the weights {ramp}have their full values from epoch {self._full_epoch + 1}."
            f"{before} Validation always uses the full weights."
        )


def _short(values: Tensor) -> str:
    """Return the first values of a tensor."""
    numbers = values.flatten().tolist()
    return f"[{', '.join(f'{v:.4g}' for v in numbers[:10])}{', ...' if len(numbers) > 10 else ''}]"


def _table(weights: Tensor, counts: Tensor | None, names: Sequence[str]) -> str:
    multi_label = ("label", "negatives", "positives", "weight of negatives", "weight of positives")
    rows = []
    for label, weight in enumerate(weights.reshape(len(weights), -1).tolist()):
        known = [] if counts is None else counts.reshape(len(weights), -1)[label].tolist()
        cells = [f"{n:.10g}" for n in known] or [""] * len(weight)
        rows.append([names[label], *cells, *(f"{w:.4g}" for w in weight)])
    return table(multi_label if weights.dim() == 2 else ("class", "examples", "weight"), rows)
