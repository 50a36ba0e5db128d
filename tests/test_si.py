"""si.py: the sharper estimate, selection, creation; the command against brute force and the task's rates."""

import dataclasses
import importlib.util
import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from test_metrics import channel, draw_scores

import metrics
import si
from experiments.si_study import reach
from support import answers, propose, tiny
from support.chains import Chain, sample_chains, score_chains
from support.data import make_template, pick_questions
from support.files import load_principles, save_principles
from support.model import load_model
from support.prompts import build_messages, encode_prompts, eos_ids
from support.report import write_plot
from support.sampling import Completions
from support.settings import Parser

PRINCIPLES = str(tiny.MODEL_DIR.parent / "principles" / "reasoning.txt")
FEW = ["--num-questions", "2", "--max-completion-length", "16"]  # with the first four principles: see `run`


@pytest.fixture(scope="module")
def tiny_model():
    return load_model(str(tiny.MODEL_DIR), torch.device("cpu"))


def config(*flags):
    return si.SiConfig(**vars(Parser(si.SiConfig, "").parse_args(["--principles", PRINCIPLES, *flags])))


@pytest.fixture
def run(tmp_path):
    """A function of flags that gives the numbers of a run of the command on four principles; `run.path` holds them."""
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join(p.text for p in tiny.principles()[:4]))

    def start(*flags):
        path = tmp_path / "si.json"
        assert si.main(["--principles", str(pool), "--json", str(path), *flags]) == 0
        return json.loads(path.read_text())

    start.pool = pool
    return start


# ------------------------------------------------------------------------------------------------ the estimate


@pytest.mark.parametrize("num", [2, 3, 6])
def test_the_sharper_estimate_is_the_exact_information_of_each_input_of_a_channel(num):
    log_p, exact = channel(num, 6, seed=num)
    by_input = (log_p.exp() * (log_p - log_p.logsumexp(0) + math.log(num))).sum(-1)  # [K] KL(p_i || mixture)
    scores = draw_scores(log_p, 20_000)
    sharp, row = metrics.information(scores, "posterior"), metrics.information(scores)  # [N, K] both
    error = (sharp.mean(0) - by_input) / (sharp.std(0) / len(sharp) ** 0.5)
    assert error.abs().max() < 4, f"off by {error.tolist()} standard errors: weights, or row and column confused?"
    assert math.isclose(by_input.mean(), exact, rel_tol=1e-9)
    assert (sharp.std(0) < row.std(0)).all(), "not sharper"


def test_reach_tells_a_principle_that_is_rarely_followed_from_one_that_is_said_twice():
    """Four principles: 0 marks every text, 1 one text in five, and 2 and 3 are the same."""
    def reach_of(p):
        rows = metrics.information(draw_scores((p + 1e-30).log(), 2000))  # [N, K]
        return [reach(rows[:, [k, k]].tolist()) for k in range(4)]

    p = torch.zeros(4, 5)  # [K, kinds of text]: plain, and the marks of 0, 1, 2 and 3
    p[0, 1], p[1, 0], p[1, 2], p[2:, 3] = 1, 0.8, 0.2, 1
    share = math.log(4) / math.log(2)  # `reach` takes the number of columns for K
    torch.testing.assert_close(reach_of(p), [share, share, share / 2, share / 2], atol=1e-6, rtol=0)
    p[1] = torch.tensor([0.95, 0, 0.05, 0, 0])  # rarer than one in ten, and plain is told from all others as well
    p[2:] = p[0] = torch.tensor([1.0, 0, 0, 0, 0])
    assert max(reach_of(p)) < 0.05 * share


def test_its_interval_covers_the_truth():
    log_p, exact = channel(4, 6)
    hits = 0
    for seed in range(100):
        low, high = metrics.bootstrap_interval(
            metrics.information(draw_scores(log_p, 100, seed), "posterior").mean(1), resamples=500, seed=seed
        )
        hits += bool(low <= exact <= high)
    assert hits >= 90, f"a 95% interval held the exact value in {hits} of 100 repetitions"


