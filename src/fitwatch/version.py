"""The version of fitwatch."""

__version__ = "0.2.0"
