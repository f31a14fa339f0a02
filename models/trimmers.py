"""Trimmers: per input, which tokens and which heads a layer keeps; and the container of a stack's.

A token trimmer scores every token by itself (a small MLP: no attention map is needed, so attention
stays fused) and by how much it resembles the first token of the other modality. What is published
of SmartTrim (2305.15033) is this idea: importance in the own sequence, contribution to the other
modality, binary decisions trained by reparameterisation, lightweight modules inside the backbone.
The formulas here are ours; docs/trimming.md says which part comes from where.

Shape legend: B rows, N tokens, D width, Dg width of the other modality, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.packing import salient
from models.trim_config import TrimmingConfig

__all__ = ["HeadTrimmer", "TokenTrimmer", "Trimmers", "decide"]

_OUTPUT_STD = 0.02  # small against init_logit: a fresh trimmer keeps everything
_ALPHA = 0.1  # of the cross-modal term, which is at most 1 at first: below init_logit
_TEMPERATURE, _LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.1, 0.01, 1.0
_NOISE_EDGE = 1e-6


class LogitLinear(nn.Linear):
    """A linear map to float32, whatever the precision around it.

    Buckets rank tokens by their logits. Near `init_logit` a bfloat16 has 32 values to the unit, so
    that most tokens of a picture would tie and the ranking would be that of their places.
    """

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        # Asked, for exported graphs should have no regions; and of "meta" it cannot be asked.
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class TokenTrimmer(nn.Module):
    """logit = MLP(LN(x)) + alpha * cos(Wq LN(x), Wk LN(guide)) / t, kept where above 0.

    alpha starts at 0.1 and t at 0.1 (clamped to [0.01, 1]); both are learned. From alpha 0 the two
    projections would have no gradient, and alpha that of a comparison by chance.

    Args:
        guide_width: of the other modality's first token; None: no second term.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        projection: int,
        guide_width: int | None = None,
        init_logit: float = 5.0,
    ) -> None:
        super().__init__()
        self.guided, self.init_logit = guide_width is not None, init_logit
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, bottleneck)
        self.fc2 = LogitLinear(bottleneck, 1)
        if guide_width is not None:
            self.guide_norm = nn.LayerNorm(guide_width)
            self.query = nn.Linear(width, projection, bias=False)
            self.key = nn.Linear(guide_width, projection, bias=False)
            # One element each, because engines refuse 0-dim parameters.
            self.alpha = nn.Parameter(torch.full((1,), _ALPHA))
            self.temperature = nn.Parameter(torch.full((1,), _TEMPERATURE))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh weights that keep every token."""
        self.norm.reset_parameters()
        _reset_mlp(self.fc1, self.fc2, self.init_logit)
        if self.guided:
            self.guide_norm.reset_parameters()
            for linear in (self.query, self.key):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            self.alpha.fill_(_ALPHA)
            self.temperature.fill_(_TEMPERATURE)

    def forward(self, x: Tensor, guide: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Logits (B, N) float32 of x (B, N, D); guide is (B, Dg).

        Args:
            rows: (N,) int64 for packed tokens x (1, N, D): the row of `guide` that each belongs to.

        Raises:
            ValueError: when the trimmer compares with a guide and there is none.
        """
        normed = self.norm(x.detach())
        logits = self.fc2(F.gelu(self.fc1(normed))).squeeze(-1)
        if not self.guided:
            return logits
        if guide is None:
            raise ValueError(
                "this trimmer compares tokens with the other modality's first token: pass guide= "
                "(text first, then encode_image(images, guide=text.last[:, 0]))"
            )
        key = F.normalize(self.key(self.guide_norm(guide.detach())).float(), dim=-1)
        key = key.unsqueeze(1) if rows is None else key.index_select(0, rows)
        likeness = (F.normalize(self.query(normed).float(), dim=-1) * key).sum(-1)
        divisor = self.temperature.float().clamp(_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE)
        return logits + self.alpha.float() * likeness / divisor


