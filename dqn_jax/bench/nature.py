"""Updates of Nature's convolutional network, by batch size, beside PyTorch: ``python -m dqn_jax.bench.nature [--quick] [--inline]
[--out FILE.json]``.

An update, DQN's as Mnih et al. (2015) have it with this package's options, draws a batch from a full replay of frames in the memory of the
device, takes Double DQN's targets (three forward passes, one backward), the squared error, a clip of the gradient's norm, Adam, and moves
the target network a little. No environment is stepped. Medians and ranges of three measurements, many updates in each, compilation apart:

* ours, inside a compiled loop, computed in float32 and in bfloat16; random numbers are drawn before;
* PyTorch's, where it is installed and finds the device on which JAX computes: called from Python, in both types (``torch.autocast`` and
  channels last), and, on CUDA, captured once and replayed as a CUDA graph. ``torch.compile`` was not tried.

float32 is that of JAX's default precision: on an accelerator products may be taken in a shorter type, TensorFloat-32 on NVIDIA's. PyTorch
is told to do the same.
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import footprint, spaces
from dqn_jax.bench import report, series
from dqn_jax.bench.latency import AHEAD, SHAPES, Shape, network_of, observation_space, observations, torch_network
from dqn_jax.bench.series import Contender, Done, Group
from dqn_jax.presets.dqn import DQNOptions, dqn
from dqn_jax.programs import compute_inline
from dqn_jax.types import Agent, AgentState, Transition

REPEATS = 3
FILLERS = 50  # Environments that fill a replay together, so that a large one is full soon.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}  # None: as parameters and images are.
TAU = 0.005
OPTIONS = DQNOptions(n_steps=1, tau=TAU)  # Of both sides.
WARM = 3  # Updates of PyTorch's before it is measured.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures updates of Nature's convolutional network."""

    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """A little of everything, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured; it is written after every batch size."""


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      frames: that the replay keeps.
      batch_sizes: of the updates.
      learnt: transitions that are learnt from in one measurement: updates times batch size.
      repeats: measurements of each.
    """

    frames: int
    batch_sizes: tuple[int, ...]
    learnt: int
    repeats: int = REPEATS


def sizes(backend: str, quick: bool = False) -> Sizes:
    """How much is measured on a backend.

    Args:
      backend: as ``jax.default_backend()`` names it; whatever is not "cpu" is an accelerator.
      quick: a little of everything.
    """
    if quick:
        return Sizes(1_000, (32,), 128)
    if backend == "cpu":
        return Sizes(20_000, (32, 128), 2_560)
    return Sizes(1_000_000, (32, 128, 512, 1024, 4096), 40_960)


def updates(shape: Shape, chosen: Sizes) -> Iterator[dict[str, Any]]:
    """Updates from one replay, which is full, batch size by batch size.

    Args:
      shape: the network and what it sees.
      chosen: how much.

    Yields:
      For each batch size a point for each contender, as ``series.in_turns`` gives them.

    Raises:
      ValueError: if a batch is larger than what is learnt from.
    """
    if max(chosen.batch_sizes) > chosen.learnt:
        raise ValueError(
            f"an update with a batch of {max(chosen.batch_sizes)} learns from more than {chosen.learnt} transitions: allow more"
        )
    shape = shape._replace(capacity=chosen.frames)
    replay = Replay(shape)
    theirs = None if torch_obstacle() else TorchReplay(shape)
    for batch_size in chosen.batch_sizes:
        points: dict[str, Any] = {}
        number = chosen.learnt // batch_size
        for dtype in DTYPES:  # Like is compared with like.
            contenders = {f"ours, {dtype}": ours(shape, replay, dtype, batch_size, number)}
            if theirs:
                contenders |= torch_contenders(shape, theirs, dtype, batch_size, number)
            points |= series.in_turns(batch_size, contenders, chosen.repeats, series.UPDATES)
        yield points


# Ours.


class Replay:
    """A full replay, which programs use up and give back.

    Attributes:
      memory: it.
      fresh: from a key to the state of an agent without it; no state depends on batch size or type.
    """

    def __init__(self, shape: Shape):
        agent, example = convolutional_agent(shape, "float32", shape.batch_sizes[0]), spaces.example(observation_space(shape), FILLERS)
        self.fresh = jax.jit(lambda key: agent.init(key, example)._replace(memory=()))
        self.memory = full_replay(agent, self.fresh(jax.random.key(0)), shape)


def ours(shape: Shape, replay: Replay, dtype: str, batch_size: int, number: int) -> Contender:
    """So many updates of this package's in one program, computed in one of DTYPES."""
    agent = convolutional_agent(shape, dtype, batch_size)
    draw = jax.jit(lambda state: jax.vmap(lambda counter: agent.draw(state, counter))(jnp.arange(number)))
    state = jax.eval_shape(replay.fresh, jax.random.key(0))
    shapes = state._replace(memory=jax.eval_shape(lambda: replay.memory)), jax.eval_shape(draw, state)
    update = jax.jit(lambda state, drawn: jax.lax.scan(agent.update, state, drawn), donate_argnums=0)
    begin = time.perf_counter()
    program = update.lower(*shapes).compile()
    compile_seconds = time.perf_counter() - begin

    def measure(seed: int) -> Done:
        state = replay.fresh(jax.random.key(seed))
        drawn = jax.block_until_ready(draw(state))
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(program(state._replace(memory=replay.memory), drawn))
        seconds = time.perf_counter() - begin
        replay.memory = state.memory  # The program has used up what it was given.
        return Done(int(state.step), int(state.updates), seconds)

    return Contender(measure, compile_seconds, footprint.num_bytes(replay.memory))


