"""The reader of event files: the same scalars as TensorBoard's own, from sound files, damaged ones and hostile ones."""

import json
import math
import random
import struct

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_BFLOAT16, DT_FLOAT, DT_HALF
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from fitwatch.logs import LogError, diagnose_logs
from fitwatch.logs.drawing import draw
from fitwatch.logs.event_files import is_event_file, masked_crc, read_event_file
from fitwatch.logs.wording import details, facts, table
from tests.test_logs import TRAIN, VAL, write


def only_file(folder):
    """The event file of a folder."""
    (file,) = folder.iterdir()
    return file


def points(file):
    """Tag -> (step, value, time), as read here."""
    return {
        tag: list(zip(curve.steps, curve.values, curve.times, strict=True))
        for tag, curve in read_event_file(file).curves.items()
        if len(curve)
    }


def reference(folder):
    """Tag -> (step, value, time), as read by TensorBoard."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write_events(folder, events):
    """An event file with these events."""
    writer = EventFileWriter(str(folder))
    for event in events:
        writer.add_event(event)
    writer.close()
    return only_file(folder)


def record(payload):
    """The bytes of a record."""
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc32c(length)) + payload + struct.pack("<I", masked_crc32c(payload))


def test_checksums():
    """The checksum is that of TensorBoard, for every length; so the first bytes tell an event file."""
    source = random.Random(0)  # noqa: S311 - to be the same each time
    for length in range(70):
        data = source.randbytes(length)
        assert masked_crc(data) == masked_crc32c(data)
    head = record(b"abc")[:12]
    assert is_event_file(head)
    assert not any(is_event_file(head[:i] + bytes([head[i] ^ 1]) + head[i + 1 :]) for i in range(12))


def test_everything_that_torch_writes(tmp_path):
    """Scalars of both styles are those that TensorBoard reads, among images, histograms, texts and hyperparameters."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in [0, 1, 2, 3, 200, 70000, 1 << 40]:
            writer.add_scalar("train/loss", 1 / (step + 1), step)
            writer.add_scalar("a" * 300, -step, step)
            writer.add_scalar("new", step / 3, step, new_style=True)
            writer.add_scalar("double", step / 3, step, new_style=True, double_precision=True)
            writer.add_scalar("not a number", math.nan if step % 2 else math.inf, step)
            writer.add_histogram("weights", np.arange(100.0), step)
            writer.add_image("image", np.full((3, 300, 300), 7, np.uint8), step)
            writer.add_text("text", "loss " * 100, step)
            writer.file_writer.add_summary(
                Summary(value=[Summary.Value(tag=f"many/{i}", simple_value=i) for i in range(20)]), step
            )
    expected, found = reference(tmp_path), points(only_file(tmp_path))
    assert found.keys() - expected.keys() == {"new", "double"}  # for TensorBoard they are tensors
    assert str(expected) == str({tag: [(int(s), v, t) for s, v, t in found[tag]] for tag in expected})
    assert [value for _, value, _ in found["double"]][1:3] == [1 / 3, 2 / 3]
    assert [value for _, value, _ in found["new"]][1:3] == [np.float32(1 / 3), np.float32(2 / 3)]


def test_tensors_with_one_number(tmp_path):
    """A scalar as a tensor is read from every field and type that can hold it; a tensor of two numbers is no scalar."""
    tensors = [
        make_tensor_proto(np.array(3, dtype)) for dtype in (np.float64, np.float32, np.float16, np.int32, np.int64)
    ]
    tensors += [make_tensor_proto(np.array([[3.0]], np.float32)), TensorProto(dtype=DT_FLOAT, float_val=[3.0])]
    tensors += [TensorProto(dtype=DT_HALF, half_val=[0x4200]), TensorProto(dtype=DT_BFLOAT16, half_val=[0x4040])]
    tensors += [TensorProto(dtype=DT_FLOAT, tensor_content=struct.pack("<f", 3.0))]
    count = len(tensors)
    tensors += [make_tensor_proto(np.array([3.0, 4.0])), make_tensor_proto(np.array(["3"]))]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1 << 40)] * 3)
    tensors += [TensorProto(dtype=DT_FLOAT, float_val=[3.0], tensor_shape=shape)]  # to be expanded, for NumPy
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    events = [
        Event(step=i, summary=Summary(value=[Summary.Value(tag="a", tensor=tensor, metadata=metadata)]))
        for i, tensor in enumerate(tensors)
    ]
    curve = read_event_file(write_events(tmp_path, events)).curves["a"]
    assert list(curve.steps) == list(range(count))
    assert set(curve.values) == {3.0}


