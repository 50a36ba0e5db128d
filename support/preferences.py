"""Preference pairs: from text to the four log-probabilities that infopo.py takes.

    logp[p]      log-probabilities of the chosen and the rejected response of pair p, summed
    loss, stats  infopo_loss(*logp.unbind(1), *ref_logp.unbind(1), beta), or dpo_loss

The two responses share their prompt, which goes through the model once (prefix.py). The reference
is the policy at the start; its log-probabilities are kept, so training holds no second model.
"""

import itertools
import math
import os
import re
from dataclasses import dataclass, replace

import torch

from grpo import format_reward
from infopo import dpo_loss, infopo_loss, sequence_logp
from support import parallel, tiny
from support.answers import answer_is_right
from support.data import BLOCK, Data, check_sides, items_of_step, make_template, split
from support.errors import InputError, TooLong
from support.files import Preference
from support.prompts import control_tokens, encode_texts, prompt_limit, refuse, try_render, turn_end
from support.rows import LeftOut, answer_of, good, refuse_near_names, rows_of, short, text_of
from support.sampling import write
from support.scoring import completion_logp
from support.steps import backward, descend, gather_evaluation, micro_batches

LOSSES = {"infopo": infopo_loss, "dpo": dpo_loss}
FIELDS = ("prompt", "chosen", "rejected", "answer")
PAIRS_PER_FORWARD = 32  # without gradient


def load_preferences(source, left_out=None, config=None, split="train") -> list[Preference]:
    """`Preference`s, one or more, of a .jsonl, .parquet or .csv file, or of a data set in `config` and `split`.

    TRL's formats: `prompt`, `chosen`, `rejected`, each a string, used as it stands, or each a list
    of {"role", "content"} messages, one of the assistant as the response. Without `prompt` it is
    the common beginning of the two. `answer` is optional, as for questions; other fields are not
    read. Rows that cannot be used: see LeftOut.
    """
    pairs, left_out = [], left_out or LeftOut(source)
    for where, row, names in rows_of(source, FIELDS, config, split):
        try:
            refuse_near_names(where, good(row), names, FIELDS)
            pairs.append(_preference(where, row))
        except InputError as error:
            left_out.add(error, not pairs)
    return pairs if pairs else left_out.tell(0, "pairs")  # raises


def encode_preferences(tokenizer, pairs, end, max_length=None, new_tokens=0) -> list:
    """(prompt, chosen, rejected) token ids of each pair, or the InputError that refuses it.

    Both responses end with the token `end`. Messages become a prompt as in `encode_prompts`;
    strings stay as they are, control tokens too (their author's own chat format), after one BOS if
    the tokenizer writes one. Prompt and response are tokenised as one text, as in TRL; where a token
    reaches over the seam, the prompt ends before it. Refused is what `encode_prompts` refuses, a
    control token in a response, and a pair of more than `max_length` tokens, or whose prompt leaves no
    room for `new_tokens`.
    """
    found = control_tokens(tokenizer, [text for pair in pairs for text in (pair.chosen, pair.rejected)])
    chats = [pair for pair in pairs if not isinstance(pair.prompt, str)]
    rendered = iter(try_render(tokenizer, [pair.prompt for pair in chats], [pair.where for pair in chats]))
    prompts = [pair.prompt if isinstance(pair.prompt, str) else next(rendered) for pair in pairs]
    texts = ["" if isinstance(prompt, InputError) else prompt for prompt in prompts]
    chosen = [text + pair.chosen for text, pair in zip(texts, pairs)]
    rejected = [text + pair.rejected for text, pair in zip(texts, pairs)]
    rows = []
    encoded = (encode_texts(tokenizer, some) for some in (texts, chosen, rejected))
    for pair, prompt, *ids in zip(pairs, prompts, *encoded):
        try:
            good(prompt)
            rows.append(_tokens(pair, ids, end, found, max_length, new_tokens))
        except InputError as error:
            rows.append(error)
    return rows


def _tokens(pair, ids, end, found, max_length, new_tokens):
    """(prompt, chosen, rejected) from the token ids of the prompt alone and with each response."""
    for side, text in ("chosen", pair.chosen), ("rejected", pair.rejected):
        refuse(f"{pair.where}: {side} {short(text)}", found.get(text))
    shared = len(os.path.commonprefix(ids))  # it takes lists too
    chosen, rejected = ([*joint[shared:], end] for joint in ids[1:])
    length = shared + max(len(chosen), len(rejected), new_tokens)
    if shared < 2:
        raise InputError(f"{pair.where}: the prompt {short(pair.text)} has {shared} tokens; 2 or more are accepted")
    if max_length is not None and length > max_length:
        raise TooLong(f"{pair.where}: {short(pair.text)} and its longest response have {length} tokens; at most "
                      f"{max_length} are accepted")
    return ids[0][:shared], chosen, rejected


