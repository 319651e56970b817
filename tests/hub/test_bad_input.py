"""Whatever is wrong with a directory ends in one clear error that names it; a save that dies leaves the old one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.errors import CheckpointError, ConfigError, DovetailError, RunError
from dovetail.hub import atomic, files

SPEC = {
    "kind": "decoder",
    "vocab": 24,
    "dim": 16,
    "depth": 2,
    "context": 32,
    "blocks": {"mixer": {"kind": "attention"}},
}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small whole checkpoint in the LLaMA layout."""
    return dt.save(dt.build(SPEC), tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None removes one."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path, names: Callable[[str], str]) -> dict[str, str]:
    """Two shards and an index; `names` says which file the index claims for a tensor."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    halves = [list(tensors)[::2], list(tensors)[1::2]]
    placed = {k: f"model-{i + 1}.safetensors" for i, keys in enumerate(halves) for k in keys}
    for i, keys in enumerate(halves):
        save_file({k: tensors[k] for k in keys}, folder / f"model-{i + 1}.safetensors")
    claimed = {k: names(k) or v for k, v in placed.items()}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": claimed}))
    return placed


def broken(folder: Path, error: type[DovetailError], *named: str, **how: Any) -> None:
    """Loading raises this error, naming these; it says where, and the command would leave with code 2."""
    with pytest.raises(error) as caught:
        dt.load(folder, **how)
    text = str(caught.value)
    assert all(name in text for name in named), text
    assert caught.value.exit_code == 2 and caught.value.where and caught.value.__suppress_context__ in (True, False)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, -1])
def test_truncated_weights(folder: Path, keep: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    size = int(len(whole) * keep) if isinstance(keep, float) else keep
    (folder / WEIGHTS).write_bytes(whole[:size])
    broken(folder, CheckpointError, WEIGHTS, "truncated")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"\0" * 200, b"\xff" * 64, b"\x10\0\0\0\0\0\0\0not json at all!", b"\0" * 100]
)
def test_foreign_weights(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    broken(folder, CheckpointError, WEIGHTS, "not a whole safetensors file")


def test_header_that_lies(folder: Path) -> None:
    """Offsets beyond the file, and tensors that overlap."""
    for offsets in ([0, 4096], [-4, 0]):
        header = json.dumps({"x": {"dtype": "F32", "shape": [1024], "data_offsets": offsets}}).encode()
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
        broken(folder, CheckpointError, WEIGHTS)


def test_tensors_that_do_not_match(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda t: t.pop(name))
    broken(folder, CheckpointError, name, "missing")
    save_file(whole | {"model.layers.7.extra": torch.zeros(1)}, folder / WEIGHTS)
    broken(folder, CheckpointError, "model.layers.7.extra", "left over")
    for wrong in (torch.zeros(3, 3), torch.zeros(16), torch.zeros(())):
        save_file(whole | {name: wrong}, folder / WEIGHTS)
        broken(folder, CheckpointError, "blocks.1.feedforward.down.weight", str(tuple(wrong.shape)))
    save_file(whole | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 5)}, folder / WEIGHTS)
    broken(folder, CheckpointError, "k_proj", "do not fit together")
    save_file(whole | {name: whole[name].int()}, folder / WEIGHTS)
    broken(folder, CheckpointError, "down.weight", "int32")


def test_a_config_of_another_model(folder: Path) -> None:
    edit(folder, num_hidden_layers=3)
    broken(folder, CheckpointError, "model.layers.2")
    edit(folder, num_hidden_layers=1)
    broken(folder, CheckpointError, "model.layers.1", "left over")


def test_tie_contradiction(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    broken(folder, CheckpointError, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "tf_model.h5"])
def test_only_pickles(folder: Path, name: str) -> None:
    """Never opened: the file is not even a pickle."""
    (folder / WEIGHTS).rename(folder / name)
    broken(folder, CheckpointError, name, "unpickling can run code")


def test_nothing_there(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    broken(folder, CheckpointError, "no weights")
    (folder / CONFIG).unlink()
    broken(folder, CheckpointError, "no config.json")
    for name in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(CheckpointError, match="no directory"):
            dt.load(name)


def test_unreadable_configs(folder: Path) -> None:
    for content, named in (("{", "not readable JSON"), ("[1]", "not an object"), ('{"a": 1}', "no model_type")):
        (folder / CONFIG).write_text(content)
        broken(folder, DovetailError, named)
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")
    broken(folder, CheckpointError, "not readable JSON")


def test_config_keys(folder: Path, tmp_path: Path) -> None:
    """Unknown keys are refused, allowed on demand and kept; inert ones and private ones never stop a load."""
    edit(folder, mystery=1)
    broken(folder, ConfigError, "mystery", "--allow-key mystery")
    kept = dt.save(dt.load(folder, allow_keys=["mystery"]), tmp_path / "kept")
    assert json.loads((kept / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    edit(folder, mystery=None, use_cache=False, _name_or_path="x", pretraining_tp=1, unsloth_version="1")
    dt.load(folder)
    edit(folder, num_key_value_heads=7)
    broken(folder, ConfigError, "num_key_value_heads", "contradicts")


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0y"])
def test_malicious_index(folder: Path, tmp_path: Path, place: str) -> None:
    """An index never leads outside its folder, though a fitting file lies there."""
    placed = shard(folder, lambda name: "")
    (tmp_path / "x.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    claimed = {k: place if v == "model-1.safetensors" else v for k, v in placed.items()}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": claimed}))
    broken(folder, CheckpointError)


def test_index_that_lies(folder: Path) -> None:
    placed = shard(folder, lambda name: "")
    dt.load(folder)
    first, *rest = placed
    index = folder / files.INDEX
    index.write_text(json.dumps({"weight_map": {k: placed[k] for k in rest}}))
    broken(folder, CheckpointError, first, "the index does not know")
    index.write_text(json.dumps({"weight_map": placed | {"ghost": "model-1.safetensors"}}))
    broken(folder, CheckpointError, "ghost")
    index.write_text(json.dumps({"weight_map": placed | {"ghost": "model-9.safetensors"}}))
    broken(folder, CheckpointError, "model-9.safetensors")
    for wrong in ({}, {"weight_map": []}, {"weight_map": {first: 3}}):
        index.write_text(json.dumps(wrong))
        broken(folder, CheckpointError)


def test_two_sets_of_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    dt.load(folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    broken(folder, CheckpointError, "stored twice", "a.safetensors", "b.safetensors")


def test_unknown_names(folder: Path) -> None:
    model = dt.load(folder)
    with pytest.raises(ConfigError, match="no format 'gguf'"):
        dt.save(model, folder, format="gguf")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no dtype 'float31'"):
        dt.load(folder, dtype="float31")


def test_a_save_replaces_what_a_save_wrote(folder: Path) -> None:
    """Shards, indices and configs of an older save go; notes and logs stay; nothing hidden is left behind."""
    shard(folder, lambda name: "")
    (folder / "notes").mkdir()
    (folder / "notes/today.txt").write_text("keep me")
    (folder / "README.md").write_text("keep me too")
    model = dt.build(SPEC, seed=1)
    dt.save(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "notes"]
    assert (folder / "notes/today.txt").read_text() == "keep me"
    dt.save(model, folder, format="dovetail")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "dovetail.json", WEIGHTS, "notes"]
    dt.save(model, folder)
    again = dt.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o777 == folder.parent.joinpath("model").stat().st_mode & 0o777


def _full_disk(target: Path, limit: int, result: Any) -> None:
    """In a child: every file beyond `limit` bytes fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        dt.save(dt.build(SPEC, seed=1), target)
    except DovetailError as error:
        result.send((type(error).__name__, error.exit_code, str(error)))
    else:
        result.send(None)


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, limit: int) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_full_disk, args=(folder, limit, theirs))
    child.start()
    child.join(30)
    assert ours.poll(), "the child said nothing"
    name, code, text = ours.recv()
    assert (name, code) == (RunError.__name__, 1) and "could not save" in text and "intact" in text
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    with pytest.raises(RunError, match="could not save"):
        dt.save(dt.load(folder), folder / CONFIG / "below")


