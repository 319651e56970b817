"""A model of a new spec from tensors that are all given: what depth, vocabulary and pruning have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import SpecError
from dovetail.hub.load import assign
from dovetail.models import build
from dovetail.models.decoder import Decoder
from dovetail.spec.paths import walk
from dovetail.surgery.plain import check_plain
from dovetail.surgery.transplant import Move, Transplant


def assembled(model: Any, spec: Any, tensors: Mapping[str, Tensor], moves: list[Move], **origin: Any) -> Transplant:
    """The model of `spec` with `tensors` (copied), on `model`'s device, with an account.

    What was cut or joined keeps its name; a name that is gone was dropped. origin: fields of the model's origin that
    no longer hold, with what holds now; tensors that its files stored but did not use are left out in any case.
    """
    old = {name: p.data for name, p in model.named_parameters()}
    grown = build(spec, weights=False)
    assign(grown, {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, "the new model")
    grown.to(next(iter(old.values())).device)
    grown.train(model.training)
    before = getattr(model, "origin", None)
    if before is not None:
        grown.origin = replace(before, carried=replace(before.carried, kept={}), **origin)
    inexact = [n for n in tensors for m in moves if n.removeprefix(f"{m.path}.") in m.errors]
    return Transplant(grown, moves, list(tensors), [], sorted(old.keys() - tensors.keys()), inexact)


def decoder_of(model: Any, what: str) -> Decoder:
    """The spec of a decoder of one stream. Raises SpecError for another model."""
    spec = getattr(model, "spec", None)
    if not isinstance(spec, Decoder) or spec.streams != 1:
        raise SpecError(f"{what}: only decoders of one stream are supported", where=getattr(spec, "kind", "the model"))
    return spec


def weights_of(model: Any) -> dict[str, Tensor]:
    """Every parameter's data by name, shared ones once. Raises SpecError for adapters, and for weights in codes."""
    check_plain(model)
    return {name: p.data for name, p in model.named_parameters()}


def no_shared_layers(spec: Decoder, what: str) -> None:
    """Raises SpecError where a layer's part is shared by a ref, which a change of the layers would break."""
    for path, part in walk(spec):
        target = getattr(part, "path", "") if part.kind == "ref" else ""
        if target.startswith("blocks."):
            raise SpecError(
                f"{what}: {path} shares {target}",
                where=path,
                remedy="give that layer a part of its own first",
            )


def layer_numbers(layers: Sequence[int], depth: int, what: str) -> list[int]:
    """The layers as given. Raises SpecError for none, or one that is not there."""
    wrong = [i for i in layers if not 0 <= i < depth]
    if wrong or not layers:
        raise SpecError(
            f"{what}: {'no layer ' + str(wrong[0]) if wrong else 'no layers given'}",
            remedy=f"the model has layers 0 to {depth - 1}",
        )
    return list(layers)


def number(value: Any, most: int, what: str) -> int:
    """A count between 1 and `most`. Raises SpecError."""
    if not isinstance(value, int) or not 1 <= value <= most:
        raise SpecError(f"{what} is {value!r}", remedy=f"give a whole number from 1 to {most}")
    return value


def same_device(values: Any, like: Tensor) -> Tensor:
    """Numbers as a tensor (int64 or fp64) beside `like`."""
    found = torch.as_tensor(values)
    wide = torch.float64 if found.is_floating_point() else torch.int64
    return found.to(like.device, wide)
