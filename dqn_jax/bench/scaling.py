"""What more environments or seeds bring: ``python -m dqn_jax.bench.scaling [--quick] [--inline | --spread] [--out FILE.json]``.

Steps per second, medians and ranges of three measurements, each with keys of its own; compilation apart:

* of the host loop, with N environments that feed one agent through ``batch_act_and_train``: Gymnasium's CartPole-v1 in one process, after
  the warm-up. Its compilation is that of ``DQN.compile``;
* of the compiled loop with N environments that feed one agent;
* of the compiled loop with N seeds, an agent and an environment each, through ``dqn_jax.over_seeds``; their steps are added up. A loop in
  the style of PureJaxRL takes turns with ours there, spread by the same function. (Not for CartPole on a CPU: that the section loops does.)

On CartPole the loops learn with the setting PLAIN of ``settings.py``, on MinAtar's Breakout with PLAIN_IMAGES. There the peer has a network
of ``flax.linen.Conv``, as one would write it (PureJaxRL's own DQN has no convolution), and once more ours, which tells what the convolution
makes of the difference. All make **one update for every 4 transitions, whatever the count**: with one environment an update after every
fourth row, with N >= 4 environments N / 4 updates after each row of N transitions. So more environments save acting, not learning. One
thing is changed in both settings: learning begins with the first full batch, since the steps of a warm-up cost next to nothing. Compiled
loops are timed from the first reset on, that little warm-up included; the updates that were made stand beside the steps, and the greedy
return where there is a peer. After 2,048 steps on Breakout that tells nothing yet; ``seeds`` makes longer runs.

Each seed of a game makes as many steps as every other, however many there are, and its replay keeps them all, up to SEED_CAPACITY
(``games.py`` says how many). On an accelerator there are larger counts. Breakout is measured where pgx is installed. What is left out is
said.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gymnasium
import jax
import numpy as np

from dqn_jax import footprint, spaces
from dqn_jax.bench import compiled_loops, report, series
from dqn_jax.bench.compiled_loops import Outcome
from dqn_jax.bench.games import CARTPOLE, GAMES, Sizes, missing, selected, sizes
from dqn_jax.bench.series import Contender, Done, Group
from dqn_jax.bench.settings import Setting, options
from dqn_jax.envs import make, true_successors
from dqn_jax.networks import ConvQNetwork
from dqn_jax.presets.dqn import DQN, dqn
from dqn_jax.programs import compute_inline, device_per_core
from dqn_jax.seeds import num_in_one_memory, over_seeds
from dqn_jax.training import train
from dqn_jax.types import Agent, Env

SEED_CAPACITY = 50_000  # Transitions that a seed keeps at most.
EVALUATED, EPISODES = 128, 20  # Seeds whose greedy return is shown, at most, and episodes of each.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what more environments or seeds bring."""

    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    spread: bool = False
    """Make each core a device (``dqn_jax.device_per_core``) and measure what that is for: seeds alone."""
    only: tuple[Literal["CartPole", "Breakout"], ...] = ("CartPole", "Breakout")
    """What is learnt; the host loop learns CartPole."""
    quick: bool = False
    """A little of everything, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured; it is written after every count."""


# The host loop.


def host_loop(num_envs: int, steps: int, repeats: int) -> dict[str, Any]:
    """The loop of the user's own, with so many environments.

    Args:
      num_envs: N.
      steps: transitions to measure, of all environments together; rounded down to whole updates.
      repeats: measurements.

    Returns:
      One point, as ``series.in_turns`` gives it.

    Raises:
      ValueError: if no update falls due within the steps, or N and the 4 transitions between updates do not divide one another.
    """
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    make_envs = functools.partial(gymnasium.make_vec, vectorization_mode="sync", vector_kwargs=same_step)
    with contextlib.closing(make_envs("CartPole-v1", num_envs)) as envs:
        agent = DQN(envs, **options(GAMES[CARTPOLE].setting))
        cadence = agent.agent.cadence(num_envs)
        cycles = steps // (cadence.rows * num_envs)
        if cycles < 1:
            raise ValueError(
                f"{steps} steps of {num_envs} environment(s) hold no update, one falls due every {cadence.rows * num_envs}: measure more"
            )
        begin = time.perf_counter()
        agent.compile()
        compile_seconds = time.perf_counter() - begin
        # An agent made anew would compile anew: this one takes over fresh states.
        fresh, first = jax.jit(agent.agent.init), agent.run_state
        example = spaces.example(envs.single_observation_space, num_envs)

        def measure(seed: int) -> Done:
            agent.restore(first._replace(agent=fresh(jax.random.key(seed), example)))
            rows = _play(agent, envs, seed)
            _make(rows, cadence.prefill + cadence.rows)  # The first update is made.
            before, begin = agent.get_statistics(), time.perf_counter()  # The statistics wait for it.
            _make(rows, cycles * cadence.rows)
            after, end = agent.get_statistics(), time.perf_counter()
            return Done(int(after["t"] - before["t"]), int(after["n_updates"] - before["n_updates"]), end - begin)

        contender = Contender(measure, compile_seconds, footprint.num_bytes(first.agent.memory))
        return series.in_turns(num_envs, {"host loop, CartPole": contender}, repeats)


