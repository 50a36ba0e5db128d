"""train.py: the batch, the three losses, the loop and what it writes, on the embedded model."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import grpo
import train
from support import tiny
from support.answers import answer_is_right
from support.model import load_model
from support.prompts import PromptTemplate, build_messages
from support.run import settle
from support.steps import Step, gather_evaluation

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
QUESTIONS = str(ROOT / "tests" / "questions.jsonl")  # a few: to check the embedded task's 4096 takes a second
SMALL = (
    f"--dataset {QUESTIONS} --num-questions 2 --num-principles 2 --num-generations 2 --max-steps 2 --eval-questions 3 "
    "--eval-steps 1 --warmup-steps 1 --max-completion-length 24"
).split()


def make_config(*flags):
    config = train.parse(["--principles", PRINCIPLES, *SMALL, *flags])
    settle(config, *load_model(str(tiny.MODEL_DIR), torch.device("cpu")))
    return config


@pytest.fixture(scope="module")
def tiny_model():
    return load_model(str(tiny.MODEL_DIR), torch.device("cpu"))


def make_batch(tiny_model, config, questions=3):
    """(batch, rewards, targets), the reference being a copy of the model."""
    model, tokenizer = tiny_model
    tasks = train.draw(tiny.make_questions(50, False), tiny.principles(), config, 0)[:questions]
    batch = train.sample(model, tokenizer, PromptTemplate(), tasks, config.num_generations, config)
    rewards = train.reward_completions(batch, config)
    return batch, rewards, train.make_targets(model, copy.deepcopy(model), batch, rewards, config)


def losses_of(model, batch, targets, config):
    """(loss, terms, scores) of a batch as the loop reads it."""
    outputs = train.read(model, batch, targets.ot_tokens, config, config.scored_generations)
    return *train.losses(outputs, batch, targets, config), outputs.scores


def update(model, optimizer, batch, targets, config, rate=0.0):
    """The figures of the passes of an update."""
    step = Step(learning_rate=rate)
    train.update(model, optimizer, batch, targets, step, config)
    return step.passes


@pytest.fixture(autouse=True, scope="module")
def no_plot():
    """Drawing one takes longer than a small run; test_run.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.run.write_plot", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(["--principles", PRINCIPLES, *SMALL, "--output-dir", str(run_dir)]) == 0
    return run_dir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the batch


def test_an_epoch_repeats_no_question_and_a_draw_depends_on_seed_and_step_alone():
    config = make_config("--num-questions", "5", "--num-principles", "3")
    questions = tiny.make_questions(20, False)
    epoch = [task.question.text for step in range(4) for task in train.draw(questions, tiny.principles(), config, step)]
    assert sorted(epoch) == sorted(q.text for q in questions)
    for task in train.draw(questions, tiny.principles(), config, 2):
        assert len({p.id for p in task.principles}) == 3, "a principle stands twice in one group of candidates"
    assert train.draw(questions, tiny.principles(), config, 7) == train.draw(questions, tiny.principles(), config, 7)
    assert train.draw(questions, tiny.principles(), config, 7) != train.draw(questions, tiny.principles(), config, 8)


