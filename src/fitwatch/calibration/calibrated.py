"""What a calibration is once it is fitted, and a module that applies it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import asdict, cmp_using, field, fields_dict, frozen
from torch import Tensor, nn


def _tensor(value: object) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().cpu().reshape(-1)


def _optional(value: object) -> Tensor | None:
    return None if value is None else _tensor(value)


def _same(one: object, other: object) -> bool:
    """Return whether two tensors, or dicts of tensors, are equal to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other


@frozen(kw_only=True, unsafe_hash=False)
class Calibration:
    """How to turn a model's logits into calibrated ones, fitted to validation examples: (z - shift) / temperature.

    ``fw.Calibrated(model, calibration)`` applies it. Without class weights the shift is 0, so the decisions stay as
    they are. With class weights, the logits z of the model are those for classes as frequent as their weights make
    them; log w is taken off, which moves the arg-max to the common classes: take the decisions for balanced classes
    from the model itself. ``decisions`` holds the confusion matrices of both.

    A bias for each class, as an alternative, (z - shift) / biased_temperature + biases, lowers the log-loss a little
    more from some hundred examples on. It also moves the arg-max.

    Attributes:
        temperature: Above 1 for a model that is too sure of itself.
        shift: What the class weights have added to the logits, shape (C,); for labels (K,), for one logit (1,).
        biased_temperature: The temperature together with biases.
        biases: Shape as ``shift``; None for more than 300 classes.
        exclusive: Whether the logits are those of exclusive classes (softmax); else of labels (sigmoid).
        examples: Number of examples that it was fitted to.
        log_loss: Mean log-loss of the model's own outputs on them.
        calibrated_log_loss: The same at (z - shift) / temperature, cross-fitted: each example at a temperature fitted
            to the others.
        calibrated_log_loss_se: Standard error of the difference of the two, a paired one.
        decisions: Confusion matrices on the validation examples, shape (C, C), row true, column decided for, weighted
            if the examples are: ``"outputs"``, ``"calibrated"`` and ``"biased"``. Empty for several labels, and for
            more than 100 classes.
    """

    temperature: float = field(converter=float)
    shift: Tensor = field(converter=_tensor, eq=cmp_using(_same))
    biased_temperature: float = field(converter=float)
    biases: Tensor | None = field(converter=_optional, eq=cmp_using(_same))
    exclusive: bool = field(converter=bool)
    examples: int = field(converter=int)
    log_loss: float = field(converter=float)
    calibrated_log_loss: float = field(converter=float)
    calibrated_log_loss_se: float = field(converter=float)
    decisions: dict[str, Tensor] = field(factory=dict, eq=cmp_using(_same))

    @temperature.validator
    def _check_temperature(self, _: object, value: float) -> None:
        if not (0 < value < float("inf") and 0 < self.biased_temperature < float("inf")):
            raise ValueError(f"temperatures must be finite and above 0, got {value} and {self.biased_temperature}")

    def scale_and_bias(self, *, biases: bool = False) -> tuple[float, Tensor]:
        """Return a and b of the calibrated logits a z + b; b has the shape of ``shift``.

        Raises:
            ValueError: ``biases`` is True and there are none.
        """
        if not biases:
            return 1 / self.temperature, -self.shift / self.temperature
        if self.biases is None:
            raise ValueError(f"no biases are fitted for {len(self.shift)} classes: use biases=False")
        return 1 / self.biased_temperature, self.biases - self.shift / self.biased_temperature

    def logits(self, outputs: Tensor, *, biases: bool = False) -> Tensor:
        """Return the calibrated logits, in the shape of ``outputs``, at least float32.

        Args:
            outputs: Logits of the model, shape (N, C), or as the loss takes them: (N,), (N, 1) or (N, K).
            biases: Whether to use the temperature with biases.

        Raises:
            TypeError: The outputs are not one tensor.
            ValueError: The outputs have another number of classes.
        """
        scale, bias = self.scale_and_bias(biases=biases)
        return _affine(outputs, torch.tensor(scale), bias)

    def probabilities(self, outputs: Tensor, *, biases: bool = False) -> Tensor:
        """Return the softmax, or for labels and one logit the sigmoid, of `logits`."""
        z = self.logits(outputs, biases=biases)
        return z.softmax(1) if self.exclusive else z.sigmoid()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers only, as a checkpoint holds them; ``Calibration(**state_dict)`` restores it."""
        return asdict(self, recurse=False)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "Calibration":
        """Restore a calibration, such as that of ``torch.load("best.pt")["calibration"]``.

        Raises:
            ValueError: It is not one.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != fields_dict(cls).keys():
            raise ValueError(f"a calibration must have {', '.join(fields_dict(cls))}, got {state_dict!r:.80}")
        try:
            return cls(**state_dict)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"this is not a calibration: {error}") from error


