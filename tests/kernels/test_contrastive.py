"""The contrastive losses in blocks against their formulas and transformers', and what they hold in memory.

The Triton kernels run on a GPU, else interpreted, where fp16 stands for bf16; bench/contrastive.py checks bf16.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail.errors import DataError
from dovetail.kernels import contrastive as folder
from dovetail.kernels import twins
from dovetail.kernels.contrastive import contrastive, plain, plan, reference
from dovetail.kernels.contrastive.walk import Found, walk
from dovetail.kernels.installed import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("softmax", "rows", "sigmoid")


def made(
    n: int, m: int, d: int, dtype: torch.dtype = torch.float64, scale: float = 5.0, device: str = "cpu"
) -> list[Tensor]:
    """Normalised a and b, the scale, a bias."""
    a, b = (F.normalize(torch.randn(k, d, dtype=torch.float64)).to(device, dtype) for k in (n, m))
    wide = torch.promote_types(dtype, torch.float32)
    numbers = [torch.tensor(x, dtype=wide, device=device) for x in (scale, -2.0)]
    return [t.requires_grad_() for t in (a, b, *numbers)]


def truth(inputs: list[Tensor], form: str, offset: int = 0) -> list[Tensor]:
    """Loss and gradients by the dense twin in fp64, of an unused bias zero."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    loss = reference.contrastive(*wide[:3], form, wide[3], offset)
    return [loss, *torch.autograd.grad(loss, wide, allow_unused=True, materialize_grads=True)]


