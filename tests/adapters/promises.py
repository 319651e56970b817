"""What every kind of adapter owes, whatever it does: run on a small decoder with GQA and tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dovetail as dt
from dovetail.adapters import adapt, adapters, load_adapter, merge, off, remove, route, save_adapter, trainable, unmerge
from dovetail.errors import BuildError, CheckpointError, DovetailError
from dovetail.objectives.next_token import NextToken
from models import peers

TOKENS = torch.randint(1, 31, (2, 11), generator=torch.Generator().manual_seed(3))


def decoder(**block: Any) -> Any:
    """Two layers, four heads on two key/value heads, tied embeddings; every bias and norm is away from its start."""
    spec = {
        "kind": "decoder", "vocab": 31, "dim": 16, "depth": 2, "head": {"kind": "ref", "path": "embedding"},
        "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}, **block},
    }  # fmt: skip
    return peers.randomise(dt.build(spec)).eval()


def shake(model: Any, name: str, seed: int = 5) -> None:
    """One adapter's parameters moved away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".adapters.{name}." in key:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def check(
    model: Any,
    spec: Mapping[str, Any],
    folder: Path,
    *,
    before: Any = None,
    identity: bool = True,
    compiled: bool = True,
) -> None:
    """Every promise in turn. before: makes the adapters ready that this one needs. compiled: seconds, so once a kind
    (by tests/matrix) and once for what runs otherwise."""
    if before is not None:
        before(model)
    with torch.no_grad():
        plain = model(TOKENS).logits
    others = list(adapters(model))
    bits = {n: p.clone() for n, p in model.named_parameters()}
    adapt(model, spec, name="a", seed=1)
    with torch.no_grad():
        assert not identity or torch.equal(model(TOKENS).logits, plain)
    _gradients(model)
    shake(model, "a")
    with torch.no_grad():
        adapted = model(TOKENS).logits
    assert (adapted - plain).abs().max() > 1e-3
    _decoding(model)
    if compiled:
        _compiled(model)
    _saved(model, spec, folder, adapted, before)
    _routed(model, spec, plain, adapted, others)
    _merged(model, adapted)
    if not others:
        with off(model):
            assert torch.equal(model(TOKENS).logits, plain)
    remove(model, "a")
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters()) and list(adapters(model)) == others


def _gradients(model: Any) -> None:
    """They reach the adapter's parameters, all of them, and no others; the same with checkpointing, and added up over
    micro-batches as training does it."""
    wanted = trainable(model)
    assert wanted and all(".adapters.a." in n and p.dtype == torch.float32 for n, p in wanted.items())
    was = {n: p.detach().clone() for n, p in wanted.items()}
    shake(model, "a", seed=9)
    plain = grads(model)
    assert all(g.abs().max() > 0 for g in plain.values()), {n for n, g in plain.items() if not g.abs().max() > 0}
    assert all(p.grad is None for n, p in model.named_parameters() if n not in wanted)
    model.train()
    model.checkpointing = True
    for name, gradient in grads(model).items():
        peers.close(gradient, plain[name], 1e-5, name)
    model.checkpointing = False
    model.eval()
    _accumulated(model)
    with torch.no_grad():
        for n, p in wanted.items():
            p.copy_(was[n])


def _accumulated(model: Any) -> None:
    """Two ragged rows at once, or one after the other: the same gradients of the loss."""
    labels = torch.cat([TOKENS[:, 1:], TOKENS[:, :1]], 1)
    labels[0, 4:] = -100
    batch, found = {"tokens": TOKENS, "labels": labels}, []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        micro = [{name: x[part] for name, x in batch.items()} for part in parts]
        counts = {"next_token": sum(NextToken().counts(one)["next_token"] for one in micro)}
        for one in micro:
            NextToken()(model, one).total(counts).backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
        model.zero_grad()
    for name, gradient in found[1].items():
        peers.close(gradient, found[0][name], 1e-5, name)


