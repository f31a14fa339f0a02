"""The answer decoder of visual question answering: a causal BERT that reads the question's states.

Shape legend: A answers, La answer tokens, Ls question tokens, D width, V vocabulary.
Source: EfficientVLM (2210.07795) section 3; ALBEF (2107.07651) section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.bert import TextEmbeddings, bert_layer, run_layers
from models.config import DecoderConfig, TextConfig
from models.heads import TokenHead
from models.outputs import Capture, EncoderOutput

__all__ = ["AnswerDecoder", "DecoderOutput"]


@dataclass(kw_only=True)
class DecoderOutput(EncoderOutput):
    """An encoder output with the scores of the next token.

    Attributes:
        logits: (A, La, V); position t scores token t + 1.
    """

    logits: Tensor


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
        self.head = TokenHead(text.width, text.vocab_size, text.norm_eps)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        states: Tensor,
        state_mask: Tensor | None,
        capture: Capture | None = None,
    ) -> DecoderOutput:
        """ids (A, La), mask (A, La) bool, states (A, Ls, D), state_mask (A, Ls) bool."""
        output = run_layers(
            list(self.layers),
            self.embeddings(ids),
            mask,
            states,
            state_mask,
            capture or Capture(),
            causal=True,
        )
        logits = self.head(output.last, word_weight=self.embeddings.word.weight)
        return DecoderOutput(
            last=output.last,
            hidden=output.hidden,
            attention=output.attention,
            cross_attention=output.cross_attention,
            logits=logits,
        )
