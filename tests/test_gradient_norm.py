"""The gradient-norm inspector."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fitwatch as fw


class Keep(fw.Callback):
    """Keeps every gradient, and every record."""

    def __init__(self):
        self.gradients, self.records, self.weights = [], [], []

    def on_gradients_ready(self, state):
        self.gradients.append(
            {n: p.grad.double().clone() for n, p in state.model.named_parameters() if p.grad is not None}
        )
        self.weights.append({n: p.detach().double().clone() for n, p in state.model.named_parameters()})

    def on_log(self, state):
        self.records += state.records


def run(model, data, *, log_every=3, clip_norm=1e-3, accumulate=1, lr=0.1, **options):
    keep = Keep()
    trainer = fw.Trainer(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr),
        callbacks=[fw.GradientNorm(**options), keep],
        log_every=log_every,
        clip_norm=clip_norm,
        accumulate=accumulate,
        device="cpu",
    )
    trainer.fit(DataLoader(data, 8), epochs=1)
    return keep


def values(keep, name):
    return {r.step: r.value for r in keep.records if r.name == name}


def test_total_norms_of_the_window_are_torchs(model, data):
    """Mean and maximum over each window, including the short last one, equal torch's total norms before clipping."""
    keep = run(model, data)
    norms = [torch.nn.utils.get_total_norm(g.values()).item() for g in keep.gradients]
    windows = {3: norms[0:3], 6: norms[3:6], 8: norms[6:8]}
    mean, largest = values(keep, "train/optim/grad_norm"), values(keep, "train/optim/grad_norm_max")
    assert set(windows) == set(mean) == set(largest)
    for step, window in windows.items():
        assert mean[step] == pytest.approx(sum(window) / len(window), rel=1e-12)
        assert largest[step] == pytest.approx(max(window), rel=1e-12)


def test_norms_per_layer(model, data):
    """The curve of a layer is the mean over the window of the joint norm of its weight and bias."""
    keep = run(model, data, log_every=4)
    for layer in ("0", "2"):
        norms = [torch.cat([g[f"{layer}.weight"].flatten(), g[f"{layer}.bias"]]).norm().item() for g in keep.gradients]
        logged = values(keep, f"train/params/grad_norm/{layer}")
        assert {
            4: pytest.approx(sum(norms[:4]) / 4, rel=1e-12),
            8: pytest.approx(sum(norms[4:]) / 4, rel=1e-12),
        } == logged


def test_every_reads_only_those_steps(model, data):
    """With every=4 only steps 4 and 8 are read."""
    keep = run(model, data, log_every=8, every=4, per_layer=False)
    norms = [torch.nn.utils.get_total_norm(g.values()).item() for g in keep.gradients]
    assert {8: pytest.approx((norms[3] + norms[7]) / 2, rel=1e-12)} == values(keep, "train/optim/grad_norm")
    assert not [r for r in keep.records if "params" in r.name]


def test_frozen_unused_and_half_precision_parameters(data):
    """Frozen layers are skipped, unused ones count as 0, and float16 norms are computed in float32 without overflow."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = (nn.Linear(4, 3).double() for _ in range(3))
            self.frozen.requires_grad_(requires_grad=False)

        def forward(self, x):
            return self.used(x) + self.frozen(x)

    model = Net()
    keep = run(model, data, log_every=8)
    names = {r.name for r in keep.records if "params/grad_norm/" in r.name}
    assert {"train/params/grad_norm/used", "train/params/grad_norm/unused"} == names
    assert values(keep, "train/params/grad_norm/unused") == {8: 0.0}

    half = nn.Linear(4, 1, bias=False).half()
    half.weight.grad = torch.full_like(half.weight, 60000.0)
    state = fw.State(model=half, optimizer=torch.optim.SGD(half.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    norm.on_gradients_ready(state)
    state.log.close_window({})
    logged = {r.name: r.value for r in state.records}
    assert logged["train/optim/grad_norm"] == pytest.approx(2 * half.weight.grad[0, 0].item(), rel=1e-6)


def test_only_what_the_optimizer_moves_is_read(data):
    """When only a head is trained, the backbone's gradients, which nothing clears, are not counted."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).double()
    keep = Keep()
    optimizer = torch.optim.SGD(model[1].parameters(), 0.0)
    fw.Trainer(model, optimizer, callbacks=[fw.GradientNorm(), keep], log_every=1, device="cpu").fit(
        [(data.tensors[0], data.tensors[1])] * 4, epochs=1
    )
    norms = values(keep, "train/optim/grad_norm")
    head = torch.cat([keep.gradients[0]["1.weight"].flatten(), keep.gradients[0]["1.bias"]]).norm().item()
    assert [pytest.approx(head, rel=1e-12)] * 4 == list(norms.values())
    assert not [r for r in keep.records if r.name == "train/params/grad_norm/0"]


