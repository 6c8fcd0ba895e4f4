"""What counts as the best over several fits of one Trainer, and over several watches."""

import logging
import re
from functools import partial

import pytest
import torch
from torch import nn

import fitwatch as fw


class Scripted(fw.Trainer):
    """Its only weight counts the steps, and each validation has a scripted loss."""

    def __init__(self, losses, *callbacks):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        self.losses = iter(losses)
        super().__init__(model, torch.optim.SGD(model.parameters(), 1.0), callbacks=callbacks, device="cpu")

    def training_step(self, batch):
        return -self.model.weight.sum() + 0 * batch.sum()

    def validation_step(self, batch):
        return torch.tensor(next(self.losses), dtype=torch.float64) + 0 * batch.sum()

    @property
    def weight(self):
        return self.model.weight.item()

    def run(self, epochs, **options):
        return self.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)], epochs=epochs, **options)


def saved(folder):
    return torch.load(folder / "best.pt")["model"]["weight"].item()


def test_a_worse_second_fit_ends_with_the_best_of_the_first(tmp_path):
    """Result, weights and best.pt after a second fit are those of the best evaluation of both fits."""
    trainer = Scripted([5, 3, 4, 4, 4, 9, 9], fw.EarlyStopping(patience=3), fw.Checkpoint(tmp_path))
    first = trainer.run(10)
    assert (first.best.epoch, trainer.weight, saved(tmp_path)) == (1, 2.0, 2.0)
    assert first.stop_reason is not None
    again = trainer.run(2)
    assert (again.best.epoch, trainer.weight, saved(tmp_path)) == (1, 2.0, 2.0)
    assert again.stop_reason is None  # the patience starts over
    assert [entry["val/loss"] for entry in again.history] == [5, 3, 4, 4, 4, 9, 9]
    assert [entry["epoch"] for entry in again.history] == list(range(7))


def test_a_better_second_fit_ends_with_its_own_best(tmp_path):
    """A second fit goes on from the restored weights, and replaces the best by a better one."""
    trainer = Scripted([5, 3, 4, 2, 6], fw.EarlyStopping(), fw.Checkpoint(tmp_path))
    trainer.run(3)
    again = trainer.run(2)  # from weight 2, that of the best
    assert (again.best.epoch, trainer.weight, saved(tmp_path)) == (3, 3.0, 3.0)


def test_reset_starts_a_new_best(tmp_path):
    """With reset=True the first fit's best is forgotten by all, and its best.pt is put aside."""
    detector = fw.OverfittingDetector(probe_examples=0)
    trainer = Scripted([5, 1, 4, 9, 8], fw.EarlyStopping(), fw.Checkpoint(tmp_path), detector)
    trainer.run(3)
    again = trainer.run(2, reset=True)
    assert (again.best.epoch, trainer.weight, saved(tmp_path)) == (4, 4.0, 4.0)
    assert [entry["epoch"] for entry in again.history] == [3, 4]
    assert again.verdict.best == 1
    assert torch.load(tmp_path / "best.pt.old")["model"]["weight"].item() == 2.0
    with pytest.raises(ValueError, match="reset=True forgets.*give one of the two"):
        trainer.run(1, reset=True, resume="auto")


@pytest.mark.parametrize("rule", [fw.rules.GL(1000), fw.rules.UP(2, k=1), fw.rules.Patience(patience=2, window=2)])
def test_every_rule_keeps_its_best_and_starts_its_counters_over(rule):
    """After a stop each rule goes on in a second fit, and the best value is still that of the first."""
    for value in (3.0, 1.0, 2.0, 2.5, 2.75):
        rule.update(value, train_loss=1.0)
    rule.restart()
    assert (rule.reason, rule.sentence, rule.best) == (None, None, 1.0)
    assert rule.update(2.8, train_loss=1.0) is False
    assert rule.best == 1.0


def test_the_verdict_is_about_both_fits():
    """Indices of the verdict refer to the whole history, and weights of the first fit can be restored by the second."""
    losses = [1.0, 0.5, 0.4] + [0.4 + 0.05 * i for i in range(1, 15)]
    rule = fw.rules.OverfittingRule(min_rise=0.01, errors=0.0, noise=0.0, span=1)
    trainer = Scripted(losses, fw.OverfittingDetector(rule=rule, action="restore", probe_examples=0))
    trainer.run(4)
    again = trainer.run(13)
    assert again.verdict.overfitting
    assert (again.verdict.best, again.best.epoch, trainer.weight) == (2, 2, 3.0)


def test_callbacks_of_another_trainer_start_over():
    """A callback that has served one Trainer knows nothing of it in another, also if the other has trained before."""
    stopping = fw.EarlyStopping()
    Scripted([1, 2], stopping).run(2)
    other = Scripted([9, 8, 7], stopping)
    assert other.run(2).best.epoch == 1
    assert other.weight == 2.0
    Scripted([0.5], stopping).run(1)
    other.run(1)
    assert other.weight == 3.0


