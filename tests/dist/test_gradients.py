"""Loss, gradients and the evaluated model are those of one process on the whole batch: W in {1, 2, 4} x ZeRO stage
{0, 1, 2, 3} x {whole batch, cached features} x {InfoNCE, sigmoid, distillation}, in fp32, bf16 and fp16;
a wrong loss is found."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from dist.launch import run_ranks

VIT = "configs/models/tiny_vit.json"
CBOW = "configs/models/tiny_cbow.json"
LSTM = "configs/models/tiny_lstm.json"
RESNET = "configs/models/tiny_rn.json"  # BatchNorm: normalises over a micro-batch
TIMM = "tests/dist/timm_lcnet.json"  # BatchNormAct2d
TIMM_VIT = "tests/dist/timm_vit.json"  # without a text tower
WIDER = "tests/dist/vit_wider.json"  # a teacher with 48 features and images of 40 pixels
DROPOUT = "tests/dist/vit_patch_dropout.json"
NAFLEX = "tests/dist/naflex.json"  # images at their own aspect ratio
BATCH = 16
STAGES = (0, 1, 2, 3)
LOSSES = ("infonce", "sigmoid")
ALL = bool(os.environ.get("EXACT_ALL"))  # make exact: the whole table, where the tests take some of its cells in turn
WIDTHS = (8, 16)  # of 32 features
FEWER = {"image_size": 16, "tokens": 8, "patch_dropout": 0.5}
MISTAKES = ("without_w", "bad_rows_count", "local_rows")  # of tests/dist/gradients.py
TAUGHT = {"heads", "teacher"}
PARTS = {  # further ones, of cells with these objectives
    "simclr": {"heads"},
    "moco": {*TAUGHT, "state"},  # whose head has no BatchNorm
    "moco3": {*TAUGHT, "teacher statistics"},
    "byol": {*TAUGHT, "teacher statistics"},
    "dino": {*TAUGHT, "state"},
    "dino2": {*TAUGHT},
    "vae": {"heads"},
    "caption": {"heads"},
}
Rows = dict[str, list[dict[str, Any]]]  # by the label of a cell
LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}


def cell(
    *,
    model: str = VIT,
    stage: int = 2,
    loss: str = "infonce",
    precision: str = "fp32",
    micro: int = 0,
    steps: int = 1,
    lora: bool = False,
    widths: Sequence[int] = (),
    texts: int = 1,
    distill: str = "",
    teacher: str = VIT,
    alone: bool = False,
    part: dict[str, Any] | None = None,
    compiled: str = "",
    beside: dict[str, Any] | None = None,
    group: int = 0,
    drop_path: float = 0.0,
) -> dict[str, Any]:
    """One setting. Label smoothing comes with the stages that shard gradients: cells with and without it.

    Args:
        distill: objectives.distill.target, of a teacher with drawn weights.
        alone: without objectives.clip.
        part: a stage of train.stages, without its share: smaller images, shorter texts, fewer patches.
        beside: further sections of objectives, by name.
        compiled: the backend of torch.compile; "": engine.compile=false.
        group: model.batchnorm_group.
        drop_path: model.drop_path; at stage 2 with activation checkpointing.
    """
    stages = [{"share": 1, **part}] if part else []
    clip = {"loss": loss, "label_smoothing": 0.1 if stage >= 2 else 0.0, "widths": list(widths)}
    config = {
        "model": {
            "name": model,
            "batchnorm_group": group,
            "drop_path": drop_path,
            **({"lora": {"rank": 2}} if lora else {}),
        },
        "objectives": {
            **({} if alone else {"clip": {**clip, **({"weight": 0.5} if distill else {})}}),
            **({"distill": {"target": distill, "weight": 2.0}} if distill else {}),
            **(beside or {}),
        },
        "optim": {"lr": 1e-3},
        "train": {"global_batch": BATCH, "micro_batch": micro, "precision": precision, "stages": stages},
        # tiny parameters are partitioned, too, as large ones are
        "engine": {
            "zero_stage": stage,
            "compile": bool(compiled),
            "activation_checkpointing": bool(compiled or drop_path) and stage == 2,
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        },
    }
    taught = f" distill {distill} of {Path(teacher).stem}{' alone' if alone else ''}" if distill else ""
    taught += f" {'+'.join(map(_version, beside, beside.values()))}{' alone' if alone else ''}" if beside else ""
    taught += f" {beside['caption']['kind']}" if beside and "caption" in beside else ""
    taught += " masked" if beside and any("ibot" in section for section in beside.values()) else ""
    more = f"{list(widths) or ''}{' lora' if lora else ''} texts={texts}{taught} {part or ''} {compiled} G={group}"
    more += f" drop {drop_path}" if drop_path else ""
    label = f"{Path(model).stem} stage={stage} {loss} {precision} micro={micro} {more}"
    taught_by = teacher if distill else ""
    return {
        "label": label,
        "config": config,
        "steps": steps,
        "texts": texts,
        "teacher": taught_by,
        "compiled": compiled,
    }


def _version(name: str, section: dict[str, Any]) -> str:
    """The name of an objective in PARTS: without a queue or a centre it is another."""
    return f"{name}{'3' if section.get('queue') == 0 else '2' if section.get('balance') == 'sinkhorn' else ''}"


SIMCLR = {"simclr": {"weight": 0.7, "head": [24, 12]}}
MOCO = {
    "moco": {"weight": 0.7, "momentum": 0.5, "head": [24, 12], "queue": 22}
}  # is full in the second step, and wraps
MOCO_3 = {"moco": {"weight": 0.7, "momentum": 0.5, "head": [24, 12], "queue": 0, "predictor": [24, 12]}}
BYOL = {"byol": {"weight": 0.7, "momentum": 0.5, "head": [24, 12]}}
VAE = {"vae": {"weight": 0.7, "latent": 6, "size": 8, "width": 8}}
LOCAL = {"local_views": 2, "local": {"size": 16}}
DINO = {"dino": {"weight": 0.7, "momentum": 0.5, "head": [24, 24, 12], "prototypes": 20, **LOCAL}}
CAPTION = {"width": 24, "layers": 2, "heads": 2, "weight": 0.7, "label_smoothing": 0.1}
CAPPA = {"caption": {**CAPTION, "kind": "cappa", "parallel": 0.5}}
SIMVLM = {"caption": {**CAPTION, "kind": "simvlm"}}
COCA = {"caption": {**CAPTION, "kind": "coca", "width": 0}}
DINO_2 = {"dino": {**DINO["dino"], "balance": "sinkhorn", "free_norm": True, "koleo": 0.1}}
IBOT = {"ibot": {"weight": 0.8, "head": [24, 12], "prototypes": 20}}
MASKED = [{"dino": {**one["dino"], **IBOT, "koleo_group": 8}} for one in (DINO, DINO_2)]


def self_supervised_cells(world: int) -> list[dict[str, Any]]:
    """Objectives on views of an image, alone and beside CLIP; their teachers and state after the step.

    Each objective at two stages for every W, whole and in micro-batches; with ALL at all of them, both ways.
    """
    half = BATCH // world // 2
    cells = []
    for stage, (number, beside) in product(STAGES, enumerate((SIMCLR, MOCO, MOCO_3, BYOL, DINO, DINO_2, VAE))):
        turn = [half if (number + stage // 2) % 2 else 0] if (number + stage + world // 2) % 2 else []
        for micro in (0, half) if ALL else turn:
            cells += [cell(stage=stage, micro=micro, alone=number > 0, beside=beside, steps=2)]
    for stage, micro in in_turn(world, half):
        cells += [cell(stage=stage, micro=micro, model=RESNET, beside=BYOL, steps=2)]
        captions = [
            cell(stage=stage, micro=micro, beside=COCA),
            cell(stage=stage, micro=micro, alone=True, beside=SIMVLM),
        ]
        captions += [cell(stage=stage, micro=half - micro, alone=True, beside=CAPPA)]
        cells += captions if ALL else [captions[(stage + world) % 3]]
    cells += [cell(stage=stage, model=RESNET, beside=BYOL, steps=2, alone=True, group=8) for stage in (2, 3)]
    cells += masked_cells(world) + drop_path_cells(world) if world < 4 else []
    if world < 4:  # keys are shuffled between pairs of groups
        cells += [cell(stage=stage, model=RESNET, beside=MOCO, steps=2, alone=True, group=4) for stage in (1, 3)]
    return cells


def masked_cells(world: int) -> list[dict[str, Any]]:
    """iBOT, in micro-batches of 2 rows too, of which some have no masked patch."""
    cells = []
    for number, (stage, micro) in enumerate(in_turn(world, 2)):
        model, other = (VIT, TIMM_VIT) if number % 2 else (TIMM_VIT, VIT)
        both = [cell(model=model, stage=stage, micro=micro, beside=MASKED[0], alone=True, steps=2)]
        both += [cell(model=other, stage=stage, micro=2 - micro, beside=MASKED[1], alone=True)]
        cells += both if ALL else [both[(stage // 2 + world) % 2]]
    return cells


def drop_path_cells(world: int) -> list[dict[str, Any]]:
    """Branches that few rows keep, so that some micro-batches have none that does; two views of an image."""
    cells = []
    for stage, micro in in_turn(world, 2):
        cells += [cell(stage=stage, micro=micro, drop_path=0.6)]
    for stage in (2, 3):
        cells += [cell(model=TIMM_VIT, stage=stage, micro=2, beside=MASKED[0], alone=True, drop_path=0.6)]
    return cells


def exact_cells(world: int) -> list[dict[str, Any]]:
    share = BATCH // world
    cells = [
        cell(stage=stage, loss=loss, micro=micro)
        for stage in STAGES
        for loss in LOSSES
        for micro in (0, share // (4 if stage % 2 else 2))
    ]
    for micro in (0, share // 2):
        cells += [cell(model=RESNET, micro=micro, steps=2), cell(model=DROPOUT, stage=3, micro=micro)]
        cells += [cell(model=CBOW, micro=micro)]
        cells += [cell(stage=3, micro=micro, widths=WIDTHS, texts=2)]
    for stage, micro in in_turn(world, share // 2):
        cells += [cell(stage=stage, loss=LOSSES[stage // 2], micro=micro, widths=WIDTHS)]
        cells += [cell(stage=stage, loss=LOSSES[1 - stage // 2], micro=micro, texts=3)]
    cells += [cell(model=LSTM, stage=stage, micro=micro) for stage, micro in in_turn(world, share // 4)]
    cells += [cell(stage=stage, micro=micro, part=FEWER) for stage, micro in ((1, 0), (2, share // 2), (3, share // 4))]
    cells += [cell(model=NAFLEX, stage=stage, micro=micro) for stage, micro in ((1, 0), (3, share // 2))]
    cells += distill_cells(world) + group_cells(world)
    cells += self_supervised_cells(world)
    if world == 2:
        # Two steps of LoRA: in the first the half of an adapter has no gradient, for the other half is 0.
        cells += [cell(stage=stage, micro=2 * (stage % 2), steps=2, lora=True) for stage in STAGES]
        cells += [cell(stage=stage, micro=2, precision="bf16", steps=2, lora=True) for stage in (0, 3)]
        cells += [cell(model=RESNET, stage=3, micro=4, steps=2, lora=True)]
        cells += [cell(stage=stage, precision="fp16", micro=micro) for stage, micro in in_turn(world, 2)]
        half = [(RESNET, 0), (RESNET, 2), (TIMM, 2)]
        cells += [cell(model=name, precision="bf16", micro=m, steps=2) for name, m in half]
        cells += [cell(stage=stage, precision="bf16", micro=micro, steps=2) for stage, micro in in_turn(1, 2)]
        cells += [cell(stage=stage, loss="sigmoid", precision="bf16", micro=2) for stage in (STAGES if ALL else (0, 1))]
        cells += [cell(stage=stage, loss="sigmoid", micro=4, steps=3) for stage in (1, 3)]
        cells += [cell(model=LSTM, stage=3, precision="bf16", micro=2), cell(model=LSTM, precision="fp16", texts=2)]
        cells += compiled_cells()
    return cells


def compiled_cells() -> list[dict[str, Any]]:
    """engine.compile: what Inductor makes of one block, and what is traced of everything that is put into blocks.

    At stage 2 with activation checkpointing.
    """
    traced = partial(cell, compiled="aot_eager")
    cells = [cell(model=CBOW, stage=1, micro=2, compiled="inductor")]
    cells += [traced(stage=0), traced(stage=1, micro=2, steps=2, lora=True), traced(precision="fp16", micro=2)]
    cells += [traced(stage=1, micro=4, steps=2, alone=True, beside=DINO)]
    return [*cells, traced(model=RESNET, micro=4, steps=2), traced(model=LSTM, micro=2)]


def group_cells(world: int) -> list[dict[str, Any]]:
    """BatchNorm over groups: parts of a forward pass, whole ones, and those of several ranks; two steps."""
    grouped, half = partial(cell, model=RESNET, steps=2), BATCH // world // 2
    cells = [grouped(stage=1, group=4), grouped(stage=3, group=16)]
    if world < 4:  # of two values a channel, in the last layer, little but rounding is left
        cells += [grouped(micro=half, group=min(4, half))]
    if world == 2:
        cells += [grouped(compiled="aot_eager", group=16)]  # recomputed activations add to no statistics
        cells += [grouped(model=TIMM, micro=half, group=2, precision="bf16")]
    if world == 4:  # two ranks a group; a rank without a valid row
        cells += [grouped(group=8), grouped(group=16) | {"only_valid": [0, 5, 11], "label": "few valid rows fp32 G=16"}]
    if ALL and world == 2:
        cells += [grouped(model=TIMM, micro=half, group=half), grouped(precision="fp16", group=4)]
        cells += [grouped(compiled="aot_eager", micro=half, group=2)]
    return cells


def in_turn(world: int, micro: int) -> list[tuple[int, int]]:
    """Every stage, whole or in micro-batches in turn; the other way round for the next W. With ALL both ways."""
    if ALL:
        return [(stage, rows) for stage in STAGES for rows in (0, micro)]
    return [(stage, micro if (stage + world // 2) % 2 else 0) for stage in STAGES]


def distill_cells(world: int) -> list[dict[str, Any]]:
    """Both targets beside CLIP and alone; every stage whole and in micro-batches, though not for every W."""
    half = BATCH // world // 2
    cells = [cell(stage=stage, micro=micro, distill="logits", teacher=WIDER) for stage, micro in in_turn(world, half)]
    cells += [cell(stage=stage, micro=half - micro, distill="features") for stage, micro in in_turn(world, half)]
    cells += [cell(stage=3, micro=half, distill="logits", teacher=RESNET, alone=True)]
    cells += [cell(stage=2, micro=0, distill="features", teacher=RESNET, alone=True)]
    cells += [cell(stage=1, micro=half, distill="features", loss="sigmoid", texts=3)]
    if world == 2:
        cells += [cell(stage=2, precision="fp16", micro=2, distill="logits")]
        cells += [cell(stage=3, precision="bf16", micro=2, distill="features")]
    return cells


def wrong_cells() -> list[dict[str, Any]]:
    cells = [cell(stage=1) | {"loss": name, "label": name} for name in MISTAKES]
    return [*cells, cell(stage=1, micro=2) | {"loss": "without_w", "label": "cached without_w"}]


def low_loss_cell() -> dict[str, Any]:
    """Three pairs that are soon told apart: the loss falls below 1e-3."""
    one = cell(stage=1, steps=12) | {"label": "low loss", "only_valid": [0, 5, 11]}
    one["config"]["objectives"]["clip"]["logit_scale_init"] = 4.0
    return one


@pytest.fixture(scope="module", params=[1, 2, 4])
def audited(request, tmp_path_factory) -> tuple[int, Rows]:
    """W, and the audit's rows by cell: all cells of a W in the same processes."""
    world, folder = request.param, tmp_path_factory.mktemp("cells")
    cells = exact_cells(world) + ([*wrong_cells(), low_loss_cell()] if world == 2 else [])
    for number, one in enumerate(cells):
        (folder / f"{number}.yaml").write_text(json.dumps(one["config"]))
        one["config"] = str(folder / f"{number}.yaml")
    (folder / "cells.json").write_text(json.dumps(cells))
    run_ranks("gradients.py", world, str(folder / "cells.json"), str(folder / "rows.json"), timeout_s=900)
    rows = json.loads((folder / "rows.json").read_text())
    return world, {one["label"]: [row for row in rows if row["label"] == one["label"]] for one in cells}


