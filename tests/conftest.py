"""Small, seeded things to train."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def data():
    """64 examples of 4 features in 3 classes of 40, 16 and 8, sorted by class, in float64."""
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor([0] * 40 + [1] * 16 + [2] * 8)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64) + y[:, None]
    return TensorDataset(x, y)


@pytest.fixture
def model():
    """A small network in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
