"""Single-stream decoding on CPU against transformers' generate, a LLaMA of 10 M parameters, tokens a second.

The weights are random fp32, the same in both; both decode greedily from the same prompt, and the tokens must agree. The
floor reads every weight matrix once a token at the rate at which this process sums tensors of those sizes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from common import interleaved, main, row
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail as dt
from dovetail.errors import RunError

BENCHMARK = {"threads": 2, "packages": {"transformers": "transformers"}, "minutes": 2}
SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.1,
}  # fmt: skip
PROMPT, NEW, ROUNDS = 32, 128, 21


@cache
def models() -> tuple[Any, Any]:
    """(transformers' model, ours) with equal weights."""
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return peer, dt.load(folder)


def prompt() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))


def theirs(prompt: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    return models()[0].generate(
        prompt, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[:, PROMPT:]


def ours(prompt: torch.Tensor, compile: bool = False) -> Any:
    # The peer bars its eos (2) until min_new_tokens are made; so do we.
    return dt.generate(models()[1], None, prompt, max_new_tokens=NEW, min_new_tokens=NEW, eos=2, compile=compile)


def floor(model: Any) -> float:
    """Tokens a second if a token cost one reading of the matrices and nothing else."""
    weights = [p.detach() for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("embedding")]
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for weight in weights:
            weight.sum()
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def check() -> None:
    """The same tokens. Raises RunError otherwise."""
    for compile in (False, True):
        if not torch.equal(theirs(prompt()), ours(prompt(), compile)):
            raise RunError("the tokens differ from transformers'", where="bench/decode_cpu.py")


def measure() -> Iterator[dict[str, Any]]:
    given = prompt()
    cases = {"eager": lambda: ours(given), "compiled": lambda: ours(given, compile=True)}
    times = interleaved({"theirs": lambda: theirs(given)} | cases, rounds=ROUNDS)
    peers, best = times["theirs"][0], round(floor(models()[1]), 1)
    wanted = {"eager": {"target_ratio": 1.5}, "compiled": {"target_ratio": 3.0}}
    for how in cases:
        mine, spread = times[how]
        yield row(
            f"10M LLaMA B1 {PROMPT}+{NEW}, {torch.get_num_threads()} threads, {how}", "tokens/s", round(NEW / mine, 1),
            round(NEW / peers, 1), "transformers generate fp32", spread=round(NEW * spread / mine**2, 1), floor=best,
            **wanted[how],
        )  # fmt: skip


if __name__ == "__main__":
    main(__file__)
