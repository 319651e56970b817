"""Triton's interpreter, where there is no GPU, without its repeated work."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import pytest

from kernels import addresses


@pytest.fixture(autouse=True, scope="session")
def _patched_once_a_launch() -> None:
    """The interpreter puts its own builtins into the language at every call of a device function, over those that it
    put there when the kernel began: a third of its time. Here it does so once in a launch."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch, tl = interpreter._patch_lang, interpreter.tl
    patched: set[int] = set()

    def once(fn: FunctionType) -> Any:
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return None  # of a device function, which undoes nothing
        scope = patch(fn)
        patched.update(languages)
        undo = scope.restore

        def restore() -> None:
            patched.clear()
            undo()

        scope.restore = restore
        return scope

    interpreter._patch_lang = once


@pytest.fixture(autouse=True, scope="session")
def _nothing_beyond_what_is_given() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        addresses.watch()
