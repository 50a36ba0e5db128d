"""GRPO with a format reward: the reward, the group advantage and the clipped policy loss.

The equations, in this file's names (N sequences of at most T tokens, A = advantages):

    advantages = rewards - mean(rewards)                 within a group; scale="std": / (std + 1e-4)
    log_ratio  = logp - old_logp                         level="token": one per token
    log_ratio  = mean_t(logp - old_logp)                 level="sequence": one per sequence (GSPO)
    ratio      = exp(log_ratio)
    per_token  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
                 + beta * kl_k3(logp, ref_logp)
    kl_k3      = exp(d) - d - 1,   d = ref_logp - logp

    normalizer="sequence"   mean over sequences of mean_t(per_token)                 TRL's "grpo"
    normalizer="token"      sum(mask * per_token) / sum(mask)                        TRL's "bnpo"
    normalizer="constant"   sum(mask * per_token) / (N * max_tokens)                 TRL's "dr_grpo", ENIGMA's

mean_t is the mean over the tokens of a sequence that the mask selects. With level="sequence" a
sequence's one term stands at each of its tokens before normalising, so "token" and "constant" weigh
a sequence by its length at either level. On-policy both levels have one gradient.

"The ratio is always 1": on the first pass after sampling logp equals old_logp; the gradient is not
zero. "The loss is 0, is it broken?": no, on-policy it is -mean(A), and A sums to 0 within a group
("sequence"). Watch the reward and the gradient norm: the gradient vanishes only where all rewards
of a group are equal.

Sources: DeepSeekMath, arXiv 2402.03300, eq. 3 (GRPO); Dr. GRPO, arXiv 2503.20783 (no std, constant
normaliser); GSPO, arXiv 2507.18071 (sequence ratio); Schulman, "Approximating KL Divergence" (k3).
The format reward and the clip of 0.1 on both sides, here at both levels, are ENIGMA's. Our choice:
log_ratio and d are cut at 20, since exp overflows in float32 at 89, and inf * 0 is a NaN gradient.
Past the cut the gradient is zero: a ratio of e^20 means a broken run, and stats["ratio_max"] shows it.

To copy: needs torch only. `python -m doctest grpo.py` runs this example of two completions:

    >>> texts = ["<reasoning>1 + 1</reasoning> <answer>2</answer>", "2"]
    >>> advantages = group_advantages(torch.tensor([format_reward(text) for text in texts]))
    >>> advantages
    tensor([ 0.5000, -0.5000])
    >>> logp = torch.full((2, 3), -1.0, requires_grad=True)
    >>> loss, stats = grpo_loss(logp, logp, advantages, mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    >>> loss.backward()
    >>> loss.item(), stats["ratio_mean"].item()
    (0.0, 1.0)
    >>> logp.grad
    tensor([[-0.0833, -0.0833, -0.0833],
            [ 0.1250,  0.1250,  0.0000]])
"""

import re

import torch

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
TAG_PATTERN = re.compile("(" + "|".join(TAGS) + ")")
MAX_LOG_RATIO = 20.0


def format_reward(text):
    """1.0 for one <reasoning>…</reasoning>, then one <answer>…</answer>, neither empty; else 0.0.

    text: str, decoded without its end token, which would cost the reward. White space (what
    str.strip removes; a BOM is not) may stand before, between and after the two blocks. A block may
    hold anything but the four tags, and needs a character that is not white space. Tags are exact:
    with upper case, attributes or spaces they are plain text.

    Linear time. Raises TypeError if text is not a str. Source: our choice.
    """
    if not isinstance(text, str):
        raise TypeError(f"format_reward: expected str, got {type(text).__name__}; decode the tokens first")
    pieces = TAG_PATTERN.split(text, maxsplit=len(TAGS))  # a fifth tag stays in the last piece
    blank = [not piece.strip() for piece in pieces[::2]]  # before, reasoning, between, answer, after
    return float(pieces[1::2] == TAGS and blank == [True, False, True, False, True])


