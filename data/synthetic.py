"""Lit 3-D heads: the embedded data set, rendered from factors.

    images = render(sample_identity(10, seed=0), sample_content(10, seed=1))  # (10, 3, 64, 64)

A head is a ray-cast surface: a quadric skull joined to a jaw profile, displaced by brow ridge,
sockets, lids, nose, cheeks, lips, chin and hair. Skin, eyes, brows, lips and hair are painted in
coordinates of the face, lit by a coloured key light with a cast shadow, by a sky and bounce fill,
with occlusion in hollows, red scatter at the terminator and a sheen on skin. What has sharp edges
is sampled twice as densely as pixels and averaged in linear light. Identity and content are
separate inputs, so "the person of x with the content of t" is `render(identity_of_x,
content_of_t)`: a true image to compare a generator's with.

Every factor is a number in [-1, 1]. Lengths below are in units of 10 pixels of the 64 x 64 frame,
x right, y down, z to the camera, from the midpoint of the eyes, which stands at row 33.4, column
31.75 as in aligned CelebA. Proportions below the eyes are those of photographs in that frame:
mouth near row 53, chin near row 63.
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

IDENTITY_FACTORS: dict[str, str] = {
    "skin_tone": "albedo of the skin, -1 very fair to 1 very dark",
    "hair_darkness": "natural hair colour, -1 light blond to 1 black (dark skin keeps it dark)",
    "face_width": "half width of the head at the eyes, 1.75 to 2.15 units",
    "face_length": "distance from eyes to chin, 2.65 to 3.19 units",
    "jaw_width": "width of the jaw at its angle against the face's, 0.76 to 0.98",
    "chin_shape": "-1 pointed chin to 1 square chin",
    "chin_projection": "how far the chin stands out",
    "cheekbones": "prominence of the cheekbones",
    "cheek_fullness": "hollow to round cheeks",
    "brow_ridge": "prominence of the ridge above the eyes",
    "hairline": "height of the hairline, low to high forehead",
    "hair_recession": "above 0 the hair recedes at the temples",
    "hair_redness": "above 0.3 the hair turns auburn, then red",
    "hair_grey": "above 0.5 hair, brows and beard turn grey, then white",
    "skin_undertone": "-1 pink to 1 olive",
    "rosiness": "redness of cheeks, nose and ears",
    "freckles": "above 0.4 soft freckles over nose and cheeks",
    "age_lines": "above 0 folds beside the mouth, bags under the eyes, lines on the forehead",
    "eye_size": "size of the eye opening, 0.79 to 1.21",
    "eye_spacing": "half distance between the eyes, 0.89 to 1.0 units",
    "eye_tilt": "outer corners down (-1) or up (1)",
    "eye_depth": "depth of the eye sockets",
    "eye_fold": "hooded (-1) to wide crease (1) above the eye",
    "iris_color": "iris from dark brown through hazel and green to pale blue",
    "lashes": "strength of the lash line",
    "brow_thickness": "thickness of the eyebrows",
    "brow_height": "distance of the eyebrows from the eyes",
    "brow_arch": "straight to arched eyebrows",
    "brow_tilt": "inner ends high (-1) or low (1)",
    "brow_darkness": "faint to dark eyebrows",
    "brow_gap": "distance between the eyebrows",
    "nose_length": "height of the nose's base below the eyes, 1.1 to 1.42 units",
    "nose_width": "width of the nose's wings",
    "nose_bridge": "flat to high bridge",
    "nose_tip": "fine to bulbous tip",
    "mouth_height": "distance between nose and mouth",
    "mouth_width": "half width of the mouth at rest, 0.67 to 1.0 units",
    "upper_lip": "fullness of the upper lip",
    "lower_lip": "fullness of the lower lip",
    "lip_color": "pale (-1) to deep red (1) lips",
    "beard": "above 0.1 stubble, then a full beard",
    "moustache": "above 0.1 a moustache of growing strength",
    "ears": "size of the ears and how far they stand out",
    "neck_width": "slim to broad neck",
}

CONTENT_FACTORS: dict[str, str] = {
    "yaw": "head turned left or right, -25 to 25 degrees",
    "pitch": "head tipped down or up, -12 to 12 degrees",
    "roll": "head tilted in the image, -6 to 6 degrees (alignment leaves little)",
    "shift_x": "error of alignment across, -0.8 to 0.8 pixels",
    "shift_y": "error of alignment down, -0.8 to 0.8 pixels",
    "zoom": "error of alignment in scale, -4 to 4 percent",
    "smile": "corners of the mouth a little down (-1) to a broad smile (1)",
    "mouth_open": "above -0.2 the lips part, the teeth show and the jaw drops",
    "brow_raise": "eyebrows lowered or raised",
    "frown": "above 0.3 the inner brows are pulled down and together",
    "eye_open": "lids nearly closed (-1), normal (0.3), wide open (1)",
    "gaze_x": "eyes look left or right",
    "gaze_y": "eyes look up or down",
    "light_x": "key light from the left or right",
    "light_y": "key light from below the eyes (-1) to high above (1)",
    "light_contrast": "flat fill to hard key light",
    "light_warmth": "key light bluish to orange",
    "fill_hue": "hue of the fill light",
    "exposure": "dark to bright exposure, 1.4 stops",
    "contrast": "contrast of the tone curve",
    "white_balance": "camera's white balance, cold to warm",
    "saturation": "muted to vivid colours",
    "focus": "below 0 the image is softer",
    "hair_length": "cropped, ear length, chin length, beyond the shoulders",
    "hair_volume": "flat to big hair",
    "hair_fringe": "above 0 a fringe comes down the forehead",
    "hair_part": "side on which the hair is parted and how strongly it sweeps",
    "hair_wave": "straight to wavy outline and locks",
    "hair_tint": "fresh or sun-bleached hair, a small change of its lightness",
    "hair_shine": "dull to glossy hair",
    "clothes_brightness": "black to white clothes",
    "clothes_hue": "hue of the clothes",
    "clothes_saturation": "grey to colourful clothes",
    "clothes_height": "low to high shoulders and collar",
    "background_brightness": "dark to bright background",
    "background_hue": "hue of the background",
    "background_saturation": "grey to colourful background",
    "gradient_x": "brightness of the background across",
    "gradient_y": "brightness of the background down",
    "blob_a_x": "place across of an out-of-focus light or object",
    "blob_a_y": "its place down",
    "blob_a_size": "its size",
    "blob_a_brightness": "darker or brighter than the background",
    "blob_a_hue": "its hue",
    "blob_b_x": "place across of a second one",
    "blob_b_y": "its place down",
    "blob_b_size": "its size",
    "blob_b_brightness": "darker or brighter than the background",
    "blob_b_hue": "its hue",
    "edge_place": "place of a soft edge (wall, door, horizon) in the background",
    "edge_tilt": "its direction, upright to level",
    "edge_contrast": "its contrast",
}

# Exponents p of sign(u) |u|^p, u uniform in [-1, 1]: 1 is uniform, larger gathers around 0.
_CONTENT_SHAPE = {
    "yaw": 1.3,
    "pitch": 1.4,
    "roll": 1.4,
    "shift_x": 1.5,
    "shift_y": 1.5,
    "zoom": 1.5,
    "exposure": 1.6,
    "contrast": 1.5,
    "white_balance": 1.6,
    "saturation": 1.5,
    "light_warmth": 1.5,
    "gaze_x": 1.6,
    "gaze_y": 1.8,
}
# The factors seen first are spread evenly over persons: frac(offset + k * step), a Kronecker
# sequence.
_SPREAD = ("skin_tone", "hair_darkness", "face_width", "jaw_width", "nose_width")
_CHUNK = 16  # images rendered at once: their sample maps stay in cache
_EYES = (33.4, 31.75)  # row, column of the midpoint of the eyes in a frame of 64


# Colours in sRGB: skin from fair to dark, hair from blond to black, irises from brown to blue.
_SKIN = [
    [0.93, 0.80, 0.74],
    [0.87, 0.71, 0.62],
    [0.78, 0.60, 0.50],
    [0.63, 0.46, 0.37],
    [0.48, 0.34, 0.27],
    [0.35, 0.25, 0.205],
]
_HAIR = [
    [0.90, 0.77, 0.53],
    [0.74, 0.56, 0.33],
    [0.50, 0.34, 0.20],
    [0.31, 0.20, 0.13],
    [0.17, 0.12, 0.10],
    [0.09, 0.08, 0.08],
]
_IRIS = [
    [0.16, 0.09, 0.06],
    [0.30, 0.18, 0.09],
    [0.45, 0.34, 0.16],
    [0.38, 0.47, 0.28],
    [0.36, 0.49, 0.58],
    [0.46, 0.59, 0.70],
]


def _identity_row(seed: int, k: int) -> np.ndarray:
    factors = 2 * np.random.default_rng([seed, k, 0]).random(len(IDENTITY_FACTORS)) - 1
    ratio = 2.0
    for _ in range(40):  # root of r^(d+1) = r + 1, whose powers spread d dimensions evenly
        ratio = (1 + ratio) ** (1 / (len(_SPREAD) + 1))
    offset = np.random.default_rng([seed, 1]).random(len(_SPREAD))
    names = list(IDENTITY_FACTORS)
    for j, name in enumerate(_SPREAD):
        factors[names.index(name)] = 2 * ((offset[j] + (k + 1) * ratio ** -(j + 1)) % 1) - 1
    return factors


def _content_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    u = 2 * rng.random((n, len(CONTENT_FACTORS))) - 1
    shape = np.array([_CONTENT_SHAPE.get(name, 1.0) for name in CONTENT_FACTORS])
    return np.sign(u) * np.abs(u) ** shape


def sample_identity(n: int, seed: int) -> torch.Tensor:
    """n persons -> float32 (n, len(IDENTITY_FACTORS)) in [-1, 1]. Row k depends on (seed, k)."""
    rows = [_identity_row(seed, k) for k in range(n)]
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(n, len(IDENTITY_FACTORS)))


def sample_content(n: int, seed: int) -> torch.Tensor:
    """n contents -> float32 (n, len(CONTENT_FACTORS)) in [-1, 1]. Row i depends on (seed, i)."""
    return torch.from_numpy(_content_rows(np.random.default_rng([seed, 2]), n).astype(np.float32))


def _sigmoid(x: torch.Tensor, width: float | torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x * (1 / width))


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp for x <= 0; the floor keeps clear of denormal numbers, which are many times slower."""
    return x.clamp(min=-20).exp_()


