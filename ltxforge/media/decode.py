"""Pictures out of files: the frames of a video at given times, and still images. Torch-free.

Both follow `media.geometry`'s rule (resize to cover, crop the centre). Video is decoded in the worker process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltxforge.media import geometry
from ltxforge.media.supervisor import SECONDS, Refused, WorkerFault, once_more, worker

RESIZE = geometry.RESIZE
# Formats that Pillow reads by itself: for others (EPS) it would start another program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_SECONDS_PER_FRAME = 0.5


class DecodeError(Exception):
    """Frames or an image that cannot be decoded, in plain words. `good` counts the frames before the failure."""

    def __init__(self, reason: str, good: int = 0) -> None:
        self.reason, self.good = reason, good
        super().__init__(reason)


def decode(path: Path, timestamps_seconds: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The frames of a video that are shown at the given times.

    Args:
        path: the video.
        timestamps_seconds: times from the first frame, not decreasing. For each the frame whose display interval
            contains it, so that neither a higher nor a variable frame rate changes the speed of what is seen.
        size: (width, height) of the result.

    Returns:
        uint8 RGB [N, H, W, 3], rotation and pixel aspect applied, resized to cover `size` and cropped.

    Raises:
        DecodeError: a wanted frame does not decode, or lies behind the end.
    """
    times = [float(seconds) for seconds in timestamps_seconds]
    if not times or times[0] < 0 or any(later < earlier for earlier, later in pairwise(times)):
        raise ValueError("timestamps must be at least one, not negative and not decreasing")
    try:
        return once_more(lambda: worker().frames(path, times, size, SECONDS + len(times) * _SECONDS_PER_FRAME))
    except (Refused, WorkerFault) as error:
        raise DecodeError(error.reason, error.good) from error


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A still image as uint8 RGB [H, W, 3], EXIF orientation applied, resized to cover `size` and cropped.

    Transparent parts show black. Raises DecodeError.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            upright = _opaque(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise DecodeError(f"not an image of a known kind ({', '.join(IMAGE_FORMATS)})") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"the image cannot be read ({error})") from error
    resized = upright.resize(geometry.cover_size(upright.size, size), Image.Resampling.BICUBIC)
    return geometry.crop_centre(np.asarray(resized), size).copy()


def _opaque(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), with_alpha).convert("RGB")
    return image.convert("RGB")
