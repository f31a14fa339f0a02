"""DeepSpeed's fused inference kernels for the text layers of a frozen model. Opt-in, on a GPU.

They fit few models (DeepSpeed 0.19.8, model_implementations/transformers/ds_transformer.py and
csrc/transformer/inference): self-attention and feed-forward of a post-norm encoder layer, no
cross-attention; every head of every layer present; GELU in its tanh form only; and no attention
inputs come out, so kd.attention must be "none". The vision tower (pre-norm, quick_gelu) and the
fusion layers keep their own code. What remains is checked here; what the kernels compute is checked
by `Teacher` against the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.layers import BertLayer, FeedForward
from models.xvlm import XVLM
from train.config import UserError

__all__ = ["inject_text_layers"]

_HIDDEN = -10000.0  # the additive mask that the kernels expect


def inject_text_layers(model: XVLM, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Runs the text layers of `model` through DeepSpeedTransformerInference; returns how to undo it.

    The layers keep their own weights beside the kernels' transposed copies (14 MB a layer of
    BERT-base in fp16). The kernels' workspace belongs to the process: one injected model at a time.

    Raises:
        UserError: the device or a layer does not fit, naming what and why.
    """
    if device.type != "cuda":
        raise UserError(f"teacher.inject: DeepSpeed's kernels need a GPU, this is {device.type}")
    config = model.config.text
    layers = [cast(BertLayer, layer) for layer in list(model.text.layers)[: config.text_layers]]
    for index, layer in enumerate(layers):
        reason = _misfit(layer, config.activation)
        if reason is not None:
            raise UserError(
                f"teacher.inject: text layer {index} {reason}; leave teacher.inject out"
            )
    injected = [_Injected(layer, len(layers), dtype, device) for layer in layers]
    for layer, kernels in zip(layers, injected, strict=True):
        # On the instance: hooks, names and the layer's class stay what they are.
        layer.forward = kernels  # type: ignore[method-assign]

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


def _misfit(layer: BertLayer, activation: str) -> str | None:
    attention, ffn = layer.attention, layer.ffn
    if layer.has_cross:
        return "has cross-attention, which the kernels drop"
    if attention.heads * attention.head_dim != attention.width or not attention.qkv_bias:
        return "is pruned or has no attention biases"
    if ffn.units != 4 * attention.width:
        return f"has {ffn.units} feed-forward units, not 4 x {attention.width}"
    if activation not in ("gelu", "gelu_tanh"):
        return f"has the activation {activation}"
    return None


class _Injected:
    """Stands in for `BertLayer.forward`."""

    def __init__(
        self, layer: BertLayer, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        from deepspeed.model_implementations.transformers.ds_bert import DeepSpeedBERTInference
        from deepspeed.ops.transformer.inference.config import DeepSpeedInferenceConfig

        attention, ffn = layer.attention, layer.ffn
        self.kernels: Any = DeepSpeedBERTInference(
            DeepSpeedInferenceConfig(
                hidden_size=attention.width,
                intermediate_size=ffn.units,
                heads=attention.heads,
                num_hidden_layers=layers,
                layer_norm_eps=layer.ffn_norm.eps,
                dtype=dtype,
                pre_layer_norm=False,
                triangular_masking=False,
                return_tuple=False,
            )
        ).to(device)
        _copy_weights(self.kernels, attention, ffn, layer)

    def __call__(
        self, x: Tensor, mask: Tensor | None, *args: Any, trace: bool = False, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """x (B, L, D), mask (B, L) bool, as `BertLayer.forward`.

        Raises:
            UserError: the attention's inputs are wanted, which never leave the kernels.
        """
        if trace or kwargs.get("causal") or kwargs.get("cache") is not None:
            raise UserError(
                "teacher.inject: the injected kernels return no attention inputs and are not "
                "causal; set kd.attention=none or leave teacher.inject out"
            )
        additive = None
        if mask is not None:
            additive = (~mask[:, None, None, :]).to(x.dtype) * _HIDDEN
        # The kernels add the residual in place, and their result lies in a workspace that the next
        # layer overwrites: copies on both sides.
        output = self.kernels(x.clone(), attention_mask=additive)
        return output.clone(), None, None


def _copy_weights(kernels: Any, attention: Attention, ffn: FeedForward, layer: BertLayer) -> None:
    """The kernels multiply from the right: weights are stored transposed, (in, out)."""
    assert isinstance(attention.out, nn.Linear) and isinstance(ffn.fc2, nn.Linear)
    q, k, v = attention.q, attention.k, attention.v
    pairs = [
        (kernels.attention.attn_qkvw, torch.cat([q.weight, k.weight, v.weight]).t()),
        (kernels.attention.attn_qkvb, torch.cat([q.bias, k.bias, v.bias])),
        (kernels.attention.attn_ow, attention.out.weight.t()),
        (kernels.attention.attn_ob, attention.out.bias),
        (kernels.mlp.attn_nw, layer.attention_norm.weight),
        (kernels.mlp.attn_nb, layer.attention_norm.bias),
        (kernels.mlp.inter_w, ffn.fc1.weight.t()),
        (kernels.mlp.inter_b, ffn.fc1.bias),
        (kernels.mlp.output_w, ffn.fc2.weight.t()),
        (kernels.mlp.output_b, ffn.fc2.bias),
        (kernels.norm_w, layer.ffn_norm.weight),
        (kernels.norm_b, layer.ffn_norm.bias),
    ]
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
