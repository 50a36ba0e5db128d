"""python metrics.py si: how well each principle is told apart by what the model writes under it, before any training.

    python metrics.py si --principles principles/reasoning.txt                        # a table, best principle first
    python metrics.py si --principles FILE --propose 4 --select 4 --out best.jsonl     # create some, keep the best four

One chain of thought is sampled under every principle for every question, and scored under all principles; metrics.py
has the estimators. In order: sampling and scoring, figures, selection, new principles, the report.
"""

import itertools
import math
import random
import re
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from commands import (
    cell,
    check_numbers,
    check_written,
    context_limit,
    encoder,
    interval,
    load_named,
    pick_questions,
    write_numbers,
    write_plot,
)
from data import (
    DatasetConfig,
    InputError,
    Principle,
    build_messages,
    check_flags,
    encode_prompts,
    load_principles,
    option,
    save_principles,
)
from grpo import TAGS, format_reward
from infonce import column_info_nce, row_info_nce
from metrics import answer_is_right, confusion, posterior_information, reach, select_subset, subset_information
from policy import cot_mask, eos_ids, hidden_states, log_probs, sample, uniform_numbers

MAX_SCORED_ALL = 16  # principles; of more, each chain of thought meets MAX_SCORED_ALL - 1 sampled others
SAMPLED_ROWS = 128  # completions sampled together
HIDDEN_ELEMENTS = 2**24  # of the hidden states of the completions that are scored together: 64 MB
NEAR_CEILING = 0.95  # a set SI from which more principles, not more questions, would tell more


@dataclass
class SiConfig(DatasetConfig):
    """Measure, select and create principles, before training."""

    principles: str = field(metadata={"help": "file of principles: .txt (one a line) or .jsonl"})
    model: str = option("tiny", "the embedded model, a folder, or a Hugging Face hub id")
    num_questions: int = option(128, "questions, drawn from --dataset; all of them where it has fewer")
    select: int | None = option(None, "find the subset of so many principles with the highest SI of the set")
    propose: int | None = option(None, "create so many new principles, which are measured with the others")
    num_negatives: int | None = option(
        None, "other principles that a chain of thought is scored under, drawn anew for each question; "
        "default: all of up to 15, else 15"
    )
    out: str | None = option(None, ".jsonl of the selected principles (without --select: of all, best first)")
    json: str | None = option(None, "file of all numbers; the heat map of confusions goes beside it, as .png")
    max_completion_length: int = option(64, "tokens; longer completions are cut")
    temperature: float = option(1.0, "of sampling, and of every log-probability: that of the training to come")
    seed: int = option(0, "of everything random")

    def check(self) -> None:
        """Raises InputError for the first value that cannot be."""
        check_flags(self)
        check_numbers(self, num_questions=2, max_completion_length=1, seed=0, select=2, propose=1, num_negatives=1)
        if not 1e-9 <= self.temperature < math.inf:
            raise InputError(f"--temperature: got {self.temperature}; a number above 0 (1e-9 or more) is accepted")
        check_written(self, out=".jsonl", json=".json")


class Chain(NamedTuple):
    """A sampled completion, cut for scoring."""

    text: str  # the whole completion
    whole: list[int]  # its tokens
    ids: list[int]  # its chain of thought: through </reasoning>, all of it (an end token too) where that never comes
    context: list[int]  # ids without the end token: what an answer can follow
    closed: bool  # whether </reasoning> came
    truncated: bool  # whether no end token came within --max-completion-length


