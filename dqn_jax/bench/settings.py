"""The settings under which loops are compared: one piece of work for all, which every contender reads from the same record."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dqn_jax.presets.dqn_sets import PRESETS


class Setting(NamedTuple):
    """What a DQN loop does. All use ReLU networks, the squared TD error, Adam with its usual constants, no clip of the gradient, and
    copies to the target network.

    An update is made where at least ``warmup`` transitions are stored and their number is a multiple of ``interval``; the target network
    is copied where it is a multiple of ``target_interval``, after the update.

    Attributes:
      hidden: widths of the hidden layers.
      batch_size: transitions in a batch.
      interval: transitions between updates.
      n_steps: rewards in a return; a window ends early where its episode does, and only a termination stops the bootstrap.
      capacity: transitions that the replay keeps.
      warmup: transitions stored before the first update.
      gamma: discount factor of a step.
      learning_rate: of Adam.
      epsilon: the chance of a random action: at the start, at the end, and the transitions between (linear).
      target_interval: transitions between copies to the target network.
      double: whether the online network chooses the bootstrap action (Double DQN).
    """

    hidden: tuple[int, ...]
    batch_size: int
    interval: int
    n_steps: int
    capacity: int
    warmup: int
    gamma: float
    learning_rate: float
    epsilon: tuple[float, float, int]
    target_interval: int
    double: bool


PLAIN = Setting(
    hidden=(64, 64),
    batch_size=64,
    interval=4,
    n_steps=1,
    capacity=50_000,
    warmup=1_000,
    gamma=0.99,
    learning_rate=2.5e-4,
    epsilon=(1.0, 0.05, 10_000),
    target_interval=500,
    double=False,
)
"""A setting that every contender can do: one-step returns and a single network."""

_NAMES = {
    "hidden": "hidden",
    "batch_size": "batch_size",
    "interval": "update_interval",
    "n_steps": "n_steps",
    "capacity": "capacity",
    "warmup": "replay_start_size",
    "gamma": "gamma",
    "learning_rate": "learning_rate",
    "epsilon": "epsilon",
    "target_interval": "target_update_interval",
    "double": "double",
}  # From the fields to this package's options.

DECK = Setting(**{field: PRESETS["deck"][name] for field, name in _NAMES.items()})
"""The setting of the slide deck that this package starts from."""

PLAIN_IMAGES = PLAIN._replace(
    hidden=(128,), **{field: PRESETS["minatar"][name] for field, name in _NAMES.items() if name in PRESETS["minatar"]} | {"n_steps": 1}
)
"""The preset "minatar" as far as it is plain; its convolution stands before the hidden layer."""


def options(setting: Setting) -> dict[str, Any]:
    """The options of ``dqn_jax.DQN`` and ``dqn_jax.dqn`` for a setting."""
    same = {name: getattr(setting, field) for field, name in _NAMES.items()}
    return {**same, "updates_per_interval": 1, "tau": 1.0, "loss": "mse", "max_grad_norm": None}


def epsilon_at(setting: Setting, step: Any) -> Any:
    """The chance of a random action after ``step`` transitions: a float for an int, an array for an array."""
    start, end, decay_steps = setting.epsilon
    lowest = min if isinstance(step, int) else jnp.minimum
    return start + (end - start) * lowest(step / decay_steps, 1.0)


def require_plain_targets(setting: Setting, contender: str) -> None:
    """Raises ValueError where a setting asks for n-step returns or Double DQN, for contenders that have neither."""
    if setting.n_steps != 1 or setting.double:
        raise ValueError(f"{contender} has one-step targets of a single network only, got {setting.n_steps=}, {setting.double=}")
