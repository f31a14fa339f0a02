"""Where a picture of a published data set lies, and what becomes of its bytes.

Bytes are kept as they are whenever every decoder of `data_pipeline.decode` would show the same
picture. They are written anew, as JPEG and counted by reason, when they would not: an orientation
tag (decoders ignore it), inks instead of RGB (decoders disagree on their sign), 16-bit samples (cut
to white), another format under a .jpg name (GIF, WebP), or a side above the limit.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data_pipeline.decode import MAX_PIXELS, decode_image
from data_pipeline.faults import SkipSample

__all__ = ["Picture", "PictureFinder", "PictureReader", "Prepared", "prepare_picture", "safe_path"]

_QUALITY = 92
_ORIENTATION = 0x0112
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """Where the bytes are: a file, a member of a zip, or a stretch of a tar.

    Attributes:
        file: the file, zip or tar.   member: name in the zip.
        offset, size: bytes in the tar; size -1 is the whole file.
    """

    file: Path
    member: str = ""
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return f"{self.file}/{self.member}" if self.member else str(self.file)


class PictureReader:
    """Reads pictures; zips stay open between reads. Use it as a context manager."""

    def __init__(self) -> None:
        self._zips: dict[Path, zipfile.ZipFile] = {}

    def __enter__(self) -> PictureReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._zips:
            self._zips.popitem()[1].close()

    def read(self, picture: Picture) -> bytes:
        """The bytes.

        Raises:
            SkipSample: there is no such picture, or its zip member is damaged.
            OSError: the file is there but cannot be read (never a property of the sample).
        """
        try:
            if picture.size >= 0:
                with picture.file.open("rb") as file:
                    raw = os.pread(file.fileno(), picture.size, picture.offset)
                if len(raw) != picture.size:
                    raise SkipSample("missing", "the tar is shorter than its index says")
                return raw
            if not picture.member:
                return picture.file.read_bytes()
            if picture.file not in self._zips:
                self._zips[picture.file] = zipfile.ZipFile(picture.file)
            return self._zips[picture.file].read(picture.member)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, KeyError):
            raise SkipSample("missing", "no such image") from None
        except zipfile.BadZipFile as error:
            raise SkipSample("decode", f"the zip member is damaged: {error}") from None


def safe_path(folder: Path, name: str) -> Path:
    """`folder / name`.

    Raises: ValueError for a name that leads out of the folder.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ValueError(f"file name {name!r} leads out of {folder}: refused")
    return folder / parts


class PictureFinder:
    """Finds pictures by name in folders and zips as they were published; the first holder wins.

    Args:
        roots: folders that names are relative to, and zips, whose members may lie in folders.

    Raises: FileNotFoundError for a root that does not exist; ValueError for a file that is no zip.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        if not roots:
            raise ValueError("--images: give at least one folder or zip of images")
        self.roots = tuple(roots)
        self._members: dict[Path, dict[str, list[str]]] = {}
        for root in roots:
            if root.is_dir():
                continue
            if not root.exists():
                raise FileNotFoundError(f"{root}: no such image folder or zip")
            try:
                with zipfile.ZipFile(root) as archive:
                    self._members[root] = _by_name(archive.namelist())
            except zipfile.BadZipFile:
                raise ValueError(f"{root}: neither a folder nor a zip of images") from None

    def find(self, *names: str) -> Picture:
        """The picture of the first of these names that exists.

        One that is nowhere is given all the same, and reported when it is read.

        Raises: ValueError for a name that leads out of a folder, or fits two members of a zip.
        """
        for name in names:
            for root in self.roots:
                found = self._in(root, name)
                if found is not None:
                    return found
        return Picture(self.roots[0] / names[0])

    def _in(self, root: Path, name: str) -> Picture | None:
        path = safe_path(root, name)
        if root not in self._members:
            return Picture(path) if path.is_file() else None
        wanted = f"/{path.relative_to(root).as_posix()}"
        fitting = [m for m in self._members[root].get(path.name, ()) if f"/{m}".endswith(wanted)]
        if len(fitting) > 1:
            raise ValueError(f"{root}: {name!r} fits {len(fitting)} members: {fitting[:4]}")
        return Picture(root, fitting[0]) if fitting else None


def _by_name(members: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for member in members:
        base = member.rsplit("/", 1)[-1]
        if base and not member.startswith("__MACOSX/"):
            found.setdefault(base, []).append(member)
    return found


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture that is ready to be written.

    Attributes:
        extension: "jpg" or "png".   raw: the bytes.   width, height: of the written picture.
        frame: (width, height) before it was scaled down.   changes: why the bytes are new, if so.
    """

    extension: str
    raw: bytes
    width: int
    height: int
    frame: tuple[int, int]
    changes: tuple[str, ...] = ()


def _facts(raw: bytes) -> tuple[str, str, int, tuple[int, int]]:
    """(format, mode, orientation tag, size) of the header; ("", "", 1, (0, 0)) if PIL has none"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                kind, mode, size = image.format or "", image.mode, image.size
                try:
                    turn = image.getexif().get(_ORIENTATION, 1)
                except Exception:  # a damaged tag block (PIL raises many kinds) is no orientation
                    turn = 1
                return kind, mode, turn if isinstance(turn, int) else 1, size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "", "", 1, (0, 0)


def _decode_other(raw: bytes, mode: str, size: tuple[int, int]) -> np.ndarray:
    """Pixels of what `decode_image` does not read as it should. Transparent becomes white."""
    if size[0] * size[1] > MAX_PIXELS:
        text = f"the image has {size[0]}x{size[1]} pixels, limit {MAX_PIXELS}"
        raise SkipSample("pixels", text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                if mode.startswith("I"):
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                if mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
                    image = Image.alpha_composite(ground, image)
                return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise SkipSample("decode", f"the image cannot be decoded: {error}") from None


def prepare_picture(
    raw: bytes, max_side: int = 0, frame: tuple[int, int] | None = None
) -> Prepared:
    """Decodes a picture once, to be sure that it can be, and writes it anew where it has to be.

    Args:
        max_side: longest side in pixels of larger pictures, which are scaled down (0: keep all).
        frame: (width, height) that its boxes were drawn in. Where it says that they were drawn on
            the pixels as stored, an orientation tag is left alone.

    Raises: SkipSample: not an image, cut, undecodable, or too many pixels.
    """
    kind, mode, turn, size = _facts(raw)
    changes = []
    if kind in ("JPEG", "MPO", "PNG", "") and mode != "CMYK" and not mode.startswith("I"):
        pixels = decode_image(raw)
    else:
        changes.append(
            mode.split(";")[0].lower() if kind in ("JPEG", "MPO", "PNG") else kind.lower()
        )
        if kind in ("JPEG", "MPO"):
            decode_image(raw)  # it also notices cut files
        pixels = _decode_other(raw, mode, size)
    if turn in _TURNS:
        turned = _TURNS[turn](pixels)
        stored = (pixels.shape[1], pixels.shape[0])
        if frame == stored and frame != (turned.shape[1], turned.shape[0]):
            turn = 1
        else:
            pixels = np.ascontiguousarray(turned)
            changes.append("orientation")
    height, width = pixels.shape[:2]
    whole = (width, height)
    if max_side and max(whole) > max_side:
        scale = max_side / max(whole)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        changes.append("scaled")
    if not changes:
        return Prepared("png" if raw[:4] == b"\x89PNG" else "jpg", raw, width, height, whole)
    image = Image.fromarray(pixels)
    if (width, height) != whole:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return Prepared("jpg", buffer.getvalue(), width, height, whole, tuple(changes))
