"""The command line: ``dqn-jax train ENV``, ``dqn-jax eval RUN`` and ``dqn-jax bench``."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium
import jax
import numpy as np
import tyro
from gymnasium.wrappers import RecordVideo
from tqdm import tqdm

from dqn_jax import atari, envs
from dqn_jax.bench.command import SECTIONS, bench
from dqn_jax.experiment import train
from dqn_jax.log import say
from dqn_jax.options import elsewhere
from dqn_jax.play import play_greedily
from dqn_jax.presets.reading import encoder_of
from dqn_jax.presets.table import ALGORITHMS
from dqn_jax.programs import compute_inline, device_per_core, usable_cores
from dqn_jax.runs import Task, best_learner, greedy_policy, make_env, read_task
from dqn_jax.seeds import num_devices
from dqn_jax.statistics import iqm
from dqn_jax.training import evaluate
from dqn_jax.types import AgentState, Env

# Width times batch (times seeds trained at once) up to which a program is small: a layer of 64 with a batch of 64 is faster on one thread
# than on two, alone and stepped from Python.
INLINE_SIZE = 1 << 15


ERRORS = (
    *(ValueError, TypeError, FloatingPointError, NotImplementedError, OSError, MemoryError, ModuleNotFoundError),
    gymnasium.error.Error,
)
"""What a user can mend."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains an agent: step by step in a Gymnasium environment, compiled whole in a JAX one."""

    env: Annotated[str | None, tyro.conf.Positional] = None
    """Gymnasium id (CartPole-v1, ALE/Pong-v5), or a JAX environment (phys2d/CartPole-v1, gymnax/Catch-bsuite, pgx/minatar-breakout). Not
    needed with --resume."""
    algo: Literal[tuple(ALGORITHMS)] = "dqn"  # type: ignore[valid-type]
    """The algorithm; which presets and options there are depends on it (dqn-jax train --algo ppo --help)."""
    steps: int | None = None
    """Environment steps for each seed in all (default: 50000; with --resume or --fork: as before). A JAX environment makes some more, to
    whole updates; what follows a schedule of its own number of steps does not stretch with this."""
    seed: int = 0
    """Seed of the first agent; the others follow."""
    seeds: int = 1
    """Independent agents; in a JAX environment they train all at once."""
    num_envs: int = 1
    """Environments that feed each agent."""
    env_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An argument of the environment, NAME=VALUE; may be repeated."""
    eval_episodes: int = 20
    """Greedy episodes in each evaluation."""
    name: str | None = None
    """Name of the run's folder (default: made of environment and time)."""
    folder: Path = Path("runs")
    """Where the run's folder goes."""
    resume: Path | None = None
    """A run's folder: go on from its last checkpoint, with its options; only --steps, --rollback and --json may stand beside it."""
    rollback: bool = False
    """With --resume: go on from the checkpoint before the last, which takes its place. With --fork: begin with that one."""
    fork: Path | None = None
    """A run's folder: begin a new run with its last state and its options, but for those given. What gives arrays another shape (hidden,
    capacity, num-envs ...) cannot change."""
    json: bool = False
    """Print the summary as the last line of standard output, one JSON object."""


@dataclasses.dataclass(frozen=True)
class Eval:
    """Plays greedy episodes with the agent of a run, as it was when it evaluated best."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    episodes: int = 20
    """Episodes to play."""
    seed: int = 0
    """Which of the run's agents: 0 is the first."""
    env: str | None = None
    """Another Gymnasium environment with the same spaces; needed to render what cannot be rendered."""
    render: bool = False
    """Show the episodes in a window."""
    video: Path | None = None
    """Record the first episode to this file (.mp4; needs the extra `video`)."""
    json: bool = False
    """Print the result as the last line of standard output, one JSON object."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures this package and, where they are installed, others beside it, and shows changes against earlier runs on this machine.

    What was measured goes into FOLDER/TIME/results.json after every section, so Ctrl-C keeps it; pictures need the extra `plots`. Where a
    section fails, the others go on, and the exit status is 1. Measure on a machine that does nothing else.
    """

    sections: tuple[Literal[SECTIONS], ...] = SECTIONS  # type: ignore[valid-type]
    """What to measure, always in this order.
    size: bytes on disk with all that is required, and seconds of an import.
    memory: the most that training takes, stage by stage.
    loops: steps per second, beside plain PyTorch, libtorch, PFRL, SB3 and other loops on JAX; takes the longest.
    latency: microseconds of single calls.
    scaling: steps per second of many at once.
    nature: updates of Nature's network by batch size, beside PyTorch.
    roofline: an update against what the device could do.
    pixels: updates of convolutional networks.
    family: an update of each member of DQN's family.
    policies: PPO's compiled loop and SAC's update, beside others'.
    curiosity: what it adds to PPO's compiled loop."""
    quick: bool = False
    """A little of everything, to see that it runs: these numbers are no result."""
    repeats: int | None = None
    """Measurements of each contender in loops (default: 5; with --quick 1)."""
    folder: Path = Path("benchmarks")
    """Where the folder of this run goes, and those of earlier runs are."""
    json: bool = False
    """Print the headline numbers, the path of the results and what failed as the last line of standard output, one JSON object."""


