"""A frozen teacher: how the configuration names it, and what it gives for the rows of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist import config
from clipdist.data.batch import IMAGE, Batch
from clipdist.data.tokens import make_tokenizer
from clipdist.data.transform import NativeAspect
from clipdist.distributed.rank import DTYPES, DistEnv, resolve_precision
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.load import LoadedModel, describe_named, load_named
from clipdist.models.spec import ModelSpec, resolve_spec
from clipdist.objectives.objective import TEACHER

START = "start"


class Teacher:
    """A model in evaluation mode, without gradients, whole on this rank and outside of DeepSpeed.

    Its images are the student's crops, resized on the device where its image size is another (a consistent teacher:
    Beyer et al., arXiv:2106.05237, section 3.1), and normalised by its own mean and deviation.

    Args:
        name: as objectives.distill.teacher gives it.
        loaded: fp32; cast and moved in place.
        rows: of one forward pass.

    Attributes:
        spec: its description.
        record: what checkpoints keep of it: "name"; "model", as a line calls it; and "fingerprint", 16 hex digits that
            change whenever its outputs might.
    """

    def __init__(self, name: str, loaded: LoadedModel, dtype: torch.dtype, device: torch.device, rows: int) -> None:
        self.spec = loaded.model.spec
        self.record = {"name": name, "model": loaded.label, "fingerprint": loaded.fingerprint}
        assert loaded.model.logit_scale is not None  # check_teacher has seen to it
        self._log_scale = loaded.model.logit_scale.detach().cpu().clone()  # fp32, and read without a wait
        self._model = loaded.model.requires_grad_(False).eval().to(device=device, dtype=dtype)
        self._rows = rows

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return its features for all rows, and its log scale.

        Returns:
            "teacher/image": [b, E]; "teacher/text": [b, E], or [b, K, E] with several texts of an image;
            "teacher/logit_scale": fp32 [1], on the CPU.
        """
        found = [self._outputs(piece) for piece in batch.split(self._rows)]
        features = {TEACHER + name: torch.cat([one[name] for one in found]) for name in (IMAGE, "text")}
        return features | {f"{TEACHER}logit_scale": self._log_scale}

    def _outputs(self, batch: Batch) -> dict[str, Tensor]:
        images, side = batch.images[IMAGE], self.spec.image_size
        if images.dim() == 4 and images.shape[-1] != side:  # else patches, or what its locked tower gave
            resized = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
            images = resized.round_().clamp_(0, 255).to(torch.uint8)
        return self._model(image=images, tokens=batch.tokens)


def check_teacher(distill: config.Distill, model: config.Model) -> ModelSpec:
    """Return the description of the teacher, after a look whether it fits the student. Reads no weights.

    Raises:
        UserError: there is none of that name, its tokenizer is another, or its features have another width.
    """
    where = f"objectives.distill.teacher={distill.teacher}"
    student = resolve_spec(model)
    if distill.teacher == START:
        return student
    try:
        teacher = describe_named(distill.teacher)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    teacher.require_text(where, "distillation")
    if teacher.context_length != student.context_length:
        raise UserError(
            f"{where}: takes {teacher.context_length} tokens of a text, {student.name} takes {student.context_length};"
            " set text_cfg.context_length of the model JSON to the teacher's"
        )
    if make_tokenizer(teacher).fingerprint() != make_tokenizer(student).fingerprint():
        raise UserError(
            f"{where}: has another tokenizer than {student.name}, and would read its token ids as other words; take"
            " a teacher or a model with the tokenizer of the other"
        )
    own, theirs = student.transform, teacher.transform
    if isinstance(own, NativeAspect) and not (isinstance(theirs, NativeAspect) and theirs.patch == own.patch):
        raise UserError(
            f"{where}: takes no images at their own aspect ratio in patches of {own.patch} pixels, as {student.name}"
            " does; take a teacher that does, or leave out the budget of patches"
        )
    if distill.target == "features" and teacher.embed_dim != student.embed_dim:
        raise UserError(
            f"{where}: has {teacher.embed_dim} features, {student.name} has {student.embed_dim}; set"
            " objectives.distill.target=logits, or another embed_dim in the model JSON"
        )
    return teacher


def open_teacher(cfg: config.Config, dist_env: DistEnv, saved: dict[str, str] | None = None) -> Teacher | None:
    """Load the teacher of a run in its precision; None: the run has none. torch's generators stay as they are.

    The start is always what model.weights gives, never a checkpoint; of a model with LoRA it is the base.

    Args:
        saved: Teacher.record in the checkpoint that the run goes on from.

    Raises:
        UserError: it cannot be loaded, or is no longer the one that the checkpoint names.
    """
    distill = cfg.objectives.distill
    if distill is None:
        return None
    where = f"objectives.distill.teacher={distill.teacher}"
    try:
        with torch.random.fork_rng(devices=[]):
            loaded = _start(cfg) if distill.teacher == START else load_named(distill.teacher, cfg.model.trust_weights)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if saved and saved["name"] == distill.teacher and saved["fingerprint"] != loaded.fingerprint:
        raise UserError(
            f"{where}: not the teacher that the checkpoint was trained with (fingerprint {loaded.fingerprint}, there"
            f" {saved['fingerprint']}); put its weights back, or name the teacher's checkpoint instead of its run"
        )
    dtype = DTYPES[resolve_precision(cfg.train.precision, dist_env.device.type)]
    rows = cfg.train.micro_batch or cfg.train.global_batch // dist_env.world_size
    return Teacher(distill.teacher, loaded, dtype, dist_env.device, rows)


def _start(cfg: config.Config) -> LoadedModel:
    """Return the model with the weights that model.weights names."""
    model = build_model(replace(cfg.model, lora=None), cfg.objectives.clip).eval()
    label = f"the start, {cfg.model.name} with {cfg.model.weights}"
    return LoadedModel(model, make_tokenizer(model.spec), label, run_dir=None, step=None)
