"""Predict the memory of one rank, part by part, at the moment of a step that needs the most.

A step has five moments that may be the fullest: the start of the backward pass, when activations are alive; the
reduction of the gradients, when DeepSpeed holds them and a flat copy; the optimiser's step, when it makes fp32
gradients of its own partition; before them, the forward pass of a teacher, if there is one; and, after them, the update
of a teacher that follows the weights. What DeepSpeed allocates was read in its source (0.19.8:
runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py, fp16/unfused_optimizer.py, engine.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipdist.engine.muon import ROUND
from clipdist.estimate.activations import Activations

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size where engine.deepspeed says nothing
PERSISTENT = 100_000  # elements up to which stage 3 leaves a parameter whole
LIVE = 1_000_000_000  # elements that stage 3 keeps gathered
PREFETCH = 50_000_000  # elements that stage 3 gathers ahead
CUDA_OVERHEAD = 1_000_000_000  # assumed: context, NCCL, cuBLAS workspaces, the allocator's rounding
CPU_OVERHEAD = 58_000_000  # measured: growth of a process that trains a model of 0.1 M parameters, without TOKENIZER
TOKENIZER = 37_000_000  # measured on a CPU: the byte-pair encoding's tables
WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS = "weights", "gradients", "optimiser", "DeepSpeed's buffers"
ACTIVATIONS, FEATURES, TILES, BATCH = "activations", "features", "loss tiles", "batch"
TEACHER, STATE = "teacher", "state of objectives"
OVERHEAD = "framework"
PARTS = (WEIGHTS, TEACHER, STATE, GRADIENTS, OPTIMIZER, BUFFERS, ACTIVATIONS, FEATURES, TILES, BATCH, OVERHEAD)
MOMENTS = ("backward pass", "reduction", "optimiser step", "teacher's pass", "teacher's update")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, in elements unless said otherwise."""

    trained: int
    locked: int
    small: int  # of the parameters that stage 3 does not divide
    buffer_bytes: int
    width: int  # of the features
    matrices: int = 0  # of the trained: those that Muon updates, which have one moment
    moments: int = 2  # that the optimiser keeps of a trained parameter
    taught: int = 0  # of the parameters that a teacher which follows the weights has, too; 0: there is none
    taught_trained: int = 0  # of them, those that train
    gathered: int = 0  # of the most whole parameters that are gathered at one time when it follows them

    @property
    def all(self) -> int:
        return self.trained + self.locked


