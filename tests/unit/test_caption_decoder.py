"""Decoders of captions: where captions end, the loss, what is drawn for each sample, and what is refused."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from clipdist.config import load_config
from clipdist.data.batch import pair_batch
from clipdist.data.caption_targets import NO_TARGET, Marks, caption_lengths, caption_targets
from clipdist.data.tokens import BPETokenizer
from clipdist.errors import UserError
from clipdist.losses import captions
from clipdist.losses.captions import caption_loss
from clipdist.models.build import built_for
from clipdist.models.caption_decoder import CAPTION, prefix_mask
from clipdist.models.export import export_model
from clipdist.models.generate import generate
from clipdist.models.image_tokens import image_tokens, tokens_shape
from clipdist.models.load import load_model
from clipdist.objectives.caption import CaptionObjective
from clipdist.objectives.make import make_objectives, prepare_model
from clipdist.objectives.objective import Moment

VIT = "configs/models/tiny_vit.json"
SIZES = ["objectives.caption.width=32", "objectives.caption.layers=2", "objectives.caption.heads=2"]


def build(kind: str, model: str = VIT, *words: str):
    """The model of a run with this decoder, in training mode, and the objective."""
    clip = "objectives.clip.weight=1" if kind == "coca" else "objectives.clip=null"
    config = load_config(None, [f"model.name={model}", clip, f"objectives.caption.kind={kind}", *SIZES, *words])
    torch.manual_seed(0)
    encoder = built_for(config)
    objectives = make_objectives(config.objectives, encoder.spec.image_size)
    prepare_model(encoder, objectives)
    return encoder.train(), next(each for each in objectives if isinstance(each, CaptionObjective))


TEXTS = ["a dog!", "! runs", "a red circle above a blue square", "", "two", "dogs and cats run over green grass"]


def some_batch():
    tokens = BPETokenizer(2048, 16)(TEXTS)
    image = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return pair_batch(image, tokens, torch.ones(6, dtype=torch.bool), torch.arange(6))


def outputs(encoder, objective, batch, step: int = 3):
    return encoder(**batch.inputs(), noise=objective.noise(batch, Moment(step, 10)))


def test_an_exclamation_mark_is_a_target_although_its_id_is_that_of_padding():
    tokenizer = BPETokenizer(49408, 8)
    marks = tokenizer.marks()
    tokens = torch.tensor([[marks.start, 320, 0, marks.end, 0, 0, 0, 0]])  # "a" and a "!" in the middle of a word
    assert caption_lengths(tokens, marks).tolist() == [4]
    assert caption_targets(tokens, marks).tolist() == [[320, 0, marks.end, *[NO_TARGET] * 4]]
    theirs = F.cross_entropy(torch.randn(1, 50000, 7), tokens[:, 1:], ignore_index=0, reduction="none")
    assert int(theirs.count_nonzero()) == 2  # open_clip's CoCaLoss leaves it out


@pytest.mark.parametrize(
    ("tokens", "marks", "targets"),
    [
        ([5, 6, 1, 0, 0], Marks(None, 1, 0), [5, 6, 1, -1, -1]),  # T5: no start
        ([1, 5, 6, 1, 1], Marks(1, 1, 1), [5, 6, 1, -1]),  # one id for everything
        ([2, 5, 6, 7, 0], Marks(2, 3, 0), [5, 6, 7, -1]),  # cut without an end
        ([2, 3, 0, 0, 0], Marks(2, 3, 0), [3, -1, -1, -1]),  # an empty text
    ],
)
def test_targets_by_the_tokenizers_own_marks(tokens, marks, targets):
    assert caption_targets(torch.tensor([tokens]), marks).tolist() == [targets]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_fused_loss_is_torchs(monkeypatch, smoothing):
    monkeypatch.setattr(captions, "LOGITS_BYTES", 4 * 50 * 3)  # chunks of three rows
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=draw, requires_grad=True)
    weight = torch.randn(8, 50, generator=draw, requires_grad=True)
    targets = torch.randint(0, 50, (10,), generator=draw)
    mine = caption_loss(hidden, weight, targets, smoothing)
    theirs = F.cross_entropy(hidden @ weight, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(mine, theirs)
    for own, other in zip(
        torch.autograd.grad(3 * mine, (hidden, weight)), torch.autograd.grad(3 * theirs, (hidden, weight))
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert caption_loss(hidden[:0], weight, targets[:0]).item() == 0
    with torch.no_grad():
        torch.testing.assert_close(caption_loss(hidden, weight, targets, smoothing), theirs)


def test_the_prefix_is_seen_by_all_and_the_rest_is_causal():
    seen = prefix_mask(torch.tensor([3]), 5)[0] == 0
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert seen.equal(expected.bool())


@pytest.mark.parametrize("kind", ["cappa", "simvlm", "coca"])
def test_the_loss_of_a_row_does_not_depend_on_the_others(kind):
    encoder, objective = build(kind)
    batch = some_batch()
    whole = outputs(encoder, objective, batch)[CAPTION]
    apart = sum(outputs(encoder, objective, piece)[CAPTION] for piece in batch.split(1))
    torch.testing.assert_close(whole, apart)


@pytest.mark.parametrize("kind", ["cappa", "simvlm", "coca"])
def test_no_input_tells_its_own_target(kind):
    encoder, objective = build(kind, VIT, "objectives.caption.parallel=0")
    encoder.decoder.whole_logits = True
    batch = some_batch()
    noise = objective.noise(batch, Moment(3, 10))
    before = encoder(**batch.inputs(), noise=noise)[CAPTION]
    row, place = 2, 5  # the fifth word is another one
    batch.tokens[row, place] += 1
    after = encoder(**batch.inputs(), noise=noise)[CAPTION]
    seen = noise["caption/prefix"][row] if kind == "simvlm" else 0  # of SimVLM what the prefix holds is no target
    assert seen <= place
    assert after[row, :place].equal(before[row, :place])
    assert not after[row, place].equal(before[row, place])


def test_draws_of_a_sample_are_its_own():
    _, cappa = build("cappa")
    _, simvlm = build("simvlm")
    batch = some_batch()
    for objective, name in ((cappa, "caption/parallel"), (simvlm, "caption/prefix")):
        whole = objective.noise(batch, Moment(4, 10))[name]
        split = torch.cat([objective.noise(piece, Moment(4, 10))[name] for piece in batch.split(4)])
        assert whole.equal(split)
        assert any(not whole.equal(objective.noise(batch, Moment(step, 10))[name]) for step in range(5, 9))
    shares = torch.cat([cappa.noise(batch, Moment(step, 10))["caption/parallel"] for step in range(400)])
    assert 0.7 < shares.float().mean() < 0.8
    lengths = caption_lengths(batch.tokens, simvlm.marks)
    drawn = torch.stack([simvlm.noise(batch, Moment(step, 10))["caption/prefix"] for step in range(400)])
    assert drawn.min() == 1
    assert drawn.max(0).values.equal(lengths - 1)  # at most all but the end
    noise = simvlm.noise(batch, Moment(4, 10))
    assert (noise["caption/targets"] != NO_TARGET).sum(1).equal(lengths - noise["caption/prefix"])


def test_a_row_without_a_caption_has_no_targets():
    encoder, objective = build("cappa")
    batch = some_batch()
    batch.valid["text"] = batch.valid["text"].clone()
    batch.valid["text"][:] = False
    found = outputs(encoder, objective, batch)[CAPTION]
    assert found.item() == 0
    found.backward()
    assert not encoder.decoder.text_projection.grad.any()


def test_towers_of_every_kind_give_tokens(tmp_path):
    timm = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 32}
    timm |= {"timm_pool": "", "timm_proj": "linear", "timm_model_args": {"img_size": 32, "depth": 1}}
    described = json.loads(Path(VIT).read_text()) | {"vision_cfg": timm}
    (tmp_path / "timm.json").write_text(json.dumps(described))
    for model, shape in (
        (VIT, (16, 32)),
        ("configs/models/tiny_rn.json", (1, 256)),
        ("tests/dist/timm_lcnet.json", None),
        (str(tmp_path / "timm.json"), (4, 192)),
    ):
        encoder, _ = build("cappa", model)
        found = tokens_shape(encoder.visual, encoder.spec.image_size)
        assert shape is None or found == shape
        encoder.eval()
        side = encoder.spec.image_size
        pixels = torch.randn(2, 3, side, side)
        features, tokens = image_tokens(encoder.visual, pixels)
        assert tokens.shape[1:] == found
        assert features.equal(encoder.visual(pixels))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objectives.caption.kind=coca", "objectives.clip=null"], r"objectives.caption.kind=coca: must come with"),
        (["objectives.caption.label_smoothing=1"], r"objectives.caption.label_smoothing=1.0: must lie in \[0, 1\)"),
        (["objectives.caption.parallel=1.5"], r"objectives.caption.parallel=1.5: must lie in \[0, 1\]"),
        (
            ["objectives.caption.width=30", "objectives.caption.heads=4"],
            r"heads=4: must divide objectives",
        ),
        (["objectives.caption.layers=-1"], r"objectives.caption.layers=-1: must be at least 1"),
        (["objectives.caption.weight=0"], r"objectives.caption.weight=0.0: must be above 0"),
        (
            ["data.caption=2", "objectives.caption.weight=1"],
            r"objectives.caption=cappa: must be null with data.caption=2",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_config(None, words)


def test_text_towers_that_see_what_they_are_to_predict_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"the text tower of configs/models/tiny_cbow.json sees what it is to predict"):
        build("coca", "configs/models/tiny_cbow.json")
    with pytest.raises(UserError, match=r"objectives.caption.heads=5: must divide the decoder's width, 32"):
        build("cappa", VIT, "objectives.caption.width=0", "objectives.caption.heads=5")


@pytest.fixture(scope="module")
def coca(tmp_path_factory):
    """A small CoCa of open_clip, its JSON, and its weights in a file."""
    folder = tmp_path_factory.mktemp("coca")
    described = json.loads(Path(VIT).read_text())
    described["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
    described["vision_cfg"]["output_tokens"] = True
    described["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    described["multimodal_cfg"] = {"context_length": 16, "vocab_size": 2048, "width": 32, "heads": 2, "layers": 2}
    described["custom_text"] = True
    (folder / "tiny_coca.json").write_text(json.dumps(described))
    torch.manual_seed(3)
    theirs = open_clip.CoCa(**{name: part for name, part in described.items() if name != "custom_text"})
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.2)  # open_clip leaves it as memory had it
    save_file(theirs.state_dict(), folder / "coca.safetensors")
    return theirs.eval(), folder / "tiny_coca.json", folder / "coca.safetensors"


def trained_coca(coca, *words: str):
    _, file, weights = coca
    both = ["objectives.clip.weight=1", "objectives.caption={kind: coca, weight: 2}"]
    config = load_config(None, [f"model.name={file}", f"model.weights={weights}", *both, *words])
    encoder = built_for(config)
    objectives = make_objectives(config.objectives, 32)
    prepare_model(encoder, objectives)
    return encoder.train(), objectives[1]


def test_logits_and_loss_are_open_clips(coca):
    theirs = coca[0]
    encoder, objective = trained_coca(coca)
    batch = some_batch()
    batch.tokens.copy_(BPETokenizer(2048, 16)([text.replace("!", "") for text in TEXTS]))  # "!" is no padding
    pixels = encoder.pixels(batch.images["image"])
    with torch.no_grad():
        expected = theirs(pixels, batch.tokens)
        loss = open_clip.loss.CoCaLoss(2.0, 1.0)
        mine = outputs(encoder, objective, batch)
        encoder.decoder.whole_logits = True
        logits = outputs(encoder, objective, batch)[CAPTION]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(F.normalize(mine["image"], dim=1), expected["image_features"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(F.normalize(mine["text"], dim=1), expected["text_features"], rtol=1e-5, atol=1e-6)
    features = expected["image_features"], expected["text_features"]
    captioned = loss(*features, expected["logits"], expected["labels"], expected["logit_scale"])[1]
    words = (objective.noise(batch, Moment(0, 1))["caption/targets"] != NO_TARGET).sum()
    torch.testing.assert_close(2 * mine[CAPTION] / words, captioned, rtol=1e-5, atol=1e-5)


def test_the_mask_of_a_class_token_is_open_clips(coca):
    """It hides the class token behind a text from itself, and shows it one place of padding: weights are made so.

    No description sets open_clip's correct_cls_mask. A text tower that is read at the end of the text has no such mask.
    """
    marks, tokens = BPETokenizer(2048, 16).marks(), BPETokenizer(2048, 16)("two dogs")
    length = int(caption_lengths(tokens, marks))
    encoder, _ = trained_coca(coca)
    seen = encoder.text._build_additive_mask(tokens, 17, torch.float32)[0, -1] == 0
    assert seen.nonzero().flatten().tolist() == [*range(length + 1)]
    encoder.text.correct_cls_mask = True
    seen = encoder.text._build_additive_mask(tokens, 17, torch.float32)[0, -1] == 0
    assert seen.nonzero().flatten().tolist() == [*range(length), 16]
    plain, _ = build("coca")
    assert plain.text._embeds(tokens)[1].shape == (16, 16)  # causal alone


def test_weights_go_back_to_open_clip(coca, tmp_path):
    theirs = coca[0]
    encoder, _ = trained_coca(coca)
    exported = export_model(encoder.eval(), tmp_path / "mine.safetensors")
    again = open_clip.create_model(exported.name, pretrained=str(exported.file)).eval()
    assert isinstance(again, open_clip.CoCa)
    pixels, tokens = torch.randn(2, 3, 32, 32), BPETokenizer(2048, 16)(TEXTS[:2])
    assert again(pixels, tokens)["logits"].equal(theirs(pixels, tokens)["logits"])


def test_the_towers_of_a_coca_alone_are_a_dual_encoder(coca, tmp_path):
    theirs, file, weights = coca
    loaded = load_model(str(file), str(weights)).model
    tokens = BPETokenizer(2048, 16)(TEXTS)
    torch.testing.assert_close(loaded.encode_text(tokens), theirs.encode_text(tokens, normalize=False))
    assert export_model(loaded, tmp_path / "towers.safetensors").error.difference < 1e-5


def uncached(encoder, images):
    """Greedy decoding by the training's forward pass over the whole text, for every token anew: ids and ln p."""
    marks, length = encoder.decoder.marks, encoder.spec.context_length
    tokens = torch.full((len(images), length), marks.pad)
    tokens[:, 0] = marks.start
    total, done = torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool)
    encoder.train()
    encoder.decoder.whole_logits = True
    for place in range(length - 1):
        logits = encoder(image=images, tokens=tokens)[CAPTION][:, place].log_softmax(1)
        best, following = logits.max(1)
        total += torch.where(done, 0.0, best)
        tokens[:, place + 1] = torch.where(done, marks.pad, following)
        done |= tokens[:, place + 1] == marks.end
    encoder.decoder.whole_logits = False
    encoder.eval()
    return tokens[:, 1:], total


