"""PPO, ready made: its options, named sets of them, the pure agent and the one that a loop calls."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dqn_jax import distributions, networks, policies, spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.ppo import ppo as ppo_algorithm
from dqn_jax.curiosity.curious import curious
from dqn_jax.distributions import Distribution
from dqn_jax.memory.rollout import rollout
from dqn_jax.online import OnlineAgent
from dqn_jax.optimizers import clipped
from dqn_jax.options import named, require_functions, require_int, require_number, require_rollout, require_widths, rollout_rate
from dqn_jax.presets.curiosity import curiosity_of, require_curiosity
from dqn_jax.presets.reading import encoder_of, read_env, read_spaces, require_mask
from dqn_jax.types import Agent, AgentState


@dataclasses.dataclass(frozen=True)
class PPOOptions:
    """Options of ``dqn_jax.PPO`` and ``dqn_jax.ppo``: numbers and names."""

    gamma: float = 0.99
    """Discount factor per environment step, in [0, 1]."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation, in [0, 1]."""
    learning_rate: tuple[float, float, int] | float = 3e-4
    """Step size of Adam: a constant; or start, end and the transitions between (linear); in Python also an optax schedule of transitions.
    Unused where an optimizer is given."""
    rollout_length: int = 512
    """Steps of each environment between two updates."""
    batch_size: int = 64
    """Transitions in a minibatch; it must divide rollout_length times num_envs."""
    epochs: int = 10
    """Times that each rollout is learnt from."""
    clip: float = 0.2
    """How far the ratio of new to old probability may leave 1 and still be rewarded for it."""
    value_clip: float | None = None
    """How far a value may leave what it was and still be rewarded for it, or None."""
    value_coef: float = 0.5
    """Weight of the value's part of the loss."""
    normalize_advantage: bool = True
    """Shift and scale the advantages of a minibatch to mean 0 and deviation 1."""
    entropy_coef: float = 0.0
    """Weight of the entropy's part of the loss."""
    curiosity: Literal["off", "rnd", "snd-v", "snd-std", "snd-vic"] = "off"
    """Whether the agent also pays itself for what is new to it, and by what: RND, or SND with one of three losses. While it is
    off, its other options are unused."""
    intrinsic_gamma: float = 0.99
    """Discount factor of that pay, which is a stream of its own and does not end with an episode."""
    intrinsic_coef: float = 1.0
    """Weight of its advantage."""
    extrinsic_coef: float = 2.0
    """Weight of the environment's advantage beside it."""
    curiosity_learning_rate: float = 1e-3
    """Step size of Adam for what knows what is new."""
    curiosity_epochs: int = 1
    """Times that it learns from each rollout, in minibatches of batch_size."""
    curiosity_channels: int | None = None
    """Last channels of an image that it sees, 1 for the newest of a stack of grey frames; None for all."""
    predictor_share: float | None = None
    """Share of each minibatch that its predictor learns from, against its learning too fast; None for all."""
    predictor_mask: Literal["rows", "features"] = "rows"
    """Of what predictor_share is a share: of the rows, or of the numbers in their features."""
    bonus_on: Literal["successor", "observation"] = "successor"
    """What a transition is paid for."""
    bonus_scale: float | None = None
    """Factor of the pay; None divides it by the running deviation of its discounted sums instead."""
    bonus_clip: float | None = None
    """The most that a transition is paid, or None."""
    target_kl: float | None = None
    """How far the policy may move, in nats, before the rest of the rollout is left alone; or None. A learning rate that falls then falls by
    the transitions learnt from."""
    normalize_observation: bool = False
    """Normalise observations of floats by their running mean and deviation."""
    scale_reward: bool = False
    """Divide rewards by the running deviation of their discounted sums."""
    encoder: Literal["auto", "flat", "nature", "minatar"] = "auto"
    """What the network sees first: the observation as one vector, or the convolutions of Mnih et al. (2015) or of MinAtar. "auto" takes
    convolutions for images (uint8 or bool with two or three axes), by their size; where a network is given, only curiosity heeds it."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers; by default (64, 64), behind Nature's convolutions (512,), behind MinAtar's (128,)."""
    activation: Literal["auto", "tanh", "relu"] = "auto"
    """Of the hidden layers: "auto" is tanh, and behind convolutions, which have a ReLU each, ReLU."""
    shared: bool | None = None
    """Whether policy and value share all layers but the last; by default those behind convolutions do."""
    max_grad_norm: float | None = 0.5
    """Bound on the gradient's global norm, or None; unused where an optimizer is given."""


