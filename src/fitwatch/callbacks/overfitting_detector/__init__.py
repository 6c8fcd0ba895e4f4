"""The overfitting detector."""

from fitwatch.callbacks.overfitting_detector.detector import OverfittingDetector

__all__ = ["OverfittingDetector"]
