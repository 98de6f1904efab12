"""The sections of the benchmark: what they report hangs together. How large or how fast anything is, is not asserted."""

import importlib.metadata
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqn_jax import footprint, networks
from dqn_jax.bench import latency, libtorch, memory, report, roofline, size, torch_loops
from dqn_jax.bench.settings import DECK


def test_percentiles_are_those_of_the_values():
    assert report.percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "calls": 101}
    assert report.percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0, "calls": 1}
    with pytest.raises(ValueError, match="no values"):
        report.percentiles([])


def test_a_table_puts_numbers_under_one_another(capsys):
    report.table("title", ("", "MB"), [("a", "1.0"), ("longer", "1,000.0")])
    assert capsys.readouterr().out.splitlines() == ["", "title", "               MB", "  a           1.0", "  longer  1,000.0"]


def test_results_are_written_with_the_machine(tmp_path):
    report.write(tmp_path / "out.json", {"updates": 3})
    report.write(None, {"updates": 3})
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["updates"] == 3 and written["machine"]["versions"]["jax"]


# size


def install(site, name, requires=(), files=None, direct_url=None):
    """Writes what an installed distribution consists of; ``files`` are names and contents."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", "Provides-Extra: more", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines))
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))
    for path, content in (files or {}).items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files or {}))


def test_required_packages_are_followed_with_conditions_and_extras(tmp_path, monkeypatch):
    install(
        tmp_path,
        "sizetop",
        ["sizeone>=1", "sizetwo[more]; python_version > '3'", "sizethree; python_version < '3'", "sizefour; extra == 'more'"],
    )
    install(tmp_path, "sizeone", ["sizetop", "Size.Absent"])  # A circle, and something that is not there.
    install(tmp_path, "sizetwo", ["size_five; extra == 'more'"])
    for name in ("sizethree", "sizefour", "size_five"):
        install(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    found, absent = size.required("sizetop")
    assert set(found) == {"sizetop", "sizeone", "sizetwo", "size-five"}
    assert absent == ["size-absent"]


def test_files_count_without_bytecode_and_editable_packages_by_their_folder(tmp_path, monkeypatch):
    install(tmp_path, "sizetop", ["sizeone"], {"sizetop/a.py": "12345", "sizetop/a.pyc": "123"})
    install(tmp_path, "sizeone", (), {"sizeone.pth": "1234567"}, {"url": "file:///elsewhere", "dir_info": {"editable": True}})
    folder = tmp_path / "sizeone"
    folder.mkdir()
    (folder / "__init__.py").write_text("#" * 100)
    (folder / "__init__.pyc").write_text("#" * 100)
    monkeypatch.syspath_prepend(tmp_path)
    measured = size.measure_installed("sizetop")
    assert measured == {"bytes": 112, "packages": {"sizeone": 107, "sizetop": 5}, "absent": []}


def test_sizes_of_what_is_installed_hang_together():
    measured = size.measure_installed("dqn_jax")
    sizes = list(measured["packages"].values())
    assert measured["bytes"] == sum(sizes) > 1e8 and sizes == sorted(sizes, reverse=True)
    assert {"dqn-jax", "jax", "jaxlib", "flax", "optax", "gymnasium", "numpy"} <= set(measured["packages"])
    assert not {"matplotlib", "pytest", "torch"} & set(measured["packages"])
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        size.measure_installed("no-such-distribution")


def test_imports_are_timed_cold_and_warm(capsys):
    imports = size.measure_imports(["colorsys"], 2)  # Of the standard library, and seldom imported by anything.
    warm = imports["colorsys"]["warm"]
    assert imports["colorsys"]["cold"] > 0 and 0 < warm["min"] <= warm["median"] <= warm["max"]
    with pytest.raises(RuntimeError, match="no_such_module"):
        size.measure_imports(["no_such_module"], 1)
    size.show({"installed": {"dqn_jax": size.measure_installed("dqn_jax")}, "imports": imports})
    shown = capsys.readouterr().out
    assert "jaxlib" in shown and "colorsys" in shown


# memory


def test_marks_of_memory_never_fall(capsys):
    (deck, *_) = memory.CASES
    other = {"marks": dict(zip(memory.STAGES, (1, 5, 5, 9), strict=True))}
    measured = memory.measure(quick=True, others={"another": [sys.executable, "-c", f"print('noise'); print('''{json.dumps(other)}''')"]})
    assert list(measured) == [deck, "another"]
    assert measured["another"]["added"] == dict(zip(memory.STAGES, (1, 4, 0, 4), strict=True))
    ours = measured[deck]
    marks = [ours["marks"][stage] for stage in memory.STAGES]
    assert marks == sorted(marks) and marks[0] > 2e7
    assert sum(ours["added"].values()) == marks[-1] and min(ours["added"].values()) >= 0
    assert ours["steps"] == 200 and ours["updates"] == len(range(16, 200, 8))
    weights = 4 * 128 + 2 * 128 * 128 + 128 * 2 + 3 * 128 + 2
    assert ours["parameter_bytes"] == 4 * weights
    assert 4 * 4 * weights <= ours["learner_bytes"] < 4 * 4 * weights + 100
    assert 2_000 * 2 * 16 < ours["replay_bytes"] < 2_000 * 100
    memory.show(measured)
    assert "another" in capsys.readouterr().out


def test_a_contender_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"memory of broken failed[^$]*no_such_module"):
        memory.run_apart("broken", [sys.executable, "-c", "import no_such_module"])


def test_a_contender_that_fails_takes_nothing_with_it(monkeypatch, tmp_path, capsys):
    good = f"import json; print(json.dumps({{'marks': dict.fromkeys({memory.STAGES}, 5), 'steps': 3}}))"
    monkeypatch.setattr(memory, "_ours", lambda name, quick: [sys.executable, "-c", good])
    monkeypatch.setattr(memory, "peers", lambda quick: {"broken": [sys.executable, "-c", "import no_such_module"]})
    monkeypatch.setattr(sys, "argv", ["memory", "--quick", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="failed: broken"):
        memory.main()
    written = json.loads((tmp_path / "out.json").read_text())
    (ours,) = [result for name, result in written.items() if name.startswith("ours")]
    assert ours["marks"]["end"] == 5 and ours["seconds"] > 0 and "no_such_module" in written["broken"]["failed"]
    assert "FAILED: measuring the memory of broken failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(torch_loops.LOOPS))
def test_marks_of_loops_on_pytorch_are_made_without_jax(name):
    pytest.importorskip(torch_loops.NEEDS[name])
    asked = json.dumps({"name": name, "setting": DECK._asdict(), "steps": 120})
    # As it is run, and then a last look: an import of this package would have brought JAX.
    program = f"""