def main(args: list[str] | None = None) -> None:
    """The console script. Errors that a user can mend are one line on standard error, and exit status 2; 1 if a benchmark failed."""
    args = sys.argv[1:] if args is None else args
    try:
        default = _train_default(args)
        if args[:1] == ["train"]:
            _require_own_flags(args, default)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)
    train_command: Any = tyro.conf.subcommand("train", default=default)
    eval_command, bench_command = tyro.conf.subcommand("eval"), tyro.conf.subcommand("bench")
    commands: Any = Annotated[type(default), train_command] | Annotated[Eval, eval_command] | Annotated[Bench, bench_command]
    command = tyro.cli(commands, args=args, prog="dqn-jax", description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    try:
        summary = _train(command) if isinstance(command, Train) else _eval(command) if isinstance(command, Eval) else _bench(command)
    except ERRORS as error:
        hint = atari.hint(str(command.env)) if isinstance(error, gymnasium.error.Error) and isinstance(command, Train) else ""
        say("\n  ".join([f"error: {error}{hint}", *getattr(error, "__notes__", ())]))
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted")
        # At once: a compilation that is still under way in another thread would crash the interpreter on its way out.
        os._exit(130)
    if command.json:
        print(json.dumps(summary), flush=True)
    if isinstance(command, Bench) and summary["failures"]:
        sys.exit(1)
    if isinstance(command, Train) and summary.get("interrupt"):
        sys.exit(128 + summary["interrupt"])  # As shells have it.


def _train_default(args: list[str]) -> Any:
    """A ``Train`` with the presets and the options of the algorithm that the arguments name, and with the preset's options as defaults, so
    that --help shows them and flags override them. A game of Atari starts from the set of that name. Where a name is unknown, the parser
    says so.
    """
    split = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--fork=") else [arg])]
    task = next((read_task(Path(value)) for flag, value in itertools.pairwise(split) if flag == "--fork"), None)
    algo = _named(args, "--algo", list(ALGORITHMS), "dqn") if task is None else task.algo
    preset = ALGORITHMS[algo]
    paths = ("--name", "--folder", "--resume", "--fork")
    games = [word for before, word in itertools.pairwise(["", *args]) if atari.is_atari(word) and before not in paths]
    otherwise = "atari" if games and "atari" in preset.sets else "default"
    chosen = _named(args, "--preset", list(preset.sets), otherwise)
    sets: Any = Annotated[Literal[tuple(preset.sets)], tyro.conf.arg(help="The set of options that the flags below start from.")]
    options: Any = Annotated[preset.options, tyro.conf.arg(name="", help=f"Options of {algo}.")]
    fields = [
        ("preset", sets, dataclasses.field(default=otherwise)),
        ("options", options, dataclasses.field(default_factory=preset.options)),
    ]
    kind: Any = dataclasses.make_dataclass("Train", fields, bases=(Train,), frozen=True, namespace={"__doc__": Train.__doc__})
    if task is None:
        return kind(algo=algo, options=preset.options(**preset.sets[chosen]))
    beside = {name: getattr(task, name) for name in ("env", "steps", "seed", "seeds", "num_envs", "eval_episodes")}
    env_arg = tuple(f"{name}={json.dumps(value)}" for name, value in task.env_args.items())
    options_then = {name: tuple(value) if isinstance(value, list) else value for name, value in task.options.items()}  # JSON has no tuples.
    return kind(algo=algo, options=preset.options(**options_then), env_arg=env_arg, **beside)


def _require_own_flags(args: list[str], command: Any) -> None:
    """Raises ValueError on a flag that is another library's or another algorithm's, or that a run to go on with does not take."""
    flags = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    if foreign := _foreign_flag(flags, command):
        raise ValueError(foreign)
    others = [flag for flag in flags if flag not in ("--resume", "--steps", "--rollback", "--no-rollback", "--json", "--no-json", "--help")]
    if "--resume" in flags and others:
        raise ValueError(
            f"--resume goes on with the run's own options: leave out {', '.join(others)}, or begin a new run from its state with --fork"
        )
    if "--rollback" in flags and not {"--resume", "--fork"} & {*flags}:
        raise ValueError("--rollback goes with --resume RUN or --fork RUN")
    if "--fork" in flags and (sets := [flag for flag in flags if flag in ("--algo", "--preset")]):
        raise ValueError(f"--fork begins with the options of its run: leave out {' and '.join(sets)}, and give single options")
    if "--fork" in flags and "--seed" in flags:
        raise ValueError("--fork goes on with the random numbers of its run: leave out --seed")


def _foreign_flag(flags: list[str], command: Any) -> str | None:
    """What to give for the first flag that is another library's or another algorithm's, or None where there is none."""
    names = {field.name for kind in (command, command.options) for field in dataclasses.fields(kind)}
    for flag in flags:
        name = flag[2:].replace("-", "_")
        owners = [algo for algo, preset in ALGORITHMS.items() if name in {field.name for field in dataclasses.fields(preset.options)}]
        hint = elsewhere(name, names) or (f"it is one of {' and '.join(owners)}" if owners else None)
        if name not in names and hint:
            return f"{command.algo} has no option {flag}: {hint}"
    return None


def _named(args: list[str], flag: str, known: list[str], otherwise: str) -> str:
    for given, value in itertools.pairwise([*args, ""]):
        name = value if given == flag else given.removeprefix(f"{flag}=")
        if given.startswith(flag) and name in known:
            return name
    return otherwise


def _train(command: Any) -> dict[str, Any]:
    if command.resume is not None:
        if command.env is not None:
            raise ValueError(f"--resume goes on in the run's own environment: leave out {command.env}")
        task, folder = read_task(command.resume), command.resume
        task = task._replace(steps=task.steps if command.steps is None else command.steps)
    elif command.env is None:
        raise ValueError("name an environment (dqn-jax train CartPole-v1), or a run to go on with (--resume RUN)")
    else:
        task = Task(
            env=command.env,
            env_args=dict(map(_parse_env_arg, command.env_arg)),
            steps=50_000 if command.steps is None else command.steps,
            seed=command.seed,
            seeds=command.seeds,
            num_envs=command.num_envs,
            eval_episodes=command.eval_episodes,
            options=dataclasses.asdict(command.options),
            algo=command.algo,
        )
        folder = command.folder / (command.name or _new_name(command))
    own = ALGORITHMS[task.algo].sets["default"].get("distribution")
    if own is not None and own != task.options["distribution"]:
        given = task.options["distribution"]
        raise ValueError(f"--algo {task.algo} is DQN with --distribution {own}, got {given}: leave one of them out")
    _choose_threads(task)
    with warnings.catch_warnings():
        warnings.filterwarnings("once", "much of what C51 learns from")
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)  # Above the progress bar.
        summary = train(task, folder, resume=command.resume is not None, rollback=command.rollback, fork=command.fork)
    if not command.json:
        _print_summary(summary)
    return summary


