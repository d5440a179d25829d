"""`task: contrastive`: of the pictures and captions of a batch, which belong together; what CLIP and SigLIP learn.

A batch is int64 [pairs, 2 + T]: the number of a picture, the number of its class and 1 (0 for none), and the T token ids of a
caption, padded as the processor pads. The task knows the pictures by their numbers; each is opened when a pass needs it, and as
many as fit `_KEPT` bytes stay in memory. T is what the model reads, so a row of training has `training.length` numbers: 2 + T,
and zeros if it is longer. A step has training.batch_tokens / training.length pairs, and the pairs of one pass are told apart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_pruner.core.system.parts import part
from adapt_pruner.data.fixed import Rows, rows_of
from adapt_pruner.data.pictures import Pair, pairs
from adapt_pruner.data.sources import Source, domains
from adapt_pruner.errors import UsageError

TOWERS = ("text.", "vision.")
RANKS = (1, 5, 10)
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")
"""How a class is put into words for zero-shot classification; the embeddings of all are averaged, as CLIP's authors do."""
_AT_ONCE = 64  # pairs of a pass without gradients, and of a calibration batch
_LONGEST = 4096  # tokens of a caption
_KEPT = 2**30  # bytes of pictures, ready for the model, that are held in memory


@part("task")
class Contrastive:
    """Which picture belongs to which caption: CLIP's loss or SigLIP's; measured as retrieval both ways and by class names.

    CLIP: for each caption -log softmax over the pictures of the batch, for each picture over the captions; half the sum. SigLIP:
    -log σ(±z) for each picture with each caption, + where they belong together.
    """

    towers: ClassVar[tuple[str, ...]] = TOWERS
    writes_text = False

    def __init__(self) -> None:
        self._pairs: dict[str, list[Pair]] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._open: list[Callable[[], Any]] = []
        self._classes: list[str] = []
        self._prompts: Tensor | None = None
        self._kept: dict[int, Tensor] = {}
        self._processor: Any = None
        self._length = 0

    def num_predicted(self, batches: Iterable[Tensor], predicted: Tensor | None = None) -> int:
        """Pairs."""
        return sum(map(len, batches)) if predicted is None else int(predicted.any(1).sum())

    def entrance(self, model: Any) -> nn.Module:
        """There is none that both towers share."""
        raise UsageError(_WHOLE)

    def head(self, model: Any) -> nn.Module:
        """There is none that both towers share."""
        raise UsageError(_WHOLE)

    def read(self, model: Any, batch: Tensor, **outputs: Any) -> Any:
        """There is no stream that both towers share."""
        raise UsageError(_WHOLE)

    def embedded(self, model: Any, batch: Tensor, tower: str) -> Tensor:
        """What a tower makes of a batch, float32 [pairs, width] of length 1."""
        step = len(batch) if torch.is_grad_enabled() else _AT_ONCE
        return torch.cat([self.seen(model, some, tower)[1] for some in batch.split(step)])

    def seen(self, model: Any, batch: Tensor, tower: str, **outputs: Any) -> tuple[Any, Tensor]:
        """Run a tower; returns its whole output, and the embedding of each picture or caption, float32 [pairs, width] of length 1."""
        if tower == "text.":
            output = model.get_text_features(input_ids=batch[:, 2 : 2 + self._length], **outputs)
        else:
            pixels = self._pixels(batch[:, 0].tolist()).to(batch.device, model.dtype)
            output = model.get_image_features(pixel_values=pixels, **outputs)
        return output, F.normalize(getattr(output, "pooler_output", output).float(), dim=-1)

    def loss(self, model: Any, batch: Tensor, *, predicted: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The sum over the pairs; see the class."""
        if predicted is not None:
            batch = batch[predicted.any(1)]
        texts, pictures = (self.embedded(model, batch, tower) for tower in TOWERS)
        return self.of_similarities(model, texts @ pictures.T)

    def of_similarities(self, model: Any, similarities: Tensor) -> Tensor:
        """The sum of the loss over the pairs, of cosines [captions, pictures]."""
        logits = similarities * model.logit_scale.float().exp()
        if (bias := getattr(model, "logit_bias", None)) is not None:
            signs = 2 * torch.eye(len(logits), device=logits.device) - 1
            return -F.logsigmoid(signs * (logits + bias.float())).sum()
        right = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, right, reduction="sum") + F.cross_entropy(logits.T, right, reduction="sum")) / 2

    def judged(self, model: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Retrieval among the pairs of the batch, and classes by their names where pictures have one; each figure times the pairs."""
        texts, pictures = (self.embedded(model, batch, tower) for tower in TOWERS)
        found = _recalls(texts, pictures, batch[:, 0])
        labels = batch[:, 1] - 1
        if self._prompts is not None and bool((labels >= 0).any()):
            prompts = self.embedded(model, self._prompts.to(batch.device), "text.")
            names = F.normalize(prompts.view(len(self._classes), len(TEMPLATES), -1).mean(1), dim=-1)
            right = (pictures[labels >= 0] @ names.T).argmax(-1) == labels[labels >= 0]
            found["zero-shot accuracy"] = right.float().mean()
        return {name: share * len(batch) for name, share in found.items()}

    def observed(self, model: Any, batches: Sequence[Tensor], tower: str) -> Tensor:
        """What a tower makes of all batches; see `core.model.task.Task.observed`."""
        device = model.device
        return torch.cat([self.embedded(model, batch.to(device), tower) for batch in batches])

    def merit(self, observed: Mapping[str, Tensor], batches: Sequence[Tensor]) -> float:
        """Mean recall at 1, 5 and 10 in both directions among the pairs of all batches together."""
        numbers = torch.cat([batch[:, 0] for batch in batches]).to(observed["text."].device)
        recalls = _recalls(observed["text."], observed["vision."], numbers)
        return float(torch.stack(list(recalls.values())).mean())

    def calibration(
        self, model: Any, tokenizer: Any, *, source: Source, samples: int, seed: int, ids: str | None = None, **others: Any
    ) -> Callable[[int], list[Tensor]]:
        """Pairs drawn again for each iteration, in batches of at most 64."""
        if ids is not None:
            raise UsageError(
                "calibration.ids holds token ids, and the task 'contrastive' reads pictures too; set calibration.source"
            )
        rows = self._encoded(tokenizer, source)
        if samples > len(rows):
            raise UsageError(
                f"{source!r} has {len(rows):,} pairs, fewer than calibration.samples {samples:,}; set it to {len(rows)} or less"
            )

        def draw(iteration: int) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
            return list(rows[torch.randperm(len(rows), generator=generator)[:samples]].split(_AT_ONCE))

        return draw

    def rows(self, tokenizer: Any, source: Source, *, length: int, tokens: int, seed: int, **others: Any) -> Rows:
        """Every pair as a row of `length` numbers; each comes once before any comes twice."""
        encoded = self._encoded(tokenizer, source)
        width = encoded.shape[1]
        if length < width:
            raise UsageError(
                f"training.length {length} is below the {width} numbers of a pair ({width - 2} tokens, its picture and its class); set "
                f"training.length to {width}"
            )
        lines = F.pad(encoded, (0, length - width)).tolist()
        return rows_of([(line, [True] * length) for line in lines], tokens=tokens, seed=seed)

    def held_out(self, tokenizer: Any, *, source: Source, window: int, max_windows: int | None) -> dict[str, list[Tensor]]:
        """Galleries of `window` pairs among which is retrieved; all pairs together if there are fewer."""
        rows = self._encoded(tokenizer, source)
        galleries = [some for some in rows.split(window) if len(some) == min(window, len(rows))]
        return {str(source): galleries[:max_windows]}

    def num_bytes(self, tokenizer: Any, batches: Sequence[Tensor]) -> int | None:
        """None: a loss per byte would mean nothing."""
        return None

    def _encoded(self, processor: Any, source: Source) -> Tensor:
        """Every pair of a source as a row, int64 [pairs, 2 + T]; the pictures get numbers, and the classes too."""
        shares = domains(source)
        if len(shares) > 1:
            raise UsageError("the task 'contrastive' reads one set of pictures, and the source is a mixture; name one of them")
        spec = next(iter(shares))
        if not hasattr(processor, "image_processor"):
            raise UsageError("the task 'contrastive' is for models that read pictures and text, such as CLIP; leave task out")
        self._processor, found = processor, self._pairs.setdefault(spec, [])
        if not found:
            found.extend(pairs(spec))
        self._length = processor.tokenizer.model_max_length
        if self._length > _LONGEST:
            raise UsageError(
                "the tokenizer does not say how many tokens a caption has; write model_max_length into its tokenizer_config.json, 77 for CLIP"
            )
        self._classes += sorted({pair.label for pair in found if pair.label is not None} - {*self._classes})
        numbers = []
        for pair in found:
            key = (spec, pair.name)
            if key not in self._numbers:
                self._numbers[key] = len(self._open)
                self._open.append(pair.open)
            numbers.append([self._numbers[key], 0 if pair.label is None else 1 + self._classes.index(pair.label)])
        if self._classes:
            self._prompts = self._with_tokens([[0, 0]] * len(self._classes) * len(TEMPLATES), [
                template.format(name) for name in self._classes for template in TEMPLATES
            ])  # fmt: skip
        return self._with_tokens(numbers, [pair.text for pair in found])

    def _with_tokens(self, numbers: list[list[int]], texts: list[str]) -> Tensor:
        ids = self._processor.tokenizer(texts, padding="max_length", truncation=True, max_length=self._length)["input_ids"]
        return torch.cat([torch.tensor(numbers), torch.tensor(ids)], dim=1)

    def _pixels(self, numbers: list[int]) -> Tensor:
        """The pictures of these numbers, ready for the model, float32 [pictures, 3, height, width]."""
        ready = []
        for number in numbers:
            pixels = self._kept.get(number)
            if pixels is None:
                pixels = self._processor.image_processor(images=self._open[number](), return_tensors="pt")["pixel_values"][0]
                if len(self._kept) * pixels.nbytes < _KEPT:
                    self._kept[number] = pixels
            ready.append(pixels)
        return torch.stack(ready)


_WHOLE = (
    "this part goes through one stack of layers, and the model has two towers; choose one that does not, such as weights.taylor"
)


def _recalls(texts: Tensor, pictures: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """Share of captions whose picture is among the first k, and of pictures one of whose captions is; each picture counts once."""
    _, owner = numbers.unique(return_inverse=True)
    firsts = torch.stack([(owner == number).nonzero()[0, 0] for number in range(int(owner.max()) + 1)])
    similarities = texts @ pictures[firsts].T
    own = torch.zeros_like(similarities, dtype=torch.bool)
    own[torch.arange(len(owner), device=owner.device), owner] = True
    best = similarities.masked_fill(~own, -torch.inf)
    to_picture = ((similarities >= best.amax(1, keepdim=True)) & ~own).sum(
        1
    )  # wrong ones before it; of equals the wrong one counts
    to_text = ((similarities >= best.amax(0, keepdim=True)) & ~own).sum(0)
    ways = {"text→image": to_picture, "image→text": to_text}
    return {f"{way} R@{k}": (ranks < k).float().mean() for way, ranks in ways.items() for k in RANKS}
