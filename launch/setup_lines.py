"""Escape ${...} in the shell lines of launch.setup, as YAML settings need them."""

from __future__ import annotations

import re
from dataclasses import replace

from clipdist.config import Config


def escape(line: str) -> str:
    r"""Return \${HOME} for ${HOME}, which OmegaConf would take for a reference to one of its own keys."""
    return re.sub(r"(?<!\\)\$\{", r"\\${", line)


def as_written(config: Config) -> Config:
    """Return a configuration that is read back as `config` once it is written as YAML, here or by the trainer."""
    return replace(config, launch=replace(config.launch, setup=[escape(line) for line in config.launch.setup]))
