"""Names and records: what is found where, and lines of any content."""

import json

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from echo4o_hf.data.layout import (
    SUBSETS,
    Picture,
    Pictures,
    container_folders,
    find_subsets,
    folder_patterns,
    folders_of,
    telling_folders,
    wanted,
)
from echo4o_hf.data.records import read_records

FILES = [
    "README.md",
    "Surrel-Fantasy-Image/conflict.jsonl",
    "Surrel-Fantasy-Image/images/0-5000.tar.gz",
    "surreal/extra/00000.WEBP",
    "Multi-Reference-Image/multi-ic/hum_sce.jsonl",
    "Multi-Reference-Image/multi_refer_images_output/hum_sce/hum_sce.TGZ",
    "Multi-Reference-Image/multi_refer_images_input/instruct/instruct.tar",
    "INSTRUCTION-FOLLOWING/train-00000-of-00001.parquet",
    "Multi-Reference-Image/.cache/x.jsonl",
    "other/x.jsonl",
]


@pytest.mark.parametrize("root", ["", "Echo-4o-Image/"])
def test_files_are_sorted_by_subset_and_kind(root):
    found = find_subsets([root + path for path in FILES], "surreal-data")
    assert list(found) == list(SUBSETS)
    surreal, multi, instruction = found.values()
    assert [path.removeprefix(root) for path in surreal.metadata + surreal.archives + surreal.pictures] == FILES[1:4]
    assert [path.removeprefix(root) for path in multi.metadata] == [FILES[4]]
    assert [path.removeprefix(root) for path in sorted(multi.archives)] == [FILES[6], FILES[5]]
    assert [path.removeprefix(root) for path in instruction.tables] == [FILES[7]]


def test_one_subset_by_the_name_of_its_folder():
    assert find_subsets(["conflict.jsonl", "images/0-5000.tar.gz"], "Surrel-Fantasy-Image").keys() == {SUBSETS[0]}
    assert find_subsets(["multi_refer_images_input/x/x.tar", "ic/x.jsonl"], "Multi-Reference").keys() == {SUBSETS[1]}
    assert find_subsets(["conflict.jsonl", "images/0-5000.tar.gz"], "data") == {}


@pytest.mark.parametrize("subset", SUBSETS)
def test_patterns_for_downloads_cover_the_subset(subset):
    files = find_subsets(FILES)[subset]
    matched = set(filter_repo_objects(FILES, allow_patterns=folder_patterns(subset)))
    assert matched >= {*files.metadata, *files.archives, *files.pictures, *files.tables}
    assert "README.md" not in matched


@pytest.mark.parametrize(
    "path, folders",
    [
        ("/Echo-4o-Image/Surrel-Fantasy-Image/images/00000.jpg", []),
        ("/Echo-4o-Image/Multi-Reference-Image/multi_refer_images_output/a/0.jpg", ["multi_refer_images_output", "a"]),
        ("C:\\data\\Multi-Reference-Image\\Images\\hum\\0.jpg", ["hum"]),
        ("hum/0.jpg", ["hum"]),
        ("../../etc/0.jpg", ["etc"]),
        ("0.jpg", []),
        ("/0.jpg", []),
    ],
)
def test_telling_folders(path, folders):
    assert telling_folders(path) == folders


def test_the_picture_meant():
    pictures = Pictures()
    members = [
        ("M/in/human/human.tar.gz", "images/00000.jpg"),
        ("M/in/sence/sence.tar.gz", "00000.JPG"),
        ("M/out/hum_sce.tar.gz", "00000.jpg"),
        ("M/out/hum_obj/part1.tgz", "hum_obj/00000.png"),
    ]
    for archive, member in members:
        folders = container_folders(archive) | folders_of(member)
        pictures.add(folders, Picture(archive, member, 0, 1))
    known = frozenset(name for archive, _ in members for name in container_folders(archive))

    def meant(path):
        return [members.index((found.container, found.name)) for found in pictures.find(wanted(path, known))]

    assert meant("/E/Multi-R/in/human/00000.jpg") == [0]
    assert meant("/E/Multi-R/in/scene/00000.jpg") == [1]
    assert meant("/E/Multi-R/out/hum_sce/00000.jpg") == [2]
    assert meant("/E/Multi-R/out/hum_obj/00000.jpg") == [3]
    assert meant("/E/Multi-R/in/hum_obj/00000.jpg") == []  # known, but not that one's
    assert meant("/E/Multi-R/out/hum_hum/00000.jpg") == []
    assert meant("/E/Multi-R/out/hum_sce/00001.jpg") == []


