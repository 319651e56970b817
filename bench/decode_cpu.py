"""Single-stream decoding on CPU against transformers' generate: one process, interleaved, medians.

    python bench/decode_cpu.py [--rounds 9] [--new 128] [--threads 2] [--out docs/results]

The model is a LLaMA of 10 M parameters with random fp32 weights, the same in both; both decode greedily from the
same prompt, and the tokens must agree. The floor reads every weight matrix once a token at the rate at which this
process sums tensors of those sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import interleaved, row, write

import dovetail as dt

SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.1,
}  # fmt: skip
PROMPT, TARGET = 32, 1.5


def models() -> tuple[Any, Any]:
    """(transformers' model, ours) with equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return peer, dt.load(folder)


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


def measure(rounds: int, new: int) -> dict[str, Any]:
    """The result row, tokens/s. Raises SystemExit if the tokens differ: the times would compare different work."""
    peer, model = models()
    prompt = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT))

    def theirs() -> torch.Tensor:
        mask = torch.ones_like(prompt)
        return peer.generate(
            prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )[:, PROMPT:]

    def ours() -> torch.Tensor:
        # The peer bars its eos (2) until min_new_tokens are made; so do we.
        return dt.generate(model, None, prompt, max_new_tokens=new, min_new_tokens=new, eos=2)

    if not torch.equal(theirs(), ours()):
        raise SystemExit("the tokens differ from transformers'")
    times = interleaved({"theirs": theirs, "ours": ours}, rounds=rounds)
    (mine, spread), (peers, _) = times["ours"], times["theirs"]
    return row(
        f"10M LLaMA B1 {PROMPT}+{new}, {torch.get_num_threads()} threads", "tokens/s", round(new / mine, 1),
        round(new / peers, 1), "transformers generate fp32", spread=round(spread / mine, 3),
        floor=round(floor(model), 1), target=round(TARGET * new / peers, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for decode_cpu.json; nothing is written without it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result = measure(given.rounds, given.new)
    print(result)
    if given.out:
        write("decode_cpu", [result], f"python {' '.join(['bench/decode_cpu.py', *sys.argv[1:]])}", given.out)


if __name__ == "__main__":
    main()
