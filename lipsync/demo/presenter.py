"""The presenter: a drawn head, shoulders and studio, 1280x720, posed and with any shape of mouth.

Coordinates are head units: one unit is one pixel of the frame, (0, 0) lies between the eyes and the nose, y down. The
head is painted once, at twice the size. For every frame the jaw is drawn down, eyes and mouth are painted, and the head
is turned and put into the studio. Because all of it is computed, so are the landmarks and the crop rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from lipsync.demo.canvas import CURVE_STEPS, Canvas, curve, oval
from lipsync.demo.speech import CLOSED, Mouth

Float32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]

FRAME_WIDTH, FRAME_HEIGHT = 1280, 720
SCALE = 2
"""The head is painted at so many pixels a unit."""
HEAD_AT = (640.0, 318.0)
"""Where (0, 0) of the head lies in the frame, at rest."""
HEAD_SIZE = (440, 500)
HEAD_ORIGIN = (220.0, 250.0)
PIVOT = (0.0, 210.0)
"""The head tilts about this point, in the neck."""
CROP_SIZE = 312
CROP_TOP = -92
"""The crop rectangle is a square of CROP_SIZE, this far above (0, 0)."""
MAX_SWAY = 14.0
MAX_TILT = 3.0
BODY_MARGIN = 16
"""Rows of the body below the frame, for when the sway lifts it."""
BODY_FOLLOWS = 0.4
"""How much of the head's sway the shoulders take."""

MOUTH_Y = 110.0
MAX_GAP = 38.0
"""Between the lips at the middle, in pixels, when the mouth is fully open."""
GAP_ABOVE = 0.22
"""Part of the gap by which the upper lip rises; the rest is the jaw's."""
JAW_DROP = 19.0
JAW_FROM, JAW_TO = 92.0, 172.0
"""Between these heights the skin stretches when the jaw drops; below, it moves whole."""
MOUTH_PATCH = (156, 128)
MOUTH_PATCH_ORIGIN = (78.0, 46.0)
EYE_X, EYE_Y = 61.0, -18.0
EYE_PATCH = (84, 64)
EYE_PATCH_ORIGIN = (42.0, 36.0)
EYE_ZOOM = 1.125
BLINK_LEVELS = 8

SKIN = (226.0, 178.0, 152.0)
SKIN_LIGHT = (250.0, 213.0, 189.0)
SKIN_DARK = (148.0, 92.0, 74.0)
SKIN_DEEP = (96.0, 52.0, 44.0)
BLUSH = (214.0, 122.0, 106.0)
HAIR = (58.0, 38.0, 30.0)
HAIR_LIGHT = (124.0, 86.0, 62.0)
HAIR_DARK = (28.0, 17.0, 14.0)
LIP_UPPER = (178.0, 92.0, 86.0)
LIP_LOWER = (200.0, 114.0, 106.0)
LIP_LINE = (92.0, 36.0, 36.0)
CAVITY = (46.0, 14.0, 18.0)
TONGUE = (138.0, 58.0, 62.0)
TEETH = (238.0, 232.0, 222.0)


@dataclass(frozen=True)
class Pose:
    """Where the head is: sway in pixels, tilt in degrees (clockwise), blink 0 (open) to 1 (shut)."""

    x: float = 0.0
    y: float = 0.0
    tilt: float = 0.0
    blink: float = 0.0


@dataclass(frozen=True)
class Frame:
    """A drawn frame, and what is known of it.

    image: RGB 1280x720. landmarks: (68, 2) float32 pixels. rectangle: x1, y1, x2, y2 of the crop, integers.
    """

    image: Image.Image
    landmarks: Float32
    rectangle: tuple[int, int, int, int]


_FACE = [
    (0, -172), (58, -166), (106, -138), (132, -88), (139, -30), (137, 24), (127, 76), (106, 124), (75, 161),
    (39, 183), (0, 188), (-39, 183), (-75, 161), (-106, 124), (-127, 76), (-137, 24), (-139, -30), (-132, -88),
    (-106, -138), (-58, -166),
]  # fmt: skip
_HAIR = [
    (-143, 2), (-155, -44), (-162, -104), (-146, -164), (-104, -210), (-60, -224), (-20, -240), (56, -238),
    (118, -208), (156, -150), (162, -84), (154, -34), (144, 2), (139, -20), (138, -58), (128, -92), (112, -118),
    (70, -124), (24, -134), (-22, -150), (-58, -166), (-84, -150), (-112, -122), (-130, -88), (-138, -54), (-139, -20),
]  # fmt: skip


def _mirror(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(-x, y) for x, y in points]


