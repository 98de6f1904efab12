"""What more environments, seeds or larger batches bring: ``python -m dqn_jax.bench.scaling [--quick] [--inline | --spread] [--out
FILE.json]``.

Per second, medians and ranges of three measurements, each with keys of its own; compilation apart:

* steps of the host loop, with N environments that feed one agent through ``batch_act_and_train``: Gymnasium's CartPole-v1 in one
  process, after the warm-up. Its compilation is that of ``DQN.compile``;
* steps of the compiled loop with N environments that feed one agent;
* steps of the compiled loop with N seeds, an agent and an environment each, through ``dqn_jax.over_seeds``; their steps are added up;
* updates of Nature's convolutional network inside a compiled loop, from a full replay of frames, computed in float32 (at JAX's
  default precision) and in bfloat16, by batch size. Random numbers are drawn before, and no environment is stepped.

The loops learn with the setting PLAIN of ``settings.py`` on CartPole, on MinAtar's Breakout with the preset "minatar", and make **one
update for every 4 transitions, whatever the count**: with one environment an update after every fourth row, with N >= 4 environments N / 4
updates after each row of N transitions. So more environments save acting, not learning. One thing is changed in both settings: learning
begins with the first full batch, since the steps of a warm-up cost next to nothing. Compiled loops are timed from the first reset on, that
little warm-up included; the updates that were made stand beside the steps.

Each seed makes as many steps as every other, however many there are, and its replay keeps them all (``Sizes``, SEED_CAPACITY). On an
accelerator there are larger counts, a replay of 1,000,000 frames, and MinAtar where pgx is installed; what is left out is said.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import footprint, spaces
from dqn_jax.bench import report
from dqn_jax.bench.latency import AHEAD, SHAPES, Shape, network_of, observation_space, observations
from dqn_jax.bench.settings import PLAIN, options
from dqn_jax.envs import make, true_successors
from dqn_jax.presets.dqn import DQN, PRESETS, dqn
from dqn_jax.programs import compute_inline, device_per_core
from dqn_jax.seeds import num_in_one_memory, over_seeds
from dqn_jax.training import Result, train
from dqn_jax.types import Agent, AgentState, Transition

REPEATS = 3
SEED_CAPACITY = 50_000  # Transitions that a seed keeps at most.
FILLERS = 50  # Environments that fill a replay together, so that a large one is full soon.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}  # None: as parameters and images are.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what more environments, seeds or larger batches bring."""

    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    spread: bool = False
    """Make each core a device (``dqn_jax.device_per_core``) and measure what that is for: seeds alone."""
    quick: bool = False
    """A little of everything, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured; it is written after every count."""


class Game(NamedTuple):
    """What the compiled loops learn.

    Attributes:
      env_id: for ``dqn_jax.make``.
      env_args: its parameters.
      options: of the agent.
      needs: the package that it needs beyond the required ones, or "".
    """

    env_id: str
    env_args: dict[str, Any]
    options: dict[str, Any]
    needs: str


def _at_once(agent_options: dict[str, Any]) -> dict[str, Any]:
    """The options, but learning begins with the first full batch."""
    return agent_options | {"replay_start_size": agent_options["batch_size"]}


