"""The plan before the queue: its parts against real models, real passes, and figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.config import Config, load_config, to_yaml
from clipdist.distributed.rank import DTYPES
from clipdist.engine.moving_teacher import copy_for_teacher
from clipdist.errors import UserError
from clipdist.estimate import activations, full_table, make_estimate, summary
from clipdist.estimate.activations import Activations, meta_model, one_pass
from clipdist.estimate.memory import (
    ACTIVATIONS,
    BATCH,
    STATE,
    TEACHER,
    ModelSizes,
    StepLayout,
    by_stage,
    optimizer_bytes,
    weight_bytes,
)
from clipdist.estimate.traffic import wire_bytes
from clipdist.evals.audit import RandomBatches
from clipdist.losses.wire import clipdist_bytes
from clipdist.models.build import build_model
from clipdist.models.norms import running_norms
from clipdist.objectives.describe import describe
from clipdist.objectives.make import make_objectives, prepare_model

TINY = ["model.name=configs/models/tiny_vit.json", "train.global_batch=16", "device=cpu"]
RESNET = ["model.name=configs/models/tiny_rn.json", "train.global_batch=16", "device=cpu"]
CBOW = ["model.name=configs/models/tiny_cbow.json", "train.global_batch=16", "device=cpu"]
LSTM = ["model.name=configs/models/tiny_lstm.json", "train.global_batch=16", "device=cpu"]


def configured(*words: str, base: list[str] = TINY) -> Config:
    return load_config(None, [*base, *words])


def saved_bytes(config: Config, batch: int, dtype: torch.dtype) -> int:
    """What autograd keeps of a real forward pass on the CPU, each storage once, parameters and buffers left out."""
    model = build_model(config.model, config.objectives.clip).to(dtype).train()
    if model.text_kind != "sequences":
        model.text_kind = "whole"  # texts count as long as the context
    image = torch.zeros(batch, 3, model.spec.image_size, model.spec.image_size, dtype=torch.uint8)
    tokens = torch.ones(batch, model.spec.context_length, dtype=torch.int64)
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), image, tokens]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = list(model(image=image, tokens=tokens).values())
    total = sum(storage.nbytes() for storage in kept.values())
    del outputs
    return total


@pytest.mark.parametrize("base", [TINY, RESNET, CBOW, LSTM], ids=["vit", "resnet", "cbow", "lstm"])
def test_parameters_are_those_of_the_real_model(base: list[str]) -> None:
    found = make_estimate(configured("model.lock_image=true", base=base))
    model = build_model(found.config.model, found.config.objectives.clip)
    assert found.sizes.all == sum(p.numel() for p in model.parameters())
    assert found.sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < found.sizes.trained < found.sizes.all
    assert found.model.counts["text"] == sum(p.numel() for p in model.text.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", [TINY, RESNET], ids=["vit", "resnet"])
def test_activations_are_what_a_real_forward_pass_saves(base: list[str], dtype: torch.dtype) -> None:
    config = configured(base=base)
    found = one_pass(meta_model(config)[0].to(dtype), 8)
    assert found.measured_on == "meta"
    assert found.saved == pytest.approx(saved_bytes(config, 8, dtype), rel=0.05)
    assert found.saved <= found.peak <= found.peak_with_gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_lstm_is_measured_as_it_runs(precision: str) -> None:
    config = configured(base=LSTM)
    found = activations.measure(config, meta_model(config)[0], 8, precision)
    assert found.measured_on == "cpu"
    saved = saved_bytes(config, 8, DTYPES[precision])
    assert found.saved == pytest.approx(saved, rel=0.2)  # from two and three pairs, which it runs otherwise than eight
    real = build_model(config.model, config.objectives.clip).to(DTYPES[precision])
    assert one_pass(real, 8).saved == pytest.approx(saved, rel=0.02)


def test_meta_and_real_passes_agree() -> None:
    config = configured()
    assert one_pass(build_model(config.model, config.objectives.clip), 8).peak == pytest.approx(
        one_pass(meta_model(config)[0], 8).peak, rel=0.05
    )


def test_checkpointing_keeps_less() -> None:
    whole = one_pass(meta_model(configured())[0], 8)
    again = one_pass(meta_model(configured("engine.activation_checkpointing=true"))[0], 8)
    assert again.saved < whole.saved / 3
    assert again.peak < whole.peak


def test_a_model_that_needs_values_is_measured_in_two_small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured()
    model = meta_model(config)[0]
    expected = one_pass(build_model(config.model, config.objectives.clip), 8)

    def refuse_meta(model: Any, *more: Any) -> Activations:
        if next(model.parameters()).is_meta:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return one_pass(model, *more)

    monkeypatch.setattr(activations, "one_pass", refuse_meta)
    found = activations.measure(config, model, 8, "fp32")
    assert found.measured_on == "cpu"
    assert found.saved == pytest.approx(expected.saved, rel=0.02)


def test_the_plan_takes_the_largest_stage() -> None:
    whole = make_estimate(configured("train.steps=10"))
    last = "{share: 0.1}"
    small, few = "{share: 0.9, image_size: 16, tokens: 8}", "{share: 0.9, patch_dropout: 0.5}"
    found = {
        stages: make_estimate(configured("train.steps=10", f"train.stages=[{stages}]"))
        for stages in (f"{small}, {last}", small.replace("0.9", "1"), f"{small}, {few.replace('0.9', '0.1')}")
    }
    (mixed, smallest, fewer) = found.values()
    assert mixed.activations == whole.activations
    assert smallest.activations.peak < fewer.activations.peak < whole.activations.peak
    assert smallest.host["batches ahead"] < whole.host["batches ahead"] == mixed.host["batches ahead"]
    with pytest.raises(UserError, match=r"train\.stages\[1\]\.share=0\.01: leaves it no step of 10"):
        make_estimate(configured("train.steps=10", "train.stages=[{share: 0.99}, {share: 0.01}]"))


VIEWS = {
    "simclr": "{clip: null, simclr: {head: [24, 12]}}",
    "moco": "{clip: null, moco: {head: [24, 12], queue: 64}}",
    "byol": "{clip: null, byol: {head: [24, 12]}}",
    "dino": "{clip: null, dino: {head: [24, 12], prototypes: 500, local_views: 2, local: {size: 16}, koleo: 0.1}}",
    "slip": "{simclr: {head: [24, 12]}}",
}


@pytest.mark.parametrize("name", VIEWS)
def test_objectives_on_views_are_what_a_real_model_and_engine_hold(name: str) -> None:
    found = make_estimate(configured(f"objectives={VIEWS[name]}"))
    config = found.config
    model = build_model(config.model, config.objectives.clip, with_text=config.objectives.read_text)
    objectives = make_objectives(config.objectives, model.spec.image_size)
    prepare_model(model, objectives)
    assert found.sizes.all == sum(p.numel() for p in model.parameters())
    assert found.sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.model.counts["heads"] == sum(p.numel() for p in model.heads.parameters()) > 0
    assert (found.model.counts["text"] > 0) == (name == "slip")
    teachers = [objective.teacher for objective in objectives if objective.teacher]
    copy = copy_for_teacher(model, torch.float32)
    tensors = [*copy.parameters(), *copy.buffers()]
    assert found.stages[0].parts[TEACHER] == (sum(t.nbytes for t in tensors) if teachers else 0)
    assert found.stages[3].parts[TEACHER] == 0
    assert found.layout.ema == bool(teachers)
    state = sum(t.nbytes for objective in objectives for t in objective.state().values())
    assert found.stages[1].parts[STATE] in (state, 3 * state)
    batch = RandomBatches(config, model.spec).batch(0)
    pixels = sum(image.nbytes for image in batch.images.values())
    assert found.stages[1].parts[BATCH] == pixels + batch.tokens.nbytes + 17 * len(batch)
    text = full_table(found)
    assert all(describe(objective) in text for objective in objectives)
    assert f"{found.layout.micro} {'pairs' if name == 'slip' else 'images'}" in text


def test_views_are_counted_in_their_own_sizes() -> None:
    def peak(section: str) -> int:
        return make_estimate(configured(f"objectives={section}")).activations.saved

    dino = "{{clip: null, dino: {{head: [24, 12], prototypes: 500, local_views: {views}, local: {{size: {size}}}}}}}"
    none, small, large = (peak(dino.format(views=n, size=size)) for n, size in ((0, 16), (4, 16), (4, 32)))
    assert large - none == pytest.approx(2 * none, rel=0.02)  # four more views beside two
    assert 0 < small - none < 0.5 * (large - none)
    asked = peak("{clip: null, moco: {head: [24, 12], queue: 64}}")  # the second view is the teacher's alone
    assert asked == pytest.approx(peak("{clip: null, byol: {head: [24, 12]}}") / 2, rel=0.1)


def test_traffic_of_objectives_on_views_by_hand() -> None:
    words = ["launch.gpus=4", "engine.zero_stage=2", "train.precision=fp32"]  # b = 4

    def sent(name: str, *more: str) -> dict[str, float]:
        return make_estimate(configured(f"objectives={VIEWS[name]}", *words, *more)).wire

    assert sent("simclr")["simclr: outputs, sums"] == 3 * (8 * (12 * 4 + 4) + 56)
    count = 2 * 3 / 4 * 4
    assert sent("byol")["byol: outputs, sums"] == count
    assert sent("moco")["moco: outputs, sums"] == count + 3 * 4 * (12 * 4 + 1)
    assert sent("dino")["dino: outputs, sums"] == count + 2 * 3 / 4 * 8 * 501
    assert "loss: features, their gradients, sums" not in sent("byol")
    found = make_estimate(configured(f"objectives={VIEWS['byol']}", *words))
    assert found.wire["teacher: all-reduce of fp32 weights"] == 2 * 3 / 4 * 4 * found.sizes.trained
    third = sent("byol", "engine.zero_stage=3", "train.micro_batch=2")
    assert third["weights: all-gather for the teacher's pass"] == 2 * 3 / 4 * 4 * found.sizes.all
    assert "teacher: all-reduce of fp32 weights" not in third


def test_batchnorm_over_ranks_keeps_fp32_inputs_and_sends_moments() -> None:
    words = [f"objectives={VIEWS['byol']}", "launch.gpus=2", "train.precision=bf16"]
    alone = make_estimate(configured(*words, base=RESNET))
    grouped = make_estimate(configured(*words, "model.batchnorm_group=16", base=RESNET))
    assert 1.5 * alone.activations.saved < grouped.activations.saved < 3 * alone.activations.saved
    model = build_model(grouped.config.model, with_text=False)
    prepare_model(model, grouped.model.objectives)
    tower = sum(norm.num_features for norm in running_norms(model.visual))
    head = sum(norm.num_features for norm in running_norms(model.heads))
    moments = 2 * 8 * (2 * 2 + 2) * (tower + head)  # two views, forward and backward, and the teacher's forward
    assert grouped.wire["BatchNorm over groups: all-reduce of moments"] == moments
    assert grouped.wire.keys() - alone.wire.keys() == {"BatchNorm over groups: all-reduce of moments"}


def test_a_step_at_which_a_queue_moves_may_be_the_fullest() -> None:
    found = make_estimate(configured("objectives={clip: null, moco: {head: [24, 128], queue: 65536}}"))
    assert found.memory.moment == "teacher's update"
    assert found.memory.parts[STATE] == 3 * (65536 * 128 * 4 + 16)


def layout(**changes: Any) -> StepLayout:
    plain = StepLayout(
        stage=1, world=4, share=8, micro=8, itemsize=2, bfloat16=True, bucket=1000, cpu=False, offload=False, ema=False
    )
    return replace(plain, **changes)


SIZES = ModelSizes(trained=4000, locked=400, small=100, buffer_bytes=40, width=32)


def test_weights_and_optimiser_by_hand() -> None:
    assert weight_bytes(SIZES, layout()) == 4400 * 2 + 40
    assert weight_bytes(SIZES, layout(stage=3)) == 1100 * 2 + 100 * 2 + 40
    assert optimizer_bytes(SIZES, layout(stage=0)) == 4000 * 12
    assert optimizer_bytes(SIZES, layout(stage=0, itemsize=4)) == 4000 * 8  # the weights themselves are stepped
    assert optimizer_bytes(SIZES, layout()) == 1000 * 12
    assert optimizer_bytes(SIZES, layout(ema=True)) == 1000 * 16
    assert optimizer_bytes(replace(SIZES, moments=1), layout()) == 1000 * 8  # LARS and SGD
    muon = replace(SIZES, matrices=2000)
    assert optimizer_bytes(muon, layout()) == 1000 * 12 - 500 * 4  # one moment
    assert wire_bytes(muon, layout(), "", "bf16")["Muon's matrices: all-to-all"] == 2 * 0.75 * 500 * 2
    assert wire_bytes(muon, layout(stage=0), "", "bf16")["Muon's matrices: all-to-all"] == 3 * 500 * 2  # back alone


def test_the_fullest_moment_depends_on_the_batch() -> None:
    none = dict[str, int]()
    small = by_stage(SIZES, layout(), Activations(1, 1, 1, "meta"), none)[1]
    large = by_stage(SIZES, layout(), Activations(10**6, 10**6, 10**6 + 10, "meta"), none)[1]
    assert small.moment != "backward pass"
    assert small.parts[ACTIVATIONS] == 0
    assert large.moment == "backward pass"
    assert large.parts[ACTIVATIONS] == 10**6


def test_offloading_moves_the_optimiser_to_the_host() -> None:
    act = Activations(1, 1, 1, "meta")
    here, there = (by_stage(SIZES, layout(offload=offload), act, {})[2] for offload in (False, True))
    assert there.offloaded == here.parts["optimiser"] == 12_000
    assert there.parts["optimiser"] == 0
    assert there.total < here.total


def test_bytes_on_the_wire_by_hand() -> None:
    assert wire_bytes(SIZES, layout(world=1), "infonce", "bf16") == {}
    one = wire_bytes(SIZES, layout(), "infonce", "bf16")
    assert one["gradients: all-reduce"] == 2 * 3 / 4 * 8000
    assert one["weights: all-gather after the step"] == 3 / 4 * 8000
    pieces = wire_bytes(SIZES, layout(stage=2, micro=2), "infonce", "bf16")
    assert pieces["gradients: all-reduce"] == 4 * one["gradients: all-reduce"]
    loss, narrow = "loss: features, their gradients, sums", clipdist_bytes("infonce", 4, layout().share, 8, "bf16")
    assert wire_bytes(SIZES, layout(), "infonce", "bf16", [8])[loss] == one[loss] + narrow
    assert "gradients: reduce-scatter" in wire_bytes(SIZES, layout(stage=3), "infonce", "bf16")


def test_length_time_and_disk() -> None:
    catalog: Any = type("Seventy", (), {"__len__": lambda self: 70})()
    found = make_estimate(configured("train.epochs=3", "train.save_every=4", "launch.samples_per_s=8"), catalog)
    assert (found.steps, found.samples, found.epochs) == (12, 192, 3)
    assert found.seconds == 24
    assert found.checkpoints_kept == 2 + 2 + 1  # two for going back, as saves are closer than guard.window
    never = configured("train.epochs=3", "train.save_every=4", "guard.patience=0")
    assert make_estimate(never, catalog).checkpoints_kept == 2 + 1
    assert make_estimate(configured("train.epochs=3")).steps is None
    best = make_estimate(configured("train.steps=100", "train.keep_every=10", "train.keep_best=t2i_r1", "data.val=v"))
    assert best.checkpoints_kept == 2 + 10 + 1 + 1
    assert "not known" in full_table(make_estimate(configured()))


def test_the_rate_comes_from_the_newest_run_of_the_same_recipe(tmp_path: Path) -> None:
    config = configured("train.steps=100", f"run.root={tmp_path}")
    for name, words, rate in (("same", [], 50.0), ("other", ["train.global_batch=32"], 900.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(to_yaml(configured(*words, f"run.name={name}")))
        record = {"type": "train", "step": 1, "samples": 16, "samples_per_s": rate}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + '\n{"type": "tra')
    found = make_estimate(config)
    assert (found.rate, found.rate_source) == (50.0, f"measured in {tmp_path / 'same'}")


def test_what_does_not_fit_is_refused_with_the_first_setting_that_does() -> None:
    config = configured("train.global_batch=4096")
    whole = make_estimate(config)
    limit = whole.total / 1.3
    with pytest.raises(UserError, match=r"launch.device_gb.*set train.micro_batch=\d+: ") as refusal:
        make_estimate(configured("train.global_batch=4096", f"launch.device_gb={limit / 1e9}")).refuse()
    word = next(word for word in str(refusal.value).split() if word.startswith("train.micro_batch="))
    assert make_estimate(configured("train.global_batch=4096", word.rstrip(":"))).total <= limit


def test_within_fifteen_per_cent_is_let_pass() -> None:
    total = make_estimate(configured()).total / 1e9
    make_estimate(configured(f"launch.device_gb={total / 1.14}")).refuse()
    with pytest.raises(UserError, match="nothing that was tried"):
        make_estimate(configured("launch.device_gb=0.001")).refuse()
    with pytest.raises(UserError, match="nothing that was tried"):  # micro_batch=1, which BatchNorm refuses, among it
        make_estimate(configured("launch.device_gb=0.001", base=RESNET)).refuse()


def test_an_unknown_device_refuses_nothing() -> None:
    found = make_estimate(configured())
    found.refuse()
    assert found.limit is None
    assert "nothing is refused" in summary(found)


def test_everything_is_told() -> None:
    found = make_estimate(configured("launch.gpus=4", "train.steps=10", "engine.zero_stage=2"))
    text = full_table(found)
    for word in ("ZeRO 2*", "weights", "gradients", "optimiser", "activations", "features", "loss tiles", "all-reduce"):
        assert word in text
    assert len(summary(found).splitlines()) == 3
