"""launch/submit.py: the script that Slurm gets, what is refused before the queue, and what every rank is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clipdist.errors import UserError
from launch import rank, submit

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/tiny.yaml")


@pytest.fixture
def words(shards, tmp_path, monkeypatch):
    """The command line of a run that could be submitted; no Slurm is on PATH."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    return ["--config", TINY, f"data.train={shards}/train", f"run.root={tmp_path}/runs"]


@pytest.fixture
def no_plan(monkeypatch):
    """Leaves the estimate out, which runs a model; what it says is shown in a test of its own."""

    class Plan:
        def refuse(self) -> None:
            pass

    monkeypatch.setattr("clipdist.estimate.make_estimate", lambda *given: Plan())
    monkeypatch.setattr("clipdist.estimate.summary", lambda estimate: "")


def slurm_stub(folder: Path, sbatch: str) -> str:
    """A PATH on which srun exists and sbatch is the given shell script."""
    for name, body in (("srun", "exit 1"), ("sbatch", sbatch)):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


def dry_run(capsys, words: list[str]) -> tuple[str, str]:
    """The configuration and the script that a dry run prints."""
    assert submit.main([*words, "--dry-run"]) == 0
    configuration, mark, script = capsys.readouterr().out.partition("# sbatch script, as it would be submitted\n")
    assert mark
    return configuration, script


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_dry_run_shows_the_resolved_configuration_and_a_script_for_every_gpu(capsys, words):
    configuration, script = dry_run(capsys, [*words, "--nodes", "2", "--gpus", "8", "device=auto", "optim.lr=3e-4"])
    shown = OmegaConf.create(configuration)
    assert (shown.launch.nodes, shown.launch.gpus, shown.optim.lr) == (2, 8, 3e-4)
    asked = options(script)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "8", "8")
    assert asked["job-name"] == "tiny"
    assert script.startswith("#!/bin/bash\n")
    assert "-m submitit.core._submit" in script
    assert "--kill-on-bad-exit=1" in script


@pytest.mark.parametrize(
    ("code", "program", "words"),
    [
        (0, "launch/submit.py", ["--help"]),
        (2, "launch/submit.py", ["optim.lrr=1"]),
        (0, "launch/submit.py", ["--dry-run"]),
        (0, "launch/submit.py", ["--config", "configs/tiny.yaml", "--dry-run"]),  # its model is a JSON
        (2, "launch/submit.py", ["model.name=RN51", "--dry-run"]),
        (0, "clipdist/train.py", ["--help"]),
        (2, "clipdist/train.py", ["optim.lrr=1"]),
        (0, "launch/status.py", ["--help"]),
    ],
)
def test_a_login_node_answers_without_importing_torch(code, program, words):
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")
    }
    assert "clipdist.errors" in imported
    assert not {"torch", "deepspeed", "open_clip", "timm", "transformers"} & imported


def test_a_cpu_job_requests_no_gpu(capsys, words):
    _, script = dry_run(capsys, [*words, "--gpus", "4", "device=cpu"])
    assert options(script)["ntasks-per-node"] == "4"
    assert "gpu" not in "".join(options(script))


def test_flags_win_over_words_and_the_recipe(capsys, words):
    flags = ["--partition", "[long]", "--time", "90", "--account", "vision"]
    flags += ["--qos", "high", "--constraint", "a100|h100"]
    _, script = dry_run(capsys, [*words, "launch.partition=short", "launch.time_min=5", *flags])
    asked = options(script)
    assert (asked["partition"], asked["time"], asked["account"]) == ("'[long]'", "90", "vision")
    assert (asked["qos"], asked["constraint"]) == ("high", "'a100|h100'")


def test_what_the_recipe_leaves_open_is_left_to_the_site(capsys, words):
    _, script = dry_run(capsys, words)
    assert not {"partition", "account", "qos", "constraint", "mem"} & set(options(script))


