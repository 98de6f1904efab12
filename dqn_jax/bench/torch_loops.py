"""Host loops on PyTorch: by hand, Stable-Baselines3's and PFRL's; and, run as a program, the memory that training with one takes.

``python -P torch_loops.py '{"name": "torch", "setting": {...}, "steps": 10000}'``, by the path of this file, is how ``memory.py`` has it
measured. So that what stands in memory is PyTorch and not JAX, this file imports nothing of its own package, whose first import is
JAX: for a type checker alone it knows ``Setting``, and its loops are plain tuples.
"""

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

if TYPE_CHECKING:
    from dqn_jax.bench.settings import Setting

Loop = tuple[Callable[[], None], Callable[[np.ndarray], int], Callable[[], int]]
"""What ``host_loops.HostLoop`` is made of: ``run``, ``greedy`` and ``updates``."""


def epsilon_at(setting: "Setting", step: int) -> float:
    """The chance of a random action after ``step`` transitions, as ``settings.epsilon_at`` has it, which also takes arrays of JAX."""
    start, end, decay_steps = setting.epsilon
    return start + (end - start) * min(step / decay_steps, 1.0)


def torch_eager(env: gymnasium.Env, setting: "Setting", steps: int, seed: int) -> Loop:
    """The whole algorithm by hand in eager PyTorch on one thread: NumPy replay, targets without a graph, the fused Adam."""
    import torch
    from torch import nn as torch_nn

    torch.set_num_threads(1)
    torch.manual_seed(seed)

    def network() -> torch_nn.Sequential:
        layers: list[torch_nn.Module] = []
        width = 4
        for following in setting.hidden:
            layers += [torch_nn.Linear(width, following), torch_nn.ReLU()]
            width = following
        return torch_nn.Sequential(*layers, torch_nn.Linear(width, 2))

    online, target = network(), network()
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=setting.learning_rate, fused=True)
    replay, rng = WindowReplay(setting, seed), random.Random(seed)
    updates = 0

    @torch.inference_mode()
    def greedy(observation: np.ndarray) -> int:
        left, right = online(torch.from_numpy(observation)).tolist()
        return int(right > left)

    def update() -> None:
        observation, action, reward, discount, successor = (torch.from_numpy(column) for column in replay.sample())
        with torch.no_grad():
            values = target(successor)  # [B, A]
            best = (online(successor) if setting.double else values).argmax(1, keepdim=True)
            goal = torch.addcmul(reward, discount, values.gather(1, best).squeeze(1))  # [B]
        chosen = online(observation).gather(1, action[:, None]).squeeze(1)  # [B]
        optimizer.zero_grad()
        torch_nn.functional.mse_loss(chosen, goal).backward()
        optimizer.step()

    def run() -> None:
        nonlocal updates
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            action = rng.randrange(2) if rng.random() < epsilon_at(setting, step) else greedy(observation)
            successor, reward, terminated, truncated, _ = env.step(action)
            last = terminated or truncated
            replay.add(observation, action, float(reward), successor, terminated, last)
            observation = env.reset()[0] if last else successor
            stored = step + 1
            if stored >= setting.warmup and stored % setting.interval == 0:
                update()
                updates += 1
            if stored % setting.target_interval == 0:
                target.load_state_dict(online.state_dict())

    return run, greedy, lambda: updates


class WindowReplay:
    """A ring of n-step transitions in NumPy arrays.

    Every new row is written into the windows of the rows before it that are still open, so that a batch is read off as it is: every stored
    transition can be drawn, the newest with the rewards that there are so far.

    Args:
      setting: of its capacity, its batches and its windows.
      seed: of the draws.
    """

    def __init__(self, setting: "Setting", seed: int):
        self._capacity, self._batch_size = setting.capacity, setting.batch_size
        self._powers = [setting.gamma**n for n in range(setting.n_steps + 1)]
        self._observations, self._successors = np.zeros((2, setting.capacity, 4), np.float32)
        self._actions = np.zeros(setting.capacity, np.int64)
        self._returns, self._discounts = np.zeros((2, setting.capacity), np.float32)
        self._ends = np.zeros(setting.capacity, np.int64)  # The row whose successor ends the window.
        self._draws = np.random.default_rng(seed)
        self._open: list[int] = []  # Rows with open windows, the newest first.
        self._stored = 0

    def add(self, observation: np.ndarray, action: int, reward: float, successor: np.ndarray, terminated: bool, last: bool) -> None:
        """Stores one transition over the oldest; ``last`` says that the episode ended with it, for whatever reason."""
        row = self._stored % self._capacity
        self._observations[row], self._successors[row], self._actions[row] = observation, successor, action
        self._returns[row] = 0.0
        self._open.insert(0, row)
        for age, earlier in enumerate(self._open):
            self._returns[earlier] += self._powers[age] * reward
            self._discounts[earlier] = 0.0 if terminated else self._powers[age + 1]
            self._ends[earlier] = row
        if last:
            self._open.clear()
        else:
            del self._open[len(self._powers) - 2 :]
        self._stored += 1

    def sample(self) -> tuple[np.ndarray, ...]:
        """A uniform batch: observations ``[B, 4]``, actions, n-step rewards and discounts ``[B]``, successors ``[B, 4]``."""
        rows = self._draws.integers(0, min(self._stored, self._capacity), self._batch_size)
        successors = self._successors[self._ends[rows]]
        return self._observations[rows], self._actions[rows], self._returns[rows], self._discounts[rows], successors


