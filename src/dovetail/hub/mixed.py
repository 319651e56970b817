"""Checkpoints of several dtypes: how their models run, decided once when they are loaded.

The usual mixtures (fp32 norms or a fp32 head beside bf16, T5's fp32 `wo` beside fp16, Mamba's fp32 decays) stay as they are
stored, and what passes between modules of different dtypes is cast there. Any other is computed in its widest dtype.
"""

from __future__ import annotations

from collections import Counter
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.parts.biased_head import BiasedHeadModule
from dovetail.parts.embedding import LogitsBias
from dovetail.parts.mlm_head import MlmHeadModule
from dovetail.parts.norm import LayerNormModule, RmsNormModule
from dovetail.parts.recurrent.mamba import MambaModule
from dovetail.parts.weights import Linear

_NORMS = (LayerNormModule, RmsNormModule)
_WIDE = (*_NORMS, MambaModule, MlmHeadModule, BiasedHeadModule, LogitsBias)  # whose own parameters may be of any dtype


def let_run(model: nn.Module) -> torch.dtype | None:
    """Makes a model of several dtypes run. Returns the dtype to which all its parameters were widened, if they were."""
    kinds = sorted({p.dtype for p in model.parameters()}, key=lambda kind: (kind.itemsize, str(kind)))
    if len(kinds) < 2:
        return None
    sizes: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if isinstance(module, Linear):
            sizes[module.weight.dtype] += module.weight.numel()
    usual = sizes.most_common(1)[0][0] if sizes else None
    if usual is None or not all(_stands_apart(module, usual) for module in model.modules()):
        widest = reduce(torch.promote_types, kinds)
        model.to(widest)
        return widest
    sample = next(m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype == usual)
    for module in model.modules():
        if isinstance(module, _NORMS):
            if isinstance(module, LayerNormModule):
                module.register_forward_pre_hook(_as_weight)
            module.register_forward_hook(partial(_as, sample))
        elif isinstance(module, Linear) and (module.weight.dtype != usual or module.parts[0][0] == "head"):
            module.register_forward_pre_hook(_as_weight)
    return None


def _stands_apart(module: nn.Module, usual: torch.dtype) -> bool:
    """Whether a module's own parameters are of the usual dtype, or of another that can be met at its doors.

    A map to the stream or to logits may be of any: as in transformers, what it writes is left as wide as it is.
    """
    own = {p.dtype for p in module.parameters(recurse=False)}
    if isinstance(module, Linear) and module.parts[0][0] in ("residual", "head"):
        return len(own) < 2
    if isinstance(module, _NORMS):
        return len(own) < 2
    return isinstance(module, _WIDE) or own <= {usual}


def _as_weight(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = module.dtype if isinstance(module, Linear) else getattr(module.weight, "dtype", args[0].dtype)
    return (args[0].to(kind), *args[1:])


def _as(sample: Linear, module: Any, args: Any, out: Tensor) -> Tensor:
    """sample: one of those that read it. Asked each time, for the model may have been cast since."""
    return out.to(sample.dtype)