def test_a_large_record_with_a_scalar_in_it(tmp_path):
    """Among the values of one summary, images are passed over and the scalars beside them are read."""
    image = Summary.Value(tag="image", image=Summary.Image(encoded_image_string=bytes(1 << 20)))
    values = [Summary.Value(tag="before", simple_value=1.5), image, Summary.Value(tag="after", simple_value=2.5)]
    events = [Event(step=i, wall_time=i, summary=Summary(value=values)) for i in (7, 8)]
    assert points(write_events(tmp_path, events)) == {
        "before": [(7, 1.5, 7.0), (8, 1.5, 8.0)],
        "after": [(7, 2.5, 7.0), (8, 2.5, 8.0)],
    }
    assert reference(tmp_path) == points(only_file(tmp_path))


def test_a_purge_in_mid_file(tmp_path):
    """A session that starts at a step voids the points of its own file from there on."""
    scalars = [Event(step=i, summary=Summary(value=[Summary.Value(tag="a", simple_value=i)])) for i in range(10)]
    start = Event(step=4, session_log=SessionLog(status=SessionLog.START))
    assert [step for step, _, _ in points(write_events(tmp_path, [*scalars, start]))["a"]] == [0, 1, 2, 3]


def test_one_bad_byte_costs_one_point(tmp_path):
    """Wherever a byte is changed, at most one record is lost, and said; one that is kept is off by an eighth at most."""
    write(tmp_path, {"train/loss": TRAIN, "val/loss": VAL})
    file = only_file(tmp_path)
    content = file.read_bytes()
    whole = points(file)
    third = len(record(b"")) + struct.unpack("<Q", content[:8])[0]
    for at in range(third + 500, third + 620):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        found = read_event_file(file)
        assert sum(map(len, found.curves.values())) >= 119
        for tag, curve in found.curves.items():
            right = {step: value for step, value, _ in whole[tag]}
            assert all(abs(v - right[s]) <= 1.2 / 8 * right[s] for s, v in zip(curve.steps, curve.values, strict=True))
        assert len(found.problems) == (sum(map(len, found.curves.values())) < 120)
    report = diagnose_logs(tmp_path)
    assert report.judged[0].verdict.overfitting


def test_a_file_cut_anywhere(tmp_path):
    """Cut at any byte, a file gives all whole records before the cut; a cut within a record is said."""
    write(tmp_path, {"val/loss": VAL[:5]})
    file = only_file(tmp_path)
    content = file.read_bytes()
    ends = {0}
    while (end := max(ends)) < len(content):
        ends.add(end + 16 + struct.unpack("<Q", content[end : end + 8])[0])
    for size in range(len(content)):
        file.write_bytes(content[:size])
        found = read_event_file(file)
        records = sum(end <= size for end in ends) - 2  # the start, and the record with the version of the format
        assert sum(map(len, found.curves.values())) == max(records, 0)
        assert bool(found.problems) == (size not in ends)


def test_zeros_and_noise_between_records(tmp_path):
    """A hole of zeros, as a crash of the machine leaves it, and noise are passed over, and the records after them read."""
    write(tmp_path, {"val/loss": VAL})
    file = only_file(tmp_path)
    content = file.read_bytes()
    middle = struct.unpack("<Q", content[:8])[0] + 16
    source = random.Random(0)  # noqa: S311 - to be the same each time
    for filling in (bytes(3 << 20), source.randbytes(3 << 20), b"\1\0\0\0\0" * 100_000):
        file.write_bytes(content[:middle] + filling + content[middle:])
        found = read_event_file(file)
        assert len(found.curves["val/loss"]) == 60
        assert found.problems == [f"{len(filling)} damaged bytes skipped"]


