"""Environments written in JAX, as ``Env`` records: from Gymnasium's FuncEnv, gymnax, pgx; time limit and auto-reset in one place."""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.functional_jax_env import FunctionalJaxEnv
from gymnasium.experimental.functional import FuncEnv

from dqn_jax import atari, spaces
from dqn_jax.types import Env, Masked, Step


class EnvState(NamedTuple):
    """The environment's own state and the steps taken in this episode, int32."""

    inner: Any
    time: chex.Array


def with_auto_reset(reset: Any, transition: Any, observation_space: Any, action_space: Any, time_limit: int | None) -> Env:
    """An ``Env`` from a reset and a bare transition: adds the time limit, the auto-reset and the true successor.

    Args:
      reset: ``(key) -> (inner, observation)``.
      transition: ``(key, inner, action) -> (inner, observation, reward, terminated, truncated)``.
      observation_space, action_space: Gymnasium spaces.
      time_limit: steps after which an episode is truncated, or None.
    """
    if time_limit is not None and time_limit < 1:
        raise ValueError(f"time_limit must be at least 1 or None, got {time_limit}")

    masked = spaces.is_masked(observation_space)

    def see(observation: chex.ArrayTree) -> chex.ArrayTree:
        return Masked(**observation) if masked and isinstance(observation, dict) else observation

    def reset_timed(key: chex.PRNGKey) -> tuple[EnvState, chex.ArrayTree]:
        inner, observation = reset(key)
        return EnvState(inner, jnp.zeros((), jnp.int32)), see(observation)

    def step(key: chex.PRNGKey, state: EnvState, action: chex.Array) -> tuple[EnvState, Step]:
        key_step, key_reset = jax.random.split(key)
        inner, successor, reward, terminated, truncated = transition(key_step, state.inner, action)
        successor = see(successor)
        time = state.time + 1
        if time_limit is not None:
            truncated = truncated | (time >= time_limit)
        next_state, observation = jax.tree.map(
            lambda first, following: jnp.where(terminated | truncated, first, following),
            reset_timed(key_reset),
            (EnvState(inner, time), successor),
        )
        reward = jnp.asarray(reward, jnp.float32)
        return next_state, Step(observation, reward, jnp.asarray(terminated, jnp.bool_), jnp.asarray(truncated, jnp.bool_), successor)

    return Env(reset_timed, step, observation_space, action_space, time_limit)


def from_func_env(func_env: FuncEnv, *, params: Any = None, time_limit: int | None = None) -> Env:
    """An ``Env`` from a Gymnasium FuncEnv.

    Args:
      func_env: the environment's five functions.
      params: its parameters; by default its own defaults.
      time_limit: a FuncEnv has none of its own.
    """
    params = func_env.get_default_params() if params is None else params
    # Signatures differ between environments (some drop the key, all keep the order), so everything goes by position.
    tail = () if params is None else (params,)
    dtype = jnp.dtype(func_env.observation_space.dtype)

    def observe(inner: Any, key: chex.PRNGKey) -> chex.Array:
        return jnp.asarray(func_env.observation(inner, key, *tail)).astype(dtype)

    def reset(key: chex.PRNGKey) -> tuple[Any, chex.Array]:
        key_initial, key_observation = jax.random.split(key)
        inner = func_env.initial(key_initial, *tail)
        return inner, observe(inner, key_observation)

    def transition(key: chex.PRNGKey, inner: Any, action: chex.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 4)
        successor = func_env.transition(inner, action, keys[0], *tail)
        reward = func_env.reward(inner, action, successor, keys[1], *tail)
        terminated = func_env.terminal(successor, keys[2], *tail)
        return successor, observe(successor, keys[3]), reward, terminated, jnp.zeros((), jnp.bool_)

    return with_auto_reset(reset, transition, func_env.observation_space, func_env.action_space, time_limit)


def from_gymnax(environment: Any, params: Any, *, binary: bool = False) -> Env:
    """An ``Env`` from a gymnax environment (1.0.1 or newer) and its parameters, its own time limit included.

    Args:
      environment, params: as ``gymnax.make`` returns them.
      binary: whether its observations hold nothing but 0 and 1, as MinAtar's do: they are then bool, a quarter of float32 in a replay.

    Raises:
      TypeError: if it is a wrapper: those change ``step``, with the auto-reset inside, which is not called here.
    """
    if not hasattr(type(environment), "step_env"):
        raise TypeError(f"{type(environment).__name__} is a gymnax wrapper: pass the environment itself and wrap the Env that comes out")

    def see(observation: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda x: x.astype(jnp.bool_), observation) if binary else observation

    def reset(key: chex.PRNGKey) -> tuple[Any, chex.ArrayTree]:
        observation, inner = environment.reset_env(key, params)
        return inner, see(observation)

    def transition(key: chex.PRNGKey, inner: Any, action: chex.Array) -> tuple[Any, ...]:
        observation, inner, reward, terminated, _ = environment.step_env(key, inner, action, params)
        return inner, see(observation), reward, terminated, environment.is_truncated(inner, params)

    # Some spaces name another dtype than the environment gives (Catch-bsuite does); what it gives counts.
    seen = jax.eval_shape(lambda: reset(jax.random.key(0)))[1]
    env = with_auto_reset(
        reset,
        transition,
        _from_gymnax_space(environment.observation_space(params), seen),
        _from_gymnax_space(environment.action_space(params)),
        None,
    )
    return env._replace(time_limit=int(params.max_steps_in_episode))


