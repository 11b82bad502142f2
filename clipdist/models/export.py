"""Export a dual encoder: weights for open_clip, or a CLIPModel folder of transformers.

Each is loaded again by the library that it is for, and its features are compared, before it is called done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from clipdist.data.tokens import make_tokenizer, truncated_merges
from clipdist.data.vocabulary import BPE_VOCABULARY
from clipdist.errors import UserError
from clipdist.models import clip_model, hugging_face
from clipdist.models.caption_decoder import DECODER, OPEN_CLIPS
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.spec import LOCAL_TIMM, ModelSpec
from clipdist.storage import replacing

TOLERANCE = 1e-5  # of normalised features

# encode(uint8 [b, 3, S, S], int64 [b, L]) -> image features [b, D]; text features [b, D] where there is a text tower
Encoder = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]

Ids = Callable[[list[str]], list[list[int]]]  # sentences -> token ids
Card = Callable[[Sequence[str]], str]  # lines of Python that load the model -> the text of README.md


class FeatureError(NamedTuple):
    """How far what is loaded is from the model: of normalised features, the largest difference and lowest cosine."""

    difference: float
    cosine: float


@dataclass(frozen=True)
class Exported:
    """What was written, and how it is loaded.

    Attributes:
        files: what was written; of an open_clip export, the weights first.
        lines: the Python lines that load it.
        error: between the model and what those lines load.
        name: for open_clip.create_model_and_transforms; empty for the other formats.
        config: the model JSON to register with open_clip.add_model_config first; None for a model of open_clip's own.
        merges: the byte-pair merges of a vocabulary smaller than CLIP's, for open_clip.SimpleTokenizer; else None.
        left_out: what of the model is not written; empty: nothing.
        parameters: how many were written; 0: all.
        local: entries of `config` that name folders of this machine.
    """

    files: tuple[Path, ...]
    lines: tuple[str, ...]
    error: FeatureError
    name: str = ""
    config: Path | None = None
    merges: Path | None = None
    left_out: str = ""
    parameters: int = 0
    local: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return self.files[0]


# open_clip


def export_model(
    model: DualEncoder, out: Path, facts: dict[str, str | int | None] | None = None, half: bool = False
) -> Exported:
    """Write the file and what goes with it, then loads it with open_clip and compares.

    Args:
        model: fp32, on the CPU, in evaluation mode.
        out: FILE.safetensors; FILE.json and FILE.bpe.txt.gz are written beside it where needed.
        facts: further entries of the file's metadata, such as the step.
        half: write the towers' weights in fp16.

    Raises:
        UserError: a CBOW or LSTM text tower (open_clip has neither), another suffix, a weight too large for fp16, or a
            folder that cannot be written.
        RuntimeError: open_clip's features differ from the model's by more than 1e-5; with `half`, are not finite.
    """
    spec = model.spec
    _check_for_open_clip(spec)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    biased = model.logit_bias is not None
    decodes = model.decoder is not None or spec.decoder is None
    name = _name_in_open_clip(spec, biased) if decodes else None
    description = None if name else out.with_suffix(".json")
    merges, local = None, list[str]()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_weights(model, out, facts or {}, half)
        if description:
            described, local = _portable(_described(model))
            description.write_text(json.dumps(described, indent=4) + "\n", encoding="utf-8")
        if spec.tokenizer["kind"] == "bpe" and spec.tokenizer["vocab_size"] < BPE_VOCABULARY:
            merges = out.with_suffix(".bpe.txt.gz")
            merges.write_bytes(truncated_merges(spec.tokenizer["vocab_size"]))
    except OSError as reason:
        raise UserError(f"--out {out}: cannot be written: {reason.strerror or reason}") from None
    if description:
        open_clip.add_model_config(description)
    name = name or out.stem
    theirs = open_clip.create_model(name, pretrained=str(out)).eval()

    error = compare(model, _open_clip_encoder(spec, theirs), str(out), math.inf if half else TOLERANCE)
    files = tuple(path for path in (out, description, merges) if path)
    lines = _open_clip_lines(spec, name, out, description, merges)
    return Exported(files, lines, error, name, description, merges, kept_aspect(spec), local=tuple(local))


def export_open_clip_folder(
    model: DualEncoder, out: Path, *, half: bool = False, repository: str = "", card: Card | None = None
) -> Exported:
    """Write the folder that open_clip loads as local-dir:OUT, and as hf-hub:REPOSITORY once it is on the hub.

    It holds open_clip_config.json, open_clip_model.safetensors and, where the tokenizer is not CLIP's own, the
    tokenizer's files.

    Args:
        model, out, half: as export_hugging_face.
        repository: its name on the hub, USER/NAME; open_clip looks for a tokenizer under the name in the description.
        card: makes README.md of the lines that load the model; None: no card.

    Raises:
        UserError: a CBOW or LSTM text tower, a Hugging Face text tower that is a folder of this machine, or as
            export_hugging_face.
        RuntimeError: as export_hugging_face.
    """
    spec = model.spec
    _check_for_open_clip(spec)
    described, local = _portable(_described(model))
    if set(local) - {"text_cfg.hf_tokenizer_name"}:  # the tokenizer's files are in the folder
        raise UserError(
            f"{spec.name}: a tower is described by a folder of this machine, which open_clip's folder cannot hold; take"
            " --format onnx or torch_export"
        )
    own_tokenizer = spec.tokenizer["kind"] == "hf" or spec.tokenizer["vocab_size"] < BPE_VOCABULARY
    if own_tokenizer:
        described["text_cfg"]["hf_tokenizer_name"] = repository or "."
    pixels = {"mean": spec.image_mean, "std": spec.image_std, "fill_color": spec.image_fill_color[0]}
    pixels |= {"interpolation": spec.image_interpolation, "resize_mode": spec.image_resize_mode}
    content = {"model_cfg": described, "preprocess_cfg": pixels}

    text = """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("PLACE")