@pytest.mark.parametrize("kind", ["cappa", "simvlm", "coca", "open_clip"])
def test_captions_are_those_of_the_whole_computation(kind, request):
    encoder = trained_coca(request.getfixturevalue("coca"))[0] if kind == "open_clip" else build(kind)[0]
    with torch.no_grad():
        for parameter in encoder.parameters():  # words that differ, and an end that is likely after some of them
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))) / 4)
        encoder.decoder.text_projection[:, 20:2047] = 0
        images = some_batch().images["image"]
        expected, total = uncached(encoder, images)
        found = generate(encoder.eval(), images)
    assert found.tokens.equal(expected[:, : found.tokens.shape[1]])
    assert not expected[:, found.tokens.shape[1] :].any()  # padding
    torch.testing.assert_close(found.log_probability, total, rtol=1e-4, atol=1e-4)
    assert len(expected.unique()) > 1


def test_a_caption_ends_at_its_end_mark():
    encoder, _ = build("cappa")
    with torch.no_grad():
        encoder.decoder.text_projection[:] = 0
        encoder.decoder.text_projection[:, encoder.decoder.marks.end] = encoder.decoder.ln_final.bias + 1
        encoder.decoder.ln_final.weight[:], encoder.decoder.ln_final.bias[:] = 0, 1
        found = generate(encoder.eval(), some_batch().images["image"])
    assert found.tokens.tolist() == [[encoder.decoder.marks.end]] * 6
    tokenizer = BPETokenizer(2048, 16)
    assert tokenizer.text_of(found.tokens[0].tolist()) == ""
    assert tokenizer.text_of(tokenizer("A dog runs!")[0][:6].tolist()) == "a dog runs !"
    with pytest.raises(UserError, match=r"has no decoder of captions"):
        generate(built_for(load_config(None, [f"model.name={VIT}"])), some_batch().images["image"])


