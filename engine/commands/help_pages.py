"""Help of commands: options in groups, in the order in which people look for them, and examples at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

MODEL, SAMPLING, SPARSITY, SPEED = "Model", "Sampling", "Sparsity", "Speed and memory"
_GROUPS = ("", MODEL, SAMPLING, SPARSITY, SPEED)
MODEL_OPTION = "model_option"  # the name of the option that gives the argument MODEL


class FromOption(str):
    """A text that an option gave for an argument, -m for MODEL."""

    __slots__ = ()


class Option(click.Option):
    """An option that belongs to a group of the help page.

    other_names: further names that it is known by to users of other programs; help does not repeat them.
    """

    def __init__(self, names: Sequence[str], *, group: str = "", other_names: Sequence[str] = (), **more: Any) -> None:
        super().__init__([*names, *other_names], **more)
        self.group = group
        self._other_names = frozenset(other_names)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The names that are shown, and the help."""
        every = self.opts
        self.opts = [name for name in every if name not in self._other_names]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = every


def option(*names: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As click.option, with `group` and `other_names`. The value's name is that of the first long name."""
    first = next(name for name in (*names, *more.get("other_names", ())) if name.startswith("--"))
    value = first.split("/")[0].lstrip("-").replace("-", "_")
    declared = [name for name in names if not name.isidentifier()]
    value = next((name for name in names if name.isidentifier()), value)
    return click.option(value, *declared, cls=Option, **more)


class Command(click.Command):
    """A command whose help has its options in groups, and examples."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.examples = examples

    def make_parser(self, ctx: click.Context) -> Any:
        """A parser that takes -m MODEL for the argument."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            values, rest, order = parse(args)
            return values, [*rest, *self._move_model(values)], order

        parser.parse_args = parse_args
        return parser

    def _move_model(self, values: dict[str, Any]) -> list[str]:
        """Put the model of -m before the other arguments from MODEL on, and return what has no place then."""
        given = values.get(MODEL_OPTION)
        if not isinstance(given, str):
            return []
        given = FromOption(given)
        for argument in self._arguments_from_model():
            name = str(argument.name)
            before = values.get(name)
            if argument.nargs < 0:  # it takes all the rest
                values[name] = (given, *(before if isinstance(before, tuple) else ()))
                return []
            values[name] = given
            if not isinstance(before, str):
                return []
            given = before
        return [given]

    def _arguments_from_model(self) -> list[click.Argument]:
        arguments = [p for p in self.params if isinstance(p, click.Argument)]
        return arguments[[p.name for p in arguments].index("model") :]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of the command itself, then those of each group."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in _GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows[getattr(parameter, "group", "")].append(record)
        for group in _GROUPS:
            if rows[group]:
                with formatter.section(group or "Options"):
                    formatter.write_dl(rows[group])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, as they are."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in self.examples))
        super().format_epilog(ctx, formatter)
