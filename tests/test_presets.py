"""What a preset makes of its options: the network and the replay that go with the spaces."""

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces

import dqn_jax
from dqn_jax import PPO, PPO_PRESETS, PQN_PRESETS, PRESETS, DQNOptions
from dqn_jax.memory.frames import Frames
from dqn_jax.memory.prioritized import Prioritized
from dqn_jax.memory.ring import Ring
from dqn_jax.normalize import Moments
from dqn_jax.presets.reading import encoder_of

ACTIONS = spaces.Discrete(3)


def image(*shape, dtype=np.uint8):
    return spaces.Box(0, 1 if dtype is bool else 255, shape, dtype)


@pytest.mark.parametrize(
    ("space", "options", "expected"),
    [
        (spaces.Box(-1, 1, (4,)), {}, ("flat", False)),
        (image(28), {}, ("flat", False)),  # A vector of bytes.
        (spaces.Box(0, 1, (84, 84, 4), np.float32), {}, ("flat", False)),
        (image(84, 84), {}, ("nature", False)),
        (image(4, 84, 84), {}, ("nature", True)),
        (image(84, 84, 4), {}, ("nature", False)),
        (image(210, 160, 3), {}, ("nature", False)),
        (image(10, 10, 4, dtype=bool), {}, ("minatar", False)),
        (image(10, 10, 10, dtype=bool), {}, ("minatar", False)),
        (image(4, 4, 31, dtype=bool), {}, ("minatar", False)),  # pgx/2048: more channels than cells.
        (image(2, 2, 5), {}, ("flat", False)),
        (image(12, 10, 10), {"frames": "stack_first"}, ("minatar", True)),
        (image(84, 84, 4), {"encoder": "flat"}, ("flat", False)),
        (image(4, 84, 84, 3), {}, ("flat", False)),
        (spaces.Dict({"observation": image(4, 84, 84), "action_mask": spaces.MultiBinary(3)}), {}, ("nature", True)),
    ],
    ids=str,
)
def test_the_network_goes_with_the_observations(space, options, expected):
    o = DQNOptions(**options)
    assert encoder_of(o.encoder, space, o.frames) == expected
    dqn_jax.dqn((space, ACTIONS), capacity=1_000, **options)  # It can be built.


def state_of(space, **options):
    agent = dqn_jax.dqn((space, ACTIONS), **options)
    example = jax.ShapeDtypeStruct((1, *space.shape), space.dtype)
    return jax.eval_shape(agent.init, jax.random.key(0), example)


@pytest.mark.parametrize(("encoder", "layers"), [("nature", 3 + 2), ("minatar", 1 + 2), ("flat", 3)])
def test_hidden_layers_by_default(encoder, layers):
    state = state_of(image(84, 84, 4), encoder=encoder, capacity=1_000)
    assert len(state.learner.params["params"]) == layers
    width = {"nature": 512, "minatar": 128, "flat": 64}[encoder]
    assert state.learner.params["params"]["Dense_0"]["bias"].shape == (width,)


def test_the_options_choose_the_replay():
    kinds = {
        (False, "off"): Ring,
        (False, "stack_last"): Frames,
        (True, "off"): Prioritized,
        (True, "stack_last"): Prioritized,
    }
    for (prioritized, frames), kind in kinds.items():
        memory = state_of(image(84, 84, 4), prioritized=prioritized, frames=frames, capacity=1_000).memory
        assert type(memory) is kind
        if prioritized:
            assert type(memory.stored) is (Ring if frames == "off" else Frames)


def test_a_million_frames_fit_in_what_the_readme_says():
    memory = state_of(image(4, 84, 84), frames="stack_first", prioritized=True, capacity=1_000_000).memory
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory)) <= 7.085e9


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_agent(name):
    images = {"minatar": image(10, 10, 4, dtype=bool), "atari": image(4, 36, 36)}
    space = images.get(name, gymnasium.make("CartPole-v1").observation_space)
    dqn_jax.DQN((space, ACTIONS), **PRESETS[name])


@pytest.mark.parametrize("name", PQN_PRESETS)
def test_every_preset_of_pqn_makes_an_agent_for_as_many_environments_as_it_says(name):
    space = image(10, 10, 4, dtype=bool) if name == "minatar" else gymnasium.make("CartPole-v1").observation_space
    agent = dqn_jax.PQN((space, ACTIONS), num_envs=128 if name == "minatar" else 1, **PQN_PRESETS[name])
    assert agent.get_statistics()["epsilon"] == 1


