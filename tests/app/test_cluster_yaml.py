"""`cluster.yaml`: Ray's launcher takes it, shells and `ray start` understand its commands, and what it says of the
nodes is what `serve_config.yaml` counts on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from pydantic_settings import CliApp
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from app import cluster
from app.config import read_serve_config
from app.monitoring import MonitoringSettings
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
SHELL = {"PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    """A node's home folder after the first set-up command."""
    folder = tmp_path_factory.mktemp("home")
    shell(folder, config["setup_commands"][0])
    return folder


def shell(home: Path, command: str, *before: str) -> str:
    """Run a command as the launcher has a node run it, in another home, by a program ``before`` it if there is one."""
    # the launcher's own wrapping: `... && (command)`
    command = f"true && export PYTHONWARNINGS=ignore && ({command})"
    return subprocess.run(
        [*before, "bash", "-c", command],
        env=SHELL | {"HOME": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def environment(home: Path) -> dict[str, str]:
    """What a node's environment is once the file has been read."""
    text = shell(home, ". ~/deeptrust/cluster.env && env -0")
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def start_options(home: Path, command: str) -> dict[str, Any]:
    """What `ray start` understands of a node's command, which finds a `ray` that writes its arguments down."""
    ray = home / "deeptrust/venv/bin/ray"
    ray.parent.mkdir(parents=True, exist_ok=True)
    ray.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" >~/words\necho Ray runtime started.\n")
    ray.chmod(0o755)
    shell(home, command)
    words = (home / "words").read_text().splitlines()
    assert words[0] == "start"
    return scripts.start.make_context("start", words[1:]).params


@pytest.fixture(scope="module")
def nodes(home: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "A": start_options(home, config["head_start_ray_commands"][1]),
        "B": start_options(home, config["worker_start_ray_commands"][1]),
    }


def labels(options: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=") for entry in options["labels"].split(","))


def test_rays_launcher_takes_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["type"] == "local"
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])
    # what is read on the head and on every worker comes from one place
    first = config["setup_commands"][0]
    assert prepared["head_setup_commands"][0] == prepared["worker_setup_commands"][0] == first


def test_what_is_sited_stands_at_the_top_alone(config: dict[str, Any]) -> None:
    addresses = config["metadata"]["addresses"]
    assert config["provider"]["head_ip"] == addresses["head"]
    assert config["provider"]["worker_ips"] == addresses["workers"]
    text = (ROOT / "cluster.yaml").read_text()
    below = text[text.index("cluster_name:") :]
    for address in (addresses["head"], *addresses["workers"]):
        assert address not in below


def test_ray_asks_for_a_token_and_calls_nobody(home: Path, config: dict[str, Any]) -> None:
    found = environment(home)
    assert found["RAY_AUTH_MODE"] == "token"
    token = config["file_mounts"]["~/.ray/auth_token"]
    assert found["RAY_AUTH_TOKEN_PATH"] == token.replace("~", str(home))
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


def test_what_a_node_and_its_secrets_say_comes_last(home: Path) -> None:
    last = (home / "deeptrust" / "cluster.env").read_text().strip().splitlines()[-2:]
    assert [line.split()[-1] for line in last] == ["/etc/deeptrust/node", "/etc/deeptrust/secrets"]


@pytest.mark.parametrize(
    ("made", "is_named"),
    [
        ("", False),
        ("mkdir etc", False),
        ("mkdir etc && touch etc/keys.json", True),
        ("mkdir etc && touch etc/keys.json && chmod 0 etc/keys.json", True),
        ("mkdir etc && ln -s gone etc/keys.json", True),
        ("mkdir etc && touch etc/keys.json && chmod 0 etc", True),
    ],
)
def test_a_file_of_keys_that_cannot_be_read_does_not_count_as_none(
    tmp_path: Path, config: dict[str, Any], made: str, is_named: bool
) -> None:
    folder = tmp_path / "etc"
    shell(tmp_path, config["setup_commands"][0].replace("/etc/deeptrust", str(folder)))
    shell(tmp_path, made or "true")
    # who may read everything would not see the difference
    before = ("setpriv", "--bounding-set=-all") if os.geteuid() == 0 else ()
    try:
        said = shell(tmp_path, ". ~/deeptrust/cluster.env; echo $DEEPTRUST_KEYS", *before).strip()
    finally:
        if folder.exists():
            folder.chmod(0o700)
    assert said == (f"{folder}/keys.json" if is_named else "")


