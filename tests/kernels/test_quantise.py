"""Tables against their construction, codes against the nearest level in fp64, errors against their integrals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.kernels import quantise
from dovetail.kernels.quantise import reference

NF4, DYNAMIC = torch.tensor(quantise.NF4), torch.tensor(quantise.DYNAMIC)
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "quantise.safetensors")
EPS = torch.finfo(torch.float32).eps


def test_nf4_levels_are_the_quantiles_of_a_normal() -> None:
    """Seven below zero and eight above, each side evenly spaced in probability up to 0.9677083, over the largest."""
    edge = 0.9677083
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    built = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    torch.testing.assert_close(NF4.double(), built / built.max(), rtol=0, atol=EPS)
    assert torch.equal(NF4, GOLDEN["levels"])


def test_dynamic_levels_are_decades_of_even_shares() -> None:
    assert len(DYNAMIC) == 256 and (DYNAMIC.diff() > 0).all()
    assert 0.0 in DYNAMIC and DYNAMIC.max() == 1.0
    rest = DYNAMIC[(DYNAMIC != 0) & (DYNAMIC != 1)]
    assert torch.equal(rest, -rest.flip(0))
    positive = rest[rest > 0].double()
    for zeros in range(7):
        decade = positive[(positive > 10.0 ** -(zeros + 1)) & (positive < 10.0**-zeros)]
        share = 0.9 * 10.0**-zeros / 2 ** (6 - zeros)
        assert len(decade) == 2 ** (6 - zeros)
        torch.testing.assert_close(decade[0].item(), 10.0 ** -(zeros + 1) + share / 2, rtol=4 * EPS, atol=0)
        torch.testing.assert_close(decade.diff(), torch.full_like(decade[1:], share), rtol=64 * EPS, atol=0)
    assert torch.equal(DYNAMIC, GOLDEN["absmax_levels"])


@pytest.mark.parametrize("levels", [NF4, DYNAMIC], ids=["nf4", "dynamic"])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_codes_name_the_nearest_level(levels: Tensor, n: int) -> None:
    values = torch.randn(n) * 3
    codes, absmax = quantise.quantise_levels(values, levels, 64)
    blocks = torch.nn.functional.pad(values, (0, -n % 64)).view(-1, 64).double()
    assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
    assert torch.equal(absmax.double(), blocks.abs().amax(1))
    distance = (blocks[..., None] / absmax.double()[:, None, None] - levels.double()).abs()
    chosen = distance.gather(-1, codes.long().view(-1, 64, 1))
    assert (chosen - distance.amin(-1, keepdim=True)).max() < 4 * EPS  # value/absmax is rounded to fp32
    assert torch.equal(codes[n:], torch.full_like(codes[n:], int((levels == 0).nonzero())))  # what fills up is zero


def test_halfway_goes_to_the_lower_level() -> None:
    middles = (NF4[1:] + NF4[:-1]) / 2
    up, down = (torch.nextafter(middles, torch.tensor(side)) for side in (2.0, -2.0))
    for values, expected in ((middles, range(15)), (up, range(1, 16)), (down, range(15))):
        codes, absmax = quantise.quantise_levels(torch.cat([torch.ones(1), values]), NF4, 16)
        assert absmax.item() == 1 and codes[1:].tolist() == list(expected)


def test_packing_puts_the_first_of_a_pair_high() -> None:
    codes = torch.tensor([1, 2, 15, 0], dtype=torch.uint8)
    assert quantise.pack(codes).tolist() == [0x12, 0xF0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_is_level_times_absmax(dtype: torch.dtype) -> None:
    codes, absmax = torch.randint(0, 16, (640,), dtype=torch.uint8), torch.rand(10)
    expected = (NF4[codes.long()].view(10, 64) * absmax[:, None]).flatten()
    ours = quantise.dequantise_packed(quantise.pack(codes), absmax, NF4, 64, dtype)
    assert ours.dtype == dtype and torch.equal(ours, expected.to(dtype))
    assert torch.equal(quantise.dequantise_levels(codes, absmax, NF4, 64), expected)
    whole = torch.randint(-127, 128, (640,), dtype=torch.int8)
    ours = quantise.dequantise_int8(whole, absmax, 64, dtype)
    wide = (whole.double().view(10, 64) * absmax.double()[:, None] / 127).flatten()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), wide, rtol=2 * max(torch.finfo(dtype).eps, EPS), atol=1e-7)


def test_int8_rounds_halves_to_even() -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 0.0])
    codes, absmax = quantise.quantise_int8(values, 8)
    assert absmax.item() == 127 and codes.tolist() == [127, 0, 2, 2, 0, -2, -127, 0]


@pytest.mark.parametrize("n", [1, 100, 1024])
def test_int8_is_within_half_a_step(n: int) -> None:
    values = torch.randn(n) * 7
    codes, absmax = quantise.quantise_int8(values, 64)
    back = quantise.dequantise_int8(codes, absmax, 64, torch.float32)
    assert not codes[n:].any()
    step = absmax.repeat_interleave(64)[:n] / 127
    assert ((back[:n] - values).abs() <= step * (0.5 + 127 * 2 * EPS)).all()


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38])
def test_blocks_of_nothing_give_zeros(tiny: float) -> None:
    values = torch.cat([torch.zeros(64), torch.full((64,), tiny), torch.randn(64)])
    codes, absmax = quantise.quantise_levels(values, NF4, 64)
    back = quantise.dequantise_packed(quantise.pack(codes), absmax, NF4, 64, torch.float32)
    assert not back[:64].any() and back[64:128].abs().max() <= tiny and back.isfinite().all()
    codes, absmax = quantise.quantise_int8(values, 64)
    back = quantise.dequantise_int8(codes, absmax, 64, torch.float32)
    assert not back[:64].any() and back[64:128].abs().max() <= tiny and back.isfinite().all()


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5000).bfloat16()

    def everything() -> list[Tensor]:
        codes, absmax = quantise.quantise_levels(values, NF4, 64)
        whole, tops = quantise.quantise_int8(values, 64)
        packed = quantise.pack(codes)
        dense = quantise.dequantise_packed(packed, absmax, NF4, 64, torch.bfloat16)
        return [codes, absmax, whole, tops, dense, quantise.dequantise_int8(whole, tops, 64, torch.bfloat16)]

    at_once = everything()
    monkeypatch.setitem(reference._PIECE, "cpu", 64 * 7)
    for piecewise, whole in zip(everything(), at_once, strict=True):
        assert torch.equal(piecewise, whole)


def test_no_wide_copy_of_a_large_weight() -> None:
    """Of a weight of 2^21 numbers no operation makes a wide tensor beyond one piece of 2^18."""
    widest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal widest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.element_size() >= 4:
                widest = max(widest, out.numel())
            return out

    values = torch.randn(2**21).bfloat16()
    with Watch():
        codes, absmax = quantise.quantise_levels(values, NF4, 64)
        quantise.dequantise_packed(quantise.pack(codes), absmax, NF4, 64, torch.bfloat16)
        quantise.dequantise_int8(*quantise.quantise_int8(values, 64), 64, torch.bfloat16)
    assert 0 < widest <= 2**18


def test_error_on_normal_weights_is_its_integral() -> None:
    """Relative Frobenius error of weights from N(0, 1): the expectation over a block's maximum, by quadrature."""
    values = torch.randn(2**20)
    for block, kind in ((64, "nf4"), (256, "nf4"), (1024, "int8")):
        if kind == "nf4":
            codes, absmax = quantise.quantise_levels(values, NF4, block)
            back = quantise.dequantise_levels(codes, absmax, NF4, block)
        else:
            back = quantise.dequantise_int8(*quantise.quantise_int8(values, block), block, torch.float32)
        measured = ((back - values).norm() / values.norm()).item()
        levels = NF4.double() if kind == "nf4" else torch.arange(-127, 128, dtype=torch.float64) / 127
        assert measured == pytest.approx(expected_error(levels, block), rel=0.01)
    assert 0.08 < expected_error(NF4.double(), 64) < 0.10
    assert 0.005 < expected_error(torch.arange(-127, 128, dtype=torch.float64) / 127, 64) < 0.01


