"""The saver beside the training loop: what it copies and when, that memory stays, and how failures are told."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clipdist.checkpoint import saver as module
from clipdist.checkpoint.format import Manifest, newest_checkpoint
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.saver import Saver
from clipdist.engine.zero import Zero
from clipdist.errors import Fault


@pytest.fixture
def engine():
    """Stage 0 in fp32: what DeepSpeed holds is a module and its optimiser, with moments, themselves."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    made = Zero.__new__(Zero)
    made.stage, made._deepspeed = 0, SimpleNamespace(module=model, optimizer=optimizer)
    made._rules, made._held = SimpleNamespace(steps=0), {}
    step(made)
    yield made
    dist.destroy_process_group()


def step(engine):
    engine.module(torch.randn(4, 6)).square().sum().backward()
    engine._deepspeed.optimizer.step()
    engine._deepspeed.optimizer.zero_grad()


def saver_of(run_dir, retry_s=0.0):
    return Saver(run_dir, RetentionPolicy(last=2), 0, "t", retry_s)


def save(saver, engine, manifest):
    saver.save(list(engine.live_pieces()), list(engine.buffer_pieces()), manifest)


def manifest(step):
    return Manifest(step, step, step, 1, {}, {}, {})


def tensors(engine):
    """All of a checkpoint's tensors, by name, as the engine holds them now."""
    found = {f"buffer/{name}": tensor.clone() for name, tensor in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        state = engine._deepspeed.optimizer.state[parameter]
        found[f"param/{name}"] = parameter.detach().clone()
        found |= {f"{moment}/{name}": state[moment].clone() for moment in ("exp_avg", "exp_avg_sq")}
    return found


def saved(run_dir):
    reader = CheckpointReader(newest_checkpoint(run_dir))
    reader.verify()
    return {name: reader.read_full(name) for name in reader.names()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_copying_waits_for_nobody_and_the_optimiser_for_the_copying(tmp_path, engine, monkeypatch):
    go = threading.Event()
    copy_all = module._Copying._copy_all
    monkeypatch.setattr(module._Copying, "_copy_all", lambda self, parts: go.wait(60) and copy_all(self, parts))
    before = tensors(engine)
    saver = saver_of(tmp_path)
    save(saver, engine, manifest(1))  # returns although nothing is copied yet
    assert saver.busy
    engine.module(torch.randn(4, 6))  # changes the running statistics: the checkpoint has those from before
    threading.Timer(0.2, go.set).start()
    saver.wait_copied()
    assert go.is_set()
    step(engine)
    saver.wait()
    assert not saver.busy
    assert saver.seconds_in_loop > 0
    assert_same(saved(tmp_path), before)


def test_memory_is_kept_from_save_to_save(tmp_path, engine):
    saver = saver_of(tmp_path)
    places = set()
    for number in (1, 2, 3):
        expected = tensors(engine)
        save(saver, engine, manifest(number))
        saver.wait_copied()
        step(engine)
        saver.wait()
        places.add(saver._memory._flat.data_ptr())
        assert_same(saved(tmp_path), expected)
    assert len(places) == 1


def test_memory_can_be_taken_before_the_first_save(tmp_path, engine):
    saver = saver_of(tmp_path)
    saver.prepare(*engine.save_numel())
    saver.wait()
    place = saver._memory._flat.data_ptr()
    expected = tensors(engine)
    save(saver, engine, manifest(1))
    saver.wait_copied()
    saver.wait()
    assert saver._memory._flat.data_ptr() == place
    assert_same(saved(tmp_path), expected)


def test_a_failed_save_is_told_and_the_next_one_works(tmp_path, engine):
    run_dir, away = tmp_path / "run", tmp_path / "away"
    run_dir.mkdir()
    saver = saver_of(run_dir)
    save(saver, engine, manifest(1))
    saver.wait()
    run_dir.rename(away)
    save(saver, engine, manifest(2))
    with pytest.raises(Fault, match=r"last checkpoint was not written .*gone"):
        saver.wait()
    assert "gone" in saver.failed
    away.rename(run_dir)
    save(saver, engine, manifest(3))
    saver.wait()
    assert saver.failed == ""
    assert newest_checkpoint(run_dir).name == "step-00000003"


def test_an_error_of_the_program_is_told_too(tmp_path, engine, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no memory of the host is left")

    monkeypatch.setattr(module._HostMemory, "take", broken)
    saver = saver_of(tmp_path)
    save(saver, engine, manifest(1))
    saver.wait_copied()  # the optimiser is not held for ever
    with pytest.raises(Fault, match="MemoryError: no memory"):
        saver.wait()


def test_a_save_gives_up_the_one_before_that_meets_a_failing_disk(tmp_path, engine):
    run_dir = tmp_path / "run"
    saver = saver_of(run_dir, retry_s=600)
    save(saver, engine, manifest(1))
    with pytest.raises(Fault, match="still being written"):
        saver.wait(timeout_s=0.3)
    timer = threading.Timer(0.3, run_dir.mkdir)
    timer.start()
    save(saver, engine, manifest(2))
    timer.join()
    saver.wait()
    assert newest_checkpoint(run_dir).name == "step-00000002"


def test_the_same_step_twice(tmp_path, engine):
    saver = saver_of(tmp_path)
    for _ in range(2):
        save(saver, engine, manifest(1))
        saver.wait_copied()
        expected = tensors(engine)
        step(engine)
    saver.wait()
    assert_same(saved(tmp_path), expected)


def test_restored_as_saved(tmp_path, engine):
    expected = tensors(engine)
    saver = saver_of(tmp_path)
    save(saver, engine, manifest(1))
    saver.wait_copied()
    for _ in range(2):
        step(engine)
    saver.wait()
    engine.restore(CheckpointReader(newest_checkpoint(tmp_path)))
    ours = tensors(engine)
    assert_same(
        {k: v for k, v in ours.items() if "buffer" not in k}, {k: v for k, v in expected.items() if "buffer" not in k}
    )


def test_restoring_gives_the_files_back(tmp_path, engine):
    saver = saver_of(tmp_path)
    save(saver, engine, manifest(1))
    saver.wait()
    engine.restore(CheckpointReader(newest_checkpoint(tmp_path)))
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()
