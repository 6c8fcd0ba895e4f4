"""Detection of non-finite weights."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fitwatch.helpers.modules import plain_names

_CHECKED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128})


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first trainable parameter or normalization statistic that holds a NaN or an infinity.

    Other buffers and frozen parameters are skipped: they may be infinite on purpose, as masks are. Waits for the
    device. On several ranks the statistics differ, so combine the answers with `ranks.agree`.
    """
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for place, module in model.named_modules():
        if isinstance(module, _NormBase):
            named += [(f"{place}.{name}".lstrip("."), b) for name, b in module.named_buffers(recurse=False)]
    bad = next((name for name, values in named if _is_bad(values)), None)
    return None if bad is None else plain_names(model, [bad])[0]


def _is_bad(values: Tensor) -> bool:
    checkable = values.dtype in _CHECKED and values.layout is torch.strided and not values.is_meta
    return checkable and not is_lazy(values) and not bool(values.detach().isfinite().all())
