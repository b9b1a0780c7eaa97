"""A user's own face model, FILE.py:NAME or package.module:NAME: loaded, checked, and shown the
photographs to see whether they reach it as it wants them.

Whatever the user's code does becomes one line, `run.UsageError`. Images are float NCHW in [0, 1].
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import run

Embed = Callable[[Tensor], Tensor]
# how Python says that the user's module of this name is hidden by ours
HIDDEN = r"(from|module|named) '(generator|embed|attacks|verify|metrics|results|data|kernels)\b"


def model_name(text: str) -> str:
    """Return `net-embed` for folder/net.py:embed: the name of its rows and tables."""
    where, _, name = text.rpartition(":")
    return f"{Path(where).stem if where.endswith('.py') else where}-{name}"


@contextlib.contextmanager
def user_code(flag: str, doing: str = "") -> Iterator[None]:
    """Turn an error about the model ("embed: ...") into one line, and with `doing` any error."""
    try:
        yield
    except run.UsageError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:200]
        if isinstance(error, ValueError) and text.startswith("embed: "):
            raise run.UsageError(f"{flag}: {text.removeprefix('embed: ')}") from None
        if isinstance(error, (ImportError, AttributeError)) and re.search(HIDDEN, text):
            text += ": that module is ours, rename yours"
        if not doing:
            raise
        raise run.UsageError(f"{flag}: {doing}: {type(error).__name__}: {text}") from None


def load_model(flag: str, text: str, device: torch.device) -> tuple[Embed, Path | None]:
    """Load what FILE.py:NAME or package.module:NAME means; return it and the file that defines it.

    NAME takes images and gives features (a function, a Module, any callable), or takes nothing and
    returns such a thing (a function, a class). A Module comes back on the device, in evaluation
    mode. The file is run, whatever it does. Raises run.UsageError.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise run.UsageError(f"{flag}: give FILE.py:NAME or package.module:NAME")
    if where.endswith(".py") and not Path(where).is_file():
        raise run.UsageError(f"{flag}: no such file {where}")
    for stage in ("metrics", "results"):  # the user's code may put a folder of its own first
        with contextlib.suppress(ImportError):
            importlib.import_module(stage)
    torch.manual_seed(0)  # random weights are the same when the command goes on
    with user_code(flag, "cannot be loaded"):
        if where.endswith(".py"):
            # last, and under another name: a file called embed.py must not hide ours
            sys.path.append(str(Path(where).resolve().parent))
            spec: Any = importlib.util.spec_from_file_location(f"of_user_{Path(where).stem}", where)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.append(str(Path.cwd()))
            module = importlib.import_module(where)
        model = getattr(module, name, None)
        if model is None:
            raise run.UsageError(f"{flag}: {where} has no {name}")
        if not isinstance(model, torch.nn.Module):
            try:
                inspect.signature(model).bind()
            except (TypeError, ValueError):  # it takes images, or says nothing
                pass
            else:
                model, name = model(), f"{name}()"
        if isinstance(model, type) or not callable(model):
            wanted = "a function of images, a Module, or what returns one without arguments"
            raise run.UsageError(f"{flag}: {name} is a {type(model).__name__}, wanted {wanted}")
        if isinstance(model, torch.nn.Module):
            model = model.to(device).eval()
    file = getattr(module, "__file__", None)
    return model, Path(file) if file else None


class Cosine(torch.nn.Module):
    """Normalised features: the squared distance is twice the cosine distance."""

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.embed(images).float(), dim=1)


def check_clean(
    flag: str, embed: Embed, images: Tensor, person: Tensor, cosine: bool, chunk: int
) -> list[str]:
    """Return what to know before an attack, a line each: the clean AU-ROC of all pairs of these
    images, uint8, of person (N,), and what another order of the colours, range or distance gives
    where that is better, or the AU-ROC is low."""
    from sklearn.metrics import roc_auc_score

    one, two = torch.triu_indices(len(person), len(person), 1, device=person.device)
    same = (person[one] == person[two]).cpu()

    @torch.no_grad()
    def area(change: Callable[[Tensor], Tensor], normalise: bool) -> float:
        features = torch.cat([embed(change(x.float() / 255)) for x in images.split(chunk)])
        features = F.normalize(features, dim=1) if normalise else features
        distance = (features[one].double() - features[two].double()).square().sum(1)
        return float(roc_auc_score(~same, distance.cpu()))

    with user_code(flag, "fails on the photographs"):
        clean, other = area(lambda x: x, cosine), area(lambda x: x, not cosine)
    lines = [f"clean AU-ROC {clean:.3f}, {int(same.sum())} genuine of {len(same)} pairs"]
    if other > clean + 0.02:
        better = "euclidean" if cosine else "cosine"
        lines.append(f"WARNING: {other:.3f} by the other distance: --distance {better}")
    changes: dict[str, Callable[[Tensor], Tensor]] = {"as BGR": lambda x: x.flip(1)}
    changes |= {"in [-1, 1]": lambda x: 2 * x - 1, "in 0 to 255": lambda x: 255 * x}
    areas = {"as given": clean}
    for name, change in changes.items():
        with contextlib.suppress(Exception):
            areas[name] = area(change, cosine)
    if clean < 0.75 or max(areas.values()) > clean + 0.005:  # fewer thousandths may be chance
        shown = ", ".join(f"{value:.3f} {name}" for name, value in areas.items())
        lines.append(f"WARNING: {shown}: frame, crop, colours or range may be wrong")
    return lines


def picture_for(path: Path, images: Tensor) -> None:
    """Write the images, uint8 (n, 3, H, W), side by side as a PNG: what the model gets."""
    row = images.permute(2, 0, 3, 1).flatten(1, 2)  # (H, n * W, 3)
    image = Image.fromarray(row.contiguous().numpy())
    run.write(path, functools.partial(image.save, format="PNG"))


def write_pattern(path: Path, pattern: Any, mask: Any) -> None:
    """Write a universal patch, uint8 (3, h, w), as a PNG to print, clear outside mask (H, W)."""
    picture = np.zeros((*mask.shape, 4), np.uint8)
    picture[mask, :3], picture[mask, 3] = pattern.reshape(3, -1).T, 255
    run.write(path, functools.partial(Image.fromarray(picture).save, format="PNG"))


def model_digest(embed: Embed, file: Path | None, images: Tensor) -> str:
    """Return the digest of a model's file and of its distances between a few fixed images, four
    means to four digits: all that a row can tell of its weights, wherever they come from."""
    with torch.no_grad():
        distances = torch.pdist(embed(images).float())
    # few, as each has a chance to be rounded otherwise on another machine
    digits = torch.tensor([float(f"{d.mean():.4g}") for d in distances.chunk(4)])
    return run.digest(file, digits)
