"""The dual encoder: open_clip, timm, transformers, CBOW and LSTM towers, and their weights."""
