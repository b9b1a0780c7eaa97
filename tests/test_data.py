"""data: decoding, loaders, cache, splits, manifest. Small images made here; LFW where it lies
beside the repository."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL import __version__ as pillow_version

import data

REPO = Path(__file__).parents[1]
LFW = REPO.parent / "shared" / "lfw"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(size=(64, 64), colours=(RED, GREEN, BLUE, WHITE)):
    """An image with a colour in each quarter: upper left, upper right, lower left, lower right."""
    w, h = size
    image = Image.new("RGB", size)
    for i, colour in enumerate(colours):
        image.paste(
            colour,
            (
                (i % 2) * (w // 2),
                (i // 2) * (h // 2),
                w if i % 2 else w // 2,
                h if i // 2 else h // 2,
            ),
        )
    return image


def corners(pixels, inset=12):
    """The colours of a (3, 64, 64) image near its corners, as tuples in the order of `quarters`."""
    far = 63 - inset
    return [
        tuple(pixels[:, r, c].tolist())
        for r, c in ((inset, inset), (inset, far), (far, inset), (far, far))
    ]


def near(found, wanted, by=12):
    return all(abs(a - b) <= by for one, other in zip(found, wanted) for a, b in zip(one, other))


@pytest.fixture
def folder(tmp_path):
    """Three persons of 4, 3 and 1 images of one grey level: person k's image i is 60 k + 10 i."""
    root = tmp_path / "faces"
    for k, (name, n) in enumerate((("ann", 4), ("bob b", 3), ("çelik", 1))):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (64, 64), (60 * k + 10 * i,) * 3).save(root / name / f"{i}.png")
    return root


def fill(root, *paths):
    """Photographs at these paths, each of another colour than all others."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        colour = (*np.random.default_rng(list(path.encode())).integers(0, 256, 3).tolist(),)
        Image.new("RGB", (64, 64), colour).save(root / path)


def load(root, tmp_path, **more):
    return data.load(
        "folder", root, cache=more.pop("cache", tmp_path / "cache"), progress=False, **more
    )


def told(capsys, faces):
    """The lines on stderr since the last look, but for the notes of these faces."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.removeprefix("data: ") not in faces.notes]


def made(counts, names=None):
    """Faces with these image counts per person, black."""
    person = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    names = names or tuple(f"p{k:04d}" for k in range(len(counts)))
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8).expand(len(person), -1, -1, -1)
    return data.Faces(images, person, tuple(names), tuple(f"{i}" for i in range(len(person))))


# ---- one image


def test_lfw_crop_is_left_57_top_39_side_139():
    assert data.crop_box(250, 250) == (57, 39, 196, 178)
    assert data.crop_box(500, 500, "lfw") == (114, 78, 392, 356)


def test_celeba_crop_is_rows_45_to_172_columns_25_to_152():
    assert data.crop_box(178, 218) == (25, 45, 153, 173)


def test_centre_and_none():
    assert data.crop_box(300, 200) == (50, 0, 250, 200)
    assert data.crop_box(200, 300, "centre") == (0, 50, 200, 250)
    assert data.crop_box(64, 64) == (0, 0, 64, 64)
    assert data.crop_box(300, 200, "none") == (0, 0, 300, 200)


@pytest.mark.parametrize(
    "crop, size", [("lfw", (300, 200)), ("celeba", (250, 250)), ("nonsense", (64, 64))]
)
def test_crop_that_does_not_fit(crop, size):
    with pytest.raises(data.DataError, match="crop"):
        data.crop_box(*size, crop)


def test_eyes_of_lfw_and_celeba_land_in_one_place(tmp_path):
    for size, eyes in (
        ((250, 250), ((111, 105), (111, 146))),
        ((178, 218), ((111.8, 69.6), (111.8, 107.4))),
    ):
        image = Image.new("RGB", size)
        for row, column in eyes:
            image.paste(
                WHITE, (round(column) - 3, round(row) - 3, round(column) + 4, round(row) + 4)
            )
        image.save(tmp_path / "eyes.png")
        pixels = data.load_image(tmp_path / "eyes.png").float().mean(0)
        for part, column in ((slice(0, 32), 22), (slice(32, 64), 41)):
            weight = pixels[:, part]
            rows, columns = torch.arange(64.0), torch.arange(64.0)[part]
            assert (weight.sum(1) @ rows / weight.sum()).item() == pytest.approx(33.2, abs=0.8)
            assert (weight.sum(0) @ columns / weight.sum()).item() == pytest.approx(column, abs=0.8)


