"""One picture and one sentence in, one answer out: what a trained model says.

    from train.evaluation.predictor import Predictor
    model = Predictor("runs/demo/pruned")
    print(model.answer("photo.png", "how many circles are there?"))

Pictures and texts are prepared as for evaluation: the whole picture, resized to the square that the
model takes; texts cleaned by the rules of the training data.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from data_pipeline.text import TextEncoder, load_tokenizer
from data_pipeline.transforms import resize
from models import from_pretrained
from models.generation import GenerationSettings, generate
from models.outputs import EncoderOutput
from models.trimming import see
from train.evaluation.vqa import AnswerList, rank_states

__all__ = ["Box", "Match", "PROMPT", "Predictor", "TASKS", "Truth", "draw_box", "read_picture"]

# Task -> forms of a model that can do it.
TASKS: dict[str, tuple[str, ...]] = {
    "vqa": ("vqa",),
    "captioning": ("captioning",),
    "retrieval": ("retrieval", "pretrain"),
    "nlvr2": ("nlvr2",),
    "grounding": ("grounding", "pretrain"),
}
PROMPT = "a picture of "  # what captions start from (X-VLM, 2111.08276, section 4)
_BEAMS, _LEAST_TOKENS, _MOST_TOKENS = 3, 5, 20  # published COCO captions; the prompt counts

Picture = Path | str | Image.Image


class Match(NamedTuple):
    """How well a picture and a text fit.

    Attributes:
        similarity: cosine of their features, -1 to 1: the contrastive score that retrieval sorts by.
        probability: of the matching head, 0 to 1, which reads both together.
    """

    similarity: float
    probability: float


class Truth(NamedTuple):
    """Whether a statement about two pictures holds, and the probability that it does."""

    true: bool
    probability: float


class Box(NamedTuple):
    """Left, top, width and height in pixels of the picture."""

    x: float
    y: float
    width: float
    height: float


class Predictor:
    """A model folder with its tokenizer, ready to be asked.

    Pictures are files or PIL images; a photo is turned as its camera noted. Every method raises
    ValueError when the model's form does not fit the task or a text is empty, FileNotFoundError or
    ValueError on a picture that is missing or cannot be read.

    Args:
        path: folder written by `save_pretrained` with a tokenizer.
        device: None is cuda where there is one.   dtype: None is float32.
        answers: for `answer`: a JSON list, a folder that holds answers.json, or strings; None is
            the model folder's own.
        top_k: answers whose whole sequences are compared, after one pass over first tokens.

    Raises:
        FileNotFoundError, ValueError: on a folder that is no model, or lacks its tokenizer.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        answers: Path | str | list[str] | None = None,
        top_k: int = 128,
    ) -> None:
        self.path, self.top_k = Path(path), top_k
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = from_pretrained(self.path, dtype=dtype, device=self.device)
        self.tokenizer = load_tokenizer(self.path)
        self._encoder = TextEncoder(self.tokenizer, self.model.config.text.max_positions)
        self._source = answers
        self._answers: AnswerList | None = None

    def answer(self, image: Picture, question: str) -> str:
        """The likeliest answer of the list (form "vqa")."""
        self._need("vqa")
        answers = self._answer_list()
        with torch.inference_mode():
            ids, mask = self._text(question)
            guide, (context,) = self._states(ids, mask, image)
            asked = self.model.multimodal(ids, mask, *context, text=guide)
            left = mask if asked.mask is None else asked.mask
            best = rank_states(self.model, asked.last, left, answers, self.top_k)
        return answers.strings[int(best[0])]

    def caption(self, image: Picture, prompt: str = PROMPT) -> str:
        """What the picture shows, without the prompt: beam search with 3 beams (form "captioning")."""
        self._need("captioning")
        encoder, positions = self._encoder, self.model.config.text.max_positions
        start = encoder.encode([prompt])[0][:-1]  # the sentence goes on
        most = min(_MOST_TOKENS, positions)
        settings = GenerationSettings(
            end_id=encoder.sep,
            pad_id=encoder.pad,
            beams=_BEAMS,
            min_length=min(_LEAST_TOKENS, most),
            max_length=most,
        )
        with torch.inference_mode():
            ids = torch.tensor([start], device=self.device)
            _, ((states, seen),) = self._states(ids, None, image)
            found = generate(self.model, ids, states, seen, settings=settings)
        tokens = found.ids[0, len(start) : int(found.lengths[0])].tolist()
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def match(self, image: Picture, text: str) -> Match:
        """How well picture and text fit (forms "retrieval" and "pretrain")."""
        self._need("retrieval")
        model = self.model
        with torch.inference_mode():
            ids, mask = self._text(text)
            _, ((states, seen),) = self._states(ids, mask, image)
            words = model.encode_text(ids, mask)
            similarity = (model.image_feature(states) * model.text_feature(words.last)).sum()
            logits = model.match_logits(model.fuse(words.last, words.mask, states, seen).last)
        return Match(float(similarity), float(logits.float().softmax(-1)[0, 1]))

    def truth(self, first: Picture, second: Picture, statement: str) -> Truth:
        """Whether a statement about two pictures, left and right, holds (form "nlvr2")."""
        self._need("nlvr2")
        with torch.inference_mode():
            ids, mask = self._text(statement)
            guide, contexts = self._states(ids, mask, first, second)
            states, seen = zip(*contexts, strict=True)
            fused = self.model.multimodal(ids, mask, states, seen, text=guide)
            logits = self.model.truth_logits(fused.last)
        probability = float(logits.float().softmax(-1)[0, 1])
        return Truth(probability > 0.5, probability)

    def locate(self, image: Picture, expression: str) -> Box:
        """Where the thing is that the expression names (forms "grounding" and "pretrain")."""
        self._need("grounding")
        picture = read_picture(image)
        with torch.inference_mode():
            ids, mask = self._text(expression)
            guide, (context,) = self._states(ids, mask, picture)
            fused = self.model.multimodal(ids, mask, *context, text=guide)
            cx, cy, width, height = self.model.predict_box(fused.last)[0].tolist()
        left, right = _span(cx, width, picture.width)
        top, bottom = _span(cy, height, picture.height)
        return Box(left, top, right - left, bottom - top)

    def _need(self, task: str) -> None:
        form, fitting = self.model.config.form, TASKS[task]
        if form not in fitting:
            able = [name for name, forms in TASKS.items() if form in forms]
            raise ValueError(
                f"{self.path}: a model of form {form!r} does not do {task}; that takes form "
                f"{' or '.join(map(repr, fitting))} (made by espalier finetune or convert). "
                f"This one does {', '.join(able) or 'none of the tasks here'}"
            )

    def _answer_list(self) -> AnswerList:
        if self._answers is None:
            source, own = self._source, self.path / "answers.json"
            if source is None and not own.is_file():
                raise FileNotFoundError(
                    f"{self.path}: no answers.json in it; give the answer list with --answers FILE"
                )
            if isinstance(source, list):
                listed = AnswerList.of(source, self.tokenizer)
            else:
                listed = AnswerList.load(own if source is None else source, self.tokenizer)
            self._answers = listed.to(self.device)
        return self._answers

    def _text(self, text: str) -> tuple[Tensor, Tensor]:
        """(1, L) int64 ids with [CLS] and [SEP], and their mask."""
        tokens = self._encoder.encode([text])[0]
        if len(tokens) < 3:
            raise ValueError(f"the text {text!r} has no words")
        ids = torch.tensor([tokens], device=self.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def _states(
        self, ids: Tensor, mask: Tensor | None, *pictures: Picture
    ) -> tuple[EncoderOutput | None, list[tuple[Tensor, Tensor | None]]]:
        """The text pass that guided, if one did; states (1, P, D) of each picture, seen with a text
        (1, L), and what may be read of them."""
        side = self.model.config.vision.image_size
        pixels = np.stack([resize(np.array(read_picture(p)), side, side) for p in pictures])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
        indices = [torch.tensor([number], device=self.device) for number in range(len(pictures))]
        image, contexts = see(self.model, images, indices, ids, mask)
        return image.guide, contexts


def _span(centre: float, size: float, pixels: int) -> tuple[float, float]:
    """Both ends of a side in pixels, inside the picture."""
    low, high = (centre - size / 2) * pixels, (centre + size / 2) * pixels
    return min(max(low, 0.0), pixels), min(max(high, 0.0), pixels)


def read_picture(source: Picture) -> Image.Image:
    """RGB, turned as the camera noted. Raises FileNotFoundError or ValueError naming the file."""
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error


def draw_box(image: Picture, box: Box, out: Path) -> None:
    """Writes the picture with the box as a PNG. Raises ValueError on another ending."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the picture with the box is a PNG; name it so")
    picture = read_picture(image)
    line = max(2, min(picture.size) // 100)
    corners = (box.x, box.y, box.x + box.width, box.y + box.height)
    ImageDraw.Draw(picture).rectangle(corners, outline=(255, 0, 0), width=line)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
