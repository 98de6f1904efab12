"""PPO's compiled loop and SAC's update beside those of others: ``python -m dqn_jax.bench.policies``.

PPO: environments and learning compiled whole, beside a loop of our own writing in the style of PureJaxRL's ppo, on the same environments
and network, with as many updates. SAC: updates from a filled replay, beside SB3 and SBX where they are installed, and the return of a short
run on Pendulum-v1, to show that what is timed learns. Contenders take turns, compilation is apart, medians and ranges are over the rounds.
"""

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from dqn_jax.algorithms.ppo import PPOState
from dqn_jax.bench import report
from dqn_jax.envs import make
from dqn_jax.networks import ActorCritic
from dqn_jax.presets.ppo import ppo
from dqn_jax.presets.sac import SAC
from dqn_jax.programs import compute_inline, device_per_core
from dqn_jax.seeds import over_seeds
from dqn_jax.training import evaluate, train
from dqn_jax.types import AgentState, Env

NUM_ENVS, LENGTH, EPOCHS, MINIBATCHES = 64, 128, 4, 8
GAMMA, LAMBDA, CLIP, RATE, ENTROPY, VALUE, GRAD_NORM = 0.99, 0.95, 0.2, 5e-4, 0.01, 0.5, 0.5
ROLLOUT = NUM_ENVS * LENGTH
# Environment, its arguments, rollouts, and seeds trained at once.
LOOPS: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("phys2d/CartPole-v1", {"polemass_length": 0.05}, 40, 1),
    ("phys2d/CartPole-v1", {"polemass_length": 0.05}, 20, 16),
    ("pgx/minatar-breakout", {}, 20, 1),
    ("pgx/minatar-breakout", {}, 10, 16),
)
QUICK_LOOPS: tuple[tuple[str, dict[str, Any], int, int], ...] = (("phys2d/CartPole-v1", {"polemass_length": 0.05}, 2, 2),)
SAC_SHAPE = (17, 6)  # Numbers in an observation and in an action, as in HalfCheetah.
SAC_BATCH, SAC_ROWS = 256, 10_000
LEARN_STEPS = 5_000


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures PPO's loop and SAC's update."""

    repeats: int = 5
    """Rounds, in which all contenders take turns."""
    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    spread: bool = False
    """Give each core a device of its own (``dqn_jax.device_per_core``); loops of several seeds are spread over them, the others' too."""
    torch_threads: int = 1
    """Threads of SB3."""
    only: tuple[str, ...] = ("ppo", "sac")
    """What to measure."""
    quick: bool = False
    """Little work, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


# PPO.


def ours(env: Env, network: ActorCritic, rollouts: int) -> Callable[[chex.PRNGKey], tuple[Any, chex.Array]]:
    """This package's loop: from a key to parameters and steps made."""
    training = train(_agent(env, network), env, num_steps=rollouts * ROLLOUT, num_envs=NUM_ENVS, history_length=rollouts)

    def run(key: chex.PRNGKey) -> tuple[Any, chex.Array]:
        state = training.run(key).state
        return state.learner.params, state.step

    return run


def _agent(env: Env, network: ActorCritic) -> Any:
    return ppo(
        env,
        network=network,
        optimizer=_optimizer(),
        rollout_length=LENGTH,
        batch_size=ROLLOUT // MINIBATCHES,
        epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        clip=CLIP,
        value_clip=CLIP,
        entropy_coef=ENTROPY,
        value_coef=VALUE,
    )


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(GRAD_NORM), optax.adam(RATE, eps=1e-5))


class Row(NamedTuple):
    """What the scan of ``purejaxrl_style`` keeps of a step."""

    done: chex.Array
    action: chex.Array
    value: chex.Array
    reward: chex.Array
    log_prob: chex.Array
    observation: chex.Array


