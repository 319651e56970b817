"""The starts of LoRA, DoRA, AdaLoRA and LoRA+: against peft, against their formulas, and the promises of every adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import VOCAB, decoder, peers, stir, tokens
from promises import check
from torch import Tensor

import dovetail as dt
from dovetail.adapters import (
    Lora,
    adapt,
    adapters,
    load_adapter,
    merge,
    merge_and_forget,
    off,
    remove,
    route,
    save_adapter,
    trainable,
    unmerge,
    use,
)
from dovetail.adapters.adalora import Adalora, Triplets, triplets
from dovetail.adapters.combine import combine
from dovetail.adapters.dora import Dora
from dovetail.adapters.many import reads_gradients
from dovetail.adapters.starts import Loftq, Orthogonal, Pissa
from dovetail.errors import BuildError, ConfigError, SpecError
from dovetail.parts.storage.int8 import Int8
from dovetail.parts.storage.nf4 import Nf4
from dovetail.training import fit
from dovetail.training.loop import Run
from dovetail.training.optim import adamw
from dovetail.training.recipe import Recipe
from dovetail.training.setup import set_up
from models.peers import randomise
from oracles import oracle_for
from training.small import recipe

pytestmark = pytest.mark.filterwarnings("ignore")
QKV = ("q_proj", "v_proj", "down_proj")


def of_peft(base: Any, config: Any) -> Any:
    from peft import get_peft_model

    torch.manual_seed(0)
    return get_peft_model(base, config)


def of_peft_at(folder: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()


def stir_peft(model: Any, spread: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" in name:
                p.add_(spread * torch.randn(p.shape, generator=generator))


def learn(model: Any) -> None:
    """What a loaded adapter holds is trainable again."""
    for name, p in model.named_parameters():
        p.requires_grad_(".adapters." in name)


def near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    assert ours.shape == theirs.shape, what
    worst, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert worst <= tolerance * max(size, 1e-3), f"{what}: {worst} of {size}"


def same_step(ours: Any, theirs: Any) -> None:
    """Gradients and the parameters after a step of SGD, under PEFT's names."""
    learn(ours)
    x = tokens()
    weights = torch.randn(2, 12, VOCAB, generator=torch.Generator().manual_seed(4))
    for model in (ours, theirs):
        step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        (model(x).logits * weights).sum().backward()
        step.step()
    live = adapters(ours)["default"].peft_tensors(ours, "default")
    moved = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n and p.requires_grad}
    moved = {n.replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in moved.items()}
    assert len(moved) == len(live)
    for name, p in moved.items():
        near(live[name.removeprefix("base_model.model.")], p, 2e-5, name)


# Starts


