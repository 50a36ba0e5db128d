"""What ENIGMA and GRPO alone do to a real model: SmolLM2-135M-Instruct, real questions, visible marks.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/real.py                              # questions from the hub
    python experiments/real.py --data FOLDER                # from gsm8k_train.jsonl and truthfulqa_mc.json there
    python experiments/real.py --arms ENIGMA --seeds 0 --jobs 1 --limit 120

Asks whether format, following of the principles and SI rise together, and what the model believes
(TruthfulQA) stays. The same command goes on where it was stopped: each part is skipped where its
result is in --output-dir, a training resumed at its last checkpoint. Trainings run side by side
(--jobs), one thread each; DIRECTORY.log shows how one goes. In order:

    questions    texts of GSM8K (train) and of one half of TruthfulQA; nothing rewards an answer
    trainings    each arm (GRPO alone, with the anchor, ENIGMA) on each seed, by the command line of
                 train.py; its evaluations read one completion of each held-out question under each
                 principle: does it show the mark of its principle? See reading.py.
    TruthfulQA   mc1 and mc2 on the other half, by the tasks and the scoring of lm-eval

Writes real.json and real.png; prints the means over seeds, each seed beside its own start, what an
arm adds to following, following by principle, and the first ten completions to sums. `words` are
those of a chain of thought, `short` the share of chains of fewer than four. Flags not listed here go
to train.py, and win over the arms'. experiments/real_studies.py goes on from here.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import reading, smollm2  # noqa: E402
from experiments.common import (  # noqa: E402
    interval_cell,
    markdown,
    read_lines,
    run_script,
    run_training,
    side_by_side,
    training_minutes,
    write_lines,
)
from experiments.reading import answers_of, by_principle, following, read_answers  # noqa: E402
from support.command import parse  # noqa: E402
from support.data import load_data  # noqa: E402
from support.files import load_principles  # noqa: E402
from support.model import load_model  # noqa: E402
from support.report import write_plot  # noqa: E402
from support.sampling import write  # noqa: E402
from support.scoring import completion_logp  # noqa: E402
from train import Task, load, sample  # noqa: E402

POOL = ROOT / "principles" / "pool.txt"
PRINCIPLES = ROOT / "principles" / "visible.txt"  # trained with: four of the pool
MAX_ANSWER = 48  # tokens of a written answer to TruthfulQA
MAX_CHARACTERS = 200  # of a question of GSM8K: prompts cost as much as completions
PROMPT = ("--temperature", 0.8, "--max-completion-length", 48)
RECIPE = (  # of every arm
    "--num-questions", 1, "--num-principles", 4, "--num-generations", 4, "--max-steps", 36, "--learning-rate", 1.5e-5,
    "--warmup-steps", 2, "--eval-questions", 48, "--eval-steps", 0, "--save-steps", 6, "--save-total-limit", 1,
    "--bf16", False,  # the same numbers on every processor
)
ARMS = {  # name -> its flags of train.py
    "GRPO": ("--lambda-mi", 0, "--lambda-ot", 0),
    "OT": ("--lambda-mi", 0, "--lambda-ot", 0.003),  # GRPO and the anchor: what ENIGMA is without information
    "ENIGMA": ("--lambda-mi", 0, "--mi-reward", 1.0, "--lambda-ot", 0.003),  # information as a reward
}
BOTH = {name: ARMS[name] for name in ("GRPO", "ENIGMA")}  # what real_studies.py goes on with
SEEDS = (0, 1, 90210)
FIGURES = {  # column -> name in eval.json
    "format": "format", "SI": "si", "accuracy": "accuracy", "drift": "sinkhorn", "tokens": "completion_length",
    "words": "words", "short": "short_chains",
}
COLUMNS = ("format", "follows", "SI", "accuracy", "drift", "tokens", "words", "short", "mc1", "mc2", "minutes")


# --------------------------------------------------------------------------------------------------
# Questions

FILES = {"gsm8k": "gsm8k_train.jsonl", "truthfulqa": "truthfulqa_mc.json"}  # in the folder of --data
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "train"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
}


def rows_of(name: str, folder: Path | None):
    """Rows of a data set, from its file in the folder, else from the hub."""
    if folder:
        path = folder / FILES[name]
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_lines(path)
        except OSError as error:
            raise SystemExit(f"error: --data: {error}; a folder with {' and '.join(FILES.values())}") from None
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


def write_questions(directory: Path, folder: Path | None) -> dict[str, Path]:
    """Name -> file of questions. The answers to GSM8K are there for the accuracy alone.

    all: of both sets, what the arms train with and are reported on. choice: others of GSM8K, for
    whatever is chosen before a training. test: the other half of TruthfulQA, as lm-eval has it.
    """
    names = {"all": "questions.jsonl", "choice": "choice.jsonl", "test": "truthfulqa.jsonl"}
    files = {name: directory / file for name, file in names.items()}
    if not all(path.exists() for path in files.values()):
        truthful = rows_of("truthfulqa", folder)
        truth = [{"question": row["question"]} for row in truthful if in_first_half(row["question"])]
        sums = [
            {"question": row["question"], "answer": row["answer"]}
            for row in rows_of("gsm8k", folder) if len(row["question"]) <= MAX_CHARACTERS
        ]
        sums.sort(key=lambda row: hashlib.sha256(row["question"].encode()).digest())
        sums, others = sums[: len(truth)], sums[len(truth) : 2 * len(truth)]  # as many of each
        test = [
            {"question": row["question"]} | {
                key: {"choices": list(row[key]), "labels": list(row[key].values())}
                for key in ("mc1_targets", "mc2_targets")
            } for row in truthful if not in_first_half(row["question"])
        ]
        for path, rows in zip(files.values(), (truth + sums, others, test), strict=True):
            write_lines(path, rows)
    return files


# --------------------------------------------------------------------------------------------------
# What a model's completions show


def ask(args, folder: Path, path: Path, flags) -> list[dict]:
    """The rows of write_completions, from `path` where they are there already; else in a process of its own."""
    if not path.exists():
        run_script(__file__, "--completions", folder, path, *flags)
    return read_answers(path)


def write_completions(model_folder: str, path: str, *flags) -> None:
    """One completion of each question that train.py holds out with these flags, under each principle."""
    config = parse([*map(str, flags), "--model", model_folder])
    model, tokenizer = load(config)
    data = load_data(model, tokenizer, config)
    rows = []
    for number, question in enumerate(tqdm(data.held_out, "following")):  # one at a time: its prompts share it
        task = Task(question, data.principles, f"{config.seed} following {number}")
        rows += answers_of(sample(model, tokenizer, data.template, [task], 1, config))[0]
    write_lines(Path(path), rows)


# --------------------------------------------------------------------------------------------------
# TruthfulQA


SCORES = {  # kind of task -> its scores, the names of lm-eval
    "truthfulqa": {"mc1": ("mc1", "acc"), "mc2": ("mc2", "acc")},
    "generation": {name: ("gen", name) for name in ("bleu_acc", "rouge1_acc", "rougeL_acc", "bleu_diff")},
}


def truthfulqa(model_folder: Path, rows: Path, limit: int | None, kind: str = "truthfulqa") -> dict:
    """{"mc1": [share, standard error], "mc2": …} by the prompt, tasks and scoring of lm-eval.

    Of a kind `generation`: whether a written answer is nearer to a true or to a false one, `bleu_acc`
    and so on, and by how much, `bleu_diff`.
    """
    import lm_eval
    from lm_eval.api.model import LM

    class Scorer(LM):
        """What lm-eval asks of a model: log-likelihoods, a prompt read once for all its answers; and answers."""

        def loglikelihood(self, requests):
            return log_likelihoods(model_folder, [request.args for request in requests])

        def generate_until(self, requests):
            return written_answers(model_folder, [request.args[0] for request in requests])

        loglikelihood_rolling = None  # never asked for

    Scorer.__abstractmethods__ = frozenset()
    tasks = rows.parent / "lm-eval"
    tasks.mkdir(exist_ok=True)
    library = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    names = list(dict.fromkeys(task for task, _ in SCORES[kind].values()))
    data = rows.resolve()
    if kind == "generation":
        data = tasks.resolve() / "answers.jsonl"
        write_lines(data, map(with_answers, read_lines(rows)))
    for name in names:
        (tasks / f"{name}.yaml").write_text(
            f"include: {library / f'truthfulqa_{name}.yaml'}\ntask: half_{name}\ntag: null\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    validation: {data}\n"
        )
    results = lm_eval.simple_evaluate(
        model=Scorer(), tasks=[f"half_{name}" for name in names], limit=limit,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]
    return {
        name: [float(results[f"half_{task}"][f"{value}{error},none"]) for error in ("", "_stderr")]
        for name, (task, value) in SCORES[kind].items()
    }


def with_answers(row: dict) -> dict:
    """A question of `test` with the true and the false answers that a written one is compared with."""
    both = list(zip(row["mc2_targets"]["choices"], row["mc2_targets"]["labels"]))
    true, false = ([answer for answer, label in both if label == wanted] for wanted in (1, 0))
    return {"question": row["question"], "correct_answers": true, "incorrect_answers": false}


@torch.no_grad()
def written_answers(model_folder: Path, contexts: list[str]) -> list[str]:
    """The model's likeliest answer to each context, through the end of its paragraph."""
    model, tokenizer = load_model(str(model_folder), torch.device("cpu"))
    answers = []
    for start in tqdm(range(0, len(contexts), 32), "TruthfulQA"):
        prompts = tokenizer(contexts[start : start + 32], add_special_tokens=False)["input_ids"]
        names = [f"answer {start + n}" for n in range(len(prompts))]
        _, texts = write(model, tokenizer, prompts, names, 1, MAX_ANSWER, 0.01)  # so low a temperature is greedy
        answers += [text.split("\n\n")[0] for (text,) in texts]
    return answers


