"""Tokenizers: ids equal to open_clip's, smaller vocabularies, Hugging Face tokenizers, threads, bad input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import pytest
import torch

from clipdist.config import Model
from clipdist.data.tokens import BPETokenizer, make_tokenizer
from clipdist.data.vocabulary import BPE_VOCABULARY
from clipdist.errors import UserError
from clipdist.models.spec import resolve_spec

TEXTS = [
    "A dog's 2 puppies run!",
    "naïve café — déjà vu … ☃ 雪",
    "Tom &amp; Jerry &lt;3 &#39;cheese&#39;",
    "  tabs\tand\nlines   and  spaces ",
    "",
    "!!! ?! #$%^ -- ... 1234567890 <start_of_text> <end_of_text> <|x|>",
    "it\u2019s a \u201cquoted\u201d caption",
    "antidisestablishmentarianism zzxqv ABC-def_ghi don't they'll we've I'm he'd",
    "\x1b[31mred\x1b[0m \x7f",
    "word " * 200,
]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer(BPE_VOCABULARY, 77)


def hf_folder(folder: Path) -> Path:
    """A word-level tokenizer in Hugging Face's form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "dog", "cat", "runs", "sleeps", "the"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def hf_model_json(folder: Path, tokenizer: str) -> str:
    description = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16},
        "text_cfg": {"hf_model_name": tokenizer, "hf_model_pretrained": False, "context_length": 6},
    }
    path = folder / "model.json"
    path.write_text(json.dumps(description))
    return str(path)


@pytest.mark.parametrize("context", [77, 8])
def test_ids_are_those_of_open_clip(context: int) -> None:
    mine = BPETokenizer(BPE_VOCABULARY, context)(TEXTS)
    theirs = open_clip.SimpleTokenizer(context_length=context)(TEXTS)
    assert mine.dtype == torch.int64
    assert mine.shape == (len(TEXTS), context)
    assert torch.equal(mine, theirs)


def test_a_named_model_gets_its_own_context_and_vocabulary() -> None:
    tokenizer = make_tokenizer(resolve_spec(Model(name="RN50")))
    assert (tokenizer.context_length, tokenizer.vocab_size) == (77, BPE_VOCABULARY)


def test_cleaning_options_of_a_model_are_kept(tmp_path: Path) -> None:
    text = {"context_length": 8, "tokenizer_kwargs": {"clean": "canonicalize"}}
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16}
    (tmp_path / "m.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    tokenizer = make_tokenizer(resolve_spec(Model(name=str(tmp_path / "m.json"))))
    assert torch.equal(tokenizer(["A dog, runs!"]), tokenizer(["a dog runs"]))


def test_small_vocabulary_is_a_prefix_of_the_merges(bpe: BPETokenizer) -> None:
    small = BPETokenizer(2048, 77)
    tokens = small(TEXTS)
    assert small.vocab_size == 2048
    assert tokens.max() == 2047  # the end mark is the highest id: CLIP's text tower looks for it
    assert (tokens.argmax(dim=1) > 0).all()
    inside = tokens[0][tokens[0].bool()].tolist()[1:-1]
    words = "".join(small._bpe.decoder[i] for i in inside).replace("</w>", " ").split()
    assert words == ["a", "dog", "'s", "2", "puppies", "run", "!"]
    common = bpe(["a man in the"])[0, 1:5]
    assert torch.equal(common, small(["a man in the"])[0, 1:5])  # frequent words keep their ids


def test_vocabulary_without_room_for_bytes_is_bad_input() -> None:
    with pytest.raises(UserError, match="at least 515"):
        BPETokenizer(500, 8)


def test_fingerprint_tells_vocabularies_and_contexts_apart(bpe: BPETokenizer) -> None:
    prints = {bpe.fingerprint(), BPETokenizer(BPE_VOCABULARY, 32).fingerprint(), BPETokenizer(2048, 77).fingerprint()}
    assert len(prints) == 3
    assert bpe.fingerprint() == BPETokenizer(BPE_VOCABULARY, 77).fingerprint()


def test_memo_may_be_emptied_at_any_time(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bpe(TEXTS)
    monkeypatch.setattr("clipdist.data.tokens._MEMO_WORDS", 2)
    small = BPETokenizer(BPE_VOCABULARY, 77)
    assert torch.equal(small(TEXTS), expected)
    assert len(small._memo) <= 2 or not small._memo


def test_threads_agree(bpe: BPETokenizer) -> None:
    expected = bpe(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: BPETokenizer.__call__(bpe, TEXTS), range(32)))
    assert all(torch.equal(result, expected) for result in results)


def test_hf_tokenizer_from_a_folder_beside_the_json(tmp_path: Path) -> None:
    hf_folder(tmp_path / "tower")
    tokenizer = make_tokenizer(resolve_spec(Model(name=hf_model_json(tmp_path, "tower"))))
    tokens = tokenizer(["a dog runs", "the bird sleeps a a a a a a"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[2, 3, 5, 0, 0, 0], [7, 1, 6, 2, 2, 2]]
    assert tokenizer([]).shape == (0, 6)
    assert (tokenizer.context_length, tokenizer.vocab_size) == (6, 8)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: tokenizer(["a dog runs", "the bird sleeps a a a a a a"]), range(64)))
    assert all(torch.equal(result, tokens) for result in results)
    assert len(tokenizer.fingerprint()) == 16


def test_missing_hf_tokenizer_is_bad_input(tmp_path: Path) -> None:
    spec = resolve_spec(Model(name=hf_model_json(tmp_path, "no/such/folder")))
    with pytest.raises(UserError, match=r"tokenizer no/such/folder: neither a folder"):
        make_tokenizer(spec)


def test_endless_words_take_no_time_and_get_the_same_ids():
    ours, theirs = BPETokenizer(49408, 77), open_clip.SimpleTokenizer(context_length=77)
    words = ["x" * 300, "aeinst" * 40, "dog" + "s" * 200, "<start_of_text> a dog <end_of_text>"]
    assert torch.equal(ours(words), theirs(words))
    assert ours(["q7" * 200_000])[0, -1] == theirs.eot_token_id  # minutes, were it merged pair by pair


def test_ids_of_texts_that_return_are_kept_up_to_a_number(bpe, monkeypatch):
    monkeypatch.setattr("clipdist.data.tokens._MEMO_TEXTS", 3)
    bpe._texts.clear()
    first = bpe(TEXTS)
    assert list(bpe._texts) == TEXTS[:3]
    assert torch.equal(bpe(TEXTS), first)
    assert torch.equal(first[1], bpe(TEXTS[1])[0])
