"""Train a model by DeepSpeed; the only package that imports it."""
