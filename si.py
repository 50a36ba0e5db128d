"""python si.py: how well each principle is told apart by what the model writes under it.

    python si.py --principles principles/reasoning.txt                      # best principle first
    python si.py --principles FILE --propose 4 --select 4 --out best.jsonl  # create some, keep four

For use before training. The model writes a chain of thought (CoT) to every question under every
principle, and each is scored under all principles; metrics.py has the estimators. In order:
settings, sampling and scoring, figures, selection, new principles, the command, the report.
"""

import functools
import itertools
import math
import random
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import metrics
from grpo import TAGS, format_reward
from support import answers, sampling, tiny
from support.answers import answer_is_right, cot_mask
from support.command import check_written_files, load_named, run_command
from support.data import make_template, pick_questions
from support.errors import InputError
from support.files import Principle, load_principles, save_principles, write_numbers
from support.prompts import build_messages, encode_after, encode_prompts, eos_ids, prompt_limit
from support.report import _heat_map, print_si, write_plot
from support.sampling import uniform_numbers
from support.scoring import hidden_states, log_probs
from support.settings import MAX_SEED, DatasetConfig, check_bounds, option

MAX_SCORED_ALL = 16  # principles; of more, each CoT meets MAX_SCORED_ALL - 1 sampled others
SAMPLED_ROWS = 128  # completions sampled together
HIDDEN_ELEMENTS = 2**24  # of the hidden states of the completions that are scored together: 64 MB
# --------------------------------------------------------------------------------------------------
# Settings, and what `si.py` and `geometry.py` share


@dataclass
class SiConfig(DatasetConfig):
    """Measure, select and create principles, before training."""

    principles: str = field(metadata={"help": "file of principles: .txt (one a line) or .jsonl"})
    model: str = option("tiny", "the embedded model, a folder, or a Hugging Face hub id")
    num_questions: int = option(128, "questions, drawn from --dataset; all of them where it has fewer", at_least=2)
    select: int | None = option(None, "how many principles to choose: those with the highest SI as a set", at_least=2)
    propose: int | None = option(None, "how many new principles to create and measure with the others", at_least=1)
    num_negatives: int | None = option(
        None, "other principles that a chain of thought is scored under, drawn anew for each question; "
        "default: all of up to 15, else 15", at_least=1,
    )
    out: str | None = option(None, ".jsonl of the selected principles (without --select: of all, best first)")
    json: str | None = option(None, "file of all numbers; the heat map of confusions goes beside it, as .png")
    max_completion_length: int = option(64, "tokens; longer completions are cut and count as badly formed", at_least=1)
    temperature: float = option(1.0, "of sampling, and of every log-probability: that of the training to come", above=0)
    seed: int = option(0, "of everything random", at_least=0, at_most=MAX_SEED)

    def check(self) -> None:
        """Raises InputError for the first value that cannot be used."""
        check_bounds(self)
        check_written_files(self, out=".jsonl", json=".json")


# --------------------------------------------------------------------------------------------------
# Sampling and scoring


class Chain(NamedTuple):
    """A sampled completion, cut for scoring."""

    text: str  # the whole completion but its end token
    whole: list[int]  # its tokens
    ids: list[int]  # its CoT: through </reasoning>; where that never comes, all, an end token too
    context: list[int]  # ids without the end token: what an answer can follow
    closed: bool  # whether </reasoning> came
    truncated: bool  # whether no end token came within --max-completion-length


@torch.no_grad()
def sample_chains(model, tokenizer, template, prompts, config) -> list[list[Chain]]:
    """A completion of each prompt, no top-k or top-p: N lists of K prompts -> N lists of K."""
    num, eos, chains = len(prompts[0]), eos_ids(model, tokenizer), []
    flat = [prompt for row in prompts for prompt in row]
    for start in tqdm(range(0, len(flat), SAMPLED_ROWS), desc="sampling", dynamic_ncols=True):
        block = flat[start : start + SAMPLED_ROWS]
        keys = [f"{config.seed} chain {n}" for n in range(start, start + len(block))]
        uniform = uniform_numbers(keys, 1, config.max_completion_length, device=model.device)  # [P, 1, T]
        out = sampling.sample(model, block, uniform, config.temperature, eos, tokenizer.pad_token_id)
        spans = cot_mask(tokenizer, out.tokens, out.mask).sum(-1)  # [P, 1]
        texts = answers.decode(tokenizer, out.tokens[:, 0], out.mask[:, 0], eos, template.prefill)  # P
        for n, text in enumerate(texts):
            whole, ids = out.tokens[n, 0][out.mask[n, 0]].tolist(), out.tokens[n, 0, : spans[n, 0]].tolist()
            closed = "</reasoning>" in text
            ended = not closed and ids[-1] in eos
            chains.append(Chain(text, whole, ids, ids[:-1] if ended else ids, closed, bool(out.truncated[n, 0])))
    return [chains[i : i + num] for i in range(0, len(chains), num)]