def close(found: Any, right: list[Tensor], tolerance: float, least: float = 1e-2) -> None:
    """Within the tolerance of the largest number, or of `least` where all cancel."""
    for name, x, y in zip(("loss", "da", "db", "dscale", "dbias"), found, right, strict=True):
        assert x.isfinite().all(), name
        bound = tolerance * max(least, y.abs().max().item())
        torch.testing.assert_close(x.double(), y, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


def walked(pieces: Any, inputs: list[Tensor], form: str, offset: int, rows: int) -> Found:
    with torch.no_grad():
        return walk(pieces, *inputs, form, offset, rows, (True, True, True))  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_blocks_equal_the_twin(data: st.DataObject) -> None:
    """fp64: loss and every gradient, for any cut into blocks; labels partly or all beyond the columns for sigmoid."""
    form, d, n = data.draw(st.sampled_from(FORMS)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    m = n if form == "softmax" else data.draw(st.integers(n if form == "rows" else 1, 25))
    least, most = {"softmax": (0, 0), "rows": (0, m - n), "sigmoid": (-n - 2, m + 2)}[form]
    offset, rows = data.draw(st.integers(least, most)), data.draw(st.integers(1, n + 1))
    inputs = made(n, m, d)
    close(walked(plain, inputs, form, offset, rows), truth(inputs, form, offset), 1e-12)


def test_the_formulas_of_the_papers() -> None:
    """Number by number, in Python's own."""
    inputs = made(4, 4, 3)
    a, b, (t, bias) = inputs[0].tolist(), inputs[1].tolist(), (x.item() for x in inputs[2:])
    s = [[t * sum(x * y for x, y in zip(u, v, strict=True)) for v in b] for u in a]
    by_rows = sum(math.log(sum(map(math.exp, s[i]))) - s[i][i] for i in range(4)) / 4
    by_columns = sum(math.log(sum(math.exp(s[i][j]) for i in range(4))) - s[j][j] for j in range(4)) / 4
    z = [[(1 if i == j else -1) * (s[i][j] + bias) for j in range(4)] for i in range(4)]
    by_pairs = sum(math.log(1 + math.exp(-x)) for row in z for x in row) / 4
    found = [contrastive(*inputs[:3], form, inputs[3] if form == "sigmoid" else None).item() for form in FORMS]  # type: ignore[arg-type]
    assert found == pytest.approx([(by_rows + by_columns) / 2, by_rows, by_pairs], rel=1e-13)


def test_gradcheck() -> None:
    a, b, scale, bias = made(4, 4, 3)
    for form in ("softmax", "rows"):
        assert torch.autograd.gradcheck(lambda *t, form=form: contrastive(*t, form), (a, b, scale))
    assert torch.autograd.gradcheck(lambda a, b, s, c: contrastive(a, b, s.exp(), "sigmoid", c), (a, b, scale, bias))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_equals_transformers(kind: str) -> None:
    """Whole models of theirs: the loss, and its gradients at both towers' embeddings and at their parameters."""
    import transformers

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    image = {**text, "image_size": 8, "patch_size": 4}
    more = {"projection_dim": 16} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "projection_size": 16}, vision_config=image, **more
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    out = model(input_ids=torch.randint(3, 40, (6, 5)), pixel_values=torch.randn(6, 3, 8, 8), return_loss=True)
    wanted = [out.image_embeds, out.text_embeds, model.logit_scale]
    bias = None
    if kind == "Siglip":
        bias = model.logit_bias
        wanted.append(bias)
    loss = contrastive(*wanted[:2], wanted[2].exp(), "softmax" if bias is None else "sigmoid", bias)
    torch.testing.assert_close(loss, out.loss)
    ours, theirs = (torch.autograd.grad(y, wanted, retain_graph=True) for y in (loss, out.loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_losses_of_ranks_add_up() -> None:
    """Three ranks with eight pairs each: their own rows against everybody's columns, and pairs passed round."""
    inputs = made(24, 24, 5)
    a, b, scale, bias = inputs
    spans = [slice(8 * r, 8 * r + 8) for r in range(3)]
    rows = [contrastive(x[span], y, scale, "rows", offset=span.start) for span in spans for x, y in ((a, b), (b, a))]
    pairs = [
        contrastive(a[mine], b[theirs], scale, "sigmoid", bias, offset=0 if mine == theirs else 8)
        for mine in spans
        for theirs in spans
    ]
    for loss, form in ((torch.stack(rows).mean(), "softmax"), (torch.stack(pairs).sum() / 3, "sigmoid")):
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        close([loss, *found], truth(inputs, form), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_extremes_are_finite_and_exact(form: str, dtype: torch.dtype) -> None:
    """A scale of 100 and of 0; all embeddings the same, opposite, orthogonal; gradients in the dtype of the inputs."""
    eye = torch.eye(6)
    for a, b in ((eye[:1].expand(6, 6), eye[:1].expand(6, 6)), (eye, -eye), (eye, eye), (eye, eye.roll(1, 0))):
        for scale in (100.0, 0.0):
            inputs = [t.to(dtype, copy=True).requires_grad_() for t in (a, b)]
            inputs += [torch.tensor(x, requires_grad=True) for x in (scale, -10.0)]
            loss = contrastive(*inputs[:3], form, inputs[3] if form == "sigmoid" else None)  # type: ignore[arg-type]
            found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
            tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
            close([loss, *found], truth(inputs, form), tolerance, least=max(1.0, scale))  # terms of that size cancel


def test_one_pair_alone_costs_nothing() -> None:
    a, b, scale, _ = made(1, 1, 5, torch.float32, 100.0)
    loss = contrastive(a, b, scale)
    assert loss.item() == 0 and not any(t.any() for t in torch.autograd.grad(loss, (a, b, scale)))


def test_autocast_and_narrow_types_keep_their_scores() -> None:
    """At CLIP's largest scale: nearer to fp64 than scores rounded to bf16 are."""
    wide = made(40, 40, 64, torch.float32, 100.0)
    narrow = [t.detach().to(torch.bfloat16).requires_grad_() for t in wide[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive(*wide[:3]), contrastive(*(t.detach() for t in wide[:3])))
        ours = contrastive(narrow[0], narrow[1], wide[2])
        dense = reference.contrastive(narrow[0], narrow[1], wide[2], "softmax", None, 0)
    right = truth([*narrow, *wide[2:]], "softmax")[0]
    assert abs(ours.item() - right.item()) < 1e-5 < abs(dense.item() - right.item())


class Living(TorchDispatchMode):
    """Bytes of storages that live at once, at most, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                at = t.untyped_storage().data_ptr()
                if at in given and at not in self.sizes:
                    continue  # a view of what was there before
                self.users[at] = self.users.get(at, 0) + 1
                self.sizes[at] = t.untyped_storage().nbytes()
                weakref.finalize(t, self._gone, at)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out

    def _gone(self, at: int) -> None:
        self.users[at] -= 1
        if not self.users[at]:
            del self.users[at], self.sizes[at]


def peak(run: Callable[[], Any]) -> int:
    with Living() as living:
        run()
    return living.peak


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_memory_grows_with_the_pairs_alone(form: str) -> None:
    """Peak bytes by blocks of 16 rows: doubled with n, where all scores at once take four times as much."""
    d, rows, peaks, dense = 8, 16, [], []
    for n in (256, 512):
        inputs = made(n, n, d, torch.float32)
        peaks.append(peak(lambda: walked(plain, inputs, form, 0, rows)))  # noqa: B023
        dense.append(peak(lambda: reference.contrastive(*inputs[:3], form, inputs[3], 0)))  # noqa: B023
        assert peaks[-1] < 4 * (5 * rows * n + 4 * n * d)
    assert peaks[1] < 2.05 * peaks[0] and dense[1] > 3.8 * dense[0]


def test_the_backward_keeps_the_gradients_alone() -> None:
    """Saved for it: two of (n,d) in fp32 and two numbers; of a tower that does not learn, nothing."""
    a, b, scale, bias = made(70, 70, 3, torch.float32)
    for frozen, expected in ((False, 2 * 210 + 2), (True, 210 + 2)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):  # noqa: B023
            x = a.detach() if frozen else a
            loss = contrastive(x, b, scale, "sigmoid", bias)
        assert sum(kept) == expected
        torch.testing.assert_close(
            torch.autograd.grad(loss, b)[0].double(), truth([a, b, scale, bias], "sigmoid")[2], rtol=0, atol=1e-6
        )
    with torch.no_grad():
        assert not contrastive(a, b, scale).requires_grad


def test_compiles_whole() -> None:
    """Without a graph break, and gradients are taken once: a second derivative is refused, not wrong."""
    a, b, scale, bias = inputs = made(9, 9, 4)

    def run(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive(a, b, scale.exp()) + contrastive(a.sin(), b, scale, "sigmoid", bias)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, eager = compiled(*inputs), run(*inputs)
    assert torch.equal(ours, eager)
    pairs = zip(*(torch.autograd.grad(y, inputs) for y in (ours, eager)), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for learns in ((True, True, True), (False, True, True), (False, False, False)):
        known = (a, b, scale, bias.detach(), "softmax", 0, "blocks", torch.float64, *learns)
        torch.library.opcheck(folder._run.op, known, test_utils=tests)
    first = torch.autograd.grad(run(*inputs), a, create_graph=True)[0]
    with pytest.raises(DataError, match="gradients of the contrastive loss's gradients"):
        first.sum().backward()


def test_plans_and_the_plain_twin() -> None:
    assert {plan("cpu", dtype).path for dtype in (torch.bfloat16, torch.float32, torch.float64)} == {"blocks"}
    assert {plan("cuda", dtype).path for dtype in (torch.float32, torch.float64)} == {"blocks"}
    assert plan("cuda", torch.bfloat16).path == ("triton" if TRITON else "blocks")
    inputs = made(5, 5, 3)
    with twins.plain():
        assert plan("cuda", torch.bfloat16).path == "reference"
        loss = contrastive(*inputs[:3])
    (first,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    first.sum().backward()  # only the twin can be differentiated twice


def test_what_does_not_go_together_is_refused() -> None:
    a, b, scale, bias = made(4, 6, 3)
    cases: list[tuple[str, Callable[[], Tensor]]] = [
        ("no form 'clip'", lambda: contrastive(a, a, scale, "clip")),  # type: ignore[arg-type]
        ("columns without a row", lambda: contrastive(a, b, scale)),
        ("columns without a row", lambda: contrastive(a, a, scale, offset=1)),
        ("labels 3 to 6 of 6", lambda: contrastive(a, b, scale, "rows", offset=3)),
        ("bias changes nothing", lambda: contrastive(a, a, scale, bias=bias)),
        ("against", lambda: contrastive(a, b[:, :2], scale, "rows")),
        ("against", lambda: contrastive(a[:0], b, scale, "rows")),
        ("against", lambda: contrastive(a[0, 0], b, scale, "rows")),
        ("of shape", lambda: contrastive(a, a, torch.ones(2))),
    ]
    for message, call in cases:
        with pytest.raises(DataError, match=message):
            call()


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several in few rows; and products in fp32, which CUDA takes for these tests alone, fit no large ones."""
    from dovetail.kernels.contrastive import triton

    for table in ("NORMALISERS", "GRADIENT"):
        monkeypatch.setattr(triton, table, triton.Launch(16, 32, 16, 4, 1))


@pytest.mark.parametrize(
    ("form", "n", "m", "offset", "d", "dtype"),
    [
        ("softmax", 50, 50, 0, 21, torch.float32), ("softmax", 32, 32, 0, 16, torch.float16), ("softmax", 1, 1, 0, 5, torch.float32),
        ("rows", 20, 70, 33, 21, torch.float32), ("rows", 17, 17, 0, 32, torch.float16),
        ("sigmoid", 40, 33, -13, 21, torch.float32), ("sigmoid", 20, 70, 90, 16, torch.float16),
    ],
)  # fmt: skip
def test_triton_equals_the_twin(
    form: str, n: int, m: int, offset: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that end beyond rows, columns and widths, blocks of rows that end inside a tile; scores of up to 100."""
    pytest.importorskip("triton")
    from dovetail.kernels.contrastive import triton

    if DEVICE == "cpu" or dtype == torch.float32:
        small_tiles(monkeypatch)
    inputs = made(n, m, d, dtype, 100.0, DEVICE)
    found = walked(triton, inputs, form, offset, 24)
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3}[dtype]
    # of one pair p - 1 is left, a rounding of the score of up to 100, times its scale of 100
    least = 100 * 100 * torch.finfo(torch.float32).eps / tolerance if n == m == 1 else 1e-2
    close(found, truth(inputs, form, offset), tolerance, least)
    with torch.no_grad():
        alone = walk(triton, *inputs, form, offset, 24, (False, False, False))  # type: ignore[arg-type]
    assert torch.equal(alone.loss, found.loss) and alone.a is None


def test_triton_keeps_small_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sigmoid far below zero: Σ log(1 + exp(s)) where 1 + exp(s) rounds to 1."""
    pytest.importorskip("triton")
    from dovetail.kernels.contrastive import triton

    small_tiles(monkeypatch)
    a, b, scale, _ = made(8, 8, 16, torch.float32, 1.0, DEVICE)
    bias = torch.tensor(-20.0, device=DEVICE)
    found = walked(triton, [a, b, scale, bias], "sigmoid", 9, 128)
    right = truth([a, b, scale, bias], "sigmoid", 9)
    assert found.loss.item() == pytest.approx(right[0].item(), rel=1e-5) and right[0].item() < 1e-6
