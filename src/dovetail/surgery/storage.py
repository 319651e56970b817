"""Quantisation as surgery: the weights of linear maps kept in codes, and what that changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dovetail.errors import SpecError
from dovetail.parts.storage.base import Storage
from dovetail.parts.weights import Linear
from dovetail.spec import Spec


@torch.no_grad()
def quantise(model: Any, storage: Storage | Mapping[str, Any] | str, *, leave: Iterable[str] = ()) -> dict[str, float]:
    """Keeps every linear map's weight but the head's as `storage` says, in place; they are frozen from then on.

    leave: paths (with *) of maps that stay as they are. Returns path -> relative Frobenius error, the bound of what
    a map's output can be off by: ‖(W − Q)x‖ <= error · ‖W‖ · ‖x‖ (Dettmers et al. 2023, section 3).
    Raises SpecError for a path that meets nothing, and while adapters are merged into the weights; CheckpointError for
    weights that no code can hold.
    """
    if getattr(model, "merged_over", None) is not None:  # unmerge would put dense weights beside the codes
        raise SpecError("adapters are merged into this model", remedy="unmerge, or merge_and_forget them first")
    spec = Spec.parse("storage", dict(storage) if isinstance(storage, Mapping) else storage, where="storage")
    assert isinstance(spec, Storage)
    maps = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, Linear) and m.stored is None and all(role != "head" for role, _ in m.parts)
    }
    for pattern in leave:
        met = fnmatch.filter(maps, pattern)
        if not met:
            raise SpecError(f"{pattern!r} meets no linear map", where="leave", remedy="write a path: blocks.0.mixer.*")
        for path in met:
            del maps[path]
    errors = {}
    for path, place in maps.items():
        before = place.weight.data
        place.keep(spec)
        difference = place.dense().float() - before.float()
        errors[path] = float(difference.norm() / before.float().norm().clamp_min(1e-30))
    return errors
