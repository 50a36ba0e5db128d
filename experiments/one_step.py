"""docs/one-step.md: one step of the embedded model from prompt to weights, with every number, and its figures.

    python experiments/one_step.py    # two to three minutes on two cores: it trains ENIGMA, and GRPO alone beside it

The page is the text below with the numbers filled in. Where a sentence interprets numbers, a `check` holds it to them,
and the page is not written where they say otherwise. The numbers come from one_step_numbers.py, the figures from
one_step_figures.py. Trained models stay in --output-dir and are used again: delete it to train anew.
"""

import argparse
import itertools
import math
import os
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402

from experiments.common import run_training, side_by_side  # noqa: E402
from experiments.one_step_numbers import (  # noqa: E402
    EPSILONS,
    LENGTH,
    PRINCIPLES,
    RUNS,
    SHOWN,
    STEPS,
    TERMS,
    Program,
    cosines,
    norm,
    number,
    principal_axes,
    transports,
)
from infonce import column_info_nce, row_info_nce  # noqa: E402
from metrics import information, sufficiency_index  # noqa: E402
from sinkhorn import relative_eps  # noqa: E402

PAGE = ROOT / "docs" / "one-step.md"
OURS, ALONE = RUNS
EARLY, LATE = STEPS
OURS_EARLY = f"{OURS}, step {EARLY}"


def check(holds, sentence: str) -> None:
    """Ends the script where a sentence of the page is not true."""
    if not holds:
        raise SystemExit(f"{PAGE.name} is not written: it is no longer true that {sentence}")