def test_the_tool_writes_a_line_for_every_image(coca, tmp_path, monkeypatch, capsys):
    _, file, weights = coca
    for name in ("one.png", "two.png"):
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / name
        )
    pictures, out = [str(tmp_path / name) for name in ("one.png", "two.png")], tmp_path / "captions.jsonl"

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["caption_images.py", *words, "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/caption_images.py", run_name="__main__")
        return end.value.code or 0, capsys.readouterr().err

    assert run(str(file), *pictures, "--weights", str(weights), "--out", str(out))[0] == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["one.png", "two.png"]
    assert all(isinstance(line["caption"], str) and line["log_probability"] < 0 for line in lines)
    plain = tmp_path / "plain.safetensors"
    save_file(built_for(load_config(None, [f"model.name={VIT}"])).state_dict(), plain)
    for words, message in (
        ((VIT, *pictures, "--weights", str(plain)), "has no decoder of captions"),
        ((str(file), str(tmp_path / "three.png"), "--weights", str(weights)), "three.png: no such file"),
        ((str(file), pictures[0], "shards", "--weights", str(weights)), "name image files or shards, not both"),
    ):
        code, said = run(*words, "--out", str(tmp_path / "none.jsonl"))
        assert code == 2
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "none.jsonl").exists()


def test_a_misspelt_size_of_the_decoder_is_found(coca, tmp_path):
    described = json.loads(coca[1].read_text())
    described["multimodal_cfg"]["layer"] = 3
    (tmp_path / "wrong.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"unknown key multimodal_cfg.layer; did you mean multimodal_cfg.layers\?"):
        trained_coca((None, tmp_path / "wrong.json", coca[2]))
    with pytest.raises(UserError, match=r"width, layers and heads are those of multimodal_cfg"):
        trained_coca(coca, "objectives.caption.layers=3")


def test_a_run_without_clip_has_a_tokenizer_and_no_text_tower():
    encoder, objective = build("simvlm")
    assert encoder.text is None
    assert encoder.spec.reads_text
    assert not encoder.spec.has_text
    assert "image" in outputs(encoder, objective, some_batch())
    assert CAPTION not in encoder.eval()(image=some_batch().images["image"])
