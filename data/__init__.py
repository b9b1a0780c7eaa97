"""Faces for every stage: loaders, person-disjoint splits and their manifest (Sec. 4 and App. A).

    faces = data.load("synthetic")                      # the rendered faces: needs nothing
    faces = data.load("folder", root="lfw")             # one folder a person: LFW, or photographs
    faces = data.load("celeba", root="celeba")          # img_align_celeba/ and identity_CelebA.txt
    split = data.split_persons(faces, train=2000, validation=100, target=30, seed=0)
    data.write_manifest("people.json", faces, split)
    faces, split = data.open_run(config, folder)        # what a script calls: all of the above

In: image files. Out: `Faces` with images uint8 (N, 3, size, size), RGB, size 64 by default, in
CelebA's frame: eye centres on average at row 33.4, columns 22.3 and 41.2 of 64. An image that
cannot be used never stops a load: it is skipped, named with its reason in `Faces.skipped` and
counted on stderr when the images are read. Measured on LFW, 7,487 photographs: 6 s of CPU time the
first time, 0.3 s from the cache, n = 3.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import __version__ as pillow_version

from . import run, synthetic
from .photographs import (  # noqa: F401  some are for callers
    SIZE,
    choose_crop,
    crop_box,
    decode_all,
    first_three,
    image_size,
    load_image,
    load_mask,
    printable,
)
from .run import File, UsageError

HERE = Path(__file__).parent
CACHE_VERSION = 3
PARTS = ("train", "validation", "target")
# A folder whose name is made of these words alone holds persons and is none.
SPLITS = {
    *"train training test testing val valid validation dev eval evaluation gallery probe".split(),
    *"query images image imgs photos pictures faces data set split fold".split(),
}
# What cameras, scanners and counters call a file, without its number.
CAMERA = re.compile(
    r"(img|image|pict?|photo|dsc[nf]?|pxl|scan|frame|p\d{6})?[\W\d_]*", re.IGNORECASE
)
NOT_PHOTOGRAPHS = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True, eq=False)
class Faces:
    """Faces of many persons, images resident in memory.

    images   torch uint8 (N, 3, size, size), RGB, 0..255
    person   torch int64 (N,), index into names
    names    person index -> name, sorted, each has an image; unprintable characters are escaped
    files    N sources: path relative to the root, or "person-00003/0007" for rendered faces
    skipped  files that were not used, "path: reason"
    data     which loader made them: "synthetic", "folder" or "celeba"
    crop     of all the photographs, see `crop_box`; "" for rendered faces
    notes    what was loaded, and what to look at before its numbers are believed, one line each
    hashes   photographs only: int64 (N,), the first 8 bytes of the blake2b of each
             image at size 64, whatever the size of images
    identity, content   synthetic only: true factors, float32 (persons, I) and (N, C); their columns
             are named in data.synthetic
    """

    images: torch.Tensor
    person: torch.Tensor
    names: tuple[str, ...]
    files: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    data: str = "folder"
    identity: torch.Tensor | None = None
    content: torch.Tensor | None = None
    crop: str = ""
    notes: tuple[str, ...] = ()
    hashes: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Split:
    """Disjoint person indices, ascending: train, validation, target; the seed of the draw."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    target: tuple[int, ...]
    seed: int


def say(text: str, file: Any = None) -> None:
    """Print one line on rank 0, on stderr by default."""
    if run.rank() == 0:
        print(f"data: {text}", file=file or sys.stderr, flush=True)


warn = functools.cache(say)  # once a process, at whatever crop


