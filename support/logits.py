"""Logits of hidden states, for sampler and scorer alike, and the precision of matrix products.

    logits_v = cap · tanh(factor · (hidden · W_v + b_v) / cap) / temperature        v: a token of the vocabulary
             = factor · (hidden · W_v + b_v) / temperature                          without a cap

With `bf16` matrix products are of bfloat16 numbers, but logits are float32 all the same: rounded to
bfloat16, a logit of 40 is off by 0.1, and a log-probability is a small difference of such numbers.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def autocast(device, bf16: bool):
    """A context with bfloat16 matrix products where `bf16` is on.

    Weights, gradients and optimiser stay float32. Next to a weight of 0.02 the nearest bfloat16 is
    1e-4 away: updates of the size of the learning rate, 1e-6, would all be rounded away.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16))


@contextlib.contextmanager
def float32_products(precision: str):
    """A context in which torch.set_float32_matmul_precision(precision) holds."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Logits:
    """The function from hidden states to logits, in float32 or float64: for sampler and scorer alike."""

    factor: float  # Cohere multiplies logits, Granite divides them
    cap: float | None  # Gemma-2 caps them
    temperature: float
    bf16: bool

    def __call__(self, states, weight, bias=None):
        """Logits [r, c] of states [r, d] for c tokens of the vocabulary: weight [c, d], bias [c] or None."""
        states, weight = self.rounded(states), self.rounded(weight)  # [r, d], [c, d]
        if weight.dtype == torch.bfloat16:
            values = _product(states, weight)  # [r, c]
        else:  # a CPU takes float32 numbers, and where it can rounds them itself
            precision = float32_products("medium") if self.bf16 else contextlib.nullcontext()
            with autocast(states.device, False), precision:
                values = F.linear(states, weight)  # [r, c]
        values = values if bias is None else values.add_(bias)  # [r, c]
        if self.cap is not None:
            return values.mul_(self.factor / self.cap).tanh_().mul_(self.cap / self.temperature)  # [r, c]
        return values if self.scale == 1 else values.div_(self.scale)  # [r, c]

    def rounded(self, tensor):
        """The tensor as it enters the product: bfloat16 on a GPU where bf16 is on."""
        return tensor.bfloat16() if self.bf16 and tensor.is_cuda else at_least_float32(tensor)

    def slope(self, values):
        """What the cap makes of a change of the logits `values`: [r, c], or None without a cap."""
        return None if self.cap is None else 1 - (values * (self.temperature / self.cap)).square_()  # [r, c]

    @property
    def scale(self) -> float:
        """What divides the product, but for the cap."""
        return self.temperature / self.factor


def _product(states, weight):
    """states [r, d] times weight [c, d]^T, both bfloat16, as float32 numbers: [r, c]."""
    try:
        return torch.mm(states, weight.T, out_dtype=torch.float32)  # [r, c]
    except NotImplementedError:  # a device whose library has no such product
        with autocast(states.device, False):
            return states.float() @ weight.float().T  # [r, c]


def logits_of(model, states):
    """Logits [r, V] of hidden states [r, d] at temperature 1."""
    weight, bias, logits = head(model)
    return logits(states, weight, bias)


def head(model, temperature: float = 1.0, bf16: bool = False):
    """(weight [V, d], bias [V] or None, Logits) of a model. Raises ValueError for a head that is more than that."""
    out = model.get_output_embeddings()
    if type(out) is not torch.nn.Linear:
        raise ValueError(f"expected a model whose head is torch.nn.Linear, got {type(out).__name__}")
    config = model.config.get_text_config(decoder=True)
    factor = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return out.weight, out.bias, Logits(factor, cap, temperature, bf16)
