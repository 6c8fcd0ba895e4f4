"""fitwatch: a small PyTorch Trainer that is exact about weighted losses and honest about overfitting."""

from fitwatch.callback import Callback, Callbacks
from fitwatch.callbacks.checkpoint import Checkpoint
from fitwatch.callbacks.early_stopping import EarlyStopping
from fitwatch.callbacks.gradient_norm import GradientNorm
from fitwatch.callbacks.overfitting import OverfittingDetector
from fitwatch.callbacks.progress_bar import ProgressBar
from fitwatch.callbacks.tensorboard import TensorBoard
from fitwatch.callbacks.weighted_loss import WeightedLoss
from fitwatch.decisions import confusion_matrix, cost_matrix, cost_optimal_decision, real_world_cost
from fitwatch.losses import BinaryCrossEntropy, CrossEntropy, Loss, LossSum, RealWorldCrossEntropy
from fitwatch.metrics import WeightedMean
from fitwatch.records import Marker, Record
from fitwatch.result import Best, Result
from fitwatch.rules.overfitting import OverfittingRule, Verdict, diagnose
from fitwatch.state import Progress, State
from fitwatch.trainer import Trainer
from fitwatch.weighting import class_weights

__all__ = [
    "Best",
    "BinaryCrossEntropy",
    "Callback",
    "Callbacks",
    "Checkpoint",
    "CrossEntropy",
    "EarlyStopping",
    "GradientNorm",
    "Loss",
    "LossSum",
    "Marker",
    "OverfittingDetector",
    "OverfittingRule",
    "Progress",
    "ProgressBar",
    "RealWorldCrossEntropy",
    "Record",
    "Result",
    "State",
    "TensorBoard",
    "Trainer",
    "Verdict",
    "WeightedLoss",
    "WeightedMean",
    "class_weights",
    "confusion_matrix",
    "cost_matrix",
    "cost_optimal_decision",
    "diagnose",
    "real_world_cost",
]
