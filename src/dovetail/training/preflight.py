"""Before a run: what the model will see, whether it fits, and how long it takes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dovetail.adapters import adapt
from dovetail.data import Batches, Sampler
from dovetail.data.rows import IGNORED, Rows, collate
from dovetail.errors import DataError
from dovetail.hub.load import read_config
from dovetail.models import build
from dovetail.spec import entry
from dovetail.training.device import autocast, choose, peak_memory, peak_rate, precision, total_memory
from dovetail.training.flops import parameter_count
from dovetail.training.fp8 import multiply_in_fp8
from dovetail.training.memory import FROZEN, METHODS, Estimate, Method, estimate, remedies, train_flops
from dovetail.training.recipe import Recipe
from dovetail.training.room import Step, Uncounted, Way, look
from dovetail.training.room import choose as choose_way
from dovetail.training.setup import Parts, hub_folder, labelled_sets, load_tokenizer, model_spec, set_up, with_helpers

_SHOWN = 256  # tokens of the first row that are printed
_MFU = 0.4  # what a tuned run reaches; times without a dry run assume it and say so


@dataclass(frozen=True)
class Preflight:
    """What `preflight` found. estimates: full fine-tuning, LoRA and QLoRA with the recipe's batch and length, the last with
    the recipe's storage (NF4 where it has none).

    dry_run: {"seconds", "peak_bytes"} of the longest batch forward and backward, or None when it would not fit. It is not
    compiled, which would take longer than it does, and on a CPU its peak is the whole process's: so it may well be above
    what is counted.
    hours: for the recipe's steps. way: how the step is taken and its peak, counted; None where it cannot be (`uncounted`
    says why) or none leaves room. fits: whether the recipe does, on one device. cut: prompt-completion pairs that are
    longer than a row.
    """

    recipe: Recipe
    parameters: int
    device: str
    estimates: tuple[Estimate, ...]
    advice: tuple[str, ...]
    batch: dict[str, Tensor] | None
    pieces: tuple[str, ...]
    dry_run: dict[str, float] | None
    hours: float
    cut: int = 0
    way: Way | None = None
    room: float = 0.0
    uncounted: str = ""

    @property
    def fits(self) -> bool:
        if self.way is not None:
            return self.way.peak <= self.room
        return next(e for e in self.estimates if e.method == method_of(self.recipe)).fits

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "device": self.device,
            "fits": self.fits,
            "estimates": [
                {
                    "method": e.method,
                    "storage": None if e.storage is None else e.storage.kind,
                    "total_bytes": e.total,
                    "devices": e.devices,
                    "sharded": e.sharded,
                    "each": e.each,
                }
                for e in self.estimates
            ],
            "advice": list(self.advice),
            "labels": None if self.batch is None else int((self.batch["labels"] != IGNORED).sum()),
            "tokens": None if self.batch is None else self.batch["tokens"].numel(),
            "dry_run": self.dry_run,
            "hours": self.hours,
            "pairs_cut": self.cut,
            "step": None if self.way is None else asdict(self.way) | {"peak_bytes": self.way.peak},
            "uncounted": self.uncounted,
        }

    def __rich__(self) -> Group:
        t = self.recipe.train
        parts: list[Any] = (
            [] if self.batch is None else [_coloured(self.batch, self.pieces, _in_place(self.recipe)), ""]
        )
        table = Table("", "one device", "devices", "all devices", box=None, header_style="bold", title_justify="left")
        table.title = f"{self.parameters:,} parameters, {t.batch} x {t.length} tokens a device, {self.device}"
        for e in self.estimates:
            alone = sum(e.sharded.values()) + sum(v for k, v in e.each.items() if k != "gathered blocks")
            style = "green" if e.fits else "red"
            mine = "  (this recipe)" if e.method == method_of(self.recipe) else ""
            table.add_row(
                e.name + mine,
                f"{alone / 1e9:,.2f} GB",
                str(e.devices or "none is enough"),
                f"{e.total / 1e9:,.2f} GB",
                style=style,
            )
        parts.append(table)
        for name, size in self.estimates[0].each.items():
            if name.startswith(FROZEN):
                parts.append(f"among it the objective's {name.removeprefix(FROZEN)}, frozen: {size / 1e9:,.2f} GB")
        if self.way is not None:
            chosen = "chosen" if t.checkpointing == "auto" else "as asked"
            sizes = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in self.way.sizes.items())
            parts.append(f"the step, counted, {chosen}: {self.way} ({sizes})")
        elif self.uncounted or self.fits:
            why = self.uncounted or "no way to take it leaves a tenth of the memory free"
            parts.append(Text(f"the step itself is not counted: {why}; the table goes by the model's parameters"))
        if self.dry_run is not None:
            seconds, peak = self.dry_run["seconds"], self.dry_run["peak_bytes"]
            what = "forward and backward" + (", not compiled" if t.compile else "")
            whose = " of the whole process" if self.device.startswith("cpu") else ""
            parts.append(f"longest batch, {what}: {seconds:.3f} s, peak {peak / 1e9:.2f} GB{whose}")
        how = "from the dry run" if self.dry_run else f"at an assumed MFU of {_MFU:.0%}"
        if t.fp8:
            parts.append(Text(f"products in 8 bits: {', '.join(t.fp8)}"))
        parts.append(f"{t.steps} steps of {t.accumulate} x {t.batch} rows: {_span(self.hours)} ({how})")
        parts.extend(Text(f"does not fit; try {line}", style="yellow") for line in self.advice)
        if self.cut:
            how = f"{self.cut} pairs are longer than a row of {t.length} tokens, and are cut"
            parts.append(Text(how, style="yellow"))
        return Group(*parts)


def preflight(source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | tuple[str, ...] = ()) -> Preflight:
    """Looks before the leap; writes nothing but the cached tokens. The result prints itself with rich.

    Raises UserErrors for what the recipe asks, DataError for a first batch without labels.
    """
    recipe = Recipe.load(source, overrides)
    t = recipe.train
    device = choose(t.device)
    model = _on_paper(recipe)
    room = total_memory(device)
    same: dict[str, Any] = {"batch": t.batch, "length": t.length, "checkpointing": bool(t.checkpointing)}
    same["helpers"] = _helper_bytes(recipe)
    rank = getattr(recipe.adapter, "rank", 16)
    kept: Any = recipe.storage
    estimates = tuple(estimate(model, method, device_bytes=room, rank=rank, storage=kept, **same) for method in METHODS)
    asked = next(e for e in estimates if e.method == method_of(recipe))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = f"{name} with {room / 1e9:,.0f} GB"
    step = _step(recipe, device, sum((same["helpers"] or {}).values()))
    way, why = None, ""
    try:
        way = look(step, device.type, room, t.checkpointing)
    except Uncounted as error:
        why = str(error)
    if not (asked.fits if way is None else way.peak <= room):
        other = None if why else choose_way(step, device.type, room)
        advice = (*([str(other)] if other is not None else []), *remedies(model, asked, **same))
        peak, _ = peak_rate(device, torch.bfloat16)
        work = (
            train_flops(model, asked.method, t.length, float(bool(t.checkpointing)))
            * t.batch
            * t.length
            * t.accumulate
            * t.steps
        )
        hours = work / (peak * _MFU) / 3600
        return Preflight(
            recipe, parameter_count(model), about, estimates, advice, None, (), None, hours, 0, way, room, why
        )
    parts = set_up(recipe)
    rows = parts.rows(parts.train)
    batch: dict[str, Tensor] | None = Batches(rows, Sampler(len(rows), t.seed), t.batch).next()
    check_labels(batch, recipe.objective)
    dry = dry_run(parts, rows)
    pieces: tuple[str, ...] = ()
    if "values" in batch:  # numbers are not shown
        batch = None
    else:
        shown = _written(batch)[
            0, :_SHOWN
        ].tolist()  # ids that the tokenizer does not know (sentinels) by their numbers
        pieces = tuple(parts.tokenizer.decode([i], skip_special=False) or f"<{i}>" for i in shown)
    hours = dry["seconds"] * t.accumulate * t.steps / 3600
    cut = getattr(rows, "cut", 0)
    return Preflight(
        recipe, parameter_count(model), about, estimates, (), batch, pieces, dry, hours, cut, way, room, why
    )


def method_of(recipe: Recipe) -> Method:
    """Which estimate is the recipe's own: adapters other than LoRA are of its size or smaller."""
    if recipe.adapter is None:
        return "full"
    return "lora" if recipe.storage is None else "qlora"


