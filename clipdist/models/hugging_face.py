"""Read a Hugging Face folder of CLIP or SigLIP: its description in open_clip's form, its tensors under our names.

CLIP's tensors go back as well. CLIPModel is one architecture: a ViT with a class token, a causal text Transformer, one
linear projection on each. SigLIP's is in siglip.py.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, brief
from clipdist.models import siglip
from clipdist.models.open_clip_files import check_channels, mlp_ratio, read_json

if TYPE_CHECKING:  # a model's description is read where torch is not imported
    import torch

DEFAULT_EPS = 1e-5  # of LayerNorm, in open_clip as in CLIPModel
ARGMAX_EOS = 2  # this eos_token_id makes CLIPModel read the text where the highest id stands, as early folders need it
_MARKS = ("<|startoftext|>", "<|endoftext|>")
KINDS = {"clip": "CLIPConfig", "siglip": "SiglipConfig"}  # model_type -> transformers' configuration
_SIGLIP_PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # hidden_act -> ModelSpec.quick_gelu

# Fields of CLIPConfig's sections and of open_clip's that say the same.
FIELDS = {
    "vision": {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_size": "width",
        "num_hidden_layers": "layers",
    },
    "text": {
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    },
}

# Parts of tensor names, CLIPModel's and ours; each pair is unambiguous in both directions.
_NAMES = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "text.token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.encoder.layers.", "text.transformer.resblocks."),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("text_projection.weight", "text.text_projection"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_TRANSPOSED = ("visual.proj", "text.text_projection")  # Linear keeps [out, in], open_clip multiplies by [in, out]


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is one as transformers writes it."""
    return (folder / "config.json").is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """Return a folder's model in open_clip's form, with quick_gelu and image_*.

    CLIP's tokenizer is CLIP's byte-pair encoding where the folder's vocabulary is exactly that, else the folder's own.

    Raises:
        UserError: another architecture, values that our towers cannot have, or no tokenizer.
    """
    cfg = read_config(folder)
    pixels = _pixels(folder, cfg["model_type"], cfg["vision_config"]["image_size"])
    pixels = {f"image_{key}": value for key, value in pixels.items()}
    if cfg["model_type"] == "siglip":
        if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer.model")):
            raise UserError(f"{folder}: no tokenizer in it (spiece.model or tokenizer.json, and tokenizer_config.json)")
        return siglip.describe(f"{folder}/config.json", cfg, str(folder.resolve())) | pixels
    described: dict[str, Any] = {"embed_dim": cfg["projection_dim"], "quick_gelu": _quick_gelu(folder, cfg)}
    for part, fields in FIELDS.items():
        theirs = cfg[f"{part}_config"]
        ours = {own: theirs[key] for key, own in fields.items()}
        ours["mlp_ratio"] = mlp_ratio(theirs["hidden_size"], theirs["intermediate_size"])
        if theirs["layer_norm_eps"] != DEFAULT_EPS:
            ours["norm_kwargs"] = {"eps": theirs["layer_norm_eps"]}
        described[f"{part}_cfg"] = ours
    vision, text = cfg["vision_config"], cfg["text_config"]
    described["vision_cfg"]["head_width"] = vision["hidden_size"] // vision["num_attention_heads"]
    if text["eos_token_id"] not in (ARGMAX_EOS, end_mark(text["vocab_size"])):
        described["text_cfg"] |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    if _read_vocabulary(folder) != clip_encoding(text["vocab_size"])[0]:
        described["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
        described["custom_text"] = True
    return described | pixels


def weights_facts(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its weights: "quick_gelu", "image_size" and PIXEL_FACTS.

    Raises:
        UserError: another architecture, or a processor that does what cannot be done here.
    """
    cfg = read_config(folder)
    size = cfg["vision_config"]["image_size"]
    activation = {"quick_gelu": _quick_gelu(folder, cfg)} if cfg["model_type"] == "clip" else {}
    return {**_pixels(folder, cfg["model_type"], size), **activation, "image_size": size}


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's tensors, safetensors before pickled ones.

    Raises:
        UserError: there are none, or an index that names others than files of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            mapped = read_json(index).get("weight_map")
            parts = sorted(set(mapped.values())) if isinstance(mapped, dict) and mapped else []
            if not parts or any(Path(part).name != part for part in parts):
                raise UserError(f"{index}: does not name this folder's weight files")
            if lost := [part for part in parts if not (folder / part).is_file()]:
                raise UserError(f"{folder}: {lost[0]}, which {index.name} names, is missing ({len(lost)} are)")
            return [folder / part for part in parts]
    raise UserError(f"{folder}: no weights in it (model.safetensors, or several with model.safetensors.index.json)")


def to_ours(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename CLIPModel's or SiglipModel's tensors to ours; what has no counterpart keeps its name."""
    import torch

    if "vision_model.head.probe" in tensors:
        return siglip.to_ours(tensors)
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(".position_ids"):  # a buffer 0, 1, 2 ... that early transformers wrote
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = value.T.contiguous() if name in _TRANSPOSED and value.ndim == 2 else value
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in renamed for part in parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".q_proj.", ".in_proj_")] = joined
    return renamed


