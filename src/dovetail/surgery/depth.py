"""Other depths: layers dropped or repeated by an explicit mapping from new layers to old ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import DataError, SpecError
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import Parallel, PreNorm
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.surgery.assemble import assembled, decoder_of, layer_numbers, no_shared_layers, number, weights_of
from dovetail.surgery.transplant import Move, Transplant


def drop_blocks(model: Any, layers: Sequence[int]) -> Transplant:
    """The model without some of its layers (Gromov et al. 2024, section 3.2; Men et al. 2024). Approximate, no bound.

    layers: numbers of those that go, e.g. `range(start, start + 4)` with `start = angular_distances(model, tokens,
    4).argmin()`. Raises SpecError for a layer that is not there, for all of them, and for shared parts.
    """
    spec = decoder_of(model, "drop_blocks")
    gone = set(layer_numbers(layers, spec.depth, "drop_blocks"))
    kept = [i for i in range(spec.depth) if i not in gone]
    if not kept:
        raise SpecError("drop_blocks: no layer would be left", remedy="keep at least one")
    listed = ", ".join(map(str, sorted(gone)))
    move = Move("blocks", "approximate", f"layers {listed} of {spec.depth} dropped: no bound", 0)
    return _remapped(model, kept, [move], set())


def grow_depth(model: Any, layers: Sequence[int], *, identity: bool = False) -> Transplant:
    """A model whose layer i is a copy of the old layer `layers[i]`.

    Depth up-scaling (Kim et al. 2023, SOLAR, section 3.1) is `[*range(n - m), *range(m, n)]`: approximate, no bound,
    and meant to be trained on. identity: a layer's second copy and later ones add nothing to the stream at first,
    their output maps being zero (Wu et al. 2024, LLaMA-Pro, section 3.1): `[0, 1, 1, 2, 3, 3]` is exact.
    Raises SpecError for a layer that is not there, for shared parts, and for an identity that cannot be exact.
    """
    spec = decoder_of(model, "grow_depth")
    source = layer_numbers(layers, spec.depth, "grow_depth")
    repeats = {i for i, layer in enumerate(source) if layer in source[:i]}
    moves = [Move(f"blocks.{i}", "exact", f"layer {j} again", 0) for i, j in enumerate(source) if i in repeats]
    if not identity:
        how = f"{len(source)} layers, copies of {', '.join(map(str, source))}: no bound"
        return _remapped(model, source, [Move("blocks", "approximate", how, 0)], set())
    if [layer for i, layer in enumerate(source) if i not in repeats] != list(range(spec.depth)):
        raise SpecError(
            "grow_depth: added layers are the identity only beside every old layer, in order",
            where=f"layers {source}",
            remedy=f"repeat layers of {list(range(spec.depth))} without leaving one out, or leave identity out",
        )
    for i in repeats:
        _check_silent(spec.blocks[source[i]], f"blocks.{source[i]}")
    how = "a copy whose output maps are zero: it adds nothing until it is trained"
    return _remapped(model, source, [Move(m.path, "exact", f"{m.how}, {how}", 0) for m in moves], repeats)


@torch.no_grad()
def angular_distances(model: Any, tokens: Tensor, count: int) -> Tensor:
    """How much `count` layers in a row turn the stream: (depth - count + 1,) fp64, each in 0..1.

    arccos(cos(x_l, x_(l+count))) / pi of the last token of each row of tokens (B,T), averaged (Gromov et al. 2024,
    eq. 7); entry l is of the layers l .. l + count - 1. Raises SpecError, DataError.
    """
    spec = decoder_of(model, "angular_distances")
    number(count, spec.depth, "angular_distances: count")
    if tokens.dim() != 2 or not tokens.numel():
        raise DataError(f"tokens have shape {tuple(tokens.shape)}", remedy="give (batch, length)")
    seen: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, -1].double())) for b in model.blocks]
    hooks.append(model.blocks[-1].register_forward_hook(lambda *given: seen.append(given[2][:, -1].double())))
    try:
        model(tokens.to(next(model.parameters()).device), logits=False)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(seen[: len(seen) - count], seen[count:], strict=True)
    cosines = torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs])  # (depth - count + 1, B)
    return (cosines.clamp(-1.0, 1.0).arccos() / torch.pi).mean(1)


def _remapped(model: Any, source: list[int], moves: list[Move], silent: set[int]) -> Transplant:
    """New layer i from old layer source[i]; the layers of `silent` get zero output maps."""
    spec = decoder_of(model, "layers")
    no_shared_layers(spec, "its layers cannot be moved")
    old = weights_of(model)
    tensors: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for i, j in enumerate(source):
        prefix = f"blocks.{j}."
        for name, value in old.items():
            if name.startswith(prefix):
                local = name.removeprefix(prefix)
                writes = local in (
                    "mixer.out.weight",
                    "mixer.out.bias",
                    "feedforward.down.weight",
                    "feedforward.down.bias",
                )
                tensors[f"blocks.{i}.{local}"] = torch.zeros_like(value) if i in silent and writes else value
                counts[f"blocks.{i}"] += value.numel()
    counts["blocks"] = sum(counts.values())
    tensors |= {name: value for name, value in old.items() if not name.startswith("blocks.")}
    new = spec.replace(depth=len(source), blocks=tuple(spec.blocks[j] for j in source))
    origin: Any = getattr(model, "origin", None)
    changes: dict[str, Any] = {}
    types = None if origin is None else origin.config.get("layer_types")
    if (
        origin is not None and isinstance(types, list) and len(types) == spec.depth
    ):  # one entry a layer in some layouts' configs
        changes["config"] = origin.config | {"layer_types": [types[j] for j in source]}
    counted = [Move(m.path, m.exactness, m.how, counts[m.path]) for m in moves]
    done = assembled(model, new, tensors, counted, **changes)
    done.dropped = [n for n in old if n.startswith("blocks.") and int(n.split(".")[1]) not in source]
    return done


def _check_silent(block: Any, where: str) -> None:
    """Raises SpecError for a block that would not be the identity with zero output maps."""
    plain = type(block) in (PreNorm, Parallel) and block.cross is None
    if not plain or not isinstance(block.mixer, Attention) or not isinstance(block.feedforward, Mlp | Glu | None):
        raise SpecError(
            f"grow_depth: a {block.kind!r} block of a {block.mixer.kind!r} is not the identity when its outputs are zero",
            where=where,
            remedy="leave identity out, which is approximate",
        )
