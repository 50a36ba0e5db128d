"""What the losses need of a language model: samples, log-probabilities, hidden states.

Any Hugging Face causal LM whose past is keys and values of each token will do; `check_model`
compares it with its plain forward at loading. Every function takes P prompts (lists of token ids)
and N completions of each, and a prompt goes through the model once:

    cache = prompt[:-1] through the model                       # [P, L-1], left-padded
    row   = prompt[-1], y_1 … y_{T-1} after a copy of the cache # predicts y_1 … y_T
    log_probs[p, n, t] = log softmax(head(hidden[p, n, t]) / temperature)[y_t]

Gradients flow through the copied cache, so they too are those of the plain forward. The temperature
divides the logits in sampling and scoring alike: a ratio or a score is about the distribution that
was sampled from. Logits are made for a block of completion tokens and of the vocabulary at a time,
and again in the backward pass: all of them, [R, T, V], would take more memory than the model.

To copy: it needs torch, transformers, data.InputError, data.render and checkpoint.written_whole.
"""

import contextlib
import functools
import inspect
import itertools
import math
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from checkpoint import written_whole
from data import InputError, render

LOGITS_PER_CHUNK = 2**22  # elements of a block of logits: 16 MB in a CPU's cache; a GPU gets 16 times as many
# Rows that go through the model together: few waste less on padding, many keep a processor busy.
# Of 16, 32 and 64, 32 is the best for all terms of the embedded model together on two threads.
ROWS_PER_FORWARD = 32  # on a CPU; a GPU gets twice as many
CHECK_TOKENS, CHECK_WORK = 2**11, 2**35  # `check_model` reads at most so many tokens, and tokens x parameters
# What a configuration calls the length of its context; where there are several, the first counts.
CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions", "n_ctx",
    "seq_length", "context_length",
)
SWITCHES = r"'\w*(?:window|chunk|block|topk|original_max_position)\w*': (\d+)"  # where attention changes
PREFILL_TOKENS = 8192  # of prompts in one forward; a quarter of it where activations are recomputed
PLAIN_TEMPLATE = (  # for a base model: "User: 2 + 3?\n\nAssistant:"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class NotFinite(FloatingPointError):
    """Training has diverged: a number is not finite. `terms` are those of the loss, where known."""

    def __init__(self, message: str, terms: dict | None = None):
        super().__init__(message)
        self.terms = {name: float(torch.as_tensor(value).detach()) for name, value in (terms or {}).items()}


def check_finite(name: str, tensor, terms: dict | None = None) -> None:
    """Raises NotFinite where `tensor` holds a number that is not finite."""
    if not tensor.isfinite().all():
        raise NotFinite(f"{name} is {tensor.item() if tensor.numel() == 1 else 'not finite'}", terms)


@contextlib.contextmanager
def diverging():
    """Turns the ValueError of a loss without a finite value into NotFinite."""
    try:
        yield
    except ValueError as error:
        raise NotFinite(str(error)) from None


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
    """(model, tokenizer) of a folder or hub id, in float32, without dropout. Raises InputError.

    Weights are read from safetensors only, and no code of the repository is run: a checkpoint is
    data, not a program. A tokenizer without a chat template gets PLAIN_TEMPLATE, and a line says
    so. Two attributes of the model say how it runs: `bf16` (see `autocast`) and `recompute_rows`
    (see `token_states`).
    """
    try:
        if (Path(name) / "adapter_config.json").is_file():  # without peft the library would leave it out in silence
            raise ValueError("it holds an adapter, which has to be merged first (final/ of a run is)")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
        if lost := sorted(info["missing_keys"]) + sorted(str(m[0]) for m in info["mismatched_keys"]):
            raise ValueError(f"{len(lost)} tensors are missing or of another shape, the first is {lost[0]}")
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer names no end token")
        size = len(model.get_input_embeddings().weight)
        if lost := _unknown_tokens(tokenizer, size):
            raise ValueError(f"its tokenizer has tokens that the model, with {size}, has not, the first is {lost[0]!r}")
        eos_ids(model, tokenizer)  # raises for ends that are no numbers
        model = model.to(device).eval()  # eval for good: no dropout, and the cache stays on
        check_model(model)
    except torch.OutOfMemoryError:  # not the folder's fault
        raise
    except Exception as error:  # of a bad folder the library raises all sorts
        reason = _first_line(error) or type(error).__name__
        raise InputError(
            f"--model: {name}: {reason}; a folder or hub id of a causal language model in safetensors is accepted"
        ) from None
    tags = "<reasoning> </reasoning> <answer> </answer>"
    if tokenizer.decode(tokenizer(tags, add_special_tokens=False)["input_ids"]) != tags:
        raise InputError(f"--model: {name}: its tokenizer loses {tags}; one that keeps them as text is accepted")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:  # padding is masked: any id will do
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        print(f"--model {name} has no chat template: it is prompted by 'User: …' and 'Assistant:'", flush=True)
    model.bf16, model.recompute_rows = bf16, recompute_rows
    return model, tokenizer


def _unknown_tokens(tokenizer, size: int) -> list[str]:
    """Tokens beyond the model's `size` embeddings that a text may hold.

    A special token is harmless unless the chat template writes it: in a user's text it is refused.
    """
    harmless = {i for i, token in tokenizer.added_tokens_decoder.items()
                if token.special and token.content not in str(tokenizer.chat_template)}
    harmless -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return [token for token, i in tokenizer.get_vocab().items() if i >= size and i not in harmless]


def _first_line(error) -> str:
    first, *more = str(error).strip().splitlines() or [""]
    return " ".join([first, more[0].strip()] if first.endswith(":") and more else [first])


def add_lora(model, rank: int, seed: int):
    """A peft.PeftModel with LoRA adapters on all linear layers but the head; only they are trained.

    alpha is twice the rank, as in TRL. B starts at 0: with the adapters off, the model is its own
    reference. With `bf16` the frozen weights, which need no bits for small updates, are bfloat16.
    """
    try:
        import peft
    except ImportError:
        raise InputError("--lora-rank: needs the library peft (pip install peft); 0 is accepted without it") from None
    for parameter in model.parameters() if model.bf16 else ():  # not the buffers: rotary frequencies need float32
        parameter.data = parameter.data.bfloat16()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=2 * rank)
    return peft.get_peft_model(model, settings).eval()


