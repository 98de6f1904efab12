"""How long single calls take: ``python -m dqn_jax.bench.latency [--inline] [--out FILE.json]``.

Microseconds, 50th, 95th and 99th percentile, each call blocked until its results are ready:

* ``act``, beside the bare network under ``jax.jit`` with argmax and the action read back: as one writes it, ``int(choose(params,
  observation))``, and lean, with the parameters as a flat tuple and read back by NumPy, the leanest way found so far. Where torch
  is installed, beside PyTorch's eager forward pass on one thread: a NumPy observation goes in, a Python int comes out;
* ``act_and_train``, apart for calls in which an update falls due (every fourth) and calls in which none does (of
  these the first after an update is the slowest);
* the bare compiled update with its batch drawn from a full replay; its random numbers are drawn before.

Observations are drawn before; there is no environment. Contenders take turns in chunks of calls, so that noise hits all alike; the first
calls of a chunk, which find the caches cold, are not counted. The garbage collector is left as it is. Slow calls are made
fewer times: the number stands beside the percentiles.
"""

import dataclasses
import importlib.util
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import networks, spaces
from dqn_jax.bench import report
from dqn_jax.presets.dqn import DQN
from dqn_jax.programs import compute_inline
from dqn_jax.stepper import METRICS
from dqn_jax.types import AgentState, Transition

CALLS, TURNS = 2_000, 20
BUDGET = 10.0  # Seconds for each contender: a call that takes longer than BUDGET / CALLS is made fewer times.
PERIOD = 4  # Transitions between updates.
AHEAD = 256  # Observations and random numbers drawn beforehand; then they come again.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures how long single calls take."""

    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """A little of everything: the small network and one batch size."""
    out: Path | None = None
    """A JSON file for everything measured."""


class Shape(NamedTuple):
    """A network and what it sees.

    Attributes:
      observation: the shape of one observation: float32 if it is a vector, a stack of frames, uint8, if it has three axes (H, W, C).
      convolutions: (filters, kernel size, stride) of each.
      hidden: widths of the layers after them.
      num_actions: the number of actions.
      batch_sizes: with which to learn.
      capacity: transitions (frames, for images) in the replay.
    """

    observation: tuple[int, ...]
    convolutions: tuple[tuple[int, int, int], ...]
    hidden: tuple[int, ...]
    num_actions: int
    batch_sizes: tuple[int, ...]
    capacity: int


SHAPES = {
    "2x64": Shape((4,), (), (64, 64), 2, (32, 128, 1024), 50_000),
    "3x128": Shape((4,), (), (128, 128, 128), 2, (32, 128, 1024), 50_000),
    "3x512": Shape((4,), (), (512, 512, 512), 2, (32, 128, 1024), 50_000),
    "Nature": Shape((84, 84, 4), networks.NATURE, (512,), 6, (32,), 20_000),
}
QUICK = {"2x64": SHAPES["2x64"]._replace(batch_sizes=(32,), capacity=1_000)}


class Contender(NamedTuple):
    """Something to time.

    Attributes:
      call: makes one call, and waits for its results.
      kinds: to which series its calls belong, in turn.
    """

    call: Callable[[], Any]
    kinds: tuple[str, ...]


def time_in_turns(contenders: list[Contender], calls: int = CALLS, budget: float = BUDGET) -> dict[str, dict[str, float]]:
    """Times the contenders, which take turns.

    Args:
      contenders: what to time.
      calls: of each kind, as long as one contender's all take no longer than
      budget: seconds.

    Returns:
      For each kind the percentiles of its calls in microseconds, as ``report.percentiles`` gives them.
    """
    series: dict[str, list[float]] = {kind: [] for contender in contenders for kind in contender.kinds}
    chunks = [max(1, round(min(calls, budget / _seconds_of_round(contender)) / TURNS)) for contender in contenders]
    for _ in range(TURNS):
        for contender, chunk in zip(contenders, chunks, strict=True):
            for _ in contender.kinds:
                contender.call()
            for kind in contender.kinds * chunk:
                begin = time.perf_counter()
                contender.call()
                series[kind].append(1e6 * (time.perf_counter() - begin))
    return {kind: report.percentiles(microseconds) for kind, microseconds in series.items()}


