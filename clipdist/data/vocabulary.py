"""The size of CLIP's vocabulary, for who imports no torch."""

BPE_VOCABULARY = 49408  # CLIP's byte-pair encoding: 512 bytes, 48894 merges, start and end of text
