"""Position of things on the page: step, tag and order."""

import math
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import fitwatch as fw
from tests._events import bars, curve, points, read, texts
from tests._server import get, noisy_data, overfitting_trainer, serve

PNG = b"\x89PNG at step %d"  # the bytes are never decoded


# -- bars ----------------------------------------------------------------------------------------------------------


def test_a_finished_script_that_is_run_again_keeps_its_bars(tmp_path):
    """A fit resumed after early stopping trains no step and keeps both bars, the last one at the step of the stop."""

    def run():
        trainer = overfitting_trainer(tmp_path, callbacks=[fw.Checkpoint(tmp_path / "saved")])
        return trainer.fit(*noisy_data(), epochs=60, resume="auto")

    def drawn():
        return {name: points(tmp_path / "run" / name, "loss") for name in bars(tmp_path / "run")}

    first, before = run(), drawn()
    assert before.keys() == {"early stop", "overfitting"}
    assert before["early stop"][0][0] == first.history[-1]["step"]
    again = run()
    assert again.history == first.history
    assert drawn() == before


@pytest.mark.parametrize("first", ["stop", "page"])
def test_without_a_validation_set_the_bar_of_the_stop_survives_a_resume(tmp_path, first):
    """The bar is drawn after its epoch was saved; it is still right after a second run and after resuming before it."""

    def run(resume):
        torch.manual_seed(0)
        model = nn.Linear(10, 2)
        stop = fw.EarlyStopping("train/loss", patience=2, min_delta=0.05)
        page = fw.TensorBoard(tmp_path, show_link=False)
        callbacks = [stop, page] if first == "stop" else [page, stop]
        saved = fw.Checkpoint(tmp_path / "saved", keep=99)
        trainer = fw.Trainer(
            model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[*callbacks, saved], device="cpu", seed=0
        )
        return trainer.fit(noisy_data()[0], epochs=60, resume=resume)

    result = run(None)
    last = result.history[-1]["step"]
    assert "early stopping" in result.stop_reason
    for resume in ("auto", tmp_path / "saved" / f"epoch-{len(result.history) - 1}.pt", "auto"):
        assert bars(tmp_path / "run") == ["early stop"]
        assert [step for step, _ in points(tmp_path / "run/early stop", "loss")] == [last, last + 1]
        assert run(resume).history[-1]["step"] == last


def test_a_curve_of_ones_own_beside_the_bars_is_left_alone(tmp_path):
    """A sub-run that the user wrote into the run's folder survives a resume, although it holds only a loss, like a bar."""

    def make():
        return overfitting_trainer(tmp_path, callbacks=[fw.Checkpoint(tmp_path / "saved", keep=9)])

    make().fit(*noisy_data(), epochs=2)
    with SummaryWriter(tmp_path / "run/mine") as writer:
        writer.add_scalar("loss", 1.0, 12)
    make().fit(*noisy_data(), epochs=3, resume=tmp_path / "saved/epoch-1.pt")
    assert points(tmp_path / "run/mine", "loss") == [(12, 1.0)]


# -- texts and pictures --------------------------------------------------------------------------------------------


def test_texts_pictures_and_histograms_stand_at_their_step(tmp_path):
    """Texts, pictures and histograms logged within a log window are complete events at their own steps, with their own tags."""

    class Log(fw.Callback):
        def on_step_end(self, state):
            step = state.progress.step
            if step in (2, 3):
                state.log("val/pic", fw.records.Image(PNG % step, 1, 1))
                state.log("train/note", f"at {step}")
                state.log("train/spread", fw.records.Histogram((0.0, 1.0), (step,), step / 2, step / 4))
            state.log("train/number", float(step))

    model = nn.Linear(10, 2)
    page = fw.TensorBoard(tmp_path, show_link=False)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters()), callbacks=[Log(), page], log_every=5, device="cpu")
    trainer.fit(noisy_data()[0], max_steps=5)
    assert [(e.step, e.encoded_image_string) for e in read(tmp_path / "run/val").Images("pic")] == [
        (step, PNG % step) for step in (2, 3)
    ]
    assert texts(tmp_path / "run/train", "note") == [(2, "at 2"), (3, "at 3")]
    spread = read(tmp_path / "run/train").Histograms("spread")
    assert [(e.step, e.histogram_value.num) for e in spread] == [(2, 2.0), (3, 3.0)]
    assert points(tmp_path / "run/train", "metrics/number") == [(5, 3.0)]


def test_texts_of_one_step_are_one_text_on_the_page(tmp_path):
    """The server shows both texts of one step, one from the log window and one from validation, and older texts separately."""

    class Warn(fw.Callback):
        def on_step_end(self, state):
            if state.progress.step in (5, 6):
                state.log("train/report/warnings", f"step {state.progress.step}")

        def on_validation_end(self, state):
            state.log("train/report/warnings", "validated")

    trainer = overfitting_trainer(tmp_path, callbacks=[Warn()])
    trainer.fit(*noisy_data(), epochs=1)
    with serve(tmp_path) as address:
        for _ in range(50):
            shown = get(address, "text/text", run="run/train", tag="report/warnings")
            if "validated" in str(shown):  # the server reads a file bit by bit
                break
            time.sleep(0.2)
    assert [text["step"] for text in shown] == [5, 6]
    assert "<p>step 5</p>" in shown[0]["text"]
    assert "<p>step 6</p>\n<p>validated</p>" in shown[1]["text"]


