"""The studies on a real model: what they compute from trainings and completions, without training any."""

import functools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from experiments import common, reading, real, real_studies, si_study
from support import tiny
from support.files import Principle, Question, load_principles

TRAINING = (  # flags of a short one
    "--principles", str(real.PRINCIPLES), "--num-questions", "1", "--num-principles", "2", "--num-generations", "2",
    "--max-steps", "1", "--eval-questions", "2", "--eval-steps", "0", "--max-completion-length", "8",
)


def rows(*shown, question="q"):
    return [
        {"question": f"{question}{n}", "principle": 'Use the word "because".', "text": "t", "follows": follows}
        for n, follows in enumerate(shown)
    ]


def test_following_is_a_share_and_a_difference_over_the_same_questions():
    share, error = reading.following(rows(1, 0, 1, 1))
    assert share == 0.75 and 0.15 < error < 0.3  # sqrt(.75 * .25 / 4) = .22
    change, error = reading.following(rows(1, 1, 1, 0), rows(0, 0, 1, 0))
    assert change == pytest.approx(0.5) and 0.2 < error < 0.3  # of 1, 1, 0, 0: .25
    assert reading.following(rows(1, 0, 1), rows(1, 0, 1)) == (0, 0)  # the same in every question: no error


def test_the_questions_files_are_parts_that_do_not_meet(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sums = [{"question": f"How many is {n}?", "answer": f"#### {n}"} for n in range(200)]
    (data / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, [*sums, {"question": "x" * 201, "answer": "1"}])))
    targets = {"mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"yes": 1, "no": 0}}
    (data / "truthfulqa_mc.json").write_text(json.dumps([{"question": f"Is it {n}?", **targets} for n in range(100)]))
    files = real.write_questions(tmp_path, data)
    found = {name: {row["question"] for row in common.read_lines(path)} for name, path in files.items()}
    of_truth = {question for question in found["all"] if question.startswith("Is it")}
    assert len(found["all"]) == 2 * len(of_truth) and len(found["choice"]) == len(of_truth)  # as many sums
    assert not found["choice"] & found["all"]
    assert not found["test"] & of_truth and len(found["test"] | of_truth) == 100
    assert all(len(question) <= 200 for questions in found.values() for question in questions)
    with pytest.raises(SystemExit, match="--data: .*gsm8k_train.jsonl and truthfulqa_mc.json"):
        real.rows_of("gsm8k", tmp_path)


def test_a_training_that_was_stopped_goes_on_and_a_finished_one_is_left(tmp_path, monkeypatch):
    calls, run = [], tmp_path / "run-lr1e-5.5"

    def run_script(*arguments, log):
        calls.append(arguments[1])
        run.mkdir(exist_ok=True)
        (run / "eval.json").write_text(json.dumps({"start": 1}))
        if len(calls) == 1:
            raise SystemExit("stopped before a checkpoint")
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / ".step_1.pt.7.tmp.pt").touch()
        if len(calls) == 2:
            raise SystemExit("stopped while it wrote its first")
        (run / "checkpoints" / "step_1.pt").touch()
        if len(calls) == 3:
            raise SystemExit("stopped")
        (run / "final").mkdir()

    monkeypatch.setattr(common, "run_script", run_script)
    for _ in range(3):
        with pytest.raises(SystemExit):
            common.run_training(run)
    assert common.run_training(run) == common.run_training(run) == {"start": 1}
    assert calls == [*["--output-dir"] * 3, "--resume"]
    assert common.training_minutes(run) > 0


@pytest.mark.parametrize("make, reported", [(tiny.make_questions, 256), (tiny.make_pairs, 512)])
def test_choices_are_made_on_sums_that_are_not_reported(make, reported):
    others = common.after(reported, make)

    def sums(items):
        return {tuple(re.findall(r"\d+", item.text)) for item in items}

    assert len(others(256, True)) == 256 and not sums(others(256, True)) & sums(make(reported, True))
    assert others(9, False, 3) == make(9, False, 3)  # the training part stays


