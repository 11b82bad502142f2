"""Encode texts by a bag-of-words tower.

The CLIP paper's pseudo-code (figure 3) names it as the alternative to the text Transformer: the mean of the words'
vectors (CBOW, Mikolov et al. 2013) and one linear projection.
"""

from __future__ import annotations

import torch
from torch import nn


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
