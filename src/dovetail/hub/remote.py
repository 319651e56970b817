"""Hub ids to local directories, through huggingface-hub; offline when the files are cached."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from dovetail.errors import CheckpointError

_TEXTS = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja"]
PATTERNS = ["*.safetensors", *_TEXTS]


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of a local path, or of a hub id (downloaded, or taken from the cache when offline).

    weights: whether they are wanted too. Only weights in safetensors, configs and tokenizer files are fetched: never code, never pickles.
    """
    local = Path(path)
    if local.is_dir():
        return local
    name = str(path)
    if local.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"no directory {name!r}", remedy="give the directory of a model, or a hub id such as owner/name"
        )
    patterns = PATTERNS if weights else _TEXTS
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"no directory and no hub repository {name!r}", remedy="check the name; gated models need a login"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is not a directory here, and the hub gave nothing ({type(error).__name__})",
            remedy="check the name and the connection, or give a local directory",
        ) from None
