"""Resolve the configuration's model section to a ModelSpec. No weights, no modules.

A model is named (any of open_clip's), or described by a Hugging Face CLIP folder or by a JSON file in open_clip's own
form, with additions:
text_cfg {"cbow": {"width", "vocab_size", "context_length"}} for the bag-of-words text tower of the CLIP paper's
pseudo-code, {"lstm": {"width", "layers", "bidirectional", "vocab_size", "context_length"}} for a recurrent one;
vision_cfg {"timm_model_args": {...}}, arguments of timm's model, and "image_seq_len", the patches of an
image at most (both as in open_clip 4, where the first is named timm_model_kwargs); and "image_mean", "image_std",
"image_resize_mode", "image_interpolation", "image_fill_color", "image_resize_size" and "image_floor_crop" (see
EvalTransform) where they are not OpenAI's. Without "text_cfg" the model has no text tower.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdist import config
from clipdist.config import REPOSITORY, SNAPSHOT
from clipdist.config.stages import check_stages
from clipdist.data.transform import BUDGET_MAX, BUDGET_MIN, EvalTransform, NativeAspect
from clipdist.data.vocabulary import BPE_VOCABULARY
from clipdist.errors import UserError
from clipdist.models.open_clip_files import LOCAL_TIMM, config_fields, model_config, model_names, read_json
from clipdist.models.weight_facts import PIXEL_FACTS, pixel_facts, weights_facts

DEFAULT_CONTEXT = 77
OWN_TEXT = {  # the project's own text towers: what text_cfg says of each
    "cbow": {"width", "vocab_size", "context_length"},
    "lstm": {"width", "layers", "bidirectional", "vocab_size", "context_length"},
}


@dataclass(frozen=True)
class ModelSpec:
    """A resolved model description; JSON-able through to_dict and from_dict.

    Attributes:
        name: as the configuration gives it (an open_clip name, or the path of a JSON file or Hugging Face folder).
        embed_dim: D, the width of both towers' features.
        image_size: side of the square input, pixels.
        context_length: L, tokens per text.
        image_mean, image_std: of the channels, on the scale 0..1.
        image_resize_mode ... image_floor_crop: see EvalTransform.
        tokenizer: {"kind": "bpe", "vocab_size", "options"} or {"kind": "hf", "name", "mode", "options", "ids",
            "eos_id"}: the ids that the text tower embeds, and the one at which it is read, where they are known;
            {"kind": "none"}: the model reads no texts.
        model: open_clip's model description {"embed_dim", "vision_cfg", "text_cfg", ...}, quick_gelu not included.
        quick_gelu: x * sigmoid(1.702 x) instead of GELU in open_clip's transformers: OpenAI's weights need it.
    """

    name: str
    embed_dim: int
    image_size: int
    context_length: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    quick_gelu: bool
    image_resize_mode: str = "shortest"
    image_interpolation: str = "bicubic"
    image_fill_color: tuple[int, int, int] = (0, 0, 0)
    image_resize_size: int = 0
    image_floor_crop: bool = False
    text_tower: bool = True

    @property
    def transform(self) -> EvalTransform:
        """What happens to a decoded image in evaluation, before its pixels are normalised."""
        common = (
            self.image_size,
            self.image_resize_mode,
            self.image_interpolation,
            self.image_fill_color,
            self.image_resize_size,
            self.image_floor_crop,
        )
        if self.patch_budget:
            return NativeAspect(*common, patch=self.model["vision_cfg"]["patch_size"], budget=self.patch_budget)
        return EvalTransform(*common)

    @property
    def patch_budget(self) -> int:
        """Patches of an image at most, which then keeps its aspect ratio; 0: images are squares."""
        return self.model["vision_cfg"].get("image_seq_len") or 0

    @property
    def has_text(self) -> bool:
        """Whether the model has a text tower. Without one `model` may describe one nevertheless.

        The image tower has no projection then, and `embed_dim` no meaning.
        """
        return self.tokenizer["kind"] != "none" and self.text_tower

    @property
    def reads_text(self) -> bool:
        """Whether the model has a tokenizer: for its text tower, or for a decoder of captions alone."""
        return self.tokenizer["kind"] != "none"

    def require_text(self, where: str, what: str) -> None:
        """Raise UserError, which names `where` and what needs a text tower, unless there is one."""
        if not self.has_text:
            raise UserError(f"{where}: has no text tower; needed for {what}")

    @property
    def own_text(self) -> str:
        """Which of the project's own text towers the model has, a key of OWN_TEXT; empty: none."""
        described = self.model["text_cfg"] if self.has_text else {}
        return next((kind for kind in OWN_TEXT if kind in described), "")

    @property
    def hf_text(self) -> str:
        """Hub name or folder of a Hugging Face text tower; empty where the model has none."""
        return (self.model["text_cfg"].get("hf_model_name") or "") if self.has_text else ""

    @property
    def clip_class(self) -> bool:
        """Whether open_clip builds this model as its CLIP class (text parameters without the prefix "text.")."""
        return not (self.model.get("custom_text") or self.hf_text or self.own_text)

    @property
    def decoder(self) -> dict[str, Any] | None:
        """The sizes of CoCa's decoder, open_clip's multimodal_cfg, where the description has one and a text tower."""
        return self.model.get("multimodal_cfg") if self.has_text else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """Return what to_dict gave; of earlier versions, too, which had one evaluation transform."""
        known: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**known)


