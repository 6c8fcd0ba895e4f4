"""Trainings for one or several processes: run ``python _ranks.py FOLDER SCENARIO ...`` on every rank.

Each scenario should give the same results with any number of ranks: a step has two micro-batches, both on one rank or
one on each of two. Its return value is saved as ``FOLDER/SCENARIO-RANK.pt``.
"""

import contextlib
import io
import logging
import math
import sys
from pathlib import Path

import torch
from attrs import asdict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

import fitwatch as fw
from fitwatch import ranks
from fitwatch.measuring import kept_logits

WEIGHT = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)


def here():
    """Return the number of micro-batches per step on each rank."""
    return 2 // ranks.size()


def network(seed=0, dropout=0.0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*([nn.BatchNorm1d(4)] if norm else []), *layers).double()


def examples(count=31, seed=1):
    """Return examples sorted by class, so that the weights of micro-batches differ as much as possible."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(count) * 3 // count).clamp(max=2)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) + y[:, None] / 2, y


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


class Gradients(fw.Callback):
    def __init__(self):
        self.seen = []

    def on_gradients_ready(self, state):
        self.seen.append([p.grad.clone() for p in state.model.parameters()])


# -- scenarios ---------------------------------------------------------------------------------------------------------

CUTS = {"even": [8, 8, 8, 7], "uneven": [1, 14, 3, 13], "odd": [10, 10, 11], "single": [31], "one by one": [1] * 31}


def gradients(_):
    """Return the gradient of every step for each way to cut the data, with a weighted and a mean loss."""
    x, y = examples()
    found = {}
    for name, cut in CUTS.items():
        for kind, loss in {
            "weighted": fw.CrossEntropy(WEIGHT),
            "mean": lambda o, t: ((o.mean(1) - t) ** 2).mean(),
        }.items():
            model, keep = network(), Gradients()
            batches = list(zip(x.split(cut), y.split(cut), strict=True))
            fw.Trainer(model, sgd(model), loss, callbacks=[keep], accumulate=here(), clip_norm=0.5).fit(
                batches, epochs=2
            )
            found[f"{name}, {kind}"] = keep.seen
            found[f"{name}, {kind}, weights"] = [p.detach() for p in model.parameters()]
    return found


def recall(outputs, targets):
    return ((outputs.argmax(1) == targets) & (targets == 2)).sum() / (targets == 2).sum()


class Order:
    """A metric whose value depends on the order of the examples."""

    def reset(self):
        self.seen = []

    def update(self, outputs, targets):
        self.seen += outputs[:, 0].tolist()

    def compute(self):
        return sum(value * (i + 1) for i, value in enumerate(self.seen))


def everything(_):
    """Train on shuffled loaders with all plug-ins; return history, verdict, stop reason and weights."""
    x, y = examples(60)
    train = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    val = DataLoader(TensorDataset(*examples(41, seed=2)), 6)
    model = network()
    detector = fw.OverfittingDetector(rule=fw.rules.OverfittingRule(min_rise=0.01, errors=0.01, noise=0.1))
    stopping = fw.EarlyStopping(patience=25, min_delta="1se")
    trainer = fw.Trainer(
        model,
        torch.optim.Adam(model.parameters(), 0.05),
        callbacks=[fw.WeightedLoss("balanced"), fw.GradientNorm(), detector, stopping],
        metrics={"recall": recall, "order": Order()},
        accumulate=here(),
        seed=3,
    )
    result = trainer.fit(train, val, epochs=60)
    return {
        "history": result.history,
        "verdict": asdict(result.verdict),
        "stop_reason": result.stop_reason,
        "weights": [p.detach() for p in model.parameters()],
        "examples": trainer.state.train_loss.examples,
    }


def samplers(_):
    """Return the losses of a constant model with samplers that repeat examples to make the parts equal."""
    found = {}
    train, val = TensorDataset(*examples(33)), TensorDataset(*examples(41, seed=2))
    for name in ("DistributedSampler", "in a batch sampler", "none"):
        loaders = []
        for data in (train, val):
            sampler = DistributedSampler(data, ranks.size(), ranks.rank(), shuffle=data is train)
            if name == "none":
                loaders.append(DataLoader(data, 4))
            elif name == "DistributedSampler":
                loaders.append(DataLoader(data, 4, sampler=sampler))
            else:
                loaders.append(DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=False)))
        model = network()
        result = fw.Trainer(model, sgd(model, 0.0), fw.CrossEntropy(WEIGHT)).fit(*loaders, epochs=2)
        found[name] = result.history
    return found


class Stream(IterableDataset):
    """Yields each rank's own part; the parts differ in length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        cut = 11 if ranks.size() > 1 else 31
        parts = [range(cut), range(cut, 31)][: ranks.size()]
        yield from ((self.data[0][i], self.data[1][i]) for i in parts[ranks.rank()])


