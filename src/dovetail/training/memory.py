"""Memory of training, predicted from a built model (the meta device will do) before anything is allocated.

Sharded over all devices (FSDP2, ZeRO-3), bytes a parameter:

| | full, mixed precision | LoRA | QLoRA |
| --- | --- | --- | --- |
| weights in bf16 | 2 | 2 | linear maps of the blocks as their storage keeps them (NF4 0.516), others 2 |
| gradients | bf16 2 + fp32 4 | of the adapters alone | of the adapters alone |
| master weights fp32 | 4 | of the adapters alone | of the adapters alone |
| Adam's moments fp32 | 8 | of the adapters alone | of the adapters alone |

(Rajbhandari et al. 2020, section 3.1, with gradients accumulated in fp32; Dettmers et al. 2023, section 3.)
On every device besides: activations (each linear map of a block keeps its input and output in bf16, each norm its
input in fp32; with checkpointing one fp32 vector a token and block, and one block in full), one chunk of logits with
its gradient, two blocks gathered in bf16 with one's gradient (when sharded), frozen models that the objective reads
(a teacher, in fp32), and 1 GB of runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dovetail.parts.storage.base import Storage
from dovetail.parts.storage.nf4 import Nf4
from dovetail.training.flops import flops_per_token, parameter_count

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
FROZEN = "frozen "  # begins the names of helpers' bytes

_FULL = {"weights": 2.0, "gradients": 2.0 + 4.0, "master weights": 4.0, "Adam": 8.0}  # bytes a parameter
_RUNTIME = 1e9
_LOGITS = 2**23  # the objective's chunk
_MOST = 65_536  # devices


@dataclass(frozen=True)
class Estimate:
    """sharded: bytes that all devices share; each: bytes that every device holds besides. devices: how many it takes.

    total: bytes over all devices. devices is None where no number of such devices is enough. storage: of the codes.
    """

    method: Method
    sharded: dict[str, float]
    each: dict[str, float]
    device_bytes: float
    devices: int | None
    storage: Storage | None = None

    @property
    def name(self) -> str:
        """The method and its storage, for people."""
        return self.method if self.storage is None else f"{self.method} ({self.storage.kind})"

    @property
    def total(self) -> float:
        return sum(self.sharded.values()) + (self.devices or 1) * sum(self.each.values())

    @property
    def fits(self) -> bool:
        """On one device."""
        return self.devices == 1


def estimate(
    model: nn.Module,
    method: Method = "full",
    *,
    batch: int = 1,
    length: int = 2048,
    checkpointing: bool = True,
    rank: int = 16,
    device_bytes: float = 80e9,
    helpers: Mapping[str, float] | None = None,
    storage: Storage | None = None,
) -> Estimate:
    """Memory to train `model` with `batch` rows of `length` tokens on each device, by the table above.

    rank: of LoRA adapters on every linear map of the blocks. helpers: role -> bytes of frozen models that every device
    holds whole. storage: how "qlora" keeps the weights of those maps, NF4 unless given; other methods have no use for it.
    """
    storage = None if method != "qlora" else storage or Nf4()
    blocks = list(_blocks(model))
    linears = [m for b in blocks for m in b.modules() if isinstance(m, nn.Linear)]
    everything = parameter_count(model)
    if method == "full":
        sharded = {name: size * everything for name, size in _FULL.items()}
    else:
        adapters = rank * sum(m.in_features + m.out_features for m in linears)
        shapes = [] if storage is None else [(m.out_features, m.in_features) for m in linears]
        base = 2.0 * (everything - sum(n * k for n, k in shapes)) + _codes(storage, shapes)
        sharded = {"weights": base, "adapters and their states": sum(_FULL.values()) * adapters}
    each = _activations(model, blocks, batch * length, checkpointing) | {"runtime": _RUNTIME}
    each |= {f"{FROZEN}{role}": size for role, size in (helpers or {}).items()}
    block_bytes = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    gathered = block_bytes * (2 * 2.0 + (2.0 if method == "full" else 0.0))
    if sum(sharded.values()) + sum(each.values()) <= device_bytes:
        return Estimate(method, sharded, each, device_bytes, 1, storage)
    each["gathered blocks"] = gathered
    room = device_bytes - sum(each.values())
    devices = None if room <= 0 else max(2, -int(-sum(sharded.values()) // room))
    return Estimate(method, sharded, each, device_bytes, devices if devices and devices <= _MOST else None, storage)


def coded_bytes(model: nn.Module, storage: Storage) -> float:
    """Of the weights where the blocks' frozen linear maps are kept as `storage` does and all others as they are, adapters
    among them."""
    maps = [m.weight for b in _blocks(model) for m in b.modules() if isinstance(m, nn.Linear)]
    maps = [w for w in maps if w is not None and not w.requires_grad]
    whole = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return float(whole - sum(w.numel() * w.element_size() for w in maps)) + _codes(storage, [w.shape for w in maps])


def _codes(storage: Storage | None, shapes: Iterable[Sequence[int]]) -> float:
    """Bytes of weights of these shapes as a storage keeps them."""
    if storage is None:
        return 0.0
    each = Counter(tuple(shape) for shape in shapes)
    return float(
        sum(n * sum(t.nbytes for t in storage.empty(shape, device="meta").buffers()) for shape, n in each.items())
    )


def train_flops(model: nn.Module, method: Method, length: int, checkpointing: float) -> float:
    """Operations a token really computed: no weight gradients under a frozen base, the forward twice when recomputed.

    checkpointing: share of the blocks that are."""
    forward = flops_per_token(model, length)
    return forward * ((3.0 if method == "full" else 2.0) + checkpointing)


def _activations(model: nn.Module, blocks: list[nn.Module], tokens: int, checkpointing: bool) -> dict[str, float]:
    spec: Any = getattr(model, "spec", None)
    dim, vocab = getattr(spec, "dim", 0), getattr(spec, "vocab", 0)
    per_block = [_saved(block) * tokens for block in blocks]
    if checkpointing:
        kept = len(blocks) * 4.0 * dim * tokens + max(per_block, default=0.0)
    else:
        kept = sum(per_block)
    rows = min(tokens, max(64, _LOGITS // max(1, vocab)))
    return {"activations": kept + 4.0 * dim * tokens, "logits": rows * vocab * (2.0 + 4.0 + 2.0)}


def _saved(block: nn.Module) -> float:
    """Bytes a token that one block keeps for its backward."""
    size = 0.0
    for module in block.modules():
        if isinstance(module, nn.Linear):
            size += 2.0 * (module.in_features + module.out_features)
        elif not list(module.children()) and getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            size += 4.0 * module.weight.numel()  # type: ignore[union-attr]
    return size


def _blocks(model: nn.Module) -> list[nn.Module]:
    stacks = [getattr(m, "blocks", None) for m in model.modules()]
    return [block for stack in stacks if isinstance(stack, nn.ModuleList) for block in stack]


def remedies(
    model: nn.Module,
    found: Estimate,
    *,
    batch: int,
    length: int,
    checkpointing: bool,
    helpers: Mapping[str, float] | None = None,
) -> list[str]:
    """What to change when `found` does not fit on one device, the mildest first, each with what it would then need."""
    tries: list[tuple[str, dict[str, Any]]] = []
    here: dict[str, Any] = {"method": found.method, "batch": batch, "length": length, "checkpointing": checkpointing}
    here |= {"helpers": helpers, "storage": found.storage}
    if not checkpointing:
        here["checkpointing"] = True
        tries.append(("train.checkpointing=true", dict(here)))
    if batch > 1:
        here["batch"] = 1
        tries.append((f"train.batch=1 train.accumulate={batch} as well (the same step)", dict(here)))
    if length > 512:
        tries.append(("train.length=512 as well", here | {"length": 512}))
    smaller = METHODS[METHODS.index(found.method) + 1 :]
    tries.extend(("{} instead of " + found.name, here | {"method": method}) for method in smaller)
    lines = []
    for text, arguments in tries:
        got = estimate(model, device_bytes=found.device_bytes, **arguments)
        text = text.format(got.name)
        single = sum(got.sharded.values()) + sum(v for k, v in got.each.items() if k != "gathered blocks")
        lines.append(f"{text}: {single / 1e9:,.1f} GB" + (", which fits" if got.fits else ""))
        if got.fits:
            break
    if found.devices:
        lines.append(f"or {found.devices} such devices, sharded")
    return lines
