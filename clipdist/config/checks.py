"""Check the values of a configuration beyond their types; the error names the first invalid key."""

from __future__ import annotations

import math
import re

from clipdist.config.schema import (
    Augment,
    Caption,
    Clip,
    Config,
    Data,
    Dino,
    Distill,
    Engine,
    Ibot,
    Launch,
    Moco,
    Model,
    Objectives,
    Optim,
    Run,
    Train,
    Vae,
)
from clipdist.errors import UserError

# Keys by section, for each bound.
NOT_NEGATIVE = {
    "data": ("negatives", "cache_gb", "retry_s", "threads", "streams", "window"),
    "model": ("image_unlocked_groups", "text_unlocked_layers"),
    "optim": ("warmup_steps", "weight_decay", "grad_clip", "clip_each", "min_lr"),
    "train": ("steps", "samples", "micro_batch", "save_every", "save_minutes", "keep_every", "compare_every", "hang_s"),
    "guard": ("loss_spike", "update_spike", "patience", "rollbacks"),
    "eval": ("every", "sheet"),
    "launch": ("cpus_per_gpu", "time_min", "max_restarts", "mem_gb", "device_gb", "samples_per_s"),
}
AT_LEAST_1 = {
    "data": ("prefetch",),
    "train": ("global_batch", "epochs", "keep", "log_every"),
    "eval": ("batch",),
    "launch": ("nodes", "gpus", "signal_s"),
}
FROM_0_TO_1 = {"data": ("flip", "jitter_probability", "grayscale", "max_bad_share")}
BELOW_1 = {"optim": ("beta1", "beta2"), "train": ("ema",)}
ABOVE_0 = {"optim": ("lr", "eps")}
VIEWED = ("simclr", "moco", "byol", "dino", "vae")  # objectives on views of an image
TAUGHT = ("moco", "byol", "dino")  # of them, those whose teacher follows the weights
LOGGERS = ("wandb", "mlflow", "trackio")
SEEDS = {"data": ("seed",), "train": ("seed",)}


def check(config: Config) -> None:
    """Raise UserError for the first value that is out of range or inconsistent with another one."""
    _check_ranges(config)
    _check_run(config.run)
    _check_data(config.data, config.model, config.train)
    _check_model(config.model, config.train)
    _check_objectives(config.objectives, config.data, config.model)
    _check_self_supervised(config.objectives, config.data, config.train)
    if config.objectives.caption is not None:
        _check_caption(config.objectives.caption, config.objectives, config.data)
    _check_train(config.train)
    _check_stages(config.train, config.data)
    _need(config.guard.window >= 10, "guard.window", config.guard.window, "be at least 10")
    _check_best(config)
    _check_launch(config.launch)
    compiles = config.engine.compile and config.engine.zero_stage == 3
    must = "be 0 with engine.compile: every step would have shapes of its own"
    _need(not (config.engine.compile and config.model.drop_path), "model.drop_path", config.model.drop_path, must)
    must = "be 0, 1 or 2 with engine.compile: stage 3 gathers weights inside of the blocks"
    _need(not compiles, "engine.zero_stage", 3, must)
    _check_deepspeed(config.engine)
    _check_optim(config.optim, config.model, config.engine)


def _need(ok: bool, key: str, value: object, must: str) -> None:
    """Raise UserError unless `ok`: "KEY=VALUE: must MUST"."""
    if not ok:
        raise UserError(f"{key}={value}: must {must}")


def _check_ranges(config: Config) -> None:
    for table, must, lies_in in (
        (NOT_NEGATIVE, "not be negative", lambda value: value >= 0),
        (AT_LEAST_1, "be at least 1", lambda value: value >= 1),
        (FROM_0_TO_1, "lie in [0, 1]", lambda value: 0 <= value <= 1),
        (BELOW_1, "lie in [0, 1)", lambda value: 0 <= value < 1),
        (ABOVE_0, "be above 0", lambda value: value > 0),
        (SEEDS, "lie in [0, 2^32)", lambda value: 0 <= value < 1 << 32),
    ):
        for section, names in table.items():
            for name in names:
                value = getattr(getattr(config, section), name)
                _need(lies_in(value), f"{section}.{name}", value, must)


