"""The benchmark of convolutional updates: what it counts is what was done, and PyTorch's update is ours."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dqn_jax import heads
from dqn_jax.algorithms.dqn import dqn
from dqn_jax.bench import latency, nature
from dqn_jax.types import Batch, Transition

IMAGES = latency.Shape((8, 8, 2), ((4, 3, 1),), (8,), 3, (4,), 1_000)
TINY = nature.Sizes(frames=1_000, batch_sizes=(4, 8), learnt=20, repeats=2)


@pytest.fixture
def written(monkeypatch, tmp_path):
    """What the command writes, without PyTorch."""
    monkeypatch.setitem(nature.SHAPES, "Nature", IMAGES)
    monkeypatch.setattr(nature, "sizes", lambda backend, quick: TINY)
    monkeypatch.setattr(nature, "torch_obstacle", lambda: "it is a test")
    monkeypatch.setattr("sys.argv", ["nature", "--quick", "--out", str(tmp_path / "out.json")])
    nature.main()
    return json.loads((tmp_path / "out.json").read_text())


def test_updates_count_by_batch_size_and_store_nothing(written):
    assert [*written["series"]] == ["ours, float32", "ours, bfloat16"]
    for one in written["series"].values():
        assert (one["axis"], one["unit"]) == ("batch size", "updates per second")
        assert [(point["count"], point["updates"], point["steps"]) for point in one["points"]] == [(4, 5, 0), (8, 2, 0)]
        for point in one["points"]:
            assert 0 < point["min"] <= point["median"] <= point["max"] and point["compile_seconds"] > 0
            assert 1_000 * 8 * 8 < point["replay_bytes"] < 1_000 * (8 * 8 + 20)
    assert written["left_out"] == {"PyTorch": "it is a test"} and written["inline"] is False


def test_the_replay_of_the_updates_is_full():
    agent = nature.convolutional_agent(IMAGES, "float32", 4)
    state = jax.eval_shape(agent.init, jax.random.key(0), jnp.zeros((nature.FILLERS, 8, 8, 2), jnp.uint8))
    empty = agent.init(jax.random.key(0), jnp.zeros((nature.FILLERS, 8, 8, 2), jnp.uint8))._replace(memory=())
    memory = nature.full_replay(agent, empty, IMAGES)
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(lambda leaf: leaf.shape, state.memory)
    assert np.all(np.asarray(memory.frames).any(axis=(2, 3)))  # Each frame was written.
    # Of the frames of an environment the first stack of 2, and the newest successor, begin no transition.
    assert 1_000 - 3 * nature.FILLERS <= int(memory.size) <= 1_000


def test_accelerators_get_more_of_everything_but_what_is_quick():
    cpu, gpu, quick = (nature.sizes(*which) for which in (("cpu",), ("gpu",), ("cpu", True)))
    assert (cpu.frames, gpu.frames) == (20_000, 1_000_000) and gpu == nature.sizes("tpu")
    assert cpu.batch_sizes == (32, 128) and gpu.batch_sizes == (32, 128, 512, 1024, 4096)
    assert quick == nature.sizes("gpu", True) and quick.frames < cpu.frames
    for chosen in (cpu, gpu, quick):
        assert min(chosen.learnt // size for size in chosen.batch_sizes) >= 1


def test_work_that_would_measure_nothing_is_refused():
    with pytest.raises(ValueError, match="batch of 8 learns from more than 7"):
        next(nature.updates(IMAGES, TINY._replace(learnt=7)))


def test_a_missing_torch_is_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert nature.torch_obstacle() == "torch is not installed"


def test_a_torch_that_does_not_find_the_accelerator_is_the_reason(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "does not find the device" in nature.torch_obstacle()


def test_frames_of_torch_are_stacks_and_their_successors():
    pytest.importorskip("torch")
    replay = nature.TorchReplay(IMAGES)
    stacks = np.stack(latency.observations(IMAGES)).transpose(0, 3, 1, 2)  # [AHEAD, C, H, W]
    known = {stack.tobytes(): i for i, stack in enumerate(stacks)}
    seen, action, reward, following = (column.numpy() for column in replay.sample(64))
    assert seen.shape == following.shape == (64, 2, 8, 8) and seen.dtype == np.uint8 and reward.shape == action.shape == (64,)
    for one, other in zip(np.ascontiguousarray(seen), np.ascontiguousarray(following), strict=True):
        assert (known[other.tobytes()] - known[one.tobytes()]) % len(stacks) == 1
    assert len({one.tobytes() for one in seen}) > 30


def test_the_update_of_torch_is_ours():
    torch = pytest.importorskip("torch")
    theirs = nature.TorchLearner(IMAGES, nature.TorchReplay(IMAGES), 4, False)
    options = nature.OPTIONS
    optimizer = optax.chain(optax.clip_by_global_norm(options.max_grad_norm), optax.adam(options.learning_rate))
    assert options.double and options.loss == "mse" and options.target_update_interval is None
    ours = dqn(latency.network_of(IMAGES), optimizer, epsilon=0.1, head=heads.expected("mse"), target_update_interval=1, tau=options.tau)

    random = np.random.default_rng(0)
    frames, following = random.integers(0, 256, (2, 4, 8, 8, 2)).astype(np.uint8)
    action, reward = np.array([0, 2, 1, 1]), 30 * random.normal(size=4).astype(np.float32)  # So large that the gradient is clipped.
    learner = ours.init(jax.random.key(0), jnp.asarray(frames))
    conv, hidden, last = ([np.array(layer[name]) for name in ("kernel", "bias")] for layer in learner.params["params"].values())
    conv[0] = conv[0].transpose(3, 2, 0, 1)
    hidden[0] = hidden[0].reshape(6, 6, 4, 8).transpose(3, 2, 0, 1).reshape(8, -1)  # Ours flattens [H, W, C], PyTorch's [C, H, W].
    last[0] = last[0].T
    with torch.no_grad():
        for network in (theirs.online, theirs.target):
            for parameter, value in zip(network.parameters(), [*conv, *hidden, *last], strict=True):
                parameter.copy_(torch.tensor(value))

    row = Transition(frames, action.astype(np.int32), reward, np.full(4, options.gamma, np.float32), following, np.zeros(4, bool))
    batch = Batch(jax.tree.map(jnp.asarray, row), jnp.ones(4))
    given = [torch.tensor(np.moveaxis(images, -1, 1).copy()) for images in (frames, following)]
    for step in range(1, 6):
        learner, feedback = ours.learn(learner, batch, jax.random.key(0), jnp.int32(step))
        loss = theirs.learn(given[0], torch.tensor(action), torch.tensor(reward), given[1])
        np.testing.assert_allclose(float(loss), feedback.metrics["loss"], rtol=1e-4)
    for network, params in ((theirs.online, learner.params), (theirs.target, learner.target_params)):
        np.testing.assert_allclose(network[-1].bias.detach(), params["params"]["Dense_1"]["bias"], rtol=1e-4, atol=1e-6)
