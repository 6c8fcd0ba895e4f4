"""The ``fitwatch`` command: verdicts on logged runs as a report, a table or JSON."""

import argparse
import json
import math
import sys
from collections.abc import Sequence

from fitwatch.logs import Diagnosis, Unusable, diagnose_logs
from fitwatch.logs.curves import LogError

_HELP = """
Read TensorBoard event files of any writer, and report for each run whether it overfitted, since when, which evaluation
was the best, and how many came after it. Evaluations are the points of the validation loss, counted from 0.
"""

_MAX_PROBLEMS = 5  # in one message


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Exit status: 0 if at least one run was judged, whatever the verdict; otherwise 2, with the reason on standard
        error.
    """
    options = _parser().parse_args(argv)
    try:
        found = diagnose_logs(options.logdir, run=options.run, train_tag=options.train_tag, val_tag=options.val_tag)
    except (LogError, OSError) as error:
        return _fail(str(error))
    judged = [one for one in found if isinstance(one, Diagnosis)]
    if not judged:
        problems = [f"run {one.run}: {one.problem}" for one in found if isinstance(one, Unusable)]
        more = f"; and {len(problems) - _MAX_PROBLEMS} more runs" if len(problems) > _MAX_PROBLEMS else ""
        return _fail("; ".join(problems[:_MAX_PROBLEMS]) + more)
    if options.json:
        document = {"logdir": options.logdir, "runs": [_facts(one) for one in found]}
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(_report(judged[0]) if len(found) == 1 else _table(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fitwatch", description="Tell overfitting from noise.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser("diagnose", help="judge the loss curves in TensorBoard logs", description=_HELP)
    command.add_argument("logdir", metavar="LOGDIR", help="folder with one or more runs")
    command.add_argument("--run", metavar="NAME", help="judge only this run, and print all figures")
    command.add_argument(
        "--train-tag", metavar="TAG", help="training loss: a tag, or sub-run/tag as in train/loss; default: guessed"
    )
    command.add_argument("--val-tag", metavar="TAG", help="validation loss; give both tags or neither")
    command.add_argument("--json", action="store_true", help="print a JSON document; NaN and infinity become null")
    return parser


def _fail(message: str) -> int:
    sys.stderr.write(f"fitwatch diagnose: {message}\n")
    return 2


def _report(one: Diagnosis) -> str:
    """Format all figures of a run, one per line."""
    verdict = one.verdict
    rows = [
        ("run", one.run),
        ("losses", f"{one.train} and {one.val}, {len(one.steps)} evaluations"),
        ("status", verdict.status),
        ("onset", _at(one, verdict.onset)),
        ("detected", _at(one, verdict.detected)),
        ("best", _at(one, verdict.best, loss=True)),
        ("wasted", "-" if one.wasted is None else f"{one.wasted} evaluations after the best"),
        ("gap", f"{verdict.gap:.4g} (validation minus training loss, at the end)"),
        ("evidence", verdict.evidence),
        *(("note", note) for note in one.notes),
    ]
    return "".join(f"{name:<9} {value}\n" for name, value in rows)


def _table(found: Sequence[Diagnosis | Unusable]) -> str:
    """Format one line per run."""
    rows = [("run", "status", "onset", "best", "wasted", "")]
    for one in found:
        if isinstance(one, Unusable):
            rows.append((one.run, "not judged", "-", "-", "-", one.problem))
            continue
        verdict, wasted = one.verdict, "-" if one.wasted is None else f"{one.wasted} of {len(one.steps)}"
        rows.append(
            (one.run, verdict.status, _at(one, verdict.onset), _at(one, verdict.best), wasted, "; ".join(one.notes))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
    return "".join(f"{line.rstrip()}\n" for line in lines) + "For all figures and the evidence of a run: --run NAME\n"


def _at(one: Diagnosis, index: int | None, *, loss: bool = False) -> str:
    """Format an evaluation with its step."""
    if index is None:
        return "-"
    return f"evaluation {index}, step {one.steps[index]}" + (f", loss {one.losses[index]:.6g}" if loss else "")


def _facts(one: Diagnosis | Unusable) -> dict[str, object]:
    if isinstance(one, Unusable):
        return {"run": one.run, "problem": one.problem}
    verdict = one.verdict
    return {
        "run": one.run,
        "problem": None,
        "train": one.train,
        "val": one.val,
        "evaluations": len(one.steps),
        "overfitting": verdict.overfitting,
        "status": verdict.status,
        "onset": _place(one, verdict.onset),
        "detected": _place(one, verdict.detected),
        "best": _place(one, verdict.best),
        "wasted": one.wasted,
        "gap": _finite(verdict.gap),
        "rise": _finite(verdict.rise),
        "evidence": verdict.evidence,
        "notes": one.notes,
    }


def _place(one: Diagnosis, index: int | None) -> dict[str, object] | None:
    if index is None:
        return None
    return {"evaluation": index, "step": one.steps[index], "loss": _finite(one.losses[index])}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
