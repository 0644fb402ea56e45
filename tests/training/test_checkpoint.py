"""Checkpoints: what is saved comes back, and nothing is lost to a kill, a full disk or damage."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastrlhf.errors import UserError
from fastrlhf.training import checkpoint
from fastrlhf.training.checkpoint import CheckpointError, Checkpoints


def save(checkpoints: Checkpoints, step: int, size: int = 8, **state: object) -> Path:
    return checkpoints.save(step, {"policy": {"w": torch.full((size,), float(step))}}, {"step": step, **state})


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_tensors_of_every_dtype_come_back_bitwise(tmp_path):
    tensors = {
        str(d).split(".")[1]: torch.randn(3, 4).mul(50).to(d)
        for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    }
    tensors |= {
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "transposed": torch.randn(4, 5).t(),
        "nan": torch.tensor([math.nan, -0.0]),
    }
    path = Checkpoints(tmp_path).save(7, {"policy": tensors, "critic": {}}, {})
    assert path == tmp_path / "step-000007" and (tmp_path / "latest").read_text() == "step-000007\n"
    loaded, state = Checkpoints(tmp_path).load(path)
    assert set(loaded) == {"policy", "critic"} and loaded["critic"] == {} and state == {}
    for name, tensor in tensors.items():
        other = loaded["policy"][name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        assert (
            other.contiguous().view(torch.uint8).tolist() == tensor.contiguous().view(torch.uint8).tolist()
            if tensor.dim()
            else other == tensor
        ), name


def test_state_comes_back_exactly(tmp_path):
    floats = [0.1, 1e-300, 5e-324, -0.0, math.pi, math.inf, -math.inf]
    state = {
        "floats": floats,
        "int": 2**80,
        "none": None,
        "flag": True,
        "text": 'é"\n',
        "deep": {"a": [{"b": []}]},
        "pair": (1, 2),
    }
    path = Checkpoints(tmp_path).save(0, {}, state | {"nan": math.nan, "numpy": np.float64(0.1)})
    _, loaded = Checkpoints(tmp_path).load(path)
    assert [x.hex() for x in loaded["floats"]] == [x.hex() for x in floats]
    assert math.isnan(loaded.pop("nan")) and loaded.pop("numpy") == 0.1
    assert loaded == state | {"pair": [1, 2]} and loaded["flag"] is True
    json.loads((path / "state.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [0, torch.ones(1)]}}, r"state\.a\.b\[1\]: expected a number, .*, got Tensor"),
        ({"a": {1: 2}}, r"state\.a: expected keys that are strings, got 1"),
        ({"a": {1, 2}}, r"state\.a: .* got set"),
    ],
)
def test_state_that_json_cannot_hold(state, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path).save(0, {}, state)
    assert names(tmp_path) == []


def test_a_group_named_like_a_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got '\.\./x'"):
        Checkpoints(tmp_path).save(0, {"../x": {}}, {})


def test_tied_tensors_are_written_once_and_come_back_tied(tmp_path):
    big = torch.randn(1000)
    path = Checkpoints(tmp_path).save(0, {"policy": {"embed": big, "head": big, "tail": big[500:], "again": big[500:]}}, {})
    assert (path / "policy.safetensors").stat().st_size < 1000 * 4 + 500 * 4 + 1000
    loaded = Checkpoints(tmp_path).load(path)[0]["policy"]
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr() and loaded["tail"].data_ptr() == loaded["again"].data_ptr()
    assert torch.equal(loaded["head"], big) and torch.equal(loaded["tail"], big[500:])


def test_callbacks_write_subdirectories(tmp_path):
    def fill(directory: Path) -> None:
        (directory / "deep").mkdir()
        (directory / "deep" / "config.json").write_text("{}")

    path = Checkpoints(tmp_path).save(0, {}, {}, {"model": fill})
    assert (path / "model" / "deep" / "config.json").read_text() == "{}"
    (path / "model" / "deep" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model/deep/config.json is damaged"):
        Checkpoints(tmp_path).load(path)


def test_a_callback_that_fails_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    kept = save(checkpoints, 1)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(2, {}, {}, {"model": lambda directory: 1 / 0})  # type: ignore[arg-type,return-value]
    assert names(tmp_path) == ["latest", "step-000001"] and checkpoints.latest() == kept


def test_which_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 10):
        save(checkpoints, step)
    assert names(tmp_path) == ["latest", "step-000004", "step-000008", "step-000009"]
    everything = Checkpoints(tmp_path / "all", keep=None)
    for step in range(5):
        save(everything, step)
    assert len(names(tmp_path / "all")) == 6
    for keep in (0, -1):
        with pytest.raises(ValueError, match=f"keep: expected at least 1 or None, got {keep}"):
            Checkpoints(tmp_path, keep=keep)


def test_what_cannot_be_removed_no_longer_looks_like_a_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    with pytest.warns(UserWarning, match=r"step-000001 could not be removed: Device or resource busy"):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert "step-000001" not in names(tmp_path) and Checkpoints(tmp_path).latest() == tmp_path / "step-000002"
    save(checkpoints, 3)
    assert names(tmp_path) == ["latest", "step-000003"]


def test_the_latest_is_the_one_saved_last(tmp_path):
    """A run continued from an earlier step counts its steps again."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (100, 200, 150):
        save(checkpoints, step)
    assert Checkpoints(tmp_path).latest() == tmp_path / "step-000150"
    save(checkpoints, 160)
    assert names(tmp_path) == ["latest", "step-000150", "step-000160", "step-000200"]


