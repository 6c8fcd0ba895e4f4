"""fitwatch in Lightning, against our own Trainer."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import fitwatch as fw
from tests.integrations._contract import Problem, same_as_trainer

pl = pytest.importorskip("lightning.pytorch", reason="lightning is in the extra of this name")
from fitwatch.integrations.lightning import FitwatchCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """A plain module."""

    def __init__(self, problem):
        super().__init__()
        self.problem, self.model, self.loss = problem, problem.model, torch.nn.CrossEntropyLoss()
        self.rates = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))

    def configure_optimizers(self):
        return self.problem.optimizer


class Manual(Module):
    """Steps by itself."""

    def __init__(self, problem):
        super().__init__(problem)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self(x), y))
        optimizer.step()


def trainer_of(problem, callbacks, epochs, folder, **options):
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": problem.accumulate,
        "gradient_clip_val": problem.clip_norm,
        "log_every_n_steps": 5,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=callbacks, **{**settings, **options})


def in_lightning(folder, module=Module, **options):
    """A function that trains in Lightning."""

    def run(problem, epochs):
        guest = FitwatchCallback(problem.callbacks)
        trainer = trainer_of(problem, [guest], epochs, folder, **options)
        made = module(problem)
        trainer.fit(made, problem.train_loader, problem.val_loader)
        assert type(made.loss) is torch.nn.CrossEntropyLoss
        assert trainer.gradient_clip_val == (options.get("gradient_clip_val", problem.clip_norm))
        return guest.watch.result

    return run


@pytest.mark.parametrize("accumulate", [1, 4])
def test_lightning_meets_the_contract(tmp_path, accumulate):
    """Norms, losses, costs, verdict, stop and restored weights are those of our Trainer, also under accumulation."""
    same_as_trainer(in_lightning(tmp_path), accumulate=accumulate, tolerance=0.0 if accumulate == 1 else 1e-6)


def test_manual_optimization_meets_the_contract(tmp_path):
    """A module that steps by itself gives the same figures."""
    same_as_trainer(in_lightning(tmp_path, Manual, gradient_clip_val=None), clip_norm=None)


@pytest.mark.parametrize("when", ["train", "validation"])
def test_a_resumed_training_meets_the_contract(tmp_path, when):
    """A training that was interrupted, and resumed from Lightning's checkpoint, gives the figures of a whole one."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                trainer.should_stop = True

    def halves(problem, epochs):
        saver = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=when == "train")
        guest = FitwatchCallback(problem.callbacks)
        parts = Module(problem), problem.train_loader, problem.val_loader
        trainer_of(problem, [guest, saver, Stop()], epochs, tmp_path, enable_checkpointing=True).fit(*parts)
        fresh = Problem()
        again = FitwatchCallback(fresh.callbacks)
        saved = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
        trainer = trainer_of(problem, [again], epochs, tmp_path)
        trainer.fit(Module(fresh), fresh.train_loader, fresh.val_loader, ckpt_path=saved)
        problem.model.load_state_dict(fresh.model.state_dict())
        problem.recorder.numbers |= fresh.recorder.numbers
        return again.watch.result

    same_as_trainer(halves)


def test_a_training_resumes_within_an_epoch(tmp_path):
    """From a checkpoint within an epoch, the steps and evaluations go on."""
    problem, again = Problem(), Problem()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=13, save_top_k=-1)
    trainer = trainer_of(problem, [FitwatchCallback(problem.callbacks), saver], 2, tmp_path, enable_checkpointing=True)
    trainer.fit(Module(problem), problem.train_loader, problem.val_loader)
    (saved,) = tmp_path.glob("*step=13*.ckpt")
    guest = FitwatchCallback(again.callbacks)
    trainer = trainer_of(again, [guest], 3, tmp_path)
    trainer.fit(Module(again), again.train_loader, again.val_loader, ckpt_path=saved)
    assert [entry["epoch"] for entry in guest.watch.result.history] == [0, 1, 2]
    assert guest.watch.result.history[-1]["step"] == trainer.global_step


def test_the_page_lies_in_the_log_folder(tmp_path):
    """A TensorBoard with the default folder writes beside Lightning's own events; another one stays where it is."""
    problem = Problem()
    board, own = fw.TensorBoard(show_link=False), fw.TensorBoard(tmp_path / "own", show_link=False)
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = trainer_of(problem, [FitwatchCallback([board, own])], 2, tmp_path, logger=logger)
    trainer.fit(Module(problem), problem.train_loader, problem.val_loader)
    assert board.run_dir.parent == tmp_path / "lightning_logs" / "version_0"
    assert list(board.run_dir.glob("val/events.*"))
    assert own.run_dir == tmp_path / "own" / "run"


def test_an_error_gives_everything_back(tmp_path):
    """After an exception the callbacks have closed, and the loss and the clipping are the module's and the trainer's."""
    problem, seen = Problem(), []

    class Ends(fw.Callback):
        def on_fit_end(self, state):
            seen.append(state.error)

    class Broken(Module):
        def validation_step(self, batch, index):
            if self.trainer.current_epoch == 1:
                raise ZeroDivisionError("oops")
            super().validation_step(batch, index)

    trainer, module = trainer_of(problem, [FitwatchCallback([Ends()])], 3, tmp_path), Broken(problem)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, problem.train_loader, problem.val_loader)
    assert type(seen[0]) is ZeroDivisionError
    assert (type(module.loss), trainer.gradient_clip_val) == (torch.nn.CrossEntropyLoss, 1.0)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_only_the_first_of_several_loaders_is_measured(tmp_path):
    """With several validation loaders, val/loss is that of the first; the others get the module's own loss."""
    problem, same = Problem(), Problem()
    first, second = FitwatchCallback(), FitwatchCallback()
    trainer_of(problem, [first], 2, tmp_path).fit(
        Module(problem), problem.train_loader, [problem.val_loader, DataLoader(problem.train_set, 50)]
    )
    trainer_of(same, [second], 2, tmp_path).fit(Module(same), same.train_loader, same.val_loader)
    assert first.watch.result.history[0]["val/loss"] == second.watch.result.history[0]["val/loss"]


def test_what_does_not_work_is_refused(tmp_path):
    """Two optimizers, fp16, and a module without the attribute are refused with a sentence."""

    class Two(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    problem = Problem()
    with pytest.raises(ValueError, match="one optimizer, and this module has 2"):
        in_lightning(tmp_path, Two, gradient_clip_val=None)(problem, 1)
    with pytest.raises(TypeError, match=r"Module.criterion is not a loss: set self.criterion"):
        trainer_of(problem, [FitwatchCallback(loss="criterion")], 1, tmp_path).fit(
            Module(problem), problem.train_loader, problem.val_loader
        )


@pytest.mark.parametrize("first", ["pytorch_lightning", "fitwatch.integrations.lightning"])
def test_the_other_import_name_works(tmp_path, first):
    """A trainer and a module of pytorch_lightning take the callback, whichever is imported first."""
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    code = f"""
import {first}
import pytorch_lightning, torch
from fitwatch.integrations.lightning import FitwatchCallback

class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
    def training_step(self, batch, index):
        return self.loss(self.model(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.tensor([0, 1] * 4))
guest = FitwatchCallback(skip_checks=["class_weights"])
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = pytorch_lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[guest], **quiet)
trainer.fit(Module(), torch.utils.data.DataLoader(data, 4))
print(len(guest.watch.result.history))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip().endswith("2"), run.stderr
