"""Prompt tuning and P-tuning: vectors before those of the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import promises
import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from test_prefix import VOCAB, P, close, decoder, encoder_decoder, ids, peer, reversible, shaken
from torch import Tensor

import dovetail as dt
from dovetail.adapters import adapt, adapters, load_adapter, merge, off, remove, route, save_adapter, trainable, use
from dovetail.adapters.virtual import flatten
from dovetail.errors import BuildError, CheckpointError, DataError, RunError, SpecError, UserError
from dovetail.objectives.next_token import NextToken
from dovetail.parts.context import Context
from dovetail.parts.virtual import Virtual
from oracles import oracle_for

CONFIGS: dict[str, Any] = {
    "prompt": lambda **more: PromptTuningConfig(num_virtual_tokens=P, prompt_tuning_init="SAMPLE_VOCAB", **more),
    "mlp": lambda **more: PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=12, **more),
    "lstm": lambda **more: PromptEncoderConfig(
        num_virtual_tokens=P, encoder_hidden_size=12, encoder_reparameterization_type="LSTM", **more
    ),
}
SPECS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt", "length": P},
    "mlp": {"kind": "p_tuning", "length": P, "encoder": "mlp", "hidden": 12},
    "lstm": {"kind": "p_tuning", "length": P, "encoder": "lstm", "hidden": 12},
}


def prompted(model: Any, kind: str = "prompt", name: str = "default", **more: Any) -> Any:
    return shaken(adapt(model, SPECS[kind] | more, name=name), name)


def recurrent() -> Any:
    spec = {"kind": "decoder", "vocab": VOCAB, "dim": 16, "depth": 2}
    return dt.build(spec | {"blocks": {"mixer": {"kind": "lstm"}, "feedforward": None}})


def outputs(ours: Any, theirs: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Logits of both for the same tokens: PEFT's stand beside the virtual tokens too."""
    torch.manual_seed(5)
    x, y = ids(2, 9), ids(2, 6)
    if kind == "bart":
        mask = torch.ones_like(x)
        return ours(x, y).logits, theirs(input_ids=x, attention_mask=mask, decoder_input_ids=y).logits
    return ours(x).logits, theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits[:, P:]


@oracle_for("adapter", "prompt")
def test_prompt_equals_the_formula() -> None:
    """The blocks over [P; embed(tokens)] in fp64, and the outputs of the tokens alone."""
    model, x = prompted(decoder()).double(), ids(2, 6)
    vectors = model.front.adapters["default"].weight.expand(2, -1, -1)
    ctx = Context.of(2, P + 6, x.device)
    h = model.run(torch.cat([vectors, model.embedding.table.weight[x]], 1), ctx)[:, P:]
    out = model(x)
    torch.testing.assert_close(out.last_hidden_state, h, rtol=0, atol=1e-13)
    torch.testing.assert_close(out.logits, model.head(h), rtol=0, atol=1e-13)


@oracle_for("adapter", "p_tuning")
@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_p_tuning_equals_the_formula(kind: str) -> None:
    model = prompted(decoder(), kind).double()
    net = model.front.adapters["default"]
    x = net.embedding
    if kind == "lstm":
        lstm = torch.nn.LSTM(32, 12, 2, batch_first=True, bidirectional=True).double()
        lstm.load_state_dict(net.lstm.state_dict())
        x = lstm(x[None])[0][0]
    for i, linear in enumerate(net.maps):
        x = torch.nn.functional.linear(x.clamp_min(0) if i else x, linear.weight, linear.bias)
    torch.testing.assert_close(net.tensors()[0], x, rtol=0, atol=1e-13)
    assert x.shape == (P, 32) and len(net.maps) == (3 if kind == "mlp" else 2)


