"""Ready-made agents: what a newcomer and the command line use. Their options are in ``options.py``."""

from typing import Any

import gymnasium
import jax
import numpy as np
import optax

from dqn_jax import networks, spaces
from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import dqn as dqn_algorithm
from dqn_jax.memory.frames import frames, require_succession
from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.ring import ring
from dqn_jax.memory.uniform import uniform
from dqn_jax.online import OnlineAgent
from dqn_jax.optimizers import join_small
from dqn_jax.options import DQNOptions, dqn_options, epsilon_schedule, require_int, schedule
from dqn_jax.types import Agent, AgentState, Env, Masked, Storage

NATURE_SIDE = 36  # Pixels: the smallest image that Nature's three convolutions leave something of.
LONGEST_STACK = 16  # Frames: a longer axis, unless the image is that small, is a side of the image.
STACK_AXIS = {"stack_first": 0, "stack_last": -1}  # Along which axis frames are stacked, by the option ``frames``.


def dqn(env_or_spaces: Any, *, network: Any = None, optimizer: optax.GradientTransformation | None = None, **options: Any) -> Agent:
    """A DQN agent as pure functions.

    Floats among the options (gamma, learning_rate, tau, alpha, a constant epsilon or beta) may be tracers: a sweep is a ``vmap`` over a
    function that builds, trains and evaluates.

    Args:
      env_or_spaces: an environment (Gymnasium, vector or ``Env``), or the pair (observation_space, action_space).
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``; by default an
        MLP, behind convolutions for images.
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
    storage = _storage(o, observation_space)
    if network is None:
        network = _network(o, observation_space, num_actions)
    if optimizer is None:
        clip = optax.identity() if o.max_grad_norm is None else optax.clip_by_global_norm(o.max_grad_norm)
        optimizer = join_small(optax.chain(clip, optax.adam(o.learning_rate)))
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
    beta = schedule(o.beta)
    memory = prioritized(storage, o.batch_size, alpha=o.alpha, beta=beta) if o.prioritized else uniform(storage, o.batch_size)
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
        require_int("num_envs", num_envs, 1)
        require_int("seed", seed, -(2**63))
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
        """As ``OnlineAgent.get_statistics``, and ``epsilon`` of the next decision."""
        statistics = super().get_statistics()
        return {**statistics, "epsilon": float(self._epsilon(statistics["t"]))}


def _network(options: DQNOptions, observation_space: gymnasium.Space, num_actions: int) -> networks.QNetwork | networks.ConvQNetwork:
    hidden = options.hidden
    if hidden is not None and not hidden:
        raise ValueError("hidden is empty: give at least one width, or a network")
    encoder, channels_first = encoder_of(options, observation_space)
    if encoder == "flat":
        return networks.QNetwork(num_actions, tuple(hidden or (64, 64)), spaces.features(observation_space))
    convolutions, default = (networks.NATURE, (512,)) if encoder == "nature" else (networks.MINATAR, (128,))
    return networks.ConvQNetwork(num_actions, convolutions, tuple(hidden or default), spaces.image(observation_space, channels_first))


def encoder_of(options: DQNOptions, observation_space: gymnasium.Space) -> tuple[str, bool]:
    """What the network sees first, "auto" resolved; and whether an image's channels, or its stacked frames, are its first axis."""
    space = observation_space
    if isinstance(space, gymnasium.spaces.Dict) and spaces.is_masked(space):
        space = space["observation"]
    shape = space.shape or ()
    # Channels are the shortest axis if they come first, unless the option says where the frames are.
    guess = len(shape) == 3 and shape[0] < min(shape[1:])
    channels_first = {"stack_first": True, "stack_last": False}.get(options.frames, guess)
    if options.encoder != "auto":
        return options.encoder, channels_first
    if not spaces.is_image(space):
        return "flat", channels_first
    side = min(shape[1:] if len(shape) == 3 and channels_first else shape[:2])
    return "nature" if side >= NATURE_SIDE else "minatar" if side >= 3 else "flat", channels_first


def _storage(options: DQNOptions, observation_space: gymnasium.Space) -> Storage:
    if options.frames == "off":
        return ring(options.capacity, n_steps=options.n_steps)
    axis = STACK_AXIS.get(options.frames)
    shape = observation_space.shape or ()
    if not shape or observation_space.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"frames={options.frames!r} stores images of uint8 or bool, the observation space is {observation_space}")
    if axis is None:
        return frames(options.capacity, n_steps=options.n_steps)
    if shape[axis] > max(LONGEST_STACK, min(shape)):
        raise ValueError(
            f"frames={options.frames!r} takes axis {axis} of {shape}, {shape[axis]} long, for a stack of frames: "
            "name the end where the stack is, or 'single' where an observation is one frame"
        )
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
