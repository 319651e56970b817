"""Benchmarks: what bench/ of a source checkout can measure, whether it can here, and running one.

A benchmark is a module bench/NAME.py that says in one literal what it needs and how long it takes:

    BENCHMARK = {"device": "cuda", "packages": {"fla": "flash-linear-attention"}, "minutes": 4}

and has `check()`, which raises where ours and the peer's results differ, and `measure()`, which gives the rows of
docs/results/NAME.json one after another (`bench_rows.row`). Its docstring's first paragraph says what it measures. A
module without that literal is a script, and not listed.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dovetail.errors import DataError, RunError, UserError, did_you_mean
from dovetail.report.bench_rows import ROOT, ceilings, line, result, save

FOLDER = ROOT / "bench"
Device = Literal["cpu", "cuda", "any"]


@dataclass(frozen=True)
class Benchmark:
    """What a module of bench/ states. device: where it is measured ("any": CUDA where there is one). threads: of a CPU;
    0 for torch's default. packages: name to import -> name to install. data: paths from the checkout's root. minutes:
    about how long, on the machine that it is meant for. writes: its result file, NAME.json unless given."""

    name: str
    about: str
    minutes: float
    device: Device = "cpu"
    threads: int = 0
    packages: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[str] = ()
    writes: str = ""

    @property
    def command(self) -> str:
        return f"dovetail bench {self.name}"

    @property
    def file(self) -> str:
        return f"{self.writes or self.name}.json"

    @property
    def runs_on(self) -> str:
        """The device that it is measured on here."""
        return self.device if self.device != "any" else "cuda" if torch.cuda.is_available() else "cpu"

    def needs(self) -> list[str]:
        """What must be there, for people."""
        device = {"cuda": ["CUDA"], "cpu": [], "any": []}[self.device]
        return [*device, *self.packages.values(), *self.data]

    def lacks(self, root: Path = ROOT) -> list[tuple[str, str]]:
        """(what is not here, what to do about it), empty where it can run."""
        found = []
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append(("no CUDA device", "run it on a machine with an NVIDIA GPU and a CUDA build of torch"))
        absent = [to_install for module, to_install in self.packages.items() if not importlib.util.find_spec(module)]
        if absent:
            found.append((f"no {', '.join(absent)}", f"pip install {' '.join(absent)}"))
        missing = [str((root / path).resolve()) for path in self.data if not (root / path).exists()]
        if missing:
            found.append((f"no data at {', '.join(missing)}", "put the data there"))
        return found


def benchmarks(folder: Path | None = None) -> dict[str, Benchmark]:
    """Every benchmark by name, the quick ones first. folder: bench/ of the checkout unless given; nothing in it is run.

    Raises UserError where there is none, which is so for a package that was installed from a wheel; DataError for a
    statement that is out of form.
    """
    folder = folder or FOLDER
    if not folder.is_dir():
        raise UserError(
            "the benchmarks are not part of the installed package: peers, data and results belong to the source",
            where=str(folder),
            remedy="get Dovetail's source and run `make setup` in it, then `.venv/bin/dovetail bench`",
        )
    found = [b for b in map(stated, sorted(folder.glob("*.py"))) if b is not None]
    return {b.name: b for b in sorted(found, key=lambda b: b.minutes)}


def stated(file: Path) -> Benchmark | None:
    """What the module says of itself, read and not run; None for a script. Raises DataError for what is out of form."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except SyntaxError as error:
        raise DataError(f"not Python: {error}", where=str(file)) from None
    literals = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["BENCHMARK"]
    ]
    if not literals:
        return None
    try:
        given = ast.literal_eval(literals[0])
    except ValueError:
        raise DataError(
            "BENCHMARK is no literal, which can be read without running the module", where=str(file)
        ) from None
    known = {f.name for f in fields(Benchmark)} - {"name", "about"}
    for key in given:
        if key not in known:
            raise DataError(f"BENCHMARK has no {key!r}", where=str(file), remedy=did_you_mean(key, known))
    if "minutes" not in given or given.get("device", "cpu") not in get_args(Device):
        raise DataError('BENCHMARK needs "minutes", and "device" is "cpu", "cuda" or "any"', where=str(file))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if not {"check", "measure"} <= functions:
        raise DataError("a benchmark has check() and measure()", where=str(file))
    about = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return Benchmark(name=file.stem, about=about, **given)


def chosen(names: Sequence[str], known: Mapping[str, Benchmark]) -> list[Benchmark]:
    """Those named, in order; "all": those that can run here. Raises UserError for a name that is none, and for one that
    lacks something here."""
    if list(names) == ["all"]:
        return [b for b in known.values() if not b.lacks()]
    for name in names:
        if name not in known:
            near = [n for n in known if n.startswith(name)] or difflib.get_close_matches(name, known, n=3)
            meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}, all"
            raise UserError(f"no benchmark {name!r}", where="dovetail bench", remedy=meant)
        lacks = known[name].lacks()
        if lacks:
            whats, remedies = zip(*lacks, strict=True)
            raise UserError(
                f"{name} cannot run here: {'; '.join(whats)}", where=known[name].command, remedy="; ".join(remedies)
            )
    return [known[name] for name in dict.fromkeys(names)]


def run(benchmark: Benchmark, out: Path | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Ceilings, check, measure; what the result file then holds (docs/results of the checkout, or under `out`).

    Rows stand in FILE.partial while there are more to come, so that a result is whole or absent. Raises RunError where
    the check fails, or nothing is measured.
    """
    if benchmark.threads:
        torch.set_num_threads(benchmark.threads)
    say = partial(print, flush=True)
    limits = ceilings(benchmark.runs_on).to_dict()
    say(f"{benchmark.name}: {benchmark.about} About {benchmark.minutes:g} minutes.")
    say(f"ceilings: {', '.join(f'{name} {value}' for name, value in limits.items())}")
    module = _load(benchmark.name, folder or FOLDER)
    torch.manual_seed(0)
    with _refused(benchmark, "ours and the peer's results differ"):
        module.check()
    say("check: ours and the peer's results agree")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    file = None
    with _refused(benchmark, "measuring failed"):
        for row in module.measure():
            rows.append(row)
            say(line(row))
            name, peers = benchmark.writes or benchmark.name, benchmark.packages.values()
            kept = result(name, rows, benchmark.command, benchmark.runs_on, peers)
            file = save(f"{benchmark.file}.partial", kept, out)
    if file is None:
        raise RunError(f"{benchmark.name} measured nothing", where=str(module.__file__))
    file = file.replace(file.with_suffix(""))
    say(f"written: {file}")
    return kept


def run_apart(benchmark: Benchmark, out: Path | None = None) -> dict[str, Any] | None:
    """`run` in a process of its own, so that what another benchmark left (threads, memory, compiled graphs) changes
    nothing; None where it failed, which it has said on the screen."""
    command = [sys.executable, "-m", "dovetail", "bench", benchmark.name]
    target = out or ROOT / "docs" / "results"
    done = subprocess.run([*command, "--out", str(target)], check=False)
    return json.loads((target / benchmark.file).read_text(encoding="utf-8")) if done.returncode == 0 else None


@contextmanager
def _refused(benchmark: Benchmark, what: str) -> Iterator[None]:
    """What the module asserts, as a RunError."""
    try:
        yield
    except (AssertionError, SystemExit) as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise RunError(f"{what}: {said}", where=benchmark.command) from error


def _load(name: str, folder: Path) -> Any:
    """The module, with its neighbours importable as they are for `python bench/NAME.py`."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
