"""Build the dual encoder: an image tower, a text tower and the temperature of their logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from clipdist import config
from clipdist.data.batch import IMAGE, Batch
from clipdist.data.patches import is_buffer
from clipdist.data.transform import NativeAspect
from clipdist.distributed.rank import moved
from clipdist.errors import UserError, brief
from clipdist.models.caption_decoder import CAPTION, CaptionDecoder
from clipdist.models.compiled import compile_blocks
from clipdist.models.drop_path import branches_kept, draw_kept, drop_path_blocks, recompute_blocks
from clipdist.models.fewer_patches import patches_chosen
from clipdist.models.image_tokens import gives_tokens, image_tokens
from clipdist.models.lora import TOWERS, Base, add_adapters
from clipdist.models.masked_patches import patch_tokens
from clipdist.models.norms import running_norms, statistics_frozen
from clipdist.models.packed_images import allow_packed_images, pack, packed_input
from clipdist.models.spec import ModelSpec
from clipdist.models.text_length import PackedTexts, allow_packing, encode
from clipdist.models.towers import (
    buffers_keep_dtype,
    checkpoint_image_tower,
    find_projection,
    frozen_subtrees,
    keep_statistics_fp32,
    lock,
    lock_weights,
    native_size,
    run_on_shapes,
    text_positions,
    trained_part,
    without_projection,
)
from clipdist.models.weights import weights_checksum

HEADS = "heads."  # of the names of the heads' parameters
PARTS = {"visual": "image", "text": "text", "heads": "heads", "logit_scale": "temperature", "logit_bias": "bias"}
HIDDEN = "hidden"  # the view whose features are taken before the projection
PATCHES = "patches"  # of the names of outputs of masked patches


class DualEncoder(nn.Module):
    """An image tower, a text tower and the learned log scale t of the logits (CLIP, Radford et al., arXiv:2103.00020).

    Training uses only `forward`, which also normalises the pixels: ZeRO stage 3 gathers parameters only for the module
    that the engine calls.

    Attributes:
        visual: float [b, 3, H, W] -> [b, D]; open_clip's ModifiedResNet or VisionTransformer, or a timm model. timm's
            NaFlexVit also takes images at their own aspect ratio, see clipdist.models.packed_images. Without a text
            tower it has no projection, for there is no space to share: -> [b, w].
        text: int64 [b, L] -> [b, D]; open_clip's TextTransformer, a Hugging Face model, CBOW or LSTM; None where the
            description has none, or nothing is trained that needs one.
        logit_scale: Parameter [1], t (DeepSpeed does not support 0-D parameters); logits are exp(t) * cosine + bias.
            None without a text tower.
        logit_bias: Parameter [1] of the sigmoid loss; None for InfoNCE, whose softmax would cancel it.
        heads: of self-supervised objectives, by the objective's name, each behind the image tower without its
            projection; see add_heads.
        text_kind: how texts are run without their padding, see clipdist.models.text_length; "whole": with it.
        base: what adapters were put on; None: the model has none.
        decoder_weights: of CoCa's decoder, as open_clip names them in it, where loaded weights had one.
        drop_path: share of a batch that leaves out a residual branch of the image tower in training.
    """

    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(self, spec: ModelSpec, visual: nn.Module, text: nn.Module | None, clip: config.Clip) -> None:
        super().__init__()
        self.spec = spec
        self.visual = visual
        self.text = text
        self.logit_scale = None if text is None else nn.Parameter(torch.full([1], clip.first_log_scale))
        bias = torch.full([1], clip.logit_bias_init)
        self.logit_bias = nn.Parameter(bias) if clip.loss == "sigmoid" and text is not None else None
        self.heads = nn.ModuleDict()
        self.base: Base | None = None
        self.decoder_weights: dict[str, torch.Tensor] = {}
        self.drop_path = 0.0
        self.text_kind = "whole" if text is None else allow_packing(text)
        transform = spec.transform
        self._prefix_tokens = 0
        if isinstance(transform, NativeAspect):
            self._prefix_tokens = allow_packed_images(visual, spec.name, transform.patch)
        self._locked: list[nn.Module] = []
        self._trained_parts: dict[str, nn.Module] = {}  # of the towers in `locked`
        # channels_last is faster for a ResNet, but not for a ViT, which has one convolution.
        self._convolutional = sum(isinstance(layer, nn.Conv2d) for layer in visual.modules()) > 1
        self.register_buffer("image_mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.empty(1, 3, 1, 1), persistent=False)
        self._restore_pixel_statistics()

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the one-element parameters that the forward pass returns."""
        return tuple(name for name in ("logit_scale", "logit_bias") if getattr(self, name) is not None)

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The towers that the model has, by attribute: "visual", "text"."""
        return {"visual": self.visual} if self.text is None else {"visual": self.visual, "text": self.text}

    def part_of(self, parameter: str) -> str:
        """Return the part of a parameter for norms and metrics: "image", "text", "heads", "temperature" or "bias"."""
        return PARTS[parameter.partition(".")[0]]

    def forward(
        self,
        *,
        tokens: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        teaching: bool = False,
        noise: Mapping[str, torch.Tensor] | None = None,
        kept: Mapping[str, torch.Tensor] | None = None,
        **images: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return features, not normalised, and the scalars.

        Args:
            tokens: int64 [b, L], or [b, K, L] of K texts for each image; None: do not run the text tower. On the CPU,
                where their lengths are read; see encode_text.
            patches: int64 [b, n], those of every image that the tower sees in training; None: all. Only after
                clipdist.models.fewer_patches.allow_stages.
            teaching: whether heads give what a teacher gives.
            noise: what heads take beside features, by view, on the CPU; of a decoder of captions by caption/ARGUMENT. A
                mask, bool [b, n], is of patches in whose place the tower has the head's mask token, unless it teaches.
            kept: branches of the image tower's blocks that each row keeps, by view: see
                clipdist.models.drop_path.branches_kept; None: all.
            images: uint8 [b, 3, H, W], by the names of the views; none: do not run the image tower. Of the view
                "hidden" the features are those of `encode_hidden`; the view NAME/... goes through the head NAME.

        Either may also be what `locked_features` gave for it, float [b, w].

        Returns:
            features [b, D] or a head's output under the name of each view; of those with a head also what the head was
            given, [b, w], under "hidden/" and the view's name; what the head for patches gives for the masked ones,
            [masked patches of all rows, P], under "patches/" and the view's name; "text": [b, D] or [b, K, D];
            "logit_scale": the log scale t [1], which the objective bounds, and "logit_bias": [1], if there are any;
            "caption": the loss that a decoder of captions gives in training for tokens and the view "image".
        """
        decoder = self.decoder if self.training and tokens is not None and IMAGE in images else None
        memory = text = None
        chosen = patches_chosen(self.visual, patches) if patches is not None and self.training else nullcontext()
        outputs: dict[str, torch.Tensor] = {}
        with chosen:
            for view, pixels in images.items():
                with branches_kept(self.visual, kept[view], self.drop_path) if kept else nullcontext():
                    if decoder is not None and view == IMAGE:
                        outputs[view], memory = image_tokens(self.visual, self.pixels(pixels))
                    else:
                        outputs |= self._encode_view(view, pixels, teaching, noise or {})
                self.after_view(view)
        if tokens is not None and (self.text is not None or decoder is None):
            if decoder is not None and decoder.reads_text_tower:
                texts, text = self._encode_text_tokens(tokens.flatten(0, -2))
            else:
                texts = self.encode_text(tokens.flatten(0, -2))
            outputs["text"] = texts.unflatten(0, tokens.shape[:-1])
        if decoder is not None and tokens is not None:
            own = {name.removeprefix(f"{CAPTION}/"): x for name, x in (noise or {}).items() if name.startswith(CAPTION)}
            own |= {} if text is None else {"text": text}
            outputs[CAPTION] = decoder(memory, tokens.flatten(0, -2), **own)
        # Copies: ZeRO stage 3 releases the parameters when the forward pass ends.
        return outputs | {name: getattr(self, name).clone() for name in self.scalars}

    @property
    def decoder(self) -> CaptionDecoder | None:
        """The decoder of captions among the heads, if there is one."""
        found = dict(self.heads.items()).get(CAPTION)
        assert found is None or isinstance(found, CaptionDecoder)
        return found

    def _encode_text_tokens(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features [b, D] of texts and the outputs of the text tower's layers, [b, L, w]."""
        assert self.text is not None
        with gives_tokens(self.text):
            return self.text(moved(tokens, self.image_mean.device))

    def draw_kept(self, seed: int, step: int, batch: Batch, views: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return `kept` of the forward pass of a batch in a step: empty without drop path."""
        if not self.drop_path:
            return {}
        blocks = len(drop_path_blocks(self.visual))
        return draw_kept(blocks, self.drop_path, seed, step, batch.sample_id, views)

    def after_view(self, view: str) -> None:
        """Called when the forward pass has run a view; the engine puts a function in its place."""

    def modules_of(self, view: str) -> Iterator[nn.Module]:
        """Iterate over the modules that a view runs through."""
        yield from self.visual.modules()
        head, is_headed, _ = view.partition("/")
        if is_headed:
            yield from self.heads[head].modules()

    def _encode_view(
        self, view: str, pixels: torch.Tensor, teaching: bool, noise: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        head, is_headed, _ = view.partition("/")
        if not is_headed:
            return {view: self.encode_hidden(pixels) if view == HIDDEN else self.encode_image(pixels)}
        own = noise.get(view)
        if own is not None and own.dtype == torch.bool:
            return self._encode_masked(view, pixels, teaching, own)
        hidden = self.encode_hidden(pixels)
        more = {} if own is None else {"noise": moved(own, hidden.device)}
        return {view: self.heads[head](hidden, teaching=teaching, **more), f"{HIDDEN}/{view}": hidden}

    def _encode_masked(
        self, view: str, pixels: torch.Tensor, teaching: bool, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run a view with masked patches. Their number is read on the CPU, where the mask is."""
        head: Any = self.heads[view.partition("/")[0]]
        places = moved(mask.flatten().nonzero().squeeze(1), pixels.device)
        masked = partial(head.patches.mask_token, mask=moved(mask, pixels.device))
        with patch_tokens(self.visual, None if teaching else masked) as tokens:
            hidden = self.encode_hidden(pixels)
        patches = head.patches(tokens[0].flatten(0, 1).index_select(0, places))
        return {view: head(hidden, teaching=teaching), f"{PATCHES}/{view}": patches, f"{HIDDEN}/{view}": hidden}

    @torch.no_grad()
    def hidden_width(self) -> int:
        """Return w of encode_hidden."""
        side, weight = self.spec.image_size, next(self.visual.parameters())
        with without_projection(self.visual):
            try:
                return run_on_shapes(self.visual, (2, 3, side, side), weight.dtype)[-1]
            except (NotImplementedError, RuntimeError):  # the tower reads values
                with statistics_frozen(running_norms(self.visual)):
                    return self.visual(weight.new_zeros(2, 3, side, side)).shape[-1]

    def add_heads(self, heads: Mapping[str, nn.Module], *, projects: bool) -> None:
        """Put heads behind the image tower.

        Args:
            projects: whether the tower's projection is used; else it does not train.
        """
        for name, head in heads.items():
            keep_statistics_fp32(head)
            self.heads[name] = head
        found = find_projection(self.visual)
        if found and not projects:
            projection = getattr(found.owner, found.name)
            projection.requires_grad_(False)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the features [b, D] of images, not normalised.

        Args:
            image: uint8 [b, 3, H, W]; patches in a buffer, on the CPU (see clipdist.data.patches), of a model whose
                images keep their aspect ratio; or see `locked_features`.
        """
        if image.is_floating_point():
            return self._continue("image", image)
        if is_buffer(image):
            return self._encode_patches(image)
        return self.encode_pixels(image)

    def encode_hidden(self, image: torch.Tensor) -> torch.Tensor:
        """Return what precedes the image tower's projection, [b, w], of images uint8 [b, 3, H, W].

        Of a tower without a projection that is known, its output.
        """
        with without_projection(self.visual):
            return self.encode_pixels(image)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features [b, D] of pixels in 0..255, any dtype [b, 3, H, W]: perturbed images have fractions."""
        return self.visual(self.pixels(pixels))

    def _encode_patches(self, buffer: torch.Tensor) -> torch.Tensor:
        patches, packing = pack(buffer, self._prefix_tokens)
        pixels = moved(patches, self.image_mean.device).view(-1, 3).to(torch.float32) / 255
        pixels = (pixels - self.image_mean.view(3)) / self.image_std.view(3)
        normalised = pixels.view(patches.shape).to(next(self.visual.parameters()).dtype)
        return self.visual(packed_input(normalised, packing))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the features [b, D] of tokens int64 [b, L] (or see `locked_features`), not normalised.

        Tokens on the CPU, whatever the model's device: most towers then leave out the padding, with the same features
        to rounding (see clipdist.models.text_length).

        Raises:
            UserError: the model has no text tower.
        """
        if self.text is None:
            raise UserError(f"{self.spec.name}: the model has no text tower")
        if tokens.is_floating_point():
            return self._continue("text", moved(tokens, self.image_mean.device))
        return encode(self.text, self.text_kind, tokens, self.image_mean.device)

    @property
    def locked(self) -> tuple[str, ...]:
        """The towers, "image" and "text", of which at most a projection trains."""
        return tuple(self._trained_parts)

    @torch.no_grad()
    def locked_features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the locked part of a tower in `locked` gives, before its projection if that trains.

        Args:
            inputs: images as encode_image takes them, or tokens int64 [b, L].

        Returns:
            float [b, w], which the forward pass takes in place of `inputs`.
        """
        image = inputs.dtype == torch.uint8
        with self._locked_part("image" if image else "text"):
            return self.encode_image(inputs) if image else self.encode_text(inputs)

    def locked_checksum(self, name: str) -> str:
        """Return the SHA-256 of the weights that decide `locked_features` of a tower, 64 hex digits."""
        with self._locked_part(name) as tower:
            return weights_checksum(tower)

    @contextmanager
    def _locked_part(self, name: str) -> Iterator[nn.Module]:
        """Yield a tower that gives what precedes its projection, if that trains, in evaluation mode."""
        tower = self.visual if name == "image" else self.text
        assert tower is not None  # it is in `locked`
        whole = isinstance(self._trained_parts[name], nn.Identity)
        training = tower.training
        tower.eval()
        try:
            with nullcontext() if whole else without_projection(tower):
                yield tower
        finally:
            self.train(training)

    def _continue(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """Map the features of a tower's locked part to the tower's output."""
        if name not in self._trained_parts:
            takes = "uint8 [b, 3, H, W]" if name == "image" else "int64 [b, L]"
            raise TypeError(f"encode_{name} takes {takes}, not {features.dtype} {list(features.shape)}")
        part = self._trained_parts[name]
        return part(features.to(next(part.parameters(), features).dtype))

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the mode as nn.Module.train; locked modules stay in evaluation mode: no dropout, no BatchNorm updates."""
        super().train(mode)
        for module in self._locked:
            module.eval()
        return self

    def lock_towers(self, cfg: config.Model) -> None:
        """Freeze towers as configured, except their last groups and a projection behind a timm or Hugging Face model.

        A locked image tower is LiT (Zhai et al., arXiv:2111.07991). Towers with LoRA are locked, and get adapters.

        Raises:
            UserError: a tower cannot be unlocked in part, nothing of it would be locked, or neither tower would train;
                or see add_adapters.
        """
        adapted = TOWERS[cfg.lora.towers] if cfg.lora else ()
        settings = {
            "visual": (cfg.lock_image, "model.image_unlocked_groups", cfg.image_unlocked_groups),
            "text": (cfg.lock_text, "model.text_unlocked_layers", cfg.text_unlocked_layers),
        }
        for name, tower in self.towers.items():
            locked, key, unlocked = settings[name]
            if locked or name in adapted:
                lock(tower, key, unlocked)
            if cfg.biases_only and not locked:  # BitFit
                lock_weights(tower)
        if cfg.lora:
            add_adapters(self, cfg.lora)
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        towers = {"image", "text"} & {self.part_of(name) for name in trained}
        if not towers and self.text is None:
            raise UserError(
                "model.lock_image=true: nothing would be trained, as there is no text tower; unlock the image tower, or"
                " its last groups by model.image_unlocked_groups"
            )
        if trained and not towers:
            raise UserError(
                f"model.lock_image=true, model.lock_text=true: only {' and '.join(trained)} would be trained; unlock a"
                " tower, or its last groups by model.image_unlocked_groups or model.text_unlocked_layers"
            )
        self._locked = [module for tower in self.towers.values() for module in frozen_subtrees(tower)]
        parts = {PARTS[name]: trained_part(tower) for name, tower in self.towers.items()}
        self._trained_parts = {name: part for name, part in parts.items() if part is not None}
        self.train(self.training)

    def check_sizes(self) -> None:
        """Run the towers on shapes alone, at the image size and the context length of the description.

        Raises:
            UserError: a tower does not take them, or its features have another width than embed_dim.
        """
        spec = self.spec
        where = f"model.name={spec.name}"
        positions = 0 if self.text is None else text_positions(self.text)
        if positions and spec.context_length > positions:
            raise UserError(
                f"{where}: text_cfg.context_length={spec.context_length}, but {spec.hf_text} has {positions} positions;"
                f" set at most {positions}"
            )
        side, dtype = spec.image_size, next(self.visual.parameters()).dtype
        inputs: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
            "visual": (f"image tower, for images of {side} x {side} pixels", (2, 3, side, side), dtype),
            "text": (f"text tower, for {spec.context_length} tokens", (2, spec.context_length), torch.int64),
        }
        for name, tower in self.towers.items():
            what, shape, kind = inputs[name]
            try:
                features = run_on_shapes(tower, shape, kind)[1:]
            except NotImplementedError:
                continue  # the tower reads values
            except (AssertionError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
                if "meta" in str(error):
                    continue  # it reads values as well
                native = native_size(tower)
                own = f"; its own size is {native} x {native}" if native not in (0, side) else ""
                raise UserError(f"{where}: the {what}, does not run: {brief(error)}{own}") from error
            if spec.has_text and features != (spec.embed_dim,):
                raise UserError(f"{where}: embed_dim={spec.embed_dim}, but the {what}, gives features {list(features)}")

    def check_rows(self, rows: int, image_size: int = 0) -> None:
        """Check that a rank's forward passes of so many pairs can train BatchNorm.

        Args:
            image_size: of the smallest images; 0: those of the description.

        Raises:
            UserError: a layer of an image tower that is trained would normalise one value per channel.
        """
        side = image_size or self.spec.image_size
        try:
            if rows == 1:
                run_on_shapes(self.visual, (1, 3, side, side), next(self.visual.parameters()).dtype)
                for head in (head for head in self.heads.values() if not isinstance(head, CaptionDecoder)):
                    run_on_shapes(head, (1, self.hidden_width()), next(head.parameters()).dtype)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UserError(
                    "train.global_batch, train.micro_batch: one pair in a forward pass leaves BatchNorm in"
                    f" {self.spec.name} one value per channel; let each rank take two pairs or more at once, or lock"
                    " the image tower"
                ) from None
        except (NotImplementedError, RuntimeError):
            pass  # the tower reads values

    def prepare(self, cfg: config.Engine) -> None:
        """Compile the towers' blocks and checkpoint their activations, as configured.

        Raises:
            UserError: no blocks are known in either tower, or every step would have a shape of its own; or see
                set_activation_checkpointing.
        """
        if cfg.compile and self.spec.patch_budget:
            raise UserError(
                f"engine.compile=true: not for {self.spec.name}, whose images keep their aspect ratio: the number of"
                " patches differs from step to step; set it to false"
            )
        if cfg.compile:
            if not sum(map(compile_blocks, self.towers.values())):
                raise UserError(f"engine.compile=true: no blocks are known in {self.spec.name}; set it to false")
            if isinstance(self.text, PackedTexts):
                self.text.row_bits = 3
        if cfg.activation_checkpointing:
            self.set_activation_checkpointing()

    def set_activation_checkpointing(self) -> None:
        """Keep only the inputs of residual blocks for the backward pass and recompute the other activations.

        Raises:
            UserError: the image tower is of a kind for which this is not known to be exact.
        """
        if not recompute_blocks(self.visual):
            checkpoint_image_tower(self.visual)
        if self.text is not None and any(parameter.requires_grad for parameter in self.text.parameters()):
            self.text.set_grad_checkpointing(True)  # type: ignore[operator]
        if self.decoder is not None:
            self.decoder.set_grad_checkpointing()

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """Return normalised pixels, as the image tower takes them, of images uint8 [b, 3, H, W]."""
        pixels = (image.to(torch.float32) / 255 - self.image_mean) / self.image_std
        layout = torch.channels_last if self._convolutional else torch.contiguous_format
        return pixels.to(next(self.visual.parameters()).dtype, memory_format=layout)

    def _apply(self, fn: Any, recurse: bool = True) -> DualEncoder:
        """Apply .to(), .half(), .bfloat16() ...: pixel statistics and the text tower's buffers keep their dtype.

        timm's towers need their constants in the dtype of the weights. Text towers cast them where they are used:
        rotary frequencies in bf16 would blur positions.
        """
        parts = () if self.text is None else self.text.modules()
        constants = [(part, name) for part in parts for name, _ in part.named_buffers(recurse=False)]
        with buffers_keep_dtype(constants):
            super()._apply(fn, recurse)
        self._restore_pixel_statistics()
        return self

    def _restore_pixel_statistics(self) -> None:
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(self.spec, name), dtype=torch.float32).view(1, 3, 1, 1)
            setattr(self, name, values.to(getattr(self, name).device))
