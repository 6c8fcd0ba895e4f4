"""Checks of the model, the data and the first batch, for mistakes that would otherwise only spoil the numbers.

Each check warns once, before step 1, and names what to write. None of them raises, since each may be wrong.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fitwatch import ranks
from fitwatch.data import batches
from fitwatch.data.counting import exposed_targets, loss_counts
from fitwatch.data.joining import tensors
from fitwatch.helpers.aliases import Loader
from fitwatch.helpers.modules import named_parameters
from fitwatch.losses import BinaryCrossEntropy, ExpectedCost, NegativeLogLikelihood, RealWorldCrossEntropy
from fitwatch.losses.base import ClassLoss, Loss
from fitwatch.losses.errors import check_labels
from fitwatch.losses.weighting import favours_common
from fitwatch.measuring.per_class import check_class_names, has_classes
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

CHECKS: Final = (
    "untrained_parameters",
    "shared_examples",
    "validation_order",
    "last_batch",
    "class_weights",
    "probabilities",
    "labels",
    "unreached_parameters",
)
"""The names that ``skip_checks`` takes."""

_BINARY = (BinaryCrossEntropy, nn.BCEWithLogitsLoss)
_OF_CLASSES = (ClassLoss, ExpectedCost, RealWorldCrossEntropy, nn.CrossEntropyLoss)
_SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Checks:
    """Runs the checks that are not skipped.

    Args:
        state: The state of the fit.
        skip: Names of checks not to run.

    Attributes:
        found: What was found so far, in sentences.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(self, state: State, skip: Collection[str]) -> None:
        if not isinstance(skip, Iterable):
            raise TypeError(f"skip_checks must be a list of names, got {skip!r}")
        names = [skip] if isinstance(skip, str) else list(skip)
        for name in names:
            if name not in CHECKS:
                raise ValueError(f"skip_checks takes names among {', '.join(CHECKS)}, got {name!r}")
        self._state, self._skip = state, frozenset(names)
        self.found: list[str] = []

    def before_training(self) -> None:
        """Check the optimizer and the loaders."""
        state = self._state
        self._warn("untrained_parameters", untrained_parameters(state.model, state.optimizer))
        if isinstance(state.loss, nn.Module):
            self._warn("untrained_parameters", untrained_parameters(state.loss, state.optimizer, of="loss"))
        for name, loader in validation_loaders(state).items():
            self._warn("shared_examples", shared_examples(state.train_loader, loader, name))
            if loader is not state.train_loader:
                self._warn("validation_order", validation_order(loader, name))
        self._warn("last_batch", last_batch(state.model, state.train_loader))
        if state.settings.get("class_weights", "none") == "none":  # WeightedLoss looks itself
            self._warn("class_weights", class_weights(state.loss, state.train_loader))

    def first_batch(self, output: object, target: object) -> None:
        """Check the outputs and targets of the first batch, which the loss has accepted."""
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return
        loss, validation = self._state.loss, self._state.validation
        if validation.named and validation.classes is not None and has_classes(loss):
            check_class_names(validation.classes, output)
        self._warn("probabilities", probabilities(loss, output.detach(), target))
        if isinstance(loss, ClassLoss):
            if output.dim() > 1 and not target.is_floating_point() and target.shape == output.shape[:1]:
                self._refuse_labels(output.shape[1], target, loss.ignore_index)
            self._warn("labels", labels(output, target, self._state.train_loader, loss.ignore_index))

    def _refuse_labels(self, num_classes: int, target: Tensor, ignore_index: int) -> None:
        """Raise an IndexError if a label that no batch has shown yet is out of range, where all of them are exposed."""
        state = self._state
        try:
            parts = batches.unpack(state.batch)
        except (TypeError, ValueError):
            return
        if len(parts) < 2 or parts[1] is not target:  # the training step makes other targets of them
            return
        for name, loader in {"train_loader": state.train_loader, **validation_loaders(state)}.items():
            if not isinstance(loader, DataLoader) or loader.collate_fn is not default_collate:
                continue
            known = exposed_targets(loader)
            if known is None or known[0].dim() != 1 or known[0].is_floating_point():
                continue
            try:
                check_labels(known[0], num_classes, ignore_index)
            except IndexError as error:
                text = str(error).replace("of the batch", f"of the targets of {name}")
                raise IndexError(f"{text} (found in the first step)") from None

    def first_gradients(self) -> None:
        """Check the gradients of the first step."""
        self._warn("unreached_parameters", unreached_parameters(self._state.model, self._state.optimizer))

    def _warn(self, name: str, text: str | None) -> None:
        if text is None or name in self._skip:
            return
        self.found.append(text)
        if ranks.rank() == 0:
            logger.warning('%s (skip_checks=["%s"] turns this check off)', text, name)


def validation_loaders(state: State) -> dict[str, Loader]:
    """Return the validation loaders, under the names that a script has for them."""
    if state.val_loaders:
        return {f"val_loader[{name!r}]": loader for name, loader in state.val_loaders.items()}
    return {} if state.val_loader is None else {"val_loader": state.val_loader}


