"""Which folders and files a resumed fit touches: its own, and no others."""

import logging
import shutil

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch import saving
from tests._events import points
from tests._server import noisy_data, overfitting_trainer


def trained(folder, *, saved="saved", runs="runs", name="run", epochs=4, resume=None):
    """Train with files below ``folder``, and return the trainer."""
    checkpoint = fw.Checkpoint(folder / saved, keep=99)
    trainer = overfitting_trainer(folder / runs, name=name, callbacks=[checkpoint])
    trainer.fit(*noisy_data(), epochs=epochs, resume=resume)
    return trainer


def contents(folder):
    """Return the bytes of all files below a folder, by path."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_fork_leaves_the_first_run_as_it_is(tmp_path, caplog):
    """Resumed under another name and folder, a fit is a run of its own from there on; not a byte of the first changes."""
    trained(tmp_path, saved="first", name="a")
    before = contents(tmp_path)
    fork = trained(tmp_path, saved="second", name="b", resume=tmp_path / "first/epoch-2.pt")
    now = contents(tmp_path)
    assert before == {path: now[path] for path in before}
    assert [step for step, _ in points(tmp_path / "runs/a/val", "loss")] == [6, 12, 18, 24]
    assert [step for step, _ in points(tmp_path / "runs/b/val", "loss")] == [18, 24]
    assert {"epoch-3.pt", "epoch-4.pt"} <= {file.name for file in (tmp_path / "second").iterdir()}
    best, said = fork.state.history[:2], [record.getMessage() for record in caplog.records]
    best = min(best, key=lambda entry: entry["val/loss"])
    (line,) = [s for s in said if "saves to" in s]
    assert f"starts from {tmp_path / 'first/epoch-2.pt'} and saves to {tmp_path / 'second'}" in line
    assert f"val/loss {best['val/loss']:.6g} of step {best['step']}" in line
    assert any("runs/b is a new run, from step 12 on; the run 'a'" in s for s in said)


def test_the_best_of_a_fork_is_better_than_all_before_it(tmp_path):
    """A fork has no best.pt until an evaluation beats the best one before the fork."""

    def fit(folder, losses, epochs, resume=None):
        values = iter(losses)

        class Planned(fw.Trainer):
            def validation_step(self, batch):
                return torch.tensor(next(values))

        model = nn.Linear(2, 2)
        checkpoint = fw.Checkpoint(tmp_path / folder, keep=99)
        trainer = Planned(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=checkpoint, device="cpu")
        trainer.sanity_steps = 0  # a trial would take values too
        loader = [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))]
        trainer.fit(loader, loader, epochs=epochs, resume=resume)
        return (tmp_path / folder / "best.pt").exists()

    assert fit("a", [0.9, 0.5, 0.7], 3)
    assert not fit("b", [0.6, 0.55], 4, tmp_path / "a/epoch-2.pt")
    assert fit("c", [0.6, 0.4], 4, tmp_path / "a/epoch-2.pt")


def test_a_fork_into_a_folder_with_another_run_is_refused(tmp_path):
    """The checkpoints of a third run are neither mixed with those of a fork nor deleted."""
    trained(tmp_path, saved="first", name="a", epochs=2)
    trained(tmp_path, saved="third", name="c", epochs=3)
    before = contents(tmp_path / "third")
    with pytest.raises(FileExistsError, match=r"third holds the checkpoint epoch-3.pt of an earlier run"):
        trained(tmp_path, saved="third", name="b", resume=tmp_path / "first/epoch-1.pt")
    assert contents(tmp_path / "third") == before


@pytest.mark.parametrize("moved", [False, True])
def test_the_same_dir_and_name_go_on_in_the_same_run(tmp_path, moved):
    """A run is found by dir and name, also after all its folders were moved, and with the number that it got."""
    (tmp_path / "runs/run").mkdir(parents=True)
    trained(tmp_path)
    if moved:
        shutil.copytree(tmp_path, tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / "runs")
    folder = tmp_path / "elsewhere" if moved else tmp_path
    trained(folder, epochs=3, resume=folder / "saved/epoch-2.pt")
    assert [step for step, _ in points(folder / "runs/run-2/val", "loss")] == [6, 12, 18]
    assert sorted(f.name for f in (folder / "runs").iterdir()) == ["run", "run-2"]


@pytest.mark.parametrize("other", ["run", "run-1"])
def test_another_run_of_the_same_name_is_not_cut(tmp_path, other):
    """In another dir, a run that happens to have the name is another run: the fit gets a folder beside it."""
    trained(tmp_path, saved="first", runs="runs", name=other)
    trained(tmp_path, saved="second", runs="others")
    before = contents(tmp_path / "others")
    trained(tmp_path, saved="third", runs="others", resume=tmp_path / "first/epoch-2.pt")
    now = contents(tmp_path / "others")
    assert before == {path: now[path] for path in before}
    assert [step for step, _ in points(tmp_path / "others/run-2/val", "loss")] == [18, 24]


def test_only_event_files_of_fitwatch_are_deleted(tmp_path):
    """On resume a user's notes, and the event files of another writer, stay where they are."""
    trained(tmp_path)
    run = tmp_path / "runs/run"
    theirs = [run / "best/notes.txt", run / "best/events.out.tfevents.1795839245.vm.2235.0", run / "train/cut.txt"]
    for file in theirs:
        file.write_text("mine")
    trained(tmp_path, epochs=3, resume=tmp_path / "saved/epoch-2.pt")
    assert all(file.read_text() == "mine" for file in theirs)
    assert [step for step, _ in points(run / "train", "loss")] == [6, 12, 18]


