"""One process writes into a run's folder: others are refused before they have done anything."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dovetail.errors import RunError, UserError
from dovetail.hub.atomic import lock

LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def refuse_ranks() -> None:
    """Raises UserError under torchrun and its like: every rank would train the whole model, into one folder."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise UserError(
            f"{size} processes were started to train together, and a training here is one process on one device",
            where=f"WORLD_SIZE={size}",
            remedy="start it without torchrun (or its like): dovetail train RECIPE",
        )


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Inside, no other process gets here for the same folder, which is made if need be.

    The lock ends with the process however that ends. Where the system has none, nothing is refused. A folder that is
    still empty in the end goes. Raises UserError where another is at work, RunError where nothing can be written, or no more.
    """
    refuse_ranks()
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        whole = out.resolve()
        # Beside the folder, which a save puts another in the place of.
        place = whole.with_name(f".{whole.name}{LOCK}") if os.access(whole.parent, os.W_OK) else whole / LOCK
        descriptor = _lock(place)
    except BlockingIOError:
        raise UserError(
            "another run writes into this folder", where=str(out), remedy="wait for it, or choose another out"
        ) from None
    except OSError as error:
        raise RunError(
            f"cannot be written: {error.strerror or error}", where=str(out), remedy="choose another out"
        ) from None
    try:
        yield
    except OSError as error:
        within = Path(str(error.filename or out)).absolute().is_relative_to(out.absolute())
        if error.errno not in _FULL and not within:
            raise
        raise RunError(
            f"cannot be written: {error.strerror or error}",
            where=str(error.filename or out) if within else str(out),  # a copy's error names what is copied
            remedy="free some space, or see to it that the folder can be written; then begin again, or go on with --resume",
        ) from error
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                place.rmdir()
            os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder, which is made, until it is closed; None where the system has no locks.

    Raises BlockingIOError where another holds it, OSError where the folder cannot be made.
    """
    while True:
        path.mkdir(exist_ok=True)
        try:
            return lock(path)
        except FileNotFoundError:
            continue  # its holder ended, and took the folder away, before the lock came
        except BlockingIOError:
            raise
        except OSError:
            path.rmdir()
            return None