def test_limits_of_the_sharper_estimate():
    distinct = torch.eye(5).expand(3, 5, 5) * 1e3
    torch.testing.assert_close(metrics.information(distinct, "posterior"), torch.full((3, 5), math.log(5)))
    assert metrics.information(torch.zeros(3, 5, 5), "posterior").abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ a large pool


@pytest.mark.parametrize("num_principles, num_questions", [(2, 2), (16, 3), (17, 3), (20, 13), (40, 7), (100, 128)])
def test_each_question_draws_sixteen_and_each_principle_is_drawn_equally_often(num_principles, num_questions):
    drawn = si.draw_principles(num_principles, num_questions, seed=3)
    per_question = min(num_principles, 16)
    assert drawn.shape == (num_questions, per_question)
    assert all(row == sorted(set(row)) for row in drawn.tolist()), "one twice, or not in the order of the file"
    times = torch.bincount(drawn.flatten(), minlength=num_principles)
    assert times.max() - times.min() <= 1, times
    assert torch.equal(drawn, si.draw_principles(num_principles, num_questions, seed=3))
    if num_principles > 16:
        assert not torch.equal(drawn, si.draw_principles(num_principles, num_questions, seed=4))


def test_companions_are_drawn_evenly(monkeypatch):
    monkeypatch.setattr("si.PER_QUESTION", 3)
    drawn = si.draw_principles(6, 6000, seed=0)
    assert (si.mean_by_pair(torch.ones(6000, 3, 3), drawn, 6) == 1).all(), "a mean over the questions that drew both"
    counts = torch.zeros(6, 6).index_put_((drawn[:, :, None], drawn[:, None, :]), torch.ones(1), accumulate=True)
    assert (counts.diagonal() == 3000).all()
    assert (counts[~torch.eye(6, dtype=torch.bool)] / 6000 - 0.2).abs().max() < 0.02  # 3·2 of 6·5 ordered pairs


def test_of_a_large_pool_the_measure_is_the_information_within_a_random_subset(monkeypatch):
    monkeypatch.setattr("si.PER_QUESTION", 3)
    log_p, whole = channel(6, 8)
    members = torch.tensor(list(itertools.combinations(range(6), 3)))  # [20, 3]
    part = log_p[members]  # [20, 3, Y]
    exact = (part.exp() * (part - part.logsumexp(1, keepdim=True) + math.log(3))).sum((1, 2)).mean() / 3
    scores, drawn = draw_scores(log_p, 20_000), si.draw_principles(6, 20_000, seed=0)  # [N, 6, 6], [N, 3]
    of_drawn = scores.take_along_dim(drawn[:, :, None], 1).take_along_dim(drawn[:, None, :], 2)  # [N, 3, 3]
    for estimator in ("posterior", "row"):
        info = metrics.information(of_drawn, estimator).mean(1)  # [N]
        assert abs(info.mean() - exact) < 4 * info.std() / len(info) ** 0.5
    assert exact < whole, "a bound of the whole pool's information"


