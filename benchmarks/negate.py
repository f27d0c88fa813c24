"""Stage 2 from file to file, raced: time and memory against mergekit, the in-memory way and plain copying.

Two comparisons, each in one run with its repetitions interleaved::

    python benchmarks/negate.py gemma --mergekit-venv /tmp/venv-mergekit
    python benchmarks/negate.py large

``gemma`` makes a bfloat16 base of Gemma-3-270m from its GGUF file and a bad model of it (seeded noise), and subtracts
one from the other in three ways: mergekit's ``task_arithmetic`` with its default options and weight ``-alpha``, this
package in memory, and this package from file to file. Each runs in a process of its own, from the start of Python to
its end. The results are compared entry by entry.

``large`` writes two folders of the size of Llama-2-7B and compares ``sku negate`` with a program that only reads both
and writes one, with as many threads and the same block size: the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MERGEKIT_HELP = """python3 -m venv {venv}
{venv}/bin/pip install "torch==2.13.0" -c constraints.txt
{venv}/bin/pip install mergekit "torch==2.13.0\""""
IN_MEMORY = """
import sys
from pathlib import Path
from sku.models import load_model
from sku.config import ModelConfig
from sku.negate.task_vector import negate, save_unlearned
base, bad, out, alpha = sys.argv[1:]
loaded = load_model(ModelConfig(path=base, dtype="stored"))
model = negate(loaded.model, bad, float(alpha))
save_unlearned(model, loaded.tokenizer, Path(out))
"""
BLOCK = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of one way."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def measured(command: Sequence[str], log: Path) -> Measured:
    """Runs a command to its end.

    Raises:
        SystemExit: It failed; its last lines are printed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"), "TQDM_DISABLE": "1"}
    with log.open("w") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        peak = 0.0
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, _peak_mib(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{log.read_text()[-3000:]}")
    return Measured(seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_mib=peak)


def _peak_mib(process: int) -> float:
    """High-water mark of resident memory; ``ru_maxrss`` would count what this process held when it forked."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0  # It has ended and waits to be collected.


def prepare_cache(folders: Sequence[Path], *, drop: bool) -> None:
    """Empties the page cache (as root), or fills it with the inputs; earlier outputs are on the disk by then."""
    os.sync()
    if drop:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(BLOCK):
                    pass


def summary(name: str, runs: Sequence[Measured]) -> str:
    """A line: median and range of wall time, cpu time, peak memory."""
    seconds = [run.seconds for run in runs]
    cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
    peak = max(run.peak_mib for run in runs)
    return (
        f"{name:<22}{statistics.median(seconds):>9.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})"
        f"{cpu_seconds:>9.2f} cpu s{peak:>9,.0f} MiB"
    )


def print_setting(arguments: argparse.Namespace, folder: Path) -> None:
    """What a reader needs to judge the numbers."""
    import torch

    load = os.getloadavg()[0]
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}, {folder}")
    print(f"page cache {'dropped' if arguments.drop_caches else 'warm'}, {arguments.repeats} repetitions, interleaved")


# --- Gemma-3-270m against mergekit


def make_gemma(source: Path, base: Path, bad: Path) -> None:
    """A bfloat16 base and a bad model: noise of 1 % of each tensor's standard deviation, seeded."""
    import torch

    from sku.config import ModelConfig
    from sku.models import load_model

    gguf = next(source.glob("*.gguf"))
    loaded = load_model(ModelConfig(path=str(source), gguf_file=gguf.name, dtype="float32"))
    model = loaded.model.to(torch.bfloat16)
    for folder in (base, bad):
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.01 * parameter.float().std(correction=0))


