"""Run named accidents on whole runs of two ranks. Print one JSON line {name, ok, detail} for each.

    python tests/dist/accidents.py SHARDS FOLDER [NAME ...]        SHARDS: as conftest.py makes them; FOLDER: for runs

Every scenario that goes on after an accident is compared with a run that had none.
"""

from __future__ import annotations

import os

# Processes with threads cannot be forked safely: see rehearsal.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import importlib
import json
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rehearsal import Attempt, Failed, Point, attempt, differences, expect, history, records, warm_up

from clipdist.checkpoint.format import MANIFEST, checkpoint_dir, list_checkpoints
from clipdist.checkpoint.reader import CheckpointReader

STEPS = 12
KILLED = -signal.SIGKILL

Prepare = Callable[[int], None]


@dataclass(frozen=True)
class Theatre:
    """Where scenarios run.

    Attributes:
        shards: with train/ and val/.
        root: of the runs.
    """

    shards: Path
    root: Path

    def words(self, name: str, settings: dict[str, object]) -> list[str]:
        given = {
            "run.root": self.root,
            "run.name": name,
            "data.train": self.shards / "train",
            "data.val": "",
            "engine.zero_stage": 2,
            "train.steps": STEPS,
            "train.save_every": 3,
            "guard.window": 10,
            "train.hang_s": 60,
            **settings,
        }
        return ["--config", "configs/tiny.yaml", *(f"{key}={value}" for key, value in given.items())]

    def start(
        self,
        name: str,
        codes: list[int],
        settings: dict[str, object] | None = None,
        prepare: Iterable[Prepare] = (),
        during: Callable[[list[int], float], None] | None = None,
        in_time: bool = True,
    ) -> Attempt:
        """One start of run `name`, which must end with these exit codes and tell no traceback.

        Args:
            in_time: every checkpoint is written before the next step, so that none is put off.
        """
        parts = (speak_soon, *((saves_in_time,) if in_time else ()), *prepare)

        def all_parts(rank: int) -> None:
            for part in parts:
                part(rank)

        words = self.words(name, settings or {})
        ended = attempt(words, 2, self.log(name), prepare=all_parts, during=during, limit_s=120)
        expect(ended, codes, name)
        need("Traceback" not in ended.log, f"{name}: a traceback", ended)
        return ended

    def run(self, name: str) -> Path:
        return self.root / name

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def whole(self) -> Path:
        """The run of STEPS steps that nothing happens to, with all its checkpoints."""
        if not self.run("whole").exists():
            self.start("whole", [0, 0], {"train.keep": 100, "train.resume": "never"})
        return self.run("whole")

    def goes_on(self, name: str, settings: dict[str, object] | None = None, whole: Path | None = None) -> Attempt:
        """The same command again finishes, and ends as the undisturbed run."""
        ended = self.start(name, [0, 0], settings)
        self.same(name, whole)
        return ended

    def same(self, name: str, whole: Path | None = None) -> None:
        different = differences(self.run(name), whole or self.whole())
        need(not different, different)


def need(right: bool, what: str, ended: Attempt | None = None) -> None:
    """Raises Failed where something is not as it must be."""
    if not right:
        raise Failed(what + (f"\n{ended.log}" if ended else ""))


def need_lines(ended: Attempt, *parts: str) -> None:
    for part in parts:
        need(part in ended.log, f"the log lacks {part!r}", ended)


def need_error(ended: Attempt, *parts: str) -> None:
    """Each rank tells the error once at most (a launcher ends the others before they do), and all tell the same."""
    told = [line for line in ended.log.splitlines() if line.startswith("error")]
    need(1 <= len(told) <= 2 and told[0].startswith("error: "), f"{len(told)} lines of errors", ended)
    need(len(told) == 1 or told[1].startswith("error (rank 1): "), "rank 0 tells two errors", ended)
    for line in told:
        for part in parts:
            need(part in line, f"an error lacks {part!r}: {line}", ended)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("event") == name]


def steps_kept(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run)]


# Accidents: what `prepare` does to a rank's process before it trains


def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """In place of the real one, in a rank's process."""
    setattr(owner, name, function)


