"""Decoding on one GPU against transformers' generate, plain and with a static cache and CUDA graphs, tokens a second.

The shapes of Llama-3.2-1B (one row) and Llama-3-8B (one row, and 32), bf16, random weights, greedily from prompts of 128
tokens; one process, medians. Rates are of the steps alone: (NEW - 1) tokens over what NEW take more than one. The floor
reads every weight that a step needs, and the keys and values of half the new tokens, at the rate of a copy.

`python bench/decode_gpu.py --profile [CASE ...]` prints where the time of a step goes, kernel by kernel; `--try [CASE ...]`
how fast other ways of compiling are. Both take four layers, which are compiled sooner, and write nothing.
"""

from __future__ import annotations

import gc
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from common import ceilings, main, row
from torch import Tensor

import dovetail as dt
from dovetail.errors import RunError
from dovetail.kernels import linear
from dovetail.kernels.attention import triton
from dovetail.kernels.linear import beside
from dovetail.sampling import Captured, Sampling, captured
from dovetail.sampling.captured import tuned
from dovetail.sampling.decode import Decoding

BENCHMARK = {"device": "cuda", "packages": {"transformers": "transformers"}, "minutes": 5}
DEVICE, DTYPE = "cuda", torch.bfloat16
PROMPT, NEW, ROUNDS, LAYERS = 128, 256, 3, 4  # LAYERS: of a profile
PLAIN, STATIC = "transformers generate", "transformers static cache + CUDA graph"
Run = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """sizes: as transformers names them. targets: rows -> tokens a second."""

    name: str
    sizes: dict[str, Any]
    targets: dict[int, float]


