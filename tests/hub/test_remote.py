"""Hub ids through huggingface-hub against a hub of one model on this machine: downloaded once, then from the cache."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, models

import dovetail as dt
from dovetail.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = {"kind": "decoder", "vocab": 24, "dim": 16, "context": 32, "blocks": {"mixer": {"kind": "attention"}}}


class Hub(http.server.ThreadingHTTPServer):
    """The endpoints that a download uses: a repository's listing, and its files by commit."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        files = {p.name: p.read_bytes() for p in self.server.folder.iterdir()}
        if path.startswith(f"/api/models/owner/small/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            return self.send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        if path.startswith("/api/models/owner/small"):
            listing = {"id": "owner/small", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(json.dumps(listing).encode(), body, {"Content-Type": "application/json"})
        start = f"/owner/small/resolve/{COMMIT}/"
        if path.startswith(start) and path.removeprefix(start) in files:
            self.server.asked.append(path.removeprefix(start))
            content = files[path.removeprefix(start)]
            return self.send(content, body, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        return self.send(b"", body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def send(self, content: bytes, body: bool, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = dt.save(dt.build(SPEC), tmp_path / "served")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")).save(str(folder / "tokenizer.json"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody asks for")
    (folder / "modeling_small.py").write_text("raise SystemExit('code from a hub was run')")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


CHILD = """
import sys, dovetail as dt
from dovetail.errors import DovetailError
for name in sys.argv[1:]:
    try:
        tokenizer = dt.load_tokenizer(name)
        assert tokenizer.encode("a") == [0]
        model = dt.load(name)
        print("loaded", model.origin.folder, float(sum(p.data.double().abs().sum() for p in model.parameters())))
    except DovetailError as error:
        print("refused", error.exit_code, error.what)
"""


def load_in_child(cache: Path, endpoint: str, *names: str) -> list[str]:
    """huggingface-hub reads its settings once, when it is imported: hence a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *names], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_hub_ids(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model by its id; only weights, configs and tokenizers are asked for; offline the cache serves."""
    expected = float(sum(p.data.double().abs().sum() for p in dt.load(hub.folder).parameters()))
    loaded, absent = load_in_child(tmp_path / "cache", hub.url, "owner/small", "owner/absent")
    word, folder, total = loaded.split()
    assert word == "loaded" and float(total) == pytest.approx(expected, rel=1e-12)
    wanted = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {p.name for p in Path(folder).iterdir()} == wanted == set(hub.asked)
    assert hub.asked[-1] == "model.safetensors"  # a tokenizer needs none
    assert absent.startswith("refused 2") and "owner/absent" in absent

    hub.shutdown()
    assert constants.HF_HUB_OFFLINE  # here
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    model = dt.load("owner/small")
    assert str(model.origin.folder) == folder and dt.load_tokenizer("owner/small").encode("b") == [1]
    assert float(sum(p.data.double().abs().sum() for p in model.parameters())) == float(total)
    with pytest.raises(CheckpointError, match="owner/other") as caught:
        dt.load("owner/other")
    assert caught.value.exit_code == 2


def test_names_that_are_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "./owner/name", "/owner/name", "a/b/c", "~/model", "ow ner/na me"):
        for load in (dt.load, dt.load_tokenizer):
            with pytest.raises(CheckpointError) as caught:
                load(name)
            assert name in str(caught.value) and caught.value.remedy
    folder = tmp_path / "owner/local"  # a directory of that name comes before the hub
    dt.save(dt.build(SPEC), folder)
    assert torch.equal(*(next(dt.load(n).parameters()) for n in (folder, "owner/local")))
