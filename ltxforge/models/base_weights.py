"""A transformer's weights to where they stay: from its files or, once they were quantised, from what was kept of that.

Decides which of the two each tensor comes from: quantised weights from the cache if an entry of theirs can be trusted,
everything else from the files. How each is kept is `quant/place.py`'s. Knows no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from torch import nn

from ltxforge.events import BaseQuantised, Note
from ltxforge.models.formats import stored_format
from ltxforge.models.tensors import Checkpoint
from ltxforge.quant import cache
from ltxforge.quant.formats import FORMATS
from ltxforge.quant.keep import Keep
from ltxforge.quant.place import Named, place
from ltxforge.quant.report import BaseReport
from ltxforge.quant.weights import Stored

Module = TypeVar("Module", bound=nn.Module)


def placed(module: Module, tensors: Named, keep: Keep, digest: str = "") -> Module:
    """A transformer that waits for its tensors, with them: `tensors` gives all of its parameters by name.

    Args:
        digest: what names the content, so that quantised weights can be kept under it; "" for what is not kept.
    """
    if not _is_kept(keep, digest):
        return _told(module, place(module, tensors, keep), keep)
    assert keep.cache is not None
    with cache.Keeper(keep.cache, cache.key_of(digest, keep), keep.emit) as keeper:
        report = place(module, tensors, keep, heard=keeper.add)
        keeper.finish(report)
    return _told(module, report, keep)


def placed_from_files(
    module: Module, source: Path | Sequence[Path], names: Mapping[str, str], keep: Keep, digest: str
) -> Module:
    """A transformer's module, without memory until now, with its files' tensors.

    Args:
        source, names: as for `tensors.fill`.
        digest: as for `placed`; files that are quantised already are not kept a second time.
    """
    checkpoint, wanted = Checkpoint(source), {original: name for name, original in names.items()}
    comes_so = stored_format(checkpoint.header.tensors, wanted) == keep.base_precision
    if comes_so or not _is_kept(keep, digest):
        return placed(module, _read(checkpoint, wanted), keep)
    assert keep.cache is not None
    entry = cache.find(keep.cache, cache.key_of(digest, keep), keep.emit)
    if entry is None:
        return placed(module, _read(checkpoint, wanted), keep, digest)
    return _placed_from_cache(module, entry, checkpoint, wanted, keep)


def _placed_from_cache(
    module: Module, entry: cache.Entry, checkpoint: Checkpoint, wanted: Mapping[str, str], keep: Keep
) -> Module:
    kept = Checkpoint(entry.files)
    rest = {original: name for original, name in wanted.items() if name not in kept.header.tensors}
    own = {name: name for name in wanted.values() if name in kept.header.tensors}
    tensors = chain(_read(checkpoint, rest), _read(kept, own))
    return _told(module, place(module, tensors, keep, known=entry.report), keep)


def _is_kept(keep: Keep, digest: str) -> bool:
    """Whether what is quantised is kept for the next start."""
    return bool(digest) and keep.cache is not None and keep.base_precision in FORMATS


def _read(checkpoint: Checkpoint, wanted: Mapping[str, str]) -> Iterator[tuple[str, Stored]]:
    """Tensors under the module's own names; `wanted` maps the files' to these."""
    for original, stored in checkpoint.read(wanted):
        yield wanted[original], stored


def _told(module: Module, report: BaseReport, keep: Keep) -> Module:
    module.base_report = report
    if report.layers:
        keep.emit(BaseQuantised(report.to_json()))
    else:  # a base that was made whole may still have been quantised before
        for note in report.notes:
            keep.emit(Note(note))
    return module
