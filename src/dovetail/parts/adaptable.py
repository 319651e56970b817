"""Places where adapters can stand: a weight that is used through them, whoever asks for it.

An adapter wraps what its place does: `adapter(run, x)`, where `run` is the place without it. A place has named
adapters of which some are active, one around the other in that order; a batch may be routed, so that its rows go
through different ones. Without adapters a place costs one test of a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError, RunError

Run = Callable[[Tensor], Tensor]
ADAPTERS = "adapters"  # the name of the submodule that holds a place's adapters


class Adapter(nn.Module):
    """Base of what stands at one place. Its parameters are fp32, whatever the dtype of the model (masters do not round)."""

    def forward(self, run: Run, x: Tensor) -> Tensor:
        """What the place gives for x, with this adapter around `run`."""
        raise TypeError(f"{type(self).__name__} does not say what it does")

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) that do alone what these do with this adapter around them; differentiable.

        The weight comes in fp32 or wider and stays so, as does a bias that is changed: several adapters are rounded
        once, behind the last. Raises BuildError where no weight can.
        """
        raise BuildError(
            f"{type(self).__name__} is not a change of a weight and cannot be merged into one",
            remedy="keep the adapter beside the model: save_adapter, load_adapter",
        )

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of one of its parameters."""
        return 1.0


class Adaptable(nn.Module):
    """A module around whose weight adapters can stand. Its subclasses call `around` where they use the weight."""

    active: tuple[str, ...] = ()  # names, the innermost first
    routes: tuple[tuple[tuple[str, ...], Tensor], ...] = ()  # (names, rows of the batch); every row once

    def attach(self, name: str, adapter: Adapter) -> None:
        """Raises BuildError when the name is taken here."""
        if ADAPTERS not in self._modules:
            self.add_module(ADAPTERS, nn.ModuleDict())
        held: Any = self._modules[ADAPTERS]
        if name in held:
            raise BuildError(f"an adapter {name!r} stands here already", remedy="give the new one another name")
        held[name] = adapter.train(self.training)

    def detach(self, name: str) -> None:
        """Takes an adapter away, and the room for them with the last."""
        held: Any = self._modules[ADAPTERS]
        del held[name]
        self.active = tuple(n for n in self.active if n != name)
        if not held:
            del self._modules[ADAPTERS]

    def attached(self) -> dict[str, Adapter]:
        """Name -> adapter."""
        return dict(self._modules.get(ADAPTERS) or {})  # type: ignore[arg-type]

    @property
    def adapted(self) -> bool:
        return bool(self.active or self.routes)

    @property
    def drops(self) -> bool:
        """Whether what is in use drops entries of its input for now, so that no weight does the same."""
        held: Any = self._modules[ADAPTERS] if self.active else {}
        return self.training and any(getattr(held[name], "drop", 0.0) for name in self.active)

    def around(self, run: Run, x: Tensor) -> Tensor:
        """run(x) through the active adapters, or row by row through those that it is routed to."""
        if not self.routes:
            return self._through(self.active, run, x)
        return self._by_rows(x, lambda names, rows: self._through(names, run, x[rows]))

    def effective(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with all that is active merged into them: for those who multiply by them themselves."""
        if self.routes:
            raise RunError(
                "rows routed to different adapters share one weight here", remedy="run the rows of each adapter apart"
            )
        return self._merged(self.active, weight, bias)

    def times(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """product(x, weight) with all that is active, or that x's rows are routed to, merged into the weight."""
        if not self.routes:
            return product(x, self._merged(self.active, weight, None)[0])
        return self._by_rows(x, lambda names, rows: product(x[rows], self._merged(names, weight, None)[0]))

    def _merged(self, names: tuple[str, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not names:
            return weight, bias
        held: Any = self._modules[ADAPTERS]
        wide, shift = weight.to(torch.promote_types(weight.dtype, torch.float32)), bias
        for name in names:
            wide, shift = held[name].merged(wide, shift)
        if shift is not None:
            shift = shift.to(weight.dtype if bias is None else bias.dtype)
        return wide.to(weight.dtype), shift

    def _through(self, names: tuple[str, ...], run: Run, x: Tensor) -> Tensor:
        held: Any = self._modules[ADAPTERS] if names else {}
        for name in names:
            run = partial(held[name], run)
        return run(x)

    def _by_rows(self, x: Tensor, part: Callable[[tuple[str, ...], Tensor], Tensor]) -> Tensor:
        """part(names, rows) of every route, put back in the batch's order."""
        rows = torch.cat([rows for _, rows in self.routes])
        if x.shape[0] != rows.shape[0]:
            raise RunError(
                f"an adapter stands where {x.shape[0]} rows come, and the batch is routed as {rows.shape[0]}",
                remedy="name one adapter (or None) a row; where all rows share what is adapted, such as the vectors of "
                "relative positions, run the rows of each adapter apart",
            )
        parts = [part(names, at) for names, at in self.routes]
        return torch.cat(parts)[rows.argsort()]


class Branch(Adaptable):
    """Around a whole branch of a block, `dim` wide, which reads more than x: its context and its state.

    So the branch runs once, on all rows; what stands here sees x and what the branch gave for it, (B,T,C) both.
    """

    dropped = False  # nothing stands here for now, whatever is active (AdapterDrop)
    thinned = False  # the same while training

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    @property
    def adapted(self) -> bool:
        return bool(self.active or self.routes) and not (
            self.dropped or (self.thinned and self.training)
        )  # (torch 2.11 does not trace super()'s properties)

    def around(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        if not self.routes:
            return self._through(self.active, lambda _: y, x)
        return self._by_rows(x, lambda names, rows: self._through(names, lambda _: y[rows], x[rows]))


def routed(model: nn.Module) -> bool:
    """Whether rows of its batch go through different adapters for now: then it has so many rows, in that order."""
    return any(place.routes for _, place in adaptables(model))


def adaptables(model: nn.Module) -> Iterator[tuple[str, Adaptable]]:
    """(path, place) of every place of a model, those inside its adapters left out."""
    for path, module in model.named_modules():
        if isinstance(module, Adaptable) and not of_adapter(path):
            yield path, module


def of_adapter(parameter: str) -> bool:
    """Whether the name of a parameter or module is that of an adapter's."""
    return ADAPTERS in parameter.split(".")
