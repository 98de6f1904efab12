"""Whether an update of DQN and the step of Atari games overlap, and what that gains: ``python -m dqn_jax.bench.atari``.

One agent in one process, in short turns: as the host loop runs, where the update goes on while the games step, and with a wait for the
update before each step. Needs ale-py (the extra ``atari``).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dqn_jax import atari
from dqn_jax.bench import report
from dqn_jax.envs import true_successors
from dqn_jax.presets.dqn import DQN
from dqn_jax.presets.dqn_sets import PRESETS
from dqn_jax.programs import compute_inline
from dqn_jax.stepper import METRICS


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured: the preset atari in Pong."""

    num_envs: int = 8
    """Games."""
    update_interval: int = 4
    """Transitions between updates; it and num_envs must divide one another."""
    batch_size: int = 32
    """Transitions in a batch."""
    rows: int = 10
    """Steps of all games in a turn."""
    repeats: int = 15
    """Turns of each kind."""
    inline: bool = False
    """Compute on one thread, as compute_inline() does."""
    quick: bool = False
    """A little, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """File for the results, JSON."""


def measure(agent: DQN, envs: Any, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a row, overlapped and waited, in turns, and of the games' steps alone.

    Args:
      agent: for these games; it learns from the 32nd row on at the latest.
      envs: as ``atari.make_vec`` makes them.
      rows: of a turn.
      repeats: turns of each kind.
    """
    state = [envs.reset(seed=0)[0], np.zeros(envs.num_envs, np.int64)]
    state[1] = agent.batch_act_and_train(state[0])

    def wait() -> None:
        jax.block_until_ready(agent._stepper._cell[METRICS])  # There is no public way to wait for an update without copying.

    def turn(number: int, waits: bool) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(number):
            if waits:
                wait()
            observation, reward, terminated, truncated, infos = envs.step(state[1])
            successor = true_successors(observation, infos, terminated | truncated)
            state[:] = observation, agent.batch_act_and_train(observation, np.clip(reward, -1, 1), terminated, truncated, successor)
        wait()
        return 1e3 * (time.perf_counter() - begin) / number

    turn(32, False)
    milliseconds: dict[str, list[float]] = {"overlapped": [], "waited": [], "games alone": []}
    for _ in range(repeats):
        milliseconds["overlapped"].append(turn(rows, False))
        milliseconds["waited"].append(turn(rows, True))
        begin = time.perf_counter()
        for _ in range(rows):
            envs.step(state[1])
        milliseconds["games alone"].append(1e3 * (time.perf_counter() - begin) / rows)
        agent.stop_episode()  # It has not seen these.
    return {kind: report.spread(values) for kind, values in milliseconds.items()}


def main() -> None:
    """Measures, prints a table, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    envs = atari.make_vec("ALE/Pong-v5", options.num_envs)
    learning: dict[str, Any] = {"update_interval": options.update_interval, "batch_size": options.batch_size}
    agent = DQN(envs, **{**PRESETS["atari"], "capacity": 20_000, "replay_start_size": 4 * options.num_envs, **learning})
    measured = measure(agent, envs, *(2, 2) if options.quick else (options.rows, options.repeats))
    report.show(f"milliseconds of a step of {options.num_envs} games", measured)
    report.write(options.out, {"device": str(jax.devices()[0]), "row_ms": measured})


if __name__ == "__main__":
    report.command(main)
