"""A run or model in; a file for open_clip, a folder for transformers, or torch.export programs of both towers out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import run_main

if TYPE_CHECKING:
    from clipdist.models.load import LoadedModel

EXAMPLES = """examples:
  python tools/export.py runs/demo --out demo.safetensors
  python tools/export.py runs/demo --out demo_clip --format hugging_face
  python tools/export.py runs/demo --out demo --format torch_export    # demo.image.pt2, demo.text.pt2"""


def main() -> int:
    args = parse_args()

    from clipdist.models.load import load_model

    loaded = load_model(args.run, weights=args.weights, trust_weights=args.trust_weights, step=args.step)
    write = {"open_clip": to_open_clip, "hugging_face": to_hugging_face, "torch_export": to_programs}[args.format]
    lines, facts = write(loaded, args.out)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    difference = facts["max_difference"]
    print(f"{', '.join(facts['files'])}: {loaded.label}, {parameters / 1e6:.1f} M parameters")
    print(f"loaded again, its features differ by at most {difference:.0e}; the same for you:")
    print("\n".join(f"    {line}" for line in lines))
    if args.json:
        about = {"format": args.format, "model": loaded.label, "step": loaded.step, "parameters": parameters}
        print(json.dumps({**about, **facts}))
    return 0


def to_open_clip(loaded: LoadedModel, out: Path) -> tuple[list[str], dict[str, Any]]:
    from clipdist.models.export import export_model

    export = export_model(loaded.model, out, {"label": loaded.label, "step": loaded.step})
    beside = {key: str(path) if path else None for key, path in (("config", export.config), ("merges", export.merges))}
    files = [str(export.file), *(path for path in beside.values() if path)]
    name = {"file": str(export.file), "open_clip_name": export.name}
    return export.lines(), {"files": files, **name, **beside, "max_difference": export.max_difference}


def to_hugging_face(loaded: LoadedModel, out: Path) -> tuple[list[str], dict[str, Any]]:
    from clipdist.models.export import export_hugging_face

    export = export_hugging_face(loaded.model, out)
    if export.left_out:
        print(f"left out, for CLIPModel has no place for it: {export.left_out} (a constant: no ranking changes)")
    return export.lines(), {"files": [str(export.folder)], "max_difference": export.max_difference}


def to_programs(loaded: LoadedModel, out: Path) -> tuple[list[str], dict[str, Any]]:
    from clipdist.models.export import export_programs

    export = export_programs(loaded.model, out)
    return export.lines(), {"files": [str(export.image), str(export.text)], "max_difference": export.max_difference}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Writes a model for others, loads it as they will, and compares its features (1e-5 or a fault).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", metavar="RUN", help="run, checkpoint or Hugging Face CLIP folder, or an open_clip name with --weights"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="FILE.safetensors; a new folder; or the programs' path without suffix"
    )
    parser.add_argument(
        "--format",
        choices=("open_clip", "hugging_face", "torch_export"),
        default="open_clip",
        help="default: open_clip",
    )
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
