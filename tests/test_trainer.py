"""What the Trainer does for its user."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fitwatch as fw
from tests._ids import plain


def trainer_of(model, *args, lr=0.1, **options):
    return fw.Trainer(model, torch.optim.SGD(model.parameters(), lr), *args, device="cpu", **options)


class Guard(fw.Callback):
    """Drops the gradients of a step with a NaN in them."""

    def on_gradients_ready(self, state):
        if any(p.grad is not None and not p.grad.isfinite().all() for p in state.model.parameters()):
            state.optimizer.zero_grad()


class Count(fw.Callback):
    """Counts hooks, and keeps the progress seen at each step."""

    def __init__(self):
        self.steps, self.epochs, self.validations = [], [], []

    def on_step_end(self, state):
        self.steps.append((state.progress.epoch, state.progress.step, state.progress.epoch_step))

    def on_epoch_end(self, state):
        self.epochs.append(state.progress.epoch)

    def on_validation_end(self, state):
        self.validations.append(state.metrics["step"])


def test_epochs_steps_and_history_are_counted(model, data):
    """64 examples in batches of 10 with accumulate 2 are 4 steps an epoch; history has an entry for each epoch."""
    count = Count()
    result = trainer_of(model, callbacks=[count], accumulate=2).fit(
        DataLoader(data, 10), DataLoader(data, 10), epochs=2
    )
    assert count.steps == [(0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (1, 5, 1), (1, 6, 2), (1, 7, 3), (1, 8, 4)]
    assert count.epochs == [1, 2]
    assert [(entry["epoch"], entry["step"]) for entry in result.history] == [(0, 4), (1, 8)]
    assert {"epoch", "step", "train/loss", "val/loss", "val/loss_left"} == set(result.history[0])
    assert result.stop_reason is None


def test_max_steps_ends_in_mid_epoch_with_a_validation(model, data):
    """max_steps counts optimizer steps, whatever the epochs, and the last weights are validated."""
    count = Count()
    result = trainer_of(model, callbacks=[count]).fit(DataLoader(data, 16), DataLoader(data, 16), max_steps=6)
    assert len(count.steps) == 6
    assert count.validations == [4, 6]
    assert result.history[-1]["step"] == 6


def test_validate_every_counts_steps_over_epochs(model, data):
    """validate_every=3 validates at steps 3, 6, ... and at the end, and not at the ends of epochs."""
    count = Count()
    trainer_of(model, callbacks=[count]).fit(DataLoader(data, 16), DataLoader(data, 16), epochs=2, validate_every=3)
    assert count.validations == [3, 6, 8]


def test_fit_again_goes_on(model, data):
    """A second fit trains as many epochs more, and counters and optimizer go on where they stood."""
    trainer = fw.Trainer(model, torch.optim.Adam(model.parameters()), device="cpu")
    loader = DataLoader(data, 16)
    trainer.fit(loader, epochs=2)
    result = trainer.fit(loader, epochs=1)
    assert [(entry["epoch"], entry["step"]) for entry in result.history] == [(0, 4), (1, 8), (2, 12)]

    torch.manual_seed(0)
    once = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    fw.Trainer(once, torch.optim.Adam(once.parameters()), device="cpu").fit(loader, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), model.parameters(), strict=True))


def test_request_stop_ends_after_the_step_and_keeps_the_first_reason(model, data):
    """After request_stop every callback of the hook still runs, the fit ends, and the first reason is reported."""

    class Stop(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 3:
                state.request_stop("first")
                state.request_stop("second")

    count = Count()
    result = trainer_of(model, callbacks=[Stop(), count]).fit(DataLoader(data, 8), epochs=5)
    assert result.stop_reason == "first"
    assert len(count.steps) == 3
    assert count.epochs == [0]  # on_epoch_end ran, and the epoch that was cut short is not counted


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("kind", ["list", "iterable data set", "object without length"])
def test_any_iterable_of_batches_is_a_loader(model, data, kind):
    """Lists, loaders of iterable data sets and objects without a length train and validate."""

    class NoLength:
        def __iter__(self):
            return iter(DataLoader(data, 16))

    loaders = {
        "list": list(DataLoader(data, 16)),
        "iterable data set": DataLoader(Stream(data), 16),
        "object without length": NoLength(),
    }
    result = trainer_of(model).fit(loaders[kind], loaders[kind], epochs=2)
    assert [entry["step"] for entry in result.history] == [4, 8]


def test_a_generator_serves_for_one_epoch(model, data):
    """A generator trains one epoch, or some steps; a second epoch is an error that says why."""
    trainer_of(model).fit((b for b in DataLoader(data, 16)), epochs=1)
    trainer_of(model).fit((b for b in DataLoader(data, 16)), epochs=2, max_steps=3)
    with pytest.raises(ValueError, match="no batch in epoch 2.*generator"):
        trainer_of(model).fit((b for b in DataLoader(data, 16)), epochs=2, max_steps=5)


ITERATORS = {
    "generator": lambda batches: (batch for batch in batches),
    "zip": lambda batches: zip(*zip(*batches, strict=True), strict=True),
    "map": lambda batches: map(tuple, batches),
    "chain": itertools.chain,
    "iter(loader)": lambda batches: iter(DataLoader(batches, batch_size=None)),
}


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_for_several_passes_is_refused_before_step_1(model, data, kind):
    """Training epochs or validations that an iterator can't serve are an error at once, and a single one is none."""
    batches, once = list(DataLoader(data, 16)), ITERATORS[kind]
    for options in ({"epochs": 1}, {"max_steps": 4}, {"max_steps": 4, "validate_every": 4}):
        assert len(trainer_of(model).fit(once(batches), once(batches), **options).history) == 1
    trainer = trainer_of(model)
    with pytest.raises(TypeError, match=r"train_loader is a .*once only, and 2 epochs are to be trained"):
        trainer.fit(once(batches), batches, epochs=2)
    several = [
        {"epochs": 2},
        {"epochs": 1, "validate_first": True},
        {"max_steps": 5},
        {"epochs": 1, "validate_every": 3},
    ]
    for options in several:
        with pytest.raises(TypeError, match=r"val_loader is a .*once only, and several validations"):
            trainer.fit(batches, once(batches), **options)
    with pytest.raises(TypeError, match=r"val_loader\['b'\] is a .*once only"):
        trainer.fit(batches, {"a": batches, "b": once(batches)}, epochs=2)
    assert trainer.state.progress.step == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fw.Watch(model, optimizer, train_loader=once(batches)) as watch:
        for _ in watch.epochs(2):
            with pytest.raises(TypeError, match="train_loader is a .*once only"):
                watch.train()
            break


