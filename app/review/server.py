"""Label Studio on this machine: ``make review``.

It runs in an environment of its own (`.venv-review`), listens on loopback only, and keeps everything in
``~/.local/share/deeptrust/review``. The first start makes a user, whose password and token lie in that folder, readable
to its owner alone. Marked as the instance's own: ``make stop`` ends it as well. Knows no picture.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from app.review.label_studio import ReviewError

URL = "http://127.0.0.1:8080"
USER = "reviewer@localhost.localdomain"
_ROOT = Path(__file__).parents[2]
FOLDER = Path("~/.local/share/deeptrust/review")


class ServerSettings(BaseModel):
    """Command line of ``python -m app.review start``."""

    model_config = ConfigDict(extra="forbid")

    label_studio_port: int = Field(8080, ge=1, le=65535)
    data: Path = Field(FOLDER, description="where Label Studio keeps its database and pictures, and its token lies")
    program: Path = Field(
        _ROOT / ".venv-review" / "bin" / "label-studio", description="Label Studio; `make review` installs it"
    )


def own_token(folder: Path = FOLDER) -> str:
    """The token of the server that ``start`` started.

    Raises:
        ReviewError: none was started here.
    """
    try:
        return (folder.expanduser() / "token").read_text()
    except OSError:
        raise ReviewError(
            "no token: start Label Studio with `make review`, or put the token of another one's page Account & "
            "Settings into LABEL_STUDIO_API_KEY"
        ) from None


def remove_copies(folder: Path, hashes: Collection[str]) -> int:
    """Remove pictures from the files that Label Studio was given, which it keeps whatever is deleted; how many."""
    removed = 0
    for path in (folder.expanduser() / "data" / "media" / "upload").glob("*/*"):
        if path.stem.rsplit("-", 1)[-1] in hashes:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def command(settings: ServerSettings) -> tuple[list[str], dict[str, str]]:
    """Label Studio's command line and environment; makes the folder, password and token when there are none.

    Raises:
        ReviewError: it is not installed, or the port is taken.
    """
    if not settings.program.exists():
        raise ReviewError(f"{settings.program} does not exist: `make review` installs Label Studio")
    port, folder = settings.label_studio_port, settings.data.expanduser().absolute()
    if cluster.free_port(port) != port:
        raise ReviewError(f"port {port} is in use: end what listens there, or give --label-studio-port")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password, token = (_secret(folder / name) for name in ("password", "token"))
    line = [str(settings.program), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    line += ["--log-level", "WARNING"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"),
        cluster.MARK: os.environ.get("PORT", "8000"),
        cluster.BESIDE: "1",  # it goes on when Ray is started again
        "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": password,
        "LABEL_STUDIO_USER_TOKEN": token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",  # nosec B105 # a switch, no password
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_HOST": f"http://127.0.0.1:{port}",
        # other pages in the reviewer's browser, and names that lead here, get no answer
        "LABEL_STUDIO_ALLOWED_HOSTS": "127.0.0.1,localhost",
        "LABEL_STUDIO_CORS_ALLOW_ALL_ORIGINS": "false",
        # it calls nobody
        "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
        "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
        "LABEL_STUDIO_SENTRY_DSN": "",
        "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
    }
    return line, environment


def _secret(path: Path) -> str:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(20))
    return path.read_text()


def start(settings: ServerSettings) -> None:
    """Become Label Studio."""
    line, environment = command(settings)
    print(
        f"Label Studio: http://127.0.0.1:{settings.label_studio_port}/  user {USER}, password in "
        f"{settings.data.expanduser() / 'password'}; Ctrl-C or `make stop` ends it",
        flush=True,
    )
    os.execve(line[0], line, environment)
