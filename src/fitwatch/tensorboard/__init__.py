"""One page in TensorBoard for each run."""

from fitwatch.tensorboard.board import TensorBoard

__all__ = ["TensorBoard"]
