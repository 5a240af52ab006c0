"""The files that describe clusters, each against the schema or the linter of those whose format it is.

Not covered: the fields of KubeRay's own kinds and of Karpenter's beyond their names, types and enums as their API
reference has them (no package carries those schemas), and whether any of it runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.core.cluster import BOOTSTRAP, Node, addable_nodes

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
GUIDE = CLUSTER / "README.md"
KUBERNETES = "1.34"
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


@cache
def kubernetes_objects() -> list[dict[str, Any]]:
    files = sorted((CLUSTER / "kuberay").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [each for each in kubernetes_objects() if each["kind"] == kind]
    return found


def pod_templates() -> dict[str, dict[str, Any]]:
    cluster = of_kind("RayCluster")["spec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {
        "head": cluster["headGroupSpec"]["template"],
        **groups,
        "submitter": of_kind("RayJob")["spec"]["submitterPodTemplate"],
        "redis": of_kind("StatefulSet")["spec"]["template"],
    }


def ray_containers() -> list[dict[str, Any]]:
    return [template["spec"]["containers"][0] for name, template in pod_templates().items() if name != "redis"]


def linted(name: str, *arguments: str | Path) -> str:
    """What a linter of this environment finds."""
    command = [Path(sys.executable).with_name(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "not found" not in done.stderr
    return done.stdout + done.stderr if done.returncode or done.stdout else ""


def aws() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))


def test_ray_takes_its_cluster_file_and_no_wrong_one() -> None:
    config = prepare_config(aws())
    validate_config(config)
    types = config["available_node_types"]
    workers = {name: of for name, of in types.items() if name != config["head_node_type"]}
    assert set(workers) == {"cpu_worker", "gpu_worker"}
    for of in workers.values():
        assert of["min_workers"] == 0
        assert of["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu_worker"]["resources"]["GPU"] == 1
    assert types["head"]["resources"]["CPU"] == 0
    assert sum(of["max_workers"] for of in workers.values()) == config["max_workers"]
    for wrong in ({"idle_timeout": 5}, {"max_workers": "many"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(prepare_config(aws() | wrong))


def test_a_job_on_its_head_counts_on_what_it_may_add(tmp_path: Path) -> None:
    """A GPU that is not there yet, for one, where `ray up` has left the file, with what Ray itself fills in."""
    head, worker = Node(0, 0, {}), Node(8, 1, {})
    assert {node.cpus for node in addable_nodes([head], tmp_path / "none")} == {2}  # somebody's own autoscaler
    assert addable_nodes([worker], tmp_path / "none") == []
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(prepare_config(aws())))
    types = aws()["available_node_types"]
    for there, gone in (([head], 0), ([head, worker], 1)):
        found = Counter((node.cpus, node.gpus) for node in addable_nodes(there, tmp_path / "c.yaml"))
        assert found == {(16, 0): types["cpu_worker"]["max_workers"], (8, 1): types["gpu_worker"]["max_workers"] - gone}


def test_on_kubernetes_it_counts_on_what_the_groups_may_add(tmp_path: Path) -> None:
    cluster, types = of_kind("RayCluster")["spec"], of_kind("ConfigMap")
    (told,) = types["data"].values()
    (tmp_path / "c.yaml").write_text(told)
    groups: Counter[tuple[float, float]] = Counter()
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        groups[float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))] += group["maxReplicas"]
    assert Counter((node.cpus, node.gpus) for node in addable_nodes([Node(0, 0, {})], tmp_path / "c.yaml")) == groups
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert {"name": "node-types", "configMap": {"name": types["metadata"]["name"]}} in head["volumes"]
    (mount,) = [each for each in head["containers"][0]["volumeMounts"] if each["name"] == "node-types"]
    assert mount["mountPath"] == f"/home/ray/{BOOTSTRAP.name}" == f"/home/ray/{mount['subPath']}"
    assert set(types["data"]) == {BOOTSTRAP.name}


def test_amazons_schemas_take_the_stack_and_the_cluster_names_its_roles() -> None:
    assert linted("cfn-lint", "--", CLUSTER / "aws.yaml") == ""
    text = (CLUSTER / "aws.yaml").read_text()
    profiles = set(re.findall(r"InstanceProfileName: ([\w-]+)", text))
    used = {of["node_config"]["IamInstanceProfile"]["Name"] for of in aws()["available_node_types"].values()}
    assert used == profiles
    assert f'ray-cluster-name": {aws()["cluster_name"]}' in text  # the head may end nodes of this name alone


def test_the_linter_has_nothing_to_say_of_the_image(tmp_path: Path) -> None:
    assert linted("hadolint", CLUSTER / "Dockerfile") == ""
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN pip install ray\nUSER root\n")
    assert {"DL3006", "DL3013", "DL3002"} <= set(re.findall(r"DL\d+", linted("hadolint", wrong)))


def test_kubernetes_takes_the_manifests_and_none_with_a_misspelt_key() -> None:
    for found in kubernetes_objects():
        assert fault(found) is None, found["kind"]
        for part in ("metadata", "spec") if found["kind"] not in OWN_KINDS else ("spec",):
            if part in found:
                assert "replica" in str(fault(found | {part: {**found[part], "replica": 1}})), found["kind"]


def fault(manifest: dict[str, Any]) -> Exception | None:
    """What its schema has against it."""
    own = OWN_KINDS.get(manifest["kind"])
    try:
        if own is None:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        else:
            jsonschema.Draft202012Validator(own).validate(manifest["spec"])
    except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
        return error
    return None


def test_pods_are_ones_that_kubernetes_takes_and_are_confined() -> None:
    for name, template in pod_templates().items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | template.get("metadata", {})}
        spec = template["spec"]
        assert fault(pod | {"spec": spec}) is None, name
        assert "container" in str(fault(pod | {"spec": {**spec, "container": []}}))
        for container in spec["containers"]:
            security = spec.get("securityContext", {}) | container["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] > 0
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert set(container["resources"]) == {"requests", "limits"}
            assert name == "submitter" or {"readinessProbe", "livenessProbe"} <= set(container)


def test_a_cluster_on_kubernetes_scales_from_nothing_and_outlives_its_head() -> None:
    spec = of_kind("RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for group in groups.values():
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
    limits = {name: of["template"]["spec"]["containers"][0]["resources"]["limits"] for name, of in groups.items()}
    assert limits["gpu"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits["cpu"]
    pools = {each["metadata"]["name"] for each in kubernetes_objects() if each["kind"] == "NodePool"}
    chosen = {of["template"]["spec"]["nodeSelector"]["karpenter.sh/nodepool"] for of in groups.values()}
    assert chosen == pools


def test_nobody_talks_to_a_cluster_without_its_token_or_from_outside() -> None:
    commands = " ".join(aws()["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    for start in (commands, " ".join(aws()["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in start.split("ray start")[0]
    assert aws()["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    cluster = of_kind("RayCluster")["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    assert not [each for each in kubernetes_objects() if each["kind"] == "Ingress" or "NodePort" in str(each)]
    guarded = [each["spec"]["podSelector"]["matchLabels"] for each in kubernetes_objects() if "Policy" in each["kind"]]
    assert guarded == [{"ray.io/cluster": "text-embedding"}, {"app.kubernetes.io/name": "redis"}]


def test_no_secret_is_in_a_file() -> None:
    files = [ROOT / "ray_cluster.yaml", *(path for path in CLUSTER.rglob("*") if path.is_file())]
    assert len(files) > 8
    for path in files:
        text = path.read_text()
        assert not re.search(r"AKIA\w{16}|pcsk_\w+|hf_\w{20}|eyJ\w{20}|-----BEGIN|\b\d{12}\b", text), path
        assert not re.search(r"(?i)(password|token|secret|api_key): *['\"]?\w{12,}", text), path
    assert not [each for each in kubernetes_objects() if each["kind"] == "Secret"]


def test_the_image_holds_what_it_copies_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert "**/*.env" in ignored


def test_versions_are_those_of_the_lock() -> None:
    assert of_kind("RayCluster")["spec"]["rayVersion"] == PINS["ray"]
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert "-c constraints.txt" in dockerfile
    assert "-c ~/pipeline/constraints.txt" in " ".join(aws()["setup_commands"])
    python = re.search(r"FROM python:(\d+\.\d+)", dockerfile)
    assert python
    assert python[1] == "3.11"  # what the tests run with
    for name, version in re.findall(r"([\w-]+)==([\w.]+)", GUIDE.read_text() + dockerfile):
        assert PINS[name] == version
    uids = {str(container["securityContext"].get("runAsUser")) for container in ray_containers()}
    assert uids == set(re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE))


def test_the_guide_names_what_there_is_and_sets_what_it_uses() -> None:
    guide = GUIDE.read_text()
    commands = "\n".join(re.findall(r"```\n(.*?)```", guide, re.DOTALL))
    used, given = set(re.findall(r"\$\{?([A-Z_]+)", commands)), set(re.findall(r"\b([A-Z_]+)=", commands))
    assert used
    assert used <= given
    for path in re.findall(r"\b(?:cluster|jobs|configs|tests)/[\w/.-]+\.\w+|ray_cluster\.yaml", guide):
        assert (ROOT / path).exists(), path
    for file in (path for path in CLUSTER.rglob("*") if path.is_file() and path != GUIDE):
        assert file.name in guide, file
    secrets = {each["secretRef"]["name"] for container in ray_containers() for each in container.get("envFrom", [])}
    for name in secrets | {"redis"}:
        assert f"create secret generic {name} " in commands


def _schema(fields: Any) -> dict[str, Any]:
    """JSON schema of a table below."""
    if isinstance(fields, list):
        return {"type": "array", "items": _schema(fields[0])}
    if isinstance(fields, str):
        return PLAIN.get(fields) or {"enum": fields.split(" | ")}
    properties = {name.rstrip("!"): _schema(inner) for name, inner in fields.items()}
    required = [name.rstrip("!") for name in fields if name.endswith("!")]
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


PLAIN: dict[str, dict[str, Any]] = {
    "object": {"type": "object"},
    "array": {"type": "array"},
    "text": {"type": "string"},
    "texts": {"type": "object", "additionalProperties": {"type": "string"}},
    "whole": {"type": "integer", "minimum": 0},
    "switch": {"type": "boolean"},
}
# Each kind's spec; `!` marks what is required. Of ray.io/v1 as in KubeRay 1.5's API reference, with pod templates
# looked at as pods, and of karpenter.sh/v1.
OWN_KINDS: dict[str, dict[str, Any]] = {kind: _schema(fields) for kind, fields in yaml.safe_load("""
RayCluster:
  rayVersion: text
  suspend: switch
  enableInTreeAutoscaling: switch
  authOptions: {mode: token | disabled}
  autoscalerOptions:
    {version: v1 | v2, upscalingMode: Default | Aggressive | Conservative, idleTimeoutSeconds: whole, image: text,
     imagePullPolicy: Always | IfNotPresent | Never, resources: object, securityContext: object, env: array,
     envFrom: array, volumeMounts: array}
  gcsFaultToleranceOptions:
    {redisAddress!: text, redisUsername: {value: text, valueFrom: object},
     redisPassword: {value: text, valueFrom: object}, externalStorageNamespace: text}
  headGroupSpec!:
    {template!: object, rayStartParams: texts, labels: texts, resources: texts,
     serviceType: ClusterIP | NodePort | LoadBalancer, enableIngress: switch}
  workerGroupSpecs:
    - {groupName!: text, template!: object, rayStartParams: texts, labels: texts, resources: texts, replicas: whole,
       minReplicas: whole, maxReplicas: whole, numOfHosts: whole, idleTimeoutSeconds: whole, suspend: switch}
RayJob:
  {entrypoint!: text, clusterSelector: texts, submissionMode: K8sJobMode | HTTPMode | InteractiveMode | SidecarMode,
   backoffLimit: whole, submitterConfig: {backoffLimit: whole}, submitterPodTemplate: object, runtimeEnvYAML: text,
   metadata: texts, shutdownAfterJobFinishes: switch, ttlSecondsAfterFinished: whole, activeDeadlineSeconds: whole}
NodePool:
  template!:
    metadata: object
    spec!:
      nodeClassRef!: {group!: text, kind!: text, name!: text}
      requirements!: [{key!: text, operator!: In | NotIn | Exists | DoesNotExist | Gt | Lt, values: [text]}]
      taints: array
  limits: object
  disruption: {consolidateAfter!: text, consolidationPolicy: WhenEmpty | WhenEmptyOrUnderutilized}
""").items()}  # fmt: skip
