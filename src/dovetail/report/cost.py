"""What a model costs: parameters, operations, bytes of state, tokens per second, peak memory. Measured, not declared."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import BuildError
from dovetail.models.build import is_causal
from dovetail.parts.storage.base import Stored
from dovetail.report.measure import device_of, dtype_of, evaluating
from dovetail.sampling.limits import table
from dovetail.training.flops import flops_per_token, parameter_count

_TURN = 0.02  # seconds
_LEAST = 3  # rounds


@dataclass(frozen=True)
class Size:
    """length: tokens in play, for which the rest is said. parameters: scalars, shared ones once. weight_bytes: theirs,
    as codes where they are kept so.

    flops_per_token: forward, averaged over a row of `length`. state_bytes: what decoding remembers of `length` tokens
    of one row. state_bytes_per_token: growth of that per further token (0 for windows and recurrences).
    dtype: of the weights and of that state (what a recurrence must keep in fp32 is counted as fp32).
    """

    length: int
    parameters: int
    weight_bytes: int
    flops_per_token: float
    state_bytes: int
    state_bytes_per_token: float
    dtype: str


@dataclass(frozen=True)
class Rate:
    """tokens/s: median over rounds. ratio: median over rounds of this rate by that of the model it is set against, in
    the same round (1 for itself). spread, ratio_spread: half the distance between the quartiles of each."""

    tokens_per_second: float
    spread: float
    ratio: float
    ratio_spread: float
    rounds: int


@dataclass(frozen=True)
class Speed:
    """prompt: tokens read at once (prefill). new: tokens then made one by one (decode), batch 1."""

    prompt: int
    new: int
    prefill: Rate
    decode: Rate


@dataclass(frozen=True)
class Memory:
    """Bytes above what was there before, at the highest point; None where it cannot be read. how: what was read."""

    bytes: int | None
    how: str


def size(model: Any, length: int) -> Size:
    """Counts and bytes of one model at `length` tokens."""
    limit = table(model.spec)
    other = 2 * length if limit is None or 2 * length <= limit else length // 2  # a learned table ends somewhere
    here, there = (model.new_state(1, n).nbytes() for n in (length, other))
    return Size(
        length,
        parameter_count(model),
        sum(p.nbytes for p in model.parameters())
        + sum(codes.nbytes for m in model.modules() if isinstance(m, Stored) for codes in m.buffers()),
        flops_per_token(model, length),
        here,
        (there - here) / (other - length),
        dtype_of(model),
    )


def state_bytes(model: Any, length: int) -> int | None:
    """What decoding remembers of `length` tokens of one row; None for a model that does not decode."""
    if not is_causal(model) or not hasattr(model, "new_state"):
        return None
    try:
        return model.new_state(1, length).nbytes()
    except BuildError:  # a part that reads whole rows alone
        return None


@dataclass(frozen=True)
class Cost:
    """All of it; speed and memory are None where they were not measured."""

    size: Size
    speed: Speed | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class Job:
    """A model and the prompt (1,T) that it is timed on. timed: the copy of it that is run, where it is not itself."""

    model: Any
    prompt: Tensor
    timed: Any = None

    @property
    def runs(self) -> Any:
        """What is run."""
        return self.model if self.timed is None else self.timed


def costs(
    jobs: Mapping[str, Job], *, against: Mapping[str, str], new: int = 32, rounds: int = 7, seconds: float = 30.0
) -> dict[str, Cost]:
    """Everything about each job, at the length of its prompt.

    Jobs of equal spec, length and bytes of weights are measured once. against: for each job, the one that its ratios refer to.
    rounds: 0 leaves speed and memory out. seconds: see `measured_rates`. Where a job has a learned position table, all
    prompts are timed no longer than leaves `new` tokens room in it (at most half of it). Raises RunError and BuildError as decoding does.
    """
    first: dict[tuple[str, Size], str] = {}
    every = {name: size(job.model, job.prompt.shape[1]) for name, job in jobs.items()}
    same = {name: first.setdefault((str(job.model.spec.to_dict()), every[name]), name) for name, job in jobs.items()}
    apart = {name: jobs[name] for name in dict.fromkeys(same.values())}
    sizes = {name: every[name] for name in apart}
    if not rounds:
        return {name: Cost(sizes[same[name]]) for name in jobs}
    tables = [rows for job in apart.values() if (rows := table(job.model.spec)) is not None]
    if tables:
        new = min(new, max(1, min(tables) // 2))
        apart = {name: replace(job, prompt=job.prompt[:, : min(tables) - new]) for name, job in apart.items()}
    rates = measured_rates(apart, new, rounds, seconds)
    memory = {name: peak_memory(job.runs, job.prompt) for name, job in apart.items()}
    out = {}
    for name in jobs:
        prefill, decode = (_rate(a, b) for a, b in zip(rates[same[name]], rates[same[against[name]]], strict=True))
        speed = Speed(apart[same[name]].prompt.shape[1], new, prefill, decode)
        out[name] = Cost(sizes[same[name]], speed, memory[same[name]])
    return out


def measured_rates(
    jobs: Mapping[str, Job], new: int, rounds: int, seconds: float
) -> dict[str, tuple[list[float], list[float]]]:
    """Tokens/s of prefill and decode of each job in each round, measured in turns in this process.

    Every round gives every job one turn, beginning with another one each time, after one turn that does not count.
    A turn repeats a short job for about 20 ms. Decoding is greedy, batch 1, eager. No round begins after `seconds`,
    once there were three.
    """
    names = list(jobs)
    for name in names:
        _time(jobs[name], new)
    repeats = {name: max(1, min(20, round(_TURN / sum(_time(jobs[name], new))))) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST and time.perf_counter() - begin > seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            took = [_time(jobs[name], new) for _ in range(repeats[name])]
            times[name].append((sum(t for t, _ in took) / len(took), sum(t for _, t in took) / len(took)))
    return {
        name: ([job.prompt.shape[1] / t for t, _ in times[name]], [new / t for _, t in times[name]])
        for name, job in jobs.items()
    }


def peak_memory(model: Any, prompt: Tensor) -> Memory:
    """Memory of one prefill of `prompt` (B,T) with its state and last logits, above the weights."""
    device = device_of(model)
    with evaluating(model):
        _prefill(model, prompt.to(device), 0)  # what is allocated once and kept
        return peak(lambda: _prefill(model, prompt.to(device), 0), device)


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    import dovetail

    return {"dovetail": dovetail.__version__, "torch": torch.__version__, "python": platform.python_version()}


@torch.inference_mode()
def _prefill(model: Any, prompt: Tensor, new: int) -> tuple[Any, Tensor]:
    state = model.new_state(prompt.shape[0], prompt.shape[1] + new)
    h = model(prompt, state=state, logits=False).last_hidden_state
    return state, model.head(h[:, -1:]).argmax(-1)


@torch.inference_mode()
def _time(job: Job, new: int) -> tuple[float, float]:
    """Seconds of the prefill and of `new` steps after it."""
    model = job.runs
    device = device_of(model)
    prompt = job.prompt.to(device)
    with evaluating(model):
        _wait(device)
        begin = time.perf_counter()
        state, token = _prefill(model, prompt, new)
        _wait(device)
        middle = time.perf_counter()
        for _ in range(new):
            token = model(token, state=state).logits.argmax(-1)
        _wait(device)
        return middle - begin, time.perf_counter() - middle


def _rate(rates: list[float], others: list[float]) -> Rate:
    ratios = [a / b for a, b in zip(rates, others, strict=True)]
    return Rate(statistics.median(rates), _spread(rates), statistics.median(ratios), _spread(ratios), len(rates))


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(run: Callable[[], object], device: torch.device) -> Memory:
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return Memory(torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated, less before")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed pages that glibc still holds would hide what is taken next
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: begins a new high-water mark
        before = _status("VmRSS")
        run()
        return Memory(max(0, _status("VmHWM") - before), "resident set: high-water mark (VmHWM), less before")
    except OSError:
        return Memory(None, "not measured: this system keeps no resident-set high-water mark that can be reset")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(key)
    return int(found[1]) * 1024