@torch.no_grad()
def sample_chains(model, tokenizer, prompts, max_new_tokens, temperature, seed) -> list[list[Chain]]:
    """One completion of every prompt, no top-k and no top-p: N lists of K prompts -> N lists of K chains."""
    num, eos, chains = len(prompts[0]), eos_ids(model, tokenizer), []
    flat = [prompt for row in prompts for prompt in row]
    for start in tqdm(range(0, len(flat), SAMPLED_ROWS), desc="sampling", dynamic_ncols=True):
        some = flat[start : start + SAMPLED_ROWS]
        names = [f"{seed} chain {n}" for n in range(start, start + len(some))]
        uniform = uniform_numbers(names, 1, max_new_tokens, device=model.device)  # [P, 1, T]
        out = sample(model, some, uniform, temperature, eos, tokenizer.pad_token_id)
        spans = cot_mask(tokenizer, out.tokens, out.mask).sum(-1)  # [P, 1]
        for row, mask, span, cut in zip(out.tokens[:, 0], out.mask[:, 0], spans[:, 0].tolist(), out.truncated[:, 0]):
            text, ids = tokenizer.decode(row[mask], skip_special_tokens=True), row[:span].tolist()
            closed = "</reasoning>" in text
            ended = not closed and ids[-1] in eos
            chains.append(Chain(text, row[mask].tolist(), ids, ids[:-1] if ended else ids, closed, bool(cut)))
    return [chains[i : i + num] for i in range(0, len(chains), num)]


def draw_candidates(num: int, num_questions: int, num_negatives: int, seed: int):
    """Which chains of thought prompt j scores: [N, K, C], its own and those of C - 1 = num_negatives others.

    A ring in random order, anew for each question: a chain is scored under its own principle and the next C - 1 in the
    ring. So each has C - 1 others drawn uniformly, and each prompt scores C chains. log C - row InfoNCE is then the
    information within a random subset, I(C; CoT | x, subset): a lower bound of that in the whole pool.
    """
    generator = torch.Generator().manual_seed(seed)
    ring = torch.rand(num_questions, num, generator=generator).argsort(-1)  # [N, K] the principle at each place
    offsets = torch.arange(num)[:, None] - torch.arange(num_negatives + 1)  # [K, C] places of its writers
    return torch.empty(num_questions, num, num_negatives + 1, dtype=torch.long).scatter_(  # [N, K, C]
        1, ring[..., None].expand(-1, -1, num_negatives + 1), ring[:, offsets % num]
    )


@torch.no_grad()
def score_chains(model, tokenizer, prompts, chains, answers, written_by, temperature, title="scoring"):
    """Every chain of thought under its candidate principles, and the right answer after it.

    prompts, chains: N lists of K; answers: N strings or None; written_by [N, K, C]: see draw_candidates. Returns

        scores[n, i, j]        log-probability of chain i under principle j, nats; -inf where not scored
        answer_logp[n, j, i]   log-probability of "{answer}</answer>" after prompt j, chain i and "<answer>"; NaN where
                               not scored or no answer is known. A chain that never closed is closed by </reasoning>

    both [N, K, K] on the CPU. One pass gives both, for the answer follows the chain in the same row.
    """
    num_questions, num, per_prompt = written_by.shape
    encode = encoder(tokenizer)
    longest = max(len(chain.ids) for row in chains for chain in row) + 16  # about
    elements = num * per_prompt * longest * model.get_output_embeddings().weight.shape[1]
    size = max(1, HIDDEN_ELEMENTS // elements)  # questions at a time
    scores = torch.full((num_questions, num, num), -math.inf)  # [N, K, K]
    answer_logp = torch.full((num_questions, num, num), math.nan)  # [N, K, K]
    for start in tqdm(range(0, num_questions, size), desc=title, dynamic_ncols=True):
        part = slice(start, start + size)
        rows = [_score_row(c, a, encode) for row, a in zip(chains[part], answers[part]) for c in row]  # Q·K
        index = written_by[part].to(model.device)  # [Q, K, C]
        first = torch.arange(len(index), device=model.device)[:, None, None] * num  # [Q, 1, 1]
        inputs, targets, kinds = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row[n]) for row in rows], batch_first=True).to(model.device)
            [(first + index).flatten(0, 1)] for n in range(3)
        )  # [Q·K, C, T] each
        hidden = hidden_states(model, [p for row in prompts[part] for p in row], inputs, kinds > 0)  # [Q·K, C, T, d]
        logp = log_probs(model, hidden, targets, kinds > 1, temperature)  # [Q·K, C, T]
        by_chain = torch.empty(len(index), num, num, 2, device=model.device).fill_(math.nan)  # [Q, j, i, 2]
        sums = torch.stack([(logp * (kinds == kind)).sum(-1) for kind in (COT, ANSWER)], -1)  # [Q·K, C, 2]
        by_chain.scatter_(2, index[..., None].expand(-1, -1, -1, 2), sums.reshape(*index.shape, 2).to(by_chain))
        scores[part] = by_chain[..., 0].mT.nan_to_num(-math.inf).cpu()  # [Q, i, j]
        known = torch.tensor([answer is not None for answer in answers[part]])[:, None, None]  # [Q, 1, 1]
        answer_logp[part] = by_chain[..., 1].cpu().where(known, math.nan)  # [Q, j, i]
    return scores, answer_logp


