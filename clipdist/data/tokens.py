"""Tokenize captions by CLIP's byte-pair encoding, or by the tokenizer of a Hugging Face text tower."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import open_clip.tokenizer
import torch
from tokenizers.models import BPE

from clipdist.data.caption_targets import Marks
from clipdist.data.vocabulary import BPE_VOCABULARY
from clipdist.errors import UserError

_MEMO_WORDS = 1 << 20  # web text has no end of words: the memo is emptied when it holds this many
# Captions of small data sets, which return in every epoch: those of Flickr8k take 6 MB. None is replaced.
_MEMO_TEXTS, _MEMO_LETTERS = 1 << 15, 256
_SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # what transformers reads a folder's *.model with
_FEWEST_IDS = 0.5  # of a text tower's: embeddings are padded to round numbers, but not to twice as many
_MARKS = ("<start_of_text>", "<end_of_text>")
PIECE = "@@"  # behind a token that another follows within a word, as subword-nmt writes it
_PROBE = ["A dog's 2 puppies run!", "naïve café — déjà vu", "snow-boarder ☃ jumps", ""]


class Tokenizer(Protocol):
    """Texts to ids; safe to call from several threads.

    Attributes:
        context_length: L, ids per text.
        vocab_size: ids lie in [0, vocab_size).
    """

    context_length: int
    vocab_size: int

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        """int64 [len(texts), L] ([1, L] of one text); longer texts are cut, shorter ones padded."""

    def marks(self) -> Marks:
        """The ids at the start and the end of a text and behind it.

        Raises:
            UserError: a text has no end, or there is no padding.
        """

    def text_of(self, ids: list[int]) -> str:
        """The text of ids, without marks."""

    def fingerprint(self) -> str:
        """Hex digest that changes whenever the same text might get other ids."""


class TokenizerDescription(Protocol):
    """What a ModelSpec says of its tokenizer."""

    @property
    def tokenizer(self) -> dict[str, Any]:
        """{"kind": "bpe", "vocab_size", "options"} or {"kind": "hf", "name", "mode", "options", "ids", "eos_id"}.

        {"kind": "none"}: there is no text tower.
        """

    @property
    def context_length(self) -> int:
        """Ids per text."""


def make_tokenizer(spec: TokenizerDescription) -> Tokenizer:
    """Build the tokenizer that goes with a model.

    Raises:
        UserError: the Hugging Face tokenizer is neither a local folder nor to be had from the hub, or does not belong
            to the text tower; or the vocabulary is too small for the byte-pair encoding's alphabet.
    """
    described = spec.tokenizer
    if described["kind"] == "none":
        return NoTokenizer()
    if described["kind"] == "hf":
        tokenizer = HFTokenizer(described["name"], spec.context_length, described["mode"], described["options"])
        tokenizer.check(described.get("ids"), described.get("eos_id"))
        return tokenizer
    return BPETokenizer(described["vocab_size"], spec.context_length, described["options"])


def token_kind(tokenizer: Tokenizer) -> str:
    """The kind of the shard member that holds this tokenizer's ids: "<16 hex digits>.ids"."""
    return f"{tokenizer.fingerprint()}.ids"


def pack_tokens(tokenizer: Tokenizer, captions: list[str]) -> bytes:
    """The ids of a sample's captions as that member: int32 little-endian [len(captions), L], without a header."""
    return tokenizer(captions).numpy().astype("<i4").tobytes()


def unpack_tokens(data: bytes, captions: int, context_length: int) -> torch.Tensor | None:
    """int64 [captions, context_length] of what pack_tokens gave, or None where the size is another."""
    if len(data) != captions * context_length * 4:
        return None
    ids = np.frombuffer(data, dtype="<i4").astype(np.int64)
    return torch.from_numpy(ids.reshape(captions, context_length))


class NoTokenizer:
    """The tokenizer of a model without a text tower: no ids of any text."""

    context_length = 0
    vocab_size = 0

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        return torch.zeros(1 if isinstance(texts, str) else len(texts), 0, dtype=torch.int64)

    def marks(self) -> Marks:
        raise UserError("the model has no tokenizer")

    def text_of(self, ids: list[int]) -> str:
        return ""

    def fingerprint(self) -> str:
        return _digest("none", 0, 0, [])


