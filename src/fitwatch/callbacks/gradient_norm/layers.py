"""Which parameters are trained, and which layer each of them belongs to."""

import re
from typing import Any

from attrs import frozen
from torch import Tensor, nn
from torch.optim import Optimizer

from fitwatch.helpers.modules import named_parameters

NO_GRAD = "requires_grad is False"


@frozen(kw_only=True)
class Layers:
    """The P trained parameters and their L layers, each identified by its index."""

    key: list[tuple[object, ...]]  # differs once the grouping is out of date
    parameter_names: list[str]
    parameters: list[Tensor]
    index: list[int]  # layer of each parameter, or L if it belongs to none
    names: list[str]
    members: list[list[int]]  # parameters of each layer
    siblings: list[set[int]]  # layers that share a module with each layer, itself included
    groups: list[dict[str, Any]]  # optimizer group of each layer's first parameter
    untrained: dict[str, str]  # layers that are not trained, with the reason


def group(model: nn.Module, optimizer: Optimizer, pattern: str | None) -> Layers:
    """Group the parameters that ``optimizer`` trains into layers.

    A layer is a module with direct parameters. With a ``pattern``, it is the part of a parameter's name that this
    regular expression (or its first group) matches.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for name, p in named_parameters(model) if p.numel()]
    # Nothing clears the gradients of parameters outside the optimizer.
    trained = [(name, p) for name, p in named if p.requires_grad and id(p) in groups]
    layers = {name: _layer(name, pattern) for name, _ in named}
    names = list(dict.fromkeys(found for name, _ in trained if (found := layers[name]) is not None))
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    index = [number.get(layers[name], len(names)) for name, _ in trained]
    members: list[list[int]] = [[] for _ in (*names, None)]
    modules: dict[str, set[int]] = {}
    for i, layer in enumerate(index):
        members[layer].append(i)
        modules.setdefault(_module(trained[i][0]), set()).add(layer)
    del members[-1]
    return Layers(
        key=[(name, id(p), p.dtype, p.device, p.requires_grad, id(p) in groups) for name, p in named],
        parameter_names=[name for name, _ in trained],
        parameters=[p for _, p in trained],
        index=index,
        names=names,
        members=members,
        siblings=[set().union(*(modules[_module(trained[i][0])] for i in own)) - {len(names)} for own in members],
        groups=[groups[id(trained[own[0]][1])] for own in members],
        untrained={
            found: "not in the optimizer" if p.requires_grad else NO_GRAD
            for name, p in named
            if (found := layers[name]) is not None and found not in number
        },
    )


def _layer(parameter: str, pattern: str | None) -> str | None:
    if pattern is None:
        return _module(parameter) or parameter
    found = re.search(pattern, parameter)
    return None if found is None else found.group(1 if found.re.groups else 0)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
