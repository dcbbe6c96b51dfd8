"""A video as one picture: a few frames in a grid with their times, the prompt above them, the sound's wave below.

Decides which frames are shown, how large, and where text and wave go. Draws no conclusion about the video. Torch-free.
"""

from __future__ import annotations

import bisect
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ltxforge import durable

MOST_FRAMES = 8
# A tile is between these many pixels wide; tall ones are bounded by their height.
SMALLEST_TILE, LARGEST_TILE, TALLEST_TILE = 160, 320, 400
# A channel of sound is so many pixels high and drawn in so many times finer columns; quieter sound than this full scale
# (-20 dB) is drawn quiet.
WAVE_HEIGHT, WAVE_SMOOTHING, LEAST_FULL_SCALE = 44, 3, 0.1
MARGIN, GAP, LABEL_HEIGHT, LEAST_WIDTH = 20, 10, 22, 520
PROMPT_LINES = 3
LONGEST_PROMPT = 1000  # characters; three lines hold fewer
WAVE_PANEL, WAVE_MIDDLE, WAVES = (32, 35, 41), (58, 63, 72), ((104, 184, 178), (218, 164, 104))
BACKGROUND, TITLE, TEXT, FAINT = (24, 26, 30), (240, 241, 243), (204, 208, 214), (134, 140, 150)


@dataclass(frozen=True)
class SheetText:
    """What stands above the frames: the sample's name, its prompt (cut if long), and a line of facts."""

    title: str
    prompt: str
    facts: str


def write_contact_sheet(
    path: Path, frames: np.ndarray, fps: float, text: SheetText, audio: np.ndarray | None = None
) -> None:
    """Draw the sheet and write it as a PNG in one piece.

    Args:
        frames: uint8 [N, height, width, 3].
        audio: the sound of just these frames, [1 or 2, samples], full scale 1; None draws no wave.
    """
    buffer = io.BytesIO()
    draw_contact_sheet(frames, fps, text, audio).save(buffer, format="PNG", optimize=True)
    durable.write_file(path, buffer.getvalue())


