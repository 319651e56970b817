"""Weight files: safetensors only, single or sharded, read with checks."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dovetail.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
CONFIGS = ("config.json", "params.json", "dovetail.json", "modules.json")
ADAPTER, ADAPTER_CONFIGS = "adapter_model.safetensors", ("adapter_config.json", "adapter.json")
SHARD_BYTES = 5 * 10**9


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """File name -> the tensors to take from it (None: all). Raises CheckpointError when there are no safetensors."""
    index = folder / INDEX
    if index.exists():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise CheckpointError("the index has no weight_map", where=str(index))
        files: dict[str, list[str] | None] = {}
        for tensor, name in placed.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"the index places {tensor!r} outside its folder: {name!r}", where=str(index))
            files.setdefault(name, []).append(tensor)  # type: ignore[union-attr]
        beside = sorted(p.name for p in folder.glob("*.safetensors") if rival(p.name) and p.name not in files)
        if beside and files:
            raise CheckpointError(
                f"{beside[0]} is not in {INDEX}, which names {sorted(files)[0]} and its like: two sets of weights",
                where=str(folder),
                remedy="leave one set of weight files in the folder: remove the index with its files, or the other",
            )
        return files
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if SINGLE in found:
        return {SINGLE: None}
    if found:
        return dict.fromkeys(found)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise CheckpointError(
            f"only pickled weights here ({', '.join(pickles[:3])}), and unpickling can run code",
            where=str(folder),
            remedy="convert them to model.safetensors where you trust them (safetensors.torch.save_file)",
        )
    raise CheckpointError("no weights here (*.safetensors)", where=str(folder), remedy="check the path")


def rival(name: str) -> bool:
    """Is this a file that others read as the model's weights, or as a part of them?"""
    return name == SINGLE or re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) is not None


def _is_there(path: Path) -> bool:
    """Whether a file stands there, of whatever name: one may be too long for the system to look for."""
    try:
        return path.exists()
    except OSError:
        return False


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by stored name, and the file each came from. Raises CheckpointError for a damaged file."""
    tensors: dict[str, Tensor] = {}
    placed: dict[str, str] = {}
    for name, wanted in weight_files(folder).items():
        path = folder / name
        if not _is_there(path):
            raise CheckpointError(
                f"the index names {name[:80]}, which is not there", where=str(folder), remedy="download it again"
            )
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                unknown = sorted(keys - set(keys if wanted is None else wanted))
                if unknown:
                    raise CheckpointError(
                        f"{name} holds {unknown[0]!r}, which the index does not know",
                        where=str(folder),
                        remedy="the index belongs to other files: download or save them again",
                    )
                for key in sorted(keys) if wanted is None else wanted:
                    if key not in keys:
                        raise CheckpointError(
                            f"{name} does not hold {key!r}, which the index places there", where=str(folder)
                        )
                    if key in tensors:
                        raise CheckpointError(
                            f"{key!r} is stored twice, in {placed[key]} and in {name}",
                            where=str(folder),
                            remedy="leave one set of weight files in the folder, or an index that chooses",
                        )
                    tensors[key] = file.get_tensor(key)
                    placed[key] = name
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{name} is not a whole safetensors file ({error})",
                where=str(path),
                remedy="it may be truncated: download or save it again",
            ) from None
    return tensors, placed


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by stored name, without reading the tensors."""
    out: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        with contextlib.suppress(SafetensorError, OSError), safe_open(folder / name, framework="pt") as file:
            out.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
    return out


def write_weights(folder: Path, tensors: Mapping[str, Tensor], placed: Mapping[str, str] | None = None) -> None:
    """Tensors to safetensors: the files they came from if told, else one file or shards of 5 GB."""
    groups = _groups(tensors, placed or {})
    for name, keys in groups.items():
        save_file(
            {key: tensors[key].detach().contiguous().cpu() for key in keys}, folder / name, metadata={"format": "pt"}
        )
    if len(groups) > 1:
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {key: name for name, keys in groups.items() for key in keys}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _groups(tensors: Mapping[str, Tensor], placed: Mapping[str, str]) -> dict[str, list[str]]:
    if placed and set(tensors) <= set(placed):
        groups: dict[str, list[str]] = {}
        for key in tensors:
            groups.setdefault(placed[key], []).append(key)
        return groups
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": keys for i, keys in enumerate(shards)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} here", where=str(path.parent), remedy="check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not readable JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} holds a {type(data).__name__}, not an object", where=str(path))
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """torch.float32 from "float32" (or "torch.float32"). Raises CheckpointError for what is not computed in."""
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        what = f"no dtype {name!r}" if not isinstance(found, torch.dtype) else f"dtype {found} is not computed in"
        raise CheckpointError(what, remedy="use float32, bfloat16, float16 or float64")
    return found