@pytest.mark.parametrize("place", ["run", "run/train", "run/val", "file"])
def test_links_are_not_followed(tmp_path, place):
    """A run folder that is a link, or holds one, is not cut: what it leads to may be another's."""
    trained(tmp_path)
    found = tmp_path / "runs" / place
    if place == "file":
        (found,) = (tmp_path / "runs/run/val").iterdir()
    target = tmp_path / "target"
    found.rename(target)
    found.symlink_to(target)
    before = contents(target) if target.is_dir() else target.read_bytes()
    trained(tmp_path, epochs=3, resume=tmp_path / "saved/epoch-2.pt")
    assert before == (contents(target) if target.is_dir() else target.read_bytes())
    assert [step for step, _ in points(tmp_path / "runs/run-2/val", "loss")] == [18]


def hostile(content, key, value):
    """Set a value deep in a checkpoint; ``key`` is its path."""
    part = content
    for name in key[:-1]:
        part = part[name]
    part[key[-1]] = value
    return content


PAGE = ("callbacks", "TensorBoard")
HOSTILE = [
    *[
        ((*PAGE, "run", key), value)
        for key in ("name", "folder", "file")
        for value in ("..", ".", "", "../victim", "/victim", "a\\b", "a\0b", 3, None, ["run"])
    ],
    ((*PAGE, "run"), "../victim"),
    ((*PAGE, "run"), {"name": "run"}),
    ((*PAGE, "curves"), {"../loss": {}}),
    ((*PAGE, "curves"), {"victim/loss": {}}),
    (PAGE, "../victim"),
    (("callbacks",), ["TensorBoard"]),
    (("callbacks", "Checkpoint", "best"), "../victim"),
    (("callbacks", "Checkpoint", "best"), [3, "0.5"]),
    (("progress", "epoch"), "../victim"),
    (("progress", "step"), -1),
    (("progress", "step"), 12.0),
    (("progress", "step"), True),
    (("progress", "nonesuch"), 1),
    (("progress",), None),
    (("history", 0, "step"), "../victim"),
    (("history", 0), "../victim"),
    (("settings",), None),
]


