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


def double_q_learning(q, action, reward, discount, q_next, q_select):
    best = 0
    for candidate in range(len(q_select)):
        if q_select[candidate] > q_select[best]:
            best = candidate
    return reward + discount * q_next[best] - q[action]


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
