"""LoRA against the formula and against peft, and what every adapter on weights must do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import VOCAB, decoder, peers, stir, tokens
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.adapters import (
    Lora,
    active,
    adapt,
    adapters,
    load_adapter,
    merge,
    merge_and_forget,
    off,
    remove,
    route,
    save_adapter,
    sites,
    trainable,
    unmerge,
    use,
)  # fmt: skip
from dovetail.errors import CheckpointError, ConfigError, RunError, SpecError, UserError
from dovetail.parts.containers import StackModule
from oracles import oracle_for

PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "query and value": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "patterns, which are regular expressions": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1.*_proj": 2, "nothing": 7},
            "alpha_pattern": {"[^q]_proj": 40, "(q|down)_proj": 3},
        },
    ),
    "rslora everywhere": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "own ranks, head": (
        "llama",
        {
            "target_modules": ["k_proj", "down_proj", "lm_head"],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"k_proj": 32},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "up_proj"]}),
    "a pattern": ("llama", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def in_peft(base: Any, options: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


@oracle_for("adapter", "lora")
@pytest.mark.parametrize("case", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_equals_peft_both_ways(case: str, tmp_path: Path) -> None:
    """Its adapter here, ours there; outputs, the gradient of every adapter weight, and a step."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind, options = PEFT[case]
    base, ours = peers(tmp_path / "base", kind)
    theirs = in_peft(base, options)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    x = tokens()
    wanted = theirs(x).logits
    assert torch.allclose(ours(x).logits, wanted, atol=2e-6 * float(wanted.abs().max()) + 1e-6)

    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    assert torch.allclose(again(x).logits, wanted, atol=1e-6)

    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4))
    spec, live = adapters(ours)["default"], {}
    for name, p in ours.named_parameters():
        p.requires_grad_("adapters" in name)
    live = spec.peft_tensors(ours, "default")
    for model in (ours, theirs):
        learn = [p for p in model.parameters() if p.requires_grad]
        step = torch.optim.SGD(learn, lr=0.5)
        (model(x).logits * weights).sum().backward()
        step.step()
    moved = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    assert len(moved) == len(live)
    for name, p in moved.items():
        mine = live[name.removeprefix("base_model.model.")]
        assert torch.allclose(mine, p, atol=1e-5 * float(p.abs().max()) + 1e-6), name


@pytest.mark.parametrize("scaling", ["rank", "sqrt"])
def test_is_the_formula(scaling: Any) -> None:
    """W x + scale B A x on the rows that are meant, in fp64."""
    model = decoder().double()
    adapt(model, Lora(rank=3, alpha=7.0, scaling=scaling, targets=("blocks.1.mixer.qkv:value",)))
    stir(model)
    place = model.blocks[1].mixer.qkv
    low = place.adapters["default"]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    scale = 7.0 / (3 if scaling == "rank" else 3**0.5)
    wanted = x @ place.weight.mT
    wanted[..., 48:64] += scale * (x @ low.a.double().mT @ low.b0.double().mT)
    assert torch.allclose(place(x), wanted, atol=1e-12)
    assert list(trainable(model)) == ["blocks.1.mixer.qkv.adapters.default.a", "blocks.1.mixer.qkv.adapters.default.b0"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [None, ("qkv:query", "down"), ("embedding.table", "out")])
def test_starts_as_identity_merges_and_comes_off(tied: bool, targets: Any) -> None:
    model, x = decoder(tied), tokens()
    bits = {name: p.clone() for name, p in model.named_parameters()}
    before = model(x).logits
    adapt(model, Lora(rank=4, targets=targets))
    assert torch.equal(model(x).logits, before)
    stir(model)
    after = model(x).logits
    assert (after - before).abs().max() > 0.01
    with off(model):
        assert torch.equal(model(x).logits, before)
    merge(model)
    assert torch.allclose(model(x).logits, after, atol=1e-5)
    with pytest.raises(UserError, match="merged"):
        use(model)
    unmerge(model)
    assert torch.equal(model(x).logits, after)
    remove(model)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters()) and not adapters(model)
    adapt(model, Lora(rank=4, targets=targets), name="again")
    stir(model)
    after = model(x).logits
    merge_and_forget(model)
    assert torch.allclose(model(x).logits, after, atol=1e-5)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(bits)


