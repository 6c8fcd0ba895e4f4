"""Bad input is refused at once, in words that say what to write; nothing that was written is lost."""

import asyncio
import math
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x.clone(), y.clone()), batch_size=16)


def trainer_of(model=None, lr=0.1, *, scheduler=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(5, 2) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    made = None if scheduler is None else torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler)
    return fw.Trainer(model, optimizer, scheduler=made, device="cpu", **options)


class Logs(fw.Callback):
    """Logs a value after each step."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def on_step_end(self, state):
        state.log(self.name, self.value)


LOGGED = {
    "a tensor of another shape": ("train/x", torch.zeros(3), ValueError, r"log\('train/x'\): a value must be a number"),
    "too many values": (["train/x", "train/y"], torch.zeros(3), ValueError, "a tensor of 2 values, one for each name"),
    "one value for two names": (["train/x", "train/y"], 1.0, ValueError, "a tensor of 2 values"),
    "a list": (
        "train/x",
        [1.0, 2.0],
        TypeError,
        "a value must be a number, a real tensor, a text or a record, got list",
    ),
    "None": ("train/x", None, TypeError, "got NoneType"),
    "complex": ("train/x", torch.zeros((), dtype=torch.complex64), TypeError, "got a tensor of torch.complex64"),
    "a number as name": (3, 1.0, TypeError, "log takes a name such as 'train/...', or a list of names, got 3"),
    "a number among names": (["train/x", 3], torch.zeros(2), TypeError, "log takes a name"),
}


@pytest.mark.parametrize("case", LOGGED)
def test_what_cannot_be_logged_is_refused_when_it_is_logged(case):
    """The error comes from the call itself, names the value, and says which callback made it."""
    name, value, kind, message = LOGGED[case]
    trainer = trainer_of(callbacks=Logs(name, value))
    with pytest.raises(kind, match=message) as info:
        trainer.fit(loader(), epochs=1)
    assert "raised by Logs.on_step_end" in info.value.__notes__
    assert trainer.state.progress.step == 1


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(1, 1), torch.ones((), dtype=torch.int8), True, 3])
def test_one_value_in_any_form_is_logged(value):
    """Tensors of one value, bools and integers are numbers."""
    trainer = trainer_of(callbacks=Logs("train/x", value))
    trainer.fit(loader(), epochs=1)
    [record] = [r for r in trainer.state.records if r.name == "train/x"]
    assert record.value == float(value)


def test_a_shape_that_changes_within_a_window_is_refused():
    """The error comes at the first value that differs, and names both shapes."""

    class Deferred(fw.Callback):
        def on_step_end(self, state):
            state.log.defer(torch.zeros(state.progress.step), self.receive)

        def receive(self, _):
            return {}

    trainer = trainer_of(callbacks=Deferred())
    with pytest.raises(ValueError, match=r"shape \(2,\), but \(1,\) for earlier values"):
        trainer.fit(loader(), epochs=1)
    assert trainer.state.progress.step == 2


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_out_of_range_is_refused(seed):
    """NumPy takes no seed below 0 or above 2**32 - 1, so neither does fit."""
    with pytest.raises(ValueError, match=f"seed must be from 0 to 4294967295, got {seed}"):
        trainer_of(seed=seed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")])
def test_a_missing_gpu_is_refused(device):
    """The error comes when the Trainer is built."""
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no CUDA device that torch can use: use 'auto', or 'cpu'"):
        fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device=device)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1, torch.tensor(math.nan)])
def test_a_wrong_learning_rate_is_refused_before_step_1(lr):
    """Also one that was set after the optimizer was made."""
    trainer = trainer_of(lr=lr)
    with pytest.raises(ValueError, match="the optimizer's lr must be finite and at least 0"):
        trainer.fit(loader(), epochs=1)
    assert trainer.state.progress.step == 0


@pytest.mark.parametrize(("name", "value"), [("weight_decay", math.nan), ("momentum", math.inf)])
def test_an_option_that_is_not_finite_is_refused(name, value):
    """It would ruin the weights in the first step."""
    trainer = trainer_of()
    trainer.optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"the optimizer's {name} must be finite, got {value} in parameter group 0"):
        trainer.fit(loader(), epochs=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_schedule_that_goes_wrong_stops_before_its_step(bad):
    """The weights are those of the step before."""
    trainer = trainer_of(scheduler=lambda n: bad if n > 3 else 1.0)
    with pytest.raises(ValueError, match="the learning rate is .* at step 5, so this step is not taken"):
        trainer.fit(loader(), epochs=2)
    plain = trainer_of()
    plain.fit(loader(), epochs=1)  # 4 steps
    assert torch.equal(trainer.model.weight, plain.model.weight)


SOFT = {
    "sum": ([0.5, 0.2], "with the sum 0.7 at index 40"),
    "negative": ([-0.5, 1.5], r"at least 0 and sum to 1 over the classes, got \[-0.5, 1.5\]"),
    "nan": ([math.nan, 1.0], "at index 40"),
    "several labels": ([1.0, 1.0], "use BinaryCrossEntropy"),
}


@pytest.mark.parametrize("case", SOFT)
def test_soft_labels_must_be_probabilities(case):
    """Rows that are negative, or do not sum to 1, are named."""
    row, message = SOFT[case]
    y = torch.tensor([[0.0, 1.0]]).repeat(64, 1)
    y[40] = torch.tensor(row)
    with pytest.raises(ValueError, match=message):
        fw.CrossEntropy()(torch.randn(64, 2), y)


def test_smoothed_mixed_and_masked_rows_are_probabilities():
    """Rounding, label smoothing and mixup pass, in half precision and for images too, and rows of weight 0."""
    y = nn.functional.one_hot(Y, 2).float()
    mixed = 0.3 * y + 0.7 * y.roll(1, 0)
    for rows in (mixed, mixed.bfloat16(), mixed * 0.9 + 0.05):
        expected = nn.functional.cross_entropy(torch.ones(64, 2), rows.float())
        assert fw.CrossEntropy()(torch.ones(64, 2), rows) == pytest.approx(float(expected), rel=1e-2)
    fw.CrossEntropy()(torch.randn(4, 3, 5, 5), torch.full((4, 3, 5, 5), 1 / 3))
    weight = torch.ones(64)
    weight[3], mixed[3] = 0, math.nan
    assert fw.CrossEntropy()(torch.ones(64, 2), mixed, sample_weight=weight).isfinite()


def test_frozen_and_detached_models_are_told_apart():
    """The error of a loss without a gradient says why there is none."""
    trainer = trainer_of()
    trainer.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="all parameters of the model are frozen"):
        trainer.fit(loader(), epochs=1)

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(RuntimeError, match="the outputs were detached"):
        trainer_of(Detached(5, 2)).fit(loader(), epochs=1)


@pytest.mark.parametrize("which", ["train", "validation"])
@pytest.mark.parametrize("label", [7, -1])
def test_a_label_out_of_range_anywhere_is_found_in_the_first_step(which, label):
    """Where the data set exposes its targets, all of them are looked at before a weight changes."""
    y = Y.clone()
    y[40] = label
    bad, good = loader(y=y), loader()
    trainer = trainer_of()
    before = trainer.model.weight.detach().clone()
    name = "train_loader" if which == "train" else "val_loader"
    with pytest.raises(IndexError, match=f"label {label} at index 40 of the targets of {name} is out of range"):
        trainer.fit(*((bad, good) if which == "train" else (good, bad)), epochs=1)
    assert torch.equal(trainer.model.weight, before)


def test_labels_that_a_step_changes_are_its_own_affair():
    """The stored targets are not judged where the training step makes others of them."""

    class FromOne(fw.Trainer):
        def training_step(self, batch):
            return self.compute_loss(self.model(batch[0]), batch[1] - 1)

        def validation_step(self, batch):
            return self.compute_loss(self.model(batch[0]), batch[1] - 1)

    model = nn.Linear(5, 2)
    trainer = FromOne(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    trainer.fit(loader(y=Y + 1), loader(y=Y + 1), epochs=1)
    assert trainer.state.progress.step == 4


WEIGHTLESS = {
    "ignored": ([(X[:16], torch.full((16,), -100))] * 4, None),
    "sample weights": ([(X[:16], Y[:16], torch.zeros(16))] * 4, None),
    "class weights": ([(X[:16], torch.zeros(16, dtype=torch.int64))] * 4, fw.CrossEntropy([0.0, 1.0])),
}


@pytest.mark.parametrize("case", WEIGHTLESS)
def test_an_epoch_in_which_nothing_counts_is_an_error(case):
    """A fit that learns nothing is no success."""
    data, loss = WEIGHTLESS[case]
    with pytest.raises(ValueError, match="no example of the last 4 steps counted"):
        trainer_of(loss=loss).fit(data, epochs=3)


def test_batches_in_which_nothing_counts_are_fine():
    """As long as others have examples that do; and a resumed or validated fit is not taken for one without."""
    nothing = (X[:16], torch.full((16,), -100))
    trainer = trainer_of()
    trainer.fit([nothing, nothing, (X[:16], Y[:16])], [(X[16:], Y[16:])], epochs=60, validate_first=True)
    trainer.fit([nothing, (X[:16], Y[:16])], [(X[16:], Y[16:])], epochs=1, validate_every=1)
    assert trainer.state.progress.step == 182


def test_the_same_callback_twice_is_refused():
    """Each of its hooks would run twice."""
    stop = fw.EarlyStopping()
    with pytest.raises(ValueError, match="the same EarlyStopping is given twice"):
        trainer_of(callbacks=[stop, stop])


def test_an_async_hook_is_refused():
    """It would never run."""
    with pytest.raises(TypeError, match=r"Slow.on_step_end is async, and hooks are called, not awaited"):

        class Slow(fw.Callback):
            async def on_step_end(self, state):
                await asyncio.sleep(0)


def test_an_error_in_a_hand_written_loop_says_where():
    """The note names epoch, batch and steps."""
    model = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train():
        with fw.Watch(model, optimizer, train_loader=loader()) as watch:
            for epoch in watch.epochs(2):
                for i, (x, y) in enumerate(watch.train()):
                    watch.loss(model(x[:, :4] if (epoch, i) == (1, 2) else x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as info:
        train()
    assert "raised in training: epoch 2, batch index 2, after 6 steps" in info.value.__notes__


def test_an_unreached_parameter_is_named(caplog):
    """One warning in the first step; frozen parameters are none."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.a(x)

    trainer_of(Two()).fit(loader(), epochs=2)
    [record] = [r for r in caplog.records if "unreached" in r.getMessage()]
    assert "2 parameters got no gradient in the first step (`b.weight`, `b.bias`)" in record.getMessage()
    caplog.clear()
    model = Two()
    model.b.requires_grad_(False)
    trainer_of(model).fit(loader(), epochs=1)
    assert "no gradient" not in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_sigusr1_saves_and_ends(tmp_path):
    """Slurm's warning ends the fit after the step, saved, with 128 + 10; a handler of the user's is left alone."""

    class Send(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step == 2:  # noted in the next step
                signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(SystemExit) as info:
        trainer_of(callbacks=[fw.Checkpoint(tmp_path), Send()]).fit(loader(), epochs=2)
    assert info.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "step-3.pt").exists()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        trainer_of(callbacks=[Send()]).fit(loader(), epochs=2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [1]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("by_hand", [False, True])
def test_weights_of_examples_that_are_not_finite_are_refused(bad, by_hand):
    """The error names the value, also where a whole data set of such weights is exposed."""
    x, y = torch.randn(16, 4), torch.arange(16) % 2
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = [(x, y, torch.full((16,), bad))]

    def train():
        if not by_hand:
            fw.Trainer(model, optimizer, device="cpu").fit(loader, epochs=1)
            return
        with fw.Watch(model, optimizer, train_loader=loader) as watch:
            for _ in watch.epochs(1):
                for a, b, w in watch.train():
                    watch.loss(model(a), b, w).backward()

    with pytest.raises(ValueError, match="sample_weight must be finite and at least 0, got (-?inf|nan) at index 0"):
        train()


def test_a_path_with_a_null_character_is_refused_when_it_is_given():
    """Python's own error comes from the first use, and does not name the path."""
    with pytest.raises(ValueError, match=r"must not contain a null character, got 'a\\x00b'"):
        fw.Checkpoint("a\0b")


def test_skip_checks_that_is_no_list_is_refused():
    """The error says what is allowed."""
    model = nn.Linear(4, 2)
    with pytest.raises(TypeError, match="skip_checks must be a list of names, got 5"):
        fw.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), skip_checks=5)


def test_an_error_before_training_is_not_placed_in_an_epoch():
    """What a check finds before step 1 is not said to be raised in training."""
    trainer = trainer_of(callbacks=fw.EarlyStopping("val/accurcy"))
    with pytest.raises(ValueError, match="EarlyStopping monitors 'val/accurcy'") as info:
        trainer.fit(loader(), loader(), epochs=1)
    assert not any("raised in training" in note for note in getattr(info.value, "__notes__", ()))