def test_a_hostile_checkpoint_changes_no_file(tmp_path):
    """Whatever stands in a field that files are named by: one ValueError with file and key, and no file changes."""
    trained(tmp_path, saved="saved", epochs=2)
    (tmp_path / "victim/train").mkdir(parents=True)
    (tmp_path / "victim/train/notes").write_text("mine")
    before = contents(tmp_path)
    for key, value in HOSTILE:
        path = tmp_path / "hostile.pt"
        saving.write(path, hostile(saving.read(tmp_path / "saved/epoch-1.pt"), key, value))
        last = "TensorBoard" if key == PAGE else [part for part in key if isinstance(part, str)][-1]
        with pytest.raises(ValueError, match=rf"hostile\.pt.*{last}"):
            trained(tmp_path, saved="saved", resume=path)
        path.unlink()
        assert contents(tmp_path) == before, (key, value)


def test_an_absolute_path_of_an_older_file_is_ignored(tmp_path):
    """A folder named in full, as earlier versions of the format did, is not looked at."""
    trained(tmp_path, epochs=2)
    shutil.copytree(tmp_path / "runs/run", tmp_path / "victim")
    content = saving.read(tmp_path / "saved/epoch-1.pt")
    content["callbacks"]["TensorBoard"].pop("run")
    content["callbacks"]["TensorBoard"]["run_dir"] = str(tmp_path / "victim")
    saving.write(tmp_path / "saved/epoch-1.pt", content)
    before = contents(tmp_path / "victim")
    trained(tmp_path, resume=tmp_path / "saved/epoch-1.pt")
    assert contents(tmp_path / "victim") == before


@pytest.mark.parametrize("name", [".", "..", "", "a/b", "/a", "a\\b", "a\0b", "a\nb", 3])
def test_a_name_that_leads_elsewhere_is_refused(name):
    """Runs and markers name folders: a name that is none, or leads out of the folder, is refused where it is given."""
    with pytest.raises(ValueError, match=r"name must be a non-empty string without slashes"):
        fw.TensorBoard("runs", name=name)

    class Mark(fw.Callback):
        def __init__(self, how):
            self.how = how

        def on_validation_end(self, state):
            bar = fw.records.Marker(0.0, 1.0)
            if self.how == "mark":
                state.mark(name, state.metrics)
            elif self.how == "log":
                state.log(name, bar)
            else:
                state.log.defer(torch.ones(()), lambda _: {name: bar})

    for how in ("mark", "log", "defer"):
        model = nn.Linear(10, 2)
        trainer = fw.Trainer(model, torch.optim.SGD(model.parameters()), callbacks=Mark(how), device="cpu")
        with pytest.raises(ValueError, match="the name of a marker must be a non-empty string without slashes"):
            trainer.fit(*noisy_data(), epochs=1)


def test_names_of_values_stay_in_the_folder(tmp_path):
    """Names of values, layers and metrics become tags, never paths; a marker called like a sub-run gets a number."""

    class Log(fw.Callback):
        def on_step_end(self, state):
            for name in ("../evil", "/evil", "train/../../evil", "evil"):
                state.log(name, 1.0)

        def on_validation_end(self, state):
            state.mark("best", state.metrics)

    model = nn.Sequential()
    model.add_module("/evil", nn.Linear(10, 2))
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[Log(), fw.GradientNorm(), fw.TensorBoard(tmp_path / "runs", show_link=False)],
        metrics={"../evil": lambda outputs, targets: outputs.mean()},
        device="cpu",
    )
    trainer.fit(*noisy_data(), epochs=1)
    assert [f.name for f in tmp_path.iterdir()] == ["runs"]
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["run"]
    assert sorted(f.name for f in (tmp_path / "runs/run").iterdir()) == ["baseline", "best", "best 2", "train", "val"]


def test_a_fork_that_fails_before_its_first_step_leaves_no_folder(tmp_path, caplog):
    """The new folder of a fork is removed again if the fit is refused, so that the next try gets the plain name."""
    caplog.set_level(logging.ERROR)
    trained(tmp_path, name="a", epochs=1)
    trainer = overfitting_trainer(tmp_path / "runs", name="b", callbacks=[fw.EarlyStopping("val/nonesuch", mode="min")])
    with pytest.raises(ValueError, match="nonesuch"):
        trainer.fit(*noisy_data(), epochs=2, resume=tmp_path / "saved/epoch-1.pt")
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["a"]
