"""Checks that the options of all ready-made agents share: names, numbers, schedules."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

ELSEWHERE = {
    "lr": ("learning_rate",),
    "policy_lr": ("learning_rate",),
    "actor_lr": ("learning_rate",),
    "q_lr": ("critic_learning_rate",),
    "critic_lr": ("critic_learning_rate",),
    "discount": ("gamma",),
    "buffer_size": ("capacity",),
    "learning_starts": ("replay_start_size",),
    "train_freq": ("update_interval",),
    "train_frequency": ("update_interval",),
    "gradient_steps": ("updates_per_interval",),
    "n_times_update": ("updates_per_interval",),
    "target_network_frequency": ("target_update_interval",),
    "target_update_interval": ("tau",),
    "soft_update_tau": ("tau",),
    "minibatch_size": ("batch_size",),
    "net_arch": ("hidden",),
    "policy_kwargs": ("hidden",),
    "activation_fn": ("activation",),
    "n_steps": ("rollout_length",),
    "num_steps": ("rollout_length",),
    "update_interval": ("rollout_length",),
    "n_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "update_epochs": ("epochs",),
    "clip_coef": ("clip",),
    "clip_eps": ("clip",),
    "clip_range": ("clip",),
    "clip_range_vf": ("value_clip",),
    "clip_eps_vf": ("value_clip",),
    "int_coef": ("intrinsic_coef",),
    "ext_coef": ("extrinsic_coef",),
    "update_proportion": ("predictor_share",),
    "curiosity_lr": ("curiosity_learning_rate",),
    "norm_obs": ("normalize_observation",),
    "norm_reward": ("scale_reward",),
    "normalize_reward": ("scale_reward",),
    "norm_adv": ("normalize_advantage",),
    "standardize_advantages": ("normalize_advantage",),
    "ent_coef": ("entropy_coef", "initial_temperature"),
    "lambd": ("gae_lambda", "q_lambda"),
    "temperature": ("initial_temperature",),
    "entropy_target": ("target_entropy",),
    "start_e": ("epsilon",),
    "end_e": ("epsilon",),
    "exploration_fraction": ("epsilon",),
    "exploration_initial_eps": ("epsilon",),
    "exploration_final_eps": ("epsilon",),
}
"""What SB3, PFRL and CleanRL call the options: for the hint when somebody uses those names. The first that an agent has is named."""

ADVICE = {
    "seed": "it goes into the key of training.run(key), or to the agent that a loop calls, as in dqn_jax.DQN(env, seed=0)",
    "num_envs": "it goes to dqn_jax.train(agent, env, num_envs=...), or to the agent that a loop calls, as in dqn_jax.DQN(env, num_envs=4)",
    "num_minibatches": "batch_size is the transitions in a minibatch: rollout_length times num_envs over the number of minibatches",
    "anneal_lr": "give learning_rate=(start, 0.0, transitions)",
    "clip_vloss": "value_clip is a number, or None where the value is not clipped",
    "vf_coef": "give value_coef; half of the squared error is weighed, so twice the number where SB3 or PFRL had it, the same for CleanRL",
    "value_func_coef": "give value_coef; half of the squared error is weighed, so twice the number where SB3 or PFRL had it",
    "curiosity": "it is for PPO, which learns a second value for it, and with n_steps=1 for SAC and DQN's family, whose batches it pays "
    "when they are drawn; PQN has neither a second value nor a replay",
    "autotune": "the temperature always is learnt, from initial_temperature",
    "polyak": "tau is 1 minus it",
}
"""For names from elsewhere that are no mere renaming: what to do instead."""


def elsewhere(name: str, fields: Any) -> str | None:
    """What an option of another library is here, as a hint, or None where its name is not known. ``fields`` are the names known here."""
    if name in ADVICE:
        return ADVICE[name]
    ours = [field for field in ELSEWHERE.get(name, ()) if field in fields]
    return f"did you mean {ours[0]}?" if ours else None


def named(kind: type, algorithm: str, options: dict[str, Any], others: tuple[str, ...]) -> Any:
    """The options as an instance of ``kind``, a dataclass, with its names and choices checked.

    Args:
      kind: the dataclass.
      algorithm: its name, for errors.
      options: by name.
      others: further names that the agent takes, for the hint when a name is unknown.

    Raises:
      TypeError: on an unknown name (the nearest known one is named), or where True or False was expected.
      ValueError: where one of a few words was expected.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in options:
        if name not in fields:
            everything = sorted([*fields, *others])
            near = difflib.get_close_matches(name, everything, 1, 0.75)  # A slip of the pen, not any word that is a little like it.
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(everything)}"
            raise TypeError(f"{algorithm} has no option {name!r}: {elsewhere(name, fields) or hint}")
    made = kind(**options)
    for name, field in fields.items():
        value = getattr(made, name)
        if field.type is bool and not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        if typing.get_origin(field.type) is Literal and value not in typing.get_args(field.type):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, typing.get_args(field.type)))}, got {value!r}")
    return made


