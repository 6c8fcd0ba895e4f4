"""What to do about a verdict: the texts of ``fitwatch help``."""

from typing import Final

TOPICS: Final = {
    "overfitting": """\
The validation loss has risen while the training loss still fell: since then the model has learned things that hold
for the training examples only.

1. Use the best weights, not the last ones. EarlyStopping restores them; so does OverfittingDetector(action="restore").
   The best epoch is in result.best and in best.pt of a Checkpoint.
2. Read what rose. If verdict.cause is "confidence", the model decides as well as before and is only too sure: calibrate
   it (result.calibration), and training may go on. If it is "model", go on here.
3. Look for a mistake first: training examples in the validation set, labels that differ between the two, an
   augmentation that only training sees and that never ends.
4. More data, or augmentation.
5. More regularization: weight decay, dropout, label smoothing. Change one at a time.
6. A smaller model, a pretrained one, or fewer epochs with the same schedule.
7. Milder class weights: strong ones repeat the few rare examples, which are then memorized. If val/loss_unweighted
   still falls while val/loss rises, this is it.
""",
    "underfitting": """\
Neither loss falls, there is no gap between them, and the validation loss is no better than that of a constant
prediction.

1. Look at the gradients (GradientNorm): layers that are dead, frozen or without a gradient.
2. A learning rate ten times higher, then ten times lower.
3. Check that inputs and targets belong together, and that the inputs are normalized.
4. Less regularization, a larger model, longer training, better features.
""",
    "diverging": """\
The loss grows without bound, or is not finite.

1. A lower learning rate, or a warm-up.
2. clip_norm: GradientNorm suggests a value that clips spikes only.
3. Look at the batch that is named: NaN in the inputs, labels out of range, a loss of a logarithm of 0.
4. bf16 instead of fp16; float32 for the loss.
""",
}
"""Name of a verdict -> text."""
