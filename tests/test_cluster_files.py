"""The cluster files against Ray's own schema and defaults, and the promises that their comments make."""

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = ["cluster.yaml", "cluster-local.yaml"]


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(Path(name).read_text())
    return config


def commands(config: dict[str, Any], *kinds: str) -> str:
    return "\n".join(line for kind in kinds for line in config.get(kind, []))


@pytest.mark.parametrize("name", FILES)
def test_rays_own_schema_and_checks_accept_the_file(name: str) -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert jsonschema.Draft7Validator(schema).is_valid(read(name))
    prepared = prepare_config(copy.deepcopy(read(name)))
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError, match="max_workres"):
        validate_config({**prepared, "max_workres": 3})


@pytest.mark.parametrize("name", FILES)
def test_every_node_starts_with_a_token_and_without_telemetry(name: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    everywhere = commands(config, "setup_commands")
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        text = everywhere + commands(config, kind)
        assert "RAY_AUTH_MODE=token" in text and "RAY_USAGE_STATS_ENABLED=0" in text
        assert "MLFLOW_DISABLE_TELEMETRY=true" in text and "--disable-usage-stats" in text
    assert "chmod 600 ~/.ray/auth_token" in everywhere


@pytest.mark.parametrize("name", FILES)
def test_versions_are_pinned_by_the_projects_constraints(name: str) -> None:
    text = commands(read(name), "setup_commands")
    assert "python3.12" in text and "-c ~/fedsim/constraints.txt" in text
    pinned = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
    assert pinned["ray"] == version("ray")


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_is_on_the_loopback(name: str) -> None:
    text = commands(read(name), "head_start_ray_commands")
    assert "--dashboard-host=127.0.0.1" in text and "--dashboard-host=0.0.0.0" not in text


def test_only_ssh_is_open_to_one_address_on_aws() -> None:
    (rule,) = read("cluster.yaml")["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) == (22, 22, "tcp")
    assert all(source["CidrIp"].endswith("/32") for source in rule["IpRanges"])


def test_aws_has_idle_shutdown_and_a_cpu_and_a_gpu_type() -> None:
    config = read("cluster.yaml")
    assert config["idle_timeout_minutes"] <= 10 and config["provider"]["cache_stopped_nodes"] is False
    workers = {name: node for name, node in config["available_node_types"].items() if name != "head"}
    assert set(workers) == {"cpu", "gpu"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}, "no trial beside MLflow"


def test_mlflow_stands_on_postgresql_and_object_storage() -> None:
    text = commands(read("cluster.yaml"), "head_setup_commands", "head_start_ray_commands")
    assert "postgresql://mlflow:$(cat ~/.mlflow-password)@127.0.0.1/mlflow" in text
    assert "--artifacts-destination $MLFLOW_BUCKET" in text and "s3://" in text