def speak_soon(rank: int) -> None:
    """There is no launcher here that ends the other ranks while they wait for rank 0's error."""
    for module in ("clipdist.errors", "clipdist.fault_tolerance.watchdog"):
        importlib.import_module(module).RANK_0_FIRST_S = 0.3  # type: ignore[attr-defined]


def saves_in_time(rank: int) -> None:
    from clipdist.data.loader import Loader

    real = Loader.next

    def load(loader: Loader, interrupted: Any = None) -> Any:
        wait_for_writer()
        return real(loader, interrupted)

    put(Loader, "next", load)


def before_batch(position: int, act: Callable[[], object], *ranks: int) -> Prepare:
    """Acts before a rank is given a batch; `ranks`: which ones, all where none is named."""

    def prepare(rank: int) -> None:
        from clipdist.data.loader import Loader

        real = Loader.next

        def load(loader: Loader, interrupted: Any = None) -> Any:
            if loader.position == position and (rank in ranks or not ranks):
                act()
            return real(loader, interrupted)

        put(Loader, "next", load)

    return prepare


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def poisoned(nan: set[int], spikes: Iterable[int] = ()) -> Prepare:
    """Rank 1's loss of some data steps is nan, or a thousandfold."""

    def prepare(rank: int) -> None:
        from clipdist.engine.step import Engine

        real = Engine._forward_whole

        def whole(engine: Engine, batch: Any, step: int, *rest: Any) -> Any:
            done = real(engine, batch, step, *rest)
            factor = float("nan") if step in nan else 1000.0 if step in spikes else 1.0
            return replace(done, value=done.value * factor) if rank == 1 else done

        put(Engine, "_forward_whole", whole)

    return prepare


def trainers_told(rank: int) -> None:
    """Rank 0 tells, whenever a trainer is to be built, what lives of those before, and which checkpoints there are."""
    from clipdist.trainer import Trainer

    real = Trainer.__init__
    parts: list[weakref.ref[Any]] = []

    def build(trainer: Trainer, config: Any, *more: Any) -> None:
        if rank == 0:
            there = sorted(path.name for path in (config.run.dir / "checkpoints").iterdir())
            print("trainer:", json.dumps([sum(part() is not None for part in parts), there]), flush=True)
        real(trainer, config, *more)
        held = trainer.engine.zero._deepspeed
        parts.extend(weakref.ref(part) for part in (held, held.optimizer, held.module, *held.module.parameters()))

    put(Trainer, "__init__", build)


def told_trainers(ended: Attempt) -> list[list[Any]]:
    """Of every trainer that was built: [parts of earlier engines that are alive, folders of checkpoints]."""
    lines = ended.log.splitlines()
    return [json.loads(line.removeprefix("trainer: ")) for line in lines if line.startswith("trainer: ")]


def nothing_stays_open(rank: int) -> None:
    """Shards are opened anew for every read, so that a folder that is renamed away is missed."""
    from clipdist.data.reader import Reader

    real = Reader.__init__

    def build(reader: Reader, *given: Any, **named: Any) -> None:
        real(reader, *given, **named)
        reader.max_open = 0

    put(Reader, "__init__", build)


