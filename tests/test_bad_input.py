"""Hostile and broken input: it works, or one clear line; never a traceback, a hang or much memory.

FUZZ=13 pytest -s tests/test_bad_input.py      # every count below times 13: more than 11,000 inputs
"""

import dataclasses
import importlib
import io
import json
import os
import random
import resource
import struct
import time
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data

FUZZ = max(int(os.environ.get("FUZZ", "1")), 1)
SECONDS = 10  # no single input may take longer
GIBIBYTE = 2**20  # ru_maxrss counts KiB


def one_line(error):
    text = str(error)
    assert text and text.isprintable() and len(text) < 1000, repr(text)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- image bytes


def seeds():
    """Small valid files of every kind Pillow writes, as (name, bytes)."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a face"
    exif.get_ifd(0x8769)[0x9286] = b"comment"
    frames = {"save_all": True, "append_images": [grey.convert("RGB"), rgb]}
    cmyk, bits, palette = rgb.convert("CMYK"), grey.convert("1"), rgba.quantize(16)
    wanted = {
        "JPEG": [(rgb, {"exif": exif}), (rgb, {"progressive": True}), (grey, {}), (cmyk, {})],
        "MPO": [(rgb, frames)],
        "PNG": [(rgb, {"exif": exif}), (rgb, frames)]
        + [(image, {}) for image in (rgba, palette, deep, rgba.convert("LA"), bits)],
        "GIF": [(rgb, frames), (grey, {})],
        "WEBP": [(rgba, {}), (rgb, frames)],
        "AVIF": [(rgb, {})],
        "TIFF": [(rgb, {"exif": exif}), (deep, {}), (grey.convert("F"), {}), (cmyk, {})]
        + [(rgb, {"compression": how}) for how in ("tiff_lzw", "jpeg")],
        "BMP": [(rgb, {}), (rgba, {})],
        "TGA": [(rgba, {"compression": "tga_rle"})],
        "DIB": [(grey, {})],
        "SPIDER": [(grey, {})],
        "BLP": [(palette, {})],
    }
    wanted |= {kind: [(rgb, {})] for kind in ("PPM", "PCX", "SGI", "IM", "JPEG2000")}
    wanted |= {kind: [(rgba, {})] for kind in ("ICO", "ICNS", "DDS", "QOI")}
    wanted |= {kind: [(bits, {})] for kind in ("XBM", "MSP")}
    found = []
    for kind, image, options in [
        (name, *rest) for name, several in wanted.items() for rest in several
    ]:
        file = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.save(file, kind, **options)
        except (KeyError, OSError, ValueError):  # this Pillow does not write the kind
            continue
        found.append((kind, file.getvalue()))
    assert len(found) > 20
    return found


def mutate(raw, other, rng):
    """A damaged copy of raw: bits, cuts, repeats, zeros, limits, part of another file."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not raw:
            break
        at, n = rng.randrange(len(raw)), rng.randrange(1, 40)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(64))  # headers decide most
        how = rng.randrange(8)
        if how == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            raw[at] = rng.choice((0, 1, 127, 128, 255))
        elif how == 2:
            del raw[at : at + n]
        elif how == 3:
            raw[at:at] = raw[at : at + n] * rng.randrange(1, 50)
        elif how == 4:
            raw[at : at + n] = bytes(len(raw[at : at + n]))
        elif how == 5:
            limit = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 60000, 7000))
            number = struct.pack(
                rng.choice("<>") + ("H" if limit < 2**16 and rng.random() < 0.5 else "I"), limit
            )
            raw[at : at + len(number)] = number
        elif how == 6:
            raw[at : at + n] = other[at : at + n]
        elif rng.random() < 0.5:
            del raw[at:]
        else:
            raw[at:at] = rng.randbytes(n)
    return bytes(raw)


