"""The remedies of a verdict fit the run."""

import torch
from torch import nn

import fitwatch as fw
from fitwatch.callbacks.overfitting_detector.remedies import card
from fitwatch.rules.overfitting import Verdict, diagnose


def text_for(verdict, *callbacks, **options):
    """Return the card of a verdict in a run with these callbacks."""
    model = nn.Linear(3, 2)
    watch = fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1), callbacks, val_loader=[1], **options)
    watch.state.history.entries = [{"epoch": e, "step": e, "val/loss": 1.0, "train/loss": 1.0} for e in range(60)]
    return card(verdict, watch.state, 10)


def verdict_of(kind):
    fall = [1 / (1 + i) for i in range(60)]
    rise = [max(v, 0.1) + (0.05 * (i - 10) if i > 10 else 0) for i, v in enumerate(fall)]
    found = diagnose(fall, rise if kind == "overfitting" else [1.0] * 30 + [float("nan")] * 30)
    assert isinstance(found, Verdict)
    assert found.status == kind
    return found


def test_what_is_attached_is_not_advised():
    """Early stopping is advised unless the best weights are restored anyway."""
    verdict = verdict_of("overfitting")
    assert "Early stopping with" in text_for(verdict)
    assert "Early stopping with" in text_for(verdict, fw.EarlyStopping(restore_best=False))
    for attached in (fw.EarlyStopping(), fw.Callbacks([fw.EarlyStopping()]), fw.OverfittingDetector(action="restore")):
        text = text_for(verdict, attached)
        assert "Early stopping with" not in text
        assert "will be restored at the end" in text


def test_clipping_is_advised_by_what_there_is():
    """A run that clips is told to clip lower."""
    verdict = verdict_of("diverging")
    assert "gradient clipping (clip_norm=)" in text_for(verdict)
    assert "a clip_norm below 2" in text_for(verdict, clip_norm=2.0)
