"""SAC against slow models in NumPy: who moves whom, what the critics aim at, what the policy climbs, where the temperature settles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from dqn_jax import Masked, Transition
from dqn_jax.algorithms.sac import MIN_TEMPERATURE, Optimizers, discrete_sac, sac
from dqn_jax.distributions import LOG_STD_RANGE
from dqn_jax.networks import Network
from dqn_jax.types import Batch

B, F, A = 6, 3, 4
S = B + F  # An observation is a unit vector, by which its row can be told from the others, and F numbers.
LOW, HIGH = np.float32([-1, -0.1, 2]), np.float32([3, 0.3, 2.5])  # Of D = 3 numbers, no two alike.
D = len(LOW)
GAMMA = 0.9
KINDS = ["box", "discrete"]
PARTS = {"actor": "actor", "critic": "critics", "temperature": "log_temperature"}
# Gradient descent whose state is its step size: with 0 its part stays where it is, and all cases share one program.
DIAL = optax.GradientTransformation(
    lambda params: jnp.zeros(()), lambda grads, rate, params=None: (jax.tree.map(lambda grad: -rate * grad, grads), rate)
)


def table(num_outputs, scale=1.0):
    """Outputs are linear in the observation; random parameters, without biases."""

    def init(key, observation):
        return {"w": scale * jax.random.normal(key, (observation.shape[-1], num_outputs))}

    return Network(init, lambda params, observation: observation @ params["w"])


def init_value(key, observation, action):
    keys = jax.random.split(key)
    return {"w": jax.random.normal(keys[0], (observation.shape[-1],)), "u": jax.random.normal(keys[1], (action.shape[-1],))}


# Its value is linear in the observation and in the action.
VALUE = Network(init_value, lambda params, observation, action: observation @ params["w"] + action @ params["u"])


DIALS = Optimizers(DIAL, DIAL, DIAL)


def build(kind, optimizers=DIALS, **options):
    if kind == "box":
        return sac(table(2 * D, 0.5), VALUE, optimizers, low=LOW, high=HIGH, **options)
    return discrete_sac(table(A), table(A), optimizers, num_actions=A, **options)


@functools.cache
def fresh(kind):
    return jax.jit(build(kind).init)(jax.random.key(0), jnp.zeros((1, S)))


def begin(kind, shift=1.0, alpha=1.0):
    """A learner whose target critics differ from its critics."""
    learner = fresh(kind)
    targets = jax.tree.map(lambda leaf: shift - 0.5 * leaf, learner.critics)
    return learner._replace(target_critics=targets, log_temperature=jnp.log(jnp.float32(alpha)))


def batch(kind, *, n=1, weight=1.0, mask=None, **fields):
    """Random rows; ``mask`` are those of observations and of successors."""
    random = np.random.default_rng(0)
    observation, successor = (np.concatenate([unit, random.normal(size=(B, F))], axis=1) for unit in (np.eye(B), np.zeros((B, B))))
    last = random.random((B, n)) < 0.4
    action = random.uniform(LOW, HIGH, (B, D)).astype(np.float32) if kind == "box" else random.integers(A, size=B).astype(np.int32)
    discount = np.where(last & (random.random((B, n)) < 0.5), 0.0, GAMMA)
    reward, observation, successor, discount = map(np.float32, (random.normal(size=(B, n)), observation, successor, discount))
    t = Transition(observation, action, reward, discount, successor, last)._replace(**fields)
    if mask is not None:
        t = t._replace(observation=Masked(t.observation, mask[0]), next_observation=Masked(t.next_observation, mask[1]))
    return Batch(t, np.full(B, weight, np.float32) if np.ndim(weight) == 0 else np.float32(weight))


@functools.cache
def program(kind):
    return jax.jit(lambda learner, given, key, numbers: build(kind, **numbers).learn(learner, given, key, 0))


def learn(kind, learner, given, seed=0, *, actor=0.0, critic=0.0, temperature=0.0, tau=0.25, reward_scale=1.0, target_entropy=0.7):
    """One update with these step sizes."""
    learner = learner._replace(**{f"{name}_opt": jnp.float32(rate) for name, rate in zip(PARTS, (actor, critic, temperature), strict=True)})
    numbers = {"tau": tau, "reward_scale": reward_scale, "target_entropy": target_entropy}
    return program(kind)(learner, given, jax.random.key(seed), numbers)


def close(one, other, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_moves_its_own_part_and_no_other(kind):
    given, start, tau = batch(kind), begin(kind), 0.25
    together, _ = learn(kind, start, given, actor=0.1, critic=0.1, temperature=0.1)
    for moving in PARTS:
        after, _ = learn(kind, start, given, **{moving: 0.1})
        for part, field in PARTS.items():
            assert same(getattr(after, field), getattr(start, field)) == (part != moving), (moving, part)
        # The targets follow the critics, whoever moved.
        close(after.target_critics, jax.tree.map(lambda old, new: (1 - tau) * old + tau * new, start.target_critics, after.critics))
        if moving != "actor":  # The policy climbs the critics as they are after their step.
            close(getattr(after, PARTS[moving]), getattr(together, PARTS[moving]))


def test_an_actor_alone_moves_nothing_else_with_optimizers_of_optax_either():
    algorithm = build("box", Optimizers(optax.sgd(0.1), optax.set_to_zero(), optax.set_to_zero()))
    start = jax.jit(algorithm.init)(jax.random.key(0), jnp.zeros((1, S)))
    after, _ = jax.jit(algorithm.learn)(start, batch("box"), jax.random.key(0), 0)
    assert not same(after.actor, start.actor)
    for field in ("critics", "target_critics", "log_temperature"):
        close(getattr(after, field), getattr(start, field), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_climbs_the_critics_as_their_step_left_them(kind):
    given, start = batch(kind), begin(kind)
    both, _ = learn(kind, start, given, actor=0.1, critic=0.5)
    after_critics, _ = learn(kind, start, given, critic=0.5)
    then, _ = learn(kind, start._replace(critics=after_critics.critics), given, actor=0.1)
    before, _ = learn(kind, start, given, actor=0.1)
    close(both.actor, then.actor)
    assert not np.allclose(both.actor["w"], before.actor["w"], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_critics_begin_apart_and_their_targets_beside_them(kind):
    learner = fresh(kind)
    assert all(leaf.shape[0] == 2 and (leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(learner.critics))
    assert same(learner.critics, learner.target_critics)


# What the critics aim at.


def proper(observation):
    return np.asarray(observation.observation if isinstance(observation, Masked) else observation, np.float64)


def critics_of(kind, critics, t):
    """The values ``[2, B]`` of what was done."""
    w = np.asarray(critics["w"], np.float64)
    if kind == "discrete":
        return np.stack([(proper(t.observation) @ one)[np.arange(B), t.action] for one in w])
    inside = 2 * (np.asarray(t.action, np.float64) - LOW) / (HIGH - LOW) - 1
    return np.stack([proper(t.observation) @ one + inside @ np.asarray(u, np.float64) for one, u in zip(w, critics["u"], strict=True)])


def targets_used(kind, start, given, **options):
    """The targets ``[B]`` that both critics aimed at, read off one step of size one at the rows' own parameters."""
    after, feedback = learn(kind, start, given, critic=1.0, **options)
    t, moved = given.transition, np.asarray(after.critics["w"] - start.critics["w"], np.float64)[:, :B]
    if kind == "discrete":
        others = np.ones((B, A), bool)
        others[np.arange(B), t.action] = False
        assert (moved[:, others] == 0).all()  # Only the value of the action that was taken moves.
        moved = moved[:, ~others]
    q = critics_of(kind, start.critics, t)
    target = q + B * moved  # [2, B]
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, np.abs(target).max())}
    np.testing.assert_allclose(target[0], target[1], **tolerance)
    np.testing.assert_allclose(feedback.priority, np.abs(target - q).mean(axis=0), **tolerance)
    return target[0]