def test_damaged_images(tmp_path):
    rng, kinds = random.Random(1), seeds()
    path, read, slowest = tmp_path / "a b é.jpg", 0, 0.0
    for _ in range(500 * FUZZ):
        raw = rng.choice(kinds)[1]
        raw = mutate(raw, rng.choice(kinds)[1], rng)
        path.write_bytes(raw)
        begin = time.perf_counter()
        try:
            crop, size = rng.choice((None, *data.photographs.CROPS)), rng.choice((64, 64, 32, 256))
            pixels = data.load_image(path, crop, size)
        except data.DataError as error:
            one_line(error)
        except BaseException:
            (tmp_path / "failed").write_bytes(raw)
            raise
        else:
            assert pixels.shape == (3, size, size) and pixels.dtype == torch.uint8
            read += 1
        slowest = max(slowest, time.perf_counter() - begin)
    told = f"slowest {slowest:.2f} s, peak {peak() / GIBIBYTE:.2f} GiB"
    print(f"{500 * FUZZ} images, {read} read, {told}")
    assert read and slowest < SECONDS and peak() < 2 * GIBIBYTE


def test_folder_of_damaged_images(tmp_path, capfd):
    """The loader keeps the good ones, names the others in one line."""
    rng, kinds = random.Random(2), seeds()
    root = tmp_path / "faces"
    for k in range(5):
        (root / f"person {k}").mkdir(parents=True)
        for i in range(12):
            kind, raw = rng.choice(kinds)
            raw = mutate(raw, rng.choice(kinds)[1], rng)
            (root / f"person {k}" / f"{i}.{kind.lower()}").write_bytes(raw)
        Image.new("RGB", (30, 30), (k, 0, 0)).save(root / f"person {k}" / "good.png")
    faces = data.load("folder", root, cache=tmp_path / "cache")
    assert len(faces) + len(faces.skipped) == 65 and len(faces.names) == 5 and len(faces) >= 5
    out, err = capfd.readouterr()
    ours = [
        line for line in err.splitlines() if line.startswith("data: ")
    ]  # libtiff may add lines of its own
    assert out == f"data: {faces.notes[0]}\n" and "65 files skipped" in ours[-1]
    assert f"{len(faces.skipped)} of 65" in ours[-1]
    assert ours[:-1] == [f"data: {note}" for note in faces.notes[1:]]
    assert "Traceback" not in err


def png(width, height, bits=8, colour=2, extra=b""):
    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + extra
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


BOMBS = {
    "png": png(60_000, 60_000),
    "png just over": png(10_000, 5_001),
    "png huge": png(2**31 - 1, 2**31 - 1),
    "png line": png(2**31 - 1, 1),
    "bmp": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x2c" + bytes(10),
    "ppm": b"P6 100000 100000 255\n" + bytes(100),
    "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bomb(name, tmp_path):
    (tmp_path / "a.png").write_bytes(BOMBS[name])
    before, begin = peak(), time.perf_counter()
    with pytest.raises(data.DataError) as caught:
        data.load_image(tmp_path / "a.png")
    one_line(caught.value)
    assert "too large" in str(caught.value) or name in ("gif", "tga")
    assert time.perf_counter() - begin < 2 and peak() - before < GIBIBYTE / 4


def test_largest_image_allowed_takes_bounded_memory(tmp_path):
    Image.new("RGBA", (7_000, 7_000), (9, 9, 9, 9)).save(tmp_path / "a.png", compress_level=1)
    begin = time.perf_counter()
    assert data.load_image(tmp_path / "a.png").shape == (3, 64, 64)
    assert time.perf_counter() - begin < SECONDS and peak() < 2 * GIBIBYTE


def test_progressive_jpeg_of_endless_scans(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4_000, 4_000), "red").save(file, "JPEG", progressive=True)
    raw = file.getvalue()
    last = raw.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(raw[:last] + raw[last:-2] * 400 + b"\xff\xd9")
    begin = time.perf_counter()
    with pytest.raises(data.DataError, match="too many scans"):
        data.load_image(tmp_path / "a.jpg")
    assert time.perf_counter() - begin < 2


def test_eps_never_reaches_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(data.DataError, match="not an image"):
        data.load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("value", ["six", (1, 2), 0, -1, 99, 2**31])
