"""What it costs to look whether an update is finite: ``python -m dqn_jax.bench.guard --inline``.

The same update inside a compiled loop, and the same step of a loop in Python, with the look (``dqn_jax.finite``) and without it: it is
taken out by putting functions that do nothing in its place while the program is traced, in this process, so that both take turns.
Compilation is apart; medians and ranges are over the rounds.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium import spaces

from dqn_jax import finite, training
from dqn_jax.bench import family, report
from dqn_jax.envs import make
from dqn_jax.presets.dqn import DQN
from dqn_jax.presets.ppo import ppo
from dqn_jax.presets.sac import sac
from dqn_jax.programs import compute_inline
from dqn_jax.types import Transition

ROWS = 512  # In SAC's replay.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what the look at an update costs."""

    repeats: int = 25
    """Rounds, in which both take turns."""
    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """One small batch and two rounds, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


def host_steps(optimizer: optax.GradientTransformation | None = None, steps: int = 500) -> Callable[[], Any]:
    """A function that makes so many steps of ``act_and_train``, an update in each: 2 x 64, batch 64.

    Args:
      optimizer: the caller's, after which all that was learnt is looked through, or None.
      steps: of a call.
    """
    options: dict[str, Any] = {
        "hidden": (64, 64),
        "batch_size": 64,
        "replay_start_size": 64,
        "update_interval": 1,
        "capacity": 10_000,
        "n_steps": 1,
    }
    agent = DQN((spaces.Box(-1, 1, (4,)), spaces.Discrete(2)), optimizer=optimizer, **options)
    observation = np.zeros(4, np.float32)

    def run() -> None:
        for _ in range(steps):
            agent.act_and_train(observation, 1.0)
        agent.get_statistics()  # Waits.

    return run


def sac_updates(updates: int = 20) -> Callable[[], Any]:
    """A function that makes so many updates of SAC: 2 x 256, batch 256, 17 numbers seen, 6 chosen."""
    seen, chosen = spaces.Box(-1, 1, (17,)), spaces.Box(-1, 1, (6,))
    agent = sac((seen, chosen), hidden=(256, 256), batch_size=256, n_steps=1, capacity=ROWS, replay_start_size=ROWS)

    def fill(key: jax.Array) -> Any:
        example = jax.random.normal(key, (ROWS, 17))
        state = agent.init(key, example)
        decision = agent.explore(state, example, agent.noise(state, 0, ROWS))[1]
        ones = jnp.ones(ROWS)
        return agent.observe(state, Transition(example, decision.action, ones, ones, example, jnp.zeros(ROWS, bool)))

    def loop(state: Any) -> Any:
        return jax.lax.fori_loop(0, updates, lambda _, state: agent.update(state, agent.draw(state, state.updates))[0], state)

    return _again(jax.jit(loop, donate_argnums=0), jax.jit(fill)(jax.random.key(0)))


def ppo_rollouts() -> Callable[[], Any]:
    """A function that plays and learns from two rollouts of 64 x 128 steps of CartPole."""
    env = make("phys2d/CartPole-v1")
    agent = ppo(env, rollout_length=128, batch_size=1_024)
    trained = training.train(agent, env, num_steps=2 * 64 * 128, num_envs=64, history_length=1)
    advance = jax.jit(lambda run: trained.advance(run)[0], donate_argnums=0)
    return _again(advance, jax.jit(trained.init)(jax.random.key(0)))


def _again(program: Callable[[Any], Any], state: Any) -> Callable[[], Any]:
    states = [state]

    def run() -> None:
        states[0] = jax.block_until_ready(program(states[0]))

    return run


def contenders(quick: bool) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is measured, by name: each makes a function that does the work once."""
    if quick:
        return {"DQN, 2 x 64, batch 8": lambda: family.updates_of(family.QUICK["2 x 64, batch 8"], {})}
    works = {f"DQN, {name}": work for name, work in family.WORK.items()}
    dqns = {name: lambda work=work: family.updates_of(work, {}) for name, work in works.items()}  # type: ignore[misc]
    hosts = {
        "DQN from Python, 2 x 64, batch 64": host_steps,
        "the same, the caller's optimizer": lambda: host_steps(optax.adam(1e-3)),
    }
    return {**dqns, **hosts, "SAC, 2 x 256, batch 256": sac_updates, "PPO, 64 x 128 steps of CartPole": ppo_rollouts}


def measure(build: Callable[[], Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """The milliseconds of one piece of work with and without the look, and how many times as long it takes with it."""
    runs = {"with": build()}
    runs["with"]()  # Compiles.
    nothing = {
        "is_sound": lambda loss, gradient: jnp.ones((), jnp.bool_),
        "all_finite": lambda tree: jnp.ones((), jnp.bool_),
        "choose": lambda sound, new, old: new,
        "learn_if": lambda sound, learn, learner: learn(learner),
    }
    with contextlib.ExitStack() as taken_out:
        for name, function in nothing.items():
            taken_out.enter_context(mock.patch.object(finite, name, function))
        runs["without"] = build()
        runs["without"]()  # Compiles all that it will ever call.
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in [*runs][:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    ratios = [own / bare for own, bare in zip(seconds["with"], seconds["without"], strict=True)]
    return {name: report.spread([1e3 * one for one in own]) for name, own in seconds.items()} | {"times_as_long": report.spread(ratios)}


def main() -> None:
    """Measures, prints a table, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    measured = {name: measure(build, 2 if options.quick else options.repeats) for name, build in contenders(options.quick).items()}
    rows = [
        (name, report.ranged(one["with"], ",.1f"), report.ranged(one["without"], ",.1f"), report.ranged(one["times_as_long"], ".3f"))
        for name, one in measured.items()
    ]
    report.table("a look whether updates are finite", ("work", "with, ms", "without, ms", "times as long"), rows)
    report.write(options.out, {"device": str(jax.devices()[0]), "inline": options.inline, "works": measured})


if __name__ == "__main__":
    report.command(main)
