"""Completions read by a model: the hidden states behind their tokens, and their log-probabilities.

    logp_t = logits_t[y_t] - log sum_v exp logits_t[v]              # of token y_t, nats; logits: see logits.py
    scores[n, i, j] = sum_t cot_t · logp_t                          # completion (i, n), read after prompt j

Logits are made for a block of completion tokens and of the vocabulary at a time, and again in the
backward pass: all of them, [R, T, V], would take more memory than the model.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from support.logits import Logits, at_least_float32, autocast, head
from support.prefix import copy_cache, forward, prefill, recomputing
from support.prompts import context_length

LOGITS_PER_CHUNK = 2**22  # elements of a block of logits: 16 MB in a CPU's cache; a GPU gets 16 times as many
# Rows that go through the model together: few waste less on padding, many keep a processor busy.
# Of 16, 32 and 64, 32 is the best for all terms of the embedded model together on two threads.
ROWS_PER_FORWARD = 32  # on a CPU; a GPU gets twice as many
LAYER_ELEMENTS = 2**26  # of the hidden states of all layers that one forward of layer_states makes: 256 MB


def rows_per_forward(device) -> int:
    """The most rows that go through the model together."""
    return ROWS_PER_FORWARD * (1 if device.type == "cpu" else 2)


def block_side(device) -> int:
    """Rows and columns of a block of logits."""
    return math.isqrt(LOGITS_PER_CHUNK * (1 if device.type == "cpu" else 16))


@contextlib.contextmanager
def frozen_reference(model, reference):
    """The policy at the start: `reference`, or where that is None `model` with its adapters off."""
    with contextlib.nullcontext() if reference else model.disable_adapter():
        yield reference or model


def token_states(model, prompts, tokens, mask, rows_at_once: int | None = None, *, bf16=False, recompute_rows=None):
    """(states [M, d], places [M]): the final hidden states that predict the M tokens in the mask.

    tokens, mask: [P, N, T], padded on the right. places: indices into the P·N·T tokens, in the
    order in which rows went through the model, by length. bf16: see logits.autocast.

    With recompute_rows, so many rows go through the model at a time, and their activations are made
    again in the backward pass (GradCache, arXiv 2101.06983): memory does not grow with P and N. The
    library's own checkpointing, a layer at a time, would drop the cache of the prompts.
    """
    if tokens.ndim != 3 or tokens.shape[0] != len(prompts) or mask.shape != tokens.shape:
        got = f"{list(tokens.shape)} and {list(mask.shape)}"
        raise ValueError(f"expected tokens and mask [P={len(prompts)}, N, T], got {got}")
    per_prompt, width = tokens.shape[1:]
    lengths, order = mask.sum(-1).flatten().sort(descending=True, stable=True)  # [R] both
    lengths = lengths.tolist()
    if len(prompts) > 1 and max(map(len, prompts)) + lengths[0] - 1 > context_length(model):
        # padding beside a longer prompt would pass the end of the context: one at a time
        parts = [
            token_states(model, prompts[p : p + 1], *some, rows_at_once, bf16=bf16, recompute_rows=recompute_rows)
            for p, some in enumerate(zip(tokens.split(1), mask.split(1)))
        ]
        states, places = zip(*parts)
        return torch.cat(states), torch.cat([place + p * per_prompt * width for p, place in enumerate(places)])
    order = order[: max(1, sum(length > 0 for length in lengths))]  # [R'] rows without a token are left out
    rows_at_once = min(rows_at_once or rows_per_forward(tokens.device), recompute_rows or len(order))

    def read(rows, length, wanted):
        prompt = rows // per_prompt  # [r]
        seen = prefix_mask[prompt]  # [r, L-1]
        positions = seen.sum(1, keepdim=True) + torch.arange(length, device=rows.device)  # [r, length]
        shown = F.pad(seen, (0, length), value=True)  # [r, L-1+length]
        hidden = forward(model, inputs[rows, :length], shown, positions, copy_cache(layers, prompt))  # [r, length, d]
        return at_least_float32(hidden).flatten(0, 1).index_select(0, wanted)  # [m, d]

    states, places = [], []
    with autocast(model.device, bf16):
        layers, prefix_mask, last = prefill(model, prompts, recompute_rows)
        inputs = torch.cat([last[:, None, None].expand(-1, per_prompt, 1), tokens[..., :-1]], -1)  # [P, N, T]
        inputs = inputs.reshape(-1, width)  # [R, T]
        for rows, longest in zip(order.split(rows_at_once), lengths[::rows_at_once]):
            length = max(longest, 1)
            wanted = mask.flatten(0, 1)[rows, :length].flatten().nonzero()[:, 0]  # [m] indices into r·length
            states.append(recomputing(recompute_rows, read, rows, length, wanted))  # [m, d]
            flat = rows[:, None] * width + torch.arange(length, device=rows.device)  # [r, length]
            places.append(flat.flatten()[wanted])  # [m]
    return torch.cat(states), torch.cat(places)  # [M, d], [M]


def completion_logp(model, prompts, tokens, mask, temperature, *, bf16=False, recompute_rows=None):
    """Log-probabilities [P, N, T] of tokens [P, N, T] after their prompts, in nats, 0 off the mask."""
    states, places = token_states(model, prompts, tokens, mask, bf16=bf16, recompute_rows=recompute_rows)
    places, order = places.sort()  # [M] both
    states = states.index_select(0, order)  # [M, d] as the tokens stand
    logp = token_log_probs(model, states, tokens.flatten()[places], temperature, bf16=bf16)  # [M]
    return logp.new_zeros(tokens.numel()).index_copy(0, places, logp).reshape(tokens.shape)  # [P, N, T]


@torch.no_grad()
def layer_states(model, prompts, completions, picked):
    """Hidden states [L + 1, n, d] of all layers at n positions; 0: embeddings, L: after the norm.

    prompts and completions: R lists of token ids; picked: n pairs (row, t), sorted, some of every
    row: the position that predicts token t of that row's completion. The result is on the CPU.
    """
    rows = [p + c[:-1] for p, c in zip(prompts, completions)]
    longest = max(map(len, rows))
    layers, width = model.config.get_text_config().num_hidden_layers + 1, model.get_output_embeddings().weight.shape[1]
    size = max(1, LAYER_ELEMENTS // (longest * layers * width))
    parts = []
    for start in range(0, len(rows), size):
        block = [torch.tensor(row) for row in rows[start : start + size]]
        ids = pad_sequence(block, batch_first=True).to(model.device)  # [r, T] padded on the right, where no token looks
        mask = pad_sequence([torch.ones_like(row) for row in block], batch_first=True).to(ids.device)  # [r, T]
        out = model.get_decoder()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        here = [(r - start, len(prompts[r]) - 1 + t) for r, t in picked if start <= r < start + size]
        row, position = torch.tensor(here, device=ids.device).T  # [n'], [n']
        states = torch.stack([layer[row, position] for layer in out.hidden_states])  # [L + 1, n', d]
        parts.append(states.float().cpu())
    return torch.cat(parts, 1)  # [L + 1, n, d]


def read_completions(model, prompts, tokens, mask, cot, temperature, generations, picked=None, own_logp=True, *,
                     bf16=False, recompute_rows=None):
    """Completions after their own prompt, and the first N = `generations` of a group after all K.

    prompts: Q lists of K prompts. tokens, mask and cot (the chain of thought): [Q, K, G, T]. picked:
    [Q, n] indices into the K·G·T tokens of a question. Returns

        logp    [Q, K, G, T]  log-probabilities of the tokens of completion (i, g) after prompt i
        states  [Q, n, d]     hidden states that predict the picked tokens; 0 off the mask
        scores  [Q, N, i, j]  log-probability of the cot of completion (i, g) after prompt j

    scores is None for N = 0, states without picked, logp with neither scores nor own_logp. The
    model reads each prompt once, with its own G completions and N of those of each other prompt.
    """
    num_questions, num, per_group, width = tokens.shape
    if not (generations or own_logp):  # each row is read as far as its last picked token
        cut = torch.zeros_like(mask.flatten(1)).scatter(1, picked, True).reshape(mask.shape) & mask  # [Q, K, G, T]
        mask = cot = cut.flip(-1).cummax(-1).values.flip(-1)  # [Q, K, G, T]
    own = torch.eye(num, dtype=torch.bool, device=tokens.device)[:, :, None, None]  # [j, i, 1, 1]
    scored = (torch.arange(per_group, device=tokens.device) < generations)[:, None]  # [G, 1]
    read = (own & mask[:, None]) | (scored & cot[:, None])  # [Q, j, i, G, T] what is read of (i, g) after prompt j
    after = tokens[:, None].expand_as(read).reshape(num_questions * num, -1, width)  # [Q·K, K·G, T]
    states, places = token_states(
        model, [prompt for row in prompts for prompt in row], after, read.reshape(after.shape),
        bf16=bf16, recompute_rows=recompute_rows,
    )  # [M, d], [M] indices into Q·j·i·G·T
    logp = scores = chosen = None
    if generations or own_logp:
        flat = token_log_probs(model, states, after.flatten()[places], temperature, bf16=bf16)  # [M]
        table = flat.new_zeros(read.numel()).index_copy(0, places, flat).reshape(read.shape)  # [Q, j, i, G, T]
        logp = table.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2).contiguous()  # [Q, K, G, T]
    if generations:
        scores = (table * cot[:, None])[..., :generations, :].sum(-1).permute(0, 3, 2, 1)  # [Q, N, i, j]
    if picked is not None:
        row = torch.full((read.numel(),), len(states), device=picked.device)  # [Q·j·i·G·T] off the mask: the zeros
        row[places] = torch.arange(len(states), device=picked.device)
        writer = picked // (per_group * width)  # [Q, n] whose prompt is the token's own
        question = torch.arange(num_questions, device=picked.device)[:, None]  # [Q, 1]
        place = (question * num + writer) * num * per_group * width + picked  # [Q, n] indices into Q·j·i·G·T
        chosen = F.pad(states, (0, 0, 0, 1)).index_select(0, row[place].flatten())  # [Q·n, d]
        chosen = chosen.reshape(*picked.shape, -1)  # [Q, n, d]
    return logp, chosen, scores


def token_log_probs(model, states, targets, temperature, logits_per_chunk: int | None = None, *, bf16=False):
    """Log-probabilities [M] of the tokens `targets` [M], in nats, by the hidden states [M, d] that predict them.

    At most `logits_per_chunk` logits exist at a time, by default 2**22 on a CPU and 2**26 on a GPU.
    """
    if states.shape[:-1] != targets.shape or targets.ndim != 1:
        raise ValueError(f"expected states [M, d] and targets [M], got {list(states.shape)} and {list(targets.shape)}")
    side = math.isqrt(logits_per_chunk) if logits_per_chunk else block_side(states.device)
    weight, bias, logits = head(model, temperature, bf16)  # [V, d], [V] or None
    return _TokenLogProbs.apply(states, weight, bias, targets, logits, side)  # [M]


class _TokenLogProbs(torch.autograd.Function):
    """logits[target] - logsumexp(logits) of M rows, by blocks [side, side] of the logits.

    Backward, p the softmax and g the incoming gradient: d logits = g (onehot - p). The logits are
    made again, a fourth matrix product beside three, but a block is changed in place in the cache
    where autograd writes five [M, V] to memory: on a CPU it is the faster way.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets, logits: Logits, side):
        logp, lse = states.new_empty(len(states)), states.new_empty(len(states))  # [M] both
        for rows in _slices(len(states), side):
            target, parts = torch.zeros_like(lse[rows]), []  # [r], one logsumexp [r] for each block
            for columns in _slices(len(weight), side):
                values = logits(states[rows], weight[columns], _part(bias, columns))  # [r, c]
                here, place = _inside(targets[rows], columns.start, values.shape[1])  # [r, 1] both
                target = target.where(~here[:, 0], values.gather(1, place)[:, 0])  # [r]
                top = values.amax(-1)  # [r]
                parts.append(values.sub_(top[:, None]).exp_().sum(-1).log_() + top)  # [r]
            lse[rows] = torch.stack(parts).logsumexp(0)  # [r]
            logp[rows] = target - lse[rows]  # [r]
        ctx.save_for_backward(states, weight, bias, targets, lse)
        ctx.settings = logits, side
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        states, weight, bias, targets, lse = ctx.saved_tensors
        logits, side = ctx.settings
        g = g / logits.scale  # [M]
        d_states = torch.zeros_like(states)  # [M, d]
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # [V, d]
        d_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None  # [V]
        with autocast(states.device, logits.bf16):
            for rows in _slices(len(states), side):
                for columns in _slices(len(weight), side):
                    values = logits(states[rows], weight[columns], _part(bias, columns))  # [r, c]
                    slope = logits.slope(values)  # [r, c] or None
                    d_logits = values.sub_(lse[rows, None]).exp_().mul_(-g[rows, None])  # [r, c]
                    here, place = _inside(targets[rows], columns.start, values.shape[1])  # [r, 1] both
                    d_logits.scatter_add_(1, place, g[rows, None] * here)
                    d_logits = d_logits if slope is None else d_logits.mul_(slope)  # [r, c]
                    d_states[rows] += d_logits @ weight[columns]  # [r, d]
                    if d_weight is not None:
                        d_weight[columns] += d_logits.T @ states[rows]  # [c, d]
                    if d_bias is not None:
                        d_bias[columns] += d_logits.sum(0)  # [c]
        return d_states, d_weight, d_bias, None, None, None


def _slices(length, size):
    return [slice(start, start + size) for start in range(0, length, size)]


def _part(bias, columns):
    return None if bias is None else bias[columns]  # [c]


def _inside(targets, start, width):
    """Whether a target is one of `width` columns from `start`, and its place there, or some place: [r, 1] both."""
    place = targets[:, None] - start  # [r, 1]
    return (place >= 0) & (place < width), place.clamp(0, width - 1)
