"""Encode texts by a bag-of-words tower.

The CLIP paper's pseudo-code (figure 3) names it as the alternative to the text Transformer: the mean of the words'
vectors (CBOW, Mikolov et al. 2013) and one linear projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from clipdist.errors import UserError


class CBOW(nn.Module):
    """Mean of the token embeddings between the start and the end mark, then a linear projection without bias.

    Tokens are those of CLIP's byte-pair encoding: the two highest ids are the marks, and zeros (which are also the id
    of "!") pad on the right.
    """

    def __init__(self, width: int, vocab_size: int, context_length: int, embed_dim: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.start, self.end = vocab_size - 2, vocab_size - 1
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.proj = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the features of int64 [b, L], [b, D] in the parameters' dtype; of an empty text, its end mark's."""
        ended = (tokens == self.end).cumsum(dim=1) > 0
        words = ~ended & (tokens != self.start)
        empty = ~words.any(dim=1, keepdim=True)
        kept = (words | (empty & (tokens == self.end))).unsqueeze(-1)
        vectors = self.token_embedding(tokens)
        mean = (vectors * kept).sum(dim=1, dtype=torch.float32) / kept.sum(dim=1)
        return self.proj(mean.to(vectors.dtype))

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze the embedding, and the projection too: unlocked_layers=1 lets the projection train."""
        self.token_embedding.requires_grad_(unlocked_layers >= 2)
        self.proj.requires_grad_(unlocked_layers >= 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do nothing: there is no activation here that is worth computing twice."""


class WordIds(Protocol):
    def word_id(self, word: str) -> int | None:
        """Return the id of the token that is this whole word, if any."""


def load_word_vectors(tower: CBOW, path: str | Path, words: WordIds) -> int:
    """Start the embedding from pre-trained word vectors in word2vec's or GloVe's text format.

    A byte-pair token that is a whole word takes that word's vector; every other token (pieces, marks, words that the
    file lacks) is drawn anew with the standard deviation of the vectors taken, so that neither kind drowns the other.
    The projection is left as it is. Prints the coverage.

    Returns:
        How many tokens took a vector.

    Raises:
        UserError: no such file, not text, vectors of another width than the tower's, or none of its words is a token.
    """
    weight = tower.token_embedding.weight
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
                        f" the CBOW tower is {width} wide; set text_cfg.cbow.width in the model JSON to match"
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