def schedule(value: Any) -> Callable[[Any], Any]:
    """A function of the transitions stored: from (start, end, steps between), a number, or a schedule."""
    if callable(value):
        return value
    if isinstance(value, tuple | list):
        start, end, steps = value
        return optax.linear_schedule(start, end, steps) if steps else optax.constant_schedule(end)
    return optax.constant_schedule(value)


def require_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    """Raises TypeError or ValueError, naming the option, unless the value is a number in [low, high], or (low, high]."""
    if isinstance(value, jax.core.Tracer):  # One value of a sweep: only its owner can check it.
        return
    if isinstance(value, bool) or (not isinstance(value, int | float | jax.Array) and not hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
        left, right = "(" if open_low or math.isinf(low) else "[", ")" if math.isinf(high) else "]"
        raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value}")


def require_schedule(name: str, value: Any) -> None:
    """Raises TypeError or ValueError, naming the option, unless the value is what ``schedule`` takes, in [0, 1]."""
    if isinstance(value, tuple | list):
        if len(value) != 3:
            raise ValueError(f"{name} must be (start, end, steps between), a number or a schedule, got {value!r}")
        require_number(f"{name}'s start", value[0], 0, 1)
        require_number(f"{name}'s end", value[1], 0, 1)
        require_int(f"{name}'s steps", value[2], 0)
    elif not callable(value):
        require_number(name, value, 0, 1)


def require_rate(name: str, value: Any) -> None:
    """Raises TypeError or ValueError, naming the option, unless the value is what ``schedule`` takes, and no number in it negative."""
    if isinstance(value, tuple | list):
        if len(value) != 3:
            raise ValueError(f"{name} must be (start, end, steps between), a number or a schedule, got {value!r}")
        require_number(f"{name}'s start", value[0], 0, math.inf, open_low=True)
        require_number(f"{name}'s end", value[1], 0, math.inf)
        require_int(f"{name}'s steps", value[2], 0)
    elif not callable(value):
        require_number(name, value, 0, math.inf, open_low=True)


def require_int(name: str, value: Any, low: int) -> None:
    """Raises TypeError or ValueError, naming the option, unless the value is a whole number of at least ``low``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def require_widths(hidden: Any) -> None:
    """Raises TypeError or ValueError unless ``hidden`` is None or a sequence of widths, at least one."""
    if hidden is None:
        return
    if not isinstance(hidden, tuple | list):
        raise TypeError(f"hidden must be a tuple of widths, got {hidden!r}")
    if not hidden:
        raise ValueError("hidden is empty: give at least one width, or a network")
    for width in hidden:
        require_int("a width in hidden", width, 1)


def require_replay(o: Any) -> None:
    """Raises TypeError or ValueError, naming the option, unless the options of a replay are in range and fit one another."""
    counts = {"n_steps": 1, "batch_size": 1, "capacity": 1, "replay_start_size": 0, "update_interval": 1, "updates_per_interval": 1}
    for name, low in counts.items():
        require_int(name, getattr(o, name), low)
    if o.replay_start_size > o.capacity:
        raise ValueError(f"replay_start_size {o.replay_start_size} exceeds capacity {o.capacity}: the replay would never hold so many")
    if o.batch_size > o.capacity:
        raise ValueError(f"batch_size {o.batch_size} exceeds capacity {o.capacity}: raise capacity or lower batch_size")
    first = max(1, -(-o.replay_start_size // o.update_interval)) * o.update_interval
    if first < o.batch_size:
        raise ValueError(
            f"batch_size {o.batch_size} exceeds the {first} transitions stored when learning starts (replay_start_size "
            f"{o.replay_start_size}, update_interval {o.update_interval}): raise replay_start_size or lower batch_size"
        )
    require_number("alpha", o.alpha, 0, 1)
    require_schedule("beta", o.beta)


def require_rollout(o: Any, smallest_batch: int = 1) -> None:
    """Raises TypeError or ValueError, naming the option, unless the options of learning from rollouts are in range."""
    require_rate("learning_rate", o.learning_rate)
    for name, low in {"rollout_length": 1, "batch_size": smallest_batch, "epochs": 1}.items():
        require_int(name, getattr(o, name), low)


def rollout_rate(o: Any) -> Callable[[Any], Any]:
    """The option ``learning_rate``, a schedule of transitions, as one of minibatches, which is what optimizers count."""
    rate = schedule(o.learning_rate)
    return lambda count: rate(count * (o.batch_size / o.epochs))


def require_functions(name: str, given: Any, functions: tuple[str, ...]) -> None:
    """Raises TypeError unless ``given`` is None or has these functions."""
    if given is not None and not all(hasattr(given, function) for function in functions):
        raise TypeError(f"{name} must have the functions {' and '.join(functions)}, got {given!r}")