@oracle_for("adapter", "prompt", "p_tuning")
@pytest.mark.parametrize("method", ["prompt", "mlp", "lstm"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_peft_reads_ours_and_we_read_peft(kind: str, method: str, tmp_path: Path) -> None:
    base = peer(kind).eval()
    base.save_pretrained(tmp_path / "base")
    task = "SEQ_2_SEQ_LM" if kind == "bart" else "CAUSAL_LM"
    theirs = get_peft_model(base, CONFIGS[method](task_type=task)).eval()
    with torch.no_grad():
        for p in theirs.prompt_encoder.parameters():
            p.mul_(3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(dt.load(tmp_path / "base"), tmp_path / "theirs")
    close(*outputs(ours, theirs, kind))
    with off(ours):
        a, b = outputs(ours, theirs, kind)
        assert (a - b).abs().max() > 1e-3
    shaken(ours)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    close(*outputs(ours, again, kind))
    save_adapter(adapt(dt.load(tmp_path / "base"), SPECS[method]), tmp_path / "fresh")
    PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "fresh")


@oracle_for("adapter", "prompt", "p_tuning")
@pytest.mark.parametrize("method", ["prompt", "mlp", "lstm"])
def test_one_training_step_equals_peft(method: str, tmp_path: Path) -> None:
    base = peer("llama")
    base.save_pretrained(tmp_path)
    theirs = get_peft_model(base, CONFIGS[method](task_type="CAUSAL_LM")).train()
    ours = adapt(dt.load(tmp_path), SPECS[method]).train()
    own, other = ours.front.adapters["default"], theirs.prompt_encoder["default"]
    if method == "prompt":
        pairs = [(own.weight, other.embedding.weight)]
    else:
        pairs = [(own.embedding, other.embedding.weight)]
        pairs += list(zip(own.maps.parameters(), other.mlp_head.parameters(), strict=True))
        pairs += list(zip(own.lstm.parameters(), other.lstm_head.parameters(), strict=True)) if own_lstm(own) else []
    for a, b in pairs:
        a.data.copy_(b.data)
    assert {id(p) for p in trainable(ours).values()} == {id(a) for a, _ in pairs}
    sides = ([a for a, _ in pairs], [p for p in theirs.parameters() if p.requires_grad])
    torch.manual_seed(5)
    x = ids(2, 9)
    labels = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    loss = NextToken()(ours, {"tokens": x, "labels": labels}).terms["next_token"]
    (loss.sum / loss.count).backward()
    theirs(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss.backward()  # also cuts the first token's
    first = _first_token_loss(theirs, x)
    for a, b in pairs:
        assert a.grad is not None and b.grad is not None
        close(a.grad * 16, b.grad * 18 - first[id(b)], 1e-4)
        a.grad.copy_(b.grad)
    for parameters in sides:
        torch.optim.AdamW(parameters, lr=1e-2).step()
    for a, b in pairs:
        close(a, b, 1e-6)


def own_lstm(module: Any) -> bool:
    return getattr(module, "lstm", None) is not None


def _first_token_loss(theirs: Any, x: Tensor) -> dict[int, Tensor]:
    """Gradients of what PEFT counts and we do not: the last virtual token predicts the first token of a row."""
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    logits = theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits[:, P - 1]
    loss = torch.nn.functional.cross_entropy(logits, x[:, 0], reduction="sum")
    return {id(p): g for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)}


MODELS = {
    "rope": decoder,
    "t5": lambda: decoder({"kind": "t5_buckets", "buckets": 8, "max_distance": 9}),
    "window": lambda: decoder(mask={"kind": "window", "size": 5}),
    "rerope": lambda: decoder({"kind": "rerope", "window": 3}),
    "lstm": recurrent,
    "reversible": reversible,
}


@pytest.mark.parametrize("which", list(MODELS))
def test_from_a_text_it_equals_having_read_it(which: str) -> None:
    model, text, rest = MODELS[which]().eval(), ids(1, P), ids(2, 9)
    wanted = model(torch.cat([text.expand(2, -1), rest], 1)).logits[:, P:]
    adapt(model, {"kind": "prompt", "tokens": text[0].tolist()})
    plain = model(rest)
    assert plain.last_hidden_state.shape[:2] == rest.shape
    close(plain.logits, wanted)
    (grads,) = torch.autograd.grad(plain.logits.square().mean(), list(trainable(model).values()))
    packed = model(rest.view(1, 18), segments=torch.tensor([[0] * 9 + [1] * 9])).logits.view(2, 9, -1)
    close(packed, wanted)
    close(torch.autograd.grad(packed.square().mean(), list(trainable(model).values()))[0], grads, 1e-5)
    zeros, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(rest)
    for order in ((0, 1), (1, 0)):
        mask = torch.cat([(zeros, ones)[i] for i in order], 1)
        out = model(torch.cat([(zeros, rest)[i] for i in order], 1), attention_mask=mask).logits
        close(out[mask.bool()].view(wanted.shape), wanted)
    with torch.no_grad():
        state = model.new_state(2, 9)
        parts = [model(rest[:, :3], state=state).logits]
        kept = state.snapshot()
        parts += [model(rest[:, i : i + 1], state=state).logits for i in range(3, 9)]
        close(torch.cat(parts, 1), wanted)
        kept.reorder(torch.tensor([1, 1, 0]))
        close(model(rest[[1, 1, 0], 3:5], state=kept).logits, wanted[[1, 1, 0], 3:5])
        if which in ("rope", "t5"):
            state.truncate(0)
            close(model(rest[:, :6], state=state).logits, wanted[:, :6])
    with off(model):
        assert (model(rest).logits - wanted).abs().max() > 1e-3


def test_packed_rows_of_every_shape() -> None:
    """Padding between, inside and around documents, hidden tokens, hidden documents, positions that are given."""
    model = prompted(decoder())
    x = ids(2, 12)
    segments = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 0, 0, 0, -1, -1], [7, 7, 7, 7, 7, 7, -1, 7, 7, 3, 3, 3]])
    mask = torch.tensor([[1] * 12, [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]])
    out = model(x, segments=segments, attention_mask=mask).logits
    assert out.shape == (2, 12, VOCAB)
    for row, picks in ((0, [1, 2, 3]), (0, [5, 6]), (0, [7, 8, 9]), (1, [0, 1, 2, 4, 5, 7, 8])):
        close(out[row, picks], model(x[row, picks][None]).logits[0])
    segments, places = torch.tensor([[0] * 5 + [1] * 7]), torch.cat([torch.arange(5), torch.arange(7)])[None]
    counted = model(x[:1], segments=segments).logits
    for positions in (places, places[..., None]):
        close(model(x[:1], segments=segments, positions=positions).logits, counted)
    close(model(x, positions=torch.arange(12)[None]).logits, model(x).logits)
    moved = model(x, positions=3 * torch.arange(12).expand(2, -1)).logits
    assert (moved - model(x).logits).abs().max() > 1e-3