CARTPOLE, MINATAR = "CartPole", "MinAtar Breakout"
GAMES = {
    # As shipped, the JAX version differs from CartPole-v1 in this product.
    CARTPOLE: Game("phys2d/CartPole-v1", {"polemass_length": 0.05}, _at_once(options(PLAIN)), ""),
    MINATAR: Game("pgx/minatar-breakout", {}, _at_once(PRESETS["minatar"]), "pgx"),
}


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      counts: of environments, and of seeds.
      host_steps: transitions of a measured host loop, of all environments together; rounded down to whole updates.
      env_steps: transitions of a compiled loop with several environments, of all together; rounded up to whole rows.
      seed_steps: transitions of each seed.
      games: names out of GAMES, for the compiled loops.
      frames: that the replay of Nature's updates keeps.
      batch_sizes: of Nature's updates.
      learnt: transitions that Nature's updates learn from in one measurement: updates times batch size.
      repeats: measurements of each count.
    """

    counts: tuple[int, ...]
    host_steps: int
    env_steps: int
    seed_steps: int
    games: tuple[str, ...]
    frames: int
    batch_sizes: tuple[int, ...]
    learnt: int
    repeats: int = REPEATS


def sizes(backend: str, quick: bool = False) -> Sizes:
    """How much is measured on a backend.

    Args:
      backend: as ``jax.default_backend()`` names it; whatever is not "cpu" is an accelerator.
      quick: a little of everything.
    """
    if quick:
        return Sizes((16,), 512, 2_048, 512, (CARTPOLE,), 1_000, (32,), 128)
    if backend == "cpu":
        return Sizes((1, 16, 128, 1024), 16_384, 131_072, 2_048, (CARTPOLE,), 20_000, (32, 128), 2_560)
    batch_sizes = (32, 128, 512, 1024, 4096)
    return Sizes((1, 16, 128, 1024, 4096), 16_384, 16_384, 4_096, (CARTPOLE, MINATAR), 1_000_000, batch_sizes, 409_600)


class Done(NamedTuple):
    """What one measurement did.

    Attributes:
      steps: transitions stored, of all environments or seeds together.
      updates: made, of all seeds together.
      seconds: that it took.
    """

    steps: int
    updates: int
    seconds: float


def point(count: int, compile_seconds: float, done: list[Done], replay_bytes: int, counted: str = "steps") -> dict[str, Any]:
    """One count of a series.

    Args:
      count: of environments or seeds, or the batch size.
      compile_seconds: what compilation took.
      done: the measurements.
      replay_bytes: of all replays together.
      counted: the field of ``Done`` that is counted by the second.

    Returns:
      ``count``; ``steps`` and ``updates`` of each measurement; ``compile_seconds``; ``replay_bytes``; the ``median``, ``min`` and ``max``
      of what was done in a second.

    Raises:
      AssertionError: if the measurements made different numbers of steps or updates.
    """
    made = {one._replace(seconds=0.0) for one in done}
    if len(made) != 1:
        raise AssertionError(f"the measurements with {count} differ in what they did, {sorted(made)}: their times do not compare")
    spread = report.spread([getattr(one, counted) / one.seconds for one in done])
    (one,) = made
    counts = {"count": count, "steps": one.steps, "updates": one.updates}
    return {**counts, "compile_seconds": compile_seconds, "replay_bytes": replay_bytes, **spread}


# The host loop.


def host_loop(num_envs: int, steps: int, repeats: int) -> dict[str, Any]:
    """The loop of the user's own, with so many environments.

    Args:
      num_envs: N.
      steps: transitions to measure, of all environments together; rounded down to whole updates.
      repeats: measurements.

    Returns:
      What ``point`` gives.

    Raises:
      ValueError: if no update falls due within the steps, or N and the 4 transitions between updates do not divide one another.
    """
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    make_envs = functools.partial(gymnasium.make_vec, vectorization_mode="sync", vector_kwargs=same_step)
    with contextlib.closing(make_envs("CartPole-v1", num_envs)) as envs:
        agent = DQN(envs, **GAMES[CARTPOLE].options)
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
        done = []
        for seed in range(repeats):
            agent.restore(first._replace(agent=fresh(jax.random.key(seed), example)))
            rows = _play(agent, envs, seed)
            _make(rows, cadence.prefill + cadence.rows)  # The first update is made.
            before, begin = agent.get_statistics(), time.perf_counter()  # The statistics wait for it.
            _make(rows, cycles * cadence.rows)
            after, end = agent.get_statistics(), time.perf_counter()
            done.append(Done(int(after["t"] - before["t"]), int(after["n_updates"] - before["n_updates"]), end - begin))
    return point(num_envs, compile_seconds, done, footprint.num_bytes(first.agent.memory))


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


def environments(game: Game, num_envs: int, steps: int, repeats: int) -> dict[str, Any]:
    """The compiled loop with so many environments that feed one agent.

    Args:
      game: what is learnt.
      num_envs: N.
      steps: transitions of a measurement, of all environments together; rounded up to whole rows.
      repeats: measurements.

    Returns:
      What ``point`` gives.

    Raises:
      ValueError: if N and the transitions between updates do not divide one another, or the replay is too small for N.
      MemoryError: if the replay is larger than the device's memory.
    """
    env = make(game.env_id, **game.env_args)
    # With many points of history the few cycles between two would draw their random numbers in small pieces.
    training = train(dqn(env, **game.options), env, num_steps=steps, num_envs=num_envs, history_length=1)
    return _compiled(training.run, num_envs, [jax.random.key(seed) for seed in range(repeats)])


def seeds(game: Game, count: int, steps: int, repeats: int) -> dict[str, Any]:
    """The compiled loop with so many seeds, each an agent and an environment.

    Args:
      game: what is learnt.
      count: of seeds.
      steps: transitions of each; rounded up as ``dqn_jax.train`` does. Its replay keeps them all, up to SEED_CAPACITY.
      repeats: measurements.

    Returns:
      What ``point`` gives.

    Raises:
      ValueError: if so few steps are left for a seed that it would not learn.
      MemoryError: if all replays together are larger than the device's memory.
    """
    if steps <= game.options["batch_size"]:
        raise ValueError(f"{steps} steps of a seed are too few, learning begins after {game.options['batch_size']}: measure more")
    env = make(game.env_id, **game.env_args)
    agent = dqn(env, **game.options | {"capacity": min(SEED_CAPACITY, steps)})
    training = train(agent, env, num_steps=steps, history_length=1)
    footprint.require_room(jax.eval_shape(training.init, jax.random.key(0)), num_in_one_memory(count))
    run = over_seeds(training.run) if count > 1 else lambda keys: training.run(keys[0])  # One lane would be slower than none.
    return _compiled(run, count, [jax.random.split(jax.random.key(seed), count) for seed in range(repeats)])


def _compiled(run: Callable[[jax.Array], Result], count: int, keys: list[jax.Array]) -> dict[str, Any]:
    """Compiles ``run`` once and calls it with each of the keys."""
    begin = time.perf_counter()
    program = jax.jit(run).lower(keys[0]).compile()
    compile_seconds = time.perf_counter() - begin
    done, replay_bytes = [], 0
    for key in keys:
        begin = time.perf_counter()
        result = jax.block_until_ready(program(key))
        seconds = time.perf_counter() - begin
        done.append(Done(int(np.sum(result.state.step)), int(np.sum(result.state.updates)), seconds))
        replay_bytes = footprint.num_bytes(result.state.memory)
        del result  # Or its replay would stay while the next one is made.
    return point(count, compile_seconds, done, replay_bytes)


# Nature's updates.


def updates(shape: Shape, dtype: Any, batch_sizes: tuple[int, ...], learnt: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Updates of a convolutional network from one replay, which is full, batch size by batch size.

    Args:
      shape: the network, what it sees and the capacity.
      dtype: in which the network computes; None for that of its parameters.
      batch_sizes: with which to learn.
      learnt: transitions to learn from in one measurement, updates times batch size.
      repeats: measurements.

    Yields:
      For each batch size what ``point`` gives.

    Raises:
      ValueError: if a batch is larger than ``learnt``.
    """
    if max(batch_sizes) > learnt:
        raise ValueError(f"an update with a batch of {max(batch_sizes)} learns from more than {learnt} transitions: allow more")
    agent, example = convolutional_agent(shape, dtype, batch_sizes[0]), spaces.example(observation_space(shape), FILLERS)
    fresh = jax.jit(lambda key: agent.init(key, example)._replace(memory=()))  # No state depends on the batch size.
    memory = full_replay(agent, fresh(jax.random.key(0)), shape)
    for batch_size in batch_sizes:
        learner = convolutional_agent(shape, dtype, batch_size)
        draw, program, compile_seconds = _update_programs(learner, fresh, memory, learnt // batch_size)
        done = []
        for seed in range(repeats):
            state = fresh(jax.random.key(seed))
            drawn = jax.block_until_ready(draw(state))
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(program(state._replace(memory=memory), drawn))
            done.append(Done(int(state.step), int(state.updates), time.perf_counter() - begin))
            memory = state.memory  # The program has used up what it was given.
        yield point(batch_size, compile_seconds, done, footprint.num_bytes(memory), "updates")


def _update_programs(agent: Agent, fresh: Any, memory: Any, number: int) -> tuple[Any, Any, float]:
    """From a state without replay to the random numbers of so many updates; the updates, compiled; and what that took, in seconds."""
    draw = jax.jit(lambda state: jax.vmap(lambda counter: agent.draw(state, counter))(jnp.arange(number)))
    state = jax.eval_shape(fresh, jax.random.key(0))
    shapes = state._replace(memory=jax.eval_shape(lambda: memory)), jax.eval_shape(draw, state)
    begin = time.perf_counter()
    update = jax.jit(lambda state, drawn: jax.lax.scan(agent.update, state, drawn), donate_argnums=0)
    program = update.lower(*shapes).compile()
    return draw, program, time.perf_counter() - begin


def convolutional_agent(shape: Shape, dtype: Any, batch_size: int) -> Agent:
    """An agent with this network, computed in this type, one-step targets, and a replay that keeps each frame once."""
    return dqn(
        (observation_space(shape), gymnasium.spaces.Discrete(shape.num_actions)),
        network=network_of(shape).clone(dtype=dtype),
        batch_size=batch_size,
        capacity=shape.capacity,
        frames="stack_last",
        replay_start_size=batch_size,
        n_steps=1,
    )


def full_replay(agent: Agent, state: AgentState, shape: Shape) -> Any:
    """A replay that FILLERS environments have filled, each with one endless episode; ``state`` has no replay and is used up."""
    seen, ones, columns = jnp.asarray(np.stack(observations(shape))), jnp.ones(FILLERS), jnp.arange(FILLERS)

    def add(i: Any, state: AgentState) -> AgentState:
        observation, successor = seen[(i + columns) % AHEAD], seen[(i + 1 + columns) % AHEAD]
        action = (i + columns) % shape.num_actions
        return agent.observe(state, Transition(observation, action.astype(jnp.int32), ones * (i % 7), ones, successor, ones > 1))

    empty = jax.jit(lambda key: agent.init(key, spaces.example(observation_space(shape), FILLERS)).memory)
    fill = jax.jit(lambda state: jax.lax.fori_loop(0, shape.capacity // FILLERS, add, state), donate_argnums=0)
    return jax.block_until_ready(fill(state._replace(memory=empty(state.key)))).memory


# All together.


def missing(chosen: Sizes) -> dict[str, str]:
    """The games that are left out, and why."""
    why = {name: "on accelerators only, and not where it has to be quick" for name in GAMES if name not in chosen.games}
    for name in chosen.games:
        needs = GAMES[name].needs
        if needs and importlib.util.find_spec(needs) is None:
            why[name] = f"it needs {needs}: pip install 'dqn_jax[{needs}]'"
    return why


def plan(chosen: Sizes) -> dict[str, tuple[str, str, Iterator[dict[str, Any]]]]:
    """For each series by its name: what is counted along it, the unit, and its points, which are measured when they are asked for."""
    counts, repeats = chosen.counts, chosen.repeats
    per_second = "steps per second"
    series: dict[str, tuple[str, str, Iterator[dict[str, Any]]]] = {
        "host loop, CartPole": ("environments", per_second, (host_loop(count, chosen.host_steps, repeats) for count in counts)),
    }
    nature = SHAPES["Nature"]._replace(capacity=chosen.frames)
    for name in (name for name in chosen.games if name not in missing(chosen)):
        # Bound now: a generator would look the game up when it is asked for its points, after the last one.
        several = functools.partial(environments, GAMES[name], steps=chosen.env_steps, repeats=repeats)
        many = functools.partial(seeds, GAMES[name], steps=chosen.seed_steps, repeats=repeats)
        series[f"compiled loop, environments, {name}"] = ("environments", per_second, map(several, counts))
        series[f"compiled loop, seeds, {name}"] = ("seeds", per_second, map(many, counts))
    for name, dtype in DTYPES.items():
        points = updates(nature, dtype, chosen.batch_sizes, chosen.learnt, repeats)
        series[f"Nature updates, {name}"] = ("batch size", "updates per second", points)
    return series


def measure(quick: bool = False, keep: Callable[[dict[str, Any]], None] | None = None, seeds_only: bool = False) -> dict[str, Any]:
    """Everything, on the default backend.

    Args:
      quick: a little of everything.
      keep: is given what has been measured so far, after each count.
      seeds_only: leave out what is not counted along seeds.

    Returns:
      As ``measure_sizes``.
    """
    return measure_sizes(sizes(jax.default_backend(), quick), keep, seeds_only)


def measure_sizes(chosen: Sizes, keep: Callable[[dict[str, Any]], None] | None = None, seeds_only: bool = False) -> dict[str, Any]:
    """Everything, at these sizes.

    Args:
      chosen: how much.
      keep: is given what has been measured so far, after each count.
      seeds_only: leave out what is not counted along seeds.

    Returns:
      ``device``; ``sizes``; ``left_out``: games and why; ``series``: by name the ``axis`` (what is counted along it), the ``unit`` and the
      ``points``, each as ``point`` gives it.

    Raises:
      ValueError: if a size does not fit a count.
      MemoryError: if replays are larger than the device's memory.
    """
    series: dict[str, Any] = {}
    measured = {"device": str(jax.devices()[0]), "sizes": chosen._asdict(), "left_out": missing(chosen), "series": series}
    for name, (axis, unit, points) in plan(chosen).items():
        if seeds_only and axis != "seeds":
            continue
        series[name] = {"axis": axis, "unit": unit, "points": []}
        for one in points:
            series[name]["points"].append(one)
            if keep is not None:
                keep(measured)
    return measured


def curves(measured: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """What ``measure`` gives, for plotting: for each series the counts, and the medians, in the series' unit."""
    return {
        name: ([one["count"] for one in series["points"]], [one["median"] for one in series["points"]])
        for name, series in measured["series"].items()
    }


def show(measured: dict[str, Any]) -> None:
    """Prints what ``measure`` gives."""
    for name, series in measured["series"].items():
        head = (series["axis"], series["unit"], "range", "compile s", "steps", "updates", "replay MB")
        rows = [
            (
                f"{one['count']:,}",
                f"{one['median']:,.1f}",
                f"{one['min']:,.1f}-{one['max']:,.1f}",
                f"{one['compile_seconds']:.1f}",
                f"{one['steps']:,}",
                f"{one['updates']:,}",
                f"{one['replay_bytes'] / 1e6:,.1f}",
            )
            for one in series["points"]
        ]
        report.table(f"{name}, on {measured['device']}", head, rows)
    for name, why in measured["left_out"].items():
        print(f"\n{name} is left out: {why}", flush=True)


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline and options.spread:
        raise SystemExit("--inline asks for one device and --spread for one for each core: give one of them")
    if options.inline:
        compute_inline()
    if options.spread:
        device_per_core()
    threads = {"inline": options.inline, "spread": options.spread}

    def keep(measured: dict[str, Any]) -> None:
        report.write(options.out, {**threads, **measured})

    report.run(functools.partial(measure, keep=keep, seeds_only=options.spread), show, options.quick, options.out, **threads)


if __name__ == "__main__":
    report.command(main)