def test_the_order_of_a_file_does_not_matter_to_which_questions_are_picked(tiny_model, tmp_path):
    rows = [json.dumps({"question": q.text, "answer": q.answer}) for q in tiny.make_questions(200, True)]
    picked = []
    for name, order in (("a", rows), ("b", rows[::-1]), ("c", random.Random(1).sample(rows, 200))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(order))
        settings = config("--dataset", str(path), "--num-questions", "50")
        picked.append(pick_questions(*tiny_model, ["Be brief."], make_template(settings), settings))
    assert picked[0] == picked[1] == picked[2] and len(set(picked[0])) == 50
    texts = [json.loads(row)["question"] for row in rows]
    quarters = [sum(texts.index(q.text) // 50 == quarter for q in picked[0]) for quarter in range(4)]
    assert min(quarters) >= 5, f"questions by quarter of the file: {quarters}"


def test_figures_of_a_principle_are_over_the_questions_that_drew_it():
    """Four principles, two a question, against a loop."""
    drawn = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3], [0, 1]])  # 0 and 3 never meet, nor 1 and 2
    scores = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0)) * 2
    questions = tiny.make_questions(4, True) + [dataclasses.replace(tiny.make_questions(1, True)[0], answer=None)]
    text = "<reasoning>a</reasoning><answer>{}</answer>"
    chains = [[Chain(text.format(q.answer if c else "?"), [1] * (n + c + 2), n + c + 1, n == 0) for c in (0, 1)]
              for n, q in enumerate(questions)]
    summary = si.summarise_si(tiny.principles()[:4], ["f"] * 4, questions, drawn, chains, scores)
    assert summary["per_question"] == 2 and summary["ceiling"] == math.log(2) and summary["chance"] == 0.5
    posterior, row, column = (metrics.information(scores, name) for name in ("posterior", "row", "column"))
    for figures in summary["principles"]:
        places = [(n, c) for n in range(5) for c in (0, 1) if drawn[n, c] == figures["index"]]

        def mean(value_of, places=places):
            return sum(map(value_of, places)) / len(places)

        for name, table in (("mi_row", row), ("mi_column", column)):
            assert math.isclose(figures[name], mean(lambda at, table=table: table[at].item()), rel_tol=1e-5)
        assert math.isclose(figures["mi"]["mean"], mean(lambda at: posterior[at].item()), rel_tol=1e-5)
        assert figures["cot_length"] == mean(lambda at: sum(at) + 1) and figures["closed"] == 1
        assert figures["format"] == mean(lambda at: at[0] > 0)
        assert figures["retrieval"] == mean(lambda at: scores[at].argmax().item() == at[1])
        assert figures["accuracy"] == mean(lambda at: at[1], [at for at in places if at[0] < 4])
    confusion, posteriors = torch.tensor(summary["confusion"]), scores.softmax(-1)
    assert confusion.isnan().nonzero().tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]
    torch.testing.assert_close(confusion[0, 1], (posteriors[0] + posteriors[4])[0, 1] / 2)
    torch.testing.assert_close(confusion[0, 0], (posteriors[0] + posteriors[2] + posteriors[4])[0, 0] / 3)
    torch.testing.assert_close(confusion[3, 1], posteriors[3][1, 0])


def test_a_pool_is_measured_in_parts_and_the_best_again_under_each_other(run, monkeypatch, capsys):
    monkeypatch.setattr("si.PER_QUESTION", 3)
    result = run("--num-questions", "3", "--max-completion-length", "16", "--select", "2")
    assert result["per_question"] == 3 and math.isclose(result["ceiling"], math.log(3)) and result["chance"] == 1 / 3
    assert [len(row) for row in result["drawn"]] == [3] * 3 and result["chains"] == 9
    chosen = result["selection"]
    assert len(chosen["pool"]) == 4 and set(chosen["indices"]) <= set(chosen["pool"])
    shown = capsys.readouterr().out
    assert "3 of the 4 principles" in shown and "at most log\n  3, and a lower bound" in shown and "best 4 are measured again" in shown


# ------------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize("seed", range(8))
def test_greedy_selection_finds_what_trying_all_finds(seed):
    scores = draw_scores(channel(9, 7, seed=seed)[0], 60, seed)
    for size in (2, 3, 5, 9):
        exact = metrics.select_subset(scores, size)
        greedy = metrics.select_subset(scores, size, exact_up_to=0)
        values = metrics.subset_information(scores, torch.tensor([exact, greedy])).mean(0)  # [2]
        assert values[1] > values[0] - 1e-9 and len(set(greedy)) == size, f"greedy {greedy}, exact {exact}"


def test_a_subset_is_judged_with_its_own_members_as_candidates():
    scores = draw_scores(channel(5, 7)[0], 50)
    alone = scores[:, [1, 4]][:, :, [1, 4]]
    seen = metrics.subset_information(scores, torch.tensor([[1, 4], [0, 2]]))[:, 0]
    torch.testing.assert_close(seen, metrics.information(alone, "posterior").mean(1))
    with pytest.raises(ValueError, match="2 <= size <= K = 5"):
        metrics.select_subset(scores, 6)


