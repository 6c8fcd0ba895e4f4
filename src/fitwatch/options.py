"""Validators of options: what was wrong, what was given, what is allowed, in one plain sentence."""

import math
from collections.abc import Callable
from typing import Any

Validator = Callable[[Any, Any, Any], None]


def one_of(*allowed: Any) -> Validator:
    """One of a few values."""

    def check(_: Any, option: Any, value: Any) -> None:
        if not any(value is a or value == a for a in allowed):
            raise ValueError(f"{option.name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    return check


def integer(least: int, *, or_none: bool = False) -> Validator:
    """An integer of ``least`` or more."""

    def check(_: Any, option: Any, value: Any) -> None:
        if or_none and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{option.name} must be an integer of {least} or more, got {value!r}")
        if value < least:
            raise ValueError(f"{option.name} must be {least} or more, got {value!r}")

    return check


def number(*, above: float | None = None, least: float | None = None, or_none: bool = False) -> Validator:
    """A finite number; larger than ``above``, or of ``least`` or more, if one is given."""
    bound = f"greater than {above}" if above is not None else f"{least} or more" if least is not None else "of any sign"

    def check(_: Any, option: Any, value: Any) -> None:
        if or_none and value is None:
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{option.name} must be a number {bound}, got {value!r}")
        if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least):
            raise ValueError(f"{option.name} must be finite and {bound}, got {value!r}")

    return check


def instance(kind: type, *, or_none: bool = False) -> Validator:
    """An instance of a class."""

    def check(_: Any, option: Any, value: Any) -> None:
        if not (isinstance(value, kind) or (or_none and value is None)):
            hint = f" (the class itself: write {value.__name__}())" if isinstance(value, type) else ""
            raise TypeError(f"{option.name} must be of type {kind.__name__}, got {value!r}{hint}")

    return check


def check_counts(**counts: Any) -> None:
    """Refuse arguments that are neither None nor integers of 1 or more."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")
