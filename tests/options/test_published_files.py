"""Option files as they are published for BasicSR's own networks: they must pass, whatever else is asked of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from esc_arch.options import CheckScope, inspect_options
from esc_arch.problems import of_severity

FILES = sorted((Path(__file__).parent / "published").glob("*.yml"))
SHIPPED = sorted((Path(__file__).parents[2] / "options").glob("*.yml"))

NO_FILES = CheckScope(thorough=True, with_files=False)

#: What is told about keys that have no effect in BasicSR 1.4.2.
WARNINGS = {"test_old_keys": ["path:pretrain_model_g", "path:strict_load"]}


def test_there_are_some() -> None:
    assert len(FILES) == 12 and len(SHIPPED) >= 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_files_pass(file: Path, work_folder: Path) -> None:
    inspection = inspect_options(str(file), root_path=str(work_folder), is_train=None, scope=NO_FILES)
    assert of_severity(inspection.problems, "error") == []
    assert [warning.path for warning in of_severity(inspection.problems, "warning")] == WARNINGS.get(file.stem, [])
    assert inspection.is_train == file.name.startswith("train_")
    assert list(work_folder.iterdir()) == []


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_ours_pass_without_a_warning(file: Path, work_folder: Path) -> None:
    inspection = inspect_options(str(file), root_path=str(work_folder), is_train=None, scope=NO_FILES)
    notes = of_severity(inspection.problems, "note")
    assert inspection.problems == notes
    assert inspection.is_train != file.name.startswith("test_")
    assert any(note.path == "network_g" and note.message.startswith("ESC") for note in notes)