def own_folder(args, name: str) -> Path:
    """Where the results of a run, or of the "start", are kept: they go when it goes."""
    folder = args.output_dir / name
    folder.mkdir(exist_ok=True)
    return folder


def result_file(args, name: str, what: str) -> Path:
    """Where a result that depends on --limit is kept."""
    return own_folder(args, name) / f"{what}-{args.limit or 'all'}.json"


def score(args, folder: Path, name: str, kind: str = "truthfulqa") -> dict:
    """truthfulqa() of the model in `folder`, by a process of its own unless its result is there already."""
    path = result_file(args, name, kind)
    if not path.exists():
        run_script(__file__, "--truthfulqa", kind, folder, args.questions["test"], args.limit or 0, path)
    return json.loads(path.read_text())


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
        tokens = torch.zeros(shape, dtype=torch.long, device=model.device)  # [P, N, T]
        mask = torch.zeros(shape, dtype=torch.bool, device=model.device)  # [P, N, T]
        for p, rows in enumerate(answers):
            for n, ids in enumerate(rows):
                tokens[p, n, : len(ids)], mask[p, n, : len(ids)] = torch.tensor(ids), True
        sums = completion_logp(model, prompts, tokens, mask, 1.0).sum(-1)  # [P, N]
        for p, context in enumerate(some):
            found |= {(context, answer): sums[p, n].item() for n, answer in enumerate(by_context[context])}
    return [(found[pair], False) for pair in pairs]


