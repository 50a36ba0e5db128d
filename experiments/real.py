"""ENIGMA on a real model: SmolLM2-135M-Instruct, real questions, principles with visible marks.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/real.py            # half an hour for each training on one core

The same command goes on where it was stopped. In order, each part skipped where its result is in
--output-dir already, a training resumed at its last checkpoint:

    questions    texts of GSM8K (train) and of one half of TruthfulQA; nothing rewards an answer
    trainings    GRPO alone and ENIGMA, for each seed, by the command line of train.py
    following    one completion of each held-out question under each principle: does it show the
                 mark of its principle?
    TruthfulQA   mc1 and mc2 on the other half, by the tasks and the scoring of lm-eval

Writes real.json and real.png and prints the table. Flags not listed here go to train.py. The mark
of a principle is found by the regular expressions below: no loss and no metric of the training
sees them.
"""

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import smollm2  # noqa: E402
from experiments.common import read_lines  # noqa: E402
from support.command import parse  # noqa: E402
from support.data import load_data  # noqa: E402
from support.model import load_model  # noqa: E402
from support.report import write_plot  # noqa: E402
from support.scoring import completion_logp  # noqa: E402
from support.writing import write_aside  # noqa: E402
from train import Task, load, sample  # noqa: E402

POOL = ROOT / "principles" / "pool.txt"
PRINCIPLES = ROOT / "principles" / "visible.txt"  # trained with: four of the pool
MIN_WORDS = 4  # of a chain of thought
MAX_CHARACTERS = 200  # of a question of GSM8K: prompts cost as much as completions
PROMPT = ("--temperature", 0.8, "--max-completion-length", 48)
RECIPE = (  # of every arm
    "--num-questions", 1, "--num-principles", 4, "--num-generations", 4, "--max-steps", 36, "--learning-rate", 1.5e-5,
    "--warmup-steps", 2, "--eval-questions", 24, "--eval-steps", 0, "--save-steps", 10, "--save-total-limit", 1,
)
ARMS = {
    "GRPO": ("--lambda-mi", 0, "--lambda-ot", 0),
    "ENIGMA": ("--lambda-mi", 0, "--mi-reward", 1.0, "--lambda-ot", 0.003),  # information as a reward
}
FIGURES = {  # column -> name in eval.json
    "format": "format", "SI": "si", "accuracy": "accuracy", "drift": "sinkhorn", "tokens": "completion_length",
}
COLUMNS = ("format", "follows", "SI", "accuracy", "drift", "tokens", "mc1", "mc2", "minutes")
SHARED = ROOT.parent / "shared" / "data"  # the questions as files, if there; else from the hub


def says(pattern):
    """Whether a text has this pattern, upper or lower case."""
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda text: bool(compiled.search(text))


MARKS = {  # principle -> whether a chain of thought shows its mark
    "Number every step: 1., 2., 3.": says(r"(?s)(^|\s)1[.)]\s.*\s2[.)]\s"),
    'Begin with the words "Let us".': says(r"\A\W*let\s?(us|'s|’s)\b"),
    "Ask yourself a question first.": says(r"\A[^.!]*\?"),
    'Use the word "because".': says(r"\bbecause\b"),
    "Use the words first, then and finally.": says(r"(?s)\bfirst\b.*\bthen\b.*\bfinally\b"),
    "Name a common mistake.": says(r"\b(mistake|misconception|myth|error)s?\b"),
    'Speak to the reader: use the word "you".': says(r"\byour?\b"),
    'Speak of yourself: use the word "I".': lambda text: bool(re.search(r"\bI\b", text)),
    'Give an example that starts with "For example".': says(r"\bfor example\b"),
    "Say how sure you are, in percent.": says(r"\d\s?%|\bper ?cent\b"),
    'Use the word "therefore".': says(r"\btherefore\b"),
    "End every sentence with an exclamation mark.": lambda text: "!" in text and not re.search(r"[.?](\s|\Z)", text),
    "Use at most eight words.": lambda text: 0 < len(text.split()) <= 8,
    "Put the most important word in **bold**.": says(r"\*\*[^*\s][^*\n]*\*\*"),
}


