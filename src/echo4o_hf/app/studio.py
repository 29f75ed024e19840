"""What the app does with the model: draw, answer, stop; one call at a time, whoever asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Event, Lock
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from ..model.checkpoint import ADAPTER_CONFIG
from ..model.context import Context
from ..pipeline.pipeline_echo4o import Echo4oPipeline, Echo4oPipelineOutput
from ..pipeline.records import JSON_TEXTS, save_png
from ..pipeline.samples import read_arguments, read_picture
from ..pipeline.source import Source

ADAPTER = "app"  # what the pipeline calls the adapter that was chosen
NO_ADAPTER = "none"


@dataclass(frozen=True)
class Drawing:
    """What to draw.

    Attributes:
        prompt: the text.
        references: files of pictures that come before it.
        seeds: of the noise, one per image.
        arguments: others of the pipeline's call.
        adapter: folder; None is none.
        adapter_weight: how much of it is added.
    """

    prompt: str
    references: Sequence[Path]
    seeds: Sequence[int]
    arguments: Mapping[str, Any]
    adapter: str | None = None
    adapter_weight: float = 1.0


@dataclass(frozen=True)
class Question:
    """What to answer.

    Attributes:
        conversation: texts, and files of pictures, in their order; questions and answers alternate.
        max_new_tokens: length of the answer at most.
        temperature: 0 takes the likeliest token each time.
        adapter: folder; None is none.
        adapter_weight: how much of it is added.
    """

    conversation: Sequence[str | Path]
    max_new_tokens: int
    temperature: float = 0.0
    adapter: str | None = None
    adapter_weight: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """What came of it: files, none after a stop; the plan, with thinking; and how many updates were made."""

    paths: list[Path]
    plan: str
    num_updates: int


class Studio:
    """A loaded model, and the folder that its pictures go to.

    Args:
        source: of the pipeline, without adapters.
        output: folder of the pictures; made if it does not exist.
        adapters: by the names to choose from, see `find_adapters`.

    Raises:
        OSError: the checkpoint cannot be read, or the folder not be made.
        ValueError: a checkpoint whose files do not fit each other.
    """

    def __init__(self, source: Source, output: Path, adapters: Mapping[str, str]) -> None:
        """See the class."""
        output.mkdir(parents=True, exist_ok=True)
        self.source = source
        self.output = output
        self.adapters = adapters
        self.pipeline: Echo4oPipeline = source.load(Echo4oPipeline)
        self._adapter: str | None = None  # the one that is loaded
        self._lock = Lock()
        self._stopping = Lock()  # for `_drawing`, so that no stop reaches the next drawing
        self._drawing: Event | None = None  # what stops the drawing that runs

    @property
    def num_positions(self) -> int:
        """Of texts and images together, at most."""
        config = self.pipeline.model.config.text_config
        return config.max_position_embeddings  # type: ignore[union-attr]

    def find_adapter(self, name: str | None) -> str | None:
        """Folder of an adapter, of those to choose from.

        Raises:
            ValueError: there is none of this name.
        """
        if name is None or name == NO_ADAPTER:
            return None
        if name not in self.adapters:
            raise ValueError(
                f"there is no adapter {name!r:.80}: choose one of {', '.join([NO_ADAPTER, *self.adapters])}"
            )
        return self.adapters[name]

    def draw(self, drawing: Drawing, stop: Event, on_update: Callable[[int], None]) -> Drawn:
        """Draw, and save each image as a PNG that holds its settings.

        Args:
            drawing: what to draw.
            stop: when set, the call ends after the update that runs, without images.
            on_update: called with the number of updates made.

        Raises:
            OSError: a reference, the adapter or the folder of pictures cannot be read or written.
            ValueError: what the pipeline refuses.
            ImportError: an adapter without peft.
        """
        num_updates = 0

        def after_update(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal num_updates
            num_updates = step + 1
            on_update(num_updates)
            pipeline._interrupt = stop.is_set()
            return {}

        with self._lock:
            if stop.is_set():
                return Drawn([], "", 0)
            self._use_adapter(drawing.adapter, drawing.adapter_weight)
            references = [read_upload(path) for path in drawing.references]
            with self._during(stop):
                result = self.pipeline(
                    drawing.prompt,
                    image=references,
                    num_images_per_prompt=len(drawing.seeds),
                    generator=[torch.Generator().manual_seed(seed) for seed in drawing.seeds],
                    callback_on_step_end=after_update,
                    **drawing.arguments,
                )
            num_steps = len(self.pipeline.scheduler.timesteps)
        output = cast(Echo4oPipelineOutput, result)
        plan = output.texts[0] if output.texts else ""
        if stop.is_set() and num_updates < num_steps:
            return Drawn([], plan, num_updates)
        paths = [
            self._save(image, seed, drawing, plan) for image, seed in zip(output.images, drawing.seeds, strict=True)
        ]
        return Drawn(paths, plan, num_updates)

    def stop(self, stop: Event) -> None:
        """Set the event of a call; where it writes a plan, that ends at once too."""
        with self._stopping:
            stop.set()
            if self._drawing is stop:
                self.pipeline._interrupt = True

    def answer(self, question: Question, stop: Event) -> Iterator[str]:
        """The answer, as far as it is written at each time; it ends when `stop` is set.

        Raises:
            OSError: a picture or the adapter cannot be read.
            ValueError: a text or picture that cannot be used, or too many of them.
            ImportError: an adapter without peft.
        """
        tokenizer = self.pipeline.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        executor = ThreadPoolExecutor(1)
        writing = executor.submit(self._write, question, stop, streamer)
        executor.shutdown(wait=False)
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text
            writing.result()
        finally:
            stop.set()  # where nobody listens any more, nobody writes

    @torch.no_grad()
    def _write(self, question: Question, stop: Event, streamer: TextIteratorStreamer) -> None:
        processor = self.pipeline.processor
        # transformers would else take the 50 likeliest.
        sampling = {"do_sample": True, "temperature": question.temperature, "top_k": 0}
        try:
            with self._lock:
                if stop.is_set():
                    return
                self._use_adapter(question.adapter, question.adapter_weight)
                context, left = self._read(question.conversation)
                self.pipeline.model.generate_from(
                    context,
                    min(question.max_new_tokens, left),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda ids, scores, **_: ids.new_full((len(ids),), stop.is_set(), dtype=torch.bool)]
                    ),
                    eos_token_id=processor.eos_token_id,
                    pad_token_id=processor.eos_token_id,
                    **(sampling if question.temperature > 0 else {"do_sample": False}),
                )
        finally:
            streamer.end()  # or its reader would wait for ever after an error

    def _read(self, conversation: Sequence[str | Path]) -> tuple[Context, int]:
        """The context that the answer follows, and how many tokens the answer may have."""
        processor = self.pipeline.processor
        segments = [
            processor.text_segment(item) if isinstance(item, str) else processor.vision_segment(read_upload(item))
            for item in conversation
        ]
        length = sum(segment.rope_advance for segment in segments) + 1
        if length >= self.num_positions:
            raise ValueError(
                f"this conversation needs {length + 1} positions, the model has {self.num_positions}: begin a new one"
            )
        context = self.pipeline.prefill(Context.empty(1, self.pipeline._execution_device), [segments])
        return context, self.num_positions - length

    @contextmanager
    def _during(self, stop: Event) -> Iterator[None]:
        """A drawing, which `stop` may interrupt."""
        with self._stopping:
            self._drawing = stop
        try:
            yield
        finally:
            with self._stopping:
                self._drawing = None

    def _use_adapter(self, adapter: str | None, weight: float) -> None:
        if adapter != self._adapter:
            self.pipeline.unload_lora_weights()
            self._adapter = None
            if adapter is not None:
                try:
                    self.pipeline.load_lora_weights(adapter, adapter_name=ADAPTER)
                except (OSError, ValueError) as error:  # the page is told no folders of this machine
                    raise ValueError(str(error).replace(adapter, Path(adapter).name)) from error
                self._adapter = adapter
        if adapter is not None:
            self.pipeline.set_adapters(ADAPTER, weight)

    def _save(self, image: Image.Image, seed: int, drawing: Drawing, plan: str) -> Path:
        loras = ((drawing.adapter, drawing.adapter_weight),) if drawing.adapter is not None else ()
        references = [
            {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in drawing.references
        ]
        record = {
            "prompt": drawing.prompt,
            **replace(self.source, loras=loras).settings(Echo4oPipeline),
            "seed": seed,
            "parameters": {**read_arguments(Echo4oPipeline, drawing.arguments), "image": references},
            **({"plan": plan} if plan else {}),
        }
        path = self.output / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{seed}.png"
        save_png(image, path, {name: json.dumps(x) if name in JSON_TEXTS else x for name, x in record.items()})
        return path


def find_adapters(folders: Sequence[Path]) -> dict[str, str]:
    """Adapters by name: each folder that is one, and the folders in it that are.

    The name is the end of the path, as much of it as tells the adapters apart.

    Raises:
        ValueError: a folder without any.
    """
    paths: dict[Path, Path] = {}  # as they are, and as they were given
    for folder in folders:
        found = [path.parent for path in (folder / ADAPTER_CONFIG, *sorted(folder.glob(f"*/{ADAPTER_CONFIG}")))]
        found = [path for path in found if (path / ADAPTER_CONFIG).is_file()]
        if not found:
            raise ValueError(f"--lora {folder}: there is no {ADAPTER_CONFIG} in it, nor in a folder in it")
        for path in found:
            paths.setdefault(path.resolve(), path)
    adapters: dict[str, str] = {}
    for resolved, path in paths.items():
        names = ("/".join(resolved.parts[-length:]) for length in range(1, len(resolved.parts) + 1))
        adapters[next(name for name in names if name not in (NO_ADAPTER, *adapters))] = str(path)
    return adapters


def read_upload(path: Path) -> Image.Image:
    """A picture that a page has sent; errors call it as its owner does, not by its folder here.

    Raises:
        OSError: it is no whole picture.
    """
    try:
        return read_picture(path)
    except OSError as error:
        raise OSError(f"{path.name} cannot be read as a picture") from error


def settings_of(path: Path) -> dict[str, Any]:
    """What a PNG of `Studio.draw` says of itself."""
    with Image.open(path) as image:
        return {str(name): json.loads(text) if name in JSON_TEXTS else text for name, text in image.info.items()}
