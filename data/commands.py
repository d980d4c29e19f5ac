"""Command lines without subcommands, made of a Pydantic model; wrong settings are said by their flag.

In: a model and the arguments. Out: the settings, or the program's end with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from data.errors import DataError, end

Settings = TypeVar("Settings", bound=BaseModel)


def parse(model: type[Settings], arguments: Sequence[str] | None) -> Settings:
    """The settings that a command line gives; ``sys.argv`` if none is given."""
    from pydantic_settings import CliApp

    try:
        return CliApp.run(model, cli_args=None if arguments is None else [*arguments])
    except ValidationError as error:
        wrong = [
            f"--{'-'.join(str(part) for part in problem['loc']).replace('_', '-')}: {problem['msg']}"
            for problem in error.errors()
        ]
        end(DataError("; ".join(wrong) + " (see --help)"))