def group_advantages(rewards, scale="none"):
    """Rewards minus their group's mean: [..., G] -> [..., G], in the rewards' unit ("std": none).

    scale="none" is Dr. GRPO. scale="std" is DeepSeekMath: also divided by (std + 1e-4), with the
    unbiased std (ddof 1) and TRL's 1e-4. A group of equal rewards, or of one, gets zeros.

    Raises ValueError for rewards that are not floating point, an empty group, an unknown scale, or
    scale="std" with G = 1, where there is no std; FloatingPointError for rewards that are not
    finite (or whose squares overflow, with "std").
    """
    if scale not in ("none", "std"):
        raise ValueError(f'group_advantages: expected scale "none" or "std", got {scale!r}')
    if not rewards.is_floating_point() or rewards.dim() == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"group_advantages: expected floating [..., G], G >= 1, got {_describe(rewards)}")
    if scale == "std" and rewards.shape[-1] == 1:
        raise ValueError('group_advantages: scale="std" expected G >= 2, got G = 1: one reward has no std')
    shifted = rewards - rewards[..., :1]  # [..., G]  equal rewards become 0 exactly: their mean is not rounded
    advantages = shifted - shifted.mean(-1, keepdim=True)  # [..., G]
    spread = advantages if scale == "none" else shifted.std(-1, keepdim=True)  # [..., G] or [..., 1]
    if not spread.isfinite().all():
        got = f"{rewards.min().item()} to {rewards.max().item()}"
        expected = 'expected finite rewards (with "std" finite squares too)'
        raise FloatingPointError(f"group_advantages: {expected}, got {got}")
    return advantages if scale == "none" else advantages / (spread + 1e-4)  # [..., G]


