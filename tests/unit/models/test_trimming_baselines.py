"""Baselines of trimming against loops over single pictures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import presets
from models.layers import ViTBlock
from models.trim_config import TrimmingConfig
from models.trimmers import TokenTrimmer
from models.trimming import baselines, with_trimming
from models.trimming.baselines import ClassAttention, Merging, Tokens
from models.xvlm import XVLM

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
STEPPED = ("evit", "evit-fused", "tome")


def model(**vision: Any) -> XVLM:
    """Three blocks of two heads on 16 patches, with weights that make tokens differ."""
    torch.manual_seed(3)
    values = {"heads": (2, 2, 2), "ffn": (32,) * 3, "head_dim": 16, "image_size": 32} | vision
    made = XVLM(presets.config("blocksworld-micro-teacher", form="vqa", vision=values))
    with torch.no_grad():
        for parameter in made.vision.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return made.eval().double()  # sums are taken in another order: not a test of rounding


def pictures(made: XVLM, rows: int = 3) -> Tensor:
    size = made.config.vision.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, size, size, generator=generator).double()


def attend(block: ViTBlock, x: Tensor, sizes: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one picture x (N, D) written out, in which key j is there sizes[j] times."""
    part, normed = block.attention, block.norm1(x)
    q, k, v = (linear(normed).reshape(len(x), 2, 16) for linear in (part.q, part.k, part.v))
    rows, first = [], torch.zeros(len(x))
    for i in range(len(x)):
        heads = []
        for h in range(2):
            weight = torch.stack(
                [s * torch.exp(q[i, h] @ k[j, h] / 4) for j, s in enumerate(sizes)]
            )
            weight = weight / weight.sum()
            heads.append(sum(w * v[j, h] for j, w in enumerate(weight)))
            if i == 0:
                first = first + weight / 2
        rows.append(torch.cat(heads))  # type: ignore[arg-type]
    return x + part.out(torch.stack(rows)), k.mean(1), first


def evit(x: Tensor, first: Tensor, count: int, fused: bool) -> Tensor:
    """The best patches of one picture, by a loop."""
    if len(x) - 1 <= count:
        return x
    ranked = sorted(range(1, len(x)), key=lambda j: -float(first[j]))
    kept, rest = sorted(ranked[:count]), ranked[count:]
    rows = [x[0], *(x[j] for j in kept)]
    if fused:
        rows.append(torch.stack([first[j] * x[j] for j in rest]).sum(0))
    return torch.stack(rows)


def tome(x: Tensor, keys: Tensor, sizes: list[float], count: int) -> tuple[Tensor, list[float]]:
    """Merged patches of one picture, pair by pair."""
    cosine = torch.nn.functional.cosine_similarity
    groups = {j: [j] for j in range(len(x))}
    edges = []
    for a in range(1, len(x), 2):
        b = max(range(2, len(x), 2), key=lambda b: float(cosine(keys[a], keys[b], dim=0)))
        edges.append((float(cosine(keys[a], keys[b], dim=0)), a, b))
    for _, a, b in sorted(edges, reverse=True)[: len(x) - 1 - count]:
        groups[b] += groups.pop(a)
    merged = []
    for members in groups.values():
        total = sum(sizes[j] for j in members)
        merged.append(sum(sizes[j] / total * x[j] for j in members))
    return torch.stack(merged), [sum(sizes[j] for j in m) for m in groups.values()]  # type: ignore[arg-type]


def by_hand(made: XVLM, image: Tensor, name: str, keep: dict[int, int]) -> Tensor:
    """The last states of one picture."""
    x = made.vision.embeddings(image[None])[0]
    sizes = [1.0] * len(x)
    for layer, block in enumerate(made.vision.blocks):
        assert isinstance(block, ViTBlock)
        x, keys, first = attend(block, x, sizes)
        if layer in keep and name == "tome":
            x, sizes = tome(x, keys, sizes, keep[layer])
        elif layer in keep:
            x = evit(x, first, keep[layer], name == "evit-fused")
            sizes = [1.0] * len(x)
        x = x + block.ffn(block.norm2(x))
    return made.vision.norm(x)


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("keep", [{0: 10, 1: 7}, {0: 8, 1: 4, 2: 2}, {1: 9}])
@torch.no_grad()
def test_steps_are_those_of_a_loop_over_pictures_and_blocks(name, keep):
    made = model()
    images = pictures(made)
    found = baselines.apply(made, name, keep=tuple(keep.values()), sites=tuple(keep))
    last = found.encode_image(images).last
    assert last.shape[1] <= 1 + len(keep) + list(keep.values())[-1]
    for row, image in zip(last, images, strict=True):
        torch.testing.assert_close(row, by_hand(made, image, name, keep), **CLOSE)
    again = found.encode_image(images).last  # sizes of the pass before are forgotten
    torch.testing.assert_close(again, last)


@pytest.mark.parametrize("name", STEPPED)
@torch.no_grad()
def test_all_patches_kept_is_the_model_itself(name):
    made = model()
    images, everything = pictures(made), (16,) * 3
    found = baselines.apply(made, name, keep=everything).encode_image(images).last
    torch.testing.assert_close(found, made.encode_image(images).last, **CLOSE)


