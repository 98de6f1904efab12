"""The vocabulary: every public record of the package. Read this file first.

Data first (what happened, what was decided, what was drawn), then records of functions (the mathematics, the data, the world, the
whole), then the states that the loops carry. Everything is a NamedTuple: a pytree without registration, immutable, and readable.
Leading axes are free: ``[N]`` environments when collected, ``[B]`` rows when sampled.

A record of functions is itself a pytree whose leaves are functions, so close over it; never pass it through ``jax.jit``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex


class Transition(NamedTuple):
    """What happened between one decision and the next.

    Attributes:
      observation: what the agent saw, a pytree of arrays ``[N, ...]``.
      action: what it did, ``[N, ...]``.
      reward: what that paid, ``[N]`` float32 (``[B, n]`` in a sampled n-step window).
      discount: 0 where the episode *terminated*, else 1, ``[N]`` float32 (``[B, n]`` when sampled). A memory never stores the
        agent's own discount factor; ``assemble`` multiplies it in when a batch is drawn.
      next_observation: the true successor of ``observation``, also at the end of an episode: never the reset observation.
      last: whether the episode ended here, for whatever reason, ``[N]`` bool (``[B, n]`` when sampled).
      extras: what the policy asked to remember (``Decision.extras``).
    """

    observation: chex.ArrayTree
    action: chex.ArrayTree
    reward: chex.Array
    discount: chex.Array
    next_observation: chex.ArrayTree
    last: chex.Array
    extras: chex.ArrayTree = ()


class Masked(NamedTuple):
    """An observation with forbidden actions.

    Attributes:
      observation: the observation proper.
      action_mask: ``[A]`` (with the observation's leading axes), true where the action is allowed. A mask that allows nothing is
        legal only for the successor of a terminated episode.
    """

    observation: chex.ArrayTree
    action_mask: chex.Array


class Decision(NamedTuple):
    """An action ``[N, ...]`` and what the policy asks to remember about it."""

    action: chex.ArrayTree
    extras: chex.ArrayTree = ()


class Batch(NamedTuple):
    """What a memory hands out.

    Attributes:
      transition: ``[B, ...]``; reward, discount and last are windows ``[B, n]`` of raw rows, or ``[B]`` for one-step batches of
        your own. ``next_observation`` is the successor of the row where the window ends.
      weight: importance weights ``[B]``, or 1.
      index: where the rows came from, for ``Memory.reweigh``.
    """

    transition: Transition
    weight: chex.Numeric = 1.0
    index: chex.ArrayTree = ()


class Feedback(NamedTuple):
    """What learning gives back.

    Attributes:
      priority: ``[B]``, for the memory.
      metrics: a dict of scalars, for people.
      finite: whether the update was one to make, a bool. An algorithm that gives it returns the learner as it came where it is False. One
        that leaves it out lets ``assemble`` look through all that was learnt, and put back what was there before; for large networks
        that is the dearer way.
      gradient: what the update went down, as a tree, or (); only looked at when somebody asks why an update was refused.
    """

    priority: chex.ArrayTree = ()
    metrics: Any = ()
    finite: Any = ()
    gradient: Any = ()


class Step(NamedTuple):
    """What an environment returns.

    Attributes:
      observation: what the agent sees next; after an end, the first observation of the next episode.
      reward: float32.
      terminated: the episode reached an end of its own: nothing follows.
      truncated: the episode was cut (a time limit): the value goes on.
      next_observation: the true successor, also at an end.
    """

    observation: chex.ArrayTree
    reward: chex.Array
    terminated: chex.Array
    truncated: chex.Array
    next_observation: chex.ArrayTree


class Algorithm(NamedTuple):
    """The mathematics. It never sees a memory, an environment, a loop or a discount factor.

    Attributes:
      init: ``(key, observation[N]) -> learner``.
      noise: ``(learner, key, N) -> noise``: all that one row of N decisions draws. It may depend on the shapes in ``learner``, not
        on the values, so that a loop can draw the noise of many rows at once.
      explore: ``(learner, observation[N], noise, step) -> Decision``.
      exploit: ``(learner, observation[N]) -> action[N]``, deterministic.
      learn: ``(learner, batch, key, step) -> (learner, Feedback)``; ``step`` counts the transitions stored so far.
    """

    init: Callable[..., Any]
    noise: Callable[..., Any]
    explore: Callable[..., Decision]
    exploit: Callable[..., chex.ArrayTree]
    learn: Callable[..., tuple[Any, Feedback]]


class Curiosity(NamedTuple):
    """The urge: what makes the agent pay itself for seeing what it does not know yet. It knows no algorithm.

    Transitions have leading axes ``[B]``, or ``[T, N]`` where they are a rollout in order of time.

    Attributes:
      init: ``(key, observation[N]) -> state``.
      reward: ``(state, transition) -> `` the bonus of each transition, of the shape of its reward.
      learn: ``(state, transition, key) -> (state, bonus, metrics)``: takes in what was seen. The bonus is what ``reward`` gave before,
        computed once for whoever wants both; ``metrics`` is a dict of scalars.
    """

    init: Callable[..., Any]
    reward: Callable[..., chex.Array]
    learn: Callable[..., tuple[Any, chex.Array, Any]]


class Storage(NamedTuple):
    """Where a memory keeps its transitions, and how it finds them again. Which are drawn is the memory's business.

    A slot is the number of a place for one transition, from 0 to ``capacity - 1``.

    Attributes:
      capacity: the number of slots, an int.
      init: ``(transition[N]) -> state``: allocates for rows of that shape. The state has a field ``size``, the transitions that can be
        drawn, int32.
      add: ``(state, transition[N]) -> (state, filled[N], emptied[M])``: one row; the slots that it went into, and those whose
        transitions it has made unusable, -1 standing for none.
      cut: ``(state, mask[N]) -> state``: marks the newest row of these environments as ``last`` (not terminated).
      slot: ``(state, number[B]) -> slot[B]`` of the transitions that can be drawn, numbered from 0 to ``size - 1``.
      window: ``(state, slot[B]) -> Transition`` of the n-step windows that begin there, as in a ``Batch``.
    """

    capacity: int
    init: Callable[..., Any]
    add: Callable[..., tuple[Any, chex.Array, chex.Array]]
    cut: Callable[..., Any]
    slot: Callable[..., chex.Array]
    window: Callable[..., Transition]


class Memory(NamedTuple):
    """The data.

    Attributes:
      init: ``(transition[N]) -> state``: allocates for rows of that shape. The state has a field ``size``, the transitions that can be
        drawn, int32.
      add: ``(state, transition[N]) -> state``: one row.
      cut: ``(state, mask[N]) -> state``: marks the newest row of these environments as ``last`` (not terminated).
      noise: ``(key) -> noise``: all that one sample draws; it may not depend on the state, so that a loop can draw ahead.
      sample: ``(state, noise) -> Batch``.
      reweigh: ``(state, index, priority) -> state``, of a batch since whose sampling nothing was added.
      demand: fresh rows needed before each sample, or None when any mixture will do.
    """

    init: Callable[..., Any]
    add: Callable[..., Any]
    cut: Callable[..., Any]
    noise: Callable[[chex.PRNGKey], Any]
    sample: Callable[..., Batch]
    reweigh: Callable[..., Any]
    demand: int | None


class Env(NamedTuple):
    """A world written in JAX: one environment, pure, with its time limit and auto-reset inside.

    Attributes:
      reset: ``(key) -> (env_state, observation)``.
      step: ``(key, env_state, action) -> (env_state, Step)``.
      observation_space, action_space: Gymnasium spaces.
      time_limit: steps after which an episode is truncated, or None.
    """

    reset: Callable[..., tuple[Any, chex.ArrayTree]]
    step: Callable[..., tuple[Any, Step]]
    observation_space: Any
    action_space: Any
    time_limit: int | None


class Cadence(NamedTuple):
    """When learning happens, in rows (one row is one transition of each of the N environments). Plain ints, never traced.

    Attributes:
      prefill: rows collected before the first cycle.
      rows: rows of one cycle.
      updates: updates at the end of each cycle.
      once: whether each row is learnt from in the cycle that collects it and in no other, so that a cycle cannot begin half done.
    """

    prefill: int
    rows: int
    updates: int
    once: bool = False


class Agent(NamedTuple):
    """The whole, as the loops see it; made by ``dqn_jax.assemble``.

    Attributes:
      init: ``(key, observation[N]) -> AgentState``.
      noise: ``(state, decisions, N) -> noise``: all the randomness of the decision with that number.
      explore: ``(state, observation[N], noise) -> (state, Decision)``.
      exploit: ``(learner, observation[N]) -> action[N]``.
      observe: ``(state, transition[N]) -> state``.
      cut: ``(state, mask[N]) -> state``.
      draw: ``(state, updates) -> drawn``: all the randomness of the update with that number.
      update: ``(state, drawn) -> (state, metrics)``. Where loss or gradient are not finite nothing is learnt, and the metric ``refused`` is
        1 instead of 0.
      examine: ``(state, drawn) -> (batch, learner, feedback)``: what ``update`` looks at before it decides whether to refuse.
      cadence: ``(N) -> Cadence``.
    """

    init: Callable[..., "AgentState"]
    noise: Callable[..., Any]
    explore: Callable[..., tuple["AgentState", Decision]]
    exploit: Callable[..., chex.ArrayTree]
    observe: Callable[..., "AgentState"]
    cut: Callable[..., "AgentState"]
    draw: Callable[..., Any]
    update: Callable[..., tuple["AgentState", Any]]
    examine: Callable[..., tuple[Batch, Any, Feedback]]
    cadence: Callable[[int], Cadence]


class AgentState(NamedTuple):
    """What an agent is.

    Attributes:
      learner: parameters, targets, optimizer state: the algorithm's own record.
      memory: the replay.
      key: a typed key that never changes; streams are folded out of it by the two counters below.
      decisions: rows of decisions taken, int32.
      step: transitions stored, int32.
      updates: updates done, int32.
    """

    learner: Any
    memory: Any
    key: chex.PRNGKey
    decisions: chex.Array
    step: chex.Array
    updates: chex.Array


class RunState(NamedTuple):
    """Everything there is: a checkpoint is this.

    Attributes:
      agent: AgentState.
      env: the environment's side, where it is written in JAX.
      pending: what the next row will store.
      statistics: what a report about the run so far needs.
    """

    agent: AgentState
    env: Any
    pending: Any
    statistics: Any
