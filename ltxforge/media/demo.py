"""The built-in dataset: six small clips of moving shapes with captions, four of them with sound, as real mp4 files.

It stands in for a user's folder in the quickstart (`path = "builtin/shapes"`) and takes the same way through scan,
probe and decode. Deterministic: the same versions of numpy, Pillow and ffmpeg write the same bytes. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ltxforge import durable
from ltxforge.media.write import write_video

# Raise by hand when the clips change; folders of another version are rendered again.
VERSION = 2
SECONDS = 2.0
SAMPLE_RATE = 48000
_FACTS = {"dataset": "builtin/shapes", "version": VERSION}
_OVERSAMPLING = 4  # drawn larger and reduced, which smooths all edges

Colour = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw, float, int, int], None]
# Seconds [samples] → what is heard then, [samples], full scale 1; the same on both sides.
Sound = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Scene:
    """A clip: `draw` paints at time p in [0, 1] on a canvas of width × height; the background fades top to bottom.

    Without `sound` the file has no sound track, as half of all clips that people have.
    """

    name: str
    caption: str
    draw: Draw
    top: Colour
    bottom: Colour
    width: int = 128
    height: int = 96
    fps: int = 25
    sound: Sound | None = None


def render(directory: Path) -> Path:
    """Make the dataset at `directory`, or reuse it if it is there and whole. Returns the directory."""
    if directory.exists() and _is_whole(directory):
        return directory
    try:
        if directory.exists():
            durable.retire(directory)
        with durable.staged_folder(directory, _FACTS) as staging:
            for scene in _SCENES:
                video = staging / f"{scene.name}.mp4"
                write_video(video, _frames(scene), scene.fps, threads=1, audio=_heard(scene), sample_rate=SAMPLE_RATE)
                durable.write_file(staging / f"{scene.name}.txt", scene.caption + "\n")
    except OSError:
        if not _is_whole(directory):  # else another process rendered it meanwhile
            raise
    return directory


def _is_whole(directory: Path) -> bool:
    return durable.verify_folder(directory) == (_FACTS, "")


def _frames(scene: _Scene) -> np.ndarray:
    """All pictures of a scene, uint8 [N, H, W, 3]."""
    count = round(SECONDS * scene.fps)
    size = scene.width * _OVERSAMPLING, scene.height * _OVERSAMPLING
    background = _gradient(scene, *size)
    pictures = []
    for index in range(count):
        canvas = background.copy()
        scene.draw(ImageDraw.Draw(canvas), index / (count - 1), *size)
        pictures.append(np.asarray(canvas.resize((scene.width, scene.height), Image.Resampling.BOX)))
    return np.stack(pictures)


def _heard(scene: _Scene) -> np.ndarray | None:
    """The scene's sound, float32 [2, samples], or None."""
    if scene.sound is None:
        return None
    seconds = np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    return np.stack([scene.sound(seconds)] * 2).astype(np.float32)


def _gradient(scene: _Scene, width: int, height: int) -> Image.Image:
    share = np.linspace(0.0, 1.0, height)[:, None, None]
    column = (1 - share) * np.array(scene.top) + share * np.array(scene.bottom)
    return Image.fromarray(np.broadcast_to(column.round().astype(np.uint8), (height, width, 3)).copy())


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _polygon(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, corners: int, turn: float, fill: Colour
) -> None:
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    draw.polygon([(x + radius * math.sin(angle), y - radius * math.cos(angle)) for angle in angles], fill=fill)


def _rolling_disc(draw: ImageDraw.ImageDraw, p: float, width: int, height: int) -> None:
    radius, ground = 0.2 * height, 0.84 * height
    travel = width - 2 * radius
    x, y, angle = radius + p * travel, ground - radius, p * travel / radius  # rolls without slipping
    draw.rectangle((0, ground, width, height), fill=(96, 74, 58))
    _disc(draw, x, y, radius, (214, 40, 40))
    _disc(draw, x + 0.55 * radius * math.sin(angle), y - 0.55 * radius * math.cos(angle), 0.2 * radius, (255, 236, 214))


