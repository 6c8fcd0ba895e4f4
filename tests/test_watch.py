"""A hand-written loop with a Watch: the same figures as the Trainer, and an error for each missing call."""

import contextlib
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitwatch as fw
from tests.test_trainer_order import Tracer, documented


class Scalars(fw.Callback):
    """Keeps every number that is logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, state):
        self.seen += [(r.step, r.name, r.value) for r in state.records if isinstance(r.value, float)]


class Subclassed(fw.Trainer):
    """Writes out the default steps."""

    def training_step(self, batch):
        x, y = batch
        return self.compute_loss(self.model(x), y)

    def validation_step(self, batch):
        x, y = batch
        output = self.model(x)
        self.update_metrics(output, y)
        return self.compute_loss(output, y)


def recall(outputs, targets):
    return (outputs.argmax(1)[targets == 1] == 1).double().mean()


def parts(data, *, shuffle=True):
    """Everything that two runs need to be the same: model, optimizer, loaders, callbacks."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    x, y = data.tensors
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    train, val = TensorDataset(x[order[:45]], y[order[:45]]), TensorDataset(x[order[45:]], y[order[45:]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scalars = Scalars()
    callbacks = [
        fw.WeightedLoss("balanced"),
        fw.GradientNorm(),
        fw.OverfittingDetector(),
        fw.EarlyStopping(patience=4),
        scalars,
    ]
    return model, optimizer, callbacks, DataLoader(train, 8, shuffle=shuffle), DataLoader(val, 10), scalars


def by_trainer(data, kind, *, schedule=None, max_steps=None, **options):
    model, optimizer, callbacks, train, val, scalars = parts(data)
    scheduler = schedule(optimizer) if schedule else None
    trainer = kind(
        model,
        optimizer,
        callbacks=callbacks,
        metrics={"recall": recall},
        log_every=4,
        scheduler=scheduler,
        scheduler_interval="step",
        **options,
    )
    return model, trainer.fit(train, val, epochs=12, max_steps=max_steps), scalars.seen


def by_hand(data, *, schedule=None, own_iteration=False, **options):
    model, optimizer, callbacks, train, val, scalars = parts(data)
    scheduler = schedule(optimizer) if schedule else None
    with fw.Watch(
        model,
        optimizer,
        callbacks,
        train_loader=train,
        val_loader=val,
        metrics={"recall": recall},
        log_every=4,
        scheduler=scheduler,
        **options,
    ) as watch:
        for _ in watch.epochs(12):
            for i, (x, y) in enumerate(train if own_iteration else watch.train()):
                watch.loss(model(x), y).backward()
                due = (i + 1) % options.get("accumulate", 1) == 0 or i + 1 == len(train)
                assert own_iteration or due == watch.step_due
                if due:
                    optimizer.step()
                    if scheduler:
                        scheduler.step()
                    optimizer.zero_grad()
            with watch.validating():
                for x, y in val:
                    watch.loss(model(x), y)
    return model, watch.result, scalars.seen


def assert_equal_runs(first, second):
    """Weights, history, verdict, stop and every logged number are equal to the bit."""
    (model, result, scalars), (other, other_result, other_scalars) = first, second
    assert result == other_result
    assert len(result.history) > 2
    assert sorted(scalars) == sorted(other_scalars)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


OPTIONS = [
    {},
    {"accumulate": 3},
    {"clip_norm": 0.3},
    {"accumulate": 2, "clip_norm": 0.3, "schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 5)},
    {"max_steps": 27},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_a_hand_written_loop_is_the_trainer_to_the_bit(data, options):
    """With the same data order, Watch, Trainer and a Trainer with written-out steps give equal bits everywhere."""
    expected = by_trainer(data, fw.Trainer, **options)
    assert_equal_runs(expected, by_hand(data, **options))
    assert_equal_runs(expected, by_trainer(data, Subclassed, **options))


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["plain", "accumulate"])
def test_a_loop_over_the_loader_itself_is_the_same(data, options):
    """Batches may come from the loader in place of watch.train(): the figures are the same to the bit."""
    assert_equal_runs(by_hand(data, **options), by_hand(data, own_iteration=True, **options))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
def test_the_gradient_of_a_step_is_that_of_one_big_batch(data, accumulate):
    """Whatever the accumulation, the step has the gradient of torch's weighted cross-entropy on all its examples."""
    model, optimizer, _, train, _, _ = parts(data, shuffle=False)
    del model[3], model[1]  # neither depends on the other examples of a batch
    weight = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    batches = list(train)
    with fw.Watch(model, optimizer, loss=fw.CrossEntropy(weight), train_loader=train, accumulate=accumulate) as watch:
        for _ in watch.epochs(1):
            window = []
            for x, y in watch.train():
                window.append((x, y))
                loss = watch.loss(model(x), y)
                expected = F.cross_entropy(model(x), y, weight)
                torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-14, atol=0)
                loss.backward()
                if watch.step_due:
                    watch.before_step()
                    xs, ys = (torch.cat(tensors) for tensors in zip(*window, strict=True))
                    big = torch.autograd.grad(F.cross_entropy(model(xs), ys, weight), list(model.parameters()))
                    for p, g in zip(model.parameters(), big, strict=True):
                        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)
                    optimizer.step()
                    optimizer.zero_grad()
                    window = []
    assert watch.state.progress.step == -(-len(batches) // accumulate)


def test_a_penalty_goes_through_backward_and_is_exact_under_accumulation(data):
    """watch.backward(sums + penalty) adds the penalty once to the loss of the step, however it is cut."""
    gradients = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        x, y = data.tensors
        loader = [(x[:64], y[:64])] if accumulate == 1 else list(zip(x.split(22), y.split(22), strict=True))
        with fw.Watch(model, optimizer, train_loader=loader, accumulate=accumulate) as watch:
            for _ in watch.epochs(1):
                for a, b in watch.train():
                    penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
                    watch.backward(watch.sums(model(a), b) + penalty)
                watch.before_step()
                gradients.append([p.grad.clone() for p in model.parameters()])
                optimizer.step()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_with_a_grad_scaler_is_the_trainer_to_the_bit(data, accumulate):
    """Autocast and GradScaler by hand, with before_step, give the weights of Trainer(precision="fp16")."""
    x, y = data.tensors[0].float(), data.tensors[1]
    loader = list(zip(x.split(8), y.split(8), strict=True))

    def model_and_optimizer():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return model, torch.optim.SGD(model.parameters(), 0.1)

    model, optimizer = model_and_optimizer()
    fw.Trainer(model, optimizer, precision="fp16", accumulate=accumulate).fit(loader, epochs=3)
    other, optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu")
    with fw.Watch(other, optimizer, train_loader=loader, scaler=scaler, accumulate=accumulate) as watch:
        for _ in watch.epochs(3):
            for a, b in watch.train():
                with torch.autocast("cpu", torch.float16):
                    loss = watch.loss(other(a), b)
                scaler.scale(loss).backward()
                if watch.step_due:
                    watch.before_step()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_step_that_the_scaler_skips_is_counted_as_in_the_trainer(data):
    """A step with an overflow changes nothing and counts, by hand as in the Trainer."""
    x, y = data.tensors[0].float(), data.tensors[1]
    model = nn.Linear(4, 3)
    before = model.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with fw.Watch(model, optimizer, train_loader=[(x, y)], scaler=scaler) as watch:
        for _ in watch.epochs(1):
            for a, b in watch.train():
                scaler.scale(watch.loss(model(a) * 1e30, b)).backward()
                watch.before_step()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    assert watch.state.progress.step == 1
    assert torch.equal(before, model.weight)


def small(**options):
    """A watch over two batches, with its model, optimizer and loader."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    return fw.Watch(model, optimizer, train_loader=loader, val_loader=loader, **options), model, optimizer, loader


def without_with():
    watch, model, _, ((x, y), _) = small()
    watch.loss(model(x), y)


def without_epochs():
    watch, model, _, ((x, y), _) = small()
    with watch:
        watch.loss(model(x), y)


def without_step():
    watch, model, _, loader = small()
    with watch:
        for _ in watch.epochs(1):
            for x, y in loader:
                watch.loss(model(x), y).backward()


def without_last_step():
    watch, model, optimizer, _ = small(accumulate=2)
    with watch:
        for _ in watch.epochs(1):
            for i, (x, y) in enumerate(watch.train()):
                watch.loss(model(x), y).backward()
                if i == 5:
                    optimizer.step()


def without_loss():
    watch, model, optimizer, ((x, y), _) = small()
    with watch:
        for _ in watch.epochs(1):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def without_backward():
    watch, model, optimizer, ((x, y), _) = small()
    with watch:
        for _ in watch.epochs(1):
            watch.loss(model(x), y)
            optimizer.step()


def without_zero_grad():
    watch, model, optimizer, loader = small()
    with watch:
        for _ in watch.epochs(1):
            for x, y in loader:
                watch.loss(model(x), y).backward()
                optimizer.step()


def without_validating():
    watch, model, _, ((x, y), _) = small()
    with watch:
        for _ in watch.epochs(1):
            with torch.no_grad():
                watch.loss(model(x), y)


def without_validation_loss():
    watch, _, _, _ = small()
    with watch:
        for _ in watch.epochs(1):
            with watch.validating():
                pass


def without_before_step():
    scaler = torch.amp.GradScaler("cpu")
    watch, model, optimizer, ((x, y), _) = small(scaler=scaler)
    with watch:
        for _ in watch.epochs(1):
            scaler.scale(watch.loss(model(x), y)).backward()
            scaler.step(optimizer)


def without_optimizer_step():
    watch, model, _, ((x, y), _) = small()
    with watch:
        for _ in watch.epochs(1):
            watch.loss(model(x), y).backward()
            watch.before_step()
            watch.loss(model(x), y)


def divided():
    watch, model, _, ((x, y), _) = small(accumulate=2)
    with watch:
        for _ in watch.epochs(1):
            (watch.loss(model(x), y) / 2).backward()


def without_backward_in_a_window():
    watch, model, _, ((x, y), _) = small(accumulate=2)
    with watch:
        for _ in watch.epochs(1):
            watch.loss(model(x), y)
            watch.loss(model(x), y).backward()


def penalty_in_a_window():
    watch, model, _, ((x, y), _) = small(accumulate=2)
    with watch:
        for _ in watch.epochs(1):
            (watch.loss(model(x), y) + 0.1 * model.weight.square().sum()).backward()


def zero_grad_before_each_micro_batch():
    watch, model, optimizer, loader = small(accumulate=2)
    with watch:
        for _ in watch.epochs(1):
            for x, y in loader:
                optimizer.zero_grad()
                watch.loss(model(x), y).backward()


def validation_batches_after_training():
    watch, model, optimizer, loader = small()
    with watch:
        for _ in watch.epochs(1):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            for x, y in loader:
                watch.loss(model(x), y)


def training_inside_validating():
    watch, _, _, _ = small()
    with watch:
        for _ in watch.epochs(1):
            with watch.validating():
                next(watch.train())


def two_heads():
    watch, model, _, ((x, y), _) = small(accumulate=2)
    with watch:
        for _ in watch.epochs(1):
            (watch.loss(model(x), y) + watch.loss(2 * model(x), y)).backward()


def stepped_twice():
    watch, model, optimizer, ((x, y), _) = small()
    with watch:
        for _ in watch.epochs(1):
            watch.loss(model(x), y).backward()
            optimizer.step()
            optimizer.step()


def skipped_without_before_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    watch, model, optimizer, ((x, y), _) = small(scaler=scaler)
    with watch:
        for _ in watch.epochs(1):
            for _ in range(2):
                scaler.scale(watch.loss(model(x) * 1e30, y)).backward()
                scaler.step(optimizer)
                scaler.update()


def divided_and_scaled():
    scaler = torch.amp.GradScaler("cpu")
    watch, model, _, ((x, y), _) = small(accumulate=2, scaler=scaler)
    with watch:
        for _ in watch.epochs(1):
            scaler.scale(watch.loss(model(x), y) / 2).backward()


def without_val_loader():
    model = nn.Linear(3, 2)
    with fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1), train_loader=[1]) as watch, watch.validating():
        pass


def without_train_loader():
    model = nn.Linear(3, 2)
    with fw.Watch(model, torch.optim.SGD(model.parameters(), 0.1)) as watch:
        for _ in watch.epochs(1):
            list(watch.train())


def after_an_exception():
    watch, model, _, ((x, y), _) = small()
    with contextlib.suppress(KeyError), watch:
        for _ in watch.epochs(1):
            raise KeyError
    watch.loss(model(x), y)


def an_unknown_metric_before_a_validation():
    model = nn.Linear(3, 2)
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fw.Watch(model, optimizer, fw.EarlyStopping("val/lost"), train_loader=loader, val_loader=loader) as watch:
        watch.validate()


def nested():
    watch, _, _, _ = small()
    with watch:
        for _ in watch.epochs(1):
            with watch.validating(), watch.validating():
                pass


def entered_twice():
    watch, _, _, _ = small()
    with watch:
        pass
    with watch:
        pass


@pytest.mark.parametrize(
    ("loop", "named"),
    [
        (without_with, r"with Watch\(\.\.\.\) as watch"),
        (without_epochs, r"for epoch in watch\.epochs"),
        (without_step, r"optimizer\.step\(\) was not called after 1 batch"),
        (without_last_step, r"ended with 2 batches without a step: call optimizer\.step\(\)"),
        (without_loss, r"call watch\.loss\(output, target\)"),
        (without_backward, r"call backward\(\) on what watch\.loss"),
        (without_zero_grad, r"call optimizer\.zero_grad\(\) after optimizer\.step\(\)"),
        (without_validating, r"with watch\.validating\(\)"),
        (without_validation_loss, "no validation batch was measured"),
        (without_before_step, r"call watch\.before_step\(\) before scaler\.step"),
        (without_optimizer_step, r"optimizer\.step\(\) was not called after watch\.before_step\(\)"),
        (divided, r"multiplied by 0\.5 before backward\(\)"),
        (divided_and_scaled, r"multiplied by 0\.5 before backward\(\)"),
        (without_backward_in_a_window, r"call backward\(\) on what watch\.loss.*before the next batch"),
        (penalty_in_a_window, r"add a penalty.*with watch\.backward\(watch\.sums\(\.\.\.\) \+ penalty\)"),
        (zero_grad_before_each_micro_batch, r"zero_grad\(\) only after optimizer\.step\(\), not before each batch"),
        (validation_batches_after_training, r"validation batches belong inside `with watch\.validating\(\):`"),
        (training_inside_validating, r"train\(\) was called inside"),
        (two_heads, r"watch\.backward\(watch\.sums\(\.\.\.\) \+ other_loss\)"),
        (stepped_twice, r"optimizer\.step\(\) was called twice"),
        (skipped_without_before_step, r"watch\.before_step\(\) or scaler\.step\(optimizer\) was not called"),
        (without_val_loader, "validating.. needs the val_loader of the Watch"),
        (without_train_loader, "train.. needs the train_loader of the Watch"),
        (after_an_exception, r"with Watch\(\.\.\.\) as watch"),
        (
            an_unknown_metric_before_a_validation,
            "EarlyStopping monitors 'val/lost'.*it will measure train/loss, val/loss",
        ),
        (nested, "a validation is running"),
        (entered_twice, "entered only once"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_missing_call_is_named(loop, named):
    """Calls in the wrong order raise an error that names the missing one."""
    with pytest.raises((RuntimeError, ValueError), match=named):
        loop()


def test_zero_grad_may_come_before_backward():
    """The other common place for zero_grad, right before backward(), is no error."""
    watch, model, optimizer, loader = small()
    with watch:
        for _ in watch.epochs(2):
            for x, y in loader:
                loss = watch.loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert watch.state.progress.step == 4


@pytest.mark.parametrize("end", ["error", "break", "stop"])
def test_on_fit_end_runs_on_every_exit(data, end):
    """An exception, a break and a requested stop all end in on_fit_end, with the best weights restored."""
    model, optimizer, _, train, val, _ = parts(data)
    ends = []

    class Ends(fw.Callback):
        def on_fit_end(self, state):
            ends.append(state.error)

        def on_validation_end(self, state):
            if end == "stop" and len(state.history) == 3:
                state.request_stop("enough")

    def loop():
        best = None
        with fw.Watch(
            model, optimizer, [fw.EarlyStopping(patience=9), Ends()], train_loader=train, val_loader=val
        ) as w:
            for epoch in w.epochs(6):
                for x, y in w.train():
                    w.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                w.validate()
                if w.state.history.is_best:
                    best = {name: value.clone() for name, value in model.state_dict().items()}
                if epoch == 2 and end == "break":
                    break
                if epoch == 2 and end == "error":
                    raise KeyError("planted")
        return w, best

    if end == "error":
        with pytest.raises(KeyError, match="planted"):
            loop()
        assert [type(error) for error in ends] == [KeyError]
        return
    watch, best = loop()
    assert ends == [None]
    assert watch.state.progress.epoch == 3
    assert watch.result.stop_reason == ("enough" if end == "stop" else None)
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name])


def test_a_watch_resumes_to_the_bit(data, tmp_path):
    """Three epochs, and five more from their checkpoint, are eight epochs in one go."""

    def run(folder, epochs, resume=None):
        model, optimizer, callbacks, train, val, _ = parts(data)  # seeds
        callbacks.append(fw.Checkpoint(folder))
        with fw.Watch(model, optimizer, callbacks, train_loader=train, val_loader=val, resume=resume) as watch:
            for _ in watch.epochs(epochs):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                watch.validate()
        return model, watch.result

    run(tmp_path / "parts", 3)
    model, result = run(tmp_path / "parts", 8, resume="auto")
    other, whole = run(tmp_path / "whole", 8)
    assert whole.history == result.history
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_model_with_non_finite_weights_is_not_validated(caplog):
    """The evaluation is dropped and training stops, with one warning that names the parameter."""
    watch, model, optimizer, loader = small()
    with caplog.at_level(logging.WARNING, "fitwatch"), watch:
        for _ in watch.epochs(5):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model.bias[0] = torch.nan
            with watch.validating():
                for x, y in loader:
                    watch.loss(model(x), y)
    assert watch.result.history == []
    assert watch.state.progress.epoch == 1
    assert "bias" in watch.result.stop_reason
    assert sum("non-finite weights" in record.message for record in caplog.records) == 1


def test_a_loss_measured_elsewhere_enters_the_history(data):
    """measured() takes the mean over a batch and its examples; the history has the mean over all of them."""
    x, y = data.tensors
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = [(x[:50], y[:50]), (x[50:], y[50:])]
    with fw.Watch(model, optimizer, train_loader=loader, val_loader=loader) as watch:
        for _ in watch.epochs(1):
            for a, b in watch.train():
                watch.backward(F.cross_entropy(model(a), b), examples=len(b))
                optimizer.step()
                optimizer.zero_grad()
            with watch.validating():
                for a, b in loader:
                    watch.measured(F.cross_entropy(model(a), b), examples=len(b))
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y).item()
    assert watch.state.metrics["val/loss"] == pytest.approx(expected, rel=1e-12)
    assert "val/loss_vs_baseline" not in watch.state.metrics


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"model": nn.Linear}, TypeError, "model must be a torch.nn.Module"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"accumulate": 0}, ValueError, "accumulate must be 1 or more"),
        ({"log_every": 0}, ValueError, "log_every must be 1 or more"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm"),
        ({"max_steps": 0}, ValueError, "max_steps must be 1 or more"),
        ({"train_loader": []}, ValueError, "train_loader is empty"),
        ({"val_loader": 3}, TypeError, "val_loader must be an iterable"),
        ({"resume": 3}, TypeError, "resume must be a path"),
        ({"metrics": {"a": 3}}, TypeError, r"metrics\['a'\] must be a function"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, error, named):
    """An option out of its range raises when the Watch is built, and says what is allowed."""
    model = nn.Linear(3, 2)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)} | options
    with pytest.raises(error, match=named):
        fw.Watch(**given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"log_every": 1},
        {"val": False},
        {"max_steps": 7},
        {"stop_at": 3},
        {"stop_at": 7, "val": False},
    ],
    ids=str,
)
def test_the_hooks_of_a_hand_written_loop_follow_the_documented_loop(options):
    """The hooks of a loop with a Watch come in the order that the pseudocode in Callback's docstring gives."""
    trace = []
    given = {"batches": 5, "epochs": 2, "accumulate": 1, "log_every": 2, "val": True, "max_steps": None} | options
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(given["batches"])]
    with fw.Watch(
        model,
        optimizer,
        [Tracer(trace, stop_at=given.get("stop_at"))],
        train_loader=loader,
        val_loader=loader[:2] if given["val"] else None,
        **{name: given[name] for name in ("accumulate", "log_every", "max_steps")},
    ) as watch:
        for _ in watch.epochs(given["epochs"]):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                if watch.step_due:
                    optimizer.step()
                    optimizer.zero_grad()
            if given["val"] and watch.state.stop_reason is None:
                with watch.validating():
                    for x, y in loader[:2]:
                        watch.loss(model(x), y)
    assert documented(**options) == trace


def test_max_steps_shows_at_once_in_a_loop_over_the_loader():
    """watch.stops counts the step that the optimizer has just made, so no step too many is made."""
    watch, model, optimizer, loader = small(max_steps=3)
    with watch:
        for _ in watch.epochs(9):
            for x, y in loader:
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if watch.stops:
                    break
    assert (watch.state.progress.step, watch.state.progress.epoch) == (3, 1)


@pytest.mark.parametrize("own_iteration", [False, True])
def test_an_epoch_may_use_a_part_of_the_batches(own_iteration):
    """A loop that takes some batches of each epoch and goes on has completed its epochs."""
    watch, model, optimizer, loader = small()
    with watch:
        for _ in watch.epochs(3):
            for x, y in itertools.islice(loader if own_iteration else watch.train(), 1):
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert (watch.state.progress.step, watch.state.progress.epoch) == (3, 3)


def test_a_second_loop_over_epochs_goes_on_after_a_break():
    """An epoch that was left by break gets its on_epoch_end before the next loop starts."""
    trace = []
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    with fw.Watch(model, optimizer, Tracer(trace), train_loader=loader) as watch:
        for wanted in (2, 3):
            for _ in watch.epochs(wanted):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if wanted == 2:
                    break
    assert trace.count("on_epoch_start") == trace.count("on_epoch_end") == 3
    assert watch.state.progress.epoch == 3


def test_a_loss_besides_may_come_first():
    """A penalty that went backward before watch.loss is no forgotten zero_grad."""
    watch, model, optimizer, loader = small()
    with watch:
        for _ in watch.epochs(2):
            for x, y in loader:
                output = model(x)
                (0.01 * output.square().sum()).backward(retain_graph=True)
                watch.loss(output, y).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert watch.state.progress.step == 4


def test_the_last_window_is_due_in_a_loop_over_the_loader():
    """step_due is True at the last batch of a loader with a certain length, also if the loop iterates over it itself."""
    watch, model, optimizer, loader = small(accumulate=5)
    with watch:
        for _ in watch.epochs(2):
            for x, y in loader:
                watch.loss(model(x), y).backward()
                if watch.step_due:
                    optimizer.step()
                    optimizer.zero_grad()
    assert watch.state.progress.step == 2


def test_a_stop_before_the_first_batch_is_no_empty_loader():
    """A stop requested in on_epoch_start ends a loop that asks for it, without an error."""

    class Stop(fw.Callback):
        def on_epoch_start(self, state):
            state.request_stop("enough")

    watch, model, _, loader = small(callbacks=[Stop()])
    with watch:
        for _ in watch.epochs(2):
            for x, y in loader:
                if watch.stops:
                    break
                watch.loss(model(x), y).backward()
    assert (watch.state.progress.epoch, watch.result.stop_reason) == (0, "enough")


def test_a_validation_before_training_warns_of_nothing(caplog):
    """Without training since the last evaluation there is no training loss to warn of, and a later NaN is still told."""
    watch, model, optimizer, ((x, y), _) = small(skip_checks=["shared_examples"])
    with caplog.at_level(logging.WARNING, "fitwatch"), watch:
        watch.validate()
        assert caplog.records == []
        for _ in watch.epochs(1):
            watch.loss(model(x) * torch.nan, y).backward()
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            watch.validate()
    assert any("train/loss is nan" in record.message for record in caplog.records)


def test_a_forgotten_validation_is_told(caplog):
    """A watch with a val_loader whose loop never validates ends with one warning."""
    watch, model, optimizer, _ = small(skip_checks=["shared_examples"])
    with caplog.at_level(logging.WARNING, "fitwatch"), watch:
        for _ in watch.epochs(2):
            for x, y in watch.train():
                watch.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "the watch has a val_loader, but no validation was run"
    ]