def test_none_keeps_every_pixel(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert torch.equal(
        data.load_image(tmp_path / "a.png"), torch.from_numpy(noise).permute(2, 0, 1)
    )


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (data.load_image(tmp_path / "a.png").float() - 127.5)[:, :, 2:-2].abs().max() < 3


MODES = ["RGB", "RGBA", "P", "L", "LA", "CMYK", "YCbCr", "LAB", "1", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads(mode, tmp_path):
    if mode == "YCbCr" and int(pillow_version.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 does not read the YCbCr TIFF that it writes")
    path = tmp_path / ("a.png" if mode in ("RGBA", "P", "L", "LA", "1", "I;16") else "a.tif")
    grey = np.tile(np.linspace(0, 255, 64), (64, 1))
    if mode == "I;16":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    elif mode in ("I", "F"):
        image = Image.fromarray(
            (grey * 257).astype(np.int32) if mode == "I" else (grey / 255).astype(np.float32)
        )
    else:
        image = Image.fromarray(grey.astype(np.uint8))
        if mode == "LAB":
            image = ImageCms.profileToProfile(
                image.convert("RGB"),
                ImageCms.createProfile("sRGB"),
                ImageCms.createProfile("LAB"),
                outputMode="LAB",
            )
        else:
            image = image.quantize(256) if mode == "P" else image.convert("RGB").convert(mode)
    image.save(path)
    pixels = data.load_image(path).float()
    if mode != "1":
        assert (pixels - torch.from_numpy(grey)).abs().max() < 6
    assert pixels.shape == (3, 64, 64)


def test_cmyk_jpeg(tmp_path):
    quarters().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert near(corners(data.load_image(tmp_path / "a.jpg")), (RED, GREEN, BLUE, WHITE), by=30)


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    assert corners(data.load_image(tmp_path / "a.png")) == [BLUE, WHITE, BLUE, WHITE]
    image.quantize(8).save(tmp_path / "b.png")
    assert corners(data.load_image(tmp_path / "b.png")) == [BLUE, WHITE, BLUE, WHITE]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert corners(data.load_image(tmp_path / name)) == [RED] * 4


# the large size is for the decoder's own shrinking of JPEG
KINDS = [("png", (64, 64)), ("jpg", (64, 64)), ("tif", (64, 64)), ("webp", (64, 64))]


@pytest.mark.parametrize("suffix, size", [*KINDS, ("jpg", (900, 1200))])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, size, suffix, tmp_path):
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)  # the orientation that undoes it
    stored = quarters(size)
    if back > 1:
        stored = stored.transpose(data.photographs.TRANSPOSE[back])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    crop = "centre" if size[0] > 64 else None
    assert near(corners(data.load_image(tmp_path / f"a.{suffix}", crop)), (RED, GREEN, BLUE, WHITE))


def test_the_decoders_shrinking_moves_nothing(tmp_path):
    x = np.linspace(0, 255, 1500)
    smooth = np.stack(
        [np.tile(x, (1500, 1)), np.tile(x[:, None], (1, 1500)), np.full((1500, 1500), 99.0)], 2
    )
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    for crop in ("centre", "lfw"):
        jpeg, exact = (data.load_image(tmp_path / name, crop).int() for name in ("a.jpg", "a.png"))
        assert (jpeg - exact).abs().max() <= 2


# ---- size


@pytest.mark.parametrize("size", [32, 112, 150, 256])
def test_every_size_shows_the_same_frame(size, tmp_path):
    """The JPEG decoder shrinks for the size asked for: detail that fits into it stays."""
    grain = np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8)
    Image.fromarray(grain).resize((1500, 1500), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    jpeg, exact = (
        data.load_image(tmp_path / f"a.{suffix}", "lfw", size).float() for suffix in ("jpg", "png")
    )
    # 0.7 at most from 112 on; shrunk for 64 it would be 2.3, 3.6 and 7.2
    error = (jpeg - exact).abs().mean()
    assert jpeg.shape == (3, size, size) and error < (1.5 if size > 64 else 2.5)
    Image.fromarray(grain).resize((8, 8)).resize((250, 250)).save(tmp_path / "b.png")
    usual, other = (data.load_image(tmp_path / "b.png", size=s)[None].float() for s in (64, size))
    resized = torch.nn.functional.interpolate(other, (64, 64), mode="bilinear", antialias=True)
    assert (resized - usual).abs().mean() < 2


def of_size(folder, celeba, tmp_path, name, size=64):
    root = {"folder": folder, "celeba": celeba}.get(name)
    options = {} if root else {"persons": 2, "images_per_person": 3}
    cache = tmp_path / "cache"
    return data.load(name, root, cache=cache, progress=False, size=size, **options)


@pytest.mark.parametrize("name", ["folder", "celeba", "synthetic"])
def test_loads_at_a_size(name, folder, celeba, tmp_path, monkeypatch):
    """The same photographs in the same order, each size in a cache of its own."""
    sizes = (64, 32, 112)
    first = [of_size(folder, celeba, tmp_path, name, size) for size in sizes]
    monkeypatch.setattr(data.photographs, "_decode", None)
    monkeypatch.setattr("data.synthetic.synthetic_faces", None)
    again = [of_size(folder, celeba, tmp_path, name, size) for size in sizes]
    for size, faces, cached in zip(sizes, first, again):
        assert faces.images.shape == (len(first[0]), 3, size, size)
        assert torch.equal(faces.images, cached.images)
        assert faces.files == first[0].files and faces.notes == first[0].notes
        for key in ("person", "hashes", "identity", "content"):
            one, other, kept = (getattr(f, key) for f in (first[0], faces, cached))
            assert (
                one is other is kept is None or torch.equal(one, other) and torch.equal(one, kept)
            )
    assert len([*(tmp_path / "cache").iterdir()]) == 3
    small, large = (faces.images.float() for faces in (first[0], first[2]))
    large = torch.nn.functional.interpolate(large, (64, 64), mode="bilinear", antialias=True)
    assert (large - small).abs().mean() < 6


@pytest.mark.parametrize("size", [31, 257, 0, -64, 64.0, True, "64", None])
def test_sizes_that_are_refused(size, folder, celeba, tmp_path):
    for name in data.DATA_SETS:
        with pytest.raises(data.DataError, match="^--size .* a whole number of pixels, 32 to 256$"):
            of_size(folder, celeba, tmp_path, name, size)
    with pytest.raises(data.DataError, match="--size"):
        data.load_image(folder / "ann" / "0.png", size=size)
    assert not (tmp_path / "cache").exists()


def test_more_images_than_there_is_memory(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(data.DataError, match="^--size 256: 8 images take 1 MiB, .*; lower it$"):
        load(folder, tmp_path, size=256)


# ---- folder


def test_folder(folder, tmp_path):
    faces = load(folder, tmp_path)
    assert faces.images.dtype == torch.uint8 and faces.images.shape == (8, 3, 64, 64)
    assert faces.person.dtype == torch.int64 and faces.person.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert faces.names == ("ann", "bob b", "çelik") and faces.data == "folder" and len(faces) == 8
    assert faces.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 60, 70, 80, 120]
    assert faces.files[4] == os.path.join("bob b", "0.png") and faces.skipped == ()
    assert data.image_counts(faces).tolist() == [4, 3, 1]


NESTED = ("ann/2001/a.png", "ann/2002/deep/b.png", "bob/c.png")


def persons_of(tmp_path, *paths, **options):
    """The names that these photographs are filed under, with how many each."""
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    fill(tmp_path / "in", *paths)
    faces = load(tmp_path / "in", tmp_path, **options)
    return dict(zip(faces.names, data.image_counts(faces).tolist())), faces


def test_nested_folders_are_asked_about(tmp_path):
    """A person's sessions, or a collection's persons: who knows."""
    with pytest.raises(
        data.DataError, match=r"ann.2001: is the person ann or 2001\? give --person-folder first"
    ):
        persons_of(tmp_path, *NESTED)
    found, faces = persons_of(tmp_path, *NESTED, person_folder="first")
    assert found == {"ann": 2, "bob": 1} and faces.person.tolist() == [0, 0, 1]
    last, _ = persons_of(tmp_path, *NESTED, person_folder="last")
    assert last == {"2001": 1, "deep": 1, "bob": 1}
    with pytest.raises(data.DataError, match="--person-folder middle: first or last"):
        persons_of(tmp_path, *NESTED, person_folder="middle")
    with pytest.raises(data.DataError, match="no person folder"):
        data.load("synthetic", person_folder="first")
    with pytest.raises(data.DataError, match="--person-folder last: .* of --data folder alone"):
        data.load("celeba", tmp_path, person_folder="last")


@pytest.mark.parametrize(
    "paths",
    [
        ("train/ann/0.png", "train/bob/1.png", "test/ann/2.png", "Test/bob/3.png"),
        ("Gallery/ann/0.png", "probe/ann/1.png", "query/bob/2.png", "valid/bob/3.png"),
        ("ann/images/0.png", "ann/images/1.png", "bob/images/2.png", "bob/images/3.png"),
        (
            "images/train_1/ann/0.png",
            "images/dev/ann/1.png",
            *(f"images/val/bob/{i}.png" for i in (2, 3)),
        ),
        (
            "faces-1.0/ann/0.png",
            "faces-1.0/ann/1.png",
            "faces-1.0/bob/2.png",
            "faces-1.0/bob/3.png",
        ),
        ("train/ann_0.png", "train/ann_1.png", "test/bob_2.png", "validation/bob_3.png"),
        ("lfw/ann/0.png", "lfw/ann/1.png", "lfw/bob/2.png", "lfw/bob/3.png"),  # one too deep
        ("lfw/train/ann/0.png", "lfw/train/ann/1.png", "lfw/test/bob/2.png", "lfw/test/bob/3.png"),
    ],
    ids=lambda paths: paths[0],
)
def test_splits_are_levels(paths, tmp_path):
    found, faces = persons_of(tmp_path, *paths)
    assert found == {"ann": 2, "bob": 2}
    splits = [note for note in faces.notes if "taken for splits" in note]
    assert len(splits) == (not paths[0].startswith("lfw/ann"))


def test_a_person_of_a_splits_name(tmp_path):
    """Beside persons' folders it is one of them; beside splits another level is asked about."""
    assert persons_of(tmp_path, "ann/0.png", "Dev/1.png")[0] == {"Dev": 1, "ann": 1}
    with pytest.raises(data.DataError, match="extra or bob"):
        persons_of(tmp_path, "train/ann/0.png", "extra/bob/1.png")


def test_spellings_of_one_name(tmp_path, capsys):
    """Composed and decomposed letters are one name; case and spaces are told."""
    composed, parted = "Zo\u00eb", "Zoe\u0308"
    found, faces = persons_of(
        tmp_path,
        f"{composed}/0.png",
        f"{parted}/1.png",
        f"{parted}/2.png",
        "bob/3.png",
        "bob/4.png",
    )
    assert found == {composed: 3, "bob": 2} and not any("alike" in note for note in faces.notes)
    assert persons_of(tmp_path, f"{composed}_1.png", f"{parted}_2.png")[0] == {composed: 2}
    capsys.readouterr()
    paths = ("Ann Lee/0.png", "ann_lee/1.png", "AnnLee/2.png", "bob/3.png")
    found, faces = persons_of(tmp_path, *paths)
    alike = "names alike but for case or spaces, taken for several persons: Ann Lee and AnnLee and"
    assert len(found) == 4 and f"data: {alike} ann_lee" in capsys.readouterr().err.splitlines()


def test_a_stray_folder_is_told(tmp_path, capsys):
    many = [f"{name}/{i}.png" for name in ("ann", "bob") for i in range(3)]
    stray = "data: a folder of one file beside folders of more, is it a person: docs"
    persons_of(tmp_path, *many, "docs/logo.png")
    assert stray in capsys.readouterr().err.splitlines()
    persons_of(tmp_path, "ann/0.png", "bob/1.png", "carl/2.png", "carl/3.png")  # as in LFW
    assert "a folder of one file" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["IMG_{:04}", "DSC{:05}", "{:06}", "P10{:05}", "20240131_{:06}"])
