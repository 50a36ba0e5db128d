"""Peak memory: of log-probabilities with gradient, of train.py's estimate, of a step of a 1B model.

    python benchmarks/memory.py                              # all three; 16 GB of memory, 18 minutes on two cores
    python benchmarks/memory.py --parts logits estimate      # without the 1B models

    logits     token_log_probs with gradient against the full logits: 8 x 512 tokens, V = 262144,
               d = 1152
    estimate   the line that train.py prints before training against what two steps then took: of
               SmolLM2-135M-Instruct where experiments/smollm2.py has put it, else of a random model
               of a quarter of its size
    billion    one LoRA step through train.py of random models in the shapes of Gemma-3-1B and
               Llama-3.2-1B

Everything runs in a process of its own, whose peak is the operating system's (ru_maxrss); of it is
taken what the same process takes before the part that is measured. `estimate` runs with
MALLOC_MMAP_THRESHOLD_ set, so that freed memory goes back at once: without it, the C library keeps
up to twice what torch has asked for. Linux only. Prints tables and writes memory.json into
--output-dir.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.scoring import token_log_probs  # noqa: E402

MIDDLE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
BILLION = {  # the published configurations of the two
    "Gemma-3-1B": ("Gemma3", "Gemma3TextConfig", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}),
    "Llama-3.2-1B": ("Llama", "LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}),
}
STEP = "--eval-questions 2 --eval-steps 0 --warmup-steps 0 --principles principles/reasoning.txt".split()
SMALLEST = "--lora-rank 16 --num-questions 1 --num-principles 2 --num-generations 2 --max-completion-length 16"
BATCH = "--num-questions 1 --num-principles 4 --num-generations 4 --max-completion-length 48"
VARIANTS = {
    "all three terms": "",
    "recomputed, 16 rows at a time": "--gradient-checkpointing True --micro-batch 16",
    "LoRA": "--lora-rank 16",
    "GRPO alone": "--lambda-mi 0 --lambda-ot 0",
}


# --------------------------------------------------------------------------------------------------
# In a process of its own


def measure_logits(variant: str, rows: int, tokens: int, vocabulary: int, width: int) -> None:
    """Prints the peak of a forward and backward, beside head and hidden states, and the seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=8, tie_word_embeddings=True))
    hidden = torch.randn(rows, tokens, width, requires_grad=True)  # [N, T, d]
    targets = torch.randint(vocabulary, (rows, tokens))  # [N, T]
    before, start = now(), (time.process_time(), time.perf_counter())
    if variant == "full logits":
        logp = model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # [N, T]
    else:
        logp = token_log_probs(model, hidden.flatten(0, 1), targets.flatten(), 1.0).reshape(rows, tokens)  # [N, T]
    (logp * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(1))).sum().backward()
    checksum = hidden.grad.norm().item(), model.lm_head.weight.grad.norm().item()
    print(json.dumps({"gb": (peak() - before) / 1e9, "cpu_seconds": time.process_time() - start[0],
                      "seconds": time.perf_counter() - start[1], "gradient_norms": checksum}))


def write_model(folder: str, kind: str, config: str, settings: str) -> None:
    """A random model with the embedded model's tokenizer, for train.py."""
    import torch
    import transformers

    from support import tiny

    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, config)(**{"vocab_size": 512, **json.loads(settings), **ends}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))


def now() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes: the most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --------------------------------------------------------------------------------------------------
# Around it


