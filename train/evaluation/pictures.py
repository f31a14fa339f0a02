"""Example pictures for TensorBoard: image, question, prediction, answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from train.evaluation.vqa import AnswerList, rank_answers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from models.xvlm import XVLM
    from train.monitor import Monitor
    from train.runtime.distributed import Distributed

__all__ = ["vqa_pictures"]


def vqa_pictures(
    monitor: Monitor,
    step: int,
    model: XVLM,
    answers: AnswerList,
    loader: Iterable[Any],
    dist: Distributed,
    count: int = 16,
    top_k: int = 128,
) -> None:
    """Write up to `count` held-out questions with the model's answers, one for each image.

    Every rank runs the same forward (ZeRO-3 gathers parameters in it); rank 0 writes.
    """
    batch = next(iter(loader)).to(dist.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        chosen = rank_answers(model, batch, answers, top_k).tolist()
    model.train(was_training)
    of_image: dict[int, list[int]] = {}
    for row, image in enumerate(batch.image_index.tolist()):
        if bool(batch.valid[row]):
            of_image.setdefault(image, []).append(row)
    # Questions of an image come sorted by type: taking another place each time shows all types.
    rows = [
        (image, asked[place % len(asked)])
        for place, (image, asked) in enumerate(of_image.items())
        if place < count
    ]
    captions = []
    for _, row in rows:
        truth = max(batch.answers[row], key=batch.answers[row].__getitem__)
        said = answers.strings[chosen[row]]
        mark = "right" if said == truth else f"wrong, it is {truth}"
        captions.append(f"{batch.questions[row]}\n{said} ({mark})")
    images = batch.images[[image for image, _ in rows]].cpu()
    monitor.pictures(step, "vqa/held_out", images, captions)
