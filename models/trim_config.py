"""TrimmingConfig: where a model's trimmers stand, and how it runs them.

What is trimmed and how it is decided is described in `models.trimmers` and docs/trimming.md.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

__all__ = ["TrimMode", "TrimmedEncoder", "TrimmingConfig"]

TrimMode = Literal["off", "mask", "gather", "bucket", "packed"]
TrimmedEncoder = Literal["vision", "text", "fusion"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrimmingConfig:
    """Sites of token trimmers, encoders with head trimmers, and the mode of inference.

    A site stands in front of a layer: tokens that it drops are gone from that layer on. Serve the
    sites that were trained.

    Attributes:
        vision: blocks of the vision encoder in front of which image tokens are trimmed.
        fusion: fusion layers (from 0) in front of which image tokens are trimmed, for this layer
            and those after it. With two images (NLVR2) a layer trims the image that it reads.
        text: layers of the whole text stack (text layers, then fusion layers) in front of which
            text tokens are trimmed.
        guided: the sites of the vision encoder also see the text's first token, so the text is
            encoded first and image states belong to one text; else they can be cached.
        heads: encoders whose attentions have a head trimmer; layers of one head have none.
        bottleneck, projection: hidden units of the trimmers; width of the cross-modal comparison.
        init_logit: fresh trimmers keep a token with probability sigmoid(init_logit) in training and
            always in evaluation.
        min_tokens: of the tokens that may go, the best so many stay.
        vision_keep, fusion_keep, text_keep: mode "bucket": tokens kept at each site, beside the
            protected ones (class token and registers; the first token); never increasing.
        repack: mode "packed": vision sites that move tokens in memory, while the others only mask
            them; None: all do.
        mode: how the model runs once it is loaded, see `XVLM.set_trimming`.
    """

    vision: tuple[int, ...] = ()
    fusion: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    guided: bool = False
    heads: tuple[TrimmedEncoder, ...] = ()
    bottleneck: int = 64
    projection: int = 64
    init_logit: float = 2.0
    min_tokens: int = 1
    vision_keep: tuple[int, ...] | None = None
    fusion_keep: tuple[int, ...] | None = None
    text_keep: tuple[int, ...] | None = None
    repack: tuple[int, ...] | None = None
    mode: TrimMode = "mask"

    def __post_init__(self) -> None:
        for name in ("vision", "fusion", "text"):
            sites, counts = getattr(self, name), getattr(self, f"{name}_keep")
            if list(sites) != sorted(set(sites)) or any(site < 0 for site in sites):
                raise ValueError(f"trimming.{name} {sites} must be layers in rising order")
            if counts is None:
                continue
            if len(counts) != len(sites):
                raise ValueError(
                    f"trimming.{name}_keep has {len(counts)} counts for {len(sites)} sites"
                )
            if list(counts) != sorted(counts, reverse=True) or min(counts, default=1) < 1:
                raise ValueError(
                    f"trimming.{name}_keep {counts} must be counts from 1 up that never increase"
                )
        if self.repack is not None and not set(self.repack) <= set(self.vision):
            raise ValueError(f"trimming.repack {self.repack} must be sites of trimming.vision")
        if self.guided and not self.vision:
            raise ValueError("trimming.guided belongs to sites of the vision encoder: set vision")
        if self.min_tokens < 0 or self.bottleneck < 1 or self.projection < 1:
            raise ValueError(
                "trimming: bottleneck and projection are at least 1, min_tokens at least 0"
            )
        if not self.init_logit > 1:
            raise ValueError(
                f"trimming.init_logit {self.init_logit} is not above 1: the comparison with the "
                "text is worth up to 1 at first, and a fresh trimmer is to keep everything"
            )
        self.require_counts(self.mode)

    def require_counts(self, mode: str) -> None:
        """Raises ValueError when `mode` needs counts that are not there."""
        missing = [
            f"{name}_keep"
            for name in ("vision", "fusion", "text")
            if getattr(self, name) and getattr(self, f"{name}_keep") is None
        ]
        if mode == "bucket" and missing:
            raise ValueError(
                f'trimming mode "bucket" needs trimming.{missing[0]}, the tokens kept at each site'
            )

    def check(self, form: str, vision_layers: int, text_layers: int, fusion_layers: int) -> None:
        """Raises ValueError when a site has no layer, or `form` needs tokens that would go."""
        for name, depth in (
            ("vision", vision_layers),
            ("fusion", fusion_layers),
            ("text", text_layers + fusion_layers),
        ):
            sites = getattr(self, name)
            if sites and sites[-1] >= depth:
                raise ValueError(f"trimming.{name} names layer {sites[-1]}, there are {depth}")
        if self.text and form in ("pretrain", "captioning"):
            raise ValueError(
                f"trimming.text: form {form!r} needs every text token; leave the list empty"
            )
