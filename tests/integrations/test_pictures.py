"""JPEGs into pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lipsync.errors import MediaError
from lipsync.integrations.pictures import decoded


@pytest.mark.parametrize("size", [(64, 48), (322, 178)])  # rows of the second are padded in memory
def test_pixels_are_those_of_another_decoder(size: tuple[int, int]) -> None:
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    drawn = np.stack((x * 255 // width, y * 255 // height, (x + y) % 256 // 2), axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=95)
    picture = decoded(buffer.getvalue())
    assert (picture.width, picture.height) == size
    pixels = np.frombuffer(picture.rgb, np.uint8).reshape(height, width, 3).astype(int)
    other = np.asarray(Image.open(buffer)).astype(int)
    assert abs(pixels - other).mean() < 2  # they do not interpolate colours alike
    assert abs((pixels - other).mean(axis=(0, 1))).max() < 1


@pytest.mark.parametrize("jpeg", [b"", b"\xff\xd8 no jpeg \xff\xd9"])
def test_what_is_no_jpeg_is_refused(jpeg: bytes) -> None:
    with pytest.raises(MediaError, match=f"{len(jpeg)} bytes"):
        decoded(jpeg)
