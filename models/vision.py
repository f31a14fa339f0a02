"""The vision encoder: CLIP's ViT tower without projection, with region masks in the last layers.

Shape legend: N images, B region rows, P = 1 + patches (class token first), D width.
Source: EfficientVLM (2210.07795) section 3, X-VLM (2111.08276) section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from models.config import VisionConfig
from models.layers import Attention, FeedForward, Recorder, ViTBlock
from models.outputs import Capture, EncoderOutput

__all__ = ["RegionOutput", "VisionEmbeddings", "VisionEncoder", "resize_positions"]


@dataclass
class RegionOutput:
    """What the vision encoder returns for a region batch.

    Attributes:
        rows: one entry per region row: `last` is (B, P, D), under the region masks. Its hidden
            states and traces have N rows before the layers that apply the mask, and B + N from
            there on (the B region rows first, then the N full images).
        full: (N, P, D) final states of the full, unmasked images.
    """

    rows: EncoderOutput
    full: Tensor


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """(1 + g*g, D) -> (1 + grid*grid, D): bicubic on the patch rows, the class row is kept.

    No antialiasing and align_corners False, as the published code has it.
    """
    resized = resample_abs_pos_embed(
        positions.unsqueeze(0), [grid, grid], num_prefix_tokens=1, antialias=False
    )
    return resized.squeeze(0).contiguous()


class VisionEmbeddings(nn.Module):
    """Patches, class token and learned positions, then the norm in front of the blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.patch = PatchEmbed(
            config.image_size, config.patch_size, 3, config.width, bias=config.patch_bias
        )
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(config.tokens, config.width))
        self.norm = (
            nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised float -> (N, P, D).

        Raises:
            ValueError: on images of another size than the configuration says.
        """
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, the model expects "
                f"(N, 3, {size}, {size}); resize the images or set vision.image_size"
            )
        patches = self.patch(images.to(self.patch.proj.weight.dtype))
        first = self.class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return self.norm(torch.cat([first, patches], dim=1) + self.position)


class VisionEncoder(nn.Module):
    """Embeddings, pre-norm blocks, and a final norm on all tokens."""

    def __init__(self, config: VisionConfig) -> None:
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
            )
            for index, (heads, units) in enumerate(zip(config.heads, config.ffn, strict=True))
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def initialise(self) -> None:
        """Fresh weights in the manner of CLIP: residual outputs shrink with depth."""
        width, depth = self.config.width, max(1, self.config.layers)
        narrow, residual = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(self.embeddings.class_token, std=narrow)
        nn.init.normal_(self.embeddings.position, std=narrow)
        nn.init.normal_(self.embeddings.patch.proj.weight, std=0.02)
        if self.embeddings.patch.proj.bias is not None:
            nn.init.zeros_(self.embeddings.patch.proj.bias)
        for module in self.blocks.modules():
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
    ) -> EncoderOutput | RegionOutput:
        """Encodes normalised images (N, 3, S, S); see `XVLM.encode_image` for the region form."""
        recorder = Recorder(capture or Capture())
        start = len(self.blocks) - self.config.region_layers
        mask, rows = None, 0
        x = self.embeddings(images)
        recorder.state(0, x)
        for index, block in enumerate(self.blocks):
            if region_mask is not None and index == max(start, 0):
                x, mask, rows = _gather_regions(x, region_mask, image_index)
            x, record = block(x, mask, trace=index in recorder.capture.attention)
            recorder.traces(index, record)
            recorder.state(index + 1, x)
        if region_mask is not None and mask is None:  # region_layers is 0: rows see whole images
            x, mask, rows = _gather_regions(x, region_mask, image_index)
        x = self.norm(x)
        if region_mask is None:
            return recorder.output(x)
        return RegionOutput(recorder.output(x[:rows]), x[rows:])


def _normal(linear: nn.Module, std: float) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)


def _gather_regions(
    x: Tensor, region_mask: Tensor, image_index: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """(N, P, D) -> [B region rows; N images] (B + N, P, D), their key mask (B + N, P), and B."""
    if image_index is None:
        raise ValueError("a region mask needs image_index, the image of each row")
    full = region_mask.new_ones(x.shape[0], x.shape[1])
    gathered = torch.cat([x.index_select(0, image_index), x])
    return gathered, torch.cat([region_mask, full]), region_mask.shape[0]
