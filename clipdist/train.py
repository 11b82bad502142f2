"""Trains a dual encoder: a configuration in, a run folder out. Reading order is the data flow.

deepspeed clipdist/train.py --config configs/flickr8k_rn50.yaml optim.lr=1e-3
torchrun --nproc-per-node 2 clipdist/train.py ...
python clipdist/train.py ...                       one process, no launcher
"""

from __future__ import annotations

import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # a launcher puts clipdist/ itself first on the path, where data/ and loss/ would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import fcntl
import json
import os
import platform
import secrets
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import IO, TYPE_CHECKING, Any

from clipdist.config import DEFAULT_RECIPE, Config, flat, load_config, to_dict, to_yaml
from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.monitor.provenance import commit
from clipdist.plan import Plan, make_plan

if TYPE_CHECKING:
    import torch

    from clipdist.data.loader import Batch
    from clipdist.engine.engine import StepResult

EXAMPLE = """examples:
  python clipdist/train.py --config configs/flickr8k_vit_tiny.yaml
  deepspeed --num_accelerators 2 clipdist/train.py --config configs/demo.yaml optim.lr=2e-3 run.name=faster
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Trains a dual encoder (CLIP) with the exact global contrastive batch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    return train(config, command_line(sys.argv[1:] if argv is None else argv))


def command_line(words: list[str]) -> str:
    """The command that goes on with this run, with the launcher that started it."""
    by_deepspeed = any(word.startswith("--local_rank") for word in words)
    words = [word for word in words if not word.startswith("--local_rank")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    elif by_deepspeed:
        launcher = ["deepspeed", "--num_accelerators", os.environ["WORLD_SIZE"]]
    else:
        launcher = ["python"]
    return shlex.join([*launcher, "clipdist/train.py", *words])


def train(config: Config, resume_command: str = "") -> int:
    """Trains as configured, from the newest good checkpoint where there is one.

    Returns:
        0, or 75 where a signal ended the run after a checkpoint.

    Raises:
        UserError: bad input; before any model is built where that can be known then.
    """
    from clipdist.engine import distributed

    device = distributed.resolve_device(config.device)
    distributed.resolve_precision(config.train.precision, device)
    plan = make_plan(config, distributed.world_size())
    if plan.start_step >= plan.steps:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{config.run.dir}: finished at step {plan.start_step}; for more, raise train.epochs or train.steps")
        return 0
    stop = StopFlag()
    place = distributed.start(device)
    try:
        return Trainer(config, plan, place).run(stop, resume_command)
    finally:
        stop.restore()
        distributed.stop()


class StopFlag:
    """Set by SIGTERM and Ctrl-C; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.set = False
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: Any) -> None:
        self.set = True
        signal.signal(number, self._before[signal.Signals(number)])  # the same signal again ends the process at once

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """One process of a run: builds the parts, then steps, logs, validates and saves."""

    def __init__(self, config: Config, plan: Plan, place: Any) -> None:
        import torch

        from clipdist.data.loader import open_loader
        from clipdist.data.tokens import make_tokenizer
        from clipdist.engine.saver import Saver
        from clipdist.evals.validation import Validation
        from clipdist.monitor.bad_samples import BadSamples
        from clipdist.monitor.metrics import Metrics, Progress

        self.config, self.plan, self.place = config, plan, place
        self.lock = lock_run_folder(config.run.dir) if place.rank == 0 else None
        self.step = plan.start_step  # steps done: the position of the next batch
        self.applied = plan.resume.manifest.optimizer_step if plan.resume else 0
        self.results: dict[str, float] = {}
        torch.manual_seed(config.train.seed)
        self.engine, self.spec = self._build_engine()
        self.tokenizer = make_tokenizer(self.spec)
        self.loader = open_loader(
            plan.catalog,
            plan.order,
            self.tokenizer,
            config.data,
            image_size=self.spec.image_size,
            rank=place.rank,
            world=place.world,
            start=self.step,
            pin=place.device.type == "cuda",
        )
        self.validation = Validation(config.eval, config.data, plan.val, self.tokenizer, self.spec.image_size, place)
        self.bad = BadSamples()
        self.saver = Saver(config.run.dir, config.train.keep, place.rank, self._shared_token())
        self.metrics = Metrics(config.run.dir, place.rank, self.step)
        self.progress = Progress(plan.steps, self.step, place.rank)

    def _build_engine(self) -> tuple[Any, Any]:
        from clipdist.checkpoint import load_full_weights
        from clipdist.engine.engine import Engine
        from clipdist.engine.saver import restore
        from clipdist.loss.make import make_loss
        from clipdist.model.dual_encoder import build_model
        from clipdist.model.spec import ModelSpec

        config, resume = self.config, self.plan.resume
        restored = ModelSpec.from_dict(resume.manifest.state["model"]) if resume else None
        model = build_model(config.model, config.loss, restored=restored)
        if resume:
            _load(model, load_full_weights(resume.folder), str(resume.folder))
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        engine = Engine(model.to(self.place.device), make_loss(config.loss), config, self.place)
        if resume:
            restore(engine.engine, resume)
            engine.refresh_scalars()
        return engine, model.spec

    def run(self, stop: StopFlag, resume_command: str) -> int:
        """The loop. Returns the exit code."""
        self._announce()
        clock = Clock(self.loader, self.step)
        while self.step < self.plan.steps:
            batch = self.loader.next().to(self.place.device)
            self.bad.add(batch.bad)
            done = self.step + 1
            log = done % self.config.train.log_every == 0 or done == self.plan.steps
            result = self._train_step(batch, want_norms=log)
            self.step = done
            self.applied += result.applied
            self.progress.step(done)
            if log:
                self._report_bad()
            if log and not result.skipped:
                self._log(result, batch, clock)
            if not result.applied:
                self._event("skip", reason=result.skipped or "non-finite gradients")
            last = done == self.plan.steps
            with clock.paused():
                interrupted = self._any_rank(stop.set)
                if last or (self._due(self.config.eval.every) and not interrupted):
                    self._validate()
                if last or interrupted or self._due(self.config.train.save_every):
                    self._save()
            if interrupted and not last:
                return self._leave_interrupted(resume_command)
        self._finish()
        return 0

    def _train_step(self, batch: Batch, want_norms: bool) -> StepResult:
        from clipdist.engine.optim import learning_rate

        return self.engine.train_step(
            batch.image,
            batch.tokens,
            batch.valid,
            self._group_id(batch),
            step=self.step,
            lr=learning_rate(self.config.optim, self.step, self.plan.steps),
            want_norms=want_norms,
        )

    def _group_id(self, batch: Batch) -> torch.Tensor | None:
        return batch.group_id if self.config.loss.group_positives else None

    def _due(self, every: int) -> bool:
        return self.step % (every or self.plan.steps_per_epoch) == 0

    # What the run tells

    def _announce(self) -> None:
        config, plan, place = self.config, self.plan, self.place
        if place.rank == 0:
            config.run.dir.mkdir(parents=True, exist_ok=True)
            (config.run.dir / "config.yaml").write_text(to_yaml(config))
            (config.run.dir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        self.metrics.settings(flat(config), to_yaml(config))
        for note in plan.notes:
            self.progress.say(f"note: {note}")
        parameters = sum(
            p.ds_numel if hasattr(p, "ds_id") else p.numel() for p in self.engine.engine.module.parameters()
        )
        self.progress.say(
            f"{config.run.dir}: {self.spec.name}, {parameters / 1e6:.1f} M parameters; {len(plan.catalog)} samples;"
            f" {plan.steps} steps of {plan.order.global_batch} pairs on {place.world} x {place.device.type},"
            f" ZeRO {config.engine.zero_stage}; {self.loader.memory_bytes / 1e6:.0f} MB of batches ahead on a rank"
        )
        if plan.resume:
            self.progress.say(f"goes on from {plan.resume.folder}")
            self._event("restart", checkpoint=str(plan.resume.folder), world=place.world)

    def _log(self, result: StepResult, batch: Batch, clock: Clock) -> None:
        import torch

        from clipdist.engine.optim import learning_rate
        from clipdist.loss.collectives import all_reduce_max
        from clipdist.loss.contrastive import batch_accuracy
        from clipdist.loss.exact import global_statistics
        from clipdist.monitor.metrics import memory_gb

        accuracy = batch_accuracy(*result.features, valid=batch.valid, group_id=self._group_id(batch))
        values = global_statistics(result.value, result.statistics | accuracy)
        steps, seconds, waited = clock.lap(self.step)
        values |= {
            "logit_scale": self.engine.logit_scale(),
            **({} if (bias := self.engine.logit_bias()) is None else {"logit_bias": bias}),
            "lr": learning_rate(self.config.optim, self.step - 1, self.plan.steps),
            **{f"grad_norm/{part}": norm for part, norm in result.grad_norms.items()},
            "samples_per_s": steps * self.plan.order.global_batch / seconds,
            "wait_share": float(all_reduce_max(torch.tensor(waited / seconds, device=self.place.device))),
            "bad_samples": sum(self.bad.totals.values()),
            "memory_gb": memory_gb(self.place.device),
            "epoch": self.step / self.plan.steps_per_epoch,
        }
        self.metrics.write("train", self.step, self._samples(), **values)
        self.results |= {"loss": values["loss"]}
        shown = ("loss", "logit_scale", "lr", "samples_per_s", "wait_share")
        self.progress.show(self.step, {name: values[name] for name in shown})

    def _report_bad(self) -> None:
        """Counts and names, on rank 0, the samples that no rank could use since the last logged step."""
        new, named = self.bad.share(self.place.device)
        for sample_id, reason in named if self.place.rank == 0 else ():
            reader = self.loader.reader
            where = {"shard": reader.shard_name(sample_id), "key": reader.key(sample_id)}
            self._event("bad_sample", reason=reason, **where)
        total = sum(self.bad.totals.values())
        if new:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad.totals.items())
            self._event("bad_samples", new=new, total=total, counts=self.bad.totals)
            self.progress.say(f"note: {new} samples could not be used, named in metrics.jsonl (in all: {reasons})")
        seen = (self.step - self.plan.start_step) * self.plan.order.global_batch
        share = total / max(seen, min(len(self.plan.catalog), 1000))  # a few samples say nothing of the rest
        if share > self.config.data.max_bad_share:
            raise UserError(
                f"{100 * share:.2g} % of the samples cannot be used, more than data.max_bad_share="
                f"{self.config.data.max_bad_share}; {self.config.run.dir}/metrics.jsonl names them (event bad_sample)"
            )

    def _event(self, event: str, **values: Any) -> None:
        self.metrics.write("event", self.step, self._samples(), event=event, **values)

    def _samples(self) -> int:
        return self.step * self.plan.order.global_batch

    # Validation, checkpoints, the end

    def _validate(self) -> None:
        findings = self.validation.run(self.engine)
        if not findings.values or self.place.rank:
            return
        self.metrics.write("val", self.step, self._samples(), **findings.values)
        self.results |= findings.values
        names = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "chance", "zero_shot/top1", "probe/accuracy")
        shown = "  ".join(f"{name} {findings.values[name]:.2f}" for name in names if name in findings.values)
        self.progress.say(f"validation at step {self.step}: {shown}")
        sheet = self.validation.sheet(findings)
        if sheet is not None:
            self.metrics.picture("val/retrieval", sheet, self.step)
            sheet.save(self.config.run.dir / "validation.png")

    def _save(self) -> None:
        from clipdist.checkpoint import Manifest
        from clipdist.engine.saver import scaler_state

        manifest = Manifest(
            step=self.step,
            optimizer_step=self.applied,
            samples=self._samples(),
            world=self.place.world,
            config=to_dict(self.config),
            order=self.plan.order_record,
            state={
                "scaler": scaler_state(self.engine.engine),
                "model": self.spec.to_dict(),
            },
        )
        self.saver.save(self.engine.engine, manifest)

    def _any_rank(self, flag: bool) -> bool:
        import torch

        from clipdist.loss.collectives import all_reduce_sum

        return bool(all_reduce_sum(torch.tensor([float(flag)], device=self.place.device)).item())

    def _shared_token(self) -> str:
        """A random token, the same on all ranks."""
        import torch

        from clipdist.loss.collectives import all_reduce_sum

        drawn = secrets.randbits(60) if self.place.rank == 0 else 0
        return f"{int(all_reduce_sum(torch.tensor([drawn], device=self.place.device))):x}"

    def _close(self) -> None:
        self.saver.wait()
        self._any_rank(False)  # all parts are on disk before any rank leaves
        self.loader.close()
        self.metrics.close()
        self.progress.close()

    def _leave_interrupted(self, resume_command: str) -> int:
        self._event("interrupted")
        self._close()
        self.progress.say(f"interrupted at step {self.step}, checkpoint written; go on with: {resume_command}")
        return EXIT_INTERRUPTED

    def _finish(self) -> None:
        self.metrics.outcome(self.results)
        self._close()
        self.progress.say(f"finished {self.plan.steps} steps; see {self.config.run.dir}, tensorboard --logdir runs")


