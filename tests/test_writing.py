"""writing.py: a file or a directory is written whole or not at all, also where a mount cannot do everything."""

import errno
import json
import math
import os
import shutil
import stat

import pytest

from support.writing import sync, write_json, written_whole


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def stop(*_):
    raise KeyboardInterrupt


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        with written_whole(tmp_path / "final") as aside:
            (aside / "file").write_text(content)
            assert (tmp_path / "final").exists() == (content == "new")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "final") as aside:
        (aside / "file").write_text("half")
        stop()
    assert names(tmp_path) == ["final"] and (tmp_path / "final" / "file").read_text() == "new"


def test_a_kill_before_the_old_directory_is_deleted_leaves_no_half_of_it_under_its_name(tmp_path, monkeypatch):
    for content in ("old", "new"):
        with written_whole(tmp_path / "final") as aside:
            (aside / "file").write_text(content)
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert (tmp_path / "final" / "file").read_text() == "new" and (tmp_path / ".final.tmp-old" / "file").exists()


def test_json_has_no_nan_and_an_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "si.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 1})
    assert path.read_text() == "old" and names(tmp_path) == ["si.json"]
    write_json(path, {"a": math.nan, "b": [math.inf, 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.EACCES])
def test_a_mount_that_syncs_no_directory_is_good_enough_and_one_that_syncs_no_file_is_not(number, tmp_path, monkeypatch):
    real = os.fsync

    def refuse(kind):
        def fsync(descriptor):
            if kind(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            real(descriptor)
        return fsync

    monkeypatch.setattr(os, "fsync", refuse(stat.S_ISDIR))
    with written_whole(tmp_path / "final") as aside:
        (aside / "file").write_text("content")
    sync(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(stat.S_ISREG))
    with pytest.raises(OSError):
        sync(tmp_path / "final" / "file")
