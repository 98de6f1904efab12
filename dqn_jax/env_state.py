"""What a Gymnasium environment is in the middle of, as data: so that a run goes on in the episode in which it stopped.

No environment is pickled, since to unpickle is to run what a file says. Its attributes, and those of its wrappers, are read instead:
numbers, words, arrays, containers of them, random generators, and objects made of these. Of code, and of MuJoCo's models, it is only noted
which they are. Anything else, a simulator written in C++ say, is refused by name, so that nothing is left out in silence; MuJoCo's state is
read by its own functions. An environment that knows better offers ``get_env_state() -> state`` and ``set_env_state(state)``, of the same
kinds of data; that is then all that is read of it, wrappers apart. What is not in attributes is not seen: variables of modules, global
generators, what functions close over.
"""

import abc
import base64
import collections
import enum
import functools
import hashlib
import random
import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

PASSED_OVER = {"spec", "metadata", "env_fns", "render_mode", "viewer", "mujoco_renderer"}  # What the environment is, and who draws it.
# What environments call pictures and windows: of no weight for what happens next, where they cannot be read.
DRAWN = {"screen", "clock", "surf", "window", "isopen"}
DRAWN |= {"fire_images", "hole_img", "cracked_hole_img", "ice_img", "elf_images", "goal_img", "start_img"}  # Of FrozenLake.
CONTAINERS = list, tuple, set, dict, collections.deque, np.ndarray, np.generic, int, float, str, bytes
CODE = types.FunctionType | types.MethodType | types.BuiltinFunctionType | types.ModuleType | type | np.ufunc | functools.partial


BY_PRESENT = {"enum": enum.Enum, "random": random.Random, "defaultdict": collections.defaultdict}  # Made by what the environment holds.


class _Plain:
    """As small as an object can be that has attributes."""


class NotCapturable(TypeError):
    """An environment holds something whose state cannot be read as data."""


def capture(env: Any) -> Any:
    """The state of an environment, wrappers included, or of a vector environment that steps its environments itself, as JSON values.

    Raises:
      NotCapturable: naming the attribute that cannot be read.
    """
    return _Writer().value(env, type(env).__name__)


def restore(env: Any, captured: Any) -> None:
    """Puts a captured state into an environment made in the same way. Where it raises, the environment is to be made anew.

    Raises:
      ValueError: if the environment is made of other parts.
    """
    _Reader().value(captured, env, type(env).__name__)


def encode(value: Any) -> Any:
    """Numbers, words, arrays and containers of them as JSON values, exactly; see ``decode``."""
    return _Writer().value(value, "value")


def decode(encoded: Any) -> Any:
    """What ``encode`` was given."""
    return _Reader().value(encoded, None, "value")


