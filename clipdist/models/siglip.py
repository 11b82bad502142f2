"""Describe a Hugging Face SigLIP folder in open_clip's form, and rename its tensors; the same the other way.

SigLIP (Zhai et al., arXiv:2303.15343) and SigLIP 2 of fixed resolution (Tschannen et al., arXiv:2502.14786) are one
architecture: timm's ViT without a class token, pooled by attention, and a text Transformer without a causal mask, read
at its last position, which is padding in most texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError
from clipdist.models.open_clip_files import mlp_ratio

if TYPE_CHECKING:  # a model's description is read where torch is not imported
    import torch

EPS = 1e-6  # of LayerNorm in timm's ViT
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # hidden_act -> timm's act_layer
_ANY = "vit_base_patch16_siglip_224"  # any of timm's, whose sizes are then set
# (width, layers, heads, patch, activation) of towers that timm has just so: its others have exact GELU.
_PUBLISHED = {
    (1152, 27, 16, 16, "gelu_tanh"): ("vit_so400m_patch16_siglip_{}", (256, 384, 512)),
    (1536, 40, 16, 16, "gelu_tanh"): ("vit_giantopt_patch16_siglip_{}", (256, 384)),
}

# Parts of tensor names, SiglipModel's and ours; those of the encoders' layers differ between the towers.
_NAMES = {
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.encoder.layers.": "visual.trunk.blocks.",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.head.": "text.text_projection.",
}
_LAYERS = {
    "visual.": {
        ".layer_norm1.": ".norm1.",
        ".layer_norm2.": ".norm2.",
        ".self_attn.out_proj.": ".attn.proj.",
        ".self_attn.in_proj_": ".attn.qkv.",
    },
    "text.": {
        ".layer_norm1.": ".ln_1.",
        ".layer_norm2.": ".ln_2.",
        ".self_attn.": ".attn.",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    },
}
INSTEAD = "take --format onnx or torch_export"
_POOL = "vision_model.head.attention.in_proj_"


def describe(where: str, cfg: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """Return the model of a SiglipConfig in open_clip's form.

    Args:
        where: the configuration's file, for messages.
        tokenizer: the folder of the tokenizer. Texts are lower-cased, as in training; SigLIP's own tokenizer does it,
            the one of SigLIP 2's folders does not.

    Raises:
        UserError: values that our towers cannot have.
    """
    vision, text = cfg["vision_config"], cfg["text_config"]
    width = vision["hidden_size"]
    if text["projection_size"] != width:
        raise UserError(f"{where}: features of {width} numbers for images, but {text['projection_size']} for texts")
    if vision["layer_norm_eps"] != EPS or not vision["vision_use_head"]:
        raise UserError(f"{where}: vision_config.layer_norm_eps must be {EPS} and vision_use_head true")
    for section in (vision, text):
        if section["hidden_act"] not in _ACTIVATIONS:
            raise UserError(f"{where}: hidden_act is {section['hidden_act']}; it must be {' or '.join(_ACTIVATIONS)}")
    args = {
        "embed_dim": width,
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "act_layer": _ACTIVATIONS[vision["hidden_act"]],
        "mlp_ratio": mlp_ratio(width, vision["intermediate_size"]),
    }
    name, sizes = _PUBLISHED.get(tuple(args.values())[:5], (_ANY, ()))
    published = vision["image_size"] in sizes
    described_text = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "hf_tokenizer_name": tokenizer,
        "tokenizer_kwargs": {"clean": "lower"},
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": mlp_ratio(text["hidden_size"], text["intermediate_size"]),
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": text["layer_norm_eps"]},
    }
    if text["hidden_act"] == "gelu_pytorch_tanh":
        described_text["act_kwargs"] = {"approximate": "tanh"}
    return {
        "embed_dim": width,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_model_name": name.format(vision["image_size"]) if published else _ANY,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
            **({} if published else {"timm_model_args": args}),
        },
        "text_cfg": described_text,
    }


def to_ours(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename SiglipModel's tensors to ours ("visual.trunk.*", "text.*"); what has no counterpart keeps its name."""
    import torch

    tensors = {name: value for name, value in tensors.items() if not name.endswith(".position_ids")}
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in tensors for part in parts):
            tensors[name.replace(".q_proj.", ".in_proj_")] = torch.cat([tensors.pop(part) for part in parts])
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(_POOL) and value.shape[0] % 3 == 0:  # timm keeps the query's projection apart
            kind, width = name.removeprefix(_POOL), value.shape[0] // 3
            renamed[f"visual.trunk.attn_pool.q.{kind}"] = value[:width].clone()
            renamed[f"visual.trunk.attn_pool.kv.{kind}"] = value[width:].clone()
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        for tower, layers in _LAYERS.items():
            for theirs, ours in layers.items() if name.startswith(tower) else ():
                name = name.replace(theirs, ours)
        renamed[name] = value[None] if name == "visual.trunk.pos_embed" and value.ndim == 2 else value
    return renamed


