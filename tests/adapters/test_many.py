"""Ways of rows inside one another, what may not be done meanwhile, and merges that are rounded once or not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_models import decoder, stir, tokens

from dovetail.adapters import (
    Lora,
    active,
    adapt,
    adapters,
    merge,
    merge_and_forget,
    off,
    remove,
    route,
    unmerge,
    use,
)  # fmt: skip
from dovetail.errors import BuildError, RunError, UserError
from dovetail.surgery import quantise

X = tokens(2)


@pytest.fixture
def both() -> Any:
    """LoRAs "a" and "b", of which a stands in more places; "a" is in use."""
    model = decoder().requires_grad_(False)
    for seed, (name, targets) in enumerate({"a": ("qkv", "down"), "b": ("down",)}.items()):
        adapt(model, Lora(rank=2, targets=targets), name=name)
        stir(model, seed=seed)
    use(model, "a")
    return model


@torch.no_grad()
def logits(model: Any, *names: str) -> torch.Tensor:
    """With these adapters alone, and "a" in use again."""
    use(model, *names)
    found = model(X).logits
    use(model, "a")
    return found


@torch.no_grad()
def test_routes_and_off_inside_one_another(both: Any) -> None:
    a, b, none = (logits(both, *names) for names in (("a",), ("b",), ()))
    with route(both, ["a", "b"]):
        for _ in range(2):
            assert torch.allclose(both(X).logits, torch.stack([a[0], b[1]]), atol=1e-5)
            with route(both, ["b", None]):
                assert torch.allclose(both(X).logits, torch.stack([b[0], none[1]]), atol=1e-5)
                with off(both):
                    assert active(both) == () and torch.equal(both(X).logits, none)
            with off(both), route(both, [None, "a"]):
                assert torch.allclose(both(X).logits, torch.stack([none[0], a[1]]), atol=1e-5)
    assert active(both) == ("a",) and torch.equal(both(X).logits, a)
    with pytest.raises(UserError, match="no adapter 'c'"), route(both, ["a", "c"]):
        pass
    assert torch.equal(both(X).logits, a)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[None, None], ["b", "b"], ["b", None]], ids=str)
def test_what_no_row_names_is_not_in_use(both: Any, rows: list[str | None]) -> None:
    wanted = torch.stack([logits(both, *([name] if name else []))[i] for i, name in enumerate(rows)])
    with route(both, rows):
        assert torch.allclose(both(X).logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: use(m, "b"), lambda m: remove(m, "a"), lambda m: remove(m, "b"), merge, merge_and_forget,
        lambda m: adapt(m, "lora", name="c"),
    ],
    ids=["use", "remove a", "remove b", "merge", "forget", "adapt"],
)  # fmt: skip
def test_nothing_is_chosen_merged_or_removed_while_rows_are_routed(both: Any, change: Callable[[Any], Any]) -> None:
    bits = {n: p.clone() for n, p in both.named_parameters()}
    wanted = logits(both, "a")
    with route(both, ["a", "b"]):
        for inside in (off(both), route(both, [None, None])):
            with pytest.raises(UserError, match="routed to adapters for now"), inside:
                change(both)
        with pytest.raises(UserError, match="routed to adapters for now"):
            change(both)
        both(X)
    now = dict(both.named_parameters())
    assert list(now) == list(bits) and all(torch.equal(now[n], p) for n, p in bits.items())
    assert list(adapters(both)) == ["a", "b"] and torch.equal(both(X).logits, wanted)


def test_an_adapter_that_is_removed_while_off_stays_away(both: Any) -> None:
    with off(both):
        remove(both, "a")
    assert active(both) == () and list(adapters(both)) == ["b"]
    both(X)


def test_one_adapter_is_not_put_around_itself(both: Any) -> None:
    with pytest.raises(UserError, match="'a' is named twice"):
        use(both, "a", "b", "a")
    with pytest.raises(UserError, match="'b' is named twice"), route(both, ["a", ["b", "b"]]):
        pass
    assert active(both) == ("a",)


def test_a_merge_that_fails_leaves_every_weight_as_it_was(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = {n: p.clone() for n, p in both.named_parameters()}
    last: Any = both.blocks[-1].feedforward.down.attached()["a"]

    def broken(*given: Any) -> Any:
        raise BuildError("no weight can")

    monkeypatch.setattr(last, "merged", broken)
    with pytest.raises(BuildError, match="no weight can"):
        merge(both)
    assert all(torch.equal(p, bits[n]) for n, p in both.named_parameters())
    with pytest.raises(UserError, match="nothing is merged"):
        unmerge(both)


@torch.no_grad()
def test_several_adapters_are_summed_in_fp32_and_rounded_once() -> None:
    """LoRAs, (IA)³ and a bias on one weight in bf16, against the same in fp64."""
    model = decoder(bias="all").to(torch.bfloat16)
    torch.nn.init.normal_(model.blocks[0].mixer.qkv.bias)
    for seed, spec in enumerate(
        (
            {"kind": "lora", "rank": 4, "targets": ["qkv"]},
            {"kind": "ia3", "targets": ["qkv"], "feedforward": []},
            {"kind": "bitfit", "targets": ["qkv"], "norms": False},
            {"kind": "lora", "rank": 2, "targets": ["qkv"]},
            {"kind": "dora", "rank": 2, "targets": ["qkv"]},
            {"kind": "bitfit", "targets": ["qkv"], "norms": False},
        )
    ):
        adapt(model, spec, name=f"n{seed}")
        stir(model, seed=seed)
    place = model.blocks[0].mixer.qkv
    bits = {n: p.clone() for n, p in model.named_parameters()}
    weight, bias = place.weight.float(), place.bias.float()
    for adapter in place.attached().values():  # all of them in fp32
        weight, bias = adapter.merged(weight, bias)
    merge(model)
    assert place.weight.dtype == place.bias.dtype == torch.bfloat16
    assert torch.equal(place.weight, weight.bfloat16())
    assert (place.bias.float() - bias).abs().max() <= bias.abs().max() * 2**-8
    unmerge(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("coded", [False, True])
def test_unmerged_weights_follow_the_model_to_another_dtype(coded: bool) -> None:
    def made() -> Any:
        model = decoder()
        if coded:
            quantise(model, "int8")
        adapt(model, Lora(rank=2))
        stir(model)
        return model

    model, plain = merge(made()), made()
    for one in (model, plain):
        one.to(torch.bfloat16)
    unmerge(model)
    assert {p.dtype for n, p in model.named_parameters() if "adapters" not in n} == {torch.bfloat16}
    assert torch.equal(model(X).logits, plain(X).logits)


def test_a_weight_that_loftq_put_back_follows_the_model_too() -> None:
    model = adapt(decoder(), {"kind": "lora", "rank": 2, "start": {"kind": "loftq"}})
    remove(model.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(X).logits, decoder().to(torch.bfloat16)(X).logits)


def test_a_place_that_all_rows_share_says_so() -> None:
    """DeBERTa norms vectors of relative positions, which belong to no row."""
    model = decoder(position={"kind": "deberta", "max_distance": 16, "norm": {"kind": "layer"}})
    adapt(model, {"kind": "bitfit", "add": True})
    stir(model)
    with route(model, ["default", None]), pytest.raises(RunError, match=r"512 rows come.*routed as 2(?s:.*)relative"):
        model(X)


def test_what_is_merged_inside_off_is_not_applied_twice() -> None:
    model = adapt(decoder(), Lora(rank=2))
    stir(model)
    x = tokens()
    with torch.no_grad():
        wanted = model(x).logits
        with off(model):
            use(model, "default")
            merge(model)
        assert torch.allclose(model(x).logits, wanted, atol=1e-5)
        unmerge(model)
        assert torch.equal(model(x).logits, wanted)
