"""Whether ptxas left the descriptors of tensor-core products as Triton wrote them: machine code of sm_90, read back.

A product whose factor lies in shared memory (wgmma) takes its place from a descriptor in uniform registers. ptxas 12.8,
which Triton up to 3.7 takes for Hopper, can add a step to a register that holds something else at that time: the product
then reads anywhere, and what comes out is wrong, or the launch fails. With the same PTX 12.9 and later do not, in all
kernels of ours. Where it goes wrong depends on everything around the product, so that a kernel is right at one width and
wrong at the next.

Here the machine code is followed from its entry: whether what a register holds comes from where shared memory begins. A
descriptor that does not, on any way to its product, is named; one of the wrong place in shared memory is not.

And products run on while what follows them is done: until they are waited for, the registers of a factor that lies there
must stay. Assemblers before 13.3 can write to them (triton-lang/triton#11781), which is named, too.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_PREDICATES = re.compile(r"^(?:!?U?P[T0-9]+, *)+")  # written beside a register, or what a jump goes by
_PRODUCT = re.compile(r"[HQIB]GMMA\.")
_OPERAND = re.compile(r"([-~!|]?)(URZ|RZ|UR\d+|R\d+|0x[0-9a-f]+)(?![0-9a-z])")

SHARED = "a place in shared memory"
Value = int | str | None  # a number, SHARED, or something else
State = dict[str, Value]


class Line(NamedTuple):
    at: int
    guarded: bool
    name: str
    operands: str


Blocks = dict[int, tuple[list[Line], list[int]]]  # by where a stretch begins: its lines, and where it goes on


class Wrong(NamedTuple):
    """An instruction that reads, or writes, what it should not."""

    at: int
    text: str


def dumped(cubin: bytes, what: str) -> str:
    """As cuobjdump tells it; what: its option, "-sass" for machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True)
    return ran.stdout


def lines(text: str) -> list[Line]:
    """Of one kernel's machine code, as cuobjdump writes it; guarded: where it may not be done, or not jump."""
    found = []
    for at, guard, name, operands in _LINE.findall(text):
        bare = _PREDICATES.sub("", operands)
        may_not = bool(guard) or (name.startswith("BRA") and (bare != operands or name != "BRA"))
        found.append(Line(int(at, 16), may_not, name, bare))
    return found


def wrong(code: list[Line]) -> list[Wrong]:
    """All such products, in their order. Raises RuntimeError for one that no way leads to, as after an indirect jump.

    A first pass over blocks finds what registers hold where each begins."""
    blocks = _blocks(code)
    entered: dict[int, State] = {0: {}}
    waiting = [0]
    while waiting:
        start = waiting.pop()
        state = dict(entered[start])
        for line in blocks[start][0]:
            _follow(line, state)
        for after in blocks[start][1]:
            if after not in entered:
                entered[after] = dict(state)
                waiting.append(after)
            elif _join(entered[after], state):
                waiting.append(after)
    _all_met(blocks, entered.keys())
    found = []
    for start, state in sorted(entered.items()):
        for line in blocks[start][0]:
            if _PRODUCT.match(line.name) and any(state.get(register) != SHARED for register in _lows(line)):
                found.append(Wrong(line.at, f"{line.name} {line.operands}"))
            _follow(line, state)
    return found


def _all_met(blocks: Blocks, entered: Set[int]) -> None:
    for start in blocks.keys() - entered:
        for line in blocks[start][0]:
            if _PRODUCT.match(line.name):
                raise RuntimeError(f"no way leads to the product at 0x{line.at:x}: a jump is not understood")


def reused(code: list[Line]) -> list[Wrong]:
    """All instructions that write to a register of a factor whose product may still read it.

    Followed are registers with how many groups of products were closed since theirs was, -1 while theirs is open; a wait
    for all but the last n groups ends those of n and more."""
    blocks = _blocks(code)
    entered: dict[int, frozenset[tuple[str, int]]] = {0: frozenset()}
    waiting, found = [0], dict[int, Wrong]()
    while waiting:
        start = waiting.pop()
        held = set(entered[start])
        for line in blocks[start][0]:
            if line.name == "WARPGROUP.DEPBAR.LE":
                left = int(line.operands.rpartition("0x")[2], 16)
                held = {(register, since) for register, since in held if since < left}
            elif _PRODUCT.match(line.name):
                held |= {(register, -1) for register in _factor(line)}
                if "gsb0" in line.operands:
                    held = {(register, min(since + 1, 8)) for register, since in held}
            elif {register for register, _ in held}.intersection(_written(line)):
                found[line.at] = Wrong(line.at, f"{line.name} {line.operands}")
        for after in blocks[start][1]:
            if after not in entered or not held <= entered[after]:
                entered[after] = entered.get(after, frozenset()) | held
                waiting.append(after)
    _all_met(blocks, entered.keys())
    return [found[at] for at in sorted(found)]


