"""What a run shows and keeps: a progress bar, log.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """log.jsonl in the run's folder, a JSON object a line, and TensorBoard beside it where it is installed."""

    def __init__(self, out: Path, start: int):
        self.path = out / "log.jsonl"
        self.scored = 0  # the last step with held-out scores
        if self.path.exists():  # lines of steps that a kill undid would be there twice
            kept = [(line, said) for line, said in _lines(self.path) if said["step"] <= start]
            self.scored = max((said["step"] for _, said in kept if "held_out_nats" in said), default=0)
            part = self.path.with_name(".log.jsonl.part")  # in one move: a full disk costs no line that is good
            part.write_text("".join(line for line, _ in kept), encoding="utf-8")
            part.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()
        self.scored = step if "held_out_nats" in values else self.scored
        for name, value in values.items():
            if self.board is not None and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log, and what they say; those that a kill or a full disk broke are left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            said = json.loads(line)
            if line.endswith("\n") and isinstance(said, dict) and isinstance(said.get("step"), int):
                yield line, said


class Rate:
    """Tokens a second and MFU over the time since the last `take`."""

    def __init__(self, flops_per_token: float, peak: float):
        self.flops, self.peak = flops_per_token, peak
        self.total, self.seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets what was not taken: after an evaluation or a save, which are not training."""
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self.since
        speed = self.tokens / seconds
        self.total, self.seconds = self.total + self.tokens, self.seconds + seconds
        self.restart()
        return {"tokens_per_s": speed, "mfu": speed * self.flops / self.peak}


class Bar:
    """The progress bar on the terminal's error stream; plain lines where there is no terminal."""

    def __init__(self, start: int, steps: int, shown: bool):
        self.console = Console(stderr=True)
        self.shown, self.live = shown, shown and self.console.is_terminal
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task("", total=steps, completed=start)
        self.progress.start()

    def advance(self) -> None:
        self.progress.advance(self.task)

    def show(self, step: int, values: dict[str, Any]) -> None:
        text = (
            f"loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tok/s  MFU {values['mfu']:.1%}  "
            f"peak {values['peak_bytes'] / 1e9:.1f} GB"
        )
        self.progress.update(self.task, description=text)
        if self.shown and not self.live:
            self.console.print(f"step {step}  {text}", highlight=False)

    def say(self, text: str) -> None:
        if self.shown:
            self.progress.console.print(text, highlight=False)

    def close(self) -> None:
        self.progress.stop()
