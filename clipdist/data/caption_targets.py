"""What a decoder of captions is to predict: where a caption ends, and which token follows which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_TARGET = -1


class Marks(NamedTuple):
    """The ids by which a tokenizer marks a text: its start (None: it marks none), its end, and padding behind it."""

    start: int | None
    end: int
    pad: int


def caption_lengths(tokens: Tensor, marks: Marks) -> Tensor:
    """Return how many of a text's tokens are its own, its marks included, int64 [b].

    A text ends with the first end mark behind its start. Padding does not tell: id 0 of CLIP's byte-pair encoding
    is both padding and "!", and some tokenizers pad with their end mark. A text that was cut without an end mark is as
    long as what is not padding.

    Args:
        tokens: int64 [b, L].
    """
    first = int(marks.start is not None)
    ends = tokens[:, first:].eq(marks.end)
    padding = tokens.ne(marks.pad).flip(1).to(torch.int64).argmax(1)
    return torch.where(ends.any(1), ends.to(torch.int64).argmax(1) + first + 1, tokens.shape[1] - padding)


def caption_targets(tokens: Tensor, marks: Marks) -> Tensor:
    """Return for every input of a decoder the token that follows, or NO_TARGET behind the end: int64 [b, T].

    The inputs are the tokens but the last, T = L - 1. Of a tokenizer without a start mark padding stands before them:
    T = L.
    """
    shift = int(marks.start is not None)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.where(place < caption_lengths(tokens, marks)[:, None], NO_TARGET)[:, shift:]
