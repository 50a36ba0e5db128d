"""What the exchanged terms of experiments/variants.py do to the gradient.

    python experiments/variants.py && python experiments/gradients.py

1. Anchors. The Sinkhorn divergence and the squared distance of the same tokens pull on the states of
   each model that variants.py trained with seed 0: the two values, and the cosine of the gradients
   in the states of a question, at several --ot-eps; means over 16 questions. "own" is the divergence
   from the start's own completions, 128 tokens of each: of the start itself it is sampling noise.
2. Information. The gradient g in the weights, at the start, of each variant's loss over 16 batches:
   |E g| without the part that is noise, sqrt(E |g - E g|^2), and their ratio. Anchors are 0 there.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402
from torch.nn.functional import cosine_similarity as cosine  # noqa: E402

import train  # noqa: E402
from experiments.common import make_parser, run_script, side_by_side  # noqa: E402
from experiments.variants import VARIANTS, exchange, folder, squared_distance  # noqa: E402
from support import tiny  # noqa: E402
from support.data import load_data  # noqa: E402
from support.model import load_model  # noqa: E402

BATCHES = 16
INFORMATION = ("no loss", "sinkhorn", "beside", "in place", "per token", "opposites")  # the others add to the first


def start_of(config):
    """(model, the frozen start, tokenizer, data) of a training."""
    model, tokenizer = train.load(config)
    start, _ = load_model(str(tiny.MODEL_DIR), model.device)
    return model, start, tokenizer, load_data(model, tokenizer, config)


def pulls(model: Path, principles: Path) -> dict:
    """Name -> figure of a trained model; see 1."""
    config = train.parse([
        "--principles", str(principles), "--model", str(model), "--num-questions", "16",
    ])
    trained, start, tokenizer, data = start_of(config)
    tasks = train.draw(data.questions, data.principles, config, 0)
    batch = train.sample(trained, tokenizer, data.template, tasks, config.num_generations, config)
    tokens, weights = train.choose_ot_tokens(batch, config)  # [Q, n] both
    _, of_start = train.read_reference(trained, start, batch, tokens, config)  # [Q, n, d]
    with torch.no_grad():
        states = train.read(trained, batch, tokens, config).states  # [Q, n, d]
    value, pull = value_and_pull(lambda states: squared_distance(states, of_start, weights), states)
    found = {"squared": value}
    for config.ot_eps in (10, 1, 0.1, 0.01):
        value, other = value_and_pull(lambda states: train.drift(states, of_start, weights, config)[0], states)
        found |= {f"S, {config.ot_eps}": value, f"cosine, {config.ot_eps}": cosine(pull, other).mean().item()}
    tasks = [train.Task(task.question, task.principles, f"{task.key} start") for task in tasks]  # other lots
    own = train.sample(start, tokenizer, data.template, tasks, config.num_generations, config)
    config.ot_eps = 0.1
    own_tokens, _ = train.choose_ot_tokens(own, config)  # [Q, n] both clouds are full: their weights are the same
    _, own_states = train.read_reference(start, start, own, own_tokens, config)  # [Q, n, d]
    return found | {"own": train.drift(states, own_states, weights, config)[0].mean().item()}


def value_and_pull(anchor, states):
    """(mean over questions, gradient in the states [Q, n·d]) of anchor(states) [Q]."""
    states = states.clone().requires_grad_()  # [Q, n, d]
    values = anchor(states)  # [Q]
    values.sum().backward()
    return values.mean().item(), states.grad.flatten(1)


def noise(flags) -> dict:
    """Name -> figure of a training that has not begun; see 2."""
    config = train.parse(flags)
    model, start, tokenizer, data = start_of(config)
    gradients = []
    for step in range(BATCHES):
        batch = train.sample(
            model, tokenizer, data.template, train.draw(data.questions, data.principles, config, step),
            config.num_generations, config,
        )
        scores = train.read_scores(model, batch, config) if config.mi_reward else None  # [Q, G, K, K]
        rewards = train.reward_completions(batch, config, scores)
        targets = train.make_targets(model, start, batch, rewards, config)
        outputs = train.read(model, batch, targets.ot_tokens, config, config.scored_generations)
        train.losses(outputs, batch, targets, config)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # [weights]
        model.zero_grad()
    gradients = torch.stack(gradients)  # [BATCHES, weights]
    variance = gradients.var(0).sum()  # [] of one step, all weights together
    signal = (gradients.mean(0).square().sum() - variance / BATCHES).clamp(min=0)  # [] unbiased but for the clamp
    found = {"signal": signal.sqrt(), "noise": variance.sqrt(), "noise / signal": (variance / signal).sqrt()}
    return {name: value.item() for name, value in found.items()}


def table(rows: dict) -> str:
    """Markdown; rows: name -> {column: figure}."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [
        f"| {name} | " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |" for name, row in rows.items()
    ])


def main() -> None:
    if sys.argv[1:2] == ["--noise"]:  # in a process of its own: exchange() changes train.py
        exchange(sys.argv[2])
        print(json.dumps(noise(sys.argv[3:])))
        return
    args = make_parser(__doc__, "variants", 1).parse_args()
    principles = args.output_dir / "principles.jsonl"
    rows = json.loads((args.output_dir / "variants.json").read_text())["rows"]
    chosen = {name: weight for name, (weight, _) in rows.items() if name in VARIANTS}
    models = {name: folder(args.output_dir, name, weight, 0) / "final" for name, weight in chosen.items()}
    print(table({name: pulls(path, principles) for name, path in {"start": tiny.MODEL_DIR, **models}.items()}), "\n")

    def measure(name, weight):
        flag, _, others = VARIANTS[name]
        printed = run_script(__file__, "--noise", name, "--principles", principles.resolve(), *others, flag, weight)
        return json.loads(printed.splitlines()[-1])

    found = side_by_side(measure, [(name, chosen[name]) for name in INFORMATION], args.jobs)
    print(table({name: figures for (name, _), figures in found.items()}))


if __name__ == "__main__":
    main()
