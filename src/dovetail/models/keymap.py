"""KeyMap: weights both ways. One list of invertible rules; loading and saving run it in two directions.

"Stored" names are those of a checkpoint's files, "ours" those of the module tree.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.errors import CheckpointError


@dataclass(frozen=True)
class Rename:
    """One stored tensor is one of ours.

    rows: whether it is so as a linear map's matrix, as it lies or transposed, so that an adapter has a place there.
    """

    stored: str
    ours: str
    rows: ClassVar[bool] = True

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return parts

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return parts

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(stored names, our names)."""
        return (self.stored,), (self.ours,)


@dataclass(frozen=True)
class Transpose(Rename):
    """Stored transposed: (in, out) instead of (out, in), as GPT-2's Conv1D."""

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].t().contiguous()]

    save = load


@dataclass(frozen=True)
class Reshape(Rename):
    """The same entries under another shape."""

    stored_shape: tuple[int, ...] = ()
    our_shape: tuple[int, ...] = ()
    rows: ClassVar[bool] = False

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        expect_shape(parts[0], self.stored_shape, self.stored)
        return [parts[0].reshape(self.our_shape)]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].reshape(self.stored_shape)]


@dataclass(frozen=True)
class Concat:
    """Several stored tensors, one after another along `dim`, are one of ours. sizes: their lengths. rows: as in Rename."""

    stored: tuple[str, ...]
    ours: str
    sizes: tuple[int, ...]
    dim: int = 0
    rows: ClassVar[bool] = True

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        for name, part, size in zip(self.stored, parts, self.sizes, strict=True):
            if part.dim() <= self.dim or part.shape[self.dim] != size:
                raise _wrong(part, f"{size} along dimension {self.dim}", name)
        return [torch.cat(parts, self.dim)]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return list(parts[0].split(self.sizes, self.dim))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.stored, (self.ours,)


@dataclass(frozen=True)
class Split:
    """One stored tensor is several of ours, along `dim`."""

    stored: str
    ours: tuple[str, ...]
    sizes: tuple[int, ...]
    dim: int = 0

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return list(parts[0].split(self.sizes, self.dim))

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts, self.dim)]

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.stored,), self.ours


@dataclass(frozen=True)
class Stack:
    """Several stored tensors of one shape are the entries of a new axis of ours (experts)."""

    stored: tuple[str, ...]
    ours: str
    dim: int = 0

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack(parts, self.dim)]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return list(parts[0].unbind(self.dim))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.stored, (self.ours,)


@dataclass(frozen=True)
class Alias:
    """A second stored name of a tensor that another rule loads (a tied head). Written again if it was there."""

    stored: str
    of: str