def test_an_object_that_starts_again_is_no_mere_iterator(model, data):
    """A loader that is its own iterator, and starts again in __iter__, serves any number of passes."""

    class Restarting:
        def __iter__(self):
            self.rest = iter(DataLoader(data, 16))
            return self

        def __next__(self):
            return next(self.rest)

    result = trainer_of(model).fit(Restarting(), Restarting(), epochs=2, validate_first=True)
    assert [entry["step"] for entry in result.history] == [0, 4, 8]


def test_own_batches_through_overridden_steps(data):
    """Dict batches with two inputs train through an own training_step; a scalar loss is weighed by batch_size."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, a, b):
            return self.linear(torch.cat([a, b], 1))

    class MyTrainer(fw.Trainer):
        def training_step(self, batch):
            return nn.functional.cross_entropy(self.model(batch["a"], batch["b"]), batch["y"])

        validation_step = training_step

        def batch_size(self, batch):
            return len(batch["a"])

    x, y = data.tensors
    loader = [{"a": i[:, :2], "b": i[:, 2:], "y": t} for i, t in zip(x.split(24), y.split(24), strict=True)]
    model = Two()
    expected = nn.functional.cross_entropy(model(x[:, :2], x[:, 2:]), y).item()
    result = MyTrainer(model, torch.optim.SGD(model.parameters(), 0.0), device="cpu").fit(loader, loader, epochs=1)
    assert result.history[0]["train/loss"] == pytest.approx(expected, rel=1e-12)
    assert result.history[0]["val/loss"] == pytest.approx(expected, rel=1e-12)


def test_schedulers_step_per_step_or_per_epoch(model, data):
    """A scheduler halves the rate after every step or after every epoch, as asked."""
    for interval, expected in (("step", 0.1 / 2**8), ("epoch", 0.1 / 2**2)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        fw.Trainer(model, optimizer, scheduler=scheduler, scheduler_interval=interval, device="cpu").fit(
            DataLoader(data, 16), epochs=2
        )
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("monitor", ["train/loss", "val/loss"])
def test_plateau_scheduler_follows_its_metric(model, data, monitor):
    """ReduceLROnPlateau lowers the rate once its metric, which cannot improve at rate 0, has not done so."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.param_groups[0]["lr"] = 1e-300
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, eps=0)
    loader = DataLoader(data, 16)
    trainer = fw.Trainer(model, optimizer, scheduler=scheduler, scheduler_monitor=monitor, device="cpu")
    trainer.fit(loader, loader if monitor == "val/loss" else None, epochs=3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-301)


