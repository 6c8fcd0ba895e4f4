"""Reads the scalars of TensorBoard's event files, and passes over everything else without reading it.

An event file is a sequence of records: length (8 bytes), its checksum (4), a serialised ``Event``, its checksum (4).
TensorBoard's own reader computes every checksum byte by byte in Python, and keeps images and histograms in memory.
Here the checksum of a payload is computed only if it holds scalars, and large payloads are skipped in the file.
"""

import math
import os
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from attrs import define, field

from fitwatch.logs.curves import Curve

_SMALL = 1 << 16  # bytes of a record, or of a value of a summary, that are read at once; a scalar takes some 50
_SCALARS = 1 << 8  # bytes of a payload that may have been a scalar, if it no longer is
_CHECKED = 1 << 13  # bytes of a payload whose checksum is computed
_SEARCH = 1 << 20  # bytes read at once in the search for the next record
_A_CURVE = 3  # points of a training that is worth a verdict of its own
# An event with a single scalar, as torch writes it: time, step, and a summary of one value, which is a tag and a float.
_SCALAR = re.compile(
    rb"\x09(.{8})(?:\x10([\x80-\xff]{0,9}[\x00-\x7f]))?\x2a([\x00-\x7f])\x0a([\x00-\x7f])\x0a([\x00-\x7f])(.+)\x15(.{4})",
    re.DOTALL,
)
_NOT_ZERO = re.compile(rb"[^\0]")
_START = 1  # SessionLog.START
# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Codes of a summary's value, of a tensor, and how a tensor's numbers are packed: field -> format, size.
_TAG, _SIMPLE, _TENSOR, _METADATA = 1, 2, 8, 9
_DTYPE, _SHAPE, _CONTENT, _HALF = 1, 2, 4, 13
_DOUBLE, _FLOAT = struct.Struct("<d"), struct.Struct("<f")
_FLOATS = {5: ("<f", 4), 6: ("<d", 8)}
_VARINTS = {7, 10, 11, 16, 17}  # int, int64, bool, uint32, uint64
# DataType -> format of one number in tensor_content.
_FORMATS = {
    1: "<f",
    2: "<d",
    3: "<i",
    4: "<B",
    5: "<h",
    6: "<b",
    9: "<q",
    10: "<?",
    17: "<H",
    19: "<e",
    22: "<I",
    23: "<Q",
}
_FLOAT16, _BFLOAT16 = 19, 14


_Field = int | float | tuple[int, int]  # a number, or where bytes start and end


class _DamagedError(Exception):
    """Raised inside if bytes are not a valid message."""


@define
class EventFile:
    """The scalars of one event file.

    Attributes:
        path: The file.
        curves: Tag -> curve.
        purge: Step from which its writer declared all older points void; None if it did not.
        problems: What could not be read, a sentence each.
    """

    path: Path
    curves: dict[str, Curve] = field(factory=dict)
    purge: int | None = None
    problems: list[str] = field(factory=list)
    _plugins: dict[str, str] = field(factory=dict)
    _singles: dict[bytes, Curve] = field(factory=dict)  # of scalars that had an event of their own

    def add_single(self, record: bytes, length: int) -> bool:
        """Add an event of the most frequent form, a single scalar, much faster than `add`; return False for others.

        Its checksum is computed only if the point does not follow from those before it, which takes half the time. So
        damage is found unless it moves a loss by less than an eighth.
        """
        match = _SCALAR.fullmatch(record, 0, length)
        if match is None:
            return False
        time, step, summary, value, size, tag, number = match.groups()
        if size[0] != len(tag) or value[0] != size[0] + 7 or summary[0] != size[0] + 9:
            return False
        at = 0 if step is None else _step(_varint(step, 0)[0])
        (found,) = _FLOAT.unpack(number)
        known = self._singles.get(tag)
        if known is None or not _follows(known, at, found):
            _check(record, length)
        if known is None:
            name = tag.decode()
            self._plugins.setdefault(name, "")
            known = self._singles[tag] = self.curves.setdefault(name, Curve())
        known.add(at, found, _DOUBLE.unpack(time)[0])
        return True

    def add(self, payload: "_Event") -> None:
        """Add the scalars of an event."""
        if payload.starts:
            self.purge = payload.step
            for void in self.curves.values():
                void.drop(payload.step)
        for tag, plugin, value, is_tensor in payload.values:
            known = self._plugins.setdefault(tag, plugin)  # only the first value of a tag names its plugin
            if value is not None and (not is_tensor or known == "scalars"):
                curve = self.curves.get(tag)
                if curve is None:
                    curve = self.curves[tag] = Curve()
                curve.add(payload.step, value, payload.time)


