"""What an adapter's spec is: it finds its places in a built model and stands there under a name."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dovetail.errors import ConfigError, SpecError, did_you_mean
from dovetail.hub.names import has_names, pieces
from dovetail.parts.adaptable import Adaptable, adaptables
from dovetail.parts.weights import Linear, Lookup, Rng, generator
from dovetail.spec import Spec


class PeftConfig:
    """adapter_config.json, every key of which must be taken, be inert, or say nothing."""

    def __init__(self, data: Mapping[str, Any], where: str, names: Iterable[str] = ()):
        self.data, self.where = dict(data), where
        self.names = tuple(names)  # of the stored tensors, without PEFT's prefix
        self.used = set(_INERT)

    def take(self, key: str, default: Any = None) -> Any:
        """The key's value; `default` where it is absent or null. Raises ConfigError for one of another type than that."""
        self.used.add(key)
        value = self.data.get(key)
        if value is None:
            return default
        wanted = _TYPES.get(type(default), object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted == _TYPES[int]):
            raise self.senseless(f"{key}={value!r}")
        return value

    def senseless(self, what: str) -> ConfigError:
        """The error for a value that PEFT cannot have written."""
        return ConfigError(f"{what} makes no sense here", where=self.where, remedy="mend the file, or save it anew")

    def refuse(self, key: str, *unless: Any) -> None:
        """Raises ConfigError when the key says anything but nothing, or one of `unless`."""
        value = self.take(key)
        if value not in (None, False, "", *unless) and value != [] and value != {}:
            raise ConfigError(
                f"{key}={value!r} is not supported here", where=self.where, remedy="merge it with peft first"
            )

    def targets(self) -> tuple[str, ...] | None:
        """target_modules; where it is a pattern, the modules that it met when the adapter was made."""
        said = self.take("target_modules")
        if isinstance(said, str):
            return self.modules()
        if not isinstance(said, list | None) or not all(isinstance(name, str) for name in said or ()):
            raise self.senseless(f"target_modules={said!r}")
        return None if said is None else tuple(said)

    def modules(self) -> tuple[str, ...]:
        """The modules that have stored tensors."""
        split = [re.split(r"\.(?:lora|ia3)_", name, maxsplit=1) for name in self.names]
        return tuple(dict.fromkeys(parts[0] for parts in split if len(parts) > 1))

    def by_module(self, key: str) -> dict[str, Any]:
        """A table of patterns as one of modules in full, by PEFT's rule: the first regular expression that meets the
        end of a name. Raises ConfigError."""
        table = self.take(key, {})
        try:
            ends = {pattern: re.compile(rf"(.*\.)?({pattern})$") for pattern in table}
        except re.error as error:
            raise ConfigError(f"{key}: a pattern is no regular expression: {error}", where=self.where) from None
        met = {name: [p for p, end in ends.items() if end.match(name)] for name in self.modules()}
        return {name: table[patterns[0]] for name, patterns in met.items() if patterns}

    def finish(self) -> None:
        """Raises ConfigError for keys that nobody took and that say something."""
        left = {k: v for k, v in self.data.items() if k not in self.used}
        saying = sorted(k for k, v in left.items() if v not in (None, False, "", 0) and v != [] and v != {})
        if saying:
            raise ConfigError(
                f"unknown keys that say something: {', '.join(f'{k}={left[k]!r}' for k in saying)}",
                where=self.where,
                remedy="merge the adapter into its model with peft, and load that",
            )


_TYPES: dict[type, Any] = {
    bool: (bool, str), int: (int, float), float: (int, float), str: str, list: (list, str), dict: dict,
}  # fmt: skip
_INERT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "ensure_weight_tying", "runtime_config", "megatron_core", "layers_pattern",
}  # fmt: skip


