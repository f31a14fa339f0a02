"""XVLM: vision encoder, text and fusion stack, and the heads of its form; teacher and student.

Shape legend: N images, B text rows, L tokens, P = 1 + patches, D width, E shared embedding, M asked
positions, A decoded rows, La their tokens, C contexts (Ls states each) that the A rows read, V
vocabulary. Masks are boolean, True is visible.

The methods only pass tensors between submodules: every parameter is read inside the forward of
the module that owns it, as ZeRO-3 needs. The one exception, the tied output weight, is listed
by `external_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, overload

import torch
from torch import Tensor

from models import io
from models.attention import Attention
from models.bert import DecoderCache, ImageMasks, Images, TextStack, initialise_bert
from models.compiled import compiled
from models.config import ModelConfig
from models.decoder import DecoderOutput, scored
from models.form_heads import FormHeads
from models.gate_slot import GateSlot
from models.layers import BertLayer, FeedForward, ViTBlock
from models.outputs import Capture, EncoderOutput
from models.trim_config import TrimMode
from models.trimmers import Trimmers
from models.two_stream import ImageFusion, TwoStreams
from models.vision import RegionOutput, VisionEncoder

__all__ = ["XVLM", "DecoderOutput", "RegionOutput"]

_NOTHING = Capture()


class XVLM(FormHeads):
    """A vision-language model as its configuration says.

    `config.HEADS` lists the modules of each form; a method that needs one which the form has not
    raises a ValueError that says so. Fresh weights are drawn from torch's global generator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision, config.trimming, config.text.width)
        self.text = TextStack(config.text, config.context_width, config.trimming)
        self.image_fusion = None if config.image_fusion is None else ImageFusion(config)
        self._add_heads()
        self._pixel_constants: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._initialise()

    def _initialise(self) -> None:
        for name, child in self.named_children():
            if name != "vision":
                initialise_bert(child, self.config.text.init_std)
        self.vision.initialise()
        for trimmers in self._trimmers():
            trimmers.reset()

    # --- encoders -------------------------------------------------------------------------------

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 0..255 -> float32 with the configured mean and deviation; floats pass unchanged."""
        if images.dtype != torch.uint8:
            return images
        if images.device not in self._pixel_constants:
            # Not buffers: casting the model to half must not round them.
            mean = torch.tensor(self.config.image_mean, device=images.device).view(1, 3, 1, 1)
            std = torch.tensor(self.config.image_std, device=images.device).view(1, 3, 1, 1)
            self._pixel_constants[images.device] = (mean * 255, 1 / (std * 255))
        mean, factor = self._pixel_constants[images.device]
        return (images.float() - mean) * factor

    @overload
    def encode_image(
        self,
        images: Tensor,
        capture: Capture = ...,
        region_mask: None = None,
        image_index: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> EncoderOutput: ...

    @overload
    def encode_image(
        self,
        images: Tensor,
        capture: Capture = ...,
        *,
        region_mask: Tensor,
        image_index: Tensor,
    ) -> RegionOutput: ...

    def encode_image(
        self,
        images: Tensor,
        capture: Capture = _NOTHING,
        region_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> EncoderOutput | RegionOutput:
        """Encodes images (N, 3, S, S), uint8 (normalised here) or float (already normalised).

        Args:
            region_mask: (B, P) bool, the tokens that each region row sees (class token included).
                The layers before the last `region_layers` run once per image.
            image_index: (B,) int64, the image of each region row, or of each text of the guide
                (None: one each); otherwise not used.
            guide: (B, D) the first text token, encoded before, which guided trimmers compare with
                (`guided`). Rows are then texts, not images; the blocks in front of the first site
                run once per image.

        Returns:
            EncoderOutput with last (N, P, D), or (B, P, D) with a guide; or a RegionOutput when
            `region_mask` is given. Pass on its `mask` with its states (`EncoderOutput.context`).

        Raises:
            ValueError: when trimmers want a guide and there is none, or with both kinds of rows.
        """
        run = self._compiled.get("vision", self.vision)
        return run(self._normalise(images), capture, region_mask, image_index, guide)

    @property
    def guided(self) -> bool:
        """Whether `encode_image` wants a guide now: its trimmers compare patches with the text."""
        trimming, trimmers = self.config.trimming, self.vision.trimmers
        return trimming is not None and trimming.guided and _mode(trimmers) != "off"

    def encode_text(
        self, ids: Tensor, mask: Tensor | None, capture: Capture = _NOTHING
    ) -> EncoderOutput:
        """ids (B, L) int64, mask (B, L) bool -> last (B, L, D) after the text layers."""
        return self._compiled.get("text", self.text.encode)(ids, mask, capture)

    def fuse(
        self,
        text_states: Tensor,
        text_mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks = None,
        capture: Capture = _NOTHING,
    ) -> EncoderOutput:
        """text_states (B, L, D) attend to image_states (N, P, D) in the fusion layers.

        B may be a multiple of N: each image then serves B / N consecutive rows, projected once.
        Forms of NLVR2 take two image states (and two masks, or None); layer 2j reads the first.
        Masks are bool, or the float keep weights of a trimmed pass (`EncoderOutput.mask`).
        With `config.image_fusion` both streams come back in `EncoderOutput.streams`.
        """
        run = self._compiled.get("fusion", self._fusion.fuse)
        return run(text_states, text_mask, image_states, image_mask, capture)

    def multimodal(
        self,
        ids: Tensor,
        mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks = None,
        capture: Capture = _NOTHING,
        text: EncoderOutput | None = None,
    ) -> EncoderOutput:
        """Text layers then fusion layers, images as for `fuse`; indices count through both.

        Args:
            text: `encode_text` of the same ids and mask (with `capture.below(text_layers)`), where
                it ran to guide the image pass: its layers then do not run again.

        Raises:
            ValueError: when `text` lacks what `capture` asks of its layers.
        """
        if text is not None:
            first = self.config.text.text_layers
            text.check(capture.below(first))
            above = capture.above(first)
            return text.join(
                self.fuse(text.last, text.mask, image_states, image_mask, above), first
            )
        run = self._compiled.get("multimodal", self._fusion.multimodal)
        return run(ids, mask, image_states, image_mask, capture)

    @property
    def _fusion(self) -> TextStack | TwoStreams:
        """Who fuses: the text stack, or both streams."""
        return self.text if self.image_fusion is None else TwoStreams(self.text, self.image_fusion)

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None,
        states: Tensor,
        state_mask: Tensor | None,
        capture: Capture = _NOTHING,
        cache: DecoderCache | None = None,
    ) -> DecoderOutput:
        """ids (A, La) read `states` causally -> states and logits (A, La, V) of the next token.

        Form "vqa": ids are answers, `states` (C, Ls, D) those of the question after fusion.
        Form "captioning": ids are prompt and caption, `states` (C, P, D) those of the image.
        A may be a multiple of C: each entry of `states` then serves A / C consecutive rows.

        Args:
            mask: (A, La) bool; with a cache (A, tokens seen + La). None: no padding.
            cache: from `new_cache`; ids are then the tokens after those it has seen.

        Raises:
            ValueError: in the other forms.
        """
        # A cache grows with every call: a compiled pass would be compiled anew for every token.
        passes = self._compiled if cache is None else {}
        if self.decoder is not None:
            run = passes.get("decoder", self.decoder)
            return run(ids, mask, states, state_mask, capture, cache)
        if self.config.form != "captioning":
            raise ValueError(
                'decode needs a model of form "vqa" or "captioning", '
                f"this one is of form {self.config.form!r}"
            )
        run = passes.get("multimodal", self.text.multimodal)
        output = run(ids, mask, states, state_mask, capture, causal=True, cache=cache)
        return scored(
            output, self.lm_head(output.last, word_weight=self.text.embeddings.word.weight)
        )

    def new_cache(self) -> DecoderCache:
        """An empty cache for `decode`."""
        return DecoderCache(len(self.text.layers if self.decoder is None else self.decoder.layers))

    # --- what training and pruning ask ------------------------------------------------------------

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Every block keeps its input only and computes the rest again in the backward, or not.

        Trades about a third more compute for the memory of the activations; no value changes.
        See `layers.run_block`.
        """
        for block in self.modules():
            if isinstance(block, ViTBlock | BertLayer):
                block.recompute = enabled

    def set_trimming(
        self, mode: str, *, fixed: bool | None = None, tau: float | None = 1.0
    ) -> None:
        """How trimmers run from now on; the model starts with `config.trimming.mode`.

        Args:
            mode: "off": the full model. "mask": all tokens are computed and dropped ones are not
                read, which equals removing them; the only mode of training (with "off" for a full
                pass). "gather": dropped tokens are removed, exactly for single rows and down to the
                longest row of a batch. "bucket": the best `vision_keep`, ... tokens are kept at
                each site, in static shapes for torch.compile and CUDA graphs. "packed": rows of
                unequal length lie behind one another, and attention runs on ragged rows.
            fixed: the counts of "bucket" decide rather than the sign of the logits; None: in mode
                "bucket" only.
            tau: temperature of the decisions' noise in training; None: decisions as in evaluation.

        Raises:
            ValueError: on an unknown mode, a model without trimmers, or counts that are missing.
        """
        trimming = self.config.trimming
        if trimming is None:
            raise ValueError("this model has no trimmers; models.trimming.with_trimming adds them")
        if mode not in get_args(TrimMode) or (tau is not None and tau <= 0):
            raise ValueError(
                f"trimming mode {mode!r} with tau {tau}: modes are {get_args(TrimMode)}, tau is "
                "above 0"
            )
        by_count = mode == "bucket" if fixed is None else fixed
        trimming.require_counts("bucket" if by_count else mode)
        for trimmers in self._trimmers():
            trimmers.mode, trimmers.fixed, trimmers.tau = mode, by_count, tau

    def _trimmers(self) -> list[Trimmers]:
        found = (self.vision.trimmers, self.text.trimmers)
        return [trimmers for trimmers in found if trimmers is not None]

    def compile_encoders(
        self,
        mode: str | None = "default",
        *,
        backend: str | Callable[..., Any] = "inductor",
        fullgraph: bool = False,
    ) -> None:
        """Vision, text and fusion passes (and the answer decoder) run under torch.compile from now.

        Each is one graph without breaks, with masks, regions, captures, gates and activation
        checkpointing. The first call of each kind compiles, which takes up to minutes. Heads, and
        decoding with a cache, stay eager; copies and saved models are not compiled.

        Args:
            mode, backend: as of torch.compile.
            fullgraph: a graph break is an error (engines whose hooks gather parameters break it).
        """
        text = self.text
        passes: dict[str, Callable[..., Any]] = {"vision": self.vision, "text": text.encode}
        passes |= {"fusion": self._fusion.fuse, "multimodal": self._fusion.multimodal}
        if self.decoder is not None:
            passes["decoder"] = self.decoder
        self._compiled = compiled(passes, mode, backend, fullgraph)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: a compiled pass would run on this object's weights."""
        return self.__dict__ | {"_compiled": {}}

    def _gated(self) -> Iterator[tuple[str, Attention | FeedForward]]:
        """Every prunable sub-layer by the name of its gate."""
        for index, block in enumerate(self.vision.blocks):
            assert isinstance(block, ViTBlock)
            yield f"vision.{index}.heads", block.attention
            yield f"vision.{index}.ffn", block.ffn
        first = self.config.text.text_layers
        for index, layer in enumerate(self.text.layers):
            assert isinstance(layer, BertLayer)
            if index < first:
                yield f"text.{index}.heads", layer.attention
                yield f"text.{index}.ffn", layer.ffn
            else:
                yield from _gated_cross(f"fusion.{index - first}", layer)
        for index, layer in enumerate(self.image_fusion.layers if self.image_fusion else ()):
            assert isinstance(layer, BertLayer)
            yield from _gated_cross(f"image_fusion.{index}", layer)
        for index, layer in enumerate(self.decoder.layers if self.decoder else ()):
            assert isinstance(layer, BertLayer)
            yield from _gated_cross(f"decoder.{index}", layer)

    def gate_slots(self) -> dict[str, GateSlot]:
        """Gate slots by name: vision.0.heads, text.0.ffn, fusion.0.cross_heads, decoder.0.ffn, ...

        Of two streams the image's are image_fusion.0.self_heads, ... A fully pruned sub-layer has a
        slot of 0 units.
        """
        return {name: part.gate for name, part in self._gated()}

    def parameters_per_unit(self) -> dict[str, int]:
        """By the same names: parameters that removing one head or one feed-forward unit saves."""
        return {
            name: part.parameters_per_head
            if isinstance(part, Attention)
            else part.parameters_per_unit
            for name, part in self._gated()
        }

    # --- files ------------------------------------------------------------------------------------

    def save_pretrained(
        self, path: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        """Writes config.json, model.safetensors and the tokenizer's files; see `io.save_model`."""
        io.save_model(self.config, self.state_dict(), Path(path), tokenizer, dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> XVLM:
        """Loads a folder written by `save_pretrained`, in eval mode.

        Raises:
            FileNotFoundError: naming the missing file.
            ValueError: naming missing, unexpected or misshapen keys.
        """
        config, state = io.read_model(Path(path))
        with torch.device("meta"):
            model = cls(config)
        weights = Path(path) / io.WEIGHTS
        io.check_state(model.state_dict(), state, str(weights))
        tensors = {
            key: value.to(device=device, dtype=dtype, copy=True) for key, value in state.items()
        }
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def _mode(trimmers: Trimmers | None) -> str:
    return "off" if trimmers is None else trimmers.mode


def _gated_cross(prefix: str, layer: BertLayer) -> Iterator[tuple[str, Attention | FeedForward]]:
    yield f"{prefix}.self_heads", layer.attention
    yield f"{prefix}.cross_heads", layer.cross_attention
    yield f"{prefix}.ffn", layer.ffn
