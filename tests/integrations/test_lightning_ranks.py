"""Two processes of Lightning give the figures of one."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from tests.integrations._contract import Problem, compare

pl = pytest.importorskip("lightning.pytorch", reason="lightning is in the extra of this name")
from fitwatch.integrations.lightning import FitwatchCallback  # noqa: E402
from tests.integrations.test_lightning import Module, trainer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
EPOCHS = 6


def train(folder, devices, batch):
    """Train in Lightning; the figures of rank 0 go into a file, since its processes return nothing."""
    torch.set_num_threads(1)
    problem = Problem(train=256, val=256, dtype=torch.float64)
    guest, module = FitwatchCallback(problem.callbacks), Sharing(problem)
    module.batch = batch
    options = {"devices": devices, "strategy": "ddp_spawn" if devices > 1 else "auto", "use_distributed_sampler": False}
    trainer_of(problem, [guest, Keep(guest, problem, folder)], EPOCHS, folder, **options).fit(module)


class Sharing(Module):
    """Shares out the examples without shuffling: both ranks together see those of one batch of one process."""

    def loader(self, data, batch):
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch, sampler=sampler)

    def train_dataloader(self):
        return self.loader(self.problem.train_set, self.batch)

    def val_dataloader(self):
        return self.loader(self.problem.val_set, 64)


class Keep(pl.Callback):
    """Writes what rank 0 has found."""

    def __init__(self, guest, problem, folder):
        self.guest, self.problem, self.folder = guest, problem, folder

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            found = (
                self.guest.watch.result.history,
                self.problem.recorder.numbers,
                dict(self.problem.model.state_dict()),
            )
            torch.save(found, self.folder / f"{trainer.world_size}.pt")


def test_two_processes_give_the_figures_of_one(tmp_path):
    """Norms to 1e-6, and the validation loss to 1e-12 in float64, as with one process and the batches of both."""
    train(tmp_path, 1, 32)
    train(tmp_path, 2, 16)
    (one, numbers, weights), (two, others, same) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert [entry["val/loss"] for entry in two] == pytest.approx([entry["val/loss"] for entry in one], rel=1e-12)
    for mine, other in zip(one, two, strict=True):
        compare(mine, other, 1e-9)
    norms = {name: value for name, value in numbers.items() if "grad_norm" in name[0]}
    assert norms
    compare(norms, {name: others[name] for name in norms}, 1e-6)
    assert all(torch.allclose(weights[name], same[name], rtol=1e-9, atol=1e-12) for name in weights)
