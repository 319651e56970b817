"""LayerNorm to RMSNorm: exact where the mean can be folded away, over the whole model; else part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import SpecError
from dovetail.models.decoder import Decoder
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import Parallel, PreNorm
from dovetail.parts.embedding import LinearHead, TokenEmbedding
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.norm import LayerNorm, RmsNorm
from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.base import NoPosition
from dovetail.spec.paths import walk
from dovetail.surgery.maps.base import Mapped, Place, relative_error, weight_map, whole_map
from dovetail.surgery.maps.feedforward import READS

_SOURCE = "Ashkboos et al. 2024 (SliceGPT), section 3.1"


@weight_map("norm", "layer", "rms", gives=("approximate",), source=_SOURCE)
def without_mean(old: LayerNorm, new: RmsNorm, tensors: Mapping[str, Tensor], place: Place) -> Mapped:
    """The scale alone: the mean is no longer taken out and the bias is lost (`fold_norms` loses neither)."""
    if not new.affine:
        errors = {name: relative_error(t, torch.full_like(t, float(name == "weight"))) for name, t in tensors.items()}
        return Mapped({}, "approximate", "the mean stays in; scale and bias are lost: no bound", errors=errors)
    weight = tensors["weight"] if old.affine else torch.ones_like(place.module.weight)
    errors = {}
    if "bias" in tensors:
        whole = torch.stack([weight, tensors["bias"]])
        errors["bias"] = relative_error(whole, torch.stack([weight, torch.zeros_like(weight)]))
    how = "the scale is carried; the mean stays in and the bias is lost: no bound (fold_norms makes it exact)"
    return Mapped({"weight": weight - new.offset}, "approximate", how, errors=errors)


@weight_map("norm", "rms", "layer", gives=("approximate",), source="Zhang and Sennrich 2019, section 4")
def with_mean(old: RmsNorm, new: LayerNorm, tensors: Mapping[str, Tensor], place: Place) -> Mapped:
    """The scale, and a bias of zero: the mean is taken out from now on."""
    out, errors = {}, {}
    if new.affine:
        out["weight"] = tensors["weight"] + old.offset if old.affine else torch.ones_like(place.module.weight)
    elif old.affine:
        weight = tensors["weight"] + old.offset
        errors["weight"] = relative_error(weight, torch.ones_like(weight))
    if new.affine and new.bias:
        out["bias"] = torch.zeros_like(out["weight"])
    return Mapped(
        out, "approximate", "the scale is carried; the mean is taken out from now on: no bound", errors=errors
    )


@weight_map("norm", "layer", "layer", gives=("exact", "approximate"), source="Ba et al. 2016")
@weight_map("norm", "rms", "rms", gives=("exact", "approximate"), source="Zhang and Sennrich 2019, eq. 4")
def other_options(old: Any, new: Any, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """The same scale beside another offset, or a scale of ones and a bias of zeros where there were none: exact.

    A scale or bias that goes is lost, and another eps is another function.
    """
    out: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    said: list[str] = []
    lost: list[str] = []
    before, after = getattr(old, "offset", 0.0), getattr(new, "offset", 0.0)
    for name, word, start in (("weight", "scale", 1.0), ("bias", "bias", 0.0)):
        there, here = tensors.get(name), getattr(place.module, name, None)
        shift, wanted = (before, after) if name == "weight" else (0.0, 0.0)
        if here is not None:
            out[name] = torch.full_like(here, start - wanted) if there is None else there + (shift - wanted)
            said += [f"the {word} begins at {start:g}"] if there is None else []
            said += (
                [f"the scale is kept beside an offset of {after:g}"] if there is not None and shift != wanted else []
            )
        elif there is not None:
            act = there + shift
            errors[name] = relative_error(act, torch.full_like(act, start))
            lost.append(f"the {word} is lost: no bound")
    lost += [f"eps {new.eps:g} in place of {old.eps:g}: no bound"] if old.eps != new.eps else []
    if not said and not lost:
        return None
    return Mapped(out, "approximate" if lost else "exact", "; ".join(said + lost), errors=errors)


def folded_spec(spec: Any, rms: RmsNorm | None = None) -> Decoder:
    """The spec that can hold a decoder of LayerNorms with their means and biases folded away.

    rms: the norm to put there; its eps must be the LayerNorms'. The head becomes one of its own, and maps behind a
    norm with a bias get one. Raises SpecError, saying why, for an arrangement whose mean cannot be folded.
    """
    if not isinstance(spec, Decoder) or spec.streams != 1:
        raise _refused("only a decoder of one stream can be folded", "the root")
    if spec.norm_in is not None:
        raise _refused("a norm at the stack's entry writes a mean that no linear map can take out", "norm_in")
    if not isinstance(spec.position, (NoPosition, Learned)):
        raise _refused(f"position {spec.position.kind!r} writes a mean into the stream and has no weights", "position")
    if not isinstance(spec.embedding, TokenEmbedding):
        raise _refused(f"embedding {spec.embedding.kind!r}", "embedding")
    if spec.head.kind not in ("ref", "linear"):
        raise _refused(f"head {spec.head.kind!r}", "head")
    last = _layer_norm(spec.norm, "norm")
    head_bias = _shifts(last) or getattr(spec.head, "bias", False)
    blocks = [_folded_block(block, rms, f"blocks.{i}") for i, block in enumerate(spec.blocks)]
    return spec.replace(blocks=tuple(blocks), norm=_rms(last, rms), head=LinearHead(bias=head_bias))


def _folded_block(block: Any, rms: RmsNorm | None, where: str) -> Any:
    if type(block) not in (PreNorm, Parallel) or block.cross is not None:
        raise _refused(f"a {block.kind!r} block" + (" with a cross mixer" if block.cross else ""), where)
    norm, mixer, ff = _layer_norm(block.norm, f"{where}.norm"), block.mixer, block.feedforward
    if not isinstance(mixer, Attention) or not isinstance(ff, Mlp | Glu | None):
        raise _refused(f"a {mixer.kind!r} beside a {getattr(ff, 'kind', ff)!r}", where)
    if _shifts(norm):
        if any(part.kind == "deberta" for _, part in walk(mixer.position)):
            raise _refused("a position that reads the mixer's own biases", f"{where}.mixer.position")
        mixer = mixer.replace(bias="qkv" if mixer.bias in ("none", "qkv") else "all")
        if ff is not None and not ff.bias:
            ff = ff.replace(bias=True)
    return block.replace(norm=_rms(norm, rms), mixer=mixer, feedforward=ff)


def _layer_norm(norm: Any, where: str) -> LayerNorm:
    if not isinstance(norm, LayerNorm):
        raise _refused(f"norm {getattr(norm, 'kind', norm)!r} where a LayerNorm is expected", where)
    return norm


def _shifts(norm: LayerNorm) -> bool:
    return norm.affine and norm.bias


def _rms(norm: LayerNorm, wanted: RmsNorm | None) -> RmsNorm:
    rms = wanted or RmsNorm(eps=norm.eps)
    if rms.eps != norm.eps:
        raise _refused(f"eps {rms.eps} in place of {norm.eps}", "norm")
    if not rms.affine:
        raise _refused("an RMSNorm without a weight to take the LayerNorm's", "norm")
    return rms


def _refused(what: str, where: str) -> SpecError:
    return SpecError(
        f"the mean of a LayerNorm cannot be folded away here: {what}",
        where=where,
        remedy='swap the norms part by part, which is approximate: {"blocks.*.norm": {kind: rms}}',
    )


@whole_map("norm", "layer", "rms", gives=("exact",), source=_SOURCE)
def folded(old: Any, new: Any, tensors: Mapping[str, Tensor]) -> dict[str, Mapped] | None:
    """Exact: what writes to the stream is multiplied by I - 11ᵀ/C, so that the stream has no mean, and a LayerNorm
    of it is an RMSNorm. LayerNorm's bias goes through the next map into that map's bias. Under dropout the stream
    keeps a mean of its own while training; without it, outputs are equal to rounding.
    """
    rms = getattr(new, "norm", None)
    try:
        if not isinstance(rms, RmsNorm) or folded_spec(old, rms) != new:
            return None
    except SpecError:
        return None
    out: dict[str, Mapped] = {}

    def said(path: str, how: str, **values: Tensor | None) -> None:
        given = {name.replace("__", "."): value for name, value in values.items() if value is not None}
        out[path] = Mapped(given, "exact", how)

    centre = "the mean of what it writes is folded away"
    said("embedding", centre, table__weight=_centred(tensors["embedding.table.weight"], -1))
    if isinstance(old.position, Learned):
        said("position", centre, table__weight=_centred(tensors["position.table.weight"], -1))
    for i, block in enumerate(new.blocks):
        here = f"blocks.{i}"
        branches = [("mixer", "qkv", "out")]
        if block.feedforward is not None:
            branches.append(("feedforward", READS[block.feedforward.kind][0], "down"))
        for branch, read, write in branches:
            path = f"{here}.{branch}"
            own = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
            norm = f"{here}.norm_{branch}" if f"{here}.norm_{branch}.weight" in tensors else f"{here}.norm_mixer"
            reading = f"{read}.bias"
            shifted = _shifted(own[f"{read}.weight"], own.get(reading), tensors.get(f"{norm}.bias"))
            given = {n: t for n, t in own.items() if n.partition(".")[0] in (read, write)}
            given |= {reading: shifted} if shifted is not None else {}
            given |= {n: _centred(own[n], 0) for n in (f"{write}.weight", f"{write}.bias") if n in own}
            if f"{write}.bias" not in own and getattr(block, branch).bias in (True, "all"):
                given[f"{write}.bias"] = own[f"{write}.weight"].new_zeros(own[f"{write}.weight"].shape[0])
            out[path] = Mapped(given, "exact", "the norm's bias is folded in, and " + centre)
            if not (branch == "feedforward" and getattr(block, "shared", False)):
                out[f"{here}.norm_{branch}"] = _scale(tensors, norm, old.dim, rms)
    out["norm"] = _scale(tensors, "norm", old.dim, rms)
    rows = tensors["embedding.table.weight"] if old.head.kind == "ref" else tensors["head_part.linear.weight"]
    # A tied head has no multiplier; a linear one may (muP), which divides its rows and leaves its bias inside.
    factor = old.init.multiplier("head", old.dim, old.vocab)
    rows = rows / factor if old.head.kind == "ref" and factor != 1.0 else rows
    bias = tensors.get("norm.bias")
    bias = _shifted(rows, tensors.get("head_part.linear.bias"), bias)
    said("head_part", "the last norm's bias is folded into a head of its own", linear__weight=rows, linear__bias=bias)
    return out


def _scale(tensors: Mapping[str, Tensor], norm: str, dim: int, rms: RmsNorm) -> Mapped:
    like = tensors["embedding.table.weight"]
    weight = tensors.get(f"{norm}.weight", torch.ones(dim, dtype=like.dtype, device=like.device))
    return Mapped({"weight": weight - rms.offset}, "exact", "a LayerNorm of a stream without a mean")


def _centred(x: Tensor, dim: int) -> Tensor:
    """x less its mean along the model width: (I - 11ᵀ/C) x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - wide.mean(dim, keepdim=True)).to(x.dtype)


def _shifted(weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The bias of a map whose input lost `shift`."""
    if shift is None:
        return bias
    wide = torch.promote_types(weight.dtype, torch.float32)
    moved = weight.to(wide) @ shift.to(wide)
    return (moved if bias is None else moved + bias.to(wide)).to(weight.dtype)
