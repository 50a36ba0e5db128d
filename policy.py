"""What the losses need of a language model: sample, score, hidden states. Any Hugging Face causal LM.

Every function takes P prompts (lists of token ids) and N completions of each; a prompt goes through the model once:

    cache = prompt[:-1] through the model                       # [P, L-1], left-padded
    row   = prompt[-1], y_1 … y_{T-1} after a copy of the cache # predicts y_1 … y_T
    log_probs[p, n, t] = log softmax(head(hidden[p, n, t]) / temperature)[y_t]

Gradients flow through the copied cache, so values and gradients are those of the plain forward (a test holds that for
Llama, Gemma-3 and Qwen-3); the K·G completions of a question cost K prompts, not K·K·G. The temperature divides the
logits here, in sampling and scoring alike: a ratio or a score is about the distribution that was sampled from.

Logits exist for a block of completion tokens and vocabulary at a time, never for prompts or padding, and are made
again in the backward pass: a [rows, T, V] tensor would take more memory than the model.

To copy: it needs torch, transformers, the class InputError, and checkpoint.written_whole.
"""

import contextlib
import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from checkpoint import written_whole
from data import InputError

LOGITS_PER_CHUNK = 2**22  # elements of the largest block of logits: 16 MB in a CPU's cache; 16 times as many on a GPU
# Rows are sorted by length and sent so many at a time: fewer waste less on padding, more keep a processor busy. Of 16,
# 32 and 64, 32 is best for all terms of the embedded model together on two threads, and nearly so for GRPO alone.
ROWS_PER_FORWARD = 32  # on a CPU; a GPU gets twice as many
TOKENS_PER_CHECK = 16  # `_decode_static` asks so often whether all rows have ended: the GPU idles while it answers
PLAIN_TEMPLATE = (  # for a base model: "User: 2 + 3?\n\nAssistant:"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass
class Completions:
    """N sampled completions of each of P prompts, padded on the right."""

    tokens: torch.Tensor  # [P, N, T] int64
    mask: torch.Tensor  # [P, N, T] bool, True on completion tokens, the end token among them
    truncated: torch.Tensor  # [P, N] bool, True where no end token came within max_new_tokens
    entropy: torch.Tensor  # [P, N] mean over tokens of the entropy of the next-token distribution, nats

    def __post_init__(self):
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"expected tokens and a bool mask, both [P, N, T]; got {list(self.tokens.shape)} and "
                f"{list(self.mask.shape)} of {self.mask.dtype}"
            )


def load_model(name: str, device, bf16: bool = False, recompute_rows: int | None = None):
    """(model, tokenizer) of a folder or a hub id, in float32, dropout off. Raises InputError with one line.

    Weights only as safetensors, and no code of the repository's own: a checkpoint is data here, never a program.
    A tokenizer without a chat template gets a plain one, and a line on stdout says so.

    Two attributes of the model say how its forwards run, and change nothing else: `bf16` (see `autocast`), and
    `recompute_rows` (see `hidden_states`).
    """
    try:
        if (Path(name) / "adapter_config.json").is_file():  # without peft the library would leave it out in silence
            raise ValueError("it holds an adapter, which has to be merged first (final/ of a run is)")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
        if lost := sorted(info["missing_keys"]) + sorted(str(m[0]) for m in info["mismatched_keys"]):
            raise ValueError(f"{len(lost)} tensors are missing or of another shape, the first is {lost[0]}")
        if tokenizer.vocab_size > len(model.get_input_embeddings().weight):
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, the model fewer")
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer names no end token")
        eos_ids(model, tokenizer)
        model = model.to(device).eval()  # eval for good: no dropout, and the cache stays on
        check_model(model)
    except torch.OutOfMemoryError:  # not the folder's fault
        raise
    except Exception as error:  # the library raises OSError, ValueError, KeyError, SafetensorError, … for bad folders
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--model: {name}: {reason}; a folder or hub id of a causal language model in safetensors is accepted"
        ) from None
    tags = "<reasoning> </reasoning> <answer> </answer>"
    if tokenizer.decode(tokenizer(tags, add_special_tokens=False)["input_ids"], skip_special_tokens=True) != tags:
        raise InputError(f"--model: {name}: its tokenizer loses {tags}; one that keeps them as text is accepted")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        print(f"--model {name} has no chat template: it is prompted by 'User: …' and 'Assistant:'", flush=True)
    model.bf16, model.recompute_rows = bf16, recompute_rows
    return model, tokenizer