def test_of_two_that_say_the_same_selection_takes_one():
    log_p = torch.tensor([[.9, .05, .05], [.88, .06, .06], [.05, .9, .05], [.1, .2, .7]]).double().log()  # 0 is 1
    chosen = metrics.select_subset(draw_scores(log_p, 2000), 3)
    assert chosen[1:] == [2, 3], f"two paraphrases were chosen together: {chosen}"


# ------------------------------------------------------------------------------------------------ sampling and scoring


def test_scores_equal_the_plain_forward(tiny_model):
    """One row at a time, no cache, no chunks: the CoT under every principle."""
    model, tokenizer = tiny_model
    questions = tiny.make_questions(6, held_out=True)
    texts = [p.text for p in tiny.principles()[:3]]
    prompts = [
        encode_prompts(tokenizer, [build_messages(q.text, text) for text in texts]) for q in questions
    ]
    flat = sample_chains(model, tokenizer, [prompt for row in prompts for prompt in row], "1 chain", 40, 0.8)
    chains = [flat[i : i + 3] for i in range(0, 18, 3)]
    scores = score_chains(model, prompts, chains, 0.8)
    kinds, table = set(), torch.zeros(6, 3, 3)

    def plain(prefix, ids):
        with torch.no_grad():
            logits = model(torch.tensor([prefix + ids])).logits[0, len(prefix) - 1 : -1] / 0.8
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()

    for n, i, j in itertools.product(range(6), range(3), range(3)):
        chain, prompt = chains[n][i], prompts[n][j]
        kinds.add((chain.closed, chain.truncated))
        cot = chain.tokens[: chain.cot_length]
        table[n, i, j] = plain(prompt, cot)
        assert math.isclose(scores[n, i, j], table[n, i, j], abs_tol=2e-3), "transposed, or a wrong span?"
        assert ("</reasoning>" in tokenizer.decode(cot)) == chain.closed
        assert chain.closed or cot == chain.tokens, "without </reasoning> all of it counts, an end token too"
    assert kinds >= {(True, False), (False, False), (False, True)}, f"closed, ended unclosed, cut: not all occur, {kinds}"
    alone = score_chains(model, [[row[1]] for row in prompts], [[row[0]] for row in chains], 0.8)  # [6, 1, 1]
    torch.testing.assert_close(alone.flatten(), scores[:, 0, 1])
    estimate, (low, high) = metrics.sufficiency_index(table), metrics.bootstrap_interval(metrics.information(scores))
    assert (low - 1e-3 <= estimate * math.log(3)).all() and (estimate * math.log(3) <= high.clamp(min=0) + 1e-3).all()


@pytest.mark.parametrize(
    "ending, truncated, shaped",
    [("{end}", False, 1), (" \n{end}", False, 1), ("", True, 0), (" and more{end}", False, 0), ("<|pad|>" * 3, True, 0),
     ("<|user|>{end}", False, 0), ("<|pad|>{end}", False, 0), ("{end}", True, 0)],
)
def test_what_is_cut_or_goes_on_after_the_answer_is_badly_formed(ending, truncated, shaped, tiny_model):
    model, tokenizer = tiny_model
    text = "<reasoning>1 + 1 = 2.</reasoning><answer>2</answer>" + ending.format(end=tokenizer.eos_token)
    ids = torch.tensor(tiny.encode(tokenizer, text))  # [T]
    written = answers.decode(tokenizer, ids, ids >= 0, eos_ids(model, tokenizer))
    chain = Chain(written, ids.tolist(), 3, truncated)
    tables = si.make_tables(tiny.make_questions(1, True), [[chain, chain]], torch.zeros(1, 2, 2))
    assert tables["format"].tolist() == [[shaped, shaped]], written


def test_few_chains_that_close_are_a_warning(run, capsys):
    result = run("--num-questions", "4", "--max-completion-length", "4")  # too short for any to close
    assert result["set"]["closed"] == 0 == result["principles"][0]["closed"]
    shown = capsys.readouterr().out
    assert "0% of chains of thought close" in shown and "warning: few chains of thought close" in shown
    run("--num-questions", "8")  # six in ten close
    shown = capsys.readouterr().out
    assert "few chains of thought close" not in shown
    assert shown.startswith("prompt: no worked examples before each question, no prefill"), "what the model is shown"


