"""python vllm_writes.py FOLDER IMPL PROMPTS COUNT: the tokens that vLLM writes greedily after each prompt, as a line of JSON.

Run by test_vllm.py in a process of its own, with a Python that has vLLM and need not have adapt-pruner; written against vLLM 0.32.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(folder: str, impl: str, prompts: str, count: str) -> None:
    """Load and write."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, model_impl=impl, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2,
        gpu_memory_utilization=0.3,
    )  # fmt: skip
    asked = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
    found = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=int(count), ignore_eos=True), use_tqdm=False)
    print(json.dumps([list(one.outputs[0].token_ids) for one in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
