"""Changes whose new spec follows from the old one: fold_norms, absorb_scales, tie, untie."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.errors import SpecError
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import Parallel, PreNorm
from dovetail.parts.embedding import LinearHead
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.norm import RmsNorm
from dovetail.spec import Ref
from dovetail.spec.paths import walk
from dovetail.surgery.assemble import assembled, decoder_of, weights_of
from dovetail.surgery.maps.feedforward import READS
from dovetail.surgery.maps.norm import folded_spec
from dovetail.surgery.maps.ties import is_tied, tied
from dovetail.surgery.transplant import Move, Transplant, transplant


def fold_norms(model: Any) -> Transplant:
    """LayerNorms as RMSNorms with the mean folded away (Ashkboos et al. 2024, SliceGPT, section 3.1). Exact.

    Whatever writes to the stream is multiplied by I - 11ᵀ/C, and each LayerNorm's bias goes into the bias of the map
    behind it (which gets one where it had none). A tied head becomes one of its own: the embedding is centred, the
    head is not. Outputs are equal to rounding, in evaluation or without dropout on the stream. Raises SpecError for
    arrangements where the mean cannot be folded (post-norm, sinusoidal positions, other mixers).
    """
    return transplant(model, folded_spec(model.spec))


def absorb_scales(model: Any) -> Transplant:
    """RMSNorm's scales into the maps behind the norms, whose own become 1 (SliceGPT, section 3.1). Exact.

    The last norm's goes into a head of its own and stays where the head is tied. Raises SpecError for other norms,
    and for mixers or feed-forwards whose reading map is not known.
    """
    spec = decoder_of(model, "absorb_scales")
    tensors = weights_of(model)
    moves: list[Move] = []

    def absorb(norm: str, part: Any, maps: list[str]) -> None:
        if not isinstance(part, RmsNorm):
            raise SpecError(f"absorb_scales: norm {getattr(part, 'kind', part)!r}", where=norm, remedy="use fold_norms")
        scale = tensors[f"{norm}.weight"] + part.offset
        for name in maps:
            tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].to(_wide(scale)) * scale.to(_wide(scale))).to(scale)
            moves.append(Move(name.rpartition(".")[0], "exact", "the norm's scale is absorbed", scale.numel()))
        tensors[f"{norm}.weight"] = torch.full_like(scale, 1.0 - part.offset)

    for i, block in enumerate(spec.blocks):
        here, ff = f"blocks.{i}", getattr(block, "feedforward", None)
        mixer: Any = getattr(block, "mixer", None)
        plain = type(block) in (PreNorm, Parallel) and getattr(block, "cross", None) is None
        if not plain or not isinstance(mixer, Attention) or not isinstance(ff, Mlp | Glu | None):
            raise SpecError(f"absorb_scales: a {block.kind!r} block of a {mixer.kind!r}", where=here)
        if any(part.kind == "deberta" for _, part in walk(mixer.position)):
            raise SpecError(
                "absorb_scales: a position whose distances go through the mixer's own maps, which no norm is before",
                where=f"{here}.mixer.position",
                remedy="swap the position first",
            )
        norm: Any = block.norm  # type: ignore[attr-defined]
        reads = [f"{here}.feedforward.{READS[ff.kind][0]}"] if ff is not None else []
        if getattr(block, "shared", False):
            absorb(f"{here}.norm_mixer", norm, [f"{here}.mixer.qkv", *reads])
        else:
            absorb(f"{here}.norm_mixer", norm, [f"{here}.mixer.qkv"])
            if reads:
                absorb(f"{here}.norm_feedforward", norm, reads)
    if spec.norm is not None and isinstance(spec.head, LinearHead):
        absorb("norm", spec.norm, ["head_part.linear"])
    return assembled(model, spec, tensors, moves)


def untie(model: Any) -> Transplant:
    """A head of its own that begins as the embedding's rows. Exact. Raises SpecError where the head is not tied."""
    spec = decoder_of(model, "untie")
    if not is_tied(spec):
        raise SpecError("untie: the head is its own already", where="head")
    return transplant(model, spec.replace(head=LinearHead()))


def tie(model: Any, rows: Literal["mean", "embedding", "head"] = "mean") -> Transplant:
    """One table for embedding and head (Press and Wolf 2017). Approximate; the relative errors of both are stated.

    rows: their mean, or those of one of them. Raises SpecError where the head is tied, or is not a linear map.
    """
    spec = decoder_of(model, "tie")
    if is_tied(spec):
        raise SpecError("tie: the head is tied already", where="head")
    if rows not in ("mean", "embedding", "head"):
        raise SpecError(f"tie: rows is {rows!r}", remedy="give mean, embedding or head")
    new = spec.replace(head=Ref(path="embedding"))
    mapped = tied(spec, new, weights_of(model), rows)
    if mapped is None:
        raise SpecError(f"tie: a {spec.head.kind!r} head of a {spec.embedding.kind!r} embedding", where="head")
    found = mapped["embedding"]
    tensors = {n: t for n, t in weights_of(model).items() if not n.startswith("head_part.")}
    tensors["embedding.table.weight"] = found.tensors["table.weight"]
    count = tensors["embedding.table.weight"].numel()
    return assembled(model, new, tensors, [Move("embedding", "approximate", found.how, count, found.errors)])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
