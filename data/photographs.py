"""Photographs: files -> pixels in CelebA's frame, whatever they are, and never a traceback.

A decoder may raise anything, take long or ask for much memory on a hostile file: what is refused,
and why, stands here.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .run import File
from .run import UsageError as DataError

try:
    from tqdm import tqdm
except ImportError:  # the bar is a comfort
    tqdm = None

SIZE = 64  # side of an image, pixels (App. A)
SIZES = (32, 256)  # what can be asked for
CROPS = ("lfw", "centre", "celeba", "none")
BY_SIZE = {(250, 250): "lfw", (178, 218): "celeba", (SIZE, SIZE): "none"}  # otherwise centre
MAX_PIXELS = 50_000_000  # larger images are skipped before they are decoded
MAX_BYTES = 256 * 2**20  # larger files are skipped before they are read
MIN_SIDE = 8  # pixels; anything smaller shows no face
MAX_SCAN_PIXELS = 2_500_000_000  # progressive JPEG: scans x pixels, a bound on decoding time
MAX_JPEG2000_BYTES = 12 * 2**20  # some 0.2 s a MiB: a bound on decoding time
# Left out: EPS and WMF call other programs, FITS unpacks gzip without a bound, the rest hold no
# pixels Pillow decodes
UNUSED_FORMATS = frozenset({"EPS", "WMF", "FITS", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"})
TRANSPOSE = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = tuple(TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))


class _Skip(Exception):
    """One image cannot be used; the message is the reason."""


# ---- one image


def crop_box(width: int, height: int, crop: str | None = None) -> tuple[float, float, float, float]:
    """The square (left, top, right, bottom), in pixels, that brings an image to CelebA's frame.

    crop: "lfw"     left 57, top 39, side 139 of 250 x 250; other square sizes in proportion
          "celeba"  rows 45-172, columns 25-152 of 178 x 218; other sizes of that shape too
          "centre"  the largest centred square
          "none"    the whole image, squeezed to a square if it is not one
          None      by size: 250 x 250 lfw, 178 x 218 celeba, 64 x 64 none, otherwise centre
    Raises DataError for an unknown crop or one that does not fit the image's shape.
    """
    crop = _check_crop(crop)
    if crop is None:
        crop = BY_SIZE.get((width, height), "centre")
    this = f"this image is {width}x{height}; use crop centre"
    if crop == "lfw":
        if width != height:
            raise DataError(f"crop lfw needs a square image, {this}")
        k = width / 250
        return 57 * k, 39 * k, 196 * k, 178 * k
    if crop == "celeba":
        if abs(width * 218 - height * 178) > 218:  # off by more than a column
            raise DataError(f"crop celeba needs the shape 178x218, {this}")
        kx, ky = width / 178, height / 218
        return 25 * kx, 45 * ky, 153 * kx, 173 * ky
    if crop == "centre":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
    return 0, 0, width, height


def load_image(path: File, crop: str | None = None, size: int = SIZE) -> torch.Tensor:
    """One photograph, decoded as the loaders do: torch uint8 (3, size, size), RGB.

    Upright by its EXIF orientation; first frame of an animation; transparency over white; grey,
    palette, CMYK and 16-bit become 8-bit RGB; colour profiles are ignored; antialiased (bicubic).
    crop: see `crop_box`; size: 32 to 256.
    Raises DataError naming the file and the reason.
    """
    crop, size = _check_crop(crop), _check_size(size)
    with warnings.catch_warnings():
        _quiet_pillow()
        try:
            pixels, _ = _decode(_read_bytes(os.fspath(path)), crop, size)
        except Exception as error:  # noqa: BLE001  a hostile file can make a decoder raise anything
            raise _wrong(path, _reason(error)) from None
    return torch.from_numpy(pixels)


def _decode(raw: bytes, crop: str | None, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An image file's bytes -> uint8 (3, size, size), and its width and height; below 1 GB. Raises
    what Pillow does, or _Skip."""
    if not raw:
        raise _Skip("empty file")
    Image.init()
    formats = [name for name in Image.ID if name not in UNUSED_FORMATS]
    with Image.open(io.BytesIO(raw), formats=formats) as image:
        W, H = image.size
        if W * H > MAX_PIXELS:
            raise _Skip(f"{W}x{H} pixels is too large (limit {MAX_PIXELS // 10**6} megapixels)")
        if image.format in ("JPEG", "MPO"):
            if "progressive" in image.info and raw.count(b"\xff\xda") * W * H > MAX_SCAN_PIXELS:
                raise _Skip("progressive JPEG with too many scans")
            shrink = min(W, H) // (4 * size)
            if shrink > 1:  # the decoder halves large photographs, to four times the size or more
                image.draft(None, (W // shrink, H // shrink))
        if image.format == "JPEG2000" and len(raw) > MAX_JPEG2000_BYTES:
            raise _Skip(f"JPEG 2000 of more than {MAX_JPEG2000_BYTES >> 20} MiB")
        drafted = image.size != (W, H)
        image.load()
        try:
            turn = TRANSPOSE.get(image.getexif().get(0x0112, 1))
        except Exception:  # noqa: BLE001  absurd EXIF says nothing about the picture
            turn = None
        upright = image.transpose(turn) if turn is not None else image
        if not drafted:
            W, H = upright.size
        elif turn in QUARTER_TURNS:
            W, H = H, W
        if min(W, H) < MIN_SIDE:
            raise _Skip(f"{W}x{H} pixels is too small")
        left, top, right, bottom = crop_box(W, H, crop)
        kx, ky = upright.width / W, upright.height / H
        right, bottom = min(right * kx, upright.width), min(bottom * ky, upright.height)
        box = (left * kx, top * ky, right, bottom)
        small = _eight_bit(upright).resize((size, size), Image.Resampling.BICUBIC, box=box)
        if small.mode == "RGBA":
            white = Image.new("RGBA", small.size, "white")
            small = Image.alpha_composite(white, small).convert("RGB")
        return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1)), (W, H)  # (3, size, size)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, or RGBA where there is transparency. 16-bit grey is scaled by 1/257, wider
    grey by its range."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        grey = np.array(image, dtype=np.float32)
        np.nan_to_num(grey, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        top = 65535.0 if image.mode.startswith("I;16") else float(grey.max())
        levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        grey *= 255.0 / next((level for level in levels if top <= level), top)
        grey += 0.5
        return Image.fromarray(np.clip(grey, 0, 255, out=grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        try:
            return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        except Exception:  # noqa: BLE001  a transparency entry that does not fit the image: drop it
            image.info.pop("transparency", None)
    return image.convert("RGB")


def _read_bytes(path: str) -> bytes:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe or device would block or never end
        raise _Skip("not a regular file")
    if about.st_size > MAX_BYTES:
        raise _Skip(f"{about.st_size // 2**20} MiB is too large (limit {MAX_BYTES // 2**20} MiB)")
    with open(path, "rb") as file:
        return file.read(MAX_BYTES)


def _quiet_pillow() -> None:
    """Inside `warnings.catch_warnings`: Pillow's remarks are dropped, a decompression bomb's is an
    error."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _reason(error: BaseException) -> str:
    """Why an image was skipped, one short printable line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow reads"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too large (decompression bomb)"
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if not isinstance(error, _Skip | OSError | DataError):
        text = f"broken image ({type(error).__name__}: {text})"
    return _printable(text.strip() or type(error).__name__)[:160]


def _printable(text: str) -> str:
    """One safe line: the unprintable (line ends, raw bytes) and the backslash are escaped."""
    safe = (c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in text)
    return "".join(safe)


def _short(text: str) -> str:
    return _printable(text)[:60]


def _some(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - 3} more"] if len(texts) > 3 else []
    return "; ".join([*texts[:3], *more])


def _wrong(path: File, what: str) -> DataError:
    """The error for a file or folder."""
    return DataError(f"{_printable(os.fspath(path))}: {what}")


def _check_crop(crop: str | None) -> str | None:
    if crop in (None, "", "auto"):
        return None
    if crop not in CROPS:
        advice = f"choose {', '.join(CROPS)}, or leave it out to go by the image's size"
        raise DataError(f"unknown crop {crop!r}: {advice}")
    return crop


def _check_size(size: int) -> int:
    if type(size) is not int or not SIZES[0] <= size <= SIZES[1]:
        told = f"give a whole number of pixels, {SIZES[0]} to {SIZES[1]}"
        raise DataError(f"--size {_short(str(size))}: {told}")
    return size


# ---- many images


def _hash(image: np.ndarray) -> int:
    """Of an image's pixels; among a million two different ones share it once in 10^7 times."""
    return int.from_bytes(
        hashlib.blake2b(image.data, digest_size=8).digest(), "little", signed=True
    )


def _decode_all(
    paths: list[str], crop: str | None, size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, list, list]:
    """Files -> uint8 (N, 3, size, size), the hashes of what they are at 64, int64 (N,), and
    per file its size, and None or why it was skipped."""
    try:
        images = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    except MemoryError:
        much = f"{len(paths)} images take {len(paths) * 3 * size**2 >> 20} MiB, more than there is"
        raise DataError(f"--size {size}: {much}; lower it") from None
    hashes = np.zeros(len(paths), dtype=np.int64)
    sizes: list[tuple[int, int] | None] = [None] * len(paths)
    reasons: list[str | None] = [None] * len(paths)
    stop = threading.Event()

    def work(some: range) -> None:
        for i in some:
            if stop.is_set():
                break
            try:
                raw = _read_bytes(paths[i])
                images[i], sizes[i] = _decode(raw, crop, size)
                # decoded again, as a photograph is the same one at every size, to the last bit
                hashes[i] = _hash(images[i] if size == SIZE else _decode(raw, crop, SIZE)[0])
            except Exception as error:  # noqa: BLE001  as in load_image
                reasons[i] = _reason(error)

    chunks = [range(i, min(i + 32, len(paths))) for i in range(0, len(paths), 32)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(16, cores or 1)) as pool:
        _quiet_pillow()
        try:
            done = as_completed([pool.submit(work, chunk) for chunk in chunks])
            if tqdm is not None and progress and len(paths) >= 500:
                done = tqdm(
                    done, "decoding", len(chunks), unit="image", unit_scale=32, disable=None
                )
            for _ in done:
                pass
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return images, hashes, sizes, reasons


def _decode_alike(
    paths: list[str], crop: str | None, size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, list, str, str]:
    """Files -> uint8 (N, 3, size, size), their hashes, per file None or why it was skipped, the
    crop of all, and what to tell of it. Without a crop it is the one that most sizes ask for."""
    images, hashes, sizes, reasons = _decode_all(paths, crop, size, progress)
    counts = Counter(size for size in sizes if size)
    each = [f"{W}x{H}" + f" ({n})" * (len(counts) > 1) for (W, H), n in counts.most_common()]
    told = f"{'mixed sizes, ' * (len(each) > 1)}{_some(each)}: crop "
    if crop is not None:
        return images, hashes, reasons, crop, told + crop
    asked = [BY_SIZE.get(size, "centre") if size else "" for size in sizes]
    crop = max(CROPS, key=lambda crop: (asked.count(crop), crop == "centre"))
    again = [i for i, other in enumerate(asked) if other not in ("", crop)]
    if again:
        pixels, marks, _, why = _decode_all([paths[i] for i in again], crop, size, False)
        for k, i in enumerate(again):
            images[i], hashes[i], reasons[i] = pixels[k], marks[k], why[k]
    return (
        images,
        hashes,
        reasons,
        crop,
        f"{told}{crop}, by the size of {'most' if again else 'all'}",
    )
