"""DQN, ready made: its options, named sets of them, the pure agent and the one that a loop calls."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import jax
import jax.numpy as jnp
import optax

from dqn_jax import heads, spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import Munchausen
from dqn_jax.algorithms.dqn import dqn as dqn_algorithm
from dqn_jax.curiosity.curious import curious
from dqn_jax.heads import Head
from dqn_jax.memory.frames import require_succession
from dqn_jax.online import OnlineAgent
from dqn_jax.optimizers import clipped
from dqn_jax.options import (
    named,
    require_functions,
    require_int,
    require_number,
    require_replay,
    require_schedule,
    require_widths,
    schedule,
)
from dqn_jax.presets.curiosity import curiosity_of, require_curiosity, require_single_steps
from dqn_jax.presets.reading import layers_of, q_network, read_env, read_spaces, require_mask
from dqn_jax.presets.replay import STACK_AXIS, replay_of, storage_of
from dqn_jax.types import Agent, AgentState
from dqn_jax.value_networks import ValueNetwork

DEFAULT_EPSILON = (1.0, 0.05, 10_000)
MOST_CLIPPED = 0.25  # A support just wide enough clips a few hundredths at first, one too narrow nearly everything.


@dataclasses.dataclass(frozen=True)
class DQNOptions:
    """Options of ``dqn_jax.DQN`` and ``dqn_jax.dqn``: numbers and names. Intervals count transitions, of all environments together."""

    gamma: float = 0.999
    """Discount factor per environment step, in [0, 1]."""
    learning_rate: float = 7e-4
    """Step size of Adam; unused where an optimizer is given."""
    encoder: Literal["auto", "flat", "nature", "minatar"] = "auto"
    """What the network sees first: the observation as one vector, or the convolutions of Mnih et al. (2015) or of MinAtar. "auto" takes
    convolutions for images (uint8 or bool with two or three axes), by their size; where a network is given, only curiosity heeds it."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers; by default (64, 64), behind Nature's convolutions (512,), behind MinAtar's (128,)."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon; unused where an optimizer is given."""
    loss: Literal["huber", "mse"] = "mse"
    """Loss of the TD error; unused where a distribution is learnt, which has its own."""
    double: bool = True
    """Double DQN: the online network chooses the bootstrap action, the target network values it. Unused with munchausen, whose policy is
    the target network's."""
    distribution: Literal["off", "c51", "qrdqn", "iqn"] = "off"
    """What is learnt of returns: their mean, or their distribution, as masses of fixed atoms (C51), as quantiles (QR-DQN), or as quantiles
    at fractions drawn anew (IQN)."""
    num_atoms: int = 51
    """Atoms of C51; unused with others, as are v_min and v_max."""
    v_min: float = -100.0
    """The lowest return that C51 can hold."""
    v_max: float = 100.0
    """The highest return that C51 can hold: choose it from the scale of discounted returns."""
    num_quantiles: int | None = None
    """Quantiles of QR-DQN, by default 16; or fractions that IQN draws for a transition, by default 8. Unused with others."""
    dueling: bool = False
    """Two streams, one for the value of a state and one for the advantages of its actions."""
    noisy: float | None = None
    """Noise of the last two layers at first (0.5 in the literature), which explores in the place of epsilon; None for plain layers."""
    munchausen: float | None = None
    """Weight of the bonus for actions that a soft policy thinks likely (0.9 in the literature), or None. It needs n_steps=1."""
    munchausen_temperature: float = 0.03
    """Temperature of that policy, in units of reward; unused without it."""
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
    """Draw transitions the more often, the more there was to learn from them last time: by the TD error, or the loss of a distribution."""
    alpha: float = 0.6
    """How much priorities count: 0 is uniform, 1 in full; unused unless prioritized."""
    beta: tuple[float, float, int] | float = (0.4, 1.0, 100_000)
    """How far importance weights make up for prioritization: start, end and the transitions between (linear); or a constant; in Python
    also an optax schedule. Unused unless prioritized."""
    curiosity: Literal["off", "rnd", "snd-v", "snd-std", "snd-vic"] = "off"
    """Whether the agent also pays itself for what is new to it, and by what: RND, or SND with one of three losses. It needs n_steps=1.
    While it is off, its other options are unused."""
    intrinsic_coef: float = 1.0
    """Factor of that pay, whose root mean square is 1 at first."""
    curiosity_learning_rate: float = 1e-3
    """Step size of Adam for what knows what is new."""
    curiosity_channels: int | None = None
    """Last channels of an image that it sees, 1 for the newest of a stack of grey frames; None for all."""
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
    epsilon: tuple[float, float, int] | float | None = None
    """Chance of a random action: start, end and the transitions between (linear); or a constant; in Python also an optax schedule. By
    default (1.0, 0.05, 10_000), and 0 with ``noisy``, which explores by itself (with a noisy network of your own, give 0)."""
    max_grad_norm: float | None = 10.0
    """Bound on the gradient's global norm, or None; unused where an optimizer is given."""


