"""What writing to TensorBoard costs on the thread that trains: microseconds for each scalar.

Hands one window after the other to `fitwatch.TensorBoard.on_log`, as the Trainer does every `log_every` steps, and
divides the CPU time of the thread by the number of values. For comparison, the same values through `SummaryWriter`.

    python benchmarks/writer.py [--windows 400]
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import fitwatch as fw
from fitwatch.state.progress import Plan


def windows(count, scalars):
    """Records of so many windows; the values differ, as those of a training do."""
    names = [f"train/params/grad_norm/layer{i}" for i in range(scalars)]
    return [
        [fw.records.Record(name, 50 * (w + 1), 1 / (w + i + 1)) for i, name in enumerate(names)] for w in range(count)
    ]


def ours(records):
    """Microseconds a scalar, of each window."""
    model = nn.Linear(1, 1)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters()), loss=fw.CrossEntropy())
    state.plan = Plan(max_steps=50 * len(records))
    with tempfile.TemporaryDirectory() as folder:
        page = fw.TensorBoard(folder, show_link=False)
        page.on_fit_start(state)
        page.on_epoch_start(state)
        times = []
        for window in records:
            state.log.records, state.progress.step = window, window[0].step
            start = time.thread_time()
            page.on_log(state)
            times.append((time.thread_time() - start) / len(window) * 1e6)
        page.on_fit_end(state)
    return times


def theirs(records):
    """The same with `add_scalar`, flushed once a window; what its other thread does is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        times = []
        for window in records:
            start = time.thread_time()
            for record in window:
                writer.add_scalar(record.name, record.value, record.step)
            writer.flush()
            times.append((time.thread_time() - start) / len(window) * 1e6)
        writer.close()
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=400)
    count = parser.parse_args().windows
    torch.set_num_threads(1)
    print("| values in a window | fitwatch, µs a scalar: median | 95 % | SummaryWriter: median | 95 % |")
    print("|---|---|---|---|---|")
    for scalars in (4, 10, 20, 40):
        records = windows(count, scalars)
        row = []
        for contender in (ours, theirs):
            times = sorted(contender(records)[10:])  # the first open the files
            row += [f"{statistics.median(times):.1f}", f"{times[int(0.95 * len(times))]:.1f}"]
        print(f"| {scalars} | **{row[0]}** | {' | '.join(row[1:])} |")


if __name__ == "__main__":
    main()
