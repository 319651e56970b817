"""A folder that is written whole or not at all, over what an older save left there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dovetail.errors import CheckpointError, RunError
from dovetail.hub import files

# An unfinished save beside its target; a target whose successor stands; a whole save that is being moved in, file by file.
_PART, _OLD, _WHOLE = ".part", ".old", ".whole"
_NAMES = ".names"  # in a whole save: what it held before the moving began
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that takes `target`'s place in one step, once all its files are written and synced.

    A kill or a full disk before that leaves `target` as it was. Weights and configs of an older save go; whatever
    else lay in `target` (logs, notes, weights of other names) stays. What dead saves of the same target left is cleared
    first (see `_clear`). A folder that cannot be moved, because it is a mount or somebody works in it, gets file by
    file, the configs last. Raises RunError when the disk gives out.
    """
    target = target.resolve()
    with contextlib.ExitStack() as locks:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "a file stands there")
            _clear(target)
            scratch = _scratch(target, locks)
        except OSError as error:
            raise RunError(
                f"could not save: {error.strerror or error}",
                where=str(target),
                remedy="choose a place that can be written",
            ) from error
        try:
            yield scratch
            for path in scratch.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())  # some writers make private files
                sync(path)
            scratch.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder
            if target.exists():
                with contextlib.suppress(OSError):  # once aside, it must not look like a dead save's
                    locks.callback(os.close, lock(target, wait=5.0))
                _replace(scratch, target)
            else:
                scratch.rename(target)
            sync(target.parent)
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) in _FULL or isinstance(error, SafetensorError)
            raise RunError(
                f"could not save: {getattr(error, 'strerror', None) or error}",
                where=str(target),
                remedy=("free some space" if full else "choose another place") + "; what was there before is intact",
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch(target: Path, locks: contextlib.ExitStack) -> Path:
    """A new private folder beside `target`, `.NAME.RANDOM.part`, locked where the system can; in it where it stays in place.

    The lock says that somebody is at work. It ends with the process however that ends, so that a folder without one
    is a dead save's: no process number that may be another's by now, no age to guess.
    """
    beside = not _stays(target) and os.access(target.parent, os.W_OK | os.X_OK)
    while True:
        home = target.parent if beside or not target.exists() else target
        path = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PART, dir=home))
        try:
            locks.callback(os.close, lock(path))
        except (BlockingIOError, FileNotFoundError):
            continue  # another save came before the lock, took it for a dead one's, and clears it
        except OSError:
            pass  # no locks here: nobody will clear it either
        return path


def lock(path: Path, wait: float = 0.0) -> int:
    """A descriptor that holds the lock of a folder (flock) until it is closed. wait: seconds to try for.

    Raises BlockingIOError where another holds it, FileNotFoundError where `path` is gone or another folder by now,
    OSError where there are no such locks (NFS).
    """
    end = time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            raise FileNotFoundError(errno.ENOENT, "another folder by now", str(path))
        except OSError as error:
            os.close(descriptor)
            if time.monotonic() >= end or not isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise
        time.sleep(0.02)


def recover(target: Path) -> None:
    """Ends what saves of `target` that were killed began (see `_clear`): what they had put aside is in it again."""
    target = target.resolve()
    with contextlib.suppress(OSError):  # nothing lies beside it, or nobody may look
        _clear(target)


def sync(path: Path) -> None:
    """Forces a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(target: Path) -> None:
    """Ends what dead saves of `target` began: unfinished folders go, and what stood aside is kept or put back.

    A folder that is locked, or cannot be, is left alone.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(part|old|whole)")
    within = sorted(target.iterdir()) if target.is_dir() else []
    for path in (*sorted(target.parent.iterdir()), *within):
        if not name.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # what cannot be cleared is in nobody's way
            held = lock(path)
            try:
                if path.suffix == _PART:
                    shutil.rmtree(path)
                elif path.suffix == _WHOLE:
                    _pour(path, target)
                elif target.exists():
                    _keep(path, target)
                else:
                    path.rename(target)
            finally:
                os.close(held)


