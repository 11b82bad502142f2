"""Decoders of captions behind an image tower: CoCa (arXiv:2205.01917), CapPa (arXiv:2306.07915), SimVLM (2108.10904).

Shapes: b images, n tokens of each, L tokens of a caption, T inputs of the decoder, w its width, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import MultimodalTransformer, Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdist.data.caption_targets import NO_TARGET, Marks
from clipdist.data.vocabulary import BPE_VOCABULARY
from clipdist.distributed.rank import moved
from clipdist.losses.captions import caption_loss
from clipdist.models.spec import ModelSpec

DECODER, OPEN_CLIPS = "heads.caption.", "text_decoder."  # of the names of CoCa's parameters: ours, and open_clip's
CAPTION = "caption"  # of the head, and of its output
MULTIPLE = 8  # of T: few shapes


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder.

    Attributes:
        width: w.
        layers, heads: of its transformer; w is a multiple of `heads`.
        vocabulary: V.
        length: the largest T.
        image_width: of the image's tokens.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    image_width: int


class CaptionDecoder(nn.Module):
    """A head that predicts every token of a caption from those before it and the image.

    Args:
        marks: of the tokenizer.
        smoothing: of labels.

    Attributes:
        reads_text_tower: whether its inputs are the outputs of the text tower instead of tokens.
        all_inputs: whether inputs behind the end of a caption have an influence.
        whole_logits: return the logits [b, T, V] instead of the loss: for the audit's formulas.
    """

    reads_text_tower = False
    all_inputs = False
    whole_logits = False

    text_projection: nn.Parameter  # [w, V]

    def set_up(self, sizes: DecoderSizes, marks: Marks, smoothing: float) -> None:
        """Make what all decoders have; called by constructors."""
        self.sizes, self.marks, self.smoothing = sizes, marks, smoothing
        projects = sizes.image_width != sizes.width
        self.image_projection = nn.Linear(sizes.image_width, sizes.width) if projects else nn.Identity()
        self.text_projection = nn.Parameter(torch.empty(sizes.width, sizes.vocabulary))
        nn.init.normal_(self.text_projection, std=sizes.width**-0.5)

    def forward(self, image: Tensor, tokens: Tensor, targets: Tensor | None = None, **drawn: Tensor) -> Tensor:
        """Return the sum of the cross-entropy of all targets, fp32 [].

        Args:
            image: [b, n, image width].
            tokens: int64 [b, L], on any device.
            targets: int64 [b, T], NO_TARGET where none is; best on the CPU, where it is read. None: all that follow.
            drawn: what `hidden` takes.
        """
        if targets is None:
            shift = int(self.marks.start is not None)
            targets = tokens[:, shift:]
        inputs = self.inputs(tokens)[:, : targets.shape[1]]
        if not self.all_inputs and not self.whole_logits and targets.is_cpu:  # causal: what follows has no influence
            used = int(targets.ne(NO_TARGET).any(0).nonzero().max()) + 1 if targets.ne(NO_TARGET).any() else 1
            used = min(inputs.shape[1], -(-used // MULTIPLE) * MULTIPLE)
            inputs, targets = inputs[:, :used], targets[:, :used]
        hidden = self.hidden(self.image_projection(image), moved(inputs, image.device), **drawn)
        if self.whole_logits:
            return hidden @ self.text_projection
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if not targets.is_meta:
            places = targets.ne(NO_TARGET).nonzero()[:, 0]
            hidden, targets = hidden[moved(places, hidden.device)], targets[places]
        return caption_loss(hidden, self.text_projection, moved(targets, hidden.device), self.smoothing)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass."""
        raise NotImplementedError

    def inputs(self, tokens: Tensor) -> Tensor:
        """Return the inputs of texts [b, L], of which the last has no target: [b, T]. See caption_targets."""
        if self.marks.start is not None:
            return tokens[:, :-1]
        return torch.cat([torch.full_like(tokens[:, :1], self.marks.pad), tokens[:, :-1]], dim=1)

    def hidden(self, image: Tensor, inputs: Tensor, **drawn: Tensor) -> Tensor:
        """Return what is multiplied with the vocabulary, [b, T, w].

        Args:
            image: [b, n, w].
            inputs: int64 [b, T].
        """
        raise NotImplementedError


