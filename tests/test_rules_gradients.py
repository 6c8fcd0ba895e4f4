"""The rule on gradients, on planted figures."""

import math

import pytest
import torch

import fitwatch as fw
from fitwatch.rules.norms import LogHistogram

HEALTHY = {"mean": 1.0, "max": 2.0, "zero_share": 0.1, "weight_norm": 5.0, "update_norm": 0.01, "lr": 0.1}


def layer(**changes):
    return fw.rules.LayerGradient(**{**HEALTHY, **changes})


class Run:
    """Feeds windows of ten steps to a rule."""

    def __init__(self, **options):
        self.rule, self.step = fw.rules.GradientRule(**options), 0

    def __call__(self, layers=None, *, norms=None, steps=10, not_finite=""):
        norms = [1.0] * steps if norms is None else norms
        first, self.step = self.step + 1, self.step + len(norms)
        return self.rule.update(
            steps=range(first, self.step + 1), norms=norms, layers=layers or {}, not_finite=not_finite
        )


def others(**planted):
    return {"a": layer(), **planted, "z": layer(mean=0.5, max=0.6)}


PLANTED = {
    "vanishing": layer(mean=1e-7, max=1e-6),
    "dead": layer(mean=0.0, max=0.0, zero_share=1.0),
    "no gradient": layer(mean=0.0, max=0.0, zero_share=1.0, has_gradient=False),
}


OVER = {"no gradient": "without a gradient"}


@pytest.mark.parametrize("status", PLANTED)
def test_a_planted_layer_is_named_once_and_its_recovery_too(status):
    """Each fault is reported once, after one window and with its steps, and so is its end."""
    run = Run()
    (finding,) = run(others(bad=PLANTED[status]))
    assert (status, ("bad",), True) == (finding.status, finding.layers, finding.trouble)
    assert "`bad`" in finding.evidence
    assert "steps 1 to 10" in finding.evidence
    assert {"bad": status} == run.rule.statuses
    assert f"{status}: `bad`" == run.rule.trouble()
    assert run(others(bad=PLANTED[status])) == []
    (over,) = run(others(bad=layer()))
    assert (over.status, over.layers, over.trouble) == ("healthy", ("bad",), False)
    assert over.evidence.startswith(f"No longer {OVER.get(status, status)}: `bad`.")
    assert run.rule.trouble() == "none"


@pytest.mark.parametrize("status", PLANTED)
def test_one_step_is_not_enough(status):
    """With windows of one step, three in a row are needed; a healthy one restarts the count."""
    run = Run()
    bad = others(bad=PLANTED[status])
    assert [run(bad, steps=1), run(bad, steps=1), run(others(bad=layer()), steps=1)] == [[], [], []]
    assert [run(bad, steps=1), run(bad, steps=1)] == [[], []]
    assert [status] == [f.status for f in run(bad, steps=1)]


def test_a_norm_too_small_to_square_is_not_dead():
    """A norm of 0 with nonzero elements is vanishing, not dead."""
    (finding,) = Run()(others(bad=layer(mean=0.0, max=0.0, zero_share=0.2)))
    assert finding.status == "vanishing"


def test_what_is_small_for_a_reason_is_not_vanishing():
    """A small norm of small weights, a small norm over large weights alone, and one loud layer are all healthy."""
    assert Run()(others(small=layer(mean=1e-7, max=1e-7, weight_norm=1e-6, update_norm=1e-9))) == []
    assert Run()(others(large=layer(weight_norm=1e7))) == []
    assert Run()(others(loud=layer(mean=1e9, max=1e9))) == []


def test_of_two_layers_the_larger_is_the_reference():
    """Vanishing is found with two layers, but never with one."""
    (finding,) = Run()({"first": PLANTED["vanishing"], "last": layer()})
    assert finding.layers == ("first",)
    assert Run()({"only": PLANTED["vanishing"]}) == []