def load(
    name: str,
    root: File | None = None,
    *,
    crop: str | None = None,
    size: int = SIZE,
    cache: File | None = "runs/cache",
    progress: bool = True,
    person_folder: str | None = None,
    persons: int = 370,
    images_per_person: int = 12,
    seed: int = 0,
) -> Faces:
    """Load a data set -> Faces.

    name     "synthetic"  heads rendered from persons, images_per_person and seed
             "folder"     root/person/image, also below folders that are named as splits (train,
                          test, gallery, ...) and below one folder that holds all others; or flat
                          root/person_0001.jpg, the person is the name before the trailing _number
                          or -number. Names are compared after Unicode's NFC. Any format Pillow
                          reads by itself, known by content; hidden files are ignored.
             "celeba"     root/img_align_celeba/ and root/identity_CelebA.txt; names are the
                          identities, five digits
    crop     see `crop_box`, one for all images; None takes the one that the sizes of most ask for
             (celeba: "celeba"); images that it does not fit are skipped
    size     side of the images, pixels; other sizes than 64 take twice the time, for the hashes
    cache    folder for decoded images, one file a (root, crop, size), used while every file's path,
             size, time and mode are as they were; None reads the images every time
    progress a bar while 500 or more images are decoded
    person_folder  of root/a/b/image, "folder" alone: "first", a is the person and b a session, or
             "last", b is the person and a a collection; without it such a folder is refused
    Photographs with the same pixels at 64: of one person the first is kept; those filed under
    several persons are left out of all, as nobody knows whose they are. Raises UsageError.
    """
    root = os.fspath(root) if root is not None else ""
    crop = crop or ("celeba" if name == "celeba" else None)
    if name == "synthetic":
        if root or crop or person_folder:
            raise UsageError("synthetic faces take no root, crop or person folder: choose folder")
        options = {"persons": persons, "images_per_person": images_per_person, "seed": seed}
        signature = hash_json([CACHE_VERSION, Path(synthetic.__file__).read_text()])
        render = functools.partial(render_faces, persons, images_per_person, seed, progress, size)
        return load_cached(cache, name, [[options, size]], signature, None, render)
    if name not in ("folder", "celeba"):
        raise UsageError(f"unknown data {name!r}: choose synthetic, folder, celeba")
    if person_folder and (name != "folder" or person_folder not in ("first", "last")):
        raise UsageError(f"--person-folder {person_folder}: first or last, of --data folder alone")
    if not os.path.isdir(root):
        raise UsageError(f"--root {root}: no such folder: give the folder that holds the images")

    files, skipped = list_files(root)
    signature = hash_json([CACHE_VERSION, pillow_version, person_folder, files, skipped])
    # A first load goes by the sizes; its run then names the crop, and reads the same file.
    keys = [
        [os.path.realpath(root), choice, person_folder, size]
        for choice in dict.fromkeys((crop, None))
    ]

    def make() -> Faces:
        if name == "folder":
            listed = name_persons(root, [*files], person_folder)
        else:
            listed = identify_celeba(root, [*files])
        listed = listed._replace(skipped=[*skipped, *listed.skipped])
        faces = read_faces(name, root, listed, crop, size, progress)
        for note in faces.notes[1:]:  # warnings, once a data set: the cache is silent
            warn(note)
        if faces.skipped:
            total = len(faces) + len(faces.skipped)
            warn(f"{len(faces.skipped)} of {total} files skipped: {first_three(faces.skipped)}")
        return faces

    faces = load_cached(cache, name, keys, signature, crop, make)
    say(faces.notes[0], sys.stdout)  # what there is
    return faces


class Listed(NamedTuple):
    """The files of a data set: the person of each, files that are skipped, notes."""

    persons: dict[str, str]
    skipped: list[str]
    notes: list[str]