def test_gradients_are_exact(audited):
    world, by_cell = audited
    wrong = []
    for label in (one["label"] for one in exact_cells(world)):
        rows = by_cell[label]
        parts = {row["part"] for row in rows}
        expected = {"image", "text", "temperature", "loss", "evaluation"} | ({"bias"} if "sigmoid" in label else set())
        for name, more in PARTS.items():
            expected |= more if name in label.split() else set()
        if "moco" in label.split() and label.startswith("tiny_rn"):
            expected |= {"teacher statistics"}
        if PARTS.keys() & set(label.split()) and "alone" in label:  # without a text tower
            expected -= {"text", "temperature"}
        assert parts == expected, label
        untrained = ("temperature", "text") if "alone" in label and "logits" not in label else ()
        for row in rows:
            line = "W={} {label} step {step} {part}: ratio {norm_ratio:.6f}, error {error:.1e}".format(world, **row)
            print(line)
            assert row["reference_norm"] > 1e-3 or row["part"] in untrained, line  # something to be exact about
            if row["error"] > LIMITS[label.split()[3]] or not row["passed"]:
                wrong.append(line)
            if abs(row["reported"] - 1) > 1e-3 and row["part"] not in untrained:  # the norms that go to the metrics
                wrong.append(f"{line}; reported norm x {row['reported']:.4f}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("audited", [2], indirect=True)
def test_a_wrong_loss_is_found_out(audited):
    by_cell = audited[1]
    for label in (one["label"] for one in wrong_cells()):
        verdict = {row["part"]: row["passed"] for row in by_cell[label]}
        assert not verdict["image"], label
        assert not verdict["text"], label
    halved = {row["part"]: row["norm_ratio"] for row in by_cell["without_w"]}
    assert halved["image"] == pytest.approx(0.5, rel=1e-4)
    assert halved["temperature"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("audited", [2], indirect=True)
def test_a_low_loss_is_held_to_the_dense_codes_own_error(audited):
    rows = audited[1]["low loss"]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    (loss,) = (row for row in last if row["part"] == "loss")
    assert loss["reference_norm"] < 1e-3
    assert all(row["passed"] for row in rows)
    assert max(row["limit"] for row in last) > 1e-5  # dense fp32 code is worse than the usual limit here
    assert max(row["error"] for row in last) < 1e-5  # this one is not