def table(head: str, rows) -> str:
    lines = [head, "|---" * (head.count("|") - 1) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """The page with its paragraphs in lines of at most 120 characters; a fenced block stays as it is."""
    fenced = text.split("```")
    for k in range(0, len(fenced), 2):
        blocks = fenced[k].split("\n\n")
        options = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
        fenced[k] = "\n\n".join(
            block if block.startswith(("|", "#", "<", "\n")) or not block else textwrap.fill(block, **options)
            for block in blocks
        )
    return "```".join(fenced)


def opening(start, trained) -> str:
    _, num, generations, width = start.batch.tokens.shape
    (tokens, dimensions), terms = start.states.shape, start.terms
    earned = f"{number(start.rewards.sum(), 0)} of {start.rewards.numel()} completions earn the reward"
    found = table("| in the abstract | on this page | section |", [
        ("GRPO with CoT-format-only rewards", f"{earned}; L_GRPO = {number(terms['loss_grpo'], 3)}", "1"),
        ("SAMI-style symmetric InfoNCE", f"L_SAMI = {number(terms['loss_mi'], 3)} nats", "2"),
        ("MI lower bound under matched negatives",
         f"{number(terms['mi_row'], 3)} of at most {number(math.log(num), 3)} nats", "2"),
        ("Sufficiency Index", f"SI = {number(start.si, 3)}", "2"),
        ("entropic Sinkhorn OT on hidden-state distributions",
         f"S_ε = {number(trained.terms['loss_ot'], 3)} after {EARLY} steps, 0 before the first", "3"),
    ])
    return f"""<!-- Written by experiments/one_step.py: change the text there. -->
# One step, with its numbers

This page follows one training step of ENIGMA from the prompt to the change of the weights, and shows the value of every
quantity on the way. It asks for the paper's abstract and a quarter of an hour, and for no code. The model is the
embedded one, and the question is the first that a training with seed 0 sees. A step of that training averages four
questions; here there is only this one, so that each number follows from those above it. `python
experiments/one_step.py` computes all of them anew, and the [README](../README.md#the-equations-and-where-they-are) says
where each equation stands in the code.

![One step: what flows into what, with shapes](figures/one-step-loop.png)

In the shapes, Q counts questions (1 here), K = {num} principles and G = {generations} completions of each. The
longest completion has T = {width} tokens, and the hidden states of n = {tokens} tokens, vectors of d = {dimensions}
numbers, are compared. Sections 1 to 3 compute the three terms L_GRPO, L_SAMI and S_ε of the loss, and λ_mi and λ_ot are
the weights of the last two. These are the words of the abstract, each with its number:

{found}"""


def batch_part(program, start) -> str:
    batch, config, rewards, working = start.batch, program.config, start.rewards, start.working
    advantages, lengths = start.targets.advantages[0], batch.mask[0].sum(-1)  # [K, G] both
    count, limit, task = rewards.numel(), config.max_completion_length, batch.tasks[0]
    by_length = -(advantages * lengths).sum().item() / (count * limit)
    check(rewards[~working].mean() > rewards[working].mean() + 0.2, "guesses earn the reward more often")
    check(start.terms["ratio_mean"] == start.terms["ratio_max"] == 1, "all ratios are 1")
    check(abs(by_length - start.terms["loss_grpo"]) < 1e-4, "L_GRPO comes from lengths alone")
    completions = table("| principle | completion | tokens | format = reward r | advantage A |", [
        ("" if g else principle.text, f"`{text}`", *(number(of[i, g], 0) for of in (lengths, rewards)),
         number(advantages[i, g]))
        for i, principle in enumerate(task.principles) for g, text in enumerate(batch.texts[0][i])
    ])
    return f"""## 1. The batch

The question is asked four times, each time with another *principle*, a sentence that the reasoning should follow. This
is the prompt with the third of them, as the model reads it:

```
{program.tokenizer.decode(batch.prompts[0][SHOWN])}
```

A *group* is what the model writes after one such prompt: G = {config.num_generations} completions, each sampled token
by token from the model's own probabilities. The four principles make four groups.

{completions}

The **reward** r is the paper's *CoT-format-only* reward, and the only one there is. It is 1 for a text that consists of
one non-empty `<reasoning>…</reasoning>` and one non-empty `<answer>…</answer>`, and 0 for any other. It does not ask
whether the answer is {task.question.answer}, or whether the principle was followed. Of the
{number((~working).sum(), 0)} completions that guess {number(rewards[~working].sum(), 0)} earn it, and of the
{number(working.sum(), 0)} that calculate {number(rewards[working].sum(), 0)}; the others miss a tag. A model that wants
nothing but this reward learns from this batch to guess.

The **advantage** A = r − mean(r) compares a completion with the others of its group. It says which answers to one and
the same prompt should become likelier and which less likely. In every group it sums to 0, and a group in which all earn
the same teaches nothing.

**Why the loss is near 0 and its gradient is not.** Write ℓ for the log-probability of a token now, and ℓ_old for the
one it had when it was sampled. GRPO weighs a completion by the ratio ρ = exp(mean over its tokens of ℓ − ℓ_old). Before
the step the two are equal, so ρ is {number(start.terms["ratio_mean"], 3)} for all {count} completions, clipping it to
the range from {1 - config.epsilon:g} to {1 + config.epsilon:g} changes nothing, and the loss of a completion is −A. The
advantages of a group cancel. What remains comes from lengths alone, since a completion counts with its number of
tokens: L_GRPO = −Σ A · tokens / ({count} · {limit}) = {number(by_length, 3)}, where {limit} is the limit on tokens. The
gradient, by contrast, adds up A times the direction in which each completion becomes likelier. These directions differ,
so they do not cancel, and its norm is {number(norm(start.gradients["loss_grpo"]), 3)}."""


def scores_part(start) -> str:
    scores, every, names = start.scores[SHOWN], start.scores, start.names  # [K, K], [G, K, K]
    log_k, row, column = math.log(len(scores)), row_info_nce(scores), column_info_nce(scores)  # [K] both
    info, si, posterior = information(every).T, sufficiency_index(every), scores.softmax(1)  # [K, G], [K], [K, K]
    rows, columns = row_info_nce(every).mean(), column_info_nce(every).mean()  # [] both
    largest, smallest = scores.max(), scores.min()
    telling, guess = int(posterior.diagonal().argmax()), int((~start.working[:, SHOWN]).nonzero()[0])
    check(posterior[telling, telling] > 0.9, "one of the third completions gives its principle away")
    check(posterior[guess].max() < 0.35, "the guess may have been written under any principle")
    check((scores.softmax(0)[guess] > 0.1).all(), "the guess takes weight under every principle")
    check(abs((rows + columns) / 2 - start.terms["loss_mi"]) < 1e-4, "L_SAMI is the mean of both directions")
    losses = table("| completion written under | row loss | log K − row | column loss |", [
        *((name, *map(number, (row[i], log_k - row[i], column[i]))) for i, name in enumerate(names)),
        ("mean of these four", *map(number, (row.mean(), log_k - row.mean(), column.mean()))),
        ("**mean of all sixteen**", number(rows), f"**{number(log_k - rows)}**", number(columns)),
    ])
    shares = table("| log K − row of the | first | second | third | fourth | mean: MI | SI |", [
        *((name, *map(number, info[i]), number(info[i].mean()), number(si[i])) for i, name in enumerate(names)),
        ("**all**", "", "", "", "", f"**{number(info.mean())}**", f"**{number(start.si)}**"),
    ])
    return f"""## 2. The score matrix

The score S[i, j] is the log-probability that the model gives under principle j to the chain of thought (CoT) that it
wrote under principle i. It is a sum over the tokens up to `</reasoning>`, or over all tokens where that tag never
comes, and its unit is the nat, as that of all information here: logarithms are natural. The first completions of the
four groups make one matrix, the second ones another, and so on. Here is the
matrix of the third ones; the principles go by short names, in the order of the table above.

![The score matrix, its row softmax and its column softmax](figures/one-step-scores.png)

A large entry, such as {number(largest)}, says that the model would readily write this text under that principle: in
{100 * largest.exp():.0f} of 100 completions it does. A small entry, such as {number(smallest)}, says that it hardly
ever would: in about one of {float(f"{smallest.neg().exp():.2g}"):,.0f}.

**Which principle wrote this?** The softmax of a row of S answers for one completion. The text written under
`{names[telling]}` gives its principle away ({number(posterior[telling, telling])}), whereas the guess under
`{names[guess]}` may have been written under any of them ({number(posterior[guess].min())} to
{number(posterior[guess].max())}). The *row loss* is −log of the entry on the diagonal. With log K = log 4 =
{number(log_k)}, the difference log K − row is the information that a text carries about its principle: {number(log_k)}
if it names the principle with certainty, 0 if it fits all of them alike, and less than 0 if it points to a wrong one.

**Which completion did it write?** The softmax of a column answers for one principle, and the *column loss* is −log of
its entry on the diagonal. In this direction the texts compete with each other, and a guess, which is likely under every
principle, takes weight from them all.

{losses}

**SAMI-style symmetric InfoNCE** is the mean of both directions over all sixteen completions: L_SAMI = ½
({number(rows, 3)} + {number(columns, 3)}) = {number(start.terms["loss_mi"], 3)} nats. The row measures, and it is the
column that moves the model: in expectation the gradient of the row is 0, as
[theory.md](theory.md#what-pushes-principles-apart) derives in a line.

**The MI lower bound under matched negatives** is the mean of log K − row. The negatives of a completion are the other
three principles. They are *matched*: the question is the same, and the scores come from the model that wrote the text,
at the temperature at which it wrote it. Under this condition the mean, {number(info.mean(), 3)} nats here, is an
unbiased estimate of the mutual information (MI) between principle and chain of thought. With scores from elsewhere it
would only be a bound from below. Either way it cannot exceed log K.

**The Sufficiency Index** (SI) is the share of this maximum, max(0, mean of log K − row) / log K, for one principle or
for the set. It is 1 where the text always gives its principle away and 0 where it says nothing about it.

{shares}

One question says little about a model. The table at the top of the [README](../README.md) has the SI over 512 of
them."""


def clouds_part(moments: dict, drifted: dict) -> str:
    rows, ladders, shares = [], {}, []
    for name, by_eps in drifted.items():
        x, y = moments[name].states, moments[name].start_states  # [n, d] both
        paired, means = (x - y).square().sum(-1).mean().item(), (x.mean(0) - y.mean(0)).square().sum().item()
        ladders[name] = [paired, *(transport.divergence for transport in by_eps.values()), means]
        check(abs(by_eps[0.1].divergence - moments[name].terms["loss_ot"]) < 1e-3, "training's S_ε is that at 0.1")
        rows.append((name, *(number(value, 3) for value in ladders[name]), number(relative_eps(x, y, 1.0), 0)))
        shares.append(f"{100 * principal_axes(torch.cat([x, y]))[1]:.0f}%")
    (first, second, alone), tokens, dimensions = drifted, *moments[OURS_EARLY].states.shape
    apart = float(relative_eps(moments[first].states, moments[first].start_states, 1.0) / ladders[first][0]) ** 0.5
    links = [f"{len(transport.strongest()[0]):,}" for transport in drifted[first].values()]
    used, largest = (
        {part: errors[-1][0] for part, errors in drifted[first][eps].errors.items()} for eps in (0.1, EPSILONS[-1])
    )
    further = ladders[alone][2] / ladders[second][2]
    check(apart > 5, "tokens are far apart, compared with how far one has moved")
    check(all(a > b for values in ladders.values() for a, b in itertools.pairwise(values)), "S_ε falls as ε rises")
    check(further > 5, "GRPO alone drifts several times as far")
    check(used["fast"] < used["textbook"] / 3, "the fast part needs far fewer iterations at the ε of training")
    check(largest["textbook"] <= largest["fast"] < 10, "both need few iterations at the largest ε")
    head = "".join(f" S_ε at ε = {eps:g} |" for eps in EPSILONS)
    return f"""## 3. The clouds

The third term compares hidden states: for {tokens} tokens, drawn at random from the question's completions, the vector
of {dimensions} numbers from which the model predicts that token. The vectors of the policy, the model in training, are
one cloud; those of the frozen start, which reads the same tokens, are the other. Before the first step the two are one
model, so the clouds are equal and there is nothing to see. This section therefore takes the same question after {EARLY}
and after {LATE} steps of ENIGMA and, for contrast, after {LATE} steps of GRPO alone. Each model has written its own
completions.

**Entropic Sinkhorn OT on hidden-state distributions** asks what it costs to move one cloud onto the other. A *plan*
P[i, j] says how much of the policy's point x_i goes to the start's point y_j, and the cost of that link is their
squared distance C[i, j] = |x_i − y_j|². Of all plans that move everything, the best is the one with the least OT_ε: its
total cost, plus ε times its divergence (KL) from the plan that spreads every point evenly. The larger ε is, the more
evenly the best plan spreads. The spreading has a price of its own, and S_ε takes it off, so that equal clouds are at 0:
S_ε = OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y). On this page ε is in units of the mean cost; training uses 0.1.

![Both clouds, and the strongest links of the plan, at four values of ε](figures/one-step-clouds.png)

Each row is drawn in the two principal directions of both its clouds together, which hold {shares[0]}, {shares[1]} and
{shares[2]} of the variance. The links are the strongest ones, as many as carry half of the plan; in the first row these
are {links[0]}, {links[1]}, {links[2]} and {links[3]} of {tokens**2:,}. Under ENIGMA the policy stays close to its
start: two tokens are {apart:.0f} times as far apart as one token has moved. At a small ε the plan therefore sends a
token to itself and to its nearest neighbours, and at a large ε it forgets which token is which.

{table(f"| model | mean squared distance |{head} squared distance of the means | mean cost |", rows)}

S_ε lies between two numbers that need no transport. At a small ε it is almost the mean squared distance of a token from
itself, and at a large ε almost the squared distance between the means of the clouds. GRPO alone has nothing that holds
it, and its S_ε at 0.1 is {further:.0f} times that of ENIGMA after as many steps.

The plan is found by iteration: scale its columns to their sums, then its rows, and again. The next figure has the error
that is left after each iteration, for the textbook's way and for the faster one that training calls; both end at the
same plan. At ε = 0.1, after {EARLY} steps, the textbook needs {used["textbook"]} iterations to an error of 1e-4 and the
fast part {used["fast"]}. At ε = {EPSILONS[-1]:g} it is {largest["textbook"]} and {largest["fast"]}: where the plan is
nearly even there is nothing to speed up.

![Error of the plan by iteration, of the textbook and of the fast part](figures/one-step-sinkhorn.png)"""


class Gradients:
    """The tables of section 4 for the model that the program holds, and the numbers that the text rests on.

    A term whose gradient is nothing but rounding has no direction, and no step is taken along it.
    """

    def __init__(self, program, moment):
        weights = {"loss_grpo": 1.0, "loss_mi": program.config.lambda_mi, "loss_ot": program.config.lambda_ot}
        norms = {name: norm(moment.gradients[name]) for name in TERMS}
        self.weighted = {name: norms[name] * weights[name] for name in TERMS}
        some = {name: moment.gradients[name] for name in TERMS if self.weighted[name] > 1e-4}
        self.cosines, self.changes, self.divergences = cosines(some), {}, {}
        working, (guess, worked) = moment.working, moment.pair()
        for name in some:
            change, self.divergences[name] = program.along(moment, name)  # [K, G]
            self.changes[name] = change[guess], change[~working].mean(), change[worked], change[working].mean()
        sizes = table("| term | its value | norm of its gradient | its weight λ | λ · norm |", [
            (label, number(moment.terms[name], 3), number(norms[name], 3), f"{weights[name]:g}",
             number(self.weighted[name], 4)) for name, label in TERMS.items()
        ])
        angles = ", ".join(f"of {TERMS[a]} and {TERMS[b]} {number(value)}" for (a, b), value in self.cosines.items())
        counts = [number(kind.sum(), 0) for kind in (~working, working)]
        head = "| a step along | the guess | all {} guesses | the working | all {} workings | S_ε after it |"
        steps = table(head.format(*counts), [
            (TERMS[name], *(number(value, 3) for value in (*self.changes[name], self.divergences[name])))
            for name in some
        ])
        shown = [f"`{moment.batch.texts[0][i][g]}`" for i, g in (guess, worked)]
        self.text = (f"{sizes}\n\nCosines: {angles}.\n\n{steps}\n\n"
                     f"The guess is {shown[0]} and the working {shown[1]}, both under `{moment.names[guess[0]]}`.")


def gradients_part(program, start) -> str:
    found = Gradients(program, start)
    (_, guesses, _, workings), (_, mi_guesses, _, mi_workings) = found.changes.values()
    opposed = found.cosines["loss_grpo", "loss_mi"]
    check(guesses > 0 > workings and opposed < -0.5, "the format reward makes guesses likelier, and the terms oppose")
    check(mi_workings > 0 > mi_guesses, "the InfoNCE term makes workings likelier")
    return f"""## 4. Three gradients

The loss is L = L_GRPO + λ_mi · L_SAMI + λ_ot · S_ε. Each term has its own gradient in the
{sum(weight.numel() for weight in program.weights):,} weights of the model. The *cosine* of two gradients is 1 where
they ask for the same change, −1 where they ask for opposite ones, and 0 where they have nothing to do with each other.
The second table takes one small step (of length {LENGTH:g}) down the gradient of a single term, and reads by how many
nats the log-probabilities of completions change: of a guess and a working from one group, and on average over the
batch.

### Before the first step

{found.text}

This table holds the idea of the method. The format reward by itself makes guesses likelier and workings less likely.
The InfoNCE term does the reverse, because a guess fits every principle and so hides which one it was written under. The
gradients of the two point against each other. The transport term has no say yet: the clouds are equal, and what is left
of its gradient is the tolerance of the iteration."""


def later_gradients_part(program, moment) -> str:
    found = Gradients(program, moment)
    ratio, before = max(found.weighted.values()) / min(found.weighted.values()), moment.terms["loss_ot"]
    check(len(found.changes) == 3 and ratio < 5, "the three gradients are of a size")
    check(moment.rewards.mean() > 0.8, "most completions keep the format")
    check(found.divergences["loss_ot"] < before, "a step along the transport term lowers S_ε")
    check(all(abs(value) < 0.2 for (_, b), value in found.cosines.items() if b == "loss_ot"), "it is at right angles")
    return f"""### After {EARLY} steps

{found.text}

Now all three take part, and with their weights they are of a size: the largest is {number(ratio, 1)} times the
smallest. {number(moment.rewards.sum(), 0)} of the {moment.rewards.numel()} completions keep the format by now, and a
group in which all do has no advantages left: the format reward speaks only where one still fails. A step along the
transport term takes S_ε from {number(before, 3)} to {number(found.divergences["loss_ot"], 3)}, back towards the start.
Its gradient is nearly at right angles to the other two, so it slows the drift and hardly hinders what they teach."""


def weights_part(program, start) -> str:
    done, terms, (guess, worked), most = program.step(start), start.terms, start.pair(), program.config.max_grad_norm
    shown = {"loss_grpo": "L_GRPO", "loss_mi": "L_SAMI", "loss_ot": "S_ε", "mi_row": "MI",
             "ratio_mean": "ratio ρ, mean", "ratio_max": "ratio ρ, largest"}
    check(done["grad_norm"] < norm(start.gradients["loss_grpo"]), "opposed terms have a smaller gradient together")
    check(done["grad_norm"] < most, "the gradient is not clipped")
    check(done["terms"]["ratio_max"] > 1.001, "the ratios leave 1")
    check(done["terms"]["loss_ot"] > 10 * abs(terms["loss_ot"]), "the clouds part")
    check(done["change"][guess] > 0 > done["change"][worked], "in the first step the format wins")
    again = table("| | before the step | after it |", [
        (label, number(terms[name], 4), number(done["terms"][name], 4)) for name, label in shown.items()
    ])
    return f"""## 5. The change of the weights

The gradient of the whole loss L has a norm of {number(done["grad_norm"], 3)}, less than that of the format reward by
itself, because the terms oppose each other. It is below {most:g}, so it is not clipped. AdamW divides the gradient,
weight by weight, by its recent size, so that in the first step nearly every weight moves by the learning rate,
{done["rate"]:.2g} at the beginning of the warm-up. All together they move by {number(done["moved"], 3)}. Reading the
same completions again with the new weights gives:

{again}

The log-probability of the guess of section 4 has changed by {number(done["change"][guess])} nats, and that of the
working by {number(done["change"][worked])}: in this first step the format wins. The ratios have left 1, so a second
pass over these completions would be off-policy, and clipping would begin to matter. The clouds have parted, and from
the next step on S_ε holds them together.

The rest of the README's equations have a weight of 0 in this step: information as a reward, the KL to the start, and
the preference losses."""


def later_part(moments: dict) -> str:
    start, ours, alone = (moments[name] for name in ("start", f"{OURS}, step {LATE}", f"{ALONE}, step {LATE}"))
    before, after, lost = (information(moment.scores).mean() for moment in (start, ours, alone))  # [] each
    check(not alone.working.any() and alone.rewards.mean() > 0.9 and lost < 0.05, "with GRPO alone the reasoning goes")
    check(ours.working.sum() >= start.working.sum() and after > before, "with all three terms the reasoning stays")
    check(ours.rewards.sum() > start.rewards.sum(), "with all three terms it comes to keep the format")
    counts = table("| model | format | calculates | right answer | MI | SI | S_ε |", [
        (name, *(number(kind.sum(), 0) for kind in (moment.rewards, moment.working, moment.right)),
         number(information(moment.scores).mean()), number(moment.si),
         number(moment.terms["loss_ot"])) for name, moment in moments.items()
    ])

    def text(run, step, i):
        return moments[f"{run}, step {step}" if step else "start"].batch.texts[0][i][SHOWN]

    completions = table("| principle | step | ENIGMA | GRPO alone |", [
        ("" if step else name, str(step), *(f"`{text(run, step, i)}`" for run in RUNS))
        for i, name in enumerate(start.names) for step in (0, *STEPS)
    ])
    return f"""## 6. The same question later

Two trainings start from this model: one with all three terms, one with the format reward alone. The question, the
principles and the random numbers of sampling are those of section 1. In the figure a cell is the mean, over the four
completions of a group, of the row softmax: how strongly a text written under the principle of the row points to the
principle of the column.

![Row softmax by step, of ENIGMA and of GRPO alone](figures/one-step-later.png)

{counts}

The first three columns count completions out of sixteen; a right answer that was not calculated is luck. With GRPO
alone {number(alone.rewards.sum(), 0)} of them keep the format after {LATE} steps and not one calculates. The matrix is
flat, because the text no longer depends on the principle. With all three terms the reasoning stays, comes to keep the
format, and tells more about its principle than before. These are the third completions of each group:

{completions}"""


def untrained_parts(program, start) -> list[str]:
    """The sections that need no trained model, as on the page. The program is left with the weights after the step."""
    parts = batch_part(program, start), scores_part(start), gradients_part(program, start), weights_part(program, start)
    return [wrapped(part) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "one-step")
    directory = parser.parse_args().output_dir
    try:
        from experiments.one_step_figures import draw_all  # here: the numbers need no matplotlib
    except ImportError as error:
        raise SystemExit(f"error: {error}; the figures need `pip install matplotlib`") from None
    folders = {run: directory / run.replace(" ", "-") for run in RUNS}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page has the numbers of a CPU

    def fit(run, *flags):
        common = "--principles", PRINCIPLES, "--eval-questions", 1, "--eval-steps", 0, "--save-steps", EARLY
        run_training(folders[run], *common, *flags)

    side_by_side(fit, [(run, *flags) for run, flags in RUNS.items()], len(RUNS))

    torch.set_num_threads(1)  # as the trainings: a sum has one order then, and a number one value
    program = Program()
    moments = {"start": program.moment()}
    batch, scores, gradients, weights = untrained_parts(program, moments["start"])
    for run, step in itertools.product(RUNS, STEPS):
        name = f"{run}, step {step}"
        moments[name] = program.moment(folders[run] / "checkpoints" / f"step_{step}.pt")
        if name == OURS_EARLY:
            later_gradients = later_gradients_part(program, moments[name])
    shown = OURS_EARLY, f"{OURS}, step {LATE}", f"{ALONE}, step {LATE}"
    drifted = {name: transports(moments[name]) for name in shown}
    parts = [opening(moments["start"], moments[OURS_EARLY]), batch, scores, clouds_part(moments, drifted), gradients,
             later_gradients, weights, later_part(moments)]

    draw_all(moments, drifted)
    PAGE.write_text("\n\n".join(map(wrapped, parts)) + "\n", encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
