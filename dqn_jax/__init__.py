"""Value-based deep reinforcement learning: one pure core, a host driver and a compiled one. See README.md, then types.py."""

from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import DQNState
from dqn_jax.algorithms.ppo import PPOState
from dqn_jax.algorithms.pqn import PQNState
from dqn_jax.algorithms.sac import SACState
from dqn_jax.check_env import Finding, check_env
from dqn_jax.checkpoint import CheckpointError, digest
from dqn_jax.envs import from_func_env, from_gymnax, from_pgx, make, true_successors
from dqn_jax.finite import NonFiniteError
from dqn_jax.online import OnlineAgent
from dqn_jax.presets.dqn import DQN, DQNOptions, dqn
from dqn_jax.presets.dqn_sets import C51_PRESETS, IQN_PRESETS, PRESETS, QRDQN_PRESETS, RAINBOW_PRESETS
from dqn_jax.presets.ppo import PPO, PPO_PRESETS, PPOOptions, ppo
from dqn_jax.presets.pqn import PQN, PQN_PRESETS, PQNOptions, pqn
from dqn_jax.presets.rainbow import Rainbow, rainbow
from dqn_jax.presets.sac import SAC, SAC_PRESETS, SACOptions, sac
from dqn_jax.programs import compute_inline, device_per_core
from dqn_jax.runs import load_run
from dqn_jax.seeds import over_seeds
from dqn_jax.training import Result, Training, evaluate, train
from dqn_jax.types import (
    Agent,
    AgentState,
    Algorithm,
    Batch,
    Cadence,
    Decision,
    Env,
    Feedback,
    Masked,
    Memory,
    RunState,
    Step,
    Transition,
)

__all__ = [
    "Transition",
    "Masked",
    "Decision",
    "Step",
    "Batch",
    "Feedback",
    "Algorithm",
    "Memory",
    "Env",
    "Cadence",
    "Agent",
    "AgentState",
    "RunState",
    "DQNState",
    "PPOState",
    "SACState",
    "PQNState",
    "assemble",
    "make",
    "from_func_env",
    "from_gymnax",
    "from_pgx",
    "true_successors",
    "check_env",
    "Finding",
    "Training",
    "Result",
    "train",
    "evaluate",
    "over_seeds",
    "OnlineAgent",
    "DQNOptions",
    "PRESETS",
    "C51_PRESETS",
    "QRDQN_PRESETS",
    "IQN_PRESETS",
    "RAINBOW_PRESETS",
    "dqn",
    "DQN",
    "rainbow",
    "Rainbow",
    "PPOOptions",
    "PPO_PRESETS",
    "ppo",
    "PPO",
    "SACOptions",
    "SAC_PRESETS",
    "sac",
    "SAC",
    "PQNOptions",
    "PQN_PRESETS",
    "pqn",
    "PQN",
    "compute_inline",
    "device_per_core",
    "load_run",
    "CheckpointError",
    "NonFiniteError",
    "digest",
]
