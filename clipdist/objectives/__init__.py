"""Training objectives, one file each, following its paper."""
