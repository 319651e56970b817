"""Attention of few queries whose keys are split among programs, against the plain twin in fp64, and in a whole model.

Without a GPU the kernels run in Triton's interpreter, where fp16 stands for bf16; bench/decode_attention.py checks that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dovetail as dt
from dovetail.kernels import attention
from dovetail.kernels.attention import BoundMask, Coords, Score, Side, plan, reference, triton
from dovetail.kernels.attention.triton import few_queries
from dovetail.kernels.plan import Plan
from dovetail.parts.mask import Band, Beyond, Causal, Dilated, Document, Full, Mask, Prefix, Window
from dovetail.parts.state import FAR

pytest.importorskip("triton")
from dovetail.kernels.attention.triton import split_keys

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16
SCALE = 0.3
SINKS = Causal() & (Window(size=9) | Prefix(length=3))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short rows have several, and several splits of them."""
    tile = split_keys.Tiles(64, 16, 4, 2, 2)
    monkeypatch.setattr(split_keys, "NARROW", {64: tile})
    monkeypatch.setattr(split_keys, "WIDE", {64: tile})


def given(
    B: int, T: int, S: int, H: int = 4, G: int = 1, D: int = 16, E: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q as models have it, and k and v as a state of one more slot gives them: (B,heads,N,width), views."""
    made = [torch.randn(B, n, h, d, device=DEVICE).to(dtype) for n, h, d in ((T, H, D), (S + 1, G, D), (S + 1, G, E))]
    q, k, v = (t.transpose(1, 2) for t in made)
    return q, k[:, :, :S], v[:, :, :S]


def side(*rows: list[int], segments: list[list[int]] | None = None) -> Side:
    return Side(torch.tensor(rows, device=DEVICE), None if segments is None else torch.tensor(segments, device=DEVICE))


def filled(*lengths: int, slots: int) -> Side:
    """Keys of rows of which the first slots hold tokens 0, 1, ... and the others nothing."""
    n = torch.arange(slots, device=DEVICE)
    return Side(torch.stack([torch.where(n < length, n, FAR) for length in lengths]))


def compare(tensors: tuple[Tensor, Tensor, Tensor], mask: BoundMask | None, cap: float | None = None) -> Tensor:
    """Outputs and normalisers; gives the normalisers."""
    out, lse = few_queries.attend(*tensors, mask, triton._span(mask) or pytest.fail("no span"), SCALE, cap)
    score, (q, k, v) = Score(cap=cap), (t.double() for t in tensors)
    plain, level = reference.attend(q, k, v, mask, score, SCALE)
    assert out.dtype == tensors[0].dtype and lse.dtype == torch.float32
    tolerance = 8 * max(torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps)
    assert (out.double() - plain).abs().max() <= tolerance * plain.abs().max().clamp_min(0.5)
    torch.testing.assert_close(lse.double(), level, rtol=tolerance, atol=tolerance)
    return lse


CASES: dict[str, tuple[Mask, Side, Side]] = {
    "one token, rows of several lengths": (Causal(), side([20], [36], [0]), filled(21, 37, 1, slots=53)),
    "several tokens": (Causal(), side([14, 15, 16], [0, 1, 2]), filled(17, 3, slots=40)),
    "one row of coordinates for all": (Causal(), side([14, 15]), filled(16, slots=40)),
    "padded on the left": (Causal(), side([9], [33]), side([FAR] * 30 + [*range(10)], [FAR] * 6 + [*range(34)])),
    "a ring": (Causal() & Window(size=20), side([37], [5]), side([*range(20, 38), 18, 19], [*range(6)] + [FAR] * 14)),
    "a window in a long buffer": (Causal() & Window(size=5), side([40], [2]), filled(41, 3, slots=64)),
    "sinks": (SINKS, side([30, 31], [1, 2]), filled(32, 3, slots=48)),
    "ahead": (Band(before=4, after=6), side([9], [0]), filled(40, 30, slots=40)),
    "far keys alone": (Causal() & Beyond(size=10), side([8], [31]), filled(9, 32, slots=33)),
    "packed": (
        Causal() & Document(),
        side([3, 4, 0], [0, 1, 2], segments=[[1, 1, 2], [0, 0, -1]]),
        side([*range(12), *range(5), *range(3)], [*range(20)], segments=[[0] * 12 + [1] * 5 + [2] * 3, [0] * 9 + [-1] * 11]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_masks_equal_the_plain_twin(case: tuple[Mask, Side, Side]) -> None:
    rule, q, k = case
    B, T, S = max(2, q.order.shape[0]), q.order.shape[1], k.order.shape[1]
    compare(given(B, T, S), BoundMask(rule, Coords(q, k)))


@pytest.mark.parametrize(
    ("H", "G", "D", "E", "T", "dtype"),
    [
        (4, 4, 16, 16, 1, HALF),
        (6, 2, 20, 12, 2, torch.float32),
        (2, 1, 21, 9, 1, HALF),
        (24, 1, 16, 32, 3, torch.float32),
    ],
    ids=["no groups", "uneven widths", "odd widths", "more rows than a program takes"],
)
def test_heads_and_widths(H: int, G: int, D: int, E: int, T: int, dtype: torch.dtype) -> None:
    order = torch.arange(30, 30 + T, device=DEVICE)[None]
    mask = BoundMask(Causal(), Coords(Side(order), filled(30 + T, slots=37)))
    compare(given(1, T, 37, H, G, D, E, dtype), mask)


@pytest.mark.parametrize("rank", [32, 20])  # of which the second is no power of two, and its values are read apart
def test_values_that_are_a_part_of_the_keys(rank: int) -> None:
    """As those of latent attention: a vector of a latent and its turned part."""
    q, k, _ = given(2, 1, 45, D=rank + 16)
    compare((q, k, k[..., :rank]), BoundMask(Causal(), Coords(side([40], [3]), filled(41, 4, slots=45))))


def test_widths_are_two_powers_of_two() -> None:
    """So that the copies and products of a width that is none are no wider than they must be."""
    known = {
        8: (16, 0),
        20: (32, 0),
        64: (64, 0),
        80: (64, 16),
        96: (64, 32),
        100: (128, 0),
        192: (128, 64),
        576: (512, 64),
    }
    assert {width: split_keys.parts(width) for width in known} == known


@pytest.mark.parametrize("splits", [1, 3, 20])  # of three tiles
def test_any_number_of_splits_is_the_same(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(split_keys, "divided", lambda *_: splits)
    tensors = given(2, 1, 45)
    compare(tensors, BoundMask(Causal(), Coords(side([40], [3]), filled(41, 4, slots=45))))
    compare(tensors, None, cap=2.0)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    mask = BoundMask(Causal(), Coords(side([3, 4], [0, 1]), side([FAR] * 40, [FAR] * 39 + [1])))
    tensors = given(2, 2, 40)
    lse = compare(tensors, mask)
    assert torch.isneginf(lse[0]).all() and torch.isneginf(lse[1, :, 0]).all() and torch.isfinite(lse[1, :, 1]).all()
    assert (triton.decode(*tensors, mask, None, SCALE)[0] == 0).all()


def test_what_nobody_sees_is_never_read() -> None:
    """Slots before the first token that is seen and behind the last hold nothing that changes anything, NaN included."""
    mask = BoundMask(Causal() & Window(size=8), Coords(side([20], [30]), filled(21, 31, slots=48)))
    tensors = given(2, 1, 48)
    clean = triton.decode(*tensors, mask, None, SCALE)
    for t in tensors[1:]:
        t[0, :, 21:], t[1, :, 31:], t[0, :, :13], t[1, :, :23] = (torch.nan,) * 4
    assert torch.equal(triton.decode(*tensors, mask, None, SCALE), clean)


@pytest.mark.parametrize("B, T, S", [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
def test_nothing_asked_is_nothing(B: int, T: int, S: int) -> None:
    q, k = torch.randn(B, 4, T, 16, device=DEVICE), torch.randn(B, 2, S, 16, device=DEVICE)
    out, lse = few_queries.attend(q, k, k, None, triton._span(None) or pytest.fail("no span"), SCALE)
    assert out.shape == (B, 4, T, 16) and lse.shape == (B, 4, T) and (out == 0).all()


def test_splits_fill_the_device_and_no_more() -> None:
    divided, slots = split_keys.divided, 264
    for programs, tiles in (
        (8, 512),
        (8, 4),
        (96, 512),
        (64, 512),
        (256, 512),
        (384, 512),
        (512, 512),
        (5000, 512),
        (1, 10**6),
    ):
        splits = divided(programs, tiles, slots)
        waves = programs * splits / slots
        assert 1 <= splits <= min(tiles, split_keys.SPLITS) and (waves <= 1 or splits <= 6)
        possible = min(1.0, programs * min(tiles, split_keys.SPLITS) / slots)
        assert waves / -(-programs * splits // slots) >= 0.85 * possible
    assert divided(256, 512, slots) == divided(5000, 512, slots) == 1  # nothing to merge
    assert divided(8, 512, slots) == 30 and divided(384, 512, slots) == 2


def test_compiled_is_the_same() -> None:
    q, k, v = given(2, 1, 40)
    rule = Causal()
    order, lengths = torch.tensor([[20], [30]], device=DEVICE), filled(21, 31, slots=41).order

    def step(q: Tensor, k: Tensor, v: Tensor, order: Tensor, keys: Tensor) -> Tensor:
        mask = BoundMask(rule, Coords(Side(order), Side(keys[:, :40])))
        return (
            triton.decode(triton.decode(q, k, v, mask, None, SCALE), k, v, mask, None, SCALE)
            .transpose(1, 2)
            .flatten(-2)
        )

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, order, lengths)
        plain = step(q, k, v, order, lengths)
    assert torch.equal(compiled, plain) and compiled.stride() == plain.stride()


def test_the_operations_keep_their_promises() -> None:
    """Shapes and strides under a compiler: torch's own check."""
    q, k, v = given(2, 1, 40)
    sides = (torch.tensor([[20], [30]], device=DEVICE), filled(21, 31, slots=40).order, None, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(few_queries._shown.op, (*sides, None, 0, 0), test_utils=tests)
    found = few_queries._shown(*sides, None, 0, 0)
    torch.library.opcheck(few_queries._attend.op, (q, k, v, *sides, found, None, 0, 0, SCALE, None), test_utils=tests)


def test_plan_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    coords = Coords(side([20]), filled(21, slots=64))

    def path(rule: Mask, queries: int = 1, device: str = "cuda", width: int = 64, score: Score | None = None) -> str:
        mask = BoundMask(rule, coords)
        return plan(device=device, dtype=HALF, queries=queries, width=width, mask=mask, score=score).path

    with torch.no_grad():
        monkeypatch.setattr(triton, "OWN", ())
        assert path(Causal()) == "sdpa"
        monkeypatch.setattr(triton, "OWN", ("decode",))
        assert path(Causal()) == path(Full()) == path(SINKS, 16) == path(Causal(), width=256) == "split keys"
        assert path(Causal(), score=Score(cap=2.0)) == "split keys"
        assert path(Causal(), width=576) == "split keys"
        assert path(Causal(), 17) == path(Causal(), width=577) == path(Causal(), device="cpu") == "sdpa"
        assert path(Causal() & Dilated(step=2)) == "sdpa"
    assert path(Causal()) == "sdpa"  # it has no gradients
    model = dt.build(spec(), device="cpu")
    for block in model.blocks:
        plans = {use: chosen.path for use, chosen in block.mixer.plans("cuda", 64).items()}
        assert plans["decoding"] == "split keys" != plans["training, prefill"]


def spec() -> dict[str, object]:
    plain = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16}
    latent = {"kind": "latent", "heads": 2, "rank": 32, "nope_dim": 8, "rope_dim": 16}
    mixers = [plain, plain | {"mask": {"kind": "window", "size": 6}}, latent]
    blocks = [{"mixer": mixer, "feedforward": {"kind": "glu", "hidden": 32}} for mixer in mixers]
    return {"kind": "decoder", "vocab": 50, "dim": 32, "depth": 3, "context": 32, "blocks": blocks}


def test_decoding_equals_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model, rows padded on the left: chunks and single tokens by these kernels, and all at once by the plain form."""
    model = dt.build(spec(), device=DEVICE).eval()
    tokens = torch.randint(50, (2, 12), device=DEVICE)
    real = torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
    real[1, :3] = False
    with torch.no_grad():
        whole = model(tokens, attention_mask=real).logits
        monkeypatch.setattr(triton, "OWN", ("decode",))
        taken: list[int] = []

        def ours(**asked: object) -> Plan:
            chosen = plan(**{**asked, "device": "cuda"})  # type: ignore[arg-type]
            taken.append(chosen.path == "split keys")
            return chosen

        monkeypatch.setattr(attention, "plan", ours)
        state, steps = model.new_state(2, 20), []
        for a, b in ((0, 7), (7, 10), (10, 11), (11, 12)):
            steps.append(model(tokens[:, a:b], attention_mask=real[:, a:b], state=state).logits)
    assert taken == [True] * 12
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
