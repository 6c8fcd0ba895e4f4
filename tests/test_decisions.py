"""Real-world costs equal a count by hand, and cost-optimal decisions cost least."""

import copy
import pickle

import pytest
import torch

from fitwatch import CostMatrix
from fitwatch.losses import confusion_matrix, cost_optimal_decision, real_world_cost
from fitwatch.losses.costs import confusion_sums, decide, probabilities_of

FN = torch.tensor([1.0, 2, 5])
FP = torch.tensor([[0.0, 1, 2], [3, 0, 1], [7, 2, 0]])


def random_problem(n=200, num_classes=3):
    """Random outputs and targets."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, num_classes, generator=generator), torch.randint(0, num_classes, (n,), generator=generator)


def test_cost_matrix_adds_the_miss_and_the_false_alarm():
    """Entry (i, j) is fn[i] + fp[i, j], the diagonal is 0, and two numbers give [[0, fp], [fn, 0]]."""
    assert CostMatrix(FN, FP).matrix.tolist() == [[0, 2, 3], [5, 0, 3], [12, 7, 0]]
    assert CostMatrix(20, 3).matrix.tolist() == [[0, 3], [20, 0]]
    assert CostMatrix([1, 2], [[0, 1], [1, 0]]).matrix.tolist() == [[0, 2], [3, 0]]


def test_cost_matrix_does_not_change_its_arguments():
    """The costs given stay as they were, and keep float64."""
    fn, fp = FN.double(), FP.double()
    assert CostMatrix(fn, fp).matrix.dtype is torch.float64
    assert torch.equal(fn, FN.double())
    assert torch.equal(fp, FP.double())


def test_confusion_matrix_counts():
    """Rows are the true classes, columns the predicted ones, as a count by hand gives."""
    outputs, targets = random_problem()
    predicted = outputs.argmax(1)
    expected = [[0] * 4 for _ in range(4)]
    for i, j in zip(targets.tolist(), predicted.tolist(), strict=True):
        expected[i][j] += 1
    result = confusion_matrix(predicted, targets, 4)
    assert (result.tolist(), result.dtype) == (expected, torch.int64)


def test_confusion_sums_take_targets_that_are_not_classes():
    """Sums of the weights by true and predicted class; targets that are not classes, in any dtype, have a last row."""
    predicted, weights = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64)
    for odd in (torch.tensor([0, 1, 0, -100, 2, 0]), torch.tensor([0, 1, 0, torch.nan, 0.5, 0])):
        sums = confusion_sums(predicted, odd, 2, weights)
        assert (sums.tolist(), sums.dtype) == ([[33, 4], [0, 2], [8, 16]], torch.float64)


@pytest.mark.parametrize(
    ("predicted", "targets", "match"),
    [
        ([0, 1], [0], r"\(2,\) and \(1,\)"),
        ([0, 3], [0, 1], r"predicted must be classes 0\.\.2, got 3 at index 1"),
        ([0, 1], [-1, 1], "targets must be classes .*, got -1 at index 0"),
    ],
)
def test_confusion_matrix_refuses(predicted, targets, match):
    """Different shapes and classes out of range are refused, and named."""
    with pytest.raises(ValueError, match=match):
        confusion_matrix(torch.tensor(predicted), torch.tensor(targets), 3)


def test_real_world_cost_is_the_sum_over_mistakes():
    """The multiclass cost is the mean over the examples of fn[i] + fp[i, j] where i is called j."""
    outputs, targets = random_problem()
    expected = 0.0
    for i, j in zip(targets.tolist(), outputs.argmax(1).tolist(), strict=True):
        expected += 0 if i == j else FN[i].item() + FP[i, j].item()
    assert real_world_cost(outputs, targets, CostMatrix(FN, FP)).item() == pytest.approx(expected / 200)
    assert real_world_cost(outputs.bfloat16(), outputs.bfloat16().argmax(1), CostMatrix(FN, FP)).item() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_binary_real_world_cost_counts_both_errors(dtype):
    """The binary cost is (FN c_fn + FP c_fp) / N at logit 0, for (N,), (N, 1) and two columns alike."""
    z = torch.tensor([2.0, -1, -3, 0.5, 0])
    y = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    costs, expected = CostMatrix(20, 3), (2 * 20 + 1 * 3) / 5
    assert real_world_cost(z, y, costs).item() == pytest.approx(expected)
    assert real_world_cost(z.unsqueeze(1), y.unsqueeze(1), costs).item() == pytest.approx(expected)
    assert real_world_cost(torch.stack([-z, z], 1), y, costs).item() == pytest.approx(expected)
    assert real_world_cost(z[:0], y[:0], costs).isnan()


@pytest.mark.parametrize(
    ("outputs", "targets", "costs", "match"),
    [
        (torch.zeros(4, 2), torch.zeros(4), (FN, FP), r"\(N, 3\).*got shape \(4, 2\)"),
        (torch.zeros(4, 3), torch.zeros(4), (2, 1), r"\(N, 2\).*got shape \(4, 3\)"),
        (torch.zeros(4), torch.zeros(4), (FN, FP), r"got shape \(4,\)"),
        (torch.zeros(4, 1), torch.zeros(4), (2, 1), r"\(4, 1\) and \(4,\)"),
        (torch.zeros(4), torch.full((4,), 2), (2, 1), r"targets must be classes 0\.\.1, got 2 at index 0"),
        (torch.zeros(4, 3), torch.zeros(4), (FP.expand(4, 3, 3),), r"shape \(C, C\), got shape \(4, 3, 3\)"),
    ],
)
def test_real_world_cost_refuses(outputs, targets, costs, match):
    """Outputs, targets and costs that do not go together are refused."""
    with pytest.raises(ValueError, match=match):
        real_world_cost(outputs, targets, CostMatrix(*costs) if len(costs) == 2 else costs[0])


def test_cost_optimal_decision_minimises_the_expected_cost():
    """The decision is the column of least expected cost, computed here entry by entry."""
    probabilities = random_problem()[0].double().softmax(1)
    costs = CostMatrix(FN.double(), FP.double()).matrix
    decisions = cost_optimal_decision(probabilities, costs)
    for p, decision in zip(probabilities.tolist(), decisions.tolist(), strict=True):
        expected = [sum(p[k] * costs[k, j].item() for k in range(3)) for j in range(3)]
        assert decision == expected.index(min(expected))


def test_equal_costs_decide_for_the_largest_probability():
    """Where all mistakes cost the same, the decision is argmax, in half precision too."""
    probabilities = random_problem()[0].softmax(1)
    costs = (1 - torch.eye(3)).tolist()
    assert torch.equal(cost_optimal_decision(probabilities, costs), probabilities.argmax(1))
    half = probabilities.bfloat16()
    assert torch.equal(cost_optimal_decision(half, costs), cost_optimal_decision(half.float(), costs))


def test_binary_decisions_are_elkans_threshold():
    """With two numbers the positive class is chosen above p = fp / (fp + fn)."""
    p = torch.tensor([0.01, 0.12, 0.14, 0.6])
    decisions = cost_optimal_decision(torch.stack([1 - p, p], 1), CostMatrix(20, 3).matrix)
    assert decisions.tolist() == (p > 3 / 23).long().tolist()


def test_the_cost_optimal_decision_costs_least_for_true_probabilities():
    """Where labels are drawn from the probabilities, the decision costs less than argmax, and its expectation is met."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(20_000, 3, generator=generator, dtype=torch.float64).softmax(1)
    targets = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    costs = CostMatrix(FN.double(), FP.double()).matrix
    optimal = cost_optimal_decision(probabilities, costs)
    paid, paid_by_argmax = (costs[targets, chosen].mean().item() for chosen in (optimal, probabilities.argmax(1)))
    assert paid < paid_by_argmax
    assert paid == pytest.approx((probabilities @ costs).amin(1).mean().item(), rel=0.03)