def test_after_a_failure_no_other_job_begins():
    begun = []

    def job(number):
        begun.append(number)
        if number == 1:
            raise SystemExit("the reason")
        return -number

    assert common.side_by_side(job, [(0,), (2,)], 2) == {(0,): 0, (2,): -2}
    begun.clear()
    with pytest.raises(SystemExit, match="the reason"):
        common.side_by_side(job, [(number,) for number in range(9)], 1)
    assert begun == [0, 1]


def test_a_script_that_fails_is_one_line_with_its_reason(tmp_path):
    (tmp_path / "fails.py").write_text("print('shown'); raise SystemExit('error: for this reason')")
    for log in (None, tmp_path / "log"):
        with pytest.raises(SystemExit, match="fails.py: error: for this reason"):
            common.run_script(tmp_path / "fails.py", log=log)
    assert (tmp_path / "log").read_text().startswith("shown")


def test_text_values_of_a_question():
    principles = [Principle("a", 'Use the word "because".'), Principle("b", "Use at most eight words.")]
    task = train.Task(Question("?", None), principles, "key")
    texts = [["<reasoning>Because it is so, it is.</reasoning>"], ["<reasoning>So it</reasoning><answer>1</answer>"]]
    (answers,) = reading.answers_of(SimpleNamespace(tasks=[task], texts=[texts]))
    assert [(row["question"], row["principle"], row["text"], row["follows"]) for row in answers] == [
        ("?", principles[0].text, texts[0][0], True), ("?", principles[1].text, texts[1][0], False),
    ]
    assert reading.text_values(answers) == {  # because it is so
        "follows": 0.5, "words": 4.0, "distinct_words": 4, "short_chains": 0.5,
    }


def test_train_reading_adds_its_figures_its_completions_and_one_half_of_the_loss(tmp_path, monkeypatch):
    for name in ("sample", "evaluate", "evaluate_tasks", "information_terms"):
        monkeypatch.setattr(train, name, getattr(train, name))  # put back after the test
    flags = [*TRAINING, "--eval-steps", "1", "--max-steps", "2"]
    assert reading.train_reading("row", [*flags, "--mi-temperature", "5", "--output-dir", str(tmp_path / "run")]) == 0
    evals = json.loads((tmp_path / "run" / "eval.json").read_text())
    for when in ("start", "end"):
        assert {"follows", "words", "distinct_words", "short_chains", "format"} <= set(real_studies.figures(tmp_path / "run", evals, when))
        answers = common.read_lines(tmp_path / "run" / f"answers-{when}.jsonl")
        assert len(answers) == 4 and answers[0]["text"] == evals[when]["example"]["completion"]
        assert reading.following(answers)[0] == evals[when]["follows"]["mean"]
    scores = torch.tensor([[[[-1.0, -3.0], [-4.0, -2.0]]]])  # [1, 1, 2, 2]
    config = SimpleNamespace(mi_temperature=2.0)
    expected = -(scores[0, 0] / 2).log_softmax(-1).diagonal().mean() / 2
    assert train.information_terms(scores, config)["loss_mi"] == pytest.approx(expected.item())