def _stays(target: Path) -> bool:
    """Whether a folder cannot give its place to another: a mount, or the one that this process, and its shell, stand in."""
    return target.exists() and (target.is_mount() or target.samefile("."))  # "." also where that was removed


def _replace(scratch: Path, target: Path) -> None:
    """Puts what `scratch` holds in the place of what an older save left in `target`."""
    if scratch.parent != target:
        try:
            old = _exchange(scratch, target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):  # as of a mount that does not look like one
                raise
        else:
            _keep(old, target)
            return
    _fill(scratch, target)


def _exchange(scratch: Path, target: Path) -> Path:
    """Puts `scratch` in the place of `target`: in one step where the system can (Linux), else in two renames.

    Returns where the old `target` stands now: `.NAME.RANDOM.old`, a name that tells it from an unfinished save.
    """
    old = scratch.with_suffix(_OLD)
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    scratch.rename(old)
    if rename is not None and rename(here, os.fsencode(old), here, os.fsencode(target), exchange) == 0:
        return old
    old.rename(scratch)
    target.rename(old)
    try:
        scratch.rename(target)
    except OSError:
        old.rename(target)
        raise
    return old


def _keep(old: Path, target: Path) -> None:
    """Moves into `target` what lay in `old` besides the files of a save, and removes `old`."""
    own = _saved(old)
    for path in old.iterdir():
        if path.name not in own and not (target / path.name).exists():
            path.rename(target / path.name)
    shutil.rmtree(old)


def _fill(scratch: Path, target: Path) -> None:
    """The same file by file. What a kill interrupts is ended by whoever saves or resumes here next (see `_clear`)."""
    (scratch / _NAMES).write_text("\n".join(path.name for path in scratch.iterdir()), encoding="utf-8")
    sync(scratch / _NAMES)
    whole = scratch.with_suffix(_WHOLE)
    scratch.rename(whole)
    sync(whole.parent)
    _pour(whole, target)


def _pour(whole: Path, target: Path) -> None:
    """Moves a whole save into `target`, configs last, and those of the older save go first: what a kill leaves has no
    config that its weights do not follow. It can be done again from wherever it ended."""
    configs = {*files.CONFIGS, *files.ADAPTER_CONFIGS, files.INDEX}
    new = set((whole / _NAMES).read_text(encoding="utf-8").split("\n")) if (whole / _NAMES).exists() else None
    left = sorted((p for p in whole.iterdir() if p.name != _NAMES), key=lambda path: path.name in configs)
    if new is not None:
        here = {path.name for path in left}
        gone = _saved(target) - new | {name for name in configs & here if (target / name).exists()}
        for name in sorted(gone, key=lambda name: name not in configs):
            (target / name).unlink(missing_ok=True)
    for path in left:
        place = target / path.name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        try:
            path.rename(place)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.move(path, place)
            for moved in (place, *place.rglob("*")) if place.is_dir() else (place,):
                sync(moved)
    sync(target)
    shutil.rmtree(whole)


def _saved(folder: Path) -> set[str]:
    """The files in a folder that a save wrote, so that they must not stay beside those of the next: by what it always calls
    them, and by what its index names."""
    own = {files.INDEX, files.ADAPTER, *files.CONFIGS, *files.ADAPTER_CONFIGS}
    with contextlib.suppress(CheckpointError):
        placed = files.read_json(folder / files.INDEX).get("weight_map")
        own |= {name for name in placed.values() if isinstance(name, str)} if isinstance(placed, dict) else set()
    if any((folder / name).exists() for name in files.CONFIGS):  # what loading reads as the model's, of whatever name
        with contextlib.suppress(CheckpointError):
            own |= set(files.weight_files(folder))
    return {path.name for path in folder.iterdir() if path.name in own or files.rival(path.name)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
