"""From shards to batches: catalog, order, reader, decode, augment, tokens, loader."""
