"""One rank of the gradient proof: every cell of the test, one after another in the same processes.

Reads cells {"label", "config", "steps", "texts", "teacher", "compiled", "loss", "only_valid"} as JSON from the file
named first. Rank 0 writes the audit's rows, each with its cell's label and the engine's own reported norm, to the file
named second.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

from clipdist import config
from clipdist.config import load_config
from clipdist.config.stages import plan_stages
from clipdist.data.batch import CAPTION, IMAGE, Batch, pair_batch
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine import setup
from clipdist.evals import audit
from clipdist.evals.audit import Audit
from clipdist.models.build import build_model
from clipdist.models.fewer_patches import kept_of
from clipdist.models.spec import ModelSpec
from clipdist.objectives import teacher
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.make import reads_image
from clipdist.objectives.objective import Objective

BATCH = 16
FIRST_STEP = 7
COMPILE = torch.compile


def make_batch(spec: ModelSpec, texts: int = 1, stage: config.Stage | None = None) -> Batch:
    """A global batch with two bad rows and two pairs of equal captions, the same on every rank.

    Args:
        stage: what images, texts and patches are like; None: as the model has them.
        texts: of an image; of several some places are empty, or hold negatives, and one text belongs to two images.
    """
    draw = torch.Generator().manual_seed(5)
    (planned,) = plan_stages([stage] if stage else [], 1, spec.image_size, spec.context_length)
    side, context = planned.image_size, planned.tokens
    tokens = _texts((BATCH, context), spec, draw)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[[3, 12]] = False
    group_id = torch.arange(BATCH)
    group_id[9], group_id[14] = group_id[1], group_id[2]
    image = audit.random_images(BATCH, replace(spec.transform, size=side), draw)
    image[~valid] = 0
    if stage is not None:
        patches = (side // spec.model["vision_cfg"]["patch_size"]) ** 2
        order = torch.stack([torch.randperm(patches, generator=draw) for _ in range(BATCH)])
        chosen = order[:, : kept_of(patches, stage.patch_dropout)]
        return replace(pair_batch(image, tokens, valid, group_id), patches=chosen)
    if texts == 1:
        return pair_batch(image, tokens, valid, group_id)
    tokens = _texts((BATCH, texts, context), spec, draw)
    roles = torch.randint(0, 3, (BATCH, texts), generator=draw).to(torch.uint8)
    roles[:, 0] = CAPTION
    group_id = torch.stack([group_id + 100 * place for place in range(texts)], dim=1)
    group_id[4, 1], group_id[10, 1] = group_id[11, 0], group_id[10, 0]
    return replace(pair_batch(image, tokens, valid, group_id), roles=roles)


def _texts(shape: tuple[int, ...], spec: ModelSpec, draw: torch.Generator) -> torch.Tensor:
    """Tokens of texts of all lengths, int64 of this shape: the end of text is where the tower reads."""
    tokens = torch.randint(1, 500, shape, generator=draw)
    length = torch.randint(2, shape[-1] + 1, (*shape[:-1], 1), generator=draw)
    place = torch.arange(shape[-1])
    return tokens.where(place < length, 0).where(place != length - 1, spec.tokenizer.get("vocab_size", 512) - 1)


def make_wrong(name: str, cfg: config.Clip) -> ClipObjective:
    """Losses with a mistake that others have made: the audit must notice."""
    objective = ClipObjective(cfg)
    right = objective.function
    rank, world = dist.get_rank(), dist.get_world_size()

    def without_w(*features, **rows):  # the global loss itself: the mean of gradients then loses the factor W
        value, statistics = right(*features, **rows)
        return value / world, statistics

    def bad_rows_count(*features, valid, **rows):
        return right(*features, valid=None, **rows)

    def local_rows(images, texts, t, bias=None, *, valid, group_id, process_group=None):
        """Own rows against gathered features that carry no gradient."""
        value = torch.zeros(())
        for rows, others in ((images, texts), (texts, images)):
            rows, others = F.normalize(rows.float(), dim=1), F.normalize(others.float(), dim=1)
            parts = [torch.empty_like(others) for _ in range(world)]
            dist.all_gather(parts, others.detach().contiguous())
            labels = torch.arange(len(rows)) + rank * len(rows)
            value = value + F.cross_entropy(t.exp() * rows @ torch.cat(parts).T, labels) / 2
        return value, right(images, texts, t, bias, valid=valid, group_id=group_id)[1]

    wrong = {"without_w": without_w, "bad_rows_count": bad_rows_count, "local_rows": local_rows}
    objective.function = wrong.get(name, right)
    return objective


def allow_fp16() -> None:
    """Lets the CPU, which computes in fp16 slowly, stand for a GPU."""
    get_accelerator().is_fp16_supported = lambda: True
    for module in (audit, setup, teacher):
        module.resolve_precision = lambda wanted, device: wanted


def drawn_weights(model: str, folder: Path, rank: int) -> str:
    """NAME:FILE of a teacher whose weights are drawn here, the same on every rank; every rank has a file of its own."""
    torch.manual_seed(11)
    file = folder / f"{rank}.safetensors"
    save_file(build_model(config.Model(name=model)).state_dict(), file)
    return f"{model}:{file}"


def compile_by(backend: str) -> None:
    """Lets another backend than Inductor, which takes seconds for every block, compile what is traced."""
    if backend != "inductor":
        torch.compile = lambda function, dynamic, options: COMPILE(function, dynamic=dynamic, backend=backend)
    else:
        torch.compile = COMPILE


def with_views(batch: Batch, objectives: Sequence[Objective], has_text: bool) -> Batch:
    """The batch with the views of its objectives, drawn, too; without CLIP's where nothing reads it."""
    draw = torch.Generator().manual_seed(6)
    views = [view for objective in objectives for view in objective.views]
    drawn = {
        view.name: torch.randint(0, 256, (BATCH, 3, view.size, view.size), dtype=torch.uint8, generator=draw)
        for view in views
    }
    for image in drawn.values():
        image[~batch.valid["image"]] = 0
    own = batch.images if reads_image(objectives) else {}
    tokens = batch.tokens if has_text else batch.tokens[:, :0]
    return replace(batch, images={**own, **drawn}, tokens=tokens)


