"""Run the main job on data that it makes itself: images, shards, a trained model, results, summary.json."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.evals import front

ROOT = Path(__file__).resolve().parents[1]
# Relative to ROOT, where every step runs; configs/demo.yaml names the same folders.
DATA, RUN = "runs/demo-data", "runs/demo"
SHARDS = f"{DATA}/shards"
SENTENCE = "four pink circles to the right of a big red heart"
RANKS = 2
EXAMPLE = """examples:
  python tools/demo.py
  python tools/demo.py --fresh

A second run reuses the pictures, the shards and the trained model of the first."""


class StepFailed(Exception):
    """A step ended with an exit code that is not 0."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(command)
        self.command, self.code = command, code


def main() -> int:
    parser = front.make_parser(
        "Draws captioned pictures, shards them, trains a dual encoder on two CPU processes, tries it out.", EXAMPLE
    )
    parser.add_argument("--fresh", action="store_true", help=f"start over: remove {DATA} and {RUN} first")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.fresh:
        for folder in (DATA, RUN):
            shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    try:
        results = run_steps()
    except StepFailed as failure:
        return explain(failure)
    summary = summarise(results, seconds=time.monotonic() - began)
    Path(RUN, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    front.finish(arguments, summary, table(summary, results["search"]["sheet"]))
    return 0


def run_steps() -> dict[str, dict[str, Any]]:
    """Run every step. Return what those that answer in JSON said, by name."""
    steps = Steps(total=7)
    with steps.next("draw captioned pictures, and labelled ones"):
        made = steps.ask("tools/make_scenes.py", "--out", DATA)
    with steps.next("shard them"):
        # Its statistics are written last: without them an earlier run did not get to its end.
        anew = made["written"] or not Path(SHARDS, "stats.json").exists()
        steps.ask("tools/shard_flickr8k.py", f"{DATA}/scenes", "--out", SHARDS, *(["--overwrite"] if anew else []))
    with steps.next(f"train on {RANKS} CPU processes"):
        steps.launch("clipdist/train.py", "--config", "configs/demo.yaml")
    with steps.next("retrieval among held-out pictures"):
        retrieval = steps.ask("tools/eval_retrieval.py", RUN, f"{SHARDS}/test")
    with steps.next("answer a sentence with held-out pictures"):
        search = steps.ask("tools/search_images.py", RUN, f"{SHARDS}/test", SENTENCE)
    with steps.next("one linear layer on the frozen image tower"):
        probe = steps.ask("tools/probe_cifar10.py", RUN, "--data", f"{DATA}/labelled")
    with steps.next("all of it on one page"):
        steps.ask("tools/report.py", RUN)
    return {"retrieval": retrieval, "search": search, "probe": probe}


class Steps:
    """Run commands one after another and tell what it runs and how long a step took."""

    def __init__(self, total: int) -> None:
        self._total, self._number = total, 0
        self._bin = Path(sys.executable).parent  # not resolved: a virtual environment's python is a link out of it
        # No accelerator and one thread per process: the same on every machine. More threads would compete with those
        # that decode, and with the other rank.
        self._env = os.environ | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for work halve the speed of a machine that has other work
        }

    @contextmanager
    def next(self, title: str) -> Iterator[None]:
        self._number += 1
        print(f"\n[{self._number}/{self._total}] {title}", flush=True)
        began = time.monotonic()
        yield
        print(f"      {time.monotonic() - began:.1f} s", flush=True)

    def ask(self, *words: str) -> dict[str, Any]:
        """Run one of the tools with --json, show what it prints but for that last line, and return it."""
        shown = shlex.join(["python", *words, "--json"])
        last = ""
        with self._started(shown, [sys.executable, *words, "--json"], subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(last, end="", flush=True)
                last = line
        if process.returncode == 0:
            try:
                return json.loads(last)
            except ValueError:
                pass
        print(last, end="", flush=True)
        raise StepFailed(shown, process.returncode or 1)

    def launch(self, *words: str) -> None:
        """Run a program on RANKS processes through DeepSpeed's launcher."""
        launcher = self._bin / "deepspeed"
        if not launcher.exists():
            raise UserError(f"{launcher}: no such file; install the project into this environment (make install)")
        options = ["--num_accelerators", str(RANKS), "--master_port", str(free_port()), "--log_level", "error"]
        shown = shlex.join(["deepspeed", *options, *words])
        with self._started(shown, [str(launcher), *options, *words]) as process:
            process.wait()
        if process.returncode != 0:
            raise StepFailed(shown, process.returncode)

    @contextmanager
    def _started(self, shown: str, command: list[str], stdout: int | None = None) -> Iterator[subprocess.Popen]:
        """Start a command. Ctrl-C reaches it directly, and it decides what is left to do; SIGTERM is handed on."""
        print(f"$ {shown}", flush=True)
        process = subprocess.Popen(command, env=self._env, stdout=stdout, text=True)
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: terminate_tree(process.pid)),
        }
        try:
            with process:
                yield process
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def terminate_tree(pid: int) -> None:
    """Send SIGTERM to a process and all below it: DeepSpeed's launcher would end without telling the ranks."""
    import psutil

    top = psutil.Process(pid)
    for process in [*top.children(recursive=True), top]:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def explain(failure: StepFailed) -> int:
    """Say which command failed. Return its exit code; 128 + the signal's number where one ended it, as shells do."""
    code = failure.code if failure.code > 0 else 128 - failure.code
    if code in (EXIT_INTERRUPTED, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        hint = "interrupted; the same command goes on from here"
    else:
        hint = "to start over: python tools/demo.py --fresh"
    print(f"error: exit code {code} from: {failure.command} ({hint})", file=sys.stderr)
    return code


def summarise(results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the content of summary.json, flat; rates and accuracies are percentages."""
    from clipdist.checkpoint.format import newest_checkpoint
    from clipdist.report.history import RECALLS

    retrieval = results["retrieval"]
    recalls = {name: round(retrieval[name], 2) for name in RECALLS}
    samples, train_seconds = training_time(Path(RUN, "metrics.jsonl"))
    return recalls | {
        "candidates": int(retrieval["candidates"]),
        "chance": round(retrieval["chance"], 4),
        "probe_accuracy": round(results["probe"]["accuracy"], 2),
        "probe_protocol": results["probe"]["protocol"],
        "samples_per_s": round(samples / train_seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "seconds": round(seconds, 1),
        "checkpoint": str(newest_checkpoint(RUN)),
    }


def training_time(metrics: Path) -> tuple[int, float]:
    """Return (samples, seconds) of all training steps in metrics.jsonl, validation and checkpoints not included."""
    samples, seconds = 0, 0.0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["type"] == "train":
            seconds += (record["samples"] - samples) / record["samples_per_s"]
            samples = record["samples"]
    return samples, seconds


def table(summary: dict[str, Any], sheet: str) -> list[str]:
    programs = os.path.relpath(Path(sys.executable).parent)  # of a virtual environment that may not be activated
    rows = {"text to image": [summary[f"t2i_r{k}"] for k in (1, 5, 10)]}
    rows["image to text"] = [summary[f"i2t_r{k}"] for k in (1, 5, 10)]
    rows["chance"] = [summary["chance"] * k for k in (1, 5, 10)]
    return [
        f"\nRetrieval among {summary['candidates']} held-out pictures, percent",
        f"  {'':<16}{'R@1':>7}{'R@5':>7}{'R@10':>7}",
        *(f"  {title:<16}{one:7.1f}{five:7.1f}{ten:7.1f}" for title, (one, five, ten) in rows.items()),
        f"Linear probe on colours  {summary['probe_accuracy']:.1f} % (chance 10.0)",
        f"  {summary['probe_protocol']}",
        f"Training                 {summary['samples_per_s']:.0f} samples/s, {summary['train_seconds']:.0f} s",
        f"This demo                {summary['seconds']:.0f} s",
        "Where to look",
        f"  the sentence's pictures:  {sheet}",
        f"  curves, picture sheets:   {programs}/tensorboard --logdir runs",
        f"  all of it on a page:      {RUN}/report.html",
        f"  the run folder:           {RUN}, checkpoint {summary['checkpoint']}",
        f"  these numbers:            {RUN}/summary.json",
        "Ask yourself",
        f'  {programs}/python tools/search_images.py {RUN} {SHARDS}/test "three black rings over a big blue heart"',
    ]


if __name__ == "__main__":
    run_main(main)
