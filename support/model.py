"""A language model: loaded, compared with its plain forward, frozen, with LoRA, saved.

    accepted: max |ours - plain| <= 1e-5 + 3e-4 · std(logits)         nats, see check_model
"""

import copy
import itertools
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.attention import use_attention
from support.errors import InputError, check_finite
from support.logits import float32_products, head
from support.prompts import PLAIN_TEMPLATE, context_length, eos_ids
from support.sampling import sample, uniform_numbers
from support.scoring import token_log_probs, token_states
from support.writing import written_whole

CHECK_TOKENS, CHECK_WORK = 2**11, 2**35  # `check_model` reads at most so many tokens, and tokens x parameters
SWITCHES = r"'\w*(?:window|chunk|block|topk|original_max_position)\w*': (\d+)"  # where attention changes


def load_model(name: str, device):
    """(model, tokenizer) of a folder or hub id, in float32, without dropout. Raises InputError.

    Weights are read from safetensors only, and no code of the repository is run: a checkpoint is
    data, not a program. A tokenizer without a chat template gets PLAIN_TEMPLATE, and a line says so.
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
        use_attention(model)
        check_model(model)
    except torch.OutOfMemoryError:  # not the folder's fault
        raise
    except Exception as error:  # of a bad folder the library raises all sorts
        reason = first_line(error) or type(error).__name__
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
    return model, tokenizer


def _unknown_tokens(tokenizer, size: int) -> list[str]:
    """Tokens beyond the model's `size` embeddings that a text may hold.

    A special token is harmless unless the chat template writes it: in a user's text it is refused.
    """
    harmless = {i for i, token in tokenizer.added_tokens_decoder.items()
                if token.special and token.content not in str(tokenizer.chat_template)}
    harmless -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return [token for token, i in tokenizer.get_vocab().items() if i >= size and i not in harmless]


def first_line(error) -> str:
    first, *more = str(error).strip().splitlines() or [""]
    return " ".join([first, more[0].strip()] if first.endswith(":") and more else [first])


def linear_layers(model) -> list:
    """The linear layers but the head: with `bf16`, their weights enter products as bfloat16 and nothing else."""
    return [layer for layer in model.modules()
            if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings()]


def frozen_copy(model, bf16: bool = False):
    """A copy that is not trained. With bf16 its linear layers are bfloat16: it computes the same numbers."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    for layer in linear_layers(frozen) if bf16 else ():
        layer.bfloat16()
    return frozen


def add_lora(model, rank: int, seed: int, bf16: bool = False):
    """A peft.PeftModel with LoRA adapters on all linear layers but the head; only they are trained.

    alpha is twice the rank, as in TRL. B starts at 0: with the adapters off, the model is its own
    reference. With `bf16` all frozen weights, which need no bits for small updates, are bfloat16, embeddings and
    norms too: half the memory of `frozen_copy`'s choice for a large vocabulary, and states about twice as rough.
    """
    try:
        import peft
    except ImportError:
        raise InputError("--lora-rank: needs the library peft (pip install peft); 0 is accepted without it") from None
    for parameter in model.parameters() if bf16 else ():  # not the buffers: rotary frequencies need float32
        parameter.data = parameter.data.bfloat16()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=2 * rank)
    return peft.get_peft_model(model, settings).eval()


def save_model(model, tokenizer, template, folder, card: str) -> None:
    """Write folder/final: model, tokenizer, prompt.json, card. LoRA is merged there, and alone in adapter/."""
    if hasattr(model, "merge_and_unload"):
        with written_whole(folder / "adapter") as aside:
            model.save_pretrained(aside, save_embedding_layers=False)
        model = model.float().merge_and_unload()
    with written_whole(folder / "final") as aside:
        model.save_pretrained(aside)
        try:
            tokenizer.save_pretrained(aside)
        except Exception as error:  # of tokenizers, bare, where the disk is full
            raise OSError(str(error)) from None
        template.save(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")


def has_bf16(device) -> bool:
    """Whether bfloat16 products are faster here: on a GPU, on a CPU with AMX; those of AVX-512 alone are slower."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return device.type == "cuda" or bool(known.get("amx_bf16"))


def check_model(model) -> None:
    """Raises ValueError unless the model samples and scores what its plain forward says.

    Two prompts of different lengths, padded, sampled from and scored from a cache, are compared
    with each row alone, without padding and cache. A recurrent state that has read the padding
    differs there, and so do logits scaled in a way that `head` does not know. The longer row goes
    past each length at which the configuration changes attention, as far as that takes seconds.
    Products are of whole float32 numbers, also where TF32 is on, which is coarser than what is allowed.
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
        with float32_products("highest"):
            error, spread = _distance_from_plain(model, [longest + 3, longest - 4])
    except torch.OutOfMemoryError:
        raise
    except FloatingPointError:
        raise ValueError("its logits are not finite") from None
    except Exception as error:  # whatever an architecture that was not meant for this raises
        raise ValueError(f"{kind} cannot give {wrong} ({type(error).__name__}: {first_line(error)})") from None
    if not error <= 1e-5 + 3e-4 * spread:  # float32 gives 1e-6 to 1e-5 of the spread
        raise ValueError(f"{kind} gives other {wrong} than of each text alone, by {error:.1g} nats")


@torch.no_grad()
def _distance_from_plain(model, lengths) -> tuple[float, float]:
    """(largest distance from the plain forward in nats, mean standard deviation of its logits)."""
    num_tokens, device = len(model.get_input_embeddings().weight), model.device
    # The prompts have one beginning, which goes through the model once.
    prompts = [[(5 + 11 * i + 7 * p * (i > 1)) % num_tokens for i in range(n)] for p, n in enumerate(lengths)]
    uniform = uniform_numbers([f"check {p}" for p in range(len(prompts))], 2, 4, device=device)  # [P, 2, 4]
    out = sample(model, prompts, uniform, 1.0, [], 0)
    mask = out.mask.clone()  # [P, 2, 4]
    mask[:, 1, 2:] = False  # the second completion of each is shorter
    states, places = token_states(model, prompts, out.tokens, mask)  # [M, d], [M]
    targets = out.tokens.flatten()[places]  # [M]
    rows = []
    for p, n in itertools.product(range(len(prompts)), range(2)):
        ids = torch.tensor([prompts[p] + out.tokens[p, n].tolist()], device=device)  # [1, L+4]
        rows.append(model(input_ids=ids, use_cache=False).logits[0, lengths[p] - 1 : -1].float())  # [4, V]
    plain = torch.cat(rows).log_softmax(-1)  # [P·2·4, V]
    weight, bias, logits = head(model)
    distances = [
        (logits(states, weight, bias).log_softmax(-1) - plain[places]).flatten(),  # [M·V]
        token_log_probs(model, states, targets, 1.0) - plain[places].gather(1, targets[:, None])[:, 0],  # [M]
        out.entropy.flatten() + (plain.exp() * plain).sum(-1).reshape(-1, 4).mean(1),  # [P·2]
    ]
    spread = torch.cat(rows).std(-1).mean()  # []
    check_finite("the spread of the logits", spread)
    return torch.cat(distances).abs().max().item(), spread.item()
