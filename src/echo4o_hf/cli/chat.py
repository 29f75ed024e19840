"""`echo4o chat`: questions about pictures.

The official code answers one question per call, but reads texts and pictures in any order, and what the model wrote
(its plan) it reads again as a text of its own. A conversation is therefore one context: the pictures, then question,
answer, question ..., each text between the markers of a text. What was read stays cached.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

from .command import Command
from .loading import add_adapter_argument, add_loading_arguments, read_adapters, read_source

if TYPE_CHECKING:
    from ..pipeline.pipeline_echo4o import Echo4oPipeline

MIN_TEMPERATURE = 0.01  # as good as 0; logits that are divided by much less are infinite


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures to ask about")
    add_loading_arguments(parser, "folder, name on the Hub, or echo4o-miniature")
    add_adapter_argument(parser)
    parser.add_argument(
        "--question", metavar="TEXT", help="answer this and end (default: a question per line of input)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="of an answer, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 always takes the likeliest (default: %(default)s)",
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest, this much in sum")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")


class Conversation:
    """Questions about pictures, each answered with all that came before it.

    Args:
        pipe: what answers.
        images: read first.
        max_new_tokens: of an answer, at most.
        sampling: arguments of `generate`.
    """

    def __init__(
        self, pipe: Echo4oPipeline, images: list[Any], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> None:
        from transformers import TextStreamer

        from ..model.context import Context

        self.pipe, self.max_new_tokens, self.sampling = pipe, max_new_tokens, sampling
        self.streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        segments = [pipe.processor.vision_segment(image) for image in images]
        self.context = pipe.prefill(Context.empty(1, pipe._execution_device), [segments])

    def ask(self, question: str) -> str:
        """The answer, which is printed while it is written; Ctrl-C ends it, and what was said counts.

        Raises:
            ValueError: a question that is empty, or too long for what is left of the context.
        """
        processor, end = self.pipe.processor, self.pipe.processor.eos_token_id
        segment = processor.text_segment(question)
        limit: int = self.pipe.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
        used = int(self.context.next_position) + segment.rope_advance
        if used + 1 >= limit:
            raise ValueError(
                f"with this question the conversation needs {used + 2} positions, the model has {limit}: "
                "ask something shorter, or start anew"
            )
        context = self.pipe.prefill(self.context.copy(), [[segment]])
        with stopped_by_sigint() as stop:
            ids = self.pipe.model.generate_from(
                context,
                min(self.max_new_tokens, limit - used - 1),
                streamer=self.streamer,
                stopping_criteria=[lambda ids, scores, **_: ids.new_full((len(ids),), stop.is_set()).bool()],
                eos_token_id=end,
                pad_token_id=end,
                **self.sampling,
            )
        (answer,) = processor.batch_decode(ids, skip_special_tokens=True)
        if answer.strip():
            context = self.pipe.prefill(context, [[self.pipe.encode_written(answer, limit - used - 2)]])
        self.context = context
        return str(answer)


@contextmanager
def stopped_by_sigint() -> Iterator[Event]:
    """An event that Ctrl-C sets; Ctrl-C again is an interrupt as ever."""
    stop = Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _chat(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    import torch

    from ..model.processing_bagel import BagelProcessor
    from ..pipeline.pipeline_echo4o import Echo4oPipeline
    from ..pipeline.prompt_file import check_seed
    from ..pipeline.samples import read_picture

    check_seed(args.seed)
    images = [read_picture(path) for path in args.images]
    if args.question is not None:
        BagelProcessor.from_pretrained(args.model).text_segment(args.question)  # refuses what is no question
    pipe = read_source(args, read_adapters(args)).load(Echo4oPipeline)
    assert isinstance(pipe, Echo4oPipeline)
    torch.manual_seed(args.seed)
    with torch.no_grad():
        conversation = Conversation(pipe, images, args.max_new_tokens, sampling)
        if args.question is not None:
            conversation.ask(args.question)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            _talk(conversation)
        else:
            for line in sys.stdin:
                if line.strip():
                    conversation.ask(line.strip())


def _talk(conversation: Conversation) -> None:
    """Questions from a terminal, until Ctrl-D; one that is refused does not end the conversation."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            if line:
                conversation.ask(line)
        except ValueError as error:
            print(f"echo4o: {error}", file=sys.stderr)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate`, from the options."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    if not (args.temperature == 0 or MIN_TEMPERATURE <= args.temperature < float("inf")):
        raise ValueError(f"--temperature {args.temperature} must be 0, or {MIN_TEMPERATURE} or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p} must be above 0, and 1 at most")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top-k {args.top_k} must be at least 1")
    if not args.temperature:
        if args.top_p is not None or args.top_k is not None:
            raise ValueError("--top-p and --top-k choose at random: they want a --temperature above 0")
        return {"do_sample": False}
    # transformers would else take the 50 likeliest.
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p or 1.0, "top_k": args.top_k or 0}


CHAT = Command("chat", "questions about pictures", _chat_arguments, _chat)
