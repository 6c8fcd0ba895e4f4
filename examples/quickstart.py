"""Class weights, gradient norms, overfitting, early stopping with restored weights and TensorBoard, in eleven lines."""

import hypothyroid
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw

torch.manual_seed(0)
train_set, val_set, _ = hypothyroid.load()
train_loader, val_loader = DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=256)
model = nn.Sequential(nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

callbacks = [
    fw.WeightedLoss("balanced"),
    fw.GradientNorm(),
    fw.OverfittingDetector(),
    fw.EarlyStopping("val/loss", patience=10),
    fw.ProgressBar(),
    fw.TensorBoard("runs"),
]
trainer = fw.Trainer(model, torch.optim.Adam(model.parameters()), callbacks=callbacks)
result = trainer.fit(train_loader, val_loader, epochs=60)
print(result.best, result.stop_reason, result.verdict.evidence, sep="\n")
