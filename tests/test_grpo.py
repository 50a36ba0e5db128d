"""grpo.py: rewards by table, losses by hand, gradients in closed form, invariants."""

import doctest
import math
import time

import pytest
import torch

import grpo
from grpo import format_reward, group_advantages, grpo_loss, kl_k3

LEVELS = ["sequence", "token"]
NORMALIZERS = ["sequence", "token", "constant"]
GOOD = "<reasoning>r</reasoning><answer>a</answer>"


def close(actual, expected, bug="", **tolerance):
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{bug}\n{text}", **tolerance)


def test_doctest():
    result = doctest.testmod(grpo)
    assert result.attempted > 0 and result.failed == 0


# ------------------------------------------------------------ the reward


FORMAT_CASES = [
    # accepted
    (GOOD, 1, "the plain form"),
    ("<reasoning>\nr\n\nr\n</reasoning>\n\n<answer>\na\n</answer>", 1, "newlines inside and between"),
    (" \t\r\n" + GOOD + "\n \n", 1, "white space around"),
    ("<reasoning> r </reasoning> \t <answer> a </answer>", 1, "spaces inside and between"),
    ("\u00a0" + GOOD + "\u3000", 1, "unicode white space around"),
    ("<reasoning>理由 😀</reasoning><answer>é</answer>", 1, "unicode inside"),
    ("<reasoning>if a < b > c </ d</reasoning><answer>1 < 2</answer>", 1, "angle brackets that are no tag"),
    ("<reasoning><b>r</b> <Answer> < answer></reasoning><answer>a</answer>", 1, "other tags are text"),
    ("<reasoning>the answer: reasoning</reasoning><answer>.</answer>", 1, "tag names without brackets"),
    ("<reasoning>\u200b</reasoning><answer>a</answer>", 1, "a zero-width space is not white space to Python"),
    # missing, empty
    ("", 0, "empty text"),
    (" \n", 0, "only white space"),
    ("r a", 0, "no tags"),
    ("<reasoning>r</reasoning>", 0, "no answer"),
    ("<answer>a</answer>", 0, "no reasoning"),
    ("<reasoning></reasoning><answer>a</answer>", 0, "empty reasoning"),
    ("<reasoning>r</reasoning><answer></answer>", 0, "empty answer"),
    ("<reasoning> \n\t</reasoning><answer>a</answer>", 0, "white-space reasoning"),
    ("<reasoning>r</reasoning><answer>\n</answer>", 0, "white-space answer"),
    ("<reasoning>r</reasoning><answer>\u00a0\u2003</answer>", 0, "unicode white-space answer"),
    ("<reasoning>r</reasoning><answer>a", 0, "answer not closed (cut at max_tokens)"),
    ("<reasoning>r<answer>a</answer>", 0, "reasoning not closed"),
    ("r</reasoning><answer>a</answer>", 0, "reasoning not opened (prefilled prompt)"),
    ("<reasoning>r</reasoning>a</answer>", 0, "answer not opened"),
    ("<reasoning><answer></reasoning></answer>", 0, "tags only"),
    # order, nesting, repetition
    ("<answer>a</answer><reasoning>r</reasoning>", 0, "reversed order"),
    ("<reasoning>r<answer>a</answer></reasoning>", 0, "answer inside reasoning"),
    ("<answer><reasoning>r</reasoning>a</answer>", 0, "reasoning inside answer"),
    ("<reasoning>r</answer></reasoning><answer>a", 0, "each tag once, wrong order"),
    ("<reasoning>r<answer>a</reasoning>b</answer>", 0, "interleaved"),
    ("</reasoning>r<reasoning></answer>a<answer>", 0, "close before open"),
    (GOOD + GOOD, 0, "everything twice"),
    (GOOD + "\n<answer>a</answer>", 0, "two answers"),
    ("<reasoning>r</reasoning>" + GOOD, 0, "two reasonings"),
    ("<reasoning>r <reasoning> r</reasoning><answer>a</answer>", 0, "reasoning opened twice"),
    ("<reasoning>r</reasoning><answer>a</answer></answer>", 0, "answer closed twice"),
    ("<reasoning>I will use <answer> later</reasoning><answer>a</answer>", 0, "a tag quoted in reasoning"),
    ("<reasoning>r</reasoning><answer>a</reasoning></answer>", 0, "a tag quoted in the answer"),
    # text outside, wrong tags
    ("Sure! " + GOOD, 0, "text before"),
    (GOOD + ".", 0, "text after"),
    ("<reasoning>r</reasoning>so<answer>a</answer>", 0, "text between"),
    (GOOD + "<eos>", 0, "EOS text left in by the caller"),
    (GOOD + "<end_of_turn>\n", 0, "Gemma's end of turn left in"),
    ("\ufeff" + GOOD, 0, "a BOM is not white space"),
    ("\u200b" + GOOD, 0, "nor is a zero-width space"),
    ("\x00" + GOOD, 0, "nor NUL"),
    ("```\n" + GOOD + "\n```", 0, "a code fence around"),
    ("<REASONING>r</REASONING><ANSWER>a</ANSWER>", 0, "upper case"),
    ("<reasoning>r</Reasoning><answer>a</answer>", 0, "one upper-case tag"),
    ("<reasoning id='1'>r</reasoning><answer>a</answer>", 0, "attributes"),
    ("<reasoning >r</reasoning><answer>a</answer>", 0, "a space in the tag"),
    ("<reasoning>r</reasoning><answer>a</answer >", 0, "a space in the closing tag"),
    ("<reasoning>r<\\reasoning><answer>a</answer>", 0, "a backslash for a slash"),
    ("&lt;reasoning&gt;r&lt;/reasoning&gt;&lt;answer&gt;a&lt;/answer&gt;", 0, "escaped"),
    ("＜reasoning＞r＜/reasoning＞＜answer＞a＜/answer＞", 0, "full-width brackets"),
    ("<think>r</think><answer>a</answer>", 0, "another model's tag"),
    ("<reasoning>r</answer><answer>a</reasoning>", 0, "swapped closes"),
]