def test_one_nan_is_one_sentence_after_the_one_that_names_its_place(tmp_path):
    """If all gradients become NaN, the text of `GradientNorm` comes first, and all curves share one short sentence."""

    class Spoil(fw.Callback):
        def on_batch_end(self, state):
            if state.progress.step == 2:
                for parameter in state.model.parameters():
                    parameter.grad.fill_(float("nan"))

    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(10)))
    page = fw.TensorBoard(tmp_path, show_link=False)
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[Spoil(), page, fw.GradientNorm()],
        log_every=5,
        nonfinite="ignore",
        device="cpu",
    )
    trainer.fit(noisy_data()[0], max_steps=5)
    odd = [
        tag
        for tag in read(tmp_path / "run/train").Tags()["scalars"]
        if any(math.isnan(value) for step, value in points(tmp_path / "run/train", tag) if step == 5)
    ]
    [(step, told), *_] = texts(tmp_path / "run/train", "report/warnings")
    assert step == 5
    place, curves = told.split("\n\n")
    assert place.startswith("At step 3 (epoch 1, batch index 2) no gradient is finite")
    assert curves.startswith(
        "First non-finite values, in the log window that ends at step 5: `optim/grad_norm` (nan), "
    )
    assert curves.count("`") == 10
    # "loss" has its point at the validation, in another window
    assert curves.endswith(f", and {len(set(odd) - {'loss'}) - 5} more.")
    assert len(odd) > 20


# -- tags ----------------------------------------------------------------------------------------------------------


def test_the_standard_error_stands_with_the_evidence(tmp_path):
    """The standard error measured for ``min_delta="1se"`` is the curve ``overfit/loss_se``, not a chart next to the loss."""
    trainer = overfitting_trainer(tmp_path)
    trainer.callbacks[3] = fw.EarlyStopping("val/loss", min_delta="1se")
    result = trainer.fit(*noisy_data(), epochs=3)
    assert points(tmp_path / "run/val", "overfit/loss_se") == curve(result.history, "val/loss_se")
    alone = {tag for tag in read(tmp_path / "run/val").Tags()["scalars"] if "/" not in tag}
    assert alone == {"loss", "loss_unweighted", "loss_vs_baseline"}


# -- many fits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Fourteen fits of one trainer, of 400 steps each with a log window per step: (run's folder, logged values)."""
    logged = []

    class Log(fw.Callback):
        def on_step_end(self, state):
            step = state.progress.step
            value = float(torch.rand(())) + (9 if step % 400 == 123 else 0)
            logged.append(value)
            state.log("train/optim/mean", value)
            state.log("train/optim/peak", value, reduce="max")
            state.log("train/optim/last", float(step), reduce="last")

    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    loader = DataLoader(TensorDataset(torch.randn(8, 2), torch.arange(8) % 2), 8)
    page = fw.TensorBoard(tmp_path_factory.mktemp("runs"), show_link=False)
    trainer = fw.Trainer(model, torch.optim.SGD(model.parameters()), callbacks=[Log(), page], log_every=1, device="cpu")
    for _ in range(14):
        trainer.fit(loader, epochs=400)
    return page.run_dir, logged


@pytest.mark.parametrize("tag", ["optim/mean", "optim/peak", "optim/last", "optim/loss", "optim/lr", "loss"])
def test_each_of_many_fits_has_its_part_of_a_curve(many, tag):
    """Each of 14 fits has at least 15 points in every curve, the last one at its end; together they have few more than 1,000."""
    steps = [step for step, _ in points(many[0] / "train", tag)]
    assert steps == sorted(set(steps))
    assert min(sum(400 * fit < step <= 400 * (fit + 1) for step in steps) for fit in range(14)) >= 15
    assert len(steps) <= 1000 + 14 * 15
    assert {400 * (fit + 1) for fit in range(14)} <= set(steps)


def test_what_many_fits_merge_is_still_true(many):
    """Means keep the sum of all logged values; each maximum and each last value is that of its steps."""
    folder, logged = many
    mean, peak, last = (points(folder / "train", f"optim/{name}") for name in ("mean", "peak", "last"))
    begins = [0, *(step for step, _ in mean)]
    total = sum(value * (step - begin) for (step, value), begin in zip(mean, begins, strict=False))
    assert total == pytest.approx(sum(logged), rel=1e-5)
    begins = [0, *(step for step, _ in peak)]
    for (step, value), begin in zip(peak, begins, strict=False):
        assert value == pytest.approx(max(logged[begin:step]), rel=1e-6)
    assert [value for _, value in last] == [step for step, _ in last]