@oracle_for("lora_init", "uniform", "gaussian", "orthogonal")
@pytest.mark.parametrize(("start", "peft"), [("uniform", True), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")])
def test_starts_are_drawn_as_peft_draws_them(start: str, peft: Any, tmp_path: Path) -> None:
    """Mean, spread and shape of A and B over many entries; B A is zero; PEFT's config says it."""
    from peft import LoraConfig

    theirs, ours = peers(tmp_path / "base")
    before = ours(tokens()).logits
    adapt(ours, Lora(rank=16, targets=("down_proj", "gate_proj"), start=start))  # type: ignore[arg-type]
    theirs = of_peft(theirs, LoraConfig(r=16, target_modules=["down_proj", "gate_proj"], init_lora_weights=peft))
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    near(ours(tokens()).logits, before, 0.0 if start != "orthogonal" else 1e-5)
    drawn = adapters(ours)["default"].peft_tensors(ours, "default")
    for leaf in ("down_proj.lora_A", "gate_proj.lora_A", "down_proj.lora_B"):
        a = torch.cat([t.flatten() for n, t in drawn.items() if leaf in n])
        b = torch.cat([t.flatten() for n, t in named.items() if leaf in n])
        assert a.shape == b.shape and abs(float(a.std() - b.std())) <= 0.12 * float(b.std()), leaf
        assert abs(float(a.mean())) <= 4 * float(b.std()) / len(b) ** 0.5, leaf
        if start == "uniform" and "lora_A" in leaf:
            width = {"d": 48, "g": 32}[leaf[0]]
            assert 0.9 * width**-0.5 < float(a.abs().max()) <= width**-0.5
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["init_lora_weights"] == peft
    load_adapter(dt.load(tmp_path / "base"), tmp_path / "ours")


def test_orthogonal_start_has_orthogonal_halves() -> None:
    model = decoder()
    adapt(model, Lora(rank=6, start=Orthogonal(), targets=("down",)))
    for a, b in (model.blocks[i].feedforward.down.adapters["default"].pairs()[0] for i in (0, 1)):
        assert float((b @ a).abs().max()) < 1e-6 < float(b.abs().max())
    with pytest.raises(BuildError, match="odd"):
        adapt(model, Lora(rank=3, start=Orthogonal()), name="b")
    assert list(adapters(model)) == ["default"]


@oracle_for("lora_init", "pissa")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pissa_equals_peft(kind: str, tmp_path: Path) -> None:
    """One step from the same start (singular vectors up to their signs), and both directions of interchange."""
    from peft import LoraConfig

    base, ours = peers(tmp_path / "base", kind)
    x, targets = tokens(), list(QKV) if kind == "llama" else ["c_attn", "c_fc"]
    before = ours(x).logits
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = of_peft(base, config).eval()
    theirs.save_pretrained(tmp_path / "begun")
    adapt(ours, Lora(rank=4, alpha=8.0, targets=tuple(targets), start=Pissa()))
    assert torch.equal(ours(x).logits, before)
    near(theirs(x).logits, before, 2e-5)

    started = adapters(ours)["default"].peft_tensors(ours, "default")
    for name, p in theirs.named_parameters():
        if "lora_A" in name:
            a, b = (
                name.removeprefix("base_model.model.").replace(".default", "").replace("lora_A", leaf)
                for leaf in ("lora_A", "lora_B")
            )
            other = theirs.get_parameter(name.replace("lora_A", "lora_B"))
            near(started[b] @ started[a], other @ p, 2e-5, name)
            near((started[a] * p).sum(1).abs(), p.square().sum(1), 1e-3, name)
    load_adapter(dt.load(tmp_path / "base"), tmp_path / "begun")
    unconverted = dt.load(tmp_path / "base")
    load_adapter(unconverted, tmp_path / "begun")
    assert isinstance(adapters(unconverted)["default"].start, Pissa)  # type: ignore[attr-defined]
    near(unconverted(x).logits, before, 2e-5)
    same_step(unconverted, theirs)
    near(unconverted(x).logits, theirs(x).logits, 5e-5)

    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    plain = dt.load(tmp_path / "base")
    load_adapter(plain, tmp_path / "converted")
    assert adapters(plain)["default"].rank == 8  # type: ignore[attr-defined]
    near(plain(x).logits, theirs(x).logits, 5e-5)


@pytest.mark.parametrize("scaling", ["rank", "sqrt"])
def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank(scaling: Any, tmp_path: Path) -> None:
    _, model = peers(tmp_path / "base")
    x, before = tokens(), model(tokens()).logits
    fields: dict[str, Any] = {"ranks": {"v_proj": 2}, "alphas": {"q_proj": 3.0}, "targets": QKV, "scaling": scaling}
    adapt(model, Lora(rank=4, alpha=6.0, start=Pissa(), **fields))
    stir(model, 0.05)
    after = model(x).logits
    near(before, before)
    save_adapter(model, tmp_path / "saved")
    said = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert said["r"] == 8 and said["init_lora_weights"] is True
    near(of_peft_at(tmp_path / "base", tmp_path / "saved")(x).logits, after, 2e-5)
    again = dt.load(tmp_path / "base")
    load_adapter(again, tmp_path / "saved")
    near(again(x).logits, after, 2e-5)
    save_adapter(model, tmp_path / "own", format="dovetail")
    exact = dt.load(tmp_path / "base")
    load_adapter(exact, tmp_path / "own")
    assert torch.equal(exact(x).logits, after)


def test_pissa_formula_and_fast_svd() -> None:
    """Per map of a fused weight: B A = the best of its rank (Eckart-Young), W − s B₀A₀ + s B A acts, W keeps its bits."""
    model = decoder()
    place = model.blocks[0].mixer.qkv
    w = place.weight.detach().clone()
    adapt(model, Lora(rank=3, alpha=6.0, start=Pissa(), targets=("qkv",)))
    low = place.adapters["default"]
    for (a, b), (start, stop) in zip(low.pairs(), low.segments, strict=True):
        u, s, vh = torch.linalg.svd(w[start:stop].double())
        near(2 * b.double() @ a.double(), (u[:, :3] * s[:3]) @ vh[:3], 1e-5)
    begun = [(a.detach().clone(), b.detach().clone()) for a, b in low.pairs()]
    stir(model)
    x = torch.randn(2, 5, 32)
    acting = w.clone()
    for (a, b), (a0, b0), (start, stop) in zip(low.pairs(), begun, low.segments, strict=True):
        acting[start:stop] += 2 * (b @ a - b0 @ a0).detach()
    near(place(x), x @ acting.mT, 2e-5)
    near(place.matrix(), acting, 1e-5)
    assert torch.equal(place.weight, w)
    remove(model)
    adapt(model, Lora(rank=3, alpha=6.0, start=Pissa(niter=8), targets=("qkv",)))
    again = place.adapters["default"]
    for (a, b), (a0, b0) in zip(again.pairs(), begun, strict=True):
        near(b @ a, b0 @ a0, 1e-3)
    with pytest.raises(BuildError, match="singular values"):
        adapt(model, Lora(rank=20, start=Pissa(), targets=("qkv:key",)), name="b")
    with pytest.raises(BuildError, match="lookup table"):
        adapt(model, Lora(rank=2, start=Pissa(), targets=("embedding.table",)), name="b")


def test_pissa_is_combined_with_others() -> None:
    """What a PiSSA adapter adds to the weight as it was is what counts, not its A and B alone."""
    model, x = decoder(), tokens()
    for name, start in (("a", "pissa"), ("b", "uniform")):
        adapt(model, Lora(rank=2, start=start), name=name)  # type: ignore[arg-type]
        stir(model)
    both = model(x).logits
    combine(model, {"a": 1.0, "b": 1.0}, method="cat", into="c")
    use(model, "c")
    near(model(x).logits, both, 2e-5)


def test_pissa_stands_on_a_quantised_weight_and_beside_others() -> None:
    model, x = decoder(), tokens()
    model.blocks[0].mixer.qkv.keep(Nf4())
    before = model(x).logits
    adapt(model, Lora(rank=2, start=Pissa()), name="a")
    adapt(model, Lora(rank=2), name="b")
    assert torch.equal(model(x).logits, before)
    stir(model)
    both = model(x).logits
    with route(model, [None, ["a", "b"]]):
        rows = model(x).logits
    near(rows[0], before[0], 1e-5)
    near(rows[1], both[1], 1e-5)
    with off(model):
        assert torch.equal(model(x).logits, before)
    merge(model)
    near(model(x).logits, both, 2e-5)
    unmerge(model)
    assert torch.equal(model(x).logits, both)


@oracle_for("lora_init", "loftq")
@pytest.mark.parametrize("storage", [Nf4(double=False, block=32), Nf4(block=32), Int8()])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_algorithm(storage: Any, iterations: int) -> None:
    """Algorithm 1 in fp64, map by map; nearer to the weight than quantising alone; the original comes back bit for bit."""
    model, x = decoder(), tokens()
    place = model.blocks[1].mixer.qkv
    original, before = place.weight, model(x).logits
    w = original.detach().double().clone()
    start = Loftq(storage=storage, iterations=iterations)
    adapt(model, Lora(rank=4, alpha=12.0, start=start, targets=("qkv", "down")))
    bounds = [(0, 32), (32, 48), (48, 64)]
    low = torch.zeros_like(w)
    for _ in range(iterations):
        q = storage.store((w - low).float()).dense().double()
        for a, b in bounds:
            u, s, vh = torch.linalg.svd((w - q)[a:b])
            low[a:b] = (u[:, :4] * s[:4]) @ vh[:4]
    assert place.weight is None
    # fp32 and fp64 may put a weight on either side of a quantiser's edge: nearly all must agree.
    assert ((place.stored.dense() - q).abs() < 1e-5).double().mean() > 0.995
    acting = place.matrix().detach().double()
    near(acting, q + low, 2e-2 if iterations > 1 else 1e-5)
    assert (acting - w).norm() < 0.95 * (storage.store(w.float()).dense() - w).norm()
    assert (model(x).logits - before).abs().max() > 1e-5
    stir(model)
    after = model(x).logits
    merge(model)
    near(model(x).logits, after, 2e-5)
    unmerge(model)
    assert torch.equal(model(x).logits, after)
    remove(model)
    assert place.weight is original and torch.equal(place.weight.double(), w)
    assert torch.equal(model(x).logits, before)


def test_loftq_saved_forgotten_and_refused(tmp_path: Path) -> None:
    _, model = peers(tmp_path / "base")
    x = tokens()
    adapt(model, Lora(rank=4, start="loftq"))  # type: ignore[arg-type]
    stir(model, 0.05)
    after = model(x).logits
    with pytest.raises(ConfigError, match="quantised base"):
        save_adapter(model, tmp_path / "peft")
    save_adapter(model, tmp_path / "own", format="dovetail")
    again = dt.load(tmp_path / "base")
    load_adapter(again, tmp_path / "own")
    assert torch.equal(again(x).logits, after)
    with pytest.raises(BuildError, match="quantised already"):
        adapt(model, Lora(rank=2, start=Loftq()), name="b")
    adapt(model, Lora(rank=2, targets=("q_proj",)), name="b")
    with pytest.raises(BuildError, match="remove those first"):
        remove(model, "default")
    near(model(x).logits, after, 0.0)
    remove(model, "b")
    merge_and_forget(model)
    near(model(x).logits, after, 2e-5)
    assert not adapters(model) and all(m.weight is not None for m in model.modules() if isinstance(m, torch.nn.Linear))
    fresh = dt.load(tmp_path / "base")
    bits = {n: p.clone() for n, p in fresh.named_parameters()}
    for refused, why in ((("q_proj", "down_proj"), "only some"), (("embed_tokens",), "lookup")):
        with pytest.raises(BuildError, match=why):
            adapt(fresh, Lora(rank=2, start=Loftq(), targets=refused))
    assert all(torch.equal(p, bits[n]) for n, p in fresh.named_parameters())
    adapt(fresh, Lora(rank=2, targets=("down_proj",)), name="first")
    with pytest.raises(BuildError, match="on first"):
        adapt(fresh, Lora(rank=2, start=Loftq()))


@pytest.mark.parametrize("said", ["olora", "pissa_niter_4", "loftq", 3])
def test_starts_that_changed_the_base_are_not_read(said: Any, tmp_path: Path) -> None:
    _, model = peers(tmp_path / "base")
    adapt(model, Lora(rank=2, targets=("q_proj",)))
    save_adapter(model, tmp_path / "saved")
    file = tmp_path / "saved/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": said}))
    with pytest.raises(ConfigError, match="init_lora_weights"):
        load_adapter(model, tmp_path / "saved", name="b")


