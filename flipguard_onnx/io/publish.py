"""Files that appear whole or not at all, however a run ends.

A run writes into a workspace, a hidden folder beside its target, and at the end moves the finished
files out by renaming them. A model and its data file take two renames. They belong together by the
data file's name, `MODEL.DIGEST.data` with 16 hex digits of the sha256 of its content: a name never
stands for other data, so an old model keeps its data until it is replaced, and a new model never
finds the old data. The data file of a replaced model is removed last.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path

from ..errors import ModelError
from ..interrupts import surely

LOCK = ".flipguard-lock"  # in the target's folder while files are moved there

LOCK_SECONDS = 60.0  # to wait for it; moving files takes milliseconds

NO_LOCKS = (  # of file systems without locks: Lustre without -o flock, some NFS
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
)

REPORT = re.compile(
    rb"\Z|\{\n  \"|<!doctype html|input    |config    "
)  # what a report begins with

WORKSPACE = re.compile(r"\.flipguard-[0-9a-f]{16}")


@dataclass(frozen=True)
class Finished:
    """A written model.

    Parameters
    ----------
    model : the file
    data : its data file, if it has one
    target : where the model goes; the data file goes beside it
    """

    model: Path
    data: Path | None
    target: Path

    @property
    def places(self) -> dict[Path, Path]:
        """Where each file is, by where it goes."""
        data = {self.target.with_name(self.data.name): self.data} if self.data else {}
        return {self.target: self.model} | data


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, on the same file system; it is removed at the end.

    Raises ModelError for what the system refuses while it is in use, on a full disk for example.
    """
    try:
        with ExitStack() as stack:
            sweep(folder)
            yield _claimed(folder, stack)
    except OSError as error:
        raise ModelError(
            "cannot be written: {found}", path=folder, found=error.strerror or str(error)
        ) from None


def sweep(folder: Path) -> None:
    """Remove what killed runs of this user left: workspaces whose locks nobody holds."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if WORKSPACE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path))


@contextmanager
def made(folders: Iterable[Path]) -> Iterator[None]:
    """Make folders where they are missing, and remove them again if nothing gets in.

    Raises
    ------
    ModelError : one cannot be made
    """
    folders = list(folders)
    missing = {p for folder in folders for p in (folder, *folder.parents) if not p.exists()}
    try:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ModelError(
                    "cannot be made: {found}", path=folder, found=error.strerror
                ) from None
        yield
    finally:
        for each in sorted(missing, key=lambda path: -len(path.parts)):
            with suppress(OSError):  # it is not empty
                each.rmdir()


def check_target(target: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise ModelError if an output may not go there.

    Parameters
    ----------
    target : the output; data files of an earlier output of that name count as well
    inputs : files that it may not replace
    force : it may replace any other file
    """
    try:
        if not target.parent.is_dir():
            raise ModelError("no such folder to write to", path=target.parent)
        for file in (target, *data_files(target)):
            if file.exists() and any(file.samefile(other) for other in inputs):
                raise ModelError("belongs to the input; the output needs another name", path=file)
            if file.exists() and not file.is_file():
                raise ModelError("is no regular file; the output needs another name", path=file)
            if os.path.lexists(file) and not force:
                raise ModelError("exists already; --force overwrites it", path=file)
    except OSError as error:
        raise ModelError("cannot be written: {found}", path=target, found=error.strerror) from None


def publish(files: Sequence[Finished], force: bool, lock_seconds: float = LOCK_SECONDS) -> None:
    """Move finished files to their targets; what they replace is removed last.

    Contents and names are flushed to the disk in an order that a power cut cannot reverse.

    Parameters
    ----------
    files : their targets are all in one folder
    force : replace what is there
    lock_seconds : to wait for another run that moves files there

    Raises
    ------
    ModelError
        Before anything has moved, if a target has appeared in the meantime.
    """
    for file in files:
        for path in filter(None, (file.data, file.model)):
            _flush(path)
    with _locked(files[0].target.parent / LOCK, lock_seconds):
        for file in files:
            check_target(file.target, (), force)
        for file in files:
            _switch(file)


