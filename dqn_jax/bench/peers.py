"""Loops that need another package: PyTorch, Stable-Baselines3, PFRL, rejax. Each imports it when it is asked for."""

import random
from collections.abc import Callable
from typing import Any

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from dqn_jax.bench.compiled_loops import Outcome
from dqn_jax.bench.host_loops import HostLoop, q_loss
from dqn_jax.bench.settings import Setting, epsilon_at, require_plain_targets
from dqn_jax.networks import QNetwork
from dqn_jax.types import Env

DIFFERENCES = {
    "sb3": (
        "the loss is Huber's, its own; the gradient's norm is computed, and not clipped",
        "acts at random until warm-up ends, whatever epsilon says",
        "keeps its Monitor and DummyVecEnv",
        "Adam as it makes it, not the fused one",
        "PyTorch's initial parameters",
    ),
    "pfrl": (
        "the loss is half the squared TD error",
        "a forward pass at every step, also where the action is random",
        "batches are drawn without replacement, and only windows that are complete: the first update comes when so many are",
        "copies to the target network are called by the loop: its own must be a multiple of the update interval",
        "Adam as its examples make it, not the fused one",
        "PyTorch's initial parameters",
    ),
    "torch": ("PyTorch's initial parameters",),
    "libtorch": ("the environment is written in C++", "PyTorch's initial parameters"),
    "cleanrl-style": ("reads loss and values back every 100 steps",),
    "rejax": (
        "as many environments as transitions between updates, stepped at once: every update comes after one step of each",
        "acts at random until warm-up ends, whatever epsilon says",
        "time limits count as terminations",
        "batches are drawn without replacement",
        "the loss is half the squared TD error",
        "no record of the run is kept",
    ),
}
"""What a contender does otherwise than the setting says and cannot be made to do, or pays for alone; everything else is equal."""


def torch_eager(env: gymnasium.Env, setting: Setting, steps: int, seed: int) -> HostLoop:
    """The whole algorithm by hand in eager PyTorch on one thread: NumPy replay, targets without a graph, the fused Adam."""
    import torch
    from torch import nn as torch_nn

    torch.set_num_threads(1)
    torch.manual_seed(seed)

    def network() -> torch_nn.Sequential:
        layers: list[torch_nn.Module] = []
        width = 4
        for following in setting.hidden:
            layers += [torch_nn.Linear(width, following), torch_nn.ReLU()]
            width = following
        return torch_nn.Sequential(*layers, torch_nn.Linear(width, 2))

    online, target = network(), network()
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=setting.learning_rate, fused=True)
    replay, rng = WindowReplay(setting, seed), random.Random(seed)
    updates = 0

    @torch.inference_mode()
    def greedy(observation: np.ndarray) -> int:
        left, right = online(torch.from_numpy(observation)).tolist()
        return int(right > left)

    def update() -> None:
        observation, action, reward, discount, successor = (torch.from_numpy(column) for column in replay.sample())
        with torch.no_grad():
            values = target(successor)  # [B, A]
            best = (online(successor) if setting.double else values).argmax(1, keepdim=True)
            goal = torch.addcmul(reward, discount, values.gather(1, best).squeeze(1))  # [B]
        chosen = online(observation).gather(1, action[:, None]).squeeze(1)  # [B]
        optimizer.zero_grad()
        torch_nn.functional.mse_loss(chosen, goal).backward()
        optimizer.step()

    def run() -> None:
        nonlocal updates
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            action = rng.randrange(2) if rng.random() < epsilon_at(setting, step) else greedy(observation)
            successor, reward, terminated, truncated, _ = env.step(action)
            last = terminated or truncated
            replay.add(observation, action, float(reward), successor, terminated, last)
            observation = env.reset()[0] if last else successor
            stored = step + 1
            if stored >= setting.warmup and stored % setting.interval == 0:
                update()
                updates += 1
            if stored % setting.target_interval == 0:
                target.load_state_dict(online.state_dict())

    return HostLoop(run, greedy, lambda: updates)


