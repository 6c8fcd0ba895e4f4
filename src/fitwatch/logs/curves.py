"""Which of many logged series are the training and the validation loss of a run, told by their names."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from attrs import field, frozen

Points = list[tuple[int, float]]  # (step, value), by rising step
Logged = Mapping[str, Mapping[str, Points]]  # folder, "." for the outermost -> tag -> points

_TRAIN, _VAL, _TEST = "train", "val", "test"
_ROLES = {
    **dict.fromkeys(["train", "training"], _TRAIN),
    **dict.fromkeys(["val", "valid", "validate", "validation", "eval", "evaluate", "evaluation", "dev"], _VAL),
    "test": _TEST,  # many call the validation set so
}
# How often a loss is logged and how it was summed up is no part of which loss it is. An epoch's mean is best.
_GRAINS = {**dict.fromkeys(["epoch", "epochs"], 0), **dict.fromkeys(["step", "batch", "iter", "iteration"], 2)}
_FILLERS = {"total", "mean", "avg", "average", "running"}
_SIDES = (
    re.compile(r"(?P<stem>.+)[-_. ](?P<word>[a-z]+)", re.IGNORECASE),
    re.compile(r"(?P<word>[a-z]+)[-_. ](?P<stem>.+)", re.IGNORECASE),
)


class LogError(ValueError):
    """The logs can't be used as they are; the message is one line."""


@frozen(kw_only=True)
class Series:
    """One logged curve.

    Attributes:
        name: Tag, or sub-run and tag, relative to its run.
        points: (step, value).
    """

    name: str
    points: Points = field(repr=False)


@frozen(kw_only=True)
class _Named(Series):
    """A curve, and what its name says.

    Attributes:
        run: The run it belongs to: a folder relative to the outermost one.
        role: ``"train"``, ``"val"``, ``"test"``, or ``""`` if its name doesn't tell.
        key: The other words of the tag, in lower case.
        grain: 0 for a value per epoch, 2 per step, 1 if its name doesn't tell.
    """

    run: str
    role: str
    key: tuple[str, ...]
    grain: int


@frozen(kw_only=True)
class Pair:
    """The two losses of a run, or why there are none.

    Attributes:
        run: Its name.
        train: The training loss; None if it was not found.
        val: The validation loss; None with ``train``.
        problem: Why they were not found; "" if they were.
    """

    run: str
    train: Series | None = None
    val: Series | None = None
    problem: str = ""


def guess(logged: Logged) -> list[Pair]:
    """The training and the validation loss of each run.

    A run is a folder together with its sub-runs: ``train``, ``val``, ``validation``, ``eval``, and those of
    ``SummaryWriter.add_scalars``. ``exp1_train`` beside ``exp1_val`` are sub-runs of a run ``exp1``.
    """
    runs: dict[str, list[_Named]] = {}
    sides = _sides(logged)
    for folder, tags in logged.items():
        for tag, points in tags.items():
            series = _series(folder, tag, points, sides)
            runs.setdefault(series.run, []).append(series)
    return [_pair(run, series) for run, series in sorted(runs.items())]


def find(logged: Logged, train_tag: str, val_tag: str) -> list[Pair]:
    """The series of these names in each run that has both; a name may begin with a sub-run, as ``train/loss``.

    Raises:
        LogError: No run has both, or the names are the same.
    """
    if train_tag == val_tag:
        raise LogError(
            f"the training and the validation loss can't be one series, {train_tag!r}; "
            "if they are in two sub-runs, write so: train/loss and val/loss"
        )
    full = {_join(folder, tag): points for folder, tags in logged.items() for tag, points in tags.items()}
    runs = {".", *logged, *(str(parent) for folder in logged for parent in PurePosixPath(folder).parents)}
    pairs = []
    for run in sorted(runs):
        train, val = full.get(_join(run, train_tag)), full.get(_join(run, val_tag))
        if train is not None and val is not None:
            pairs.append(
                Pair(run=run, train=Series(name=train_tag, points=train), val=Series(name=val_tag, points=val))
            )
    if not pairs:
        lacking = [tag for tag in (train_tag, val_tag) if not any(f"/{path}".endswith(f"/{tag}") for path in full)]
        what = f"no series is named {lacking[0]!r}" if lacking else f"no run has both {train_tag!r} and {val_tag!r}"
        raise LogError(f"{what}; there are {listed(full)}")
    return pairs


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names, those of losses first, and not too many."""
    ordered = sorted(names, key=lambda name: ("loss" not in name.lower(), name))
    more = f", and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _parent(folder: str) -> tuple[str, str]:
    parent, _, name = folder.rpartition("/")
    return parent or ".", name


def _words(text: str) -> list[str]:
    """The words of a name in lower case: ``"Loss/trainEpoch_1"`` has loss, train, epoch and 1."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())