def draw_contact_sheet(frames: np.ndarray, fps: float, text: SheetText, audio: np.ndarray | None = None) -> Image.Image:
    """The sheet as an RGB picture. Tiny frames are enlarged by a whole factor without blurring, large ones reduced."""
    chosen = chosen_frames(len(frames))
    tile = tile_size(frames.shape[2], frames.shape[1])
    columns = len(chosen) if len(chosen) <= 4 else -(-len(chosen) // 2)
    rows = -(-len(chosen) // columns)
    width = max(LEAST_WIDTH, 2 * MARGIN + columns * (tile[0] + GAP) - GAP)
    head = _head_lines(text, width - 2 * MARGIN)
    top = MARGIN + sum(height for _, _, _, height in head) + GAP
    bottom = top + rows * (tile[1] + LABEL_HEIGHT) + (rows - 1) * GAP
    strip = None if audio is None else _wave_strip(audio, len(frames) / fps, width - 2 * MARGIN)
    total = bottom + MARGIN - GAP + (0 if strip is None else strip.height + GAP)
    sheet = Image.new("RGB", (width, total), BACKGROUND)
    if strip is not None:
        sheet.paste(strip, (MARGIN, bottom + GAP // 2))
    draw = ImageDraw.Draw(sheet)
    line_top = MARGIN
    for line, font, colour, height in head:
        draw.text((MARGIN, line_top), line, fill=colour, font=font)
        line_top += height
    label_font = ImageFont.load_default(13)
    for position, index in enumerate(chosen):
        left = MARGIN + position % columns * (tile[0] + GAP)
        upper = top + position // columns * (tile[1] + LABEL_HEIGHT + GAP)
        sheet.paste(_tile(frames[index], tile), (left, upper))
        label = f"{index / fps:.2f} s"
        draw.text((left, upper + tile[1] + 4), label, fill=TEXT, font=label_font)
        number = f"frame {index}"
        place = left + tile[0] - label_font.getlength(number)
        draw.text((place, upper + tile[1] + 4), number, fill=FAINT, font=label_font)
    return sheet


def chosen_frames(count: int) -> list[int]:
    """Up to 8 frame numbers, evenly spaced, the first and the last among them."""
    shown = min(count, MOST_FRAMES)
    return [round(position * (count - 1) / max(1, shown - 1)) for position in range(shown)]


def tile_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a frame is drawn: a whole multiple of a small one, a reduction of a large one."""
    scale = min(LARGEST_TILE / width, TALLEST_TILE / height)
    if scale >= 2:
        factor = max(1, min(int(scale), -(-SMALLEST_TILE // width)))
        return width * factor, height * factor
    scale = min(1.0, scale)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _tile(frame: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.NEAREST if size[0] > image.width else Image.Resampling.LANCZOS)


def envelope(channel: np.ndarray, columns: int) -> np.ndarray:
    """Least and greatest value of the samples in each of `columns` equal parts: [2, columns]; no sample is left out."""
    edges = np.linspace(0, len(channel), columns + 1)
    first = np.minimum(np.floor(edges[:-1]).astype(int), len(channel) - 1)
    last = np.maximum(np.ceil(edges[1:]).astype(int), first + 1)
    parts = [channel[begin:end] for begin, end in zip(first, last, strict=True)]
    return np.array([[part.min() for part in parts], [part.max() for part in parts]])


def _wave_strip(audio: np.ndarray, seconds: float, width: int) -> Image.Image:
    """The wave over the whole time, the left channel above the right one, the same two drawn once; below a label."""
    audio = np.nan_to_num(np.asarray(audio, np.float64))
    audio = audio if audio.shape[1] else np.zeros((1, 1))
    channels = audio[:1] if np.ptp(audio, axis=0).max() < 1e-4 else audio
    peak = float(np.abs(audio).max())
    full_scale = max(LEAST_FULL_SCALE, peak)
    strip = Image.new("RGB", (width, len(channels) * (WAVE_HEIGHT + 2) + LABEL_HEIGHT), BACKGROUND)
    for row, (channel, colour) in enumerate(zip(channels, WAVES, strict=False)):
        strip.paste(_wave(channel / full_scale, width, colour), (0, row * (WAVE_HEIGHT + 2)))
    draw, font, top = ImageDraw.Draw(strip), ImageFont.load_default(13), strip.height - LABEL_HEIGHT + 4
    loudness = f"peak {20 * math.log10(peak):.0f} dB" if peak > 1e-5 else "silence"
    draw.text((0, top), f"sound {seconds:.2f} s", fill=TEXT, font=font)
    kind = f"{'mono' if len(channels) == 1 else 'left above right'}, {loudness}"
    draw.text((width - font.getlength(kind), top), kind, fill=FAINT, font=font)
    return strip


def _wave(channel: np.ndarray, width: int, colour: tuple[int, int, int]) -> Image.Image:
    """One channel, full scale 1, as an envelope around a middle line."""
    height = WAVE_HEIGHT * WAVE_SMOOTHING
    panel = Image.new("RGB", (width * WAVE_SMOOTHING, height), WAVE_PANEL)
    draw, middle, reach = ImageDraw.Draw(panel), height // 2, height // 2 - 2 * WAVE_SMOOTHING
    draw.rectangle((0, middle - 1, panel.width, middle + 1), fill=WAVE_MIDDLE)
    lows, highs = envelope(channel, panel.width)
    for column, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if low or high:
            draw.line((column, middle - high * reach, column, middle - low * reach), fill=colour)
    return panel.resize((width, WAVE_HEIGHT), Image.Resampling.BOX)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
HeadLine = tuple[str, Font, tuple[int, int, int], int]


def _head_lines(text: SheetText, width: int) -> list[HeadLine]:
    """The lines above the frames: text, font, colour and height in pixels."""
    title, prompt, facts = (ImageFont.load_default(size) for size in (22, 16, 13))
    lines: list[HeadLine] = [(_cut(text.title, title, width), title, TITLE, 32)]
    lines += [(line, prompt, TEXT, 22) for line in wrap(text.prompt, prompt, width, PROMPT_LINES)]
    return [*lines, ("", facts, FAINT, 4), (_cut(text.facts, facts, width), facts, FAINT, 20)]


def wrap(text: str, font: Font, width: int, most: int) -> list[str]:
    """The text in lines of at most `width` pixels; beyond `most` lines it is cut with an ellipsis.

    A word wider than a line is broken (languages without spaces); control characters are left out.
    """
    clean = "".join(character if character.isprintable() else " " for character in text[:LONGEST_PROMPT])
    words, lines = clean.split(), [""]
    while words and len(lines) <= most:
        word = words.pop(0)
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        elif lines[-1]:
            lines.append("")
            words.insert(0, word)
        else:
            fits = _fitting(word, font, width)
            lines[-1:] = [word[:fits], ""]
            words.insert(0, word[fits:])
    if len(lines) > most:
        return [*lines[: most - 1], _cut(f"{lines[most - 1]} {' '.join(words)}", font, width)]
    return lines if lines[-1] else lines[:-1]


def _cut(text: str, font: Font, width: int) -> str:
    text = text[:LONGEST_PROMPT]
    if font.getlength(text) <= width:
        return text
    return text[: _fitting(text, font, width - font.getlength("..."))].rstrip() + "..."


def _fitting(text: str, font: Font, width: float) -> int:
    """How many characters of `text` fit into `width` pixels; at least one."""
    return max(1, bisect.bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count])))
