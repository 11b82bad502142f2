"""A batch size in; time, extra memory, gradient error and bytes on the wire of the losses out, beside open_clip's.

Every implementation has processes of its own (one per rank), which live for the whole run and compute in turns: one
call of each, then the next round. A call is forward and backward, from unnormalised features to their gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING, Any, NoReturn

from clipdist.errors import UserError, run_main
from clipdist.losses.wire import BYTES, clipdist_bytes, open_clip_bytes, written_bytes
from clipdist.monitor.provenance import commit, hardware

if TYPE_CHECKING:
    import torch

EXAMPLES = """examples:
  python tools/bench/loss.py --n 2048 --d 512 --repeats 5
  python tools/bench/loss.py --n 2048 --dtype bf16 --device cpu --world 1 2 4 --out runs/bench_loss
  python tools/bench/loss.py --n 32768 --dtype bf16 --op infonce --impl kernel open_clip --json"""
OPS = ("infonce", "sigmoid")
IMPLS = ("tiles", "kernel", "open_clip")
OPEN_CLIP = {"infonce": "open_clip ClipLoss", "sigmoid": "open_clip SigLipLoss"}
MODEL_WORLDS = (2, 4, 8, 64, 512, 4096)
COSINE = 0.3  # of a pair, about: a loss well above 0, as in training
LOG_SCALE = {"infonce": math.log(1 / 0.07), "sigmoid": math.log(10)}  # where training starts, as the papers have it
BIAS = -10.0
# Pairs up to which gradients are compared with float64, whose cost grows like the loss' own.
ERROR_PAIRS = {"cpu": 16384, "cuda": 131072}
GRACE_S = 10  # for the other ranks to fail too, where one has


@dataclass(frozen=True)
class Job:
    """What one process computes: one rank of one implementation ("product": the bare matrix product)."""

    impl: str
    ops: tuple[str, ...]
    n: int
    d: int
    dtype: str
    device: str
    threads: int
    folder: Path
    rank: int = 0
    world: int = 1

    @property
    def label(self) -> str:
        return OPEN_CLIP[self.ops[0]] if self.impl == "open_clip" else f"clipdist {self.impl}"


@dataclass(frozen=True)
class Step:
    """One forward and backward, as one rank saw it. None: cannot be measured here."""

    time_s: float
    extra_bytes: int | None
    wire_bytes: int | None


@dataclass
class Row:
    """One line of the result; a crew's steps end up here."""

    job: Job
    steps: list[list[Step]] = field(default_factory=list)
    grad_error: float | None = None
    note: str = ""
    fault: bool = False

    def most(self, name: str, of: Callable[[list[Any]], Any]) -> Any:
        """Of every round the rank with the most, and over the rounds what `of` makes of it; None: not measured."""
        rounds = [[getattr(step, name) for step in ranks] for ranks in self.steps]
        there = rounds and not any(None in ranks for ranks in rounds)
        return of([max(ranks) for ranks in rounds]) if there else None

    def fail(self, failed: Failed) -> None:
        self.note, self.steps = str(failed), []
        self.fault = not failed.user and self.job.impl != "open_clip"

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "impl": job.label,
            "op": job.ops[0],
            "n": job.n,
            "d": job.d,
            "dtype": job.dtype,
            "world": job.world,
            "time_s": self.most("time_s", statistics.median),
            "extra_bytes": self.most("extra_bytes", max),
            "grad_error": self.grad_error,
            "wire_bytes": self.most("wire_bytes", statistics.median) if job.world > 1 else None,
        }


def main() -> int:
    args = parse_args()
    check(args)
    rows: list[Row] = []
    units: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        product = Job("product", tuple(args.op), args.n, args.d, args.dtype, args.device, threads(1), Path(folder))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["clipdist.losses.infonce", "clipdist.losses.sigmoid", "tools.bench.peers.losses"]
        )
        with crew(context, product) as unit:
            say("float64 gradients to compare with")
            unit.ask("prepare")
            for world in args.world:
                jobs = [
                    replace(product, impl=impl, ops=(op,), world=world, threads=threads(world))
                    for op in args.op
                    for impl in args.impl
                ]
                measured = measure(context, jobs, unit, args.repeats)
                rows += measured[0]
                units += measured[1]
    unit_s = statistics.median(units)
    text = report(args, rows, unit_s)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "table.md").write_text(text)
        plot(args, rows, args.out / "plot.png")
    if args.json:
        print(json.dumps({"rows": [row.as_json() for row in rows], "unit_s": unit_s, "notes": notes(args, rows)}))
    return 1 if any(row.fault for row in rows) else 0


