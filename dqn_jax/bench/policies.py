"""PPO's compiled loop and SAC's update beside those of others: ``python -m dqn_jax.bench.policies``.

PPO: environments and learning compiled whole, beside a loop of our own writing in the style of PureJaxRL's ppo and, where it is installed,
rejax's, on the same environments and network, with as many updates. SAC: updates from a filled replay, beside SB3 and SBX where they are
installed and beside the matrix products that all of them need, and the return of a short run on Pendulum-v1, to show that what is timed
learns. Contenders take turns, compilation is apart,
medians and ranges are over the rounds.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.bench import peers, policy_loops, report
from dqn_jax.envs import make
from dqn_jax.play import play_greedily
from dqn_jax.presets.sac import SAC
from dqn_jax.programs import compute_inline, device_per_core
from dqn_jax.seeds import over_seeds, sharding
from dqn_jax.types import AgentState

REJAX = "rejax"
ON_ONE = ", one device"  # Where our loop is spread over several, those of others are measured both ways.
LOOPS = {"ours": policy_loops.ours, "PureJaxRL style": policy_loops.purejaxrl_style, REJAX: peers.rejax_ppo}
EPISODES = 20  # Of a greedy evaluation.
# Environment, its arguments, rollouts, and seeds trained at once.
WORKS: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("phys2d/CartPole-v1", {"polemass_length": 0.05}, 40, 1),
    ("phys2d/CartPole-v1", {"polemass_length": 0.05}, 10, 16),
    ("pgx/minatar-breakout", {}, 20, 1),
    ("pgx/minatar-breakout", {}, 5, 16),
)
QUICK_WORKS: tuple[tuple[str, dict[str, Any], int, int], ...] = (("phys2d/CartPole-v1", {"polemass_length": 0.05}, 2, 2),)
SAC_SHAPE = (17, 6)  # Numbers in an observation and in an action, as in HalfCheetah.
SAC_BATCH, SAC_ROWS = 256, 10_000
LEARN_STEPS = 5_000
PRODUCTS = "the update's matrix products alone"


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures PPO's loop and SAC's update."""

    repeats: int = 5
    """Rounds, in which all contenders take turns."""
    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    spread: bool = False
    """Give each core a device of its own (``dqn_jax.device_per_core``); loops of several seeds are spread over them; those of
    others too, and once more on one device."""
    torch_threads: int = 1
    """Threads of SB3."""
    only: tuple[Literal["ppo", "sac"], ...] = ("ppo", "sac")
    """What to measure; SAC not with a device per core."""
    quick: bool = False
    """Little work, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


# PPO.


def measure_loops(works: Any, repeats: int) -> dict[str, Any]:
    """Steps per second of each loop, seconds of compilation, greedy returns, and how many times as fast ours is."""
    measured = {}
    jax.jit(lambda x: x + 1)(0)  # The first compilation of a process also sets up the compiler.
    for env_id, env_args, rollouts, seeds in works:
        env = make(env_id, **env_args)
        keys = jax.random.split(jax.random.key(0), (repeats + 1, seeds))
        play = jax.jit(over_seeds(lambda params, key, env=env: policy_loops.greedy_return(env, params, key, EPISODES)))
        programs: dict[str, Any] = {}
        result: dict[str, dict[str, Any]] = {}
        for name, build in LOOPS.items():
            if name == REJAX and importlib.util.find_spec("rejax") is None:
                print("rejax is skipped: it is not installed")
                continue
            loop = build(env, rollouts)  # What it needs is imported here.
            ways = {name: over_seeds(loop)}
            if name != "ours" and sharding(seeds) is not None:
                ways[name + ON_ONE] = jax.vmap(loop)  # As its users have it.
            for way, mapped in ways.items():
                begin = time.perf_counter()
                programs[way] = jax.jit(mapped).lower(keys[0]).compile()
                compile_seconds = time.perf_counter() - begin
                _, steps = programs[way](keys[0])  # The first call of a program also allocates: it is not timed.
                result[way] = {"compile_seconds": compile_seconds, "steps": np.asarray(steps).tolist(), "speeds": [], "returns": []}
        made = {name: one["steps"] for name, one in result.items()}
        if any(steps != [rollouts * policy_loops.ROLLOUT] * seeds for steps in made.values()):
            raise RuntimeError(f"the loops did not make the same steps: {made}")
        for turn in range(repeats):
            for name in list(programs)[:: -1 if turn % 2 else 1]:
                begin = time.perf_counter()
                params, _ = jax.block_until_ready(programs[name](keys[turn + 1]))
                result[name]["speeds"].append(seeds * rollouts * policy_loops.ROLLOUT / (time.perf_counter() - begin))
                result[name]["returns"] += np.asarray(play(params, keys[turn + 1])).tolist()
        title = f"{env_id}, {seeds} seed{'s'[: seeds > 1]}, {rollouts * policy_loops.ROLLOUT:,} steps each"
        for one in result.values():
            one["ratio"] = report.spread([a / b for a, b in zip(result["ours"]["speeds"], one["speeds"], strict=True)])
        measured[title] = result
        show_loops(title, result)
    return measured


def show_loops(title: str, result: dict[str, dict[str, Any]]) -> None:
    """Prints a table of what ``measure_loops`` found for one piece of work."""
    rows = []
    for name, one in result.items():
        returns = f"{np.mean(one['returns']):.1f} ({min(one['returns']):.1f})"
        speed, ratio = report.ranged(report.spread(one["speeds"]), ",.0f"), report.ranged(one["ratio"], ".2f") if name != "ours" else "1"
        rows.append((name, speed, f"{one['compile_seconds']:.1f}", returns, ratio))
    report.table(f"PPO, {title}", ("", "steps/s", "compile s", "greedy return (worst)", "ours, times as fast"), rows)


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
      updater: ``(rows) -> (make, made)``: fills a replay; ``make(updates)`` then makes that many, ``made()`` tells how many there were.
      learn: ``(steps, seed) -> choose``: trains on Pendulum-v1; returns the greedy policy.
    """

    updater: Callable[[int], tuple[Callable[[int], Any], Callable[[], int]]]
    learn: Callable[[int, int], Callable[[Any], Any]]


