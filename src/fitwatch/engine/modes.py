"""Which modules train: those that the user has put into eval mode stay in it."""

import logging
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fitwatch.helpers.modules import unwrap

logger = logging.getLogger("fitwatch")

# By model: the modules that were in eval mode when it was last trained, and those that were frozen. A fit leaves all
# in eval mode, so modes alone don't tell.
_last: WeakKeyDictionary[nn.Module, tuple[WeakSet[nn.Module], WeakSet[nn.Module]]] = WeakKeyDictionary()


class Modes:
    """Sets the modes of a model at the start of an epoch.

    Args:
        model: The model, which may be wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._warned = self._trained = False

    def train(self) -> None:
        """Put the model into train mode, except for modules that are in eval mode on purpose.

        Those are all modules in eval mode while another is in train mode. If all are in eval mode, as an evaluation
        leaves them, they are those of the last training, and those whose parameters are all frozen since.

        The last fit has left all modules in eval mode. So when the next one begins, only modules inside one in train
        mode are in eval mode on purpose for sure, and for the others the last training decides too.
        """
        model = unwrap(self._model)
        modules = list(model.modules())
        resting = {m for m in modules if not m.training}
        all_rest, last = len(resting) == len(modules), _last.get(model)
        if last is None:
            resting = _frozen(model) if all_rest else resting
        elif all_rest or not self._trained:
            rested, were_frozen = last
            frozen = {m for m in _frozen(model) if m not in were_frozen}
            chosen = {inner for m in modules if m.training for inner in m.modules()}
            resting = {m for m in resting if m in chosen or m in rested or m in frozen}
        self._model.train()
        for module in resting:
            module.training = False
        self._trained = True
        _remember(model)

    def check(self) -> None:
        """Warn once of frozen layers whose statistics are about to change; callbacks have set their modes by now."""
        if self._warned:
            return
        named = dict(unwrap(self._model).named_modules())
        frozen = _frozen(unwrap(self._model))
        for name, module in named.items():
            moves = isinstance(module, _NormBase) and module.training and module.running_mean is not None
            if moves and module in frozen:
                self._warned = True
                parts = name.split(".")
                outer = next(path for i in range(len(parts) + 1) if named[path := ".".join(parts[:i])] in frozen)
                logger.warning(
                    "all parameters of %s are frozen, but the running statistics of %s change, since it is in train "
                    "mode: to keep them, call .eval() on %s before training",
                    outer or "the model",
                    name or "the model",
                    outer or "the model",
                )
                return

    def rest(self) -> None:
        """Put all modules into eval mode, for predictions."""
        model = unwrap(self._model)
        if any(m.training for m in model.modules()):  # else somebody has evaluated it since the last epoch began
            _remember(model)
        self._model.eval()


def _remember(model: nn.Module) -> None:
    _last[model] = WeakSet(m for m in model.modules() if not m.training), WeakSet(_frozen(model))


def _frozen(model: nn.Module) -> set[nn.Module]:
    """Return the modules that have parameters, none of which is trained, and all modules inside them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            found.update(module.modules())
    return found
