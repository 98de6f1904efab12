"""The benchmark of the guard: without it the same work is done, and nothing stays taken out."""

import sys

import jax
import jax.numpy as jnp

from dqn_jax import finite
from dqn_jax.bench import guard


def test_it_runs_and_takes_out_nothing_for_good(monkeypatch, capsys, tmp_path):
    before = finite.is_sound, finite.choose
    monkeypatch.setattr(sys, "argv", ["guard", "--quick", "--out", str(tmp_path / "out.json")])
    guard.main()
    assert "times as long" in capsys.readouterr().out and (tmp_path / "out.json").read_text()
    assert (finite.is_sound, finite.choose) == before
    assert not bool(jax.jit(finite.all_finite)(jnp.array([jnp.nan])))


def test_one_of_both_looks(monkeypatch):
    """That what is called `without` is traced without it."""
    seen = []
    looks = finite.is_sound
    monkeypatch.setattr(finite, "is_sound", lambda *args: seen.append("with") or looks(*args))

    def build():
        value = jax.jit(lambda x: finite.is_sound(x, [x]))(jnp.ones(()))
        return lambda: value

    guard.measure(build, 1)
    assert seen == ["with"]