def test_camera_files_are_no_persons(name, tmp_path, capsys):
    persons_of(tmp_path, *(f"{name.format(i)}.png" for i in range(5)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "named like" in line]
    n = 1 if "_" in name else 5
    first = f"data: 5 files named like {name.format(0)}.png are taken for {n} person{'s' * (n > 1)}"
    assert len(lines) == 1 and lines[0].startswith(f"{first}; if they are not")
    persons_of(tmp_path, *(f"ann/{name.format(i)}.png" for i in range(5)))
    persons_of(tmp_path, *(f"000{i // 2}_{i}.png" for i in range(6)))  # numbers for names
    assert "named like" not in capsys.readouterr().err


def test_flat_names(tmp_path):
    names = ("Ann_Lee_0001", "Ann_Lee_0002", "bob-7", "carl", "_5")
    fill(tmp_path / "in", *(f"{name}.png" for name in names))
    faces = load(tmp_path / "in", tmp_path)
    assert faces.names == ("Ann_Lee", "_5", "bob", "carl") and data.image_counts(
        faces
    ).tolist() == [2, 1, 1, 1]


def test_a_file_beside_the_persons_is_skipped(folder, tmp_path, capsys):
    quarters().save(folder / "sheet.png")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "ann" / "Thumbs.db").write_bytes(b"x")
    faces = load(folder, tmp_path)
    assert faces.skipped == ("sheet.png: lies beside the persons' folders",) and len(faces) == 8
    assert told(capsys, faces) == [f"data: 1 of 9 files skipped: {faces.skipped[0]}"]


def test_wrong_extension_is_told_by_content(folder, tmp_path):
    (folder / "ann" / "0.png").rename(folder / "ann" / "0.txt")
    assert len(load(folder, tmp_path)) == 8


def test_folder_reads_alike_in_any_order(folder, tmp_path):
    """Made again in another order, the same folder gives the same faces."""
    other = tmp_path / "other"
    for path in sorted(folder.rglob("*.png"), reverse=True):
        (other / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(folder)).write_bytes(path.read_bytes())
    a, b = load(folder, tmp_path), load(other, tmp_path)
    assert a.names == b.names and a.files == b.files and torch.equal(a.images, b.images)


def test_folders_without_inodes(folder, tmp_path, monkeypatch):
    """What os.scandir gives on Windows: device and inode 0, the same for every folder. A link back
    is still known for what it is."""
    (folder / "ann" / "back").symlink_to(folder)
    (folder / "bob b" / "ann").symlink_to(folder / "ann")
    real = load(folder, tmp_path)
    whole = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.entry = entry.name, entry

        def stat(self):
            return os.stat_result([self.entry.stat().st_mode, 0, 0, *self.entry.stat()[3:]])

    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext(map(Entry, whole(path))))
    faces = load(folder, tmp_path, cache=None)
    assert faces.names == ("ann", "bob b", "çelik") and len(faces) == 8
    assert faces.files == real.files and faces.skipped == real.skipped and len(real.skipped) == 2