def _strands(canvas: Canvas, rng: np.random.Generator) -> None:
    """Hair, lock by lock: lines that start at the parting and follow the skull."""
    outline = curve(_HAIR, closed=True)
    mask = canvas.fill(outline, blur=0.8)
    canvas.paint(mask, HAIR)
    tips = []
    for i in range(18, 84):  # the skull's contour, without the hairline
        at, along = outline[i], outline[(i + 1) % len(outline)] - outline[i - 1]
        along = along / (np.linalg.norm(along) + 1e-6) * (1 if at[0] > -58 else -1)
        outward = np.array((at[0] * 0.7, at[1] + 90)) / (np.hypot(at[0] * 0.7, at[1] + 90) + 1e-6)
        for _ in range(4):
            root = at - outward * rng.uniform(2, 6) + rng.normal(0, 2, 2)
            tip = root + along * rng.uniform(12, 30) + outward * rng.uniform(-3, 3)
            tips.append(curve([root, (root + tip) / 2 + outward * 2.5, tip]))
    canvas.paint(canvas.stroke(*tips, width=1.2, blur=0.5), HAIR, 0.85)
    cover = np.minimum(canvas.alpha, np.clip(mask * 3, 0, 1))
    x, y = canvas.grid()
    sheen = np.exp(-(((x + 92) / 44) ** 2) - ((y + 176) / 30) ** 2) + np.exp(
        -(((x - 40) / 84) ** 2) - ((y + 192 - 0.0016 * (x - 40) ** 2) / 22) ** 2
    )
    canvas.paint(cover * sheen, HAIR_LIGHT, 0.62, on_top=False)
    parting = np.array((-58.0, -166.0))
    for colour, n, opacity in (
        (HAIR_DARK, 150, 0.5),
        (HAIR_LIGHT, 110, 0.40),
        (HAIR_DARK, 90, 0.4),
        (HAIR_LIGHT, 40, 0.3),
    ):
        paths = []
        for _ in range(n):
            depth, spread = rng.random(), rng.normal(0, 4)
            root = parting + np.array((12 * depth + rng.normal(0, 3), -62 * depth + 4))
            if rng.random() < 0.7:
                crest = (52 + 30 * depth + spread, -140 - 96 * depth + spread)
                end = (136 + 22 * depth, -100 + 10 * depth + rng.uniform(-10, 96))
            else:
                crest = (-112 - 22 * depth + spread, -140 - 70 * depth + spread)
                end = (-136 - 16 * depth, -92 + rng.uniform(-10, 88))
            paths.append(curve([tuple(root), crest, end]))
        canvas.paint(canvas.stroke(*paths, width=1.2, blur=0.5) * cover, colour, opacity, on_top=False)
    groove = canvas.stroke(curve([(-58, -164), (-54, -196), (-48, -228)]), width=3, blur=2)
    canvas.paint(groove * cover, HAIR_DARK, 0.8, on_top=False)
    rim = cover * (1 - canvas.fill(outline, blur=9))
    canvas.paint(np.clip(rim * 1.2, 0, 1), HAIR_DARK, 0.62, on_top=False)


def _ear(canvas: Canvas, side: int) -> None:
    outline: list[tuple[float, float]] = [(132, -32), (148, -44), (160, -30), (160, 0), (151, 30), (140, 44), (130, 36)]
    inner: list[tuple[float, float]] = [(143, -26), (152, -24), (152, -2), (145, 18), (139, 10), (144, -6)]
    points = outline if side > 0 else _mirror(outline)
    hollow = inner if side > 0 else _mirror(inner)
    mask = canvas.fill(curve(points, closed=True), blur=0.5)
    canvas.paint(mask, (212, 156, 132) if side < 0 else (190, 132, 110))
    canvas.paint(canvas.fill(curve(hollow, closed=True), blur=2.5) * mask, SKIN_DARK, 0.8, on_top=False)
    rim = canvas.stroke(curve(points), width=3, blur=1.6)
    canvas.paint(rim * mask, SKIN_LIGHT, 0.3, on_top=False)


def _nose(canvas: Canvas, face: Float32) -> None:
    def shade(coverage: Floats, colour: tuple[float, float, float], opacity: float) -> None:
        canvas.paint(coverage * face, colour, opacity, on_top=False)

    shade(canvas.fill(curve([(10, -40), (20, -10), (24, 30), (30, 56), (14, 66), (8, 30)], closed=True), blur=6),
          SKIN_DARK, 0.42)  # fmt: skip
    shade(canvas.fill(curve([(-16, -44), (-17, -14), (-20, 14), (-12, 20), (-8, -20)], closed=True), blur=5),
          SKIN_DARK, 0.20)  # fmt: skip
    shade(canvas.stroke(curve([(-2, -36), (-3, 0), (-3, 36)]), width=9, blur=4.5), SKIN_LIGHT, 0.75)
    shade(canvas.fill(oval(0, 68, 34, 9), blur=5), SKIN_DARK, 0.5)
    shade(canvas.fill(oval(-3, 46, 15, 13), blur=6), SKIN_LIGHT, 0.55)
    shade(canvas.fill(oval(-5, 41, 5, 4), blur=2.2), (255, 240, 226), 0.75)
    for side in (-1, 1):
        wing = [(side * 16, 40), (side * 27, 44), (side * 30, 57), (side * 22, 65)]
        shade(canvas.stroke(curve(wing), width=2.6, blur=1.5), SKIN_DARK, 0.75 if side > 0 else 0.55)
        shade(canvas.fill(oval(side * 12.5, 62.5, 7.5, 3.2, side * -0.22), blur=0.9), SKIN_DEEP, 0.9)
        shade(canvas.fill(oval(side * 22, 53, 6, 7), blur=3), SKIN_LIGHT, 0.22 if side < 0 else 0.08)
    shade(canvas.stroke(curve([(-9, 66), (0, 69), (9, 66)]), width=2, blur=1.1), SKIN_DARK, 0.5)


