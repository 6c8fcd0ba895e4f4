"""The training of quickstart.py in a hand-written loop, with a Watch instead of the Trainer."""

import hypothyroid
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw

torch.manual_seed(0)
train_set, val_set, _ = hypothyroid.load()
train_loader, val_loader = DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=256)
model = nn.Sequential(nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

optimizer = torch.optim.Adam(model.parameters())
callbacks = [
    fw.WeightedLoss("balanced"),
    fw.GradientNorm(),
    fw.OverfittingDetector(),
    fw.EarlyStopping("val/loss", patience=10),
    fw.TensorBoard("runs", name="plain-loop"),
    fw.Checkpoint("checkpoints"),
]
with fw.Watch(model, optimizer, callbacks, train_loader=train_loader, val_loader=val_loader) as watch:
    for epoch in watch.epochs(60):
        for x, y in watch.train():
            watch.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with watch.validating():
            for x, y in val_loader:
                watch.loss(model(x), y)
        if watch.evaluated:  # not if the weights are NaN
            print(f"epoch {epoch + 1}: validation loss {watch.state.metrics['val/loss']:.4f}")
print(watch.result.best, watch.result.stop_reason, watch.result.verdict.evidence, sep="\n")
