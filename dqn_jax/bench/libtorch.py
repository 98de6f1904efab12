"""Builds and runs ``libtorch_dqn.cpp``, the loop as one C++ program, against the headers and libraries that PyTorch's wheel carries."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from dqn_jax.bench.settings import Setting

SOURCE = Path(__file__).with_name("libtorch_dqn.cpp")
ENVIRONMENT = Path(__file__).with_name("cartpole.hpp")  # SOURCE includes it.
# Without contraction, a product and a sum stay two roundings, as in the Python that the environment has to equal.
FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=off")


def cache() -> Path:
    """The folder of the user's caches in which the benchmarks keep the program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqn_jax"


def obstacle() -> str:
    """Why the program cannot be built here, or an empty string."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return "" if shutil.which("g++") else "there is no g++ to build it"


def build(folder: Path, source: Path = SOURCE) -> Path:
    """Compiles the program (about ten seconds), or finds it where it has been compiled before.

    Args:
      folder: where the program is kept, made where it is missing; its name tells the source, PyTorch and the flags apart.
      source: the C++ file.

    Returns:
      The path of the program. It runs on this machine, as long as PyTorch stays where it is.

    Raises:
      ModuleNotFoundError: if PyTorch is missing.
      RuntimeError: if g++ is missing, or fails: its output is in the message.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("the libtorch loop is built against PyTorch's headers: pip install torch", name="torch")
    import torch

    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the libtorch loop needs a C++ compiler, and there is no g++ on the PATH")
    home = Path(torch.__file__).parent
    libraries = home / "lib"
    includes = [f"-isystem{home / 'include'}", f"-I{ENVIRONMENT.parent}"]
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", *includes]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    known = "\n".join([source.read_text(), ENVIRONMENT.read_text(), torch.__version__, *flags, *links])
    binary = folder / f"libtorch_dqn-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = binary.with_suffix(f".{os.getpid()}")  # Nobody should find half a program.
    done = subprocess.run([compiler, *flags, str(source), "-o", str(unfinished), *links], capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"g++ could not build {source.name} against PyTorch {torch.__version__}:\n{done.stderr}")
    return unfinished.replace(binary)


def run(binary: Path, setting: Setting, steps: int, begin: int, seed: int) -> dict[str, Any]:
    """Runs the program on one thread.

    Args:
      binary: what ``build`` returned.
      setting: what to do.
      steps: environment steps.
      begin: the step at which the timed window begins; it ends with the last one.
      seed: of everything random.

    Returns:
      ``steps_per_second``, ``cpu_us_per_step``, ``others_cores`` and ``updates`` of the window, as ``machine.timing`` has them;
      ``returns``: of 20 greedy episodes afterwards; ``memory_mib``: the most memory so far, in MiB, at the ``start`` of the program, once
      the agent is ``built``, after the ``first_update`` and at the ``end`` of the steps; ``latency_us``: the quantiles p50, p95 and p99
      of single calls in microseconds: ``act`` (greedy), ``step`` (environment and agent, without an update; None where every step has
      one), ``step_with_update`` and ``update``.

    Raises:
      ValueError: if the window is empty.
      RuntimeError: if the program fails: its errors are in the message.
    """
    if not 0 < begin < steps:
        raise ValueError(f"the window must begin between the first step and the last, got {begin=} and {steps=}")
    given = setting._asdict() | {"steps": steps, "begin": begin, "seed": seed, "threads": 1}
    arguments = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), _text(value))]
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{binary.name} failed with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def _text(value: Any) -> str:
    """A value as the program reads it: numbers, joined by commas where there are several; a bool as 0 or 1."""
    if isinstance(value, tuple):
        return ",".join(map(repr, value))
    return repr(int(value) if isinstance(value, bool) else value)
