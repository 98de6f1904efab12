"""One measurement of one loop, in a process of its own: ``python -m dqn_jax.bench.one_loop SPEC``, as ``loops.py`` asks for it.

SPEC and what is printed are JSON: ``name`` of the contender, perhaps with the way in which JAX computes behind it, ``work``, the fields of
a ``Work``, ``seed``, and ``evaluate``; the result is that of ``measure_host`` or ``measure_compiled``.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import jax
import numpy as np

from dqn_jax.bench import compiled_loops, host_loops, libtorch, machine, peers, torch_loops
from dqn_jax.bench.settings import DECK, PLAIN, Setting
from dqn_jax.envs import make
from dqn_jax.play import play_greedily
from dqn_jax.programs import compute_inline, device_per_core
from dqn_jax.seeds import over_seeds

HOST_BEGIN = 2_000
HOST: dict[str, Callable[..., host_loops.HostLoop | torch_loops.Loop]] = {
    "ours": host_loops.ours,
    "cleanrl-style": peers.cleanrl_style,
    "numpy-replay": host_loops.numpy_replay,
    **torch_loops.LOOPS,
}
LIBTORCH = "libtorch"  # The host contender that is a program of its own.
COMPILED: dict[str, Callable[..., Callable[[Any], compiled_loops.Outcome]]] = {
    "ours": compiled_loops.ours,
    "purejaxrl-style": compiled_loops.purejaxrl_style,
    "rejax": peers.rejax,
}
EVALUATION_EPISODES = 20
# Behind the name of a contender that is measured so: with JAX on one thread, or with the seeds spread over the cores.
INLINE, SPREAD = ", inline", ", a device per core"
SET_UP = {SPREAD: device_per_core, INLINE: compute_inline, "": lambda: None}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
      kind: "host" or "compiled".
      interval: transitions between updates.
      steps: environment steps, of each seed.
      seeds: trained at once (1 for host loops).
      begin: the step at which a host loop's timed window begins; it ends with the last one.
      deck: whether the setting is the slide deck's, but for the interval, and not the plain one.
    """

    kind: str
    interval: int
    steps: int
    seeds: int = 1
    begin: int = HOST_BEGIN
    deck: bool = False

    @property
    def setting(self) -> Setting:
        """What the loops do."""
        return (DECK if self.deck else PLAIN)._replace(interval=self.interval)

    @property
    def title(self) -> str:
        """One line about it."""
        whose = "the deck's" if self.deck else "the plain"
        what = f"{self.kind} loop, {whose} setting, an update every {self.interval} steps"
        if self.kind == "host":
            explored = ", after exploration" if self.begin >= self.setting.epsilon[2] else ""
            return f"{what}, steps {self.begin:,} to {self.steps:,}{explored}"
        return f"{what}, {self.seeds} seed{'s'[: self.seeds > 1]}, {self.steps:,} steps each"


class Clock(gymnasium.Wrapper):
    """Calls ``marks[n]()`` when n steps have been made, so that everybody's steps are counted and timed at the same place."""

    def __init__(self, env: gymnasium.Env, marks: dict[int, Callable[[], None]]):
        super().__init__(env)
        self._marks, self._steps = marks, 0

    def step(self, action: Any) -> Any:
        """Steps, then tells."""
        result = self.env.step(action)
        self._steps += 1
        if self._steps in self._marks:
            self._marks[self._steps]()
        return result


def measure_host(name: str, work: Work, seed: int, evaluate: bool) -> dict[str, Any]:
    """One measurement of a host loop, in this process.

    Args:
      name: of the contender.
      work: what to do.
      seed: of everything random.
      evaluate: whether to report the greedy return at the end.

    Returns:
      What ``machine.timing`` tells, the ``updates`` made in the timed window, and ``returns``.
    """
    if name == LIBTORCH:
        result = libtorch.run(libtorch.build(libtorch.cache()), work.setting, work.steps, work.begin, seed)
        return result if evaluate else {key: value for key, value in result.items() if key != "returns"}
    seen: dict[str, Any] = {}

    # Counting stays outside of the window.
    def begin() -> None:
        seen["updates"] = loop.updates()
        seen["begin"] = machine.now()

    def end() -> None:
        seen["end"] = machine.now()
        seen["updates"] = loop.updates() - seen["updates"]

    env = Clock(gymnasium.make("CartPole-v1"), {work.begin: begin, work.steps: end})
    loop = host_loops.HostLoop(*HOST[name](env, work.setting, work.steps, seed))
    loop.run()
    result = machine.timing(seen["begin"], seen["end"], work.steps - work.begin) | {"updates": seen["updates"]}
    if evaluate:
        result["returns"] = [
            play_greedily(loop.greedy, gymnasium.make("CartPole-v1"), 10_000 + episode) for episode in range(EVALUATION_EPISODES)
        ]
    return result


def measure_compiled(name: str, work: Work, seed: int) -> dict[str, Any]:
    """One measurement of a compiled loop, in this process; arguments and result as ``measure_host``, and ``compile_seconds``."""
    # As shipped, the JAX version differs from CartPole-v1 in this product.
    env = make("phys2d/CartPole-v1", polemass_length=0.05)
    steps = compiled_loops.compiled_steps(env, work.setting, work.steps)
    run = COMPILED[name](env, work.setting, steps)

    def mapped(function: Any) -> Any:
        return jax.jit(over_seeds(function) if work.seeds > 1 else function)  # On one device it is ``jax.vmap``.

    key = jax.random.key(seed)
    keys = jax.random.split(key, work.seeds) if work.seeds > 1 else key
    begin = machine.now()
    compiled = mapped(run).lower(keys).compile()
    compile_seconds = machine.now().wall - begin.wall
    begin = machine.now()
    outcome = jax.block_until_ready(compiled(keys))
    result = machine.timing(begin, machine.now(), steps * work.seeds)
    made = {int(steps) for steps in np.atleast_1d(outcome.steps)}
    if made != {steps}:
        raise AssertionError(f"{name} made {made} steps where {steps} were asked for")
    (updates,) = {int(updates) for updates in np.atleast_1d(outcome.updates)}  # A seed with another number is an error.

    def evaluate(params: Any, key: Any) -> Any:
        return compiled_loops.greedy_returns(env, work.setting, params, key, EVALUATION_EPISODES).mean()

    returns = mapped(evaluate)(outcome.params, keys)
    device = jax.devices()[0].device_kind
    return result | {"updates": updates, "device": device, "compile_seconds": compile_seconds, "returns": np.atleast_1d(returns).tolist()}


def without_way(name: str) -> tuple[str, str]:
    """From a name as ``in_each_way`` gives it the contender's, and what stands behind it."""
    contender, comma, way = name.partition(", ")
    return contender, comma + way


def measure(spec: str) -> dict[str, Any]:
    """The measurement that the text asks for."""
    asked = json.loads(spec)
    work = Work(**asked["work"])
    name, way = without_way(asked["name"])
    SET_UP[way]()
    if work.kind == "compiled":
        return measure_compiled(name, work, asked["seed"])
    return measure_host(name, work, asked["seed"], asked["evaluate"])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
