"""clipdist: distributed training of dual encoders (CLIP) with the exact global contrastive batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipdist.data.tokens import Tokenizer
    from clipdist.models.dual_encoder import DualEncoder
    from clipdist.models.load import Preprocess

__version__ = "0.1.0"


def load(
    source: str,
    weights: str = "",
    *,
    trust_weights: bool = False,
    device: str = "cpu",
    step: int | None = None,
    ema: bool = False,
) -> tuple[DualEncoder, Preprocess, Tokenizer]:
    """Return a model in evaluation mode, fp32, with what prepares images and texts for it.

    `model.encode_image` takes a stack of what `preprocess` gives, uint8 [b, 3, S, S] or patches, and
    `model.encode_text` what `tokenizer` gives, int64 [b, L]. Both return features [b, D] that are not scaled to unit
    length. A model without a text tower has `model.text` None, and its tokenizer gives no ids, int64 [b, 0].

    Args:
        source: a run, a checkpoint, a Hugging Face CLIP folder, an open_clip name or a model JSON.
        weights: for a name or JSON: an open_clip tag, or a file.
        trust_weights: run a TorchScript file that is not OpenAI's.
        step: of a run, the checkpoint of this step instead of the newest.
        ema: of a run with train.ema, the moving average of its weights.

    Raises:
        clipdist.errors.UserError: there is no such model, or it has no weights.
    """
    from clipdist.models.load import load_model  # imports torch

    loaded = load_model(source, weights, trust_weights, device, step=step, ema=ema)
    return loaded.model, loaded.preprocess, loaded.tokenizer
