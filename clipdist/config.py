"""Configuration: a YAML recipe of differences plus key=value overrides in, frozen dataclasses out.

Imports no torch: a login node rejects a typo in a fraction of a second, before the queue does.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipdist.errors import UserError

DEFAULT_RECIPE = "configs/flickr8k_rn50.yaml"
REPOSITORY = Path(__file__).resolve().parents[1]
SNAPSHOT = "snapshot.json"  # lies in REPOSITORY where the code is the copy that a job runs (launch/snapshot.py)


@dataclass(frozen=True)
class Run:
    name: str = "run"  # the run folder is root/name
    root: str = "runs"

    @property
    def dir(self) -> Path:
        return Path(self.root) / self.name


@dataclass(frozen=True)
class Data:
    train: list[str] = field(default_factory=list)  # shards: folders, patterns, lists, addresses, .index.zip files
    weights: list[float] = field(default_factory=list)  # of a mixture: one per entry of data.train; empty: all in a row
    val: list[str] = field(default_factory=list)  # the same, for retrieval during training; empty: no validation
    seed: int = 0  # of the order, the crops, and the choice of captions
    caption: Literal["random", "first"] = "random"  # which of a picture's captions a training step takes
    crop_scale_min: float = 0.9  # share of the picture's area that a training crop keeps at least
    dct_scaling: bool = (
        False  # decode large JPEGs at 1/2, 1/4 or 1/8 where the crop allows it: faster, not to the pixel
    )
    flip: float = 0.0  # probability of mirroring left and right; captions may speak of sides
    jitter: list[float] = field(default_factory=list)  # brightness, contrast, saturation, hue, as ColorJitter has them
    jitter_probability: float = 0.8  # of a picture's being changed so, where data.jitter is set
    grayscale: float = 0.0  # probability of taking the colours away
    streams: int = 0  # V of the order; 0: chosen at the first start and kept in the checkpoint
    window: int = 0  # samples that are permuted together; 0: a whole stream, of remote shards about one shard
    threads: int = 0  # decoding threads per rank; 0: from the cores at hand
    prefetch: int = 3  # batches that are prepared ahead
    max_pixels: int = 100_000_000  # a larger picture is not decoded (a decompression bomb)
    max_bad_share: float = 0.01  # of the samples seen so far; the run ends when more cannot be decoded
    cache: str = ""  # folder of the node in which remote shards are kept; "": below the user's cache folder
    cache_gb: float = 0.0  # its size at most, shared by the ranks of a node; 0: half of what the disk has, at most 64
    stage: bool = False  # take local shards through the cache as well (a slow network file system)
    patience_s: float = 300.0  # a shard that cannot be fetched is tried again for so long
    allow_pipe: bool = False  # let data.train name "pipe:COMMAND", which runs COMMAND in a shell


@dataclass(frozen=True)
class Model:
    name: str = "RN50"  # an open_clip model name, or a model JSON
    weights: str = ""  # "": random; an open_clip tag; a file; or a Hugging Face CLIP folder
    trust_weights: bool = False  # load a TorchScript file whose SHA-256 is not OpenAI's
    word_vectors: str = ""  # word vectors in text format (word2vec, GloVe) for a CBOW tower
    lock_image: bool = False  # LiT: the image tower stays as it is
    lock_text: bool = False
    image_unlocked_groups: int = 0  # of a locked image tower, the last groups that train nevertheless
    text_unlocked_layers: int = 0


@dataclass(frozen=True)
class Loss:
    name: Literal["infonce", "sigmoid"] = "infonce"  # both over all pairs of the global batch, exactly
    logit_scale_init: float | None = None  # the log scale t; null: the papers' ln(1/0.07) and ln 10
    logit_scale_max: float = math.log(100)
    logit_bias_init: float = -10.0  # of the sigmoid loss
    group_positives: bool = True  # equal captions in a batch are positives of one another, not negatives
    label_smoothing: float = 0.0  # share of the target that is spread over all candidates
    implementation: Literal["auto", "tiles", "compiled", "kernel"] = "auto"  # the same numbers; kernel needs a GPU
    tile_rows: int = 0  # rows and columns of logits that exist at one time; 0: from the device's cache or memory
    tile_columns: int = 0

    @property
    def first_log_scale(self) -> float:
        """t at the start (arXiv:2103.00020, section 2.5; arXiv:2303.15343, section 3.2)."""
        if self.logit_scale_init is not None:
            return self.logit_scale_init
        return math.log(10) if self.name == "sigmoid" else math.log(1 / 0.07)


@dataclass(frozen=True)
class Optim:
    lr: float = 5e-4  # at the peak
    min_lr: float = 0.0  # at the end of the cosine
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2  # not on biases, norms, embeddings' positions, nor the temperature
    grad_clip: float = 1.0  # norm over all parameters; 0: no clipping


@dataclass(frozen=True)
class Engine:
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's configuration (offload, ...)


@dataclass(frozen=True)
class Train:
    global_batch: int = 256  # pairs over all ranks: the batch of the contrastive loss
    micro_batch: int = 0  # pairs per rank and forward pass; 0: all of a rank's. The loss stays that of the global batch
    epochs: int = 30
    steps: int = 0  # instead of epochs
    samples: int = 0  # instead of epochs: pairs in all, rounded up to a step; a mixture has no epochs of its own
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    seed: int = 0  # of the initial weights and of dropout
    resume: str = "auto"  # auto: the newest good checkpoint of the run folder, if any; never; or a checkpoint folder
    save_every: int = 0  # steps between checkpoints; 0: once an epoch. The last step always saves
    save_minutes: float = 30.0  # and where so many minutes have gone by without one; 0: by steps alone
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # beside them those of every so many steps; 0: none
    keep_best: str = ""  # and the best by a validation's metric, such as t2i_r1: each validation then saves, too
    log_every: int = 10  # steps between lines and metrics
    compare_every: int = 100  # steps between comparisons of what all ranks hold alike; 0: never
    hang_s: float = 600.0  # without progress for so long the run ends with the stacks of all ranks; 0: never


@dataclass(frozen=True)
class Guard:
    nonfinite: Literal["skip", "stop"] = "skip"  # a loss or gradient that is inf or nan: leave the step out, or end
    loss_spike: float = 8.0  # leave a step out whose loss is so many deviations above the last ones'; 0: never
    update_spike: float = 8.0  # or whose update of a tower is so many times the last ones'; 0: never
    window: int = 100  # steps that "the last ones" are; no spike is looked for before so many
    patience: int = 3  # steps left out within a window until the run goes back to a checkpoint; 0: never goes back
    rollbacks: int = 3  # times that a run goes back before it ends


@dataclass(frozen=True)
class Eval:
    every: int = 0  # steps between validations; 0: once an epoch. The last step always validates
    batch: int = 64  # pictures per rank and forward pass
    sheet: int = 8  # sentences on the retrieval picture sheet; 0: none
    labelled: str = (
        ""  # CIFAR's archive, a folder of pictures by class, or labelled shards: zero-shot classification, too
    )
    templates: str = "simple"  # of its class names: cifar10, imagenet, simple, a file, or one with {}
    probe: bool = False  # also a linear probe on eval.labelled's training pictures: minutes on a large set


@dataclass(frozen=True)
class Launch:
    nodes: int = 1
    gpus: int = 1  # per node; with device=cpu it counts CPU ranks
    cluster: Literal["slurm", "local", "debug"] = "slurm"  # local: processes here; debug: one, in the foreground
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""  # nodes that Slurm shall not give
    dependency: str = ""  # as sbatch has it, such as afterok:1234
    comment: str = ""
    container: str = ""  # image, for sites with pyxis
    time_min: int = 24 * 60
    mem_gb: int = 0  # per node; 0: the site's default
    cpus_per_gpu: int = 0  # 0: the loader's threads and one more
    setup: list[str] = field(default_factory=list)  # shell lines before the job (modules, virtual environment)
    slurm: dict[str, Any] = field(default_factory=dict)  # further sbatch options, by their long names
    signal_s: int = 120  # so long before its time limit a job is told, saves and is queued again
    max_restarts: int = 3  # after a fault; preemptions and time limits do not count
    device_gb: float = 0.0  # memory of one GPU, for the plan; 0: that of this machine's
    samples_per_s: float = 0.0  # of the whole job, for the plan's wall time; 0: not known


@dataclass(frozen=True)
class Config:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    train: Train = field(default_factory=Train)
    guard: Guard = field(default_factory=Guard)
    eval: Eval = field(default_factory=Eval)
    launch: Launch = field(default_factory=Launch)


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, site: str | Path | None = None
) -> Config:
    """Reads a recipe and the overrides on top of the defaults, and checks what can be checked without data.

    Args:
        path: YAML with differences from the defaults; None: the defaults alone.
        overrides: "section.key=value" words, as on a command line; values are YAML.
        site: YAML of a site's own defaults, below the recipe; a launch section and nothing else.

    Raises:
        UserError: a misspelt key, a wrong type, or values that do not go together.
    """
    where = str(site) if site else "the defaults"
    try:
        merged = OmegaConf.structured(Config)
        if site is not None:
            merged = OmegaConf.merge(merged, _scalars_to_lists(_read_site(Path(site))))
        where = str(path) if path else "the defaults"
        if path is not None:
            merged = OmegaConf.merge(merged, _scalars_to_lists(_read_yaml(Path(path))))
        where = "the command line"
        for word in overrides or []:
            merged = OmegaConf.merge(merged, _scalars_to_lists(_parse_override(word)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        text = str(error).splitlines()[0]
        raise UserError(f"{where}: {key + ': ' if key else ''}{text}") from None
    assert isinstance(config, Config)
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, all keys, in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Flat {"section.key": value}, the form that hyper-parameter tables take."""
    return _flatten(to_dict(config))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _read_yaml(path: Path) -> Any:
    given, path = path, path if path.is_file() else REPOSITORY / path  # recipes are found from any folder
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise UserError(f"--config {given}: no such file{hint}")
    try:
        return OmegaConf.load(path)
    except OmegaConfBaseException:
        raise
    except Exception as error:  # the YAML parser's own errors: they carry line and column
        raise UserError(f"--config {path}: not YAML: {error}") from None


