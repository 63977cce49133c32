"""The page by keyboard, with a screen reader, on a phone, and in dark and light."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.async_api import expect

from tests.serving import ServerProcess
from tests.web.conftest import Visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

IN_ORDER = ["theme", "model", "play", "microphone", "interrupt", "repeat", "hear", "file"]
"""Ids, as Tab goes through them."""
SMALLEST_TARGET_PX = 24  # WCAG 2.2, 2.5.8
ENOUGH_CONTRAST = 4.5  # WCAG 2.2, 1.4.3

BOXES = """[...document.querySelectorAll("button, select, label[for=file], #face, .checks label, #charts svg")]
    .map((element) => [element.id || element.textContent, element.getBoundingClientRect().toJSON()])"""
# Colours of each text that can be seen, and of what lies behind it, as [r, g, b].
COLOURS = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgb = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const behind = (element) => {
        for (; element !== null; element = element.parentElement) {
            const colour = rgb(getComputedStyle(element).backgroundColor);
            if (colour[3] === 255) {
                return colour.slice(0, 3);
            }
        }
        return [255, 255, 255];
    };
    const texts = [...document.querySelectorAll("body *")].filter((element) =>
        [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim() !== "") &&
        element.getClientRects().length > 0 && !element.matches(":disabled, option"));
    return texts.map((element) =>
        [element.textContent.trim(), rgb(getComputedStyle(element).color).slice(0, 3), behind(element)]);
}"""


def contrast(one: list[int], other: list[int]) -> float:
    """Of two colours, by WCAG: 1 to 21."""

    def luminance(colour: list[int]) -> float:
        linear = [value / 3294.6 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


async def test_by_keyboard(visit: Visit, server: ServerProcess) -> None:
    """Every control is reached, shows that it is, and has a name; keys do what clicks do."""
    visitor = await visit(server.web_url)
    page = visitor.page
    await visitor.ready("anna")
    await expect(page.locator("#gallery button")).to_have_count(2)
    await page.evaluate("document.activeElement.blur()")
    reached: list[dict[str, Any]] = []
    while True:
        await page.keyboard.press("Tab")
        focused = await page.evaluate(
            """() => {
                const element = document.activeElement;
                if (element === document.body) {
                    return null;
                }
                const seen = element.id === "file" ? document.querySelector("label[for=file]") : element;
                const { outlineStyle, outlineWidth } = getComputedStyle(seen);
                return { id: element.id, text: element.textContent, outline: `${outlineStyle} ${outlineWidth}` };
            }"""
        )
        if focused is None or len(reached) > 50:
            break
        reached.append(focused)
    ids = [control["id"] for control in reached]
    assert [name for name in ids if name in IN_ORDER] == IN_ORDER
    assert [control["text"][:3] for control in reached if not control["id"]] == ["To ", "ann", "ben"]
    assert all(control["outline"].startswith(("solid", "auto")) for control in reached)

    # as a screen reader finds them
    for role, name in (
        ("button", "Play"),
        ("button", "Microphone"),
        ("button", "Interrupt"),
        ("button", "Use the dark theme"),
        ("combobox", "Model"),
        ("checkbox", "Repeat"),
        ("checkbox", "Hear myself, delayed"),
        ("button", "Choose a sound file"),
        ("img", "The face of anna"),
        ("heading", "lipsync"),
    ):
        await expect(page.get_by_role(role, name=name, exact=role == "heading")).to_have_count(1)  # type: ignore[arg-type]
    assert await page.locator("#charts svg:not([aria-label])").count() == 0
    assert await page.get_attribute("#status", "aria-live") == "polite"
    assert await page.get_attribute("#error", "role") == "alert"

    for key in ("Enter", "Space"):
        await page.focus("#play")
        await page.keyboard.press(key)
        await expect(page.locator("#play")).to_have_attribute("aria-pressed", "true")
        await visitor.until("lipsync.player.shown.speaking")
        await page.focus("#interrupt")
        await page.keyboard.press(key)
        await expect(page.locator("#play")).to_have_attribute("aria-pressed", "false")
        await visitor.until("!lipsync.player.shown.speaking")
    await page.locator("#gallery button").nth(1).focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#model")).to_have_value("ben")
    await visitor.until("face.width === 640 && face.height === 360")


async def test_any_width(visit: Visit, server: ServerProcess) -> None:
    """Nothing lies outside of it, while the page says its longest words, and fingers can hit every control."""
    visitor = await visit(server.web_url)
    page = visitor.page
    await visitor.ready("anna")
    await visitor.drop(f"a-{'long-' * 12}name.wav", b"no sound")
    await visitor.says("error", "long-long")
    for width in (1280, 768, 390, 320):
        await page.set_viewport_size({"width": width, "height": 640})
        assert await page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        for name, box in await page.evaluate(BOXES):
            assert box["left"] >= 0 and box["right"] <= width, (width, name)
            assert min(box["width"], box["height"]) >= SMALLEST_TARGET_PX, (width, name)


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_dark_and_light(visit: Visit, server: ServerProcess, theme: str) -> None:
    """As the system has it, or the other one if that is wanted, and remembered; every text can be read in both."""
    visitor = await visit(server.web_url, color_scheme=theme)
    page = visitor.page
    await visitor.ready("anna")
    await visitor.drop("notes.txt", b"no sound")
    await visitor.says("error", "notes.txt")
    other = {"dark": "light", "light": "dark"}[theme]
    for now in (theme, other):
        assert await page.evaluate("document.documentElement.dataset.theme") == now
        await page.wait_for_timeout(200)  # colours take 120 ms to change
        texts = await page.evaluate(COLOURS)
        assert len(texts) > 20
        pale = {text: contrast(colour, behind) for text, colour, behind in texts}
        assert {text: value for text, value in pale.items() if value < ENOUGH_CONTRAST} == {}
        background = next(behind for text, _, behind in texts if text == "lipsync")
        assert (sum(background) < 3 * 128) == (now == "dark")
        if now == theme:
            await page.click("#theme")
    await page.reload()
    assert await visitor.until("document.documentElement.dataset.theme") == other
