"""Verdicts on logged runs as text, and as the content of a JSON document."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from fitwatch.logs.drawing import sparkline
from fitwatch.logs.judging import Diagnosis, Unusable
from fitwatch.logs.pairing import natural

_NAMED = 3  # runs named for a reason that many share
_GROUPS = 10  # reasons and notes listed without -v
_BAD = ("overfitting", "diverging")
_STATUSES = {
    **{status: status for status in (*_BAD, "underfitting", "plateau", "improving")},
    "warming up": "with too few evaluations",
}
_AS_FACTOR = 10.0  # a larger change is written as a factor


def headline(one: Diagnosis) -> str:
    """Return the verdict in one line: status, since when, the best evaluation, and what came after it."""
    verdict = one.verdict
    if verdict.status == "warming up":
        return _too_few(one)
    best = "" if verdict.best is None else _at(one, verdict.best)
    if verdict.status == "improving" and not verdict.overfitting:
        return f"improving, best so far: {best}"
    what, came = verdict.status + _since(one), "was wasted"
    if verdict.overfitting and verdict.onset is not None:
        before = f"{what}, " if verdict.status == "diverging" else ""
        what = f"{before}overfitting since {_at(one, verdict.onset)}{_change(one)}"
    elif verdict.status == "diverging":
        what += _change(one)
    else:
        came = "came after it"
    after = f"{_percent(one.wasted_share)} of the training {came}" if one.wasted else ""
    return ", ".join(part for part in (what, best and f"best checkpoint: {best}", after) if part)


def table(runs: Sequence[Diagnosis | Unusable], skipped: Sequence[str]) -> str:
    """Return one line for each judged run, worst waste first, then the counts, and reasons and notes with theirs."""
    judged = worst_first(one for one in runs if isinstance(one, Diagnosis))
    width = max((len(_name(one)) for one in judged), default=0)
    lines = [f"{_name(one).ljust(width)}  {headline(one)}" for one in judged]
    lines += ["", counts(runs)] if judged else [counts(runs)]
    lines += _grouped("not judged", [(one.problem, _name(one)) for one in runs if isinstance(one, Unusable)])
    lines += _grouped("note", [(note, _name(one)) for one in runs for note in one.notes])
    lines += [f"skipped: {reason}" for reason in skipped[:_GROUPS]]
    if len(skipped) > _GROUPS:
        lines.append(f"skipped: {len(skipped) - _GROUPS} more files")
    if judged:
        lines.append("For all figures and the evidence: -v, or --run NAME")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def counts(runs: Sequence[Diagnosis | Unusable]) -> str:
    """Return the number of runs by verdict."""
    found = Counter[str](one.verdict.status for one in runs if isinstance(one, Diagnosis))
    order = [status for status in dict.fromkeys([*_STATUSES, *found]) if found[status]]
    named = [f"{found[status]} {_STATUSES.get(status, status)}" for status in order]
    unusable = sum(isinstance(one, Unusable) for one in runs)
    if unusable:
        named.append(f"{unusable} not judged")
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {', '.join(named)}"


def details(one: Diagnosis, *, unicode: bool) -> str:
    """Return all figures of a run, one per line, with both curves as sparklines."""
    verdict = one.verdict
    wasted = "-"
    if one.wasted is not None:
        share = f" ({_percent(one.wasted_share)} of the training)" if one.wasted else ""
        wasted = f"{one.wasted} evaluations after the best{share}"
    gap = "- (the losses seem to be in different units)"
    if one.one_unit:
        known = math.isfinite(verdict.gap)
        gap = f"{verdict.gap:.4g} (validation minus training loss, at the end)" if known else "-"
    rows = [
        ("run", _name(one)),
        ("verdict", headline(one)),
        ("losses", f"{one.train} and {one.val}, {len(one.steps)} evaluations"),
        ("training", sparkline(one.train_losses, unicode=unicode)),
        ("validation", sparkline(one.losses, unicode=unicode)),
        ("status", verdict.status),
        ("onset", _place(one, verdict.onset)),
        ("detected", _place(one, verdict.detected)),
        ("best", _place(one, verdict.best, loss=True)),
        ("wasted", wasted),
        ("gap", gap),
        ("evidence", verdict.evidence),
        *(("note", note) for note in one.notes),
    ]
    return "".join(f"{name:<10} {value}\n" for name, value in rows)


def facts(one: Diagnosis | Unusable) -> dict[str, object]:
    """Return the figures of a run for a JSON document; NaN and infinity are None."""
    if isinstance(one, Unusable):
        return {"run": one.run, "part": one.part, "problem": one.problem, "notes": one.notes}
    verdict = one.verdict
    return {
        "run": one.run,
        "part": one.part,
        "problem": None,
        "summary": headline(one),
        "train": one.train,
        "val": one.val,
        "axis": one.axis,
        "evaluations": len(one.steps),
        "overfitting": verdict.overfitting,
        "status": verdict.status,
        "onset": _facts_at(one, verdict.onset),
        "detected": _facts_at(one, verdict.detected),
        "best": _facts_at(one, verdict.best),
        "wasted": one.wasted,
        "wasted_share": _finite(one.wasted_share),
        "change": _finite(one.change),
        "one_unit": one.one_unit,
        "gap": _finite(verdict.gap) if one.one_unit else None,
        "rise": _finite(verdict.rise),
        "evidence": verdict.evidence,
        "notes": one.notes,
    }


def worst_first(judged: Iterable[Diagnosis]) -> list[Diagnosis]:
    """Sort runs: what overfits or diverges first, by its waste; then the others by theirs, and what is too short."""
    return sorted(judged, key=_order)


def _order(one: Diagnosis) -> tuple[object, ...]:
    status = one.verdict.status
    share = 0.0 if status in ("improving", "warming up") else one.wasted_share or 0.0
    bad = one.verdict.overfitting or status in _BAD
    return (not bad, status == "warming up", -share, natural(one.run), one.part)


def _name(one: Diagnosis | Unusable) -> str:
    return f"{one.run} [{one.part}]" if one.part else one.run


def _too_few(one: Diagnosis) -> str:
    """Say what a few evaluations show."""
    count, best = len(one.steps), one.verdict.best
    what = f"too few to be sure: {count} evaluations"
    if best is None:
        return what
    what += f", best is number {best + 1} ({_at(one, best)})"
    if best == count - 1:
        return f"{what}, the last"
    if one.change is not None:
        what += f", {_signed(one.change)} since"
    then, now = one.train_losses[best], one.train_losses[-1]
    if math.isfinite(then) and math.isfinite(now):
        what += " while training fell" if now < then else " while training did not fall"
    return what


def _at(one: Diagnosis, index: int) -> str:
    step = one.steps[index]
    return f"{one.axis} {step:,}" if isinstance(step, int) else f"{one.axis} {step:,.6g}"


def _place(one: Diagnosis, index: int | None, *, loss: bool = False) -> str:
    """Format an evaluation with its step."""
    if index is None:
        return "-"
    return f"evaluation {index}, {_at(one, index)}" + (f", loss {one.losses[index]:.6g}" if loss else "")


def _change(one: Diagnosis) -> str:
    return "" if not one.change else f" ({_signed(one.change)})"


def _signed(change: float) -> str:
    return f"{change + 1:,.3g} times" if change > _AS_FACTOR else f"+{_percent(change)}"


def _percent(share: float | None) -> str:
    """Format a share with two digits at least."""
    percent = 100 * (share or 0.0)
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def _since(one: Diagnosis) -> str:
    """Say since when the last losses have been NaN or infinite."""
    if math.isfinite(one.losses[-1]):
        return ""
    first = len(one.losses) - 1
    while first > 0 and not math.isfinite(one.losses[first - 1]):
        first -= 1
    return f" ({one.val} is NaN or infinite since {_at(one, first)})"


def _grouped(title: str, reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each reason, with the number and names of the runs that share it, most frequent first."""
    runs: dict[str, list[str]] = {}
    for reason, name in reasons:
        runs.setdefault(reason, []).append(name)
    lines = []
    for reason, names in sorted(runs.items(), key=lambda item: -len(item[1])):
        ordered = sorted(names, key=natural)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        count = f", {len(names)} runs" if len(names) > 1 else ""
        lines.append(f"{title}{count}: {reason} ({', '.join(ordered[:_NAMED])}{more})")
    if len(lines) > _GROUPS:
        lines[_GROUPS:] = [f"{title}: {len(lines) - _GROUPS} more, see -v"]
    return lines


def _facts_at(one: Diagnosis, index: int | None) -> dict[str, object] | None:
    if index is None:
        return None
    return {"evaluation": index, "step": one.steps[index], "loss": _finite(one.losses[index])}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
