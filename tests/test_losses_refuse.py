"""Losses raise descriptive errors for invalid inputs."""

import pytest
import torch
import torch.nn.functional as F

import fitwatch as fw
from fitwatch.losses import BinaryCrossEntropy, CrossEntropy, RealWorldCrossEntropy
from tests._losses import refused

X = torch.zeros(4, 3)
Y = torch.tensor([0, 1, 2, 0])
ZERO_DIM = torch.tensor(0.0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": [1.0, 2, 3]}])
@pytest.mark.parametrize(
    ("output", "target", "error", "words"),
    [
        (X, Y[:3], ValueError, ["(4, 3)", "(3,)", "indices of shape (4,)", "probabilities of shape (4, 3)"]),
        (X, Y.unsqueeze(1), ValueError, ["(4, 3)", "(4, 1)"]),
        (X, torch.tensor(1), ValueError, ["(4, 3)", "()"]),
        (X[0], Y[:3], ValueError, ["torch.int64", "probabilities"]),
        (torch.zeros(4, 3, 2), Y, ValueError, ["(4, 3, 2)", "(4,)", "(4, 2)"]),
        (torch.zeros(4, 3, 6), torch.zeros(4, 2, 3).long(), ValueError, ["(4, 3, 6)", "(4, 2, 3)", "(4, 6)"]),
        (ZERO_DIM, torch.tensor(0), ValueError, ["class dimension"]),
        (X, Y.float(), ValueError, ["torch.float32", "torch.int64", "target.long()"]),
        (X, Y.int(), ValueError, ["torch.int32", "torch.float32", "torch.int64"]),
        (X, Y.bool(), ValueError, ["torch.bool"]),
        (X, F.one_hot(Y, 3), ValueError, ["torch.int64", "torch.float32", "probabilities"]),
        (X.long(), Y, ValueError, ["torch.int64", "floating-point logits"]),
        (X, torch.tensor([0, 1, 3, 0]), IndexError, ["label 3 at index 2", "0..2", "ignore_index=-100"]),
        (X, torch.tensor([0, -1, 1, 0]), IndexError, ["label -1 at index 1"]),
        (X[0], torch.tensor(3), IndexError, ["label 3 at index 0"]),
        (torch.zeros(1, 3, 2), torch.tensor([[0, 9]]), IndexError, ["label 9 at index 0, 1"]),
        (X[:, :1], Y, ValueError, ["at least two classes", "BinaryCrossEntropy"]),
        (X[:, :1], X[:, :1], ValueError, ["at least two classes"]),
        (X[:1, :1], Y[:1], ValueError, ["at least two classes"]),
        (X[:, 0], Y, ValueError, ["(4,)", "one logit per example", "BinaryCrossEntropy"]),
        (X[:, 0], Y.clamp(max=1).float(), ValueError, ["sum to 1, got 2", "one logit per example"]),
        ([1.0, 2], Y, TypeError, ["list and Tensor"]),
        (X, [0, 1, 2, 0], TypeError, ["Tensor and list"]),
    ],
)
def test_cross_entropy_refuses(output, target, error, words, options):
    """Outputs and targets that do not fit are refused with both shapes or dtypes, or the label and its index."""
    refused(CrossEntropy(**options), output, target, error, *words)


def test_the_clear_error_keeps_torchs_own():
    """The descriptive error of a failed kernel is raised in the context of torch's own error."""
    with pytest.raises(IndexError) as info:
        CrossEntropy().sums(X, Y + 1)
    assert "out of bounds" in str(info.value.__context__)


def test_weights_that_do_not_fit_are_refused():
    """Weights of the wrong length or on another device are refused with both lengths or devices."""
    refused(CrossEntropy([1.0, 2]), X, Y, ValueError, "2 class weights", "3 classes")
    refused(
        RealWorldCrossEntropy([1.0, 2], [[0, 1], [1, 0]]), X, Y, ValueError, "2 class weights or costs", "3 classes"
    )
    refused(CrossEntropy([1.0, 2, 3]).to("meta"), X, Y, ValueError, "on meta", "on cpu", ".to('cpu')")
    refused(BinaryCrossEntropy(2).to("meta"), X, X, ValueError, "on meta", "on cpu")
    refused(CrossEntropy(ignore_index=1), X, X.softmax(1), ValueError, "ignore_index=1", "probabilities")


def test_errors_that_are_not_ours_pass_through():
    """Errors that are not caused by invalid input are raised unchanged."""

    class Broken(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.log_softmax:
                raise RuntimeError("out of memory")
            return super().__torch_function__(func, types, args, kwargs)

    with pytest.raises(RuntimeError, match="out of memory"):
        CrossEntropy().sums(X.as_subclass(Broken), Y)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), BinaryCrossEntropy(2), RealWorldCrossEntropy(2, 1)])