def test_sparse_gradients(data):
    """The norm of a sparse gradient equals that of its dense form."""
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).pow(2).sum().backward()
    state = fw.State(model=embedding, optimizer=torch.optim.SGD(embedding.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    norm.on_gradients_ready(state)
    state.log.close_window({})
    expected = embedding.weight.grad.to_dense().norm().item()
    assert {r.name: r.value for r in state.records}["train/optim/grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_a_nan_is_not_hidden_by_the_maximum(data):
    """A NaN in one step of a window shows in both mean and maximum."""
    model = nn.Linear(2, 2)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    for value in (1.0, float("nan"), 2.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        norm.on_gradients_ready(state)
    state.log.close_window({})
    logged = {r.name: r.value for r in state.records}
    assert logged["train/optim/grad_norm"] != logged["train/optim/grad_norm"]
    assert logged["train/optim/grad_norm_max"] != logged["train/optim/grad_norm_max"]


def test_gradients_are_left_as_they_are(model, data):
    """Training with the inspector gives the same weights, bit for bit, as training without it."""
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    other.load_state_dict(model.state_dict())
    run(model, data)
    fw.Trainer(other, torch.optim.SGD(other.parameters(), 0.1), clip_norm=1e-3, device="cpu").fit(
        DataLoader(data, 8), epochs=1
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def stepped(model, gradients, **options):
    """The records of one window of a hand-written loop, with the gradients given for each step."""
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm(**options)
    norm.on_fit_start(state)
    for step in gradients:
        for p, gradient in zip(model.parameters(), step, strict=True):
            p.grad = gradient
        norm.on_gradients_ready(state)
        state.optimizer.step()
        state.progress.step += 1
        norm.on_step_end(state)
    state.log.close_window({})
    return {r.name: r.value for r in state.records}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_norms_are_torchs_in_float64(model, data, accumulate):
    """Total and per-layer norms equal torch's get_total_norm and vector_norm to 1e-12, accumulated or not."""
    keep = run(model, data, log_every=1, accumulate=accumulate)
    assert len(keep.gradients) == -(-8 // accumulate)
    for step, g in enumerate(keep.gradients, 1):
        total = torch.nn.utils.get_total_norm(g.values()).item()
        assert pytest.approx(total, rel=1e-12) == values(keep, "train/optim/grad_norm")[step]
        for layer in ("0", "2"):
            both = torch.cat([g[f"{layer}.weight"].flatten(), g[f"{layer}.bias"]])
            expected = torch.linalg.vector_norm(both).item()
            assert pytest.approx(expected, rel=1e-12) == values(keep, f"train/params/grad_norm/{layer}")[step]


def test_a_single_parameter_is_its_vector_norm():
    """The norm of a layer with a single parameter is torch.linalg.vector_norm of its gradient, to 1e-12."""
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(5, 3).double()) for name in "abc"})
    gradients = [torch.randn(5, 3).double() * 10.0**k for k in (-9, 0, 9)]
    logged = stepped(model, [gradients])
    for name, gradient in zip("abc", gradients, strict=True):
        expected = torch.linalg.vector_norm(gradient).item()
        assert pytest.approx(expected, rel=1e-12) == logged[f"train/params/grad_norm/{name}"]


def test_mean_and_max_per_layer_keep_a_spike():
    """One spike in a window of 50 steps is the maximum of both the layer and the total."""
    model = nn.Linear(3, 1, bias=False).double()
    gradients = [[torch.ones(1, 3).double() * (1000 if step == 17 else 1)] for step in range(50)]
    logged = stepped(model, gradients)
    assert pytest.approx(1000 * 3**0.5, rel=1e-12) == logged["train/optim/grad_norm_max"]
    assert pytest.approx(1000 * 3**0.5, rel=1e-12) == logged["train/params/grad_norm_max/weight"]
    assert pytest.approx((1049 / 50) * 3**0.5, rel=1e-12) == logged["train/params/grad_norm/weight"]


def test_the_norm_after_clipping(model, data):
    """The mean norm after clipping and the share of clipped steps equal those of a copy clipped by torch."""
    limit = 1.0  # some norms are above it, some below
    keep = run(model, data, log_every=4, clip_norm=limit)
    after, clipped = [], []
    for g in keep.gradients:
        copies = [nn.Parameter(v.clone()) for v in g.values()]
        for c, v in zip(copies, g.values(), strict=True):
            c.grad = v.clone()
        clipped.append(torch.nn.utils.clip_grad_norm_(copies, limit).item() > limit)
        after.append(torch.nn.utils.get_total_norm([c.grad for c in copies]).item())
    assert 0 < sum(clipped) < 8
    for step, window in ((4, slice(0, 4)), (8, slice(4, 8))):
        assert pytest.approx(sum(after[window]) / 4, rel=1e-12) == values(keep, "train/optim/grad_norm_clipped")[step]
        assert values(keep, "train/optim/clipped_share")[step] == sum(clipped[window]) / 4


def test_without_clipping_there_are_no_clipping_curves(model, data):
    """Without a clip_norm there is no curve of clipped norms or shares."""
    keep = run(model, data, clip_norm=None)
    assert not [r.name for r in keep.records if "clip" in r.name]


def test_update_ratio_and_zero_share_at_the_first_step_of_the_window(model, data):
    """Both equal the values computed from copies of the weights and gradients of the first step, to 1e-9."""
    with torch.no_grad():
        model[0].weight[0] = 0  # with its bias at 100 this unit is saturated: exact zeros in the gradient
        model[0].bias[0] = 100
    keep = run(model, data, log_every=4)
    for step, first in ((4, 0), (8, 4)):
        before, after = keep.weights[first], keep.weights[first + 1]
        for layer in ("0", "2"):
            names = (f"{layer}.weight", f"{layer}.bias")
            old = torch.cat([before[n].flatten() for n in names])
            new = torch.cat([after[n].flatten() for n in names])
            ratio = ((new - old).norm() / old.norm()).item()
            assert pytest.approx(ratio, rel=1e-9) == values(keep, f"train/params/update_ratio/{layer}")[step]
            gradient = torch.cat([keep.gradients[first][n].flatten() for n in names])
            share = (gradient == 0).double().mean().item()
            assert pytest.approx(share, abs=1e-12) == values(keep, f"train/params/zero_share/{layer}")[step]
    assert values(keep, "train/params/zero_share/0")[4] == pytest.approx(5 / 40)


def test_half_precision_is_computed_in_float32_and_float64_stays():
    """In a model of bfloat16, float16, float32, float64 and complex gradients each norm is exact for its dtype."""
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64]
    model = nn.Module()
    for kind in kinds:
        model.register_parameter(f"of_{str(kind)[6:]}", nn.Parameter(torch.ones(300, dtype=kind)))
    gradients = [(torch.randn(300, dtype=torch.complex64) if k.is_complex else torch.randn(300).to(k)) for k in kinds]
    logged = stepped(model, [gradients])
    exact = [torch.linalg.vector_norm(g.to(torch.complex128).abs()).item() for g in gradients]
    for kind, norm in zip(kinds, exact, strict=True):
        precision = 1e-12 if kind == torch.float64 else 1e-6
        assert pytest.approx(norm, rel=precision) == logged[f"train/params/grad_norm/of_{str(kind)[6:]}"]
    total = torch.linalg.vector_norm(torch.tensor(exact).double()).item()
    assert pytest.approx(total, rel=1e-6) == logged["train/optim/grad_norm"]


def test_a_nan_in_one_layer_does_not_reach_the_others():
    """Only the total and the layer with the NaN or infinity show it."""
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)}).double()
    for bad in (float("nan"), float("inf")):
        logged = stepped(model, [[torch.full((1, 2), bad).double(), torch.ones(1, 2).double()]])
        assert pytest.approx(2**0.5) == logged["train/params/grad_norm/b"]
        assert str(bad) == str(logged["train/params/grad_norm/a"]) == str(logged["train/optim/grad_norm"])


