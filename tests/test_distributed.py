"""Two processes give the same gradients, losses, verdict, stop and checkpoint as one."""

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import _ranks

SCRIPT = Path(_ranks.__file__)
SCENARIOS = [
    "gradients", "everything", "samplers", "streams", "empty_part", "outside", "stop", "unused", "wrapped", "different_start", "half", "files",
    "resume", "refused", "sampled",
]  # fmt: skip


def launch(folder, scenarios, size=2):
    """Start ``size`` processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *scenarios],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return the results of each scenario from one process and from each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = {name: getattr(_ranks, name)(folder) for name in SCENARIOS}
    processes = launch(folder, SCENARIOS)
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    together = {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in SCENARIOS}
    return folder, alone, together


def close(a, b, tolerance=1e-12):
    """Return whether two nested values agree, numbers to within ``tolerance`` of the larger."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        scale = max(1e-300, float(a.abs().max()))
        return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * scale
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance * max(abs(a), abs(b))
    return a == b


def by_hand(cut, weighted):
    """Train two epochs in plain torch, with two successive micro-batches joined, and return gradients and weights."""
    x, y = _ranks.examples()
    model = _ranks.network()
    optimizer = _ranks.sgd(model)
    batches = list(zip(x.split(cut), y.split(cut), strict=True))
    seen = []
    for _ in range(2):
        for i in range(0, len(batches), 2):
            xs, ys = (torch.cat(parts) for parts in zip(*batches[i : i + 2], strict=True))
            output = model(xs)
            if weighted:
                loss = torch.nn.functional.cross_entropy(output, ys, _ranks.WEIGHT)
            else:
                loss = ((output.mean(1) - ys) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            seen.append([p.grad.clone() for p in model.parameters()])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return seen, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["weighted", "mean"])
@pytest.mark.parametrize("cut", _ranks.CUTS)
def test_a_step_of_two_ranks_is_one_big_batch(ran, cut, kind):
    """Gradients and weights of two ranks equal plain torch on the joined batches, even if a rank has no batch."""
    gradients, weights = by_hand(_ranks.CUTS[cut], kind == "weighted")
    for found in ran[2]["gradients"]:
        for expected, got in zip(gradients, found[f"{cut}, {kind}"], strict=True):
            scale = max(float(e.abs().max()) for e in expected)
            assert all(float((e - g).abs().max()) <= 1e-12 * scale for e, g in zip(expected, got, strict=True))
        assert close(weights, found[f"{cut}, {kind}, weights"])


def test_all_plugins_agree(ran):
    """On shuffled data both ranks have the history, metrics, verdict, stop reason and weights of a single one."""
    alone, (first, second) = ran[1]["everything"], ran[2]["everything"]
    assert alone["verdict"]["overfitting"]
    assert alone["stop_reason"] is not None
    evidence = [found["verdict"].pop("evidence") for found in (alone, first, second)]
    assert evidence[0] == evidence[1] == evidence[2]
    assert close(alone, first, 1e-8)  # sixty epochs of Adam
    assert first["history"] == second["history"]
    assert first["verdict"] == second["verdict"]


@pytest.mark.parametrize("sampler", ["DistributedSampler", "in a batch sampler", "none"])
def test_each_example_counts_once(ran, sampler):
    """With 33 and 41 examples on two ranks, train and validation loss equal one big batch, whatever the sampler pads."""
    model = _ranks.network()
    losses = {}
    for name, (x, y) in {"train": _ranks.examples(33), "val": _ranks.examples(41, seed=2)}.items():
        losses[name] = torch.nn.functional.cross_entropy(model(x), y, _ranks.WEIGHT).item()
    for found in ran[2]["samplers"]:
        for entry in found[sampler]:
            assert entry["train/loss"] == pytest.approx(losses["train"], rel=1e-12)
            assert entry["val/loss"] == pytest.approx(losses["val"], rel=1e-12)


def test_streams_of_unequal_length(ran):
    """Streams of 11 and 20 examples without a length give the losses and class weights of one of 31."""
    alone, together = ran[1]["streams"], ran[2]["streams"]
    assert together[0]["history"] == together[1]["history"]
    for key in ("train/loss", "val/loss", "val/loss_unweighted", "val/loss_vs_baseline"):
        assert together[0]["history"][-1][key] == pytest.approx(alone["history"][-1][key], rel=1e-12)
    assert close(alone["weight"], together[1]["weight"])
    assert [found["examples"] for found in together] == [62, 62]


def test_a_rank_without_any_batch(ran):
    """If only one rank gets batches, both continue with the loss of plain torch on these batches."""
    x, y = _ranks.examples(16)
    loss = torch.nn.functional.cross_entropy(_ranks.network()(x), y).item()
    for found in ran[2]["empty_part"]:
        assert found["history"][-1]["train/loss"] == pytest.approx(loss, rel=1e-12)
        assert found["history"] == ran[2]["empty_part"][0]["history"]
        first = torch.nn.functional.cross_entropy(_ranks.network()(x[:8]), y[:8]).item()
        assert found["probe"] == pytest.approx(first, rel=1e-12)  # half of the 16, since there are two ranks


def test_parameters_outside_the_model(ran):
    """Parameters known only to the optimizer, and buffers of any kind, are copied from rank 0."""
    first, second = ran[2]["outside"]
    assert close(first, second, 0.0)
    assert close(ran[1]["outside"], first)


