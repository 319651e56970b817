"""What bench/descriptors.py sees in machine code: a descriptor of something else, a factor that is written over."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# As ptxas 12.9 and 12.8 make it, shortened: a product with a factor in registers, the other in shared memory, in a loop.
BEGIN = """
    /*0000*/                   S2UR UR4, SR_CgaCtaId ;
    /*0010*/                   UMOV UR20, 0x400 ;
    /*0020*/                   ULEA UR10, UP0, UR4, UR6, 0x1 ;
    /*0030*/                   ULEA UR20, UR4, UR20, 0x18 ;
    /*0040*/                   USHF.R.U32.HI UR12, URZ, 0x4, UR20 ;
    /*0050*/                   USGXT.U32 UR12, UR12, 0xe ;
"""
RIGHT = "    /*0060*/                   UIADD3 UR26, UP0, UR12, 0x20, URZ ;\n"
ASTRAY = "    /*0060*/                   UIADD3 UR26, UP0, UR10, 0x20, URZ ;\n"
LOOP = """
    /*0070*/                   UMOV UR18, UR12 ;
    /*0080*/                   HGMMA.64x16x16.F32.BF16 R88, R24, gdesc[UR16].tnspB, R88 ;
    /*0090*/                   HGMMA.64x16x16.F32.BF16 R88, R28, gdesc[UR24].tnspB, R88, gsb0 ;
"""
END = """
    /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*00c0*/                   FADD R28, R88, R88 ;
    /*00d0*/               @P0 BRA 0x70 ;
    /*00e0*/                   EXIT ;
"""
OVER = "    /*00a0*/                   IMAD.MOV.U32 R30, RZ, RZ, R2 ;\n"
ELSEWHERE = "    /*00a0*/                   IMAD.MOV.U32 R32, RZ, RZ, R2 ;\n"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("descriptors")


def test_a_descriptor_of_shared_memory(tool: Any) -> None:
    assert tool.wrong(tool.lines(BEGIN + RIGHT + LOOP + END)) == []


def test_a_descriptor_of_something_else(tool: Any) -> None:
    assert [w.at for w in tool.wrong(tool.lines(BEGIN + ASTRAY + LOOP + END))] == [0x90]


def test_one_that_is_right_on_one_way_alone(tool: Any) -> None:
    skipped = RIGHT.replace("/*0060*/", "/*0064*/")
    way = "    /*0060*/              @!P1 BRA 0x70 ;\n"
    assert [w.at for w in tool.wrong(tool.lines(BEGIN + way + skipped + LOOP + END))] == [0x90]


def test_one_that_was_spilled(tool: Any) -> None:
    kept = """
    /*0061*/                   IMAD.U32 R5, RZ, RZ, UR26 ;
    /*0062*/                   STL [R1+0x10], R5 ;
    /*0063*/                   UMOV UR26, URZ ;
"""
    back = "    /*0064*/                   LDL.LU R6, [R1+0x10] ;\n    /*0065*/                   R2UR UR26, R6 ;\n"
    assert tool.wrong(tool.lines(BEGIN + RIGHT + kept + back + LOOP + END)) == []
    assert tool.wrong(tool.lines(BEGIN + RIGHT + kept + LOOP + END)) != []


def test_a_product_that_no_way_leads_to_is_not_passed_over(tool: Any) -> None:
    code = tool.lines(BEGIN + RIGHT + "    /*0061*/                   BRA 0xe0 ;\n" + LOOP + END)
    code = [line for line in code if "0x70" not in line.operands]  # as of a jump that is not understood
    for look in (tool.wrong, tool.reused):
        with pytest.raises(RuntimeError, match="no way leads to the product at 0x80"):
            look(code)


def test_two_registers_that_were_spilled_at_once(tool: Any) -> None:
    kept = "    /*0061*/                   IMAD.U32 R5, RZ, RZ, UR26 ;\n    /*0062*/                   STL.64 [R1+0x10], R4 ;\n"
    back = "    /*0064*/                   LDL.LU R6, [R1+0x14] ;\n    /*0065*/                   R2UR UR26, R6 ;\n"
    assert tool.wrong(tool.lines(BEGIN + RIGHT + kept + back + LOOP + END)) == []
    lower = back.replace("0x14", "0x10")
    assert [w.at for w in tool.wrong(tool.lines(BEGIN + RIGHT + kept + lower + LOOP + END))] == [0x90]
    perhaps = kept.replace("/*0062*/                   STL.64", "/*0062*/              @!P2 STL.64")
    assert [w.at for w in tool.wrong(tool.lines(BEGIN + RIGHT + perhaps + back + LOOP + END))] == [0x90]


def test_a_factor_that_is_written_over_beside_a_predicate(tool: Any) -> None:
    shuffled = "    /*00a0*/                   SHFL.IDX PT, R29, R2, RZ, 0x1f ;\n"
    assert [w.at for w in tool.reused(tool.lines(BEGIN + RIGHT + LOOP + shuffled + END))] == [0xA0]


def test_a_factor_that_is_written_over_too_early(tool: Any) -> None:
    assert tool.reused(tool.lines(BEGIN + RIGHT + LOOP + ELSEWHERE + END)) == []
    assert [w.at for w in tool.reused(tool.lines(BEGIN + RIGHT + LOOP + OVER + END))] == [0xA0]


def test_a_wait_for_all_but_the_last_group(tool: Any) -> None:
    once = LOOP.replace("R28, gdesc[UR24].tnspB, R88, gsb0", "R28, gdesc[UR24].tnspB, R88").replace(
        "R24, gdesc[UR16].tnspB, R88", "R24, gdesc[UR16].tnspB, R88, gsb0"
    )
    more = "    /*0098*/                   HGMMA.64x16x16.F32.BF16 R96, R40, gdesc[UR24].tnspB, R96, gsb0 ;\n"
    wait = "    /*009c*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n"
    of_the_last = "    /*00a0*/                   IMAD.MOV.U32 R40, RZ, RZ, R2 ;\n"
    of_the_first = "    /*00a0*/                   IMAD.MOV.U32 R24, RZ, RZ, R2 ;\n"
    assert [w.at for w in tool.reused(tool.lines(BEGIN + RIGHT + once + more + wait + of_the_last + END))] == [0xA0]
    assert tool.reused(tool.lines(BEGIN + RIGHT + once + more + wait + of_the_first + END)) == []


@pytest.mark.slow
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="Triton without NVIDIA's tools")
@pytest.mark.parametrize(
    "asked",
    [
        ["--widths", "24", "200", "attention window", "linear gated", "gated linear", "delta rule gated"],
        ["--widths", "32", "128", "mixed chunks", "mixed chunks of 64", "mixed chunks packed"],
        ["attention table", "attention two forms", "contrastive softmax", "softmax", "scan", "legs", "codes"],
    ],
)
def test_kernels_compile_for_hopper_and_their_machine_code_is_right(asked: list[str]) -> None:
    ran = subprocess.run([sys.executable, str(BENCH / "compiles.py"), *asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert "WRONG" not in ran.stdout
    assert re.search(r"^[1-9]\d* launches compiled, 0 failed$", ran.stdout, re.MULTILINE)