def test_tied_weights_are_read_once(data):
    """A parameter shared by two modules counts once, under its first name."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)).double()
    model[1].weight = model[0].weight
    keep = run(model, data, log_every=8)
    assert {"0", "2"} == {r.name.rpartition("/")[2] for r in keep.records if "params/grad_norm/" in r.name}
    norms = [torch.nn.utils.get_total_norm(g.values()).item() for g in keep.gradients]
    assert pytest.approx(sum(norms) / 8, rel=1e-12) == values(keep, "train/optim/grad_norm")[8]


def test_a_sparse_gradient_without_elements():
    """An embedding that gets an empty batch has a norm of 0 and a zero share of 1."""
    model = nn.Embedding(10, 3, sparse=True)
    empty = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.long), torch.empty(0, 3), (10, 3), check_invariants=True
    )
    logged = stepped(model, [[empty]])
    assert logged["train/optim/grad_norm"] == 0
    assert logged["train/params/zero_share/weight"] == 1


def block():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def layers_of(keep):
    return list(dict.fromkeys(r.name.rpartition("/")[2] for r in keep.records if "params/grad_norm/" in r.name))


def test_layers_by_pattern(data):
    """A pattern's match or first group names the layer; parameters without a match are in the total only."""

    def fresh():
        return nn.Sequential(block(), block(), nn.Linear(4, 3)).double()

    assert layers_of(run(fresh(), data)) == ["0.0", "0.2", "1.0", "1.2", "2"]
    assert layers_of(run(fresh(), data, layers=r"^[^.]+")) == ["0", "1", "2"]
    assert layers_of(run(fresh(), data, layers="weight|bias")) == ["weight", "bias"]
    keep = run(fresh(), data, layers=r"^(\d)\.\d\.weight", log_every=1)
    assert layers_of(keep) == ["0", "1"]
    g = keep.gradients[0]
    expected = torch.cat([g["0.0.weight"].flatten(), g["0.2.weight"].flatten()]).norm().item()
    assert pytest.approx(expected, rel=1e-12) == values(keep, "train/params/grad_norm/0")[1]
    assert pytest.approx(torch.nn.utils.get_total_norm(g.values()).item()) == values(keep, "train/optim/grad_norm")[1]