@pytest.mark.parametrize("generations", [2, 1])
def test_scores_equal_brute_force(tiny_model, generations):
    """Every completion of a question under each of its principles: the plain forward, one row at a time."""
    model, tokenizer = tiny_model
    config = make_config("--num-principles", "3", "--temperature", "0.8", "--ot-tokens", "9")
    batch, _, targets = make_batch(tiny_model, config, questions=2)
    with torch.no_grad():
        now, own = (train.read(model, batch, targets.ot_tokens, config, n) for n in (generations, 0))
        assert now.scores.shape == (2, generations, 3, 3) and own.scores is None
        for q in range(2):
            for g in range(2):
                for i in range(3):
                    ids = batch.tokens[q, i, g][batch.mask[q, i, g]]  # [T']
                    text = tokenizer.decode(ids)
                    span = int(batch.cot[q, i, g].sum())
                    assert ("</reasoning>" in text) == (tokenizer.decode(ids[:span])[-12:] == "</reasoning>")
                    for j in range(3):
                        prompt = batch.prompts[q][j]
                        out = model(torch.tensor([prompt + ids.tolist()]), output_hidden_states=True)
                        logits = out.logits[0, len(prompt) - 1 : -1] / 0.8  # [T', V]
                        steps = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]  # [T']
                        if g < generations:
                            assert math.isclose(now.scores[q, g, i, j], steps[:span].sum(), abs_tol=1e-3), (
                                f"completion {i} under principle {j}: transposed, or scored beyond the CoT?"
                            )
                        if i == j:
                            torch.testing.assert_close(now.logp[q, i, g, : len(ids)], steps, rtol=1e-4, atol=1e-4)
                            assert not now.logp[q, i, g, len(ids) :].any()
                            for n, place in enumerate(targets.ot_tokens[q].tolist()):
                                k, within = divmod(place, 2 * batch.tokens.shape[-1])
                                if (k, within // batch.tokens.shape[-1]) == (i, g):
                                    state = out.hidden_states[-1][0, len(prompt) - 1 + within % batch.tokens.shape[-1]]
                                    torch.testing.assert_close(now.states[q, n], state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now.states, own.states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now.logp, own.logp, rtol=1e-4, atol=1e-4)


def test_rewards_and_advantages_belong_to_question_and_principle(tiny_model):
    batch, earned, _ = make_batch(tiny_model, make_config("--num-generations", "6"))
    for q in range(2):
        for k in range(2):
            rewards = [grpo.format_reward(text) for text in batch.texts[q][k]]
            assert earned.values[q, k].tolist() == rewards
            torch.testing.assert_close(earned.advantages[q, k], torch.tensor(rewards) - sum(rewards) / 6)


def test_the_sinkhorn_cloud_is_of_completion_tokens_only(tiny_model):
    batch, _, targets = make_batch(tiny_model, make_config("--ot-tokens", "100000"))
    valid = batch.mask.flatten(1)  # [Q, K·G·T]
    weighted = targets.ot_weights > 0  # [Q, n]
    assert valid.gather(1, targets.ot_tokens)[weighted].all(), "padding takes part in the transport"
    assert (weighted.sum(1) == valid.sum(1)).all(), "with room for all tokens, all must take part"
    torch.testing.assert_close(targets.ot_weights.sum(1), torch.ones(2))
    few = make_batch(tiny_model, make_config("--ot-tokens", "5"))[2]
    assert few.ot_tokens.shape == (2, 5) and (few.ot_weights == 0.2).all()
    assert all(len(set(row.tolist())) == 5 for row in few.ot_tokens)


# ------------------------------------------------------------------------------------------------ the losses


def gradient_of(model, config, batch, targets, questions_at_once):
    """The gradient that `update` steps along, and its figures."""
    model, config = copy.deepcopy(model), copy.copy(config)
    config.micro_batch, config.max_grad_norm = questions_at_once * config.rows_per_question, 1e9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda: None  # `update` clears it, and here it is the result
    (stats,) = update(model, optimizer, batch, targets, config)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), stats


