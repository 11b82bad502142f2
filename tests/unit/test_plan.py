"""Bad input of the trainer: one clear line, before any model is built."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from clipdist.checkpoint.format import Manifest, checkpoint_dir
from clipdist.checkpoint.writer import write_manifest, write_part
from clipdist.config import load_config, to_dict
from clipdist.data.catalog import INDEX_MEMORY_BYTES, Catalog, Shard
from clipdist.data.index import ShardIndex
from clipdist.data.loader import default_threads
from clipdist.data.order import local_window
from clipdist.distributed.node import cores_of_rank
from clipdist.distributed.rank import device_index, joined_ranks
from clipdist.errors import Fault, UserError
from clipdist.models.spec import resolve_spec
from clipdist.process import command_line, lock_run_folder
from clipdist.resume import plan_start
from clipdist.train import train

ROOT = Path(__file__).parents[2]


def configured(shards, root, *words):
    return load_config("configs/tiny.yaml", [f"run.root={root}", f"data.train={shards / 'train'}", *words])


def fake_checkpoint(config, step=4, world=1, **sections):
    """A checkpoint that holds nothing but says all about itself."""
    plan = plan_start(dataclasses.replace(config, train=dataclasses.replace(config.train, resume="auto")), world)
    state = {"model": resolve_spec(config.model).to_dict()}
    folder = checkpoint_dir(config.run.dir, step)
    write_part(folder, 0, [], "t")
    manifest = Manifest(step, step, step * 16, 1, to_dict(config) | sections, plan.order_record, state)
    write_manifest(folder, manifest, "t")
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """Building a model is an error here."""
    monkeypatch.setattr("clipdist.models.build.assemble", lambda *_, **__: pytest.fail("a model was built"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=/nowhere/{0..3}.tar"], r"data.train: .*/nowhere"),
        (["data.train="], r"data.train is empty"),
        (["data.val=/nowhere"], r"data.val: .*/nowhere"),
        (["train.global_batch=96"], r"70 samples, fewer than train.global_batch=96"),
        (["model.name=ViT-B-23"], r"ViT-B-23.*ViT-B-32"),
        (["model.name=configs/models/none.json"], r"none.json"),
        (["device=cuda"], r"device=cuda"),
        (["train.precision=fp16"], r"train.precision=fp16"),
        (["run.logger=[tensorboard]"], r"run.logger=\['tensorboard'\]: must be a list of wandb, mlflow, trackio"),
        (["run.logger=wandb"], r"run.logger=wandb: needs wandb, not installed: pip install .* -e '\.\[wandb\]'"),
        (["train.resume=/nowhere"], r"/nowhere: not a checkpoint"),
    ],
)
def test_what_is_wrong_and_where(shards, tmp_path, no_model, words, message, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match=message) as caught:
        train(configured(shards, tmp_path, *words))
    assert "\n" not in str(caught.value)


def test_ranks_that_do_not_divide_the_batch(shards, tmp_path, no_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"train.global_batch=16 cannot be divided among 3 ranks.* 15"):
        train(configured(shards, tmp_path))


def test_micro_batches_that_do_not_divide_a_ranks_share(shards, tmp_path, no_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"train.micro_batch=3 does not divide the 8 pairs .* one of 1, 2, 4, 8$"):
        train(configured(shards, tmp_path, "train.micro_batch=3"))


def test_a_run_folder_that_cannot_be_written(shards, tmp_path, no_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run folder .*file/tiny: cannot be written"):
        train(configured(shards, tmp_path / "file"))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("moco: {queue: 64}", "moco: {queue: 96}", r"made with objectives\.moco\.queue=64, here 96"),
        ("moco: {queue: 64}", "moco: {queue: 0, predictor: [64, 128]}", r"moco\.predictor=\[\], here \[64, 128\]"),
        (
            "dino: {}",
            "dino: {ibot: {prototypes: 100}}",
            r"made with objectives\.dino\.ibot\.head=None, here \[2048, 2048, 256\]",
        ),
        ("caption: {width: 64}", "caption: {width: 32}", r"made with objectives\.caption\.width=64, here 32"),
        ("dino: {}", "dino: {prototypes: 100}", r"made with objectives\.dino\.prototypes=65536, here 100"),
    ],
)
def test_an_objective_whose_head_or_state_has_another_shape(shards, tmp_path, no_model, before, after, told):
    fake_checkpoint(configured(shards, tmp_path, f"objectives={{{before}, clip: {{}}}}"))
    for more in ("same", "reset"):
        words = (f"objectives={{{after}, clip: {{}}}}", f"train.resume_objectives={more}")
        with pytest.raises(UserError, match=f"{told}: head or state would not fit; set it back"):
            plan_start(configured(shards, tmp_path, *words), 1)


def test_a_teacher_that_begins_with_the_weights_is_told_of(shards, tmp_path):
    words = ("objectives={clip: {}, byol: {}}", "train.resume_objectives=reset")
    folder = fake_checkpoint(configured(shards, tmp_path))
    notes = plan_start(configured(shards, tmp_path, *words), 1).notes
    assert notes[-1] == f"objectives.byol's teacher: {folder.name} holds no average; it begins with the weights"


def test_the_first_start_chooses_the_streams_and_the_checkpoint_keeps_them(shards, tmp_path):
    config = configured(shards, tmp_path)
    first = plan_start(config, world=2)
    assert first.resume is None
    assert first.start_step == 0
    assert first.steps == 2 * (70 // 16)
    fake_checkpoint(config, world=2)
    again = plan_start(config, world=16)
    assert again.start_step == 4
    assert again.order == first.order


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.name=configs/models/tiny_rn.json"], r"another model"),
        (["train.global_batch=8"], r"train.global_batch=16, here 8"),
        (["data.seed=5"], r"data.seed=0, here 5"),
        (["data.window=7"], r"data.window=0, here 7"),
        (["data.streams=2"], r"data.streams=16, here 2"),
        (["data.train={shards}/val", "train.global_batch=16"], r"other training data"),
        (["train.resume=never"], r"holds checkpoints already"),
    ],
)
def test_a_checkpoint_that_does_not_fit(shards, tmp_path, no_model, words, message):
    fake_checkpoint(configured(shards, tmp_path))
    words = [word.format(shards=shards) for word in words]
    with pytest.raises(UserError, match=message):
        train(configured(shards, tmp_path, *words))


def test_a_model_json_that_was_edited_after_the_first_start(shards, tmp_path, no_model):
    described = json.loads(Path("configs/models/tiny_vit.json").read_text())
    file = tmp_path / "model.json"
    file.write_text(json.dumps(described))
    config = configured(shards, tmp_path, f"model.name={file}")
    fake_checkpoint(config)
    plan_start(config, 1)
    described["vision_cfg"]["layers"] = 3
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match="another model"):
        train(config)
    file.unlink()
    assert plan_start(config, 1).start_step == 4  # the checkpoint describes its model itself


def test_a_damaged_newest_checkpoint_is_passed_over(shards, tmp_path):
    config = configured(shards, tmp_path)
    fake_checkpoint(config, 4)
    (fake_checkpoint(config, 6) / "rank-00000.safetensors").unlink()
    plan = plan_start(config, 1)
    assert plan.start_step == 4
    assert "step-00000006" in plan.notes[0]
    (checkpoint_dir(config.run.dir, 4) / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match="none of 2 checkpoints"):
        plan_start(config, 1)


def test_a_named_checkpoint_begins_a_run_and_its_own_ones_go_on(shards, tmp_path):
    other = configured(shards, tmp_path, "run.name=other")
    first = fake_checkpoint(other, 2)
    config = configured(shards, tmp_path, f"train.resume={first}")
    assert plan_start(config, 1).start_step == 2
    fake_checkpoint(config, 6)
    assert plan_start(config, 1).start_step == 6
    fake_checkpoint(other, 4)
    with pytest.raises(UserError, match=r"holds newer checkpoints, up to step-00000004"):
        plan_start(configured(shards, tmp_path, "run.name=other", f"train.resume={first}"), 1)


def test_two_runs_do_not_share_a_folder(tmp_path):
    held = lock_run_folder(tmp_path)
    with pytest.raises(UserError, match="another run is writing"):
        lock_run_folder(tmp_path)
    threading.Timer(1.5, held.close).start()  # as the lock of a lost node, or a look of launch/status.py
    lock_run_folder(tmp_path, wait_s=60).close()


def test_a_job_that_is_queued_again_goes_on_whatever_it_was_told_at_first(shards, tmp_path, monkeypatch):
    first = fake_checkpoint(configured(shards, tmp_path), 2)
    fake_checkpoint(configured(shards, tmp_path), 4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for wanted in ("never", first):
        assert plan_start(configured(shards, tmp_path, f"train.resume={wanted}"), 1).start_step == 4


def test_a_finished_run_says_so(shards, tmp_path, no_model, capsys):
    config = configured(shards, tmp_path)
    fake_checkpoint(config, 8)
    assert train(config) == 0
    assert "finished at step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        (["launch.nodes=2", "train.resume=auto"], []),
        (["train.log_every=3"], ["other settings than those of step-00000007: train.log_every 1 -> 3"]),
        (
            ["train.epochs=4", "optim.weight_decay=0.1", "engine.deepspeed.a=1"],
            [
                "other settings than those of step-00000007: optim.weight_decay 0.2 -> 0.1, engine.deepspeed.a None ->"
                " 1, train.epochs 2 -> 4",
                "the other schedule raises the learning rate, 2.9 times: 0.00025 in the checkpoint's last step,"
                " 0.000717 in the next; optim.lr scales it",
            ],
        ),
        (
            ["optim.lr=1e-5"],
            [
                "other settings than those of step-00000007: optim.lr 0.001 -> 1e-05",
                "the other schedule lowers the learning rate: 0.00025 in the checkpoint's last step, 6.7e-07 in the"
                " next; optim.lr scales it",
            ],
        ),
    ],
)
def test_a_resumed_run_says_what_differs_from_its_checkpoint(shards, tmp_path, words, notes):
    fake_checkpoint(configured(shards, tmp_path), 7)
    assert list(plan_start(configured(shards, tmp_path, *words), 1).notes) == notes
    fake_checkpoint(configured(shards, tmp_path), 7, later={"key": 1})
    (told,) = plan_start(configured(shards, tmp_path, *words), 1).notes
    assert "another version: its settings cannot be compared" in told


WORDS = ["--config", "a.yaml", "optim.lr=1e-3"]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
NODES = {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
DEEPSPEED = {"LOCAL_SIZE": "4", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "extra", "launcher"),
    [
        ({}, [], "python clipdist/train.py"),
        (TORCHRUN, [], "torchrun --nproc-per-node 4 clipdist/train.py"),
        (
            TORCHRUN | NODES,
            [],
            "torchrun --nnodes 2 --node-rank 0 --master-addr node1 --master-port 29500 --nproc-per-node 4"
            " clipdist/train.py",
        ),
        (DEEPSPEED, ["--local_rank=0"], "deepspeed --num_accelerators 4 clipdist/train.py"),
        (
            DEEPSPEED | {"CROSS_SIZE": "2"},
            ["--local_rank=0"],
            "deepspeed --hostfile HOSTFILE --num_nodes 2 --num_accelerators 4 clipdist/train.py",
        ),
        ({"CLIPDIST_JOB_FILES": "x", "SLURM_JOB_NUM_NODES": "2"}, [], "sbatch --nodes 2 slurm/train.sbatch"),
    ],
)
def test_the_command_that_goes_on_names_its_launcher_and_nodes(monkeypatch, environment, extra, launcher):
    for name in ("TORCHELASTIC_RUN_ID", "CLIPDIST_JOB_FILES", *TORCHRUN, *NODES, *DEEPSPEED, "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    nodes = "  # and on the other nodes as before" if environment.get("GROUP_WORLD_SIZE") else ""
    assert command_line([*extra, *WORDS]) == f"{launcher} --config a.yaml optim.lr=1e-3{nodes}"


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        ("torchrun --nnodes 2 --node-rank 1 --rdzv-endpoint node1:29500", TORCHRUN),
        ("deepspeed --hostfile nodes.txt --include node1:0,1@node2", DEEPSPEED),
    ],
)
def test_the_launcher_is_told_as_it_was_typed(tmp_path, launcher, environment):
    name, *options = launcher.split()
    start = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[sys.argv.index('rank.py'):]])"
    (tmp_path / name).write_text(start)
    (tmp_path / "rank.py").write_text("import sys\nfrom clipdist.process import *\nprint(command_line(sys.argv[1:]))")
    added = ["--local_rank=0"] if name == "deepspeed" else []
    command = [sys.executable, name, *options, "rank.py", *added, *WORDS]
    env = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert said.stdout == f"{launcher} clipdist/train.py {' '.join(WORDS)}\n", said.stderr


def test_a_rendezvous_port_in_use_is_one_line_with_the_way_out(monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Fault, match=rf"127.0.0.1:{port}.*another program.*--master_port"), joined_ranks("cpu"):
            pass


@pytest.mark.parametrize(
    ("local_rank", "visible", "named", "index"),
    [
        (1, 2, None, 1),
        (1, 2, "0,1", 1),
        (1, 1, "0", 0),  # the site shows each task its own
        (1, 1, "GPU-4ff6", 0),
        (1, 1, None, "rank 1 of this node has no GPU: torch sees 1"),
        (1, 1, "0,1", "rank 1 of this node has no GPU: torch sees 1"),  # as deepspeed sets it for two ranks
        (2, 2, "0,1", "rank 2 of this node has no GPU: torch sees 2"),
    ],
)
def test_every_rank_has_a_gpu_of_its_own(monkeypatch, local_rank, visible, named, index):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    if isinstance(index, int):
        assert device_index(local_rank, visible) == index
    else:
        with pytest.raises(UserError, match=index):
            device_index(local_rank, visible)


@pytest.mark.parametrize(
    ("ranks", "own", "parent", "slurm", "cores"),
    [
        (1, 16, 16, None, 16),
        (4, 16, 16, None, 4),  # deepspeed, torchrun
        (4, 4, 16, None, 4),  # deepspeed --bind_cores_to_rank: not divided again
        (8, 8, 16, None, 2),  # bound to a socket that four ranks share
        (8, 8, 8, "64", 8),  # srun binds the task, and the batch script's shell with it
        (8, 128, 128, "64", 8),  # a node without binding, of which the job has a half
        (8, 64, 64, "64", 8),  # the job's cores, not bound task by task
        (8, 4, 4, None, 1),
    ],
)
def test_a_rank_has_its_share_of_the_cores_once(monkeypatch, ranks, own, parent, slurm, cores):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", slurm)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(parent if pid else own))
    assert (cores_of_rank(), default_threads()) == (cores, min(cores, 8))


def test_a_large_local_catalog_gets_windows_whose_tables_fit_into_memory():
    def index(count: int) -> ShardIndex:
        place = np.zeros((count, 3), dtype=np.int64)
        return ShardIndex(
            "0.tar", np.array([f"{i:09d}" for i in range(count)]), ("jpg", "txt", "json"), place, place, 1
        )

    def catalog(shards: int) -> Catalog:
        return Catalog([Shard(f"{i}.tar", 10_000, b"", lambda: index(10_000)) for i in range(shards)])

    assert local_window(catalog(100), 64, 10_000) == 0  # a million samples: all of them fit
    large, per_sample = catalog(2000), index(10).bytes_in_memory() / 10
    window = local_window(large, 16, 10_000)
    touched = 16 * (-(-window // 10_000) + 1)
    assert touched * 10_000 * per_sample <= INDEX_MEMORY_BYTES
    assert window > 10_000
    assert local_window(catalog(2000), 64, 10_000) >= 1000  # never so small that nothing is mixed
