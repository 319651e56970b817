"""Bottleneck adapters, AdapterDrop and AdapterFusion against their formulas, in fp64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import promises
import pytest
import torch
from promises import TOKENS
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import dovetail as dt
from dovetail.adapters import active, adapt, adapters, load_adapter, off, remove, route, save_adapter, trainable, use
from dovetail.adapters.bottleneck import branches, drop_lower
from dovetail.errors import CheckpointError, ConfigError, SpecError, UserError
from dovetail.parts.context import Context
from models import peers
from oracles import oracle_for

HOULSBY: dict[str, Any] = {"kind": "bottleneck", "width": 5, "activation": "gelu"}
PARALLEL: dict[str, Any] = {"kind": "bottleneck", "places": ["feedforward"], "how": "beside", "scale": 4.0, "width": 5}


def by_hand(adapter: Any, h: Tensor, act: Any, scale: float = 1.0, norm: Any = None) -> Tensor:
    """s·(W_up act(W_down n(h) + b_down) + b_up), with torch alone."""
    w = {name: p.double() for name, p in adapter.named_parameters()}
    h = h if norm is None else norm(h, w)
    return scale * (act(h @ w["down"].T + w["down_bias"]) @ w["up"].T + w["up_bias"])


def layer_norm(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]


@oracle_for("adapter", "bottleneck")
@pytest.mark.parametrize("block", ["pre", "post", "parallel", "sandwich"])
@pytest.mark.parametrize("spec", [HOULSBY, PARALLEL, PARALLEL | {"places": ["mixer", "feedforward"], "norm": "layer"}])
def test_blocks_equal_the_formula(block: str, spec: dict[str, Any]) -> None:
    """Houlsby et al. 2019, figure 2 and He et al. 2022, table 1, in every arrangement of a block."""
    model = promises.decoder(kind=block)
    adapt(model, spec, name="a")
    promises.shake(model, "a")
    model.double()  # the adapters too: a norm of theirs computes in their dtype
    b, x = model.blocks[1], torch.randn(2, 6, 16, dtype=torch.float64)
    ctx = Context.of(2, 6, x.device)
    act = F.gelu if spec is HOULSBY else F.relu

    def branch(name: str, h: Tensor) -> Tensor:
        y = b.mixer(h, ctx) if name == "mixer" else b.feedforward(h)
        there = b.places[name].attached()
        assert ("a" in there) == (name in spec.get("places", ["mixer", "feedforward"]))
        read = h if spec.get("how") == "beside" else y
        norm = layer_norm if "norm" in spec else None
        return y + by_hand(there["a"], read, act, spec.get("scale", 1.0), norm) if there else y

    if block == "parallel":
        want = x + branch("mixer", b.norm_mixer(x)) + branch("feedforward", b.norm_feedforward(x))
    else:
        want = x
        for name in ("mixer", "feedforward"):
            norm = getattr(b, f"norm_{name}")
            if block == "post":
                want = norm(want + branch(name, want))
            elif block == "sandwich":
                want = want + getattr(b, f"after_{name}")(branch(name, norm(want)))
            else:
                want = want + branch(name, norm(want))
    torch.testing.assert_close(b(x, ctx), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", [HOULSBY, PARALLEL | {"norm": "rms", "activation": "prelu"}])
def test_promises(spec: dict[str, Any], tmp_path: Path) -> None:
    promises.check(promises.decoder(), spec, tmp_path, compiled=spec is not HOULSBY)


def test_starts() -> None:
    """Two places a layer start apart from each other, as the seed says; Houlsby's start is near the model."""
    model = promises.decoder()
    plain = model(TOKENS).logits.detach()
    adapt(model, HOULSBY | {"start": "near"}, name="a", seed=3)
    weights = {n: p.detach().clone() for n, p in trainable(model).items()}
    matrices = torch.cat([p.flatten() for p in weights.values() if p.dim() == 2])
    assert matrices.abs().max() <= 0.02 and 0.0075 < matrices.std() < 0.01  # a normal of 0.01 cut at two deviations
    assert not any(p.any() for n, p in weights.items() if n.endswith("_bias"))
    assert 0 < (model(TOKENS).logits - plain).abs().max() < 1e-2 * plain.abs().max()
    remove(model, "a")
    adapt(model, HOULSBY | {"start": "near"}, name="a", seed=3)
    assert all(torch.equal(p, weights[n]) for n, p in trainable(model).items())
    downs = [p for n, p in weights.items() if n.endswith(".down")]
    assert len(downs) == 4 and len({float(p.sum()) for p in downs}) == 4
    remove(model, "a")
    adapt(model, {"kind": "bottleneck", "reduction": 4})
    assert {p.shape for n, p in trainable(model).items() if n.endswith(".down")} == {(4, 16)}


