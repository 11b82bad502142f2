"""200 kills of the checkpoint writer at moments spread over its work: the last good checkpoint always loads.

Two ranks, forked from this process as one process or as two, write checkpoint after checkpoint, each step twice: the
second time beside a complete one of the same step. They use no more of torch than filling small tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
import traceback

import torch

from clipdist.checkpoint import MANIFEST, CheckpointReader, Manifest, Piece, checkpoint_dir, list_checkpoints
from clipdist.checkpoint_writer import CheckpointWriter
from clipdist.retention import Keep

KILLS = 200
WORLD = 2
TENSORS, NUMEL = 4, 1 << 13  # of a rank: too few numbers for torch to start threads
FIRST_SAVES = 3  # to learn how long one takes


def content(step: int, save: int) -> float:
    return float(1000 * step + save)


def write(run_dir, rank: int, step: int, save: int, attempt: str) -> None:
    value = content(step, save)
    pieces = [
        Piece(f"param/{number}", (WORLD * NUMEL,), rank * NUMEL, torch.full((NUMEL,), value + number))
        for number in range(TENSORS)
    ]
    manifest = Manifest(step, step, step, WORLD, {}, {}, {"save": save})
    CheckpointWriter(run_dir, Keep(last=2), rank, patience_s=0).write(pieces, manifest, attempt)


def write_for_ever(run_dir, rank: int, first: int, attempt: str, turn: tuple[int, int]) -> None:
    """As rank: steps first, first, first + 1, first + 1, ... Rank 1 begins a save where rank 0 has ended the last."""
    for number in itertools.count():
        if rank and number:
            os.read(turn[0], 1)
        write(run_dir, rank, first + number // 2, number % 2, f"{attempt}-{number}")
        if not rank:
            os.write(turn[1], b".")


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


def kill_at(pids: list[int], delays_s: list[float]) -> None:
    """Kills each process after its delay; fails where one had ended by itself."""
    began = time.monotonic()
    try:
        for delay_s, pid in sorted(zip(delays_s, pids)):
            time.sleep(max(0.0, began + delay_s - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
    began = time.monotonic()
    for save in range(FIRST_SAVES):
        for rank in (1, 0):
            write(tmp_path, rank, 1, save, f"first-{save}")
    save_s = (time.monotonic() - began) / FIRST_SAVES
    moments = random.Random(0)
    step, unfinished, advanced = 1, 0, 0
    for kill in range(KILLS):
        at_s = 2 * save_s * (kill % 20 + moments.random()) / 20
        delays_s = [at_s, at_s + moments.choice([0.0, 0.3, -0.3]) * save_s]
        turn = os.pipe()
        processes: list[tuple[int, ...]] = [(0, 1)] if kill % 2 else [(0,), (1,)]
        pids = [forked(tmp_path, ranks, step + 1, f"kill-{kill}", turn) for ranks in processes]
        kill_at(pids, delays_s)
        for end in turn:
            os.close(end)
        after = assert_good(tmp_path)
        assert after >= step
        advanced += after > step
        step = after
        halves = [path for path in (tmp_path / "checkpoints").iterdir() if not (path / MANIFEST).exists()]
        again = checkpoint_dir(tmp_path, step)
        unfinished += bool(halves) or {path.name for path in again.iterdir()} != {
            MANIFEST,
            *CheckpointReader(again).manifest.files,
        }
        if kill % 4 == 3:  # and a next save works, over whatever lies there
            step += 1
            for rank in (1, 0):
                write(tmp_path, rank, step, 0, f"next-{kill}")
            assert assert_good(tmp_path) == step
            assert len(list_checkpoints(tmp_path)) == 2
    assert unfinished > KILLS / 4, "too few kills met a writer at work"
    assert advanced > KILLS / 10, "too few kills came after a save"
