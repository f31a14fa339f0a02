"""The answer decoder of visual question answering: a causal BERT that reads the question's states.

Shape legend: A answers, La answer tokens, Ls question tokens, D width, V vocabulary.
Source: EfficientVLM (2210.07795) section 3; ALBEF (2107.07651) section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.bert import DecoderCache, TextEmbeddings, bert_layer, run_layers
from models.heads import TokenHead
from models.outputs import Capture, EncoderOutput
from models.part_configs import DecoderConfig, TextConfig

__all__ = ["AnswerDecoder", "DecoderOutput", "scored"]


@dataclass(kw_only=True)
class DecoderOutput(EncoderOutput):
    """An encoder output with the scores of the next token.

    Attributes:
        logits: (A, La, V); position t scores token t + 1.
    """

    logits: Tensor


def scored(output: EncoderOutput, logits: Tensor) -> DecoderOutput:
    """The output of a decoder's layers together with its logits (A, La, V)."""
    return DecoderOutput(
        last=output.last,
        hidden=output.hidden,
        attention=output.attention,
        cross_attention=output.cross_attention,
        mask=output.mask,
        trimming=output.trimming,
        logits=logits,
    )


class AnswerDecoder(nn.Module):
    """Own embeddings, layers with causal self-attention and cross-attention each, tied head."""

    def __init__(self, config: DecoderConfig, text: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(text)
        self.layers = nn.ModuleList(
            bert_layer(text, heads, units, cross_heads, text.width)
            for heads, units, cross_heads in zip(
                config.heads, config.ffn, config.cross_heads, strict=True
            )
        )
        self.head = TokenHead(text.width, text.vocab_size, text.norm_eps, text.word_width)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        states: Tensor,
        state_mask: Tensor | None,
        capture: Capture | None = None,
        cache: DecoderCache | None = None,
    ) -> DecoderOutput:
        """ids (A, La), mask (A, La) bool, states (C, Ls, D), state_mask (C, Ls) bool or
        float keep weights.

        A may be a multiple of C: each question then serves A / C consecutive answers. With a
        `cache`, ids are the tokens after those it has seen, and mask covers both.
        """
        output = run_layers(
            list(self.layers),
            self.embeddings(ids, 0 if cache is None else cache.length),
            mask,
            [(states, state_mask)],
            capture or Capture(),
            causal=True,
            cache=cache,
        )
        logits = self.head(output.last, word_weight=self.embeddings.word.weight)
        return scored(output, logits)