def _brow(canvas: Canvas, side: int, rng: np.random.Generator) -> None:
    spine = np.array([(30, -54), (48, -63), (70, -67), (90, -61), (104, -49)], np.float32)
    body = [(29, -49), (48, -57), (70, -61), (92, -57), (106, -47), (90, -65), (70, -73), (47, -70), (29, -61)]
    flip = np.array((side, 1), np.float32)
    canvas.paint(canvas.fill(curve(np.array(body) * flip, closed=True), blur=1.6), HAIR, 0.62, on_top=False)
    hairs = []
    for t in np.linspace(0, 3.6, 64):
        i, f = int(t), t - int(t)
        at = spine[i] * (1 - f) + spine[i + 1] * f + (0, rng.normal(0, 2.2))
        along = (spine[i + 1] - spine[i]) / np.linalg.norm(spine[i + 1] - spine[i])
        hairs.append(np.array((at, at + along * 7 + (0, rng.uniform(-2, 1))), np.float32) * flip)
    canvas.paint(canvas.stroke(*hairs, width=1.0, blur=0.4), HAIR_DARK, 0.6, on_top=False)


@cache
def _head() -> Image.Image:
    """The head without mouth and open eyes, jaw closed: RGBA, HEAD_SIZE times SCALE."""
    canvas = Canvas(*HEAD_SIZE, origin=HEAD_ORIGIN, scale=SCALE)
    rng = np.random.default_rng(7)
    x, y = canvas.grid()
    for side in (-1, 1):
        _ear(canvas, side)
    outline = curve(_FACE, closed=True)
    face = canvas.fill(outline, blur=0.5)
    canvas.paint(face, SKIN)
    face = np.clip(face * 8, 0, 1)  # shading must reach the whole of the soft edge, or a pale rim is left

    def shade(coverage: Floats, colour: tuple[float, float, float], opacity: float) -> None:
        canvas.paint(coverage * face, colour, opacity, on_top=False)

    def glow(at_x: float, at_y: float, size_x: float, size_y: float) -> Float32:
        spot: Float32 = np.exp(-(((x - at_x) / size_x) ** 2) - ((y - at_y) / size_y) ** 2)
        return spot

    shade(1 - canvas.fill(outline, blur=26), SKIN_DARK, 0.95)  # turning away at the edges
    shade(np.clip((x - 10) / 150, 0, 1) * np.ones_like(y), SKIN_DARK, 0.42)  # the light comes from the left
    shade(np.clip((y - 110) / 110, 0, 1) * np.ones_like(x), SKIN_DARK, 0.4)
    shade(glow(-34, -104, 74, 40), SKIN_LIGHT, 0.8)
    shade(glow(-84, 34, 34, 34), SKIN_LIGHT, 0.62)
    shade(glow(74, 28, 30, 30), SKIN_LIGHT, 0.42)
    shade(glow(-8, 164, 26, 15), SKIN_LIGHT, 0.5)
    shade(glow(-88, 52, 38, 27) + glow(88, 52, 38, 27), BLUSH, 0.30)
    shade(glow(0, 145, 34, 8), SKIN_DARK, 0.42)  # below the lower lip
    shade(glow(0, 84, 7, 12), SKIN_DARK, 0.28)
    for side in (-1, 1):
        shade(glow(side * 58, -28, 40, 22), SKIN_DARK, 0.34)  # eye sockets
        shade(glow(side * 24, -26, 13, 20), SKIN_DARK, 0.30)
        shade(glow(side * 58, 12, 32, 7), SKIN_DARK, 0.14)
        fold = [(side * 33, 60), (side * 50, 82), (side * 60, 106)]
        shade(canvas.stroke(curve(fold), width=3, blur=3.2), SKIN_DARK, 0.42)
    shade(canvas.fill(curve([(p[0], p[1] + 16) for p in _HAIR], closed=True), blur=9), SKIN_DEEP, 0.42)
    _nose(canvas, face)
    for side in (-1, 1):
        _brow(canvas, side, rng)
    freckles = [oval(rng.normal(0, 74), rng.normal(38, 16), 0.7, 0.7) for _ in range(46)]
    shade(canvas.fill(*freckles, blur=0.4), SKIN_DARK, 0.34)
    _strands(canvas, rng)
    return canvas.image()