def soft_values(start, successor):
    """The value of each successor of numbered actions by the target critics: an exact sum over the allowed ones."""
    seen, alpha = proper(successor), np.exp(float(start.log_temperature))
    logits = seen @ np.asarray(start.actor["w"], np.float64)
    q = np.min([seen @ np.asarray(one, np.float64) for one in start.target_critics["w"]], axis=0)
    values = []
    for row in range(B):
        allowed = np.flatnonzero(successor.action_mask[row]) if isinstance(successor, Masked) else range(A)
        weights = {action: np.exp(logits[row, action] - logits[row].max()) for action in allowed}
        total, value = sum(weights.values()), 0.0
        for action, weight in weights.items():
            value += weight / total * (q[row, action] - alpha * np.log(weight / total))
        values.append(value)
    return np.array(values)


def folded(t):
    """The n-step rewards and discounts, ``[2, B]``."""
    return np.array([oracle.n_step(*row)[:2] for row in zip(t.reward, t.discount, t.last, strict=True)]).T


def masks():
    """Masks of observations and of successors, ``[2, B, A]``, that allow what was done, and some actions but not all."""
    random = np.random.default_rng(3)
    mask = random.permuted(np.tile(np.arange(A), (2, B, 1)), axis=-1) < random.integers(2, A, size=(2, B, 1))
    np.put_along_axis(mask[0], batch("discrete").transition.action[:, None], True, axis=-1)
    return mask


