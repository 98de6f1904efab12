"""The notebooks run from top to bottom, are stored clean, and survive the interrupt that they invite."""

from pathlib import Path

import gymnasium
import matplotlib
import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
QUICKSTART = NOTEBOOKS[0]


def read(path):
    return nbformat.read(path, as_version=4)


# Less work than a reader is shown, so that tests end sooner: what stands in a notebook, and what instead. Behind the marker all of it runs.
LESS = {
    "01_quickstart": {"12_001": "2_001", "num_steps=4_000": "num_steps=1_500", "jax.random.key(0), 64)": "jax.random.key(0), 8)"},
    "02_replay": {
        "num_steps=40_000, num_seeds=16": "num_steps=4_000, num_seeds=4",
        "for n in (1, 3, 10):": "for n in (3,):",
        "num_steps=10_000": "num_steps=4_000",
    },
    "03_accelerator_benchmark": {
        "counts=(1, 8, 64)": "counts=(1, 4)",
        "latency.show(latency.measure(quick=not FULL))": "latency.show, latency.measure",  # Tested as sections of the benchmark.
        "roofline.show(roofline.measure(quick=not FULL))": "roofline.show, roofline.measure",
    },
    "04_continuous_control": {"range(6_000)": "range(1_400)", "num_steps=100_000": "num_steps=16_000"},
    "05_exploration": {
        "SIZE, 4_000, kind": "SIZE, 640, kind",
        '60, 3_000, kind) for kind in ("off", "rnd", "snd-vic")': '60, 320, kind) for kind in ("off",)',
        "range(2_000)": "range(600)",
    },
    "06_rainbow": {
        "num_steps=12_000": "num_steps=1_500",
        "runs = {name: learn(options) for name, options in PARTS.items()}": 'runs = dict.fromkeys(PARTS, learn(PARTS["Rainbow"]))',
        "num_steps=8_000": "num_steps=1_500",
        "range(4_000)": "range(500)",
    },
}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["less", "whole"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_without_error(path, whole, tmp_path):
    notebook = read(path)
    for shown, instead in () if whole else LESS.get(path.stem, {}).items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and shown in cell.source]
        assert len(cells) == 1 and cells[0].source.count(shown) == 1, f"{shown!r} stands elsewhere in {path.name} now"
        cells[0].source = cells[0].source.replace(shown, instead)
    nbclient.NotebookClient(notebook, timeout=3_600 if whole else 300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    streams = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"clear the outputs of {path.name} before storing it"


class InterruptedEvery500Steps(gymnasium.Wrapper):
    """As if somebody pressed the stop button in the middle of an episode, again and again."""

    def __init__(self, env):
        super().__init__(env)
        self.steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps % 500 == 0:
            raise KeyboardInterrupt
        return self.env.step(action)


def test_interrupted_training_cell_leaves_an_agent_that_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    cells = {cell.id: cell.source for cell in read(QUICKSTART).cells}
    notebook = {}
    for name in ("imports", "agent"):
        exec(cells[name], notebook)
    agent = notebook["agent"]
    notebook["env"] = InterruptedEvery500Steps(notebook["env"])

    def run_the_cell():
        exec(cells["live-loop"], notebook)
        assert "run the cell again" in capsys.readouterr().out
        return agent.get_statistics()

    first = run_the_cell()
    assert 400 < first["t"] < 500  # Each interrupt drops the step that was under way.
    second, third = run_the_cell(), run_the_cell()
    assert first["t"] < second["t"] < third["t"] and third["n_updates"] > 0
    assert third["episodes"] == len(notebook["returns"])
    observation, _ = notebook["env"].reset(seed=0)
    assert agent.act(observation) in (0, 1)
