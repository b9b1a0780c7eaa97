"""Faces for every stage: loaders, person-disjoint splits and their manifest (Sec. 4 and App. A).

    faces = data.load("synthetic")                      # the rendered faces: needs nothing
    faces = data.load("folder", root="lfw")             # one folder a person: LFW, or photographs
    faces = data.load("folder", root="lfw", size=112)   # at another size than the paper's 64
    faces = data.load("celeba", root="celeba")          # img_align_celeba/ and identity_CelebA.txt
    split = data.split_persons(faces, train=2000, validation=100, target=30, seed=0)
    data.write_manifest("people.json", faces, split)
    faces, split = data.open_run(config, folder)        # what a script calls: all of the above

In: image files. Out: `Faces` with images uint8 (N, 3, size, size), RGB, size 64 unless asked, in
CelebA's frame: eye centres on average at row 33.4, columns 22.3 and 41.2 of 64. All errors a user
can cause are `DataError`, one line that names the file or setting and what to do. An image that
cannot be used never stops a load: it is skipped, named with its reason in `Faces.skipped` and
counted on stderr. Measured on LFW, 7,487 photographs, two CPU cores: 9.5 s the first time, 0.6 s
from the cache, n = 1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import __version__ as pillow_version

from . import run
from .photographs import (  # noqa: F401  crop_box, load_image: for callers
    SIZE,
    _check_crop,
    _check_size,
    _decode_alike,
    _hash,
    _printable,
    _reason,
    _short,
    _some,
    _wrong,
    crop_box,
    load_image,
)
from .run import File
from .run import UsageError as DataError

DATA_SETS = ("synthetic", "folder", "celeba")
IDENTITY_FILE = "identity_CelebA.txt"
PUT_IDENTITIES = "put CelebA's identity file there"
MAX_DEPTH = 8  # folders below the root
MAX_FILES = 2_000_000  # below one root; more is a whole disk given by mistake
MAX_TEXT_BYTES = 64 * 2**20  # identity file or manifest
CACHE_VERSION = 2
# folders that hold persons and are none, in one or several of these words
SPLITS = {*"train training test testing val valid validation dev eval evaluation".split()}
SPLITS |= {
    *"gallery probe query images image imgs photos pictures faces data set split fold".split()
}
CAMERA = re.compile(  # what cameras, scanners and counters call a file
    r"(img|image|pict?|picture|photo|dsc[nf]?|mvi|pxl|cimg|gopr|dji|scan|frame|p\d{6}|(19|20)\d{6})"
    r"[\W\d_]*",
    re.IGNORECASE,
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
    """Disjoint person indices, ascending: train, validation, target; the seed that drew them."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    target: tuple[int, ...]
    seed: int


def _say(text: str, file: Any = None) -> None:
    if run.rank() == 0:
        print(f"data: {text}", file=file or sys.stderr, flush=True)