@lru_cache(maxsize=64)
def _eye(side: int, level: int) -> Image.Image:
    """One eye with its lids, shut by level / BLINK_LEVELS: RGBA patch around the eye's middle."""
    canvas = Canvas(*EYE_PATCH, origin=EYE_PATCH_ORIGIN, scale=SCALE)
    shut = level / BLINK_LEVELS
    inner, outer = -side * 27.0, side * 28.0
    lower = [(inner, 5), (-side * 14, 9.5), (side * 2, 11.2), (side * 17, 8.5), (outer, 0)]
    opened = np.array([(inner, 5), (-side * 17, -7), (0, -12.5), (side * 17, -9), (outer, 0)])
    upper = opened + (np.array(lower) - (0, 1.2) - opened) * shut * np.array((0, 0.97))
    upper[:, 0] = opened[:, 0] * (1 - shut) + np.array(lower)[:, 0] * shut
    top, bottom = curve(upper), curve(lower)
    ball = canvas.fill(np.concatenate((top, bottom[::-1])), blur=0.25)
    lid_top = curve([(inner - side * 1, 2), (-side * 19, -13.5), (0, -19.5), (side * 19, -15), (outer + side * 3, -1)])
    if shut > 0:
        lid = canvas.fill(np.concatenate((lid_top, top[::-1])), blur=1.2)
        canvas.paint(lid, (208, 154, 128) if side < 0 else (188, 134, 112))
        x, y = canvas.grid()
        canvas.paint(lid * np.exp(-(((x + 3) / 17) ** 2) - ((y + 2) / 7) ** 2), SKIN_LIGHT, 0.5 * shut, on_top=False)
    canvas.paint(ball, (240, 234, 230))
    for corner, strength in ((inner, 0.5), (outer, 0.4)):
        canvas.paint(canvas.fill(oval(corner, 3, 8, 7), blur=3) * ball, (196, 140, 128), strength, on_top=False)
    iris = canvas.fill(oval(0, -1.2, 12.2, 12.2), blur=0.4) * ball
    canvas.paint(iris, (74, 104, 112), on_top=False)
    canvas.paint(canvas.fill(oval(1, 3, 8, 6), blur=2) * iris, (136, 166, 158), 0.75, on_top=False)
    rays = []
    for t in np.linspace(0, 2 * np.pi, 28, endpoint=False):
        a = np.array((np.cos(t), np.sin(t)))
        rays.append(np.array((a * 5.5, a * 11) + np.array((0, -1.2)), np.float32))
    canvas.paint(canvas.stroke(*rays, width=0.5, blur=0.3) * iris, (170, 190, 176), 0.4, on_top=False)
    rim = iris * (1 - canvas.fill(oval(0, -1.2, 10.8, 10.8), blur=0.8))
    canvas.paint(rim, (26, 40, 48), 0.85, on_top=False)
    canvas.paint(canvas.fill(oval(0, -1.2, 5.4, 5.4), blur=0.4) * ball, (14, 14, 18), on_top=False)
    shadow = canvas.stroke(top, width=8, blur=2.4) * ball
    canvas.paint(shadow, (70, 50, 48), 0.62, on_top=False)
    canvas.paint(canvas.fill(oval(-4.2, -5.4, 2.7, 2.7), blur=0.35) * ball, (255, 255, 255), on_top=False)
    canvas.paint(canvas.fill(oval(4.4, 3.6, 1.4, 1.4), blur=0.4) * ball, (255, 255, 255), 0.55, on_top=False)
    canvas.paint(canvas.stroke(lid_top, width=1.5, blur=0.8), SKIN_DEEP, 0.5 * (1 - 0.6 * shut))
    canvas.paint(canvas.stroke(bottom, width=1.2, blur=0.6), SKIN_DARK, 0.7)
    canvas.paint(canvas.stroke(top, width=2.3, blur=0.4), (34, 22, 20), 0.95)
    width, height = canvas.size
    return canvas.image().resize((round(width * EYE_ZOOM), round(height * EYE_ZOOM)), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class _Lips:
    """The four edges of the lips over x, around the mouth's middle: each (n,) float32."""

    x: Floats
    upper_outer: Floats
    upper_inner: Floats
    lower_inner: Floats
    lower_outer: Floats
    half_width: float

    @classmethod
    def of(cls, mouth: Mouth) -> _Lips:
        half_width = 45 + 9 * mouth.width - 9 * mouth.rounding - 3 * mouth.opening
        gap = MAX_GAP * mouth.opening
        x = np.linspace(-1, 1, 49, dtype=np.float32)
        far = np.abs(x)
        # A round mouth is an ellipse inside, a spread one is pointed.
        power = 2.0 + 0.5 * mouth.rounding
        bow = np.clip(1 - far**power, 0, 1) ** (0.9 - 0.3 * mouth.rounding)
        line = (
            1.0 * far**2
            - 2.6 * far**4
            - 1.2 * np.exp(-((far / 0.16) ** 2)) * (1 - mouth.opening)
            - 1.5 * mouth.width * far**3
        )
        inside = np.clip((far - 0.9) / 0.1, 0, 1)  # lips meet just before the corners
        upper_inner = line - GAP_ABOVE * gap * bow * (1 - inside)
        lower_inner = line + (1 - GAP_ABOVE) * gap * bow * (1 - inside)
        thick_upper = (10.5 + 2.5 * mouth.rounding - 1.5 * mouth.opening) * np.clip(1 - far**2.2, 0, 1) ** 0.8
        cupid = 2.6 * np.exp(-((far / 0.13) ** 2)) * (1 - 0.5 * mouth.rounding)
        thick_lower = (14 + 3 * mouth.rounding - 2 * mouth.opening - 8 * mouth.tuck) * np.clip(
            1 - far**2.6, 0, 1
        ) ** 0.75
        upper_outer = upper_inner - thick_upper + cupid
        lower_outer = lower_inner + thick_lower
        return cls(x * half_width, upper_outer, upper_inner, lower_inner, lower_outer, half_width)

    def between(self, top: Floats, bottom: Floats) -> Float32:
        """The closed path between two edges."""
        there = np.stack((self.x, top), axis=1)
        back = np.stack((self.x, bottom), axis=1)[::-1]
        return np.concatenate((there, back)).astype(np.float32)


def _paint_mouth(mouth: Mouth) -> Image.Image:
    """The lips and what is between them: RGBA patch around the mouth's middle."""
    canvas = Canvas(*MOUTH_PATCH, origin=MOUTH_PATCH_ORIGIN, scale=SCALE)
    lips = _Lips.of(mouth)
    x, y = canvas.grid()
    gap = MAX_GAP * mouth.opening
    top, bottom = float(lips.upper_inner.min()), float(lips.lower_inner.max())
    w = lips.half_width

    soft = canvas.fill(lips.between(lips.upper_outer - 1, lips.lower_outer + 1), blur=3.0)
    canvas.paint(soft, (186, 116, 98), 0.55)
    under = np.exp(-((x / (0.62 * w)) ** 2) - ((y - lips.lower_outer[24] - 5) / 5) ** 2)
    canvas.paint(under, SKIN_DARK, 0.5)

    hole = canvas.fill(lips.between(lips.upper_inner, lips.lower_inner))
    canvas.paint(hole, CAVITY)
    if gap > 1:
        if mouth.tongue > 0.02 or gap > 12:
            rise = 0.30 + 0.35 * mouth.tongue
            tongue = canvas.fill(oval(0, bottom + 2, 0.62 * w, gap * rise + 1), blur=1.2)
            canvas.paint(tongue * hole, TONGUE, 0.9, on_top=False)
        rows = np.minimum(2.5 + 8 * mouth.teeth, 0.55 * gap + 0.6)
        arch = np.clip(1 - (np.abs(lips.x) / (0.86 * w)) ** 4, 0, 1)
        upper = canvas.fill(lips.between(lips.upper_inner - 3, lips.upper_inner + rows * arch), blur=0.4) * hole
        canvas.paint(upper, TEETH, 0.97, on_top=False)
        if mouth.teeth > 0.3:
            low = np.minimum(5 * (mouth.teeth - 0.3) / 0.7, 0.34 * gap) * arch
            lower = canvas.fill(lips.between(lips.lower_inner - low, lips.lower_inner + 3), blur=0.5) * hole
            canvas.paint(lower, (206, 198, 188), 0.9, on_top=False)
        sides = np.clip((np.abs(x) / w - 0.35) / 0.6, 0, 1) * np.ones_like(y)
        canvas.paint(hole * sides, CAVITY, 0.75, on_top=False)
        gaps = [np.array(((i * 8.6, top - 4), (i * 8.0, top + rows + 3)), np.float32) for i in range(-4, 5)]
        canvas.paint(canvas.stroke(*gaps, width=0.6, blur=0.35) * upper, (150, 120, 110), 0.5, on_top=False)
        shadow = canvas.stroke(np.stack((lips.x, lips.upper_inner), axis=1), width=5, blur=1.6) * hole
        canvas.paint(shadow, CAVITY, 0.55, on_top=False)

    upper_lip = canvas.fill(lips.between(lips.upper_outer, lips.upper_inner), blur=0.5)
    canvas.paint(upper_lip, LIP_UPPER)
    lit = canvas.stroke(np.stack((lips.x, lips.upper_outer), axis=1)[8:41], width=4, blur=1.8) * upper_lip
    canvas.paint(lit, (216, 138, 126), 0.55, on_top=False)
    lower_lip = canvas.fill(lips.between(lips.lower_inner, lips.lower_outer), blur=0.5)
    canvas.paint(lower_lip, LIP_LOWER)
    middle = (lips.lower_inner + lips.lower_outer)[24] / 2
    shine = np.exp(-(((x + 5) / (0.36 * w)) ** 2) - ((y - middle + 1) / 3.2) ** 2)
    canvas.paint(shine * lower_lip, (246, 190, 180), 0.75, on_top=False)
    turn = canvas.stroke(np.stack((lips.x, lips.lower_outer), axis=1), width=6, blur=2.2) * lower_lip
    canvas.paint(turn, (156, 82, 74), 0.55, on_top=False)
    sides = np.clip((np.abs(x) / w - 0.5) / 0.5, 0, 1) * np.ones_like(y)
    canvas.paint((upper_lip + lower_lip).clip(0, 1) * sides, (150, 78, 70), 0.5, on_top=False)
    seam = np.stack((lips.x, (lips.upper_inner + lips.lower_inner) / 2), axis=1)
    closed = 1 - min(gap / 3, 1)
    if closed > 0:
        canvas.paint(canvas.stroke(seam, width=1.7, blur=0.5), LIP_LINE, 0.95 * closed)
    corners = canvas.fill(oval(-w, 2.4, 3.2, 2.2), oval(w, 2.4, 3.2, 2.2), blur=1.4)
    canvas.paint(corners, SKIN_DEEP, 0.55)
    return canvas.image()


def _jaw(y: Floats) -> Float32:
    """How much of the jaw's drop the skin at a height takes, 0..1."""
    t = np.clip((y - JAW_FROM) / (JAW_TO - JAW_FROM), 0, 1)
    taken: Float32 = (t * t * (3 - 2 * t)).astype(np.float32)
    return taken


def _drop_jaw(head: Image.Image, drop: float) -> Image.Image:
    """Stretch the lower face by `drop` units."""
    if drop < 0.02:
        return head.copy()
    pixels = np.asarray(head)
    n_rows = len(pixels)
    heights = (np.arange(n_rows, dtype=np.float32) + 0.5) / SCALE - HEAD_ORIGIN[1]
    source = np.interp(heights, heights + drop * _jaw(heights), np.arange(n_rows, dtype=np.float32))
    first = int((JAW_FROM + HEAD_ORIGIN[1]) * SCALE)
    source = source[first:].astype(np.float32)
    whole = source.astype(int)
    part = np.round((source - whole) * 256).astype(np.uint16)[:, None, None]
    below = np.minimum(whole + 1, n_rows - 1)
    lower = (pixels[whole] * (256 - part) + pixels[below] * part + 128) >> 8
    return Image.fromarray(np.concatenate((pixels[:first], lower.astype(np.uint8))), "RGBA")


def _paste(head: Image.Image, patch: Image.Image, at: tuple[float, float], origin: tuple[float, float]) -> None:
    left = round((at[0] + HEAD_ORIGIN[0] - origin[0]) * SCALE)
    top = round((at[1] + HEAD_ORIGIN[1] - origin[1]) * SCALE)
    head.alpha_composite(patch, (left, top))


@lru_cache(maxsize=4)
def _eyed_head(level: int) -> Image.Image:
    head = _head().copy()
    for side in (-1, 1):
        _paste(
            head,
            _eye(side, level),
            (side * EYE_X, EYE_Y),
            (EYE_PATCH_ORIGIN[0] * EYE_ZOOM, EYE_PATCH_ORIGIN[1] * EYE_ZOOM),
        )
    return head


@cache
def _studio() -> Image.Image:
    """The background: RGB 1280x720."""
    canvas = Canvas(FRAME_WIDTH, FRAME_HEIGHT)
    x, y = canvas.grid()
    everywhere = np.ones((FRAME_HEIGHT, FRAME_WIDTH), np.float32)
    canvas.paint(everywhere, (52, 68, 84))
    light = np.exp(-(((x - 560) / 420) ** 2) - ((y - 250) / 330) ** 2)
    canvas.paint(light.astype(np.float32), (134, 158, 168), 0.9)
    rng = np.random.default_rng(3)
    for left in range(-40, 1320, 170):
        panel = np.array(((left, -20), (left + 148, -20), (left + 148, 760), (left, 760)), np.float32)
        canvas.paint(canvas.fill(panel, blur=7), (214, 226, 226), 0.05 + 0.05 * rng.random())
    for _ in range(16):
        at = (rng.uniform(0, 1280), rng.uniform(20, 420))
        if 400 < at[0] < 880:
            continue
        size = rng.uniform(14, 40)
        warm = (255, 206, 150) if rng.random() < 0.6 else (160, 214, 226)
        canvas.paint(canvas.fill(oval(*at, size, size), blur=5), warm, rng.uniform(0.07, 0.2))
    desk = np.clip((y - 560) / 160, 0, 1) * np.ones_like(x)
    canvas.paint(desk, (26, 34, 44), 0.6)
    vignette = np.clip(((x - 640) / 760) ** 2 + ((y - 340) / 520) ** 2 - 0.35, 0, 1)
    canvas.paint(vignette, (18, 24, 32), 0.55)
    return canvas.image().convert("RGB")


@cache
def _body() -> Image.Image:
    """Neck, shoulders and clothes, with the head's shadow: RGBA 1280x736."""
    canvas = Canvas(FRAME_WIDTH, FRAME_HEIGHT + BODY_MARGIN, origin=HEAD_AT)
    x, y = canvas.grid()
    neck_path = curve(
        [(-78, 60), (-80, 130), (-84, 190), (-106, 226), (-150, 262), (0, 330), (150, 262), (106, 226), (84, 190),
         (80, 130), (78, 60)], closed=True)  # fmt: skip
    neck = canvas.fill(neck_path, blur=0.7)
    canvas.paint(neck, (212, 160, 134))
    neck = np.clip(neck * 8, 0, 1)
    canvas.paint(neck * np.clip((x + 10) / 110, 0, 1), SKIN_DARK, 0.6, on_top=False)
    canvas.paint(neck * (1 - canvas.fill(neck_path, blur=14)), SKIN_DARK, 0.7, on_top=False)
    below_chin = canvas.fill(curve([(p[0] + 8, p[1] + 30) for p in _FACE], closed=True), blur=12)
    canvas.paint(neck * below_chin, SKIN_DEEP, 0.72, on_top=False)
    for side in (-1, 1):
        muscle = curve([(side * 66, 150), (side * 44, 214), (side * 14, 262)])
        canvas.paint(canvas.stroke(muscle, width=4, blur=5) * neck, SKIN_DARK, 0.35, on_top=False)
    canvas.paint(canvas.fill(oval(0, 262, 9, 8), blur=5) * neck, SKIN_DARK, 0.5, on_top=False)

    shirt_path = curve(
        [(-104, 218), (-78, 246), (-40, 268), (0, 275), (40, 268), (78, 246), (104, 218), (122, 290), (150, 470),
         (-150, 470), (-122, 290)], closed=True)  # fmt: skip
    shirt = canvas.fill(shirt_path, blur=0.8)
    canvas.paint(canvas.fill(shirt_path + np.array((3, -5), np.float32), blur=5) * neck, SKIN_DEEP, 0.5, on_top=False)
    canvas.paint(shirt, (232, 234, 236))
    canvas.paint(shirt * np.clip((x + 20) / 150, 0, 1), (132, 144, 162), 0.75, on_top=False)
    canvas.paint(shirt * np.clip((y - 300) / 140, 0, 1), (132, 144, 162), 0.5, on_top=False)
    hem = [(-104, 218), (-78, 246), (-40, 268), (0, 275), (40, 268), (78, 246), (104, 218)]
    canvas.paint(canvas.stroke(curve([(p[0], p[1] + 11) for p in hem]), width=1.6, blur=0.8) * shirt, (128, 138, 152),
                 0.8, on_top=False)  # fmt: skip
    canvas.paint(canvas.stroke(curve([(p[0], p[1] + 1.5) for p in hem]), width=2, blur=0.8) * shirt, (255, 255, 255),
                 0.8, on_top=False)  # fmt: skip
    for fold in ([(-30, 300), (-16, 350), (-20, 410)], [(26, 296), (20, 340), (30, 400)]):
        canvas.paint(canvas.stroke(curve(fold), width=4, blur=4) * shirt, (128, 138, 156), 0.5, on_top=False)
    jacket_path = curve(
        [(-98, 216), (-150, 244), (-246, 276), (-318, 322), (-352, 420), (-372, 520), (372, 520), (352, 420),
         (318, 322), (246, 276), (150, 244), (98, 216), (108, 262), (74, 352), (12, 440), (-12, 440), (-74, 352),
         (-108, 262)], closed=True)  # fmt: skip
    jacket = canvas.fill(jacket_path, blur=0.8)
    canvas.paint(jacket, (42, 54, 82))
    shoulder = np.exp(-(((x + 190) / 110) ** 2) - ((y - 306) / 46) ** 2)
    canvas.paint(jacket * shoulder, (104, 122, 158), 0.65, on_top=False)
    canvas.paint(jacket * np.clip(x / 330, 0, 1), (16, 20, 34), 0.6, on_top=False)
    canvas.paint(jacket * (1 - canvas.fill(jacket_path, blur=12)), (14, 18, 30), 0.6, on_top=False)
    for side in (-1, 1):
        lapel = [(side * 106, 226), (side * 150, 262), (side * 156, 330), (side * 120, 344), (side * 20, 448),
                 (side * 76, 346)]  # fmt: skip
        shape = canvas.fill(np.array(lapel, np.float32), blur=0.8)
        canvas.paint(canvas.fill(np.array([(p[0] + side * 5, p[1] + 7) for p in lapel], np.float32), blur=5) * jacket,
                     (10, 13, 24), 0.6, on_top=False)  # fmt: skip
        canvas.paint(shape, (54, 68, 100) if side < 0 else (38, 48, 74))
        canvas.paint(canvas.stroke(np.array(lapel[1:5], np.float32), width=1.2, blur=0.6), (96, 112, 148), 0.5)
        seam = curve([(side * 232, 330), (side * 250, 400), (side * 258, 480)])
        canvas.paint(canvas.stroke(seam, width=3, blur=3) * jacket, (12, 15, 26), 0.6, on_top=False)
    return canvas.image()


def _turned(points: Float32, pose: Pose) -> Float32:
    """Head units to pixels of the frame: (n, 2) float32."""
    angle = np.radians(pose.tilt)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[:, 0] - PIVOT[0], points[:, 1] - PIVOT[1]
    out = np.stack((x * cos - y * sin, x * sin + y * cos), axis=1)
    moved: Float32 = (out + np.array(PIVOT) + np.array(HEAD_AT) + np.array((pose.x, pose.y))).astype(np.float32)
    return moved


def crop_rectangle(pose: Pose) -> tuple[int, int, int, int]:
    """The face's square in the frame: x1, y1, x2, y2."""
    middle = _turned(np.array([(0.0, CROP_TOP + CROP_SIZE / 2)], np.float32), pose)[0]
    left, top = round(float(middle[0]) - CROP_SIZE / 2), round(float(middle[1]) - CROP_SIZE / 2)
    return left, top, left + CROP_SIZE, top + CROP_SIZE


def landmarks(pose: Pose, mouth: Mouth) -> Float32:
    """The 68 points of the usual annotation (jaw, brows, nose, eyes, lips): (68, 2) float32 pixels."""
    contour = curve(_FACE, closed=True)
    ear, other_ear = 4 * CURVE_STEPS, 16 * CURVE_STEPS  # of _FACE's points, the fifth and the seventeenth
    jaw = contour[np.linspace(other_ear, ear, 17).astype(int)]
    brow = np.array([(104, -49), (90, -61), (70, -67), (48, -63), (30, -54)], np.float32)
    flip = np.array((-1, 1), np.float32)
    nose = np.array([(0, -26), (0, -4), (0, 20), (0, 46), (-18, 62), (-9, 66), (0, 69), (9, 66), (18, 62)], np.float32)
    shut = pose.blink
    eye = np.array([(28, 0), (14, -10), (-14, -9), (-27, 5), (-10, 10.5), (12, 10)], np.float32)
    eye[1:3, 1] += (eye[[5, 4], 1] - eye[1:3, 1]) * shut
    eye = eye * EYE_ZOOM + (EYE_X, EYE_Y)
    jaw_drop = JAW_DROP * mouth.opening
    jaw[:, 1] += jaw_drop * _jaw(jaw[:, 1])
    lips = _Lips.of(mouth)

    def lip(edge: Floats, *columns: int) -> Floats:
        return np.stack((lips.x, edge), axis=1)[list(columns)] + (0, MOUTH_Y)

    points = [
        jaw, brow * flip, brow[::-1], nose, eye * flip, eye[[3, 2, 1, 0, 5, 4]],
        lip(lips.upper_outer, 0, 9, 18, 24, 30, 39, 48), lip(lips.lower_outer, 39, 32, 24, 16, 9),
        lip(lips.upper_inner, 3, 14, 24, 34, 45), lip(lips.lower_inner, 34, 24, 14),
    ]  # fmt: skip
    return _turned(np.concatenate(points), pose)


def draw_region(pose: Pose, mouth: Mouth, box: tuple[int, int, int, int]) -> Image.Image:
    """A part of the frame: RGB of `box` (x1, y1, x2, y2)."""
    head = _drop_jaw(_eyed_head(round(pose.blink * BLINK_LEVELS)), JAW_DROP * mouth.opening)
    _paste(head, _paint_mouth(mouth), (0, MOUTH_Y), MOUTH_PATCH_ORIGIN)
    x1, y1, x2, y2 = box
    picture = _studio().crop(box)
    shift = (x1 - BODY_FOLLOWS * pose.x, y1 - BODY_FOLLOWS * pose.y)
    body = _body().transform((x2 - x1, y2 - y1), Image.Transform.AFFINE, (1, 0, shift[0], 0, 1, shift[1]),
                             Image.Resampling.BILINEAR)  # fmt: skip
    picture.paste(body, (0, 0), body)
    corners = _turned(np.array([(sx * 200.0, sy * 245.0) for sx in (-1, 1) for sy in (-1, 1)], np.float32), pose)
    left, top = np.maximum(np.floor(corners.min(0)).astype(int), (x1, y1)).tolist()
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int), (x2, y2)).tolist()
    if left < right and top < bottom:
        # From a pixel of the enlarged region back to the head's picture.
        angle = np.radians(pose.tilt)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        from_x = left - HEAD_AT[0] - pose.x - PIVOT[0]
        from_y = top - HEAD_AT[1] - pose.y - PIVOT[1]
        to_x, to_y = PIVOT[0] + HEAD_ORIGIN[0], PIVOT[1] + HEAD_ORIGIN[1]
        matrix = (
            cos, sin, SCALE * (from_x * cos + from_y * sin + to_x),
            -sin, cos, SCALE * (-from_x * sin + from_y * cos + to_y),
        )  # fmt: skip
        large = head.transform(((right - left) * SCALE, (bottom - top) * SCALE), Image.Transform.AFFINE, matrix,
                               Image.Resampling.BILINEAR)  # fmt: skip
        small = large.reduce(SCALE)
        picture.paste(small, (left - x1, top - y1), small)
    return picture