def measure(context: ForkServerContext, jobs: list[Job], unit: Crew, repeats: int) -> tuple[list[Row], list[float]]:
    """Rows of one world size, and the seconds that a product took in each round."""
    with contextlib.ExitStack() as crews:
        rows = [(Row(job), crews.enter_context(crew(context, job))) for job in jobs]
        for row, ranks in rows:
            say(f"W={row.job.world} {row.job.ops[0]}, {row.job.label}: first call")
            prepare(row, ranks)
        units = []
        for _ in range(repeats):
            for row, ranks in rows:
                if not row.note:
                    step(row, ranks)
            units.append(unit.ask("step")[0].time_s)
    return [row for row, _ in rows], units


def prepare(row: Row, ranks: Crew) -> None:
    try:
        replies = ranks.ask("prepare")
    except Failed as failed:
        row.fail(failed)
        return
    error = math.sqrt(sum(off for off, _ in replies) / sum(whole for _, whole in replies))
    if math.isfinite(error):
        row.grad_error = error
    else:
        row.fail(Failed("its gradients are not finite"))


def step(row: Row, ranks: Crew) -> None:
    try:
        row.steps.append(ranks.ask("step"))
    except Failed as failed:
        row.fail(failed)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The processes, from outside: a crew is the ranks of one implementation.


class Failed(Exception):
    """An implementation does not run: one line. `user`: it said so itself, rather than broke."""

    def __init__(self, text: str, user: bool = False) -> None:
        super().__init__(" ".join(text.split())[:300])
        self.user = user


class Crew:
    """The ranks of one implementation, and a pipe to each."""

    def __init__(self, context: ForkServerContext, job: Job) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(job.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, replace(job, rank=rank)))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, command: str) -> list[Any]:
        """One command to all ranks; their answers, by rank.

        Raises:
            Failed: one of them did not do it. The crew is gone then.
        """
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # heard of below
                pipe.send(command)
        answers: dict[int, Any] = {}
        failures: list[Failed] = []
        while len(answers) < len(self.pipes):
            ready = wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers], GRACE_S)
            if failures and not ready:
                break  # the others wait in a collective for the one that failed
            for rank, pipe in enumerate(self.pipes):
                if pipe in ready:
                    kind, answers[rank] = self.answer(rank)
                    if kind != "done":
                        failures.append(Failed(answers[rank], user=kind == "user"))
        if failures:
            self.end(grace_s=0)
            raise failures[0]
        return [answers[rank] for rank in range(len(self.pipes))]

    def answer(self, rank: int) -> tuple[str, Any]:
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE_S)
            code = self.processes[rank].exitcode
            return "fault", f"a process ended, exit code {code}{' (out of memory?)' * (code == -signal.SIGKILL)}"

    def end(self, grace_s: float = GRACE_S) -> None:
        for pipe in self.pipes:
            pipe.close()  # a process that waits for a command ends by itself
        for process in self.processes:
            process.join(grace_s)
            process.kill()
            process.join()


@contextlib.contextmanager
def crew(context: ForkServerContext, job: Job) -> Iterator[Crew]:
    ranks = Crew(context, job)
    try:
        yield ranks
    except BaseException:
        ranks.end(grace_s=0)
        raise
    ranks.end()


# The processes, from inside.


