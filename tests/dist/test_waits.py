"""How often the host waits for the device in a step: for CLIP twice at most, 3 times with a guard; see waits.py."""

from __future__ import annotations

import json
from collections import Counter

from dist.launch import run_ranks

# Two optimiser groups, clipping on; at stage 0 in half precision one more for each of tiny_rn's 97 trained parameters.
INFONCE, SIGMOID = (f"{{clip: {{loss: {loss}, logit_scale_init: 4.6}}}}" for loss in ("infonce", "sigmoid"))
# Objectives on views, and what is waited for before the guard: NT-Xent's, KoLeo's and MoCo v3's checks of the features
# (of both views each), NT-Xent's places of valid rows on a rank and in the batch, Sinkhorn-Knopp's check of both views.
VIEWS = {
    "{clip: null, simclr: {head: [24, 12]}}": 3,
    "{clip: null, moco: {head: [24, 12], queue: 0, predictor: [24, 12]}}": 2,
    "{clip: null, dino: {head: [24, 12], prototypes: 20, local_views: 1, local: {size: 16}}}": 0,
    "{clip: null, dino: {head: [24, 12], prototypes: 20, local_views: 0, balance: sinkhorn, koleo: 0.1}}": 4,
    "{clip: null, vae: {latent: 6, size: 8, width: 8}}": 0,
}
BYOL, MOCO = "{clip: null, byol: {head: [24, 12]}}", "{clip: null, moco: {head: [24, 12], queue: 22}}"
CELLS = [
    # model, objectives, micro-batch, guard, stage, precision, waits of DeepSpeed (docs/architecture.md), other settings
    ("tiny_vit", INFONCE, 0, True, 0, "fp32", 2),
    ("tiny_vit", INFONCE, 0, False, 2, "bf16", 6),
    ("tiny_rn", INFONCE, 4, True, 1, "bf16", 3),
    ("tiny_rn", SIGMOID, 4, False, 0, "bf16", 97 + 8),
    ("tiny_vit", SIGMOID, 0, True, 3, "fp16", 4),
    ("tiny_vit", INFONCE, 0, False, 2, "fp32", 3, "optim={name: lars, clip_each: 3, grad_clip: 0}"),
    ("tiny_vit", INFONCE, 4, True, 1, "bf16", 2, "optim={name: lamb, clip_each: 3, grad_clip: 0}"),
    *[("tiny_vit", objectives, 0, True, 1, "fp32", 5) for objectives in VIEWS],
    ("tiny_rn", BYOL, 4, True, 3, "bf16", 3 + 32),  # the teacher's pass runs other modules: DeepSpeed notes them anew
    ("tiny_rn", MOCO, 0, True, 2, "bf16", 6, "model.batchnorm_group=4"),
]
KEYS = ("model", "objectives", "micro", "guarded", "stage", "precision")


def test_the_host_waits_twice_a_step_and_once_more_for_the_guard():
    cells = [dict(zip(KEYS, cell)) | {"more": cell[7:]} for cell in CELLS]
    out = run_ranks("step_waits.py", 2, json.dumps(cells))
    known, *found = (json.loads(line)["waits"] for line in out.splitlines() if line.startswith("{"))
    assert sum(count for *_, count in known) == 12, known
    for cell, deepspeeds, waits in zip(cells, (cell[6] for cell in CELLS), found, strict=True):
        by_package: Counter[str] = Counter()
        for package, _, count in waits:
            by_package[package] += count
        ours = VIEWS.get(cell["objectives"], 0 if cell["objectives"] in (BYOL, MOCO) else 2)
        assert by_package == {"clipdist": ours + cell["guarded"], "deepspeed": deepspeeds}, (cell, waits)
        assert not any(what.endswith("synchronize") for _, what, _ in waits), (cell, waits)
