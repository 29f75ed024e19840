"""How much memory of the machine loading a checkpoint takes, as a multiple of its files. Linux only.

    python benchmark/loading.py --gigabytes 3
    python benchmark/loading.py --tiny

Checkpoints of that size are written to a temporary folder, in the official layout and in ours (in shards), in bfloat16
and float32, and loaded by a process each. Two peaks are printed, both less what the process held before it loaded:

- own: anonymous memory, which only this process can give back. This one is judged: ratio = peak / size of the files.
- resident: that and the pages of files that are mapped into memory, which the system drops when it needs them.
"""

from __future__ import annotations

import argparse
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from random_model import make_pipeline, small_config

from echo4o_hf.model.checkpoint import write_official
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration

GB = 1e9
LIMIT = 1.15
LAYOUTS = ("official", "ours")
CASES = (  # of the file, and asked for
    (torch.bfloat16, None),
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
)
LOAD = """
import sys
import torch
from echo4o_hf import Echo4oPipeline
import diffusers.quantizers, echo4o_hf.model.modeling_bagel  # what it needs

torch.set_num_threads(1)
print("ready", flush=True)
input()
dtype = None if sys.argv[2] == "None" else getattr(torch, sys.argv[2])
pipe = Echo4oPipeline.from_pretrained(sys.argv[1], dtype=dtype)
print("done", flush=True)
input()
"""


def memory(pid: int) -> dict[str, float]:
    """Bytes that a process holds, by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {
        name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if value.endswith("kB")
    }
    return {"own": 1024 * (kib["RssAnon"] + kib["RssShmem"]), "resident": 1024 * kib["VmRSS"]}


def peak_of_loading(folder: Path, dtype: torch.dtype | None) -> dict[str, float]:
    """Bytes of either kind that loading takes at most, looked at every two milliseconds."""
    command = [sys.executable, "-c", LOAD, str(folder), "None" if dtype is None else str(dtype).removeprefix("torch.")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the process that loads did not start")
        before = memory(process.pid)
        peaks = dict(before)
        process.stdin.write("\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.002)[0]:
            peaks = {kind: max(peaks[kind], value) for kind, value in memory(process.pid).items()}
        if process.stdout.readline() != "done\n":
            raise RuntimeError(f"{folder} did not load")
        peaks = {kind: max(peaks[kind], value) for kind, value in memory(process.pid).items()}
        process.stdin.write("\n")
        process.stdin.flush()
    return {kind: peaks[kind] - before[kind] for kind in peaks}


def config_of(num_bytes: float, dtype: torch.dtype, hidden: int) -> BagelConfig:
    """A Bagel of about so many bytes, in as many layers as that takes."""

    def sized(layers: int) -> tuple[BagelConfig, int]:
        config = small_config(hidden, layers, hidden // 64, hidden // 64, 4 * hidden, max_latent_size=16)
        with torch.device("meta"):
            model = BagelForConditionalGeneration._from_config(config, dtype=dtype)
        return config, sum(tensor.nbytes for tensor in model.state_dict().values())

    (_, one), (_, two) = sized(1), sized(2)
    return sized(max(1, 1 + round((num_bytes - one) / (two - one))))[0]


def write(folder: Path, config: BagelConfig, dtype: torch.dtype, layout: str) -> int:
    """Write a checkpoint of equal numbers; returns the bytes of its tensors."""
    pipe = make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1, dtype=dtype, init=False)
    with torch.no_grad():
        for tensor in pipe.model.state_dict().values():
            tensor.fill_(0.01)
    if layout == "official":
        write_official(pipe.components, folder)
    else:
        pipe.save_pretrained(folder, max_shard_size="1GB")
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write, load, print a table; 1 if a ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of each checkpoint (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write them (default: the system's temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs")
    arguments = parser.parse_args(argv)
    gigabytes, hidden = (0.02, 256) if arguments.tiny else (arguments.gigabytes, 1024)
    print(f"torch {torch.__version__}\n")
    print("| layout | file | asked for | GB | own, GB | ratio | resident, GB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for layout in LAYOUTS:
        for dtype in (torch.bfloat16, torch.float32):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
                folder = Path(temporary) / "checkpoint"
                size = write(folder, config_of(gigabytes * GB, dtype, hidden), dtype, layout)
                for asked in [asked for of_file, asked in CASES if of_file == dtype]:
                    peaks = peak_of_loading(folder, asked)
                    cells = [layout, str(dtype).removeprefix("torch."), str(asked).removeprefix("torch.")]
                    cells.append(f"{size / GB:.3g}")
                    for peak in peaks.values():
                        cells += [f"{peak / GB:.3g}", f"{peak / size:.2f}"]
                    print(f"| {' | '.join(cells)} |", flush=True)
                    worst = max(worst, peaks["own"] / size)
    return 0 if worst <= LIMIT or arguments.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
