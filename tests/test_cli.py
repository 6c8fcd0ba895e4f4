"""The command: what it prints, and how it ends."""

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fitwatch as fw
from fitwatch.cli import main
from tests.test_logs import TRAIN, VAL, write


@pytest.fixture
def folder(tmp_path):
    """A run that overfits, and one that has only begun."""
    write(tmp_path / "runs" / "long", {"train/loss": TRAIN, "val/loss": VAL})
    write(tmp_path / "runs" / "short", {"train/loss": TRAIN[:2], "val/loss": VAL[:2]})
    return tmp_path / "runs"


def rows(text):
    """The lines of a report by their names."""
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_a_single_run_is_reported_in_full(folder, capsys):
    """The report has status, onset, best, wasted evaluations and evidence, with index, step and loss."""
    verdict = fw.diagnose(TRAIN, VAL)
    assert main(["diagnose", str(folder), "--run", "long"]) == 0
    out, err = capsys.readouterr()
    report = rows(out)
    assert err == ""
    assert report["losses"] == "train/loss and val/loss, 60 evaluations"
    assert report["status"] == "overfitting"
    assert f"evaluation {verdict.onset}, step {verdict.onset}" == report["onset"]
    assert f"evaluation {verdict.detected}, step {verdict.detected}" == report["detected"]
    assert f"evaluation {VAL.index(min(VAL))}, step {VAL.index(min(VAL))}, loss {min(VAL):.6g}" == report["best"]
    assert f"{59 - VAL.index(min(VAL))} evaluations after the best" == report["wasted"]
    assert verdict.evidence == report["evidence"]


def test_several_runs_are_a_table(folder, capsys):
    """Each run has a line; one that can't be judged says why, and is no failure beside one that can."""
    assert main(["diagnose", str(folder)]) == 0
    head, long, short, hint = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "status", "onset", "best", "wasted"]
    assert long.startswith("long   overfitting  evaluation ")
    assert long.endswith(f"{59 - VAL.index(min(VAL))} of 60")
    assert short.startswith("short  not judged   - ")
    assert "Too few points" in short
    assert "--run NAME" in hint


def test_json_has_the_same_facts(folder, capsys):
    """One document with the figures of every run; what is no finite number is null."""
    write(folder / "nan", {"train/loss": TRAIN, "val/loss": [*VAL[:-1], math.nan]})
    verdict = fw.diagnose(TRAIN, VAL)
    assert main(["diagnose", str(folder), "--json"]) == 0

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert str(folder) == document["logdir"]
    long, nan, short = document["runs"]
    best = VAL.index(min(VAL))
    assert {
        "run": "long",
        "problem": None,
        "train": "train/loss",
        "val": "val/loss",
        "evaluations": 60,
        "overfitting": True,
        "status": "overfitting",
        "onset": {"evaluation": verdict.onset, "step": verdict.onset, "loss": VAL[verdict.onset]},
        "detected": {"evaluation": verdict.detected, "step": verdict.detected, "loss": VAL[verdict.detected]},
        "best": {"evaluation": best, "step": best, "loss": min(VAL)},
        "wasted": 59 - best,
        "gap": VAL[-1] - TRAIN[-1],
        "rise": verdict.rise,
        "evidence": verdict.evidence,
        "notes": [],
    } == long
    assert (nan["run"], nan["status"], nan["gap"]) == ("nan", "diverging", None)
    assert {"run", "problem"} == short.keys()


def test_no_finite_loss_at_all(tmp_path, capsys):
    """Without a finite validation loss there is no best evaluation, and nothing is called wasted."""
    write(tmp_path, {"train/loss": TRAIN, "val/loss": [math.nan] * 60})
    assert main(["diagnose", str(tmp_path)]) == 0
    report = rows(capsys.readouterr().out)
    assert (report["status"], report["best"], report["wasted"]) == ("diverging", "-", "-")


def test_tags_by_option(tmp_path, capsys):
    """Tags that no guess would find are given by name."""
    write(tmp_path, {"energy a": TRAIN, "energy b": VAL})
    assert main(["diagnose", str(tmp_path), "--train-tag", "energy a", "--val-tag", "energy b"]) == 0
    assert rows(capsys.readouterr().out)["losses"] == "energy a and energy b, 60 evaluations"


def test_what_is_unusable_ends_with_2_and_one_line(folder, tmp_path, capsys):
    """Status 2, nothing on standard output, and one line that says what was found."""
    for arguments, expected in (
        ([str(tmp_path / "missing")], "there is no folder"),
        ([str(folder), "--run", "none"], "there is no run 'none' in .*; there are long, short"),
        ([str(folder), "--run", "short", "--json"], "run short: val/loss: Too few points"),
        ([str(folder), "--val-tag", "x"], "give both or neither"),
    ):
        assert main(["diagnose", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("fitwatch diagnose: ")
        assert re.search(expected, err)


def test_of_many_unusable_runs_a_few_are_named(tmp_path, capsys):
    """A message about many runs stays short, and says how many it left out."""
    for i in range(7):
        write(tmp_path / str(i), {"loss": TRAIN[:2]})
    assert main(["diagnose", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.findall(r"run (\d): only one series", err) == list("01234")
    assert err.endswith("; and 2 more runs\n")


def test_as_a_command(folder):
    """``python -m fitwatch`` prints the table without a warning; without a command it ends with 2 and its usage."""
    run = [sys.executable, "-W", "error", "-m", "fitwatch"]
    good = subprocess.run([*run, "diagnose", str(folder)], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[1].startswith("long   overfitting")
    bad = subprocess.run(run, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "usage: fitwatch" in bad.stderr


def test_the_command_is_installed():
    """The package installs a command ``fitwatch``, which is this function."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fitwatch": f"{main.__module__}:{main.__name__}"}