def _check_run(run: Run) -> None:
    plain = run.name not in ("", ".", "..") and "/" not in run.name
    _need(plain, "run.name", repr(run.name), "be a plain name")
    known = set(run.logger) <= set(LOGGERS) and len(set(run.logger)) == len(run.logger)
    _need(known, "run.logger", run.logger, f"be a list of {', '.join(LOGGERS)}, each at most once")


def _check_data(data: Data, model: Model, train: Train) -> None:
    _need(0 < data.crop_scale_min <= 1, "data.crop_scale_min", data.crop_scale_min, "lie in (0, 1]")
    caption = data.caption
    known = caption in ("random", "first", "all") if isinstance(caption, str) else caption >= 2
    _need(known, "data.caption", caption, "be random, first, all, or a number of captions from 2 on")
    _check_jitter("data.jitter", data.jitter)
    if data.weights:
        fits = len(data.weights) == len(data.train) and all(0 < weight < math.inf for weight in data.weights)
        must = f"be above 0, one for each of the {len(data.train)} entries of data.train"
        _need(fits, "data.weights", data.weights, must)
        must = "come with train.samples: a mixture has no epochs"
        _need(train.steps + train.samples > 0, "data.weights", data.weights, must)
    for key, form, must in (
        ("caption_members", r"[^:/\s]+(:[^:]+)?", "be suffixes such as txt, or fields such as json:captions"),
        ("negative_members", r"[^:/\s]+(:[^:]+)?", "be suffixes such as neg, or fields such as json:negatives"),
        ("image_members", r"[^:/\s]+", "be suffixes such as jpg"),
    ):
        names = getattr(data, key)
        _need(all(re.fullmatch(form, name) for name in names), f"data.{key}", names, must)
    if data.cache_features:
        _check_cached(data, model)
    used = bool(data.negatives) or not data.negative_members
    _need(used, "data.negative_members", data.negative_members, "come with data.negatives, their number in a step")
    divides = not data.streams or train.global_batch % data.streams == 0
    _need(divides, "data.streams", data.streams, "divide train.global_batch")


def _check_jitter(key: str, jitter: list[float]) -> None:
    amounts = len(jitter) in (0, 4) and all(amount >= 0 for amount in jitter)
    must = "be four amounts (brightness, contrast, saturation, hue <= 0.5), or empty"
    _need(amounts and max([0, *jitter[3:]]) <= 0.5, key, jitter, must)


def check_augment(key: str, augment: Augment) -> None:
    """Raise UserError for the first value of a view's augmentation that is out of range; `key` names the view."""
    scale = augment.crop_scale
    share = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
    _need(share, f"{key}.crop_scale", scale, "be a range within (0, 1], such as [0.08, 1.0]")
    _check_jitter(f"{key}.jitter", augment.jitter)
    for name in ("flip", "jitter_probability", "grayscale", "blur", "solarise"):
        value = getattr(augment, name)
        _need(0 <= value <= 1, f"{key}.{name}", value, "lie in [0, 1]")
    _need(augment.size == 0 or augment.size >= 2, f"{key}.size", augment.size, "be 0 (the model's), or pixels a side")


def _check_model(model: Model, train: Train) -> None:
    """Raise UserError for settings that would have no effect, and for groups of BatchNorm that are no whole ones."""
    group = model.batchnorm_group
    _need(group == 0 or group >= 2, "model.batchnorm_group", group, "be 0, or at least 2 rows")
    for key in ("global_batch", "micro_batch"):
        rows = getattr(train, key)
        _need(not group or rows % group == 0, "model.batchnorm_group", group, f"divide train.{key}={rows}")
    _need(0 <= model.drop_path < 1, "model.drop_path", model.drop_path, "lie in [0, 1)")
    must = "be 0 with model.lock_image"
    _need(not (model.drop_path and model.lock_image), "model.drop_path", model.drop_path, must)
    locked = model.lock_image or not model.image_unlocked_groups
    _need(locked, "model.image_unlocked_groups", model.image_unlocked_groups, "come with model.lock_image=true")
    locked = model.lock_text or not model.text_unlocked_layers
    _need(locked, "model.text_unlocked_layers", model.text_unlocked_layers, "come with model.lock_text=true")
    used = bool(model.weights) or not model.trust_weights
    _need(used, "model.trust_weights", "true", "come with model.weights, the file that is trusted")
    free = not (model.lora or (model.lock_image and model.lock_text))
    must = "come without model.lora and with a tower that is not locked"
    _need(free or not model.biases_only, "model.biases_only", True, must)
    if model.lora is not None:
        _need(model.lora.rank >= 1, "model.lora.rank", model.lora.rank, "be at least 1")
        _need(0 < model.lora.alpha < math.inf, "model.lora.alpha", model.lora.alpha, "be above 0")
        for tower, locked in (("image", model.lock_image), ("text", model.lock_text)):
            twice = locked and model.lora.towers in ("both", tower)
            _need(not twice, f"model.lock_{tower}", locked, "be false for a tower with model.lora, which locks it")