def test_ten_copies_of_one_photograph_are_one(folder, tmp_path, capsys):
    """Also in another format: pixels count. Kept once, the first, and told from the cache too."""
    one = Image.open(folder / "ann" / "0.png")
    for i in range(9):
        one.save(folder / "ann" / f"copy {i}.{('png', 'bmp', 'tif')[i % 3]}")
    for _ in range(2):
        faces = load(folder, tmp_path)
        assert data.image_counts(faces).tolist() == [4, 3, 1] and "copy" not in str(faces.files)
        assert len(faces.skipped) == 9
        assert set(faces.skipped) == {
            f"ann/copy {i}.{('png', 'bmp', 'tif')[i % 3]}: the same photograph as ann/0.png"
            for i in range(9)
        }
        err = capsys.readouterr().err
        assert "data: 9 exact copies of a person's own photographs left out" in err
        assert "9 of 17 files skipped: ann/copy" in err and "two persons" not in err


def test_a_photograph_of_two_persons_is_nobodys(folder, tmp_path, capsys):
    before = load(folder, tmp_path)
    shutil.copy(folder / "ann" / "1.png", folder / "bob b" / "9.png")
    shutil.copy(folder / "ann" / "1.png", folder / "bob b" / "8.png")
    capsys.readouterr()
    faces = load(folder, tmp_path)
    assert data.image_counts(faces).tolist() == [3, 3, 1]
    assert faces.files == tuple(file for file in before.files if file != "ann/1.png")
    assert torch.equal(faces.images, before.images[[0, 2, 3, 4, 5, 6, 7]])
    lines = capsys.readouterr().err.splitlines()
    what = "photographs are filed under two persons or more and left out of all"
    assert f"data: 1 {what}: ann/1.png = bob b/8.png" in lines
    assert any("3 of 10 files skipped: ann/1.png: the same" in line for line in lines)
    shutil.rmtree(folder / "ann")
    shutil.copytree(folder / "bob b", folder / "ann")
    (folder / "çelik" / "0.png").unlink()
    with pytest.raises(data.DataError, match="none of its 10 files can be used"):
        load(folder, tmp_path)


# ---- crop


def sized(root, *sizes):
    """Photographs of two persons, of these sizes in turn, grey with a white frame."""
    for i, size in enumerate(sizes):
        path = root / f"p{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, WHITE)
        edge = size[0] // 8
        image.paste((10 * i,) * 3, (edge, edge, size[0] - edge, size[1] - edge))
        image.save(path)
    return root


def framed(faces):
    """Which images still have their frame: those that were not cropped further."""
    return (faces.images[:, 0, 0, 0] > 200).tolist()


def test_one_crop_for_the_whole_folder(tmp_path, capsys):
    """A cropped face that happens to be 250 x 250 is not cropped again; what was chosen is told,
    also from the cache, and kept."""
    few = sized(tmp_path / "few", (250, 250), (240, 240), (260, 260), (231, 231), (64, 64))
    for _ in range(2):
        faces = load(few, tmp_path)
        assert faces.crop == "centre" and framed(faces) == [True] * 5 and faces.skipped == ()
        line = "data: 5 photographs of 2 persons, mixed sizes, 250x250 (1); 260x260 (1); 64x64 "
        said = capsys.readouterr()
        assert said.out == f"{line}(1); and 2 more: crop centre, by the size of most\n"
        assert said.err == ""
    most = sized(tmp_path / "most", *[(250, 250)] * 4, (300, 300), (300, 200))
    faces = load(most, tmp_path)
    assert faces.crop == "lfw" and framed(faces) == [False] * 5
    assert len(faces.skipped) == 1 and "5.png: crop lfw needs a square image" in faces.skipped[0]
    alone = {250: "lfw", 64: "none", 100: "centre"}
    for side, crop in alone.items():
        faces = load(sized(tmp_path / f"all {side}", *[(side, side)] * 3), tmp_path)
        what = f"3 photographs of 2 persons, {side}x{side}: crop {crop}, by the size of all"
        assert faces.crop == crop and faces.notes[0] == what
    faces = load(tmp_path / "all 250", tmp_path, crop="none")
    assert faces.notes[0] == "3 photographs of 2 persons, 250x250: crop none" and all(framed(faces))


def test_the_crop_that_was_found_is_read_from_the_cache(tmp_path, monkeypatch):
    """A run asks for it by name where its first load did not."""
    root = sized(tmp_path / "in", (250, 250), (250, 250), (100, 100))
    found = load(root, tmp_path)
    monkeypatch.setattr(data.photographs, "_decode", None)
    again = load(root, tmp_path, crop=found.crop)
    assert found.crop == "lfw" and torch.equal(found.images, again.images)
    with pytest.raises(data.DataError):
        load(root, tmp_path, crop="none")


# ---- celeba


@pytest.fixture
def celeba(tmp_path):
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    for i in range(1, 7):
        image = Image.new("RGB", (178, 218))
        image.paste((40 * i,) * 3, (25, 45, 153, 173))
        image.save(root / "img_align_celeba" / f"{i:06d}.jpg", quality=95)
    (root / "identity_CelebA.txt").write_text(
        "".join(f"{i:06d}.jpg {(7, 12, 7, 3, 12, 7)[i - 1]}\n" for i in range(1, 7))
    )
    return root


def celeba_load(root, tmp_path):
    return data.load("celeba", root, cache=tmp_path / "cache", progress=False)


def test_celeba(celeba, tmp_path):
    faces = celeba_load(celeba, tmp_path)
    assert faces.names == ("00003", "00007", "00012") and faces.person.tolist() == [
        1,
        2,
        1,
        0,
        2,
        1,
    ]
    for i in range(
        6
    ):  # the crop holds the grey square alone; at its edge the resampling sees the black around it
        assert (faces.images[i].int() - 40 * (i + 1))[:, 2:-2, 2:-2].abs().max() <= 4
        assert faces.images[i].min() >= 0.8 * 40 * (i + 1)
    assert torch.equal(faces.images, celeba_load(celeba, tmp_path).images)


def test_celeba_unpacked_one_folder_too_deep(celeba, tmp_path):
    (celeba / "img_align_celeba").rename(celeba / "deep")
    (celeba / "img_align_celeba").mkdir()
    (celeba / "deep").rename(celeba / "img_align_celeba" / "img_align_celeba")
    assert len(celeba_load(celeba, tmp_path)) == 6


