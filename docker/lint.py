"""Lints docker/: Dockerfiles, scripts, YAML, the compose file's schema, Kubernetes' schema of what the values hold.

Run by `make lint-docker` with the tools of requirements-lint.txt beside this Python.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
KUBERNETES = "1.33.0"
SCRIPTS = ("entrypoint", "init-airflow", "serve-s3", "postgres-init.sh")
LINE = "{extends: default, rules: {line-length: {max: 120}, braces: disable, document-start: disable, commas: disable}}"


def main() -> None:
    """Run every linter; the exit status is that of the worst."""
    compose, values = HERE / "compose.yaml", HERE / "helm/values.yaml"
    failed = [
        _run("hadolint", *map(str, sorted(HERE.glob("*.Dockerfile")))),
        _run("shellcheck", *(str(HERE / name) for name in SCRIPTS)),
        _run("yamllint", "--strict", "-d", LINE, str(compose), str(values)),
        _run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose)),
        *map(_validates, pods(yaml.safe_load(values.read_text()))),
    ]
    sys.exit(any(failed))


def pods(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What the values say in Kubernetes' own words, as pods: one for the chart's common parts, one for each worker set.

    The chart itself comes from no package registry, so its templates cannot be rendered here.
    """
    worker = values["workers"]["celery"]
    parts = [{"name": name, **values[name]} for name in ("apiServer", "scheduler", "dagProcessor", "triggerer")]
    return [_pod(values, part) for part in (*parts, {**worker, "name": "default"}, *worker["sets"])]


def _pod(values: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    image = values["images"]["airflow"]
    container = {
        "name": "base",
        "image": f"{image['repository']}:{image['tag']}",
        "imagePullPolicy": image["pullPolicy"],
        "env": [*values["env"], *part.get("env", [])],
        "resources": part["resources"],
        "securityContext": values["securityContexts"]["containers"],
        "volumeMounts": [*values["volumeMounts"], *part.get("extraVolumeMounts", [])],
    }
    spec = {
        "containers": [container],
        "securityContext": values["securityContexts"]["pod"],
        "volumes": [*values["volumes"], *part.get("extraVolumes", [])],
        "nodeSelector": part.get("nodeSelector", {}),
        "tolerations": part.get("tolerations", []),
        "terminationGracePeriodSeconds": part.get("terminationGracePeriodSeconds", 30),
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": part["name"].lower()}, "spec": spec}


def _validates(pod: dict[str, Any]) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix=pod["metadata"]["name"]) as file:
        yaml.safe_dump(pod, file)
        file.flush()
        return _run("kubernetes-validate", "--strict", "-k", KUBERNETES, file.name)


def _run(tool: str, *arguments: str) -> int:
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True)  # noqa: S603 - a pinned tool
    sys.stdout.write(f"{tool}: {'passed' if done.returncode == 0 else 'failed'}\n")
    if done.returncode:
        sys.stdout.write(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    main()
