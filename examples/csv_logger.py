"""A custom logger: writes every logged number to a CSV file, one row each."""

import csv
from pathlib import Path

import torch
from torch import nn

import fitwatch as fw


class CsvLog(fw.Callback):
    """Writes rows of step, name and value; a later or resumed fit appends to the same file."""

    main_only = True  # of several ranks, only rank 0 writes

    def __init__(self, path):
        self.path, self.file = Path(path), None

    def on_fit_start(self, state):
        append = state.progress.step > 0 and self.path.exists()
        self.file = self.path.open("a" if append else "w", newline="")
        self.rows = csv.writer(self.file)
        if not append:
            self.rows.writerow(["step", "name", "value"])

    def on_log(self, state):
        numbers = [record for record in state.records if isinstance(record.value, float)]
        self.rows.writerows([record.step, record.name, record.value] for record in numbers)
        self.file.flush()  # so that written rows survive a crash

    def on_fit_end(self, state):
        if self.file is not None:  # on_fit_end runs even if on_fit_start failed
            self.file.close()


torch.manual_seed(0)
x = torch.randn(600, 8)
y = (x[:, 0] + 0.5 * torch.randn(600) > 1.2).long()
train = list(zip(x[:400].split(20), y[:400].split(20), strict=True))  # any iterable of batches is a loader
val = [(x[400:], y[400:])]

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
trainer = fw.Trainer(
    model, torch.optim.Adam(model.parameters(), lr=0.01), callbacks=[fw.GradientNorm(), CsvLog("log.csv")], log_every=10
)
result = trainer.fit(train, val, epochs=4)

with Path("log.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
print(f"{len(rows)} rows of {len({row['name'] for row in rows})} names")
print("val/loss", *(f"{float(row['value']):.3f}" for row in rows if row["name"] == "val/loss"))