@pytest.mark.parametrize(("n", "mask"), [(1, None), (3, None), (1, masks())], ids=["one row", "three rows", "masked"])
@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 1.0), (0.2, 3.0)])
def test_the_critics_of_numbered_actions_aim_at_an_exact_sum(n, mask, alpha, scale):
    given, start = batch("discrete", n=n, mask=mask), begin("discrete", alpha=alpha)
    reward, discount = folded(given.transition)
    assert (discount == 0).any() and len(set(discount.tolist())) == n + 1 - (n == 3)
    wanted = scale * reward + discount * soft_values(start, given.transition.next_observation)
    np.testing.assert_allclose(targets_used("discrete", start, given, reward_scale=scale), wanted, rtol=1e-4, atol=1e-4)
    if mask is not None:
        unmasked = scale * reward + discount * soft_values(start, given.transition.next_observation.observation)
        assert np.abs(unmasked - wanted).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_what_terminated_is_worth_its_scaled_rewards_and_nothing_more(kind, n):
    discount, last = np.full((B, n), GAMMA, np.float32), np.zeros((B, n), bool)
    discount[:, -1], last[:, -1] = 0, True
    given = batch(kind, n=n, discount=discount, last=last)
    for shift in (1.0, 1e6):
        wanted = 0.1 * (given.transition.reward @ GAMMA ** np.arange(n))
        np.testing.assert_allclose(targets_used(kind, begin(kind, shift), given, reward_scale=0.1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_cut_is_worth_what_follows(kind):
    start, yes, nothing = begin(kind), np.ones((B, 1), bool), np.zeros((B, 1), np.float32)
    # A value of a thousand everywhere: for that, all that follows has one more unit vector in common.
    start = start._replace(target_critics=jax.tree.map(jnp.zeros_like, start.target_critics))
    start.target_critics["w"] = start.target_critics["w"].at[:, 0].set(1e3)
    following = batch(kind).transition.next_observation + np.eye(1, S, dtype=np.float32)
    cut, over, going = (
        targets_used(kind, start, batch(kind, reward=nothing, next_observation=following, discount=nothing + np.float32(d), last=last))
        for d, last in ((GAMMA, yes), (0.0, yes), (GAMMA, ~yes))
    )
    np.testing.assert_allclose(cut, GAMMA * 1e3, rtol=0.02)  # And the entropy.
    np.testing.assert_allclose(cut, going, rtol=1e-6)
    np.testing.assert_allclose(over, 0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_rewards_is_theirs_alone(kind):
    given, start = batch(kind), begin(kind)
    larger = given._replace(transition=given.transition._replace(reward=4 * given.transition.reward))
    scaled = targets_used(kind, start, given, reward_scale=4.0)
    np.testing.assert_allclose(scaled, targets_used(kind, start, larger), rtol=1e-4, atol=1e-4)
    assert not np.allclose(scaled, targets_used(kind, start, given), rtol=0.1)


# A policy of one number, integrated on a grid: what is drawn is known on average.


def squashed(outputs):
    """Actions in [-1, 1], their log-densities and their weights."""
    mean, raw = outputs
    low, high = LOG_STD_RANGE
    deviation = np.exp(low + (high - low) * (np.tanh(raw) + 1) / 2)
    standard = np.linspace(-7, 7, 20_001)
    weight = np.exp(-0.5 * standard**2)
    action = np.tanh(mean + deviation * standard)
    log_normal = -0.5 * standard**2 - np.log(deviation) - 0.5 * np.log(2 * np.pi)
    return action, log_normal - np.log1p(-(action**2)), weight / weight.sum()


OUTPUTS = np.array([0.3, 0.4])  # Of the actor: the mean, and what its deviation of about 0.4 is made of.
# Polynomials of the action, which cross inside its range.
CRITICS = np.float32([[0.5, 2.0, 0.0], [1.5, -1.0, 0.5]])
TARGETS = np.float32([[0.0, 2.0, -1.0], [0.4, -1.5, 0.0]])
MANY = 40_000
ZEROS = np.zeros((MANY, 1), np.float32)


def soft_value(outputs, critics, alpha):
    """The value of the policy."""
    action, log_density, weight = squashed(outputs)
    q = np.min([c[0] + c[1] * action + c[2] * action**2 for c in critics.astype(np.float64)], axis=0)
    return weight @ (q - alpha * log_density)


@functools.cache
def of_one_number(alpha):
    """A learner, and what one step of size one makes of it and says."""
    actor = Network(lambda key, o: {"w": jnp.asarray(OUTPUTS, jnp.float32)}, lambda p, o: jnp.broadcast_to(p["w"], (len(o), 2)))
    critic = Network(lambda key, o, a: {"c": jnp.zeros(3)}, lambda p, o, a: p["c"][0] + p["c"][1] * a[:, 0] + p["c"][2] * a[:, 0] ** 2)
    optimizers = Optimizers(optax.sgd(1.0), DIAL, DIAL)
    algorithm = sac(actor, critic, optimizers, low=np.float32([-2]), high=np.float32([4]), reward_scale=2.0)
    learner = algorithm.init(jax.random.key(0), jnp.zeros((1, 1)))
    learner = learner._replace(critics={"c": jnp.array(CRITICS)}, target_critics={"c": jnp.array(TARGETS)})
    learner = learner._replace(log_temperature=jnp.log(jnp.float32(alpha)))
    t = Transition(ZEROS, ZEROS, ZEROS + 3, ZEROS + np.float32(GAMMA), ZEROS, ZEROS > 1)
    update = jax.jit(algorithm.learn)
    return learner, [update(learner._replace(critic_opt=jnp.float32(rate)), Batch(t), jax.random.key(1), 0) for rate in (0.0, 1.0)]


@pytest.mark.parametrize("alpha", [0.2, 1.5])
def test_the_critics_of_actions_of_numbers_aim_at_what_the_policy_is_worth_on_average(alpha):
    _, (_, (after, feedback)) = of_one_number(alpha)
    # At action 0 of [-2, 4], a third of the way from the low bound to the high, critics see -1/3.
    inside = np.array([1, -1 / 3, 1 / 9])
    q, wanted, error = CRITICS @ inside, 2 * 3 + GAMMA * soft_value(OUTPUTS, TARGETS, alpha), 6 / np.sqrt(MANY)
    for critic in range(2):
        np.testing.assert_allclose(after.critics["c"][critic], CRITICS[critic] + (wanted - q[critic]) * inside, atol=error)
    np.testing.assert_allclose(feedback.metrics["q"], q.mean(), rtol=1e-5)
    # Other numbers: the least of the means in place of the mean of the least, and without the entropy.
    least_of_means = min(soft_value(OUTPUTS, TARGETS[[critic]], alpha) for critic in range(2))
    for other in (least_of_means, soft_value(OUTPUTS, TARGETS, 0)):
        assert abs(other - soft_value(OUTPUTS, TARGETS, alpha)) > 3 * error


@pytest.mark.parametrize("alpha", [0.2, 1.5])
def test_the_policy_of_numbers_climbs_its_value(alpha):
    start, ((after, feedback), _) = of_one_number(alpha)
    sides = [[soft_value(OUTPUTS + sign * step, CRITICS, alpha) for sign in (1, -1)] for step in 1e-3 * np.eye(2)]
    slopes = np.array([(up - down) / 2e-3 for up, down in sides])
    assert np.abs(slopes).min() > 0.1
    np.testing.assert_allclose(after.actor["w"] - start.actor["w"], slopes, atol=10 / np.sqrt(MANY))
    np.testing.assert_allclose(feedback.metrics["actor_loss"], -soft_value(OUTPUTS, CRITICS, alpha), atol=10 / np.sqrt(MANY))
    _, log_density, weight = squashed(OUTPUTS)
    np.testing.assert_allclose(feedback.metrics["entropy"], -weight @ log_density, atol=6 / np.sqrt(MANY))


# Weights and priorities.


@pytest.mark.parametrize("kind", KINDS)
def test_the_critics_gradient_is_linear_in_the_importance_weights(kind):
    start = begin(kind)

    def gradient(weight):
        after, _ = learn(kind, start, batch(kind, weight=weight), critic=1.0)
        return jax.tree.map(lambda new, old: np.asarray(new - old), after.critics, start.critics)

    rows = [gradient(row) for row in np.eye(B)]
    for weight in np.random.default_rng(1).random((3, B)):
        expected = jax.tree.map(lambda *leaves: sum(map(np.multiply, weight, leaves)), *rows)  # noqa: B023
        close(gradient(weight), expected, rtol=1e-3, atol=1e-4)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient(0.0)))


def test_a_weight_may_be_one_number_for_all():
    weights = 1.0, np.ones(B, np.float32)
    both = [learn("discrete", begin("discrete"), batch("discrete")._replace(weight=weight), critic=1.0)[0] for weight in weights]
    close(*both)


@pytest.mark.parametrize("kind", KINDS)
def test_priorities_are_one_for_each_row_and_ignore_weights(kind):
    feedback = [learn(kind, begin(kind), batch(kind, weight=weight), critic=1.0)[1] for weight in (1.0, 5.0)]
    assert feedback[0].priority.shape == (B,) and (feedback[0].priority > 0).all()
    np.testing.assert_array_equal(feedback[0].priority, feedback[1].priority)
    np.testing.assert_allclose(5 * feedback[0].metrics["loss"], feedback[1].metrics["loss"], rtol=1e-5)


# Numbered actions: exact sums, and what is forbidden.

EVERY = np.ones((2, B, A), bool)
ALL_MOVE = {"actor": 0.1, "critic": 0.1, "temperature": 0.1}


def test_nothing_is_left_to_chance_where_actions_are_numbered():
    assert same(*(learn("discrete", begin("discrete"), batch("discrete"), seed, **ALL_MOVE) for seed in (0, 1)))


def policy_of(w, observation, mask):
    """Probabilities ``[B, A]`` and their logarithms, 0 where nothing is allowed."""
    weight = np.where(mask, np.exp(proper(observation) @ w), 0.0)
    policy = weight / weight.sum(axis=1, keepdims=True)
    return policy, np.log(np.where(mask, policy, 1.0))


@pytest.mark.parametrize("mask", [None, masks()], ids=["free", "masked"])
def test_the_policy_over_numbered_actions_climbs_its_value(mask):
    alpha, given = 0.5, batch("discrete", mask=mask)
    start, allowed = begin("discrete", alpha=alpha), (EVERY if mask is None else mask)[0]
    after, feedback = learn("discrete", start, given, actor=1.0)
    observation = given.transition.observation
    q = np.min([proper(observation) @ np.asarray(one, np.float64) for one in start.critics["w"]], axis=0)

    def value(w):
        policy, log_policy = policy_of(w, observation, allowed)
        return (policy * (q - alpha * log_policy)).sum(axis=1).mean()

    w = np.asarray(start.actor["w"], np.float64)
    slope = np.zeros_like(w)
    for place in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[place] = 1e-5
        slope[place] = (value(w + step) - value(w - step)) / 2e-5
    np.testing.assert_allclose(after.actor["w"] - start.actor["w"], slope, rtol=1e-3, atol=1e-4)
    policy, log_policy = policy_of(w, observation, allowed)
    np.testing.assert_allclose(feedback.metrics["actor_loss"], -value(w), rtol=1e-4)
    np.testing.assert_allclose(feedback.metrics["entropy"], -(policy * log_policy).sum(axis=1).mean(), rtol=1e-4)


def test_forbidden_actions_count_nothing_however_good_they_look():
    # Action 0 is forbidden everywhere; another value and another logit of it must change nothing at all.
    mask = EVERY.copy()
    mask[..., 0] = False
    given, start = batch("discrete", mask=mask, action=np.arange(B, dtype=np.int32) % (A - 1) + 1), begin("discrete")

    def others(learner):
        parts = learner.actor, learner.critics, learner.target_critics
        return [np.asarray(part["w"])[..., 1:] for part in parts], learner.log_temperature

    first, _ = learn("discrete", start, given, **ALL_MOVE)
    for value in (-1e9, 0.0, 30.0, 1e9):
        changed = [{"w": part["w"].at[..., 0].set(value)} for part in (start.actor, start.critics, start.target_critics)]
        other = start._replace(actor=changed[0], critics=changed[1], target_critics=changed[2])
        after, feedback = learn("discrete", other, given, **ALL_MOVE)
        close(others(after), others(first))
        np.testing.assert_array_equal(after.actor["w"][:, 0], other.actor["w"][:, 0])
        assert all(np.isfinite(metric) for metric in feedback.metrics.values())


def test_a_terminated_successor_may_forbid_everything():
    ended = {"discount": np.zeros((B, 1), np.float32), "last": np.ones((B, 1), bool)}
    both = [learn("discrete", begin("discrete"), batch("discrete", mask=(EVERY[0], m), **ended), **ALL_MOVE) for m in (EVERY[0], ~EVERY[0])]
    assert same(*both)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both[1]))


