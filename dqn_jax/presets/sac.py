"""SAC, ready made: its options, named sets of them, the pure agent and the one that a loop calls."""

import dataclasses
import functools
import math
from typing import Any, Literal

import gymnasium
import jax
import numpy as np
import optax

from dqn_jax import networks, spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.sac import Optimizers, discrete_sac
from dqn_jax.algorithms.sac import sac as sac_algorithm
from dqn_jax.curiosity.curious import curious
from dqn_jax.memory.ring import ring
from dqn_jax.online import OnlineAgent
from dqn_jax.optimizers import clipped
from dqn_jax.options import named, require_functions, require_number, require_replay, require_widths
from dqn_jax.presets.curiosity import curiosity_of, require_curiosity, require_single_steps
from dqn_jax.presets.reading import encoder_of, q_network, read_env, read_spaces, require_mask
from dqn_jax.presets.replay import replay_of
from dqn_jax.types import Agent, AgentState


@dataclasses.dataclass(frozen=True)
class SACOptions:
    """Options of ``dqn_jax.SAC`` and ``dqn_jax.sac``: numbers and names. Intervals count transitions, of all environments together."""

    gamma: float = 0.99
    """Discount factor per environment step, in [0, 1]."""
    learning_rate: float = 3e-4
    """Step size of Adam for the policy and the temperature, and for the critics unless they have their own."""
    critic_learning_rate: float | None = None
    """Step size of Adam for the critics; by default learning_rate."""
    encoder: Literal["auto", "flat", "nature", "minatar"] = "auto"
    """What the networks see first: the observation as one vector, or the convolutions of Mnih et al. (2015) or of MinAtar. "auto" takes
    convolutions for images (uint8 or bool with two or three axes) where actions are numbered; where networks are
    given, only curiosity heeds it."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers of the policy and of both critics; by default (256, 256), behind Nature's convolutions (512,), behind
    MinAtar's (128,)."""
    target_entropy: float | None = None
    """The entropy that the temperature is steered to. For actions of D numbers: in nats, over actions in [-1, 1], at most the 0.69 D of a
    uniform policy; by default -D. For numbered actions: as a share of the largest possible, in [0, 1]; by default 0.7 with up to four
    actions, else 0.89."""
    initial_temperature: float = 1.0
    """Where the temperature begins, at least 0.0001, below which it never falls."""
    max_temperature: float = 10.0
    """What the temperature never exceeds."""
    reward_scale: float = 1.0
    """Factor of the rewards, when they are learnt from."""
    tau: float = 0.005
    """How far the target critics go to the critics after each update."""
    n_steps: int = 1
    """Rows of an n-step return."""
    batch_size: int = 256
    """Transitions in a batch."""
    capacity: int = 1_000_000
    """Transitions that the replay keeps."""
    prioritized: bool = False
    """Draw transitions in proportion to their last TD error."""
    alpha: float = 0.6
    """How much priorities count: 0 is uniform, 1 in full; only beside prioritized. (The temperature is no option: it is learnt.)"""
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
    """Transitions stored before the first update; until then actions are uniform."""
    update_interval: int = 1
    """Transitions between updates; it and num_envs must divide one another."""
    updates_per_interval: int = 1
    """Updates at each interval."""
    max_grad_norm: float | None = None
    """Bound on the global norm of each gradient, or None."""


SAC_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # After SB3's zoo.
    "pendulum": {"learning_rate": 1e-3},
    "mujoco": {"replay_start_size": 10_000},
    "cartpole": {"hidden": (64, 64), "learning_rate": 1e-3, "capacity": 50_000},
}
"""Named sets of options for SAC, named after what they are for."""


def sac_options(**options: Any) -> SACOptions:
    """The options, checked one by one and against one another. Raises TypeError or ValueError that names the option."""
    o: SACOptions = named(SACOptions, "SAC", options, ("actor", "critic", "optimizers", "num_envs"))
    require_number("gamma", o.gamma, 0, 1)
    for name in ("learning_rate", "critic_learning_rate", "initial_temperature", "max_temperature", "reward_scale", "max_grad_norm"):
        if getattr(o, name) is not None or name in ("learning_rate", "initial_temperature", "max_temperature", "reward_scale"):
            require_number(name, getattr(o, name), 0, math.inf, open_low=True)
    require_number("tau", o.tau, 0, 1, open_low=True)
    require_widths(o.hidden)
    require_replay(o)
    require_curiosity(o)
    require_single_steps(o)
    if not o.prioritized and not isinstance(o.alpha, jax.core.Tracer) and o.alpha != SACOptions.alpha:
        raise ValueError(
            f"alpha={o.alpha} is how much priorities count, and prioritized is False: give prioritized=True, or for where the temperature "
            "begins initial_temperature"
        )
    return o


