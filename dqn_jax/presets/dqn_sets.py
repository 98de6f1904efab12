"""Named sets of options of DQN and its family."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "deck": {
        "hidden": (128, 128, 128),
        "learning_rate": 3e-4,
        "gamma": 0.97,
        "n_steps": 3,
        "batch_size": 16,
        "replay_start_size": 16,
        "update_interval": 8,
        "updates_per_interval": 1,
        "target_update_interval": 100,
        "capacity": 2_000,
        "epsilon": (0.5, 0.1, 50_000),
        "tau": 1.0,
        "loss": "mse",
        "double": False,
        "max_grad_norm": None,
    },
    "mountaincar": {
        "hidden": (256, 256),
        "learning_rate": 1e-3,
        "gamma": 0.99,
        "n_steps": 10,
        "update_interval": 4,
        "epsilon": (1.0, 0.05, 20_000),
    },
    "minatar": {
        "learning_rate": 2.5e-4,
        "gamma": 0.99,
        "n_steps": 3,
        "batch_size": 32,
        "capacity": 100_000,
        "frames": "single",
        "replay_start_size": 5_000,
        "update_interval": 4,
        "target_update_interval": 1_000,
        "epsilon": (1.0, 0.1, 100_000),
        "loss": "huber",
    },
    "lunarlander": {
        "hidden": (256, 256),
        "learning_rate": 5e-4,
        "gamma": 0.99,
        "n_steps": 3,
        "capacity": 100_000,
        "update_interval": 2,
        "epsilon": (1.0, 0.05, 15_000),
    },
    # The papers keep a million frames, this a fifth of them: 1.4 GB.
    "atari": {
        "learning_rate": 6.25e-5,
        "adam_epsilon": 1.5e-4,
        "max_grad_norm": None,
        "gamma": 0.99,
        "double": False,
        "n_steps": 1,
        "batch_size": 32,
        "capacity": 200_000,
        "frames": "stack_first",
        "replay_start_size": 20_000,
        "update_interval": 4,
        "target_update_interval": 8_000,
        "epsilon": (1.0, 0.01, 250_000),
    },
}
"""Named sets of options: ``DQN(env, **PRESETS["deck"])``. "deck" is the setting of the slide deck that this package starts from;
"atari" that of Dopamine's DQN (Adam, squared error); the others are named after what they were chosen on."""


def _with(**options: Any) -> dict[str, dict[str, Any]]:
    """The sets of DQN, but the deck's, with these options besides."""
    return {name: {**chosen, **options} for name, chosen in PRESETS.items() if name != "deck"}


_C51 = _with(distribution="c51", gamma=0.99)
C51_PRESETS: dict[str, dict[str, Any]] = {
    **_C51,
    "lunarlander": {**_C51["lunarlander"], "v_min": -300.0, "v_max": 300.0},
    "atari": {**_C51["atari"], "v_min": -10.0, "v_max": 10.0, "learning_rate": 2.5e-4, "adam_epsilon": 0.01 / 32},
}
"""Named sets of options: ``DQN`` as a C51 agent. "atari" is DQN's with the support and the optimizer of Bellemare et al. (2017)."""

_QRDQN = _with(distribution="qrdqn")
QRDQN_PRESETS: dict[str, dict[str, Any]] = {
    **_QRDQN,
    "atari": {**_QRDQN["atari"], "num_quantiles": 200, "learning_rate": 5e-5, "adam_epsilon": 0.01 / 32},
}
"""Named sets of options: ``DQN`` as a QR-DQN agent. "atari" is DQN's with the quantiles and the optimizer of Dabney et al. (2018)."""

_IQN = _with(distribution="iqn")
IQN_PRESETS: dict[str, dict[str, Any]] = {
    **_IQN,
    "atari": {**_IQN["atari"], "num_quantiles": 64, "learning_rate": 5e-5, "adam_epsilon": 0.01 / 32},
}
"""Named sets of options: ``DQN`` as an IQN agent. "atari" is DQN's with the fractions and the optimizer of Dabney et al. (2018b)."""

_RAINBOW: dict[str, Any] = {"distribution": "c51", "dueling": True, "noisy": 0.5, "prioritized": True}
RAINBOW_PRESETS: dict[str, dict[str, Any]] = {
    "default": {**_RAINBOW, "gamma": 0.99, "n_steps": 3, "alpha": 0.5},
    "minatar": {**_C51["minatar"], **_RAINBOW, "alpha": 0.5, "epsilon": None},
    "atari": {
        **_RAINBOW,
        "gamma": 0.99,
        "learning_rate": 6.25e-5,
        "adam_epsilon": 1.5e-4,
        "max_grad_norm": None,
        "v_min": -10.0,
        "v_max": 10.0,
        "n_steps": 3,
        "batch_size": 32,
        "capacity": 1_000_000,
        "frames": "stack_first",
        "alpha": 0.5,
        "beta": (0.4, 1.0, 50_000_000),
        "replay_start_size": 20_000,
        "update_interval": 4,
        "target_update_interval": 8_000,
    },
    "data_efficient": {
        **_RAINBOW,
        "gamma": 0.99,
        "learning_rate": 1e-4,
        "adam_epsilon": 1.5e-4,
        "max_grad_norm": 10.0,
        "v_min": -10.0,
        "v_max": 10.0,
        "n_steps": 20,
        "batch_size": 32,
        "capacity": 100_000,
        "frames": "stack_first",
        "alpha": 0.5,
        "beta": (0.4, 1.0, 100_000),
        "replay_start_size": 1_600,
        "update_interval": 1,
        "target_update_interval": 2_000,
    },
}
"""Named sets of options that make a Rainbow agent of ``DQN``: "atari" is the setting of Hessel et al. (2018), "data_efficient" that of
van Hasselt, Hessel and Aslanides (2019) with Nature's network and Rainbow's noise."""
