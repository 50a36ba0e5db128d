"""What completions on a real model show: the marks of their principles, words; read in each evaluation.

    python experiments/reading.py both FLAGS OF TRAIN.PY     # as train.py, and the completions are read and kept

The mark of a principle is found by the regular expressions below: no loss and no metric of the
training sees them. `row` or `column` in place of `both` trains with that half of the InfoNCE loss.
"""

import hashlib
import itertools
import json
import random
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402

import train  # noqa: E402
from experiments.common import markdown, read_lines, write_lines  # noqa: E402
from infonce import column_info_nce, row_info_nce  # noqa: E402

MIN_WORDS = 4  # of a chain of thought
EVALUATED = (  # settings that the evaluation of a given model depends on
    "model", "principles", "dataset", "seed", "eval_questions", "num_principles", "temperature",
    "max_completion_length", "examples", "prefill", "ot_tokens", "ot_eps", "bf16",
)


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
    "Name a common mistake.": says(  # neither the principle said again nor "There is no common mistake."
        r"(?s)\A(?!.*\bname (of )?a common mistake)(?!.*\b(no|not|neither)\b[^.,;:!?]*\bmistake)"
        r".*\b(mistake|misconception|myth|error)s?\b"
    ),
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
    chain = chain_of(text)
    return len(chain.split()) >= MIN_WORDS and MARKS[principle](chain)


def chain_of(text: str) -> str:
    """The chain of thought of a completion."""
    return text.split("<reasoning>", 1)[-1].split("</reasoning>")[0]


def answers_of(batch) -> list[list[dict]]:
    """The completions of a batch, one of each question under each principle: Q lists of K rows."""
    return [
        [
            {"question": task.question.text, "principle": p.text, "text": text, "follows": follows(p.text, text)}
            for p, (text,) in zip(task.principles, row)
        ] for task, row in zip(batch.tasks, batch.texts)
    ]


def read_answers(path: Path) -> list[dict]:
    """The rows that `answers_of` makes, from a file; `follows` by the marks as they are now."""
    return [row | {"follows": follows(row["principle"], row["text"])} for row in read_lines(path)]


def by_principle(principles: list[str], answers: dict[str, list[dict]]) -> str:
    """A table of the share that follows each principle, a column for each name -> rows."""
    def share(rows, principle):
        return f"{statistics.mean(row['follows'] for row in rows if row['principle'] == principle):.2f}"

    rows = [[principle, *(share(some, principle) for some in answers.values())] for principle in principles]
    return markdown(["principle", *answers], rows)


def following(rows: list[dict], before: list[dict] | None = None) -> tuple[float, float]:
    """(share of completions that follow, its standard error over questions by bootstrap).

    With `before`, answers of another model to the same questions: the difference of the two.
    """
    by_question = {}
    for sign, answers in ((1, rows), (-1, before or [])):
        for row in answers:
            by_question.setdefault(row["question"], []).append(sign * row["follows"])
    signs = 2 if before else 1
    values = [signs * statistics.mean(found) for found in by_question.values()]
    rng = random.Random(0)
    means = [statistics.mean(rng.choices(values, k=len(values))) for _ in range(1000)]
    return statistics.mean(values), statistics.stdev(means)


# --------------------------------------------------------------------------------------------------
# train.py with evaluations that read the completions, too


def text_values(rows: list[dict]) -> dict:
    """What the completions of one question show, one under each principle."""
    chains = [chain_of(row["text"]) for row in rows]
    lengths = [len(chain.split()) for chain in chains]
    return {
        "follows": statistics.mean(row["follows"] for row in rows),
        "words": statistics.mean(lengths),
        "distinct_words": len(set(re.findall(r"[\w'’]+", " ".join(chains).lower()))),  # of all K together
        "short_chains": statistics.mean(length < MIN_WORDS for length in lengths),
    }


def train_reading(part: str, flags) -> int:
    """train.py with text_values among the figures of eval.json; `part` of its InfoNCE loss: both, row, column.

    The completions of the first evaluation stay in answers-start.jsonl, those of the last in answers-end.jsonl.
    """
    sample, evaluate, evaluate_tasks, information_terms = (
        train.sample, train.evaluate, train.evaluate_tasks, train.information_terms
    )
    batches, answers = [], []

    def sample_and_keep(*args):
        batches[:] = [sample(*args)]
        return batches[0]

    def evaluate_tasks_and_read(*args):
        values, example = evaluate_tasks(*args)
        rows = answers_of(batches[0])
        answers.extend(itertools.chain.from_iterable(rows))
        read = [text_values(row) for row in rows]
        return values | {name: torch.tensor([float(value[name]) for value in read]) for name in read[0]}, example

    def evaluate_and_keep(model, reference, tokenizer, data, config):
        start, end = (Path(config.output_dir) / f"answers-{when}.jsonl" for when in ("start", "end"))
        first, known = not start.exists(), start_file(config)
        if first and known.exists():
            stored = json.loads(known.read_text(encoding="utf-8"))
            write_lines(start, stored["answers"])
            return stored["result"]
        answers.clear()
        result = evaluate(model, reference, tokenizer, data, config)
        if first:
            write_lines(known, [{"result": result, "answers": answers}])
        write_lines(start if first else end, answers)
        return result

    def half_of_the_terms(scores, config):
        one_way = {"row": row_info_nce, "column": column_info_nce}[part]
        loss = one_way(scores / config.mi_temperature).mean() / 2  # [] what it is within the symmetric loss
        return information_terms(scores, config) | {"loss_mi": loss}

    train.sample, train.evaluate, train.evaluate_tasks = sample_and_keep, evaluate_and_keep, evaluate_tasks_and_read
    if part != "both":
        train.information_terms = half_of_the_terms
    return train.main(flags)


def start_file(config) -> Path:
    """Where the first evaluation of all runs beside this one is kept that begin alike: they are evaluated once."""
    def content(value):
        path = Path(str(value))
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else value

    what = json.dumps([content(getattr(config, name)) for name in EVALUATED])
    return Path(config.output_dir).parent / f"start-{hashlib.sha256(what.encode()).hexdigest()[:12]}.json"


def script(part: str = "both") -> tuple:
    """The script of train_reading, for common.run_training."""
    return __file__, part


if __name__ == "__main__":
    sys.exit(train_reading(sys.argv[1], sys.argv[2:]))