class CoCaDecoder(CaptionDecoder, MultimodalTransformer):
    """CoCa: pairs of layers, with causal attention to the text and with attention to the image.

    The text comes from the text tower, whose layers are causal. open_clip's module, by its parameters' names.
    """

    reads_text_tower = True

    attn_mask: Tensor
    resblocks: Any
    cross_attn: Any
    ln_final: nn.Module

    def __init__(self, sizes: DecoderSizes, marks: Marks, smoothing: float = 0.0) -> None:
        MultimodalTransformer.__init__(
            self, sizes.width, sizes.layers, sizes.heads, sizes.length, output_dim=sizes.vocabulary
        )
        self.set_up(sizes, marks, smoothing)
        draw_blocks([*self.resblocks, *self.cross_attn], sizes.width, sizes.layers)

    def hidden(self, image: Tensor, inputs: Tensor, **drawn: Tensor) -> Tensor:
        """See CaptionDecoder.hidden.

        Args:
            drawn: "text": outputs of the text tower, [b, L, w].
        """
        return self.decode(image, drawn["text"][:, : inputs.shape[1]], self.attn_mask)

    def decode(self, image: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Run the layers on x [b, T, w]; `mask` is added to the logits of attention within the text."""
        mask = mask[..., : x.shape[1], : x.shape[1]]
        for block, cross in zip(self.resblocks, self.cross_attn):
            if self.grad_checkpointing:
                x = checkpoint(block, x, None, None, mask, use_reentrant=False)
                x = checkpoint(cross, x, image, image, None, use_reentrant=False)
            else:
                x = cross(block(x, attn_mask=mask), k_x=image, v_x=image)
        return self.ln_final(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See CaptionDecoder.set_grad_checkpointing."""
        self.grad_checkpointing = enable


class CapPaDecoder(CoCaDecoder):
    """CapPa: its own embedding of tokens. In parallel all inputs are one learned vector, and none is hidden."""

    reads_text_tower = False
    all_inputs = True

    def __init__(self, sizes: DecoderSizes, marks: Marks, smoothing: float = 0.0) -> None:
        super().__init__(sizes, marks, smoothing)
        self.embedding = TokenEmbedding(sizes)
        self.mask_token = nn.Parameter(torch.empty(sizes.width))
        nn.init.normal_(self.mask_token, std=0.02)

    def hidden(self, image: Tensor, inputs: Tensor, **drawn: Tensor) -> Tensor:
        """See CaptionDecoder.hidden.

        Args:
            drawn: "parallel": bool [b], which captions are predicted in parallel; without it none is.
        """
        if "parallel" not in drawn:
            return self.decode(image, self.embedding(inputs), self.attn_mask)
        parallel = moved(drawn["parallel"], inputs.device)[:, None, None]
        x = self.embedding(inputs, self.mask_token, parallel)
        length = inputs.shape[1]
        mask = torch.where(parallel, 0.0, self.attn_mask[:length, :length])
        return self.decode(image, x, mask.repeat_interleave(self.sizes.heads, 0))


class SimVLMDecoder(CaptionDecoder):
    """SimVLM: one transformer over the image's tokens and the text; it sees image and prefix both ways."""

    def __init__(self, sizes: DecoderSizes, marks: Marks, smoothing: float = 0.0) -> None:
        super().__init__()
        self.set_up(sizes, marks, smoothing)
        self.embedding = TokenEmbedding(sizes)
        self.transformer = Transformer(sizes.width, sizes.layers, sizes.heads)
        self.ln_final = nn.LayerNorm(sizes.width)
        draw_blocks([*self.transformer.resblocks], sizes.width, sizes.layers)

    def hidden(self, image: Tensor, inputs: Tensor, **drawn: Tensor) -> Tensor:
        """See CaptionDecoder.hidden.

        Args:
            drawn: "prefix": int64 [b], how many first inputs are seen by all; without it 1, the start.
        """
        places = image.shape[1]
        x = torch.cat([image, self.embedding(inputs)], dim=1)
        prefix = moved(drawn.get("prefix", torch.ones(len(x), dtype=torch.int64)), x.device)
        mask = prefix_mask(places + prefix, x.shape[1]).to(x.dtype)
        x = self.transformer(x, attn_mask=mask.repeat_interleave(self.sizes.heads, 0))
        return self.ln_final(x[:, places:])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See CaptionDecoder.set_grad_checkpointing."""
        self.transformer.grad_checkpointing = enable


class TokenEmbedding(nn.Module):
    """Learned vectors of tokens and of their positions."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.length, sizes.width))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(
        self, tokens: Tensor, instead: Tensor | None = None, where: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """Return [b, T, w] of tokens [b, T] at positions from `first`; `instead` [w] of them `where` [b, 1, 1]."""
        x = self.token_embedding(tokens)
        if instead is not None and where is not None:
            x = torch.where(where, instead, x)
        return x + self.positional_embedding[first : first + tokens.shape[1]]


def open_clip_sizes(described: Mapping[str, Any]) -> dict[str, int]:
    """Return width, layers and heads of a multimodal_cfg, with open_clip's defaults."""
    return {name: described.get(name, default) for name, default in (("width", 512), ("layers", 12), ("heads", 8))}


def open_clip_decoder(spec: ModelSpec, image_width: int, marks: Marks) -> CoCaDecoder:
    """Return the decoder that a description with multimodal_cfg has, with random weights."""
    assert spec.decoder is not None
    words, length = spec.model["text_cfg"].get("vocab_size", BPE_VOCABULARY), spec.context_length
    return CoCaDecoder(
        DecoderSizes(**open_clip_sizes(spec.decoder), vocabulary=words, length=length, image_width=image_width), marks
    )


def prefix_mask(prefix: Tensor, length: int) -> Tensor:
    """Return what is added to the logits of attention, fp32 [b, length, length]: 0, or -inf where a key is hidden.

    Args:
        prefix: int64 [b], how many first places are seen by all; others see those up to themselves.
    """
    place = torch.arange(length, device=prefix.device)
    seen = (place[None, :] <= place[:, None]) | (place < prefix[:, None, None])
    return torch.zeros(seen.shape, device=prefix.device).masked_fill(~seen, -torch.inf)


def draw_blocks(blocks: list[Any], width: int, layers: int) -> None:
    """Draw the weights of open_clip's blocks as its text tower does."""
    attention, projection = width**-0.5, (width**-0.5) * ((2 * layers) ** -0.5)
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=attention)
        nn.init.normal_(block.attn.out_proj.weight, std=projection)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=projection)


DECODERS: dict[str, type[CoCaDecoder] | type[CapPaDecoder] | type[SimVLMDecoder]] = {
    "coca": CoCaDecoder,
    "cappa": CapPaDecoder,
    "simvlm": SimVLMDecoder,
}
