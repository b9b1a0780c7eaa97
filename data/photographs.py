"""Photographs: image files -> pixels in CelebA's frame, or one line that says why not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .run import File, UsageError

SIZE = 64  # side of an image, pixels (App. A)
MIN_SIDE = 8  # pixels; anything smaller shows no face
CROPS = ("lfw", "centre", "celeba", "none")
CROP_OF_SIZE = {(250, 250): "lfw", (178, 218): "celeba", (SIZE, SIZE): "none"}  # else centre
# Pillow hands EPS and WMF to other programs, unpacks FITS without a bound, and finds no pixels of
# its own in the rest.
UNUSED_FORMATS = frozenset({"EPS", "WMF", "FITS", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"})


def crop_box(width: int, height: int, crop: str | None = None) -> tuple[float, float, float, float]:
    """Compute the square (left, top, right, bottom), in pixels, that shows CelebA's frame.

    crop: "lfw"     left 57, top 39, side 139 of 250 x 250; other square sizes in proportion
          "celeba"  rows 45-172, columns 25-152 of 178 x 218; other sizes of that shape too
          "centre"  the largest centred square
          "none"    the whole image, squeezed to a square if it is not one
          None      by size: 250 x 250 lfw, 178 x 218 celeba, 64 x 64 none, otherwise centre
    Raises UsageError for an unknown crop or one that does not fit the image's shape.
    """
    crop = crop or CROP_OF_SIZE.get((width, height), "centre")
    if crop not in CROPS:
        raise UsageError(f"unknown crop {crop!r}: choose {', '.join(CROPS)}")
    # celeba: a column more or less than the shape asks for
    fits = {"lfw": width == height, "celeba": abs(width * 218 - height * 178) <= 218}
    if not fits.get(crop, True):
        better = "celeba" if fits["celeba"] else CROP_OF_SIZE.get((width, height), "centre")
        raise UsageError(f"crop {crop} does not fit {width} x {height} pixels; use crop {better}")
    if crop == "lfw":
        k = width / 250
        return 57 * k, 39 * k, 196 * k, 178 * k
    if crop == "celeba":
        kx, ky = width / 178, height / 218
        return 25 * kx, 45 * ky, 153 * kx, 173 * ky
    if crop == "centre":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
    return 0, 0, width, height


def load_image(
    path: File, crop: str | None = None, size: int = SIZE, background: str = "white"
) -> torch.Tensor:
    """Decode one photograph as the loaders do -> torch uint8 (3, size, size), RGB.

    Upright by its EXIF orientation; first frame of an animation; transparency over background;
    grey, palette, CMYK and 16-bit become 8-bit RGB; colour profiles are ignored; antialiased
    (bicubic). crop: see `crop_box`. Raises UsageError naming the file and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks
            return torch.from_numpy(decode(path, crop, size, background))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def load_mask(path: File, crop: str, size: int) -> torch.Tensor:
    """Decode a drawn mask -> bool (size, size), True above half of its own range.

    What is transparent is never True. A coloured picture with transparent parts, as a printed patch
    is, is True where it is opaque. Raises UsageError as `load_image`.
    """
    black, white = (load_image(path, crop, size, over).int() for over in ("black", "white"))
    level, clear = black.float().mean(0), (white - black)[0]
    if clear.any() and (black != black[:1]).any():
        level = 255.0 - clear
    return level > (level.min() + level.max()) / 2


def image_size(path: File) -> tuple[int, int]:
    """Read width and height of an image file, upright. Raises OSError."""
    with Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) > 4
        return (image.height, image.width) if turned else image.size