CONTEXT, COT, ANSWER = 1, 2, 3  # a token that is only read; one whose probability counts for the chain, for the answer


def _score_row(chain: Chain, answer: str | None, encode):
    """(inputs, targets, kinds) of one chain and the answer after it, lists of one length T.

    Targets differ from inputs in one place: an end token that the chain wrote counts in its probability, and where it
    stood the model reads on.
    """
    bridge = tail = []
    if answer is not None:
        bridge = encode("<answer>" if chain.closed else "</reasoning><answer>")
        tail = encode(answer + "</answer>")
    inputs = (chain.context + bridge if answer is not None else chain.ids) + tail
    targets = chain.ids + inputs[len(chain.ids) :]
    kinds = [COT] * len(chain.ids) + [CONTEXT] * (len(inputs) - len(chain.ids) - len(tail)) + [ANSWER] * len(tail)
    return inputs, targets, kinds


def estimate_si(model, tokenizer, principles, questions, config, sources) -> tuple[dict, torch.Tensor]:
    """Sample, score, summarise: (every number of the report, scores [N, K, K] with all pairs of `summary["pool"]`)."""
    num, wanted = len(principles), config.num_negatives
    if wanted is not None and wanted >= num:
        raise InputError(f"--num-negatives: got {wanted}, of {num} principles; 1 to {num - 1} is accepted")
    negatives = wanted or min(num, MAX_SCORED_ALL) - 1
    answers, encode = [q.answer for q in questions], encoder(tokenizer)
    ends = [encode(f"</reasoning><answer>{answer}</answer>") for answer in answers if answer is not None]
    limit = context_limit(model, config.max_completion_length + max(map(len, ends), default=0))

    def prompts_of(texts):  # N lists of K prompts
        return [encode_prompts(tokenizer, [build_messages(q.text, t) for t in texts], limit) for q in questions]

    prompts = prompts_of([p.text for p in principles])
    opposed = [i for i, p in enumerate(principles) if p.negative is not None]
    opposites = prompts_of([principles[i].negative for i in opposed])
    rows = len(questions) * num
    read = sum(len(p) for row in prompts for p in row)
    print(
        f"{len(questions)} questions x {num} principles: {rows} chains of thought to sample, {rows * (negatives + 1)} "
        f"sequences to score; through the model go 2 x {read} tokens of prompts and at most "
        f"{rows * (negatives + 2) * config.max_completion_length} of completions", flush=True,
    )
    chains = sample_chains(model, tokenizer, prompts, config.max_completion_length, config.temperature, config.seed)
    written_by = draw_candidates(num, len(questions), negatives, config.seed)  # [N, K, C]
    scores, answer_logp = score_chains(model, tokenizer, prompts, chains, answers, written_by, config.temperature)
    summary = summarise_si(principles, sources, questions, chains, scores, answer_logp, negatives + 1)
    if opposed:
        only_own = torch.arange(len(opposed))[None, :, None].expand(len(questions), -1, -1)  # [N, K', 1]
        under, _ = score_chains(
            model, tokenizer, opposites, [[row[i] for i in opposed] for row in chains], [None] * len(questions),
            only_own, config.temperature, "negatives",
        )  # [N, K', K']
        own = scores.diagonal(dim1=1, dim2=2)[:, opposed]  # [N, K']
        summary["negatives"] = compare_negatives([principles[i] for i in opposed], own, under.diagonal(dim1=1, dim2=2))

    pool = list(range(num))
    if config.select and negatives + 1 < num:  # a selection needs every pair: complete the table of the best
        ranked = [p["index"] for p in summary["principles"]]
        pool = sorted(ranked[: max(MAX_SCORED_ALL, 2 * config.select)])
        everyone = draw_candidates(len(pool), len(questions), len(pool) - 1, config.seed)  # [N, K', K']
        scores, _ = score_chains(
            model, tokenizer, [[row[i] for i in pool] for row in prompts], [[row[i] for i in pool] for row in chains],
            [None] * len(questions), everyone, config.temperature, "the best under each other",
        )  # [N, K', K']
    summary["pool"] = pool
    return summary, scores