def test_metrics_see_the_whole_validation_set(model, data):
    """A metric function that is no mean (recall of a rare class) and a torchmetrics object are exact over ragged batches."""
    torchmetrics = pytest.importorskip("torchmetrics")

    def recall(outputs, targets):
        return (outputs.argmax(1)[targets == 2] == 2).double().mean()

    metrics = {"recall": recall, "accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro")}
    trainer = trainer_of(model, metrics=metrics)
    trainer.fit(DataLoader(data, 16, shuffle=True), epochs=5)
    values = trainer.validate(DataLoader(data, 7))
    x, y = data.tensors
    predicted = model(x).argmax(1)
    assert values["val/recall"] == pytest.approx((predicted[y == 2] == 2).double().mean().item())
    assert values["val/accuracy"] == pytest.approx((predicted == y).double().mean().item())


def test_a_metric_is_computed_once_per_validation(model, data):
    """Three validations of a fit and one after it compute each metric four times, a function and an object."""
    calls = []

    class Counted:
        def reset(self):
            pass

        def update(self, outputs, targets):
            calls.append("update")

        def compute(self):
            calls.append("compute")
            return 0.0

    def function(outputs, targets):
        calls.append("function")
        return 0.0

    trainer = trainer_of(model, metrics={"object": Counted(), "function": function}, sanity_steps=0)
    trainer.fit(DataLoader(data, 16), DataLoader(data, 64), epochs=3)
    trainer.validate(DataLoader(data, 64))
    assert [calls.count(name) for name in ("update", "compute", "function")] == [4, 4, 4]


def test_validation_leaves_modes_as_they_were(data):
    """After a validation in mid-epoch the model trains again, but a layer that the user froze in eval mode stays there."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    modes = []

    class Freeze(fw.Callback):
        def on_epoch_start(self, state):
            state.model[1].eval()

        def on_step_end(self, state):
            modes.append((state.model.training, state.model[1].training, state.model[2].training))

    trainer_of(model, callbacks=[Freeze()]).fit(DataLoader(data, 16), DataLoader(data, 16), epochs=1, validate_every=2)
    assert {(True, False, True)} == set(modes)


def test_a_loss_that_a_callback_puts_in_is_moved_to_the_device(model, data):
    """A loss set in on_fit_start is moved to the Trainer's device before the first step."""
    moves = []

    class Moved(fw.CrossEntropy):
        def to(self, *args, **kwargs):
            moves.append((args, trainer.state.progress.step))
            return super().to(*args, **kwargs)

    class Replace(fw.Callback):
        def on_fit_start(self, state):
            state.loss = Moved()

    trainer = trainer_of(model, callbacks=[Replace()])
    trainer.fit(DataLoader(data, 16), epochs=1)
    assert moves == [((torch.device("cpu"),), 0)]


