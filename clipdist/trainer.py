"""One process of a run: a configuration and a plan in; steps, metrics, validations and checkpoints out.

Between two steps all ranks settle together whether to stop, to save or to go on; within a step only the training's own
collectives run. "step" counts positions of the data order: a step that is left out has passed, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipdist.checkpoint.format import Manifest
from clipdist.checkpoint.reader import load_full_weights
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.saver import Saver
from clipdist.config import Config, to_dict
from clipdist.data.batch import Batch
from clipdist.data.loader import Interrupted, image_view, open_loader
from clipdist.data.order import next_position
from clipdist.data.tokens import make_tokenizer
from clipdist.distributed.consensus import Consensus, Flags
from clipdist.distributed.rank import DistEnv
from clipdist.engine.optim import learning_rate
from clipdist.engine.step import Engine, StepResult
from clipdist.errors import Fault, UserError
from clipdist.evals.validation import Validation
from clipdist.fault_tolerance.guard import Guard
from clipdist.fault_tolerance.replicas import compare_replicas
from clipdist.fault_tolerance.signals import StopFlag
from clipdist.fault_tolerance.slurm import requeue
from clipdist.fault_tolerance.watchdog import Watchdog
from clipdist.journal import Journal, StepTimer
from clipdist.models.dual_encoder import build_model
from clipdist.models.load import NothingDrawn
from clipdist.models.spec import ModelSpec
from clipdist.objectives.make import make_objectives
from clipdist.run_plan import RunPlan

RETRY_SAVE_S = 60  # after a checkpoint that could not be written
LAST_PARTS_S = 20  # that a run which ends in a fault waits for the checkpoint that is being written


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.run` ended.

    Attributes:
        since: of a rollback, the first data step of the trouble.
        queued: of an interruption, whether the job will be queued again by itself.
    """

    kind: Literal["finished", "interrupted", "rollback"]
    step: int
    since: int = 0
    queued: bool = False