# DoRA


@oracle_for("adapter", "dora")
@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", QKV), ("llama", ("embed_tokens", "k_proj")), ("gpt2", ("c_attn", "c_fc"))]
)
def test_dora_equals_peft_both_ways(kind: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    from peft import LoraConfig

    base, ours = peers(tmp_path / "base", kind)
    x, before = tokens(), ours(tokens()).logits
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), use_dora=True, task_type="CAUSAL_LM")
    theirs = of_peft(base, config).eval()
    stir_peft(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    load_adapter(ours, tmp_path / "theirs")
    assert type(adapters(ours)["default"]) is Dora
    near(ours(x).logits, theirs(x).logits)
    assert (ours(x).logits - before).abs().max() > 1e-3
    save_adapter(ours, tmp_path / "ours")
    near(of_peft_at(tmp_path / "base", tmp_path / "ours")(x).logits, theirs(x).logits)
    merge(ours)
    near(ours(x).logits, theirs(x).logits, 2e-5)
    unmerge(ours)
    same_step(ours, theirs)
    near(ours(x).logits, theirs(x).logits, 5e-5)


@pytest.mark.parametrize("start", ["uniform", "pissa", "loftq"])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_the_formula(start: str, bias: bool) -> None:
    """m (W + s B A) / ‖·‖ + b in fp64, map by map; its gradients with the norm held; the start exactly the model."""
    model = decoder(bias="qkv") if bias else decoder()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    if start != "loftq":
        model.double()
    place, x = model.blocks[0].mixer.qkv, torch.randn(2, 5, 32, dtype=torch.float64)
    assert (place.bias is not None) == bias
    before = place(x.to(place.weight.dtype))
    adapt(model, Dora(rank=3, alpha=6.0, start=start, targets=("qkv",)))  # type: ignore[arg-type]
    low, dtype = place.adapters["default"], place.dtype
    if start != "loftq":
        assert torch.equal(place(x.to(dtype)), before)
    base = place.dense().detach().double().clone()
    if start == "pissa":
        for (a, b), (lo, hi) in zip(low.pairs(), low.segments, strict=True):
            base[lo:hi] -= 2 * b.detach().double() @ a.detach().double()
    stir(model)
    y = place(x.to(dtype))
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), [low.a, *low.bs, *low.ms])
    a = low.a.detach().double().requires_grad_()
    bs = [b.detach().double().requires_grad_() for b in low.bs]
    ms = [m.detach().double().requires_grad_() for m in low.ms]
    rows = []
    for (lo, hi), part, b, m in zip(low.segments, a.split(3), bs, ms, strict=True):
        v = base[lo:hi] + 2 * b @ part
        rows.append(m[:, None] * v / v.detach().square().sum(1, keepdim=True).sqrt())
    wanted = x @ torch.cat(rows).mT + (0 if place.bias is None else place.bias.detach().double())
    near(y.double(), wanted, 2e-5)
    for ours, exact in zip(got, torch.autograd.grad((wanted * weights.double()).sum(), [a, *bs, *ms]), strict=True):
        near(ours.double(), exact, 2e-5)
    merged, _ = low.merged(place.dense(), place.bias)
    near(merged.double(), torch.cat(rows), 2e-5)


