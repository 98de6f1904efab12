"""``check_env``: what will go wrong when an agent learns in an environment, and what to change.

It plays a few random episodes and looks at what came: shapes, dtypes and numbers as the agents' boundary checks them, then what no single
call shows: ends that never come, a time limit that calls itself a terminal state, rewards too large to learn from, episodes that cannot be
repeated.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np

from dqn_jax import spaces
from dqn_jax.envs import true_successors
from dqn_jax.presets.reading import read_spaces
from dqn_jax.presets.table import ALGORITHMS
from dqn_jax.types import Env, Masked

LARGE_REWARD, LARGE_OBSERVATION = 1e4, 1e3
SUSPECT = 0.2  # Share of episodes that are terminated at the same step, the last of all, from which on it looks like a time limit.
FAMILIES = ("dqn", "pqn", "ppo", "sac")  # One of each kind; what serves DQN serves its family.


class Finding(NamedTuple):
    """One thing that is wrong, or will slow learning down.

    Attributes:
      severity: "error": agents will refuse it, or learn something wrong; "warning": they may learn badly.
      problem: what was seen.
      remedy: what to change.
    """

    severity: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.problem}\n    {self.remedy}"


class Played(NamedTuple):
    """What was seen: observations, rewards and lengths of episodes, and how each ended ("terminated", "truncated" or "open")."""

    observations: list[Any]
    rewards: list[float]
    lengths: list[int]
    ends: list[str]


def check_env(env: Any, *, steps: int = 1_000, seed: int = 0, show: bool = True) -> list[Finding]:
    """Plays at random in an environment and tells what will go wrong in learning with it.

    Args:
      env: a Gymnasium environment, a vector environment, or a JAX environment from ``dqn_jax.make``. It is reset and stepped.
      steps: steps to play.
      seed: of the resets and the actions.
      show: whether to print the findings.

    Returns:
      The findings, errors first; none where nothing is wrong.
    """
    findings: list[Finding] = []
    for finding in _findings(env, steps, seed):
        if finding not in findings:
            findings.append(finding)
    findings.sort(key=lambda finding: finding.severity)
    if show:
        print("\n".join(map(str, findings)) or f"nothing found in {steps:,} steps")
    return findings


def _findings(env: Any, steps: int, seed: int) -> Iterator[Finding]:
    try:
        observation_space, action_space, num_envs = read_spaces(env)
        spaces.example(observation_space, 1)
    except (TypeError, ValueError, NotImplementedError) as error:
        problem, _, remedy = str(error).partition(": ")
        yield Finding("error", problem, remedy or "see the README on which environments are supported")
        return
    if unserved := list(_served(observation_space, action_space)):
        yield from unserved
        return
    if isinstance(env, Env):
        play = _play_jax(env, steps, seed)
    elif num_envs is not None:
        play = _play_vector(env, num_envs, steps, seed)
    else:
        play = _play(env, steps, seed)
    played = Played([], [], [], [])
    for seen in play:
        if isinstance(seen, Finding):
            yield seen  # An error, which ends the play: the rest cannot be judged by what there is of it.
            return
        whole: Any
        for whole, new in zip(played, seen, strict=True):
            whole.extend(new)
    for judge in (_rewards, _magnitudes, _bounds, _ends):
        yield from judge(played, env)
    if num_envs is None and isinstance(env, gymnasium.Env):
        yield from _repeats(env, seed)


def _served(observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Iterator[Finding]:
    """Whether any agent takes these spaces, and why the others do not."""
    refusals = {}
    for name in FAMILIES:
        try:
            ALGORITHMS[name].build((observation_space, action_space))
        except (ValueError, TypeError, NotImplementedError) as error:
            refusals[name] = str(error)
    if len(refusals) == len(FAMILIES):
        reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        yield Finding("error", f"no agent takes the spaces {observation_space} and {action_space}", reasons)


def _play(env: gymnasium.Env, steps: int, seed: int) -> Iterator[Any]:
    """Random episodes in one environment: findings, and what each step showed."""
    check, number, first = spaces.observation_check(env.observation_space, None), 0, True
    env.action_space.seed(seed)
    while number < steps:
        answer: Any
        try:
            answer = env.reset(seed=seed) if first else env.reset()
        except Exception as error:
            yield _raised("reset(seed=...)", error, "reset must take the arguments seed and options")
            return
        if not (isinstance(answer, tuple) and len(answer) == 2):
            yield Finding("error", f"reset returns {type(answer).__name__}", "return the pair (observation, info), as Gymnasium has it")
            return
        observation, first, length, end = answer[0], False, 0, "open"
        yield from _bad(check, observation, "reset")
        while end == "open" and number < steps:
            try:
                answer = env.step(_action(env.action_space, observation))
            except Exception as error:
                yield _raised(f"step {number + 1} (step {length + 1} of its episode)", error, "mend the environment")
                return
            if not (isinstance(answer, tuple) and len(answer) == 5):
                size = f" of {len(answer)}" if isinstance(answer, tuple) else ""
                yield Finding(
                    "error",
                    f"step returns {type(answer).__name__}{size}",
                    "return (observation, reward, terminated, truncated, info): an old `done` is terminated where the task ended, "
                    "truncated where time did",
                )
                return
            observation, reward, terminated, truncated, _ = answer
            number, length = number + 1, length + 1
            yield from _bad(check, observation, "step")
            yield from _bad_outcome(reward, terminated, truncated)
            end = "terminated" if terminated else "truncated" if truncated else "open"
            yield [observation], [float(reward)], [length] if end != "open" else [], [end] if end != "open" else []
        if end == "open":
            yield [], [], [length], ["open"]


def _play_vector(env: Any, num_envs: int, steps: int, seed: int) -> Iterator[Any]:
    """Random steps of a vector environment."""
    check = spaces.observation_check(env.single_observation_space, num_envs)
    env.single_action_space.seed(seed)
    try:
        observation, infos = env.reset(seed=seed)
    except Exception as error:
        yield _raised("reset(seed=...)", error, "mend the environment, or the way in which it is made into a vector")
        return
    yield from _bad(check, observation, "reset")
    lengths = np.zeros(num_envs, int)
    for number in range(max(1, steps // num_envs)):
        try:
            actions = [_action(env.single_action_space, jax.tree.map(lambda leaf, i=i: leaf[i], observation)) for i in range(num_envs)]
            observation, reward, terminated, truncated, infos = env.step(np.stack(actions))
            true_successors(observation, infos, np.asarray(terminated) | np.asarray(truncated))
        except Exception as error:
            yield _raised(f"step {number + 1}", error, "mend the environment, or the way in which it is made into a vector")
            return
        yield from _bad(check, observation, "step")
        yield from _bad_outcome(reward, terminated, truncated, num_envs)
        lengths += 1
        ended = np.flatnonzero(terminated | truncated)
        ends = ["terminated" if terminated[i] else "truncated" for i in ended]
        yield [observation], reward.tolist(), lengths[ended].tolist(), ends
        lengths[ended] = 0
    yield [], [], lengths[lengths > 0].tolist(), ["open"] * int((lengths > 0).sum())


def _play_jax(env: Env, steps: int, seed: int) -> Iterator[Any]:
    """Random steps of a JAX environment."""
    check = spaces.observation_check(env.observation_space, None)
    env.action_space.seed(seed)
    key, step, length = jax.random.key(seed), jax.jit(env.step), 0
    try:
        state, observation = jax.jit(env.reset)(key)
    except Exception as error:
        yield _raised("reset", error, "mend the environment: reset is traced by jax.jit")
        return
    for number in range(steps):
        try:
            state, seen = step(jax.random.fold_in(key, number), state, _action(env.action_space, observation))
        except Exception as error:
            yield _raised(f"step {number + 1}", error, "mend the environment: step is traced by jax.jit")
            return
        observation, length = seen.observation, length + 1
        yield from _bad(check, jax.device_get(seen.next_observation), "step")
        yield from _bad_outcome(float(seen.reward), bool(seen.terminated), bool(seen.truncated))
        end = "terminated" if seen.terminated else "truncated" if seen.truncated else "open"
        yield [jax.device_get(observation)], [float(seen.reward)], [length] if end != "open" else [], [end] if end != "open" else []
        length = 0 if end != "open" else length
    yield [], [], [length] if length else [], ["open"] if length else []


def _action(space: gymnasium.Space, observation: Any) -> Any:
    """A random action, an allowed one where a mask comes with the observation."""
    mask = (
        observation.action_mask
        if isinstance(observation, Masked)
        else observation.get("action_mask")
        if isinstance(observation, dict)
        else None
    )
    if mask is not None and isinstance(space, gymnasium.spaces.Discrete):
        return space.sample(np.asarray(mask, np.int8))
    return space.sample()


def _bad(check: Callable[[Any], Any], observation: Any, method: str) -> Iterator[Finding]:
    try:
        spaces.require_actions_allowed(check(observation), True)
    except (ValueError, TypeError) as error:
        problem, _, remedy = str(error).partition(": ")
        yield Finding("error", f"what {method} returns is refused: {problem}", remedy or "make the observation fit the observation space")


def _bad_outcome(reward: Any, terminated: Any, truncated: Any, num_envs: int | None = None) -> Iterator[Finding]:
    checks = {
        "return a real, finite number as the reward": (spaces.reward_check(num_envs), reward),
        "return True or False as terminated": (spaces.flag_check("terminated", num_envs), terminated),
        "return True or False as truncated": (spaces.flag_check("truncated", num_envs), truncated),
    }
    for remedy, (check, value) in checks.items():
        try:
            check(value)
        except (ValueError, TypeError) as error:
            yield Finding("error", str(error), remedy)


def _raised(where: str, error: Exception, remedy: str) -> Finding:
    return Finding("error", f"{where} raised {type(error).__name__}: {error}", remedy)


def _rewards(played: Played, env: Any) -> Iterator[Finding]:
    if not played.rewards:
        return
    largest = max(map(abs, played.rewards))
    if largest > LARGE_REWARD:
        yield Finding(
            "warning",
            f"rewards reach {largest:.3g}",
            "scale them (gymnasium.wrappers.TransformReward), so that returns are in the hundreds at most; PPO has scale_reward",
        )
    if len(set(played.rewards)) == 1 and played.rewards[0] == 0.0:
        yield Finding(
            "warning",
            f"all {len(played.rewards):,} rewards were 0 under random actions",
            "epsilon-greedy exploration finds nothing there: try curiosity='rnd', or a reward on the way",
        )


def _magnitudes(played: Played, env: Any) -> Iterator[Finding]:
    for leaf_name, size in _sizes(played.observations).items():
        if size > LARGE_OBSERVATION:
            yield Finding(
                "warning",
                f"observations{leaf_name} reach {size:.3g}",
                "normalise them (gymnasium.wrappers.NormalizeObservation, or PPO's normalize_observation), or leave out what grows",
            )


def _bounds(played: Played, env: Any) -> Iterator[Finding]:
    space = getattr(env, "single_observation_space", env.observation_space)
    outside = [name for observation in played.observations for name in _outside(space, observation)]
    for name in dict.fromkeys(outside):
        yield Finding(
            "warning",
            f"observations{name} leave their space in {outside.count(name):,} of {len(played.observations):,} steps",
            "widen its bounds (infinite ones will do) or clip: whoever scales by the bounds is misled",
        )


def _outside(space: gymnasium.Space, observation: Any, name: str = "") -> Iterator[str]:
    """The names of the leaves that are beyond the bounds of a space, in any environment."""
    if isinstance(observation, Masked):
        yield from _outside(space["observation"] if isinstance(space, gymnasium.spaces.Dict) else space, observation.observation, name)
    elif isinstance(space, gymnasium.spaces.Dict):
        for key, part in space.spaces.items():
            yield from _outside(part, observation[key], f"{name}[{key!r}]")
    elif isinstance(space, gymnasium.spaces.Tuple):
        for i, part in enumerate(space.spaces):
            yield from _outside(part, observation[i], f"{name}[{i}]")
    elif isinstance(space, gymnasium.spaces.Box) and (np.less(observation, space.low).any() or np.greater(observation, space.high).any()):
        yield name


def _sizes(observations: list[Any]) -> dict[str, float]:
    """The largest magnitude in each leaf of floats."""
    sizes: dict[str, float] = {}
    for observation in observations:
        for path, leaf in jax.tree_util.tree_flatten_with_path(observation)[0]:
            array = np.asarray(leaf)
            if array.dtype.kind == "f" and array.size:
                name = jax.tree_util.keystr(path)
                sizes[name] = max(sizes.get(name, 0.0), float(np.abs(array).max()))
    return sizes


def _ends(played: Played, env: Any) -> Iterator[Finding]:
    ended = [(length, end) for length, end in zip(played.lengths, played.ends, strict=True) if end != "open"]
    limit = getattr(getattr(env, "spec", None), "max_episode_steps", None) or getattr(env, "time_limit", None)
    if played.rewards and not ended and limit is None:
        yield Finding(
            "warning",
            f"no episode ended within {len(played.rewards):,} steps, and there is no time limit",
            "wrap it in gymnasium.wrappers.TimeLimit, or give more steps to check_env",
        )
    longest = max((length for length, _ in ended), default=0)
    there = [end for length, end in ended if length == longest]
    suspect = longest > 1 and len(there) >= max(3, SUSPECT * len(ended)) and set(there) == {"terminated"}
    if suspect:
        yield Finding(
            "warning",
            f"{len(there)} of {len(ended)} episodes were terminated after exactly {longest} steps, and none was longer",
            "if that is a time limit, return it as truncated: the value of a state does not end because the clock does",
        )
    both = limit is not None and any(end == "terminated" and length == limit for length, end in ended)
    if both and not suspect:
        yield Finding(
            "warning", f"an episode was terminated at the time limit of {limit} steps", "if that is the limit's doing, return truncated"
        )


def _repeats(env: gymnasium.Env, seed: int) -> Iterator[Finding]:
    """Whether the same seed and the same actions bring the same again."""
    try:
        first, second = _episode(env, seed), _episode(env, seed)
    except Exception:  # What it raises has been found already.
        return
    for step, (one, other) in enumerate(zip(first, second, strict=False)):
        if not _same(one, other):
            where = "reset" if step == 0 else f"step {step}"
            yield Finding(
                "warning",
                f"the same seed and actions bring something else at {where}",
                "draw all randomness from self.np_random, which reset(seed=...) seeds, or runs cannot be repeated or resumed exactly",
            )
            return


def _episode(env: gymnasium.Env, seed: int, steps: int = 50) -> list[Any]:
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    seen: list[Any] = [jax.tree.map(np.array, observation)]
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(_action(env.action_space, observation))
        seen.append((jax.tree.map(np.array, observation), reward, terminated, truncated))
        if terminated or truncated:
            break
    return seen


def _same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f") for a, b in pairs)
