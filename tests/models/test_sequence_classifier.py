"""The sequence classifier against torch.nn: a recurrence, a Transformer; every recurrent mixer in it; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dovetail as dt
from dovetail.errors import BuildError, DataError
from oracles import oracle_for

SMALL = {"kind": "sequence_classifier", "features": 3, "dim": 16, "classes": 5, "depth": 1}


def same(ours: Any, theirs: Any, named: dict[str, str], x: Tensor) -> None:
    """Outputs and gradients: named is our parameter's name -> theirs."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert len(named) == len(mine)
    with torch.no_grad():
        for name, p in mine.items():
            other[named[name]].copy_(p)
    found, want = ours(x).class_logits, theirs(x)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((found * weight).sum(), list(mine.values()))
    wanted = torch.autograd.grad((want * weight).sum(), [other[named[name]] for name in mine])
    for name, one, two in zip(mine, grads, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10, msg=name)


class LastOfLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.lstm, self.judge = nn.Linear(3, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.lstm(self.read(x))[0][:, -1])


class MeanOfTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 2, 24, 0.0, "relu", layer_norm_eps=1e-5, batch_first=True, norm_first=True
        )
        self.read, self.place, self.judge = nn.Linear(3, 16), nn.Embedding(7, 16), nn.Linear(16, 5)
        self.stack = nn.TransformerEncoder(layer, 1, nn.LayerNorm(16), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.stack(self.read(x) + self.place.weight[: x.shape[1]]).mean(1))


@oracle_for("model", "sequence_classifier")
def test_a_recurrence_is_torch_s() -> None:
    blocks = {"kind": "recurrent", "mixer": "lstm"}
    ours = dt.build(SMALL | {"norm": None, "pooling": "last", "blocks": blocks}, dtype=torch.float64)
    named = {n: n for n in ("read.weight", "read.bias")}
    named |= {f"classifier.linear.{n}": f"judge.{n}" for n in ("weight", "bias")}
    named |= {f"blocks.0.mixer.{n}": f"lstm.{n}" for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}
    same(ours, LastOfLstm().double(), named, torch.randn(2, 9, 3, dtype=torch.float64))


@oracle_for("model", "sequence_classifier")
def test_a_transformer_is_torch_s() -> None:
    attention = {"kind": "attention", "heads": 2, "bias": "all", "position": "none"}
    feedforward = {"kind": "mlp", "hidden": 24, "activation": "relu", "bias": True}
    blocks = {"norm": {"kind": "layer", "eps": 1e-5}, "mixer": attention, "feedforward": feedforward}
    spec = SMALL | {"context": 7, "position": "learned", "norm": {"kind": "layer", "eps": 1e-5}, "blocks": blocks}
    ours: Any = dt.build(spec, dtype=torch.float64)
    theirs = MeanOfTransformer().double()
    layer: Any = theirs.stack.layers[0]
    attend = ours.blocks[0].mixer
    pairs = {
        "read": theirs.read, "classifier.linear": theirs.judge, "norm": theirs.stack.norm,
        "blocks.0.norm_mixer": layer.norm1, "blocks.0.norm_feedforward": layer.norm2,
    }  # fmt: skip
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    with torch.no_grad():
        for path, module in pairs.items():
            module.weight.copy_(ours.get_submodule(path).weight)
            module.bias.copy_(ours.get_submodule(path).bias)
        theirs.place.weight.copy_(ours.position.table.weight)
        layer.self_attn.in_proj_weight.copy_(attend.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(attend.qkv.bias)
        layer.self_attn.out_proj.weight.copy_(attend.out.weight)
        layer.self_attn.out_proj.bias.copy_(attend.out.bias)
        for mine, module in zip(
            [m for m in ours.blocks[0].feedforward.modules() if isinstance(m, nn.Linear)],
            (layer.linear1, layer.linear2),
        ):
            module.weight.copy_(mine.weight)
            module.bias.copy_(mine.bias)
    torch.testing.assert_close(ours(x).class_logits, theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mixer", "causal"),
    [(kind, False) for kind in ("hippo", "s4", "s4d", "lssl", "mamba", "lstm", "gru", "attention", "linear")]
    + [(kind, True) for kind in ("s4", "attention", "linear", "gla")],
)
def test_every_sort_of_mixer_reads_values(mixer: str, causal: bool, tmp_path: Path) -> None:
    """Left padding is right padding; what looks back alone tells nothing of later values; saved and loaded it is the same."""
    spec = SMALL | {"causal": causal, "pooling": None, "blocks": {"mixer": mixer, "feedforward": None}}
    judge: Any = dt.build(spec)
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    both = judge(torch.cat([x, y], 1)).class_logits[:, :6]
    alone = judge(x).class_logits
    backward = mixer not in ("attention", "linear") or causal
    assert torch.allclose(both, alone, rtol=1e-4, atol=1e-5) is backward
    pad, real = torch.randn(2, 2, 3), torch.ones(2, 6)
    for order, mask in (([pad, x], [0 * real[:, :2], real]), ([x, pad], [real, 0 * real[:, :2]])):
        padded = judge(torch.cat(order, 1), attention_mask=torch.cat(mask, 1)).class_logits
        part = padded[:, 2:] if order[0] is pad else padded[:, :6]
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)
    again = dt.load(dt.save(judge, tmp_path / "it", format="dovetail"))
    torch.testing.assert_close(again(x).class_logits, alone)


def test_refusals() -> None:
    judge: Any = dt.build(SMALL)
    for shape in ((2, 6), (2, 6, 4)):
        with pytest.raises(DataError, match="values have shape"):
            judge(torch.zeros(shape))
    with pytest.raises(BuildError, match="class for each row"):
        judge.head(torch.zeros(2, 16))
    with pytest.raises(BuildError, match="does not go on"):
        judge.new_state(1, 4)
    with pytest.raises(BuildError, match="two streams"):
        dt.build(SMALL | {"streams": 2, "blocks": {"kind": "reversible"}})