def dqn_options(**options: Any) -> DQNOptions:
    """The options, checked one by one and against one another. Raises TypeError or ValueError that names the option."""
    o: DQNOptions = named(DQNOptions, "DQN", options, ("network", "optimizer", "num_envs"))
    require_number("gamma", o.gamma, 0, 1)
    require_number("learning_rate", o.learning_rate, 0, math.inf, open_low=True)
    if o.tau is not None:
        require_number("tau", o.tau, 0, 1, open_low=True)
    if o.max_grad_norm is not None:
        require_number("max_grad_norm", o.max_grad_norm, 0, math.inf, open_low=True)
    if o.target_update_interval is not None:
        require_int("target_update_interval", o.target_update_interval, 1)
    require_widths(o.hidden)
    require_replay(o)
    require_curiosity(o)
    require_single_steps(o)
    _require_family(o)
    return o


def _require_family(o: DQNOptions) -> None:
    require_number("adam_epsilon", o.adam_epsilon, 0, math.inf, open_low=True)
    require_int("num_atoms", o.num_atoms, 2)
    require_number("v_min", o.v_min, -math.inf, math.inf)
    require_number("v_max", o.v_max, -math.inf, math.inf)
    if not any(isinstance(bound, jax.core.Tracer) for bound in (o.v_min, o.v_max)) and o.v_min >= o.v_max:
        raise ValueError(f"v_min must be below v_max, got {o.v_min} and {o.v_max}")
    if o.num_quantiles is not None:
        require_int("num_quantiles", o.num_quantiles, 1)
    if o.noisy is not None:
        require_number("noisy", o.noisy, 0, math.inf, open_low=True)
    if o.epsilon is not None:
        require_schedule("epsilon", o.epsilon)
    if o.noisy is not None and not (o.epsilon is None or (isinstance(o.epsilon, int | float) and o.epsilon == 0)):
        raise ValueError(f"noisy layers explore by themselves: leave epsilon out, or give 0, got epsilon={o.epsilon!r}")
    if o.munchausen is None:
        return
    require_number("munchausen", o.munchausen, 0, 1)
    require_number("munchausen_temperature", o.munchausen_temperature, 0, math.inf, open_low=True)
    if o.n_steps > 1:
        raise ValueError(
            f"munchausen pays for every step, and with n_steps={o.n_steps} the replay gives only the first observation of a window and "
            "what followed it: give n_steps=1"
        )


def epsilon_schedule(options: DQNOptions) -> Callable[[Any], Any]:
    """The chance of a random action as a function of the transitions stored."""
    if options.epsilon is None:
        return schedule(DEFAULT_EPSILON if options.noisy is None else 0.0)
    return schedule(options.epsilon)