def _save_forever(target: Path, started: Any) -> None:
    """In a child: saves, in shards, models whose every weight is the number of the save."""
    files.SHARD_BYTES = 8000
    model = dt.build(SPEC)
    for number in range(1, 10**6):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(number)
        dt.save(model, target)
        started.send(number)


def test_kill_9_leaves_a_whole_checkpoint(folder: Path) -> None:
    """Killed at random moments of saving: what is there is one save, whole, never a mixture."""
    dice = random.Random(0)
    met = 0
    for _ in range(6):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_save_forever, args=(folder, theirs))
        child.start()
        assert child.pid is not None and ours.recv() == 1
        begun = time.perf_counter()
        done = ours.recv()
        time.sleep(dice.uniform(0.0, 1.0) * (time.perf_counter() - begun))
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        while ours.poll():
            done = ours.recv()
        model = dt.load(folder)
        found = torch.cat([p.detach().flatten() for p in model.parameters()]).unique().tolist()
        assert len(found) == 1 and found[0] in (done, done + 1)  # the last that ended, or the one not yet told of
        met += bool(list(folder.parent.glob(".model.*")))
    assert met, "no kill met a save at work"
    dt.save(model, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # what the dead left is gone


def _save_up_to(target: Path, function: str, told: Any) -> None:
    """In a child: saves a model of another width than the fixture's, up to a function of atomic. There it dies, or says
    that it is there and waits to be told to go on."""
    plain = getattr(atomic, function)

    def stopped(*args: Any) -> Any:
        if told is None:
            os.kill(os.getpid(), signal.SIGKILL)
        told.send("here")
        told.recv()
        return plain(*args)

    setattr(atomic, function, stopped)
    dt.save(dt.build(SPEC | {"dim": 8}), target)


def _stopping(target: Path, function: str, told: Any = None) -> Any:
    child = multiprocessing.get_context("fork").Process(target=_save_up_to, args=(target, function, told))
    child.start()
    return child


@pytest.mark.parametrize(
    ("function", "left", "dim"),
    [("sync", ".part", 16), ("_exchange", ".part", 16), ("_keep", ".old", 8)],
    ids=["before its files are synced", "before it is put in place", "before the notes are put back"],
)
def test_the_next_save_clears_what_a_killed_one_left(folder: Path, function: str, left: str, dim: int) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    bystanders = (".model.x.abcdefgh.part", ".model.notes", ".other.abcdefgh.part")
    for name in bystanders:
        (folder.parent / name).mkdir()
    child = _stopping(folder, function)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (litter,) = {p.name for p in folder.parent.iterdir()} - {"model", *bystanders}
    assert litter.endswith(left) and dt.load(folder).spec.dim == dim
    dt.save(dt.build(SPEC), folder)
    assert {p.name for p in folder.parent.iterdir()} == {"model", *bystanders}
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "logs").is_dir()
    assert dt.load(folder).spec.dim == 16