def test_what_every_adapter_promises(tmp_path: Path) -> None:
    promises.check(promises.decoder(), SPECS["lstm"] | {"length": 3}, tmp_path, identity=False, compiled=False)


def test_rows_with_other_prompts_or_none() -> None:
    model, x = decoder(), ids(4, 6)
    plain = model(x).logits
    prompted(model, name="a", length=3)
    shaken(adapt(model, {"kind": "p_tuning", "length": 5, "encoder": "mlp"}, name="b"), "b")
    shaken(adapt(model, {"kind": "prefix", "length": 2}, name="c"), "c")
    alone = {}
    for names in (("a",), ("b",), ("a", "b", "c")):
        use(model, *names)
        alone[names] = model(x).logits
        assert (alone[names] - plain).abs().max() > 1e-3
    chosen: list[Any] = [("a", "b", "c"), "b", None, "a"]
    wanted = [alone["a", "b", "c"][0], alone[("b",)][1], plain[2], alone[("a",)][3]]
    with route(model, chosen):
        segments = torch.tensor([[0] * 3 + [1] * 3] * 4)
        packed = model(x, segments=segments).logits
        whole = model(x).logits
        with torch.no_grad():
            state = model.new_state(4, 6)
            steps = torch.cat([model(part, state=state).logits for part in x.split([2, 1, 3], 1)], 1)
        with pytest.raises(RunError, match="different numbers of virtual tokens"):
            state.truncate(1)
        with pytest.raises(RunError, match="routed as 4"):
            model(x[:2])
    for row, logits in enumerate(wanted):
        close(whole[row], logits)
        close(steps[row], logits)
        close(packed[row, :3], logits[:3])
    use(model, "b")
    close(packed[1, 3:], model(x[1:2, 3:]).logits[0])
    for name in "abc":
        remove(model, name)
    assert torch.equal(model(x).logits, plain)


def test_encoder_decoders_read_it_before_their_source() -> None:
    model, text, x, y = encoder_decoder(), ids(1, P), ids(2, 7), ids(2, 5)
    wanted = model(torch.cat([text.expand(2, -1), x], 1), y)
    adapt(model, {"kind": "prompt", "tokens": text[0].tolist()})
    out = model(x, y)
    close(out.logits, wanted.logits)
    close(out.encoder_last_hidden_state, wanted.encoder_last_hidden_state[:, P:])
    assert model.encode(x).shape == (2, 7, 32)
    mask = torch.tensor([[0] * 2 + [1] * 7] * 2)
    close(model(torch.cat([x[:, :2], x], 1), y, attention_mask=mask).logits, wanted.logits)
    with torch.no_grad():
        state = model.new_state(2, 5)
        model.encode(x, state=state)
        close(torch.cat([model.decode(part, state=state).logits for part in y.split(2, 1)], 1), wanted.logits)
    made = dt.generate(model, None, x, max_new_tokens=3, beams=3)
    with off(model):
        assert torch.equal(
            dt.generate(model, None, torch.cat([text.expand(2, -1), x], 1), max_new_tokens=3, beams=3), made
        )


