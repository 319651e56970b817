"""Masks: an algebra over `order`, not a tensor. `Causal() & Window(512)`, `Causal() | Prefix(n)`.

Each rule is one elementwise test of a query side against a key side (order i against order j), so
that the dense mask, FlexAttention's mask_mod and the tile map are the same function of different
indices. Negative segments are padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dovetail.errors import BuildError
from dovetail.kernels.attention.coords import Side, Span
from dovetail.spec import Spec, register
from dovetail.spec.categories import MaskPart
from dovetail.spec.ranges import Count, Natural


class Kept(NamedTuple):
    """What of the past a causal query can see at most: the `last` tokens, oneself among them, and the `first` ones."""

    last: int
    first: int = 0

    @property
    def tokens(self) -> int:
        return self.last + self.first


class Mask(Spec):
    """Base: what every rule can be asked."""

    def allowed(self, q: Side, k: Side) -> Tensor:
        """bool, broadcast of the two sides: may query i see key j?"""
        raise TypeError(f"{self.kind} does not say what it allows")

    def is_full(self) -> bool:
        """True when the rule statically hides nothing."""
        return False

    def is_causal(self) -> bool:
        """True when the rule is exactly Causal."""
        return False

    def span(self) -> Span | None:
        """The rule as a band of distances; None where it is none."""
        return None

    def for_newest(self, kept: Kept | None) -> Mask:
        """The same rule for one newest query over the stored past (of which only `kept` is there)."""
        return self

    def kept(self) -> Kept | None:
        """What a causal query can see at most, or None when unbounded."""
        return None

    def __and__(self, other: Mask) -> Mask:
        return _joined(And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _joined(Or, self, other)


@register("mask", "full", oracle="formula: true", source="Vaswani et al. 2017")
class Full(Mask):
    """Everybody sees everybody."""

    def allowed(self, q: Side, k: Side) -> Tensor:
        return q.order == q.order

    def is_full(self) -> bool:
        return True

    def span(self) -> Span:
        return Span()


@register("mask", "causal", oracle="formula: j <= i", source="Vaswani et al. 2017, section 3.2.3", causal=True)
class Causal(Mask):
    """j <= i."""

    def allowed(self, q: Side, k: Side) -> Tensor:
        return k.order <= q.order

    def is_causal(self) -> bool:
        return True

    def span(self) -> Span:
        return Span(after=0)

    def for_newest(self, kept: Kept | None) -> Mask:
        return Full()


@register("mask", "window", oracle="formula: 0 <= i - j < size", source="Beltagy et al. 2020, Longformer", causal=True)
class Window(Mask):
    """0 <= i - j < size: the last `size` tokens, oneself included."""

    size: Count

    def allowed(self, q: Side, k: Side) -> Tensor:
        back = q.order - k.order
        return (back >= 0) & (back < self.size)

    def span(self) -> Span:
        return Span(self.size - 1, 0)

    def for_newest(self, kept: Kept | None) -> Mask:
        return Full() if kept is not None and not kept.first and kept.last <= self.size else self

    def kept(self) -> Kept | None:
        return Kept(self.size)


@register(
    "mask", "beyond", oracle="formula: i - j >= size", source="Su 2023 (ReRoPE): what a window leaves", causal=True
)
class Beyond(Mask):
    """i - j >= size: everything before the window of `size`."""

    size: Count

    def allowed(self, q: Side, k: Side) -> Tensor:
        return q.order - k.order >= self.size

    def span(self) -> Span:
        return Span(after=-self.size)


@register(
    "mask", "chunks", oracle="transformers reformer LocalSelfAttention", source="Kitaev et al. 2020, section 2 (chunks)"
)
class Chunks(Mask):
    """Chunks of `size` tokens: one's own, `before` chunks before it and `after` after it."""

    size: Count
    before: Natural = 1
    after: Natural = 0

    def allowed(self, q: Side, k: Side) -> Tensor:
        back = q.order // self.size - k.order // self.size
        return (back <= self.before) & (back >= -self.after)

    def kept(self) -> Kept | None:
        return Kept((self.before + 1) * self.size)