@pytest.mark.parametrize(
    "head",
    [
        "6\n",
        "6\nimage_id identity\n",
        "image_id,identity\r\n",
        "\ufeff6\r\nimage_id identity_id\r\n",
    ],
)
def test_celeba_headers_and_line_ends(head, celeba, tmp_path):
    path = celeba / "identity_CelebA.txt"
    lines = path.read_text()
    path.write_bytes((head + (lines.replace("\n", "\r\n") if "\r" in head else lines)).encode())
    assert celeba_load(celeba, tmp_path).names == ("00003", "00007", "00012")


@pytest.mark.parametrize(
    "line, number, what",
    [
        ("000099.jpg 5", 7, "is not in img_align_celeba; unpack"),
        ("000001.jpg 5", 7, "a second time"),
        ("000001.jpg", 7, "correct or remove"),
        ("000001.jpg five", 7, "correct or remove"),
        ("000001.jpg 5 6", 7, "correct or remove"),
        ("../000001.jpg 5", 7, "correct or remove"),
        ("6\n7\n8\n", 7, "correct or remove"),
    ],
)
def test_bad_identity_line(line, number, what, celeba, tmp_path):
    path = celeba / "identity_CelebA.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(data.DataError, match=rf"identity_CelebA.txt, line {number}: .*{what}"):
        celeba_load(celeba, tmp_path)


def test_first_line_without_identity_is_no_header(celeba, tmp_path):
    path = celeba / "identity_CelebA.txt"
    path.write_text("000001.jpg\n")
    with pytest.raises(data.DataError, match="line 1: "):
        celeba_load(celeba, tmp_path)


def test_celeba_parts_missing(celeba, tmp_path):
    (celeba / "identity_CelebA.txt").write_text("202599\n")
    with pytest.raises(data.DataError, match="holds no line"):
        celeba_load(celeba, tmp_path)
    (celeba / "identity_CelebA.txt").unlink()
    with pytest.raises(data.DataError, match="identity_CelebA.txt: No such file"):
        celeba_load(celeba, tmp_path)
    (celeba / "identity_CelebA.txt").write_text("000001.jpg 1\n")
    (celeba / "img_align_celeba").rename(celeba / "images")
    with pytest.raises(data.DataError, match="unpack img_align_celeba.zip"):
        celeba_load(celeba, tmp_path)


def test_celeba_image_without_identity_and_a_broken_one(celeba, tmp_path):
    path = celeba / "identity_CelebA.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    (celeba / "img_align_celeba" / "000002.jpg").write_bytes(b"\xff\xd8\xff")
    faces = celeba_load(celeba, tmp_path)
    assert len(faces) == 4 and len(faces.skipped) == 2 and "000006.jpg: no line" in faces.skipped[0]


# ---- arguments


@pytest.mark.parametrize(
    "name, options, what",
    [
        ("nonsense", {}, "choose synthetic, folder, celeba"),
        ("folder", {}, "needs a root"),
        ("folder", {"root": "/absent/faces"}, "/absent/faces: cannot be read"),
        ("folder", {"root": __file__}, "is not a folder"),
        ("folder", {"root": "a\0b"}, "cannot be read"),
        ("folder", {"root": ".", "crop": "oval"}, "unknown crop 'oval'"),
        ("folder", {"root": ".", "persons": 3}, "takes no option persons"),
        ("synthetic", {"root": "."}, "take no root"),
        ("synthetic", {"people": 3}, "takes no option 'people'"),
        ("synthetic", {"persons": 0}, "at least 1"),
        ("synthetic", {"seed": -1}, "at least 0"),
    ],
)
def test_bad_arguments(name, options, what):
    with pytest.raises(data.DataError, match=what) as caught:
        data.load(name, cache=None, **options)
    assert "\n" not in str(caught.value)


