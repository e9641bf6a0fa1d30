"""The files in examples/deploy are valid, and what they run exists and fits together."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml
from pages import ROOT

from apoq.cli import main

FOLDER = ROOT / "examples" / "deploy"
STOP_SECONDS = 28
"""A worker's default timeout, and what it takes in addition."""


def parsed(command: list[str]) -> dict[str, object]:
    """Read a command line of apoq's as apoq does; return its options."""
    program, name, *arguments = command
    assert Path(program).name == "apoq"
    context = click.Context(main)
    found = main.get_command(context, name)
    with found.make_context(name, list(arguments), parent=context) as made:
        return made.params


def pods() -> dict[str, dict]:
    documents = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in documents}


def test_the_dockerfile_runs_a_worker_and_asks_for_its_health():
    text = (FOLDER / "Dockerfile").read_text()
    instructions = dict(re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE))
    assert list(instructions) == ["FROM", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "CMD"]

    worker = parsed(json.loads(instructions["CMD"]))
    health = parsed(json.loads(instructions["HEALTHCHECK"].partition("CMD ")[2]))

    assert worker["health_port"] == worker["metrics_port"] == health["port"] == int(instructions["EXPOSE"])
    assert worker["bind"] == "0.0.0.0"  # or else Prometheus doesn't reach it
    assert "metrics" in re.search(r"apoq\[(.*?)\]", text).group(1).split(",")


def test_the_pods_probe_what_the_worker_serves():
    pod = pods()["myapp-worker"]
    (worker,) = pod["containers"]
    options = parsed(worker["command"])

    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    for probe, path in (("livenessProbe", "/live"), ("readinessProbe", "/ready"), ("startupProbe", "/live")):
        assert worker[probe]["httpGet"]["path"] == path
        assert ports[worker[probe]["httpGet"]["port"]] == options["health_port"]
    assert options["bind"] == "0.0.0.0"
    assert options["timeout"] + 3 <= pod["terminationGracePeriodSeconds"]
    (migrate,) = pod["initContainers"]
    parsed(migrate["command"])


def test_one_exporter_reads_the_database():
    (exporter,) = pods()["myapp-metrics"]["containers"]

    assert parsed(exporter["command"])["port"] == exporter["ports"][0]["containerPort"]


def test_the_unit_gives_the_worker_its_time():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(FOLDER / "apoq-worker.service")

    options = parsed(shlex.split(unit["Service"]["ExecStart"]))

    assert options["timeout"] + 3 <= int(unit["Service"]["TimeoutStopSec"])
    own = range(options["metrics_port"], options["metrics_port"] + options["processes"])
    assert options["health_port"] not in own


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    text = (FOLDER / "apoq-worker.service").read_text()
    # These exist here, unlike those of the example.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
    text = re.sub(r"^(User|WorkingDirectory|EnvironmentFile)=.*\n", "", text, flags=re.MULTILINE)
    unit = tmp_path / "apoq-worker.service"
    unit.write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )

    assert "apoq-worker.service" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
