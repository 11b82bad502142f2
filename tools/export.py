"""Export a model for open_clip, for transformers, or each of its towers as a torch.export program or ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipdist.errors import UserError, require_extra, run_main
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/export.py runs/demo --out demo.safetensors
  python tools/export.py runs/demo --out demo_clip --format hugging_face
  python tools/export.py runs/demo --out demo --format torch_export    # demo.image.pt2, demo.text.pt2
  python tools/export.py runs/demo --out demo --format onnx --dtype int8"""
FORMATS = {  # what each can be rounded to
    "open_clip": ("fp32", "fp16"),
    "hugging_face": ("fp32", "fp16"),
    "torch_export": ("fp32",),
    "onnx": ("fp32", "int8"),
}


def main() -> int:
    args = parse_args()

    if args.dtype not in FORMATS[args.format]:
        raise UserError(
            f"--dtype {args.dtype}: not with --format {args.format}, which has {', '.join(FORMATS[args.format])}"
        )
    if args.format == "onnx":
        require_extra("--format onnx", ("onnx", "onnxruntime", "onnxscript"), "onnx")
    from clipdist.models import export
    from clipdist.models.onnx_export import export_onnx

    loaded = front.load(args, args.run, args.step)
    half = args.dtype == "fp16"
    if args.format == "open_clip":
        written = export.export_model(loaded.model, args.out, {"label": loaded.label, "step": loaded.step}, half)
    elif args.format == "hugging_face":
        written = export.export_hugging_face(loaded.model, args.out, half)
    elif args.format == "onnx":
        written = export_onnx(loaded.model, args.out, int8=args.dtype == "int8")
    else:
        written = export.export_programs(loaded.model, args.out)
    if written.left_out:
        print(f"left out, for CLIPModel has no place for it: {written.left_out} (a constant: no ranking changes)")
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    files = [str(file) for file in written.files]
    print(f"{', '.join(files)}: {loaded.label}, {parameters / 1e6:.1f} M parameters")
    rounded = (
        "" if args.dtype == "fp32" else f" for the rounding to {args.dtype} (lowest cosine {written.error.cosine:.5f})"
    )
    print(f"loaded again, its features differ by at most {written.error.difference:.0e}{rounded}; the same for you:")
    print("\n".join(f"    {line}" for line in written.lines))
    about = {"model": loaded.label, "step": loaded.step, "parameters": parameters}
    record: dict[str, Any] = {"format": args.format, "dtype": args.dtype, **about, "files": files}
    if written.name:
        record |= {"file": files[0], "open_clip_name": written.name}
        for key, path in (("config", written.config), ("merges", written.merges)):
            record[key] = str(path) if path else None
    front.finish(args, record | {"max_difference": written.error.difference, "min_cosine": written.error.cosine})
    return 0


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Writes a model for others, loads it as they will, and compares its features (1e-5, ONNX 1e-4, or a fault).",
        EXAMPLES,
    )
    front.add_model(parser)
    what = "FILE.safetensors; a new folder; or the towers' path without suffix"
    parser.add_argument("--out", required=True, type=Path, help=what)
    parser.add_argument("--format", choices=FORMATS, default="open_clip", help="default: open_clip")
    what = "of the weights; fp16 with open_clip and hugging_face, int8 with onnx (fp32)"
    parser.add_argument("--dtype", choices=("fp32", "fp16", "int8"), default="fp32", help=what)
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
