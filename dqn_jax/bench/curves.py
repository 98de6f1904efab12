"""Learning curves in environment steps beside SB3's DQN and CleanRL's: ``python -m dqn_jax.bench.curves --task CartPole-v1``.

Everybody steps the same Gymnasium environment for the same number of steps, with settings of its own: ours the preset of the task, SB3's
those of its zoo, CleanRL's those of its script, with the schedule of epsilon drawn out over these steps, as the script has it. Returns are
those of the episodes played while learning, and greedy ones of the end. Speed is not compared here.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from dqn_jax.bench import host_loops, peers, report
from dqn_jax.bench.host_loops import HostLoop
from dqn_jax.bench.settings import Setting
from dqn_jax.play import play_greedily
from dqn_jax.presets.dqn import DQN
from dqn_jax.presets.dqn_sets import C51_PRESETS, IQN_PRESETS, PRESETS, QRDQN_PRESETS, RAINBOW_PRESETS
from dqn_jax.programs import compute_inline
from dqn_jax.statistics import bootstrap_interval, iqm

STEPS = {"CartPole-v1": 50_000, "Acrobot-v1": 100_000, "LunarLander-v3": 100_000}
EPISODES = 20  # Greedy ones at the end.
POINTS = 10  # Of a curve: tenths of the steps.
OURS = {"dqn": PRESETS, "c51": C51_PRESETS, "qrdqn": QRDQN_PRESETS, "iqn": IQN_PRESETS, "rainbow": RAINBOW_PRESETS}
OUR_SET = {"CartPole-v1": "default", "Acrobot-v1": "default", "LunarLander-v3": "lunarlander"}
# SB3's zoo, hyperparams/dqn.yml; its LunarLander is version 2, which Gymnasium no longer has.
_LANDER: dict[str, Any] = {
    "learning_rate": 6.3e-4,
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 0,
    "gamma": 0.99,
    "target_update_interval": 250,
    "train_freq": 4,
    "gradient_steps": -1,
    "exploration_fraction": 0.12,
    "exploration_final_eps": 0.1,
    "policy_kwargs": {"net_arch": [256, 256]},
}
ZOO: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1_000,
        "gamma": 0.99,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "policy_kwargs": {"net_arch": [256, 256]},
    },
    "Acrobot-v1": _LANDER,
    "LunarLander-v3": _LANDER,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws learning curves of several seeds of each contender."""

    task: str = "CartPole-v1"
    """CartPole-v1, Acrobot-v1 or LunarLander-v3."""
    contenders: tuple[str, ...] = ("dqn", "sb3", "cleanrl-style")
    """Which: dqn, c51, qrdqn, iqn and rainbow are ours; sb3 and cleanrl-style need stable_baselines3."""
    seeds: int = 5
    """Runs of each contender."""
    seed: int = 1000
    """The first of them; the others follow."""
    steps: int | None = None
    """Environment steps of a run; by default the task's."""
    out: Path | None = None
    """A JSON file for everything measured."""


class Episodes(gymnasium.Wrapper):
    """Notes each episode's return, and at which step it ended."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.ended: list[tuple[int, float]] = []
        self._steps, self._total = 0, 0.0

    def step(self, action: Any) -> Any:
        """As the environment's."""
        result = self.env.step(action)
        self._steps, self._total = self._steps + 1, self._total + float(result[1])
        if result[2] or result[3]:
            self.ended.append((self._steps, self._total))
            self._total = 0.0
        return result


def sb3(env: gymnasium.Env, task: str, steps: int, seed: int) -> HostLoop:
    """SB3's DQN with its zoo's options, on one torch thread."""
    import torch
    from stable_baselines3 import DQN as SB3DQN

    torch.set_num_threads(1)
    model = SB3DQN("MlpPolicy", env, **ZOO[task], seed=seed, device="cpu")

    def run() -> None:
        model.learn(steps)

    return HostLoop(run, lambda observation: int(model.predict(observation, deterministic=True)[0]), lambda: model._n_updates)


def cleanrl_style(env: gymnasium.Env, task: str, steps: int, seed: int) -> HostLoop:
    """A loop after CleanRL's dqn_jax with the script's options."""
    setting = Setting((120, 84), 128, 10, 1, 10_000, 10_000, 0.99, 2.5e-4, (1.0, 0.05, steps // 2), 500, False)
    return peers.cleanrl_style(env, setting, steps, seed)


def ours(env: gymnasium.Env, task: str, steps: int, seed: int, *, algo: str) -> HostLoop:
    """This package's agent, step by step."""
    sets = OURS[algo]
    return host_loops.around(DQN(env, seed=seed, **sets.get(OUR_SET[task], sets["default"])), env, steps, seed)


CONTENDERS: dict[str, Callable[..., HostLoop]] = {
    **{algo: functools.partial(ours, algo=algo) for algo in OURS},
    "sb3": sb3,
    "cleanrl-style": cleanrl_style,
}


def measure(task: str, contender: str, steps: int, seed: int) -> dict[str, Any]:
    """One run: the mean return of the episodes that ended in each tenth of the steps, and the mean greedy return at the end."""
    env = Episodes(gymnasium.make(task))
    loop = CONTENDERS[contender](env, task, steps, seed)
    loop.run()
    ends, returns = np.array(env.ended or np.zeros((0, 2))).T
    tenth = np.minimum(POINTS * (ends - 1) // steps, POINTS - 1)
    curve = [float(returns[tenth == i].mean()) if (tenth == i).any() else None for i in range(POINTS)]
    other = gymnasium.make(task)
    greedy = [play_greedily(loop.greedy, other, 10_000 + seed + episode) for episode in range(EPISODES)]
    return {"seed": seed, "updates": loop.updates(), "curve": curve, "greedy": float(np.mean(greedy))}


def show(task: str, steps: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Prints a table: for each contender the IQM over seeds at some points of the curve, and of the greedy return with its interval."""
    shown = (0, 1, 2, 4, 6, 9)
    rows = []
    for contender, own in runs.items():
        points = [np.array([run["curve"][i] for run in own if run["curve"][i] is not None]) for i in shown]
        greedy = np.array([run["greedy"] for run in own])
        low, high = bootstrap_interval(greedy)
        curve = [f"{iqm(point):.0f}" if len(point) else "-" for point in points]
        rows.append((contender, *curve, f"{iqm(greedy):.0f} ({low:.0f} to {high:.0f})", f"{own[0]['updates']:,}"))
    head = ("contender", *(f"{steps // POINTS * (i + 1):,}" for i in shown), "greedy at the end", "updates")
    report.table(f"{task}, {steps:,} steps: return while learning, by the steps made; IQM of {len(own)} seeds", head, rows)


def main() -> None:
    """Runs, prints a line for each run and a table at the end, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if unknown := [name for name in (options.task, *options.contenders) if name not in (*STEPS, *CONTENDERS)]:
        sys.exit(f"unknown: {', '.join(unknown)}; there are the tasks {', '.join(STEPS)} and the contenders {', '.join(CONTENDERS)}")
    compute_inline()
    steps = STEPS[options.task] if options.steps is None else options.steps
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in options.contenders}
    for seed in range(options.seed, options.seed + options.seeds):
        for contender, own in runs.items():
            own.append(measure(options.task, contender, steps, seed))
            print(contender, json.dumps(own[-1]), flush=True)
            report.write(options.out, {"task": options.task, "steps": steps, "runs": runs})
    show(options.task, steps, runs)


if __name__ == "__main__":
    report.command(main)
