"""``dqn-jax bench``: which sections run, what is kept whatever happens, and what is said about it. Most of them are faked here."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dqn_jax import cli
from dqn_jax.bench import command, latency, loops, pictures, pixels, report, size

CPU = {"platform": "cpu", "kind": "cpu"}
SCALED = ["scaling", "scaling, inline", "scaling, a device per core"]
ALL = [
    "size",
    "memory",
    "loops",
    "latency",
    "latency, inline",
    *SCALED,
    "nature",
    "nature, inline",
    "roofline",
    "roofline, inline",
    "pixels",
    "family",
    "family, inline",
]
ALL += ["policies", "policies, inline", "policies, a device per core", "curiosity", "curiosity, inline"]


def speed(contender, median):
    return {"contender": contender, "steps_per_second": {"median": median, "min": 0.9 * median, "max": 1.2 * median}}


def series(axis, unit, medians):
    return {"axis": axis, "unit": unit, "points": [{"count": 4**i, "median": median} for i, median in enumerate(medians)]}


CALLS = {kind: {"p50": us} for kind, us in (("act", 20.0), ("bare network", 15.0))}
SCALING = {
    "series": {
        "host loop": series("environments", "steps per second", [100.0, 300.0]),
        "compiled loop": series("seeds", "steps per second", [1_000.0, 4_000.0]),
    }
}
NATURE = {"series": {"ours, float32": series("batch size", "updates per second", [30.0, 9.0])}}
MEASURED = {
    "size": {
        "installed": {"dqn_jax": {"bytes": 655_000_000}, "torch": {"bytes": 900_000_000}, "stable_baselines3": {"bytes": 1_200_000_000}},
        "libtorch_bytes": 436_400_000,
        "imports": {"dqn_jax": {"cold": 3.0, "warm": {"median": 0.8, "min": 0.7, "max": 0.9}}},
    },
    "memory": {
        "ours, the deck's 3x128, 2,000 transitions": {"marks": {"imported": 1, "end": 300_000_000}, "seconds": 9.54, "steps": 10_000},
        "torch, the deck's": {"marks": {"imported": 1, "end": 350_000_000}, "seconds": 6.0},
        "sb3, the deck's": {"failed": "it broke"},
        "libtorch, the deck's": {"marks": {"imported": 1, "end": 150_000_000}, "seconds": 1.25},
        "ours, Nature, 20,000 frames": {"marks": {"imported": 1, "end": 900_000_000}, "seconds": 20.0},
    },
    "loops": {
        "reports": [
            {
                "title": "the plain work",
                "work": {"deck": False},
                "summary": [speed("ours, inline", 8_000.0), speed("ours", 5_000.0), speed("torch", 6_000.0)],
            },
            {
                "title": "the deck's work",
                "work": {"deck": True},
                "summary": [speed("torch", 4_000.0), speed("ours, inline", 9_000.0), speed("ours", 7_000.0), speed("libtorch", 20_000.0)],
            },
        ]
    },
    "latency": {
        "acting": {"2x64": CALLS},
        "learning": {
            "2x64, batch 32, uniform": {"bare update": {"p50": 100.0}},
            "2x64, batch 32, prioritized": {"bare update": {"p50": 140.0}},
        },
    },
    "scaling": SCALING,
    "nature": NATURE,
    "roofline": {"peaks": {}},
    "pixels": {"update_ms": {}},
    "family": {"agents": {}},
    "policies": {"ppo": {}},
    "curiosity": {"kinds": {}},
}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs ``dqn-jax bench`` in an empty folder; gives the exit status and both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def run(*words):
        capsys.readouterr()
        try:
            cli.main(["bench", *map(str, words)])
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


class Sections:
    """Stands in for the sections: writes what they would, and notes what was asked of each; ``fails`` says how some of them end."""

    def __init__(self):
        self.asked = []
        self.fails = {}

    def run(self, words, out):
        self.asked.append(words)
        outcome = self.fails.get(words[0], "")
        if not isinstance(outcome, str):
            out.write_text(json.dumps({"partial": True}))
            raise outcome
        if not outcome:
            out.write_text(json.dumps({"machine": {"processor": "theirs"}, **MEASURED[words[0]]}))
        return outcome


@pytest.fixture
def sections(monkeypatch):
    fake = Sections()
    monkeypatch.setattr(command, "run_section", fake.run)
    monkeypatch.setattr(command.machine, "find_device", lambda: CPU)
    return fake


def results_in(folder="benchmarks"):
    (path,) = Path(folder).glob("*/results.json")
    return json.loads(path.read_text())


# What runs, and what is left.


def test_all_sections_run_in_order_and_their_results_are_one_file(sections, bench):
    status, out, _ = bench("--repeats", 3)
    assert status == 0
    titles = [line.strip("= ") for line in out.splitlines() if line.startswith("==")]
    results = results_in()
    assert titles == [f"{name} ({number} of {len(ALL)})" for number, name in enumerate(ALL, 1)]
    assert [*results["measured"]] == ALL
    assert [words[0] for words in sections.asked] == [name.split(",")[0] for name in ALL]
    assert sections.asked[2] == ["loops", "--repeats", "3"]
    assert sections.asked[3:8] == [["latency"], ["latency", "--inline"], ["scaling"], ["scaling", "--inline"], ["scaling", "--spread"]]
    assert results["failures"] == {} and results["quick"] is False and results["repeats"] == 3 and results["device"] == CPU
    assert results["machine"]["versions"]["jax"], "the machine is described once"
    assert not any("machine" in section for section in results["measured"].values())
    assert results["measured"]["size"] == MEASURED["size"]


def test_some_sections_run_in_the_same_order_quickly(sections, bench):
    status, out, _ = bench("--quick", "--sections", "pixels", "loops", "--folder", "deep/elsewhere")
    assert status == 0
    assert sections.asked == [["loops", "--quick", "--repeats", "1"], ["pixels", "--quick"]]
    assert [*results_in("deep/elsewhere")["measured"]] == ["loops", "pixels"]
    assert "the numbers are no result" in out


def test_nothing_runs_inline_on_an_accelerator():
    assert [*command.plan(command.SECTIONS, False, 5, is_cpu=False)] == [*command.SECTIONS]


def test_the_summary_is_the_last_line(sections, bench):
    status, out, _ = bench("--json", "--sections", "size", "memory")
    summary = json.loads(out.splitlines()[-1])
    assert status == 0 and set(summary) == {"results", "failures", "headlines"}
    assert json.loads(Path(summary["results"]).read_text())["measured"]["size"] == MEASURED["size"]
    assert summary["failures"] == {} and summary["headlines"]["warm import, s"] == 0.8


def test_two_runs_in_one_second_have_a_folder_each(sections, bench, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    for _ in range(2):
        bench("--sections", "pixels")
    assert sorted(path.name for path in Path("benchmarks").iterdir()) == ["now", "now-2"]


# Failures and interrupts.


def test_a_failure_is_told_at_the_end_and_the_others_go_on(sections, bench):
    sections.fails["size"] = "exit status 1: ModuleNotFoundError: the sizes need packaging: pip install packaging"
    status, out, _ = bench("--sections", "size", "memory", "pixels", "--json")
    assert status == 1
    *_, failed, summary = out.splitlines()
    assert failed == f"FAILED: size: {sections.fails['size']}"
    assert json.loads(summary)["failures"] == {"size": sections.fails["size"]}
    assert [*results_in()["measured"]] == ["memory", "pixels"]
    assert results_in()["failures"] == {"size": sections.fails["size"]}


def test_an_interrupt_keeps_what_was_measured(sections, bench):
    sections.fails["loops"] = KeyboardInterrupt()
    status, _, err = bench("--sections", "size", "loops", "pixels")
    assert status == 130
    (path,) = Path("benchmarks").glob("*/results.json")
    assert f"kept in {path}" in err
    results = json.loads(path.read_text())
    assert results["measured"] == {"size": MEASURED["size"], "loops": {"partial": True}}
    assert results["failures"] == {"loops": "interrupted", "pixels": "interrupted"}
    assert [words[0] for words in sections.asked] == ["size", "loops"]


def test_results_are_written_after_every_section(sections, bench, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_section", lambda words, out: seen.extend(Path("benchmarks").glob("*/*")) or sections.run(words, out))
    bench("--sections", "size", "pixels")
    assert [path.name for path in seen] == ["results.json"], "nothing before the first, one file before the second"


@pytest.mark.parametrize("written", [None, '{"cut": '])
def test_a_section_without_results_has_failed(written, sections, bench, monkeypatch):
    monkeypatch.setattr(command, "run_section", lambda words, out: "" if written is None else out.write_text(written) and "")
    status, out, _ = bench("--sections", "pixels")
    assert status == 1 and "FAILED: pixels: it ended well and wrote no results" in out


def test_the_error_of_a_section_is_what_it_said_last(capfd, tmp_path):
    error = command.run_section(["nothing"], tmp_path / "out.json")
    assert error.startswith("exit status 1: ") and error.endswith("No module named dqn_jax.bench.nothing")
    assert "No module named dqn_jax.bench.nothing" in capfd.readouterr().err, "and it is shown at once"


def test_no_device_is_one_message(bench, monkeypatch):
    monkeypatch.setattr(command.machine, "ASK_FOR_DEVICE", "raise RuntimeError('no such platform')")
    status, _, err = bench("--sections", "size")
    assert status == 2 and err.strip() == "error: JAX finds no device to compute on: RuntimeError: no such platform"
    assert not Path("benchmarks").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--repeats", "few"], "--repeats"),
        (["--sections", "speed"], "roofline"),
        (["--folder", "file"], "file is a file: name another"),
        (["--sections"], "--sections"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_runs(words, says, bench, sections):
    Path("file").touch()
    status, out, err = bench(*words)
    assert status == 2 and out == "" and says in err and "Traceback" not in err
    assert sections.asked == [] and [path.name for path in Path().iterdir()] == ["file"]


# What is made of the results.


def test_the_decks_three_numbers(capsys):
    command.show_deck(MEASURED)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["ours", "655", "300", "9.5", "9,000"] in rows
    assert ["libtorch", "(C++)", "436", "150", "1.2", "20,000"] in rows
    assert ["PyTorch", "900", "350", "6.0", "4,000"] in rows
    assert ["PFRL", "-", "-", "-", "-"] in rows
    assert ["SB3", "1,200", "-", "-", "-"] in rows
    assert any("10,000 steps once, from the start of the process" in line for line in lines)
    (claimed,) = [number for number, line in enumerate(lines) if line.startswith("claimed there")]
    assert "1,700" in lines[claimed + 2] and "800" in lines[claimed + 3]
    command.show_deck({"pixels": {}})
    assert capsys.readouterr().out == "", "none of the three was measured"


def test_headlines_are_of_ours_alone():
    assert command.headlines(MEASURED | {"latency, inline": MEASURED["latency"]}) == {
        "installed, MB": 655.0,
        "warm import, s": 0.8,
        "peak memory, ours, the deck's 3x128, 2,000 transitions, MB": 300.0,
        "peak memory, ours, Nature, 20,000 frames, MB": 900.0,
        "the plain work, ours, inline, steps/s": 8_000.0,
        "the plain work, ours, steps/s": 5_000.0,
        "the deck's work, ours, inline, steps/s": 9_000.0,
        "the deck's work, ours, steps/s": 7_000.0,
        "act, 2x64, us": 20.0,
        "update, 2x64, us": 100.0,
        "act, 2x64, inline, us": 20.0,
        "update, 2x64, inline, us": 100.0,
    }
    assert command.headlines({"loops": {"partial": True}}) == {}


def test_changes_are_marked_by_their_direction():
    before = {"loop, steps/s": 1_000.0, "act, us": 10.0, "update, us": 10.0, "import, s": 1.0, "slow, steps/s": 10.0, "gone, s": 1.0}
    now = {"loop, steps/s": 1_300.0, "act, us": 13.0, "update, us": 7.0, "import, s": 1.1, "slow, steps/s": 8.0, "new, s": 1.0}
    assert command.compare(before, now) == [
        ("loop, steps/s", "1,000", "1,300", "1.30", "better"),
        ("act, us", "10", "13", "1.30", "WORSE"),
        ("update, us", "10", "7", "0.70", "better"),
        ("import, s", "1", "1.1", "1.10", ""),
        ("slow, steps/s", "10", "8", "0.80", "WORSE"),
    ]


def test_a_run_is_compared_with_the_newest_like_it(sections, bench):
    _, out, _ = bench("--sections", "size", "memory")
    assert "against the last one" not in out
    first = results_in()

    def remember(name, warm, **changed):
        earlier = json.loads(json.dumps(first | changed))
        earlier["measured"]["size"]["imports"]["dqn_jax"]["warm"]["median"] = warm
        (Path("benchmarks") / name).mkdir()
        (Path("benchmarks") / name / "results.json").write_text(json.dumps(earlier))

    remember("old", 9.0, time="2001-01-01 00:00:00")
    (next(Path("benchmarks").glob("20*")) / "results.json").unlink()
    remember("newer", 0.4, time="2002-01-01 00:00:00")
    remember("quick", 9.0, time="2003-01-01 00:00:00", quick=True)
    remember("failed", 9.0, time="2003-01-01 00:00:00", failures={"memory": "interrupted"})
    remember("accelerated", 9.0, time="2003-01-01 00:00:00", device={"platform": "gpu", "kind": "some"})
    remember("foreign", 9.0, time="2003-01-01 00:00:00", machine=first["machine"] | {"processor": "another"})
    for name, text in (("broken", "{"), ("list", "[1]"), ("empty", "{}")):
        (Path("benchmarks") / name).mkdir()
        (Path("benchmarks") / name / "results.json").write_text(text)
    _, out, _ = bench("--sections", "size", "memory")
    lines = out[out.index("against the last one (2002-01-01 00:00:00)") :].splitlines()
    (warm,) = [line for line in lines if "warm import" in line]
    assert warm.split() == ["warm", "import,", "s", "0.4", "0.8", "2.00", "WORSE"]


def test_pictures_are_drawn_of_what_was_measured(tmp_path):
    assert pictures.draw({"size": MEASURED["size"], "loops": {"partial": True}}, tmp_path) == []
    failed_on_its_way = {"series": {"host loop": SCALING["series"]["host loop"]}}
    drawn = pictures.draw(MEASURED | {"scaling, inline": failed_on_its_way}, tmp_path)
    assert drawn == [tmp_path / "loops.png", tmp_path / "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pictures.draw(MEASURED, tmp_path) == [] and [*tmp_path.iterdir()] == []
    assert "dqn_jax[plots]" in capsys.readouterr().out


# What the sections were given for it.


def test_libtorch_is_its_libraries_without_pythons(tmp_path, monkeypatch):
    (tmp_path / "lib" / "libshm").mkdir(parents=True)
    for name, number in (("libtorch_cpu.so", 1_000), ("libgomp.so.1", 100), ("libtorch_python.so", 10), ("other", 1)):
        (tmp_path / "lib" / name).write_bytes(bytes(number))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
        assert size.measure_libtorch() == 1_100
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert size.measure_libtorch() is None


def test_pixels_quickly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pixels", "--quick", "--out", str(tmp_path / "pixels.json")])
    pixels.main()
    written = json.loads((tmp_path / "pixels.json").read_text())
    (case,) = pixels.QUICK
    assert written["machine"]["cores"] and [*written["update_ms"]] == [case]
    assert len(written["update_ms"][case]) == 4
    assert all(0 < ms["min"] <= ms["median"] <= ms["max"] for ms in written["update_ms"][case].values())
    assert case in capsys.readouterr().out


def test_a_section_alone_says_at_once_that_its_file_cannot_be_written(monkeypatch, tmp_path):
    out = tmp_path / "nowhere" / "out.json"
    monkeypatch.setattr(sys, "argv", ["latency", "--out", str(out)])
    with pytest.raises(SystemExit, match=r"--out .*out\.json cannot be written \(No such file or directory\): name another file"):
        report.options(latency.Options, latency.__doc__)


def test_a_section_alone_ends_quietly_when_interrupted(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        report.command(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_an_unknown_contender_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loops", "--only", "foo"])
    with pytest.raises(SystemExit, match="there is no contender foo: --only takes ours, "):
        loops.main()


# For real.


def test_a_section_that_swallows_an_interrupt_is_told_again(monkeypatch):
    monkeypatch.setattr(command, "PATIENCE", 0.2)
    deaf_once = """
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(60)
"""
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    with subprocess.Popen([sys.executable, "-c", heeding + deaf_once], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as deaf:
        assert deaf.stdout.readline() == "begun\n"
        command._interrupt(deaf)
    assert deaf.returncode == -signal.SIGINT


def test_a_real_section(tmp_path):
    words = ["--sections", "size", "--quick", "--json", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "dqn_jax.cli", "bench", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    order = [lines.index(line) for line in ("== size (1 of 1) ==", "seconds of an import in a fresh process")]
    assert order == sorted(order), "what a section prints stands under its name"
    summary = json.loads(lines[-1])
    measured = json.loads(Path(summary["results"]).read_text())["measured"]
    assert summary["headlines"]["installed, MB"] == measured["size"]["installed"]["dqn_jax"]["bytes"] / 1e6 > 100


@pytest.mark.parametrize("interrupt", [os.kill, os.killpg], ids=["the command alone", "all, as a terminal does"])
def test_a_real_interrupt_leaves_no_process_behind(interrupt, tmp_path):
    # Where the tests run in the background SIGINT may be ignored, and a child would inherit that. (No preexec_fn: JAX warns of a fork.)
    heeding = "import signal; from dqn_jax import cli; signal.signal(signal.SIGINT, signal.default_int_handler); cli.main()"
    whole = subprocess.Popen(
        [sys.executable, "-c", heeding, "bench", "--sections", "size", "--folder", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while whole.stdout.readline().strip() != "== size (1 of 1) ==":
        assert whole.poll() is None
    time.sleep(1)  # The section is at work, most likely.
    interrupt(whole.pid, signal.SIGINT)
    _, err = whole.communicate(timeout=60)
    assert whole.returncode == 130 and "interrupted" in err and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(whole.pid, 0)
    assert results_in(tmp_path)["failures"] == {"size": "interrupted"}