# The temperature.


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("mask", [None, masks()], ids=["free", "masked"])
def test_the_temperature_steers_to_a_share_of_the_entropy_that_allowed_actions_can_have(share, mask):
    given, alpha = batch("discrete", mask=mask), 0.5
    start, allowed = begin("discrete", alpha=alpha), (EVERY if mask is None else mask)[0]
    after, feedback = learn("discrete", start, given, temperature=1.0, target_entropy=share)
    policy, log_policy = policy_of(np.asarray(start.actor["w"], np.float64), given.transition.observation, allowed)
    entropy, target = -(policy * log_policy).sum(axis=1), share * np.log(allowed.sum(axis=1))
    moved = float(after.log_temperature - start.log_temperature)
    np.testing.assert_allclose(moved, -(entropy - target).mean(), rtol=1e-4, atol=1e-5)  # However low the temperature is.
    assert (moved < 0) == (entropy.mean() > target.mean())
    np.testing.assert_allclose(feedback.metrics["temperature"], alpha, rtol=1e-6)


@pytest.mark.parametrize(("target", "falls"), [(-10.0, True), (10.0, False)])
def test_the_temperature_falls_where_the_entropy_exceeds_its_target_and_rises_elsewhere(target, falls):
    after, feedback = learn("box", begin("box"), batch("box"), temperature=0.1, target_entropy=target)
    assert (float(feedback.metrics["entropy"]) > target) == falls == (float(after.log_temperature) < 0)
    np.testing.assert_allclose(after.log_temperature, -0.1 * (feedback.metrics["entropy"] - target), rtol=1e-5)


