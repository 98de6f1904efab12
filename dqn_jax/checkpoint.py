"""Saving and restoring any state, exactly, in one file that cannot run code.

The format is safetensors: a JSON header and raw arrays. The header carries the format's number, the versions of what wrote it, the shape
and dtype of every leaf, a SHA-256 over all of them, and a dict of the caller's. A file appears under its name only when it is whole. The
structure comes from the caller's template, never from the file.
"""

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "dqn_jax checkpoint 2"
VERSIONS = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
# What reading a file that says nonsense may raise, where its checksums are right and yet it was not written by ``save``.
NONSENSE = ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError


class CheckpointError(ValueError):
    """The file is not a checkpoint, is damaged, or does not fit the state that it should restore."""


class MisfitError(CheckpointError):
    """The file is sound, and not of the state that it should restore."""


def save(path: str | os.PathLike, tree: chex.ArrayTree, info: dict[str, Any] | None = None) -> None:
    """Writes every leaf of ``tree`` to ``path``, atomically: a reader finds the old file or the new one, never a part.

    Args:
      path: the file; missing folders are made.
      tree: any pytree of arrays, typed keys included. It is copied to the host; it stays usable.
      info: a dict of JSON values to keep beside it.

    Raises:
      OSError: if it cannot be written, on a full disk for example; the file that was there before is whole. Also where the path is that
        of a folder or a device.
    """
    path = Path(os.path.realpath(path))  # A link stays, and what it leads to is replaced.
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is there and is no file: give the path of a new file, or of a checkpoint to replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = _host_leaves(tree)
    manifest = json.dumps(
        {
            "sha256": _digest(leaves),
            "leaves": {name: [list(leaf.shape), dtype] for name, (dtype, leaf) in leaves.items()},
            "info": info or {},
            "versions": VERSIONS,
        }
    )
    header = {"format": FORMAT, "manifest": manifest, "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest()}
    # A folder, since safetensors may itself write under a name of its choice first. What a save that was killed has left in it goes with
    # the next one.
    partial = path.with_name(f"{path.name}.partial")
    discard(partial)
    try:
        partial.mkdir()
        (partial / "state").touch()
        mode = (partial / "state").stat().st_mode  # As of any new file; safetensors makes one that only its owner may read.
        save_file({name: _storable(leaf) for name, (_, leaf) in leaves.items()}, partial / "state", metadata=header)
        os.chmod(partial / "state", mode)
        _sync(partial / "state")
        os.replace(partial / "state", path)
        _sync(path.parent)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}): make room on the disk; what was there before is untouched") from error
    finally:
        discard(partial)


def load(path: str | os.PathLike, template: chex.ArrayTree) -> tuple[Any, dict[str, Any]]:
    """Reads the state saved at ``path``.

    Args:
      path: a file that ``save`` wrote.
      template: a pytree of arrays or shapes with the structure, shapes and dtypes that the state must have.

    Returns:
      The state, on the default device or spread over several as the template's leaves are, and the dict saved beside it.

    Raises:
      FileNotFoundError: if there is no such file.
      MisfitError: if it does not fit the template; every difference is listed.
      CheckpointError: if it is not a checkpoint, or is damaged.
    """
    expected = _forms(template)
    with _opened(path) as file:  # Once: a save may put another file under the name meanwhile.
        manifest = _manifest(path, file)
        if problems := _differences(manifest["leaves"], expected):
            raise MisfitError(
                f"{path} does not fit this agent; build the agent with the spaces and the options it was saved with:\n  {problems}"
            )
        try:
            leaves = {name: (dtype, _stored(file.get_tensor(name), dtype)) for name, (_, dtype) in expected.items()}
        except (SafetensorError, *NONSENSE) as error:
            raise CheckpointError(f"{path} is damaged ({error}): restore an earlier checkpoint") from error
    if _digest(leaves) != manifest["sha256"]:
        raise CheckpointError(f"{path} is damaged (its checksum does not match): restore an earlier checkpoint")
    return _rebuilt(template, leaves), manifest["info"]


def discard(partial: Path) -> None:
    """Removes what a save that was killed has left, a file or a folder with all that is in it, if it is there."""
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def require_fit(state: chex.ArrayTree, template: chex.ArrayTree, owner: str) -> None:
    """Checks that a state has the structure, shapes and dtypes that its new owner needs.

    Args:
      state: the state to hand over.
      template: a pytree of arrays or shapes as it must be.
      owner: who is to take it, for the message.

    Raises:
      ValueError: if it does not fit; every difference is listed.
    """
    if problems := _differences(_forms(state), _forms(template)):
        raise ValueError(
            f"the state does not fit {owner}; use the options and the number of environments of the run it comes from, and pass one seed "
            f"of it (result.seed(0).state):\n  {problems}"
        )


def read_info(path: str | os.PathLike) -> dict[str, Any]:
    """The dict saved beside the state at ``path``. Raises as ``load`` does."""
    with _opened(path) as file:
        return _manifest(path, file)["info"]


