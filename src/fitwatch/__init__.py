"""fitwatch: a small PyTorch Trainer that is exact about weighted losses and honest about overfitting."""

from fitwatch.callback import Callback, Callbacks
from fitwatch.callbacks.checkpoint import Checkpoint
from fitwatch.callbacks.early_stopping import EarlyStopping
from fitwatch.callbacks.gradient_norm import GradientNorm
from fitwatch.callbacks.overfitting_detector import OverfittingDetector
from fitwatch.callbacks.progress_bar import ProgressBar
from fitwatch.callbacks.real_world_cost import RealWorldCost
from fitwatch.callbacks.weighted_loss import WeightedLoss
from fitwatch.data.counting import count_classes
from fitwatch.losses import (
    LDAM,
    BinaryCrossEntropy,
    CrossEntropy,
    ExpectedCost,
    Focal,
    LogitAdjusted,
    Loss,
    LossSum,
    MeanSquaredError,
    RealWorldCrossEntropy,
)
from fitwatch.losses.baseline import Baseline
from fitwatch.losses.costs import CostMatrix, confusion_matrix, cost_optimal_decision, real_world_cost
from fitwatch.losses.weighting import class_weights
from fitwatch.metrics import WeightedMean
from fitwatch.records import Histogram, Image, Marker, Record
from fitwatch.result import Best, Result
from fitwatch.rules.gradients import GradientFinding, GradientRule, LayerGradient
from fitwatch.rules.overfitting import OverfittingRule, Verdict, diagnose
from fitwatch.rules.stopping import GL, PQ, UP, Patience, StoppingRule, StopReason
from fitwatch.state import Progress, State
from fitwatch.tensorboard import TensorBoard
from fitwatch.trainer import Trainer

__all__ = [  # noqa: RUF022 - sorted() order, not that of isort
    "Baseline",
    "Best",
    "BinaryCrossEntropy",
    "Callback",
    "Callbacks",
    "Checkpoint",
    "CostMatrix",
    "CrossEntropy",
    "EarlyStopping",
    "ExpectedCost",
    "Focal",
    "GL",
    "GradientFinding",
    "GradientNorm",
    "GradientRule",
    "Histogram",
    "Image",
    "LDAM",
    "LayerGradient",
    "LogitAdjusted",
    "Loss",
    "LossSum",
    "Marker",
    "MeanSquaredError",
    "OverfittingDetector",
    "OverfittingRule",
    "PQ",
    "Patience",
    "Progress",
    "ProgressBar",
    "RealWorldCost",
    "RealWorldCrossEntropy",
    "Record",
    "Result",
    "State",
    "StopReason",
    "StoppingRule",
    "TensorBoard",
    "Trainer",
    "UP",
    "Verdict",
    "WeightedLoss",
    "WeightedMean",
    "class_weights",
    "confusion_matrix",
    "cost_optimal_decision",
    "count_classes",
    "diagnose",
    "real_world_cost",
]