def grads(model: Any, run: Any = None) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the logits by what trains."""
    weight = torch.randn(2, 11, 31, generator=torch.Generator().manual_seed(1))
    ((model if run is None else run)(TOKENS).logits * weight).sum().backward()
    found = {}
    for name, p in trainable(model).items():
        assert p.grad is not None, name
        found[name], p.grad = p.grad, None
    return found


@torch.no_grad()
def _decoding(model: Any) -> None:
    """Steps, padding, packing, and beams that change places."""
    peers.check_decoding(model, TOKENS, 1e-5)
    peers.check_padding(model, TOKENS, 1e-5)
    peers.check_packing(model, TOKENS, 1e-5)
    state = model.new_state(2, 11)
    model(TOKENS[:, :6], state=state)
    state.reorder(torch.tensor([1, 0]))
    swapped = model(TOKENS[:, 6:], state=state).logits
    mixed = torch.cat([TOKENS[[1, 0], :6], TOKENS[:, 6:]], 1)
    peers.close(swapped, model(mixed).logits[:, 6:], 1e-5, "beams")


def _compiled(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager_default_partitioner", fullgraph=True)
    want = grads(model)
    for name, gradient in grads(model, compiled).items():
        peers.close(gradient, want[name], 1e-5, name)
    torch._dynamo.reset()


def _saved(model: Any, spec: Mapping[str, Any], folder: Path, adapted: Tensor, before: Any) -> None:
    """Saved alone and put on the same model again; a file with another key is refused, and the model is as it was."""
    save_adapter(model, folder / "kept", name="a", format="dovetail")
    held = adapters(model)["a"]
    remove(model, "a")
    load_adapter(model, folder / "kept", name="a")
    with torch.no_grad():
        assert adapters(model)["a"] == held and torch.equal(model(TOKENS).logits, adapted)
    remove(model, "a")
    file = folder / "kept" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    for broken in ({k: t for k, t in tensors.items() if k != first}, tensors | {"extra": tensors[first].clone()}):
        save_file(broken, file)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_adapter(model, folder / "kept", name="a")
        assert "a" not in adapters(model)
    save_file(tensors, file)
    load_adapter(model, folder / "kept", name="a")
    for key, p in model.named_parameters():
        p.requires_grad_(".adapters.a." in key)


@torch.no_grad()
def _routed(model: Any, spec: Mapping[str, Any], plain: Tensor, adapted: Tensor, others: list[str]) -> None:
    """Rows of one batch through different adapters."""
    adapt(model, spec, name="b", seed=2)
    shake(model, "b", seed=6)
    dt.adapters.use(model, "b")
    second = model(TOKENS).logits
    assert (second - adapted).abs().max() > 1e-3
    with route(model, ["b", "a"]):
        rows = model(TOKENS).logits
        state = model.new_state(2, 11)
        steps = [model(part, state=state).logits for part in TOKENS.split([7, 4], 1)]
    peers.close(rows, torch.stack([second[0], adapted[1]]), 1e-5)
    peers.close(torch.cat(steps, 1), rows, 1e-5)
    with route(model, [None, "a"]):
        rows = model(TOKENS).logits
    peers.close(rows[1], adapted[1], 1e-5)
    if not others:
        peers.close(rows[0], plain[0], 1e-5)
    remove(model, "b")
    dt.adapters.use(model, "a")
    peers.close(model(TOKENS).logits, adapted, 0.0)


@torch.no_grad()
def _merged(model: Any, adapted: Tensor) -> None:
    bits = {n: p.clone() for n, p in model.named_parameters()}
    if not adapters(model)["a"].mergeable:
        with pytest.raises(BuildError, match="not a change of weights"):
            merge(model)
    else:
        merge(model)
        peers.close(model(TOKENS).logits, adapted, 1e-5)
        with pytest.raises(DovetailError, match="merged into"):
            dt.adapters.use(model, "a")
        unmerge(model)
    now = dict(model.named_parameters())
    assert now.keys() == bits.keys() and all(torch.equal(p, bits[n]) for n, p in now.items())