def test_dora_around_another_and_on_codes() -> None:
    """Merged and unmerged agree where adapters stand around each other, and on a quantised weight."""
    model, x = decoder(), tokens()
    model.blocks[0].mixer.qkv.keep(Nf4())
    adapt(model, Lora(rank=2), name="a")
    stir(model)
    adapt(model, Dora(rank=2, targets=("qkv:value", "down", "out")), name="b")
    stir(model)
    after = model(x).logits
    merge(model)
    near(model(x).logits, after, 2e-5)
    unmerge(model)
    assert torch.equal(model(x).logits, after)
    twin = copy.deepcopy(model)
    assert twin.blocks[0].mixer.out.adapters["b"].place[0] is twin.blocks[0].mixer.out
    assert torch.equal(twin(x).logits, after)
    assert all(n.split(".")[-1][0] in "abm" for n in trainable(model))


def test_dora_on_rows_that_are_zero() -> None:
    """Pruned rows, and the added layers of `grow_depth`, have no length to divide by: the model as it was, and it learns."""
    model, x = decoder(), tokens()
    with torch.no_grad():
        model.blocks[0].mixer.out.weight.zero_()
        model.blocks[1].mixer.qkv.weight[3:5] = 0.0
        model.embedding.table.weight[:, 7] = 0.0
    before = model(x).logits
    adapt(model, Dora(rank=2, targets=("out", "qkv", "embedding.table")))
    assert torch.equal(model(x).logits, before)
    model(x).logits.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in trainable(model).values() if p.grad is not None)
    assert model.blocks[0].mixer.out.adapters["default"].b0.grad.any()
    stir(model)
    after = model(x).logits
    assert after.isfinite().all()
    near(merge(model)(x).logits, after, 2e-5)