def read_faces(
    name: str, root: str, listed: Listed, crop: str | None, size: int, progress: bool
) -> Faces:
    """Decode the listed files -> Faces."""
    files, persons = [*map(printable, listed.persons)], [*listed.persons.values()]
    if not files:
        reason = f" ({listed.skipped[0]})" if listed.skipped else ""
        raise UsageError(f"{root}: no images{reason}: give one folder a person with images in it")
    paths = [os.path.join(root, file) for file in listed.persons]
    crop, crop_note = (crop, f"crop {crop}") if crop else choose_crop(paths)
    images, hashes, reasons = decode_all(paths, crop, size, progress)
    copies = refuse_copies(hashes, persons, files, reasons)
    skipped = [*listed.skipped, *(f"{file}: {why}" for file, why in zip(files, reasons) if why)]
    kept = [i for i, why in enumerate(reasons) if why is None]
    if not kept:
        raise UsageError(f"{root}: none of its {len(files)} files can be used ({skipped[-1]})")
    for k, i in enumerate(kept):  # in place: no second copy of all images
        images[k] = images[i]
    names = sorted({persons[i] for i in kept})
    index = {person: k for k, person in enumerate(names)}
    count = f"{len(kept)} photographs of {len(names)} person{'s' * (len(names) > 1)}"
    return Faces(
        images=torch.from_numpy(images[: len(kept)]),
        person=torch.tensor([index[persons[i]] for i in kept], dtype=torch.int64),
        names=tuple(names),
        files=tuple(files[i] for i in kept),
        skipped=tuple(skipped),
        data=name,
        crop=crop,
        notes=(f"{count}, {crop_note}", *listed.notes, *copies),
        hashes=torch.from_numpy(hashes[kept]),
    )


def refuse_copies(
    hashes: np.ndarray, persons: list[str], files: list[str], reasons: list[str | None]
) -> list[str]:
    """Write into reasons which files have the pixels of another; return notes."""
    alike: dict[int, list[int]] = {}
    for i, value in enumerate(hashes.tolist()):
        if reasons[i] is None:
            alike.setdefault(value, []).append(i)
    copies, shared = 0, 0
    for first, *rest in alike.values():
        for i in rest:
            reasons[i] = f"the same photograph as {files[first]}"
        if {persons[i] for i in rest} <= {persons[first]}:
            copies += len(rest)
        else:
            reasons[first] = f"the same photograph as {files[rest[-1]]}, of another person"
            shared += 1
    notes = [f"{copies} exact copies of a person's own photographs left out"] if copies else []
    if shared:
        notes.append(
            f"{shared} photographs are filed under two persons or more and left out of all"
        )
    return notes


# a folder a person


def list_files(root: str) -> tuple[dict[str, list[int]], list[str]]:
    """List the files below root -> {path: [size, time in ns, mode]}, and what is skipped.

    Links are followed, no folder twice.
    """

    def stop(error: OSError) -> None:
        raise UsageError(f"{error.filename}: {error.strerror}: check its permissions")

    files: dict[str, list[int]] = {}
    skipped: list[str] = []
    visited: set[str] = set()
    for folder, below, inside in os.walk(root, followlinks=True, onerror=stop):
        place = "" if folder == root else os.path.relpath(folder, root)
        if os.path.realpath(folder) in visited:
            skipped.append(f"{printable(place)}: link to a folder that is read already")
            below.clear()
            continue
        visited.add(os.path.realpath(folder))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in inside:
            path = os.path.join(place, name)
            if name.startswith(".") or name.lower() in NOT_PHOTOGRAPHS:
                continue
            if os.path.isfile(os.path.join(root, path)):
                about = os.stat(os.path.join(root, path))
                files[path] = [about.st_size, about.st_mtime_ns, about.st_mode]
            else:  # a pipe, a device, a broken link
                skipped.append(f"{printable(path)}: not a regular file")
    return dict(sorted(files.items())), sorted(skipped)


def is_split(folder: str) -> bool:
    """Tell whether a folder's name is made of words of splits alone."""
    words = re.findall(r"[^\W\d_]+", folder.casefold())
    return bool(words) and SPLITS.issuperset(words)


