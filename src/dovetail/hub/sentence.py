"""sentence-transformers directories: an encoder and, as data, what is done with its hidden states. No code is run.

modules.json lists the modules in order: Transformer (config.json and weights), Pooling, then Dense and Normalize in any
number. Their configs say the encoder's `pooling`; a Dense has weights in its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dovetail.errors import CheckpointError, ConfigError
from dovetail.hub import files
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.parts.activation import Gelu, Relu, Sigmoid, Silu, Tanh
from dovetail.parts.pooling import Concat, DensePooling, First, Last, Max, Mean, MeanSqrt, Unit, WeightedMean
from dovetail.spec import Spec

MODULES = "modules.json"
# In the order in which several are put side by side: (new name, old key, part).
_MODES = (
    ("cls", "pooling_mode_cls_token", First()),
    ("max", "pooling_mode_max_tokens", Max()),
    ("mean", "pooling_mode_mean_tokens", Mean()),
    ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", MeanSqrt()),
    ("weightedmean", "pooling_mode_weightedmean_tokens", WeightedMean()),
    ("lasttoken", "pooling_mode_lasttoken", Last()),
)
_ACTIVATIONS: dict[str, Spec | None] = {
    "torch.nn.modules.activation.Tanh": Tanh(),
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.GELU": Gelu(),
    "torch.nn.modules.activation.ReLU": Relu(),
    "torch.nn.modules.activation.Sigmoid": Sigmoid(),
    "torch.nn.modules.activation.SiLU": Silu(),
}


@dataclass(frozen=True)
class Sentence:
    """What such a directory adds to its encoder. base: the encoder's folder in it. pooling: of the encoder's spec.

    dense: folders of the Dense modules, the first applied first. texts: its JSON files as they are, by path. width: of
    the hidden states that are pooled, where it says so.
    """

    base: str
    pooling: Any
    dense: tuple[str, ...] = ()
    texts: dict[str, bytes] = field(default_factory=dict)
    width: int | None = None

    def onto(self, spec: Spec, where: str) -> Spec:
        """The encoder's spec with this pooling. Raises ConfigError where they do not fit."""
        if not isinstance(spec, Encoder):
            raise ConfigError(
                f"sentence embeddings from a {spec.kind} are not supported", where=where, remedy="give an encoder"
            )
        if self.width not in (None, spec.dim):
            raise ConfigError(f"a pooling of width {self.width} over an encoder of width {spec.dim}", where=where)
        return bare(spec).replace(pooling=self.pooling)

    def names(self) -> dict[str, str]:
        """Folder of each Dense -> the path of its map in the model."""
        paths, part, path = [], self.pooling, "pooling"
        while isinstance(part, DensePooling | Unit):
            if isinstance(part, DensePooling):
                paths.append(f"{path}.linear")
            part, path = part.of, f"{path}.of"
        return dict(zip(self.dense, reversed(paths), strict=True))

    def load(self, folder: Path) -> dict[str, Tensor]:
        """The weights of the Dense modules by our names. Raises CheckpointError for what is missing or left over."""
        ours: dict[str, Tensor] = {}
        for path, name in self.names().items():
            stored, _ = files.read_weights(folder / path)
            odd = stored.keys() - {"linear.weight", "linear.bias"}
            if odd:
                raise CheckpointError(f"tensors are left over: {', '.join(sorted(odd))}", where=str(folder / path))
            ours |= {f"{name}.{kind.removeprefix('linear.')}": t for kind, t in stored.items()}
        return ours

    def write(self, scratch: Path, ours: dict[str, Tensor]) -> None:
        """The JSON files and the weights of the Dense modules."""
        for name, text in self.texts.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(text)
        for path, name in self.names().items():
            mine = {f"linear.{n.rpartition('.')[2]}": t for n, t in ours.items() if n.startswith(f"{name}.")}
            files.write_weights(scratch / path, mine)


def bare(spec: Any) -> Any:
    """An encoder's spec without what is made of a whole row."""
    return spec.replace(pooling=None, classifier=None, classes=None, classifier_dropout=0.0)


