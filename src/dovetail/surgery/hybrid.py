"""Hybrid window-full attention (HWFA) as changes of a spec: what `dt.swap`, `dt.override` and a recipe's arm take."""

from __future__ import annotations

from typing import Any

from dovetail.errors import SpecError
from dovetail.spec import Spec


def hwfa(spec: Spec, *, window: int | None = None, trained: int | None = None) -> dict[str, Any]:
    """Windows with the positions that there are below, the last layer full without position and with LogN.

    spec: a decoder's. window: tokens seen below, oneself included; unless given the largest whose receptive field
    through all the windows, (window - 1)(depth - 1) + 1, is at most 3/4 of the trained length. trained: that length; the
    spec's context unless given. For training, or healing: an untrained top layer without position knows no order.
    Source: Su 2023, kexue.fm/archives/9603. Raises SpecError for one layer, or no trained length.
    """
    depth, trained = _layers(spec, trained)
    window = window or (max(3 * trained // 4, 1) - 1) // (depth - 1) + 1
    return {
        "blocks.0:-1.mixer.mask": {"kind": "window", "size": window},
        "blocks.-1.mixer.position": {"kind": "logn", "trained": trained, "clip": False, "position": "none"},
    }


def hwfa_rerope(
    spec: Spec, *, window: int | None = None, full: int = 2, far: int | None = None, trained: int | None = None
) -> dict[str, Any]:
    """Windows in most layers; `full` layers, evenly spread, see all their past by ReRoPE, with their rope's options.

    A model is trained with rope in the full layers (these changes without the positions) and gets ReRoPE for longer
    inputs. window: of the others, three times trained / depth unless given. far: ReRoPE's, half the trained length
    unless given.
    Source: Su 2023, kexue.fm/archives/9731 (HWFA2). Raises SpecError for too few layers, or no trained length.
    """
    depth, trained = _layers(spec, trained)
    if not 1 <= full < depth:
        raise SpecError(f"{full} full layers of {depth}", where="blocks", remedy=f"give 1 to {depth - 1}")
    window, far = window or max(3 * trained // depth, 1), far or max(trained // 2, 1)
    chosen = {depth * (i + 1) // (full + 1) for i in range(full)}
    above = {f"blocks.{i}.mixer.position": {"kind": "rerope", "window": far} for i in sorted(chosen)}
    below = {f"blocks.{i}.mixer.mask": {"kind": "window", "size": window} for i in range(depth) if i not in chosen}
    return below | above


def _layers(spec: Any, trained: int | None) -> tuple[int, int]:
    """(depth, trained length)."""
    depth, trained = len(getattr(spec, "blocks", ())), trained or getattr(spec, "context", None)
    if depth < 2:
        raise SpecError(f"HWFA on {depth} layers", where="blocks", remedy="it needs one with a window and one without")
    if trained is None:
        raise SpecError(
            "HWFA needs the trained length", where="the model", remedy="give trained, or the model's context"
        )
    return depth, trained


# name: what makes the changes, and where it is from
ARRANGEMENTS = {
    "hwfa": (hwfa, "Su 2023, kexue.fm/archives/9603 (HWFA)"),
    "hwfa_rerope": (hwfa_rerope, "Su 2023, kexue.fm/archives/9731 (HWFA2, HWFA-ReRoPE)"),
}