def test_empty_folder_and_folder_without_images(tmp_path):
    (tmp_path / "in" / "ann").mkdir(parents=True)
    with pytest.raises(data.DataError, match="no images"):
        load(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "ann" / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(data.DataError, match="none of its 1 files can be used"):
        load(tmp_path / "in", tmp_path)


# ---- cache


def test_cache_gives_the_same_faces(folder, tmp_path):
    first, again = load(folder, tmp_path), load(folder, tmp_path)
    assert torch.equal(first.images, again.images) and torch.equal(first.person, again.person)
    assert (first.names, first.files, first.skipped, first.data) == (
        again.names,
        again.files,
        again.skipped,
        again.data,
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_is_used(folder, tmp_path, monkeypatch):
    load(folder, tmp_path)
    monkeypatch.setattr(data.photographs, "_decode", None)
    assert len(load(folder, tmp_path)) == 8
    with pytest.raises(data.DataError):
        load(folder, tmp_path, cache=None)


@pytest.mark.parametrize("change", ["touch", "grow", "add", "remove", "rename", "mode"])
def test_cache_notices_a_changed_folder(change, folder, tmp_path, monkeypatch):
    path = folder / "ann" / "0.png"
    before = load(folder, tmp_path)
    if change == "touch":
        Image.new("RGB", (64, 64), RED).save(path)
        os.utime(path, ns=(1, 1))
    elif change == "grow":
        kept = path.stat()
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        ).save(path)
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    elif change == "add":
        quarters().save(folder / "ann" / "new.png")
    elif change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(folder / "ann" / "zero.png")
    else:
        path.chmod(0o400)
    calls, whole = [], data._decode_alike
    monkeypatch.setattr(data, "_decode_alike", lambda *given: calls.append(given) or whole(*given))
    after = load(folder, tmp_path)
    assert len(calls) == 1
    if change in ("touch", "grow", "add", "remove"):
        assert len(before) != len(after) or not torch.equal(before.images, after.images)


@pytest.mark.parametrize(
    "how", ["empty", "half", "flipped", "text", "pickle", "other arrays", "folder"]
)
def test_broken_cache_is_made_again(how, folder, tmp_path, capsys):
    first = load(folder, tmp_path)
    store = next((tmp_path / "cache").iterdir())
    raw = bytearray(store.read_bytes())
    if how == "empty":
        raw = b""
    elif how == "half":
        raw = raw[: len(raw) // 2]
    elif how == "flipped":
        raw[len(raw) // 2] ^= 255
    elif how == "text":
        raw = b"hello"
    if how == "pickle":
        with open(store, "wb") as file:
            np.savez(file, about=np.array([{"signature": 1}], dtype=object))
    elif how == "other arrays":
        with np.load(store) as held:
            about = held["about"]
        with open(store, "wb") as file:
            np.savez(
                file,
                about=about,
                images=np.zeros((8, 3, 32, 32), np.uint8),
                person=np.zeros(8, np.int64),
            )
    elif how == "folder":
        store.unlink()
        store.mkdir()
    else:
        store.write_bytes(raw)
    again = load(folder, tmp_path)
    assert torch.equal(first.images, again.images) and first.names == again.names
    assert len(told(capsys, first)) == 1
    if how != "folder":
        load(folder, tmp_path)
        assert told(capsys, first) == []


def test_cache_that_cannot_be_written_only_warns(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert len(load(folder, tmp_path, cache=tmp_path / "file" / "cache")) == 8
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_full_disk_leaves_no_half_cache(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(load(folder, tmp_path)) == 8
    assert list((tmp_path / "cache").iterdir()) == [] and "No space left" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_removed_after_a_minute(folder, tmp_path):
    data.load("folder", folder, cache=tmp_path / "cache")
    (store,) = (tmp_path / "cache").iterdir()
    old, new = (store.with_name(f"{store.name}.{name}.tmp") for name in ("0123abcd", "4567cdef"))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    data.load("folder", folder, cache=tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        store.name,
        new.name,
    ]  # new: perhaps someone writes it


def test_concurrent_loads(folder, tmp_path):
    store = str(tmp_path / "cache")
    code = f"import data; print(len(data.load('folder', {str(folder)!r}, cache={store!r})))"
    line = "data: 8 photographs of 3 persons, 64x64: crop none, by the size of all\n"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [run.communicate(timeout=120)[0] for run in runs] == [f"{line}8\n"] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ---- synthetic


def test_synthetic_and_its_cache(tmp_path, monkeypatch):
    options = {"persons": 3, "images_per_person": 2, "cache": tmp_path, "progress": False}
    faces = data.load("synthetic", **options)
    assert faces.images.shape == (6, 3, 64, 64) and faces.person.tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        faces.names == ("person-00000", "person-00001", "person-00002")
        and faces.files[3] == "person-00001/0001"
    )
    assert len(faces.identity) == 3 and len(faces.content) == 6
    monkeypatch.setattr("data.synthetic.synthetic_faces", None)
    again = data.load("synthetic", **options)
    for key in ("images", "person", "identity", "content"):
        assert torch.equal(getattr(faces, key), getattr(again, key))


# ---- persons


def test_split_is_disjoint_and_complete():
    faces = made([1] * 20 + [5] * 30 + [12] * 50)
    split = data.split_persons(faces, None, 20, 10, seed=3)
    assert sorted(split.train + split.validation + split.target) == list(range(100))
    assert len(split.validation) == 20 and len(split.target) == 10 and split.seed == 3
    counts = data.image_counts(faces)
    assert counts[list(split.target)].min() >= 10 and counts[list(split.validation)].min() >= 2
    assert set(range(20)) <= set(split.train)


def test_split_does_not_hang_on_the_order_of_persons():
    names = [f"n{k}" for k in range(60)]
    counts = {name: 2 + 3 * (k % 5) for k, name in enumerate(names)}
    a = made([counts[n] for n in names], names)
    b = made([counts[n] for n in reversed(names)], list(reversed(names)))
    for part in data.PARTS:
        one, other = (
            {f.names[k] for k in getattr(data.split_persons(f, 20, 10, 5), part)} for f in (a, b)
        )
        assert one == other


def test_split_is_the_same_everywhere():
    """Written down once: another machine, Python or library version must draw the same persons, and
    another process, whose hashes of words differ."""
    split = data.split_persons(made([10] * 12), 3, 2, 2, seed=0)
    assert (split.train, split.validation, split.target) == ((0, 1, 6), (4, 5), (9, 10))


def test_seeds_differ_and_repeat():
    faces = made([10] * 50)
    drawn = [data.split_persons(faces, 10, 10, 10, seed) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] and drawn[0].target != drawn[1].target


def test_more_train_persons_change_nothing_else():
    faces = made([10] * 80)
    few, many = (data.split_persons(faces, train, 10, 10) for train in (15, 40))
    assert (
        few.target == many.target
        and few.validation == many.validation
        and set(few.train) < set(many.train)
    )
    assert data.split_persons(faces, 15, 30, 10).target == few.target


@pytest.mark.parametrize(
    "sizes, what",
    [
        (
            (None, 5, 4),
            "4 target persons asked for, but 3 of the 9 persons have at least 10 images",
        ),
        (
            (None, 4, 3),
            "4 validation persons asked for, but beside the 3 targets 3 of the 9 persons",
        ),
        ((4, 3, 3), "4 train persons: 3 of the 9 persons are left"),
        ((None, -1, 3), "negative"),
    ],
)
def test_too_many_persons(sizes, what):
    with pytest.raises(data.DataError, match=what):
        data.split_persons(made([1] * 3 + [2] * 3 + [10] * 3), *sizes)


def test_nobody_left_to_train():
    with pytest.raises(data.DataError, match="no train persons"):
        data.split_persons(made([10] * 3), None, 0, 3)
    assert data.split_persons(made([10] * 3), 0, 0, 3).target == (0, 1, 2)


# ---- manifest


def test_manifest(tmp_path):
    faces = made([10] * 20)
    split = data.split_persons(faces, 5, 4, 3, seed=9)
    data.write_manifest(tmp_path / "people.json", faces, split)
    assert data.read_manifest(tmp_path / "people.json", faces) == split
    held = json.loads((tmp_path / "people.json").read_text())
    known = {"data", "images", "seed", "train", "validation", "target", "sha256"}
    assert set(held) == known | {"pixels", "trained"} and len(held["trained"]) == 536  # 50 hashes
    assert held["train"] == sorted(faces.names[k] for k in split.train) and held["seed"] == 9
    assert os.listdir(tmp_path) == ["people.json"]
    first = (tmp_path / "people.json").read_bytes()
    data.write_manifest(tmp_path / "people.json", faces, split)
    assert (tmp_path / "people.json").read_bytes() == first


def rewrite(path, sign=True, **changes):
    held = {**json.loads(path.read_text()), **changes}
    if sign:
        held["sha256"] = data._digest(
            {key: value for key, value in held.items() if key != "sha256"}
        )
    path.write_text(json.dumps(held))


@pytest.mark.parametrize(
    "changes, sign, what",
    [
        ({"seed": 1}, False, "sha256 does not fit"),
        ({"target": ["p0000"], "train": ["p0000"]}, True, "stands in it twice"),
        ({"target": ["nobody"]}, True, "1 of its .* persons are not in this data, nobody is one"),
        ({"images": 7}, True, "was written for 7 images of folder, this data has 200 of folder"),
        ({"data": "synthetic"}, True, "for 200 images of synthetic, this data has 200 of folder"),
        (
            {"pixels": "0"},
            True,
            "for other images, another order, .* Pillow: 50 of its 50 train",
        ),
        ({"trained": "AAAA"}, True, "its hashes are not whole"),
        ({"trained": "é"}, True, "its hashes are not whole"),
        ({"trained": 7}, True, "its hashes are not whole"),
        ({"train": "p0000"}, True, "'train' is not a list of names"),
        ({"train": [1]}, True, "'train' is not a list of names"),
        ({"seed": "0"}, True, "is not a manifest"),
        ({"seed": True}, True, "is not a manifest"),
    ],
)
def test_bad_manifest(changes, sign, what, tmp_path):
    faces = made([10] * 20)
    path = tmp_path / "people.json"
    data.write_manifest(path, faces, data.split_persons(faces, 5, 4, 3))
    rewrite(path, sign, **changes)
    with pytest.raises(data.DataError, match=what):
        data.read_manifest(path, faces)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 200_000, '{"seed": 1e999}', "1" * 10_000]
)
def test_manifest_that_is_none(text, tmp_path):
    (tmp_path / "people.json").write_text(text)
    with pytest.raises(data.DataError, match="people.json"):
        data.read_manifest(tmp_path / "people.json", made([2]))


def test_manifest_absent_or_not_writable(tmp_path):
    faces = made([2])
    with pytest.raises(data.DataError, match="no such file: .* give the folder"):
        data.read_manifest(tmp_path / "people.json", faces)
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="cannot be written"):
        data.write_manifest(tmp_path / "file" / "people.json", faces, data.Split((0,), (), (), 0))


# ---- a script's run


@dataclasses.dataclass
class Config:
    data: str = "folder"
    root: str = ""
    crop: str = ""
    synthetic_persons: int = 9
    synthetic_images: int = 10
    train_persons: int = 0
    validation_persons: int = 1
    target_persons: int = 0
    split_seed: int = 0
    seed: int = 4
    preset: str = "demo"


def test_open_run(folder, tmp_path, monkeypatch):
    """The split is drawn once, kept, refused for other numbers, drawn again with overwrite;
    run.json says what to load the same faces with."""
    assert data.DataError is data.run.UsageError
    monkeypatch.chdir(tmp_path)
    config, run = Config(root="faces"), tmp_path / "run"
    faces, split = data.open_run(config, run)
    held = (run / "people.json").read_bytes()
    assert len(faces) == 8 and len(split.validation) == 1 and len(split.train) == 2
    assert json.loads((run / "run.json").read_text()) == {
        "data": "folder",
        "root": str(folder),
        "crop": "none",
        "preset": "demo",
        "seed": 4,
        "options": {},
        "person_folder": "",
    }
    assert data.open_run(config, run)[1] == split and (run / "people.json").read_bytes() == held
    other = dataclasses.replace(config, split_seed=7, validation_persons=2)
    with pytest.raises(data.DataError, match=r"split seed \(0 there, 7 .*validation persons \(1 "):
        data.open_run(other, run)
    assert (run / "people.json").read_bytes() == held
    monkeypatch.setenv("RANK", "1")  # only rank 0 draws and writes
    with pytest.raises(data.DataError, match="another split"):
        data.open_run(other, run, overwrite=True)
    monkeypatch.setenv("RANK", "0")
    assert data.open_run(other, run, overwrite=True)[1].seed == 7
    faces, _ = data.open_run(Config(data="synthetic"), tmp_path / "rendered")
    options = json.loads((tmp_path / "rendered" / "run.json").read_text())["options"]
    assert options == {"persons": 9, "images_per_person": 10} and len(faces) == 90


def test_whose_folder_it_is_goes_into_the_run(tmp_path, monkeypatch):
    """run.json says it, so that attacks.py reads the same persons."""
    import attacks

    fill(tmp_path / "in", *(f"{a}/{b}/{i}.png" for a in "ab" for b in "cde" for i in range(2)))
    nested = dataclasses.make_dataclass("Nested", [("person_folder", str, "last")], bases=(Config,))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="a.c: is the person a or c"):
        data.open_run(Config(root="in"), tmp_path / "run")
    faces, split = data.open_run(nested(root="in"), tmp_path / "run")
    assert faces.names == ("c", "d", "e")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["person_folder"] == "last"
    judged = attacks.judged(attacks.Config(), tmp_path / "run", about)
    assert judged.faces.names == faces.names and judged.far == list(split.validation)
    shutil.copytree("in", "other")
    with pytest.raises(data.DataError, match="a.c: is the person a or c"):
        attacks.judged(attacks.Config(data="folder", root="other"), tmp_path / "run", about)


