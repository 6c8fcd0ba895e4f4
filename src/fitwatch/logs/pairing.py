"""Finds the training and the validation loss of each run among the logged curves, by their names."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from attrs import evolve, field, frozen

from fitwatch.logs.curves import Curve, LogError, Logged, total

_TRAIN, _VAL, _TEST = "train", "val", "test"
_ROLES = {
    **dict.fromkeys(["train", "training", "tr", "trn", "learn"], _TRAIN),
    **dict.fromkeys(["val", "valid", "validate", "validation", "vl", "vld"], _VAL),
    **dict.fromkeys(["eval", "evaluate", "evaluation", "dev", "holdout", "heldout"], _VAL),
    **dict.fromkeys(["test", "tst"], _TEST),  # a common name for the validation set
}
# Words that tell how often a loss is logged or how it is averaged, not which loss it is. Per epoch is preferred.
_GRAINS = {**dict.fromkeys(["epoch", "epochs"], 0), **dict.fromkeys(["step", "batch", "iter", "iteration"], 2)}
_FILLERS = {"total", "mean", "avg", "average", "running", "metrics", "history"}
# Errors that are minimised, in order of preference, where nothing is called a loss.
_ERRORS = (
    *("nll", "logloss", "crossentropy", "xent", "ce", "bce", "mse", "rmse", "mae", "mape", "smape", "msle", "huber"),
    *(
        "l1",
        "l2",
        "perplexity",
        "ppl",
        "bpc",
        "bpb",
        "elbo",
        "brier",
        "crps",
        "error",
        "err",
        "wer",
        "cer",
        "fid",
        "kl",
    ),
)
_SCORE = re.compile(
    r"(top)?\d*(acc|accuracy|auc|auroc|auprc|f1|fbeta|map|ap|precision|recall|m?iou|jaccard|dice|r2|bleu|rouge\w*|"
    r"meteor|psnr|ssim|ndcg|mrr|fitness|kappa|mcc|score|reward|return)\d*(top\d+)?"
)
_REPEATED = re.compile(r"(fold|run|seed|trial)\d*")
_SIDES = (
    re.compile(r"(?P<stem>.+)[-_. ](?P<word>[a-z]+)", re.IGNORECASE),
    re.compile(r"(?P<word>[a-z]+)[-_. ](?P<stem>.+)", re.IGNORECASE),
)
_SESSION = re.compile(r"(?P<folder>.*?)(?P<session>(#\d+)?)", re.DOTALL)
_LONGEST = 100  # characters of a name in a list
_FEW = 3  # points, below which a curve is a summary


@frozen(kw_only=True)
class Series:
    """A logged curve with what its name says.

    Attributes:
        name: Tag, or sub-run and tag, within its run.
        curve: Its points.
        run: Its run: a folder relative to the top one.
        folder: The folder that it was read from: that of the run, or of a sub-run.
        role: ``"train"``, ``"val"``, ``"test"``, or ``""`` if unknown.
        key: Remaining words of the tag, in lower case.
        grain: 0 for a value per epoch, 2 per step, 1 if unknown.
    """

    name: str
    curve: Curve = field(repr=False)
    run: str
    folder: str
    role: str = ""
    key: tuple[str, ...] = ()
    grain: int = 1

    @property
    def is_loss(self) -> bool:
        """Whether it is called a loss."""
        return any(word.endswith(("loss", "losses")) for word in self.key)

    @property
    def error(self) -> str:
        """The name of the error that it is, such as mse; "" if none."""
        words = {*self.key, "crossentropy"} if {"cross", "entropy"} <= {*self.key} else {*self.key}
        return next((error for error in _ERRORS if error in words), "")

    @property
    def is_score(self) -> bool:
        """Whether higher is better, by its name."""
        return not self.is_loss and not self.error and any(map(_SCORE.fullmatch, self.key))


@frozen(kw_only=True)
class Pair:
    """The two losses of a run, or why they were not found.

    Attributes:
        run: Its name.
        part: Which of several losses or validation sets this is; "" if there is one.
        train: Training loss; None if not found.
        val: Validation loss; None if ``train`` is.
        problem: Why they were not found; "" if they were.
        notes: What was assumed.
    """

    run: str
    part: str = ""
    train: Series | None = None
    val: Series | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


def guess(logged: Logged, *, each: bool = False) -> list[Pair]:
    """Guess the training and the validation loss of each run.

    A run is a folder with its sub-runs: ``train``, ``val``, ``validation``, ``eval``, and those written by
    ``SummaryWriter.add_scalars``. Adjacent ``exp1_train`` and ``exp1_val`` are sub-runs of a run ``exp1``.

    Args:
        logged: Folder -> tag -> curve.
        each: Judge the parts of a loss one by one, and not their sum.
    """
    return [pair for run, series in _runs(logged).items() for pair in _pairs(run, series, each=each)]


def find(logged: Logged, train: str | None, val: str | None) -> list[Pair]:
    """Find two series by name in each run that has both; a name may start with a sub-run, as in ``train/loss``.

    If only one is given, the other is the series with the same name for the other role, or else the loss.

    Raises:
        LogError: If no run has them, or the names are equal.
    """
    if train == val:
        raise LogError(
            f"the training and the validation loss can't be the same series, {train!r}; "
            "if they are in two sub-runs, name those too: train/loss and val/loss"
        )
    pairs = _named(logged, train, val) if train and val else _half_named(logged, train, val)
    if not pairs:
        full = [_join(folder, tag) for folder, tags in logged.items() for tag in tags]
        lacking = [tag for tag in (train, val) if tag and not any(_ends(path, tag) for path in full)]
        if lacking:
            what = f"no series is named {lacking[0]!r}"
        else:
            what = (
                f"no run has both {train!r} and {val!r}"
                if train and val
                else f"no run has a pair with {train or val!r}"
            )
        raise LogError(f"{what}; there are {listed(full)}")
    return pairs


def listed(names: Iterable[str], most: int = 20) -> str:
    """Join names, losses first, up to ``most`` of them."""
    ordered = sorted(names, key=lambda name: ("loss" not in name.lower(), natural(name)))
    more = f", and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in ordered[:most]) + more


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts ``run2`` before ``run10``."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 100 else (1, 0, part.lower())
        for part in re.split(r"(\d+)", name)
    ]


def _runs(logged: Logged) -> dict[str, list[Series]]:
    """Return the series of each run, in natural order."""
    runs: dict[str, list[Series]] = {}
    sides = _sides(logged)
    for folder, tags in logged.items():
        own = _is_run(tags)
        for tag, curve in tags.items():
            series = _series(folder, tag, curve, sides, own=own)
            runs.setdefault(series.run, []).append(series)
    return dict(sorted(runs.items(), key=lambda item: natural(item[0])))


def _named(logged: Logged, train: str, val: str) -> list[Pair]:
    full = {_join(folder, tag): (folder, curve) for folder, tags in logged.items() for tag, curve in tags.items()}
    pairs = []
    for run in sorted({".", *logged, *(str(p) for f in logged for p in PurePosixPath(f).parents)}, key=natural):
        found = [(_join(run, name), name) for name in (train, val)]
        if all(path in full for path, _ in found):
            one, other = (_series_of(run, name, *full[path]) for path, name in found)
            pairs.append(Pair(run=run, train=one, val=other))
    return pairs


def _series_of(run: str, name: str, folder: str, curve: Curve) -> Series:
    words = _words(name)
    return Series(
        name=name, curve=curve, run=run, folder=folder, key=tuple(word for word in words if word not in _ROLES)
    )


def _half_named(logged: Logged, train: str | None, val: str | None) -> list[Pair]:
    """Find the partner of a named series in each run that has one of this name."""
    wanted, roles = (val or "", (_TRAIN, "")) if val else (train or "", (_VAL, _TEST))
    own = (_VAL, _TEST) if val else (_TRAIN, "")
    pairs = []
    for run, series in _runs(logged).items():
        whole = [one for one in series if wanted in (one.name, _join(run, one.name))]
        # A part of a name, or the words of a metric, name both its curves.
        alike = [one for one in series if _ends(one.name, wanted) or one.key == tuple(_words(wanted))]
        named = whole or [one for one in alike if one.role in own]
        for one in named[:1]:
            others = [other for other in series if other is not one and other.role in roles]
            same = [other for other in others if other.key == one.key]
            partner = _best(same or [other for other in others if other.is_loss and _is_plain(other.key)], roles)
            partner = partner or _loss_of(run, series, train=bool(val))
            if partner is None:
                pairs.append(Pair(run=run, problem=f"{one.name} has no partner: name both with --train and --val"))
            else:
                both = (partner, one) if val else (one, partner)
                pairs.append(Pair(run=run, train=both[0], val=both[1]))
    return pairs


def _loss_of(run: str, series: list[Series], *, train: bool) -> Series | None:
    """Return the training or the validation loss of a run, as guessed; None if it has several, or none."""
    pairs = _pairs(run, series, each=False)
    return (pairs[0].train if train else pairs[0].val) if len(pairs) == 1 else None


def _ends(path: str, name: str) -> bool:
    return f"/{path}".endswith(f"/{name}")


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _parent(folder: str) -> tuple[str, str]:
    """Return the parent of a folder, and its name; the number of a run within the folder goes to the parent."""
    match = _SESSION.fullmatch(folder)
    session = match["session"] if match else ""
    parent, _, name = folder.removesuffix(session).rpartition("/")
    return (parent or ".") + session, name


def _words(text: str) -> list[str]:
    """Split a name into words in lower case: ``"Loss/trainEpoch_1"`` into loss, train, epoch and 1."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())


