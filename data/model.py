"""A user's own face model, `--model FILE.py:NAME` or `package.module:NAME`, for attacks.py and
`embed.py --verify`: loaded, checked, and asked whether the photographs reach it as it wants them.

Whatever the user's code does becomes one line, `run.UsageError`. Images are float NCHW in [0, 1].
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import run

Embed = Callable[[Tensor], Tensor]


def model_name(text: str) -> str:
    """`net-embed` of folder/net.py:embed: the name of its rows and tables."""
    where, _, name = text.rpartition(":")
    return f"{Path(where).stem if where.endswith('.py') else where}-{name}"


@contextlib.contextmanager
def of_the_user(flag: str, doing: str = "") -> Iterator[None]:
    """What `accepted` refuses becomes one line, and while doing this whatever the user's code
    raises."""
    try:
        yield
    except run.UsageError:
        raise
    except (Exception, SystemExit) as error:
        told = " ".join(str(error).split())[:200]
        ours = isinstance(error, ValueError) and told.startswith("embed: ")  # of `accepted`
        if not (ours or doing):
            raise
        told = told[7:] if ours else f"{doing}: {type(error).__name__}: {told}"
        raise run.UsageError(f"{flag}: {told}") from None


def load_model(flag: str, text: str, device: torch.device) -> tuple[Embed, Path | None]:
    """What FILE.py:NAME or package.module:NAME means, and the file that says so.

    NAME takes images and gives features (a function, a Module, any callable), or takes nothing and
    returns such a thing (a function, a class). A Module comes back on the device, in evaluation
    mode. It is run, whatever it does. Raises run.UsageError.
    """

    def takes_nothing(found: Any) -> bool:
        with contextlib.suppress(TypeError, ValueError):
            return bool(inspect.signature(found).bind() is not None)
        return False

    where, _, name = text.rpartition(":")
    if not where or not name:
        raise run.UsageError(f"{flag}: give FILE.py:NAME or package.module:NAME")
    if where.endswith(".py") and not Path(where).is_file():
        raise run.UsageError(f"{flag}: no such file {where}")
    torch.manual_seed(0)  # weights that it may draw: the same when the command goes on
    with of_the_user(flag, "cannot be loaded"):
        if where.endswith(".py"):
            # last, and under another name: a file called embed.py must not hide ours
            sys.path.append(str(Path(where).resolve().parent))
            spec: Any = importlib.util.spec_from_file_location(f"of_user_{Path(where).stem}", where)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.append(str(Path.cwd()))
            module = importlib.import_module(where)
        found = getattr(module, name, None)
        if found is None:
            raise run.UsageError(f"{flag}: {where} has no {name}")
        if not isinstance(found, torch.nn.Module) and takes_nothing(found):
            found, name = found(), f"{name}()"
        if isinstance(found, type) or not callable(found):
            told = "wanted a function of images, a Module, or what returns one without arguments"
            raise run.UsageError(f"{flag}: {name} is a {type(found).__name__}, {told}")
        if isinstance(found, torch.nn.Module):
            found = found.to(device).eval()
    file = getattr(module, "__file__", None)
    return found, Path(file) if file else None


class Cosine(torch.nn.Module):
    """Normalised features: the squared distance is twice the cosine distance."""

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.embed(images), dim=1)


def check_model(flag: str, embed: Embed, images: Tensor) -> None:
    """Raises run.UsageError for what `attacks.answer` refuses, for images changed in place, and
    where no gradient reaches them."""
    import attacks

    why = f"fails on the first images, {images.device}"
    with of_the_user(flag, why), attacks.frozen(embed):
        given = images.clone()
        with torch.no_grad():
            embed(given)
        if not torch.equal(given, images):
            raise ValueError("embed: changes the images that it is given, in place")
        attacks.answer(embed, images)
        leaf = images.clone().requires_grad_()
        features = embed(leaf)
        if not features.requires_grad:
            told = "has it no_grad, detach or numpy inside?"
            raise ValueError(f"embed: no gradient reaches the images: {told}")
        # not their norm, which may be constant
        weights = torch.linspace(-1, 1, features.shape[1]).to(features)
        grad = torch.autograd.grad((features @ weights).sum(), leaf, allow_unused=True)[0]
        if grad is None or not grad.isfinite().all() or not grad.any():
            told = "does it round, or stop it with detach?"
            raise ValueError(f"embed: the gradient for the images is zero or not finite: {told}")


def check_clean(
    flag: str, embed: Embed, images: Tensor, person: Tensor, cosine: bool, chunk: int
) -> list[str]:
    """What to know before an attack, one line each: the clean AU-ROC of all pairs of these images,
    uint8, of person (N,), and what another order of the colours, range or distance would give where
    it is low."""
    import attacks
    import embed as embedding

    images = attacks.to_float(images)
    one, two = torch.triu_indices(len(person), len(person), 1, device=person.device)
    same = person[one] == person[two]

    def area(change: Callable[[Tensor], Tensor], normalise: bool) -> float:
        features = attacks.extract(lambda x: embed(change(x)), images, chunk)
        features = F.normalize(features, dim=1) if normalise else features
        d = (features[one].double() - features[two].double()).square().sum(1)
        return embedding.auroc(d[same], d[~same])

    def as_given(images: Tensor) -> Tensor:
        return images

    with of_the_user(flag, "fails on the photographs"):
        given, other = area(as_given, cosine), area(as_given, not cosine)
    told = [f"clean AU-ROC {given:.3f}, {int(same.sum())} genuine of {len(same)} pairs"]
    if other > given + 0.02:
        better = "euclidean" if cosine else "cosine"
        told.append(f"WARNING: {other:.3f} by the other distance: --distance {better}")
    if given < 0.75:
        changes: dict[str, Callable[[Tensor], Tensor]] = {"as BGR": lambda x: x.flip(1)}
        changes |= {"in [-1, 1]": lambda x: 2 * x - 1, "in 0 to 255": lambda x: 255 * x}
        found = [f"{given:.2f} as given"]
        for name, change in changes.items():
            with contextlib.suppress(Exception):
                found.append(f"{area(change, cosine):.2f} {name}")
        told.append(f"WARNING: {', '.join(found)}: frame, crop or range may be wrong")
    return told


def picture_for(path: Path, images: Tensor) -> None:
    """The images, uint8 (n, 3, H, W), side by side as a PNG: what the model gets."""
    row = images.permute(2, 0, 3, 1).flatten(1, 2)  # (H, n * W, 3)
    image = Image.fromarray(row.contiguous().numpy())
    run.write(path, functools.partial(image.save, format="PNG"))


def fingerprint(embed: Embed, file: Path | None) -> str:
    """Of the file that a model is in, and of the weights and buffers that the model leads to."""
    import attacks

    def weights(module: torch.nn.Module) -> str:
        tensors = [t for t in module.state_dict().values() if isinstance(t, Tensor)]
        return run.fingerprint(*(t.detach().reshape(-1).float() for t in tensors))

    told = "".join([run.fingerprint(file), *sorted(weights(m) for m in attacks.hidden(embed))])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def known(text: str, judged: dict, images: Tensor) -> Embed:
    """The model that attacks.py judged, from its result.json. Raises run.UsageError for another
    one, or where it fails on the images, uint8."""
    flag = f"--model {text}"
    embed, file = load_model(flag, text, images.device)
    with of_the_user(flag, "fails on the photographs"):
        embed(images.float() / 255)  # what is loaded at the first call counts too
    if fingerprint(embed, file) != judged.get("embedding"):
        told = "its file or weights are not those that --run holds figures of"
        raise run.UsageError(f"{flag}: {told}: judge it again by attacks.py --overwrite")
    return Cosine(embed) if judged.get("distance") == "cosine" else embed
