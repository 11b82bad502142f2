"""Train: loop over steps, log metrics, validate and save checkpoints.

Between two steps all ranks decide together whether to stop, to save or to continue; within a step there are only the
collectives of training. "step" is a position in the data order: skipped steps count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from clipdist.checkpoint.format import Manifest
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.saver import Saver
from clipdist.config import Config, to_dict
from clipdist.config.stages import PlannedStage, stage_number
from clipdist.data.augment import View
from clipdist.data.batch import Batch
from clipdist.data.loader import Interrupted, open_loader
from clipdist.data.locked_features import LockedFeatures
from clipdist.data.order import next_position
from clipdist.data.stages import BatchStage
from clipdist.data.tokens import make_tokenizer
from clipdist.distributed.consensus import Consensus, Flags
from clipdist.distributed.rank import DistEnv
from clipdist.engine.optim import learning_rate, weight_decay
from clipdist.engine.step import Engine, StepResult
from clipdist.errors import Fault, UserError
from clipdist.evals.locked import LockedTowers
from clipdist.evals.validation import Validation
from clipdist.fault_tolerance.consistency import compare
from clipdist.fault_tolerance.guard import Guard
from clipdist.fault_tolerance.replicas import compare_replicas
from clipdist.fault_tolerance.signals import StopFlag
from clipdist.fault_tolerance.slurm import requeue
from clipdist.fault_tolerance.watchdog import Watchdog
from clipdist.journal import Journal, StepTimer
from clipdist.models.build import built_for
from clipdist.models.compiled import CompileClock, cache_folder, why_not
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.fewer_patches import allow_stages, kept_of, patches_of
from clipdist.models.load import NothingDrawn, load_trained
from clipdist.models.spec import ModelSpec
from clipdist.objectives.make import make_objectives, prepare_model, views_of_run
from clipdist.objectives.teacher import Teacher, open_teacher
from clipdist.run_plan import RunPlan

RETRY_SAVE_S = 60  # until the next attempt after a checkpoint that could not be written
LAST_SAVE_S = 20  # timeout for the checkpoint that is being written when a fault ends the run


@dataclass(frozen=True)
class Outcome:
    """Result of `Trainer.run`.

    Attributes:
        kind: how training ended.
        step: the data step that would be next.
        first_skipped: the data step to roll back to (kind "rollback").
        queued: whether the job will be requeued automatically (kind "interrupted").
    """

    kind: Literal["finished", "interrupted", "rollback"]
    step: int
    first_skipped: int = 0
    queued: bool = False


class Trainer:
    """Builds model, engine, loader, validation and checkpoint writer of one rank, and runs the training loop.

    Attributes:
        step: data steps done: the position of the next batch.
        applied: optimiser steps done.
        last_skip: why the last skipped step was skipped.
    """

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        dist_env: DistEnv,
        consensus: Consensus,
        watchdog: Watchdog,
        stop: StopFlag,
    ) -> None:
        self.config, self.plan, self.dist_env, self.consensus = config, plan, dist_env, consensus
        self.watchdog, self.stop = watchdog, stop
        state = plan.resume.manifest.state if plan.resume else {}
        self.step = plan.start_step
        self.applied = plan.resume.manifest.optimizer_step if plan.resume else 0
        torch.manual_seed(config.train.seed)
        self.objectives = make_objectives(config.objectives, plan.image_size)
        model = self._build_model()
        self.teacher = self._open_teacher(state.get("teacher"))
        self.spec, self.base = model.spec, model.base
        self.tokenizer = make_tokenizer(self.spec)
        locked, locked_val = self._locked_features(model)
        stages = [self._batch_stage(stage, model) for stage in plan.stages]
        largest = max(plan.stages, key=lambda stage: stage.image_size).image_size
        self.engine = self._build_engine(model)
        self.loader = open_loader(
            plan.catalog,
            plan.order,
            self.tokenizer if self.spec.reads_text else None,
            config.data,
            views=self._views(largest),
            stages=stages,
            images_only=any("text" not in objective.modalities for objective in self.objectives),
            rank=dist_env.rank,
            world=dist_env.world_size,
            start=self.step,
            skipped=plan.skipped,
            locked=locked,
            pin=dist_env.device.type == "cuda",
        )
        widths = config.objectives.clip.nested_widths(self.spec.embed_dim) if config.objectives.clip else ()
        self.validation = Validation(
            config.eval,
            config.data,
            plan.val,
            self.tokenizer,
            self.spec.transform,
            dist_env,
            locked_val,
            widths[:-1],
            has_text=self.spec.has_text,
        )
        self.guard = Guard(config.guard, state.get("guard"))
        self.last_skip = ""
        window = config.guard.window if config.guard.patience else 0
        keep = RetentionPolicy(config.train.keep, config.train.keep_every, config.train.keep_best, window)
        self.saver = Saver(config.run.dir, keep, dist_env.rank, consensus.shared_token(), config.data.retry_s)
        self.saver.prepare(*self.engine.save_numel(trained_only=self.base is not None))
        self.engine.before_update = self.saver.wait_copied
        watchdog.linger = self._wait_for_writer
        self.journal = Journal(config, plan, dist_env)
        own = plan.resume is not None and plan.resume.folder.resolve().parent.parent == config.run.dir.resolve()
        self._saved_step = self.step if own else -1  # of this run's newest checkpoint; -1: none, or it failed
        self._save_interval_start = self.step
        self._save_deadline = self._deadline(60 * config.train.save_minutes)
        # A step is saved before it is validated: a resumed run may have to repeat its validation.
        self._validated_at = int(consensus.broadcast(str(self.journal.metrics.validated_at)))
        self._newest_metrics: dict[str, float] = {}  # of the validation at step _validated_at

    def _open_teacher(self, saved: dict[str, str] | None) -> Teacher | None:
        """Load the teacher, the same on all ranks and the one that the checkpoint names. Collective if there is one."""
        teacher = open_teacher(self.config, self.dist_env, saved)
        if teacher is not None:
            compare({"teacher": teacher.record["fingerprint"]}, self.dist_env)
        return teacher

    def _build_model(self) -> DualEncoder:
        """Build the model on this rank's device, with new weights or those of the checkpoint."""
        config, resume = self.config, self.plan.resume
        # Adapters are put on their base, which is built as at the start; other checkpoints hold the whole model.
        whole = resume is not None and not config.model.lora
        restored = ModelSpec.from_dict(resume.manifest.state["model"]) if resume and whole else None
        with NothingDrawn() if whole else nullcontext():
            model = built_for(config, restored)
        train = config.train
        smallest = min(stage.image_size for stage in self.plan.stages)
        if train.stages:
            allow_stages(model, self.plan.stages)
        prepare_model(model, self.objectives)
        rows = train.micro_batch or train.global_batch // self.dist_env.world_size
        model.check_rows(config.model.batchnorm_group or rows, smallest)
        if resume:
            load_trained(model, resume.folder, resume.manifest, config.data.retry_s)
        return model.to(self.dist_env.device)

    def _views(self, image_size: int) -> list[View]:
        """Return the views of an image that the objectives need."""
        return views_of_run(self.objectives, self.config.data, image_size, self.spec.transform)

    def _batch_stage(self, stage: PlannedStage, model: DualEncoder) -> BatchStage:
        """Return what the loader makes of a stage."""
        tokenizer = self.tokenizer if self.spec.reads_text else None
        if tokenizer and stage.tokens < self.spec.context_length:
            tokenizer = make_tokenizer(replace(self.spec, context_length=stage.tokens))
        views, patches = self._views(stage.image_size), patches_of(model.visual, stage.image_size)
        return BatchStage(stage.first, views, tokenizer, patches, kept_of(patches, stage.patch_dropout))

    def _build_engine(self, model: DualEncoder) -> Engine:
        settings = self.config.engine
        if settings.compile and (reason := why_not(self.dist_env.device)):
            settings = replace(settings, compile=False)
            if self.dist_env.local_rank == 0:
                print(f"note: engine.compile=true, but nothing can be compiled: {reason}; the run goes on without")
        model.prepare(settings)
        self.compiling = CompileClock(self.watchdog.progress) if settings.compile else None
        engine = Engine(model, self.objectives, self.config, self.dist_env, self.teacher, self.plan.steps)
        if self.plan.resume:
            engine.restore(self.plan.resume)
        return engine

    def _locked_features(self, model: DualEncoder) -> tuple[dict[str, LockedFeatures], dict[str, LockedFeatures]]:
        """Return the features of locked towers for the training and the validation shards, as configured. Collective.

        If a signal interrupts this, `self.incomplete` is set.
        """
        self.incomplete = False
        if not self.config.data.cache_features:
            return {}, {}

        def tick() -> None:
            self.watchdog.progress()
            if self.stop.set:
                raise Interrupted

        def log(line: str) -> None:
            if self.dist_env.rank == 0:
                print(line, flush=True)

        towers = LockedTowers(model, self.tokenizer, self.config.data, self.dist_env, tick, log)
        with self.watchdog.phase("features of locked towers"):
            found = [towers.features(catalog) if catalog else {} for catalog in (self.plan.catalog, self.plan.val)]
        self.incomplete = None in found
        return found[0] or {}, found[1] or {}

    def run(self) -> Outcome:
        """Train until the end, a signal, or a rollback.

        Raises:
            Fault: data cannot be read, loss or gradients are not finite, ranks differ, or the last save failed.
        """
        try:
            with self.watchdog.phase("between steps"):
                return self._loop()
        except UserError:
            self._wait_for_writer(LAST_SAVE_S)
            self.journal.close()
            raise

    def _loop(self) -> Outcome:
        self.journal.log_start(self.engine, self.spec, self.loader)
        pixels = f"mean {list(self.spec.image_mean)}, deviation {list(self.spec.image_std)}"
        self.journal.log(f"images in evaluation: {self.spec.transform}; {pixels}")
        timer = StepTimer(self.loader, self.step)
        while self._next_step() < self.plan.steps:
            batch, fault = self._next_batch()
            flags = self._exchange_flags(fault)
            if flags.trouble is not None:
                self._stop_on_fault(flags.trouble, fault)
            if flags.stop:
                return self._stop_on_signal()
            with timer.paused():
                self._between_steps(flags)
            assert batch is not None
            self._train(batch, timer)
            if self.guard.rollback_start is not None:
                return Outcome("rollback", self.step, self.guard.rollback_start)
        self._finish()
        return Outcome("finished", self.step)

    def _next_step(self) -> int:
        """Advance past the data steps that a rollback skips. Return the next step."""
        self.step = next_position(self.step, self.plan.skipped)
        return self.step

    # One step

    def _next_batch(self) -> tuple[Batch | None, Fault | None]:
        """Return the batch of this step, or (None, None) after a signal, or (None, the fault of the loader)."""
        if self.incomplete:  # the signal that interrupted the start is about to end the run
            return None, None
        with self.watchdog.phase("data"):
            try:
                return self.loader.next(interrupted=lambda: self.stop.set).to(self.dist_env.device), None
            except Interrupted:
                return None, None
            except UserError as error:  # of a file that was valid when the run started
                return None, Fault(str(error))

    def _exchange_flags(self, fault: Fault | None) -> Flags:
        """Exchange the state of all ranks and return the common flags. Collective."""
        with self.watchdog.phase("waiting for the other ranks"):
            return self.consensus.agree(
                stop=self.stop.set,
                trouble=fault is not None,
                overdue=self.dist_env.rank == 0 and time.monotonic() > self._save_deadline,
                busy=self.saver.busy,
                failed=bool(self.saver.failed),
            )

    def _train(self, batch: Batch, timer: StepTimer) -> None:
        """Train one step, log it, and compare replicas if due."""
        stage = stage_number(self.plan.stages, self.step)
        self.journal.stage(self.step, stage)
        self.guard.enter_stage(stage)
        self.journal.bad.add(len(batch), batch.bad)
        done = self.step + 1
        log = done % self.config.train.log_every == 0 or done == self.plan.steps
        with self.watchdog.phase("step" if self.step > self.plan.start_step else "first step (compiles)"):
            result = self._train_step(batch, want_norms=log)
        self._log_compilation(done)
        self.step = done
        self.applied += result.applied
        self.watchdog.progress(done)
        self.journal.progress.step(done)
        if log:
            self.journal.bad_samples(done, self.loader.reader)
        if not result.applied:
            self.last_skip = result.skipped
            self.journal.event(done, "skip", reason=result.skipped)
            self.journal.log(f"note: data step {done - 1} is left out: {result.skipped or 'the gradients overflow'}")
        elif log:
            self.journal.step(done, result, batch, self.engine, timer)
        if self._is_due_every(self.config.train.compare_every):
            with self.watchdog.phase("comparison of the ranks"):
                compare_replicas(self.engine, self.dist_env, done)

    def _train_step(self, batch: Batch, want_norms: bool) -> StepResult:
        return self.engine.train_step(
            batch,
            step=self.step,
            lr=learning_rate(self.config.optim, self.step, self.plan.steps),
            weight_decay=weight_decay(self.config.optim, self.step, self.plan.steps),
            want_norms=want_norms,
            guard=self.guard,
        )

    def _log_compilation(self, step: int) -> None:
        """Log what was compiled in a step on rank 0: all in the first, later what a new shape needs."""
        count, seconds = self.compiling.lap() if self.compiling else (0, 0.0)
        if count:
            self.journal.log(
                f"step {step}: {seconds:.1f} s for {count} compilations of the towers' blocks, kept in {cache_folder()}"
            )

    def _is_due_every(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`; 0: never."""
        return every > 0 and self.step % every == 0

    # Between steps: validation, checkpoints

    def _between_steps(self, flags: Flags) -> None:
        """Save and validate if due, equally on all ranks.

        Save first, so that an interruption of the validation loses no steps; except with train.keep_best, which needs
        the metrics.
        """
        parts: list[Callable[[], None]] = [lambda: self._save_if_due(flags), self._validate_if_due]
        for part in reversed(parts) if self.config.train.keep_best else parts:
            part()

    def _validate_if_due(self) -> None:
        if self._due(self.config.eval.every, self._validated_at):
            self._validate()

    def _due(self, every: int, last: int) -> bool:
        """Return whether a multiple of `every` steps (0: of an epoch) was reached since step `last`."""
        every = every or self.plan.steps_per_epoch
        return self.step // every > last // every

    def _validate(self) -> None:
        with self.watchdog.phase("validation"):
            encoder = _WatchedEncoder(self.engine, self.watchdog)
            findings = self.validation.run(encoder)
            if self.engine.ema:
                with self.engine.averaged():
                    findings = findings.with_average(self.validation.run(encoder))
        best = self.config.train.keep_best
        if best and self.dist_env.rank == 0 and best not in findings.values:
            names = ", ".join(findings.values) or "nothing (data.val and eval.labelled are empty)"
            raise UserError(f"train.keep_best={best}: validation does not measure it; it measures {names}")
        self._validated_at = self.step
        self._newest_metrics = findings.values
        self.journal.validation(self.step, findings, self.validation)

    def _save_if_due(self, flags: Flags) -> None:
        """Start a checkpoint if due; postpone it while another is being written, unless this step must be kept."""
        if flags.failed and self._saved_step >= 0:
            self._report_failed_save()
        due = flags.overdue or self._due(self.config.train.save_every, self._save_interval_start)
        if not (due or self._may_be_best()) or self._save_interval_start == self.step:
            return
        if not flags.busy or self._keeps_this_step():
            self._save()

    def _may_be_best(self) -> bool:
        """Return whether this step was validated for train.keep_best."""
        return bool(self.config.train.keep_best) and self._validated_at == self.step

    def _keeps_this_step(self) -> bool:
        """Return whether the retention policy would keep a checkpoint of this step, but not of the next."""
        return self._may_be_best() or self._is_due_every(self.config.train.keep_every)

    def _save(self) -> None:
        """Start to write a checkpoint of this step."""
        manifest = Manifest(
            step=self.step,
            optimizer_step=self.applied,
            samples=self.step * self.plan.order.global_batch,
            world=self.dist_env.world_size,
            config=to_dict(self.config),
            order=self.plan.order_record,
            skipped=self.plan.skipped,
            state={
                "scaler": self.engine.zero.scaler_state(),
                "model": self.spec.to_dict(),
                **({"base": asdict(self.base)} if self.base else {}),
                **({"teacher": self.teacher.record} if self.teacher else {}),
                "guard": self.guard.state(),
                "metrics": self._newest_metrics if self._validated_at == self.step else {},
            },
        )
        with self.watchdog.phase("checkpoint"):
            live = self.engine.live_pieces(trained_only=self.base is not None)
            self.saver.save(list(live), list(self.engine.zero.buffer_pieces()), manifest)
        self._saved_step = self._save_interval_start = self.step
        self._save_deadline = self._deadline(60 * self.config.train.save_minutes)

    @staticmethod
    def _deadline(seconds: float) -> float:
        return time.monotonic() + (seconds or math.inf)

    def _report_failed_save(self) -> None:
        """Log that a checkpoint could not be written, and schedule the next attempt."""
        reason = self.consensus.first_text(self.saver.failed)
        self.journal.event(self.step, "save_failed", reason=reason)
        self.journal.log(f"note: a checkpoint could not be written ({reason}); the run goes on")
        self._save_deadline = self._deadline(RETRY_SAVE_S)
        self._saved_step = -1

    # The end of the run

    def _stop_on_signal(self) -> Outcome:
        """Save, log the signal, and requeue the job if it was requested."""
        reason = self.consensus.first_text(self.stop.reason)
        self.journal.log(f"{reason}: writing a checkpoint at step {self.step}")
        self._save_last()
        self.journal.event(self.step, "interrupted", reason=reason)
        queued = self.dist_env.rank == 0 and requeue(reason)  # before any rank exits
        self.close()
        return Outcome("interrupted", self.step, queued=queued)

    def _stop_on_fault(self, rank: int, fault: Fault | None) -> None:
        """Save, then raise the fault of `rank`, the first that cannot continue, on all ranks."""
        reason = self.consensus.broadcast(
            f"rank {rank}: {fault}" if self.dist_env.world_size > 1 else str(fault), source=rank
        )
        try:
            self._save_last()
        except Fault as second:
            raise Fault(f"{reason}; {second}") from None
        raise Fault(f"{reason}; the checkpoint of step {self.step} was written: the same command goes on from there")

    def _finish(self) -> None:
        """Validate and save the last step, and close."""
        if self._validated_at != self.step:
            self._validate()
        self._save_last()
        self.journal.finished()
        self.close()

    def _save_last(self) -> None:
        """Write a checkpoint of this step, if there is none, and wait until it is complete on all ranks. Collective.

        Raises:
            Fault: it could not be written.
        """
        with self.watchdog.phase("checkpoint"):
            written = self._saved_step == self.step and self._wait_saved()
            if not written:
                self._save()
                written = self._wait_saved()
        if not written:
            reason = self.consensus.first_text(self.saver.failed)
            raise Fault(f"run folder {self.config.run.dir}: no checkpoint of step {self.step} ({reason})")

    def _wait_saved(self) -> bool:
        """Wait until the last save has ended on all ranks. Return whether it succeeded on all. Collective."""
        with suppress(Fault):
            self.saver.wait()
        return self.consensus.all(not self.saver.failed)

    def close(self) -> None:
        """Stop threads and close files, after the checkpoint that is being written. Collective."""
        self._wait_saved()
        self.watchdog.linger = None  # it references this trainer, whose engine would stay in memory
        self.loader.close()
        self.journal.close()
        if self.compiling:
            self.compiling.close()

    def _wait_for_writer(self, seconds: float) -> None:
        """Wait for the checkpoint writer before the process is killed."""
        with suppress(Exception):
            self.saver.wait(seconds)


class _WatchedEncoder:
    """An encoder that reports progress to the watchdog, since validation may take long."""

    def __init__(self, engine: Engine, watchdog: Watchdog) -> None:
        self._engine, self._watchdog = engine, watchdog

    def encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        self.progress()
        return self._engine.encode(image, tokens)

    def encode_hidden(self, image: Tensor) -> Tensor:
        self.progress()
        return self._engine.encode_hidden(image)

    def logit_scale(self) -> float:
        return self._engine.logit_scale()

    def progress(self) -> None:
        self._watchdog.progress()
