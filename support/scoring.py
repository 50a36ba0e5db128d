"""Hidden states and log-probabilities of completions; the score matrix."""

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from support.prefix import at_least_float32, autocast, copy_cache, forward, logit_settings, prefill, recomputing

LOGITS_PER_CHUNK = 2**22  # elements of a block of logits: 16 MB in a CPU's cache; a GPU gets 16 times as many
# Rows that go through the model together: few waste less on padding, many keep a processor busy.
# Of 16, 32 and 64, 32 is the best for all terms of the embedded model together on two threads.
ROWS_PER_FORWARD = 32  # on a CPU; a GPU gets twice as many
LAYER_ELEMENTS = 2**26  # of the hidden states of all layers that one forward of layer_states makes: 256 MB


@contextlib.contextmanager
def frozen_start(model, reference):
    """The policy at the start: `reference`, or where that is None `model` with its adapters off."""
    with contextlib.nullcontext() if reference else model.disable_adapter():
        yield reference or model


@autocast
def token_states(model, prompts, tokens, mask, rows_per_forward: int | None = None):
    """(states [M, d], places [M]): the final hidden states that predict the M tokens in the mask.

    tokens, mask: [P, N, T], padded on the right. places: indices into the P·N·T tokens, in the
    order in which rows went through the model, by length.

    With `model.recompute_rows`, so many rows go through the model at a time, and their activations
    are made again in the backward pass (GradCache, arXiv 2101.06983): memory does not grow with P
    and N. The library's own checkpointing, a layer at a time, would drop the cache of the prompts.
    """
    if tokens.ndim != 3 or tokens.shape[0] != len(prompts) or mask.shape != tokens.shape:
        got = f"{list(tokens.shape)} and {list(mask.shape)}"
        raise ValueError(f"expected tokens and mask [P={len(prompts)}, N, T], got {got}")
    recompute = getattr(model, "recompute_rows", None)
    num, per_prompt, width = tokens.shape
    layers, prefix_mask, last = prefill(model, prompts, recompute)
    inputs = torch.cat([last[:, None, None].expand(-1, per_prompt, 1), tokens[..., :-1]], -1)  # [P, N, T]
    inputs, lengths = inputs.reshape(-1, width), mask.sum(-1).flatten()  # [R, T], [R]
    order = lengths.argsort(descending=True, stable=True)  # [R]
    order = order[: max(1, int((lengths > 0).sum()))]  # [R'] rows without a token are left out
    rows_per_forward = rows_per_forward or ROWS_PER_FORWARD * (1 if tokens.device.type == "cpu" else 2)

    def read_rows(rows, length, wanted):
        prompt = rows // per_prompt  # [r]
        seen = prefix_mask[prompt]  # [r, L-1]
        positions = seen.sum(1, keepdim=True) + torch.arange(length, device=rows.device)  # [r, length]
        shown = F.pad(seen, (0, length), value=True)  # [r, L-1+length]
        hidden = forward(model, inputs[rows, :length], shown, positions, copy_cache(layers, prompt))  # [r, length, d]
        return at_least_float32(hidden).flatten(0, 1).index_select(0, wanted)  # [m, d]

    states, places = [], []
    for rows in order.split(min(rows_per_forward, recompute or rows_per_forward)):
        length = max(int(lengths[rows[0]]), 1)  # the longest of the block
        wanted = mask.flatten(0, 1)[rows, :length].flatten().nonzero()[:, 0]  # [m] indices into r·length
        states.append(recomputing(recompute, read_rows, rows, length, wanted))  # [m, d]
        flat = rows[:, None] * width + torch.arange(length, device=rows.device)  # [r, length]
        places.append(flat.flatten()[wanted])  # [m]
    return torch.cat(states), torch.cat(places)  # [M, d], [M]


def hidden_states(model, prompts, tokens, mask, rows_per_forward: int | None = None):
    """The states of `token_states` in place: [P, N, T, d], 0 off the mask."""
    states, places = token_states(model, prompts, tokens, mask, rows_per_forward)  # [M, d], [M]
    hidden = states.new_zeros(tokens.numel(), states.shape[-1]).index_copy(0, places, states)  # [P·N·T, d]
    return hidden.reshape(*tokens.shape, -1)  # [P, N, T, d]


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