def lock_run_folder(folder: Path) -> IO[str]:
    """Holds the run folder until the returned file is closed or the process ends.

    Raises:
        UserError: another run holds it.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115  held for the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run folder {folder}: another run is writing to it; choose another run.name") from None
    except OSError:
        pass  # a file system without locks
    return file


class Clock:
    """Seconds of training and of waiting for data; validation and checkpoints stop it."""

    def __init__(self, loader: Any, step: int) -> None:
        self._loader, self._step = loader, step
        self._began, self._waited, self._pause = time.perf_counter(), loader.waited_s, 0.0

    def lap(self, step: int) -> tuple[int, float, float]:
        """(steps, seconds, seconds waited) since the lap before."""
        now = time.perf_counter()
        lap = step - self._step, max(1e-9, now - self._began - self._pause), self._loader.waited_s - self._waited
        self._began, self._waited, self._pause, self._step = now, self._loader.waited_s, 0.0, step
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._pause += time.perf_counter() - began


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{where}: a checkpoint of another model ({str(error).splitlines()[-1].strip()})") from None
    if missing or unexpected:
        raise UserError(f"{where}: a checkpoint of another model ({(missing + unexpected)[0]} does not fit)")


def environment() -> dict[str, Any]:
    """Versions, commit and command line of this process."""
    packages = ("clipdist", "torch", "deepspeed", "webdataset", "transformers", "timm", "open_clip_torch", "numpy")
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    run_main(main)