def streams(_):
    """Return loss, examples and class weights of loaders that are already split and have no length."""
    model = network()
    loader = DataLoader(Stream(examples()), 4)
    trainer = fw.Trainer(model, sgd(model, 0.0), callbacks=[fw.WeightedLoss("balanced")])
    result = trainer.fit(loader, loader, epochs=2)
    return {
        "history": result.history,
        "examples": trainer.state.train_loss.examples,
        "weight": trainer.state.loss.weight,
    }


class StopsOne(fw.Callback):
    """Requests a stop at the third step, on the last rank only."""

    def on_step_end(self, state):
        if state.progress.step == 3 and ranks.rank() == ranks.size() - 1:
            state.request_stop("enough")


class FirstRankOnly(Stream):
    """Yields examples on rank 0 only."""

    def __iter__(self):
        yield from zip(*self.data, strict=True) if ranks.rank() == 0 else ()


def empty_part(_):
    """Train on a stream with batches for one rank only; return history and probe loss."""
    model = network()
    x, y = examples(16)
    trainer = fw.Trainer(model, sgd(model, 0.0), callbacks=[fw.OverfittingDetector()])
    result = trainer.fit(DataLoader(FirstRankOnly((x, y)), 4), DataLoader(TensorDataset(x, y), 5), epochs=2)
    probe = result.history[-1]["val/loss"] - result.verdict.gap
    return {"history": result.history, "probe": probe}


def outside(_):
    """Train a parameter outside all modules and a model with buffers, both different on each rank."""
    x, y = examples(9)
    torch.manual_seed(ranks.rank())
    scale = nn.Parameter(torch.randn((), dtype=torch.float64))
    body = network(seed=ranks.rank(), norm=True)
    model = DistributedDataParallel(body) if ranks.size() > 1 else body

    class Scaled(fw.Trainer):
        def training_step(self, batch):
            return self.compute_loss(self.model(batch[0]) * scale, batch[1])

    trainer = Scaled(model, torch.optim.SGD([*body.parameters(), scale], 0.1))
    before = trainer.validate([(x, y)])  # a rank has no batch
    trainer.fit([(x, y)], epochs=2)
    return {"before": before, "scale": scale.detach(), "state": body.state_dict()}


def stop(_):
    """Return where training ends after one rank has requested a stop."""
    x, y = examples(64)
    model = network()
    trainer = fw.Trainer(model, sgd(model), callbacks=[StopsOne()], log_every=5, accumulate=here())
    result = trainer.fit(DataLoader(TensorDataset(x, y), 2), epochs=5)
    return {"step": trainer.state.progress.step, "reason": result.stop_reason}