def score_matrix(model, prompts, tokens, mask, cot, temperature, generations, cloud=None, own_logp=True):
    """Completions under their own principle, and the first N = `generations` of a group under all.

    prompts: Q lists of K prompts. tokens, mask and cot (the chain of thought): [Q, K, G, T]. cloud:
    [Q, n] indices into the K·G·T tokens of a question. Returns

        logp    [Q, K, G, T]  log-probabilities of the tokens of completion (i, g) after prompt i
        states  [Q, n, d]     hidden states that predict the tokens of the cloud; 0 off the mask
        scores  [Q, N, i, j]  log-probability of the cot of completion (i, g) after prompt j

    scores is None for N = 0, states without a cloud, logp with neither scores nor own_logp. The
    model reads each prompt once, with its own G completions and N of those of each other prompt.
    """
    num_questions, num, per_group, width = tokens.shape
    own = torch.eye(num, dtype=torch.bool, device=tokens.device)[..., None].expand(-1, -1, per_group)  # [j, i, G]
    taken = own | (torch.arange(per_group, device=tokens.device) < generations)  # [j, i, G]
    index = taken.flatten(1).nonzero()[:, 1].reshape(num, -1)  # [K, C] the completions that follow prompt j
    own = own.flatten(1).gather(1, index)  # [K, C]
    places_of_own = own.flatten().nonzero()[:, 0]  # [K·G] indices into K·C

    def under_each(tensor):  # [Q, K, G, T] -> [Q·K, C, T]
        return tensor.flatten(1, 2)[:, index].flatten(0, 1)

    if not (generations or own_logp):  # each row is read as far as its last token in the cloud
        picked = torch.zeros_like(mask.flatten(1)).scatter(1, cloud, True).reshape(mask.shape) & mask  # [Q, K, G, T]
        mask = cot = picked.flip(-1).cummax(-1).values.flip(-1)  # [Q, K, G, T]
    spans, under = under_each(cot), under_each(tokens)  # [Q·K, C, T] both
    needed = spans | (own.repeat(num_questions, 1)[..., None] & under_each(mask))  # [Q·K, C, T]
    hidden, places = token_states(model, [*itertools.chain(*prompts)], under, needed)  # [M, d], [M]
    logp = states = scores = None
    if generations or own_logp:
        logp = token_log_probs(model, hidden, under.flatten()[places], temperature)  # [M]
        logp = logp.new_zeros(under.numel()).index_copy(0, places, logp).reshape(under.shape)  # [Q·K, C, T]
    if generations:
        sums = (logp * spans).sum(-1).unflatten(0, (num_questions, num))  # [Q, j, C]
        table = sums.new_full((num_questions, num, num * per_group), -math.inf)  # [Q, j, K·G]
        table = table.scatter(2, index.expand(num_questions, -1, -1), sums)  # [Q, j, K·G]
        scores = table.unflatten(2, (num, per_group))[..., :generations].permute(0, 3, 2, 1)  # [Q, N, i, j]
    if logp is not None:
        logp = logp.reshape(num_questions, -1, width).index_select(1, places_of_own)  # [Q, K·G, T]
        logp = logp.reshape(tokens.shape)  # [Q, K, G, T]
    if cloud is not None:
        of_question = torch.arange(num_questions, device=cloud.device)[:, None] * index.numel() * width  # [Q, 1]
        wanted = of_question + places_of_own[cloud // width] * width + cloud % width  # [Q, n] indices into Q·K·C·T
        row = torch.full((under.numel(),), len(hidden), device=cloud.device)  # [Q·K·C·T] off the mask: the zeros
        row[places] = torch.arange(len(hidden), device=cloud.device)
        states = F.pad(hidden, (0, 0, 0, 1)).index_select(0, row[wanted].flatten())  # [Q·n, d]
        states = states.reshape(*cloud.shape, -1)  # [Q, n, d]
    return logp, states, scores


def block_side(device) -> int:
    """Rows and columns of a block of logits in `log_probs`."""
    return math.isqrt(LOGITS_PER_CHUNK * (1 if device.type == "cpu" else 16))


def log_probs(model, hidden, tokens, mask, temperature, logits_per_chunk: int | None = None):
    """Log-probability of tokens under softmax(head(hidden) / temperature), in nats, 0 off the mask.

    hidden: [..., d]; tokens and mask: [...], as the result. At most `logits_per_chunk` logits exist
    at a time, by default 2**22 on a CPU and 2**26 on a GPU.
    """
    if hidden.shape[:-1] != tokens.shape or mask.shape != tokens.shape:
        got = f"{list(hidden.shape)}, {list(tokens.shape)} and {list(mask.shape)}"
        raise ValueError(f"expected hidden [..., d] with tokens and mask [...], got {got}")
    where = mask.flatten().nonzero()[:, 0]  # [M]
    states, targets = hidden.flatten(0, -2).index_select(0, where), tokens[mask]  # [M, d], [M]
    flat = token_log_probs(model, states, targets, temperature, logits_per_chunk)  # [M]
    return flat.new_zeros(tokens.shape).masked_scatter(mask, flat)  # [...]


@autocast
def token_log_probs(model, states, targets, temperature, logits_per_chunk: int | None = None):
    """`log_probs` of M tokens in a list: states [M, d], targets [M] -> [M], nats."""
    out = model.get_output_embeddings()
    if type(out) is not torch.nn.Linear:
        raise ValueError(f"expected a model whose head is torch.nn.Linear, got {type(out).__name__}")
    weight = out.weight  # [V, d]
    if out.bias is not None:
        states, weight = F.pad(states, (0, 1), value=1), torch.cat([weight, out.bias[:, None]], 1)  # both d + 1
    side = math.isqrt(logits_per_chunk) if logits_per_chunk else block_side(states.device)
    factor, cap = logit_settings(model)
    return _TokenLogProbs.apply(states, weight, targets, temperature / factor, cap, side)  # [M]


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] of M rows, by blocks [side, side] of the logits.

    Backward, p the softmax and g the incoming gradient: d logits = g (onehot - p) / temperature.
    The logits are made again, a fourth matrix product beside three, but a block is changed in place
    in the cache where autograd writes five [M, V] to memory: on a CPU it is the faster way.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, temperature, cap, side):
        logp, lse = states.new_empty(len(states)), states.new_empty(len(states))  # [M] both
        for rows in _slices(len(states), side):
            target, parts = torch.zeros_like(lse[rows]), []  # [r], one logsumexp [r] for each block
            for columns in _slices(len(weight), side):
                logits = _logits(states[rows], weight[columns], temperature, cap)  # [r, c]
                here, index = _inside(targets[rows], columns)  # [h] both
                target[here] = logits[here, index]
                top = logits.amax(-1)  # [r]
                parts.append(logits.sub_(top[:, None]).exp_().sum(-1).log_() + top)  # [r]
            lse[rows] = torch.stack(parts).logsumexp(0)  # [r]
            logp[rows] = target - lse[rows]  # [r]
        ctx.save_for_backward(states, weight, targets, lse)
        ctx.settings = temperature, cap, side, torch.is_autocast_enabled(states.device.type)
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        states, weight, targets, lse = ctx.saved_tensors
        temperature, cap, side, bf16 = ctx.settings
        g = g / temperature  # [M]
        d_states = torch.zeros_like(states)  # [M, d]
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # [V, d]
        with torch.autocast(states.device.type, torch.bfloat16, enabled=bf16):
            for rows in _slices(len(states), side):
                for columns in _slices(len(weight), side):
                    logits = _logits(states[rows], weight[columns], temperature, cap)  # [r, c]
                    slope = None if cap is None else 1 - (logits * (temperature / cap)).square_()  # [r, c] of cap·tanh
                    d_logits = logits.sub_(lse[rows, None]).exp_().mul_(-g[rows, None])  # [r, c]
                    here, index = _inside(targets[rows], columns)  # [h] both
                    d_logits[here, index] += g[rows][here]
                    d_logits = d_logits if slope is None else d_logits.mul_(slope)  # [r, c]
                    d_states[rows] += d_logits @ weight[columns]  # [r, d]
                    if d_weight is not None:
                        d_weight[columns] += d_logits.T @ states[rows]  # [c, d]
        return d_states, d_weight, None, None, None, None


def _slices(length, size):
    return [slice(start, start + size) for start in range(0, length, size)]


def _inside(targets, columns):
    """Rows whose target is in this slice of columns, and its place there: [h] both."""
    here = ((targets >= columns.start) & (targets < columns.stop)).nonzero()[:, 0]  # [h]
    return here, targets[here] - columns.start


def _logits(states, weight, temperature, cap):
    """Logits over the temperature for a part of the vocabulary: [r, d] and [c, d] -> [r, c]."""
    logits = at_least_float32(F.linear(states, weight))  # [r, c]
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits if temperature == 1 else logits.div_(temperature)  # [r, c]
