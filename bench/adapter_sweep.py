"""Every kind of adapter at several learning rates on one small task: what it reaches, what it trains, what it costs.

    python bench/adapter_sweep.py TEXT [--model assets/pydoc-llama] [--steps 60] [--seeds 1] [--out docs/results]

TEXT: a plain text unlike what the model was trained on (tinyshakespeare); its last tenth is held out. The rates that
win stand as `lr` in each adapter's file, and training takes them where a recipe says no rate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write

from dovetail.training import fit

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
KINDS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"kind": "lora", "rank": 8},
    "dora": {"kind": "dora", "rank": 8},
    "adalora": {"kind": "adalora", "rank": 8},
    "ia3": {"kind": "ia3"},
    "bitfit": {"kind": "bitfit", "add": True},
    "bottleneck": {"kind": "bottleneck", "width": 16},
    "prefix": {"kind": "prefix", "length": 16},
    "prefix, reparametrised": {"kind": "prefix", "length": 16, "hidden": 128},
    "prompt": {"kind": "prompt", "length": 16},
    "p_tuning": {"kind": "p_tuning", "length": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="assets/pydoc-llama")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, part in (("train", text[:cut]), ("held_out", text[cut : cut + 60_000])):
            (root / f"{name}.txt").write_text(part, encoding="utf-8")
        for kind, spec in KINDS.items():
            if given.only and kind not in given.only:
                continue
            for rate in RATES:
                for seed in range(given.seeds):
                    recipe = {
                        "model": given.model,
                        "data": {n: {"kind": "text", "path": str(root / f"{n}.txt")} for n in ("train", "held_out")}
                        | {"cache": str(root / "cache")},
                        "train": {
                            "steps": given.steps, "batch": given.batch, "length": given.length, "lr": rate, "seed": seed,
                            "warmup": given.steps // 10, "weight_decay": 0.0, "eval_batches": 12, "device": given.device,
                        },
                        "out": str(root / "run" / f"{kind}-{rate}-{seed}"),
                    }  # fmt: skip
                    if spec is not None:
                        recipe["adapter"] = spec
                    try:
                        result = fit(recipe, progress=False)
                    except Exception as error:
                        print(f"{kind} at {rate}: {str(error).splitlines()[0]}", flush=True)
                        continue
                    assert result.held_out is not None
                    row = {"nats": result.held_out["nats"], "trainable": result.trainable, "rate": result.tokens_per_s}
                    found.setdefault(kind, {}).setdefault(rate, []).append(row)
                    print(kind, rate, seed, json.dumps(row), flush=True)
            _write(found, given)


def _write(found: dict[str, dict[float, list[dict[str, Any]]]], given: Any) -> None:
    rows = []
    for kind, rates in found.items():
        means = {rate: sum(r["nats"] for r in runs) / len(runs) for rate, runs in rates.items()}
        best = min(means, key=means.__getitem__)
        runs = rates[best]
        rows.append(
            {
                "case": kind, "metric": "nats/token", "ours": round(means[best], 4), "lr": best, "seeds": len(runs),
                "spread": round(max(r["nats"] for r in runs) - min(r["nats"] for r in runs), 4),
                "trainable": runs[0]["trainable"], "peer": "full fine-tuning",
                "by_rate": {f"{rate:g}": round(nats, 4) for rate, nats in means.items()},
            }
        )  # fmt: skip
    full = next((r["ours"] for r in rows if r["case"] == "full"), None)
    for r in rows:
        r["theirs"] = full if full is not None else float("nan")
        r["ratio"] = round(r["theirs"] / r["ours"], 3)
    if given.out:
        write("adapter_sweep", rows, f"python {' '.join(['bench/adapter_sweep.py', *sys.argv[1:]])}", given.out)


if __name__ == "__main__":
    main()
