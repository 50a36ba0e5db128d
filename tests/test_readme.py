"""README.md and docs/: what they name exists, what they claim of the flags holds, and their code runs."""

import ast
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import geometry
import si
import train
from grpo import grpo_loss

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
ALL = "\n".join(PAGES.values())
CONFIGS = {"train.py": train.Config, "si.py": si.SiConfig, "geometry.py": geometry.GeometryConfig}
FLAGS = {name: {"--" + f.name.replace("_", "-") for f in fields(config)} | {"--help"}
         for name, config in CONFIGS.items()}
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
QUESTIONS = str(ROOT / "tests" / "questions.jsonl")  # a few: to check the embedded task's 4096 takes a second


def test_the_readme_is_short():
    assert len(README.encode()) <= 14_000, f"README.md has {len(README.encode())} bytes; move something to docs/"


def test_the_two_commands_set_up_and_run():
    first, second = (line.partition("#")[0].strip() for line in README.splitlines() if line.startswith("pip install"))
    assert first == "pip install -r requirements.txt && python train.py --principles principles/reasoning.txt"
    assert second == (ROOT / ".ci" / "run").read_text().splitlines()[-1], "CI runs another test command"


def test_the_loop_is_that_of_train_py():
    shown = README.partition("## Read it")[2].partition("```python\n")[2].partition("```")[0]
    assert shown.startswith("def loop(") and shown in (ROOT / "train.py").read_text(encoding="utf-8")


def test_every_place_named_in_the_code_exists():
    places = re.findall(r"`([\w/-]+\.py):(\w+)`", ALL)
    assert len(places) > 20
    for file, name in places:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{file}:{name} is named, and not there"


def test_every_file_they_name_exists():
    names = set(re.findall(r"(?<![\w/.~-])(?:(?:benchmarks|experiments|support|docs|principles|tests|tiny-model)/)?[\w-]+\.py\b", ALL))
    names |= set(re.findall(r"(?<![\w/.~-])(?:benchmarks|experiments|support|docs|principles|tests|tiny-model)/[\w-]+\.\w+", ALL))
    assert len(names) > 30
    for name in names:
        assert (ROOT / name).is_file(), f"{name} is named, and not there"


def test_every_test_they_name_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", ALL)):
        assert f"def {name}(" in tests, f"{name} is named, and not there"


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_resolves(page):
    links = re.findall(r"\]\((?!http)([^)\s]+)\)|<img src=\"([^\"]+)\"", PAGES[page])
    for link in (one or other for one, other in links):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        headings = re.findall(r"^#+ (.*)$", PAGES.get(target, ""), re.MULTILINE)
        assert not anchor or anchor in map(slug, headings), f"{page.name} links to {link}, and there is no such heading"


