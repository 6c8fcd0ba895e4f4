"""Time and memory of reading event files, as ratios to TensorBoard's own reader in the same run.

    python benchmarks/reading.py

Writes event files of a few kinds, and reads each kind in processes of their own, in turns: with the reader of
``fitwatch diagnose``, and with TensorBoard's EventAccumulator. Memory is the peak of the process above what it had
before reading; time is CPU time of the process for reading alone, without the imports. Prints a table in Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

READERS = {
    "fitwatch": """
from fitwatch.logs.finding import collect
def read(folder):
    found = collect([folder])
    return sum(len(curve) for tags in found.logged.values() for curve in tags.values())
""",
    "tensorboard": """
import pathlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
def read(folder):
    count = 0
    for place in sorted({str(file.parent) for file in pathlib.Path(folder).rglob("*tfevents*")}):
        events = EventAccumulator(place, size_guidance={"scalars": 0}).Reload()
        count += sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])
    return count
""",
}
MEASURE = """
import json, sys, time
def peak():  # getrusage's would be that of the parent process, if larger
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
start = time.process_time()
points = read(sys.argv[1])
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "mib": (peak() - before) / 1024, "points": points}))
"""


def write_scalars(folder, points):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step in range(points):
            writer.add_scalar("train/loss", 1 / (step + 1), step)
            writer.add_scalar("val/loss", 1 / (step + 1), step)


def write_pictures(folder, tags, size):
    """Write 20 pictures of so many bytes under each of so many tags."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step in range(20):
            for tag in range(tags):
                picture = Summary.Image(encoded_image_string=bytes(size), height=1, width=1)
                writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=f"image/{tag}", image=picture)]), step)
            writer.add_scalar("train/loss", 1.0, step)
            writer.add_scalar("val/loss", 1.0, step)


def write_histograms(folder, layers):
    import torch
    from torch.utils.tensorboard import SummaryWriter

    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    with SummaryWriter(str(folder)) as writer:
        for step in range(100):
            for layer in range(layers):
                writer.add_histogram(f"weights/{layer}", values, step, bins="fd")
            writer.add_scalar("train/loss", 1.0, step)
            writer.add_scalar("val/loss", 1.0, step)


def measure(reader, folder):
    done = subprocess.run(
        [sys.executable, "-c", READERS[reader] + MEASURE, str(folder)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as top:
        kinds = {
            "20,000 scalars in one file": lambda folder: write_scalars(folder, 10_000),
            "1,000 runs of 60 scalars": lambda folder: [write_scalars(folder / str(i), 30) for i in range(1000)],
            "histograms of 20 layers, 100 steps": lambda folder: write_histograms(folder, 20),
            "200 images of 100 kB, 10 tags": lambda folder: write_pictures(folder, 10, 100_000),
            "800 images of 100 kB, 40 tags": lambda folder: write_pictures(folder, 40, 100_000),
        }
        print("| files | size, MB | time, ratio | fitwatch, s | tensorboard, s | fitwatch, MiB | tensorboard, MiB |")
        print("|---|---|---|---|---|---|---|")
        for number, (name, write) in enumerate(kinds.items()):
            folder = Path(top, str(number))
            write(folder)
            size = sum(file.stat().st_size for file in folder.rglob("*tfevents*")) / 1e6
            pairs = [[measure(reader, folder) for reader in READERS] for _ in range(rounds)]
            assert all(ours["points"] == theirs["points"] for ours, theirs in pairs)
            ours, theirs = ({key: median(pair[i][key] for pair in pairs) for key in pairs[0][i]} for i in (0, 1))
            ratio = median(pair[0]["seconds"] / pair[1]["seconds"] for pair in pairs)
            print(
                f"| {name} | {size:.1f} | **{ratio:.3f}** | {ours['seconds']:.2f} | {theirs['seconds']:.2f} "
                f"| {ours['mib']:.0f} | {theirs['mib']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
