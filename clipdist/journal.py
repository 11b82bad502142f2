"""Log a run: progress lines, metrics.jsonl, TensorBoard, and the loggers of run.logger.

Collective methods reduce the numbers of all ranks, then rank 0 writes them.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from clipdist.checkpoint.format import EMA
from clipdist.config import Config, Data, flat, to_yaml
from clipdist.data.bad_sample import BadSample
from clipdist.data.batch import Batch
from clipdist.data.loader import HASH_MODULUS, default_threads, ids_hash
from clipdist.distributed.collectives import all_reduce_max, all_reduce_sum
from clipdist.distributed.rank import DistEnv, resolve_precision
from clipdist.engine.optim import learning_rate
from clipdist.errors import Fault, UserError
from clipdist.losses.choose import sweeps
from clipdist.monitor.bad_samples import BadSamples
from clipdist.monitor.loggers import Loggers
from clipdist.monitor.metrics import Metrics, Progress, memory_gb
from clipdist.monitor.provenance import commit, versions
from clipdist.objectives.describe import describe
from clipdist.objectives.objective import Moment
from clipdist.run_plan import RunPlan

if TYPE_CHECKING:
    from clipdist.engine.step import Engine, StepResult
    from clipdist.evals.validation import Findings, Validation
    from clipdist.models.spec import ModelSpec
    from clipdist.objectives.teacher import Teacher


class Journal:
    """Writes the logs of a run.

    Attributes:
        bad: counts samples that cannot be used.
        metrics: writes metrics.jsonl, TensorBoard and the loggers.
        progress: writes progress lines.
    """

    def __init__(self, config: Config, plan: RunPlan, dist_env: DistEnv) -> None:
        self.config, self.plan, self.dist_env = config, plan, dist_env
        self.bad = BadSamples()
        self._stage = -1  # the stage that was told last
        loggers = Loggers(config) if config.run.logger and dist_env.rank == 0 else None
        self.metrics = Metrics(config.run.dir, dist_env.rank, plan.start_step, loggers)
        self.progress = Progress(plan.steps, plan.start_step, dist_env.rank)

    def log_start(self, engine: Engine, spec: ModelSpec, loader: Any) -> None:
        """Write config.yaml and environment.json, and log the start of the run.

        Raises:
            Fault: the run folder cannot be written.
        """
        config, plan, dist_env = self.config, self.plan, self.dist_env
        if dist_env.rank == 0:
            try:
                (config.run.dir / "config.yaml").write_text(to_yaml(config))
                (config.run.dir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
            except OSError as error:
                raise Fault(
                    f"run folder {config.run.dir}: cannot be written ({error.strerror or error}); mend it, or make"
                    " room, and start again"
                ) from None
        self.metrics.settings(flat(config), to_yaml(config))
        for note in plan.notes:
            self.log(f"note: {note}")
        texts = config.objectives.read_text
        rows = "images" if config.data.several_texts or not texts else "pairs"
        parameters, trained = (sum(engine.zero.numel(trained_only).values()) for trained_only in (False, True))
        part = f" ({trained / 1e6:.2g} M trained)" if trained < parameters else ""
        self.log(
            f"{config.run.dir}: {spec.name}, {parameters / 1e6:.1f} M parameters{part}; {len(plan.catalog)} samples;"
            f" {plan.steps} steps of {plan.order.global_batch} {rows} on"
            f" {dist_env.world_size} x {dist_env.device.type}, ZeRO {config.engine.zero_stage};"
            f" {loader.memory_bytes / 1e6:.0f} MB of batches ahead on a rank"
        )
        self.log(f"data.train: {plan.catalog.contents}" + (_captions_taken(config.data) if texts else ""))
        if plan.val is not None:
            self.log(f"data.val: {plan.val.contents}; all of them are evaluated")
        lines = [describe(objective) for objective in engine.objectives]
        if any(objective.views for objective in engine.objectives):
            for line in lines:
                self.log(line)
        if engine.teacher is not None:
            self.log(_teacher_line(engine.teacher, spec))
        self.log(self._taken(spec))
        how = {"world": dist_env.world_size, "steps": plan.steps, "objectives": lines}
        if plan.resume:
            self.log(f"goes on from {plan.resume.folder}")
            self.event(plan.start_step, "restart", checkpoint=str(plan.resume.folder), **how)
        else:
            self.event(plan.start_step, "start", **how)

    def _taken(self, spec: ModelSpec) -> str:
        """Return a line on what was taken where a setting leaves it open, or another setting comes first."""
        config, plan, device = self.config, self.plan, self.dist_env.device
        train = config.train
        length = "train.samples" if train.samples else "train.steps" if train.steps else "train.epochs"
        epoch = plan.steps_per_epoch
        precision = resolve_precision(train.precision, device.type)
        parts = [f"precision {precision}"]
        if config.objectives.clip is not None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
            how = sweeps(config.objectives.clip.implementation, torch.empty(0, dtype=dtype, device=device))
            several = config.data.several_texts
            name = "tiles, as several texts an image need" if several else how.__name__.rpartition(".")[2]
            parts.append(f"loss by {name}")
            if narrower := config.objectives.clip.nested_widths(spec.embed_dim)[:-1]:
                widths = ", ".join(map(str, narrower))
                parts.append(f"mean of the losses at widths {widths} and {spec.embed_dim} (embed_dim)")
        parts += [
            f"{config.data.threads or default_threads()} decoding threads a rank",
            f"order of {plan.order.streams} streams and windows of {plan.order.window or 'a whole stream'}",
            f"length by {length}, {epoch} steps an epoch",
            f"checkpoint every {train.save_every or epoch} steps",
            f"validation every {config.eval.every or epoch} steps" if plan.val else "no retrieval in validation",
        ]
        return f"settings taken: {', '.join(parts)}"

    def log(self, text: str) -> None:
        """Print a line on rank 0."""
        self.progress.log(text)

    def event(self, step: int, event: str, **values: Any) -> None:
        """Write an event to metrics.jsonl."""
        self.metrics.write("event", step, self._samples(step), event=event, **values)

    def stage(self, step: int, number: int) -> None:
        """Tell that a stage of train.stages begins, or that the run goes on in it.

        Args:
            step: the next.
        """
        if number == self._stage or not self.config.train.stages:
            return
        self._stage, stages = number, self.plan.stages
        stage = stages[number]
        end = stages[number + 1].first if number + 1 < len(stages) else self.plan.steps
        self.log(f"stage {number + 1} of {len(stages)}, steps {stage.first + 1} to {end}: {stage}")
        if step == stage.first:
            values = {name: value for name, value in asdict(stage).items() if name != "first"}
            self.event(step + 1, "stage", number=number + 1, **values)

    def step(self, step: int, result: StepResult, batch: Batch, engine: Engine, timer: StepTimer) -> None:
        """Write the metrics of a logged step. Collective.

        Args:
            step: steps done, this one included.
        """
        values: dict[str, Any] = self._losses(result)
        for objective in engine.objectives:
            values |= objective.metrics(result.outputs, batch, result.terms[objective.name])
        steps, seconds, waited = timer.lap(step)
        if engine.moving_teacher:
            values["teacher_momentum"] = engine.moving_teacher.spec.momentum(Moment(step - 1, self.plan.steps))
        values |= {
            **{name: float(scalar) for name, scalar in engine.scalars.items()},
            "lr": learning_rate(self.config.optim, step - 1, self.plan.steps),
            **{f"grad_norm/{part}": norm for part, norm in result.grad_norms.items()},
            **{f"update_size/{part}": size for part, size in result.update_sizes.items()},
            "samples_per_s": steps * self.plan.order.global_batch / seconds,
            "wait_share": float(all_reduce_max(torch.tensor(waited / seconds, device=self.dist_env.device))),
            "bad_samples": sum(self.bad.totals.values()),
            "memory_gb": memory_gb(self.dist_env.device),
            "epoch": step / self.plan.steps_per_epoch,
            "batch_hash": self._batch_hash(batch),
        }
        self.metrics.write("train", step, self._samples(step), **values)
        bounded = {name for objective in engine.objectives for name in objective.upper_bounds}  # by those that read it
        shown = ("loss", *({"logit_scale"} & bounded), "lr", "samples_per_s", "wait_share")
        self.progress.show(step, {name: values[name] for name in shown})

    def _losses(self, result: StepResult) -> dict[str, float]:
        """Return the global loss, and its terms unless there is that of CLIP alone. Collective."""
        values = {"loss": result.value / self.dist_env.world_size}
        if [*result.terms] != ["clip"]:
            values |= {f"loss/{name}": term.sum / term.count for name, term in result.terms.items()}
        return dict(zip(values, all_reduce_sum(torch.stack(list(values.values()))).tolist()))

    def bad_samples(self, step: int, reader: Any) -> None:
        """Count and log the samples of all ranks that could not be used since the last call. Collective.

        Args:
            step: steps done.

        Raises:
            UserError: their share exceeds data.max_bad_share.
        """
        new, named = self.bad.share(self.dist_env.device)
        for sample_id, reason in named if self.dist_env.rank == 0 else ():
            where = {"shard": reader.shard_name(sample_id), "key": _key(reader, sample_id)}
            self.event(step, "bad_sample", reason=reason, **where)
        total = sum(self.bad.totals.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad.totals.items())
        if new:
            self.event(step, "bad_samples", new=new, total=total, counts=self.bad.totals)
            self.log(f"note: {new} samples could not be used, named in metrics.jsonl (in all: {reasons})")
        seen, most = self.bad.seen, self.config.data.max_bad_share
        if total > most * max(seen, min(len(self.plan.catalog), 1000)):  # the share of a few is not representative
            raise UserError(
                f"{total} of the {seen} samples since the start cannot be used ({100 * total / seen:.3g} %: {reasons}),"
                f" more than data.max_bad_share={most}; {self.config.run.dir}/metrics.jsonl names them (bad_sample)"
            )

    def validation(self, step: int, findings: Findings, validation: Validation) -> None:
        """Write the metrics and the contact sheet of a validation, on rank 0."""
        if not findings.values or self.dist_env.rank:
            return
        self.metrics.write("val", step, self._samples(step), **findings.values)
        names: tuple[str, ...] = (
            "t2i_r1",
            "t2i_r5",
            "t2i_r10",
            "i2t_r1",
            "chance",
            "zero_shot/top1",
            "knn_20",
            "knn_200",
            "probe/accuracy",
        )
        names += tuple(name for name in findings.values if re.fullmatch(r"width_\d+/t2i_r1", name))
        names += tuple(f"{EMA}{name}" for name in ("t2i_r1", "i2t_r1", "zero_shot/top1", "knn_20", "probe/accuracy"))
        shown = "  ".join(f"{name} {findings.values[name]:.2f}" for name in names if name in findings.values)
        if "candidates" in findings.values:
            images, captions = (round(findings.values[name]) for name in ("candidates", "captions"))
            shown += f"  (%, {images} images, {captions} captions; i2t counts any of an image's captions)"
        if "effective_rank" in findings.values:
            shown += f"  effective rank {findings.values['effective_rank']:.1f}"
        self.log(f"validation at step {step}: {shown.lstrip()}")
        try:
            self._show_sheet(step, findings, validation)
        except (OSError, BadSample, UserError) as error:  # temporarily unavailable storage must not end the run
            self.log(f"note: the picture sheet of step {step} is left out ({error})")

    def _show_sheet(self, step: int, findings: Findings, validation: Validation) -> None:
        """Write the contact sheet to TensorBoard and to validation.png."""
        sheet = validation.sheet(findings)
        if sheet is None:
            return
        self.metrics.image("val/retrieval", sheet, step)
        temporary = self.config.run.dir / "validation.tmp"  # on a full disk the previous sheet remains
        try:
            sheet.save(temporary, format="PNG")
            temporary.replace(self.config.run.dir / "validation.png")
        finally:
            with suppress(OSError):
                temporary.unlink()

    def finished(self) -> None:
        """Show the final results on TensorBoard."""
        self.metrics.outcome()

    def close(self) -> None:
        """Close all logs."""
        self.metrics.close()
        self.progress.close()

    def _samples(self, step: int) -> int:
        return step * self.plan.order.global_batch

    def _batch_hash(self, batch: Batch) -> str:
        """Return a hash of the sample ids and rows of the global batch, for any number of ranks. Collective."""
        own = ids_hash(batch.sample_id, self.dist_env.rank * len(batch.sample_id))
        total = all_reduce_sum(own.reshape(1).to(self.dist_env.device))
        return f"{int(total) % HASH_MODULUS:012x}"


class StepTimer:
    """Measures seconds of training and of waiting for data, without validation and checkpoints."""

    def __init__(self, loader: Any, step: int) -> None:
        self._loader, self._step = loader, step
        self._began, self._waited, self._pause = time.perf_counter(), loader.waited_s, 0.0

    def lap(self, step: int) -> tuple[int, float, float]:
        """Return (steps, seconds, seconds waited for data) since the previous lap."""
        now = time.perf_counter()
        lap = step - self._step, max(1e-9, now - self._began - self._pause), self._loader.waited_s - self._waited
        self._began, self._waited, self._pause, self._step = now, self._loader.waited_s, 0.0, step
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context."""
        began = time.perf_counter()
        yield
        self._pause += time.perf_counter() - began


def _key(reader: Any, sample_id: int) -> str:
    """Return a sample's key in its shard, or its number if the index cannot be read."""
    try:
        return reader.key(sample_id)
    except (OSError, UserError):
        return f"sample id {sample_id}"


def _captions_taken(data: Data) -> str:
    taken = {"all": "all", "first": "one", "random": "one"}.get(str(data.caption), f"{data.caption}")
    negatives = f", and {data.negatives} negatives, drawn" if data.negatives else ""
    return f"; of several a step takes {taken}: data.caption={data.caption}{negatives}"


def _teacher_line(teacher: Teacher, spec: ModelSpec) -> str:
    record, side = teacher.record, teacher.spec.image_size
    resized = f"; its images are resized from {spec.image_size} to {side} pixels" if side != spec.image_size else ""
    return f"teacher: {record['model']}, fingerprint {record['fingerprint']}, frozen{resized}"


def environment() -> dict[str, Any]:
    """Return versions, commit and command line of this process."""
    packages = ("torch", "deepspeed", "webdataset", "transformers", "timm", "open_clip_torch", "numpy")
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": versions(*packages),
    }
