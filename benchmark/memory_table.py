"""What memory a picture of the published sizes takes, computed on the meta device: a table of cards and settings.

    python benchmark/memory_table.py
    python benchmark/memory_table.py --tiny

Weights are counted one by one. Activations are those of the real code, run without data: the most that is held at once
in an update (all branches of guidance), in reading a reference, in decoding. Attention is counted as a kernel does it,
which keeps no scores. Contexts are counted as the pipeline holds them: each branch once as it was read, and once more
with places for the picture. On top of the sum comes 1 GiB for CUDA itself and for the gaps between its blocks.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from random_model import small_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.context import Branch, NoisyBlock
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packages import NOT_QUANTIZED

GIB = 2**30
CARDS = (12, 16, 24, 40, 80)  # GiB
RESERVE = 1.0  # GiB
QUANTIZED = {"bf16": 2.0, "8 bits": 1.0, "4 bits": 0.5 + 4 / 64}  # bytes a value; of nf4, a float32 for 64 values
PROMPT = 256  # tokens
TILE = 256  # pixels a side of the VAE's tiles


@dataclass(frozen=True)
class Size:
    """What is drawn, by which model."""

    config: BagelConfig
    vae_channels: tuple[int, ...]
    vae_layers: int


class Task(NamedTuple):
    """A column of the table."""

    name: str
    references: int
    images: int


TASKS = (
    Task("text-to-image", 0, 1),
    Task("4 images at once", 0, 4),
    Task("1 reference", 1, 1),
    Task("4 references", 4, 1),
)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, and the most that were held at once."""

    def __init__(self) -> None:
        """See the class."""
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what is new."""
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        return result

    def _release(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.held -= size


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak(run: Callable[[], object]) -> float:
    """GiB that a function holds at most, beside what is there already."""
    with torch.no_grad(), PeakMemory() as memory:
        run()
    return memory.peak / GIB


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: Any) -> tuple[Tensor, None]:
    """What a kernel keeps of attention: its output."""
    return torch.empty_like(q).transpose(1, 2), None


def make_model(size: Size) -> tuple[BagelForConditionalGeneration, AutoencoderKL]:
    """Model and VAE without data, in bfloat16."""
    ALL_ATTENTION_FUNCTIONS.register("counted", attend)
    with torch.device("meta"):
        model = BagelForConditionalGeneration._from_config(size.config, dtype=torch.bfloat16).eval()
        vae = AutoencoderKL(
            block_out_channels=size.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * len(size.vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(size.vae_channels),
            layers_per_block=size.vae_layers,
            norm_num_groups=min(32, size.vae_channels[0]),
            latent_channels=size.config.latent_channels,
            sample_size=TILE,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    model.config.text_config._attn_implementation = "counted"
    return model, vae.to(torch.bfloat16).eval()


def weights(model: nn.Module, precision: str) -> float:
    """GiB of the weights, the experts' linear layers in `precision`, the others and the tables in bfloat16."""
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(NOT_QUANTIZED)
    }
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    per_value = {name: QUANTIZED[precision] if name in linear else 2.0 for name in tensors}
    return sum(tensors[name].numel() * per_value[name] for name in tensors) / GIB


def largest_leaves(model: nn.Module) -> float:
    """GiB of the two largest layers: with offload by layers, one computes while the next one comes."""
    sizes = [2 * sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return sum(sorted(sizes)[-2:]) / GIB


def branch_lengths(size: Size, task: Task) -> list[int]:
    """Context tokens of each branch of guidance."""
    config = size.config
    of_reference = config.max_latent_size**2 + 2 + config.vit_max_num_patch_per_side**2 + 2
    references = task.references * of_reference
    return [references + PROMPT, references, *([PROMPT] if references else [])]


def context_gib(size: Size, tokens: int) -> float:
    """GiB of keys and values."""
    text: Any = size.config.text_config
    head = text.hidden_size // text.num_attention_heads
    return tokens * 2 * text.num_hidden_layers * text.num_key_value_heads * head * 2 / GIB


def update(model: BagelForConditionalGeneration, size: Size, task: Task) -> tuple[float, float]:
    """GiB of the activations of a guided update, and of what is kept for all updates."""
    text: Any = size.config.text_config
    heads, head = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    lengths, tokens = branch_lengths(size, task), size.config.max_latent_size**2
    rows = task.images * len(lengths)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def branch(length: int) -> Branch:
        if not length:
            return Branch(task.images, None, None)
        keys, values = (empty(task.images, heads, length + 2 + tokens, head) for _ in range(2))
        return Branch(task.images, keys, values, has_room=True)

    block = NoisyBlock(
        markers=empty(rows, 2, text.hidden_size),
        latent_positions=empty(rows, tokens, text.hidden_size),
        position_embeddings=(
            empty(rows, 2 + tokens, head, dtype=torch.float32),
            empty(rows, 2 + tokens, head, dtype=torch.float32),
        ),
        branches=[[branch(length) for length in lengths] for _ in range(text.num_hidden_layers)],
    )
    latents = empty(rows, tokens, size.config.latent_dim, dtype=torch.float32)
    timestep = empty(rows, dtype=torch.float32)
    kept = [block.markers, block.latent_positions, *block.position_embeddings, latents]
    room = sum(task.images * (length + 2 + tokens) for length in lengths if length)
    of_block = sum(x.nbytes for x in kept) / GIB + context_gib(size, room)
    return peak(lambda: model.predict_velocity(latents, timestep, block)), of_block


def decode(vae: AutoencoderKL, size: Size, tiled: bool) -> float:
    """GiB of the activations of decoding one picture; encoding takes less."""
    vae.use_tiling = tiled
    side = size.config.max_latent_size * size.config.latent_patch_size
    latents = torch.empty(1, size.config.latent_channels, side, side, dtype=torch.bfloat16, device="meta")
    return peak(lambda: vae.decode(latents))


def table(size: Size) -> list[list[str]]:
    """Rows of a setting, the GiB of its weights on the card, and the GiB of each task."""
    model, vae = make_model(size)
    of_vae = weights(vae, "bf16")
    decoding = {tiled: decode(vae, size, tiled) for tiled in (False, True)}
    drawing = {task: update(model, size, task) for task in TASKS}
    rows = []
    for precision in QUANTIZED:
        settings = {"": weights(model, precision)}
        if precision == "bf16":
            settings[", group offload"] = largest_leaves(model)
        for offload, of_model in settings.items():
            for tiled in (False, True):
                cells = [f"{precision}{offload}{', VAE in tiles' if tiled else ''}", f"{of_model + of_vae:.1f}"]
                for task in TASKS:
                    activations, block = drawing[task]
                    held = context_gib(size, sum(branch_lengths(size, task)))
                    highest = held + block + max(activations, decoding[tiled]) + RESERVE
                    cells.append(_cell(of_model + (0 if offload else of_vae) + highest))
                rows.append(cells)
    return rows


def _cell(gib: float) -> str:
    card = next((str(card) for card in CARDS if gib <= card), "none")
    return f"{gib:.1f} ({card})"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compute, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs")
    arguments = parser.parse_args(argv)
    size = Size(BagelConfig(), (128, 256, 512, 512), 2)
    if arguments.tiny:
        size = Size(small_config(64, 2, 4, 2, 96, max_latent_size=4), (8, 8, 8, 8), 1)
    print(f"| GiB (card) | weights | {' | '.join(task.name for task in TASKS)} |")
    print("|---" * (2 + len(TASKS)) + "|")
    for row in table(size):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
