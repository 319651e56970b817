"""Prefix tuning: virtual keys and values before those of the tokens, in every layer."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import promises
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dovetail as dt
from dovetail.adapters import adapt, adapters, load_adapter, merge, off, remove, route, save_adapter, trainable, use
from dovetail.adapters.virtual import flatten
from dovetail.errors import BuildError, CheckpointError, ConfigError, DataError, RunError, SpecError, UserError
from dovetail.surgery import quantise
from oracles import oracle_for

VOCAB, P = 61, 4


def decoder(position: Any = "rope", **mixer: Any) -> Any:
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": position} | mixer
    spec = {"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 2, "context": 64, "blocks": {"mixer": attention}}
    return dt.build(spec | {"init": {"kind": "normal", "std": 0.2}})


def reversible() -> Any:
    spec = {"kind": "decoder", "vocab": VOCAB, "dim": 16, "depth": 2, "streams": 2}
    return dt.build(spec | {"blocks": {"kind": "reversible", "mixer": {"kind": "attention", "heads": 2}}})


def encoder_decoder(**more: Any) -> Any:
    spec = {"kind": "encoder_decoder", "vocab": VOCAB, "dim": 32, "decoder_start": 1}
    return dt.build(spec | {"init": {"kind": "normal", "std": 0.2}} | more)


def shaken(model: Any, name: str = "default") -> Any:
    """With prefixes far from zero."""
    for key, p in model.named_parameters():
        if f"adapters.{name}." in key:
            torch.nn.init.normal_(p, std=0.7)
    return model


def prefixed(model: Any, **spec: Any) -> Any:
    return shaken(adapt(model, {"kind": "prefix", "length": P} | spec))


def ids(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB, shape)


def close(a: Tensor, b: Tensor, tol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(1.0, float(b.detach().abs().max())))


def peer(kind: str) -> Any:
    if kind == "llama":
        sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, **sizes))
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes))
    sizes = {f"{side}_layers": 3 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    config = BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=64, dropout=0.0, **sizes)
    return BartForConditionalGeneration(config)


def outputs(ours: Any, theirs: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Logits of both for the same tokens."""
    torch.manual_seed(5)
    x, y = ids(2, 9), ids(2, 6)
    more = {"decoder_input_ids": y} if kind == "bart" else {}
    given = (x, y) if kind == "bart" else (x,)
    return ours(*given).logits, theirs(input_ids=x, attention_mask=torch.ones_like(x), **more).logits


@oracle_for("adapter", "prefix")
@pytest.mark.parametrize("hidden", [None, 7])
def test_equals_the_formula(hidden: int | None) -> None:
    """softmax(q [K_P; K]ᵀ) [V_P; V] in fp64, with grouped heads, and the reparametrisation by hand."""
    model = prefixed(decoder("none"), hidden=hidden).double()
    layer, source = model.blocks[1].mixer, model.front.adapters["default"].sources["decoder"]
    if hidden is None:
        both = source.weight
    else:
        both = (
            torch.tanh(source.embedding @ source.down.weight.T + source.down.bias) @ source.up.weight.T + source.up.bias
        )
    assert both.shape == (P, 2 * 2 * 2 * 8)
    own_k, own_v = (t.view(P, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for t in both[:, 32:].split(16, -1))
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    q, k, v = layer.qkv(x)[0].split([32, 16, 16], -1)
    q, k, v = (t.view(5, -1, 8).transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(2, 0) for t in (k, v))
    hidden_keys = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    scores = torch.cat([q @ own_k.mT, q @ k.mT + hidden_keys], -1) / 8**0.5
    wanted = layer.out((scores.softmax(-1) @ torch.cat([own_v, v], 1)).transpose(0, 1).flatten(1))
    from dovetail.parts.context import Context

    torch.testing.assert_close(layer(x, Context.of(1, 5, x.device))[0], wanted, rtol=0, atol=1e-13)


@oracle_for("adapter", "prefix")
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_peft_reads_ours_and_we_read_peft(kind: str, projection: bool, tmp_path: Path) -> None:
    base = peer(kind).eval()
    base.save_pretrained(tmp_path / "base")
    task = "SEQ_2_SEQ_LM" if kind == "bart" else "CAUSAL_LM"
    config = PrefixTuningConfig(
        num_virtual_tokens=P, task_type=task, prefix_projection=projection, encoder_hidden_size=16
    )
    theirs = get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(dt.load(tmp_path / "base"), tmp_path / "theirs")
    a, b = outputs(ours, theirs, kind)
    close(a, b)
    assert (a - outputs(dt.load(tmp_path / "base"), theirs, kind)[0]).abs().max() > 1e-3
    shaken(ours)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    close(*outputs(ours, again, kind))


@oracle_for("adapter", "prefix")
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_one_training_step_equals_peft(kind: str, projection: bool, tmp_path: Path) -> None:
    base = peer(kind)
    base.save_pretrained(tmp_path)
    task = "SEQ_2_SEQ_LM" if kind == "bart" else "CAUSAL_LM"
    config = PrefixTuningConfig(
        num_virtual_tokens=P, task_type=task, prefix_projection=projection, encoder_hidden_size=16
    )
    theirs = get_peft_model(base, config).train()
    more: dict[str, Any] = {"at": ["decoder"], "order": "peft_seq2seq"} if kind == "bart" else {}
    ours = adapt(
        dt.load(tmp_path), {"kind": "prefix", "length": P, "hidden": 16 if projection else None} | more
    ).train()
    source = (ours.decoder_front if kind == "bart" else ours.front).adapters["default"].sources["decoder"]
    net = theirs.prompt_encoder["default"]
    pairs = [(source.weight, net.embedding.weight)] if not projection else [
        (source.embedding, net.embedding.weight),
        (source.down.weight, net.transform[0].weight),
        (source.down.bias, net.transform[0].bias),
        (source.up.weight, net.transform[2].weight),
        (source.up.bias, net.transform[2].bias),
    ]  # fmt: skip
    for own, other in pairs:
        own.data.copy_(other.data)
    assert {id(p) for p in trainable(ours).values()} == {id(own) for own, _ in pairs}
    sides = ([own for own, _ in pairs], [p for p in theirs.parameters() if p.requires_grad])
    steps = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in sides]
    for logits, step in zip(outputs(ours, theirs, kind), steps, strict=True):
        logits.square().mean().backward()
        step.step()
    for own, other in pairs:
        close(own.grad, other.grad, 1e-5)
        torch.testing.assert_close(own, other, rtol=0, atol=2e-4)  # Adam's first step is a sign: ±lr where g is not 0