def test_reversible_stacks() -> None:
    """The backward that recomputes finds the adapters' gradients too."""
    spec = {
        "kind": "decoder", "vocab": 31, "dim": 16, "depth": 2, "streams": 2,
        "blocks": {"kind": "reversible", "mixer": {"kind": "attention", "heads": 4}},
    }  # fmt: skip
    model = peers.randomise(dt.build(spec)).double()
    adapt(model, HOULSBY, name="a")
    promises.shake(model, "a")
    got = promises.grads(model)
    ctx = Context.of(2, 11, TOKENS.device)
    x = model.embed(model.embedding(TOKENS), ctx)
    x = torch.cat([x, x], -1)
    for block in model.blocks:
        x = block(x, ctx)
    weight = torch.randn(2, 11, 31, generator=torch.Generator().manual_seed(1))
    (model.head(model.norm(x)) * weight).sum().backward()
    for name, p in trainable(model).items():
        assert p.grad is not None
        peers.close(got[name], p.grad, 1e-6, name)


def test_encoder_decoder_and_its_cross_branch() -> None:
    """All three branches of both sides; decoding step by step from an encoded source; rows routed."""
    attention = {"kind": "attention", "heads": 4, "position": "none"}
    side = {"kind": "stack", "depth": 2, "norm": None}
    spec = {
        "kind": "encoder_decoder", "vocab": 31, "dim": 16,
        "encoder": side | {"blocks": {"kind": "post", "mixer": attention, "norm": "layer"}},
        "decoder": side | {"blocks": {"kind": "post", "mixer": attention, "cross": attention, "norm": "layer"}},
    }  # fmt: skip
    model = peers.randomise(dt.build(spec)).eval()
    target = TOKENS[:, :7]
    with torch.no_grad():
        plain = model(TOKENS, target).logits
        adapt(model, HOULSBY | {"places": ["mixer", "cross", "feedforward"]}, name="a")
        assert len(list(branches(model))) == 10 and len(trainable(model)) == 40
        assert torch.equal(model(TOKENS, target).logits, plain)
        promises.shake(model, "a")
        adapted = model(TOKENS, target).logits
        for rows in (["a", "a"], ["a", None]):
            state = model.new_state(2, 7)
            with route(model, rows):
                model.encode(TOKENS, state=state)
                steps = [model.decode(part, state=state).logits for part in target.split([3, 1, 3], 1)]
            want = adapted if rows[1] else torch.stack([adapted[0], plain[1]])
            peers.close(torch.cat(steps, 1), want, 1e-5)


def test_low_precision() -> None:
    """A bf16 model stays bf16 through fp32 adapters with parts of their own."""
    model = promises.decoder().bfloat16()
    adapt(model, HOULSBY | {"norm": "layer", "activation": "prelu"}, name="a")
    promises.shake(model, "a")
    wide = promises.decoder()
    adapt(wide, HOULSBY | {"norm": "layer", "activation": "prelu"}, name="a")
    promises.shake(wide, "a")
    out = model(TOKENS).logits
    assert out.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in trainable(model).values())
    peers.close(out.float(), wide(TOKENS).logits, 0.1)


def test_bottleneck_refusals(tmp_path: Path) -> None:
    model = promises.decoder()
    for change, message in [
        ({"reduction": 4}, "width and reduction"),
        ({"places": []}, "at least one"),
        ({"places": ["mixer", "mixer"]}, "once"),
        ({"places": ["head"]}, "mixer"),
        ({"places": ["cross"]}, "no block of this model has a branch 'cross'"),
        ({"skip": 2}, "leaves no block"),
    ]:
        with pytest.raises(SpecError, match=message):
            adapt(model, HOULSBY | change)
        assert not adapters(model) and not any(".adapters." in n for n, _ in model.named_parameters())
    with pytest.raises(UserError, match="no adapter stands"):
        drop_lower(model, 1)
    adapt(model, HOULSBY)
    with pytest.raises(ConfigError, match="no words for bottleneck"):
        save_adapter(model, tmp_path / "out")
    with pytest.raises(UserError, match="3 blocks to drop"):
        drop_lower(model, 3)


