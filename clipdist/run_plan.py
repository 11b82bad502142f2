"""Plan a run before a model is built: check data, order and length. No torch.

The launcher calls check_launch before it queues a job; every rank calls clipdist.resume.plan_start when it starts.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.config import Config
from clipdist.config.batches import check_ranks, total_steps
from clipdist.config.checks import VIEWED
from clipdist.config.load import flat, flatten
from clipdist.config.stages import PlannedStage, plan_stages
from clipdist.data.catalog import Catalog, fetcher_of
from clipdist.data.first_look import look_at
from clipdist.data.members import members_of
from clipdist.data.order import ORDER_VERSION, OrderKey, first_order, whole_parts
from clipdist.errors import UserError, require_extra
from clipdist.fault_tolerance.rollback import skipped_ranges

if TYPE_CHECKING:
    from clipdist.checkpoint.reader import CheckpointReader

# Settings that give the heads and the state of objectives their shapes.
SHAPED = {
    "simclr": ("head",),
    "moco": ("head", "predictor", "queue"),
    "byol": ("head",),
    "dino": ("head", "prototypes", "free_norm", "ibot.head", "ibot.prototypes"),
    "vae": ("latent", "size", "width"),
    "caption": ("kind", "width", "layers", "heads"),
}


@dataclass(frozen=True)
class RunPlan:
    """Data, order, length and starting point of a run."""

    catalog: Catalog  # of the training data
    val: Catalog | None
    order: OrderKey
    steps: int  # of the whole run
    steps_per_epoch: int
    resume: CheckpointReader | None
    order_record: dict[str, Any]  # saved in checkpoints, to resume with the same order
    skipped: list[list[int]]  # ranges [first, end) of skipped data steps: see clipdist.fault_tolerance.rollback
    stages: tuple[PlannedStage, ...]  # one where train.stages is empty
    image_size: int  # of the model
    notes: tuple[str, ...] = ()  # for the user, such as a damaged checkpoint

    @property
    def start_step(self) -> int:
        """The data step that the run starts at."""
        return self.resume.manifest.step if self.resume else 0


def check_launch(config: Config, world: int) -> tuple[Catalog, Catalog | None]:
    """Check rank count, loggers, data and run folder.

    Returns:
        The catalogs of the training and of the validation data.

    Raises:
        UserError: the run could not start.
    """
    check_ranks(config, world)
    for name in config.run.logger:
        require_extra(f"run.logger={name}", [name], name)
    catalogs = check_data(config)
    check_run_folder(config.run.dir)
    return catalogs


def check_data(config: Config) -> tuple[Catalog, Catalog | None]:
    """Open the training and the validation shards, and look at some samples. Return their catalogs.

    Raises:
        UserError: data.train is empty, has fewer samples than a global batch, or a weighted source without samples; no
            images in the samples looked at, or no captions where an objective needs them.
    """
    batch = config.train.global_batch
    if not config.data.train:
        raise UserError("data.train is empty: name the training shards, such as data.train=DIR/train")
    fetcher, members = fetcher_of(config.data), members_of(config.data)
    catalog = Catalog.open(config.data.train, "data.train", fetcher, members)
    of_val = replace(members, negatives=())
    val = Catalog.open(config.data.val, "data.val", fetcher, of_val) if config.data.val else None
    texts = config.objectives.read_text
    catalog.contents = look_at(catalog, "data.train", config.data.train, texts, config.objectives.text_read_by)
    if val is not None:
        val.contents = look_at(val, "data.val", config.data.val, texts)
    if len(catalog) < batch:
        raise UserError(
            f"data.train holds {len(catalog)} samples, fewer than train.global_batch={batch}; lower train.global_batch"
        )
    empty = [name for name, (a, b) in zip(config.data.train, catalog.sources) if catalog.starts[a] == catalog.starts[b]]
    if config.data.weights and empty:
        raise UserError(f"data.train: {empty[0]} holds no samples, and has a weight in data.weights")
    return catalog, val


def check_run_folder(folder: Path) -> None:
    """Make the run folder.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        for path in (folder, folder / "checkpoints"):
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(f"no permission to write in {path.name}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"run folder {folder}: cannot be written ({reason}); set run.root or run.name") from None


def make_plan(
    config: Config, world: int, catalogs: tuple[Catalog, Catalog | None], resume: CheckpointReader | None
) -> RunPlan:
    """Return the plan of a run that starts from `resume`, or from new weights.

    Args:
        catalogs: see check_launch.

    Raises:
        UserError: a checkpoint of another model, other data or another order; an unknown model or teacher; stages
            that do not fit the model or the length.
    """
    from clipdist.models.spec import ModelSpec, check_stages_fit, resolve_run_spec

    catalog, val = catalogs
    if config.objectives.distill is not None:
        from clipdist.objectives.teacher import check_teacher

        check_teacher(config.objectives.distill, config.model)
    fingerprint = catalog.fingerprint()
    if resume:
        key = _order_of(config, fingerprint, resume)
        spec = ModelSpec.from_dict(resume.manifest.state["model"])
    else:
        spec = resolve_run_spec(config)
        key = first_order(config, catalog, world)
    check_stages_fit(config.train.stages, spec)
    if config.objectives.caption is not None:
        from clipdist.objectives.caption import check_caption

        check_caption(config.objectives.caption, spec)
    record = {"version": ORDER_VERSION, "fingerprint": fingerprint, **asdict(key)}
    steps_per_epoch = len(catalog) // key.global_batch
    skipped = [*(resume.manifest.skipped if resume else []), *skipped_ranges(config.run.dir)]
    skipped = [list(pair) for pair in sorted({tuple(pair) for pair in skipped})]
    steps = total_steps(config.train, steps_per_epoch)
    stages = plan_stages(config.train.stages, steps, spec.image_size, spec.context_length)
    size = spec.image_size
    return RunPlan(catalog, val, key, steps, steps_per_epoch, resume, record, skipped, stages, size)


def _order_of(config: Config, fingerprint: str, reader: CheckpointReader) -> OrderKey:
    """Return the order of a checkpoint, with the number of streams and window that the first start chose.

    Raises:
        UserError: the checkpoint is of another model, other data, or another order.
    """
    manifest, where = reader.manifest, reader.folder
    order = manifest.order
    if not order:  # of tools/interpolate.py, or of an export of adapters
        raise UserError(
            f"{where}: weights alone, not the state of a run that could go on; start from them under another"
            " run.name: python tools/export.py RUN --out FILE.safetensors, and model.weights=FILE.safetensors"
        )
    _check_model(config, reader)
    theirs = manifest.config.get("optim", {}).get("name", "adamw")
    if theirs != config.optim.name:
        raise UserError(
            f"{where}: holds the moments of optim.name={theirs}, here {config.optim.name}; set it back or choose"
            " another run.name"
        )
    _check_objectives(config, reader)
    if order["version"] != ORDER_VERSION:
        raise UserError(f"{where}: made with version {order['version']} of the data order, this is {ORDER_VERSION}")
    if order["fingerprint"] != fingerprint:
        raise UserError(f"{where}: made with other training data than data.train; choose another run.name")
    wanted = {
        "train.global_batch": (order["global_batch"], config.train.global_batch),
        "data.seed": (order["seed"], config.data.seed),
        "data.window": (order["window"], config.data.window or order["window"]),
        "data.weights": (list(order["parts"]), list(whole_parts(config.data.weights)) if config.data.weights else []),
        "data.streams": (order["streams"], config.data.streams or order["streams"]),
    }
    for name, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise UserError(
                f"{where}: made with {name}={theirs}, here {ours}: the data order would change; set it back or choose"
                " another run.name"
            )
    return OrderKey(order["seed"], order["global_batch"], order["streams"], order["window"], tuple(order["parts"]))


def _check_objectives(config: Config, reader: CheckpointReader) -> None:
    """Raise UserError for objectives with a head or a state that the checkpoint lacks, or has in other shapes."""
    saved = reader.manifest.config.get("objectives") or {}
    headed = (*VIEWED, "caption")
    lacking = [name for name in headed if getattr(config.objectives, name) is not None and not saved.get(name)]
    if lacking and config.train.resume_objectives == "same":
        raise UserError(
            f"{reader.folder}: made without {', '.join(f'objectives.{name}' for name in lacking)}: heads, teacher and"
            " state are missing; set train.resume_objectives=reset to start these anew, or choose another run.name"
        )
    ours_of, theirs_of = flat(config), flatten(saved)
    for name, keys in SHAPED.items():
        for key in keys if getattr(config.objectives, name) is not None and saved.get(name) else ():
            ours, theirs = ours_of.get(f"objectives.{name}.{key}"), theirs_of.get(f"{name}.{key}")
            if ours != theirs:
                raise UserError(
                    f"{reader.folder}: made with objectives.{name}.{key}={theirs}, here {ours}: head or state would not"
                    " fit; set it back or choose another run.name"
                )


def _check_model(config: Config, reader: CheckpointReader) -> None:
    """Raise UserError if the checkpoint is of another model."""
    from clipdist.models.spec import resolve_run_spec

    theirs, ours = reader.manifest.config["model"]["name"], config.model.name
    if theirs != ours:
        raise UserError(
            f"{reader.folder}: a checkpoint of another model (model.name={theirs}, here {ours});"
            " choose another run.name"
        )
    try:
        described = resolve_run_spec(config).model
    except UserError:
        return  # the model JSON or weights file is gone: the checkpoint suffices
    if described != reader.manifest.state["model"]["model"]:
        raise UserError(f"{reader.folder}: a checkpoint of another model ({ours} has changed); choose another run.name")