def test_absurd_orientation(value, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {0x0112: value})
    assert data.load_image(tmp_path / "a.png").shape == (3, 64, 64)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 99,
    ],
)
def test_absurd_exif(exif, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(tmp_path / "a.jpg")[0].min() > 240


# ---- folders


def test_folder_of_traps(tmp_path, capsys):
    root = tmp_path / "my faces"
    names = ("ann", "name with spaces", "数学 é\u202e", "line\nend", "back\\slash")
    for grey, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (grey,) * 3).save(root / name / "ok.png")
    Image.new("RGB", (64, 64), "red").save(root / "ann" / "wrong.jpg", "PNG")
    with open(os.fsencode(root / "ann") + b"/\xff\xfe.png", "wb") as file:
        Image.new("RGB", (64, 64), "blue").save(file, "PNG")
    (root / "ann" / "loop").symlink_to(root)
    (root / "ann" / "self").symlink_to(root / "ann" / "self")
    (root / "ann" / "broken.jpg").symlink_to(root / "absent.jpg")
    (root / "ann" / "zero.jpg").write_bytes(b"")
    (root / "ann" / "half.png").write_bytes((root / "ann" / "ok.png").read_bytes()[:60])
    (root / "ann" / "bomb.png").write_bytes(BOMBS["png"])
    (root / "ann" / "tiny.png").write_bytes(png(1, 1))
    os.mkfifo(root / "ann" / "pipe.jpg")
    with open(root / "ann" / "large.jpg", "wb") as file:
        file.truncate(data.photographs.MAX_BYTES + 1)
    (root.joinpath("ann", *"123456789")).mkdir(parents=True)
    begin = time.perf_counter()
    faces = data.load("folder", root, cache=tmp_path / "cache")
    assert time.perf_counter() - begin < SECONDS
    assert len(faces) == 7 and len(faces.names) == 5
    assert all(name.isprintable() for name in faces.names + faces.files)
    reasons = dict(line.rsplit("/", 1)[1].split(": ", 1) for line in faces.skipped)
    refused = {"zero.jpg": "empty file", "bomb.png": "too large", "large.jpg": "too large"}
    refused |= {"pipe.jpg": "regular", "loop": "already", "tiny.png": "too small"}
    assert set(reasons) == {*refused, "self", "broken.jpg", "half.png", "8"}
    assert all(reason in reasons[name] for name, reason in refused.items())
    assert reasons["zero.jpg"] == "empty file"
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "10 of 17 files skipped" in err and "and 7 more" in err
    assert "7 photographs of 5 persons, 64x64: crop none" in out
    split = data.split_persons(faces, 5, 0, 0)
    data.write_manifest(tmp_path / "people.json", faces, split)
    assert data.read_manifest(tmp_path / "people.json", faces) == split


PERSONS = ["Zoë Müller", "zoë müller", "ZoëMüller", "ann", "Dev", "bob_2", "数学", "IMG", "o'b - é"]
LEVELS = ["train", "Test", "VAL", "gallery", "probe_images", "dev-1", "query set"]
# how a person's k-th photograph is filed: {p} person, {s} split, {c} collection, {k} number
LAYOUTS = {
    "{p}/{k}.png": "",
    "{s}/{p}/{k}.png": "",
    "lfw/{p}/{k}.png": "",
    "faces/{s}/{p}/images/{k}.png": "",
    "{p}_{k}.png": "",
    "{s}/{p}-{k}.png": "",
    "{p}/day {c}/{k}.png": "first",
    "{s}/{p}/{c}/more/{k}.png": "first",
    "{c}/{p}/{k}.png": "last",
    "all of it/{c}/{s}/{p}/{k}.png": "last",
}


def spelt(text, rng):
    return unicodedata.normalize(rng.choice(("NFC", "NFD")), text)