def check_report(path: Path) -> None:
    """Raise ModelError if a report may not go there: over another file, or through a link."""
    if path.is_symlink() and (path.is_file() or not path.exists()):
        raise ModelError("is a link; the report needs another name", path=path)
    if path.is_dir() or not os.access(path.parent, os.W_OK, effective_ids=True):
        raise ModelError("the report cannot be written there", path=path)
    if path.is_file() or not path.exists():
        with _report_errors(path), ExitStack() as stack:
            _draft(path, "", stack)
    if path.is_file():
        with path.open("rb") as stream:
            if not REPORT.match(stream.read(16)):
                raise ModelError(
                    "exists and is no report; the report needs another name", path=path
                )


def write_report(path: Path, text: str) -> None:
    """Write a text file whole or not at all; to a device or a pipe directly.

    Raises ModelError when it cannot be written.
    """
    with reports({path: text}):
        pass


@contextmanager
def reports(texts: Mapping[Path, str]) -> Iterator[None]:
    """Write text files in full, and move them to their places if the body raises nothing.

    Raises
    ------
    ModelError : before the body, if one cannot be written
    """
    with ExitStack() as stack:
        drafts = {}
        for path, text in texts.items():
            with _report_errors(path):
                if path.exists() and not path.is_file():
                    path.write_text(text)  # a device or a pipe
                else:
                    drafts[path] = _draft(path, text, stack)
        yield
        for path, draft in drafts.items():
            with _report_errors(path):
                os.replace(draft, path)
                _flush(path.parent)


def data_files(target: Path) -> list[Path]:
    """The data files that outputs at `target` have left beside it."""
    return sorted(target.parent.glob(f"{escape(target.name)}.{'[0-9a-f]' * 16}.data"))


def _draft(path: Path, text: str, stack: ExitStack) -> Path:
    """A file with the text of a report, in a workspace beside the report's place."""
    sweep(path.parent)
    draft = _claimed(path.parent, stack) / path.name
    draft.write_text(text)
    _flush(draft)
    return draft


@contextmanager
def _report_errors(path: Path) -> Iterator[None]:
    """Name the report in what the system refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError("the report cannot be written: {found}", path=path, found=reason) from None


def _switch(file: Finished) -> None:
    """Move one model and its data file, and remove the data file of the one that it replaces."""
    folder = file.target.parent
    before = data_files(file.target)
    placed = [folder / file.data.name] if file.data else []

    def tidy() -> None:
        """Remove the data of the model that is not there, the old one or the new one."""
        switched = not file.model.exists()
        keep, drop = (placed, before) if switched else (before, placed)
        for path in drop:
            if path not in keep:
                path.unlink(missing_ok=True)

    try:
        if file.data:
            os.replace(file.data, folder / file.data.name)
            _flush(folder)
        os.replace(file.model, file.target)
        _flush(folder)
    finally:
        surely(tidy)


def _claimed(folder: Path, stack: ExitStack) -> Path:
    """A new workspace, its lock held; made again if another run sweeps it before that."""
    while True:
        path = folder / f".flipguard-{secrets.token_hex(8)}"
        stack.callback(surely, partial(_remove, path))
        path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            lock = stack.enter_context((path / "lock").open("xb"))
            with suppress(OSError):  # NO_LOCKS: no sweep gets a lock either then
                fcntl.flock(lock, fcntl.LOCK_EX)
            (path / "files").mkdir()
            return path / "files"


def _remove_if_dead(path: Path) -> None:
    """Remove a workspace of this user whose lock nobody holds."""
    if path.lstat().st_uid != os.geteuid():
        return
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        path.rmdir()  # killed before it had a lock, or after: empty in both cases
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a workspace, the lock last, so that a sweep can finish what was interrupted."""
    shutil.rmtree(path / "files", ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file, which exists only while somebody holds it."""
    lock = _acquired(path, seconds)

    def release() -> None:
        if _is(path, lock):
            path.unlink()

    try:
        yield
    finally:
        try:
            surely(release)
        finally:
            os.close(lock)


def _is(path: Path, descriptor: int) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def _acquired(path: Path, seconds: float) -> int:
    """The descriptor of the lock file, once it is this process that holds it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, lock):
                return lock
        except (BlockingIOError, FileNotFoundError):
            time.sleep(0.02)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return lock
            os.close(lock)
            raise
        os.close(lock)
    raise ModelError(
        "another process has held this lock for {seconds:.0f} s", path=path, seconds=seconds
    )


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # for folders on some network file systems
            raise
    finally:
        os.close(descriptor)
