"""What a step costs on one GPU, beside what the machine could do: models of 1B shapes.

    python benchmarks/gpu.py                                  # no part begins after seven minutes
    python benchmarks/gpu.py --device cpu --shape small       # all of it on a toy, to see that it runs

Weights are random (speed does not need trained ones), the prompts those of the embedded task, and
no token ends a completion: all are --max-completion-length long. Flags not listed here go to
train.py. The machine's limits first:

    matmul     2 n^3 / seconds of a product of two random n x n matrices in the dtype of training
    bandwidth  bytes read and written / seconds of a copy of a block much larger than the caches

then, in one run, medians of --rounds after one that warms up:

    decode share    (bytes of all weights that a token needs, once, + bytes of its rows' keys and values at their mean
                    length, in the dtype of the products) / bandwidth / seconds of a token, prefill included
    of it _draw     milliseconds of drawing one token of all rows from their logits, alone
    training share  FLOP of `update` / its seconds / matmul. Counted: 6 per weight and token (head: completion tokens
                    only), and 12 · heads · head_dim · length of what is attended to, per token and layer. Not counted:
                    what is computed twice, as logits, and with --gradient-checkpointing activations, are
    evaluation, checkpoint    seconds of one of each, as train.py does them

Micro-batches are what memory.fit chooses for the machine; its line is a cell. A part that fails says why in its
cell, and the rest goes on; gpu.json in --output-dir is written anew after each part.
"""

import argparse
import contextlib
import copy
import gc
import json
import platform
import re
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig  # noqa: E402

import train  # noqa: E402
from benchmarks import step  # noqa: E402
from grpo import group_advantages  # noqa: E402
from support import checkpoint, memory, sampling, tiny  # noqa: E402
from support.attention import use_attention  # noqa: E402
from support.data import make_template  # noqa: E402
from support.model import add_lora, frozen_copy  # noqa: E402
from support.prompts import encode_prompts  # noqa: E402
from support.run import settle  # noqa: E402
from support.sampling import uniform_numbers  # noqa: E402

SHAPES = {
    "gemma-3-1b": Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "small": LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}
WORK = {False: "--num-questions 4 --num-principles 4 --num-generations 8 --max-completion-length 256 "
               "--eval-questions 32",
        True: "--num-questions 2 --num-principles 2 --num-generations 2 --max-completion-length 8 --eval-questions 2"}
TRL_SETTINGS = {"TRL, defaults": {}, "TRL, best without a server": {
    "gradient_checkpointing": False, "cache_implementation": "static", "optim": "adamw_torch_fused"}}


def three(number: float) -> float:
    """To three digits."""
    return float(f"{number:.3g}")


