"""data: decoding, loaders, cache, splits, manifest, on small images made here."""

import dataclasses
import importlib
import json
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(pixels):
    """The colours of a (3, 64, 64) image near its corners: above left, right, below left, right."""
    return pixels[:, [12, 12, 51, 51], [12, 51, 12, 51]].T.tolist()


def grey(path, level, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)


def levels(faces):
    return faces.images[:, 0, 32, 32].tolist()


@pytest.fixture
def folder(tmp_path):
    """Three persons of 4, 3 and 1 images of one grey level: person k's image i is 60 k + 10 i."""
    root = tmp_path / "faces"
    for k, (name, n) in enumerate((("ann", 4), ("bob b", 3), ("çelik", 1))):
        for i in reversed(range(n)):
            grey(root / name / f"{i}.png", 60 * k + 10 * i)
    return root


def load(root, tmp_path, **more):
    cache = more.pop("cache", tmp_path / "cache")
    return data.load(more.pop("data", "folder"), root, cache=cache, progress=False, **more)


def persons_of(tmp_path, *paths, **options):
    """The names that these photographs are filed under, with how many each; the faces."""
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    for k, path in enumerate(paths):
        grey(tmp_path / "in" / path, k)
    faces = load(tmp_path / "in", tmp_path, **options)
    return dict(zip(faces.names, faces.person.bincount().tolist())), faces


def hand_made(counts, names=None):
    """Faces with these image counts per person, each image of its own hash."""
    person = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    names = names or [f"p{k:04d}" for k in range(len(counts))]
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8).expand(len(person), -1, -1, -1)
    files = tuple(map(str, range(len(person))))
    return data.Faces(images, person, tuple(names), files, hashes=torch.arange(len(person)))


# one image


def test_crop_boxes():
    assert data.crop_box(250, 250) == (57, 39, 196, 178)
    assert data.crop_box(500, 500, "lfw") == (114, 78, 392, 356)
    assert data.crop_box(178, 218) == (25, 45, 153, 173)
    assert data.crop_box(300, 200) == (50, 0, 250, 200)
    assert data.crop_box(200, 300, "centre") == (0, 50, 200, 250)
    assert data.crop_box(64, 64) == (0, 0, 64, 64)
    assert data.crop_box(300, 200, "none") == (0, 0, 300, 200)
    for crop, size, fits in (
        ("lfw", (300, 200), "centre"),
        ("lfw", (178, 218), "celeba"),
        ("lfw", (356, 436), "celeba"),
        ("celeba", (250, 250), "lfw"),
        ("celeba", (300, 300), "centre"),
    ):
        with pytest.raises(data.UsageError, match=f"crop {crop} does not fit .* use crop {fits}$"):
            data.crop_box(*size, crop)
    with pytest.raises(data.UsageError, match="unknown crop 'oval': choose lfw, centre"):
        data.crop_box(64, 64, "oval")


def test_none_keeps_every_pixel_and_shrinking_is_antialiased(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    kept = data.load_image(tmp_path / "a.png")
    assert torch.equal(kept, torch.from_numpy(noise).permute(2, 0, 1))
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (data.load_image(tmp_path / "a.png").float() - 127.5)[:, :, 2:-2].abs().max() < 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "I;16", "I", "F"])
def test_every_mode_reads(mode, tmp_path):
    """16-bit grey is divided by 257, not cut off; floats of [0, 1] are stretched."""
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I", "F") else "a.png")
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    deep = {"I;16": (ramp * 257).astype(np.uint16), "F": (ramp / 255).astype(np.float32)}
    deep["I"] = (ramp * 257).astype(np.int32)
    image = Image.fromarray(deep.get(mode, ramp.astype(np.uint8)))
    if mode not in deep:
        image = image.quantize(256) if mode == "P" else image.convert("RGB").convert(mode)
    image.save(path)
    assert (data.load_image(path).float() - torch.from_numpy(ramp)).abs().max() < 6


def test_transparency_lies_over_white_and_the_first_frame_counts(tmp_path):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    image.quantize(8).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        seen = corners(data.load_image(tmp_path / name))
        assert seen == [[*c] for c in (BLUE, WHITE, BLUE, WHITE)]
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert corners(data.load_image(tmp_path / "a.gif")) == [[*RED]] * 4


