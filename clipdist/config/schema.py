"""Define the sections of a configuration with their defaults. A recipe contains only differences from these.

Imports no torch, so that a login node can check a configuration in a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DEFAULT_RECIPE = "configs/flickr8k_rn50.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]
SNAPSHOT = "snapshot.json"  # exists in REPOSITORY if the code is a job's snapshot (launch/snapshot.py)


@dataclass(frozen=True)
class Run:
    """Name and place of the run folder."""

    name: str = "run"  # the run folder is root/name
    root: str = "runs"
    logger: list[str] = field(default_factory=list)  # beside TensorBoard: wandb, mlflow, trackio

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.root) / self.name


@dataclass(frozen=True)
class Data:
    """Training and validation data, its order, and the augmentation of images."""

    train: list[str] = field(default_factory=list)  # shards: folders, patterns, lists, addresses, .index.zip files
    weights: list[float] = field(default_factory=list)  # of a mixture, one per entry of data.train; empty: concatenated
    val: list[str] = field(default_factory=list)  # shards for retrieval during training; empty: no validation
    seed: int = 0  # of the order, the crops, and the choice of captions
    caption: str | int = "random"  # of an image's captions a step uses one (random, first), a number of them, or all
    caption_members: list[str] = field(default_factory=list)  # empty: json:captions, txt, json:caption
    caption_lines: Literal["auto", "split", "whole"] = "auto"  # of a text: captions, or one caption; auto: by sample
    negatives: int = 0  # further texts of an image that are no captions of it, in a step; 0: none
    negative_members: list[str] = field(default_factory=list)  # empty: json:negatives, neg
    image_members: list[str] = field(default_factory=list)  # suffixes of images; empty: jpg, jpeg, png, webp, gif, bmp
    crop_scale_min: float = 0.9  # minimum share of the image's area in a training crop
    dct_scaling: bool = (
        False  # decode large JPEGs at 1/2, 1/4 or 1/8 if the crop allows it: faster, with slightly other pixels
    )
    flip: float = 0.0  # probability of a left-right flip; captions may mention sides
    jitter: list[float] = field(default_factory=list)  # brightness, contrast, saturation, hue, as for ColorJitter
    jitter_probability: float = 0.8  # of jittering an image, if data.jitter is set
    grayscale: float = 0.0  # probability of removing the colours
    streams: int = 0  # V of the order; 0: chosen at the first start and kept in the checkpoint
    window: int = 0  # samples that are permuted together; 0: a whole stream, about one shard if shards are remote
    threads: int = 0  # decoding threads per rank, in validation too; 0: from the available cores
    prefetch: int = 3  # batches
    max_pixels: int = 100_000_000  # larger images are not decoded (decompression bombs)
    max_bad_share: float = 0.01  # of the samples seen so far; the run ends when more cannot be decoded
    cache: str = ""  # folder on the node for remote shards; "": in the user's cache folder
    cache_gb: float = 0.0  # its maximum size, shared by the ranks of a node; 0: half of the free space, at most 64
    cache_features: bool = False  # compute what locked towers give once, from images without augmentation; keep it
    stage: bool = False  # also cache local shards (on a slow network file system)
    retry_s: float = 300.0  # how long to retry a shard that cannot be fetched

    @property
    def several_texts(self) -> bool:
        """Whether a step uses several texts of an image."""
        return self.planned_texts > 1

    @property
    def planned_captions(self) -> int:
        """The captions of an image in a step; of all, as many as COCO and Flickr have: it differs by image."""
        if isinstance(self.caption, int):
            return self.caption
        return 5 if self.caption == "all" else 1

    @property
    def planned_texts(self) -> int:
        """The captions and negatives of an image in a step."""
        return self.planned_captions + self.negatives


@dataclass(frozen=True)
class Augment:
    """One view of an image: how an objective that takes several augments it."""

    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # range of the crop's share of the area
    flip: float = 0.5  # probability of a left-right flip
    jitter: list[float] = field(default_factory=list)  # brightness, contrast, saturation, hue, as for ColorJitter
    jitter_probability: float = 0.8  # of jittering an image, if jitter is set
    grayscale: float = 0.0  # probability of removing the colours
    blur: float = 0.0  # probability of a Gaussian blur, with sigma uniform in [0.1, 2.0] pixels
    solarise: float = 0.0  # probability of inverting values of 128 and more
    size: int = 0  # pixels a side; 0: the model's


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside the layers of a tower, which is locked otherwise (Hu et al., arXiv:2106.09685)."""

    rank: int = 8
    alpha: float = 16.0  # what an adapter gives is multiplied by alpha / rank
    towers: Literal["both", "image", "text"] = "both"  # another tower trains whole, or as model.lock_... says
    targets: list[str] = field(
        default_factory=list
    )  # names, or parts of names, of layers: mlp, attn.q_proj; empty: all


