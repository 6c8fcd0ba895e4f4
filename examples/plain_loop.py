"""The same callbacks in a hand-written loop, with no Trainer."""

import hypothyroid
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw

torch.manual_seed(0)
train_set, val_set, _ = hypothyroid.load()
model = nn.Sequential(nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(model.parameters())
callbacks = fw.Callbacks(
    [
        fw.WeightedLoss("balanced"),
        fw.GradientNorm(),
        fw.OverfittingDetector(),
        fw.EarlyStopping("val/loss", patience=5),
        fw.TensorBoard("runs", name="plain-loop"),
    ]
)
state = fw.State(
    model=model,
    optimizer=optimizer,
    loss=fw.CrossEntropy(),
    train_loader=DataLoader(train_set, batch_size=32, shuffle=True),
    val_loader=DataLoader(val_set, batch_size=256),
)
progress = state.progress
try:
    callbacks.on_fit_start(state)  # WeightedLoss puts the weights into state.loss
    for _ in range(10):
        model.train()
        callbacks.on_epoch_start(state)
        for x, y in state.train_loader:
            total, weight = state.loss.sums(model(x), y)
            (total / weight).backward()
            state.train_loss.add(total, weight)
            callbacks.on_batch_end(state)
            callbacks.on_gradients_ready(state)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            callbacks.on_step_end(state)
            if progress.step % state.log_every == 0:
                state.flush()
                callbacks.on_log(state)

        callbacks.on_validation_start(state)
        model.eval()
        val_loss = fw.metrics.WeightedMean()
        with torch.no_grad():
            for x, y in state.val_loader:
                val_loss.add(*state.loss.sums(model(x), y))
        val_loss.pull()
        state.evaluated({"val/loss": val_loss.value})
        callbacks.on_validation_end(state)
        state.flush()
        callbacks.on_log(state)

        progress.epoch += 1
        callbacks.on_epoch_end(state)
        print(f"epoch {progress.epoch}: train {state.metrics['train/loss']:.4f}, val {state.metrics['val/loss']:.4f}")
        if state.stop_reason:
            break
except BaseException as error:
    state.error = error
    raise
finally:
    callbacks.on_fit_end(state)  # restores the best weights, closes TensorBoard's files
