"""The worker process: answers questions about media files, so that hostile ones crash or hang it and not us.

Started by exec (`python -m ltxforge.media.worker`) and kept by `media.supervisor`. Protocol: one JSON line per request
on standard input; answers are JSON lines on standard output, and `{"frame": n}` is followed by n bytes of raw RGB or
of raw samples. A pipe rather than shared memory: a copy costs about 0.1 ms a frame, and a killed worker leaves nothing
behind in /dev/shm, which containers keep small. The worker ends when its input closes, and by itself when a request
overstays.
Imports no torch; never writes a file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import av

from ltxforge.media.audio_facts import inspect_sound
from ltxforge.media.audio_file import read_samples
from ltxforge.media.video_facts import inspect
from ltxforge.media.video_file import MediaFault, read_frames

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MEMORY_BYTES = 4 * 2**30
WRITTEN_BYTES = 16 * 2**20  # nothing is written but messages on standard error
# The supervisor kills a worker that overstays; this is for the case that the supervisor is gone.
GRACE_SECONDS = 5.0


def answer(request: dict[str, Any], out: BinaryIO) -> None:
    """Carry out one request and write its answers; the last one is `{"done": …}` or `{"fault": reason, "good": n}`."""
    try:
        for head, payload in _answers(request):
            _send(out, head, payload)
    except MediaFault as error:
        _send(out, {"fault": error.reason, "good": error.good})
    except MemoryError:
        _send(out, {"fault": f"decoding it needs more than {MEMORY_BYTES / 2**30:.0f} GiB of memory", "good": 0})
    except OSError as error:
        _send(out, {"fault": f"cannot be read ({error.strerror or error})", "good": 0})
    except Exception as error:  # whatever else a broken file brings out of a decoder is this file's fault
        _send(out, {"fault": f"{type(error).__name__}: {error}", "good": 0})


def _answers(request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
    if request["do"] == "inspect":
        yield {"done": inspect(request["path"])}, b""
    elif request["do"] == "inspect_sound":
        yield {"done": inspect_sound(request["path"])}, b""
    elif request["do"] == "frames":
        width, height = request["size"]
        for frame in read_frames(request["path"], request["timestamps"], (width, height)):
            yield {"frame": frame.nbytes}, frame.tobytes()
        yield {"done": {}}, b""
    elif request["do"] == "audio":
        samples = read_samples(
            request["path"], request["start"], request["length"], request["rate"], request["channels"],
            on_picture_time=request["on_picture_time"],
        )  # fmt: skip
        if samples is not None:
            yield {"frame": samples.nbytes}, samples.tobytes()
        yield {"done": {"has_sound": samples is not None}}, b""
    else:
        raise ValueError(f"unknown request {request['do']!r}")


def _send(out: BinaryIO, head: dict[str, Any], payload: bytes = b"") -> None:
    out.write(json.dumps(head).encode("ascii") + b"\n")
    out.write(payload)
    out.flush()


def _limit() -> None:
    """Bound what this process can take. Stop signals may reach a whole group or service; they are the parent's
    business, and this process ends with its input.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    av.logging.set_level(None)
    if resource is None:
        return
    for name, value in (("RLIMIT_AS", MEMORY_BYTES), ("RLIMIT_FSIZE", WRITTEN_BYTES), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not everywhere, and never above a lower limit
            resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    """Answer requests until standard input closes."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not garble the protocol
    _limit()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["seconds"] + GRACE_SECONDS, exit=True)
        answer(request, out)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