def _role(words: Iterable[str]) -> str:
    """Return the role that the last such word names: ``train/val_loss`` is a validation loss."""
    return ([""] + [_ROLES[word] for word in words if word in _ROLES])[-1]


def _is_run(tags: Mapping[str, Curve]) -> bool:
    """Whether a folder holds the losses of both roles by their tags, so that it is a run whatever its name is."""
    losses = [words for words in map(_words, tags) if any(word.endswith(("loss", "losses")) for word in words)]
    roles = {_role(words) for words in losses}
    return _TRAIN in roles and bool(roles & {_VAL, _TEST}) and "" not in roles


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


def names_a_loss(name: str) -> bool:
    """Whether a name is that of a loss or an error, or of a score with its role."""
    words = _words(name)
    loss = any(word.endswith(("loss", "losses")) or word in _ERRORS or word == "entropy" for word in words)
    return loss or (bool(_role(words)) and any(map(_SCORE.fullmatch, words)))


def is_role(name: str) -> bool:
    """Whether a folder of this name is a sub-run, as ``train`` is."""
    return name.lower() in _ROLES


def _series(folder: str, tag: str, curve: Curve, sides: Mapping[str, tuple[str, str]], *, own: bool) -> Series:
    parent, name = _parent(folder)
    run, role = folder, ""
    added = tag.replace("/", "_") + "_"  # add_scalars names its sub-runs <main tag>_<name of the line>
    line = _role(_words(name.removeprefix(added))) if name.startswith(added) else ""
    if is_role(name) and not own:
        run, role = parent, _ROLES[name.lower()]
    elif line:
        run, role = parent, line
    elif folder in sides:
        run, role = sides[folder]
    words = _words(tag)
    return Series(
        run=run,
        folder=folder,
        name=tag if run == folder else f"{name}/{tag}",
        curve=curve,
        role=_role(words) or role,
        key=tuple(word for word in words if word not in _ROLES and word not in _GRAINS and word not in _FILLERS),
        grain=min((_GRAINS[word] for word in words if word in _GRAINS), default=1),
    )


