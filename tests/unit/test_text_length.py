"""Texts without their padding: which towers take them, equal features and gradients, and how texts are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.config import Lora, Model
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.text_length import MULTIPLE, ROW, pack, text_kind, text_lengths

VIT = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
CLIP = {"context_length": 40, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}
CBOW = {"cbow": {"width": 16, "vocab_size": 600, "context_length": 40}}
LSTM = {"width": 8, "layers": 2, "bidirectional": True, "vocab_size": 600, "context_length": 40}
END = 599
SIZES = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "mt5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "is_encoder_decoder": True},
    "m2m_100": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
}

# How each tower is run; of the descriptions, what they add to CLIP's, or a Hugging Face model and its pooler.
TOWERS: dict[str, tuple[str, Any]] = {
    "clip": ("packed", {}),
    "eos": ("packed", {"pool_type": "eos", "eos_id": 7}),
    "no projection": ("packed", {"proj_type": "none"}),
    "biased projection": ("packed", {"proj_bias": True, "ls_init_value": 0.5}),
    "custom blocks": ("packed", {"qk_norm": True, "scale_heads": True, "scale_attn": True}),
    "pads otherwise": ("packed", {"pad_id": 3}),  # read where a mask is made of it, which no causal tower does
    "siglip": ("whole", {"no_causal_mask": True, "pool_type": "last"}),
    "not causal": ("whole", {"no_causal_mask": True}),
    "last": ("whole", {"pool_type": "last"}),
    "first": ("whole", {"pool_type": "first"}),
    "coca": ("whole", {"embed_cls": True}),
    "cbow": ("trimmed", CBOW),
    "lstm": ("sequences", {"lstm": LSTM}),
    "lstm of one direction": ("sequences", {"lstm": LSTM | {"layers": 3, "bidirectional": False}}),
    "bert mean": ("trimmed", ("bert", "mean_pooler")),
    "bert cls": ("trimmed", ("bert", "cls_pooler")),
    "bert last cls": ("trimmed", ("bert", "cls_last_hidden_state_pooler")),
    "roberta": ("trimmed", ("roberta", "mean_pooler")),
    "xlm-roberta": ("trimmed", ("xlm-roberta", "mean_pooler")),
    "mt5": ("trimmed", ("mt5", "mean_pooler")),
    "m2m_100": ("trimmed", ("m2m_100", "cls_last_hidden_state_pooler")),
    "bert max": ("whole", ("bert", "max_pooler")),
}
SHORTER = [name for name, (kind, _) in TOWERS.items() if kind != "whole"]


def build(folder: Path, name: str, **settings: Any) -> DualEncoder:
    """A model whose text tower has random biases and norms too, so that nothing of it is zero or one."""
    from transformers import AutoConfig

    more = TOWERS[name][1]
    if isinstance(more, tuple):
        kind, pooler = more
        sizes = SIZES.get(kind, SIZES["bert"])
        AutoConfig.for_model(kind, vocab_size=600, **sizes).save_pretrained(folder / "hf")
        text = {"hf_model_name": "hf", "hf_model_pretrained": False, "hf_pooler_type": pooler, "context_length": 40}
    else:
        text = more if more.keys() & {"cbow", "lstm"} else CLIP | more
    path = folder / "model.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text}))
    torch.manual_seed(0)
    model = build_model(Model(name=str(path), **settings)).eval()
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def end_of(model: DualEncoder) -> int:
    return model.text.eos_id if getattr(model.text, "pool_type", "") == "eos" else END  # type: ignore[return-value]


def draw_texts(model: DualEncoder, lengths: list[int]) -> torch.Tensor:
    """Texts of these lengths, ends included; 0: nothing but padding."""
    generator = torch.Generator().manual_seed(3)
    pad = model.text.config.pad_token_id if model.spec.hf_text else 0
    tokens = torch.full((len(lengths), 40), pad)  # type: ignore[arg-type]
    for row, length in zip(tokens, lengths):
        if length:
            row[:length] = torch.randint(10, END - 1, (length,), generator=generator)
            row[length - 1] = end_of(model)
    return tokens


LENGTHS = [5, 2, 9, 1, 12, 7, 0, 3, 15, 6, 4, 8]


def features_and_gradients(model: DualEncoder, texts: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    texts.sin().sum().backward()
    found = {name: p.grad.clone() for name, p in model.text.named_parameters() if p.grad is not None}
    return texts.detach(), found


def assert_same(model: DualEncoder, tokens: torch.Tensor) -> None:
    """The features of the forward pass, and their gradients, are those of the tower on the padded texts."""
    assert model.text_kind != "whole"
    wanted, gradients = features_and_gradients(model, model.text(tokens.flatten(0, -2)))
    found, own = features_and_gradients(model, model(tokens=tokens)["text"].flatten(0, -2))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=2e-6 * max(1.0, scale), msg=name)


@pytest.mark.parametrize("name", TOWERS)
def test_how_a_tower_is_run(name: str, tmp_path: Path) -> None:
    model = build(tmp_path, name)
    assert text_kind(model.text) == model.text_kind == TOWERS[name][0]


@pytest.mark.parametrize("name", SHORTER)
def test_features_and_gradients_are_those_of_padded_texts(name: str, tmp_path: Path) -> None:
    model = build(tmp_path, name)
    averages = type(getattr(model.text, "pooler", None)).__name__ == "MeanPooler"  # of nothing: not a number
    assert_same(model, draw_texts(model, [length or int(averages) for length in LENGTHS]))
    assert_same(model, draw_texts(model, [40, 1, 39, 17]))
    assert_same(model, draw_texts(model, [6]))


@pytest.mark.parametrize("name", SHORTER)
def test_what_follows_a_text_does_not_reach_its_feature(name: str, tmp_path: Path) -> None:
    """Which proves, by the padded tower alone, that it may be left out."""
    model = build(tmp_path, name)
    tokens = draw_texts(model, [length or 1 for length in LENGTHS])
    lengths = text_lengths(model.text, tokens)
    before, _ = features_and_gradients(model, model.text(tokens))
    if model.spec.hf_text:  # other tokens would no longer be padding
        with torch.no_grad():
            model.text.transformer.get_input_embeddings().weight[model.text.config.pad_token_id] += 1.0
    else:
        beyond = torch.arange(40) >= lengths[:, None]
        tokens = torch.where(beyond, torch.randint(10, END - 1, tokens.shape), tokens)
    assert torch.equal(text_lengths(model.text, tokens), lengths)
    torch.testing.assert_close(model.text(tokens), before, rtol=0, atol=0)
    inside = tokens.clone()
    inside[:, 0] = torch.where(lengths > 1, 11, inside[:, 0])  # of longer texts their first token counts
    changed = (model.text(inside) != before).any(1)
    assert torch.equal(changed, lengths > 1)


@pytest.mark.parametrize("name", ["siglip", "not causal", "last", "coca"])
def test_towers_that_read_the_padding_are_run_whole(name: str, tmp_path: Path) -> None:
    model = build(tmp_path, name)
    tokens = draw_texts(model, [length or 1 for length in LENGTHS])
    features = model.encode_text(tokens)
    assert torch.equal(features, model.text(tokens))
    followed = tokens.clone()
    followed[:, 30:] = 11
    assert (model.encode_text(followed) != features).any(1).all()


def test_several_texts_of_an_image_none_and_one(tmp_path: Path) -> None:
    model = build(tmp_path, "clip")
    tokens = draw_texts(model, LENGTHS)
    assert_same(model, tokens.view(4, 3, 40))
    alone = torch.cat([model.encode_text(text) for text in tokens.split(1)])
    torch.testing.assert_close(model.encode_text(tokens), alone)
    assert model.encode_text(tokens[:0]).shape == (0, 16)


def test_the_end_of_a_text_is_where_the_tower_reads_it(tmp_path: Path) -> None:
    """The first of the highest ids; the first end, and position 0 without one; the last token that is no padding."""
    model = build(tmp_path, "clip")
    tokens = draw_texts(model, [5, 8, 3])
    tokens[1, 6] = END  # a text that holds the end mark itself
    tokens[2] = 13
    assert text_lengths(model.text, tokens).tolist() == [5, 7, 1]
    assert_same(model, tokens)
    model = build(tmp_path, "eos")
    tokens = draw_texts(model, [5, 8, 3])
    tokens[1, 6], tokens[2, 2], tokens[0, 2] = 7, 13, END
    assert text_lengths(model.text, tokens).tolist() == [5, 7, 1]
    assert_same(model, tokens)
    model = build(tmp_path, "bert mean")
    tokens = draw_texts(model, [5, 0, 8])
    tokens[0, 1:3] = 0  # padding within
    assert text_lengths(model.text, tokens).tolist() == [5, 40, 8]


@pytest.mark.parametrize("settings", [{"lora": Lora(rank=2)}, {"lock_text": True, "text_unlocked_layers": 1}])
def test_adapters_and_unlocked_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build(tmp_path, "clip", **settings)
    assert_same(model, draw_texts(model, LENGTHS))


@pytest.mark.parametrize("name", ["clip", "lstm", "bert cls"])
def test_recomputed_activations_and_training_mode(name: str, tmp_path: Path) -> None:
    model = build(tmp_path, name)
    model.set_activation_checkpointing()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its numbers depend on the shape
    assert_same(model, draw_texts(model, [length or 1 for length in LENGTHS]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "lstm"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(tmp_path, name)
    tokens = draw_texts(model, LENGTHS)
    wanted = model.encode_text(tokens).detach()
    model = model.to(dtype)
    torch.testing.assert_close(model.encode_text(tokens), model.text(tokens), rtol=0.02, atol=0.02)
    found = model.encode_text(tokens).detach()
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(("count", "longest"), [(300, 30), (40, 77), (7, 5), (1, 77), (100, 1)])
def test_packing_holds_every_text_once(count: int, longest: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1 + longest, (count,), generator=draw)
    tokens = torch.randint(1, 600, (count, 77), generator=draw)
    ids, position, last = pack(tokens, lengths)
    rows, width = ids.shape
    assert width % MULTIPLE == 0
    assert width <= max(ROW, -(-int(lengths.max()) // MULTIPLE) * MULTIPLE)
    found = [ids.view(-1)[end + 1 - length : end + 1].tolist() for end, length in zip(last.tolist(), lengths.tolist())]
    assert found == [text[:length].tolist() for text, length in zip(tokens, lengths)]
    for end, length in zip(last.tolist(), lengths.tolist()):
        assert position.view(-1)[end + 1 - length : end + 1].tolist() == list(range(length))
        assert end // width == (end + 1 - length) // width  # in one row
    assert int((ids != 0).sum()) == int(lengths.sum())  # and nothing else
    if count == 300:
        assert int(lengths.sum()) > 0.9 * rows * width


def test_packed_rows_take_few_shapes() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        lengths = torch.randint(8, 22, (256,), generator=draw)
        shapes.add(tuple(pack(torch.ones(256, 77, dtype=torch.int64), lengths)[0].shape))
    assert {width for _, width in shapes} == {ROW}
    assert len(shapes) <= 4
