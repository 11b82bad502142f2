"""Model FLOPs utilisation (MFU): the arithmetic that training needs, beside what the device could do in that time.

As Chowdhery et al. define it (PaLM, 2022, appendix B): what activation checkpointing computes again does not count.
"""

from __future__ import annotations

import re
from dataclasses import replace

from clipdist.config import Config

# Words of a device's name -> dense bf16 TFLOPS with fp32 accumulation, by NVIDIA's data sheets. The first match counts.
PEAK_TFLOPS = {
    "H200 NVL": 836,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
    "A10": 125,
    "L4": 121,
}


def peak_flops(device_name: str) -> float | None:
    """Return the FLOP/s of a device of this name in bf16 and fp16; None: not known, or a part of a device (MIG)."""
    words = set(re.split(r"[\s-]+", device_name))
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if words.issuperset(name.split()))
    return None if "MIG" in words else next((tflops * 1e12 for tflops in found), None)


def flops_per_pair(config: Config) -> float | None:
    """Count the FLOPs of one pair's forward and backward pass: matrix products, attention and convolutions.

    A multiplication with its addition are two. torch's FlopCounterMode counts them on the meta device; the loss, less
    than a thousandth of it at batches of some hundred pairs, is left out. None: a tower reads values of its tensors,
    which have none there.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from clipdist.data.patches import full_images
    from clipdist.estimate.activations import meta_model

    model, spec = meta_model(replace(config, engine=replace(config.engine, activation_checkpointing=False)))
    model.train()
    pairs = 2  # BatchNorm takes no single one
    image = full_images(pairs, spec.transform, "meta")
    tokens = torch.zeros(pairs, 1, spec.context_length, dtype=torch.int64, device="meta")
    try:
        with FlopCounterMode(display=False) as counter:
            outputs = [x for x in model(image=image, tokens=tokens).values() if x.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    except RuntimeError:
        return None
    return counter.get_total_flops() / pairs


def utilisation(samples_per_s: float, flops: float | None, peak: float | None) -> float | None:
    """Return the share of the devices' FLOP/s that training makes use of; None where one of the figures is not known.

    Args:
        samples_per_s, peak: of all devices together; FLOP/s.  flops: of one pair.
    """
    return samples_per_s * flops / peak if flops and peak else None