def test_the_rate_of_every_window_is_logged(model, data):
    """Each window, also one that an epoch cuts short, has the rate of its last step."""
    rates = []

    class Keep(fw.Callback):
        def on_log(self, state):
            rates.extend((r.step, r.value) for r in state.records if r.name == "train/optim/lr")

    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fw.Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        scheduler_interval="step",
        callbacks=[Keep()],
        log_every=3,
        device="cpu",
    ).fit(DataLoader(data, 16), DataLoader(data, 64), epochs=2)
    assert rates == [(3, 0.25), (4, 0.125), (7, 1 / 64), (8, 1 / 128)]


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("log_every", [2, 50])
def test_training_stops_at_non_finite_weights(model, data, caplog, validated, log_every):
    """A NaN in the inputs of batch 3 ends training with its window, before a validation; batch and weight are named."""
    x, y = data.tensors
    loader = [(x, y)] * 3 + [(x * math.nan, y)] + [(x, y)] * 4
    trainer = trainer_of(model, log_every=log_every, nonfinite="ignore")
    result = trainer.fit(loader, [(x.clone(), y)] if validated else None, epochs=9)
    step = 4 if log_every == 2 else 8
    assert result.stop_reason == f"the model has non-finite weights at step {step} (0.weight is the first)"
    assert result.best is None
    said = [r.getMessage() for r in caplog.records if "train/loss" not in r.getMessage()]
    assert f"training stops: {result.stop_reason}" in said
    said.remove(f"training stops: {result.stop_reason}")
    assert len(said) <= 1
    assert all("the training loss is nan at step 4 (batch index 3 " in text for text in said)
    assert len(said) == 1 or (validated, log_every) == (False, 50)  # the evaluation has told of it


def test_a_non_finite_loss_ends_nothing_while_the_weights_are_finite(model, data, caplog):
    """A step whose gradients the user drops leaves the weights as they are: one warning, and training goes on."""
    x, y = data.tensors

    result = trainer_of(model, callbacks=Guard()).fit([(x * math.nan, y), (x, y)], [(x.clone(), y)], epochs=4)
    assert result.stop_reason is None
    assert [math.isfinite(entry["val/loss"]) for entry in result.history] == [True] * 4
    assert [record.getMessage() for record in caplog.records] == ["train/loss is nan at step 2"]


def test_a_validation_batch_without_a_finite_loss_is_named_once(model, data, caplog):
    """One NaN among the validation inputs gives one warning, with the batch to look at."""
    x, y = data.tensors
    spoilt = x[:4].clone()
    spoilt[2, 1] = math.nan
    trainer_of(model).fit([(x.clone(), y)], [(x, y), (x, y), (spoilt, y[:4]), (spoilt, y[:4])], epochs=4)
    (record,) = caplog.records
    assert record.getMessage() == (
        "val/loss is nan at step 1; that of batch index 2 is the first with a non-finite loss"
    )


