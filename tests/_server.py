"""A small fit that overfits, and a TensorBoard server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw


def noisy_data(seed=3):
    """Return loaders of 96 examples each, two classes at 2 to 1, with a fifth of the labels wrong, so that a net overfits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(192, 10, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0.5).long()
    y = torch.where(torch.rand(192, generator=generator) < 0.2, 1 - y, y)
    train, val = TensorDataset(x[:96], y[:96]), TensorDataset(x[96:], y[96:])
    return DataLoader(train, 16, shuffle=True), DataLoader(val, 96)


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean()


def overfitting_trainer(folder, *, name="run", patience=12, lr=0.002, callbacks=()):
    """Return a trainer with every callback that logs; TensorBoard is the last of its list."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))
    return fw.Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr),
        callbacks=[
            fw.WeightedLoss("balanced"),
            fw.GradientNorm(),
            fw.OverfittingDetector(),
            fw.EarlyStopping("val/loss", patience=patience),
            *callbacks,
            fw.TensorBoard(folder, name=name, show_link=False),
        ],
        metrics={"accuracy": accuracy},
        device="cpu",
        log_every=2,
        seed=0,
    )


@contextmanager
def serve(folder, *options):
    """Yield the address of a server that has read all of ``folder``."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    log = []
    with subprocess.Popen(
        [*command, "--reload_interval", "1", *options], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            address = None
            for line in process.stderr:
                log.append(line)
                address = re.search(r"http://\S+", line)
                if address:
                    break
            if address is None:
                raise RuntimeError("the TensorBoard server did not start: " + "".join(log))
            address = address.group().rstrip("/")
            _wait_for(address, {str(file.parent.relative_to(folder)) for file in folder.rglob("events.*")})
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the server and its data server


def _wait_for(address, runs):
    for _ in range(150):
        tags = get(address, "scalars/tags")
        # The seconds come last of all.
        if runs <= tags.keys() and all("report/seconds" in tags[run] for run in runs if run.endswith("best")):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the TensorBoard server did not find all of {runs}, only {list(tags)}")


def get(address, path, **query):
    """Return the JSON at ``path``."""
    with urlopen(f"{address}/data/plugin/{path}?{urlencode(query)}", timeout=30) as answer:
        return json.load(answer)


def post(address, path, body):
    """Post ``body`` and return the JSON answer."""
    request = Request(f"{address}/data/plugin/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return json.load(answer)