@pytest.mark.parametrize("text, expected, what", FORMAT_CASES, ids=[case[2] for case in FORMAT_CASES])
def test_format_reward(text, expected, what):
    reward = format_reward(text)
    assert isinstance(reward, float)
    assert reward == expected, f"{what}: expected {expected}, got {reward} for {text!r}"


@pytest.mark.parametrize("unit", ["<", "</", "<answer", "<reasoning>", "<answer>a</answer>", " ", "\n<"])
def test_format_reward_is_linear(unit):
    filler = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    for text in (filler, "<reasoning>" + filler, f"<reasoning>r</reasoning>{filler}<answer>a</answer>"):
        assert format_reward(text) == float(unit == " " and text.startswith("<reasoning>r"))
    assert time.perf_counter() - start < 2, "backtracking: 1e6 characters must not stall training"


@pytest.mark.parametrize("text", [None, GOOD.encode(), [GOOD], 1.0])
def test_format_reward_wants_text(text):
    with pytest.raises(TypeError, match="expected str"):
        format_reward(text)


# ------------------------------------------------------------ the advantage


def test_advantages_by_hand():
    rewards = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    none = [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]]
    # unbiased variances: 4 * 0.25 / 3 = 1/3 and (0.5625 + 3 * 0.0625) / 3 = 1/4
    std = [[a / (math.sqrt(1 / 3) + 1e-4) for a in none[0]], [a / (0.5 + 1e-4) for a in none[1]], none[2]]
    close(group_advantages(rewards), torch.tensor(none, dtype=torch.float64))
    close(
        group_advantages(rewards, "std"), torch.tensor(std, dtype=torch.float64),
        "std: expected the unbiased one (ddof 1) plus 1e-4",
    )


@pytest.mark.parametrize("scale", ["none", "std"])
def test_advantages_invariants(scale):
    rewards = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, scale)
    assert advantages.shape == rewards.shape
    close(advantages.sum(-1), torch.zeros(3, 2, dtype=torch.float64))
    close(group_advantages(rewards + 7, scale), advantages, "the baseline is not the mean")
    close(group_advantages(rewards[:, :1], scale), advantages[:, :1], "groups leak into each other")


def test_advantages_of_constant_and_single_groups():
    for value in (0.0, 1.0):
        for scale in ("none", "std"):
            assert (group_advantages(torch.full((2, 4), value), scale) == 0).all(), "0/0 without variance"
            large = group_advantages(torch.full((2, 7), 1e6 + 0.1 + value), scale)
            assert (large == 0).all(), "the mean of equal rewards is rounded, and that is no advantage"
    assert (group_advantages(torch.tensor([[1.0], [0.0]])) == 0).all()
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(torch.tensor([[1.0], [0.0]]), "std")


