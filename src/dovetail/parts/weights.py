"""Linear maps and lookups with their start stated beside them, and the one place that draws random starts.

Every module that owns weights has `initialise(rng)`; `rng(name)` is a generator seeded by (seed, module
path, name), so that swapping one part leaves every other parameter's start unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.kernels import twins
from dovetail.kernels.linear import fp8, linear
from dovetail.kernels.linear import plan as linear_plan
from dovetail.kernels.plan import Plan
from dovetail.parts.adaptable import Adaptable
from dovetail.parts.storage.base import Storage, Stored
from dovetail.spec import Slot

Rng = Callable[[str], torch.Generator]


class InitScheme(Protocol):
    """What category "init" offers: see parts/init.py."""

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None: ...

    def multiplier(self, role: str, fan_in: int, fan_out: int) -> float: ...


class Linear(Adaptable, nn.Linear):
    """y = x Wᵀ + b, W (dim_out, dim_in).

    role says what the init scheme goes by: "query", "key", "value", "in" (other readers of the stream),
    "residual" (writes back to it), "head" (to logits). parts: (role, width) of maps fused along dim_out,
    initialised as if they were apart. `stored`: where the weight is kept in codes instead (then `weight` is None).
    """

    stored: Stored | None  # no class attribute: it would hide the submodule
    in_fp8 = False  # whether its products are in 8 bits where gradients are taken: `training.fp8`
    read_whole = False  # whether its part multiplies by `matrix()` itself, so that nothing but that is seen

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        slot: Slot,
        bias: bool = False,
        role: str = "in",
        parts: Sequence[tuple[str, int]] | None = None,
    ):
        super().__init__(dim_in, dim_out, bias=bias)
        self.slot, self.parts, self.stored = slot, tuple(parts or ((role, dim_out),)), None
        self.multiplier = self.scale(dim_in)

    def scale(self, dim_in: int) -> float:
        """What the init scheme multiplies the outputs of a map of so many inputs by, here."""
        role, width = self.parts[0]
        return 1.0 if self.slot.init is None else self.slot.init.multiplier(role, dim_in, width)

    def reset_parameters(self) -> None:
        """Nothing: `initialise` draws the start once the model stands."""

    def initialise(self, rng: Rng) -> None:
        generator = rng("weight")
        for (role, width), piece in zip(self.parts, self.weight.split([w for _, w in self.parts]), strict=True):
            self.slot.init.draw(piece, role, self.in_features, width, self.slot, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.around(self.plain, x) if self.adapted else self.plain(x)
        return y if self.multiplier == 1.0 else y * self.multiplier

    @property
    def product(self) -> Tensor | None:
        """W where a call is nothing but W x, and nobody listens to it; None otherwise."""
        more = self.adapted or self.stored is not None or self.bias is not None or self.multiplier != 1.0
        return None if more or self._forward_hooks or self._forward_pre_hooks else self.weight

    def plain(self, x: Tensor) -> Tensor:
        """W x + b without adapters and multiplier."""
        if self._multiplies_in_fp8():
            y = fp8.linear(x, self.weight)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return linear(x, self.weight, self.bias) if self.stored is None else self.stored.linear(x, self.bias)

    def _multiplies_in_fp8(self) -> bool:
        return self.in_fp8 and torch.is_grad_enabled() and not twins.asked()

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would train it, where that is not torch's own, and run a compiled step of one row, and why."""
        found = {"training": Plan("fp8", "as asked: three products in 8 bits, a scale a tensor")} if self.in_fp8 else {}
        if self.stored is None and not self.adapted:
            one = linear_plan(device, self.weight.dtype, self.out_features, self.bias is not None)
            found["decoding one row, compiled"] = one
        return found

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs start..stop alone: one map of several that are fused."""
        if self.drops:
            y = self.around(self.plain, x)[..., start:stop]
            return y if self.multiplier == 1.0 else y * self.multiplier
        weight, bias = self.effective(self.dense(), self.bias)
        weight, bias = weight[start:stop], None if bias is None else bias[start:stop]
        if self._multiplies_in_fp8() and len(weight) % fp8.MULTIPLE == 0:
            y = fp8.linear(x, weight)
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            y = F.linear(x, weight, bias)
        return y if self.multiplier == 1.0 else y * self.multiplier

    def matrix(self) -> Tensor:
        """The weight (out, in) as it acts, adapters and all; without the multiplier."""
        return self.effective(self.dense())[0]

    def dense(self) -> Tensor:
        """The weight (out, in) without adapters."""
        return self.weight if self.stored is None else self.stored.dense()

    def keep(self, storage: Storage) -> None:
        """From now on the weight is frozen and kept as `storage` says. Raises CheckpointError."""
        self.stored, self.in_fp8 = storage.store(self.weight.data), False
        self.weight = None  # type: ignore[assignment]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.weight.dtype if self.stored is None else self.stored.dtype


class Drops(nn.Module):
    """Base of modules that drop entries while training: no call at all where `drop` is 0."""

    drop: float = 0.0

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop) if self.drop and self.training else x


class Lookup(Adaptable, nn.Embedding):
    """Rows by number: W (count, dim)."""

    def __init__(self, count: int, dim: int, *, slot: Slot, role: str = "embedding"):
        super().__init__(count, dim)
        self.slot, self.role = slot, role

    def reset_parameters(self) -> None:
        """Nothing: `initialise` draws the start once the model stands."""

    def initialise(self, rng: Rng) -> None:
        self.slot.init.draw(self.weight, self.role, self.num_embeddings, self.embedding_dim, self.slot, rng("weight"))

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.around(self.plain, ids) if self.adapted else self.plain(ids)

    def plain(self, ids: Tensor) -> Tensor:
        """The rows without adapters."""
        return F.embedding(ids, self.weight)

    def matrix(self) -> Tensor:
        """W as it acts, adapters and all."""
        return self.effective(self.weight)[0]


def initialise(model: nn.Module, seed: int, device: torch.device | str = "cpu") -> None:
    """Draws every owned parameter's start. Raises TypeError for a module whose parameters nobody initialises."""
    done: set[int] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if id(p) not in done]
            if not own:
                continue
            if not hasattr(module, "initialise"):
                raise TypeError(f"{type(module).__name__} at {path!r} owns parameters and has no initialise(rng)")
            module.initialise(lambda name, path=path: generator(seed, f"{path}.{name}", device))  # type: ignore[operator]
            done.update(map(id, own))


def generator(seed: int, path: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