def _seconds_of_round(contender: Contender) -> float:
    """How long one call of each kind takes, compiled before."""
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        for _ in contender.kinds:
            contender.call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def observation_space(shape: Shape) -> gymnasium.spaces.Box:
    """The space of what the network sees."""
    if len(shape.observation) == 1:
        return gymnasium.spaces.Box(-np.inf, np.inf, shape.observation, np.float32)
    return gymnasium.spaces.Box(0, 255, shape.observation, np.uint8)


def observations(shape: Shape) -> list[np.ndarray]:
    """Observations to go round in circles with: vectors drawn at random, or stacks each of which adds one frame to the one before."""
    random = np.random.default_rng(0)
    if len(shape.observation) == 1:
        return list(random.normal(size=(AHEAD, *shape.observation)).astype(np.float32))
    *sides, depth = shape.observation
    frames = random.integers(0, 256, (AHEAD, *sides)).astype(np.uint8)
    return [np.stack([frames[(i + j) % AHEAD] for j in range(depth)], axis=-1) for i in range(AHEAD)]


def network_of(shape: Shape) -> networks.QNetwork | networks.ConvQNetwork:
    """The network."""
    if not shape.convolutions:
        return networks.QNetwork(shape.num_actions, shape.hidden)
    return networks.ConvQNetwork(shape.num_actions, shape.convolutions, shape.hidden, spaces.image(observation_space(shape)))


def make_agent(shape: Shape, batch_size: int, prioritized: bool, state: AgentState | None = None) -> DQN:
    """An agent with this network, one-step targets, and an update every fourth transition."""
    return DQN(
        (observation_space(shape), gymnasium.spaces.Discrete(shape.num_actions)),
        state=state,
        network=network_of(shape),
        batch_size=batch_size,
        prioritized=prioritized,
        capacity=shape.capacity,
        frames="stack_last" if shape.convolutions else "off",
        update_interval=PERIOD,
        replay_start_size=batch_size,
        n_steps=1,
    )


def fill(agent: DQN, shape: Shape) -> AgentState:
    """The state of an agent whose replay is full of one endless episode."""
    seen = jnp.asarray(np.stack(observations(shape)))
    one = jnp.ones(1)

    def add(i: Any, state: AgentState) -> AgentState:
        observation, successor = seen[i % AHEAD][None], seen[(i + 1) % AHEAD][None]
        action = (i % shape.num_actions)[None].astype(jnp.int32)
        return agent.agent.observe(state, Transition(observation, action, one * (i % 7), one, successor, one > 1))

    fill_all = jax.jit(lambda state: jax.lax.fori_loop(0, 2 * shape.capacity, add, state), donate_argnums=0)
    return jax.block_until_ready(fill_all(agent.state))


def acting(shape: Shape) -> list[Contender]:
    """The greedy choice of the agent, of the bare network in two ways, and of PyTorch."""
    agent, network, seen = make_agent(shape, shape.batch_sizes[0], False), network_of(shape), observations(shape)
    params = agent.learner.params
    leaves, structure = jax.tree.flatten(params)
    flat = tuple(leaves)

    def choose(params: Any, observation: Any) -> jax.Array:
        return jnp.argmax(network.apply(params, observation[None])[0])

    bare = jax.jit(choose)
    lean = jax.jit(lambda flat, observation: choose(jax.tree.unflatten(structure, flat), observation))
    for_act, for_bare, for_lean = (itertools.cycle(seen) for _ in range(3))
    contenders = [
        Contender(lambda: agent.act(next(for_act)), ("act",)),
        Contender(lambda: int(bare(params, next(for_bare))), ("bare network",)),
        Contender(lambda: int(np.asarray(lean(flat, next(for_lean)))), ("bare network, lean",)),
    ]
    if importlib.util.find_spec("torch"):
        for_torch, choose_eagerly = itertools.cycle(seen), torch_choice(shape)
        contenders.append(Contender(lambda: choose_eagerly(next(for_torch)), ("PyTorch, eager",)))
    return contenders


def torch_choice(shape: Shape) -> Callable[[np.ndarray], int]:
    """The greedy choice by the same network in PyTorch, on one thread, as its users write it; it sees the frames first."""
    import torch

    torch.set_num_threads(1)
    model = torch_network(shape)

    @torch.inference_mode()
    def choose(observation: np.ndarray) -> int:
        x = torch.from_numpy(observation)
        if shape.convolutions:
            x = x.permute(2, 0, 1).float() / 255
        return int(model(x[None]).argmax(dim=1))

    return choose