TEXT = {"instruction": "draw", "output_image": "/E/Surreal/images/00000.jpg", "type": "T1", "task_type": "t2i"}
PAIR = {"instruction": "join", "input_images": ["in/a/0.jpg"], "output_image": "/E/Multi/out/a/00000.jpg"}


def records_of(subset, *lines):
    return read_records(
        subset, [("x.jsonl", [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines])]
    )


def test_records():
    (record,), problems = records_of(
        "surreal_fantasy", b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n", b"\n", b"  \n"
    )
    assert not problems
    assert (record.id, record.category, record.task_type, record.inputs) == ("surreal_fantasy/00000", "T1", "t2i", ())
    (record,), problems = records_of("multi_reference", PAIR)
    assert (record.id, record.category, record.task_type) == ("multi_reference/a/00000", "a", "multi_reference")


@pytest.mark.parametrize(
    "subset, line, message",
    [
        ("surreal_fantasy", b'{"instruction": "', "not valid JSON"),
        ("surreal_fantasy", b"[" * 100_000, "not valid JSON"),
        ("surreal_fantasy", b"\xff\xfe", "not valid JSON"),
        ("surreal_fantasy", b"9" * 10_000, "not valid JSON"),
        ("surreal_fantasy", ["a"], r"must be a JSON object, got \['a'\]"),
        ("surreal_fantasy", {**TEXT, "instruction": " "}, "'instruction' must be a text, got ' '"),
        ("surreal_fantasy", {**TEXT, "instruction": "\ud800"}, "'instruction' is not valid Unicode"),
        ("surreal_fantasy", {**TEXT, "output_image": ["a"]}, "'output_image' must be a text"),
        ("surreal_fantasy", {**TEXT, "type": None}, "'type' must be a text, got None"),
        ("surreal_fantasy", {**TEXT, "task_type": 3}, "'task_type' must be a text, got 3"),
        ("multi_reference", {**PAIR, "input_images": []}, r"'input_images' must be a list of paths, got \[\]"),
        ("multi_reference", {**PAIR, "input_images": "in/a/0.jpg"}, "'input_images' must be a list of paths"),
        ("multi_reference", {**PAIR, "input_images": [None]}, "'input_images' must be a text, got None"),
        ("multi_reference", {**PAIR, "output_image": "/E/Multi/images/0.jpg"}, "must lie in the folder of a category"),
    ],
)
def test_a_line_that_gives_no_record_is_named(subset, line, message):
    good = TEXT if subset == "surreal_fantasy" else PAIR
    records, (problem,) = records_of(subset, good, line)
    assert len(records) == 1
    assert problem.startswith("x.jsonl:2: ")
    pytest.raises(ValueError, _raise, problem).match(message)


def _raise(text):
    raise ValueError(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*TEXT, "input_images"]), inner, max_size=5)
    ),
    max_leaves=8,
)


@given(st.sampled_from(SUBSETS), st.lists(st.binary(max_size=60) | VALUES, max_size=4))
def test_any_line_is_a_record_or_a_problem(subset, lines):
    lines = [line.replace(b"\n", b"") if isinstance(line, bytes) else line for line in lines]
    blank = sum(isinstance(line, bytes) and not line.strip() for line in lines)
    records, problems = records_of(subset, *lines)
    assert len(records) + len(problems) + blank == len(lines)
    assert len({record.id for record in records}) == len(records)
    for record in records:
        assert record.id.startswith(f"{subset}/")
        json.dumps(record).encode()
        wanted(record.output, frozenset())


def test_ids_grow_for_all_where_stems_are_not_unique():
    outputs = ["images/a/0.jpg", "images/b/0.jpg", "images/b/1.jpg"]
    records, problems = records_of(
        "surreal_fantasy", *({**TEXT, "output_image": f"/Surreal/{path}"} for path in outputs)
    )
    assert [record.id for record in records] == ["surreal_fantasy/a/0", "surreal_fantasy/b/0", "surreal_fantasy/b/1"]
    assert not problems
    again, problems = records_of("surreal_fantasy", TEXT, {**TEXT, "instruction": "other"})
    assert [record.instruction for record in again] == ["draw"]
    assert problems == ["x.jsonl:2 (surreal_fantasy/00000): has the output image of x.jsonl:1 (surreal_fantasy/00000)"]
