"""What a run needs around the three commands and the five concepts. Arrows point down this list:

    command        what the three commands share: a command line, a named model, an error as one line
    run            a run on disk and on the terminal: directory, log, evaluations, signals
    resume         --resume: which run it means, and whether that may go on
    checkpoint     what a stopped run goes on from, in one file
    report         what is printed and drawn: tables, warnings, the model card, plots
    preferences    pairs: from text to loss, and the loop that trains on them alone
    steps          one step: its figures and clock, micro-batches, the optimiser
    memory         what a step takes, and the largest micro-batch that fits
    data           what a run trains and evaluates on: read, split, measured
    settings       every flag, its help and its bounds
    tiny           the embedded task and its model
    model          a language model: loaded, compared with its plain forward, frozen, LoRA, saved
    chains         chains of thought for si.py and geometry.py: sampled, and scored under principles
    propose        new principles: written by the model, or joined from given ones
    scoring        log-probabilities and hidden states of completions, after their own and other prompts
    sampling       completions by name: any batch, device and number of processes gives the same
    prefix         a prompt goes through the model once; its completions share keys and values
    attention      the library's, with what a GPU would do again in each layer done once
    logits         hidden states to logits, for sampler and scorer; precision of products
    answers        what a completion says: its text, its chain of thought, its answer
    prompts        from a question and a principle to tokens: template, BOS, ends of a turn
    files          principles, questions, examples and pairs as records, read from files
    rows           rows of .jsonl, .csv, .parquet and data sets, as they stand, and their fields
    writing        files that are written whole or not at all
    display        what is shown may get lost: no print ends a command
    parallel       several processes, by torch.distributed
    errors         a user's mistake in one line; a number that is not finite
"""

import os
import sys

# Commands, benchmarks and the tests import this before torch is loaded.

# The threads of OpenMP wait for each other by spinning, and beside other work on the machine they burn each other's
# time: a step of 1.4 s took 6.9. GNU's library reads this when torch is loaded; others do not know the name.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# A GPU's memory in segments that grow: completions of ever other lengths would leave gaps between fixed ones.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# A standard stream that is closed leaves its number to the next file that is opened, and messages would end up in it.
for descriptor in (0, 1, 2):
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _show(kind, error, trace, show=sys.excepthook):
    """Ctrl-C before a command can take it, while libraries are imported, is one line as well."""
    if not issubclass(kind, KeyboardInterrupt):
        return show(kind, error, trace)
    print("error: stopped by Ctrl-C", file=sys.stderr)
    raise SystemExit(130)


sys.excepthook = _show