def name_persons(root: str, files: list[str], person_folder: str | None) -> Listed:
    """Decide whose the files are, by the folders that they lie in or by their names."""
    paths = {folder: folder.split(os.sep) for folder in {*map(os.path.dirname, files)} if folder}
    inside: dict[tuple[str, ...], set[str]] = {}
    for path in paths.values():
        for k, name in enumerate(path):
            inside.setdefault((*path[:k],), set()).add(name)
    # A level only where all are named so: beside ann and bob, dev is a person.
    splits = {parent for parent, names in inside.items() if all(map(is_split, names))}
    for path in paths.values():
        path[:] = [name for k, name in enumerate(path) if (*path[:k],) not in splits]
    within = [path for path in paths.values() if path]
    if not person_folder and len({path[0] for path in within}) == 1 < min(map(len, within)):
        for path in within:  # an archive unpacked one folder too deep
            del path[0]
    deep = sorted(folder for folder, path in paths.items() if len(path) > 1)
    if deep and not person_folder:
        path = paths[deep[0]]
        raise UsageError(
            f"{os.path.join(root, deep[0])}: is the person {path[0]} or {path[-1]}? "
            "give --person-folder first (sessions below it) or last (collections above it)"
        )

    skipped: list[str] = []
    notes: list[str] = []
    if within:
        which = 0 if person_folder == "first" else -1
        persons = {f: path[which] for f in files if (path := paths.get(os.path.dirname(f)))}
        loose = [file for file in files if file not in persons]
        skipped = [f"{printable(file)}: lies beside the persons' folders" for file in loose]
    else:
        stems = {file: os.path.splitext(os.path.basename(file))[0] for file in files}
        persons = {file: re.sub(r"(?<=.)[_-]\d+$", "", stem) for file, stem in stems.items()}
        numbered = [printable(file) for file, name in persons.items() if CAMERA.fullmatch(name)]
        if len(numbered) > 1:
            notes.append(f"files have a camera's names, not persons': {first_three(numbered)}")
    persons = {f: printable(unicodedata.normalize("NFC", name)) for f, name in persons.items()}
    spelt: dict[str, list[str]] = {}
    for name in sorted({*persons.values()}):
        spelt.setdefault(re.sub(r"[\s_]", "", name).casefold(), []).append(name)
    if alike := [" and ".join(names) for names in spelt.values() if len(names) > 1]:
        notes.append(f"names alike, taken for several persons: {first_three(alike)}")
    if levels := sorted({printable(name) for parent in splits for name in inside[parent]}):
        notes.append(f"folders taken for splits, not for persons: {first_three(levels)}")
    return Listed(persons, skipped, notes)


# CelebA


def read_identities(path: File) -> dict[str, str]:
    """Read identity_CelebA.txt -> {"000001.jpg": "02880", ...}, in the file's order.

    Lines "name identity", identity a whole number; one or two header lines, blank lines, commas and
    CRLF are tolerated. Raises UsageError naming file, line number and what to do: malformed line,
    image listed twice, no line at all.
    """
    with run.reading(path, "put CelebA's identity file there"):
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    identities: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.replace(",", " ").split()
        header = number <= 2 and not identities and bool(words) and "." not in words[0]
        if not words or header:
            continue
        match = re.fullmatch(r"([^/\\ ]+) ([0-9]{1,9})", " ".join(words))
        problem = ""
        if not match:
            problem = "is not like '000001.jpg 2880'"
        elif match[1] in identities:
            problem = "is listed a second time"
        if problem:
            line = printable(line)[:60]
            raise UsageError(f"{path}, line {number}: {line!r} {problem}: remove the line")
        identities[match[1]] = f"{int(match[2]):05d}"
    if not identities:
        raise UsageError(f"{path}: no line like '000001.jpg 2880': put CelebA's file there")
    return identities


def identify_celeba(root: str, files: list[str]) -> Listed:
    """Read whose the files are from the identity file."""
    images = {os.path.basename(f): f for f in files if f.startswith("img_align_celeba" + os.sep)}
    identities = read_identities(os.path.join(root, "identity_CelebA.txt"))
    without = sorted(images.keys() - identities.keys())
    skipped = [f"{printable(images[name])}: no line in identity_CelebA.txt" for name in without]
    there = sorted(identities.keys() & images.keys())
    absent = f"{len(identities) - len(there)} of {len(identities)} images of identity_CelebA.txt"
    absent += " are not in img_align_celeba"
    if not there:
        raise UsageError(f"{root}: {absent}: unpack its zip there")
    notes = [f"{absent}: left out"] if len(there) < len(identities) else []
    return Listed({images[name]: identities[name] for name in there}, skipped, notes)