def purejaxrl_style(env: Env, network: ActorCritic, rollouts: int) -> Callable[[chex.PRNGKey], tuple[Any, chex.Array]]:
    """After PureJaxRL's ppo: value and policy at every step, keys split in the carry, every episode's end taken for a termination, in each
    epoch the whole rollout shuffled and then cut into minibatches.
    """
    optimizer = _optimizer()

    def rollout_step(carry: Any, _: None) -> tuple[Any, Row]:
        params, env_state, observation, key = carry
        key, key_action, key_step = jax.random.split(key, 3)
        logits, value = network.apply(params, observation)
        action = jax.random.categorical(key_action, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        env_state, step = jax.vmap(env.step)(jax.random.split(key_step, NUM_ENVS), env_state, action)
        row = Row(step.terminated | step.truncated, action, value, step.reward, log_prob, observation)
        return (params, env_state, step.observation, key), row

    def advantages(rows: Row, last_value: chex.Array) -> chex.Array:
        def back(carry: Any, row: Row) -> tuple[Any, chex.Array]:
            following, next_value = carry
            going = 1.0 - row.done
            delta = row.reward + GAMMA * next_value * going - row.value
            following = delta + GAMMA * LAMBDA * going * following
            return (following, row.value), following

        return jax.lax.scan(back, (jnp.zeros_like(last_value), last_value), rows, reverse=True)[1]

    def loss(params: Any, rows: Row, advantage: chex.Array, target: chex.Array) -> chex.Array:
        logits, value = network.apply(params, rows.observation)
        log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(log_probs, rows.action[:, None], axis=1)[:, 0]
        near = rows.value + jnp.clip(value - rows.value, -CLIP, CLIP)
        value_loss = 0.5 * jnp.mean(jnp.maximum(jnp.square(value - target), jnp.square(near - target)))
        ratio = jnp.exp(log_prob - rows.log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
        return policy_loss + VALUE * value_loss - ENTROPY * entropy

    def minibatch(carry: Any, part: Any) -> tuple[Any, chex.Array]:
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, *part)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), value

    def update(carry: Any, _: None) -> tuple[Any, chex.Array]:
        params, opt_state, env_state, observation, key = carry
        (_, env_state, observation, key), rows = jax.lax.scan(rollout_step, (params, env_state, observation, key), None, LENGTH)
        advantage = advantages(rows, network.apply(params, observation)[1])
        flat = jax.tree.map(lambda leaf: leaf.reshape(ROLLOUT, *leaf.shape[2:]), (rows, advantage, advantage + rows.value))

        def epoch(carry: Any, _: None) -> tuple[Any, chex.Array]:
            learnt, key = carry
            key, key_order = jax.random.split(key)
            order = jax.random.permutation(key_order, ROLLOUT)
            parts = jax.tree.map(lambda leaf: leaf[order].reshape(MINIBATCHES, -1, *leaf.shape[1:]), flat)
            learnt, losses = jax.lax.scan(minibatch, learnt, parts)
            return (learnt, key), losses

        ((params, opt_state), key), losses = jax.lax.scan(epoch, ((params, opt_state), key), None, EPOCHS)
        return (params, opt_state, env_state, observation, key), losses.mean()

    def run(key: chex.PRNGKey) -> tuple[Any, chex.Array]:
        key, key_params, key_reset = jax.random.split(key, 3)
        env_state, observation = jax.vmap(env.reset)(jax.random.split(key_reset, NUM_ENVS))
        params = network.init(key_params, observation)
        carry, _ = jax.lax.scan(update, (params, optimizer.init(params), env_state, observation, key), None, rollouts)
        return carry[0], jnp.asarray(rollouts * ROLLOUT)

    return run


