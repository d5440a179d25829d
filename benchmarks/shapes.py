"""A small CLIP trained on made pictures: a test bed for models of two towers, since no CLIP weights come with a package.

    python benchmarks/shapes.py [--folder DIR] [--minutes 30] [--pairs 12000] [--seed 0]

DIR (default: the cache folder's `shapes`) gets

    train/      made pictures of 48 pixels with captions and metadata.jsonl
    heldout/    1,000 pairs whose combinations of shapes, colours, counts and places are in no training picture; no caption comes twice
    clip/       the model, about 5M parameters, a folder that transformers loads
    shapes.json parameters, steps, and what `eval` measures on heldout/

A picture has one or two groups. A group is one to four shapes of one kind and colour in one of nine places. Its caption says so, in one of
several ways: "three red stars at the top left, and a blue ring in the middle". The label, one of 96 classes, is shape and colour of the first
group. The command may be stopped at any moment: the same command goes on. Then, for example:

    adapt-pruner eval DIR/clip --text DIR/heldout --window 1000
    adapt-pruner prune DIR/clip -o small --params 70% --method mope-clip --calibration DIR/train
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.optim import AdamW
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.budget import count_parameters, parse_count
from adapt_pruner.core.system.files import cache_folder, write_whole
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.data.contrastive import Contrastive
from adapt_pruner.evaluate.perplexity import perplexity

SIDE = 48  # pixels
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 40), "purple": (150, 50, 180),
    "orange": (240, 140, 30), "white": (240, 240, 240), "cyan": (60, 210, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star", "bar", "pillar", "diamond", "frame", "arch", "drop")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
PLACES = (
    "at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
WAYS = ("{}", "there is {}", "a picture of {}", "one can see {}")
HELD_OUT, SECONDS = 1000, 120  # pairs; seconds between checkpoints
LENGTH, BATCH, LR, WARMUP = 24, 128, 1e-3, 100
TOWER: dict[str, Any] = {"num_hidden_layers": 6, "hidden_act": "gelu"}


@dataclass(frozen=True)
class Group:
    """Some shapes of one kind and colour in one place."""

    count: int
    colour: str
    shape: str
    place: int

    @property
    def words(self) -> str:
        """What a caption says of it."""
        return f"{COUNTS[self.count]} {self.colour} {self.shape}{'s' * (self.count > 1)} {PLACES[self.place]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "shapes")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pairs", type=parse_count, default=parse_count("12k"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_pictures(args.folder, pairs=args.pairs, seed=args.seed)
    train(args.folder, minutes=args.minutes, seed=args.seed)
    measure(args.folder)


def make_pictures(folder: Path, *, pairs: int, seed: int) -> None:
    """Write train/ and heldout/, unless they are there."""
    draw = random.Random(seed)
    held_out, seen = list[tuple[Group, ...]](), set[tuple[Group, ...]]()
    while len(held_out) < HELD_OUT:
        scene = scene_of(draw)
        if is_held_out(scene) and scene not in seen:
            seen.add(scene)
            held_out.append(scene)
    training = list[tuple[Group, ...]]()
    while len(training) < pairs:
        scene = scene_of(draw)
        if not is_held_out(scene):
            training.append(scene)
    for name, scenes in (("heldout", held_out), ("train", training)):
        if (folder / name / "metadata.jsonl").is_file():
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for number, scene in enumerate(scenes):
            file = f"{number:06}.png"
            picture_of(scene, draw).save(folder / name / file)
            text = WAYS[0 if name == "heldout" else draw.randrange(len(WAYS))].format(
                ", and ".join(group.words for group in scene)
            )
            lines.append(json.dumps({"file_name": file, "text": text, "label": f"{scene[0].colour} {scene[0].shape}"}))
        write_whole(folder / name / "metadata.jsonl", "\n".join(lines) + "\n")


def scene_of(draw: random.Random) -> tuple[Group, ...]:
    """One or two groups in different places."""
    places = draw.sample(range(len(PLACES)), draw.choice((1, 2, 2)))
    return tuple(Group(draw.choice(list(COUNTS)), draw.choice(list(COLOURS)), draw.choice(SHAPES), place) for place in places)


def is_held_out(scene: Sequence[Group]) -> bool:
    """Whether a group of the scene is one of the tenth of all combinations that no training picture has."""
    return any(random.Random(group.words).random() < 0.1 for group in scene)


def picture_of(scene: Sequence[Group], draw: random.Random) -> Image.Image:
    """The scene over a dark, slightly noisy background."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(draw.randrange(50) for _ in range(3)))
    canvas, cell = ImageDraw.Draw(picture), SIDE // 3
    for group in scene:
        left, top = group.place % 3 * cell, group.place // 3 * cell
        spots = [(0, 0), (1, 1), (1, 0), (0, 1)][: group.count]
        size = draw.randrange(9, 14) if group.count == 1 else 6
        for column, row in spots:
            x, y = left + 1 + column * 8 + draw.randrange(2), top + 1 + row * 8 + draw.randrange(2)
            shape_at(canvas, group.shape, x, y, size, COLOURS[group.colour])
    return picture


