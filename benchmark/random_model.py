"""Models with random weights, what they are fed, and the arithmetic they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from echo4o_hf.model.configuration_bagel import SPECIAL_TOKEN_IDS, BagelConfig
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import IGNORE, TARGET, TEXT, Segment, collate
from echo4o_hf.model.processing_bagel import SPECIAL_TOKENS, BagelProcessor
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

WORD = "word"
Products = Counter[tuple[int, int, int]]  # how often a product (rows, inner) x (inner, columns) is needed


def small_config(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    max_latent_size: int,
    max_vision_size: int = 4,
) -> BagelConfig:
    """A Bagel that is small in everything else too."""
    names = ("bos_token_id", "eos_token_id", "start_of_image_token_id", "end_of_image_token_id")
    return BagelConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": 1024,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "patch_size": 14,
            "image_size": 14 * max_vision_size,
        },
        max_latent_size=max_latent_size,
        vit_max_num_patch_per_side=max_vision_size,
        **{name: index for index, name in enumerate(names)},
    )


def make_pipeline(
    config: BagelConfig,
    vae_channels: Sequence[int],
    vae_layers: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init: bool = True,
) -> Echo4oPipeline:
    """A pipeline whose prompts are `prompt`s; its weights are made on the device, with `init` as for training."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = BagelForConditionalGeneration._from_config(config, dtype=dtype)
    model.to_empty(device=device)
    if init:
        model.apply(model._init_weights)  # fills the tables too
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=tuple(vae_channels),
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            layers_per_block=vae_layers,
            norm_num_groups=min(32, vae_channels[0]),
            latent_channels=config.latent_channels,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).type(dtype)
    processor = make_processor(config)
    pipe = Echo4oPipeline(model.eval(), vae.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_processor(config: BagelConfig) -> BagelProcessor:
    """A processor that knows one word."""
    ids = [getattr(config, name) for name in SPECIAL_TOKEN_IDS]
    vocabulary = {**dict(zip(SPECIAL_TOKENS, ids, strict=True)), WORD: 4, "[unk]": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]")
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return BagelProcessor(BagelImageProcessor.from_bagel_config(config), tokenizer)


def prompt(num_tokens: int) -> str:
    """A prompt of so many tokens, its first and last one included."""
    return " ".join([WORD] * (num_tokens - 2))


def training_pack(
    config: BagelConfig, images: int, prompt_tokens: int, side: int, answer_tokens: int = 0
) -> dict[str, torch.Tensor]:
    """Packed samples of a prompt and a target of side x side tokens, and one text of a prompt and its answer."""
    text = Segment("text", [5] * prompt_tokens)
    markers = [config.start_of_image_token_id, config.end_of_image_token_id]
    samples = [
        [text, Segment("target", markers, latents=torch.randn(side**2, config.latent_dim), grid=(side, side))]
        for _ in range(images)
    ]
    if answer_tokens:
        labels = [5] * (answer_tokens - 1) + [IGNORE]
        samples.append([text, Segment("text", [5] * answer_tokens, labels=labels)])
    return collate(samples, packed=True)


def forward_products(
    config: BagelConfig, understanding: int, generation: int, seen: Sequence[tuple[int, int]], logits: int = 0
) -> Products:
    """The matrix products that one forward pass needs.

    In each layer, the tokens of either expert pass its projections (queries, keys, values, output) and the three
    matrices of its MLP; in each head, each block of `seen` needs the scores and the weighted sum of the values. Then
    the layers to and from latents, and the head of the vocabulary. The timestep's embedding, needed once per image,
    and vision are left out.

    Args:
        config: sizes.
        understanding: tokens of the understanding expert.
        generation: tokens of the generation expert.
        seen: (queries, keys) of each block of tokens that see each other, so that what a mask hides is not counted;
            for a causal text of n tokens (n, (n + 1) / 2).
        logits: tokens whose vocabulary logits are needed.
    """
    text: Any = config.text_config
    layers, heads, hidden, inner = (
        text.num_hidden_layers,
        text.num_attention_heads,
        text.hidden_size,
        text.intermediate_size,
    )
    head = hidden // heads
    count: Products = Counter()
    for tokens in (understanding, generation):
        count[tokens, hidden, hidden] += 2 * layers
        count[tokens, hidden, text.num_key_value_heads * head] += 2 * layers
        count[tokens, hidden, inner] += 2 * layers
        count[tokens, inner, hidden] += layers
    for queries, keys in seen:
        count[queries, head, keys] += layers * heads
        count[queries, keys, head] += layers * heads
    count[generation, config.latent_dim, hidden] += 1
    count[generation, hidden, config.latent_dim] += 1
    count[logits, hidden, text.vocab_size] += 1
    return count


def backward_products(forward: Products, left: bool = True, right: bool = True) -> Products:
    """The products of the gradients by the left factors (inputs) and by the right ones (weights)."""
    count: Products = Counter()
    for (rows, inner, columns), times in forward.items():
        if left:
            count[rows, columns, inner] += times
        if right:
            count[inner, rows, columns] += times
    return count


def pack_products(
    config: BagelConfig, batch: dict[str, torch.Tensor], method: str = "full", lora_rank: int = 64
) -> Products:
    """The products that a forward and backward pass of one packed row needs, without vision.

    Each token attends to the segments of its sample before its own, targets left out, and to its own segment: all of
    it, or in texts what is not after it. Recomputation is not counted. Where not all is trained, gradients of inputs
    are counted for all tokens, although a few that nothing trained comes before could do without.

    Args:
        config: sizes.
        batch: of `collate`.
        method: "full"; "generation", whose weights alone get gradients; "lora", adapters of its layers.
        lora_rank: of the adapters.
    """
    understanding = batch["input_ids"].shape[1]
    generation = batch["segment_ids"].shape[1] - understanding
    logits = int((batch["shift_labels"] != IGNORE).sum()) if "shift_labels" in batch else 0
    of_generation = forward_products(config, 0, generation, [])
    others = forward_products(config, understanding, 0, [], logits)
    attention = forward_products(config, 0, 0, _seen(batch))
    trains = method != "lora"
    count = of_generation + others + attention
    count += backward_products(of_generation, right=trains) + backward_products(others, right=method == "full")
    count += backward_products(attention)
    if method == "lora":
        text: Any = config.text_config
        hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        values = text.num_key_value_heads * hidden // text.num_attention_heads
        adapters: Products = Counter()
        linear = {(hidden, hidden): 2, (hidden, values): 2, (hidden, inner): 2, (inner, hidden): 1}
        for (width_in, width_out), times in linear.items():
            adapters[generation, width_in, lora_rank] += times * layers
            adapters[generation, lora_rank, width_out] += times * layers
        count += adapters + backward_products(adapters)
    return Counter({shape: times for shape, times in count.items() if 0 not in shape})


def _seen(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(queries, keys) of each segment of a packed row."""
    before: Counter[int] = Counter()  # tokens of each sample that later segments see
    seen = []
    structure = torch.stack([batch[name][0] for name in ("segment_ids", "roles", "sample_ids")], dim=1)
    segments, lengths = structure[structure[:, 0] >= 0].unique(dim=0, return_counts=True)  # in the order of their ids
    for (_, role, sample), length in zip(segments.tolist(), lengths.tolist(), strict=True):
        seen.append((length, before[sample] + ((length + 1) // 2 if role == TEXT else length)))
        before[sample] += length if role != TARGET else 0
    return seen


def flops(products: Products) -> int:
    """A multiplication and an addition are two."""
    return sum(2 * rows * inner * columns * times for (rows, inner, columns), times in products.items())