@pytest.mark.parametrize(("num_actions", "share"), [(4, 0.7), (5, 0.89)])
def test_the_target_by_default_goes_by_the_number_of_actions(num_actions, share):
    # A policy of zeros is uniform: its entropy is all that there is.
    algorithm = discrete_sac(table(num_actions, 0.0), table(num_actions), DIALS, num_actions=num_actions)
    start = algorithm.init(jax.random.key(0), jnp.zeros((1, S)))._replace(temperature_opt=1.0)
    after, _ = jax.jit(algorithm.learn)(start, batch("discrete"), jax.random.key(0), 0)
    np.testing.assert_allclose(after.log_temperature, -(1 - share) * np.log(num_actions), rtol=1e-4)


def test_the_target_by_default_is_minus_one_for_each_number():
    after, feedback = jax.jit(build("box").learn)(fresh("box")._replace(temperature_opt=0.1), batch("box"), jax.random.key(0), 0)
    np.testing.assert_allclose(after.log_temperature, -0.1 * (feedback.metrics["entropy"] + D), rtol=1e-5)


@functools.cache
def lever(share, limit, updates=4_000):
    """Two actions, one of which pays 1: the temperatures and the entropies over many updates of everything."""
    optimizers = Optimizers(*(optax.adam(rate) for rate in (3e-2, 3e-2, 3e-3)))
    algorithm = discrete_sac(table(2), table(2), optimizers, num_actions=2, target_entropy=share, tau=0.05, max_temperature=limit)
    ones, action = np.ones((2, 1), np.float32), np.arange(2, dtype=np.int32)
    given = Batch(Transition(ones, action, action[:, None].astype(np.float32), 0 * ones, ones, ones > 0))
    learner = algorithm.init(jax.random.key(0), ones)

    def update(learner, key):
        learner, feedback = algorithm.learn(learner, given, key, 0)
        return learner, (jnp.exp(learner.log_temperature), feedback.metrics["entropy"])

    learner, history = jax.jit(lambda learner: jax.lax.scan(update, learner, jax.random.split(jax.random.key(1), updates)))(learner)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((learner, history)))
    return map(np.asarray, history)