def test_arbitrary_layouts(tmp_path, capfd):
    """Persons filed in every way, names spelt in every way, photographs twice: each photograph is
    once there, and its person's, or it is one line; what is left out is named."""
    rng, asked = random.Random(8), 0
    for n in range(50 * FUZZ):
        root, pattern = tmp_path / str(n), rng.choice(list(LAYOUTS))
        persons, whose = rng.sample(PERSONS, rng.randrange(2, 6)), {}
        groups = [(rng.choice("ab"), rng.choice(LEVELS)) for _ in range(rng.randrange(1, 4))]
        groups += [("a", groups[0][1]), ("b", groups[0][1])]  # at least two of everything
        for c, s in groups:
            for p in persons:
                for _ in range(rng.randrange(1, 3)):
                    path = pattern.format(p=p, s=s, c=c, k=len(whose))
                    path = root / spelt(path, rng)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    colour = len(whose) if rng.random() < 0.8 else rng.randrange(len(whose) + 1)
                    Image.new("RGB", (64, 64), (colour, 7, n % 256)).save(path)
                    whose[str(path.relative_to(root))] = (p, colour)
        right = LAYOUTS[pattern]
        given = rng.choice((None, None, right or "last", "first" if right == "first" else "last"))
        capfd.readouterr()
        if right and given is None:
            with pytest.raises(data.DataError, match="give --person-folder first .* or last") as e:
                data.load("folder", root, cache=None)
            one_line(e.value)
            asked += 1
            continue
        faces = data.load("folder", root, cache=None, person_folder=given)
        of = {}
        for p, colour in whose.values():
            of.setdefault(colour, set()).add(p)
        once = {colour: min(found) for colour, found in of.items() if len(found) == 1}
        assert faces.images[:, 0, 0, 0].sort().values.tolist() == sorted(once), pattern
        for k, file in enumerate(faces.files):
            p, colour = whose[file]
            assert faces.names[int(faces.person[k])] == p == once[colour]
            assert int(faces.images[k, 0, 0, 0]) == colour
        left_out = {line.split(": ")[0] for line in faces.skipped}
        assert left_out == whose.keys() - {*faces.files}
        out, err = capfd.readouterr()
        assert out == f"data: {faces.notes[0]}\n" and f"{len(faces)} photographs of" in out
        assert all(line.startswith("data: ") for line in err.splitlines())
        told = {
            "filed under two persons": len(once) < len(of),
            "exact copies": len(left_out) > sum(of[c] != {p} for p, c in whose.values()),
            "names alike": len({*persons} & {*PERSONS[:3]}) > 1,
            "taken for splits": "{s}" in pattern or "images" in pattern,
            "files skipped": bool(left_out),
        }
        assert {what: what in err for what in told} == told, (pattern, persons, err)
    print(f"{50 * FUZZ} folders, {asked} asked about")
    assert asked


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_and_folder(tmp_path):
    for name in ("ann", "bob", "eve"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "in" / name / "a.png")
    (tmp_path / "in" / "ann" / "a.png").chmod(0)
    (tmp_path / "in" / "bob").chmod(0)
    faces = data.load("folder", tmp_path / "in", cache=None)
    (tmp_path / "in" / "bob").chmod(0o700)
    assert (
        faces.names == ("eve",)
        and [line.split(": ")[1] for line in faces.skipped] == ["Permission denied"] * 2
    )


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    """The same for a user who may read everything."""
    for name in ("ann", "bob"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "in" / name / "a.png")
    whole = data.photographs._read_bytes

    def refuse(path):
        if "ann" in path:
            raise PermissionError(13, "Permission denied", path)
        return whole(path)

    monkeypatch.setattr(data.photographs, "_read_bytes", refuse)
    faces = data.load("folder", tmp_path / "in", cache=None)
    assert faces.names == ("bob",) and faces.skipped == (f"ann{os.sep}a.png: Permission denied",)