def _play(agent: DQN, envs: gymnasium.vector.VectorEnv, seed: int) -> Iterator[None]:
    """Goes on for ever; at each turn the agent takes in one row of transitions."""
    observation, _ = envs.reset(seed=seed)
    action = agent.batch_act_and_train(observation)
    while True:
        observation, reward, terminated, truncated, infos = envs.step(action)
        action = agent.batch_act_and_train(observation, reward, terminated, truncated, true_successors(observation, infos))
        yield


def _make(rows: Iterator[None], number: int) -> None:
    for _ in itertools.islice(rows, number):
        pass


# The compiled loop.


def ours(agent: Agent, env: Env, steps: int, num_envs: int = 1) -> Callable[[Any], Outcome]:
    """This package's compiled loop, from a key. The outcome's history holds the replay, too, so that it is computed to the end."""
    # With many points of history the few cycles between two would draw their random numbers in small pieces.
    training = train(agent, env, num_steps=steps, num_envs=num_envs, history_length=1)

    def run(key: Any) -> Outcome:
        result = training.run(key)
        return Outcome(result.state.learner.params, result.state.updates, result.state.step, result)

    return run


def environments(name: str, num_envs: int, steps: int, repeats: int) -> dict[str, Any]:
    """The compiled loop with so many environments that feed one agent.

    Args:
      name: what is learnt, out of GAMES.
      num_envs: N.
      steps: transitions of a measurement, of all environments together; rounded up to whole rows.
      repeats: measurements.

    Returns:
      One point, as ``series.in_turns`` gives it.

    Raises:
      ValueError: if N and the transitions between updates do not divide one another, or the replay is too small for N.
      MemoryError: if the replay is larger than the device's memory.
    """
    game = GAMES[name]
    env = make(game.env_id, **game.env_args)
    agent = dqn(env, **options(game.setting))
    keys = [jax.random.key(seed) for seed in range(repeats)]
    contender = compiled(ours(agent, env, steps, num_envs), keys, _replay_bytes(agent, env, num_envs))
    return series.in_turns(num_envs, {f"compiled loop, environments, {name}": contender}, repeats)


def seeds(name: str, count: int, steps: int, repeats: int, with_peer: bool) -> dict[str, Any]:
    """The compiled loop with so many seeds, each an agent and an environment.

    Args:
      name: what is learnt, out of GAMES.
      count: of seeds.
      steps: transitions of each; rounded up as ``dqn_jax.train`` does. Its replay keeps them all, up to SEED_CAPACITY.
      repeats: measurements.
      with_peer: whether a loop in the style of PureJaxRL takes turns, with flax's convolutions and with ours where there are some; then
        the greedy return of all is told.

    Returns:
      A point for each, as ``series.in_turns`` gives it.

    Raises:
      ValueError: if so few steps are left for a seed that it would not learn.
      MemoryError: if all replays together are larger than the device's memory.
    """
    game = GAMES[name]
    if steps <= game.setting.batch_size:
        raise ValueError(f"{steps} steps of a seed are too few, learning begins after {game.setting.batch_size}: measure more")
    env = make(game.env_id, **game.env_args)
    setting = game.setting._replace(capacity=min(SEED_CAPACITY, steps))
    agent = dqn(env, **options(setting))
    steps = train(agent, env, num_steps=steps, history_length=1).num_steps
    replay_bytes = count * _replay_bytes(agent, env, 1, num_in_one_memory(count))
    first = f"compiled loop, seeds, {name}"
    loops = {first: ours(agent, env, steps)}
    if with_peer:
        peer = functools.partial(compiled_loops.purejaxrl_style, env, setting, steps)
        network = compiled_loops.our_network(env, setting)
        loops[f"{first}, PureJaxRL style"] = peer()
        if isinstance(network, ConvQNetwork):
            loops[f"{first}, PureJaxRL style, our convolutions"] = peer(network)
    keys = [jax.random.split(jax.random.key(seed), count) for seed in range(repeats)]
    evaluate = _evaluation(env, setting, min(count, EVALUATED)) if with_peer else None
    contenders = {}
    for title, run in loops.items():
        known = replay_bytes if title == first else None  # The peer does not hand out its replay.
        contenders[title] = compiled(over_seeds(run) if count > 1 else _alone(run), keys, known, evaluate)
    return series.in_turns(count, contenders, repeats)