def test_a_mask_is_what_was_drawn(tmp_path):
    """White on black of any range, on a clear ground, in colours on a clear ground, cropped."""
    shape, path = torch.zeros(64, 64, dtype=torch.bool), tmp_path / "a.png"
    shape[20:32, 10:42] = True
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    level, alpha = shape.numpy().astype(np.uint8), shape.numpy()[..., None] * np.uint8(255)
    white, edge = np.full((64, 64, 3), 255, np.uint8), np.full((64, 64, 1), 255, np.uint8)
    edge[:4] = 0  # of the alpha of a picture in black and white
    for drawn in (
        level,  # 0 and 1
        level * 255,
        level * 60 + 120,
        np.concatenate([white, alpha], 2),
        np.concatenate([noise, alpha], 2),  # a printed patch
        np.concatenate([np.where(shape[..., None], white, 0), edge], 2),
    ):
        Image.fromarray(drawn).save(path)
        assert torch.equal(data.load_mask(path, "none", 64), shape)
    large = Image.new("L", (250, 250))
    large.paste(255, (100, 60, 130, 90))
    large.save(path)
    rows, columns = data.load_mask(path, "lfw", 139).nonzero().T  # at left 57, top 39
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (21, 50, 43, 72)
    assert len(rows) == 900
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    large.resize((100, 80)).save(tmp_path / "b.jpg", exif=exif)
    sizes = [data.image_size(tmp_path / name) for name in ("a.png", "b.jpg")]
    assert sizes == [(250, 250), (80, 100)]


