"""A run's folder: which one is taken, which are refused, and that nothing half-made stays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.training.folder import RunFolder, claimed, next_free

if TYPE_CHECKING:
    from tests.training.conftest import Lab


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_free_number_is_taken(here: Path) -> None:
    assert [str(next_free("llama-1m").path) for _ in range(3)] == [
        str(Path("runs") / f"llama-1m-{n}") for n in (1, 2, 3)
    ]
    (here / "runs" / "llama-1m-2").rmdir()
    assert next_free("llama-1m").path.name == "llama-1m-2"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M-1"),
        ("/models/some model.Q4_1.gguf", "some-model.Q4_1-1"),
        ("/models/tiny/", "tiny-1"),
    ],
)
def test_a_run_is_named_after_its_model(here: Path, model: str, name: str) -> None:
    assert next_free(model).path == Path("runs") / name


def test_two_programs_never_take_one_folder(here: Path) -> None:
    import threading

    taken: list[Path] = []
    threads = [threading.Thread(target=lambda: taken.append(next_free("m").path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8


def test_a_folder_with_a_run_is_refused_with_both_remedies(lab: Lab) -> None:
    lab.train(lab.recipe(steps=1))
    before = lab.rows()
    with pytest.raises(ScrimpError, match=r"holds another run.*--resume.*--overwrite"):
        lab.train(lab.recipe(steps=2))
    assert lab.rows() == before


def test_a_folder_with_other_things_is_refused_even_to_overwrite(lab: Lab) -> None:
    out = lab.path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ScrimpError, match=r"'thesis\.tex', which is no run of scrimp"):
            lab.train(lab.recipe(), overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(lab: Lab) -> None:
    (lab.path / "run").write_text("a file")
    with pytest.raises(ScrimpError, match="a file is in the way"):
        lab.train(lab.recipe())
    assert (lab.path / "run").read_text() == "a file"


def test_overwriting_replaces_the_run_and_nothing_else(lab: Lab) -> None:
    lab.train(lab.recipe(), "fresh")
    lab.train(lab.recipe(seed=5, steps=9))
    (lab.path / "run" / "notes.txt").write_text("mine")
    before: list[str] = []
    look = lab.reporter({0: lambda: before.extend(path.name for path in (lab.path / "run").iterdir())})
    lab.train(lab.recipe(), overwrite=True, reporter=look)
    # Nothing of the old run is left for a resume to find, should the new one die in its first step.
    assert sorted(before) == [".lock", "notes.txt", "recipe.yaml"]
    assert lab.rows() == lab.rows("fresh") and lab.weights() == lab.weights("fresh")
    assert lab.checkpoints() == lab.checkpoints("fresh")
    assert (lab.path / "run" / "notes.txt").read_text() == "mine"


def test_a_mistake_found_before_the_first_step_keeps_the_run_to_be_overwritten(lab: Lab) -> None:
    lab.train(lab.recipe())
    before = lab.weights()
    with pytest.raises(ScrimpError, match="positions"):
        lab.train(lab.recipe(seq=128), overwrite=True)
    assert lab.weights() == before and lab.rows()[-1]["kind"] == "end"


def test_a_failed_start_leaves_nothing(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match="positions"):
        lab.train(lab.recipe(seq=128), "deep")
    assert not (lab.path / "deep").exists()


def test_a_failure_in_the_first_step_leaves_nothing(lab: Lab) -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(ScrimpError, match=r"memory of cpu ran out.*--micro-batch"):
        lab.train(lab.recipe(), reporter=lab.reporter({0: fail}))
    assert not (lab.path / "run").exists()


def test_a_folder_that_lost_its_permission_is_a_sentence(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    # chmod does not stop root, who runs many a test suite; the system's own refusal does.
    real = Path.mkdir

    def mkdir(self: Path, *args: object, **options: object) -> None:
        if self.name == "run":
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ScrimpError, match="may not be written"):
        lab.train(lab.recipe())


def test_what_a_kill_left_while_the_recipe_was_written_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / ".partial-recipe.yaml").write_text("model:")
    (tmp_path / ".lock").touch()
    RunFolder(tmp_path).check_free(overwrite=False)


def test_a_claim_leaves_a_run_and_removes_an_empty_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with claimed(folder):
        assert folder.path.is_dir()
    assert not folder.path.exists()
    with claimed(folder):
        folder.recipe.write_text("model: llama-1m")
    assert folder.is_run


def test_clearing_removes_a_run_and_not_the_users_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.clear()  # nothing there is nothing to do
    for path in (folder.recipe, folder.metrics, tmp_path / "mine.txt"):
        path.write_text("text")
    for name in ("checkpoints/step-00000001", "model", "tensorboard"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("text")
    folder.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
