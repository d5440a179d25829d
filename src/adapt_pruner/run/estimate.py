"""Formulas for the memory, operations and time that pruning and training a model take; nothing is run.

Units: bytes of one process, FLOPs (a multiply-add is two), seconds. Symbols: N parameters, n processes, V vocabulary, H width of
the residual stream, m tokens of a pass; A, K and I are query features, key features and neurons, summed over the layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from adapt_pruner import families
from adapt_pruner.checkpoint.save import towers_in
from adapt_pruner.checkpoint.shelved import Offload
from adapt_pruner.core.model import loss
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.layers import HIDDEN_BYTES, LOGITS_OF, activation_bytes, layers_at_once
from adapt_pruner.data import windows
from adapt_pruner.reduce.repair import closed_form
from adapt_pruner.reduce.units import HEAD_TOKENS
from adapt_pruner.score.blocks import TOGETHER
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.train import loop

_SLACK = {"cpu": 1.03, "cuda": 1.1}  # bytes that an allocator holds per byte asked for; the second figure is assumed
_HOLES = 0.5  # on a CPU: share of freed activations that glibc keeps, as holes between gradients and moments
_PROCESS = 450 * 2**20  # Python with torch, transformers and a tokenizer, without the model


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that decide its memory and time.

    Attributes:
        params: N; tied weights count once.
        decoder: parameters in decoder layers.
        largest: parameters of the largest layer.
        layers: number of decoder layers.
        vocabulary: V.
        width: H.
        queries: A, query features, summed over layers.
        keys: K, key features, summed over layers.
        neurons: I, summed over layers.
        widest: neurons of the widest layer.
    """

    params: int
    decoder: int
    largest: int
    layers: int
    vocabulary: int
    width: int
    queries: int
    keys: int
    neurons: int
    widest: int

    @property
    def head(self) -> int:
        """Parameters of the output embedding."""
        return self.vocabulary * self.width

    @property
    def in_and_out(self) -> int:
        """Rows and columns of all weight matrices of the decoder layers, added up."""
        return 7 * self.layers * self.width + 2 * self.queries + 2 * self.keys + 3 * self.neurons

    @property
    def tied(self) -> bool:
        """Whether input and output embedding share their weights."""
        return self.params - self.decoder < 2 * self.head

    def scaled(self, share: float) -> "Shapes":
        """Shapes of these proportions with this share of the decoder's parameters: depth and width by its cube root; V stays."""
        if share == 1:
            return self
        side = share ** (1 / 3)
        powers = {"layers": 1, "width": 1, "widest": 1, "largest": 2, "queries": 2, "keys": 2, "neurons": 2, "decoder": 3}
        sizes = {key: max(1, round(getattr(self, key) * side**power)) for key, power in powers.items()}
        outside = (self.params - self.decoder) * sizes["width"] // self.width
        return replace(self, params=sizes["decoder"] + outside, **sizes)

    def cut_to(self, params: int) -> "Shapes":
        """These shapes with every layer pruned alike until `params` parameters are left."""
        share = (self.decoder - (self.params - params)) / self.decoder
        shrunk = {
            key: round(getattr(self, key) * share) for key in ("decoder", "largest", "queries", "keys", "neurons", "widest")
        }
        return replace(self, params=params, **shrunk)


def shapes(model: Any) -> Shapes:
    """The shapes of a causal LM of a known family; the model may lie on the meta device."""
    axes, sums, widest = families.axes(model), {"queries": 0, "keys": 0, "neurons": 0}, 0
    for axis in axes:
        if axis.kind == "kv_heads":
            sums["queries"] += axis.size * axis.gate.width
            sums["keys"] += axis.size * min(piece.width for piece in axis.slices)
        elif axis.kind == "neurons":
            sums["neurons"] += axis.size
            widest = max(widest, axis.size)
    stacks: list[Any] = [model.get_submodule(axis.gate.module) for axis in axes if axis.kind == "layers"]
    stack = [count_parameters(layer) for layers in stacks for layer in layers]
    if (head := model.get_output_embeddings()) is None:  # of two towers, which tell the pairs of a batch apart
        vocabulary, width = 1, max(tower.hidden_size for tower in towers_in(model.config))
    else:
        vocabulary, width = head.weight.shape
    return Shapes(count_parameters(model), sum(stack), max(stack), len(stack), vocabulary, width, **sums, widest=widest)