@define
class Session:
    """The scalars that one training has written to a folder, in one event file or, if it was resumed, in several.

    Attributes:
        files: The files.
        curves: Tag -> curve.
        notes: What could not be read, a sentence each.
    """

    files: list[Path] = field(factory=list)
    curves: dict[str, Curve] = field(factory=dict)
    notes: list[str] = field(factory=list)

    def add(self, file: EventFile) -> None:
        """Continue with a later file, which replaces the points from its first step on."""
        self.files.append(file.path)
        self.notes.extend(f"{file.path.name}: {problem}" for problem in file.problems)
        if file.purge is not None:
            for curve in self.curves.values():
                curve.void(file.purge)
        for tag, curve in file.curves.items():
            if tag in self.curves and len(curve):
                self.curves[tag].extend(curve)
            else:
                self.curves[tag] = curve


def sessions(files: list[EventFile]) -> list[Session]:
    """Tell the trainings apart that have written to one folder: one that starts over is another one."""
    found = [Session()]
    for file in files:
        if _starts_over(found[-1].curves, file.curves):
            found.append(Session())
        found[-1].add(file)
    return found


def _starts_over(before: dict[str, Curve], now: dict[str, Curve]) -> bool:
    """Whether most curves that go on do so at, or before, their first step, although there was a curve to speak of."""
    shared = [(before[tag], now[tag]) for tag in before.keys() & now.keys() if len(before[tag]) and len(now[tag])]
    several = [(old, new) for old, new in shared if max(len(old), len(new)) > 1]
    back = sum(min(new.steps) <= min(old.steps) for old, new in several)
    return 2 * back > len(several) and max(len(old) for old, _ in several) >= _A_CURVE


@define
class _Event:
    time: float = math.nan
    step: int = 0
    starts: bool = False
    values: list[tuple[str, str, float | None, bool]] = field(factory=list)  # tag, plugin, number, from a tensor


def _follows(curve: Curve, step: int, value: float) -> bool:
    """Whether a point is as far from the last one as that was from the one before, and its value near the last one."""
    if len(curve) < 2:
        return False
    last = curve.values[-1]
    near = abs(value - last) <= abs(last) / 8
    return near and step - curve.steps[-1] == curve.steps[-1] - curve.steps[-2]