# --------------------------------------------------------------------------------------------------
# Arms, tables, plot, command line


def flags_of(args, seed: int, *more, dataset: str = "all") -> list:
    """The flags of train.py that all arms share; later ones win, those of the command line last."""
    files = "--principles", PRINCIPLES, "--dataset", args.questions[dataset], "--seed", seed
    return [*files, *PROMPT, *RECIPE, *more, *args.extra]


def answers(args, name: str, seed: int, when: str = "end") -> list[dict]:
    return read_answers(args.output_dir / f"{name}-{seed}" / f"answers-{when}.jsonl")


def run_arm(name: str, seed: int, args, flags) -> dict:
    """{"start": measures, "end": measures} of one arm on one seed, trained where that is not done."""
    run = args.output_dir / f"{name}-{seed}"
    flags = flags_of(args, seed, *flags)
    evals = run_training(run, *flags, "--model", args.model, script=reading.script())
    found = {}
    for when, folder in (("start", args.model), ("end", run / "final")):
        row = {column: evals[when][key]["mean"] for column, key in FIGURES.items() if key in evals[when]}
        row["follows"], row["follows_error"] = following(answers(args, name, seed, when))
        for key, (share, error) in score(args, folder, "start" if when == "start" else run.name).items():
            row |= {key: share, f"{key}_error": error}
        found[when] = row
    found["end"]["minutes"] = training_minutes(run)
    return found


def run_arms(args, arms: dict, seeds) -> dict:
    """arm -> {seed: measures}; "start" is what the first arm began from."""
    first = next(iter(arms))
    score(args, args.model, "start")  # once, not by two arms at a time
    jobs = [(name, seed) for seed in seeds for name in arms]
    found = side_by_side(lambda name, seed: run_arm(name, seed, args, arms[name]), jobs, args.jobs)
    starts = {seed: found[first, seed]["start"] for seed in seeds}
    return {"start": starts} | {name: {seed: found[name, seed]["end"] for seed in seeds} for name in arms}


def digits(column: str) -> int:
    return 0 if column == "minutes" else 3 if column.startswith("mc") else 2


def table(results: dict) -> str:
    """Means over seeds, ± half the 95% interval over seeds."""
    rows = [
        [name, *(interval_cell([row[c] for row in by_seed.values() if c in row], digits(c)) for c in COLUMNS)]
        for name, by_seed in results.items()
    ]
    return markdown(["", *COLUMNS], rows)


def table_by_seed(results: dict) -> str:
    """Each arm on each seed, "its start → its end"; ± the standard error over questions of the end."""
    def cell(start, end, column):
        if column not in end:
            return ""
        error = f" ± {end[f'{column}_error']:.{digits(column)}f}" if f"{column}_error" in end else ""
        values = [round(row[column], digits(column)) + 0.0 for row in (start, end) if column in row]  # + 0.0: no -0.00
        return " → ".join(f"{value:.{digits(column)}f}" for value in values) + error

    rows = [
        [name, seed, *(cell(results["start"][seed], row, column) for column in COLUMNS)]
        for name, by_seed in results.items() if name != "start" for seed, row in by_seed.items()
    ]
    return markdown(["", "seed", *COLUMNS], rows)


