"""One vLLM engine behind LMCache's connector, which answers prompts for as long as it is asked.

The argument is a JSON file with `model`, `port` and `result`. Each line of standard input is JSON,
prompts' token ids by name; the answers by name, with the tokens that came from the cache, replace
the file `result`. The end of the input is the end of the engine.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def _answer(output: Any, seconds: float) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in position.items()}
            for position in completion.logprobs
        ],
        "cached": output.num_cached_tokens,
        "seconds": seconds,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": job["port"]}
    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        },
    )
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=5, ignore_eos=True)
    result = Path(job["result"])
    for line in sys.stdin:
        answers = {}
        for name, prompt in json.loads(line).items():
            start = time.monotonic()
            (output,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            answers[name] = _answer(output, time.monotonic() - start)
        new = result.with_suffix(".new")
        new.write_text(json.dumps(answers))
        new.rename(result)


if __name__ == "__main__":
    main()