def test_losses_of_both_infinities_are_no_error(model, data):
    """A batch with a loss of inf and one of -inf make a mean that is NaN, not a fit that breaks off."""
    x, y = data.tensors

    class Unbounded(fw.Trainer):
        def validation_step(self, batch):
            return torch.tensor(math.inf if len(batch[1]) == 4 else -math.inf)

    trainer = Unbounded(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    result = trainer.fit([(x, y)], [(x[:4], y[:4]), (x[:3], y[:3])], epochs=1)
    assert math.isnan(result.history[0]["val/loss"])


def test_seed_makes_a_fit_repeatable(data):
    """Two fits with the same seed, shuffling and dropout end in the same bits; another seed does not."""

    def run(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        torch.manual_seed(99 + seed)
        trainer_of(model, seed=seed).fit(DataLoader(data, 8, shuffle=True), epochs=2)
        return model[0].weight

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_compiled_model_trains_like_itself(data):
    """A model that torch.compile returned trains, checkpoints and restores under its own names."""
    x, y = data.tensors
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        used = torch.compile(model, backend="eager") if compiled else model
        stop, norm = fw.EarlyStopping(patience=2), fw.GradientNorm()
        fw.Trainer(used, torch.optim.SGD(model.parameters(), 0.1), callbacks=[stop, norm], device="cpu").fit(
            [(x, y)], [(x, y)], epochs=3
        )
        results.append(model.weight.detach())
    assert torch.allclose(results[0], results[1], atol=1e-12)


def test_best_is_the_lowest_finite_validation_loss(model, data):
    """result.best is the entry with the lowest val/loss, its epoch and step."""
    result = trainer_of(model, lr=3.0).fit(DataLoader(data, 8), DataLoader(data, 64), epochs=6)
    lowest = min(result.history, key=lambda entry: entry["val/loss"])
    assert (lowest["epoch"], lowest["step"], lowest) == (result.best.epoch, result.best.step, result.best.metrics)


def test_train_loss_is_kept_over_a_fit_that_never_logs(model, data):
    """With more steps than values are kept apart on the device, the epoch's loss is still exact."""
    x, y = data.tensors
    expected = nn.functional.cross_entropy(model(x), y).item()
    result = trainer_of(model, lr=0.0, log_every=10**9).fit(
        [(x[i : i + 1], y[i : i + 1]) for i in range(64)] * 33, epochs=1
    )
    assert result.history[0]["train/loss"] == pytest.approx(expected, rel=1e-12)


# -- refused with a clear error ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
        ({"accumulate": 1.5}, "accumulate must be an integer of 1 or more, got 1.5"),
        ({"clip_norm": 0}, "clip_norm must be finite and greater than 0, got 0"),
        ({"clip_norm": math.nan}, "clip_norm must be finite and greater than 0, got nan"),
        ({"precision": "fp8"}, "precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ({"log_every": 0}, "log_every must be 1 or more, got 0"),
        ({"log_every": True}, "log_every must be an integer of 1 or more, got True"),
        ({"scheduler_interval": "batch"}, "scheduler_interval.*step.*epoch.*batch"),
        ({"scheduler": 3}, "scheduler.*3"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, "scheduler must be an instance"),
        (
            {
                "scheduler": torch.optim.lr_scheduler.StepLR(
                    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1), 1
                )
            },
            "scheduler belongs to another optimizer",
        ),
        ({"callbacks": fw.GradientNorm}, r"callbacks.*GradientNorm\(\)"),
        ({"seed": "a"}, "seed.*int.*a"),
        ({"device": "cuba"}, "device.*cuba"),
        ({"metrics": print}, "metrics must be a dict name -> function"),
        ({"metrics": {"loss": print}}, "can't be named 'loss'"),
        ({"metrics": {"f1": 3}}, r"metrics\['f1'\].*function.*int"),
        ({"callbacks": [fw.GradientNorm]}, r"callbacks.*GradientNorm\(\)"),
        ({"callbacks": [print]}, "callbacks.*print"),
        ({"loss": 3}, "loss.*3"),
        ({"unknown": 3}, "unknown"),
    ],
    ids=plain,
)
def test_options_out_of_range_are_refused(model, options, named):
    """A wrong option is refused when the Trainer is built: what was wrong, what was given, what is allowed."""
    loss = options.pop("loss", None)
    with pytest.raises((ValueError, TypeError), match=f"(?s){named}"):
        fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, **options)


def test_options_are_keyword_only(model):
    """A fourth positional argument is refused."""
    with pytest.raises(TypeError, match="positional"):
        fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), None, [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "epochs= or max_steps="),
        ({"epochs": 0}, "epochs.*1 or more.*0"),
        ({"max_steps": -1}, "max_steps.*-1"),
        ({"epochs": 1.5}, "epochs.*integer.*1.5"),
        ({"epochs": 1, "validate_every": 2}, "validate_every needs a val_loader"),
        ({"epochs": 1, "resume": "auto"}, "Checkpoint"),
        ({"epochs": 1, "resume": True}, 'resume must be a path or "auto", got True'),
    ],
    ids=plain,
)
def test_fit_arguments_are_checked(model, data, arguments, named):
    """A wrong argument of fit is refused before step 1."""
    with pytest.raises((ValueError, TypeError), match=named):
        trainer_of(model).fit(DataLoader(data, 16), **arguments)


