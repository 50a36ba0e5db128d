"""What a step costs: GRPO alone, with each term, with all, and TRL's GRPOTrainer on the same work.

    python benchmarks/step.py                           # 4 questions, K = 4, G = 4: as train.py starts by default
    python benchmarks/step.py --growth                  # the same without TRL, with each of the sizes doubled in turn
    python benchmarks/step.py --price --num-generations 8   # ENIGMA by --mi-generations, and what each part takes
    python benchmarks/step.py --num-questions 8         # flags not listed here go to train.py

The embedded model, or that of --model, on the same seeds in every variant; the variants take turns,
so that a slow moment of the machine hits all of them, and ratios are medians of the ratios within a
round. The learning rate is 0: every round measures the same model. TRL (`pip install -r
benchmarks/requirements.txt`; without it its rows are left out) gets the same prompts, as many
completions, the same limit of tokens, temperature, float32, all rows in one backward pass, and a
reward that costs nothing; once with its defaults, once with gradient checkpointing off. A step of
TRL is what lies between on_step_begin and on_step_end, its sampling what _generate takes. Prints
tables and writes step.json into --output-dir.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402
import transformers  # noqa: E402

import train  # noqa: E402
from support import sampling, tiny  # noqa: E402
from support.data import make_template, questions_of  # noqa: E402
from support.prompts import build_messages  # noqa: E402
from support.rows import LeftOut  # noqa: E402
from support.run import settle  # noqa: E402
from support.steps import Step  # noqa: E402

VARIANTS = {
    "GRPO": ["--lambda-mi", "0", "--lambda-ot", "0"],
    "GRPO + OT": ["--lambda-mi", "0"],
    "GRPO + SAMI": ["--lambda-ot", "0"],
    "ENIGMA": [],
}
TRL_VARIANTS = {"TRL GRPO, defaults": {}, "TRL GRPO, no checkpointing": {"gradient_checkpointing": False}}
GROWTH = {"--num-questions": (2, 4, 8), "--num-principles": (2, 4, 8), "--num-generations": (2, 4, 8),
          "--max-completion-length": (32, 64, 128)}
PHASES = ("sample", "start", "update")  # start: what the frozen start reads
ON_CPU = {"use_cpu": True, "bf16": False}


def now() -> float:
    """Seconds, once the GPU (if any) has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step(model, reference, tokenizer, questions, config, number) -> dict:
    """Seconds of each phase of one step of ours."""
    optimizer = torch.optim.AdamW(model.parameters())
    clock = [now()]
    tasks = train.draw(questions, tiny.principles(), config, number)
    batch = train.sample(model, tokenizer, make_template(config), tasks, config.num_generations, config)
    rewards = train.reward_completions(batch, config)
    clock.append(now())
    return finish_step(model, reference, optimizer, batch, rewards, config, clock)


def finish_step(model, reference, optimizer, batch, rewards, config, clock) -> dict:
    """Seconds of each phase; `clock` has when the step began, and when its batch was sampled."""
    targets = train.make_targets(model, reference, batch, rewards, config)
    clock.append(now())
    train.update(model, optimizer, batch, targets, Step(), config)  # at a rate of 0: each step is the same work
    clock.append(now())
    seconds = {phase: b - a for phase, a, b in zip(PHASES, clock, clock[1:])}
    return {**seconds, "total": clock[-1] - clock[0], "tokens": int(batch.mask.sum())}


def conversations(config, steps) -> list:
    """The messages of the prompts of `steps` steps, in the order that training takes them."""
    questions = tiny.make_questions(512, held_out=False)
    drawn = [train.draw(questions, tiny.principles(), config, number) for number in range(steps)]
    return [
        build_messages(task.question.text, principle.text)
        for tasks in drawn for task in tasks for principle in task.principles
    ]


def rounds_beside_trl(ours, settings, config, model, tokenizer, rounds) -> list[dict]:
    """`rounds` rounds of a step of TRL on `model`, and one of each of `ours`, name -> function.

    settings: of trl.GRPOConfig, beyond those that make the work the same.
    """
    import trl
    from datasets import Dataset

    found = []

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.sampling, self.tokens, self.start = 0.0, 0, now()

        def on_step_end(self, *args, **kwargs):
            total = now() - self.start
            theirs = {"sample": self.sampling, "start": 0.0, "update": total - self.sampling, "total": total,
                      "tokens": self.tokens}
            found.append({"TRL": theirs, **{name: run(len(found)) for name, run in ours.items()}})

    turns = Turns()
    rows = config.num_questions * config.num_principles * config.num_generations
    with tempfile.TemporaryDirectory() as directory:
        trainer = trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=trl.GRPOConfig(
                directory, num_generations=config.num_generations,
                max_completion_length=config.max_completion_length, temperature=config.temperature,
                max_steps=rounds + 1, learning_rate=0.0, shuffle_dataset=False,
                report_to="none", logging_steps=10**9, save_strategy="no", disable_tqdm=True,
                **{"per_device_train_batch_size": rows, **settings},
            ),
            train_dataset=Dataset.from_dict({"prompt": conversations(config, rounds + 1)}),
            processing_class=copy.deepcopy(tokenizer), callbacks=[turns],
        )
        generate = trainer._generate

        def timed(*args, **kwargs):
            start = now()
            out = generate(*args, **kwargs)
            turns.sampling, turns.tokens = now() - start, sum(map(len, out[1]))
            return out

        trainer._generate = timed
        trainer.train()
    return found[1:]  # the first one warms up