def dqn(env_or_spaces: Any, *, network: Any = None, optimizer: optax.GradientTransformation | None = None, **options: Any) -> Agent:
    """A DQN agent as pure functions.

    Floats among the options (gamma, learning_rate, tau, alpha, a constant epsilon or beta) may be tracers: a sweep is a ``vmap`` over a
    function that builds, trains and evaluates.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space).
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``, or ``[B, A, K]`` where a
        distribution is learnt (``algorithms.dqn`` says it in full); by default an MLP, behind convolutions for images.
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
    require_mask(observation_space, num_actions)
    o = dqn_options(**options)
    require_functions("network", network, ("init", "apply"))
    require_functions("optimizer", optimizer, ("init", "update"))
    storage = storage_of(o, observation_space)
    if network is None:
        network = _network(o, observation_space, num_actions)
    elif o.dueling or o.noisy is not None:
        raise ValueError("dueling and noisy are of the default network: leave them out, or the network")
    own = optimizer is None
    if optimizer is None:
        optimizer = clipped(optax.adam(o.learning_rate, eps=o.adam_epsilon), o.max_grad_norm)
    tau, target_update_interval = o.tau, o.target_update_interval
    if tau is None:
        tau = 0.005 if target_update_interval is None else 1.0
    if target_update_interval is None:
        target_update_interval = 500 if not isinstance(tau, jax.core.Tracer) and float(tau) == 1 else 1
    algorithm = dqn_algorithm(
        network,
        optimizer,
        epsilon=epsilon_schedule(o),
        head=_head(o),
        double=o.double,
        munchausen=None if o.munchausen is None else Munchausen(o.munchausen, o.munchausen_temperature),
        target_update_interval=target_update_interval,
        tau=tau,
        finite_changes=own,
    )
    if o.curiosity != "off":
        algorithm = curious(algorithm, curiosity_of(o, observation_space), weight=o.intrinsic_coef)
    return assemble(
        algorithm,
        replay_of(o, storage),
        discount=o.gamma,
        warmup=o.replay_start_size,
        period=o.update_interval,
        updates=o.updates_per_interval,
    )


def complaint(metrics: dict[str, float]) -> str | None:
    """What the metrics of learning say against the options: that C51's support cannot hold the returns; or None."""
    if not metrics.get("clipped_mass", 0.0) > MOST_CLIPPED:
        return None
    return (
        "much of what C51 learns from lies beyond its support (the metric clipped_mass says how much), so values stop at its ends: lower "
        "v_min or raise v_max until discounted returns fit"
    )


def _network(o: DQNOptions, observation_space: gymnasium.Space, num_actions: int) -> Any:
    if o.distribution == "off" and not o.dueling and o.noisy is None:
        return q_network(o, observation_space, num_actions)
    convolutions, hidden, read = layers_of(o, observation_space)
    return ValueNetwork(
        num_actions,
        {"c51": o.num_atoms, "qrdqn": _num_quantiles(o)}.get(o.distribution, 0),
        hidden,
        read,
        convolutions,
        dueling=o.dueling,
        noisy=o.noisy,
        cosines=0 if o.distribution != "iqn" else 64 if convolutions else 16,  # 64 in the paper; small networks feel their price.
    )


def _head(o: DQNOptions) -> Head:
    if o.distribution == "c51":
        return heads.categorical(jnp.linspace(o.v_min, o.v_max, o.num_atoms))
    if o.distribution == "qrdqn":
        return heads.quantiles(_num_quantiles(o))
    return heads.implicit_quantiles(_num_quantiles(o)) if o.distribution == "iqn" else heads.expected(o.loss)


def _num_quantiles(o: DQNOptions) -> int:
    return {"iqn": 8}.get(o.distribution, 16) if o.num_quantiles is None else o.num_quantiles


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
        observation_space, action_space, num_envs = read_env(env_or_spaces, num_envs, seed)
        agent = dqn((observation_space, action_space), network=network, optimizer=optimizer, **options)
        checked = dqn_options(**options)
        self._epsilon = epsilon_schedule(checked)
        whole = checked.frames == "off"
        super().__init__(
            agent,
            observation_space,
            action_space,
            num_envs=num_envs,
            seed=seed,
            state=state,
            require_succession=None if whole else require_succession(STACK_AXIS.get(checked.frames)),
            options=dataclasses.asdict(checked),
        )

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
        """As ``OnlineAgent.get_statistics``, and ``epsilon`` of the next decision. Warns where C51's support is too narrow."""
        statistics = super().get_statistics()
        if said := complaint({name.removeprefix("average_"): value for name, value in statistics.items()}):
            warnings.warn(said, stacklevel=2)
        return {**statistics, "epsilon": float(self._epsilon(statistics["t"]))}