def add_lora(model, rank: int, seed: int):
    """The model with LoRA adapters on all linear layers but the head (a peft.PeftModel): they alone train.

    alpha is twice the rank, as TRL has it; no dropout. B is 0 at first: the model is its own reference, and remains it
    with the adapters off. The frozen weights need no bits for small updates: with `bf16` they are kept in bfloat16.
    """
    try:
        import peft
    except ImportError:
        raise InputError("--lora-rank: needs the library peft (pip install peft); 0 is accepted without it") from None
    for parameter in model.parameters() if model.bf16 else ():  # the buffers are rotary frequencies: float32 they stay
        parameter.data = parameter.data.bfloat16()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=2 * rank)
    return peft.get_peft_model(model, settings).eval()


@contextlib.contextmanager
def at_start(model, reference):
    """The policy at the start of training: the frozen copy `reference`, or where that is None `model` less adapters."""
    with contextlib.nullcontext() if reference else model.disable_adapter():
        yield reference or model


def save(model, tokenizer, folder) -> None:
    """Write folder/final, a model like any other; of LoRA the adapters merged, and alone in folder/adapter."""
    if hasattr(model, "merge_and_unload"):
        with written_whole(folder / "adapter") as aside:
            model.save_pretrained(aside, save_embedding_layers=False)
        model = model.float().merge_and_unload()
    with written_whole(folder / "final") as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def autocast(function):
    """Run `function(model, ...)` with bfloat16 matrix products where `model.bf16` is on.

    Weights, gradients and optimiser stay float32. bfloat16 keeps 8 bits: next to a weight of 0.02 its nearest neighbour
    is 1e-4 away, and AdamW's updates of the size of the learning rate, 1e-6, would be rounded away, one and all.
    """

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "bf16", False)):
            return function(model, *args, **kwargs)

    return run


def forward_bytes(model) -> tuple[float, float]:
    """Bytes a token of a completion takes: (activations kept for the backward pass, keys and values of the cache).

    Measured, for any architecture: what two forwards of different lengths have autograd save, weights aside.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(length):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layers, _, _ = autocast(_prefill)(model, [[1] * (length + 1)])
        kept = sum(s.nbytes() for address, s in storages.items() if address not in weights)
        return kept, sum(keys.nbytes + values.nbytes for keys, values in layers)

    (short, short_cache), (long, long_cache) = kept(16), kept(80)
    return (long - short) / 64, (long_cache - short_cache) / 64


def prompt_limit(model, new_tokens: int) -> int:
    """The most tokens of a prompt that leave room for `new_tokens` in the model's context."""
    return (getattr(model.config, "max_position_embeddings", None) or 2**20) - new_tokens


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: Gemma-3 has <eos> and <end_of_turn>, and lists both in its generation config."""
    ids = model.generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError("neither the generation config nor the tokenizer names an end token")
    return sorted(set(ids))


def head(model, hidden):
    """Logits [..., V] of hidden states [..., d], in float32 (or float64), before the temperature."""
    logits = model.get_output_embeddings()(hidden)  # [..., V]
    logits = _at_least_float32(logits)  # [..., V]
    cap = _softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)  # [..., V]


def _softcap(model):
    return getattr(model.config, "final_logit_softcapping", None)


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_model(model) -> None:
    """Raises ValueError for weights or logits that are not finite, and for an architecture whose logits `head` would
    get wrong (some scale them in their forward)."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"its weights {name} are not finite")
    ids = torch.arange(1, 9, device=model.device)[None]  # [1, 8]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state  # [1, 8, d]
        logits = head(model, hidden)  # [1, 8, V]
        if not logits.isfinite().all():
            raise ValueError("its logits are not finite")
        if not torch.allclose(logits, model(input_ids=ids).logits.float(), rtol=1e-2, atol=1e-2):
            raise ValueError(f"{type(model).__name__} treats its logits in a way that policy.head does not know")