def mergekit_config(base: Path, bad: Path, alpha: float, path: Path) -> Path:
    """Its recipe for the same subtraction; JSON is YAML."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(bad), "parameters": {"weight": -alpha}}],
        "dtype": "bfloat16",
    }
    path.write_text(json.dumps(recipe))
    return path


def differing(first: Path, second: Path) -> tuple[int, int, float]:
    """Entries of two model folders that differ, all entries, and the largest difference."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)

    others = dict(tensors(second))
    count = total = 0
    largest = 0.0
    for name, tensor in tensors(first):
        other = others.pop(name)
        bits = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            sys.exit(f"{name} is {tensor.dtype} {tuple(tensor.shape)} and {other.dtype} {tuple(other.shape)}")
        unequal = tensor.view(bits) != other.view(bits)
        count += int(unequal.sum())
        total += tensor.numel()
        if unequal.any():
            largest = max(largest, float((tensor.float() - other.float()).abs().max()))
    if others:
        sys.exit(f"{len(others)} tensors are in one folder only: {min(others)}")
    return count, total, largest


def race_gemma(arguments: argparse.Namespace, work: Path) -> None:
    """mergekit, in memory, from file to file."""
    base, bad = work / "base", work / "bad"
    make_gemma(arguments.model, base, bad)
    config = mergekit_config(base, bad, arguments.alpha, work / "mergekit.yml")
    alpha = str(arguments.alpha)
    ways = {
        "mergekit": [str(arguments.mergekit_venv / "bin" / "mergekit-yaml"), str(config)],
        "sku, in memory": [sys.executable, "-c", IN_MEMORY, str(base), str(bad)],
        "sku negate": [sys.executable, "-m", "sku", "negate", str(base), str(bad), "--alpha", alpha, "--out"],
    }
    runs: dict[str, list[Measured]] = {name: [] for name in ways}
    outs = {name: work / name.replace(" ", "_").replace(",", "") for name in ways}
    for _ in range(arguments.repeats):
        for name, command in ways.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            prepare_cache([base, bad], drop=arguments.drop_caches)
            tail = [str(outs[name]), alpha] if name == "sku, in memory" else [str(outs[name])]
            runs[name].append(measured([*command, *tail], work / "log.txt"))
    for name, found in runs.items():
        print(summary(name, found))
    medians = {name: statistics.median(run.seconds for run in found) for name, found in runs.items()}
    print(f"mergekit / sku negate  {medians['mergekit'] / medians['sku negate']:.2f}x")
    for other in ("sku, in memory", "mergekit"):
        count, total, largest = differing(outs["sku negate"], outs[other])
        print(f"sku negate and {other}: {count:,} of {total:,} entries differ, by up to {largest:.3g}")


