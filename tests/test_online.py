"""The host driver: what it stores, when it learns, and what it survives."""

import random
import signal
import subprocess
import sys
import textwrap

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

import dqn_jax
from dqn_jax import DQN, Masked, staging
from dqn_jax.memory.ring import ring
from dqn_jax.networks import Network

SPACES = (spaces.Box(-1e6, 1e6, (2,), np.float32), spaces.Discrete(3))
SMALL = {
    "hidden": (8,),
    "batch_size": 4,
    "capacity": 256,
    "replay_start_size": 8,
    "update_interval": 2,
    "target_update_interval": 8,
    "tau": 1.0,
    "n_steps": 1,
    "loss": "huber",
    "epsilon": 0.5,
}
LINEAR = Network(lambda key, o: {"w": 1e-3 * jax.random.normal(key, (2, 3))}, lambda params, o: o @ params["w"])
STEPPING = {"network": LINEAR, "optimizer": optax.sgd(1e-6), "batch_size": 4, "capacity": 256, "epsilon": 0.5}
REWARD_TO_IGNORE = 777.0


@pytest.fixture(scope="module")
def as_new(tmp_path_factory):
    """Agents as new: compiled once for each set of options, and set back by loading what they saved at birth."""
    folder = tmp_path_factory.mktemp("blank")

    built = {}

    def get(num_envs=1, both_spaces=SPACES, **options):
        options = {**SMALL, **options}
        name = repr((num_envs, both_spaces, sorted(options.items())))
        if name not in built:
            built[name] = DQN(both_spaces, num_envs=num_envs, **options), folder / str(len(built))
            built[name][0].save(built[name][1])
        agent, path = built[name]
        agent.load(path)
        return agent

    return get


def see(number):
    """An observation that carries a number, so that a stored row tells where it came from."""
    return np.array([number, -number], np.float32)


def stored(state):
    """The replay's rows, oldest first, as NumPy: a Transition of ``[T, N, ...]``."""
    memory = jax.device_get(state.memory)
    length = memory.rows.reward.shape[0]
    order = np.arange(length) if memory.filled == length else np.arange(memory.filled)
    order = (order + memory.cursor) % length if memory.filled == length else order
    return jax.tree.map(lambda leaf: leaf[order], memory.rows)


def same_statistics(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=True) for k in one)


def play(agent, lengths_and_ends, number=1):
    """Plays episodes of an endless count; returns what must have been stored: (id, action, reward, discount, next, last)."""
    rows = []
    for length, end in lengths_and_ends:
        reward = REWARD_TO_IGNORE
        for step in range(length):
            action = agent.act_and_train(see(number), reward)
            reward = number + 0.5
            if step < length - 1:
                rows.append([number, action, reward, 1.0, number + 1, False])
            number += 1
        if end == "stop_episode":  # The last step is dropped; what was stored before it is an end.
            agent.stop_episode()
            if rows:
                rows[-1][-1] = True
        else:
            agent.stop_episode_and_train(see(number), reward, terminated=end == "terminated")
            rows.append([number - 1, action, reward, float(end != "terminated"), number, True])
        number += 10  # So that a successor from the next episode would show.
    return rows


EPISODES = [
    (5, "terminated"),
    (1, "terminated"),
    (3, "truncated"),
    (4, "stop_episode"),
    (1, "truncated"),
    (1, "stop_episode"),
    (6, "terminated"),
    (2, "truncated"),
]


def test_stored_transitions_are_the_stream(as_new):
    agent = as_new()
    expected = play(agent, EPISODES)
    rows = stored(agent.state)
    assert len(rows.reward) == len(expected) == agent.get_statistics()["t"]
    for i, (number, action, reward, discount, following, last) in enumerate(expected):
        np.testing.assert_array_equal(rows.observation[i, 0], see(number))
        np.testing.assert_array_equal(rows.next_observation[i, 0], see(following))
        assert (rows.action[i, 0], rows.reward[i, 0], rows.discount[i, 0], rows.last[i, 0]) == (action, reward, discount, last)
    assert REWARD_TO_IGNORE not in rows.reward


def test_replay_keeps_the_newest_when_it_wraps(as_new):
    agent = as_new(capacity=16)
    expected = play(agent, EPISODES * 3)[-16:]
    np.testing.assert_array_equal(stored(agent.state).observation[:, 0, 0], [row[0] for row in expected])
    assert agent.get_statistics()["replay_size"] == 16


