"""The loops that are compared, all on one piece of work: DQN on CartPole-v1 with the settings below.

Those named for a project are written from scratch after its structure, and as fast as that structure allows: to beat a slow imitation
says nothing. Transitions are counted alike by all, so that all make the same number of updates between the same two steps.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from dqn_jax.algorithms.dqn import DQNState
from dqn_jax.networks import QNetwork
from dqn_jax.presets import DQN, dqn
from dqn_jax.training import evaluate, train
from dqn_jax.types import AgentState, Env

HIDDEN = (64, 64)
BATCH = 64
CAPACITY = 50_000
WARMUP = 1_000
GAMMA = 0.99
EPSILON = (1.0, 0.05, 10_000)
LEARNING_RATE = 2.5e-4
TARGET_INTERVAL = 500
EVALUATION_EPISODES = 20

OURS: dict[str, Any] = {
    "hidden": HIDDEN,
    "capacity": CAPACITY,
    "replay_start_size": WARMUP,
    "gamma": GAMMA,
    "epsilon": EPSILON,
    "learning_rate": LEARNING_RATE,
    "target_update_interval": TARGET_INTERVAL,
    "loss": "mse",
    "batch_size": BATCH,
    "n_steps": 1,
    "tau": 1.0,
    "double": False,
    "max_grad_norm": None,
}


def epsilon_at(step: Any) -> Any:
    """The chance of a random action after ``step`` transitions, an int or an array."""
    start, end, decay_steps = EPSILON
    lowest = min if isinstance(step, int) else jnp.minimum
    return start + (end - start) * lowest(step / decay_steps, 1.0)


class HostLoop(NamedTuple):
    """A loop over a Gymnasium environment, ready to go.

    Attributes:
      run: makes all the steps.
      greedy: from an observation to the greedy action.
      updates: the number of updates made so far.
    """

    run: Callable[[], None]
    greedy: Callable[[np.ndarray], int]
    updates: Callable[[], int]


def host_ours(env: gymnasium.Env, interval: int, steps: int, seed: int) -> HostLoop:
    """This package's step-by-step agent."""
    agent = DQN(env, seed=seed, update_interval=interval, **OURS)

    def run() -> None:
        observation, _ = env.reset(seed=seed)
        reward: Any = 0.0
        for _ in range(steps):
            action = agent.act_and_train(observation, reward)
            observation, reward, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                agent.stop_episode_and_train(observation, reward, terminated)
                observation, _ = env.reset()

    return HostLoop(run, agent.act, lambda: int(agent.get_statistics()["n_updates"]))


class Replay:
    """A ring of transitions in NumPy arrays."""

    def __init__(self, seed: int):
        self._observations, self._successors = np.zeros((2, CAPACITY, 4), np.float32)
        self._actions = np.zeros(CAPACITY, np.int32)
        self._rewards, self._terminations = np.zeros((2, CAPACITY), np.float32)
        self._draws = np.random.default_rng(seed)
        self.stored = 0

    def add(self, observation: np.ndarray, action: int, reward: float, successor: np.ndarray, terminated: bool) -> None:
        """Stores one transition over the oldest."""
        row = self.stored % CAPACITY
        self._observations[row], self._successors[row] = observation, successor
        self._actions[row], self._rewards[row], self._terminations[row] = action, reward, terminated
        self.stored += 1

    def sample(self) -> tuple[np.ndarray, ...]:
        """A uniform batch."""
        rows = self._draws.integers(0, min(self.stored, CAPACITY), BATCH)
        return self._observations[rows], self._actions[rows], self._rewards[rows], self._successors[rows], self._terminations[rows]


def q_loss(network: Any, params: Any, target_params: Any, batch: tuple[Any, ...]) -> tuple[chex.Array, chex.Array]:
    """The mean squared TD error of a batch ``(observation, action, reward, successor, terminated)``, and the values."""
    observation, action, reward, successor, terminated = batch
    target = reward + GAMMA * (1.0 - terminated) * jnp.max(network.apply(target_params, successor), axis=-1)  # [B]
    q = network.apply(params, observation)[jnp.arange(BATCH), action]  # [B]
    return jnp.mean(jnp.square(q - target)), q


class TargetTrainState(TrainState):
    """flax's TrainState with target parameters."""

    target_params: Any