def test_an_optimizer_of_another_model_is_refused(model, data):
    """An optimizer without a parameter of the model is an error: training would change nothing, silently."""
    other = nn.Linear(4, 3).double()
    with pytest.raises(ValueError, match="optimizer holds no parameter of the model"):
        fw.Trainer(model, torch.optim.SGD(other.parameters(), 0.1)).fit(DataLoader(data, 16), epochs=1)


def test_empty_and_wrong_loaders_are_refused(model, data):
    """Loaders without a batch, or that are no iterable, are refused by name."""
    empty, good = DataLoader(TensorDataset(torch.zeros(0, 4))), DataLoader(data, 16)
    with pytest.raises(ValueError, match="train_loader is empty"):
        trainer_of(model).fit(empty, epochs=1)
    with pytest.raises(ValueError, match="val_loader is empty"):
        trainer_of(model).fit(good, empty, epochs=1)
    with pytest.raises(TypeError, match="train_loader must be an iterable.*Linear"):
        trainer_of(model).fit(nn.Linear(1, 1), epochs=1)
    with pytest.raises(TypeError, match="train_loader must be an iterable.*TensorDataset: wrap it in DataLoader"):
        trainer_of(model).fit(data, epochs=1)
    for several in ({"a": good}, [good, good]):
        with pytest.raises(TypeError, match="train_loader must be one loader, got a .*there is one training loader"):
            trainer_of(model).fit(several, epochs=1)
    for several in ([good, good], (good, good)):
        with pytest.raises(TypeError, match="val_loader must be one loader, got a .* of 2 loaders: .*as a dict"):
            trainer_of(model).fit(good, several, epochs=1)
    with pytest.raises(ValueError, match="no validation batch was measured: the loader is empty"):
        trainer_of(model).validate(iter(()))


def test_what_steps_return_is_checked(model, data):
    """A training_step that returns nothing, or a vector, is refused with its name."""

    class Nothing(fw.Trainer):
        def training_step(self, batch):
            pass

    class Vector(fw.Trainer):
        def validation_step(self, batch):
            return torch.zeros(3)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="training_step returned None for all 4 batches so far: it must return"):
        Nothing(model, optimizer, device="cpu").fit(DataLoader(data, 16), epochs=1)
    with pytest.raises(TypeError, match=r"Vector.validation_step.*\(3,\)"):
        Vector(model, optimizer, device="cpu").validate(DataLoader(data, 16))


def test_other_batches_say_what_to_override(model, data):
    """A batch that does not follow the convention is refused with what it is and what to override."""
    x, y = data.tensors
    with pytest.raises(TypeError, match="tuple of 4.*override training_step"):
        trainer_of(model).fit([(x, x, y, y)], epochs=1)
    with pytest.raises(TypeError, match="dict with the keys 'x', 'y'.*override training_step"):
        trainer_of(model).fit([{"x": x, "y": y}], epochs=1)


def test_metrics_that_an_own_validation_step_forgot(model, data):
    """Metrics that saw no batch are an error that says what to call."""

    class Forgets(fw.Trainer):
        def validation_step(self, batch):
            return self.compute_loss(self.model(batch[0]), batch[1])

    trainer = Forgets(model, torch.optim.SGD(model.parameters(), 0.1), metrics={"a": lambda o, t: 0.0}, device="cpu")
    with pytest.raises(RuntimeError, match="'a'.*update_metrics"):
        trainer.validate(DataLoader(data, 16))