@dataclass(frozen=True)
class StepLayout:
    """What a rank does in a step, and with which settings.

    Attributes:
        share: rows of a rank.  micro: of one forward pass.
        itemsize: bytes of a weight, an activation and a gradient: 4 in fp32, else 2.
        bucket: elements of DeepSpeed's reduce bucket.
        cpu: the rank's device; there, memory that is allocated and never written to counts for nothing.
        offload: masters, moments and average live in the host's memory.
        ema: a moving average of the weights is kept.
    """

    stage: int
    world: int
    share: int
    micro: int
    itemsize: int
    bfloat16: bool
    bucket: int
    cpu: bool
    offload: bool
    ema: bool

    @property
    def pieces(self) -> int:
        return self.share // self.micro

    @property
    def bf16_wrapper(self) -> bool:
        """Whether DeepSpeed uses its BF16_Optimizer, which keeps fp32 gradients of everything on every rank."""
        return self.stage == 1 and self.bfloat16 and self.pieces > 1 and not self.offload


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by part, at the moment that needs the most, and bytes that are offloaded to the host."""

    moment: str
    parts: dict[str, int]
    offloaded: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak_memory(
    sizes: ModelSizes, layout: StepLayout, activations: Activations, rest: dict[str, int], taught: int = 0
) -> RankMemory:
    """Return the memory at the one of the moments that needs the most.

    Args:
        rest: bytes of TEACHER (a frozen one), STATE, FEATURES, TILES, BATCH and OVERHEAD (beside the framework's own),
            which are there throughout.
        taught: bytes of the activations of a teacher's forward pass.
    """
    held = optimizer_bytes(sizes, layout)
    fixed = rest | {
        WEIGHTS: weight_bytes(sizes, layout),
        TEACHER: rest.get(TEACHER, 0) + copy_bytes(sizes, layout),
        OPTIMIZER: 0 if layout.offload else held,
        OVERHEAD: rest.get(OVERHEAD, 0) + (CPU_OVERHEAD if layout.cpu else CUDA_OVERHEAD),
    }
    of_stage = _stage_3 if layout.stage == 3 else _stages_0_to_2
    during, reduction, step = of_stage(sizes, layout, activations)
    step = step | {BUFFERS: step.get(BUFFERS, 0) + orthogonalised_bytes(sizes, layout)}
    lesson = {ACTIVATIONS: taught, BUFFERS: swapped_bytes(sizes, layout)}
    followed = {BUFFERS: 2 * 4 * sizes.gathered if layout.stage in (1, 2) else 0, STATE: 3 * rest.get(STATE, 0)}
    moments = during, reduction, step, lesson, followed if sizes.taught else {}
    found = [
        RankMemory(name, {part: (fixed | moment).get(part, 0) for part in PARTS}, held if layout.offload else 0)
        for name, moment in zip(MOMENTS, moments)
    ]
    return max(found, key=lambda memory: memory.total)


def weight_bytes(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes of parameters and buffers; in stage 3, of this rank's shares and of the small ones whole."""
    if layout.stage < 3:
        return sizes.all * layout.itemsize + sizes.buffer_bytes
    whole = sizes.small * layout.itemsize if layout.world > 1 else 0
    return -(-sizes.all // layout.world) * layout.itemsize + whole + sizes.buffer_bytes


def copy_bytes(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes of a copy of the model, which a teacher that follows the weights is at stages 0 to 2."""
    if not sizes.taught or layout.stage == 3:
        return 0
    return sizes.taught * layout.itemsize + sizes.buffer_bytes


def swapped_bytes(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes of this rank's shares, put aside at stage 3 while the teacher's run, and of gathered weights."""
    if not sizes.taught or layout.stage < 3:
        return 0
    return -(-sizes.trained // layout.world) * layout.itemsize + gathered_bytes(sizes.taught, layout)


def gathered_bytes(elements: int, layout: StepLayout) -> int:
    """Return the bytes of weights that stage 3 has gathered, or gathers ahead, in passes of so many elements."""
    if layout.world == 1:
        return 0
    return (min(elements, LIVE) + min(elements, PREFETCH)) * layout.itemsize


def optimizer_bytes(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes of fp32 masters, fp32 moments and fp32 average that this rank updates.

    In fp32 and stage 0 the weights themselves are updated and there are no masters. Stage 3 in fp32 copies them all the
    same.
    """
    ranks = 1 if layout.stage == 0 else layout.world
    stepped, one_moment = -(-sizes.trained // ranks), sizes.matrices // ranks
    masters = not (layout.itemsize == 4 and layout.stage == 0)
    return 4 * (stepped * (masters + sizes.moments + layout.ema) - one_moment)


def orthogonalised_bytes(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes of the matrices that this rank has whole in Muon's step, with those of the iteration."""
    return 6 * min(ROUND, -(-sizes.matrices // layout.world)) * (4 if layout.cpu else 2)


Moment = dict[str, int]


def _stages_0_to_2(sizes: ModelSizes, layout: StepLayout, activations: Activations) -> tuple[Moment, Moment, Moment]:
    trained, size = sizes.trained, layout.itemsize
    gradients, chunk = trained * size, min(trained, layout.bucket if layout.stage else BUCKET) * size
    bucket = 0 if layout.stage == 0 or layout.bf16_wrapper else layout.bucket * size
    summed = _kept_between_micro_batches(sizes, layout)
    empty = chunk if layout.cpu else bucket  # of the bucket, pages that were never written to are no memory on a CPU
    if layout.stage == 2:
        # Gradients move into the bucket as they come.
        during = {ACTIVATIONS: activations.peak, GRADIENTS: summed, BUFFERS: bucket}
        if layout.cpu:
            during = _gradients_as_they_come(activations) | {BUFFERS: summed}
        reduction = {GRADIENTS: summed, BUFFERS: empty + chunk}
    else:
        during = _gradients_as_they_come(activations)
        if layout.pieces > 1:  # from the second micro-batch on all of them are there from the start
            during = {ACTIVATIONS: activations.peak, GRADIENTS: summed + (gradients if layout.itemsize == 2 else 0)}
        during |= {BUFFERS: 0 if layout.cpu else bucket}
        reduction = {GRADIENTS: gradients, BUFFERS: chunk}
        if layout.stage == 1 and not layout.cpu:
            reduction[BUFFERS] = bucket
        if layout.bf16_wrapper:
            reduction = {GRADIENTS: summed + gradients, BUFFERS: summed + trained * 2}
    return during, reduction, {GRADIENTS: _gradients_of_step(sizes, layout)}


def _gradients_as_they_come(activations: Activations) -> Moment:
    """Return a backward pass in which every gradient stays once it is complete."""
    return {
        ACTIVATIONS: activations.peak,
        GRADIENTS: activations.peak_with_gradients - activations.peak,
    }


def _kept_between_micro_batches(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes in which gradients of several micro-batches are accumulated."""
    if layout.pieces == 1:
        return 0
    return sizes.trained * 4 if layout.stage < 2 else -(-sizes.trained // layout.world) * 4


def _gradients_of_step(sizes: ModelSizes, layout: StepLayout) -> int:
    """Return the bytes of gradients in the optimiser's step: as reduced, flattened, and in fp32."""
    trained, size = sizes.trained, layout.itemsize
    if layout.stage == 0:
        return trained * (4 if size == 4 else 2 + 4)
    if layout.offload:
        return 0
    if layout.bf16_wrapper:
        return trained * (4 + 2)
    share = -(-trained // layout.world)
    if size == 2 and layout.pieces > 1:
        return share * 4  # one flat fp32 buffer from the start
    return share * (8 if size == 4 else 2 + 2 + 4)


def _stage_3(sizes: ModelSizes, layout: StepLayout, activations: Activations) -> tuple[Moment, Moment, Moment]:
    trained, size = sizes.trained, layout.itemsize
    share = -(-trained // layout.world)
    chunk = min(trained, layout.bucket) * size
    bucket = chunk if layout.cpu else layout.bucket * size  # allocated once and for all
    wide = 4 if layout.pieces > 1 else size
    kept = 0 if layout.offload else share * wide
    gathered = gathered_bytes(sizes.all, layout)
    during = {ACTIVATIONS: activations.peak, GRADIENTS: kept, BUFFERS: bucket + gathered}
    reduction = {GRADIENTS: kept, BUFFERS: bucket + chunk}
    flat = 0 if layout.offload else share * (4 if wide == 4 else 2 + 4)
    return during, reduction, {GRADIENTS: kept + flat, BUFFERS: bucket}


def by_stage(
    sizes: ModelSizes, layout: StepLayout, activations: Activations, rest: dict[str, int], taught: int = 0
) -> dict[int, RankMemory]:
    """Return the memory under every ZeRO stage; stage 0 has no offloading."""
    layouts = [replace(layout, stage=stage, offload=layout.offload and stage > 0) for stage in range(4)]
    return {one.stage: peak_memory(sizes, one, activations, rest, taught) for one in layouts}