@pytest.mark.parametrize("name", ["rnd_paper", "snd_v", "snd_std", "snd_vic"])
def test_presets_of_curiosity_learn_from_stacked_frames_and_see_the_newest(name):
    space = image(4, 36, 36)  # As small as Nature's convolutions take them.
    agent = PPO((space, ACTIONS), **{**PPO_PRESETS[name], "rollout_length": 2, "batch_size": 2, "epochs": 1, "curiosity_epochs": 1})
    before, random = agent.state.learner, np.random.default_rng(0)
    for _ in range(4):
        agent.act_and_train(random.integers(256, size=space.shape).astype(np.uint8), 0.0)
    after, statistics = agent.state.learner, agent.get_statistics()
    assert statistics["n_updates"] == 1 and np.isfinite(statistics["average_predictor_loss"])
    kernels = [learner.curiosity.predictor["params"]["Conv_0"]["kernel"] for learner in (before, after)]
    assert kernels[0].shape[2] == 1 and not np.array_equal(*kernels)
    targets = [jax.tree.leaves(learner.curiosity.target) for learner in (before, after)]
    assert all(np.array_equal(*pair) for pair in zip(*targets, strict=True)) == (name == "rnd_paper")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert after.learner.params["params"]["Conv_0"]["kernel"].shape[2] == 4  # The policy sees all four.


@pytest.mark.parametrize(
    ("space", "normalised"),
    [
        (spaces.Box(0, 1, (4,)), False),
        (spaces.Box(-1, 1, (4,)), True),
        (spaces.Discrete(5), False),
        (image(10, 10, 4, dtype=bool), False),
        (image(84, 84, 4), True),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (2,))}), False),
        (spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 2, (2,))]), True),
        (spaces.Dict({"observation": spaces.Box(0, 9, (4,)), "action_mask": spaces.MultiBinary(3)}), True),
    ],
    ids=str,
)
def test_what_is_not_small_anyway_is_normalised(space, normalised):
    for curiosity in ("rnd", "snd-vic"):
        agent = dqn_jax.ppo((space, ACTIONS), curiosity=curiosity)
        state = jax.eval_shape(agent.init, jax.random.key(0), dqn_jax.spaces.example(space, 1))
        vectors = dqn_jax.spaces.is_masked(space) or len(space.shape or ()) < 2  # SND leaves images as they are.
        assert isinstance(state.learner.curiosity.observations, Moments) == (normalised and (vectors or curiosity == "rnd"))


@pytest.mark.parametrize("frames", ["off", "stack_first"])
def test_a_replay_of_frames_serves_curiosity(frames):
    space = image(2, 12, 12)
    options = {"n_steps": 1, "replay_start_size": 8, "batch_size": 4, "capacity": 32, "hidden": (8,), "curiosity_channels": 1}
    agent = dqn_jax.DQN((space, ACTIONS), curiosity="rnd", frames=frames, **options)
    random = np.random.default_rng(0)
    observation = np.zeros(space.shape, np.uint8)
    for _ in range(12):
        observation = np.stack([observation[1], random.integers(256, size=(12, 12)).astype(np.uint8)])
        agent.act_and_train(observation, 0.0)
    statistics = agent.get_statistics()
    assert statistics["n_updates"] > 0 and statistics["average_intrinsic_reward"] > 0
    assert agent.state.learner.curiosity.predictor["params"]["Conv_0"]["kernel"].shape[2] == 1


def test_rainbow_has_a_name_of_its_own():
    env = gymnasium.make("CartPole-v1")
    agent = dqn_jax.Rainbow(env, 3, hidden=(8,), capacity=300, replay_start_size=200)
    same = dqn_jax.DQN(env, 3, **{**dqn_jax.RAINBOW_PRESETS["default"], "hidden": (8,), "capacity": 300, "replay_start_size": 200})
    assert dqn_jax.digest(agent.state) == dqn_jax.digest(same.state)
    again = dqn_jax.Rainbow.from_state(env, agent.state, hidden=(8,), capacity=300, replay_start_size=200)
    assert repr(again).startswith("Rainbow(") and dqn_jax.digest(again.state) == dqn_jax.digest(agent.state)
    pure = dqn_jax.rainbow(env, hidden=(8,), capacity=300, replay_start_size=200)
    assert jax.tree.structure(jax.eval_shape(pure.init, jax.random.key(0), np.zeros((1, 4), np.float32))) == jax.tree.structure(agent.state)
