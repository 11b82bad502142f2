"""The dual encoder: open_clip, timm, transformers and CBOW towers, and their weights."""
