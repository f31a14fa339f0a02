"""The text stack against transformers' BERT, and its own rules."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from models import presets
from models.checkpoints import bert as converter
from models.outputs import Capture
from models.xvlm import XVLM


def our_model(text_layers: int = 3, fusion_layers: int = 0, **overrides) -> XVLM:
    layers = text_layers + fusion_layers
    text = {
        "vocab_size": 60,
        "max_positions": 20,
        "text_layers": text_layers,
        "heads": (1,) * layers,
        "cross_heads": (1,) * fusion_layers,
        "ffn": (48,) * layers,
        **overrides,
    }
    return presets.create("blocksworld-micro-student", text=text).eval()


def foreign_config(layers: int = 3) -> BertConfig:
    return BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=1,
        intermediate_size=48,
        max_position_embeddings=20,
    )


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its trivial start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:], mask[1, 7:] = False, False
    return torch.randint(1, 60, (3, 9)), mask


@torch.no_grad()
def test_transformers_bert_loads_and_agrees(tokens):
    ids, mask = tokens
    foreign = shaken(BertModel(foreign_config(), add_pooling_layer=True))
    model = our_model()
    report = converter.load(model, foreign.state_dict())
    assert report.unexpected == [] and any("pooler" in key for key in report.ignored)
    ours = model.encode_text(ids, mask, Capture.of(range(4)))
    theirs = foreign(ids, attention_mask=mask.long(), output_hidden_states=True)
    torch.testing.assert_close(ours.last[mask], theirs.last_hidden_state[mask])
    for index, state in ours.hidden.items():
        torch.testing.assert_close(state[mask], theirs.hidden_states[index][mask])


@torch.no_grad()
def test_masked_token_head_agrees(tokens):
    ids, mask = tokens
    foreign = shaken(BertForMaskedLM(foreign_config()))
    model = our_model()
    report = converter.load(model, foreign.state_dict())
    assert not [key for key in report.missing if key.startswith("mlm_head")]
    positions = torch.tensor([[0, 3], [6, 1], [2, 2]])
    logits = model.mlm_logits(model.encode_text(ids, mask).last, positions)
    theirs = foreign(ids, attention_mask=mask.long()).logits
    expected = torch.stack([theirs[row, positions[row]] for row in range(3)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_old_norm_names_and_the_layer_map():
    foreign = shaken(BertModel(foreign_config(4), add_pooling_layer=False))
    old = {
        f"bert.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in foreign.state_dict().items()
    }
    model = our_model(1, 1)
    report = converter.load(model, old)
    for ours, theirs in ((0, 1), (1, 3)):
        layer, source = model.text.layers[ours], foreign.encoder.layer[theirs]
        assert torch.equal(layer.attention_norm.weight, source.attention.output.LayerNorm.weight)
        assert torch.equal(layer.ffn.fc1.weight, source.intermediate.dense.weight)
    assert torch.equal(model.text.embeddings.norm.bias, foreign.embeddings.LayerNorm.bias)
    assert any(key.startswith("bert.encoder.layer.0.") for key in report.ignored)
    assert all(".cross_" in key for key in report.missing if key.startswith("text."))


def test_what_is_missing_is_an_error_unless_allowed():
    state = dict(BertModel(foreign_config()).state_dict())
    del state["encoder.layer.1.output.dense.weight"]
    with pytest.raises(ValueError, match=r"missing text\.layers\.1\.ffn\.fc2\.weight"):
        converter.load(our_model(), state)
    report = converter.load(our_model(), state, allow_missing=["text.layers.1.ffn"])
    assert "text.layers.1.ffn.fc2.weight" in report.missing
    with pytest.raises(ValueError, match="unexpected something"):
        converter.load(our_model(), {**BertModel(foreign_config()).state_dict(), "something": 0})
    with pytest.raises(ValueError, match="no BERT layers"):
        converter.load(our_model(), {})


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="21 tokens, but text.max_positions is 20"):
        our_model().encode_text(torch.ones(1, 21, dtype=torch.int64), None)


@torch.no_grad()
def test_padding_does_not_reach_real_tokens(tokens):
    ids, mask = tokens
    model = our_model(1, 1)
    image = torch.randn(3, 5, 32)
    changed = torch.where(mask, ids, (ids + 1) % 60)
    before = model.multimodal(ids, mask, image).last[mask]
    torch.testing.assert_close(model.multimodal(changed, mask, image).last[mask], before)


def test_the_pad_row_gets_no_gradient_from_the_embedding(tokens):
    model = our_model()
    ids = tokens[0].clone()
    ids[:, 0] = 0
    assert not model.text.embeddings.word.weight[0].any()
    model.encode_text(ids, None).last.pow(3).sum().backward()
    gradient = model.text.embeddings.word.weight.grad
    assert not gradient[0].any() and gradient[ids[0, 1]].any()
