"""The command line. A command's module is imported when it is called, so that help comes at once."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import click

from svdengine import __version__
from svdengine.errors import SvdEngineError

COMMANDS = {
    "chat": "Talk with a model.",
    "generate": "Complete prompts.",
    "serve": "Serve OpenAI's interface, and a chat page.",
    "batch": "Answer a file of requests.",
    "pull": "Download and convert models by name.",
    "list": "Show the models that were converted by name.",
    "rm": "Remove such models.",
    "convert": "Turn a checkpoint into a model file.",
    "calibrate": "Make the predictor that lets a model run sparse.",
    "export": "Write a predictor for PowerInfer or the paper's code.",
    "inspect": "Show what is in a model file.",
    "bench": "Measure tokens a second.",
    "eval": "Measure the quality of a model on a text.",
    "devices": "Show what this machine can run on.",
    "compile": "Compile the CPU's kernels beforehand.",
    "build-ascend-ops": "Compile the kernels for Ascend NPUs.",
}


# What other programs call it.
_ELSEWHERE = {
    "run": "chat",
    "ls": "list",
    "ps": "list",
    "remove": "rm",
    "delete": "rm",
    "download": "pull",
    "get": "pull",
    "quantize": "convert",
    "create": "convert",
    "show": "inspect",
    "info": "inspect",
    "server": "serve",
    "complete": "generate",
    "completion": "generate",
    "cli": "chat",
    "perplexity": "eval",
    "benchmark": "bench",
}

# How the library calls what the command line has as options.
_LIBRARY_NAMES = (
    *("top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "repetition_penalty"),
    *("repeat_last_n", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length"),
    *("dry_penalty_last_n", "logit_bias", "max_tokens", "ignore_eos", "sparsity_bias", "context_shift", "kv_dtype"),
    *("kv_memory", "gpu_memory", "prefill_rows"),
)
_LIBRARY_NAME = re.compile(rf"(?<![\w-])({'|'.join(_LIBRARY_NAMES)})(?![\w(])")
_IN_WORDS = {"kv_tokens": "--kv-memory", "response_format": "--json-schema", "found None": "found none"}


def in_words(message: str) -> str:
    """A message of the library, as the command line calls things: --top-p for top_p."""
    message = _LIBRARY_NAME.sub(lambda found: "--" + found[0].replace("_", "-"), message)
    for name, word in _IN_WORDS.items():
        message = message.replace(name, word)
    return message


class LazyGroup(click.Group):
    """Knows its commands by name and help, and turns errors into one line and an exit code."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that is called; one that there is not, with those that are near."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"there is no command {name!r}.{_did_you_mean(name)}", ctx)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"svdengine.commands.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and exit: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted."""
        explain = extra.pop("standalone_mode", True)
        run = partial(super().main, *args, **extra, standalone_mode=False)
        if not explain:
            return run()
        try:
            result: Any = run()
            sys.exit(result if isinstance(result, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo(err=True)
            sys.exit(130)
        except SvdEngineError as error:
            sys.exit(_explain(str(error)))
        except MemoryError:
            sys.exit(_explain("there is not enough memory; use a smaller model, context or batch"))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            sys.exit(_explain(f"{where}{error.strerror or error}"))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="svdengine")
def main() -> None:
    """Run language models on this machine.

    MODEL is a .svdp file, or the name of a model on Hugging Face's hub (org/name), which is downloaded and converted
    once. Without a MODEL, a small demo model is fetched once (94 MB) and used.
    """


def _did_you_mean(name: str) -> str:
    """The sentence that follows on a command which there is not; empty, where none is near."""
    near = [_ELSEWHERE[name]] if name in _ELSEWHERE else get_close_matches(name, COMMANDS, 2, 0.65)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _explain(message: str) -> int:
    click.echo("error: " + " ".join(in_words(message).split()), err=True)
    return 1


if __name__ == "__main__":
    main()