def _preference(where, row):
    chosen, rejected = _conversation(where, row, "chosen"), _conversation(where, row, "rejected")
    prompt = None if row.get("prompt") is None else _conversation(where, row, "prompt")
    if len({type(value) for value in (chosen, rejected, prompt) if value is not None}) > 1:
        raise InputError(f"{where}: prompt, chosen and rejected mix text and messages; one kind is accepted")
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are the same, {short(chosen)}; different ones are accepted")
    if prompt is None:  # as TRL reads it: the common beginning, but for a space at its end
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        same -= isinstance(chosen, str) and chosen[:same].endswith(" ")
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if isinstance(chosen, list):
        for field, value in ("chosen", chosen), ("rejected", rejected):
            if len(value) != 1 or value[0]["role"] != "assistant":
                raise InputError(f"{where}: {field} is {short(value)} after the prompt; one assistant message is "
                                 "accepted")
        chosen, rejected = chosen[0]["content"], rejected[0]["content"]
    for field, value in ("prompt", prompt), ("chosen", chosen), ("rejected", rejected):
        if not value or (isinstance(value, str) and not value.strip()):
            raise InputError(f"{where}: {field} is empty; text or messages are accepted (without the key prompt, "
                             "chosen and rejected must begin alike and then differ)")
    answer = None if row.get("answer") is None else answer_of(where, row, "answer")
    return Preference(prompt, chosen, rejected, answer, where)


def _conversation(where, row, field):
    """row[field]: text as it stands, or messages, of which role and content are kept."""
    accepted = 'text or a list of {"role", "content"} messages'
    if not isinstance(row.get(field), list):
        text_of(where, row, field, accepted)
        return row[field]
    for message in row[field]:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f"{where}: {field} holds {short(message)}; {accepted} is accepted")
        text_of(where, message, "content")
        if not re.fullmatch(r"\w+", text_of(where, message, "role")):  # a template may write it as is
            raise InputError(f"{where}: role is {short(message['role'])}; a word such as user is accepted")
    return [{"role": message["role"], "content": message["content"]} for message in row[field]]


@dataclass
class Pairs:
    """P pairs as tokens; a slice of them is Pairs too."""

    prompts: list  # P lists of token ids
    tokens: torch.Tensor  # [P, 2, T] chosen, rejected; padded on the right
    mask: torch.Tensor  # [P, 2, T] bool
    answers: list  # P texts or None
    ref_logp: torch.Tensor | None = None  # [P, 2]

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, part: slice) -> "Pairs":
        return self.take(range(len(self))[part])

    def take(self, chosen) -> "Pairs":
        """The pairs at these places, in this order."""
        chosen = list(chosen)
        mask = self.mask[chosen]  # [p, 2, T]
        width = int(mask.sum(-1).max())  # less padding than the longest pair of all would ask for
        prompts, answers = ([values[n] for n in chosen] for values in (self.prompts, self.answers))
        ref = None if self.ref_logp is None else self.ref_logp[chosen]  # [p, 2]
        return Pairs(prompts, self.tokens[chosen, :, :width], mask[..., :width], answers, ref)


def add_reference(model, pairs: Pairs, temperature, **how) -> Pairs:
    """The pairs with the log-probabilities that `model`, the policy at the start, gives them."""
    return replace(pairs, ref_logp=all_logp(model, pairs, temperature, **how))  # [P, 2]


def encode_pairs(model, tokenizer, preferences, left_out=None, new_tokens=0, most=math.inf) -> Pairs:
    """`Preference`s as tokens: the first `most` that fit, or all.

    Without `left_out`, InputError for one beyond the model's context.
    """
    end, limit = turn_end(model, tokenizer), prompt_limit(model, 0)
    preferences, kept = iter(preferences), []
    while len(kept) < most and (block := list(itertools.islice(preferences, BLOCK))):
        encoded = encode_preferences(tokenizer, block, end, limit, new_tokens)
        none_taken = not kept and all(isinstance(row, InputError) for row in encoded)
        for pair, row in zip(block, encoded):
            if len(kept) == most:
                break
            if isinstance(row, InputError) and left_out:
                left_out.add(row, none_taken)
            else:
                kept.append((pair, good(row)))
    width = max((len(ids) for _, row in kept for ids in row[1:]), default=0)
    pad = [tokenizer.pad_token_id] * width
    padded = [[(ids + pad)[:width] for ids in row[1:]] for _, row in kept]
    tokens = torch.tensor(padded, device=model.device)  # [P, 2, T]
    lengths = torch.tensor([[len(ids) for ids in row[1:]] for _, row in kept], device=model.device)  # [P, 2]
    mask = torch.arange(width, device=model.device) < lengths[..., None]  # [P, 2, T]
    return Pairs([row[0] for _, row in kept], tokens, mask, [pair.answer for pair, _ in kept])