def test_with_two_actions_the_temperature_settles_where_the_entropy_is_as_asked():
    temperature, entropy = lever(None, 10.0)
    np.testing.assert_allclose(entropy[-200:], 0.7 * np.log(2), rtol=0.05)
    # There the policy is the softmax of the values over the temperature: probability 0.811 for a value that is 1 better.
    likely = next(p for p in np.linspace(0.5, 1, 10_001)[1:] if -p * np.log(p) - (1 - p) * np.log(1 - p) <= 0.7 * np.log(2))
    np.testing.assert_allclose(temperature[-200:], 1 / np.log(likely / (1 - likely)), rtol=0.1)
    assert temperature.max() < 1.5


@pytest.mark.parametrize("limit", [10.0, 2.0])
def test_the_temperature_never_exceeds_its_bound_where_the_target_is_out_of_reach(limit):
    # All the entropy that there is: whatever prefers one action falls short of it.
    temperature, entropy = lever(1.0, limit)
    assert (temperature <= limit * (1 + 1e-6)).all() and (entropy < np.log(2)).any()
    np.testing.assert_allclose(temperature[-100:], limit, rtol=1e-5)


def test_the_temperature_never_falls_below_its_bound_where_the_policy_stays_too_random():
    # Less entropy than there can be: whatever the policy does exceeds it.
    temperature, entropy = lever(-1.0, 10.0)
    assert (temperature >= MIN_TEMPERATURE * (1 - 1e-6)).all() and (entropy >= 0).all()
    np.testing.assert_allclose(temperature[-100:], MIN_TEMPERATURE, rtol=1e-5)