def test_memory_setup_lines_and_further_options_reach_the_script(capsys, words):
    more = ["launch.mem_gb=64", "launch.setup=[module load cuda]", "launch.slurm={exclusive: true, reservation: clip}"]
    _, script = dry_run(capsys, [*words, *more])
    asked = options(script)
    assert (asked["mem"], asked["reservation"], asked["exclusive"]) == ("64GB", "clip", "")
    assert script.index("module load cuda") < script.index("srun ")
    flags = ["--qos", "", "--mem", "32", "--setup", "module load a", "--setup", "export B='c d'"]
    flags += ["--slurm", "mail-user=me@x.org"]
    flags += ["--slurm", "exclusive=false", "--exclude", "n[1-2]", "--dependency", "afterok:7", "--comment", "a b"]
    _, script = dry_run(capsys, [*words, *more, *flags])
    asked = options(script)
    assert (asked["mem"], asked["mail-user"], asked["reservation"]) == ("32GB", "me@x.org", "clip")
    assert (asked["exclude"], asked["dependency"], asked["comment"]) == ("'n[1-2]'", "afterok:7", "'a b'")
    assert not {"exclusive", "qos"} & set(asked)
    assert "module load cuda" not in script
    assert "\nmodule load a\nexport B='c d'\n" in script


def test_shell_variables_in_setup_lines_are_the_shells(capsys, words, tmp_path, monkeypatch):
    line = "export PATH=${HOME}/bin:$PATH A=${B:-'c d'} \"${E:+x}\""
    configuration, script = dry_run(capsys, [*words, "--setup", line])
    assert f"\n{line}\n" in script
    assert list(OmegaConf.create(configuration).launch.setup) == [line]
    site = tmp_path / "site.yaml"
    for setup in ("export A=${HOME}/x", "\n    - export A=${HOME}/x"):
        site.write_text(f"launch:\n  setup: {setup}\n")
        monkeypatch.setenv("CLIPDIST_SITE", str(site))
        assert "\nexport A=${HOME}/x\n" in dry_run(capsys, words)[1]


def test_a_job_is_warned_queued_again_and_restarted(capsys, words):
    _, script = dry_run(capsys, [*words, "--max-restarts", "5", "launch.signal_s=90"])
    asked = options(script)
    assert (asked["signal"], asked["requeue"], asked["open-mode"]) == ("USR2@90", "", "append")
    assert script.splitlines()[-1].endswith('launch/after.sh "$?" "$CLIPDIST_JOB_FILES" 5')


def test_cores_are_those_of_the_loader_and_one_more(capsys, words):
    assert options(dry_run(capsys, [*words, "launch.cpus_per_gpu=0"])[1])["cpus-per-task"] == "8"
    assert options(dry_run(capsys, [*words, "launch.cpus_per_gpu=0", "data.threads=3"])[1])["cpus-per-task"] == "4"


def test_only_the_ranks_run_in_the_container(capsys, words):
    more = ["--container", "nvcr.io/x:1", "--slurm", "container-mounts=/data"]
    _, script = dry_run(capsys, [*words, *more])
    assert "container" not in "".join(options(script))
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert {"--container-mounts=/data", "--container-image=nvcr.io/x:1"} <= set(srun.split())


def test_site_defaults_lie_below_the_recipe(capsys, words, tmp_path, monkeypatch):
    site = tmp_path / "site.yaml"
    site.write_text("launch:\n  partition: gpu\n  account: group\n  time_min: 7\n  setup: module load cuda\n")
    monkeypatch.setenv("CLIPDIST_SITE", str(site))
    configuration, script = dry_run(capsys, [*words, "launch.account=mine"])
    asked = options(script)
    assert configuration.startswith(f"# site defaults: {site}\n")
    assert (asked["partition"], asked["account"], asked["time"]) == ("gpu", "mine", "10")  # the recipe has 10 minutes
    assert "module load cuda" in script
    for text in ("optim:\n  lr: 1\n", "- launch\n"):
        site.write_text(text)
        with pytest.raises(UserError, match=r"site.yaml: must hold a launch section and nothing else"):
            submit.main([*words, "--dry-run"])
    site.write_text("launch:\n  partitoin: gpu\n")
    with pytest.raises(UserError, match=r"site.yaml: launch.partitoin.*Did you mean"):
        submit.main([*words, "--dry-run"])