@pytest.mark.parametrize("function", ["sync", "_keep"])
def test_a_save_at_work_is_left_alone(folder: Path, function: str) -> None:
    """Two processes save to one place: each save is whole, the last one stays, and the notes with it."""
    (folder / "notes.txt").write_text("mine")
    ours, theirs = multiprocessing.Pipe()
    child = _stopping(folder, function, theirs)
    assert ours.poll(60) and ours.recv() == "here"
    (work,) = (p for p in folder.parent.iterdir() if p.name != "model")
    before = sorted(p.name for p in work.iterdir())
    atomic._clear(folder)
    assert sorted(p.name for p in work.iterdir()) == before
    if function == "sync":
        dt.save(dt.build(SPEC), folder)
        assert dt.load(folder).spec.dim == 16 and sorted(p.name for p in work.iterdir()) == before
    for _ in range(9):
        ours.send("go on")
    child.join(60)
    assert child.exitcode == 0 and dt.load(folder).spec.dim == 8
    assert (folder / "notes.txt").read_text() == "mine" and [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_target_gone_with_its_save_is_put_back(folder: Path) -> None:
    """Where two renames stand for the one step: killed between them, the old target is under its other name."""
    folder.rename(folder.with_name(".model.abcdefgh.old"))
    with pytest.raises(ZeroDivisionError), atomic.atomic_folder(folder):
        _ = 1 / 0
    assert dt.load(folder).spec.dim == 16 and [p.name for p in folder.parent.iterdir()] == ["model"]


def test_without_the_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(atomic.sys, "platform", "darwin")
    dt.save(dt.build(SPEC | {"dim": 8}), folder)
    assert dt.load(folder).spec.dim == 8 and (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(RunError, match="a file stands there"):
        dt.save(dt.build(SPEC), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_weights_of_other_names_are_not_a_save_s(folder: Path) -> None:
    """An adapter, or anybody's tensors, beside a model."""
    (folder / "lora.safetensors").write_bytes(b"mine")
    dt.save(dt.load(folder), folder)
    assert (folder / "lora.safetensors").read_bytes() == b"mine"
    dt.load(folder)


def test_what_is_saved_may_be_read_by_whom_the_umask_lets(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        dt.save(dt.load(folder), folder / "out")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (folder / "out").iterdir()} == {0o640}
    assert (folder / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("why", ["the working folder", "a mount", "a mount that does not look like one"])
def test_a_folder_that_stays_where_it_is(folder: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets file by file what else takes its place: the same folder, with the same others in it."""
    shard(folder, lambda name: "")
    (folder / "notes.txt").write_text("mine")
    if why == "the working folder":
        monkeypatch.chdir(folder)
    elif why == "a mount":
        monkeypatch.setattr(Path, "is_mount", lambda self: self == folder.resolve())
    else:

        def busy(*_: Any) -> Path:
            raise OSError(errno.EBUSY, "Device or resource busy")

        monkeypatch.setattr(atomic, "_exchange", busy)
    before = folder.stat().st_ino
    dt.save(dt.build(SPEC | {"dim": 8}), Path() if why == "the working folder" else folder)
    assert folder.stat().st_ino == before and dt.load(folder).spec.dim == 8
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("function", ["_pour", "_saved"])
def test_a_killed_save_into_the_working_folder_is_ended_by_the_next(
    folder: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new files are whole by then, and none of them goes before it is in its place."""
    (folder / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder)
    child = _stopping(folder, function)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert dt.load(folder).spec.dim == 16
    atomic.recover(folder)
    assert dt.load(folder).spec.dim == 8
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]


def test_weights_that_loading_reads_are_a_save_s_whatever_their_name(folder: Path) -> None:
    for name in ("weights.safetensors", "consolidated.safetensors"):
        only = folder.parent / name.split(".")[0]
        dt.save(dt.load(folder), only)
        (only / WEIGHTS).rename(only / name)
        dt.save(dt.load(only), folder.parent / "out")
        dt.load(folder.parent / "out")
