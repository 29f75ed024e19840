"""The page in a real browser, and its functions over HTTP: the app runs as a process of its own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
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
    temporary = output.parent / "temporary"  # so that the pictures are not in it, which Gradio would send by itself
    temporary.mkdir()
    with (output.parent / "log").open("w") as log:
        app = subprocess.Popen(
            [*command, "--output", str(output), "--lora", str(adapters)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
        )
        try:
            end = time.monotonic() + SECONDS
            while f"http://127.0.0.1:{port}" not in (output.parent / "log").read_text():
                assert app.poll() is None and time.monotonic() < end, (output.parent / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
            app.send_signal(signal.SIGINT)
            assert app.wait(SECONDS) == 0, (output.parent / "log").read_text()
            assert "echo4o_hf/" not in (output.parent / "log").read_text(), "a trace of ours"
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
    with pytest.raises(AppError, match=r"^broken\.png cannot be read as a picture$"):
        draw(client, "a cat", [tmp_path / "broken.png"])


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_client_names_no_files_of_the_server(url: str, client: Client, picture: Path, meta: dict) -> None:
    reference = {"image": {"path": str(picture), **meta}, "caption": None}
    drawing = ["make it blue", [reference], 1, 2, 3, False, True, 64, 64, *DEFAULTS, "", None]
    assert not send(url, client, "draw", drawing)
    assert not send(url, client, "ask", [{"text": "what is it?", "files": [{"path": str(picture), **meta}]}, None])
    drawing[1] = []
    assert send(url, client, "draw", drawing)


def send(url: str, client: Client, name: str, data: list) -> bool:
    """Whether a call succeeds whose data no client has looked at."""
    number = next(one["id"] for one in client.config["dependencies"] if one["api_name"] == name)
    session = uuid.uuid4().hex
    httpx.post(f"{url}/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session})
    with httpx.stream("GET", f"{url}/gradio_api/queue/data?session_hash={session}", timeout=SECONDS) as stream:
        messages = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
        return next(one["success"] for one in messages if one["msg"] == "process_completed")


@pytest.mark.parametrize("adapter", ["/etc", "some/name"])
def test_a_client_names_no_other_adapters(client: Client, adapter: str) -> None:
    with pytest.raises(AppError) as refusal:
        client.predict("a cat", [], 1, 2, 3, False, True, 64, 64, *DEFAULTS[:-2], adapter, 1.0, api_name="/draw")
    assert str(refusal.value) == f"Value: {adapter} is not in the list of choices: ['none', 'strong']"


def ask(client: Client, text: str, *files: Path) -> list:
    *_, run = client.predict({"text": text, "files": [handle_file(path) for path in files]}, api_name="/ask")
    return client.predict(20, 0, "none", 1, run, api_name="/answer")[0]


def test_a_question_that_cannot_be_answered_goes_back(url: str, picture: Path, tmp_path: Path) -> None:
    client = Client(url, verbose=False, analytics_enabled=False)
    assert [one["role"] for one in ask(client, "Describe the picture.", picture)] == ["user", "user", "assistant"]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(AppError, match=r"^broken\.png cannot be read as a picture$"):
        ask(client, "and this one?", tmp_path / "broken.png")
    conversation = ask(client, "what is it?")
    assert [one["role"] for one in conversation] == ["user", "user", "assistant"] + ["user", "assistant"]
    assert "a drawing of" in conversation[2]["content"][0]["text"]
    assert conversation[3]["content"][0]["text"] == "what is it?"


def test_one_question_at_a_time(url: str) -> None:
    client = Client(url, verbose=False, analytics_enabled=False)
    with pytest.raises(AppError, match="Ask something first"):
        client.predict(20, 0, "none", 1, api_name="/answer")
    client.predict({"text": "what is it?", "files": []}, api_name="/ask")
    with pytest.raises(AppError, match="Wait for the answer, or stop it"):
        client.predict({"text": "and now?", "files": []}, api_name="/ask")


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
def test_after_an_error_the_page_goes_on(page: Page, picture: Path, tmp_path: Path) -> None:
    errors = page.locator("[data-testid=toast-text]")
    page.locator("#prompt textarea").fill("two red circles")
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("1 image in")
    page.locator("#prompt textarea").fill("")
    page.locator("#generate").click()
    expect(errors.filter(has_text="a prompt must hold text")).to_be_visible()
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#status")).not_to_contain_text("image")
    expect(page.get_by_text("Error", exact=True)).to_have_count(0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.locator("#references input[type=file]").set_input_files([picture, tmp_path / "broken.png"])
    expect(errors.filter(has_text="broken.png cannot be read as a picture")).to_be_visible()
    expect(page.locator("#references img")).to_have_count(1)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#question input[type=file]").set_input_files(picture)
    expect(page.locator("#question img")).to_be_visible()
    page.locator("#question textarea").press("Enter")
    expect(errors.filter(has_text="Write a question")).to_be_visible()
    page.locator("#question textarea").fill("what is it? " * 200)
    page.keyboard.press("Enter")
    expect(errors.filter(has_text="shorten it")).to_be_visible()
    expect(page.locator("#stop-chat")).to_be_disabled()
    expect(page.get_by_text("Error", exact=True)).to_have_count(0)
    expect(page.locator("#question img")).to_be_visible()
    page.locator("#question textarea").fill("Describe the picture.")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .bot").last).to_contain_text("a drawing of")
    page.locator("#chat").get_by_label("Clear").click()
    expect(page.locator("#chat .user")).to_have_count(0)
    page.locator("#question textarea").fill("and now?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .user")).to_have_count(1)


@pytest.mark.slow
def test_stop_is_for_its_tab(page: Page, output: Path) -> None:
    pictures = len(list(output.iterdir())) if output.exists() else 0
    begin_a_long_run(page)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#question textarea").fill("what is it?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .user")).to_be_visible()
    page.get_by_role("tab", name="Images").click()
    page.locator("#prompt textarea").press("Shift+Enter")
    expect(page.locator("[data-testid=toast-text]")).to_contain_text("Wait for the images, or stop them")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"Stopped after \d?\d of 100 steps"))
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat .bot").last).not_to_be_empty()
    expect(page.locator("#stop-chat")).to_be_disabled()
    assert len(list(output.iterdir())) == pictures


@pytest.mark.slow
def test_stop_in_chat_leaves_the_drawing(page: Page, output: Path) -> None:
    begin_a_long_run(page)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#question textarea").fill("what is it?")
    page.keyboard.press("Enter")
    page.locator("#stop-chat").click()
    page.get_by_role("tab", name="Images").click()
    expect(page.locator("#status")).to_contain_text("8 images in")
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#question textarea")).to_have_value("what is it?")
    expect(page.locator("#chat .user")).to_have_count(0)


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