def other_versions(path: str | os.PathLike) -> list[str]:
    """A line for each version that has changed since the state at ``path`` was saved. Raises as ``load`` does."""
    with _opened(path) as file:
        saved = _manifest(path, file)["versions"]
    return [f"{name} was {saved.get(name)} and is {now}" for name, now in VERSIONS.items() if saved.get(name) != now]


def digest(tree: chex.ArrayTree) -> str:
    """A SHA-256 over the names, shapes, dtypes and bytes of all leaves: equal states, and only those, have equal digests."""
    return _digest(_host_leaves(tree))


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _opened(path: str | os.PathLike) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected a file written by save()")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, *NONSENSE) as error:
        raise CheckpointError(f"{path} is not a checkpoint of dqn_jax, or is damaged ({error})") from error


def _manifest(path: str | os.PathLike, file: Any) -> dict[str, Any]:
    try:
        header = file.metadata() or {}
    except (SafetensorError, *NONSENSE) as error:
        raise CheckpointError(f"{path} is not a checkpoint of dqn_jax, or is damaged ({error})") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version: its format is {header.get('format')!r}, expected {FORMAT!r}")
    manifest = header.get("manifest", "")
    if hashlib.sha256(manifest.encode()).hexdigest() != header.get("manifest_sha256"):
        raise CheckpointError(f"{path} is damaged (the checksum of its header does not match): restore an earlier checkpoint")
    try:
        read = json.loads(manifest)
        read["leaves"] = {name: (tuple(shape), dtype) for name, (shape, dtype) in read["leaves"].items()}
        return {name: dict(read[name]) for name in ("info", "leaves", "versions")} | {"sha256": str(read["sha256"])}
    except NONSENSE as error:
        raise CheckpointError(f"{path} was not written by this package: its header makes no sense ({type(error).__name__})") from error


def _named_leaves(tree: chex.ArrayTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _forms(tree: chex.ArrayTree) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: _shape_and_dtype(leaf) for name, leaf in _named_leaves(tree).items()}


def _differences(given: dict[str, Any], expected: dict[str, Any]) -> str:
    """A line for each leaf that differs, ten of them at most; empty where none does."""
    problems = [
        f"{name}: got {given.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in expected | given
        if given.get(name) != expected.get(name)
    ]
    return "\n  ".join(problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else []))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> str:
    """The implementation of a typed key, which may be a mere shape: only its dtype tells."""
    return {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}[str(leaf.dtype)]


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Of what is stored: a typed key keeps its own dtype, which names its implementation, and the shape of its data."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return tuple(data.shape), str(leaf.dtype)


def _host_leaves(tree: chex.ArrayTree) -> dict[str, tuple[str, np.ndarray]]:
    """The dtype and the data of each leaf, by name."""

    def to_host(leaf: Any) -> tuple[str, np.ndarray]:
        # ascontiguousarray gives scalars an axis, hence the reshape.
        array = _on_host(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        return str(leaf.dtype), np.ascontiguousarray(array).reshape(array.shape)

    return {name: to_host(leaf) for name, leaf in _named_leaves(tree).items()}


def _on_host(leaf: Any) -> np.ndarray:
    if not _is_spread(leaf):
        return np.asarray(leaf)
    # NumPy's view of an array that lies on several devices would be a copy, kept for as long as the array.
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _is_spread(leaf: Any) -> bool:
    return len(getattr(getattr(leaf, "sharding", None), "device_set", ())) > 1


def _rebuilt(template: chex.ArrayTree, leaves: dict[str, tuple[str, np.ndarray]]) -> Any:
    def to_device(path: Any, like: Any) -> jax.Array:
        data = leaves.pop(jax.tree_util.keystr(path))[1]  # Gone as soon as it is on the device.
        # Copies: the device must not share the file's memory.
        spread = _is_spread(like)
        array = jax.make_array_from_callback(data.shape, like.sharding, lambda part: np.array(data[part])) if spread else jnp.array(data)
        return jax.random.wrap_key_data(array, impl=_key_impl(like)) if _is_key(like) else array

    return jax.tree_util.tree_map_with_path(to_device, template)


def _storable(leaf: np.ndarray) -> np.ndarray:
    """NumPy has no bfloat16 or float8 that safetensors knows: their bits travel as unsigned integers."""
    return leaf if leaf.dtype.kind in "fiub" and leaf.dtype.isbuiltin == 1 else leaf.view(f"u{leaf.dtype.itemsize}")


def _stored(leaf: np.ndarray, dtype: str) -> np.ndarray:
    return leaf if dtype.startswith("key<") or str(leaf.dtype) == dtype else leaf.view(jnp.dtype(dtype))


def _digest(leaves: dict[str, tuple[str, np.ndarray]]) -> str:
    sha = hashlib.sha256()
    for name, (dtype, leaf) in leaves.items():
        sha.update(f"{name} {leaf.shape} {dtype}\n".encode())
        sha.update(leaf.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
