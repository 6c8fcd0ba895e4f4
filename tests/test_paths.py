"""Paths: the home folder is expanded, an address is refused, and no folder of that name appears."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch.cli import main
from fitwatch.helpers.options import local_path
from fitwatch.logs import LogError, diagnose_logs
from fitwatch.logs.finding import collect


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, beside an empty working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def fit(*callbacks, epochs=1, resume=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    loader = [(torch.randn(8, 4), torch.arange(8) % 2)]
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=callbacks, device="cpu")
    return trainer.fit(loader, loader, epochs=epochs, resume=resume)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_home_folder_is_expanded(home, kind, capsys):
    """In every option and argument that takes a path, ~ is the home folder, and no folder called ~ appears."""
    fit(fw.Checkpoint(kind("~/saved")), fw.TensorBoard(kind("~/runs"), show_link=False))
    assert (home / "saved/epoch-1.pt").is_file()
    assert (home / "runs/run/val").is_dir()
    assert len(fit(epochs=2, resume=kind("~/saved/epoch-1.pt")).history) == 2
    model = nn.Linear(4, 2)
    with fw.Watch(model, torch.optim.SGD(model.parameters()), resume=kind("~/saved/epoch-1.pt")) as watch:
        assert watch.state.progress.epoch == 1
    assert collect([kind("~/runs")]).logged.keys() == {"run/train", "run/val", "run/best", "run/baseline"}
    main(["diagnose", "~/runs"])
    assert "too few" in capsys.readouterr().err
    assert list((home.parent / "work").iterdir()) == []


ADDRESSES = [
    "s3://bucket/x",
    "gs://bucket/x",
    "hdfs://host:9000/x",
    "https://host/x",
    "file:///tmp/x",
    Path("s3://bucket/x"),
]


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_an_address_is_refused_where_it_is_given(home, address, capsys):
    """An address never becomes a local folder of that name: the error says what is needed."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for use in (
        fw.Checkpoint,
        fw.TensorBoard,
        lambda path: fit(resume=path),
        lambda path: fw.Watch(model, optimizer, resume=path),
        local_path,
    ):
        with pytest.raises(ValueError, match="is an address, and a folder or file of this machine is needed"):
            use(address)
    with pytest.raises(LogError, match="is an address"):
        diagnose_logs(address)
    assert main(["diagnose", str(address)]) == 2
    assert "is an address" in capsys.readouterr().err
    assert list((home.parent / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["my [best] run", "a:b", "c:", "s3:x", "ünï", "a~b", "-x", "a.b"])
def test_other_names_are_folders(home, name):
    """Spaces, brackets, colons and tildes within a name are part of it."""
    fit(fw.Checkpoint(name), fw.TensorBoard(f"{name}/logs", show_link=False))
    assert (Path(name) / "epoch-1.pt").is_file()
    assert len(fit(fw.Checkpoint(name), epochs=2, resume="auto").history) == 2
    with pytest.raises(FileNotFoundError, match="is a folder: name a file in it"):
        fit(resume=name)


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["x"]])
def test_what_is_no_path_is_refused(wrong):
    """Something else than a string or a path is a TypeError that shows it."""
    for use in (fw.Checkpoint, fw.TensorBoard, local_path):
        with pytest.raises(TypeError, match="a path must be a string or a pathlib.Path, got"):
            use(wrong)


def test_an_unknown_home_is_an_error(home):
    """A home folder that does not exist is named."""
    with pytest.raises(ValueError, match="~nobody-of-this-name/x"):
        fw.Checkpoint("~nobody-of-this-name/x")
