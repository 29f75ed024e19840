"""Items and judge texts: where they come from, what is checked, and what a user reads when something is wrong."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from echo4o_hf.benchmarks import items
from echo4o_hf.benchmarks.items import items_sha256, load_items, official_text

UPSTREAM = Path(__file__).parents[3] / "shared" / "upstream-data"
FILES = {"geneval_pp": "Geneval++.jsonl", "imagine_bench": "Imagine.jsonl"}
upstream = pytest.mark.skipif(not UPSTREAM.is_dir(), reason="the official files are not here")

KITES = {"tag": "counting", "prompt": "A photo of three kites", "include": [{"class": "kite", "count": 3}]}
CUBE = {"id": 4, "type": "SHAPE", "instruction": "A photo of a cube-shaped orange.", "note": "Peel and color stay."}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@upstream
@pytest.mark.parametrize(("name", "number"), [("geneval_pp", 280), ("imagine_bench", 270)])
def test_the_pinned_items_are_downloaded_once(
    name: str, number: int, mirror: Callable[..., Path], tmp_path: Path
) -> None:
    content = (UPSTREAM / FILES[name]).read_bytes()
    served = mirror(items.ITEMS, name, content, sha256=items.ITEMS[name].sha256)
    assert len(load_items(name)) == number
    served.unlink()
    (cached,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    (tmp_path / "new").touch()
    assert cached.stat().st_mode == (tmp_path / "new").stat().st_mode  # a cache may be shared
    assert items_sha256(load_items(name)) == items_sha256(load_items(name, UPSTREAM / FILES[name]))


def test_another_file_than_the_pinned_one_is_refused(mirror: Callable[..., Path], tmp_path: Path) -> None:
    mirror(items.ITEMS, "geneval_pp", json.dumps(KITES).encode(), sha256="0" * 64)
    with pytest.raises(OSError, match=f"sha256 .*expected {'0' * 64}"):
        load_items("geneval_pp")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_spoilt_cache_is_downloaded_again(mirror: Callable[..., Path], tmp_path: Path) -> None:
    mirror(items.ITEMS, "geneval_pp", json.dumps(KITES).encode())
    assert load_items("geneval_pp") == [KITES]
    (cached,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    cached.write_text("spoilt")
    assert load_items("geneval_pp") == [KITES]


def test_a_missing_file_says_what_to_do(mirror: Callable[..., Path]) -> None:
    mirror(items.ITEMS, "geneval_pp", b"").unlink()
    with pytest.raises(OSError, match=r"404.*load_items\('geneval_pp', path=\.\.\.\) or --items.*mirror"):
        load_items("geneval_pp")


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"offline mode.*load_items\('imagine_bench', path=\.\.\.\) or --items"):
        load_items("imagine_bench")
    with pytest.raises(OSError, match=r"--judge-text, .*path=\.\.\.\)\), use protocol='strict'"):
        official_text("imagine_bench")


def test_no_server_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(items.SOURCE_VARIABLE, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"Connection refused.*--items"):
        load_items("imagine_bench")


def test_a_users_file(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", KITES, "", {**KITES, "exclude": [{"class": "kite", "count": 4}]}, "")
    assert [item.get("exclude") for item in load_items("geneval_pp", path)] == [None, [{"class": "kite", "count": 4}]]
    assert load_items("imagine_bench", str(write(tmp_path / "im.jsonl", CUBE))) == [CUBE]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "expected an object with include, prompt, tag; got []"),
        ({"tag": "counting", "prompt": "x"}, "include missing"),
        ({**KITES, "tag": "color"}, "tag must be one of color_attr, .*; got 'color'"),
        ({**KITES, "tag": []}, "tag must be one of"),
        ({**KITES, "prompt": " "}, "prompt must be a text that is not empty; got ' '"),
        ({**KITES, "include": []}, "include must be a list of clauses"),
        ({**KITES, "notes": "x"}, "unknown key notes"),
        ({**KITES, "include": [{"class": "kite"}]}, "count missing"),
        ({**KITES, "include": [{"class": "kite", "count": True}]}, "count must be a whole number from 1; got True"),
        ({**KITES, "include": [{"class": "kite", "count": 0}]}, "got 0"),
        ({**KITES, "include": [{"class": 3, "count": 1}]}, "class must be a text"),
        (
            {**KITES, "include": [{"class": "kite", "count": 1, "region": "top"}]},
            "region must be one of .*; got 'top'",
        ),
        ({**KITES, "include": [{"class": "kite", "count": 1, "size": "big"}]}, "size must be one of .*; got 'big'"),
        ({**KITES, "include": [{"class": "kite", "count": 1, "color": ""}]}, "color must be a text"),
        ({**KITES, "exclude": [{"class": "kite", "count": 4, "color": "red"}]}, "unknown key color"),
    ],
)
def test_file_and_line_of_a_bad_geneval_pp_item(row: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", KITES, row)
    with pytest.raises(ValueError, match=rf"own\.jsonl:2.*{message.replace('[', chr(92) + '[')}"):
        load_items("geneval_pp", path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CUBE, "id": 5, "type": "TWO_OBJECT"}, "type must be one of COLOR, .*; got 'TWO_OBJECT'"),
        ({**CUBE, "id": "5"}, "id must be a whole number from 0; got '5'"),
        ({**CUBE, "id": 5, "note": ""}, "note must be a text that is not empty"),
        ({"id": 5, "instruction": "x", "type": "SIZE"}, "expected an object with exactly id, instruction, note, type"),
        (CUBE, r"has the id of .*own\.jsonl:1: 4"),
    ],
)
def test_file_and_line_of_a_bad_imagine_bench_item(row: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", CUBE, row)
    with pytest.raises(ValueError, match=rf"own\.jsonl:2.*{message}"):
        load_items("imagine_bench", path)


def test_other_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no items"):
        load_items("geneval_pp", write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a UTF-8 text"):
        load_items("geneval_pp", tmp_path / "latin.jsonl")
    with pytest.raises(FileNotFoundError):
        load_items("geneval_pp", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="must be one of geneval_pp, imagine_bench; got 'geneval'"):
        load_items("geneval")


def test_items_sha256_is_of_what_they_say() -> None:
    turned = dict(reversed(KITES.items()))
    assert items_sha256([KITES]) == items_sha256([turned])
    assert len({items_sha256(rows) for rows in ([KITES], [KITES, KITES], [{**KITES, "tag": "x"}], [])}) == 4


@upstream
@pytest.mark.parametrize("name", FILES)
def test_the_pinned_hashes_are_the_files(name: str) -> None:
    assert hashlib.sha256((UPSTREAM / FILES[name]).read_bytes()).hexdigest() == items.ITEMS[name].sha256


@pytest.mark.usefixtures("judge_texts")
def test_judge_texts_are_read_and_never_run() -> None:
    text = official_text("geneval_pp")
    assert text.system == 'You check images.\nReply with {"correct": 1 or 0, "reason": "why"}.\n'
    text = official_text("imagine_bench")
    assert text.system == "You grade images."
    assert text.fill({**CUBE, "note": "{note} %s {"}) == (
        'Three scores, please.\nAsked for: "A photo of a cube-shaped orange."\nMeant: "{note} %s {" {as noted}\n'
    )


@pytest.mark.parametrize(
    "body",
    [
        "user = 'I: {} N: {}'.format(data.get('instruction'), data['note'])",
        "user = 'I: {instruction} N: {note}'.format(instruction=data['instruction'], note=data['note'])",
        "user = 'I: ' + instruction + ' N: ' + note",
        "user = f'\\nI: {instruction} N: {note}\\n'.strip()",
        "user: str = TEMPLATE.format(data['instruction'], data['note'])",
    ],
)
def test_other_forms_of_the_same_text(body: str, tmp_path: Path) -> None:
    script = f"""
