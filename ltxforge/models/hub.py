"""The Hugging Face Hub's side of a source: which commit, which files, what their headers say, and fetching them.

Decides nothing about models. Endpoint, cache folder, token and offline mode (HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE) are the library's own business and are not read here. Planning fetches JSON files and headers only.
Torch-free.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx  # the transport of huggingface_hub; its errors come through
from huggingface_hub import (
    CacheNotFound,
    HfApi,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ltxforge.digests import FileDigests
from ltxforge.errors import HubError, WeightsError
from ltxforge.models.trees import LocalTree, Tree
from ltxforge.models.weights import Header, TensorEntry, read_header, refuse_format
from ltxforge.specs import SPECS

TIMEOUT_SECONDS = 20.0

_OFFLINE_REMEDY = (
    "Check the connection, or: give the path of a local copy; set HF_ENDPOINT to a mirror; or set HF_HUB_OFFLINE=1 if "
    "the files are in the Hub's cache (HF_HOME) already."
)


@dataclass(frozen=True)
class HubFile:
    """One file of a repository: bytes, and its SHA-256 where the Hub stores it as a large file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class HubTree:
    """A repository at one commit."""

    inside: str
    repository: str
    revision: str
    listing: Mapping[str, HubFile]

    def files(self, folder: str) -> Mapping[str, int]:
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): file for path, file in self.listing.items() if path.startswith(prefix)}
        return {name: file.bytes for name, file in sorted(inside.items()) if "/" not in name}

    def is_file(self, path: str) -> bool:
        return path in self.listing

    def size(self, path: str) -> int:
        return self.listing[path].bytes

    def read(self, path: str) -> bytes:
        with told(self.repository):
            return Path(hf_hub_download(self.repository, path, revision=self.revision)).read_bytes()

    def header(self, path: str) -> Header:
        refuse_format(path, self.describe(path))
        if (local := self.local(path)) is not None:
            return read_header(local)
        with told(self.repository):
            found = HfApi().parse_safetensors_file_metadata(
                self.repository, path, revision=self.revision, timeout=TIMEOUT_SECONDS
            )
        tensors = {name: TensorEntry(tensor.dtype, tuple(tensor.shape)) for name, tensor in found.tensors.items()}
        return Header(tensors, found.metadata or {})

    def digest(self, path: str) -> str:
        return self.listing[path].sha256 or hashlib.sha256(self.read(path)).hexdigest()

    def local(self, path: str) -> Path | None:
        found = try_to_load_from_cache(self.repository, path, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def describe(self, path: str) -> str:
        return f"{self.repository}:{path}" if path else self.repository


def open_hub(repository: str, inside: str, revision: str, digests: FileDigests) -> Tree:
    """The repository at the commit that `revision` names now; from the cache alone in offline mode."""
    try:
        with told(repository, revision):
            info = HfApi().model_info(
                repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
    except _OfflineError:
        return open_cached(repository, inside, revision, digests)
    listing = {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else "") for file in info.siblings or ()
    }
    if inside and not any(path == inside or path.startswith(f"{inside}/") for path in listing):
        raise _absent_inside(repository, inside, listing)
    return HubTree(inside, repository, info.sha or revision, listing)


def open_cached(repository: str, inside: str, revision: str, digests: FileDigests) -> LocalTree:
    """A snapshot in the cache: the commit, else what the branch last pointed to here, else the newest.

    The library's own offline download is of no use: it wants whole repositories, and knows a branch only by downloads
    that named it, while plans name commits.
    """
    try:
        cached = [repo for repo in scan_cache_dir().repos if (repo.repo_id, repo.repo_type) == (repository, "model")]
    except CacheNotFound:
        cached = []
    snapshots = sorted((found for repo in cached for found in repo.revisions), key=lambda found: found.last_modified)
    name = revision or "main"
    named = [found for found in snapshots if name == found.commit_hash or name in found.refs]
    fitting = named or ([] if revision else snapshots)
    if not fitting:
        raise HubError(
            f"{repository}{'@' + revision if revision else ''} is not in the Hub's cache, and HF_HUB_OFFLINE forbids "
            "asking for it",
            remedy="Unset HF_HUB_OFFLINE to download it, set HF_HOME to where the cache is, or give a path.",
        )
    newest = fitting[-1]
    return LocalTree(Path(newest.snapshot_path), inside, digests, repository, newest.commit_hash)


def fetch_files(repository: str, revision: str, paths: Iterable[str]) -> Path:
    """Download exactly these files, if the cache does not hold them, and give the snapshot's folder."""
    exact = [glob.escape(path) for path in paths]
    try:
        with told(repository, revision):
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=exact))
    except _OfflineError as error:
        raise HubError(
            f"HF_HUB_OFFLINE forbids fetching what the cache lacks of {repository}", remedy=_OFFLINE_REMEDY
        ) from error


class _OfflineError(Exception):
    """The library was told to stay offline."""


@contextlib.contextmanager
def told(repository: str, revision: str = "") -> Iterator[None]:
    """Turn the Hub's errors into one message each: what, which repository, what to do."""
    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise _OfflineError from error
    except GatedRepoError as error:
        raise HubError(
            f"{repository} is gated and refuses this account",
            remedy=f"Accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except RepositoryNotFoundError as error:
        near = difflib.get_close_matches(
            repository, sorted({spec.hub.partition(":")[0] for spec in SPECS.values()}), n=1
        )
        hint = f"Did you mean {near[0]}? " if near else ""
        raise HubError(
            f"the Hub has no model {repository}, or does not show it to this account",
            remedy=f"{hint}For a private or gated one, accept its terms at {page} and set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{repository} has no revision {revision!r}",
            remedy=f"See {page}/commits/main for its commits; without @revision the newest is taken.",
        ) from error
    except SafetensorsParsingError as error:
        raise WeightsError(f"is no safetensors file: {error}") from error
    except (LocalEntryNotFoundError, httpx.TransportError) as error:
        raise _unreachable(repository, error) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repository} lacks a file that its list names: {error}") from error
    except HfHubHTTPError as error:
        raise _refused(repository, error, page) from error


def _unreachable(repository: str, error: Exception) -> HubError:
    cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return HubError(
        f"the Hugging Face Hub cannot be reached for {repository} ({cause})",
        remedy=_OFFLINE_REMEDY,
    )


def _refused(repository: str, error: HfHubHTTPError, page: str) -> HubError:
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return HubError(
            f"the Hub refuses {repository} (status {status})",
            remedy=f"Accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN.",
        )
    return HubError(
        f"the Hub answered {status} for {repository}",
        remedy="Try again later. " + _OFFLINE_REMEDY,
    )


def _absent_inside(repository: str, inside: str, listing: Mapping[str, HubFile]) -> WeightsError:
    folders = {path.rpartition("/")[0] for path in listing} - {""}
    near = difflib.get_close_matches(inside, [*listing, *folders], n=1, cutoff=0.4)
    hint = f"Did you mean {repository}:{near[0]}?" if near else "See the repository's file list."
    return WeightsError(f"{repository} has nothing at {inside!r}", remedy=hint)