def follows(principle: str, text: str) -> bool:
    """Whether the chain of thought of a completion shows the mark of its principle.

    One of fewer than MIN_WORDS does not: "Because." names the principle and says nothing.
    """
    chain = text.split("<reasoning>", 1)[-1].split("</reasoning>")[0]
    return len(chain.split()) >= MIN_WORDS and MARKS[principle](chain)


# --------------------------------------------------------------------------------------------------
# Questions

FILES = {"gsm8k": "gsm8k_train.jsonl", "truthfulqa": "truthfulqa_mc.json"}  # in SHARED
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "train"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
}


def rows_of(name: str):
    """Rows of a data set: a file of ../shared/data, or of the hub."""
    path = SHARED / FILES[name]
    if path.exists():
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    import datasets  # only here: a heavy import

    source = HUB[name]
    try:
        rows = list(datasets.load_dataset(*source[:2], split=source[2]))
    except Exception as error:  # the library's own, the hub's, the network's
        raise SystemExit(f"error: {source[0]} cannot be had from the hub: {str(error).splitlines()[0]}") from None
    if name == "gsm8k":
        return rows
    return [
        {"question": row["question"]}
        | {key: dict(zip(row[key]["choices"], row[key]["labels"])) for key in ("mc1_targets", "mc2_targets")}
        for row in rows
    ]


def in_first_half(question: str) -> bool:
    """Which half of TruthfulQA a question is in, by a hash of its text."""
    return hashlib.sha256(question.encode()).digest()[0] < 128


def write_questions(directory: Path) -> tuple[Path, Path]:
    """(questions.jsonl to train with; truthfulqa.jsonl with the other half, as lm-eval has it).

    The answers to GSM8K are there for the accuracy alone.
    """
    train, test = directory / "questions.jsonl", directory / "truthfulqa.jsonl"
    if not test.exists():
        truthful = rows_of("truthfulqa")
        first = [{"question": row["question"]} for row in truthful if in_first_half(row["question"])]
        sums = [
            {"question": row["question"], "answer": row["answer"]}
            for row in rows_of("gsm8k") if len(row["question"]) <= MAX_CHARACTERS
        ]
        sums.sort(key=lambda row: hashlib.sha256(row["question"].encode()).digest())
        write_lines(train, first + sums[: len(first)])  # as many of each
        write_lines(test, [
            {"question": row["question"]} | {
                key: {"choices": list(row[key]), "labels": list(row[key].values())}
                for key in ("mc1_targets", "mc2_targets")
            } for row in truthful if not in_first_half(row["question"])
        ])
    return train, test


def write_lines(path: Path, rows) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# Trainings, and what their completions show


