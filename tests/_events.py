"""Read the event files of a sub-run."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(folder):
    """Return all events of a sub-run."""
    events = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "tensors", "images", "histograms"), 0)
    )
    return events.Reload()


def points(folder, tag):
    """Return the points of a curve: (step, value)."""
    return [(e.step, e.value) for e in read(folder).Scalars(tag)]


def texts(folder, tag):
    """Return the texts of a tag: (step, Markdown)."""
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in read(folder).Tensors(tag)]


def curve(history, name):
    """Return the expected points of ``name``: its history in float32, as in an event."""
    return [(entry["step"], float(np.float32(entry[name]))) for entry in history]


def bars(folder):
    """Return the names of a run's bars."""
    return sorted(f.name for f in folder.iterdir() if f.name not in ("train", "val", "best", "baseline"))
