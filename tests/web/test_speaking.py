"""Whatever is said into the page: files of sound, files of something else, a microphone or none."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.serving import ServerProcess
from tests.web.conftest import Visit
from tests.web.sounds import wav

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_files_that_are_no_sound_and_one_that_is(visit: Visit, server: ServerProcess, speech: bytes) -> None:
    """Dropped, and chosen; one of another rate is spoken, and what was wrong before is not said any more."""
    visitor = await visit(server.web_url)
    await visitor.ready("anna")
    for name, content in (("notes.txt", b"no sound"), ("cut.wav", wav(bytes(3200))[:30]), ("empty.wav", b"")):
        await visitor.drop(name, content)
        await visitor.says("error", name, "is not a sound file")
        await visitor.says("status", "stopped")
        await expect(visitor.page.locator("#play")).to_be_enabled()
    loud = wav(speech[16_000:48_000], rate_hz=44_100)
    await visitor.page.set_input_files("#file", files=[{"name": "fast.wav", "mimeType": "audio/wav", "buffer": loud}])
    await visitor.says("status", "speaking", "fast.wav")
    await expect(visitor.page.locator("#error")).to_be_empty()
    await visitor.says("status", "done")
    assert await visitor.page.evaluate("probe.draws.filter(({ speaking }) => speaking).length") > 4  # of 9


async def test_the_face_speaks_what_the_microphone_hears(visit: Visit, server: ServerProcess) -> None:
    """The same frame of the video with one sound and another is another picture. It can be heard, too, if wanted."""
    visitor = await visit(server.web_url, granted=["microphone"])
    await visitor.ready("anna")
    await visitor.page.click("#microphone")
    await visitor.says("status", "listening")
    await expect(visitor.page.locator("#microphone")).to_have_attribute("aria-pressed", "true")
    await visitor.until(
        """(() => {
            const pictures = {}; // of a frame of the video
            for (const { frame_id, jpeg, speaking } of probe.draws) {
                if (speaking) {
                    (pictures[frame_id] ??= new Set()).add(jpeg.join());
                }
            }
            return Object.values(pictures).filter(({ size }) => size > 1).length > 3;
        })()"""
    )
    assert await visitor.page.evaluate("probe.level") == 0
    await visitor.page.check("#hear")
    await visitor.until("probe.level > 0.01")
    await visitor.page.uncheck("#hear")
    await visitor.until("probe.level === 0")
    await visitor.page.click("#microphone")
    await visitor.until("!lipsync.player.shown.speaking")
    await expect(visitor.page.locator("#microphone")).to_have_attribute("aria-pressed", "false")


async def test_a_microphone_that_is_denied(visit: Visit, server: ServerProcess) -> None:
    visitor = await visit(server.web_url)
    await visitor.ready("anna")
    await visitor.page.click("#microphone")
    await visitor.says("error", "not allowed to use the microphone")
    await visitor.says("status", "stopped")
    await expect(visitor.page.locator("#microphone")).to_have_attribute("aria-pressed", "false")


async def test_a_model_without_ears(visit: Visit, server: ServerProcess, speech: bytes) -> None:
    visitor = await visit(server.web_url)
    await visitor.ready("ben")
    await visitor.drop("speech.wav", wav(speech[:32_000]))
    await visitor.says("error", "audio encoder")