def test_it_serves_with_the_flags_of_make_serve(home: Path) -> None:
    ours = {key: value for key, value in cluster.environment(8000).items() if os.environ.get(key) != value}
    # the instance's own, and what is said only to a machine that is alone
    alone = {"DEEPTRUST_INSTANCE", "PYTHONPATH", "RAY_AUTH_TOKEN_PATH", "RAY_DISABLE_IMPORT_WARNING"}
    alone |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", "RAY_PROMETHEUS_HOST"}
    # where HAProxy is and keeps its files, and how many threads it has
    alone |= {
        key for key in ours if key.startswith(("RAY_SERVE_HAPROXY_", "DEEPTRUST_HAPROXY")) and "TIMEOUT" not in key
    }
    shared = {key: value for key, value in ours.items() if key not in alone}
    assert "RAY_worker_niceness" in shared
    found = environment(home)
    assert {key: found.get(key) for key in shared} == shared
    assert {key for key in ours if key.startswith("RAY_SERVE_HAPROXY_")} <= set(found)
    assert "OMP_NUM_THREADS" not in found, "the launcher's 1 would be every worker's"


def test_the_nodes_have_the_gpus_and_labels_that_the_graph_counts_on(nodes: dict[str, dict[str, Any]]) -> None:
    graph = read_serve_config(ROOT / "serve_config.yaml")["applications"][0]
    gpus = {name: options["num_gpus"] for name, options in nodes.items()}
    assert gpus == {"A": 2, "B": 1}
    least, growth = 0.0, dict[str, float]()
    for deployment in graph["deployments"]:
        options = deployment.get("ray_actor_options") or {}
        wanted = options.get("num_gpus", 0.0)
        scaling = deployment.get("autoscaling_config") or {}
        if deployment["name"] == "Tagger":  # what it takes stands in `args`
            wanted = graph["args"]["tagger"]["num_gpus"]
        least += wanted * scaling.get("min_replicas", 1)
        if not deployment["name"].endswith("Canary"):
            growth[deployment["name"]] = wanted * (scaling.get("max_replicas", 1) - scaling.get("min_replicas", 1))
        for key, value in (options.get("label_selector") or {}).items():
            fitting = [name for name, node in nodes.items() if labels(node).get(key) == value]
            assert fitting == ["A"], f"{deployment['name']} prefers {key}={value}"
    assert least <= gpus["A"], "at rest all models are on node A, and node B is training's"
    whole = sum(gpus.values())
    assert growth["Tagger"] and least + growth["Tagger"] <= whole, "the tagger may grow while the others are at rest"
    assert least + growth["Detector"] + growth["Captioner"] <= whole, "the others both while the tagger is"


def test_labels_are_ones_that_ray_takes(nodes: dict[str, dict[str, Any]]) -> None:
    from ray._private.label_utils import parse_node_labels_string, validate_node_labels

    for options in nodes.values():
        validate_node_labels(parse_node_labels_string(options["labels"]))


def test_a_worker_finds_the_head(nodes: dict[str, dict[str, Any]]) -> None:
    assert nodes["A"]["head"] and not nodes["B"]["head"]
    assert nodes["B"]["address"] == f"192.0.2.1:{nodes['A']['port']}"
    assert nodes["A"]["dashboard_host"] == "0.0.0.0", "trainings on other nodes ask it who waits (train.giving_way)"
    assert nodes["A"]["metrics_export_port"] == nodes["B"]["metrics_export_port"]
    for node in nodes.values():
        assert node["object_store_memory"] > 2**30 and node["object_spilling_directory"]