def test_other_weights_start_a_new_history(caplog):
    """After the user has replaced a layer, the best weights of before don't fit: a warning says that all starts anew."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.EarlyStopping()], device="cpu")
    trainer.fit([(x, y)], [(x, y)], epochs=2)
    model[1] = nn.Linear(8, 5)
    trainer.optimizer.add_param_group({"params": list(model[1].parameters())})
    with caplog.at_level(logging.WARNING, "fitwatch"):
        result = trainer.fit([(x, y)], [(x, y)], epochs=1)
    assert "a new history begins" in caplog.text
    assert len(result.history) == 1


def test_a_validation_set_of_another_size_is_pointed_out(caplog):
    """Evaluations on sets of different size go into one history with a warning that names reset=True."""
    trainer = Scripted([3, 2, 1])
    trainer.run(1)
    with caplog.at_level(logging.WARNING, "fitwatch"):
        trainer.run(1)
        assert caplog.text == ""
        trainer.losses = iter([1, 1])
        trainer.fit([torch.zeros(1, 1)], [torch.zeros(1, 1)] * 2, epochs=1)
    assert "pass reset=True" in caplog.text


@pytest.mark.parametrize("together", [True, False])
def test_a_second_watch_continues_the_history_that_it_is_given(data, together):
    """With history= the second watch's best is that of both, as for a Trainer; with progress= alone it is its own."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    stopping, x, y = fw.EarlyStopping(), *data.tensors
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loaders = {"train_loader": [(x, y)], "val_loader": [(x, y)]}
    state, histories, bests = None, [], []
    for lr in (0.1, 1000.0):
        optimizer.param_groups[0]["lr"] = lr
        more = {} if state is None else {"progress": state.progress}
        if state is not None and together:
            more["history"] = state.history
        with fw.Watch(model, optimizer, stopping, **loaders, **more) as watch:
            for _ in watch.epochs(3):
                for inputs, targets in watch.train():
                    watch.loss(model(inputs), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                watch.validate()
        state = watch.state
        histories.append(list(watch.result.history))
        bests.append(watch.result.best)
        assert watch.evaluate([(x, y)])["val/loss"] == watch.result.best.metrics["val/loss"]
    assert len(histories[1]) == (6 if together else 3)
    assert (bests[0] == bests[1]) is together


def test_a_step_is_evaluated_once():
    """validate_first in a later fit repeats no evaluation, unless reset=True has dropped it."""
    trainer = Scripted([5, 4, 3, 2, 1, 0.5])
    trainer.run(1, validate_first=True)
    assert [entry["step"] for entry in trainer.run(1, validate_first=True).history] == [0, 1, 2]
    assert [entry["step"] for entry in trainer.run(1, validate_first=True, reset=True).history] == [2, 3]


class Annealed(nn.Module):
    """A loss of the user's that changes itself in training."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.calls = scale, 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs, targets):
        self.calls += 1
        self.mean += 1
        return self.scale * nn.functional.cross_entropy(outputs, targets)


def absolute(outputs, targets):
    return (outputs - nn.functional.one_hot(targets, 3)).abs().mean()


LOSSES = [
    (None, fw.losses.Focal(), "is Focal, and was CrossEntropy in the last fit"),
    (fw.losses.Focal(), fw.losses.Focal(gamma=1), r"\(Focal\) has other options"),
    (fw.CrossEntropy(), fw.CrossEntropy([1.0, 2.0, 3.0]), r"\(CrossEntropy\) has other options or weights"),
    (absolute, nn.functional.cross_entropy, "is cross_entropy, and was absolute"),
    (lambda o, t: 3 * absolute(o, t), lambda o, t: 2 * absolute(o, t), "has other options"),
    (partial(nn.functional.cross_entropy, label_smoothing=0.1), nn.functional.cross_entropy, "is cross_entropy"),
    (Annealed(), Annealed(2.0), r"\(Annealed\) has other options"),
    (fw.CrossEntropy(), nn.CrossEntropyLoss(), None),
    (fw.losses.Focal(gamma=1), fw.losses.Focal(gamma=1), None),
    (fw.CrossEntropy([1.0, 2.0, 3.0]), fw.CrossEntropy([1.0, 2.0, 3.0]), None),
    (absolute, absolute, None),
    ((same := Annealed()), same, None),
]


@pytest.mark.parametrize(("first", "second", "said"), LOSSES, ids=range(len(LOSSES)))
def test_another_loss_is_pointed_out(data, caplog, first, second, said):
    """Values of another loss go into one history with one warning that names reset=True; an equal loss with none."""
    model, batches = nn.Linear(4, 3).double(), [data.tensors]
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), first, device="cpu")
    trainer.fit(batches, [*batches], epochs=1)
    trainer.loss = second
    trainer.fit(batches, [*batches], epochs=1)
    trainer.fit(batches, [*batches], epochs=1)
    warnings = [r.getMessage() for r in caplog.records if "reset=True" in r.getMessage()]
    assert len(warnings) == (said is not None)
    assert said is None or re.search(said, warnings[0])
    caplog.clear()
    trainer.loss = first
    trainer.fit(batches, [*batches], epochs=1, reset=True)
    assert "reset=True" not in caplog.text


@pytest.mark.parametrize("spec", ["balanced", [1.0, 1.0, 5.0]])
def test_other_class_weights_are_another_loss(data, caplog, spec):
    """Class weights given by a callback count: new ones are pointed out, the same ones are not, in a Watch too."""
    model, batches = nn.Linear(4, 3).double(), [data.tensors]
    optimizer, state = torch.optim.SGD(model.parameters(), 0.1), None
    for callbacks in ([], [fw.WeightedLoss(spec)], [fw.WeightedLoss(spec)]):
        history = None if state is None else state.history
        loaders = {"train_loader": batches, "val_loader": [*batches]}
        with fw.Watch(model, optimizer, callbacks, **loaders, history=history) as watch:
            watch.validate()
        state = watch.state
    assert caplog.text.count("(CrossEntropy) has other options or weights than in the last fit") == 1
