"""The page: sub-runs and tags, the charts of Custom Scalars, and links that open it."""

import json
import re
from collections.abc import Sequence
from urllib.parse import quote

from fitwatch.state import State

Charts = dict[str, tuple[str, list[str]]]

# Custom Scalars: category -> title -> kind and tags, which for "lines" are regular expressions that
# are anchored at their start only, and for "margin" are plain: value, lower, upper.
_CHARTS: dict[str, Charts] = {
    "1 Overfitting": {
        "train and validation loss": ("lines", ["loss$"]),
        "generalisation gap (shaded)": ("margin", ["overfit/val_loss", "overfit/train_loss", "overfit/val_loss"]),
        "rise of the validation loss, and its threshold": ("lines", ["overfit/rise$", "overfit/threshold$"]),
    },
    "2 Gradients": {
        "total norm: mean and max of the window": ("lines", ["optim/grad_norm(_max|_clipped)?$"]),
        "share of clipped steps": ("lines", ["optim/clipped_share$"]),
        "norm per layer": ("lines", ["params/grad_norm/.*$"]),
        "update relative to the weights, per layer": ("lines", ["params/update_ratio/.*$"]),
        "share of exact zeros, per layer": ("lines", ["params/zero_share/.*$"]),
    },
    "3 Optimiser": {
        "learning rate": ("lines", [r"optim/lr(/\d+)?$"]),
        "loss of the log window": ("lines", ["optim/loss$"]),
        "examples per second": ("lines", ["speed/examples_per_second$"]),
    },
}


def charts(tags: set[str]) -> dict[str, Charts]:
    """The categories and charts that have something to show."""
    page = {
        category: {
            title: (kind, wanted)
            for title, (kind, wanted) in group.items()
            if any(re.match(pattern, tag) for pattern in wanted for tag in tags)
        }
        for category, group in _CHARTS.items()
    }
    return {category: group for category, group in page.items() if group}


def run_and_tag(name: str) -> tuple[str, str]:
    """Sub-run and tag of what was logged as ``name``."""
    run, _, tag = name.partition("/")
    if run not in ("train", "val"):
        run, tag = "train", name
    return run, tag


def curve(tag: str) -> str:
    """The tag of a curve: TensorBoard groups its charts by what stands before the first slash."""
    if tag == "loss_se":  # not beside the loss: it is evidence, as the threshold is
        return "overfit/loss_se"
    return tag if "/" in tag or tag.startswith("loss") else f"metrics/{tag}"


def metrics(state: State) -> list[str]:
    """The tags of the metrics: the monitored one, those of the user in their order, then those of callbacks."""
    given = [f"val/{name}" for name in state.validation.metrics]
    names = dict.fromkeys([state.history.monitor, *given, *sorted(state.history.names)])
    tags = dict.fromkeys(curve(run_and_tag(name)[1]) for name in names)
    return [tag for tag in tags if tag.startswith("metrics/")]


def link(port: int, name: str, metrics: Sequence[str]) -> str:
    """The page of one run: its loss, its first metric, the gap and the gradient norm, pinned."""
    only = "^" + re.sub(r"[.^$*+?{}\[\]|()]", r"\\\g<0>", name) + "/"
    return _address(port, ["loss", *metrics[:1], "overfit/gap", "optim/grad_norm_max"], f"runFilter={quote(only)}")


def compare_link(port: int, metrics: Sequence[str]) -> str:
    """The page of all runs of the folder, each in one colour: validation curves, and the dots of the best epochs.

    The share of the baseline that is left comes first: losses with other weights have other scales. It is no tag where
    no run has a baseline, and then the page leaves its pin out.
    """
    query = f"runFilter={quote('/(val|best)$')}&runColorGroup={quote('regex:^([^/]+)/')}"
    return _address(port, ["loss_left", "loss", *metrics[:2], "overfit/gap"], query)


def _address(port: int, tags: Sequence[str], query: str) -> str:
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in tags], separators=(",", ":"))
    # smoothing=0: the default of 0.6 moves the apparent minimum by epochs
    return f"http://localhost:{port}/?smoothing=0&{query}&pinnedCards={quote(cards)}#timeseries"