@pytest.mark.parametrize(
    "position",
    ["rope", {"kind": "t5_buckets", "buckets": 8, "max_distance": 9}, "none"],
    ids=lambda p: p if isinstance(p, str) else p["kind"],
)
def test_from_a_text_it_equals_having_read_it(position: Any) -> None:
    model, text, rest = decoder(position), ids(1, P), ids(1, 9)
    wanted = model(torch.cat([text, rest], 1)).logits[:, P:]
    adapt(model, {"kind": "prefix", "tokens": text[0].tolist()})
    close(model(rest).logits, wanted)
    packed = model(torch.cat([rest, rest[:, :5]], 1), segments=torch.tensor([[0] * 9 + [1] * 5])).logits
    close(packed, torch.cat([wanted, wanted[:, :5]], 1))
    state = model.new_state(1, 9)
    with torch.no_grad():
        close(torch.cat([model(rest[:, i : i + 1], state=state).logits for i in range(9)], 1), wanted)


def test_from_a_text_with_learned_positions() -> None:
    spec = {"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 2, "context": 16, "position": "learned"}
    model = dt.build(spec | {"blocks": {"mixer": {"kind": "attention", "position": "none"}}})
    text, rest = ids(1, P), ids(1, 12)
    wanted = model(torch.cat([text, rest], 1)).logits[:, P:]
    adapt(model, {"kind": "prefix", "tokens": text[0].tolist()})
    close(model(rest).logits, wanted)
    with pytest.raises(DataError, match="beyond the learned table"):
        model(ids(1, 13))
    with pytest.raises(BuildError, match="learned position table ends at 16"):
        model.new_state(1, 13)


def test_texts_are_repeated_or_cut_to_a_length() -> None:
    model = decoder()
    adapt(model, {"kind": "prefix", "tokens": [5, 6, 7], "length": 5}, name="a")
    adapt(decoder_copy := copy.deepcopy(model), {"kind": "prefix", "tokens": [5, 6, 7, 5, 6]}, name="b")
    a, b = (decoder_copy.front.adapters[n].sources["decoder"].weight for n in "ab")
    for name in "ab":  # the copy's layers read the copy's parameters
        source = decoder_copy.front.adapters[name].sources["decoder"]
        assert all(layer.mixer.adapters[name].source is source for layer in decoder_copy.blocks)
    assert torch.equal(a, b) and adapters(model)["a"].count == 5  # type: ignore[attr-defined]


def test_what_every_adapter_promises(tmp_path: Path) -> None:
    promises.check(promises.decoder(), {"kind": "prefix", "length": 3, "hidden": 5}, tmp_path, identity=False)


@pytest.mark.parametrize("hidden", [None, 7])
def test_checkpointing_padding_packing_and_decoding(hidden: int | None) -> None:
    model = prefixed(decoder(), hidden=hidden)
    x = ids(2, 8)
    plain = model(x).logits
    grads = torch.autograd.grad(plain.square().mean(), list(trainable(model).values()))
    model.checkpointing = True
    model.train()
    again = torch.autograd.grad(model(x).logits.square().mean(), list(trainable(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    model.eval()
    packed = model(x.view(1, 16), segments=torch.tensor([[0] * 8 + [1] * 8])).logits.view(2, 8, -1)
    close(packed, plain)
    again = torch.autograd.grad(packed.square().mean(), list(trainable(model).values()))
    for a, b in zip(grads, again, strict=True):
        close(b, a, 1e-5)
    zeros, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)
    for order in ((0, 1), (1, 0)):
        mask = torch.cat([(zeros, ones)[i] for i in order], 1)
        out = model(torch.cat([(zeros, x)[i] for i in order], 1), attention_mask=mask).logits
        close(out[mask.bool()].view(plain.shape), plain)
    with torch.no_grad():
        state = model.new_state(2, 8)
        parts = [model(x[:, :3], state=state).logits]
        kept = state.snapshot()
        parts += [model(x[:, i : i + 1], state=state).logits for i in range(3, 8)]
        close(torch.cat(parts, 1), plain)
        kept.reorder(torch.tensor([1, 1, 0]))
        close(model(x[[1, 1, 0], 3:5], state=kept).logits, plain[[1, 1, 0], 3:5])
        state.truncate(4)
        close(model(x[:, 4:6], state=state).logits, plain[:, 4:6])


def test_beams_and_greedy_see_the_prefix() -> None:
    model = prefixed(decoder()).eval()
    prompts = ids(2, 5)
    made = dt.generate(model, None, prompts, max_new_tokens=4, temperature=0)
    whole = model(torch.cat([prompts, made], 1)).logits[:, 4:-1].argmax(-1)
    assert torch.equal(made, whole)
    best = dt.generate(model, None, prompts, max_new_tokens=3, beams=4)
    score = partial(_log_chance, model, prompts)
    assert bool((score(best) >= score(made[:, :3]) - 1e-5).all())
    with off(model):
        assert not torch.equal(dt.generate(model, None, prompts, max_new_tokens=4, temperature=0), made)


def _log_chance(model: Any, prompts: Tensor, made: Tensor) -> Tensor:
    scores = model(torch.cat([prompts, made], 1)).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    return scores.gather(-1, made[..., None]).sum((1, 2))


@pytest.mark.parametrize("hidden", [None, 7])
def test_in_a_bf16_model_it_stays_fp32(hidden: int | None) -> None:
    model, x = decoder().bfloat16(), ids(2, 6)
    prefixed(model, hidden=hidden)
    logits = model(x).logits
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16 and all(
        p.dtype == p.grad.dtype == torch.float32 for p in trainable(model).values()
    )  # type: ignore[union-attr]
    wide = decoder()
    wide.load_state_dict(decoder().bfloat16().float().state_dict())
    close(logits.float(), prefixed_like(wide, model, hidden)(x).logits, 0.05)


def prefixed_like(model: Any, other: Any, hidden: int | None) -> Any:
    prefixed(model, hidden=hidden).front.load_state_dict(other.front.state_dict())
    return model


def test_before_maps_that_are_kept_in_codes() -> None:
    """An attention whose maps are all in codes has no parameter of its own."""
    model, x = decoder(), ids(2, 9)
    quantise(model, "int8")
    prefixed(model)
    dense = decoder()
    dense.load_state_dict(
        {name: t for name, t in model.state_dict().items() if name in dense.state_dict()}, strict=False
    )
    for path, place in dense.named_modules():
        if getattr(model.get_submodule(path), "stored", None) is not None:
            place.weight.data = model.get_submodule(path).dense()
    close(model(x).logits, prefixed_like(dense, model, None)(x).logits)


def test_beside_a_position_that_is_a_prefix_itself() -> None:
    model = prefixed(decoder({"kind": "prefix", "length": 3, "position": "rope"}))
    x = ids(2, 7)
    with torch.no_grad():
        state = model.new_state(2, 7)
        steps = torch.cat([model(part, state=state).logits for part in x.split([3, 1, 3], 1)], 1)
    close(steps, model(x).logits)


@pytest.mark.parametrize(
    "how",
    [
        {"position": {"kind": "rerope", "window": 3}},
        {"mask": {"kind": "window", "size": 3}},
        {"position": {"kind": "t5_buckets", "buckets": 8, "max_distance": 9}, "cap": 2.0},
    ],
    ids=["rerope", "window", "cap"],
)
def test_positions_in_regions_windows_and_caps(how: dict[str, Any]) -> None:
    """Packed, padded, decoded and routed rows agree with plain ones; the prefix reaches beyond the window."""
    model, x = prefixed(decoder(**how)), ids(2, 8)
    plain = model(x).logits
    packed = model(x.view(1, 16), segments=torch.tensor([[0] * 8 + [1] * 8])).logits
    close(packed.view(plain.shape), plain)
    mask = torch.tensor([[0] * 2 + [1] * 8] * 2)
    close(model(torch.cat([x[:, :2], x], 1), attention_mask=mask).logits[:, 2:], plain)
    with torch.no_grad():
        state = model.new_state(2, 8)
        close(torch.cat([model(part, state=state).logits for part in x.split([4, 1, 3], 1)], 1), plain)
    with off(model):
        bare = model(x).logits
    with route(model, [None, "default"]):
        close(model(x).logits, torch.stack([bare[0], plain[1]]))
    assert bool(((plain - bare).abs().amax(-1) > 1e-3).all())


def test_many_prefixes_on_one_model() -> None:
    model, x = decoder(), ids(4, 6)
    plain = model(x).logits
    adapt(model, {"kind": "prefix", "length": 3}, name="a")
    adapt(model, {"kind": "prefix", "length": 5, "hidden": 6}, name="b")
    shaken(shaken(model, "a"), "b")
    alone = {}
    for name in "ab":
        use(model, name)
        alone[name] = model(x).logits
    use(model, "a", "b")
    both = model(x).logits
    assert (both - alone["a"]).abs().max() > 1e-3 and (both - alone["b"]).abs().max() > 1e-3
    with off(model):
        assert torch.equal(model(x).logits, plain)
    with route(model, ["a", None, "b", ("a", "b")]):
        routed = model(x).logits
        with torch.no_grad():
            state = model.new_state(4, 6)
            stepped = torch.cat([model(x[:, :2], state=state).logits, model(x[:, 2:], state=state).logits], 1)
        with pytest.raises(RunError, match="routed as 4"):
            model(x[:2])
    for row, wanted in enumerate((alone["a"], plain, alone["b"], both)):
        close(routed[row], wanted[row])
        close(stepped[row], wanted[row])
    remove(remove(model, "a"), "b")
    assert torch.equal(model(x).logits, plain) and not any("adapters" in key for key in model.state_dict())


def test_rows_routed_to_prefixes_of_equal_length_get_the_gradients_of_their_own() -> None:
    model, x = decoder(), ids(2, 6)
    for name in "ab":
        shaken(adapt(model, {"kind": "prefix", "length": P}, name=name), name).requires_grad_(True)
    with route(model, ["b", "a"]):
        model(x).logits[0].square().sum().backward()
    a, b = (model.front.adapters[n].sources["decoder"].weight.grad for n in "ab")
    use(model, "b")
    (wanted,) = torch.autograd.grad(
        model(x[:1]).logits.square().sum(), [model.front.adapters["b"].sources["decoder"].weight]
    )
    assert not a.any()
    close(b, wanted, 1e-5)


def test_encoder_decoders_have_prefixes_before_every_attention() -> None:
    model, x, y = encoder_decoder(), ids(2, 7), ids(2, 5)
    prefixed(model)
    assert set(model.encoder_front.adapters["default"].sources) == {"encoder"}
    assert set(model.decoder_front.adapters["default"].sources) == {"cross", "decoder"}
    whole = model(x, y)
    grads = torch.autograd.grad(whole.logits.square().mean(), list(trainable(model).values()))
    assert len(grads) == 3 and all(g.abs().max() > 0 for g in grads)
    with torch.no_grad():
        state = model.new_state(2, 5)
        model.encode(x, state=state)
        parts = [model.decode(y[:, :2], state=state).logits, model.decode(y[:, 2:], state=state).logits]
    close(torch.cat(parts, 1), whole.logits)
    mask = torch.tensor([[1] * 7 + [0] * 2] * 2)
    close(model(torch.cat([x, x[:, :2]], 1), y, attention_mask=mask).logits, whole.logits)
    dt.generate(model, None, x, max_new_tokens=3, beams=2)
    for at in ("encoder", "cross", "decoder"):
        other = prefixed(encoder_decoder(), at=(at,))
        held = [other.encoder_front.held, other.decoder_front.held]
        assert held == {"encoder": [P, 0], "cross": [0, 0], "decoder": [0, P]}[at]
        assert (other(x, y).logits - encoder_decoder()(x, y).logits).abs().max() > 1e-3
    with pytest.raises(BuildError, match="read a source"):
        adapt(encoder_decoder(), {"kind": "prefix", "tokens": [3, 4]})
    with pytest.raises(ConfigError, match="self-attention alone"):
        save_adapter(model, "nowhere")


def test_flattened_it_is_exactly_the_same(tmp_path: Path) -> None:
    for make, given in ((decoder, (ids(2, 6),)), (encoder_decoder, (ids(2, 6), ids(2, 4)))):
        model = prefixed(make(), hidden=9)
        wanted, many = model(*given).logits, sum(p.numel() for p in trainable(model).values())
        flatten(model)
        assert torch.equal(model(*given).logits, wanted)
        assert sum(p.numel() for p in trainable(model).values()) < many
        save_adapter(model, tmp_path / make.__name__, format="dovetail")
        assert torch.equal(load_adapter(make(), tmp_path / make.__name__)(*given).logits, wanted)
        with pytest.raises(UserError, match="no reparametrisation"):
            flatten(model)


def test_saved_and_loaded_with_the_reparametrisation(tmp_path: Path) -> None:
    model, x = prefixed(decoder(), hidden=9), ids(2, 6)
    save_adapter(model, tmp_path, format="dovetail")
    again = load_adapter(decoder(), tmp_path)
    assert torch.equal(again(x).logits, model(x).logits) and adapters(again)["default"].hidden == 9  # type: ignore[attr-defined]
    other = dt.build(decoder().spec.replace(depth=1, blocks=decoder().spec.blocks[:1]))
    with pytest.raises(CheckpointError):
        load_adapter(other, tmp_path)


def test_attention_dropout_while_training() -> None:
    """As GPT-2's checkpoints have it: on the weights of prefix and tokens alike."""
    model, x = prefixed(decoder(dropout=0.5)), ids(1, 6)
    assert not torch.equal(model.train()(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)


def test_refusals() -> None:
    model = prefixed(decoder())
    with pytest.raises(BuildError, match="not a change of weights"):
        merge(model)
    with pytest.raises(BuildError, match="use prompt tuning"):
        lstm = {"kind": "decoder", "vocab": VOCAB, "dim": 8, "depth": 1, "blocks": {"mixer": {"kind": "lstm"}}}
        adapt(dt.build(lstm), "prefix")
    with pytest.raises(BuildError, match="reversible layers"):
        adapt(reversible(), "prefix")
    with pytest.raises(BuildError, match="rotated anew"):
        scaled = {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0}}
        adapt(decoder(scaled), {"kind": "prefix", "tokens": [3, 4]})
    with pytest.raises(BuildError, match="does not keep them"):
        adapt(decoder(mask={"kind": "window", "size": 2}), {"kind": "prefix", "tokens": [3, 4, 5]})
    with pytest.raises(DataError, match="for a vocabulary of 61"):
        adapt(decoder(), {"kind": "prefix", "tokens": [VOCAB]})
    with pytest.raises(SpecError, match="cannot be undone"):
        adapt(decoder(), {"kind": "prefix", "tokens": [3], "hidden": 4})
    with pytest.raises(SpecError, match="has no cross"):
        adapt(decoder(), {"kind": "prefix", "at": ["cross"]})
    with pytest.raises(SpecError, match="peft_seq2seq"):
        adapt(decoder(), {"kind": "prefix", "order": "peft_seq2seq"})


def test_peft_files_of_another_arrangement_are_refused(tmp_path: Path) -> None:
    """A language model's prefix is not one of three, and an encoder-decoder's order means nothing without its layers."""
    languages = get_peft_model(peer("gpt2"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    languages.save_pretrained(tmp_path / "one")
    both = get_peft_model(peer("bart"), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P))
    both.save_pretrained(tmp_path / "two")
    for kind, folder in (("bart", "one"), ("gpt2", "two")):
        peer(kind).save_pretrained(tmp_path / kind)
        model = dt.load(tmp_path / kind)
        with pytest.raises((ConfigError, SpecError), match=r"self-attention alone|of an encoder-decoder"):
            load_adapter(model, tmp_path / folder)
        assert not adapters(model)


def test_attention_stays_as_it_was_without_one() -> None:
    model, x = decoder(), ids(2, 6)
    plain, keys = model(x).logits, list(model.state_dict())
    adapt(model, "prefix")
    assert adapters(model)["default"].count == 20  # type: ignore[attr-defined]
    remove(model)
    assert torch.equal(model(x).logits, plain) and list(model.state_dict()) == keys
