"""DQN's family: equations, heads and networks against models in NumPy, and what any combination of them has to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from gymnasium import spaces

import dqn_jax
from dqn_jax import heads, returns, training
from dqn_jax.algorithms.dqn import Munchausen, dqn
from dqn_jax.networks import Network
from dqn_jax.types import Batch, Masked, Transition
from dqn_jax.value_networks import NoisyDense, ValueNetwork

A, B, K = 3, 6, 5
SUPPORT = np.linspace(-2.0, 3.0, K, dtype=np.float32)
LOWEST = np.finfo(np.float32).min


# The equations.


@pytest.mark.parametrize("seed", range(4))
def test_projection_equals_the_oracle_and_keeps_mass_and_mean(seed):
    random = np.random.default_rng(seed)
    mass = random.dirichlet(np.ones(7)).astype(np.float32)
    inside, anywhere = random.uniform(-2, 3, 7).astype(np.float32), random.uniform(-9, 9, 7).astype(np.float32)
    for places in (inside, anywhere, SUPPORT[[0, 1, 2, 2, 4, 4, 3]]):
        got = np.asarray(returns.project(SUPPORT, places, mass))
        np.testing.assert_allclose(got, oracle.project(SUPPORT, places, mass), atol=1e-6)
        np.testing.assert_allclose(got.sum(), 1.0, atol=1e-6)
        np.testing.assert_allclose(got @ SUPPORT, np.clip(places, -2, 3) @ mass, atol=1e-5)


@pytest.mark.parametrize("ends", [(-10.0, 10.0), (0.0, 0.3), (-100.0, 100.0), (-1e4, 1e-3)])
def test_projection_leaves_atoms_where_they_are_and_loses_nothing_to_rounding(ends):
    support = jnp.linspace(*ends, 51)
    moved = jax.vmap(lambda mass: returns.project(support, support, mass))(jnp.eye(51))
    np.testing.assert_allclose(moved, np.eye(51), atol=1e-4)
    far = jax.vmap(lambda place: returns.project(support, place[None], jnp.ones(1)))(jnp.linspace(-1e5, 1e5, 999))
    np.testing.assert_allclose(far.sum(axis=1), 1.0, atol=1e-4)


def test_cross_entropy_and_where_its_gradient_goes():
    logits, mass = jnp.array([1.0, 0.0, -2.0]), jnp.array([0.2, 0.5, 0.3])
    softmax = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(returns.cross_entropy(logits, mass), -(mass * np.log(softmax)).sum(), rtol=1e-6)
    to_logits, to_mass = jax.grad(returns.cross_entropy, argnums=(0, 1))(logits, mass)
    np.testing.assert_allclose(to_logits, softmax - mass, atol=1e-6)
    np.testing.assert_array_equal(to_mass, 0.0)


def test_quantile_loss_by_hand():
    # Errors 1.5 and 0.5 of the first quantile, 0.5 and -0.5 of the second; Huber's 1, 0.125, 0.125, 0.125; slopes 1/4, 1/4, 3/4, 1/4.
    loss = returns.quantile_huber(jnp.array([0.5, 1.5]), jnp.array([0.25, 0.75]), jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(loss, (0.25 * 1.0 + 0.25 * 0.125) / 2 + (0.75 * 0.125 + 0.25 * 0.125) / 2, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_quantile_loss_equals_the_oracle(seed):
    random = np.random.default_rng(seed)
    quantile, fraction, target = random.normal(0, 3, 4), random.random(4), random.normal(0, 3, 7)
    given = [np.float32(each) for each in (quantile, fraction, target)]
    np.testing.assert_allclose(returns.quantile_huber(*given), oracle.quantile_huber(quantile, fraction, target), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(returns.quantile_huber, argnums=2)(*given), 0.0)


def test_the_best_quantiles_of_a_sample_are_its_quantiles():
    sample = jnp.asarray(np.random.default_rng(0).normal(0, 50, 400).astype(np.float32))  # Wide, so that Huber's bend hardly matters.
    fractions = heads.middles(4)
    descend = jax.jit(lambda q, rate: q - rate * jax.grad(returns.quantile_huber)(q, fractions, sample))
    quantile = jnp.zeros(4)
    for rate in np.geomspace(30.0, 0.5, 600):
        quantile = descend(quantile, rate)
    np.testing.assert_allclose(quantile, np.quantile(sample, fractions), atol=2.0)


def test_a_soft_policy_is_finite_whatever_is_forbidden():
    q = jnp.array([1.0, 1.05, LOWEST])
    policy, scaled_log = returns.soft_policy(q, 0.03)
    expected = np.exp((np.array([1.0, 1.05]) - 1.05) / 0.03)
    np.testing.assert_allclose(policy, [*(expected / expected.sum()), 0.0], rtol=1e-5)
    np.testing.assert_allclose(scaled_log[:2], 0.03 * np.log(expected / expected.sum()), rtol=1e-4, atol=1e-7)
    assert np.isfinite(scaled_log).all() and scaled_log[2] < -1e6 and float(policy @ scaled_log) < 0
    # An action that is allowed and poor has no chance in float32, and a log-probability all the same.
    np.testing.assert_allclose(returns.soft_policy(jnp.array([5.0, 0.0]), 0.03)[1], [0.0, -5.0], atol=1e-5)
    nothing, scaled_log = returns.soft_policy(jnp.full(3, LOWEST), 0.03)  # The successor of a terminated episode may allow nothing.
    assert np.isfinite(nothing).all() and np.isfinite(scaled_log).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: returns.project(SUPPORT, SUPPORT[:2], SUPPORT),
        lambda: returns.project(SUPPORT[None], SUPPORT, SUPPORT),
        lambda: returns.cross_entropy(SUPPORT, SUPPORT[:2]),
        lambda: returns.quantile_huber(SUPPORT, SUPPORT[:2], SUPPORT),
        lambda: returns.quantile_huber(SUPPORT, SUPPORT, jnp.ones(())),
        lambda: returns.soft_policy(jnp.ones((2, 3)), 1.0),
    ],
)
def test_equations_refuse_wrong_shapes(call):
    with pytest.raises(AssertionError):
        call()


# One update of each variant. The network is a table: its outputs are the observation's numbers times one parameter, so that what the
# online and the target network say is known; with fractions the outputs lean on them.


def table(num_outputs, implicit=False):
    def init(key, observation, *fractions):
        return {"scale": jnp.ones(())}

    def apply(params, observation, *fractions):
        outputs = params["scale"] * observation.reshape(observation.shape[0], A, -1)  # [B, A, K], K being 1 for quantiles at fractions
        if implicit:
            return outputs + params["scale"] * jnp.atleast_2d(fractions[0])[:, None]  # [B, A, N]
        return outputs if num_outputs else outputs[..., 0]

    return Network(init, apply)


HEADS = {
    "huber": (heads.expected(), 0),
    "mse": (heads.expected("mse"), 0),
    "c51": (heads.categorical(SUPPORT), K),
    "qrdqn": (heads.quantiles(K), K),
    "iqn": (heads.implicit_quantiles(K), 1),
}


def batch_of(kind, masked, seed=0):
    random = np.random.default_rng(seed)
    before, after = random.normal(size=(2, B, A * max(HEADS[kind][1], 1))).astype(np.float32)
    last = np.arange(B) % 3 == 2
    discount = np.where(last, 0.0, 0.9).astype(np.float32)
    mask = random.random((2, B, A)) < 0.5
    mask[:, :, 0] |= ~mask.any(axis=-1)
    mask[1, 2] = False  # A terminated successor that allows nothing.
    action = np.array([random.choice(np.flatnonzero(row)) for row in mask[0]], np.int32) if masked else random.integers(A, size=B)
    observations = [Masked(x, m) for x, m in zip((before, after), mask, strict=True)] if masked else [before, after]
    reward = random.normal(size=B).astype(np.float32)
    return Batch(
        Transition(observations[0], action.astype(np.int32), reward, discount, observations[1], last), random.random(B).astype(np.float32)
    )


@pytest.mark.parametrize("munchausen", [None, Munchausen(0.9, 0.5), Munchausen()], ids=["max", "soft", "nearly hard"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "free"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_equals_the_oracle(kind, masked, double, munchausen):
    head, num_outputs = HEADS[kind]
    algorithm = dqn(table(num_outputs, kind == "iqn"), optax.sgd(1.0), epsilon=0.1, head=head, double=double, munchausen=munchausen)
    batch = batch_of(kind, masked)
    learner = algorithm.init(jax.random.key(0), batch.transition.observation)._replace(target_params={"scale": -jnp.ones(())})
    key = jax.random.key(5)
    after, feedback = jax.jit(algorithm.learn)(learner, batch, key, jnp.int32(1))
    fractions = np.asarray(*head.draw(jax.random.split(key, 4)[0], B) or (np.zeros(B),))

    def losses(scale=1.0):
        return oracle.dqn_losses(kind, batch, double, munchausen, SUPPORT, heads.middles(K), fractions, scale)

    loss, priority = losses()
    np.testing.assert_allclose(feedback.priority, priority, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(feedback.metrics["loss"], np.mean(batch.weight * loss), rtol=1e-4, atol=1e-5)
    # The gradient goes through the prediction and through nothing else.
    above, below = (np.mean(batch.weight * losses(scale)[0]) for scale in (1 + 1e-5, 1 - 1e-5))
    np.testing.assert_allclose(1.0 - after.params["scale"], (above - below) / 2e-5, rtol=1e-3, atol=1e-4)


def test_forbidden_actions_teach_nothing_and_are_never_chosen():
    for kind, (head, num_outputs) in HEADS.items():
        for munchausen in (None, Munchausen()):
            algorithm = dqn(table(num_outputs, kind == "iqn"), optax.sgd(1.0), epsilon=0.5, head=head, munchausen=munchausen)
            batch = batch_of(kind, True)
            learner = algorithm.init(jax.random.key(0), batch.transition.observation)

            def shifted(masked, by):
                numbers = masked.observation.reshape(B, A, -1).copy()
                numbers[..., -1] += np.where(masked.action_mask, 0, by)  # One output of each: softmax does not see a shift of all.
                return Masked(numbers.reshape(masked.observation.shape).astype(np.float32), masked.action_mask)

            learnt = []
            for by in (0.0, 40.0):
                t = batch.transition
                changed = t._replace(observation=shifted(t.observation, by), next_observation=shifted(t.next_observation, by))
                learnt.append(algorithm.learn(learner, batch._replace(transition=changed), jax.random.key(1), 1)[1].priority)
                noise = algorithm.noise(learner, jax.random.key(2), B)
                for action in (
                    algorithm.exploit(learner, changed.observation),
                    algorithm.explore(learner, changed.observation, noise, 1).action,
                ):
                    assert t.observation.action_mask[np.arange(B), action].all(), (kind, munchausen)
            np.testing.assert_allclose(*learnt, rtol=1e-4, atol=1e-5, err_msg=f"{kind} {munchausen}")


# Networks.


def test_noisy_layers_are_what_the_paper_says():
    layer, x = NoisyDense(3, scale=0.5), np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)
    p = params["params"]
    assert (p["kernel_scale"] == 0.5 / 4).all() and (p["bias_scale"] == 0.5 / 4).all()
    assert (np.abs(p["kernel"]) <= 0.25).all() and np.abs(p["kernel"]).max() > 0.2
    inputs, outputs = np.random.default_rng(1).normal(size=16), np.random.default_rng(2).normal(size=3)
    expected = x @ (p["kernel"] + p["kernel_scale"] * np.outer(inputs, outputs)) + p["bias"] + p["bias_scale"] * outputs
    np.testing.assert_allclose(layer.apply(params, x, (inputs, outputs)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.apply(params, x), x @ p["kernel"] + p["bias"], rtol=1e-6)


SHAPES = {
    "plain": ({}, (2, A)),
    "dueling": ({"dueling": True}, (2, A)),
    "atoms": ({"num_outputs": K}, (2, A, K)),
    "dueling atoms, noisy": ({"num_outputs": K, "dueling": True, "noisy": 0.5}, (2, A, K)),
    "fractions": ({"cosines": 4}, (2, A, 7)),
    "dueling fractions, noisy, images": ({"cosines": 4, "dueling": True, "noisy": 0.5, "convolutions": ((4, 2, 1),)}, (2, A, 7)),
}


@pytest.mark.parametrize(("options", "shape"), SHAPES.values(), ids=SHAPES)
def test_the_network_gives_what_the_head_takes(options, shape):
    images = "convolutions" in options
    network = ValueNetwork(A, hidden=(8, 8), **options, **({"features": lambda x: x} if images else {}))
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2) if images else (2, 5)).astype(np.float32)
    fractions = (heads.middles(7),) if network.cosines else ()
    params = network.init(jax.random.key(0), x, *fractions)
    outputs = network.apply(params, x, *fractions)
    assert outputs.shape == shape and outputs.dtype == jnp.float32
    drawn = network.draw_noise(params, jax.random.key(1))
    if network.noisy is None:
        assert drawn == ()
    else:
        noisy = network.apply(params, x, *fractions, noise=drawn)
        assert not np.allclose(noisy, outputs)
        other = network.apply(params, x, *fractions, noise=network.draw_noise(params, jax.random.key(2)))
        assert not np.allclose(noisy, other)
        numbers = np.concatenate([each for pair in drawn.values() for each in pair])
        assert len(np.unique(numbers)) == len(numbers) and set(drawn) == {n for n in params["params"] if "value" in n or "advantage" in n}
    if network.cosines:  # Fractions for each observation, or the same for all.
        np.testing.assert_allclose(network.apply(params, x, np.tile(fractions[0], (2, 1))), outputs, rtol=1e-5, atol=1e-6)


def test_noise_has_the_distribution_of_the_paper():
    network = ValueNetwork(1, hidden=(3000,), noisy=0.5)
    params = network.init(jax.random.key(0), np.ones((1, 3000), np.float32))
    numbers = network.draw_noise(params, jax.random.key(1))["value_hidden"][0]
    # sign(x) sqrt|x| of a normal number: its square is |x|, whose mean is sqrt(2 / pi); its mean is 0.
    np.testing.assert_allclose(np.mean(np.square(numbers)), np.sqrt(2 / np.pi), atol=0.05)
    np.testing.assert_allclose(np.mean(numbers), 0.0, atol=0.05)


def test_dueling_takes_the_mean_advantage_away():
    network = ValueNetwork(A, hidden=(8,), dueling=True)
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    params = network.init(jax.random.key(0), x)

    def dense(name, x):
        return x @ params["params"][name]["kernel"] + params["params"][name]["bias"]

    value, advantage = (dense(name, np.maximum(dense(f"{name}_hidden", x), 0)) for name in ("value", "advantage"))
    np.testing.assert_allclose(network.apply(params, x), value + advantage - advantage.mean(axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_the_embedding_of_a_fraction():
    network = ValueNetwork(A, hidden=(6, 8), cosines=5)
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    params = network.init(jax.random.key(0), x, heads.middles(3))
    layers = params["params"]

    def dense(name, x):
        return x @ layers[name]["kernel"] + layers[name]["bias"]

    tau = np.float32(0.3)
    phi = np.maximum(dense("fractions", np.cos(np.pi * np.arange(5) * tau)), 0)
    features = np.maximum(dense("Dense_1", np.maximum(dense("Dense_0", x), 0)), 0)
    np.testing.assert_allclose(network.apply(params, x, np.float32([tau]))[..., 0], dense("value", features * phi), rtol=1e-4, atol=1e-5)


# Noise in the agent.


def recording(noises):
    """A network that notes the noise that each pass is given."""

    def apply(params, observation, noise=None):
        noises.append(None if noise is None else float(noise["z"]))
        return observation * params["w"] + (0.0 if noise is None else noise["z"])

    class Noisy:
        init = staticmethod(lambda key, observation: {"w": jnp.ones(A)})
        draw_noise = staticmethod(lambda params, key: {"z": jax.random.normal(key)})

    Noisy.apply = staticmethod(apply)
    return Noisy()


@pytest.mark.parametrize(
    ("options", "passes", "different"),
    [({}, 3, 3), ({"double": False}, 2, 2), ({"munchausen": Munchausen()}, 3, 2)],
    ids=["double", "single", "soft"],
)
def test_each_network_has_a_noise_of_its_own_in_an_update(options, passes, different):
    noises = []
    algorithm = dqn(recording(noises), optax.sgd(0.1), epsilon=0.0, **options)
    batch = batch_of("huber", False)
    learner = algorithm.init(jax.random.key(0), batch.transition.observation)
    algorithm.learn(learner, batch, jax.random.key(1), 1)
    # Double: prediction, target, and the choice. Single: prediction and target. Soft: the target network sees both observations.
    assert (len(noises), len(set(noises))) == (passes, different) and None not in noises
    algorithm.learn(learner, batch, jax.random.key(2), 1)
    assert len(set(noises)) == 2 * different


def test_decisions_have_noises_of_their_own_and_the_greedy_policy_none():
    noises = []
    algorithm = dqn(recording(noises), optax.sgd(0.1), epsilon=0.0)
    observation = batch_of("huber", False).transition.observation
    learner = algorithm.init(jax.random.key(0), observation)
    algorithm.exploit(learner, observation)
    assert noises == [None]
    for seed in range(2):
        algorithm.explore(learner, observation, algorithm.noise(learner, jax.random.key(seed), B), 1)
    assert len(set(noises)) == 3


def test_predictions_are_made_at_fractions_of_their_own_and_all_else_at_the_middles():
    seen = []
    network = table(1, implicit=True)

    def apply(params, observation, fractions):
        seen.append(np.asarray(fractions))
        return network.apply(params, observation, fractions)

    algorithm = dqn(Network(network.init, apply), optax.sgd(0.1), epsilon=0.0, head=HEADS["iqn"][0])
    batch = batch_of("iqn", False)
    learner = algorithm.init(jax.random.key(0), batch.transition.observation)
    for seed in range(2):
        algorithm.learn(learner, batch, jax.random.key(seed), 1)
    drawn = [one for one in seen if one.shape == (B, K)]
    assert len(drawn) == 2 and len(np.unique(np.concatenate(drawn))) == 2 * B * K  # For each transition its own.
    assert len(seen) == 6 and all((one == heads.middles(K)).all() for one in seen if one.ndim == 1)


def test_munchausen_refuses_windows_of_several_steps():
    algorithm = dqn(table(0), optax.sgd(0.1), epsilon=0.0, munchausen=Munchausen())
    batch = batch_of("huber", False)
    t = batch.transition
    windows = t._replace(**{name: np.stack([getattr(t, name)] * 3, axis=1) for name in ("reward", "discount", "last")})
    with pytest.raises(ValueError, match="munchausen pays for every step, got windows of 3"):
        algorithm.learn(algorithm.init(jax.random.key(0), t.observation), batch._replace(transition=windows), jax.random.key(1), 1)


def test_mass_that_stays_at_an_end_is_not_clipped():
    """Whoever gets 1 for ever at a discount of 0.99 has 100: at the end of the support, not beyond it, whatever rounding says."""
    head = heads.categorical(jnp.linspace(-100.0, 100.0, 51))
    for n in (1, 3, 5, 10):
        reward, discount = returns.n_step(jnp.ones(n), jnp.full(n, 0.99), jnp.zeros(n, bool))
        assert head.loss(jnp.zeros(51), (), reward, discount, jnp.eye(51)[50]).metrics["clipped_mass"] == 0.0
        assert head.loss(jnp.zeros(51), (), reward + 5.0, discount, jnp.eye(51)[50]).metrics["clipped_mass"] == 1.0


# The preset.

SPACES = spaces.Box(-1, 1, (4,)), spaces.Discrete(A)
SETS = {
    "c51": dqn_jax.C51_PRESETS,
    "qrdqn": dqn_jax.QRDQN_PRESETS,
    "iqn": dqn_jax.IQN_PRESETS,
    "rainbow": dqn_jax.RAINBOW_PRESETS,
}
SMALL = {"hidden": (8,), "batch_size": 8, "capacity": 100, "replay_start_size": 8, "n_steps": 1}


@pytest.mark.parametrize("algo", SETS)
def test_the_sets_make_the_agents_that_they_are_named_after(algo):
    for name, chosen in SETS[algo].items():
        options = dqn_jax.DQNOptions(**chosen)
        assert options.distribution == ("c51" if algo == "rainbow" else algo), name
        if algo == "rainbow":
            assert options.dueling and options.noisy == 0.5 and options.prioritized and options.double and options.n_steps > 1
            assert options.epsilon is None
        space = spaces.Box(0, 255, (4, 84, 84), np.uint8) if options.frames != "off" else SPACES[0]
        dqn_jax.dqn((space, SPACES[1]), **chosen)  # It can be built.


def test_sets_for_atari_are_what_they_say():
    efficient = dqn_jax.DQNOptions(**dqn_jax.RAINBOW_PRESETS["data_efficient"])
    assert (efficient.n_steps, efficient.learning_rate, efficient.adam_epsilon, efficient.update_interval) == (20, 1e-4, 1.5e-4, 1)
    assert (efficient.replay_start_size, efficient.target_update_interval, efficient.v_max) == (1_600, 2_000, 10.0)
    c51, qr, iqn = (dqn_jax.DQNOptions(**SETS[algo]["atari"]) for algo in ("c51", "qrdqn", "iqn"))
    assert (c51.learning_rate, c51.num_atoms, c51.v_min, c51.v_max) == (2.5e-4, 51, -10, 10)
    assert (qr.learning_rate, qr.num_quantiles, iqn.learning_rate, iqn.num_quantiles) == (5e-5, 200, 5e-5, 64)
    assert c51.adam_epsilon == qr.adam_epsilon == iqn.adam_epsilon == 0.01 / 32
    o = dqn_jax.DQNOptions(**dqn_jax.RAINBOW_PRESETS["atari"])
    assert (o.learning_rate, o.adam_epsilon, o.n_steps, o.num_atoms, o.v_min, o.v_max) == (6.25e-5, 1.5e-4, 3, 51, -10, 10)
    assert (o.update_interval, 4 * o.target_update_interval, 4 * o.replay_start_size) == (4, 32_000, 80_000)  # Frames in the paper.
    assert (o.alpha, o.beta[:2], o.noisy, o.batch_size, o.capacity, o.gamma) == (0.5, (0.4, 1.0), 0.5, 32, 1_000_000, 0.99)


@pytest.mark.parametrize(
    "options", [{"distribution": "iqn"}, dqn_jax.RAINBOW_PRESETS["default"], {"munchausen": 0.9, "distribution": "qrdqn"}]
)
def test_an_agent_learns_a_bandit(options):
    """The second action pays 1, the others nothing; every step ends the episode."""
    agent = dqn_jax.DQN(SPACES, **{**SMALL, **options, "n_steps": 1, "learning_rate": 3e-3, "v_min": -2.0, "v_max": 2.0})
    observation, reward = np.float32([0.5, -0.5, 0.1, 0.0]), 0.0
    for _ in range(400):
        action = agent.act_and_train(observation, reward)
        agent.stop_episode_and_train(observation, float(action == 1), terminated=True)
    assert agent.act(observation) == 1
    statistics = agent.get_statistics()
    assert ("average_clipped_mass" in statistics) == (options.get("distribution") == "c51")
    assert (statistics["epsilon"] == 0.0) == ("noisy" in options)


def test_a_support_that_cannot_hold_the_returns_is_warned_of():
    agent = dqn_jax.DQN(SPACES, **{**SMALL, "distribution": "c51", "v_min": -1.0, "v_max": 1.0, "learning_rate": 3e-3})
    observation = np.float32([0.5, -0.5, 0.1, 0.0])
    agent.act_and_train(observation, 0.0)
    assert np.isnan(agent.get_statistics()["average_clipped_mass"])  # Nothing learnt, nothing to say.
    for _ in range(200):
        agent.act_and_train(observation, 1.0)
    with pytest.warns(UserWarning, match="raise v_max"):
        agent.get_statistics()


def test_what_a_sweep_may_trace():
    def build(v_max, noisy):
        agent = dqn_jax.dqn(SPACES, **SMALL, distribution="c51", v_max=v_max, munchausen=noisy, munchausen_temperature=noisy)
        return agent.init(jax.random.key(0), jnp.zeros((1, 4))).step

    assert jax.vmap(build)(jnp.array([1.0, 2.0]), jnp.array([0.1, 0.2])).shape == (2,)


def test_noise_ahead_is_capped_in_bytes(monkeypatch):
    env = dqn_jax.make("phys2d/CartPole-v1")
    agent = dqn_jax.dqn(env, hidden=(30_000,), noisy=0.5, update_interval=4, batch_size=4, replay_start_size=4, capacity=8)

    def temporary_bytes():
        run = dqn_jax.train(agent, env, num_steps=2_000, history_length=1)
        state = jax.eval_shape(run.init, jax.random.key(0))
        return jax.jit(run.advance, donate_argnums=0).lower(state).compile().memory_analysis().temp_size_in_bytes

    capped = temporary_bytes()
    monkeypatch.setattr(training, "NOISE_BYTES", 1 << 40)
    assert capped < 0.5 * temporary_bytes()  # 64 cycles of four rows of a quarter of a megabyte, besides what an update takes.