# Acting.


def distance_from_uniform(sample):
    """Kolmogorov and Smirnov's: the largest distance between the distribution function of a sample in [0, 1] and the diagonal."""
    ordered, steps = np.sort(sample), np.arange(len(sample) + 1) / len(sample)
    return max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())


NUM = 4_000
CRITICAL = 1.95 / np.sqrt(NUM)  # One sample in a thousand exceeds it by chance; the keys here are fixed.
ONE = 0.5 * np.random.default_rng(0).normal(size=S).astype(np.float32)  # An observation that leads to no extremes.


@pytest.mark.parametrize("warmup", [0, 5])
def test_actions_of_numbers_are_uniform_before_the_warm_up_ends_and_then_the_policys(warmup):
    algorithm, learner = build("box", warmup=warmup), fresh("box")
    noise = algorithm.noise(learner, jax.random.key(1), NUM)
    mean, raw = np.split(ONE.astype(np.float64) @ np.asarray(learner.actor["w"], np.float64), 2)
    low, high = LOG_STD_RANGE
    deviation = np.exp(low + (high - low) * (np.tanh(raw) + 1) / 2)
    for step in sorted({0, warmup - 1, warmup, warmup + 1} - {-1}):
        decision = algorithm.explore(learner, np.tile(ONE, (NUM, 1)), noise, jnp.int32(step))
        assert decision.action.shape == (NUM, D) and decision.extras == ()
        place = (np.asarray(decision.action, np.float64) - LOW) / (HIGH - LOW)
        standard = (np.arctanh(np.clip(2 * place - 1, -0.999999, 0.999999)) - mean) / deviation
        by_policy = np.asarray(jax.scipy.stats.norm.cdf(standard.astype(np.float32)))
        for dim in range(D):
            uniform, policy = (distance_from_uniform(sample[:, dim]) < CRITICAL for sample in (place, by_policy))
            assert (uniform, policy) == (step < warmup, step >= warmup), (step, dim)
        assert np.abs(np.corrcoef(place.T) - np.eye(D)).max() < 0.06  # One number says nothing about another.