# rendered faces


def render_faces(persons: int, each: int, seed: int, progress: bool, size: int) -> Faces:
    """Render each person this many times -> Faces."""
    made = synthetic.synthetic_faces(persons, each, seed, progress, size)
    images, person, identity, content = made
    names = tuple(f"person-{k:05d}" for k in range(persons))
    files = tuple(f"{name}/{i:04d}" for name in names for i in range(each))
    return Faces(images, person, names, files, (), "synthetic", identity, content)


# the cache: one file a data set and key


def hash_json(content: Any) -> str:
    """Compute the sha256 of the canonical JSON of content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def load_cached(
    cache: File | None,
    name: str,
    keys: list[list],
    signature: str,
    crop: str | None,
    make: Callable[[], Faces],
) -> Faces:
    """Read the faces from the cache, or make them and write them there by the first key."""
    if not cache:
        return make()
    paths = [Path(cache, f"{name}-{hash_json(key)[:16]}.pt") for key in keys]
    for path in filter(Path.exists, paths):
        try:
            with run.reading(path, "the faces are read again"), zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None, "CRC"  # torch.load does not look
            content = run.load(path, "faces")
            faces = Faces(**content["faces"])
            if content["signature"] == signature and crop in (None, faces.crop):
                return faces
        except UsageError as error:  # a broken cache costs time, never the run
            say(f"cache {error}")
    faces = make()
    try:
        run.save(paths[0], "faces", signature=signature, faces=vars(faces))
    except UsageError as error:
        say(f"the next load takes as long as this one: cache {error}")
    return faces


# persons


def images_of(faces: Faces, persons: Sequence[int], most: int = 0) -> torch.Tensor:
    """List these persons' images in order, of each the first `most` (0: all) -> int64 (n,)."""
    index = torch.isin(faces.person, torch.tensor(persons)).nonzero()[:, 0]
    if not most:
        return index
    order = faces.person[index].argsort(stable=True)
    count = faces.person[index][order].unique_consecutive(return_counts=True)[1]
    nth = torch.arange(len(order)) - (count.cumsum(0) - count).repeat_interleave(count)
    return index[order[nth < most]].sort().values


def split_persons(
    faces: Faces,
    train: int | None = None,
    validation: int = 100,
    target: int = 30,
    seed: int = 0,
    min_target_images: int = 10,
) -> Split:
    """Draw disjoint train, validation and target persons (Sec. 4).

    target      persons with at least min_target_images images
    validation  persons with at least two images
    train       the rest, or that many of it (None: all of it); persons with a single image are
                among them: latent optimisation uses them, real positive pairs need two
    The order of the draw is sha256(seed, name): it depends on no folder order, hash seed or library
    version. Changing train changes neither targets nor validation persons, and more train persons
    contain fewer; validation persons do not change the targets; new persons in the data replace at
    most as many of a part as they are.
    Raises UsageError saying how many persons there are for each part that asks too much.
    """
    counts = torch.bincount(faces.person, minlength=len(faces.names)).tolist()
    keys = [f"{seed}:{name}".encode("utf-8", "surrogatepass") for name in faces.names]
    order = sorted(range(len(keys)), key=lambda k: hashlib.sha256(keys[k]).digest())
    least = max(min_target_images, 2)

    enough = [k for k in order if counts[k] >= least]
    targets = set(enough[:target])
    pairs = [k for k in order if counts[k] >= 2 and k not in targets]
    validated = set(pairs[:validation])
    # from the far end, so that validation seldom shifts train
    rest = [k for k in reversed(order) if k not in targets and k not in validated]
    lacks = []
    if len(enough) < target:
        lacks.append(f"--target-persons {target}: {len(enough)} have {least} images or more")
    if len(pairs) < validation:
        lacks.append(f"--validation-persons {validation}: {len(pairs)} others have a pair")
    if len(rest) < (1 if train is None else train):
        lacks.append(f"--train-persons {train or 0}: {len(rest)} others are left")
    if lacks:
        raise UsageError(f"{'; '.join(lacks)}: lower it, or give more photographs")
    parts = [tuple(sorted(part)) for part in (rest[:train], validated, targets)]
    return Split(parts[0], parts[1], parts[2], seed)