def measure_loops(works: Any, repeats: int) -> dict[str, Any]:
    """Steps per second of each loop, seconds of compilation, greedy returns, and how many times as fast ours is."""
    measured = {}
    for env_id, env_args, rollouts, seeds in works:
        env = make(env_id, **env_args)
        network = ActorCritic(int(env.action_space.n))
        keys = jax.random.split(jax.random.key(0), (repeats + 1, seeds))
        play = evaluate(_agent(env, network), env, num_episodes=20, max_steps=env.time_limit or 2_500)

        def greedy(params: Any, key: chex.PRNGKey, play: Any = play) -> chex.Array:
            learner = PPOState(params, (), (), (), ())
            return play(AgentState(learner, *[()] * 5), key).mean()

        programs: dict[str, Any] = {}
        result: dict[str, dict[str, Any]] = {}
        for name, build in (("ours", ours), ("PureJaxRL style", purejaxrl_style)):
            begin = time.perf_counter()
            programs[name] = jax.jit(over_seeds(build(env, network, rollouts))).lower(keys[0]).compile()
            result[name] = {"compile_seconds": time.perf_counter() - begin, "speeds": [], "returns": []}
            jax.block_until_ready(programs[name](keys[0]))  # The first call of a program also allocates.
        for turn in range(repeats):
            for name in list(programs)[:: -1 if turn % 2 else 1]:
                begin = time.perf_counter()
                params, steps = jax.block_until_ready(programs[name](keys[turn + 1]))
                result[name]["speeds"].append(int(np.sum(np.asarray(steps))) / (time.perf_counter() - begin))
                returns = jax.jit(over_seeds(greedy))(params, keys[turn + 1])
                result[name]["returns"] += np.asarray(returns).tolist()
        ratios = [a / b for a, b in zip(result["ours"]["speeds"], result["PureJaxRL style"]["speeds"], strict=True)]
        title = f"{env_id}, {seeds} seed{'s'[: seeds > 1]}, {rollouts * ROLLOUT:,} steps each"
        measured[title] = {"contenders": result, "ratio": report.spread(ratios)}
        rows = []
        for name, one in result.items():
            speed = report.spread(one["speeds"])
            returns = f"{np.mean(one['returns']):.1f} ({min(one['returns']):.1f})"
            ratio = report.spread(ratios) if name != "ours" else None
            rows.append((name, _range(speed, ",.0f"), f"{one['compile_seconds']:.1f}", returns, _range(ratio, ".2f") if ratio else "1"))
        report.table(f"PPO, {title}", ("", "steps/s", "compile s", "greedy return (worst)", "ours, times as fast"), rows)
    return measured


def _range(values: dict[str, float], spec: str) -> str:
    return f"{values['median']:{spec}} ({values['min']:{spec}}-{values['max']:{spec}})"


# SAC.


