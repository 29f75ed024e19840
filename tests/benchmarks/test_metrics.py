"""The metrics as a user of `evaluate` meets them: by name, in every form of input, offline."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

import echo4o_hf  # noqa: F401
from echo4o_hf.benchmarks.metrics import GenEvalPP, ImagineBench, install_metrics, script
from echo4o_hf.benchmarks.results import read_results, write_results
from echo4o_hf.judges.judge import JudgeStopped
from echo4o_hf.miniature.captions import scene_for
from echo4o_hf.miniature.items import load_items
from echo4o_hf.miniature.world import render

COLORS = ("red", "green", "blue")
ITEMS = [
    {"tag": "color_attr", "prompt": f"a {color} kite", "include": [{"class": "kite", "count": 1, "color": color}]}
    for color in COLORS
]
IMAGINED = [
    {"id": number, "instruction": f"a {color} lemon", "note": "still a lemon", "type": "COLOR"}
    for number, color in enumerate(COLORS, 1)
]


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (8, 8), color)


def color_judge(system: str, prompt: str, images: list[Image.Image]) -> str:
    """Right where the picture has the color that the prompt names; the official green is (0, 128, 0)."""
    (image,) = images
    asked = next(color for color in COLORS if f"a {color} " in prompt)
    right = image.getpixel((0, 0)) == picture(asked).getpixel((0, 0))
    return json.dumps({"correct": int(right), "reason": f"asked for {asked}"})


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for color in COLORS:
        picture(color).save(tmp_path / f"{color}.png")
    return [str(tmp_path / f"{color}.png") for color in COLORS]


def compute(predictions: object, references: object = ITEMS, name: str = "geneval_pp", **options: object) -> dict:
    metric = evaluate.load(name)
    options = {"judge": color_judge, "progress": False, **options}
    return metric.compute(predictions=predictions, references=references, **options)


pytestmark = pytest.mark.usefixtures("judge_texts")


# --- every form of a picture ---

FORMS: dict[str, Callable[[str], object]] = {
    "path": str,
    "Path": Path,
    "bytes": lambda path: Path(path).read_bytes(),
    "PIL": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
    "floats": lambda path: np.asarray(Image.open(path)) / 255,
    "dict of a path": lambda path: {"bytes": None, "path": path},
    "dict of bytes": lambda path: {"bytes": Path(path).read_bytes(), "path": "gone.png"},
    "list": lambda path: [path],
    "array of several": lambda path: np.stack([np.asarray(Image.open(path))] * 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, files: list[str]) -> None:
    right = [FORMS[form](path) for path in files]
    wrong = [FORMS[form](path) for path in [files[0], files[2], files[1]]]
    assert compute(right)["geneval_pp"] == 1.0
    assert compute(wrong)["geneval_pp"] == pytest.approx(1 / 3)


def test_a_dataset_of_pictures_and_items(files: list[str]) -> None:
    rows = Dataset.from_dict({"image": files}).cast(Features({"image": ImageFeature()}))
    assert compute(rows["image"])["geneval_pp"] == 1.0
    items = Dataset.from_list([{**ITEMS[0], "exclude": [{"class": "kite", "count": 2}]}, *ITEMS[1:]])
    assert items[1]["exclude"] is None  # datasets fills what only one row has
    assert compute(rows["image"], items)["num_items"] == 3


def test_several_pictures_of_an_item(files: list[str]) -> None:
    red, green, blue = files
    scores = compute([[red, red, blue, blue], [green, None], [None, "missing.png"]])
    assert scores["geneval_pp"] == scores["accuracy"] == pytest.approx((0.5 + 1) / 2)
    counts = ("num_items", "num_unscored", "num_images", "num_unscored_images")
    assert [scores[name] for name in counts] == [3, 1, 8, 3]


def test_an_item_given_again_gets_more_pictures(files: list[str]) -> None:
    once = compute([[files[0], files[1]], [files[1]]], ITEMS[:2])
    assert compute([files[0], files[1], files[1]], [ITEMS[0], ITEMS[1], ITEMS[0]]) == once
    assert once["num_items"] == 2


def test_missing_pictures_are_unscored_and_never_zero(files: list[str]) -> None:
    scores = compute([files[0], None, "missing.png"])
    assert (scores["geneval_pp"], scores["num_items"], scores["num_unscored"]) == (1.0, 3, 2)
    nothing = compute([None, [], {"path": None, "bytes": None}])
    assert nothing["geneval_pp"] is None and nothing["num_unscored"] == 3


def test_a_file_that_is_no_picture_is_unscored(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "broken.png").write_bytes(Path(files[1]).read_bytes()[:40])
    metric = evaluate.load("geneval_pp")
    scores = metric.compute(
        predictions=[files[0], tmp_path / "broken.png", tmp_path],
        references=ITEMS,
        judge=color_judge,
        progress=False,
    )
    assert (scores["geneval_pp"], scores["num_unscored"]) == (1.0, 2)
    reasons = [item["images"][0]["verdict"]["unscored"] for item in metric.results["items"]]
    assert reasons[0] is None and reasons[1].startswith("image 1 ") and reasons[2] == "no image: there is no such file"


def test_hostile_file_names(tmp_path: Path) -> None:
    names = ["<script>alert(1)<%2Fscript>.png", "a\n'; DROP TABLE replies; --.png", os.fsdecode(b"\xff\xfe.png")]
    paths = []
    for name, color in zip(names, COLORS, strict=True):
        picture(color).save(tmp_path / "plain.png")
        paths.append(tmp_path / name)
        os.rename(tmp_path / "plain.png", paths[-1])
    metric = evaluate.load("geneval_pp")
    options = {"references": ITEMS, "judge": color_judge, "progress": False, "store": tmp_path / "store.sqlite"}
    assert metric.compute(predictions=[str(path) for path in paths], **options)["geneval_pp"] == 1.0
    write_results(metric.results, tmp_path / "results.json")
    read = read_results(tmp_path / "results.json")
    assert [item["images"][0]["path"] for item in read["items"]] == [str(paths[0]), str(paths[1]), None]


# --- add, add_batch, compute ---


def test_add_and_add_batch(files: list[str]) -> None:
    metric = evaluate.load("geneval_pp")
    metric.add(prediction=picture("red"), reference=ITEMS[0])
    metric.add_batch(predictions=[files[1], [picture("red"), files[2]]], references=ITEMS[1:])
    assert len(metric) == 3
    assert metric.compute(judge=color_judge, progress=False)["accuracy"] == pytest.approx(2.5 / 3)
    metric.add(predictions=files[0], references=ITEMS[0])  # evaluate's own examples call it like this
    assert metric.compute(judge=color_judge, progress=False)["num_items"] == 1


def test_in_memory_and_combined(files: list[str]) -> None:
    metric = evaluate.load("geneval_pp", keep_in_memory=True)
    options = {"predictions": files, "references": ITEMS, "judge": color_judge, "progress": False}
    assert metric.compute(**options)["geneval_pp"] == 1.0
    assert evaluate.combine(["geneval_pp"]).compute(**options)["geneval_pp"] == 1.0


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ("a.png", ITEMS, {}, "predictions must be a list with one entry for each item; got str"),
        (["a.png"], ITEMS[0], {}, "references must be a list with one entry for each item; got dict"),
        (["a.png"], None, {}, "references must be a list.*got NoneType"),
        (["a.png"], ITEMS, {}, "got 1 predictions for 3 references"),
        (["a.png"], ["a kite"], {}, r"references\[0\] must be an item of the benchmark, a dict; got str"),
        (["a.png"], [{"tag": "color_attr", "prompt": "p"}], {}, "include"),
        (["a.png", 7], ITEMS[:2], {}, r"predictions\[1\]: a picture must be a path.*got int"),
        (["a.png"], ITEMS[:1], {"judge": None}, "say who judges"),
        (["a.png"], ITEMS[:1], {"judge": []}, "must be one judge, or several with different names"),
        (["a.png"], ITEMS[:1], {"judge": [color_judge, color_judge]}, "with different names; got"),
        (["a.png"], ITEMS[:1], {"judge": "gpt-4.1"}, "'gpt-4.1'"),
        (["a.png"], ITEMS[:1], {"protocol": "lenient"}, "protocol must be one of official, strict; got 'lenient'"),
        (["a.png"], ITEMS[:1], {"repeats": 0}, "repeats must be at least 1; got 0"),
        (["a.png"], ITEMS[:1], {"concurrency": 0}, "concurrency must be at least 1, got 0"),
    ],
)
def test_mistakes(predictions: object, references: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute(predictions, references, **options)


def test_a_judge_that_stops_leaves_nothing_behind(tmp_path: Path, files: list[str]) -> None:
    def refuse(system: str, prompt: str, images: list[Image.Image]) -> str:
        raise JudgeStopped("the key was refused")

    metric = evaluate.load("geneval_pp", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(JudgeStopped, match="key was refused"):
        metric.compute(predictions=files, references=ITEMS, judge=refuse, progress=False)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert metric.compute(predictions=files, references=ITEMS, judge=color_judge, progress=False)["geneval_pp"] == 1


# --- judges, protocols, benchmarks ---


def test_several_judges(files: list[str]) -> None:
    def yes(system: str, prompt: str, images: list[Image.Image]) -> str:
        return '{"correct": 1, "reason": "always"}'

    def no(system: str, prompt: str, images: list[Image.Image]) -> str:
        return '{"correct": 0, "reason": "never"}'

    scores = compute([files[0], files[1], files[0]], judge=[color_judge, yes, no])
    assert scores["geneval_pp"] == pytest.approx(2 / 3)  # the majority is the judge that looks
    assert [one["geneval_pp"] for one in scores["per_judge"].values()] == [pytest.approx(2 / 3), 1.0, 0.0]
    first = scores["agreement"]["pairs"][0]
    assert first["percent_agreement"] == pytest.approx(100 * 2 / 3) and first["num_images"] == 3
    assert first["confusion"]["all"] == [[0, 1], [0, 2]]
    assert "self_agreement" not in scores


def test_repeats(files: list[str]) -> None:
    calls = []

    def moody(system: str, prompt: str, images: list[Image.Image]) -> str:
        calls.append(prompt)
        return json.dumps({"correct": len(calls) % 3 != 0})

    scores = compute(files, judge=moody, repeats=3, concurrency=1)
    assert len(calls) == 9 and scores["geneval_pp"] == 1.0
    (found,) = scores["self_agreement"].values()
    assert len(found["pairs"]) == 3 and found["pairs"][0]["num_images"] == 3
    assert "per_judge" not in scores


def test_imagine_bench(files: list[str]) -> None:
    def grade(system: str, prompt: str, images: list[Image.Image]) -> str:
        assert "lemon" in prompt and "still a lemon" in prompt
        return (
            "Fantasy Fulfillment: 8\nReason: a\nIdentity Preservation: 6\nReason: b\nAesthetic Quality: 5\nReason: c"
        )

    scores = compute([files[0], None, [files[1], files[2]]], IMAGINED, "imagine_bench", judge=grade)
    assert scores["imagine_bench"] == pytest.approx(0.8 * 6 + 0.2 * 5)
    assert scores["num_items"] == 3 and scores["num_unscored"] == 1
    assert {"per_type", "per_dimension", "confidence_interval"} <= scores.keys()


def test_strict_has_a_name_of_its_own(files: list[str]) -> None:
    def clauses(system: str, prompt: str, images: list[Image.Image]) -> str:
        return (
            '{"clauses": [{"clause": 1, "reason": "", "count": "yes", "color": "yes", "region": null, "size": null}]}'
        )

    scores = compute(files, judge=clauses, protocol="strict")
    assert scores["geneval_pp_strict"] == 1.0 and "geneval_pp" not in scores


def test_the_contracts_keys(files: list[str]) -> None:
    scores = compute(files)
    assert {"geneval_pp", "accuracy", "per_tag", "num_items", "num_unscored", "confidence_interval"} <= scores.keys()
    low, high = scores["confidence_interval"]
    assert 0 < low < 1 and high == pytest.approx(1)


# --- the shapes world, end to end ---


def test_shapes_140_from_scenes() -> None:
    items = load_items()[::7]  # 20, of all tags
    rng = np.random.default_rng(0)
    pictures = [render(scene_for(item, rng), rng) for item in items]
    references = [item.to_dict() for item in items]
    scores = compute(pictures, references, judge="shapes")
    assert scores["geneval_pp"] >= 0.95 and scores["num_unscored"] == 0 and len(scores["per_tag"]) == 7
    shuffled = compute([*pictures[3:], *pictures[:3]], references, judge="shapes")
    assert shuffled["geneval_pp"] <= 0.05 and shuffled["num_unscored"] == 0


# --- by name, offline ---


def run(code: str, folder: Path, **environment: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    environment = {**os.environ, **offline, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(empty.iterdir())
    return done.stdout


LOAD = """
metric = evaluate.load("geneval_pp")
from PIL import Image
item = {"tag": "counting", "prompt": "a kite", "include": [{"class": "kite", "count": 1}]}
scores = metric.compute(
    predictions=[Image.new("RGB", (8, 8))], references=[item], judge=lambda system, prompt, images: '{"correct": 1}'
)
print(metric.name, scores["geneval_pp"], evaluate.load("imagine_bench").name)
"""


SLOW = pytest.mark.slow  # importing evaluate takes seconds


@pytest.mark.parametrize(
    "imports", ["import echo4o_hf, evaluate", pytest.param("import evaluate, echo4o_hf", marks=SLOW)]
)
def test_by_name_in_either_import_order(imports: str, tmp_path: Path) -> None:
    assert run(f"{imports}\n{LOAD}", tmp_path) == "geneval_pp 1.0 imagine_bench\n"


def test_installed_metrics_load_without_our_import(tmp_path: Path) -> None:
    written = install_metrics(tmp_path / "modules")
    assert [path.name for path in written] == ["geneval_pp.py", "imagine_bench.py"]
    assert all(len(path.parent.name) == 64 for path in written)
    assert not list(tmp_path.rglob("*.tmp"))
    code = f"import sys, evaluate\nassert 'echo4o_hf' not in sys.modules\n{LOAD}"
    assert run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")) == "geneval_pp 1.0 imagine_bench\n"


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_MODULES_CACHE"])
def test_installing_where_evaluate_looks(variable: str, tmp_path: Path) -> None:
    cache = {variable: str(tmp_path / "cache")}
    code = "from echo4o_hf.benchmarks.metrics import install_metrics; print(*install_metrics(), sep='\\n')"
    written = run(code, tmp_path, **cache).splitlines()
    assert len(written) == 2 and all(path.startswith(str(tmp_path / "cache")) for path in written)
    code = f"import sys, evaluate\nassert 'echo4o_hf' not in sys.modules\n{LOAD}"
    assert run(code, tmp_path, **cache) == "geneval_pp 1.0 imagine_bench\n"


def test_a_script_in_the_working_directory_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "geneval_pp"
    folder.mkdir()
    (folder / "geneval_pp.py").write_text(script("imagine_bench"))
    monkeypatch.chdir(tmp_path)
    assert evaluate.load("geneval_pp").name == "imagine_bench"


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="no metric is called 'geneval'; there are geneval_pp, imagine_bench"):
        script("geneval")


@pytest.mark.parametrize("metric_class", [GenEvalPP, ImagineBench])
def test_help_of_the_metric(metric_class: type) -> None:
    metric = metric_class()
    assert "judge:" in metric.compute.__doc__ and "2508.09987" in metric.citation
    assert set(metric.features) == {"predictions", "references"}
