"""Ready-made agents: what a newcomer and the command line use. Options have documented defaults and are checked here, by value."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import jax
import numpy as np
import optax

from dqn_jax import networks, spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import dqn as dqn_algorithm
from dqn_jax.memory.frames import frames, require_stack
from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.ring import ring
from dqn_jax.memory.uniform import uniform
from dqn_jax.online import OnlineAgent
from dqn_jax.types import Agent, AgentState, Env, Masked, Storage


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
    """Transitions that the replay keeps; where frames are stored once, the frames."""
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


STACK_AXIS = {"stack_first": 0, "stack_last": -1}
"""Along which axis of an observation frames are stacked, by the option ``frames``."""

NATURE_SIDE = 36  # Pixels: the smallest image that Nature's three convolutions leave something of.

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


def dqn(env_or_spaces: Any, *, network: Any = None, optimizer: optax.GradientTransformation | None = None, **options: Any) -> Agent:
    """A DQN agent as pure functions.

    Floats among the options (gamma, learning_rate, tau, a constant epsilon) may be tracers: a sweep is a ``vmap`` over a function that
    builds, trains and evaluates.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space).
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``; by default an MLP.
      optimizer: an optax transformation, used as it is; by default Adam behind a clip of the gradient's norm.
      **options: see ``DQNOptions``.

    Returns:
      An ``Agent``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, or a space that DQN cannot serve.
      NotImplementedError: on a space that is not supported.
    """
    observation_space, action_space, _ = read_spaces(env_or_spaces)
    num_actions = spaces.num_actions(action_space, "DQN")
    observation = spaces.example(observation_space, 1)  # Raises where a space is not supported.
    if isinstance(observation, Masked) and observation.action_mask.shape[1:] != (num_actions,):
        raise ValueError(
            f"action_mask has shape {observation.action_mask.shape[1:]}, there are {num_actions} actions: give one entry for each"
        )
    o = dqn_options(**options)
    for name, given, functions in (("network", network, ("init", "apply")), ("optimizer", optimizer, ("init", "update"))):
        if given is not None and not all(hasattr(given, function) for function in functions):
            raise TypeError(f"{name} must have the functions {' and '.join(functions)}, got {given!r}")
    if network is None:
        network = _network(o, observation_space, num_actions)
    if optimizer is None:
        # Flattened: one array for all parameters. Each array that enters or leaves a small program costs more than its arithmetic.
        clip = optax.identity() if o.max_grad_norm is None else optax.clip_by_global_norm(o.max_grad_norm)
        optimizer = optax.flatten(optax.chain(clip, optax.adam(o.learning_rate)))
    tau, target_update_interval = o.tau, o.target_update_interval
    if tau is None:
        tau = 0.005 if target_update_interval is None else 1.0
    if target_update_interval is None:
        target_update_interval = 500 if not isinstance(tau, jax.core.Tracer) and float(tau) == 1 else 1
    algorithm = dqn_algorithm(
        network,
        optimizer,
        epsilon=epsilon_schedule(o),
        loss=o.loss,
        double=o.double,
        target_update_interval=target_update_interval,
        tau=tau,
    )
    storage = _storage(o, observation_space)
    memory = uniform(storage, o.batch_size)
    if o.prioritized:
        memory = prioritized(storage, o.batch_size, alpha=o.alpha, beta=_schedule(o.beta))
    return assemble(
        algorithm, memory, discount=o.gamma, warmup=o.replay_start_size, period=o.update_interval, updates=o.updates_per_interval
    )


class DQN(OnlineAgent):
    """A DQN agent that a loop calls once per environment step.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space). It is only asked for
        its spaces.
      seed: of all randomness of the agent.
      num_envs: environments N; taken from a vector environment.
      state: an AgentState to begin with; see ``from_state``.
      network, optimizer: as for ``dqn_jax.dqn``.
      **options: see ``DQNOptions``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, a space that DQN cannot serve, or a vector environment with the wrong auto-reset.
      NotImplementedError: on a space that is not supported.
      MemoryError: if the replay is larger than the device's memory; nothing has been allocated then.
    """

    def __init__(
        self,
        env_or_spaces: Any,
        seed: int = 0,
        *,
        num_envs: int | None = None,
        state: AgentState | None = None,
        network: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        **options: Any,
    ):
        observation_space, action_space, envs_given = read_spaces(env_or_spaces)
        if num_envs is not None and envs_given is not None and num_envs != envs_given:
            raise ValueError(f"num_envs is {num_envs}, the vector environment has {envs_given}: leave num_envs out")
        if num_envs is None:
            num_envs = 1 if envs_given is None else envs_given
        _require_int("num_envs", num_envs, 1)
        _require_int("seed", seed, -(2**63))
        agent = dqn((observation_space, action_space), network=network, optimizer=optimizer, **options)
        checked = dqn_options(**options)
        self._epsilon = epsilon_schedule(checked)
        self._stack_axis = STACK_AXIS.get(checked.frames)
        super().__init__(agent, observation_space, action_space, num_envs=num_envs, seed=seed, state=state)

    @classmethod
    def from_state(cls, env_or_spaces: Any, state: AgentState, *, num_envs: int | None = None, **options: Any) -> "DQN":
        """An agent that goes on from a state, for example one seed of a compiled run: ``result.seed(3).state``.

        Args:
          env_or_spaces: as for ``DQN``.
          state: it is copied.
          num_envs: as for ``DQN``; it must be that of the run.
          **options: those of the run, network and optimizer included.

        Raises:
          ValueError: if the state does not fit; and as ``DQN``.
        """
        return cls(env_or_spaces, num_envs=num_envs, state=state, **options)

    def get_statistics(self) -> dict[str, float]:
        """As ``OnlineAgent.get_statistics``, and ``epsilon`` of the next decision."""
        return {**super().get_statistics(), "epsilon": float(self._epsilon(self._step))}

    def _take_in(self, outcome: np.ndarray, successor: Any) -> None:
        """As in ``OnlineAgent``. Only here can a stack that is none be refused: the replay would put together what was never seen."""
        if self._stack_axis is not None and self._pending is not None:
            require_stack(self._pending[0], successor, self._stack_axis)
        super()._take_in(outcome, successor)


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
        _require_int(name, getattr(o, name), low)
    if o.target_update_interval is not None:
        _require_int("target_update_interval", o.target_update_interval, 1)
    if o.hidden is not None:
        if not isinstance(o.hidden, tuple | list):
            raise TypeError(f"hidden must be a tuple of widths, got {o.hidden!r}")
        if not o.hidden:
            raise ValueError("hidden is empty: give at least one width, or a network")
        for width in o.hidden:
            _require_int("a width in hidden", width, 1)
    if o.replay_start_size > o.capacity:
        raise ValueError(f"replay_start_size {o.replay_start_size} exceeds capacity {o.capacity}: the replay would never hold so many")
    if o.batch_size > o.capacity:
        raise ValueError(f"batch_size {o.batch_size} exceeds capacity {o.capacity}: raise capacity or lower batch_size")
    if o.n_steps > o.capacity:
        raise ValueError(f"n_steps {o.n_steps} exceeds capacity {o.capacity}: raise capacity or lower n_steps")
    if o.replay_start_size < o.batch_size:
        raise ValueError(
            f"batch_size {o.batch_size} exceeds replay_start_size {o.replay_start_size}: the first batch would hold more transitions than "
            "are stored; raise replay_start_size or lower batch_size"
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
    return _schedule(options.epsilon)


def _schedule(value: Any) -> Callable[[Any], Any]:
    """A function of the transitions stored: from (start, end, steps between), a number, or a schedule."""
    if callable(value):
        return value
    if isinstance(value, tuple | list):
        start, end, steps = value
        return optax.linear_schedule(start, end, steps) if steps else optax.constant_schedule(end)
    return optax.constant_schedule(value)


def _network(options: DQNOptions, observation_space: gymnasium.Space, num_actions: int) -> networks.QNetwork | networks.ConvQNetwork:
    encoder, hidden = options.encoder, options.hidden
    space = observation_space
    if isinstance(space, gymnasium.spaces.Dict) and spaces.is_masked(space):
        space = space["observation"]
    shape = space.shape or ()
    if encoder == "auto":
        sides = sorted(shape)[-2:] if spaces.is_image(space) else [0]
        encoder = "nature" if min(sides) >= NATURE_SIDE else "minatar" if min(sides) >= 3 else "flat"
    if encoder == "flat":
        return networks.QNetwork(num_actions, tuple(hidden or (64, 64)), spaces.features(observation_space))
    # Channels are the short axis, unless the option says where the frames are.
    channels_first = {"stack_first": True, "stack_last": False}.get(options.frames, len(shape) == 3 and shape[0] < shape[2])
    convolutions, default = (networks.NATURE, (512,)) if encoder == "nature" else (networks.MINATAR, (128,))
    return networks.ConvQNetwork(num_actions, convolutions, tuple(hidden or default), spaces.image(space, channels_first))


def _storage(options: DQNOptions, observation_space: gymnasium.Space) -> Storage:
    if options.frames == "off":
        return ring(options.capacity, n_steps=options.n_steps)
    axis = STACK_AXIS.get(options.frames)
    shape = observation_space.shape or ()
    if not shape or observation_space.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"frames={options.frames!r} stores images of uint8 or bool, the observation space is {observation_space}")
    if axis is None:
        return frames(options.capacity, n_steps=options.n_steps)
    return frames(options.capacity, stack=shape[axis], stack_axis=axis, n_steps=options.n_steps)


def read_spaces(env_or_spaces: Any) -> tuple[gymnasium.Space, gymnasium.Space, int | None]:
    """The spaces of one environment, and the number of environments where a vector environment was given.

    Raises:
      TypeError: if it is neither an environment nor a pair of spaces.
      ValueError: if it is a vector environment whose auto-reset is not SAME_STEP.
    """
    if isinstance(env_or_spaces, gymnasium.vector.VectorEnv):
        mode = env_or_spaces.metadata.get("autoreset_mode")
        if mode != gymnasium.vector.AutoresetMode.SAME_STEP:
            raise ValueError(
                f"this vector environment resets with {mode}; batch_act_and_train needs SAME_STEP: make it with "
                "gymnasium.make_vec(id, num_envs, vectorization_mode='sync', "
                "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.SAME_STEP})"
            )
        return env_or_spaces.single_observation_space, env_or_spaces.single_action_space, env_or_spaces.num_envs
    if isinstance(env_or_spaces, gymnasium.Env | Env):
        return env_or_spaces.observation_space, env_or_spaces.action_space, None
    if isinstance(env_or_spaces, tuple) and len(env_or_spaces) == 2 and all(isinstance(s, gymnasium.Space) for s in env_or_spaces):
        return *env_or_spaces, None
    raise TypeError(f"expected an environment or the pair (observation_space, action_space), got {type(env_or_spaces).__name__}")


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
        _require_int(f"{name}'s steps", value[2], 0)
    elif not callable(value):
        _require_number(name, value, 0, 1)


def _require_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
