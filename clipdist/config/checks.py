"""What a configuration must satisfy that its types do not say, told by the first key that is wrong."""

from __future__ import annotations

import math

from clipdist.config.schema import Config, Engine
from clipdist.errors import UserError


def check(config: Config) -> None:
    def need(ok: bool, key: str, value: object, must: str) -> None:
        if not ok:
            raise UserError(f"{key}={value}: must {must}")

    train, data, optim, loss = config.train, config.data, config.optim, config.loss
    guard, launch = config.guard, config.launch
    plain = config.run.name not in ("", ".", "..") and "/" not in config.run.name
    need(plain, "run.name", repr(config.run.name), "be a plain name")
    need(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "lie in [0, 1)")
    need(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "lie in [0, 1)")
    need(optim.eps > 0, "optim.eps", optim.eps, "be above 0")
    need(0 <= train.seed < 1 << 32, "train.seed", train.seed, "lie in [0, 2^32)")
    need(0 <= data.seed < 1 << 32, "data.seed", data.seed, "lie in [0, 2^32)")
    need(train.global_batch >= 1, "train.global_batch", train.global_batch, "be at least 1")
    need(train.epochs >= 1, "train.epochs", train.epochs, "be at least 1")
    need(train.keep >= 1, "train.keep", train.keep, "be at least 1")
    for name in ("save_minutes", "keep_every", "compare_every", "hang_s"):
        need(getattr(train, name) >= 0, f"train.{name}", getattr(train, name), "not be negative")
    for name in ("loss_spike", "update_spike", "patience", "rollbacks"):
        need(getattr(guard, name) >= 0, f"guard.{name}", getattr(guard, name), "not be negative")
    need(guard.window >= 10, "guard.window", guard.window, "be at least 10")
    need(train.log_every >= 1, "train.log_every", train.log_every, "be at least 1")
    need(optim.lr > 0, "optim.lr", optim.lr, "be above 0")
    need(optim.min_lr <= optim.lr, "optim.min_lr", optim.min_lr, f"not exceed optim.lr={optim.lr}")
    need(0 < data.crop_scale_min <= 1, "data.crop_scale_min", data.crop_scale_min, "lie in (0, 1]")
    for name in ("flip", "jitter_probability", "grayscale"):
        need(0 <= getattr(data, name) <= 1, f"data.{name}", getattr(data, name), "lie in [0, 1]")
    plain = (
        len(data.jitter) in (0, 4) and all(amount >= 0 for amount in data.jitter) and max([0, *data.jitter[3:]]) <= 0.5
    )
    need(plain, "data.jitter", data.jitter, "be four amounts (brightness, contrast, saturation, hue <= 0.5), or empty")
    need(data.cache_gb >= 0, "data.cache_gb", data.cache_gb, "not be negative")
    need(data.retry_s >= 0, "data.retry_s", data.retry_s, "not be negative")
    if data.weights:
        fits = len(data.weights) == len(data.train) and all(0 < weight < math.inf for weight in data.weights)
        need(
            fits,
            "data.weights",
            data.weights,
            f"be above 0, one for each of the {len(data.train)} entries of data.train",
        )
        need(
            train.steps + train.samples > 0,
            "data.weights",
            data.weights,
            "come with train.samples: a mixture has no epochs",
        )
    need(
        not (train.steps and train.samples), "train.samples", train.samples, f"not come with train.steps={train.steps}"
    )
    need(data.prefetch >= 1, "data.prefetch", data.prefetch, "be at least 1")
    need(0 <= data.max_bad_share <= 1, "data.max_bad_share", data.max_bad_share, "lie in [0, 1]")
    need(config.eval.batch >= 1, "eval.batch", config.eval.batch, "be at least 1")
    need(launch.nodes >= 1, "launch.nodes", launch.nodes, "be at least 1")
    need(launch.gpus >= 1, "launch.gpus", launch.gpus, "be at least 1")
    need(launch.signal_s >= 1, "launch.signal_s", launch.signal_s, "be at least 1")
    enough = launch.time_min == 0 or 60 * launch.time_min > launch.signal_s
    need(enough, "launch.time_min", launch.time_min, f"be longer than launch.signal_s={launch.signal_s} seconds")
    for name in ("cpus_per_gpu", "time_min", "max_restarts", "signal_s", "mem_gb", "device_gb", "samples_per_s"):
        need(getattr(launch, name) >= 0, f"launch.{name}", getattr(launch, name), "not be negative")
    for name in ("warmup_steps", "weight_decay", "grad_clip", "min_lr"):
        need(getattr(optim, name) >= 0, f"optim.{name}", getattr(optim, name), "not be negative")
    for key, value in (
        ("train.steps", train.steps),
        ("train.samples", train.samples),
        ("train.micro_batch", train.micro_batch),
        ("loss.tile_rows", loss.tile_rows),
        ("loss.tile_columns", loss.tile_columns),
        ("train.save_every", train.save_every),
        ("eval.every", config.eval.every),
        ("eval.sheet", config.eval.sheet),
        ("data.threads", data.threads),
        ("data.streams", data.streams),
        ("data.window", data.window),
    ):
        need(value >= 0, key, value, "not be negative")
    need(
        loss.logit_scale_max <= math.log(100) + 1e-9,
        "loss.logit_scale_max",
        loss.logit_scale_max,
        "not exceed ln 100 (the bound of the CLIP paper)",
    )
    need(0 <= loss.label_smoothing < 1, "loss.label_smoothing", loss.label_smoothing, "lie in [0, 1)")
    need(
        (loss.tile_rows > 0) == (loss.tile_columns > 0),
        "loss.tile_rows",
        loss.tile_rows,
        f"be given together with loss.tile_columns={loss.tile_columns}",
    )
    need(
        loss.first_log_scale <= loss.logit_scale_max,
        "loss.logit_scale_init",
        loss.first_log_scale,
        f"not exceed loss.logit_scale_max={loss.logit_scale_max}",
    )
    if data.streams:
        need(train.global_batch % data.streams == 0, "data.streams", data.streams, "divide train.global_batch")
    _check_deepspeed(config.engine)