@pytest.mark.parametrize(
    ("probabilities", "costs", "match"),
    [
        (torch.ones(4, 2) / 2, 1 - torch.eye(3), r"\(4, 2\) and \(3, 3\)"),
        (torch.ones(4), 1 - torch.eye(4), r"\(4,\) and \(4, 4\)"),
        (torch.ones(4, 2) / 2, torch.ones(2, 2) / 0, "finite"),
        (torch.tensor([[2.0, -1]]), 1 - torch.eye(2), "softmax"),
        (torch.tensor([[2.0, 3]]), 1 - torch.eye(2), "softmax"),
        (torch.tensor([[float("nan"), 1]]), 1 - torch.eye(2), "softmax"),
    ],
)
def test_cost_optimal_decision_refuses(probabilities, costs, match):
    """Shapes that do not fit, infinite costs, and logits instead of probabilities are refused."""
    with pytest.raises(ValueError, match=match):
        cost_optimal_decision(probabilities, costs)


def test_a_whole_matrix_is_split_into_misses_and_what_single_mistakes_cost_on_top():
    """Equal costs are a miss of 1 and nothing on top, the paper's 19 for one pair stay a 19, and the parts add up."""
    equal = CostMatrix(1 - torch.eye(3))
    assert (equal.fn_cost.tolist(), equal.fp_cost.any().item()) == ([1, 1, 1], False)
    pair = 1 - torch.eye(3)
    pair[0, 2] = 20
    split = CostMatrix(pair)
    assert split.fn_cost.tolist() == [1, 1, 1]
    assert split.fp_cost.tolist() == [[0, 0, 19], [0, 0, 0], [0, 0, 0]]
    given = CostMatrix(FN, FP)
    assert torch.equal(given.fn_cost, FN)
    assert torch.equal(CostMatrix(given.matrix).matrix, given.matrix)
    two = CostMatrix(20, 3)
    assert (two.fn_cost.tolist(), two.fp_cost.tolist()) == ([3, 20], [[0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("costs", "options", "match"),
    [
        ((2, FP), {}, "two numbers"),
        ((-2, 1), {}, "fn_cost must be finite and at least 0"),
        ((5,), {}, r"fp_cost beside it; got shape \(\)"),
        (([[0, 1, 2], [1, 0, 2]],), {}, r"shape \(C, C\).*got shape \(2, 3\)"),
        (([[0]],), {}, "C >= 2"),
        (([[0, -1], [1, 0]],), {}, "at least 0"),
        (([[0, float("nan")], [1, 0]],), {}, "finite"),
        (([[1, 1], [1, 0]],), {}, "zero diagonal"),
        (([[0, 0], [0, 0]],), {}, "all 0"),
        ((2, 1), {"classes": ["a"]}, "2 different names"),
        ((2, 1), {"classes": ["a", "a"]}, "2 different names"),
        ((2, 1), {"classes": [0, 1]}, "2 different names"),
        ((2, 1), {"classes": "ab"}, "2 different names"),
    ],
)
def test_cost_matrix_refuses(costs, options, match):
    """Invalid costs, and names that do not fit the classes, are refused with the value given."""
    with pytest.raises(ValueError, match=match):
        CostMatrix(*costs, **options)


def test_cost_matrix_copies_and_prints():
    """A copy and a pickled one have the same costs and names, which its repr shows; nothing can be assigned to it."""
    costs = CostMatrix(20, 3, classes=["well", "ill"])
    for other in (copy.deepcopy(costs), pickle.loads(pickle.dumps(costs))):  # noqa: S301 - our own bytes
        assert torch.equal(other.matrix, costs.matrix)
        assert other.classes == ("well", "ill")
    assert repr(costs) == "CostMatrix([[0.0, 3.0], [20.0, 0.0]], classes=['well', 'ill'])"
    with pytest.raises(AttributeError):
        costs.matrix = torch.eye(2)


def test_costs_by_example_and_savings_are_those_of_a_loop():
    """Each decision costs its entry of the matrix; savings compare with the best single answer, weights included."""
    outputs, targets = random_problem()
    costs, decisions = CostMatrix(FN, FP), outputs.argmax(1)
    by_hand = [costs.matrix[t, d].item() for t, d in zip(targets.tolist(), decisions.tolist(), strict=True)]
    assert costs.per_example(decisions, targets).tolist() == by_hand
    constant = [sum(costs.matrix[t, j].item() for t in targets.tolist()) for j in range(3)]
    answer, cost = costs.cheapest_constant(torch.bincount(targets))
    assert (answer, cost) == (constant.index(min(constant)), pytest.approx(min(constant) / 200))
    assert costs.savings(decisions, targets).item() == pytest.approx(1 - sum(by_hand) / min(constant))
    assert costs.savings(torch.full_like(targets, answer), targets).item() == pytest.approx(0)
    assert costs.savings(targets, targets).item() == 1
    assert costs.savings(targets[:0], targets[:0]).isnan()
    half = torch.arange(200) % 2
    kept = costs.savings(decisions, targets, sample_weight=half)
    assert kept.item() == pytest.approx(costs.savings(decisions[1::2], targets[1::2]).item())
    with pytest.raises(ValueError, match="not all 0"):
        costs.cheapest_constant([0, 0, 0])


def test_weights_of_examples_count_in_costs():
    """Integer weights are repeated examples, in the cost and in the confusion matrix."""
    outputs, targets = random_problem()
    weight = torch.arange(200) % 3
    again = torch.arange(200).repeat_interleave(weight)
    costs = CostMatrix(FN, FP)
    torch.testing.assert_close(
        real_world_cost(outputs, targets, costs, sample_weight=weight),
        real_world_cost(outputs[again], targets[again], costs),
    )
    weighted = confusion_matrix(outputs.argmax(1), targets, 3, sample_weight=weight)
    assert weighted.tolist() == confusion_matrix(outputs[again].argmax(1), targets[again], 3).tolist()


def test_one_logit_is_the_second_of_two():
    """Decisions and probabilities of one logit are those of the logits (0, z), and p alone may be given."""
    z = torch.linspace(-30, 30, 41)
    both = torch.stack([torch.zeros_like(z), z], 1)
    for one in (z, z.unsqueeze(1)):
        assert torch.equal(decide(one), both.argmax(1))
        torch.testing.assert_close(probabilities_of(one), both.softmax(1))
        p = one.sigmoid()
        assert torch.equal(cost_optimal_decision(p, CostMatrix(20, 3)), (p.flatten() > 3 / 23).long())
