"""Checkpoints: whole or not there, the newest, and whether a run may go on from one."""

import os
from dataclasses import replace

import pytest

from echo4o_hf.training.checkpoints import (
    Run,
    check_run,
    keep_newest,
    newest_checkpoint,
    remove_unfinished,
    whole_files,
    whole_folder,
)


def no_barrier():
    """One process waits for nobody."""


def write_checkpoint(folder, step, text="x"):
    target = folder / f"checkpoint-{step}"
    with whole_folder(target, no_barrier, True) as place:
        (place / target.name).mkdir()
        (place / target.name / "trainer_state.json").write_text(text)
    return target


def test_the_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
    for step in (900, 1000, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-5000").mkdir()  # a copy that was broken off
    for name in ("checkpoint-7000.old", "_checkpoint-6000.partial/checkpoint-6000"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").touch()
    (tmp_path / "_checkpoint-6000.partial/trainer_state.json").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "checkpoint-1"
    with whole_folder(target, no_barrier, True) as place:
        (place / target.name).mkdir()
        (place / target.name / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (target / "a").read_text() == "1"


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    target = write_checkpoint(tmp_path, 1, "old")
    with pytest.raises(OSError, match="full"), whole_folder(target, no_barrier, True) as place:
        (place / target.name).mkdir()
        (place / target.name / "trainer_state.json").write_text("new")
        raise OSError("full")
    assert (target / "trainer_state.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    write_checkpoint(tmp_path, 1, "new")
    assert (target / "trainer_state.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_only_one_process_moves_and_all_wait_before_and_after(tmp_path):
    target, seen = tmp_path / "checkpoint-1", []
    with whole_folder(target, lambda: seen.append(target.exists()), False) as place:
        (place / target.name).mkdir()
    assert seen == [False, False, False] and (place / target.name).exists()
    seen.clear()
    with whole_folder(target, lambda: seen.append(target.exists()), True) as place:
        assert not (place / target.name).exists()  # what a killed process left is gone
        (place / target.name).mkdir()
    assert seen == [False, False, True]


def test_files_take_their_places_beside_others(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / "notes").write_text("mine")
    with whole_files(tmp_path, tmp_path, no_barrier, True) as place:
        (place / "sub").mkdir()
        for name in ("model.safetensors", "sub/config.json"):
            (place / name).write_text("new")
        assert (tmp_path / "model.safetensors").read_text() == "old"
    texts = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert texts == {"model.safetensors": "new", "sub/config.json": "new", "notes": "mine"}
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path, tmp_path, no_barrier, True) as place:
        (place / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "model.safetensors").read_text() == "new"
    assert not place.exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    write_checkpoint(tmp_path, 3)
    for name in ("_checkpoint-4.partial", "_checkpoint-1.removed.partial", "_files.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_newest_are_kept(tmp_path):
    for age, step in enumerate((100, 20, 30, 40)):  # 100: of an earlier run in the same folder
        os.utime(write_checkpoint(tmp_path, step), (age * 100, age * 100))
    keep_newest(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-40"]


EAGER = Run(processes=2, accumulation=3, seed=0, packs=10, workers=None)
STREAM = Run(processes=2, accumulation=3, seed=0, packs=None, workers=1)


@pytest.mark.parametrize(
    ("then", "changes", "message"),
    [
        (EAGER, {"processes": 1}, r"2 processes x 3 .* 1 processes x 3 .* gradient_accumulation_steps at 6"),
        (EAGER, {"accumulation": 1}, "at 6, or begin the data anew with ignore_data_skip=true"),
        (EAGER, {"packs": None, "workers": 0}, "Set streaming as it was"),
        (STREAM, {"workers": 0}, "Keep both"),
        (STREAM, {"processes": 3, "accumulation": 2}, "Keep both"),
    ],
)
def test_steps_that_stand_for_other_data(tmp_path, caplog, then, changes, message):
    with pytest.raises(ValueError, match=message):
        check_run(tmp_path, then, replace(then, **changes), must_go_on=True)
    check_run(tmp_path, then, replace(then, **changes), must_go_on=False)


@pytest.mark.parametrize(
    ("then", "changes", "message"),
    [
        (EAGER, {}, None),
        (EAGER, {"processes": 6, "accumulation": 1}, "not be the same to the last bit"),
        (STREAM, {"accumulation": 5}, "not be the same to the last bit"),
        (EAGER, {"packs": 11}, "may come again"),
        (EAGER, {"seed": 1}, "may come again"),
    ],
)
def test_runs_that_go_on_say_what_holds(tmp_path, monkeypatch, then, changes, message):
    said = []
    monkeypatch.setattr("echo4o_hf.training.checkpoints.logger.warning", said.append)
    check_run(tmp_path, then, replace(then, **changes), must_go_on=True)
    assert said == [] if message is None else message in said[0]
