"""What an installation weighs, and how long an import takes: ``python -m dqn_jax.bench.size [--out FILE.json]``.

* Bytes on disk of a distribution and of all that it requires here: what the metadata of the installed packages ask for on this
  machine, extras left out, file by file, without bytecode. So it does not matter what else is installed.
* Seconds that an import takes in a fresh process: cold, without any bytecode, the standard library's included (as after an
  installer that compiles nothing; an installer that compiles spares most of it), and warm. The files themselves are most likely in the
  system's cache both times.
* Bytes of libtorch, the shared libraries that PyTorch's wheel carries and a C++ program links, without any Python.

Other libraries stand beside it where they are installed. Needs ``packaging``, which reads the conditions of requirements.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

from dqn_jax.bench import report

# Distributions, and what their users import.
MODULES = {
    "dqn_jax": "dqn_jax",
    "torch": "torch",
    "stable_baselines3": "stable_baselines3",
    "pfrl": "pfrl",
    "rejax": "rejax",
    "sbx-rl": "sbx",
}
TIMED_IMPORT = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures installed sizes and imports."""

    quick: bool = False
    """This package alone, imported twice."""
    out: Path | None = None
    """A JSON file for everything measured."""


def required(name: str) -> tuple[dict[str, Distribution], list[str]]:
    """A distribution and all that it requires on this machine, without its extras, by normalized name.

    Returns:
      The installed distributions, and the names of those that are required and absent.

    Raises:
      ModuleNotFoundError: if ``packaging`` is not installed.
      PackageNotFoundError: if the distribution itself is not.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sizes need packaging, to read the conditions of requirements: pip install packaging") from error

    found: dict[str, Distribution] = {canonicalize_name(name): importlib.metadata.distribution(name)}
    absent: set[str] = set()
    waiting, seen = [(canonicalize_name(name), "")], set()
    while waiting:  # Pairs of a distribution and one of its extras, or none.
        pair = waiting.pop()
        if pair in seen:
            continue
        seen.add(pair)
        owner, extra = pair
        for requirement in map(Requirement, found[owner].requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            try:
                found.setdefault(needed, importlib.metadata.distribution(needed))
            except PackageNotFoundError:
                absent.add(needed)
                continue
            waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
    return found, sorted(absent)


def num_bytes(distribution: Distribution) -> int:
    """The bytes of a distribution's files on disk, without bytecode; of one installed as editable, those of its package's folder."""
    files = [Path(str(path.locate())) for path in distribution.files or ()]
    folder = _editable_folder(distribution)
    if folder is not None:
        files += folder.rglob("*")
    return sum(path.stat().st_size for path in set(files) if path.suffix != ".pyc" and path.is_file())


def _editable_folder(distribution: Distribution) -> Path | None:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable", False):
        return None
    spec = importlib.util.find_spec(distribution.name.replace("-", "_"))
    return Path(spec.submodule_search_locations[0]) if spec is not None and spec.submodule_search_locations else None


def measure_installed(name: str) -> dict[str, Any]:
    """The bytes of a distribution and what it requires: ``bytes`` of all, ``packages`` (each, largest first) and ``absent`` names."""
    found, absent = required(name)
    sizes = {package: num_bytes(distribution) for package, distribution in found.items()}
    largest_first = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    return {"bytes": sum(sizes.values()), "packages": largest_first, "absent": absent}


def measure_libtorch() -> int | None:
    """The bytes of the shared libraries in PyTorch's package, those that ask for Python left out; None where PyTorch is not installed.

    What a build for CUDA takes from other packages is not in it.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    libraries = (path for path in Path(spec.submodule_search_locations[0]).glob("lib/lib*") if path.is_file())
    return sum(path.stat().st_size for path in libraries if "python" not in path.name)


def import_seconds(module: str, bytecode: str) -> float:
    """How long an import takes in a fresh process that keeps its bytecode in the folder ``bytecode``.

    Raises:
      RuntimeError: if the import fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", TIMED_IMPORT.format(module)]
    done = subprocess.run(command, env=environment | {"PYTHONPYCACHEPREFIX": bytecode}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"import {module} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def measure_imports(modules: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each module's import: ``cold``, and median and range of ``repeats`` warm ones, in which the modules take turns."""
    with tempfile.TemporaryDirectory() as parent:
        folders = {module: str(Path(parent) / module) for module in modules}
        cold = {module: import_seconds(module, folder) for module, folder in folders.items()}  # Fills the folders.
        rounds = [{module: import_seconds(module, folder) for module, folder in folders.items()} for _ in range(repeats)]
    return {module: {"cold": cold[module], "warm": report.spread([seconds[module] for seconds in rounds])} for module in modules}


def measure(quick: bool = False) -> dict[str, Any]:
    """Sizes and imports of this package and of the other libraries that are installed.

    Args:
      quick: little of everything: this package alone, and one warm import.

    Returns:
      ``installed``: for each distribution what ``measure_installed`` gives; ``libtorch_bytes`` as ``measure_libtorch`` gives them, None
      if quick; ``imports``: for each module what ``measure_imports`` gives, in seconds.

    Raises:
      ModuleNotFoundError: if ``packaging`` is not installed.
    """
    installed: dict[str, Any] = {}
    for name in list(MODULES)[:1] if quick else MODULES:
        try:
            installed[name] = measure_installed(name)
        except PackageNotFoundError:
            continue
    return {
        "installed": installed,
        "libtorch_bytes": None if quick else measure_libtorch(),
        "imports": measure_imports([MODULES[name] for name in installed], 1 if quick else 5),
    }


def show(measured: dict[str, Any]) -> None:
    """Prints what ``measure`` gives."""
    for name, installed in measured["installed"].items():
        rows = [(package, f"{size / 1e6:,.1f}") for package, size in installed["packages"].items() if size >= 1e6]
        rest = installed["bytes"] - sum(size for size in installed["packages"].values() if size >= 1e6)
        rows += [(f"{len(installed['packages']) - len(rows)} smaller ones", f"{rest / 1e6:,.1f}")]
        rows += [("all", f"{installed['bytes'] / 1e6:,.1f}")]
        report.table(f"{name} and what it requires, on disk", ("package", "MB"), rows)
        if installed["absent"]:
            print(f"  required and not installed: {', '.join(installed['absent'])}")
    if measured.get("libtorch_bytes"):
        print(f"\nlibtorch, shared libraries alone: {measured['libtorch_bytes'] / 1e6:,.1f} MB")
    imports = [
        (module, f"{seconds['cold']:.2f}", f"{seconds['warm']['median']:.2f}", f"{seconds['warm']['min']:.2f}-{seconds['warm']['max']:.2f}")
        for module, seconds in measured["imports"].items()
    ]
    report.table("seconds of an import in a fresh process", ("module", "no bytecode", "warm", "range"), imports)


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    report.run(measure, show, options.quick, options.out)


if __name__ == "__main__":
    report.command(main)