def host_cleanrl_style(env: gymnasium.Env, interval: int, steps: int, seed: int) -> HostLoop:
    """After CleanRL's dqn_jax: a vector environment of one, SB3's replay buffer (CleanRL's is a copy of it), a jitted network asked when
    greedy, a TrainState; what it reads back every 100 steps for its log is read back here. It writes no TensorBoard file.
    """
    from stable_baselines3.common.buffers import ReplayBuffer

    envs = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.wrappers.RecordEpisodeStatistics(env)], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    replay = ReplayBuffer(CAPACITY, envs.single_observation_space, envs.single_action_space, "cpu", handle_timeout_termination=False)
    rng, network = random.Random(seed), QNetwork(2, HIDDEN)
    envs.single_action_space.seed(seed)
    np.random.seed(seed)  # The buffer draws from NumPy's global generator.
    apply: Callable[..., chex.Array] = jax.jit(network.apply)
    params = network.init(jax.random.key(seed), jnp.zeros((1, 4)))
    state = TargetTrainState.create(apply_fn=apply, params=params, target_params=params, tx=optax.adam(LEARNING_RATE))
    updates = 0
    log: dict[str, Any] = {}

    @jax.jit
    def update(state: TargetTrainState, *batch: Any) -> tuple[Any, ...]:
        gradient = jax.value_and_grad(lambda params: q_loss(network, params, state.target_params, batch), has_aux=True)
        (loss, q), grads = gradient(state.params)
        return loss, q, state.apply_gradients(grads=grads)

    def run() -> None:
        nonlocal state, updates
        observation: np.ndarray = envs.reset(seed=seed)[0]
        for step in range(steps):
            if rng.random() < epsilon_at(step):
                action = np.array([envs.single_action_space.sample()])
            else:
                action = jax.device_get(apply(state.params, observation).argmax(axis=-1))
            results: tuple[Any, ...] = envs.step(action)
            following, reward, terminated, truncated, infos = results
            successor = following.copy()
            if terminated[0] or truncated[0]:
                successor[0] = infos["final_obs"][0]
            replay.add(observation, successor, action, reward, terminated, infos)
            observation = following
            stored = step + 1
            if stored >= WARMUP and stored % interval == 0:
                drawn = replay.sample(BATCH)
                columns = (drawn.observations, drawn.actions, drawn.rewards, drawn.next_observations, drawn.dones)
                seen, chosen, paid, then, ended = (column.numpy() for column in columns)
                loss, q, state = update(state, seen, chosen.ravel(), paid.ravel(), then, ended.ravel())
                updates += 1
                if stored % 100 == 0:
                    log.update(loss=jax.device_get(loss), q=jax.device_get(q).mean())
            if stored % TARGET_INTERVAL == 0:
                state = state.replace(target_params=optax.incremental_update(state.params, state.target_params, 1.0))

    return HostLoop(run, lambda observation: int(apply(state.params, observation[None])[0].argmax()), lambda: updates)


def host_numpy_replay(env: gymnasium.Env, interval: int, steps: int, seed: int) -> HostLoop:
    """What one would write by hand for this one task: the same with nothing around it, and the whole choice in one jitted call."""
    replay, rng, network = Replay(seed), random.Random(seed), QNetwork(2, HIDDEN)
    optimizer = optax.adam(LEARNING_RATE)
    params = target_params = network.init(jax.random.key(seed), jnp.zeros((1, 4)))
    opt_state = optimizer.init(params)
    act = jax.jit(lambda params, observation: jnp.argmax(network.apply(params, observation[None])[0]))
    updates = 0

    @jax.jit
    def update(params: Any, target_params: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda params: q_loss(network, params, target_params, batch)[0])(params)
        changes, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, changes), opt_state

    def run() -> None:
        nonlocal params, target_params, opt_state, updates
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            action = rng.randrange(2) if rng.random() < epsilon_at(step) else int(act(params, observation))
            successor, reward, terminated, truncated, _ = env.step(action)
            replay.add(observation, action, float(reward), successor, terminated)
            observation = env.reset()[0] if terminated or truncated else successor
            if replay.stored >= WARMUP and replay.stored % interval == 0:
                params, opt_state = update(params, target_params, opt_state, *replay.sample())
                updates += 1
            if replay.stored % TARGET_INTERVAL == 0:
                target_params = params

    return HostLoop(run, lambda observation: int(act(params, observation)), lambda: updates)


def host_sb3(env: gymnasium.Env, interval: int, steps: int, seed: int) -> HostLoop:
    """Stable-Baselines3's DQN, its own Huber loss and clip of the gradient kept, on one torch thread: here it is faster on one."""
    import torch
    from stable_baselines3 import DQN as SB3DQN

    torch.set_num_threads(1)
    start, end, decay_steps = EPSILON
    model = SB3DQN(
        "MlpPolicy",
        env,
        learning_rate=LEARNING_RATE,
        buffer_size=CAPACITY,
        learning_starts=WARMUP - 1,  # It learns once more than so many are stored.
        batch_size=BATCH,
        gamma=GAMMA,
        train_freq=interval,
        gradient_steps=1,
        target_update_interval=TARGET_INTERVAL,
        exploration_fraction=min(1.0, decay_steps / steps),
        exploration_initial_eps=start,
        exploration_final_eps=end,
        policy_kwargs={"net_arch": list(HIDDEN)},
        seed=seed,
        device="cpu",
    )

    def run() -> None:
        model.learn(steps)

    return HostLoop(run, lambda observation: int(model.predict(observation, deterministic=True)[0]), lambda: model._n_updates)


class Outcome(NamedTuple):
    """What a compiled run gives back: the greedy policy's parameters, how many updates and transitions made it, and a record of the run.

    What a program does not return, the compiler does not compute: the record is here so that it is paid for.
    """

    params: Any
    updates: chex.Array
    steps: chex.Array
    history: Any


