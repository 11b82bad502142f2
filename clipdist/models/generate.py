"""Write captions of images, one token at a time, with the keys and values of earlier tokens kept.

Shapes: b images, n tokens of each, w the decoder's width, d that of a head of attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.errors import UserError
from clipdist.models.caption_decoder import CapPaDecoder, CoCaDecoder, SimVLMDecoder
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.image_tokens import image_tokens


class Captions(NamedTuple):
    """Token ids without the start mark, int64 [b, T], padded behind the end mark; and ln p of each caption, [b]."""

    tokens: Tensor
    log_probability: Tensor


@torch.no_grad()
def generate(model: DualEncoder, images: Tensor) -> Captions:
    """Take the most probable token at every place, until the end mark or the longest text (greedy decoding).

    Args:
        model: in evaluation mode, with a decoder of captions.
        images: uint8 [b, 3, S, S], on the model's device.

    Raises:
        UserError: the model has no decoder of captions.
    """
    decoder = model.decoder
    if decoder is None:
        raise UserError(f"{model.spec.name}: has no decoder of captions; train one by objectives.caption")
    marks, places = decoder.marks, decoder.sizes.length - int(decoder.marks.start is not None)
    image = decoder.image_projection(image_tokens(model.visual, model.pixels(images))[1])
    run: _Text | _Prefix
    if isinstance(decoder, SimVLMDecoder):
        run = _Prefix(decoder, image)
    else:
        assert isinstance(decoder, CoCaDecoder)
        run = _Text(decoder, image, model.text)
    token = torch.full((len(images),), marks.pad if marks.start is None else marks.start, device=image.device)
    done = torch.zeros(len(images), dtype=torch.bool, device=image.device)
    total = torch.zeros(len(images), device=image.device)
    found = []
    for place in range(places):
        logits = (run.step(token, place) @ decoder.text_projection).float().log_softmax(1)
        best, token = logits.max(1)
        total += torch.where(done, 0.0, best)
        token = torch.where(done, marks.pad, token)
        found.append(token)
        done |= token == marks.end
        if bool(done.all()):
            break
    return Captions(torch.stack(found, dim=1), total)


class _Cache:
    """Keys and values of one block's attention, [b, heads, t, d]."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def run(self, block: Any, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Run a block of self-attention on further inputs [b, t, w], which see all so far and one another.

        Args:
            hidden: bool [b, t so far], which of all are not seen.
        """
        attention = block.attn
        q, k, v = (
            _heads(part, attention.num_heads)
            for part in F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        )
        if self.keys is not None and self.values is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        return _finish(block, x, q, k, v, None if hidden is None else ~hidden[:, None, None])

    def look(self, block: Any, x: Tensor, image: Tensor) -> Tensor:
        """Run a block of attention to an image [b, n, w] on inputs [b, t, w]."""
        attention = block.attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        if self.keys is None or self.values is None:
            seen = block.ln_1_kv(image)
            self.keys = _heads(F.linear(seen, weights[1], biases[1]), attention.num_heads)
            self.values = _heads(F.linear(seen, weights[2], biases[2]), attention.num_heads)
        q = _heads(F.linear(block.ln_1(x), weights[0], biases[0]), attention.num_heads)
        return _finish(block, x, q, self.keys, self.values, None)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return [b, heads, t, d] of [b, t, w]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _finish(block: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + block.ls_1(block.attn.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class _Text:
    """CoCa's and CapPa's decoders, the former behind the layers of the text tower."""

    def __init__(self, decoder: CoCaDecoder, image: Tensor, tower: Any) -> None:
        self.decoder, self.image = decoder, image
        self.tower = tower if decoder.reads_text_tower else None
        self.blocks = [
            (block, cross, _Cache(), _Cache()) for block, cross in zip(decoder.resblocks, decoder.cross_attn)
        ]
        self.below = [(block, _Cache()) for block in self.tower.transformer.resblocks] if self.tower else []
        self.hidden = torch.zeros(len(image), 0, dtype=torch.bool, device=image.device)
        self.before = torch.zeros(len(image), dtype=torch.bool, device=image.device)  # whether it was padding

    def step(self, token: Tensor, place: int) -> Tensor:
        """Return what is multiplied with the vocabulary, [b, w], after one more input, int64 [b]."""
        x = self._inputs(token, place)
        for block, cross, own, seen in self.blocks:
            x = seen.look(cross, own.run(block, x), self.image)
        return self.decoder.ln_final(x)[:, 0]

    def _inputs(self, token: Tensor, place: int) -> Tensor:
        if self.tower is None:
            assert isinstance(self.decoder, CapPaDecoder)
            return self.decoder.embedding(token[:, None], first=place)
        tower, hidden = self.tower, None
        x = tower.token_embedding(token[:, None]) + tower.positional_embedding[place : place + 1]
        if tower.cls_emb is not None:  # such a tower hides padding from all, by open_clip a place too late
            padding = token == tower.pad_id
            own = padding if tower.correct_cls_mask else self.before
            hidden = self.hidden = torch.cat([self.hidden, own[:, None]], dim=1)
            self.before = padding
        for block, cache in self.below:
            x = cache.run(block, x, hidden)
        return x if tower.cls_emb is not None else tower.ln_final(x)


class _Prefix:
    """SimVLM's decoder: image and start see one another, what follows sees all before it."""

    def __init__(self, decoder: SimVLMDecoder, image: Tensor) -> None:
        self.decoder, self.image = decoder, image
        self.blocks = [(block, _Cache()) for block in decoder.transformer.resblocks]

    def step(self, token: Tensor, place: int) -> Tensor:
        """Return what is multiplied with the vocabulary, [b, w], after one more input, int64 [b]."""
        x = self.decoder.embedding(token[:, None], first=place)
        if place == 0:
            x = torch.cat([self.image, x], dim=1)
        for block, cache in self.blocks:
            x = cache.run(block, x)
        return self.decoder.ln_final(x[:, -1])
