"""Run text towers on texts as long as they are, without the padding behind them; features and gradients stay the same.

What stands behind the end of a text cannot reach its feature in a causal tower that is read at the end, nor in a tower
that masks padding. Captions have 14 tokens on average, of 77. By kind of tower (`text_kind`), texts are

    packed    several behind one another in a row, each with positions of its own and attending to itself alone, as
              sequences are in Krell et al., arXiv:2107.02027
    sequences one behind another without rows, as torch packs them for recurrent layers: an LSTM
    trimmed   cut to the longest of the batch
    whole     run as they are: the tower reads the padding

Lengths decide shapes, so they are read on the CPU: on a GPU the host would wait for them. A forward pass calls the
tower once whatever the lengths are: at ZeRO stage 3 all ranks must call it equally often.

Shapes: b texts, L tokens of each, P rows of W tokens, D features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from clipdist.distributed.rank import moved
from clipdist.models.cbow import CBOW
from clipdist.models.lstm import LSTM
from clipdist.models.towers import MeanPooler, mix_in

Kind = Literal["packed", "sequences", "trimmed", "whole"]

MASKED = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")  # Hugging Face models that attend to no padding
ROW = 64  # tokens of a row of packed texts, or of the longest text: attention within a row costs its square
MULTIPLE = 8  # of lengths: few shapes, and such as GPU kernels are made for


def text_kind(tower: nn.Module) -> Kind:
    """Return how a text tower may be run. One that is not known is run whole."""
    from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder
    from open_clip.transformer import TextTransformer

    if isinstance(tower, TextTransformer):
        # A class embedding stands behind the padding, at a position of its own. SigLIP's towers attend to padding.
        causal = tower.attn_mask is not None and tower.cls_emb is None
        return "packed" if causal and tower.pool_type in ("argmax", "eos") else "whole"
    if isinstance(tower, HFTextEncoder):
        poolers = (MeanPooler, ClsPooler, ClsLastHiddenStatePooler)  # MaxPooler reads the padding, and nothing else
        masked = tower.config.model_type in MASKED and isinstance(tower.pooler, poolers)
        return "trimmed" if masked else "whole"
    if isinstance(tower, LSTM):
        return "sequences"
    return "trimmed" if isinstance(tower, CBOW) else "whole"


def allow_packing(tower: nn.Module) -> Kind:
    """Let a tower take what `pack` gives, in place, if its texts are to be packed. Return its kind."""
    kind = text_kind(tower)
    if kind == "packed" and not isinstance(tower, PackedTexts):
        mix_in(PackedTexts, tower)
    return kind


def encode(tower: Any, kind: Kind, tokens: Tensor, device: torch.device) -> Tensor:
    """Return the features [b, D] of texts.

    Args:
        tower: on `device`.
        kind: what `allow_packing` returned for it.
        tokens: int64 [b, L]. On the CPU they are packed or trimmed; on another device they are run as they are.
    """
    if kind == "whole" or not tokens.is_cpu or not len(tokens):
        return tower(moved(tokens, device))
    lengths = text_lengths(tower, tokens)
    if kind == "trimmed":
        return tower(moved(tokens[:, : _rounded(int(lengths.max()), MULTIPLE)], device))
    if kind == "sequences":
        ids, batch_sizes, order = pack_sequences(tokens, lengths)
        return tower(moved(ids, device), batch_sizes, moved(order, device))
    return tower(*(moved(part, device) for part in pack(tokens, lengths, tower.row_bits)))


def text_lengths(tower: Any, tokens: Tensor) -> Tensor:
    """Return how many of a text's first tokens decide its feature, int64 [b], for a tower that is not run whole.

    Args:
        tokens: int64 [b, L], on the CPU.
    """
    if isinstance(tower, PackedTexts):  # it is read at the first of these, and at position 0 without any
        ends = tokens.eq(tower.eos_id).to(torch.int64) if tower.pool_type == "eos" else tokens
        return ends.argmax(1) + 1
    if isinstance(tower, (CBOW, LSTM)):
        found = tokens.eq(tower.end)
        length = found.to(torch.int64).argmax(1) + 1
    else:
        found = tokens.ne(tower.config.pad_token_id)
        length = tokens.shape[1] - found.flip(1).to(torch.int64).argmax(1)
    return torch.where(found.any(1), length, tokens.shape[1])  # padding alone is not masked, but averaged


def pack(tokens: Tensor, lengths: Tensor, bits: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Put texts into as few rows as best fit finds, the longest first.

    Args:
        tokens: int64 [b, L].  lengths: int64 [b], 1 to L.
        bits: the number of rows is rounded up to so many significant bits, so that it takes few values.

    Returns:
        tokens and their positions in their texts, int64 [P, W], zeros where there is none; and of every text the place
        of its last token, int64 [b], counted through all rows.
    """
    counts = lengths.tolist()
    width = _rounded(max(*counts, min(ROW, sum(counts))), MULTIPLE)
    starts, rows = _best_fit(counts, width)
    rows = _rounded(rows, 1 << max(0, rows.bit_length() - bits))
    start = torch.tensor(starts)
    text = torch.arange(len(tokens)).repeat_interleave(lengths)
    position = torch.arange(len(text)) - (lengths.cumsum(0) - lengths)[text]
    places = start[text] + position
    packed = torch.zeros(2, rows * width, dtype=torch.int64)
    packed[0, places] = tokens[text, position]
    packed[1, places] = position
    ids, positions = packed.view(2, rows, width)
    return ids, positions, start + lengths - 1