def test_binary_losses_refuse(loss):
    """Binary losses refuse shapes that torch would broadcast, integer logits and objects that are not tensors."""
    column, row = torch.zeros(4, 1), torch.zeros(4)
    refused(loss, column, row, ValueError, "(4, 1)", "(4,)", "output.squeeze(-1)")
    refused(loss, row, column, ValueError, "(4, 1)", "(4,)", "target.squeeze(-1)")
    refused(loss, row, row[:3], ValueError, "(4,)", "(3,)")
    refused(loss, torch.zeros(4, 2), row, ValueError, "(4, 2)", "CrossEntropy")
    refused(loss, row.long(), row, ValueError, "torch.int64", "torch.float32")
    refused(loss, row, [0, 0, 0, 0], TypeError, "Tensor and list")


def test_binary_losses_refuse_columns_that_are_not_theirs():
    """A pos_weight for K labels needs (N, K), also where torch would broadcast it; costs as numbers need one logit."""
    refused(
        BinaryCrossEntropy([1.0, 2, 3, 4]), torch.zeros(4), torch.zeros(4), ValueError, "4 values", "(N, 4)", "(4,)"
    )
    refused(BinaryCrossEntropy([1.0, 2, 3, 4]), torch.zeros(4, 1), torch.zeros(4, 1), ValueError, "(N, 4)", "(4, 1)")
    refused(RealWorldCrossEntropy(2, 1), torch.zeros(4, 2), torch.zeros(4, 2), ValueError, "(N, 1)", "costs per class")


def test_real_world_refuses_what_cross_entropy_refuses():
    """The multiclass form names shapes, dtypes and labels as cross-entropy does, and refuses probabilities."""
    loss = RealWorldCrossEntropy([1.0, 1, 1], 1 - torch.eye(3))
    refused(loss, X, Y[:3], ValueError, "(4, 3)", "(3,)", "(4,)")
    refused(loss, X, Y.int(), ValueError, "torch.int32")
    refused(loss, X, X.softmax(1), ValueError, "expected class indices of shape (4,)")
    for label in (-1, -100, 3):
        refused(loss, X, torch.tensor([0, 0, label, 0]), IndexError, f"label {label} at index 2", "0..2")


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: CrossEntropy([[1.0, 2]]), r"shape \(1, 2\)"),
        (lambda: CrossEntropy([1.0, -2]), "at least 0"),
        (lambda: CrossEntropy([1.0, float("nan")]), "finite"),
        (lambda: CrossEntropy([0.0, 0]), "not all be 0"),
        (lambda: CrossEntropy().weighted(torch.zeros(2)), "not all be 0"),
        (lambda: CrossEntropy(label_smoothing=1.5), r"in \[0, 1\], got 1.5"),
        (lambda: CrossEntropy(label_smoothing=float("nan")), "got nan"),
        (lambda: CrossEntropy(ignore_index=None), "integer, got None"),
        (lambda: BinaryCrossEntropy(0), "greater than 0"),
        (lambda: BinaryCrossEntropy(float("inf")), "finite"),
        (lambda: BinaryCrossEntropy([[1.0]]), r"shape \(1, 1\)"),
        (lambda: RealWorldCrossEntropy(1, [[0, 1], [1, 0]]), "two numbers"),
        (lambda: RealWorldCrossEntropy([1.0, 1], 1), "two numbers"),
        (lambda: RealWorldCrossEntropy(0, 0), "all 0"),
        (lambda: RealWorldCrossEntropy(-1, 1), "fn_cost must be finite and at least 0"),
        (lambda: RealWorldCrossEntropy(1, float("inf")), "fp_cost must be finite"),
        (lambda: RealWorldCrossEntropy([1.0, 1], torch.ones(2, 2)), "zero diagonal"),
        (lambda: RealWorldCrossEntropy([1.0, 1], torch.zeros(3, 3)), r"fp_cost of shape \(C, C\).*got .* \(3, 3\)"),
        (lambda: RealWorldCrossEntropy([1.0], [[0.0]]), "two classes or more"),
    ],
)
def test_options_out_of_range_are_refused(build, match):
    """Invalid options are refused at construction, with the value given."""
    with pytest.raises(ValueError, match=match):
        build()