def decode(path: File, crop: str | None, size: int, background: str = "white") -> np.ndarray:
    """Decode an image file -> uint8 (3, size, size).

    Raises UsageError with the reason alone, one printable line.
    """
    try:
        Image.init()
        formats = [name for name in Image.ID if name not in UNUSED_FORMATS]
        with Image.open(path, formats=formats) as image:
            W, H = image.size
            # The decoder itself halves a large JPEG, to four times the size or more.
            shrink = min(W, H) // (4 * size)
            if image.format in ("JPEG", "MPO") and shrink > 1:
                image.draft(None, (W // shrink, H // shrink))
            image.load()
            stored = image.size
            with contextlib.suppress(Exception):  # absurd EXIF says nothing about the picture
                ImageOps.exif_transpose(image, in_place=True)
            if image.size != stored:
                W, H = H, W
            if min(W, H) < MIN_SIDE:
                raise UsageError(f"{W}x{H} pixels is too small")
            left, top, right, bottom = crop_box(W, H, crop)
            # in the pixels that the decoder has left
            kx, ky = image.width / W, image.height / H
            right, bottom = min(right * kx, image.width), min(bottom * ky, image.height)
            box = (left * kx, top * ky, right, bottom)
            small = to_8_bit(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
            if small.mode == "RGBA":
                below = Image.new("RGBA", small.size, background)
                small = Image.alpha_composite(below, small).convert("RGB")
            return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))
    except UnidentifiedImageError:
        raise UsageError("not an image that Pillow reads") from None
    except Exception as error:  # noqa: BLE001  a hostile file makes a decoder raise anything
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise UsageError(printable(reason)[:160]) from None


def to_8_bit(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, or to RGBA where there is transparency.

    16-bit grey is scaled by 1/257, wider grey by its range.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        grey = np.array(image, dtype=np.float32)
        np.nan_to_num(grey, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        top = 65535.0 if image.mode.startswith("I;16") else float(grey.max())
        levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        grey *= 255.0 / next((level for level in levels if top <= level), top)
        grey += 0.5
        return Image.fromarray(np.clip(grey, 0, 255, out=grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def printable(text: str) -> str:
    """Escape the unprintable (line ends, raw bytes) and the backslash."""
    return "".join(c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in text)


def first_three(texts: Sequence[str]) -> str:
    """Join the first three texts, and say how many more there are."""
    more = [f"and {len(texts) - 3} more"] if len(texts) > 3 else []
    return "; ".join([*texts[:3], *more])


# many images


def hash_pixels(image: np.ndarray) -> int:
    """Hash an image's pixels: two of a million images share it once in 10^7 times."""
    digest = hashlib.blake2b(image.data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def choose_crop(paths: list[str]) -> tuple[str, str]:
    """Choose the crop that the sizes of most images ask for; also describe the sizes."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in paths:
        with contextlib.suppress(Exception), Image.open(path) as image:  # decodes nothing yet
            sizes[image.size] += 1
    crops: Counter[str] = Counter()
    for size, n in sizes.items():
        crops[CROP_OF_SIZE.get(size, "centre")] += n
    # of crops that as many images ask for, the one that fits all of them
    crop = max(CROPS, key=lambda crop: (crops[crop], crop == "centre"))
    each = [f"{W}x{H}" + f" ({n})" * (len(sizes) > 1) for (W, H), n in sizes.most_common()]
    mixed = "mixed sizes, " if len(each) > 1 else ""
    most = "most" if len(crops) > 1 else "all"
    return crop, f"{mixed}{first_three(each)}: crop {crop}, by the size of {most}"


def decode_all(
    paths: list[str], crop: str, size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Decode files -> images uint8 (N, 3, size, size), hashes int64 (N,), reasons.

    A hash is of the image at 64, whatever the size; a reason says why a file cannot be used.
    """
    N = len(paths)
    images = np.empty((N, 3, size, size), dtype=np.uint8)
    hashes = np.zeros(N, dtype=np.int64)
    reasons: list[str | None] = [None] * N

    def work(chunk: range) -> None:
        for i in chunk:
            try:
                images[i] = decode(paths[i], crop, size)
                # Decoded twice, as a photograph is the same one at every size, to the last bit.
                at_64 = images[i] if size == SIZE else decode(paths[i], crop, SIZE)
                hashes[i] = hash_pixels(at_64)
            except UsageError as error:
                reasons[i] = str(error)

    chunks = [range(i, min(i + 32, N)) for i in range(0, N, 32)]
    disable = None if progress and N >= 500 else True  # None: a bar where there is a terminal
    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks
        done = pool.map(work, chunks)
        list(tqdm(done, "decoding", len(chunks), unit="image", unit_scale=32, disable=disable))
    return images, hashes, reasons
