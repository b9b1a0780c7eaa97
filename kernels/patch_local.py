"""F of images that differ from earlier ones inside a box each, from that box alone: for the inner
attack (Sec. 3.1) and App. C.

A change inside a box changes only a window of each map: one pixel more on all sides after a 3x3
convolution, half of it after a max-pool. Convolutions are linear, so that of the changed map is
that of the map with a hole in the window's place, computed once, plus that of the window alone. The
window may reach over the edge: there the hole's map is -inf, zero after the ReLU. After some layers
the window is pasted into the map of the whole image, and the rest runs in full. Exact up to
rounding; 1.5 to 2 times as fast on a CPU; no Triton. `embed` is an `embed.Embedding`: its
`standardised`, `trunk` and `head`, and nothing else; any other callable runs on whole images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 4  # pixels: windows start and end on it, so that two max-pools can be followed
CONVOLUTION = r"Conv2d\(\d+, \d+, kernel_size=\(3, 3\), stride=\(1, 1\), padding=\(1, 1\)\)"
POOL = r"MaxPool2d\(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False\)"
TRUNK = re.compile(rf"({CONVOLUTION}ReLU\(inplace=True\)|{POOL})+")  # as torch prints it


def is_plain(embed: Any) -> bool:
    """Return whether embed computes what its class says, which says `plain_forward`: a subclass, a
    forward of its own, or a hook on any of its layers may compute something else."""
    if "plain_forward" not in vars(type(embed)):  # which no subclass inherits
        return False
    own = [item for layer in embed.modules() for item in vars(layer).items()]
    return not any(key == "forward" or (key.endswith("hooks") and value) for key, value in own)


def is_supported(embed: Any) -> bool:
    """Return whether embed has layers that can be followed, and is nothing but these."""
    trunk = "".join(map(repr, getattr(embed, "trunk", ())))
    return is_plain(embed) and bool(TRUNK.fullmatch(trunk))


def align(boxes: Tensor, height: int, width: int) -> Tensor:
    """Widen boxes (B, 4) to one size, alike modulo GRID; those that are alike stay as they are."""
    covers = boxes.clone()
    for k, n in enumerate((height, width)):
        start, size = boxes[:, k], boxes[:, k + 2]
        if bool((size != size[0]).any()) or bool(((start - start[0]) % GRID).any()):
            low = start // GRID * GRID
            size = (-((-start - size) // GRID) * GRID - low).amax().clamp(max=n)
            covers[:, k], covers[:, k + 2] = torch.minimum(low, n - size), size
    return covers


def rows_of(corners: Tensor, h: int, w: int, H: int, W: int) -> Tensor:
    """Number the pixels of h x w windows at corners (B, 2) among those of (B, H, W), flat
    (B h w,); B H W for those outside."""
    B, device = len(corners), corners.device
    row = (corners[:, :1] + torch.arange(h, device=device))[:, :, None]
    col = (corners[:, 1:] + torch.arange(w, device=device))[:, None]
    flat = (torch.arange(B, device=device)[:, None, None] * H + row) * W + col  # (B, h, w)
    return flat.where((row >= 0) & (row < H) & (col >= 0) & (col < W), B * H * W).flatten()


def pixels_of(x: Tensor) -> Tensor:
    """Lay out maps (B, C, H, W) as rows (B H W + 1, C), the last row zero."""
    return F.pad(x.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 1))


class PatchLocal:
    """F of `images` with other pixels inside one box each, (B, 3, h, w) -> (B, dim); the
    weights must stay.

    boxes (B, 4) = (top, left, height, width) of one size, alike modulo 2 to the power of the pools
    among `layers`.
    layers: how many convolutions (with their ReLU) and pools run on a window alone; by default as
    long as the places allow, maps are even, and a window is at most 0.8 of its map. Raises
    ValueError for other boxes.
    """

    def __init__(
        self, embed: Any, images: Tensor, boxes: Tensor, layers: int | None = None
    ) -> None:
        self.embed, self.boxes, self.layers = embed, boxes, 0
        self.units = [m for m in embed.trunk if not isinstance(m, nn.ReLU)]
        self.local: list[tuple] = []  # unit, the hole's map, padding and crop of the window
        corners, (h, w) = boxes[:, :2], boxes[0, 2:].tolist()
        if bool((boxes[:, 2:] != boxes[:1, 2:]).any()):
            raise ValueError("boxes must be of one size")
        with torch.no_grad():
            x = embed.standardised(images)
            for unit, following in zip(self.units, [*self.units[1:], None]):
                if self.layers == layers:
                    break
                if isinstance(unit, nn.MaxPool2d):
                    corners, h, w, x = corners // 2, h // 2, w // 2, unit(x)
                    self.local.append((unit, None, (0, 0), (slice(None), slice(None))))
                    self.layers += 1
                    continue
                pooled = isinstance(following, nn.MaxPool2d)
                rows, cols = (
                    self.grow(start, size, pooled)
                    for start, size in zip(corners[0].tolist(), (h, w))
                )
                (up, height), (back, width), (H, W) = rows[:2], cols[:2], x.shape[2:]
                if layers is None and height * width > 0.8 * H * W:
                    break
                outer = corners - torch.tensor([up, back], device=corners.device)
                # of an odd map the pool drops the last row, which a window may hold
                if pooled and (H % 2 or W % 2 or bool((outer % 2).any())):
                    if layers is None:
                        break
                    alike = 2 * images.shape[2] // H
                    raise ValueError(f"boxes must be alike modulo {alike}, and pooled maps even")
                hole = rows_of(outer - 1, height + 2, width + 2, H, W)
                slab = pixels_of(x)[hole].view(len(x), height + 2, width + 2, -1)
                slab[:, up + 1 : up + 1 + h, back + 1 : back + 1 + w] = 0
                kept = F.conv2d(slab.permute(0, 3, 1, 2), unit.weight, unit.bias)
                outside = rows_of(outer, height, width, H, W) == len(x) * H * W
                kept.masked_fill_(outside.view(-1, 1, height, width), -math.inf)
                self.local.append((unit, kept, (rows[2], cols[2]), (rows[3], cols[3])))
                corners, h, w, x = outer, height, width, unit(x).relu_()
                self.layers += 1
            self.shape, self.at = x.shape, rows_of(corners, h, w, *x.shape[2:])
            self.map = pixels_of(x)

    @staticmethod
    def grow(start: int, size: int, pooled: bool) -> tuple[int, int, int, slice]:
        """Follow one direction of a window through a convolution: return where the old one begins
        in it, its size, padding and crop."""
        low, high = start - 1, start + size + 1
        if pooled:  # whole cells of the max-pool that follows
            low, high = low // 2 * 2, -(-high // 2) * 2
        p = max(start - low, high - start - size) + 1
        first = p - 1 - (start - low)
        return start - low, high - low, p, slice(first, first + high - low)

    def __call__(self, patch: Tensor) -> Tensor:
        x = self.embed.standardised(patch)
        for unit, kept, padding, (rows, cols) in self.local:
            if kept is None:
                x = unit(x)
            else:
                x = F.conv2d(x, unit.weight, None, 1, padding)[:, :, rows, cols]
                x = (x + kept).relu_()
        B, C, H, W = self.shape
        window = x.permute(0, 2, 3, 1).reshape(-1, C).to(self.map.dtype)
        x = self.map.index_copy(0, self.at, window)[:-1].view(B, H, W, C).permute(0, 3, 1, 2)
        for unit in self.units[self.layers :]:
            x = unit(x) if isinstance(unit, nn.MaxPool2d) else unit(x).relu_()
        return self.embed.head(x)


def box_windows(
    boxes: Tensor, height: int, width: int, groups: int = 2
) -> Iterator[tuple[Tensor, Tensor]]:
    """Group boxes (B, 4) alike in shape, tall or wide: yield the rows of each group, and for each
    row a window (n, 4) around its box.

    The windows of a group have one size and lie on the grid. Groups alike in area have larger
    windows: an inner attack takes 1.1 times as long. Boxes that are all the same are their own
    windows.
    """
    if bool((boxes == boxes[:1]).all()) and bool((boxes[:, 2:] > 0).all()):
        yield torch.arange(len(boxes), device=boxes.device), boxes
        return
    corner = boxes[:, :2] // GRID * GRID
    size = (-((corner - boxes[:, :2] - boxes[:, 2:]) // GRID) * GRID).clamp(min=GRID)  # (B, 2)
    alike = (size[:, 0] - size[:, 1]).argsort(stable=True)
    for rows in alike.chunk(min(groups, len(size.unique(dim=0)))):
        largest = size[rows].amax(0)
        last = torch.tensor([height, width], device=boxes.device) - largest
        corners = torch.minimum(corner[rows], last)
        yield rows, torch.cat([corners, largest.expand(len(rows), 2)], 1)


def local_views_ref(
    embed: Any, images: Tensor, boxes: Tensor
) -> Iterator[tuple[Any, Any, Tensor, Callable[[Tensor], Tensor]]]:
    """Plain form of `local_views`: one group, the images themselves."""
    yield slice(None), slice(None), boxes, embed


def local_views(
    embed: Any, images: Tensor, boxes: Tensor
) -> Iterator[tuple[Any, Any, Tensor, Callable[[Tensor], Tensor]]]:
    """Split images (B, 3, H, W) into groups of crops around boxes (B, 4), each with F of a crop.

    Yields (rows, place, inside, view): the group's rows of the batch, its crops images[place]
    (n, 3, h, w), the boxes in the crops' coordinates, and view(crops) = F of the images with these
    crops, (n, D). On a GPU, where launches and not arithmetic decide, and for another embed: one
    group, the images themselves.
    """
    H, W = images.shape[2:]
    if images.is_cuda or not is_supported(embed) or not len(images) or H % GRID or W % GRID:
        yield from local_views_ref(embed, images, boxes)
        return
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    for rows, windows in box_windows(boxes, H, W):
        view = PatchLocal(embed, images[rows], windows)
        if not view.layers:
            yield rows, rows, boxes[rows], embed
            continue
        corner, (h, w) = windows[:, :2], windows[0, 2:].tolist()
        row = (corner[:, :1] + torch.arange(h, device=images.device))[:, None, :, None]
        col = (corner[:, 1:] + torch.arange(w, device=images.device))[:, None, None]
        place = rows[:, None, None, None], channel, row, col  # (n, 3, h, w)
        yield rows, place, torch.cat([boxes[rows, :2] - corner, boxes[rows, 2:]], 1), view


def local_features(embed: Any, images: Tensor, pixels: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Make the function values (N, C, P) -> features (N, V, D) of `images` (N, C, H, W) with these
    pixels (N, P) replaced. embed: F, or embed.py's `Mirrored` of it, two views. None where F has no
    layers to follow, or the pixels lie too far apart to gain anything.
    """
    N, C, H, W = images.shape
    mirroring = hasattr(embed, "embed") and is_plain(embed)
    embed = embed.embed if mirroring else embed
    if not is_supported(embed) or not pixels.shape[1]:
        return None
    row, col = pixels // W, pixels % W  # (N, P)
    if mirroring:
        images, row = torch.cat([images, images.flip(-1)]), torch.cat([row, row])
        col = torch.cat([col, W - 1 - col])
    top, left = row.amin(1), col.amin(1)
    boxes = torch.stack([top, left, row.amax(1) - top + 1, col.amax(1) - left + 1], 1)
    local = PatchLocal(embed, images, align(boxes, H, W))
    if not local.layers:
        return None
    (top, left), (h, w) = local.boxes[:, :2].T, local.boxes[0, 2:].tolist()
    k = torch.arange(h * w, device=images.device)
    inside = (k // w + top[:, None]) * W + k % w + left[:, None]  # (V * N, h * w)
    crop = images.flatten(2).gather(2, inside[:, None].expand(-1, C, -1))  # (V * N, C, h * w)
    index = ((row - top[:, None]) * w + col - left[:, None])[:, None].expand(-1, C, -1)
    V = len(crop) // N

    def features_of(values: Tensor) -> Tensor:
        patch = crop.scatter(2, index, values.repeat(V, 1, 1)).unflatten(2, (h, w))
        return local(patch).unflatten(0, (V, N)).transpose(0, 1)  # (N, V, D)

    return features_of