def test_the_example_of_a_site_file_is_one(capsys, words, monkeypatch):
    monkeypatch.setenv("CLIPDIST_SITE", str(ROOT / "slurm/site.example.yaml"))
    _, script = dry_run(capsys, words)
    assert options(script)["account"] == "my_group"


def test_a_sweep_is_one_array_of_named_runs(capsys, words, tmp_path, monkeypatch, no_plan):
    words = [*words, "--sweep", "optim.lr=1e-3,2e-3", "data.seed=1,2"]
    configuration, script = dry_run(capsys, words)
    assert options(script)["array"] == "0-3%4"
    assert configuration.count("# run ") == 4
    monkeypatch.setenv("PATH", slurm_stub(tmp_path, "echo Submitted batch job 4711"))
    assert submit.main(words) == 0
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["tiny", *(f"tiny-lr{lr}-seed{seed}" for lr in ("1e-3", "2e-3") for seed in (1, 2))]
    (line,) = (tmp_path / "runs/tiny-lr2e-3-seed1/jobs.jsonl").read_text().splitlines()
    assert json.loads(line)["job"] == "4711_2"


def test_a_sweep_is_checked_as_a_whole_before_any_is_queued(words, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", slurm_stub(tmp_path, f"touch {tmp_path}/queued; echo Submitted batch job 1"))
    with pytest.raises(UserError, match=r"fewer than train.global_batch=128"):
        submit.main([*words, "--sweep", "train.global_batch=16,128"])
    assert not (tmp_path / "queued").exists()


def test_a_dry_run_does_without_the_data_and_leaves_nothing_behind(capsys, words, tmp_path):
    assert submit.main([*words, "data.train=/nowhere", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "#SBATCH" in printed.out
    assert printed.err.startswith("note: submitted from here it would be refused: data.train: no shards match /nowhere")
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_shows_exactly_what_sbatch_gets(capsys, words, tmp_path, monkeypatch, no_plan):
    words = [*words, "--nodes", "2", "--gpus", "4", "--partition", "long"]
    _, script = dry_run(capsys, words)
    monkeypatch.setenv("PATH", slurm_stub(tmp_path, f'cp "$1" {tmp_path}/got; echo Submitted batch job 4711'))
    assert submit.main(words) == 0
    (snapshot,) = (tmp_path / "runs/tiny/code").iterdir()  # a dry run takes none
    assert (tmp_path / "got").read_text() == script.removesuffix("\n").replace("/code/HASH/", f"/code/{snapshot.name}/")
    said = capsys.readouterr().out
    assert "job 4711" in said
    assert f"{tmp_path}/runs/tiny/submitit/4711_0_log.out" in said
    assert (tmp_path / "runs/tiny/submitit/4711_submitted.pkl").is_file()


def test_the_refusal_of_sbatch_is_passed_on(words, tmp_path, monkeypatch, no_plan):
    refuse = 'echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1'
    monkeypatch.setenv("PATH", slurm_stub(tmp_path, refuse))
    with pytest.raises(UserError, match=r"^sbatch refused the job: .*invalid partition specified: nowhere$"):
        submit.main([*words, "--partition", "nowhere"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nodes", "3", "--gpus", "8"], "train.global_batch=16 .* 24 ranks"),
        (["optim.lrr=1"], "Did you mean"),
        (["--slurm", "reservation"], "--slurm reservation: expected KEY=VALUE"),
        (["--sweep", "optim.lrr=1,2"], "Did you mean"),
        (["data.train=nowhere"], "data.train: no shards match nowhere"),
        (["data.val=nowhere"], "data.val: no shards match nowhere"),
        (["train.global_batch=128"], "70 samples, fewer than train.global_batch=128"),
        (["model.name=RN51"], "model.name=RN51: .*RN50"),
        (["run.root=/dev/null"], "run folder /dev/null/tiny"),
        (["--cluster", "local", "--nodes", "2"], "launch.nodes=2: --cluster local"),
        ([], "no srun on PATH"),
    ],
)
def test_refused_before_submission(words, more, message, no_plan):
    with pytest.raises(UserError, match=message):
        submit.main([*words, *more])


def test_the_plan_is_shown_alone_on_demand_and_in_short_before_the_queue(capsys, words, tmp_path, monkeypatch):
    assert submit.main([*words, "data.train=/nowhere", "--plan"]) == 0
    printed = capsys.readouterr()
    assert "parameters" in printed.out
    assert printed.err.startswith("note: data.train: no shards match /nowhere")
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("PATH", slurm_stub(tmp_path, f"touch {tmp_path}/queued; echo Submitted batch job 4711"))
    with pytest.raises(UserError, match=r"needs about .* GB"):
        submit.main([*words, "launch.device_gb=0.001"])
    assert not (tmp_path / "queued").exists()
    assert submit.main(words) == 0
    said = capsys.readouterr().out
    assert said.index("parameters") < said.index("job 4711")


def test_without_config_and_shards_the_command_that_makes_them_is_named(tmp_path, monkeypatch):
    """As at the repository's root; a copy of the recipe, because shards may lie in the checkout."""
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/flickr8k_rn50.yaml", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data.train: no shards match data/flickr8k/train.*tools/shard_flickr8k.py"):
        submit.main(["--nodes", "2", "--gpus", "8"])


def test_every_rank_gets_the_environment_of_a_launcher(monkeypatch):
    given = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "31234567",
        "SLURM_NTASKS": "16",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
        "SLURM_CPUS_PER_TASK": "6",
    }
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "PATH")
    for name in (*names, "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the rank sets is undone
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    rank.set_environment()
    assert [os.environ[name] for name in names[:6]] == ["11", "16", "3", "8", "8", "gpu07"]
    assert os.environ["MASTER_PORT"] == "24567"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    rank.set_environment()
    assert os.environ["MASTER_PORT"] == str(10000 + (31234567 + 7919) % 20000)
    assert os.environ["PATH"].startswith(str(Path(sys.executable).parent))
    assert os.environ["PYTHONPATH"].startswith(str(ROOT))
    assert os.environ["OMP_NUM_THREADS"] == "6"


def test_the_port_is_free_for_users_whatever_the_job_is_called():
    assert all(10000 <= rank.rendezvous_port(job, 3) < 30000 for job in ("1", "29999", "99999999", "123_45"))


def test_every_start_of_a_job_has_another_port():
    assert len({rank.rendezvous_port("4711", restarts) for restarts in range(1000)}) == 1000
    near = [rank.rendezvous_port(str(job), restarts) for job in range(4711, 4811) for restarts in range(8)]
    assert len(set(near)) == len(near)  # nor does it meet the next jobs'


def test_local_trains_with_one_process_per_rank(capsys, words, tmp_path, no_plan):
    assert submit.main([*words, "--cluster", "local", "train.steps=1", "--gpus", "2"]) == 0
    run, said = tmp_path / "runs/tiny", capsys.readouterr().out
    assert said.endswith(f"done: {run}\n")
    assert "step 1/1" in said
    checkpoint = run / "checkpoints/step-00000001"
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    assert json.loads((run / "environment.json").read_text())["command"][0] == "launch/submit.py"


def test_the_template_gives_every_rank_the_same_environment(tmp_path):
    """slurm/train.sbatch under stand-ins for srun and scontrol, with a stand-in for the trainer."""
    shown = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS"
    stubs = {
        "scontrol": 'echo gpu07; echo gpu08; test "$3" = "gpu[07-08]"',
        "srun": 'shift 3; for n in 0 11; do SLURM_PROCID=$n SLURM_LOCALID=$((n % 8)) "$@"; done',
        "python": f'echo {shown} "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}{os.pathsep}{os.defpath}",
        "PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_ID": "31234567",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
    }
    command = ["bash", str(ROOT / "slurm/train.sbatch"), "--config", "a b.yaml", "optim.lr=1"]
    ended = subprocess.run(command, env=given, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    words = "clipdist/train.py --config a b.yaml optim.lr=1"
    port = rank.rendezvous_port("31234567", 0)
    assert ended.stdout.splitlines() == [f"0 0 16 8 gpu07:{port} 6 {words}", f"11 3 16 8 gpu07:{port} 6 {words}"]
    again = subprocess.run(command, env=given | {"SLURM_RESTART_COUNT": "2"}, capture_output=True, text=True)
    assert f"gpu07:{rank.rendezvous_port('31234567', 2)} " in again.stdout