@register("mask", "band", oracle="formula: -after <= i - j <= before", source="Beltagy et al. 2020, Longformer")
class Band(Mask):
    """-after <= i - j <= before: a window that also looks ahead, for encoders."""

    before: int
    after: int

    def allowed(self, q: Side, k: Side) -> Tensor:
        back = q.order - k.order
        return (back <= self.before) & (back >= -self.after)

    def span(self) -> Span:
        return Span(self.before, self.after)


@register("mask", "prefix", oracle="formula: j < length", source="Raffel et al. 2020, section 3.2.1")
class Prefix(Mask):
    """j < length: the first `length` tokens are seen by all (`Causal() | Prefix(n)`; with a window: sinks)."""

    length: Count

    def allowed(self, q: Side, k: Side) -> Tensor:
        return (k.order < self.length) & (q.order == q.order)

    def span(self) -> Span:
        return Span(_NEVER, None, self.length)

    def kept(self) -> Kept | None:
        return Kept(1, self.length)


@register(
    "mask",
    "permutation",
    oracle="formula: j odd and j <= i; transformers xlnet perm_mask",
    source="Yang et al. 2019 (XLNet), section 2.3 and figure 1",
)
class Permutation(Mask):
    """j <= i and j odd: two streams in one row, as a two_stream model orders them.

    The content of the token of rank r has order 2r + 1, its query order 2r: it sees what comes before it in the
    factorisation, not itself, and nobody sees it. Tokens of one rank see each other's content.
    """

    def allowed(self, q: Side, k: Side) -> Tensor:
        return (k.order <= q.order) & (torch.remainder(k.order, 2) == 1)


@register("mask", "dilated", oracle="formula: (i - j) mod step == 0", source="Child et al. 2019, section 4")
class Dilated(Mask):
    """(i - j) mod step == 0: every `step`-th token (atrous attention)."""

    step: Count

    def allowed(self, q: Side, k: Side) -> Tensor:
        return torch.remainder(q.order - k.order, self.step) == 0

    def span(self) -> Span:
        return Span(step=self.step)


@register(
    "mask", "strided", oracle="formula: i - j < stride or (i - j) mod stride == 0", source="Child et al. 2019, eq. 5"
)
class Strided(Mask):
    """The last `stride` tokens, and every `stride`-th before them (OpenAI's strided pattern; `&` it with Causal)."""

    stride: Count

    def allowed(self, q: Side, k: Side) -> Tensor:
        back = q.order - k.order
        return ((back >= 0) & (back < self.stride)) | (torch.remainder(back, self.stride) == 0)


@register(
    "mask",
    "fixed",
    oracle="formula: i // stride == j // stride or j mod stride >= stride - summary",
    source="Child et al. 2019, eq. 6",
)
class Fixed(Mask):
    """One's own block of `stride` tokens, and the last `summary` tokens of every block (`&` it with Causal)."""

    stride: Count
    summary: Count = 1

    def allowed(self, q: Side, k: Side) -> Tensor:
        same = q.order // self.stride == k.order // self.stride
        return same | (torch.remainder(k.order, self.stride) >= self.stride - self.summary)


@register(
    "mask",
    "globals",
    oracle="transformers longformer LongformerSelfAttention",
    source="Beltagy et al. 2020 (Longformer), section 3.1: global attention",
)
class Globals(Mask):
    """i < length or j < length: the first `length` tokens see all and are seen by all. With a Band it is Longformer's."""

    length: Count

    def allowed(self, q: Side, k: Side) -> Tensor:
        return (k.order < self.length) | (q.order < self.length)

    def kept(self) -> Kept | None:
        return Kept(1, self.length)


@register("mask", "document", oracle="formula: segment i == segment j >= 0", source="Raffel et al. 2020 (packing)")
class Document(Mask):
    """Same segment, and not padding. Without segments everything is one document.

    `Context.of` gives every document of a row a number of its own, so that two never pass for one.
    """

    def allowed(self, q: Side, k: Side) -> Tensor:
        if q.segments is None or k.segments is None:
            return (q.order == q.order) & (k.order == k.order)
        return (q.segments == k.segments) & (k.segments >= 0)

    def span(self) -> Span:
        return Span(apart=True)


