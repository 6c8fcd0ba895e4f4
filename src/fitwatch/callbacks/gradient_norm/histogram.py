"""Histograms of tensor values."""

import torch
from torch import Tensor

from fitwatch.records import Histogram

BUCKETS = 64


def count(values: Tensor) -> Histogram | None:
    """Count the finite ``values`` in buckets of equal width; None if there are none."""
    values = values.detach().reshape(-1).cpu().double()
    values = values[values.isfinite()]
    if not values.numel():
        return None
    low, high = values.min().item(), values.max().item()
    if low == high:  # one bucket needs a width
        low, high = low - abs(low) / 2 - 1e-30, high + abs(high) / 2 + 1e-30
    edges = torch.linspace(low, high, BUCKETS + 1, dtype=torch.float64)
    index = torch.bucketize(values, edges[1:-1], right=True)
    counts = torch.bincount(index, minlength=BUCKETS)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), values.sum().item(), values.square().sum().item())