def load(
    name: str,
    root: File | None = None,
    *,
    crop: str | None = None,
    size: int = SIZE,
    cache: File | None = "runs/cache",
    progress: bool = True,
    person_folder: str | None = None,
    **options: int,
) -> Faces:
    """Load a data set -> Faces.

    name     "synthetic"  rendered heads; options persons=370, images_per_person=12, seed=0; takes
                          no root and no crop
             "folder"     root/person/image, also below folders that are named as splits (train,
                          test, gallery, ...) and below one folder that holds all others; or flat
                          root/person_0001.jpg, the person is the name before the trailing _number
                          or -number. Names are compared after Unicode's NFC. Any format Pillow
                          reads, told by content, except those that would run other programs (EPS,
                          WMF). Hidden files are ignored.
             "celeba"     root/img_align_celeba/ and root/identity_CelebA.txt; names are the
                          identities, five digits
    crop     see `crop_box`, one for all images; None takes the one that the sizes of most ask for
             (celeba: "celeba"); images that it does not fit are skipped
    size     side of the images, pixels, 32 to 256; rendered faces are rendered at it. Which
             photographs there are, and whose, does not depend on it; other sizes than 64 are
             decoded at 64 too, for `Faces.hashes`, in twice the time
    cache    folder for decoded images, one file a (root, crop, size), used while every file's path,
             size, time and mode are as they were and rebuilt otherwise; None reads the images every
             time; one that cannot be written only warns
    progress a bar while 500 or more images are decoded
    person_folder  of root/a/b/image, "folder" alone: "first", a is the person and b a session, or
             "last", b is the person and a a collection; without it such a folder is refused
    Photographs with the same pixels, once decoded at 64: of one person the first is kept; those
    filed under several persons are left out of all, as nobody knows whose they are. Both are named
    in `skipped` and told on stderr.
    Raises DataError: unknown name, crop, size or option, missing or empty folder, no readable
    image, bad identity file.
    """
    crop, size = _check_crop(crop), _check_size(size)
    root = os.fspath(root) if root is not None else ""
    if name not in DATA_SETS:
        raise DataError(f"unknown data {name!r}: choose {', '.join(DATA_SETS)}")
    if name == "synthetic":
        if root or crop or person_folder:
            no = "no root, no crop and no person folder"
            raise DataError(f"synthetic faces take {no}: choose folder or celeba")
        return _load_synthetic(size, cache, progress, options)
    if person_folder and (name != "folder" or person_folder not in ("first", "last")):
        raise DataError(f"--person-folder {person_folder}: first or last, of --data folder alone")
    if options:
        raise DataError(f"{name} takes no option {', '.join(sorted(options))}")
    if not root:
        raise DataError(f"{name} needs a root: the folder that holds the images")
    crop = crop or ("celeba" if name == "celeba" else None)
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (OSError, ValueError) as error:
        raise _wrong(root, f"cannot be read ({_reason(error)}); check the root") from None
    if not is_folder:
        raise _wrong(root, "is not a folder; give the folder that holds the images as root")

    if name == "folder":
        entries, refused = _list_folder(root)
    else:
        entries, refused = _list_celeba(root), []
    listing = [[file, *about] for file, about in entries]
    whose = person_folder or ""
    signature = _digest([CACHE_VERSION, pillow_version, name, whose, listing, refused])
    store, guessed = (
        _cache_path(cache, name, [os.path.realpath(root), asked, whose, size])
        for asked in (crop, None)
    )
    faces = _read_cache(store, signature, size)
    if faces is None and crop:  # a run goes on with the crop that was found for it
        faces = _read_cache(guessed, signature, size)
    if faces is None or crop not in (None, faces.crop):
        found = [file for file, _ in entries]
        if name == "folder":
            listed = _folder_persons(root, found, refused, person_folder)
        else:
            listed = _celeba_persons(root, found[1:])
        faces = _from_files(name, root, listed, crop, size, progress)
        _write_cache(store, signature, faces)
    for k, note in enumerate(faces.notes):  # the first says what there is, the others warn
        _say(note, sys.stderr if k else sys.stdout)
    if faces.skipped:
        total = len(faces) + len(faces.skipped)
        _say(f"{len(faces.skipped)} of {total} files skipped: {_some(faces.skipped)}")
    return faces


# files, the person of each, what was refused, what to look at
Listed = tuple[list[str], list[str], list[str], list[str]]


def _from_files(
    name: str, root: str, listed: Listed, crop: str | None, size: int, progress: bool
) -> Faces:
    files, persons, refused, notes = listed
    if not files:
        why = f" ({refused[0]})" if refused else ""
        raise _wrong(root, f"no images{why}; expected one folder a person with images in it")
    paths = [os.path.join(root, file) for file in files]
    images, hashes, reasons, crop, cropped = _decode_alike(paths, crop, size, progress)
    shown = [_printable(file) for file in files]
    notes = [*notes, *_refuse_copies(hashes, persons, shown, reasons)]
    skipped = [f"{file}: {why}" for file, why in zip(shown, reasons) if why is not None]
    skipped = [*refused, *skipped]
    kept = [i for i, why in enumerate(reasons) if why is None]
    if not kept:
        raise _wrong(root, f"none of its {len(files)} files can be used ({skipped[-1]})")
    for k, i in enumerate(kept):  # in place: no second copy of all images
        if k < i:
            images[k] = images[i]
    names = sorted({persons[i] for i in kept})
    index = {person: k for k, person in enumerate(names)}
    many = f"{len(kept)} photographs of {len(names)} person{'s' * (len(names) > 1)}"
    return Faces(
        images=torch.from_numpy(images[: len(kept)]),
        person=torch.tensor([index[persons[i]] for i in kept], dtype=torch.int64),
        names=tuple(names),
        files=tuple(shown[i] for i in kept),
        skipped=tuple(skipped),
        data=name,
        crop=crop,
        notes=(f"{many}, {cropped}", *notes),
        hashes=torch.from_numpy(hashes[kept]),
    )