def summarise_si(principles, sources, questions, chains, scores, answer_logp, num_candidates: int) -> dict:
    """All figures of the table, best principle first; every interval is a 95% bootstrap interval over questions."""
    ceiling = math.log(num_candidates)
    info, row_mi = posterior_information(scores), ceiling - row_info_nce(scores)  # [N, K] both
    column = ceiling - column_info_nce(scores).mean(0)  # [K]
    own = torch.arange(len(principles))  # [K]
    hits = (scores.argmax(-1) == own).double()  # [N, K]
    mistaken = confusion(scores)  # [K, K]
    likeliest = mistaken.masked_fill(torch.eye(len(own), dtype=torch.bool), -1).max(-1)  # [K] both
    shaped = torch.tensor([[format_reward(c.text) for c in row] for row in chains]).double()  # [N, K]
    lengths = torch.tensor([[len(c.ids) for c in row] for row in chains]).double()  # [N, K]
    answered = [n for n, q in enumerate(questions) if q.answer is not None]
    right = torch.tensor(
        [[answer_is_right(c.text, questions[n].answer) for c in chains[n]] for n in answered]
    ).double()  # [A, K]
    gain, reached = answer_gain(answer_logp[answered]), reach(scores)  # [A, K], [K]

    def share(values):  # info -> SI: clamped after the mean over questions, never before
        return {name: max(0.0, value / ceiling) for name, value in interval(values).items()}

    rows = []
    for i, principle in enumerate(principles):
        row = {
            "id": principle.id, "text": principle.text, "source": sources[i], "index": i,
            "si": share(info[:, i]), "reach": reached[i].item(),
            "mi": interval(info[:, i]), "mi_row": row_mi[:, i].mean().item(),
            "mi_column": column[i].item(), "retrieval": hits[:, i].mean().item(),
            "mistaken_for": principles[likeliest.indices[i]].id, "mistaken_share": likeliest.values[i].item(),
            "format": shaped[:, i].mean().item(), "cot_length": lengths[:, i].mean().item(),
        }
        if answered:
            row |= {"accuracy": right[:, i].mean().item(), "answer_gain": interval(gain[:, i])}
        rows.append(row)
    rows.sort(key=lambda row: -row["mi"]["mean"])
    for row, following in itertools.pairwise(rows):
        row["overlaps_next"] = row["si"]["low"] <= following["si"]["high"]
    together = {
        "si": share(info.mean(1)), "reach": reached.mean().item(),
        "mi": interval(info.mean(1)), "mi_row": row_mi.mean().item(),
        "mi_column": column.mean().item(), "retrieval": hits.mean().item(), "format": shaped.mean().item(),
        "cot_length": lengths.mean().item(),
    }
    if answered:
        together |= {"accuracy": right.mean().item(), "answer_gain": interval(gain.mean(1))}
    scored = scores.isfinite()  # [N, K, K]
    return {
        "questions": len(questions), "chains": shaped.numel(), "cot_tokens": int(lengths.sum()),
        "truncated": sum(c.truncated for row in chains for c in row) / shaped.numel(),
        "candidates": num_candidates, "ceiling": ceiling, "chance": 1 / num_candidates,
        "set": together, "principles": rows, "ids": [p.id for p in principles], "confusion": mistaken.tolist(),
        "mean_scores": (scores.where(scored, 0).sum(0) / scored.sum(0).clamp(min=1)).tolist(),
    }


