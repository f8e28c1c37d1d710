"""What lies in `launch/`, held against the schemas that are published for it."""

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

LAUNCH = Path(__file__).parents[3] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted([*SCRIPTS, *LAUNCH.rglob("*.yaml")])
SECRET = re.compile(r"(KEY|TOKEN|PASSWORD)\b", re.IGNORECASE)


def name_of(path):
    return str(path.relative_to(LAUNCH))


def test_there_is_a_way_to_start_everywhere():
    assert {name_of(path) for path in FILES} == {
        "local.sh",
        "hosts.sh",
        "slurm.sbatch",
        "skypilot.yaml",
        "kubernetes/trainjob.yaml",
        "kubernetes/indexed-job.yaml",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_says_at_its_top_how_to_start_it_and_what_to_change(path):
    head = path.read_text().split("\n\n")[0]
    assert "# Change: " in head
    assert f"launch/{name_of(path)}" in head
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_secret_is_on_a_command_line(path):
    for line in path.read_text().splitlines():
        if SECRET.search(line) and not line.startswith("#"):
            named = r"- name: WANDB_API_KEY|secretKeyRef|^export [A-Z_ ]*TOKEN$"
            assert re.search(named, line) or "/dev/urandom" in line, line


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_bash_and_can_be_started(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.suffix == ".sbatch" or path.stat().st_mode & 0o111


@pytest.mark.parametrize("path", [LAUNCH / "hosts.sh", LAUNCH / "slurm.sbatch"], ids=name_of)
def test_several_machines_begin_with_a_preflight_and_need_no_ssh(path):
    text = path.read_text()
    assert text.index('"$HPDIST" preflight') < text.index('"$ACCELERATE" launch')
    assert "--deepspeed_multinode_launcher standard" in text


@pytest.mark.parametrize(
    ("left_out", "told"),
    [("MACHINES", "how many machines"), ("MACHINE_RANK", "from 0"), ("MAIN_IP", "address of")],
)
def test_hosts_says_what_it_was_not_told(left_out, told):
    variables = {"MACHINES": "2", "MACHINE_RANK": "0", "MAIN_IP": "10.0.0.1", "PATH": "/bin"}
    del variables[left_out]
    done = subprocess.run(
        [LAUNCH / "hosts.sh", "run.yaml"], env=variables, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert told in done.stderr


def test_the_train_job_is_one_of_kubeflow_trainer():
    job = yaml.safe_load((LAUNCH / "kubernetes/trainjob.yaml").read_text())
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job  # an unknown key would be lost


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_indexed_job_is_one_of_kubernetes(version):
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes/indexed-job.yaml").read_text())
    for part in (service, job):
        kubernetes_validate.validate(part, version, strict=True)
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    machines = next(e["value"] for e in container["env"] if e["name"] == "MACHINES")
    assert spec["completions"] == spec["parallelism"] == int(machines)
    address = next(e["value"] for e in container["env"] if e["name"] == "MAIN_IP")
    # What Kubernetes calls the pod of index 0, below the service.
    assert address == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_the_sky_task_is_one_of_skypilot():
    schemas = pytest.importorskip("sky.utils.schemas", reason="SkyPilot is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    jsonschema.validate(task["file_mounts"]["/runs"], schemas.get_storage_schema())