import runpy, sys
sys.argv[1:] = [{asked!r}]
runpy.run_path({torch_loops.__file__!r}, run_name="__main__")
assert not {{"jax", "dqn_jax"}} & set(sys.modules)
"""
    result = memory.run_apart(name, [sys.executable, "-c", program])
    marks = [result["marks"][stage] for stage in memory.STAGES]
    assert marks == sorted(marks) and marks[0] > 2e7
    # PFRL counts windows that are complete: of the updates due at 16, 24, ... 120 it misses the first.
    assert result["steps"] == 120 and result["updates"] == 14 - (name == "pfrl")


def test_where_no_update_is_made_there_is_no_mark_of_it():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"torch made no update in 10 steps: .* warm-up of 16"):
        torch_loops.measure_memory("torch", DECK, 10)
    marks = torch_loops.measure_memory("torch", DECK, 16)["marks"]  # The last step is the first to learn.
    assert set(marks) == set(memory.STAGES)


def test_a_loop_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no loop 'ours' here, only torch, sb3, pfrl"):
        torch_loops.measure_memory("ours", DECK, 100)


def test_peers_are_measured_in_the_decks_setting(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    commands = memory.peers(quick=True)
    for name in torch_loops.LOOPS:
        asked = json.loads(commands[f"{name}, the deck's"][-1])
        assert asked["name"] == name and asked["steps"] == 200 and tuple(asked["setting"]["hidden"]) == DECK.hidden
    capsys.readouterr()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert memory.peers() == {}
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["torch", "sb3", "pfrl", "libtorch"] and all(" is skipped: " in line for line in said)


def test_the_marks_of_the_program_stand_at_our_stages(monkeypatch):
    asked = []

    def run(binary, *work):
        asked.append((binary, *work))
        return {"memory_mib": {"start": 1.0, "built": 2.0, "first_update": 2.5, "end": 3.0}}

    monkeypatch.setattr(libtorch, "build", lambda folder: "program")
    monkeypatch.setattr(libtorch, "run", run)
    result = memory.measure_libtorch(quick=True)
    assert result.pop("seconds") >= 0
    assert result == {"marks": {"imported": 2**20, "built": 2**21, "first update": 5 * 2**19, "end": 3 * 2**20}, "steps": 200}
    assert asked == [("program", DECK, 200, 100, 0)]


def test_sizes_are_shown_where_they_are_known(capsys):
    marks = {"marks": dict.fromkeys(memory.STAGES, 0), "added": dict.fromkeys(memory.STAGES, 0)}
    memory.show({"told": marks | {"replay_bytes": 3_000_000}, "untold": marks})
    first, second = capsys.readouterr().out.split("of that by their shapes")
    assert "untold" in first and "untold" not in second
    assert second.splitlines()[-1].split() == ["told", "3.00", "-", "-"]


def test_the_peak_is_that_of_this_process():
    before = footprint.peak_bytes()
    ballast = np.ones(before // 8 + 10_000_000)
    assert footprint.peak_bytes() >= ballast.nbytes > before
    assert abs(torch_loops.peak_bytes() - footprint.peak_bytes()) < 1e6


# latency


@pytest.fixture(scope="module")
def quick_latency():
    return latency.measure(quick=True)


def test_percentiles_of_calls_are_ordered(quick_latency, capsys):
    kinds = {kind: us for part in ("acting", "learning") for works in quick_latency[part].values() for kind, us in works.items()}
    assert {"act", "bare network", "act_and_train, no update due", "act_and_train, with an update", "bare update"} <= set(kinds)
    for us in kinds.values():
        assert 0 < us["p50"] <= us["p95"] <= us["p99"] and us["calls"] >= latency.TURNS
    assert [*quick_latency["learning"]] == ["2x64, batch 32, uniform", "2x64, batch 32, prioritized"]
    latency.show(quick_latency)
    assert "times bare network" in capsys.readouterr().out


def test_calls_with_an_update_are_told_from_those_without():
    shape = latency.QUICK["2x64"]
    full = latency.fill(latency.make_agent(shape, 32, False), shape)
    assert int(full.memory.size) == shape.capacity
    agent = latency.make_agent(shape, 32, False, full)
    updates = []
    for _ in range(9):
        agent.act_and_train(np.zeros(4, np.float32), 1.0)
        updates.append(agent.get_statistics()["n_updates"])
    assert updates == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    kinds = latency.learning(shape, 32, False)[0].kinds  # From the second call on.
    assert [kind.endswith("with an update") for kind in kinds] == [False, False, False, True]


def test_contenders_take_turns_and_keep_their_place():
    calls = []
    contenders = [latency.Contender(lambda: calls.append("a"), ("a1", "a2")), latency.Contender(lambda: calls.append("b"), ("b",))]
    timed = latency.time_in_turns(contenders, calls=40, budget=10.0)
    assert {kind: us["calls"] for kind, us in timed.items()} == {"a1": 40, "a2": 40, "b": 40}
    assert calls[-9:] == ["a"] * 6 + ["b"] * 3 and calls.count("a") % 2 == 0


def test_images_go_on_where_the_last_stack_ended():
    seen = latency.observations(latency.SHAPES["Nature"]._replace(observation=(8, 8, 4)))
    assert seen[0].shape == (8, 8, 4) and seen[0].dtype == np.uint8
    for before, after in zip(seen, [*seen[1:], seen[0]], strict=True):
        np.testing.assert_array_equal(before[..., 1:], after[..., :-1])


@pytest.mark.parametrize("name", ["2x64", "Nature"])
def test_pytorch_chooses_with_the_same_network(name):
    torch = pytest.importorskip("torch")
    shape = latency.SHAPES[name]
    torch.manual_seed(0)
    choose = latency.torch_choice(shape)
    (model,) = [cell.cell_contents for cell in choose.__wrapped__.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)]
    params = latency.network_of(shape).init(jax.random.key(0), jnp.zeros((1, *shape.observation)))
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert sum(parameter.numel() for parameter in model.parameters()) == ours
    assert 0 <= choose(latency.observations(shape)[0]) < shape.num_actions


# roofline


def test_multiply_adds_are_those_counted_by_hand():
    assert roofline.multiply_adds(latency.SHAPES["2x64"]) == [4 * 64, 64 * 64, 64 * 2]
    # Nature on 84x84x4: 20x20x32, 9x9x64 and 7x7x64 outputs.
    nature = [400 * 32 * 256, 81 * 64 * 512, 49 * 64 * 576, 3136 * 512, 512 * 6]
    assert roofline.multiply_adds(latency.SHAPES["Nature"]) == nature == [3_276_800, 2_654_208, 1_806_336, 1_605_632, 3_072]
    small = latency.Shape((10, 10, 4), networks.MINATAR, (128,), 6, (32,), 100)
    assert roofline.multiply_adds(small) == [64 * 16 * 36, 1024 * 128, 128 * 6]


def test_an_update_is_three_passes_forward_and_one_back():
    shape = latency.SHAPES["2x64"]  # 4,480 multiplications forward, 256 of them in the first layer.
    assert roofline.update_flops(shape, 10) == 2 * 10 * (3 * 4_480 + 2 * 4_480 - 256)
    assert roofline.update_flops(shape, 10, double=False) == 2 * 10 * (2 * 4_480 + 2 * 4_480 - 256)


def test_times_of_the_parts_follow_from_the_rates():
    update = {"update_us": {"p50": 100.0}, "flops_by_hand": 3_000_000, "flops": 2_000_000.0, "bytes": 500_000.0}
    peaks = {"flops": 1e11, "bytes": 1e10}
    assert roofline.against(peaks, update) == pytest.approx({"arithmetic_us": 20.0, "traffic_us": 50.0, "share": 0.5})
    untold = update | {"flops": None, "bytes": None}
    assert roofline.against(peaks, untold) == pytest.approx({"arithmetic_us": 30.0, "traffic_us": None, "share": 0.3})


def test_counts_of_xla_agree_with_those_by_hand(capsys):
    measured = roofline.measure(quick=True)
    assert measured["peaks"]["flops"] > 0 and measured["peaks"]["bytes"] > 0
    (update,) = measured["updates"].values()
    assert update["flops"] is None or 1 <= update["flops"] / update["flops_by_hand"] < 1.3
    shape = latency.QUICK["2x64"]
    batch_bytes = 32 * (2 * 16 + 12)
    assert update["bytes"] is None or update["bytes"] > batch_bytes + 4 * sum(roofline.multiply_adds(shape))
    roofline.show(measured)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "2x64, batch 32: update" in line and "% of the limit" in line
    untold = {"flops": None, "bytes": None, "traffic_us": None}
    roofline.show(measured | {"updates": {"2x64": update | untold}})
    assert "counted by hand" in capsys.readouterr().out


def test_a_profile_counts_what_runs_on_streams_of_the_device():
    def name(pid, what, text, tid=None):
        return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": text}}

    def ran(pid, tid, text, dur):
        return {"ph": "X", "pid": pid, "tid": tid, "name": text, "dur": dur, "ts": 0}

    events = [
        *(name(1, "process_name", "/device:GPU:0"), name(1, "thread_name", "Stream #13(Compute)", 7)),
        *(name(1, "thread_name", "XLA Ops", 8), name(2, "process_name", "/host:CPU"), name(2, "thread_name", "Stream of words", 7)),
        *(ran(1, 7, "loop_fusion_3", 4.0), ran(1, 7, "loop_fusion_12", 2.0), ran(1, 7, "gemm", 10.0), ran(1, 7, "gemm", 10.0)),
        *(ran(1, 8, "loop_fusion_3", 100.0), ran(2, 7, "python", 1000.0)),
    ]
    told = roofline.summarize_trace(events, 2)
    assert told == {"count": 2.0, "busy_us": 13.0, "longest": {"gemm": 10.0, "loop_fusion": 3.0}}
    assert roofline.summarize_trace([event for event in events if event["pid"] == 2], 2) is None


def test_updates_in_a_loop_are_made():
    shape = latency.QUICK["2x64"]
    made = latency.make_agent(shape, 32, prioritized=False)
    state, agent = latency.fill(made, shape), made.agent
    before = int(state.updates)
    told = agent._replace(update=lambda state, drawn: (agent.update(state, drawn)[0], state.updates))
    loop = roofline.updates_in_a_loop(told, state)
    assert [*loop(2).tolist(), *loop(3).tolist()] == [before + i for i in range(5)]
