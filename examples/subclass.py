"""A custom training step (noise on the inputs) with dict batches, and a custom callback."""

import hypothyroid
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fitwatch as fw


class Records(Dataset):
    """A data set with dict batches instead of (input, target) tuples."""

    def __init__(self, tensors):
        self.x, self.y = tensors
        self.labels = self.y  # lets WeightedLoss count the classes without a pass over the data

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"features": self.x[i], "label": self.y[i]}


class NoisyTrainer(fw.Trainer):
    """Adds noise to the inputs during training."""

    def training_step(self, batch):
        x = batch["features"]
        return self.compute_loss(self.model(x + 0.1 * torch.randn_like(x)), batch["label"])

    def validation_step(self, batch):
        output = self.model(batch["features"])
        self.update_metrics(output, batch["label"])
        return self.compute_loss(output, batch["label"])


class PrintEpoch(fw.Callback):
    """Prints a line after each validation."""

    def on_validation_end(self, state):
        figures = ", ".join(f"{name} {state.metrics[name]:.3f}" for name in sorted(state.history.names))
        print(f"epoch {state.metrics['epoch']}: {figures}")


def recall(outputs, targets):
    """Share of cases that are found."""
    return (outputs.argmax(1)[targets == 1] == 1).float().mean()


train_set, val_set, _ = hypothyroid.load()
model = nn.Sequential(nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 2))
trainer = NoisyTrainer(
    model,
    torch.optim.Adam(model.parameters()),
    callbacks=[fw.WeightedLoss("sqrt_inverse"), PrintEpoch()],
    metrics={"recall": recall},
    seed=0,
)
trainer.fit(
    DataLoader(Records(train_set.tensors), batch_size=32, shuffle=True),
    DataLoader(Records(val_set.tensors), batch_size=256),
    epochs=3,
)