def to_theirs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our tensors to CLIPModel's: projections as Linear's, queries, keys and values apart, a 0-D log scale."""
    renamed: dict[str, torch.Tensor] = {}
    for ours, value in tensors.items():
        if ours in _TRANSPOSED:
            value = value.T
        name = ours
        for theirs, own in _NAMES:
            name = name.replace(own, theirs)
        if ".self_attn.in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3)):
                renamed[name.replace(".in_proj_", f".{letter}_proj.")] = part.clone()
        elif name != "logit_bias":  # a constant, for which CLIPModel has no place
            renamed[name] = value.reshape([]) if name == "logit_scale" else value.contiguous()
    return renamed


def clip_encoding(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ids by token and the merges of CLIP's byte-pair encoding, or of the prefix of it that a vocabulary has."""
    import open_clip

    from clipdist.data.tokens import truncated_merges
    from clipdist.data.vocabulary import BPE_VOCABULARY

    if vocab_size < 515:  # too small for the bytes: no such encoding
        return {}, []
    lines = gzip.decompress(truncated_merges(min(vocab_size, BPE_VOCABULARY))).decode("utf-8").split("\n")[1:]
    merges = [(first, second) for first, second in (line.split() for line in lines if line)]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), *_MARKS]
    return {token: number for number, token in enumerate(tokens)}, merges


def end_mark(vocab_size: int) -> int:
    from clipdist.data.vocabulary import BPE_VOCABULARY

    return min(vocab_size, BPE_VOCABULARY) - 1


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json with all defaults filled in, checked for what any of our towers can be."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # SigLIP's own folders name marks outside of their vocabulary
    found = read_json(folder / "config.json")
    kind = found.get("model_type")
    if kind == "siglip2":
        raise UserError(
            f"{folder}: SigLIP 2 with patches of a variable number (NaFlex) is not read; take its weights of a fixed"
            " resolution, such as google/siglip2-base-patch16-224, whose model_type is siglip"
        )
    if kind not in KINDS:
        raise UserError(
            f"{folder}: holds Hugging Face's {kind or 'unnamed'} architecture; only {' and '.join(KINDS)} are read"
        )
    try:
        cfg = getattr(transformers, KINDS[kind]).from_dict(found).to_dict()
    except Exception as error:  # transformers' own checks raise several kinds
        raise UserError(f"{folder}/config.json: not a configuration of {kind}: {brief(error)}") from None
    for section in ("vision_config", "text_config"):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(cfg[section][key], int) or cfg[section][key] < 1:
                raise UserError(f"{folder}/config.json: {section}.{key} is {cfg[section][key]}")
    if cfg["vision_config"]["num_channels"] != 3:
        raise UserError(f"{folder}/config.json: pictures of {cfg['vision_config']['num_channels']} channels, not 3")
    return cfg


def _quick_gelu(folder: Path, cfg: dict[str, Any]) -> bool:
    names = [cfg[section]["hidden_act"] for section in ("vision_config", "text_config")]
    if names[0] != names[1] or names[0] not in _ACTIVATIONS:
        raise UserError(
            f"{folder}/config.json: hidden_act is {names[0]} of the pictures, {names[1]} of the text; both must be"
            f" {' or both '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[names[0]]


def _pixels(folder: Path, kind: str, size: int) -> dict[str, Any]:
    """Return PIXEL_FACTS as the folder's image processor has them; the kind's own where it does not say.

    Raises:
        UserError: a processor whose images are no squares of `size` pixels, or that does what EvalTransform cannot.
    """
    path = folder / "preprocessor_config.json"
    said = read_json(path) if path.is_file() else {}
    if not said and (folder / "processor_config.json").is_file():  # since transformers 5, with the tokenizer's part
        path = folder / "processor_config.json"
        said = read_json(path).get("image_processor") or {}
    facts: dict[str, Any] = dict(_SIGLIP_PIXELS) if kind == "siglip" else {}
    for key in ("image_mean", "image_std"):
        if (values := said.get(key)) is not None:
            check_channels(f"{path}: {key}", values)
            facts[key.removeprefix("image_")] = tuple(values)
    if said.get("do_normalize") is False:
        facts |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    square = {"height": size, "width": size}
    edges, crop = said.get("size", square if kind == "siglip" else size), said.get("crop_size", size)
    edges = {"shortest_edge": edges} if isinstance(edges, int) else edges
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    crop = crop if said.get("do_center_crop", kind == "clip") else edges
    resample, factor = said.get("resample", 3), said.get("rescale_factor", 1 / 255)
    for key, wrong in (
        ("do_resize", said.get("do_resize") is False),
        ("rescale_factor", said.get("do_rescale") is False or abs(factor * 255 - 1) > 1e-6),
        ("resample", resample not in _RESAMPLE),
        ("size", set(edges) not in ({"shortest_edge"}, {"height", "width"}) or len(set(edges.values())) != 1),
    ):
        if wrong:
            raise UserError(f"{path}: {key}={said.get(key)}: images cannot be prepared in this way here")
    if set(crop) != {"height", "width"} or set(crop.values()) != {size}:
        raise UserError(f"{path}: its images are not squares of {size} pixels, which the image tower takes; got {crop}")
    resized = next(iter(edges.values()))
    facts["resize_mode"] = "shortest" if "shortest_edge" in edges else "squash"
    return facts | {
        "interpolation": _RESAMPLE[resample],
        "resize_size": 0 if resized == size else resized,
        "floor_crop": facts["resize_mode"] == "shortest" or resized != size,
    }


def _read_vocabulary(folder: Path) -> dict[str, int]:
    """Read ids by token, of tokenizer.json or vocab.json."""
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        try:
            added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
            return {**content["model"]["vocab"], **added}
        except (KeyError, TypeError):
            raise UserError(f"{folder}/tokenizer.json: no vocabulary in it") from None
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return read_json(folder / "vocab.json")
    raise UserError(
        f"{folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt); copy its files there, or train"
        " from the weights alone: model.name=NAME model.weights=FOLDER"
    )
