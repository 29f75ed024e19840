"""The page in a real browser, and its functions over HTTP: the app runs as a process of its own."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from echo4o_hf.app.studio import settings_of

from .conftest import MODEL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 180  # to wait for at most, which a busy machine may take to load everything
DEFAULTS = (4.0, True, 2.0, 0.0, 1.0, "text_channel", False, 100, "none", 1.0)  # guidance, thinking, adapter


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("app") / "pictures"


@pytest.fixture(scope="module")
def url(output: Path, adapters: Path) -> Iterator[str]:
    """Where the app is, started by its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "echo4o_hf.cli", "app", "--model", MODEL, "--port", str(port)]
    with (output.parent / "log").open("w") as log:
        app = subprocess.Popen(
            [*command, "--output", str(output), "--lora", str(adapters)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            end = time.monotonic() + SECONDS
            while f"http://127.0.0.1:{port}" not in (output.parent / "log").read_text():
                assert app.poll() is None and time.monotonic() < end, (output.parent / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
            app.send_signal(signal.SIGINT)
            assert app.wait(SECONDS) == 0, (output.parent / "log").read_text()
            assert "Traceback" not in (output.parent / "log").read_text()
        finally:
            app.kill()


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, which asks no other host for anything and has no errors in its console."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    yield page
    page.close()
    assert all(address.startswith((url, "data:", "blob:")) for address in asked), asked
    assert not errors


def draw(client: Client, prompt: str, references: list[Path], seed: int | None = 3, random: bool = False) -> tuple:
    uploads = [{"image": handle_file(path), "caption": None} for path in references]
    return client.predict(prompt, uploads, 1, 2, seed, random, True, 64, 64, *DEFAULTS, api_name="/draw")


def test_draw_over_http(client: Client, picture: Path, output: Path) -> None:
    gallery, plan, status, seed = draw(client, "make it blue", [picture, picture])
    images = gallery["value"] if isinstance(gallery, dict) and "value" in gallery else gallery
    downloaded = Path(images[0]["image"])
    settings = settings_of(downloaded)
    assert settings["prompt"] == "make it blue" and settings["seed"] == seed == 3
    assert [one["file"] for one in settings["parameters"]["image"]] == ["circle.png"] * 2
    assert downloaded.read_bytes() in [path.read_bytes() for path in output.iterdir()]
    assert re.fullmatch(r"1 image in [0-9.]+ s", status)


@pytest.mark.parametrize(
    ("prompt", "seed", "message"),
    [(" ", 1, "a prompt must hold text"), ("a cat", None, "Give a seed"), ("a <b>cat</b> " * 300, 1, "shorten it")],
)
def test_errors_say_what_to_do(client: Client, prompt: str, seed: int | None, message: str) -> None:
    with pytest.raises(AppError, match=message):
        draw(client, prompt, [], seed)


def test_a_broken_reference_is_named(client: Client, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(AppError, match="broken.png cannot be read as a picture"):
        draw(client, "a cat", [tmp_path / "broken.png"])


def test_a_prompt_becomes_a_picture_that_holds_its_settings(page: Page, tmp_path: Path) -> None:
    page.locator("#prompt textarea").fill("two red circles on the left and a blue star on the right")
    page.locator("#steps input[type=number]").fill("3")
    page.locator("#generate").click()
    image = page.locator("#gallery .preview img").first
    expect(image).to_be_visible()
    page.wait_for_function("image => image.complete && image.naturalWidth == 64", arg=image.element_handle())
    expect(page.locator("#status")).to_contain_text("1 image in")
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label("Download").first.click()
    download.value.save_as(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as downloaded:
        assert downloaded.text["prompt"] == "two red circles on the left and a blue star on the right"
    settings = settings_of(tmp_path / "image.png")
    assert settings["parameters"]["num_inference_steps"] == 3
    assert page.locator("#seed input").input_value() == str(settings["seed"])


def begin_a_long_run(page: Page) -> None:
    page.locator("#prompt textarea").fill("two red circles")
    page.locator("#steps input[type=number]").fill("100")
    page.get_by_label("number input for Images").fill("8")
    page.locator("#generate").click()
    expect(page.locator("#gallery")).to_contain_text(re.compile(r"[1-9][0-9]*/100 steps"))


@pytest.mark.slow
def test_stop_ends_a_long_run(page: Page, output: Path) -> None:
    pictures = len(list(output.iterdir()))
    expect(page.locator("#stop")).to_be_disabled()
    begin_a_long_run(page)
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"Stopped after \d?\d of 100 steps"))
    expect(page.locator("#generate")).to_be_enabled()
    assert len(list(output.iterdir())) == pictures


@pytest.mark.slow
def test_a_closed_page_stops_its_run(browser: Browser, url: str, client: Client, output: Path) -> None:
    page = browser.new_page()
    page.goto(url)
    pictures = len(list(output.iterdir())) if output.exists() else 0
    begin_a_long_run(page)
    page.close()
    draw(client, "a blue star", [])  # waits for the model
    assert len(list(output.iterdir())) == pictures + 1


@pytest.mark.slow
def test_a_question_is_answered(page: Page, picture: Path) -> None:
    page.get_by_role("tab", name="Chat").click()
    page.locator("#question input[type=file]").set_input_files(picture)
    expect(page.locator("#question img")).to_be_visible()
    page.locator("#question textarea").fill("Describe the picture.")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .user img")).to_be_visible()
    expect(page.locator("#chat .bot").last).to_contain_text("a drawing of")
    expect(page.locator("#stop-chat")).to_be_disabled()


@pytest.mark.slow
def test_editing_with_all_there_is(page: Page, picture: Path, adapters: Path) -> None:
    page.locator("#references input[type=file]").set_input_files([picture, picture])
    expect(page.locator("#references img")).to_have_count(2)
    page.locator("#prompt textarea").fill("make it blue")
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#random-seed input").uncheck()
    page.locator("#seed input").fill("11")
    page.get_by_role("button", name="Thinking").click()
    page.locator("#thinking input").check()
    page.get_by_role("button", name="Guidance").click()
    page.get_by_label("Default for the rest").uncheck()
    page.get_by_label("number input for Image guidance scale").fill("1.5")
    page.get_by_role("button", name="Size").click()
    page.get_by_label("Default", exact=True).uncheck()
    page.get_by_label("number input for Width").fill("48")
    page.get_by_role("button", name="Adapter").click()
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="strong").click()
    page.locator("#generate").click()
    expect(page.locator("#plan textarea")).not_to_have_value("")
    page.locator("#details button").first.click()
    expect(page.locator("#settings")).to_contain_text("strong")
    for text in ('"seed": 11', '"width": 48', '"image_guidance_scale": 1.5', '"thinking": true'):
        expect(page.locator("#settings")).to_contain_text(re.compile(text.replace(": ", r":\s*")))
    page.locator("#reuse").click()
    expect(page.locator("#references img")).to_have_count(3)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(browser: Browser, url: str, picture: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(1000 * SECONDS)
    page.goto(url)
    page.locator("#references input[type=file]").set_input_files([picture] * 4)
    expect(page.locator("#references img")).to_have_count(4)
    frame = page.locator("#references").bounding_box()
    for reference in page.locator("#references img").all():
        box = reference.bounding_box()
        assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
    page.locator("#prompt textarea").fill("two red circles")
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#generate").click()
    expect(page.locator("#gallery .preview img").first).to_be_visible()
    for tab in ("Chat", "Images"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.locator("#gallery .preview img").first.bounding_box()
    assert box["width"] > 300 and box["height"] > 300
    page.close()
