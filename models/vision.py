"""The vision encoder: a plain ViT without projection, with region masks in the last layers.

Inside the blocks a row holds T tokens: class token and registers, as far as the configuration has
them, then the patches. What leaves the encoder is always P = 1 + patches tokens: one for the whole
image, then the patches. The first is the class token, or what pooling makes of the patches where
there is none (X-VLM's Swin puts the mean there); registers only serve the blocks (2309.16588) and
are left out. So masks of 1 + patches columns fit every backbone.

Trimmers drop patches in front of some blocks (`models.trimmers`); T and P then shrink on the way.

Shape legend: N images, B region rows or texts, T and P tokens as above, D width.
Source: EfficientVLM (2210.07795) section 3, X-VLM (2111.08276) section 3; CLIP, DeiT, SigLIP
(attention pooling) and DINOv2 (registers) as timm.models.vision_transformer has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from models.attention import Attention
from models.layers import FeedForward, Recorder, ViTBlock, run_block
from models.outputs import Capture, EncoderOutput
from models.packing import masked_mean, salient
from models.part_configs import VisionConfig
from models.streams import TokenStream
from models.trim_config import TrimmingConfig
from models.trim_pass import ImagePass, vision_trimmers

__all__ = [
    "AttentionPool",
    "RegionOutput",
    "VisionEmbeddings",
    "VisionEncoder",
    "resize_positions",
]


@dataclass
class RegionOutput:
    """What the vision encoder returns for a region batch.

    Attributes:
        rows: one entry per region row: `last` is (B, P, D), under the region masks. Its hidden
            states and traces have T tokens, N rows before the layers that apply the mask, and B + N
            from there on (the B region rows first, then the N full images). So has `trimming`.
        full: (N, P, D) final states of the full, unmasked images.
        full_mask: (N, P) what may be read of `full`, as `EncoderOutput.mask`.
    """

    rows: EncoderOutput
    full: Tensor
    full_mask: Tensor | None = None


def resize_positions(positions: Tensor, grid: int, prefix: int = 1) -> Tensor:
    """(prefix + g*g, D) -> (prefix + grid*grid, D): bicubic on the patch rows, the first `prefix`
    rows are kept (`VisionConfig.position_prefix`).

    No antialiasing and align_corners False, as the published code has it.
    """
    resized = resample_abs_pos_embed(
        positions.unsqueeze(0), [grid, grid], num_prefix_tokens=prefix, antialias=False
    )
    return resized.squeeze(0).contiguous()


class VisionEmbeddings(nn.Module):
    """Class token, registers, patches and learned positions, then the norm before the blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size, self.prefix_positions = config.image_size, config.prefix_positions
        self.patch = PatchEmbed(
            config.image_size, config.patch_size, 3, config.width, bias=config.patch_bias
        )
        self.class_token = nn.Parameter(torch.zeros(config.width)) if config.class_token else None
        self.registers = (
            nn.Parameter(torch.zeros(config.register_tokens, config.width))
            if config.register_tokens
            else None
        )
        self.position = nn.Parameter(torch.zeros(config.position_rows, config.width))
        self.norm = (
            nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised float -> (N, T, D).

        Raises:
            ValueError: on images of another size than the configuration says.
        """
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, the model expects "
                f"(N, 3, {size}, {size}); resize the images or set vision.image_size"
            )
        x = self.patch(images.to(self.patch.proj.weight.dtype))
        if not self.prefix_positions:
            x = x + self.position
        prefix = [token for token in (self.class_token, self.registers) if token is not None]
        if prefix:
            rows = [
                token.to(x.dtype).expand(x.shape[0], -1 if token.ndim > 1 else 1, -1)
                for token in prefix
            ]
            x = torch.cat([*rows, x], dim=1)
        return self.norm(x + self.position if self.prefix_positions else x)


class AttentionPool(nn.Module):
    """Attention pooling: one learned query reads all tokens, then a residual feed-forward part.

    Source: SigLIP (2303.15343); timm.layers.AttentionPoolLatent.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.latent = nn.Parameter(torch.zeros(width))
        self.attention = Attention(width, width // config.head_dim, config.head_dim)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.ffn = FeedForward(width, config.pool_ffn, config.activation, config.ffn_gate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), mask (B, N) bool or None -> (B, 1, D)."""
        query = self.latent.to(x.dtype).expand(x.shape[0], 1, -1)
        pooled, _ = self.attention(query, context=x, key_mask=mask)
        return pooled + self.ffn(self.norm(pooled))


class VisionEncoder(nn.Module):
    """Embeddings, pre-norm blocks, the final norm, and the token for the whole image.

    Args:
        trimming: None has no trimmers.   guide_width: of the text, for guided ones.
    """

    def __init__(
        self,
        config: VisionConfig,
        trimming: TrimmingConfig | None = None,
        guide_width: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.blocks = nn.ModuleList(
            ViTBlock(
                config.width,
                heads,
                config.head_dim,
                units,
                activation=config.activation,
                gate_position=config.ffn_gate,
                eps=config.norm_eps,
                layer_scale=config.layer_scale,
                # stochastic depth grows linearly, as in timm
                drop_path=config.drop_path * index / max(1, config.layers - 1),
                qkv_bias=config.qkv_bias,
            )
            for index, (heads, units) in enumerate(zip(config.heads, config.ffn, strict=True))
        )
        self.norm = (
            nn.Identity()
            if config.final_norm == "none"
            else nn.LayerNorm(config.width, eps=config.norm_eps)
        )
        self.pool = AttentionPool(config) if config.pooling == "map" else None
        self.trimmers = None if trimming is None else vision_trimmers(config, trimming, guide_width)

    def initialise(self) -> None:
        """Fresh weights in the manner of CLIP: residual outputs shrink with depth."""
        width, depth = self.config.width, max(1, self.config.layers)
        narrow, residual = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        embeddings, pool = self.embeddings, self.pool
        for learned in (embeddings.class_token, embeddings.registers, embeddings.position):
            if learned is not None:
                nn.init.normal_(learned, std=narrow)
        nn.init.normal_(embeddings.patch.proj.weight, std=0.02)
        if embeddings.patch.proj.bias is not None:
            nn.init.zeros_(embeddings.patch.proj.bias)
        if pool is not None:
            nn.init.normal_(pool.latent, std=narrow)
        for module in [*self.blocks.modules(), *(pool.modules() if pool is not None else ())]:
            if isinstance(module, Attention) and module.heads:
                for linear in (module.q, module.k, module.v):
                    _normal(linear, narrow)
                _normal(module.out, residual)
            elif isinstance(module, FeedForward) and module.units:
                _normal(module.fc1, (2 * width) ** -0.5)
                _normal(module.fc2, residual)

    def forward(
        self,
        images: Tensor,
        capture: Capture | None = None,
        region_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> EncoderOutput | RegionOutput:
        """Encodes normalised images (N, 3, S, S); see `XVLM.encode_image` for regions and guides."""
        if region_mask is not None and guide is not None:
            raise ValueError("region rows cannot be guided: pass region_mask or guide, not both")
        recorder = Recorder(capture or Capture())
        start = max(0, len(self.blocks) - self.config.region_layers)
        rows = None
        x = self.embeddings(images)
        recorder.state(0, x)
        stream = TokenStream(x, None, self.config.prefix_tokens)
        trim = ImagePass(self.trimmers, stream, guide, image_index)
        for index, block in enumerate(self.blocks):
            if region_mask is not None and index == start:
                x, rows = self._gather_regions(x, stream, region_mask, image_index)
            assert isinstance(block, ViTBlock)
            x, told = trim.before(index, x, block.attention.gate.z)
            traced = index in recorder.capture.attention
            x, record = run_block(block, x, stream.mask, trace=traced, trim=told)
            recorder.traces(index, record)
            recorder.state(index + 1, x)
        if region_mask is not None and rows is None:  # region_layers is 0: rows see whole images
            x, rows = self._gather_regions(x, stream, region_mask, image_index)
        x, mask = self._output(*trim.finish(x))
        if rows is None:
            output = recorder.output(x, mask, trim.record)
            output.per_text = guide is not None
            return output
        first, rest = (None, None) if mask is None else (mask[:rows], mask[rows:])
        return RegionOutput(recorder.output(x[:rows], first, trim.record), x[rows:], rest)

    def _gather_regions(
        self, x: Tensor, stream: TokenStream, region_mask: Tensor, image_index: Tensor | None
    ) -> tuple[Tensor, int]:
        """The rows of (N, T, D) become [B region rows; N images], which see their tokens; and B.

        The region mask (B, P) has one column for the whole image, which is the class token's.
        Registers belong to no place and stay visible.
        """
        if image_index is None:
            raise ValueError("a region mask needs image_index, the image of each row")
        config, count, images = self.config, region_mask.shape[0], stream.rows
        if region_mask.shape[1] != config.output_tokens:
            raise ValueError(
                f"region masks have {region_mask.shape[1]} columns, the model expects "
                f"{config.output_tokens}: one for the whole image and one for each patch"
            )
        registers = region_mask.new_ones(count, config.register_tokens)
        first = region_mask[:, : int(config.class_token)]
        columns = torch.cat([first, registers, region_mask[:, 1:]], dim=1)
        columns = torch.cat([columns, columns.new_ones(images, columns.shape[1])])
        index = torch.cat([image_index, torch.arange(images, device=x.device)])
        return stream.select(x, index, columns), count

    def _output(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Last states (B, T, D), mask (B, T) or None -> (B, P, D): the token for the whole image
        (pooled from visible patches only), then the patches; and their mask (B, P).
        """
        config, prefix = self.config, self.config.prefix_tokens
        if config.final_norm == "tokens":
            x = self.norm(x)
        if config.pooling == "class" and prefix == 1 and config.final_norm != "pooled":
            return x, mask
        patches = x[:, prefix:]
        visible = None if mask is None else mask[:, prefix:]
        if config.pooling == "class":
            first = x[:, :1]
        elif self.pool is not None:
            first = self.pool(patches, visible)
        else:
            first = patches.mean(1) if visible is None else masked_mean(patches, salient(visible))
            first = first[:, None]
        if config.final_norm == "pooled":
            first = self.norm(first)
        if visible is not None:
            visible = torch.cat([visible.new_ones(len(visible), 1), visible], dim=1)
        return torch.cat([first, patches], dim=1), visible


def _normal(linear: nn.Module, std: float) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