def answer_gain(answer_logp):
    """Nats that a principle's own CoT adds to the right answer: answer_logp [N, K prompts, K CoTs] -> [N, K].

    log p(answer | prompt i, CoT i) - mean over j != i of log p(answer | prompt i, CoT j): only the CoT changes.
    Above 0: what is written under this principle helps to the answer more than what others write. NaN entries (not
    scored) are left out. The answer's likelihood is that of its text and `</answer>`, after a forced `<answer>`.
    """
    own = answer_logp.diagonal(dim1=-2, dim2=-1)  # [N, K]
    off = ~torch.eye(answer_logp.shape[-1], dtype=torch.bool)  # [K, K]
    return own - answer_logp.where(off, math.nan).nanmean(-1)  # [N, K]


def compare_negatives(principles, own, under_negative) -> list[dict]:
    """Own [N, K'] against negative [N, K'] log-probabilities: KL(p(. | c) || half p(. | c) + half p(. | negative)).

    At most log 2, and no bound on any mutual information: all chains were written under c, none under the negative.
    """
    nats = math.log(2) - F.softplus(under_negative - own)  # [N, K']
    return [
        {"id": p.id, "negative": p.negative, "nats": interval(nats[:, i]),
         "retrieval": (own[:, i] > under_negative[:, i]).double().mean().item()}
        for i, p in enumerate(principles)
    ]


def summarise_selection(scores, pool, principles, size: int) -> dict:
    """The best subset of the pool, its SI, and two figures to hold that against.

    The SI of the best of many subsets, on the questions it was chosen on, is too high. `si_other_half` is free of that:
    chosen on one half of the questions, measured on the other, mean of both ways.
    """
    chosen = select_subset(scores, size)
    ceiling = math.log(size)

    def mean_si(some_scores, subsets):
        return max(0.0, subset_information(some_scores, torch.tensor(subsets)).mean().item() / ceiling)

    halves = scores[::2], scores[1::2]
    rng = random.Random(0)
    info = subset_information(scores, torch.tensor([chosen]))[:, 0]  # [N]
    return {
        "ids": [principles[pool[i]].id for i in chosen],
        "indices": [pool[i] for i in chosen],
        "si": {name: max(0.0, value / ceiling) for name, value in interval(info).items()},
        "si_other_half": sum(mean_si(there, [select_subset(here, size)]) for here, there in (halves, halves[::-1])) / 2,
        "si_random_subset": mean_si(scores, [rng.sample(range(len(pool)), size) for _ in range(200)]),
    }


# Creation: the model rewrites and joins principles, or, where it cannot write, the texts are joined as they are

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
    """Up to `num` new principles, each with where it came from; different from all others in more than case and dots.

    The model writes them, if it can repeat half of the given ones when asked to; else, and where too few of its texts
    are usable, two given texts are joined with "and". Fewer than `num` come where no more pairs exist.
    """
    rng = random.Random(f"{config.seed} propose")
    known = {_essence(p.text) for p in principles}
    ids, found = {p.id for p in principles}, []

    def add(name, text, source):
        if len(found) < num and _essence(text) not in known:
            known.add(_essence(text))
            while name in ids:
                name += "'"
            ids.add(name)
            found.append((Principle(name, text), source))

    repeated = _ask(model, tokenizer, [REPEAT.format(p.text) for p in principles], 0.01, f"{config.seed} repeat")
    if sum(_essence(a) == _essence(p.text) for a, p in zip(repeated, principles)) * 2 >= len(principles):
        for turn in range(ROUNDS):
            one, two = rng.choices(principles, k=num), [rng.sample(principles, 2) for _ in range(num)]
            asked = [REWRITE.format(p.text) for p in one] + [COMBINE.format(a.text, b.text) for a, b in two]
            texts = _ask(model, tokenizer, asked, 1.0, f"{config.seed} round {turn}")
            labels = [(f"{p.id}*", f"{p.id} rewritten by {config.model}") for p in one]
            labels += [(f"{a.id}*{b.id}", f"{a.id} and {b.id} combined by {config.model}") for a, b in two]
            drawn = list(zip(labels, texts))
            rng.shuffle(drawn)
            for (name, source), text in drawn:
                if _is_usable(text) and _encodes(tokenizer, text):
                    add(name, text, source)
    pairs = list(itertools.combinations(principles, 2))
    rng.shuffle(pairs)
    for a, b in pairs:
        text = _join(a.text, b.text)
        if len(text.split()) <= MAX_WORDS:
            add(f"{a.id}+{b.id}", text, f"{a.id} and {b.id} joined by their texts")
    return found