def from_pgx(environment: Any, *, time_limit: int | None = None) -> Env:
    """An ``Env`` from a single-player pgx environment (2.6 or newer): MinAtar, 2048.

    MinAtar's observations are bool ``[10, 10, C]`` and all its actions are allowed. Other games give ``Masked`` observations.

    Args:
      environment: as ``pgx.make`` returns it.
      time_limit: pgx has none of its own. MinAtar's Freeway ends after 2501 steps, which pgx, like MinAtar, calls terminated.

    Raises:
      NotImplementedError: if the game has several players.
    """
    if environment.num_players != 1:
        raise NotImplementedError(f"pgx/{environment.id} has num_players={environment.num_players}: only single-player games are supported")
    masked = not environment.id.startswith("minatar-")

    def see(state: Any) -> chex.ArrayTree:
        return {"observation": state.observation, "action_mask": state.legal_action_mask} if masked else state.observation

    def reset(key: chex.PRNGKey) -> tuple[Any, chex.ArrayTree]:
        state = environment.init(key)
        return state, see(state)

    def transition(key: chex.PRNGKey, state: Any, action: chex.Array) -> tuple[Any, ...]:
        state = environment.step(state, action, key)
        return state, see(state), state.rewards[0], state.terminated, state.truncated

    state = jax.eval_shape(environment.init, jax.random.key(0))
    (num_actions,) = state.legal_action_mask.shape
    dtype = np.dtype(state.observation.dtype)
    low, high = (0, 1) if dtype == np.bool_ else (-np.inf, np.inf)
    # Bool, not uint8: a network reads uint8 images as grey levels and divides them by 255.
    space: gymnasium.Space = gymnasium.spaces.Box(low, high, state.observation.shape, dtype.type)
    if masked:
        space = gymnasium.spaces.Dict({"observation": space, "action_mask": gymnasium.spaces.MultiBinary(num_actions)})
    return with_auto_reset(reset, transition, space, gymnasium.spaces.Discrete(num_actions), time_limit)


def is_jax_env(env_id: str) -> bool:
    """Whether ``make`` knows the id: ``gymnax/NAME``, ``pgx/NAME``, or a Gymnasium id whose environment is a FuncEnv."""
    if env_id.startswith(("gymnax/", "pgx/")):
        return True
    if atari.is_atari(env_id):  # Gymnasium does not know it before ale-py is imported.
        return False
    entry_point = gymnasium.spec(env_id).entry_point
    if isinstance(entry_point, str):
        module, _, name = entry_point.partition(":")
        if module.startswith(("gymnasium.envs.phys2d", "gymnasium.envs.tabular")):
            entry_point = getattr(importlib.import_module(module), name)
    return isinstance(entry_point, type) and issubclass(entry_point, FunctionalJaxEnv)


def make(env_id: str, **env_args: Any) -> Env:
    """A JAX environment by its id.

    MinAtar comes from gymnax and from pgx, with bool observations ``[10, 10, C]`` (gymnax's own are float32 zeros and ones) and only the
    actions that each game uses; ``use_minimal_action_set=False`` gives all six. ``pgx/minatar-breakout`` repeats the last action with
    ``sticky_action_prob=0.1`` and has no time limit: with all six actions, that is the protocol of Young and Tian (2019).
    ``gymnax/Breakout-MinAtar`` never repeats an action and truncates at ``max_steps_in_episode=1000`` (Freeway: 2500). In
    ``gymnax/DeepSea-bsuite``, of ``size=8``, which action goes right at which place is drawn from ``action_seed=0``.

    Args:
      env_id: a Gymnasium id whose environment is a FuncEnv (``phys2d/CartPole-v1``), ``gymnax/NAME`` (``gymnax/Catch-bsuite``), or
        ``pgx/NAME`` (``pgx/minatar-breakout``).
      **env_args: its parameters, for example ``polemass_length=0.05``, which gives phys2d's CartPole the dynamics of CartPole-v1
        (as shipped, phys2d adds the pole's mass and length where CartPole-v1 multiplies them).

    Returns:
      An ``Env``.

    Raises:
      ModuleNotFoundError: if gymnax or pgx is asked for and not installed.
      ValueError: if the id is not a JAX environment.
      TypeError: if it has no such parameter.
      NotImplementedError: if the environment's code cannot be traced, or the game has several players.
    """
    if env_id.startswith("gymnax/"):
        return _make_gymnax(env_id.removeprefix("gymnax/"), env_args)
    if env_id.startswith("pgx/"):
        return _make_pgx(env_id.removeprefix("pgx/"), env_args)
    if not is_jax_env(env_id):
        raise ValueError(f"{env_id} is not written in JAX: use gymnasium.make and the step-by-step agent, or a phys2d/, gymnax/ or pgx/ id")
    func_env = gymnasium.make(env_id, disable_env_checker=True).unwrapped.func_env  # type: ignore[attr-defined]
    params = func_env.get_default_params()
    env = from_func_env(func_env, params=_replaced(params, env_args, env_id), time_limit=gymnasium.spec(env_id).max_episode_steps)
    try:
        jax.eval_shape(lambda key: env.step(key, env.reset(key)[0], jnp.asarray(env.action_space.sample())), jax.random.key(0))
    except jax.errors.JAXTypeError as error:
        raise NotImplementedError(f"{env_id} cannot be traced by JAX ({type(error).__name__} inside Gymnasium's own code)") from error
    return env