class _Writer:
    """Writes values. What stands in several places is written once, so that it is one thing again when it is read."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # So that no number of an object is given to another one meanwhile.
        self.arrays: dict[int, list[np.ndarray]] = collections.defaultdict(list)  # By whose memory they are in.

    def forget(self, count: int) -> None:
        """Takes back what was written after the first ``count`` things."""
        for thing in self.kept[count:]:
            del self.seen[id(thing)]
            if isinstance(thing, np.ndarray):
                self.arrays[_owner(thing)].pop()
        del self.kept[count:]

    def value(self, value: Any, name: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.seen:
            return {"kind": "again", "value": self.seen[id(value)]}
        if isinstance(value, np.generic):
            return {"kind": "scalar", **_array(np.asarray(value))}
        if isinstance(value, np.ndarray):
            if any(np.may_share_memory(one, value) for one in self.arrays[_owner(value)]):
                raise NotCapturable(f"{name} shares memory with another array, which would be two arrays afterwards")
            self.arrays[_owner(value)].append(value)
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        return {"number": self.seen[id(value)], **self.thing(value, name)}

    def thing(self, value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
            return {"kind": "array", **_array(value)}
        if isinstance(value, enum.Enum):
            return {"kind": "enum", "value": value.name}
        if isinstance(value, np.random.Generator) and type(value.bit_generator) is np.random.PCG64:
            return {"kind": "generator", "value": self.value(value.bit_generator.state, f"{name}.bit_generator")}
        if type(value) is random.Random:
            return {"kind": "random", "value": self.value(value.getstate(), name)}
        if isinstance(value, CODE):
            return {"kind": "code", "value": _name_of(value)}
        if _is_mujoco(value, "MjModel"):
            return {"kind": "model", "value": _digest(value)}
        if type(value) in (list, tuple, set, collections.deque):
            items = [self.value(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return {"kind": type(value).__name__, "value": items, "maxlen": getattr(value, "maxlen", None)}
        if type(value) in (dict, collections.OrderedDict, collections.defaultdict):
            if any(isinstance(key, enum.Enum) for key in value):
                raise NotCapturable(f"{name} is a dict whose keys are no numbers, words or tuples of these")
            pairs = [[self.value(key, f"{name}'s key"), self.value(item, f"{name}[{key!r}]")] for key, item in value.items()]
            return {"kind": type(value).__name__, "value": pairs}
        return {"kind": "object", "class": type(value).__qualname__, "value": self.attributes(value, name)}

    def attributes(self, thing: Any, name: str) -> dict[str, Any]:
        if hasattr(type(thing), "get_env_state"):
            return {"get_env_state": self.value(thing.get_env_state(), f"{name}.get_env_state()")}
        if not _is_python(thing):
            raise NotCapturable(f"{name} is a {type(thing).__name__}, whose state cannot be read as data")
        written = {}
        for attribute, value in _attributes(thing):
            count = len(self.kept)
            try:
                written[attribute] = self.attribute(thing, value, f"{name}.{attribute}")
            except NotCapturable:
                if attribute not in DRAWN:
                    raise
                self.forget(count)
        return written

    def attribute(self, owner: Any, value: Any, name: str) -> Any:
        if isinstance(value, gymnasium.Space):
            return self.value(_generators(value), name)
        if _is_mujoco(value, "MjData"):
            return self.value(_mujoco_state(owner.model, value), name)
        return self.value(value, name)


class _Reader:
    """Reads values back, into what is there where that is an object."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def value(self, written: Any, present: Any, name: str) -> Any:
        if not isinstance(written, dict):
            return written
        if written["kind"] == "again":
            return self.seen[written["value"]]
        if written["kind"] == "scalar":
            return _read_array(written)[()]
        read = self.thing(written, present, name)
        self.seen[written["number"]] = read
        return read

    def thing(self, written: dict[str, Any], present: Any, name: str) -> Any:
        kind, value = written["kind"], written["value"]
        if kind == "array":
            return _read_array(written)
        if kind in BY_PRESENT and not isinstance(present, BY_PRESENT[kind]):  # No method of another kind of object is called.
            raise ValueError(f"{name} is a {type(present).__name__}, the saved one was of the kind {kind}")
        if kind == "enum":
            return type(present)[value]
        if kind in ("code", "model"):
            now = _digest(present) if kind == "model" else _name_of(present)
            if now != value:
                raise ValueError(f"{name} is not the {kind} that it was when it was saved ({value}, now {now})")
            return present
        if kind == "generator":
            generator = present if isinstance(present, np.random.Generator) else np.random.Generator(np.random.PCG64())
            generator.bit_generator.state = self.value(value, None, name)
            return generator
        if kind == "random":
            present.setstate(self.value(value, None, name))
            return present
        if kind == "object":
            return self.object(written, present, name)
        return self.container(written, present, name)

    def container(self, written: dict[str, Any], present: Any, name: str) -> Any:
        kind, value = written["kind"], written["value"]
        made: Any
        if kind in ("dict", "OrderedDict", "defaultdict"):
            there = dict(present) if isinstance(present, dict) else {}
            made = {} if kind == "dict" else collections.OrderedDict() if kind == "OrderedDict" else type(present)(present.default_factory)
            self.seen[written["number"]] = made  # It may hold itself.
            for written_key, item in value:
                key = self.value(written_key, None, name)
                made[key] = self.value(item, there.get(key), f"{name}[{key!r}]")
            return made
        now = list(present) if isinstance(present, list | tuple | collections.deque) else []
        items = (self.value(item, now[i] if i < len(now) else None, f"{name}[{i}]") for i, item in enumerate(value))
        if kind in ("tuple", "set"):
            return {"tuple": tuple, "set": set}[kind](items)
        made = [] if kind == "list" else collections.deque(maxlen=written["maxlen"])
        self.seen[written["number"]] = made
        made.extend(items)
        return made

    def object(self, written: dict[str, Any], present: Any, name: str) -> Any:
        if type(present).__qualname__ != written["class"]:
            raise ValueError(f"{name} is a {type(present).__qualname__}, the saved one was a {written['class']}")
        self.seen[written["number"]] = present
        attributes = written["value"]
        if "get_env_state" in attributes:
            present.set_env_state(self.value(attributes["get_env_state"], None, name))
            return present
        own = dict(_attributes(present))
        for attribute, value in attributes.items():
            here = f"{name}.{attribute}"
            now = own.get(attribute)
            if isinstance(now, gymnasium.Space):
                _set_generators(now, self.value(value, None, here))
            elif _is_mujoco(now, "MjData"):
                _set_mujoco_state(present.model, now, self.value(value, None, here))
            else:
                vars(present)[attribute] = self.value(value, now, here)  # Also where it is frozen.
        return present


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that may change while an environment is stepped."""
    return ((name, value) for name, value in vars(thing).items() if name not in PASSED_OVER)


def _is_python(thing: Any) -> bool:
    """Whether all that an object is stands in its attributes: not if it is written in another language, has slots, or is a container."""
    kind = type(thing)
    slots = {slot for base in kind.__mro__ for slot in vars(base).get("__slots__", ())}
    plain = type(kind) in (type, abc.ABCMeta) and hasattr(thing, "__dict__") and not isinstance(thing, CONTAINERS)
    return plain and kind.__basicsize__ <= _Plain.__basicsize__ and slots <= {"__dict__", "__weakref__"}


def _owner(array: np.ndarray) -> int:
    """A number for whatever holds the array's memory."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return id(owner)


