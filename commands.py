"""What the command lines share: flags, intervals, plots; and what the two commands of metrics.py alone need."""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import metrics
import tiny
from data import InputError, at_least, write_aside
from metrics import bootstrap_interval
from policy import load_model, prompt_limit


def load_named(flag: str, name: str):
    """(model, tokenizer) of a name given with `flag`; raises InputError that names it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_model(str(tiny.MODEL_DIR) if name == "tiny" else name, device)
    except ValueError as error:  # InputError, or an architecture that policy cannot score
        raise InputError(f"{flag}: {str(error).removeprefix('--model: ')}") from None


def pick_questions(config):
    """--num-questions of them, of the file or of the embedded task's held-out part."""
    if config.dataset is None:
        return tiny.make_questions(config.num_questions, held_out=True, seed=config.seed)
    questions = config.load_questions(config.num_questions, config.seed)
    return random.Random(f"{config.seed} questions").sample(questions, min(config.num_questions, len(questions)))


def encoder(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def context_limit(model, more_tokens: int) -> int:
    """policy.prompt_limit; raises InputError where it leaves no room for a prompt."""
    limit = prompt_limit(model, more_tokens)
    if limit < 2:
        raise InputError(f"--max-completion-length: leaves no room for a prompt in a context of {limit + more_tokens} "
                         "tokens; a lower number is accepted")
    return limit


def interval(values) -> dict:
    """Mean over questions [N] with its 95% bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {"mean": values.double().mean().item(), "low": low.item(), "high": high.item()}


def cell(interval: dict, digits: int = 2) -> str:
    mean, low, high = (f"{interval[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def check_numbers(config, **lowest) -> None:
    """Raises InputError for a setting below its lowest number here, and for a seed that is too large."""
    at_least(config, **lowest)
    if config.seed >= 2**32:
        raise InputError(f"--seed: got {config.seed}; 0 to {2**32 - 1} is accepted")


def check_written(config, **endings) -> None:
    """Raises InputError for a file that could not, or must not, be written: at once, not after an hour of sampling."""
    for name, ending in endings.items():
        path = getattr(config, name)
        if path is None:
            continue
        if not path.lower().endswith(ending):
            raise InputError(f"--{name}: got {path}; a file that ends in {ending} is accepted")
        if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
            raise InputError(f"--{name}: {path} cannot be written; a file in a writable folder is accepted")
        for read in (config.principles, config.dataset):
            if read and os.path.exists(read) and os.path.exists(path) and os.path.samefile(read, path):
                raise InputError(f"--{name}: {path} is read by this command; another file is accepted")


def write_numbers(path, value) -> None:
    def plain(value):  # JSON has no NaN
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"{path}: all numbers")


def pyplot():
    """matplotlib's, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_plot(json_path, draw, dpi: int = 120) -> None:
    """The figure that draw(pyplot) returns, as .png beside a .json file; one line where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    path = Path(json_path).with_suffix(".png")
    figure = draw(plt)
    write_aside(path, lambda aside: figure.savefig(aside, dpi=dpi))
    plt.close(figure)
    print(f"{path}: the plot")


def flag_parser(settings: type, **options):
    """The parser of a dataclass of settings; what argparse would print and exit with is an InputError here."""
    parser = transformers.HfArgumentParser(settings, **options)

    def refuse(message):
        raise InputError(f"{message}; --help lists what is accepted")

    parser.error = refuse
    return parser


def parse(argv):
    """(function, its settings) of a command line; raises InputError for one that cannot be."""
    import geometry  # here, because both need this file
    import si

    commands = {"si": (si.SiConfig, si.run_si), "geometry": (geometry.GeometryConfig, geometry.run_geometry)}
    if not argv or argv[0] not in commands:
        got = repr(argv[0]) if argv else "nothing"
        raise InputError(f"command: got {got}; {' and '.join(commands)} are accepted, each with --help")
    settings, command = commands[argv[0]]
    parser = flag_parser(settings, prog=f"metrics.py {argv[0]}", description=settings.__doc__)
    config = settings(**vars(parser.parse_args(argv[1:])))
    config.check()
    return command, config


def main(argv=None) -> int:
    """0; 2 after one line on stderr for input that cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(metrics.__doc__)
        return 0
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        command, config = parse(argv)
        command(config)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
