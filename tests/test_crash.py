"""Crashes: whatever is killed, cut, flipped or full, the last good checkpoint loads, and what is not good is refused."""

import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import dqn_jax
from dqn_jax import CheckpointError, checkpoint

ROWS = 3_000_000


def state_of(step):
    """A state of 36 MB that follows from its step."""
    return {"step": np.int32(step), "rows": np.arange(ROWS, dtype=np.float32) + step, "more": np.full((ROWS, 2), step, np.float32)}


SAVING = """
import sys, test_crash
from dqn_jax import checkpoint
step = int(sys.argv[2])
while True:
    step += 1
    checkpoint.save(sys.argv[1], test_crash.state_of(step), {"step": step})
    print(step, flush=True)
"""


def python(*args, **options):
    """A child process that finds the tests' modules."""
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, **options)


def half_written(folder, whole):
    """Files that are being written: safetensors gives them another name until they are whole, or, in older versions, they are shorter."""
    found = [(file.name, file.stat().st_size) for file in folder.iterdir()] if folder.is_dir() else []
    return [name for name, size in found if name != "state" or 0 < size < whole - 100]  # A header may be a digit shorter.


def wait_for(condition, child):
    """Waits until it holds, for as long as the child lives."""
    while not condition():
        assert child.poll() is None, "the child ended"
        time.sleep(1e-4)


@pytest.mark.parametrize("wanted", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_leaves_the_last_checkpoint(wanted, tmp_path):
    path, chance, kills, cut, last = tmp_path / "state", random.Random(0), 0, 0, 0
    while cut < wanted:
        assert kills < 20 * wanted, "hardly any kill falls into a write"
        child = python("-c", SAVING, path, last)
        first = child.stdout.readline()
        assert int(first) == last + 1
        whole = path.stat().st_size
        wait_for((tmp_path / "state.partial").exists, child)
        time.sleep(chance.uniform(0, 0.02))
        child.kill()
        kills += 1
        told = [int(line) for line in [first, *child.communicate()[0].split()]]
        cut += bool(half_written(tmp_path / "state.partial", whole))
        saved, info = checkpoint.load(path, state_of(0))
        last = info["step"]
        assert last in (told[-1], told[-1] + 1)  # It may have been killed between the save and the word of it.
        assert checkpoint.digest(saved) == checkpoint.digest(state_of(last))
        assert len(list(tmp_path.rglob("*"))) <= 4, "what killed saves leave does not pile up"
    print(f"{kills} kills, {cut} of them while the file was being written")


@pytest.mark.parametrize("env", ["CartPole-v1", "phys2d/CartPole-v1"])
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_and_ends_as_one_that_never_stopped(env, kills, tmp_path):
    words = [env, "--steps", 4_000, "--hidden", 8, "--eval-episodes", 1, "--folder", tmp_path, "--json"]
    whole = python("-m", "dqn_jax.cli", "train", *words, "--name", "whole", stderr=subprocess.DEVNULL).communicate()[0]
    chance, folder = random.Random(1), tmp_path / "killed"
    command = ["train", *words, "--name", "killed"]
    for _ in range(kills):
        child = python("-m", "dqn_jax.cli", *command, stderr=subprocess.DEVNULL)
        before = mark(folder)
        while mark(folder) == before and child.poll() is None:
            time.sleep(0.02)  # Until there is a checkpoint of its own; a quick one may have ended.
        time.sleep(chance.uniform(0, 0.5))
        child.kill()
        child.communicate()
        command = ["train", "--resume", folder, "--json"]
    out = python("-m", "dqn_jax.cli", *command, stderr=subprocess.DEVNULL).communicate()[0]
    resumed, never = json.loads(out.splitlines()[-1]), json.loads(whole.splitlines()[-1])
    assert resumed["complete"] and resumed["state_sha256"] == never["state_sha256"]
    assert (folder / "metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()
    assert not list(folder.glob("*.partial"))


def mark(folder):
    last = folder / "last.safetensors"
    return last.stat().st_mtime_ns if last.exists() else None


SMALL = {"params": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}, "count": np.int32(7)}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "state", SMALL, {"agent": "DQN"})
    return tmp_path / "state"


