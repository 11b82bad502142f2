"""How often the host waits for the device in a training step: at most 2 times, and 3 with a guard; see waits.py."""

from __future__ import annotations

import json
from collections import Counter

from dist.launch import run_ranks

# Two optimiser groups, clipping on; at stage 0 in half precision one more for each of tiny_rn's 97 trained parameters.
CELLS = [
    # model, loss, micro-batch, guard, stage, precision, waits that DeepSpeed makes (docs/architecture.md), optimiser
    ("tiny_vit", "infonce", 0, True, 0, "fp32", 2),
    ("tiny_vit", "infonce", 0, False, 2, "bf16", 6),
    ("tiny_rn", "infonce", 4, True, 1, "bf16", 3),
    ("tiny_rn", "sigmoid", 4, False, 0, "bf16", 97 + 8),
    ("tiny_vit", "sigmoid", 0, True, 3, "fp16", 4),
    ("tiny_vit", "infonce", 0, False, 2, "fp32", 3, "{name: lars, clip_each: 3, grad_clip: 0}"),
    ("tiny_vit", "infonce", 4, True, 1, "bf16", 2, "{name: lamb, clip_each: 3, grad_clip: 0}"),
]
KEYS = ("model", "loss", "micro", "guarded", "stage", "precision")


def test_the_host_waits_twice_a_step_and_once_more_for_the_guard():
    cells = [dict(zip(KEYS, cell)) | {"optim": cell[7] if cell[7:] else "{}"} for cell in CELLS]
    out = run_ranks("step_waits.py", 2, json.dumps(cells))
    known, *found = (json.loads(line)["waits"] for line in out.splitlines() if line.startswith("{"))
    assert sum(count for *_, count in known) == 12, known
    for cell, deepspeeds, waits in zip(cells, (cell[6] for cell in CELLS), found, strict=True):
        by_package: Counter[str] = Counter()
        for package, _, count in waits:
            by_package[package] += count
        assert by_package == {"clipdist": 2 + cell["guarded"], "deepspeed": deepspeeds}, (cell, waits)
        assert not any(what.endswith("synchronize") for _, what, _ in waits), (cell, waits)
