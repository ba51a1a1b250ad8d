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


def built(overlay: str) -> list[dict[str, Any]]:
    return documents(said_by(tool("kubectl"), "kustomize", str(INFRA / "kubernetes" / overlay)))


@pytest.mark.parametrize("overlay", ["base", "gpu", "job"])
def test_manifests_are_built_and_obey_the_schemas(overlay: str):
    validator = pytest.importorskip("kubernetes_validate", reason="make test-infra")
    jsonschema = pytest.importorskip("jsonschema", reason="make test-infra")
    found = built(overlay)
    wanted = {"Namespace", "PersistentVolumeClaim", "NetworkPolicy", "RayJob" if overlay == "job" else "RayCluster"}
    assert {one["kind"] for one in found} == wanted | {"PodDisruptionBudget"}
    for one in found:
        if one["kind"] in KUBERAY:
            jsonschema.validate(one, KUBERAY[one["kind"]])
        for checked in pods_of(one) if one["kind"] in KUBERAY else [one]:
            validator.validate(checked, KUBERNETES_VERSION, strict=True)
        if overlay == "gpu" and one["kind"] == "RayCluster":
            ranks = pods_of(one)[1]["spec"]["containers"][0]
            assert ranks["resources"]["limits"]["nvidia.com/gpu"] == "8"
            assert "NCCL_SOCKET_IFNAME" in [variable["name"] for variable in ranks["env"]]


def closed(optional: dict[str, Any], **required: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    properties = {**optional, **required}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, NUMBER, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
POD = closed({"metadata": {"type": "object"}}, spec={"type": "object"})
START = {"type": "object", "additionalProperties": TEXT}
HEAD = closed({}, rayStartParams=START, template=POD)
WORKERS = closed(
    {"replicas": NUMBER}, groupName=TEXT, minReplicas=NUMBER, maxReplicas=NUMBER, rayStartParams=START, template=POD
)
CLUSTER = closed(
    {"rayVersion": TEXT, "authOptions": closed({"mode": {"enum": ["disabled", "token"]}})},
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = closed(
    {
        "backoffLimit": NUMBER,
        "shutdownAfterJobFinishes": TRUTH,
        "ttlSecondsAfterFinished": NUMBER,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterPodTemplate": POD,
    },
    entrypoint=TEXT,
    rayClusterSpec=CLUSTER,
)
KUBERAY = {
    kind: closed({}, apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, metadata={"type": "object"}, spec=spec)
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}
"""KubeRay's schema is in no package. These are the fields used here, as KubeRay 1.7.1's reference names them."""


def cluster_of(one: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = one["spec"]
    return spec["rayClusterSpec"] if one["kind"] == "RayJob" else spec


def pods_of(one: dict[str, Any]) -> list[dict[str, Any]]:
    """What is a pod in a RayCluster or a RayJob has Kubernetes' own schema."""
    groups = [cluster_of(one)["headGroupSpec"], *cluster_of(one)["workerGroupSpecs"]]
    templates = [group["template"] for group in groups]
    if "submitterPodTemplate" in one["spec"]:
        templates.append(one["spec"]["submitterPodTemplate"])
    labels = [{"name": "x", "labels": template["metadata"]["labels"]} for template in templates]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        for metadata, template in zip(labels, templates, strict=True)
    ]


def test_a_rayjobs_cluster_is_the_base_one_and_its_policy_covers_every_pod():
    (job,) = [one for one in built("job") if one["kind"] == "RayJob"]
    (cluster,) = [one for one in built("base") if one["kind"] == "RayCluster"]
    (policy,) = [one for one in built("job") if one["kind"] == "NetworkPolicy"]
    cluster_of(cluster)["headGroupSpec"]["rayStartParams"]["dashboard-host"] = "0.0.0.0"
    assert cluster_of(job) == cluster_of(cluster)
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert [pod["metadata"]["labels"] for pod in pods_of(job)] == [selected] * 3
    assert {pod["spec"]["containers"][0]["image"] for pod in pods_of(job)} == {"registry.example.org/gatesweep:cpu"}
    own, operator = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": selected}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]


def test_manifests_hold_no_secret_and_every_pod_is_restricted():
    found = [one for path in INFRA.rglob("kubernetes/*/**/*.yaml") for one in documents(path.read_text())]
    kinds = {one["kind"]: one for one in found if isinstance(one, dict)}
    assert "Secret" not in kinds
    assert kinds["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}
    pods = pods_of(kinds["RayCluster"])
    assert len(pods) == 2
    assert all(pod["spec"]["terminationGracePeriodSeconds"] >= 180 for pod in pods)
    for pod in [*pods, {"spec": kinds["RayJob"]["spec"]["submitterPodTemplate"]["spec"]}]:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_manifests_ray_is_the_one_that_is_installed():
    pinned = re.search(r"^ray==(\S+)$", (INFRA.parent / "constraints.txt").read_text(), re.M)
    assert pinned
    assert f"rayVersion: {pinned[1]} " in (INFRA / "kubernetes" / "base" / "raycluster.yaml").read_text()
