"""The command: what it prints, and how it ends."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

import fitwatch as fw
from fitwatch.cli import main
from tests._server import noisy_data, overfitting_trainer
from tests.test_logs import TRAIN, VAL, write

BEST = VAL.index(min(VAL))


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
    """The report has the verdict, both curves, status, onset, best, wasted evaluations and evidence."""
    verdict = fw.diagnose(TRAIN, VAL)
    assert main(["diagnose", str(folder), "--run", "long"]) == 0
    out, err = capsys.readouterr()
    report = rows(out)
    assert err == ""
    wasted, rise = round(100 * (59 - BEST) / 60), round(100 * (VAL[-1] / min(VAL) - 1))
    assert report["verdict"] == (
        f"overfitting since step {verdict.onset} (+{rise} %), best checkpoint: step {BEST}, "
        f"{wasted} % of the training was wasted"
    )
    assert report["losses"] == "train/loss and val/loss, 60 evaluations"
    assert re.fullmatch(r"█[▁▂▃▄▅▆▇█]{58}▁  0\.0\d+ to 1", report["training"])
    assert report["validation"].startswith("▃▂")
    assert report["validation"].split("  ")[0].endswith("█")
    assert report["status"] == "overfitting"
    assert f"evaluation {verdict.onset}, step {verdict.onset}" == report["onset"]
    assert f"evaluation {verdict.detected}, step {verdict.detected}" == report["detected"]
    assert f"evaluation {BEST}, step {BEST}, loss {min(VAL):.6g}" == report["best"]
    assert f"{59 - BEST} evaluations after the best ({wasted} % of the training)" == report["wasted"]
    assert verdict.evidence == report["evidence"]


def test_several_runs_have_a_line_each_worst_waste_first(folder, capsys):
    """What overfits comes first, by its waste; then the counts, and the reasons of those without a verdict."""
    write(folder / "run10", {"train/loss": TRAIN[:40], "val/loss": VAL[:40]})
    write(folder / "run2", {"train/loss": TRAIN, "val/loss": TRAIN})
    write(folder / "run3", {"train/loss": TRAIN[:4], "val/loss": VAL[:4]})
    assert main(["diagnose", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["long", "run10", "run2", "run3"]
    assert re.fullmatch(r"long   overfitting since step \d+ \(\+.* %\), best .* of the training was wasted", lines[0])
    assert lines[2] == "run2   improving, best so far: step 59"
    assert lines[3] == "run3   too few to be sure: 4 evaluations, best is number 4 (step 3), the last"
    assert lines[4] == ""
    assert lines[5] == "5 runs: 2 overfitting, 1 improving, 1 with too few evaluations, 1 not judged"
    assert lines[6] == "not judged: val/loss has 2 points: too few (short)"
    assert "-v" in lines[-1]
    assert main(["diagnose", str(folder), "-v"]) == 0
    assert len(re.findall(r"^evidence ", capsys.readouterr().out, re.MULTILINE)) == 4


def test_a_few_evaluations_are_described(tmp_path, capsys):
    """Of five evaluations there is the best, the change since, and whether training fell."""
    write(tmp_path, {"train/loss": [0.6, 0.35, 0.2, 0.1, 0.05], "eval/loss": [0.5, 0.42, 0.47, 0.58, 0.71]})
    assert main(["diagnose", str(tmp_path)]) == 0
    assert rows(capsys.readouterr().out)["verdict"] == (
        "too few to be sure: 5 evaluations, best is number 2 (step 1), +69 % since while training fell"
    )


def test_a_reason_that_many_runs_share_is_a_line(tmp_path, capsys):
    """Twenty runs without validation are one line with their number and the first names, in natural order; status 1."""
    for i in range(20):
        write(tmp_path / f"version_{i}", {"train_loss": TRAIN[:2]})
    assert main(["diagnose", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "fitwatch diagnose: nothing could be judged",
        "20 runs: 20 not judged",
        (
            "not judged, 20 runs: only one series, train_loss: a training and a validation loss are needed "
            "(version_0, version_1, version_2 and 17 more)"
        ),
    ]


def test_json_has_the_same_facts(folder, capsys):
    """One document with the figures of every run; what is no finite number is null."""
    write(folder / "nan", {"train/loss": TRAIN, "val/loss": [*VAL[:-1], math.nan]})
    verdict = fw.diagnose(TRAIN, VAL)
    assert main(["diagnose", str(folder), "--json"]) == 0

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert ([str(folder)], None, []) == (document["paths"], document["error"], document["skipped"])
    assert document["summary"] == "3 runs: 1 overfitting, 1 diverging, 1 not judged"
    long, nan, short = document["runs"]
    assert long.pop("summary").startswith("overfitting since step ")
    assert long.pop("wasted_share") == pytest.approx((59 - BEST) / 60)
    assert long.pop("change") == pytest.approx(VAL[-1] / min(VAL) - 1)
    assert {
        "run": "long",
        "part": "",
        "problem": None,
        "train": "train/loss",
        "val": "val/loss",
        "axis": "step",
        "evaluations": 60,
        "overfitting": True,
        "status": "overfitting",
        "onset": {"evaluation": verdict.onset, "step": verdict.onset, "loss": VAL[verdict.onset]},
        "detected": {"evaluation": verdict.detected, "step": verdict.detected, "loss": VAL[verdict.detected]},
        "best": {"evaluation": BEST, "step": BEST, "loss": min(VAL)},
        "wasted": 59 - BEST,
        "one_unit": True,
        "gap": VAL[-1] - TRAIN[-1],
        "rise": verdict.rise,
        "evidence": verdict.evidence,
        "notes": [],
    } == long
    assert (nan["run"], nan["status"], nan["gap"]) == ("nan", "diverging", None)
    assert "val/loss is NaN or infinite since step 59" in nan["summary"]
    assert {"run", "part", "problem", "notes"} == short.keys()


def test_json_is_printed_on_failure_too(folder, tmp_path, capsys):
    """Whatever goes wrong, --json prints a document with the reason, and the status says which kind it is."""
    (tmp_path / "empty").mkdir()
    for arguments, status, reason in (
        ([str(tmp_path / "missing")], 2, "there is no folder or file"),
        ([str(tmp_path / "empty")], 1, "contain no logs"),
        ([str(folder), "--run", "none"], 2, "there is no run 'none'; there are long, short"),
        ([str(folder), "--nonsense"], 2, "unrecognized arguments: --nonsense"),
        ([str(folder), "--watch", "--json"], 2, "leave out --json"),
        ([], 2, "required: PATH"),
    ):
        assert main(["diagnose", *arguments, "--json"]) == status
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert reason in document["error"]
        assert document["runs"] == []
        assert err.startswith("fitwatch diagnose: ")
    assert main(["diagnose", str(folder), "--run", "short", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["runs"][0]["problem"] == "val/loss has 2 points: too few"


def test_no_finite_loss_at_all(tmp_path, capsys):
    """Without a finite validation loss there is no best evaluation, and nothing is called wasted."""
    write(tmp_path, {"train/loss": TRAIN, "val/loss": [math.nan] * 60})
    assert main(["diagnose", str(tmp_path)]) == 0
    report = rows(capsys.readouterr().out)
    assert (report["status"], report["best"], report["wasted"]) == ("diverging", "-", "-")
    assert report["verdict"] == "diverging (val/loss is NaN or infinite since step 0)"


def test_names_by_option(tmp_path, capsys):
    """Tags that no guess would find are given by name; the former names of the options still work."""
    write(tmp_path, {"energy a": TRAIN, "energy b": VAL})
    for train, val in (("--train", "--val"), ("--train-tag", "--val-tag")):
        assert main(["diagnose", str(tmp_path), train, "energy a", val, "energy b"]) == 0
        assert rows(capsys.readouterr().out)["losses"] == "energy a and energy b, 60 evaluations"


def test_a_score_by_option(tmp_path, capsys):
    """--metric with --higher-is-better judges a score, and the report says what was judged."""
    write(tmp_path, {"train/q": [1 - value for value in TRAIN], "val/q": [1 - value for value in VAL]})
    assert main(["diagnose", str(tmp_path), "--metric", "val/q", "--higher-is-better"]) == 0
    report = rows(capsys.readouterr().out)
    assert (report["status"], report["best"].partition(", loss")[0]) == (
        "overfitting",
        f"evaluation {BEST}, step {BEST}",
    )
    assert report["note"].startswith("higher is better for val/q")
    assert main(["diagnose", str(tmp_path), "--higher-is-better"]) == 2


def test_fail_on(folder, capsys):
    """--fail-on ends with 3 if a run has that verdict, and with 0 if none has it."""
    assert main(["diagnose", str(folder), "--fail-on", "overfitting"]) == 3
    assert main(["diagnose", str(folder), "--fail-on", "diverging"]) == 0
    assert main(["diagnose", str(folder), "--fail-on", "nonsense"]) == 2
    capsys.readouterr()


def test_a_picture(folder, capsys):
    """--plot writes a picture with a line for each curve; a suffix that names no format is refused."""
    assert main(["diagnose", str(folder), "--plot", str(folder / "curves.png")]) == 0
    with Image.open(folder / "curves.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 16)}
        assert picture.size == (480, 300)
    assert {(0x1F, 0x77, 0xB4), (0xD9, 0x5F, 0x02), (0x2C, 0xA0, 0x2C)} <= colours
    capsys.readouterr()
    assert main(["diagnose", str(folder), "--plot", str(folder / "curves.nonsense")]) == 2
    assert "curves.nonsense" in capsys.readouterr().err


def test_names_can_not_command_the_terminal(tmp_path, capsys):
    """Control characters in the names of runs and tags are escaped, and names that are no text can be printed."""
    write(tmp_path / "a\x1b[2Jb", {"train/loss": TRAIN, "val/loss": VAL, "\x07": [1.0]})
    write(tmp_path / "other", {"train/loss": TRAIN, "val/loss": VAL})
    (tmp_path / "other").rename(tmp_path / os.fsdecode(b"\xff"))
    assert main(["diagnose", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\x1b[2Jb" in out
    assert "\\udcff" in out


def test_it_runs_without_torch(folder):
    """The command judges event files without importing torch, NumPy or TensorBoard, and ends without a warning."""
    code = (
        "import sys; from fitwatch.cli import main; status = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'tensorboard', 'PIL') if m in sys.modules], status)"
    )
    run = [sys.executable, "-W", "error", "-c", code, "diagnose", str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert done.stderr == ""


def test_as_a_command(folder):
    """``python -m fitwatch`` prints the lines without a warning; without a command it ends with 2 and its usage."""
    run = [sys.executable, "-W", "error", "-m", "fitwatch"]
    good = subprocess.run([*run, "diagnose", str(folder)], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("long  overfitting since step ")
    bad = subprocess.run(run, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "usage: fitwatch" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_terminal_without_unicode(folder):
    """Where the encoding has no blocks, the curves are drawn in ASCII."""
    run = [sys.executable, "-m", "fitwatch", "diagnose", str(folder), "--run", "long"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert re.search(r"^training   #[-_.~=+*#]+_  0", done.stdout, re.MULTILINE)


def test_watch_says_once_when_a_run_turns(tmp_path):
    """--watch waits for the logs, follows them, names a run once when it begins to overfit, and ends by --fail-on."""
    log = tmp_path / "run" / "log.csv"
    run = [sys.executable, "-m", "fitwatch", "diagnose", str(tmp_path), "--watch", "0.05", "--fail-on", "overfitting"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert "waiting for logs" in process.stdout.readline()
        log.parent.mkdir()
        log.write_text("epoch,loss,val_loss\n")
        with log.open("a") as file:
            for epoch in range(20):
                file.write(f"{epoch},{TRAIN[epoch]},{VAL[epoch]}\n")
            file.flush()
            assert "watching 1 run" in process.stdout.readline()
            time.sleep(0.2)
            assert process.poll() is None
            for epoch in range(20, 60):
                file.write(f"{epoch},{TRAIN[epoch]},{VAL[epoch]}\n")
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 3
    assert re.fullmatch(r"\d\d:\d\d:\d\d  run  overfitting since epoch \d+ .*\n", rest)


def test_the_command_is_installed():
    """The package installs a command ``fitwatch``, which is this function."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fitwatch": f"{main.__module__}:{main.__name__}"}