def _make_gymnax(name: str, env_args: dict[str, Any]) -> Env:
    try:
        import gymnax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"gymnax/{name} needs gymnax: pip install 'dqn_jax[gymnax]'") from error
    # A gymnax environment takes some options when made (a size) and the others as parameters.
    if name == "DeepSea-bsuite":  # It asks for a key, which no command line can give.
        seed = env_args.get("action_seed", 0)
        others = {key: value for key, value in env_args.items() if key != "action_seed"}
        env_args = {"action_mapping_key": jax.random.key(seed), **others}
    construct = {key: value for key, value in env_args.items() if not hasattr(gymnax.make(name)[1], key)}
    environment, params = gymnax.make(name, **construct)
    params = _replaced(params, {key: value for key, value in env_args.items() if key not in construct}, name)
    return from_gymnax(environment, params, binary=name.endswith("-MinAtar"))


def _make_pgx(name: str, env_args: dict[str, Any]) -> Env:
    try:
        import pgx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"pgx/{name} needs pgx: pip install 'dqn_jax[pgx]'") from error
    known = pgx.available_envs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"pgx has no {name}: " + (f"did you mean pgx/{near[0]}?" if near else f"it has {', '.join(known)}"))
    environment = pgx.make(name)
    env = from_pgx(environment)
    if not env_args:
        return env
    # pgx.make takes no options, the classes behind it do.
    _refuse_unknown(env_args, inspect.signature(type(environment)).parameters, name)
    return from_pgx(type(environment)(**env_args))


def _replaced(params: Any, env_args: dict[str, Any], name: str) -> Any:
    _refuse_unknown(env_args, vars(params) if params is not None and hasattr(params, "__dict__") else (), name)
    return params.replace(**env_args) if env_args else params


def _refuse_unknown(env_args: dict[str, Any], known: Iterable[str], name: str) -> None:
    unknown = sorted(set(env_args) - set(known))
    if unknown:
        raise TypeError(f"{name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")


def _from_gymnax_space(space: Any, seen: Any = None) -> gymnasium.Space:
    """The Gymnasium space; ``seen`` are the shapes of the values in it, where they are known."""
    from gymnax.environments import spaces as gymnax_spaces

    if isinstance(space, gymnax_spaces.Discrete):
        return gymnasium.spaces.Discrete(int(space.n))
    if isinstance(space, gymnax_spaces.Box):
        shape = tuple(space.shape)
        low, high = (np.broadcast_to(np.asarray(bound), shape) for bound in (space.low, space.high))
        return gymnasium.spaces.Box(low, high, shape, np.dtype(space.dtype if seen is None else seen.dtype))
    if isinstance(space, gymnax_spaces.Dict):
        return gymnasium.spaces.Dict({name: _from_gymnax_space(member, seen and seen[name]) for name, member in space.spaces.items()})
    raise NotImplementedError(f"gymnax space {space} is not supported")


def true_successors(observation: Any, infos: dict[str, Any], ended: Any = None) -> Any:
    """The true successors out of what a Gymnasium vector environment returned with SAME_STEP auto-reset.

    Args:
      observation: ``[N, ...]`` what ``step`` returned: for ended environments the first observation of the next episode.
      infos: what ``step`` returned; ``final_obs`` holds the last observation of the ended ones.
      ended: ``[N]`` bool, ``terminated | truncated``; may be left out where the infos say it (``_final_obs``), as those of Gymnasium's own
        vector environments do. ale-py's do not, and the other rows of its ``final_obs`` mean nothing.

    Returns:
      A new ``[N, ...]``, to hand to ``batch_act_and_train`` as ``next_observation``.

    Raises:
      ValueError: if nothing says which environments ended, or an ended one's last observation is missing.
    """
    successor = jax.tree.map(np.array, observation)
    if "final_obs" not in infos:
        if ended is not None and np.any(ended):
            raise ValueError("an episode ended and the infos hold no final_obs: make the vector environment with SAME_STEP auto-reset")
        return successor
    mask = infos.get("_final_obs") if ended is None else ended
    if mask is None:
        raise ValueError(
            "these infos do not say which environments ended: pass true_successors(observation, infos, terminated | truncated)"
        )
    for index in np.flatnonzero(mask):

        def put(stored: np.ndarray, final: Any, row: int = int(index)) -> None:
            stored[row] = final

        jax.tree.map(put, successor, infos["final_obs"][index])
    return successor