@contextlib.contextmanager
def frozen_start(model, reference):
    """The policy at the start: `reference`, or where that is None `model` with its adapters off."""
    with contextlib.nullcontext() if reference else model.disable_adapter():
        yield reference or model


def save(model, tokenizer, folder, card: str) -> None:
    """Write folder/final: model, tokenizer, card. LoRA is merged there, and alone in adapter/."""
    if hasattr(model, "merge_and_unload"):
        with written_whole(folder / "adapter") as aside:
            model.save_pretrained(aside, save_embedding_layers=False)
        model = model.float().merge_and_unload()
    with written_whole(folder / "final") as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")


def autocast(function):
    """Run `function(model, ...)` with bfloat16 matrix products where `model.bf16` is on.

    Weights, gradients and optimiser stay float32. Next to a weight of 0.02 the nearest bfloat16 is
    1e-4 away: updates of the size of the learning rate, 1e-6, would all be rounded away.
    """

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "bf16", False)):
            return function(model, *args, **kwargs)

    return run


def has_bf16(device) -> bool:
    """Whether bfloat16 products are faster here: on a GPU, on a CPU with instructions for them."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return device.type == "cuda" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def context_length(model) -> int:
    """Tokens that the model can read; 2^20 where its configuration does not say."""
    config = model.config.get_text_config(decoder=True)  # of a model that also reads images, the language part
    lengths = (getattr(config, name, None) for name in CONTEXT_NAMES)
    return next((n for n in lengths if isinstance(n, int)), 2**20)


def prompt_limit(model, new_tokens: int) -> int:
    """The most tokens of a prompt that leave room for `new_tokens` in the model's context.

    Raises InputError where that is not enough for any prompt.
    """
    context = context_length(model)
    if context < new_tokens + 2:
        raise InputError(f"--max-completion-length: got {new_tokens} tokens after the prompt, and a context of "
                         f"{context}; a lower number is accepted")
    return context - new_tokens


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: of generation config, tokenizer and chat template.

    They may disagree: Gemma-3's generation config lists <eos> and <end_of_turn>. The template's is
    the special token, if any, that it writes after the assistant's text.
    """
    ids = model.generation_config.eos_token_id
    ids = {*([ids] if isinstance(ids, int) else ids or []), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(InputError):  # a template that wants other turns; its first prompt will say so
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "some words"}]
            tail = render(tokenizer, turns, "a turn").rpartition("some words")[2].strip()
            first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
            added = tokenizer.added_tokens_decoder
            ids |= {i for i in first if i in added and added[i].special}
    return sorted(ids)


