"""`echo4o app`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command
from .loading import add_loading_arguments, read_source


def _app_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser, "folder, name on the Hub, or echo4o-miniature")
    parser.add_argument(
        "--lora",
        type=Path,
        action="append",
        dest="loras",
        metavar="FOLDER",
        help="adapter to choose from, or folder of adapters; repeat it for several",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pictures"),
        metavar="DIR",
        help="folder that the pictures are saved in (default: %(default)s)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also a public link, through Gradio's server")
    parser.add_argument("--compile", action="store_true", help="compile the layers; the first image of a kind waits")


def _app(args: argparse.Namespace) -> None:
    try:
        from ..app.page import CSS, THEME, build_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("echo4o app needs gradio: pip install 'echo4o-hf[app]'") from error
    from ..app.studio import Studio, find_adapters

    adapters = find_adapters(args.loras or [])
    source = read_source(args, compiled=args.compile)
    build_page(Studio(source, args.output, adapters)).launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        theme=THEME,
        css=CSS,
        footer_links=["settings"],
        run_history=False,
        ssr_mode=False,
    )


APP = Command("app", "draw and ask in a browser", _app_arguments, _app)
