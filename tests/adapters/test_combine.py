"""Adapters combined: against PEFT's add_weighted_adapter, and against each method's formula in fp64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail as dt
from dovetail import adapters as ad
from dovetail.adapters.combine import METHODS, RULES, combine, mix
from dovetail.adapters.factors import terms
from dovetail.errors import BuildError, SpecError, UserError

WEIGHTS = {"x": 0.7, "y": -0.4, "z": 1.3}
OPTIONS: dict[str, dict[str, Any]] = {
    name: ({"density": 0.4} if any(w in name for w in ("ties", "dare", "prune")) else {})
    | ({"seed": 5} if "dare" in name else {})
    for name in METHODS
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three PEFT adapters: z has places of its own and lacks some; y has another scale."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("combine")
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(path / "base"))
    for name, alpha, targets in (
        ("x", 8, ["q_proj", "v_proj", "down_proj"]),
        ("y", 2, ["q_proj", "v_proj", "down_proj"]),
        ("z", 4, ["q_proj", "gate_proj"]),
    ):
        base = LlamaForCausalLM.from_pretrained(path / "base")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(path / name))
    return path


def ours(folder: Path) -> Any:
    model = dt.load(folder / "base")
    for name in WEIGHTS:
        ad.load_adapter(model, folder / name, name=name)
    return model


def theirs(folder: Path) -> Any:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "x", adapter_name="x")
    for name in ("y", "z"):
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_equals_peft(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ours(folder), theirs(folder)
    masks: list[Tensor] = []
    draw = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p, **kw: masks.append(draw(p, **kw)) or masks[-1])
    report = combine(a, WEIGHTS, method=method, into="new", **OPTIONS[method])
    left = iter(masks)  # PEFT then meets the very masks that ours drew, place by place
    if "dare" in method:
        order = [r.segment.removeprefix("model.") for r in report]
        places = [k.split("base_model.model.model.")[1] for k, m in b.named_modules() if hasattr(m, "lora_A")]
        per = 1 if method.endswith("_svd") else 2
        counts = [per * (3 if "q_proj" in name else 1 if "gate" in name else 2) for name in order]
        piles = {name: [next(left) for _ in range(n)] for name, n in zip(order, counts, strict=True)}
        replay = iter([mask for name in places for mask in piles[name]])
        monkeypatch.setattr(torch, "bernoulli", lambda p, **kw: next(replay))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), "new", method, density=OPTIONS[method].get("density")
        )
    ad.use(a, "new")
    b.set_adapter("new")
    x = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        got, want = a(x).logits, b(x).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
    base = dt.load(folder / "base")(x).logits
    assert (got - base).abs().max() > 1e-2
    assert {r.segment.rsplit(".", 1)[-1] for r in report} == {"q_proj", "v_proj", "down_proj", "gate_proj"}


def deltas(model: Any, name: str) -> dict[tuple[str, int], Tensor]:
    """(path, first row) -> ΔW of one adapter, fp64."""
    found = {}
    spec: Any = ad.adapters(model)[name]
    for site in ad.sites(model, spec.targets):
        module: Any = site.place.attached()[name]
        for segment, (a, b), scale in zip(site.segments, module.pairs(), module.scales, strict=True):
            found[site.path, segment.start] = scale * (b.double() @ a.double())
    return found


def test_cat_is_the_sum_and_svd_the_nearest_of_its_rank(folder: Path) -> None:
    model = ours(folder)
    total: dict[Any, Tensor] = {}
    for name, weight in WEIGHTS.items():
        for key, delta in deltas(model, name).items():
            total[key] = total.get(key, torch.zeros_like(delta)) + weight * delta
    exact = combine(model, WEIGHTS, method="cat", into="cat")
    got = deltas(model, "cat")
    assert got.keys() == total.keys()
    for key, want in total.items():
        assert (got[key] - want).norm() <= 1e-6 * want.norm()
    assert max(r.from_sum for r in exact) < 1e-6 and {r.rank for r in exact} == {12, 8, 4}
    rough = combine(model, WEIGHTS, method="svd", rank=3, into="svd")
    got = deltas(model, "svd")
    for key, want in total.items():
        u, s, vh = torch.linalg.svd(want)
        assert (got[key] - (u[:, :3] * s[:3]) @ vh[:3]).norm() <= 1e-5 * want.norm()
    errors = sorted(float(torch.linalg.svdvals(w)[3:].norm() / w.norm()) for w in total.values())
    assert sorted(r.truncated for r in rough) == pytest.approx(errors, abs=1e-6)
    assert sorted(r.from_sum for r in rough) == pytest.approx(errors, abs=1e-6)


@pytest.mark.parametrize("shape", [(9, 17), (17, 9), (8, 8)])
def test_terms_are_the_svd(shape: tuple[int, int]) -> None:
    x = torch.randn(*shape)
    x[:, 2] = x[:, 3]  # not of full rank
    u, s, vh = terms(x)
    torch.testing.assert_close(s, torch.linalg.svdvals(x.double()), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close((u * s) @ vh, x.double(), rtol=1e-12, atol=1e-12)
    for k in (1, 4):
        v, t, w = torch.linalg.svd(x.double())
        torch.testing.assert_close((u[:, :k] * s[:k]) @ vh[:k], (v[:, :k] * t[:k]) @ w[:k], rtol=1e-9, atol=1e-9)


def test_linear_is_not_the_sum(folder: Path) -> None:
    model = ours(folder)
    report = {r.segment: r for r in combine(model, {"x": 1.0, "y": 1.0}, method="linear", into="both")}
    both, x, y = deltas(model, "both"), deltas(model, "x"), deltas(model, "y")
    off = [float((both[k] - x[k] - y[k]).norm() / (x[k] + y[k]).norm()) for k in both]
    assert sorted(r.from_sum for r in report.values()) == pytest.approx(sorted(off), rel=1e-5) and min(off) > 0.1


def entry(values: list[float], weights: list[float], sign: str) -> float:
    """TIES of one entry after trimming, as the paper says it: the elected sign's values, averaged."""
    mass = sum(values) if sign == "total" else sum((v > 0) - (v < 0) for v in values)
    elected = 1 if mass >= 0 else -1
    same = [w * v for v, w in zip(values, weights, strict=True) if v * elected > 0]
    return sum(same) / max(len(same), 1)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("name", [n for n in RULES if n != "linear"])
