"""What the section ``scaling`` has loops learn, and how much of it on which backend."""

import importlib.util
from collections.abc import Collection
from typing import Any, NamedTuple

from dqn_jax.bench.settings import PLAIN, PLAIN_IMAGES, Setting

REPEATS = 3


class Game(NamedTuple):
    """What the compiled loops learn.

    Attributes:
      env_id: for ``dqn_jax.make``.
      env_args: its parameters.
      setting: of all loops, but for the replay's size where there are seeds.
      needs: the package that it needs beyond the required ones, or "".
    """

    env_id: str
    env_args: dict[str, Any]
    setting: Setting
    needs: str = ""


def _at_once(setting: Setting) -> Setting:
    """The setting, but learning begins with the first full batch."""
    return setting._replace(warmup=setting.batch_size)


CARTPOLE, BREAKOUT = "CartPole", "Breakout"
PLAIN_AT_ONCE, IMAGES_AT_ONCE = _at_once(PLAIN), _at_once(PLAIN_IMAGES)
GAMES = {
    # As shipped, the JAX version differs from CartPole-v1 in this product.
    CARTPOLE: Game("phys2d/CartPole-v1", {"polemass_length": 0.05}, PLAIN_AT_ONCE),
    BREAKOUT: Game("pgx/minatar-breakout", {}, IMAGES_AT_ONCE, "pgx"),
}


class Amount(NamedTuple):
    """How much of a game the compiled loops are measured on.

    Attributes:
      counts: of environments, and of seeds.
      env_steps: transitions of a loop with several environments, of all together; rounded up to whole rows.
      seed_steps: transitions of each seed.
      with_peer: whether a loop in the style of PureJaxRL takes turns with ours over seeds.
    """

    counts: tuple[int, ...]
    env_steps: int
    seed_steps: int
    with_peer: bool


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      counts: of environments of the host loop.
      host_steps: its transitions, of all environments together; rounded down to whole updates.
      games: by name out of GAMES, for the compiled loops.
      repeats: measurements of each count.
    """

    counts: tuple[int, ...]
    host_steps: int
    games: dict[str, Amount]
    repeats: int = REPEATS


def sizes(backend: str, quick: bool = False) -> Sizes:
    """How much is measured on a backend.

    Args:
      backend: as ``jax.default_backend()`` names it; whatever is not "cpu" is an accelerator.
      quick: a little of everything.
    """
    if quick:
        return Sizes((16,), 512, {CARTPOLE: Amount((16,), 2_048, 512, True)})
    if backend == "cpu":
        counts = (1, 16, 128, 1024)
        return Sizes(counts, 16_384, {CARTPOLE: Amount(counts, 131_072, 2_048, False), BREAKOUT: Amount((1, 16), 16_384, 2_048, True)})
    counts = (1, 128, 1024, 4096)
    return Sizes(counts, 8_192, {CARTPOLE: Amount(counts, 8_192, 8_192, True), BREAKOUT: Amount(counts, 8_192, 2_048, True)})


def selected(chosen: Sizes, only: Collection[str]) -> Sizes:
    """Of these sizes what concerns some games; the host loop learns CartPole.

    Args:
      chosen: how much.
      only: names out of GAMES.

    Raises:
      ValueError: if nothing is left that can be measured here.
    """
    games = {name: amount for name, amount in chosen.games.items() if name in only}
    chosen = chosen._replace(counts=chosen.counts if CARTPOLE in only else (), games=games)
    left_out = missing(chosen)
    if not games.keys() - left_out.keys():
        raise ValueError(f"nothing is left to measure: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
    return chosen


def missing(chosen: Sizes) -> dict[str, str]:
    """The games that are left out, and why."""
    why = {name: "--quick or --only leaves it out" for name in GAMES if name not in chosen.games}
    for name in chosen.games:
        needs = GAMES[name].needs
        if needs and importlib.util.find_spec(needs) is None:
            why[name] = f"it needs {needs}: pip install 'dqn_jax[{needs}]'"
    return why