def _check_cached(data: Data, model: Model) -> None:
    locked = model.lock_image or model.lock_text
    _need(locked, "data.cache_features", True, "come with model.lock_image=true or model.lock_text=true")
    must = "be 0 with data.cache_features and model.lock_text: features of captions alone are kept"
    _need(not (model.lock_text and data.negatives), "data.negatives", data.negatives, must)
    if model.lock_image:  # its features are those of one view of an image, the evaluation's
        must = "be {} with data.cache_features and model.lock_image: features of augmented images are not kept"
        _need(data.crop_scale_min == 1, "data.crop_scale_min", data.crop_scale_min, must.format(1))
        for name in ("flip", "grayscale", "jitter"):
            value = getattr(data, name)
            _need(not value, f"data.{name}", value, must.format("[]" if name == "jitter" else 0))


def _check_objectives(objectives: Objectives, data: Data, model: Model) -> None:
    clip, distill = objectives.clip, objectives.distill
    if not any(vars(objectives).values()):
        raise UserError("objectives: none is set; set one, such as objectives.clip={}")
    several = f"data.caption={data.caption}, data.negatives={data.negatives}"
    if clip is not None:
        _check_clip(clip)
        tiles = not data.several_texts or clip.implementation != "kernel"
        must = f"be auto or tiles with {several}: the kernel takes one text an image"
        _need(tiles, "objectives.clip.implementation", "kernel", must)
    if distill is not None:
        _check_distill(distill, data, model)
        must = f"be features with {several}: logits are those of one text an image"
        _need(distill.target == "features" or not data.several_texts, "objectives.distill.target", "logits", must)
        must = "be another model where no other objective is set: the start does not differ from itself"
        _need(distill.teacher != "start" or clip is not None, "objectives.distill.teacher", distill.teacher, must)


def _check_self_supervised(objectives: Objectives, data: Data, train: Train) -> None:
    """Raise UserError for what objectives on views of an image do not take, one by one or together."""
    found = {name: section for name in VIEWED if (section := getattr(objectives, name)) is not None}
    for name, section in found.items():
        key = f"objectives.{name}."
        must = f"be above 0; objectives.{name}=null takes it out"
        _need(0 < section.weight < math.inf, f"{key}weight", section.weight, must)
        _check_views(f"{key}views", section.views, 1 if name == "vae" else 2)
        if name == "vae":
            _check_vae(section)
            continue
        widths = bool(section.head) and min(section.head) >= 1
        _need(widths, f"{key}head", section.head, "be widths of layers, one or more")
        if name in TAUGHT:
            _need(0 <= section.momentum <= 1, f"{key}momentum", section.momentum, "lie in [0, 1]")
        if name in ("simclr", "moco"):
            # A larger scale of logits would overflow the sums of exponentials.
            _need(section.temperature >= 1 / 70, f"{key}temperature", section.temperature, "be at least 1/70")
    taught = [f"objectives.{name}" for name in TAUGHT if name in found]
    if len(taught) > 1:
        raise UserError(f"{' and '.join(taught)}: have a teacher each, and a run has one; leave one out")
    must = f"be 0 with {' '.join(taught)}, whose teacher is the average of the weights"
    _need(not (taught and train.ema), "train.ema", train.ema, must)
    names = " and ".join(f"objectives.{name}" for name in found)
    must = f"be empty with {names}, whose views have sizes of their own"
    _need(not (found and train.stages), "train.stages", f"{len(train.stages)} stages", must)
    must = f"be false with {names}: features of augmented images are not kept"
    _need(not (found and data.cache_features), "data.cache_features", True, must)
    if objectives.byol is not None:
        two = len(objectives.byol.head) == 2
        _need(two, "objectives.byol.head", objectives.byol.head, "be the hidden and the output width")
    if objectives.moco is not None:
        _check_moco(objectives.moco, train)
    if objectives.dino is not None:
        _check_dino(objectives.dino)