def test_interrupt_stops_decoding(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(200):
        (tmp_path / "in" / f"a_{i}.png").write_bytes(b"x")
    begin = time.perf_counter()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.photographs, "_decode", lambda *_: time.sleep(0.1))
    monkeypatch.setattr(data.photographs, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("folder", tmp_path / "in", cache=None)
    assert time.perf_counter() - begin < 3


# ---- identity files and manifests


IDENTITIES = b"6\nimage_id identity\n" + b"".join(
    b"%06d.jpg %d\n" % (i, 10 * i % 7) for i in range(1, 30)
)
WORDS = [b"\r", b"\r\n", b"\n\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b" ", b",", b"-1", b"9" * 30]
WORDS += [b"../", b"000001.jpg 1\n", "١".encode()]


def test_damaged_identity_files(tmp_path):
    rng, path, read = random.Random(3), tmp_path / "identity_CelebA.txt", 0
    present = [f"{i:06d}.jpg" for i in range(1, 30)]
    for _ in range(150 * FUZZ):
        raw = bytearray(
            mutate(IDENTITIES, rng.choice(WORDS) * 40, rng) if rng.random() < 0.5 else IDENTITIES
        )
        at = rng.randrange(len(raw) + 1)
        raw[at:at] = rng.choice(WORDS)
        path.write_bytes(raw)
        try:
            found = data.read_identities(path, present)
        except data.DataError as error:
            one_line(error)
            assert "identity_CelebA.txt" in str(error)
        else:
            assert (
                found
                and set(found) <= set(present)
                and all(name.isdigit() for name in found.values())
            )
            read += 1
    print(f"{150 * FUZZ} identity files, {read} read")


def test_damaged_manifests(tmp_path):
    person = torch.arange(30).repeat_interleave(10)
    faces = data.Faces(
        torch.zeros(300, 3, 64, 64, dtype=torch.uint8),
        person,
        tuple(f"p{k:02d}" for k in range(30)),
        ("",) * 300,
    )
    path = tmp_path / "people.json"
    split = data.split_persons(faces, 9, 5, 4)
    data.write_manifest(path, faces, split)
    rng, good, read = random.Random(4), path.read_bytes(), 0
    values = [None, True, -1, 1e400, float("nan"), "p00", "\ud800", [], ["p00", "p00"], [["p00"]]]
    values += [{"a": 1}, 10**400, ["x\n"], "é"]
    for i in range(150 * FUZZ):
        if i % 2:
            raw = mutate(good, b'"],[{}:\\u0000' * 100, rng)
        else:  # well-formed JSON with a value that is out of place, half of it with a fitting hash
            held = json.loads(good)
            for _ in range(rng.randrange(1, 3)):
                held[rng.choice([*held, "new"])] = rng.choice(values)
            if rng.random() < 0.5:
                held["sha256"] = data._digest(
                    {key: value for key, value in held.items() if key != "sha256"}
                )
            raw = json.dumps(held).encode()
        path.write_bytes(raw)
        try:
            found = data.read_manifest(path, faces)
        except data.DataError as error:
            one_line(error)
            assert "people.json" in str(error)
        else:
            everyone = found.train + found.validation + found.target
            assert len(set(everyone)) == len(everyone) and set(everyone) <= set(range(30))
            read += 1
    print(f"{150 * FUZZ} manifests, {read} read")


def test_arbitrary_text(tmp_path):
    """What hypothesis makes of names, manifests and identity files."""
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    faces = data.Faces(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), ("", "")
    )
    path = tmp_path / "people.json"
    values = some.recursive(
        some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
        lambda inner: (
            some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3)
        ),
        max_leaves=8,
    )
    keys = some.sampled_from(["data", "images", "seed", "train", "validation", "target", "sha256"])

    @hypothesis.settings(max_examples=25 * FUZZ, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        some.binary(max_size=300), some.dictionaries(keys, values), some.text(max_size=30)
    )
    def check(raw, held, name):
        for text in (raw, json.dumps(held).encode()):
            path.write_bytes(text)
            for read in (
                lambda: data.read_manifest(path, faces),
                lambda: data.read_identities(path),
            ):
                try:
                    read()
                except data.DataError as error:
                    one_line(error)
        assert data._printable(name).isprintable()

    check()


# ---- checkpoints and rows


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


OUT_OF_PLACE = (
    None,
    True,
    -1,
    0,
    10**9,
    1e300,
    float("nan"),
    "x",
    [],
    {},
    torch.zeros(0),
    torch.zeros(3, 3),
    (1, 2),
    b"x",
)


