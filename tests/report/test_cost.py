"""Bytes by formula, rates in turns, and memory that is really what was taken."""

from __future__ import annotations

from typing import Any

import torch

import dovetail as dt
from dovetail.report.cost import Job, costs, peak, peak_memory, size


def build(mixer: dict[str, Any]) -> Any:
    return dt.build({"kind": "decoder", "vocab": 50, "dim": 32, "depth": 3, "context": 64, "blocks": {"mixer": mixer}})


def test_state_bytes_follow_the_heads() -> None:
    for kv_heads in (4, 2, 1):
        found = size(build({"kind": "attention", "heads": 4, "kv_heads": kv_heads}), 40)
        assert found.state_bytes_per_token == 3 * 2 * kv_heads * 8 * 4
        assert abs(found.state_bytes - 40 * found.state_bytes_per_token) <= found.state_bytes_per_token


def test_windows_and_recurrences_do_not_grow() -> None:
    ring = size(build({"kind": "attention", "heads": 4, "mask": {"kind": "window", "size": 16}}), 40)
    assert ring.state_bytes_per_token == 0
    assert ring.state_bytes <= 17 * 3 * 2 * 32 * 4
    recurrent = size(build({"kind": "lstm"}), 40)
    assert recurrent.state_bytes_per_token == 0 and recurrent.state_bytes > 0


def test_parameters_count_shared_ones_once() -> None:
    spec = {"kind": "decoder", "vocab": 50, "dim": 32, "head": {"kind": "ref", "path": "embedding"}}
    tied, apart = dt.build(spec), dt.build({"kind": "decoder", "vocab": 50, "dim": 32})
    assert size(apart, 8).parameters - size(tied, 8).parameters == 50 * 32
    assert size(tied, 8).flops_per_token == size(apart, 8).flops_per_token


def test_rates_are_medians_with_a_ratio_of_one_to_itself() -> None:
    small, large = (
        build({"kind": "attention", "heads": 4}),
        dt.build(
            {
                "kind": "decoder",
                "vocab": 50,
                "dim": 192,
                "depth": 8,
                "blocks": {"mixer": {"kind": "attention", "heads": 4}},
            }
        ),
    )
    prompt = torch.randint(50, (1, 48))
    jobs = {"small": Job(small, prompt), "same": Job(small, prompt), "large": Job(large, prompt)}
    found = costs(jobs, against=dict.fromkeys(jobs, "small"), new=6, rounds=5)
    speed = {name: cost.speed for name, cost in found.items()}
    assert all(s is not None for s in speed.values())
    assert speed["small"].decode.ratio == 1.0 and speed["same"] == speed["small"]  # type: ignore[union-attr]
    assert speed["small"].prompt == 48 and speed["small"].new == 6  # type: ignore[union-attr]
    assert speed["large"].decode.ratio < 0.9 > speed["large"].prefill.ratio  # type: ignore[union-attr]
    assert costs(jobs, against=dict.fromkeys(jobs, "small"), rounds=0)["small"].speed is None


def test_peak_memory_sees_what_is_taken() -> None:
    size_of = 48 * 2**20
    found = peak(lambda: torch.ones(size_of // 4).sum(), torch.device("cpu"))
    if found.bytes is None:
        assert "not measured" in found.how
        return
    assert 0.9 * size_of < found.bytes < 1.3 * size_of + 8 * 2**20
    assert "resident set" in found.how
    assert peak_memory(build({"kind": "attention", "heads": 4}), torch.randint(50, (1, 8))).bytes is not None