tokenizer = open_clip.get_tokenizer("PLACE")"""
    with new_folder(out) as folder:
        (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_weights(model, folder / "open_clip_model.safetensors", {}, half)
        if own_tokenizer:
            clip_model.clip_tokenizer(spec).save_pretrained(folder)
        write_card(folder, card, text, f"hf-hub:{repository}" if repository else f"local-dir:{out.name}")
        theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
        error = compare(model, _open_clip_encoder(spec, theirs), str(out), math.inf if half else TOLERANCE)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        check_tokenizer(spec, out, lambda sentences: tokenizer(sentences).tolist())
    return Exported((out,), lines_of(text, f"local-dir:{out}"), error, left_out=kept_aspect(spec))


def kept_aspect(spec: ModelSpec) -> str:
    """Return what of a description is left out of what takes squares alone; empty: nothing."""
    return f"vision_cfg.image_seq_len={spec.patch_budget}" if spec.patch_budget else ""


def _check_for_open_clip(spec: ModelSpec) -> None:
    if spec.own_text:
        raise UserError(f"{spec.name}: open_clip has no {spec.own_text.upper()} text tower; take --format torch_export")
    if spec.model["vision_cfg"].get("timm_model_args"):
        raise UserError(f"{spec.name}: open_clip has no place for timm_model_args; take --format torch_export")


def _described(model: DualEncoder) -> dict[str, Any]:
    """Return the model's description in open_clip's form."""
    bias = {} if model.logit_bias is None else {"init_logit_bias": -10.0}  # makes open_clip build the parameter
    described = {**model.spec.model, "quick_gelu": model.spec.quick_gelu, **bias}
    described["vision_cfg"] = {key: value for key, value in described["vision_cfg"].items() if key != "image_seq_len"}
    if model.decoder is None:  # a dual encoder alone
        described.pop("multimodal_cfg", None)
        return described | {
            section: {**described[section], "output_tokens": False}
            for section in ("vision_cfg", "text_cfg")
            if "output_tokens" in described[section]
        }
    return described


def _portable(described: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Name a timm tower of a local folder by its architecture, where that says all.

    Returns:
        The description, and which of its entries still name folders of this machine.
    """
    vision, text = dict(described["vision_cfg"]), dict(described["text_cfg"])
    name = vision.get("timm_model_name") or ""
    if name.startswith(LOCAL_TIMM):
        found = json.loads((Path(name.removeprefix(LOCAL_TIMM)) / "config.json").read_text(encoding="utf-8"))
        if found.get("model_args", {}).keys() <= {"in_chans", "num_classes", "global_pool"}:
            vision["timm_model_name"] = found["architecture"]
    sections = {"vision_cfg": vision, "text_cfg": text}
    local = [
        f"{section}.{key}"
        for section, cfg in sections.items()
        for key, value in cfg.items()
        if isinstance(value, str) and Path(value.removeprefix(LOCAL_TIMM)).is_absolute()
    ]
    return {**described, **sections}, local


def _open_clip_encoder(spec: ModelSpec, theirs: Any) -> Encoder:
    return lambda image, tokens: (theirs.encode_image(normalised(spec, image)), theirs.encode_text(tokens))