def run_command(*arguments) -> None:
    """`python ARGUMENTS` in the repository; what it prints is seen."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: python {' '.join(map(str, arguments))} ended with status {done.returncode}")


def train(directory: Path, flags) -> None:
    """train.py with these flags, from where it stopped."""
    if (directory / "final").exists():
        return
    start = time.time()
    resume = ["--resume", directory] if (directory / "checkpoints").exists() else ["--output-dir", directory, *flags]
    if not (directory / "checkpoints").exists():
        shutil.rmtree(directory, ignore_errors=True)  # stopped before its first checkpoint
    run_command("train.py", *resume)
    minutes = directory / "minutes.json"
    before = json.loads(minutes.read_text()) if minutes.exists() else 0
    minutes.write_text(json.dumps(before + (time.time() - start) / 60))


def write_completions(model_folder: Path, flags, path: Path) -> None:
    """One completion of each question that train.py holds out, under each principle, to `path`."""
    config = parse([*map(str, flags), "--model", str(model_folder)])
    model, tokenizer = load(config)
    data = load_data(model, tokenizer, config)
    rows = []
    for number, question in enumerate(tqdm(data.held_out, "following")):  # one at a time: its prompts share it
        task = Task(question, data.principles, f"{config.seed} following {number}")
        texts = sample(model, tokenizer, data.template, [task], 1, config).texts[0]  # K lists of one
        rows += [
            {"question": question.text, "principle": p.text, "text": text, "follows": follows(p.text, text)}
            for p, (text,) in zip(data.principles, texts)
        ]
    write_lines(path, rows)


# --------------------------------------------------------------------------------------------------
# TruthfulQA


def truthfulqa(model_folder: Path, rows: Path, limit: int | None) -> dict:
    """{"mc1": [share, standard error], "mc2": …} by the prompt, tasks and scoring of lm-eval."""
    import lm_eval
    from lm_eval.api.model import LM

    class Scorer(LM):
        """The log-likelihoods that lm-eval asks for, a prompt read once for all its answers."""

        def loglikelihood(self, requests):
            return log_likelihoods(model_folder, [request.args for request in requests])

        loglikelihood_rolling = generate_until = None  # multiple choice asks for neither

    Scorer.__abstractmethods__ = frozenset()
    tasks = rows.parent / "lm-eval"
    tasks.mkdir(exist_ok=True)
    library = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    for name in ("mc1", "mc2"):
        (tasks / f"{name}.yaml").write_text(
            f"include: {library / f'truthfulqa_{name}.yaml'}\ntask: half_{name}\ntag: null\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    validation: {rows.resolve()}\n"
        )
    results = lm_eval.simple_evaluate(
        model=Scorer(), tasks=["half_mc1", "half_mc2"], limit=limit,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]
    return {
        name: [float(results[f"half_{name}"][key]) for key in ("acc,none", "acc_stderr,none")]
        for name in ("mc1", "mc2")
    }


@torch.no_grad()
def log_likelihoods(model_folder: Path, pairs) -> list[tuple[float, bool]]:
    """(log p(answer | context), False) of each pair of texts, tokenised as lm-eval does it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(str(model_folder), device)
    found, by_context = {}, {}
    for pair in pairs:
        by_context.setdefault(pair[0], {})[pair[1]] = None
    contexts = list(by_context)
    for start in tqdm(range(0, len(contexts), 8), "TruthfulQA"):
        some = contexts[start : start + 8]
        prompts = tokenizer(some, add_special_tokens=False)["input_ids"]
        whole = [tokenizer([c + a for a in by_context[c]], add_special_tokens=False)["input_ids"] for c in some]
        answers = [[ids[len(prompt) :] for ids in rows] for prompt, rows in zip(prompts, whole)]
        shape = len(some), max(map(len, answers)), max(len(ids) for rows in answers for ids in rows)
        tokens = torch.zeros(shape, dtype=torch.long, device=device)  # [P, N, T]
        mask = torch.zeros(shape, dtype=torch.bool, device=device)  # [P, N, T]
        for p, rows in enumerate(answers):
            for n, ids in enumerate(rows):
                tokens[p, n, : len(ids)], mask[p, n, : len(ids)] = torch.tensor(ids), True
        sums = completion_logp(model, prompts, tokens, mask, 1.0).sum(-1)  # [P, N]
        for p, context in enumerate(some):
            found |= {(context, answer): sums[p, n].item() for n, answer in enumerate(by_context[context])}
    return [(found[pair], False) for pair in pairs]


# --------------------------------------------------------------------------------------------------
# Table, plot, command line


