"""What the interpreter is kept from: kernels that start early, and addresses beyond what a kernel was given."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dovetail.kernels.overlap import launched, overlaps  # noqa: E402

GPU = torch.cuda.is_available()


@triton.jit
def _copied(x, y, ahead, N: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.arange(0, N)
    tl.store(y + n, tl.load(x + n + ahead))


@pytest.mark.skipif(GPU, reason="the interpreter's addresses")
@pytest.mark.parametrize("ahead", [0, 1, -1, 4096])
def test_an_address_beyond_is_seen(ahead: int) -> None:
    x, y = torch.arange(16.0), torch.zeros(16)
    if not ahead:
        _copied[(1,)](x, y, ahead, 16)
        assert torch.equal(x, y)
        return
    with pytest.raises(Exception, match="beyond the tensors it was given"):
        _copied[(1,)](x, y, ahead, 16)


def test_kernels_start_early_from_hopper_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(early=False) == {"EARLY": False}
    assert overlaps() == (GPU and torch.cuda.get_device_capability()[0] >= 9)
    if not GPU:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert triton.knobs.runtime.interpret and launched() == {"EARLY": False}
