"""Reads curves from tables: CSV and TSV with a header, JSON lines, and JSON documents."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fitwatch.logs.curves import Curve, LogError
from fitwatch.logs.pairing import names_a_loss

_MOST = 1 << 26  # bytes of a table that are read
_HEAD = 1 << 16  # bytes from which a file is recognised
_STEPS = ("step", "global_step", "global step", "trainer/global_step", "_step", "iteration", "iter", "batch", "n_iter")
_EPOCHS = ("epoch", "epochs", "round", "trainer/epoch")
_SPLITS = ("mode", "split", "phase", "stage")
_NAMES = ("metric", "name", "key", "tag", "variable")  # of the value, in a table with a row for each value
_TIMES = {"time", "timestamp", "wall_time", "wall time", "_timestamp", "_runtime"}
_TENSOR = re.compile(r"tensor\(\[?([^,\])]+)")
_EMPTY = ("", "-", "none", "null", "na", "n/a", "nan")
_SHOWN = 20  # characters of a cell in a note
_COMMAS = re.compile(r"\s*[-+]?\d[\d,]*,\d+(\.\d*)?(e[-+]?\d+)?\s*", re.IGNORECASE)  # a number with commas
_THOUSANDS = re.compile(r"\s*[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?\s*")
_LOSS = re.compile(r"loss|nll|mse|rmse|perplexity|entropy|log_history", re.IGNORECASE)
_NEARLY = 0.9  # share of the rows that have the column that counts
_GAPS = 0.25  # share of NaN, above which they are holes of a table and not losses

Rows = Iterable[Mapping[str, object]]


def read_table(path: Path) -> dict[str, dict[str, Curve]]:
    """Read the runs of a table: name -> tag -> curve, in the order of writing.

    The content shows what kind of table it is. Runs without a name are numbered.

    Raises:
        LogError: If it is not a table with a column for a loss.
        OSError: If the file can't be read.
    """
    with path.open("rb") as file:
        content = file.read(_MOST + 1)
    if len(content) > _MOST:
        raise LogError(f"larger than {_MOST >> 20} MiB")
    text = _decoded(content)
    try:
        rows = _rows(text)
        runs = {name: curves for name, part in _runs_by_name(rows).items() if (curves := _curves(part, path))}
    except LogError:
        raise
    except csv.Error as error:
        raise LogError(f"is damaged, or no table: {error}") from None
    except (RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise LogError(f"is damaged, or no table ({type(error).__name__})") from None
    if not runs:
        raise LogError("has no columns of numbers")
    return runs


def may_be_table(path: Path, named: Iterable[str] = ()) -> bool:
    """Whether the beginning of a file looks like a table that names a loss or a metric; False if it can't be read.

    Args:
        path: The file.
        named: Names that the user asks for, which make it a table too.
    """
    try:
        with path.open("rb") as file:
            head = _decoded(file.read(_HEAD)).lstrip()
    except OSError:
        return False
    if not head or "\0" in head:
        return False
    tags = {name.rpartition("/")[2] for name in named}
    if head[0] in "{[":
        return bool(_LOSS.search(head)) or any(f'"{tag}"' in head for tag in tags)
    names = [name.strip(' "\r') for name in re.split(r"[,\t;|]", head.split("\n", 1)[0])]
    long = {"step", "value"} <= {name.lower() for name in names}
    asked = any(name.rpartition("/")[2] in tags for name in names)
    return len(names) > 1 and (long or asked or any(map(names_a_loss, names)))


def _decoded(content: bytes) -> str:
    """Decode text, whatever its encoding."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    return content.decode(errors="replace")


def _rows(text: str) -> list[Mapping[str, object]]:
    text = text.lstrip()
    if text[:1] in ("{", "["):
        try:
            return list(_document(json.loads(text)))
        except json.JSONDecodeError:
            if lines := list(_json_lines(text)):
                return lines
            raise LogError("is neither a whole JSON document nor JSON lines") from None
    return list(_delimited(text))


def _document(document: Any) -> Rows:
    """Yield the rows of a JSON document: a list of objects, Hugging Face's trainer state, or columns by name."""
    if isinstance(document, dict):
        history = document.get("log_history")
        if isinstance(history, list):
            # After the training, one line sums it up; its mean loss is not a point of the curve.
            return [row for row in history if isinstance(row, dict) and "train_runtime" not in row]
        columns = dict(_columns(document, ""))
        if columns:
            longest = max(map(len, columns.values()))
            return [{name: c[i] for name, c in columns.items() if i < len(c)} for i in range(longest)]
        return [document]
    return [row for row in document if isinstance(row, dict)] if isinstance(document, list) else []


