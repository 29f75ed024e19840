"""Whom a stop reaches, and which files a page may name."""

from pathlib import Path

import gradio as gr
import pytest
from gradio.utils import get_upload_folder

from echo4o_hf.app.images import ImagesTab
from echo4o_hf.app.session import Runs, uploaded
from echo4o_hf.app.studio import Studio

PAGE, OTHER = gr.Request(session_hash="page"), gr.Request(session_hash="other")


def test_stop_reaches_all_runs_of_its_page_and_tab(studio: Studio) -> None:
    images, chat = Runs(studio), Runs(studio)
    first, second, question, others = images.begin(PAGE), images.begin(PAGE), chat.begin(PAGE), images.begin(OTHER)
    with (
        images.during(PAGE, first) as one,
        chat.during(PAGE, question) as asked,
        images.during(OTHER, others) as other,
    ):
        images.stop(PAGE)
        assert one.is_set() and not asked.is_set() and not other.is_set()
    with images.during(PAGE, second) as two:
        assert two.is_set(), "it waited"


def test_the_end_of_a_run_is_not_that_of_another(studio: Studio) -> None:
    runs = Runs(studio)
    first, second = runs.begin(PAGE), runs.begin(PAGE)
    with runs.during(PAGE, first):
        pass
    runs.end(PAGE, first)
    assert runs.there_are(PAGE) and not runs.there_are(OTHER)
    with runs.during(PAGE, second) as stop:
        runs.stop(PAGE)
        assert stop.is_set()
    assert not runs.there_are(PAGE)
    with runs.during(PAGE, runs.begin(PAGE)) as stop:
        assert not stop.is_set(), "a stop is for what there was"


def test_a_page_that_goes_stops_what_runs_and_what_waits(studio: Studio) -> None:
    runs = Runs(studio)
    first, second = runs.begin(PAGE), runs.begin(PAGE)
    with runs.during(PAGE, first) as one, runs.during(OTHER, "") as other:
        runs.leave(PAGE)
        assert one.is_set() and not other.is_set()
        assert not runs.there_are(PAGE) and runs.there_are(OTHER)
    with runs.during(PAGE, second) as two:
        assert two.is_set()


def test_a_run_that_fails_is_over(studio: Studio) -> None:
    runs = Runs(studio)
    with (
        pytest.warns(UserWarning, match="shorten it"),  # what the page shows
        pytest.raises(gr.Error, match="shorten it"),
        runs.during(PAGE, runs.begin(PAGE)),
    ):
        raise ValueError("shorten it")
    assert not runs.there_are(PAGE)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "docs/app.png", f"{get_upload_folder()}/../app.png", "http://localhost/a.png"]
)
def test_files_that_no_page_has_sent(studio: Studio, path: str) -> None:
    with pytest.raises(gr.Error, match=f"^'{Path(path).name} was not uploaded"):
        uploaded([path])
    with pytest.raises(gr.Error, match="was not uploaded"):
        ImagesTab(studio).reuse("image.png", [(path, None)])


def test_references_that_are_no_pictures_are_not_kept(studio: Studio, picture: Path) -> None:
    folder = Path(get_upload_folder()) / "4567"
    folder.mkdir(parents=True, exist_ok=True)
    whole, broken = folder / "circle.png", folder / "broken.png"
    whole.write_bytes(picture.read_bytes())
    broken.write_bytes(picture.read_bytes()[:99])
    tab = ImagesTab(studio)
    with pytest.warns(UserWarning, match=r"^broken\.png cannot be read as a picture$"):
        assert tab.check([(str(whole), "caption"), (str(broken), None)]) == [(str(whole), None)]
    assert tab.check([(str(whole), None)]) == gr.skip()


def test_files_that_a_page_has_sent() -> None:
    path = Path(get_upload_folder()) / "0123" / "photo.jpg"
    assert uploaded([str(path)]) == [path]