def resolve_run_spec(cfg: config.Config) -> ModelSpec:
    """Return the description of a run's model; see resolve_spec."""
    return resolve_spec(cfg.model, cfg.objectives.text_tower, cfg.objectives.read_text)


def resolve_spec(cfg: config.Model, with_text: bool | None = True, with_tokens: bool | None = None) -> ModelSpec:
    """Find and check the model description that the configuration names. Builds nothing, downloads nothing.

    Args:
        with_text: False: the model is to have no text tower, whatever is described; None: as it is described.
        with_tokens: whether it is to have a tokenizer; None: if it has a text tower.

    Raises:
        UserError: an unknown name (with near ones), a JSON that is missing or not in open_clip's form, a size that
            does not fit, an unknown weights tag, a missing weights file, word vectors for a tower that does not take
            them, LoRA on an LSTM, or no text tower where there must be one.
    """
    from clipdist.models.hugging_face import is_hugging_face, read_description

    if cfg.name.endswith(".json"):
        path = find_model_json(cfg.name)
        description = _read_json(path)
    elif is_hugging_face(Path(cfg.name)):
        description = read_description(Path(cfg.name))
    else:
        description = _open_clip_config(cfg.name)
    _check_description(cfg.name, description)
    described = description.get("text_cfg") is not None
    if (with_text or with_tokens) and not described:
        raise UserError(f"model.name={cfg.name}: has no text_cfg, and a text tower is needed; describe one")
    text = description["text_cfg"] = description.get("text_cfg") or {}
    description["vision_cfg"] = _with_budget(cfg, description["vision_cfg"])
    weights = weights_facts(cfg)
    size = _square(cfg.name, description["vision_cfg"].get("image_size", 224))
    has_text, section = described and with_text is not False, _section(text)
    spec = ModelSpec(
        name=cfg.name,
        embed_dim=description["embed_dim"],
        image_size=size,
        context_length=section.get("context_length", DEFAULT_CONTEXT),
        tokenizer=_tokenizer_description(text) if has_text or with_tokens else {"kind": "none"},
        text_tower=has_text,
        model={key: value for key, value in description.items() if key not in _NOT_OPEN_CLIPS},
        quick_gelu=bool(description.get("quick_gelu") or weights.get("quick_gelu")),
        **pixel_facts(cfg, description, weights, size),
    )
    if not has_text and (setting := _setting_of_text(cfg)):
        raise UserError(f"model.{setting}: the model has no text tower; leave it out")
    if cfg.word_vectors and not spec.own_text:
        raise UserError(
            f"model.word_vectors={cfg.word_vectors}: only a CBOW or LSTM text tower takes them, {cfg.name} has neither"
        )
    if cfg.lora and spec.own_text == "lstm" and cfg.lora.towers != "image":
        raise UserError(
            f"model.lora.towers={cfg.lora.towers}: {cfg.name} has an LSTM, for which there are no adapters; set it to"
            " image"
        )
    if cfg.word_vectors and cfg.weights:
        raise UserError("model.word_vectors: model.weights brings all weights, so these would be lost; leave one out")
    return spec


