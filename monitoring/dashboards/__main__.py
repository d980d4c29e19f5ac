"""Writes the dashboards: ``python -m monitoring.dashboards``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from monitoring.dashboards import BOARDS
from monitoring.dashboards.board import render

FOLDER = Path(__file__).parent.parent / "grafana"


class DashboardSettings(BaseModel):
    """Command line of ``python -m monitoring.dashboards``."""

    model_config = ConfigDict(extra="forbid")

    output: Path = Field(FOLDER, description="folder to write the dashboards to")


def main(arguments: list[str] | None = None) -> None:
    """Write every dashboard."""
    from pydantic_settings import CliApp

    settings = CliApp.run(DashboardSettings, cli_args=arguments)
    settings.output.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        path = settings.output / f"{board.uid}.json"
        path.write_text(render(board))
        print(path)


if __name__ == "__main__":
    main()