class Noise(gymnasium.Env):
    """Random observations and rewards: something to fill a replay with."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, SAC_SHAPE[:1], np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, SAC_SHAPE[1:], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As in Gymnasium."""
        super().reset(seed=seed)
        return self.np_random.normal(size=SAC_SHAPE[0]).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As in Gymnasium; an episode is never over."""
        return self.np_random.normal(size=SAC_SHAPE[0]).astype(np.float32), float(self.np_random.normal()), False, False, {}


class Sac(NamedTuple):
    """How to measure one implementation of SAC.

    Attributes:
      updater: ``(rows) -> (updates) -> None``: fills a replay, then makes that many updates at each call.
      learn: ``(steps, seed) -> choose``: trains on Pendulum-v1; returns the greedy policy.
    """

    updater: Callable[[int], Callable[[int], None]]
    learn: Callable[[int, int], Callable[[Any], Any]]


def _ours_updater(rows: int) -> Callable[[int], None]:
    agent = SAC(Noise(), replay_start_size=rows, capacity=rows, batch_size=SAC_BATCH)
    env = Noise()
    observation, _ = env.reset(seed=0)
    reward = 0.0
    for _ in range(rows):
        observation, reward, *_ = env.step(agent.act_and_train(observation, reward))
    state, pure = agent.state, agent.agent

    def updates(state: AgentState, number: chex.Array) -> AgentState:
        return jax.lax.fori_loop(0, number, lambda _, s: pure.update(s, pure.draw(s, s.updates))[0], state)

    compiled = jax.jit(updates, donate_argnums=0)
    kept = [state]

    def make_updates(number: int) -> None:
        kept[0] = jax.block_until_ready(compiled(kept[0], jnp.asarray(number)))

    return make_updates


def _ours_learn(steps: int, seed: int) -> Callable[[Any], Any]:
    env = gymnasium.make("Pendulum-v1")
    agent = SAC(env, seed=seed, learning_rate=1e-3, batch_size=SAC_BATCH, capacity=50_000, replay_start_size=500)
    observation, _ = env.reset(seed=seed)
    reward = 0.0
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(agent.act_and_train(observation, reward))  # type: ignore[assignment]
        if terminated or truncated:
            agent.stop_episode_and_train(observation, reward, terminated=terminated)
            observation, _ = env.reset()
    return agent.act


def _others(package: str) -> Sac:
    def model(env: Any, seed: int, **options: Any) -> Any:
        module = importlib.import_module(package)
        return module.SAC("MlpPolicy", env, seed=seed, batch_size=SAC_BATCH, policy_kwargs={"net_arch": [256, 256]}, **options)

    def updater(rows: int) -> Callable[[int], None]:
        filled = model(Noise(), 0, learning_starts=rows, buffer_size=rows)
        filled.learn(rows)
        return lambda number: filled.train(gradient_steps=number, batch_size=SAC_BATCH)

    def learn(steps: int, seed: int) -> Callable[[Any], Any]:
        trained = model("Pendulum-v1", seed, learning_rate=1e-3, buffer_size=50_000, learning_starts=500)
        trained.learn(steps)
        return lambda observation: trained.predict(observation, deterministic=True)[0]

    return Sac(updater, learn)


def measure_sac(repeats: int, torch_threads: int, quick: bool) -> dict[str, Any]:
    """Milliseconds of an update, and greedy returns after a short run on Pendulum-v1."""
    contenders = {"ours": Sac(_ours_updater, _ours_learn)}
    for name, package in (("SB3", "stable_baselines3"), ("SBX", "sbx")):
        if importlib.util.find_spec(package) is None:
            print(f"{name} is skipped: {package} is not installed")
        else:
            contenders[name] = _others(package)
    if "SB3" in contenders:
        import torch

        torch.set_num_threads(torch_threads)
    updates = 5 if quick else 100
    calls = {name: contender.updater(300 if quick else SAC_ROWS) for name, contender in contenders.items()}
    for call in calls.values():
        call(updates)  # Compiles.
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            calls[name](updates)
            milliseconds[name].append(1e3 * (time.perf_counter() - begin) / updates)
    result: dict[str, Any] = {}
    for name, contender in contenders.items():
        result[name] = {"update_ms": report.spread(milliseconds[name])}
        result[name]["ratio"] = report.spread([b / a for a, b in zip(milliseconds["ours"], milliseconds[name], strict=True)])
        choose = contender.learn(600 if quick else LEARN_STEPS, 0)
        result[name]["return"] = float(np.mean([_episode(choose, 100 + episode) for episode in range(1 if quick else 20)]))
    rows = [
        (name, _range(one["update_ms"], ".2f"), f"{one['return']:.0f}", _range(one["ratio"], ".2f") if name != "ours" else "1")
        for name, one in result.items()
    ]
    title = f"SAC, 2x256, batch {SAC_BATCH}, {SAC_SHAPE[0]} and {SAC_SHAPE[1]} numbers; return: Pendulum-v1 after {LEARN_STEPS:,} steps"
    report.table(title, ("", "update, ms", "return", "ours, times as fast"), rows)
    return result


def _episode(choose: Callable[[Any], Any], seed: int) -> float:
    env = gymnasium.make("Pendulum-v1")
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(choose(observation))
        total, ended = total + float(reward), terminated or truncated
    return total


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = tyro.cli(Options, description=__doc__)
    if options.inline:
        compute_inline()
    if options.spread:
        device_per_core()
    repeats = 2 if options.quick else options.repeats
    everything: dict[str, Any] = {"device": str(jax.devices()[0])}
    if "ppo" in options.only:
        everything["ppo"] = measure_loops(QUICK_LOOPS if options.quick else LOOPS, repeats)
    if "sac" in options.only:
        everything["sac"] = measure_sac(repeats, options.torch_threads, options.quick)
    report.write(options.out, everything)


if __name__ == "__main__":
    main()
