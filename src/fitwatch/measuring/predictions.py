"""Predictions of a model: the outputs of all batches, joined on the CPU."""

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from fitwatch import ranks
from fitwatch.data.joining import NotJoinableError, join
from fitwatch.losses import BinaryCrossEntropy, ExpectedCost, NegativeLogLikelihood, RealWorldCrossEntropy
from fitwatch.losses.base import ClassLoss, precise


def predictions(outputs: Iterable[Any]) -> Any:
    """Join the outputs of all ranks, which are on the CPU, in the order of a single rank; all ranks call it.

    Raises:
        ValueError: There is no batch, or the outputs of the batches can't be joined.
    """
    own = [(output,) for output in outputs]  # in a tuple: None may be an output
    every = [one[0] for together in zip_longest(*ranks.gather(own)) for one in together if one is not None]
    if not every:
        raise ValueError("there is nothing to predict: the loader yielded no batch")
    try:
        return join(every)
    except NotJoinableError as error:
        raise ValueError(
            f"{error}: predict() joins the batches along the first dimension. Pad them to one length, or call the "
            "model yourself for each batch; after a fit it is in eval mode"
        ) from error


def as_probabilities(loss: object) -> Callable[[Tensor], Tensor]:
    """Return the function that turns outputs into probabilities, which the loss determines.

    Raises:
        ValueError: The loss does not say what the outputs are.
    """
    if isinstance(loss, (NegativeLogLikelihood, nn.NLLLoss)):
        return lambda output: precise(output).exp()
    if isinstance(loss, (BinaryCrossEntropy, nn.BCEWithLogitsLoss)):
        return lambda output: precise(output).sigmoid()
    if isinstance(loss, (ClassLoss, ExpectedCost, RealWorldCrossEntropy, nn.CrossEntropyLoss)):
        return _softmax
    name = getattr(loss, "__name__", type(loss).__name__)
    raise ValueError(
        f"proba=True needs a loss that says what the outputs are (logits of classes or labels), and {name} does not: "
        "call predict() and convert the outputs yourself"
    )


def _softmax(output: Tensor) -> Tensor:
    """Return the probabilities of classes, or for one logit, shape (N,) or (N, 1), that of class 1."""
    one = output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)
    return precise(output).sigmoid() if one else precise(output).softmax(1)
