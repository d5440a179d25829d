"""Run by its path in a process of its own: stock transformers with a folder. The package adapt_pruner cannot be imported here.

    python stranger.py FOLDER THREADS [trust]

First it says, as a line of JSON, the model's class and number of tokens, or what went wrong. Then each line on stdin is a
question in JSON. {"logits": ids} is answered with a line with the shape and then float32 [length, vocabulary]; {"greedy": ids,
"tokens": n} and {"encode": text} are answered with a line.
"""

import json
import os
import select
import sys
import threading

sys.modules["adapt_pruner"] = None  # type: ignore[assignment]  # an import of it raises


def end_with_stdin() -> None:
    """End this process, whatever it does, when the other end of stdin is closed; otherwise it would go on for nobody."""
    pipe = select.poll()
    pipe.register(0, 0)
    pipe.poll()
    os._exit(1)


def main() -> None:
    """Answer questions until stdin ends."""
    threading.Thread(target=end_with_stdin, daemon=True).start()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps what libraries print out of the answers

    def answer(data: object) -> None:
        out.write(json.dumps(data).encode() + b"\n")
        out.flush()

    folder, threads, trust = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["trust"]
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust, dtype=torch.float32, use_safetensors=True
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:
        answer({"error": str(error).strip().partition("\n")[0] or type(error).__name__})
        return
    answer({"class": type(model).__name__, "vocab_size": model.get_input_embeddings().weight.shape[0]})
    greedy = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    for line in sys.stdin:
        question = json.loads(line)
        with torch.no_grad():
            if "logits" in question:
                logits = model(torch.tensor([question["logits"]]), use_cache=False).logits[0]
                answer(list(logits.shape))
                out.write(logits.float().numpy().tobytes())
                out.flush()
            elif "greedy" in question:
                ids = torch.tensor([question["greedy"]])
                model.generation_config = greedy
                written = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=question["tokens"], generation_config=greedy
                )
                answer(written[0, ids.shape[1] :].tolist())
            else:
                answer(tokenizer(question["encode"], verbose=False)["input_ids"])


if __name__ == "__main__":
    main()
