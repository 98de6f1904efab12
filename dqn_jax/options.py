"""The options of the ready-made agents: their names, defaults, named sets, and checks by value."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax


@dataclasses.dataclass(frozen=True)
class DQNOptions:
    """Options of ``dqn_jax.DQN`` and ``dqn_jax.dqn``: numbers and names. Intervals count transitions, of all environments together."""

    gamma: float = 0.999
    """Discount factor per environment step, in [0, 1]."""
    learning_rate: float = 7e-4
    """Step size of Adam; unused where an optimizer is given."""
    encoder: Literal["auto", "flat", "nature", "minatar"] = "auto"
    """What the network sees first: the observation as one vector, or the convolutions of Mnih et al. (2015) or of MinAtar. "auto" takes
    convolutions for images (uint8 or bool with two or three axes), by their size; unused where a network is given."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers; by default (64, 64), behind Nature's convolutions (512,), behind MinAtar's (128,)."""
    loss: Literal["huber", "mse"] = "mse"
    """Loss of the TD error."""
    double: bool = True
    """Double DQN: the online network chooses the bootstrap action, the target network values it."""
    n_steps: int = 5
    """Rows of an n-step return."""
    batch_size: int = 128
    """Transitions in a batch."""
    capacity: int = 50_000
    """Transitions that the replay keeps. Where frames are stored once: the frames, one for each step and a stack for each episode."""
    frames: Literal["off", "single", "stack_first", "stack_last"] = "off"
    """Store each frame of an image (uint8 or bool) once, where an observation is a single frame, or a stack of them along its first axis
    (Gymnasium's FrameStackObservation) or its last. Channels that are no earlier frames are "single". "off" stores observations whole."""
    prioritized: bool = False
    """Draw transitions in proportion to their last TD error."""
    alpha: float = 0.6
    """How much priorities count: 0 is uniform, 1 in full; unused unless prioritized."""
    beta: tuple[float, float, int] | float = (0.4, 1.0, 100_000)
    """How far importance weights make up for prioritization: start, end and the transitions between (linear); or a constant; in Python
    also an optax schedule. Unused unless prioritized."""
    replay_start_size: int = 1_000
    """Transitions stored before the first update."""
    update_interval: int = 1
    """Transitions between updates; it and num_envs must divide one another."""
    updates_per_interval: int = 1
    """Updates at each interval."""
    target_update_interval: int | None = None
    """Transitions between refreshes of the target network; by default 500 where tau is 1, else at every update."""
    tau: float | None = None
    """How far a refresh moves the target to the online parameters; by default 1 (a copy) with a target_update_interval, else 0.005."""
    epsilon: tuple[float, float, int] | float = (1.0, 0.05, 10_000)
    """Chance of a random action: start, end and the transitions between (linear); or a constant; in Python also an optax schedule."""
    max_grad_norm: float | None = 10.0
    """Bound on the gradient's global norm, or None; unused where an optimizer is given."""


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "deck": {
        "hidden": (128, 128, 128),
        "learning_rate": 3e-4,
        "gamma": 0.97,
        "n_steps": 3,
        "batch_size": 16,
        "replay_start_size": 16,
        "update_interval": 8,
        "updates_per_interval": 1,
        "target_update_interval": 100,
        "capacity": 2_000,
        "epsilon": (0.5, 0.1, 50_000),
        "tau": 1.0,
        "loss": "mse",
        "double": False,
        "max_grad_norm": None,
    },
    "mountaincar": {
        "hidden": (256, 256),
        "learning_rate": 1e-3,
        "gamma": 0.99,
        "n_steps": 10,
        "update_interval": 4,
        "epsilon": (1.0, 0.05, 20_000),
    },
    "minatar": {
        "learning_rate": 2.5e-4,
        "gamma": 0.99,
        "n_steps": 3,
        "batch_size": 32,
        "capacity": 100_000,
        "frames": "single",
        "replay_start_size": 5_000,
        "update_interval": 4,
        "target_update_interval": 1_000,
        "epsilon": (1.0, 0.1, 100_000),
        "loss": "huber",
    },
    "lunarlander": {
        "hidden": (256, 256),
        "learning_rate": 5e-4,
        "gamma": 0.99,
        "n_steps": 3,
        "capacity": 100_000,
        "update_interval": 2,
        "epsilon": (1.0, 0.05, 15_000),
    },
}
"""Named sets of options: ``DQN(env, **PRESETS["deck"])``. "deck" is the setting of the slide deck that this package starts from; the
others are named after what they were chosen on."""