def untrained_parameters(module: nn.Module, optimizer: torch.optim.Optimizer, of: str = "model") -> str | None:
    """Look for trainable parameters of the model or the loss that the optimizer does not hold."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named_parameters(module) if p.requires_grad and id(p) not in held]
    if not missing:
        return None
    shown = ", ".join(f"`{name}`" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"the optimizer does not hold {len(missing)} trainable parameter{'s' * (len(missing) > 1)} of the {of} "
        f"({shown}), which will not be trained: create it with "
        f"{'model.parameters()' if of == 'model' else '[*model.parameters(), *loss.parameters()]'}, or freeze them "
        "with requires_grad_(False)"
    )


def unreached_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Look for parameters of the optimizer that the loss of the first step does not depend on."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is None}
    names = [name for name, p in named_parameters(model) if id(p) in held]
    if not names:
        return None
    shown = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} parameter{'s' * (len(names) > 1)} got no gradient in the first step ({shown}): the loss does "
        "not depend on them. Use them in forward, or freeze them with requires_grad_(False)"
    )


def shared_examples(train_loader: Loader, val_loader: Loader, name: str = "val_loader") -> str | None:
    """Look for training examples in the validation set."""
    if train_loader is val_loader:
        found = f"train_loader and {name} are the same object"
    else:
        count, of = _shared(train_loader, val_loader)
        if not count:
            return None
        where = "" if name == "val_loader" else f" in {name}"
        share = "all" if count == of else f"{count:,} of"
        found = f"{share} {of:,} validation examples{where} are also training examples"
    return f"{found}: the validation loss can't show overfitting. Split the data, for example with random_split"


def validation_order(val_loader: Loader, name: str = "val_loader") -> str | None:
    """Check that each validation sees the examples in the same order."""
    sampler = batches.sampler_of(val_loader) if isinstance(val_loader, DataLoader) else None
    shuffles = isinstance(sampler, _SHUFFLES) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)
    if not shuffles:
        return None
    return (
        f"{name} shuffles ({type(sampler).__name__}): the loss of an example can't be compared between "
        "validations, so the error bars of a rise are far wider. Use shuffle=False"
    )


def last_batch(model: nn.Module, train_loader: Loader) -> str | None:
    """Look for a last training batch of one example, which batch normalization can't use."""
    if _last_size(train_loader) != 1 or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return None
    return (
        "the last training batch of an epoch has one example, from which BatchNorm can't estimate a variance: use "
        "drop_last=True in the DataLoader"
    )


def class_weights(loss: object, train_loader: Loader) -> str | None:
    """Look for weights of the loss that fall with the rarity of the class, where counting the classes is free."""
    weights = None
    if isinstance(loss, ClassLoss):
        weights = loss.weight
    elif isinstance(loss, BinaryCrossEntropy) and loss.pos_weight is not None and loss.pos_weight.numel() == 1:
        weights = torch.stack([torch.ones_like(loss.pos_weight), loss.pos_weight]).flatten()
    if weights is None or not isinstance(loss, Loss):
        return None
    counts = loss_counts(loss, train_loader, len(weights))
    if counts is None or counts.shape != weights.shape or not favours_common(weights, counts):
        return None
    shown = [[round(v, 4) for v in values.tolist()[:10]] for values in (weights, counts)]
    return (
        f"rarer classes have smaller weights in the loss. The weights start with {shown[0]}, the counts with "
        f"{shown[1]}; are the classes swapped?"
    )


def probabilities(loss: object, output: Tensor, target: Tensor) -> str | None:
    """Check that the outputs are what the loss takes: logits, or log-probabilities."""
    if not output.numel() or not output.is_floating_point():
        return None
    while isinstance(loss, partial):
        loss = loss.func
    close = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
    one_logit = isinstance(loss, _OF_CLASSES) and output.shape == target.shape and output.shape[1:] in ((), (1,))
    if isinstance(loss, _BINARY) or loss is F.binary_cross_entropy_with_logits or one_logit:
        if output.numel() >= 16 and bool(((output >= 0) & (output <= 1)).all()) and bool((output > 0).any()):
            return (
                "all outputs of the first batch are in [0, 1]: the loss applies a sigmoid itself, so remove that of "
                "the model"
            )
    elif isinstance(loss, (NegativeLogLikelihood, nn.NLLLoss)) or loss is F.nll_loss:
        if output.dim() > 1 and bool((output.float().logsumexp(1).abs() > 10 * close).any()):
            return (
                "the outputs of the first batch are not log-probabilities, which NLLLoss takes: end the model with "
                "LogSoftmax, or use CrossEntropy on logits"
            )
    elif (
        (isinstance(loss, _OF_CLASSES) or loss is F.cross_entropy)
        and output.dim() > 1
        and output.shape[1] > 1
        and bool((output >= 0).all())
        and bool(((output.float().sum(1) - 1).abs() < close).all())
    ):
        return (
            "the outputs of the first batch are probabilities (each row sums to 1): the loss applies a softmax itself, "
            "so remove that of the model"
        )
    return None