def draw_candidates(num: int, num_questions: int, num_negatives: int, seed: int):
    """Which CoTs prompt j scores: [N, K, C], its own and those of C - 1 = num_negatives others.

    The principles stand in a ring, in random order, anew for each question. A CoT is scored under
    its own and the next C - 1, which are drawn uniformly; every prompt scores C CoTs. log C - row
    InfoNCE is then I(C; CoT | x, random subset), a lower bound of that in the whole pool.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    ring = torch.rand(num_questions, num, generator=generator).argsort(-1)  # [N, K] the principle at each place
    offsets = torch.arange(num)[:, None] - torch.arange(num_negatives + 1)  # [K, C] places of its writers
    return ring[:, offsets % num].take_along_dim(ring.argsort(-1)[..., None], 1)  # [N, K, C] by principle


@torch.no_grad()
def score_chains(model, tokenizer, prompts, chains, written_by, temperature, answers=None, title="scoring"):
    """Every CoT under its candidate principles, and the right answer after it.

    prompts, chains: N lists of K; written_by [N, K, C]: see draw_candidates; answers: N strings or
    None. Returns two tables [N, K, K] on the CPU, in nats, from one pass:

        scores[n, i, j]        log-probability of CoT i under principle j; -inf where not scored
        answer_logp[n, j, i]   log-probability of "{answer}</answer>" after prompt j, CoT i and
                               "<answer>", with </reasoning> before it where the CoT has none;
                               NaN where not scored or no answer is known
    """
    num_questions, num, per_prompt = written_by.shape
    answers = answers or [None] * num_questions
    longest = max(len(chain.ids) for row in chains for chain in row) + 16  # about
    elements = num * per_prompt * longest * model.get_output_embeddings().weight.shape[1]
    size = max(1, HIDDEN_ELEMENTS // elements)  # questions at a time
    scores = torch.full((num_questions, num, num), -math.inf)  # [N, i, j]
    answer_logp = torch.full((num_questions, num, num), math.nan)  # [N, j, i]
    for start in tqdm(range(0, num_questions, size), desc=title, dynamic_ncols=True):
        part = slice(start, start + size)
        rows = [_score_row(c, answer, tokenizer) for row, answer in zip(chains[part], answers[part]) for c in row]
        padded = [pad_sequence([*map(torch.tensor, column)], batch_first=True) for column in zip(*rows)]  # [Q·K, T]
        index = written_by[part]  # [Q, K, C]
        where = (torch.arange(len(index))[:, None, None] * num + index).flatten(0, 1)  # [Q·K, C] rows by prompt
        inputs, targets, kinds = (t[where].to(model.device) for t in padded)  # [Q·K, C, T] each
        flat = [prompt for row in prompts[part] for prompt in row]  # Q·K
        hidden = hidden_states(model, flat, inputs, kinds > 0)  # [Q·K, C, T, d]
        logp = log_probs(model, hidden, targets, kinds > CONTEXT, temperature)  # [Q·K, C, T]
        cot, answer = ((logp * (kinds == k)).sum(-1).float().cpu().view_as(index) for k in (COT, ANSWER))  # [Q, K, C]
        scores[part].scatter_(1, index.mT, cot.mT)
        answer_logp[part].scatter_(2, index, answer)
    answer_logp[torch.tensor([answer is None for answer in answers])] = math.nan
    return scores, answer_logp


CONTEXT, COT, ANSWER = 1, 2, 3  # a token that is only read; one that counts for the CoT, for the answer


def _score_row(chain: Chain, answer: str | None, tokenizer):
    """(inputs, targets, kinds) of one chain and the answer after it, lists of one length T.

    Targets differ from inputs in one place: an end token that the model wrote counts in the CoT's
    probability, and in its place the model reads on.
    """
    if answer is None:
        return chain.ids, chain.ids, [COT] * len(chain.ids)
    thought, closing, _ = chain.text.partition("</reasoning>")
    bridge = "<answer>" if chain.closed else "</reasoning><answer>"
    context = thought + closing or "\n"  # at the beginning of a text many tokenizers write a space
    only_bridge = encode_after(tokenizer, context, bridge)
    more = encode_after(tokenizer, context, f"{bridge}{answer}</answer>")
    # A token that spans the end of the bridge, such as ">(", counts for the answer.
    read = next((t for t, pair in enumerate(zip(only_bridge, more)) if pair[0] != pair[1]), len(only_bridge))
    inputs = chain.context + more
    targets = chain.ids + inputs[len(chain.ids) :]
    kinds = [COT] * len(chain.ids) + [CONTEXT] * (len(inputs) - len(chain.ids) - len(more) + read)
    return inputs, targets, kinds + [ANSWER] * (len(inputs) - len(kinds))


# --------------------------------------------------------------------------------------------------
# Figures


def estimate_si(model, tokenizer, template, principles, questions, config, sources) -> tuple[dict, torch.Tensor]:
    """(all numbers of the report, scores [N, K', K'] of all pairs in its "pool")."""
    num, answers = len(principles), [q.answer for q in questions]
    negatives = config.num_negatives or min(num, MAX_SCORED_ALL) - 1
    if negatives >= num:
        raise InputError(f"--num-negatives: got {negatives}, of {num} principles; 1 to {num - 1} is accepted")
    ends = [tiny.encode(tokenizer, f"</reasoning><answer>{a}</answer>") for a in answers if a is not None]
    limit = prompt_limit(model, config.max_completion_length + max(map(len, ends), default=0))
    opposed = [i for i, p in enumerate(principles) if p.negative is not None]
    prompts, opposites = (  # N lists of K, of K'
        [template.encode(tokenizer, [(q.text, text) for text in texts], limit) for q in questions]
        for texts in ([p.text for p in principles], [principles[i].negative for i in opposed])
    )
    rows, read = len(questions) * num, sum(len(prompt) for row in prompts for prompt in row)
    print(f"{len(questions)} questions x {num} principles: {rows} chains of thought to sample, "
          f"{rows * (negatives + 1)} sequences to score; through the model go 2 x {read} tokens of prompts and at most "
          f"{rows * (negatives + 2) * config.max_completion_length} of completions", flush=True)
    score = functools.partial(score_chains, model, tokenizer, temperature=config.temperature)
    chains = sample_chains(model, tokenizer, template, prompts, config)
    written_by = draw_candidates(num, len(questions), negatives, config.seed)  # [N, K, C]
    scores, answer_logp = score(prompts, chains, written_by, answers=answers)  # [N, K, K] both
    summary = summarise_si(principles, sources, questions, chains, scores, answer_logp, negatives + 1)
    if opposed:
        only_own = torch.arange(len(opposed))[None, :, None].expand(len(questions), -1, -1)  # [N, K', 1]
        their_chains = [[row[i] for i in opposed] for row in chains]
        under, _ = score(opposites, their_chains, only_own, title="negatives")  # [N, K', K']
        own = scores.diagonal(dim1=1, dim2=2)[:, opposed]  # [N, K']
        summary["negatives"] = compare_negatives([principles[i] for i in opposed], own, under.diagonal(dim1=1, dim2=2))

    summary["pool"] = pool = list(range(num))
    if config.select and negatives + 1 < num:  # a selection needs every pair: complete the table of the best
        ranked = [p["index"] for p in summary["principles"]]
        summary["pool"] = pool = sorted(ranked[: max(MAX_SCORED_ALL, 2 * config.select)])
        pairs = draw_candidates(len(pool), len(questions), len(pool) - 1, config.seed)  # [N, K', K']
        of_pool = ([[row[i] for i in pool] for row in table] for table in (prompts, chains))
        scores, _ = score(*of_pool, pairs, title="the best under each other")  # [N, K', K']
    return summary, scores


def summarise_si(principles, sources, questions, chains, scores, answer_logp, num_candidates: int) -> dict:
    """All figures of the report, best principle first; intervals are 95%, over questions."""
    tables = make_tables(questions, chains, scores, answer_logp, num_candidates)
    mistaken, reached = metrics.confusion(scores), metrics.reach(scores, num_candidates)  # [K, K], [K]
    likeliest = mistaken.masked_fill(torch.eye(len(principles), dtype=torch.bool), -1).max(-1)  # [K] both
    rows = [
        {
            "id": principle.id, "text": principle.text, "source": sources[i], "index": i, "reach": reached[i].item(),
            **summarise_tables({name: table[:, i] for name, table in tables.items()}, num_candidates),
            "mistaken_for": principles[likeliest.indices[i]].id, "mistaken_share": likeliest.values[i].item(),
        }
        for i, principle in enumerate(principles)
    ]
    rows.sort(key=lambda row: -row["mi"]["mean"])
    for row, following in itertools.pairwise(rows):
        row["overlaps_next"] = row["si"]["low"] <= following["si"]["high"]
    together = summarise_tables({name: table.mean(1) for name, table in tables.items()}, num_candidates)
    scored, lengths = scores.isfinite(), tables["cot_length"]  # [N, K, K], [N, K]
    return {
        "questions": len(questions), "chains": lengths.numel(), "cot_tokens": int(lengths.sum()),
        "truncated": sum(c.truncated for row in chains for c in row) / lengths.numel(),
        "candidates": num_candidates, "ceiling": math.log(num_candidates), "chance": 1 / num_candidates,
        "set": {"reach": reached.mean().item(), **together},
        "principles": rows, "ids": [p.id for p in principles], "confusion": mistaken.tolist(),
        "mean_scores": (scores.where(scored, 0).sum(0) / scored.sum(0).clamp(min=1)).tolist(),
    }


def make_tables(questions, chains, scores, answer_logp, num_candidates: int) -> dict:
    """Figures by question and principle [N, K]; with A > 0 answers accuracy, answer_gain [A, K]."""
    own = torch.arange(scores.shape[-1])  # [K]

    def table(value_of):
        return torch.tensor([[value_of(chain) for chain in row] for row in chains], dtype=torch.double)  # [N, K]

    tables = {
        "information": metrics.information(scores, "posterior", num_candidates),
        "mi_row": metrics.information(scores, "row", num_candidates),
        "mi_column": metrics.column_information(scores, num_candidates),
        "retrieval": (scores.argmax(-1) == own).double(),
        "format": table(lambda chain: 0.0 if chain.truncated else format_reward(chain.text)),  # as training rewards
        "closed": table(lambda chain: chain.closed),
        "cot_length": table(lambda chain: len(chain.ids)),
    }
    if answered := [n for n, q in enumerate(questions) if q.answer is not None]:
        right = [[answer_is_right(c.text, questions[n].answer) for c in chains[n]] for n in answered]
        tables["accuracy"] = torch.tensor(right, dtype=torch.double)  # [A, K]
        tables["answer_gain"] = answer_gain(answer_logp[answered])  # [A, K]
    return tables


def summarise_tables(values: dict, num_candidates: int) -> dict:
    """The figures of one principle, or of the set, from the values [N] of its questions."""
    nats = values["information"]  # [N]
    figures = {"si": metrics.sufficiency_interval(nats, num_candidates), "mi": metrics.interval(nats)}
    for name, value in values.items():
        if name != "information":
            figures[name] = metrics.interval(value) if name == "answer_gain" else value.mean().item()
    return figures


def answer_gain(answer_logp):
    """Nats that a principle's own CoT adds to the right answer: [N, K prompts, K CoTs] -> [N, K].

    log p(answer | prompt i, CoT i) - mean over j != i of log p(answer | prompt i, CoT j): only the
    CoT changes. Above 0, what is written under this principle helps more than what is written under
    others. NaN entries (not scored) are left out.
    """
    own = answer_logp.diagonal(dim1=-2, dim2=-1)  # [N, K]
    off = ~torch.eye(answer_logp.shape[-1], dtype=torch.bool)  # [K, K]
    return own - answer_logp.where(off, math.nan).nanmean(-1)  # [N, K]


def compare_negatives(principles, own, under_negative) -> list[dict]:
    """How far each principle c is from its opposite, from log-probabilities [N, K'] under either.

    KL(p(. | c) || half p(. | c) + half p(. | opposite)), at most log 2, and no bound on any mutual
    information: all CoTs were written under c, none under the opposite.
    """
    nats = math.log(2) - F.softplus(under_negative - own)  # [N, K']
    return [
        {"id": p.id, "negative": p.negative, "nats": metrics.interval(nats[:, i]),
         "si_opposite": metrics.sufficiency_interval(nats[:, i], 2),
         "retrieval": (own[:, i] > under_negative[:, i]).double().mean().item()}
        for i, p in enumerate(principles)
    ]


def summarise_selection(scores, pool, principles, size: int) -> dict:
    """The best subset of the pool, its SI, and two figures to compare that with.

    On the questions it was chosen on, the SI of the best of many subsets is too high. Not so
    `si_other_half`: chosen on one half of the questions, measured on the other, mean of both ways.
    """
    def si_of(some_scores, subsets):
        nats = metrics.subset_information(some_scores, torch.tensor(subsets))  # [N, B]
        return metrics.sufficiency(nats.mean().item(), size)

    chosen, halves = metrics.select_subset(scores, size), (scores[::2], scores[1::2])
    other_half = [si_of(halves[1 - n], [metrics.select_subset(half, size)]) for n, half in enumerate(halves)]
    nats = metrics.subset_information(scores, torch.tensor([chosen]))[:, 0]  # [N]
    rng = random.Random(0)
    return {
        "ids": [principles[pool[i]].id for i in chosen],
        "indices": [pool[i] for i in chosen],
        "si": metrics.sufficiency_interval(nats, size),
        "si_other_half": sum(other_half) / 2,
        "si_random_subset": si_of(scores, [rng.sample(range(len(pool)), size) for _ in range(200)]),
    }


# --------------------------------------------------------------------------------------------------
# New principles: the model rewrites and joins the given ones; or their texts are joined

REPEAT = "Repeat this sentence and write nothing else: {}"
REWRITE = (
    "This is a principle for how to reason: {}\nWrite a different principle with the same purpose, more concrete, as "
    "one short instruction. Write that sentence and nothing else."
)
COMBINE = (
    "These are two principles for how to reason:\n- {}\n- {}\nWrite one new principle that joins the best of both, as "
    "one short instruction. Write that sentence and nothing else."
)
MAX_WORDS = 40  # of a created principle
ROUNDS = 4  # of sampling, before what is missing is joined from the texts


def propose(model, tokenizer, principles, num: int, config) -> list[tuple[Principle, str]]:
    """Up to `num` new principles, each with where it came from; all differ in letters or digits.

    The model writes them if it can repeat half of the given ones when asked to. Where it cannot, or
    too few of its texts are usable, two given texts are joined with "and". Fewer than `num` come
    where no more pairs exist.
    """
    rng = random.Random(f"{config.seed} propose")
    known, ids, found = {_essence(p.text) for p in principles}, {p.id for p in principles}, []
    candidates = itertools.chain(
        written_principles(model, tokenizer, principles, num, config, rng), joined_principles(principles, rng)
    )
    for name, text, source in candidates:
        if _essence(text) in known:
            continue
        while name in ids:
            name += "'"
        known.add(_essence(text))
        ids.add(name)
        found.append((Principle(name, text), source))
        if len(found) == num:
            break
    return found


def written_principles(model, tokenizer, principles, num: int, config, rng):
    """Yields (id, text, source) of usable texts of the model; none if it cannot even repeat."""
    repeated = _ask(model, tokenizer, [REPEAT.format(p.text) for p in principles], 0.01, f"{config.seed} repeat")
    if sum(_essence(a) == _essence(p.text) for a, p in zip(repeated, principles)) * 2 < len(principles):
        return
    for turn in range(ROUNDS):
        requests = [  # id, source, text of the request
            (f"{p.id}*", f"{p.id} rewritten by {config.model}", REWRITE.format(p.text))
            for p in rng.choices(principles, k=num)
        ] + [
            (f"{a.id}*{b.id}", f"{a.id} and {b.id} combined by {config.model}", COMBINE.format(a.text, b.text))
            for a, b in (rng.sample(principles, 2) for _ in range(num))
        ]
        texts = _ask(model, tokenizer, [request for *_, request in requests], 1.0, f"{config.seed} round {turn}")
        written = list(zip(requests, texts))
        rng.shuffle(written)
        yield from ((name, text, source) for (name, source, _), text in written if _is_usable(tokenizer, text))


def joined_principles(principles, rng):
    """Yields (id, text, source) of pairs of the given texts, joined, in random order."""
    pairs = list(itertools.combinations(principles, 2))
    rng.shuffle(pairs)
    for a, b in pairs:
        second = b.text if b.text[1:2].isupper() else b.text[:1].lower() + b.text[1:]  # "SI units" keeps its capitals
        text = f"{a.text.rstrip(' .!;')} and {second}"
        if len(text.split()) <= MAX_WORDS:
            yield f"{a.id}+{b.id}", text, f"{a.id} and {b.id} joined by their texts"


@torch.no_grad()
def _ask(model, tokenizer, requests: list[str], temperature: float, key: str) -> list[str]:
    """The first line of the model's reply to each request, without bullets and quotes."""
    conversations = [[{"role": "user", "content": request}] for request in requests]
    prompts = encode_prompts(tokenizer, conversations, prompt_limit(model, 80))
    keys, eos = [f"{key} {n}" for n in range(len(prompts))], eos_ids(model, tokenizer)
    uniform = uniform_numbers(keys, 1, 80, device=model.device)  # [P, 1, T]
    out = sampling.sample(model, prompts, uniform, temperature, eos, tokenizer.pad_token_id)
    texts = answers.decode(tokenizer, out.tokens[:, 0], out.mask[:, 0], eos)
    lines = [(text.strip().splitlines() or [""])[0] for text in texts]
    return [re.sub(r"^[\s\-*•\d.)\"“']+|[\s\"”'*]+$", "", line) for line in lines]


def _is_usable(tokenizer, text: str) -> bool:
    """Whether it is a whole sentence of 3 to MAX_WORDS words, without tags and control tokens."""
    if not (3 <= len(text.split()) <= MAX_WORDS and text[-1] in ".!" and text.isprintable()):
        return False
    try:
        return not any(tag in text for tag in TAGS) and bool(encode_prompts(tokenizer, [build_messages("?", text)]))
    except InputError:  # a control token of the tokenizer
        return False


def _essence(text: str) -> str:
    """Letters and digits without case: what has to differ between two principles."""
    return " ".join(re.findall(r"\w+", text.casefold()))


# --------------------------------------------------------------------------------------------------
# The command


def run_si(config: SiConfig) -> None:
    """Everything that `python si.py` does, the files first, then the report, then the plot."""
    principles = load_principles(config.principles)
    model, tokenizer = load_named("--model", config.model)
    template = make_template(config)
    print(template.describe())
    texts = [text for p in principles for text in (p.text, p.negative) if text]
    questions = pick_questions(model, tokenizer, texts, template, config)
    sources = [config.principles] * len(principles)
    if config.propose:
        found = propose(model, tokenizer, principles, config.propose, config)
        print(f"{len(found)} of {config.propose} new principles were found")
        for principle, source in found:
            principles, sources = [*principles, principle], [*sources, source]
            print(f"proposed {principle.id}: {principle.text} ({source})")
    num = len(principles)
    if config.select and config.select > num:
        raise InputError(f"--select: got {config.select}, of {num} principles; 2 to {num} is accepted")
    summary, scores = estimate_si(model, tokenizer, template, principles, questions, config, sources)
    chosen = [row["index"] for row in summary["principles"]]
    if config.select:
        summary["selection"] = summarise_selection(scores, summary["pool"], principles, config.select)
        chosen = summary["selection"]["indices"]
    if config.json:
        write_numbers(config.json, {"command": "si", "settings": asdict(config), **summary})
    if config.out:
        save_principles(config.out, [principles[i] for i in chosen])
    print_si(summary, config)
    if config.json:
        print(f"{config.json}: all numbers")
    if config.out:
        print(f"{config.out}: {len(chosen)} principles, for `python train.py --principles {config.out}`")
    if config.json and (plot := write_plot(config.json, lambda plt: _heat_map(plt, summary))):
        print(f"{plot}: the plot")


def main(argv=None) -> int:
    return run_command(SiConfig, run_si, __doc__.partition("\n")[0], argv)


# --------------------------------------------------------------------------------------------------
# Its report


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII only
    sys.exit(main())
