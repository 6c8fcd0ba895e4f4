"""Validators for options: the error names the option, the allowed values and what was given."""

import math
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from attrs import Attribute

Option: TypeAlias = "Attribute[Any]"  # quoted: not subscriptable at run time
Validator = Callable[[object, Option, Any], None]  # Any: with object, mypy would infer options of type object


_PLAIN = (bool, int, float, str)


def one_of(*allowed: object) -> Validator:
    """Accept only the given values."""

    def check(_: object, option: Option, value: object) -> None:
        if not any(value is a or value == a for a in allowed):
            raise ValueError(f"{option.name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    return check


def integer(least: int | None = None, most: int | None = None, *, or_none: bool = False) -> Validator:
    """Accept integers of ``least`` or more, up to ``most``, but no bools; keep them as plain ones."""
    bound = "" if least is None else f" of {least} or more" if most is None else f" from {least} to {most}"

    def check(instance: object, option: Option, value: object) -> None:
        if or_none and value is None:
            return
        given, value = value, plain(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{option.name} must be an integer{bound}, got {given!r}")
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError(f"{option.name} must be{bound.removeprefix(' of')}, got {given!r}")
        _keep(instance, option, given, value)

    return check


def number(*, above: float | None = None, least: float | None = None, or_none: bool = False) -> Validator:
    """Accept finite numbers greater than ``above``, or of ``least`` or more, but no bools; keep them as plain ones."""
    bound = f" greater than {above}" if above is not None else f" {least} or more" if least is not None else ""

    def check(instance: object, option: Option, value: object) -> None:
        if or_none and value is None:
            return
        given, value = value, plain(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{option.name} must be a number{bound}, got {given!r}")
        if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least):
            raise ValueError(f"{option.name} must be finite{' and' if bound else ''}{bound}, got {given!r}")
        _keep(instance, option, given, value)

    return check


def instance(kind: type, *, or_none: bool = False) -> Validator:
    """Accept instances of a class; a bool or a string of NumPy is kept as a plain one."""

    def check(instance: object, option: Option, value: object) -> None:
        given, value = value, plain(value) if kind in (bool, str) else value
        if not (isinstance(value, kind) or (or_none and value is None)):
            hint = f" (this is the class: write {given.__name__}())" if isinstance(given, type) else ""
            raise TypeError(f"{option.name} must be of type {kind.__name__}, got {given!r}{hint}")
        _keep(instance, option, given, value)

    return check


def plain(value: object) -> object:
    """Return scalars of NumPy and 0-dim tensors as the Python numbers they hold, and other values unchanged.

    Searches for hyperparameters give such scalars, and a checkpoint holds plain numbers only.
    """
    if value is None or type(value) in _PLAIN or getattr(value, "ndim", 0) != 0:
        return value
    item = getattr(value, "item", None)
    found: Any = item() if callable(item) else value
    if isinstance(found, (*_PLAIN, complex)):
        return found
    if hasattr(type(found), "__index__"):
        return operator.index(found)
    if hasattr(type(found), "__float__"):  # of an extended precision, a Fraction, a Decimal
        return float(found)
    return value


def _keep(instance: object, option: Option, given: object, value: object) -> None:
    """Replace the value of an option by a plain one. Not a converter, since that would hide the option's type."""
    if value is not given:
        object.__setattr__(instance, option.name, value)  # also in a frozen class


def count(name: str, value: object) -> int | None:
    """Return ``value`` as a plain integer, or None.

    Raises:
        ValueError: It is neither None nor an integer of 1 or more.
    """
    number = plain(value)
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")
    return number


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path of this machine; ``~`` is the home folder.

    Raises:
        ValueError: It is an address, such as ``s3://...``, or the home folder is unknown.
        TypeError: It is not a path.
    """
    given = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(given, str):
        raise TypeError(f"a path must be a string or a pathlib.Path, got {path!r}")
    if "\0" in given:
        raise ValueError(f"a path must not contain a null character, got {given!r}")
    # A pathlib.Path has made one slash of two.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", given):
        raise ValueError(f"{given!r} is an address, and a folder or file of this machine is needed: mount or copy it")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{given!r}: {error}") from error


def check_name(what: str, name: object) -> None:
    """Raise a ValueError unless ``name`` can name a folder, and leads nowhere else."""
    if not _is_name(name):
        raise ValueError(f"{what} must be a non-empty string without slashes, and not '.' or '..', got {name!r}")


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in "/\\" or c < " " for c in name):
        return False
    return Path(name).name == name  # False for a drive, on Windows
