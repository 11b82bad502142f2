"""What is trained: each objective is a file that can be read beside its paper."""