def _bump(x: torch.Tensor, y: torch.Tensor, cx, cy, sx, sy) -> torch.Tensor:
    """Gaussian of unit height, x and y (B, H, W), the others numbers or (B, 1, 1)."""
    return _exp(-((x - cx) * (1 / sx)).square_() - ((y - cy) * (1 / sy)).square_())


def _ramp(x: torch.Tensor) -> torch.Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _palette(x: torch.Tensor, stops: list[list[float]]) -> torch.Tensor:
    """x (B, 1, 1) in [0, 1] -> (B, 3, 1, 1), sRGB stops interpolated and made linear."""
    stops_ = torch.tensor(stops, device=x.device).pow(2.2)
    at = x.reshape(-1).clamp(0, 1) * (len(stops) - 1)
    low = at.floor().clamp(max=len(stops) - 2)
    part = (at - low)[:, None]
    return torch.lerp(stops_[low.long()], stops_[low.long() + 1], part)[:, :, None, None]


def _tint(hue: torch.Tensor, saturation: torch.Tensor | float) -> torch.Tensor:
    """Colour of mean about 1, hue in [-1, 1] once round the circle -> (B, 3, 1, 1)."""
    phase = torch.tensor([0.0, 1 / 3, 2 / 3], device=hue.device)[None, :, None, None]
    if isinstance(saturation, torch.Tensor):
        saturation = saturation[:, None]
    return 1 + saturation * torch.cos(2 * math.pi * (0.5 * hue[:, None] - phase))


