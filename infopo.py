"""InfoPO and DPO: two preference losses, from two lower bounds on one divergence.

The equations, in this file's names (N pairs; prompt and chosen ~ p, prompt and rejected ~ q):

    logratio = policy - ref                   log(pi(y | x) / pi_ref(y | x)) of a response, nats
    reward   = beta * logratio                the implicit reward
    margin   = reward_chosen - reward_rejected
    f        = 1 + reward                     the critic

    infopo_loss = mean(-f_chosen + exp(f_rejected - 1))     NWJ
    dpo_loss    = mean(-log sigmoid(margin))                InfoNCE with one negative

Both bound KL(p || q), how far chosen and rejected can be told apart: NWJ for every critic, with
equality at f = 1 + log(p / q), DPO's only up to log 2. Where the rejected are the chosen of other
prompts, q = p(x) p(y), that is the mutual information of prompt and response. DPO's softmax over
the two responses is the Bradley-Terry assumption; InfoPO has no model of the choice.

The gradients, for one pair of the N:

              policy_chosen                 policy_rejected
    InfoPO    -beta                         beta * exp(reward_rejected)
    DPO       -beta * sigmoid(-margin)      beta * sigmoid(-margin)

InfoPO pulls the chosen up whatever the rejected does, and pushes the rejected hard where the policy
has raised it. DPO sees the difference alone: both may fall together at no cost, and both gradients
vanish with the margin. docs/theory.md derives both bounds.

Overflow. Past reward_rejected = 20 exp goes on as its tangent, e^20 * (1 + reward - 20): value and
gradient are continuous, with no inf at 89, and such a response is still pushed back.

Log-probabilities are summed over tokens. sequence_logp can also average them; then NWJ is still a
bound, but the optimal policy is another one, and beta wants to be larger. Use one kind for all four.

Sources: InfoPO, arXiv 2505.08507 (its abstract; the loss is our reading of it); DPO, arXiv
2305.18290, eq. 7; NWJ: Nguyen, Wainwright, Jordan 2010, arXiv 0809.0853; Poole et al. 2019, arXiv
1905.06922. Deviations, our choice: the tangent past 20.

To copy: needs torch only. `python -m doctest infopo.py` runs this example, a pair at the reference
and one with margin 6, where only InfoPO's pull on the chosen response is left:

    >>> ref_chosen, ref_rejected = torch.tensor([-10.0, -10.0]), torch.tensor([-12.0, -12.0])
    >>> chosen = torch.tensor([-10.0, -9.0], requires_grad=True)
    >>> rejected = torch.tensor([-12.0, -17.0], requires_grad=True)
    >>> loss, stats = infopo_loss(chosen, rejected, ref_chosen, ref_rejected)
    >>> loss.detach(), stats["margin"], stats["accuracy"]
    (tensor(-0.9966), tensor(3.), tensor(0.5000))
    >>> torch.autograd.grad(loss, [chosen, rejected])
    (tensor([-0.5000, -0.5000]), tensor([0.5000, 0.0034]))
    >>> loss, stats = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=1.0)
    >>> torch.autograd.grad(loss, [chosen, rejected])
    (tensor([-0.2500, -0.0012]), tensor([0.2500, 0.0012]))
"""

import math

import torch

MAX_REWARD = 20.0  # of a rejected response; past it, exp goes on as its tangent