@torch.no_grad()
def _ask(model, tokenizer, requests: list[str], temperature: float, name: str) -> list[str]:
    """The first line of the model's reply to each request, without bullets and quotes."""
    prompts = encode_prompts(tokenizer, [[{"role": "user", "content": r}] for r in requests], context_limit(model, 80))
    uniform = uniform_numbers([f"{name} {n}" for n in range(len(prompts))], 1, 80, device=model.device)  # [P, 1, T]
    out = sample(model, prompts, uniform, temperature, eos_ids(model, tokenizer), tokenizer.pad_token_id)
    texts = [tokenizer.decode(t[m], skip_special_tokens=True) for t, m in zip(out.tokens[:, 0], out.mask[:, 0])]
    lines = [(text.strip().splitlines() or [""])[0] for text in texts]
    return [re.sub(r"^[\s\-*•\d.)\"“']+|[\s\"”'*]+$", "", line) for line in lines]


def _is_usable(text: str) -> bool:
    words = text.split()
    return 3 <= len(words) <= MAX_WORDS and text[-1] in ".!" and text.isprintable() and not any(t in text for t in TAGS)


def _encodes(tokenizer, text: str) -> bool:
    try:
        return bool(encode_prompts(tokenizer, [build_messages("?", text)]))
    except InputError:  # a control token of the tokenizer
        return False


