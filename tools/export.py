"""Export a model for open_clip, for transformers, or as torch.export programs of both towers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipdist.errors import run_main
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/export.py runs/demo --out demo.safetensors
  python tools/export.py runs/demo --out demo_clip --format hugging_face
  python tools/export.py runs/demo --out demo --format torch_export    # demo.image.pt2, demo.text.pt2"""
FORMATS = ("open_clip", "hugging_face", "torch_export")


def main() -> int:
    args = parse_args()

    from clipdist.models import export

    loaded = front.load(args, args.run, args.step)
    if args.format == "open_clip":
        written = export.export_model(loaded.model, args.out, {"label": loaded.label, "step": loaded.step})
    elif args.format == "hugging_face":
        written = export.export_hugging_face(loaded.model, args.out)
    else:
        written = export.export_programs(loaded.model, args.out)
    if written.left_out:
        print(f"left out, for CLIPModel has no place for it: {written.left_out} (a constant: no ranking changes)")
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    files = [str(file) for file in written.files]
    print(f"{', '.join(files)}: {loaded.label}, {parameters / 1e6:.1f} M parameters")
    print(f"loaded again, its features differ by at most {written.max_difference:.0e}; the same for you:")
    print("\n".join(f"    {line}" for line in written.lines))
    about = {"model": loaded.label, "step": loaded.step, "parameters": parameters}
    record: dict[str, Any] = {"format": args.format, **about, "files": files}
    if written.name:
        record |= {"file": files[0], "open_clip_name": written.name}
        for key, path in (("config", written.config), ("merges", written.merges)):
            record[key] = str(path) if path else None
    front.finish(args, record | {"max_difference": written.max_difference})
    return 0


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Writes a model for others, loads it as they will, and compares its features (1e-5 or a fault).", EXAMPLES
    )
    front.add_model(parser)
    what = "FILE.safetensors; a new folder; or the programs' path without suffix"
    parser.add_argument("--out", required=True, type=Path, help=what)
    parser.add_argument("--format", choices=FORMATS, default="open_clip", help="default: open_clip")
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
