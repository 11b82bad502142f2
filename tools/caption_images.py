"""Write a caption of every image by a trained decoder, greedily, with its log-probability."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/caption_images.py runs/cappa dog.jpg cat.jpg --out captions.jsonl
  python tools/caption_images.py runs/coca runs/demo-data/shards/test --out captions.jsonl
  python tools/caption_images.py coca_ViT-B-32 photos/*.jpg --weights laion2b_s13b_b90k --out captions.jsonl"""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def main() -> None:
    args = parse_args()
    files = [Path(name) for name in args.sources if name.lower().endswith(IMAGES)]
    shards = [name for name in args.sources if not name.lower().endswith(IMAGES)]
    if files and shards:
        raise UserError(f"{files[0]}, {shards[0]}: name image files or shards, not both")
    if missing := next((path for path in files if not path.is_file()), None):
        raise UserError(f"{missing}: no such file")
    front.require_writable(args.out, "--out")
    catalog = front.open_catalog(args, shards, captions=False) if shards else None

    from clipdist.distributed.rank import resolve_device
    from clipdist.evals.captioner import add_decoder, as_record, caption_catalog, caption_files

    loaded = front.load(args, args.run)
    add_decoder(loaded, args.run, args.ema)
    device, bad = resolve_device(args.device), dict[int, str]()
    loaded.model.to(device)
    if catalog is not None:
        captions = caption_catalog(loaded, catalog, front.share_of_work(args), device, bad)
    else:
        captions = caption_files(loaded, files, args.batch, device)
    total = tokens = number = 0.0
    with writing(f"--out {args.out}", "; name another file"), args.out.open("w", encoding="utf-8") as file:
        for caption in captions:
            file.write(json.dumps(as_record(caption), ensure_ascii=False) + "\n")
            number, total, tokens = number + 1, total + caption.log_probability, tokens + caption.tokens
    for sample_id, reason in [*bad.items()][:3]:
        front.tell(f"left out, sample {sample_id}: {reason}")
    record: dict[str, Any] = {"model": loaded.label, "step": loaded.step, "captions": int(number)}
    record |= {"left_out": len(bad), "nats_per_token": -total / max(1, tokens), "out": str(args.out)}
    line = f"{loaded.label}: {int(number)} captions, {record['nats_per_token']:.3f} nats a token: {args.out}"
    front.finish(args, record, [line], loaded.run_dir, "caption_images")


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Writes captions of images by the decoder of a run with objectives.caption, or of open_clip's CoCa, the most\n"
        'probable token at every place: a line {"key", "caption", "log_probability", "tokens"} for each image.',
        EXAMPLES,
    )
    front.add_model(parser)
    parser.add_argument("sources", metavar="IMAGES|SHARDS", nargs="+", help="image files, or shards")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", required=True, help="the captions")
    front.add_members(parser)
    front.add_work(parser)
    args = parser.parse_args()
    if args.out.suffix.lower() != ".jsonl":
        parser.error(f"--out {args.out}: must end in .jsonl")
    return args


if __name__ == "__main__":
    run_main(main)