class WindowReplay:
    """A ring of n-step transitions in NumPy arrays.

    Every new row is written into the windows of the rows before it that are still open, so that a batch is read off as it is: every stored
    transition can be drawn, the newest with the rewards that there are so far.

    Args:
      setting: of its capacity, its batches and its windows.
      seed: of the draws.
    """

    def __init__(self, setting: Setting, seed: int):
        self._capacity, self._batch_size = setting.capacity, setting.batch_size
        self._powers = [setting.gamma**n for n in range(setting.n_steps + 1)]
        self._observations, self._successors = np.zeros((2, setting.capacity, 4), np.float32)
        self._actions = np.zeros(setting.capacity, np.int64)
        self._returns, self._discounts = np.zeros((2, setting.capacity), np.float32)
        self._ends = np.zeros(setting.capacity, np.int64)  # The row whose successor ends the window.
        self._draws = np.random.default_rng(seed)
        self._open: list[int] = []  # Rows with open windows, the newest first.
        self._stored = 0

    def add(self, observation: np.ndarray, action: int, reward: float, successor: np.ndarray, terminated: bool, last: bool) -> None:
        """Stores one transition over the oldest; ``last`` says that the episode ended with it, for whatever reason."""
        row = self._stored % self._capacity
        self._observations[row], self._successors[row], self._actions[row] = observation, successor, action
        self._returns[row] = 0.0
        self._open.insert(0, row)
        for age, earlier in enumerate(self._open):
            self._returns[earlier] += self._powers[age] * reward
            self._discounts[earlier] = 0.0 if terminated else self._powers[age + 1]
            self._ends[earlier] = row
        if last:
            self._open.clear()
        else:
            del self._open[len(self._powers) - 2 :]
        self._stored += 1

    def sample(self) -> tuple[np.ndarray, ...]:
        """A uniform batch: observations ``[B, 4]``, actions, n-step rewards and discounts ``[B]``, successors ``[B, 4]``."""
        rows = self._draws.integers(0, min(self._stored, self._capacity), self._batch_size)
        successors = self._successors[self._ends[rows]]
        return self._observations[rows], self._actions[rows], self._returns[rows], self._discounts[rows], successors


def sb3(env: gymnasium.Env, setting: Setting, steps: int, seed: int) -> HostLoop:
    """Stable-Baselines3's DQN with its own Huber loss, on one torch thread: here it is faster on one.

    Raises:
      ValueError: on Double DQN, which it has not.
    """
    import torch
    from stable_baselines3 import DQN as SB3DQN

    if setting.double:
        raise ValueError("sb3 has no Double DQN")
    torch.set_num_threads(1)
    model = SB3DQN(
        "MlpPolicy",
        env,
        learning_rate=setting.learning_rate,
        buffer_size=setting.capacity,
        learning_starts=setting.warmup - 1,  # It learns once more than so many are stored.
        batch_size=setting.batch_size,
        gamma=setting.gamma,
        n_steps=setting.n_steps,
        train_freq=setting.interval,
        gradient_steps=1,
        target_update_interval=setting.target_interval,
        # Its schedule is a part of the run: where the run is shorter, it ends where the setting's is by then.
        exploration_fraction=min(1.0, setting.epsilon[2] / steps),
        exploration_initial_eps=setting.epsilon[0],
        exploration_final_eps=epsilon_at(setting, steps),
        max_grad_norm=float("inf"),
        policy_kwargs={"net_arch": list(setting.hidden)},
        seed=seed,
        device="cpu",
    )

    def run() -> None:
        model.learn(steps)

    return HostLoop(run, lambda observation: int(model.predict(observation, deterministic=True)[0]), lambda: model._n_updates)