def test_ranks_stop_together(ran):
    """A stop requested by one rank ends both at the end of the log window, with its reason."""
    assert ran[1]["stop"] == {"step": 3, "reason": "enough"}
    assert ran[2]["stop"] == [{"step": 5, "reason": "enough"}] * 2


def test_layers_that_a_rank_does_not_use(ran):
    """A gradient that only one rank has reaches both, and one that no rank has stays None."""
    alone, together = ran[1]["unused"]["seen"], ran[2]["unused"]
    assert len(alone) == 4
    for found in together:
        for expected, got in zip(alone, found["seen"], strict=True):
            assert got["never.weight"] is None
            assert close(
                {k: v for k, v in expected.items() if v is not None}, {k: v for k, v in got.items() if v is not None}
            )


def test_a_model_in_distributed_data_parallel(ran):
    """A DistributedDataParallel model reaches the same weights and losses, and synchronizes again afterwards."""
    for found in ran[2]["wrapped"]:
        assert close(ran[1]["wrapped"], found)


def test_replicas_are_the_same(ran):
    """Models that start differently become rank 0's, including buffers, and the losses are those of that model."""
    first, second = ran[2]["different_start"]
    assert close(first["state"], second["state"], 0.0)
    assert first["history"] == second["history"]
    model = _ranks.network(norm=True)
    assert first["state"].pop("expanded").tolist() == [0, 0, 0]
    assert first["state"].pop("short").tolist() == [0, 0]
    model.load_state_dict(first["state"])
    x, y = _ranks.examples(48)
    loss = torch.nn.functional.cross_entropy(model.eval()(x), y).item()
    assert first["history"][-1]["val/loss"] == pytest.approx(loss, rel=1e-12)


def test_half_precision(ran):
    """Under fp16 two ranks match one within the precision of float16."""
    first, second = ran[2]["half"]
    assert close(first, second, 0.0)
    assert close(ran[1]["half"]["weights"], first["weights"], 0.02)


def test_rank_0_writes(ran):
    """Only rank 0 writes files, links and warnings, and its curves equal those of a single rank."""
    folder, _, (first, second) = ran[0], ran[1], ran[2]["files"]
    assert "tensorboard --logdir" in first["said"]
    assert second == {"said": "", "run_dir": "None", "warned": []}
    assert first["warned"][-1] == "by one rank"
    assert [f.name for f in sorted((folder / "files-2" / "saved").iterdir())] == ["best.pt", "epoch-3.pt"]
    assert [f.name for f in (folder / "files-2" / "runs").iterdir()] == ["run"]
    curves = [EventAccumulator(str(folder / f"files-{size}" / "runs" / "run" / "val")).Reload() for size in (1, 2)]
    alone, together = ([(e.step, e.value) for e in curve.Scalars("loss")] for curve in curves)
    assert [step for step, _ in together] == [step for step, _ in alone] == [4, 8, 12]


def test_resume_is_bit_equal(ran):
    """Two ranks interrupted after two of five epochs end with the weights and history of an uninterrupted run."""
    for found in ran[2]["resume"]:
        assert found["whole"] == found["resumed"]
        assert close(found["whole weights"], found["resumed weights"], 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("epochs", "all ranks must be given the same epochs: rank 0 has 1, rank 1 has 2"),
        ("callbacks", r"the same callbacks: rank 0 has \[\], rank 1 has \['StopsOne'\]"),
        ("accumulate", "the same accumulate: rank 0 has 1, rank 1 has 2"),
        ("val_loader", "the same val_loader: rank 0 has 'list of 3 batches', rank 1 has 'none'"),
        ("norm", r"SyncBatchNorm waits for all ranks.*got \[2, 1\]"),
        ("folder", "holds the checkpoint epoch-1.pt of an earlier run"),
        ("checkpoint", "saved by 1 rank, and this fit has 2"),
    ],
)
def test_what_would_hang_is_refused(ran, name, message):
    """Different arguments, a rank that fails at the start and unequal SyncBatchNorm batches raise on both ranks."""
    for found in ran[2]["refused"]:
        assert re.search(message, found[name])


def test_a_shuffled_loader_is_dealt_out(ran):
    """In each epoch the ranks together see all 37 examples once, in the new order of a single rank."""
    alone, (first, second) = ran[1]["sampled"]["seen"], [found["seen"] for found in ran[2]["sampled"]]
    for whole, a, b in zip(alone, first, second, strict=True):
        assert sorted(a + b) == list(range(37))
        assert a[:4] == whole[:4]
        assert b[:4] == whole[4:8]
    assert first[0] != first[1] != first[2]


def test_main_only_holds_where_the_fit_itself_joins_the_ranks(tmp_path):
    """A main_only callback runs on rank 0 alone, also if the rank was unknown when the Trainer was built."""
    processes = launch(tmp_path, ["unstarted"])
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [torch.load(tmp_path / f"unstarted-{rank}.pt")["seen"] for rank in range(2)] == [[0, 1], []]


def test_an_error_on_one_rank_ends_all(tmp_path):
    """After one process raises, both exit with an error within 30 seconds."""
    processes = launch(tmp_path, ["fails"])
    outputs = [process.communicate(timeout=30) for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert "broken on one rank" in outputs[1][1]


def test_bad_statistics_on_one_rank_stop_all(tmp_path):
    """A NaN in the BatchNorm statistics of one rank stops both for the same reason."""
    processes = launch(tmp_path, ["ruined"])
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (torch.load(tmp_path / f"ruined-{rank}.pt")["reason"] for rank in range(2))
    assert first == second
    assert first == "the model has non-finite weights at step 1 (0.running_mean is the first)"
