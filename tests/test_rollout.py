"""The rollout memory, and that an agent learns from every transition once, in order, whatever ends the episodes."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gymnasium import spaces

import dqn_jax
from dqn_jax.memory.rollout import rollout
from dqn_jax.presets import ppo as ppo_preset
from dqn_jax.types import Transition


def observation(numbers):
    """Two dtypes, one number."""
    return {"image": np.stack([numbers % 200, numbers // 200], -1).astype(np.uint8), "count": numbers.astype(np.int32)}


def transition(rows):
    """In every field a number that tells which row it comes from."""
    columns = oracle.Row(*(np.array(column) for column in zip(*rows, strict=True)))
    return Transition(
        observation=observation(columns.number),
        action=np.stack([3 * columns.number, -columns.number], -1).astype(np.float32),
        reward=columns.reward.astype(np.float32),
        discount=columns.discount.astype(np.float32),
        next_observation=observation(columns.next_number),
        last=columns.last,
        extras={"log_prob": -columns.number.astype(np.float32)},
    )


def start(length, num_envs, num_rows=0, **options):
    """A compiled memory, its state after some rows, and these rows."""
    stream = oracle.Stream(num_envs, seed=length + 10 * num_envs)
    memory = rollout(length, **options)
    memory = memory._replace(add=jax.jit(memory.add), cut=jax.jit(memory.cut), sample=jax.jit(memory.sample))
    rows = [transition(stream.rows()) for _ in range(num_rows + 1)]  # one more to tell the shapes
    state = memory.init(rows[-1])
    for row in rows[:-1]:
        state = memory.add(state, row)
    return memory, state, rows[:-1], stream


def drawn(memory, state):
    return memory.sample(state, memory.noise(jax.random.key(0))).transition


def stacked(rows):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@pytest.mark.parametrize(("length", "num_envs"), [(1, 1), (5, 1), (4, 3)])
def test_the_newest_rows_come_out_whole_and_oldest_first(length, num_envs):
    memory, state, rows, stream = start(length, num_envs, length)
    for turn in range(2 * length + 2):  # from every place of the cursor, more than once around
        chex.assert_trees_all_equal(drawn(memory, state), stacked(rows[-length:]))
        assert state.cursor == turn % length and state.size == length * num_envs
        rows.append(transition(stream.rows()))
        state = memory.add(state, rows[-1])


def test_shapes_and_dtypes_are_kept():
    memory, state, rows, _ = start(4, 3, 4)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn(memory, state), stacked(rows))
    assert drawn(memory, state).observation["image"].dtype == jnp.uint8
    assert drawn(memory, state).last.dtype == jnp.bool_
    assert state.rows.action.shape == (4, 3, 2)
    assert memory.sample(state, ()).weight == 1.0


def test_each_rollout_is_fresh():
    memory, _, _, _ = start(6, 2)
    assert memory.demand == 6
    algorithm = dqn_jax.Algorithm(None, None, None, None, None)
    assert dqn_jax.assemble(algorithm, memory, discount=0.9, warmup=100, period=7).cadence(2) == dqn_jax.Cadence(0, 6, 1, once=True)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5])
def test_cut_ends_the_newest_row_of_the_masked_environments_without_terminating_it(num_rows):
    memory, state, rows, _ = start(4, 3, num_rows)
    state = state._replace(rows=state.rows._replace(last=jnp.zeros((4, 3), bool)))
    after = memory.cut(state, jnp.array([True, False, True]))
    expected = np.zeros((4, 3), bool)
    expected[-1] = [True, False, True]
    np.testing.assert_array_equal(drawn(memory, after).last, expected)
    chex.assert_trees_all_equal(after._replace(rows=after.rows._replace(last=state.rows.last)), state)  # nothing else
    chex.assert_trees_all_equal(memory.cut(after, jnp.zeros(3, bool)), after)  # a mark stays
    np.testing.assert_array_equal(drawn(memory, after).discount[-1], rows[-1].discount)


def test_cut_of_an_empty_memory_does_nothing():
    memory, state, _, _ = start(4, 3)
    chex.assert_trees_all_equal(memory.cut(state, jnp.ones(3, bool)), state)


def test_a_row_of_other_shapes_or_dtypes_is_refused():
    memory, state, (row,), stream = start(4, 3, 1)
    narrow = transition(stream.rows()[:1])  # would be broadcast over all environments in silence
    for wrong in (narrow, row._replace(action=row.action[:, :1]), row._replace(last=row.reward), row._replace(extras=())):
        with pytest.raises((AssertionError, ValueError)):
            memory.add(state, wrong)


def test_a_rollout_that_does_not_divide_into_minibatches_is_refused_with_the_numbers():
    start(4, 3, minibatch_size=6)
    with pytest.raises(ValueError, match=r"4 steps of 3 environment\(s\), 12 transitions, does not divide into minibatches of 8"):
        start(4, 3, minibatch_size=8)
    with pytest.raises(ValueError, match=r"6 steps of 1 environment\(s\), 6 transitions, does not divide into minibatches of 4"):
        dqn_jax.PPO(SPACES, rollout_length=6, batch_size=4)
    for options, name in (((0, 1), "length"), ((4, 0), "minibatch_size")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            rollout(options[0], minibatch_size=options[1])


def test_reweigh_changes_nothing():
    memory, state, _, _ = start(4, 1, 4)
    chex.assert_trees_all_equal(memory.reweigh(state, (), ()), state)


# The agent: nothing is lost on the way into learning.

SPACES = (spaces.Box(-1e6, 1e6, (2,), np.float32), spaces.Discrete(3))
GAMMA, LENGTH = 0.5, 4
REWARD_TO_IGNORE = 777.0


@pytest.fixture(scope="module")
def spied():
    """What reaches ``learn`` of all PPO agents here, and a function that gives such an agent as new, compiled once."""
    batches, build = [], ppo_preset.ppo_algorithm

    def spy(*args, **options):
        algorithm = build(*args, **options)

        def learn(learner, batch, key, step):
            jax.debug.callback(lambda transition: batches.append(jax.tree.map(np.array, transition)), batch.transition, ordered=True)
            return algorithm.learn(learner, batch, key, step)

        return algorithm._replace(learn=learn)

    @functools.cache
    def born(num_envs, number):
        options = {"rollout_length": LENGTH, "batch_size": 2 * num_envs, "epochs": 1, "hidden": (4,), "gamma": GAMMA}
        agent = dqn_jax.PPO(SPACES, num_envs=num_envs, **options)
        return agent, agent.run_state

    def as_new(num_envs, number=0):
        agent, run = born(num_envs, number)
        agent.restore(jax.tree.map(jnp.copy, run))
        return agent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_preset, "ppo_algorithm", spy)
        yield batches, as_new


@pytest.fixture
def learnt(spied):
    """What reaches ``learn``, one batch after the other."""
    spied[0].clear()
    return spied[0]


@pytest.fixture
def make(spied):
    return spied[1]


def see(numbers):
    return np.stack([numbers, np.negative(numbers)], -1).astype(np.float32)


Acted = collections.namedtuple("Acted", (*oracle.Row._fields, "action"))


class Driver:
    """Plays random episodes and keeps what must be learnt from: rows of N transitions, whose rewards are 1, 2, 3, ..."""

    def __init__(self, agent, seed, end_chance=0.4):
        self.agent, self.num_envs = agent, agent.num_envs
        self.stream = oracle.Stream(self.num_envs, seed, end_chance)
        self.rows, self.pending = [], None  # pending: the row whose outcome the agent has not been told

    def act(self):
        now = see(self.stream.now)
        if self.num_envs == 1:
            actions = [self.agent.act_and_train(now[0], self.pending[0].reward if self.pending else REWARD_TO_IGNORE)]
        elif self.pending is None:
            actions = self.agent.batch_act_and_train(now)
        else:
            _, successors, rewards, discounts, last, _ = map(np.array, zip(*self.pending, strict=True))
            actions = self.agent.batch_act_and_train(now, rewards, discounts == 0, last & (discounts > 0), see(successors))
        self.tell()
        first = len(self.rows) * self.num_envs + 1
        rows = zip(self.stream.rows(), actions, strict=True)
        self.pending = [Acted(*row, action)._replace(reward=float(first + i)) for i, (row, action) in enumerate(rows)]
        if self.num_envs == 1 and self.pending[0].last:
            (end,) = self.pending
            self.agent.stop_episode_and_train(see(end.next_number), end.reward, terminated=end.discount == 0)
            self.tell()

    def tell(self):
        if self.pending is not None:
            self.rows.append(self.pending)
        self.pending = None

    def stop(self):
        """Leaves the episodes where they are: the pending step is dropped, and the row before it is an end."""
        self.agent.stop_episode()
        self.pending = None
        self.stream.cut([True] * self.num_envs)
        if len(self.rows) % LENGTH:  # else it was the last of a rollout, and has been learnt from
            self.rows[-1] = [row._replace(last=True) for row in self.rows[-1]]

    def check(self, batches):
        """Everything was learnt from once, in order: the rewards alone show it, the rest that rows stayed together."""
        jax.effects_barrier()
        t = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        whole = len(self.rows) // LENGTH * LENGTH
        np.testing.assert_array_equal(t.reward.ravel(), np.arange(1, whole * self.num_envs + 1))
        expected = Acted(*np.moveaxis(np.array(self.rows[:whole]), -1, 0))  # each field [T, N]
        np.testing.assert_array_equal(t.observation, see(expected.number))
        np.testing.assert_array_equal(t.action, expected.action)
        np.testing.assert_array_equal(t.discount, GAMMA * expected.discount)
        np.testing.assert_array_equal(t.next_observation, see(expected.next_number))
        np.testing.assert_array_equal(t.last, expected.last)
        assert all(batch.reward.shape == (LENGTH, self.num_envs) for batch in batches)
        assert self.agent.get_statistics()["n_updates"] == len(batches) == len(self.rows) // LENGTH

    def ends(self):
        """How the rows end, by their place in a rollout."""
        return {(i % LENGTH, row.last, row.discount) for i, rows in enumerate(self.rows) for row in rows}


EVERY_END = {(place, last, discount) for place in range(LENGTH) for last, discount in ((False, 1.0), (True, 1.0), (True, 0.0))}


@pytest.mark.parametrize("num_envs", [1, 3])
def test_ppo_learns_from_every_transition_once_and_in_order(num_envs, make, learnt):
    driver = Driver(make(num_envs), seed=num_envs)
    for _ in range(120):
        driver.act()
    driver.act()
    driver.check(learnt)
    assert driver.ends() == EVERY_END  # terminated, truncated and going on, at every place of a rollout


def test_ppo_learns_from_episodes_of_one_step(make, learnt):
    driver = Driver(make(1), seed=0, end_chance=1.0)
    for _ in range(3 * LENGTH + 1):
        driver.act()
    assert len(driver.rows) == 3 * LENGTH + 1
    driver.check(learnt)
    assert np.concatenate([batch.last for batch in learnt]).all()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_ppo_loses_only_the_pending_step_where_an_episode_is_left(num_envs, make, learnt):
    driver, random, stops = Driver(make(num_envs), seed=5, end_chance=0.15), np.random.default_rng(0), set()
    for _ in range(150):
        driver.act()
        if driver.rows and random.random() < 0.25:
            stops.add(len(driver.rows) % LENGTH)
            driver.stop()
        if random.random() < 0.1:
            driver.agent.get_statistics()  # stores what waits, between two updates
    driver.act()
    driver.check(learnt)
    assert stops == set(range(LENGTH))


def test_a_saved_agent_goes_on_within_its_rollout(make, learnt, tmp_path):
    agents = [make(1), make(1, number=1)]
    driver, places = Driver(agents[0], seed=7), set()
    for turn in range(60):
        driver.act()
        if turn % 5 == 0:
            driver.agent.save(tmp_path / "agent")
            agents.reverse()
            driver.agent = agents[0]
            driver.agent.load(tmp_path / "agent")
            places.add((len(driver.rows) % LENGTH, driver.pending is None))
    driver.act()
    driver.check(learnt)
    assert len(places) > LENGTH  # within a rollout and between two, within an episode and between two


def test_a_half_done_rollout_is_not_taken_into_a_compiled_loop():
    env = dqn_jax.make("phys2d/CartPole-v1")
    agent = dqn_jax.PPO(env, rollout_length=4, batch_size=4, epochs=1, hidden=(4,))
    training = dqn_jax.train(agent.agent, env, num_steps=8)
    observation = np.zeros(4, np.float32)
    for _ in range(7):  # The seventh step is pending: six are stored, two of them not learnt from.
        agent.act_and_train(observation, 0.0)
    with pytest.raises(ValueError, match="collected 2 steps that it has not learnt from, of the 4"):
        training.resume(jax.random.key(0), agent.state)
    for _ in range(2):
        agent.act_and_train(observation, 0.0)
    assert int(training.resume(jax.random.key(0), agent.state).agent.step) == 8


def test_a_rollout_that_is_not_full_is_not_handed_out():
    agent = dqn_jax.PPO((spaces.Box(-1, 1, (1,)), spaces.Discrete(2)), rollout_length=4, batch_size=4, hidden=(4,))
    with pytest.raises(ValueError, match="a rollout of 4 rows was asked for and 0 are there"):
        rollout(4).sample(agent.state.memory, ())