@torch.no_grad()
def test_merging_keeps_the_mean_over_patches_and_never_the_class_token():
    generator = torch.Generator().manual_seed(0)
    x, k = torch.randn(2, 10, 6, generator=generator), torch.randn(2, 2, 10, 4, generator=generator)
    k[:, :, 2] = k[:, :, 1]  # the closest pair of all
    left, sizes = Merging(5, 1)(Tokens(x, k, k, None))
    assert sizes.sum(1).tolist() == [10.0, 10.0] and (sizes[:, 0] == 1).all()
    torch.testing.assert_close(left[:, 0], x[:, 0])
    torch.testing.assert_close((left * sizes[..., None]).sum(1), x.sum(1))
    one, _ = Merging(8, 1)(Tokens(x, k, k, None))
    torch.testing.assert_close(one[:, 1], (x[:, 1] + x[:, 2]) / 2)


@torch.no_grad()
def test_the_fused_token_carries_what_was_dropped():
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    q = torch.zeros(1, 1, 5, 2)
    k = torch.zeros(1, 1, 5, 2)
    q[0, 0, 0, 0] = math.sqrt(2)
    k[0, 0, :, 0] = torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0])
    left, _ = ClassAttention(2, 1, fused=True)(Tokens(x, q, k, None))
    attention = torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0]).softmax(0)
    fused = attention[2] * x[0, 2] + attention[4] * x[0, 4]
    torch.testing.assert_close(left[0], torch.stack([x[0, 0], x[0, 1], x[0, 3], fused]))


@torch.no_grad()
def test_random_keeps_its_counts_of_every_picture_and_another_choice_each():
    made = model()
    images = pictures(made, rows=64)
    found = baselines.apply(made, "random", keep=(8, 3), sites=(0, 2), seed=5)
    output = found.encode_image(images)
    assert output.last.shape[1] == 1 + 3 and output.trimming is not None
    first, last = (output.trimming.sites[site].keep() for site in (0, 2))
    assert (first.sum(1) == 9).all() and (last.sum(1) == 4).all()
    assert (first[:, 0] == 1).all() and (last <= first).all()
    assert len({tuple(row) for row in first.tolist()}) > 50
    share = first[:, 1:].mean(0)  # 64 coins for each patch: 0.5 +- 4 standard errors
    assert (share - 0.5).abs().max() < 0.25
    twice = found.encode_image(images).trimming
    assert twice is not None and not torch.equal(twice.sites[0].keep(), first)
    same = baselines.apply(made, "random", keep=(8, 3), sites=(0, 2), seed=5)
    repeated = same.encode_image(images).trimming
    assert repeated is not None and torch.equal(repeated.sites[0].keep(), first)
    other = baselines.apply(made, "random", keep=(8, 3), sites=(0, 2), seed=6)
    unlike = other.encode_image(images).trimming
    assert unlike is not None and not torch.equal(unlike.sites[0].keep(), first)


@torch.no_grad()
def test_uniform_keeps_the_best_by_the_learned_scores():
    torch.manual_seed(0)
    made = with_trimming(model(), TrimmingConfig(vision=(0, 2), fusion=(0,))).eval()
    for part in made.modules():
        if isinstance(part, TokenTrimmer):
            part.fc2.weight.normal_(0.0, 2.0)
    images = pictures(made)
    found = baselines.apply(made, "uniform", keep=(6, 4))
    output = found.encode_image(images)
    assert output.last.shape[1] == 5 and output.trimming is not None
    site = output.trimming.sites[0]
    for scores, kept in zip(site.logits[:, 1:], site.keep()[:, 1:], strict=True):
        best = sorted(range(16), key=lambda j: -float(scores[j]))[:6]
        assert kept.nonzero().flatten().tolist() == sorted(best)
    assert found.text.trimmers is not None and found.text.trimmers.context_keep == {2: 4}
    assert made.config.trimming is not None and made.config.trimming.vision_keep is None


@torch.no_grad()
def test_a_smaller_picture_has_resized_positions_and_the_same_weights():
    made = model()
    found = baselines.apply(made, "resolution", keep=(4,))
    assert found.config.vision.image_size == 16
    assert found.encode_image(pictures(found)).last.shape[1] == 5
    table = made.vision.embeddings.position
    patches = table[1:].T.reshape(1, -1, 4, 4)
    bicubic = torch.nn.functional.interpolate(patches, (2, 2), mode="bicubic", align_corners=False)
    position = found.vision.embeddings.position
    torch.testing.assert_close(position[1:], bicubic[0].flatten(1).T, **CLOSE)
    assert torch.equal(position[0], table[0])
    mine, theirs = found.state_dict(), made.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine if not k.endswith(".position"))


def test_what_cannot_be_kept_is_refused():
    made = model()
    for name, keep, said in (
        ("fastv", (8,), "no baseline"),
        ("random", (8, 9), "never increase"),
        ("random", (17,), "16 patches"),
        ("random", (8,) * 4, "3 blocks"),
        ("tome", (7,), "at most half"),
        ("resolution", (8,), "square"),
        ("uniform", (8,), "none"),
    ):
        with pytest.raises(ValueError, match=said):
            baselines.apply(made, name, keep=keep)
    with pytest.raises(ValueError, match="evaluation"):
        baselines.apply(made, "evit", keep=(8,)).train().encode_image(pictures(made))
    assert baselines.geometric(36, 0.5, 3) == (18, 9, 5)
