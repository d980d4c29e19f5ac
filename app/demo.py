"""``python -m app.demo``: start the application, analyse the sample photos, print the answers, and go on serving."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from app.serve import ServeSettings, addresses, run_command, serving, supervise, wait_until_ready

_SAMPLES = Path(__file__).parent.parent / "samples"


def main() -> None:
    """Start, analyse, print, serve until Ctrl-C."""
    started = time.monotonic()
    settings = ServeSettings()

    def run() -> None:
        with serving(settings) as instance:
            wait_until_ready(instance, settings.ready_timeout_s)
            table = Table("photo", "verdict", "AI", "caption", "tags", "ms", title="Sample photos")
            for sample in json.loads((_SAMPLES / "samples.json").read_text()):
                data = (_SAMPLES / sample["name"]).read_bytes()
                answer = httpx.post(f"{instance.url}/v1/analyze", content=data, timeout=120).raise_for_status().json()
                if not table.rows:
                    print(f"first answer after {time.monotonic() - started:.0f} s", flush=True)
                detection, caption = answer["detection"] or {}, answer["caption"] or {}
                table.add_row(
                    f"{sample['name']}\n[dim]{sample['kind']}",
                    detection.get("label", "-"),
                    f"{detection['ai_probability']:.2f}" if detection else "-",
                    caption.get("text", "-"),
                    ", ".join(answer["tags"] or []) or "-",
                    f"{answer['timings_ms']['total']:.0f}",
                )
            Console(width=120).print(table)
            print(f"serving until Ctrl-C\n{addresses(instance)}", flush=True)
            supervise(instance, settings)

    run_command(run)


if __name__ == "__main__":
    main()
