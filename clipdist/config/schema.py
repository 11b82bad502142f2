"""What can be configured: frozen sections with their defaults. A recipe holds differences from these.

Imports no torch: a login node rejects a typo in a fraction of a second, before the queue does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DEFAULT_RECIPE = "configs/flickr8k_rn50.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]
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
    retry_s: float = 300.0  # a shard that cannot be fetched is tried again for so long


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
class Clip:
    """Images and captions, contrasted over all pairs of the global batch, exactly."""

    weight: float = 1.0  # of this objective in the sum of all
    loss: Literal["infonce", "sigmoid"] = "infonce"  # CLIP's, or SigLIP's
    logit_scale_init: float | None = None  # the log scale t; null: the papers' ln(1/0.07) and ln 10
    logit_scale_max: float = math.log(100)
    logit_bias_init: float = -10.0  # of the sigmoid loss
    group_positives: bool = True  # equal captions in a batch are positives of one another, not negatives
    label_smoothing: float = 0.0  # share of the target that is spread over all candidates
    implementation: Literal["auto", "tiles", "kernel"] = "auto"  # the same numbers; kernel needs a GPU

    @property
    def first_log_scale(self) -> float:
        """t at the start (arXiv:2103.00020, section 2.5; arXiv:2303.15343, section 3.2)."""
        if self.logit_scale_init is not None:
            return self.logit_scale_init
        return math.log(10) if self.loss == "sigmoid" else math.log(1 / 0.07)


@dataclass(frozen=True)
class Objectives:
    """What is trained: the weighted sum of the sections that are set. A recipe without this section trains CLIP."""

    clip: Clip | None = None


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
    time_min: int = 24 * 60
    mem_gb: int = 0  # per node; 0: the site's default
    cpus_per_gpu: int = 0  # 0: the loader's threads and one more
    setup: list[str] = field(default_factory=list)  # shell lines before the job (modules, virtual environment)
    slurm: dict[str, Any] = field(default_factory=dict)  # any sbatch option by its long name: qos, exclude, ...
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
    objectives: Objectives = field(default_factory=lambda: Objectives(clip=Clip()))
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    train: Train = field(default_factory=Train)
    guard: Guard = field(default_factory=Guard)
    eval: Eval = field(default_factory=Eval)
    launch: Launch = field(default_factory=Launch)

    @property
    def clip(self) -> Clip:
        """The settings of CLIP, for what is about CLIP alone. A run without it has none: AttributeError."""
        if self.objectives.clip is None:
            raise AttributeError("objectives.clip is not set")
        return self.objectives.clip