def summarise(rounds, base) -> dict:
    """Medians over rounds; `ratio` is the median of the ratios within a round."""
    table = {}
    for name in rounds[0]:
        table[name] = {key: statistics.median(r[name][key] for r in rounds) for key in (*PHASES, "total", "tokens")}
        table[name]["ratio"] = statistics.median(r[name]["total"] / r[base]["total"] for r in rounds)
    return table


def print_table(table, base, first) -> None:
    print(f"\n| {first} | sample | start | update | step | tokens/s | times {base} |\n" + "|---" * 7 + "|")
    for name, row in table.items():
        cells = [f"{row[key]:.2f}" for key in (*PHASES, "total")]
        print(f"| {name} | {' | '.join(cells)} | {row['tokens'] / row['total']:.0f} | {row['ratio']:.2f} |")


def price_variants(num_generations: int) -> dict:
    """GRPO alone, with OT, and all three terms, InfoNCE on 1, 2, 4, … completions of a group."""
    sizes = [2**power for power in range(num_generations.bit_length()) if 2**power <= num_generations]
    enigma = {f"ENIGMA, {size}": ["--mi-generations", str(size)] for size in sizes}
    return {name: VARIANTS[name] for name in ("GRPO", "GRPO + OT")} | enigma


def print_parts(rounds) -> None:
    """What each part of a step takes, in units of GRPO's step: medians over rounds."""
    print("\n| | sampling | own rows | other rows | the start reads | Sinkhorn |\n" + "|---" * 6 + "|")
    for name in rounds[0]:
        parts = []
        for turn in rounds:
            own, with_ot, row = turn["GRPO"]["update"], turn["GRPO + OT"]["update"], turn[name]
            others, ot = row["update"] - with_ot if name.startswith("ENIGMA") else 0, with_ot - own
            of_turn = row["sample"], own, others, row["start"], 0 if name == "GRPO" else ot
            parts.append([part / turn["GRPO"]["total"] for part in of_turn])
        print(f"| {name} | " + " | ".join(f"{statistics.median(part):.2f}" for part in zip(*parts)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--price", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    transformers.utils.logging.set_verbosity_error()
    torch.set_flush_denormal(True)  # as train.py does
    config = train.parse(["--principles", "-", *extra])
    model, tokenizer = train.load(config)
    reference = copy.deepcopy(model).requires_grad_(False)
    if config.dataset:
        questions = list(itertools.islice(questions_of(config, LeftOut(config.dataset)), 512))
    else:
        questions = tiny.make_questions(512, held_out=False)

    def steppers(variants, flags):  # name -> function of the round's number
        configs = {name: train.parse(["--principles", "-", *variants[name], *flags]) for name in variants}
        for settings in configs.values():
            settle(settings, model, tokenizer)
        state = model, reference, tokenizer, questions
        return {name: lambda number, c=c: step(*state, c, number) for name, c in configs.items()}

    def take_turns(runs):
        found = [{name: run(number) for name, run in runs.items()} for number in range(args.rounds + 1)]
        return found[1:]  # the first one warms up

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {args.rounds} rounds, seconds")
    tables = {}
    if args.growth:
        ends, sampling.eos_ids = sampling.eos_ids, lambda *_: []  # every completion as long as it may be
        for flag, sizes in GROWTH.items():
            runs = {f"{n}, {size}": run for size in sizes for n, run in steppers(
                {n: VARIANTS[n] for n in ("GRPO", "ENIGMA")}, [*extra, flag, str(size)]).items()}
            base = f"GRPO, {sizes[0]}"
            tables[flag] = summarise(take_turns(runs), base)
            print_table(tables[flag], base, flag)
        sampling.eos_ids = ends
    elif args.price:
        rounds = take_turns(steppers(price_variants(config.num_generations), extra))
        tables["price"] = summarise(rounds, "GRPO")
        print_table(tables["price"], "GRPO", "ours")
        print_parts(rounds)
    else:
        tables["terms"] = summarise(take_turns(steppers(VARIANTS, extra)), "GRPO")
        print_table(tables["terms"], "GRPO", "ours")
        try:
            import trl
        except ImportError:
            print("no rows of TRL: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        else:
            ours = steppers({name: VARIANTS[name] for name in ("GRPO", "ENIGMA")}, extra)
            for name, settings in TRL_VARIANTS.items():
                found = rounds_beside_trl(ours, {**ON_CPU, **settings}, config, copy.deepcopy(model), tokenizer,
                                          args.rounds)
                tables[name] = summarise(found, "TRL")
                print_table(tables[name], "TRL", f"{name} {trl.__version__}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "step.json").write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