def _setting_of_text(cfg: config.Model) -> str:
    """Return a setting that only a text tower can have; "": none is set."""
    settings = {
        f"word_vectors={cfg.word_vectors}": cfg.word_vectors,
        "lock_text=true": cfg.lock_text,
        f"text_unlocked_layers={cfg.text_unlocked_layers}": cfg.text_unlocked_layers,
        "lora.towers=text": cfg.lora and cfg.lora.towers == "text",
    }
    return next((setting for setting, is_set in settings.items() if is_set), "")


def check_stages_fit(stages: Sequence[config.Stage], spec: ModelSpec) -> None:
    """Check the stages of a run against a description, as far as it tells.

    Raises:
        UserError: see check_stages; or patches would be dropped twice.
    """
    vision = spec.model["vision_cfg"]
    if stages and spec.patch_budget:
        raise UserError(
            f"train.stages: not with model.name={spec.name}, whose images keep their aspect ratio; leave them out, or"
            " the budget of patches (model.patch_budget, vision_cfg.image_seq_len)"
        )
    patch = vision.get("patch_size", 16)
    if vision.get("timm_model_name"):
        patch = None
    elif isinstance(vision.get("layers"), (list, tuple)):  # open_clip's ResNets
        patch = 0
    check_stages(stages, spec.image_size, spec.context_length, patch)
    if vision.get("patch_dropout") and any(stage.patch_dropout for stage in stages):
        raise UserError(
            f"train.stages: patches would be dropped twice, for model.name={spec.name} has"
            f" vision_cfg.patch_dropout={vision['patch_dropout']}; set one of them to 0"
        )


def find_model_json(name: str) -> Path:
    """Find the file of a model JSON: as named from here, else from the repository's root.

    In a job, whose code and JSONs are a snapshot, the snapshot is looked at first.

    Raises:
        UserError: it is in neither place; near names of configs/models are given.
    """
    places = [Path(name), REPOSITORY / name]
    for path in reversed(places) if (REPOSITORY / SNAPSHOT).is_file() else places:
        if path.is_file():
            return path
    if name.startswith("data/pretrained/"):  # as configs/flickr8k_pretrained.yaml names it
        raise UserError(f"model.name={name}: no such file; make it: python tools/prepare_pretrained.py")
    shipped = sorted(f"configs/models/{path.name}" for path in (REPOSITORY / "configs/models").glob("*.json"))
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4) or shipped
    raise UserError(f"model.name={name}: no such file; did you mean {', '.join(near) or 'an open_clip name'}?")


# Keys of a description that are not handed to open_clip's constructors: ours, and what ModelSpec or the loss keeps.
# A constant logit bias cancels in both softmaxes of InfoNCE.
_NOT_OPEN_CLIPS = (*(f"image_{key}" for key in PIXEL_FACTS), "quick_gelu", "init_logit_bias")


_MORE_OF_VISION = {"timm_model_args", "timm_model_kwargs", "image_seq_len"}  # the last two are open_clip 4's

# Values that open_clip would meet with a KeyError, or not at all.
_CHOICES = {
    "vision_cfg.timm_proj": ("linear", "mlp", "none"),
    "text_cfg.hf_proj_type": ("linear", "mlp"),
    "text_cfg.hf_pooler_type": ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler"),
}


_MULTIMODAL = {"mlp_ratio", "dim_head", "heads", "n_queries", "attn_pooler_heads"}  # of open_clip's MultimodalCfg


def _open_clip_config(name: str) -> dict[str, Any]:
    if ":" in name:
        raise UserError(
            f"model.name={name}: name the folder's open_clip_config.json instead, and its weights as model.weights=FILE"
        )
    description = model_config(name)
    if description is None:
        known = {known.lower(): known for known in model_names()}
        near = [known[key] for key in difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)]
        hint = f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() lists the names"
        raise UserError(f"model.name={name}: neither an open_clip model nor a .json file; {hint}")
    return description