def serve(pipe: Connection, job: Job) -> None:
    """Answers commands until the other end is closed: ("done", result), ("user", line) or ("fault", line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    worker: Product | Rank | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            command = pipe.recv()
            try:
                worker = worker or (Product(job) if job.impl == "product" else Rank(job))
                pipe.send(("done", worker.prepare() if command == "prepare" else worker.step()))
            except UserError as error:
                pipe.send(("user", str(error)))
            except Exception as error:
                if job.impl != "open_clip":
                    traceback.print_exc()
                pipe.send(("fault", f"{type(error).__name__}: {error}"))


class Rank:
    """One rank of one implementation: its features, and the loss on them."""

    def __init__(self, job: Job) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(job.threads)
        self.job, self.op = job, job.ops[0]
        if job.world > 1:
            if "lo" in (name for _, name in socket.if_nameindex()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = dist.FileStore(str(job.folder / f"{job.impl}-{self.op}-{job.world}"), job.world)
            dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world)
        # fp16 gradients of a mean over n pairs would vanish; training scales its loss for the same reason.
        self.loss_scale = job.n if job.dtype == "fp16" else 1
        self.features = self.own_features(job.n)
        self.loss = loss_function(job)
        self.log_scale = torch.tensor([LOG_SCALE[self.op]], device=job.device, requires_grad=True)
        self.bias = torch.tensor([BIAS], device=job.device, requires_grad=True)

    def own_features(self, n: int) -> list[torch.Tensor]:
        b = n // self.job.world
        rows = slice(self.job.rank * b, (self.job.rank + 1) * b)
        return [side[rows].clone().requires_grad_() for side in features(replace(self.job, n=n))]

    def prepare(self) -> tuple[float, float]:
        """The first call at this size; squared norms of the gradients' error and of the float64 gradients, own rows."""
        import torch

        n = error_pairs(self.job)
        self.call(self.features)
        own = self.features if n == self.job.n else self.own_features(n)
        if own is not self.features:
            self.call(own)
        whole = torch.load(self.job.folder / f"{self.op}.pt", map_location=self.job.device)
        b = n // self.job.world
        off, norm = 0.0, 0.0
        for mine, exact in zip(own, whole):
            assert mine.grad is not None
            true = exact[self.job.rank * b : (self.job.rank + 1) * b]
            found = mine.grad.double() / (self.loss_scale * self.job.world)
            off += float((found - true).square().sum())
            norm += float(true.square().sum())
        return off, norm

    def step(self) -> Step:
        import torch.distributed as dist

        self.release()
        if self.job.device == "cuda":  # what other processes need was given back: refill the allocator's cache
            self.call(self.features)
            self.forget()
        if self.job.world > 1:
            dist.barrier()
        sent = written_bytes() if self.job.world > 1 else None
        peak = PeakMemory(self.job.device)
        began = time.perf_counter()
        self.call(self.features)
        synchronize(self.job.device)
        time_s = time.perf_counter() - began
        extra = peak.growth()
        step = Step(time_s, extra, None if sent is None else written_bytes() - sent)
        self.release()
        return step

    def call(self, own: list[torch.Tensor]) -> None:
        value = self.loss(*own, self.log_scale, self.bias)
        (value * self.loss_scale).backward()

    def forget(self) -> None:
        for leaf in (*self.features, self.log_scale, self.bias):
            leaf.grad = None

    def release(self) -> None:
        """Gives back what the last call left, so that the next one starts from the state of a first one."""
        self.forget()
        give_back_memory(self.job.device)


