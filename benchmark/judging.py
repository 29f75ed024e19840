"""Wall time of judging against a server on this machine that takes a second for each reply.

    python benchmark/judging.py --calls 280 --concurrency 32 --latency 1

The server is a process of its own. It says what a client costs: the ideal is calls / concurrency rounds of the
server's latency; the overhead is the client's processor time per call (reading, JPEG, JSON, storing); memory is the
growth of the process from the first quarter of the calls to the end, and the same with every picture four times as
often.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from echo4o_hf.judges.ask import Request, ask
from echo4o_hf.judges.openai_judge import OpenAIJudge
from echo4o_hf.judges.store import VerdictStore


def serve(latency: float, pipe: Connection) -> None:
    """Answer every chat completion after `latency` seconds; sends its port into `pipe`."""
    message = {"role": "assistant", "content": '{"correct": 1, "reason": "all objects are there"}'}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 900, "completion_tokens": 14}
    body = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:  # noqa: N802
            """Read all of the request, as a real server does."""
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(latency)
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    pipe.send(server.server_port)
    server.serve_forever()


def draw(folder: Path, count: int, side: int) -> list[Path]:
    """Smooth pictures with some noise, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noisy).save(paths[-1], compress_level=1)
    return paths


def resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def judge(port: int, paths: Sequence[Path], calls: int, concurrency: int, store: Path) -> dict[str, float]:
    """Judge `calls` pictures; seconds, processor seconds and MiB."""
    model = OpenAIJudge("local", base_url=f"http://127.0.0.1:{port}/v1")
    memory: list[float] = []

    def sampled(system: str, prompt: str, images: list[Image.Image]) -> str:
        reply = model(system, prompt, images)
        memory.append(resident())
        return reply

    sampled.name, sampled.parameters = model.name, model.parameters  # type: ignore[attr-defined]
    requests = [Request("be strict", f"item {number}", [paths[number % len(paths)]]) for number in range(calls)]
    with VerdictStore(store) as replies:
        wall, cpu = time.perf_counter(), time.process_time()
        outcomes = ask(sampled, requests, store=replies, concurrency=concurrency, progress=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        again = time.perf_counter()
        stored = ask(sampled, requests, store=replies, concurrency=concurrency, progress=False)
        again = time.perf_counter() - again
    if any(outcome.failure for outcome in outcomes) or not all(outcome.from_store for outcome in stored):
        raise RuntimeError(
            f"not everything was judged: {[outcome.failure for outcome in outcomes if outcome.failure]}"
        )
    latencies = [outcome.latency or 0.0 for outcome in outcomes]
    early = max(memory[: max(len(memory) // 4, 1)])
    return {
        "seconds": wall,
        "cpu": cpu,
        "again": again,
        "latency": statistics.median(latencies),
        "memory": max(memory),
        "growth": max(memory) - early,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=280)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds that the server takes (default: 1)")
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels (default: 1024)")
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(options.latency, theirs), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = draw(folder, min(options.calls, 70), options.side)
            port = ours.recv()
            judge(port, paths[:2], 2, 2, folder / "warm-up.sqlite")
            print("| calls | seconds | ideal | ratio | CPU ms/call | latency | again | MiB | growth MiB |")
            print("|---|---|---|---|---|---|---|---|---|")
            for calls in (options.calls, 4 * options.calls):
                run = judge(port, paths, calls, options.concurrency, folder / f"{calls}.sqlite")
                ideal = calls / options.concurrency * options.latency
                print(
                    f"| {calls} | {run['seconds']:.2f} | {ideal:.2f} | {run['seconds'] / ideal:.2f} "
                    f"| {run['cpu'] / calls * 1000:.1f} | {run['latency']:.2f} | {run['again']:.2f} "
                    f"| {run['memory']:.0f} | {run['growth']:.0f} |"
                )
    finally:
        server.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
