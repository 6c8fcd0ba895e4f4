"""The ``fitwatch`` command: verdicts on logged runs as lines, as a report, as a picture or as JSON."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from fitwatch.advice import TOPICS
from fitwatch.logs import Diagnosis, LogError, NoLogsError, Report, diagnose_logs
from fitwatch.logs.drawing import draw
from fitwatch.logs.watching import turns
from fitwatch.logs.wording import counts, details, facts, headline, table, worst_first
from fitwatch.opening import runs_in, serve

_HELP = """
Read the logs of any trainer, and report for each run whether it overfitted, since when, which evaluation was the best,
and how much of the training came after it. Reads event files of TensorBoard, results.csv of Ultralytics, metrics.csv
of Lightning, trainer_state.json of Hugging Face, CSV, TSV and JSON lines with names of columns, and the folders of
MLflow (mlruns) and DVCLive. Exit status: 0 if a run was judged, 1 if none could be, 2 for a wrong use, 3 for
--fail-on.
"""
_STATUSES = ("overfitting", "diverging", "underfitting", "plateau")
JUDGED, NOT_JUDGED, WRONG_USE, FAILED = range(4)
INTERRUPTED = 130  # as shells have it


_Outcome = tuple[int, Callable[[], None]]  # exit status, and what writes the report to standard output


class _UsageError(Exception):
    """Raised instead of an exit, so that --json prints JSON on a wrong use too."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}\n{self.format_usage().rstrip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Exit status: 0 if at least one run was judged, whatever the verdict; 1 if none could be; 2 for a wrong use;
        3 if a run has a verdict that ``--fail-on`` names. The reason for 1 and 2 is on standard error.
    """
    given = sys.argv[1:] if argv is None else argv
    status = JUDGED
    try:
        status, write = _outcome(given)
        write()
        if sys.stdout is not None:  # it is where the process began with it closed
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has enough; the status is that of the runs
        _discard_output()
    except OSError as error:  # a full disk
        _discard_output()
        _complain(f"the output could not be written: {error.strerror or error}")
        status = WRONG_USE
    return status


def _outcome(given: Sequence[str]) -> _Outcome:
    try:
        options = _options(given)
    except _UsageError as error:
        return _fail(str(error), WRONG_USE, as_json="--json" in given, paths=[])
    if "topic" in options:
        return JUDGED, partial(_write, TOPICS[options.topic].rstrip(), sys.stdout)
    if "folder" in options:
        return _open(options.folder, options.port, browser=options.browser)
    return _once(options) if options.watch is None else _watch(options)


def _discard_output() -> None:
    """Let what is still buffered for standard output go nowhere, so that the interpreter ends without a complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="fitwatch", description="Tell overfitting from noise.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "diagnose", help="judge the loss curves in logs", description=_HELP, allow_abbrev=False
    )
    add = command.add_argument
    helping = commands.add_parser("help", help="what to do about a verdict")
    helping.add_argument("topic", choices=TOPICS, help="the verdict")
    add("paths", metavar="PATH", nargs="+", help="folder with one or more runs, file, or pattern")
    add("--run", metavar="NAME", help="judge only this run, and print all figures")
    add("--train", "--train-tag", metavar="NAME", help="training loss: tag, column, or sub-run/tag; default: guessed")
    add("--val", "--val-tag", "--metric", metavar="NAME", help="validation loss or metric; default: guessed")
    add("--higher-is-better", action="store_true", help="the named metric is a score, such as an accuracy")
    add("--each", action="store_true", help="judge the parts of a loss one by one, and not their sum")
    add("-v", "--verbose", action="store_true", help="all figures of every run")
    add("--json", action="store_true", help="print a JSON document, also on failure; NaN and infinity become null")
    add("--plot", metavar="FILE", help="write a picture of the curves, such as curves.png (needs Pillow)")
    add("--fail-on", metavar="STATUS", choices=_STATUSES, help=f"exit with 3 if a run is: {', '.join(_STATUSES)}")
    add(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        const=10.0,
        type=_seconds,
        help="follow runs that are being written, and say it once when one turns (every 10 seconds)",
    )
    opening = commands.add_parser("open", help="open TensorBoard on a folder of runs")
    opening.add_argument("folder", metavar="DIR", type=Path, help="the folder that TensorBoard(dir) wrote to")
    opening.add_argument("--port", type=int, help="port of the server; default: 6006, or another if it is in use")
    opening.add_argument("--no-browser", dest="browser", action="store_false", help="only print the address")
    options = parser.parse_args(argv)
    if "topic" in options or "folder" in options:
        return options
    if options.watch is not None and (options.json or options.plot):
        raise _UsageError("--watch prints lines: leave out --json and --plot")
    if options.higher_is_better and options.val is None:
        raise _UsageError("--higher-is-better belongs to --metric NAME")
    return options