def _alone(run: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
    """The loop for one key, in the form of that for several. (A ``vmap`` over one would be slower.)"""
    return lambda keys: jax.tree.map(lambda leaf: leaf[None], run(keys[0]))


def _replay_bytes(agent: Agent, env: Env, num_envs: int, copies: int = 1) -> int:
    """The bytes of one replay; MemoryError if so many of them are larger than the device's memory."""
    _, observation = jax.eval_shape(jax.vmap(env.reset), jax.random.split(jax.random.key(0), num_envs))
    state = jax.eval_shape(agent.init, jax.random.key(0), observation)
    footprint.require_room(state, copies)
    return footprint.num_bytes(state.memory)


def _evaluation(env: Env, setting: Setting, count: int) -> Callable[[Any], float]:
    """From the parameters of so many seeds or more to the mean greedy return of the first."""

    @jax.jit
    def returns(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), count)
        return jax.vmap(lambda params, key: compiled_loops.greedy_returns(env, setting, params, key, EPISODES))(params, keys)

    return lambda params: float(np.mean(returns(jax.tree.map(lambda leaf: np.asarray(leaf[:count]), params))))


def compiled(
    run: Callable[[Any], Outcome], keys: list[Any], replay_bytes: int | None, evaluate: Callable[[Any], float] | None = None
) -> Contender:
    """A compiled loop, for the keys of one measurement after the other; ``evaluate`` gives the return of what the last one has learnt."""
    begin = time.perf_counter()
    program = jax.jit(run).lower(keys[0]).compile()
    compile_seconds = time.perf_counter() - begin
    last: list[Any] = []

    def measure(number: int) -> Done:
        begin = time.perf_counter()
        outcome = jax.block_until_ready(program(keys[number]))
        seconds = time.perf_counter() - begin
        last[:] = [outcome.params]  # And not its replay, which would stay while the next one is made.
        return Done(int(np.sum(outcome.steps)), int(np.sum(outcome.updates)), seconds)

    return Contender(measure, compile_seconds, replay_bytes, () if evaluate is None else lambda: evaluate(last[0]))


# All together.


def plan(chosen: Sizes) -> list[Group]:
    """All series."""
    repeats, unit = chosen.repeats, "steps per second"
    hosts = (host_loop(count, chosen.host_steps, repeats) for count in chosen.counts)
    groups = [Group("environments", unit, hosts)] if chosen.counts else []
    left_out = missing(chosen)
    for name, amount in chosen.games.items():
        if name in left_out:
            continue
        # Bound now: a generator would look the game up when it is asked for its points, after the last one.
        several = functools.partial(environments, name, steps=amount.env_steps, repeats=repeats)
        many = functools.partial(seeds, name, steps=amount.seed_steps, repeats=repeats, with_peer=amount.with_peer)
        groups += [Group("environments", unit, map(several, amount.counts)), Group("seeds", unit, map(many, amount.counts))]
    return groups


def measure_sizes(chosen: Sizes, keep: Callable[[dict[str, Any]], None] | None = None, seeds_only: bool = False) -> dict[str, Any]:
    """Everything, at these sizes.

    Args:
      chosen: how much.
      keep: is given what has been measured so far, after each count.
      seeds_only: leave out what is not counted along seeds.

    Returns:
      ``device``; ``sizes``; ``left_out``: games and why; ``series`` as ``series.measure`` gives them.

    Raises:
      ValueError: if a size does not fit a count.
      MemoryError: if replays are larger than the device's memory.
    """
    groups = [group for group in plan(chosen) if group.axis == "seeds" or not seeds_only]
    said = chosen._asdict() | {"games": {name: amount._asdict() for name, amount in chosen.games.items()}}
    return series.measure(groups, {"device": str(jax.devices()[0]), "sizes": said, "left_out": missing(chosen)}, keep)


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline and options.spread:
        raise SystemExit("--inline asks for one device and --spread for one for each core: give one of them")
    if options.inline:
        compute_inline()
    if options.spread:
        device_per_core()
    try:
        chosen = selected(sizes(jax.default_backend(), options.quick), options.only)
    except ValueError as error:
        raise SystemExit(str(error)) from error

    def measure(quick: bool, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        del quick  # It is in the sizes.
        return measure_sizes(chosen, keep, seeds_only=options.spread)

    series.run(measure, options.quick, options.out, inline=options.inline, spread=options.spread)


if __name__ == "__main__":
    report.command(main)