def pfrl(env: gymnasium.Env, setting: Setting, steps: int, seed: int) -> HostLoop:
    """PFRL's DQN or DoubleDQN through ``act`` and ``observe``, with its own replay and n-step windows, on one torch thread."""
    import pfrl
    import torch
    from pfrl.agents import DQN as PFRLDQN
    from pfrl.agents import DoubleDQN
    from pfrl.q_functions import DiscreteActionValueHead
    from torch import nn as torch_nn

    torch.set_num_threads(1)
    pfrl.utils.set_random_seed(seed)
    env.action_space.seed(seed)
    widths = (4, *setting.hidden)
    layers = [layer for pair in zip(widths, setting.hidden, strict=False) for layer in (torch_nn.Linear(*pair), torch_nn.ReLU())]
    network = torch_nn.Sequential(*layers, torch_nn.Linear(widths[-1], 2), DiscreteActionValueHead())
    agent = (DoubleDQN if setting.double else PFRLDQN)(
        network,
        torch.optim.Adam(network.parameters(), lr=setting.learning_rate),
        pfrl.replay_buffers.ReplayBuffer(setting.capacity, num_steps=setting.n_steps),
        gamma=setting.gamma,
        explorer=pfrl.explorers.LinearDecayEpsilonGreedy(*setting.epsilon, env.action_space.sample),
        replay_start_size=setting.warmup,
        minibatch_size=setting.batch_size,
        update_interval=setting.interval,
        target_update_interval=setting.interval * (steps + 1),  # Never: see below.
        clip_delta=False,
    )

    def run() -> None:
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            following, reward, terminated, truncated, _ = env.step(int(agent.act(observation)))
            agent.observe(following, float(reward), terminated, truncated)
            observation = env.reset()[0] if terminated or truncated else following
            if (step + 1) % setting.target_interval == 0:
                agent.sync_target_network()

    def greedy(observation: np.ndarray) -> int:
        with agent.eval_mode():
            return int(agent.act(observation))

    return HostLoop(run, greedy, lambda: agent.optim_t)


class TargetTrainState(TrainState):
    """flax's TrainState with target parameters."""

    target_params: Any


def cleanrl_style(env: gymnasium.Env, setting: Setting, steps: int, seed: int) -> HostLoop:
    """After CleanRL's dqn_jax: a vector environment of one, SB3's replay buffer (CleanRL's is a copy of it), a jitted network asked when
    greedy, a TrainState; what it reads back every 100 steps for its log is read back here. It writes no TensorBoard file.

    Raises:
      ValueError: on n-step returns or Double DQN.
    """
    from stable_baselines3.common.buffers import ReplayBuffer

    require_plain_targets(setting, "cleanrl-style")
    envs = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.wrappers.RecordEpisodeStatistics(env)], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    spaces = envs.single_observation_space, envs.single_action_space
    replay = ReplayBuffer(setting.capacity, *spaces, "cpu", handle_timeout_termination=False)
    rng, network = random.Random(seed), QNetwork(2, setting.hidden)
    envs.single_action_space.seed(seed)
    np.random.seed(seed)  # The buffer draws from NumPy's global generator.
    apply: Callable[..., chex.Array] = jax.jit(network.apply)
    params = network.init(jax.random.key(seed), jnp.zeros((1, 4)))
    state = TargetTrainState.create(apply_fn=apply, params=params, target_params=params, tx=optax.adam(setting.learning_rate))
    updates = 0
    log: dict[str, Any] = {}

    @jax.jit
    def update(state: TargetTrainState, *batch: Any) -> tuple[Any, ...]:
        gradient = jax.value_and_grad(lambda params: q_loss(network, setting.gamma, params, state.target_params, batch), has_aux=True)
        (loss, q), grads = gradient(state.params)
        return loss, q, state.apply_gradients(grads=grads)

    def run() -> None:
        nonlocal state, updates
        observation: np.ndarray = envs.reset(seed=seed)[0]
        for step in range(steps):
            if rng.random() < epsilon_at(setting, step):
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
            if stored >= setting.warmup and stored % setting.interval == 0:
                drawn = replay.sample(setting.batch_size)
                columns = (drawn.observations, drawn.actions, drawn.rewards, drawn.next_observations, drawn.dones)
                seen, chosen, paid, then, ended = (column.numpy() for column in columns)
                loss, q, state = update(state, seen, chosen.ravel(), paid.ravel(), then, ended.ravel())
                updates += 1
                if stored % 100 == 0:
                    log.update(loss=jax.device_get(loss), q=jax.device_get(q).mean())
            if stored % setting.target_interval == 0:
                state = state.replace(target_params=optax.incremental_update(state.params, state.target_params, 1.0))

    return HostLoop(run, lambda observation: int(apply(state.params, observation[None])[0].argmax()), lambda: updates)


