"""clipdist: distributed training of dual encoders (CLIP) with the exact global contrastive batch."""

__version__ = "0.1.0"