def _read_json(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.name={path}: not a JSON file: {error}") from None
    if isinstance(description, dict) and "model_cfg" in description:  # open_clip_config.json, as on the hub
        pixels = description.get("preprocess_cfg", {})
        said = {f"image_{key}": pixels[key] for key in PIXEL_FACTS if key in pixels}
        description = {**description["model_cfg"], **said}
        text = description.get("text_cfg")
        holds_tokenizer = (path.parent / "tokenizer_config.json").is_file()
        if isinstance(text, dict) and text.get("hf_tokenizer_name") and holds_tokenizer:
            text["hf_tokenizer_name"] = "."
    if isinstance(description, dict):
        vision, text = description.get("vision_cfg"), description.get("text_cfg") or {}
        if isinstance(vision, dict) and isinstance(text, dict):
            _localise(vision, text, path.parent)
    return description


def _localise(vision: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    """In a JSON file, a tower may be a folder beside the file: a Hugging Face name, or timm's local-dir:NAME.

    A Hugging Face tower's projection is linear unless the file says otherwise.
    """
    for section, key in ((vision, "timm_model_name"), (text, "hf_model_name"), (text, "hf_tokenizer_name")):
        name = str(section.get(key) or "")
        prefix = LOCAL_TIMM if name.startswith(LOCAL_TIMM) else ""
        place = folder / name.removeprefix(prefix)
        if name and place.is_dir():
            section[key] = prefix + str(place.resolve())
        elif prefix:
            raise UserError(f"vision_cfg.timm_model_name={name}: no such folder as {place}")
    if text.get("hf_model_name"):
        text.setdefault("hf_proj_type", "linear")


def _check_description(name: str, description: Any) -> None:
    """Raise UserError unless `description` has the form that the towers are built from."""
    where = f"model.name={name}"
    if not isinstance(description, dict):
        raise UserError(f'{where}: expected a JSON object with "embed_dim", "vision_cfg" and "text_cfg"')
    text = description.get("text_cfg")
    text = {} if text is None else text
    for key, value, kind in (
        ("embed_dim", description.get("embed_dim"), int),
        ("vision_cfg", description.get("vision_cfg"), dict),
        ("text_cfg", text, dict),
    ):
        if not isinstance(value, kind):
            raise UserError(f"{where}: {key!r} is missing or of the wrong type (a {kind.__name__} is wanted)")
    tops = {"embed_dim", "vision_cfg", "text_cfg", "custom_text", "multimodal_cfg", *_NOT_OPEN_CLIPS}
    if not isinstance(description.get("multimodal_cfg", {}), dict):
        raise UserError(f"{where}: multimodal_cfg is of the wrong type (a dict is wanted)")
    fields = {
        "": (description, tops),
        "vision_cfg.": (description["vision_cfg"], config_fields("CLIPVisionCfg") | _MORE_OF_VISION),
        "text_cfg.": (text, config_fields("CLIPTextCfg") | OWN_TEXT.keys()),
        "multimodal_cfg.": (description.get("multimodal_cfg", {}), config_fields("CLIPTextCfg") | _MULTIMODAL),
    }
    for prefix, (section, known) in fields.items():
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1)
                hint = f"; did you mean {prefix}{near[0]}?" if near else ""
                raise UserError(f"{where}: unknown key {prefix}{key}{hint}")
    for key, choices in _CHOICES.items():
        section, _, name = key.partition(".")
        value = fields[f"{section}."][0].get(name)
        if value and value not in choices:
            raise UserError(f"{where}: {key}={value}: must be one of {', '.join(choices)}")
    _check_own_text(where, text)
    vision = description["vision_cfg"]
    for key in ("timm_model_args", "timm_model_kwargs"):
        if vision.get(key) and vision.get("timm_model_pretrained", True):
            raise UserError(f"{where}: vision_cfg.{key}: only with timm_model_pretrained=false")


def _with_budget(cfg: config.Model, vision: dict[str, Any]) -> dict[str, Any]:
    """Return a vision_cfg in this version's form, with the patches of an image at most if it keeps its aspect ratio.

    Raises:
        UserError: not a number that fits, or a tower that takes square images alone.
    """
    vision = dict(vision)
    if args := vision.pop("timm_model_kwargs", None):
        vision["timm_model_args"] = args
    budget = cfg.patch_budget or vision.get("image_seq_len")
    if not budget:
        return vision
    key = "model.patch_budget" if cfg.patch_budget else f"model.name={cfg.name}: vision_cfg.image_seq_len"
    if not isinstance(budget, int) or not BUDGET_MIN <= budget <= BUDGET_MAX:
        raise UserError(f"{key}={budget}: must be a number of patches in {BUDGET_MIN} .. {BUDGET_MAX}")
    side = _naflex_patch(vision)
    if side is None:
        raise UserError(
            f"{key}={budget}: the image tower of {cfg.name} takes square images alone; take one with timm's naflexvit"
            " (vision_cfg.timm_model_name), such as configs/models/naflex_vit_tiny.json"
        )
    return {**vision, "image_seq_len": budget, "patch_size": side}  # timm's towers are not built by the latter


def _naflex_patch(vision: dict[str, Any]) -> int | None:
    """Return the side of the patches of a NaFlexVit in pixels; None for other towers."""
    name, args = str(vision.get("timm_model_name")), vision.get("timm_model_args") or {}
    if name.startswith(LOCAL_TIMM):
        found = read_json(Path(name.removeprefix(LOCAL_TIMM)) / "config.json")
        name, args = str(found.get("architecture")), {**(found.get("model_args") or {}), **args}
    if "naflexvit" not in name and not args.get("use_naflex"):
        return None
    named = re.search(r"patch(\d+)", name)
    said = args.get("patch_size", int(named[1]) if named else None)
    sides = set(said) if isinstance(said, (list, tuple)) else {said}
    side = sides.pop()
    return side if isinstance(side, int) and not sides else None


def _check_own_text(where: str, text: dict[str, Any]) -> None:
    kinds = [kind for kind in OWN_TEXT if kind in text]
    if len(kinds) > 1:
        raise UserError(f"{where}: text_cfg.{kinds[0]} and text_cfg.{kinds[1]}: a model has one text tower")
    for kind in kinds:
        section, wanted = text[kind], OWN_TEXT[kind]
        if not isinstance(section, dict) or section.keys() != wanted:
            raise UserError(f"{where}: text_cfg.{kind} takes exactly {', '.join(sorted(wanted))}")
        for key, value in section.items():
            if key == "bidirectional" and type(value) is not bool:
                raise UserError(f"{where}: text_cfg.{kind}.{key}={value!r}: must be true or false")
            if key != "bidirectional" and (type(value) is not int or value < 1):
                raise UserError(f"{where}: text_cfg.{kind}.{key}={value!r}: must be a positive integer")
        if section["vocab_size"] > BPE_VOCABULARY:
            raise UserError(
                f"{where}: text_cfg.{kind}.vocab_size={section['vocab_size']}: CLIP's byte-pair encoding has"
                f" {BPE_VOCABULARY} tokens"
            )


def _section(text: dict[str, Any]) -> dict[str, Any]:
    """Return the part of text_cfg that describes the tower."""
    return next((text[kind] for kind in OWN_TEXT if kind in text), text)


def _square(name: str, size: Any) -> int:
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UserError(f"model.name={name}: image_size {size}: only square pictures are supported")
    return side


def _tokenizer_description(text: dict[str, Any]) -> dict[str, Any]:
    options = dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if name and _section(text) is text:
        tower = text.get("hf_model_name")
        reads_eos = not tower and text.get("pool_type") == "eos"
        return {
            "kind": "hf",
            "name": name,
            "mode": text.get("tokenizer_mode"),
            "options": options,
            "ids": _embedded_ids(Path(tower)) if tower else text.get("vocab_size", BPE_VOCABULARY),
            "eos_id": text.get("eos_id") if reads_eos else None,
        }
    return {
        "kind": "bpe",
        "vocab_size": _section(text).get("vocab_size", BPE_VOCABULARY),
        "options": options,
    }


def _embedded_ids(tower: Path) -> int | None:
    """Return how many token ids a local Hugging Face text tower embeds; None where its folder does not say."""
    described = tower / "config.json"
    found = read_json(described).get("vocab_size") if described.is_file() else None
    return found if isinstance(found, int) else None
