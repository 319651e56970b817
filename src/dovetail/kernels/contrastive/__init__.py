"""Contrastive losses of n pairs whose other members are each other's negatives, in memory O(n·d) (CLIP, SigLIP).

a (n,d), b (m,d), usually normalised; a[i] belongs to b[i + offset]; s = scale · a bᵀ (n,m).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.kernels.chunks import autocasts, without_autocast
from dovetail.kernels.contrastive import plain, reference
from dovetail.kernels.contrastive.plan import plan
from dovetail.kernels.contrastive.walk import walk
from dovetail.kernels.operation import operation

Form = Literal["softmax", "rows", "sigmoid"]
FORMS = get_args(Form)
# Scores of a block. On CUDA 2^27 are 4096 rows of 32,768: 268 MB of G in 16 bits.
BLOCK = {"cpu": 2**21, "cuda": 2**27}


def contrastive(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    form: Form = "softmax",
    bias: Tensor | float | None = None,
    *,
    offset: int = 0,
) -> Tensor:
    """The loss (), in fp32 (fp64 if a and b are); gradients reach a, b, scale and bias, and can be taken once.

    form "softmax": ½ the mean over rows of -log softmax_j(s)_ii + ½ the same over columns (Radford et al. 2021, figure 3).
    "rows": the rows alone (InfoNCE, van den Oord et al. 2018, eq. 4): b may be longer, with negatives of nobody's own, or
    with those of other ranks, where a's labels begin at b[offset]. "sigmoid": -Σ_ij log σ(z_ij (s_ij + bias)) / n with
    z = 1 for a pair, else -1 (Zhai et al. 2023, eq. 1). Here too b may be others', which have no pair in a where
    offset >= m or offset <= -n: such losses add up to that of the whole.

    scale: the factor itself, exp of what CLIP and SigLIP learn. bias: for "sigmoid" only. scale and bias have one entry.
    Accuracy: scores, normalisers and sums are fp32 or better everywhere. On CUDA, 16-bit inputs, and others under
    autocast, are multiplied in 16 bits with fp32 sums, and the gradient of the scores is rounded to 16 bits once; else
    products are in fp32 or better. The loss is off by a rounding of the scores in that type, 2e-6 at scores of 30 in fp32,
    however small it is itself. The gradients are computed with the loss and kept, in fp32, for the backward.

    Raises DataError for shapes, forms and offsets that do not go together.
    """
    _check(a, b, form, bias, offset)
    single = torch.promote_types(a.dtype, b.dtype)
    products = torch.get_autocast_dtype(a.device.type) if autocasts(a) and single != torch.float64 else single
    wide = torch.promote_types(single, torch.float32)
    factor, shift = (_number(t, wide, a.device) for t in (scale, 0.0 if bias is None else bias))
    path = plan(a.device.type, products).path
    if path == "reference":
        with without_autocast(a):
            return reference.contrastive(a.to(wide), b.to(wide), factor, form, shift, offset)
    learns = [torch.is_grad_enabled() and t.requires_grad for t in (a, b, factor, shift)]
    products = products if path == "triton" else wide
    return _run(a, b, factor, shift, form, offset, path, products, learns[0], learns[1], any(learns))[0]


def _check(a: Tensor, b: Tensor, form: str, bias: Tensor | float | None, offset: int) -> None:
    where = "contrastive"
    if form not in FORMS:
        raise DataError(f"no form {form!r}", where=where, remedy=f"one of {', '.join(FORMS)}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise DataError(f"a {tuple(a.shape)} against b {tuple(b.shape)}", where=where, remedy="give (n,d) and (m,d)")
    n, m = len(a), len(b)
    if bias is not None and form != "sigmoid":
        raise DataError(f"a bias changes nothing in form {form!r}", where=where, remedy="leave it out")
    if form == "softmax" and (n != m or offset):
        raise DataError(
            f"{n} rows against {m} columns from column {offset} on: columns without a row of their own",
            where=where,
            remedy="form='rows', or all pairs at once",
        )
    if form == "rows" and not 0 <= offset <= m - n:
        raise DataError(f"labels {offset} to {offset + n - 1} of {m} columns", where=where)


def _number(x: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """() in `dtype`. Raises DataError for more numbers than one."""
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=dtype, device=device)
    if x.numel() != 1:
        raise DataError(f"scale or bias of shape {tuple(x.shape)}", where="contrastive", remedy="give one number")
    return x.to(device, dtype).reshape(())


@operation("contrastive")
def _run(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    form: str,
    offset: int,
    path: str,
    products: torch.dtype,
    with_a: bool,
    with_b: bool,
    with_any: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to a, b (both (0,) unless wanted), scale and bias."""
    pieces: Any = plain
    if path == "triton":
        from dovetail.kernels.contrastive import triton

        pieces = triton
    rows = max(128, BLOCK.get(a.device.type, BLOCK["cuda"]) // len(b) // 128 * 128)
    with without_autocast(a):
        u, v = (t.to(products).contiguous() for t in (a, b))
        found = walk(pieces, u, v, scale, bias, form, offset, rows, (with_a, with_b, with_any))
    none = scale.new_empty(0)
    return found.loss, none if found.a is None else found.a, none.clone() if found.b is None else found.b, *found[3:]


@_run.register_fake
def _(a, b, scale, bias, form, offset, path, products, with_a, with_b, with_any):  # type: ignore[no-untyped-def]
    da, db = (scale.new_empty(t.shape if wanted else 0) for t, wanted in ((a, with_a), (b, with_b)))
    return scale.new_empty(()), da, db, scale.new_empty(()), scale.new_empty(())


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.types = inputs[0].dtype, inputs[1].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _deliver(ctx: Any, up: Tensor | None, *others: Tensor | None) -> Any:
    if any(other is not None for other in others):
        raise DataError("gradients of the contrastive loss's gradients", remedy="take gradients once")
    if up is None:
        return (None,) * 11
    found = [d * up if needed else None for d, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
    da, db = (None if d is None else d.to(dtype) for d, dtype in zip(found, ctx.types, strict=False))
    return da, db, found[2], found[3], *(None,) * 7


_run.register_autograd(_deliver, setup_context=_keep)

__all__ = ["Form", "contrastive", "plan", "reference"]