# What SND's authors share between their three losses: for num_envs=128, and grey frames stacked. Unlike theirs, all networks have Nature's
# convolutions, leaky ReLU and a gain of sqrt(2), and SND-STD's predictor the mean squared error, not its sum over features.
_SND: dict[str, Any] = {
    "rollout_length": 128,
    "batch_size": 512,
    "epochs": 4,
    "learning_rate": 1e-4,
    "gamma": 0.998,
    "clip": 0.1,
    "value_coef": 1.0,
    "entropy_coef": 0.001,
    "normalize_advantage": False,
    "curiosity_learning_rate": 1e-4,
    "curiosity_channels": 1,
    "bonus_on": "observation",
    "bonus_clip": 1.0,
}
PPO_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # After CleanRL's ppo_continuous_action; the learning rate falls over a million transitions.
    "mujoco": {
        "rollout_length": 2048,
        "learning_rate": (3e-4, 0.0, 1_000_000),
        "value_clip": 0.2,
        "normalize_observation": True,
        "scale_reward": True,
    },
    # For num_envs=64, after PureJaxRL: a network of vectors, as there; the learning rate falls over ten million transitions.
    "minatar": {
        "rollout_length": 128,
        "batch_size": 1024,
        "epochs": 4,
        "learning_rate": (5e-3, 0.0, 10_000_000),
        "entropy_coef": 0.01,
        "value_clip": 0.2,
        "encoder": "flat",
        "activation": "relu",
    },
    # For num_envs=8.
    "pendulum": {"gamma": 0.95, "learning_rate": 1e-3, "rollout_length": 200, "batch_size": 200, "scale_reward": True},
    # For num_envs=16, after SB3's zoo.
    "lunarlander": {
        "rollout_length": 1024,
        "batch_size": 64,
        "epochs": 4,
        "gamma": 0.999,
        "gae_lambda": 0.98,
        "entropy_coef": 0.01,
    },
    # For num_envs=64 and curiosity; rollout_length and batch_size, 16 times as large, go with the size of the sea, here 20.
    "deepsea": {
        "rollout_length": 20,
        "batch_size": 320,
        "epochs": 4,
        "learning_rate": 1e-3,
        "gamma": 0.999,
        "clip": 0.1,
        "entropy_coef": 0.001,
        "normalize_advantage": False,
    },
    # For num_envs=32, after Burda et al. (2018), table 5; grey frames stacked.
    "rnd_paper": {
        "curiosity": "rnd",
        "rollout_length": 128,
        "batch_size": 1024,
        "epochs": 4,
        "learning_rate": 1e-4,
        "gamma": 0.999,
        "clip": 0.1,
        "value_coef": 1.0,
        "entropy_coef": 0.001,
        "normalize_advantage": False,
        "max_grad_norm": None,
        "curiosity_learning_rate": 1e-4,
        "curiosity_epochs": 4,
        "curiosity_channels": 1,
    },
    # After Pechac et al. (2023) and their code, which has a fixed factor for the bonus: those of Montezuma's Revenge.
    "snd_v": {**_SND, "curiosity": "snd-v", "bonus_scale": 0.5, "predictor_share": 0.25, "predictor_mask": "features"},
    "snd_std": {**_SND, "curiosity": "snd-std", "bonus_scale": 1.0},
    "snd_vic": {**_SND, "curiosity": "snd-vic", "bonus_scale": 0.25},
}
"""Named sets of options for PPO, named after what they are for, or after the papers that they follow; some are for several environments:
--num-envs 64 for minatar and deepsea, 8 for pendulum, 16 for lunarlander, 32 for rnd_paper, 128 for snd_v, snd_std and snd_vic."""