def _read_site(path: Path) -> Any:
    """A site's own defaults: how jobs are launched there, and nothing that changes what is trained."""
    try:
        tree = OmegaConf.load(path)
    except OmegaConfBaseException:
        raise
    except Exception as error:  # no such file, or the YAML parser's own
        raise UserError(f"site file {path}: cannot be read: {error}") from None
    if not OmegaConf.is_dict(tree) or set(tree) - {"launch"}:
        raise UserError(f"site file {path}: must hold a launch section and nothing else")
    plain = OmegaConf.to_container(tree)
    launch = plain.get("launch") if isinstance(plain, dict) else None
    if isinstance(launch, dict) and isinstance(launch.get("setup"), (str, list)):
        lines = [launch["setup"]] if isinstance(launch["setup"], str) else launch["setup"]
        # ${HOME} is for the shell; to OmegaConf it would be one of its own keys.
        launch["setup"] = [re.sub(r"(?<!\\)\$\{", r"\\${", str(line)) for line in lines]
    return OmegaConf.create(plain)


def _parse_override(word: str) -> Any:
    key, equals, _ = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} on the command line: expected section.key=value, such as optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([word])
    except OmegaConfBaseException:
        raise
    except Exception as error:
        raise UserError(f"{word!r} on the command line: the value is not YAML: {error}") from None


def _scalars_to_lists(tree: Any) -> Any:
    """Lets `data.train=PATH` stand for `data.train=[PATH]`, and `data.val=` for `[]`, in all lists."""
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        for leaf in dataclasses.fields(section.default_factory):
            if str(leaf.type).startswith("list["):
                value = OmegaConf.select(tree, f"{section.name}.{leaf.name}", default=[])
                if value is None or isinstance(value, (str, int, float)):
                    OmegaConf.update(tree, f"{section.name}.{leaf.name}", [] if value in (None, "") else [value])
    return tree


def _check(config: Config) -> None:
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
    need(data.patience_s >= 0, "data.patience_s", data.patience_s, "not be negative")
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
