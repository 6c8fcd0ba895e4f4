"""Calibration of a classifier's logits: temperature, biases, and what they change."""