def shape(name: str, targets: dict[int, float], vocab: int, dim: int, hidden: int, layers: int, tied: bool) -> Shape:
    sizes = {
        "vocab_size": vocab, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return Shape(name, sizes, targets)


SHAPES = [
    shape("Llama-3.2-1B", {1: 1000}, 128_256, 2048, 8192, 16, True),
    shape("Llama-3-8B", {1: 225, 32: 5500}, 128_256, 4096, 14_336, 32, False),
]


def ours(sizes: dict[str, Any]) -> Any:
    heads, dim = sizes["num_attention_heads"], sizes["hidden_size"]
    mixer = {"kind": "attention", "heads": heads, "kv_heads": sizes["num_key_value_heads"], "head_dim": dim // heads}
    spec = {
        "kind": "decoder", "vocab": sizes["vocab_size"], "dim": dim, "depth": sizes["num_hidden_layers"],
        "context": sizes["max_position_embeddings"],
        "head": {"kind": "ref", "path": "embedding"} if sizes["tie_word_embeddings"] else {"kind": "linear"},
        "blocks": {"mixer": mixer, "feedforward": {"kind": "glu", "hidden": sizes["intermediate_size"]}},
    }  # fmt: skip
    return dt.build(spec, device=DEVICE, dtype=DTYPE).eval()


def theirs(sizes: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    was = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(was)
    return model


def generated(model: Any, static: bool) -> Run:
    """transformers' generate. static: its cache has a fixed size, and on CUDA it compiles and captures the step itself."""
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    if static and hasattr(model.generation_config, "max_cache_len"):
        options["max_cache_len"] = PROMPT + NEW  # one cache, and one graph, for calls of any length

    def run(prompt: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new, **options)
        return made[:, prompt.shape[1] :]

    return run


def decoded(model: Any, compile: bool) -> Run:
    return lambda prompt, new: dt.generate(model, None, prompt, max_new_tokens=new, compile=compile)


def prompts(rows: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def check(device: str = "") -> None:
    """Two narrow layers with equal weights in fp32: compiled decoding, transformers' and our plain one make the same tokens
    of three rows and of one, prompt after prompt. Raises RunError otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = SHAPES[0].sizes | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                               "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    peer: Any = LlamaForCausalLM(LlamaConfig(**small)).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model = dt.load(folder, device=device or DEVICE)
    peer.to(device or DEVICE)
    for rows in (3, 1):
        for seed in range(2):
            given = torch.randint(0, 512, (rows, 24), generator=torch.Generator().manual_seed(seed)).to(
                device or DEVICE
            )
            expected = generated(peer, static=False)(given, 40)
            for compile in (False, True):
                if not torch.equal(decoded(model, compile)(given, 40), expected):
                    raise RunError(
                        f"{'compiled' if compile else 'plain'} decoding of {rows} rows makes other tokens than transformers",
                        where="bench/decode_gpu.py",
                    )
    torch.compiler.reset()


def seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def timed(run: Run, prompt: Tensor, rounds: int = ROUNDS, warm: int = NEW) -> tuple[float, float, float, float]:
    """(tokens/s of the steps, its spread, tokens/s of the whole call, seconds of the first call). warm: its tokens."""
    first = sum(seconds(lambda: run(prompt, warm), 1))
    seconds(lambda: run(prompt, 8), 1)
    begin = statistics.median(seconds(lambda: run(prompt, 1), 3))
    whole = seconds(lambda: run(prompt, NEW), rounds)
    rates = [len(prompt) * (NEW - 1) / (each - begin) for each in whole]
    return statistics.median(rates), max(rates) - min(rates), len(prompt) * NEW / statistics.median(whole), first


def floor(sizes: dict[str, Any], rows: int, rate: float) -> float:
    """Tokens a second where a step reads its weights and its keys and values at `rate` bytes a second, and nothing else."""
    dim, layers, hidden = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["intermediate_size"]
    keys = dim // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    weights = layers * (2 * dim * dim + 2 * dim * keys + 3 * dim * hidden) + dim * sizes["vocab_size"]
    cache = rows * layers * 2 * keys * (PROMPT + NEW / 2)
    return rows * rate / ((weights + cache) * DTYPE.itemsize)


def measure() -> Iterator[dict[str, Any]]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rate = ceilings(DEVICE).copy_tbs * 1e12
    for each in SHAPES:
        given = {rows: prompts(rows, each.sizes["vocab_size"]) for rows in each.targets}
        mine: dict[int, dict[str, Any]] = {}
        model = ours(each.sizes)
        for rows, target in each.targets.items():
            case = f"{each.name} shape, B{rows}, {PROMPT}+{NEW}"
            with skipped(case):
                found, spread, whole, first = timed(decoded(model, True), given[rows])
                peer = timed(decoded(model, False), given[rows], rounds=1, warm=8)
                mine[rows] = {
                    "case": case, "metric": "tokens/s", "ours": round(found, 1), "spread": round(spread, 1),
                    "floor": round(floor(each.sizes, rows, rate), 1), "target": target, "whole_call": round(whole, 1),
                    "first_call_s": round(first, 1),
                }  # fmt: skip
                yield row(**mine[rows], theirs=round(peer[0], 1), peer="ours, not compiled")
        del model
        freed()
        if not mine:
            continue
        other = theirs(each.sizes)
        for static in (False, True):
            for rows in mine:
                name = STATIC if static else PLAIN
                with skipped(f"{name}, B{rows}"):
                    rounds, warm = (ROUNDS, NEW) if static else (1, 8)
                    peer = timed(generated(other, static), given[rows], rounds, warm)
                    yield row(**mine[rows], theirs=round(peer[0], 1), peer=name, peer_whole_call=round(peer[2], 1))
        del other
        freed()


@contextmanager
def skipped(what: str) -> Iterator[None]:
    """What fails is named with its reason, and the rest goes on."""
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        print(f"skipped: {what}: {type(error).__name__}: {reason}", flush=True)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def freed() -> None:
    gc.collect()
    torch.compiler.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def begun(model: Any, prompt: Tensor, runner: Captured) -> Decoding:
    """Behind the prompt, with the step compiled and, on CUDA, captured."""
    steps = Sampling.of(max_new_tokens=NEW)
    run = Decoding(model, prompt.tolist(), steps, steps=lambda _, given, new: runner.read(given, new))
    for _ in range(8):
        run.step()
    synchronize()
    return run


def profile(each: Shape, rows: int, steps: int = 8) -> None:
    """Prints the kernels of a step by name: microseconds and calls a step."""
    prompt, model = prompts(rows, each.sizes["vocab_size"]), ours(each.sizes)
    runner = Captured(model, rows, PROMPT + NEW)
    begun(model, prompt, runner)
    run = begun(model, prompt, runner)
    alone = statistics.median(seconds(lambda: [run.step() for _ in range(32)], 3)) / 32
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if DEVICE == "cuda" else kinds.CPU]) as seen:
        for _ in range(steps):
            run.step()
        synchronize()
    device = DEVICE == "cuda"
    found = [
        (e.self_device_time_total if device else e.self_cpu_time_total, e.count, e.key) for e in seen.key_averages()
    ]
    busy = sum(t for t, _, _ in found) / steps
    print(f"{each.name} B{rows}: a step {1e6 * alone:.0f} us, of which in kernels {busy:.0f} us", flush=True)
    for spent, count, name in sorted(found, reverse=True)[:40]:
        print(
            f"{spent / steps:9.1f} us  {count / steps:6.1f} calls  {spent / count:7.2f} us each  {name[:110]}",
            flush=True,
        )


def attempts(each: Shape, rows: int) -> None:
    """Prints the microseconds of a step that is compiled in other ways."""
    prompt, model = prompts(rows, each.sizes["vocab_size"]), ours(each.sizes)
    own, usual, tall = triton.OWN, tuned(torch.device(DEVICE), rows), linear.TALL
    inside = captured.stepping
    searched = {"coordinate_descent_tuning": not usual.get("coordinate_descent_tuning", False)}
    searches = "coordinate_descent_tuning"
    without = {option: {k: v for k, v in usual.items() if k != option} for option in usual if option != searches}
    fused = tuple(kind for kind in own if kind != "decode")
    ways: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
        "as it is": (usual, own, "all"),
        "own products, nothing beside them and none early": (usual, own, "bare"),
        "the head's own product alone": (usual, own, "head"),
        f"{searched}": (usual | searched, own, "all"),
        **{f"without {option}": (left, own, "all") for option, left in without.items()},
        "launches overlap": (usual | {"triton.enable_pdl": True}, own, "all"),
        "without split keys": (usual, fused, "all"),
        "without any": ({}, fused, "none"),
    }
    for name, (options, kernels, products) in ways.items():
        with skipped(name):
            triton.OWN, linear.TALL = kernels, 2**31 if products == "none" else tall
            captured.beside = mock.Mock() if products == "bare" else beside
            captured.stepping = inside if products in ("all", "bare") else nullcontext
            start = time.perf_counter()
            runner = Captured(model, rows, PROMPT + NEW, options=options)
            run = begun(model, prompt, runner)
            first = time.perf_counter() - start
            alone = statistics.median(seconds(lambda run=run: [run.step() for _ in range(64)], 3)) / 64
            print(f"{each.name} B{rows}: a step {1e6 * alone:.0f} us, compiled in {first:.0f} s: {name}", flush=True)
        torch.compiler.reset()
    triton.OWN, linear.TALL, captured.beside, captured.stepping = own, tall, beside, inside


def asked(names: Sequence[str]) -> Iterator[tuple[Shape, int]]:
    """The cases by name: 1B, 8B, 8B-32; all of one row unless given."""
    for each in SHAPES:
        for rows in each.targets:
            name = each.name.rpartition("-")[2] + (f"-{rows}" if rows > 1 else "")
            if name in names or (not names and rows == 1):
                yield replace(each, sizes=each.sizes | {"num_hidden_layers": LAYERS}), rows


if __name__ == "__main__":
    flag = next((f for f in ("--profile", "--try") if f in sys.argv), None)
    if flag is None:
        main(__file__)
    else:
        check()
        for chosen in asked(sys.argv[sys.argv.index(flag) + 1 :]):
            (profile if flag == "--profile" else attempts)(*chosen)
            freed()