# ---- trained on


PERSONS = ("ann", "bob", "carl", "dora", "eve", "fred")


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six persons with four photographs of 250 x 250 each."""
    root = tmp_path_factory.mktemp("six")
    for k, name in enumerate(PERSONS):
        (root / name).mkdir()
        for i in range(4):
            noise = np.random.default_rng([k, i]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((250, 250)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run(six, tmp_path, monkeypatch):
    """A run's folder with people.json and run.json, of `six`, two persons trained on; and the
    faces."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(six, "faces")
    config = Config(root="faces", validation_persons=4)
    faces, split = data.open_run(config, tmp_path / "run")
    assert len(split.train) == 2 and faces.crop == "lfw"
    return tmp_path / "run", {faces.names[k] for k in split.train}


def others(run, root, **flags):
    """Who is judged of the photographs below root, near and far."""
    import attacks

    about = json.loads((run / "run.json").read_text())
    config = attacks.Config(data="folder", root=str(root), min_images=4, **flags)
    found = attacks.judged(config, run, about)
    assert {*found.targets} <= {*found.near}
    return [{found.faces.names[k] for k in part} for part in (found.near, found.far)]


@pytest.mark.parametrize("how", ["same", "copied", "moved", "within", "renamed", "one", "cropped"])
def test_who_was_trained_on_is_left_out(how, run, tmp_path, capsys):
    """Wherever their photographs lie, whatever they are called, if one of them was trained on."""
    folder, trained = run
    root, flags, left = tmp_path / "other", {}, {*PERSONS} - trained
    if how == "same":
        root = tmp_path / "faces"
    elif how == "moved":
        (tmp_path / "faces").rename(root)
    else:
        shutil.copytree(tmp_path / "faces", root / "deep" if how == "within" else root)
    if how == "renamed":
        for name in PERSONS:
            (root / name).rename(root / f"{name} 2")
        left = {f"{name} 2" for name in left}
    elif how == "one":
        for name in trained:
            for i in range(3):
                Image.new("RGB", (250, 250), (i, len(name), 9)).save(root / name / f"{i}.png")
    elif how == "cropped":
        flags["crop"] = "centre"
    capsys.readouterr()
    assert others(folder, root, **flags) == [left, set()]
    line = f"--root {root}: 2 of 6 persons left out, the embedding was trained on these persons"
    out = capsys.readouterr().out.splitlines()
    assert [text for text in out if not text.startswith("data: 24 photographs of 6")] == [line]


