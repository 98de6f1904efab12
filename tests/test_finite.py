"""Updates that are not finite: noticed, refused, counted and explained. That every agent refuses them is in test_contracts.py."""

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dqn_jax
from dqn_jax import finite
from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import dqn
from dqn_jax.finite import PATIENCE
from dqn_jax.heads import expected
from dqn_jax.memory.ring import ring
from dqn_jax.memory.uniform import uniform
from dqn_jax.networks import QNetwork
from dqn_jax.runs import CompiledRuns, Task
from dqn_jax.types import Batch, Feedback, Transition

VECTOR, TWO = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32), gymnasium.spaces.Discrete(2)


@pytest.mark.parametrize("size", [3, finite.SMALL + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("value", "is_finite"), [(np.nan, False), (np.inf, False), (-np.inf, False), (3e38, True), (1e-40, True)])
def test_all_finite(size, dtype, value, is_finite):
    tree = {"many": jnp.ones((2, size), dtype).at[1, size // 2].set(value), "count": jnp.arange(3), "key": jax.random.key(0), "no": ()}
    assert bool(jax.jit(finite.all_finite)(tree)) is is_finite


def test_a_gradient_whose_squares_overflow_is_as_good_as_infinite():
    for size in (3, finite.SMALL + 1):
        for loss, value, sound in ((1.0, 1.0, True), (1.0, 1e18, True), (1.0, 1e20, False), (np.inf, 1.0, False), (1.0, np.nan, False)):
            assert bool(finite.is_sound(jnp.float32(loss), [jnp.ones(size).at[0].set(value)])) is sound, (size, loss, value)


class Steep:
    """Values of which the loss is finite and the gradient is not, where an observation holds a zero: the root is steep there."""

    def __init__(self, width):
        self.width = width

    def init(self, key, observation):
        return {"root": jnp.ones((3, self.width)), "scale": jnp.ones(self.width)}

    def apply(self, params, observation):
        hidden = jnp.sqrt(jnp.abs(observation @ params["root"])) * params["scale"]
        return jnp.stack([hidden.mean(axis=1), -hidden.mean(axis=1)], axis=1)


@pytest.mark.parametrize(
    ("backend", "width", "branches"), [("cpu", 4, 1), ("cpu", 5 * finite.SMALL, 1), ("gpu", 4, 0), ("gpu", 5 * finite.SMALL, 1)]
)
def test_small_learners_are_chosen_on_accelerators_only(monkeypatch, backend, width, branches):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = jax.make_jaxpr(lambda sound, x: finite.learn_if(sound, lambda x: x + 1, x))(True, jnp.zeros(width))
    assert [equation.primitive.name for equation in program.eqns].count("cond") == branches


@pytest.mark.parametrize("width", [4, finite.SMALL])  # Looked at as one vector, and leaf by leaf.
def test_a_gradient_alone_is_enough(width):
    algorithm = dqn(Steep(width), optax.adam(0.1), epsilon=0.1, head=expected("mse"), double=False, finite_changes=True)

    def learnt(first):
        observation = jnp.ones((4, 3)).at[2].set(first)
        t = Transition(observation, jnp.zeros(4, jnp.int32), jnp.ones(4), jnp.ones(4), observation, jnp.zeros(4, bool))
        t = t._replace(**{name: getattr(t, name)[:, None] for name in ("reward", "discount", "last")})
        before = algorithm.init(jax.random.key(0), observation)
        return before, *jax.jit(algorithm.learn)(before, Batch(t), jax.random.key(1), jnp.int32(1))

    before, after, feedback = learnt(0.0)
    assert np.isfinite(feedback.metrics["loss"]) and not bool(feedback.finite)
    chex.assert_trees_all_equal(after, before)
    before, after, feedback = learnt(1.0)
    assert bool(feedback.finite) and (after.params["scale"] != before.params["scale"]).all()


@pytest.mark.parametrize("width", [4, finite.SMALL])
def test_an_optimizer_that_makes_a_nan_of_a_sound_gradient_changes_nothing(width):
    nothing = optax.adam(0.1, eps=0.0)  # 0 / 0 for an action that was not taken.
    network = QNetwork(2, (width // 4,))
    agent = dqn_jax.dqn((VECTOR, TWO), network=network, optimizer=nothing, **{**OPTIONS, "hidden": None})
    observation = jnp.ones((1, 3))
    row = Transition(observation, jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.ones(1), observation, jnp.zeros(1, bool))
    state = agent.init(jax.random.key(0), observation)
    for _ in range(8):
        state = agent.observe(state, row)
    drawn = agent.draw(state, 0)
    after, metrics = jax.jit(agent.update)(state, drawn)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(agent.examine(state, drawn)[2].gradient))
    assert float(metrics["refused"]) == 1.0
    chex.assert_trees_all_equal(after.learner, state.learner)


@pytest.mark.parametrize("updates", [1, 20, 41, 100_003])
def test_a_mean_of_ones_counts_as_all(updates):
    share = np.float32(updates) * (np.float32(1) / np.float32(updates))
    assert finite.all_refused(share, updates)
    assert not finite.all_refused((updates - 1) / updates, updates)


def fed(agent, reward, steps, start=0):
    random = np.random.default_rng(start)
    for t in range(start, start + steps):
        agent.act_and_train(random.normal(size=3).astype(np.float32), reward(t))
    return agent


OPTIONS = {"replay_start_size": 8, "batch_size": 8, "update_interval": 1, "capacity": 64, "hidden": (8,), "n_steps": 1}


@pytest.mark.parametrize("prioritized", [False, True])
def test_the_agent_says_which_tensor_and_which_rows_and_learns_on(prioritized):
    agent = dqn_jax.DQN((VECTOR, TWO), **{**OPTIONS, "capacity": 16}, loss="mse", prioritized=prioritized)
    fed(agent, lambda t: 1.0, 8)
    with pytest.raises(dqn_jax.NonFiniteError, match=rf"{PATIENCE} calls in a row") as raised:
        fed(agent, lambda t: 1e30, 200, start=8)
    for said in (
        "metric loss is inf",
        "the largest number of the gradient is",
        "the largest reward of the batch is 1e+30, in row",
        "max_grad_norm",
    ):
        assert said in str(raised.value)
    assert agent.get_statistics()["average_refused"] > 0
    learner = agent.learner
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learner))
    updates = agent.get_statistics()["n_updates"]
    fed(agent, lambda t: 1.0, 100, start=300)  # The large rewards have left the replay.
    assert agent.get_statistics()["n_updates"] > updates
    assert (agent.learner.params["params"]["Dense_0"]["kernel"] != learner.params["params"]["Dense_0"]["kernel"]).any()


def test_a_few_refused_updates_are_counted_and_nothing_else():
    agent = dqn_jax.DQN((VECTOR, TWO), **{**OPTIONS, "capacity": 8}, loss="mse")
    fed(agent, lambda t: 1e30 if t == 20 else 1.0, 60)
    assert agent.get_statistics()["average_refused"] == pytest.approx(8 / agent.get_statistics()["n_updates"], abs=0.1)


@pytest.mark.parametrize("algo", ["dqn", "ppo", "sac"])
def test_a_compiled_run_says_which_seed(algo, monkeypatch):
    cartpole = dqn_jax.make("phys2d/CartPole-v1")

    def step(key, state, action):
        state, outcome = cartpole.step(key, state, action)
        return state, outcome._replace(reward=outcome.reward * jnp.inf)

    monkeypatch.setattr(dqn_jax.envs, "make", lambda *args, **kwargs: cartpole._replace(step=step))
    options = {"rollout_length": 16, "batch_size": 16} if algo == "ppo" else {"replay_start_size": 64, "capacity": 256, "batch_size": 8}
    runs = CompiledRuns(Task("phys2d/CartPole-v1", {}, 2_000, 7, 2, 1, 2, options, algo))
    runs.compile()
    with pytest.raises(dqn_jax.NonFiniteError, match=r"seed 7: the last [23]\d updates .*\n  reward is inf in the rows 0") as raised:
        while runs.steps < 2_000:
            runs.advance()
    assert "after it" in str(raised.value) or "gradient" in str(raised.value)


def test_what_learn_gives_back_by_mistake_is_refused():
    """Rewards of a replay come as windows [B, n]; less values [B] they make [B, B], in silence."""
    careless = dqn(QNetwork(2, (8,)), optax.sgd(0.1), epsilon=0.1)

    def learn(learner, batch, key, step):
        td_error = batch.transition.reward - jnp.zeros(batch.transition.reward.shape[0])  # [B, 1] - [B]
        return learner, Feedback(jnp.abs(td_error), {"loss": jnp.mean(td_error**2)})

    agent = assemble(careless._replace(learn=learn), uniform(ring(16), 4), discount=0.9)
    state = agent.init(jax.random.key(0), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"priority of shape \(4, 4\).*returns.n_step"):
        jax.eval_shape(agent.update, state, agent.draw(state, 0))
