"""The dual encoder: shapes, pixel normalisation, CBOW, locks, recomputed activations, precision, bad descriptions."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipdist.config import Clip, Model, load_config
from clipdist.data.tokens import make_tokenizer
from clipdist.errors import UserError
from clipdist.estimate import make_estimate
from clipdist.estimate.activations import meta_model
from clipdist.models.build import build_model
from clipdist.models.cbow import CBOW
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.lstm import LSTM
from clipdist.models.spec import ModelSpec, resolve_spec
from clipdist.trainer import Trainer

TINY_VIT, TINY_RN, TINY_CBOW, TINY_LSTM = (f"configs/models/tiny_{name}.json" for name in ("vit", "rn", "cbow", "lstm"))
TIMM = {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
VIT = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}


def build(name: str, **settings: object) -> DualEncoder:
    torch.manual_seed(0)
    return build_model(Model(name=name, **settings))  # type: ignore[arg-type]


def model_json(folder: Path, vision: dict | None = None, text: dict | None = None, **more: object) -> str:
    path = folder / "model.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision or VIT, "text_cfg": text or TEXT, **more}))
    return str(path)


def hf_tower(folder: Path) -> dict:
    from transformers import BertConfig

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertConfig(vocab_size=50, pad_token_id=0, **sizes).save_pretrained(folder / "bert")
    pooler = {"hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    return {"hf_model_name": "bert", "hf_tokenizer_name": "bert", "context_length": 8, **pooler}


def test_a_text_of_padding_alone_leaves_features_and_gradients_finite(tmp_path: Path) -> None:
    model = build(model_json(tmp_path, text=hf_tower(tmp_path) | {"hf_proj_type": "mlp"})).eval()
    tokens = torch.arange(1, 25).reshape(3, 8)
    tokens[1, 3:] = tokens[2] = 0
    features = model.encode_text(tokens)
    ours, model.text.pooler = model.text.pooler, open_clip.hf_model.MeanPooler()
    theirs = model.encode_text(tokens)
    assert torch.equal(features[:2], theirs[:2])
    assert theirs[2].isnan().all()
    model.text.pooler = ours
    assert features[2].norm() > 0
    F.normalize(model.train().encode_text(tokens)).square().sum().backward()
    assert all(value.grad.isfinite().all() for value in model.text.parameters() if value.grad is not None)


def batch(model: DualEncoder, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = model.spec.image_size
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    if model.spec.hf_text:
        return image, torch.randint(1, 50, (size, model.spec.context_length), generator=generator)
    return image, make_tokenizer(model.spec)(["a dog", "two cats!", "", "the sun over the sea"][:size])


def gradients(model: DualEncoder, image: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = model(image=image, tokens=tokens)
    (outputs["image"].sin().sum() + outputs["text"].sin().sum() + outputs["logit_scale"].sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [TINY_VIT, TINY_RN, TINY_CBOW, TINY_LSTM, "timm", "hf"])
def test_forward_gives_features_and_every_parameter_a_gradient(name: str, tmp_path: Path) -> None:
    if name == "timm":
        name = model_json(tmp_path, vision=TIMM)
    elif name == "hf":
        name = model_json(tmp_path, text=hf_tower(tmp_path))
    model = build(name)
    image, tokens = batch(model)
    outputs = model(image=image, tokens=tokens)
    image_features, text_features, scale = (outputs[name] for name in ("image", "text", "logit_scale"))
    assert len(outputs) == 3
    assert image_features.shape == text_features.shape == (4, model.spec.embed_dim)
    assert image_features.dtype == text_features.dtype == torch.float32
    assert scale.shape == (1,)
    grads = gradients(model, image, tokens)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert {name.split(".")[0] for name in grads} == {"visual", "text", "logit_scale"}
    model.eval()
    assert torch.equal(model(image=image)["image"], model.encode_image(image))
    assert "text" not in model(image=image)
    assert torch.equal(model(tokens=tokens)["text"], model.encode_text(tokens))
    assert "image" not in model(tokens=tokens)
    both = model(image=image, flipped=image.flip(-1))  # two views
    assert torch.equal(both["flipped"], model.encode_image(image.flip(-1)))
    assert {model.part_of(name) for name in grads} == {"image", "text", "temperature"}


def test_projections_of_timm_and_hugging_face_towers_are_linear_without_bias(tmp_path: Path) -> None:
    model = build(model_json(tmp_path, vision=TIMM, text=hf_tower(tmp_path)))
    for projection in (model.visual.head.proj, model.text.proj):  # type: ignore[union-attr]
        assert isinstance(projection, torch.nn.Linear)
        assert projection.bias is None


def test_pixels_are_normalised_as_open_clip_does() -> None:
    model = build(TINY_VIT).eval()
    image, _ = batch(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = model.visual((image / 255 - mean) / std)
    torch.testing.assert_close(model.encode_image(image), expected)


def test_pixel_statistics_of_the_json_are_used(tmp_path: Path) -> None:
    model = build(model_json(tmp_path, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.5, 1.0])).eval()
    image, _ = batch(model)
    std = torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(model.encode_image(image), model.visual((image / 255 - 0.5) / std))


def test_temperature_starts_where_the_loss_says() -> None:
    assert build(TINY_CBOW).logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    model = build_model(Model(name=TINY_CBOW), Clip(logit_scale_init=1.5))
    assert model.logit_scale.tolist() == [1.5]


def test_the_same_seed_draws_the_same_weights() -> None:
    one, two = build(TINY_RN).state_dict(), build(TINY_RN).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_low_precision_keeps_pixels_statistics_and_text_constants_in_fp32() -> None:
    model = build(TINY_RN)
    image, _ = batch(model)
    reference = model.encode_image(image)
    statistics = {name: value for name, value in model.state_dict().items() if "running" in name}
    model = build(TINY_RN).bfloat16()
    assert model.image_mean.dtype == model.image_std.dtype == model.text.attn_mask.dtype == torch.float32
    assert torch.equal(model.image_mean.flatten(), torch.tensor(open_clip.OPENAI_DATASET_MEAN))
    features = model.encode_image(image)
    assert features.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(features.float(), reference).min() > 0.99
    for name, value in statistics.items():
        assert model.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0.05, atol=0.01)


TOWERS = {  # image towers of timm with norms or constants of their own, and the sizes at which they are tried
    "fastvit_mci1": 64,  # MobileCLIP-S1: BatchNormAct2d
    "mobilenetv2_035": 32,  # BatchNormAct2d
    "levit_128s": 224,  # BatchNorm1d
    "eva02_tiny_patch14_224": 224,  # biases that are buffers, rotary positions
}


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_timm_train_and_evaluate_in_half_precision(tower: str, tmp_path: Path) -> None:
    pool = "avg" if "mci" in tower else ""
    vision = {"image_size": TOWERS[tower], "timm_model_name": tower, "timm_pool": pool, "timm_proj": "linear"}
    model = build(model_json(tmp_path, vision=vision)).bfloat16()
    image, tokens = batch(model)
    grads = gradients(model.train(), image, tokens)
    assert all(bool(gradient.isfinite().all()) for gradient in grads.values())
    assert grads.keys() == dict(model.named_parameters()).keys()
    features = model.eval().encode_image(image)
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


# Declared sizes


def fixed(name: str, size: int, **more: object) -> dict:
    return {**TIMM, "timm_pool": "", "timm_model_name": name, "image_size": size, **more}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_towers_of_timm_take_the_declared_image_size(name: str, tmp_path: Path) -> None:
    path = model_json(tmp_path, vision=fixed(name, 64))
    model = build(path)
    assert model.encode_image(batch(model)[0]).shape == (4, 16)
    meta_model(load_config(None, [f"model.name={path}"]))


@pytest.mark.parametrize(
    ("vision", "context", "told"),
    [
        (fixed("levit_128s", 64), 0, "images of 64 x 64 pixels, does not run: .*; its own size is 224 x 224$"),
        (fixed("lcnet_035", 224, timm_pool="avg"), 0, "does not run: a and b must .* 1280. X .176, 16.+$"),
        (fixed("lcnet_035", 64, timm_proj="none"), 0, r"embed_dim=16, but .*, gives features \[1280, 2, 2\]"),
        (VIT, 600, "text_cfg.context_length=600, but .*bert has 512 positions; set at most 512"),
    ],
)
def test_sizes_that_a_tower_does_not_take_are_refused(vision: dict, context: int, told: str, tmp_path: Path) -> None:
    path = model_json(tmp_path, vision, hf_tower(tmp_path) | {"context_length": context} if context else None)
    for make in (lambda: build(path), lambda: meta_model(load_config(None, [f"model.name={path}"]))):  # and the plan
        with pytest.raises(UserError, match=told):
            make()


def test_widths_beyond_the_features_are_refused() -> None:
    told = r"^objectives.clip.widths=\[8, 33\]: .*tiny_vit.json has embed_dim=32 features"
    config = load_config(None, [f"model.name={TINY_VIT}", "objectives.clip.widths=[8,33]"])
    for make in (lambda: build_model(config.model, config.clip), lambda: meta_model(config)):
        with pytest.raises(UserError, match=told):
            make()


@pytest.mark.parametrize(("lock_text", "towers"), [(False, {"visual", "text"}), (True, {"visual"})])
def test_biases_alone_train(lock_text: bool, towers: set[str]) -> None:
    model = build(TINY_VIT, biases_only=True, lock_text=lock_text)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if name == "logit_scale" or (name.partition(".")[0] in towers and name.endswith("bias"))
    }
    assert "visual.transformer.resblocks.0.attn.in_proj_bias" in trained
    assert gradients(model, *batch(model)).keys() == trained


def test_batchnorm_with_one_value_per_channel_is_refused_before_training() -> None:
    told = "^train.global_batch, train.micro_batch: one pair in a forward pass leaves BatchNorm in .*tiny_rn"
    for words in (["train.global_batch=1"], ["train.global_batch=8", "train.micro_batch=1"]):
        config = load_config(None, [f"model.name={TINY_RN}", "device=cpu", *words])
        new, alone = (
            SimpleNamespace(resume=None, stages=[SimpleNamespace(image_size=32)]),
            SimpleNamespace(world_size=1),
        )
        trainer: Any = SimpleNamespace(objectives=(), config=config, plan=new, dist_env=alone)
        with pytest.raises(UserError, match=told):
            Trainer._build_model(trainer)
        with pytest.raises(UserError, match=told):
            _ = make_estimate(config).total
    build(TINY_RN).check_rows(2)
    build(TINY_RN, lock_image=True).check_rows(1)
    build(TINY_VIT).check_rows(1)


# CBOW


def test_cbow_is_the_mean_of_the_words_between_the_marks() -> None:
    torch.manual_seed(0)
    tower = CBOW(width=4, vocab_size=100, context_length=6, embed_dim=3)
    table, start, end = tower.token_embedding.weight, 98, 99
    tokens = torch.tensor([[start, 5, 7, end, 0, 0], [start, 0, 9, 0, 1, end], [start, end, 0, 0, 0, 0]])
    bags = [table[[5, 7]].mean(0), table[[0, 9, 0, 1]].mean(0), table[end]]  # id 0 is padding only behind the end
    torch.testing.assert_close(tower(tokens), torch.stack(bags) @ tower.proj.weight.T)


def vectors_file(path: Path, words: dict[str, list[float]], heading: str = "") -> str:
    lines = [" ".join([word, *map(str, numbers)]) for word, numbers in words.items()]
    path.write_text("\n".join(([heading] if heading else []) + lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("name", "width", "heading"), [(TINY_CBOW, 32, ""), (TINY_CBOW, 32, "3 32"), (TINY_LSTM, 16, "")]
)
def test_word_vectors_start_whole_word_tokens(
    name: str, width: int, heading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"the": [0.5] * width, "dog": [-0.5] * width, "antidisestablishment": [9.0] * width}
    model = build(name, word_vectors=vectors_file(tmp_path / "v.txt", words, heading))
    ids = make_tokenizer(model.spec)(["the dog"])[0, 1:3]
    table = model.text.token_embedding.weight  # type: ignore[union-attr]
    assert table[ids].tolist() == [[0.5] * width, [-0.5] * width]  # type: ignore[index]
    assert float(table.detach().abs().max()) < 9  # type: ignore[operator]
    assert "2 of 2048 tokens (0.1 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"the 1 2 3\n", r"line 1 has 3 numbers, the text tower's vectors 32; set its width in the model JSON"),
        (b"\xff\xfe\x00binary", r"not a text file"),
        (("the" + " x" * 32).encode(), r"could not convert"),
        (("qqqqqqqqqqqq" + " 1" * 32).encode(), r"not one of its words"),
    ],
)
def test_bad_word_vectors(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        build(TINY_CBOW, word_vectors=str(tmp_path / "v.txt"))


def test_word_vectors_need_a_tower_that_takes_them_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only a CBOW or LSTM text tower"):
        build(TINY_VIT, word_vectors="v.txt")
    with pytest.raises(UserError, match="No such file"):
        build(TINY_CBOW, word_vectors=str(tmp_path / "v.txt"))


# LSTM


def lstm_json(**changes: object) -> str:
    tower = {"width": 8, "layers": 1, "bidirectional": False, "vocab_size": 600, "context_length": 8} | changes
    return json.dumps({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"lstm": tower}})


@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_an_lstm_is_torchs_and_is_read_at_the_end_of_the_text(both: bool) -> None:
    torch.manual_seed(0)
    tower = LSTM(width=6, layers=2, bidirectional=both, vocab_size=100, context_length=7, embed_dim=3)
    theirs = torch.nn.LSTM(6, 6, num_layers=2, bidirectional=both, batch_first=True)
    for number, layer in enumerate(tower.layers):
        for name, value in layer.named_parameters():
            matrix, kind = name.removeprefix("reverse_").split("_")
            suffix = "_reverse" if name.startswith("reverse_") else ""
            getattr(theirs, f"{kind}_{matrix}_l{number}{suffix}").copy_(value)
    tokens = torch.tensor([[98, 5, 7, 99, 0, 3, 99], [98, 5, 0, 0, 8, 9, 99], [98, 99, 0, 0, 0, 0, 0]])
    for row, length in zip(tokens, (4, 7, 2)):
        _, (last, _) = theirs(tower.token_embedding(row[None, :length]))
        wanted = tower.proj(last[-2:].flatten() if both else last[-1, 0])
        torch.testing.assert_close(tower(row[None])[0], wanted)


# Locked towers


def test_locked_image_tower_does_not_move_at_all() -> None:
    model = build(TINY_RN, lock_image=True)
    image, tokens = batch(model)
    before = copy.deepcopy(model.visual.state_dict())
    model.train()
    grads = gradients(model, image, tokens)
    assert not any(name.startswith("visual.") for name in grads)
    assert any(name.startswith("text.") for name in grads)
    assert all(torch.equal(before[name], value) for name, value in model.visual.state_dict().items())
    assert not model.visual.training
    assert model.text.training


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_model_args_are_those_of_the_model_whether_it_has_a_fixed_size_or_not(name: str, tmp_path: Path) -> None:
    more = {"resnet10t": {"channels": [8, 8, 16, 16]}, "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 24}}
    vision = {**TIMM, "timm_model_name": name, "timm_model_pretrained": False, "timm_model_args": more[name]}
    tower = build(model_json(tmp_path, vision=vision)).visual
    assert tower.trunk.num_features == {"resnet10t": 16, "vit_tiny_patch16_224": 24}[name]
    assert tower(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_a_locked_timm_tower_trains_its_projection_only(tmp_path: Path) -> None:
    model = build(model_json(tmp_path, vision=TIMM), lock_image=True).train()
    image, tokens = batch(model)
    statistics = copy.deepcopy(model.visual.state_dict())
    grads = gradients(model, image, tokens)
    assert [name for name in grads if name.startswith("visual.")] == ["visual.head.proj.weight"]
    assert all(torch.equal(statistics[name], value) for name, value in model.visual.state_dict().items())


def test_locked_hugging_face_tower_has_no_dropout(tmp_path: Path) -> None:
    model = build(model_json(tmp_path, text=hf_tower(tmp_path)), lock_text=True).train()
    _, tokens = batch(model)
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens))
    assert [name for name, p in model.text.named_parameters() if p.requires_grad] == ["proj.weight"]
    free = build(model_json(tmp_path, text=hf_tower(tmp_path))).train()
    assert not torch.equal(free.encode_text(tokens), free.encode_text(tokens))


def test_last_groups_can_stay_unlocked() -> None:
    settings = {"lock_image": True, "image_unlocked_groups": 2, "lock_text": True, "text_unlocked_layers": 1}
    model = build(TINY_VIT, **settings).train()
    image, tokens = batch(model)
    trained = {".".join(name.split(".")[:4]) for name in gradients(model, image, tokens)}
    assert trained == {
        "logit_scale",
        "text.text_projection",
        "visual.proj",
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "visual.transformer.resblocks.1",
    }
    assert not model.visual.transformer.resblocks[0].training  # type: ignore[union-attr,index]
    assert model.visual.transformer.resblocks[1].training  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("kind", "tower", "groups"),
    [("vit", "image", 4), ("vit", "text", 4), ("cbow", "text", 2), ("lstm", "text", 4), ("timm", "image", 5)],
)
def test_unlocking_all_groups_or_more_is_refused(kind: str, tower: str, groups: int, tmp_path: Path) -> None:
    name = {"vit": TINY_VIT, "cbow": TINY_CBOW, "lstm": TINY_LSTM}.get(kind) or model_json(tmp_path, vision=TIMM)
    key = {"image": "image_unlocked_groups", "text": "text_unlocked_layers"}[tower]
    lock = {f"lock_{tower}": True}
    for unlocked in (groups, 99):
        told = f"{key}={unlocked}: would lock nothing, for .* has {groups} groups; set it to at most {groups - 1}, or"
        with pytest.raises(UserError, match=told):
            build(name, **lock, **{key: unlocked})
    assert not all(p.requires_grad for p in build(name, **lock, **{key: groups - 1}).parameters())


def test_towers_that_cannot_be_locked_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image_unlocked_groups=1: ModifiedResNet cannot be unlocked in part"):
        build(TINY_RN, lock_image=True, image_unlocked_groups=1)
    with pytest.raises(UserError, match="lock_text=true: only logit_scale would be trained"):
        build(TINY_VIT, lock_image=True, lock_text=True)
    build(model_json(tmp_path, vision=TIMM), lock_image=True, lock_text=True)  # the projection is trained


# Activation checkpointing


@pytest.mark.parametrize("name", [TINY_VIT, TINY_RN, TINY_CBOW, TINY_LSTM, "timm"])
def test_recomputed_activations_change_nothing(name: str, tmp_path: Path) -> None:
    name = model_json(tmp_path, vision=TIMM) if name == "timm" else name
    plain, recomputing = build(name), build(name)
    recomputing.set_activation_checkpointing()
    recomputing = copy.deepcopy(recomputing)
    layers = [m for m in recomputing.visual.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.LayerNorm))]
    calls = [0]
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    image, tokens = batch(plain)
    expected, got = gradients(plain, image, tokens), gradients(recomputing, image, tokens)
    assert calls[0] > len(layers)  # something was computed twice
    assert expected.keys() == got.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-5, atol=1e-7)
    before, after = plain.state_dict(), recomputing.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_activation_checkpointing_of_hugging_face_towers(tmp_path: Path) -> None:
    name = model_json(tmp_path, text=hf_tower(tmp_path))
    plain, recomputing = build(name), build(name)
    recomputing.set_activation_checkpointing()
    image, tokens = batch(plain)
    calls = [0]
    for layer in recomputing.text.transformer.encoder.layer:  # type: ignore[union-attr]
        layer.attention.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    results = []
    for model in (plain, recomputing):
        torch.manual_seed(5)  # dropout
        results.append(gradients(model, image, tokens))
    assert calls[0] == 4
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient, rtol=1e-5, atol=1e-7)


def test_activation_checkpointing_of_unknown_batchnorm_towers_is_refused(tmp_path: Path) -> None:
    vision = {"image_size": 32, "timm_model_name": "lcnet_035", "timm_pool": "avg", "timm_proj": None}
    model = build(model_json(tmp_path, vision=vision))
    with pytest.raises(UserError, match="activation_checkpointing=true: not known how"):
        model.set_activation_checkpointing()


# Descriptions


def test_spec_of_a_named_model() -> None:
    spec = resolve_spec(Model(name="RN50"))
    assert (spec.embed_dim, spec.image_size, spec.context_length, spec.quick_gelu) == (1024, 224, 77, False)
    assert spec.clip_class
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_openai_tags_force_quick_gelu_and_tags_bring_their_pixel_statistics() -> None:
    assert resolve_spec(Model(name="RN50", weights="openai")).quick_gelu
    assert resolve_spec(Model(name="ViT-B-16-SigLIP", weights="webli")).image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/models/*.json")), ids=lambda p: p.stem)
def test_shipped_descriptions_resolve(path: Path) -> None:
    spec = resolve_spec(Model(name=f"configs/models/{path.name}"), with_text=None)
    assert spec.image_size >= 32
    assert spec.embed_dim == json.loads(path.read_text())["embed_dim"]


def test_descriptions_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_spec(Model(name=TINY_VIT)).embed_dim == 32


def test_hub_form_of_the_json_is_read(tmp_path: Path) -> None:
    inner = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": inner, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}))
    spec = resolve_spec(Model(name=str(path)))
    assert (spec.embed_dim, spec.image_mean, spec.image_std) == (16, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("RN5O", "did you mean RN50"),
        ("rn50", "did you mean RN50"),
        ("configs/models/tiny_vti.json", r"no such file; did you mean configs/models/tiny_vit\.json"),
        ("hf-hub:laion/x", "open_clip_config.json"),
    ],
)
def test_unknown_names(name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        resolve_spec(Model(name=name))


@pytest.mark.parametrize(
    ("description", "complaint"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not a JSON file"),
        ('{"embed_dim": 8, "vision_cfg": {}}', "has no text_cfg, and a text tower is needed"),
        ('{"embed_dim": "8", "vision_cfg": {}, "text_cfg": {}}', "'embed_dim' is missing or of the wrong type"),
        (
            '{"embed_dim": 8, "vision_cfg": {"widht": 8}, "text_cfg": {}}',
            "widht; did you mean vision_cfg.width",
        ),
        ('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}, "img_mean": 1}', "unknown key img_mean"),
        ('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}, "image_mean": [1, 2]}', "image_mean takes three numbers"),
        ('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}, "image_std": 5}', "image_std takes three numbers"),
        ('{"embed_dim": 8, "vision_cfg": {"image_size": [32, 64]}, "text_cfg": {}}', "only square pictures"),
        ('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"cbow": {"width": 8}}}', "text_cfg.cbow takes exactly"),
        (lstm_json(width=True), r"text_cfg.lstm.width=True: must be a positive integer"),
        (lstm_json(bidirectional=1), r"text_cfg.lstm.bidirectional=1: must be true or false"),
        (lstm_json(layers=0), r"text_cfg.lstm.layers=0: must be a positive integer"),
        (lstm_json(vocab_size=50000), r"text_cfg.lstm.vocab_size=50000: CLIP's byte-pair encoding has 49408 tokens"),
        ('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"cbow": {}, "lstm": {}}}', "a model has one text tower"),
        (
            '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_pooler_type": "mean"}}',
            "text_cfg.hf_pooler_type=mean: must be one of mean_pooler, max_pooler, cls_pooler, cls_last_hidden_state_p",
        ),
    ],
)
def test_bad_descriptions(description: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(description)
    with pytest.raises(UserError, match=complaint):
        resolve_spec(Model(name=str(tmp_path / "m.json")))


def test_towers_that_cannot_be_built_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the towers cannot be built: Unknown model \(resnet9999\)$"):
        build(model_json(tmp_path, vision={**TIMM, "timm_model_name": "resnet9999", "timm_model_pretrained": True}))


def test_weights_of_a_hugging_face_folder_are_loaded(tmp_path: Path) -> None:
    from transformers import AutoConfig, BertModel

    text = {**hf_tower(tmp_path), "hf_model_pretrained": True}
    torch.manual_seed(9)
    source = BertModel(AutoConfig.from_pretrained(tmp_path / "bert"), add_pooling_layer=False)
    source.save_pretrained(tmp_path / "bert")
    own = build(model_json(tmp_path, text=text)).text.transformer.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items())


def test_weights_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    text = {**hf_tower(tmp_path), "hf_model_pretrained": True}
    with pytest.raises(
        UserError, match=r"needs configuration and weights of .*bert from a local folder or the Hugging"
    ):
        build(model_json(tmp_path, text=text))


@pytest.mark.parametrize(
    ("kind", "locked"),
    [
        (TINY_VIT, ["image"]),
        (TINY_RN, ["image"]),
        (TINY_CBOW, ["text"]),
        (TINY_LSTM, ["text"]),
        ("timm", ["image"]),
        ("hf", ["image", "text"]),
    ],
)
def test_features_of_locked_towers_stand_for_their_inputs(kind: str, locked: list[str], tmp_path: Path) -> None:
    locks = {f"lock_{name}": True for name in locked}
    trained = []
    if kind in ("timm", "hf"):  # whose projections still train
        text = hf_tower(tmp_path) | {"hf_proj_type": "linear"} if kind == "hf" else TEXT
        model = build(model_json(tmp_path, vision=TIMM, text=text), **locks)
        trained = [model.visual.head, *([model.text.proj] if kind == "hf" else [])]
    else:
        model = build(kind, **locks)
    assert model.locked == tuple(locked)
    inputs = dict(zip(("image", "text"), batch(model)))
    wanted = gradients(model, *inputs.values())
    outputs = model(image=inputs["image"], tokens=inputs["text"])
    checksums = {name: model.locked_checksum(name) for name in locked}
    kept = inputs | {name: model.locked_features(inputs[name]) for name in locked}
    model.zero_grad()
    found = gradients(model, *kept.values())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = model(image=kept["image"], tokens=kept["text"])
    assert all(torch.equal(again[name], outputs[name]) for name in outputs)
    for projection in trained:  # what trains is no part of what is kept
        for parameter in projection.parameters():
            torch.nn.init.ones_(parameter.data)
    assert checksums == {name: model.locked_checksum(name) for name in locked}
    assert all(torch.equal(model.locked_features(inputs[name]), kept[name]) for name in locked)