def load_pairs(model, tokenizer, config) -> Data:
    """The pairs of --preferences, split and encoded, with the reference's log-probabilities."""
    left_out, needed = LeftOut(config.preferences), config.max_steps * config.num_pairs
    if config.preferences == "tiny":
        train = tiny.make_pairs(min(needed, 8192), False, config.seed)
        held_out = tiny.make_pairs(config.eval_questions, True)
    else:
        pairs = load_preferences(config.preferences, left_out, config.dataset_config, config.dataset_train_split)
        train, held_out = split(pairs, len(pairs))
        if needed < len(train):  # the reference reads each pair before the first step
            train = [train[n] for n in items_of_step(len(train), 0, len(train), config.seed)]
    sides = [
        encode_pairs(model, tokenizer, train, left_out, 0, needed),
        # an evaluation writes a completion of its own
        encode_pairs(model, tokenizer, held_out, left_out, config.max_completion_length, config.eval_questions),
    ]
    left_out.tell(sum(map(len, sides)), "pairs")
    check_sides(*sides, config.eval_questions, "pairs")
    sides = [add_reference(model, pairs, config.temperature, **config.how_read) for pairs in sides]
    return Data(make_template(config), pairs=sides[0], held_out_pairs=sides[1])


def loop(run) -> None:
    """Take the step's pairs, compute the loss, step, log: what train.loop is for principles."""
    model, tokenizer, data, config = run.model, run.tokenizer, run.data, run.config
    for step in run.steps():
        if run.evaluation_due():
            run.record_evaluation(evaluate_pairs(model, tokenizer, data.held_out_pairs, config))
        step.start_clock()
        places = items_of_step(len(data.pairs), step.number, config.num_pairs, config.seed)
        update(model, run.optimizer, data.pairs.take(places[parallel.share(len(places))]), step, config)
        run.end_step(step)
    run.record_evaluation(evaluate_pairs(model, tokenizer, data.held_out_pairs, config))


def update(model, optimizer, pairs: Pairs, step, config) -> None:
    """One step of the optimiser on pairs that know their reference's log-probabilities."""
    figures = []
    for part, share in micro_batches(len(pairs), config.rows_at_once // 2):
        some = pairs[part]
        logp = pair_logp(model, some, config.temperature, **config.how_read)  # [p, 2]
        loss, terms = preference_loss(logp, some.ref_logp, config)
        figures.append(backward(loss, {"items": len(some), **terms}, share))
    step.passes.append(descend(model, optimizer, figures, step.learning_rate, config.max_grad_norm))


def preference_loss(logp, ref_logp, config):
    """(loss, terms), means over pairs, of log-probabilities [P, 2], chosen and rejected, and the reference's."""
    loss, stats = LOSSES[config.preference_loss](*logp.unbind(1), *ref_logp.unbind(1), config.beta)
    return loss, {"loss_preference": loss, **{f"pair_{name}": value for name, value in stats.items()}}


def pair_logp(model, pairs: Pairs, temperature, **how):
    """Summed log-probabilities of chosen and rejected: [P, 2], nats."""
    logp = completion_logp(model, pairs.prompts, pairs.tokens, pairs.mask, temperature, **how)  # [P, 2, T]
    return sequence_logp(logp, pairs.mask)  # [P, 2]


@torch.no_grad()
def all_logp(model, pairs: Pairs, temperature, **how):
    """`pair_logp` of any number of pairs, without gradient: [P, 2]."""
    parts = [pairs[p : p + PAIRS_PER_FORWARD] for p in range(0, len(pairs), PAIRS_PER_FORWARD)]
    return torch.cat([pair_logp(model, part, temperature, **how) for part in parts])  # [P, 2]


@torch.no_grad()
def evaluate_pairs(model, tokenizer, pairs: Pairs, config) -> dict:
    """Log-ratios on held-out pairs, in nats, and format and accuracy of a completion of each prompt.

    The log-ratios, chosen, rejected and their margin, are the same for each loss and beta.
    """
    part = parallel.share(len(pairs))
    pairs, names = pairs[part], [f"{config.seed} evaluation {n}" for n in range(len(pairs))[part]]
    ratio = all_logp(model, pairs, config.temperature, **config.how_read) - pairs.ref_logp  # [P, 2]
    margin = ratio[:, 0] - ratio[:, 1]  # [P]
    texts, cut = write_responses(model, tokenizer, pairs.prompts, names, config)
    right = [float(answer_is_right(t, a)) for t, a in zip(texts, pairs.answers) if a is not None]
    values = {
        "pair_logratio_margin": margin,
        "pair_accuracy": (margin > 0).float(),
        "pair_logratio_chosen": ratio[:, 0],
        "pair_logratio_rejected": ratio[:, 1],
        "format": torch.tensor([format_reward(text) for text in texts]).masked_fill(cut, 0.0),  # [P]
        "accuracy": torch.tensor(right),  # [those with an answer]
    }
    example = {"question": tokenizer.decode(pairs.prompts[0], skip_special_tokens=True), "completion": texts[0]}
    return gather_evaluation([(values, example)])


def write_responses(model, tokenizer, prompts, names, config):
    """(a completion of each prompt, sampled by its name; [P] whether it was cut at the limit)."""
    texts, cut, how = [], [], (1, config.max_completion_length, config.temperature, "", config.bf16)
    for start in range(0, len(prompts), config.eval_rows):
        some = slice(start, start + config.eval_rows)
        out, found = write(model, tokenizer, prompts[some], names[some], *how)
        texts += [row[0] for row in found]
        cut.append(out.truncated[:, 0].cpu())  # [p]
    return texts, torch.cat(cut)  # [P]