@pytest.mark.parametrize("mask", [[True] * A, [True, False, True, True]])
def test_numbered_actions_are_uniform_before_the_warm_up_ends_and_then_the_policys(mask):
    algorithm, learner, mask = build("discrete", warmup=5), fresh("discrete"), np.array(mask)
    seen = np.tile(ONE, (NUM, 1))
    seen = seen if mask.all() else Masked(seen, np.tile(mask, (NUM, 1)))
    noise = algorithm.noise(learner, jax.random.key(1), NUM)
    weight = np.where(mask, np.exp(ONE @ np.asarray(learner.actor["w"], np.float64)), 0.0)
    uniform, policy = mask / mask.sum(), weight / weight.sum()
    assert np.abs(policy - uniform).max() > 0.1
    for step, probability in ((0, uniform), (4, uniform), (5, policy), (6, policy)):
        action = np.asarray(algorithm.explore(learner, seen, noise, jnp.int32(step)).action)
        np.testing.assert_allclose(np.bincount(action, minlength=A) / NUM, probability, atol=4 * 0.5 / np.sqrt(NUM))
        assert mask[action].all()
    assert (np.asarray(algorithm.exploit(learner, seen)) == policy.argmax()).all()


def test_actions_of_numbers_stay_within_bounds_however_far_the_policy_goes():
    actor = Network(lambda key, o: {"one": jnp.ones(())}, lambda params, o: o * params["one"])
    low, high = np.float32([-0.1, 1e-3, -7, 5e5]), np.float32([0.3, 2e-3, 1e4, 5e5 + 1])
    algorithm = sac(actor, VALUE, DIALS, low=low, high=high, warmup=1)
    learner = algorithm.init(jax.random.key(0), jnp.zeros((1, 8)))
    outputs = (np.random.default_rng(0).normal(size=(NUM, 8)) * np.float32([[1], [10], [1e3], [1e6]] * (NUM // 4))).astype(np.float32)
    noise = algorithm.noise(learner, jax.random.key(0), NUM)
    both = [algorithm.explore(learner, outputs, noise, jnp.int32(step)).action for step in (0, 1)]
    for action in map(np.asarray, (*both, algorithm.exploit(learner, outputs))):
        assert action.shape == (NUM, 4) and action.dtype == np.float32
        assert (action >= low).all() and (action <= high).all()
    after = np.asarray(both[1])
    assert (after == low).any(axis=0).all() and (after == high).any(axis=0).all()


def test_the_greedy_action_is_the_middle_of_the_policy_in_the_range_of_the_action():
    learner, observation = fresh("box"), batch("box").transition.observation
    mean = (proper(observation) @ np.asarray(learner.actor["w"], np.float64))[:, :D]
    greedy = build("box", warmup=100).exploit(learner, observation)
    np.testing.assert_allclose(greedy, LOW + (np.tanh(mean) + 1) / 2 * (HIGH - LOW), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_a_box_of_any_shape(shape):
    size, t = int(np.prod(shape)), batch("discrete").transition
    low = np.arange(size, dtype=np.float32).reshape(shape)
    algorithm = sac(table(2 * size), VALUE, DIALS, low=low, high=low + 1, warmup=1)
    learner = algorithm.init(jax.random.key(0), jnp.zeros((1, S)))
    noise, explore = algorithm.noise(learner, jax.random.key(1), B), jax.jit(algorithm.explore)
    actions = [explore(learner, t.observation, noise, step).action for step in (0, 1)]
    for action in (*actions, jax.jit(algorithm.exploit)(learner, t.observation)):
        assert action.shape == (B, *shape) and (action >= low).all() and (action <= low + 1).all()
    _, feedback = jax.jit(algorithm.learn)(learner, Batch(t._replace(action=actions[1])), jax.random.key(2), 0)
    # What the critics see is each number where it was, between -1 and 1.
    inside, critics = 2 * (np.asarray(actions[1], np.float64) - low).reshape(B, size) - 1, learner.critics
    q = [proper(t.observation) @ np.asarray(w) + inside @ np.asarray(u) for w, u in zip(critics["w"], critics["u"], strict=True)]
    np.testing.assert_allclose(feedback.metrics["q"], np.mean(q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_temperatures_can_be_swept(kind):
    def begin(initial, limit):
        return build(kind, initial_temperature=initial, max_temperature=limit).init(jax.random.key(0), jnp.zeros((1, S))).log_temperature

    initial, limit = jnp.array([0.1, 2.0]), jnp.array([1.0, 3.0])
    np.testing.assert_allclose(jax.vmap(begin)(initial, limit), np.log(initial), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"warmup": -1}, "warmup"), ({"initial_temperature": 0.0}, "initial_temperature"), ({"initial_temperature": 11.0}, "max_temperature")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_factories_check_what_is_static(kind, options, said):
    with pytest.raises(ValueError, match=said):
        build(kind, **options)