def _is_plain(key: tuple[str, ...]) -> bool:
    return set(key) <= {"loss", "losses"}


def _pairs(run: str, series: list[Series], *, each: bool) -> list[Pair]:
    """Choose the losses of a run."""
    by_key: dict[tuple[str, ...], list[Series]] = {}
    for one in series:
        if one.is_loss or one.error:
            by_key.setdefault(one.key, []).append(one)
    pairs = {key: pair for key, same in by_key.items() if (pair := _both(same))}
    losses = {key: pair for key, pair in pairs.items() if pair[0].is_loss}
    plain = {key: pair for key, pair in losses.items() if _is_plain(key)}
    if not losses and (sets := _sets(run, by_key)):
        return sets
    chosen = plain or losses
    if len(chosen) == 1:
        return [Pair(run=run, train=train, val=val) for train, val in chosen.values()]
    if chosen:
        return _parts(run, list(chosen.values()), each=each)
    if pairs:
        return _errors(run, list(pairs.values()), each=each)
    return [_unlike(run, series)]


def _sets(run: str, by_key: Mapping[tuple[str, ...], list[Series]]) -> list[Pair]:
    """Return a pair for each of several validation sets: their losses have more words than the training loss."""
    train = _best([one for key, same in by_key.items() if _is_plain(key) for one in same], (_TRAIN, ""))
    if train is None:
        return []
    lonely = {key: same for key, same in by_key.items() if all(one.role in (_VAL, _TEST) for one in same)}
    sets = [_best(same, (_VAL, _TEST)) for key, same in lonely.items() if same[0].is_loss]
    found = [one for one in sets if one is not None and len(one.curve) >= _FEW] or [one for one in sets if one]
    note = "the names of the two losses differ, so they may not be the same loss"
    return [
        Pair(run=run, part=val.name if len(found) > 1 else "", train=train, val=val, notes=(note,) * (len(found) == 1))
        for val in found
    ]


