"""The progress and the plan of training."""

from attrs import define, field, frozen

from fitwatch.helpers.options import integer, number


@define(kw_only=True)
class Progress:
    """Counters of completed epochs, steps and micro-batches.

    Attributes:
        epoch: Completed epochs, which is also the index (from 0) of the running one.
        step: Optimizer steps, the x-axis of every curve.
        epoch_step: Steps within the current epoch.
        epoch_batch: Micro-batches within the current epoch.
        first_epoch: ``epoch`` when the current fit started; its ``epochs`` count from here.
        first_step: ``step`` when the current fit started; its ``max_steps`` count from here.
    """

    epoch: int = 0
    step: int = 0
    epoch_step: int = 0
    epoch_batch: int = 0
    first_epoch: int = 0
    first_step: int = 0


@frozen(kw_only=True)
class Plan:
    """Limits and options of the current fit.

    Attributes:
        epochs: Epochs to train; None: no limit.
        max_steps: Optimizer steps to train; None: no limit.
        accumulate: Micro-batches per step. The last step of an epoch may have fewer.
        clip_norm: Largest total 2-norm of the gradients; None: no clipping.
        log_every: Steps per log window.
        sanity_steps: Validation batches that are tried before step 1.
        evaluations: Validations that are planned; None: not known.
    """

    epochs: int | None = field(default=None, validator=integer(1, or_none=True))
    max_steps: int | None = field(default=None, validator=integer(1, or_none=True))
    accumulate: int = field(default=1, validator=integer(1))
    clip_norm: float | None = field(default=None, validator=number(above=0, or_none=True))
    log_every: int = field(default=50, validator=integer(1))
    sanity_steps: int = field(default=2, validator=integer(0))
    evaluations: int | None = field(default=None, validator=integer(0, or_none=True))
