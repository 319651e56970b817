"""One model, many adapters: put on, taken off, chosen, routed, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dovetail.adapters.base import AdapterSpec
from dovetail.errors import BuildError, SpecError, UserError, did_you_mean
from dovetail.parts.adaptable import ADAPTERS, adaptables, of_adapter
from dovetail.spec import Spec


def adapt(model: Any, adapter: AdapterSpec | Mapping[str, Any] | str, *, name: str = "default", seed: int = 0) -> Any:
    """Freezes `model` and puts an adapter on it, active and trainable, in place; returns the model.

    adapter: a spec, a mapping with `kind`, or a kind's name. Others that are there stay, active and frozen.
    seed: of its random start, with the place's path. Raises SpecError, BuildError for places that it cannot take.
    """
    spec = Spec.parse("adapter", dict(adapter) if isinstance(adapter, Mapping) else adapter, where="adapter")
    assert isinstance(spec, AdapterSpec)
    held = adapters(model)
    if name in held:
        raise SpecError(f"an adapter {name!r} is there already", remedy="give the new one another name")
    if not name or "." in name:
        raise SpecError(f"{name!r} cannot name an adapter", remedy="use letters, digits, - and _")
    _not_merged(model)
    _not_routed(model)
    learning = list(trainable(model).values())
    model.requires_grad_(False)
    try:
        spec.attach(model, name, seed)
    except Exception:
        spec.detach(model, name)
        for parameter in learning:
            parameter.requires_grad_(True)
        raise
    model.adapters_held = {**held, name: spec}
    use(model, *active(model), name)
    return model


def adapters(model: Any) -> dict[str, AdapterSpec]:
    """Name -> spec of every adapter on the model, in the order they came."""
    return dict(getattr(model, "adapters_held", {}))


def active(model: Any) -> tuple[str, ...]:
    """Names of the adapters in use, the innermost first."""
    return tuple(getattr(model, "adapters_active", ()))


def use(model: Any, *names: str) -> None:
    """These adapters and no others, one around the other in this order. Raises UserError for a name not there or there
    twice, and while rows are routed."""
    _known(model, names)
    _once(names)
    _not_merged(model)
    _not_routed(model)
    model.adapters_active = names
    for _, place in adaptables(model):
        there = place.attached()
        place.active = tuple(n for n in names if n in there)


@contextmanager
def off(model: Any) -> Iterator[None]:
    """Inside, the model as it is without adapters (a reference policy), routed rows too."""
    _not_merged(model)
    with _as_before(model):
        for _, place in adaptables(model):
            place.active, place.routes = (), ()
        model.adapters_active = ()
        yield


@contextmanager
def route(model: Any, rows: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Inside, every row of the batch goes through the adapters that it names (None: none), in one pass.

    One inside another takes its place until it ends. Raises UserError for names that are not there or twice in a row,
    BuildError for adapters that do not work row by row.
    """
    chosen = [(r,) if isinstance(r, str) else tuple(r or ()) for r in rows]
    _known(model, [name for names in chosen for name in names])
    for names in chosen:
        _once(names)
    _not_merged(model)
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, names in enumerate(chosen):
        groups.setdefault(names, []).append(row)
    device = next(model.parameters()).device
    indices = {names: torch.tensor(found, device=device) for names, found in groups.items()}
    with _as_before(model):
        for _, place in adaptables(model):
            there = place.attached()
            named = any(name in there for names in groups for name in names)
            ways = tuple((tuple(n for n in names if n in there), at) for names, at in indices.items())
            place.active, place.routes = (), ways if named else ()
        model.adapters_routed = True
        yield


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Afterwards everything goes the ways that it went before, less what was removed meanwhile."""
    was, open_route, names = [(p, p.active, p.routes) for _, p in adaptables(model)], _routed(model), active(model)
    try:
        yield
    finally:
        if getattr(model, "merged_over", None) is None:  # what was merged inside is in the weights, until unmerged
            for place, own, ways in was:
                place.active, place.routes = tuple(n for n in own if n in place.attached()), ways
            model.adapters_active = tuple(n for n in names if n in adapters(model))
        model.adapters_routed = open_route


def remove(model: Any, name: str = "default") -> Any:
    """Takes an adapter off; with the last one gone the model is as it was, frozen. Returns the model."""
    _known(model, [name])
    _not_merged(model)
    _not_routed(model)
    for other, spec in adapters(model).items():
        if name in spec.needs:
            raise UserError(f"the adapter {other!r} stands on {name!r}", remedy=f"remove {other!r} first")
    adapters(model)[name].detach(model, name)
    model.adapters_held = {n: spec for n, spec in adapters(model).items() if n != name}
    use(model, *(n for n in active(model) if n != name))
    return model


@torch.no_grad()
def merge(model: Any) -> Any:
    """The active adapters into the weights they stand around, which then run at the model's own speed; in place.

    Sums are taken in fp32 and rounded once to the weight's dtype; codes of a quantised weight are dequantised first,
    and it stays dense while merged. The weights as they were are kept aside, so that `unmerge` restores their bits.
    Raises UserError for nothing to merge and while rows are routed, BuildError for adapters that are no change of a
    weight; the model is then as it was.
    """
    _not_merged(model)
    _not_routed(model)
    if not active(model):
        raise UserError("no adapter is active", remedy="adapt the model, or name one with use")
    _all_mergeable(model)
    found: list[tuple[str, Any, Tensor, Tensor | None]] = []
    for path, place in adaptables(model):
        if place.active:
            one: Any = place
            base = one.weight if getattr(one, "stored", None) is None else one.stored.dense()
            found.append((path, one, *one.effective(base, getattr(one, "bias", None))))
    kept: dict[str, tuple[Any, Any, Any]] = {}
    for path, place, weight, new_bias in found:  # nothing has changed if one of them could not be had
        stored, bias = getattr(place, "stored", None), getattr(place, "bias", None)
        kept[path] = (place.weight, bias, stored)
        place.weight = nn.Parameter(weight, requires_grad=False)
        if new_bias is not bias:
            place.bias = None if new_bias is None else nn.Parameter(new_bias, requires_grad=False)
        if stored is not None:
            place.stored = None
        place.active = ()
    model.merged_over = kept
    return model


def unmerge(model: Any) -> Any:
    """The weights as they were before `merge`, bit for bit, and the adapters active again; in place.

    They follow the model to another device or dtype that it went to meanwhile.
    """
    kept = getattr(model, "merged_over", None)
    if kept is None:
        raise UserError("nothing is merged")
    for path, (weight, bias, stored) in kept.items():
        place = model.get_submodule(path)
        now, here = cast(Any, (place.weight, getattr(place, "bias", None)))
        for own, merged in ((weight, now), (bias, here)):
            if own is not None:
                own.data = own.data.to(merged.device, merged.dtype)
        place.weight = weight
        if hasattr(place, "bias"):
            place.bias = bias
        if stored is not None:
            place.stored = stored.to(now.device, now.dtype)
    del model.merged_over
    use(model, *active(model))
    return model


def merge_and_forget(model: Any) -> Any:
    """`merge`, and the adapters and what was kept are gone: a plain model, ready to be saved. Returns the model.

    Raises BuildError, the adapters still there, where a map got a bias for which the model's spec has no words.
    """
    merge(model)
    new = [path for path, kept in model.merged_over.items() if kept[1] is None and _bias(model, path) is not None]
    if new:
        unmerge(model)
        raise BuildError(
            f"merging gives {new[0]} a bias, and the model's spec says that it has none",
            remedy="keep the adapter beside the model: save_adapter, load_adapter; merge alone runs at full speed",
        )
    del model.merged_over
    for name in list(adapters(model)):
        adapters(model)[name].detach(model, name)
    model.adapters_held, model.adapters_active = {}, ()
    return model


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter of what trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training(model: Any) -> tuple[str, ...]:
    """Names of the active adapters that learn; others stand frozen beside them."""
    learn = {step for path in trainable(model) for step in path.partition(f".{ADAPTERS}.")[2].split(".")[:1]}
    return tuple(name for name in active(model) if name in learn)


def penalty(model: Any) -> Tensor | None:
    """What the adapters that train add to the loss of a step, or None."""
    held = adapters(model)
    shares = [share for name in training(model) if (share := held[name].penalty(model, name)) is not None]
    return torch.stack(shares).sum() if shares else None


def before_step(model: Any, step: int, steps: int) -> None:
    """Tells the adapters that train that optimiser step `step` (from 1) of `steps` begins."""
    held = adapters(model)
    for name in training(model):
        held[name].before_step(model, name, step, steps)


def after_backward(model: Any, step: int, steps: int) -> None:
    """Tells the adapters that train that optimiser step `step` (from 1) of `steps` is done; gradients are still there."""
    held = adapters(model)
    for name in training(model):
        held[name].after_backward(model, name, step, steps)


def reads_gradients(model: Any) -> bool:
    """Whether one of the adapters that train may look at gradients once the optimiser has stepped."""
    held = adapters(model)
    return any(type(held[name]).after_backward is not AdapterSpec.after_backward for name in training(model))


def learned(model: Any) -> dict[str, Tensor]:
    """All that training changes, by name: trainable parameters, and what adapters keep beside theirs."""
    state = model.state_dict(keep_vars=True)
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: t for name, t in state.items() if name in chosen or (of_adapter(name) and not _is_parameter(t))}


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter of the model without its adapters."""
    return {name: p for name, p in model.named_parameters() if not of_adapter(name)}