class GymnaxCartPole:
    """CartPole as rejax asks for one: gymnax's interface before 1.0.1 over an ``Env``, with the auto-reset inside of ``step``."""

    default_params = None

    def __init__(self, env: Env):
        self._env = env

    def reset(self, key: chex.PRNGKey, params: None) -> tuple[chex.Array, Any]:
        """The first observation and the state."""
        state, observation = self._env.reset(key)
        return observation, state

    def step(self, key: chex.PRNGKey, state: Any, action: chex.Array, params: None) -> tuple[Any, ...]:
        """The observation to act on next, the state, the reward, whether the episode ended, and nothing more to say."""
        state, result = self._env.step(key, state, action)
        return result.observation, state, result.reward, result.terminated | result.truncated, {}

    def observation_space(self, params: None) -> Any:
        """Four numbers."""
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, (4,), jnp.float32)

    def action_space(self, params: None) -> Any:
        """Left or right."""
        from gymnax.environments import spaces

        return spaces.Discrete(2)


def rejax(env: Env, setting: Setting, steps: int) -> Callable[[chex.PRNGKey], Outcome]:
    """rejax's DQN. It updates once per step of all its environments, so it gets as many as there are transitions between updates; updates,
    copies to the target and the capacity then equal the others'. What does not is in ``DIFFERENCES``.

    Raises:
      ValueError: on n-step returns, which it has not, on an interval that does not divide the steps, or on a warm-up shorter than it.
    """
    from rejax import get_algo
    from rejax.networks import DiscreteQNetwork, EpsilonGreedyPolicy

    if setting.n_steps != 1:
        raise ValueError(f"rejax has one-step returns only, got {setting.n_steps=}")
    if steps % setting.interval or setting.warmup <= setting.interval:
        raise ValueError(f"rejax makes {setting.interval} transitions at once, which fits neither {steps=} nor {setting.warmup=} for sure")
    algorithm = get_algo("dqn").create(
        env=GymnaxCartPole(env),
        num_envs=setting.interval,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
        learning_rate=setting.learning_rate,
        gamma=setting.gamma,
        buffer_size=setting.capacity,
        # It looks before it collects, and learns where more than so many were there.
        fill_buffer=setting.warmup - setting.interval - 1,
        batch_size=setting.batch_size,
        target_update_freq=setting.target_interval,
        polyak=0.0,
        eps_start=setting.epsilon[0],
        eps_end=setting.epsilon[1],
        exploration_fraction=(setting.epsilon[2] + 0.5) / steps,  # It rounds the product down.
        ddqn=setting.double,
    )
    network = EpsilonGreedyPolicy(DiscreteQNetwork)(hidden_layer_sizes=setting.hidden, activation=nn.relu, action_dim=2)
    algorithm = algorithm.replace(agent=network, eval_callback=lambda *_: jnp.zeros(()))

    def run(key: chex.PRNGKey) -> Outcome:
        state, history = algorithm.train(key)
        return Outcome(state.q_ts.params, state.q_ts.step, jnp.asarray(state.global_step), history)

    return run
