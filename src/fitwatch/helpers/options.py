"""Validators for options: the error names the option, the allowed values and what was given."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from attrs import Attribute

Option: TypeAlias = "Attribute[Any]"  # quoted: not subscriptable at run time
Validator = Callable[[object, Option, Any], None]  # Any: with object, mypy would infer options of type object


def one_of(*allowed: object) -> Validator:
    """Accept only the given values."""

    def check(_: object, option: Option, value: object) -> None:
        if not any(value is a or value == a for a in allowed):
            raise ValueError(f"{option.name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    return check


def integer(least: int, *, or_none: bool = False) -> Validator:
    """Accept integers of ``least`` or more, but no bools."""

    def check(_: object, option: Option, value: object) -> None:
        if or_none and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{option.name} must be an integer of {least} or more, got {value!r}")
        if value < least:
            raise ValueError(f"{option.name} must be {least} or more, got {value!r}")

    return check


def number(*, above: float | None = None, least: float | None = None, or_none: bool = False) -> Validator:
    """Accept finite numbers greater than ``above``, or of ``least`` or more, but no bools."""
    bound = f" greater than {above}" if above is not None else f" {least} or more" if least is not None else ""

    def check(_: object, option: Option, value: object) -> None:
        if or_none and value is None:
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{option.name} must be a number{bound}, got {value!r}")
        if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least):
            raise ValueError(f"{option.name} must be finite{' and' if bound else ''}{bound}, got {value!r}")

    return check


def instance(kind: type, *, or_none: bool = False) -> Validator:
    """Accept instances of a class."""

    def check(_: object, option: Option, value: object) -> None:
        if not (isinstance(value, kind) or (or_none and value is None)):
            hint = f" (this is the class: write {value.__name__}())" if isinstance(value, type) else ""
            raise TypeError(f"{option.name} must be of type {kind.__name__}, got {value!r}{hint}")

    return check


def check_counts(**counts: object) -> None:
    """Raise a ValueError unless each argument is None or an integer of 1 or more."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")


def check_name(what: str, name: object) -> None:
    """Raise a ValueError unless ``name`` can name a folder, and leads nowhere else."""
    if not _is_name(name):
        raise ValueError(f"{what} must be a non-empty string without slashes, and not '.' or '..', got {name!r}")


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in "/\\" or c < " " for c in name):
        return False
    return Path(name).name == name  # False for a drive, on Windows