@lru_cache(1 << 12)  # the lengths of scalars' records repeat
def is_event_file(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is an event file; or these are the header of another record."""
    return len(head) == 12 and masked_crc(head[:8]) == int.from_bytes(head[8:], "little")


def read_event_file(path: Path) -> EventFile:
    """Read the scalars of an event file; damaged records are skipped, and named in ``problems``.

    Raises:
        OSError: If the file can't be read.
    """
    found = EventFile(path)
    damaged = lost = position = 0
    search = _Search()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            header = file.read(12)
            length = int.from_bytes(header[:8], "little")
            if not is_event_file(header):
                following = search.next_record(file, position + 1, size) if len(header) == 12 else None
                if following is None:
                    break
                lost += following - position
                position = following
                continue
            if position + 16 + length > size:
                break
            damaged += not _read_record(file, position + 12, length, found)
            position += 16 + length
    if position < size:
        found.problems.append(f"its last {size - position} bytes are not a whole record, and not used")
    if damaged:
        found.problems.append(f"{damaged} damaged record{'s' if damaged > 1 else ''} skipped")
    if lost:
        found.problems.append(f"{lost} damaged bytes skipped")
    return found


def _read_record(file: BinaryIO, start: int, length: int, found: EventFile) -> bool:
    """Add the scalars of a record whose payload starts here, and go to its end; return False if it is damaged."""
    try:
        if length <= _SMALL:
            _read_small(file, length, found)
        else:
            found.add(_large(file, start, length))
    except (_DamagedError, struct.error, IndexError, UnicodeDecodeError, OverflowError):
        return False
    finally:
        if length > _SMALL:
            file.seek(start + length + 4)
    return True


@define
class _Search:
    """Looks for the next record after damaged bytes; it gives up after so many false headers in one file."""

    left: int = 200_000

    def next_record(self, file: BinaryIO, start: int, size: int) -> int | None:
        """Return the position of the next record from ``start`` on, with the file standing there; None without one."""
        for base in range(start, size - 12, _SEARCH):
            file.seek(base)
            block = file.read(_SEARCH + 12)
            # No record is as long as 4 GiB, so the upper half of its length is 0; and none is empty.
            at = block.find(b"\0\0\0\0", 4)
            while at != -1 and at + 8 <= len(block) and self.left:
                head = block[at - 4 : at + 8]
                length = int.from_bytes(head[:4], "little")
                if not length:
                    some = _NOT_ZERO.search(block, at)
                    at = len(block) if some is None else some.start()
                else:
                    self.left -= 1
                    if base + at + 12 + length <= size and is_event_file(head):
                        file.seek(base + at - 4)
                        return base + at - 4
                at = block.find(b"\0\0\0\0", at + 1)
        return None


def _read_small(file: BinaryIO, length: int, found: EventFile) -> None:
    """Read a record at once, and add its scalars; its checksum is computed if it has, or may have had, some."""
    record = file.read(length + 4)
    payload = record[:length]
    if found.add_single(record, length):
        return
    event = _parsed(payload)
    scalars = event.starts or any(value[2] is not None for value in event.values)
    if length <= _SCALARS or (scalars and length <= _CHECKED):
        _check(record, length)
    found.add(event)


def _check(record: bytes, length: int) -> None:
    """Raise an error if the checksum at the end of a record is not that of its payload."""
    if len(record) < length + 4 or masked_crc(record[:length]) != int.from_bytes(record[length:], "little"):
        raise _DamagedError


def _parsed(payload: bytes) -> _Event:
    """Return the event that a payload holds."""
    event, length = _Event(), len(payload)
    for number, value in _fields(payload, 0, length):
        if number == 5 and isinstance(value, tuple):
            _summary(payload, *value, event)
        else:
            _header(payload, number, value, event)
    return event


def _large(file: BinaryIO, start: int, length: int) -> _Event:
    """Walk through a large record in the file, reading only the values that are small enough to be scalars."""
    event = _Event()
    for number, value in _fields_of_file(file, start, start + length):
        if number == 5 and isinstance(value, tuple):
            for inner, place in _fields_of_file(file, *value):
                if inner == 1 and isinstance(place, tuple) and place[1] - place[0] <= _SMALL:
                    file.seek(place[0])
                    part = file.read(place[1] - place[0])
                    _value(part, 0, len(part), event)
        elif number == 7 and isinstance(value, tuple) and value[1] - value[0] <= _SMALL:
            file.seek(value[0])
            part = file.read(value[1] - value[0])
            _header(part, number, (0, len(part)), event)
        elif not isinstance(value, tuple):
            _header(b"", number, value, event)
    return event


def _step(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _header(data: bytes, number: int, value: _Field, event: _Event) -> None:
    """Take a field of an event that is not a summary."""
    if number == 1 and isinstance(value, float):
        event.time = value
    elif number == 2 and isinstance(value, int):
        event.step = _step(value)
    elif number == 7 and isinstance(value, tuple):
        event.starts = any(inner == 1 and status == _START for inner, status in _fields(data, *value))


def _summary(data: bytes, start: int, end: int, event: _Event) -> None:
    for number, place in _fields(data, start, end):
        if number == 1 and isinstance(place, tuple):
            _value(data, *place, event)


def _value(data: bytes, start: int, end: int, event: _Event) -> None:
    """Take a value of a summary, if it may be a scalar."""
    tag, plugin, simple, tensor = "", "", None, None
    for number, value in _fields(data, start, end):
        if number == _TAG and isinstance(value, tuple):
            tag = data[value[0] : value[1]].decode()
        elif number == _SIMPLE and isinstance(value, float):
            simple = value
        elif number == _TENSOR and isinstance(value, tuple):
            tensor = value
        elif number == _METADATA and isinstance(value, tuple):
            plugin = _plugin(data, *value)
    if simple is not None:
        event.values.append((tag, plugin, simple, False))
    elif tensor is not None:
        event.values.append((tag, plugin, _tensor(data, *tensor), True))


def _plugin(data: bytes, start: int, end: int) -> str:
    """Return the name of the plugin in a value's metadata."""
    for number, value in _fields(data, start, end):
        if number == 1 and isinstance(value, tuple):
            for inner, name in _fields(data, *value):
                if inner == 1 and isinstance(name, tuple):
                    return data[name[0] : name[1]].decode(errors="replace")
    return ""


def _tensor(data: bytes, start: int, end: int) -> float | None:
    """Return the number in a tensor that holds one; None for others. The shape is read, but never expanded."""
    dtype, content = 0, b""
    numbers: list[float] = []
    for number, value in _fields(data, start, end):
        if number == _DTYPE and isinstance(value, int):
            dtype = value
        elif number == _SHAPE and isinstance(value, tuple):
            if not all(_is_one(data, dim) for inner, dim in _fields(data, *value) if inner == 2):
                return None
        elif number == _CONTENT and isinstance(value, tuple):
            content = data[value[0] : value[1]]
        elif number in _FLOATS or number in _VARINTS or number == _HALF:
            numbers.extend(_packed(data, number, value))
    if not content and len(numbers) == 1 and dtype in (_FLOAT16, _BFLOAT16):
        content = struct.pack("<H", int(numbers[0]) & 0xFFFF)  # its bits, as an integer
    if not content:
        return float(numbers[0]) if len(numbers) == 1 else None
    if dtype == _BFLOAT16:
        dtype, content = 1, b"\0\0" + content  # the upper half of a float32
    form = _FORMATS.get(dtype)
    return float(struct.unpack(form, content)[0]) if form and struct.calcsize(form) == len(content) else None


def _is_one(data: bytes, dim: _Field) -> bool:
    """Whether a dimension of a shape has size 1."""
    return isinstance(dim, tuple) and all(size == 1 for number, size in _fields(data, *dim) if number == 1)


def _packed(data: bytes, number: int, value: _Field) -> list[float]:
    """Return up to two of a repeated field's numbers: whether there is one is all that matters."""
    if not isinstance(value, tuple):
        return [_signed(value)]
    start, end = value
    if number in _FLOATS:
        form, size = _FLOATS[number]
        return [struct.unpack_from(form, data, at)[0] for at in range(start, min(end, start + 2 * size), size)]
    numbers: list[float] = []
    while start < end and len(numbers) < 2:
        one, start = _varint(data, start)
        numbers.append(_signed(one))
    return numbers


def _signed(value: float) -> float:
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of variable length, and the position after it."""
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise _DamagedError


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, _Field]]:
    """Yield the fields of a message: number, and value; for bytes, where they start and end."""
    while at < end:
        key = data[at]
        at += 1
        if key >= 0x80:
            key, at = _varint(data, at - 1)
        kind = key & 7
        value: _Field
        if kind == _BYTES:
            size = data[at]
            at += 1
            if size >= 0x80:
                size, at = _varint(data, at - 1)
            value = (at, at + size)
            at += size
        elif kind == _VARINT:
            value, at = _varint(data, at)
        elif kind == _FIXED32:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        elif kind == _FIXED64:
            (value,) = struct.unpack_from("<d", data, at)
            at += 8
        else:
            raise _DamagedError
        if at > end:
            raise _DamagedError
        yield key >> 3, value


def _fields_of_file(file: BinaryIO, at: int, end: int) -> Iterator[tuple[int, _Field]]:
    """Yield the fields of a message in a file, as `_fields` does, without reading those that are bytes."""
    while at < end:
        file.seek(at)
        head = file.read(min(20, end - at))
        key, used = _varint(head, 0)
        if key & 7 == _BYTES:
            size, used = _varint(head, used)
            if at + used + size > end:
                raise _DamagedError
            yield key >> 3, (at + used, at + used + size)
            at += used + size
        else:
            yield next(_fields(head, 0, len(head)))
            at += {_FIXED32: used + 4, _FIXED64: used + 8}.get(key & 7) or _varint(head, used)[1]


def _table() -> list[int]:
    """Return the table of CRC-32C for one byte."""
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _table()


def masked_crc(data: bytes) -> int:
    """Return the checksum of a record's length or payload: CRC-32C, rotated by 15 bits, plus a constant."""
    table, crc = _CRC, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
