"""Files that are whole or absent: write, fsync, rename, fsync the folder. The only module that renames or deletes.

A folder is committed in one rename after every file in it was synced and listed, with its digest, in `manifest.json`.
Sizes cannot prove a file whole (safetensors sizes its file first, so a power cut can leave zeros behind a valid
header), so reading verifies digests. Nothing outside the folder that a caller names is ever touched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltxforge.errors import DiskFullError, RunError

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\.(partial|trash)-\d+-[0-9a-f]{8}$")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Windows keeps these names for devices, in any folder and with any extension.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def is_safe_name(name: str) -> bool:
    """Whether a name from a recipe or prompt file may become a file name on every platform."""
    return bool(_NAME.fullmatch(name)) and name not in _RESERVED


def inside(root: Path, *parts: str) -> Path:
    """`root/parts`, refused if it would leave `root` once links are followed."""
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise RunError(f"{'/'.join(parts)!r} leads out of {root}", remedy="Use a plain name without `..` or links.")
    return path


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`, so that a reader sees the old file or the new one and nothing in between."""
    data = content.encode() if isinstance(content, str) else content
    partial = _beside(path, "partial")
    with _disk_full_told(path):
        make_folder(path.parent)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_file` with readable JSON; NaN and infinity are refused because JSON has no such numbers."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def require_writable(path: Path) -> None:
    """Raise the system's own OSError now if `write_file` could not write there; leaves the folder and no file."""
    partial = _beside(path, "partial")
    with _disk_full_told(path):
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        try:
            partial.touch()
        finally:
            partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """The folder with its parents, so that its own entry survives a power cut as the files in it do."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def commit_file(partial: Path, path: Path) -> None:
    """Give a finished file, written beside its target, its final name."""
    with _disk_full_told(path):
        _sync_file(partial)
        partial.replace(path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a partial name beside `path` for others to write to; afterwards it gets its final name, or is removed.

    Its mode is that of a new file here, as umask or folder have it, whatever the writer gave it (safetensors: 0600).
    """
    partial = _beside(path, "partial")
    with _disk_full_told(path):
        make_folder(path.parent)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            commit_file(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def staged_folder(final: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Build a folder under another name and commit it in one rename.

    Args:
        final: where the folder will stand; it must not exist yet.
        facts: what `manifest.json` says besides the files' digests. Must be JSON.

    Yields:
        The staging folder. On any exception it is removed and `final` never appears.
    """
    staging = _beside(final, "partial")
    with _disk_full_told(final):
        make_folder(final.parent)
        staging.mkdir()
        try:
            yield staging
            files = sorted(path for path in staging.rglob("*") if path.is_file())
            mode = staging.stat().st_mode & 0o666  # a new folder's without x is a new file's
            for path in files:
                path.chmod(mode)
                _sync_file(path)
            listing = {path.relative_to(staging).as_posix(): file_digest(path) for path in files}
            content = {"facts": facts, "files": listing}
            write_json(staging / MANIFEST, {**content, "digest": _json_digest(content)})
            staging.replace(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync_folder(final.parent)


def verify_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest's facts and an empty string, or `{}` and the reason why the folder cannot be trusted."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        facts, files = dict(manifest["facts"]), dict(manifest["files"])
        whole = manifest["digest"] == _json_digest({"facts": facts, "files": files})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"{MANIFEST} cannot be read ({error})"
    if not whole:
        return {}, f"{MANIFEST} is damaged: its SHA-256 is not the one that was saved"
    for name, digest in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return {}, f"{name} is missing"
        if file_digest(path) != digest:
            return {}, f"{name} is damaged: its SHA-256 is not the one that was saved"
    return facts, ""


def retire(path: Path) -> None:
    """Remove a file or folder of ours in two steps, so that an interrupted removal leaves no half folder behind."""
    trash = _beside(path, "trash")
    path.replace(trash)
    if trash.is_dir():
        shutil.rmtree(trash, ignore_errors=True)
    else:
        trash.unlink(missing_ok=True)


def sweep_leftovers(folder: Path, older_than_seconds: float = 0.0) -> None:
    """Remove partial and trash entries that killed processes of ours left in `folder`.

    Args:
        older_than_seconds: spare younger ones, where another process may be at work.
    """
    latest = time.time() - older_than_seconds
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # its owner lives and was faster
            if _LEFTOVER.search(path.name) and path.lstat().st_mtime <= latest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name in the same folder that no other writer takes: containers that share a disk share their pids."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Windows cannot open folders; NTFS journals the rename itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def faults_told(folder: Path) -> Iterator[None]:
    """Around a whole command: what the system refuses becomes an error that names the path and a way out.

    Args:
        folder: where the command writes, for faults that name no file.
    """
    try:
        with _disk_full_told(folder / "a file"):
            yield
    except OSError as error:
        if not error.errno or isinstance(error, BrokenPipeError):
            raise
        named = error.filename2 or error.filename
        named = named if isinstance(named, (str, bytes)) else None
        raise RunError(
            os.strerror(error.errno).lower(), where=str(folder if named is None else Path(os.fsdecode(named))),
            remedy="Nothing saved before was touched. Mend this, or choose another place, and start the same command"
            " again.",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _disk_full_told(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors raises its own type with the system's text in it
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full or isinstance(error, DiskFullError):
            raise
        named = getattr(error, "filename", None)
        place = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else path
        there = next(parent for parent in place.absolute().parents if parent.exists())
        raise DiskFullError(
            f"no space left while writing {place.name} ({shutil.disk_usage(there).free / 2**20:.0f} MiB free)",
            where=str(place.parent),
            remedy="Nothing saved before was touched. Free some space and start the same command again to continue.",
        ) from error
