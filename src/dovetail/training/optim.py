"""AdamW with the usual groups, clipping without waiting for the device, and an averaged copy of the weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError, SpecError
from dovetail.kernels import adamw as kernel
from dovetail.kernels import twins
from dovetail.parts.adaptable import Adapter
from dovetail.parts.weights import Linear, Lookup

_STEP = inspect.unwrap(torch.optim.AdamW.step)  # torch puts hooks around ours, and else would call them twice


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2017) over the parameters that take gradients.

    Decay is for matrices: vectors (norms, biases), lookup tables and what a module lists as `undecayed` have none. Each group carries `peak`, its
    own top rate: lr times what the init scheme says of the role (muP), or an adapter of its parameter (LoRA+); rates: path
    patterns ("blocks.*.mixer.log_dt") and the rate in lr's place, of which the first that matches counts. Raises
    BuildError when nothing is trainable, SpecError for a pattern that no parameter goes by.
    """
    own = dict(rates or {})
    idle = set(own)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    done: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in done:
                continue
            done.add(id(parameter))
            flat = parameter.dim() < 2 or isinstance(module, nn.Embedding) or leaf in getattr(module, "undecayed", ())
            scale = _scale(module, path) if parameter.dim() >= 2 else 1.0
            scale = module.lr_scale(leaf) if isinstance(module, Adapter) else scale
            named = f"{path}.{leaf}".lstrip(".")
            given = next((pattern for pattern in own if fnmatchcase(named, pattern)), None)
            idle.discard(given)
            peak = lr if given is None else own[given]
            groups.setdefault((peak * scale, 0.0 if flat else weight_decay), []).append(parameter)
    if not groups:
        raise BuildError("no parameter of this model takes gradients")
    if idle:
        raise SpecError(
            f"a rate of its own for {sorted(idle)[0]!r}, by which no trained parameter goes", where="train.rates",
            remedy="see the names of the model's parameters; an earlier pattern may have taken them all",
        )  # fmt: skip
    listed = [{"params": p, "lr": peak, "peak": peak, "weight_decay": wd} for (peak, wd), p in groups.items()]
    how: dict[str, Any] = {"fused": False, "foreach": False} if twins.asked() else {"fused": True}
    return AdamW(listed, lr=lr, betas=betas, eps=eps, **how)


class AdamW(torch.optim.AdamW):
    """torch's, whose groups and state it has. Fused, on CUDA, large parameters are stepped by `dovetail.kernels.adamw`.

    grad_scale, while it is set: () what gradients are divided by as they are read. What is in them after a step is not
    said: torch's own leaves them divided, the kernel as they were.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; of a closure, which is called before it, the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            own = [row for group in self.param_groups for row in self._own(group)]
            for row in own:
                row.weight.grad = None  # so that torch passes them over
            try:
                _STEP(self)
            finally:
                for row in own:
                    row.weight.grad = row.gradient
        return loss

    def _own(self, group: dict[str, Any]) -> list[kernel.Row]:
        """Has the kernel step what it serves of a group: its rows."""
        other = group["amsgrad"] or group["maximize"] or any(isinstance(beta, Tensor) for beta in group["betas"])
        if not group["fused"] or other or getattr(self, "found_inf", None) is not None:
            return []
        rows = []
        for p in group["params"]:
            if p.grad is None or not (self.state[p] or kernel.serves(p, p.grad)):
                continue
            state = self.state[p]
            if not state:  # begun as torch does
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            rows.append(kernel.Row(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        how = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        left = {id(row) for row in kernel.step_(rows, divisor=getattr(self, "grad_scale", None), **how)}
        return [row for row in rows if id(row) not in left]


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at `factor` times its own peak. A rate that is a tensor, which a graph reads, is filled."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak"] * factor)
        else:
            group["lr"] = group["peak"] * factor


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients to a joint norm of at most `limit` (0: only measures); the norm before, on the device.

    Pascanu et al. 2013, algorithm 1.
    """
    if twins.asked():
        return nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=False)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = joint_norm(grads)
    if limit and grads:
        # A tensor factor: the host never waits for the norm.
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp_max(1.0))
    return norm


def joint_norm(grads: list[Tensor]) -> Tensor:
    """() The norm of all entries, in fp32 or wider whatever the gradients are in; 0 of none."""
    if not grads:
        return torch.zeros(())
    wide = reduce(torch.promote_types, (g.dtype for g in grads), torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, wide)))  # type: ignore[arg-type]


def update(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], limit: float, read_after: bool = False
) -> Tensor:
    """`clip`, then a step of the optimiser: (), the norm before.

    A fused optimiser divides gradients while it reads them, by what a loss's scale is meant for: one pass over all of
    them less. What is left in them is then not said. read_after: they are read after the step, and left clipped.
    """
    if read_after or not limit or not all(group.get("fused") for group in optimizer.param_groups):
        norm = clip(parameters, limit)
        optimizer.step()
        return norm
    norm = joint_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp_min(1.0).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale  # type: ignore[attr-defined]
    return norm


class Average:
    """Exponential moving average of the weights: shadow = decay · shadow + (1 − decay) · weight."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float):
        self.decay = decay
        self.live = dict(named)
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1.0 - self.decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Trades places with the live weights; called again, it undoes itself."""
        for name, shadow in self.shadow.items():
            held = self.live[name].detach().clone()
            self.live[name].copy_(shadow)
            shadow.copy_(held)


def _scale(module: nn.Module, path: str) -> float:
    """The init scheme's factor on the rate of a linear map or a lookup table; 1 for anything else."""
    scheme: Any = getattr(getattr(module, "slot", None), "init", None)
    if scheme is None:
        return 1.0
    if isinstance(module, Lookup):
        return scheme.lr_scale(module.role, module.num_embeddings, module.embedding_dim)
    if not isinstance(module, Linear):
        return 1.0
    scales = {scheme.lr_scale(role, module.in_features, width) for role, width in module.parts}
    if len(scales) > 1:
        raise BuildError(
            f"{scheme.kind} wants different rates for maps that are fused in one weight", where=path,
            remedy="use a scheme whose rate depends on fan_in alone",
        )  # fmt: skip
    return scales.pop()
