"""Learning rates and speed on the page."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch.tensorboard import clock
from tests._events import points, read


def fit(folder, groups=1, *, trainer=fw.Trainer, batches=(4, 4, 4, 4, 2), epochs=2, **options):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(groups)))
    optimizer = torch.optim.SGD([{"params": m.parameters(), "lr": 0.1 * (i + 1)} for i, m in enumerate(model)])
    loader = [(torch.randn(n, 3), torch.arange(n) % 3) for n in batches]
    page = fw.TensorBoard(folder, show_link=False)
    trainer = trainer(model, optimizer, callbacks=[page], log_every=2, device="cpu", **options)
    trainer.fit(loader, loader, epochs=epochs)
    return trainer


def test_each_group_of_parameters_has_its_learning_rate(tmp_path):
    """Two parameter groups give the curves `optim/lr/0` and `optim/lr/1` in one chart; one group gives `optim/lr` alone."""
    fit(tmp_path / "one")
    tags = [tag for tag in read(tmp_path / "one/run/train").Tags()["scalars"] if tag.startswith("optim/lr")]
    assert tags == ["optim/lr"]
    fit(tmp_path / "two", groups=2)
    events = read(tmp_path / "two/run/train")
    assert [tag for tag in events.Tags()["scalars"] if tag.startswith("optim/lr")] == ["optim/lr/0", "optim/lr/1"]
    for i in range(2):
        curve = points(tmp_path / "two/run/train", f"optim/lr/{i}")
        assert [step for step, _ in curve] == [2, 4, 5, 7, 9, 10]
        assert [value for _, value in curve] == [pytest.approx(0.1 * (i + 1))] * 6
    layout = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    assert b"learning rate" in layout


class Slow(fw.Trainer):
    """A trainer whose fake clock advances 1 s per training batch and 100 s per validation batch."""

    now = 0.0

    def training_step(self, batch):
        Slow.now += 1.0
        return super().training_step(batch)

    def validation_step(self, batch):
        Slow.now += 100.0
        return super().validation_step(batch)


def test_examples_per_second_and_epoch_seconds_leave_validation_out(tmp_path, monkeypatch):
    """Rate and epoch seconds count the training batches only, at one second each."""
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: Slow.now))
    trainer = fit(tmp_path, trainer=Slow)
    assert points(tmp_path / "run/train", "speed/examples_per_second") == [
        (2, 4.0), (4, 4.0), (5, 2.0), (7, 4.0), (9, 4.0), (10, 2.0),
    ]  # fmt: skip
    assert points(tmp_path / "run/train", "speed/epoch_seconds") == [(5, 5.0), (10, 5.0)]
    assert trainer.state.train_loss.examples == 36


def test_validation_within_an_epoch_is_left_out_too(tmp_path, monkeypatch):
    """A validation every third step does not change rates and epoch seconds."""
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: Slow.now))
    model = nn.Linear(3, 3)
    loader = [(torch.randn(4, 3), torch.arange(4) % 3)] * 5
    page = fw.TensorBoard(tmp_path, show_link=False)
    trainer = Slow(model, torch.optim.SGD(model.parameters()), callbacks=[page], log_every=2, device="cpu")
    trainer.fit(loader, loader, epochs=2, validate_every=3)
    assert {value for _, value in points(tmp_path / "run/train", "speed/examples_per_second")} == {4.0}
    assert [value for _, value in points(tmp_path / "run/train", "speed/epoch_seconds")] == [5.0, 5.0]


def test_batches_of_unknown_size_lack_the_examples_per_second_alone(tmp_path):
    """Batches without a tensor have no rate of examples, but their epochs have seconds."""

    class Mine(fw.Trainer):
        def training_step(self, batch):
            return self.compute_loss(self.model(torch.tensor([batch["x"]])), torch.tensor([0]))

    model = nn.Linear(3, 3)
    page = fw.TensorBoard(tmp_path, show_link=False)
    trainer = Mine(model, torch.optim.SGD(model.parameters()), callbacks=[page], device="cpu")
    trainer.fit([{"x": [1.0, 2.0, 3.0]}] * 4, epochs=1)
    tags = read(tmp_path / "run/train").Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith("speed")] == ["speed/epoch_seconds"]
