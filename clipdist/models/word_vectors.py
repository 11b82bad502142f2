"""Start a text tower's token embedding from word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from clipdist.errors import UserError


class WordIds(Protocol):
    def word_id(self, word: str) -> int | None:
        """Return the id of the token that is this whole word, if any."""


def load_word_vectors(embedding: nn.Embedding, path: str | Path, words: WordIds) -> int:
    """Start the embedding from pre-trained word vectors in word2vec's or GloVe's text format.

    A byte-pair token that is a whole word takes that word's vector; every other token (pieces, marks, words that the
    file lacks) is drawn anew with the standard deviation of the vectors taken, so that neither kind drowns the other.
    Prints the coverage.

    Returns:
        How many tokens took a vector.

    Raises:
        UserError: no such file, not text, vectors of another width than the embedding's, or none of its words is a
            token.
    """
    weight = embedding.weight
    vectors = _read_vectors(Path(path), weight.shape[1], words)
    if not vectors:
        raise UserError(f"model.word_vectors={path}: not one of its words is a token of the vocabulary")
    ids = torch.tensor(list(vectors))
    rows = torch.tensor(list(vectors.values()))
    with torch.no_grad():
        weight.normal_(std=float(rows.std()))
        weight[ids] = rows.to(weight.dtype)
    share = 100 * len(vectors) / weight.shape[0]
    print(f"word vectors: {len(vectors)} of {weight.shape[0]} tokens ({share:.1f} %) start from {path}")
    return len(vectors)


def _read_vectors(path: Path, width: int, words: WordIds) -> dict[int, list[float]]:
    vectors: dict[int, list[float]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.rstrip().split(" ")
                if number == 1 and len(fields) == 2:  # word2vec's heading: how many words, how many dimensions
                    continue
                if len(fields) != width + 1:
                    raise UserError(
                        f"model.word_vectors={path}: line {number} has {len(fields) - 1} numbers,"
                        f" the text tower's vectors {width}; set its width in the model JSON to match"
                    )
                token = words.word_id(fields[0])
                if token is not None and token not in vectors:
                    vectors[token] = [float(number) for number in fields[1:]]
    except UnicodeDecodeError:
        raise UserError(f"model.word_vectors={path}: not a text file (word2vec's binary form is not read)") from None
    except ValueError as error:
        raise UserError(f"model.word_vectors={path}: {error}") from None
    except OSError as error:
        raise UserError(f"model.word_vectors={path}: {error.strerror}") from None
    return vectors
