"""Text encoders of transformers, tiny and random, against the text stack with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from models import presets
from models.checkpoints import hf_text
from models.xvlm import XVLM

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertConfig, hf.BertForMaskedLM, SIZES),
    "bert tanh": (hf.BertConfig, hf.BertForMaskedLM, SIZES | {"hidden_act": "gelu_new"}),
    "roberta": (hf.RobertaConfig, hf.RobertaForMaskedLM, SIZES | {"type_vocab_size": 1}),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaForMaskedLM, SIZES | {"pad_token_id": 3}),
    "distilbert": (
        hf.DistilBertConfig,
        hf.DistilBertForMaskedLM,
        {
            "vocab_size": 60,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 48,
            "max_position_embeddings": 24,
        },
    ),
    "electra": (hf.ElectraConfig, hf.ElectraForMaskedLM, SIZES | {"embedding_size": 32}),
    "electra small": (hf.ElectraConfig, hf.ElectraForMaskedLM, SIZES | {"embedding_size": 16}),
}


def foreign(name: str) -> Any:
    torch.manual_seed(0)
    kind, head, sizes = FAMILIES[name]
    model = head(kind(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(model: Any, folder: Path, **text: Any) -> XVLM:
    """A model whose text stack has the foreign shape, by the saved config.json."""
    model.config.save_pretrained(folder)
    section = {"backbone": f"hf/{folder}", "ffn_gate": "post", **text}
    return XVLM(presets.config("blocksworld-micro-student", text=section)).eval()


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids without any family's pad id in the text, padded on the right."""
    torch.manual_seed(1)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:], mask[1, 7:] = False, False
    return torch.randint(5, 60, (3, 9)), mask


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_states_and_masked_token_scores_agree(name, tokens, tmp_path):
    theirs = foreign(name)
    model = ours(theirs, tmp_path, text_layers=3)
    report = hf_text.load(model, theirs.state_dict())
    assert report.unexpected == []
    text = [key for key in report.missing if key.startswith(("text.", "mlm_head."))]
    assert text == [] and set(report.renamed) <= set(theirs.state_dict())
    ids, mask = tokens
    ids = ids.masked_fill(~mask, model.config.text.pad_id)
    output = theirs(ids, attention_mask=mask.long(), output_hidden_states=True)
    states = model.encode_text(ids, mask).last
    torch.testing.assert_close(states[mask], output.hidden_states[-1][mask], atol=1e-5, rtol=1e-5)
    if name == "bert tanh":  # its head follows the layers' activation, ours is always exact
        return
    positions = torch.arange(9).expand(3, -1)
    logits = model.mlm_logits(states, positions)
    torch.testing.assert_close(logits[mask], output.logits[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_alone_fills_the_stack_but_for_cross_attention(name, tmp_path):
    theirs = foreign(name).base_model
    model = ours(theirs, tmp_path)
    assert (model.config.text.text_layers, model.config.text.fusion_layers) == (1, 2)
    report = hf_text.load(model, theirs.state_dict())
    missing = [key for key in report.missing if key.startswith("text.")]
    assert missing and all(".cross_" in key for key in missing)
    assert all(key.startswith("text.") for key in report.loaded)


@torch.no_grad()
def test_as_many_tokens_as_the_family_reads(tmp_path):
    theirs = foreign("roberta")
    model = ours(theirs, tmp_path, text_layers=3)
    hf_text.load(model, theirs.state_dict())
    ids = torch.randint(5, 60, (1, 22))
    expected = theirs.roberta(ids).last_hidden_state
    torch.testing.assert_close(model.encode_text(ids, None).last, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="23 tokens, but text.max_positions is 22"):
        model.encode_text(torch.randint(5, 60, (1, 23)), None)


def test_electras_discriminator_has_no_place_and_its_projection_a_place(tmp_path):
    torch.manual_seed(0)
    kind, _, sizes = FAMILIES["electra small"]
    theirs = hf.ElectraForPreTraining(kind(**sizes))
    model = ours(theirs, tmp_path)
    report = hf_text.load(model, theirs.state_dict())
    assert "discriminator_predictions.dense.weight" in report.ignored
    assert report.renamed["electra.embeddings_project.bias"] == ["text.embeddings.projection.bias"]
    assert torch.equal(
        model.text.embeddings.projection.weight, theirs.electra.embeddings_project.weight
    )
    state = dict(theirs.state_dict())
    del state["electra.embeddings_project.weight"]
    with pytest.raises(ValueError, match=r"projection does not fit the model: missing weight"):
        hf_text.load(model, state)


def test_layers_can_be_chosen_and_errors_name_the_file_s_keys(tmp_path):
    theirs = foreign("distilbert")
    model = ours(theirs, tmp_path, heads=(2, 2), ffn=(48, 48))
    hf_text.load(model, theirs.state_dict(), layer_map=(0, 2))
    source = theirs.distilbert.transformer.layer[2]
    assert torch.equal(model.text.layers[1].ffn.fc1.weight, source.ffn.lin1.weight)
    state = theirs.state_dict() | {"qa_outputs.weight": torch.zeros(2, 32)}
    with pytest.raises(ValueError, match=r"unexpected qa_outputs\.weight"):
        hf_text.load(model, state, layer_map=(0, 2))


def test_other_forms_work_with_narrow_word_tables():
    """The answer decoder has embeddings and a tied head of its own."""
    config = presets.config("blocksworld-micro-student", form="vqa", text={"word_width": 16})
    model = XVLM(config).eval()
    states = torch.randn(1, 4, 32)
    assert model.decode(torch.ones(1, 3, dtype=torch.int64), None, states, None).logits.shape == (
        1,
        3,
        256,
    )