def _refuse_copies(
    hashes: np.ndarray, persons: list[str], files: list[str], reasons: list[str | None]
) -> list[str]:
    """Writes into reasons what has the same pixels as another; returns what to tell."""
    alike: dict[int, list[int]] = {}
    for i, value in enumerate(hashes.tolist()):
        if reasons[i] is None:
            alike.setdefault(value, []).append(i)
    copies, shared = 0, []
    for first, *rest in alike.values():
        others = [i for i in rest if persons[i] != persons[first]]
        for i in rest:
            reasons[i] = f"the same photograph as {files[first]}"
        if others:
            reasons[first] = f"the same photograph as {files[others[0]]}, of another person"
            shared.append(f"{files[first]} = {files[others[0]]}")
        else:
            copies += len(rest)
    notes = [f"{copies} exact copies of a person's own photographs left out"] if copies else []
    if shared:
        what = "photographs are filed under two persons or more and left out of all"
        notes.append(f"{len(shared)} {what}: {_some(shared)}")
    return notes


# ---- folder


Entry = tuple[str, tuple[int, int, int]]  # path relative to the root, (size, mtime in ns, mode)


def _list_folder(root: str) -> tuple[list[Entry], list[str]]:
    """Every regular file below root, sorted by path, and what was refused. Links are followed, no
    folder twice."""

    def which(folder: str, about: os.stat_result) -> object:
        # os.scandir gives no inode on Windows, nor do some network drives
        return (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(folder)

    entries: list[Entry] = []
    refused: list[str] = []
    seen = {which(root, os.stat(root)), os.path.realpath(root)}
    todo = [("", 0)]
    while todo:
        folder, depth = todo.pop(0)
        try:
            with os.scandir(os.path.join(root, folder)) as scan:
                children = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                what = f"cannot be read ({_reason(error)}); check its permissions"
                raise _wrong(root, what) from None
            refused.append(f"{_printable(folder)}: {_reason(error)}")
            continue
        for child in children:
            if child.name.startswith(".") or child.name.lower() in NOT_PHOTOGRAPHS:
                continue
            path = os.path.join(folder, child.name)
            try:
                about = child.stat()
            except OSError as error:  # a broken link, or a loop of links
                refused.append(f"{_printable(path)}: {_reason(error)}")
                continue
            if stat.S_ISDIR(about.st_mode):
                if (this := which(os.path.join(root, path), about)) in seen:
                    refused.append(f"{_printable(path)}: link to a folder that is read already")
                elif depth >= MAX_DEPTH:
                    refused.append(f"{_printable(path)}: more than {MAX_DEPTH} folders deep")
                else:
                    seen.add(this)
                    todo.append((path, depth + 1))
            elif stat.S_ISREG(about.st_mode):
                entries.append((path, (about.st_size, about.st_mtime_ns, about.st_mode)))
                if len(entries) > MAX_FILES:
                    what = f"holds more than {MAX_FILES} files; give the folder of faces"
                    raise _wrong(root, what)
            else:
                refused.append(f"{_printable(path)}: not a regular file")
    return sorted(entries), sorted(refused)


def _is_split(folder: str) -> bool:
    words = re.findall(r"[^\W\d_]+", folder.casefold())
    return bool(words) and SPLITS.issuperset(words)


def _folder_persons(
    root: str, files: list[str], refused: list[str], person_folder: str | None
) -> Listed:
    """The files that can be photographs, and whose they are."""
    paths = {folder: folder.split(os.sep) for folder in {*map(os.path.dirname, files)} if folder}
    inside: dict[tuple[str, ...], set[str]] = {}
    for path in paths.values():
        for k, name in enumerate(path):
            inside.setdefault((*path[:k],), set()).add(name)
    # a level only where all are named so: beside ann and bob, dev is a person
    splits = {parent for parent, names in inside.items() if all(map(_is_split, names))}
    for path in paths.values():
        path[:] = [name for k, name in enumerate(path) if (*path[:k],) not in splits]
    within = [path for path in paths.values() if path]
    if not person_folder and len({path[0] for path in within}) == 1 < min(map(len, within)):
        for path in within:  # an archive unpacked one folder too deep
            del path[0]
    deep = sorted(folder for folder, path in paths.items() if len(path) > 1)
    if deep and not person_folder:
        first, last = (_short(paths[deep[0]][k]) for k in (0, -1))
        what = f"is the person {first} or {last}? give --person-folder first (sessions below it)"
        raise _wrong(os.path.join(root, deep[0]), f"{what} or last (collections above it)")

    if not within:
        stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
        names, loose = [re.sub(r"(?<=.)[_-]\d+$", "", stem) for stem in stems], []
    else:
        loose = [file for file in files if not paths.get(os.path.dirname(file))]
        files = [file for file in files if paths.get(os.path.dirname(file))]
        which = 0 if person_folder == "first" else -1
        names = [paths[os.path.dirname(file)][which] for file in files]
    persons = [_printable(unicodedata.normalize("NFC", name)) for name in names]
    notes = _doubts(files, persons, flat=not within)
    if levels := sorted({_short(name) for parent in splits for name in inside[parent]}):
        notes.append(f"folders taken for splits, not for persons: {_some(levels)}")
    beside = [f"{_printable(file)}: lies beside the persons' folders" for file in loose]
    return files, persons, [*refused, *beside], notes


def _doubts(files: list[str], persons: list[str], flat: bool) -> list[str]:
    """What looks as if a name were none, one line each."""
    notes, counts = [], Counter(persons)
    spelt: dict[str, list[str]] = {}
    for name in sorted(counts):
        spelt.setdefault(re.sub(r"[\s_]", "", name).casefold(), []).append(_short(name))
    if alike := [" and ".join(names) for names in spelt.values() if len(names) > 1]:
        what = "names alike but for case or spaces, taken for several persons"
        notes.append(f"{what}: {_some(alike)}")
    alone = sorted(_short(name) for name, n in counts.items() if n == 1)
    if not flat and len(counts) > 2 and 0 < len(alone) <= max(1, len(counts) // 20):
        notes.append(f"a folder of one file beside folders of more, is it a person: {_some(alone)}")

    def numbered(name: str) -> bool:
        digits = counts[name] == 1 and not any(map(str.isalpha, name))
        return digits or CAMERA.fullmatch(name) is not None

    run_of = [k for k, name in enumerate(persons) if flat and numbered(name)]
    if len(run_of) > 1:
        n, shown = len({persons[k] for k in run_of}), _printable(files[run_of[0]])
        told = f"{len(run_of)} files named like {shown} are taken for {n} person{'s' * (n > 1)}"
        notes.append(f"{told}; if they are not, put each person's photographs into a folder")
    return notes


# ---- celeba


def _list_celeba(root: str) -> list[Entry]:
    """The identity file (first) and every image, sorted."""
    identity_file = os.path.join(root, IDENTITY_FILE)
    try:
        about = os.stat(identity_file)
    except OSError as error:
        raise _wrong(identity_file, f"{_reason(error)}; {PUT_IDENTITIES}") from None
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_TEXT_BYTES:
        raise _wrong(identity_file, "is not a text file of lines like '000001.jpg 2880'")
    places = ("img_align_celeba/img_align_celeba", "img_align_celeba")
    folder = next((place for place in places if os.path.isdir(os.path.join(root, place))), None)
    if folder is None:
        raise _wrong(root, "has no folder img_align_celeba; unpack img_align_celeba.zip there")
    inside, _ = _list_folder(os.path.join(root, folder))
    images = [(f"{folder}/{file}", facts) for file, facts in inside if os.sep not in file]
    return [(IDENTITY_FILE, (about.st_size, about.st_mtime_ns, about.st_mode)), *images]


def read_identities(path: File, present: Sequence[str] | None = None) -> dict[str, str]:
    """identity_CelebA.txt -> {"000001.jpg": "02880", ...}, in the file's order.

    Lines "name identity", identity a whole number; one or two header lines, blank lines, commas and
    CRLF are tolerated. present: the image names there are. Raises DataError naming file, line
    number and what to do: malformed line, image listed twice, image that is absent, no line at all.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise _wrong(path, f"{_reason(error)}; {PUT_IDENTITIES}") from None
    there, shown = None if present is None else frozenset(present), _printable(os.fspath(path))
    identities: dict[str, str] = {}
    for number, line in enumerate(re.split(r"\r\n?|\n", text), start=1):
        words = line.replace(",", " ").split()
        header = number <= 2 and not identities and bool(words) and "." not in words[0]
        if not words or header:
            continue
        where = f"{shown}, line {number}"
        found = re.fullmatch(r"([^/\\ ]+) ([0-9]{1,9})", " ".join(words))
        if not found:
            like = f"{_short(line)!r} is not like '000001.jpg 2880'"
            raise DataError(f"{where}: {like}; correct or remove the line")
        image, identity = found.groups()
        if image in identities:
            what = "is listed a second time; remove one of the lines"
            raise DataError(f"{where}: image {_short(image)} {what}")
        if there is not None and image not in there:
            what = "is not in img_align_celeba; unpack all of its zip, or remove the line"
            raise DataError(f"{where}: image {_short(image)} {what}")
        identities[image] = f"{int(identity):05d}"
    if not identities:
        raise _wrong(path, f"holds no line like '000001.jpg 2880'; {PUT_IDENTITIES}")
    return identities


def _celeba_persons(root: str, files: list[str]) -> Listed:
    """Images that have an identity, the person of each, and the images that have none."""
    by_name = {file.rsplit("/", 1)[1]: file for file in files}
    identities = read_identities(os.path.join(root, IDENTITY_FILE), list(by_name))
    order = sorted(identities)
    extra = sorted(by_name.keys() - identities.keys())
    refused = [f"{_printable(by_name[image])}: no line in {IDENTITY_FILE}" for image in extra]
    return [by_name[image] for image in order], [identities[image] for image in order], refused, []


# ---- synthetic


def _load_synthetic(
    size: int, cache: File | None, progress: bool, options: dict[str, int]
) -> Faces:
    from . import synthetic

    settings = {"persons": 370, "images_per_person": 12, "seed": 0}
    for key, value in options.items():
        if key not in settings:
            raise DataError(f"synthetic takes no option {key!r}: there are {', '.join(settings)}")
        least = 0 if key == "seed" else 1
        if type(value) is not int or value < least:
            must = f"must be a whole number of at least {least}"
            raise DataError(f"synthetic: {key} {must}, not {value!r}")
    settings.update(options)
    persons, per_person, seed = settings.values()
    if persons > 100_000:
        raise DataError(f"synthetic: persons must be at most 100000, not {persons}")
    source = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()
    signature = _digest([CACHE_VERSION, settings, source])
    store = _cache_path(cache, "synthetic", [settings, size])
    faces = _read_cache(store, signature, size)
    if faces is None:
        made = synthetic.synthetic_faces(persons, per_person, seed, progress, size)
        images, person, identity, content = map(torch.as_tensor, made)
        names = tuple(f"person-{k:05d}" for k in range(persons))
        files = tuple(f"{name}/{i:04d}" for name in names for i in range(per_person))
        person = person.to(torch.int64)
        faces = Faces(images, person, names, files, (), "synthetic", identity, content)
        _write_cache(store, signature, faces)
    return faces


# ---- cache: one .npz a data set, read without pickle


ARRAYS = ("images", "person", "identity", "content", "hashes")
TEXTS = ("names", "files", "skipped", "notes")


def _digest(content: Any) -> str:
    """sha256 of the canonical JSON of content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _cache_path(cache: File | None, name: str, key: Any) -> Path | None:
    return None if cache is None or cache == "" else Path(cache) / f"{name}-{_digest(key)[:16]}.npz"


def _read_cache(store: Path | None, signature: str, size: int) -> Faces | None:
    """The cached faces; None where there are none, they are out of date or the file is broken (zip
    checks its CRC)."""
    if store is None:
        return None
    run.sweep(store)
    if not store.is_file():
        return None
    try:
        with np.load(store, allow_pickle=False) as held:
            about = json.loads(held["about"].tobytes())
            if about["signature"] != signature:
                return None
            keys = [key for key in ARRAYS if key in held]
            arrays: Any = {key: torch.from_numpy(held[key]) for key in keys}
        images, person = arrays["images"], arrays["person"]
        texts: Any = {key: tuple(about[key]) for key in TEXTS}
        N = len(texts["files"])
        fits = images.dtype == torch.uint8 and images.shape == (N, 3, size, size) and N > 0
        fits = fits and person.dtype == torch.int64 and person.shape == (N,)
        if not fits or person.min() < 0 or person.max() >= len(texts["names"]):
            raise ValueError("arrays do not fit together")
        return Faces(data=about["data"], crop=about["crop"], **texts, **arrays)
    except Exception as error:  # noqa: BLE001  a broken cache costs time, never the run
        _say(f"cache {_printable(str(store))} is broken ({_reason(error)}), made again")
        return None


def _write_cache(store: Path | None, signature: str, faces: Faces) -> None:
    if store is None:
        return
    about = {key: getattr(faces, key) for key in (*TEXTS, "data", "crop")}
    text = json.dumps({**about, "signature": signature}).encode("ascii")
    tensors = {key: getattr(faces, key) for key in ARRAYS}
    arrays = {key: tensor.numpy() for key, tensor in tensors.items() if tensor is not None}
    arrays["about"] = np.frombuffer(text, dtype=np.uint8)
    try:
        run.write(store, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    except DataError as error:
        _say(f"the next load takes as long as this one: cache {_printable(str(error))}")


# ---- persons


def image_counts(faces: Faces) -> torch.Tensor:
    """How many images each person has, int64 (len(names),)."""
    return torch.bincount(faces.person, minlength=len(faces.names))


def images_of(faces: Faces, persons: Sequence[int], most: int = 0) -> torch.Tensor:
    """Indices of these persons' images in order, of each the first `most`; 0: all."""
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
    most as many of the drawn as they are.
    Raises DataError saying how many persons there are and what to lower.
    """
    for key, value in (("train", train), ("validation", validation), ("target", target)):
        if value is not None and value < 0:
            raise DataError(f"{key} persons: {value} is negative; give 0 or more")
    counts = image_counts(faces).tolist()
    keys = [f"{seed}:{name}".encode("utf-8", "surrogatepass") for name in faces.names]
    order = sorted(range(len(keys)), key=lambda k: hashlib.sha256(keys[k]).digest())
    least, of_all = max(min_target_images, 2), f"of the {len(counts)} persons"

    enough = [k for k in order if counts[k] >= least]
    if len(enough) < target:
        raise DataError(
            f"{target} target persons asked for, but {len(enough)} {of_all} have at least {least} "
            f"images; lower the number of target persons or the images they need"
        )
    targets = set(enough[:target])
    pairs = [k for k in order if counts[k] >= 2 and k not in targets]
    if len(pairs) < validation:
        raise DataError(
            f"{validation} validation persons asked for, but beside the {target} targets "
            f"{len(pairs)} {of_all} have two or more images; lower the number of either"
        )
    held_out = set(pairs[:validation])
    # from the far end, so that validation seldom shifts train
    rest = [k for k in reversed(order) if k not in targets and k not in held_out]
    if len(rest) < (1 if train is None else train):
        raise DataError(
            f"{'no' if train is None else train} train persons: {len(rest)} {of_all} are left "
            f"beside {target} targets and {validation} for validation; lower one, or add persons"
        )
    drawn = [tuple(sorted(part)) for part in (rest[:train], held_out, targets)]
    return Split(drawn[0], drawn[1], drawn[2], seed)


PARTS = ("train", "validation", "target")


def write_manifest(path: File, faces: Faces, split: Split) -> None:
    """Write people.json atomically.

    It holds data, images (how many the data has), seed, the sorted person names of the parts, and
    sha256 over the canonical JSON (sorted keys, no spaces, ASCII) of all other entries. Of
    photographs also pixels, sha256 over the `Faces.hashes` of all images in order, and trained, the
    hashes of the train persons' images in base64, 11 bytes an image; of rendered faces neither, as
    how their pixels are rounded depends on the machine. Raises DataError where the file cannot be
    written.
    """
    content: dict[str, Any] = {"data": faces.data, "images": len(faces), "seed": split.seed}
    if faces.data != "synthetic":
        hashes = _hashes(faces)
        trained = hashes[np.isin(faces.person.numpy(), split.train)]
        content["pixels"] = hashlib.sha256(hashes.tobytes()).hexdigest()
        content["trained"] = base64.b64encode(trained.tobytes()).decode()
    for part in PARTS:
        content[part] = sorted(faces.names[k] for k in getattr(split, part))
    run.write(path, {**content, "sha256": _digest(content)})


def open_split(
    path: File, faces: Faces, sizes: tuple[int | None, int, int], seed: int, overwrite: bool = False
) -> Split:
    """`read_manifest` of path; `split_persons`, written there, if it is absent or with overwrite.

    sizes: how many train (None: any), validation and target persons. Raises DataError also where
    the manifest is of another split than the one asked for.
    """
    if Path(path).exists() and not overwrite:
        held = read_manifest(path, faces)
        there = {"split seed": held.seed}
        there |= {f"{part} persons": len(getattr(held, part)) for part in PARTS}
        pairs = zip(there.items(), (seed, *sizes))
        differs = [f"{k} ({a} there, {b} asked for)" for (k, a), b in pairs if b not in (None, a)]
        if differs:
            told = f"is another split: {', '.join(differs)}"
            raise _wrong(path, f"{told}; ask for that one, or give another --run")
        return held
    split = split_persons(faces, *sizes, seed)
    write_manifest(path, faces, split)
    return split


def read_manifest(path: File, faces: Faces) -> Split:
    """The Split that `write_manifest` wrote, as indices into these faces, wherever they lie now.

    Raises DataError: unreadable or malformed file, a hash that does not fit, a person named twice
    or in two parts, persons that are absent from faces, other images or another order of them (rows
    name images by index). A manifest of an older version has no hashes: one line tells it.
    """
    held = _manifest(path)
    persons = [name for part in PARTS for name in held[part]]
    index = {name: k for k, name in enumerate(faces.names)}
    that = f"use the data of that run ({_short(held['data'])}) or start a new run"
    absent = sorted(name for name in persons if name not in index)
    if absent:
        what = f"{len(absent)} of its {len(persons)} persons are not in this data"
        raise _wrong(path, f"{what}, {_short(absent[0])} is one; {that}")
    if (held["data"], held["images"]) != (faces.data, len(faces)):
        what = f"was written for {held['images']} images of {_short(held['data'])}, this data has"
        raise _wrong(path, f"{what} {len(faces)} of {faces.data}; {that}")
    if faces.data != "synthetic" and not held["pixels"]:
        _say(f"{_printable(os.fspath(path))} is of an older version: images are not compared")
    elif faces.data != "synthetic":
        hashes = _hashes(faces)
        if hashlib.sha256(hashes.tobytes()).hexdigest() != held["pixels"]:
            there = f"{np.isin(held['trained'], hashes).sum()} of its {len(held['trained'])}"
            what = "was written for other images, another order, another crop or Pillow:"
            raise _wrong(path, f"{what} {there} train images are in this data; {that}")
    parts = [tuple(sorted(index[name] for name in held[part])) for part in PARTS]
    return Split(parts[0], parts[1], parts[2], held["seed"])


def trained_on(path: File, faces: Faces) -> set[str]:
    """Names of the persons of faces of whom a photograph was trained on, by a manifest's hashes.

    Pixels are compared, so neither names nor places matter; another crop does. Of rendered faces,
    where the training's were rendered too, all. Raises DataError: as `_manifest`, and where it is
    of an older version, without hashes.
    """
    held = _manifest(path)
    if held["data"] == "synthetic":
        return {*faces.names} if faces.data == "synthetic" else set()
    if not held["pixels"]:
        what = "is of an older version and does not say which photographs were trained on"
        raise _wrong(path, f"{what}; start a new run")
    seen = np.isin(_hashes(faces), held["trained"])
    return {faces.names[k] for k in faces.person.numpy()[seen]}


def _hashes(faces: Faces) -> np.ndarray:
    """Of each image at 64, int64 (N,), the same on every machine."""
    if faces.hashes is None:  # not of the loaders
        if faces.images.shape[-1] != SIZE:
            raise DataError(f"photographs of another size than {SIZE} are known by Faces.hashes")
        return np.array([_hash(image) for image in faces.images.numpy()], dtype="<i8")
    return faces.hashes.numpy().astype("<i8")


def _manifest(path: File) -> dict[str, Any]:
    """What `write_manifest` wrote; trained as hashes. DataError where it is not whole."""

    def wrong(what: str) -> DataError:
        return _wrong(path, f"{what}; restore it or start a new run")

    held = run.read_json(path, "restore it, give the folder of a finished run or start a new one")
    kinds = {"seed": int, "images": int, "data": str, "sha256": str}
    if any(type(held.get(key)) is not kind for key, kind in kinds.items()):
        raise wrong("is not a manifest of persons")
    for part in PARTS:
        names = held.get(part)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise wrong(f"{part!r} is not a list of names")
    if _digest({key: value for key, value in held.items() if key != "sha256"}) != held["sha256"]:
        raise wrong("its sha256 does not fit, it was changed by hand")
    counts = Counter(name for part in PARTS for name in held[part])
    if twice := [name for name, n in counts.items() if n > 1]:
        raise wrong(f"person {_short(twice[0])} stands in it twice")
    try:
        raw = base64.b64decode(held.setdefault("trained", ""), validate=True)
        held["trained"] = np.frombuffer(raw, dtype="<i8")
        held["pixels"] = str(held.get("pixels", ""))
    except (TypeError, ValueError):
        raise wrong("its hashes are not whole") from None
    return held


def open_run(config: Any, folder: File, overwrite: bool = False) -> tuple[Faces, Split]:
    """The faces and the split of a run, by a script's config; a new run gets its people.json.

    config: its fields data, root, crop, person_folder (if it has one), synthetic_persons,
    synthetic_images, train_persons (0: all that are left), validation_persons, target_persons,
    split_seed, seed, preset. overwrite: the persons are drawn again. Rank 0 writes run.json: what
    to load the same faces with, by the crop that was found for them.
    Raises DataError.
    """
    rendered = {"persons": config.synthetic_persons, "images_per_person": config.synthetic_images}
    options = rendered if config.data == "synthetic" else {}
    whose = getattr(config, "person_folder", "")
    more = {"crop": config.crop or None, "person_folder": whose or None}
    faces = load(config.data, config.root or None, **more, **options)
    sizes = config.train_persons or None, config.validation_persons, config.target_persons
    overwrite = overwrite and run.rank() == 0  # the other processes find what it drew
    split = open_split(Path(folder) / "people.json", faces, sizes, config.split_seed, overwrite)
    record = {key: getattr(config, key) for key in ("data", "preset", "seed")}
    record |= {"root": config.root and str(Path(config.root).resolve()), "options": options}
    record |= {"crop": faces.crop, "person_folder": whose}
    if run.rank() == 0:
        run.write(Path(folder) / "run.json", record)
    return faces, split
