"""Ready-made agents: what a newcomer and the command line use. Options have documented defaults and are checked here, by value."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import jax
import optax

from dqn_jax import networks, spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import dqn as dqn_algorithm
from dqn_jax.memory import ring
from dqn_jax.online import OnlineAgent
from dqn_jax.types import Agent, AgentState, Env, Masked


@dataclasses.dataclass(frozen=True)
class DQNOptions:
    """Options of ``dqn_jax.DQN`` and ``dqn_jax.dqn``: numbers and names. Intervals count transitions, of all environments together."""

    gamma: float = 0.999
    """Discount factor per environment step, in [0, 1]."""
    learning_rate: float = 7e-4
    """Step size of Adam; unused where an optimizer is given."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the MLP's hidden layers; unused where a network is given."""
    loss: Literal["huber", "mse"] = "mse"
    """Loss of the TD error."""
    double: bool = True
    """Double DQN: the online network chooses the bootstrap action, the target network values it."""
    n_steps: int = 5
    """Rows of an n-step return."""
    batch_size: int = 128
    """Transitions in a batch."""
    capacity: int = 50_000
    """Transitions that the replay keeps."""
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
}
"""Named sets of options: ``DQN(env, **PRESETS["deck"])``. "deck" is the setting of the slide deck that this package starts from."""


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
        if not o.hidden:
            raise ValueError("hidden is empty: give at least one width, or a network")
        network = networks.QNetwork(num_actions, tuple(o.hidden), spaces.features(observation_space))
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
    memory = ring.uniform(o.capacity, o.batch_size, n_steps=o.n_steps)
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
        self._epsilon = epsilon_schedule(dqn_options(**options))
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
    if not isinstance(o.hidden, tuple | list):
        raise TypeError(f"hidden must be a tuple of widths, got {o.hidden!r}")
    for width in o.hidden:
        _require_int("a width in hidden", width, 1)
    if not isinstance(o.double, bool):
        raise TypeError(f"double must be True or False, got {o.double!r}")
    if o.loss not in ("huber", "mse"):
        raise ValueError(f"loss must be 'huber' or 'mse', got {o.loss!r}")
    if o.replay_start_size > o.capacity:
        raise ValueError(f"replay_start_size {o.replay_start_size} exceeds capacity {o.capacity}: the replay would never hold so many")
    if o.batch_size > o.capacity:
        raise ValueError(f"batch_size {o.batch_size} exceeds capacity {o.capacity}: raise capacity or lower batch_size")
    if isinstance(o.epsilon, tuple | list):
        if len(o.epsilon) != 3:
            raise ValueError(f"epsilon must be (start, end, decay steps), a number or a schedule, got {o.epsilon!r}")
        _require_number("epsilon's start", o.epsilon[0], 0, 1)
        _require_number("epsilon's end", o.epsilon[1], 0, 1)
        _require_int("epsilon's decay steps", o.epsilon[2], 0)
    elif not callable(o.epsilon):
        _require_number("epsilon", o.epsilon, 0, 1)
    return o


def epsilon_schedule(options: DQNOptions) -> Callable[[Any], Any]:
    """The chance of a random action as a function of the transitions stored."""
    epsilon = options.epsilon
    if callable(epsilon):
        return epsilon
    if isinstance(epsilon, tuple | list):
        start, end, decay_steps = epsilon
        return optax.linear_schedule(start, end, decay_steps) if decay_steps else optax.constant_schedule(end)
    return optax.constant_schedule(epsilon)


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


def _require_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