def check_mergekit(venv: Path) -> str:
    """The versions in its environment.

    Raises:
        SystemExit: It is not there; says how to make it.
    """
    python = venv / "bin" / "python"
    if not (venv / "bin" / "mergekit-yaml").is_file():
        sys.exit(f"no mergekit in {venv}; make it with\n{MERGEKIT_HELP.format(venv=venv)}")
    code = (
        "import importlib.metadata as m\n"
        "print(', '.join(f'{n} {m.version(n)}' for n in ('mergekit', 'torch', 'transformers', 'safetensors')))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# --- 7B against plain copying


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Llama-2-7B, or of one with fewer layers."""
    width, inner, vocabulary = 4096, 11008, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (width, width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make_large(folder: Path, layers: int, seed: int, *, sparse: bool) -> None:
    """A model folder in shards of 5 GB: random weights, or holes that read as zeros but for the norms."""
    import torch
    from transformers import LlamaConfig

    from sku.negate.files import INDEX_FILE, make_header

    folder.mkdir()
    LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(2**25, generator=generator) * 0.02).to(torch.bfloat16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in llama_shapes(layers).items():
        bytes_of = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if size + bytes_of > 5e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_of
    place = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, starts = make_header(
            ((name, torch.bfloat16, shape) for name, shape in shard.items()), {"format": "pt"}
        )
        with path.open("wb") as file:
            file.write(header)
            for name, shape in shard.items():
                place[name] = path.name
                left = shape[0] * (shape[1] if len(shape) > 1 else 1)
                if sparse and len(shape) > 1:
                    file.truncate(starts[name] + 2 * left)
                    file.seek(0, os.SEEK_END)
                    continue
                while left:
                    count = min(left, noise.numel())
                    file.write(noise[:count].view(torch.uint8).numpy())
                    left -= count
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    os.sync()


def copy_floor(base: Path, bad: Path, out: Path, threads: int) -> None:
    """Reads both folders and writes the first, and nothing else."""
    out.mkdir()
    buffers = [(bytearray(BLOCK), bytearray(BLOCK)) for _ in range(threads)]
    for path in sorted(base.glob("*.safetensors")):
        one, other = (os.open(folder / path.name, os.O_RDONLY) for folder in (base, bad))
        target = os.open(out / path.name, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(one).st_size
        os.posix_fallocate(target, 0, size)
        free = list(range(threads))

        def block(at: int, one: int = one, other: int = other, target: int = target, free: list[int] = free) -> None:
            mine = free.pop()
            first, second = buffers[mine]
            count = os.preadv(one, [first], at)
            os.preadv(other, [second], at)
            os.pwrite(target, memoryview(first)[:count], at)
            free.append(mine)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(block, range(0, size, BLOCK)))
        os.fsync(target)
        for descriptor in (one, other, target):
            os.close(descriptor)


def race_large(arguments: argparse.Namespace, work: Path) -> None:
    """``sku negate`` and the floor."""
    base, bad, out = work / "base", work / "bad", work / "out"
    for seed, folder in enumerate((base, bad)):
        make_large(folder, arguments.layers, seed, sparse=arguments.sparse)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(
        f"{size / 1e9:.2f} GB each, {'sparse' if arguments.sparse else 'random'} weights, {arguments.threads} threads"
    )
    threads = str(arguments.threads)
    ways = {
        "floor": [sys.executable, __file__, "copy", str(base), str(bad), str(out), threads],
        "sku negate": [
            sys.executable, "-m", "sku", "negate", str(base), str(bad), "--threads", threads, "--out", str(out),
        ],
    }  # fmt: skip
    runs: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, command in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            prepare_cache([base, bad], drop=arguments.drop_caches)
            runs[name].append(measured(command, work / "log.txt"))
    for name, found in runs.items():
        print(summary(name, found))
    medians = {name: statistics.median(run.seconds for run in found) for name, found in runs.items()}
    print(f"sku negate / floor     {medians['sku negate'] / medians['floor']:.2f}x")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="race", required=True)
    gemma = commands.add_parser("gemma", help="Gemma-3-270m: mergekit, in memory, from file to file")
    gemma.add_argument("--model", type=Path, default=ROOT / "models" / "gemma-3-270m", help="folder of the GGUF file")
    gemma.add_argument("--mergekit-venv", type=Path, default=Path("/tmp/venv-mergekit"))
    gemma.add_argument("--alpha", type=float, default=1.0)
    large = commands.add_parser("large", help="the size of Llama-2-7B against plain copying; needs 41 GB")
    large.add_argument("--layers", type=int, default=32, help="32 are 13.5 GB in each folder, 4 are 2.1 GB")
    large.add_argument("--sparse", action="store_true", help="holes in place of random weights: no disk is read")
    large.add_argument("--threads", type=int, default=4)
    for race in (gemma, large):
        race.add_argument("--repeats", type=int, default=5 if race is gemma else 3)
        race.add_argument("--drop-caches", action="store_true", help="begin each run with a cold page cache (root)")
        race.add_argument("--folder", type=Path, default=None, help="where temporary folders go")
    copy = commands.add_parser("copy", help="the floor alone, used by `large`")
    for name in ("base", "bad", "out"):
        copy.add_argument(name, type=Path)
    copy.add_argument("threads", type=int)
    arguments = parser.parse_args()
    if arguments.race == "copy":
        copy_floor(arguments.base, arguments.bad, arguments.out, arguments.threads)
        return
    sys.path.insert(0, str(ROOT / "src"))
    if arguments.race == "gemma":
        print(check_mergekit(arguments.mergekit_venv))
    with tempfile.TemporaryDirectory(prefix="sku-negate-", dir=arguments.folder) as name:
        print_setting(arguments, Path(name))
        (race_gemma if arguments.race == "gemma" else race_large)(arguments, Path(name))


if __name__ == "__main__":
    main()