def _open_clip_lines(spec: ModelSpec, name: str, out: Path, description: Path | None, merges: Path | None) -> tuple:
    pixels = ""
    if spec.image_mean != open_clip.OPENAI_DATASET_MEAN or spec.image_std != open_clip.OPENAI_DATASET_STD:
        pixels = f", image_mean={spec.image_mean}, image_std={spec.image_std}"
    if (spec.image_resize_mode, spec.image_interpolation) != ("shortest", "bicubic"):
        pixels += f', image_resize_mode="{spec.image_resize_mode}", image_interpolation="{spec.image_interpolation}"'
    tokenizer = f'open_clip.get_tokenizer("{name}")'
    if merges:
        tokenizer = f'open_clip.SimpleTokenizer("{merges}", context_length={spec.context_length})'
    return (
        "import open_clip",
        *([f'open_clip.add_model_config("{description}")'] if description else []),
        f'model, _, preprocess = open_clip.create_model_and_transforms("{name}", pretrained="{out}"{pixels})',
        f"tokenizer = {tokenizer}",
    )


def _name_in_open_clip(spec: ModelSpec, biased: bool) -> str | None:
    """Return the name under which open_clip builds exactly this model: its own, or its QuickGELU variant's."""
    for name in (spec.name, f"{spec.name}-quickgelu"):
        known = open_clip.get_model_config(name)
        if known is None or (known.pop("init_logit_bias", None) is not None) != biased:
            continue
        if bool(known.pop("quick_gelu", False)) == spec.quick_gelu and known == spec.model:
            return name
    return None


def _write_weights(model: DualEncoder, out: Path, facts: dict[str, str | int | None], half: bool) -> None:
    """Write open_clip's names and shapes: no prefix on the text tower of its CLIP class, a 0-D log scale."""
    prefix = "text." if model.spec.clip_class else ""
    tensors = {name.removeprefix(prefix): value for name, value in tensors_of(model, half).items()}
    tensors = {name.replace(DECODER, OPEN_CLIPS): value for name, value in tensors.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in tensors:
            tensors[name] = tensors[name].reshape([])
    metadata = {"format": "pt", "clipdist": json.dumps({**model.spec.to_dict(), **facts})}
    with replacing(out) as temporary:
        save_tensors(tensors, temporary, metadata)


# Hugging Face


def export_hugging_face(
    model: DualEncoder, out: Path, *, half: bool = False, repository: str = "", card: Card | None = None
) -> Exported:
    """Write a CLIPModel folder: config.json, model.safetensors, the tokenizer's files and preprocessor_config.json.

    It is written under another name, loaded with transformers, compared, and renamed last.

    Args:
        model: fp32, on the CPU, in evaluation mode; a ViT and a causal text Transformer of open_clip's plain kind.
        out: the folder; it must not be there yet, or be empty.
        half: write the towers' weights in fp16.
        repository: its name on the hub, USER/NAME, under which the card loads it.
        card: makes README.md of the lines that load the model; None: no card.

    Raises:
        UserError: towers that CLIPModel cannot be, a weight too large for fp16, a file or a filled folder in the way,
            or one that cannot be written.
        RuntimeError: features (with `half`: features that are not finite) or token ids differ.
    """
    spec = model.spec
    if reason := clip_model.inexpressible(spec):
        raise UserError(
            f"{spec.name}: has {reason}, for which Hugging Face's CLIPModel has no place; take --format open_clip or"
            " torch_export"
        )
    if spec.image_resize_mode == "longest":
        raise UserError(f"{spec.name}: image_resize_mode=longest: CLIPImageProcessor cannot; take --format open_clip")
    fp32 = ', dtype="float32"' if half else ""  # computes in fp32 with the rounded weights; else in fp16

    text = f"""from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("PLACE"{fp32})
processor = CLIPProcessor.from_pretrained("PLACE")"""
    with new_folder(out) as folder:
        _write_folder(model, folder, half)
        write_card(folder, card, text, repository or out.name)
        encode = _hugging_face_encoder(spec, folder)
        error = compare(model, encode, str(out), math.inf if half else TOLERANCE)
        check_tokenizer(spec, out, _hugging_face_ids(spec, folder))
    return Exported((out,), lines_of(text, str(out)), error, left_out="" if model.logit_bias is None else "logit_bias")


def _write_folder(model: DualEncoder, folder: Path, half: bool) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor

    spec = model.spec
    dtype = "float16" if half else "float32"
    CLIPConfig(**clip_model.config_of(spec), architectures=["CLIPModel"], dtype=dtype).save_pretrained(folder)
    save_tensors(hugging_face.to_theirs(tensors_of(model, half)), folder / "model.safetensors", {"format": "pt"})
    clip_model.clip_tokenizer(spec).save_pretrained(folder)
    side, resized = spec.image_size, spec.image_resize_size or spec.image_size
    squash = spec.image_resize_mode == "squash"
    CLIPImageProcessor(
        size={"height": resized, "width": resized} if squash else {"shortest_edge": resized},
        crop_size={"height": side, "width": side},
        resample=2 if spec.image_interpolation == "bilinear" else 3,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
    ).save_pretrained(folder)


def _hugging_face_encoder(spec: ModelSpec, folder: Path) -> Encoder:
    from transformers import CLIPConfig, CLIPModel

    theirs = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))  # strict: from_pretrained would only warn

    def encode(image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = theirs(input_ids=tokens, pixel_values=normalised(spec, image))
        return found.image_embeds, found.text_embeds

    return encode


def _hugging_face_ids(spec: ModelSpec, folder: Path) -> Ids:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda sentences: tokenizer(sentences, truncation=True, max_length=spec.context_length)["input_ids"]


# Writing and comparing


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the name `out` when the block is done without an error.

    Raises:
        UserError: a file or a filled folder is in the way, or it cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; name a new folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out, shared=True) as temporary:
            temporary.mkdir()
            yield temporary
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def write_card(folder: Path, card: Card | None, text: str, place: str) -> None:
    if card:
        (folder / "README.md").write_text(card(lines_of(text, place)), encoding="utf-8")


