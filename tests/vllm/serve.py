"""Greedy tokens of a level in vLLM, as a line of JSON: `python serve.py DIRECTORY [--trust-remote-code]`."""

import json
import sys
from pathlib import Path

PROMPTS = ("The capital of France is", "Once upon a time, there was a", "def add(a, b):")
NEW_TOKENS = 24


def main() -> None:
    """Serve, generate, print."""
    from vllm import LLM, SamplingParams

    directory, *flags = sys.argv[1:]
    llm = LLM(directory, dtype="float32", trust_remote_code="--trust-remote-code" in flags, max_model_len=256,
              enforce_eager=True)  # fmt: skip
    done = llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    tokens = [list(output.outputs[0].token_ids) for output in done]
    print(json.dumps({"model": Path(directory).name, "tokens": tokens}))


if __name__ == "__main__":
    main()
