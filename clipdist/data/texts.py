"""Draw captions of samples, and turn them into rows of tokens."""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.data.batch import CAPTION, EMPTY, NEGATIVE, Batch
from clipdist.data.locked_features import LockedFeatures
from clipdist.data.members import CAPTIONS, Members
from clipdist.data.reader import StoredSample
from clipdist.data.tokens import Tokenizer, token_kind, unpack_tokens

KEPT_BYTES = 16 << 20  # of captions that are kept: those of some 20,000 samples with five of usual length
_SAMPLE_BYTES = 200  # of a list of captions, and its place


class Text(NamedTuple):
    """A text of a sample, or the features of a locked tower for it."""

    content: str | torch.Tensor  # or fp32 [w]
    group: int
    ids: torch.Tensor | None = None  # int64 [L], if the shard contains them
    role: int = CAPTION


class SeveralTexts(NamedTuple):
    """Several texts each of some samples: counts by sample, then tokens [m, L] (or features), groups and roles [m]."""

    counts: torch.Tensor
    tokens: torch.Tensor
    groups: torch.Tensor
    roles: torch.Tensor


class Texts:
    """The texts of samples, as a run's configuration draws them. Safe to use from several threads.

    Args:
        tokenizer: of the longest texts.
        shorter: those of batches with shorter texts.
        images_only: whether a sample without a caption can be used.
        locked: features that take the place of the captions' tokens; None: there are none.
        pin: allocate in pinned memory.
    """

    def __init__(
        self,
        members: Members,
        tokenizer: Tokenizer,
        cfg: config.Data,
        *,
        shorter: Sequence[Tokenizer] = (),
        images_only: bool = False,
        locked: LockedFeatures | None = None,
        pin: bool = False,
    ) -> None:
        self.tokenizer, self.cfg, self.images_only, self.locked, self.pin = tokenizer, cfg, images_only, locked, pin
        self._tokenizers = {one.context_length: one for one in (*shorter, tokenizer)}
        self._stored_ids = members.captions == CAPTIONS  # those of other captions would be wrong
        self._kept: dict[int, list[str]] = {}  # captions by sample, never replaced
        self._room = KEPT_BYTES
        self._no_text = Text("", group_id(""))
        self._token_kind, self._vocabulary = token_kind(tokenizer), tokenizer.vocab_size

    def empty(self, count: int, length: int) -> torch.Tensor:
        """Return memory for texts of L = `length` tokens: int64 [count, L], or fp32 [count, w] of a locked tower."""
        if self.locked is not None:
            return torch.zeros(count, self.locked.width, pin_memory=self.pin)
        return torch.zeros(count, length, dtype=torch.int64, pin_memory=self.pin)

    def draw(self, sample_id: int, stored: StoredSample | None, uniforms: list[float]) -> list[Text]:
        """Return captions of a sample, and then negatives; none if it has none and its image can be used without.

        Args:
            stored: the sample; None where its features are all that is read.
            uniforms: numbers in [0, 1) that select texts, one for each.

        Raises:
            BadSample: it has no caption, and needs one; or they are no text.
        """
        captions = self._draw_captions(sample_id, stored, uniforms[: self.cfg.planned_captions])
        if not self.cfg.negatives or stored is None:
            return captions
        texts = stored.find_negatives().texts
        chosen = _drawn(uniforms[self.cfg.planned_captions :], len(texts))
        return captions + [Text(texts[number], group_id(texts[number]), role=NEGATIVE) for number in chosen]

    def fill_single(self, batch: Batch, rows: slice, texts: Sequence[list[Text]]) -> None:
        """Write tokens and groups of the first text of every row."""
        single = [own[0] if own else self._no_text for own in texts]
        self._fill(batch.tokens[rows], single)
        batch.group_id[rows] = torch.tensor([text.group for text in single])

    def several(self, texts: Sequence[list[Text]], length: int) -> SeveralTexts:
        """Return all texts of some rows, of `length` tokens, for place."""
        flat = [text for own in texts for text in own]
        tokens = self.empty(len(flat), length)
        if flat:
            self._fill(tokens, flat)
        groups = torch.tensor([text.group for text in flat], dtype=torch.int64)
        roles = torch.tensor([text.role for text in flat], dtype=torch.uint8)
        return SeveralTexts(torch.tensor([len(own) for own in texts]), tokens, groups, roles)

    def place(self, batch: Batch, parts: list[SeveralTexts]) -> Batch:
        """Return the batch with several texts of each image: [b, K, ...], K the most that an image has here."""
        counts, tokens, groups, roles = (torch.cat(column) for column in zip(*parts))
        shape = (len(counts), max(1, int(counts.max())))
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[rows]
        empty = self.empty(1, batch.tokens.shape[-1])
        self._fill(empty, [self._no_text])
        placed = []
        for values, fill in ((tokens, empty), (groups, self._no_text.group), (roles, EMPTY)):
            out = torch.empty(*shape, *values.shape[1:], dtype=values.dtype, pin_memory=self.pin)
            out[:] = fill
            out[rows, places] = values
            placed.append(out)
        return replace(batch, tokens=placed[0], group_id=placed[1], roles=placed[2])

    def _draw_captions(self, sample_id: int, stored: StoredSample | None, uniforms: list[float]) -> list[Text]:
        """Return captions of a sample, or their features; none if it has none and its image can be used without."""
        if self.locked is not None:
            try:
                rows = self.locked.rows(sample_id)
            except BadSample:
                if not self.images_only:
                    raise
                return []
            return [Text(*rows[number]) for number in self._choose(uniforms, len(rows))]
        assert stored is not None
        captions = self._captions(sample_id, stored)
        data = stored.read(self._token_kind) if self._stored_ids and captions else None
        ids = None if data is None else unpack_tokens(data, len(captions), self.tokenizer.context_length)
        return [
            Text(captions[number], group_id(captions[number]), None if ids is None else ids[number])
            for number in self._choose(uniforms, len(captions))
        ]

    def _choose(self, uniforms: list[float], captions: int) -> list[int]:
        """Return the numbers of the captions that a step uses."""
        if self.cfg.caption in ("first", "all"):
            return list(range(captions))[: 1 if self.cfg.caption == "first" else None]
        return _drawn(uniforms, captions)

    def _captions(self, sample_id: int, stored: StoredSample) -> list[str]:
        """Return the captions of a sample, those of small data sets from memory after the first epoch.

        Returns:
            []: it has none, and its image can be used without.

        Raises:
            BadSample: it has none, and needs one.
        """
        known = self._kept.get(sample_id)
        if known is not None:
            return known
        try:
            captions = stored.captions()
        except BadSample:
            if not self.images_only:
                raise
            return []
        size = sum(map(sys.getsizeof, captions)) + _SAMPLE_BYTES
        if size <= self._room:
            self._room -= size
            self._kept[sample_id] = captions
        return captions

    def _fill(self, out: torch.Tensor, texts: list[Text]) -> None:
        """Write the texts' tokens, or features; where there is no text, the tokens of an empty one, or zeros."""
        if self.locked is None:
            contents = [text.content for text in texts if isinstance(text.content, str)]
            out.copy_(self._tokens(contents, texts, self._tokenizers[out.shape[1]]))
            return
        for row, text in zip(out, texts):
            if isinstance(text.content, torch.Tensor):
                row.copy_(text.content)

    def _tokens(self, captions: list[str], texts: list[Text], tokenizer: Tokenizer) -> torch.Tensor:
        """Return token ids, int64 [len(captions), L]: those stored in the shard for this tokenizer, else computed."""
        whole = tokenizer is self.tokenizer  # those stored are of the longest texts
        stored = {row: text.ids for row, text in enumerate(texts) if whole and text.ids is not None}
        # A damaged member without a checksum may contain ids outside the vocabulary.
        usable = {row: ids for row, ids in stored.items() if 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary}
        if not usable:
            return tokenizer(captions)
        missing = [row for row in range(len(captions)) if row not in usable]
        tokens = torch.empty(len(captions), tokenizer.context_length, dtype=torch.int64)
        if missing:
            tokens[missing] = tokenizer([captions[row] for row in missing])
        for row, ids in usable.items():
            tokens[row] = ids
        return tokens


def _drawn(uniforms: list[float], count: int) -> list[int]:
    """Return numbers below `count`, drawn without replacement: one for each of the uniforms, or all in some order."""
    left = list(range(count))
    return [left.pop(int(uniform * len(left))) for uniform in uniforms[:count]]


def group_id(caption: str) -> int:
    """Hash a caption to an int64, ignoring case, spacing and closing punctuation."""
    normal = " ".join(unicodedata.normalize("NFKC", caption).lower().split()).rstrip(" .!?,;:")
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little", signed=True)
