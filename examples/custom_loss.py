"""A custom loss: any module or function that returns a scalar counts as the mean over the batch."""

import torch
from torch import nn

import fitwatch as fw


class CustomMSELoss(nn.Module):
    """Squared error in which predicting too low costs three times as much as predicting too high."""

    def forward(self, output, target):
        error = output - target
        return torch.where(error < 0, 3 * error**2, error**2).mean()


torch.manual_seed(0)
x = torch.randn(500, 3)
y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3 * torch.randn(500, 1)
train = list(zip(x[:400].split(32), y[:400].split(32), strict=True))  # any iterable of batches is a loader
val = [(x[400:], y[400:])]

model = nn.Linear(3, 1)
trainer = fw.Trainer(
    model, torch.optim.SGD(model.parameters(), lr=0.1), CustomMSELoss(), callbacks=[fw.EarlyStopping(patience=3)]
)
result = trainer.fit(train, val, epochs=50)
print(f"best validation loss {result.best.metrics['val/loss']:.4f} in epoch {result.best.epoch}")
print(f"mean error {(model(x[400:]) - y[400:]).mean().item():+.3f}: above 0, since predicting too low costs more")