class Product:
    """One n x n x d product in the features' dtype: the unit of time; and the float64 gradients to compare with."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.threads)
        self.job = job
        self.images, self.texts = features(job)
        rows = min(job.n, max(1, (1 << 26) // job.n))
        self.space = torch.empty(rows, job.n, dtype=self.images.dtype, device=job.device)
        self.rows = rows

    def prepare(self) -> None:
        import torch

        n = error_pairs(self.job)
        images, texts = (side.double() for side in features(replace(self.job, n=n)))
        for op in self.job.ops:
            torch.save(exact_gradients(op, images, texts), self.job.folder / f"{op}.pt")
        self.step()

    def step(self) -> Step:
        import torch

        synchronize(self.job.device)
        began = time.perf_counter()
        for start in range(0, self.job.n, self.rows):
            part = self.images[start : start + self.rows]
            torch.mm(part, self.texts.T, out=self.space[: len(part)])
        synchronize(self.job.device)
        return Step(time.perf_counter() - began, None, None)


def features(job: Job) -> list[torch.Tensor]:
    """[n, d] pictures and texts, unnormalised, the same in every process."""
    import torch

    draw = torch.Generator().manual_seed(7)
    images = torch.randn(job.n, job.d, generator=draw)
    texts = torch.randn(job.n, job.d, generator=draw).mul_(math.sqrt(1 - COSINE**2)).add_(images, alpha=COSINE)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job.dtype]
    return [side.to(job.device, dtype) for side in (images, texts)]


def loss_function(job: Job) -> Callable[..., torch.Tensor]:
    """(images, texts, log scale, bias) to a scalar whose mean over ranks is the global loss."""
    if job.impl == "open_clip":
        from tools.bench.peers import losses as peers

        if job.ops[0] == "infonce":
            return lambda x, y, t, bias: peers.clip_loss(x, y, t, rank=job.rank, world=job.world)
        return lambda x, y, t, bias: peers.siglip_loss(x, y, t, bias, rank=job.rank, world=job.world)
    from clipdist.losses.infonce import info_nce
    from clipdist.losses.sigmoid import sigmoid_loss

    loss = info_nce if job.ops[0] == "infonce" else sigmoid_loss
    return lambda x, y, t, bias: loss(x, y, t, bias, implementation=job.impl)[0]


def exact_gradients(op: str, images: torch.Tensor, texts: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the global loss towards float64 features [n, d], a block of rows at a time."""
    import torch

    n, scale = len(images), math.exp(LOG_SCALE[op])
    x, y = (side / side.norm(dim=1, keepdim=True) for side in (images, texts))
    blocks = [slice(i, min(i + 512, n)) for i in range(0, n, 512)]
    row_lse, column_lse = x.new_empty(n), x.new_full((n,), -torch.inf)
    if op == "infonce":
        for rows in blocks:
            s = scale * x[rows] @ y.T
            row_lse[rows] = s.logsumexp(1)
            column_lse = torch.logaddexp(column_lse, s.logsumexp(0))
    x_grad, y_grad = torch.empty_like(x), torch.zeros_like(y)
    for rows in blocks:
        s = scale * x[rows] @ y.T
        if op == "infonce":
            slope = ((s - row_lse[rows, None]).exp() + (s - column_lse).exp()) / 2
        else:
            slope = (s + BIAS).sigmoid()
        x_grad[rows] = slope @ y
        y_grad += slope.T @ x[rows]
    found = []
    for raw, unit, other, grad in ((images, x, y, x_grad), (texts, y, x, y_grad)):
        grad = (grad - other) * (scale / n)
        grad -= (grad * unit).sum(1, keepdim=True) * unit
        found.append(grad / raw.norm(dim=1, keepdim=True))
    return found


