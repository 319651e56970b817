"""The softmax loss in one kernel against torch's cross-entropy in fp64.

The Triton kernels run on a GPU, else interpreted, where fp16 stands for bf16; bench/cross_entropy.py checks bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dovetail.kernels import twins
from dovetail.kernels.counted import as_on
from dovetail.kernels.cross_entropy import IGNORED, plain, plan, reference, scaled, softmax_loss_
from dovetail.kernels.installed import TRITON
from dovetail.objectives import next_token
from dovetail.objectives.next_token import cross_entropy

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}


def truth(logits: Tensor, labels: Tensor, smoothing: float, z: float) -> tuple[Tensor, Tensor]:
    """Sums and gradient in fp64, by torch's own cross-entropy; a hit is the first of the largest."""
    x = logits.detach().double().requires_grad_()
    total, nats, _ = reference.cross_entropy(x, labels, smoothing, z)
    (grad,) = torch.autograd.grad(total, x)
    real = labels != IGNORED
    hits = (x.argmax(1) == labels) & real
    return torch.stack([total.detach(), nats, hits.sum().double()]), grad


def agree(logits: Tensor, labels: Tensor, smoothing: float = 0.0, z: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sums and gradient of the kernel, which are the fp64 formula's."""
    right, grad = truth(logits, labels, smoothing, z)
    kept = logits.clone()
    alone = softmax_loss_(logits, labels, smoothing, z, False)
    assert torch.equal(logits, kept), "without gradients nothing is written"
    sums = softmax_loss_(logits, labels, smoothing, z, True)
    assert torch.equal(sums, alone) and sums.dtype == torch.float32
    tolerance = TOLERANCE[logits.dtype]
    torch.testing.assert_close(sums.double(), right, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.double(), grad, rtol=tolerance, atol=tolerance)
    return sums, logits


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short row takes several."""
    pytest.importorskip("triton")
    from dovetail.kernels.cross_entropy import triton

    monkeypatch.setattr(triton, "EVEN", triton.Launch(1, 16, 128))
    monkeypatch.setattr(triton, "RAGGED", triton.Launch(1, 16, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "n, vocab, smoothing, z",
    [
        (5, 640, 0.0, 0.0),
        (5, 641, 0.1, 0.0),
        (3, 512, 0.0, 1e-2),
        (4, 530, 0.2, 1e-3),
        (1, 7, 0.1, 0.0),
        (2, 1, 0.0, 1e-3),
    ],
)
def test_triton_equals_torch(dtype: torch.dtype, n: int, vocab: int, smoothing: float, z: float) -> None:
    """Rows of whole and of broken steps, shorter than one, of a single logit; the first and the last id, ignored rows."""
    logits = (3 * torch.randn(n, vocab, device=DEVICE)).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=DEVICE)
    labels[0] = vocab - 1
    if n > 2:
        labels[1], labels[2] = 0, IGNORED
    agree(logits, labels, smoothing, z)


def test_extremes() -> None:
    """Logits of ±1e4, of -inf (but the label's), equal ones, a first step of -inf alone; a row that costs nothing."""
    x = torch.randn(5, 300, device=DEVICE)
    x[0] *= 1e4
    x[1, 1::2] = -float("inf")
    x[2] = 2.5
    x[3, :280] = -float("inf")
    x[4] = 0.0
    x[4, 33] = 500.0
    labels = torch.tensor([int(x[0].argmin()), 4, 17, 290, 33], device=DEVICE)
    sums, grad = agree(x, labels)
    assert sums.isfinite().all() and grad.isfinite().all()


def test_the_first_of_those_that_tie_is_the_hit() -> None:
    """As greedy decoding chooses: labels that tie with an earlier one would count as known what is not said."""
    x = torch.zeros(4, 40, device=DEVICE)
    x[:, 5] = x[:, 30] = 1.0
    labels = torch.tensor([5, 30, 31, IGNORED], device=DEVICE)
    counted = plain.softmax_loss(x, labels, 0.0, 0.0, False)[0][2]
    assert agree(x, labels)[0][2].item() == counted.item() == 1


def test_all_rows_ignored() -> None:
    x = torch.full((3, 50), float("nan"), device=DEVICE)
    sums = softmax_loss_(x, torch.full((3,), IGNORED, device=DEVICE), 0.1, 1e-3, True)
    assert not sums.any() and not x.any()


def test_rows_apart_in_memory() -> None:
    """Rows of a wider tensor, of an odd stride, and columns that are not neighbours: only they are written."""
    for wide in (torch.randn(4, 700, device=DEVICE), torch.randn(4, 655, device=DEVICE)):
        kept = wide.clone()
        agree(wide[:, 16:608], torch.tensor([3, 9, IGNORED, 591], device=DEVICE))
        assert torch.equal(wide[:, :16], kept[:, :16]) and torch.equal(wide[:, 608:], kept[:, 608:])
    agree(torch.randn(90, 3, device=DEVICE).t(), torch.tensor([3, 9, 20], device=DEVICE))


def test_a_label_that_is_no_id_shows() -> None:
    for label in (40, -1):
        sums = softmax_loss_(torch.randn(1, 40, device=DEVICE), torch.tensor([label], device=DEVICE), 0.0, 0.0, False)
        assert sums[0].isnan()


def test_scaled() -> None:
    """Torch's product in the wide type, rounded once, in any number of programs."""
    pytest.importorskip("triton")
    from dovetail.kernels.cross_entropy import triton

    x, factor = torch.randn(3, 1777, device=DEVICE), torch.tensor(0.37, device=DEVICE)
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(triton.scaled(x, factor, dtype), (x * factor).to(dtype))
        assert torch.equal(scaled(x, factor, dtype), (x * factor).to(dtype))
    assert scaled(x.half(), factor, torch.float16).dtype == torch.float16


def test_plans() -> None:
    assert plan("cuda", torch.bfloat16).path == ("triton" if TRITON else "plain")
    assert {plan("cuda", torch.float64).path, plan("cpu").path} == {"plain"}
    with twins.plain():
        assert plan("cuda", torch.bfloat16).path == "reference"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole objective on the path of a GPU, in many chunks."""
    monkeypatch.setattr(next_token, "plan", lambda device, dtype: plan("cuda", dtype))
    monkeypatch.setitem(next_token._CHUNK, DEVICE, 64)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("head", ["plain", "bias", "scaled", "capped", "frozen"])
def test_the_objective_through_any_head(head: str) -> None:
    """Gradients of states and head are autograd's, also where the head needs its logits again, which are written over."""
    linear = nn.Linear(8, 21, bias=head == "bias", device=DEVICE).requires_grad_(head != "frozen")
    last = {"scaled": lambda y: y * 0.3, "capped": lambda y: torch.tanh(y)}.get(head, lambda y: y)
    h = torch.randn(70, 8, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 21, (70,), device=DEVICE).masked_fill(torch.rand(70, device=DEVICE) < 0.2, IGNORED)
    inputs = [h, *(p for p in linear.parameters() if p.requires_grad)]
    total, nats, hits = cross_entropy(lambda x: last(linear(x)), h, labels, 0.1, 1e-2)
    right = reference.cross_entropy(last(linear(h)), labels, 0.1, 1e-2)
    torch.testing.assert_close(torch.stack([total, nats]), torch.stack(right[:2]))
    assert int(hits) == int(right[2])
    for a, b in zip(*(torch.autograd.grad(x / 9, inputs) for x in (total, right[0])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(lambda x: last(linear(x)), h, labels, 0.1, 1e-2)[0], total.detach())


def test_the_operation_is_sound() -> None:
    """Its schema, its fake and what it changes, by torch's own checks."""
    given = (torch.randn(3, 40, device=DEVICE), torch.tensor([1, 2, IGNORED], device=DEVICE), 0.1, 1e-3, True)
    torch.library.opcheck(
        torch.ops.dovetail.softmax_loss_.default, given, test_utils=("test_schema", "test_faketensor")
    )


def test_only_sums_are_held_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without one: a chunk of logits, the fp32 sum and the states' gradient, and no product of 16 bits beside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dovetail.training.simulate import Live

    if not TRITON:
        pytest.skip("without Triton the passes are plain")
    n, width, vocab = 1024, 64, 5000
    monkeypatch.setitem(next_token._CHUNK, "cuda", 128 * vocab)
    with FakeTensorMode():
        head, labels = nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.long)
        h = torch.zeros(n, width, dtype=torch.bfloat16, requires_grad=True)
        live = Live([head.weight, h, labels])
        with live, as_on("cuda"):
            cross_entropy(head, h, labels)
    logits, total, states = 2 * 256 * vocab, 4 * vocab * width, 2 * n * width
    assert logits + total + states <= live.peak < logits + total + 2 * states + 100_000