def test_wrong_targets_are_named_in_training(model, data):
    """A label out of range names the label and its index; float labels and wrong shapes name both sides."""
    x, y = data.tensors
    bad = y.clone()
    bad[5] = 7
    with pytest.raises(IndexError, match=r"(?s)7.*index.*5"):
        trainer_of(model).fit([(x, bad)], epochs=1)
    with pytest.raises(ValueError, match="float"):
        trainer_of(model).fit([(x, y.double())], epochs=1)
    with pytest.raises(ValueError, match="64.*60|60.*64"):
        trainer_of(model).fit([(x, y[:60])], epochs=1)


def test_validate_leaves_modes_that_differ_from_the_models(data):
    """Dropout kept in train mode within a model in eval mode stays so after a validation."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double().eval()
    model[1].train()
    trainer_of(model).validate(DataLoader(data, 16))
    assert [(m.training) for m in model.modules()] == [False, False, True]


def test_logged_tensors_are_taken_as_they_are_now(model, data):
    """A tensor that changes after it was logged is logged with its value of then; a function may reduce the window."""
    seen = {}

    class Log(fw.Callback):
        def __init__(self):
            self.count = torch.zeros(())

        def on_step_end(self, state):
            self.count += 1
            state.log("train/a", self.count)
            state.log("train/b", self.count, reduce=lambda values: values.sum(0))
            state.log("train/c", state.progress.step, reduce="max")
            state.log(("train/d", "train/e"), torch.stack([self.count, -self.count]))

        def on_log(self, state):
            seen.update({r.name: r.value for r in state.records})

    trainer_of(model, callbacks=[Log()], log_every=4).fit(DataLoader(data, 16), epochs=1)
    assert (seen["train/a"], seen["train/b"], seen["train/c"]) == (2.5, 10.0, 4.0)
    assert (seen["train/d"], seen["train/e"]) == (2.5, -2.5)


def test_a_stop_at_the_last_batch_completes_the_epoch(model, data):
    """A stop asked for at the last step of an epoch leaves that epoch counted."""

    class Stop(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 4:
                state.request_stop("enough")

    trainer = trainer_of(model, callbacks=[Stop()])
    trainer.fit(DataLoader(data, 16), epochs=3)
    assert (trainer.state.progress.epoch, trainer.state.progress.epoch_batch) == (1, 0)


def test_a_sampler_is_told_the_epoch(model, data):
    """A sampler with set_epoch gets 0, 1, 2, also over two fits."""
    told = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    trainer = trainer_of(model)
    loader = DataLoader(data, 16, sampler=Sampler(data))
    trainer.fit(loader, epochs=2)
    trainer.fit(loader, epochs=1)
    assert told == [0, 1, 2]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_does_not_step_where_the_scaler_left_the_step_out(data, interval):
    """Under fp16 an overflowing step moves neither the weights nor the learning rate."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.weight.detach().clone()
    x, y = data.tensors
    fw.Trainer(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        scheduler_interval=interval,
        precision="fp16",
        device="cpu",
    ).fit([(x.float() * 1e4, y)], epochs=2)
    assert torch.equal(before, model.weight)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_error_in_a_validation_says_where(model, data):
    """A label out of range names the evaluation and its batch, and a metric that fails its name."""
    x, y = data.tensors
    with pytest.raises(IndexError) as info:
        trainer_of(model).fit([(x, y)], [(x, y), (x, y + 3)], epochs=1)
    assert "batch 1" in info.value.__notes__[0]
    assert "validation" in info.value.__notes__[0]
    with pytest.raises(TypeError) as info:
        trainer_of(model, metrics={"f1": lambda _: 0.0}).fit([(x, y)], [(x, y)], epochs=1)
    assert "raised by the metric 'f1'" in info.value.__notes__


def test_the_share_of_the_baseline_that_is_left_can_be_monitored(model, data):
    """Where the data sets show their targets, val/loss_left is among the names."""
    result = trainer_of(model, callbacks=fw.EarlyStopping("val/loss_left")).fit(
        DataLoader(data, 16), DataLoader(data, 16), epochs=2
    )
    assert len(result.history) == 2