def pack_sequences(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of torch's PackedSequence of texts.

    Args:
        tokens: int64 [b, L].  lengths: int64 [b], 1 to L.

    Returns:
        The tokens, int64 [N], the first ones of all texts before the second ones; how many texts have a first token,
        a second one and so on, int64, which stays on the CPU; and the place of every text among those, int64 [b].
    """
    packed = pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
    assert packed.unsorted_indices is not None
    return packed.data, packed.batch_sizes, packed.unsorted_indices


def _best_fit(counts: list[int], width: int) -> tuple[list[int], int]:
    """Return where each text starts, counted through all rows, and the number of rows."""
    starts, rows = [0] * len(counts), 0
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # by the space that they have left
    spaces = 0  # bit n is set where open_rows[n] is not empty
    for text in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
        need = counts[text]
        fitting = spaces >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1  # the lowest bit: the least that suffices
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
        else:
            row, space, rows = rows, width, rows + 1
        starts[text] = row * width + width - space
        if space > need:
            open_rows[space - need].append(row)
            spaces |= 1 << (space - need)
    return starts, rows


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def allow_shorter(tower: nn.Module) -> None:
    """Let a tower take texts that are padded to less than its context, in place: open_clip's keeps its whole mask."""
    from open_clip.transformer import TextTransformer

    if isinstance(tower, TextTransformer) and not isinstance(tower, ShorterTexts):
        mix_in(ShorterTexts, tower)


class ShorterTexts(nn.Module):
    """Mixin of TextTransformer: a causal mask as long as the texts."""

    def _embeds(self: Any, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)  # type: ignore[misc]
        length = x.shape[1]
        return x, mask if mask is None else mask[..., :length, :length]


class PackedTexts(nn.Module):
    """Mixin of TextTransformer: takes packed texts, too.

    Attributes:
        row_bits: see `pack`; fewer where every number of rows is compiled for itself.
    """

    row_bits = 5

    eos_id: int
    pool_type: str

    def forward(self: Any, tokens: Tensor, position: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        """Return the features [b, D] of int64 [b, L], or of what `pack` gave."""
        if position is None or last is None:
            return super().forward(tokens)
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(tokens).to(dtype) + F.embedding(position, self.positional_embedding).to(dtype)
        x = self.transformer(x, attn_mask=_within_texts(position, self.heads, dtype))
        x = self.ln_final(x.flatten(0, 1)[last])
        projection = self.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _within_texts(position: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return the mask that is added to the logits of attention, [P * heads, W, W]: 0 or -inf.

    A token sees those before it in its text, and itself.
    """
    starts = torch.arange(position.shape[1], device=position.device) - position
    seen = (starts[:, :, None] == starts[:, None, :]).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=position.device).masked_fill(~seen, -torch.inf)
    return mask.repeat_interleave(heads, 0)