def read(folder: Path) -> Sentence | None:
    """What modules.json says; None where there is none. Raises ConfigError for modules and keys that are not known."""
    path = folder / MODULES
    if not path.exists():
        return None
    texts = {MODULES: path.read_bytes()}
    try:
        modules = json.loads(texts[MODULES])
        steps = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"not a list of modules with type and path ({error!r})", where=str(path)) from None
    if [kind for kind, _ in steps[:2]] != ["Transformer", "Pooling"]:
        kinds = ", ".join(kind for kind, _ in steps)
        raise ConfigError(
            f"modules {kinds}", where=str(path), remedy="supported: Transformer, Pooling, then Dense and Normalize"
        )
    for _, place in steps:
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise ConfigError(f"a module outside the directory: {place!r}", where=str(path))
    base, pooling, dense, width = steps[0][1], None, [], None
    for name in ("config_sentence_transformers.json", f"{base}/sentence_bert_config.json".lstrip("/")):
        if (folder / name).exists():
            texts[name] = (folder / name).read_bytes()
    for kind, place in steps[1:]:
        at = folder / place / "config.json"
        config = ConfigReader(files.read_json(at) if at.exists() else {}, str(at))
        if at.exists():
            texts[f"{place}/config.json"] = at.read_bytes()
        if kind == "Pooling" and pooling is None:
            width = config.int("word_embedding_dimension", None) or config.int("embedding_dimension", None)
            pooling = _read_pooling(config)
        elif kind == "Dense":
            pooling = _read_dense(config, pooling)
            dense.append(place)
        elif kind == "Normalize":
            pooling = Unit(of=pooling)  # type: ignore[arg-type]
        else:
            raise ConfigError(
                f"module {kind!r}", where=str(path), remedy="supported: Dense and Normalize behind one Pooling"
            )
        config.finish()
    return Sentence(base, pooling, tuple(dense), texts, width)


def _read_pooling(config: ConfigReader) -> Spec:
    config.only("include_prompt", [True], "leaving a prompt's tokens out of the mean is not supported")
    modes = config.take("pooling_mode", None, (str, list))
    flags = [config.bool(key, False) for _, key, _ in _MODES]
    names = [modes] if isinstance(modes, str) else modes
    if names is None:
        names = [name for (name, _, _), on in zip(_MODES, flags, strict=True) if on] or ["mean"]
    table = {name: part for name, _, part in _MODES}
    unknown = [name for name in names if name not in list(table)]  # which may be anything, a list too
    if unknown or not names:
        what = f"pooling mode {unknown[0]!r}" if unknown else "an empty pooling_mode"
        raise ConfigError(what, where=config.where, remedy=f"supported: {', '.join(table)}")
    parts = tuple(table[name] for name in names)
    return parts[0] if len(parts) == 1 else Concat(of=parts)


def _read_dense(config: ConfigReader, of: Any) -> Spec:
    config.inert("in_features")  # the pooling's width, which the weight shows
    config.only("use_residual", [False], "a residual around a Dense is not supported")
    for key in ("module_input_name", "module_output_name"):
        config.only(key, ["sentence_embedding"], "a Dense on single tokens is not supported")
    activation = config.choose("activation_function", _ACTIVATIONS, "torch.nn.modules.activation.Tanh")
    return DensePooling(of=of, size=config.int("out_features"), activation=activation, bias=config.bool("bias", True))


def said_as(spec: Any, before: Sentence | None) -> Sentence | None:
    """The files in which a model's pooling is said: those it was loaded from where it still is the same.

    None where there is none, where it is BERT's own pooler, or where this layout cannot say it.
    """
    if not isinstance(spec, Encoder) or spec.pooling is None or spec.classifier is not None:
        return None
    if before is not None and before.pooling == spec.pooling:
        return before
    if before is None and isinstance(spec.pooling, DensePooling) and isinstance(spec.pooling.of, First):
        return None
    steps: list[Any] = []
    part: Any = spec.pooling
    while isinstance(part, DensePooling | Unit):
        steps.insert(0, part)
        part = part.of
    modes = part.of if isinstance(part, Concat) else (part,)
    order = [known for _, _, known in _MODES]
    if any(mode not in order for mode in modes) or list(modes) != [known for known in order if known in modes]:
        return None
    said: dict[str, Any] = {"word_embedding_dimension": spec.dim} | {key: p in modes for _, key, p in _MODES}
    configs: dict[str, Any] = {"1_Pooling": said}
    modules = ["", "1_Pooling"]
    dense, wide = [], part.width(spec.dim)
    for step in steps:
        modules.append(f"{len(modules)}_{'Dense' if isinstance(step, DensePooling) else 'Normalize'}")
        if isinstance(step, DensePooling):
            name = next((n for n, a in _ACTIVATIONS.items() if a == step.activation), None)
            if name is None or step.dropout:
                return None
            size = step.width(spec.dim)
            configs[modules[-1]] = {
                "in_features": wide,
                "out_features": size,
                "bias": step.bias,
                "activation_function": name,
            }
            dense.append(modules[-1])
            wide = size
    kinds = [path.partition("_")[2] or "Transformer" for path in modules]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(modules, kinds, strict=True))
    ]
    texts = {MODULES: _text(listed)} | {f"{path}/config.json": _text(config) for path, config in configs.items()}
    texts["sentence_bert_config.json"] = _text({"max_seq_length": spec.context, "do_lower_case": False})
    return Sentence("", spec.pooling, tuple(dense), texts)


def _text(data: Any) -> bytes:
    return (json.dumps(data, indent=2)).encode()
