"""The training engine: the only room that imports deepspeed."""
