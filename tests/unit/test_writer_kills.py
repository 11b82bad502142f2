"""200 kills of the checkpoint writer at moments spread over its work: the last good checkpoint always loads.

Two ranks, forked from this process as one process or as two, write checkpoint after checkpoint, each step twice: the
second time beside a complete one of the same step. They use no more of torch than filling small tensors. A kill comes
some saves after the start, counted, and then a part of a save later: a slow machine meets what a fast one meets.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import select
import signal
import threading
import time
import traceback

import torch

from clipdist.checkpoint.format import MANIFEST, Manifest, Piece, checkpoint_dir, list_checkpoints
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.writer import CheckpointWriter

KILLS = 200
WORLD = 2
TENSORS, NUMEL = 4, 1 << 13  # of a rank: too few numbers for torch to start threads
SAVES_BEFORE = (0, 1, 2, 3)  # of a kill, by turns: the first two are of one step
WAIT_S = 60.0  # for a save to end


def content(step: int, save: int) -> float:
    return float(1000 * step + save)


def write(run_dir, rank: int, step: int, save: int, attempt: str) -> None:
    value = content(step, save)
    pieces = [
        Piece(f"param/{number}", (WORLD * NUMEL,), rank * NUMEL, torch.full((NUMEL,), value + number))
        for number in range(TENSORS)
    ]
    manifest = Manifest(step, step, step, WORLD, {}, {}, {"save": save})
    CheckpointWriter(run_dir, RetentionPolicy(last=2), rank, retry_s=0).write(pieces, manifest, attempt)


class Pipe:
    """Says that a save has ended."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()

    def say(self) -> None:
        os.write(self.into, b".")

    def hear(self) -> None:
        assert select.select([self.out], [], [], WAIT_S)[0], "no save ended"
        os.read(self.out, 1)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


def write_for_ever(run_dir, rank: int, first: int, attempt: str, turn: Pipe, ended: Pipe) -> None:
    """As rank: steps first, first, first + 1, first + 1, ... Rank 1 begins a save where rank 0 has ended the last."""
    for number in itertools.count():
        if rank and number:
            turn.hear()
        write(run_dir, rank, first + number // 2, number % 2, f"{attempt}-{number}")
        if not rank:
            turn.say()
            ended.say()


def forked(run_dir, ranks: tuple[int, ...], *work) -> int:
    """A process that writes as these ranks, one thread for each. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for rank in ranks[1:]:
            threading.Thread(target=write_for_ever, args=(run_dir, rank, *work), daemon=True).start()
        write_for_ever(run_dir, ranks[0], *work)
    except BaseException:  # nothing of pytest may run in the child
        traceback.print_exc()
    finally:
        os._exit(1)


def kill(pids: list[int], between_s: float) -> None:
    """Kills these processes, one after the other; fails where one had ended by itself."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(between_s if pid != pids[-1] else 0.0)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    assert all(os.WIFSIGNALED(end) for end in ends), "a writer failed by itself"


def assert_good(run_dir) -> int:
    """The newest checkpoint is whole and holds what was written for its step. Returns the step."""
    reader = CheckpointReader(list_checkpoints(run_dir)[-1])
    reader.verify()
    value = content(reader.manifest.step, reader.manifest.state["save"])
    for number in range(TENSORS):
        assert reader.read_full(f"param/{number}").eq(value + number).all()
    return reader.manifest.step


def test_the_last_good_checkpoint_survives_every_kill(tmp_path):
    for rank in (1, 0):
        write(tmp_path, rank, 1, 0, "first")
    moments = random.Random(0)
    save_s = collections.deque([0.01], maxlen=20)
    step, unfinished = 1, 0
    for number in range(KILLS):
        saves_before = SAVES_BEFORE[number // 2 % len(SAVES_BEFORE)]
        turn, ended = Pipe(), Pipe()
        processes: list[tuple[int, ...]] = [(0, 1)] if number % 2 else [(0,), (1,)]
        pids = [forked(tmp_path, ranks, step + 1, f"kill-{number}", turn, ended) for ranks in processes]
        usual_s = sorted(save_s)[len(save_s) // 2]
        try:
            for save in range(saves_before):
                began = time.monotonic()
                ended.hear()
                if save:  # the first one has the start of a process in it
                    save_s.append(time.monotonic() - began)
            time.sleep(moments.random() * usual_s)
        finally:
            moments.shuffle(pids)
            kill(pids, moments.choice([0.0, 0.3]) * usual_s)
        turn.close()
        ended.close()
        after = assert_good(tmp_path)
        assert after >= step + (saves_before + 1) // 2, "a save that had ended is lost"
        step = after
        halves = [path for path in (tmp_path / "checkpoints").iterdir() if not (path / MANIFEST).exists()]
        again = checkpoint_dir(tmp_path, step)
        unfinished += bool(halves) or {path.name for path in again.iterdir()} != {
            MANIFEST,
            *CheckpointReader(again).manifest.files,
        }
        if number % 4 == 3:  # and a next save works, over whatever lies there
            step += 1
            for rank in (1, 0):
                write(tmp_path, rank, step, 0, f"next-{number}")
            assert assert_good(tmp_path) == step
            assert len(list_checkpoints(tmp_path)) == 2
    assert unfinished > KILLS / 2, "too few kills met a writer at work"
