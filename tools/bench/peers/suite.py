"""Measure an open_clip model with CLIP_benchmark, as it is, on a set in its WebDataset form.

It is installed aside, since it needs an older NumPy than the project: its `accuracy` fails with 2.4.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from clipdist.errors import UserError

INSTALL = (
    "pip install --no-deps --target DIR clip-benchmark 'numpy<2.4' 'scikit-learn<2' scipy joblib threadpoolctl narwhals"
    " pycocoevalcap pycocotools; then PYTHONPATH=DIR"
)
NAMES = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
NAMES |= {f"t2i_r{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)}
NAMES |= {f"i2t_r{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)}
BATCH = 64


def require_clip_benchmark() -> None:
    """Raise UserError where it is not installed."""
    if importlib.util.find_spec("clip_benchmark") is None:
        raise UserError(f"CLIP_benchmark is not installed; it goes aside: {INSTALL}")


def clip_benchmark_figures(
    model: nn.Module, transform: Callable[..., Any], tokenizer: Callable[..., Any], task: str, folder: Path
) -> dict[str, float]:
    """Return its figures by our names, in percent; without those that it gives as nan (top 5 of four classes).

    Args:
        model: as open_clip loads it, in evaluation mode, on the CPU.
        task: zero_shot or retrieval.
        folder: the set's.
    """
    from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of webdataset, about shuffling
        dataset: Any = build_wds_dataset(folder.name, transform, "test", str(folder))
        if task == "retrieval":
            batches = DataLoader(dataset, BATCH, collate_fn=image_captions_collate_fn)
            found = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        else:
            batches = DataLoader(dataset, BATCH)
            prompts = (dataset.classes, dataset.templates)
            found = zeroshot_classification.evaluate(model, batches, tokenizer, *prompts, "cpu", amp=False)
    return {ours: 100 * found[theirs] for ours, theirs in NAMES.items() if found.get(theirs) == found.get(theirs, 0)}
