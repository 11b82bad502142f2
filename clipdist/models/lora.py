"""LoRA by the peft library (Hu et al., arXiv:2106.09685): put low-rank adapters on a tower's layers, and merge them.

An adapter is put where its sum with the layer is one layer again: on linear layers and convolutions that the tower
calls. A convolution with groups is left out, since peft cannot merge its adapter.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipdist import config
from clipdist.errors import UserError
from clipdist.models.towers import run_on_shapes
from clipdist.models.weights import weights_checksum

TOWERS = {"both": ("visual", "text"), "image": ("visual",), "text": ("text",)}  # attributes of a DualEncoder

INSTALL = "pip install -c constraints.txt -e '.[lora]'"


@dataclass(frozen=True)
class Base:
    """The model that adapters were put on: its name and weights as configured, and the SHA-256 of what it computes."""

    name: str
    weights: str
    sha256: str

    def __str__(self) -> str:
        drawn = "drawn weights or those of its description"
        return f"{self.name} with {self.weights or drawn}, SHA-256 {self.sha256[:12]}..."


def base_of(model: Any, cfg: config.Model) -> Base:
    """Return the base that a DualEncoder is before it gets adapters; its scalars, which train, do not count."""
    spec = model.spec
    facts = [spec.image_size, spec.context_length, spec.image_mean, spec.image_std, spec.quick_gelu]
    text = "".join([*map(weights_checksum, model.towers.values()), json.dumps(facts)])
    return Base(cfg.name, cfg.weights, hashlib.sha256(text.encode()).hexdigest())


def add_adapters(model: Any, cfg: config.Lora) -> None:
    """Put adapters on the layers of locked towers, in place; the new weights are drawn from torch's global generator.

    Args:
        model: a DualEncoder. Parameters that train already go on doing so.

    Raises:
        UserError: peft is missing, or a target matches no layer.
    """
    try:
        import peft
    except ImportError:
        raise UserError(f"model.lora: needs the peft library, which is missing: {INSTALL}") from None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[str] = []
    for tower in (name for name in TOWERS[cfg.towers] if name in model.towers):
        split_attention(model.towers[tower])
        found += [f"{tower}.{name}" for name in _layers_that_merge(model, tower)]
    chosen = _matching(found, cfg)
    settings = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=_one_pattern(chosen))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how peft would save them
        peft.inject_adapter_in_model(settings, model)
    for parameter in trained:  # peft has locked all but the adapters
        parameter.requires_grad_(True)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights of their layers, in place: modules and names are those of the model without."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            _replace(model, name, layer.get_base_layer())
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitAttention):
            _replace(model, name, layer.joined())


class SplitAttention(nn.Module):
    """nn.MultiheadAttention with q, k and v as layers of their own, on which adapters can be put.

    (peft's own layer for nn.MultiheadAttention registers its weights anew in every forward pass: ZeRO loses them.)
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout, self.batch_first = whole.num_heads, whole.dropout, whole.batch_first
        bias = whole.in_proj_bias
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, None if bias is None else bias.chunk(3)[number])
            for number, weight in enumerate(whole.in_proj_weight.chunk(3))
        )
        self.out_proj = whole.out_proj

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return ([b, L, w], None) of query [b, L, w], key and value [b, S, w]; [L, b, w] unless batch_first.

        Args:
            attn_mask: [L, S] or [b * heads, L, S], added to the logits.
        """
        layers = zip((self.q_proj, self.k_proj, self.v_proj), (query, key, value))
        q, k, v = (self._to_heads(layer(x)) for layer, x in layers)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout).transpose(1, 2).flatten(2)
        return self.out_proj(out if self.batch_first else out.transpose(0, 1)), None

    def joined(self) -> nn.MultiheadAttention:
        """Return the nn.MultiheadAttention of these weights."""
        layers: list[Any] = [self.q_proj, self.k_proj, self.v_proj]
        biased, width = self.q_proj.bias is not None, self.q_proj.in_features
        whole = nn.MultiheadAttention(
            width, self.heads, self.dropout, biased, batch_first=self.batch_first, device="meta"
        )
        whole.in_proj_weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
        if biased:
            whole.in_proj_bias = nn.Parameter(torch.cat([layer.bias for layer in layers]))
        whole.out_proj = self.out_proj
        return whole.train(self.training)

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[b, L, w] (or [L, b, w]) -> [b, heads, L, w / heads]."""
        return (x if self.batch_first else x.transpose(0, 1)).unflatten(2, (self.heads, -1)).transpose(1, 2)


