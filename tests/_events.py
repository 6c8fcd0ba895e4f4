"""What stands in the event files of a sub-run."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(folder):
    """The events of one sub-run, whole."""
    events = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "tensors", "images", "histograms"), 0)
    )
    return events.Reload()


def points(folder, tag):
    """The points of a curve: (step, value)."""
    return [(e.step, e.value) for e in read(folder).Scalars(tag)]


def texts(folder, tag):
    """The texts under a tag: (step, Markdown)."""
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in read(folder).Tensors(tag)]


def curve(history, name):
    """What the chart of ``name`` must show: the history, as the float32 that an event holds."""
    return [(entry["step"], float(np.float32(entry[name]))) for entry in history]


def bars(folder):
    """The bars of a run."""
    return sorted(f.name for f in folder.iterdir() if f.name not in ("train", "val", "best", "baseline"))