def test_adapter_drop() -> None:
    """Dropping at inference is the model whose lowest blocks never had any; a training step leaves theirs alone."""
    model, short = promises.decoder(), promises.decoder()
    plain = model(TOKENS).logits
    adapt(model, HOULSBY, name="a")
    promises.shake(model, "a")
    adapt(short, HOULSBY | {"skip": 1}, name="a")
    assert {n.split(".")[1] for n in trainable(short)} == {"1"}
    with torch.no_grad():
        for name, p in trainable(short).items():
            p.copy_(model.get_parameter(name))
    whole, want = model(TOKENS).logits, short(TOKENS).logits
    assert (whole - want).abs().max() > 1e-3
    drop_lower(model, 1)
    assert torch.equal(model(TOKENS).logits, want)
    with route(model, ["a", None]):
        peers.close(model(TOKENS).logits, torch.stack([want[0], plain[1]]), 1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        peers.close(compiled(TOKENS).logits, want, 1e-5)
    model(TOKENS).logits.square().sum().backward()
    assert {n.split(".")[1] for n, p in trainable(model).items() if p.grad is not None} == {"1"}
    drop_lower(model, 2)
    assert torch.equal(model(TOKENS).logits, plain)
    drop_lower(model, 0)
    assert torch.equal(model(TOKENS).logits, whole)


def two_adapters(model: Any) -> None:
    """Two tasks' adapters, of different kinds, with the feed-forward in common."""
    adapt(model, HOULSBY, name="x")
    adapt(model, PARALLEL, name="y")
    promises.shake(model, "x", seed=7)
    promises.shake(model, "y", seed=8)


FUSION = {"kind": "fusion", "of": ["x", "y"]}


@oracle_for("adapter", "fusion")
def test_fusion_equals_the_formula() -> None:
    """Pfeiffer et al. 2021, the equations of section 3.2, token by token."""
    model = promises.decoder().double()
    two_adapters(model)
    adapt(model, FUSION, name="a")
    assert active(model) == ("a",) and {n.split(".adapters")[0] for n in trainable(model)} == {
        f"blocks.{i}.places.feedforward" for i in range(2)
    }
    promises.shake(model, "a")
    b, x = model.blocks[0], torch.randn(2, 3, 16, dtype=torch.float64)
    there = b.places["feedforward"].attached()
    h = b.feedforward(x)
    first = h + by_hand(there["x"], h, F.gelu)
    second = h + by_hand(there["y"], x, F.relu, 4.0)
    q, k, v = (there["a"].get_parameter(n).double() for n in ("query", "key", "value"))
    want = torch.empty_like(h)
    for i in range(2):
        for t in range(3):
            z = [first[i, t], second[i, t]]
            s = torch.tensor([((q @ h[i, t]) @ (k @ zn)).item() for zn in z], dtype=torch.float64).exp()
            want[i, t] = sum((sn * (v @ zn) for sn, zn in zip(s / s.sum(), z)), torch.zeros(16, dtype=torch.float64))
    torch.testing.assert_close(b.branch("feedforward", x), want, rtol=0, atol=1e-12)


def test_fusion_start_is_a_mixture() -> None:
    """With V close to the identity, what it gives lies between the outputs of the two, entry by entry."""
    model = promises.decoder()
    two_adapters(model)
    adapt(model, FUSION)
    place, h = model.blocks[0].places["feedforward"], torch.randn(2, 3, 16)
    y, held = model.blocks[0].feedforward(h), place.attached()
    low, high = torch.stack([held[n](lambda _: y, h) for n in ("x", "y")]).sort(0).values
    got = model.blocks[0].branch("feedforward", h)
    assert bool(((got > low - 1e-3) & (got < high + 1e-3)).all()) and (high - low).max() > 0.1
    copy = deepcopy(model).blocks[0].places["feedforward"].attached()
    assert copy["default"].fused[0] is copy["x"] is not held["x"]
    value = held["default"].get_parameter("value").detach()
    assert torch.equal(value.diagonal(), torch.ones(16))
    assert 0 < (value - torch.eye(16)).abs().max() < 1e-5


def test_fusion_promises(tmp_path: Path) -> None:
    promises.check(promises.decoder(), FUSION, tmp_path, before=two_adapters, identity=False)


def test_fusion_refusals(tmp_path: Path) -> None:
    model = promises.decoder()
    adapt(model, "lora", name="l")
    two_adapters(model)
    adapt(model, HOULSBY | {"places": ["mixer"]}, name="m")
    before = active(model)
    assert before == ("l", "x", "y", "m")
    for of, message in [
        (["x"], "at least two"),
        (["x", "x"], "at least two"),
        (["x", "z"], "no adapter 'z'"),
        (["x", "l"], "'l' stands around weights"),
        (["y", "m"], "share no place"),
    ]:
        with pytest.raises(SpecError, match=message):
            adapt(model, {"kind": "fusion", "of": of}, name="f")
        assert active(model) == before and "f" not in adapters(model)
    adapt(model, FUSION, name="f")
    assert active(model) == ("l", "m", "f")
    with pytest.raises(UserError, match="'f' stands on 'x'"):
        remove(model, "x")
    save_adapter(model, tmp_path / "f", name="f", format="dovetail")
    use(model, "l", "x")
    with pytest.raises(SpecError, match="an adapter 'f' is there"):
        load_adapter(model, tmp_path / "f", name="f")
    file = tmp_path / "f" / "adapter_model.safetensors"
    save_file({"stray": torch.zeros(1)}, tmp_path / "stray.safetensors")
    kept = file.read_bytes()
    file.write_bytes((tmp_path / "stray.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(model, tmp_path / "f", name="g")
    assert active(model) == ("l", "x") and "g" not in adapters(model)
    file.write_bytes(kept)
    with pytest.raises(SpecError, match="no adapter 'x'"):
        load_adapter(promises.decoder(), tmp_path / "f")
    remove(model, "f")
    remove(model, "x")
    use(model)
    with off(model):
        assert torch.equal(model(TOKENS).logits, promises.decoder()(TOKENS).logits)
