"""Export a model for open_clip, for transformers, or each of its towers as a torch.export program or ONNX file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, require_extra, run_main
from clipdist.evals import front

if TYPE_CHECKING:
    from clipdist.models.export import Exported
    from clipdist.models.load import LoadedModel

EXAMPLES = """examples:
  python tools/export.py runs/demo --out demo.safetensors
  python tools/export.py runs/demo --out demo_clip --format hugging_face
  python tools/export.py runs/demo --out demo_clip --format open_clip_folder --push-ready me/demo
  python tools/export.py runs/demo --out demo --format torch_export    # demo.image.pt2, demo.text.pt2
  python tools/export.py runs/demo --out demo --format onnx --dtype int8
  python tools/export.py runs/dino --out dino.safetensors --format image_tower    # for timm or open_clip
  python tools/export.py runs/lora --out adapters --format peft        # of a run with model.lora, without the base"""
FORMATS = {  # what each can be rounded to
    "open_clip": ("fp32", "fp16"),
    "open_clip_folder": ("fp32", "fp16"),
    "hugging_face": ("fp32", "fp16"),
    "torch_export": ("fp32",),
    "onnx": ("fp32", "int8"),
    "image_tower": ("fp32", "fp16"),
    "peft": ("fp32",),
    "adapter": ("fp32",),
}
_SQUARES = "for it takes images as squares, whose aspect ratio the model keeps: {}"
LEFT_OUT = {
    "hugging_face": "for CLIPModel has no place for it: {} (a constant: no ranking changes)",
    "peft": "for it is no adapter of this model of transformers: {}",
    **dict.fromkeys(("open_clip", "open_clip_folder", "torch_export", "onnx"), _SQUARES),
}
BOTH_TOWERS = ("open_clip", "open_clip_folder", "hugging_face", "peft")
FOLDERS = ("open_clip_folder", "hugging_face")  # as the hub takes them


def main() -> int:
    args = parse_args()

    _check(args)
    needs_text = (
        f"--format {args.format} (not for image_tower, torch_export, onnx)" if args.format in BOTH_TOWERS else ""
    )
    loaded = front.load(args, args.run, args.step, needs_text)
    written = _write(args, loaded)
    if written.left_out:
        print(f"left out, {LEFT_OUT[args.format].format(written.left_out)}")
    if written.local:
        told = "on another one, copy them along and change the entries"
        print(f"{written.config} names folders of this machine ({', '.join(written.local)}): {told}")
    parameters = written.parameters or sum(parameter.numel() for parameter in loaded.model.parameters())
    files = [str(file) for file in written.files]
    print(f"{', '.join(files)}: {loaded.label}, {parameters / 1e6:.1f} M parameters")
    rounded = (
        "" if args.dtype == "fp32" else f" for the rounding to {args.dtype} (lowest cosine {written.error.cosine:.5f})"
    )
    print(f"loaded again, its features differ by at most {written.error.difference:.0e}{rounded}; the same for you:")
    print("\n".join(f"    {line}" for line in written.lines))
    if args.push_ready:
        print(f"not pushed: read {args.out}/README.md, fill in its licence, then")
        print(f"    hf upload {args.push_ready} {args.out} .")
    about = {"model": loaded.label, "step": loaded.step, "parameters": parameters}
    record: dict[str, Any] = {"format": args.format, "dtype": args.dtype, **about, "files": files}
    if written.name:
        record |= {"file": files[0], "open_clip_name": written.name}
        for key, path in (("config", written.config), ("merges", written.merges)):
            record[key] = str(path) if path else None
    front.finish(args, record | {"max_difference": written.error.difference, "min_cosine": written.error.cosine})
    return 0


def _write(args: argparse.Namespace, loaded: LoadedModel) -> Exported:
    from clipdist.models import adapter_export, export, image_export, program_export, siglip_export
    from clipdist.models.onnx_export import export_onnx
    from clipdist.report.model_card import model_card

    half = args.dtype == "fp16"
    title = args.push_ready.rpartition("/")[2] or args.out.name
    library = "transformers" if args.format == "hugging_face" else "open_clip"
    folder: dict[str, Any] = {
        "half": half,
        "repository": args.push_ready,
        "card": lambda lines: model_card(loaded, title, library, args.dtype, lines),
    }
    match args.format:
        case "open_clip":
            return export.export_model(loaded.model, args.out, {"label": loaded.label, "step": loaded.step}, half)
        case "open_clip_folder":
            return export.export_open_clip_folder(loaded.model, args.out, **folder)
        case "hugging_face" if siglip_export.is_siglip(loaded.model.spec):
            return siglip_export.export_siglip(loaded.model, args.out, **folder)
        case "hugging_face":
            return export.export_hugging_face(loaded.model, args.out, **folder)
        case "image_tower":
            return image_export.export_image_tower(loaded.model, args.out, half)
        case "onnx":
            return export_onnx(loaded.model, args.out, int8=args.dtype == "int8")
        case "peft":
            return adapter_export.export_peft(_checkpoint(args), args.out, args.weights)
        case "adapter":
            return adapter_export.export_adapter(_checkpoint(args), args.out, args.weights)
        case _:
            return program_export.export_programs(loaded.model, args.out)


def _checkpoint(args: argparse.Namespace) -> Path:
    from clipdist.checkpoint.format import checkpoint_of

    if not Path(args.run).is_dir():
        raise UserError(f"{args.run}: --format {args.format} takes a run with adapters (model.lora)")
    return checkpoint_of(Path(args.run), args.step)


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together, and for an extra that is missing."""
    dtypes = FORMATS[args.format]
    if args.dtype not in dtypes:
        raise UserError(f"--dtype {args.dtype}: not with --format {args.format}, which has {', '.join(dtypes)}")
    if args.push_ready and args.format not in FOLDERS:
        raise UserError(f"--push-ready: needs --format {' or '.join(FOLDERS)}; {args.format} writes files")
    if args.push_ready and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.push_ready):
        raise UserError(f"--push-ready {args.push_ready}: must be a name on the hub, USER/NAME")
    if args.format == "onnx":
        require_extra("--format onnx", ("onnx", "onnxruntime", "onnxscript"), "onnx")


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Writes a model for others, loads it as they will, and compares its features (1e-5, ONNX 1e-4, or a fault).",
        EXAMPLES,
    )
    front.add_model(parser)
    what = "FILE.safetensors; a new folder; or the towers' path without suffix"
    parser.add_argument("--out", required=True, type=Path, help=what)
    parser.add_argument("--format", choices=FORMATS, default="open_clip", help="default: open_clip")
    what = "a folder for the hub under this name: its card says so, and the command that uploads it is printed"
    parser.add_argument("--push-ready", default="", metavar="USER/NAME", help=what)
    what = "of the weights; fp16 for open_clip and transformers, int8 for onnx (fp32)"
    parser.add_argument("--dtype", choices=("fp32", "fp16", "int8"), default="fp32", help=what)
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