class BPETokenizer:
    """open_clip's SimpleTokenizer, id for id, with a memo of words (about seven times as fast).

    A vocabulary below CLIP's 49408 keeps the first merges only: byte-pair merges are ordered by frequency, so a
    prefix of them is the encoding that a smaller vocabulary would have learned. The last two ids are always the
    start and the end of text, so the highest id marks the end, as CLIP's text tower wants.
    """

    def __init__(self, vocab_size: int, context_length: int, options: dict[str, Any] | None = None) -> None:
        options = dict(options or {})
        if vocab_size < BPE_VOCABULARY:
            options["bpe_path"] = io.BytesIO(truncated_merges(vocab_size))
        self._bpe = open_clip.SimpleTokenizer(context_length=context_length, **options)
        self._fast = options.keys() <= {"bpe_path"}  # other options change the cleaning: leave it all to open_clip
        merges = [pair for pair, _ in sorted(self._bpe.bpe_ranks.items(), key=lambda item: item[1])]
        # The same merges as open_clip's own loop, which takes seconds for a "word" of thousands of letters.
        self._merge = BPE(vocab=self._bpe.encoder, merges=merges, end_of_word_suffix="</w>")
        self._memo: dict[str, tuple[int, ...]] = {}
        self._texts: dict[str, list[int]] = {}
        self.context_length = context_length
        self.vocab_size = self._bpe.vocab_size

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        if not self._fast:
            return self._bpe(texts)
        longest = self.context_length - 2
        rows = [[self._bpe.sot_token_id, *self._ids(text)[:longest], self._bpe.eot_token_id] for text in texts]
        tokens = np.zeros((len(texts), self.context_length), dtype=np.int64)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens[np.arange(self.context_length) < lengths[:, None]] = list(itertools.chain.from_iterable(rows))
        return torch.from_numpy(tokens)

    def marks(self) -> Marks:
        """See Tokenizer.marks. Padding is 0, which is "!", too."""
        return Marks(self._bpe.sot_token_id, self._bpe.eot_token_id, 0)

    def text_of(self, ids: list[int]) -> str:
        """See Tokenizer.text_of. Lower case, with spaces between words."""
        return self._bpe.decode([each for each in ids if each not in self.marks()[:2]]).strip()

    def fingerprint(self) -> str:
        return _digest("bpe", self.vocab_size, self.context_length, self(_PROBE).tolist())

    def word_id(self, word: str) -> int | None:
        """The id of the token that is this whole (lower-case) word, or begins one ("snow@@"), if there is one."""
        piece = self._letters(word.removesuffix(PIECE)) if word.endswith(PIECE) else ""
        return self._bpe.encoder.get(piece, self._bpe.encoder.get(self._letters(word) + "</w>"))

    def word_of(self, token: int) -> str | None:
        """The word that word_id gives this token for; None for the marks, and for a part of a character."""
        letters = self._bpe.decoder[token]
        whole = letters.removesuffix("</w>")
        if letters in _MARKS:
            return None
        try:
            word = bytes(self._bpe.byte_decoder[letter] for letter in whole).decode("utf-8")
        except UnicodeDecodeError:
            return None
        return word if whole != letters else word + PIECE

    def _letters(self, text: str) -> str:
        return "".join(self._bpe.byte_encoder[byte] for byte in text.encode("utf-8"))

    def _ids(self, text: str) -> list[int]:
        ids = self._texts.get(text)
        if ids is None:
            ids = self._encode(text)
            if len(self._texts) < _MEMO_TEXTS and len(text) <= _MEMO_LETTERS:
                self._texts[text] = ids
        return ids

    def _encode(self, text: str) -> list[int]:
        plain = text.isascii() and text.isprintable() and "&" not in text
        if plain:  # neither ftfy nor HTML entities have anything to mend here, and ftfy is most of the time
            text = " ".join(text.split()).lower()
        else:
            text = self._bpe.clean_fn(text)
        words, memo = self._bpe.pat.findall(text), self._memo
        try:
            return list(itertools.chain.from_iterable(map(memo.__getitem__, words)))
        except KeyError:
            memo.update((word, self._encode_word(word)) for word in words if word not in memo)
        if len(memo) > _MEMO_WORDS:
            self._memo = {}
        return list(itertools.chain.from_iterable(map(memo.__getitem__, words)))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _MARKS:  # a caption may hold them as text; open_clip takes them for what they are
            return (self._bpe.encoder[word],)
        return tuple(token.id for token in self._merge.tokenize(self._letters(word)))