class Bench:
    """A model of one shape, and what is measured of it."""

    def __init__(self, shape, device, flags, rounds, limits):
        self.flags, self.device, self.rounds, self.limits = flags, device, rounds, limits
        torch.manual_seed(0)
        self.start = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32).eval()  # on the CPU
        self.tokenizer = tiny.make_tokenizer()
        self.config = self.configured()
        self.prompts = encode_prompts(self.tokenizer, step.conversations(self.config, 1))  # Q·K lists of token ids
        self.rows = len(self.prompts) * self.config.num_generations

    def configured(self, *flags) -> train.Config:
        config = train.parse(["--principles", "-", *self.flags, *flags])
        settle(config, types.SimpleNamespace(device=self.device, parameters=self.start.parameters), self.tokenizer)
        return config

    def state(self, config):
        """(policy, reference or None with LoRA, optimiser, the line of memory.fit), made as train.train makes them."""
        model = copy.deepcopy(self.start).to(self.device)
        use_attention(model)
        if config.lora_rank:
            model = add_lora(model, config.lora_rank, config.seed, config.bf16)
        longest = sorted(self.prompts, key=len)[-2:]
        data = types.SimpleNamespace(principles=True, pairs=None, longest_prompts=longest)
        config.gradient_checkpointing, config.micro_batch, line = memory.fit(model, data, config)
        print(line, file=sys.stderr, flush=True)
        reference = None if config.lora_rank else frozen_copy(model, config.bf16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        return model, reference, optimizer, line

    def sample(self, model, config, number):
        names = [f"{number} {n}" for n in range(len(self.prompts))]
        shape = config.num_generations, config.max_completion_length
        uniform = uniform_numbers(names, *shape, device=self.device)  # [Q·K, G, T]
        return sampling.sample(model, self.prompts, uniform, config.temperature, [], 0, config.bf16)

    def batch(self, out, config):
        """(train.Batch, train.Rewards) of completions: every other one rewarded, all of each its CoT."""
        shape = config.num_questions, config.num_principles, config.num_generations
        tokens, mask = out.tokens.reshape(*shape, -1), out.mask.reshape(*shape, -1)  # [Q, K, G, T] both
        values = (torch.arange(self.rows, device=self.device) % 2).float().reshape(shape)  # [Q, K, G]
        batch = train.Batch(
            tasks=[train.Task(None, [], f"{q}") for q in range(shape[0])], texts=[None] * shape[0],
            prompts=[self.prompts[q * shape[1] : (q + 1) * shape[1]] for q in range(shape[0])],
            tokens=tokens, mask=mask, cot=mask,
            truncated=out.truncated.reshape(shape), entropy=out.entropy.reshape(shape),
        )
        return batch, train.Rewards(values, values, group_advantages(values))

    def step(self, model, reference, optimizer, config, number) -> dict:
        """Seconds of each phase of a step."""
        clock = [step.now()]
        out = self.sample(model, config, number)
        clock.append(step.now())
        return step.finish_step(model, reference, optimizer, *self.batch(out, config), config, clock)

    def draw_seconds(self) -> float:
        """Seconds of drawing one token of all rows: the median of ten."""
        logits = torch.randn(self.rows, self.start.config.vocab_size, device=self.device)  # [R, V]
        uniform, times = torch.rand(self.rows, dtype=torch.float64).to(self.device), []  # [R]
        for _ in range(11):
            clock = step.now()
            sampling._draw(logits, uniform)
            times.append(step.now() - clock)
        return statistics.median(times[1:])

    def measure_step(self, *flags) -> dict:
        """Cells of a step of train.py with these flags besides."""
        config = self.configured(*flags)
        *state, line = self.state(config)
        rounds = [self.step(*state, config, number) for number in range(self.rounds + 1)][1:]
        median = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        cells = {"memory": line.removeprefix("memory: ")}
        cells |= {f"{key}, s": three(median[key]) for key in (*step.PHASES, "total")}
        token = median["sample"] / config.max_completion_length
        cells |= {"a token, ms": three(1e3 * token), "of it _draw, ms": three(1e3 * self.draw_seconds())}
        cells["decode tokens/s"] = round(self.rows / token)
        cells["decode share"] = three(self.decode_bytes(config) / token / self.limits["bandwidth"])
        flop = self.training_flop(config)
        cells["training TFLOP/s"] = three(flop / median["update"] / 1e12)
        cells["training share"] = three(flop / median["update"] / self.limits["matmul"])
        if self.device.type == "cuda":
            cells["peak GB"] = three(torch.cuda.max_memory_allocated() / 1e9)
        return cells

    def measure_around(self) -> dict:
        """Cells of an evaluation, and of writing a checkpoint."""
        config = self.configured()
        model, reference, optimizer, _ = self.state(config)
        self.step(model, reference, optimizer, config, 0)  # AdamW has moments from now on
        held_out = tiny.make_questions(config.eval_questions, held_out=True)
        data = types.SimpleNamespace(
            principles=tiny.principles(), held_out=held_out, template=make_template(config))
        clock = [step.now()]
        train.evaluate(model, reference, self.tokenizer, data, config)
        clock.append(step.now())
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text("{}")
            path = checkpoint.save(Path(folder), dict(model.named_parameters()), optimizer, {"step": 1})
            clock.append(step.now())
            size = path.stat().st_size
        evaluated, written = (b - a for a, b in zip(clock, clock[1:]))
        return {f"evaluation of {config.eval_questions} questions, s": three(evaluated),
                "checkpoint, s": three(written), "checkpoint, GB": three(size / 1e9)}

    def measure_trl(self, settings) -> dict:
        """TRL's step and, in turn with it, our GRPO step."""
        import trl  # noqa: F401  absent: said before a model is made

        config = self.configured(*step.VARIANTS["GRPO"])
        *state, _ = self.state(config)
        ours = {"GRPO": lambda number: self.step(*state, config, number)}
        settings = {  # a quarter of the rows in a pass: the logits of all take more memory than the model
            "per_device_train_batch_size": self.rows // 4, "gradient_accumulation_steps": 4,
            "generation_kwargs": {"min_new_tokens": self.config.max_completion_length},
            **settings, **({} if self.device.type == "cuda" else step.ON_CPU),
        }
        model = copy.deepcopy(self.start).to(self.device)
        rounds = step.rounds_beside_trl(ours, settings, self.config, model, self.tokenizer, self.rounds)
        table = step.summarise(rounds, "TRL")
        cells = {f"{key}, s": three(table["TRL"][key]) for key in ("sample", "update", "total")}
        return cells | {f"ours, {name}: times TRL": three(table[name]["ratio"]) for name in ours}

    def decode_bytes(self, config) -> float:
        """Bytes that one token of all rows must read: see the top of this file."""
        shape, size = self.start.config, 2 if config.bf16 else 4
        length = self.prompt_length() + config.max_completion_length / 2
        states = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim  # numbers of one position
        return size * (sum(p.numel() for p in self.start.parameters()) + self.rows * length * states)

    def training_flop(self, config) -> float:
        """Floating-point operations of `update` that are counted: see the top of this file."""
        shape, prompt, new = self.start.config, self.prompt_length(), config.max_completion_length
        head = shape.vocab_size * shape.hidden_size
        body = sum(p.numel() for p in self.start.parameters()) - head  # both shapes tie head and embedding
        completions = config.num_questions * config.rows_per_question * new
        prompts = len(self.prompts) * prompt
        attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
        attended = completions * (prompt + new / 2) + prompts * prompt / 2
        return 6 * body * (completions + prompts) + 6 * head * completions + attention * attended

    def prompt_length(self) -> float:
        return statistics.mean(map(len, self.prompts))


PARTS = {  # what has not run on a GPU yet comes late: after an error there nothing else may run
    "GRPO": lambda bench: bench.measure_step(*step.VARIANTS["GRPO"]),
    "ENIGMA": lambda bench: bench.measure_step(),
    "around": lambda bench: bench.measure_around(),
    "ENIGMA --gradient-checkpointing": lambda bench: bench.measure_step("--gradient-checkpointing", "True"),
    "ENIGMA --lora-rank 16 --gradient-checkpointing":
        lambda bench: bench.measure_step("--lora-rank", "16", "--gradient-checkpointing", "True"),
} | {name: lambda bench, settings=settings: bench.measure_trl(settings) for name, settings in TRL_SETTINGS.items()}


def machine_limits(device, small: bool) -> dict:
    """FLOP/s of a product and bytes/s of a copy: the best of ten, since these are ceilings."""
    side = 512 if small else 8192
    matrix = torch.randn(side, side, device=device)  # [n, n]
    matrix = matrix.bfloat16() if device.type == "cuda" else matrix
    block = torch.zeros(2**24 if small else 2**30, device=device)  # 4 GB in float32, or 64 MB
    other = torch.empty_like(block)

    def seconds(function):
        times = []
        for _ in range(11):
            clock = step.now()
            function()
            times.append(step.now() - clock)
        return min(times[1:])

    return {"matmul": 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix),
            "bandwidth": 2 * block.nbytes / seconds(lambda: other.copy_(block))}