def misplace(held, rng):
    """Puts a value that does not belong there into some nested dictionary, or takes one away."""
    while True:
        key = rng.choice(list(held))
        if not isinstance(held[key], dict) or not held[key] or rng.random() < 0.2:
            break
        held = held[key] = dict(held[key])
    if rng.random() < 0.3:
        del held[key]
    else:
        held[key] = rng.choice(OUT_OF_PLACE)


def test_damaged_checkpoints(tmp_path, monkeypatch):
    """Bytes damaged, values out of place, pickled code: an F or G that works, or one line; nothing
    is executed."""
    import embed
    import generator

    monkeypatch.chdir(tmp_path)
    sizes = {"class_dim": 4, "content_dim": 4, "hidden": (4, 4), "channels": (4, 4, 4, 4)}
    sizes |= {"out_channels": 2, "encoder_channels": (2, 2, 2, 2, 2), "encoder_hidden": 4}
    small, config = generator.Config(**sizes), {"width": 0.01, "dim": 4, "standardise": True}
    F = {"kind": "embedding", "config": config, "model": embed.Embedding(**config).state_dict()}
    G = {"kind": "generator", "config": dataclasses.asdict(small), "train": ["a"]}
    goods = {"F": F | {"step": 3}, "G": G | {"lord": generator.Lord(small).state_dict()}}
    device, image = torch.device("cpu"), torch.rand(2, 3, 64, 64)
    rng, read, slowest = random.Random(6), 0, 0.0
    paths = {"F": tmp_path / "embedding.pt", "G": tmp_path / "generator.pt"}
    loads = {
        "F": lambda: embed.load_embedding(paths["F"]),
        "G": lambda: generator.load_generator(paths["G"], device)[0],
    }
    for what, good in goods.items():
        buffer = io.BytesIO()
        torch.save(good, buffer)
        raw = buffer.getvalue()
        paths[what].write_bytes(raw)
        with torch.no_grad():
            loads[what]()(image)  # a good one works
        for i in range(60 * FUZZ):
            if i % 3 == 0:
                code = b"PK\3\4cposix\nsystem\n(S'mkdir executed'\ntR." * 9
                paths[what].write_bytes(mutate(raw, code, rng))
            elif i % 3 == 1:
                paths[what].write_bytes(raw[: rng.randrange(len(raw))])
            else:
                held = dict(good)
                misplace(held, rng)
                torch.save(held | ({"more": Evil()} if rng.random() < 0.2 else {}), paths[what])
            begin = time.perf_counter()
            try:
                model = loads[what]()
            except data.DataError as error:
                one_line(error)
                assert paths[what].name in str(error)
            else:
                with torch.no_grad():
                    model(image)
                read += 1
            slowest = max(slowest, time.perf_counter() - begin)
        torch.save(good | {"more": Evil()}, paths[what])
        with pytest.raises(data.DataError, match="cannot be read"):
            loads[what]()
    assert not (tmp_path / "executed").exists() and slowest < SECONDS
    print(f"{120 * FUZZ} checkpoints, {read} read, slowest {slowest:.2f} s")