def _over(base: torch.Tensor, colour: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Paint colour over base (B, 3, H, W) with mask (B, H, W), in place."""
    return base.add_((colour - base).mul_(mask[:, None]))


class _Head:
    """Shape of B heads: measures from the factors, each (B, 1, 1), and the surface's relief."""

    def __init__(self, p: dict[str, torch.Tensor], c: dict[str, torch.Tensor]):
        self.p, self.c = p, c
        self.smile = 0.42 + 0.58 * c["smile"]
        self.open = ((c["mouth_open"] + 0.2) / 1.2).clamp(min=0)
        self.width = 1.95 + 0.20 * p["face_width"]
        self.depth = 2.25 + 0 * p["face_width"]
        self.chin = 2.92 + 0.27 * p["face_length"] + 0.22 * self.open
        self.jaw = 0.87 + 0.11 * p["jaw_width"] + 0.03 * p["cheek_fullness"]
        self.chin_power = 3.4 * torch.exp2(0.55 * p["chin_shape"])
        self.eye_x = 0.945 + 0.055 * p["eye_spacing"]
        self.eye_w = 0.43 * (1 + 0.21 * p["eye_size"])
        self.nose = 1.26 + 0.16 * p["nose_length"]
        self.nose_w = 0.40 + 0.14 * p["nose_width"]
        self.mouth = self.nose + 0.68 + 0.11 * p["mouth_height"] - 0.03 * self.smile
        self.mouth_w = 0.78 + 0.17 * p["mouth_width"] + 0.14 * self.smile - 0.08 * self.open
        self.lift = 0.25 * self.smile  # corners of the mouth above its centre
        self.gap = 0.30 * self.open
        self.upper = (0.19 + 0.11 * p["upper_lip"]) * (1 - 0.22 * self.smile.clamp(min=0))
        self.lower = (0.27 + 0.14 * p["lower_lip"]) * (1 - 0.18 * self.smile.clamp(min=0))
        self.brow = -(0.56 + 0.14 * p["brow_height"] + 0.11 * c["brow_raise"])
        self.frown = ((c["frown"] - 0.3) / 0.7).clamp(min=0)
        # Hair: its lower edge is y = -top + fringe + rise (x / span)^4, cut at `length`.
        self.length = c["hair_length"]
        self.long = _ramp((self.length + 0.1) / 0.5)
        self.top = 2.0 + 0.30 * p["hairline"]
        self.fringe = (1.25 * c["hair_fringe"]).clamp(min=0)
        self.hair_d = 0.10 + 0.16 * (1 + c["hair_volume"]) * (0.55 + 0.45 * self.long)
        self.cut = 0.35 + 0.25 * self.length + 1.3 * self.long

    def profile(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Half width and half depth at height y (the quadric in `hit` closes the skull above)."""
        s = (y.clamp(min=0) / self.chin).clamp(max=0.9995)
        power = torch.pow(s + 1e-4, self.chin_power)
        taper = 1 - (1 - self.jaw) * _ramp(s * 1.35)
        width = self.width * taper * torch.pow(1 - power, 0.45)
        depth = self.depth * (1 - 0.05 * s) * torch.pow(1 - s.square().square().square(), 0.4)
        return width, depth

    def hair(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """How far a point of the head lies inside the hair, units."""
        p, c = self.p, self.c
        side = x.abs() + (-z).clamp(min=0) + 0.25 * self.long * (y - 0.4).clamp(min=0)
        span = 1.70 - 0.26 * self.long + 0.05 * p["hairline"]
        q4 = (side / span).square_().square_()
        edge = -self.top + self.fringe * _exp(-(x - 0.5 * c["hair_part"]).square() / 1.2)
        edge = edge + 0.22 * c["hair_part"] * x * (1 - 0.5 * (side / span).clamp(max=1.5))
        ripple = torch.sin(4.5 * x + 3 * c["hair_part"])
        edge = edge + 0.06 * (0.4 + c["hair_wave"].clamp(min=-0.4)) * ripple
        bare = 1 - 0.7 * c["hair_fringe"].clamp(min=0)
        recede = (0.50 * p["hair_recession"]).clamp(min=0) * bare
        edge = edge - recede * _exp(-((side - 1.05) / 0.6).square())
        edge = edge + 1.45 * q4
        edge = torch.minimum(edge, self.cut + 1.1 * (side - 1.9))
        return edge - y

    def relief(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Displacement of the skin along the depth axis, units."""
        p = self.p
        a = (x * x + 0.003).sqrt()
        d = _bump(a, y, 1.0, 0.62, 0.52, 0.42) * (0.11 + 0.08 * p["cheekbones"] + 0.07 * self.smile)
        d += _bump(a, y, 1.15, 1.55, 0.55, 0.6) * (0.02 + 0.10 * p["cheek_fullness"])
        brow = 0.11 + 0.08 * p["brow_ridge"] + 0.03 * p["eye_depth"]
        d += _bump(a, y, 0.75, -0.62, 0.75, 0.24) * brow
        d -= _bump(a, y, self.eye_x - 0.12, -0.12, 0.46, 0.36) * (0.27 + 0.09 * p["eye_depth"])
        d += _bump(a, y, self.eye_x, 0.0, 0.40, 0.22) * 0.16
        # Nose: a ridge that grows to the tip, the tip, the wings.
        along = ((y + 0.45) / (self.nose - 0.12 + 0.45)).clamp(0, 1)
        end = _sigmoid(self.nose + 0.0 - y, 0.085)
        out = 0.42 + 0.06 * p["nose_bridge"]
        ridge = (0.16 + 0.12 * p["nose_bridge"]) * _ramp((y + 0.9) / 0.9) + out * along * along
        slim = 0.24 + 0.05 * p["nose_width"] + 0.12 * along
        d += ridge * _exp(-(x / slim).square_()) * end
        tip, wing = 0.20 + 0.12 * p["nose_tip"], 0.22 + 0.05 * p["nose_width"]
        d += _bump(x, y, 0.0, self.nose - 0.22, 0.22 + 0.07 * p["nose_tip"], 0.24) * tip
        d += _bump(a, y, self.nose_w - 0.05, self.nose - 0.14, 0.17, 0.17) * wing
        # Mouth: the mound of the teeth, two lips, the hollow under the lower lip, the chin.
        v = y - (self.mouth - self.lift * (x / self.mouth_w).square())
        across = _exp(-(x / (self.mouth_w * 0.85)).square().square_())
        d += _bump(x, y, 0.0, self.mouth - 0.05, 0.85, 0.55) * 0.13
        upper = (v + 0.5 * self.upper + 0.35 * self.gap) / (0.75 * self.upper)
        lower = (v - 0.5 * self.lower - 0.65 * self.gap) / (0.70 * self.lower)
        lips = _exp(-upper.square()) * 0.09
        lips += _exp(-lower.square()) * (0.12 + 0.04 * p["lower_lip"])
        d += lips * across
        d -= _exp(-((v - self.lower - 0.65 * self.gap - 0.16) / 0.14).square()) * across * 0.06
        chin = 0.17 + 0.10 * p["chin_projection"]
        d += _bump(x, y, 0.0, self.chin - 0.36, 0.50 + 0.1 * p["chin_shape"], 0.30) * chin
        # Folds from the wings of the nose to the corners of the mouth.
        fold = 0.012 + 0.035 * p["age_lines"].clamp(min=0) + 0.045 * self.smile.clamp(min=0)
        t = (y - self.nose + 0.12) / (self.mouth - self.nose + 0.15)
        line = a - (self.nose_w + 0.13 + (self.mouth_w + 0.08 - self.nose_w) * t * 0.9)
        d -= fold * _exp(-(line / 0.10).square_() - ((t - 0.5) / 0.55).square().square_())
        return d

    def hit(self, origin: tuple, ray: tuple, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One step of the fixed point: from depth t to where the ray meets the surface as at t."""
        x, y, z = (o + t * r for o, r in zip(origin, ray, strict=True))
        width, depth = self.profile(y)
        hair = _ramp(0.15 + self.hair(x, y, z) * 1.3)
        front = _ramp(z / 1.2 + 0.2)
        grow = 1 + (self.relief(x, y) * front * (1 - hair) + self.hair_d * hair) / depth
        ia, ib = 1 / width.clamp(min=0.05).square(), 1 / depth.clamp(min=0.05).square()
        crown = -0.85  # the skull is widest here and closes above it
        iy = torch.where(y < crown, 1 / 2.9**2, 0.0)
        oy = origin[1] - crown
        a = ray[0] ** 2 * ia + ray[2] ** 2 * ib + ray[1] ** 2 * iy
        b = origin[0] * ray[0] * ia + origin[2] * ray[2] * ib + oy * ray[1] * iy
        o2 = origin[0] ** 2 * ia + origin[2] ** 2 * ib + oy * oy * iy
        nearest = (o2 - b * b / a).clamp(min=0)
        t = ((grow.square() - nearest).clamp(min=1e-6) / a).sqrt() - b / a
        inside = (grow - nearest.sqrt()) * width - 4 * (y - self.chin + 0.01).clamp(min=0)
        return t, inside


def _grid(n: int, size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates (1, 1, n) and (1, n, 1), units, of n samples across a frame of `size` pixels."""
    at = (torch.arange(n, device=device, dtype=torch.float32) + 0.5) * (64 / n) - 0.5
    return ((at - _EYES[1]) / 10)[None, None, :], ((at - _EYES[0]) / 10)[None, :, None]


def _render_chunk(identity: torch.Tensor, content: torch.Tensor, size: int) -> torch.Tensor:
    p = {name: identity[:, j, None, None] for j, name in enumerate(IDENTITY_FACTORS)}
    c = {name: content[:, j, None, None] for j, name in enumerate(CONTENT_FACTORS)}
    B, S, device = len(identity), 2 * size, identity.device
    head = _Head(p, c)

    def rgb(*levels: float) -> torch.Tensor:
        return torch.tensor(levels, device=device)[None, :, None, None]

    # Camera: rays origin + t * ray in the head's coordinates; the eyes' midpoint keeps its place.
    yaw, pitch, roll = (
        c[name] * math.radians(limit) for name, limit in (("yaw", 25), ("pitch", 12), ("roll", 6))
    )
    cy, sy, cp, sp, cr, sr = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin(), roll.cos(), roll.sin()
    # Columns of the rotation's transpose: where the camera's axes point in the head.
    rows = [
        [cy * cr + sy * sp * sr, -cy * sr + sy * sp * cr, sy * cp],
        [cp * sr, cp * cr, -sp],
        [-sy * cr + cy * sp * sr, sy * sr + cy * sp * cr, cy * cp],
    ]
    scale = (1 + 0.04 * c["zoom"]) / cy.sqrt()
    pivot = 1.85

    def rays(n: int) -> tuple[tuple, tuple]:
        u, v = _grid(n, size, device)
        u, v = (u - 0.08 * c["shift_x"]) / scale, (v - 0.08 * c["shift_y"]) / scale
        origin = [r[0] * u + r[1] * v for r in rows]
        origin[2] = origin[2] + pivot
        return tuple(origin), tuple(r[2] for r in rows)

    # Surface: a fixed point at every pixel; sharp paint has twice as many samples a side.
    origin, ray = rays(size)
    t = torch.zeros(B, size, size, device=device)
    for damping in (1.0, 0.8, 0.7, 0.6):
        deeper, inside = head.hit(origin, ray, t)
        t = torch.lerp(t, deeper, damping)
    x, y, z = (o + t * r for o, r in zip(origin, ray, strict=True))
    hair = _sigmoid(head.hair(x, y, z), 0.085)
    depth_low = torch.where(inside > 0, t, torch.full_like(t, -2.2))

    # Normals from the depth map, so every turn of the head and every bump is in them.
    step = 10 * scale * size / 64 / 2
    brim = (4 * hair * (1 - hair))[:, None]
    tp = torch.lerp(t[:, None], F.avg_pool2d(t[:, None], 5, 1, 2, count_include_pad=False), brim)
    tp = F.pad(tp, (1, 1, 1, 1), mode="replicate")[:, 0]
    nx = -(tp[:, 1:-1, 2:] - tp[:, 1:-1, :-2]) * step
    ny = -(tp[:, 2:, 1:-1] - tp[:, :-2, 1:-1]) * step
    nz = torch.rsqrt(1 + nx * nx + ny * ny)
    nx, ny = nx * nz, ny * nz

    # Light: a key with a cast shadow marched over the depth map, fill from sky and bounce,
    # occlusion in hollows.
    lx, ly = 0.85 * c["light_x"], -(0.30 + 0.42 * c["light_y"])
    lz = (1.15 - lx * lx - ly * ly).clamp(min=0.12).sqrt()
    norm = torch.rsqrt(lx * lx + ly * ly + lz * lz)
    lx, ly, lz = lx * norm, ly * norm, lz * norm
    base = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=device)
    shade = torch.zeros_like(depth_low)
    for reach in (0.18, 0.4, 0.75, 1.3):
        across = base[None, None, :] + lx * reach * scale / 3.2
        down = base[None, :, None] + ly * reach * scale / 3.2
        grid = torch.stack(torch.broadcast_tensors(across, down), dim=3).expand(B, size, size, 2)
        other = F.grid_sample(depth_low[:, None], grid, padding_mode="border", align_corners=False)
        above = other[:, 0] - depth_low - reach * lz - 0.03
        shade = torch.maximum(shade, _ramp(above / (0.10 + 0.25 * reach)))
    blur = F.avg_pool2d(depth_low[:, None].clamp(min=-0.5), 9, 1, 4, count_include_pad=False)[:, 0]
    hollow = (blur - depth_low.clamp(min=-0.5)).clamp(min=0)
    maps = torch.stack([1 - shade, _exp(-2.6 * hollow.clamp(max=0.5))], dim=1)
    maps = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
    lit, open_sky = maps[:, 0], maps[:, 1]
    warm = c["light_warmth"][:, None] * rgb(0.10, 0.0, -0.15)
    hard = 0.5 + 0.5 * c["light_contrast"]
    key = (1 + warm) * (0.62 + 0.75 * hard)[:, None]
    fill = _tint(c["fill_hue"], 0.10) * (0.62 - 0.36 * hard)[:, None]
    facing = nx * lx + ny * ly + nz * lz
    sky = (0.78 - 0.30 * ny) * open_sky

    # Albedo of the skin.
    a = (x * x + 0.0005).sqrt()
    tone = (0.5 + 0.5 * p["skin_tone"]) ** 1.3
    skin = _palette(tone, _SKIN)
    under = p["skin_undertone"][:, None] * rgb(-0.05, 0.04, -0.10)
    skin = skin * (1 + under)
    light_d = 0.5 + 0.5 * (p["hair_darkness"] + 0.05 * c["hair_tint"] * 2)
    dark = light_d + (1 - light_d) * 0.9 * _ramp(tone * 2.2 - 0.7)
    hair_rgb = _palette(dark, _HAIR)
    red = ((p["hair_redness"] - 0.3) / 0.7).clamp(min=0) * (1 - _ramp(tone * 1.6 - 0.4))
    auburn = rgb(0.30, 0.085, 0.030) * (1.35 - dark)[:, None]
    hair_rgb = torch.lerp(hair_rgb, auburn, 0.9 * red[:, None])
    grey = ((p["hair_grey"] - 0.5) / 0.4).clamp(0, 1) * 0.9
    ashen = rgb(0.50, 0.49, 0.48) * (1 - 0.3 * dark)[:, None]
    hair_rgb = torch.lerp(hair_rgb, ashen, grey[:, None])
    blush = _bump(a, y, 1.05, 0.85, 0.55, 0.45) + 0.8 * _bump(x, y, 0.0, head.nose - 0.2, 0.35, 0.3)
    blush = blush * (0.14 + 0.14 * p["rosiness"])
    albedo = skin * (1 - blush[:, None] * rgb(0.10, 0.80, 0.70))
    spots = torch.sin(9.1 * x + 2.0 * torch.sin(5.3 * y))
    spots = spots * torch.sin(8.3 * y + 2.0 * torch.sin(6.1 * x))
    spots = _ramp(spots * 1.6 - 0.35) * _bump(a, y, 0.6, 0.6, 0.85, 0.55)
    spots = spots * ((p["freckles"] - 0.4) / 0.6).clamp(min=0)
    age = p["age_lines"].clamp(min=0)
    ex, ey = (a - head.eye_x) / head.eye_w, y + (0.19 * p["eye_tilt"] + 0.02) * (a - head.eye_x)
    dim = 1 - 0.28 * spots
    bag = ((ey - 0.36 + 0.10 * ex * ex) / 0.06).square()
    dim = dim - age * 0.30 * _exp(-bag - (ex / 0.95).square())
    wrinkle = torch.sin(14 * y + 0.6 * a * a) * _bump(x, y, 0.0, -1.25, 1.0, 0.42)
    lined = 0.17 * (age + 0.5 * c["brow_raise"].clamp(min=0))
    dim = dim * (1 + lined * (wrinkle - 0.25 * wrinkle.abs()))
    dim = dim - 0.10 * _bump(ex, ey, 0.0, 0.26, 1.0, 0.16)
    dim = dim - (0.35 * head.frown) * _bump(a, y, 0.13, -0.42, 0.06, 0.22)
    # Shadow under the nose and beside its wings.
    dim = dim * (1 - 0.10 * _bump(x, y, 0.0, head.nose + 0.12, head.nose_w, 0.15))
    dim = dim * (1 - 0.20 * _bump(a, y, head.nose_w + 0.07, head.nose - 0.10, 0.06, 0.15))
    dim = dim * (1 - 0.28 * _ramp(hair * 2))
    albedo = albedo * dim[:, None]

    # Beard and moustache.
    bare = _bump(x, y, 0.0, head.mouth + 0.06, head.mouth_w * 0.90, 0.23 + 0.5 * head.gap)
    jawline = head.nose + 0.52 - 1.05 * (a - 0.75).clamp(min=0)
    full = ((p["beard"] - 0.1) / 0.6).clamp(0, 1)
    beard = _sigmoid(y - jawline, 0.10) * (1 - bare) * full * 0.86
    tash = ((p["moustache"] - 0.1) / 0.6).clamp(0, 1) * 0.86
    tash = tash * _exp(-((y - head.nose - 0.28 - 0.16 * a * a) / 0.17).square().square())
    tash = tash * _sigmoid(head.mouth_w + 0.12 - a, 0.07)
    furry = torch.maximum(beard, tash)
    albedo = _over(albedo, torch.lerp(hair_rgb, skin, 0.10) * 0.8, furry)

    # Light on the surface, at every pixel: wrapped diffuse, most in red, sheen of skin and hair.
    shading = torch.empty(B, 4, size, size, device=device)
    for k, wrap in enumerate((0.30, 0.20, 0.16)):
        direct = ((facing + wrap) / (1 + wrap)).clamp(min=0) * (lit * (1 - 0.3 * wrap) + 0.3 * wrap)
        shading[:, k] = key[:, k] * direct + fill[:, k] * sky
    half = torch.rsqrt(lx * lx + ly * ly + (lz + 1).square())
    gloss = ((nx * lx + ny * ly + nz * (lz + 1)) * half).clamp(min=0).square()
    gloss = gloss.square().square().square() * lit
    bare_skin = 1 - torch.maximum(hair, furry)
    along = 1 - (ny + 0.45).square() * 3.2
    shine = along.clamp(min=0) * (0.035 + 0.035 * c["hair_shine"]) * hair * (0.3 + 0.7 * lit)
    shading[:, 3] = gloss * 0.06 * bare_skin + shine * (0.25 + hair_rgb.mean(1) * 1.6)

    # Twice as many samples a side for what has sharp edges.
    def finer(maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps, size=(S, S), mode="bilinear", align_corners=False)

    def window(top: int, bottom: int, left: int, right: int) -> tuple[slice, slice]:
        return slice(top * S // 64, bottom * S // 64), slice(left * S // 64, right * S // 64)

    t, inside = finer(torch.stack([t, inside], dim=1)).unbind(1)
    albedo, shading = finer(albedo), finer(shading)
    origin, ray = rays(S)
    xs, ys, zs = (o + t * r for o, r in zip(origin, ray, strict=True))
    cover = _sigmoid(inside, 0.022)
    hair = _sigmoid(head.hair(xs, ys, zs), 0.085)

    # Nostrils and mouth.
    rows_, cols = window(40, 64, 14, 50)
    x, y, paint = xs[:, rows_, cols], ys[:, rows_, cols], albedo[:, :, rows_, cols]
    a = (x * x + 0.0005).sqrt()
    paint *= (1 - 0.66 * _bump(a, y, head.nose_w * 0.47, head.nose + 0.03, 0.11, 0.06))[:, None]
    v = y - (head.mouth - head.lift * (x / head.mouth_w).square())
    arc = (1 - (x / head.mouth_w).square()).clamp(min=0)
    cupid = 1 - 0.28 * _bump(x, y, 0.0, head.mouth - 0.2, 0.16, 1.0)
    up = head.upper * arc.sqrt() * cupid + 0.35 * head.gap * arc
    low = head.lower * arc.sqrt() + 0.65 * head.gap * arc
    lips = _sigmoid(v + up, 0.035) * _sigmoid(low - v, 0.045) * _ramp(arc * 6)
    lip_rgb = skin * rgb(0.80, 0.44, 0.47)
    lip_red = rgb(0.50, 0.055, 0.075) * (0.35 + 0.65 * (1 - tone))[:, None]
    rouge = p["lip_color"]
    lip_rgb = torch.lerp(lip_rgb, lip_red, (0.10 + 0.85 * rouge.clamp(min=0) ** 1.5)[:, None])
    lip_rgb = torch.lerp(lip_rgb, skin * 0.9, (0.55 * (-rouge).clamp(min=0))[:, None])
    _over(paint, lip_rgb * (1 - 0.16 * _sigmoid(-v, 0.05))[:, None], lips)
    seam = 1 - 0.60 * _exp(-(v / 0.055).square()) * _ramp(arc * 3) * (1 - head.open).clamp(min=0.0)
    paint *= seam[:, None]
    inner = _sigmoid(v + 0.33 * head.gap * arc - 0.01, 0.03)
    inner = inner * _sigmoid(0.62 * head.gap * arc - v, 0.03)
    inner = inner * _ramp(arc * 4 - 0.3) * _ramp(head.open * 8)
    teeth = _sigmoid(0.18 * head.gap * arc + 0.02 - v, 0.04) * _ramp(arc * 2.2)
    teeth = teeth * (0.75 + 0.25 * head.smile)
    cave, ivory = rgb(0.11, 0.022, 0.02), rgb(0.72, 0.66, 0.58)
    _over(paint, cave + (ivory - cave) * teeth[:, None], inner)

    # Eyes: lids, white, iris, pupil, lashes, crease. ex runs from -1 (nose) to 1 (temple).
    rows_, cols = window(20, 43, 10, 54)
    x, y, paint = xs[:, rows_, cols], ys[:, rows_, cols], albedo[:, :, rows_, cols]
    a = (x * x + 0.0005).sqrt()
    ex, ey = (a - head.eye_x) / head.eye_w, y + (0.19 * p["eye_tilt"] + 0.02) * (a - head.eye_x)
    wide = (0.72 + 0.40 * c["eye_open"]).clamp(min=0.22)
    squint = 1 - 0.16 * head.smile.clamp(min=0)
    bow = (1 - ex * ex).clamp(min=0)
    lid_up = -(0.235 * head.eye_w / 0.43) * wide * squint * bow.pow(0.75) * (1 - 0.12 * ex)
    lid_low = 0.105 * squint * bow * (1 + 0.25 * ex)
    eye = _sigmoid(ey - lid_up, 0.022) * _sigmoid(lid_low - ey, 0.022) * _ramp(bow * 4)
    sign = _sigmoid(x, 0.05) * 2 - 1
    gx = (0.17 * c["gaze_x"] - 0.06 * c["yaw"]) * sign
    ir = ((a - head.eye_x - gx).square() + (ey + 0.045 - 0.07 * c["gaze_y"]).square()).sqrt()
    pale = (0.5 + 0.5 * p["iris_color"]) ** 1.3 * (1 - 0.75 * _ramp(tone * 2 - 0.6))
    iris_rgb = _palette(pale, _IRIS)
    iris_rgb = iris_rgb * (0.62 * (1 - 0.6 * _ramp(tone * 2 - 0.9)))[:, None]
    lid_shade = _exp(-((ey - lid_up) / 0.08).square())
    white = 1 - 0.35 * ex.abs().clamp(max=1) ** 2 - 0.45 * lid_shade
    white = rgb(0.50, 0.47, 0.455) * white[:, None]
    _over(paint, white, eye)
    iris = eye * _sigmoid(0.185 - ir, 0.016)
    rim = 1 - 0.65 * _exp(-((ir - 0.185) / 0.035).square())
    rim = rim * (1 - 0.4 * _exp(-((ey - lid_up) / 0.09).square()))
    _over(paint, iris_rgb * rim[:, None], iris)
    _over(paint, torch.full_like(iris_rgb, 0.008), iris * _sigmoid(0.075 - ir, 0.016))
    lash = _exp(-((ey - lid_up + 0.01) / (0.036 + 0.016 * p["lashes"])).square())
    lash = lash * _ramp((1.12 - ex.abs()) * 5) * (0.78 + 0.2 * p["lashes"])
    crease = ey - lid_up * 0.7 + 0.17 + 0.05 * p["eye_fold"] + 0.03 * ex * ex
    crease = _exp(-(crease / 0.045).square())
    crease = crease * _exp(-(ex / 0.95).square().square()) * (0.36 + 0.16 * p["eye_fold"])
    under_lid = 0.25 * _exp(-((ey - lid_low) / 0.03).square()) * _ramp((1.0 - ex.abs()) * 5)
    paint *= ((1 - crease) * (1 - under_lid))[:, None]
    _over(paint, torch.lerp(hair_rgb * 0.15, skin * 0.06, 0.6), lash.clamp(0, 1))

    # Brows.
    inner_x = 0.36 + 0.09 * p["brow_gap"] - 0.07 * head.frown
    s = (a - inner_x) / 1.12  # 0 at the nose, 1 at the temple
    arch = 0.02 + 0.065 * (1 + p["brow_arch"])
    line = head.brow - arch * (1 - ((s - 0.62) / 0.62).square())
    line = line + 0.13 * p["brow_tilt"] * (0.5 - s).clamp(-0.5, 0.5)
    line = line + 0.14 * head.frown * (1 - s).clamp(0, 1) ** 2 + 0.05
    thick = (0.100 + 0.052 * p["brow_thickness"]) * (1.12 - 0.62 * s.clamp(0, 1))
    brow = _exp(-((y - line) / thick).square().square()) * _sigmoid(s, 0.05) * _sigmoid(1 - s, 0.07)
    brow_rgb = torch.lerp(hair_rgb, torch.minimum(hair_rgb, skin * 0.35), 0.75) * 0.75
    brow = brow * (0.72 + 0.22 * p["brow_darkness"])
    _over(paint, brow_rgb, brow * (1 - hair[:, rows_, cols]))

    glint = ((a - head.eye_x - gx - 0.07 * lx * sign) / 0.05).square()
    high = ((ey + 0.045 - 0.07 * c["gaze_y"] - 0.1 * ly.clamp(max=0)) / 0.05).square()
    glint = _exp(-(glint + high))
    shading[:, 3, rows_, cols] += 0.5 * glint * eye

    # Hair on the head: locks as soft streaks along the growth.
    sweep = xs + xs.sign() * (-zs).clamp(min=0)
    wave, part = c["hair_wave"], c["hair_part"]
    coarse = 7.5 * sweep + 1.4 * (1 + wave) * torch.sin(1.9 * ys + 3 * part) + 2.2 * ys * part
    fine = 13 * sweep - 3 * ys + 2 * wave * torch.sin(2.6 * ys)
    lock = torch.sin(coarse) * 0.6 + 0.4 * torch.sin(fine)
    strand = 1 + 0.16 * lock
    root = 1 - 0.25 * (4 * hair * (1 - hair))
    albedo = _over(albedo, hair_rgb * (strand * root)[:, None], hair)

    image = albedo * shading[:, :3] + shading[:, 3:] * key
    cover = cover[:, None]
    image, cover = F.avg_pool2d(image * cover, S // size), F.avg_pool2d(cover, S // size)

    # Behind the head, on an upright plane through it: background, long hair, neck, clothes, ears.
    u, v = _grid(size // 2, size, device)
    origin, ray = rays(size)
    u, v = u / 3.2, v / 3.2
    back = 0.03 + 0.62 * (0.5 + 0.5 * c["background_brightness"]) ** 2
    colourful = 0.05 + 0.34 * (0.5 + 0.5 * c["background_saturation"]) ** 2
    back = _tint(c["background_hue"], colourful) * back[:, None]
    back = back * (1 + 0.55 * (c["gradient_x"] * u + c["gradient_y"] * v)).clamp(min=0.1)[:, None]
    theta = math.pi / 2 * c["edge_tilt"]
    edge = _sigmoid(u * theta.cos() + v * theta.sin() - 0.8 * c["edge_place"], 0.045)
    back = back * (1 + 0.6 * c["edge_contrast"] * (edge - 0.5))[:, None]
    for name in ("blob_a", "blob_b"):
        radius = 0.36 + 0.22 * c[name + "_size"]
        r2 = (u - 1.1 * c[name + "_x"]).square() + (v - 1.0 * c[name + "_y"] + 0.1).square()
        r2 = r2 / radius.square()
        mask = _exp(-r2 * r2) * 0.85
        glow = back.mean((1, 2, 3))[:, None, None] * torch.exp2(1.7 * c[name + "_brightness"])
        blob = (_tint(c[name + "_hue"], colourful + 0.10) * glow[:, None]).clamp(max=1.0)
        back = _over(back.contiguous(), blob, mask)
    back = F.interpolate(back, size=(size, size), mode="bilinear", align_corners=False)

    plane = (-0.2 - origin[2]) / ray[2]
    bx, by = origin[0] + plane * ray[0], origin[1] + plane * ray[1]
    ambient = key * (0.50 + 0.35 * lz)[:, None] + fill * 0.55
    ab = bx.abs()
    # Long hair falls behind the neck; a wavy outline, darker towards the neck.
    length = 1.2 + 4.2 * ((head.length - 0.15) / 0.85).clamp(min=0)
    swell = 0.10 * (1 + wave) * torch.sin(3.4 * by + 1.5 * bx.sign() + 4 * part)
    outline = head.width + 0.8 * head.hair_d + 0.12
    outline = outline + 0.22 * _ramp(by / 2.5) * (1 + c["hair_volume"]) + swell
    mane = _sigmoid(outline - ab, 0.05) * _sigmoid(length - by, 0.10)
    mane = mane * _sigmoid(by + 1.5, 0.3) * head.long
    round_x = (bx / outline).clamp(-1, 1)
    falls = torch.sin(6.5 * bx + (1 + wave) * torch.sin(1.7 * by + 2 * part))
    fall = (0.42 + 0.58 * _ramp((ab - 1.0) / 1.0)) * (1 + 0.17 * falls)
    side_lit = 0.62 + 0.55 * round_x * lx + 0.38 * lz * (1 - round_x.square()).sqrt()
    side_lit = side_lit.clamp(min=0.15)
    back = _over(back, hair_rgb * (fall * side_lit)[:, None] * (0.75 * key + fill), mane)
    # Ears.
    size_e = 1 + 0.25 * p["ears"]
    ear_x = head.width * (0.97 + 0.02 * head.jaw) + 0.07 + 0.06 * p["ears"]
    ear_r = (
        ((ab - ear_x) / (0.23 * size_e)).square()
        + ((by - 0.42) / (0.56 * size_e)).square()
        + 0.25 * (ab - ear_x) * (by - 0.42) / 0.1 * 0.2
    )
    ear = _sigmoid(1 - ear_r, 0.12) * (1 - 0.95 * head.long)
    cup = 1 - 0.40 * _exp(-(((ab - ear_x + 0.03) / 0.11).square() + ((by - 0.42) / 0.28).square()))
    ear_lit = (0.72 + 0.42 * bx.sign() * lx + 0.15 * lz).clamp(min=0.2)
    blood = rgb(1.0, 0.84, 0.82) - 0.08 * p["rosiness"].clamp(min=0)[:, None]
    # Neck and clothes.
    neck_w = 1.32 + 0.17 * p["neck_width"] + 0.10 * (by - 2.2)
    neck = _sigmoid(neck_w - ab, 0.035) * _sigmoid(by - 0.9, 0.1)
    round_n = (bx / neck_w).clamp(-1, 1)
    neck_lit = 0.25 + 0.55 * round_n * lx + 0.50 * lz * (1 - round_n.square()).sqrt()
    neck_lit = neck_lit.clamp(min=0.08)
    drop = _ramp((by - head.chin * (1 - 0.09 * bx.square()) + 0.25) / 1.2)
    back = _over(back, skin * (neck_lit * (0.42 + 0.58 * drop))[:, None] * (0.9 * key + fill), neck)
    shoulder = 2.80 - 0.40 * c["clothes_height"] + 0.33 * (ab - 1.4) + 1.1 * _ramp((1.8 - ab) / 1.1)
    cloth = 0.012 + 0.62 * (0.5 + 0.5 * c["clothes_brightness"]) ** 2
    dye = 0.05 + 0.6 * (0.5 + 0.5 * c["clothes_saturation"]) ** 1.5
    cloth = _tint(c["clothes_hue"], dye) * cloth[:, None]
    fold = 0.80 + 0.35 * (bx / 3.2) * lx + 0.12 * torch.sin(2.3 * bx + 1.1 * by)
    fold = fold * (0.55 + 0.45 * _ramp((ab - 0.9) / 0.8))
    cloth = cloth.clamp(min=0.004) * fold[:, None] * ambient
    dressed = _sigmoid(by - shoulder, 0.05) * (1 - 0.75 * mane * _ramp(ab - 0.9))
    back = _over(back, cloth, dressed)
    back = _over(back, skin * blood * (cup * ear_lit)[:, None] * (0.75 * key + fill), ear)
    image = image + back * (1 - cover)

    # Camera: focus, exposure, white balance, tone curve, gamma.
    soft = F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
    image = torch.lerp(image, soft, (0.08 - 0.40 * c["focus"].clamp(max=0))[:, None])
    balance = c["white_balance"][:, None] * rgb(0.09, 0.0, -0.13)
    image = image * (1 + balance) * (torch.exp2(0.7 * c["exposure"]))[:, None]
    grey_level = (image * rgb(0.30, 0.59, 0.11)).sum(1, keepdim=True)
    image = torch.lerp(grey_level, image, (0.92 + 0.25 * c["saturation"])[:, None]).clamp(min=0)
    image = image * (1 + image * 0.25) / (1 + image)  # shoulder of the film: highlights roll off
    image = (image * 1.45).clamp(1e-5, 1).pow(1 / 2.2)
    steep = image * image * (3 - 2 * image)
    image = torch.lerp(image, steep, (0.22 + 0.30 * c["contrast"])[:, None])
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def render(identity: torch.Tensor, content: torch.Tensor, size: int = 64) -> torch.Tensor:
    """Faces from factors in [-1, 1] -> uint8 (n, 3, size, size), on the device of `identity`.

    identity (n, len(IDENTITY_FACTORS)), content (n, len(CONTENT_FACTORS)); any size, 64 is the
    frame of the data set.
    """
    identity, content = torch.as_tensor(identity).float(), torch.as_tensor(content).float()
    out = torch.empty(len(identity), 3, size, size, dtype=torch.uint8, device=identity.device)
    for i in range(0, len(identity), _CHUNK):
        out[i : i + _CHUNK] = _render_chunk(identity[i : i + _CHUNK], content[i : i + _CHUNK], size)
    return out


def synthetic_faces(
    persons: int = 370,
    images_per_person: int = 12,
    seed: int = 0,
    progress: bool = False,
    size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rendered persons -> images, person, identity, content.

    images uint8 (N, 3, size, size), person int64 (N,), identity (persons, I), content (N, C), with
    N = persons * images_per_person, in the order of persons. Person k's factors and faces depend
    only on (seed, k).
    """
    identity = sample_identity(persons, seed)
    factors = np.empty((persons, images_per_person, len(CONTENT_FACTORS)), dtype=np.float32)
    for k in range(persons):
        factors[k] = _content_rows(np.random.default_rng([seed, k, 3]), images_per_person)
    content = torch.from_numpy(factors).flatten(0, 1)
    person = torch.arange(persons).repeat_interleave(images_per_person)
    images = torch.empty(len(person), 3, size, size, dtype=torch.uint8)
    for i in range(0, len(person), _CHUNK):
        # The last chunk is filled up: a sum in another order could move a rounding, and persons are
        # to be independent.
        at = torch.arange(i, i + _CHUNK).clamp(max=len(person) - 1)
        images[i : i + _CHUNK] = render(identity[person[at]], content[at], size)[: len(person) - i]
        done = min(i + _CHUNK, len(person))
        # a log gets the last line only
        if progress and (sys.stderr.isatty() or done == len(person)):
            end = "\n" if done == len(person) else ""
            print(f"\rrendering faces {done}/{len(person)}", end=end, file=sys.stderr, flush=True)
    return images, person, identity, content
