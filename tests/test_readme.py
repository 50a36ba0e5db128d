"""README.md: the places it names exist, the flags it names are flags, and its example runs."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import geometry
import si
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_place_named_in_the_code_exists():
    places = re.findall(r"`([\w/]+\.py):(\w+)`", README)
    assert len(places) > 15
    for file, name in places:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"README names {file}:{name}, which is not there"


def test_every_file_it_names_exists():
    names = set(re.findall(r"`((?:benchmarks|principles|tests)/[\w.]+|\w+\.py)`", README))
    names |= set(re.findall(r"\]\((?!http)([\w./-]+)\)", README))
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), f"README names {name}, which is not there"


def test_every_flag_it_names_is_a_flag():
    configs = (train.Config, si.SiConfig, geometry.GeometryConfig)
    flags = {"--" + f.name.replace("_", "-") for config in configs for f in fields(config)} | {"--help"}
    for command in re.findall(r"(?:python benchmarks/|lm_eval |torchrun ).*", README):
        flags |= set(re.findall(r"--[\w-]+", command))  # those have parsers of their own
    for flag in set(re.findall(r"(?<![\w|-])--[a-z][\w-]+", README)):
        assert flag in flags, f"README names {flag}, which train.py does not take"


def test_every_logged_number_is_explained():
    logged = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "grpo.py", "preferences.py"))
    table = README.partition("## What the logged numbers mean")[2].partition("\n## ")[0]
    for name in re.findall(r"^\| `([^|]+)`", table, re.MULTILINE):
        for single in re.findall(r"[a-z_]+", name):
            assert single.rstrip("_") in logged, f"README explains {single}, which nothing logs"


def test_the_example_runs():
    example = README.partition("## Copy a module")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    scope = {}
    exec(example, scope)
    assert scope["logp"].grad.abs().sum() > 0 and scope["x"].grad.abs().sum() > 0 and scope["info"].converged