def test_runs_that_begin_alike_are_evaluated_once_at_the_start(tmp_path, monkeypatch):
    sampled = []
    for number, more in enumerate((["--lambda-mi", "0"], ["--lambda-mi", "0.1"], ["--seed", "1"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "sample", lambda *args, n=number, s=train.sample: sampled.append(n) or s(*args))
            for name in ("evaluate", "evaluate_tasks"):
                patch.setattr(train, name, getattr(train, name))
            assert reading.train_reading("both", [*TRAINING, *more, "--output-dir", str(tmp_path / f"run{number}")]) == 0
    assert [sampled.count(number) for number in range(3)] == [3, 2, 3]  # start, step and end; step and end
    alike, same, other = ((tmp_path / f"run{number}" / "answers-start.jsonl").read_text() for number in range(3))
    assert alike == same != other
    evals = [json.loads((tmp_path / f"run{number}" / "eval.json").read_text())["start"] for number in range(3)]
    assert evals[0] == evals[1] != evals[2]


def test_what_a_start_is_kept_under_tells_the_contents_of_its_files(tmp_path):
    config = SimpleNamespace(**dict.fromkeys(reading.EVALUATED), output_dir=tmp_path / "run")
    config.principles = tmp_path / "set1.jsonl"
    found = []
    for text in ("one", "two", "one"):
        config.principles.write_text(text)
        found.append(reading.start_file(config))
    assert found[0] == found[2] != found[1]


def settings(tmp_path):
    questions = {name: tmp_path / f"{name}.jsonl" for name in ("all", "choice", "test")}
    common.write_lines(questions["all"], [{"question": "q0"}, {"question": "q1", "answer": "1"}])
    return SimpleNamespace(
        output_dir=tmp_path, model=tmp_path / "model", questions=questions, seeds=[0, 1], jobs=1, limit=None, extra=[],
    )


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """Trainings, si.py, geometry.py and TruthfulQA that write a file at once; the list of what was run."""
    pyplot, done = pytest.importorskip("matplotlib.pyplot"), []

    def evaluation(mean):
        names = ("format", "si", "accuracy", "sinkhorn", "completion_length", "follows", "words", "distinct_words",
                 "short_chains")
        return {"questions": 4, **{name: {"mean": mean, "low": 0, "high": 1} for name in names}, "example": {}}

    def run_training(directory, *flags, script=("train.py",)):
        done.append((directory.name, [str(flag) for flag in flags], script[1:]))
        directory.mkdir(exist_ok=True)
        weight = float(flags[flags.index("--lambda-mi") + 1])
        steps = [{"reward": n % 3, "format": n % 2, "grad_norm": 1.0, "loss_ot": n} for n in range(4)]
        common.write_lines(directory / "metrics.jsonl", steps)
        principles = [principle.text for principle in load_principles(real.PRINCIPLES)]
        for when, share in (("start", 0.3), ("end", 0.5 + weight / 10)):
            common.write_lines(directory / f"answers-{when}.jsonl", [
                {"question": f"q{n}", "principle": principle, "text": "Let us | because I mistake" if n < 40 * share else "bar"}
                for n in range(40) for principle in principles
            ])
        evals = {"start": evaluation(0.3), "end": evaluation(0.5), "steps": {"18": evaluation(0.4)}}
        (directory / "eval.json").write_text(json.dumps(evals))
        return evals

    def run_script(*arguments, log=None):
        arguments = [str(argument) for argument in arguments]
        done.append((arguments[0].rsplit("/", 1)[-1], arguments, ()))
        if "--completions" in arguments:
            principles = load_principles(next(b for a, b in reversed([*zip(arguments, arguments[1:])]) if a == "--principles"))
            common.write_lines(tmp_path / arguments[3], [
                {"question": f"q{n}", "principle": p.text, "text": "text | bar", "follows": n % 2 == 0}
                for n in range(4) for p in principles
            ])
        elif "--truthfulqa" in arguments:
            scores = {name: [0.3, 0.04] for name in real.SCORES[arguments[2]]}
            common.write_lines(tmp_path / arguments[-1], [scores])
        elif "--sets" in arguments:
            (tmp_path / "sets").mkdir()
            for n in range(1, real_studies.SETS + 1):
                (tmp_path / "sets" / f"set{n}.jsonl").write_text('{"principle": "a"}\n{"principle": "b"}\n')
        elif arguments[0] == "si.py":
            path = arguments[arguments.index("--json") + 1]
            place = int(path[-6])
            (tmp_path / path).write_text(json.dumps({"set": {"si": {"mean": place / 10}, "retrieval": 0.5}}))
        elif arguments[0] == "geometry.py":
            layer = dict(rank_before=10, rank_after=12, linear_cka=0.9, sinkhorn=1, scale=2, shift_in_span=0.2, random_span=0.1,
                         between_within_before=0.1, between_within_after=0.2)
            outputs = {name: {"mean": 0.1} for name in
                       ("fisher_rao", "kl", "principle_before", "principle_after", "principle_change")}
            summary = json.dumps({"layers": [layer] * 31, "outputs": outputs})
            (tmp_path / arguments[arguments.index("--json") + 1]).write_text(summary)
        return ""

    def write_plot(path, draw):
        pyplot.close(draw(pyplot))

    monkeypatch.setattr(real_studies, "write_plot", write_plot)
    monkeypatch.setattr(si_study, "correlation", functools.partial(si_study.correlation, resamples=40))
    for module in (real, real_studies, si_study):
        monkeypatch.setattr(module, "run_script", run_script)
        if hasattr(module, "run_training"):
            monkeypatch.setattr(module, "run_training", run_training)
    return done


@pytest.mark.parametrize("study", list(real_studies.STUDIES))
def test_each_study_runs_to_its_tables_and_again_without_asking_anew(study, tmp_path, faked, capsys):
    args = settings(tmp_path)
    json.dumps(real_studies.STUDIES[study](args))  # what main writes
    table, asked = capsys.readouterr().out, [name for name, _, _ in faked if name.endswith(".py")]
    assert "nan" not in table and table.count("| --- |") >= 1 + (study != "geometry")
    real_studies.STUDIES[study](args)
    assert [name for name, _, _ in faked if name.endswith(".py")] == asked
    assert capsys.readouterr().out == table


def test_nothing_is_chosen_on_reported_questions_or_a_reported_seed(tmp_path, faked):
    args = settings(tmp_path)
    found = real_studies.temperature(args)
    assert found["best"] == (real_studies.TEMPERATURES[-1], real_studies.WEIGHTS[-1])  # the fake rises with the weight
    grid = [flags for name, flags, _ in faked if name.startswith("grid-")]
    assert len(grid) == 11
    for flags in grid:
        assert flags[flags.index("--dataset") + 1] == str(args.questions["choice"])
        seeds = [int(value) for flag, value in zip(flags, flags[1:]) if flag == "--seed"]
        assert not set(seeds) & {*args.seeds, *real.SEEDS}
    assert {script for name, _, script in faked if name.endswith(("row", "column"))} == {("row",), ("column",)}


def test_the_sets_lie_evenly_between_the_least_and_the_most_si(tmp_path, monkeypatch):
    torch.manual_seed(0)
    scores = torch.randn(6, 14, 14) + torch.diag(torch.linspace(0, 6, 14))  # [N, K, K] some are told apart, some not
    monkeypatch.setattr(real_studies.si, "estimate_si", lambda *_: ({}, scores))
    monkeypatch.setattr(real_studies, "pick_questions", lambda *_: [])
    monkeypatch.setattr(real_studies, "load_model", lambda *_: (None, None))
    real_studies.write_sets("model", None, str(tmp_path / "sets"))
    pool = [principle.text for principle in load_principles(real.POOL)]
    sets = [load_principles(tmp_path / "sets" / f"set{n}.jsonl") for n in range(1, real_studies.SETS + 1)]
    members = torch.tensor([[pool.index(principle.text) for principle in some] for some in sets])  # [SETS, 4]
    nats = real_studies.metrics.subset_information(scores, members).mean(0)  # [SETS]
    steps = nats.diff()
    assert len({tuple(sorted(row)) for row in members.tolist()}) == real_studies.SETS
    assert (steps > 0).all() and steps.max() < 1.5 * steps.min()


def test_the_scripts_own_parts_are_run_as_processes(monkeypatch):
    called = []
    monkeypatch.setitem(real_studies.IN_A_PROCESS, "--sets", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(sys, "argv", ["real_studies.py", "--sets", "model", "questions", "folder"])
    real_studies.main()
    assert called == [("model", "questions", "folder")]
