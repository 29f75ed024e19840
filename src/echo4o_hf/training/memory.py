"""How many parameters a run trains, and about how much memory it takes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from transformers import Qwen2Config
from transformers.training_args import OptimizerNames

from ..model.modeling_bagel import BagelForConditionalGeneration
from .optimizers import layer_matrices

if TYPE_CHECKING:
    from peft import PeftModel

    from .arguments import Echo4oTrainingArguments

GIB = 2**30

# nf4 keeps half a byte a value, a byte for 64 values and a float32 for 256 such bytes; int8 a byte a value.
QUANTIZED_BYTES = {"Params4bit": 1 / 2 + 1 / 64 + 4 / (64 * 256), "Int8Params": 1.0}

# Of TrainingArguments.optim: states a trained value, and bytes of each (None: as the weight has).
STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_torch_8bit": (2, 1),
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "paged_adamw_8bit": (2, 1),
    "paged_adamw_32bit": (2, 4),
    "lion_8bit": (1, 1),
    "lion_32bit": (1, 4),
    "sgd": (0, None),
}


class Line(NamedTuple):
    """One line of the estimate."""

    name: str
    num_bytes: float
    formula: str


def describe(
    model: BagelForConditionalGeneration | PeftModel, arguments: Echo4oTrainingArguments, max_tokens: int
) -> str:
    """Parameters of each part, and an estimate of the memory of one process that shards nothing.

    Not counted: the VAE, the vision encoder's activations, the framework. `memory_lines` has the formulas.

    Args:
        model: as `prepare_model` returns it.
        arguments: `Echo4oTrainingArguments`.
        max_tokens: of a pack.
    """
    every, trained = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        every[_part(name)] += _count(parameter)
        trained[_part(name)] += _count(parameter) if parameter.requires_grad else 0
    rows = [(part, every[part], trained[part]) for part in every]
    rows.append((f"trained: {trained.total() / every.total():.1%}", every.total(), trained.total()))
    lines = [f"{'parameters (millions)':24} {'all':>10} {'trained':>10}"]
    lines += [f"  {part:22} {count / 1e6:>10,.1f} {of_these / 1e6:>10,.1f}" for part, count, of_these in rows]
    estimate = memory_lines(model, arguments, max_tokens)
    lines.append("memory of one process, estimated, nothing sharded (GiB)")
    lines += [f"  {line.name:12} {line.num_bytes / GIB:>8.2f}  {line.formula}" for line in estimate]
    lines.append(f"  {'sum':12} {sum(line.num_bytes for line in estimate) / GIB:>8.2f}")
    return "\n".join(lines)


def memory_lines(model: nn.Module, arguments: Echo4oTrainingArguments, max_tokens: int) -> list[Line]:
    """The estimate, line by line, each with its formula.

    The formula of activations was fitted to the tensors that autograd saves in a layer; it holds within a fifth for
    all methods. An optimizer whose states are not known is said to be left out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lines = [
        Line("weights", sum(map(_num_bytes, model.parameters())), "in their dtypes"),
        Line("gradients", sum(map(_num_bytes, trained)), "as large as the trained weights"),
        *_optimizer_lines(model, trained, arguments),
    ]
    if arguments.ema_decay is not None:
        num_values = sum(map(_count, trained))
        lines.append(Line("average", 4.0 * num_values, "4 bytes a trained value"))
    if arguments.bf16:
        cast_values = sum(_count(parameter) for parameter in trained if parameter.dtype == torch.float32)
        lines.append(Line("autocast", 2.0 * cast_values, "2 bytes a trained value in float32, while it is used"))
    return [*lines, *_activation_lines(cast(Qwen2Config, cast(Any, model).config.text_config), arguments, max_tokens)]


def _optimizer_lines(model: nn.Module, trained: list[nn.Parameter], arguments: Echo4oTrainingArguments) -> list[Line]:
    lines = []
    if arguments.muon:
        matrices = layer_matrices(model)
        lines.append(Line("muon", sum(map(_num_bytes, matrices)), "1 state of the layers' matrices, in their dtypes"))
        chosen = {id(matrix) for matrix in matrices}
        trained = [parameter for parameter in trained if id(parameter) not in chosen]
    optim = OptimizerNames(arguments.optim).value
    if optim not in STATES:
        return [*lines, Line("optimizer", 0.0, f"not known for {optim}: left out")]
    states, size = STATES[optim]
    num_bytes = sum(_num_bytes(parameter) if size is None else size * _count(parameter) for parameter in trained)
    each = "in the weights' dtypes" if size is None else f"of {size} bytes a value"
    return [*lines, Line("optimizer", states * num_bytes, f"{optim}: {states} states {each}")]


def _activation_lines(config: Qwen2Config, arguments: Echo4oTrainingArguments, max_tokens: int) -> list[Line]:
    size = 2 if arguments.bf16 else 4
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    a_layer = max_tokens * (4 * size * inner + 32 * hidden)
    formula = f"{max_tokens:,} tokens * ({4 * size} * intermediate size + 32 * hidden size)"
    if arguments.activation_checkpointing:
        num_bytes = layers * max_tokens * size * hidden + a_layer
        formula = f"{max_tokens:,} tokens * {size} * hidden size * layers, and of one layer {formula}"
    else:
        num_bytes = layers * a_layer
        formula += " * layers"
    answers = config.vocab_size * (size + 8) / 1e6
    return [Line("activations", num_bytes, f"{formula}; and {answers:.2g} MB for each token of answers")]


def _part(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    if ".lora_" in name:
        return "adapters"
    if name.startswith(("vit_model.", "connector.")):
        return "vision encoder"
    if not name.startswith("language_model."):
        return "latent heads"
    if "_moe_gen" in name:
        return "generation expert"
    return "embedding, text head" if "embed_tokens" in name or "lm_head" in name else "understanding expert"


def _count(parameter: nn.Parameter) -> int:
    """Values, also where several are packed into one byte, or where DeepSpeed ZeRO-3 has taken them apart."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes; None until the weight is loaded
    whole: int = getattr(parameter, "ds_numel", parameter.numel())
    return whole if state is None else state.shape.numel()


def _num_bytes(parameter: nn.Parameter) -> float:
    return _count(parameter) * QUANTIZED_BYTES.get(type(parameter).__name__, parameter.itemsize)
