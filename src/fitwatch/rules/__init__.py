"""Decision rules: pure, without a loop or a model."""

from fitwatch.rules.gradients import GradientFinding, GradientRule, LayerGradient
from fitwatch.rules.overfitting import OverfittingRule, Verdict, diagnose
from fitwatch.rules.stopping import GL, PQ, UP, Patience, StoppingRule, StopReason

__all__ = [
    "GL",
    "PQ",
    "UP",
    "GradientFinding",
    "GradientRule",
    "LayerGradient",
    "OverfittingRule",
    "Patience",
    "StopReason",
    "StoppingRule",
    "Verdict",
    "diagnose",
]
