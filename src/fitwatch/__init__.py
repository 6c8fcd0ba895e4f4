"""fitwatch: a small PyTorch Trainer that is exact about weighted losses and honest about overfitting."""

from fitwatch import data, losses, records, rules
from fitwatch.callback import Callback, Callbacks
from fitwatch.callbacks.checkpoint import Checkpoint
from fitwatch.callbacks.csv_log import CSVLog
from fitwatch.callbacks.early_stopping import EarlyStopping
from fitwatch.callbacks.gradient_norm import GradientNorm
from fitwatch.callbacks.overfitting_detector import OverfittingDetector
from fitwatch.callbacks.progress_bar import ProgressBar
from fitwatch.callbacks.real_world_cost import RealWorldCost
from fitwatch.callbacks.weight_average import WeightAverage
from fitwatch.callbacks.weighted_loss import WeightedLoss
from fitwatch.losses import (
    LDAM,
    BinaryCrossEntropy,
    CrossEntropy,
    ExpectedCost,
    Focal,
    LogitAdjusted,
    LossSum,
    MeanSquaredError,
    RealWorldCrossEntropy,
)
from fitwatch.losses.costs import CostMatrix, cost_optimal_decision, real_world_cost
from fitwatch.losses.weighting import class_weights
from fitwatch.result import Result
from fitwatch.rules.overfitting import Verdict, diagnose
from fitwatch.state import State
from fitwatch.tensorboard import TensorBoard
from fitwatch.trainer import Trainer
from fitwatch.version import __version__
from fitwatch.watch import Watch

__all__ = [  # noqa: RUF022 - sorted() order, not isort's
    "BinaryCrossEntropy",
    "CSVLog",
    "Callback",
    "Callbacks",
    "Checkpoint",
    "CostMatrix",
    "CrossEntropy",
    "EarlyStopping",
    "ExpectedCost",
    "Focal",
    "GradientNorm",
    "LDAM",
    "LogitAdjusted",
    "LossSum",
    "MeanSquaredError",
    "OverfittingDetector",
    "ProgressBar",
    "RealWorldCost",
    "RealWorldCrossEntropy",
    "Result",
    "State",
    "TensorBoard",
    "Trainer",
    "Verdict",
    "Watch",
    "WeightAverage",
    "WeightedLoss",
    "__version__",
    "class_weights",
    "cost_optimal_decision",
    "data",
    "diagnose",
    "losses",
    "real_world_cost",
    "records",
    "rules",
]