def check_labels(batch: dict[str, Tensor], objective: Any) -> None:
    """Raises DataError for a batch from which nothing can be learnt."""
    empty = [name for name, count in objective.counts(batch).items() if not count]
    if empty:
        raise DataError(
            f"the first batch has no label for {', '.join(empty)}: nothing would be learnt",
            where=f"{len(batch['labels'])} rows",
            remedy="documents of one token have nothing to predict; check the corpus and its field or separator",
        )


def dry_run(parts: Parts, rows: Rows) -> dict[str, float]:
    """Forward and backward of the longest batch, after one to warm up: {"seconds", "peak_bytes"}."""
    t = parts.recipe.train
    objective: Any = with_helpers(parts)
    chosen = precision(t.autocast, parts.device)
    batch = {name: x.to(parts.device) for name, x in collate([rows[rows.longest()]] * t.batch).items()}
    parts.model.train()
    if parts.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parts.device)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with autocast(chosen, parts.device):
            loss = objective(parts.model, batch).total()
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        parts.model.zero_grad(set_to_none=True)
    return {"seconds": seconds, "peak_bytes": float(peak_memory(parts.device))}


def _on_paper(recipe: Recipe) -> Any:
    """The recipe's model on the meta device."""
    if isinstance(recipe.model, dict):
        labelled = labelled_sets(recipe)
        tokenizer: Any = load_tokenizer(recipe) if labelled is None else None
        return build(model_spec(recipe, tokenizer, labelled), weights=False)
    return build(read_config(hub_folder(recipe.model))[0], weights=False)


