"""The modules that stand beside the encoders, as the form says: heads, temperature, answer decoder.

Shape legend: as in `models.xvlm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from models.bert import TextStack
from models.config import HEADS, ModelConfig
from models.decoder import AnswerDecoder
from models.heads import ContrastiveTemperature, FeatureProjection, MlpHead, TokenHead

__all__ = ["FormHeads"]

_TOKEN_HEADS = ("mlm_head", "lm_head")  # their output weight is the text encoder's word table


class FormHeads(nn.Module):
    """What `XVLM` has beside its encoders; `config.HEADS` lists the modules of each form.

    A method that needs a module which the form has not raises a ValueError that says so.
    """

    config: ModelConfig
    text: TextStack
    image_projection: FeatureProjection
    text_projection: FeatureProjection
    contrastive: ContrastiveTemperature
    itm_head: MlpHead
    bbox_head: MlpHead
    cls_head: MlpHead
    mlm_head: TokenHead
    lm_head: TokenHead
    ta_head: nn.Linear
    decoder: AnswerDecoder | None

    def _add_heads(self) -> None:
        """Makes the modules of the form; the encoders stand already (their order in a state)."""
        self.decoder = None
        for name in HEADS[self.config.form]:
            setattr(self, name, _head(name, self.config))

    def _need(self, part: str) -> None:
        """Raises ValueError when the form has no such module."""
        if part not in HEADS[self.config.form]:
            raise ValueError(
                f"a model of form {self.config.form!r} has no {part}; it has "
                f"{', '.join(HEADS[self.config.form])}"
            )

    def image_feature(self, image_states: Tensor) -> Tensor:
        """(N, P, D) -> (N, E) float32, unit rows."""
        self._need("image_projection")
        return self.image_projection(image_states)

    def text_feature(self, text_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, E) float32, unit rows."""
        self._need("text_projection")
        return self.text_projection(text_states)

    def temperature(self) -> Tensor:
        """(1,) float32 in [0.001, 0.5]; similarities are divided by it."""
        self._need("contrastive")
        return self.contrastive()

    def match_logits(self, fused: Tensor) -> Tensor:
        """(B, L, D) -> (B, 2); class 1 says that image and text belong together."""
        self._need("itm_head")
        return self.itm_head(fused)

    def predict_box(self, fused: Tensor) -> Tensor:
        """(B, L, D) -> (B, 4) float32 normalised (cx, cy, w, h)."""
        self._need("bbox_head")
        return self.bbox_head(fused).float().sigmoid()

    def truth_logits(self, fused: Tensor) -> Tensor:
        """NLVR2: (B, L, D) -> (B, 2); class 1 says that the sentence is true of the two images."""
        self._need("cls_head")
        return self.cls_head(fused)

    def assignment_logits(self, fused: Tensor) -> Tensor:
        """Domain stage of NLVR2: (B, L, D) -> (B, 3); the text fits image 0, image 1, or neither."""
        self._need("ta_head")
        return self.ta_head(fused[:, 0])

    def mlm_logits(self, states: Tensor, positions: Tensor) -> Tensor:
        """states (B, L, D), positions (B, M) int64 -> (B, M, V)."""
        self._need("mlm_head")
        return self.mlm_head(states, positions, word_weight=self.text.embeddings.word.weight)

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter) pairs where a module's forward reads a parameter it does not own.

        An engine that partitions parameters registers each (ZeRO-3: register_external_parameter).
        """
        pairs: list[tuple[nn.Module, Tensor]] = [
            (getattr(self, name), self.text.embeddings.word.weight)
            for name in HEADS[self.config.form]
            if name in _TOKEN_HEADS
        ]
        if self.decoder is not None:
            pairs.append((self.decoder.head, self.decoder.embeddings.word.weight))
        return cast(list[tuple[nn.Module, nn.Parameter]], pairs)

    def touch(self, names: Iterable[str]) -> Tensor:
        """A zero that depends on every parameter of the named parts, through their own forwards.

        For steps in which a part has nothing to do: sharded engines need a gradient for each
        parameter in every step. Names: the form's modules in `config.HEADS`; the contrastive
        temperature goes by the name "temperature" too.

        Returns:
            A float32 scalar, exactly 0.

        Raises:
            ValueError: on a part that this model does not have.
        """
        word = self.text.embeddings.word.weight  # only device and dtype are read here
        total = torch.zeros((), device=word.device)
        for name in sorted(names):  # sorted: every rank runs the modules in one order
            total = total + 0.0 * self._dummy_run(name, word).float().sum()
        return total

    def _dummy_run(self, name: str, word: Tensor) -> Tensor:
        name = "contrastive" if name == "temperature" else name
        if name not in HEADS[self.config.form]:
            known = ", ".join(HEADS[self.config.form])
            raise ValueError(
                f"touch: no part {name!r} in a model of form {self.config.form!r}; it has {known}"
            )
        part = getattr(self, name)
        width = self.config.vision.width if name == "image_projection" else self.config.text.width
        tokens = self.config.fused_tokens
        states = torch.ones(1, tokens, width, device=word.device, dtype=word.dtype)
        if isinstance(part, AnswerDecoder):
            ids = torch.zeros(1, 1, dtype=torch.int64, device=word.device)
            return part(ids, None, states, None).logits
        if isinstance(part, ContrastiveTemperature):
            return part()
        return part(states, word_weight=word) if name in _TOKEN_HEADS else part(states)


def _head(name: str, config: ModelConfig) -> nn.Module:
    """A module that stands beside the encoders, by its name in `HEADS`."""
    text, width, tokens = config.text, config.text.width, config.fused_tokens
    if name == "decoder":
        assert config.decoder is not None  # the configuration checks it
        return AnswerDecoder(config.decoder, text)
    makers: dict[str, Callable[[], nn.Module]] = {
        "image_projection": lambda: FeatureProjection(config.vision.width, config.embed_dim),
        "text_projection": lambda: FeatureProjection(width, config.embed_dim),
        "contrastive": ContrastiveTemperature,
        "itm_head": lambda: MlpHead(width, 2, tokens),
        "bbox_head": lambda: MlpHead(width, 4, tokens),
        "mlm_head": lambda: TokenHead(width, text.vocab_size, text.norm_eps, text.word_width),
        "lm_head": lambda: TokenHead(width, text.vocab_size, text.norm_eps, text.word_width),
        "cls_head": lambda: MlpHead(width, 2, tokens),
        "ta_head": lambda: nn.Linear(width, 3),
    }
    return makers[name]()