def _columns(document: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, list[object]]]:
    """Yield the lists of numbers in nested objects, as ``history.history`` and ``evals_result`` are."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _columns(value, f"{prefix}{name}/")
        elif isinstance(value, list) and value and all(isinstance(one, int | float | None) for one in value):
            yield prefix + name, value


def _json_lines(text: str) -> Rows:
    """Yield the objects of JSON lines; other lines, such as one cut off at the end, are passed over."""
    for line in text.splitlines():
        if line.lstrip().startswith("{"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _delimited(text: str) -> Rows:
    """Yield the rows of CSV or TSV; the header may come again where a file was continued."""
    head, _, _ = text.partition("\n")
    delimiter = max(",\t;|", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    if not header or len(header) < 2 or all(map(_is_number, header)):
        raise LogError("has no header with the names of columns")
    lines = list(reader)
    names = _distinct(header)
    commas: list[str | None] = [None] * len(header)
    if ('"' if delimiter == "," else ",") in text:  # else no cell has a comma
        columns = itertools.zip_longest(*(cells[: len(header)] for cells in lines), fillvalue="")
        commas = [_commas(column, decimal=delimiter == ";") for column in columns]
    for cells in lines:
        if [cell.strip() for cell in cells] == header:
            yield {}  # a run begins
            continue
        if any(mark is not None for mark in commas):
            cells = [  # noqa: PLW2901
                cell if mark is None or not _COMMAS.fullmatch(cell) else cell.replace(",", mark)
                for cell, mark in zip(cells, commas, strict=False)
            ]
        yield dict(zip(names, cells, strict=False))


def _commas(cells: Iterable[str], *, decimal: bool) -> str | None:
    """Return what stands for the commas in numbers: a point, or nothing if they group thousands; None without any.

    Args:
        cells: The cells of a column.
        decimal: Whether numbers such as 1,234 alone have a decimal comma.
    """
    numbers = [cell for cell in cells if _COMMAS.fullmatch(cell)]
    if not numbers:
        return None
    thousands = all(map(_THOUSANDS.fullmatch, numbers)) and not (
        decimal and all("." not in cell and cell.count(",") == 1 for cell in numbers)
    )
    return "" if thousands else "."


def _distinct(header: list[str]) -> list[str]:
    """Number columns of one name: ``loss, loss.1``."""
    seen: dict[str, int] = {}
    names = []
    for name in header:
        count = seen[name] = seen.get(name, -1) + 1
        names.append(f"{name}.{count}" if count else name)
    return names


def _is_number(cell: str) -> bool:
    return _number(cell) is not None


def _number(cell: object) -> float | None:
    """Return the number in a cell; None if there is none."""
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, int | float):
        try:
            return float(cell)
        except OverflowError:
            return math.inf if cell > 0 else -math.inf
    if not isinstance(cell, str):
        return None
    text = cell.strip()
    if match := _TENSOR.match(text):
        text = match[1]
    try:
        return float(text) if len(text) < 100 else None
    except ValueError:
        return None


def _flat(row: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the cells of a row, those of nested objects by paths: ``{"train": {"loss": 1}}`` has train/loss."""
    for name, value in row.items():
        if isinstance(value, dict) and depth < 10:
            yield from _flat(value, f"{prefix}{name}/", depth + 1)
        else:
            yield prefix + str(name), value


def _runs_by_name(rows: list[Mapping[str, object]]) -> dict[str, list[dict[str, object]]]:
    exported = _exported(rows)
    return exported or {str(number): part for number, part in enumerate(_runs(rows), 1)}


def _exported(rows: list[Mapping[str, object]]) -> dict[str, list[dict[str, object]]]:
    """Return the runs of an export of Weights & Biases, whose columns are called ``<run> - <metric>``; {} if none."""
    names = dict.fromkeys(name for row in rows for name in row)
    if not any(name.endswith("__MIN") for name in names):
        return {}
    owners = {name: name.removesuffix("__MIN").removesuffix("__MAX").rpartition(" - ")[0] for name in names}
    owners = {name: run for name, run in owners.items() if run}
    runs: dict[str, list[dict[str, object]]] = {}
    for run in dict.fromkeys(owners.values()):
        own = [{name: cell for name, cell in row.items() if owners.get(name, run) == run} for row in rows]
        runs[run] = [row for row in own if any(row[name] not in ("", None) for name in row if name in owners)]
    return runs if len(runs) > 1 else {}


def _runs(rows: list[Mapping[str, object]]) -> list[list[dict[str, object]]]:
    """Split the rows where another run begins: at a second header, or where the count goes back to its start."""
    flat = [dict(_flat(row)) for row in rows]
    parts = [list(group) for full, group in itertools.groupby(flat, key=bool) if full]
    if len(parts) > 1 or any(_named(row, _SPLITS) or _long_name(row) for row in flat[:3]):
        return _joined(parts)
    return _joined([again for part in parts for again in _restarts(part)])


