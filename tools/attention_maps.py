"""Draw where an image tower looks: the class token's attention in the last block, head by head, for some images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/attention_maps.py runs/dino dog.jpg cat.jpg
  python tools/attention_maps.py ViT-B-16 photos/*.jpg --weights openai --out maps.png"""
MOST = 100  # images on one sheet


def main() -> None:
    args = parse_args()
    if len(args.images) > MOST:
        raise UserError(f"IMAGES: {len(args.images)}; one sheet has room for {MOST}")
    if missing := next((path for path in args.images if not path.is_file()), None):
        raise UserError(f"{missing}: no such file")
    front.require_writable(args.out, "--out")

    from clipdist.distributed.rank import resolve_device
    from clipdist.evals.attention import attention_maps, map_row, require_attention
    from clipdist.evals.sheet import contact_sheet

    loaded = front.load(args, args.run)
    require_attention(loaded.model)
    pixels = [loaded.preprocess(path) for path in args.images]
    device = resolve_device(args.device)
    model = loaded.model.to(device)
    rows, heads = [], 0
    for path, image in zip(args.images, pixels):
        maps = attention_maps(model, image[None].to(device))[0]
        heads = len(maps)
        rows.append(map_row(path.name, image, maps))
    out = args.out or (loaded.run_dir or Path()) / "results" / "attention_maps.png"
    with writing(f"--out {out}", "; name another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows).save(out, "PNG")
    record: dict[str, Any] = {"model": loaded.label, "step": loaded.step, "images": [str(path) for path in args.images]}
    record |= {"heads": heads, "grid": list(maps.shape[1:]), "sheet": str(out)}
    patches = " x ".join(str(side) for side in maps.shape[1:])
    lines = [f"{loaded.label}: {len(rows)} images, {heads} heads, {patches} patches: {out}"]
    front.finish(args, record, lines, loaded.run_dir, "attention_maps")


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Draws how much attention the class token of a ViT gives to each patch in the last block, a map for each\n"
        "head, as DINO publishes it. A map is scaled to its own highest value.",
        EXAMPLES,
    )
    front.add_model(parser)
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path, help="files")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the sheet (RUN/results/attention_maps.png)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    if args.out and args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: must end in .png")
    return args


if __name__ == "__main__":
    run_main(main)
