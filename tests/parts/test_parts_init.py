"""Inits by their statistics, against torch.nn.init and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import dovetail as dt
from dovetail.spec import Slot, Spec
from oracles import oracle_for

IN, OUT = 512, 256


def draw(part: Any, role: str = "in", shape: tuple[int, int] = (OUT, IN), **slot: Any) -> Tensor:
    weight, rng = torch.empty(shape), torch.Generator().manual_seed(3)
    place = Slot(**({"dim": shape[1], "depth": 6, "head_dim": 16} | slot))
    Spec.parse("init", part).draw(weight, role, shape[1], shape[0], place, rng)  # type: ignore[attr-defined]
    return weight


def near(weight: Tensor, std: float) -> None:
    """Mean 0 and this std, within what chance allows for so many draws (about five sigma)."""
    n = weight.numel()
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(n), f"std {weight.std().item():.5f}, not {std:.5f}"
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)


@oracle_for("init", "normal", "truncated", "gpt2")
def test_plain_schemes() -> None:
    near(draw({"kind": "normal", "std": 0.05}), 0.05)
    cut = draw({"kind": "truncated", "std": 0.05})
    near(cut, 0.05)  # the cut is corrected for
    sigma = 0.05 / 0.8796256610342398
    assert 1.9 * sigma < cut.abs().max() <= 2 * sigma
    near(draw({"kind": "gpt2", "std": 0.02}, "query"), 0.02)
    near(draw({"kind": "gpt2", "std": 0.02}, "residual"), 0.02 / math.sqrt(2 * 6))


@oracle_for("init", "xavier", "he", "lecun")
def test_variance_scaling_is_torchs() -> None:
    peer = torch.empty(OUT, IN)
    for part, fill in [
        ("xavier", torch.nn.init.xavier_uniform_),
        ({"kind": "xavier", "distribution": "normal"}, torch.nn.init.xavier_normal_),
        ("he", torch.nn.init.kaiming_normal_),
        ({"kind": "he", "distribution": "uniform"}, torch.nn.init.kaiming_uniform_),
        ({"kind": "he", "fan": "out"}, lambda w: torch.nn.init.kaiming_normal_(w, mode="fan_out")),
        ("lecun", lambda w: torch.nn.init.kaiming_normal_(w, nonlinearity="linear")),
    ]:
        ours = draw(part)
        near(ours, fill(peer).std().item())
        if "uniform" in fill.__name__:
            assert abs(ours.max() / peer.max() - 1) < 1e-3
    near(draw("lecun"), IN**-0.5)
    near(draw({"kind": "he", "distribution": "truncated"}), math.sqrt(2 / IN))
    near(draw("lecun", "embedding", (1000, 64)), 64**-0.5)


@oracle_for("init", "orthogonal")
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    w = draw({"kind": "orthogonal", "gain": 1.5}, shape=shape)
    gram = w.T @ w if shape[0] >= shape[1] else w @ w.T
    torch.testing.assert_close(gram, 1.5**2 * torch.eye(min(shape)), atol=1e-5, rtol=0)


@oracle_for("init", "t5")
def test_t5_is_transformers() -> None:
    """Every kind of matrix of a T5 v1.1 (untied, gated) against ours by role."""
    config = T5Config(d_model=128, d_kv=16, num_heads=12, d_ff=512, vocab_size=512, num_layers=1,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, initializer_factor=0.7,
                      relative_attention_num_buckets=64)  # fmt: skip
    theirs = T5ForConditionalGeneration(config)
    layer = theirs.encoder.block[0].layer
    part = {"kind": "t5", "factor": 0.7}
    for role, peer in [
        ("query", layer[0].SelfAttention.q.weight),
        ("key", layer[0].SelfAttention.k.weight),
        ("value", layer[0].SelfAttention.v.weight),
        ("residual", layer[0].SelfAttention.o.weight),
        ("in", layer[1].DenseReluDense.wi_0.weight),
        ("residual", layer[1].DenseReluDense.wo.weight),
        ("embedding", theirs.shared.weight),
        ("head", theirs.lm_head.weight),
        ("position", layer[0].SelfAttention.relative_attention_bias.weight),
    ]:
        ours = draw(part, role, tuple(peer.shape), dim=128)
        assert abs(ours.std() / peer.std() - 1) < 8 / math.sqrt(peer.numel()), role


@oracle_for("init", "ntk")
def test_ntk_parametrisation() -> None:
    """Weights of variance 1 and a map that divides by sqrt(fan_in): outputs as LeCun's, gradients fan_in smaller."""
    near(draw("ntk"), 1.0)
    model = dt.build({"kind": "decoder", "vocab": 8, "dim": 32, "depth": 1, "init": {"kind": "ntk", "gain": 2.0}})
    linear = model.blocks[0].mixer.out
    x = torch.randn(5, linear.in_features)
    torch.testing.assert_close(linear(x), 2.0 * x @ linear.weight.T / math.sqrt(linear.in_features))