def test_many_on_one_model_and_in_one_batch() -> None:
    model, x = decoder(), tokens(4)
    alone = {None: model(x).logits}
    for i, name in enumerate(("a", "b")):
        use(model)
        adapt(model, Lora(rank=2 + i, targets=("qkv", "gate_up") if i else ("qkv:key", "out")), name=name)
        stir(model, seed=i)
        alone[name] = model(x).logits
    use(model, "a", "b")
    both = model(x).logits
    assert active(model) == ("a", "b") and (both - alone["a"]).abs().max() > 0.01
    with route(model, ["b", None, ["a", "b"], "a"]):
        mixed = model(x).logits
        with pytest.raises(RunError, match="routed"):
            model(x[:3])
    for row, wanted in enumerate((alone["b"], alone[None], both, alone["a"])):
        assert torch.allclose(mixed[row], wanted[row], atol=1e-5)
    assert torch.equal(model(x).logits, both)
    for wrong in (lambda: use(model, "c"), lambda: remove(model, "c"), lambda: route(model, ["c"]).__enter__()):
        with pytest.raises(UserError, match="no adapter 'c'"):
            wrong()
    with pytest.raises(SpecError, match="already"):
        adapt(model, "lora", name="a")


def test_decoding_padding_packing_and_checkpointing() -> None:
    model, x = decoder(), tokens()
    adapt(model, Lora(rank=4))
    stir(model)
    wanted = model(x).logits
    state = model.new_state(2, 12)
    with torch.no_grad():
        steps = [
            model(x[:, :5], state=state).logits,
            *(model(x[:, i : i + 1], state=state).logits for i in range(5, 12)),
        ]
    assert torch.allclose(torch.cat(steps, 1), wanted, atol=1e-5)
    row = torch.cat([x[:1], x[1:]], 1)
    segments = torch.tensor([[0] * 12 + [1] * 12])
    assert torch.allclose(model(row, segments=segments).logits.view(2, 12, -1), wanted, atol=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = torch.arange(15)[None].expand(2, -1) >= 3
    assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], wanted, atol=1e-5)
    weights = torch.randn_like(wanted)
    learn = list(trainable(model).values())
    plain = torch.autograd.grad((model(x).logits * weights).sum(), learn)
    for module in model.modules():
        if isinstance(module, StackModule):
            module.checkpointing = True
    model.train()
    again = torch.autograd.grad((model(x).logits * weights).sum(), learn)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("format", ["peft", "dovetail"])