def _check_deepspeed(engine: Engine) -> None:
    """Refuses what the trainer owns, and what it could not save."""
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
        if table.get("device") == "cpu" and engine.zero_stage < (3 if part == "offload_param" else 1):
            least = 3 if part == "offload_param" else 1
            raise UserError(f"engine.zero_stage={engine.zero_stage}: {part} needs at least {least}")
        if table.get("device") == "nvme":
            raise UserError(f"engine.deepspeed.zero_optimization.{part}.device=nvme: not supported; set cpu")


def check_ranks(config: Config, world: int) -> None:
    """Raise UserError unless the ranks divide the global batch, and micro-batches a rank's share of it."""
    batch = config.train.global_batch
    if batch % world:
        below = max(b for b in range(1, batch + 1) if b % world == 0) if batch >= world else world
        raise UserError(
            f"train.global_batch={batch} cannot be divided among {world} ranks; set it to a multiple, such as {below}"
        )
    share, micro = batch // world, config.train.micro_batch
    if micro and share % micro:
        raise UserError(
            f"train.micro_batch={micro} does not divide the {share} pairs of a rank (train.global_batch={batch} on"
            f" {world} ranks); set it to one of {', '.join(str(m) for m in range(1, share + 1) if share % m == 0)}"
        )


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the number of steps of the whole run."""
    train = config.train
    if train.samples:
        return -(-train.samples // train.global_batch)
    return train.steps or train.epochs * steps_per_epoch


_OWNED_BY_TRAINER = {  # key -> what to do instead
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.micro_batch",
    "gradient_accumulation_steps": "set train.micro_batch, which keeps the loss that of the global batch",
    "gradient_clipping": "set optim.grad_clip",
    "bf16": "set train.precision",
    "fp16": "set train.precision",
    "amp": "set train.precision",
    "torch_autocast": "set train.precision",
    "data_types": "set train.precision",
    "optimizer": "set the optim section",
    "scheduler": "set the optim section",
    "gradient_allreduce_op": "the loss is exact under the mean over ranks",
    "prescale_gradients": "the loss is exact under the mean over ranks",
    "gradient_predivide_factor": "the loss is exact under the mean over ranks",
}