def draw_frame(pose: Pose, mouth: Mouth = CLOSED) -> Frame:
    """The whole frame, with its landmarks and crop rectangle."""
    image = draw_region(pose, mouth, (0, 0, FRAME_WIDTH, FRAME_HEIGHT))
    return Frame(image, landmarks(pose, mouth), crop_rectangle(pose))


def pose_track(n_frames: int, *, fps: int = 25, seed: int = 5) -> list[Pose]:
    """Slow sway and tilt, and a blink every few seconds."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_frames) / fps

    def drift(size: float, *periods_s: float) -> Float32:
        waves = [np.sin(2 * np.pi * (t / period + rng.random())) / (i + 1) for i, period in enumerate(periods_s)]
        total = sum(1 / (i + 1) for i in range(len(periods_s)))
        moved: Float32 = (size * np.sum(waves, axis=0) / total).astype(np.float32)
        return moved

    x, y = drift(MAX_SWAY, 5.3, 2.9, 1.7), drift(0.5 * MAX_SWAY, 4.1, 2.3)
    tilt = drift(MAX_TILT, 6.1, 3.3)
    blink = np.zeros(n_frames, np.float32)
    at = int(rng.integers(20, 40))
    while at < n_frames:
        for i, shut in enumerate((0.5, 1.0, 1.0, 0.625, 0.25)):
            if at + i < n_frames:
                blink[at + i] = shut
        at += int(rng.integers(50, 95))
    return [Pose(*(float(v) for v in row)) for row in zip(x, y, tilt, blink, strict=True)]
