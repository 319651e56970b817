"""Triton's interpreter, where there is no GPU, without its repeated work."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import pytest


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
    """Every address that a kernel reads or writes lies in the memory of a tensor that it was given, which the interpreter
    does not look at: elsewhere too it reads what happens to lie there."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    import numpy as np
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    begin, load, store, add = (
        executor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    first, last = [np.empty(0, np.int64)], [np.empty(0, np.int64)]

    def begun(self: Any, args: Any, kwargs: Any) -> Any:
        given = begin(self, args, kwargs)
        held = [getattr(x, "base", x) for x in (*given[0], *given[1].values())]
        storages = {
            s.data_ptr(): s.nbytes()
            for s in (interpreter._unwrap_tensor(x).untyped_storage() for x in held if hasattr(x, "data_ptr"))
        }
        first[0] = np.array(sorted(storages), np.int64)
        last[0] = np.array([start + storages[start] for start in sorted(storages)], np.int64)
        return given

    def checked(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = pointers.data.astype(np.int64)[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if at.size:
            of = np.searchsorted(first[0], at, side="right") - 1
            assert (of >= 0).all() and (at + size <= last[0][of]).all(), "a kernel goes beyond the tensors it was given"

    def loaded(self: Any, pointers: Any, mask: Any, *args: Any, **more: Any) -> Any:
        checked(pointers, mask)
        return load(self, pointers, mask, *args, **more)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **more: Any) -> Any:
        checked(pointers, mask)
        return store(self, pointers, value, mask, *args, **more)

    def added(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *args: Any, **more: Any) -> Any:
        checked(pointers, mask)
        return add(self, how, pointers, value, mask, *args, **more)

    executor._init_args_hst = begun
    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = loaded, stored, added