@pytest.mark.parametrize("suffix, size", [("png", (64, 64)), ("jpg", (900, 1200))])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, suffix, size, tmp_path):
    """Also of a JPEG so large that the decoder shrinks it: the same pixels as those of the upright
    picture."""
    T = Image.Transpose
    undo = [T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90]
    undo += [T.TRANSVERSE, T.ROTATE_270]
    w, h = size
    picture = Image.new("RGB", size, WHITE)
    picture.paste(RED, (0, 0, w // 2, h // 2))
    picture.paste(GREEN, (w // 2, 0, w, h // 3))
    picture.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture.transpose(undo[orientation - 2]) if orientation > 1 else picture
    stored.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    paths = (tmp_path / "upright.png", tmp_path / f"a.{suffix}")
    upright, turned = (data.load_image(path).float() for path in paths)
    assert (upright - turned).abs().mean() < 1


@pytest.mark.parametrize("size", [64, 112, 256])
def test_the_decoder_shrinks_for_the_size(size, tmp_path):
    """Detail that fits into the size stays, and nothing moves."""
    grain = np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8)
    Image.fromarray(grain).resize((1500, 1500), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    paths = (tmp_path / "a.jpg", tmp_path / "a.png")
    jpeg, exact = (data.load_image(path, "lfw", size).float() for path in paths)
    # 0.7 at most from 112 on; shrunk for 64 it would be 3.6 and 7.2
    assert jpeg.shape == (3, size, size) and (jpeg - exact).abs().mean() < 1.5


# a folder a person


def test_folder(folder, tmp_path, capsys):
    (folder / "ann" / "0.png").rename(folder / "ann" / "0.txt")  # content counts
    grey(folder / "sheet.png", 99)
    (folder / "ann" / "Thumbs.db").write_bytes(b"x")
    (folder / ".hidden").mkdir()
    faces = load(folder, tmp_path)
    assert faces.images.dtype == torch.uint8 and faces.images.shape == (8, 3, 64, 64)
    assert faces.person.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert faces.names == ("ann", "bob b", "çelik") and faces.data == "folder" and len(faces) == 8
    assert levels(faces) == [0, 10, 20, 30, 60, 70, 80, 120]
    assert faces.files[0] == "ann/0.txt" and faces.files[4] == os.path.join("bob b", "0.png")
    assert faces.skipped == ("sheet.png: lies beside the persons' folders",)
    out, err = capsys.readouterr()
    many = "data: 8 photographs of 3 persons, 64x64: crop none, by the size of all\n"
    assert out == many and err == f"data: 1 of 9 files skipped: {faces.skipped[0]}\n"


def test_nested_folders_are_asked_about(tmp_path):
    """A person's sessions, or a collection's persons: who knows."""
    nested = ("ann/2001/a.png", "ann/2002/deep/b.png", "bob/c.png")
    what = r"ann.2001: is the person ann or 2001\? give --person-folder first"
    with pytest.raises(data.UsageError, match=what):
        persons_of(tmp_path, *nested)
    assert persons_of(tmp_path, *nested, person_folder="first")[0] == {"ann": 2, "bob": 1}
    last, _ = persons_of(tmp_path, *nested, person_folder="last")
    assert last == {"2001": 1, "deep": 1, "bob": 1}
    with pytest.raises(data.UsageError, match="--person-folder last: .* of --data folder alone"):
        load(tmp_path, tmp_path, data="celeba", person_folder="last")


SPLITS = [
    "train/ann/0 train/bob/1 test/ann/2 Test/bob/3",
    "Gallery/ann/0 probe/ann/1 query/bob/2 valid/bob/3",
    "ann/images/0 ann/images/1 bob/images/2 bob/images/3",
    "images/train_1/ann/0 images/dev/ann/1 images/val/bob/2 images/val/bob/3",
    "train/ann_0 train/ann_1 test/bob_2 validation/bob_3",
    "lfw/train/ann/0 lfw/train/ann/1 lfw/test/bob/2 lfw/test/bob/3",
]


@pytest.mark.parametrize("paths", SPLITS)
def test_splits_are_levels(paths, tmp_path):
    persons, faces = persons_of(tmp_path, *(f"{path}.png" for path in paths.split()))
    assert persons == {"ann": 2, "bob": 2}
    assert "folders taken for splits, not for persons: " in faces.notes[1]


def test_levels_that_are_no_splits(tmp_path):
    """One folder that holds all persons; a person of a split's name; an unknown level."""
    deep = ("lfw/ann/0.png", "lfw/ann/1.png", "lfw/bob/2.png")
    assert persons_of(tmp_path, *deep)[0] == {"ann": 2, "bob": 1}
    assert persons_of(tmp_path, "ann/0.png", "Dev/1.png")[0] == {"Dev": 1, "ann": 1}
    with pytest.raises(data.UsageError, match="extra or bob"):
        persons_of(tmp_path, "train/ann/0.png", "extra/bob/1.png")


def test_spellings_of_one_name(tmp_path, capsys):
    """Composed and decomposed letters are one name; case and spaces are told."""
    composed, parted = "Zo\u00eb", "Zoe\u0308"
    paths = (f"{composed}/0.png", f"{parted}/1.png", f"{parted}/2.png", "bob/3.png")
    persons, faces = persons_of(tmp_path, *paths)
    assert persons == {composed: 3, "bob": 1} and len(faces.notes) == 1
    assert persons_of(tmp_path, f"{composed}_1.png", f"{parted}_2.png")[0] == {composed: 2}
    capsys.readouterr()
    persons, _ = persons_of(tmp_path, "Ann Lee/0.png", "ann_lee/1.png", "bob/3.png")
    alike = "names alike, taken for several persons: Ann Lee and ann_lee"
    assert len(persons) == 3 and f"data: {alike}" in capsys.readouterr().err.splitlines()


def test_flat_names(tmp_path):
    """The person is the name before the number; a camera's names are none, and are told."""
    names = ("Ann_Lee_0001.png", "Ann_Lee_0002.png", "bob-7.png", "carl.png", "_5.png")
    persons, faces = persons_of(tmp_path, *names)
    assert persons == {"Ann_Lee": 2, "_5": 1, "bob": 1, "carl": 1} and len(faces.notes) == 1
    for name in ("IMG_{:04}", "DSC{:05}", "{:06}", "P10{:05}", "20240131_{:06}"):
        names = [f"{name.format(i)}.png" for i in range(2)]
        note = f"files have a camera's names, not persons': {names[0]}; {names[1]}"
        assert persons_of(tmp_path, *names)[1].notes[1:] == (note,)
        assert len(persons_of(tmp_path, *(f"ann/{name}" for name in names))[1].notes) == 1


def test_a_loop_of_links_is_read_once(folder, tmp_path):
    (folder / "ann" / "back").symlink_to(folder)
    (folder / "bob b" / "ann").symlink_to(folder / "ann")
    faces = load(folder, tmp_path)
    assert levels(faces) == [0, 10, 20, 30, 60, 70, 80, 120]
    why = "link to a folder that is read already"
    assert faces.skipped == (f"ann/back: {why}", f"bob b/ann: {why}")


def test_copies_of_a_persons_photograph_are_one(folder, tmp_path, capsys):
    """Also in another format: pixels count. Kept once, the first; told once, not from the cache."""
    for name in ("copy.png", "copy.bmp"):
        Image.open(folder / "ann" / "1.png").save(folder / "ann" / name)
    for count in (1, 0):
        faces = load(folder, tmp_path)
        assert levels(faces) == [0, 10, 20, 30, 60, 70, 80, 120] and "copy" not in str(faces.files)
        why = "the same photograph as ann/1.png"
        assert faces.skipped == (f"ann/copy.bmp: {why}", f"ann/copy.png: {why}")
        out, err = capsys.readouterr()
        assert err.count("data: 2 exact copies of a person's own photographs left out\n") == count
        assert err.count("\n") == 2 * count and out.count("data: 8 photographs of 3 persons") == 1
    assert len(load(folder, tmp_path, crop="centre")) == 8 and not capsys.readouterr().err


def test_a_photograph_of_two_persons_is_nobodys(folder, tmp_path, capsys):
    shutil.copy(folder / "ann" / "1.png", folder / "bob b" / "9.png")
    faces = load(folder, tmp_path)
    assert levels(faces) == [0, 20, 30, 60, 70, 80, 120]
    assert faces.person.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert faces.skipped == (
        "ann/1.png: the same photograph as bob b/9.png, of another person",
        "bob b/9.png: the same photograph as ann/1.png",
    )
    what = "data: 1 photographs are filed under two persons or more and left out of all\n"
    assert what in capsys.readouterr().err


# crop


def framed(root, *sizes):
    """Photographs of two persons, of these sizes in turn, grey with a white frame."""
    for i, size in enumerate(sizes):
        path, edge = root / f"p{i % 2}" / f"{i}.png", size[0] // 8
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, WHITE)
        image.paste((10 * i,) * 3, (edge, edge, size[0] - edge, size[1] - edge))
        image.save(path)
    return root


def has_frame(faces):
    """Of each image whether it was not cropped."""
    return (faces.images[:, 0, 0, 0] > 200).tolist()


def test_one_crop_for_the_whole_folder(tmp_path):
    """That of most sizes, and it is told: a cropped face of 250 x 250 is not cropped again."""
    mixed = framed(tmp_path / "few", (250, 250), (240, 240), (260, 260), (231, 231), (64, 64))
    faces = load(mixed, tmp_path)
    assert faces.crop == "centre" and has_frame(faces) == [True] * 5
    sizes = "250x250 (1); 260x260 (1); 64x64 (1); and 2 more"
    note = f"5 photographs of 2 persons, mixed sizes, {sizes}: crop centre, by the size of most"
    assert faces.notes == (note,)
    most = framed(tmp_path / "most", *[(250, 250)] * 4, (300, 300), (300, 200))
    faces = load(most, tmp_path)
    assert faces.crop == "lfw" and has_frame(faces) == [False] * 5
    why = "crop lfw does not fit 300 x 200 pixels; use crop centre"
    assert faces.skipped == (f"p1/5.png: {why}",)
    for side, crop in {250: "lfw", 64: "none", 100: "centre"}.items():
        faces = load(framed(tmp_path / f"all {side}", *[(side, side)] * 3), tmp_path)
        note = f"3 photographs of 2 persons, {side}x{side}: crop {crop}, by the size of all"
        assert faces.crop == crop and faces.notes == (note,)


# CelebA


@pytest.fixture
def celeba(tmp_path):
    """Six photographs, in the crop the grey 40 i, outside it black; a header of one line."""
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    for i in range(1, 7):
        image = Image.new("RGB", (178, 218))
        image.paste((40 * i,) * 3, (25, 45, 153, 173))
        image.save(root / "img_align_celeba" / f"{i:06d}.jpg", quality=95)
    lines = [f"{i:06d}.jpg {n}\n" for i, n in enumerate((7, 12, 7, 3, 12, 7), 1)]
    (root / "identity_CelebA.txt").write_text("".join(["6\n", *lines]))
    return root


def test_celeba(celeba, tmp_path):
    """The file decides whose an image is; the crop shows the grey square alone."""
    faces = load(celeba, tmp_path, data="celeba")
    assert faces.names == ("00003", "00007", "00012") and faces.crop == "celeba"
    assert faces.person.tolist() == [1, 2, 1, 0, 2, 1]
    want = torch.arange(40, 241, 40)[:, None, None, None]
    assert (faces.images.int() - want)[..., 2:-2, 2:-2].abs().max() <= 4
    assert (faces.images >= 0.8 * want).all()
    (celeba / "img_align_celeba").rename(celeba / "deep")
    (celeba / "img_align_celeba").mkdir()
    (celeba / "deep").rename(celeba / "img_align_celeba" / "img_align_celeba")
    (celeba / "identity_CelebA.txt").write_text("000001.jpg 7\n000002.jpg 12\n000004.jpg 3\n")
    (celeba / "img_align_celeba" / "img_align_celeba" / "000002.jpg").write_bytes(b"\xff\xd8\xff")
    faces = load(celeba, tmp_path, data="celeba")
    assert faces.person.tolist() == [1, 0] and len(faces.skipped) == 4
    assert "000003.jpg: no line in identity_CelebA.txt" in faces.skipped[0]


def test_celeba_in_part(celeba, tmp_path, capsys):
    """The whole identity file beside some of the images: those that are there, the rest counted."""
    whole = load(celeba, tmp_path, data="celeba")
    for i in (1, 4):
        (celeba / "img_align_celeba" / f"{i:06d}.jpg").unlink()
    capsys.readouterr()
    faces = load(celeba, tmp_path, data="celeba")
    assert torch.equal(faces.images, whole.images[[1, 2, 4, 5]]) and faces.skipped == ()
    assert faces.names == ("00007", "00012") and faces.person.tolist() == [1, 0, 1, 0]
    absent = "2 of 6 images of identity_CelebA.txt are not in img_align_celeba: left out"
    assert capsys.readouterr().err == f"data: {absent}\n"
    shutil.rmtree(celeba / "img_align_celeba")
    with pytest.raises(data.UsageError, match="6 of 6 images .* unpack its zip there"):
        load(celeba, tmp_path, data="celeba")


HEADS = ["", "6\n", "6\nimage_id identity\n", "image_id,identity\r\n", "\ufeff6\r\nimage_id id\r\n"]


@pytest.mark.parametrize("head", HEADS)
def test_identity_headers_and_line_ends(head, tmp_path):
    path = tmp_path / "identity_CelebA.txt"
    path.write_bytes(f"{head}000001.jpg 2880\r\n\n000002.jpg,7\n".encode())
    assert data.read_identities(path) == {"000001.jpg": "02880", "000002.jpg": "00007"}


def test_bad_identity_lines(tmp_path):
    path, good = tmp_path / "identity_CelebA.txt", "6\n000001.jpg 2880\n\n"
    for line, what in {
        "000001.jpg 5": "is listed a second time",
        "000001.jpg": "is not like '000001.jpg 2880'",
        "000001.jpg five": "is not like",
        "../000001.jpg 5": "is not like",
    }.items():
        path.write_text(good + line + "\n")
        with pytest.raises(data.UsageError, match=f"CelebA.txt, line 4: '{line}' {what}"):
            data.read_identities(path)
    path.write_text("202599\n")
    with pytest.raises(data.UsageError, match="no line like '000001.jpg 2880'"):
        data.read_identities(path)


# the cache


def test_cache_knows_crop_and_size(tmp_path, monkeypatch):
    """Each crop and size has pixels of its own; what most sizes asked for is read again by its
    name, as a run's later stages do."""
    root = framed(tmp_path / "in", (250, 250), (250, 250), (100, 100))
    wanted = [{"crop": "centre"}, {}, {"crop": "none"}, {"size": 112}]
    fresh = [load(root, tmp_path, cache=None, **options) for options in wanted]
    assert [faces.crop for faces in fresh] == ["centre", "lfw", "none", "lfw"]
    assert not torch.equal(fresh[0].images, fresh[1].images)
    for faces, options in zip(fresh, wanted):
        assert torch.equal(faces.images, load(root, tmp_path, **options).images)
    monkeypatch.setattr(data.photographs, "decode", None)
    again = [load(root, tmp_path, **options) for options in [*wanted, {"crop": "lfw"}]]
    for a, c in zip([*fresh, fresh[1]], again):
        assert all(
            torch.equal(getattr(a, key), getattr(c, key)) for key in ("images", "hashes", "person")
        )
        texts = ("names", "files", "skipped", "notes", "crop", "data")
        assert all(getattr(a, key) == getattr(c, key) for key in texts)
    with pytest.raises(TypeError):
        load(root, tmp_path, cache=None)


CHANGES = {
    "time": lambda path: os.utime(path, ns=(1, 1)),
    "size": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "mode": lambda path: path.chmod(0o400),
    "name": lambda path: path.rename(path.with_name("z.png")),
    "another file": lambda path: grey(path.with_name("new.png"), 255),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_notices_a_changed_folder(change, folder, tmp_path, monkeypatch):
    path = folder / "ann" / "0.png"
    os.utime(path, ns=(0, 0))
    load(folder, tmp_path)
    CHANGES[change](path)
    if change == "size":
        os.utime(path, ns=(0, 0))
    monkeypatch.setattr(data.photographs, "decode", None)
    with pytest.raises(TypeError):
        load(folder, tmp_path)


def test_broken_cache_is_made_again_and_an_unwritable_one_warns(folder, tmp_path, capsys):
    first = load(folder, tmp_path)
    (store,) = (tmp_path / "cache").iterdir()
    raw = store.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 255
    for broken in (b"", raw[: len(raw) // 2], flipped):
        store.write_bytes(broken)
        capsys.readouterr()
        assert torch.equal(first.images, load(folder, tmp_path).images)
        err = capsys.readouterr().err
        assert err.startswith(f"data: cache {store}: cannot be read") and err.count("\n") == 1
        assert len(store.read_bytes()) == len(raw)
    (tmp_path / "file").write_text("")
    assert len(load(folder, tmp_path, cache=tmp_path / "file" / "cache")) == 8
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_rendered_faces_and_their_cache(tmp_path, monkeypatch):
    options = {"persons": 3, "images_per_person": 2, "cache": tmp_path, "progress": False}
    faces = data.load("synthetic", **options)
    assert faces.images.shape == (6, 3, 64, 64) and faces.person.tolist() == [0, 0, 1, 1, 2, 2]
    assert faces.names == ("person-00000", "person-00001", "person-00002")
    assert faces.files[3] == "person-00001/0001" and len(faces.identity) == 3
    other = data.load("synthetic", **options, seed=1)
    small = data.load("synthetic", **options, size=32)
    monkeypatch.setattr("data.synthetic.synthetic_faces", None)
    again = data.load("synthetic", **options)
    for key in ("images", "person", "identity", "content"):
        assert torch.equal(getattr(faces, key), getattr(again, key))
    assert small.images.shape[-1] == 32 and not torch.equal(faces.images, other.images)


# persons


def test_images_of():
    faces = hand_made([3, 1, 2])
    mixed = dataclasses.replace(faces, person=torch.tensor([2, 0, 1, 0, 2, 0]))
    assert data.images_of(mixed, (0, 2)).tolist() == [0, 1, 3, 4, 5]
    assert data.images_of(mixed, (0, 2), 2).tolist() == [0, 1, 3, 4]
    assert data.images_of(mixed, (0, 2), 1).tolist() == [0, 1]


def test_split_is_disjoint_and_complete():
    """Of 100 persons with 1, 5 or 12 images: targets have 10 or more, validation a pair."""
    faces = hand_made([1] * 20 + [5] * 30 + [12] * 50)
    split = data.split_persons(faces, None, 20, 10, seed=3)
    assert sorted(split.train + split.validation + split.target) == list(range(100))
    assert len(split.validation) == 20 and len(split.target) == 10 and split.seed == 3
    counts = faces.person.bincount()
    assert counts[[*split.target]].min() >= 10 and counts[[*split.validation]].min() >= 2
    assert set(range(20)) <= set(split.train)
    few, other = data.split_persons(faces, 15, 20, 10, 3), data.split_persons(faces, 15, 25, 10, 3)
    assert (few.target, few.validation) == (split.target, split.validation)
    assert set(few.train) < set(split.train) and other.target == few.target
    assert data.split_persons(faces, None, 20, 10, seed=4).target != split.target


def test_split_is_the_same_everywhere():
    """Written down once: another machine, Python or library version, and another order of the
    persons, must give the same ones."""
    split = data.split_persons(hand_made([10] * 12), 3, 2, 2, seed=0)
    assert (split.train, split.validation, split.target) == ((0, 1, 6), (4, 5), (9, 10))
    names = [f"p{k:04d}" for k in reversed(range(12))]
    split = data.split_persons(hand_made([10] * 12, names), 3, 2, 2, seed=0)
    assert (split.train, split.validation, split.target) == ((5, 10, 11), (6, 7), (1, 2))


def test_too_many_persons():
    faces = hand_made([1] * 3 + [2] * 3 + [10] * 3)
    target, validation = "--target-persons 4: 3 have 10 images or more", "3 others have a pair"
    for sizes, what in (
        ((None, 2, 4), f"{target}: lower it"),
        ((None, 4, 3), f"--validation-persons 4: {validation}: lower it"),
        ((4, 3, 3), "--train-persons 4: 3 others are left: lower it"),
        ((9, 4, 4), f"{target}; --validation-persons 4: {validation}; --train-persons 9: 3 others"),
    ):
        with pytest.raises(data.UsageError, match=what):
            data.split_persons(faces, *sizes)


def test_what_a_preset_asks_too_much_of_is_said_at_once(tmp_path, monkeypatch, capsys):
    """The paper's sizes on 12 persons: one line, whose command is understood and does."""
    monkeypatch.chdir(tmp_path)
    for p in range(12):
        for k in range(10):
            grey(tmp_path / "faces" / f"p{p}" / f"{k}.png", 20 * p + k)
    wanted = {"generator": "", "embed": " --persons 0"}
    for name, more in wanted.items():
        script, argv = importlib.import_module(name), "--preset paper --data folder --root faces"
        assert script.main(argv.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        problem, command = line.split(f": python {name}.py ")
        flags = "--train-persons 0 --validation-persons 3 --target-persons 3" + more
        flags += " --vgg-weights download" if name == "generator" else ""
        assert command == f"{argv} {flags}" and not Path("runs/folder-paper-0").exists()
        for flag in ("--train-persons 9177: ", "--target-persons 30: ", "--validation-persons 100"):
            assert flag in problem
        assert ("--persons 2000: " in problem, "--loss vgg" in problem) == (bool(more), not more)
        config, _ = script.parse(command.split())
        split = data.open_run(config, tmp_path / name)[1]
        assert [len(getattr(split, part)) for part in data.PARTS] == [6, 3, 3]
    # of a run that the generator began, too
    assert script.main([*argv.split(), "--run", "generator"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train persons (6 before, 9177 now)" in line and "--persons 2000: there are 6" in line
    config, _ = script.parse(line.split(": python embed.py ")[1].split())
    assert data.open_run(config, tmp_path / "generator")[1] == split


# the manifest and the run


def test_manifest(tmp_path):
    """What committed runs hold: the keys, the hashes of all and of the train persons' images."""
    faces, path = hand_made([10] * 20), tmp_path / "people.json"
    split = data.split_persons(faces, 5, 4, 3, seed=9)
    data.write_manifest(path, faces, split)
    assert data.read_manifest(path, faces) == split
    manifest = json.loads(path.read_text())
    assert manifest["train"] == [faces.names[k] for k in split.train] and manifest["seed"] == 9
    assert [*manifest] == "data images seed pixels trained train validation target sha256".split()
    assert len(manifest["trained"]) == 536  # 50 hashes
    assert manifest["pixels"][:8] == "de663cfb" and manifest["sha256"][:8] == "2d7dc2ad"
    assert data.trained_persons(path, faces) == {faces.names[k] for k in split.train}


def test_manifest_of_other_data(tmp_path):
    faces, path = hand_made([10] * 20), tmp_path / "people.json"
    data.write_manifest(path, faces, data.split_persons(faces, 5, 4, 3))
    order = faces.hashes.flip(0)
    for change, what in (
        ({"hashes": order}, "other images, order, crop or Pillow, 50 of its 50 train images"),
        ({"hashes": order + 150}, "or Pillow, .. of its 50 train images are here: use the data"),
        ({"data": "celeba"}, "for 200 images of folder, this data has 200 of celeba: use"),
        ({"files": faces.files[1:]}, "for 200 images of folder, this data has 199 of folder"),
        ({"names": tuple(f"q{k}" for k in range(20))}, "12 of its persons are not in this data"),
    ):
        with pytest.raises(data.UsageError, match=what):
            data.read_manifest(path, dataclasses.replace(faces, **change))
    with pytest.raises(data.UsageError, match="no such file: .* give the folder of a finished"):
        data.read_manifest(tmp_path / "absent.json", faces)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(data.UsageError, match="sha256 does not fit, it was changed by hand"):
        data.read_manifest(path, faces)


def configure(**settings):
    """What open_run reads of a script's settings."""
    usual = {"data": "folder", "root": "", "crop": "", "person_folder": "", "preset": "demo"}
    usual |= {"synthetic_persons": 4, "synthetic_images": 3, "split_seed": 0, "seed": 4}
    usual |= {"train_persons": 0, "validation_persons": 1, "target_persons": 0}
    return types.SimpleNamespace(**usual | settings)


def test_open_run(folder, tmp_path, monkeypatch):
    """The split is drawn once, kept, refused for other numbers, drawn again with overwrite;
    run.json says what to load the same faces with."""
    monkeypatch.chdir(tmp_path)
    config, run = configure(root="faces"), tmp_path / "run"
    faces, split = data.open_run(config, run)
    people = (run / "people.json").read_bytes()
    assert len(faces) == 8 and len(split.validation) == 1 and len(split.train) == 2
    record = {"data": "folder", "preset": "demo", "seed": 4, "root": str(folder), "options": {}}
    record |= {"crop": "none", "person_folder": ""}
    assert json.loads((run / "run.json").read_text()) == record
    assert data.open_run(config, run)[1] == split and (run / "people.json").read_bytes() == people
    other = configure(root="faces", split_seed=7, validation_persons=2)
    what = r"another split: split seed \(0 before, 7 now\), validation persons \(1 before, 2 now\)"
    with pytest.raises(data.UsageError, match=what):
        data.open_run(other, run)
    monkeypatch.setenv("RANK", "1")  # only rank 0 draws and writes
    with pytest.raises(data.UsageError, match="another split"):
        data.open_run(other, run, overwrite=True)
    assert (run / "people.json").read_bytes() == people
    monkeypatch.setenv("RANK", "0")
    assert data.open_run(other, run, overwrite=True)[1].seed == 7
    faces, _ = data.open_run(configure(data="synthetic"), tmp_path / "rendered")
    record = json.loads((tmp_path / "rendered" / "run.json").read_text())
    assert record["options"] == {"persons": 4, "images_per_person": 3} and len(faces) == 12
    manifest = json.loads((tmp_path / "rendered" / "people.json").read_text())
    # rendered pixels depend on the machine: all of them count as trained on, or none
    assert "trained" not in manifest and "pixels" not in manifest
    people = tmp_path / "rendered" / "people.json"
    assert data.trained_persons(people, faces) == {*faces.names}
    assert data.trained_persons(people, hand_made([2])) == set()


def test_trained_persons_are_known_by_their_pixels(tmp_path, monkeypatch):
    """Wherever their photographs lie, whatever they are called, at every size, if one of them was
    trained on; a run goes on where its photographs were moved to."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate("abcd"):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for i in range(3):  # so large that the decoder shrinks them, for each size differently
            noise = np.random.default_rng([k, i]).integers(0, 256, (80, 80, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((1200, 1200))
            image.save(tmp_path / "faces" / name / f"{i}.jpg")
    settings = {"crop": "lfw", "validation_persons": 2}
    faces, split = data.open_run(configure(root="faces", **settings), tmp_path / "run")
    people, trained = tmp_path / "run" / "people.json", {faces.names[k] for k in split.train}
    (tmp_path / "faces").rename(tmp_path / "moved")
    assert data.open_run(configure(root="moved", **settings), tmp_path / "run")[1] == split
    large = load("moved", tmp_path, crop="lfw", size=112)
    assert data.trained_persons(people, large) == trained and len(trained) == 2
    assert data.read_manifest(people, large) == split
    for name in "abcd":
        (tmp_path / "moved" / name).rename(tmp_path / "moved" / f"{name} 2")
        for i in range(2):
            grey(tmp_path / "moved" / f"{name} 2" / f"{i}.jpg", 10 * ord(name) + i - 900)
    renamed = load("moved", tmp_path, crop="lfw")
    assert data.trained_persons(people, renamed) == {f"{name} 2" for name in trained}
    assert data.trained_persons(people, load("moved", tmp_path, crop="centre")) == set()


def test_demo_run(tmp_path, monkeypatch):
    """data/demo/ is copied once; its persons are those of the rendered faces."""
    monkeypatch.chdir(tmp_path)
    assert data.demo_run() == Path("runs/demo")
    source = Path(data.__file__).parent / "demo"
    files = sorted(path.relative_to(source) for path in source.rglob("*"))
    assert sorted(p.relative_to("runs/demo") for p in Path("runs/demo").rglob("*")) == files
    assert {"people.json", "run.json", "generator.pt"} <= {*map(str, files)}
    (Path("runs/demo") / "generator.pt").write_bytes(b"mine")
    assert data.demo_run("runs/demo") == Path("runs/demo")
    assert Path("runs/demo/generator.pt").read_bytes() == b"mine"
    counts, names = [12] * 370, [f"person-{k:05d}" for k in range(370)]
    rendered = dataclasses.replace(hand_made(counts, names), data="synthetic")
    split = data.read_manifest("runs/demo/people.json", rendered)
    assert split == data.split_persons(rendered, None, 40, 30, 0)
