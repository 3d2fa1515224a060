"""Entry point of the `megavila` command: one subcommand a file, user errors without a traceback."""

import sys

import typer

from megavila.cli import convert, data, demo, evaluate, generate, score, serve, video
from megavila.runtime.errors import MegavilaError

app = typer.Typer(
    name="megavila",
    help="Reinforcement learning of vision-language models on long videos.\n\n"
    "Training has its own entries, pretrain_sft.py and pretrain_grpo.py, which run under python and torchrun alike. "
    "Settings are key=value everywhere, and win over those of --config FILE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("demo")(demo.demo)
app.command("eval", context_settings={"allow_interspersed_args": True})(evaluate.evaluate_command)
app.command("generate")(generate.generate)
app.command("score")(score.score)
app.command("serve")(serve.serve_command)
app.command("convert")(convert.convert)
app.add_typer(data.app, name="data")
app.add_typer(video.app, name="video")


def main() -> None:
    """Runs a subcommand; a MegavilaError is one line on stderr and exit code 2."""
    try:
        app()
    except MegavilaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