def test_options_are_keyword_only():
    """Smoothing and ignored index can only be given by name."""
    with pytest.raises(TypeError):
        CrossEntropy(None, 0.1)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), RealWorldCrossEntropy(20.0, 1.0)], ids=["binary", "costs"])
def test_binary_targets_out_of_range_are_named(loss):
    """A label outside [0, 1] is refused with its value and its index in the batch."""
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2.0 at index 3"):
        loss.sums(torch.zeros(5), torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0]))


@pytest.mark.parametrize("loss", [fw.CrossEntropy(), fw.losses.Focal(), fw.RealWorldCrossEntropy([[0.0, 1], [2, 0]])])
@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        ([1, 2, 2, 1], "labels start at 0: if yours start at 1, subtract 1"),
        ([0, 2, 2, 1], None),
        ([1, 3, 2, 1], None),
        ([-1, 1, 1, -1], "labels are 0 and 1"),
        ([-1, 0, 1, -1], None),
    ],
)
def test_labels_of_another_coding_are_told_how_to_change(loss, labels, hint):
    """Labels 1 to C, or -1 and 1, out of range give the way to labels from 0; others do not."""
    with pytest.raises(IndexError, match="out of range") as info:
        loss(torch.zeros(4, 2), torch.tensor(labels))
    assert (hint in str(info.value)) if hint else ("if yours" not in str(info.value))


@pytest.mark.parametrize("loss", [fw.BinaryCrossEntropy(), fw.losses.Focal(), fw.RealWorldCrossEntropy(2, 1)])
def test_binary_labels_of_minus_one_and_one_are_told_how_to_change(loss):
    """Targets -1 and 1 of one logit say that labels are 0 and 1, and targets 0 and 2 do not."""
    with pytest.raises(ValueError, match="labels are 0 and 1: if yours are -1 and 1"):
        loss(torch.zeros(4), torch.tensor([-1.0, 1, 1, -1]))
    with pytest.raises(ValueError, match="got 2.0 at index 1$"):
        loss(torch.zeros(4), torch.tensor([0.0, 2, 0, 0]))


def test_messages_of_shapes_and_types_name_the_way_out():
    """A column against a vector, a list of tensors, outputs in a container, and a third part that is no tensor."""
    vector, column = torch.zeros(4), torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"use output.squeeze\(-1\)"):
        fw.MeanSquaredError()(column, vector)
    with pytest.raises(ValueError, match=r"use target.squeeze\(-1\)"):
        fw.MeanSquaredError()(vector, column)
    with pytest.raises(TypeError, match="got Tensor and list.*torch.stack"):
        fw.CrossEntropy()(torch.zeros(2, 2), [torch.tensor(0), torch.tensor(1)])
    for output in ((column, column), {"logits": column}):
        with pytest.raises(TypeError, match="loss that picks the part.*override training_step and validation_step"):
            fw.CrossEntropy()(output, torch.zeros(4, dtype=torch.int64))
    for third in (["a", "b"], [1.0, 2.0], ("a", "b")):
        with pytest.raises(TypeError, match="third part of the batch.*override training_step"):
            fw.CrossEntropy().sums(torch.zeros(2, 2), torch.tensor([0, 1]), third)