def convolutional_agent(shape: Shape, dtype: str, batch_size: int) -> Agent:
    """An agent with this network, computed in one of DTYPES, one-step targets, and a replay that keeps each frame once."""
    return dqn(
        (observation_space(shape), gymnasium.spaces.Discrete(shape.num_actions)),
        network=network_of(shape).clone(dtype=DTYPES[dtype]),
        batch_size=batch_size,
        capacity=shape.capacity,
        frames="stack_last",
        replay_start_size=batch_size,
        n_steps=OPTIONS.n_steps,
        tau=OPTIONS.tau,
    )


def full_replay(agent: Agent, state: AgentState, shape: Shape) -> Any:
    """A replay that FILLERS environments have filled, each with one endless episode; ``state`` has no replay and is used up."""
    seen, ones, columns = jnp.asarray(np.stack(observations(shape))), jnp.ones(FILLERS), jnp.arange(FILLERS)

    def add(i: Any, state: AgentState) -> AgentState:
        observation, successor = seen[(i + columns) % AHEAD], seen[(i + 1 + columns) % AHEAD]
        action = (i + columns) % shape.num_actions
        return agent.observe(state, Transition(observation, action.astype(jnp.int32), ones * (i % 7), ones, successor, ones > 1))

    empty = jax.jit(lambda key: agent.init(key, spaces.example(observation_space(shape), FILLERS)).memory)
    fill = jax.jit(lambda state: jax.lax.fori_loop(0, shape.capacity // FILLERS, add, state), donate_argnums=0)
    return jax.block_until_ready(fill(state._replace(memory=empty(state.key)))).memory


# PyTorch's.


def torch_device() -> str:
    """What PyTorch calls the kind of device on which JAX computes."""
    return {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def torch_obstacle() -> str:
    """Why PyTorch cannot be measured here, or nothing."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch_device() == "cpu" or (torch_device() == "cuda" and torch.cuda.is_available()):
        return ""
    return f"this torch ({torch.__version__}) does not find the device on which JAX computes, {jax.devices()[0]}"


class TorchReplay:
    """The same frames on PyTorch's device: FILLERS environments, each with one endless episode.

    Attributes:
      frames: uint8 ``[R, N, H, W]``, by row and environment.
      actions, rewards: ``[R, N]``.
    """

    def __init__(self, shape: Shape):
        import torch

        device, rows = torch_device(), shape.capacity // FILLERS
        newest = torch.from_numpy(np.stack([stack[:, :, -1] for stack in observations(shape)])).to(device)  # [AHEAD, H, W]
        row, column = torch.arange(rows, device=device)[:, None], torch.arange(FILLERS, device=device)
        self.frames = newest[(row + column) % AHEAD]
        self.actions = (row + column) % shape.num_actions
        self.rewards = (row % 7 + 0 * column).float()
        self.depth = shape.observation[2]

    def sample(self, batch_size: int) -> Any:
        """A uniform batch of whole stacks: observations ``[B, C, H, W]``, actions, rewards ``[B]``, successors, all on the device."""
        import torch

        device, (rows, columns) = self.frames.device, self.actions.shape
        row = torch.randint(self.depth - 1, rows - 1, (batch_size,), device=device)
        column = torch.randint(0, columns, (batch_size,), device=device)
        around = row[:, None] + torch.arange(1 - self.depth, 2, device=device)
        frames = self.frames[around, column[:, None]]  # [B, C + 1, H, W]
        return frames[:, :-1], self.actions[row, column], self.rewards[row, column], frames[:, 1:]


class TorchLearner:
    """The update in PyTorch, as ours is by OPTIONS.

    Args:
      shape: the network and what it sees.
      replay: to learn from.
      batch_size: transitions in a batch.
      in_bfloat16: whether networks compute under ``torch.autocast``.
    """

    def __init__(self, shape: Shape, replay: TorchReplay, batch_size: int, in_bfloat16: bool):
        import torch

        self.device = torch_device()
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")  # TensorFloat-32, as JAX; convolutions take it anyway.
        layout: Any = torch.channels_last
        self.online, self.target = (torch_network(shape).to(self.device, memory_format=layout) for _ in range(2))
        self.target.load_state_dict(self.online.state_dict())
        parameters = list(self.online.parameters())
        self.optimizer = torch.optim.Adam(parameters, lr=OPTIONS.learning_rate, fused=True, capturable=self.device == "cuda")
        self.replay, self.batch_size, self.in_bfloat16 = replay, batch_size, in_bfloat16

    def update(self) -> None:
        """One update, on a batch of its own drawing."""
        self.learn(*self.replay.sample(self.batch_size))

    def learn(self, frames: Any, action: Any, reward: Any, following: Any) -> Any:
        """One update on a batch as ``TorchReplay.sample`` gives it; returns the loss, a scalar tensor."""
        import torch
        from torch import nn

        with torch.autocast(self.device, torch.bfloat16, enabled=self.in_bfloat16):
            seen, then = self._images(frames), self._images(following)
            with torch.no_grad():
                best = self.online(then).argmax(1, keepdim=True)
                goal = reward + OPTIONS.gamma * self.target(then).gather(1, best).squeeze(1).float()  # [B]
            chosen = self.online(seen).gather(1, action[:, None]).squeeze(1).float()  # [B]
        loss = nn.functional.mse_loss(chosen, goal)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.online.parameters(), OPTIONS.max_grad_norm or float("inf"), foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), TAU)
        return loss.detach()

    def _images(self, frames: Any) -> Any:
        import torch

        wide = torch.bfloat16 if self.in_bfloat16 else torch.float32
        return (frames.to(wide) / 255).contiguous(memory_format=torch.channels_last)


def torch_contenders(shape: Shape, replay: TorchReplay, dtype: str, batch_size: int, number: int) -> dict[str, Contender]:
    """PyTorch in one of DTYPES, and on CUDA also as a graph. Compilation is the first updates and, of a graph, its capture."""

    def contender(as_graph: bool) -> Contender:
        return _torch_contender(TorchLearner(shape, replay, batch_size, dtype == "bfloat16"), number, as_graph)

    found = {f"PyTorch, {dtype}": contender(False)}
    if torch_device() == "cuda":
        found[f"PyTorch, a CUDA graph, {dtype}"] = contender(True)
    return found


def _torch_contender(learner: TorchLearner, number: int, as_graph: bool) -> Contender:
    import torch

    begin = time.perf_counter()
    update: Callable[[], None] = _captured(learner.update) if as_graph else learner.update
    for _ in range(WARM):
        update()
    _wait(learner.device)
    compile_seconds = time.perf_counter() - begin

    def measure(seed: int) -> Done:
        torch.manual_seed(seed)
        _wait(learner.device)
        begin = time.perf_counter()
        for _ in range(number):
            update()
        _wait(learner.device)
        return Done(0, number, time.perf_counter() - begin)

    replay = learner.replay
    return Contender(
        measure, compile_seconds, sum(one.numel() * one.element_size() for one in (replay.frames, replay.actions, replay.rewards))
    )


def _captured(update: Callable[[], None]) -> Callable[[], None]:
    """The update as a CUDA graph, after some calls on a stream of their own, as PyTorch asks for."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph.replay


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


# All together.


def measure(quick: bool = False, keep: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Everything, on the default backend.

    Args:
      quick: a little of everything.
      keep: is given what has been measured so far, after each batch size.

    Returns:
      As ``measure_sizes``.
    """
    return measure_sizes(sizes(jax.default_backend(), quick), keep)


def measure_sizes(chosen: Sizes, keep: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Everything, at these sizes.

    Args:
      chosen: how much.
      keep: is given what has been measured so far, after each batch size.

    Returns:
      ``device``; ``sizes``; ``left_out``: who and why; ``series`` as ``series.measure`` gives them.

    Raises:
      ValueError: if a batch is larger than what is learnt from.
      MemoryError: if the replay is larger than the device's memory.
    """
    group = Group("batch size", "updates per second", updates(SHAPES["Nature"], chosen))
    left_out = {"PyTorch": torch_obstacle()} if torch_obstacle() else {}
    return series.measure([group], {"device": str(jax.devices()[0]), "sizes": chosen._asdict(), "left_out": left_out}, keep)


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would leave PyTorch a quarter of an accelerator's memory.
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
        if importlib.util.find_spec("torch"):
            import torch

            torch.set_num_threads(1)
    series.run(measure, options.quick, options.out, inline=options.inline)


if __name__ == "__main__":
    report.command(main)
