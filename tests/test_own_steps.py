"""Observers of a validation whose step computes another loss than the trainer's: they use it, or say that they can't."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fitwatch as fw

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + torch.randn(60, generator=torch.Generator().manual_seed(1)) > 0).long()
TRAIN = [(X[:40], Y[:40])]
VAL = [(X[40:47], Y[40:47]), (X[47:], Y[47:])]


class Computes(fw.Trainer):
    """A loss of its own, with outputs for the metrics."""

    def training_step(self, batch):
        return F.multi_margin_loss(self.model(batch[0]), batch[1])

    def validation_step(self, batch):
        output = self.model(batch[0])
        self.update_metrics(output, batch[1])
        return F.multi_margin_loss(output, batch[1])


class Asks(fw.Trainer):
    """The trainer's loss, of logits; the metrics get probabilities, before it."""

    def validation_step(self, batch):
        output = self.model(batch[0])
        self.update_metrics(output.softmax(1), batch[1])
        return self.compute_loss(output, batch[1])


class Twice(fw.Trainer):
    def validation_step(self, batch):
        output = self.model(batch[0])
        return self.compute_loss(output, batch[1]) + 0.1 * self.compute_loss(-output, batch[1]).mean


def fit(kind, *callbacks, loss=None, model=None):
    torch.manual_seed(1)
    model = nn.Linear(4, 2) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = kind(model, optimizer, loss, callbacks=callbacks, metrics={"mean": lambda o, t: o.float().mean()})
    return trainer, trainer.fit(TRAIN, VAL, epochs=12)


class Silent(Computes):
    def validation_step(self, batch):
        self.update_metrics(torch.zeros(len(batch[1]), 1), batch[1])  # which the trainer's loss could not take
        return F.multi_margin_loss(self.model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("kind", "why"), [(Computes, "computes its loss itself"), (Silent, "computes its loss itself")], ids=["fits", "not"]
)
def test_a_loss_of_the_step_has_no_pairs_and_the_verdict_says_so(kind, why):
    """The losses of the examples are those of the trainer's loss, so another loss is judged by its means."""
    trainer, result = fit(kind, fw.OverfittingDetector())
    assert trainer.state.validation.losses.on_host() is None
    assert trainer.callbacks[0].rule.examples == 0
    assert f"No pairs of examples were compared, since the validation step {why}." in result.verdict.evidence


def test_a_mean_has_no_pairs_and_the_verdict_says_so():
    """A loss that returns a mean is named as the reason; a loss of fitwatch has pairs, and nothing is said."""
    said = fit(fw.Trainer, fw.OverfittingDetector(), loss=F.cross_entropy)[1].verdict.evidence
    assert said.endswith("since the loss returns only a mean.")
    assert "pairs" not in fit(fw.Trainer, fw.OverfittingDetector())[1].verdict.evidence


def test_pairs_are_of_what_the_loss_was_given():
    """Outputs for the metrics may be others: the losses of the examples are those of the logits, in order."""
    trainer, result = fit(Asks, fw.OverfittingDetector())
    losses, weights = trainer.state.validation.losses.on_host()
    expected = F.cross_entropy(trainer.model(X[40:]), Y[40:], reduction="none").detach()
    torch.testing.assert_close(losses, expected)
    assert weights.tolist() == [1.0] * 20
    assert "pairs" not in result.verdict.evidence


def test_a_loss_used_twice_for_a_batch_has_no_pairs():
    """It is open which of the two losses is that of the example."""

    class Kind(Twice):
        def validation_step(self, batch):
            self.update_metrics(self.model(batch[0]), batch[1])
            return super().validation_step(batch)

    assert "several times" in fit(Kind, fw.OverfittingDetector())[1].verdict.evidence


@pytest.mark.parametrize("kind", [Computes, Silent])
def test_early_stopping_in_standard_errors_refuses_a_loss_without_examples(kind):
    """min_delta="1se" of an unknown loss is an error at the first validation, with what to write."""
    with pytest.raises(ValueError, match="computes its loss itself: .*self.compute_loss"):
        fit(kind, fw.EarlyStopping("val/loss", min_delta="1se"))
    assert fit(Asks, fw.EarlyStopping("val/loss", min_delta="1se"))[1].history[-1]["val/loss_se"] > 0


class Several(nn.Module):
    """Several outputs, as a VAE has."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(4, 4), form

    def forward(self, x):
        out = self.layer(x)
        return {"tuple": (out, out, out), "dict": {"a": out, "b": out}}[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_examples_are_counted_in_the_targets(form):
    """With several outputs the probe has as many examples as the validation set."""

    def loss(output, target):
        first = output[0] if form == "tuple" else output["a"]
        return F.cross_entropy(first, target)

    model = Several(form)
    detector = fw.OverfittingDetector()
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, callbacks=[detector])
    data = torch.utils.data.TensorDataset(X[:40], Y[:40])
    trainer.fit(torch.utils.data.DataLoader(data, 10), VAL, epochs=2)
    assert trainer.state.validation.losses.examples == 20
    assert detector._probe.examples == 20