class HFTokenizer:
    """The tokenizer of a Hugging Face model, from a local folder or the hub."""

    def __init__(self, name: str, context_length: int, mode: str | None, options: dict[str, Any]) -> None:
        try:
            self._hf = open_clip.tokenizer.HFTokenizer(
                name, context_length=context_length, tokenizer_mode=mode, **options
            )
        except Exception as error:  # transformers and the hub raise many kinds for "not there"
            lost = [package for package in _SENTENCEPIECE if not importlib.util.find_spec(package)]
            if lost and any(Path(name).glob("*.model")):
                raise UserError(
                    f"tokenizer {name}: needs the package {lost[0]}: pip install -c constraints.txt -e '.[siglip]'"
                ) from None
            raise UserError(
                f"tokenizer {name}: neither a folder with tokenizer files nor to be had from the Hugging Face hub"
                f" ({type(error).__name__}); offline, name a folder in the model JSON, or set HF_HUB_OFFLINE=1 and"
                " HF_HOME to a filled cache"
            ) from None
        self._lock = threading.Lock()  # the fast tokenizers set padding on a shared object and refuse to be re-entered
        self.name = name
        self.context_length = context_length
        self.vocab_size = len(self._hf.tokenizer)

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        with self._lock:
            return self._hf(texts)

    def check(self, ids: int | None, eos_id: int | None) -> None:
        """Compare with what the text tower embeds, as far as it is known.

        Raises:
            UserError: an id that the tower has no vector for, hardly any of its ids, or another end of text.
        """
        belongs = "it does not belong to these weights; name the folder or model that has both"
        if ids is not None and not _FEWEST_IDS * ids <= self.vocab_size <= ids:
            raise UserError(f"tokenizer {self.name}: has {self.vocab_size} ids, the text tower {ids}: {belongs}")
        own = self._hf.tokenizer.eos_token_id
        if eos_id is not None and own != eos_id:
            raise UserError(
                f"tokenizer {self.name}: ends a text with id {own}, the text tower is read at id {eos_id}: {belongs}"
            )

    def marks(self) -> Marks:
        """See Tokenizer.marks. The start is the id that every text begins with."""
        theirs = self._hf.tokenizer
        one, two = (row.tolist() for row in self(["a dog", "the red cars"]))
        ends = [mark for mark in (theirs.eos_token_id, theirs.sep_token_id) if mark in one and mark in two]
        if not ends or theirs.pad_token_id is None:
            lacks = "no padding" if ends else "no end mark behind a text"
            raise UserError(f"tokenizer {self.name}: has {lacks}, and a caption needs it; take another model")
        starts = (theirs.bos_token_id, theirs.cls_token_id)
        return Marks(one[0] if one[0] == two[0] and one[0] in starts else None, ends[0], theirs.pad_token_id)

    def text_of(self, ids: list[int]) -> str:
        """See Tokenizer.text_of."""
        return str(self._hf.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def fingerprint(self) -> str:
        vocabulary = sorted(self._hf.tokenizer.get_vocab().items())
        return _digest("hf", vocabulary, self.context_length, self(_PROBE).tolist())


def truncated_merges(vocab_size: int) -> bytes:
    """The first merges of CLIP's byte-pair encoding as a gzip file, as many as a vocabulary of this size has.

    Raises:
        UserError: the size leaves no room for the 512 byte symbols and the two marks.
    """
    merges = vocab_size - 512 - 2
    if merges < 1:
        raise UserError(f"vocab_size {vocab_size}: CLIP's byte-pair encoding needs at least 515")
    with gzip.open(open_clip.tokenizer.default_bpe()) as file:
        lines = file.read().decode("utf-8").split("\n")
    return gzip.compress("\n".join(lines[: merges + 1]).encode("utf-8"), mtime=0)  # the first line is a heading


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]
