"""`check` looks at everything without training, and leaves no trace."""

import random

import numpy as np  # noqa: F401 - so that its generator is in use
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from fitwatch.helpers.rng import rng_state

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def loader(x=X, y=Y, **options):
    return DataLoader(TensorDataset(x.clone(), y.clone()), batch_size=16, **options)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def trainer_of(kind=fw.Trainer, model=None, **options):
    model = net() if model is None else model
    return kind(model, torch.optim.AdamW(model.parameters(), 0.01), device="cpu", **options)


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def test_a_sound_fit_has_no_problems():
    """The facts name targets, the trial's metrics and the gradient."""
    report = trainer_of(metrics={"accuracy": accuracy}).check(loader(shuffle=True), loader())
    assert report.problems == []
    assert "label: count {0: " in report.facts["training"]
    assert "val/accuracy " in report.facts["trial"]
    assert "2 micro-batches and one large batch differ by" in report.facts["gradient"]
    assert str(report).endswith("nothing found")


def test_nothing_is_changed():
    """Weights, gradients, buffers, modes, generators, counters and a later fit are as without it."""
    generator = torch.Generator().manual_seed(3)
    train = loader(shuffle=True, generator=generator)
    trainer = trainer_of()
    trainer.model[0].weight.grad = mine = torch.ones(8, 5)
    trainer.model[1].eval()
    random.seed(1)
    torch.manual_seed(1)
    before = [t.clone() for t in (*trainer.model.state_dict().values(), torch.get_rng_state(), generator.get_state())]
    others = random.getstate(), rng_state()["numpy"]
    trainer.check(train, loader())
    after = [*trainer.model.state_dict().values(), torch.get_rng_state(), generator.get_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (random.getstate(), rng_state()["numpy"]) == others
    assert trainer.model[0].weight.grad is mine
    assert [m.training for m in trainer.model] == [True, False, True, True]
    assert (trainer.state.progress.step, len(trainer.state.history)) == (0, 0)
    checked, plain = trainer_of(), trainer_of()
    checked.check(loader(), loader())
    for each in (checked, plain):
        torch.manual_seed(4)
        each.fit(loader(shuffle=True), loader(), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(checked.model.parameters(), plain.model.parameters(), strict=True))
    assert checked.state.history.entries == plain.state.history.entries


class MeanOfWeighted(fw.Trainer):
    """Returns a mean, whose weight is lost."""

    def training_step(self, batch):
        return self.compute_loss(self.model(batch[0]), batch[1]).mean


def test_a_step_that_depends_on_the_batches_is_found():
    """A weighted loss returned as a mean accumulates another gradient than one large batch; a LossSum does not."""
    weighted = fw.CrossEntropy([1.0, 9.0])
    [problem] = trainer_of(MeanOfWeighted, loss=weighted).check(loader()).problems
    assert "the gradient of 2 micro-batches differs from that of one large batch" in problem
    assert trainer_of(loss=weighted).check(loader()).problems == []


def test_an_unreached_and_an_untrained_parameter_are_found():
    """Both are named; one is in the optimizer and the other is not."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.forgotten = nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.used(x) + self.forgotten(x)

    model = Three()
    optimizer = torch.optim.SGD([*model.used.parameters(), *model.unused.parameters()], 0.1)
    found = "\n".join(fw.Trainer(model, optimizer, device="cpu").check(loader()).problems)
    assert "no gradient in the first step (`unused.weight`, `unused.bias`)" in found
    assert "does not hold 2 trainable parameters of the model (`forgotten.weight`" in found


def test_a_metric_that_fails_fails_here():
    """Its error names it, and says that training has not begun."""
    with pytest.raises(ZeroDivisionError) as info:
        trainer_of(metrics={"broken": lambda outputs, targets: 1 / 0}).check(loader(), loader())
    assert "raised by the metric 'broken'" in info.value.__notes__


def test_a_label_out_of_range_is_found_without_a_step():
    """All exposed targets are looked at, also beyond the first batches."""
    y = Y.clone()
    y[63] = 2
    with pytest.raises(IndexError, match="label 2 at index 63 of the targets of train_loader"):
        trainer_of().check(loader(y=y))


def test_a_folder_that_cannot_be_written_to_is_found(tmp_path):
    """The error names callback and folder; a folder that can be written to is not created."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Checkpoint can't write to"):
        trainer_of(callbacks=fw.Checkpoint(tmp_path / "file" / "below")).check(loader())
    report = trainer_of(callbacks=fw.Checkpoint(tmp_path / "new")).check(loader())
    assert report.facts["Checkpoint"] == f"can write to {tmp_path / 'new'}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_stream_is_not_read():
    """A loader that may not give the same batches again is left alone, and the report says so."""

    def stream():
        yield X, Y

    report = trainer_of().check(stream())
    assert report.facts["gradient"] == "not compared: reading batches of this loader could leave a trace"


def test_a_watch_can_be_checked_before_it_is_entered():
    """It uses the default steps, and training afterwards is that of a watch that was not checked."""
    ends = []
    for checks in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = fw.Watch(model, optimizer, train_loader=loader(), val_loader=loader())
        torch.manual_seed(2)
        if checks:
            assert "val/loss" in watch.check().facts["trial"]
        with watch:
            for _ in watch.epochs(1):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                watch.validate()
            with pytest.raises(RuntimeError, match="before it starts"):
                watch.check()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_gradient_that_is_not_finite_is_a_problem():
    """The batch is named that holds the values; the fit would end there."""
    spoilt = X.clone()
    spoilt[20, 1] = torch.inf
    report = trainer_of(nonfinite="skip").check(loader(spoilt))
    (problem,) = report.problems
    assert problem.startswith("the gradient of the first 2 batches is not finite")
    assert problem.endswith("batch index 1 holds values that are not finite. Look at the data")
    report = trainer_of(Undefined).check(loader())
    assert report.problems[0].endswith("look at the weights and the loss")


class Undefined(fw.Trainer):
    def training_step(self, batch):
        return super().training_step(batch) * torch.nan


def test_a_training_step_without_a_loss_is_a_problem():
    """It returns None for each batch."""

    class Nothing(fw.Trainer):
        def training_step(self, batch):
            return None

    report = trainer_of(Nothing).check(loader(), loader())
    assert report.problems == ["training_step returned None for the first 2 batches: nothing is trained"]


def test_a_frozen_model_is_refused_as_in_a_fit():
    """The error says what to write, not what torch's engine lacks."""
    model = net().requires_grad_(False)
    with pytest.raises(RuntimeError, match="all parameters of the model are frozen"):
        trainer_of(model=model).check(loader(), loader())


def test_lazy_parameters_stay_as_they_are():
    """A model whose first batch would shape it is neither run nor refused."""
    model = nn.Sequential(nn.LazyLinear(2))
    report = trainer_of(model=model).check(loader(), loader())
    assert report.facts["gradient"].startswith("not compared: the first batch would give the lazy parameters")
    assert isinstance(model[0].weight, nn.UninitializedParameter)
