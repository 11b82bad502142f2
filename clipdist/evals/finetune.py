"""Fine-tune a trained image tower and a linear layer together on a few labelled images, and measure the accuracy.

The semi-supervised protocol of SimCLR (Chen et al. 2020, appendix B.5): Nesterov momentum SGD without any
regularisation, learning rate 0.05 per 256 images of a batch, random crops and flips alone, 60 epochs on 1 % of the
labels and 30 on more. Here the rate falls along a cosine, and the layer sees features standardised with what mean and
deviation they had before: the same rate then suits towers of any scale. Crops keep a quarter of the area at least,
where SimCLR's go down to 8 %: images of 32 pixels have no more to spare.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipdist.config import Data
from clipdist.data.augment import UNIFORMS, random_crop
from clipdist.data.decode import resize
from clipdist.data.transform import EvalTransform, NativeAspect
from clipdist.data.views import image_view
from clipdist.datasets.labelled import LabelledSet, Split
from clipdist.errors import Fault, UserError
from clipdist.evals.decode_ahead import decode_ahead
from clipdist.evals.embed import WorkShare
from clipdist.evals.features import Kind, embed_split, image_features
from clipdist.evals.probe import Probe, statistics
from clipdist.models.dual_encoder import DualEncoder

CROP_SCALE_MIN = 0.25
FLIP = 0.5
LR_PER_256 = 0.05
MOMENTUM = 0.9


@dataclass(frozen=True)
class FinetuneSchedule:
    """How long and how fast: `lr` is the first step's, of the tower and the layer alike."""

    epochs: int
    batch: int
    lr: float


def simclr_schedule(percent: float, batch: int, epochs: int | None = None) -> FinetuneSchedule:
    """Return SimCLR's schedule for a share of the labels in percent; `epochs` overrules its number."""
    return FinetuneSchedule(epochs or (60 if percent <= 1 else 30), batch, LR_PER_256 * batch / 256)


def finetune(
    model: DualEncoder,
    data: LabelledSet,
    rows: Sequence[int] | np.ndarray,
    frozen: Tensor,
    schedule: FinetuneSchedule,
    kind: Kind = "projected",
    seed: int = 0,
    device: str | torch.device = "cpu",
    threads: int = 2,
    progress: bool = True,
) -> Probe:
    """Train a copy of the image tower with a linear layer on some training images, and classify the test set.

    Args:
        model: stays as it is.
        rows: which training images.
        frozen: the untrained tower's features of about these images, fp32 [n, D]: their mean and deviation.
        kind: the layer stands after the projection, or in place of it ("tower").

    Raises:
        UserError: fewer than two images can be decoded.
        Fault: training has diverged.
    """
    assert data.train is not None  # its rows are named
    network = _Classifier(model, frozen, len(data.classes), kind, seed).to(device)
    _train(network, data.train, rows, schedule, seed, device, threads, progress)
    network.eval()

    def encode(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert image is not None
        return network(image.to(device, non_blocking=True)), None

    share = WorkShare(batch=schedule.batch, threads=threads, progress=progress)
    tested = embed_split(encode, data.test, model.spec.transform, share)
    if not torch.isfinite(tested.image).all():
        raise Fault(f"fine-tuning with learning rate {schedule.lr:g} has diverged; give a smaller --batch")
    return Probe(tested.image, tested.labels, data.classes, lr=schedule.lr)


class _Classifier(nn.Module):
    """uint8 [b, 3, S, S] -> logits [b, c]; a copy of the model whose text tower has no gradients."""

    mean: Tensor
    scale: Tensor

    def __init__(self, model: DualEncoder, frozen: Tensor, classes: int, kind: Kind, seed: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.visual.requires_grad_(True)
        self.kind: Kind = kind
        mean, scale = statistics(frozen)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(frozen.shape[1], classes)
            # At zero no gradient would reach the tower in the first step: merely small.
            nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        features = image_features(self.model, image, self.kind)
        return self.layer((features.float() - self.mean) / self.scale)


def _train(
    network: _Classifier,
    split: Split,
    rows: Sequence[int] | np.ndarray,
    schedule: FinetuneSchedule,
    seed: int,
    device: str | torch.device,
    threads: int,
    progress: bool,
) -> None:
    batch = min(schedule.batch, len(rows))
    per_epoch = len(rows) // batch  # the rest of an epoch is left out: BatchNorm wants whole batches
    steps = schedule.epochs * per_epoch
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=schedule.lr, momentum=MOMENTUM, nesterov=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    network.train()
    transform, bad = network.model.spec.transform, dict[tuple[int, int], str]()

    def load(drawn: tuple[int, int]) -> Tensor:
        uniforms = np.random.default_rng((seed, *drawn)).random(UNIFORMS + 1)
        return _cropped(split.read(drawn[1]), transform, uniforms)

    draws = _draws(rows, batch, schedule.epochs, seed)
    decoded = decode_ahead(load, draws, transform.shape, batch, steps, threads, bad)
    done = 0
    for images, drawn in tqdm(decoded, "fine-tuning", steps, disable=None if progress else True):
        good = [row for row, which in enumerate(drawn) if which not in bad]
        if len(good) > 1:  # of one image BatchNorm has no variance
            labels = torch.from_numpy(split.labels[[drawn[row][1] for row in good]])
            optimiser.zero_grad()
            F.cross_entropy(network(images[good].to(device)), labels.to(device)).backward()
            optimiser.step()
            falling.step()
            done += 1
    if not done:
        raise UserError(f"fine-tuning needs at least 2 pictures that can be decoded, of {len(rows)}")


def _draws(rows: Sequence[int] | np.ndarray, batch: int, epochs: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (epoch, row) of every image in the order of training."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(np.asarray(rows))
        for row in order[: len(order) // batch * batch]:
            yield epoch, int(row)


def _cropped(pixels: np.ndarray, transform: EvalTransform, uniforms: np.ndarray) -> Tensor:
    """Crop at random, resize and perhaps mirror: uint8 [h, w, 3] -> uint8 of shape transform.shape."""
    numbers, size = uniforms[:UNIFORMS].tolist(), transform.size
    if isinstance(transform, NativeAspect):
        view = image_view(Data(crop_scale_min=CROP_SCALE_MIN, flip=FLIP), size, transform)
        box = top, left, height, width = view.crop(pixels.shape[0], pixels.shape[1], numbers)
        out = torch.empty(1, *view.shape, dtype=torch.uint8)
        view.write(pixels[top : top + height, left : left + width], view.target(box), numbers, out)
        return out[0]
    top, left, height, width = random_crop(pixels.shape[0], pixels.shape[1], uniforms.tolist(), CROP_SCALE_MIN)
    image = resize(pixels[top : top + height, left : left + width], size, size)
    return image.flip(2) if uniforms[UNIFORMS] < FLIP else image
