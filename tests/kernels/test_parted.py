"""Parts of one product, whose gradient is one operation in a compiled model on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import dovetail as dt
from dovetail.kernels.counted import as_on
from dovetail.kernels.parted import parted


def test_a_compiled_model_puts_the_gradient_together_once() -> None:
    """The same logits and gradients as eager, one operation a layer; a device that is not CUDA is left to the compiler."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    blocks = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "feedforward": None}
    model = dt.build({"kind": "decoder", "vocab": 17, "dim": 16, "depth": 2, "context": 16, "blocks": blocks})
    tokens = torch.randint(0, 17, (2, 16))
    expected = model(tokens).logits
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for device, times in (("cuda", 2), ("cpu", 0)):
        seen: list[str] = []

        def kept(graph: fx.GraphModule, _: Any, seen: list[str] = seen) -> Any:
            seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
            return make_boxed_func(graph)

        torch.compiler.reset()
        compiled: Any = torch.compile(model, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept), fullgraph=True)
        with as_on(device):
            found = compiled(tokens).logits
            gradients = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients, wanted)
        assert seen.count("dovetail.together.default") == times
    torch.compiler.reset()


def test_parts_are_views() -> None:
    x = torch.randn(2, 3, 10)
    for part, right in zip(parted(x, (5, 3, 2)), x.split([5, 3, 2], -1), strict=True):
        assert torch.equal(part, right) and part._base is x
