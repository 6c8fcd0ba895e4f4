"""Finds the training and the validation loss of each run among the logged series, by their names."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from attrs import field, frozen


class Points(list[tuple[int, float]]):
    """The points of a curve, (step, value), in order of steps.

    Attributes:
        replaced: Number of older points that later ones with the same or a smaller step have replaced.
        writers: Number of event files that were written at the same time, if more than one; else 0.
    """

    replaced = 0
    writers = 0


Logged = Mapping[str, Mapping[str, Points]]  # folder, "." for the top one -> tag -> points

_TRAIN, _VAL, _TEST = "train", "val", "test"
_ROLES = {
    **dict.fromkeys(["train", "training"], _TRAIN),
    **dict.fromkeys(["val", "valid", "validate", "validation", "eval", "evaluate", "evaluation", "dev"], _VAL),
    "test": _TEST,  # a common name for the validation set
}
# Words that tell how often a loss is logged or how it is averaged, not which loss it is. Per epoch is preferred.
_GRAINS = {**dict.fromkeys(["epoch", "epochs"], 0), **dict.fromkeys(["step", "batch", "iter", "iteration"], 2)}
_FILLERS = {"total", "mean", "avg", "average", "running"}
_SIDES = (
    re.compile(r"(?P<stem>.+)[-_. ](?P<word>[a-z]+)", re.IGNORECASE),
    re.compile(r"(?P<word>[a-z]+)[-_. ](?P<stem>.+)", re.IGNORECASE),
)


class LogError(ValueError):
    """Raised if logs can't be used; the message is a single line."""


@frozen(kw_only=True)
class Series:
    """A logged curve.

    Attributes:
        name: Tag, or sub-run and tag, within its run.
        points: (step, value).
        run: Its run: a folder relative to the top one.
        role: ``"train"``, ``"val"``, ``"test"``, or ``""`` if unknown.
        key: Remaining words of the tag, in lower case.
        grain: 0 for a value per epoch, 2 per step, 1 if unknown.
    """

    name: str
    points: Points = field(repr=False)
    run: str
    role: str = ""
    key: tuple[str, ...] = ()
    grain: int = 1


@frozen
class Pair:
    """The two losses of a run, or why they were not found.

    Attributes:
        run: Its name.
        train: Training loss; None if not found.
        val: Validation loss; None if ``train`` is.
        problem: Why they were not found; "" if they were.
    """

    run: str
    train: Series | None = None
    val: Series | None = None
    problem: str = ""


def guess(logged: Logged) -> list[Pair]:
    """Guess the training and the validation loss of each run.

    A run is a folder with its sub-runs: ``train``, ``val``, ``validation``, ``eval``, and those written by
    ``SummaryWriter.add_scalars``. Adjacent ``exp1_train`` and ``exp1_val`` are sub-runs of a run ``exp1``.
    """
    runs: dict[str, list[Series]] = {}
    sides = _sides(logged)
    for folder, tags in logged.items():
        for tag, points in tags.items():
            series = _series(folder, tag, points, sides)
            runs.setdefault(series.run, []).append(series)
    return [_pair(run, series) for run, series in sorted(runs.items())]


def find(logged: Logged, train_tag: str, val_tag: str) -> list[Pair]:
    """Find two series by name in each run that has both; a name may start with a sub-run, as in ``train/loss``.

    Raises:
        LogError: If no run has both, or the names are equal.
    """
    if train_tag == val_tag:
        raise LogError(
            f"the training and the validation loss can't be the same series, {train_tag!r}; "
            "if they are in two sub-runs, name those too: train/loss and val/loss"
        )
    full = {_join(folder, tag): points for folder, tags in logged.items() for tag, points in tags.items()}
    runs = {".", *logged, *(str(parent) for folder in logged for parent in PurePosixPath(folder).parents)}
    pairs = []
    for run in sorted(runs):
        train, val = full.get(_join(run, train_tag)), full.get(_join(run, val_tag))
        if train is not None and val is not None:
            pairs.append(
                Pair(run, Series(name=train_tag, points=train, run=run), Series(name=val_tag, points=val, run=run))
            )
    if not pairs:
        lacking = [tag for tag in (train_tag, val_tag) if not any(f"/{path}".endswith(f"/{tag}") for path in full)]
        what = f"no series is named {lacking[0]!r}" if lacking else f"no run has both {train_tag!r} and {val_tag!r}"
        raise LogError(f"{what}; there are {listed(full)}")
    return pairs