@dataclass(frozen=True)
class Setup:
    """How a model is trained, and where.

    Attributes:
        device: `cpu` or `cuda`.
        narrow: whether matrices are multiplied in bfloat16.
        length: tokens of a row.
        micro_tokens: tokens of a pass, of one process; None for what the device gets by default.
        batch_tokens: tokens of an optimiser step, of all processes.
        checkpointing: whether the backward pass computes the layers' activations again.
        lora: rank of the additions that are trained instead of the weights; 0 for none.
        stored: w, bytes of a weight while training: 4, or 2 in bfloat16; the additions of LoRA take 4.
        bits: of a moment.
        in_backward: whether gradients are freed one by one in the backward pass.
        teacher: shapes of the model to distil from.
        processes: n.
        parallel: `ddp`, the whole model on each process while training, or `fsdp`, a share of it.
        offload: where weights lie while no pass needs them: `none` for in memory as float32, `cpu` for in memory as stored, `disk`.
        file_bytes: bytes of a weight in the model's files.
    """

    device: str
    narrow: bool
    length: int
    micro_tokens: int | None = None
    batch_tokens: int = 0
    checkpointing: bool = False
    lora: int = 0
    stored: int = 4
    bits: int = 32
    in_backward: bool = False
    teacher: Shapes | None = None
    processes: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    offload: Offload = "none"
    file_bytes: int = 4

    @property
    def tokens(self) -> int:
        """m: whole rows, as many as fit `micro_tokens` or a process's part of a step."""
        most = self.micro_tokens or loop.MICRO_TOKENS[self.device]
        most = min(most, self.batch_tokens // self.processes) if self.batch_tokens else most
        return max(1, most // self.length) * self.length

    @property
    def moments(self) -> float:
        """Bytes of the two moments of a parameter, with the float32 scales of their blocks (`train.lowbit`)."""
        return 2 * (self.bits / 8 + {32: 0, 8: 4 / 256, 4: 4 / 128}[self.bits])

    @property
    def sharded(self) -> bool:
        """Whether a process holds a share of weights, gradients and moments while it trains."""
        return self.parallel == "fsdp" and self.processes > 1

    @property
    def learnt(self) -> int:
        """Bytes of a number that is trained, and of its gradient."""
        return 4 if self.lora else self.stored

    def trained(self, of: Shapes) -> int:
        """Parameters that have a gradient and moments."""
        return self.lora * of.in_and_out if self.lora else of.params

    def at_hand(self, params: int, *, ahead: int = 0) -> int:
        """Bytes of weights that are fetched, and of those read ahead from disk; 0 if all weights are in memory."""
        return 0 if self.offload == "none" else 4 * params + (self.file_bytes * ahead if self.offload == "disk" else 0)


def training_memory(of: Shapes, how: Setup) -> dict[str, int]:
    """Bytes of one process at the peak of an optimiser step, by what holds them.

    Weights take w N, gradients w N, moments 8 N, 2.03 N with 8 bits or 1.06 N with 4. If steps are taken in the backward pass, the
    largest gradient counts, the head's, which is part of the loss. With FSDP each is divided by n, and the current layer, the next layer and the weights outside the
    layers are gathered. Without FSDP autocast keeps a bfloat16 copy of float32 layers' matrices, 2 N_dec.

    The peak is in the last pass of a step, at one of two places. At the loss, there are activations and logits (with
    checkpointing: the larger of logits and the recomputed activations of one layer). At the end of the backward pass, some
    gradients are still in temporary buffers: w V·H of the embedding, and as much again of a head tied to it. In bfloat16 there
    are also 2 N_dec of all copies, since the casts of the step's first pass come last in the backward pass.

    Returns:
        part -> bytes; see `process_bytes` for what a process then occupies.
    """
    element = 2 if how.narrow else 4
    shares = how.processes if how.sharded else 1
    trained = how.trained(of)
    parts = {
        "weights": (how.stored * of.params + (4 * trained if how.lora else 0)) // shares,
        "gradients": 0 if how.in_backward else how.learnt * trained // shares,
        "moments": round(how.moments * trained) // shares,
    }
    temporary = 0
    if how.sharded:
        outside = of.params - of.decoder
        summed = 4 * max(outside, of.largest) // shares if how.stored == 2 else 0  # of gradients, before they are rounded
        parts["gathered shards"] = element * (outside + 2 * of.largest) + (element + 4) * max(outside, of.largest) + summed
    else:
        parts["bfloat16 copies"] = 2 * of.decoder if how.narrow and how.stored == 4 else 0
        if not how.lora:
            again = how.batch_tokens // how.processes > how.tokens
            temporary = how.stored * of.head * (2 if of.tied else 1) + (parts["bfloat16 copies"] if again else 0)
    norm = 2 * (how.stored + element)
    parts["activations"] = _activations(of, how, norm=norm)
    parts["loss"] = _loss(of, how, learns=not how.lora, gathered=how.sharded)
    if how.checkpointing:
        parts["loss"] = max(0, parts["loss"] - how.tokens * _layers(of, how, norm=norm) // of.layers)
    parts["temporary buffers"] = max(0, temporary - parts["activations"] - parts["loss"])
    if how.teacher is not None:
        parts["teacher"] = element * (how.teacher.params + how.tokens * of.width)
    return parts


def pruning_memory(
    of: Shapes,
    how: Setup,
    *,
    samples: int,
    length: int,
    moments: bool,
    evidence: Evidence = Evidence.GRADIENTS,
    reads: bool = False,
    halved: bool = False,
) -> dict[str, int]:
    """Bytes of one process at the peak of scoring, by what holds them. With FSDP, too, each process holds all weights, unless they
    lie on disk, where carried moments lie then as well.

    Weights take 4 N, and moments as in training if they are carried from stage to stage. Gradients, bfloat16 copies and activations are
    those of k layers (`core.model.layers.layers_at_once`). Hidden states between groups of k layers, with their gradients, are held
    for all calibration tokens of a process. The memory for the loss is freed before that for the layers is needed. Several
    processes share the batches, not the weights.

    Metrics that need each sequence's gradients, or gradients of hidden states, make whole passes: then k is the number of layers,
    and the hidden states are the activations. With each sequence's gradients, squares of the gradients are held, too. Passes
    without gradients hold a bfloat16 copy of the whole model.

    With `how.offload`, weights take what is stored, or nothing; k layers and the next one are at hand, and at the loss the head.
    With `disk`, k is 1 and hidden states between layers lie there, too.
    Passes without gradients hold the hidden states of many batches instead of a copy of the model.

    Args:
        samples: rows of the calibration text.
        length: tokens of a row.
        moments: whether the optimiser's moments are carried.
        evidence: what the metrics need to see.
        reads: whether there are also passes without gradients (KV heads shut one by one, perplexity), which may need more.
        halved: whether a pass reads half a batch, if the batch has two rows or more.
    """
    micro = windows.MICRO_TOKENS // (1 + halved)
    rows = replace(how, length=length, micro_tokens=micro, batch_tokens=0, checkpointing=False, teacher=None, stored=4)
    held = _held(of, how, moments=moments)
    if evidence is Evidence.WEIGHTS and not reads:
        return held
    whole = evidence in (Evidence.STREAM_GRADIENTS, Evidence.SAMPLE_GRADIENTS)
    stream = 4 * of.width * length * -(-samples // how.processes)
    shelved = how.offload != "none"
    layer = ((8 if shelved else 4) * of.decoder + activation_bytes(rows.tokens, of.in_and_out)) / of.layers
    whole = whole and not shelved
    k = of.layers if whole else layers_at_once(of.layers, hidden=0 if how.offload == "disk" else stream, layer=layer)
    group = of.decoder * k // of.layers
    copies = 2 * group if how.narrow else 0
    all_activations, all_loss = _activations(of, rows, norm=26 if how.narrow else 24), _loss(of, rows, learns=False)
    activations = all_activations * k // of.layers
    scoring = {
        "gradients": 0 if evidence is Evidence.STREAM_GRADIENTS else 4 * group,
        "squared gradients": 4 * group if evidence is Evidence.SAMPLE_GRADIENTS else 0, "bfloat16 copies": copies, "activations": activations,
        "weights at hand": how.at_hand(group, ahead=of.largest),
    }  # fmt: skip
    if whole:
        scoring["loss"] = all_loss
    else:
        scoring["temporary buffers"] = max(0, copies - activations)
        swept_loss = _loss(of, rows, learns=False, chunk=LOGITS_OF if how.device == "cpu" else None)
        scoring["loss"] = max(0, swept_loss + _wide_head(of, how) - sum(scoring.values()))
        scoring["hidden states"] = stream * (2 if how.offload == "disk" else -(-of.layers // k) + 1)
    reading = {
        "bfloat16 copies": 2 * (of.largest if shelved else of.decoder + of.head) if how.narrow else 0, "activations": all_activations // of.layers,
        "loss": max(0, all_loss - (2 * of.head if how.narrow and not shelved else 0)),
    }  # fmt: skip
    if shelved:
        reading["weights at hand"] = how.at_hand(of.largest, ahead=of.largest)
        reading["hidden states"] = max(min(stream, HIDDEN_BYTES), reads * 4 * of.width * HEAD_TOKENS * TOGETHER)
        reading["loss"] = max(0, reading["loss"] + _wide_head(of, how) - reading["weights at hand"])
    if shelved:  # at the beginning of a pass
        entering = {"weights at hand": how.at_hand(of.head, ahead=of.head), "hidden states": stream}
        reading, scoring = (max(phase, entering, key=lambda parts: sum(parts.values())) for phase in (reading, scoring))
    if evidence.value < Evidence.STREAM_GRADIENTS.value or (reads and sum(reading.values()) > sum(scoring.values())):
        return {**held, **reading}
    return {**held, **scoring}


def repair_memory(
    of: Shapes,
    how: Setup,
    *,
    samples: int,
    length: int,
    moments: bool,
    stays: float = 1.0,
    chosen: bool = False,
    sequential: bool = False,
) -> dict[str, int]:
    """Bytes of one process at the peak of a least-squares repair, by what holds them (`reduce.repair.closed_form`).

    The text goes through one layer after the other. For each gate of a layer, the products of its features are summed in float32:
    F² of them, twice with `sequential`, and twice if the ridge is chosen on a second part of the text. The widest system is
    solved in float64: of K features that stay, K² numbers and K outputs of width H, three times if the ridge is chosen. K is
    `stays` of F; a layer that loses less than the mean takes more.

    Args:
        samples: rows of text that the repair reads.
        length: tokens of a row.
        moments: whether the optimiser's moments are carried.
        stays: the share of the features that the first cut leaves.
        chosen: whether the ridge is chosen.
        sequential: whether the inputs behind the pruned layers are seen, too.
    """
    tokens, heads = length * -(-samples // how.processes), of.queries // of.layers
    matrices, kept = (1 + sequential) * (1 + chosen), round(stays * of.widest)
    return {
        **_held(of, how, moments=moments),
        "hidden states": 4 * tokens * (1 + sequential) * of.width,
        "inputs": 4 * tokens * (of.widest + heads) * sequential,
        "weights at hand": how.at_hand(of.largest, ahead=of.largest),
        "products": 4 * matrices * (of.widest**2 + heads**2),
        "system": 8 * kept * (kept + (1 + 2 * chosen) * of.width + closed_form.ROWS),
    }


def writing_memory(of: Shapes, how: Setup, *, rows: int, length: int, moments: bool) -> dict[str, int]:
    """Bytes of one process at the end of writing text (`data.selfwritten`), by what holds them.

    Keys and values of all tokens take 2 K numbers a token, and those of one layer are copied as a token is added. Four numbers for
    each token of the vocabulary and each row are held to draw from. In memory all matrices are cast to bfloat16 once.

    Args:
        rows: sequences written side by side.
        length: tokens of each.
        moments: whether the optimiser's moments are carried.
    """
    element, shelved = 2 if how.narrow else 4, how.offload != "none"
    cast = max(of.largest, of.head) if shelved else of.decoder + of.head
    return {
        **_held(of, how, moments=moments),
        "keys and values": element * 2 * of.keys * (of.layers + 1) * rows * length // of.layers,
        "weights at hand": max(how.at_hand(of.largest, ahead=of.largest), how.at_hand(of.head)),
        "bfloat16 copies": 2 * cast if how.narrow else 0,
        "logits": 4 * 4 * of.vocabulary * rows,
    }


def _held(of: Shapes, how: Setup, *, moments: bool) -> dict[str, int]:
    """Bytes that a process holds as long as it prunes."""
    held = {
        "weights": {"none": 4, "cpu": how.file_bytes, "disk": 0}[how.offload] * of.params,
        "moments": round(how.moments * of.params) if moments and not (how.offload == "disk" and how.sharded) else 0,
    }
    if how.teacher is not None:
        held["teacher"] = (2 if how.narrow else 4) * how.teacher.params
    return held


def process_bytes(parts: Mapping[str, int], device: str) -> int:
    """Bytes that a process occupies in all: `parts`, what allocators keep on top, and on a CPU Python itself."""
    held = _SLACK[device] * sum(parts.values())
    return round(held + _HOLES * parts.get("activations", 0) + _PROCESS if device == "cpu" else held)


def _activations(of: Shapes, how: Setup, *, norm: int) -> int:
    """Bytes that autograd keeps for m tokens.

    For each layer it keeps the inputs and outputs of its two norms (`norm` bytes per channel). It
    also keeps queries, keys, values and the output of attention, gate, its activation, up and their product. With checkpointing
    it keeps the input of each layer, and all of one layer.
    """
    layers, last_norm = _layers(of, how, norm=norm), (how.stored + (2 if how.narrow else 4)) * of.width
    if how.checkpointing:
        return how.tokens * (how.stored * of.layers * of.width + layers // of.layers + last_norm)
    return how.tokens * (layers + last_norm)


def _layers(of: Shapes, how: Setup, *, norm: int) -> int:
    """Bytes that autograd keeps for one token in all layers."""
    return norm * of.layers * of.width + (2 if how.narrow else 4) * (2 * of.queries + 2 * of.keys + 4 * of.neurons)


def _loss(of: Shapes, how: Setup, *, learns: bool, gathered: bool = False, chunk: int | None = None) -> int:
    """Bytes for the head: logits of a chunk of tokens, the gradient of the head's input, the head's own gradient and copies.

    With FSDP the last two are counted as gathered.
    """
    element = 2 if how.narrow else 4
    chunk = min(how.tokens, chunk or max(loss.CACHED_ROWS, loss.MAX_LOGITS // of.vocabulary))
    at_once = loss.CACHED_ROWS if how.device == "cpu" else chunk
    logits = of.vocabulary * (element * chunk + (4 * at_once if how.narrow else 0))
    if how.teacher is not None:
        logits += 20 * of.vocabulary * at_once
    of_head = ((how.stored + element) * learns + (element if how.narrow and how.stored == 4 else 0)) * of.head
    return logits + how.stored * how.tokens * of.width + (0 if gathered else of_head)


def _wide_head(of: Shapes, how: Setup) -> int:
    """Bytes of the head at hand as float32, with weights on a shelf; 0 if products take it as it is stored."""
    return 0 if how.offload == "none" or (how.narrow and how.file_bytes == 2) else 4 * of.head


def multiply_adds(of: Shapes, *, length: int, logits: int) -> int:
    """Multiply-adds of reading a row of `length` tokens, with logits at `logits` of the tokens.

    length · (N_dec + A · length) + logits · V·H. Attention is causal: a token attends to half of the keys on average, with one
    multiplication for the attention weight and one for the value. An embedding is looked up, not multiplied.
    """
    return length * (of.decoder + of.queries * length) + logits * of.head


def bytes_moved(of: Shapes, *, context: float, batch: int, weight: float, cached: float) -> float:
    """Bytes read from memory to write one more token in each of `batch` rows, after `context` tokens.

    weight · (N - V·H if the input embedding is not tied) + cached · 2 K · context · batch: each multiplied weight is read once
    for all rows, and the keys and values once for each row.

    Args:
        of: the shapes.
        context: tokens in the cache.
        batch: number of rows.
        weight: bytes of a weight, on average.
        cached: bytes of a number in the cache.
    """
    return weight * (of.params - (0 if of.tied else of.head)) + cached * 2 * of.keys * context * batch


def operations(of: Shapes, how: Setup, *, kind: Literal["train", "score", "read"]) -> float:
    """FLOPs per token.

    A forward pass takes 2 (N_dec + V·H) + 2 A·length, the `multiply_adds` with all logits. Training takes three times that, or
    twice for frozen weights. Checkpointing adds another forward pass of the decoder, and a teacher its own forward pass. Scoring
    by first-order Taylor is training with checkpointing, without a gradient of the head. Reading is the forward pass only.
    """
    layers = 2 * multiply_adds(of, length=how.length, logits=0) / how.length
    head = 2 * of.head
    if kind == "read":
        return layers + head
    if kind == "score":
        return 4 * layers + 2 * head
    taught = operations(how.teacher, how, kind="read") if how.teacher is not None else 0
    return (2 if how.lora else 3) * (layers + head) + (layers if how.checkpointing else 0) + taught


@dataclass(frozen=True)
class Speed:
    """The speed of a process.

    Attributes:
        flops: FLOPs per second of reading, and of all phases that `others` does not name.
        words: where the figure comes from, for people.
        near: bytes per second to another process on the same machine, of up to 8 processes.
        far: bytes per second to a process on another machine.
        memory: bytes of the device; None if that is not known.
        others: phase -> FLOPs per second.
        load: seconds to load the model.
    """

    flops: float
    words: str
    near: float = 300e9
    far: float = 40e9
    memory: int | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    load: float = 0.0

    def of(self, phase: str) -> "Speed":
        """The speed in a phase."""
        return replace(self, flops=self.others.get(phase, self.flops))


DISK = 2e9
"""Bytes per second that are read from a disk; assumed."""

PAPER = {
    "cuda": Speed(0.4 * 989e12, "an H100 at 40 % of its 989 TFLOP/s in bfloat16", memory=79 * 2**30),
    "cpu": Speed(1e11, "a CPU at 0.1 TFLOP/s"),
}
"""Device -> the speed that is assumed if none can be measured."""


def seconds(of: Shapes, how: Setup, speed: Speed, *, flops: float, trained: int = 0) -> float:
    """Seconds that the processes take for `flops` operations, in which they train a model on `trained` tokens.

    The processes share the operations evenly. When they train, each sends (n - 1) / n of the following bytes to others. With DDP these are 2 w N per
    training step, the gradients there and back. With FSDP these are, for each pass, the weights twice, in the precision of
    products, and the gradients once, 4 N. Sending is assumed not to overlap with computing. The bytes that scoring sends are left
    out.
    """
    n = how.processes
    wire = speed.near if n <= 8 else speed.far
    share = (n - 1) / n
    steps = trained / how.batch_tokens if how.batch_tokens else 0
    if how.parallel == "fsdp":
        passes = steps * max(1, how.batch_tokens / n / how.tokens)
        sent = passes * (2 * (2 if how.narrow else 4) + 4) * of.params
    else:
        sent = steps * 2 * how.learnt * how.trained(of)
    return flops / speed.flops / n + sent * share / wire
