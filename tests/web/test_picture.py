"""What is on the canvas is what the server made, pixel by pixel."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lipsync import Client, SpeechOptions
from tests.serving import ServerProcess
from tests.web.conftest import Visit
from tests.web.sounds import wav
from tests.web.visitor import Visitor

pytestmark = pytest.mark.asyncio(loop_scope="session")

COMPARED = 4  # frames
OFF_BY_MEAN, OFF_BY_MOST = 0.5, 24  # of 255, between two decoders of JPEG

# What is drawn at this moment, and what the browser makes of a JPEG elsewhere.
LOOK = """() => {
    const canvas = document.getElementById("face");
    const { frame_id, jpeg } = lipsync.player.shown;
    window.seen = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return [frame_id, jpeg.toBase64 ? jpeg.toBase64() : btoa(String.fromCharCode(...jpeg))];
}"""
DECODE = """async (jpeg) => {
    const bytes = Uint8Array.from(atob(jpeg), (letter) => letter.charCodeAt(0));
    const blob = new Blob([bytes], { type: "image/jpeg" });
    const picture = await createImageBitmap(blob, { colorSpaceConversion: "none" });
    const context = new OffscreenCanvas(picture.width, picture.height).getContext("2d", { alpha: false });
    context.drawImage(picture, 0, 0);
    const { data } = context.getImageData(0, 0, picture.width, picture.height);
    const isSame = data.length === seen.length && data.every((value, at) => value === seen[at]);
    return [picture.width, picture.height, isSame, btoa([...seen].map((value) => String.fromCharCode(value)).join(""))];
}"""


async def check_canvas(visitor: Visitor, client: Client, model: str) -> int:
    """The number of the frame that is drawn now, which is the same frame over gRPC."""
    visitor.expect_problems("willReadFrequently")  # to look at the canvas is slow
    frame_id, shown = await visitor.page.evaluate(LOOK)
    frame = await client.frame(model, frame_id)
    assert base64.b64decode(shown) == frame.jpeg
    width, height, is_same, pixels = await visitor.page.evaluate(DECODE, base64.b64encode(frame.jpeg).decode())
    assert is_same
    canvas = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 4)[..., :3]
    with Image.open(io.BytesIO(frame.jpeg)) as picture:
        off = np.abs(canvas.astype(int) - np.asarray(picture.convert("RGB")))
    assert off.mean() < OFF_BY_MEAN and off.max() <= OFF_BY_MOST, (off.mean(), off.max())
    return int(frame_id)


async def test_the_canvas_is_the_frame_of_grpc(visit: Visit, server: ServerProcess) -> None:
    visitor = await visit(server.web_url)
    await visitor.ready("anna")
    await visitor.page.click("#play")
    async with Client(server.address) as client:
        seen: set[int] = set()
        while len(seen) < COMPARED:
            await visitor.until(
                f"lipsync.player.shown.speaking && !{sorted(seen)}.includes(lipsync.player.shown.frame_id)"
            )
            seen.add(await check_canvas(visitor, client, "anna"))


async def test_another_model_has_another_canvas(visit: Visit, server: ServerProcess) -> None:
    """And one without a recording is played silently, which is said."""
    visitor = await visit(server.web_url)
    visitor.expect_problems("404")  # the browser itself writes down that there is none
    await visitor.ready("ben")
    assert await visitor.page.evaluate("[face.width, face.height]") == [360, 480]
    await visitor.page.click("#play")
    await visitor.says("status", "ben", "silently")
    await visitor.until("lipsync.player.shown.speaking")
    async with Client(server.address) as client:
        await check_canvas(visitor, client, "ben")


async def test_a_spoken_file_is_the_session_of_grpc(visit: Visit, server: ServerProcess, speech: bytes) -> None:
    """Frame by frame, from where the video was."""
    visitor = await visit(server.web_url)
    await visitor.ready("anna")
    said = speech[: 16_000 * 2]
    start = await visitor.page.evaluate("lipsync.stage.nextFrame")
    await visitor.drop("a second.wav", wav(said))
    await visitor.says("status", "speaking", "a second.wav")
    await visitor.says("status", "done")
    drawn: list[Any] = await visitor.page.evaluate(
        """probe.draws.filter(({ end_sample }) => end_sample > 0)
            .map(({ first_sample, jpeg }) => [first_sample, btoa(String.fromCharCode(...jpeg))])"""
    )
    async with Client(server.address) as client:
        async with client.speech("anna", SpeechOptions(start_frame=start)) as session:
            await session.send(said)
            await session.flush()
            await session.end()
            made = {event.first_sample: event.frame.jpeg async for event in session if event.frame is not None}
    both = [(jpeg, made[first]) for first, jpeg in drawn if first in made]
    assert len(both) > 10  # of 25: a slow machine leaves some out
    assert all(base64.b64decode(jpeg) == wanted for jpeg, wanted in both)
