"""Decision rules on plain numbers: they know no model, no training loop and no files."""

from fitwatch.rules.gradients import GradientFinding, GradientRule, LayerGradient
from fitwatch.rules.overfitting import OverfittingRule, Verdict, diagnose
from fitwatch.rules.prechelt import GL, PQ, UP
from fitwatch.rules.spikes import SpikeRule
from fitwatch.rules.stopping import Patience
from fitwatch.rules.stopping_rule import StoppingRule, StopReason

__all__ = [  # noqa: RUF022 - sorted() order, not that of isort
    "GL",
    "GradientFinding",
    "GradientRule",
    "LayerGradient",
    "OverfittingRule",
    "PQ",
    "Patience",
    "SpikeRule",
    "StopReason",
    "StoppingRule",
    "UP",
    "Verdict",
    "diagnose",
]
