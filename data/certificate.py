"""`python embed.py --verify A B --certified`: eq. (1) under the rule of attacks.py's `certify`, and
whether a patch on the candidate could have changed the answer.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import run


def certified(
    folder: Path, embed: Callable[[Tensor], Tensor], target: Tensor, candidate: Tensor
) -> str:
    """The answer for two photographs, uint8 (1, 3, H, W), with mirroring, in a line or two.

    Masks, fill and threshold are those of the rows in the folder. Raises run.UsageError without.
    """
    import attacks
    import embed as embedding

    advice = "it holds the threshold: run attacks.py --attacks clean,rule on this model first"
    held = run.read_json(folder / "rule.json", advice)
    with run.reading(folder / "rule.csv", advice), open(folder / "rule.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["role"] == "validation"]
        rows = [r for r in rows if r["mirroring"] == "1"]
        if not rows:
            raise ValueError("no validation persons, mirrored, to set the threshold")
        delta = embedding.smallest_delta(torch.tensor([float(r["distance"]) for r in rows]))
    with run.reading(folder / "rule.npz", advice), np.load(folder / "rule.npz") as arrays:
        fill = attacks.to_float(torch.from_numpy(arrays["fill"][0])) if "fill" in arrays else None
        sides: dict[str, Any] = {k: tuple(held["config"][k]) for k in ("rule_patch", "rule_mask")}
        cover = attacks.cover_named("rule", attacks.Config(**sides), *target.shape[2:])
        masked = held["config"]["rule_anchor"] == "masked"
    given = attacks.to_float(target)[0], cover, fill, masked
    rule = attacks.Covered(attacks.Mirrored(embed), *given)
    found = attacks.certify(rule, attacks.to_float(candidate))
    told = f"under the rule: {float(found.score):.3f}  threshold {delta:.3f} (5 % of "
    told += f"{len(rows)} genuine validation pairs refused)  "
    if found.score < delta:
        return told + "same person\n(the certificate is of refusals alone)"
    h, w = cover.patch
    patches = [
        (max(1, h * k // max(h, w)), max(1, w * k // max(h, w))) for k in range(1, max(h, w))
    ]
    bounds = {p: float(attacks.bound_of_smaller(rule, found.distance, p)) for p in patches}
    sure = [p for p, bound in (bounds | {(h, w): float(found.bound)}).items() if bound >= delta]
    if not sure:
        return told + "NOT the same person, but nothing is certain: a small patch might change that"
    told += "NOT the same person, and no patch of {} x {} could change that".format(*sure[-1])
    return told + ("" if sure[-1] == (h, w) else "; a larger one might")
