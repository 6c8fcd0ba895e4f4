"""Class weights from the distribution of the training data."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler

from fitwatch.callback import Callback
from fitwatch.data.counting import count_over_ranks
from fitwatch.data.sharding import sampler_of
from fitwatch.losses import BinaryCrossEntropy, Loss
from fitwatch.losses.weighting import SCHEMES, as_class_weights, as_counts, class_weights, normalized
from fitwatch.options import instance, integer, one_of
from fitwatch.state import State

logger = logging.getLogger("fitwatch")


def _weights(spec: Any) -> str | Tensor:
    if isinstance(spec, str):
        if spec not in SCHEMES:
            raise ValueError(f"weights must be one of {', '.join(SCHEMES)}, a tensor or a dict, got {spec!r}")
        return spec
    return as_class_weights(spec)


def _counts(given: Any) -> Tensor | None:
    return None if given is None else as_counts(given)


@define(eq=False, slots=False)
class WeightedLoss(Callback):
    """Gives the loss class weights when fitting starts, and logs them as a table beside the class counts.

    The classes are counted as `count_classes` says: without reading an example where the training data set shows its
    targets, else by one pass over the loader, which leaves the random generators as they were. Weights of the examples
    count where they are seen. Counts are those of the data set: a sampler that balances the batches already is not
    taken into account.

    `BinaryCrossEntropy` gets ``pos_weight`` = w_1 / w_0: for targets of shape (N, K) with K >= 2 one for each label,
    for any other one for all.

    With ``start_epoch`` or ``ramp_epochs`` the weights come late (deferred re-weighting, Cao et al. 2019, arXiv
    1906.07413, section 3.3). Training is unweighted before ``start_epoch``. From there on it has the weights to the
    power t = (epoch - start_epoch + 1) / (ramp_epochs + 1), and in full once t is 1: class weights are ratios, and
    ``"sqrt_inverse"`` is half-way to ``"inverse"``. A weight of 0 is 0 from ``start_epoch`` on. ``val/loss`` has the
    full weights from the first epoch on, so that it means the same throughout; ``train/loss`` has those of its epoch.

    A resumed run keeps the weights of a scheme as they were, even if the data set has changed since.

    Args:
        weights: ``"balanced"``, ``"inverse"``, ``"sqrt_inverse"``, ``"median_frequency"`` or ``"effective_number"``
            (see `class_weights`), or the weights themselves: a tensor or sequence of shape (C,), or a dict
            class -> weight.
        counts: Counts to use for a scheme in place of counting: shape (C,), or (K, 2) for the negatives and positives
            of K labels.
        num_classes: C, where the training data may lack the last classes. Default: that of the weights, costs or
            counts that the loss has itself, else the largest label + 1.
        absent: What a class without examples means: ``"error"``, or ``"zero"`` to give it weight 0 (see
            `class_weights` for labels).
        beta: Of ``"effective_number"``, in [0, 1).
        normalize: Whether to scale the weights to a mean of 1 over the data, so that they leave the scale of a loss
            that does not divide by their sum. `BinaryCrossEntropy` then weighs the negatives too.
        start_epoch: First epoch with weights, from 0.
        ramp_epochs: Epochs from ``start_epoch`` on in which they grow.

    Raises:
        ValueError: An unknown scheme; weights or counts that are negative or not finite; weights that are all 0;
            counts beside given weights; when fitting starts: a class without examples.
        TypeError: When fitting starts: the loss takes no class weights, or the loader is an iterator, which counting
            would use up.
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
    def _check_counts(self, _: Any, value: Any) -> None:
        if value is not None and isinstance(self.weights, Tensor):
            raise ValueError("counts are for a scheme, and the weights are given: leave one of them out")

    @beta.validator
    def _check_beta(self, _: Any, value: Any) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"beta must be in [0, 1), got {value!r}")

    def __attrs_post_init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._told = False
        self._loss: Any = None  # as it was given

    @property
    def _full_epoch(self) -> int:
        """The first epoch with the full weights; 0 without a schedule."""
        return self.start_epoch + self.ramp_epochs

    def on_fit_start(self, state: State) -> None:
        """Count, weigh, and put the weights into ``state.loss``, or, with a schedule, into ``state.eval_loss``."""
        self._loss = state.loss
        self._check_loss()
        self._saved = self._find(state)
        if isinstance(self.weights, str) and isinstance(sampler_of(state.train_loader), WeightedRandomSampler):
            logger.warning(
                "train_loader has a WeightedRandomSampler beside the class weights of WeightedLoss, which are those of "
                "the whole data set: rare classes are weighed twice"
            )
        state.settings["class_weights"] = self.weights if isinstance(self.weights, str) else "given"
        text = _table(**self._saved)
        state.loss = self._loss_in(state.progress.epoch)
        if self._full_epoch:
            state.eval_loss = self._loss_in(self._full_epoch)
            text += f"\n\n{self._plan()}"
        state.log("train/report/class_weights", text)

    def on_epoch_start(self, state: State) -> None:
        """Put in the weights of this epoch, if they have a schedule."""
        if not self._full_epoch:
            return
        epoch = state.progress.epoch
        loss = self._loss_in(epoch)
        state.loss = loss.to(state.device) if isinstance(loss, nn.Module) else loss
        if epoch == self._full_epoch:
            state.log("train/report/class_weights", f"Epoch {epoch}: the class weights are in force in full.")
        elif epoch == self.start_epoch:
            state.log("train/report/class_weights", f"Epoch {epoch}: the class weights begin to grow.")

    def on_log(self, state: State) -> None:
        """Say once if the weights reach no training step."""
        if not (state.uses_loss or self._told):
            self._told = True
            logger.warning(
                "the class weights of WeightedLoss don't reach training: training_step does not call compute_loss "
                "(self.loss is the loss without them)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The full weights and the counts."""
        return {"saved": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self._saved = state_dict["saved"]

    def _check_loss(self) -> None:
        loss = self._loss
        takes = hasattr(loss, "weighted") and (not self._full_epoch or hasattr(loss, "unweighted"))
        if not takes or (isinstance(loss, Loss) and type(loss).weighted is Loss.weighted):
            raise TypeError(
                "WeightedLoss needs a loss that takes class weights, such as fitwatch.CrossEntropy or "
                f"torch.nn.CrossEntropyLoss, got {type(loss).__name__}"
            )

    def _find(self, state: State) -> dict[str, Any]:
        """The full weights, and the counts where they are known."""
        saved = self._saved if state.resumed and self._saved is not None else {}
        if isinstance(self.weights, Tensor):
            if not self.normalize:
                return {"weights": self.weights, "counts": None}
            counts = saved.get("counts")
            if counts is None:
                counts = self._count(state, len(self.weights))
            return {"weights": normalized(self.weights, counts), "counts": counts}
        if saved and self.counts is None:
            return saved
        counts = self._count(state, self.num_classes) if self.counts is None else self.counts
        weights = class_weights(counts, str(self.weights), beta=self.beta, absent=self.absent, normalize=self.normalize)
        return {"weights": weights, "counts": counts}

    def _count(self, state: State, num_classes: int | None) -> Tensor:
        if isinstance(self._loss, BinaryCrossEntropy):
            counts = count_over_ranks(state.train_loader, multi_label=True)
            return counts[0] if len(counts) == 1 else counts
        ignore_index = getattr(self._loss, "ignore_index", None)
        counts = count_over_ranks(state.train_loader, num_classes=num_classes, ignore_index=ignore_index)
        fixed = self._loss.fixed_classes if isinstance(self._loss, Loss) else None
        if num_classes is None and fixed is not None and len(counts) < fixed:
            counts = torch.cat([counts, counts.new_zeros(fixed - len(counts))])  # the last classes are absent
        return counts

    def _loss_in(self, epoch: int) -> Any:
        """The loss with the weights of an epoch."""
        assert self._saved is not None
        weights, counts = self._saved["weights"], self._saved["counts"]
        if epoch < self.start_epoch:
            return self._loss.unweighted()
        if epoch < self._full_epoch:
            weights = weights ** ((epoch - self.start_epoch + 1) / (self.ramp_epochs + 1))
            if self.normalize:
                weights = normalized(weights, counts)
        if isinstance(self._loss, BinaryCrossEntropy):
            return self._loss.weighted(weights, keep_scale=self.normalize)
        return self._loss.weighted(weights)

    def _plan(self) -> str:
        ramp = f"grow from epoch {self.start_epoch} on and " if self.ramp_epochs else ""
        before = " Before, training is unweighted." if self.start_epoch else ""
        return (
            f"In training the weights {ramp}are in force in full from epoch {self._full_epoch} on (the first is epoch "
            f"0).{before} Validation has them in full throughout."
        )


def _table(weights: Tensor, counts: Tensor | None) -> str:
    if weights.dim() == 2:
        rows = [
            "| label | negatives | positives | weight of negatives | weight of positives |",
            "|---|---|---|---|---|",
        ]
    else:
        rows = ["| class | examples | weight |", "|---|---|---|"]
    for label, weight in enumerate(weights.reshape(len(weights), -1).tolist()):
        known = [] if counts is None else counts.reshape(len(weights), -1)[label].tolist()
        cells = [f"{n:.10g}" for n in known] or [""] * len(weight)
        rows.append(f"| {' | '.join([str(label), *cells, *(f'{w:.4g}' for w in weight)])} |")
    return "\n".join(rows)
