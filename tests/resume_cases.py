"""The runs of test_resume.py, in a process of their own: ``python resume_cases.py FOLDER WHAT CASE...`` prints a digest for each case.

WHAT is ``whole`` (all steps), ``first`` (half of them, and saves) or ``second`` (loads, and makes the rest).
"""

import json
import sys
from pathlib import Path

import gymnasium
import jax
import numpy as np

import dqn_jax
from dqn_jax import checkpoint, env_state
from dqn_jax.play import Play, PlayBatch

HALF = 83  # Odd, no multiple of an interval, and more than the replay holds.
REPLAY = {"hidden": (8,), "batch_size": 4, "capacity": 60, "replay_start_size": 10, "update_interval": 4}
ROLLOUT = {"hidden": (8,), "rollout_length": 8, "batch_size": 4}
ONE_STEP = {**REPLAY, "n_steps": 1}
CASES = {
    "dqn": ("DQN", {**REPLAY, "n_steps": 3, "epsilon": (1.0, 0.1, 60)}),
    "dqn, prioritized": ("DQN", {**REPLAY, "prioritized": True}),
    "dqn, four": ("DQN", REPLAY),
    "dueling, Munchausen": ("DQN", {**ONE_STEP, "dueling": True, "munchausen": 0.9}),
    "c51": ("DQN", {**REPLAY, "distribution": "c51", "num_atoms": 7, "v_min": -50.0, "v_max": 50.0}),
    "qrdqn, noisy": ("DQN", {**REPLAY, "distribution": "qrdqn", "num_quantiles": 5, "noisy": 0.5, "epsilon": None}),
    "iqn": ("DQN", {**REPLAY, "distribution": "iqn", "num_quantiles": 4}),
    "rainbow": ("DQN", {**dqn_jax.RAINBOW_PRESETS["default"], **REPLAY, "num_atoms": 5}),
    "dqn, rnd": ("DQN", {**ONE_STEP, "curiosity": "rnd"}),
    "dqn, snd-v": ("DQN", {**ONE_STEP, "curiosity": "snd-v"}),
    "ppo": ("PPO", {**ROLLOUT, "normalize_observation": True, "scale_reward": True}),
    "ppo, four": ("PPO", ROLLOUT),
    "ppo, rnd": ("PPO", {**ROLLOUT, "curiosity": "rnd"}),
    "ppo, snd-vic": ("PPO", {**ROLLOUT, "curiosity": "snd-vic"}),
    "ppo, box": ("PPO", ROLLOUT),
    "pqn": ("PQN", ROLLOUT),
    "sac": ("SAC", {**REPLAY, "prioritized": True}),
    "sac, box": ("SAC", REPLAY),
}


def spaces_of(case):
    return ("Pendulum-v1", "phys2d/Pendulum-v0") if case.endswith("box") else ("CartPole-v1", "phys2d/CartPole-v1")


class Host:
    """An agent in a Gymnasium environment."""

    def __init__(self, case):
        name, options = CASES[case]
        env_id, _ = spaces_of(case)
        if case.endswith("four"):
            same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
            env = gymnasium.make_vec(env_id, 4, vectorization_mode="sync", vector_kwargs=same_step)
        else:
            env = gymnasium.make(env_id)
        self.agent = getattr(dqn_jax, name)(env, seed=3, **options)
        self.loop = (PlayBatch if case.endswith("four") else Play)(self.agent, env, 5, lambda reward: reward)

    def go(self):
        for _ in range(HALF):
            self.loop.step()

    def save(self, path):
        self.agent.save(path)
        world = {"position": env_state.encode(self.loop.position()), "env": env_state.capture(self.loop.env)}
        path.with_suffix(".json").write_text(json.dumps(world))

    def load(self, path):
        self.agent.load(path)
        world = json.loads(path.with_suffix(".json").read_text())
        env_state.restore(self.loop.env, world["env"])
        self.loop.go_on(**env_state.decode(world["position"]))

    def digest(self):
        return checkpoint.digest(self.agent.run_state)


class Compiled:
    """An agent in a JAX environment, as one program."""

    def __init__(self, case):
        name, options = CASES[case]
        env = dqn_jax.make(spaces_of(case)[1])
        num_envs = 4 if case.endswith("four") else 1
        self.training = dqn_jax.train(
            getattr(dqn_jax, name.lower())(env, **options), env, num_steps=400, num_envs=num_envs, history_length=2
        )
        self.advance = jax.jit(self.training.advance, donate_argnums=0)
        self.run = jax.jit(self.training.init)(jax.random.key(3))

    def go(self):
        self.run, self.history = self.advance(self.run)

    def save(self, path):
        checkpoint.save(path, self.run)

    def load(self, path):
        self.run, _ = checkpoint.load(path, jax.eval_shape(self.training.init, jax.random.key(0)))

    def digest(self):
        return checkpoint.digest((self.run, self.history))


def play(folder, what, name):
    """One case: ``host: ...`` or ``compiled: ...``. Returns its digest, and how many updates it has made."""
    driver, case = name.split(": ")
    one = (Host if driver == "host" else Compiled)(case)
    path = folder / name.replace(" ", "_").replace(",", "").replace(":", "")
    if what == "second":
        one.load(path)
    for _ in range(2 if what == "whole" else 1):
        one.go()
    if what == "first":
        one.save(path)
    updates = one.agent.state.updates if driver == "host" else one.run.agent.updates
    return one.digest(), int(np.asarray(updates))


if __name__ == "__main__":
    folder, what, *names = sys.argv[1:]
    print(json.dumps({name: play(Path(folder), what, name) for name in names}))