def collect(directory: Path, arms, seeds: int) -> dict:
    """arm -> list over seeds of {measure: value}; "start" is what the trained arms began from."""
    results = {"start": [], **{name: [] for name in arms}}
    for seed in range(seeds):
        for name in results:
            run = directory / f"{name if name != 'start' else next(iter(arms))}-{seed}"
            evals = json.loads((run / "eval.json").read_text())["start" if name == "start" else "end"]
            row = {column: evals[key]["mean"] for column, key in FIGURES.items() if key in evals}
            shown = read_lines(directory / f"completions-{name}-{seed}.jsonl")
            row["follows"] = statistics.mean(line["follows"] for line in shown)
            for key, (share, error) in read_lines(directory / f"truthfulqa-{name}-{seed}.json")[0].items():
                row |= {key: share, f"{key}_error": error}
            row["minutes"] = 0.0 if name == "start" else json.loads((run / "minutes.json").read_text())
            results[name].append(row)
    return results


def table(results: dict) -> str:
    """Markdown: the mean over seeds, and each seed's value; of mc1 and mc2 the standard error."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, rows in results.items():
        cells = []
        for column in COLUMNS:
            values = [row[column] if abs(row[column]) > 1e-6 else 0.0 for row in rows if column in row]  # no -0.00
            if not values:
                cells.append("")
                continue
            digits = 0 if column == "minutes" else 3 if column.startswith("mc") else 2
            mean = f"{statistics.mean(values):.{digits}f}"
            if f"{column}_error" in rows[0]:
                cells.append(f"{mean} ± {statistics.mean(row[f'{column}_error'] for row in rows):.3f}")
            else:
                cells.append(f"{mean} (" + ", ".join(f"{value:.{digits}f}" for value in values) + ")")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(pyplot, results: dict):
    columns = [column for column in COLUMNS if column not in ("minutes", "accuracy")]
    figure, axes = pyplot.subplots(1, len(columns), figsize=(2.3 * len(columns), 3), layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        for place, rows in enumerate(results.values()):
            values = [row[column] for row in rows]
            error = statistics.mean(row[f"{column}_error"] for row in rows) if f"{column}_error" in rows[0] else None
            axis.bar(place, statistics.mean(values), 0.7, yerr=error, color=f"C{place}", alpha=0.5, capsize=4)
            axis.plot([place] * len(values), values, "k.", ms=4)
        axis.set_xticks(range(len(results)), list(results), fontsize=8)
        axis.set(title=column)
    return figure


def make_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The flags of the benchmarks on a real model; results go to runs/<name> by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / name)
    parser.add_argument("--model", type=Path, help="a folder; else SmolLM2, made by experiments/smollm2.py")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="questions of TruthfulQA; all of its half if not given")
    return parser


def model_folder(args) -> Path:
    """That of --model, or of SmolLM2, which is made where it is missing."""
    return (args.model or smollm2.make(smollm2.default_folder())).resolve()


def main() -> None:
    parser = make_parser(__doc__, "real")
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    directory = args.output_dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    model = model_folder(args)
    questions, test = write_questions(directory)

    for seed in range(args.seeds):
        flags = ["--principles", PRINCIPLES, "--dataset", questions, "--seed", seed, *PROMPT, *RECIPE, *extra]
        for name, weights in ARMS.items():
            train(directory / f"{name}-{seed}", ["--model", model, *flags, *weights])
        for name in ("start", *ARMS):
            folder = model if name == "start" else directory / f"{name}-{seed}" / "final"
            if not (path := directory / f"completions-{name}-{seed}.jsonl").exists():
                write_completions(folder, flags, path)
            if not (path := directory / f"truthfulqa-{name}-{seed}.json").exists():
                same = directory / "truthfulqa-start-0.json"  # the start is one model for all seeds
                again = name == "start" and same.exists()
                write_lines(path, read_lines(same) if again else [truthfulqa(folder, test, args.limit)])
    results = collect(directory, ARMS, args.seeds)
    (directory / "real.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    write_plot(directory / "real.json", lambda pyplot: plot(pyplot, results))


if __name__ == "__main__":
    main()