@dataclass(frozen=True)
class Model:
    """Architecture and initial weights of the model."""

    name: str = "RN50"  # an open_clip model name, or a model JSON
    weights: str = ""  # "": random; an open_clip tag; a file; or a Hugging Face CLIP folder
    trust_weights: bool = False  # load a TorchScript file whose SHA-256 is not OpenAI's
    patch_budget: int = 0  # patches of an image at most, at its own aspect ratio (naflexvit); 0: the description's
    word_vectors: str = ""  # word vectors in text format (word2vec, GloVe) for a CBOW or LSTM tower
    lock_image: bool = False  # freeze the image tower (LiT)
    lock_text: bool = False
    image_unlocked_groups: int = 0  # number of last groups of a locked image tower to train
    text_unlocked_layers: int = 0
    batchnorm_group: int = 0  # rows of the global batch that BatchNorm normalises over; 0: a rank's micro-batch
    drop_path: float = 0.0  # share of a batch that leaves out a residual branch of an image tower's ViT, in each block
    biases_only: bool = False  # of a tower that is not locked, train the biases alone (BitFit)
    lora: Lora | None = None  # train adapters alone (lora: {} with their defaults)


@dataclass(frozen=True)
class Clip:
    """The contrastive objective of CLIP and SigLIP over all pairs of the global batch."""

    weight: float = 1.0  # of this objective in the loss
    loss: Literal["infonce", "sigmoid"] = "infonce"  # that of CLIP, or SigLIP
    logit_scale_init: float | None = None  # the log scale t; null: as in the papers, ln(1/0.07) or ln 10
    logit_scale_max: float = math.log(100)
    logit_bias_init: float = -10.0  # of the sigmoid loss
    group_positives: bool = True  # pairs with equal captions are positives of one another, not negatives
    label_smoothing: float = 0.0  # share of the target that is spread over all candidates
    widths: list[int] = field(default_factory=list)  # also trained: the first d features (Matryoshka); empty: all alone
    implementation: Literal["auto", "tiles", "kernel"] = "auto"  # all compute the same loss; kernel needs a GPU

    @property
    def first_log_scale(self) -> float:
        """The initial log scale t (arXiv:2103.00020, section 2.5; arXiv:2303.15343, section 3.2)."""
        if self.logit_scale_init is not None:
            return self.logit_scale_init
        return math.log(10) if self.loss == "sigmoid" else math.log(1 / 0.07)

    def nested_widths(self, embed_dim: int) -> tuple[int, ...]:
        """Return the widths whose losses are averaged, ascending: those of `widths`, and always embed_dim."""
        return (*(width for width in self.widths if width < embed_dim), embed_dim)


@dataclass(frozen=True)
class Distill:
    """Distillation from a frozen teacher, which sees the same crops and captions."""

    weight: float = 1.0  # of this objective in the loss
    teacher: str = "start"  # start: what model.weights names; a run, checkpoint or Hugging Face folder; or NAME:WEIGHTS
    target: Literal["features", "logits"] = "features"  # the teacher's features, of equal width; or its softmaxes


def _alike(**augment: Any) -> Callable[[], list[Augment]]:
    """Return a maker of two views that are augmented alike."""
    return lambda: [Augment(**augment), Augment(**augment)]


def _unlike(**augment: Any) -> Callable[[], list[Augment]]:
    """Return a maker of two views of which the first is always blurred, and the second solarised at times (BYOL)."""
    return lambda: [Augment(**augment, blur=1.0), Augment(**augment, blur=0.1, solarise=0.2)]