@pytest.mark.parametrize("rewards, scale", [
    (torch.ones(2, 4), "mean"), (torch.ones(2, 4, dtype=torch.long), "none"), (torch.tensor(1.0), "none"),
    (torch.ones(2, 0), "none"), (torch.tensor([1.0, math.nan]), "none"), (torch.tensor([1.0, math.inf]), "std"),
])
def test_advantages_reject(rewards, scale):
    with pytest.raises((ValueError, FloatingPointError), match="group_advantages: expected .* got"):
        group_advantages(rewards, scale)


# ------------------------------------------------------------ k3


def test_k3_by_hand():
    logp = torch.log(torch.tensor([0.5, 0.5, 0.25], dtype=torch.float64)).requires_grad_()
    ref_logp = torch.log(torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64))
    kl = kl_k3(logp, ref_logp)  # exp(d) = 1, 1/2, 2:   exp(d) - d - 1 = 0, ln 2 - 1/2, 1 - ln 2
    expected = torch.tensor([0.0, math.log(2) - 0.5, 1 - math.log(2)], dtype=torch.float64)
    close(kl, expected)
    kl.sum().backward()  # 1 - exp(d)
    close(logp.grad, torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64), "d should be ref_logp - logp")


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e-2, 1.0, 10.0])
def test_k3_is_never_negative(scale):
    d = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * scale
    assert kl_k3(torch.zeros_like(d), d).min() >= 0, "negative near d = 0: use expm1(d) - d"
    assert (kl_k3(d, d) == 0).all()


