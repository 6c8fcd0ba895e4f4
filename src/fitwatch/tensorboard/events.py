"""TensorBoard's event files, written without a thread and without TensorFlow."""

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.pr_curve import metadata as pr_curve_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from fitwatch.records import Histogram, Image

# title -> "lines" and tags as regular expressions, or "margin" and three plain tags: value, lower, upper
Charts = Mapping[str, tuple[str, list[str]]]


class EventFile:
    """One sub-run: a folder with one event file.

    No thread stands between `add` and the file, as it does in ``SummaryWriter``: that makes an event about five times
    cheaper, leaves nothing to lose when the process is killed after `flush`, and nothing that a forked loader could
    hang on.

    Args:
        folder: Made if need be.
        first_step: Steps done before this training; older points beyond it are void.
        ending: Of the file's name.
    """

    def __init__(self, folder: Path, first_step: int, ending: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The server reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / f"{name}{ending}"
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step:  # what was measured at the end of this step stays
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        self.flush()

    def add(self, step: int, values: Iterable[Any]) -> None:
        """Write one event that holds all ``values`` (see `scalar`, `text`, ...)."""
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=list(values))))

    def flush(self) -> None:
        """Hand everything to the operating system: it survives the death of this process."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._records.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def events(file: Path) -> Iterable[tuple[bytes, Any]]:
    """The events of a file, as they stand there and decoded; a last one that was cut off is left out."""
    for raw in RawEventFileLoader(str(file)).Load():
        yield raw, Event.FromString(raw)


def cut(file: Path, step: int) -> None:
    """Remove all events beyond ``step``: no server is to show what did not happen in the end.

    A new file takes the place of the old one in one stroke.
    """
    rewrite(file, [raw for raw, event in events(file) if event.step <= step])


def rewrite(file: Path, kept: Iterable[bytes]) -> None:
    """Put a file of the events ``kept`` in the place of ``file``, in one stroke."""
    new = file.with_name("cut.tmp")  # no name that a server would read
    with new.open("wb") as opened:
        records = RecordWriter(opened)
        for raw in kept:
            records.write(raw)
    new.replace(file)


def scalar(tag: str, value: float) -> Any:
    """A point of a curve."""
    return Summary.Value(tag=tag, simple_value=value)


def text(tag: str, markdown: str) -> Any:
    """A text card; a Markdown table in it needs a header row."""
    metadata = text_metadata.create_summary_metadata(display_name="", description="")
    return _string(tag, metadata, markdown.encode(), TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]))


def image(tag: str, picture: Image) -> Any:
    """A picture."""
    encoded = Summary.Image(height=picture.height, width=picture.width, encoded_image_string=picture.png)
    return Summary.Value(tag=tag, image=encoded)


def histogram(tag: str, values: Histogram) -> Any:
    """A histogram."""
    return Summary.Value(tag=tag, histo=_histogram_proto(values))


def picture(tag: str, value: Image | Histogram) -> Any:
    """Either of the two."""
    return image(tag, value) if isinstance(value, Image) else histogram(tag, value)


def pr_curve(tag: str, rows: Sequence[Sequence[float]]) -> Any:
    """A precision-recall curve: true positives, false positives, true negatives, false negatives, precision, recall."""
    thresholds = len(rows[0])
    metadata = pr_curve_metadata.create_summary_metadata(display_name="", description="", num_thresholds=thresholds)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(rows)), TensorShapeProto.Dim(size=thresholds)])
    tensor = TensorProto(dtype="DT_FLOAT", float_val=[value for row in rows for value in row], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def layout(categories: Mapping[str, Charts]) -> Any:
    """The Custom Scalars page: category -> charts."""
    page = layout_pb2.Layout()
    for category, charts in categories.items():
        group = page.category.add(title=category)
        for title, (kind, tags) in charts.items():
            chart = group.chart.add(title=title)
            if kind == "margin":
                value, lower, upper = tags
                chart.margin.series.add(value=value, lower=lower, upper=upper)
            else:
                chart.multiline.tag.extend(tags)
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    return _string("custom_scalars__config__", metadata, page.SerializeToString(), TensorShapeProto())


def hparams(values: Mapping[str, Any], group: str, started: float, *, succeeded: bool) -> list[Any]:
    """The row of a run in the HParams table: its settings, and how it ended."""
    start = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=started)
    for name, value in values.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    # 1 and 2 are STATUS_SUCCESS and STATUS_FAILURE of the plug-in's Status.
    end = plugin_data_pb2.SessionEndInfo(status=1 if succeeded else 2, end_time_secs=time.time())
    parts = {
        hparams_metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_start_info=start),
        hparams_metadata.SESSION_END_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_end_info=end),
    }
    return [
        Summary.Value(
            tag=tag,
            metadata=hparams_metadata.create_summary_metadata(data),
            tensor=hparams_metadata.NULL_TENSOR,
        )
        for tag, data in parts.items()
    ]


def _string(tag: str, metadata: Any, content: bytes, shape: Any) -> Any:
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _histogram_proto(histogram: Histogram) -> Any:
    """As TensorBoard's ``HistogramProto``, which has the upper limit of each bucket, and the lowest value apart."""
    return HistogramProto(
        min=histogram.edges[0],
        max=histogram.edges[-1],
        num=sum(histogram.counts),
        sum=histogram.sum,
        sum_squares=histogram.sum_squares,
        bucket_limit=histogram.edges[1:],
        bucket=histogram.counts,
    )
