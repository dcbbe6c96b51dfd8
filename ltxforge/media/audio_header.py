"""What the bytes around the sound tell: how long it should be, and where a file is torn. Runs in the worker only.

ffmpeg shortens the duration of a cut WAV to what is left, guesses that of an MP3 without a header, and steps over torn
Ogg pages without a word; so these three are looked at here. Decodes nothing, decides no verdict. Torch-free.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import av

# Stated sizes that mean "unknown": the writer could not go back to fill them in.
_UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0x7FFFFFFF)
_PLAIN_SAMPLES = (1, 3, 0xFFFE)  # WAVE format tags: integers, floats, and either with channel names
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_OGG_HEAD, _OGG_CHECKSUM, _OGG_LAST_PAGE = 27, slice(22, 26), 4
_OGG_SEARCHED = 65536  # tags may stand before the first page


def stated_end(path: str, container: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    """Container time in seconds at which the sound ends by its header; None where no header says it."""
    kind, start = container.format.name, float((stream.start_time or 0) * stream.time_base)
    if kind == "wav" and (seconds := _seconds_of_wav(path)) is not None:
        return seconds
    if kind == "aac" or (kind == "mp3" and not _counts_its_frames(path)):
        return None
    if stream.duration:
        return start + float(stream.duration * stream.time_base)
    if seconds := _seconds_of_tag(stream.metadata.get("DURATION", "")):
        return seconds
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else None


def torn_page(path: str) -> int | None:
    """Offset of the first Ogg page (RFC 3533) that is not whole, or of what stands in its place; None if all are."""
    was_last = False
    with Path(path).open("rb") as file:
        file.seek(max(0, file.read(_OGG_SEARCHED).find(b"OggS")))
        while True:
            at, head = file.tell(), file.read(_OGG_HEAD)
            if not head or (was_last and head[:4] != b"OggS"):
                return None  # other programs put tags behind the end
            if len(head) < _OGG_HEAD or head[:4] != b"OggS":
                return at
            table = file.read(head[-1])
            body = file.read(sum(table))
            if len(table) < head[-1] or len(body) < sum(table) or not _is_whole(head + table + body):
                return at
            was_last = bool(head[5] & _OGG_LAST_PAGE)


def _is_whole(page: bytes) -> bool:
    """Whether the page's checksum holds: CRC-32 as zlib's, but from 0 and with the bits in the other order."""
    blank = page[: _OGG_CHECKSUM.start] + bytes(4) + page[_OGG_CHECKSUM.stop :]
    found = zlib.crc32(blank.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return found.to_bytes(4, "big").translate(_REVERSED_BITS) == page[_OGG_CHECKSUM]


def _seconds_of_wav(path: str) -> float | None:
    """Length by the size of the data chunk, of a RIFF file of plain samples."""
    bytes_per_second, tag = 0, 0
    with Path(path).open("rb") as file:
        if file.read(12)[:4] != b"RIFF":
            return None
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                is_stated = size not in _UNKNOWN_SIZES and tag in _PLAIN_SAMPLES and bytes_per_second
                return size / bytes_per_second if is_stated else None
            after = file.tell() + size + size % 2
            if head[:4] == b"fmt ":
                facts = file.read(min(size, 16))
                tag, bytes_per_second = int.from_bytes(facts[:2], "little"), int.from_bytes(facts[8:12], "little")
            file.seek(after)
    return None


def _counts_its_frames(path: str) -> bool:
    """Whether an MP3's first frame is a header that counts the others."""
    with Path(path).open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # 28 bits, seven to a byte
            file.seek(10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        return re.search(rb"Xing|Info|VBRI", file.read(512)) is not None


def _seconds_of_tag(text: str) -> float:
    """Matroska's statistics tag, "00:00:05.008000000"; 0 if it is none."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) if found else 0.0