def _ours_updater(rows: int) -> tuple[Callable[[int], Any], Callable[[], int]]:
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
    kept, before = [state], int(state.updates)

    def make_updates(number: int) -> None:
        kept[0] = jax.block_until_ready(compiled(kept[0], jnp.asarray(number)))

    return make_updates, lambda: int(kept[0].updates) - before


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

    def updater(rows: int) -> tuple[Callable[[int], Any], Callable[[], int]]:
        filled = model(Noise(), 0, learning_starts=rows, buffer_size=rows)
        filled.learn(rows)
        before = filled._n_updates
        return lambda number: filled.train(gradient_steps=number, batch_size=SAC_BATCH), lambda: filled._n_updates - before

    def learn(steps: int, seed: int) -> Callable[[Any], Any]:
        trained = model("Pendulum-v1", seed, learning_rate=1e-3, buffer_size=50_000, learning_starts=500)
        trained.learn(steps)
        return lambda observation: trained.predict(observation, deterministic=True)[0]

    return Sac(updater, learn)


def _products() -> Callable[[int], Any]:
    """The matrix products of an update and nothing else: what any SAC with these networks has to compute. Returns a function that makes
    those of so many updates.
    """
    seen, chosen = SAC_SHAPE
    actor, critic = itertools.pairwise((seen, 256, 256, 2 * chosen)), itertools.pairwise((seen + chosen, 256, 256, 1))
    shapes: list[tuple[int, int, int]] = []  # Rows, inner length, columns.
    for layer, (k, n) in enumerate(actor):
        # Of the successor and of the observation; backwards once, to the weights and, above the first layer, to the layer's input.
        shapes += 2 * [(SAC_BATCH, k, n)] + [(k, SAC_BATCH, n)] + (layer > 0) * [(SAC_BATCH, n, k)]
    for layer, (k, n) in enumerate(critic):
        # Two critics: of their targets, their own loss and the actor's; backwards in their own, and through them to the action in its.
        shapes += 2 * (3 * [(SAC_BATCH, k, n)] + [(k, SAC_BATCH, n)] + (1 + (layer > 0)) * [(SAC_BATCH, n, k)])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # Two left sides by turns, or XLA would take the products out of the loop.
    pairs = [
        (jax.random.normal(key, (2, rows, inner)), jax.random.normal(key, (inner, columns)))
        for key, (rows, inner, columns) in zip(keys, shapes, strict=True)
    ]

    @jax.jit
    def multiply(pairs: Any, number: chex.Array) -> Any:
        nothing = [jnp.zeros((left.shape[1], right.shape[1])) for left, right in pairs]
        return jax.lax.fori_loop(0, number, lambda i, _: [left[i % 2] @ right for left, right in pairs], nothing)

    return lambda number: jax.block_until_ready(multiply(pairs, jnp.asarray(number)))


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
    updates, learn_steps, episodes = (5, 600, 1) if quick else (100, LEARN_STEPS, 20)
    calls = {name: contender.updater(300 if quick else SAC_ROWS) for name, contender in contenders.items()}
    calls[PRODUCTS] = _products(), lambda: (repeats + 1) * updates
    for make_updates, _ in calls.values():
        make_updates(updates)  # Compiles.
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            calls[name][0](updates)
            milliseconds[name].append(1e3 * (time.perf_counter() - begin) / updates)
    made = {name: count() for name, (_, count) in calls.items()}
    if {*made.values()} != {(repeats + 1) * updates}:
        raise RuntimeError(f"the contenders did not make the same updates: {made}")
    result: dict[str, Any] = {}
    for name in calls:
        result[name] = {"update_ms": report.spread(milliseconds[name]), "updates": made[name], "learn_steps": learn_steps}
        result[name]["ratio"] = report.spread([b / a for a, b in zip(milliseconds["ours"], milliseconds[name], strict=True)])
    for name, contender in contenders.items():
        choose = contender.learn(learn_steps, 0)
        result[name]["return"] = float(
            np.mean([play_greedily(choose, gymnasium.make("Pendulum-v1"), 100 + episode) for episode in range(episodes)])
        )
    rows = []
    for name, one in result.items():
        ratio = report.ranged(one["ratio"], ".2f") if name != "ours" else "1"
        rows.append((name, report.ranged(one["update_ms"], ".2f"), f"{one['return']:.0f}" if "return" in one else "none", ratio))
    title = (
        f"SAC, 2x256, batch {SAC_BATCH}, {SAC_SHAPE[0]} and {SAC_SHAPE[1]} numbers, {updates} updates a call; SB3 on {torch_threads} "
        f"thread{'s'[: torch_threads > 1]}; return: Pendulum-v1 after {learn_steps:,} steps, {episodes} episode{'s'[: episodes > 1]}"
    )
    report.table(title, ("", "update, ms", "return", "ours, times as fast"), rows)
    return result


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    if options.spread:
        device_per_core()
    if options.repeats < 1:
        sys.exit(f"--repeats must be at least 1, got {options.repeats}")
    repeats = 2 if options.quick else options.repeats
    threads = {"inline": options.inline, "spread": options.spread, "torch_threads": options.torch_threads}
    everything: dict[str, Any] = {"device": str(jax.devices()[0]), **threads, "differences": differences()}
    if "ppo" in options.only:
        everything["ppo"] = measure_loops(QUICK_WORKS if options.quick else WORKS, repeats)
    if "sac" in options.only and not options.spread:  # One update has one device.
        everything["sac"] = measure_sac(repeats, options.torch_threads, options.quick)
    print("\nWhat they do otherwise, or for themselves alone (those that were measured):")
    for name, what in everything["differences"].items():
        package = {"rejax's ppo": "rejax", "SB3's SAC": "stable_baselines3", "SBX's SAC": "sbx"}.get(name)
        if package is None or importlib.util.find_spec(package) is not None:
            print(f"  {name}: {'; '.join(what)}")
    report.write(options.out, everything)


def differences() -> dict[str, tuple[str, ...]]:
    """What the contenders do otherwise, by name."""
    return {name: peers.DIFFERENCES[name] for name in ("PureJaxRL style", "rejax's ppo", "SB3's SAC", "SBX's SAC")}


if __name__ == "__main__":
    report.command(main)