def test_damaged_rows(tmp_path):
    """Rows of an attack, and the json beside them, damaged: read, every figure finite, or one line
    that names the file."""
    import metrics

    folder = tmp_path / "run" / "ours" / "attacks"
    folder.mkdir(parents=True)
    rows = [",".join(metrics.COLUMNS)]
    for k in range(40):
        role = "genuine" if k % 2 else "intruder"
        values = {"attack": "clean", "mirroring": 1, "selection": 1, "seed": 0, "anchor": 0}
        values |= {"target": f"p{k // 2 % 4}", "candidate": k}
        values |= {"person": f"p{k // 2 % 4 if k % 2 else 9}", "role": role, "distance": k / 7}
        rows.append(",".join(str(values.get(name, "")) for name in metrics.COLUMNS))
    good = "\n".join(rows).encode() + b"\n"
    about = {"attack": "clean", "iterations": 80, "zero_gradients": 0, "gradients": 9}
    about = json.dumps(about).encode()
    (folder / "clean.csv").write_bytes(good)
    (folder / "clean.json").write_bytes(about)
    assert metrics.summary(metrics.read_run(tmp_path / "run"))["ours"]["clean"]["n_targets"] == 4
    rng, read = random.Random(7), 0
    words = [b",", b"\n", b'"', b"nan", b"-1", b"1e400", b"9" * 30, b"\0", b"\xff", b"genuine"]
    words += [b"intruder", "é".encode(), b"inf", b""]
    for i in range(100 * FUZZ):
        raw = bytearray(mutate(good, rng.choice(words) * 40, rng) if i % 2 else good)
        at, n = rng.randrange(len(raw) + 1), rng.randrange(4)
        raw[at : at + n] = rng.choice(words)
        (folder / "clean.csv").write_bytes(raw)
        beside = mutate(about, b'{"[,]}:nul' * 9, rng) if i % 5 == 0 else about
        (folder / "clean.json").write_bytes(beside)
        try:
            runs = [metrics.read_run(tmp_path / "run")]
            found = metrics.summary(runs)
            metrics.health(runs)
            metrics.table(found)
            if i % 10 == 0:  # all that it prints
                assert metrics.main(["--run", str(tmp_path / "run")]) == 0
        except data.DataError as error:
            one_line(error)
            assert "clean" in str(error) or "run" in str(error)
        else:
            figures = [m for attacks in found.values() for m in attacks.values()]
            assert all(0 <= m[key] <= 1 for m in figures for key in ("auroc", "aupr"))
            read += 1
    print(f"{100 * FUZZ} tables of rows, {read} read")


# ---- flags


VALUES = ["-1", "0", "1", "2", "3.5", "-0.0", "1e-400", "1e400", "nan", "inf", "-inf", "9" * 23]
VALUES += ["0x10", "1,2", "2,1", "0.1,0.2", ",,", "1,nan", "1,2,3,4", "١", "é", "", " ", "--", "-"]
VALUES += ["a b", "ours", "demo", "all", "None", "True"]


def models_of(weight):
    """What a user's model may answer."""
    return {
        "fits": lambda x: x.flatten(1).float() @ weight,
        "nan": lambda x: x.flatten(1).float() @ weight * torch.nan,
        "tuple": lambda x: (x.flatten(1).float() @ weight, 0),
        "maps": lambda x: (x.flatten(1).float() @ weight)[:, :, None, None],
        "batch": lambda x: (x.float() - x.float().mean(0)).flatten(1) @ weight,
        "random": lambda x: x.flatten(1).float() @ (weight + torch.randn_like(weight) / 9),
        "whole": lambda x: (x.flatten(1).float() @ weight).round().long(),
    }


def test_arbitrary_inputs_of_attacks():
    """Images of any size, type and range, models of any output: what an attack returns is right, or
    it is a ValueError of one line."""
    import attacks as a

    rng, counts = random.Random(31), {"worked": 0, "refused": 0}
    for n in range(40 * FUZZ):
        torch.manual_seed(n)
        C, H, W, D = rng.choice((1, 3)), *(rng.randrange(6, 90) for _ in range(2)), 4
        weight = torch.randn(C * H * W, D) / 20
        models = models_of(weight)
        kinds = rng.choices(list(models), [6, 1, 1, 1, 1, 1, 1])[0]
        images = torch.rand(rng.choice((0, 1, 3)), C, H, W)
        ranges = {"unit": images, "bytes": (images * 255).byte(), "0..255": images * 255}
        ranges |= {"-1..1": images * 2 - 1, "half": images.half(), "double": images.double()}
        ranges |= {"nan": images / images.round(), "one": images[:1].squeeze(0)}
        given = rng.choices(list(ranges), [6, 1, 1, 1, 1, 2, 1, 1])[0]
        widths = {"fits": D, "one": 1, "more": D + 1}
        width = rng.choices(list(widths), [6, 1, 1])[0]
        anchor, mask = torch.randn(widths[width]), a.eyeglasses_mask(H, W)
        mask = rng.choices((mask, a.eyeglasses_mask(H + 1, W)), [6, 1])[0]
        images, embed = ranges[given], models[kinds]
        effort, generator = a.Effort(2, 0.1, 1), torch.Generator().manual_seed(n)
        told = f"{n}: {kinds}, {given} {tuple(images.shape)} {images.dtype}, anchor {width}"
        good = kinds == "fits" and given in ("unit", "double") and width == "fits"
        good = good and mask.shape == (H, W)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = a.tanh_attack(embed, images, anchor, mask, effort, generator)
        except ValueError as error:
            one_line(error)
            assert not good, f"{told}: {error}"
            counts["refused"] += 1
            continue
        counts["worked"] += 1
        empty = images.dim() == 4 and not len(images)
        assert good or empty, told
        assert found.images.shape == images.shape and len(found.distance) == len(images), told
        assert found.images.dtype == images.dtype and found.distance.isfinite().all(), told
        outside = ~mask.expand(len(images), C, H, W)
        assert empty or torch.equal(found.images[outside], images[outside]), told
        if not empty:
            assert 0 <= found.images.min() and found.images.max() <= 1, told
            wanted = (embed(found.images) - anchor).square().sum(1).sqrt()
            assert torch.allclose(found.distance.float(), wanted, rtol=1e-4), told
    assert min(counts.values()) >= 8, counts