def shape_at(canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, colour: tuple[int, int, int]) -> None:
    """Draw a shape in a square of `size` + 1 pixels."""
    box, half = (x, y, x + size, y + size), size // 2
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x + half, y), (x + size, y + size), (x, y + size)], fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=2)
    elif shape == "frame":
        canvas.rectangle(box, outline=colour, width=1)
    elif shape == "cross":
        canvas.rectangle((x + half - 1, y, x + half + 1, y + size), fill=colour)
        canvas.rectangle((x, y + half - 1, x + size, y + half + 1), fill=colour)
    elif shape == "star":
        canvas.line((x, y, x + size, y + size), fill=colour, width=1)
        canvas.line((x, y + size, x + size, y), fill=colour, width=1)
        canvas.line((x + half, y, x + half, y + size), fill=colour, width=1)
    elif shape == "bar":
        canvas.rectangle((x, y + half - 1, x + size, y + half + 1), fill=colour)
    elif shape == "pillar":
        canvas.rectangle((x + half - 1, y, x + half + 1, y + size), fill=colour)
    elif shape == "diamond":
        canvas.polygon([(x + half, y), (x + size, y + half), (x + half, y + size), (x, y + half)], fill=colour)
    elif shape == "arch":
        canvas.pieslice((x, y, x + size, y + 2 * size), 180, 360, fill=colour)
    else:  # a drop
        canvas.ellipse((x + 1, y + half, x + size - 1, y + size), fill=colour)
        canvas.polygon([(x + half, y), (x + half + 2, y + half + 1), (x + half - 2, y + half + 1)], fill=colour)


def processor() -> CLIPProcessor:
    """A token a word, and pictures as they are."""
    words = sorted(
        {word for text in (*PLACES, *COUNTS.values(), *COLOURS, *WAYS, "and photo") for word in text.replace("{}", "").split()}
    )
    words += [f"{shape}{plural}" for shape in SHAPES for plural in ("", "s")]
    tokens = ["<pad>", "<unk>", "<s>", "</s>", ",", ".", *words]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    reader = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    )
    size = {"height": SIDE, "width": SIDE}
    return CLIPProcessor(CLIPImageProcessor(do_resize=False, do_center_crop=False, size=size, crop_size=size), reader)


def new_model(vocabulary: int, seed: int) -> CLIPModel:
    """A CLIP of about 5M parameters, which reads patches of 12 pixels."""
    torch.manual_seed(seed)
    text = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_attention_heads": 5,
        "vocab_size": vocabulary,
        "max_position_embeddings": LENGTH,
    }
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "image_size": SIDE, "patch_size": 12}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return CLIPModel(CLIPConfig(text_config=TOWER | text | ends, vision_config=TOWER | vision, projection_dim=128))


def train(folder: Path, *, minutes: float, seed: int) -> None:
    """Train for so many minutes in all, over all sessions; a checkpoint every two."""
    path, state = folder / "clip", folder / "training.pt"
    reader, task = processor(), Contrastive()
    model = new_model(len(reader.tokenizer), seed).train()
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.05, betas=(0.9, 0.98))
    spent, step = 0.0, 0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        spent, step = kept["spent"], kept["step"]
    rows = task._encoded(reader, str(folder / "train"))
    saved = began = time.monotonic()
    batches = endless(rows, seed=seed, skip=step)
    while (share := (spent + time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * share))
        batch = next(batches)
        loss = task.loss(model, batch) / len(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {share:.0%} of the time: loss {loss.item():.3f}", flush=True)
        if time.monotonic() - saved > SECONDS:
            saved = time.monotonic()
            kept = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "spent": spent + saved - began,
                "step": step,
            }
            torch.save(kept, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    if not path.is_dir():
        save(model.eval(), reader, path, dtype=torch.float32)
        write_whole(folder / "shapes.json", to_json({"steps": step, "batch": BATCH, "minutes": minutes}))


def endless(rows: torch.Tensor, *, seed: int, skip: int) -> Iterator[torch.Tensor]:
    """Batches of all rows in a random order, again and again, from batch `skip` on."""
    generator, number = torch.Generator().manual_seed(seed), 0
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
            number += 1
            if number > skip and len(chosen) == BATCH:
                yield rows[chosen]


def measure(folder: Path) -> None:
    """What `eval` measures on the held-out pairs, into shapes.json."""
    loaded, task = load(str(folder / "clip"), any_task=True), Contrastive()
    galleries = task.held_out(loaded.tokenizer, source=str(folder / "heldout"), window=HELD_OUT, max_windows=None)
    found = perplexity(loaded.model, next(iter(galleries.values())), task=task)
    about = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    about |= {"params": count_parameters(loaded.model), "loss": found.nll, "heldout": dict(found.judged)}
    write_whole(folder / "shapes.json", to_json(about, indent=2))
    print(to_json(about, indent=2))


if __name__ == "__main__":
    main()