def test_layers_thawed_within_an_open_window():
    """A window left open when the layers change is closed with the layers it was measured with."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(requires_grad=False)
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    for _ in range(2):
        norm.on_epoch_start(state)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        norm.on_gradients_ready(state)
        model.requires_grad_()
    state.log.close_window({})
    logged = [(r.name, pytest.approx(r.value)) for r in state.records if "params/grad_norm/" in r.name]
    assert [("train/params/grad_norm/1", 3**0.5)] + [
        (f"train/params/grad_norm/{layer}", n**0.5) for layer, n in (("1", 3), ("0", 6))
    ] == logged


def test_a_deep_model_has_at_most_twenty_series():
    """Of 40 layers, the 15 with the largest norms in the first window are drawn, then those in trouble, up to 20."""
    model = nn.ParameterList(nn.Parameter(torch.ones(2).double()) for _ in range(40))
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters(), 1e-6), loss=None)
    norm = fw.GradientNorm()
    norm.on_fit_start(state)
    shown = []
    for dead in ((), (3, 4), range(30)):  # layer i has norm 1 + i, or 0
        for _ in range(4):
            for i, p in enumerate(model):
                p.grad = torch.full((2,), 0.0 if i in dead else 1.0 + i).double()
            norm.on_gradients_ready(state)
            state.optimizer.step()
            state.progress.step += 1
            norm.on_step_end(state)
        state.log.close_window({})
        shown.append({r.name.rpartition("/")[2] for r in state.records if "params/grad_norm/" in r.name})
    assert {str(i) for i in range(25, 40)} == shown[0]
    assert shown[0] | {"3", "4"} == shown[1]
    assert shown[1] < shown[2]
    assert len(shown[2]) == 20


def test_the_suggested_clip_norm_is_a_quantile_over_the_running_median():
    """It is the 0.95 quantile of norms over medians of 20 steps, times the largest median, rounded to two digits."""
    model = nn.Linear(1, 1, bias=False)
    norms = torch.rand(200).add(0.5).tolist()
    state = fw.State(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), loss=None)
    norm = fw.GradientNorm()
    assert norm.suggested_clip_norm is None
    norm.on_fit_start(state)
    for step, value in enumerate(norms, 1):
        model.weight.grad = torch.full((1, 1), value)
        norm.on_gradients_ready(state)
        if step % 50 == 0:
            state.log.close_window({})
    blocks = torch.tensor(norms, dtype=torch.float64).view(10, 20)
    levels = blocks.quantile(0.5, dim=1)
    relative = (blocks / levels[:, None]).flatten().sort().values
    expected = (relative[189] * levels.max()).item()
    assert pytest.approx(expected, rel=0.05) == norm.suggested_clip_norm
    assert norm.suggested_clip_norm == float(f"{norm.suggested_clip_norm:.2g}")


def test_the_report_has_norms_clipping_and_layers(model, data):
    """state.report always gives the current lines of the end report."""
    trainer = fw.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=[fw.GradientNorm()],
        clip_norm=1e-3,
        device="cpu",
    )
    trainer.fit(DataLoader(data, 8), epochs=3)
    report = {name: line() for name, line in trainer.state.report.items()}
    assert "median" in report["gradient norm"]
    assert "100% of the steps were clipped; suggested clip_norm: " in report["gradient norm"]
    assert report["gradient norm"].endswith("% of the norms exceed")
    assert report["layers not trained"] == ""  # and so left out
    assert report["layers not healthy"] == "none"


def test_histograms_on_request(model, data):
    """With histogram_every=2, every second window has a histogram of each layer's first gradient."""
    keep = run(model, data, log_every=2, histogram_every=2)
    found = [(r.name, r.step, r.value) for r in keep.records if isinstance(r.value, fw.records.Histogram)]
    assert [(f"train/params/gradient/{n}", s) for s in (2, 6) for n in ("0", "2")] == [(n, s) for n, s, _ in found]
    for name, step, histogram in found:
        layer, g = name.rpartition("/")[2], keep.gradients[step - 2]
        elements = torch.cat([g[f"{layer}.weight"].flatten(), g[f"{layer}.bias"]])
        assert pytest.approx((elements.min().item(), elements.max().item())) == (
            histogram.edges[0],
            histogram.edges[-1],
        )
        edges = torch.tensor(histogram.edges, dtype=torch.float64)
        expected = torch.histogram(elements.cpu(), edges).hist
        assert expected.int().tolist() == list(histogram.counts)
        assert pytest.approx(elements.sum().item()) == histogram.sum
        assert pytest.approx(elements.square().sum().item()) == histogram.sum_squares