def head(model, hidden):
    """Logits [..., V] of hidden states [..., d], in float32 or float64, before the temperature."""
    factor, cap = _logit_settings(model)
    logits = _at_least_float32(model.get_output_embeddings()(hidden)) * factor  # [..., V]
    return logits if cap is None else cap * torch.tanh(logits / cap)  # [..., V]


def _logit_settings(model) -> tuple[float, float | None]:
    """(factor, softcap) of the logits: Cohere multiplies, Granite divides, Gemma-2 caps them."""
    config = model.config.get_text_config(decoder=True)
    factor = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    return factor, getattr(config, "final_logit_softcapping", None)


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_model(model) -> None:
    """Raises ValueError unless the model samples and scores what its plain forward says.

    Two prompts of different lengths, padded, sampled from and scored from a cache, are compared
    with each row alone, without padding and cache. A recurrent state that has read the padding
    differs there, and so do logits scaled in a way that `head` does not know. The longer row goes
    past each length at which the configuration changes attention, as far as that takes seconds.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"its weights {name} are not finite")
    for module in model.modules():  # some rotary frequencies follow the longest text of the batch
        rope = str(getattr(module, "rope_type", ""))  # or one for each type of layer
        factors = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        same = factors.get("short_factor", "") == factors.get("long_factor")
        if "dynamic" in rope or ("longrope" in rope and not same):
            raise ValueError(
                f"its rope_type {rope} moves the positions of a text when it, or one beside it, is long; one "
                "that is the same for every length (default, linear, yarn, llama3; longrope with equal factors) "
                "is accepted"
            )
    size = sum(p.numel() for p in model.parameters()) / (1 if model.device.type == "cpu" else 32)
    most = min(CHECK_TOKENS, CHECK_WORK // size, context_length(model) - 7)
    lengths = re.findall(SWITCHES, str(model.config.get_text_config(decoder=True).to_dict()))
    longest = max((n for n in map(int, lengths) if 8 < n <= most), default=8)
    kind, wrong = type(model).__name__, "samples or scores of padded rows with a cache"
    try:
        error, spread = _distance_from_plain(model, [longest + 3, longest - 4])
    except torch.OutOfMemoryError:
        raise
    except FloatingPointError:
        raise ValueError("its logits are not finite") from None
    except Exception as error:  # whatever an architecture that was not meant for this raises
        raise ValueError(f"{kind} cannot give {wrong} ({type(error).__name__}: {_first_line(error)})") from None
    if not error <= 1e-5 + 3e-4 * spread:  # float32 gives 1e-6 to 1e-5 of the spread
        raise ValueError(f"{kind} gives other {wrong} than of each text alone, by {error:.1g} nats")


@torch.no_grad()
def _distance_from_plain(model, lengths) -> tuple[float, float]:
    """(largest distance from the plain forward in nats, mean standard deviation of its logits)."""
    num_tokens, distances, spreads = len(model.get_input_embeddings().weight), [], []
    # The prompts have one beginning, which goes through the model once.
    prompts = [[(5 + 11 * i + 7 * p * (i > 1)) % num_tokens for i in range(n)] for p, n in enumerate(lengths)]
    uniform = uniform_numbers([f"check {p}" for p in range(len(prompts))], 2, 4, device=model.device)  # [P, 2, 4]
    out = sample(model, prompts, uniform, 1.0, [], 0)
    mask = out.mask.clone()  # [P, 2, 4]
    mask[:, 1, 2:] = False  # the second completion of each is shorter
    hidden = hidden_states(model, prompts, out.tokens, mask)  # [P, 2, 4, d]
    logp = log_probs(model, hidden, out.tokens, mask, 1.0)  # [P, 2, 4]
    for p, n in itertools.product(range(len(prompts)), range(2)):
        ids = torch.tensor([prompts[p] + out.tokens[p, n].tolist()], device=model.device)  # [1, L+4]
        logits = model(input_ids=ids, use_cache=False).logits[0, lengths[p] - 1 : -1].float()  # [4, V]
        plain = logits.log_softmax(-1)  # [4, V]
        distances += [
            (head(model, hidden[p, n]).log_softmax(-1) - plain)[mask[p, n]].flatten(),  # [4·V or 2·V]
            (plain.gather(1, out.tokens[p, n, :, None])[:, 0] - logp[p, n])[mask[p, n]],  # [4 or 2]
            (out.entropy[p, n] + (plain.exp() * plain).sum(-1).mean())[None],  # [1]
        ]
        spreads.append(logits.std(-1).mean())
    spread = torch.stack(spreads).mean()  # []
    check_finite("the spread of the logits", spread)
    return torch.cat(distances).abs().max().item(), spread.item()


# --------------------------------------------------------------------------------------------------
# The shared prefix


def _forward(model, ids, shown, positions, cache):
    """Final hidden states [R, T, d] of ids [R, T] after the S tokens in `cache`, which they join.

    positions: [R, T]. shown: [R, S + T] bool, False on padding.
    """
    decoder = model.get_decoder()
    past = {_cache_name(type(decoder)): cache}
    out = decoder(input_ids=ids, attention_mask=shown.long(), position_ids=positions, use_cache=True, **past)
    return out.last_hidden_state  # [R, T, d]


@functools.cache
def _cache_name(kind) -> str:
    """The argument that takes the cache: transformers 5.24 renames `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def _run(recompute, function, *args):
    """function(*args); with `recompute` its activations are made again in the backward pass."""
    if recompute:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _prefill(model, prompts: list[list[int]], recompute=False):
    """All but the last token of each prompt through the model.

    Returns keys and values [P, H, L-1, D] by layer, their mask [P, L-1], the last tokens [P]. What
    all prompts begin with, such as a system message and examples, goes through the model once.
    """
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError("expected at least one prompt, each of at least two tokens")
    device, common, layers = model.device, [], None
    if len(prompts) > 1:
        common = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 2]  # C tokens
    own = [prompt[len(common) :] for prompt in prompts]
    length = max(map(len, own)) - 1
    ids = torch.tensor([p[:-1] + [p[0]] * (length + 1 - len(p)) for p in own], device=device)  # [P, L-1-C]
    lengths = torch.tensor([len(p) - 1 for p in prompts], device=device)  # [P]
    mask = torch.arange(len(common) + length, device=device) < lengths[:, None]  # [P, L-1]
    if common:
        first = torch.tensor([common], device=device)  # [1, C]
        layers = _run(recompute, _encode, model, first, torch.ones_like(first).bool())
    size = max(1, PREFILL_TOKENS // (4 if recompute else 1) // length)
    groups = [_run(recompute, _encode, model, *part, layers) for part in zip(ids.split(size), mask.split(size))]
    layers = groups[0]
    if len(groups) > 1:
        layers = [tuple(torch.cat(states) for states in zip(*layer)) for layer in zip(*groups)]
    return layers, mask.flip(1), torch.tensor([p[-1] for p in prompts], device=device)  # [P]


def _encode(model, ids, mask, layers=None):
    """Keys and values by layer, [P, H, S, D] both, of the common beginning `layers` and ids [P, L].

    mask: [P, S] bool. Padding is on the right here, and moved to the left at the end: windows and
    ALiBi count the places between two tokens, so it must not stand between tokens of one row.
    """
    cache = _copy_cache(layers or [], torch.zeros(len(ids), dtype=torch.long, device=ids.device))
    width = mask.shape[1]
    positions = torch.arange(width - ids.shape[1], width, device=ids.device).expand_as(ids)  # [P, L]
    _forward(model, ids, mask, positions, cache)
    if mask.all():
        return [(layer.keys, layer.values) for layer in cache.layers]
    padding = (~mask).sum(1, keepdim=True)  # [P, 1]
    places = (torch.arange(width, device=ids.device) - padding) % width  # [P, S]

    def moved(states):  # [P, H, S, D]
        return states.gather(2, places[:, None, :, None].expand_as(states))

    return [(moved(layer.keys), moved(layer.values)) for layer in cache.layers]


def _copy_cache(layers, rows, room: int = 0) -> DynamicCache:
    """A cache whose row r continues prompt rows[r], with `room` for so many more tokens."""
    cache = DynamicCache()  # made without the config, so that sliding-window layers keep all places
    for index, layer in enumerate(layers):
        # not keys[rows], whose gradient is not deterministic
        keys, values = (states.index_select(0, rows) for states in layer)  # [R, H, L-1, D]
        if room:
            cache.layers.append(_RoomyLayer(keys, values, room))
        else:
            for states in (keys, values) if keys.requires_grad else ():
                states.register_hook(torch.Tensor.contiguous)  # adding up rows of a strided gradient is 4 times slower
            cache.update(keys, values, index)
    return cache


# --------------------------------------------------------------------------------------------------
# Sampling


class _RoomyLayer(DynamicLayer):
    """Keys and values [R, H, L, D] with room for more: a DynamicLayer copies all for each token."""

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


def uniform_numbers(names: list[str], *shape: int, device="cpu"):
    """Random numbers in [0, 1), [len(names), *shape], float64. A row depends on its name alone.

    What is sampled for a question thus depends neither on its batch, nor on the device, nor on how
    many processes share the work.
    """
    seeds = [random.Random(name).getrandbits(63) for name in names]
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows).to(device)  # [len(names), *shape]


@torch.no_grad()
@autocast
def sample(model, prompts, uniform, temperature, eos, pad_id) -> Completions:
    """Sample N completions of at most T tokens of each prompt from softmax(logits / temperature).

    uniform: [P, N, T] float64 in [0, 1). Token t is where the cumulated probabilities pass its
    number, so a completion is a function of its prompt and its numbers. eos: the ids that end one
    (see eos_ids). There is no top-k or top-p: the score of a sample is its exact log-probability.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if uniform.ndim != 3 or len(uniform) != len(prompts) or uniform.dtype != torch.float64:
        raise ValueError(f"expected float64 [P={len(prompts)}, N, T], got {uniform.dtype} {list(uniform.shape)}")
    shape = uniform.shape[:2]
    layers, prefix_mask, last = _prefill(model, prompts)
    if torch.is_autocast_enabled(model.device.type):  # rounded once, not for each token
        layers = [tuple(states.bfloat16() for states in layer) for layer in layers]
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(shape[1])  # [R] the prompt of each row
    ends = torch.tensor(eos, dtype=torch.long, device=model.device)  # [number of end tokens]
    tokens, lengths, entropy, truncated = _decode(
        model, layers, rows, prefix_mask[rows], last[rows], uniform.flatten(0, 1), temperature, ends, pad_id
    )
    check_finite("the distribution of the next token", entropy)
    width = int(lengths.max())
    return Completions(
        tokens[:, :width].reshape(*shape, width),  # [P, N, T]
        (torch.arange(width, device=model.device) < lengths[:, None]).reshape(*shape, width),  # [P, N, T]
        truncated.reshape(shape),  # [P, N]
        (entropy / lengths).reshape(shape),  # [P, N]
    )


def _draw(model, hidden, uniform, temperature):
    """Next token and its entropy, [A] both, for hidden [A, d] and uniform [A, 1]."""
    logp = F.log_softmax(head(model, hidden) / temperature, dim=-1)  # [A, V]
    probs = logp.exp()  # [A, V]
    passed = probs.double().cumsum(-1)  # [A, V] in float64: rare tokens of a large vocabulary keep their share
    token = torch.searchsorted(passed, uniform * passed[:, -1:], right=True)[:, 0]  # [A]
    token = token.clamp(max=logp.shape[-1] - 1)  # [A] NaN lands past the last token; `sample` checks at the end
    return token, -(probs * logp.clamp(min=-1e30)).sum(-1)  # [A] both; 0 · -inf would be NaN


def _decode(model, layers, rows, mask, inputs, uniform, temperature, ends, pad_id):
    """tokens [R, T], and lengths, summed entropies, truncated [R], for numbers uniform [R, T].

    Row r continues prompt rows[r]: mask [R, L-1] of its tokens in `layers`, inputs [R] its last
    one. Rows that have ended leave the batch when they are an eighth of it: one long completion
    does not make all cost, and the cache is not copied at each end.
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
        hidden = _forward(model, inputs[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)  # [A, 1, d]
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


# --------------------------------------------------------------------------------------------------
# Scoring


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
    layers, prefix_mask, last = _prefill(model, prompts, recompute)
    inputs = torch.cat([last[:, None, None].expand(-1, per_prompt, 1), tokens[..., :-1]], -1)  # [P, N, T]
    inputs, lengths = inputs.reshape(-1, width), mask.sum(-1).flatten()  # [R, T], [R]
    order = lengths.argsort(descending=True, stable=True)  # [R]
    order = order[: max(1, int((lengths > 0).sum()))]  # [R'] rows without a token are left out
    rows_per_forward = rows_per_forward or ROWS_PER_FORWARD * (1 if tokens.device.type == "cpu" else 2)

    def forward(rows, length, wanted):
        prompt = rows // per_prompt  # [r]
        seen = prefix_mask[prompt]  # [r, L-1]
        positions = seen.sum(1, keepdim=True) + torch.arange(length, device=rows.device)  # [r, length]
        shown = F.pad(seen, (0, length), value=True)  # [r, L-1+length]
        hidden = _forward(model, inputs[rows, :length], shown, positions, _copy_cache(layers, prompt))  # [r, length, d]
        return _at_least_float32(hidden).flatten(0, 1).index_select(0, wanted)  # [m, d]

    states, places = [], []
    for rows in order.split(min(rows_per_forward, recompute or rows_per_forward)):
        length = max(int(lengths[rows[0]]), 1)  # the longest of the block
        wanted = mask.flatten(0, 1)[rows, :length].flatten().nonzero()[:, 0]  # [m] indices into r·length
        states.append(_run(recompute, forward, rows, length, wanted))  # [m, d]
        flat = rows[:, None] * width + torch.arange(length, device=rows.device)  # [r, length]
        places.append(flat.flatten()[wanted])  # [m]
    return torch.cat(states), torch.cat(places)  # [M, d], [M]


def hidden_states(model, prompts, tokens, mask, rows_per_forward: int | None = None):
    """The states of `token_states` in place: [P, N, T, d], 0 off the mask."""
    states, places = token_states(model, prompts, tokens, mask, rows_per_forward)  # [M, d], [M]
    hidden = states.new_zeros(tokens.numel(), states.shape[-1]).index_copy(0, places, states)  # [P·N·T, d]
    return hidden.reshape(*tokens.shape, -1)  # [P, N, T, d]


def decode(tokenizer, tokens, mask, ends, prefill: str = "") -> list:
    """Texts of tokens [..., T] as nested lists: the prefill, then all but the end token.

    Other special tokens stay: a reward must see that "…</answer><|user|>" goes on after the answer.
    """
    if tokens.ndim == 1:
        ids = tokens[mask].tolist()
        return prefill + tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids)
    return [decode(tokenizer, *row, ends, prefill) for row in zip(tokens, mask)]


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
    factor, cap = _logit_settings(model)
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
    logits = _at_least_float32(F.linear(states, weight))  # [r, c]
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits if temperature == 1 else logits.div_(temperature)  # [r, c]


def cot_mask(tokenizer, tokens, mask, close: str = "</reasoning>"):
    """The mask [..., T] up to the first token with which the text holds `close`, or all of it.

    Whether a token is inside depends on it and those before alone, so the sum of log-probabilities
    under this mask is the exact log-probability of having written that chain of thought.
    """
    lengths = mask.sum(-1)  # [...]
    spans = []
    for ids, length in zip(tokens.flatten(0, -2).tolist(), lengths.flatten().tolist(), strict=True):
        low, high = 0, length  # not within the first `low` tokens; within `high` if anywhere
        while high - low > 1 and close in tokenizer.decode(ids[:length]):
            middle = (low + high) // 2
            low, high = (low, middle) if close in tokenizer.decode(ids[:middle]) else (middle, high)
        spans.append(high)
    spans = torch.tensor(spans, device=mask.device).reshape(lengths.shape)  # [...]
    return torch.arange(mask.shape[-1], device=mask.device) < spans[..., None]  # [..., T]