def test_vanishing_does_not_flip_at_the_threshold():
    """A vanishing layer must exceed ten times the threshold to become healthy."""
    run = Run(vanishing=1e-5)
    assert [f.status for f in run(others(bad=layer(mean=0.4e-5, max=1e-5)))] == ["vanishing"]
    assert run(others(bad=layer(mean=2e-5, max=2e-5))) == []
    assert [f.status for f in run(others(bad=layer(mean=2e-4, max=2e-4)))] == ["healthy"]


def test_a_layer_excluded_from_training_is_a_note():
    """A layer excluded from training is reported at once, without a warning, and so is its return."""
    run = Run()
    (finding,) = run(others(bad=fw.rules.LayerGradient(untrained="requires_grad is False")), steps=1)
    assert (finding.status, finding.trouble) == ("untrained", False)
    assert (run.rule.trouble(), run.rule.untrained()) == ("none", "`bad`")
    assert "requires_grad is False" in finding.evidence
    assert run(others(bad=fw.rules.LayerGradient(untrained="requires_grad is False"))) == []
    (over,) = run(others(bad=layer()))
    assert (over.status, over.trouble) == ("trained", False)
    assert over.evidence.startswith("Now trained: `bad`.")
    assert run.rule.untrained() == "none"


@pytest.mark.parametrize(("lr", "status"), [(0.1, "frozen"), (0.0, "untrained")])
def test_weights_that_do_not_move_are_frozen(lr, status):
    """Two sampled steps that changed nothing make it frozen: a warning, unless the learning rate is 0."""
    run = Run()
    still = layer(update_norm=0.0, lr=lr)
    assert run(others(bad=still)) == []
    (finding,) = run(others(bad=still))
    assert (status, status == "frozen") == (finding.status, finding.trouble)
    assert run(others(bad=layer(update_norm=math.nan))) == []  # not sampled: nothing new
    assert run.rule.statuses == {"bad": status}


def test_a_learning_rate_of_zero_and_a_lost_update_are_counted_separately():
    """One step at learning rate 0 and one with a lost update do not add up to two of either."""
    run = Run()
    assert run(others(bad=layer(update_norm=0.0, lr=0.0))) == []
    assert run(others(bad=layer(update_norm=0.0))) == []
    assert [f.status for f in run(others(bad=layer(update_norm=0.0)))] == ["frozen"]


@pytest.mark.parametrize("sample", [{"update_norm": 0.0}, {"update_norm": 50.0}])
def test_a_sampled_step_without_a_gradient_says_nothing(sample):
    """The update of a layer unused at the sampled step is ignored."""
    run = Run()
    assert [run(others(bad=layer(zero_share=1.0, **sample))) for _ in range(4)] == [[]] * 4


def test_a_parameter_around_zero_does_not_explode():
    """Updates larger than the current weights, but not than the largest they had, are not exploding."""
    run = Run()
    assert run(others(bias=layer(weight_norm=0.05, update_norm=0.01))) == []
    around = others(bias=layer(weight_norm=0.001, update_norm=0.01))
    assert [run(around) for _ in range(3)] == [[]] * 3


@pytest.mark.parametrize("status", PLANTED)
def test_a_status_that_comes_and_goes_is_given_ever_more_rarely(status):
    """After a recovery, the same fault must last ten times as long; a hundred silences of 20 steps give one warning."""
    run = Run()
    bad, good = others(bad=PLANTED[status]), others(bad=layer())
    assert [len(run(layers)) for layers in (bad, bad, good)] == [1, 0, 1]
    for _ in range(100):
        assert [run(layers) for layers in (bad, bad, good)] == [[]] * 3
    found = [run(bad) for _ in range(20)]
    assert found[:19] == [[]] * 19
    assert [f.status for f in found[19]] == [status]
    assert [f.status for f in run(good)] == ["healthy"]
    assert [run(bad) for _ in range(199)] == [[]] * 199