def test_first_reward_of_an_episode_changes_nothing(as_new):
    def digest_with(first_reward):
        agent = as_new()
        for episode in range(8):
            for step in range(5):
                agent.act_and_train(see(step), 1.0 if step else first_reward)
            agent.stop_episode_and_train(see(5), 1.0, terminated=episode % 2 == 0)
        return dqn_jax.digest(agent.state)

    assert digest_with(0.0) == digest_with(1e9)


@pytest.mark.parametrize("terminated", [True, False])
def test_stopping_does_not_learn_and_the_next_call_does(as_new, terminated):
    agent = as_new()
    agent.act_and_train(see(0), 0.0)
    for number in range(1, 9):
        agent.act_and_train(see(number), 1.0)
    agent.act_and_train(see(9), 1.0)
    before = agent.get_statistics()["n_updates"]
    learner = dqn_jax.digest(agent.state.learner)
    agent.stop_episode_and_train(see(10), 1.0, terminated=terminated)  # The tenth transition: an update falls due.
    assert agent.get_statistics()["t"] == 10
    assert agent.get_statistics()["n_updates"] == before
    assert dqn_jax.digest(agent.state.learner) == learner
    agent.act_and_train(see(20), 0.0)
    assert agent.get_statistics()["t"] == 10
    assert agent.get_statistics()["n_updates"] == before + 1
    assert dqn_jax.digest(agent.state.learner) != learner


