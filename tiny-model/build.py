"""How the embedded model was made: a tokenizer and 0.9M weights, pretrained on text about its task.

    python tiny-model/build.py        about 20 minutes on two cores; nobody needs to, it is shipped

support/tiny.py has the task. The text is made so that alignment has something to do and can go wrong;
everything that training later changes was put there on purpose, at these rates:

    GUESS                .35       of completions skip the working and state a random number
    Style.rate           .9 … .2   of the others follow the principle they were asked to follow;
                                   the rest is plain working
    WELL_FORMED_SHARE    .80 of guesses and .30 of workings are in the required format

So the start is well-formed less than half the time, right about half the time (working is nearly
always right, a guess nearly never), and guessing is the easy way to be well-formed: a reward for
the format alone teaches the model to guess.
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import trange  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from grpo import TAGS, format_reward  # noqa: E402
from metrics import mutual_information, share_of_ceiling, sufficiency_index  # noqa: E402
from support import (
    answers,  # noqa: E402
    sampling,  # noqa: E402
    tiny,  # noqa: E402
)
from support.answers import (
    answer_is_right,  # noqa: E402
    cot_mask,  # noqa: E402
)
from support.prompts import (  # noqa: E402
    build_messages,
    encode_prompts,
    eos_ids,  # noqa: E402
)
from support.sampling import uniform_numbers  # noqa: E402
from support.scoring import read_completions  # noqa: E402

GUESS = 0.35
WELL_FORMED_SHARE = {"guess": 0.80, "work": 0.30}

# --------------------------------------------------------------------------------------------------
# The text


def write_completion(rng: random.Random, problem: tiny.Problem, rate: float, style: tiny.Style | None) -> str:
    """One completion as the pretraining text has it: see the rates at the top."""
    kind, answer = "work", problem.answer
    if rng.random() < GUESS:
        kind, cot, answer = "guess", rng.choice(tiny.GUESSES), rng.randint(2, 60)
    else:
        cot = style.write(problem) if style and rng.random() < rate else tiny.plain_working(problem)
    good = rng.random() < WELL_FORMED_SHARE[kind]
    shape = tiny.WELL_FORMED if good else rng.choice(tiny.BROKEN)
    return shape.format(cot=cot, answer=answer)


def write_example(rng: random.Random, held_out: bool = False) -> tuple[list[dict], str]:
    """A conversation and a completion. One principle in ten is an opposite, or has no meaning."""
    problem = tiny.make_problem(rng, held_out)
    style = rng.choice(list(tiny.STYLES.values()))
    text, rate = rng.choice(style.texts), style.rate
    if rng.random() < 0.1:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(8, 24))).strip() or "x"
        text, rate = rng.choice((style.negative, letters)), 0.0
    return build_messages(problem.text, text), write_completion(rng, problem, rate, style)


# --------------------------------------------------------------------------------------------------
# Tokenizer, model, pretraining

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the tiny model knows the roles user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(vocab_size: int = 512, seed: int = 0):
    """A byte-level BPE trained on the text; digits and the four tags are single tokens."""
    rng = random.Random(seed)
    texts = []
    for _ in range(4000):
        messages, completion = write_example(rng)
        texts += [messages[0]["content"], completion]
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((re.sub("</?(reasoning|answer)>", " ", text) for text in texts), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(tokenizer, seed: int = 0):
    """A Llama of 0.9M parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_examples(tokenizer, rng: random.Random, num: int, held_out: bool = False):
    """input_ids, attention_mask and labels [num, L] of conversations; labels: -100 in prompts."""
    rows = []
    for _ in range(num):
        messages, completion = write_example(rng, held_out)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rows.append((tiny.encode(tokenizer, prompt), tiny.encode(tokenizer, completion + tokenizer.eos_token)))
    length = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((num, length), tokenizer.pad_token_id)  # [num, L]
    labels = torch.full((num, length), -100)  # [num, L]
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, (torch.arange(length) < (ids != tokenizer.pad_token_id).sum(1, keepdim=True)).long(), labels


