"""The frames of event files: length, content, and a checksum of each."""

import struct
from functools import cache
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE

_BLOCK = 512  # bytes whose checksum is one look-up
_ONES = 0xFFFFFFFF


class FrameWriter:
    """Writes events to a file, as tensorboard's ``RecordWriter`` does, whose loop over bytes is ten times slower."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, content: bytes) -> None:
        """Write one serialized event."""
        length = struct.pack("<Q", len(content))
        self._file.write(b"".join((length, _masked(length), content, _masked(content))))


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of a text of bytes."""
    table = _tables()
    register = _ONES
    for start in range(0, len(content), _BLOCK):
        block = bytearray(content[start : start + _BLOCK])
        if len(block) < 4:
            for byte in block:
                register = CRC_TABLE[(register ^ byte) & 0xFF] ^ (register >> 8)
            continue
        # The checksum is linear over XOR: a byte adds what it would give followed by zeros, however many follow.
        for i in range(4):
            block[i] ^= (register >> (8 * i)) & 0xFF
        places = table[-len(block) :] if len(block) < _BLOCK else table
        register = int(np.bitwise_xor.reduce(places[np.arange(len(block)), np.frombuffer(block, np.uint8)]))
    return register ^ _ONES


@cache
def _tables() -> NDArray[np.uint32]:
    """Return what each byte adds to the checksum, by its place in a block, shape (512, 256)."""
    first = np.array(CRC_TABLE, np.uint32)
    rows = [first]
    for _ in range(_BLOCK - 1):
        rows.append((rows[-1] >> np.uint32(8)) ^ first[rows[-1] & np.uint32(0xFF)])
    return np.stack(rows[::-1])


def _masked(content: bytes) -> bytes:
    value = crc32c(content)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & _ONES)
