"""Export each tower of a model as a torch.export program, which other exports start from; see onnx_export.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from clipdist import config
from clipdist.errors import UserError, brief
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import TOLERANCE, Exported, FeatureError, compare, kept_aspect, sample_inputs
from clipdist.models.spec import ModelSpec

# What is loaded of one tower: its inputs -> features [b, D]
Tower = Callable[[torch.Tensor], torch.Tensor]


class _ImageTower(nn.Module):
    """The image half of a DualEncoder, the pixels' normalisation included, without the text tower's weights."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.encoder = DualEncoder(model.spec, model.visual, None, config.Clip())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode_image(image)


def export_programs(model: DualEncoder, out: Path) -> Exported:
    """Write OUT.image.pt2 and, of a model with a text tower, OUT.text.pt2, each with one tower's weights.

    The batch is of any size.

    The image program takes pixels as decoded, uint8 [b, 3, S, S], and normalises them itself; the text program takes
    token ids, int64 [b, L]. Both return features as the projections give them, fp32 [b, D].

    Args:
        model: fp32, on the CPU, in evaluation mode; any towers that torch.export can trace.

    Raises:
        UserError: a tower that torch.export cannot trace, a folder in the way, or one that cannot be written.
        RuntimeError: the programs' features differ from the model's by more than 1e-5.
    """

    def write(program: torch.export.ExportedProgram, tower: str, file: Path) -> None:
        program._example_inputs = None  # they would be pickled into the file; nothing else is
        torch.export.save(program, file)

    def load(file: Path, tower: str) -> Tower:
        return torch.export.load(file).module()

    files, error = export_towers(model, out, "pt2", write, load, TOLERANCE)
    takes = {"image": "uint8 [b, 3, S, S], 0 to 255", "text": "int64 [b, L]"}
    lines = [
        f'encode_{name} = torch.export.load("{file}").module()  # {takes[name]}'
        for name, file in zip(map(model.part_of, model.towers), files)
    ]
    return Exported(files, ("import torch", *lines), error, left_out=kept_aspect(model.spec))


def export_towers(
    model: DualEncoder,
    out: Path,
    suffix: str,
    write: Callable[[torch.export.ExportedProgram, str, Path], None],
    load: Callable[[Path, str], Tower],
    tolerance: float,
) -> tuple[tuple[Path, ...], FeatureError]:
    """Trace the towers, write OUT.image.SUFFIX and OUT.text.SUFFIX, load them again and compare.

    They are written elsewhere and renamed last, with any further file that `write` puts beside them.

    Args:
        write: writes a program, the tower's name ("image", "text") given, to a file.
        load: reads it.

    Returns:
        The files, the image tower's first, and what `compare` gives.

    Raises:
        UserError: a tower that torch.export cannot trace, a folder in the way, or one that cannot be written.
        RuntimeError: see compare.
    """
    towers = {model.part_of(name): tower for name, tower in model.towers.items()} | {"image": _ImageTower(model).eval()}
    targets = tuple(out.with_name(f"{out.name}.{name}.{suffix}") for name in towers)
    for target in targets:
        if target.is_dir():
            raise UserError(f"--out {out}: {target} is a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
            files = [Path(scratch) / target.name for target in targets]
            for (name, tower), example, file in zip(towers.items(), sample_inputs(model), files):
                write(_trace(model.spec, tower, example), name, file)
            loaded = [load(file, name) for file, name in zip(files, towers)]

            def encode(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(tower(given) for tower, given in zip(loaded, inputs))

            error = compare(model, encode, str(out), tolerance)
            further = sorted(set(Path(scratch).iterdir()) - set(files))
            for file in (*further, *files):
                os.replace(file, out.with_name(file.name))
    except OSError as reason:
        raise UserError(f"--out {out}: cannot be written: {reason.strerror or reason}") from None
    return (*targets, *(out.with_name(file.name) for file in further)), error


@torch.no_grad()
def _trace(spec: ModelSpec, tower: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(tower, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # its compiler raises many kinds, all of them about this tower's code
        raise UserError(
            f"{spec.name}: torch.export cannot trace its {type(tower).__name__}: {brief(error)};"
            " take --format open_clip"
        ) from error