def test_a_histogram_counts_a_sample():
    """About 10,000 of 300,000 elements are counted; a NaN layer has no histogram, a zero layer one bucket."""
    model = nn.ParameterDict({n: nn.Parameter(torch.zeros(s)) for n, s in (("big", 300_000), ("nan", 3), ("zero", 3))})
    logged = stepped(model, [[torch.randn(300_000), torch.full((3,), float("nan")), torch.zeros(3)]], histogram_every=1)
    assert 9000 < sum(logged["train/params/gradient/big"].counts) <= 10_001
    assert "train/params/gradient/nan" not in logged
    assert max(logged["train/params/gradient/zero"].counts) == 3


def test_options_are_checked():
    """An invalid option raises an error that says what is allowed."""
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        fw.GradientNorm(every=0)
    with pytest.raises(ValueError, match=r"layers must be a regular expression, got '\('"):
        fw.GradientNorm(layers="(")
    with pytest.raises(TypeError, match="layers must be a regular expression or None, got 3"):
        fw.GradientNorm(layers=3)
    with pytest.raises(ValueError, match="histogram_every must be 1 or more"):
        fw.GradientNorm(histogram_every=0)
    with pytest.raises(TypeError, match="rule must be of type GradientRule"):
        fw.GradientNorm(rule=3)


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
@pytest.mark.parametrize("single", [False, True])
def test_a_log_window_of_one_step_has_the_norms_of_that_step(clip_norm, single):
    """Total, layers and clipped norm are those computed in float64; for a model of one parameter too."""
    torch.manual_seed(0)
    net = nn.Linear(5, 2, bias=False) if single else nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    expected, keep = [], Keep()

    class Direct(fw.Callback):
        def on_gradients_ready(self, state):
            expected.append({n: p.grad.double().norm().item() for n, p in state.model.named_parameters()})

    options = {"callbacks": [Direct(), fw.GradientNorm(), keep], "log_every": 1, "clip_norm": clip_norm}
    trainer = fw.Trainer(net, torch.optim.SGD(net.parameters(), 0.1), device="cpu", **options)
    trainer.fit([(torch.randn(8, 5), torch.randint(0, 2, (8,))) for _ in range(5)], epochs=1)
    found = {
        name: [r.value for r in keep.records if r.name == f"train/{name}"]
        for name in ("optim/grad_norm", "optim/grad_norm_max", "optim/grad_norm_clipped", "params/grad_norm/0")
    }
    totals = [math.hypot(*norms.values()) for norms in expected]
    assert found["optim/grad_norm"] == pytest.approx(totals, rel=1e-6)
    assert found["optim/grad_norm_max"] == pytest.approx(totals, rel=1e-6)
    if clip_norm is not None:
        assert found["optim/grad_norm_clipped"] == pytest.approx([min(t, clip_norm) for t in totals], rel=1e-3)
    if not single:
        layers = [math.hypot(norms["0.weight"], norms["0.bias"]) for norms in expected]
        assert found["params/grad_norm/0"] == pytest.approx(layers, rel=1e-6)