def lines_of(text: str, place: str) -> tuple[str, ...]:
    """Return the lines that load a folder, with the name under which it is loaded."""
    return tuple(text.replace("PLACE", place).splitlines())


def check_tokenizer(spec: ModelSpec, where: Path, ids: Ids) -> None:
    """Compare the ids of sentences up to the end mark; what pads after it is never looked at."""
    sentences = ["A dog's 2 puppies run!", "two snow-boarders jump over a red car", "naïve café"]
    for sentence, found, wanted in zip(sentences, ids(sentences), make_tokenizer(spec)(sentences).tolist()):
        end = min(len(found), max(place for place, token in enumerate(wanted) if token) + 1)  # zeros pad
        if found[:end] != wanted[:end]:
            raise RuntimeError(f"{where}: the tokenizer gives other ids than the model's for {sentence!r}")


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Save with the permissions of the user's umask: save_file alone lets nobody but the owner read the file."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=metadata)
    file.chmod(mode)


def sample_inputs(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two random images, uint8 [2, 3, S, S], and two random texts, int64 [2, L]; without a text tower [2, 0]."""
    spec = model.spec
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, spec.image_size, spec.image_size), generator=generator, dtype=torch.uint8)
    if model.text is None:
        return image, torch.zeros(2, 0, dtype=torch.int64)
    vocabulary = spec.tokenizer.get("vocab_size") or model.text.vocab_size
    assert isinstance(vocabulary, int)
    end = spec.model["text_cfg"].get("eos_id", 2) if _reads_eos(spec) else vocabulary - 1
    tokens = torch.randint(3, vocabulary - 2, (2, spec.context_length), generator=generator)
    tokens[tokens == end] = 1
    tokens[:, -1] = end  # the end mark, where CLIP's text tower is read
    return image, tokens


@torch.no_grad()
def compare(model: DualEncoder, encode: Encoder, where: str, tolerance: float = TOLERANCE) -> FeatureError:
    """Compare the normalised features of two random images and, of a model with a text tower, texts.

    Raises:
        RuntimeError: they differ by more than the tolerance, or are not finite.
    """
    image, tokens = sample_inputs(model)
    return compare_pairs(zip(encode_both(model, image, tokens), encode(image, tokens)), where, tolerance)


def compare_pairs(
    features: Iterable[tuple[torch.Tensor, torch.Tensor]], where: str, tolerance: float = TOLERANCE
) -> FeatureError:
    """Compare pairs of features [b, D], normalised, as `compare` does."""
    pairs = [(F.normalize(a), F.normalize(b)) for a, b in features]
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    if not worst <= tolerance:
        raise RuntimeError(f"{where}: its features differ from the model's by {worst:.1e}")
    return FeatureError(worst, min(float((a * b).sum(dim=1).min()) for a, b in pairs))


def encode_both(model: DualEncoder, image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the model's features of images and texts, as an Encoder does."""
    images = model.encode_image(image)
    return (images,) if model.text is None else (images, model.encode_text(tokens))


def _reads_eos(spec: ModelSpec) -> bool:
    return spec.model["text_cfg"].get("pool_type") == "eos"


def normalised(spec: ModelSpec, image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.image_mean, spec.image_std))
    return (image / 255 - mean) / std


def tensors_of(model: DualEncoder, half: bool) -> dict[str, torch.Tensor]:
    """Return the model's tensors, copied; with `half` the towers' parameters in fp16, statistics and scalars in fp32.

    Raises:
        UserError: a parameter is too large for fp16.
    """
    tensors = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters() if half else ():
        if name not in model.scalars:
            tensors[name] = tensors[name].half()
            if parameter.isfinite().all() and not tensors[name].isfinite().all():
                largest = float(parameter.detach().abs().max())
                raise UserError(f"--dtype fp16: {name} holds {largest:.3g}, and fp16 ends at 65504; leave --dtype out")
    return tensors