def test_generation_goes_on_from_the_prompt() -> None:
    model, text, x = decoder().eval(), ids(1, P), [[3, 4, 5], [6, 7]]
    longer = [[*text[0].tolist(), *row] for row in x]
    wanted = [dt.generate(model, None, longer, max_new_tokens=4, temperature=0, beams=b) for b in (1, 3)]
    adapt(model, {"kind": "prompt", "tokens": text[0].tolist()})
    for beams, tokens in zip((1, 3), wanted, strict=True):
        assert torch.equal(dt.generate(model, None, x, max_new_tokens=4, temperature=0, beams=beams), tokens)


def test_labels_stand_beside_the_tokens_alone() -> None:
    model, x = prompted(decoder()), ids(2, 6)
    labels = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    found = NextToken()(model, {"tokens": x, "labels": labels}).terms["next_token"]
    wanted = torch.nn.functional.cross_entropy(
        model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum"
    )
    assert int(found.count) == 10
    close(found.sum, wanted)


def test_starts() -> None:
    model = decoder()
    table = model.embedding.table.weight
    weight = adapt(model, {"kind": "prompt", "length": 7}).front.adapters["default"].weight
    assert all(any(torch.equal(row, known) for known in table) for row in weight)
    other = adapt(decoder(), {"kind": "prompt", "length": 7}, seed=1).front.adapters["default"].weight
    assert not torch.equal(weight, other)
    normal = adapt(decoder(), {"kind": "prompt", "length": 400, "start": "normal"}).front.adapters["default"].weight
    assert abs(float(normal.detach().std()) - 1) < 0.03
    text = adapt(decoder(), {"kind": "prompt", "tokens": [3, 4], "length": 5}).front.adapters["default"].weight
    assert torch.equal(text, table[[3, 4, 3, 4, 3]])
    assert adapters(adapt(decoder(), "prompt"))["default"].count == 20  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_flattened_it_is_exactly_the_same(kind: str, tmp_path: Path) -> None:
    model, x = prompted(decoder(), kind).eval(), ids(2, 6)
    wanted, named = model(x).logits, set(trainable(model))
    flatten(model)
    assert torch.equal(model(x).logits, wanted) and set(trainable(model)) == {"front.adapters.default.weight"} != named
    for format in ("peft", "dovetail"):
        save_adapter(model, tmp_path / format, format=format)  # type: ignore[arg-type]
    assert torch.equal(load_adapter(decoder(), tmp_path / "dovetail")(x).logits, wanted)
    with pytest.raises(UserError, match="no reparametrisation"):
        flatten(model)


def test_the_dropout_of_the_lstm_is_for_training() -> None:
    model, x = prompted(decoder(), "lstm", dropout=0.5), ids(2, 6)
    assert not torch.equal(model.train()(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)


def test_refusals(tmp_path: Path) -> None:
    model = prompted(decoder())
    bare: Any = type("Bare", (Virtual,), {})
    with pytest.raises(TypeError, match="abstract method"):
        bare()
    with pytest.raises(BuildError, match="not a change of weights"):
        merge(model)
    with pytest.raises(UserError, match="no reparametrisation"):
        flatten(model)
    with pytest.raises(UserError, match="no adapter 'other'"):
        flatten(model, "other")
    for wrong in (
        {"encoder": "mlp", "layers": 2},
        {"encoder": None, "hidden": 3},
        {"tokens": [3]},
        {"layers": 1, "dropout": 0.1},
    ):
        with pytest.raises(SpecError):
            adapt(decoder(), {"kind": "p_tuning"} | wrong)
    with pytest.raises(DataError, match="for a vocabulary of 61"):
        adapt(decoder(), {"kind": "prompt", "tokens": [VOCAB]})
    save_adapter(model, tmp_path, format="dovetail")
    narrow = dt.build({"kind": "decoder", "vocab": VOCAB, "dim": 16, "depth": 1, "blocks": {"mixer": "attention"}})
    with pytest.raises(CheckpointError):
        load_adapter(narrow, tmp_path)
    learned = {"kind": "decoder", "vocab": VOCAB, "dim": 16, "depth": 1, "context": 16, "position": "learned"}
    short = adapt(dt.build(learned | {"blocks": {"mixer": {"kind": "attention", "position": "none"}}}), SPECS["prompt"])
    assert short(ids(1, 12)).logits.shape[1] == 12
    with pytest.raises(DataError, match="beyond the learned table"):
        short(ids(1, 13))
    with pytest.raises(BuildError, match="learned position table ends at 16"):
        short.new_state(1, 13)
