"""The TensorBoard page: sub-runs and tags, the charts of Custom Scalars, and links."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from urllib.parse import quote

from fitwatch.measuring.per_class import PerClass
from fitwatch.measuring.validation import CALIBRATION
from fitwatch.state import State

# Title -> kind and tags. The tags of "lines" are regular expressions, anchored at their start only; those of "margin"
# are plain: value, lower, upper.
Charts = dict[str, tuple[str, list[str]]]

_CHARTS: dict[str, Charts] = {
    "1 Overfitting": {
        "train and validation loss": ("lines", ["loss$", "refined_loss$"]),
        "generalization gap (shaded)": ("margin", ["overfit/val_loss", "overfit/train_loss", "overfit/val_loss"]),
        "rise of the validation loss, and its threshold": ("lines", ["overfit/rise$", "overfit/threshold$"]),
    },
    "2 Gradients": {
        "total norm: mean and max of the log window": ("lines", ["optim/grad_norm(_max|_clipped)?$"]),
        "share of clipped steps": ("lines", ["optim/clipped_share$"]),
        "norm per layer": ("lines", ["params/grad_norm/.*$"]),
        "update relative to the weights, per layer": ("lines", ["params/update_ratio/.*$"]),
        "share of exact zeros, per layer": ("lines", ["params/zero_share/.*$"]),
    },
    "3 Optimizer": {
        "learning rate": ("lines", [r"optim/lr(/\d+)?$"]),
        "loss of the log window": ("lines", ["optim/loss$"]),
        "examples per second": ("lines", ["speed/examples_per_second$"]),
    },
}


def charts(tags: set[str]) -> dict[str, Charts]:
    """Return the charts of Custom Scalars that match one of ``tags``, by category."""
    page = {
        category: {
            title: (kind, wanted)  # all of them: TensorBoard draws a chart twice whose tags differ between runs
            for title, (kind, wanted) in group.items()
            if any(re.match(pattern, tag) for pattern in wanted for tag in tags)
        }
        for category, group in _CHARTS.items()
    }
    return {category: group for category, group in page.items() if group}


@lru_cache(maxsize=4096)  # the same names come in every log window
def run_and_tag(name: str) -> tuple[str, str]:
    """Return the sub-run and the tag of the logged name ``name``."""
    run, _, tag = name.partition("/")
    if run not in ("train", "val"):
        run, tag = "train", name
    return run, tag


@lru_cache(maxsize=4096)
def curve(tag: str) -> str:
    """Return the tag of a curve; TensorBoard groups charts by the part before the first slash."""
    if tag in ("loss_se", "refined_loss_se"):  # belong with the threshold, not with the loss
        return f"overfit/{tag}"
    return tag if "/" in tag or tag.startswith("loss") or tag == "refined_loss" else f"metrics/{tag}"


def shows_refined(evaluation: Mapping[str, float]) -> bool:
    """Return whether the log-loss after calibration differs from that of the outputs by two standard errors."""
    refined, error = (evaluation.get(f"val/{name}", math.nan) for name in ("refined_loss", "refined_loss_se"))
    return abs(refined - evaluation.get("val/log_loss", math.nan)) > 2 * error


def metrics(state: State) -> list[str]:
    """Return the tags of the metrics: the monitored one, the user's in their order, then the callbacks'."""
    given = [f"val/{name}" for name, metric in state.validation.metrics.items() if not isinstance(metric, PerClass)]
    others = state.history.names - {f"val/{name}" for name in CALIBRATION}
    names = dict.fromkeys([state.history.monitor, *given, *sorted(others)])
    tags = dict.fromkeys(curve(run_and_tag(name)[1]) for name in names)
    return [tag for tag in tags if tag.startswith("metrics/")]


def link(port: int, names: Sequence[str], metrics: Sequence[str]) -> str:
    """Return the address of one run, of a comparison of several by name, or without a name of all in the folder.

    The page of a run pins its loss, first metric, gap and gradient norm. The comparison shows validation curves and
    best epochs, one color per run. It pins the share of the baseline first, because losses with different weights
    have different scales; the page omits this pin if no run has a baseline.
    """
    runs = "|".join(re.sub(r"[.^$*+?{}\[\]|()]", r"\\\g<0>", name) for name in names)
    if len(names) != 1:
        which = f"^({runs})/(val|best)$" if names else "/(val|best)$"
        tags = ["loss_vs_baseline", "loss", *metrics[:2], "overfit/gap"]
        query = f"runFilter={quote(which)}&runColorGroup={quote('regex:^([^/]+)/')}"
    else:
        tags = ["loss", *metrics[:1], "overfit/gap", "optim/grad_norm_max"]
        query = "runFilter=" + quote(f"^{runs}/")
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in tags], separators=(",", ":"))
    # smoothing=0: the default of 0.6 shifts the apparent minimum by epochs
    return f"http://localhost:{port}/?smoothing=0&{query}&pinnedCards={quote(cards)}#timeseries"
