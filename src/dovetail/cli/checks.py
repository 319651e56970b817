"""What a command is given, looked at before its work: folders to write, devices, text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dovetail.errors import UserError, did_you_mean


def check_out(out: Path, where: str = "--out", model: str | None = None) -> None:
    """Raises UserError for a folder that could not be written once the work is done, or that holds what is worked on."""
    target = out.resolve()
    if model is not None and Path(model).exists() and target == Path(model).resolve():
        raise UserError(
            f"{out} is the model itself, which would be replaced", where=where, remedy="give another folder"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} is a file", where=where, remedy="give a folder")
    place = target
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{out} lies below {place}, which is a file", where=where, remedy="give another folder")
    _check_writable(place, where)


def check_readable(file: Path, where: str) -> None:
    """Raises UserError for what is no text file, nor a pipe that gives one."""
    if not file.exists() or file.is_dir():
        raise UserError(f"no text file {str(file)!r}", where=where)


def check_file(file: Path, where: str, reads: Sequence[Path | None] = ()) -> None:
    """Raises UserError for a file that could not be written once the work is done, or that the work reads itself."""
    if file.resolve() in [other.resolve() for other in reads if other is not None]:
        raise UserError(f"{file} would be overwritten", where=where, remedy="give another file")
    if file.is_dir():
        raise UserError(f"{file} is a folder", where=where, remedy="give a file")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {str(file.parent)!r}", where=where, remedy="make it, or give another file")
    _check_writable(file.parent, where)


def _check_writable(folder: Path, where: str) -> None:
    try:
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}", where=where, remedy="choose another place"
        ) from None


def check_resumable(out: str | None) -> None:
    """Raises UserError for a folder without a checkpoint to go on from."""
    from dovetail.hub.atomic import recover
    from dovetail.training import checkpoint

    if out is None:
        return  # which is an error of its own
    recover(Path(out))
    if not checkpoint.found(Path(out)):
        raise UserError("there is no checkpoint to go on from", where=out, remedy="leave out --resume to begin anew")


def check_format(name: str, known: tuple[str, ...]) -> None:
    """Raises UserError for a format that is neither left out nor known."""
    if name and name not in known:
        raise UserError(f"no format {name!r}", where="--format", remedy=did_you_mean(name, known))


def check_text(text: str, where: str) -> str:
    """The same text. Raises UserError for bytes of a command line that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("this text is not UTF-8", where=where, remedy="write it in UTF-8") from None
    return text


def refuse(mode: str, options: list[str]) -> None:
    """Raises UserError for options that what was asked does not read."""
    if options:
        raise UserError(f"{mode} does not read {', '.join(options)}", remedy="leave it out")


def device_named(name: str) -> str:
    """Where to compute: CUDA where there is one unless named. Raises UserError for a device that is not here."""
    from dovetail.training.device import choose

    device = choose(name or "auto")
    if device.type == "meta" or (device.type == "cpu" and device.index):
        raise UserError(f"no device {name!r} here", where="--device", remedy="use cpu or cuda")
    return str(device)


def device_to_plan_for(name: str) -> str:
    """One that kernels are chosen for, here or not. Raises UserError."""
    import torch

    if name == "":
        return device_named("")
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UserError(f"no kernels are planned for {name!r}", where="--device", remedy="use cpu or cuda")
    return name


def dtype_to_compute_in(name: str, device: str) -> str | None:
    """As named, else fp32 on a CPU, where narrow matrix-vector products are slower, else (None) what is stored. device:
    from `device_named`."""
    from dovetail.hub.files import dtype_named

    if name:
        dtype_named(name)  # before anything is loaded
    return name or ("float32" if device.startswith("cpu") else None)