def test_k3_value_and_gradient_in_expectation():
    logits = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([1.0, 0.2, -0.7, 0.0], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    probs = logp.detach().exp()

    expected_k3 = (probs * kl_k3(logp, ref_logp)).sum()
    kl = (probs * (logp - ref_logp)).sum().detach()
    close(expected_k3.detach(), kl, "E_policy[k3] is not KL(policy || reference)")

    # With the samples held fixed, the gradient is that of KL(reference || policy): probs - ref_probs.
    (gradient,) = torch.autograd.grad(expected_k3, logits)
    close(gradient, probs - ref_logp.exp())


def test_k3_at_the_extremes():
    logp = torch.tensor([-1000.0, -1.0, -1.0], requires_grad=True)
    kl = kl_k3(logp, torch.tensor([-1.0, -1000.0, -math.inf]))
    kl[:2].sum().backward(retain_graph=True)
    assert kl[:2].isfinite().all() and logp.grad.isfinite().all()
    logp.grad = None
    kl[2].backward()
    assert kl[2] == math.inf and logp.grad[2] == 1
    assert kl_k3(logp.detach().half(), logp.detach().half()).dtype == torch.float32


def test_k3_rejects():
    with pytest.raises(ValueError, match=r"kl_k3: ref_logp: expected floating point of shape \[2, 3\]"):
        kl_k3(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="kl_k3: logp"):
        kl_k3(torch.zeros(3, dtype=torch.long), torch.zeros(3))


# ------------------------------------------------------------ the loss


def make_batch(empty_row=True):
    """Five sequences of lengths 4, 1, 6, 3 and 0 (or 2), a little off-policy."""
    generator = torch.Generator().manual_seed(3)
    old_logp = -torch.rand(5, 6, generator=generator, dtype=torch.float64) - 0.5
    logp = old_logp + 0.2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    ref_logp = old_logp + 0.2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([0.5, -0.5, -0.25, 0.75, 0.5], dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([4, 1, 6, 3, 0 if empty_row else 2])[:, None]
    return logp.requires_grad_(), old_logp, ref_logp, advantages, mask


def normalize_by_hand(per_token, mask, normalizer, max_tokens):
    """TRL's grpo, bnpo and dr_grpo, in plain loops."""
    rows = [row[keep].tolist() for row, keep in zip(per_token, mask)]
    if normalizer == "sequence":
        return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)
    total = sum(sum(row) for row in rows)
    tokens = sum(len(row) for row in rows)
    return total / (tokens if normalizer == "token" else len(rows) * max_tokens)


@pytest.mark.parametrize("level, normalizer, expected", [
    # Two sequences of 2 and 1 tokens, A = 1 and -1, token ratios (1.05, 1.2) and 0.5, clip 0.1.
    # Token terms: -1.05, -min(1.2, 1.1) = -1.1, and -min(-0.5, -0.9) = 0.9.
    ("token", "sequence", (-2.15 / 2 + 0.9) / 2),
    ("token", "token", (-2.15 + 0.9) / 3),
    ("token", "constant", (-2.15 + 0.9) / (2 * 4)),
    # Sequence ratios sqrt(1.05 * 1.2) = 1.1225 and 0.5: terms -1.1 (twice, over two tokens) and 0.9.
    ("sequence", "sequence", (-1.1 + 0.9) / 2),
    ("sequence", "token", (-2.2 + 0.9) / 3),
    ("sequence", "constant", (-2.2 + 0.9) / (2 * 4)),
])
def test_loss_by_hand(level, normalizer, expected):
    logp = torch.log(torch.tensor([[1.05, 1.2], [0.5, 9.9]], dtype=torch.float64))
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    options = dict(level=level, normalizer=normalizer, max_tokens=4)
    loss, stats = grpo_loss(logp, torch.zeros_like(logp), advantages, mask, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-12), "clip, sign or normaliser"
    ratios = [1.05, 1.2, 0.5] if level == "token" else [math.sqrt(1.26), 0.5]
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios)), "mean over padding?"
    assert stats["ratio_max"].item() == pytest.approx(max(ratios)), "max over padding?"
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3 if level == "token" else 1.0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_loss_is_the_formula(level, normalizer):
    logp, old_logp, ref_logp, advantages, mask = make_batch()
    options = dict(level=level, normalizer=normalizer, max_tokens=8, clip_low=0.1, clip_high=0.05, beta=0.3)
    loss, stats = grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, **options)
    log_ratio = (logp - old_logp).detach()
    per_token = torch.zeros(5, 6, dtype=torch.float64)
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            mean = log_ratio[i, :length].mean()
            ratio = math.exp(mean if level == "sequence" else log_ratio[i, t])
            clipped = min(max(ratio, 0.9), 1.05)
            d = (ref_logp - logp)[i, t].item()
            per_token[i, t] = -min(ratio * advantages[i], clipped * advantages[i])
            per_token[i, t] += 0.3 * (math.exp(d) - d - 1)
    assert loss.item() == pytest.approx(normalize_by_hand(per_token, mask, normalizer, 8), abs=1e-12)

    approx_kl = (log_ratio.exp() - log_ratio - 1)[mask].mean()
    close(stats["approx_kl"], approx_kl, "approx_kl averages padding, or has d reversed")
    close(stats["kl"], kl_k3(logp, ref_logp)[mask].mean().detach())
    assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_gradient_is_the_policy_gradient(level, normalizer):
    logp, _, _, advantages, mask = make_batch()
    loss, stats = grpo_loss(logp, logp, advantages, mask, level=level, normalizer=normalizer, max_tokens=8)
    (gradient,) = torch.autograd.grad(loss, logp)
    length = mask.sum(1, keepdim=True).clamp(min=1)
    divisor = {"sequence": 5 * length, "token": mask.sum(), "constant": 5 * 8}[normalizer]
    close(
        gradient, -advantages[:, None] * mask / divisor,
        "not -A * grad logp: old_logp not detached, or the ratio cut from the graph?",
    )
    assert gradient.abs().max() > 0.01
    assert stats["ratio_mean"] == 1 and stats["ratio_max"] == 1 and stats["clip_fraction"] == 0
    if normalizer == "sequence":
        close(loss.detach(), -(advantages * mask.any(1)).mean(), "the value is -mean(A)")


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_by_finite_differences(level):
    logp, old_logp, ref_logp, advantages, mask = make_batch()

    def loss(x):
        return grpo_loss(x, old_logp, advantages, mask, level=level, ref_logp=ref_logp, beta=0.3)[0]

    assert torch.autograd.gradcheck(loss, logp)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage, ratio, stopped", [
    (1.0, 1.15, True), (1.0, 0.7, False), (-1.0, 0.85, True), (-1.0, 1.5, False), (1.0, 1.05, False),
    (-1.0, 0.95, False), (-1.0, 1.15, False), (1.0, 0.85, False),
])
def test_clipping_stops_one_side_only(level, advantage, ratio, stopped):
    spread = 0.3 if level == "sequence" else 0.0  # tokens differ, their mean log-ratio does not
    logp = (math.log(ratio) + torch.tensor([[spread, -spread]], dtype=torch.float64)).requires_grad_()
    loss, stats = grpo_loss(logp, torch.zeros_like(logp), torch.tensor([advantage], dtype=torch.float64),
                            torch.ones(1, 2), level=level, clip_low=0.1, clip_high=0.1)
    loss.backward()
    expected = 0.0 if stopped else -advantage * ratio / 2  # A * ratio * (1/|y|), at each of two tokens
    close(
        logp.grad, torch.full((1, 2), expected, dtype=torch.float64),
        f"A = {advantage}, ratio = {ratio}: clip on the wrong side, or no min with the unclipped",
    )
    assert stats["clip_fraction"] == float(stopped), "counts ratios outside, not gradients stopped"


