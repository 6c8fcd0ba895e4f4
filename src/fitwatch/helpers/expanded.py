"""Expanded tensors, several of whose elements lie in one place."""

import torch
from torch import Tensor


def compact(tensor: Tensor) -> Tensor:
    """Return a view of the elements in distinct places, which can be written to, outside the gradient graph."""
    own = tensor.detach()
    for dim, stride in enumerate(own.stride() if own.layout is torch.strided else ()):
        own = own.narrow(dim, 0, 1) if stride == 0 and own.shape[dim] > 1 else own
    return own