def _essence(text: str) -> str:
    """Letters and digits without case: what has to differ between two principles."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _join(first: str, second: str) -> str:
    second = second if second[1:2].isupper() else second[:1].lower() + second[1:]  # "SI units" keeps its capitals
    return f"{first.rstrip(' .!;')} and {second}"


def run_si(config: SiConfig) -> None:
    principles, questions = load_principles(config.principles), pick_questions(config)
    model, tokenizer = load_named("--model", config.model)
    sources = [config.principles] * len(principles)
    if config.propose:
        found = propose(model, tokenizer, principles, config.propose, config)
        print(f"{len(found)} of {config.propose} new principles were found")
        for principle, source in found:
            principles, sources = [*principles, principle], [*sources, source]
            print(f"proposed {principle.id}: {principle.text} ({source})")
    if config.select and config.select > len(principles):
        raise InputError(f"--select: got {config.select}, of {len(principles)} principles; 2 to {len(principles)} "
                         "is accepted")
    summary, scores = estimate_si(model, tokenizer, principles, questions, config, sources)
    chosen = [row["index"] for row in summary["principles"]]
    if config.select:
        summary["selection"] = summarise_selection(scores, summary["pool"], principles, config.select)
        chosen = summary["selection"]["indices"]
    print_si(summary, config)
    if config.json:
        write_numbers(config.json, {"command": "si", "settings": asdict(config), **summary})
        write_plot(config.json, lambda plt: _heat_map(plt, summary))
    if config.out:
        save_principles(config.out, [principles[i] for i in chosen])
        print(f"{config.out}: {len(chosen)} principles, for `python train.py --principles {config.out}`")


def print_si(summary: dict, config) -> None:
    """The report of a measurement, for people."""
    together, num = summary["set"], summary["candidates"]
    answered = "accuracy" in together
    width = min(36, max(len(row["text"]) for row in summary["principles"]))

    def line(name, row, other=""):
        cells = f"{name:{width + 9}}{cell(row['si']):>19}{' ~' if row.get('overlaps_next') else '  '}"
        cells += f"{row['reach']:5.2f}{row['mi_row']:8.2f}{row['mi_column']:9.2f}{row['retrieval']:7.2f}  {other:16}"
        cells += f"{row['format']:7.2f}{row['cot_length']:8.1f}"
        print(cells + (f"{row['accuracy']:10.2f}{row['answer_gain']['mean']:+8.2f}" if answered else ""))

    head = f"\n{'principle':{width + 9}}{'SI [95%]':>19}  {'reach':>5}{'row MI*':>8}{'column*':>9}{'top-1':>7}"
    head += f"  {'mistaken for':16}"
    print(head + f"{'format':>7}{'length':>8}" + (f"{'accuracy':>10}{'gain**':>8}" if answered else ""))
    for row in summary["principles"]:
        text = row["text"] if len(row["text"]) <= width else row["text"][: width - 1] + "…"
        line(f"{row['id'][:8]:9}{text}", row, f"{row['mistaken_for'][:9]} ({row['mistaken_share']:.2f})")
    line("the set", together)
    bounds = f"{1:19.2f}  {1:5.2f}{summary['ceiling']:8.2f}{'':9}{summary['chance']:7.2f}"
    print(f"{'at most log K; by chance':{width + 9}}{bounds}")

    print(f"\nSI {cell(together['si'])}, MI {cell(together['mi'])} of at most {summary['ceiling']:.2f} nats: "
          f"{summary['questions']} questions,\n{summary['chains']} chains of thought, {summary['cot_tokens']} tokens, "
          f"model {config.model}, temperature {config.temperature}, seed {config.seed}")
    notes = (
        (num < len(summary["ids"]), f"each chain of thought is scored against {num - 1} sampled principles of "
                                    f"{len(summary['ids'])}: MI is a lower bound, at most log {num}"),
        (any(row.get("overlaps_next") for row in summary["principles"]),
         "~ not distinguishable from the next line: the intervals overlap; more --num-questions narrow them"),
        (together["si"]["mean"] >= NEAR_CEILING,
         f"near the ceiling: {num} candidates are too few to tell more; add principles"),
        (summary["truncated"] > 0.05, f"{summary['truncated']:.0%} of completions were cut at "
                                      f"{config.max_completion_length} tokens: raise --max-completion-length"),
        (True, "reach: the share that the most telling tenth of the texts carries. Training can make rare texts\n"
               "  frequent; where reach is low as well, principles say the same, or nothing"),
        (True, "* log K - InfoNCE, nats, as in training. SI estimates the same share of log K from the posteriors of\n"
               "  all chains of thought, which is less noisy. The column is no bound: it may exceed the row"),
        (answered, "** nats that the principle's own chain of thought adds to the right answer, over others'"),
    )
    print("\n".join(text for holds, text in notes if holds))
    if "negatives" in summary:
        print(f"\nagainst its own negative, at most log 2 = {math.log(2):.2f} nats (unmatched: no bound on MI)")
        for row in summary["negatives"]:
            print(f"{row['id'][:8]:9}{cell(row['nats']):22}told apart {row['retrieval']:.2f}  {row['negative']}")
    if "selection" in summary:
        best, size = summary["selection"], len(summary["selection"]["ids"])
        print(f"\nbest {size}: {', '.join(best['ids'])}\nSI among themselves {cell(best['si'])}; chosen on half the "
              f"questions, measured on the other half {best['si_other_half']:.2f}; a random {size} has "
              f"{best['si_random_subset']:.2f}")


def _heat_map(plt, summary):
    ids, values = summary["ids"], summary["confusion"]
    size = 2 + 0.45 * len(ids)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                      color="white" if value > 0.5 else "black")
    axis.set_xticks(range(len(ids)), ids, rotation=60, ha="right")
    axis.set_yticks(range(len(ids)), ids)
    axis.set(xlabel="is taken for", ylabel="was written under")
    figure.colorbar(image, label="mean posterior")
    return figure