class Parts(nn.Module):
    """Has a layer that only some batches use (a positive first number) and an unused layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.never = (nn.Linear(4, 3).double() for _ in range(3))

    def forward(self, x):
        return self.always(x) + (self.sometimes(x) if x[0, 0] > 0 else 0)


def unused(_):
    """Return the gradients of a model whose layers are not all used on every rank."""
    x, y = examples(32)
    x[:, 0] = torch.where(torch.arange(32) % 8 < 4, 1.0, -1.0)  # every other batch
    model = Parts()
    seen = []

    class Keep(fw.Callback):
        def on_gradients_ready(self, state):
            seen.append(
                {name: None if p.grad is None else p.grad.clone() for name, p in state.model.named_parameters()}
            )

    batches = list(zip(x.split(4), y.split(4), strict=True))
    fw.Trainer(model, sgd(model), callbacks=[Keep()], accumulate=here()).fit(batches, epochs=1)
    return {"seen": seen}


def wrapped(_):
    """Train and validate a DistributedDataParallel model with one batch fewer on the last rank."""
    x, y = examples()
    model = network()
    outer = DistributedDataParallel(model) if ranks.size() > 1 else model
    batches = list(zip(x.split(7), y.split(7), strict=True))
    result = fw.Trainer(outer, sgd(model), fw.CrossEntropy(WEIGHT), accumulate=here()).fit(batches, batches, epochs=3)
    synced = getattr(outer, "require_backward_grad_sync", True)
    return {"history": result.history, "weights": [p.detach() for p in model.parameters()], "synced": synced}


def different_start(_):
    """Train models that start differently, with a BatchNorm; return the final weights and buffers."""
    x, y = examples(48)
    model = network(seed=ranks.rank(), norm=True)
    model[0].running_mean += ranks.rank()
    model.register_buffer("short", torch.full((2,), ranks.rank(), dtype=torch.int16))
    model.register_buffer("expanded", torch.full((1,), float(ranks.rank())).expand(3))
    batches = list(zip(x.split(6), y.split(6), strict=True))
    trainer = fw.Trainer(model, sgd(model), accumulate=here())
    result = trainer.fit(batches, batches, epochs=2)
    return {"state": model.state_dict(), "history": result.history}


def half(_):
    """Train with fp16 and a scaler; return history and weights."""
    x, y = examples()
    model = network().float()
    batches = list(zip(x.float().split(8), y.split(8), strict=True))
    trainer = fw.Trainer(model, sgd(model), precision="fp16", accumulate=here(), device="cpu")
    result = trainer.fit(batches, epochs=8)
    return {"history": result.history, "weights": [p.detach() for p in model.parameters()]}


def files(folder):
    """Return what each rank prints and logs."""
    x, y = examples(48)
    model = network()
    loader = DataLoader(TensorDataset(x, y), 6, shuffle=True)
    name = f"files-{ranks.size()}"
    callbacks = [
        fw.TensorBoard(folder / name / "runs"),
        fw.Checkpoint(folder / name / "saved"),
        fw.OverfittingDetector(),
        fw.ProgressBar(),
    ]
    trainer = fw.Trainer(model, sgd(model), callbacks=callbacks, accumulate=here(), log_every=1)
    said, warned = io.StringIO(), []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("fitwatch").addHandler(handler)
    with contextlib.redirect_stdout(said):
        trainer.fit(loader, loader, epochs=3)
    logging.getLogger("fitwatch").warning("by one rank")
    logging.getLogger("fitwatch").removeHandler(handler)
    return {"said": said.getvalue(), "run_dir": str(callbacks[0].run_dir), "warned": warned}


def resume(folder):
    """Train five epochs without and with an interruption after two, with dropout, shuffling and Adam."""
    x, y = examples(45)
    found = {}

    def make(name, seed):
        model = network(seed=seed, dropout=0.3)
        callbacks = [
            fw.Checkpoint(folder / f"{name}-{ranks.size()}"),
            fw.EarlyStopping(patience=50, restore_best=False),
        ]
        loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
        val = DataLoader(TensorDataset(*examples(20, seed=2)), 4)
        trainer = fw.Trainer(
            model, torch.optim.Adam(model.parameters(), 0.01), callbacks=callbacks, accumulate=here(), seed=seed
        )
        return model, lambda epochs, **options: trainer.fit(loader, val, epochs=epochs, **options)

    model, fit = make("whole", 5)
    found["whole"] = fit(5).history
    found["whole weights"] = [p.detach() for p in model.parameters()]
    fit = make("cut", 5)[1]
    fit(2)
    model, fit = make("cut", 6)  # another process would have other random numbers
    found["resumed"] = fit(5, resume="auto").history
    found["resumed weights"] = [p.detach() for p in model.parameters()]
    return found


def refused(folder):
    """Return the errors for different arguments and for a checkpoint from another number of ranks."""
    x, y = examples()
    batches = list(zip(x.split(11), y.split(11), strict=True))
    said = {}

    def attempt(name, options=(), callbacks=(), layer=None, **fit):
        model = network() if layer is None else nn.Sequential(layer, network())
        try:
            fw.Trainer(model, sgd(model), callbacks=list(callbacks), **dict(options)).fit(batches, **fit)
        except (ValueError, OSError, RuntimeError) as error:
            said[name] = str(error)

    attempt("epochs", epochs=1 + ranks.rank())
    attempt("callbacks", callbacks=[StopsOne()] * ranks.rank(), epochs=1)
    attempt("accumulate", {"accumulate": 1 + ranks.rank()}, epochs=1)
    attempt("val_loader", epochs=1, val_loader=None if ranks.rank() else batches)
    norm = nn.SyncBatchNorm(4).double()
    attempt("norm", epochs=1, layer=norm)
    kept = folder / f"kept-{ranks.size()}"
    attempt("fresh", callbacks=[fw.Checkpoint(kept)], epochs=1)
    attempt("folder", callbacks=[fw.Checkpoint(kept)], epochs=1)
    checkpoint = folder / "whole-1" / "epoch-5.pt"
    if ranks.size() > 1 and checkpoint.exists():
        attempt("checkpoint", epochs=9, resume=checkpoint)
    return said


def sampled(_):
    """Return the examples that each rank trained on in each of three epochs."""
    ids = torch.arange(37)

    class Ledger(fw.Trainer):
        def training_step(self, batch):
            seen[-1] += batch[0][:, 0].long().tolist()
            return super().training_step(batch)

    class Epochs(fw.Callback):
        def on_epoch_start(self, state):
            seen.append([])

    seen = []
    model = nn.Linear(1, 3)
    loader = DataLoader(TensorDataset(ids.float()[:, None], ids % 3), 4, shuffle=True)
    Ledger(model, sgd(model, 0.0), callbacks=[Epochs()], accumulate=here(), seed=1).fit(loader, epochs=3)
    return {"seen": seen}


def fails(_):
    """Raise in a callback at the second step, on the last rank."""

    class Raises(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 2 and ranks.rank() == ranks.size() - 1:
                raise RuntimeError("broken on one rank")

    x, y = examples()
    model = network()
    fw.Trainer(model, sgd(model), callbacks=[Raises()]).fit(list(zip(x.split(2), y.split(2), strict=True)), epochs=50)
    return {}


def ruined(folder):
    """Let BatchNorm statistics become NaN on the last rank only; the scaler keeps the weights finite."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    x, y = torch.randn(64, 4), torch.arange(64) % 3
    x[9] = math.nan  # in batch 1, which rank 1 gets
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[fw.Checkpoint(folder / "ruined", every_steps=1)],
        precision="fp16",
        log_every=2,
    )
    result = trainer.fit(list(zip(x.split(8), y.split(8), strict=True)), epochs=2)
    return {"reason": result.stop_reason}


def unstarted(_):
    """Fit before anything has joined the ranks, as a script does that torchrun started."""

    class Main(fw.Callback):
        main_only = True

        def on_epoch_start(self, state):
            seen.append(state.progress.epoch)

    seen = []
    x, y = examples()
    model = network()
    fw.Trainer(model, sgd(model), callbacks=[Main()], device="cpu").fit([(x, y)] * 4, epochs=2)
    return {"seen": seen}


def calibrated(_):
    """Return the calibration of validations whose logits fit, and of some of which a part is kept."""
    kept_logits.MOST = 60
    x, y = examples()
    val = list(zip(x.split(3), y.split(3), strict=True))
    model = network()
    trainer = fw.Trainer(model, sgd(model), callbacks=fw.OverfittingDetector(), accumulate=here())
    result = trainer.fit(list(zip(x.split(8), y.split(8), strict=True)), val, epochs=3)
    return {"history": result.history, "examples": result.calibration.examples}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] != "unstarted":
        ranks.start(torch.device("cpu"))
    for scenario in sys.argv[2:]:
        result = globals()[scenario](Path(sys.argv[1]))
        torch.save(result, Path(sys.argv[1]) / f"{scenario}-{ranks.rank()}.pt")