def gains(args, names, seeds) -> str:
    """Following of each arm less the start's and less that of the arms before it, ± standard error over questions."""
    rows = []
    for (place, name), seed in itertools.product(enumerate(names), seeds):
        others = [answers(args, name, seed, "start"), *(answers(args, other, seed) for other in names[:place])]
        cells = ["{:+.2f} ± {:.2f}".format(*following(answers(args, name, seed), other)) for other in others]
        rows.append([name, seed, *cells, *[""] * (len(names) - len(cells))])
    return markdown(["follows", "seed", "− start", *(f"− {name}" for name in names[:-1])], rows)


def shares(args, names, seeds) -> str:
    """Following of each principle, all seeds together, at the start and after each arm."""
    pooled = {"start": [row for seed in seeds for row in answers(args, names[0], seed, "start")]}
    pooled |= {name: [row for seed in seeds for row in answers(args, name, seed)] for name in names}
    return by_principle([principle.text for principle in load_principles(PRINCIPLES)], pooled)


def ten_completions(args, runs: dict[str, str]) -> str:
    """The first ten completions to sums, unselected, cut at 170 characters, of the start and of runs: title -> name."""
    first = args.output_dir / next(iter(runs.values()))
    files = {"start": first / "answers-start.jsonl"}
    files |= {title: args.output_dir / run / "answers-end.jsonl" for title, run in runs.items()}
    sums = {row["question"].strip() for row in read_lines(args.questions["all"]) if "answer" in row}

    def cell(text):
        return "`" + (text if len(text) <= 170 else text[:169] + "…").replace("\n", " ").replace("|", "\\|") + "`"

    answers = [[row for row in read_lines(path) if row["question"] in sums][:10] for path in files.values()]
    return markdown(
        ["principle", *files], [[row[0]["principle"], *(cell(one["text"]) for one in row)] for row in zip(*answers)]
    )


def plot(pyplot, results: dict):
    columns = [column for column in COLUMNS if column not in ("minutes", "accuracy", "mc1")]
    figure, axes = pyplot.subplots(2, len(columns) // 2, figsize=(10, 5), layout="constrained")
    for axis, column in zip(axes.flat, columns, strict=True):
        for place, by_seed in enumerate(results.values()):
            rows = [row for row in by_seed.values() if column in row]
            values = [row[column] for row in rows]
            error = statistics.mean(row[f"{column}_error"] for row in rows) if f"{column}_error" in rows[0] else None
            axis.bar(place, statistics.mean(values), 0.7, yerr=error, color=f"C{place}", alpha=0.5, capsize=4)
            axis.plot([place] * len(values), values, "k.", ms=4)
        axis.set_xticks(range(len(results)), list(results), fontsize=8)
        axis.set(title=column)
    return figure


def make_parser(doc: str, name: str, seeds=SEEDS) -> argparse.ArgumentParser:
    """The flags of the experiments on a real model; results go to runs/<name> by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / name)
    parser.add_argument("--model", type=Path, help="a folder; else SmolLM2, made by experiments/smollm2.py")
    parser.add_argument("--data", type=Path, help=f"folder with {' and '.join(FILES.values())}; else the hub's")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--limit", type=int, help="questions of TruthfulQA; all of its half if not given")
    return parser


def settings(parser: argparse.ArgumentParser):
    """The command line: the folder of the model and the questions' files are there, what is left is `extra`."""
    args, args.extra = parser.parse_known_args()
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.model = (args.model or smollm2.make(smollm2.default_folder())).resolve()
    args.questions = write_questions(args.output_dir, args.data)
    return args


def main() -> None:
    if sys.argv[1:2] == ["--completions"]:  # these two in processes of their own, on one thread
        return write_completions(*sys.argv[2:])
    if sys.argv[1:2] == ["--truthfulqa"]:
        kind, folder, rows, limit, path = sys.argv[2:]
        return write_lines(Path(path), [truthfulqa(Path(folder), Path(rows), int(limit) or None, kind)])
    parser = make_parser(__doc__, "real")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = settings(parser)
    results = run_arms(args, {name: ARMS[name] for name in args.arms}, args.seeds)
    (args.output_dir / "real.json").write_text(json.dumps(results, indent=1) + "\n")
    runs = {name: f"{name}-{args.seeds[0]}" for name in args.arms}
    print(table(results), table_by_seed(results), sep="\n\n", end="\n\n")
    print(*(part(args, args.arms, args.seeds) for part in (gains, shares)), ten_completions(args, runs), sep="\n\n")
    write_plot(args.output_dir / "real.json", lambda pyplot: plot(pyplot, results))


if __name__ == "__main__":
    main()
