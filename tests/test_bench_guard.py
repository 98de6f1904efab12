"""The benchmark of the guard: without it the same work is done, and nothing stays taken out."""

import sys

import jax
import jax.numpy as jnp
import optax

import dqn_jax
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


def test_the_loop_in_python_makes_an_update_in_each_step(monkeypatch):
    agents = []
    monkeypatch.setattr(guard, "DQN", lambda *args, **options: agents.append(dqn_jax.DQN(*args, **options)) or agents[-1])
    run = guard.host_steps(optax.sgd(1e-3), steps=70)
    run()
    run()
    assert agents[0].get_statistics()["n_updates"] == 2 * 70 - 64  # A step is stored when its successor is seen: the last one waits.