def _bouncing_square(draw: ImageDraw.ImageDraw, p: float, width: int, height: int) -> None:
    side, ground = 0.34 * height, 0.9 * height
    bounce = (2 * p) % 1.0
    y = ground - side - 0.5 * height * 4 * bounce * (1 - bounce)
    draw.rectangle((0, ground, width, height), fill=(52, 78, 65))
    draw.rectangle((0.5 * (width - side), y, 0.5 * (width + side), y + side), fill=(33, 98, 219))


def _rising_triangle(draw: ImageDraw.ImageDraw, p: float, width: int, height: int) -> None:
    eased = p * p * (3 - 2 * p)
    _polygon(draw, 0.5 * width, height * (0.95 - 0.75 * eased), 0.24 * height, 3, 0.0, (46, 160, 67))


def _turning_star(draw: ImageDraw.ImageDraw, p: float, width: int, height: int) -> None:
    turn, x, y = math.pi * p, 0.5 * width, 0.5 * height
    points = []
    for corner in range(10):
        radius = (0.38 if corner % 2 == 0 else 0.16) * height
        angle = turn + math.pi * corner / 5
        points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
    draw.polygon(points, fill=(255, 200, 40))


def _growing_ring(draw: ImageDraw.ImageDraw, p: float, width: int, height: int) -> None:
    x, y, radius = 0.5 * width, 0.5 * height, min(width, height) * (0.08 + 0.34 * p)
    thickness = 0.09 * min(width, height)
    draw.ellipse(
        (x - radius, y - radius, x + radius, y + radius), outline=(176, 60, 200), width=max(1, round(thickness))
    )


def _crossing_discs(draw: ImageDraw.ImageDraw, p: float, width: int, height: int) -> None:
    radius = 0.15 * height
    sway = 0.5 * (width - 2.4 * radius) * math.cos(math.pi * p)
    _disc(draw, 0.5 * width - sway, 0.34 * height, radius, (255, 130, 20))
    _disc(draw, 0.5 * width + sway, 0.66 * height, radius, (20, 170, 180))


def _rumble(seconds: np.ndarray) -> np.ndarray:
    """A disc rolls: low tones that beat against each other."""
    return 0.15 * sum(np.sin(2 * np.pi * hertz * seconds) for hertz in (82.0, 87.0, 131.0))


def _two_thuds(seconds: np.ndarray) -> np.ndarray:
    """A square lands half way and at the end of its second bounce: short falling knocks."""
    heard = np.zeros_like(seconds)
    for landing in (0.0, SECONDS / 2):
        since = np.maximum(seconds - landing, 0.0)
        heard += 0.6 * np.where(seconds >= landing, np.exp(-12 * since) * np.sin(2 * np.pi * 110 * since), 0.0)
    return heard


def _rising_tone(seconds: np.ndarray) -> np.ndarray:
    """From 220 to 880 Hz."""
    return 0.3 * np.sin(2 * np.pi * (220 * seconds + 0.5 * (880 - 220) / SECONDS * seconds**2))


def _growing_hum(seconds: np.ndarray) -> np.ndarray:
    """Silent at first, louder as the ring grows."""
    return 0.4 * seconds / SECONDS * np.sin(2 * np.pi * 330 * seconds)


_SCENES = (
    _Scene("red_disc", "A red disc with a pale dot rolls from left to right over brown ground, under a light blue sky.",
           _rolling_disc, (150, 200, 235), (228, 240, 248), sound=_rumble),
    _Scene("blue_square", "A blue square bounces twice on dark green ground in front of a cream background.",
           _bouncing_square, (250, 240, 215), (240, 220, 180), sound=_two_thuds),
    _Scene("green_triangle", "A green triangle rises slowly from the bottom to the top of a pink background.",
           _rising_triangle, (250, 205, 210), (255, 232, 225), width=96, height=128, sound=_rising_tone),
    _Scene("yellow_star", "A yellow star turns clockwise in the middle of a dark night-blue background.",
           _turning_star, (16, 20, 52), (40, 48, 100), fps=50),
    _Scene("purple_ring", "A purple ring grows from the centre of a pale grey background.",
           _growing_ring, (238, 238, 242), (206, 208, 216), sound=_growing_hum),
    _Scene("two_discs", "An orange disc and a teal disc cross each other's way in front of a dark grey background.",
           _crossing_discs, (52, 54, 60), (78, 80, 88)),
)  # fmt: skip