@oracle_for("init", "mup")
def test_mup_follows_table_8() -> None:
    """At the base width it is the standard parametrisation; widths change what table 8 says, and nothing else."""
    base = Spec.parse("init", {"kind": "mup", "base": 64})
    for width in (64, 256):
        near(draw({"kind": "mup", "base": 64}, "in", (width, width)), width**-0.5)
        near(draw({"kind": "mup", "base": 64}, "head", (1000, width)), 64**-0.5)
        assert base.multiplier("head", width, 1000) == 64 / width  # type: ignore[attr-defined]
        assert base.multiplier("in", width, width) == 1.0  # type: ignore[attr-defined]
        assert base.lr_scale("in", width, width) == 64 / width  # type: ignore[attr-defined]
        assert base.lr_scale("head", width, 1000) == base.lr_scale("embedding", 1000, width) == 1.0  # type: ignore[attr-defined]


def test_mup_keeps_logits_and_hidden_updates_of_one_size() -> None:
    """The coordinate check: after a few Adam steps, outputs move as much in a wide model as in a narrow one."""
    moved = {}
    ids = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(0))
    for kind in ("mup", "normal"):
        for width in (64, 512):
            init = {"kind": "mup", "base": 64} if kind == "mup" else {"kind": "lecun"}
            model = dt.build({"kind": "decoder", "vocab": 32, "dim": width, "depth": 1, "init": init,
                              "blocks": {"mixer": {"kind": "attention", "heads": 4, "scale": 4.0 / width}}})  # fmt: skip
            scheme = model.spec.init
            groups = []
            for m in model.modules():
                for p in m.parameters(recurse=False):
                    role = m.parts[0][0] if hasattr(m, "parts") else getattr(m, "role", "embedding")
                    fans = (p.shape[-1], p.shape[0])
                    groups.append({"params": [p], "lr": 3e-3 * scheme.lr_scale(role, *fans)})
            optimiser = torch.optim.Adam(groups)
            before = model(ids).logits.detach()
            for _ in range(3):
                optimiser.zero_grad()
                logits = model(ids).logits
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
                optimiser.step()
            moved[kind, width] = (model(ids).logits - before).abs().mean().item()
    assert 0.5 < moved["mup", 512] / moved["mup", 64] < 2
    assert moved["normal", 512] / moved["normal", 64] > 2


@oracle_for("init", "scaled")
def test_scaled_and_deepnorms_use_of_it() -> None:
    part = {"kind": "scaled", "base": {"kind": "normal", "std": 0.1}, "gain": 0.25, "roles": ["value", "residual"]}
    near(draw(part, "value"), 0.025)
    near(draw(part, "query"), 0.1)
    model = dt.build({"kind": "decoder", "vocab": 8, "dim": 128, "depth": 4, "init": {"kind": "normal", "std": 0.1},
                      "blocks": {"kind": "deepnorm", "feedforward": "mlp", "mixer": {"kind": "attention"}}})  # fmt: skip
    block, beta = model.blocks[0], (8 * 4) ** -0.25
    q, k, v = block.mixer.qkv.weight.detach().split(128)
    near(q, 0.1)
    near(k, 0.1)
    near(v, 0.1 * beta)
    near(block.mixer.out.weight.detach(), 0.1 * beta)
    near(block.feedforward.up.weight.detach(), 0.1 * beta)
    near(block.feedforward.down.weight.detach(), 0.1 * beta)
    assert block.alpha == (2 * 4) ** 0.25