def test_clip_bounds_are_not_swapped():
    logp = torch.log(torch.tensor([[1.25], [0.75]], dtype=torch.float64))
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(2, 1)
    _, stats = grpo_loss(logp, torch.zeros_like(logp), advantages, mask, clip_low=0.3, clip_high=0.2)
    assert stats["clip_fraction"] == 0.5
    loss, _ = grpo_loss(logp, torch.zeros_like(logp), advantages, mask, clip_low=0.3, clip_high=0.3)
    assert loss.item() == pytest.approx((-1.25 + 0.75) / 2)
    loss, stats = grpo_loss(logp, torch.zeros_like(logp), advantages, mask, clip_low=1, clip_high=math.inf)
    assert stats["clip_fraction"] == 0, "clip_low 1 and clip_high inf should switch clipping off"


def value_and_gradient(logp, old_logp, advantages, mask, **options):
    logp = logp.detach().clone().requires_grad_()
    loss, stats = grpo_loss(logp, old_logp, advantages, mask, **options)
    loss.backward()
    return loss.detach(), logp.grad, stats


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [0.0, 50.0, -math.inf, math.inf, math.nan])
def test_padding_changes_nothing(level, normalizer, garbage):
    logp, old_logp, ref_logp, advantages, mask = make_batch()
    options = dict(level=level, normalizer=normalizer, max_tokens=8, beta=0.3)
    loss, gradient, stats = value_and_gradient(logp, old_logp, advantages, mask, ref_logp=ref_logp, **options)

    def pad(x):  # two more columns, and garbage at the old masked positions
        return torch.nn.functional.pad(x.detach().masked_fill(~mask, garbage), (0, 2), value=garbage)

    longer = torch.cat([mask, torch.zeros(5, 2)], dim=1)
    options["ref_logp"] = pad(ref_logp)
    padded = value_and_gradient(pad(logp), pad(old_logp), advantages, longer, **options)
    message = f"masked {garbage} leaks: mask before exp, with where, not by multiplying"
    close(padded[0], loss, message)
    close(padded[1][:, :6], gradient, message)
    assert (padded[1][:, 6:] == 0).all(), message
    for name in stats:
        close(padded[2][name], stats[name], f"{name}: {message}")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_order_of_sequences_does_not_matter(level, normalizer):
    logp, old_logp, _, advantages, mask = make_batch()
    options = dict(level=level, normalizer=normalizer, max_tokens=8)
    order = torch.tensor([3, 0, 4, 2, 1])
    loss, gradient, _ = value_and_gradient(logp, old_logp, advantages, mask, **options)
    permuted = value_and_gradient(logp[order], old_logp[order], advantages[order], mask[order], **options)
    close(permuted[0], loss)
    close(permuted[1], gradient[order])