def labels(output: Tensor, target: Tensor, train_loader: Loader, ignore_index: int = -100) -> str | None:
    """Look for labels that start at 1: no label is 0, in all targets if they are exposed, or in a large batch."""
    if target.is_floating_point() or output.dim() < 2 or ignore_index == 0:
        return None
    known = exposed_targets(train_loader) if isinstance(train_loader, DataLoader) else None
    seen = target if known is None else known[0]
    if known is None and seen.numel() < 20 * output.shape[1]:
        return None
    counted = seen[(seen >= 0) & (seen != ignore_index)]
    if seen.is_floating_point() or not counted.numel() or int(counted.min()) != 1:
        return None
    where = "the first batch" if known is None else "the training data"
    return (
        f"no label in {where} is 0, though the model has outputs for the classes 0 to {output.shape[1] - 1}: if the "
        "labels start at 1, subtract 1"
    )


def _last_size(loader: Loader) -> int | None:
    """Return the number of examples in the last batch; None if unknown."""
    if isinstance(loader, DataLoader):
        sampler = loader.batch_sampler
        if type(sampler) is not BatchSampler or sampler.drop_last or sampler.batch_size == 1:
            return None
        drawn = batches.length(sampler.sampler)
        return None if drawn is None else drawn % sampler.batch_size or sampler.batch_size
    if isinstance(loader, Sequence) and len(loader) > 1:
        try:
            return batches.batch_size(loader[-1])
        except (TypeError, ValueError):
            return None
    return None


_Examples = tuple[object, Tensor | None] | None  # the object that holds them, and which of its rows


def _examples(loader: Loader) -> _Examples:
    if isinstance(loader, DataLoader):
        held, rows = loader.dataset, None
        sampler = batches.sampler_of(loader)
        if isinstance(sampler, (SubsetRandomSampler, range, list)):
            rows = torch.as_tensor(list(getattr(sampler, "indices", sampler)))
        elif not isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler, type(None))):
            return None  # it may draw any part
        while isinstance(held, Subset):
            inner = torch.as_tensor(list(held.indices))
            rows, held = (inner if rows is None else inner[rows]), held.dataset
        return held, rows
    return None if not isinstance(loader, Sequence) else (loader, None)


def _shared(train_loader: Loader, val_loader: Loader) -> tuple[int, int]:
    """Return how many validation examples are training examples, and how many there are."""
    train, val = _examples(train_loader), _examples(val_loader)
    if train is None or val is None:
        return 0, 0
    (held, rows), (val_held, val_rows) = train, val
    if held is val_held:
        of = batches.length(val_held) if val_rows is None else len(val_rows)
        if of is None:
            return 0, 0
        if rows is None or val_rows is None:
            return (of if rows is None else len(set(rows.tolist()))), of
        return int(torch.isin(val_rows, rows).sum()), of
    return _same_memory(_inputs(held, train_loader), rows, _inputs(val_held, val_loader), val_rows)


def _same_memory(
    inputs: list[Tensor], rows: Tensor | None, val_inputs: list[Tensor], val_rows: Tensor | None
) -> tuple[int, int]:
    """Return how many rows of the validation lie where training rows do, and how many there are."""
    forms = {(t.shape[1:], t.dtype, t.device, t.is_contiguous()) for t in (*inputs, *val_inputs)}
    if not inputs or not val_inputs or len(forms) > 1 or not inputs[0].is_contiguous():
        return 0, 0
    known, seen = (torch.cat([_addresses(t) for t in parts]) for parts in (inputs, val_inputs))
    known, seen = known if rows is None else known[rows], seen if val_rows is None else seen[val_rows]
    if not (len(known) and len(seen)) or known.max() < seen.min() or seen.max() < known.min():
        return 0, len(seen)
    return int(torch.isin(seen, known).sum()), len(seen)


def _inputs(held: object, loader: Loader) -> list[Tensor]:
    """Return the inputs of all examples, of a `TensorDataset` or a list of batches; an empty list if unknown."""
    found: list[list[Tensor]] = []
    if isinstance(held, TensorDataset):
        found = [[held.tensors[0]]]
    elif held is loader and isinstance(held, (list, tuple)):
        with suppress(TypeError):  # of a container that can't be rebuilt
            found = [tensors(batches.as_tensors(batches.input_of(batch))) for batch in held]
    usable = all(parts and parts[0].layout is torch.strided and parts[0].numel() for parts in found)
    return [parts[0] for parts in found] if usable else []


def _addresses(rows: Tensor) -> Tensor:
    """Return where in memory each row of a contiguous tensor starts, int64."""
    if not rows.dim():
        return torch.tensor([rows.data_ptr()])
    return rows.data_ptr() + torch.arange(len(rows)) * (rows.nbytes // len(rows))
