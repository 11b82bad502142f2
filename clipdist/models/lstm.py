"""Encode texts by an LSTM that reads their tokens in order (Hochreiter and Schmidhuber, 1997).

It stands between CBOW, which knows no order, and the Transformer: the text towers of image and text models before
attention were such (VSE++, Faghri et al., arXiv:1707.05612).

Shapes: b texts, L tokens of each, N tokens of all texts together, n inputs and w states of a layer, D features.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# cuDNN copies weights that are not one piece of memory. ZeRO lays them out, so nothing can be done about it here.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")


class LSTM(nn.Module):
    """Token embeddings, LSTM layers, and a linear projection of the last layer's last state, without bias.

    The last state of the other direction, if there is one, is that at the first token; both are projected together.
    Tokens are those of CLIP's byte-pair encoding: the highest id ends a text, and what follows is not read.
    """

    def __init__(
        self, width: int, layers: int, bidirectional: bool, vocab_size: int, context_length: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.end = vocab_size - 1
        outputs = width * (1 + bidirectional)
        self.token_embedding = nn.Embedding(vocab_size, width)
        sizes = [width, *[outputs] * (layers - 1)]
        self.layers = nn.ModuleList(LSTMLayer(inputs, width, bidirectional) for inputs in sizes)
        self.proj = nn.Linear(outputs, embed_dim, bias=False)
        self._recompute = False
        nn.init.normal_(self.token_embedding.weight, std=0.1)
        nn.init.normal_(self.proj.weight, std=outputs**-0.5)

    def forward(self, tokens: Tensor, batch_sizes: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Return the features [b, D] in the parameters' dtype.

        Args:
            tokens: int64 [b, L]; or [N], with the other two as clipdist.models.text_length.pack_sequences gives them.
        """
        x = self.token_embedding(tokens)
        last = x
        lengths = None if batch_sizes is not None else self._lengths(tokens)
        for layer in self.layers:
            x, last = self._run(layer, x, batch_sizes, lengths)
        if order is not None:
            last = last[:, order]
        return self.proj(last.transpose(0, 1).flatten(1))

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze all but the last groups: the projection, then layer by layer, the embedding last."""
        groups = [self.proj, *reversed(self.layers), self.token_embedding]
        for number, group in enumerate(groups):
            group.requires_grad_(number < unlocked_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of layers for the backward pass."""
        self._recompute = enable

    def _run(self, layer: nn.Module, *args: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def _lengths(self, tokens: Tensor) -> Tensor:
        """Return how many tokens of a text are read, int64 [b]: up to its end mark, or all without one."""
        found = tokens.eq(self.end)
        return torch.where(found.any(1), found.to(torch.int64).argmax(1) + 1, tokens.shape[1])


class LSTMLayer(nn.Module):
    """One layer of an LSTM, in one direction or both.

    Its parameters are those of nn.LSTM: ih_weight [4 w, n], hh_weight [4 w, w], ih_bias and hh_bias [4 w], with the
    gates input, forget, cell and output below one another; those of the other direction begin with "reverse_".
    Weights start as torch's do. The forget gate's bias starts at 1 (Jozefowicz et al., ICML 2015).
    """

    def __init__(self, inputs: int, width: int, bidirectional: bool) -> None:
        super().__init__()
        self.width = width
        self.prefixes = ("", "reverse_") if bidirectional else ("",)
        shapes: dict[str, tuple[int, ...]] = {
            "ih_weight": (4 * width, inputs),
            "hh_weight": (4 * width, width),
            "ih_bias": (4 * width,),
            "hh_bias": (4 * width,),
        }
        for prefix in self.prefixes:
            for name, shape in shapes.items():
                bound = width**-0.5
                drawn = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                self.register_parameter(prefix + name, drawn)
            with torch.no_grad():
                for name, value in (("ih_bias", 1.0), ("hh_bias", 0.0)):
                    getattr(self, prefix + name)[width : 2 * width] = value

    def forward(
        self, x: Tensor, batch_sizes: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the states of all tokens, shaped as `x`, and the last ones, [directions, b, w].

        Args:
            x: [N, n] of a PackedSequence, with its batch_sizes, int64 on the CPU; or [b, L, n], with lengths.
            lengths: int64 [b].
        """
        if batch_sizes is None:
            assert lengths is not None
            return self._padded(x, lengths)
        weights = [weight for prefix in self.prefixes for weight in self._weights(prefix)]
        zeros = x.new_zeros(len(self.prefixes), int(batch_sizes[0]), self.width)
        both = len(self.prefixes) == 2
        states, last, _ = torch.lstm(x, batch_sizes, (zeros, zeros), weights, True, 1, 0.0, self.training, both)
        return states, last

    def _weights(self, prefix: str) -> tuple[Tensor, ...]:
        names = ("ih_weight", "hh_weight", "ih_bias", "hh_bias")
        return tuple(getattr(self, prefix + name) for name in names)

    def _padded(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for texts that are padded: no length is read, so that it runs on shapes and is exported."""
        states = self._steps(x, "")
        last = [_taken(states, (lengths - 1).unsqueeze(1)).squeeze(1)]
        if len(self.prefixes) == 2:
            backwards = (lengths.unsqueeze(1) - 1 - torch.arange(x.shape[1], device=x.device)).clamp(min=0)
            reverse = self._steps(_taken(x, backwards), "reverse_")
            reverse = _taken(reverse, backwards)
            last.append(reverse[:, 0])
            states = torch.cat([states, reverse], dim=2)
        return states, torch.stack(last)

    def _steps(self, x: Tensor, prefix: str) -> Tensor:
        """Return the states [b, L, w] of one direction, from zeros."""
        ih_weight, hh_weight, ih_bias, hh_bias = self._weights(prefix)
        hidden = cell = x.new_zeros(x.shape[0], self.width)  # len() would fix the size of an exported batch
        states = []
        for inputs in F.linear(x, ih_weight, ih_bias).unbind(1):
            gates: Any = (inputs + F.linear(hidden, hh_weight, hh_bias)).chunk(4, dim=1)
            enter, keep, new, out = gates
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            states.append(hidden)
        return torch.stack(states, dim=1)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Return [b, m, n] of x [b, L, n] at places, int64 [b, m]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[2]))