def error_pairs(job: Job) -> int:
    return min(job.n, ERROR_PAIRS[job.device])


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def give_back_memory(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class PeakMemory:
    """How far memory in use grows from here on: resident memory on a CPU (Linux), the allocator's on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start: int | None = None
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):  # a kernel without clear_refs: not measured
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
            self.start = resident_bytes("VmRSS")

    def growth(self) -> int | None:
        if self.start is None:
            return None
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() - self.start
        return max(0, resident_bytes("VmHWM") - self.start)


def resident_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


# What is printed and written.


def report(args: argparse.Namespace, rows: list[Row], unit_s: float) -> str:
    lines = [
        f"# Losses, forward and backward: n={args.n}, d={args.d}, {args.dtype}, {args.device}",
        "",
        f"    python tools/bench/loss.py {shlex.join(sys.argv[1:])}",
        "",
        *environment(args.device),
        f"- median of {args.repeats} rounds, in each of which every implementation ran once; memory is the largest",
        f"- 1 unit: one {args.n} x {args.n} x {args.d} product in {args.dtype} in one process, {unit_s:.4g} s",
        "- W: processes on this machine over gloo; time and memory are those of the rank that needs most",
        "",
        "| op | implementation | W | time, s | units | time / open_clip's | extra MiB | memory / open_clip's "
        "| gradient error | sent, MB per rank |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        r, peer = row.as_json(), peer_of(row, rows)
        time_s, extra = r["time_s"], r["extra_bytes"]
        cells = [
            shown(time_s, ".4g"),
            shown(divided(time_s, unit_s), ".2f"),
            shown(divided(time_s, peer["time_s"]), ".2f"),
            shown(divided(extra, 1 << 20), ".1f"),
            shown(divided(extra, peer["extra_bytes"]), ".3f"),
            shown(r["grad_error"], ".1e"),
            shown(divided(r["wire_bytes"], 1e6), ".3f"),
        ]
        lines.append(f"| {r['op']} | {r['impl']} | {r['world']} | {' | '.join(cells)} |")
    lines += ["", *(f"- {note}" for note in notes(args, rows)), "", *wire_table(args, rows)]
    return "\n".join(lines) + "\n"


def notes(args: argparse.Namespace, rows: list[Row]) -> list[str]:
    found = [f"W={row.job.world} {row.job.ops[0]}, {row.job.label}: {row.note}" for row in rows if row.note]
    compared = error_pairs(rows[0].job)
    if compared < args.n:
        found.append(f"gradient error: at n={compared}, against float64")
    if args.device == "cpu" and args.dtype != "fp32":
        found.append(
            f"a CPU without {args.dtype} arithmetic is slow at it: open_clip and the unit multiply in {args.dtype}, "
            "clipdist in fp32; these times say nothing of a GPU"
        )
    if args.dtype == "fp16":
        found.append("fp16: the loss is scaled by n before backward, the gradients are scaled back")
    return found


def wire_table(args: argparse.Namespace, rows: list[Row]) -> list[str]:
    """The model for many world sizes at this global batch, and what was measured beside it."""
    lines = [
        f"Sent per rank and step, MB: the model of clipdist.losses.wire for each W that divides n={args.n}; measured:",
        "",
        "| op | W | pairs per rank | clipdist | open_clip | ratio | measured: clipdist | open_clip | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for op in args.op:
        for world in sorted({*MODEL_WORLDS, *args.world} - {1}):
            if args.n % world:
                continue
            b = args.n // world
            ours, theirs = (model(op, world, b, args.d, args.dtype) for model in (clipdist_bytes, open_clip_bytes))
            of_world = [row for row in rows if row.job.world == world and row.job.ops[0] == op]
            own = next((row.as_json()["wire_bytes"] for row in of_world if row.job.impl != "open_clip"), None)
            peer = next((row.as_json()["wire_bytes"] for row in of_world if row.job.impl == "open_clip"), None)
            measured = [shown(divided(x, 1e6), ".3f") for x in (own, peer)] + [shown(divided(own, peer), ".3f")]
            lines.append(
                f"| {op} | {world} | {b} | {ours / 1e6:.3f} | {theirs / 1e6:.3f} | {ours / theirs:.3f} "
                f"| {' | '.join(measured)} |"
            )
    return lines


def peer_of(row: Row, rows: list[Row]) -> dict[str, Any]:
    """open_clip's row of the same op and world; nothing in it where there is none."""
    same = [r for r in rows if (r.job.impl, r.job.ops, r.job.world) == ("open_clip", row.job.ops, row.job.world)]
    return same[0].as_json() if same else {"time_s": None, "extra_bytes": None}


def divided(x: float | None, y: float | None) -> float | None:
    return None if x is None or not y else x / y


def shown(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def environment(device: str) -> list[str]:
    import torch

    return [
        f"- commit {commit()}, torch {torch.__version__}, Python {platform.python_version()}",
        f"- {hardware(device, threads(1))}",
    ]


def plot(args: argparse.Namespace, rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = [row.as_json() for row in rows if row.steps]
    figure, axes = plt.subplots(1, 3, figsize=(15, 1.8 + max(2.4, 0.3 * len(found))), layout="constrained")
    names = [f"{r['impl']}\n{r['op']}, W={r['world']}" for r in found]
    colours = ["tab:gray" if r["impl"].startswith("open_clip") else "tab:blue" for r in found]
    for axis, key, unit, title in ((axes[0], "time_s", 1, "time, s"), (axes[1], "extra_bytes", 1 << 20, "extra MiB")):
        values = [(r[key] or 0) / unit for r in found]
        axis.bar_label(axis.barh(range(len(found)), values, color=colours), fmt="%.3g", fontsize=7, padding=2)
        axis.set_yticks(range(len(found)), names, fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title)
    worlds = [world for world in sorted({*MODEL_WORLDS, *args.world} - {1}) if args.n % world == 0]
    for op, line in zip(args.op, ("-", "--")):
        for name, model, colour in (
            ("clipdist", clipdist_bytes, "tab:blue"),
            ("open_clip", open_clip_bytes, "tab:gray"),
        ):
            sent = [model(op, world, args.n // world, args.d, args.dtype) / 1e6 for world in worlds]
            axes[2].plot(worlds, sent, line, color=colour, label=f"{name}, {op}: model")
    for r, colour in zip(found, colours):
        if r["wire_bytes"] is not None:
            axes[2].plot(r["world"], r["wire_bytes"] / 1e6, "o" if r["op"] == "infonce" else "s", color=colour)
    axes[2].set_xscale("log", base=2)
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel("W")
    axes[2].set_title("sent per rank and step, MB (marks: measured)")
    if worlds:
        axes[2].legend(fontsize=7)
    figure.suptitle(f"n={args.n}, d={args.d}, {args.dtype}, {args.device}")
    figure.savefig(path, dpi=120)


# The command line.


def threads(world: int) -> int:
    """Per rank: the cores that this process may use, or OMP_NUM_THREADS, shared among the ranks."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(allowed) if allowed.isdigit() else len(os.sched_getaffinity(0))) // world)


def check(args: argparse.Namespace) -> None:
    """Resolves the device and the implementations, and refuses what cannot be measured, before anything starts.

    Raises:
        UserError: as it says.
    """
    for name in ("n", "d", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name, given, known in (("dtype", [args.dtype], BYTES), ("op", args.op, OPS), ("impl", args.impl or [], IMPLS)):
        unknown = [word for word in given if word not in known]
        if unknown:
            raise UserError(f"--{name} {unknown[0]}: choose from {', '.join(known)}")
    args.op, args.world = list(dict.fromkeys(args.op)), sorted(set(args.world))
    if args.world[0] < 1 or args.n % math.lcm(*args.world):
        raise UserError(f"--world {shlex.join(map(str, args.world))}: each must divide n={args.n}")
    if args.out and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--out draws a plot with matplotlib, which is not installed: pip install matplotlib")
    triton = importlib.util.find_spec("triton") is not None
    if "kernel" in (args.impl or []) and (args.device == "cpu" or not triton):
        raise UserError("--impl kernel: needs a CUDA device and Triton")
    from clipdist.distributed.rank import resolve_device

    args.device = resolve_device(args.device)
    if args.device == "cuda" and args.world[-1] > 1:
        raise UserError(f"--world {args.world[-1]}: more ranks than one are processes on a CPU; add --device cpu")
    fused = triton and args.device == "cuda"
    if "kernel" in (args.impl or []) and not fused:
        raise UserError("--impl kernel: needs a CUDA device, and torch sees none")
    args.impl = list(dict.fromkeys(args.impl or [impl for impl in IMPLS if impl != "kernel" or fused]))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says more)")


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Times the losses, forward and backward, beside open_clip's: seconds, extra memory, gradient\n"
        "error against float64, and, with several ranks over gloo on this machine, bytes on the wire.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=4096, help="pairs of the global batch (4096)")
    parser.add_argument("--d", type=int, default=512, help="features (512)")
    parser.add_argument("--dtype", default="fp32", help="of the features: fp32, bf16 or fp16 (fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--world", type=int, nargs="+", default=[1], metavar="W", help="numbers of ranks (1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="rounds over all implementations (5)")
    parser.add_argument("--op", nargs="+", default=list(OPS), metavar="OP", help="infonce, sigmoid (both)")
    parser.add_argument("--impl", nargs="+", metavar="IMPL", help=f"{', '.join(IMPLS)} (all that run here)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write table.md and plot.png (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