def fill_queue(audited: Audit) -> None:
    """Keys of earlier steps, so that there are negatives, and this step's keys wrap."""
    state = audited.engine.state.get("moco")
    if state:
        drawn = torch.randn(15, state["queue"].shape[1], generator=torch.Generator().manual_seed(7))
        state["queue"][: len(drawn)] = F.normalize(drawn, dim=1)
        state["pointer"].fill_(len(drawn))
        state["fill"].fill_(len(drawn))
        audited.reference.state["moco"] = dict(state)


def run_cell(cell: dict[str, Any], dist_env: DistEnv) -> list[dict[str, Any]]:
    words = []
    if backend := cell.get("compiled"):
        compile_by(backend)
    if cell.get("teacher"):
        drawn = drawn_weights(cell["teacher"], Path(cell["config"]).parent, dist_env.rank)
        words = [f"objectives.distill.teacher={drawn}"]
    cfg = load_config(cell["config"], words)
    clip = cfg.objectives.clip
    audited = Audit(cfg, dist_env, make_wrong(cell.get("loss", ""), clip) if clip else None)
    batch = make_batch(audited.spec, cell["texts"], next(iter(cfg.train.stages), None))
    batch = with_views(batch, audited.engine.objectives, audited.spec.reads_text)
    fill_queue(audited)
    if few := cell.get("only_valid"):
        valid = torch.tensor([row in few for row in range(BATCH)])
        batch = pair_batch(batch.images[IMAGE], batch.tokens, valid, batch.group_id)
    rows = []
    for number in range(FIRST_STEP, FIRST_STEP + cell.get("steps", 1)):
        for row in audited.step(batch, number):
            rows.append(asdict(row) | {"label": cell["label"], "reported": audited.reported.get(row.part, 1.0)})
    audited.close()
    return rows


def main() -> None:
    cells, out = sys.argv[1:]
    with joined_ranks("cpu") as dist_env:
        allow_fp16()
        rows = []
        with open(cells) as file:
            for cell in json.load(file):
                rows += run_cell(cell, dist_env)
                gc.freeze()  # ZeRO-3 collects garbage at its start: not for a second over what was imported, every time
        if dist_env.rank == 0:
            with open(out, "w") as file:
                json.dump(rows, file)
        deepspeed_comm.barrier()


if __name__ == "__main__":
    main()