@pytest.mark.parametrize("level", LEVELS)
def test_mean_over_sequences_splits(level):
    logp, old_logp, _, advantages, mask = make_batch(empty_row=False)
    for normalizer, splits in [("sequence", True), ("constant", True), ("token", False)]:
        options = dict(level=level, normalizer=normalizer, max_tokens=8)
        whole, _ = grpo_loss(logp, old_logp, advantages, mask, **options)
        parts = [grpo_loss(logp[i:i + 1], old_logp[i:i + 1], advantages[i:i + 1], mask[i:i + 1], **options)[0]
                 for i in range(5)]
        same = torch.allclose(torch.stack(parts).mean(), whole, atol=1e-12)
        assert same == splits, f"{normalizer}: the mean over single sequences should match: {splits}"


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_empty_masks(level, normalizer):
    logp, old_logp, ref_logp, advantages, _ = make_batch()
    loss, stats = grpo_loss(logp, old_logp, advantages, torch.zeros(5, 6), level=level, normalizer=normalizer,
                            max_tokens=8, ref_logp=ref_logp, beta=0.3)
    assert loss.item() == 0 and loss.requires_grad, "0/0, or a loss that left the graph"
    loss.backward()
    assert (logp.grad == 0).all()
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("gap", [15.0, 100.0, 5000.0, -15.0, -100.0, -5000.0])
def test_extreme_log_ratios(gap, advantage, level, dtype):
    logp = torch.tensor([[gap, gap], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(2, 2, dtype=dtype)
    loss, stats = grpo_loss(logp, zeros, torch.tensor([advantage, 1.0], dtype=dtype), torch.ones(2, 2),
                            level=level, ref_logp=zeros, beta=0.1)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all(), "exp overflowed: inf * 0 is NaN"
    assert all(value.isfinite() for value in stats.values())
    assert (logp.grad[1] == -0.25).all(), "an extreme sequence must not disturb another's gradient"


def test_nan_that_counts_is_not_hidden():
    logp, old_logp, _, advantages, mask = make_batch()
    bad = logp.detach().clone()
    bad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="expected finite log-probabilities .* got a loss of nan"):
        grpo_loss(bad, old_logp, advantages, mask)


@pytest.mark.parametrize("level", LEVELS)
def test_a_token_the_policy_would_not_write_has_ratio_0(level):
    logp = torch.tensor([[-math.inf, -1.0], [-1.0, -1.0]], requires_grad=True)
    loss, stats = grpo_loss(logp, torch.full((2, 2), -1.0), torch.tensor([1.0, -1.0]), torch.ones(2, 2), level=level)
    loss.backward()
    expected = 0.5 if level == "sequence" else 0.25  # -0 and 1; a token of the two has ratio 1
    assert loss == expected and logp.grad.isfinite().all() and logp.grad[0, 0] == 0
    assert stats["approx_kl"] == math.inf, "KL(old || policy) is infinite"
    with pytest.raises(FloatingPointError, match="grpo_loss: expected finite"):
        grpo_loss(logp, torch.full((2, 2), -1.0), torch.ones(2), torch.ones(2, 2), beta=0.1, ref_logp=logp)


def test_constants_get_no_gradient():
    logp, old_logp, ref_logp, advantages, mask = make_batch()
    constants = [x.requires_grad_() for x in (old_logp, ref_logp, advantages)]
    loss, _ = grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, beta=0.3)
    loss.backward()
    assert all(x.grad is None for x in constants)


def test_beta_zero_only_logs():
    logp, old_logp, ref_logp, advantages, mask = make_batch()
    plain, stats = grpo_loss(logp, old_logp, advantages, mask)
    assert "kl" not in stats, "a KL that was not measured must not be logged as a number"
    impossible = torch.full_like(ref_logp, -math.inf)
    logged, stats = grpo_loss(logp, old_logp, advantages, mask, ref_logp=impossible)
    assert torch.equal(plain, logged) and stats["kl"] == math.inf


@pytest.mark.parametrize("change, message", [
    (dict(level="tokens"), "level"),
    (dict(normalizer="mean"), "normalizer"),
    (dict(normalizer="constant"), "max_tokens"),
    (dict(normalizer="constant", max_tokens=0), "max_tokens"),
    (dict(clip_low=-0.1), "clip_low"),
    (dict(clip_low=1.5), "clip_low"),
    (dict(clip_high=-0.1), "clip_high"),
    (dict(clip_high=math.nan), "clip_high"),
    (dict(beta=0.1), "ref_logp"),
    (dict(beta=-0.1), "beta"),
    (dict(logp=torch.zeros(6)), "logp"),
    (dict(logp=torch.zeros(0, 6)), "logp"),
    (dict(logp=torch.zeros(5, 6, dtype=torch.long)), "logp"),
    (dict(old_logp=torch.zeros(5, 7)), "old_logp"),
    (dict(old_logp=torch.zeros(5, 6, dtype=torch.long)), "old_logp"),
    (dict(advantages=torch.zeros(5, 1)), "advantages"),
    (dict(advantages=torch.zeros(6)), "advantages"),
    (dict(advantages=torch.zeros(5, dtype=torch.long)), "advantages"),
    (dict(mask=torch.ones(6)), "mask"),
    (dict(ref_logp=torch.zeros(6)), "ref_logp"),
])
def test_loss_rejects(change, message):
    logp, old_logp, _, advantages, mask = make_batch()
    arguments = dict(logp=logp, old_logp=old_logp, advantages=advantages, mask=mask) | change
    with pytest.raises(ValueError, match=f"grpo_loss: (?=.*{message}).*expected.* got"):
        grpo_loss(**arguments)
