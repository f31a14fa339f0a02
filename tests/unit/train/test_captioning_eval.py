"""Writing the captions of a split: prompt, padding rows, references, ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from data_pipeline.task_batches import CaptionBatch
from models import presets
from models.generation import GenerationSettings, generate
from models.xvlm import XVLM
from train.evaluation.captioning import Caption, CaptionWriter, evaluate_captions, write_split

END, PAD = 3, 0


class Tokenizer:
    """Ids as words."""

    sep_token_id, pad_token_id = END, PAD

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(f"w{n}" for n in ids if n > 4)


def model() -> XVLM:
    torch.manual_seed(3)
    made = presets.create("blocksworld-micro-student", form="captioning", text={"vocab_size": 12})
    with torch.no_grad():  # words, no special tokens
        made.lm_head.bias[:5] -= 9.0
    return made.eval()


def batch(side: int, valid: list[bool], seed: int) -> CaptionBatch:
    rows = len(valid)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 12, (rows, 9), generator=generator)
    ids[:, :3] = torch.tensor([2, 7, 8])
    return CaptionBatch(
        images=torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator),
        image_index=torch.arange(rows),
        valid=torch.tensor(valid),
        keys=("k",) * rows,
        text_ids=ids,
        text_mask=torch.ones_like(ids, dtype=torch.bool),
        prompt_tokens=3,
        references=tuple((f"w{seed} w{n}",) for n in range(rows)),
        image_ids=tuple(f"{seed}-{n}" for n in range(rows)),
    )


@torch.no_grad()
def test_every_image_is_written_about_once_and_without_the_prompt():
    made = model()
    side = made.config.vision.image_size
    batches = [batch(side, [True, True], 0), batch(side, [True, False], 1)]
    found = write_split(made, CaptionWriter(Tokenizer(), 3, 10, 5), lambda: iter(batches))
    expected = []
    for data, row in ((batches[0], 0), (batches[0], 1), (batches[1], 0)):
        states = made.encode_image(data.images[row : row + 1]).last
        settings = GenerationSettings(end_id=END, pad_id=PAD, beams=3, max_length=10, min_length=5)
        one = generate(made, torch.tensor([[2, 7, 8]]), states, settings=settings)
        ids = one.ids[0, 3 : int(one.lengths[0])].tolist()
        text = Tokenizer().decode(ids, True)
        expected.append(Caption(data.image_ids[row], text, data.references[row]))
    assert found == expected
    assert all(caption.text for caption in found)


@torch.no_grad()
def test_scores_are_over_the_captions_of_all_ranks(monkeypatch):
    made = model()
    side = made.config.vision.image_size
    batches = [batch(side, [True, True], 0), batch(side, [True, True], 1)]
    writer = CaptionWriter(Tokenizer(), 1, 10, 5)
    whole = evaluate_captions(made, writer, lambda: iter(batches))
    other = write_split(made, writer, lambda: iter(batches[1:]))

    def gather(parts: list[Any], mine: Any) -> None:
        parts[:] = [mine, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    dist = SimpleNamespace(rank=0, world_size=2)
    assert evaluate_captions(made, writer, lambda: iter(batches[:1]), dist) == whole
    assert whole["captions"] == 4
