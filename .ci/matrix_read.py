"""python matrix_read.py FOLDER ANSWER: what a transformers without adapt-pruner makes of the checkpoints there, as JSON, for .ci/matrix."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

TEXT = "The quick brown fox jumps over 13 lazy dogs."
TOLERANCE = 1e-5  # of the deviation of the logits: versions may round in another order


OLD = int(transformers.__version__.partition(".")[0]) < 5


def trouble(folder: Path) -> str:
    """What is wrong with a checkpoint; nothing where it computes what it did when it was made, or an old version says what it needs."""
    config = json.loads((folder / "config.json").read_text())
    expected, trust = load_file(folder.with_suffix(".safetensors")), "auto_map" in config
    if OLD and trust:
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        except ImportError as error:
            return "" if "pip install --upgrade 'transformers>=5" in str(error) else str(error)
        return "it should have been refused"
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, output_loading_info=True)
    if surplus := [*info["missing_keys"], *info["unexpected_keys"]]:
        return f"weights missing or left over: {surplus[0]}"
    ids = expected["ids"]
    with torch.no_grad():
        off = float((model(ids).logits - expected["logits"]).abs().max() / expected["logits"].std())
        if not off <= TOLERANCE:
            return f"logits are {off:.1e} deviations off"
        base = AutoModel.from_pretrained(folder, trust_remote_code=trust)
        if OLD and config["model_type"] == "gemma3_text":
            base = model.model  # that version does not read a base model out of folders of its own either
        hidden = base(ids).last_hidden_state
        if not torch.allclose(hidden, expected["hidden"], atol=TOLERANCE * float(expected["hidden"].std()), rtol=0):
            return "AutoModel computes another hidden state"
        asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            if not torch.equal(model.generate(ids[:1, :5], **asked, **how), expected["written"]):
                return f"generate writes other tokens with {how or 'its cache'}"
    if AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)(TEXT).input_ids != expected["tokens"].tolist():
        return "the tokenizer gives other tokens"
    with TemporaryDirectory(dir=folder.parent) as again:
        model.save_pretrained(again)
        reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=trust)
        if not torch.equal(reloaded(ids).logits, model(ids).logits):
            return "saved again it is another model"
    model.train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    if any(parameter.grad is None for parameter in model.parameters()):
        return "a parameter gets no gradient"
    return ""


def main(out: Path, answer: Path) -> None:
    """Look at all of them."""
    assert importlib.util.find_spec("adapt_pruner") is None, "adapt-pruner is installed here"
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {"transformers": transformers.__version__}
    for file in sorted(out.glob("*.safetensors")):
        try:
            found[file.stem] = trouble(file.with_suffix(""))
        except Exception as error:
            found[file.stem] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