def moved(model, scale=0.02):
    """A copy of a model at some distance from it, in float64."""
    generator, model = torch.Generator().manual_seed(0), copy.deepcopy(model).double()
    for p in model.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=torch.double)
    return model


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_accumulation_over_questions_changes_nothing(tiny_model, loss_type):
    config = make_config("--num-questions", "3", "--loss-type", loss_type, "--lambda-mi", "0.1", "--beta", "0.1",
                         "--lambda-ot", "0.1", "--num-generations", "4")
    batch, rewards, _ = make_batch(tiny_model, config)
    model = moved(tiny_model[0])
    targets = train.make_targets(model, copy.deepcopy(tiny_model[0]).double(), batch, rewards, config)
    whole, stats = gradient_of(model, config, batch, targets, 3)
    assert whole.norm() > 0
    for size in (1, 2):
        parts, part_stats = gradient_of(model, config, batch, targets, size)
        # not 1e-15: the norms of a float64 Llama go through float32
        assert (whole - parts).norm() / whole.norm() < 1e-7, "a term is not a mean over questions"
        assert part_stats["sinkhorn_error"] == pytest.approx(stats["sinkhorn_error"], rel=1e-3), "the largest of all"
        assert part_stats["sinkhorn_iterations"] == stats["sinkhorn_iterations"]
        for name in ("loss", "loss_grpo", "loss_mi", "loss_ot", "mi_row", "ratio_mean", "ratio_max", "kl"):
            assert math.isclose(stats[name], part_stats[name], rel_tol=1e-4, abs_tol=1e-5), name


def test_the_loss_is_the_weighted_sum_of_its_terms_and_zero_weights_leave_grpo(tiny_model):
    config = make_config("--lambda-mi", "0.3", "--lambda-ot", "0.7")
    batch, _, targets = make_batch(tiny_model, config)
    loss, stats, _ = losses_of(tiny_model[0], batch, targets, config)
    expected = stats["loss_grpo"] + 0.3 * stats["loss_mi"] + 0.7 * stats["loss_ot"]
    torch.testing.assert_close(loss, expected)
    config = make_config("--lambda-mi", "0", "--lambda-ot", "0")
    batch, _, targets = make_batch(tiny_model, config)
    loss, stats, scores = losses_of(tiny_model[0], batch, targets, config)
    assert scores is None and set(stats) >= {"loss_grpo", "ratio_mean"} and "loss_mi" not in stats
    torch.testing.assert_close(loss, stats["loss_grpo"])


def test_on_policy_the_ratio_is_one_and_the_gradient_is_not_zero_then_it_leaves_one(tiny_model):
    flags = ["--lambda-mi", "0", "--lambda-ot", "0", "--num-generations", "8", "--temperature", "1.3"]
    batch, rewards, targets = make_batch(tiny_model, make_config(*flags))
    assert targets.advantages.abs().max() > 0
    step, stats = gradient_of(tiny_model[0], make_config(*flags), batch, targets, 2)
    assert stats["ratio_mean"] == stats["ratio_max"] == 1 and step.norm() > 0
    config = make_config(*flags, "--num-iterations", "3")
    model = copy.deepcopy(tiny_model[0])
    targets = train.make_targets(model, None, batch, rewards, config)
    passes = update(model, torch.optim.AdamW(model.parameters()), batch, targets, config, rate=3e-3)
    ratios = [figures["ratio_mean"] for figures in passes]
    assert math.isclose(ratios[0], 1, abs_tol=1e-5), f"the first pass is on-policy: {ratios}"
    assert abs(ratios[1] - 1) > 1e-4 and abs(ratios[2] - 1) > 1e-4, f"old_logp follows the policy: {ratios}"
    assert passes[-1]["clip_fraction"] > 0


def test_the_second_pass_does_not_depend_on_the_micro_batches(tiny_model):
    flags = ["--num-questions", "3", "--num-iterations", "2", "--num-generations", "4", "--temperature", "1.3"]
    config, passes = make_config(*flags), {}
    batch, _, targets = make_batch(tiny_model, config)
    for size in (1, 3):
        model, config.micro_batch = copy.deepcopy(tiny_model[0]), size * config.rows_per_question
        passes[size] = update(model, torch.optim.SGD(model.parameters()), batch, targets, config, rate=0.5)[1]
    assert abs(passes[1]["ratio_mean"] - 1) > 1e-4
    for name in ("loss", "ratio_mean", "grad_norm", "loss_mi", "loss_ot"):
        assert math.isclose(passes[1][name], passes[3][name], rel_tol=1e-3, abs_tol=1e-5), name


