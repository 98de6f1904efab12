"""A sum tree: values in numbered slots, drawn in proportion to them; a write and a draw cost the logarithm of their number.

A node is a row of sixteen sums, one for each of its children: a cache line, so that a million slots are five lines away. The tree is
one array ``[R, 16]``: row 0 is the root, the children of entry ``(r, c)`` stand in row ``16 r + c + 1``, and the entries of the deepest
rows are the slots themselves.

Sums are made anew from the children whenever one of them is written, never changed by a difference, so nothing drifts: after any
number of writes the tree is what it would be if it were built from its slots at once.
"""

import chex
import jax
import jax.numpy as jnp

WIDTH = 16  # float32 in a cache line of 64 bytes.
# float32 has 24 bits, too few to tell a million slots apart with one number: it chooses down to this level, and a second number below.
LEVELS_OF_FIRST = 3


def init(num_slots: int) -> chex.Array:
    """A tree of that many slots, all zero.

    Raises:
      ValueError: if there is no slot.
    """
    if num_slots < 1:
        raise ValueError(f"a sum tree needs at least 1 slot, got {num_slots}")
    levels = 1
    while WIDTH**levels < num_slots:
        levels += 1
    return jnp.zeros((_first_leaf_row(levels) + -(-num_slots // WIDTH), WIDTH), jnp.float32)


def total(tree: chex.Array) -> chex.Array:
    """The sum of all slots, a scalar."""
    return _sum(tree[0])


def write(tree: chex.Array, slot: chex.Array, value: chex.Array) -> chex.Array:
    """Writes values into slots.

    Args:
      tree: from ``init``.
      slot: ``[B]`` int32; -1 is skipped. Of a slot that is named twice either value may stay.
      value: ``[B]`` float32, finite and not negative.

    Returns:
      The tree, written in place where it is donated.
    """
    chex.assert_rank([slot, value], 1)
    chex.assert_equal_shape([slot, value])
    levels, first = _depth(tree)
    row, column = first + slot // WIDTH, slot % WIDTH
    inside = (slot >= 0) & (row < tree.shape[0])
    tree = tree.at[jnp.where(inside, row, tree.shape[0]), column].set(value, mode="drop")

    def climb(_: int, carry: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        tree, row = carry
        above = (row - 1) // WIDTH
        return tree.at[above, (row - 1) % WIDTH].set(_sum(tree[row])), above

    # A skipped slot climbs, too, from a row that has not changed: that does no harm.
    return jax.lax.fori_loop(0, levels - 1, climb, (tree, jnp.where(inside, row, first)))[0]


def draw(tree: chex.Array, fraction: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The slots at given fractions of the total.

    Args:
      tree: from ``init``, its total positive.
      fraction: ``[B, 2]`` in [0, 1): the first says where in the total, the second where within the sum that this leads to, some
        hundreds of slots in a tree of a million.

    Returns:
      The slots ``[B]`` int32 and their values ``[B]``. A slot whose value is zero is never drawn.
    """
    chex.assert_rank(fraction, 2)
    levels, first = _depth(tree)

    def descend(_: int, carry: tuple[chex.Array, chex.Array, chex.Array, chex.Array]) -> tuple[chex.Array, ...]:
        row, column, u, _ = carry
        row = WIDTH * row + column + 1
        return row, *_choose(tree[row], u)

    row = jnp.zeros(fraction.shape[0], jnp.int32)
    # What is read here decides the slot, so whatever is written later because of the slot comes after all reads, without a copy.
    carry = row, *_choose(tree[row], fraction[:, 0] * total(tree))
    upper = min(levels, LEVELS_OF_FIRST)
    carry = jax.lax.fori_loop(0, upper - 1, descend, carry)
    if levels > upper:
        row, column, _, value = carry
        carry = jax.lax.fori_loop(0, levels - upper, descend, (row, column, fraction[:, 1] * value, value))
    row, column, _, value = carry
    return WIDTH * (row - first) + column, value


def _choose(values: chex.Array, u: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """The column ``[B]`` of ``values [B, 16]`` where their running sum passes ``u [B]``, what is left of ``u``, and the value there."""
    # Four groups of four, then four: elementwise work on [B], which is compiled into one loop.
    columns = [[values[:, 4 * group + k] for k in range(4)] for group in range(4)]
    group, u, _ = _choose_of_four([(a + b) + (c + d) for a, b, c, d in columns], u)
    within, u, value = _choose_of_four([_select([columns[g][k] for g in range(4)], group) for k in range(4)], u)
    return 4 * group + within, u, value


def _choose_of_four(values: list[chex.Array], u: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """As ``_choose``, of four values ``[B]``."""
    sums = [jnp.zeros_like(u), values[0], values[0] + values[1], (values[0] + values[1]) + values[2]]
    # In float32 ``u`` may be rounded up to the whole sum: it moves on only where something positive follows, or it could end on a zero.
    follows = [(values[1] > 0) | (values[2] > 0) | (values[3] > 0), (values[2] > 0) | (values[3] > 0), values[3] > 0]
    chosen = sum(((u >= sums[k + 1]) & follows[k]).astype(jnp.int32) for k in range(3))
    return jnp.asarray(chosen), u - _select(sums, chosen), _select(values, chosen)


def _select(values: list[chex.Array], index: chex.Array) -> chex.Array:
    """Of four arrays ``[B]`` the one with the number ``index [B]``, elementwise."""
    return jnp.where(index < 2, jnp.where(index == 0, values[0], values[1]), jnp.where(index == 2, values[2], values[3]))


def _sum(values: chex.Array) -> chex.Array:
    """The sum over the last axis, in one and the same order everywhere: halves onto halves."""
    width = WIDTH
    while width > 1:
        width //= 2
        values = values[..., :width] + values[..., width : 2 * width]
    return values[..., 0]


def _first_leaf_row(levels: int) -> int:
    return (WIDTH ** (levels - 1) - 1) // (WIDTH - 1)


def _depth(tree: chex.Array) -> tuple[int, int]:
    """The number of levels and the first row of slots."""
    levels = 1
    while _first_leaf_row(levels + 1) < tree.shape[0]:
        levels += 1
    return levels, _first_leaf_row(levels)