def disk_full(step: int, *ranks: int) -> Prepare:
    """Nothing can be opened for writing in one step's checkpoint."""

    def prepare(rank: int) -> None:
        from clipdist.checkpoint import writer as checkpoint

        def refuse(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if f"step-{step:08d}" in str(path) and mode[0] in "wax":
                raise OSError(28, "No space left on device", str(path))
            return open(path, mode, *more, **named)

        if rank in ranks:
            put(checkpoint, "open", refuse)

    return prepare


def metrics_refused(step: int) -> Prepare:
    """The disk has no room for the metrics of one step."""

    def prepare(rank: int) -> None:
        from clipdist.monitor import metrics

        real = metrics._append

        def append(path: Path, line: bytes) -> None:
            record = json.loads(line)
            if (record["type"], record["step"]) == ("train", step):
                raise OSError(28, "No space left on device", str(path))
            real(path, line)

        put(metrics, "_append", append)

    return prepare


def slow_disk(seconds: float, *ranks: int) -> Prepare:
    def prepare(rank: int) -> None:
        from clipdist.checkpoint import writer as checkpoint

        real = checkpoint._write_safetensors

        def write(*given: Any) -> Any:
            time.sleep(seconds)
            return real(*given)

        if rank in ranks:
            put(checkpoint, "_write_safetensors", write)

    return prepare


def die_after_writing() -> None:
    wait_for_writer()
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_writer() -> None:
    """Until this rank's part of a checkpoint is on disk."""
    import threading

    from clipdist.checkpoint.saver import WRITER

    while any(thread.name == WRITER for thread in threading.enumerate()):
        time.sleep(0.01)


# Scenarios


def rollback(theatre: Theatre) -> None:
    """Numbers that do not recover: back to a checkpoint, over the range, to the end; killed on the way, too."""
    settings: dict[str, object] = {"train.steps": 20, "train.save_every": 2, "guard.patience": 2}
    poison = poisoned({13, 15, 16}, spikes={14})
    by_hand = theatre.run("rollback-by-hand")
    by_hand.mkdir()
    (by_hand / "skipped.json").write_text('[{"first": 13, "end": 16}]')
    theatre.start(by_hand.name, [0, 0], settings, [poison])
    need(sorted(history(by_hand)) == [*range(1, 14), 18, 19, 20], f"steps {sorted(history(by_hand))}")

    ended = theatre.start("rollback", [0, 0], settings, [poison, trainers_told])
    run = theatre.run("rollback")
    need_ranges(run, [(13, 16)])
    (told,) = events(run, "rollback")
    need((told["first"], told["end"]) == (13, 16) and "not finite" in told["reason"], f"event {told}")
    (before, _), (alive, there) = told_trainers(ended)
    need(before == 0 and alive == 0, "the first trainer's engine lives on beside the second's", ended)
    aside = [name for name in there if name.startswith("rolled-back-")]
    need(max(set(there) - set(aside)) == "step-00000012" and "rolled-back-step-00000014" in aside, f"folders {there}")
    need(not list(run.glob("checkpoints/rolled-back-*")), "what was set aside stays for ever")
    need_lines(ended, "data steps 13 to 15: ", "going back to the checkpoint before")
    theatre.same("rollback", by_hand)

    for module, function in (
        ("clipdist.fault_tolerance.rollback", "set_aside"),
        ("clipdist.resume", "record_rollback"),
    ):
        point = Point(function, module, function, rank=0, call=1, after=True)
        theatre.start("rollback-killed", [KILLED, 1], settings, [poison, point.lay])
        kept = steps_kept(theatre.run("rollback-killed"))
        need(kept[-1] == 12, f"killed after {function}: checkpoints {kept}")
    theatre.start("rollback-killed", [0, 0], settings, [poison])
    need_ranges(theatre.run("rollback-killed"), [(13, 16)])
    theatre.same("rollback-killed", by_hand)


def need_ranges(run: Path, ranges: list[tuple[int, int]]) -> None:
    found = [(record["first"], record["end"]) for record in json.loads((run / "skipped.json").read_text())]
    need(found == ranges, f"{run.name}: skipped.json holds {found}")


def rollbacks_spent(theatre: Theatre) -> None:
    settings: dict[str, object] = {
        "train.steps": 24,
        "train.save_every": 2,
        "guard.patience": 2,
        "guard.rollbacks": 1,
    }
    ended = theatre.start("spent", [1, 1], settings, [poisoned({13, 14, 15, 18, 19, 20})])
    need_error(
        ended,
        "data steps 18 to 20: the loss is not finite: nan",
        "went back to a checkpoint already (guard.rollbacks=1)",
    )
    (fault,) = events(theatre.run("spent"), "fault")
    need("data steps 18 to 20" in fault["error"], f"event {fault}")


def data_away_for_long(theatre: Theatre) -> None:
    """All ranks save and end; with the data back the same command goes on."""
    train, away, settings = own_data(theatre, "long", retry_s=1)
    leave = before_batch(5, lambda: train.rename(away), 0)
    ended = theatre.start("long", [1, 1], settings, [nothing_stays_open, leave])
    need_error(ended, f"{train}/0000", "cannot be read, tried for 1 s (data.retry_s)", "the same command goes on")
    step = steps_kept(theatre.run("long"))[-1]
    need(step in (5, 6) and f"the checkpoint of step {step} was written" in ended.log, f"checkpoint {step}", ended)
    need(len(events(theatre.run("long"), "fault")) == 1, "no event fault")
    away.rename(train)
    theatre.goes_on("long", settings)


def data_away_for_a_moment(theatre: Theatre) -> None:
    train, away, settings = own_data(theatre, "moment", retry_s=60)

    def bring_back(pids: list[int], seconds: float) -> None:
        if away.exists() and "cannot be read" in theatre.log("moment").read_text():
            away.rename(train)

    leave = before_batch(5, lambda: train.rename(away), 0)
    ended = theatre.start("moment", [0, 0], settings, [nothing_stays_open, leave], bring_back)
    need_lines(ended, "tried again for 60 s", "can be read again after")
    theatre.same("moment")


def own_data(theatre: Theatre, name: str, retry_s: float) -> tuple[Path, Path, dict[str, object]]:
    """A copy of the training shards, where it goes to, and settings that make every batch wait for it."""
    train = theatre.root / f"{name}-data" / "train"
    shutil.copytree(theatre.shards / "train", train)
    settings: dict[str, object] = {"data.train": train, "data.retry_s": retry_s, "data.prefetch": 1}
    return train, train.with_name("away"), settings


def stopped_while_data_is_missing(theatre: Theatre) -> None:
    """One rank waits for its data, the other one for that rank."""
    sent: list[float] = []

    def lose_data(rank: int) -> None:
        from clipdist.data.reader import Reader

        def lose() -> None:
            def missing(reader: Reader, shard: int) -> int:
                raise FileNotFoundError(2, "No such file or directory", "shard")

            put(Reader, "_open_shard", missing)

        before_batch(5, lose, 1)(rank)

    def stop(pids: list[int], seconds: float) -> None:
        if not sent and "cannot be read" in theatre.log("missing").read_text():
            sent.append(time.monotonic())
            for pid in pids:
                os.kill(pid, signal.SIGTERM)

    settings: dict[str, object] = {"data.retry_s": 300, "data.prefetch": 1}
    ended = theatre.start("missing", [75, 75], settings, [nothing_stays_open, lose_data], stop)
    seconds = time.monotonic() - sent[0]
    need(seconds < 10, f"{seconds:.1f} s from the signal to the end", ended)
    need_lines(ended, "SIGTERM: writing a checkpoint at step 5", "interrupted at step 5", "go on with:")
    theatre.goes_on("missing")


def one_rank_is_warned(theatre: Theatre) -> None:
    ended = theatre.start("warned", [75, 75], prepare=[before_batch(5, signal_self(signal.SIGUSR2), 1)])
    need_lines(ended, "SIGUSR2: writing a checkpoint", "checkpoint written; go on with:")
    (told,) = events(theatre.run("warned"), "interrupted")
    need(told["reason"] == "SIGUSR2" and steps_kept(theatre.run("warned"))[-1] == told["step"], f"event {told}")
    theatre.goes_on("warned")


def stopped_at_the_start(theatre: Theatre) -> None:
    """A rank that waits for the others, before there is anything to save, ends as the signal alone would end it."""

    def late(rank: int) -> None:
        if rank == 1:
            time.sleep(60)

    def stop(pids: list[int], seconds: float) -> None:
        if seconds > 4:
            for pid in pids:
                os.kill(pid, signal.SIGTERM)

    ended = theatre.start("early", [128 + signal.SIGTERM, -signal.SIGTERM], prepare=[late], during=stop)
    need_lines(ended, "SIGTERM before training began")
    need(ended.others_s < 10, f"the last rank ended {ended.others_s:.0f} s later", ended)


def damaged_checkpoint(theatre: Theatre) -> None:
    """Passed over, said, and gone in the end."""
    theatre.start("sound", [KILLED, 1], prepare=[before_batch(8, die_after_writing, 0)])
    need(steps_kept(theatre.run("sound")) == [3, 6], f"checkpoints {steps_kept(theatre.run('sound'))}")
    damages = {
        "flipped": ("rank-00001.safetensors", flip_a_bit, "its content does not fit its SHA-256"),
        "cut": ("rank-00000.safetensors", cut_short, "bytes instead of"),
        "torn": (MANIFEST, flip_a_bit, "manifest"),
    }
    for name, (file, damage, words) in damages.items():
        shutil.copytree(theatre.run("sound"), theatre.run(name))
        folder = checkpoint_dir(theatre.run(name), 6)
        older = folder.with_name("step-00000003")
        damage(folder / file)
        ended = theatre.start(name, [0, 0], prepare=[trainers_told])
        need_lines(
            ended,
            "note: passed over a damaged checkpoint: ",
            words,
            f"goes on from {older}",
        )
        need(ended.log.count("passed over") == 1, f"{name}: said more than once", ended)
        ((_, there),) = told_trainers(ended)
        need(there == ["rolled-back-step-00000006", "step-00000003"], f"{name}: folders {there}", ended)
        theatre.same(name)
        for kept in list_checkpoints(theatre.run(name)):
            CheckpointReader(kept).verify()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def full_disk(theatre: Theatre) -> None:
    """For a while: the run goes on, loses a line of metrics.jsonl, and later saves work."""
    settings: dict[str, object] = {"data.retry_s": 0.15}
    ended = theatre.start("full", [0, 0], settings, [disk_full(6, 1), metrics_refused(6)])
    need_lines(ended, "note: a checkpoint could not be written (", "No space left on device", "; the run goes on")
    need_lines(ended, "metrics.jsonl cannot be written (No space left on device): make room, or repair it")
    (told,) = events(theatre.run("full"), "save_failed")
    need("No space left on device" in told["reason"], f"event {told}")
    need(steps_kept(theatre.run("full")) == [3, 9, 12], f"checkpoints {steps_kept(theatre.run('full'))}", ended)
    whole = history(theatre.whole())
    need(history(theatre.run("full")) == {step: told for step, told in whole.items() if step != 6}, "another history")
    need_same_tensors(checkpoint_dir(theatre.run("full"), STEPS), checkpoint_dir(theatre.whole(), STEPS))


def full_disk_at_the_end(theatre: Theatre) -> None:
    settings: dict[str, object] = {"data.retry_s": 0.15}
    ended = theatre.start("full-end", [1, 1], settings, [disk_full(STEPS, 0, 1)])
    need_error(ended, f"no checkpoint of step {STEPS} (", "No space left on device")
    need(steps_kept(theatre.run("full-end")) == [3, 6, 9], f"checkpoints {steps_kept(theatre.run('full-end'))}")
    theatre.goes_on("full-end")


def saves_by_the_clock(theatre: Theatre) -> None:
    settings: dict[str, object] = {"train.save_minutes": 1e-4, "train.save_every": 10**6, "train.keep": 100}
    ended = theatre.start("clock", [0, 0], settings)
    kept = steps_kept(theatre.run("clock"))
    need(len(kept) >= 3 and kept[-1] == STEPS, f"checkpoints {kept}", ended)
    theatre.same("clock")


def what_is_kept(theatre: Theatre) -> None:
    """The newest, every fifth, and the best of the validations, on a disk that is slower than the steps."""
    found = {2: 10.0, 4: 50.0, 6: 20.0}  # step: t2i_r1

    def dictate(rank: int) -> None:
        from clipdist.evals.validation import Validation

        real, calls = Validation.run, iter(range(2, STEPS + 1, 2))

        def run(validation: Validation, engine: Any) -> Any:
            findings, step = real(validation, engine), next(calls)
            return replace(findings, values={**findings.values, "t2i_r1": found.get(step, 0.0)})

        put(Validation, "run", run)

    settings: dict[str, object] = {
        "data.val": theatre.shards / "val",
        "eval.every": 2,
        "eval.sheet": 0,
        "train.save_every": 1,
        "train.keep": 1,
        "train.keep_every": 5,
        "train.keep_best": "t2i_r1",
        "guard.patience": 0,  # never goes back, and keeps none for that
    }
    ended = theatre.start("kept", [0, 0], settings, [dictate, slow_disk(0.1, 0)], in_time=False)
    kept = steps_kept(theatre.run("kept"))
    need(kept == [4, 5, 10, STEPS], f"checkpoints {kept}", ended)


def hang(theatre: Theatre) -> None:
    def sleep_in_a_step(rank: int) -> None:
        from clipdist.engine.step import Engine

        real = Engine._forward_whole

        def whole(engine: Engine, batch: Any, step: int, *rest: Any) -> Any:
            if rank == 1 and step == 4:
                time.sleep(1000)
            return real(engine, batch, step, *rest)

        put(Engine, "_forward_whole", whole)

    ended = theatre.start("hang", [1, 1], {"train.hang_s": 5}, [sleep_in_a_step])
    need_error(ended, "no progress for 5 s: rank 0 on ", "rank 1 on ", "at step 4 in phase step for ", "all stacks: ")
    need_stacks(theatre.run("hang"), "sleep_in_a_step")


def hang_in_data(theatre: Theatre) -> None:
    """One rank hangs before the others do: it is the one that is named first."""
    asleep = before_batch(4, lambda: time.sleep(1000), 1)
    ended = theatre.start("hang-data", [1, 1], {"train.hang_s": 5}, [asleep])
    need_error(ended, "no progress for 5 s: rank 1 on ", "at step 4 in phase data for ", "; rank 0 at step 4 in phase ")
    need_stacks(theatre.run("hang-data"), "before_batch")


def need_stacks(run: Path, function: str) -> None:
    texts = [(run / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    need(texts[0].startswith("rank 0 ") and texts[1].startswith("rank 1 "), texts[0] + texts[1])
    need(function in texts[1] or "accidents.py" in texts[1], f"rank 1's stack lacks {function}: {texts[1]}")


def flipped_bit_in_memory(theatre: Theatre) -> None:
    name = "visual.conv1.weight"

    def prepare(rank: int) -> None:
        import torch

        from clipdist.engine.step import Engine

        real = Engine.train_step

        def train_step(engine: Engine, *given: Any, **named: Any) -> Any:
            result = real(engine, *given, **named)
            if rank == 1 and named["step"] == 4:
                weight = engine.zero.module.get_parameter(name)
                weight.data.view(-1).view(torch.int32)[0] ^= 1
            return result

        put(Engine, "train_step", train_step)

    ended = theatre.start("memory", [1, 1], {"train.compare_every": 1, "engine.zero_stage": 1}, [prepare])
    need_error(
        ended,
        "step 5: ranks 0-1 on ",
        f"in 1 of 69 tensors, first in param/{name}",
    )


def other_configuration(theatre: Theatre) -> None:
    def prepare(rank: int) -> None:
        from clipdist import train

        real = train.load_config

        def load(*given: Any) -> Any:
            config = real(*given)
            return replace(config, optim=replace(config.optim, lr=config.optim.lr * (1 + rank)))

        put(train, "load_config", load)

    ended = theatre.start("other", [2, 2], prepare=[prepare])
    need_error(ended, "the ranks do not agree on what to train: optim.lr: ", "0.001", "0.002")


def killed_beside_a_writer(theatre: Theatre) -> None:
    """Rank 0 still writes step 6 when rank 1, whose part is written, is killed: the checkpoint is completed."""
    accident = [before_batch(6, wait_for_writer), before_batch(7, die_after_writing, 1), slow_disk(0.5, 0)]
    ended = theatre.start("beside", [1, KILLED], prepare=accident, in_time=False)
    need_error(ended, "rank 1 on ", "ended without a word")
    need(steps_kept(theatre.run("beside"))[-1] == 6, f"checkpoints {steps_kept(theatre.run('beside'))}", ended)
    need_lines(theatre.goes_on("beside"), f"goes on from {checkpoint_dir(theatre.run('beside'), 6)}")


def asked_again_and_again(theatre: Theatre) -> None:
    """SIGTERM, and three more while the checkpoint is being written."""
    sent: list[float] = []

    def ask(pids: list[int], seconds: float) -> None:
        if "SIGTERM: writing a checkpoint" not in theatre.log("again").read_text():
            return
        if len(sent) < 3 and (not sent or seconds > sent[-1] + 0.1):
            sent.append(seconds)
            for pid in pids:
                os.kill(pid, signal.SIGTERM)

    ask_first = before_batch(4, signal_self(signal.SIGTERM))
    accident = [slow_disk(0.8, 0, 1), ask_first]
    ended = theatre.start("again", [75, 75], prepare=accident, during=ask, in_time=False)
    need(len(sent) == 3, f"{len(sent)} signals while the checkpoint was being written", ended)
    step = steps_kept(theatre.run("again"))[-1]
    need(ended.log.count("SIGTERM: writing a checkpoint") == 1 and step in (4, 5), f"checkpoint {step}", ended)
    CheckpointReader(checkpoint_dir(theatre.run("again"), step)).verify()


def resume_rule(theatre: Theatre) -> None:
    """train.resume=FOLDER of another run, and never: as clipdist.resume.find_start says."""
    other = theatre.whole()  # with train.resume=never, in a new folder
    folder = checkpoint_dir(other, 6)
    settings: dict[str, object] = {"train.resume": folder}
    ended = theatre.start("second", [KILLED, 1], settings, [before_batch(11, die_after_writing, 0)])
    need_lines(ended, f"goes on from {folder}")
    need(steps_kept(theatre.run("second")) == [9], f"checkpoints {steps_kept(theatre.run('second'))}")
    ended = theatre.start("second", [0, 0], settings)
    need_lines(ended, f"goes on from {checkpoint_dir(theatre.run('second'), 9)}")
    need_same_tensors(checkpoint_dir(theatre.run("second"), STEPS), checkpoint_dir(other, STEPS))
    more: dict[str, object] = {"train.steps": STEPS + 1}
    ended = theatre.start(other.name, [2, 2], settings | more)
    need_error(ended, "holds newer checkpoints, up to step-00000012", "choose another run.name")
    ended = theatre.start(other.name, [2, 2], {"train.resume": "never"} | more)
    need_error(ended, "train.resume=never: ", "holds checkpoints already")
    need(steps_kept(other) == [3, 6, 9, 12], "the other run's checkpoints were touched")


def need_same_tensors(ours: Path, theirs: Path) -> None:
    import torch

    mine, yours = CheckpointReader(ours), CheckpointReader(theirs)
    need(mine.names() == yours.names(), "the checkpoints hold other tensors")
    different = [name for name in mine.names() if not torch.equal(mine.read_full(name), yours.read_full(name))]
    need(not different, f"{ours}: {different[:1]} differs")


SCENARIOS: dict[str, Callable[[Theatre], None]] = {
    scenario.__name__: scenario
    for scenario in (
        rollback,
        rollbacks_spent,
        data_away_for_long,
        data_away_for_a_moment,
        stopped_while_data_is_missing,
        one_rank_is_warned,
        stopped_at_the_start,
        damaged_checkpoint,
        full_disk,
        full_disk_at_the_end,
        saves_by_the_clock,
        what_is_kept,
        hang,
        hang_in_data,
        flipped_bit_in_memory,
        other_configuration,
        killed_beside_a_writer,
        asked_again_and_again,
        resume_rule,
    )
}


def main() -> None:
    shards, root, *names = sys.argv[1:]
    theatre = Theatre(Path(shards).resolve(), Path(root).resolve())
    warm_up()
    for name in names or SCENARIOS:
        began, used = time.monotonic(), os.times()
        try:
            SCENARIOS[name](theatre)
            ok, detail = True, ""
        except Failed as failed:
            ok, detail = False, str(failed)
        now = os.times()
        cpu_s = now.children_user + now.children_system - used.children_user - used.children_system
        told = {"name": name, "ok": ok, "detail": detail, "seconds": time.monotonic() - began, "cpu_s": cpu_s}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