def test_an_occasionally_used_layer_must_be_silent_for_longer():
    """After a window in which 8 of 10 steps had no gradient, 80 steps without one are needed."""
    run = Run()
    assert run(others(bad=layer(zero_steps=8))) == []
    assert [run(others(bad=PLANTED["dead"])) for _ in range(7)] == [[]] * 7
    assert [f.status for f in run(others(bad=PLANTED["dead"]))] == ["dead"]


def test_an_explosion_is_over_when_the_norm_is_well_below_the_threshold():
    """The end is reported at a tenth of the multiple that started it, so that it does not flip."""
    run = Run(exploding=100)
    assert [f.status for norm in (1.0, 300.0) for f in run(norms=[norm] * 20)] == ["exploding"]
    assert run(norms=[50.0] * 20) == []
    assert run(norms=[11.0] * 20) == []
    assert [f.status for f in run(norms=[9.0] * 20)] == ["healthy"]


def test_a_layer_that_outgrows_its_weights_explodes():
    """Two sampled steps larger than the weights, ten steps apart, are reported; the first few steps are not."""
    run = Run()
    wild = others(bad=layer(update_norm=50.0))
    assert run(wild) == []
    (finding,) = run(wild)
    assert (finding.status, finding.layers) == ("exploding", ("bad",))
    run = Run()
    assert [run(wild, steps=1) for _ in range(4)] == [[]] * 4


def test_an_explosion_of_the_norm_is_reported_and_so_is_its_end():
    """A window with a hundred times the previous median is reported with both figures; a single spike is not."""
    run = Run()
    assert run(norms=[1.0] * 30) == []
    assert run(norms=[1.0] * 20 + [1e6]) == []
    (finding,) = run(norms=[300.0] * 10)
    assert finding.status == "exploding"
    assert "is 300, 300 times the previous 1." in finding.evidence
    assert run(norms=[300.0] * 200) == []
    (over,) = run(norms=[2.0] * 10)
    assert over.status == "healthy"


def test_an_explosion_within_the_first_window_is_reported():
    """In the first window, the second half is compared with the first."""
    assert [f.status for f in Run()(norms=[2.0**i for i in range(40)])] == ["exploding"]
    assert Run()(norms=[1.1**i for i in range(40)]) == []


def test_a_return_to_earlier_norms_is_not_an_explosion():
    """After many tiny norms, a window as large as the first ones is not exploding."""
    run = Run()
    assert run(norms=[1.0] * 10) == []
    assert run(norms=[1e-4] * 500) == []
    assert run(norms=[0.9] * 10) == []
    assert [f.status for f in run(norms=[1.1] * 10)] == ["exploding"]


def test_non_finite_gradients_are_reported_at_their_start_and_end():
    """The given sentence is reported once, and so is the end."""
    run = Run()
    (finding,) = run(norms=[1.0, math.nan], not_finite="At step 2 it is gone.")
    assert (finding.status, finding.evidence, finding.trouble) == ("not finite", "At step 2 it is gone.", True)
    assert run(norms=[math.nan], not_finite="At step 3 too.") == []
    (over,) = run(norms=[1.0])
    assert (over.status, over.trouble) == ("healthy", False)
    assert "since step 4" in over.evidence


def test_layers_with_a_nan_keep_their_status():
    """A layer with a non-finite norm keeps its status."""
    assert Run()(others(bad=layer(mean=math.nan, max=math.nan))) == []


def test_many_layers_share_a_sentence():
    """Layers with one status are named together, five of them by name."""
    (finding,) = Run()({"a": layer(), "b": layer(), "c": layer(), **{f"bad{i}": PLANTED["dead"] for i in range(9)}})
    assert len(finding.layers) == 9
    assert "`bad4` and 4 more" in finding.evidence


def test_all_gradients_zero_has_a_separate_sentence():
    """If every gradient is zero, the sentence suggests the loss as the cause."""
    (finding,) = Run()({"a": PLANTED["dead"], "b": PLANTED["dead"]}, norms=[0.0] * 10)
    assert "Every gradient was exactly zero" in finding.evidence


