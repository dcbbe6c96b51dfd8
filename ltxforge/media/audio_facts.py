"""The facts of one file's sound: its length, and whether all of it decodes. Runs in the worker only.

Decodes it from end to end, which takes milliseconds for a minute of sound. Whether a recipe wants it is decided by
`dataset.scan`. Torch-free.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

from ltxforge.media.audio_file import AUDIO_FORMATS, TimeLine, facts_of, fill, sound_stream
from ltxforge.media.audio_header import stated_end
from ltxforge.media.video_file import MediaFault, open_container, pictures


def inspect_sound(path: str) -> dict[str, Any]:
    """The facts of a file's sound, as JSON-ready data for `probe.Sound`. Raises MediaFault if none of it decodes."""
    with closing(open_container(path, AUDIO_FORMATS)) as container:
        if not container.streams.audio:
            raise MediaFault("no sound in it")
        stated = stated_end(path, container, sound_stream(container)) or 0.0
        facts = {"has_picture": bool(pictures(container)), **facts_of(container)}
    line, fault = TimeLine(), ""
    try:
        fill(path, line)
    except MediaFault as error:
        if not line.has_sound:
            raise
        fault = error.reason
    if not line.has_sound:
        raise MediaFault("no sound in it")
    seconds = line.reached if line.has_ended else max(line.reached, stated - (line.origin or 0.0))
    return {"seconds": seconds, "fault": fault, **facts}