def test_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None and not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match=r"checkpoint .*step-000001: manifest.json: No such file"):
        Checkpoints(tmp_path).load(tmp_path / "step-000001")


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, note="first")
    path = save(checkpoints, 1, note="second")
    assert checkpoints.load(path)[1]["note"] == "second" and Checkpoints(tmp_path).load(path)[1]["note"] == "second"
    assert names(tmp_path) == ["latest", "step-000001"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 1, note="first")
    rename = os.rename

    def killed(a: Path, b: Path) -> None:
        rename(a, b)
        if str(b).endswith(".replaced"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 1, note="second")
    monkeypatch.undo()
    fresh = Checkpoints(tmp_path)
    latest = fresh.latest()
    assert latest is not None and latest.name == "step-000001.replaced" and fresh.load(latest)[1]["note"] == "first"
    save(fresh, 1, note="third")
    assert names(tmp_path) == ["latest", "step-000001"] and fresh.load(path)[1]["note"] == "third"


@pytest.mark.parametrize("how", ["flip", "cut", "missing", "manifest", "no manifest"])
def test_damage_is_noticed_and_skipped(how, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    good, bad = save(checkpoints, 1), save(checkpoints, 2)
    file = bad / ("manifest.json" if "manifest" in how else "policy.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) - 3] ^= 1
    if how in ("missing", "no manifest"):
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "manifest": bytes(data[:20])}[how])
    what = {
        "flip": "policy.safetensors is damaged: its checksum differs",
        "cut": f"policy.safetensors has {len(data) - 1} bytes, expected {len(data)}",
        "missing": "policy.safetensors: No such file or directory",
        "manifest": "manifest.json is damaged",
        "no manifest": "manifest.json: No such file or directory",
    }[how]
    with pytest.warns(UserWarning, match=f"step-000002 is skipped: {what}"):
        assert Checkpoints(tmp_path).latest() == good
    with pytest.raises(CheckpointError, match=what):
        Checkpoints(tmp_path).load(bad)
    assert Checkpoints(tmp_path).load(good)[1]["step"] == 1


# A full disk

WRITES = ["safetensors", "text", "callback", "fsync", "rename"]


@pytest.mark.parametrize("where", WRITES)
@pytest.mark.parametrize("first", [False, True])
def test_a_full_disk(where, first, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    previous = None if first else save(checkpoints, 1)

    def full(path: Path, *rest: object) -> None:
        if Path(path).is_dir():
            (Path(path) / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    targets = {
        "safetensors": (checkpoint, "_save_file"),
        "text": (checkpoint, "_write"),
        "fsync": (checkpoint, "_flush"),
        "rename": (os, "rename"),
    }
    if where in targets:
        if where == "safetensors":
            monkeypatch.setattr(checkpoint, "_save_file", lambda tensors, path: (path.write_bytes(b"half"), full(path)))
        else:
            monkeypatch.setattr(*targets[where], full)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, {"policy": {"w": torch.ones(9)}}, {}, {"model": full if where == "callback" else lambda path: None})
    message = str(caught.value)
    assert message.startswith(f"checkpoint of step 2 in {tmp_path} could not be saved: No space left on device")
    assert message.endswith("there is no earlier checkpoint" if first else f"the previous checkpoint {previous} is intact")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, RuntimeError)
    assert names(tmp_path) == ([] if first else ["latest", "step-000001"])
    monkeypatch.undo()
    assert Checkpoints(tmp_path).latest() == previous
    save(checkpoints, 2)
    assert Checkpoints(tmp_path).latest() == tmp_path / "step-000002"


def test_a_file_larger_than_the_system_allows(tmp_path):
    """The real thing, inside safetensors: no monkeypatch reaches there."""
    program = f"""
import resource, signal, torch
from fastrlhf.training.checkpoint import Checkpoints, CheckpointError
c = Checkpoints({str(tmp_path)!r})
c.save(1, {{"policy": {{"w": torch.ones(10)}}}}, {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))
try:
    c.save(2, {{"policy": {{"w": torch.ones(100_000)}}}}, {{}})
except CheckpointError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "step 2" in out.stdout and "step-000001 is intact" in out.stdout, out.stderr
    assert names(tmp_path) == ["latest", "step-000001"] and Checkpoints(tmp_path).load(tmp_path / "step-000001")


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    checkpoints = Checkpoints(small_disk, keep=None)
    step = 0
    with pytest.raises(CheckpointError, match=r"[Nn]o space left on device.*is intact"):
        for step in range(1, 100):
            save(checkpoints, step, size=5000)
    assert 2 < step < 99
    assert Checkpoints(small_disk).latest() == small_disk / f"step-{step - 1:06d}"
    assert not [name for name in names(small_disk) if "tmp" in name]


# A kill


def kills(*arguments: object) -> None:
    """Forks in a process of its own, which has one thread: what pytest's torch has running would not survive a fork."""
    program = [sys.executable, "-X", "faulthandler", "-m", "tests.training.kills", *map(str, arguments)]
    out = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replacing", [0, 1])
def test_killed_at_each_line_of_a_save(replacing, stride, tmp_path):
    kills("lines", tmp_path, replacing, stride)


def test_killed_at_random_times(tmp_path):
    kills("times", tmp_path)


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut leaves: a name only for what was flushed, and the names themselves flushed."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda d: (events.append(f"flush {name(d)}"), fsync(d))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"name {Path(b).name}"), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"name {Path(b).name}"), replace(a, b))[1])
    Checkpoints(tmp_path).save(
        1, {"policy": {"w": torch.ones(1)}}, {}, {"model": lambda d: (d / "config").write_text("{}") and None}
    )
    named = events.index("name step-000001")
    flushed = {event.partition(" ")[2].partition(".tmp")[0] for event in events[:named]}
    assert flushed == {"policy.safetensors", "state.json", "manifest.json", "config", "model", "step-000001", "latest"}
    assert events[named:] == ["name step-000001", "name latest", f"flush {tmp_path.name}"]