def _role(words: Iterable[str]) -> str:
    """What the last word that is a role says: ``train/val_loss`` is a validation loss."""
    return ([""] + [_ROLES[word] for word in words if word in _ROLES])[-1]


def _sides(logged: Logged) -> dict[str, tuple[str, str]]:
    """The run and the role of folders whose names differ in the role only, as ``exp1_train`` and ``exp1_val``."""
    runs: dict[str, dict[str, str]] = {}  # run -> folder -> role
    for folder, tags in logged.items():
        parent, name = _parent(folder)
        roles = {_role(_words(tag)) for tag in tags}
        matches = [match for pattern in _SIDES if (match := pattern.fullmatch(name))]
        role = {_ROLES[m["word"].lower()]: m["stem"] for m in matches if m["word"].lower() in _ROLES}
        if len(role) == 1 and not (_TRAIN in roles and roles & {_VAL, _TEST}):  # else it is a run by itself
            ((side, stem),) = role.items()
            runs.setdefault(_join(parent, stem), {})[folder] = side
    return {
        folder: (run, role)
        for run, folders in runs.items()
        if len(set(folders.values())) > 1
        for folder, role in folders.items()
    }


def _series(folder: str, tag: str, points: Points, sides: Mapping[str, tuple[str, str]]) -> _Named:
    parent, name = _parent(folder)
    run, role = folder, ""
    added = tag.replace("/", "_") + "_"  # how add_scalars names its sub-runs: main tag, _, name of the line
    line = _role(_words(name.removeprefix(added))) if name.startswith(added) else ""
    if name.lower() in _ROLES:
        run, role = parent, _ROLES[name.lower()]
    elif line:
        run, role = parent, line
    elif folder in sides:
        run, role = sides[folder]
    words = _words(tag)
    return _Named(
        run=run,
        name=tag if run == folder else f"{name}/{tag}",
        points=points,
        role=_role(words) or role,
        key=tuple(word for word in words if word not in _ROLES and word not in _GRAINS and word not in _FILLERS),
        grain=min((_GRAINS[word] for word in words if word in _GRAINS), default=1),
    )


def _pair(run: str, series: list[_Named]) -> Pair:
    losses: dict[tuple[str, ...], list[_Named]] = {}
    for one in series:
        if any(word.endswith(("loss", "losses")) for word in one.key):
            losses.setdefault(one.key, []).append(one)
    pairs = {key: pair for key, same in losses.items() if (pair := _both(same))}
    plain = [pair for key, pair in pairs.items() if set(key) <= {"loss", "losses"}]
    if len(plain or pairs) == 1:
        train, val = (plain or list(pairs.values()))[0]
        return Pair(run=run, train=train, val=val)
    names = listed([one.name for one in series])
    if pairs:
        both = " or ".join(f"{train.name} with {val.name}" for train, val in pairs.values())
        return Pair(run=run, problem=f"which loss is meant, {both}? Say so with --train-tag and --val-tag")
    if len(series) == 1:
        return Pair(run=run, problem=f"a single series, {names}: it takes a training and a validation loss")
    hint = f"--train-tag and --val-tag name them; there are {names}"
    return Pair(run=run, problem=f"no pair of a training and a validation loss was found by name; {hint}")


def _both(series: list[_Named]) -> tuple[_Named, _Named] | None:
    """Of the series of one loss the training and the validation curve that say most; None if one is missing."""
    chosen: list[_Named] = []
    for roles in ((_TRAIN, ""), (_VAL, _TEST)):
        known = [one for one in series if one.role in roles]
        if not known:
            return None
        chosen.append(min(known, key=lambda one: (roles.index(one.role), one.grain, -len(one.points), one.name)))
    return chosen[0], chosen[1]
