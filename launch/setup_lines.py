"""In: shell lines of launch.setup, which may hold ${...}. Out: the same, as a YAML setting has to have them."""

from __future__ import annotations

import re
from dataclasses import replace

from clipdist.config import Config


def escape(line: str) -> str:
    r"""OmegaConf takes ${HOME} for a reference to one of its own keys, and \${HOME} for ${HOME}."""
    return re.sub(r"(?<!\\)\$\{", r"\\${", line)


def as_written(config: Config) -> Config:
    """A configuration that is to be written as YAML, here or by the trainer: read again, the file says `config`."""
    return replace(config, launch=replace(config.launch, setup=[escape(line) for line in config.launch.setup]))
