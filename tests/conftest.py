"""Most of the suite's time is compiling small programs: they are compiled without optimisation, and once for all that a session runs.

What is promised bit for bit must also hold for programs as users compile them: ``.ci/run`` runs those tests once more with
``XLA_FLAGS=--xla_backend_optimization_level=3``, XLA's default. Whoever sets XLA_FLAGS is not overruled. Slow tests, which learn for long,
are compiled as users do.
"""

import os

import jax
import pytest


def pytest_configure(config):
    if config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # Read when JAX makes its first array.


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs compiled by one test serve all others, and the processes that they start; nothing is kept for the next session.

    Each worker of pytest-xdist has its own: two processes at once could read what the other has half written.
    """
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
