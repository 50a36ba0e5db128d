"""Chains of thought: sampled, and scored under principles. For si.py and geometry.py."""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support import sampling
from support.answers import cot_mask
from support.scoring import read_completions

SAMPLED_ROWS = 128  # completions sampled together
HIDDEN_ELEMENTS = 2**24  # of the hidden states of the completions that are scored together: 64 MB


class Chain(NamedTuple):
    """A sampled completion, which begins with a chain of thought."""

    text: str  # of the whole completion, without its end token
    tokens: list[int]  # of the whole completion
    cot_length: int  # its tokens through </reasoning>; all of them where that never comes
    truncated: bool  # whether no end token came within --max-completion-length

    @property
    def closed(self) -> bool:
        return "</reasoning>" in self.text


@torch.no_grad()
def sample_chains(model, tokenizer, prompts, name, max_new_tokens, temperature, opening="") -> list[Chain]:
    """A completion of each prompt, no top-k or top-p. name: of the random numbers; see sampling.write."""
    chains = []
    for start in tqdm(range(0, len(prompts), SAMPLED_ROWS), desc="sampling", dynamic_ncols=True):
        block = prompts[start : start + SAMPLED_ROWS]
        names = [f"{name} {n}" for n in range(start, start + len(block))]
        out, texts = sampling.write(model, tokenizer, block, names, 1, max_new_tokens, temperature, opening)
        lengths = cot_mask(tokenizer, out.tokens, out.mask).sum(-1)  # [P, 1]
        for n, (text,) in enumerate(texts):
            tokens = out.tokens[n, 0][out.mask[n, 0]].tolist()
            chains.append(Chain(text, tokens, int(lengths[n, 0]), bool(out.truncated[n, 0])))
    return chains


@torch.no_grad()
def score_chains(model, prompts, chains, temperature, title="scoring"):
    """Every CoT under all principles of its question: scores [N, C, C] on the CPU, nats.

    prompts, chains: N lists of C. scores[n, i, j] is the log-probability of CoT i after prompt j.
    """
    per_question, longest = len(prompts[0]), max(chain.cot_length for row in chains for chain in row)
    elements = per_question**2 * longest * model.get_output_embeddings().weight.shape[1]
    size, parts = max(1, HIDDEN_ELEMENTS // elements), []  # questions at a time
    for start in tqdm(range(0, len(prompts), size), desc=title, dynamic_ncols=True):
        part = slice(start, start + size)
        rows = [torch.tensor(chain.tokens[: chain.cot_length]) for row in chains[part] for chain in row]
        tokens = pad_sequence(rows, batch_first=True).unflatten(0, (-1, per_question))[:, :, None]  # [Q, C, 1, T]
        lengths = torch.tensor([len(row) for row in rows]).reshape(-1, per_question, 1, 1)  # [Q, C, 1, 1]
        mask = torch.arange(tokens.shape[-1]) < lengths  # [Q, C, 1, T]
        tokens, mask = tokens.to(model.device), mask.to(model.device)  # [Q, C, 1, T] both
        scores = read_completions(model, prompts[part], tokens, mask, mask, temperature, 1)[2]  # [Q, 1, C, C]
        parts.append(scores[:, 0].float().cpu())  # [Q, C, C]
    return torch.cat(parts)  # [N, C, C]
