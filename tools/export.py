"""A run or checkpoint in, a .safetensors file that open_clip loads out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clipdist.errors import run_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Writes a trained model as open_clip.create_model_and_transforms(name, pretrained=FILE) loads it.",
        epilog="example:\n  python tools/export.py runs/demo --out demo.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (its newest checkpoint) or a checkpoint folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()

    from clipdist.model.export import export_model
    from clipdist.model.load import load_model

    loaded = load_model(args.run, step=args.step)
    export = export_model(loaded.model, args.out, {"label": loaded.label, "step": loaded.step})
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(f"{export.file}: {loaded.label}, {parameters / 1e6:.1f} M parameters")
    print(f"loaded with open_clip, its features differ by at most {export.max_difference:.0e}; the same for you:")
    print("\n".join(f"    {line}" for line in export.lines()))
    if args.json:
        record = {
            "file": str(export.file),
            "open_clip_name": export.name,
            "config": str(export.config) if export.config else None,
            "merges": str(export.merges) if export.merges else None,
            "step": loaded.step,
            "parameters": parameters,
            "max_difference": export.max_difference,
        }
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    run_main(main)