def _parts(run: str, pairs: list[tuple[Series, Series]], *, each: bool) -> list[Pair]:
    """Return the sum of the parts of a loss, or a pair for each."""
    repeated = all(any(map(_REPEATED.fullmatch, val.key)) for _, val in pairs)  # folds add up to nothing
    if each or repeated:
        return [Pair(run=run, part=val.name, train=train, val=val) for train, val in pairs]
    sums = []
    for side in (0, 1):
        parts = [pair[side] for pair in pairs]
        curve = total([part.curve.tidy() for part in parts])
        sums.append(evolve(parts[0], name=" + ".join(part.name for part in parts), curve=curve))
    if not all(len(one.curve) for one in sums):
        both = " or ".join(f"{train.name} with {val.name}" for train, val in pairs)
        return [Pair(run=run, problem=f"several losses without a common step, {both}: choose with --train and --val")]
    note = f"no total is logged: this is the sum of its {len(pairs)} parts (--each judges them one by one)"
    return [Pair(run=run, train=sums[0], val=sums[1], notes=(note,))]


def _errors(run: str, pairs: list[tuple[Series, Series]], *, each: bool) -> list[Pair]:
    """Return the error that comes first by convention, or a pair for each."""
    ordered = sorted(pairs, key=lambda pair: _ERRORS.index(pair[1].error))
    if each:
        return [Pair(run=run, part=val.name, train=train, val=val) for train, val in ordered]
    others = ", ".join(val.name for _, val in ordered[1:])
    notes = (f"judged by {ordered[0][1].name}; there is {others} too (--val, or --each for all)",) if others else ()
    return [Pair(run=run, train=ordered[0][0], val=ordered[0][1], notes=notes)]


def _unlike(run: str, series: list[Series]) -> Pair:
    """Pair the only training loss with the only validation loss, whatever their names; or say what is missing."""
    names = listed([one.name for one in series])
    minimised = [one for one in series if one.is_loss or one.error]
    train = [one for one in minimised if one.role in (_TRAIN, "")]
    val = [one for one in minimised if one.role in (_VAL, _TEST)]
    if len(train) == len(val) == 1:
        note = "the names of the two losses differ, so they may not be the same loss"
        return Pair(run=run, train=train[0], val=val[0], notes=(note,))
    scores = [one for one in series if one.is_score and one.role in (_VAL, _TEST)]
    if scores and not val:
        name = scores[0].name
        return Pair(
            run=run,
            problem=f"no validation loss, but {name}, for which higher is better: --metric {name} --higher-is-better",
        )
    if len(series) == 1:
        return Pair(run=run, problem=f"only one series, {names}: a training and a validation loss are needed")
    if train and not val:
        return Pair(run=run, problem=f"no validation loss among {names}")
    if val and not train:
        return Pair(run=run, problem=f"no training loss among {names}")
    return Pair(
        run=run,
        problem=f"no training and validation loss found by name among {names}: name them with --train and --val",
    )


def _both(series: list[Series]) -> tuple[Series, Series] | None:
    """Return the most informative training and validation curve of one loss; None if either is missing."""
    train, val = _best(series, (_TRAIN, "")), _best(series, (_VAL, _TEST))
    return (train, val) if train and val else None


def _best(series: list[Series], roles: tuple[str, ...]) -> Series | None:
    """Return the most informative curve of these roles, of which the first is preferred; None if there is none."""
    known = [one for one in series if one.role in roles]
    long = [one for one in known if len(one.curve) >= _FEW] or known  # not the value that sums up a training
    return min(long, key=lambda one: (roles.index(one.role), one.grain, -len(one.curve), one.name), default=None)
