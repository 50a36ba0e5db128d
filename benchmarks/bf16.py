"""Does bfloat16 pay on this machine? Time and gradient of a training pass, beside float32.

    python benchmarks/bf16.py [--model FOLDER] [--rows 4] [--tokens 32] [--rounds 3]

On SmolLM2-135M-Instruct (experiments/smollm2.py), or another folder. One batch of sampled
completions is read and differentiated in float32 and with bfloat16 matrix products (float32
weights, as --bf16 True has it), in turn; printed are the ratio of the median times and the cosine
of the two gradients over all weights. The loss is log-probability times a random advantage: the
gradient of the GRPO term, whose sign differs between completions, so that rounding cannot hide
behind a common direction.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402

from experiments.smollm2 import default_folder  # noqa: E402
from support import sampling  # noqa: E402
from support.model import has_bf16, load_model  # noqa: E402
from support.prompts import (  # noqa: E402
    build_messages,
    encode_prompts,
    eos_ids,  # noqa: E402
)
from support.sampling import uniform_numbers  # noqa: E402
from support.scoring import completion_logp  # noqa: E402

QUESTIONS = ("Why is the sky blue?", "A book costs 4 dollars. What do 3 books cost?")


def gradient(model, prompts, completions, advantages, bf16):
    """(flat gradient of the policy loss over all weights, seconds)."""
    model.zero_grad()
    start = time.perf_counter()
    tokens, mask = completions.tokens, completions.mask  # [P, N, T] both
    logp = completion_logp(model, prompts, tokens, mask, 1.0, bf16=bf16)  # [P, N, T]
    (advantages * logp.sum(-1)).mean().backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_folder(), type=Path)
    parser.add_argument("--rows", type=int, default=4, help="completions of each of two prompts")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.model.exists():
        raise SystemExit(f"error: {args.model} is missing; python experiments/smollm2.py makes it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(str(args.model), device)
    prompts = encode_prompts(tokenizer, [build_messages(question, "Show every step.") for question in QUESTIONS])
    uniform = uniform_numbers(["a", "b"], args.rows, args.tokens, device=device)  # [P, N, T]
    completions = sampling.sample(
        model, prompts, uniform, 1.0, eos_ids(model, tokenizer), tokenizer.pad_token_id
    )
    advantages = torch.randn(uniform.shape[:2], generator=torch.Generator().manual_seed(0)).to(device)  # [P, N]
    times = {False: [], True: []}
    for _ in range(args.rounds):
        gradients = []
        for bf16 in times:
            values, seconds = gradient(model, prompts, completions, advantages, bf16)
            gradients.append(values)
            times[bf16].append(seconds)
    cosine = torch.nn.functional.cosine_similarity(*(g.double() for g in gradients), dim=0)
    single, half = (statistics.median(times[bf16]) for bf16 in (False, True))
    print(f"--bf16 of a large model is on by itself here: {'yes' if has_bf16(device) else 'no'}; "
          f"{torch.get_num_threads()} threads\n"
          f"float32 {single:.2f} s, bfloat16 {half:.2f} s a pass: {half / single:.2f} of the time\n"
          f"cosine of the gradients {cosine.item():.5f}, norm {gradients[1].norm() / gradients[0].norm():.4f} times")


if __name__ == "__main__":
    main()