def listed(names: Iterable[str], most: int = 20) -> str:
    """Join names, losses first, up to ``most`` of them."""
    ordered = sorted(names, key=lambda name: ("loss" not in name.lower(), name))
    more = f", and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _parent(folder: str) -> tuple[str, str]:
    parent, _, name = folder.rpartition("/")
    return parent or ".", name


def _words(text: str) -> list[str]:
    """Split a name into words in lower case: ``"Loss/trainEpoch_1"`` into loss, train, epoch and 1."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())


def _role(words: Iterable[str]) -> str:
    """Return the role that the last such word names: ``train/val_loss`` is a validation loss."""
    return ([""] + [_ROLES[word] for word in words if word in _ROLES])[-1]


def _sides(logged: Logged) -> dict[str, tuple[str, str]]:
    """Return the run and role of folders whose names differ only in the role, as ``exp1_train`` and ``exp1_val``."""
    runs: dict[str, dict[str, str]] = {}  # run -> folder -> role
    for folder, tags in logged.items():
        parent, name = _parent(folder)
        roles = {_role(_words(tag)) for tag in tags}
        matches = [match for pattern in _SIDES if (match := pattern.fullmatch(name))]
        role = {_ROLES[m["word"].lower()]: m["stem"] for m in matches if m["word"].lower() in _ROLES}
        if len(role) == 1 and not (_TRAIN in roles and roles & {_VAL, _TEST}):  # otherwise it is a separate run
            ((side, stem),) = role.items()
            runs.setdefault(_join(parent, stem), {})[folder] = side
    return {
        folder: (run, role)
        for run, folders in runs.items()
        if len(set(folders.values())) > 1
        for folder, role in folders.items()
    }


def _series(folder: str, tag: str, points: Points, sides: Mapping[str, tuple[str, str]]) -> Series:
    parent, name = _parent(folder)
    run, role = folder, ""
    added = tag.replace("/", "_") + "_"  # add_scalars names its sub-runs <main tag>_<name of the line>
    line = _role(_words(name.removeprefix(added))) if name.startswith(added) else ""
    if name.lower() in _ROLES:
        run, role = parent, _ROLES[name.lower()]
    elif line:
        run, role = parent, line
    elif folder in sides:
        run, role = sides[folder]
    words = _words(tag)
    return Series(
        run=run,
        name=tag if run == folder else f"{name}/{tag}",
        points=points,
        role=_role(words) or role,
        key=tuple(word for word in words if word not in _ROLES and word not in _GRAINS and word not in _FILLERS),
        grain=min((_GRAINS[word] for word in words if word in _GRAINS), default=1),
    )


def _pair(run: str, series: list[Series]) -> Pair:
    losses: dict[tuple[str, ...], list[Series]] = {}
    for one in series:
        if any(word.endswith(("loss", "losses")) for word in one.key):
            losses.setdefault(one.key, []).append(one)
    pairs = {key: pair for key, same in losses.items() if (pair := _both(same))}
    plain = [pair for key, pair in pairs.items() if set(key) <= {"loss", "losses"}]
    if len(plain or pairs) == 1:
        train, val = (plain or list(pairs.values()))[0]
        return Pair(run, train, val)
    names = listed([one.name for one in series])
    if pairs:
        both = " or ".join(f"{train.name} with {val.name}" for train, val in pairs.values())
        return Pair(run=run, problem=f"several losses, {both}: choose with --train-tag and --val-tag")
    if len(series) == 1:
        return Pair(run=run, problem=f"only one series, {names}: a training and a validation loss are needed")
    problem = f"no training and validation loss found by name among {names}: name them with --train-tag and --val-tag"
    return Pair(run=run, problem=problem)


def _both(series: list[Series]) -> tuple[Series, Series] | None:
    """Return the most informative training and validation curve of one loss; None if either is missing."""
    chosen: list[Series] = []
    for roles in ((_TRAIN, ""), (_VAL, _TEST)):
        known = [one for one in series if one.role in roles]
        if not known:
            return None
        chosen.append(min(known, key=lambda one: (roles.index(one.role), one.grain, -len(one.points), one.name)))
    return chosen[0], chosen[1]
