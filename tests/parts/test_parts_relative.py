"""Shaw, Transformer-XL, XLNet: content against distance, against published code and formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Wav2Vec2BertConfig, XLNetConfig, XLNetModel
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

import dovetail as dt
from contracts.skeleton import SINGLE, TIGHT, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError
from dovetail.parts.context import Context
from dovetail.parts.state import Room, State
from oracles import oracle_for
from parts.making import make

T, C = 11, 12
CPU, WIDE = torch.device("cpu"), torch.float64
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "relative.safetensors")
PADDED = torch.tensor([[0, 0] + [1] * 9, [1] * 8 + [0] * 3])


def attention(position: Any, *, causal: bool = True, dim: int = C, **fields: Any) -> Any:
    return build("mixer", {"kind": "attention", "heads": 4, "position": position} | fields, dim=dim, causal=causal)


def gradients(y: Tensor, inputs: list[Tensor], pull: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y * pull).sum(), inputs, retain_graph=True))


@oracle_for("position", "shaw")
def test_shaws_keys_are_wav2vec2_berts() -> None:
    config = Wav2Vec2BertConfig(
        hidden_size=C, num_attention_heads=4, position_embeddings_type="relative_key",
        left_max_position_embeddings=3, right_max_position_embeddings=3, attention_dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = randomise(Wav2Vec2BertSelfAttention(config))
    ours = attention({"kind": "shaw", "clip": 3, "terms": ["key"]}, causal=False, bias="all")
    maps = ["linear_q", "linear_k", "linear_v"]
    rules = joined(maps, "qkv", [C] * 3, ("weight", "bias"))
    rules += keys(("linear_out", "out"), kinds=("weight", "bias")) + keys(("distance_embedding", "position.keys"))
    match(
        ours, theirs, rules, lambda x: ours(x, Context.of(2, T, CPU)), lambda x: theirs(x)[0],
        [torch.randn(2, T, C, dtype=WIDE)], tol=SINGLE,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("terms", [["key", "value"], ["value"], ["key"]], ids="-".join)
def test_shaw_adds_vectors_to_keys_and_values(causal: bool, terms: list[str]) -> None:
    """The definition, pair by pair, with shared heads, values of another width and padding."""
    clip, D, Dv, G = 3, 6, 5, 2
    part = {"kind": "shaw", "clip": clip, "terms": terms}
    mixer = attention(part, causal=causal, kv_heads=G, head_dim=D, value_dim=Dv)
    rows = clip + 1 if causal else 2 * clip + 1
    tables = {n: m.weight for n in ("keys", "values") if (m := getattr(mixer.position, n)) is not None}
    assert {n: t.shape for n, t in tables.items()} == {
        n: (rows, w) for n, w, t in (("keys", D, "key"), ("values", Dv, "value")) if t in terms
    }
    x = torch.randn(2, T, C, dtype=WIDE, requires_grad=True)
    ours = mixer(x, Context.of(2, T, CPU, attention_mask=PADDED)) * PADDED[..., None]
    q, k, v = mixer.qkv(x).split([4 * D, G * D, G * Dv], -1)
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, 4), (k, G), (v, G)))
    k, v = (t.repeat_interleave(4 // G, 2) for t in (k, v))
    away = (torch.arange(T) - torch.arange(T)[:, None]).clamp(-clip, 0 if causal else clip) + clip
    pairs_k, pairs_v = k[:, None].expand(-1, T, -1, -1, -1), v[:, None].expand(-1, T, -1, -1, -1)  # (B,T,S,H,D)
    if "keys" in tables:
        pairs_k = pairs_k + tables["keys"][away][None, :, :, None]
    if "values" in tables:
        pairs_v = pairs_v + tables["values"][away][None, :, :, None]
    s = torch.einsum("bihd,bijhd->bhij", q, pairs_k) * D**-0.5
    hidden = (PADDED == 0)[:, None, None] | (torch.ones(T, T).triu(1).bool() if causal else torch.zeros(T, T).bool())
    p = s.masked_fill(hidden, -1e300).softmax(-1)
    theirs = mixer.out(torch.einsum("bhij,bijhd->bihd", p, pairs_v).flatten(-2)) * PADDED[..., None]
    close(ours, theirs, TIGHT, "output")
    inputs, pull = [x, mixer.qkv.weight, *tables.values()], torch.randn_like(theirs)
    for a, b in zip(gradients(ours, inputs, pull), gradients(theirs, inputs, pull), strict=True):
        close(a, b, TIGHT, "gradient")


def test_shaws_dropped_weights_carry_no_value_vectors() -> None:
    """Dropout is on the weights before both halves: the mean over many draws is the output without it."""
    mixer = attention({"kind": "shaw", "clip": 2}, dropout=0.5)
    with torch.no_grad():
        mixer.qkv.weight.zero_()  # the values' vectors alone, under even weights
        x = torch.randn(1, 4, C, dtype=WIDE)
        even = mixer.eval()(x, Context.of(1, 4, CPU))
        many = mixer.train()(x.expand(4000, -1, -1), Context.of(4000, 4, CPU))
    spread = many.std(0) / 4000**0.5
    assert (many.std(0) > 0).all() and ((many.mean(0) - even[0]).abs() < 6 * spread).all()


@oracle_for("position", "transformer_xl")
def test_transformer_xl_is_its_authors() -> None:
    """5 tokens behind a memory of 4: in one forward with gradients, and against a state that holds the memory."""
    g = {k.removeprefix("transformer_xl."): v for k, v in GOLDEN.items() if k.startswith("transformer_xl.")}
    mixer = build("mixer", {"kind": "attention", "heads": 3, "position": "transformer_xl"}, dim=12)
    ours = {"qkv": mixer.qkv.weight, "o": mixer.out.weight, "r": mixer.position.r.weight}
    ours |= {"u": mixer.position.u, "v": mixer.position.v}
    assert set(dict(mixer.named_parameters())) == {
        "qkv.weight", "out.weight", "position.r.weight", "position.u", "position.v",
    }  # fmt: skip
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(g[name])
    x = torch.cat([g["mems"], g["w"]]).transpose(0, 1).clone().requires_grad_()
    out = mixer(x, Context.of(2, 9, CPU))[:, 4:].transpose(0, 1)
    close(out, g["out"], 1e-7, "output")  # their table of frequencies is in fp32
    found = gradients(out, [x, *ours.values()], g["pull"])
    close(found[0].transpose(0, 1), torch.cat([g["grad_mems"], g["grad_w"]]), 1e-6, "gradient of x")
    for name, gradient in zip(ours, found[1:], strict=True):
        close(gradient, g[f"grad_{name}"], 1e-6, f"gradient of {name}")
    room = Room(2, 9, CPU, WIDE)
    state = State([{"mixer": mixer.new_state(room)}], room)
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 9)):
            ctx = Context.of(2, stop - start, CPU, start=start)
            state.advance(ctx)
            y = mixer(x[:, start:stop].detach(), ctx, state.layers[0]["mixer"])
    close(y.transpose(0, 1), g["out"], 1e-7, "output behind the memory")


def test_transformer_xl_reads_distance_alone() -> None:
    """Far along, in fp32 too; and equal to sinusoidal vectors of each distance through W_r."""
    mixer = attention("transformer_xl", kv_heads=2, head_dim=6)
    x = torch.randn(2, T, C, dtype=WIDE)
    far = torch.arange(T)[None] + 1_000_000
    here = mixer(x, Context.of(2, T, CPU))
    close(mixer(x, Context.of(2, T, CPU, positions=far)), here, 1e-8, "shifted by a million")
    narrow = mixer.float()(x.float(), Context.of(2, T, CPU, positions=far))
    close(narrow.double(), here, 2e-5, "in fp32")
    ctx, away = Context.of(1, T, CPU), (torch.arange(T)[:, None] - torch.arange(T)).double()[..., None]
    angle = away * 10_000.0 ** (-torch.arange(0, C, 2).double() / C)
    q, k = torch.randn(1, T, 4, 6, dtype=WIDE), torch.randn(1, T, 2, 6, dtype=WIDE)
    for module in (mixer.double().position, attention("transformer_xl", causal=False, kv_heads=2, head_dim=6).position):
        score = module.score(q, k, ctx.coords, ctx, None)
        assert score.relative is not None
        found = score.bias(ctx.coords, 1.0)[0]
        r = module.r(torch.cat([angle.sin(), angle.cos()], -1)).unflatten(-1, (4, 6))  # (T,S,H,D)
        theirs = torch.einsum("ihd,ijhd->hij", q[0] + module.v, r)
        seen = torch.ones(T, T).tril() if module is mixer.position else torch.ones(T, T)
        close(found * seen, theirs * seen, 1e-10, "terms")
        close(module._distance(q, ctx.coords).dense(ctx.coords)[0], theirs, 1e-10, "terms of any positions")
        queries, keys = module.rotate(q, k, ctx.coords, ctx)
        assert keys is k
        close(queries, q + module.u, 1e-12, "queries")


def xlnet(kinds: Tensor | None) -> tuple[Any, Any, Any]:
    """Ours, theirs, and their attention without the norm behind it, as a function of x (B,T,C)."""
    config = XLNetConfig(d_model=C, n_head=4, d_inner=8, n_layer=1, vocab_size=3, dropout=0.0)
    theirs: Any = randomise(XLNetRelativeAttention(config))
    where = XLNetModel(config).relative_positional_encoding(T, T)[:, 0].double()
    apart = None if kinds is None else (kinds.t()[:, None] != kinds.t()[None]).long()  # (i,j,B)
    segments = None if apart is None else torch.nn.functional.one_hot(apart, 2).double()

    def oracle(x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        q, k, v = (torch.einsum("ibh,hnd->ibnd", h, w) for w in (theirs.q, theirs.k, theirs.v))
        r = torch.einsum("jh,hnd->jnd", where, theirs.r)[:, None].expand(-1, x.shape[0], -1, -1)
        pad = (PADDED == 0).double().t()[None, :, :, None].expand(T, -1, -1, 4)
        core = theirs.rel_attn_core(q, k, v, r, segments, pad)
        return torch.einsum("ibnd,hnd->bih", core, theirs.o) * PADDED[..., None]

    return attention("xlnet", causal=False), theirs, oracle


@oracle_for("position", "xlnet")
@pytest.mark.parametrize("pairs", [True, False], ids=["two segments", "no segments"])
def test_xlnet_is_transformers(pairs: bool) -> None:
    kinds = (torch.arange(T) >= torch.tensor([[6], [4]])).long()
    ours, theirs, oracle = xlnet(kinds if pairs else None)
    place = ours.position
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([w.flatten(1).t() for w in (theirs.q, theirs.k, theirs.v)]))
        ours.out.weight.copy_(theirs.o.flatten(1))
        place.r.weight.copy_(theirs.r.flatten(1).t())
        for mine, other in ((place.u, theirs.r_w_bias), (place.v, theirs.r_r_bias), (place.s, theirs.r_s_bias)):
            mine.copy_(other)
        place.e.copy_(theirs.seg_embed)
    positions = torch.stack([torch.arange(T).expand(2, -1), kinds], -1) if pairs else None
    x = torch.randn(2, T, C, dtype=WIDE, requires_grad=True)
    ctx = Context.of(2, T, CPU, attention_mask=PADDED, positions=positions)
    a, b = ours(x, ctx) * PADDED[..., None], oracle(x)
    close(a, b, SINGLE, "output")
    pull = torch.randn_like(b)
    mine = [x, ours.qkv.weight, ours.out.weight, place.r.weight, place.u, place.v]
    other = [x, theirs.q, theirs.k, theirs.v, theirs.o, theirs.r, theirs.r_w_bias, theirs.r_r_bias]
    if pairs:
        mine, other = [*mine, place.s, place.e], [*other, theirs.r_s_bias, theirs.seg_embed]
    dx, dq, dk, dv, do, dr, *rest = gradients(b, other, pull)
    wanted = [dx, torch.cat([w.flatten(1).t() for w in (dq, dk, dv)]), do.flatten(1), dr.flatten(1).t(), *rest]
    largest = max(g.abs().max().item() for g in wanted)
    for found, gradient in zip(gradients(a, mine, pull), wanted, strict=True):
        close(found, gradient, SINGLE, "gradient", floor=1e-2 * largest)


def test_xlnet_remembers_the_segments_of_its_memory() -> None:
    blocks = {"mixer": {"kind": "attention", "heads": 2, "position": "xlnet"}}
    shape = {"vocab": 9, "dim": 8, "depth": 2, "init": {"kind": "normal", "std": 0.5}}
    model = dt.build({"kind": "decoder", "blocks": blocks} | shape, dtype=WIDE)
    x, kinds = torch.randint(0, 9, (2, T)), (torch.arange(T) >= torch.tensor([[6], [4]])).long()
    positions = torch.stack([torch.arange(T).expand(2, -1), kinds], -1)
    with torch.no_grad():
        full = model(x, positions=positions).logits
        assert (full - model(x).logits).abs().max() > 1e-3
        state = model.new_state(2, 16)
        steps = [model(x[:, a:b], positions=positions[:, a:b], state=state).logits for a, b in ((0, 5), (5, 6), (6, T))]
    close(torch.cat(steps, 1), full, 1e-10, "steps")


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(BuildError, match="terms"):
        attention({"kind": "shaw", "terms": []})
    with pytest.raises(BuildError, match="width is 9"):
        make("position", "transformer_xl", dim=9, head_dim=4)
    with pytest.raises(BuildError, match="value terms"):
        attention({"kind": "prefix", "length": 2, "position": {"kind": "logn", "trained": 8, "position": "shaw"}})
    attention({"kind": "prefix", "length": 2, "position": {"kind": "shaw", "terms": ["key"]}})


def test_the_plan_knows_value_terms() -> None:
    for terms, path in ((["key"], "sdpa"), (["key", "value"], "tiled")):
        plans = attention({"kind": "shaw", "terms": terms}).plans("cpu", 128)
        assert {p.path for p in plans.values()} == {path}
