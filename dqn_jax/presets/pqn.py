"""PQN, ready made: its options, named sets of them, the pure agent and the one that a loop calls."""

import dataclasses
import math
from typing import Any, Literal

import optax

from dqn_jax import spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.pqn import pqn as pqn_algorithm
from dqn_jax.memory.rollout import rollout
from dqn_jax.online import OnlineAgent
from dqn_jax.optimizers import clipped
from dqn_jax.options import (
    named,
    require_functions,
    require_number,
    require_rollout,
    require_schedule,
    require_widths,
    rollout_rate,
    schedule,
)
from dqn_jax.presets.reading import q_network, read_env, read_spaces, require_mask
from dqn_jax.types import Agent, AgentState


@dataclasses.dataclass(frozen=True)
class PQNOptions:
    """Options of ``dqn_jax.PQN`` and ``dqn_jax.pqn``: numbers and names."""

    gamma: float = 0.99
    """Discount factor per environment step, in [0, 1]."""
    q_lambda: float = 0.95
    """Lambda of the targets, in [0, 1]: 0 bootstraps after one step, 1 at the ends of episodes and of the rollout only."""
    learning_rate: tuple[float, float, int] | float = (1e-3, 1e-4, 100_000)
    """Step size of RAdam: a constant; or start, end and the transitions between (linear); in Python also an optax schedule of transitions.
    Unused where an optimizer is given."""
    rollout_length: int = 256
    """Steps of each environment between two updates."""
    batch_size: int = 64
    """Transitions in a minibatch; it must divide rollout_length times num_envs."""
    epochs: int = 8
    """Times that each rollout is learnt from."""
    encoder: Literal["auto", "flat", "nature", "minatar"] = "auto"
    """What the network sees first: the observation as one vector, or the convolutions of Mnih et al. (2015) or of MinAtar. "auto" takes
    convolutions for images (uint8 or bool with two or three axes), by their size. Unused where a network is given."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers; by default (64, 64), behind Nature's convolutions (512,), behind MinAtar's (128,)."""
    layer_norm: bool = True
    """Normalise every layer but the last before its ReLU, which is what keeps PQN stable; unused where a network is given."""
    epsilon: tuple[float, float, int] | float = (1.0, 0.05, 20_000)
    """Chance of a random action: start, end and the transitions between (linear); or a constant; in Python also an optax schedule."""
    max_grad_norm: float | None = 10.0
    """Bound on the gradient's global norm, or None; unused where an optimizer is given."""


PQN_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # For num_envs=128: the numbers of the paper's authors for 10 million transitions, over which the learning rate falls. Their layers
    # begin as He et al. have it, ours as flax does.
    "minatar": {
        "gamma": 0.99,
        "q_lambda": 0.65,
        "learning_rate": (5e-4, 0.0, 10_000_000),
        "rollout_length": 32,
        "batch_size": 128,
        "epochs": 2,
        "epsilon": (1.0, 0.05, 1_000_000),
        "max_grad_norm": 10.0,
    },
}
"""Named sets of options for PQN; "minatar" is for several environments: --num-envs 128."""


def pqn_options(**options: Any) -> PQNOptions:
    """The options, checked one by one. Raises TypeError or ValueError that names the option."""
    o: PQNOptions = named(PQNOptions, "PQN", options, ("network", "optimizer", "num_envs"))
    require_number("gamma", o.gamma, 0, 1)
    require_number("q_lambda", o.q_lambda, 0, 1)
    require_rollout(o)
    require_schedule("epsilon", o.epsilon)
    if o.max_grad_norm is not None:
        require_number("max_grad_norm", o.max_grad_norm, 0, math.inf, open_low=True)
    require_widths(o.hidden)
    return o


def pqn(env_or_spaces: Any, *, network: Any = None, optimizer: optax.GradientTransformation | None = None, **options: Any) -> Agent:
    """A PQN agent as pure functions.

    Floats among the options (gamma, q_lambda, a constant learning_rate or epsilon) may be tracers: a sweep is a ``vmap`` over a function
    that builds, trains and evaluates.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space).
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``; by default an
        MLP of normalised layers, behind convolutions for images.
      optimizer: an optax transformation, used as it is; by default RAdam behind a clip of the gradient's norm.
      **options: see ``PQNOptions``.

    Returns:
      An ``Agent``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, or a space that PQN cannot serve; when it meets N environments, if the rollout does not divide
        into minibatches.
      NotImplementedError: on a space that is not supported.
    """
    observation_space, action_space, _ = read_spaces(env_or_spaces)
    num_actions = spaces.num_actions(action_space, "PQN")
    require_mask(observation_space, num_actions)
    o = pqn_options(**options)
    require_functions("network", network, ("init", "apply"))
    require_functions("optimizer", optimizer, ("init", "update"))
    if network is None:
        network = q_network(o, observation_space, num_actions, layer_norm=o.layer_norm)
    if optimizer is None:
        optimizer = clipped(optax.radam(rollout_rate(o)), o.max_grad_norm)
    algorithm = pqn_algorithm(
        network,
        optimizer,
        epsilon=schedule(o.epsilon),
        lambda_=o.q_lambda,
        epochs=o.epochs,
        minibatch_size=o.batch_size,
    )
    return assemble(algorithm, rollout(o.rollout_length, minibatch_size=o.batch_size), discount=o.gamma)


class PQN(OnlineAgent):
    """A PQN agent that a loop calls once per environment step.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space). It is only asked for
        its spaces.
      seed: of all randomness of the agent.
      num_envs: environments N; taken from a vector environment.
      state: an AgentState to begin with; see ``from_state``.
      network, optimizer: as for ``dqn_jax.pqn``.
      **options: see ``PQNOptions``.

    Raises:
      TypeError: on an unknown option (the nearest known one is named) or one of a wrong type.
      ValueError: on an option out of range, a space that PQN cannot serve, a rollout that does not divide into minibatches, or a vector
        environment with the wrong auto-reset.
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
        agent = pqn((observation_space, action_space), network=network, optimizer=optimizer, **options)
        self._epsilon = schedule(pqn_options(**options).epsilon)
        own = dataclasses.asdict(pqn_options(**options))
        super().__init__(agent, observation_space, action_space, num_envs=num_envs, seed=seed, state=state, options=own)

    @classmethod
    def from_state(cls, env_or_spaces: Any, state: AgentState, *, num_envs: int | None = None, **options: Any) -> "PQN":
        """An agent that goes on from a state, for example one seed of a compiled run; arguments and errors as ``DQN.from_state``."""
        return cls(env_or_spaces, num_envs=num_envs, state=state, **options)

    def get_statistics(self) -> dict[str, float]:
        """As ``OnlineAgent.get_statistics``, and ``epsilon`` of the next decision."""
        statistics = super().get_statistics()
        return {**statistics, "epsilon": float(self._epsilon(statistics["t"]))}