def write_manifest(path: File, faces: Faces, split: Split) -> None:
    """Write people.json atomically.

    It holds data, images (how many the data has), seed, the sorted person names of the parts, and
    sha256 over the canonical JSON (sorted keys, no spaces, ASCII) of all other entries. Of
    photographs also pixels, sha256 over the `Faces.hashes` of all images in order, and trained, the
    hashes of the train persons' images in base64; of rendered faces neither, as how their pixels
    are rounded depends on the machine.
    """
    content: dict[str, Any] = {"data": faces.data, "images": len(faces), "seed": split.seed}
    if faces.data != "synthetic":
        hashes = faces.hashes.numpy().astype("<i8")
        trained = hashes[np.isin(faces.person.numpy(), split.train)]
        content["pixels"] = hashlib.sha256(hashes.tobytes()).hexdigest()
        content["trained"] = base64.b64encode(trained.tobytes()).decode()
    for part in PARTS:
        content[part] = sorted(faces.names[k] for k in getattr(split, part))
    run.write(path, {**content, "sha256": hash_json(content)})


def read_manifest(path: File, faces: Faces) -> Split:
    """Read the Split that `write_manifest` wrote, as indices into these faces, wherever they lie.

    Raises UsageError: a file that is not whole, persons that are absent from faces, other images or
    another order of them (rows name images by index).
    """
    manifest = load_manifest(path)
    persons = [name for part in PARTS for name in manifest[part]]
    index = {name: k for k, name in enumerate(faces.names)}
    advice = f"use the data of that run ({manifest['data']}) or start a new run"
    if absent := sorted(name for name in persons if name not in index):
        n = len(absent)
        raise UsageError(f"{path}: {n} of its persons are not in this data, {absent[0]}: {advice}")
    if (manifest["data"], manifest["images"]) != (faces.data, len(faces)):
        of_manifest = f"{manifest['images']} images of {manifest['data']}"
        this = f"{len(faces)} of {faces.data}"
        raise UsageError(f"{path}: was written for {of_manifest}, this data has {this}: {advice}")
    if faces.data != "synthetic":
        hashes, trained = faces.hashes.numpy().astype("<i8"), manifest["trained"]
        if hashlib.sha256(hashes.tobytes()).hexdigest() != manifest["pixels"]:
            same = f"{np.isin(trained, hashes).sum()} of its {len(trained)} train images are here"
            raise UsageError(f"{path}: other images, order, crop or Pillow, {same}: {advice}")
    parts = [tuple(sorted(index[name] for name in manifest[part])) for part in PARTS]
    return Split(parts[0], parts[1], parts[2], manifest["seed"])


def trained_persons(path: File, faces: Faces) -> set[str]:
    """Name the persons of faces of whom a photograph was trained on, by a manifest's hashes.

    Pixels are compared, so neither names nor places matter; another crop does. Of rendered faces,
    where the training's were rendered too, all. Raises UsageError: as `load_manifest`.
    """
    manifest = load_manifest(path)
    if manifest["data"] == "synthetic":
        return {*faces.names} if faces.data == "synthetic" else set()
    trained = np.isin(faces.hashes.numpy(), manifest["trained"])
    return {faces.names[k] for k in faces.person.numpy()[trained]}