def _check_moco(moco: Moco, train: Train) -> None:
    key = "objectives.moco."
    must = f"be at least train.global_batch={train.global_batch}, or 0: a batch must not replace its own keys"
    _need(moco.queue == 0 or moco.queue >= train.global_batch, f"{key}queue", moco.queue, must)
    _need(min([1, *moco.predictor]) >= 1, f"{key}predictor", moco.predictor, "be widths of layers")
    if moco.queue:
        _need(not moco.predictor, f"{key}predictor", moco.predictor, "come with objectives.moco.queue=0 (MoCo v3)")
    else:
        ends = bool(moco.predictor) and moco.predictor[-1] == moco.head[-1]
        must = f"end in the head's width, {moco.head[-1]}, without a queue (MoCo v3)"
        _need(ends, f"{key}predictor", moco.predictor, must)


def _check_dino(dino: Dino) -> None:
    key = "objectives.dino."
    _need(dino.prototypes >= 2, f"{key}prototypes", dino.prototypes, "be at least 2")
    for name in ("local_views", "frozen_steps", "teacher_warmup_steps", "koleo", "koleo_group"):
        _need(getattr(dino, name) >= 0, f"{key}{name}", getattr(dino, name), "not be negative")
    _need(dino.koleo_group != 1, f"{key}koleo_group", 1, "be 0, or 2 and more: one image has no neighbour")
    _need(dino.temperature > 0, f"{key}temperature", dino.temperature, "be above 0")
    warm = dino.teacher_temperature
    _need(len(warm) == 2 and min(warm) > 0, f"{key}teacher_temperature", warm, "be two temperatures, first and last")
    _need(0 <= dino.centre_momentum <= 1, f"{key}centre_momentum", dino.centre_momentum, "lie in [0, 1]")
    check_augment(f"{key}local", dino.local)
    if dino.ibot is not None:
        _check_ibot(dino.ibot)


def _check_ibot(ibot: Ibot) -> None:
    key = "objectives.dino.ibot."
    must = "be above 0; objectives.dino.ibot=null takes it out"
    _need(0 < ibot.weight < math.inf, f"{key}weight", ibot.weight, must)
    _need(ibot.prototypes >= 2, f"{key}prototypes", ibot.prototypes, "be at least 2")
    _need(bool(ibot.head) and min(ibot.head) >= 1, f"{key}head", ibot.head, "be widths of layers, one or more")
    _need(0 < ibot.masked_images <= 1, f"{key}masked_images", ibot.masked_images, "lie in (0, 1]")
    ratio = ibot.mask_ratio
    fits = len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < 1
    _need(fits, f"{key}mask_ratio", ratio, "be a range within (0, 1), least and most")


def _check_vae(vae: Vae) -> None:
    key = "objectives.vae."
    doubled = vae.size >= 4 and vae.size & (vae.size - 1) == 0
    _need(doubled, f"{key}size", vae.size, "be 4, 8, 16 or another power of two")
    _need(vae.latent >= 1, f"{key}latent", vae.latent, "be at least 1")
    least = vae.size // 4
    _need(vae.width >= least, f"{key}width", vae.width, f"be at least {least}, so that each doubling leaves a channel")
    _need(vae.beta >= 0, f"{key}beta", vae.beta, "not be negative")
    _need(vae.deviation > 0, f"{key}deviation", vae.deviation, "be above 0")


def _check_caption(caption: Caption, objectives: Objectives, data: Data) -> None:
    key = "objectives.caption."
    must = "be above 0; objectives.caption=null takes it out"
    _need(0 < caption.weight < math.inf, f"{key}weight", caption.weight, must)
    _need(0 <= caption.label_smoothing < 1, f"{key}label_smoothing", caption.label_smoothing, "lie in [0, 1)")
    _need(0 <= caption.parallel <= 1, f"{key}parallel", caption.parallel, "lie in [0, 1]")
    for name in ("width", "layers", "heads"):
        _need(getattr(caption, name) >= 0, f"{key}{name}", getattr(caption, name), "be at least 1, or 0: see there")
    divides = not (caption.width and caption.heads) or caption.width % caption.heads == 0
    _need(divides, f"{key}heads", caption.heads, f"divide {key}width={caption.width}")
    paired = caption.kind != "coca" or objectives.clip is not None
    _need(paired, f"{key}kind", caption.kind, "come with objectives.clip, whose text tower it decodes from")
    several = f"data.caption={data.caption}, data.negatives={data.negatives}"
    must = f"be null with {several}: it takes one caption of an image"
    _need(not data.several_texts, "objectives.caption", caption.kind, must)
    must = "be false with objectives.caption, which reads the image's tokens"
    _need(not data.cache_features, "data.cache_features", True, must)