def _restarts(rows: list[dict[str, object]]) -> list[list[dict[str, object]]]:
    axes = [name for name in (_named(rows[0], _STEPS), _named(rows[0], _EPOCHS)) if name]
    runs: list[list[dict[str, object]]] = [[]]
    before: dict[str, float] = {}
    for row in rows:
        now = {name: value for name in axes if (value := _number(row.get(name))) is not None}
        first = {name: _number(runs[-1][0].get(name)) for name in axes} if runs[-1] else {}
        back = [
            value <= start and before[name] > start
            for name, value in now.items()
            if (start := first.get(name)) is not None and name in before
        ]
        if back and all(back):
            runs.append([])
            before = {}
        runs[-1].append(row)
        before.update(now)
    return runs


def _joined(parts: list[list[dict[str, object]]]) -> list[list[dict[str, object]]]:
    """Join a part to the one before if it goes on where that ended, as a resumed run does."""
    runs: list[list[dict[str, object]]] = []
    for part in parts:
        name = _named(part[0], _STEPS) or _named(part[0], _EPOCHS)
        now = _number(part[0].get(name)) if name else None
        start = _number(runs[-1][0].get(name)) if runs and name else None
        if runs and now is not None and start is not None and now > start:
            runs[-1].extend(part)
        else:
            runs.append(part)
    return runs


def _named(row: Mapping[str, object], names: Iterable[str]) -> str:
    """Return the column of a row that has one of these names; "" without one."""
    columns = {str(name).strip().lower(): name for name in reversed(list(row))}
    return next((str(columns[name]) for name in names if name in columns), "")


def _curves(rows: list[dict[str, object]], path: Path) -> dict[str, Curve]:
    """Return the curves of a run's rows: each column of numbers, without the one that counts."""
    names = dict.fromkeys(name for row in rows for name in row)
    step, axis = _axis(rows, names)
    split, long_name = _named(names, _SPLITS), _long_name(names)
    counts = {step, *(name for name in names if name.strip().lower() in (*_TIMES, *_STEPS, *_EPOCHS, *_SPLITS))}
    curves: dict[str, Curve] = {}
    others: dict[str, list[str]] = {}  # cells of text
    for index, row in enumerate(rows):
        at = _number(row.get(step)) if step else float(index)
        if at is None or not math.isfinite(at):
            continue
        role = str(row[split]) + "/" if split and isinstance(row.get(split), str) else ""
        for name, cell in row.items():
            if name in counts or name.endswith(("__MIN", "__MAX")):
                continue
            tag = str(row.get(long_name)) if long_name else path.stem if name.lower() == "value" else role + name
            value = _number(cell)
            if value is not None:
                curves.setdefault(tag, Curve(axis=axis)).add(at, value)
            elif isinstance(cell, str) and cell.strip().lower() not in _EMPTY:
                others.setdefault(tag, []).append(cell)
    for tag in others.keys() & curves.keys():
        count, example = len(others[tag]), others[tag][0].strip()[:_SHOWN]
        curves[tag].notes.append(f"{count} cell{'s' * (count > 1)} of {{}} left out, since not a number: {example}")
    return {tag: _without_holes(curve) for tag, curve in curves.items()}


def _long_name(row: Mapping[str, object]) -> str:
    """Return the column with the name of each row's value; "" if a row has the values of all."""
    return _named(row, _NAMES) if _named(row, ("value",)) else ""


def _axis(rows: list[dict[str, object]], names: Mapping[str, object]) -> tuple[str, str]:
    """Return the column that counts, which never goes back if there is one, and what it counts."""
    found = [(name, "step") for one in _STEPS if (name := _named(names, (one,)))]
    found += [(name, "epoch") for one in _EPOCHS if (name := _named(names, (one,)))]
    for name, axis in found:
        steps = [value for row in rows if (value := _number(row.get(name))) is not None]
        # A count within the epoch restarts in each.
        if (
            len(steps) > _NEARLY * len(rows)
            and all(a <= b for a, b in itertools.pairwise(steps))
            and steps[0] < steps[-1]
        ):
            return name, axis
    return found[0] if found else ("", "step")


def _without_holes(curve: Curve) -> Curve:
    """Drop the NaN that stand for empty cells, where another column has a row of its own; keep those of a loss."""
    bad = [not math.isfinite(value) for value in curve.values]
    if all(bad):
        return curve
    last = max(i for i, one in enumerate(bad) if not one)
    if sum(bad[: last + 1]) < _GAPS * (last + 1):
        return curve
    longest = max(sum(1 for _ in group) for one, group in itertools.groupby(bad[: last + 1]) if one)
    keep_end = len(bad) - 1 - last > longest
    kept = Curve(axis=curve.axis, notes=curve.notes)
    for i, (step, value) in enumerate(zip(curve.steps, curve.values, strict=True)):
        if not bad[i] or (i > last and keep_end):
            kept.add(step, value)
    return kept