def load_manifest(path: File) -> dict[str, Any]:
    """Read what `write_manifest` wrote, trained as hashes int64 (n,).

    Raises UsageError where the file cannot be read, is not whole or was changed by hand.
    """
    advice = "restore it, give the folder of a finished run or start a new one"
    manifest = run.read_json(path, advice)
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if hash_json(content) != manifest.get("sha256"):
        raise UsageError(f"{path}: its sha256 does not fit, it was changed by hand: {advice}")
    if content["data"] != "synthetic" and "trained" not in content:
        raise UsageError(f"{path}: does not say which photographs were trained on: {advice}")
    trained = base64.b64decode(content.get("trained", ""))
    return {**manifest, "trained": np.frombuffer(trained, dtype="<i8")}


# a run


def open_run(config: Any, folder: File, overwrite: bool = False) -> tuple[Faces, Split]:
    """Load the faces and the split of a run; write a new run's people.json, and run.json.

    config: a script's, of its fields data, root, crop, person_folder, synthetic_persons,
    synthetic_images, train_persons (0: all that are left), validation_persons, target_persons,
    split_seed, seed, preset, and persons or loss and vgg_weights where it has them. overwrite: draw
    the persons again. run.json says what to load the same faces with. Rank 0 alone writes. Raises
    UsageError, also where the run has another split; where the settings ask too much of the data
    it names all of that at once, with the flags that would do.
    """
    rendered = {"persons": config.synthetic_persons, "images_per_person": config.synthetic_images}
    options = rendered if config.data == "synthetic" else {}
    choices = {"crop": config.crop or None, "person_folder": config.person_folder or None}
    faces = load(config.data, config.root or None, **choices, **options)
    sizes = config.train_persons or None, config.validation_persons, config.target_persons
    manifest, problems, flags = Path(folder) / "people.json", [], ""
    if manifest.exists() and not (overwrite and run.rank() == 0):
        split = read_manifest(manifest, faces)
        before = {f"{part} persons": len(getattr(split, part)) for part in PARTS}
        now = {key: before[key] if n is None else n for key, n in zip(before, sizes)}
        before["split seed"], now["split seed"] = split.seed, config.split_seed
        if differences := run.differences(before, now):
            problems.append(f"{manifest}: another split: {differences}: or use another --run")
            flags = " ".join(f"--{key.replace(' ', '-')} {n}" for key, n in before.items())
    else:
        try:
            split = split_persons(faces, *sizes, config.split_seed)
        except UsageError as error:
            several, many = ((faces.person.bincount() >= n).sum().item() // 4 for n in (2, 10))
            fewer = min(sizes[1], max(several, 2)), min(sizes[2], max(many, 1))
            try:
                split = split_persons(faces, None, *fewer, config.split_seed)
            except UsageError:
                raise error from None
            problems.append(str(error))
            flags = "--train-persons 0 --validation-persons {} --target-persons {}".format(*fewer)
    if getattr(config, "persons", 0) > len(split.train):
        problems.append(f"--persons {config.persons}: there are {len(split.train)} train persons")
        flags += " --persons 0"
    if getattr(config, "loss", "") == "vgg" and not config.vgg_weights:
        problems.append("--loss vgg needs --vgg-weights: a torchvision VGG16, or download")
        flags += " --vgg-weights download"
    if problems:
        raise UsageError("; ".join(problems), flags)
    if not manifest.exists() or (overwrite and run.rank() == 0):
        write_manifest(manifest, faces, split)
    record = {
        "data": config.data,
        "preset": config.preset,
        "seed": config.seed,
        "root": config.root and str(Path(config.root).resolve()),
        "options": options,
        "crop": faces.crop,
        "person_folder": config.person_folder,
    }
    if run.rank() == 0:
        run.write(Path(folder) / "run.json", record)
    return faces, split


def demo_run(folder: File = "runs/demo") -> Path:
    """Copy the run that lies in data/demo/ to folder, unless that is there; return the folder."""
    folder = Path(folder)
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
        shutil.copytree(HERE / "demo", beside)
        try:
            os.rename(beside, folder)
        except OSError:  # another process was faster
            shutil.rmtree(beside)
    advice = "train your own by embed.py, or name another --run"
    say(f"{folder}: G and F of data/demo/, trained on rendered faces: {advice}", sys.stdout)
    return folder
