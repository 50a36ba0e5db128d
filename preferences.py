"""Preference pairs: from text to the four log-probabilities that infopo.py takes.

    logp[p]      log-probabilities of the chosen and the rejected response of pair p, summed
    loss, stats  infopo_loss(*logp.unbind(1), *ref_logp.unbind(1), beta), or dpo_loss

The two responses share their prompt, which goes through the model once (policy.py). The reference
is the policy at the start; its log-probabilities are kept, so training holds no second model.
"""

from dataclasses import dataclass, replace

import torch

from data import encode_preferences, render
from grpo import format_reward
from infopo import dpo_loss, infopo_loss, sequence_logp
from metrics import answer_is_right
from policy import decode, diverging, eos_ids, hidden_states, log_probs, prompt_limit, sample, uniform_numbers

LOSSES = {"infopo": infopo_loss, "dpo": dpo_loss}
DEFAULT_BETA = 0.1  # the best of benchmarks/preference.py, for InfoPO and within noise for DPO
PAIRS_PER_FORWARD = 32  # without gradient


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

    def __getitem__(self, cut: slice) -> "Pairs":
        mask = self.mask[cut]  # [p, 2, T]
        width = int(mask.sum(-1).max())  # less padding than the longest pair of all would ask for
        ref = None if self.ref_logp is None else self.ref_logp[cut]  # [p, 2]
        return Pairs(self.prompts[cut], self.tokens[cut, :, :width], mask[..., :width], self.answers[cut], ref)


def encode_pairs(model, tokenizer, preferences) -> Pairs:
    """`data.Preference`s as tokens. Raises InputError for a pair beyond the model's context."""
    rows = encode_preferences(tokenizer, preferences, turn_end(model, tokenizer), prompt_limit(model, 0))
    width = max(max(len(chosen), len(rejected)) for _, chosen, rejected in rows)
    pad = [tokenizer.pad_token_id] * width
    tokens = torch.tensor([[(ids + pad)[:width] for ids in row[1:]] for row in rows], device=model.device)  # [P, 2, T]
    lengths = torch.tensor([[len(ids) for ids in row[1:]] for row in rows], device=model.device)  # [P, 2]
    mask = torch.arange(width, device=model.device) < lengths[..., None]  # [P, 2, T]
    return Pairs([row[0] for row in rows], tokens, mask, [p.answer for p in preferences])


def turn_end(model, tokenizer) -> int:
    """The token that ends the assistant's turn in the chat template (Gemma-3: not its <eos>)."""
    ends = set(eos_ids(model, tokenizer))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if tokenizer.chat_template:
        text = render(tokenizer, turns, "a turn of user and assistant")
        written = [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if t in ends]
        if written:
            return written[-1]
    return tokenizer.eos_token_id


def pair_logp(model, pairs: Pairs, temperature):
    """Summed log-probabilities of chosen and rejected: [P, 2], nats."""
    hidden = hidden_states(model, pairs.prompts, pairs.tokens, pairs.mask)  # [P, 2, T, d]
    logp = log_probs(model, hidden, pairs.tokens, pairs.mask, temperature)  # [P, 2, T]
    return sequence_logp(logp, pairs.mask)  # [P, 2]


@torch.no_grad()
def with_reference(model, pairs: Pairs, temperature) -> Pairs:
    """The pairs with the log-probabilities that `model`, the policy at the start, gives them."""
    parts = [pairs[p : p + PAIRS_PER_FORWARD] for p in range(0, len(pairs), PAIRS_PER_FORWARD)]
    return replace(pairs, ref_logp=torch.cat([pair_logp(model, part, temperature) for part in parts]))  # [P, 2]


@diverging()
def preference_loss(model, pairs: Pairs, config):
    """(loss, terms), means over pairs. The weight is lambda_pref beside principles, and 1 alone."""
    logp = pair_logp(model, pairs, config.temperature)  # [P, 2]
    beta = DEFAULT_BETA if config.beta is None else config.beta
    loss, stats = LOSSES[config.preference_loss](*logp.unbind(1), *pairs.ref_logp.unbind(1), beta)
    weight = config.lambda_pref if config.principles else 1.0
    return weight * loss, {"loss_preference": loss, **{f"pair_{name}": value for name, value in stats.items()}}


@torch.no_grad()
def evaluate_pairs(model, tokenizer, pairs: Pairs, config, keys: list[str] | None) -> tuple[dict, dict]:
    """(values [P] by name, an example); with `keys` also format and accuracy of completions.

    keys: one name for each completion, see policy.uniform_numbers. The log-ratios, chosen, rejected
    and their margin, are in nats, whatever the loss and beta.
    """
    now = with_reference(model, pairs, config.temperature).ref_logp  # [P, 2]
    ratio = now - pairs.ref_logp  # [P, 2]
    margin = ratio[:, 0] - ratio[:, 1]  # [P]
    values = {
        "pair_logratio_margin": margin,
        "pair_accuracy": (margin > 0).float(),
        "pair_logratio_chosen": ratio[:, 0],
        "pair_logratio_rejected": ratio[:, 1],
    }
    if keys is None:
        return values, {}
    texts, end = [], eos_ids(model, tokenizer)
    for start in range(0, len(pairs), 8 * PAIRS_PER_FORWARD):
        prompts = pairs.prompts[start : start + 8 * PAIRS_PER_FORWARD]
        some = keys[start : start + len(prompts)]
        uniform = uniform_numbers(some, 1, config.max_completion_length, device=model.device)  # [P, 1, T]
        out = sample(model, prompts, uniform, config.temperature, end, tokenizer.pad_token_id)
        texts += decode(tokenizer, out.tokens[:, 0], out.mask[:, 0], end)
    values["format"] = torch.tensor([format_reward(text) for text in texts])  # [P]
    right = [float(answer_is_right(t, a)) for t, a in zip(texts, pairs.answers) if a is not None]
    values["accuracy"] = torch.tensor(right)  # [those with an answer]
    question = tokenizer.decode(pairs.prompts[0], skip_special_tokens=True)
    return values, {"question": question, "completion": texts[0]}
