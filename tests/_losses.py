"""Outputs, targets and comparisons for the tests of the losses."""

import pytest
import torch

SHAPES = [(7, 5), (7, 5, 3), (7, 5, 3, 2), (7, 5, 2, 3, 2), (5,)]


def logits(*shape, scale=2.0, dtype=torch.float64, seed=0):
    """Random logits that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def labels(shape, num_classes, seed=1):
    """Random class indices."""
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(seed))


def weights_of(num_classes, seed=2):
    """Random class weights, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_classes, generator=generator, dtype=torch.float64) + 0.1


def value_and_gradient(function, output):
    """A function of the outputs, and its gradient."""
    output = output.detach().clone().requires_grad_()
    value = function(output)
    (gradient,) = torch.autograd.grad(value, output)
    return value.detach(), gradient


def assert_same(expected, actual, output, rtol=1e-12, atol=1e-13):
    """Two functions of the outputs have the same value and gradient."""
    for one, other in zip(value_and_gradient(expected, output), value_and_gradient(actual, output), strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)


def target_for(shape, kind):
    """A target of the kind for logits of this shape."""
    if kind == "probabilities":
        return logits(*shape, seed=5).detach().softmax(0 if len(shape) == 1 else 1)
    y = labels(shape[:1] + shape[2:] if len(shape) > 1 else (), shape[0] if len(shape) == 1 else shape[1])
    if kind == "ignored" and y.dim():
        y.flatten()[::3] = -1
    return y


def costs_of(num_classes, seed=3):
    """Random costs per class."""
    generator = torch.Generator().manual_seed(seed)
    fn = torch.rand(num_classes, generator=generator, dtype=torch.float64) * 5
    fp = torch.rand(num_classes, num_classes, generator=generator, dtype=torch.float64) * 20
    return fn, fp.fill_diagonal_(0)


def refused(loss, output, target, error, *words):
    """All three ways to call a loss raise an error that has these words."""
    for call in (loss, loss.sums, loss.per_example):
        with pytest.raises(error) as info:
            call(output, target)
        for word in words:
            assert word in str(info.value)