def _check_views(key: str, views: list[Augment], number: int) -> None:
    _need(len(views) == number, key, f"a list of {len(views)}", f"hold {number} views")
    for place, augment in enumerate(views):
        check_augment(f"{key}[{place}]", augment)


def _check_distill(distill: Distill, data: Data, model: Model) -> None:
    key = "objectives.distill."
    must = "be above 0; objectives.distill=null takes it out"
    _need(0 < distill.weight < math.inf, f"{key}weight", distill.weight, must)
    must = "be start, NAME:WEIGHTS (an open_clip name with a tag or a file), or the folder of a run or model"
    _need(bool(distill.teacher), f"{key}teacher", repr(distill.teacher), must)
    if distill.teacher == "start":
        must = "come with model.weights: what is drawn at random is nothing to keep"
        _need(bool(model.weights), f"{key}teacher", distill.teacher, must)
    else:
        must = "be start with data.cache_features: what is kept for this model's towers is nothing for those of another"
        _need(not data.cache_features, f"{key}teacher", distill.teacher, must)


def _check_clip(clip: Clip) -> None:
    key = "objectives.clip."
    must = "be above 0; objectives.clip=null takes it out"
    _need(0 < clip.weight < math.inf, f"{key}weight", clip.weight, must)
    _need(0 <= clip.label_smoothing < 1, f"{key}label_smoothing", clip.label_smoothing, "lie in [0, 1)")
    ascending = all(low < high for low, high in zip([0, *clip.widths], clip.widths))
    _need(ascending, f"{key}widths", clip.widths, "be ascending numbers of features, such as [64, 128]")
    must = "not exceed ln 100 (the bound of the CLIP paper)"
    _need(clip.logit_scale_max <= math.log(100) + 1e-9, f"{key}logit_scale_max", clip.logit_scale_max, must)
    must = f"not exceed {key}logit_scale_max={clip.logit_scale_max}"
    _need(clip.first_log_scale <= clip.logit_scale_max, f"{key}logit_scale_init", clip.first_log_scale, must)


def _check_optim(optim: Optim, model: Model, engine: Engine) -> None:
    _need(optim.min_lr <= optim.lr, "optim.min_lr", optim.min_lr, f"not exceed optim.lr={optim.lr}")
    _need(0 < optim.layer_decay <= 1, "optim.layer_decay", optim.layer_decay, "lie in (0, 1]")
    end = optim.weight_decay_end
    _need(end is None or end >= 0, "optim.weight_decay_end", end, "not be negative; null: constant")
    must = "come with optim.grad_clip=0: gradients are clipped by one norm of all tensors or each by its own"
    _need(not (optim.clip_each and optim.grad_clip), "optim.clip_each", optim.clip_each, must)
    zero = engine.deepspeed.get("zero_optimization") or {}
    for part in ("offload_optimizer", "offload_param"):
        offloaded = (zero.get(part) or {}).get("device", "none") != "none"
        must = f"be adamw with {part} of engine.deepspeed: the others compute on the device"
        _need(not offloaded or optim.name == "adamw", "optim.name", optim.name, must)
        must = f"be 0 with {part} of engine.deepspeed: norms of tensors are computed on the device"
        _need(not (offloaded and optim.clip_each), "optim.clip_each", optim.clip_each, must)
    if optim.name == "muon":
        must = "be adamw with model.biases_only, which trains no matrix"
        _need(not model.biases_only, "optim.name", "muon", must)


def _check_train(train: Train) -> None:
    alone = not (train.steps and train.samples)
    _need(alone, "train.samples", train.samples, f"not come with train.steps={train.steps}")


