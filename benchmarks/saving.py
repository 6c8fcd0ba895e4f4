"""What a save of 300 MB consists of: seconds for the copy, torch.save, the checksum, fsync; and for another checksum.

python benchmarks/saving.py
"""

import hashlib
import os
import tempfile
import time
import zlib
from pathlib import Path

import torch

from fitwatch.helpers.primitives import copied_to_host


def timed(name, function):
    start = time.perf_counter()
    function()
    print(f"{name:12} {time.perf_counter() - start:.2f} s")


def flush(path):
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def read(path, update):
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            update(chunk)


def main():
    content = {"model": {str(k): torch.randn(3_750_000) for k in range(20)}}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "a.pt"
        for _ in range(2):  # the second time is the one that counts
            timed("copy", lambda: copied_to_host(content))
            timed("torch.save", lambda: torch.save(content, path))
            timed("fsync", lambda: flush(path))
            timed("CRC-32", lambda: read(path, zlib.crc32))
            timed("BLAKE2", lambda: read(path, hashlib.blake2b().update))


if __name__ == "__main__":
    main()