def to_theirs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our tensors to SiglipModel's: queries, keys and values apart, but for the pooling's."""
    import torch

    tensors = dict(tensors)
    for kind in ("weight", "bias"):
        parts = [f"visual.trunk.attn_pool.{part}.{kind}" for part in ("q", "kv")]
        if all(part in tensors for part in parts):
            tensors[f"{_POOL}{kind}"] = torch.cat([tensors.pop(part) for part in parts])
    renamed: dict[str, torch.Tensor] = {}
    for own, value in tensors.items():
        name = own
        for tower, layers in _LAYERS.items():
            in_layer = name.startswith(("visual.trunk.blocks.", "text.transformer.resblocks."))
            for theirs, ours in layers.items() if in_layer and name.startswith(tower) else ():
                name = name.replace(ours, theirs)
        for theirs, ours in _NAMES.items():
            name = name.replace(ours, theirs)
        if ".self_attn.in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3)):
                renamed[name.replace(".in_proj_", f".{letter}_proj.")] = part.clone()
        else:
            renamed[name] = (value[0] if own == "visual.trunk.pos_embed" else value).contiguous()
    return renamed


def config_of(model: Any) -> dict[str, Any]:
    """Return SiglipConfig's arguments for a DualEncoder, as far as tensors do not show that its towers are SigLIP's.

    Raises:
        UserError: they are not.
    """
    import open_clip

    spec = model.spec
    trunk: Any = getattr(model.visual, "trunk", None)
    text = open_clip.CLIPTextCfg(**spec.model["text_cfg"])
    approximate = (text.act_kwargs or {}).get("approximate", "none")
    plain = (text.no_causal_mask, text.proj_bias, text.pool_type, text.embed_cls) == (True, True, "last", False)
    if spec.own_text or spec.hf_text or spec.quick_gelu or not plain or spec.tokenizer["kind"] != "hf":
        raise UserError(f"{spec.name}: its text tower is not SigLIP's; {INSTEAD}")
    try:
        block = trunk.blocks[0]
        acts = {"GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
        vision = {
            "image_size": spec.image_size,
            "patch_size": trunk.patch_embed.patch_size[0],
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": acts[type(block.mlp.act).__name__],
            "layer_norm_eps": block.norm1.eps,
        }
        same = (trunk.attn_pool.num_heads, trunk.attn_pool.norm.eps) == (block.attn.num_heads, block.norm1.eps)
    except (AttributeError, TypeError, KeyError, IndexError):
        same = False
    if not same:
        raise UserError(f"{spec.name}: its image tower is not SigLIP's; {INSTEAD}")
    return {
        "vision_config": vision,
        "text_config": {
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "hidden_act": "gelu_pytorch_tanh" if approximate == "tanh" else "gelu",
            "layer_norm_eps": (text.norm_kwargs or {}).get("eps", 1e-5),
            "projection_size": spec.embed_dim,
        },
    }
