"""Bad input to every command: it works, or it is one line that says what to do; no traceback."""

import importlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data

# files


def png(width, height):
    """A PNG that says it is so large, and holds a thousand bytes."""

    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_a_folder_of_traps(tmp_path, monkeypatch, capsys):
    """Good photographs are read whatever their names; all else is named with its reason, and no
    other program is run."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was run"))
    root = tmp_path / "my faces"
    names = ("ann", "name with spaces", "数学 é\u202e", "line\nend", "back\\slash")
    for level, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (level,) * 3).save(root / name / "ok.png")
    with open(os.fsencode(root / "ann") + b"/\xff\xfe.png", "wb") as file:
        Image.new("RGB", (64, 64), "blue").save(file, "PNG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "ann" / "half.png")
    whole = (root / "ann" / "half.png").read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    contents = {"half.png": whole[:999], "eps.jpg": eps, "bomb.png": png(60_000, 60_000)}
    contents |= {"zero.jpg": b"", "tiny.png": png(1, 1), "text.jpg": b"hello"}
    for name, content in contents.items():
        (root / "ann" / name).write_bytes(content)
    (root / "ann" / "broken.jpg").symlink_to(root / "absent.jpg")
    os.mkfifo(root / "ann" / "pipe.jpg")
    faces = data.load("folder", root, cache=tmp_path / "cache")
    assert len(faces) == 6 and len(faces.names) == 5
    assert all(text.isprintable() for text in faces.names + faces.files + faces.skipped)
    reasons = dict(line.removeprefix("ann/").split(": ", 1) for line in faces.skipped)
    unreadable = "not an image that Pillow reads"
    assert reasons.pop("half.png").startswith("image file is truncated")
    assert reasons.pop("bomb.png").startswith("Image size (3600000000 pixels) exceeds limit")
    assert reasons == {
        "eps.jpg": unreadable,
        "zero.jpg": unreadable,
        "text.jpg": unreadable,
        "tiny.png": "1x1 pixels is too small",
        "broken.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
    }
    out, err = capsys.readouterr()
    assert "6 photographs of 5 persons, " in out and err.count("\n") == 1
    assert err.startswith("data: 8 of 14 files skipped: ") and err.endswith("; and 5 more\n")
    data.write_manifest(tmp_path / "people.json", faces, data.split_persons(faces, 5, 0, 0))
    assert len(data.read_manifest(tmp_path / "people.json", faces).train) == 5
    with pytest.raises(data.UsageError, match=f"{root}/ann/text.jpg: {unreadable}"):
        data.load_image(root / "ann" / "text.jpg")


EXIF = [
    b"Exif\0\0",
    b"Exif\0\0MM\0*\xff\xff\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 99,
]


@pytest.mark.parametrize("exif", EXIF)
def test_absurd_exif_says_nothing_about_the_picture(exif, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(tmp_path / "a.jpg")[0].min() > 240


# commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a trained run that holds nothing, photographs of two persons, and bad files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").mkdir()
    record = {"data": "synthetic", "root": "", "crop": "", "preset": "demo", "seed": 0}
    record |= {"options": {"persons": 2, "images_per_person": 2}, "person_folder": ""}
    (tmp_path / "trained" / "run.json").write_text(json.dumps(record))
    for name in "ab":
        (tmp_path / "people" / name).mkdir(parents=True)
        for i in range(2):
            image = Image.new("RGB", (64, 64), (9 * ord(name) - 800, i, 0))
            image.save(tmp_path / "people" / name / f"{i}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    return tmp_path


COMMANDS = [
    # flags
    ("generator --steps=5", "--steps"),
    ("embed --method=best", "--method"),
    ("embed --steps=0", "--steps"),
    ("embed --margin=nan", "--margin"),
    ("embed --batch=many", "--batch"),
    ("embed --cutout-area=0.1,0.2,0.3", "--cutout-area"),
    ("embed --cutout-area=0.2,0.1", "--cutout-area"),
    ("embed --preset=large", "--preset large"),
    ("embed --device=tpu", "--device tpu"),
    ("generator --hidden=8,0", "--hidden"),
    ("attacks --run=trained --attacks=sunglasses", "--attacks"),
    ("attacks --run=trained --size=96", "--size 96"),
    ("attacks --run=trained --judge=net.py:make", "--judge"),
    ("verify --run=trained a.png", "give two photographs"),
    # data
    ("embed --data=folder", "--root"),
    ("embed --data=folder --root=text", "--root text: no such folder"),
    ("embed --data=folder --root=empty", "empty: no images"),
    ("embed --data=folder --root=people --crop=oval", "unknown crop 'oval': choose lfw"),
    ("embed --data=folder --root=people", "--target-persons 30: 0 have 10 images or more"),
    ("embed --root=people", "synthetic faces take no root"),
    ("embed --data=celeba --root=people", "identity_CelebA.txt: no such file"),
    ("embed --data=folder --person-folder=middle", "--person-folder"),
    # runs and files
    ("attacks --run=absent", "absent"),
    ("attacks --run=trained", "--method all"),
    ("attacks --model=net.py:make", "give --data folder --root PHOTOS"),
    ("attacks --model=net.py:make --data=folder --root=people", "net.py"),
    ("attacks --model=net --data=folder --root=people", "--model net"),
    ("verify --run=trained black.png black.png", "--method all"),
    ("metrics --run=absent", "absent"),
]


@pytest.mark.parametrize("command, words", COMMANDS)
def test_one_line_and_nothing_is_written(command, words, here, capsys):
    """The exit status is 2, the line names what was wrong."""
    script, *flags = command.split()
    (here / "runs" / "cache").mkdir(parents=True)
    before = {*here.rglob("*")}
    assert importlib.import_module(script).main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0] and len(lines[0]) < 400
    after = {path for path in here.rglob("*") if path.parent.name != "cache"}
    assert after == before
