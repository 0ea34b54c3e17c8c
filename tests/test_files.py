"""Output files and folders."""

import errno
from pathlib import Path

import pytest

from fedsim.errors import ConfigError, RunError
from fedsim.files import check_folder, write_atomically


def test_a_full_disk_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_atomically(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def check(folder: Path, same: bool, resume: bool) -> None:
    check_folder(folder, "sweep.yaml", "sweep", lambda saved: same and saved.read_text() == "mine", resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_free_folder_is_accepted_and_left_as_it_is(tmp_path: Path, resume: bool) -> None:
    asked: list[Path] = []
    for folder in (tmp_path / "missing", tmp_path):
        check_folder(folder, "sweep.yaml", "sweep", lambda saved: bool(asked.append(saved)), resume)
    assert not asked, "there is no file to be asked about"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder that you may write to"):
        check(tmp_path / "file" / "deeper" / "still", same=True, resume=False)


def test_what_a_killed_process_has_left_of_a_file_is_nothing(tmp_path: Path) -> None:
    (tmp_path / ".sweep.yaml.tmp").write_text("mi")
    check(tmp_path, same=True, resume=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not empty"):
        check(tmp_path, same=True, resume=True)


def test_a_folder_that_holds_the_same_is_gone_on_with_when_asked(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("mine")
    check(tmp_path, same=True, resume=True)
    with pytest.raises(ConfigError, match="holds this sweep already; --resume"):
        check(tmp_path, same=True, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no sweep; choose another name or --output"):
        check(tmp_path, same=True, resume=resume)
    (tmp_path / "sweep.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="holds another sweep"):
        check(tmp_path, same=False, resume=resume)
