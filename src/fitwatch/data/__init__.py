"""Batches and loaders: taking batches apart, sharing them among ranks, counting classes."""

from fitwatch.data.counting import count_classes

__all__ = ["count_classes"]
