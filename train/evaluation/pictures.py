"""Example pictures for TensorBoard: questions with answers; and for pre-training words, regions,
retrieval and attention.

Every rank runs the same forwards (ZeRO-3 gathers parameters in them); rank 0 writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.outputs import Capture
from train.evaluation.pretrain import predict_boxes, retrieval_ranks
from train.evaluation.vqa import AnswerList, rank_answers
from train.losses.attention import attention_probabilities
from train.monitor.pictures import draw_boxes, framed, overlay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from data_pipeline.batches import PretrainBatch
    from models.xvlm import XVLM
    from train.monitor import Monitor
    from train.runtime.distributed import Distributed
    from train.runtime.teacher import Teacher

__all__ = ["pretrain_pictures", "vqa_pictures"]

_RIGHT, _PREDICTED, _OTHER = "#2e9e5b", "#e08a1e", "#9aa5a0"
_SHOWN = 3  # pictures of a retrieval


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
    """Write up to `count` held-out questions with the model's answers, one for each image."""
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
        said, known = answers.strings[chosen[row]], batch.answers[row]
        truth = max(known, key=known.__getitem__, default=None)
        mark = "right" if said == truth else f"wrong, it is {truth}"
        mark = mark if known else "the right answer is hidden"
        captions.append(f"{batch.questions[row]}\n{said} ({mark})")
    images = batch.images[[image for image, _ in rows]].cpu()
    monitor.pictures(step, "vqa/held_out", images, captions)


def pretrain_pictures(
    monitor: Monitor,
    step: int,
    model: XVLM,
    pairs: Iterable[Any],
    regions: Iterable[Any] | None,
    tokenizer: Any,
    dist: Distributed,
    teacher: Teacher | None = None,
    count: int = 9,
) -> None:
    """Writes up to `count` examples each, from the first batch of the held-out data.

    pretrain/words: sentences, and which of their masked words the model reads right.
    pretrain/regions: a region's text with its box (green) and the predicted one (orange).
    pretrain/retrieval: a text and the nearest pictures of the batch, its own framed in green.
    pretrain/attention: where a word looks in the last fusion layer, student beside teacher.
    """
    batch = next(iter(pairs)).to(dist.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _words(monitor, step, model, batch, tokenizer, count)
            _retrieval(monitor, step, model, batch, tokenizer, count)
            _attention(monitor, step, model, teacher, batch, tokenizer, count)
            if regions is not None:
                found = next(iter(regions)).to(dist.device)
                _regions(monitor, step, model, found, tokenizer, count)
    finally:
        model.train(was_training)


def _text(tokenizer: Any, ids: Tensor, mask: Tensor) -> str:
    return tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)


def _rows(batch: PretrainBatch, count: int) -> list[int]:
    """The first rows that count."""
    return batch.valid.nonzero()[:count, 0].tolist()


def _words(
    monitor: Monitor, step: int, model: XVLM, batch: PretrainBatch, tokenizer: Any, count: int
) -> None:
    images = model.encode_image(batch.images).last[batch.image_index]
    states = model.multimodal(batch.mlm_ids, batch.text_mask, images, None).words
    said = model.mlm_logits(states, batch.mlm_positions).argmax(-1)
    rows, captions = _rows(batch, count), []
    for row in rows:
        slots = (batch.mlm_labels[row] != -100).nonzero()[:, 0]
        truth = tokenizer.convert_ids_to_tokens(batch.mlm_labels[row, slots].tolist())
        words = tokenizer.convert_ids_to_tokens(said[row, slots].tolist())
        pairs = list(zip(truth, words, strict=True))
        wrong = [f"{right} read as {word}" for right, word in pairs if word != right]
        told = f"{len(pairs) - len(wrong)} of {len(pairs)} masked words right"
        sentence = _text(tokenizer, batch.text_ids[row], batch.text_mask[row])
        captions.append("\n".join([sentence, told, *wrong]))
    if rows:
        monitor.pictures(step, "pretrain/words", batch.images[batch.image_index[rows]], captions)


