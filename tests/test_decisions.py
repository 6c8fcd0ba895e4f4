"""Real-world costs are what counting by hand gives, and cost-optimal decisions cost least."""

import pytest
import torch

from fitwatch.decisions import confusion_matrix, cost_matrix, cost_optimal_decision, real_world_cost

FN = torch.tensor([1.0, 2, 5])
FP = torch.tensor([[0.0, 1, 2], [3, 0, 1], [7, 2, 0]])


def random_problem(n=200, num_classes=3):
    """Outputs and targets without any relation."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, num_classes, generator=generator), torch.randint(0, num_classes, (n,), generator=generator)


def test_cost_matrix_adds_the_miss_and_the_false_alarm():
    """Entry (i, j) is fn[i] + fp[i, j], the diagonal is 0, and two numbers give [[0, fp], [fn, 0]]."""
    assert cost_matrix(FN, FP).tolist() == [[0, 2, 3], [5, 0, 3], [12, 7, 0]]
    assert cost_matrix(20, 3).tolist() == [[0, 3], [20, 0]]
    assert cost_matrix([1, 2], [[0, 1], [1, 0]]).tolist() == [[0, 2], [3, 0]]


def test_cost_matrix_does_not_change_its_arguments():
    """The costs given stay as they were, and keep float64."""
    fn, fp = FN.double(), FP.double()
    assert cost_matrix(fn, fp).dtype is torch.float64
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


@pytest.mark.parametrize(
    ("predicted", "targets", "match"),
    [
        ([0, 1], [0], r"\(2,\) and \(1,\)"),
        ([0, 3], [0, 1], "predicted has class 3 at index 1: allowed are 0..2"),
        ([0, 1], [-1, 1], "targets has class -1 at index 0"),
    ],
)
def test_confusion_matrix_refuses(predicted, targets, match):
    """Different shapes and classes out of range are refused by name."""
    with pytest.raises(ValueError, match=match):
        confusion_matrix(torch.tensor(predicted), torch.tensor(targets), 3)


def test_real_world_cost_is_the_sum_over_mistakes():
    """The multiclass cost is the mean over the examples of fn[i] + fp[i, j] where i is called j."""
    outputs, targets = random_problem()
    expected = 0.0
    for i, j in zip(targets.tolist(), outputs.argmax(1).tolist(), strict=True):
        expected += 0 if i == j else FN[i].item() + FP[i, j].item()
    assert real_world_cost(outputs, targets, FN, FP).item() == pytest.approx(expected / 200)
    assert real_world_cost(outputs.bfloat16(), outputs.bfloat16().argmax(1), FN, FP).item() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_binary_real_world_cost_counts_both_errors(dtype):
    """The binary cost is (FN c_fn + FP c_fp) / N at logit 0, for (N,), (N, 1) and two columns alike."""
    z = torch.tensor([2.0, -1, -3, 0.5, 0])
    y = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    expected = (2 * 20 + 1 * 3) / 5
    assert real_world_cost(z, y, 20, 3).item() == pytest.approx(expected)
    assert real_world_cost(z.unsqueeze(1), y.unsqueeze(1), 20, 3).item() == pytest.approx(expected)
    assert real_world_cost(torch.stack([-z, z], 1), y, 20, 3).item() == pytest.approx(expected)
    assert real_world_cost(z[:0], y[:0], 20, 3).isnan()


@pytest.mark.parametrize(
    ("outputs", "targets", "costs", "match"),
    [
        (torch.zeros(4, 2), torch.zeros(4), (FN, FP), r"\(N, 3\).*got shape \(4, 2\)"),
        (torch.zeros(4, 3), torch.zeros(4), (2, 1), r"\(N, 2\).*got shape \(4, 3\)"),
        (torch.zeros(4), torch.zeros(4), (FN, FP), r"got shape \(4,\)"),
        (torch.zeros(4, 1), torch.zeros(4), (2, 1), r"\(4, 1\) and \(4,\)"),
        (torch.zeros(4), torch.full((4,), 2), (2, 1), "class 2 at index 0"),
        (torch.zeros(4), torch.zeros(4), (2, FP), "two numbers"),
        (torch.zeros(4), torch.zeros(4), (-2, 1), "at least 0"),
    ],
)
def test_real_world_cost_refuses(outputs, targets, costs, match):
    """Outputs, targets and costs that do not go together are refused."""
    with pytest.raises(ValueError, match=match):
        real_world_cost(outputs, targets, *costs)


def test_cost_optimal_decision_minimises_the_expected_cost():
    """The decision is the column of least expected cost, computed here entry by entry."""
    probabilities = random_problem()[0].double().softmax(1)
    costs = cost_matrix(FN.double(), FP.double())
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
    decisions = cost_optimal_decision(torch.stack([1 - p, p], 1), cost_matrix(20, 3))
    assert decisions.tolist() == (p > 3 / 23).long().tolist()


def test_the_cost_optimal_decision_costs_least_for_true_probabilities():
    """Where labels are drawn from the probabilities, the decision costs less than argmax, and its expectation is met."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(20_000, 3, generator=generator, dtype=torch.float64).softmax(1)
    targets = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    costs = cost_matrix(FN.double(), FP.double())
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
    """Shapes that do not fit, infinite costs, and logits in place of probabilities are refused."""
    with pytest.raises(ValueError, match=match):
        cost_optimal_decision(probabilities, costs)