def _factor(line: Line) -> set[str]:
    """The four registers of a factor that is in registers."""
    given = re.match(r"R\d+, R(\d+)", line.operands)
    return {f"R{int(given[1]) + k}" for k in range(4)} if given else set()


def _written(line: Line) -> list[str]:
    """The registers that it writes to."""
    first = re.match(r"(U?R)(\d+)\b", line.operands)
    if first is None or line.name.startswith(("ST", "RED", "LDGSTS", "BAR", "UTMA")) or _PRODUCT.match(line.name):
        return []
    return [f"{first[1]}{int(first[2]) + k}" for k in range(_width(line.name))]


def _width(name: str) -> int:
    """How many registers it writes, or stores."""
    if re.search(r"\.128|88\.4|^HMMA", name):
        return 4
    return 2 if re.search(r"\.64|\.F64|\.WIDE|88\.2|^CS2R|^D(ADD|MUL|FMA)", name) else 1


def _lows(line: Line) -> list[str]:
    """gdesc[URn] is four registers: A's descriptor and B's."""
    first = re.search(r"gdesc\[UR(\d+)\]", line.operands)
    if first is None:
        return []
    n = int(first[1])
    in_registers = "gdesc" not in line.operands.split(",")[1]
    return [f"UR{n + 2}"] if in_registers else [f"UR{n}", f"UR{n + 2}"]


def _blocks(code: list[Line]) -> Blocks:
    """By its first line's place: a stretch of lines, and where it goes on."""
    targets = {_target(x) for x in code if x.name.startswith("BRA")} - {None}
    blocks: Blocks = {}
    start, held = 0, list[Line]()
    for line, following in zip(code, [*code[1:], None], strict=True):
        held.append(line)
        jump, end = line.name.startswith("BRA"), line.name in ("EXIT", "RET")
        if following is None or jump or end or following.at in targets:
            after = [t for t in [_target(line) if jump else None] if t is not None]
            if following is not None and (line.guarded or not (jump or end)):
                after.append(following.at)
            blocks[start] = held, after
            if following is not None:
                start, held = following.at, []
    return blocks


def _target(line: Line) -> int | None:
    found = re.search(r"0x([0-9a-f]+)\s*$", line.operands)
    return int(found[1], 16) if found else None


def _join(into: State, other: State) -> bool:
    """Keeps what is so on both ways; whether that changed anything."""
    parted = [register for register, held in into.items() if held is not None and held != other.get(register)]
    into.update(dict.fromkeys(parted))
    return bool(parted)


def _follow(line: Line, state: State) -> None:
    if line.name.startswith("STL"):  # spilled registers
        at = _slot(line.operands)
        first = re.search(r"\], *R(\d+)\b", line.operands)
        for k in range(_width(line.name) if at is not None else 0):
            value = state.get(f"R{int(first[1]) + k}") if first else None
            _set(state, f"stack {at + 4 * k}", value, line.guarded)  # type: ignore[operator]
        return
    for k, register in enumerate(_written(line)):
        _set(state, register, _result(line, k, state), line.guarded)


def _set(state: State, register: str, value: Value, guarded: bool) -> None:
    state[register] = value if not guarded or state.get(register) == value else None


def _result(line: Line, k: int, state: State) -> Value:
    """What the k-th register that is written holds. What comes from a place in shared memory stays one: steps are added
    to it, bits of it taken, buffers chosen."""
    name, operands = line.name, line.operands
    if name.startswith("LDL"):
        at = _slot(operands)
        return None if at is None else state.get(f"stack {at + 4 * k}")
    if k or name.startswith(("LD", "S2", "ULDC", "SHFL", "ATOM")) or "c[" in operands:
        return None
    held: list[Value] = [
        0 if x in ("URZ", "RZ") else int(x, 16) if x.startswith("0x") else state.get(x)
        for sign, x in _OPERAND.findall(operands)[1:]
        if sign != "!"
    ]
    if name in ("ULEA", "LEA") and held[-1] == 0x18 and 0x400 in held:
        return SHARED  # where a block's window on it begins
    if SHARED in held:
        return SHARED
    return held[-1] if name.startswith(("UMOV", "MOV", "R2UR", "IMAD.MOV", "IMAD.U32")) and held else None


def _slot(operands: str) -> int | None:
    """The bytes from the stack's start."""
    found = re.search(r"\[R1(?:\+(0x[0-9a-f]+))?\]", operands)
    return None if found is None else int(found[1] or "0", 16)
