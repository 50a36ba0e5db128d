"""Small random models of three architectures, prompts, and completions that are drawn or written."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support.attention import use_attention
from support.sampling import sample, uniform_numbers

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
PROMPTS = [[1, *range(10, 10 + n)] for n in (11, 4, 7)]  # different lengths: all but the first are padded on the left


def make_model(name, dtype=torch.float64):
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:  # a window of 5 tokens, shorter than the prompts: two sliding layers and a full one
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=kinds))
    for parameter in model.parameters():  # away from the initial symmetry, so that attention matters
        parameter.data += 0.2 * torch.randn_like(parameter)
    use_attention(model)
    return model.to(dtype).eval()


def make_completions(lengths=((6, 3), (1, 9), (4, 4))):
    lengths = torch.tensor(lengths)  # [P, N]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 96, (*lengths.shape, 9), generator=generator)  # [P, N, T]
    return tokens, torch.arange(9) < lengths[..., None]  # [P, N, T] both


def write(model, seed=0, prompts=PROMPTS, num=2, length=12, eos=(2,), temperature=1.0):
    uniform = uniform_numbers([f"{seed} {n}" for n in range(len(prompts))], num, length)  # [P, N, T]
    return sample(model, prompts, uniform, temperature, list(eos), 0)
