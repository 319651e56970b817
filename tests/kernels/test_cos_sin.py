"""Tables of cosines and sines are made once in a compiled model, not anew in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import dovetail as dt
from dovetail.kernels import cos_sin


def test_layers_share_one_table(monkeypatch: Any) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    monkeypatch.setattr(cos_sin, "_FEW", 16)
    blocks = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}}
    model = dt.build({"kind": "decoder", "vocab": 17, "dim": 16, "depth": 2, "context": 16, "blocks": blocks})
    seen: list[str] = []

    def kept(graph: fx.GraphModule, _: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph)

    tokens = torch.randint(0, 17, (2, 16))
    compiled: Any = torch.compile(model, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept), fullgraph=True)
    found, expected = (run(tokens).logits for run in (compiled, model))
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert [name for name in seen if "cos" in name or ".sin" in name] == ["dovetail.cos_sin.default"]
    torch.compiler.reset()


def test_few_and_learned_angles_are_left_to_the_compiler(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cos_sin, "_cos_sin", None)
    for angle in (torch.rand(4, 8), torch.rand(100, 100, requires_grad=True)):
        cos, sin = cos_sin.cos_sin(angle)
        torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(angle))