def test_every_flag_they_name_is_a_flag():
    common = "".join((ROOT / "experiments" / name).read_text(encoding="utf-8") for name in ("common.py", "real.py"))
    commands = re.findall(r"(?:python ((?:benchmarks/|experiments/)?\w+\.py)|lm_eval|torchrun)\b([^`#\n]*(?:\n--[^`#\n]*)?)", ALL)
    rest = ALL
    for script, arguments in sorted(commands, key=lambda command: -len(command[1])):  # some are the start of others
        rest = rest.replace(arguments, "") if script != "train.py" else rest
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", arguments):
            if script in FLAGS:
                assert flag in FLAGS[script], f"python {script} has no {flag}"
            elif script:  # what a benchmark does not know goes to train.py
                source = (ROOT / script).read_text(encoding="utf-8") + common
                assert f'"{flag}"' in source or flag in FLAGS["train.py"], f"python {script} has no {flag}"
    for flag in set(re.findall(r"(?<![\w|-])--[a-z][\w-]+", rest)):
        assert any(flag in known for known in FLAGS.values()), f"{flag} is named, and no command has it"


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(names in metrics.jsonl, names in eval.json) of a run on principles and one on pairs."""
    small = "--max-steps 1 --eval-questions 1 --max-completion-length 8".split()
    batch = "--num-questions 1 --num-principles 2 --num-generations 2 --beta 0.1 --mi-reward 1 --dataset".split()
    steps, evals = set(), set()
    for flags in (["--principles", PRINCIPLES, *batch, QUESTIONS], ["--preferences", "tiny", "--num-pairs", "1"]):
        run_dir = tmp_path_factory.mktemp("logged") / "run"
        assert train.main([*flags, *small, "--output-dir", str(run_dir)]) == 0
        steps |= set(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])) - {"step"}
        evals |= set(json.loads((run_dir / "eval.json").read_text())["end"]) - {"questions", "example"}
    return steps, evals


@pytest.mark.parametrize("file, which", [("metrics.jsonl", 0), ("eval.json", 1)])
def test_every_logged_number_is_explained_and_no_other(logged, file, which):
    page = PAGES[ROOT / "docs" / "metrics.md"]
    table = page.partition(f"## {file}\n")[2].partition("\n## ")[0]
    explained = {name for cell in re.findall(r"^\| (`[^|]+)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    assert explained == logged[which]


def test_what_differs_from_trl_is_said():
    text = " ".join(ALL.split())
    for claim in ("`--loss-type bnpo` normalises per question (TRL: per batch)",
                  "`--max-steps` counts sampled batches (TRL: optimiser updates)"):
        assert claim in text


def test_bnpo_normalises_per_question_and_kl_is_logged_with_beta_alone():
    advantages = torch.tensor([[[1.0, -1]], [[1, -1]]])  # [Q, K, G]
    mask = (torch.arange(6) < torch.tensor([6, 1, 1, 1])[:, None]).reshape(2, 1, 2, 6)  # [Q, K, G, T]
    old = torch.tensor([-0.05, 0, -0.02, 0]).reshape(2, 1, 2, 1).expand(2, 1, 2, 6)  # [Q, K, G, T]
    logp = torch.zeros(2, 1, 2, 6)
    zeros = torch.zeros(2, 0)
    batch = train.Batch(*[None] * 4, mask, *[None] * 3)
    targets = train.Targets(advantages, old, zeros, zeros, logp, None)
    config = train.Config(principles=PRINCIPLES, loss_type="bnpo", importance_sampling_level="token", beta=0.0)

    def loss(cut):
        rows = (t[cut].flatten(0, 2) for t in (logp, old))
        options = {"level": "token", "normalizer": "token"}
        return grpo_loss(*rows, advantages[cut].flatten(), mask[cut].flatten(0, 2), **options)[0].item()

    terms = train.policy_terms(logp, batch, targets, config)
    ours = terms["loss_grpo"].item()
    assert ours == pytest.approx((loss(slice(0, 1)) + loss(slice(1, 2))) / 2)
    assert abs(ours - loss(slice(0, 2))) > 0.1, "as TRL: over the batch"
    assert "kl" not in terms and "kl" in train.policy_terms(logp, batch, targets, replace(config, beta=0.1))


def test_max_steps_counts_batches(tmp_path, monkeypatch):
    flags = "--max-steps 2 --num-iterations 3 --lambda-mi 0 --lambda-ot 0 --max-completion-length 8 --eval-questions 1 "\
            f"--eval-steps 0 --num-questions 1 --num-principles 2 --num-generations 2 --dataset {QUESTIONS}"
    steps, descend = [], train.descend
    monkeypatch.setattr(train, "descend", lambda *arguments: steps.append(None) or descend(*arguments))
    assert train.main(["--principles", PRINCIPLES, *flags.split(), "--output-dir", str(tmp_path / "run")]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2 and len(steps) == 6


def test_the_example_runs():
    example = README.partition("## Copy a module")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    scope = {}
    exec(example, scope)
    assert scope["logp"].grad.abs().sum() > 0 and scope["x"].grad.abs().sum() > 0 and scope["info"].converged
