"""Wrap a DeepSpeed engine: one interface to weights, moments and gradients for every ZeRO stage and precision.

No other file uses DeepSpeed's internals (a test checks that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipdist.checkpoint.format import Piece
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.config import Config
from clipdist.distributed.collectives import all_reduce_sum
from clipdist.distributed.rank import DistEnv
from clipdist.engine.fragment import Fragment
from clipdist.engine.layerwise import Lamb, Sgd
from clipdist.engine.muon import Muon
from clipdist.engine.optim import make_optimizer
from clipdist.engine.setup import deepspeed_config, prepare_deepspeed
from clipdist.engine.step_rules import StepRules
from clipdist.engine.tensor_norms import TensorNorms
from clipdist.errors import UserError
from clipdist.models.dual_encoder import HEADS

MOMENTS = ("exp_avg", "exp_avg_sq")
GATHERED = 8  # whole parameters at one time
_COUNTERS = ("global_steps", "micro_steps", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Zero:
    """A model and its optimiser in a DeepSpeed engine.

    Args:
        model: on its device, fp32.
        held: by parameter name, such as heads.dino.last_layer.weight, how many optimiser steps leave the parameter as
            it is, weights and moments, without decay. Steps that are left out do not count. The first step that
            changes the parameter is the first of its moments, with the bias correction of step 1: torch's AdamW, too,
            counts only steps with a gradient.

    Attributes:
        stage: the ZeRO stage.
        fp16: whether gradients are multiplied by a loss scale.
        device: of the model.

    Raises:
        UserError: DeepSpeed refuses engine.deepspeed.
    """

    def __init__(
        self, model: nn.Module, config: Config, dist_env: DistEnv, held: Mapping[str, int] | None = None
    ) -> None:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError
        from pydantic import ValidationError

        prepare_deepspeed()
        settings = deepspeed_config(config, dist_env.device.type, dist_env.world_size)
        offload = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
        optimizer = make_optimizer(model, config.optim, cpu_offload=offload == "cpu", held=held)
        half = settings["bf16"]["enabled"] or settings["fp16"]["enabled"]
        originals = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()} if half else {}
        if half:  # DeepSpeed casts no buffers, but timm's towers add constants to weights: the model casts itself
            model.to(torch.bfloat16 if settings["bf16"]["enabled"] else torch.float16)
        try:
            self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"engine.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
        self.stage: int = self._deepspeed.zero_optimization_stage()
        self.fp16: bool = self._deepspeed.fp16_enabled()
        self.device: torch.device = self._deepspeed.device
        self._base_optimizer.state.clear()  # of a step at construction: see make_optimizer
        norms = TensorNorms(self.fragments(), self.numel(trained_only=True))
        if isinstance(optimizer, Muon):
            optimizer.attach(self.fragments())
        elif isinstance(optimizer, Sgd | Lamb):
            optimizer.attach(norms)
        self._held = held or {}
        self._rules = StepRules(norms, config.optim.clip_each)
        for one in self._optimizers:
            self._rules.govern(one)
        self._set_masters(originals)
        # DeepSpeed at stage 0 in half precision accumulates in half precision: see accumulate.
        self._accumulates_in_fp32 = bool(half) and self.stage == 0
        scaler = self._scaler
        if hasattr(scaler, "raise_error_at_min_scale"):  # the guard handles overflows at the lowest scale
            scaler.raise_error_at_min_scale = False

    @property
    def module(self) -> Any:
        """The model, with weights in the precision of the run; at stage 3 they exist during a forward pass only."""
        return self._deepspeed.module

    def numel(self, trained_only: bool = False) -> dict[str, int]:
        """Return the number of elements of every whole parameter, by name."""
        named = self.module.named_parameters()
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in named if p.requires_grad or not trained_only}

    def close(self) -> None:
        """Release the memory, which DeepSpeed's hooks on the weights hold. At stage 3 some of it stays allocated."""
        for optimizer in self._optimizers:
            self._rules.release(optimizer)
        self._deepspeed.destroy()

    # One step

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode."""
        self._deepspeed.train(mode)

    def set_rates(self, lr: float, weight_decay: float | None = None) -> None:
        """Set the learning rate of all parameter groups, `lr` times a group's own factor, and the weight decay.

        Args:
            weight_decay: of the groups that decay; None: as it is.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if weight_decay is not None and group["decays"]:
                group["weight_decay"] = weight_decay

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Return the outputs of the model."""
        return self._deepspeed(**inputs)

    def backward(self, value: Tensor) -> None:
        """Run DeepSpeed's backward pass with the loss scale that its step divides by.

        DeepSpeed 0.19.8 in fp16 at stage 0 divides by it without multiplying (upstream PR 8393): the gradient of
        `value` is set to the scale here.
        """
        if self.fp16 and self.stage == 0:
            scale = self.loss_scale
            value.register_hook(lambda gradient: torch.full_like(gradient, scale))
        self._deepspeed.backward(value, scale_wrt_gas=False)

    def accumulate(self, value: Tensor, last: bool) -> None:
        """Run one micro-batch's backward pass and accumulate its gradients in fp32; reduce over ranks after the last.

        DeepSpeed accumulates in fp32 except at stage 0 in half precision, where this function keeps the sums and
        assigns them before the reduction.

        Args:
            value: of this micro-batch.
            last: whether it is the last micro-batch of the step.
        """
        engine = self._deepspeed
        if not self._accumulates_in_fp32:
            self.backward(value)
            if not last:
                engine.step()  # counts the micro-batch; the optimiser steps at the boundary alone
            return
        engine.set_gradient_accumulation_boundary(False)
        self.backward(value)
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                total = getattr(parameter, "_fp32_sum", None)
                parameter._fp32_sum = parameter.grad.float() if total is None else total.add_(parameter.grad)
                parameter.grad = None
        if last:
            for parameter in engine.module.parameters():
                total = parameter.__dict__.pop("_fp32_sum", None)
                if total is not None:
                    parameter.grad = total.to(parameter.dtype)
            engine.set_gradient_accumulation_boundary(True)
            engine.allreduce_gradients()

    def step(self) -> bool:
        """Take an optimiser step. Return False if it was skipped because gradients overflowed (fp16)."""
        self._deepspeed.step()
        applied = self._deepspeed.was_step_applied()
        self._rules.steps += applied
        return applied

    def discard_gradients(self) -> None:
        """Discard the gradients of a step by DeepSpeed's step function with an optimiser that does nothing.

        Every stage then clears its gradients, buffers and counters as after any step, and copies unchanged master
        weights. (If DeepSpeed itself finds the gradients not finite, it skips the step in the same way.)
        """
        self._rules.discarding = True
        try:
            self._deepspeed.step()
        finally:
            self._rules.discarding = False

    # Weights, moments, gradients

    def fragments(self) -> Iterator[Fragment]:
        """Iterate over all fragments of this rank, in the module's order of parameters."""
        masters = self._half_precision_masters()
        for name, parameter in self.module.named_parameters():
            if hasattr(parameter, "ds_id"):
                yield from self._stage_3(name, parameter)
            elif parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
                yield from self._stage_1_2(name, parameter)
            else:
                yield _replicated(name, parameter, masters.get(id(parameter), parameter))

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return the optimiser's moments of a fragment by the names in MOMENTS, 1-D; empty before its first step."""
        state = self._base_optimizer.state.get(fragment.flat) or {}
        return {moment: fragment.of(state[moment]) for moment in MOMENTS if moment in state}

    def _moment_names(self, fragment: Fragment) -> tuple[str, ...]:
        optimizer = self._base_optimizer
        one = isinstance(optimizer, Sgd) or (isinstance(optimizer, Muon) and fragment.name in optimizer.parameters)
        return MOMENTS[:1] if one else MOMENTS

    def optimizer_steps(self, name: str) -> int:
        """Return how many steps the optimiser has taken with a parameter: fewer than others where it was held."""
        return max(0, self._rules.steps - self._held.get(name, 0))

    def gradient(self, fragment: Fragment) -> Tensor:
        """Return the reduced gradient of a trained fragment, 1-D, loss scale included; valid from backward to step."""
        parameter = fragment.parameter
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_grad

            return safe_get_local_grad(parameter).view(-1)[: fragment.numel]
        if hasattr(parameter, "_hp_mapping"):
            piece = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
            if piece.device.type != self.device.type:  # offloaded, and DeepSpeed waits for the copies in its step only
                torch.cuda.synchronize(self.device)
            if piece.numel() != fragment.numel:  # bf16 stage 1 with accumulation keeps whole gradients on every rank
                piece = piece.narrow(0, fragment.start, fragment.numel)
            return piece
        if parameter.grad is None:
            return torch.zeros(fragment.numel, device=parameter.device)
        return parameter.grad.view(-1)

    @torch.no_grad()
    def scalars(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the fp32 master weights of parameters with one element, [1], on every rank. Collective."""
        return self.gather(lambda fragment: fragment.master, names)

    def gather(self, read: Callable[[Fragment], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole tensors of parameters from the fragments of all ranks, fp32 [numel] on every rank. Collective.

        Args:
            read: returns the elements of a fragment, 1-D.
        """
        parameters = (self.module.get_parameter(name) for name in names)
        sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
        flat = torch.zeros(sum(sizes), device=self.device)
        whole = dict(zip(names, flat.split(sizes)))
        for fragment in self.fragments():
            if fragment.name in whole:
                start, stop = fragment.own
                whole[fragment.name][start:stop] = read(fragment)[start - fragment.start : stop - fragment.start]
        return dict(zip(names, all_reduce_sum(flat).split(sizes)))

    @torch.no_grad()
    def clamp(self, name: str, maximum: float) -> None:
        """Bound a parameter's fp32 master weights and the module's weights: either would overwrite the other."""
        for fragment in self.fragments():
            if fragment.name == name:
                fragment.master.clamp_(max=maximum)
        parameter = self.module.get_parameter(name)
        # Stage 3 keeps small parameters gathered beside their partition, and uses both.
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data.clamp_(max=maximum)

    @contextmanager
    @torch.no_grad()
    def computing_with(self, read: Callable[[Fragment], Tensor]) -> Iterator[None]:
        """Let the module compute with other weights inside the context, and then with its own, to the bit. Collective.

        Its own weights, in the precision of the run, are copied and put back: do not train inside.

        Args:
            read: returns the other weights of a trained fragment, 1-D.
        """
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._partition_all()
        held = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in trained.values()]
        own = [tensor.clone() for tensor in held]
        if self.stage == 3:
            for fragment in self.fragments():
                if fragment.trained:
                    fragment.parameter.ds_tensor.detach().narrow(0, 0, fragment.numel).copy_(read(fragment))
        else:
            names = list(trained)
            for first in range(0, len(names), GATHERED):
                for name, whole in self.gather(read, names[first : first + GATHERED]).items():
                    trained[name].detach().copy_(whole.view_as(trained[name]))
        try:
            yield
        finally:
            self._partition_all()
            torch._foreach_copy_(held, own)

    def _partition_all(self) -> None:
        """Release what stage 3 keeps gathered beside its partitions."""
        if self.stage == 3:
            self._deepspeed.optimizer.empty_partition_cache()

    @property
    def loss_scale(self) -> float:
        """Of fp16; 1 in other precisions."""
        return float(getattr(self._scaler, "cur_scale", 1.0))

    @property
    def loss_scale_is_lowest(self) -> bool:
        """Whether fp16's loss scale is at its minimum; True in other precisions, which have none."""
        scaler = self._scaler
        lowest = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None)
        return lowest is None or self.loss_scale <= float(lowest)

    # Checkpoints, and the comparison of ranks

    def live_pieces(self, trained_only: bool = False) -> Iterator[Piece]:
        """Iterate over this rank's checkpoint pieces of fp32 weights and moments: views, valid until step()."""
        for fragment in self.fragments():
            first, last = fragment.own
            if first == last or (trained_only and not fragment.trained):
                continue
            own = slice(first - fragment.start, last - fragment.start)
            tensors = {"param": fragment.master} | (self.moments(fragment) if fragment.trained else {})
            for kind, tensor in tensors.items():
                yield Piece(f"{kind}/{fragment.name}", fragment.shape, first, tensor[own])

    def buffer_pieces(self) -> Iterator[Piece]:
        """Iterate over copies of the buffers, on rank 0 only: the next forward pass may change them."""
        parameters = {name for name, _ in self.module.named_parameters()}
        for name, buffer in self.module.state_dict().items() if dist.get_rank() == 0 else ():
            if name not in parameters:
                dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
                copy = buffer.detach().to("cpu", dtype, copy=True).reshape(-1)
                yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, copy)

    def save_numel(self, trained_only: bool = False) -> tuple[int, bool]:
        """Return the number of elements of live_pieces() once moments exist, and whether they are on a GPU."""
        locked = 0 if trained_only else 1
        copies = ((f, 1 + len(self._moment_names(f)) if f.trained else locked) for f in self.fragments())
        sizes = [(f.own[1] - f.own[0]) * number for f, number in copies]
        return sum(sizes), any(fragment.flat.is_cuda for fragment in self.fragments())

    def scaler_state(self) -> dict[str, float]:
        """Return fp16's loss scale and its counters; empty in other precisions."""
        return {name: getattr(self._scaler, name) for name in _SCALER if hasattr(self._scaler, name)}

    def restore(self, reader: CheckpointReader) -> None:
        """Load fp32 weights, moments and counters of a checkpoint of any rank count and ZeRO stage. Close the reader.

        The module's weights and buffers must have been loaded before this object was made.

        Raises:
            UserError: a parameter is missing or has another shape.
            Fault: the storage cannot be read.
        """
        self._rules.steps = reader.manifest.optimizer_step
        for fragment in self.fragments():
            where = f"param/{fragment.name}"
            if not fragment.trained and where not in reader.manifest.tensors and "base" in reader.manifest.state:
                continue  # of the base of adapters, which was loaded already
            if fragment.name.startswith(HEADS) and where not in reader.manifest.tensors:
                continue  # of an objective that starts anew: see train.resume_objectives
            if where not in reader.manifest.tensors or reader.shape(where) != fragment.shape:
                raise UserError(f"{reader.folder}: a checkpoint of another model ({fragment.name} does not fit)")
            reader.read_into(fragment.master, where, fragment.start)
            if fragment.trained:
                self._restore_moments(fragment, reader)
        for name, value in reader.manifest.state.get("scaler", {}).items():
            if hasattr(self._scaler, name):
                setattr(self._scaler, name, value)
        reader.close()  # open files would keep a pruned checkpoint's space on the disk

    def _restore_moments(self, fragment: Fragment, reader: CheckpointReader) -> None:
        optimizer, step = self._base_optimizer, self.optimizer_steps(fragment.name)
        if step == 0:
            optimizer.state.pop(fragment.flat, None)
            return
        state = optimizer.state[fragment.flat]
        moments = self._moment_names(fragment)
        for moment in moments:
            if moment not in state:
                state[moment] = torch.zeros_like(fragment.flat, requires_grad=False)
            saved = f"{moment}/{fragment.name}"
            if saved in reader.manifest.tensors:  # else the parameter was locked until now
                reader.read_into(fragment.of(state[moment]), saved, fragment.start)
        if moments != MOMENTS:
            return  # without a bias correction, which needs the number of steps
        # torch's fused AdamW counts steps in a tensor on the weights' device, DeepSpeed's CPU Adam in an int
        counted = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step), device=fragment.flat.device) if counted else step

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, tensor) of all tensors that are replicated on every rank, between steps.

        Stage 0: weights, fp32 masters and moments. Stages 1 and 2: the module's weights. Stage 3: the small weights
        that stay gathered. Always: buffers (BatchNorm's running statistics are averaged each step), counters and the
        loss scale.
        """
        for name, parameter in self.module.named_parameters():
            if not hasattr(parameter, "ds_id") or (parameter.ds_persist and parameter.ds_status.name == "AVAILABLE"):
                yield f"param/{name}", parameter.detach()
        for fragment in self.fragments() if self.stage == 0 else ():
            if fragment.flat is not fragment.parameter:
                yield f"master/{fragment.name}", fragment.master
            for moment, tensor in self.moments(fragment).items():
                yield f"{moment}/{fragment.name}", tensor
        for name, buffer in self.module.named_buffers():
            yield f"buffer/{name}", buffer
        for name in _COUNTERS:
            yield name, torch.tensor(int(getattr(self._deepspeed, name)))
        for name in _SCALER:
            value = getattr(self._scaler, name, None)
            if value is not None:
                yield f"loss scaler/{name}", torch.tensor(float(value))

    # DeepSpeed's internals

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimiser, and that of what offloading at stage 3 leaves on the device."""
        backup = getattr(self._deepspeed.optimizer, "backup_optimizer", None)
        return [self._base_optimizer] if backup is None else [self._base_optimizer, backup]

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without DeepSpeed's wrapper."""
        return getattr(self._deepspeed.optimizer, "optimizer", self._deepspeed.optimizer)

    @property
    def _scaler(self) -> Any:
        """The object that holds fp16's loss scale, or None."""
        optimizer = self._deepspeed.optimizer
        return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)

    @torch.no_grad()
    def _set_masters(self, originals: dict[str, Tensor]) -> None:
        """Set the fp32 masters to the original weights: DeepSpeed copies them after rounding to half precision."""
        for fragment in self.fragments():
            if fragment.trained and fragment.name in originals:
                fragment.master.copy_(originals[fragment.name].view(-1).narrow(0, fragment.start, fragment.numel))

    def _stage_3(self, name: str, parameter: Any) -> Iterator[Fragment]:
        """Yield this rank's fragment of a parameter at stage 3, if any."""
        share = parameter.ds_tensor.numel()
        start = dist.get_rank() * share
        numel = min(share, parameter.ds_numel - start)  # the last shares are padded
        if numel <= 0:
            return
        flat, offset = parameter.ds_tensor, 0
        if parameter.requires_grad:
            optimizer = self._deepspeed.optimizer
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
        shape, end = tuple(parameter.ds_shape), start + numel
        yield Fragment(name, parameter, shape, start, numel, flat, offset, parameter.requires_grad, (start, end))

    def _stage_1_2(self, name: str, parameter: Any) -> Iterator[Fragment]:
        """Yield this rank's fragment of a parameter at stage 1 or 2, if any."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return
        flat = self._base_optimizer.param_groups[mapping.param_group_index]["params"][0]
        start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        own = (start, start + numel)
        yield Fragment(name, parameter, tuple(parameter.shape), start, numel, flat, offset, True, own)

    def _half_precision_masters(self) -> dict[int, Tensor]:
        """Return {id of a parameter: its fp32 master} at stage 0 in bf16 or fp16; else {}."""
        optimizer = self._deepspeed.optimizer
        if self.stage > 0 or not hasattr(optimizer, "fp32_groups") or not hasattr(optimizer, "fp16_groups"):
            return {}
        pairs = zip(chain.from_iterable(optimizer.fp16_groups), chain.from_iterable(optimizer.fp32_groups))
        return {id(parameter): master for parameter, master in pairs}


def _replicated(name: str, parameter: nn.Parameter, master: Tensor) -> Fragment:
    """Return the fragment of a replicated parameter: all of it, of which this rank writes an equal share."""
    numel, rank, world = parameter.numel(), dist.get_rank(), dist.get_world_size()
    own = (rank * numel // world, (rank + 1) * numel // world)
    return Fragment(name, parameter, tuple(parameter.shape), 0, numel, master, 0, parameter.requires_grad, own)