class HeadTrimmer(nn.Module):
    """Keep logits of an attention's heads, from the first token of the row.

    Self-attention: the own one. Cross-attention: both, one behind the other. The tokens are those
    that enter the layer, so decisions are made outside it.

    Args:
        width: D, or D + Dg for cross-attention.
    """

    def __init__(self, width: int, heads: int, bottleneck: int, init_logit: float = 5.0) -> None:
        super().__init__()
        self.init_logit = init_logit
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, bottleneck)
        self.fc2 = LogitLinear(bottleneck, heads)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh weights that keep every head."""
        self.norm.reset_parameters()
        _reset_mlp(self.fc1, self.fc2, self.init_logit)

    def forward(self, first: Tensor, other: Tensor | None = None) -> Tensor:
        """first (B, D), other (B, Dg) or None -> (B, H) float32."""
        joined = first if other is None else torch.cat([first, other.to(first.dtype)], dim=-1)
        return self.fc2(F.gelu(self.fc1(self.norm(joined.detach()))))


def _reset_mlp(fc1: nn.Linear, fc2: nn.Linear, init_logit: float) -> None:
    nn.init.normal_(fc1.weight, std=fc1.in_features**-0.5)
    nn.init.zeros_(fc1.bias)
    nn.init.normal_(fc2.weight, std=_OUTPUT_STD)
    nn.init.constant_(fc2.bias, init_logit)


def decide(
    logits: Tensor,
    movable: Tensor | None = None,
    *,
    least: int = 1,
    count: int | None = None,
    tau: float | None = None,
) -> Tensor:
    """1 (keep) or 0 (drop) for logits (B, N), float32, exact, with a straight-through gradient.

    The gradient is that of sigmoid((logits + noise) / tau): a hard Gumbel decision between two
    classes is one with logistic noise (1611.01144, 1611.00712).

    Args:
        movable: (B, N) bool, what may be dropped; the rest gets 1. None: everything.
        least: of the movable, the best so many are kept whatever their logits.
        count: keep exactly the best so many instead (fewer where fewer are movable).
        tau: with noise, at this temperature. None: no noise, keep where the logit is above 0.
    """
    if tau is not None:
        uniform = torch.rand_like(logits).clamp(_NOISE_EDGE, 1.0 - _NOISE_EDGE)
        logits = logits + torch.logit(uniform)
    scores = logits.detach()
    if movable is not None:
        scores = scores.masked_fill(~movable, -torch.inf)
    kept = scores > 0 if count is None else torch.zeros_like(scores, dtype=torch.bool)
    best = min(least if count is None else count, scores.shape[1])
    if best:
        kept = kept.scatter(1, scores.topk(best, dim=1, sorted=False).indices, True)
    if movable is not None:
        kept = kept | ~movable
    hard = kept.to(logits.dtype)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return hard
    soft = torch.sigmoid(logits / (1.0 if tau is None else tau))
    passed = hard + (soft - soft.detach())  # the bracket is exactly 0
    return passed if movable is None else torch.where(movable, passed, hard)


class Trimmers(nn.Module):
    """The trimmers of one encoder, by layer, and how they run now.

    Attributes:
        tokens: layer -> trimmer of the stack's own tokens in front of it.
        context: layer -> trimmer of the image tokens that it and later layers read.
        heads, cross_heads: layer -> trimmer of its self-attention's, its cross-attention's heads.
        keep, context_keep: layer -> tokens kept in buckets, beside the protected ones.
        repack: layers whose sites move packed tokens; None: all.
        mode, fixed, tau: see `XVLM.set_trimming`.
    """

    def __init__(
        self,
        config: TrimmingConfig,
        *,
        tokens: Mapping[int, tuple[int, int | None]] | None = None,
        context: Mapping[int, tuple[int, int | None]] | None = None,
        heads: Mapping[int, tuple[int, int]] | None = None,
        cross_heads: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        """Layer -> (width, guide width or None) of token trimmers, (width, heads) of the others."""
        super().__init__()
        self.config = config

        def token_trimmer(width: int, guide: int | None) -> TokenTrimmer:
            sizes = config.bottleneck, config.projection
            return TokenTrimmer(width, *sizes, guide, config.init_logit)

        def head_trimmer(width: int, count: int) -> HeadTrimmer:
            return HeadTrimmer(width, count, config.bottleneck, config.init_logit)

        self.tokens = nn.ModuleDict({str(i): token_trimmer(*s) for i, s in (tokens or {}).items()})
        self.context = nn.ModuleDict(
            {str(i): token_trimmer(*s) for i, s in (context or {}).items()}
        )
        # The heads of a layer with one head, or none, are not chosen among.
        self.heads = nn.ModuleDict(
            {str(i): head_trimmer(*s) for i, s in (heads or {}).items() if s[1] > 1}
        )
        self.cross_heads = nn.ModuleDict(
            {str(i): head_trimmer(*s) for i, s in (cross_heads or {}).items() if s[1] > 1}
        )
        self.keep: dict[int, int] = {}
        self.context_keep: dict[int, int] = {}
        self.repack: frozenset[int] | None = None
        self.mode: str = config.mode
        self.fixed = config.mode == "bucket"
        self.tau: float | None = 1.0

    def reset(self) -> None:
        """Fresh weights that keep everything."""
        for part in self.modules():
            if isinstance(part, TokenTrimmer | HeadTrimmer):
                part.reset()

    def take_mode(self, other: Trimmers) -> None:
        """Runs as `other` runs."""
        self.mode, self.fixed, self.tau = other.mode, other.fixed, other.tau

    @property
    def noise(self) -> float | None:
        """Temperature of the decisions' noise; None in evaluation."""
        return self.tau if self.training else None

    def check(self) -> None:
        """Raises ValueError in training when tokens would be moved: ranks would run other graphs."""
        if self.training and self.mode != "mask":
            raise ValueError(
                f'trimming mode "{self.mode}" is for inference; training masks: call '
                'set_trimming("mask"), or set_trimming("off") for the full pass'
            )

    def choose_heads(
        self,
        kind: str,
        layer: int,
        first: Tensor,
        other: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the attention of `layer` is told, and the decision (B, H).

        Args:
            kind: "heads" or "cross_heads".   first, other: as of `HeadTrimmer`.
            gates: (H,), of the attention: a head whose gate is 0 is dropped, and the one head that
                is always kept is one of the others, as when closed heads have been cut out.

        Returns:
            The decision itself, as factors; in modes that move tokens, for a single row, the heads
            that stay instead, (H',) int64.
        """
        trimmers: nn.ModuleDict = getattr(self, kind)
        logits = trimmers[str(layer)](first, other)
        if gates is None:
            kept = decide(logits, tau=self.noise)
        else:
            present = (gates != 0).expand_as(logits)
            kept = decide(logits, present, tau=self.noise) * present
        if self.mode in ("gather", "packed") and kept.shape[0] == 1:
            return kept[0].nonzero().squeeze(1), kept
        return salient(kept), kept
