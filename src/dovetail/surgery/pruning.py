"""Pruning: whole heads or neurons, which makes widths smaller; or single weights, which are set to zero.

Each is approximate, and states for every weight the relative Frobenius error e = |W' - W| / |W|: for any input,
|(W' - W) x| <= e |W| |x|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import SpecError
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.weights import Linear
from dovetail.surgery.assemble import assembled, decoder_of, no_shared_layers, number, same_device, weights_of
from dovetail.surgery.maps.base import relative_error, scaled
from dovetail.surgery.maps.feedforward import READS, chosen, lost_share
from dovetail.surgery.maps.feedforward import importance as neuron_importance
from dovetail.surgery.transplant import Move, Transplant

Importance = Sequence[Tensor] | None


def prune_heads(model: Any, kv_heads: int, *, importance: Importance = None) -> Transplant:
    """Every attention layer with `kv_heads` key/value heads and the query heads that read them; the others go.

    Without grouping that is one query head each (Michel et al. 2019; Xia et al. 2024, Sheared LLaMA, for groups).
    importance: for each layer (G,), larger is kept; the squared norm of all weights of a group unless given.
    Raises SpecError for other mixers, positions that hold something for each head, and norms over all heads together.
    """
    spec = decoder_of(model, "prune_heads")
    no_shared_layers(spec, "prune_heads")
    _check_layers(importance, spec.depth)
    tensors = weights_of(model)
    blocks: list[Any] = []
    moves: list[Move] = []
    for i, block in enumerate(spec.blocks):
        path, mixer = f"blocks.{i}.mixer", getattr(block, "mixer", None)
        _check_heads(mixer, model.get_submodule(path), path)
        assert isinstance(mixer, Attention)
        H, G, D, Dv = mixer.sizes(spec.dim)
        number(kv_heads, G, "prune_heads: kv_heads")
        per = H // G
        old = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
        q, k, v = old["qkv.weight"].split([H * D, G * D, G * Dv])
        sums = [x.double().unflatten(0, (G, -1)).square().sum((1, 2)) for x in (q, k, v)]
        sums.append(old["out.weight"].double().unflatten(1, (G, -1)).square().sum((0, 2)))
        keep = _largest(importance, i, sum(sums[1:], sums[0]), kv_heads)
        new: dict[str, Tensor] = {"out.weight": old["out.weight"].unflatten(1, (G, -1))[:, keep].flatten(1)}
        for name in (n for n in ("qkv.weight", "qkv.bias") if n in old):
            pieces = old[name].split([H * D, G * D, G * Dv])
            new[name] = torch.cat([x.unflatten(0, (G, -1))[keep].flatten(0, 1) for x in pieces])
        tensors |= {f"{path}.{n}": t for n, t in new.items()}
        errors = {n: lost_share(old[n], t) for n, t in new.items()}
        scaled(tensors, f"{path}.out", _ratio(model, f"{path}.out", kv_heads * per * Dv))
        how = f"{kv_heads} of {G} key/value heads are kept, with {per} query heads each"
        moves.append(Move(path, "approximate", how, sum(t.numel() for t in new.values()), errors))
        sizes = {"heads": kv_heads * per, "kv_heads": kv_heads, "head_dim": D}
        wider = {} if Dv == D else {"value_dim": Dv}
        blocks.append(block.replace(mixer=mixer.replace(**sizes, **wider)))
    return assembled(model, spec.replace(blocks=tuple(blocks)), tensors, moves)


def prune_neurons(model: Any, hidden: int, *, importance: Importance = None) -> Transplant:
    """Every feed-forward (MLP or GLU) with `hidden` neurons; the others go (Li et al. 2016; Xia et al. 2024).

    importance: for each layer (hidden,), larger is kept; the squared norm of a neuron's weights unless given.
    Raises SpecError for other feed-forwards.
    """
    spec = decoder_of(model, "prune_neurons")
    no_shared_layers(spec, "prune_neurons")
    _check_layers(importance, spec.depth)
    tensors = weights_of(model)
    blocks: list[Any] = []
    moves: list[Move] = []
    for i, block in enumerate(spec.blocks):
        path, ff = f"blocks.{i}.feedforward", getattr(block, "feedforward", None)
        if ff is None or ff.kind not in READS:
            raise SpecError(f"prune_neurons: no neurons in {getattr(ff, 'kind', ff)!r}", where=path)
        read, maps = READS[ff.kind]
        H = ff.width(spec.dim)
        number(hidden, H, "prune_neurons: hidden")
        own = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
        keep = _largest(importance, i, neuron_importance(own, read, maps), hidden)
        errors: dict[str, float] = {}
        chosen(own, errors, read, maps, keep)
        tensors |= {f"{path}.{n}": t for n, t in own.items()}
        scaled(tensors, f"{path}.down", _ratio(model, f"{path}.down", hidden))
        count = sum(own[n].numel() for n in errors)
        moves.append(Move(path, "approximate", f"{hidden} of {H} neurons are kept", count, errors))
        blocks.append(block.replace(feedforward=ff.replace(hidden=hidden)))
    return assembled(model, spec.replace(blocks=tuple(blocks)), tensors, moves)


def magnitude_prune(model: Any, sparsity: float | tuple[int, int], *, within: str = "blocks") -> Transplant:
    """The smallest weights of every linear map set to zero; the spec stays.

    sparsity: the share of each map that goes (Han et al. 2015), or (n, m): n of every m neighbouring inputs of an
    output stay, (2, 4) for NVIDIA's sparse tensor cores (Mishra et al. 2021). within: the path under which maps are
    pruned. Biases, norms and lookups stay whole. Raises SpecError for a share, a pattern or a path that does not fit.
    """
    if isinstance(sparsity, tuple):
        few, many = sparsity
        if not 1 <= few < many:
            raise SpecError(f"magnitude_prune: {few} of every {many} weights", remedy="give (n, m) with 1 <= n < m")
    elif not 0 < sparsity < 1:
        raise SpecError(f"magnitude_prune: a share of {sparsity}", remedy="give one between 0 and 1, or (n, m)")
    tensors = weights_of(model)
    moves: list[Move] = []
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if not isinstance(module, nn.Linear) or name not in tensors or not f"{path}.".startswith(f"{within}."):
            continue
        weight = tensors[name]
        kept = _pattern(weight, *sparsity, path) if isinstance(sparsity, tuple) else _share(weight, sparsity)
        tensors[name] = weight.where(kept, torch.zeros_like(weight))
        zero = int((~kept).sum())
        how = f"{sparsity[0]} of every {sparsity[1]}" if isinstance(sparsity, tuple) else f"{1 - sparsity:.3g} of all"
        errors = {"weight": relative_error(weight, tensors[name])}
        moves.append(Move(path, "approximate", f"{how} weights stay, the others are zero", zero, errors))
    if not moves:
        raise SpecError(f"magnitude_prune: no linear map within {within!r}", remedy="give a module path such as blocks")
    return assembled(model, model.spec, tensors, moves)


def _ratio(model: Any, path: str, inputs: int) -> float:
    """What the weights of the map at `path` are multiplied by, so that it acts as before with only `inputs` inputs."""
    linear: Linear = model.get_submodule(path)
    return linear.multiplier / linear.scale(inputs)


def _share(weight: Tensor, share: float) -> Tensor:
    """True where a weight stays: exactly round(share · count) of the smallest go."""
    gone = round(share * weight.numel())
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[weight.abs().flatten().argsort(stable=True)[:gone]] = False
    return kept.view_as(weight)


def _pattern(weight: Tensor, few: int, many: int, path: str) -> Tensor:
    """True where a weight stays: the `few` largest of each `many` along the inputs."""
    if weight.shape[1] % many:
        raise SpecError(
            f"magnitude_prune: {weight.shape[1]} inputs are no multiple of {many}",
            where=path,
            remedy="choose another pattern, a share, or a narrower path",
        )
    groups = weight.unflatten(1, (-1, many))
    best = groups.abs().sort(dim=-1, descending=True, stable=True).indices[..., :few]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(1)


def _largest(importance: Importance, layer: int, own: Tensor, count: int) -> Tensor:
    """Numbers of the `count` most important, in their old order. Raises SpecError for scores of another shape."""
    scores = own if importance is None else same_device(importance[layer], own).double()
    if scores.shape != own.shape:
        raise SpecError(f"importance of layer {layer} has shape {tuple(scores.shape)}, not {tuple(own.shape)}")
    return scores.topk(count).indices.sort().values


def _check_layers(importance: Importance, depth: int) -> None:
    if importance is not None and len(importance) != depth:
        raise SpecError(f"importance of {len(importance)} layers for a model of {depth}")


def _check_heads(mixer: Any, module: Any, path: str) -> None:
    """Raises SpecError for an attention whose heads cannot be taken out alone."""
    if not isinstance(mixer, Attention):
        raise SpecError(f"prune_heads: a {mixer.kind!r} has no heads to take out", where=path)
    if mixer.qk_norm is not None and mixer.qk_norm_over == "all":
        raise SpecError("prune_heads: queries and keys are normed over all heads together", where=f"{path}.qk_norm")
    hooks, weights = module.position.hooks, list(module.position.parameters())
    if "score" in hooks or ("regions" in hooks and weights):
        raise SpecError(
            f"prune_heads: position {mixer.position.kind!r} holds something for each head",
            where=f"{path}.position",
            remedy="swap the position first",
        )
