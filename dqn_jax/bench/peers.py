"""Loops on JAX that need another package: CleanRL's and rejax. Each imports it when it is asked for; ``torch_loops.py`` has PyTorch's."""

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

from dqn_jax.bench import policy_loops
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
    "PureJaxRL style": (
        "every episode's end counts as a termination",
        "shuffles by jax.random.permutation, which sorts twice",
        "of the run it keeps the mean loss; ours returns, lengths and all metrics",
    ),
    "SB3's SAC": ("logs means of its losses once a call", "PyTorch's initial parameters"),
    "SBX's SAC": ("draws the batches of a call at once, in NumPy", "logs the last losses of a call"),
    "rejax's ppo": (
        "every episode's end counts as a termination",
        "two optimizers, for policy and value; gradients are clipped number by number",
        "flax's initial parameters; Adam's usual epsilon",
        "no record of the run is kept",
    ),
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
    spaces: tuple[Any, Any] = envs.single_observation_space, envs.single_action_space
    replay = ReplayBuffer(setting.capacity, *spaces, "cpu", handle_timeout_termination=False)
    rng, network = random.Random(seed), QNetwork(int(spaces[1].n), setting.hidden)
    envs.single_action_space.seed(seed)
    np.random.seed(seed)  # The buffer draws from NumPy's global generator.
    apply: Callable[..., chex.Array] = jax.jit(network.apply)
    params = network.init(jax.random.key(seed), jnp.zeros((1, *spaces[0].shape)))
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


class GymnaxEnv:
    """An ``Env`` with numbered actions as rejax asks for one: gymnax's interface before 1.0.1, with the auto-reset inside of ``step``."""

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
        """Of the environment's shape and dtype."""
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, self._env.observation_space.shape, self._env.observation_space.dtype)

    def action_space(self, params: None) -> Any:
        """As many as the environment's."""
        from gymnax.environments import spaces

        return spaces.Discrete(int(self._env.action_space.n))


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
        env=GymnaxEnv(env),
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


def rejax_ppo(env: Env, rollouts: int) -> Callable[[chex.PRNGKey], tuple[Any, chex.Array]]:
    """rejax's PPO on the work of ``policy_loops``, its parameters in the form of ``networks.ActorCritic``. See ``DIFFERENCES``."""
    from rejax import get_algo

    steps = rollouts * policy_loops.ROLLOUT
    algorithm = get_algo("ppo").create(
        env=GymnaxEnv(env),
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        num_envs=policy_loops.NUM_ENVS,
        num_steps=policy_loops.LENGTH,
        num_epochs=policy_loops.EPOCHS,
        num_minibatches=policy_loops.MINIBATCHES,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
        learning_rate=policy_loops.RATE,
        gamma=policy_loops.GAMMA,
        gae_lambda=policy_loops.LAMBDA,
        clip_eps=policy_loops.CLIP,
        ent_coef=policy_loops.ENTROPY,
        vf_coef=policy_loops.VALUE,
        max_grad_norm=policy_loops.GRAD_NORM,
    )
    algorithm = algorithm.replace(eval_callback=lambda *_: jnp.zeros(()))

    def run(key: chex.PRNGKey) -> tuple[Any, chex.Array]:
        state, _ = algorithm.train(key)
        actor, critic = state.actor_ts.params["params"], state.critic_ts.params["params"]
        hidden = [actor["features"]["Dense_0"], actor["features"]["Dense_1"], critic["Dense_0"], critic["Dense_1"]]
        layers = [*hidden, actor["action_logits"], critic["Dense_2"]]
        return {"params": {f"Dense_{i}": layer for i, layer in enumerate(layers)}}, jnp.asarray(state.global_step)

    return run
