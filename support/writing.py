"""The files of a run and of a report: each is written whole, or what was there before stays.

What is written stands beside its place first and is then moved there. Waiting for the disk is strict
for a file: what the disk refuses is an error. For a directory it is an attempt: some mounts cannot.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from support import parallel


def write_aside(path, write) -> None:
    """Call `write(aside)` and move what it wrote to `path`: a crash leaves the old file or the new one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def written_whole(path: Path):
    """Yield a new directory to fill. When the block ends, it is synced and renamed to `path`.

    After a kill or an error, `path` is what was there before, or missing.
    """
    aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.tmp-old")
    for left in (aside, old):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for written in (*aside.rglob("*"), aside):
            sync(written)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file is on the disk; for a directory, try to wait until its list of names is."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # Windows opens no directory, and some mounts sync none
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def write_json(path, value) -> None:
    """Write `value` as a .json file; NaN and infinities, which JSON does not have, become null.

    Under torchrun process 0 alone writes, here and in `append_json`.
    """
    if parallel.rank() == 0:
        value = json.loads(json.dumps(value), parse_constant=lambda _: None)
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def append_json(path: Path, value) -> None:
    """Add a line to a .jsonl file."""
    if parallel.rank() == 0:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
