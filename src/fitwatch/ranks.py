"""Communication between the processes (ranks) that train one model together.

All ranks must call each function. With a single rank they cost nothing.
"""

import atexit
import logging
import math
import os
import reprlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitwatch.helpers.expanded import compact

T = TypeVar("T")

logger = logging.getLogger("fitwatch")

_BUCKET = 1 << 23  # numbers per transfer: enough to saturate a link, few compared with all gradients


def start(device: torch.device) -> None:
    """Join the process group that ``torchrun`` launched, unless the script has already done so or there is none."""
    if not dist.is_available():
        return
    if not dist.is_initialized() and _launched() and "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    if rank() and _only_main not in logger.filters:
        logger.addFilter(_only_main)
    if dist.is_initialized() and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # collectives exchange tensors there


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # A gloo thread needs the interpreter to free the tensors of the last exchange; without it the process aborts.
        time.sleep(0.2)


def _only_main(record: logging.LogRecord) -> bool:
    """Filter out warnings on all ranks but rank 0, which emits the same ones."""
    return not rank() or record.levelno >= logging.ERROR


def size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank, from 0; rank 0 writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_device() -> str:
    """Return the GPU of this process: under ``torchrun`` the one with its local rank, else the current one."""
    if _launched() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return f"cuda:{torch.cuda.current_device()}" if size() > 1 else "cuda"


def _launched() -> bool:
    """Return whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


# -- values ------------------------------------------------------------------------------------------------------------


def gather(value: T) -> list[T]:
    """Return every rank's value, in rank order."""
    if size() == 1:
        return [value]
    values: list[T | None] = [None] * size()
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def from_main(value: T) -> T:
    """Return rank 0's value."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def sums(values: Sequence[float]) -> list[float]:
    """Sum each value over the ranks; the result is bit-identical on all of them."""
    if size() == 1:
        return list(values)
    own = torch.tensor(values, dtype=torch.float64, device=_device())
    everyone = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(everyone, own)
    return [exact_sum(column) for column in torch.stack(everyone, 1).tolist()]


def exact_sum(values: Sequence[float]) -> float:
    """Sum with a single rounding; NaN or infinite if a value is, or on overflow."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # overflow, or inf - inf
        return sum(values)


def agree(reason: str | None) -> str | None:
    """Return the first rank's reason that is not None, in rank order, or None."""
    return next((r for r in gather(reason) if r is not None), None)


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on all ranks if one raises within the context; otherwise the others would wait for it forever.

    Raises:
        RuntimeError: Another rank failed; the message includes its error.
    """
    try:
        yield
    except Exception as error:
        agree(f"{type(error).__name__}: {error}")
        raise
    if (failed := agree(None)) is not None:
        raise RuntimeError(f"another rank failed: {failed}")


def refuse_differences(facts: dict[str, object]) -> None:
    """Raise ValueError if a fact differs between ranks; otherwise they would wait for each other forever."""
    first, *others = gather(facts)
    for number, other in enumerate(others, 1):
        for name in first:
            if first[name] != other[name]:
                raise ValueError(
                    f"all ranks must be given the same {name}: rank 0 has {reprlib.repr(first[name])}, rank {number} "
                    f"has {reprlib.repr(other[name])}"
                )


# -- the model ---------------------------------------------------------------------------------------------------------


def align(modules: Iterable[object], parameters: Iterable[Tensor] = (), *, buffers_only: bool = False) -> None:
    """Copy rank 0's ``parameters``, and its parameters and buffers in ``modules``, to all ranks.

    Objects that are not modules are skipped. Buffers, such as the running means of a BatchNorm, differ between ranks
    because each rank sees other data.

    Raises:
        TypeError: A parameter is sharded over devices.
    """
    tensors: dict[int, Tensor] = {id(p): p for p in parameters}
    for module in modules:
        if isinstance(module, nn.Module):
            own = module.buffers() if buffers_only else (*module.parameters(), *module.buffers())
            tensors |= {id(t): t for t in own}
    for tensor in tensors.values():
        if size() > 1 and hasattr(tensor, "device_mesh"):
            raise TypeError("a model sharded over devices (FSDP, DTensor) can't be trained: pass the plain model")
    _broadcast(tensors.values())


def in_step(model: nn.Module) -> bool:
    """Return whether a layer waits for all ranks in every forward pass."""
    return any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Keep `DistributedDataParallel` from synchronizing: `add_gradients` does so, and a rank may have no batch."""
    found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    before = [(m.require_backward_grad_sync, m.require_forward_param_sync) for m in found]
    for m in found:
        m.require_backward_grad_sync = m.require_forward_param_sync = False
    try:
        yield
    finally:
        for m, (backward, forward) in zip(found, before, strict=True):
            m.require_backward_grad_sync, m.require_forward_param_sync = backward, forward


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over the ranks.

    A parameter that has a gradient on any rank gets one on all ranks: some may have had no batch, or taken another path
    through the model.

    Raises:
        TypeError: A gradient is sparse.
    """
    if size() == 1:
        return
    for bucket in _buckets(p for p in parameters if p.requires_grad):
        with torch.no_grad():
            _add(bucket)


def total(weights: Iterable[Tensor | float], like: Tensor) -> Tensor | float:
    """Sum the weights over all ranks, on the device of ``like``; with a single rank, where they are."""
    own = sum(weights)
    if size() == 1:
        return own
    if isinstance(own, Tensor):
        whole = own.detach().to(like.device, torch.float64, copy=True)
    else:  # filled on the device, since a copy from the host would wait for it
        whole = torch.full((), own, dtype=torch.float64, device=like.device)
    dist.all_reduce(whole)
    return whole


def _add(bucket: list[Tensor]) -> None:
    """Sum the gradients of these parameters over the ranks in one transfer."""
    for p in bucket:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise TypeError(
                f"a sparse gradient, of shape {tuple(p.shape)}, can't be summed over ranks: give its layer sparse=False"
            )
    missing = [i for i, p in enumerate(bucket) if p.grad is None]
    here = bucket[0].new_ones(len(bucket))  # filled on the device, as in `total`
    for i in missing:
        here[i] = 0
    flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket), here])
    dist.all_reduce(flat)
    *sums, found = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])
    for p, new in zip(bucket, sums, strict=True):
        if p.grad is not None:
            p.grad.copy_(new.view_as(p))
    if missing:  # waits for the device, but only in a model with unused parts
        elsewhere = found.tolist()
        for i in missing:
            if elsewhere[i]:
                bucket[i].grad = sums[i].view_as(bucket[i]).clone()


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters by device and dtype into buckets of a few megabytes."""
    filling: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for p in parameters:
        kind = p.device, p.dtype
        filling.setdefault(kind, []).append(p)
        sizes[kind] += p.numel()
        if sizes[kind] >= _BUCKET:
            yield filling.pop(kind)
            sizes[kind] = 0
    yield from filling.values()


def _broadcast(tensors: Iterable[Tensor]) -> None:
    if size() == 1:
        return
    for tensor in tensors:
        own = compact(tensor)
        if own.numel():
            copy = torch.empty(own.shape, dtype=own.dtype, device=own.device).copy_(own)
            dist.broadcast(copy.view(-1).view(torch.uint8), src=0)  # as bytes, since some dtypes can't be sent
            own.copy_(copy)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
