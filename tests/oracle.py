"""Slow models in plain Python and NumPy that the tests compare the package with: one element at a time, no trick shared with it."""

import collections

import numpy as np


def n_step(reward, discount, last):
    """The folded reward and discount of a window, and how many rows were walked."""
    total, travelled, walked = 0.0, 1.0, 0
    for r, d, ended in zip(reward, discount, last, strict=True):
        total += travelled * float(r)
        travelled *= float(d)
        walked += 1
        if ended:
            break
    return total, travelled, walked


def huber(error):
    size = abs(error)
    return 0.5 * size**2 if size <= 1 else size - 0.5


Row = collections.namedtuple("Row", "number next_number reward discount last")


class Replay:
    """A replay as lists of rows, oldest first: one list per environment, every row known by the number in its observation."""

    def __init__(self, capacity, num_envs):
        self.columns = [collections.deque(maxlen=capacity // num_envs) for _ in range(num_envs)]

    def add(self, rows):
        for column, row in zip(self.columns, rows, strict=True):
            column.append(row)

    def cut(self, mask):
        for column, masked in zip(self.columns, mask, strict=True):
            if masked and column:
                column[-1] = column[-1]._replace(last=True)

    def window(self, number, n_steps):
        """The rows that an n-step return walks from the row with this number on."""
        for column in self.columns:
            for start, row in enumerate(column):
                if row.number == number:
                    walked = []
                    for following in list(column)[start : start + n_steps]:
                        walked.append(following)
                        if following.last:
                            break
                    return walked
        raise AssertionError(f"row {number} is not stored")

    def is_newest(self, row):
        return any(column and column[-1] == row for column in self.columns)

    def stored(self):
        return sorted(row.number for column in self.columns for row in column)


class Stream:
    """Random episodes of N environments. Every observation has a number of its own; a successor is the next row's observation, except
    where the episode ends, and there it is the final observation, which is never acted on."""

    def __init__(self, num_envs, seed, end_chance=0.3):
        self.random = np.random.default_rng(seed)
        self.end_chance = end_chance
        self.count = 0
        self.now = [self.fresh() for _ in range(num_envs)]

    def fresh(self):
        self.count += 1
        return self.count

    def rows(self):
        rows = []
        for column, number in enumerate(self.now):
            successor = self.fresh()
            last = bool(self.random.random() < self.end_chance)
            terminated = last and bool(self.random.random() < 0.5)
            rows.append(Row(number, successor, float(self.random.integers(-9, 10)), 0.0 if terminated else 1.0, last))
            self.now[column] = self.fresh() if last else successor
        return rows

    def cut(self, mask):
        """A cut environment begins anew: its next observation is not the successor of its last row."""
        self.now = [self.fresh() if masked else number for number, masked in zip(self.now, mask, strict=True)]


def project(support, places, mass):
    """Mass at places, moved to the atoms beside them, one place at a time."""
    moved = np.zeros(len(support))
    distance = float(support[1]) - float(support[0])
    for place, share in zip(places, mass, strict=True):
        at = (min(max(float(place), float(support[0])), float(support[-1])) - float(support[0])) / distance
        low = min(int(at), len(support) - 1)
        moved[low] += share * (1 - (at - low))
        if low + 1 < len(support):
            moved[low + 1] += share * (at - low)
    return moved


def quantile_huber(quantile, fraction, target):
    total = 0.0
    for theta, tau in zip(quantile, fraction, strict=True):
        for y in target:
            error = y - theta
            total += abs(tau - (1.0 if error < 0 else 0.0)) * huber(error) / len(target)
    return total


def softmax(numbers):
    powers = np.exp(numbers - np.max(numbers))
    return powers / powers.sum()


class Says:
    """What a network whose outputs are ``sign`` times what it sees says of one row: ``{action: outputs}`` of the allowed actions.

    Args:
      kind, support, middles: as for ``dqn_losses``.
      sign: 1 for the online network, -1 for the target network.
      fractions: where IQN makes this network's quantiles of this row, ``[N]``.
    """

    def __init__(self, kind, support, middles, sign, fractions):
        self.kind, self.support, self.middles, self.sign, self.fractions = kind, support, middles, sign, fractions

    def value(self, outputs):
        if self.kind == "c51":
            return softmax(self.sign * outputs) @ self.support
        if self.kind == "iqn":
            return np.mean(self.sign * (outputs + self.middles))
        return np.mean(self.sign * outputs)

    def values(self, outputs):
        return {action: self.value(each) for action, each in outputs.items()}

    def distribution(self, outputs):
        if self.kind == "c51":
            return softmax(self.sign * outputs)
        return self.sign * (outputs + self.fractions) if self.kind == "iqn" else self.sign * outputs


def read_row(observation, row, num_actions=3):
    """The outputs of all actions of a row, and of the allowed ones."""
    masked = hasattr(observation, "action_mask")
    numbers = (observation.observation if masked else observation)[row].astype(float).reshape(num_actions, -1)
    outputs = dict(enumerate(numbers))
    return outputs, {a: outputs[a] for a in outputs if not masked or observation.action_mask[row][a]}


def soft(values, temperature):
    """A soft policy: ``{action: probability}``."""
    return dict(zip(values, softmax(np.array(list(values.values())) / temperature), strict=True))


def dqn_losses(kind, batch, double, munchausen, support, middles, fractions, scale=1.0):
    """Loss and priority of each row of a batch of single steps, where the online network says what it sees and the target the opposite.

    Args:
      kind: "huber", "mse", "c51", "qrdqn" or "iqn", whose online network adds the fraction to what it sees.
      batch: its observations hold the outputs of all actions; some may be masked.
      double: of DQN.
      munchausen: None, or weight and temperature.
      support: of C51.
      middles: fractions of QR-DQN, and those that IQN chooses by.
      fractions: what IQN drew for the predictions, ``[B, N]``.
      scale: a factor of the prediction alone.
    """
    rows = [
        _row_loss(kind, batch.transition, row, double, munchausen, support, middles, fractions[row], scale)
        for row in range(len(batch.weight))
    ]
    return np.array(rows).T


def _row_loss(kind, t, row, double, munchausen, support, middles, fractions, scale):
    online, target = (Says(kind, support, middles, *one) for one in ((1.0, fractions), (-1.0, middles)))
    seen, seen_allowed = read_row(t.observation, row)
    then, then_allowed = read_row(t.next_observation, row)
    action, reward, discount = int(t.action[row]), float(t.reward[row]), float(t.discount[row])
    if munchausen is None:
        values = (online if double else target).values(then_allowed)
        following = target.distribution(then[max(values, key=values.get) if values else 0])
    else:
        policy = soft(target.values(then_allowed), munchausen.temperature) if then_allowed else {0: 1.0}
        following = sum(chance * target.distribution(then[a]) for a, chance in policy.items())
        entropy = -munchausen.temperature * sum(chance * np.log(chance) for chance in policy.values())
        log_chance = np.log(soft(target.values(seen_allowed), munchausen.temperature)[action])
        reward += munchausen.weight * max(munchausen.temperature * log_chance, -1.0) + discount * entropy
    if kind == "c51":
        loss = -(project(support, reward + discount * support, following) * np.log(softmax(scale * seen[action]))).sum()
        return loss, loss
    if kind in ("qrdqn", "iqn"):
        at = middles if kind == "qrdqn" else fractions
        loss = quantile_huber(scale * online.distribution(seen[action]), at, reward + discount * following)
        return loss, loss
    error = reward + discount * float(following[0]) - scale * float(seen[action][0])
    return huber(error) if kind == "huber" else error**2, abs(error)
