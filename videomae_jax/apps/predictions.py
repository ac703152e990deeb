"""What a test leaves: evaluation.json, predictions.csv, and for classes a picture of their confusion."""

import csv
import json
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont

from videomae_jax import storage
from videomae_jax.data.sources import Source
from videomae_jax.evaluation.classification import Scores
from videomae_jax.storage import Place

_FIGURES = ("top1", "top5", "mean_class_accuracy", "mean_average_precision", "mean_squared_error", "r2")


def line(result: dict[str, Any]) -> str:
    """The figures of an evaluation in one line."""
    figures = ", ".join(f"{name} {result[name]:.4f}" for name in _FIGURES if name in result)
    total = result["videos"] + result["videos_failed"]
    of = f" of {total}" if result["videos_failed"] else ""
    views = result["views"]
    return f"{figures} on {result['videos']}{of} videos, {views['segments']} x {views['crops']} views"


def write(folder: Place, result: dict[str, Any], scores: Scores, source: Source) -> None:
    """Writes predictions.csv, confusion.png where there is one class a video, and evaluation.json."""
    names = source.classes
    rows = []
    if scores.targets.size:
        header = [*(f"true {name}" for name in names)]
        rows = [target.tolist() for target in scores.targets]
    else:
        header = ["label", "prediction"]
        for label, value in zip(scores.labels, scores.values, strict=True):
            rows.append([names[label] if label >= 0 else "", names[int(value.argmax())]])
        with storage.output(folder / "confusion.png") as picture:
            draw_confusion(scores.confusion(), names).save(picture)
    with storage.output(folder / "predictions.csv") as path, path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", *header, *(f"score {name}" for name in names)])
        for record, row, value in zip(scores.records, rows, scores.values, strict=True):
            table.writerow([source.ids[record], *row, *(f"{x:.6g}" for x in value)])
    storage.write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")


def draw_confusion(counts: Int[np.ndarray, "K K"], classes: tuple[str, ...]) -> Image.Image:
    """Shares of each class's videos (rows) by predicted class (columns); dark is many."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = max(4, min(48, 960 // len(classes)))
    has_text = cell >= 20
    font = ImageFont.load_default(12)
    margin = 16 + (max(int(font.getlength(name)) for name in classes) if has_text else 0)
    side = margin + cell * len(classes)
    image = Image.new("RGB", (side + 8, side + 8), "white")
    colours = np.stack([255 - 225 * shares, 255 - 175 * shares, 255 - 75 * shares], axis=-1).astype(np.uint8)
    cells = Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))
    image.paste(cells, (margin, margin))
    pen = ImageDraw.Draw(image)
    pen.rectangle((margin, margin, side, side), outline="black")
    if not has_text:
        pen.text((4, 2), "rows: class, columns: prediction", "black", font=font)
        return image
    for i, name in enumerate(classes):
        middle = margin + cell * i + cell // 2
        pen.text((margin - 6, middle), name, "black", font=font, anchor="rm")
        label = Image.new("RGB", (margin - 8, 16), "white")
        ImageDraw.Draw(label).text((0, 8), name, "black", font=font, anchor="lm")
        turned = label.rotate(90, expand=True)
        image.paste(turned, (middle - 8, 4))
        for j, count in enumerate(counts[i]):
            if count:
                colour = "white" if shares[i, j] > 0.6 else "black"
                place = (margin + cell * j + cell // 2, middle)
                pen.text(place, str(count), colour, font=font, anchor="mm")
    return image