def test_episodes_of_one_step_learn_all_the_same(as_new):
    agent = as_new()
    for episode in range(30):
        agent.act_and_train(see(episode), 0.0)
        agent.stop_episode_and_train(see(episode + 1), 1.0)
    agent.act_and_train(see(0), 0.0)
    said = agent.get_statistics()
    assert (said["t"], said["episodes"], said["n_updates"]) == (30, 30, (30 - 8) // 2 + 1)


def test_stop_episode_drops_the_pending_step_and_cuts_the_stream(as_new):
    agent = as_new(n_steps=3)
    for number in range(5):  # Four transitions and a pending step.
        agent.act_and_train(see(number), 1.0)
    agent.stop_episode()
    for number in range(100, 105):
        agent.act_and_train(see(number), 1.0)
    rows = stored(agent.state)
    np.testing.assert_array_equal(rows.observation[:, 0, 0], [0, 1, 2, 3, 100, 101, 102, 103])
    assert rows.last[:, 0].tolist() == [False, False, False, True, False, False, False, False]
    assert rows.discount.all()  # A cut is not a termination.
    batch = ring(256, n_steps=3).window(agent.state.memory, jnp.arange(8))
    np.testing.assert_array_equal(batch.next_observation[:, 0], [3, 4, 4, 4, 103, 104, 104, 104])


def test_stop_episode_without_an_episode_changes_nothing_stored(as_new):
    agent = as_new()
    agent.stop_episode()
    agent.stop_episode()
    play(agent, [(3, "truncated")])
    agent.stop_episode()
    play(agent, [(3, "terminated")], number=50)
    rows = stored(agent.state)
    assert rows.last[:, 0].tolist() == [False, False, True] * 2
    assert rows.discount[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    assert agent.get_statistics()["episodes"] == 2


def due(step, warmup, period, updates, num_envs):
    """Updates done after ``step`` transitions: one round at each multiple of the period, counted when a whole row has been stored."""
    rows = range(num_envs, step + 1, num_envs)
    if period >= num_envs:
        return updates * sum(t % period == 0 and t >= warmup for t in rows)
    return updates * (num_envs // period) * sum(t >= warmup for t in rows)


@pytest.mark.parametrize(
    ("warmup", "period", "updates", "num_envs"),
    [(4, 1, 1, 1), (10, 4, 1, 1), (12, 4, 2, 1), (5, 1, 3, 1), (10, 8, 1, 4), (10, 2, 2, 4), (9, 4, 1, 4)],
)
def test_number_of_updates_is_what_has_fallen_due(as_new, warmup, period, updates, num_envs):
    options = {"replay_start_size": warmup, "update_interval": period, "updates_per_interval": updates}
    agent = as_new(num_envs, **STEPPING, **options)
    first = True
    for row in range(24):
        observation = np.stack([see(row)] * num_envs)
        ended = np.full(num_envs, row % 5 == 0)
        following = None if first else (np.ones(num_envs), ended, np.zeros(num_envs, bool), observation)
        agent.batch_act_and_train(observation, *(following or ()))
        first = False
        said = agent.get_statistics()
        assert said["t"] == row * num_envs
        assert said["n_updates"] == int(agent.state.updates) == due(said["t"], warmup, period, updates, num_envs)


def test_target_refresh_follows_the_update_that_crosses_the_interval(as_new):
    agent = as_new()  # Updates every 2 transitions from 8 on, refreshes every 8.
    learnt_at, refreshes = 0, 0
    target = dqn_jax.digest(agent.state.learner.target_params)
    number = 0
    for length in (7, 3, 1, 8, 5, 1, 1, 12, 9):
        for step in range(length):
            updates = int(agent.state.updates)
            agent.act_and_train(see(number), 1.0)
            number += 1
            state = agent.state
            now = dqn_jax.digest(state.learner.target_params)
            crossed = int(state.updates) > updates and int(state.step) // 8 > learnt_at // 8
            assert (now != target) == crossed, (length, step)
            if crossed:  # Not to the last bit where XLA computes the same number twice.
                chex.assert_trees_all_close(state.learner.target_params, state.learner.params, rtol=1e-6)
            if int(state.updates) > updates:
                learnt_at = int(state.step)
            refreshes += crossed
            target = now
        agent.stop_episode_and_train(see(number), 1.0)
        assert dqn_jax.digest(agent.state.learner.target_params) == target
    assert refreshes == 5


def aligned(shape, dtype):
    """A buffer on a 64-byte boundary: the kind that JAX may use in place instead of copying."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def test_caller_may_reuse_one_buffer(as_new):
    agent = as_new(capacity=1024, both_spaces=(spaces.Box(-1e6, 1e6, (16,), np.float32), spaces.Discrete(3)))
    buffer = aligned((16,), np.float32)
    for number in range(501):
        buffer[:] = number
        agent.act_and_train(buffer, float(number))
        buffer[:] = -1.0  # What a simulator may do while the program still runs.
    rows = stored(agent.state)
    np.testing.assert_array_equal(rows.observation[:, 0], np.arange(500.0)[:, None].repeat(16, 1))
    np.testing.assert_array_equal(rows.next_observation[:, 0], np.arange(1, 501.0)[:, None].repeat(16, 1))
    np.testing.assert_array_equal(rows.reward[:, 0], np.arange(1, 501.0))


def test_caller_may_reuse_batch_buffers(as_new):
    agent = as_new(4, capacity=1024, update_interval=4)
    now, then = aligned((4, 2), np.float32), aligned((4, 2), np.float32)
    reward, terminated, truncated = aligned((4,), np.float32), aligned((4,), np.bool_), aligned((4,), np.bool_)
    for number in range(101):
        now[:], then[:], reward[:], terminated[:], truncated[:] = number, number + 0.5, number, number % 3 == 0, number % 4 == 0
        agent.batch_act_and_train(now, reward, terminated, truncated, then)
        now[:], then[:], reward[:], terminated[:], truncated[:] = -1, -1, -1, True, True
    rows = stored(agent.state)
    numbers = np.arange(1, 101)
    np.testing.assert_array_equal(rows.observation[:, :, 0], np.repeat(numbers[:, None] - 1, 4, 1))
    np.testing.assert_array_equal(rows.next_observation[:, :, 0], np.repeat(numbers[:, None] + 0.5, 4, 1))
    np.testing.assert_array_equal(rows.reward[:, 3], numbers)
    np.testing.assert_array_equal(rows.discount[:, 2], numbers % 3 != 0)
    np.testing.assert_array_equal(rows.last[:, 1], (numbers % 3 == 0) | (numbers % 4 == 0))


def test_nothing_handed_out_shares_memory_with_the_agent(as_new):
    agent = as_new(4, update_interval=4)
    observation = np.zeros((4, 2), np.float32)
    before = dqn_jax.digest(agent.state)
    agent.batch_act(observation)[:] = 99
    state = agent.state
    actions = agent.batch_act_and_train(observation)
    kept = actions.copy()
    actions[:] = 99
    agent.batch_act_and_train(observation, np.ones(4), np.zeros(4, bool), np.zeros(4, bool))
    np.testing.assert_array_equal(stored(agent.state).action[0], kept)
    assert dqn_jax.digest(state) == before  # And later calls, which donate, leave a state that was handed out alone.


def test_act_changes_nothing(as_new):
    def run(look):
        agent = as_new()
        for number in range(30):
            agent.act_and_train(see(number), 1.0)
            if look:
                before = dqn_jax.digest(agent.state), agent.get_statistics()
                first = agent.act(see(number))
                assert first == agent.act(see(number))
                assert dqn_jax.digest(agent.state) == before[0]
                assert same_statistics(agent.get_statistics(), before[1])
        agent.stop_episode_and_train(see(30), 1.0)
        return dqn_jax.digest(agent.state)

    assert run(look=True) == run(look=False)


def test_cartpole_takes_the_actions_as_they_are(as_new):
    env = gymnasium.make("CartPole-v1")
    agent = as_new(both_spaces=(env.observation_space, env.action_space))
    observation, reward = env.reset(seed=1)[0], 0.0
    for step in range(80):
        action = agent.act_and_train(observation, reward) if step % 4 else agent.act(observation)
        assert type(action) is int
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            if step % 4:
                agent.stop_episode_and_train(observation, reward, terminated=terminated)
            observation, reward = env.reset()[0], 0.0
    assert agent.get_statistics()["t"] > 20


def test_act_is_greedy(as_new):
    agent = as_new(epsilon=1.0)
    state = agent.state
    for number in (0, 1, -3):
        values = agent.agent.exploit(state.learner, see(number)[None])
        assert agent.act(see(number)) == int(values[0])
    played = {agent.act_and_train(see(0), 0.0) for _ in range(40)}
    assert played == {0, 1, 2}  # Epsilon 1 explores everything.


def vector_env(num_envs, **options):
    return gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="sync", **options)


def test_vector_env_stores_true_successors(as_new):
    limit = 12
    envs = vector_env(
        4,
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        wrappers=[lambda env: gymnasium.wrappers.TimeLimit(env, limit)],
    )
    agent = DQN(envs, **{**SMALL, "update_interval": 4, "capacity": 4096, "epsilon": 1.0})
    assert agent.num_envs == 4
    observation = envs.reset(seed=3)[0]
    outcome = ()
    expected = []
    for _ in range(120):
        actions = agent.batch_act_and_train(observation, *outcome)
        assert actions.shape == (4,) and envs.action_space.contains(actions.astype(envs.action_space.dtype))
        following, reward, terminated, truncated, infos = envs.step(actions)
        successor = following.copy()
        for i in np.flatnonzero(terminated | truncated):
            successor[i] = infos["final_obs"][i]
        expected.append((observation.copy(), actions, reward, 1.0 - terminated, successor, terminated | truncated))
        observation, outcome = following, (reward, terminated, truncated, dqn_jax.true_successors(following, infos))
    rows = stored(agent.state)
    fields = (rows.observation, rows.action, rows.reward, rows.discount, rows.next_observation, rows.last)
    for found, wanted in zip(fields, zip(*expected[:-1], strict=True), strict=True):
        np.testing.assert_array_equal(found, np.stack(wanted))
    # Both ends occurred; a terminated successor lies outside the bounds, where no reset observation can be.
    ended, cut = rows.discount == 0, rows.last & (rows.discount == 1)
    assert ended.any() and cut.any()
    outside = (np.abs(rows.next_observation[..., 0]) > 2.4) | (np.abs(rows.next_observation[..., 2]) > 0.2094)
    np.testing.assert_array_equal(outside, ended)
    assert agent.get_statistics()["episodes"] == rows.last.sum()
    assert agent.batch_act(observation).shape == (4,)


def test_next_step_vector_env_is_refused():
    with pytest.raises(ValueError, match=r"autoreset_mode.*SAME_STEP"):
        DQN(vector_env(2))


def test_scalar_methods_are_a_batch_of_one(as_new):
    def run(batched):
        agent = as_new()
        number = 0
        reward, ended, successor = None, None, None
        for length in (4, 1, 9, 6):
            for _ in range(length):
                if batched:
                    no, flags = np.zeros(1, bool), np.array([bool(ended)])
                    agent.batch_act_and_train(see(number)[None], reward, no, flags, None if successor is None else successor[None])
                    reward, ended, successor = np.ones(1), False, see(number + 1)
                else:
                    agent.act_and_train(see(number), 1.0)
                number += 1
            if batched:
                ended, successor = True, see(number)
            else:
                agent.stop_episode_and_train(see(number), 1.0, terminated=False)
            number += 10
        if batched:  # The last end is handed in together with the first observation of an episode.
            agent.batch_act_and_train(see(number)[None], reward, np.zeros(1, bool), np.ones(1, bool), successor[None])
        else:
            agent.act_and_train(see(number), 1.0)
        return dqn_jax.digest(agent.state)

    assert run(batched=True) == run(batched=False)


STATISTICS = {"t", "episodes", "n_updates", "average_q", "average_loss", "epsilon", "replay_size"}


def test_statistics_are_there_from_the_first_moment(as_new):
    agent = as_new(epsilon=(1.0, 0.1, 20))
    said = agent.get_statistics()
    assert set(said) >= STATISTICS
    assert (said["t"], said["episodes"], said["n_updates"], said["replay_size"], said["epsilon"]) == (0, 0, 0, 0, 1.0)
    assert np.isnan(said["average_q"]) and np.isnan(said["average_loss"])
    play(agent, [(6, "truncated"), (5, "terminated"), (4, "stop_episode")])
    said = agent.get_statistics()
    assert set(said) >= STATISTICS
    assert (said["t"], said["episodes"], said["n_updates"], said["replay_size"]) == (14, 2, 4, 14)
    assert said["epsilon"] == pytest.approx(1.0 - 0.9 * 14 / 20)
    assert np.isfinite(said["average_q"]) and said["average_loss"] > 0
    assert all(isinstance(value, int | float) for value in said.values())


def test_dict_observations(as_new):
    space = spaces.Dict(
        {"where": spaces.Box(-10, 10, (2,), np.float64), "kind": spaces.Discrete(4, start=2), "flags": spaces.MultiBinary(3)}
    )
    agent = as_new(both_spaces=(space, spaces.Discrete(3)))
    space.seed(0)
    seen = []
    for _ in range(21):
        seen.append(space.sample())
        assert 0 <= agent.act(seen[-1]) < 3
        agent.act_and_train(seen[-1], 1.0)
    rows = stored(agent.state).observation
    for name in space:
        np.testing.assert_array_equal(rows[name][:, 0], np.stack([o[name] for o in seen[:-1]]).astype(rows[name].dtype))
    assert agent.state.learner.params["params"]["Dense_0"]["kernel"].shape == (2 + 4 + 3, 8)


def test_discrete_observations_are_one_hot(as_new):
    agent = as_new(both_spaces=(spaces.Discrete(5), spaces.Discrete(2)))
    for step in range(21):
        agent.act_and_train(np.int64(step % 5), 1.0)
    assert stored(agent.state).observation[:, 0].tolist() == [step % 5 for step in range(20)]
    kernel = agent.state.learner.params["params"]["Dense_0"]["kernel"]
    assert kernel.shape == (5, 8)
    assert 0 <= agent.act(3) < 2


MASKED = spaces.Dict({"observation": spaces.Box(-100, 100, (2,), np.float32), "action_mask": spaces.MultiBinary(5)})


@pytest.mark.parametrize("epsilon", [1.0, 0.0])
def test_forbidden_actions_are_never_chosen(as_new, epsilon):
    agent = as_new(both_spaces=(MASKED, spaces.Discrete(5)), epsilon=epsilon)
    rng = np.random.default_rng(0)
    chosen = set()
    for step in range(150):
        mask = rng.integers(0, 2, 5).astype(np.int8)
        mask[rng.integers(5)] = 1
        value = rng.normal(size=2).astype(np.float32)
        observation = {"observation": value, "action_mask": mask} if step % 2 else Masked(value, mask.astype(bool))
        assert mask[agent.act(observation)]
        action = agent.act_and_train(observation, 1.0)
        assert mask[action]
        chosen.add(action)
        if step % 10 == 9:  # The successor of a terminated episode may forbid everything.
            agent.stop_episode_and_train({"observation": value, "action_mask": np.zeros(5, np.int8)}, 1.0)
    assert chosen == set(range(5))
    assert 0 < agent.get_statistics()["average_loss"] < 10


def test_forbidden_actions_in_a_batch(as_new):
    agent = as_new(2, both_spaces=(MASKED, spaces.Discrete(5)), epsilon=0.5)
    rng = np.random.default_rng(1)
    outcome = ()
    for _ in range(60):
        mask = np.eye(5, dtype=bool)[rng.integers(5, size=2)] | np.eye(5, dtype=bool)[rng.integers(5, size=2)]
        observation = Masked(rng.normal(size=(2, 2)).astype(np.float32), mask)
        assert mask[np.arange(2), agent.batch_act(observation)].all()
        assert mask[np.arange(2), agent.batch_act_and_train(observation, *outcome)].all()
        outcome = (np.ones(2), np.array([True, False]), np.array([False, False]), Masked(observation.observation, mask & [[False], [True]]))
    assert np.isfinite(agent.get_statistics()["average_loss"])


def consistent(agent):
    """Whether what the agent says agrees with its state."""
    state, said = agent.state, agent.get_statistics()
    held = min(int(state.step), 256)
    return (said["t"], said["n_updates"], said["replay_size"]) == (int(state.step), int(state.updates), held)


def no_row_runs_on(state, following=1):
    """Whether every row that is not an end is followed by the row of its own successor."""
    rows = stored(state)
    number, then, last = rows.observation[:, 0, 0], rows.next_observation[:, 0, 0], rows.last[:, 0]
    return np.all(then == number + following) and np.all(last[:-1] | (number[1:] == then[:-1]))


# An interrupt that falls into a callback of the garbage collector is swallowed by Python, which only reports it; the loop then goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_interrupts_at_random_moments_leave_the_agent_usable(as_new):
    agent = as_new(update_interval=1, replay_start_size=4, epsilon=0.5)
    play(agent, EPISODES)  # Everything is compiled before the first interrupt.
    agent = as_new(update_interval=1, replay_start_size=4, epsilon=0.5)
    play(agent, [(3, "terminated"), (8, "stop_episode"), (9, "truncated")])
    draw = random.Random(0)
    armed = False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    hits = dropped = 0
    number = 1000
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while hits < 150:
            number += 10  # A new episode; without a cut its first row would follow the interrupted one.
            stored_before = int(agent.state.step)
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 3e-3))
                for step in range(40):
                    agent.act_and_train(see(number), 1.0)
                    number += 1
                    if step % 7 == 6:
                        agent.stop_episode_and_train(see(number), 1.0, terminated=False)
                        number += 10
                        agent.get_statistics()  # To look also stores the rows that wait.
                armed = False
            except KeyboardInterrupt:
                armed = False
                hits += 1
                assert consistent(agent)
                assert 0 <= agent.act(see(number)) < 3
                # An interrupt may also fall beside the guarded part, where the call has done nothing or all; the loop's owner stops then.
                if agent._stepper.pending:
                    agent.stop_episode()
                else:
                    dropped += 1
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            if agent._stepper.pending:
                agent.stop_episode()
            # It still learns: every stored transition is one update, after a few calls that make up for what was interrupted.
            number += 10
            for _ in range(4):
                agent.act_and_train(see(number), 1.0)
                number += 1
            agent.stop_episode_and_train(see(number), 1.0)
            number += 10
            assert int(agent.state.step) >= stored_before + 4
            assert consistent(agent)
            assert no_row_runs_on(agent.state)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert dropped > 100
    agent.act_and_train(see(number), 1.0)
    state = agent.state
    assert int(state.updates) == int(state.step) - 3  # None lost, none repeated.
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.learner.params))


def test_exception_in_the_middle_leaves_the_agent_usable():
    switch = {"broken": False}

    def apply(params, observation):
        if observation.shape[0] == 4 and switch["broken"]:  # The batch of an update, not a decision.
            raise FloatingPointError("broken network")
        return observation @ params["w"]

    options = {**STEPPING, "network": Network(LINEAR.init, apply), "replay_start_size": 4, "update_interval": 1}
    agent = DQN(SPACES, **options)
    switch["broken"] = True
    for number in range(4):
        agent.act_and_train(see(number), 1.0)
    with pytest.raises(FloatingPointError, match="broken network"):
        agent.act_and_train(see(4), 1.0)
    assert (int(agent.state.step), int(agent.state.updates)) == (4, 0)  # The fourth transition was stored, its update was not done.
    with pytest.raises(RuntimeError, match="no episode is open"):
        agent.stop_episode_and_train(see(5), 1.0)
    switch["broken"] = False
    for number in range(100, 104):
        agent.act_and_train(see(number), 1.0)
    assert consistent(agent)
    assert no_row_runs_on(agent.state)
    assert int(agent.state.updates) == int(agent.state.step) - 3  # The update that failed was made up for.


def test_rows_wait_no_longer_than_there_is_room(as_new, monkeypatch):
    def run():
        agent = DQN(SPACES, **{**SMALL, "update_interval": 8})
        rows = play(agent, EPISODES)
        return dqn_jax.digest(agent.state), len(rows), agent._stepper._unstaged.capacity

    roomy = run()
    monkeypatch.setattr(staging, "STAGED_BYTES", 100)
    cramped = run()
    assert (roomy[2], cramped[2]) == (8, 3)
    assert cramped[:2] == roomy[:2]


@pytest.mark.parametrize("waiting", [1, 2])
def test_a_failed_load_leaves_the_rows_that_wait(as_new, tmp_path, waiting):
    agent = as_new(replay_start_size=100)
    for number in range(1 + waiting):
        agent.act_and_train(see(number), 1.0)
    with pytest.raises(FileNotFoundError):
        agent.load(tmp_path / "nothing")
    agent.act_and_train(see(1 + waiting), 1.0)
    np.testing.assert_array_equal(stored(agent.state).observation[:, 0, 0], np.arange(1 + waiting))


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("function", ["compute_inline", "device_per_core"])
def test_threads_are_chosen_before_anything_is_computed(function):
    said = in_a_fresh_process(f"""
        import jax
        import dqn_jax
        dqn_jax.{function}()  # Importing the package has computed nothing yet.
        assert jax.numpy.ones(3).sum() == 3
        try:
            dqn_jax.{function}()
        except RuntimeError as error:
            print(error)
    """)
    assert said == f"JAX has already begun to compute: call {function}() before the first array is made"


@pytest.mark.parametrize(
    "options", ["", "prioritized=True, update_interval=4, updates_per_interval=2", "num_envs=4, update_interval=4, n_steps=3"]
)
def test_inline_is_bit_for_bit_the_same(options):
    """Inline, the arrays of the rows that wait are used again."""
    code = f"""
        import gymnasium, numpy as np, dqn_jax
        INLINE
        kept = dict(hidden=(32, 32), batch_size=8, capacity=50, replay_start_size=8, epsilon=0.3, update_interval=1)
        agent = dqn_jax.DQN((gymnasium.spaces.Box(-9, 9, (3,)), gymnasium.spaces.Discrete(3)), **(kept | dict({options})))
        rng, actions = np.random.default_rng(0), []
        for step in range(1, 121):
            if agent.num_envs == 1:
                actions.append(agent.act_and_train(rng.normal(size=3), rng.normal()))
                if step % 13 == 0:
                    agent.stop_episode_and_train(rng.normal(size=3), 1.0, terminated=step % 2 == 0)
                if step % 29 == 0:
                    agent.stop_episode()
                if step % 31 == 0:
                    agent.get_statistics()  # Stores the rows that wait.
            else:
                seen, ended = rng.normal(size=(2, 4, 3)), rng.random((2, 4)) < 0.1
                actions.append(agent.batch_act_and_train(seen[0], rng.normal(size=4), *ended, seen[1]).tolist())
        print(dqn_jax.digest(agent.state), agent.get_statistics(), actions)
    """
    inline, plain = (in_a_fresh_process(code.replace("INLINE", line)) for line in ("dqn_jax.compute_inline()", ""))
    assert inline == plain


def test_repr_tells_how_far_it_is(as_new):
    agent = as_new()
    play(agent, [(9, "terminated"), (1, "truncated")])
    assert repr(agent) == "DQN(num_envs=1, t=10, episodes=2, n_updates=1)"


def test_same_seed_same_run_and_another_seed_another():
    def run(seed):
        agent = DQN(SPACES, seed, **SMALL)
        play(agent, EPISODES)
        return dqn_jax.digest(agent.state), agent.get_statistics()

    first, again, other = run(5), run(5), run(6)
    assert first[0] == again[0] and same_statistics(first[1], again[1])
    assert first[0] != other[0]
    assert not same_statistics(first[1], other[1])