def _step(recipe: Recipe, device: torch.device, frozen: float) -> Step:
    """The recipe's step on paper. What an adapter leaves alone keeps a checkpoint's dtype where autocast rounds anyway."""
    t, model = recipe.train, _on_paper(recipe)
    rounded = precision(t.autocast, device)
    if recipe.adapter is not None:
        narrow = isinstance(recipe.model, str) and rounded == "bf16"
        model = model.to(torch.bfloat16) if narrow else model
        adapt(model, recipe.adapter)  # type: ignore[arg-type]
    multiply_in_fp8(model, t.fp8, device)
    storage: Any = recipe.storage
    return Step(model, t.batch, t.length, t.accumulate, rounded, t.compile, bool(t.ema), frozen, storage)


def _helper_bytes(recipe: Recipe) -> dict[str, float]:
    """Bytes of the frozen fp32 models that the objective reads, by role. Raises SpecError, ConfigError."""
    objective: Any = recipe.objective
    paths = {role: hub_folder(path) for role, path in objective.helpers().items()}
    return {role: 4.0 * parameter_count(build(read_config(at)[0], weights=False)) for role, at in paths.items()}


def _coloured(batch: dict[str, Tensor], pieces: tuple[str, ...], in_place: bool) -> Text:
    """The first row: green where a token is predicted from those before it (in_place: where what stood there is asked
    for), dim where it is only read."""
    tokens, labels = _written(batch)[0].tolist(), batch["labels"][0].tolist()
    learnt = int((batch["labels"] != IGNORED).sum())
    text = Text(f"first batch: {batch['tokens'].numel()} tokens, {learnt} labels; first row, ")
    text.append("predicted", style="green")
    text.append(" / ")
    text.append("only read", style="dim red")
    text.append("\n")
    for i, piece in enumerate(pieces):
        predicted = labels[i] != IGNORED if in_place else i > 0 and labels[i - 1] == tokens[i]
        text.append(piece, style="green" if predicted else "dim red")
    return text


def _in_place(recipe: Recipe) -> bool:
    """Whether labels stand where their token stood, not beside the one before it."""
    return entry("objective", str(recipe.objective.kind)).capabilities.get("causal") is False


def _written(batch: dict[str, Tensor]) -> Tensor:
    """The side that labels stand beside: an encoder-decoder's own tokens, not what it reads."""
    return batch.get("decoder_tokens", batch["tokens"])


def _span(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"