@pytest.mark.parametrize("side", [250, 1200])
@pytest.mark.parametrize("size", [32, 112, 256])
def test_who_was_trained_on_is_known_at_every_size(side, size, tmp_path, monkeypatch):
    """Also of photographs so large that the decoder shrinks them, for each size differently."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(PERSONS):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for i in range(2):
            noise = np.random.default_rng([k, i]).integers(0, 256, (80, 80, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((side, side))
            image.save(tmp_path / "faces" / name / f"{i}.jpg")
    config = Config(root="faces", validation_persons=4)
    faces, split = data.open_run(config, tmp_path / "run")
    trained = {faces.names[k] for k in split.train}
    (tmp_path / "faces").rename(tmp_path / "moved")
    other = load(tmp_path / "moved", tmp_path, size=size)
    assert other.images.shape[-1] == size and len(trained) == 2
    assert data.trained_on(tmp_path / "run" / "people.json", other) == trained
    assert data.read_manifest(tmp_path / "run" / "people.json", other) == split
    unknown = dataclasses.replace(other, hashes=None)
    with pytest.raises(data.DataError, match="another size than 64 are known by Faces.hashes"):
        data.trained_on(tmp_path / "run" / "people.json", unknown)


def test_nobody_is_left_to_judge(run, tmp_path, capsys):
    folder, trained = run
    for name in trained:
        shutil.copytree(tmp_path / "faces" / name, tmp_path / "other" / name)
    what = "2 of 2 persons left out, the embedding was trained on these persons: nobody else has 4"
    with pytest.raises(data.DataError, match=what) as caught:
        others(folder, tmp_path / "other")
    assert "\n" not in str(caught.value) and "left out" not in capsys.readouterr().out
    fill(tmp_path / "new", *(f"{name}/{i}.png" for name in "xy" for i in range(4)))
    assert others(folder, tmp_path / "new") == [{"x", "y"}, set()]
    assert "left out" not in capsys.readouterr().out


def test_rendered_faces_were_trained_on_where_they_were(tmp_path, monkeypatch):
    """Rendered pixels depend on the machine: all of them count as trained on, or none."""
    import attacks

    monkeypatch.chdir(tmp_path)
    data.open_run(Config(data="synthetic"), tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    held = json.loads((tmp_path / "run" / "people.json").read_text())
    assert about["crop"] == "" and "trained" not in held and "pixels" not in held
    few = data.load("synthetic", persons=2, images_per_person=2)
    monkeypatch.setattr(data, "load", lambda *_, **__: few)
    with pytest.raises(data.DataError, match="2 of 2 persons left out"):
        attacks.judged(attacks.Config(data="synthetic"), tmp_path / "run", about)
    fill(tmp_path / "in", *(f"person-0000{k}/{i}.png" for k in "01" for i in range(4)))
    monkeypatch.undo()
    assert others(tmp_path / "run", tmp_path / "in") == [{"person-00000", "person-00001"}, set()]


def test_data_that_moved_goes_on(run, tmp_path):
    """Photographs are known by their pixels: the same ones at another root are the same run's."""
    import attacks

    folder, trained = run
    before = (folder / "people.json").read_bytes()
    (tmp_path / "faces").rename(tmp_path / "moved")
    about = json.loads((folder / "run.json").read_text())
    with pytest.raises(data.DataError, match="faces: cannot be read"):
        attacks.judged(attacks.Config(), folder, about)
    there = attacks.judged(attacks.Config(root=str(tmp_path / "moved")), folder, about)
    faces, split = data.open_run(Config(root="moved", validation_persons=4), folder)
    assert {faces.names[k] for k in split.train} == trained and there.far == list(split.validation)
    assert (folder / "people.json").read_bytes() == before
    about = json.loads((folder / "run.json").read_text())
    assert about["root"] == str(tmp_path / "moved") and about["crop"] == "lfw"
    assert attacks.judged(attacks.Config(), folder, about).far == list(split.validation)


@pytest.mark.parametrize("how", ["other pixels", "other order", "other crop"])
def test_other_photographs_of_the_same_names(how, run, tmp_path):
    folder, trained = run
    config = Config(root="faces", validation_persons=4)
    one = tmp_path / "faces" / min(trained) / "0.png"
    there = 8
    if how == "other pixels":
        Image.new("RGB", (250, 250)).save(one)
        there = 7
    elif how == "other order":
        one.rename(one.with_name("9.png"))
    else:
        config.crop, there = "none", 0
    what = f"people.json: was written for other images, .* {there} of its 8 train images are in"
    with pytest.raises(data.DataError, match=what):
        data.open_run(config, folder)


def test_a_manifest_of_an_older_version(run, tmp_path, capsys):
    """The run itself goes on, with a line; other photographs cannot be told from its own."""
    folder, trained = run
    held = json.loads((folder / "people.json").read_text())
    del held["pixels"], held["trained"]
    (folder / "people.json").write_text(json.dumps(held))
    rewrite(folder / "people.json")
    capsys.readouterr()
    faces, split = data.open_run(Config(root="faces", validation_persons=4), folder)
    assert {faces.names[k] for k in split.train} == trained
    line = f"data: {folder / 'people.json'} is of an older version: images are not compared"
    assert told(capsys, faces) == [line]
    with pytest.raises(data.DataError, match="does not say which photographs were trained on"):
        others(folder, tmp_path / "faces")


# ---- LFW


@pytest.mark.skipif(not LFW.is_dir(), reason="LFW does not lie at ../shared/lfw")
def test_lfw_persons(tmp_path):
    (tmp_path / "lfw").mkdir()
    for person in sorted(os.listdir(LFW))[:25]:
        (tmp_path / "lfw" / person).symlink_to(LFW / person)
    begin = time.perf_counter()
    faces = load(tmp_path / "lfw", tmp_path)
    assert len(faces.names) == 25 and len(faces) >= 50 and faces.skipped == ()
    assert time.perf_counter() - begin < 30
    mean = faces.images.float().mean((0, 1))
    eyes = mean[30:37, 16:48].mean(1)  # the row of the eyes is the darkest of the upper face
    assert eyes.argmin().item() in range(6)
    assert (
        mean[33, 20:25].mean() < mean[38:44, 20:25].mean()
        and mean[33, 39:44].mean() < mean[38:44, 39:44].mean()
    )
