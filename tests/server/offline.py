"""A program that answers with ``vllm.LLM``: ``python -m tests.server.offline``.

It reads ``{"engine": {…}, "prompts": [[…], …], "tokens": N, "answer": "FILE", "cached": "FILE"}``
from standard input: the keywords of ``vllm.LLM``, prompts as token ids, how many tokens to give,
and where to write the tokens of each prompt, and how many of it were in the cache of prefixes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer, greedily."""
    from vllm import LLM, SamplingParams

    task: dict[str, Any] = json.load(sys.stdin)
    engine = LLM(**task["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=task["tokens"], ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    Path(task["answer"]).write_text(json.dumps(tokens))
    cached = [answer.num_cached_tokens for answer in answers]
    Path(task["cached"]).write_text(json.dumps(cached))


if __name__ == "__main__":
    main()