class Calibrated(nn.Module):
    """A model with calibrated logits: that of ``model``, times a scale, plus a bias.

    Use it for predictions: train the model itself. It goes through `torch.export`; it takes any arguments, so dynamic
    shapes are given as ``{"args": ({0: batch},)}``. Its state dict holds the model's under ``model.`` beside ``scale``
    and ``bias``. Its outputs are float32 for a model in half precision.

    Args:
        model: A model whose output is one tensor of logits.
        calibration: That of ``result.calibration``, of `Trainer.fit` or a `Watch`.
        biases: Whether to use the temperature with biases.

    Raises:
        TypeError: ``model`` is not a module, or ``calibration`` not a `Calibration`; when called: the output is not one
            tensor.
        ValueError: There are no biases; when called: the output has another number of classes.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, calibration: Calibration, *, biases: bool = False) -> None:
        super().__init__()
        if not isinstance(calibration, Calibration):
            raise TypeError(
                f"calibration must be a Calibration, got {calibration!r:.80}: result.calibration is None if no "
                "callback had it measured; attach an OverfittingDetector"
            )
        scale, bias = calibration.scale_and_bias(biases=biases)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, such as nn.Linear(4, 2), got {model!r:.80}")
        self.model = model
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=place))
        self.register_buffer("bias", bias.to(place))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the calibrated logits; arguments are those of the model."""
        return _affine(self.model(*args, **kwargs), self.scale, self.bias)


def _affine(outputs: object, scale: Tensor, bias: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model must return one tensor of logits to be calibrated, got {type(outputs).__name__}: wrap it in a "
            "module that returns the logits"
        )
    columns = 1 if outputs.dim() == 1 else outputs.shape[1] if outputs.dim() == 2 else None
    if columns != len(bias):
        raise ValueError(f"the calibration is for outputs of shape (N, {len(bias)}), got {tuple(outputs.shape)}")
    dtype, device = torch.promote_types(outputs.dtype, torch.float32), outputs.device
    return outputs.to(dtype) * scale.to(device, dtype) + bias.to(device, dtype)


class Fitted:
    """The calibration of a model at one step, fitted when it is first asked for.

    Attributes:
        step: The step of the weights that it belongs to.
    """

    def __init__(self, make: Callable[[], Calibration], step: int) -> None:
        self._make: Callable[[], Calibration] | None = make
        self._made: Calibration | None = None
        self.step = step

    @classmethod
    def of(cls, calibration: Calibration, step: int) -> "Fitted":
        """Return one that is known already."""
        return cls(lambda: calibration, step)

    def moved(self, step: int) -> "Fitted":
        """Return the same calibration for weights that were restored at another step."""
        return Fitted(lambda: self.calibration, step)

    @property
    def calibration(self) -> Calibration:
        """The calibration; the examples are dropped once it is fitted."""
        if self._made is None:
            assert self._make is not None
            self._made, self._make = self._make(), None
        return self._made


def required(calibration: Calibration | None, unknown: str | None) -> Calibration:
    """Return the calibration of a fit.

    Raises:
        ValueError: There is none; ``unknown`` says why, if that is known.
    """
    if calibration is None:
        why = unknown or "no callback had it measured at the last step (an OverfittingDetector does)"
        raise ValueError(f"calibrated=True needs the calibration of the last fit, and it has none: {why}")
    return calibration