def split_attention(tower: nn.Module) -> None:
    """Replace nn.MultiheadAttention by SplitAttention in place, but for its rarer forms."""
    for name, layer in list(tower.named_modules()):
        if type(layer) is not nn.MultiheadAttention or not layer._qkv_same_embed_dim:
            continue
        if layer.bias_k is None and not layer.add_zero_attn:
            _replace(tower, name, SplitAttention(layer).train(layer.training))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layer)


def _layers_that_merge(model: Any, tower_name: str) -> list[str]:
    """Return the names, in a tower, of locked layers that it calls and whose output is linear in their weight.

    Some layers are never called: their owner takes the weights, as CLIP's attention pooling does.
    """
    from timm.layers import Conv2dSame

    linear = (nn.Linear.forward, nn.Conv2d.forward, Conv2dSame.forward)  # others change the weight first
    tower, called = getattr(model, tower_name), set[nn.Module]()
    layers: dict[str, Any] = {
        name: layer
        for name, layer in tower.named_modules()
        if type(layer).forward in linear and not layer.weight.requires_grad
    }
    hooks = [layer.register_forward_hook(lambda own, *_: called.add(own)) for layer in layers.values()]
    try:
        _run(model, tower_name)
    except (NotImplementedError, RuntimeError):
        if not next(tower.parameters()).is_meta:
            raise
        called.update(layers.values())  # for an estimate, of a tower that reads values
    finally:
        for hook in hooks:
            hook.remove()
    plain = [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) or (layer.groups == 1 and set(layer.dilation) == {1})
    ]
    return [name for name in plain if layers[name] in called]


@torch.no_grad()
def _run(model: Any, tower_name: str) -> None:
    """Run a tower once in evaluation mode, on shapes alone where it allows that."""
    tower, spec = getattr(model, tower_name), model.spec
    modes = {layer: layer.training for layer in tower.modules()}
    image = tower_name == "visual"
    shape = (1, 3, spec.image_size, spec.image_size) if image else (1, spec.context_length)
    dtype = next(tower.parameters()).dtype if image else torch.int64
    tower.eval()
    try:
        run_on_shapes(tower, shape, dtype)
    except (NotImplementedError, RuntimeError):  # it reads values
        tower(torch.ones(shape, dtype=dtype, device=next(tower.parameters()).device))
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def _matching(found: list[str], cfg: config.Lora) -> list[str]:
    """Return those names that a target matches: all without targets.

    Raises:
        UserError: there are none, or none for one of the targets.
    """
    if not found:
        raise UserError(f"model.lora.towers={cfg.towers}: nothing to adapt, no linear layer or plain convolution")
    matched = {target: [name for name in found if f".{target}." in f".{name}."] for target in cfg.targets}
    for target, names in matched.items():
        if not names:
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in found)
            raise UserError(
                f"model.lora.targets={target}: no layer has such a name, among {', '.join(list(kinds)[:12])} and others"
                f" from {found[0]} to {found[-1]}"
            )
    chosen = {name for names in matched.values() for name in names}
    return [name for name in found if name in chosen or not cfg.targets]


def _one_pattern(names: list[str]) -> str:
    """Return the regular expression of exactly these names: in a list peft would match the ends of names."""
    return "|".join(name.replace(".", r"\.") for name in names)