def test_set_up_installs_the_pinned_list_and_nothing_else(config: dict[str, Any]) -> None:
    (install,) = [command for command in config["setup_commands"] if "pip install" in command]
    assert "--no-deps -r requirements/gpu.txt" in install
    pins = (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    # `torch==2.13.0` may be met by a build for CPUs, which counts as newer
    assert any(pin.startswith("torch===") and "+" not in pin for pin in pins)
    for needed in ("nvidia-cublas", "nvidia-cudnn", "nvidia-nccl", "triton"):
        assert any(pin.startswith(needed) for pin in pins), f"there is no {needed} for torch's CUDA build"
    # what `pip install --no-deps` leaves out an evaluation there cannot measure
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = settings["dependencies"] + settings["optional-dependencies"]["gpu"]
    names = {re.split(r"[\[=<>]", each)[0] for each in wanted}
    assert {"nltk", "torch"} <= names <= {pin.partition("=")[0] for pin in pins}
    for commands in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[commands]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_runbooks_mlflow_listens_where_nodes_look_and_keeps_nothing_in_the_code(home: Path) -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    command = text.partition("mlflow/start <<'END'\n")[2].partition("\nEND\n")[0]
    for folder in ("mlflow", "venv/bin"):
        (home / "deeptrust" / folder).mkdir(parents=True, exist_ok=True)
    program = home / "deeptrust/venv/bin/mlflow"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" $MLFLOW_TRACKING_URI\n")
    program.chmod(0o755)
    *words, nodes_ask = shell(home, command).splitlines()
    assert words[0] == "server"
    said = dict(zip(words[1::2], words[2::2], strict=True))
    assert nodes_ask == f"http://{said['--host']}:{said['--port']}"
    assert nodes_ask.removeprefix("http://") in said["--allowed-hosts"].split(",")
    assert said["--backend-store-uri"] == f"sqlite:///{home}/deeptrust/mlflow/mlflow.db"
    assert said["--artifacts-destination"] == f"{home}/deeptrust/mlflow/artifacts"