class AdapterSpec(Spec):
    """Base of the adapters.

    `attach` puts the trainable modules in place; the caller has frozen the rest. Whatever it touches beyond places
    (a bias that it trains, a weight that it changes for its start) it undoes in `detach`.
    """

    mergeable: ClassVar[bool] = True  # whether it is a change of weights
    identity: ClassVar[bool] = True  # whether it starts as the model without it
    tuned: ClassVar[float] = 1e-3  # AdamW's peak rate at a model width of 256, by bench/adapter_sweep.py
    peft_type: ClassVar[str | None] = None  # its name in PEFT's adapter_config.json
    peft_prefix: ClassVar[str] = "base_model.model."  # of the names of its tensors there

    @property
    def steady(self) -> bool:
        """Whether every training step runs the same code, so that it can be compiled."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of other adapters that it stands on."""
        return ()

    def rate(self, width: int) -> float:
        """AdamW's peak learning rate where a recipe names none: `tuned`, less in wider models.

        The power of the width is the one that Schulman et al. 2025 (LoRA Without Regret) fitted to Llama models; for
        Qwen they found a tenth of it. Nothing here was measured at other widths.
        """
        return self.tuned * min(1.0, 256 / width) ** 0.78

    def attach(self, model: Any, name: str, seed: int) -> None:
        """Raises SpecError where it finds no place, BuildError where a place cannot take it."""
        raise SpecError(f"{self.kind} does not say where it stands")

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether PEFT's config means this kind, where several share a peft_type."""
        return True

    @classmethod
    def from_peft(cls, config: PeftConfig) -> AdapterSpec:
        """The spec that PEFT's config says, taking every key that it understands. Raises ConfigError."""
        raise ConfigError(f"{cls.kind} is not read from PEFT's layout", where=config.where)

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        """PEFT's config of this adapter, without peft_type. Raises ConfigError for what PEFT has no words for."""
        raise ConfigError(f"PEFT's layout has no words for {self.kind}", remedy='save it with format="dovetail"')

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        """The live parameters (or views of them) under PEFT's names, "base_model.model." left out: to copy both ways."""
        return {}

    def peft_state(self, model: Any, name: str) -> dict[str, Tensor]:
        """What is written in PEFT's layout, where that is another shape than the parameters have."""
        return self.peft_tensors(model, name)

    def penalty(self, model: Any, name: str) -> Tensor | None:
        """What training adds to the loss of every step, a scalar; None for nothing."""
        return None

    def before_step(self, model: Any, name: str, step: int, steps: int) -> None:
        """Called before the first forward of optimiser step `step` (from 1) of `steps`."""

    def after_backward(self, model: Any, name: str, step: int, steps: int) -> None:
        """Called after optimiser step `step` (from 1) of `steps`, before its gradients are dropped."""

    def detach(self, model: Any, name: str) -> None:
        """Takes `name` out of the model again."""
        for _, place in adaptables(model):
            if name in place.attached():
                place.detach(name)


@dataclass(frozen=True)
class Segment:
    """Rows start..stop of a weight. names: what a target may call them. stored: the published layout's own name."""

    start: int
    stop: int
    names: tuple[str, ...]
    stored: str | None = None


@dataclass(frozen=True)
class Site:
    """One place, and the rows of its weight that are meant, in order."""

    path: str
    place: Adaptable
    segments: tuple[Segment, ...]

    @property
    def whole(self) -> bool:
        """All rows are meant."""
        rows = self.place.out_features if isinstance(self.place, Linear) else 0
        return not rows or sum(s.stop - s.start for s in self.segments) == rows


def sites(model: nn.Module, targets: Iterable[str] | None, *, tables: bool = True) -> list[Site]:
    """The places that `targets` name, in the model's order; None means every linear map but the head.

    A target is the end of a dotted path, with * for any part of a step: in our names (`blocks.0.mixer.qkv`, `qkv`,
    `feedforward.*`), with `:query`, `:key`, `:value` or a number for one of several fused maps (`qkv:query`,
    `gate_up:1`), or in the checkpoint's (`q_proj`). A fused weight is taken map by map as the published layout keeps
    them apart (q_proj, k_proj, v_proj), whole where it does not (GPT-2's c_attn). tables: lookup tables may be named.
    Raises SpecError for a target that names nothing, and for rows named twice.
    """
    known = list(places(model))
    if targets is None:
        return [site for site in known if isinstance(site.place, Linear) and "head" not in roles(site.place)]
    found: list[Site] = []
    hit: set[str] = set()
    wanted = tuple(targets)
    for site in known:
        if not tables and not isinstance(site.place, Linear):
            continue
        kept = []
        apart = tuple(target for target in wanted if ":" in target)
        for segment, said in (*((s, wanted) for s in site.segments), *((s, apart) for s in _parts(site))):
            names = [target for target in said if any(matches(target, name) for name in segment.names)]
            hit.update(names)
            if names:
                kept.append(segment)
        kept.sort(key=lambda s: s.start)
        for before, after in itertools.pairwise(kept):
            if after.start < before.stop:
                raise SpecError(f"{before.names[0]} and {after.names[0]} are named, and share rows", where="targets")
        if kept:
            found.append(Site(site.path, site.place, tuple(kept)))
    for target in wanted:
        if target not in hit:
            aliases = pieces(model)[1] if has_names(model) else {}
            tied = next(
                (owner for name, owner in aliases.items() if matches(target, name.removesuffix(".weight"))), None
            )
            if tied is not None:
                raise SpecError(
                    f"the target {target!r} is tied to {tied}: one table is both, and an adapter on one would change both",
                    where="targets",
                    remedy="leave it out, or untie a decoder's head first (surgery.untie)",
                )
            ends = sorted({name.rsplit(".", 1)[-1] for site in known for s in site.segments for name in s.names})
            raise SpecError(
                f"the target {target!r} names no weight of this model",
                where="targets",
                remedy=did_you_mean(target, ends),
            )
    return found


