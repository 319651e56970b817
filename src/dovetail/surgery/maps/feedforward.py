"""Feed-forward to feed-forward: other widths, an MLP as a GLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.spec import Spec
from dovetail.surgery.maps.base import Exactness, Mapped, Place, Rows, fit_bias, scaled, weight_map

READS = {"mlp": ("up", 1), "glu": ("gate_up", 2)}  # the map that reads the stream, and how many are fused in it


@weight_map("feedforward", "mlp", "mlp", gives=("exact", "approximate"), source="Chen et al. 2016 (Net2Net), eq. 3-5")
@weight_map("feedforward", "glu", "glu", gives=("exact", "approximate"), source="Chen et al. 2016 (Net2Net), eq. 3-5")
def resized(old: Any, new: Any, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """Another width, bias or activation of the same sort.

    Wider: neurons are repeated in turn, and what each sends out is divided among its copies, which is exact (copies
    stay alike in training unless dropout or noise parts them).
    Narrower: the neurons of the largest weights stay. A bias that comes starts at zero; one that goes is lost.
    """
    read, maps = READS[old.kind]
    H, H2 = old.width(place.dim), new.width(place.dim)
    out, errors = dict(tensors), dict[str, float]()
    said, lost = _to_width(out, errors, read, maps, H, H2)
    scaled(out, "down", place.old.down.multiplier / place.module.down.multiplier)
    narrower = bool(lost)
    for name in (read, "down"):
        gone = fit_bias(out, errors, name, new.bias)
        lost += [gone] if gone else []
    if new.bias and not old.bias:
        said.append("biases start at zero")
    lost += _activation(old, new)
    if not said and not lost:
        return None
    rows = {name: [(0, t.shape[0])] for name, t in out.items()} if narrower else {}
    return Mapped(out, "approximate" if lost else "exact", "; ".join(said + lost), rows, errors=errors)


@weight_map("feedforward", "mlp", "glu", gives=("exact", "approximate"), source="Shazeer 2020, eq. 5-6")
def gated(old: Mlp, new: Glu, tensors: Mapping[str, Tensor], place: Place) -> Mapped:
    """act(W₁x + b₁) as act(gate)·up with gate = W₁x + b₁ and up = 0x + 1.

    Exact for a GLU with biases. Without them nothing can be 1: the up map starts anew, and nothing is bounded.
    """
    H, H2 = old.width(place.dim), new.width(place.dim)
    out, errors = dict(tensors), dict[str, float]()
    said, lost = _to_width(out, errors, "up", 1, H, H2)
    scaled(out, "down", place.old.down.multiplier / place.module.down.multiplier)
    narrower = bool(lost)
    for name in ("up", "down"):
        gone = fit_bias(out, errors, name, new.bias)
        lost += [gone] if gone else []
    lost += _activation(old, new)
    weight, bias = out.pop("up.weight"), out.pop("up.bias", None)
    out["gate_up.weight"] = torch.cat([weight, torch.zeros_like(weight)])
    drawn: Rows = {}
    if bias is not None:
        one = 1.0 / place.module.gate_up.multiplier
        out["gate_up.bias"] = torch.cat([bias, torch.full_like(bias, one)])
        said.append("the gate is the old map, the map beside it is the constant 1")
    else:
        drawn["gate_up.weight"] = [(H2, 2 * H2)]
        lost.append("the gate is the old map, the map beside it starts anew (without a bias it cannot be 1): no bound")
    rows = {name: [(0, t.shape[0])] for name, t in out.items()} if narrower else {}
    exactness: Exactness = "approximate" if lost else "exact"
    return Mapped(out, exactness, "; ".join(said + lost), rows, drawn, errors)


def importance(tensors: Mapping[str, Tensor], read: str, maps: int) -> Tensor:
    """The squared norm of each neuron's weights, in and out: (H,) fp64."""
    reads = tensors[f"{read}.weight"].double().unflatten(0, (maps, -1)).square().sum((0, 2))
    return reads + tensors["down.weight"].double().square().sum(0)


def chosen(tensors: dict[str, Tensor], errors: dict[str, float], read: str, maps: int, keep: Tensor) -> None:
    """Only the neurons `keep` (H2,), in place; errors: of each weight against the others set to zero."""
    for name in (f"{read}.weight", f"{read}.bias"):
        if name in tensors:
            whole = tensors[name]
            tensors[name] = whole.unflatten(0, (maps, -1))[:, keep].flatten(0, 1)
            errors[name] = lost_share(whole, tensors[name])
    whole = tensors["down.weight"]
    tensors["down.weight"] = whole[:, keep].contiguous()
    errors["down.weight"] = lost_share(whole, tensors["down.weight"])


def lost_share(whole: Tensor, kept: Tensor) -> float:
    """Relative Frobenius error of a weight whose other entries are taken out."""
    total = float(whole.double().square().sum())
    return max(0.0, 1.0 - float(kept.double().square().sum()) / total) ** 0.5 if total else 0.0


def _to_width(
    tensors: dict[str, Tensor], errors: dict[str, float], read: str, maps: int, H: int, H2: int
) -> tuple[list[str], list[str]]:
    """H neurons made H2, in place. What was done, in words: exactly, and not exactly."""
    if H2 < H:
        keep = importance(tensors, read, maps).topk(H2).indices.sort().values
        chosen(tensors, errors, read, maps, keep)
        return [], [f"{H2} of {H} neurons are kept, those of the largest weights"]
    if H2 > H:
        source = torch.arange(H2, device=tensors["down.weight"].device) % H
        copies = source.bincount(minlength=H)[source]
        for name in (f"{read}.weight", f"{read}.bias"):
            if name in tensors:
                tensors[name] = tensors[name].unflatten(0, (maps, -1))[:, source].flatten(0, 1)
        tensors["down.weight"] = tensors["down.weight"][:, source] / copies
        return [f"{H} neurons repeated to {H2}, each sharing what it sends out"], []
    return [], []


def _activation(old: Any, new: Any) -> list[str]:
    before, after = old.activation, new.activation
    assert isinstance(before, Spec) and isinstance(after, Spec)
    return [f"activation {after.kind} in place of {before.kind}: no bound"] if before != after else []