def test_bf16_starts_are_exactly_the_model() -> None:
    x = tokens()
    for spec in (
        Lora(rank=3, start=Pissa()),
        Dora(rank=3),
        Dora(rank=3, start=Pissa()),
        Adalora(rank=3, target_rank=1),
    ):
        model = decoder().bfloat16()
        before = model(x).logits
        adapt(model, spec)
        assert torch.equal(model(x).logits, before) and all(p.dtype == torch.float32 for p in trainable(model).values())
    model = decoder().bfloat16()
    adapt(model, Lora(rank=3, start=Loftq()))
    assert model(x).logits.dtype == torch.bfloat16 == model.blocks[0].mixer.qkv.stored.dense().dtype


# AdaLoRA


ADA: dict[str, Any] = {"tinit": 1, "tfinal": 2, "deltaT": 2, "beta1": 0.8, "beta2": 0.9, "orth_reg_weight": 0.3}


def ada_peers(folder: Path) -> tuple[Any, Any]:
    from peft import AdaLoraConfig

    base, ours = peers(folder)
    config = AdaLoraConfig(
        init_r=5, target_r=2, lora_alpha=16, target_modules=list(QKV), total_step=9, task_type="CAUSAL_LM", **ADA
    )
    theirs = of_peft(base, config)
    stir_peft(theirs)
    theirs.save_pretrained(folder / "begun")
    load_adapter(ours, folder / "begun")
    learn(ours)
    return theirs, ours