def kl_k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(policy || reference), two [...] -> [...]: nats, never negative.

    exp(d) - d - 1 with d = ref_logp - logp at the sampled tokens. Where they come from the policy
    the value is unbiased. Its gradient for logp, 1 - exp(d) with the samples held fixed, is that of
    the other direction, KL(reference || policy). Above 20 d counts as 20; at ref_logp = -inf the
    value is inf, the gradient finite; NaN stays NaN. Half precision is computed in float32.

    Raises ValueError unless both are floating point and of one shape.
    """
    _expect("kl_k3", logp.shape, logp=logp, ref_logp=ref_logp)
    d = (_upcast(ref_logp) - _upcast(logp)).clamp(max=MAX_LOG_RATIO)  # [...]
    return torch.expm1(d) - d  # [...]  expm1: near d = 0, exp(d) - d - 1 is all rounding, and goes negative


def grpo_loss(
    logp, old_logp, advantages, mask, *, level="sequence", normalizer="sequence", clip_low=0.1, clip_high=0.1,
    max_tokens=None, ref_logp=None, beta=0.0,
):
    """The clipped policy loss of the module docstring, and what to log of it: (loss, stats).

    logp        [N, T]  log-probabilities (nats) of the sampled tokens, at the temperature of sampling, with gradient
    old_logp    [N, T]  the same when they were sampled; a constant, detached here
    advantages  [N]     one per sequence; a constant, detached here
    mask        [N, T]  bool or 0/1: the tokens that count. Elsewhere anything may stand, even NaN
    level       "sequence" (GSPO) or "token" (DeepSeekMath): what one ratio covers
    normalizer  "sequence", "token" or "constant"; only the last needs max_tokens
    ref_logp    [N, T]  under the reference; needed if beta > 0, else only logged; detached here

    loss: 0-dim. A sequence with an empty mask adds zero, and is still one of the N. If all are
    empty the loss is 0 with a zero gradient. "token" divides by the tokens of this call, so
    splitting a batch changes it; the other two are means over sequences. At logp = -inf, a token
    that the policy would never write now, the ratio is 0, in value and gradient.

    stats: 0-dim, detached; means over the sequences or tokens that count, 0 where none does:
        ratio_mean, ratio_max
        clip_fraction  share where the clipped branch is chosen: no policy gradient
        approx_kl      k3 for KL(old policy || policy), nats per token
        kl             k3 for KL(policy || reference), nats per token; only with ref_logp
    approx_kl is inf where logp is -inf at a token, kl where ref_logp is, and NaN where both are.

    Half precision is computed in float32. Raises ValueError for other shapes, dtypes or options, N
    or T of 0, beta > 0 without ref_logp, and "constant" without max_tokens; FloatingPointError for
    a loss that is not finite: NaN at a token that counts, or ref_logp = -inf with beta > 0.
    """
    _check_options(level, normalizer, clip_low, clip_high, max_tokens, ref_logp, beta)
    if logp.dim() != 2 or logp.numel() == 0:
        raise ValueError(f"grpo_loss: expected logp [N, T] with N, T >= 1, got {_describe(logp)}")
    _expect("grpo_loss", logp.shape, logp=logp, old_logp=old_logp, ref_logp=ref_logp)
    _expect("grpo_loss", logp.shape[:1], advantages=advantages)
    _expect("grpo_loss", logp.shape, floating=False, mask=mask)

    # Zeros go in before any arithmetic: multiplied by the mask, NaN would stay NaN.
    mask = mask.bool()  # [N, T]
    logp = torch.where(mask, _upcast(logp), 0.0)  # [N, T]
    old_logp = torch.where(mask, _upcast(old_logp.detach()), 0.0)  # [N, T]
    advantages = _upcast(advantages.detach())[:, None]  # [N, 1]
    length = mask.sum(1, keepdim=True)  # [N, 1]

    # With t = T for level="token", t = 1 for "sequence":
    log_ratio, counts = logp - old_logp, mask  # [N, t]
    if level == "sequence":  # GSPO: the length-normalised ratio
        log_ratio, counts = log_ratio.sum(1, keepdim=True) / length.clamp(min=1), length > 0  # [N, 1]
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()  # [N, t]

    # -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)      DeepSeekMath eq. 3
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [N, t]
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)  # [N, t]

    too_high, too_low = ratio > 1 + clip_high, ratio < 1 - clip_low  # [N, t]
    stopped = (too_high & (advantages > 0)) | (too_low & (advantages < 0))  # [N, t]
    stats = {  # [] each
        "ratio_mean": _masked_mean(ratio, counts),
        "ratio_max": torch.where(counts, ratio.detach(), 0.0).max(),
        "clip_fraction": _masked_mean(stopped.to(ratio.dtype), counts),
        "approx_kl": _masked_mean(kl_k3(old_logp, logp), mask),
    }
    if ref_logp is not None:
        kl = kl_k3(logp, torch.where(mask, _upcast(ref_logp.detach()), 0.0))  # [N, T]
        stats["kl"] = _masked_mean(kl, mask)
        if beta > 0:  # not beta * kl at 0: an infinite kl would make it NaN
            per_token = per_token + beta * kl  # [N, T]

    per_token = torch.where(mask, per_token, 0.0)  # [N, T]  at either level
    if normalizer == "sequence":
        loss = (per_token.sum(1, keepdim=True) / length.clamp(min=1)).mean()  # []
    elif normalizer == "token":
        loss = per_token.sum() / length.sum().clamp(min=1)  # []
    else:
        loss = per_token.sum() / (len(per_token) * max_tokens)  # []
    if not loss.isfinite():  # NaN must not train on
        expected = "expected finite log-probabilities and advantages where the mask is set"
        raise FloatingPointError(f"grpo_loss: {expected}, got a loss of {loss.item()}")
    return loss, stats


def _check_options(level, normalizer, clip_low, clip_high, max_tokens, ref_logp, beta):
    if level not in ("sequence", "token"):
        raise ValueError(f"grpo_loss: expected level sequence or token, got {level!r}")
    if normalizer not in ("sequence", "token", "constant"):
        raise ValueError(f"grpo_loss: expected normalizer sequence, token or constant, got {normalizer!r}")
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        got = f"{clip_low} and {clip_high}"
        raise ValueError(f"grpo_loss: expected 0 <= clip_low <= 1 and clip_high >= 0, got {got}")
    if normalizer == "constant" and (max_tokens is None or max_tokens < 1):
        raise ValueError(f'grpo_loss: normalizer "constant" expected max_tokens >= 1, got {max_tokens}')
    if not beta >= 0 or (beta > 0 and ref_logp is None):
        raise ValueError(f"grpo_loss: expected beta >= 0, and ref_logp where beta > 0, got beta = {beta}")


def _expect(function, shape, floating=True, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape != shape or (floating and not tensor.is_floating_point())):
            kind, got = "floating point" if floating else "0/1", _describe(tensor)
            raise ValueError(f"{function}: {name}: expected {kind} of shape {list(shape)}, got {got}")


def _describe(tensor):
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def _upcast(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # [...]  float64 stays


def _masked_mean(values, mask):
    return torch.where(mask, values.detach(), 0.0).sum() / mask.sum().clamp(min=1)  # []