def test_ranking_agrees_with_the_rates_of_the_task_and_negatives_are_apart(run, tmp_path, capsys):
    pool = tmp_path / "pool.jsonl"
    save_principles(pool, tiny.principles())
    result = run("--principles", str(pool), "--num-questions", "24", "--seed", "0")
    ranked = [row["id"] for row in result["principles"]]
    built = sorted(tiny.STYLES, key=lambda name: -tiny.STYLES[name].rate)
    squares = sum((ranked.index(name) - place) ** 2 for place, name in enumerate(built))
    spearman = 1 - 6 * squares / (8 * 63)
    shown = capsys.readouterr().out
    with capsys.disabled():
        print(f"\nSI ranking against the task's follow rates: Spearman {spearman:.2f}")
    assert spearman >= 0.9, result["principles"]
    keys = {"mi_row", "mi_column", "retrieval", "mistaken_for", "format", "cot_length", "accuracy"}
    for row in result["principles"]:
        assert row["si"]["low"] <= row["si"]["mean"] <= row["si"]["high"] and keys <= set(row)
    assert math.isclose(result["ceiling"], math.log(8)) and result["chains"] == 24 * 8
    recorded = json.loads((tiny.MODEL_DIR / "record.json").read_text())
    for name, seen in (("accuracy", result["set"]["accuracy"]), ("si", result["set"]["si"]["mean"])):
        assert abs(seen - recorded[name]) < 0.12, f"{name}: {seen:.3f}, recorded {recorded[name]:.3f}"
    against = {row["id"]: row["nats"]["mean"] for row in result["negatives"]}
    assert list(against) == list(tiny.STYLES) and max(against.values()) <= math.log(2)
    assert min(against["number"], against["check"]) > 0.1, "plain working, asked for by the negative, looks like these?"
    assert "no bound" in shown and "chance" in shown and "Number every step." in shown


# ------------------------------------------------------------------------------------------------ the command


def test_select_writes_a_file_that_training_takes(run, tmp_path, capsys):
    out = tmp_path / "best.jsonl"
    result = run(*FEW, "--select", "2", "--out", str(out))
    chosen = load_principles(out)
    assert [p.id for p in chosen] == result["selection"]["ids"] and len(chosen) == 2
    assert {p.text for p in chosen} <= {p.text for p in load_principles(run.pool)}
    seen = {f.name for f in tmp_path.iterdir()}
    plots = {"si.png"} if importlib.util.find_spec("matplotlib") else set()  # an optional package
    assert seen == {"pool.txt", "best.jsonl", "si.json", *plots}, "a file aside was left"
    assert "best 2" in capsys.readouterr().out


def test_out_without_select_holds_all_best_first_and_a_seed_repeats(run, tmp_path):
    questions, out = tmp_path / "q.jsonl", tmp_path / "all.jsonl"
    questions.write_text("".join(json.dumps({"question": q.text}) + "\n" for q in tiny.make_questions(4, True)))
    one, two = (run(*FEW, "--dataset", str(questions), "--out", str(out)) for _ in range(2))
    assert one == two and one["questions"] == 2
    assert [p.id for p in load_principles(out)] == [row["id"] for row in one["principles"]]
    assert "accuracy" not in one["set"], "these questions have no answers"




def test_a_missing_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_plot(tmp_path / "x.json", None) is None
    assert capsys.readouterr().err == "no plot: pip install matplotlib\n" and not list(tmp_path.iterdir())


def broken(*_, **__):
    raise RuntimeError("first line\nsecond line")


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
@pytest.mark.parametrize("fault", ["no latex", "draw raises", "savefig raises"])
def test_a_plot_that_fails_is_one_line_and_leaves_nothing(fault, tmp_path, monkeypatch, capsys):
    import matplotlib

    def draw(plt):
        return plt.figure()

    assert write_plot(tmp_path / "x.json", draw) == tmp_path / "x.png" and (tmp_path / "x.png").exists()
    (tmp_path / "x.png").unlink()
    if fault == "no latex":
        monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
        monkeypatch.setenv("PATH", str(tmp_path))
        draw = lambda plt: plt.subplots()[0]  # noqa: E731  with text at its ticks
    elif fault == "draw raises":
        draw = broken
    else:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    assert write_plot(tmp_path / "x.json", draw) is None and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert error.startswith("no plot: ") and error.count("\n") == 1, error