@dataclass(frozen=True)
class SimClr:
    """SimCLR: find the other view of an image among all views of the global batch; beside clip it is SLIP."""

    weight: float = 1.0  # of this objective in the loss
    temperature: float = 0.1
    head: list[int] = field(default_factory=lambda: [2048, 128])  # widths of its layers, the last its output
    views: list[Augment] = field(default_factory=_alike(jitter=[0.8, 0.8, 0.8, 0.2], grayscale=0.2, blur=0.5))  # two


@dataclass(frozen=True)
class Moco:
    """MoCo: find a teacher's view of the same image among a queue of earlier ones (v1, v2), or in the batch (v3)."""

    weight: float = 1.0  # of this objective in the loss
    temperature: float = 0.2
    momentum: float = 0.999  # of the teacher; without a queue it rises to 1 at the end of the run
    queue: int = 65536  # keys of earlier batches; 0: MoCo v3, with keys of the global batch and a predictor
    head: list[int] = field(default_factory=lambda: [2048, 128])  # widths of its layers; v1: [128]
    predictor: list[int] = field(default_factory=list)  # widths of its layers, without a queue
    views: list[Augment] = field(
        default_factory=_alike(crop_scale=[0.2, 1.0], jitter=[0.4, 0.4, 0.4, 0.1], grayscale=0.2, blur=0.5)
    )  # two: with a queue the model's and the teacher's


@dataclass(frozen=True)
class Byol:
    """BYOL: predict what a teacher, the moving average of the weights, gives for another view of an image."""

    weight: float = 1.0  # of this objective in the loss
    momentum: float = 0.996  # of the teacher at the start; it rises to 1 at the end of the run
    head: list[int] = field(default_factory=lambda: [4096, 256])  # hidden and output width, of the predictor, too
    views: list[Augment] = field(default_factory=_unlike(jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.2))  # two


@dataclass(frozen=True)
class Ibot:
    """iBOT: agree with DINO's teacher on soft classes of masked patches, by a head of its own."""

    weight: float = 1.0  # of this part, times objectives.dino.weight
    prototypes: int = 65536  # soft classes of patches
    head: list[int] = field(default_factory=lambda: [2048, 2048, 256])  # widths of the layers before the prototypes
    masked_images: float = 0.5  # share of the global views with masked patches
    mask_ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])  # share of their patches, least and most


@dataclass(frozen=True)
class Dino:
    """DINO: agree with a teacher, the moving average of the weights, on soft classes of an image's views."""

    weight: float = 1.0  # of this objective in the loss
    momentum: float = 0.996  # of the teacher at the start; it rises to 1 at the end of the run
    prototypes: int = 65536  # soft classes
    head: list[int] = field(default_factory=lambda: [2048, 2048, 256])  # widths of the layers before the prototypes
    free_norm: bool = False  # prototypes may have any norm (the paper's ViT-S)
    frozen_steps: int = 0  # steps without a change of the prototypes; the paper: an epoch
    temperature: float = 0.1  # of the model's softmax
    teacher_temperature: list[float] = field(default_factory=lambda: [0.04, 0.07])  # at the start, and after
    teacher_warmup_steps: int = 0  # so many steps; the paper: 30 epochs
    balance: Literal["centre", "sinkhorn"] = "centre"  # what keeps all images from one class; sinkhorn: DINOv2
    centre_momentum: float = 0.9
    koleo: float = 0.0  # weight of the KoLeo regulariser (DINOv2: 0.1)
    koleo_group: int = 0  # images among which it looks for neighbours; 0: the global batch
    ibot: Ibot | None = None  # masked patches of the two views (DINOv2: ibot: {}); the head's other settings are DINO's
    views: list[Augment] = field(
        default_factory=_unlike(crop_scale=[0.4, 1.0], jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.2)
    )  # two, of the model and the teacher
    local: Augment = field(
        default_factory=lambda: Augment(
            crop_scale=[0.05, 0.4], jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.2, blur=0.5, size=96
        )
    )  # further ones, of the model alone
    local_views: int = 8


