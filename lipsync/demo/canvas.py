"""Painting with soft shapes: smooth curves filled or stroked with Pillow, blurred, and blended in layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Float32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]
Points = Sequence[tuple[float, float]] | npt.NDArray[np.floating]
Colour = tuple[float, float, float]

OVERSAMPLING = 2
"""Shapes are drawn this many times larger than the canvas and averaged down: smooth edges."""
CURVE_STEPS = 8
"""Straight pieces for each stretch of a curve between two of its points."""


def curve(points: Points, *, closed: bool = False) -> Float32:
    """A smooth curve through points (centripetal enough: a uniform Catmull-Rom spline). Returns (n, 2) float32."""
    p = np.asarray(points, np.float32)
    if closed:
        p = np.concatenate((p[-1:], p, p[:2]))
    else:
        p = np.concatenate((2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]))
    t = (np.arange(CURVE_STEPS, dtype=np.float32) / CURVE_STEPS)[None, :, None]
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    path = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    path = path.reshape(-1, 2)
    return (path if closed else np.concatenate((path, p[-2:-1]))).astype(np.float32)


def oval(x: float, y: float, radius_x: float, radius_y: float, turn: float = 0.0) -> Float32:
    """An ellipse around (x, y), turned by `turn` radians. Returns (40, 2) float32."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    dx, dy = radius_x * np.cos(t), radius_y * np.sin(t)
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack((x + dx * cos - dy * sin, y + dx * sin + dy * cos), axis=1).astype(np.float32)


class Canvas:
    """A picture under construction: colour and coverage, in float.

    Args:
        width, height: size in units.
        origin: where the unit coordinates (0, 0) are, from the top left, in units.
        scale: pixels a unit.

    `colour`: (h, w, 3) float32 RGB 0..255. `alpha`: (h, w) float32 0..1.
    """

    def __init__(self, width: int, height: int, *, origin: tuple[float, float] = (0, 0), scale: int = 1) -> None:
        self.size = (width * scale, height * scale)
        self.origin = np.array(origin, np.float32)
        self.scale = scale
        self.colour = np.zeros((self.size[1], self.size[0], 3), np.float32)
        self.alpha = np.zeros((self.size[1], self.size[0]), np.float32)

    def grid(self) -> tuple[Float32, Float32]:
        """The unit coordinates of every pixel: x (1, w) and y (h, 1)."""
        x = (np.arange(self.size[0], dtype=np.float32) + 0.5) / self.scale - self.origin[0]
        y = (np.arange(self.size[1], dtype=np.float32) + 0.5) / self.scale - self.origin[1]
        return x[None, :], y[:, None]

    def _draw(self, paths: Sequence[Floats], width: float | None, blur: float) -> Float32:
        zoom = self.scale * OVERSAMPLING
        image = Image.new("L", (self.size[0] * OVERSAMPLING, self.size[1] * OVERSAMPLING))
        draw = ImageDraw.Draw(image)
        for path in paths:
            flat = ((path + self.origin) * zoom).ravel().tolist()
            if width is None:
                draw.polygon(flat, fill=255)
            else:
                draw.line(flat, fill=255, width=max(1, round(width * zoom)), joint="curve")
        image = image.reduce(OVERSAMPLING)
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur * self.scale))
        coverage: Float32 = np.asarray(image, np.float32) / np.float32(255)
        return coverage

    def fill(self, *paths: Floats, blur: float = 0.0) -> Float32:
        """Coverage of closed paths: (h, w) float32 0..1. `blur` is a standard deviation in units."""
        return self._draw(paths, None, blur)

    def stroke(self, *paths: Floats, width: float, blur: float = 0.0) -> Float32:
        """Coverage of lines of so many units' width: (h, w) float32 0..1."""
        return self._draw(paths, width, blur)

    def paint(self, coverage: Floats, colour: Colour | Floats, opacity: float = 1.0, *, on_top: bool = True) -> None:
        """Blend a colour, or an (h, w, 3) picture, over what is there.

        `on_top=False` keeps the picture's own coverage: shading stays on what is painted already.
        """
        weight = coverage.astype(np.float32) * np.float32(opacity)
        if on_top:
            alpha = weight + self.alpha * (1 - weight)
            share = np.divide(weight, alpha, out=np.zeros_like(weight), where=alpha > 1e-4)
            self.alpha = alpha
        else:
            share = weight
        self.colour += (np.asarray(colour, np.float32) - self.colour) * share[..., None]

    def image(self) -> Image.Image:
        """The picture as RGBA."""
        pixels = np.concatenate((self.colour, self.alpha[..., None] * 255), axis=2)
        return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8), "RGBA")