def ppo_options(**options: Any) -> PPOOptions:
    """The options, checked one by one. Raises TypeError or ValueError that names the option."""
    o: PPOOptions = named(PPOOptions, "PPO", options, ("network", "optimizer", "num_envs"))
    require_number("gamma", o.gamma, 0, 1)
    require_number("gae_lambda", o.gae_lambda, 0, 1)
    require_curiosity(o)
    require_number("intrinsic_gamma", o.intrinsic_gamma, 0, 1)
    require_number("extrinsic_coef", o.extrinsic_coef, 0, math.inf)
    require_int("curiosity_epochs", o.curiosity_epochs, 1)
    require_rollout(o, smallest_batch=2)  # Advantages are normalised within a minibatch.
    for name in ("value_coef", "entropy_coef"):
        require_number(name, getattr(o, name), 0, math.inf)
    for name in ("clip", "value_clip", "target_kl", "max_grad_norm", "bonus_scale", "bonus_clip"):
        if getattr(o, name) is not None:
            require_number(name, getattr(o, name), 0, math.inf, open_low=True)
    if o.predictor_share is not None:
        require_number("predictor_share", o.predictor_share, 0, 1, open_low=True)
    if o.clip is None:
        raise TypeError("clip must be a number, got None: ratios never exceed 20, so 20 clips none")
    if not isinstance(o.shared, bool | None):
        raise TypeError(f"shared must be True, False or None, got {o.shared!r}")
    require_widths(o.hidden)
    return o


def ppo(env_or_spaces: Any, *, network: Any = None, optimizer: optax.GradientTransformation | None = None, **options: Any) -> Agent:
    """A PPO agent as pure functions.

    Floats among the options may be tracers: a sweep is a ``vmap`` over a function that builds, trains and evaluates.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space). Actions may be Discrete
        (with an action mask or without), MultiDiscrete, or a Box of floats: a normal distribution then, whose draws are scaled from
        [-1, 1] to the bounds where there are any, and cut off there.
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> (outputs [B, P], value [B])``, P logits, or
        means and logarithms of standard deviations; by default ``networks.ActorCritic``.
      optimizer: an optax transformation, used as it is; by default Adam (epsilon 1e-5) behind a clip of the gradient's norm.
      **options: see ``PPOOptions``.

    Returns:
      An ``Agent``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range; when it meets N environments, if the rollout does not divide into minibatches.
      NotImplementedError: on a space that is not supported.
    """
    observation_space, action_space, _ = read_spaces(env_or_spaces)
    distribution, to_action, num_free = distribution_of(action_space)
    mask_size = int(action_space.n) if isinstance(action_space, gymnasium.spaces.Discrete) else None
    require_mask(observation_space, mask_size)
    o = ppo_options(**options)
    proper = policies.split_mask(spaces.example(observation_space, 1))[0]
    if o.normalize_observation and not any(np.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(proper)):
        raise ValueError(f"normalize_observation is for observations of floats, and {observation_space} holds none: leave it out")
    require_functions("network", network, ("init", "apply"))
    require_functions("optimizer", optimizer, ("init", "update"))
    if network is None:
        network = _network(o, observation_space, distribution.num_outputs - num_free, num_free)
    if optimizer is None:
        optimizer = clipped(optax.adam(rollout_rate(o), eps=1e-5), o.max_grad_norm)
    is_curious = o.curiosity != "off"
    algorithm = ppo_algorithm(
        network,
        distribution,
        optimizer,
        to_action=to_action,
        epochs=o.epochs,
        minibatch_size=o.batch_size,
        clip=o.clip,
        gae_lambda=o.gae_lambda,
        value_coef=o.value_coef,
        entropy_coef=o.entropy_coef,
        extrinsic_coef=o.extrinsic_coef if is_curious else 1.0,
        intrinsic_coef=o.intrinsic_coef if is_curious else None,
        value_clip=o.value_clip,
        target_kl=o.target_kl,
        normalize_advantage=o.normalize_advantage,
        normalize_observation=o.normalize_observation,
        scale_reward=o.scale_reward,
    )
    if is_curious:
        urge = curiosity_of(
            o,
            observation_space,
            discount=o.intrinsic_gamma,
            scale=o.bonus_scale,
            clip=o.bonus_clip,
            bonus_on_successor=o.bonus_on == "successor",
            share=o.predictor_share,
            mask_features=o.predictor_mask == "features",
            epochs=o.curiosity_epochs,
            minibatch_size=o.batch_size,
        )
        algorithm = curious(algorithm, urge, discount=o.intrinsic_gamma)
    return assemble(algorithm, rollout(o.rollout_length, minibatch_size=o.batch_size), discount=o.gamma)