def _check_best(config: Config) -> None:
    """Raise UserError for a metric to keep the best by that nothing measures."""
    best, objectives = config.train.keep_best, config.objectives
    if not best:
        return
    averaged = config.train.ema > 0 or any(getattr(objectives, name) is not None for name in TAUGHT)
    of_average = best.startswith("ema/")
    _need(averaged or not of_average, "train.keep_best", best, "come with train.ema, the momentum of that average")
    measured = bool(config.data.val or config.eval.labelled)
    _need(measured, "train.keep_best", best, "come with data.val or eval.labelled, which measure it")
    if not objectives.read_text:
        sources = {"effective_rank": config.data.val, "knn_": config.eval.knn, "probe/": config.eval.probe}
        known = tuple(name for name, source in sources.items() if source)
        must = "be effective_rank (data.val), knn_20 or knn_200 (eval.knn), or probe/accuracy (eval.probe): no captions"
        _need(best.removeprefix("ema/").startswith(known), "train.keep_best", best, f"{must} are read")


def _check_stages(train: Train, data: Data) -> None:
    shares = [stage.share for stage in train.stages]
    for number, stage in enumerate(train.stages):
        key = f"train.stages[{number}]."
        _need(0 < stage.share <= 1, f"{key}share", stage.share, "lie in (0, 1]")
        _need(stage.image_size >= 0, f"{key}image_size", stage.image_size, "not be negative")
        # A text's start and end, and two tokens between them
        _need(stage.tokens == 0 or stage.tokens >= 4, f"{key}tokens", stage.tokens, "be at least 4, or 0: the model's")
        _need(0 <= stage.patch_dropout < 1, f"{key}patch_dropout", stage.patch_dropout, "lie in [0, 1)")
    whole = not shares or math.isclose(sum(shares), 1, abs_tol=1e-6)
    _need(whole, "train.stages", f"shares {shares}", f"sum to 1, not {sum(shares):g}")
    must = "be empty with data.cache_features: what is kept are features of whole images and texts"
    _need(not (shares and data.cache_features), "train.stages", f"shares {shares}", must)


def _check_launch(launch: Launch) -> None:
    enough = launch.time_min == 0 or 60 * launch.time_min > launch.signal_s
    must = f"be longer than launch.signal_s={launch.signal_s} seconds"
    _need(enough, "launch.time_min", launch.time_min, must)


def _check_deepspeed(engine: Engine) -> None:
    """Raise UserError for keys that the trainer owns, and for offloading that it does not support."""
    for key, hint in _OWNED_BY_TRAINER.items():
        if key in engine.deepspeed:
            raise UserError(f"engine.deepspeed.{key}: the trainer owns this key; {hint}")
    zero = engine.deepspeed.get("zero_optimization") or {}
    if not isinstance(zero, dict):
        raise UserError(f"engine.deepspeed.zero_optimization={zero}: must be a table of DeepSpeed's settings")
    if "stage" in zero:
        raise UserError("engine.deepspeed.zero_optimization.stage: the trainer owns this key; set engine.zero_stage")
    for part in ("offload_optimizer", "offload_param"):
        table = zero.get(part) or {}
        if not isinstance(table, dict):
            raise UserError(
                f"engine.deepspeed.zero_optimization.{part}={table}: must be a table, such as {{device: cpu}}"
            )
        least = 3 if part == "offload_param" else 1
        if table.get("device") == "cpu" and engine.zero_stage < least:
            raise UserError(f"engine.zero_stage={engine.zero_stage}: {part} needs at least {least}")
        if table.get("device") == "nvme":
            raise UserError(f"engine.deepspeed.zero_optimization.{part}.device=nvme: not supported; set cpu")


_OWNED_BY_TRAINER = {  # key -> advice in the error
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.micro_batch",
    "gradient_accumulation_steps": "set train.micro_batch, which keeps the loss that of the global batch",
    "gradient_clipping": "set optim.grad_clip",
    "bf16": "set train.precision",
    "fp16": "set train.precision",
    "amp": "set train.precision",
    "torch_autocast": "set train.precision",
    "data_types": "set train.precision",
    "timers": "metrics.jsonl has the throughput as samples_per_s",
    "optimizer": "set the optim section",
    "scheduler": "set the optim section",
    "gradient_allreduce_op": "the loss is exact under the mean over ranks",
    "prescale_gradients": "the loss is exact under the mean over ranks",
    "gradient_predivide_factor": "the loss is exact under the mean over ranks",
}