def ended(arguments, *, stdout):
    """The command as a process of its own: exit status and standard error."""
    code = "import sys; from fitwatch.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code, "diagnose", *map(str, arguments)]
    done = subprocess.run(run, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def test_a_reader_that_has_enough_does_not_change_the_status(folder):
    """Where nobody reads the report any more, --fail-on still ends with 3."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert ended([folder, "--fail-on", "overfitting"], stdout=writer) == (3, "")
        assert ended([folder, "--json"], stdout=writer) == (0, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_can_not_be_written_is_said(folder):
    """On a full disk the command ends with 2 and a sentence; without standard output it ends with its status."""
    for arguments in ([folder], [folder, "--json"], [folder / "missing", "--json"]):
        with Path("/dev/full").open("w") as full:
            status, said = ended(arguments, stdout=full)
        assert (status, said.splitlines()[-1]) == (
            2,
            "fitwatch diagnose: the output could not be written: No space left on device",
        )
    code = "import os, sys; sys.stdout = None; from fitwatch.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code, "diagnose", str(folder), "--run", "long"]
    done = subprocess.run(run, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_picture_that_fails_costs_no_verdict(folder, capsys):
    """If --plot can't write its file, the report and the JSON document are printed nevertheless, and the status is 2."""
    file = str(folder / "missing" / "curves.png")
    assert main(["diagnose", str(folder), "--plot", file]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("long  overfitting since step ")
    assert err == f"fitwatch diagnose: --plot {file}: No such file or directory\n"
    assert main(["diagnose", str(folder), "--plot", file, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"].startswith("--plot")
    assert document["runs"][0]["status"] == "overfitting"


def test_wrong_seconds_are_explained(folder, capsys):
    """A path after --watch, and an interval that is none, are refused with the way out."""
    assert main(["diagnose", "--watch", str(folder)]) == 2
    assert "write PATH before --watch" in capsys.readouterr().err
    assert main(["diagnose", str(folder), "--watch", "0"]) == 2
    assert "a number of seconds above 0, but got 0" in capsys.readouterr().err


def test_a_gap_that_is_no_number_is_left_out(tmp_path, capsys):
    """After a loss that is NaN or infinite at the end, no gap is printed."""
    for last in (math.nan, math.inf):
        write(tmp_path / str(last), {"train/loss": TRAIN, "val/loss": [*VAL[:-1], last]})
        assert main(["diagnose", str(tmp_path / str(last))]) == 0
        assert rows(capsys.readouterr().out)["gap"] == "-"


def test_open_serves_the_folder_and_prints_the_page(tmp_path):
    """``fitwatch open`` starts a server with the runs, prints a link to the only one, and ends by Ctrl-C."""
    trainer = overfitting_trainer(tmp_path, name="only")
    trainer.fit(*noisy_data(), max_steps=2)
    command = [sys.executable, "-m", "fitwatch", "open", str(tmp_path), "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            link = process.stdout.readline().strip()
            assert re.fullmatch(r"http://localhost:\d+/\?smoothing=0&runFilter=%5Eonly/&pinnedCards=\S+", link)
            with urlopen(link.partition("?")[0], timeout=30) as page:
                assert page.status == 200
        finally:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_open_refuses_a_folder_without_runs(tmp_path, capsys):
    """A folder that is missing or empty, or a run instead of its folder, is a wrong use, with a hint."""
    overfitting_trainer(tmp_path / "runs", name="one").fit(*noisy_data(), max_steps=2)
    (tmp_path / "empty").mkdir()
    for path, why in (("missing", "no such folder"), ("empty", "no run of"), ("runs/one", "no run of")):
        assert main(["open", str(tmp_path / path)]) == 2
        assert why in capsys.readouterr().err
