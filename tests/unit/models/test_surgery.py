"""The slim model computes what the masked model computes, and its size is counted exactly."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from models import presets
from models.gates import GateBank
from models.pruning.structure import meet_budget
from models.pruning.surgery import prune, sparsity_report, widths, with_widths
from models.xvlm import XVLM

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EMPTY = {
    "nothing": (),
    "heads": ("vision.0.heads", "text.0.heads", "fusion.0.self_heads", "fusion.0.cross_heads"),
    "ffn": ("vision.1.ffn", "text.0.ffn", "fusion.0.ffn"),
    "everything": None,
}


def make_model(form: str = "vqa", **overrides) -> XVLM:
    """Four heads of 16 a layer, weights and biases away from zero, in evaluation mode."""
    torch.manual_seed(0)
    small = {
        "vision": {"width": 64, "head_dim": 16, "heads": [4, 4], "ffn": [48, 40]},
        "text": {
            "width": 64,
            "head_dim": 16,
            "vocab_size": 60,
            "heads": [4, 4],
            "cross_heads": [4],
            "ffn": [48, 32],
        },
    }
    values = presets.config("blocksworld-micro-student", **small).as_form(form).to_dict()
    for key, value in overrides.items():
        section, name = key.split("__")
        values[section][name] = value
    model = XVLM(type(presets.config("efficientvlm")).from_dict(values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def random_gates(model: XVLM, empty=(), soft: bool = False, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for name, slot in model.gate_slots().items():
        z = (torch.rand(slot.units, generator=generator) > 0.4).float()
        if soft:
            z *= torch.rand(slot.units, generator=generator)
        gates[name] = z * 0 if empty is None or name in empty else z
    return gates


def outputs(model: XVLM) -> list[Tensor]:
    """Everything that the encoders and heads of the model compute on one batch."""
    generator = torch.Generator().manual_seed(2)
    size = model.config.vision.image_size
    images = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, 60, (3, 7), generator=generator)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 2 + [False] * 5])
    with torch.no_grad():
        image = model.encode_image(images).last
        fused = model.multimodal(ids, mask, image).last
        results = [image, fused]
        if model.decoder is not None:
            return [*results, model.decode(ids[:, :4], mask[:, :4], fused, mask).logits]
        regions = torch.rand(3, image.shape[1], generator=generator) > 0.5
        regions[:, 0] = True
        index = torch.tensor([2, 0, 2])
        region = model.encode_image(images, region_mask=regions, image_index=index)
        results += [region.rows.last, region.full, model.match_logits(fused)]
        return [*results, model.image_feature(image), model.predict_box(fused)]


def masked_outputs(model: XVLM, gates: dict[str, Tensor]) -> list[Tensor]:
    slots = model.gate_slots()
    for name, z in gates.items():
        slots[name].z = z
    try:
        return outputs(model)
    finally:
        for slot in slots.values():
            slot.z = None


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("form", ["pretrain", "vqa"])
def test_slim_agrees_with_masked(form, empty):
    model = make_model(form)
    gates = random_gates(model, empty)
    slim = prune(model, gates)
    for ours, expected in zip(outputs(slim), masked_outputs(model, gates), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    assert widths(slim.config) == {name: int(z.sum()) for name, z in gates.items()}
    assert not any(tensor.is_meta for tensor in slim.state_dict().values())
    assert all(parameter.requires_grad for parameter in slim.parameters())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
@pytest.mark.parametrize(("vision_gate", "text_gate"), [("pre", "post"), ("post", "pre")])
def test_soft_gates_are_folded(vision_gate, text_gate, activation):
    model = make_model(
        vision__ffn_gate=vision_gate, text__ffn_gate=text_gate, vision__activation=activation
    )
    gates = random_gates(model, soft=True)
    slim, expected = prune(model, gates), masked_outputs(model, gates)
    for ours, theirs in zip(outputs(slim), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    hard = prune(model, {name: (z != 0).float() for name, z in gates.items()})
    assert not torch.allclose(outputs(hard)[0], expected[0], atol=1e-3)


def test_gates_make_a_difference():
    """Guards the tests above: a slot that nobody reads would make them pass for nothing."""
    model = make_model()
    dense = outputs(model)
    for name, slot in model.gate_slots().items():
        changed = masked_outputs(model, {name: torch.zeros(slot.units)})
        assert not torch.allclose(changed[-1], dense[-1], atol=1e-6), name


def test_open_gates_copy_bit_for_bit_and_leave_the_model_alone():
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    slim = prune(model, {name: torch.ones(s.units) for name, s in model.gate_slots().items()})
    assert slim.config == model.config
    for key, value in slim.state_dict().items():
        assert torch.equal(value, before[key])
        value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_slots_left_out_keep_their_units_and_no_random_number_is_drawn():
    model = make_model()
    state = torch.get_rng_state()
    slim = prune(model, {"text.0.ffn": torch.zeros(48)})
    assert torch.equal(torch.get_rng_state(), state)
    assert widths(slim.config) == {**widths(model.config), "text.0.ffn": 0}


def test_pruning_twice_equals_pruning_once():
    model = make_model()
    first, second = random_gates(model, seed=1), random_gates(model, seed=2)
    both = {name: first[name] * second[name] for name in first}
    rest = {name: second[name][first[name] != 0] for name in first}
    twice, once = prune(prune(model, first), rest), prune(model, both)
    assert twice.config == once.config
    for key, value in twice.state_dict().items():
        assert torch.equal(value, once.state_dict()[key])


def test_mode_and_half_precision_survive():
    model = make_model().half().train()
    slim = prune(model, random_gates(model, soft=True))
    assert slim.training and {p.dtype for p in slim.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"vision.9.ffn": torch.ones(48)}, r"vision\.9\.ffn"),
        ({"vision.0.ffn": torch.ones(47)}, "47 values for 48 units"),
        ({"vision.0.heads": torch.full((4,), 1.5)}, r"\[0, 1\]"),
        ({"vision.0.heads": torch.full((4,), torch.nan)}, r"\[0, 1\]"),
    ],
)
def test_wrong_gates_are_refused(gates, message):
    with pytest.raises(ValueError, match=message):
        prune(make_model(), gates)


def test_slim_model_survives_saving(tmp_path):
    model = make_model()
    slim = prune(model, random_gates(model, EMPTY["heads"]))
    slim.save_pretrained(tmp_path)
    loaded = XVLM.from_pretrained(tmp_path)
    assert loaded.config == slim.config
    for ours, expected in zip(outputs(loaded), outputs(slim), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY.keys())
def test_report_counts_exactly(empty):
    model = make_model()
    gates = random_gates(model, empty)
    slim = prune(model, gates)
    report = json.loads(json.dumps(sparsity_report(model, slim)))
    sizes, prunable = report["parameters"], report["prunable"]
    assert sizes["before"] == sum(p.numel() for p in model.parameters())
    assert sizes["after"] == sum(p.numel() for p in slim.parameters())
    assert sizes["before"] - sizes["after"] == prunable["total"] - prunable["kept"]
    for number in ("kept", "total"):
        assert prunable[number] == sum(m[number] for m in report["modalities"].values())
    assert list(report["modalities"]) == ["vision", "text", "fusion", "decoder"]
    assert {e["slot"]: e["kept"] for e in report["layers"]} == widths(slim.config)
    bank = GateBank.of_model(model)
    assert bank.total == prunable["total"]
    sparsity = float(bank.actual_sparsity(bank.join(gates)))
    assert sparsity == pytest.approx(prunable["sparsity"], abs=1e-12)


def test_exported_size_is_on_target():
    """From the bank's exact budget to the parameters of the slim model: within a tenth of a
    point."""
    model = make_model()
    bank = GateBank.of_model(model)
    bank.log_alpha.data.copy_(torch.randn(bank.gates, generator=torch.Generator().manual_seed(0)))
    slim = prune(model, bank.split(meet_budget(bank, 0.35)))
    assert sparsity_report(model, slim)["prunable"]["sparsity"] == pytest.approx(0.35, abs=1e-3)


def test_report_of_some_modalities_and_of_strangers():
    model = make_model()
    slim = prune(model, {"vision.0.ffn": torch.zeros(48)})
    only = sparsity_report(model, slim, ("vision",))
    assert only["prunable"] == only["modalities"]["vision"]
    assert only["prunable"]["sparsity"] > sparsity_report(model, slim)["prunable"]["sparsity"]
    with pytest.raises(ValueError, match="not a pruned form"):
        sparsity_report(slim, model)
    with pytest.raises(ValueError, match="not a pruned form"):
        sparsity_report(make_model("pretrain"), model)


def test_widths_round_trip():
    config = make_model().config
    changed = with_widths(config, {"fusion.0.cross_heads": 1, "decoder.0.self_heads": 0})
    expected = {**widths(config), "fusion.0.cross_heads": 1, "decoder.0.self_heads": 0}
    assert widths(changed) == expected
    assert widths(config) == {n: s.units for n, s in make_model().gate_slots().items()}
    with pytest.raises(ValueError, match=r"fusion\.1\.ffn"):
        with_widths(config, {"fusion.1.ffn": 1})


def test_published_prunable_totals():
    """Exact counts stay close to the published totals, which also count the output biases as
    removable."""
    for form, published in (("pretrain", 92_104_704), ("vqa", 120_446_208)):
        config = presets.config("efficientvlm", form=form)
        with torch.device("meta"):
            model = XVLM(config)
        costs = model.parameters_per_unit()
        total = sum(units * costs[name] for name, units in widths(config).items())
        biases = 768 * len(costs)
        assert total + biases == published


def nlvr2_outputs(model: XVLM, gates: dict[str, Tensor] | None = None) -> list[Tensor]:
    """What the fusion of two images gives, with `gates` in the slots."""
    for name, slot in model.gate_slots().items():
        slot.z = None if gates is None or name not in gates else gates[name]
    generator = torch.Generator().manual_seed(3)
    size = model.config.vision.image_size
    ids = torch.randint(5, 60, (2, 6), generator=generator)
    pictures = torch.randn(4, 3, size, size, generator=generator)
    with torch.no_grad():
        first, second = model.encode_image(pictures).last.chunk(2)
        fused = model.multimodal(ids, torch.ones(2, 6, dtype=torch.bool), (first, second))
        result = [fused.last, model.truth_logits(fused.last)]
    for slot in model.gate_slots().values():
        slot.z = None
    return result


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "empty", [(), ("fusion.0.cross_heads",), ("fusion.0.cross_heads", "fusion.1.cross_heads")]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pairs_of_layers_keep_the_keys_that_either_still_reads(soft, empty, seed):
    model = make_model("nlvr2")
    gates = random_gates(model, empty, soft, seed)
    slim = prune(model, gates)
    for one, two in zip(nlvr2_outputs(slim), nlvr2_outputs(model, gates), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    first, second = (gates[f"fusion.{n}.cross_heads"] != 0 for n in (0, 1))
    assert slim.config.text.pair_heads == (int((first | second).sum()),)
    report = sparsity_report(model, slim)
    lost = report["parameters"]["before"] - report["parameters"]["after"]
    assert lost == report["prunable"]["total"] - report["prunable"]["kept"]

    # A slim model may be cut again.
    again = {name: z[z != 0] for name, z in gates.items()}
    more = {name: torch.ones(len(z)) for name, z in again.items()}
    more["fusion.1.cross_heads"][:1] = 0.0
    slimmer = prune(slim, more)
    for one, two in zip(nlvr2_outputs(slimmer), nlvr2_outputs(slim, more), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