def torch_network(shape: Shape) -> Any:
    """The network as a ``torch.nn.Sequential``, with PyTorch's own initialisation."""
    from torch import nn

    layers: list[nn.Module] = []
    width = shape.observation[0]
    if shape.convolutions:
        side, _, channels = shape.observation
        for filters, size, stride in shape.convolutions:
            layers += [nn.Conv2d(channels, filters, size, stride), nn.ReLU()]
            side, channels = (side - size) // stride + 1, filters
        layers.append(nn.Flatten())
        width = side * side * channels
    for features in shape.hidden:
        layers += [nn.Linear(width, features), nn.ReLU()]
        width = features
    return nn.Sequential(*layers, nn.Linear(width, shape.num_actions))


def bare_update(agent: DQN, state: AgentState) -> Callable[[], Any]:
    """A function that makes one update, in place, each time with other random numbers; ``state`` is used up."""
    update = jax.jit(agent.agent.update, donate_argnums=0)
    drawn = jax.jit(jax.vmap(lambda counter: agent.agent.draw(state, counter)))(jnp.arange(AHEAD))
    draws = itertools.cycle([jax.tree.map(lambda leaf, i=i: leaf[i], drawn) for i in range(AHEAD)])
    cell = [state]

    def call() -> None:
        cell[0], metrics = update(cell[0], next(draws))
        jax.block_until_ready(metrics)  # All results of a program are ready at once, and to ask each array takes its time.

    return call


def learning(shape: Shape, batch_size: int, prioritized: bool) -> list[Contender]:
    """``act_and_train``, and the bare update."""
    empty = make_agent(shape, batch_size, prioritized)
    full = fill(empty, shape)
    # The steps so far are a multiple of the period, and the first call completes no transition.
    agent, seen = make_agent(shape, batch_size, prioritized, full), itertools.cycle(observations(shape))
    agent.act_and_train(next(seen), 0.0)

    def call() -> None:
        agent.act_and_train(next(seen), 1.0)
        jax.block_until_ready(agent._stepper._cell[METRICS])  # There is no public way to wait for an update without copying.

    without, due = "act_and_train, no update due", "act_and_train, with an update"
    return [Contender(call, (*(PERIOD - 1) * (without,), due)), Contender(bare_update(empty, full), ("bare update",))]


def measure(quick: bool = False) -> dict[str, Any]:
    """All percentiles in microseconds.

    Args:
      quick: a little of everything.

    Returns:
      ``device``; ``acting``: for each network the kinds of greedy choice; ``learning``: for each network, batch size and memory the
      calls that learn; each as ``time_in_turns`` gives them.
    """
    calls, budget = (40, 0.5) if quick else (CALLS, BUDGET)
    shapes = QUICK if quick else SHAPES
    learnt: dict[str, Any] = {}
    for name, shape in shapes.items():
        for batch_size, prioritized in itertools.product(shape.batch_sizes, (False, True)):
            work = f"{name}, batch {batch_size}, {'prioritized' if prioritized else 'uniform'}"
            learnt[work] = time_in_turns(learning(shape, batch_size, prioritized), calls, budget)
    chosen = {name: time_in_turns(acting(shape), calls, budget) for name, shape in shapes.items()}
    return {"device": str(jax.devices()[0]), "acting": chosen, "learning": learnt}


def show(measured: dict[str, Any]) -> None:
    """Prints what ``measure`` gives."""
    head = ("", "p50", "p95", "p99", "calls")
    for work, kinds in (measured["acting"] | measured["learning"]).items():
        rows = [(kind, *(f"{us[p]:,.0f}" for p in ("p50", "p95", "p99")), f"{us['calls']:,}") for kind, us in kinds.items()]
        report.table(f"microseconds of a call, {work}, on {measured['device']}", head, rows)
        if "act" in kinds:
            others = [f"{kinds['act']['p50'] / us['p50']:.2f} times {kind}" for kind, us in kinds.items() if kind != "act"]
            print(f"  act takes {' and '.join(others)}, by p50")


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    report.run(measure, show, options.quick, options.out, inline=options.inline)


if __name__ == "__main__":
    report.command(main)
