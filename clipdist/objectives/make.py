"""Make the objectives of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from clipdist import config
from clipdist.data.augment import View
from clipdist.data.batch import IMAGE
from clipdist.data.transform import EvalTransform
from clipdist.data.views import image_view
from clipdist.errors import UserError
from clipdist.models.caption_decoder import CAPTION, CoCaDecoder
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.fewer_patches import allow_sizes
from clipdist.models.image_tokens import tokens_shape
from clipdist.objectives.byol import ByolObjective
from clipdist.objectives.caption import CaptionObjective
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.dino import DinoObjective, KoLeoObjective
from clipdist.objectives.distill import DistillObjective
from clipdist.objectives.ibot import IbotObjective
from clipdist.objectives.moco import MocoObjective
from clipdist.objectives.objective import Objective
from clipdist.objectives.simclr import SimClrObjective
from clipdist.objectives.vae import VaeObjective


def make_objectives(cfg: config.Objectives, image_size: int) -> tuple[Objective, ...]:
    """Return the objectives whose sections are set.

    Args:
        image_size: of the model: that of views which say no other.
    """
    found: list[Objective] = []
    if cfg.clip is not None:
        found.append(ClipObjective(cfg.clip))
    if cfg.distill is not None:
        found.append(DistillObjective(cfg.distill))
    if cfg.simclr is not None:
        found.append(SimClrObjective(cfg.simclr, image_size))
    if cfg.moco is not None:
        found.append(MocoObjective(cfg.moco, image_size))
    if cfg.byol is not None:
        found.append(ByolObjective(cfg.byol, image_size))
    if cfg.dino is not None:
        found.append(DinoObjective(cfg.dino, image_size))
        if cfg.dino.koleo:
            found.append(KoLeoObjective(cfg.dino))
        if cfg.dino.ibot:
            found.append(IbotObjective(cfg.dino, cfg.dino.ibot, image_size))
    if cfg.vae is not None:
        found.append(VaeObjective(cfg.vae, image_size))
    if cfg.caption is not None:
        found.append(CaptionObjective(cfg.caption))
    return tuple(found)


def prepare_model(model: DualEncoder, objectives: Sequence[Objective]) -> None:
    """Put the objectives' heads behind the image tower, and let it take views of other sizes, in place.

    Weights are drawn from torch's global generator.

    Raises:
        UserError: the tower does not take a size, or what an objective needs of the model is missing.
    """
    for objective in objectives:
        objective.fit(model.spec)
    if model.spec.patch_budget and any(objective.views for objective in objectives):
        raise UserError(f"model.name={model.spec.name}: images keep their aspect ratio, and views of them are squares")
    sizes = {_setting_of(view.name): view.size for objective in objectives for view in objective.views}
    if others := {where: size for where, size in sizes.items() if size != model.spec.image_size}:
        allow_sizes(model, others)
    for objective in objectives:
        objective.adapt(model)
    viewing = any(objective.views for objective in objectives)
    width = model.hidden_width() if viewing else 0
    heads: dict[str, nn.Module | None] = {}
    for objective in objectives:
        if objective.reads_image_tokens:
            heads[objective.name] = objective.head(tokens_shape(model.visual, model.spec.image_size)[1])
        elif viewing:
            heads[objective.name] = objective.head(width)
    projects = any(IMAGE in objective.features for objective in objectives)
    if model.decoder_weights and isinstance(decoder := heads.get(CAPTION), CoCaDecoder) and model.spec.decoder:
        decoder.load_state_dict(model.decoder_weights)
    model.decoder_weights = {}
    if heads:
        model.add_heads({name: head for name, head in heads.items() if head is not None}, projects=projects)


def reads_image(objectives: Sequence[Objective]) -> bool:
    """Whether an objective reads CLIP's own view of an image: its features, or its tokens."""
    return any(IMAGE in objective.features or objective.reads_image_tokens for objective in objectives)


def views_of_run(
    objectives: Sequence[Objective], data: config.Data, image_size: int, transform: EvalTransform
) -> list[View]:
    """Return the views of an image that the objectives need, CLIP's own first.

    Args:
        image_size: of CLIP's own.
        transform: the model's in evaluation.
    """
    own = [image_view(data, image_size, transform)] if reads_image(objectives) else []
    further = [view for objective in objectives for view in objective.views]
    scaling = data.dct_scaling  # of an image, so of all its views
    return own + [replace(view, augmentation=replace(view.augmentation, dct_scaling=scaling)) for view in further]


def _setting_of(view: str) -> str:
    """Return the setting of a view's size: view NAME/0 is objectives.NAME.views[0]."""
    name, _, number = view.partition("/")
    own = "local" if name == DinoObjective.name and int(number) > 1 else f"views[{number}]"
    return f"objectives.{name}.{own}.size"
