"""What a checkpoint holds is checked before any of it is used."""

import copy
import math
import shutil

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch import saving

X, Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
TRAIN, VAL = list(zip(X.split(8), Y.split(8), strict=True)), [(X + 1, Y)]


def trainer_of(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    callbacks = [
        fw.EarlyStopping(patience=9),
        fw.WeightAverage(),
        fw.GradientNorm(),
        fw.OverfittingDetector(),
        fw.Checkpoint(folder, every_steps=1),
    ]
    return fw.Trainer(
        model,
        optimizer,
        callbacks=callbacks,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16),
        scheduler_interval="step",
        nonfinite="spike",
        device="cpu",
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer_of(folder).fit(TRAIN, VAL, max_steps=6)
    return folder / "step-6.pt"


GROUP, ADAM = ("optimizer", "param_groups", 0), ("optimizer", "state", 1)
STOPPING, AVERAGE = ("callbacks", "EarlyStopping"), ("callbacks", "WeightAverage", "average")
WRONG = [
    *[((*ADAM, "exp_avg"), value) for value in (None, 1.0, "../x", True, [0.0])],
    *[((*GROUP, "betas"), value) for value in (None, 0.9, (0.9,), (0.9, math.nan), ("a", 0.9), torch.zeros(2))],
    *[((*GROUP, "weight_decay"), value) for value in (math.nan, math.inf, None, True, "0.1", torch.zeros(2))],
    *[((*GROUP, "amsgrad"), value) for value in (1, "no", {})],
    (("scheduler",), {}),
    *[(("scheduler", "T_max"), value) for value in (None, "16", [16], torch.zeros(2))],
    *[(("scheduler", "base_lrs"), value) for value in (0.1, ["a"], [torch.zeros(2)])],
    *[(("position", "started", "live"), value) for value in (None, 1, torch.zeros(2), [])],
    *[(("guard", "spikes"), value) for value in (3, "x", [1.0])],
    *[(("guard", "spikes", "norms"), value) for value in (1.0, None, ["a"], [torch.zeros(2)], torch.zeros(2))],
    *[((*STOPPING, "best", "0.weight"), value) for value in (None, 1.0, torch.zeros(2, 2))],
    *[((*STOPPING, "rule", "wait"), value) for value in ("3", None, torch.zeros(2), {})],
    *[((*AVERAGE, "module.0.weight"), value) for value in (None, 1.0, torch.zeros(2, 2))],
    *[((*AVERAGE, "n_averaged"), value) for value in ("a", torch.zeros(3))],
    (("callbacks", "GradientNorm", "rule", "norms", "counts"), "x"),
    (("callbacks", "OverfittingDetector", "rule", "val", "weight"), {}),
]


@pytest.mark.parametrize(
    ("key", "value"), WRONG, ids=lambda part: ".".join(map(str, part)) if type(part) is tuple else ""
)
def test_a_value_of_the_wrong_kind_is_refused_before_anything_changes(saved, tmp_path, key, value):
    """One ValueError names the file and the key; weights and optimizer are those of the script."""
    content = saving.read(saved)
    part = content
    for name in key[:-1]:
        part = part[name]
    assert key[-1] in part
    part[key[-1]] = value
    path = tmp_path / "hostile.pt"
    saving.write(path, content)
    trainer = trainer_of(tmp_path / "new")
    before = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"hostile\.pt") as info:
        trainer.fit(TRAIN, VAL, max_steps=8, resume=path)
    assert str(key[-1]).removeprefix("module.") in str(info.value)
    assert all(map(torch.equal, before[0].values(), trainer.model.state_dict().values()))
    assert trainer.optimizer.state_dict() == before[1]


def test_weights_that_a_callback_lacks_are_refused(saved, tmp_path):
    """The average of a model must have all of its weights."""
    content = saving.read(saved)
    del content["callbacks"]["WeightAverage"]["average"]["module.2.weight"]
    saving.write(tmp_path / "hostile.pt", content)
    with pytest.raises(ValueError, match=r"hostile\.pt.*\['WeightAverage'\]\['average'\]\['2.weight'\] is missing"):
        trainer_of(tmp_path / "new").fit(TRAIN, VAL, max_steps=8, resume=tmp_path / "hostile.pt")


def test_a_link_to_a_checkpoint_is_resumed_in_its_folder(saved, tmp_path):
    """resume="auto" goes on from a file that lies elsewhere and is linked into the folder; the file itself stays."""
    before = saved.read_bytes()
    (tmp_path / "step-6.pt").symlink_to(saved)
    trainer = trainer_of(tmp_path)
    trainer.fit(TRAIN, VAL, max_steps=8, resume="auto")
    assert trainer.state.progress.step == 8
    assert (tmp_path / "step-8.pt").is_file()
    assert saved.read_bytes() == before


def test_files_of_another_version_are_named_when_they_are_left_out(saved, tmp_path, caplog):
    """resume="auto" takes the newest file that it can read, and says which ones it can't."""
    shutil.copy(saved, tmp_path)
    torch.save({"format": 9, "version": "7.1"}, tmp_path / "step-7.pt")
    trainer = trainer_of(tmp_path)
    trainer.fit(TRAIN, VAL, max_steps=8, resume="auto")
    assert trainer.state.progress.step == 8
    assert 'resume="auto" leaves out what another version of fitwatch wrote: step-7.pt' in caplog.text


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_that_is_no_plain_file_says_what_to_do(tmp_path, kind):
    """What stands in the place of the lock stays, and the error names it."""
    lock = tmp_path / "fit.lock"
    lock.mkdir() if kind == "folder" else lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"fit\.lock must be a plain file, which locks the folder: delete it"):
        trainer_of(tmp_path).fit(TRAIN, VAL, max_steps=2)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.lock"]


def test_a_lock_that_no_fit_wrote_counts_for_nothing(tmp_path):
    """Deeply nested JSON is no lock, though Python can't read it."""
    (tmp_path / "fit.lock").write_text("[" * 9000)
    trainer_of(tmp_path).fit(TRAIN, VAL, max_steps=2)
    assert (tmp_path / "step-2.pt").is_file()
