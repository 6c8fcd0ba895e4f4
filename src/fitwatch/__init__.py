"""fitwatch: a small PyTorch Trainer that is exact about weighted losses and honest about overfitting."""

from importlib import import_module
from typing import TYPE_CHECKING

from fitwatch.version import __version__

if TYPE_CHECKING:  # at run time, a name is imported when it is first used: the command `fitwatch` needs no torch
    from fitwatch import data, losses, records, rules
    from fitwatch.calibration.calibrated import Calibrated, Calibration
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
    from fitwatch.watch import Watch
else:
    _HOMES = {
        "calibration.calibrated": "Calibrated Calibration",
        "callback": "Callback Callbacks",
        "callbacks.checkpoint": "Checkpoint",
        "callbacks.csv_log": "CSVLog",
        "callbacks.early_stopping": "EarlyStopping",
        "callbacks.gradient_norm": "GradientNorm",
        "callbacks.overfitting_detector": "OverfittingDetector",
        "callbacks.progress_bar": "ProgressBar",
        "callbacks.real_world_cost": "RealWorldCost",
        "callbacks.weight_average": "WeightAverage",
        "callbacks.weighted_loss": "WeightedLoss",
        "losses": "LDAM BinaryCrossEntropy CrossEntropy ExpectedCost Focal LogitAdjusted LossSum MeanSquaredError "
        "RealWorldCrossEntropy",
        "losses.costs": "CostMatrix cost_optimal_decision real_world_cost",
        "losses.weighting": "class_weights",
        "result": "Result",
        "rules.overfitting": "Verdict diagnose",
        "state": "State",
        "tensorboard": "TensorBoard",
        "trainer": "Trainer",
        "watch": "Watch",
    }
    _MODULES = {name: f"fitwatch.{module}" for module, names in _HOMES.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        """Import a public name, or a module of the package, when it is first used."""
        if name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            try:
                value = import_module(f"fitwatch.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"fitwatch.{name}":
                    raise
                raise AttributeError(f"module 'fitwatch' has no attribute {name!r}") from None
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Return the names that exist, whether or not they have been imported."""
        return sorted({*globals(), *__all__})


__all__ = [  # noqa: RUF022 - sorted() order, not isort's
    "BinaryCrossEntropy",
    "CSVLog",
    "Calibrated",
    "Calibration",
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