def test_the_runbooks_prometheus_waits_for_ray_and_keeps_nothing_in_the_code(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    command = text.partition("prometheus/start <<'END'\n")[2].partition("\nEND\n")[0]
    shell(tmp_path, config["setup_commands"][0].replace("RAY_FOLDER=/tmp/ray", f"RAY_FOLDER={tmp_path}"))
    programs = tmp_path / "deeptrust/venv/bin"
    programs.mkdir(parents=True)
    # Ray has written the file by the time that it is looked for again
    (programs / "sleep").write_text("#!/bin/sh\ntouch ~/prom_metrics_service_discovery.json\n")
    (programs / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    words = shell(tmp_path, command).splitlines()
    assert words[:2] == ["-m", "app.monitoring"]
    said = CliApp.run(MonitoringSettings, cli_args=words[2:])
    assert said.discovery and said.discovery.is_file()
    assert said.data == tmp_path / "deeptrust/prometheus", "not in the code, which goes with a roll-back"


def test_the_runbook_names_the_taggers_model_as_it_is_served() -> None:
    served = {
        deployment["user_config"]["uri"]
        for deployment in read_serve_config(ROOT / "serve_config.yaml")["applications"][0]["deployments"]
        if deployment["name"].startswith("Tagger")
    }
    (uri,) = served
    assert f"resolve(sys.argv[1]).folder)' {uri}\n" in (ROOT / "docs" / "runbook.md").read_text()


def refusal(config: dict[str, Any], node: Path, shared: int = 2**36, *missing: str) -> str:
    """Why a node is refused that has `shared` bytes of /dev/shm and all programs but those that are `missing`."""
    shell(node, config["setup_commands"][0])
    programs = node / "bin"
    programs.mkdir()
    for name in {"bash", "cat", "tail", "uname", "python3.11", "rsync", "setpriv", "setsid", "pgrep"} - {*missing}:
        # of a program that this machine lacks the node has another under its name: it is only looked for
        found = sys.executable if name.startswith("python") else shutil.which(name) or "/bin/true"
        (programs / name).symlink_to(found)
    (programs / "df").write_text(f"#!/bin/bash\nprintf '%s\\n' 1B-blocks {shared}\n")
    (programs / "df").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", config["setup_commands"][1]],
        env={"HOME": str(node), "PATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.returncode) == bool(done.stderr)
    return done.stderr


def test_a_node_that_lacks_something_is_refused_before_anything_is_installed(
    config: dict[str, Any], tmp_path: Path
) -> None:
    install = [number for number, command in enumerate(config["setup_commands"]) if "pip install" in command]
    assert install[0] > 1
    for name in ("whole", "bare", "small"):
        (tmp_path / name).mkdir()
    assert refusal(config, tmp_path / "whole") == ""
    said = refusal(config, tmp_path / "bare", 2**36, "rsync", "pgrep")
    assert "lacks rsync, pgrep: see 'A node needs' in cluster.yaml" in said
    said = refusal(config, tmp_path / "small", 2**34, "python3.11")
    assert "lacks python3.11 with venv, a /dev/shm of OBJECT_STORE_BYTES=34359738368" in said


def test_the_cpus_that_a_node_needs_are_those_of_the_graph() -> None:
    graph = read_serve_config(ROOT / "serve_config.yaml")["applications"][0]
    rest, most = {"A": 0, "B": 0}, 0
    for deployment in graph["deployments"]:
        # what a tagger takes stands in `args`
        is_tagger = deployment["name"].startswith("Tagger")
        cpus = (graph["args"]["tagger"] if is_tagger else deployment["ray_actor_options"])["num_cpus"]
        scaling = deployment.get("autoscaling_config") or {"min_replicas": 1, "max_replicas": 1}
        spread = deployment.get("max_replicas_per_node", 0)
        rest["B"] += cpus * spread
        rest["A"] += cpus * (scaling["min_replicas"] - spread)
        most += cpus * scaling["max_replicas"]
    text = (ROOT / "cluster.yaml").read_text()
    assert f"{rest['A']} on node A and {rest['B']} on node B at rest" in text
    assert f"{most} in all" in text
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert f"{rest['A']} CPUs on node A and {rest['B']} on node B at rest" in runbook


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync: apt-get install rsync")
def test_nothing_that_git_ignores_is_copied_to_the_nodes(config: dict[str, Any], tmp_path: Path) -> None:
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    names = {name.strip("/").replace("*", "x") for name in ignored}
    for name in names | {".git", ".venv-bench", "app"}:
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "file").touch()
    excluded = [f"--exclude={pattern}" for pattern in config["rsync_exclude"]]
    subprocess.run(["rsync", "-a", *excluded, f"{tmp_path}/here/", f"{tmp_path}/there/"], check=True)
    copied = [file.relative_to(tmp_path / "there") for file in (tmp_path / "there").rglob("file")]
    assert copied == [Path("app/file")]


#: A `ray` that writes its arguments down and leaves stand-ins of what a head cannot be without.
RAY = """#!{python}
import json, os, pathlib, subprocess, sys
home = pathlib.Path.home()
(home / "words").write_text("\\n".join(sys.argv[1:]))
up, tell = os.pipe()
if os.fork() == 0:
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    parts = {{
        "raylet": (home / "raylet", "raylet"),
        "gcs_server": (home / "gcs_server", "gcs_server"),
        "dashboard": ("{sleep}", "python /ray/dashboard/dashboard.py"),
        "autoscaler": ("{sleep}", "python /ray/autoscaler/_private/monitor.py"),
    }}
    running = {{part: subprocess.Popen([name, "60"], executable=file).pid for part, (file, name) in parts.items()}}
    (home / "running").write_text(json.dumps(running))
    os.write(tell, b"!")
    for _ in running:
        os.wait()
else:
    os.read(up, 1)
"""


@pytest.fixture
def head(config: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """A head's home, set up, with programs that only pretend."""
    first = config["setup_commands"][0].replace("DASHBOARD_PORT=8265", "DASHBOARD_PORT=9999")
    for command in (first, config["head_setup_commands"][0]):
        shell(tmp_path, command)
    programs = tmp_path / "deeptrust" / "venv" / "bin"
    programs.mkdir(parents=True)
    sleep = shutil.which("sleep") or ""
    for name in ("raylet", "gcs_server"):
        shutil.copy(sleep, tmp_path / name)
    (programs / "python").write_text(f'#!/bin/bash\n[ "$2" = app.config ] || exec {sys.executable} "$@"\n')
    (programs / "ray").write_text(RAY.format(python=sys.executable, sleep=sleep))
    (programs / "serve").write_text('#!/bin/bash\nprintf "%s\\n" "$@" $RAY_DASHBOARD_ADDRESS $RAY_API_SERVER_ADDRESS\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "ray_bootstrap_config.yaml").touch()
    yield tmp_path
    for part in running(tmp_path).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(part, signal.SIGKILL)


def running(head: Path) -> dict[str, int]:
    """Process ids of the stand-ins."""
    file = head / "running"
    return json.loads(file.read_text()) if file.is_file() else {}


def unit(head: Path, what: str, **variables: str) -> subprocess.Popen[str]:
    """The script of the head's unit, as systemd starts it."""
    return subprocess.Popen(
        ["bash", str(ROOT / "systemd" / "head.sh"), what],
        env=SHELL | {"HOME": str(head)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def started(head: Path) -> subprocess.Popen[str]:
    """The same, once it looks after the stand-ins."""
    process = unit(head, "start")
    assert process.stdout is not None
    said = process.stdout.readline().split()
    assert said[:1] == ["watching"] and sorted(map(int, said[-4:])) == sorted(running(head).values())
    return process


def test_the_heads_unit_starts_ray_by_the_command_of_this_file(head: Path, config: dict[str, Any]) -> None:
    (head / "ray_bootstrap_config.yaml").unlink()
    refused = unit(head, "start")
    assert "ray up cluster.yaml" in refused.communicate()[1] and refused.returncode == 1
    (head / "ray_bootstrap_config.yaml").touch()
    process = started(head)
    words = (head / "words").read_text().splitlines()
    assert words[0] == "start" and "--block" not in words
    said = scripts.start.make_context("start", words[1:]).params
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM, "`systemctl stop`"
    assert said == start_options(head, config["head_start_ray_commands"][1])


@pytest.mark.parametrize("part", ["raylet", "gcs_server", "dashboard", "autoscaler"])
def test_the_heads_unit_ends_with_any_part_of_ray_that_a_head_needs(head: Path, part: str) -> None:
    """Whatever its exit code: `ray start --block` takes an end by SIGTERM for intended, and stays."""
    process = started(head)
    os.kill(running(head)[part], signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    assert process.stderr is not None
    assert f"Ray's {part} has ended" in process.stderr.readline()
    wait_for(lambda: not any(psutil.pid_exists(one) for one in running(head).values()), what="the others end too")


def test_the_heads_unit_and_people_find_the_dashboard_where_it_is(head: Path) -> None:
    """`serve` asks at port 8265 unless it is told; the launcher writes that on the head, where it is true."""
    place = "http://127.0.0.1:9999"
    deployed = unit(head, "deploy").communicate()[0].splitlines()
    assert deployed == ["deploy", "serve_config.yaml", place, place]
    assert environment(head)["RAY_DASHBOARD_ADDRESS"] == place


def test_nothing_is_deployed_that_has_a_mistake(head: Path) -> None:
    (head / "deeptrust/venv/bin/python").write_text('#!/bin/sh\necho "$@" >~/asked\nexit 1\n')
    refused = unit(head, "deploy")
    assert refused.communicate()[0] == "" and refused.returncode == 1
    assert (head / "asked").read_text() == "-m app.config serve_config.yaml\n"


def test_nothing_is_deployed_to_a_head_that_has_ended(head: Path) -> None:
    (head / "deeptrust/venv/bin/serve").write_text("#!/bin/sh\nexit 1\n")
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert unit(head, "deploy", MAINPID=str(ended.pid)).wait(timeout=30) == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze: apt-get install systemd")
def test_systemd_takes_the_heads_unit() -> None:
    unit = ROOT / "systemd" / "deeptrust-head@deeptrust.service"
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "deeptrust-head" not in checked.stderr, checked.stderr


@pytest.mark.parametrize(("failures", "starts"), [(2, 3), (9, 3)])
def test_a_worker_whose_start_fails_is_started_again(
    home: Path, config: dict[str, Any], failures: int, starts: int
) -> None:
    """Ray's autoscaler does not try a node again that failed once (`num_failed_updates`)."""
    ray = home / "deeptrust/venv/bin/ray"
    ray.parent.mkdir(parents=True, exist_ok=True)
    ray.write_text(
        f"#!/bin/sh\necho $1 >>~/tried\n[ $1 = stop ] || [ $(grep -c start ~/tried) -gt {failures} ] || exit 1\n"
    )
    ray.chmod(0o755)
    (home / "tried").write_text("")
    gives_up = pytest.raises(subprocess.CalledProcessError) if failures >= starts else contextlib.nullcontext()
    with gives_up:
        shell(home, config["worker_start_ray_commands"][1])
    assert (home / "tried").read_text().split().count("start") == starts


def test_nothing_of_a_workers_ray_outlives_its_raylet(home: Path, config: dict[str, Any]) -> None:
    raylet = home / "raylet"
    shutil.copy(shutil.which("sleep") or "", raylet)
    first = subprocess.Popen([raylet, "60"])
    monitor = "site-packages/ray/_private/log_monitor.py"
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", monitor])
    try:
        shell(home, config["worker_start_ray_commands"][2])
        time.sleep(1.5)
        assert second.poll() is None, "while the raylet runs"
        first.kill()
        first.wait()
        assert second.wait(timeout=30)
    finally:
        first.kill()
        second.kill()
