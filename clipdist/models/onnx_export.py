"""Export both towers as ONNX files, which onnxruntime runs without torch, in fp32 or with weights of 8 bits."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import Exported, kept_aspect
from clipdist.models.program_export import Tower, export_towers

TOLERANCE = 1e-4  # of normalised features in fp32
LARGEST_BYTES = 1_800_000_000  # of weights in one file: protobuf ends at 2 GiB
QUANTISED = ["MatMul", "Gemm", "Gather"]  # Gather is the token embedding; convolutions stay fp32


def export_onnx(model: DualEncoder, out: Path, int8: bool = False) -> Exported:
    """Write OUT.image.onnx and, of a model with a text tower, OUT.text.onnx, each with one tower's weights.

    The batch is of any size. The image tower takes "image", uint8 [b, 3, S, S], 0 to 255, and normalises it itself; the
    text tower takes "text", int64 [b, L]. Both give "features", fp32 [b, D], not scaled to unit length. A tower above
    1.8 GB has its weights in OUT.TOWER.onnx.data beside it.

    Needs the extra `onnx`.

    Args:
        model: fp32, on the CPU, in evaluation mode; any towers that torch.export can trace.
        int8: dynamic quantisation by onnxruntime: weights of linear layers (by output channel) and embeddings are
            int8, activations are rounded to 8 bits as they come.

    Raises:
        UserError: see export_towers.
        RuntimeError: onnxruntime's features differ from the model's by more than 1e-4; with int8, are not finite.
    """

    def write(program: torch.export.ExportedProgram, tower: str, file: Path) -> None:
        large = sum(value.nbytes for value in program.state_dict.values()) > LARGEST_BYTES
        found = torch.onnx.export(program, input_names=[tower], output_names=["features"], verbose=False)
        assert found is not None
        for node in found.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, which name files of this machine
        with TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch) / file.name if int8 else file
            found.save(whole, external_data=large)
            if int8:
                _quantise(whole, file, large)

    files, error = export_towers(model, out, "onnx", write, _session, math.inf if int8 else TOLERANCE)
    lines = ["import onnxruntime"]
    takes = {"image": "uint8 [b, 3, S, S]", "text": "int64 [b, L]"}
    for name, file in zip(map(model.part_of, model.towers), files):
        lines.append(f'{name}_tower = onnxruntime.InferenceSession("{file}")')
        run = f'{name}_tower.run(None, {{"{name}": {name}}})[0]'
        lines.append(f"encode_{name} = lambda {name}: {run}  # numpy, {takes[name]}")
    return Exported(files, tuple(lines), error, left_out=kept_aspect(model.spec))


def _quantise(whole: Path, file: Path, large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8, "use_external_data_format": large}
    logging.disable(logging.WARNING)  # it asks for a preparation that the exporter has done
    try:
        quantize_dynamic(whole, file, op_types_to_quantize=QUANTISED, **kept)
    finally:
        logging.disable(logging.NOTSET)


def _session(file: Path, tower: str) -> Tower:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {tower: inputs.numpy()})[0])
