"""The commands that users type: python, torchrun and deepspeed, with good and bad input."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from commands import LAUNCHERS, records, run
from dist.launch import train
from pairs import draw_pair, write_pairs
from PIL import Image

from clipdist.report.history import read_runs
from clipdist.report.report_page import report_page
from tools import shard_images

LOGGERS = Path(__file__).parents[1] / "loggers"


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> dict[str, Path]:
    """The same short run by every launcher."""
    monkeypatch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("launchers")
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"run.root={root}", "train.steps=4"]
    for launcher in LAUNCHERS:
        more = []
        if launcher == "deepspeed":  # with modules that stand in for wandb, mlflow and trackio
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(LOGGERS), *filter(None, [os.getenv("PYTHONPATH")])]))
            monkeypatch.setenv("LOGGER_CALLS", str(root / "calls"))
            more = ["run.logger=[wandb,mlflow,trackio]"]
        ended = run(launcher, *data, f"run.name={launcher}", *more)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "finished 4 steps" in ended.stdout
        for name, taken in (
            ("data.train", "of several a step takes one: data.caption=random"),
            ("data.val", "all of them"),
        ):
            looked = f"{name}: 16 samples looked at: images are .png; captions are json:captions, 2 each; {taken}"
            assert looked in ended.stdout
        assert (
            "images in evaluation: shorter side resized to 32, centre of 32 x 32 cropped, bicubic; mean" in ended.stdout
        )
        assert "settings taken: precision fp32, loss by tiles, " in ended.stdout
        assert "length by train.steps, 4 steps an epoch, checkpoint every 4 steps, valid" in ended.stdout
        assert "(%, 20 images, 40 captions; i2t counts any of an image's captions)" in ended.stdout
    monkeypatch.undo()
    return {launcher: root / launcher for launcher in LAUNCHERS}


def test_loggers_get_what_tensorboard_gets_once(runs):
    calls = [json.loads(line) for line in (runs["deepspeed"].parent / "calls").read_text().splitlines()]
    assert [call["call"] for call in calls].count("wandb.init") == 1  # by one of the two ranks
    logged = [call["values"] for call in calls if call["call"] == "wandb.log"]
    losses = [values["train/loss"] for values in logged if "train/loss" in values]
    assert losses == [record["loss"] for record in records(runs["deepspeed"], "train")]
    assert {"val/t2i_r1", "val/retrieval"} <= {name for values in logged for name in values}
    assert [c["values"].get("train/loss") for c in calls if c["call"] == "mlflow.metrics"][:4] == losses
    assert [c["values"].get("train/loss") for c in calls if c["call"] == "trackio.log"][:4] == losses
    assert [call["status"] for call in calls if call["call"] == "mlflow.set_terminated"] == ["FINISHED"]


def test_all_launchers_train_the_same_run(runs):
    curves = {launcher: [record["loss"] for record in records(runs[launcher], "train")] for launcher in LAUNCHERS}
    assert len(curves["python"]) == 4
    assert curves["torchrun"] == curves["deepspeed"]  # both with two ranks
    assert curves["python"] == pytest.approx(curves["torchrun"], rel=1e-5)


def test_a_run_folder_holds_what_it_promises(runs):
    folder = runs["deepspeed"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "environment.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]
    wanted = {"loss", "logit_scale", "lr", "grad_norm/image", "grad_norm/text", "grad_norm/temperature"}
    wanted |= {"samples_per_s", "wait_share", "memory_gb", "step", "samples", "time"}
    assert wanted <= records(folder, "train")[-1].keys()
    (validation,) = [record for record in records(folder, "val") if record["step"] == 4]
    assert {"t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10", "chance"} <= validation.keys()
    assert validation["candidates"] == 20
    assert validation["chance"] == 5  # percent


def test_tensorboard_has_the_numbers_the_settings_and_a_picture(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = EventAccumulator(str(runs["deepspeed"]), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/logit_scale", "train/lr", "train/wait_share", "val/t2i_r1"} <= set(tags["scalars"])
    assert len(board.Scalars("train/loss")) == 4
    assert "val/retrieval" in tags["images"]
    assert "config/text_summary" in tags["tensors"]
    assert {tag.partition("/")[0] for tag in tags["scalars"]} == {"train", "val"}  # no card of one point before them
    layout = Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert [any(re.match(pattern, tag) for tag in tags["scalars"]) for pattern in patterns] == [True] * 6
    content = board.PluginTagToContent("hparams")[EXPERIMENT_TAG]
    columns = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert {"train/loss", "val/t2i_r1"} <= columns <= set(tags["scalars"])


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_a_misspelt_key_is_one_line_and_exit_2(launcher, shards, tmp_path):
    ended = run(launcher, f"data.train={shards / 'train'}", f"run.root={tmp_path}", "optim.lrr=1e-3")
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert lines == ["error: the command line: optim.lrr: Key 'lrr' not in 'Optim'. Did you mean: 'lr'?"]
    assert "Traceback" not in ended.stderr


def test_a_folder_of_images_without_captions_is_trained_on(tmp_path):
    (tmp_path / "holidays").mkdir()
    for number in range(20):
        (tmp_path / "holidays" / f"{number}.png").write_bytes(draw_pair(number)[0])
    assert shard_images.main([str(tmp_path / "holidays"), "--out", str(tmp_path / "set"), "--processes", "1"]) == 0
    words = [f"data.train={tmp_path / 'set'}", f"run.root={tmp_path}", "data.val=", "train.steps=4"]
    words += ["objectives.clip=null", "objectives.simclr={head: [32, 16], temperature: 0.5}"]
    words += ["objectives.moco={head: [32, 16], queue: 64, momentum: 0.9}"]
    ended = run("python", *words, "run.name=alone")
    assert ended.returncode == 0, ended.stderr
    taught = "teacher that follows the weights, momentum 0.9, sees 1 view of 32 pixels; state queue 64 x 16"
    told = ["objectives.simclr: 2 views of 32 pixels", f"objectives.moco: 1 view of 32 pixels; {taught}"]
    assert "\n".join(told) in ended.stdout
    assert "logit_scale" not in ended.stdout
    assert "data.train: 16 samples looked at: images are .png\n" in ended.stdout
    assert "4 steps of 16 images on" in ended.stdout
    steps = records(tmp_path / "alone", "train")
    assert [(record["valid"], record["loss"] > 0) for record in steps] == [(16, True)] * 4
    for record in steps:
        assert record["loss"] == pytest.approx(record["loss/simclr"] + record["loss/moco"], rel=1e-5)
        assert record["teacher_momentum"] == 0.9
    page = report_page(read_runs([tmp_path / "alone"]), datetime.now())
    for words in [*told, "Terms of the loss", "Momentum of the teacher", "simclr, moco"]:
        assert words in page
    assert "Not recorded" not in page


def test_bad_samples_are_masked_counted_and_named(tmp_path):
    negatives = {row: {"negatives": ["no square", "no field"][: row % 3]} for row in range(70)}
    write_pairs(tmp_path / "train", 70, bad={5: b"", 30: b"junk"}, more=negatives)
    words = [f"data.train={tmp_path / 'train'}", f"run.root={tmp_path}", "data.val=", "train.steps=4"]
    ended = train(1, *words, "data.max_bad_share=0.2", "run.name=tolerant", "data.negatives=2")
    assert ended.returncode == 0, ended.stderr
    assert " have negatives: json:negatives, at most 2 each; of several a step takes one: data.caption=" in ended.stdout
    assert "loss by tiles, as several texts an image need, " in ended.stdout
    events = [record for record in records(tmp_path / "tolerant", "event") if record["event"] == "bad_sample"]
    named = {(event["reason"], event["shard"], event["key"]) for event in events}
    trained = records(tmp_path / "tolerant", "train")
    assert named <= {("missing image", "00000.tar", "000000005"), ("not an image", "00001.tar", "000010012")}
    assert len(events) == 4 * 16 - sum(record["valid"] for record in trained) > 0
    ended = train(1, *words, "data.max_bad_share=0.001", "run.name=strict")
    assert ended.returncode == 2
    assert "data.max_bad_share=0.001" in ended.stderr


def test_the_sigmoid_loss_in_micro_batches_trains_as_on_whole_ones(shards, tmp_path):
    words = [
        f"data.train={shards / 'train'}",
        "data.val=",
        f"run.root={tmp_path}",
        "objectives.clip.loss=sigmoid",
        "train.steps=4",
    ]
    for name, more in (("whole", []), ("micro", ["train.micro_batch=2"])):
        ended = train(2, *words, f"run.name={name}", *more)
        assert ended.returncode == 0, ended.stderr
    whole, micro = (records(tmp_path / name, "train") for name in ("whole", "micro"))
    assert [r["loss"] for r in micro] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    assert whole[0]["logit_bias"] == pytest.approx(-10, abs=0.01)
    assert {"grad_norm/bias", "batch_t2i_r1"} <= whole[0].keys()


def test_features_that_are_not_finite_end_the_run_or_are_skipped_and_counted(shards, tmp_path):
    words = [f"data.train={shards / 'train'}", "data.val=", f"run.root={tmp_path}", "optim.lr=1e30", "train.steps=4"]
    ended = train(2, *words, "run.name=stop", "guard.nonfinite=stop")
    assert ended.returncode == 1
    assert "error: step 1: features are not finite: rank 0: 8 rows of the image tower" in ended.stderr
    assert "guard.nonfinite=skip" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = train(2, *words, "run.name=skip", "engine.zero_stage=3")
    assert ended.returncode == 0, ended.stderr
    events = [event for event in records(tmp_path / "skip", "event") if event["event"] == "skip"]
    assert [event["step"] for event in events] == [2, 3, 4]
    assert all("rank 1: 8 rows of the text tower" in event["reason"] for event in events)


def test_labelled_pictures_are_asked_about_during_training(shards, tmp_path):
    for split, count in (("train", 6), ("test", 4)):
        for name, colour in (("red", (220, 40, 40)), ("blue", (50, 70, 220))):
            folder = tmp_path / "labelled" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (24, 24), tuple(c - number for c in colour)).save(folder / f"{number}.png")
    words = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"run.root={tmp_path}", "train.steps=4"]
    forms = ["objectives.clip.widths=[16]", "data.caption=all"]
    asked = train(
        2,
        *words,
        f"eval.labelled={tmp_path / 'labelled'}",
        "eval.probe=true",
        "eval.knn=true",
        "train.keep_best=knn_20",
        *forms,
    )
    assert asked.returncode == 0, asked.stderr
    last = records(tmp_path / "tiny", "val")[-1]
    assert last["knn_20"] == last["knn_200"] == 100
    assert 1 <= last["effective_rank"] <= 32
    assert last["probe/accuracy"] == 100  # two colours: any tower that sees tells them apart
    assert last["zero_shot/top1"] in (0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100)
    assert last["zero_shot/chance"] == 50
    assert "probe/accuracy 100.00" in asked.stdout
    assert "json:captions, 2 each; of several a step takes all: data.caption=all" in asked.stdout
    taken = "loss by tiles, as several texts an image need, mean of the losses at widths 16 and 32 (embed_dim), "
    assert taken in asked.stdout
    assert f"width_16/t2i_r1 {last['width_16/t2i_r1']:.2f}" in asked.stdout
    assert last["width_16/i2t_r10"] >= last["width_16/i2t_r1"]
    refused = train(1, *words, "run.name=other", "eval.probe=true")
    assert refused.returncode == 2
    assert "eval.probe: needs eval.labelled" in refused.stderr