def _regions(
    monitor: Monitor, step: int, model: XVLM, batch: PretrainBatch, tokenizer: Any, count: int
) -> None:
    assert batch.boxes is not None and batch.is_region is not None
    boxes = predict_boxes(model, batch)
    pictures, captions = [], []
    for row in (batch.valid & batch.is_region).nonzero()[:count, 0].tolist():
        frames = [(batch.boxes[row].tolist(), _RIGHT), (boxes[row].tolist(), _PREDICTED)]
        pictures.append(draw_boxes(batch.images[batch.image_index[row]], frames))
        captions.append(_text(tokenizer, batch.text_ids[row], batch.text_mask[row]))
    if pictures:
        monitor.pictures(step, "pretrain/regions", torch.stack(pictures), captions)


def _retrieval(
    monitor: Monitor, step: int, model: XVLM, batch: PretrainBatch, tokenizer: Any, count: int
) -> None:
    rows = _rows(batch, batch.rows)
    images = model.image_feature(model.encode_image(batch.images).last[batch.image_index])[rows]
    texts = model.text_feature(model.encode_text(batch.text_ids, batch.text_mask).last)[rows]
    nearest = (texts @ images.T).topk(min(_SHOWN, len(rows)), dim=1).indices.tolist()
    places = retrieval_ranks(texts, images).tolist()
    strips, captions = [], []
    for number, row in enumerate(rows[:count]):
        shown = [
            framed(
                batch.images[batch.image_index[rows[found]]], _RIGHT if found == number else _OTHER
            )
            for found in nearest[number]
        ]
        strips.append(torch.cat(shown, dim=2))
        text = _text(tokenizer, batch.text_ids[row], batch.text_mask[row])
        captions.append(f"{text}\nits own picture is number {places[number] + 1} of {len(rows)}")
    if strips:
        monitor.pictures(step, "pretrain/retrieval", torch.stack(strips), captions)


def _attention(
    monitor: Monitor,
    step: int,
    model: XVLM,
    teacher: Teacher | None,
    batch: PretrainBatch,
    tokenizer: Any,
    count: int,
) -> None:
    rows = _rows(batch, count)
    words = [_word(tokenizer, batch.text_ids[row], batch.text_mask[row]) for row in rows]
    maps = [_cross_attention(model, batch)]
    if teacher is not None:
        with teacher.running() as other:
            maps.append(_cross_attention(other, batch))
    strips, captions = [], []
    for row, place in zip(rows, words, strict=True):
        image = batch.images[batch.image_index[row]]
        views = [framed(image, _OTHER)]
        for found in maps:
            side = int((found.shape[2] - 1) ** 0.5)  # the first token stands for the whole picture
            views.append(overlay(image, found[row, place, 1:].view(side, side)))
        strips.append(torch.cat(views, dim=2))
        tokens = tokenizer.convert_ids_to_tokens(batch.text_ids[row][batch.text_mask[row]].tolist())
        sentence = " ".join(
            f"[{token}]" if n == place else token
            for n, token in enumerate(tokens)
            if token not in tokenizer.all_special_tokens
        )
        captions.append(sentence + _legend(len(maps)))
    if strips:
        monitor.pictures(step, "pretrain/attention", torch.stack(strips), captions)


def _legend(models: int) -> str:
    return "\npicture, student, teacher" if models == 2 else "\npicture, student"


def _cross_attention(model: XVLM, batch: PretrainBatch) -> Tensor:
    """(B, L, P) attention of the last fusion layer, mean over its heads."""
    images = model.encode_image(batch.images).last[batch.image_index]
    text = model.encode_text(batch.text_ids, batch.text_mask).last
    last = model.config.text.fusion_layers - 1
    wanted = Capture.of(cross_attention=[last])
    fused = model.fuse(text, batch.text_mask, images, None, wanted)
    return attention_probabilities(fused.cross_attention[last]).mean(1)


def _word(tokenizer: Any, ids: Tensor, mask: Tensor) -> int:
    """Place of the longest word, which is rarely an article; the first of equals."""
    tokens = tokenizer.convert_ids_to_tokens(ids[mask].tolist())
    special = set(tokenizer.all_special_tokens)  # they are longer than most words
    return max(range(len(tokens)), key=lambda n: (tokens[n] not in special, len(tokens[n]), -n))