def run(*arguments, **environment) -> tuple[str, dict]:
    """(stdout, peak and seconds) of `python ARGUMENTS` in the repository."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env={**os.environ, **environment})
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"python {' '.join(map(str, arguments))}: ended with {os.waitstatus_to_exitcode(status)}")
    return out, {"gb": usage.ru_maxrss * 1024 / 1e9, "cpu_seconds": usage.ru_utime + usage.ru_stime,
                 "seconds": time.perf_counter() - start}


def child(*arguments) -> dict:
    return json.loads(run(__file__, "--child", *arguments)[0])


def logits(args) -> dict:
    sizes = args.rows, args.tokens, args.vocabulary, args.width
    rounds = [{v: child("measure_logits", v, *sizes) for v in ("full logits", "token_log_probs")}
              for _ in range(args.rounds)]
    ratio = {key: statistics.median(r["token_log_probs"][key] / r["full logits"][key] for r in rounds)
             for key in ("gb", "cpu_seconds", "seconds")}
    print(f"\nlog-probabilities with gradient, {args.rows} x {args.tokens} tokens, V = {args.vocabulary}, "
          f"d = {args.width}, the head's gradient included\n\n"
          "| | peak, GB | seconds of CPU | seconds |\n|---|---|---|---|")
    for name in rounds[0]:
        cells = [statistics.median(r[name][key] for r in rounds) for key in ("gb", "cpu_seconds", "seconds")]
        print(f"| {name} | {cells[0]:.2f} | {cells[1]:.1f} | {cells[2]:.1f} |")
    print(f"| ratio | 1/{1 / ratio['gb']:.1f} | {ratio['cpu_seconds']:.2f} | {ratio['seconds']:.2f} |")
    return {"rounds": rounds, "ratio": ratio}


def estimate(args) -> dict:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            child("write_model", f"{folder}/model", "Llama", "LlamaConfig", json.dumps(MIDDLE))
        model = args.model or f"{folder}/model"
        _, libraries = run("-c", "import train")
        print(f"\ntrain.py's estimate, {args.model or MIDDLE}\n\n"
              "| | estimated, GB | measured, GB | ratio |\n|---|---|---|---|")
        for name, flags in VARIANTS.items():
            out, used = run("train.py", *STEP, "--max-steps", 2, "--model", model, "--output-dir", f"{folder}/{name}",
                            *BATCH.split(), *flags.split(), MALLOC_MMAP_THRESHOLD_="262144")
            estimated, took = estimated_gb(out), used["gb"] - libraries["gb"]
            rows[name] = {"estimated": estimated, "measured": took, "ratio": estimated / took}
            print(f"| {name} | {estimated:.2f} | {took:.2f} | {estimated / took:.2f} |", flush=True)
    return rows


def billion(args) -> dict:
    rows = {}
    print("\none step of a 1B-shaped random model, K = 2, G = 2, 16 tokens, LoRA of rank 16, from load to saved\n\n"
          "| | parameters | peak, GB | estimated, GB | seconds of CPU | seconds |\n|---|---|---|---|---|---|")
    for name, (kind, config, settings) in BILLION.items():
        with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
            size = child("write_model", f"{folder}/model", kind, config, json.dumps(settings))["parameters"]
            out, used = run("train.py", *STEP, "--max-steps", 1, "--model", f"{folder}/model",
                            "--output-dir", f"{folder}/run", *SMALLEST.split())
        estimated = estimated_gb(out)
        rows[name] = {"parameters": size, "estimated": estimated, **used}
        print(f"| {name} | {size / 1e9:.2f}e9 | {used['gb']:.1f} | {estimated:.1f} | {used['cpu_seconds']:.0f} | "
              f"{used['seconds']:.0f} |", flush=True)
    return rows


def estimated_gb(out: str) -> float:
    """The total of the estimate in what train.py printed, GB."""
    return float(re.search(r"memory: about (\S+) GB", out)[1])


PARTS = {"logits": logits, "estimate": estimate, "billion": billion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=1, help="of the logits part, the two ways by turns")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--width", type=int, default=1152)
    from experiments.smollm2 import default_folder  # not in the measured processes, which import this file

    smollm2 = default_folder()
    parser.add_argument("--model", default=smollm2 if smollm2.exists() else None, help="folder, of the estimate part")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "memory.json"
    result = json.loads(path.read_text()) if path.exists() else {}  # parts that were measured before are kept
    for part in args.parts:
        result[part] = PARTS[part](args)
        path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:  # run by `child`
        name, *values = sys.argv[2:]
        {"measure_logits": measure_logits, "write_model": write_model}[name](
            *(int(v) if v.isdigit() else v for v in values))
    else:
        main()