def test_hostile_sizes(tmp_path):
    """Lengths beyond the file's, in the record, the summary, the tag or the tensor, neither take memory nor stop the reading."""
    good = Event(step=1, summary=Summary(value=[Summary.Value(tag="a", simple_value=1)])).SerializeToString()
    huge = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    bad = [
        b"\x2a" + huge,
        b"\x2a\x0c\x0a" + huge,
        b"\x0a" + huge,
        b"\x2a\x0b\x0a\x09\x42" + huge[:8],
        b"\x10" + b"\xff" * 20,
    ]
    bad += [b"\x09\x01", b"\x2a\x02\x0a\x05", b"\x0b", bytes([0x2A, 4, 0x0A, 2, 0x0A, 5]), huge * 20_000]
    content = b"".join(record(payload) for payload in (good, *bad, good))
    length = struct.pack("<Q", 1 << 62)
    content += length + struct.pack("<I", masked_crc32c(length)) + b"abc"
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    found = read_event_file(tmp_path / "events.out.tfevents.1")
    assert list(found.curves["a"].values) == [1.0, 1.0]
    assert found.problems[0] == "its last 15 bytes are not a whole record, and not used"


@pytest.mark.parametrize("seed", range(3))
def test_no_bytes_raise_anything_but_a_log_error(tmp_path, seed):
    """Mutated and random files of every format end in verdicts or in a `LogError`: no other exception, whatever they hold."""
    source = random.Random(seed)  # noqa: S311 - to be the same each time
    write(tmp_path / "w", {"train/loss": TRAIN, "val/loss": VAL})
    lines = [f"{i},{a},{b}" for i, (a, b) in enumerate(zip(TRAIN, VAL, strict=True))]
    rows = [{"step": i, "loss": a, "eval_loss": b} for i, (a, b) in enumerate(zip(TRAIN, VAL, strict=True))]
    valid = {
        "events.out.tfevents.1": only_file(tmp_path / "w").read_bytes(),
        "log.csv": ("epoch,loss,val_loss\n" + "\n".join(lines)).encode(),
        "log.tsv": ("epoch\tloss\tval_loss\n" + "\n".join(lines).replace(",", "\t")).encode(),
        "log.jsonl": "\n".join(map(str, rows)).replace("'", '"').encode(),
        "trainer_state.json": ('{"log_history": ' + str(rows).replace("'", '"') + "}").encode(),
        "metrics/val_loss": "".join(f"1700 {b} {i}\n" for i, b in enumerate(VAL)).encode(),
        "metrics/val/loss.tsv": ("step\tloss\n" + "".join(f"{i}\t{b}\n" for i, b in enumerate(VAL))).encode(),
    }
    pieces = [
        b"nan",
        b"1e999",
        b"-",
        b'"',
        b"\0",
        b"\xff\xfe",
        b"{",
        b"[" * 2000,
        b"\n",
        b",",
        b"9" * 5000,
        b"epoch",
        b"loss",
    ]
    for number in range(6):
        folder = tmp_path / str(number)
        for name, content in valid.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = bytearray(content)
            for _ in range(source.choice([1, 3, 30])):
                at, end = sorted(source.choices(range(len(data) + 1), k=2))
                end = min(end, at + source.choice([0, 1, 40, 10_000]))
                data[at:end] = source.choice([*pieces, source.randbytes(source.choice([1, 8, 100])), bytes(data[:50])])
            path.write_bytes(source.choice([bytes(data), bytes(data), content, source.randbytes(300)]))
        for path in (folder, *(path for path in folder.rglob("*") if path.is_file())):
            for options in ({}, {"each": True}, {"val": "val_loss"}):
                try:
                    report = diagnose_logs(path, **options)
                except LogError as error:
                    assert len(str(error).splitlines()) == 1  # noqa: PT017 - a number of files end so
                    continue
                assert report.runs
                assert table(report.runs, report.skipped)
                assert json.dumps([facts(one) for one in report.runs], allow_nan=False)
                assert all(details(one, unicode=True) for one in report.judged)
                if report.judged and path == folder:
                    draw(report.judged, tmp_path / "picture.png")