class Trainer:
    """Builds the parts, then steps, logs, validates and saves."""

    def __init__(
        self, config: Config, plan: RunPlan, dist_env: DistEnv, consensus: Consensus, watchdog: Watchdog
    ) -> None:
        self.config, self.plan, self.dist_env, self.consensus, self.watchdog = (
            config,
            plan,
            dist_env,
            consensus,
            watchdog,
        )
        state = plan.resume.manifest.state if plan.resume else {}
        self.step = plan.start_step  # steps that have passed: the position of the next batch
        self.applied = plan.resume.manifest.optimizer_step if plan.resume else 0
        torch.manual_seed(config.train.seed)
        self.engine, self.spec = self._build_engine()
        self.tokenizer = make_tokenizer(self.spec)
        self.loader = open_loader(
            plan.catalog,
            plan.order,
            self.tokenizer,
            config.data,
            views=[image_view(config.data, self.spec.image_size)],
            images_only=any("text" not in objective.modalities for objective in self.engine.objectives),
            rank=dist_env.rank,
            world=dist_env.world_size,
            start=self.step,
            skipped=plan.skipped,
            pin=dist_env.device.type == "cuda",
        )
        self.validation = Validation(config.eval, config.data, plan.val, self.tokenizer, self.spec.image_size, dist_env)
        self.guard = Guard(config.guard, state.get("guard"))
        self.last_skip = ""  # why a step was left out
        back = config.guard.window if config.guard.patience else 0
        keep = RetentionPolicy(config.train.keep, config.train.keep_every, config.train.keep_best, back)
        self.saver = Saver(config.run.dir, keep, dist_env.rank, consensus.shared_token(), config.data.retry_s)
        self.saver.prepare(*self.engine.zero.save_numel())
        self.engine.before_update = self.saver.wait_copied
        watchdog.linger = self._linger
        self.journal = Journal(config, plan, dist_env)
        own = plan.resume is not None and plan.resume.folder.resolve().parent.parent == config.run.dir.resolve()
        self._on_disk = self.step if own else -1  # step of the newest checkpoint that this run has or tried to have
        self._save_from = self.step
        self._save_by = self._deadline(60 * config.train.save_minutes)
        # A checkpoint comes before the validation of its step, which may have been cut short.
        self._validated_at = int(consensus.broadcast(str(self.journal.metrics.validated_at)))
        self._newest_metrics: dict[str, float] = {}  # of the validation at this very step

    def _build_engine(self) -> tuple[Engine, ModelSpec]:
        config, resume = self.config, self.plan.resume
        restored = ModelSpec.from_dict(resume.manifest.state["model"]) if resume else None
        with NothingDrawn() if resume else nullcontext():
            model = build_model(config.model, config.objectives.clip, restored=restored)
        if resume:
            _load(model, load_full_weights(resume.folder, config.data.retry_s), str(resume.folder))
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        engine = Engine(model.to(self.dist_env.device), make_objectives(config.objectives), config, self.dist_env)
        if resume:
            engine.zero.restore(resume)
            engine.refresh_scalars()
        return engine, model.spec

    def run(self, stop: StopFlag) -> Outcome:
        """Trains to the end, to a signal, or to trouble that going back may heal.

        Raises:
            Fault: data that cannot be read, numbers that do not recover, ranks that differ, a last save that failed.
        """
        try:
            with self.watchdog.phase("between steps"):
                return self._loop(stop)
        except UserError as error:
            self.journal.event(self.step, "fault", error=str(error))
            self._linger(LAST_PARTS_S)
            self.journal.close()
            raise

    def _loop(self, stop: StopFlag) -> Outcome:
        self.journal.announce(self.engine, self.spec.name, self.loader)
        timer = StepTimer(self.loader, self.step)
        while self._leap() < self.plan.steps:
            batch, trouble = self._next_batch(stop)
            common = self._agree(stop, trouble)
            if common.trouble is not None:
                self._leave_in_trouble(common.trouble, trouble)
            if common.stop:
                return self._leave_interrupted(stop)
            with timer.paused():
                self._between_steps(common)
            assert batch is not None
            self._train(batch, timer)
            if self.guard.rollback_start is not None:
                return Outcome("rollback", self.step, self.guard.rollback_start)
        self._finish()
        return Outcome("finished", self.step)

    def _leap(self) -> int:
        """Passes over the data steps that are left out. Returns the step that is next."""
        self.step = next_position(self.step, self.plan.skipped)
        return self.step

    # One step

    def _next_batch(self, stop: StopFlag) -> tuple[Batch | None, Fault | None]:
        """The batch of this step; none where a signal came first, or with the reason why there will be none."""
        with self.watchdog.phase("data"):
            try:
                return self.loader.next(interrupted=lambda: stop.set).to(self.dist_env.device), None
            except Interrupted:
                return None, None
            except UserError as error:  # of a file that was good when the run began
                return None, Fault(str(error))

    def _agree(self, stop: StopFlag, trouble: Fault | None) -> Flags:
        with self.watchdog.phase("waiting for the other ranks"):
            return self.consensus.agree(
                stop=stop.set,
                trouble=trouble is not None,
                overdue=self.dist_env.rank == 0 and time.monotonic() > self._save_by,
                busy=self.saver.busy,
                failed=bool(self.saver.failed),
            )

    def _train(self, batch: Batch, timer: StepTimer) -> None:
        self.journal.bad.add(batch.bad)
        done = self.step + 1
        log = done % self.config.train.log_every == 0 or done == self.plan.steps
        with self.watchdog.phase("step" if self.step > self.plan.start_step else "first step (compiles)"):
            result = self._train_step(batch, want_norms=log)
        self.step = done
        self.applied += result.applied
        self.watchdog.progress(done)
        self.journal.progress.step(done)
        if log:
            self.journal.bad_samples(done, self.loader.reader)
        if not result.applied:
            self.last_skip = result.skipped
            self.journal.event(done, "skip", reason=result.skipped)
            self.journal.say(f"note: data step {done - 1} is left out: {result.skipped or 'the gradients overflow'}")
        elif log:
            self.journal.step(done, result, batch, self.engine, timer)
        if self._passes(self.config.train.compare_every):
            with self.watchdog.phase("comparison of the ranks"):
                compare_replicas(self.engine.zero, self.dist_env, done)

    def _train_step(self, batch: Batch, want_norms: bool) -> StepResult:
        return self.engine.train_step(
            batch,
            step=self.step,
            lr=learning_rate(self.config.optim, self.step, self.plan.steps),
            want_norms=want_norms,
            guard=self.guard,
        )

    def _passes(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # Between steps: validation, checkpoints

    def _between_steps(self, common: Flags) -> None:
        """What is due now, the same on all ranks. The checkpoint comes first, so that a validation that is cut short
        costs nothing; unless checkpoints are kept by what the validation finds."""
        parts: list[Callable[[], None]] = [lambda: self._save_if_due(common), self._validate_if_due]
        for part in reversed(parts) if self.config.train.keep_best else parts:
            part()

    def _validate_if_due(self) -> None:
        if self._due(self.config.eval.every, self._validated_at):
            self._validate()

    def _due(self, every: int, last: int) -> bool:
        """Whether a multiple of `every` steps (0: of an epoch) was reached since step `last`."""
        every = every or self.plan.steps_per_epoch
        return self.step // every > last // every

    def _validate(self) -> None:
        with self.watchdog.phase("validation"):
            findings = self.validation.run(_Watched(self.engine, self.watchdog))
        best = self.config.train.keep_best
        if best and self.dist_env.rank == 0 and best not in findings.values:
            names = ", ".join(findings.values) or "nothing (data.val and eval.labelled are empty)"
            raise UserError(f"train.keep_best={best}: validation does not measure it; it measures {names}")
        self._validated_at = self.step
        self._newest_metrics = findings.values
        self.journal.validation(self.step, findings, self.validation)

    def _save_if_due(self, common: Flags) -> None:
        if common.failed and self._on_disk >= 0:
            self._report_failed_save()
        due = common.overdue or self._due(self.config.train.save_every, self._save_from)
        if not (due or self._measured()) or self._save_from == self.step:
            return
        if not common.busy or self._stays():  # else at the next step: training does not wait for a disk
            self._save()

    def _measured(self) -> bool:
        """Whether this step may turn out to be the best."""
        return bool(self.config.train.keep_best) and self._validated_at == self.step

    def _stays(self) -> bool:
        """Whether a checkpoint of this very step is wanted: one of the next step would not be kept in its place."""
        return self._measured() or self._passes(self.config.train.keep_every)

    def _save(self) -> None:
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
                "guard": self.guard.state(),
                "metrics": self._newest_metrics if self._validated_at == self.step else {},
            },
        )
        with self.watchdog.phase("checkpoint"):
            self.saver.save(list(self.engine.zero.live_pieces()), list(self.engine.zero.buffer_pieces()), manifest)
        self._on_disk = self._save_from = self.step
        self._save_by = self._deadline(60 * self.config.train.save_minutes)

    @staticmethod
    def _deadline(seconds: float) -> float:
        return time.monotonic() + (seconds or math.inf)

    def _report_failed_save(self) -> None:
        """The run goes on without that checkpoint, and tries again a minute later."""
        reason = self.consensus.first_text(self.saver.failed)
        self.journal.event(self.step, "save_failed", reason=reason)
        self.journal.say(f"note: a checkpoint could not be written ({reason}); the run goes on")
        self._save_by = self._deadline(RETRY_SAVE_S)
        self._on_disk = -1

    # The end

    def _leave_interrupted(self, stop: StopFlag) -> Outcome:
        reason = self.consensus.first_text(stop.reason)
        self.journal.say(f"{reason}: writing a checkpoint at step {self.step}")
        self._save_last()
        self.journal.event(self.step, "interrupted", reason=reason)
        queued = self.dist_env.rank == 0 and requeue(reason)  # before any rank leaves: see there
        self.close()
        return Outcome("interrupted", self.step, queued=queued)

    def _leave_in_trouble(self, rank: int, fault: Fault | None) -> None:
        """Saves what was done so far, and ends all ranks with the reason of the first that cannot go on."""
        reason = self.consensus.broadcast(
            f"rank {rank}: {fault}" if self.dist_env.world_size > 1 else str(fault), source=rank
        )
        try:
            self._save_last()
        except Fault as second:
            raise Fault(f"{reason}; {second}") from None
        raise Fault(f"{reason}; the checkpoint of step {self.step} was written: the same command goes on from there")

    def _finish(self) -> None:
        if self._validated_at != self.step:
            self._validate()
        self._save_last()
        self.journal.finished()
        self.close()

    def _save_last(self) -> None:
        """Returns when all ranks' parts of a checkpoint of this step are on disk.

        Raises:
            Fault: they could not be written.
        """
        with self.watchdog.phase("checkpoint"):
            written = self._on_disk == self.step and self._written()
            if not written:
                self._save()
                written = self._written()
        if not written:
            reason = self.consensus.first_text(self.saver.failed)
            raise Fault(f"run folder {self.config.run.dir}: no checkpoint of step {self.step} ({reason})")

    def _written(self) -> bool:
        """Whether the last save succeeded on all ranks, once it has ended on all."""
        with suppress(Fault):
            self.saver.wait()
        return self.consensus.all(not self.saver.failed)

    def close(self) -> None:
        """Ends threads, closes files; nothing is lost of a checkpoint that is being written."""
        self._written()
        self.watchdog.linger = None  # it holds this trainer, and with it the engine, beside the next one
        self.loader.close()
        self.journal.close()

    def _linger(self, seconds: float) -> None:
        """Before a forced end: the writer may finish."""
        with suppress(Exception):
            self.saver.wait(seconds)


class _Watched:
    """An engine whose every encoding is progress: a validation may be long."""

    def __init__(self, engine: Engine, watchdog: Watchdog) -> None:
        self._engine, self._watchdog = engine, watchdog

    def encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        self._watchdog.progress()
        return self._engine.encode(image, tokens)

    def logit_scale(self) -> float:
        return self._engine.logit_scale()


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{where}: a checkpoint of another model ({str(error).splitlines()[-1].strip()})") from None
    if missing or unexpected:
        raise UserError(f"{where}: a checkpoint of another model ({(missing + unexpected)[0]} does not fit)")
