"""What the commands share: a command line, a named model, an error as one line."""

import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path

import huggingface_hub
import torch
import transformers

from support import display, memory, parallel, resume, tiny
from support.errors import InputError
from support.model import load_model
from support.settings import Config, Parser, flag


def parse(argv=None, kind: type = Config):
    """The settings of a command line, a `kind`; with --resume those of the run, with the flags on top."""
    parser = Parser(kind, kind.__doc__)
    config = kind(**vars(parser.parse_args(argv)))
    if getattr(config, "resume", None):
        parser.set_defaults(**dict.fromkeys(vars(config)))  # None, to see which flags are given
        given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
        config = resume.resume_config(kind, given)
    config.check()
    return config


@contextlib.contextmanager
def no_denormals():
    """Inside, numbers below 1e-38 are 0: gradients of 1e-40, a saturated InfoNCE's, make a CPU four times slower."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def exit_status(command) -> int:
    """Run `command`; returns the exit status, and unless that is 0 one line on stderr says why.

    2: unusable input; 1: numbers that are not finite, or no memory; 128 + its number: a signal, as
    shells count. Any other error is a fault of the program and stays a traceback.
    """
    warnings.filterwarnings("ignore", "Sinkhorn stopped")  # the report says it once
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
    with display.optional(), no_denormals():
        try:
            command()
            parallel.stop()
            return 0
        except (InputError, OSError) as error:
            line, status = str(error), 2
        except FloatingPointError as error:
            line, status = str(error), 1
        except torch.OutOfMemoryError:
            hint = f"--gradient-checkpointing with a low --micro-batch needs the least; else {memory.ADVICE}"
            line, status = f"the GPU's memory does not suffice; {hint}", 1
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # a CPU's; torch has no type for it
                line, status = f"the memory does not suffice; {memory.ADVICE}", 1
            elif parallel.is_lost_peer(error):
                line, status = f"process {parallel.rank()}: {str(error).splitlines()[0]}: another process has ended", 1
            else:
                raise
        except KeyboardInterrupt:
            line, status = "stopped by Ctrl-C", 128 + signal.SIGINT
        print(f"error: {line}", file=sys.stderr)
        return status


def check_written_files(config, **endings) -> None:
    """Raises InputError for a file that cannot, or must not, be written, before any work."""
    for name, ending in endings.items():
        if (path := getattr(config, name)) is None:
            continue
        if not path.lower().endswith(ending):
            raise InputError(f"{flag(name)}: got {path}; a file that ends in {ending} is accepted")
        if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
            raise InputError(f"{flag(name)}: {path} cannot be written; a file in a writable folder is accepted")
        for source in (config.principles, config.dataset, config.examples):
            if source and os.path.exists(source) and os.path.exists(path) and os.path.samefile(source, path):
                raise InputError(f"{flag(name)}: {path} is read by this command; another file is accepted")


def load_named(name_of_flag: str, name: str):
    """(model, tokenizer) of a name given with a flag; raises InputError that names the flag."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_model(tiny.model_path(name), device)
    except ValueError as error:  # InputError, or an architecture that cannot be scored
        raise InputError(f"{name_of_flag}: {str(error).removeprefix('--model: ')}") from None
