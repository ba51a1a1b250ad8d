"""The files of infra/ as the tools read them that will: kustomize, Kubernetes' schemas, compose, hadolint, shellcheck.

What must hold whatever tool there is (no port for strangers, no password in a file) is read off the files themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

INFRA = Path(__file__).parent.parent / "infra"
COMPOSE = INFRA / "compose" / "compose.yaml"
KUBERNETES_VERSION = "1.33"


def tool(name: str) -> str:
    """Its path, also beside this Python; without it the test is skipped."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not here; make test-infra")
    return found


def said_by(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    return [one for one in YAML(typ="safe", pure=True).load_all(text) if one is not None]


def test_the_dockerfile_is_linted():
    said_by(tool("hadolint"), str(INFRA / "container" / "Dockerfile"))


def test_no_image_runs_as_root_and_each_says_its_commit():
    for stage in (INFRA / "container" / "Dockerfile").read_text().split("\nFROM ")[2:]:
        assert re.search(r"^USER [1-9]\d*$", stage, re.M)
        assert "org.opencontainers.image.revision=$COMMIT" in stage
        assert "HEALTHCHECK" in stage


def test_the_batch_script_is_linted():
    script = str(INFRA / "slurm" / "gatesweep.sbatch")
    said_by("bash", "-n", script)
    said_by(tool("shellcheck"), script)


def test_compose_reads_its_file_and_wants_every_secret():
    command = [tool("docker-compose"), "-f", str(COMPOSE), "config"]
    said_by(*command, POSTGRES_PASSWORD="a", RAY_AUTH_TOKEN="b")
    for missing in ("POSTGRES_PASSWORD", "RAY_AUTH_TOKEN"):
        given = {"POSTGRES_PASSWORD": "a", "RAY_AUTH_TOKEN": "b", missing: ""}
        refused = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given}, check=False)
        assert refused.returncode != 0
        assert missing in refused.stderr


def test_compose_publishes_on_loopback_alone_and_every_variable_is_in_the_example():
    content = documents(COMPOSE.read_text())[0]
    published = [port for service in content["services"].values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)
    example = (INFRA / "compose" / ".env.example").read_text()
    for name in re.findall(r"\$\{(\w+)", COMPOSE.read_text()):
        assert re.search(rf"^(?:# .*)?{name}=", example, re.M), name
    for secret in ("POSTGRES_PASSWORD", "RAY_AUTH_TOKEN"):
        assert re.search(rf"^{secret}=$", example, re.M), "an example's password is everyone's"


@pytest.mark.parametrize("overlay", ["base", "gpu"])
def test_manifests_are_built_and_obey_the_schemas(overlay: str):
    validator = pytest.importorskip("kubernetes_validate", reason="make test-infra")
    built = documents(said_by(tool("kubectl"), "kustomize", str(INFRA / "kubernetes" / overlay)))
    assert {one["kind"] for one in built} >= {"Namespace", "PersistentVolumeClaim", "NetworkPolicy", "RayCluster"}
    for one in built:
        for checked in pods_of(one) if one["kind"] == "RayCluster" else [one]:
            validator.validate(checked, KUBERNETES_VERSION, strict=True)
        if overlay == "gpu" and one["kind"] == "RayCluster":
            ranks = pods_of(one)[1]["spec"]["containers"][0]
            assert ranks["resources"]["limits"]["nvidia.com/gpu"] == "8"
            assert "NCCL_SOCKET_IFNAME" in [variable["name"] for variable in ranks["env"]]


def pods_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """KubeRay's own schema is in no package; what is a pod in it has Kubernetes'."""
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        for group in groups
    ]


def test_manifests_hold_no_secret_and_every_pod_is_restricted():
    found = [one for path in INFRA.rglob("kubernetes/base/*.yaml") for one in documents(path.read_text())]
    assert "Secret" not in {one["kind"] for one in found}
    (cluster,) = [one for one in found if one["kind"] == "RayCluster"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert len(pods_of(cluster)) == 2
    for pod in pods_of(cluster):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 180
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_manifests_ray_is_the_one_that_is_installed():
    pinned = re.search(r"^ray==(\S+)$", (INFRA.parent / "constraints.txt").read_text(), re.M)
    assert pinned
    assert f"rayVersion: {pinned[1]} " in (INFRA / "kubernetes" / "base" / "raycluster.yaml").read_text()
