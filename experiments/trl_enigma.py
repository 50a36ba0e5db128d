"""The three terms inside TRL's GRPOTrainer: for models that our own loop cannot hold.

    python experiments/trl_enigma.py                     # the embedded model, 70 steps: reward, SI and drift
    python experiments/trl_enigma.py --steps 5 --check   # then: on the same completions, the losses of train.py

It needs `pip install trl==1.16.0`. EnigmaTrainer is the part to copy, with infonce.py, sinkhorn.py,
metrics.py, grpo.format_reward and cot_mask. Its forwards all go through the wrapped model, as TRL's do.
Run so far, with the embedded model: one process, two (DDP on CPUs), LoRA with gradient
checkpointing and accumulation. Not run: FSDP, DeepSpeed, vLLM.

    rows     Q questions x K principles x G completions, in this order: the data set has the K prompts of a question one
             after the other, TRL repeats each G times and shuffles nothing, a process takes whole questions
    scores   [Q, G, K, K] summed log-probability of the chain of thought of completion i under prompt j
    hidden   the last layer's states at the positions that predict completion tokens; a question is one cloud
    loss     TRL's + lambda_mi * symmetric_info_nce(scores) + lambda_ot * sinkhorn_divergence(hidden, the start's)

Simpler than train.py: no shared prefixes (a completion passes the model 1 + K times for
log-probabilities, once for its hidden states, once the reference); all questions of a micro-batch
at once (per_device_train_batch_size = K * G is one, with K * K * G rows in memory: gradient
checkpointing, TRL's default, helps); critic temperature 1; the tokens that OT compares come from
torch's generator; with LoRA the start is the base model. TRL's evaluation shuffles, and is refused.
"""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

try:
    import trl
except ImportError as error:
    raise SystemExit(f"error: {error}; `pip install trl==1.16.0` brings what this benchmark needs") from None

import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402

import train  # noqa: E402
from grpo import format_reward  # noqa: E402
from infonce import symmetric_info_nce  # noqa: E402
from metrics import mutual_information, share_of_ceiling  # noqa: E402
from sinkhorn import relative_eps, sinkhorn_divergence  # noqa: E402
from support import sampling, tiny  # noqa: E402
from support.answers import cot_mask  # noqa: E402
from support.errors import InputError  # noqa: E402
from support.files import load_principles  # noqa: E402
from support.prompts import PromptTemplate, build_messages  # noqa: E402
from support.sampling import Completions  # noqa: E402