def _choose_threads(task: Task) -> None:
    """Many seeds keep every core busy with a program of its own; for one small program one thread is the fastest. This command owns its
    process, so it may choose.
    """
    seeds = task.seeds if task.seeds > 1 and envs.is_jax_env(task.env) else 1
    width = max(task.options.get("hidden") or (256 if task.algo == "sac" else 64,))
    is_small = width * task.options.get("batch_size", 1) * seeds <= INLINE_SIZE
    with contextlib.suppress(RuntimeError):  # Called from a program that uses JAX already: it keeps its setting.
        if num_devices(seeds, usable_cores()) > 1:
            device_per_core()
        elif is_small and not _has_large_images(task):
            compute_inline()


def _has_large_images(task: Task) -> bool:
    try:
        if envs.is_jax_env(task.env):  # Making one would start JAX, and then it is too late to choose. Theirs are small.
            return False
        env = make_env(task.env, **task.env_args)
    except Exception:  # What is wrong is said when the run makes its own.
        return False
    env.close()
    return encoder_of(task.options.get("encoder", "auto"), env.observation_space, task.options.get("frames", "off"))[0] == "nature"


def _new_name(command: Train) -> str:
    name = f"{str(command.env).replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (command.folder / name).exists())


def _print_summary(summary: dict[str, Any]) -> None:
    def shown(value: Any) -> str:
        if value is None:
            return "unknown"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value + 0.0:.3g}"  # + 0.0: no "-0".

    def interval(name: str) -> str:
        found = summary[f"{name}_interval"]
        if found is None or summary["seeds"] == 1:
            return ""
        return f" (95 % interval {shown(found[0])} to {shown(found[1])}, {summary['seeds']} seeds)"

    print(f"{summary['algo']} on {summary['env']}: {summary['steps']:,} steps, {summary['updates']:,} updates, {summary['seeds']} seed(s)")
    print(f"  greedy return, final parameters   {shown(summary['eval_iqm'])}{interval('eval')}")
    best = [value for value in summary["best_eval_return"] if value is not None]
    print(f"  greedy return, best on the way    {shown(iqm(np.array(best)) if best else None)} (kept for dqn-jax eval)")
    print(f"  return in the last tenth          {shown(summary['online_iqm'])}{interval('online')}")
    print(
        f"  steps per second                  {shown(summary['steps_per_second'])} after {summary['compile_seconds']:.1f} s of compilation"
    )
    print(f"  peak memory                       {summary['peak_memory_mb']:,} MB of the process; device {summary['device']}")
    print(f"  run                               {summary['run']}")
    if not summary["complete"]:
        print(f"stopped early; go on with: dqn-jax train --resume {summary['run']}")
    else:
        print(f"play it with: dqn-jax eval {summary['run']} [{_shown_with(summary['env'])}]")


