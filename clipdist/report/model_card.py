"""Write a model card: what the Hugging Face hub shows of a folder, as far as the run's records tell it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from clipdist import __version__
from clipdist.config import Config
from clipdist.errors import UserError
from clipdist.models.load import LoadedModel
from clipdist.monitor.provenance import without_secrets
from clipdist.objectives.describe import describe
from clipdist.objectives.make import make_objectives
from clipdist.report.history import Record, RunHistory, read_runs
from clipdist.report.words import label_of, labelled_text

LICENCE = "To be filled in: it depends on the training data and on the weights that training started from."


def model_card(loaded: LoadedModel, title: str, library: str, dtype: str, lines: Sequence[str]) -> str:
    """Return README.md: use, model, training data, metrics that the run measured, and a licence to fill in.

    Args:
        library: as the hub names it, "transformers" or "open_clip".
        dtype: of the weights.
        lines: of Python that load the model.
    """
    run = _history(loaded)
    config = run.config if run else None
    parts = (
        ["---", f"library_name: {library}", "pipeline_tag: zero-shot-image-classification", "tags:", "- clip"],
        ["# license: fill in, such as mit or cc-by-4.0, and take the # away", "---", ""],
        [
            f"# {title}",
            "",
            f"A dual encoder of images and text ({loaded.label}), written by clipdist {__version__}.",
            "",
        ],
        ["## Use", "", "```python", *lines, "```", ""],
        ["## Model", "", *_table(_facts(loaded, dtype)), ""],
        ["## Training", "", *_training(loaded, config), ""],
        ["## Metrics", "", *_metrics(loaded, run, config), ""],
        ["## Licence", "", LICENCE, ""],
    )
    return "\n".join(line for part in parts for line in part)


def _history(loaded: LoadedModel) -> RunHistory | None:
    """Return the run's records; None for a model that is not from a run, or whose run has none."""
    try:
        return read_runs([loaded.run_dir])[0] if loaded.run_dir else None
    except UserError:
        return None


def _facts(loaded: LoadedModel, dtype: str) -> list[tuple[str, str]]:
    spec = loaded.model.spec
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return [
        ("architecture", _public(spec.name)),
        ("parameters", f"{parameters / 1e6:.1f} M, {dtype}"),
        ("images", str(spec.transform) if spec.patch_budget else f"{spec.image_size} x {spec.image_size} pixels"),
        ("texts", f"{spec.context_length} tokens of a vocabulary of {loaded.tokenizer.vocab_size:,}"),
        ("features", f"{spec.embed_dim}"),
    ]


def _training(loaded: LoadedModel, config: Config | None) -> list[str]:
    if config is None:
        return ["Not known to the tool that wrote this: the model came without the records of a training run."]
    data = [
        f"- {_public(source)}" + (f", weight {weight:g}" if weight else "")
        for source, weight in zip_longest(config.data.train, config.data.weights)
    ]
    start = (
        f"`{_public(config.model.weights)}`"
        if config.model.weights
        else "what the model's description names, else weights as drawn"
    )
    batch = config.train.global_batch
    rows = "pairs" if config.objectives.read_text else "images"
    seen = f", {loaded.step * batch:,} {rows} seen" if loaded.step else ""
    objectives = make_objectives(config.objectives, loaded.model.spec.image_size)
    told = (describe(objective).removeprefix("objectives.").partition(": ") for objective in objectives)
    loss = f"{config.objectives.clip.loss}, " if config.objectives.clip else ""
    settings = [
        ("started from", start),
        *((f"objective `{name}`", (loss if name == "clip" else "") + words) for name, _, words in told),
        ("steps", f"{loaded.step:,} of {batch:,} {rows}{seen}"),
        ("peak learning rate", f"{config.optim.lr:g}"),
    ]
    return ["Training data, as the run's configuration names it:", "", *data, "", *_table(settings)]


def _metrics(loaded: LoadedModel, run: RunHistory | None, config: Config | None) -> list[str]:
    records = [record for record in run.of_type("val") if record["step"] <= (loaded.step or 0)] if run else []
    if not records:
        return ["The run measured none."]
    record: Record = records[-1]
    sources = [
        *(config.data.val if config else ()),
        *([config.eval.labelled] if config and config.eval.labelled else ()),
    ]
    on = f" on {', '.join(map(_public, sources))}" if sources else ""
    skipped = {"type", "step", "samples", "time"}
    rows = [(label_of(name), value) for name, value in record.items() if name not in skipped and value is not None]
    return [
        f"Measured by the run at step {record['step']:,}{on}:",
        "",
        *_table([(label, labelled_text(label, value)) for label, value in rows]),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _public(name: str) -> str:
    """Return a name without what concerns this machine or its owner: leading folders, and secrets of an address."""
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else without_secrets(name)