def distribution_of(action_space: gymnasium.Space) -> tuple[Distribution, Callable[[chex.Array], chex.Array] | None, int]:
    """How PPO draws actions of this space; what makes of a draw an action, where they differ; and how many of the outputs, the last ones,
    do not depend on the observation.

    Raises:
      NotImplementedError: if the space is not supported.
    """
    if isinstance(action_space, gymnasium.spaces.Discrete):
        return distributions.categorical(spaces.num_actions(action_space, "PPO")), None, 0
    if isinstance(action_space, gymnasium.spaces.MultiDiscrete):
        if len(action_space.shape) != 1 or np.any(action_space.start):
            raise NotImplementedError(
                f"a MultiDiscrete must be one row of choices that start at 0, got {action_space}: flatten and shift them with a "
                "gymnasium.ActionWrapper"
            )
        return distributions.multi_categorical(tuple(map(int, action_space.nvec))), None, 0
    if isinstance(action_space, gymnasium.spaces.Box) and np.issubdtype(action_space.dtype, np.floating):
        size = math.prod(action_space.shape)
        return distributions.normal(size), _into(action_space), size
    raise NotImplementedError(
        f"PPO has no distribution for the action space {action_space}: it knows Discrete, MultiDiscrete and Box of floats; "
        "convert the actions with a gymnasium.ActionWrapper"
    )


def _into(box: gymnasium.spaces.Box) -> Callable[[chex.Array], chex.Array]:
    """From draws ``[D]`` to actions: [-1, 1] becomes the range of what has two bounds, and nothing leaves the bounds."""
    both = np.isfinite(box.low) & np.isfinite(box.high)
    finite_low, finite_high = (np.where(both, bound, 0.0).astype(np.float64) for bound in (box.low, box.high))
    scale = np.where(both, (finite_high - finite_low) / 2, 1.0).astype(np.float32)
    middle = ((finite_high + finite_low) / 2).astype(np.float32)
    low, high = (jnp.asarray(bound, jnp.float32) for bound in (box.low, box.high))
    return lambda drawn: jnp.clip(middle + scale * drawn.reshape(box.shape), low, high)


def _network(options: PPOOptions, observation_space: gymnasium.Space, num_outputs: int, num_free: int) -> networks.ActorCritic:
    encoder, channels_first = encoder_of(options.encoder, observation_space)
    convolutions, default, features = (), (64, 64), spaces.features(observation_space)
    if encoder != "flat":
        convolutions, default = (networks.NATURE, (512,)) if encoder == "nature" else (networks.MINATAR, (128,))  # type: ignore[assignment]
        features = spaces.image(observation_space, channels_first)
    return networks.ActorCritic(
        num_outputs,
        tuple(options.hidden or default),
        features,
        convolutions,
        shared=bool(convolutions) if options.shared is None else options.shared,
        num_free=num_free,
        num_values=1 if options.curiosity == "off" else 2,
        activation=jax.nn.relu if options.activation == "relu" or (options.activation == "auto" and convolutions) else jnp.tanh,
    )


class PPO(OnlineAgent):
    """A PPO agent that a loop calls once per environment step.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space). It is only asked for
        its spaces.
      seed: of all randomness of the agent.
      num_envs: environments N; taken from a vector environment.
      state: an AgentState to begin with; see ``from_state``.
      network, optimizer: as for ``dqn_jax.ppo``.
      **options: see ``PPOOptions``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, a rollout that does not divide into minibatches, or a vector environment with the wrong
        auto-reset.
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
        observation_space, action_space, num_envs = read_env(env_or_spaces, num_envs, seed)
        agent = ppo((observation_space, action_space), network=network, optimizer=optimizer, **options)
        own = dataclasses.asdict(ppo_options(**options))
        super().__init__(agent, observation_space, action_space, num_envs=num_envs, seed=seed, state=state, options=own)

    @classmethod
    def from_state(cls, env_or_spaces: Any, state: AgentState, *, num_envs: int | None = None, **options: Any) -> "PPO":
        """An agent that goes on from a state, for example one seed of a compiled run; arguments and errors as ``DQN.from_state``."""
        return cls(env_or_spaces, num_envs=num_envs, state=state, **options)
