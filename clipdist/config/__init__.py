"""Define, load and check the configuration of a run. Imports no torch."""

from clipdist.config.load import flat, load_config, saved_config, to_dict, to_yaml
from clipdist.config.schema import (
    DEFAULT_RECIPE,
    REPOSITORY,
    SNAPSHOT,
    Clip,
    Config,
    Data,
    Engine,
    Eval,
    Guard,
    Launch,
    Model,
    Objectives,
    Optim,
    Run,
    Train,
)

__all__ = [
    "DEFAULT_RECIPE",
    "REPOSITORY",
    "SNAPSHOT",
    "Clip",
    "Config",
    "Data",
    "Engine",
    "Eval",
    "Guard",
    "Launch",
    "Model",
    "Objectives",
    "Optim",
    "Run",
    "Train",
    "flat",
    "load_config",
    "saved_config",
    "to_dict",
    "to_yaml",
]
