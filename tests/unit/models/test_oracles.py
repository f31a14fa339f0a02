"""Independent implementations with the same weights: transformers' BERT and CLIP, and plain loops.

Weights are random, converted as files are; agreement 1e-5 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from models import presets
from models.checkpoints import build
from models.checkpoints.build import Options
from models.outputs import Capture

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
FULL = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
SIZES = [
    pytest.param(SMALL, id="tiny"),
    pytest.param(FULL, id="full", marks=pytest.mark.slow),
]


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms away from their trivial start, by no more than keeps activations near 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def converted(kind: str, state: dict[str, Tensor], sizes: dict) -> build.Conversion:
    # the part that is not under test as small as can be
    rest = {"heads": [1], "ffn": [8], "region_layers": 0, "width": 64, "image_size": 16}
    other = {"text": {"vocab_size": 8, "text_layers": 1, "heads": [1], "cross_heads": []}}
    other["text"] |= {"ffn": [8], "width": 64}
    unused = other if kind == "clip" else {"vision": rest}
    return build.build(kind, state, Options(sizes={**unused, **sizes}))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_bert(size):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=90, max_position_embeddings=24, **size)
    foreign = shaken(BertModel(config, add_pooling_layer=False))
    depth, heads = size["num_hidden_layers"], size["num_attention_heads"]
    text = {"head_dim": size["hidden_size"] // heads, "text_layers": depth, "cross_heads": []}
    model = converted("bert", dict(foreign.state_dict()), {"text": text}).model
    ids, mask = torch.randint(1, 90, (3, 17)), torch.ones(3, 17, dtype=torch.bool)
    mask[0, 9:], mask[1, 16:] = False, False
    theirs = foreign(ids, attention_mask=mask.long(), output_hidden_states=True)
    ours = model.encode_text(ids, mask, Capture.of(range(depth + 1)))
    close(ours.last[mask], theirs.last_hidden_state[mask])
    for index, state in ours.hidden.items():
        close(state[mask], theirs.hidden_states[index][mask])


@torch.no_grad()
def test_bert_with_old_norm_names_and_its_head():
    torch.manual_seed(0)
    foreign = shaken(BertForMaskedLM(BertConfig(vocab_size=90, **SMALL)))
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in foreign.state_dict().items()
    }
    text = {"head_dim": 16, "text_layers": 4, "cross_heads": []}
    model = converted("bert", old, {"text": text}).model
    ids, positions = torch.randint(1, 90, (2, 12)), torch.tensor([[0, 5], [11, 3]])
    logits = model.mlm_logits(model.encode_text(ids, None).last, positions)
    expected = torch.stack([foreign(ids).logits[row, positions[row]] for row in range(2)])
    close(logits, expected)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_clip_vision(size):
    torch.manual_seed(0)
    patch = 16 if size is FULL else 8
    config = CLIPVisionConfig(image_size=14 * patch, patch_size=patch, **size)
    foreign = shaken(CLIPVisionModel(config))
    head_dim = size["hidden_size"] // size["num_attention_heads"]
    sizes = {"vision": {"head_dim": head_dim}}
    made = converted("clip", dict(foreign.state_dict()), sizes)
    pixels = torch.randn(2, 3, 14 * patch, 14 * patch)
    theirs = foreign(pixels, output_hidden_states=True)
    depth = size["num_hidden_layers"]
    ours = made.model.encode_image(pixels, Capture.of(range(depth + 1)))
    assert ours.last.shape == (2, 197, size["hidden_size"])
    # transformers norms the class token only; X-VLM norms all tokens
    close(ours.last[:, 0], theirs.pooler_output)
    norm = foreign.get_submodule("post_layernorm")
    close(ours.last, norm(theirs.last_hidden_state))
    for index, state in ours.hidden.items():
        close(state, theirs.hidden_states[index])


@torch.no_grad()
def test_clip_with_another_activation():
    """What config.json says reaches the numbers: LAION's towers have the exact gelu."""
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    text = {**SMALL, "vocab_size": 50}
    foreign = shaken(CLIPModel(CLIPConfig(vision_config=vision, text_config=text)))
    sizes = build.sizes_beside("clip", foreign.config.to_dict(), Path("config.json"))
    made = converted("clip", dict(foreign.state_dict()), sizes)
    pixels = torch.randn(2, 3, 32, 32)
    theirs = foreign.get_submodule("vision_model")(pixels).pooler_output
    close(made.model.encode_image(pixels).last[:, 0], theirs)


# --- region masks, one row and one head at a time -------------------------------------------------


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def naive_block(
    state: dict[str, Tensor], place: str, x: Tensor, keys: Sequence[int], head_dim: int, eps: float
) -> Tensor:
    """One pre-norm block on one row x (P, D); queries read the listed keys only."""
    y = norm(state, f"{place}.norm1", x, eps)
    q, k, v = (linear(state, f"{place}.attention.{part}", y) for part in "qkv")
    mixed = torch.zeros_like(q)
    for start in range(0, q.shape[1], head_dim):
        head = slice(start, start + head_dim)
        for query in range(len(x)):
            scores = [float(q[query, head] @ k[key, head]) / math.sqrt(head_dim) for key in keys]
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            for weight, key in zip(weights, keys, strict=True):
                mixed[query, head] += weight / sum(weights) * v[key, head]
    x = x + linear(state, f"{place}.attention.out", mixed)
    hidden = linear(state, f"{place}.ffn.fc1", norm(state, f"{place}.norm2", x, eps))
    return x + linear(state, f"{place}.ffn.fc2", hidden * torch.sigmoid(1.702 * hidden))


@torch.no_grad()
def test_region_masks_against_a_loop_over_rows_heads_queries_and_keys():
    """Layers below the region layers see everything; from there on a row sees its region."""
    torch.manual_seed(0)
    vision = {"activation": "quick_gelu", "image_size": 24, "heads": (2,) * 4, "head_dim": 16}
    model = shaken(presets.create("blocksworld-micro-teacher", vision=vision))
    encoder = model.get_submodule("vision")
    state, config = dict(encoder.state_dict()), model.config.vision
    first = config.layers - config.region_layers
    assert 0 < first < config.layers
    images, index = torch.randn(2, 3, 24, 24), torch.tensor([1, 0, 1])
    mask = torch.zeros(3, config.tokens, dtype=torch.bool)
    mask[:, 0] = True
    mask[0, 3:5], mask[1, 9], mask[2, 1:] = True, True, True
    embedded = encoder.embeddings(images)
    everything = list(range(config.tokens))
    expected = []
    for row in range(3):
        x = embedded[int(index[row])]
        visible = [key for key in everything if bool(mask[row, key])]
        for layer in range(config.layers):
            keys = everything if layer < first else visible
            x = naive_block(state, f"blocks.{layer}", x, keys, config.head_dim, config.norm_eps)
        expected.append(norm(state, "norm", x, config.norm_eps))
    output = model.encode_image(images, region_mask=mask, image_index=index)
    close(output.rows.last, torch.stack(expected))
    close(output.full, model.encode_image(images).last)