def sb3(env: gymnasium.Env, setting: "Setting", steps: int, seed: int) -> Loop:
    """Stable-Baselines3's DQN with its own Huber loss, on one torch thread: here it is faster on one.

    Raises:
      ValueError: on Double DQN, which it has not.
    """
    import torch
    from stable_baselines3 import DQN as SB3DQN

    if setting.double:
        raise ValueError("sb3 has no Double DQN")
    torch.set_num_threads(1)
    model = SB3DQN(
        "MlpPolicy",
        env,
        learning_rate=setting.learning_rate,
        buffer_size=setting.capacity,
        learning_starts=setting.warmup - 1,  # It learns once more than so many are stored.
        batch_size=setting.batch_size,
        gamma=setting.gamma,
        n_steps=setting.n_steps,
        train_freq=setting.interval,
        gradient_steps=1,
        target_update_interval=setting.target_interval,
        # Its schedule is a part of the run: where the run is shorter, it ends where the setting's is by then.
        exploration_fraction=min(1.0, setting.epsilon[2] / steps),
        exploration_initial_eps=setting.epsilon[0],
        exploration_final_eps=epsilon_at(setting, steps),
        max_grad_norm=float("inf"),
        policy_kwargs={"net_arch": list(setting.hidden)},
        seed=seed,
        device="cpu",
    )

    def run() -> None:
        model.learn(steps)

    return run, lambda observation: int(model.predict(observation, deterministic=True)[0]), lambda: model._n_updates


def pfrl(env: gymnasium.Env, setting: "Setting", steps: int, seed: int) -> Loop:
    """PFRL's DQN or DoubleDQN through ``act`` and ``observe``, with its own replay and n-step windows, on one torch thread."""
    import pfrl
    import torch
    from pfrl.agents import DQN as PFRLDQN
    from pfrl.agents import DoubleDQN
    from pfrl.q_functions import DiscreteActionValueHead
    from torch import nn as torch_nn

    torch.set_num_threads(1)
    pfrl.utils.set_random_seed(seed)
    env.action_space.seed(seed)
    widths = (4, *setting.hidden)
    layers = [layer for pair in zip(widths, setting.hidden, strict=False) for layer in (torch_nn.Linear(*pair), torch_nn.ReLU())]
    network = torch_nn.Sequential(*layers, torch_nn.Linear(widths[-1], 2), DiscreteActionValueHead())
    agent = (DoubleDQN if setting.double else PFRLDQN)(
        network,
        torch.optim.Adam(network.parameters(), lr=setting.learning_rate),
        pfrl.replay_buffers.ReplayBuffer(setting.capacity, num_steps=setting.n_steps),
        gamma=setting.gamma,
        explorer=pfrl.explorers.LinearDecayEpsilonGreedy(*setting.epsilon, env.action_space.sample),
        replay_start_size=setting.warmup,
        minibatch_size=setting.batch_size,
        update_interval=setting.interval,
        target_update_interval=setting.interval * (steps + 1),  # Never: see below.
        clip_delta=False,
    )

    def run() -> None:
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            following, reward, terminated, truncated, _ = env.step(int(agent.act(observation)))
            agent.observe(following, float(reward), terminated, truncated)
            observation = env.reset()[0] if terminated or truncated else following
            if (step + 1) % setting.target_interval == 0:
                agent.sync_target_network()

    def greedy(observation: np.ndarray) -> int:
        with agent.eval_mode():
            return int(agent.act(observation))

    return run, greedy, lambda: agent.optim_t


LOOPS: dict[str, Callable[[gymnasium.Env, "Setting", int, int], Loop]] = {"torch": torch_eager, "sb3": sb3, "pfrl": pfrl}
NEEDS = {"torch": "torch", "sb3": "stable_baselines3", "pfrl": "pfrl"}  # The package that each imports.


class Watched(gymnasium.Wrapper):
    """Calls ``look()`` before each step."""

    def __init__(self, env: gymnasium.Env, look: Callable[[], None]):
        super().__init__(env)
        self._look = look

    def step(self, action: Any) -> Any:
        """Looks, then steps."""
        self._look()
        return self.env.step(action)


def peak_bytes() -> int:
    """The most memory that this process has held, in bytes: what ``dqn_jax.footprint.peak_bytes`` says, and without JAX."""
    try:
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # Bytes there, kilobytes elsewhere.


def measure_memory(name: str, setting: "Setting", steps: int) -> dict[str, Any]:
    """The memory of this process, stage by stage, while a loop trains on CartPole-v1. To be asked of a fresh process.

    Args:
      name: of one of LOOPS.
      setting: what it does.
      steps: environment steps.

    Returns:
      ``marks``: the most bytes held so far once its package is ``imported``, the loop is ``built``, the ``first update`` is made, and at
      the ``end``; ``steps`` and ``updates`` made.

    Raises:
      ValueError: if there is no such loop, or it makes no update in so many steps.
    """
    if name not in LOOPS:
        raise ValueError(f"there is no loop {name!r} here, only {', '.join(LOOPS)}")
    for package in ("torch", NEEDS[name]):
        importlib.import_module(package)
    marks = {"imported": peak_bytes()}

    def look() -> None:
        if "first update" not in marks and updates():
            marks["first update"] = peak_bytes()

    run, _, updates = LOOPS[name](Watched(gymnasium.make("CartPole-v1"), look), setting, steps, 0)
    marks["built"] = peak_bytes()
    run()
    look()  # The last step may have been the first to learn.
    if not updates():
        raise ValueError(f"{name} made no update in {steps:,} steps: ask for more of them than its warm-up of {setting.warmup:,}")
    marks["end"] = peak_bytes()
    return {"marks": marks, "steps": steps, "updates": updates()}


def main() -> None:
    """The command: what to measure is its one argument, in JSON, and what was measured its last line."""
    asked = json.loads(sys.argv[1])
    setting: Any = SimpleNamespace(**asked["setting"])
    print(json.dumps(measure_memory(asked["name"], setting, asked["steps"])))


if __name__ == "__main__":
    main()