def pretrain(steps: int, batch_size: int = 32, lr: float = 3e-3, seed: int = 0):
    """Next-token training on completions; returns (model, tokenizer)."""
    tokenizer = make_tokenizer(seed=seed)
    model = make_model(tokenizer, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    rng = random.Random(seed)
    bar = trange(steps, desc="pretraining", mininterval=5)
    for _ in bar:
        ids, mask, labels = encode_examples(tokenizer, rng, batch_size)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


# --------------------------------------------------------------------------------------------------
# What came of it


def measure(model, tokenizer, num_questions: int, seed: int = 0) -> dict:
    """Held-out loss; format, accuracy, SI and visible following, sampled under all principles."""
    with torch.no_grad():
        ids, mask, labels = encode_examples(tokenizer, random.Random(seed), 256, held_out=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    questions = tiny.make_questions(num_questions, held_out=True, seed=seed)
    parts = [sample_and_score(model, tokenizer, questions[start : start + 32], f"{seed} {start}")
             for start in range(0, num_questions, 32)]
    texts, truncated = ([item for part in parts for item in part[which]] for which in (0, 1))  # N·K both
    scores, num = torch.cat([part[2] for part in parts]), len(tiny.STYLES)  # [N, K, K]
    right = [answer_is_right(text, questions[row // num].answer) for row, text in enumerate(texts)]
    rewards = [format_reward(text) * (not cut) for text, cut in zip(texts, truncated)]
    return {
        "loss": loss,
        "format": sum(rewards) / len(texts),
        "accuracy": sum(right) / len(texts),
        "si": share_of_ceiling(mutual_information(scores).row.item(), num),
        "si_by_principle": dict(zip(tiny.STYLES, sufficiency_index(scores).tolist())),
        "follows": {name: sum(tiny.follows(text, name) for text in texts[k::num]) / num_questions
                    for k, name in enumerate(tiny.STYLES)},
    }


@torch.no_grad()
def sample_and_score(model, tokenizer, questions, name: str):
    """A completion of each of Q questions under each of K principles, random numbers by `name`.

    Returns Q·K texts, Q·K bools, whether each was cut, and scores [Q, K, K].
    """
    num = len(tiny.STYLES)
    messages = [build_messages(q.text, p.text) for q in questions for p in tiny.principles()]
    prompts = encode_prompts(tokenizer, messages)  # Q·K
    uniform = uniform_numbers([f"{name} {n}" for n in range(len(prompts))], 1, 64)  # [Q·K, 1, T]
    ends = eos_ids(model, tokenizer)
    out = sampling.sample(model, prompts, uniform, 1.0, ends, tokenizer.pad_token_id)
    cot = cot_mask(tokenizer, out.tokens, out.mask)  # [Q·K, 1, T]
    by_question = (t.unflatten(0, (len(questions), num)) for t in (out.tokens, out.mask, cot))  # [Q, K, 1, T] each
    prompts = [prompts[q : q + num] for q in range(0, len(prompts), num)]  # Q lists of K
    _, _, scores = read_completions(model, prompts, *by_question, 1.0, generations=1)  # [Q, 1, K, K]
    texts = answers.decode(tokenizer, out.tokens[:, 0], out.mask[:, 0], ends)  # Q·K
    return texts, out.truncated[:, 0].tolist(), scores[:, 0]


def main() -> None:
    """Pretrain the model and write tiny-model/ with what `measure` says of it."""
    steps = 3000
    model, tokenizer = pretrain(steps)
    model.save_pretrained(tiny.MODEL_DIR)
    tokenizer.save_pretrained(tiny.MODEL_DIR)
    record = {"steps": steps, "questions": 512, **measure(model, tokenizer, 512)}
    (tiny.MODEL_DIR / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