def places(model: nn.Module) -> Iterator[Site]:
    """Every weight and table with all its rows, cut as the published layout keeps them, or into the maps that are fused there."""
    stored: dict[str, list[Any]] = {}
    if has_names(model):
        for piece in pieces(model)[0]:
            stored.setdefault(piece.ours.removesuffix(".weight"), []).append(piece)
    for path, place in adaptables(model):
        cut = [(p.start, p.stop, p.stored.removesuffix(".weight")) for p in stored.get(path, [])]
        if isinstance(place, Linear):
            parts = _spans(path, place)
            segments = [
                Segment(a, b, (path, name, *(own for own, c, d in parts if (c, d) == (a, b))), name)
                for a, b, name in cut
            ]
            yield Site(path, place, tuple(segments or _joined(path, parts)))
        elif isinstance(place, Lookup):
            name = cut[0][2] if cut else None
            yield Site(path, place, (Segment(0, place.num_embeddings, (path, *([name] if name else [])), name),))


def _parts(site: Site) -> list[Segment]:
    """Maps that are fused at a place and are not segments by themselves: only their own names mean them."""
    if not isinstance(site.place, Linear):
        return []
    there = {(s.start, s.stop) for s in site.segments}
    apart: dict[tuple[int, int], list[str]] = {}
    for name, a, b in _spans(site.path, site.place):
        if (a, b) not in there:
            apart.setdefault((a, b), []).append(name)
    return [Segment(a, b, tuple(names)) for (a, b), names in apart.items()]


def _joined(path: str, parts: list[tuple[str, int, int]]) -> list[Segment]:
    spans = dict.fromkeys((a, b) for _, a, b in parts)
    return [Segment(a, b, (path, *(name for name, c, d in parts if (c, d) == (a, b)))) for a, b in spans]


def _spans(path: str, place: Linear) -> list[tuple[str, int, int]]:
    """(name, start, stop) of every fused map, by number and, where that is unique, by role."""
    spans, start = [], 0
    seen = roles(place)
    for number, (role, width) in enumerate(place.parts):
        names = [str(number)] + ([role] if seen.count(role) == 1 else [])
        spans += [(f"{path}:{name}", start, start + width) for name in names]
        start += width
    return spans


def roles(place: Linear) -> list[str]:
    return [role for role, _ in place.parts]


def matches(target: str, name: str) -> bool:
    """Whether the dotted `target` is the end of `name`, step by step, * standing for any part of a step."""
    wanted, steps = target.split("."), name.split(".")
    return len(wanted) <= len(steps) and all(
        fnmatch.fnmatchcase(step, want) for want, step in zip(reversed(wanted), reversed(steps), strict=False)
    )


def rng(seed: int, path: str, name: str) -> Rng:
    """Generators of one adapter at one place: by seed, place and parameter, so that no start depends on another."""
    return lambda parameter: generator(seed, f"{path}.{name}.{parameter}")


def shortest(names: list[str], among: list[str]) -> list[str]:
    """Last steps of dotted `names` that mean exactly them `among` all, or the names in full where none do."""
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    meant = {n for n in among if any(matches(end, n) for end in ends)}
    return ends if meant == set(names) else names
