"""Made pictures with captions, for tests of models that read both."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")


def picture_folder(folder: Path, *, number: int = 24) -> Path:
    """A folder of `number` pictures of 20 by 16 pixels with metadata.jsonl; the label is the shape."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(number):
        colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index // len(COLOURS) % len(SHAPES)]
        picture = Image.new("RGB", (20, 16), "black")
        at = (2 + index % 5, 2, 11 + index % 5, 11)
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)(at, fill=colour)
        picture.save(folder / f"{index:03}.png")
        lines.append(json.dumps({"file_name": f"{index:03}.png", "text": f"{colour} {shape} {index}", "label": shape}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