ELSEWHERE = {
    "lr": "learning_rate",
    "buffer_size": "capacity",
    "learning_starts": "replay_start_size",
    "train_freq": "update_interval",
    "train_frequency": "update_interval",
    "gradient_steps": "updates_per_interval",
    "n_times_update": "updates_per_interval",
    "target_network_frequency": "target_update_interval",
    "soft_update_tau": "tau",
    "minibatch_size": "batch_size",
    "net_arch": "hidden",
}
"""What SB3, PFRL and CleanRL call the options: for the hint when somebody uses those names."""


_CHOICES = {field.name: typing.get_args(field.type) for field in dataclasses.fields(DQNOptions) if typing.get_origin(field.type) is Literal}


def dqn_options(**options: Any) -> DQNOptions:
    """The options, checked one by one and against one another. Raises TypeError or ValueError that names the option."""
    known = [field.name for field in dataclasses.fields(DQNOptions)]
    for name in options:
        if name not in known:
            everything = sorted([*known, "network", "optimizer", "num_envs"])
            near = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, everything, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(everything)}"
            raise TypeError(f"DQN has no option {name!r}: {hint}")
    o = DQNOptions(**options)
    _require_number("gamma", o.gamma, 0, 1)
    _require_number("learning_rate", o.learning_rate, 0, math.inf, open_low=True)
    if o.tau is not None:
        _require_number("tau", o.tau, 0, 1, open_low=True)
    if o.max_grad_norm is not None:
        _require_number("max_grad_norm", o.max_grad_norm, 0, math.inf, open_low=True)
    for name, low in {
        "n_steps": 1,
        "batch_size": 1,
        "capacity": 1,
        "replay_start_size": 0,
        "update_interval": 1,
        "updates_per_interval": 1,
    }.items():
        require_int(name, getattr(o, name), low)
    if o.target_update_interval is not None:
        require_int("target_update_interval", o.target_update_interval, 1)
    if o.hidden is not None:
        if not isinstance(o.hidden, tuple | list):
            raise TypeError(f"hidden must be a tuple of widths, got {o.hidden!r}")
        for width in o.hidden:
            require_int("a width in hidden", width, 1)
    if o.replay_start_size > o.capacity:
        raise ValueError(f"replay_start_size {o.replay_start_size} exceeds capacity {o.capacity}: the replay would never hold so many")
    if o.batch_size > o.capacity:
        raise ValueError(f"batch_size {o.batch_size} exceeds capacity {o.capacity}: raise capacity or lower batch_size")
    first = max(1, -(-o.replay_start_size // o.update_interval)) * o.update_interval
    if first < o.batch_size:
        raise ValueError(
            f"batch_size {o.batch_size} exceeds the {first} transitions stored when learning starts (replay_start_size "
            f"{o.replay_start_size}, update_interval {o.update_interval}): raise replay_start_size or lower batch_size"
        )
    for name in ("prioritized", "double"):
        if not isinstance(getattr(o, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(o, name)!r}")
    for name, choices in _CHOICES.items():
        if getattr(o, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(o, name)!r}")
    _require_number("alpha", o.alpha, 0, 1)
    _require_schedule("beta", o.beta)
    _require_schedule("epsilon", o.epsilon)
    return o


def epsilon_schedule(options: DQNOptions) -> Callable[[Any], Any]:
    """The chance of a random action as a function of the transitions stored."""
    return schedule(options.epsilon)


def schedule(value: Any) -> Callable[[Any], Any]:
    """A function of the transitions stored: from (start, end, steps between), a number, or a schedule."""
    if callable(value):
        return value
    if isinstance(value, tuple | list):
        start, end, steps = value
        return optax.linear_schedule(start, end, steps) if steps else optax.constant_schedule(end)
    return optax.constant_schedule(value)


def _require_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, jax.core.Tracer):  # One value of a sweep: only its owner can check it.
        return
    if isinstance(value, bool) or (not isinstance(value, int | float | jax.Array) and not hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}")


def _require_schedule(name: str, value: Any) -> None:
    if isinstance(value, tuple | list):
        if len(value) != 3:
            raise ValueError(f"{name} must be (start, end, steps between), a number or a schedule, got {value!r}")
        _require_number(f"{name}'s start", value[0], 0, 1)
        _require_number(f"{name}'s end", value[1], 0, 1)
        require_int(f"{name}'s steps", value[2], 0)
    elif not callable(value):
        _require_number(name, value, 0, 1)


def require_int(name: str, value: Any, low: int) -> None:
    """Raises TypeError or ValueError, naming the option, unless the value is a whole number of at least ``low``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
