"""Records of a run: metrics.jsonl, TensorBoard, the progress line, unusable samples, provenance."""
