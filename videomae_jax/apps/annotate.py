"""Drawing of boxes and of what is done in them."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#bcf60c")


def draw_boxes(
    frame: np.ndarray,
    boxes: Sequence[Sequence[float] | np.ndarray],
    texts: Sequence[str],
    colours: Sequence[int],
) -> np.ndarray:
    """A frame, uint8 [H, W, 3], with boxes and a text above each, or in it where there is no room.

    Args:
        boxes: left, top, right, bottom in parts of the frame.
        colours: number of each box's colour: the same person keeps it.
    """
    image = Image.fromarray(frame)
    pen, height, width = ImageDraw.Draw(image), frame.shape[0], frame.shape[1]
    font = ImageFont.load_default(max(10, round(height / 26)))
    for (left, top, right, bottom), text, number in zip(boxes, texts, colours, strict=True):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = (left * width, top * height, max(right * width - 1, left * width), 0.0)
        corners = (*corners[:3], max(bottom * height - 1, top * height))
        pen.rectangle(corners, outline=colour, width=max(1, round(height / 180)))
        if not text:
            continue
        x, y = corners[0] + 3, corners[1] + 2
        around = pen.multiline_textbbox((x, y), text, font=font)
        x += min(0, width - 2 - around[2])  # moved in where it would pass the right edge
        y -= around[3] - corners[1] + 4  # above the box, where there is room
        y = y if y >= 0 else corners[1] + 2
        around = pen.multiline_textbbox((x, y), text, font=font)
        pen.rectangle((around[0] - 2, around[1] - 1, around[2] + 2, around[3] + 2), fill="black")
        pen.multiline_text((x, y), text, colour, font=font)
    return np.asarray(image)


def draw_precisions(precisions: Mapping[str, float | None], most: int = 40) -> Image.Image:
    """Bars of the average precision of the hardest classes, the worst first."""
    known = sorted((value, name) for name, value in precisions.items() if value is not None)[:most]
    font, bar, high = ImageFont.load_default(12), 320, 18
    margin = 16 + max((int(font.getlength(name)) for _, name in known), default=0)
    image = Image.new("RGB", (margin + bar + 64, high * len(known) + 40), "white")
    pen = ImageDraw.Draw(image)
    pen.text((margin, 8), "average precision, hardest classes first", "black", font=font)
    for place, (value, name) in enumerate(known):
        y = 32 + high * place
        pen.text((margin - 6, y + high // 2), name, "black", font=font, anchor="rm")
        pen.rectangle((margin, y + 2, margin + 1 + int(bar * value), y + high - 3), fill="#4363d8")
        pen.text((margin + bar * value + 8, y + high // 2), f"{value:.1%}", "black", font=font, anchor="lm")
    return image