@dataclass(frozen=True)
class Vae:
    """A variational autoencoder on the image tower: a baseline among the representations."""

    weight: float = 1.0  # of this objective in the loss
    latent: int = 128  # width of the code
    beta: float = 1.0  # weight of the divergence from N(0, 1)
    deviation: float = 0.1  # of a pixel, on the scale 0..1, from what is decoded
    size: int = 32  # pixels a side of what is decoded: 4, 8, 16 ...
    width: int = 256  # channels of the decoder at 4 x 4; each doubling of the side halves them
    views: list[Augment] = field(default_factory=lambda: [Augment(crop_scale=[0.9, 1.0])])  # one


@dataclass(frozen=True)
class Caption:
    """Predict the caption by a decoder behind the image tower."""

    kind: Literal["cappa", "simvlm", "coca"] = "cappa"  # coca: behind the text tower, too, beside objectives.clip
    weight: float = 1.0  # of this objective in the loss
    label_smoothing: float = 0.0  # share of the target that is spread over the vocabulary
    width: int = 0  # of the decoder; 0: the image tower's, of coca the text tower's
    layers: int = 0  # 0: six; of coca with multimodal_cfg in the model's description those of it, as width and heads
    heads: int = 0  # of attention; 0: eight
    parallel: float = 0.75  # of cappa, share of captions that are predicted without seeing any of their tokens


@dataclass(frozen=True)
class Objectives:
    """The objectives to train, those whose sections are set. A recipe without this section trains CLIP."""

    clip: Clip | None = None
    distill: Distill | None = None
    simclr: SimClr | None = None
    moco: Moco | None = None
    byol: Byol | None = None
    dino: Dino | None = None
    vae: Vae | None = None
    caption: Caption | None = None

    @property
    def read_text(self) -> bool:
        """Whether one reads captions."""
        return bool(self.text_read_by)

    @property
    def text_tower(self) -> bool:
        """Whether one needs a text tower; a decoder of captions reads their tokens alone."""
        return self.clip is not None or self.distill is not None

    @property
    def text_read_by(self) -> str:
        """The first objective that reads captions, such as objectives.clip; "": none does."""
        names = ("clip", "distill", "caption")
        return next((f"objectives.{name}" for name in names if getattr(self, name) is not None), "")


@dataclass(frozen=True)
class Optim:
    """The optimiser and its learning rate schedule."""

    # muon: of the matrices of hidden layers, the rest keeps AdamW. lars, lamb: trust ratios of whole tensors
    name: Literal["adamw", "muon", "lars", "lamb", "sgd"] = "adamw"
    lr: float = 5e-4  # at the peak
    min_lr: float = 0.0  # at the end of the cosine
    warmup_steps: int = 100
    beta1: float = 0.9  # of lars and sgd the momentum
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2  # not on biases, norms, position embeddings and the temperature
    weight_decay_end: float | None = None  # at the end of half a cosine from weight_decay; null: constant
    grad_clip: float = 1.0  # norm over all parameters; 0: no clipping
    clip_each: float = 0.0  # norm of each tensor, instead of grad_clip; 0: no clipping
    layer_decay: float = 1.0  # factor of the learning rate from a tower's layer to the one before; 1: none