# ----------------------------------------------------------------------------------------------------------------------
# The shared prefix


def _prefill(model, prompts: list[list[int]]):
    """All but the last token of each prompt through the model: (keys and values by layer, mask [P, L-1], last [P])."""
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError("expected at least one prompt, each of at least two tokens")
    length = max(map(len, prompts)) - 1
    ids = torch.tensor([[p[0]] * (length + 1 - len(p)) + p[:-1] for p in prompts], device=model.device)  # [P, L-1]
    start = torch.tensor([length + 1 - len(p) for p in prompts], device=model.device)  # [P]
    mask = torch.arange(length, device=model.device) >= start[:, None]  # [P, L-1]
    cache = DynamicCache()  # made without the config, so that sliding-window layers keep all: a row needs its position
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [P, L-1]
    model.get_decoder()(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
    )
    last = torch.tensor([p[-1] for p in prompts], device=model.device)  # [P]
    return [(layer.keys, layer.values) for layer in cache.layers], mask, last


def _copy_cache(layers, rows, room: int = 0) -> DynamicCache:
    """A cache whose row r continues prompt rows[r]. index_select: the gradient of keys[rows] is not deterministic."""
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        keys, values = (states.index_select(0, rows) for states in layer)  # [R, H, L-1, D]
        if room:
            cache.layers.append(_RoomyLayer(keys, values, room))
        else:
            for states in (keys, values) if keys.requires_grad else ():
                states.register_hook(torch.Tensor.contiguous)  # adding up rows of a strided gradient is 4 times slower
            cache.update(keys, values, index)
    return cache


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


class _RoomyLayer(DynamicLayer):
    """Keys and values [R, H, L, D] with room for the tokens to come: a DynamicLayer copies all of itself for each."""

    def __init__(self, keys, values, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length, self.room = keys.shape[2], (F.pad(keys, (0, 0, 0, room)), F.pad(values, (0, 0, 0, room)))
        self.keys, self.values = keys, values  # [R, H, L, D]: the filled part of the room

    def update(self, keys, values, *args, **kwargs):
        start, self.length = self.length, self.length + keys.shape[2]
        for room, new in zip(self.room, (keys, values), strict=True):
            room[:, :, start : self.length] = new  # [R, H, 1, D]
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)  # [R, H, L, D]
        return self.keys, self.values

    def batch_select_indices(self, rows):
        self.room = tuple(room.index_select(0, rows) for room in self.room)  # [rows, H, L + room, D]
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)  # [rows, H, L, D]


class _FixedLayer(StaticLayer):
    """The library's layer of one size, whose length is a tensor; it takes keys and values of one dtype only."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values)


def uniform_numbers(names: list[str], *shape: int, device="cpu"):
    """Random numbers in [0, 1), [len(names), *shape] in float64: a row is a function of its name and nothing else.

    So what is sampled for a question does not depend on the batch it is in, on the device, or on how many processes
    share the work.
    """
    seeds = [random.Random(name).getrandbits(63) for name in names]
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows).to(device)  # [len(names), *shape]


@torch.no_grad()
@autocast
def sample(model, prompts, uniform, temperature, eos, pad_id, cuda_graphs: bool = False) -> Completions:
    """Sample N completions of at most T tokens of each prompt from softmax(logits / temperature), nothing truncated.

    prompts: P lists of token ids. uniform: [P, N, T] float64 in [0, 1); token t of a completion is where the cumulated
    probabilities pass its number, so a completion is a function of its prompt and its numbers. eos: the ids that end
    a completion (see eos_ids). No top-k or top-p: then the scores of a sample are exactly its log-probability.
    cuda_graphs: see `_decode_static`; the same completions, up to rounding.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if uniform.ndim != 3 or len(uniform) != len(prompts) or uniform.dtype != torch.float64:
        raise ValueError(f"expected float64 [P={len(prompts)}, N, T], got {uniform.dtype} {list(uniform.shape)}")
    shape = uniform.shape[:2]
    layers, prefix_mask, last = _prefill(model, prompts)
    if torch.is_autocast_enabled(model.device.type):  # the cache made float32 of it: not to be rounded for each token
        layers = [tuple(states.bfloat16() for states in layer) for layer in layers]
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(shape[1])  # [R] the prompt of each row
    start = layers, rows, prefix_mask[rows], last[rows]
    ends = torch.tensor(eos, dtype=torch.long, device=model.device)  # [number of end tokens]
    decode = _decode_static if cuda_graphs else _decode
    tokens, lengths, entropy, truncated = decode(model, *start, uniform.flatten(0, 1), temperature, ends, pad_id)
    if not entropy.isfinite().all():
        raise FloatingPointError("the distribution of the next token is not finite")
    width = int(lengths.max())
    return Completions(
        tokens[:, :width].reshape(*shape, width),  # [P, N, T]
        (torch.arange(width, device=model.device) < lengths[:, None]).reshape(*shape, width),  # [P, N, T]
        truncated.reshape(shape),  # [P, N]
        (entropy / lengths).reshape(shape),  # [P, N]
    )