@oracle_for("adapter", "adalora")
def test_adalora_trains_as_peft(tmp_path: Path) -> None:
    """Outputs, penalty, gradients, and nine steps of allocating; then both directions of interchange when pruned."""
    theirs, ours = ada_peers(tmp_path)
    spec: Any = adapters(ours)["default"]
    assert isinstance(spec, Adalora) and (spec.rank, spec.target_rank, spec.warmup, spec.final) == (5, 2, 1, 2)
    x = tokens()
    near(ours(x).logits, theirs(x).logits)
    named = {n.replace(".default", "").removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    steps = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (ours, theirs)]
    seen = []
    for step in range(1, 10):
        batch = tokens(seed=step)
        logits = ours(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        penalty = spec.penalty(ours, "default")
        their_loss = theirs(batch, labels=batch).loss  # with the penalty in it
        near(loss + penalty, their_loss, 1e-5, f"loss {step}")
        (loss + penalty).backward()
        their_loss.backward()
        for optimizer in steps:
            optimizer.step()
        for name, tensor in spec.peft_tensors(ours, "default").items():
            near(tensor, named[name], 2e-4, f"{name} after step {step}")
        spec.after_backward(ours, "default", step, 9)
        theirs.base_model.update_and_allocate(step)
        allocator = theirs.base_model.rankallocator
        for mark, means in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
            for name, mean in means.items():  # none from the last allocation on
                site, leaf = name.removesuffix(".default").removeprefix("base_model.model.").split(".lora_")
                module, i = spec._stored(ours, "default")[site]
                key = {"A": "a", "E": "e", "B": f"b{i}"}[leaf]
                mine = module.get_buffer(f"{key}_{mark}")
                mine = mine if leaf == "B" else mine.split(module.ranks)[i]
                near(mine.view(mean.shape), mean, 1e-3, f"{name} {mark} after step {step}")
        live = spec.peft_tensors(ours, "default")
        standing = [bool(v) for n, t in live.items() if n.endswith("lora_E") for v in t.flatten() != 0]
        wanted = [bool(v) for n in live if n.endswith("lora_E") for v in named[n].flatten() != 0]
        assert standing == wanted, step
        seen.append(sum(standing))
        for optimizer in steps:
            optimizer.zero_grad()
    assert seen[0] == 30 and 12 < seen[3] < seen[1] < 30 and seen[6:] == [12] * 3, seen
    ours.eval(), theirs.eval()
    near(ours(x).logits, theirs(x).logits, 1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    again = dt.load(tmp_path)
    load_adapter(again, tmp_path / "theirs")
    near(again(x).logits, theirs(x).logits, 1e-5)
    assert sum(sum(m.ranks) for m in triplets(again, "default")) == 12
    for model, name in ((ours, "ours"), (again, "again")):
        save_adapter(model, tmp_path / name)
        said = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert sum(map(sum, said["rank_pattern"].values())) == 12
        near(of_peft_at(tmp_path, tmp_path / name)(x).logits, model(x).logits, 1e-5)


def test_adalora_formula() -> None:
    """Eq. 3, 8-11 in fp64 on one place of three maps."""
    model = decoder().double()
    adapt(model, Adalora(rank=3, alpha=6.0, targets=("qkv",), orthogonality=1.0, beta1=0.7, beta2=0.6))
    stir(model)
    place = model.blocks[0].mixer.qkv
    module: Triplets = place.adapters["default"]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    delta = torch.cat([p.double() @ torch.diag(e.double()) @ q.double() for q, e, p in map(module.triplet, range(3))])
    near(place(x), x @ (place.weight + 6 / (3 + 1e-5) * delta).mT, 1e-6)
    near(place.matrix(), place.weight + 6 / (3 + 1e-5) * delta, 1e-6)
    eye = torch.eye(3)
    every = triplets(model, "default")
    norms = [
        (g - eye).square().sum().sqrt()
        for m in every
        for q, _, p in map(m.triplet, range(3))
        for g in (q @ q.T, p.T @ p)
    ]
    near(adapters(model)["default"].penalty(model, "default"), torch.stack(norms).mean(), 1e-6)  # type: ignore[arg-type]
    want: dict[str, list[Tensor]] = {}
    for step in range(3):
        for key, p in module.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            now = (p * p.grad).abs().detach().double()
            mean, stray = want.get(key, [torch.zeros_like(now), torch.zeros_like(now)])
            mean = 0.7 * mean + 0.3 * now
            want[key] = [mean, 0.6 * stray + 0.4 * (now - mean).abs()]
        module.weigh(0.7, 0.6)
    score = {key: i * u for key, (i, u) in want.items()}
    columns = torch.cat([score[f"b{i}"].mean(0) for i in range(3)])
    near(module.importance().double(), score["e"] + score["a"].mean(1) + columns, 1e-5)


def test_adalora_budget_is_cubic_and_the_choice_stays() -> None:
    model = decoder()
    spec = Adalora(rank=6, target_rank=2, warmup=3, final=4, interval=3, targets=("down", "out"))
    assert not reads_gradients(adapt(decoder(), "lora"))
    adapt(model, spec)
    assert reads_gradients(model)
    modules = triplets(model, "default")
    for step in range(1, 21):
        exact = 24 if step <= 3 else 8 if step > 16 else int(16 * (1 - (step - 3) / 13) ** 3 + 8)
        assert spec.budget(modules, step, 20) == exact
        for p in trainable(model).values():
            p.grad = torch.randn_like(p)
            p.data += 0.1
        spec.after_backward(model, "default", step, 20)
        standing = int(sum((m.e != 0).sum() for m in modules))
        assert standing == (24 if step not in (6, 9, 12, 15) and step < 16 else spec.budget(modules, min(step, 16), 20))
        assert step < 16 or standing == 8
    chosen = [m.chosen.tolist() for m in modules]
    assert sum(map(sum, chosen)) == 8
    with pytest.raises(SpecError, match="ever go"):
        spec.replace(target_rank=7).after_backward(model, "default", 1, 20)
    with pytest.raises(SpecError, match="none is left"):
        spec.after_backward(model, "default", 1, 7)
    with pytest.raises(BuildError, match="lookup table"):
        adapt(model, Adalora(targets=("embedding.table",)), name="b")
    for kept in ({"nowhere": 2}, {"down": 7}):
        with pytest.raises(SpecError, match="none of the targets"):
            adapt(model, spec.replace(kept=kept), name="b")
    diagonals = [m.e.detach().clone() for m in modules]
    for p in trainable(model).values():
        p.requires_grad_(False)
    assert spec.penalty(model, "default") is None and not reads_gradients(model)
    spec.after_backward(model, "default", 1, 5)
    assert all(torch.equal(m.e, e) for m, e in zip(modules, diagonals, strict=True))


@pytest.mark.parametrize("start", ["uniform", "gaussian", "orthogonal", "pissa", "loftq"])
def test_on_the_meta_device(start: str) -> None:
    """Shapes without weights, as preflight wants them."""
    model = dt.build(decoder().spec, weights=False)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for kind in (Lora, Dora):
        adapt(model, kind(rank=2, start=start))  # type: ignore[arg-type]
        assert trainable(model) and all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        remove(model)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


# LoRA+


def test_lora_plus_gives_b_its_own_rate() -> None:
    """Hayou et al. 2024, section 4: A at lr, B at ratio · lr, by the groups that training uses."""
    for spec in (Lora(rank=2, lr_ratio=16.0), Dora(rank=2, lr_ratio=16.0)):
        model = decoder()
        adapt(model, spec)
        optimizer = adamw(model, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        rates = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
        named = trainable(model)
        assert len(rates) == len(named)
        for name, p in named.items():
            fast = name.rsplit(".", 1)[1].startswith("b")
            assert rates[id(p)] == pytest.approx(16e-3 if fast else 1e-3), name


# What every adapter owes


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "lora", "rank": 3, "start": {"kind": "pissa"}, "targets": ["qkv", "down", "gate_up:0"]},
        {"kind": "dora", "rank": 2, "targets": ["qkv:key", "out", "down"]},
        {"kind": "adalora", "rank": 3, "target_rank": 2},
    ],
)
def test_promises(spec: dict[str, Any], tmp_path: Path) -> None:
    model = {
        "kind": "decoder", "vocab": 31, "dim": 16, "depth": 1, "head": {"kind": "ref", "path": "embedding"},
        "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}},
    }  # fmt: skip
    check(randomise(dt.build(model)).eval(), spec, tmp_path, compiled=False)


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "adalora", "rank": 4, "target_rank": 2, "warmup": 1, "final": 1, "dropout": 0.1},
        {"kind": "lora", "rank": 3, "start": {"kind": "pissa", "niter": 2}, "lr_ratio": 4.0},
        {"kind": "lora", "rank": 3, "start": {"kind": "loftq", "iterations": 2}},
        {"kind": "dora", "rank": 3},
    ],
)
def test_resumes_bitwise(adapter: dict[str, Any], tmp_path: Path) -> None:
    """Six steps are three, a stop, and three more, with all that the method keeps beside its weights."""
    fit(recipe(tmp_path / "base", steps=1), progress=False)

    def run(name: str) -> Any:
        data = recipe(tmp_path / name, steps=6) | {"model": str(tmp_path / "base/out"), "adapter": adapter}
        del data["tokenizer"]
        return Run(set_up(Recipe.load(data)), tmp_path / name / "out")

    def go(run: Any, steps: int) -> Any:
        run.model.train()
        for _ in range(steps):
            run.one_step()
            run.step += 1
        return run

    whole = go(run("whole"), 6)
    kept = go(run("part"), 3).save()
    resumed = run("part")
    resumed.restore(kept)
    go(resumed, 3)
    one, two = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    if adapter["kind"] == "adalora":
        modules = triplets(resumed.model, "default")
        assert sum(int(m.chosen.sum()) for m in modules) == 2 * sum(len(m.ranks) for m in modules)