def test_results_stay_where_the_plot_fails(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("si.heat_map", broken)
    result = run(*FEW, "--out", str(tmp_path / "best.jsonl"))  # status 0
    assert len(result["principles"]) == 4 and len(load_principles(tmp_path / "best.jsonl")) == 4
    assert "no plot: " in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {"pool.txt", "best.jsonl", "si.json"}, "half a plot was left"


def test_results_are_on_the_disk_before_the_report(run, tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError("the reader of the pipe has gone")

    monkeypatch.setattr("si.print_si", closed)
    with pytest.raises(AssertionError):  # status 2
        run(*FEW, "--out", str(tmp_path / "best.jsonl"))
    assert json.loads((tmp_path / "si.json").read_text())["principles"] and (tmp_path / "best.jsonl").exists()


# ------------------------------------------------------------------------------------------------ creation


def test_proposals_of_a_model_that_cannot_write_are_sourced_distinct_and_loadable(run, tmp_path, capsys):
    out = tmp_path / "best.jsonl"
    result = run(*FEW, "--propose", "3", "--select", "5", "--out", str(out))
    rows = {row["id"]: row for row in result["principles"]}
    created = [row for row in rows.values() if row["source"] != str(run.pool)]
    assert len(rows) == 7 and len(created) == 3 and len({row["text"].casefold() for row in rows.values()}) == 7
    for row in created:
        first, second = row["id"].split("+")
        assert rows[first]["text"].rstrip(".") in row["text"] and rows[second]["text"][1:] in row["text"]
        assert first in row["source"] and second in row["source"]
    assert len(load_principles(out)) == 5
    assert "joined by their texts" in capsys.readouterr().out


def test_a_model_that_writes_proposes_and_what_is_unusable_is_left_out(tiny_model, monkeypatch):
    model, tokenizer = tiny_model
    principles = tiny.principles()[:3]
    replies = ["Count every step aloud.", "Number every step", "Too short.", "<answer>No tags here.</answer>",
               "A cut sentence without", "Turn <|user|> around now.", "word " * 60 + "."]
    rng = random.Random(0)

    def ask(model, tokenizer, requests, temperature, name):
        if requests[0].startswith("Repeat"):
            return [p.text.upper() for p in principles]
        return [rng.choice(replies) for _ in requests]

    monkeypatch.setattr("support.propose._ask", ask)
    found = propose.propose(model, tokenizer, principles, 3, config())
    assert len(found) == 3 and [p.text for p, _ in found].count("Count every step aloud.") == 1
    written = {p.text for p, source in found if "by tiny" in source}
    assert written == {"Count every step aloud."}, "taken: a copy, a fragment, a tag or a control token"
    assert sum("joined" in source for _, source in found) == 2, "too few usable ones are filled up by joining texts"


def test_asking_reads_the_first_line_without_bullets_and_quotes(tiny_model, monkeypatch):
    model, tokenizer = tiny_model

    def sample(model, prompts, *rest):
        ids = torch.tensor(tiny.encode(tokenizer, '\n- "Name the unit."\nAnd more'))[None, None]
        return Completions(ids, ids >= 0, ids[..., 0] < 0, ids[..., 0] * 0.0)

    monkeypatch.setattr("support.sampling.sample", sample)
    assert propose._ask(model, tokenizer, ["?"], 1.0, "name") == ["Name the unit."]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "content, flags, parts",
    [
        (None, ["--principles", "{tmp}/none.txt"], ["none.txt", "text file"]),
        (b"Only one.\n", [], ["p.txt", "2 or more"]),
        (b"A.\nB.\nA.\n", [], ["p.txt:3", "line 1"]),
        (b"A.\nB.\n<|user|> C.\n", [], ["<|user|>", "control token"]),
        (b"A.\n" + b"word " * 600, [], ["word word", "tokens"]),
        (None, ["--select", "9"], ["--select", "got 9", "2 to 8"]),
        (None, ["--select", "1"], ["--select", "got 1", "2 or more"]),
        (None, ["--propose", "0"], ["--propose", "got 0"]),
        (None, ["--num-questions", "1"], ["--num-questions", "got 1", "2 or more"]),
        (None, ["--num-questions", "many"], ["--num-questions", "many"]),
        (b"\n".join(b"A %d." % n for n in range(40)), ["--num-questions", "4"], ["--num-questions", "too few questions, 4", "5 or more", "40 principles"]),
        (None, ["--dataset", "{one}", "--select", "2"], ["one.jsonl", "too few questions, 1", "2 or more"]),
        (None, ["--dataset", "{one}", "--select", "2", "--propose", "2"], ["one.jsonl", "too few questions, 1", "2 or more"]),
        (None, ["--temperature", "0"], ["--temperature", "got 0.0", "or more"]),
        (None, ["--max-completion-length", "600"], ["--max-completion-length", "512"]),
        (None, ["--model", "{tmp}"], ["--model", "{tmp}", "safetensors"]),
        (None, ["--dataset", "{tmp}/none.jsonl"], ["none.jsonl"]),
        (None, ["--out", "{tmp}/best.txt"], ["--out", ".jsonl"]),
        (None, ["--out", "{tmp}/none/best.jsonl"], ["--out", "writable folder"]),
        (None, ["--json", "{tmp}"], ["--json", "{tmp}"]),
        (None, ["--such", "1"], ["--such", "--help"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(content, flags, parts, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"question": "Tom has 7 pens. How many pens?", "answer": 7}')
    flags = [flag.replace("{tmp}", str(tmp_path)).replace("{one}", str(tmp_path / "one.jsonl")) for flag in flags]
    if "--principles" not in flags:
        path = Path(PRINCIPLES) if content is None else tmp_path / "p.txt"
        if content is not None:
            path.write_bytes(content)
        flags = ["--principles", str(path), *flags]
    assert si.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, f"more than one line: {error}"
    assert all(part.replace("{tmp}", str(tmp_path)) in error for part in parts), error


def test_help_and_missing_flags(capsys):
    assert si.main([]) == 2
    assert "--principles" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        si.main(["--help"])
    assert stop.value.code == 0 and "--num-questions" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what the flags reach


def test_the_temperature_is_that_of_sampling_and_of_scores(tiny_model):
    cold, drawn = config("--temperature", "0.001", "--max-completion-length", "16"), torch.tensor([[0, 1], [0, 1]])
    given = make_template(cold), tiny.principles()[:2], tiny.make_questions(2, True), drawn, cold
    (first, scores), (second, _) = (si.measure(*tiny_model, *given, name) for name in "ab")
    assert first == second and scores.diagonal(dim1=1, dim2=2).min() > -0.1


def test_a_selection_names_members_of_its_pool_and_is_measured_on_the_other_half():
    scores = torch.zeros(5, 4, 4)  # three questions tell 1 from 3, the two between them 0 from 2
    for part, members in ((slice(0, None, 2), (1, 3)), (slice(1, None, 2), (0, 2))):
        for i in members:
            scores[part, i, i] = 50.0
    found = si.summarise_selection(scores, [2, 4, 5, 7], tiny.principles(), 2)
    assert found["indices"] == [4, 7] and found["ids"] == [tiny.principles()[i].id for i in (4, 7)]
    assert abs(found["si_other_half"]) < 1e-6, "measured on the half it was chosen on"


def test_of_a_large_pool_the_best_are_measured_again(run, monkeypatch):
    monkeypatch.setattr("si.PER_QUESTION", 3)
    result = run("--principles", PRINCIPLES, "--num-questions", "6", "--max-completion-length", "16", "--select", "2")
    assert result["selection"]["pool"] == sorted(row["index"] for row in result["principles"][:4])