def _name_of(code: Any) -> str:
    return getattr(code, "__qualname__", None) or getattr(code, "__name__", None) or type(code).__qualname__


def _is_mujoco(value: Any, kind: str) -> bool:
    return getattr(type(value), "__module__", "").partition(".")[0] == "mujoco" and type(value).__name__ == kind


def _mujoco_state(model: Any, data: Any) -> dict[str, np.ndarray]:
    """What MuJoCo integrates; and what it derives from that, since between two steps some of it is older (positions of bodies)."""
    import mujoco

    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return {"integrated": state, **{name: field.copy() for name, field in _arrays(data)}}


def _set_mujoco_state(model: Any, data: Any, state: dict[str, np.ndarray]) -> None:
    import mujoco

    mujoco.mj_setState(model, data, state["integrated"], mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(model, data)  # Makes contacts and constraints, and disturbs the state: hence once more.
    for name, field in _arrays(data):
        if field.shape == state[name].shape:
            field[...] = state[name]
    mujoco.mj_setState(model, data, state["integrated"], mujoco.mjtState.mjSTATE_INTEGRATION)


def _arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(data):
        if name[0] != "_" and isinstance(field := getattr(data, name), np.ndarray) and field.flags.writeable:
            yield name, field


def _digest(model: Any) -> str:
    """Which model it is: environments may change its numbers, masses and frictions say."""
    sha = hashlib.sha256()
    for name, field in _arrays(model):
        sha.update(name.encode() + np.ascontiguousarray(field).tobytes())
    return sha.hexdigest()


def _generators(space: gymnasium.Space) -> list[np.random.Generator | None]:
    """The generators of a space and of those that it is made of; a wrapper may draw from it."""
    parts = getattr(space, "spaces", ())
    parts = parts.values() if isinstance(parts, dict) else parts
    return [space._np_random, *(generator for part in parts for generator in _generators(part))]


def _set_generators(space: gymnasium.Space, generators: list[np.random.Generator | None]) -> None:
    parts = getattr(space, "spaces", ())
    for part in (space, *(parts.values() if isinstance(parts, dict) else parts)):
        if part is space:
            space._np_random = generators.pop(0)
        else:
            _set_generators(part, generators)


def _array(value: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"value": data, "dtype": value.dtype.str, "shape": list(value.shape)}


def _read_array(written: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(written["value"]), np.dtype(written["dtype"]))
    return flat.reshape(written["shape"]).copy()