def refused(path, data):
    path.write_bytes(data)
    for read in (lambda: checkpoint.load(path, SMALL), lambda: checkpoint.read_info(path)):
        try:
            read()
        except CheckpointError:
            pass
        else:
            return False
    return True


def test_every_flipped_bit_is_noticed(saved):
    good, path, chance = saved.read_bytes(), saved, random.Random(2)
    unseen = []
    for _ in range(400):
        place, bit = chance.randrange(len(good)), chance.randrange(8)
        data = bytearray(good)
        data[place] ^= 1 << bit
        path.write_bytes(bytes(data))
        try:
            state, info = checkpoint.load(path, SMALL)
        except CheckpointError:
            continue
        # A flip in what the header does not count, the padding with spaces say, may leave the state as it was.
        if checkpoint.digest(state) != checkpoint.digest(SMALL) or info != {"agent": "DQN"}:
            unseen.append((place, bit))
    assert unseen == []


def test_every_truncation_is_noticed(saved):
    good = saved.read_bytes()
    assert all(refused(saved, good[:length]) for length in range(0, len(good), 7))


def forged(manifest, tensors=None):
    """A file whose checksums are right, and whose manifest says this."""
    import hashlib

    text = manifest if isinstance(manifest, str) else json.dumps({"versions": {}, **manifest})
    header = {"format": checkpoint.FORMAT, "manifest": text, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return header, tensors or {"x": np.zeros(1, np.float32)}


LEAVES = {"['params']['kernel']": [[3, 4], "float32"], "['count']": [[], "int32"]}
FORGED = {
    "no object": "[]",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "no leaves": {"info": {}, "sha256": ""},
    "leaves of another form": {"info": {}, "sha256": "", "leaves": [1, 2]},
    "info of another form": {"info": 3, "sha256": "", "leaves": {}},
    "a huge shape": {"info": {}, "sha256": "", "leaves": {"['params']['kernel']": [[2**60, 2**60], "float32"]}},
    "a negative shape": {"info": {}, "sha256": "", "leaves": {"['params']['kernel']": [[-1], "float32"]}},
    "no dtype": {"info": {}, "sha256": "", "leaves": {**LEAVES, "['count']": [[], "no such"]}},
    "tensors that are not there": {"info": {}, "sha256": "", "leaves": LEAVES},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_is_refused(name, tmp_path):
    header, tensors = forged(FORGED[name])
    save_file(tensors, tmp_path / "state", metadata=header)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "state", SMALL)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95",  # Pickle.
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**63 - 1) + b"{" * 100,
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
        struct.pack("<Q", 58) + b'{"a":{"dtype":"F32","shape":[99999],"data_offsets":[0,4]}}' + b"1234",
        struct.pack("<Q", 2) + b"{}",
    ],
    ids=["empty", "pickle", "long header", "longer header", "deep header", "no text", "short data", "no metadata"],
)
def test_a_hostile_file_is_refused(data, tmp_path):
    assert refused(tmp_path / "state", data)


FULL = """
import resource, signal, sys, test_crash
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from dqn_jax import checkpoint
try:
    checkpoint.save(sys.argv[1], test_crash.state_of(2))
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path):
    path = tmp_path / "state"
    checkpoint.save(path, state_of(1))
    said = python("-c", FULL, path).communicate()[0]
    assert "could not be written" in said and "make room" in said
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert checkpoint.digest(checkpoint.load(path, state_of(0))[0]) == checkpoint.digest(state_of(1))


def test_another_format_is_named(tmp_path):
    header, tensors = forged({"info": {}, "sha256": "", "leaves": {}})
    save_file(tensors, tmp_path / "state", metadata={**header, "format": "dqn_jax checkpoint 1"})
    with pytest.raises(CheckpointError, match=f"its format is 'dqn_jax checkpoint 1', expected '{checkpoint.FORMAT}'"):
        dqn_jax.checkpoint.read_info(tmp_path / "state")