def _draw(model, hidden, uniform, temperature):
    """The token that each row's number falls on, and the entropy it was drawn at: hidden [A, d], uniform [A, 1]."""
    logp = F.log_softmax(head(model, hidden) / temperature, dim=-1)  # [A, V]
    probs = logp.exp()  # [A, V]
    passed = probs.double().cumsum(-1)  # [A, V] in float64: rare tokens of a large vocabulary keep their share
    token = torch.searchsorted(passed, uniform * passed[:, -1:], right=True)[:, 0]  # [A]
    token = token.clamp(max=logp.shape[-1] - 1)  # [A] NaN falls behind the last: `sample` tells, once all is drawn
    return token, -(probs * logp.clamp(min=-1e30)).sum(-1)  # [A] both; 0 · -inf would be NaN


def _decode(model, layers, rows, mask, inputs, uniform, temperature, ends, pad_id):
    """tokens [R, T], lengths, summed entropies and truncated [R] of completions with the numbers uniform [R, T].

    Row r continues prompt rows[r]: mask [R, L-1] on the tokens in the cache `layers`, inputs [R] the prompt's last one.
    Rows that have ended leave the batch as soon as they are an eighth of it: a long completion does not make the others
    cost, and the cache is not copied for each that ends.
    """
    num_rows, max_new_tokens = uniform.shape
    cache = _copy_cache(layers, rows, room=max_new_tokens)
    active = torch.arange(num_rows, device=uniform.device)  # [A] the rows in the batch
    running = torch.ones_like(active, dtype=torch.bool)  # [A] those of them that have not ended
    tokens = torch.full((num_rows, max_new_tokens), pad_id, device=uniform.device)  # [R, T]
    lengths = torch.zeros_like(active)  # [R]
    entropy = torch.zeros(num_rows, device=uniform.device)  # [R]
    for t in range(max_new_tokens):
        mask = F.pad(mask, (0, 1), value=True)  # [A, L+t]
        hidden = model.get_decoder()(
            input_ids=inputs[:, None],
            attention_mask=mask.long(),
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # [A, 1, d]
        inputs, nats = _draw(model, hidden[:, -1], uniform[active, t, None], temperature)  # [A] both
        tokens[active, t] = inputs.where(running, pad_id)
        lengths[active] += running
        entropy[active] += nats * running
        running &= ~torch.isin(inputs, ends)  # [A]
        left = int(running.sum())
        if not left:
            break
        if left <= len(running) * 7 // 8:
            keep = running.nonzero()[:, 0]  # [A']
            active, inputs, mask, running = active[keep], inputs[keep], mask[keep], running[keep]
            cache.batch_select_indices(keep)
    truncated = torch.zeros(num_rows, dtype=torch.bool, device=uniform.device)  # [R]
    truncated[active] = running
    return tokens, lengths, entropy, truncated


def _decode_static(model, layers, rows, mask, inputs, uniform, temperature, ends, pad_id):
    """As `_decode`, by a step whose tensors keep shape and place, which a GPU captures once and then replays.

    A step of a 1B model is more than a thousand kernels, which Python launches more slowly than a fast GPU runs them.
    In exchange attention reads the room of all T tokens, and a row that has ended is decoded on until all have: a
    smaller batch would have to be captured anew. No `int(tensor)` and no tensor made on the host may stand in `step`.
    """
    num_rows, max_new_tokens = uniform.shape
    cache = Cache(layers=[_FixedLayer(mask.shape[1] + max_new_tokens) for _ in layers])
    for index, layer in enumerate(layers):
        cache.update(*(states.index_select(0, rows) for states in layer), index)  # [R, H, L-1, D] both
    position = mask.sum(1, keepdim=True)  # [R, 1]
    mask = F.pad(mask, (0, max_new_tokens), value=True).long()  # [R, L-1+T]: causality hides those to come
    t = torch.zeros(1, dtype=torch.long, device=uniform.device)  # [1]
    tokens = torch.full((num_rows, max_new_tokens), pad_id, device=uniform.device)  # [R, T]
    lengths = torch.zeros_like(inputs)  # [R]
    running = torch.ones_like(inputs, dtype=torch.bool)  # [R]
    entropy = torch.zeros(num_rows, device=uniform.device)  # [R]

    def step():
        hidden = model.get_decoder()(
            input_ids=inputs[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state  # [R, 1, d]
        token, nats = _draw(model, hidden[:, -1], uniform.index_select(1, t), temperature)  # [R] both
        tokens.index_copy_(1, t, token.masked_fill(~running, pad_id)[:, None])
        lengths.add_(running)
        entropy.add_(nats * running)
        running.logical_and_((token[:, None] != ends).all(1))
        inputs.copy_(token)
        position.add_(1)
        t.add_(1)

    step()  # before capture: libraries set themselves up in their first call
    if uniform.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads (NCCL's) may call CUDA
            step()
        step = graph.replay
    for done in range(1, max_new_tokens):
        if done % TOKENS_PER_CHECK == 0 and not running.any():
            break
        step()
    return tokens, lengths, entropy, running


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


@autocast
def hidden_states(model, prompts, completions_tokens, mask, rows_per_forward: int | None = None):
    """Final hidden states [P, N, T, d] at the positions that predict each completion token; zero where mask is False.

    prompts: P lists of token ids. completion tokens and mask: [P, N, T], padded on the right (masks are prefixes).

    With `model.recompute_rows` set, that many rows go through the model at a time and their activations are not kept,
    but made again in the backward pass (which is GradCache, arXiv 2101.06983, by torch's own checkpointing): memory no
    longer grows with P and N. The library's checkpointing is per layer, and would drop the cache of the prompts.
    """
    recompute = getattr(model, "recompute_rows", None)
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if recompute else _call
    tokens = completions_tokens
    if tokens.ndim != 3 or tokens.shape[0] != len(prompts) or mask.shape != tokens.shape:
        raise ValueError(
            f"expected tokens and mask [P={len(prompts)}, N, T], got {list(tokens.shape)} and {list(mask.shape)}"
        )
    num, per_prompt, width = tokens.shape
    layers, prefix_mask, last = run(_prefill, model, prompts)
    inputs = torch.cat([last[:, None, None].expand(-1, per_prompt, 1), tokens[..., :-1]], -1)  # [P, N, T]
    inputs, lengths = inputs.reshape(-1, width), mask.sum(-1).flatten()  # [R, T], [R]
    order = lengths.argsort(descending=True, stable=True)  # [R]
    rows_per_forward = rows_per_forward or ROWS_PER_FORWARD * (1 if tokens.device.type == "cpu" else 2)

    def forward(rows):
        length = max(int(lengths[rows[0]]), 1)  # the longest of the block
        prompt = rows // per_prompt  # [rows]
        seen = prefix_mask[prompt]  # [rows, L-1]
        positions = seen.sum(1, keepdim=True) + torch.arange(length, device=rows.device)  # [rows, length]
        hidden = model.get_decoder()(
            input_ids=inputs[rows, :length],
            attention_mask=F.pad(seen, (0, length), value=True).long(),
            position_ids=positions,
            past_key_values=_copy_cache(layers, prompt),
            use_cache=True,
        ).last_hidden_state  # [rows, length, d]
        hidden = _at_least_float32(hidden).masked_fill(~mask.flatten(0, 1)[rows, :length, None], 0)  # [rows, length, d]
        return F.pad(hidden, (0, 0, 0, width - length))  # [rows, T, d]

    size = min(rows_per_forward, recompute or rows_per_forward)
    blocks = [run(forward, rows) for rows in order.split(size)]  # [rows, T, d] each
    return torch.cat(blocks).index_select(0, order.argsort()).reshape(num, per_prompt, width, -1)  # [P, N, T, d]


def _call(function, *args):
    return function(*args)


def block_side(device) -> int:
    """Rows, and columns, of the blocks of logits in `log_probs`."""
    return math.isqrt(LOGITS_PER_CHUNK * (1 if device.type == "cpu" else 16))


@autocast
def log_probs(model, hidden, tokens, mask, temperature, logits_per_chunk: int | None = None):
    """Log-probability of each token under softmax(head(hidden) / temperature): tokens' shape, nats, 0 off the mask.

    hidden: [..., d]; tokens and mask: [...]. The logits of at most `logits_per_chunk` elements exist at a time, by
    default 2**22 on a CPU and 2**26 on a GPU.
    """
    if hidden.shape[:-1] != tokens.shape or mask.shape != tokens.shape:
        raise ValueError(
            f"expected hidden [..., d] with tokens and mask [...], got {list(hidden.shape)}, {list(tokens.shape)} "
            f"and {list(mask.shape)}"
        )
    out = model.get_output_embeddings()
    if type(out) is not torch.nn.Linear:
        raise ValueError(f"expected a model whose head is torch.nn.Linear, got {type(out).__name__}")
    where = mask.flatten().nonzero()[:, 0]  # [M]
    states, targets = hidden.flatten(0, -2).index_select(0, where), tokens[mask]  # [M, d], [M]
    weight = out.weight  # [V, d]
    if out.bias is not None:
        states, weight = F.pad(states, (0, 1), value=1), torch.cat([weight, out.bias[:, None]], 1)  # both d + 1
    side = math.isqrt(logits_per_chunk) if logits_per_chunk else block_side(states.device)
    flat = _TokenLogProbs.apply(states, weight, targets, temperature, _softcap(model), side)  # [M]
    return flat.new_zeros(tokens.shape).masked_scatter(mask, flat)  # [...]


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] of M rows, by blocks [side, side] of the logits in both directions.

    Backward, p the softmax and g the incoming gradient: d logits = g (onehot - p) / temperature. The logits are made
    again, a fourth matrix product beside the three of the plain way, and yet it is the faster way on a CPU: a block is
    changed in place, in the cache, where autograd writes five tensors [M, V] to memory.
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
    """(rows whose target is in this slice of columns, its place in it), [h] both."""
    here = ((targets >= columns.start) & (targets < columns.stop)).nonzero()[:, 0]  # [h]
    return here, targets[here] - columns.start


def _logits(states, weight, temperature, cap):
    """What `head` makes of some of the vocabulary, over the temperature: states [r, d], weight [c, d] -> [r, c]."""
    logits = _at_least_float32(F.linear(states, weight))  # [r, c]
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits if temperature == 1 else logits.div_(temperature)  # [r, c]


def cot_mask(tokenizer, tokens, mask, close: str = "</reasoning>"):
    """The mask [..., T] cut after the first token at which the decoded text holds `close`; unchanged where none does.

    Whether position t is inside depends on tokens up to t alone (a stopping time), so the sum of log-probabilities
    under this mask is the exact log-probability of having written that chain of thought.
    """
    lengths = mask.sum(-1)  # [...]
    spans = []
    for ids, length in zip(tokens.flatten(0, -2).tolist(), lengths.flatten().tolist(), strict=True):
        low, high = 0, length  # `close` is not within the first `low` tokens, and is within `high` if it is anywhere
        while high - low > 1 and close in tokenizer.decode(ids[:length]):
            middle = (low + high) // 2
            low, high = (low, middle) if close in tokenizer.decode(ids[:middle]) else (middle, high)
        spans.append(high)
    spans = torch.tensor(spans, device=mask.device).reshape(lengths.shape)  # [...]
    return torch.arange(mask.shape[-1], device=mask.device) < spans[..., None]  # [..., T]
