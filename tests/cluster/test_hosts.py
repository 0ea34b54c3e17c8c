"""`cluster-local.yaml` on four hosts: up, a sweep as a job, a host lost in the middle, down."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import Hosts

ROOT = Path(__file__).parents[2]
RAY = "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ~/venv/bin/ray"
WORKERS = ["w1", "w2"]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

SWEEP: dict[str, Any] = {
    "name": "hosts",
    "experiment": {
        "federation": {"rounds": 120, "clients": 20, "clients_per_round": 10, "evaluate_every": 10},
        "checkpoint_every": 10,
    },
    "space": {"seed": {"grid": [0]}, "federation.learning_rate": {"grid": [0.02, 0.05, 0.1, 0.2, 0.3, 0.4]}},
    "retries": 5,
}


def cluster_file(hosts: Hosts) -> str:
    """The shipped file with the addresses, key and shared place of these hosts, and nothing to install."""
    config = yaml.safe_load((ROOT / "cluster-local.yaml").read_text())
    config["provider"]["head_ip"] = hosts.all["head"].address
    config["provider"]["worker_ips"] = [hosts.all[name].address for name in WORKERS]
    config["auth"] = {"ssh_user": "root", "ssh_private_key": f"{hosts.base}/key"}
    config["file_mounts"]["~/fedsim"] = str(ROOT)
    config["setup_commands"] = [
        line for line in config["setup_commands"] if "python" not in line and "pip" not in line
    ]
    # One CPU a host, so that the trials must spread.
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[kind] = [line.replace("ray start", "ray start --num-cpus=1") for line in config[kind]]
    return str(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    for tool in ("ip", "nsenter", "rsync", "ssh-keygen", "/usr/sbin/sshd"):
        assert shutil.which(tool), f"{tool} is missing: apt-get install iproute2 openssh-server rsync"
    with Hosts(["head", *WORKERS], ROOT / ".venv") as made:
        laptop = made.all["laptop"]
        (made.base / "cluster.yaml").write_text(cluster_file(made))
        (made.base / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
        laptop.run(f"{RAY} get-auth-token --generate > /dev/null")
        laptop.run(f"{RAY} up -y --no-config-cache {made.base}/cluster.yaml", timeout=400)
        yield made
        made.all["head"].run("pkill -x mlflow")
        laptop.run(f"{RAY} down -y {made.base}/cluster.yaml", timeout=200)
        # `ray down` ends the head; a worker ends itself when it has missed the head for a while.
        for name in ("head", "w2"):
            wait_for(lambda name=name: not left(made, name), f"nothing of Ray or MLflow is left on {name}", 180)


def left(hosts: Hosts, name: str) -> str:
    """Ray's and MLflow's processes on a host."""
    return hosts.all[name].run("ps -eo args | grep -E 'raylet|gcs_server|mlflow' | grep -v grep", check=False)


def start_missing(hosts: Hosts) -> None:
    """Start the workers that Ray's local provider has left out, by the file's own command."""
    config = yaml.safe_load((hosts.base / "cluster.yaml").read_text())
    head = hosts.all["head"]
    end = time.monotonic() + 60
    while nodes(hosts) < 1 + len(WORKERS) and time.monotonic() < end:
        time.sleep(2)
    joined = head.run(f"{RAY} list nodes --format json 2>/dev/null", check=False)
    for name in WORKERS:
        if hosts.all[name].address not in joined:
            command = f"export RAY_HEAD_IP={head.address}; {config['worker_start_ray_commands'][-1]}"
            login = f"ssh -o StrictHostKeyChecking=no -i {hosts.base}/key root@{hosts.all[name].address}"
            (hosts.base / "start.sh").write_text(command)
            hosts.all["laptop"].run(f"{login} bash -l {hosts.base}/start.sh")


def nodes(hosts: Hosts) -> int:
    text = hosts.all["head"].run(f"{RAY} list nodes --format json 2>/dev/null", check=False)
    return text.count('"ALIVE"')


def wait_for(condition: Any, what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}"
        time.sleep(1)


def mlflow_trials(hosts: Hosts) -> list[Any]:
    """The trials that MLflow's server lists over HTTP, as seen from the laptop."""
    url = f"http://{hosts.all['head'].address}:5000"
    script = (
        "from mlflow import MlflowClient\n"
        f"c = MlflowClient('{url}')\n"
        "runs = c.search_runs([e.experiment_id for e in c.search_experiments()])\n"
        "print([(r.data.tags['fedsim.trial'], r.info.status, len(c.get_metric_history(r.info.run_id, 'loss')),"
        " r.data.tags.get('hardware.host')) for r in runs if r.data.tags.get('fedsim.kind') == 'trial'])"
    )
    text = hosts.all["laptop"].run(f"~/venv/bin/python - <<'END'\n{script}\nEND", check=False)
    lines = [line for line in text.splitlines() if line.startswith("[")]
    return list(eval(lines[-1])) if lines else []  # noqa: S307  our own print


def training(hosts: Hosts) -> list[str]:
    """The hosts on which clients are trained."""
    return [h for h in ("head", *WORKERS) if "ray::ClientWorker" in hosts.all[h].run("ps -eo args", check=False)]


def test_a_sweep_survives_a_host(hosts: Hosts) -> None:
    head, base = hosts.all["head"], hosts.base
    start_missing(hosts)
    wait_for(lambda: nodes(hosts) == 1 + len(WORKERS), "the workers join the cluster")

    for command, refused in (
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong ~/venv/bin/ray job list", True),
        ("RAY_AUTH_MODE=token ~/venv/bin/ray job list", False),
    ):
        answer = head.run(f"{command} --address http://127.0.0.1:8265", check=False)
        assert ("Invalid authentication token" in answer) == refused, answer

    submit = (
        f"{RAY} job submit --address http://127.0.0.1:8265 --submission-id sweep --no-wait -- "
        f"bash -c 'cd ~ && ~/venv/bin/fedsim sweep {base}/sweep.yaml --address auto --storage {base}/shared'"
    )
    wait_for(lambda: "OK" in head.run(f"curl -s http://{head.address}:5000/health", check=False), "MLflow answers")
    head.run(submit)
    wait_for(lambda: len(mlflow_trials(hosts)) >= 3, "three trials run at once")
    wait_for(lambda: len(training(hosts)) >= 2, "trials train on two hosts")

    hosts.all["w1"].kill()
    wait_for(lambda: "succeeded" in head.run(f"{RAY} job status sweep 2>&1", check=False), "the job ends", 900)
    trials = mlflow_trials(hosts)
    assert len(trials) == 6 and len({trial for trial, *_ in trials}) == 6
    assert all(status == "FINISHED" and rounds == 120 for _, status, rounds, _ in trials)
