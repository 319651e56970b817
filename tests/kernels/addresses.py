"""Where interpreted kernels read and write, which Triton's interpreter does not look at."""

from __future__ import annotations

from typing import Any

import numpy as np


def watch() -> None:
    """From now on the addresses of one access lie in the memory of one tensor that the kernel was given, or it fails:
    elsewhere it would read what happens to lie there. Of a view that is its whole storage."""
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    add, swap = builder.create_atomic_rmw, builder.create_atomic_cas
    given = {"first": np.empty(0, np.int64), "end": np.empty(0, np.int64)}

    def begun(self: Any, args: Any, kwargs: Any) -> Any:
        """The arguments as the kernel gets them; `given`: their storages in order."""
        moved = begin(self, args, kwargs)
        left, sizes = [*moved[0], *moved[1].values()], {}
        while left:
            one = left.pop()
            one = getattr(one, "base", one)
            if isinstance(one, tuple):
                left += one
            elif hasattr(one, "data_ptr"):
                storage = interpreter._unwrap_tensor(one).untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        given["first"] = np.array(sorted(sizes), np.int64)
        given["end"] = given["first"] + np.array([sizes[start] for start in sorted(sizes)], np.int64)
        return moved

    def look(pointers: Any, mask: Any = True) -> None:
        asked = np.broadcast_to(np.asarray(mask).astype(bool), np.shape(pointers.data))
        at = np.asarray(pointers.data).astype(np.int64)[asked]
        if at.size:
            of = np.searchsorted(given["first"], at, side="right") - 1
            end = at + pointers.get_element_ty().primitive_bitwidth // 8
            inside = of.min() >= 0 and (of == of[0]).all() and (end <= given["end"][of]).all()
            assert inside, "a kernel goes beyond the tensors it was given"

    def loaded(self: Any, pointers: Any, mask: Any, *args: Any, **more: Any) -> Any:
        look(pointers, mask.data)
        return load(self, pointers, mask, *args, **more)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **more: Any) -> Any:
        look(pointers, mask.data)
        return store(self, pointers, value, mask, *args, **more)

    def added(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *args: Any, **more: Any) -> Any:
        look(pointers, mask.data)
        return add(self, how, pointers, value, mask, *args, **more)

    def swapped(self: Any, pointers: Any, *args: Any) -> Any:
        look(pointers)
        return swap(self, pointers, *args)

    executor._init_args_hst = begun
    builder.create_masked_load, builder.create_masked_store = loaded, stored
    builder.create_atomic_rmw, builder.create_atomic_cas = added, swapped