def compiled_steps(env: Env, interval: int, steps: int) -> int:
    """The steps of a compiled run: what is asked for, rounded up as this package rounds it."""
    return train(dqn(env, update_interval=interval, **OURS), env, num_steps=steps).num_steps


def compiled_ours(env: Env, interval: int, steps: int) -> Callable[[chex.PRNGKey], Outcome]:
    """This package's compiled loop."""
    training = train(dqn(env, update_interval=interval, **OURS), env, num_steps=steps)

    def run(key: chex.PRNGKey) -> Outcome:
        result = training.run(key)
        return Outcome(result.state.learner.params, result.state.updates, result.state.step, result.history)

    return run


class Carry(NamedTuple):
    """What the scan of ``compiled_purejaxrl_style`` carries."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: tuple[Any, ...]
    env_state: Any
    observation: chex.Array
    key: chex.PRNGKey
    steps: chex.Array
    updates: chex.Array


def compiled_purejaxrl_style(env: Env, interval: int, steps: int) -> Callable[[chex.PRNGKey], Outcome]:
    """After PureJaxRL's dqn: one scan over environment steps, keys split in the carry, counters that decide by ``cond`` when to learn."""
    network, optimizer = QNetwork(2, HIDDEN), optax.adam(LEARNING_RATE)

    def step(carry: Carry, _: None) -> tuple[Carry, tuple[Any, ...]]:
        key, key_coin, key_action, key_step, key_batch = jax.random.split(carry.key, 5)
        greedy = jnp.argmax(network.apply(carry.params, carry.observation[None])[0])
        anything = jax.random.randint(key_action, (), 0, 2)
        action = jnp.where(jax.random.uniform(key_coin) < epsilon_at(carry.steps), anything, greedy).astype(jnp.int32)
        env_state, result = env.step(key_step, carry.env_state, action)
        row = (carry.observation, action, result.reward, result.next_observation, result.terminated.astype(jnp.float32))
        replay = jax.tree.map(lambda stored, new: stored.at[carry.steps % CAPACITY].set(new), carry.replay, row)
        stored = carry.steps + 1

        def learn() -> tuple[Any, ...]:
            rows = jax.random.randint(key_batch, (BATCH,), 0, jnp.minimum(stored, CAPACITY))
            batch = jax.tree.map(lambda leaf: leaf[rows], replay)
            gradient = jax.value_and_grad(lambda params: q_loss(network, params, carry.target_params, batch)[0])
            loss, grads = gradient(carry.params)
            changes, opt_state = optimizer.update(grads, carry.opt_state)
            return optax.apply_updates(carry.params, changes), opt_state, carry.updates + 1, loss

        is_due = (stored >= WARMUP) & (stored % interval == 0)
        params, opt_state, updates, loss = jax.lax.cond(
            is_due, learn, lambda: (carry.params, carry.opt_state, carry.updates, jnp.zeros(()))
        )
        target_params = jax.lax.cond(stored % TARGET_INTERVAL == 0, lambda: params, lambda: carry.target_params)
        following = Carry(params, target_params, opt_state, replay, env_state, result.observation, key, stored, updates)
        return following, (loss, result.reward, result.terminated | result.truncated)

    def run(key: chex.PRNGKey) -> Outcome:
        key, key_params, key_reset = jax.random.split(key, 3)
        env_state, observation = env.reset(key_reset)
        params = network.init(key_params, observation[None])
        row = (observation, jnp.zeros((), jnp.int32), jnp.zeros(()), observation, jnp.zeros(()))
        replay = jax.tree.map(lambda leaf: jnp.zeros((CAPACITY, *leaf.shape), leaf.dtype), row)
        # Counters that begin as constants stay the same for all seeds, so that vmap leaves each cond a cond.
        zero = jnp.zeros((), jnp.int32)
        carry = Carry(params, params, optimizer.init(params), replay, env_state, observation, key, zero, zero)
        carry, history = jax.lax.scan(step, carry, None, length=steps)
        return Outcome(carry.params, carry.updates, carry.steps, history)

    return run


def greedy_returns(env: Env, params: Any, key: chex.PRNGKey) -> chex.Array:
    """Returns of greedy episodes ``[episodes]`` with the network that all compiled contenders share."""
    nothing: Any = ()
    state = AgentState(DQNState(params, *[nothing] * 3), *[nothing] * 5)
    return evaluate(dqn(env, **OURS), env, num_episodes=EVALUATION_EPISODES)(state, key)


HOST: dict[str, Callable[..., HostLoop]] = {
    "ours": host_ours,
    "cleanrl-style": host_cleanrl_style,
    "numpy-replay": host_numpy_replay,
    "sb3": host_sb3,
}
COMPILED: dict[str, Callable[..., Callable[[chex.PRNGKey], Outcome]]] = {"ours": compiled_ours, "purejaxrl-style": compiled_purejaxrl_style}
