"""What the terms cost: a step of GRPO alone, with each term, and with all three, on the embedded model.

    python benchmarks/step.py                           # K = 4, G = 4, 4 questions, as train.py starts by default

The variants take turns on the same seeds, so that a slow moment of the machine hits all of them; ratios are medians of
the ratios within a round. Prints a table and writes step.json into --output-dir.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import policy  # noqa: E402
import tiny  # noqa: E402
import train  # noqa: E402

VARIANTS = {
    "GRPO": ["--lambda-mi", "0", "--lambda-ot", "0"],
    "GRPO + OT": ["--lambda-mi", "0"],
    "GRPO + SAMI": ["--lambda-ot", "0"],
    "ENIGMA": [],
}
PHASES = ("sample", "reference", "update")


def step(model, reference, tokenizer, config, number) -> dict:
    """Seconds of each phase of one step. The learning rate is 0: every round measures the same model."""
    questions, generator = tiny.make_questions(512, held_out=False), torch.Generator().manual_seed(number)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    clock = [time.perf_counter()]
    drawn = train.draw(questions, tiny.principles(), config, number)
    batch = train.roll_out(model, tokenizer, *drawn, config.num_generations, config, generator)
    clock.append(time.perf_counter())
    train.refer(reference, batch, config)
    clock.append(time.perf_counter())
    train.update(model, optimizer, config, batch)
    clock.append(time.perf_counter())
    seconds = {phase: b - a for phase, a, b in zip(PHASES, clock, clock[1:])}
    return {**seconds, "total": clock[-1] - clock[0], "tokens": int(batch.mask.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    model, tokenizer = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    reference = copy.deepcopy(model).requires_grad_(False)
    configs = {name: train.parse(["--principles", "-", *flags, *extra]) for name, flags in VARIANTS.items()}
    rounds = []
    for number in range(args.rounds + 1):
        rounds.append({n: step(model, reference, tokenizer, c, number) for n, c in configs.items()})
    rounds = rounds[1:]  # the first one warms up
    table = {}
    for name in VARIANTS:
        table[name] = {key: statistics.median(r[name][key] for r in rounds) for key in (*PHASES, "total", "tokens")}
        table[name]["ratio"] = statistics.median(r[name]["total"] / r["GRPO"]["total"] for r in rounds)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {len(rounds)} rounds, seconds\n")
    print("| | sample | reference | update | step | times GRPO |\n|---|---|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.2f}" for key in (*PHASES, "total", "ratio")) + " |")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "step.json").write_text(json.dumps({"table": table, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
