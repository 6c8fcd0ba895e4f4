"""An average of the weights over the steps, for validation and as the result."""

from attrs import define, field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fitwatch import ranks
from fitwatch.callback import Callback
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.expanded import compact
from fitwatch.helpers.modules import unwrap
from fitwatch.helpers.options import integer, number
from fitwatch.state import State


@define(eq=False, slots=False)
class WeightAverage(Callback):
    """Averages the weights over the steps; validation measures the average, and the model ends with it.

    The average is torch's `AveragedModel`. It is swapped in before each validation and out after it, so ``val/loss``,
    early stopping, the overfitting verdict and ``best.pt`` all refer to averaged weights, while training goes on with
    its own. At the end of the fit the average is in the model; `EarlyStopping` then restores the best one. The model in
    ``epoch-N.pt`` is the one in training, and the average is kept beside it. Each fit that is not resumed starts a new
    average.

    The running statistics of normalization layers are averaged too; other buffers are those of the model in training.
    For a plain average over many steps these statistics are an approximation: after the fit,
    ``torch.optim.swa_utils.update_bn(train_loader, model)`` measures them again.

    It swaps back after all other callbacks, wherever it stands in the list. It takes memory for two copies of the
    weights during a validation, and for one at other times.

    Args:
        decay: From 0 to below 1: after each step the average becomes ``decay`` times itself plus ``1 - decay`` times
            the weights (EMA). It covers about ``1 / (1 - decay)`` steps. None: the mean of the weights after each step
            (SWA).
        start_epoch: Index, from 0, of the epoch whose first step starts the average. Before it, validation measures the
            weights in training.

    Raises:
        ValueError: ``decay`` or ``start_epoch`` is out of range.
        TypeError: One of them is not a number; at the first averaged step: weights are in half precision.
    """

    decay: float | None = field(default=0.999, validator=number(least=0, or_none=True))
    start_epoch: int = field(default=0, kw_only=True, validator=integer(0))

    runs_last = True

    def __attrs_post_init__(self) -> None:
        if self.decay is not None and self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay!r}: the average would never move")
        self._average: AveragedModel | None = None
        self._loaded: StateDict | None = None  # from a checkpoint, until the model is known
        self._trained: list[Tensor] | None = None  # the weights in training, while the average is in the model

    def on_fit_start(self, state: State) -> None:
        """Start over, unless training resumes."""
        self._average = self._trained = None
        loaded, self._loaded = self._loaded, None
        if state.resumed and loaded is not None:
            self._average = self._new(state.model)
            self._average.load_state_dict(loaded)

    def on_step_end(self, state: State) -> None:
        """Add the weights to the average."""
        if state.progress.epoch < self.start_epoch:
            return
        model = unwrap(state.model)
        if self._average is None:
            self._average = self._new(model)
        average, count = self._average, int(self._average.n_averaged)
        before = [b.clone() for b in _statistics(average.module)]
        average.update_parameters(model)  # copies all buffers: a counter or a mask has no average
        share = 1 / (count + 1) if self.decay is None or not count else 1 - self.decay
        for statistic, kept in zip(_statistics(average.module), before, strict=True):
            statistic.copy_(kept.lerp_(statistic, share))

    def on_validation_start(self, state: State) -> None:
        """Swap the average in."""
        if self._average is not None:
            self._trained = [t.clone() for t in _tensors(state.model)]
            self._put_average(state.model)

    def on_validation_end(self, state: State) -> None:
        """Swap the weights in training back."""
        if self._trained is not None:
            for here, kept in zip(_tensors(state.model), self._trained, strict=True):
                here.copy_(kept)
        self._trained = None

    def on_fit_end(self, state: State) -> None:
        """Leave the average in the model, however the fit ended."""
        if self._average is not None:
            if state.error is None:  # each rank has averaged its own statistics
                ranks.align([self._average.module], buffers_only=True)
            self._put_average(state.model)
        self._average = self._trained = None

    def state_dict(self) -> StateDict:
        """Return the average and the number of steps in it."""
        return {"average": None if self._average is None else self._average.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""
        self._loaded = state_dict["average"]

    def _new(self, model: nn.Module) -> AveragedModel:
        inner = unwrap(model)
        for name, p in inner.named_parameters():
            if p.is_floating_point() and p.element_size() < 4:
                raise TypeError(
                    f"WeightAverage can't average {name}, which is in {p.dtype}: its rounding swallows the small "
                    "changes of an average; keep the weights in float32 and use autocast (precision=)"
                )
        if self.decay is None:
            return AveragedModel(inner, multi_avg_fn=get_swa_multi_avg_fn())  # type: ignore[no-untyped-call] # torch's
        return AveragedModel(inner, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call] # torch's

    def _put_average(self, model: nn.Module) -> None:
        assert self._average is not None
        for here, average in zip(_tensors(model), _tensors(self._average.module), strict=True):
            here.copy_(average)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers, outside the gradient graph."""
    inner = unwrap(model)
    return [compact(t) for t in (*inner.parameters(), *inner.buffers())]


def _statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of the normalization layers."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    return [b for layer in layers for b in layer.buffers(recurse=False) if b.is_floating_point()]
