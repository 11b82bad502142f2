"""Word vectors: train them on captions, and start a text tower's token embedding from them.

Training is skip-gram with negative sampling (Mikolov et al., arXiv:1310.4546), by gensim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from clipdist.data.tokens import BPETokenizer
from clipdist.errors import UserError
from clipdist.storage import write_text

NEGATIVES, WINDOW, FEWEST = 5, 5, 5  # word2vec's own: drawn for a pair; tokens to either side; occurrences of a token


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


class Sentences:
    """Captions as lists of words and pieces of words, as a tokenizer has them; iterated as often as asked."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = [tokenizer.word_of(token) for token in range(tokenizer.vocab_size)]
        self._ids: list[np.ndarray] = []

    def add(self, captions: list[str]) -> None:
        """Add captions, each cut to the tokenizer's context."""
        rows = self._tokenizer(captions).numpy()
        self._ids += [row[1 : row.argmax()].astype(np.int32) for row in rows]  # between the marks; the end is highest

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[list[str]]:
        for ids in self._ids:
            yield [word for token in ids if (word := self._words[token]) is not None]


def train_vectors(
    sentences: Sentences, width: int, epochs: int, seed: int, epoch_done: Callable[[], object]
) -> dict[str, np.ndarray]:
    """Return the vectors, fp32 [width], of all words that occur five times or more, the most frequent first.

    One thread does all of it: the same captions and seed give the same vectors.

    Raises:
        UserError: no word occurs so often.
    """
    from gensim.models import Word2Vec
    from gensim.models.callbacks import CallbackAny2Vec

    class Progress(CallbackAny2Vec):
        def on_epoch_end(self, model: object) -> None:
            epoch_done()

    how = {"sg": 1, "negative": NEGATIVES, "window": WINDOW, "min_count": FEWEST, "workers": 1, "seed": seed}
    model = Word2Vec(vector_size=width, epochs=epochs, **how)
    model.build_vocab(sentences)
    if not len(model.wv):
        raise UserError(f"no word occurs {FEWEST} times in {len(sentences)} captions; name more shards")
    model.train(sentences, total_examples=model.corpus_count, epochs=epochs, callbacks=[Progress()])
    return dict(zip(model.wv.index_to_key, model.wv.vectors))


def write_vectors(path: Path, vectors: Mapping[str, np.ndarray]) -> None:
    """Write word2vec's text format."""
    width = len(next(iter(vectors.values())))
    lines = [f"{len(vectors)} {width}"]
    lines += [" ".join([word, *(f"{value:.6g}" for value in vector)]) for word, vector in vectors.items()]
    write_text(path, "\n".join(lines) + "\n")


def nearest_words(vectors: Mapping[str, np.ndarray], word: str, count: int) -> list[tuple[str, float]]:
    """Return the words of the highest cosine with a word, itself left out, and the cosines."""
    words, matrix = list(vectors), np.stack(list(vectors.values()))
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    cosines = unit @ unit[words.index(word)]
    order = [place for place in np.argsort(-cosines, kind="stable") if words[place] != word]
    return [(words[place], float(cosines[place])) for place in order[:count]]