def test_formula_of_each_rule(name: str, sign: str) -> None:
    tensors, weights, density = [torch.randn(5, 7, dtype=torch.float64) for _ in range(3)], [0.5, -2.0, 1.25], 0.6
    kept = []
    for i, t in enumerate(tensors):
        if "dare" in name:
            mask = torch.bernoulli(torch.full_like(t, density), generator=torch.Generator().manual_seed(i))
            kept.append((t * mask / density).flatten().tolist())
        else:
            floor = sorted(t.abs().flatten().tolist(), reverse=True)[int(density * 35) - 1]
            kept.append([v if abs(v) >= floor else 0.0 for v in t.flatten().tolist()])
    per_entry = list(zip(*kept, strict=True))
    if "ties" in name:
        want = [entry(list(v), weights, sign) for v in per_entry]
    else:
        want = [sum(w * x for w, x in zip(weights, v, strict=True)) for v in per_entry]
    rngs = [torch.Generator().manual_seed(i) for i in range(3)]
    got = mix(tensors, weights, RULES[name], density, sign, rngs)  # type: ignore[arg-type]
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_dare_is_as_its_seed_and_right_on_average(folder: Path) -> None:
    model = ours(folder)
    said: dict[str, Any] = {"method": "dare_linear_svd", "density": 0.5, "rank": 24}
    for into, seed in (("a", 1), ("b", 1), ("c", 2)):
        combine(model, {"x": 1.0}, into=into, seed=seed, **said)
    a, b, c = (deltas(model, name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and all(not torch.equal(a[k], c[k]) for k in a)
    for seed in range(40):
        combine(model, {"x": 1.0}, into=f"s{seed}", seed=seed, **said)
    key, want = next(iter(deltas(model, "x").items()))
    some = torch.stack([deltas(model, f"s{seed}")[key] for seed in range(40)])
    # Each entry is 0 or 2w with equal chance: its spread is |w|, and the mean of 40 has |w| / sqrt(40).
    assert ((some.mean(0) - want).abs() / want.abs()).square().mean().sqrt() == pytest.approx(40**-0.5, rel=0.3)


def test_a_start_taken_off_the_weight_counts(folder: Path) -> None:
    model = dt.load(folder / "base")
    x = torch.randint(0, 61, (1, 6))
    ad.adapt(model, ad.Lora(rank=2, targets=("up_proj",), start={"kind": "pissa"}), name="p")  # type: ignore[arg-type]
    for parameter in ad.trainable(model).values():
        parameter.data.mul_(1.1)
    want = model(x).logits
    (line,) = {r.rank for r in combine(model, {"p": 1.0}, method="cat", into="new")}
    ad.use(model, "new")
    assert line == 4 and (model(x).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_was_active_and_trainable_stays(folder: Path, tmp_path: Path) -> None:
    model = ours(folder)
    ad.adapt(model, ad.Lora(rank=2, targets=("o_proj",)), name="mine")
    before, learning = ad.active(model), set(ad.trainable(model))
    x = torch.randint(0, 61, (1, 6))
    y = model(x).logits
    combine(model, WEIGHTS, method="cat", into="new")
    assert ad.active(model) == before and set(ad.trainable(model)) == learning and torch.equal(model(x).logits, y)
    ad.use(model, "new")
    want = model(x).logits
    ad.save_adapter(model, tmp_path / "new", name="new")  # ranks that differ from place to place travel along
    again = ad.load_adapter(dt.load(folder / "base"), tmp_path / "new")
    assert (again(x).logits - want).abs().max() <= 1e-6 * want.abs().max()
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), tmp_path / "new").eval()
    assert (peft(x).logits - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("error", "says", "weights", "options"),
    [
        (UserError, "did you mean 'ties'", {"x": 1}, {"method": "tie"}),
        (UserError, "no adapter 'q'", {"q": 1}, {}),
        (UserError, "nothing to combine", {}, {}),
        (UserError, "needs density", {"x": 1}, {"method": "ties"}),
        (UserError, "needs seed", {"x": 1}, {"method": "dare_ties", "density": 0.5}),
        (UserError, "does not read rank", {"x": 1}, {"method": "cat", "rank": 3}),
        (UserError, "does not read sign", {"x": 1}, {"method": "magnitude_prune", "density": 0.5, "sign": "total"}),
        (UserError, "density 0", {"x": 1}, {"method": "ties", "density": 0.0}),
        (UserError, "the ranks differ: x 4, small 2", {"x": 1, "small": 1}, {"method": "linear"}),
        (UserError, "no number", {"x": float("nan")}, {}),
        (SpecError, "is there already", {"x": 1}, {"into": "x"}),
    ],
)
def test_refusals(folder: Path, error: type[Exception], says: str, weights: Any, options: dict[str, Any]) -> None:
    model = ours(folder)
    ad.adapt(model, ad.Lora(rank=2, targets=("q_proj",)), name="small")
    with pytest.raises(error, match=says):
        combine(model, weights, **{"into": "new", **options})
    assert set(ad.adapters(model)) == {"x", "y", "z", "small"}


def test_only_plain_lora(folder: Path) -> None:
    model = ours(folder)

    class Other(ad.Lora):
        kind = "other"

    model.adapters_held = {**model.adapters_held, "x": Other()}
    with pytest.raises(BuildError, match="other adapter"):
        combine(model, {"x": 1.0}, method="cat", into="new")