def expected_error(levels: Tensor, block: int) -> float:
    """sqrt of E over the maximum a of `block` normals of (block-1)/block · E[(x - a·level)² given |x| < a]; a itself is exact."""
    normal = torch.distributions.Normal(0.0, 1.0)
    a = torch.linspace(0.05, 7, 1400, dtype=torch.float64)
    inside = 2 * normal.cdf(a) - 1
    density = block * inside ** (block - 1) * 2 * normal.log_prob(a).exp()
    edges = torch.cat([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]])  # between them a level is nearest
    lo, hi, centre = a[:, None] * edges[:-1], a[:, None] * edges[1:], a[:, None] * levels
    p, q = normal.log_prob(lo).exp(), normal.log_prob(hi).exp()
    mass = normal.cdf(hi) - normal.cdf(lo)
    moments = (mass + lo * p - hi * q) - 2 * centre * (p - q) + centre**2 * mass  # of (x - centre)² over [lo, hi]
    error = moments.sum(1) / inside * (block - 1) / block
    return float(torch.trapezoid(error * density, a)) ** 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="is compiled there")
@pytest.mark.parametrize(("count", "block"), [(64, 64), (3000, 100), (4096, 2), (192, 64)])
def test_triton_interpreted_equals_plain(count: int, block: int) -> None:
    pytest.importorskip("triton")
    from dovetail.kernels.quantise import triton

    codes, absmax = torch.randint(0, 256, (count // 2,), dtype=torch.uint8), torch.rand(count // block)
    for dtype in (torch.float32, torch.float16, torch.float64):
        ours = triton.dequantise_packed(codes, absmax, NF4, block, dtype)
        theirs = reference.dequantise_packed(codes, absmax, NF4, block, dtype)
        assert ours.dtype == dtype and torch.equal(ours, theirs), dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block", [2, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_equals_plain(block: int, dtype: torch.dtype) -> None:
    assert quantise.plan("cuda").path == "triton"
    codes = torch.randint(0, 256, (block * 501,), dtype=torch.uint8, device="cuda")
    absmax, levels = torch.rand(2 * 501, device="cuda"), NF4.cuda()
    ours = quantise.dequantise_packed(codes, absmax, levels, block, dtype)
    assert torch.equal(ours, reference.dequantise_packed(codes, absmax, levels, block, dtype))


def test_plan_says_why() -> None:
    assert quantise.plan("cpu").path == "plain" and "CUDA" in quantise.plan("cpu").why