def test_saved_and_loaded(format: Any, tmp_path: Path) -> None:
    _, model = peers(tmp_path / "base")
    x = tokens()
    adapt(model, Lora(rank=4, targets=("q_proj", "down_proj"), dropout=0.1))
    stir(model)
    wanted = model(x).logits
    save_adapter(model, tmp_path / "adapter", format=format)
    fresh = dt.load(tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter", name="other")
    assert torch.equal(fresh(x).logits, wanted) and not trainable(fresh)
    assert adapters(fresh)["other"].dropout == 0.1  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="adapters stand on this model"):
        dt.save(fresh, tmp_path / "whole")

    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = next(iter(stored))
    for change, word in (
        ({**stored, "more.lora_A.weight": torch.zeros(1)}, "left over"),
        ({k: v for k, v in stored.items() if k != first}, "missing"),
        (stored | {first: torch.zeros(3, 3)}, "has"),
    ):
        save_file(change, tmp_path / "adapter" / "adapter_model.safetensors")
        again = dt.load(tmp_path / "base")
        with pytest.raises(CheckpointError, match=word):
            load_adapter(again, tmp_path / "adapter")
        assert not adapters(again) and not any("adapters" in name for name, _ in again.named_parameters())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = decoder()
    with pytest.raises(SpecError, match="names no weight"):
        adapt(model, Lora(targets=("q_prj",)))
    _, fused = peers(tmp_path / "gpt2", "gpt2")
    with pytest.raises(SpecError, match="share rows"):
        adapt(fused, Lora(targets=("c_attn", "qkv:query")))
    _, tied = peers(tmp_path / "tied", tied=True)
    with pytest.raises(SpecError, match=r"'lm_head' is tied to model.embed_tokens.weight"):
        adapt(tied, Lora(targets=("q_proj", "lm_head")))
    adapt(tied, Lora(targets=("embed_tokens",)))
    with pytest.raises(ConfigError, match="tied"):
        save_adapter(tied, tmp_path / "adapter")
    with pytest.raises(SpecError, match="meets none"):
        adapt(model, Lora(targets=("qkv",), ranks={"gate_up": 3}))
    with pytest.raises(SpecError, match="no field"):
        adapt(model, {"kind": "lora", "rnk": 3})
    assert not adapters(model) and not any("adapters" in name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match="no adapter is active"):
        merge(model)
    _, ours = peers(tmp_path / "base")
    adapt(ours, Lora(rank=2, targets=("q_proj",)))
    save_adapter(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    senseless: list[dict[str, Any]] = [{"lora_alpha": "x"}, {"rank_pattern": 3}, {"r": 2.5}, {"target_modules": 3}]
    for change in (
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "HRA"},
        {"new_thing": 3},
        {"bias": "all"},
        *senseless,
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=next(iter(change))):
            load_adapter(dt.load(tmp_path / "base"), tmp_path / "adapter")


def test_a_load_that_fails_leaves_what_learns_learning(tmp_path: Path) -> None:
    save_adapter(adapt(decoder(depth=3), Lora(rank=2)), tmp_path, format="dovetail")
    for model in (decoder(), adapt(decoder(), Lora(rank=3), name="mine")):
        learning, used = list(trainable(model)), active(model)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_adapter(model, tmp_path)
        assert list(trainable(model)) == learning and learning and active(model) == used


def test_targets_by_every_name(tmp_path: Path) -> None:
    _, model = peers(tmp_path / "base")
    paths = {s.path for s in sites(model, None)}
    assert len(paths) == 8 and not any("head" in p for p in paths)
    for target, count in (("qkv", 6), ("qkv:query", 2), ("q_proj", 2), ("blocks.0.*.*", 7), ("layers.1.mlp.*", 3)):
        assert sum(len(s.segments) for s in sites(model, [target])) == count, target
    assert [s.path for s in sites(model, ["embed_tokens"])] == ["embedding.table"]
    assert model.embedding.table.num_embeddings == VOCAB


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 6])
def test_compiles_whole_with_checkpointing(window: int | None) -> None:
    """One graph with recomputation, no block done twice in the forward, and the gradients of eager."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    masks: dict[str, Any] = {} if window is None else {"mask": {"kind": "window", "size": window}}
    model, x = decoder(depth=2 if window is None else 1, **masks), tokens()
    adapt(model, Lora(rank=4))
    stir(model)
    model.train()
    weights = torch.randn(2, 12, 61)
    learn = list(trainable(model).values())
    plain = torch.autograd.grad((model(x).logits * weights).sum(), learn)
    products: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    for again in (False, True):
        for module in model.modules():
            if isinstance(module, StackModule):
                module.checkpointing = again
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        found = torch.autograd.grad((compiled(x).logits * weights).sum(), learn)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, plain, strict=True))
    forward, backward, forward_again, backward_again = products
    assert forward_again == forward and backward_again > backward