def _open(folder: Path, port: int | None, *, browser: bool) -> _Outcome:
    """Serve the folder until Ctrl-C."""
    if runs_in(folder):
        return serve(folder, port=port, browser=browser), lambda: None
    why = "it holds no run of fitwatch" if folder.is_dir() else "there is no such folder"
    hint = "give the folder that TensorBoard(dir) wrote to, such as runs"
    return WRONG_USE, partial(_write, f"fitwatch open {folder}: {why}; {hint}", sys.stderr)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds: write PATH before --watch") from None
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"needs a number of seconds above 0, but got {text}")
    return seconds


def _read(options: argparse.Namespace) -> Report:
    return diagnose_logs(
        *options.paths,
        run=options.run,
        train=options.train,
        val=options.val,
        each=options.each,
        higher_is_better=options.higher_is_better,
    )


def _once(options: argparse.Namespace) -> _Outcome:
    try:
        report = _read(options)
    except LogError as error:
        status = NOT_JUDGED if isinstance(error, NoLogsError) else WRONG_USE
        return _fail(str(error), status, as_json=options.json, paths=options.paths)
    failed = any(_is(one, options.fail_on) for one in report.judged)
    status = NOT_JUDGED if not report.judged else FAILED if failed else JUDGED
    if problem := _plot(report, options.plot):
        status = WRONG_USE
        _complain(problem)
    if options.json:
        return status, lambda: _write_json(options.paths, report, problem or None)
    return status, lambda: _write_text(report, verbose=options.verbose or options.run is not None)


def _plot(report: Report, file: str | None) -> str:
    """Draw the runs if asked to, and return what went wrong; "" if nothing did."""
    if file is None or not report.judged:
        return ""
    try:
        left_out = draw(worst_first(report.judged), file)
    except ImportError:
        return f"--plot {file}: it needs Pillow: pip install pillow"
    except (OSError, ValueError) as error:
        return f"--plot {file}: {(isinstance(error, OSError) and error.strerror) or error}"
    if left_out:
        _complain(f"{file} shows the worst {len(report.judged) - left_out} runs")
    return ""


def _watch(options: argparse.Namespace) -> _Outcome:
    """Follow the runs until Ctrl-C, or until one has the verdict of ``--fail-on``."""
    status = JUDGED
    try:
        for one in turns(lambda: _read(options), every=options.watch):
            at = time.strftime("%H:%M:%S")
            _write(f"{at}  {one}" if isinstance(one, str) else f"{at}  {one.run}  {headline(one)}", sys.stdout)
            if sys.stdout is not None:
                sys.stdout.flush()
            if isinstance(one, Diagnosis) and _is(one, options.fail_on):
                status = FAILED
                break
    except LogError as error:
        return _fail(str(error), WRONG_USE, as_json=False, paths=options.paths)
    except KeyboardInterrupt:
        pass
    return status, lambda: None


def _is(one: Diagnosis, status: str | None) -> bool:
    """Whether a run has the verdict that ``--fail-on`` names; one that overfitted may have diverged since."""
    return one.verdict.status == status or (status == "overfitting" and one.verdict.overfitting)


def _write_text(report: Report, *, verbose: bool) -> None:
    runs, judged = report.runs, report.judged
    if not judged:
        _write(f"fitwatch diagnose: nothing could be judged\n{table(runs, report.skipped)}", sys.stderr)
        return
    if verbose or len(runs) == 1:
        unicode = _can_write("▁█", sys.stdout)
        _write("\n".join(details(one, unicode=unicode) for one in judged), sys.stdout)
    if len(runs) > 1:
        _write(("\n" if verbose else "") + table(runs, report.skipped), sys.stdout)
    elif report.skipped:
        _write("".join(f"skipped    {reason}\n" for reason in report.skipped), sys.stdout)


def _write_json(paths: Sequence[str], report: Report, error: str | None) -> None:
    document = {
        "paths": list(paths),
        "error": error,
        "summary": counts(report.runs) if report.runs else None,
        "runs": [facts(one) for one in report.runs],
        "skipped": report.skipped,
    }
    _write(json.dumps(document, indent=2, allow_nan=False), sys.stdout)  # ASCII


def _fail(message: str, status: int, *, as_json: bool, paths: Sequence[str]) -> _Outcome:
    _complain(message)
    return status, lambda: _write_json(paths, Report(), message) if as_json else None


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere else to say it
        _write(f"fitwatch diagnose: {message}", sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    """Write lines that may hold names of files and tags: characters that are not printable are escaped."""
    if stream is None:  # the process began with it closed
        return
    encoding = stream.encoding or "utf-8"
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    stream.write(safe.encode(encoding, "backslashreplace").decode(encoding).rstrip("\n") + "\n")


def _can_write(text: str, stream: TextIO | None) -> bool:
    try:
        text.encode((stream and stream.encoding) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