class EnigmaTrainer(trl.GRPOTrainer):
    def __init__(self, args, num_principles, lambda_mi=0.012, lambda_ot=0.002, ot_tokens=128, **kwargs):
        if args.shuffle_dataset or args.steps_per_generation != 1:
            raise ValueError("shuffle_dataset=False and steps_per_generation=1 are accepted: a question stays together")
        beta, args.beta = args.beta, args.beta or 1.0  # TRL keeps a reference only where it has a KL term
        super().__init__(args=args, **kwargs)
        self.beta = args.beta = beta
        self.shape = -1, num_principles, self.num_generations  # Q, K, G
        self.lambda_mi, self.lambda_ot, self.ot_tokens = lambda_mi, lambda_ot, ot_tokens

    def _generate_and_score_completions(self, inputs):
        size = self.shape[1] * self.shape[2]
        for block in (inputs[start : start + size] for start in range(0, len(inputs), size)):
            questions, prompts = ({str(row[name]) for row in block} for name in ("question", "prompt"))
            if (len(block), len(questions), len(prompts)) != (size, 1, self.shape[1]):
                raise ValueError(f"{len(block)} rows of a batch have {len(questions)} questions and {len(prompts)} "
                                 f"prompts; 1 question and {self.shape[1]} prompts in {size} rows are accepted")
        return {**super()._generate_and_score_completions(inputs), "order": torch.arange(len(inputs))}

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # [] TRL's own
        order = inputs["order"].argsort()  # [N] undoes TRL's shuffle of the rows
        names = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"
        prompt, seen, tokens, mask = (inputs[n][order].unflatten(0, self.shape) for n in names)  # [Q, K, G, L or T]
        _, num, per_group, width = tokens.shape

        def under_each(left, right):  # [Q·K·K·G, L+T] the completions of a question after each of its prompts
            left = left[:, :, None, :1].expand(-1, -1, num, per_group, -1)  # [Q, j, i, G, L]
            return torch.cat([left, right[:, None].expand(-1, num, -1, -1, -1)], -1).flatten(0, 3)

        logp = self._get_per_token_logps_and_entropies(model, under_each(prompt, tokens), under_each(seen, mask), width)
        cot = cot_mask(self.processing_class, tokens, mask.bool())  # [Q, K, G, T]
        scores = (logp[0].unflatten(0, (-1, num, num, per_group)) * cot[:, None]).sum(-1).permute(0, 3, 2, 1)

        def hidden(net):  # [Q, K·G·T, d]
            ids, attention = (torch.cat(pair, -1).flatten(0, 2) for pair in ((prompt, tokens), (seen, mask)))
            out = net(ids, attention, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            return out.hidden_states[-1][:, -width - 1 : -1].unflatten(0, self.shape).flatten(1, 3)

        keys = torch.rand(mask.shape, device=mask.device).masked_fill(mask == 0, -1).flatten(1)  # [Q, K·G·T]
        cloud = keys.topk(min(self.ot_tokens, keys.shape[1])).indices  # [Q, n] padding last, of weight 0
        weights = mask.flatten(1).gather(1, cloud).float()  # [Q, n]
        start = nullcontext() if self.ref_model else self.accelerator.unwrap_model(model).disable_adapter()
        with torch.no_grad(), start:
            ref = hidden(self.ref_model or model).take_along_dim(cloud[..., None], 1)  # [Q, n, d]
        states = hidden(model).take_along_dim(cloud[..., None], 1)  # [Q, n, d]
        eps = relative_eps(states, ref, 0.1, weights, weights)  # [Q]
        mi, drift = symmetric_info_nce(scores), sinkhorn_divergence(states, ref, eps, weights, weights)[0].mean()
        si = share_of_ceiling(mutual_information(scores.detach().flatten(0, 1)).row, num)  # []
        for name, value in {"loss_mi": mi, "loss_ot": drift, "si": si}.items():
            self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
        return loss + (self.lambda_mi * mi + self.lambda_ot * drift) / self.current_gradient_accumulation_steps


def reward(completions, **_):
    return [format_reward(messages[0]["content"]) for messages in completions]


class Show(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            print(f"step {state.global_step:3}: reward {logs['reward']:.2f}, SI {logs['si']:.2f}, "
                  f"drift {logs['loss_ot']:.3f}", flush=True)


def make_trainer(config, directory):
    """(a trainer with the settings of train.py, what it draws at each step)."""
    questions, principles = tiny.make_questions(4096, False, config.seed), load_principles(config.principles)
    drawn = [train.draw(questions, principles, config, step) for step in range(config.max_steps)]
    rows = [{"question": task.question.text, "prompt": build_messages(task.question.text, p.text)}
            for tasks in drawn for task in tasks for p in task.principles]
    trainer = EnigmaTrainer(
        num_principles=config.num_principles, lambda_mi=config.lambda_mi, lambda_ot=config.lambda_ot,
        ot_tokens=config.ot_tokens, model=str(tiny.MODEL_DIR), reward_funcs=reward, callbacks=[Show()],
        train_dataset=Dataset.from_list(rows),
        args=trl.GRPOConfig(
            directory, shuffle_dataset=False, steps_per_generation=1, num_generations=config.num_generations,
            per_device_train_batch_size=config.num_questions * config.num_principles * config.num_generations,
            max_completion_length=config.max_completion_length, temperature=config.temperature, seed=config.seed,
            max_steps=config.max_steps, learning_rate=config.learning_rate, warmup_steps=config.warmup_steps,
            lr_scheduler_type=config.lr_scheduler_type, max_grad_norm=config.max_grad_norm, epsilon=config.epsilon,
            loss_type=config.loss_type, scale_rewards=config.scale_rewards, beta=config.beta,
            importance_sampling_level=config.importance_sampling_level, bf16=False, gradient_checkpointing=False,
            logging_steps=max(1, config.max_steps // 10), report_to="none", save_strategy="no", disable_tqdm=True,
        ),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, drawn


def check(trainer, drawn, config) -> None:
    """Prints how far losses and gradient of TRL's are from train.py's; exits 1 above 1e-4."""
    # No term hides behind another's weight, and OT compares all tokens: the two draw differently.
    changed = {"lambda_mi": 1.0, "lambda_ot": 1.0, "ot_tokens": 10**9}
    model, config = trainer.model, replace(config, **changed)
    vars(trainer).update(changed)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs = {"loss": trainer.compute_loss(model, inputs)}
    theirs |= {name: trainer._metrics["train"][name][-1] for name in ("loss_mi", "loss_ot")}

    tokens, mask = (inputs[n][inputs["order"].argsort()] for n in ("completion_ids", "completion_mask"))  # [N, T]
    tokens, mask = (t.unflatten(0, (-1, config.num_generations)) for t in (tokens, mask.bool()))  # [Q·K, G, T]
    unused = torch.zeros(mask.shape[:2])  # [Q·K, G]
    sampling.sample = lambda *args: Completions(tokens, mask, unused.bool(), unused)
    batch = train.sample(model, trainer.processing_class, PromptTemplate(), drawn[0], config.num_generations, config)
    targets = train.make_targets(model, trainer.ref_model, batch, train.reward_completions(batch, config), config)
    outputs = train.read(model, batch, targets.ot_tokens, config, config.scored_generations)
    loss, terms = train.losses(outputs, batch, targets, config)

    apart = {}
    for name, value in theirs.items():
        numbers = [torch.as_tensor(number).item() for number in (value, {"loss": loss, **terms}[name])]
        apart[name] = abs(numbers[0] - numbers[1])
        print("{:8} TRL {:.6f}, train.py {:.6f}, apart {:.1e}".format(name, *numbers, apart[name]))
    parameters = list(model.parameters())
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters)]) for v in (theirs["loss"], loss))
    apart["gradient"] = ((a - b).norm() / b.norm()).item()
    print(f"gradient norms {a.norm():.6f}, {b.norm():.6f}, relative distance {apart['gradient']:.1e}")
    if max(apart.values()) > 1e-4:
        raise SystemExit("error: EnigmaTrainer and train.py differ by more than 1e-4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="70")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    try:
        config = train.parse(["--principles", str(ROOT / "principles" / "reasoning.txt"), "--max-steps", args.steps])
    except InputError as error:
        parser.error(str(error))
    train.load(config)  # settles what depends on the model
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        trainer, drawn = make_trainer(config, directory)
        trainer.train()
    if args.check:
        check(trainer, drawn, config)


if __name__ == "__main__":
    main()
