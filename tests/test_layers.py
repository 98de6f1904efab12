"""The import graph and other promises that the source itself keeps, read with ast: nothing is imported but the public names."""

import ast
import builtins
import inspect
from pathlib import Path

import pytest

import dqn_jax

ROOT = Path(dqn_jax.__file__).parent
SOURCES = {path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

FOUNDATION = {"types"}
TOOLS = {
    "finite",
    "minibatches",
    "returns",
    "networks",
    "policies",
    "normalize",
    "optimizers",
    "spaces",
    "distributions",
    "heads",
    "value_networks",
}
DATA = {"memory", "algorithms", "curiosity", "envs", "atari"}
DRIVERS = {"seeds", "training", "programs", "staging", "stepper", "online"}
BELOW_PRESETS = FOUNDATION | TOOLS | DATA | {"agent", "checkpoint", "footprint", "options"} | DRIVERS
# What each room may import, besides itself. A new room needs a line here: say where it stands.
MAY_IMPORT = {
    "types": set(),
    **dict.fromkeys(TOOLS, FOUNDATION),
    "memory": FOUNDATION | TOOLS,
    "algorithms": FOUNDATION | TOOLS,
    "curiosity": FOUNDATION | TOOLS,
    "atari": set(),
    "envs": FOUNDATION | TOOLS | {"atari"},
    "agent": FOUNDATION | {"finite"},
    "checkpoint": FOUNDATION,
    "footprint": set(),
    "env_state": set(),
    "seeds": {"footprint"},
    "training": FOUNDATION | {"checkpoint", "footprint", "seeds"},
    "programs": FOUNDATION,
    "staging": FOUNDATION | {"programs"},
    "stepper": FOUNDATION | {"checkpoint", "finite", "footprint", "programs", "staging"},
    "online": FOUNDATION | {"checkpoint", "spaces", "staging", "stepper"},
    "options": set(),
    "distributions": FOUNDATION | {"policies"},
    "heads": {"returns"},
    "value_networks": {"networks"},
    "presets": BELOW_PRESETS,
    "statistics": set(),
    "play": {"envs"},
    "runs": BELOW_PRESETS | {"presets", "env_state", "play"},
    "log": {"checkpoint", "runs"},
    "check_env": BELOW_PRESETS | {"presets"},
    **dict.fromkeys(("experiment", "export", "bench"), BELOW_PRESETS | {"presets", "log", "play", "runs", "statistics"}),
    "cli": BELOW_PRESETS | {"presets", "log", "play", "runs", "statistics", "experiment", "export", "bench"},
    "__main__": {"cli"},
}


def imports(module, tree):
    """The modules of the package, as paths, that a module imports anywhere in its text."""
    package = ["dqn_jax", *module.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "dqn_jax":
                # "from dqn_jax.memory import ring" names a module, "from dqn_jax.types import Batch" a thing in one.
                inner = "/".join(parts[1:])
                yield inner if inner in SOURCES else "/".join(parts[1:-1]) or inner or "__init__"


def test_the_reader_of_imports_sees_every_form():
    text = """
import dqn_jax.online
from dqn_jax import networks, policies
from dqn_jax.memory import ring
from . import dqn
from ..types import Batch
from dqn_jax import assemble
import jax
def late():
    from dqn_jax.presets import DQN
"""
    found = set(imports("algorithms/dqn", ast.parse(text)))
    assert found == {"online", "networks", "policies", "memory/ring", "algorithms/dqn", "types", "assemble", "presets"}


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "__init__"])
def test_imports_run_one_way(module):
    room = module.split("/")[0]
    assert room in MAY_IMPORT, f"{module}.py has no place among the layers"
    for imported in imports(module, SOURCES[module]):
        target = imported.split("/")[0]
        if target == room:
            # Only the parts of one room may know one another; algorithms are apart: one file, one algorithm.
            assert room != "algorithms" or imported in (room, module), f"{module}.py imports {imported}.py"
        else:
            assert target in MAY_IMPORT[room], f"{module}.py may not import {imported}"


@pytest.mark.parametrize("module", SOURCES)
def test_no_room_has_a_name_that_says_nothing(module):
    assert not {"utils", "util", "common", "base", "core", "config", "helpers", "misc"} & set(module.split("/"))


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_runs_code_from_data_or_hides_names(module):
    for node in ast.walk(SOURCES[module]):
        where = f"{module}.py line {getattr(node, 'lineno', 0)}"
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}, where
        if isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "__import__"}, where
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.name not in {"__getattr__", "__getattribute__"}, where
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", where
        if isinstance(node, ast.ImportFrom):
            assert "*" not in [alias.name for alias in node.names], where


def public_definitions(body, prefix=""):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("module", SOURCES)
def test_everything_public_has_a_docstring(module):
    tree = SOURCES[module]
    assert not tree.body or ast.get_docstring(tree), f"{module}.py does not say what it is"
    silent = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]
    assert not silent


def test_every_public_name_exists_and_speaks():
    assert len(set(dqn_jax.__all__)) == len(dqn_jax.__all__)
    for name in dqn_jax.__all__:
        thing = getattr(dqn_jax, name)
        assert not (inspect.isclass(thing) or inspect.isfunction(thing)) or inspect.getdoc(thing), name
        assert not hasattr(builtins, name), f"{name} shadows a builtin under import *"


def test_every_name_that_the_package_imports_is_public():
    brought = {alias.asname or alias.name for node in SOURCES["__init__"].body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert brought == set(dqn_jax.__all__)