def _shown_with(env_id: str) -> str:
    if atari.is_atari(env_id):
        return "--video FILE"
    return "--env GYMNASIUM_ID --render" if envs.is_jax_env(env_id) else "--render"


def _eval(command: Eval) -> dict[str, Any]:
    task = read_task(command.run)
    if command.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {command.episodes}")
    compiled = envs.is_jax_env(task.env)
    world = envs.make(task.env, **task.env_args) if compiled else make_env(task.env, **task.env_args)
    agent = ALGORITHMS[task.algo].build(world, **task.options)
    learner = best_learner(command.run, command.seed, agent, world.observation_space)
    if isinstance(world, Env) and not (command.render or command.video or command.env):
        play = evaluate(agent, world, num_episodes=command.episodes, max_steps=world.time_limit or 10_000)
        state = AgentState(learner, *[()] * 5)  # Acting needs no more.
        returns = np.asarray(jax.jit(play)(state, jax.random.key(command.seed + 20_000))).tolist()
    else:
        choose = greedy_policy(agent, learner, world.observation_space, world.action_space)
        if compiled and command.env is None:
            raise ValueError(
                f"{task.env} was trained as a JAX environment: name a Gymnasium environment to show it in, --env CartPole-v1 say"
            )
        returns = list(_play_and_show(command, command.env or task.env, {} if command.env else task.env_args, choose))
    shown, mean = command.env or task.env, float(np.mean(returns))
    result = {"run": str(command.run), "env": shown, "episodes": len(returns), "mean": mean, "returns": returns}
    if not command.json:
        print(f"{shown}: mean return {mean:.1f} over {len(returns)} greedy episodes")
        print(f"  from {min(returns):.1f} to {max(returns):.1f}")
    return result


def _bench(command: Bench) -> dict[str, Any]:
    repeats = (1 if command.quick else 5) if command.repeats is None else command.repeats
    return bench(command.sections, command.quick, repeats, command.folder)


def _play_and_show(command: Eval, env_id: str, env_args: dict[str, Any], choose: Any) -> Iterator[float]:
    """Greedy episodes in a Gymnasium environment, on the screen or, the first of them, into a file."""
    seeds = range(command.seed + 20_000, command.seed + 20_000 + command.episodes)
    if command.video is not None:
        with tempfile.TemporaryDirectory() as folder:
            env: Any = RecordVideo(make_env(env_id, render_mode="rgb_array", **env_args), folder, disable_logger=True)
            yield play_greedily(choose, env, seeds[0])
            env.close()
            command.video.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(next(Path(folder).glob("*.mp4")), command.video)
        say(f"video: {command.video}")
        seeds = seeds[1:]
    env = make_env(env_id, render_mode="human" if command.render else None, **env_args)
    for seed in seeds:
        yield play_greedily(choose, env, seed)
    env.close()


def _parse_env_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--env-arg takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, {"True": True, "False": False}.get(value, value)  # As Python spells them, or a word.


if __name__ == "__main__":
    main()
