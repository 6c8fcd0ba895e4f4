"""The gradient-norm inspector."""

from fitwatch.callbacks.gradient_norm.inspector import GradientNorm

__all__ = ["GradientNorm"]