def infopo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=1.0):
    """The NWJ loss of the module docstring, and what to log of it: (loss, stats).

    policy_chosen, policy_rejected  [N]  log pi(y | x) of sequence_logp, nats, with gradient
    ref_chosen, ref_rejected        [N]  the same under the reference; constants, detached here
    beta                                 > 0, reward per nat of log-ratio; our trainings have 0.1

    loss: 0-dim, mean over pairs. 0 at the reference, negative when all is well, without a lower
    bound. A rejected response of probability zero (-inf) is fine in value and gradient, and shows
    in stats. Half precision is computed in float32.

    stats: 0-dim, detached, means over pairs:
        logratio_chosen, logratio_rejected  nats
        reward_chosen, reward_rejected      beta * log-ratio
        margin                              reward_chosen - reward_rejected
        accuracy                            share with margin > 0; a tie is wrong
        weight_rejected                     beta * exp(min(reward_rejected, 20)), of the gradient

    Raises ValueError for other shapes or dtypes, N = 0, and a beta not positive and finite;
    FloatingPointError if the loss, or the log-ratio of a chosen response, is not finite: of NaN, or
    of probability zero.
    """
    tensors = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    chosen, rejected = _log_ratios("infopo_loss", tensors, beta)  # [N], [N]

    # -f_chosen + exp(f_rejected - 1), f = 1 + beta * logratio; past r = 20 exp is its tangent
    f_chosen = 1 + beta * chosen  # [N]
    reward_rejected = beta * rejected  # [N]  f_rejected - 1, which would round twice
    slope = reward_rejected.clamp(max=MAX_REWARD).exp()  # [N]  of the loss in the reward, on both sides of the cut
    tangent = 1 + (reward_rejected - MAX_REWARD).relu()  # [N]  clamp(min=0) would double the slope at the cut
    loss = (slope * tangent - f_chosen).mean()  # []
    _check_finite("infopo_loss", loss, chosen)
    return loss, _stats(chosen, rejected, beta, weight_rejected=beta * slope)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The DPO loss of the module docstring, and what to log of it: (loss, stats).

    Arguments, stats and errors as in infopo_loss; weight_rejected is beta * sigmoid(-margin).

    loss: 0-dim, mean over pairs; log 2 at the reference, never negative. For a pair it is row
    InfoNCE of scores[i, j] = reward of the response at place j where place i has the chosen one.
    """
    tensors = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    chosen, rejected = _log_ratios("dpo_loss", tensors, beta)  # [N], [N]
    margin = beta * (chosen - rejected)  # [N]
    loss = -torch.nn.functional.logsigmoid(margin).mean()  # []
    _check_finite("dpo_loss", loss, chosen)
    return loss, _stats(chosen, rejected, beta, weight_rejected=beta * torch.sigmoid(-margin))


def sequence_logp(logp, mask, length_normalized=False):
    """Log-probability of each response: [..., T] -> [...], nats, or nats per token.

    logp               [..., T]  of the tokens under the policy or the reference
    mask               [..., T]  bool or 0/1: the completion tokens. NaN may stand elsewhere
    length_normalized            divide by the number of tokens. An empty mask gives 0 either way

    Half precision is computed in float32. Raises ValueError for other shapes or dtypes, and
    FloatingPointError for NaN or +inf at a token that counts; -inf there, a token of probability
    zero, gives -inf.
    """
    if logp.dim() == 0 or not logp.is_floating_point() or logp.shape != mask.shape:
        got = f"{_describe(logp)} and {_describe(mask)}"
        raise ValueError(f"sequence_logp: expected floating point logp and a mask, both [..., T], got {got}")
    mask = mask.bool()  # [..., T]
    total = torch.where(mask, _upcast(logp), 0.0).sum(-1)  # [...]  not mask * logp: NaN * 0 is NaN
    if not (total < math.inf).all():  # nor is NaN
        raise FloatingPointError("sequence_logp: expected log-probabilities without NaN and +inf where the mask is set")
    return total / mask.sum(-1).clamp(min=1) if length_normalized else total  # [...]


def _log_ratios(name, tensors, beta):
    shape = tensors[0].shape
    if len(shape) != 1 or shape[0] == 0:
        got = _describe(tensors[0])
        raise ValueError(f"{name}: expected policy_chosen [N], one per response, N >= 1, got {got}")
    arguments = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    for argument, tensor in zip(arguments, tensors, strict=True):
        if tensor.shape != shape or not tensor.is_floating_point():
            expected = f"expected floating point of shape {list(shape)}"
            raise ValueError(f"{name}: {argument}: {expected}, got {_describe(tensor)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"{name}: expected beta > 0 and finite, got {beta}")
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = map(_upcast, tensors)  # [N] each
    return policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()  # [N], [N]


def _check_finite(name, loss, chosen):
    """NaN must not train on, nor an infinite log-ratio of a chosen response, at which DPO's loss is 0."""
    if not (loss.isfinite() and chosen.isfinite().all()):
        lowest, highest = chosen.min().item(), chosen.max().item()
        got = f"a loss of {loss.item()}, log-ratios of chosen responses from {lowest} to {highest}"
        raise FloatingPointError(f"{name}: expected finite log-probabilities, got {got}")


def _stats(chosen, rejected, beta, weight_rejected):
    margin = beta * (chosen - rejected)  # [N]
    values = {
        "logratio_chosen": chosen,
        "logratio_rejected": rejected,
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
        "weight_rejected": weight_rejected,
    }
    return {name: value.detach().mean() for name, value in values.items()}


def _describe(tensor):
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def _upcast(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # [...]  float64 stays