def cpu_name() -> str:
    """What Linux calls the processor; elsewhere its architecture."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.machine()


def measured(function, *arguments) -> dict:
    """The cells that the function returns, or one that says why there are none."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return function(*arguments)
    except ImportError as error:
        return {"": f"not measured: {error.name} is not installed"}
    except Exception as error:  # whatever it is, the other parts can still be measured
        reason = (str(error).strip() or "no message").splitlines()[0][:120]
        return {"": f"failed: {type(error).__name__}: {reason}"}


def print_table(results) -> None:
    shapes = list(results["shapes"])
    print("\n| | " + " | ".join(shapes) + " |\n" + "|---" * (1 + len(shapes)) + "|")
    for part in PARTS:
        columns = [results["shapes"][shape][part] for shape in shapes]
        for label in dict.fromkeys(label for cells in columns for label in cells):
            shown = (str(cells.get(label, "")) for cells in columns)
            print(f"| {part}{': ' * bool(label)}{label} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated; default: the 1B ones")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=7, help="after these no further part is begun")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is to be seen; --device cpu --shape small shows that the script runs")
    end, device = time.perf_counter() + 60 * args.minutes, torch.device(args.device)
    transformers.utils.logging.set_verbosity_error()
    shapes = args.shape or ["gemma-3-1b", "llama-3.2-1b"]
    limits = machine_limits(device, shapes == ["small"])
    name = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    name += cpu_name()  # which launches every kernel: decoding waits for it
    results = {"machine": name, "torch": torch.__version__, "transformers": transformers.__version__, **limits,
               "shapes": {}}
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: matmul "
          f"{limits['matmul'] / 1e12:.2f} TFLOP/s, copy {limits['bandwidth'] / 1e9:.0f} GB/s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    benches = {s: Bench(s, device, [*WORK[s == "small"].split(), *extra], args.rounds, limits) for s in shapes}
    for part, measure in PARTS.items():
        for shape, bench in benches.items():
            over = time.perf_counter() > end
            cells = {"": "left out: no time"} if over else measured(measure, bench)
            print(f"{part}, {shape}: {cells}", file=sys.stderr, flush=True)
            results["shapes"].setdefault(shape, {})[part] = cells
            (args.output_dir / "gpu.json").write_text(json.dumps(results, indent=1))
    print_table(results)


if __name__ == "__main__":
    main()
