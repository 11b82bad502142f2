"""What a run tells about itself: metrics.jsonl, TensorBoard, the progress line."""
