"""The soak: what it calls a leak is one, and a flat line is none."""

import sys

import pytest

from dqn_jax.bench import soak


def samples(resident=lambda i: 400.0, arrays=lambda i: 100, processor=lambda i: 50.0, count=30):
    return [{"resident_mb": resident(i), "arrays": arrays(i), "processor_us": processor(i)} for i in range(count)]


@pytest.mark.parametrize(
    ("made", "leaks", "slows"),
    [
        (samples(), False, False),
        (samples(resident=lambda i: 400 + i % 2), False, False),
        (samples(resident=lambda i: 100 * (i < 5) + 300), False, False),  # While it settles.
        (samples(resident=lambda i: 400 + 0.2 * i), True, False),  # 12 MB an hour.
        (samples(arrays=lambda i: 100 + i), True, False),
        (samples(processor=lambda i: 50 + 0.1 * i), False, True),
    ],
)
def test_the_verdict(made, leaks, slows):
    verdict = soak.judge(made, every=60.0)
    assert (bool(verdict["leaks"]), bool(verdict["slows"])) == (leaks, slows)


def test_too_short_to_tell():
    with pytest.raises(ValueError, match="measure for longer"):
        soak.judge(samples(count=6), every=60.0)


def test_it_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(soak, "compute_inline", lambda: None)  # Of this process others use JAX already.
    monkeypatch.setattr(sys, "argv", ["soak", "--quick", "--out", str(tmp_path / "out.json")])
    soak.main()
    out = capsys.readouterr().out
    assert "updates: memory grows by" in out and len(out.splitlines()) == 14