@register("mask", "padding", oracle="formula: segment j >= 0", source="Vaswani et al. 2017")
class Padding(Mask):
    """Keys that are real: segment >= 0 (or order < lengths of the row, when lengths are given)."""

    lengths: tuple[int, ...] | None = None

    def allowed(self, q: Side, k: Side) -> Tensor:
        if self.lengths is not None:
            limit = torch.tensor(self.lengths, device=k.order.device)
            return (k.order < limit.view(-1, *[1] * (k.order.dim() - 1))) & (q.order == q.order)
        if k.segments is None:
            return (q.order == q.order) & (k.order == k.order)
        return (k.segments >= 0) & (q.order == q.order)


class Several(Mask):
    """Base of the two that join rules."""

    rules: tuple[MaskPart, ...] = Field(min_length=1)

    def each(self) -> tuple[Mask, ...]:
        return self.rules  # type: ignore[return-value]


@register("mask", "and", oracle="formula: all", source="mask algebra")
class And(Several):
    """All of `rules`."""

    def allowed(self, q: Side, k: Side) -> Tensor:
        first, *others = self.each()
        seen = first.allowed(q, k)
        for rule in others:
            seen = seen & rule.allowed(q, k)
        return seen

    def span(self) -> Span | None:
        """Alternatives inside it are bounded by the others first: a window or sinks, both causal."""
        plain = Span.of_all(rule.span() for rule in self.each() if not isinstance(rule, Or))
        for rule in self.each():
            if isinstance(rule, Or):
                plain = Span.of_any([Span.of_all([plain, one.span()]) for one in rule.each()])
        return plain

    def for_newest(self, kept: Kept | None) -> Mask:
        joined: Mask = Full()
        for rule in self.each():
            joined = joined & rule.for_newest(kept)
        return joined

    def kept(self) -> Kept | None:
        return within(*(rule.kept() for rule in self.each()))


@register("mask", "or", oracle="formula: any", source="mask algebra")
class Or(Several):
    """Any of `rules`."""

    def allowed(self, q: Side, k: Side) -> Tensor:
        first, *others = self.each()
        seen = first.allowed(q, k)
        for rule in others:
            seen = seen | rule.allowed(q, k)
        return seen

    def span(self) -> Span | None:
        return Span.of_any([rule.span() for rule in self.each()])

    def for_newest(self, kept: Kept | None) -> Mask:
        kinds = {type(r) for r in self.each()}
        # Without a window the newest query does not see itself, and yet it is stored.
        whole = Window in kinds <= {Window, Prefix, Globals} and kept is not None and kept == self.kept()
        return Full() if whole else self

    def kept(self) -> Kept | None:
        bounds = [rule.kept() for rule in self.each()]
        known = [k for k in bounds if k is not None]
        return Kept(max(k.last for k in known), max(k.first for k in known)) if len(known) == len(bounds) else None


_NEVER = -(2**30)  # how far back one sees where one sees nothing


def narrowed(rule: Mask, extra: Mask | None, path: str) -> Mask:
    """`rule & extra`, interned. Raises BuildError for an extra mask that hides nothing beyond `rule`."""
    if extra is None:
        return interned(rule)
    joined = rule & extra
    if joined == rule or (isinstance(extra, Or) and rule in extra.each()):
        raise BuildError(
            f"the mask {extra.kind!r} hides nothing here beyond {rule.kind!r}, which always holds",
            where=path,
            remedy="leave mask out, or give one that hides more, e.g. {kind: window, size: 512}",
        )
    return interned(joined)


def within(*bounds: Kept | None) -> Kept | None:
    """What is seen at most where all of `bounds` hold; None is no bound."""
    known = [kept for kept in bounds if kept is not None]
    return Kept(min(k.last for k in known), max(k.first for k in known)) if known else None


_INTERNED: dict[str, Mask] = {}


def interned(rule: Mask) -> Mask:
    """The one object that stands for all equal rules, so that layers share a bound mask by identity."""
    return _INTERNED.setdefault(str(rule.to_dict()), rule)


def _joined(kind: Any, a: Mask, b: Mask) -> Mask:
    """`a op b`, flattened; Full is neutral for & and absorbs |."""
    if a.is_full() or b.is_full():
        if kind is Or:
            return Full()
        return b if a.is_full() else a
    rules: list[Mask] = []
    for side in (a, b):
        for rule in side.each() if isinstance(side, Several) and isinstance(side, kind) else (side,):
            if rule not in rules:
                rules.append(rule)
    return rules[0] if len(rules) == 1 else kind(rules=tuple(rules))