@dataclass(frozen=True)
class Engine:
    """Memory savings, compilation, and settings of DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    compile: bool = False  # the towers' blocks, by torch.compile: minutes at the first start, kept for later ones
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's configuration (offload, ...)


@dataclass(frozen=True)
class Stage:
    """A part of the steps with smaller images, shorter texts (CLIPA) or fewer patches (FLIP)."""

    share: float  # of the steps
    image_size: int = 0  # pixels a side; 0: the model's
    tokens: int = 0  # of a text at most, its end included; 0: the model's context length
    patch_dropout: float = 0.0  # share of an image's patches that the tower does not see in training


@dataclass(frozen=True)
class Train:
    """Batch size, length, precision, checkpoints and supervision of the training."""

    global_batch: int = 256  # pairs over all ranks, of several texts images: the batch of the loss
    micro_batch: int = 0  # pairs per rank and forward pass; 0: all of a rank. The loss is that of the global batch
    epochs: int = 30
    steps: int = 0  # instead of epochs
    samples: int = 0  # instead of epochs: total pairs, rounded up to a step; a mixture has no epochs
    stages: list[Stage] = field(default_factory=list)  # in their order; empty: all steps as the model is
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    seed: int = 0  # of the initial weights and of dropout
    ema: float = 0.0  # momentum of an exponential moving average of the weights, kept beside them; 0: none
    resume: str = "auto"  # auto: the newest good checkpoint of the run folder, if any; never; or a checkpoint folder
    resume_objectives: Literal["same", "reset"] = "same"  # reset: objectives that a checkpoint lacks start anew
    save_every: int = 0  # steps between checkpoints; 0: once an epoch. The last step always saves
    save_minutes: float = 30.0  # maximum minutes between checkpoints; 0: no maximum
    keep: int = 2  # number of newest checkpoints to keep
    keep_every: int = 0  # also keep those of every multiple of so many steps; 0: none
    keep_best: str = ""  # also keep the best by a validation metric, such as t2i_r1; every validation then saves
    log_every: int = 10  # steps between progress lines and metrics
    compare_every: int = 100  # steps between comparisons of the tensors that are replicated on all ranks; 0: never
    hang_s: float = 600.0  # seconds without progress after which the run ends with the stacks of all ranks; 0: never


@dataclass(frozen=True)
class Guard:
    """Steps to skip, and rollbacks: see clipdist.fault_tolerance.guard."""

    nonfinite: Literal["skip", "stop"] = "skip"  # on inf or nan in the loss or a gradient: skip the step, or end
    loss_spike: float = 8.0  # skip a step whose loss is so many deviations above that of the last steps; 0: never
    update_spike: float = 8.0  # skip a step whose update of a tower is so many times the usual; 0: never
    window: int = 100  # number of last steps to compare with; spikes are detected after so many
    patience: int = 3  # skipped steps within a window that are tolerated; more cause a rollback. 0: no rollback
    rollbacks: int = 3  # number of rollbacks before the run ends


@dataclass(frozen=True)
class Eval:
    """Validation during training."""

    every: int = 0  # steps between validations; 0: once an epoch. The last step always validates
    batch: int = 64  # images per rank and forward pass
    sheet: int = 8  # captions on the contact sheet of retrieved images; 0: no sheet
    labelled: str = (
        ""  # CIFAR's archive, a folder of images by class, or labelled shards: also zero-shot classification
    )
    templates: str = "simple"  # prompts for class names: cifar10, imagenet, simple, a file, or one with {}
    probe: bool = False  # also a linear probe of projected features, on eval.labelled: minutes on a large data set
    knn: bool = False  # also nearest neighbours of features before the projection, on eval.labelled: nothing is fitted


@dataclass(frozen=True)
class Launch:
    """Resources and options of the job that launch/submit.py starts."""

    nodes: int = 1
    gpus: int = 1  # per node; with device=cpu it counts CPU ranks
    cluster: Literal["slurm", "local", "debug"] = "slurm"  # local: processes here; debug: one, in the foreground
    partition: str = ""
    account: str = ""
    time_min: int = 24 * 60
    mem_gb: int = 0  # per node; 0: the site's default
    cpus_per_gpu: int = 0  # 0: one more than the loader's threads
    setup: list[str] = field(default_factory=list)  # shell lines before the job (modules, virtual environment)
    slurm: dict[str, Any] = field(default_factory=dict)  # any sbatch option by its long name: qos, exclude, ...
    signal_s: int = 120  # seconds before its time limit at which a job gets a signal, saves and is requeued
    max_restarts: int = 3  # after a fault; preemptions and time limits do not count
    device_gb: float = 0.0  # memory of one GPU, for the plan; 0: that of this machine
    samples_per_s: float = 0.0  # of the whole job, for the plan's wall time; 0: unknown


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

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
        """The section objectives.clip. Raises AttributeError if the run has none."""
        if self.objectives.clip is None:
            raise AttributeError("objectives.clip is not set")
        return self.objectives.clip