def test_sinkhorn_term_is_zero_at_the_start_and_pulls_back(tiny_model):
    config = make_config("--lambda-ot", "1", "--lambda-mi", "0")
    batch, _, targets = make_batch(tiny_model, config)
    _, stats, _ = losses_of(tiny_model[0], batch, targets, config)
    assert abs(stats["loss_ot"]) < 1e-3
    model = moved(tiny_model[0]).float()
    targets.advantages.zero_()  # the Sinkhorn term alone
    optimizer = torch.optim.SGD(model.parameters())
    drift = [update(model, optimizer, batch, targets, config, rate=1e-2)[0]["loss_ot"] for _ in range(8)]
    assert drift[0] > 0.1 and drift[-1] < 0.9 * drift[0], f"descent on it does not bring the states back: {drift}"


# ------------------------------------------------------------------------------------------------ the loop


def test_a_run_writes_what_it_promises(run):
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["num_principles"] == 2 and config["settings"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__ and "git_commit" in config
    assert len(lines(run / "principles.jsonl")) == 8
    steps = lines(run / "metrics.jsonl")
    assert [s["step"] for s in steps] == [1, 2]
    names = (
        "loss loss_grpo loss_mi loss_ot reward zero_variance_groups ratio_mean clip_fraction mi_row mi_column "
        "mi_ceiling si sinkhorn_iterations sinkhorn_error grad_norm completion_length truncated entropy learning_rate "
        "seconds_sampling seconds_training tokens_per_second_sampling tokens_per_second_training"
    ).split()
    for step in steps:
        assert not set(names) - set(step) and all(math.isfinite(value) for value in step.values())
    samples = lines(run / "samples.jsonl")
    assert {"question", "principle", "completion", "reward", "scores"} <= set(samples[0])
    evals = json.loads((run / "eval.json").read_text())
    assert set(evals["steps"]) == {"1"}
    for when in ("start", "end"):
        assert evals[when]["questions"] == 3
        for name in ("format", "accuracy", "si", "mi_row", "mi_column", "sinkhorn"):
            value = evals[when][name]
            assert value["low"] - 1e-6 <= value["mean"] <= value["high"] + 1e-6
    assert abs(evals["start"]["sinkhorn"]["mean"]) < 1e-3


def test_the_trained_model_loads_with_the_librarys_own_tools(run):
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer.chat_template and model.generation_config.eos_token_id == tokenizer.eos_token_id
    start = AutoModelForCausalLM.from_pretrained(tiny.MODEL_DIR)
    assert any((a != b).any() for a, b in zip(model.parameters(), start.parameters(), strict=True)), "nothing trained"
    writer = pipeline("text-generation", model=str(run / "final"))
    question = "Tom has 7 pens, gets 5 more and gives away 3. How many pens are left?"
    messages = build_messages(question, "Number every step.")
    answer = writer(messages, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant" and len(answer["content"]) > 5


def test_same_seed_same_metrics(run, tmp_path):
    def figures(run_dir):
        return [{k: v for k, v in s.items() if "second" not in k} for s in lines(run_dir / "metrics.jsonl")]

    again, other = tmp_path / "again", tmp_path / "other"
    assert train.main(["--principles", PRINCIPLES, *SMALL, "--output-dir", str(again)]) == 0
    assert figures(again) == figures(run)
    assert (again / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()
    assert train.main(["--principles", PRINCIPLES, *SMALL, "--output-dir", str(other), "--seed", "1"]) == 0
    assert figures(other) != figures(run)


def test_a_short_training_teaches_the_format(tmp_path):
    """Not a unit test: the whole loop has to point the right way. Plain GRPO, 8 steps, some seconds."""
    flags = "--lambda-mi 0 --lambda-ot 0 --max-steps 8 --num-questions 2 --num-generations 8 --num-principles 2 " \
            "--eval-questions 32 --eval-steps 0 --learning-rate 1e-3 --warmup-steps 1".split()
    assert train.main(["--principles", PRINCIPLES, "--output-dir", str(tmp_path / "run"), *flags]) == 0
    evals = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert evals["end"]["format"]["low"] > evals["start"]["format"]["high"], "no rise: sign, mask, old_logp?"


# ------------------------------------------------------------------------------------------------ bad input


def write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "content, flags, told",
    [
        (None, ["--principles", "{tmp}/none.txt"], ["none.txt", "text file"]),
        (None, ["--principles", "{tmp}"], ["{tmp}", ".txt"]),
        (b"", [], ["p.txt", "2 or more"]),
        (b"Only one.\n", [], ["p.txt", "2 or more"]),
        (b"A.\nB.\nA.\n", [], ["p.txt:3", "line 1", "'A.'"]),
        (b"A.\n\xff\xfe\n", [], ["p.txt:2", "0xff", "UTF-8"]),
        (b"A.\nB.\n", [], ["--num-principles", "got 4", "2 to 2"]),
        (b"A.\nB.\nC.\n" + b"word " * 600, [], ["word word", "tokens", "440"]),
        (b"A.\nB.\nC.\n<|user|> D.\n", [], ["<|user|>", "control token"]),
        (None, ["--num-questions", "0"], ["--num-questions", "got 0", "1 or more"]),
        (None, ["--num-generations", "-3"], ["--num-generations", "got -3"]),
        (None, ["--num-principles", "1"], ["--num-principles", "got 1", "2 or more"]),
        (None, ["--num-principles", "9"], ["--num-principles", "got 9", "2 to 8"]),
        (None, ["--max-steps", "0"], ["--max-steps", "1 or more"]),
        (None, ["--max-steps", "ten"], ["--max-steps", "ten"]),
        (None, ["--max-completion-length", "0"], ["--max-completion-length", "1 or more"]),
        (None, ["--max-completion-length", "600"], ["--max-completion-length", "got 600", "512"]),
        (None, ["--temperature", "0"], ["--temperature", "got 0.0", "above 0"]),
        (None, ["--temperature", "nan"], ["--temperature", "got nan"]),
        (None, ["--learning-rate", "-1"], ["--learning-rate", "got -1.0"]),
        (None, ["--learning-rate", "inf"], ["--learning-rate", "got inf"]),
        (None, ["--lambda-mi", "-0.1"], ["--lambda-mi", "got -0.1"]),
        (None, ["--loss-type", "ppo"], ["--loss-type", "ppo", "dr_grpo"]),
        (None, ["--lr-scheduler-type", "sawtooth"], ["sawtooth", "cosine"]),
        (None, ["--no-such-flag", "1"], ["--no-such-flag", "--help"]),
        (None, ["--model", "{tmp}"], ["--model", "{tmp}", "safetensors"]),
        (None, ["--dataset", "{tmp}/none.jsonl"], ["none.jsonl"]),
        (None, ["--output-dir", str(ROOT)], ["--output-dir", str(ROOT), "not empty"]),
        (None, ["--output-dir", "/dev/null/run"], ["/dev/null"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(content, flags, told, tmp_path, capsys):
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    if "--principles" not in flags:
        path = PRINCIPLES if content is None else write(tmp_path / "p.txt", content)
        flags = ["--principles", path, *flags]
    for flag, value in (("--output-dir", str(tmp_path / "run")), ("--dataset", QUESTIONS), ("--eval-questions", "1")):
        flags += [] if flag in flags else [flag, value]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, f"more than one line: {error}"
    for part in told:
        assert part.replace("{tmp}", str(tmp_path)) in error, f"{part!r} is not in: {error}"


def test_a_broken_line_of_questions_is_named(tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", b'{"question": "1 + 1?"}\n{"question": }\n')
    assert train.main(["--principles", PRINCIPLES, "--dataset", path, "--output-dir", str(tmp_path / "run")]) == 2
    assert "q.jsonl:2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--scale-rewards", "group", "--loss-type", "grpo"],
        "--importance-sampling-level token --num-iterations 2 --epsilon-high 0.2 --loss-type bnpo".split(),
        ["--beta", "0.1", "--lambda-mi", "0", "--lambda-ot", "0"],
        ["--lr-scheduler-type", "cosine", "--temperature", "0.7", "--mi-temperature", "2", "--micro-batch", "1"],
        ["--num-generations", "1", "--eval-steps", "0"],
    ],
)
def test_every_option_trains(flags, tmp_path):
    flags = [*SMALL, "--max-steps", "1", "--eval-questions", "1", *flags, "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 0
    assert math.isfinite(lines(tmp_path / "run" / "metrics.jsonl")[0]["loss"])


def test_own_questions_without_answers_train_too(tmp_path):
    rows = [json.dumps({"question": q.text}) for q in tiny.make_questions(12, False)]
    path = write(tmp_path / "q.jsonl", "\n".join(rows).encode())
    flags = [*SMALL, "--max-steps", "1", "--dataset", path, "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 0
    assert "accuracy" not in json.loads((tmp_path / "run" / "eval.json").read_text())["end"]


# ------------------------------------------------------------------------------------------------ what the flags reach


def test_the_temperature_is_that_of_sampling_of_the_reference_and_of_the_reward(tiny_model):
    cold = make_batch(tiny_model, make_config("--temperature", "0.001", "--num-generations", "4"))[0]
    assert all(len(set(texts)) == 1 for row in cold.texts for texts in row), "near 0 a group is its likeliest text"
    config = make_config("--temperature", "0.7", "--beta", "0.1")
    batch, _, targets = make_batch(tiny_model, config)
    with torch.no_grad():
        now = train.read(tiny_model[0], batch, targets.ot_tokens, config, 2)
    torch.testing.assert_close(targets.reference_logp, now.logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(train.read_scores(tiny_model[0], batch, config), now.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags, given", [
    ("--beta 0.5", {"beta": 0.5}), ("--epsilon 0.3", {"clip_low": 0.3, "clip_high": 0.3}),
    ("--epsilon 0.3 --epsilon-high 0.2", {"clip_low": 0.3, "clip_high": 0.2}),
    ("--loss-type grpo", {"normalizer": "sequence"}), ("--importance-sampling-level token", {"level": "token"}),
])
def test_the_policy_loss_gets_what_the_flags_say(flags, given, tiny_model, monkeypatch):
    config, seen, loss = make_config(*flags.split()), [], grpo.grpo_loss
    batch, _, targets = make_batch(tiny_model, config)
    monkeypatch.setattr(train, "grpo_loss", lambda *args, **how: seen.append(how) or loss(*args, **how))
    losses_of(tiny_model[0], batch, targets, config)
    assert seen and all(given.items() <= how.items() for how in seen)


def test_scaled_rewards_are_divided_by_the_spread_of_their_group(tiny_model):
    _, earned, _ = make_batch(tiny_model, make_config("--scale-rewards", "group", "--num-generations", "6"))
    assert earned.values.std(-1).any()
    torch.testing.assert_close(earned.advantages, grpo.group_advantages(earned.values, "std"))


def test_the_information_term_takes_its_temperature_and_its_generations(tiny_model):
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = train.information_terms(scores, make_config("--mi-temperature", "2"))
    torch.testing.assert_close(terms["loss_mi"], train.symmetric_info_nce(scores / 2))
    torch.testing.assert_close(terms["mi_row"], train.information(scores.flatten(0, 1)).mean())  # not divided
    config, step = make_config("--num-generations", "3", "--mi-generations", "1"), Step()
    batch, _, targets = make_batch(tiny_model, config)
    model = copy.deepcopy(tiny_model[0])
    train.update(model, torch.optim.SGD(model.parameters()), batch, targets, step, config)
    assert step.scores.shape == (2, 1, 2, 2)


def test_padding_has_no_share_in_the_drift(tiny_model):
    config = make_config("--ot-tokens", "100000", "--ot-eps", "1")
    batch, _, targets = make_batch(tiny_model, config)
    kept = targets.ot_weights > 0  # [Q, n]
    assert not kept.all()
    with torch.no_grad():
        states = train.read(moved(tiny_model[0]).float(), batch, targets.ot_tokens, config).states  # [Q, n, d]
    value, _ = train.drift(states, targets.reference_states, targets.ot_weights, config)
    for q, keep in enumerate(kept):
        x, y = states[q, keep], targets.reference_states[q, keep]
        alone, _ = train.sinkhorn_divergence(x, y, train.relative_eps(x, y, 1.0))
        torch.testing.assert_close(value[q], alone, rtol=1e-3, atol=1e-3)


def test_an_evaluation_has_the_figures_of_its_completions(tiny_model):
    (model, tokenizer), config = tiny_model, make_config(
        "--max-completion-length", "48", "--num-questions", "6", "--num-principles", "3")
    tasks = train.draw(tiny.make_questions(50, False), tiny.principles(), config, 0)
    values, _ = train.evaluate_tasks(model, moved(model).float(), tokenizer, PromptTemplate(), tasks, config)
    batch = train.sample(model, tokenizer, PromptTemplate(), tasks, 1, config)  # the same names: the same texts
    scores = train.read_scores(model, batch, config)[:, 0]  # [Q, K, K]
    for name, dim in (("mi_row", 2), ("mi_column", 1)):
        own = scores.log_softmax(dim).diagonal(dim1=1, dim2=2).mean(1)  # [Q]
        torch.testing.assert_close(values[name], math.log(3) + own, rtol=1e-3, atol=1e-3)
    right = [[answer_is_right(text, task.question.answer) for (text,) in row] for task, row in zip(tasks, batch.texts)]
    torch.testing.assert_close(values["accuracy"], torch.tensor(right).float().mean(1))
    assert values["accuracy"].any() and (values["sinkhorn"] > 0.01).all()
    si = gather_evaluation([(values, {})], 3)["si"]["mean"]
    assert math.isclose(si, max(0.0, values["mi_row"].mean().item()) / math.log(3), rel_tol=1e-4)


# ------------------------------------------------------------------------------------------------ another reward


def test_a_completion_that_was_cut_earns_nothing(tiny_model):
    batch, rewards, _ = make_batch(tiny_model, make_config("--max-completion-length", "12", "--num-generations", "8"))
    assert not rewards.values[batch.truncated].any()
    cut = [batch.texts[q][k][g] for q, k, g in batch.truncated.nonzero().tolist()]
    assert any(map(grpo.format_reward, cut)), "one that would have earned it"


def test_information_as_a_reward_is_earned_by_well_formed_completions_alone(tiny_model):
    config = make_config("--mi-reward", "0.5", "--num-generations", "6", "--max-completion-length", "48")
    batch, without, _ = make_batch(tiny_model, config)
    assert torch.equal(without.values, without.formats), "without scores the format is the only reward"
    scores = train.read_scores(tiny_model[0], batch, config)  # [Q, G, K, K]
    earned = train.reward_completions(batch, config, scores)
    formats, rewards = earned.formats, earned.values
    assert formats.any() and not rewards[formats == 0].any()
    for q, k, g in (formats == 1).nonzero().tolist():
        nats = math.log(2) + scores[q, g, k].log_softmax(-1)[k].item()
        assert math.isclose(rewards[q, k, g], 1 + 0.5 * max(nats, -math.log(2)), rel_tol=1e-4)
    torch.testing.assert_close(earned.advantages, rewards - rewards.mean(-1, keepdim=True))


def test_information_as_a_reward_trains_without_the_loss(tmp_path):
    flags = [*SMALL, "--max-steps", "1", "--mi-reward", "1", "--lambda-mi", "0", "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 0
    step = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert "loss_mi" not in step and step["format"] <= 1 and math.isfinite(step["si"])
    assert lines(tmp_path / "run" / "samples.jsonl")[0]["scores"]
