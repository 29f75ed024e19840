"""The Parquet copy: what it holds, that others can read it, and that it survives being stopped anywhere."""

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from huggingface_hub import DatasetCard
from test_hub import REPOSITORY, Hub

import echo4o_hf
from echo4o_hf.data.build import ROW_GROUP_ROWS, build
from echo4o_hf.data.builder import FEATURES, SUBSETS
from echo4o_hf.miniature.dataset import write_dataset

ROWS = 23
SIZE = "12KB"  # several files in each subset


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "Echo-4o-Image"
    write_dataset(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "echo-4o-image"
    assert build(output, source, max_shard_size=SIZE) == dict.fromkeys(SUBSETS, ROWS)
    return output


def hashes(output):
    """sha256 of every file that a user of the folder sees."""
    files = [path for path in output.rglob("*") if path.is_file() and ".build" not in path.parts]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def pictures(source, subset_folder):
    """Content of all pictures of a subset in the archives."""
    found = set()
    for archive in (source / subset_folder).rglob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            found.update(opened.extractfile(member).read() for member in opened)
    return found


def run(script, *arguments, **environment):
    """Run `script` in a process of its own, in a package path without HF's offline setting; returns what it prints."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "PYTHONPATH": os.pathsep.join([str(Path(echo4o_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_WITHOUT_THE_PACKAGE = """
import hashlib, json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "echo4o_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from datasets import Image, List, get_dataset_config_names, load_dataset
try:
    import echo4o_hf
except ModuleNotFoundError:
    output = sys.argv[1]
    result = {"configs": get_dataset_config_names(output)}
    for name in result["configs"]:
        rows = load_dataset(output, name)["train"]
        stream = load_dataset(output, name, split="train", streaming=True)
        row, raw = rows[-1], rows.cast_column("output_image", Image(decode=False))
        result[name] = {
            "features": rows.features.to_dict(),
            "ids": rows["id"][:],
            "same in a stream": [row["id"] for row in stream] == rows["id"][:],
            "image": [type(row["output_image"]).__name__, row["output_image"].size],
            "references": [image.size for image in row["input_images"]],
            "hashes": [hashlib.sha256(row["output_image"]["bytes"]).hexdigest() for row in raw],
            "num_bytes": rows.info.splits["train"].num_bytes,
            "num_examples": rows.info.splits["train"].num_examples,
        }
    print(json.dumps(result))
"""


def test_loads_without_this_package(built, source, tmp_path):
    read = json.loads(run(READ_WITHOUT_THE_PACKAGE, built, HF_HOME=tmp_path, HF_HUB_OFFLINE="1").splitlines()[-1])
    assert read["configs"] == [*SUBSETS, "all"]
    assert read["all"]["ids"] == [name for subset in SUBSETS for name in read[subset]["ids"]]
    assert len(set(read["all"]["ids"])) == 3 * ROWS
    for config in read["configs"]:
        result = read[config]
        assert datasets.Features.from_dict(result["features"]) == FEATURES
        assert result["same in a stream"]
        assert result["image"] == ["JpegImageFile", [64, 64]]
    assert len(read["multi_reference"]["references"]) >= 2
    folder = {"surreal_fantasy": "Surrel-Fantasy-Image", "instruction_following": "Instruction-Following-Image"}
    for subset, name in folder.items():
        originals = {hashlib.sha256(content).hexdigest() for content in pictures(source, name)}
        assert set(read[subset]["hashes"]) == originals  # as they were encoded

    # The sizes in the card are those that datasets itself finds.
    infos = datasets.info.DatasetInfosDict.from_dataset_card_data(DatasetCard.load(built / "README.md").data)
    for config in read["configs"]:
        split = infos[config].splits["train"]
        assert split.num_examples == read[config]["num_examples"] == len(read[config]["ids"])
        assert split.num_bytes == infos[config].dataset_size == read[config]["num_bytes"]
    sizes = {subset: sum(path.stat().st_size for path in (built / subset).iterdir()) for subset in SUBSETS}
    assert {subset: infos[subset].download_size for subset in SUBSETS} == sizes
    assert infos["all"].download_size == sum(sizes.values())


def test_rows_are_those_of_the_source(built, source):
    loaded = datasets.load_dataset("echo-4o-image", "multi_reference", data_dir=str(source), decode=False)["train"]
    expected = {row["id"]: row for row in loaded}
    files = sorted((built / "multi_reference").iterdir())
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(expected) == ROWS
    for row in rows:
        other = expected[row["id"]]
        for name in ("subset", "task_type", "category", "instruction"):
            assert row[name] == other[name]
        assert row["output_image"]["bytes"] == other["output_image"]["bytes"]
        assert [image["bytes"] for image in row["input_images"]] == [image["bytes"] for image in other["input_images"]]
        assert "/" not in row["output_image"]["path"]  # nothing of the machine that built it


def test_files_are_as_large_as_asked_for_and_in_small_groups(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    write_dataset(source, 2 * ROW_GROUP_ROWS + 10)
    build(output, source, subsets=["surreal_fantasy"], max_shard_size=10**9)
    (path,) = (output / "surreal_fantasy").iterdir()
    assert path.name == "train-00000-of-00001.parquet"
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [100, 100, 10]
    columns = {metadata.row_group(0).column(index).path_in_schema: index for index in range(metadata.num_columns)}
    content = metadata.row_group(0).column(columns["output_image.bytes"])
    assert content.has_offset_index and content.compression == "UNCOMPRESSED"  # JPEG is compressed already
    assert metadata.row_group(0).column(columns["id"]).has_column_index

    build(tmp_path / "small", source, subsets=["surreal_fantasy"], max_shard_size="50KB")
    files = sorted((tmp_path / "small" / "surreal_fantasy").iterdir())
    sizes = [
        sum(len(row["bytes"]) for row in pq.read_table(path, columns=["output_image"])["output_image"].to_pylist())
        for path in files
    ]
    assert [path.name for path in files] == [f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    assert len(files) > 3 and all(50_000 <= size < 54_000 for size in sizes[:-1])


# Kills itself with SIGKILL just before its n-th renaming: of a finished file, of the record, of a file to its last
# name, or of the card. Each build runs in a fork, so that datasets is imported once.
KILL = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from echo4o_hf.data.build import build
from echo4o_hf.data.builder import Echo4oImage

source, output, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
next(iter(Echo4oImage(config_name="surreal_fantasy", data_dir=str(source)).as_streaming_dataset("train")))  # imports
subsets = ["surreal_fantasy", "multi_reference"]

def child(kill_at):
    pid = os.fork()
    if pid == 0:
        left = [kill_at]
        def hook(event, arguments):
            if event == "os.rename":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        status = 1
        try:
            build(output, source, subsets=subsets, max_shard_size=size)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def hashes():
    files = sorted(path for path in output.rglob("*") if path.is_file() and ".build" not in path.parts)
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

outcomes = []
assert child(0) == 0
whole = hashes()
for kill_at in map(int, sys.argv[4:] or range(1, 1000)):
    shutil.rmtree(output)
    killed = child(kill_at)
    left = sorted(path.name for path in (output / ".build").glob("*.parquet"))
    assert child(0) == 0
    outcomes.append({"killed": killed, "left": len(left), "same": hashes() == whole})
    if killed == 0:
        break
shutil.rmtree(output)
starts = 1
while child(4) == -signal.SIGKILL:
    starts += 1
print(json.dumps({"outcomes": outcomes, "starts": starts, "same": hashes() == whole, "files": len(whole)}))
"""


@pytest.mark.parametrize("moments", [[2, 5, 12], pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path, moments):
    write_dataset(tmp_path / "source", 4)
    result = json.loads(run(KILL, tmp_path / "source", tmp_path / "output", "6KB", *moments).splitlines()[-1])
    outcomes = result["outcomes"]
    assert result["files"] >= 5
    if not moments:
        assert outcomes.pop()["killed"] == 0
        assert len(outcomes) >= 3 * result["files"]  # a file is renamed twice, and recorded
    assert all(outcome["killed"] == -signal.SIGKILL for outcome in outcomes)
    assert all(outcome["same"] for outcome in outcomes)
    assert max(outcome["left"] for outcome in outcomes) >= 2  # there was something to continue from
    assert result["starts"] > 3 and result["same"]


def test_continues_after_the_last_finished_file(source, built, tmp_path, monkeypatch):
    output = tmp_path / "output"
    shutil.copytree(built, output)
    files = sorted((output / "multi_reference").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert len(files) >= 4
    files[2].unlink()
    build(output, source, max_shard_size=SIZE)
    assert hashes(output) == hashes(built)
    after = {path.name: path.stat().st_mtime_ns for path in (output / "multi_reference").iterdir()}
    kept = [name for name in before if after[name] == before[name]]
    assert kept == [path.name for path in files[:2]]


def test_excluded_rows(source, built, tmp_path):
    read = datasets.load_dataset("parquet", data_files=f"{built}/multi_reference/*.parquet", split="train")["id"]
    exclude = frozenset([*read[:2], *read[9:11], read[-1], "surreal_fantasy/none"])
    options = {"subsets": ["multi_reference"], "max_shard_size": SIZE, "exclude": exclude}
    output = tmp_path / "output"
    assert build(output, source, **options) == {"multi_reference": ROWS - 5}
    files = sorted((output / "multi_reference").iterdir())
    left = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")["id"]
    assert list(left) == [id for id in read if id not in exclude]
    whole = hashes(output)
    files[1].unlink()
    with pytest.raises(ValueError, match="multi_reference with other settings: exclude '[0-9a-f]{8}', now ''"):
        build(output, source, **{**options, "exclude": frozenset()})
    build(output, source, **options)
    assert hashes(output) == whole


def test_a_whole_build_is_left_alone(source, built, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(built, output)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*.parquet")}
    assert build(output, source, max_shard_size=SIZE) == dict.fromkeys(SUBSETS, ROWS)
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*.parquet")} == before


def test_subsets_one_after_the_other(source, built, tmp_path):
    output = tmp_path / "output"
    assert build(output, source, subsets=["multi_reference"], max_shard_size=SIZE) == {"multi_reference": ROWS}
    names = [config["config_name"] for config in DatasetCard.load(output / "README.md").data["configs"]]
    assert names == ["multi_reference", "all"]
    rest = ["instruction_following", "surreal_fantasy"]
    assert build(output, source, subsets=rest, max_shard_size=SIZE) == dict.fromkeys(SUBSETS, ROWS)
    assert hashes(output) == hashes(built)


def test_other_settings_or_another_source_do_not_continue(source, built, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(built, output)
    before = hashes(output)
    with pytest.raises(ValueError, match="surreal_fantasy with other settings: max_shard_size 12000, now 13000"):
        build(output, source, max_shard_size="13KB")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "Surrel-Fantasy-Image" / "conflict.jsonl").touch()
    with pytest.raises(ValueError, match="surreal_fantasy with other settings: source '/.* files have changed"):
        build(output, other, max_shard_size=SIZE)
    build(output, source, max_shard_size=SIZE, on_error="skip")
    with pytest.raises(ValueError, match="on_error 'skip', now 'raise'"):
        build(output, source, max_shard_size=SIZE)
    assert hashes(output) == before


def test_foreign_files_are_kept(source, tmp_path):
    output = tmp_path / "output"
    (output / "surreal_fantasy").mkdir(parents=True)
    theirs = output / "surreal_fantasy" / "train-00000-of-00001.parquet"
    for path in (theirs, output / "README.md"):
        path.write_text("theirs")
        with pytest.raises(FileExistsError, match=f"{path}: not written by this build"):
            build(output, source)
        assert path.read_text() == "theirs"
        path.unlink()
    (output / "notes.txt").write_text("theirs")
    build(output, source, subsets=["surreal_fantasy"])
    assert (output / "notes.txt").read_text() == "theirs"
    (output / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        build(output / "file", source)


def test_a_full_disk(source, built, tmp_path):
    script = """
import resource, sys
from echo4o_hf.data.build import build
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    build(sys.argv[1], sys.argv[2], max_shard_size=sys.argv[3])
except OSError as error:
    print(error)
"""
    largest = {subset: max(path.stat().st_size for path in (built / subset).iterdir()) for subset in SUBSETS}
    assert largest["surreal_fantasy"] < largest["multi_reference"]
    output = tmp_path / "output"
    message = run(script, output, source, SIZE, largest["surreal_fantasy"]).splitlines()[-1]
    assert "File too large" in message and ".build/multi_reference-0000" in message and "build again" in message
    assert not list(output.rglob("*.tmp")) and not (output / "README.md").exists()
    assert list((output / "surreal_fantasy").iterdir())
    build(output, source, max_shard_size=SIZE)
    assert hashes(output) == hashes(built)


def test_two_builds_at_once(source, tmp_path):
    (tmp_path / ".build").mkdir()
    with FileLock(tmp_path / ".build" / "lock"), pytest.raises(OSError, match="another process is building"):
        build(tmp_path, source)


def test_in_a_working_directory_with_the_folder_itself(source, built, tmp_path, monkeypatch):
    # The name "echo-4o-image" would mean this folder.
    shutil.copytree(built / "surreal_fantasy", tmp_path / "echo-4o-image" / "other")
    monkeypatch.chdir(tmp_path)
    build("echo-4o-image", source, max_shard_size=SIZE)
    shutil.rmtree(tmp_path / "echo-4o-image" / "other")
    assert hashes(tmp_path / "echo-4o-image") == hashes(built)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subsets": ["surreal"]}, r"must be some of surreal_fantasy, .*, got \['surreal'\]"),
        ({"subsets": []}, "must be some of"),
        ({"max_shard_size": 0}, "max_shard_size must be positive, got 0"),
        ({"max_shard_size": "large"}, "large"),
        ({"on_error": "ignore"}, "ignore"),
        ({"output": "{source}/echo-4o-image"}, "is in data_dir"),
        ({"output": "{source}"}, "is in data_dir"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_wrong_arguments(source, tmp_path, arguments, message):
    output = arguments.pop("output", str(tmp_path / "output")).format(source=source)
    with pytest.raises(ValueError, match=message):
        build(output, source, **arguments)
    assert not (source / ".build").exists() and not (source / "README.md").exists()


def test_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(tmp_path / "output", tmp_path / "nowhere")
    assert not (tmp_path / "output").exists()


def damage(source, name):
    """Cut short one picture of the surreal subset."""
    (archive,) = (source / "Surrel-Fantasy-Image").rglob("*.tar.gz")
    content = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=content, mode="w") as new:
        for member in old:
            data = old.extractfile(member).read()
            data = data[: len(data) // 2] if member.name.endswith(name) else data
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    archive.write_bytes(gzip.compress(content.getvalue()))


def test_damaged_pictures(source, tmp_path):
    damaged, output = tmp_path / "damaged", tmp_path / "output"
    shutil.copytree(source, damaged)
    for name in ("00015.jpg", "00017.jpg"):
        damage(damaged, name)
    with pytest.raises(ValueError, match="2 damaged pictures; .*\\n.*/00015: .*decode.*\\n.*/00017: ") as error:
        build(output, damaged, subsets=["surreal_fantasy"], max_shard_size="5KB")
    assert len(str(error.value).splitlines()) == 3
    assert len(list((output / ".build").glob("*.parquet"))) >= 2 and not (output / "README.md").exists()

    # What was written before the error is continued by leaving the damaged rows out.
    options = {"subsets": ["surreal_fantasy"], "max_shard_size": "5KB", "on_error": "skip"}
    assert build(output, damaged, **options) == {"surreal_fantasy": ROWS - 2}
    build(tmp_path / "at once", damaged, **options)
    assert hashes(output) == hashes(tmp_path / "at once")


class PushHub(Hub):
    """Also takes uploads: every file as a regular one, in the body of the commit."""

    created: list[dict] = []
    validated: list[str] = []

    def do_POST(self):
        kind = urlsplit(self.path).path.removeprefix(f"/api/datasets/{REPOSITORY}/").split("/")[0]
        if self.path == "/api/repos/create":
            self.created.append(json.loads(self.content()))
            return self.answer({"url": f"http://{self.headers['Host']}/datasets/{REPOSITORY}"})
        if self.path == "/api/validate-yaml":
            self.validated.append(json.loads(self.content())["content"])
            return self.answer({"errors": [], "warnings": []})
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(self.content())["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if kind == "commit":
            for line in self.content().splitlines():
                self.apply(**json.loads(line))
            address = f"http://{self.headers['Host']}/datasets/{REPOSITORY}/commit/{self.commit}"
            return self.answer({"commitUrl": address, "commitOid": self.commit})
        return super().do_POST()

    def apply(self, key, value):
        path = self.folder / value.get("path", "")
        if key == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "deletedFile":
            path.unlink()

    def content(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, found):
        self.reply(200, {}, json.dumps(found).encode())


@pytest.fixture
def hub(tmp_path):
    PushHub.folder = tmp_path / "hub"
    PushHub.folder.mkdir()
    PushHub.created, PushHub.validated = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), PushHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_push_to_hub(hub, source, built, tmp_path):
    stale = PushHub.folder / "surreal_fantasy" / "train-00000-of-00099.parquet"
    stale.parent.mkdir()
    stale.write_text("of another build")
    (PushHub.folder / "LICENSE").write_text("theirs")
    output = tmp_path / "output"
    shutil.copytree(built, output)
    (output / "notes.txt").write_text("not for the Hub")
    script = """
import sys
from echo4o_hf.data.build import build
build(sys.argv[1], sys.argv[2], max_shard_size=sys.argv[3], push_to_hub=sys.argv[4], private=True)
"""
    environment = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_token", "HF_HOME": tmp_path / "home"}
    run(script, output, source, SIZE, REPOSITORY, **environment)
    assert [(found["type"], found["visibility"]) for found in PushHub.created] == [("dataset", "private")]
    assert PushHub.validated == [(built / "README.md").read_text(encoding="utf-8")]
    uploaded = hashes(PushHub.folder)
    assert uploaded.pop("LICENSE")
    assert uploaded == hashes(built)

    environment["HF_HOME"] = tmp_path / "another home"
    read = json.loads(run(READ_WITHOUT_THE_PACKAGE, REPOSITORY, **environment).splitlines()[-1])
    assert read["configs"] == [*SUBSETS, "all"] and len(read["all"]["ids"]) == 3 * ROWS
    assert all(read[config]["same in a stream"] for config in read["configs"])