def _bias(model: Any, path: str) -> Tensor | None:
    return getattr(model.get_submodule(path), "bias", None)


def _known(model: Any, names: Sequence[str]) -> None:
    held = adapters(model)
    for name in names:
        if name not in held:
            raise UserError(
                f"no adapter {name!r} on this model", remedy=did_you_mean(name, held) if held else "adapt it first"
            )


def _not_merged(model: Any) -> None:
    if getattr(model, "merged_over", None) is not None:
        raise UserError("adapters are merged into this model", remedy="unmerge it first")


def _routed(model: Any) -> bool:
    """Whether a route is open, be all of it off."""
    return getattr(model, "adapters_routed", False)


def _not_routed(model: Any) -> None:
    if _routed(model):
        raise UserError("rows are routed to adapters for now", remedy="do it outside of route")


def _once(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the adapter {name!r} is named twice", remedy="name every adapter once")


def _all_mergeable(model: Any) -> None:
    """Refuses before anything is changed."""
    specs = adapters(model)
    for name in active(model):
        if not getattr(specs[name], "mergeable", True):
            raise BuildError(
                f"the {specs[name].kind} adapter {name!r} is not a change of weights and cannot be merged",
                remedy="keep it beside the model: save_adapter, load_adapter",
            )


def _is_parameter(t: Tensor) -> bool:
    return isinstance(t, nn.Parameter)