def sac(env_or_spaces: Any, *, actor: Any = None, critic: Any = None, optimizers: Optimizers | None = None, **options: Any) -> Agent:
    """A SAC agent as pure functions, for actions of numbers (Box) and numbered ones (Discrete).

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space). A Box must be of floats
        and bounded: its bounds are where the policy's range ends.
      actor, critic: networks as for ``algorithms.sac.sac`` or ``discrete_sac``; by default multilayer perceptrons, behind convolutions for
        images where actions are numbered.
      optimizers: ``algorithms.sac.Optimizers``, used as they are; by default Adam.
      **options: see ``SACOptions``.

    Returns:
      An ``Agent``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, or an action space that SAC cannot serve.
      NotImplementedError: on a space that is not supported.
    """
    observation_space, action_space, _ = read_spaces(env_or_spaces)
    require_actions(action_space)
    require_mask(observation_space, int(action_space.n) if isinstance(action_space, gymnasium.spaces.Discrete) else None)
    o = sac_options(**options)
    if isinstance(action_space, gymnasium.spaces.Discrete) and o.target_entropy is not None:
        require_number("target_entropy", o.target_entropy, 0, 1)  # A share, not nats.
    elif o.target_entropy is not None:
        most = math.prod(action_space.shape or ()) * math.log(2)  # A uniform policy's, over actions in [-1, 1].
        require_number("target_entropy", o.target_entropy, -math.inf, most)
    require_functions("actor", actor, ("init", "apply"))
    require_functions("critic", critic, ("init", "apply"))
    if not isinstance(optimizers, Optimizers | None):
        raise TypeError(f"optimizers must be dqn_jax.algorithms.sac.Optimizers(actor=, critic=, temperature=), got {optimizers!r}")
    for name, optimizer in zip(Optimizers._fields, optimizers or (), strict=False):
        require_functions(f"optimizers.{name}", optimizer, ("init", "update"))
    shared: dict[str, Any] = {
        "target_entropy": o.target_entropy,
        "warmup": o.replay_start_size,
        "tau": o.tau,
        "initial_temperature": o.initial_temperature,
        "max_temperature": o.max_temperature,
        "reward_scale": o.reward_scale,
        "finite_changes": optimizers is None,
    }
    optimizers = _optimizers(o) if optimizers is None else optimizers
    if isinstance(action_space, gymnasium.spaces.Discrete):
        num_actions = int(action_space.n)
        wide = functools.partial(q_network, o, observation_space, num_actions, (256, 256))
        actor, critic = (wide() if given is None else given for given in (actor, critic))
        algorithm = discrete_sac(actor, critic, optimizers, num_actions=num_actions, **shared)
    else:
        assert isinstance(action_space, gymnasium.spaces.Box)
        hidden, features = tuple(o.hidden or (256, 256)), _vectors(o, observation_space, actor is None or critic is None)
        actor = networks.QNetwork(2 * math.prod(action_space.shape), hidden, features) if actor is None else actor
        critic = networks.ActionValue(hidden, features) if critic is None else critic
        algorithm = sac_algorithm(actor, critic, optimizers, low=action_space.low, high=action_space.high, **shared)
    if o.curiosity != "off":
        algorithm = curious(algorithm, curiosity_of(o, observation_space), weight=o.intrinsic_coef)
    return assemble(
        algorithm,
        replay_of(o, ring(o.capacity, n_steps=o.n_steps)),
        discount=o.gamma,
        warmup=o.replay_start_size,
        period=o.update_interval,
        updates=o.updates_per_interval,
    )


def require_actions(action_space: gymnasium.Space) -> None:
    """Raises ValueError or NotImplementedError, with what to do, unless SAC can serve the action space."""
    if isinstance(action_space, gymnasium.spaces.Discrete):
        spaces.num_actions(action_space, "SAC")
    elif not isinstance(action_space, gymnasium.spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(
            f"SAC needs a Box of floats or a Discrete action space, got {action_space}: PPO serves MultiDiscrete; convert others with a "
            "gymnasium.ActionWrapper"
        )
    elif not (action_space.high.astype(np.float64) - action_space.low <= np.finfo(np.float32).max).all():
        raise ValueError(
            f"SAC squashes actions between bounds, and {action_space} is unbounded, or too wide for 32 bits: give it bounds with "
            "gymnasium.wrappers.TransformAction(env, lambda action: action, Box(low, high, shape)), or use PPO"
        )
    elif not (action_space.low < action_space.high).all():
        raise ValueError(f"every number of an action needs a low bound below its high bound, got {action_space}")


def _vectors(options: SACOptions, observation_space: gymnasium.Space, needed: bool) -> Any:
    if needed and encoder_of(options.encoder, observation_space)[0] != "flat":
        raise NotImplementedError(
            f"for actions of numbers SAC's own networks see vectors, and {observation_space} is an image: give encoder='flat', or an actor "
            "and a critic of your own"
        )
    return spaces.features(observation_space)


def _optimizers(options: SACOptions) -> Optimizers:
    def adam(rate: Any) -> optax.GradientTransformation:
        return clipped(optax.adam(rate), options.max_grad_norm)

    critic = options.learning_rate if options.critic_learning_rate is None else options.critic_learning_rate
    return Optimizers(adam(options.learning_rate), adam(critic), adam(options.learning_rate))


class SAC(OnlineAgent):
    """A SAC agent that a loop calls once per environment step.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space). It is only asked for
        its spaces.
      seed: of all randomness of the agent.
      num_envs: environments N; taken from a vector environment.
      state: an AgentState to begin with; see ``from_state``.
      actor, critic, optimizers: as for ``dqn_jax.sac``.
      **options: see ``SACOptions``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, an action space that SAC cannot serve, or a vector environment with the wrong auto-reset.
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
        actor: Any = None,
        critic: Any = None,
        optimizers: Optimizers | None = None,
        **options: Any,
    ):
        observation_space, action_space, num_envs = read_env(env_or_spaces, num_envs, seed)
        agent = sac((observation_space, action_space), actor=actor, critic=critic, optimizers=optimizers, **options)
        own = dataclasses.asdict(sac_options(**options))
        super().__init__(agent, observation_space, action_space, num_envs=num_envs, seed=seed, state=state, options=own)

    @classmethod
    def from_state(cls, env_or_spaces: Any, state: AgentState, *, num_envs: int | None = None, **options: Any) -> "SAC":
        """An agent that goes on from a state, for example one seed of a compiled run; arguments and errors as ``DQN.from_state``."""
        return cls(env_or_spaces, num_envs=num_envs, state=state, **options)