TEMPLATE = "I: {{0}} " "N: {{1}}"
def build_messages(data, instruction, note):
    {body}
    return [dict(), {{"role": "system", "content": "S"}}, {{"role": "user", "content": user}}]
"""
    text = official_text("imagine_bench", write(tmp_path / "judge.py", script))
    assert (text.system, text.fill({"instruction": "a", "note": "b"})) == ("S", "I: a N: b")


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("geneval_pp", "PROMPT = 'x'", r"judge\.py: no constant SYSTEM_PROMPT; found PROMPT"),
        ("geneval_pp", "SYSTEM_PROMPT = open('x').read()", r"line 1: expected a text, found open\('x'\)\.read\(\)"),
        ("geneval_pp", "SYSTEM_PROMPT = f'{name}'", "SYSTEM_PROMPT is not a fixed text: line 1"),
        ("geneval_pp", "SYSTEM_PROMPT = ", "is not Python"),
        ("imagine_bench", "def messages(): pass", "no function build_messages; found messages"),
        ("imagine_bench", "def build_messages(): pass", "found 0 system, 0 user"),
        (
            "imagine_bench",
            "def build_messages(a):\n x({'role': 'system', 'content': 'S'}, {'role': 'user', 'content': a['b']})",
            "should name instruction and note; it names b",
        ),
        (
            "imagine_bench",
            "def build_messages(a):\n return [{'role': 'system', 'content': '{x}'.format(y=a)}]",
            r"cannot fill \{x\}; given are y",
        ),
    ],
)
def test_a_file_of_another_form(name: str, script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        official_text(name, write(tmp_path / "judge.py", script))
