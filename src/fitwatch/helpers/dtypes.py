"""Floating-point dtypes by device."""

import torch


def wide_float(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device, for long sums: float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
