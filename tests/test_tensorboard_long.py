"""Long curves in few points."""

import math
import random

import pytest
import torch
from torch import nn

import fitwatch as fw
from fitwatch.state.progress import Plan
from fitwatch.tensorboard.thinning import LIMIT, Thinner, horizon
from tests._events import points

FULL = LIMIT // 2  # points of a first fit before any are merged


def loop(folder, windows, *, log_every=50, max_steps=None):
    """Feed a TensorBoard callback with records, one dict per log window, and return the run's folder."""
    model = nn.Linear(1, 1)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters()), loss=fw.CrossEntropy())
    state.plan = Plan(max_steps=max_steps)
    page = fw.TensorBoard(folder, show_link=False)
    page.on_fit_start(state)
    page.on_epoch_start(state)
    for number, values in enumerate(windows):
        state.progress.step = log_every * (number + 1)
        state.log.records = [
            fw.records.Record(name, state.progress.step, v, reduce) for name, (v, reduce) in values.items()
        ]
        page.on_log(state)
    page.on_fit_end(state)
    return page.run_dir


def test_a_million_steps_are_at_most_a_thousand_points(tmp_path):
    """Of 20,000 windows the spikes of a maximum survive, means stay exact, and the first 500 points are as logged."""
    rng = random.Random(0)  # noqa: S311 - no secret
    noise = [rng.random() for _ in range(20_000)]
    spikes = [17, 700, 12_345, 19_999]
    run = loop(
        tmp_path,
        (
            {
                "train/optim/grad_norm": (value, ""),
                "train/optim/grad_norm_max": (9.0 if i in spikes else value, ""),
                "train/optim/peak": (9.0 if i in spikes else value, "max"),
                "train/optim/lr": (float(i), "last"),
            }
            for i, value in enumerate(noise)
        ),
        max_steps=1_000_000,
    )
    curves = {tag: points(run / "train", f"optim/{tag}") for tag in ("grad_norm", "grad_norm_max", "peak", "lr")}
    steps = [step for step, _ in curves["lr"]]
    assert all(steps == [step for step, _ in curve] for curve in curves.values())
    assert 700 <= len(steps) <= 1000
    assert steps[:FULL] == list(range(50, 50 * FULL + 1, 50))
    assert steps[-1] == 1_000_000
    ends = [step // 50 for step in steps]
    begins = [0, *ends[:-1]]
    for (_, mean), (_, last), begin, end in zip(curves["grad_norm"], curves["lr"], begins, ends, strict=True):
        assert mean == pytest.approx(math.fsum(noise[begin:end]) / (end - begin), rel=1e-6)
        assert last == end - 1
    for tag in ("grad_norm_max", "peak"):
        high = [i for i, (_, value) in enumerate(curves[tag]) if value == 9.0]
        assert high == [next(i for i, end in enumerate(ends) if spike < end) for spike in spikes]


@pytest.mark.parametrize("horizon", [1_000_000, None, 2_000])
def test_a_million_values_are_at_most_a_thousand_points(horizon):
    """The limit also holds with a window per step, and if the end of the fit is unknown or was estimated wrongly."""
    thinner, written = Thinner(), []
    for step in range(1, 1_000_001):
        point = thinner.add("x", step, 1.0, "mean", 4 * step if horizon is None else horizon)
        if point is not None:
            written.append(point)
    written += [point for _, point in thinner.rest()]
    steps = [step for step, _ in written]
    assert steps == sorted(set(steps))
    assert FULL < len(steps) <= 1000
    assert steps[-1] == 1_000_000


def test_later_fits_share_the_points_that_are_left():
    """Fits of 10,000 values each write 750 points, then 3/4 of the 250 left, and so on, but never fewer than 15."""
    thinner, steps = Thinner(), []
    for fit in range(8):
        thinner.start(resumed=False)
        points = [
            thinner.add("x", s, 1.0, "mean", (fit + 1) * 10_000)
            for s in range(fit * 10_000 + 1, (fit + 1) * 10_000 + 1)
        ]
        steps.append([step for step, _ in [*filter(None, points), *(point for _, point in thinner.rest())]])
    counts = [len(fit) for fit in steps]
    assert counts[0] == pytest.approx(750, abs=5)
    assert counts[1] == pytest.approx(0.75 * (1000 - counts[0]), abs=5)
    assert all(15 <= count <= 20 for count in counts[4:])
    assert [fit[-1] for fit in steps] == [10_000 * (fit + 1) for fit in range(8)]
    assert sum(counts) < 1000 + 8 * 20


def test_a_nan_survives_in_a_maximum():
    """A NaN merged with larger and smaller maxima stays NaN, whatever its position."""
    for place in range(4):
        thinner = Thinner()
        for step in range(1, FULL + 1):
            thinner.add("x", step, 1.0, "max", 10_000)
        values = [3.0, 1.0, 2.0]
        values.insert(place, math.nan)
        got = [thinner.add("x", FULL + 1 + i, v, "max", 10_000) for i, v in enumerate(values)]
        assert got == [None] * 4
        assert [math.isnan(value) for _, (_, value) in thinner.rest()] == [True]


def test_a_curve_goes_on_from_its_state_and_its_first_value_is_a_point_at_once():
    """A round trip through the state keeps the points, and a resumed fit writes its first value at once, with the waiting ones."""
    first, second = Thinner(), Thinner()
    for step in range(1, 1003):
        first.add("x", step, float(step), "mean", 10_000)
    second.load_state_dict(first.state_dict())
    for thinner in (first, second):
        thinner.start(resumed=True)
    points = [[t.add("x", step, float(step), "mean", 10_000) for step in range(1003, 3000)] for t in (first, second)]
    assert points[0] == points[1]
    step, value = points[0][0]
    assert step == 1003
    waiting = round(2 * (1003 - value)) + 1  # the mean of the last n numbers is (n - 1) / 2 below the last
    assert 1 < waiting < 100


@pytest.mark.parametrize("options", [{"epochs": 3}, {"max_steps": 7}, {"epochs": 3, "max_steps": 40}], ids=str)
def test_the_end_of_a_fit_is_foreseen(options):
    """From the first log window on, with two batches per step, the horizon is the last step of each of two fits."""
    seen = []

    class Ask(fw.Callback):
        def on_log(self, state):
            seen.append(horizon(state))

    model = nn.Linear(3, 2)
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 8
    optimizer = torch.optim.SGD(model.parameters())
    trainer = fw.Trainer(model, optimizer, callbacks=[Ask()], accumulate=2, log_every=2, device="cpu")
    for _ in range(2):
        seen.clear()
        trainer.fit(loader, loader, **options)
        assert set(seen) == {trainer.state.progress.step}


def test_where_no_end_is_known_it_is_four_times_as_far():
    """A custom loop that gives no end has a horizon of four times its steps."""
    state = fw.State(model=nn.Linear(1, 1), optimizer=None, loss=None)
    state.progress.step = 30
    assert horizon(state) == 120