@dataclass(frozen=True)
class Keep:
    """Stored but not used (old rotary tables): carried along and written back as it was.

    shape: what its readers ask for now, where it is a table that they make anew if it is left out.
    """

    pattern: str
    shape: tuple[int, ...] | None = None

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether this is about `name` and the tensor can still be read."""
        return fnmatch.fnmatchcase(name, self.pattern) and self.shape in (None, tuple(tensor.shape))


@dataclass(frozen=True)
class Twin:
    """A second stored name of what `of` stores, read by some: written too, unless the checkpoint, in which `beside` was a
    tensor of its own, did without."""

    stored: str
    of: str
    beside: str


Moving = Rename | Concat | Split | Stack
Rule = Moving | Alias | Keep | Twin


@dataclass
class Carried:
    """What a load must remember for a faithful save: dtypes, extra tensors, aliases that were there, order.

    widened: the dtype that all weights were given in memory, where what is stored is a mixture that does not run.
    """

    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    widened: torch.dtype | None = None


def shared(names: Sequence[str], ours: str, stored: Iterable[str]) -> list[Rule]:
    """One tensor of ours under several stored names: the first that is stored owns it, the others are aliases."""
    there = set(stored)
    owner = next((name for name in names if name in there), names[0])
    return [Rename(owner, ours), *(Alias(name, owner) for name in names if name != owner)]


class KeyMap:
    """An ordered list of rules. Names that no rule knows are errors, in both directions."""

    def __init__(self, rules: Sequence[Rule]):
        self.moving: list[Moving] = [r for r in rules if not isinstance(r, (Alias, Keep, Twin))]
        self.aliases = [r for r in rules if isinstance(r, Alias)]
        self.keeps = [r for r in rules if isinstance(r, Keep)]
        self.twins = [r for r in rules if isinstance(r, Twin)]

    def stored_names(self) -> set[str]:
        """Every stored name that must be there."""
        return {name for rule in self.moving for name in rule.names[0]}

    def load(self, stored: Mapping[str, Tensor], where: str = "the checkpoint") -> tuple[dict[str, Tensor], Carried]:
        """Our tensors, and what to remember. Raises CheckpointError for missing, left-over or contradicting tensors."""
        needed = self.stored_names()
        missing = sorted(needed - stored.keys())
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensor{'s are' if len(missing) > 1 else ' is'} missing: {_some(missing)}",
                where=where,
                remedy="the config may describe another model than the weights; check num_hidden_layers, biases and ties",
            )
        carried = Carried(dtypes={name: tensor.dtype for name, tensor in stored.items()})
        left = [name for name in stored if name not in needed]
        for alias in self.aliases:
            if alias.stored in left:
                left.remove(alias.stored)
                if not torch.equal(stored[alias.stored], stored[alias.of]):
                    raise CheckpointError(
                        f"{alias.stored} is tied to {alias.of} by the config, but the stored tensors differ",
                        where=where,
                        remedy='set "tie_word_embeddings": false in config.json if the head is its own',
                    )
                carried.aliases += (alias.stored,)
        for name in list(left):
            if any(fnmatch.fnmatchcase(name, keep.pattern) for keep in self.keeps):
                left.remove(name)
                carried.kept[name] = stored[name]
        if left:
            raise CheckpointError(
                f"{len(left)} tensor{'s are' if len(left) > 1 else ' is'} left over: {_some(sorted(left))}",
                where=where,
                remedy="the config may describe another model than the weights; nothing is ignored silently",
            )
        ours: dict[str, Tensor] = {}
        for rule in self.moving:
            names, targets = rule.names
            try:
                parts = rule.load([stored[name] for name in names])
            except RuntimeError as error:
                shapes = {name: tuple(stored[name].shape) for name in names}
                raise CheckpointError(
                    f"tensors do not fit together: {shapes}", where=where, remedy=str(error)
                ) from None
            ours.update(zip(targets, parts, strict=True))
        return ours, carried

    def save(self, ours: Mapping[str, Tensor], carried: Carried | None = None) -> dict[str, Tensor]:
        """The stored tensors again: same names, dtypes and ties (a model cast since keeps the cast).

        Raises CheckpointError for a tensor no rule takes.
        """
        carried = carried or Carried()
        out: dict[str, Tensor] = {}
        taken: set[str] = set()
        for rule in self.moving:
            names, targets = rule.names
            absent = [t for t in targets if t not in ours]
            if absent:
                raise CheckpointError(f"the model has no {_some(absent)}, which the layout stores as {names[0]}")
            parts = rule.save([ours[t] for t in targets])
            stored = [carried.dtypes[n] for n in names if n in carried.dtypes]
            loaded = {functools.reduce(torch.promote_types, stored), carried.widened} if stored else set()
            if all(ours[t].dtype in loaded for t in targets):
                parts = [p.to(carried.dtypes.get(n, p.dtype)) for n, p in zip(names, parts, strict=True)]
            out.update((n, p.contiguous()) for n, p in zip(names, parts, strict=True))
            taken.update(targets)
        left = sorted(ours.keys() - taken)
        if left:
            raise CheckpointError(
                f"this layout has no place for {_some(left)}",
                remedy='save it with format="dovetail", which can say everything',
            )
        for alias in self.aliases:
            if alias.stored in carried.aliases:
                out[alias.stored] = out[alias.of].clone()
        for twin in self.twins:
            if twin.beside not in carried.dtypes or twin.beside in carried.aliases:
                out[twin.stored] = out[twin.of].clone()
        return out | {n: t for n, t in carried.kept.items() if any(keep.fits(n, t) for keep in self.keeps)}


def expect_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises RuntimeError, which a key map reports."""
    if tuple(tensor.shape) != shape:
        raise _wrong(tensor, str(shape), name)


def _wrong(tensor: Tensor, wanted: str, name: str) -> RuntimeError:
    """Of a part whose size another part makes up for: what they make together would not show it."""
    return RuntimeError(f"{name} is stored as {tuple(tensor.shape)}, and the config asks for {wanted}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