def test_arbitrary_flags(tmp_path):
    """Each script's command line with one to three settings replaced: taken, its numbers finite and
    in order, or one line."""
    import attacks
    import embed
    import generator

    rng, taken = random.Random(5), 0
    (tmp_path / "run.json").write_text('{"data": "synthetic"}')
    scripts = (
        (embed, ["--preset", "demo"]),
        (generator, ["--preset", "demo"]),
        (attacks, ["--run", str(tmp_path)]),
    )
    for script, start in scripts:
        fields = [field.name for field in dataclasses.fields(script.Config)]
        names = [name for name in fields if name not in ("run", "preset")]
        for _ in range(80 * FUZZ):
            flags = [rng.choice(names).replace("_", "-") for _ in range(rng.randrange(1, 4))]
            argv = [*start, *(f"--{flag}={rng.choice(VALUES)}" for flag in flags)]
            try:
                found = script.parse(argv)
            except data.DataError as error:
                one_line(error)
                assert "--" in str(error)
                continue
            config = found[0] if isinstance(found, tuple) else found
            for name in names:
                value, usual = getattr(config, name), getattr(script.Config, name)
                if isinstance(usual, tuple) and isinstance(usual[0], str):
                    assert value and all(isinstance(v, str) and v for v in value), (
                        argv,
                        name,
                        value,
                    )
                elif isinstance(usual, tuple):
                    assert len(value) == len(usual), (argv, name, value)
                    assert all(0 < v < 2**31 for v in value), (argv, name, value)
                elif not isinstance(usual, str):
                    assert -1 <= value < 2**31, (argv, name, value)
            taken += 1
    assert taken
    print(f"{240 * FUZZ} command lines, {taken} taken")


OUT_OF_BOUNDS = (
    "--steps=-3 --steps=0 --batch=0 --margin=nan --lr=inf --width=0 --cutout-area=0.2,0.1"
)
OUT_OF_BOUNDS += " --cutout-area=0.2 --doa-size=65 --shift=64 --mine=0 --validate-every=0"
FLAGS = [("embed", [flag]) for flag in OUT_OF_BOUNDS.split()]
FLAGS += [("embed", ["--method=doa", flag]) for flag in ("--candidates=0", "--attacked=erased")]
OUT_OF_BOUNDS = "--epochs=-1 --batch=0 --noise=nan --channels=3,4 --hidden=8,0 --lr=0"
FLAGS += [("generator", [flag]) for flag in OUT_OF_BOUNDS.split()]
FLAGS += [(name, ["--resume"]) for name in ("generator", "embed", "attacks")]  # by itself now


@pytest.mark.parametrize("script, flags", FLAGS, ids=str)
def test_flags_that_are_refused(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(script).main(flags) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and flags[-1].split("=")[0] in told[0] and not list(tmp_path.iterdir())