class Masked(nn.Module):
    """A classifier with infinite values that are meant to be there, and a buffer that training changes."""

    def __init__(self, normalized):
        super().__init__()
        self.norm = nn.BatchNorm1d(4) if normalized else nn.Identity()
        self.linear = nn.Linear(4, 3)
        self.mask = nn.Parameter(torch.tensor([0.0, 0.0, -math.inf]), requires_grad=False)
        self.register_buffer("other", self.mask.detach().clone())

    def forward(self, inputs):
        return self.linear(self.norm(inputs)) + self.mask + self.other


def test_infinite_masks_are_no_ruined_weights(tmp_path, data):
    """Frozen parameters and buffers that are infinite from the start neither stop a fit nor keep checkpoints from it."""
    x, y = data.tensors[0], data.tensors[1].clamp(max=1)
    model = Masked(normalized=False).double()
    spoilt = x.clone()
    spoilt[0] = math.nan

    trainer = trainer_of(model, callbacks=[Guard(), fw.Checkpoint(tmp_path)])
    result = trainer.fit([(x, y), (spoilt, y)], [(x, y)], epochs=2)
    assert result.stop_reason is None
    assert (tmp_path / "epoch-2.pt").exists()


def test_ruined_statistics_of_a_batch_norm_stop_training_too(tmp_path, data):
    """A NaN that reached a running mean stays there, though no gradient carried it into a weight."""
    x, y = data.tensors[0], data.tensors[1].clamp(max=1)
    spoilt = x.clone()
    spoilt[0] = math.nan

    class Spoil(fw.Callback):
        def on_epoch_start(self, state):
            if state.progress.epoch == 1:
                state.train_loader[0] = (spoilt, y)

    trainer = trainer_of(Masked(normalized=True).double(), callbacks=[Guard(), Spoil(), fw.Checkpoint(tmp_path)])
    result = trainer.fit([(x, y), (x, y)], [(x, y)], epochs=9)
    assert result.stop_reason == "the model has non-finite weights at step 4 (norm.running_mean is the first)"
    assert (tmp_path / "epoch-1.pt").exists()
    assert not (tmp_path / "epoch-2.pt").exists()


def test_buffers_that_are_no_statistics_are_left_alone(tmp_path, data):
    """A sparse buffer, and a mask that is made at the first forward pass, keep no fit and no checkpoint from working."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("adjacency", torch.eye(4).double().to_sparse(), persistent=False)

        def forward(self, inputs):
            if not hasattr(self, "mask"):
                self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]), persistent=False)
            return self.linear(torch.sparse.mm(self.adjacency, inputs.T).T) + self.mask

    x, y = data.tensors[0], data.tensors[1].clamp(max=1)
    trainer = trainer_of(Graph().double(), callbacks=fw.Checkpoint(tmp_path))
    assert trainer.fit([(x, y)], [(x, y)], epochs=1).stop_reason is None
    assert (tmp_path / "epoch-1.pt").exists()


def test_weights_that_the_last_step_ruined_are_not_measured(model, data):
    """A NaN that came with the last gradient before a validation, under a finite loss, is seen before it is best."""
    x, y = data.tensors

    class Spoil(fw.Callback):
        def on_gradients_ready(self, state):
            state.model[0].weight.grad[0, 0] = math.nan

    result = trainer_of(model, callbacks=Spoil(), nonfinite="ignore").fit([(x, y)], [(x, y)], epochs=3)
    assert result.stop_reason == "the model has non-finite weights at step 1 (0.weight is the first)"
    assert result.history == []


def test_an_empty_loader_without_a_length_is_not_validated(model):
    """A loader that turns out to be empty raises before any validation."""

    class Empty:
        def __iter__(self):
            return iter([])

    seen = []

    class Seen(fw.Callback):
        def on_validation_start(self, state):
            seen.append(state.progress.step)

    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), callbacks=Seen())
    val = [(torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="train_loader yielded no batch in epoch 1"):
        trainer.fit(Empty(), val, epochs=1)
    assert seen == []