def test_quantiles_are_those_of_all_values_within_a_percent():
    """Over values of many orders, quantiles agree with the sorted values within half a bucket, and zeros count."""
    values = torch.randn(5000).mul(4).exp().double()
    histogram = LogHistogram()
    histogram.add(values.tolist())
    for share in (0.01, 0.5, 0.95, 0.999):
        expected = values.sort().values[math.ceil(share * 5000) - 1].item()
        assert histogram.quantile(share) == pytest.approx(expected, rel=0.006)
    above = (values > 3.0).double().mean().item()
    assert histogram.share_above(3.0) == pytest.approx(above, abs=0.005)
    histogram.add([0.0] * 20000)
    assert histogram.share_above(3.0) == pytest.approx(above / 5, abs=0.001)
    assert histogram.quantile(0.5) == 0
    assert LogHistogram().quantile(0.5) is None
    assert math.isnan(LogHistogram().share_above(1.0))


def test_the_summary_counts_spikes():
    """The summary has median, 95 % quantile, the largest norm with its step, and how many were spikes."""
    run = Run()
    run(norms=[1.0] * 95 + [2.0] * 3 + [50.0, 3.0])
    assert run.rule.summary() == "median 1, 95th percentile 1, largest 50 at step 99, 1 step above 10 times the median"
    assert fw.rules.GradientRule().summary() == "no finite norm was seen"
    assert fw.rules.GradientRule().clip_norm is None


@pytest.mark.parametrize("window", [1, 7, 50])
def test_the_norm_to_clip_to_is_above_all_but_spikes(window):
    """Spikes in 2 % of steps over norms that fall by 1e6 are cut where the level is highest, whatever the windows."""
    level = torch.logspace(0, -6, 1000, dtype=torch.float64)
    norms = (level * (1 + 0.2 * torch.rand(1000))).tolist()
    norms[::50] = [100 * norm for norm in norms[::50]]
    run = Run()
    for start in range(0, 1000, window):
        run(norms=norms[start : start + window])
    assert 0.8 < run.rule.clip_norm < 1.5
    assert sum(norm > run.rule.clip_norm for norm in norms) < 20


def test_an_explosion_does_not_change_the_clip_norm():
    """Norms during an explosion are ignored: a clip_norm taken from them would not have prevented it."""
    run = Run()
    run(norms=[1.0] * 40)
    before = run.rule.clip_norm
    assert [f.status for f in run(norms=[1e9] * 20)] == ["exploding"]
    run(norms=[1e12] * 20)
    assert before == run.rule.clip_norm == pytest.approx(1, rel=0.01)


def test_a_rule_continues_from_its_state():
    """A new rule that loads the state of another gives the same findings from there on."""
    windows = [
        others(bad=PLANTED["dead"]),
        others(bad=PLANTED["dead"], still=layer(update_norm=0.0)),
        others(bad=layer(), still=layer(update_norm=0.0)),
    ]
    norms = [[1.0] * 10, [500.0] * 10, [1.0] * 10]
    whole, first, second = Run(), Run(), Run()
    expected = [whole(w, norms=n) for w, n in zip(windows, norms, strict=True)]
    found = [first(windows[0], norms=norms[0]), first(windows[1], norms=norms[1])]
    second.rule.load_state_dict(first.rule.state_dict())
    second.step = first.step
    found.append(second(windows[2], norms=norms[2]))
    assert expected == found
    assert whole.rule.state_dict() == second.rule.state_dict()
    assert [len(f) for f in expected] == [1, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vanishing": 0}, "vanishing must be finite and greater than 0"),
        ({"vanishing": 1.5}, "vanishing must be below 1, got 1.5"),
        ({"exploding": 1}, "exploding must be finite and greater than 1"),
        ({"readings": 0}, "readings must be 1 or more"),
    ],
)
def test_options_are_checked(options, message):
    """Options out of range are refused, with what is allowed."""
    with pytest.raises(ValueError, match=message):
        fw.rules.GradientRule(**options)
