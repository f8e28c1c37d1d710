"""`hpdist preflight` by real processes, each started as on a machine of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from hpdist import cli
from hpdist.data.config import Labeled, Source
from hpdist.distributed.rendezvous import Endpoint, Rendezvous
from hpdist.errors import DistributedError
from hpdist.preflight.datasets import _first_row
from hpdist.preflight.facts import _own_gpu
from hpdist.preflight.findings import table
from hpdist.preflight.gradients import _finding
from hpdist.preflight.machines import check_versions
from hpdist.preflight.network import measure_in_process
from hpdist.preflight.network_checks import check_nccl, nccl_finding, shared_gpus
from tests.support.pictures import write_pictures
from tests.support.ranks import free_port, run_ranks
from tests.support.two_hosts import LINE, MISSING, two_hosts


def start(*arguments: object, cwd: Path | None = None, before: tuple[str, ...] = (), **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.Popen(
        [*before, sys.executable, "-m", "hpdist", "preflight", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables,
    )


@pytest.fixture
def here(monkeypatch, capfd):
    """Run the command in this process: its status, and what it says. It sets a variable."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["preflight", *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def ended(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def verdicts(out: str) -> dict[str, str]:
    return {
        m[2]: m[1] for m in re.finditer(r"^(ok|note|FAILED) +(\S+(?: \S+)?)", out, re.MULTILINE)
    }


def write_config(folder: Path, files: object, run_dir: str) -> Path:
    config = {
        "run": {"dir": run_dir},
        "model": {"name": "mlp"},
        "algorithm": {"name": "fixmatch"},
        "steps": 1,
        "data": {
            "labeled": {"path": "parquet", "data_files": files},
            "unlabeled": {"path": "parquet", "data_files": files, "streaming": True},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def test_two_processes_that_fit_are_told_so_once(tmp_path):
    files = [str(path) for path in write_pictures(tmp_path)]
    config = write_config(tmp_path, files, str(tmp_path / "runs"))
    place = ["--processes", 2, "--address", "127.0.0.1", "--port", free_port()]
    second = start(config, *place, "--rank", 1)
    status, out, err = ended(start(config, *place, "--rank", 0))
    assert (status, err) == (0, "")
    assert ended(second) == (0, "", "")
    found = verdicts(out)
    assert {"processes", "versions", "precision", "network", "run folder"} <= found.keys()
    assert {"data.labeled", "data.unlabeled"} <= found.keys()
    assert "FAILED" not in found.values()
    assert "2 on 1 hosts" in out
    assert not list((tmp_path / "runs").iterdir())  # it leaves nothing behind


@pytest.mark.slow
def test_the_engine_of_a_config_takes_a_step(tmp_path):
    files = [str(path) for path in write_pictures(tmp_path)]
    config = write_config(tmp_path, files, str(tmp_path / "runs"))
    place = ["--processes", 2, "--address", "127.0.0.1", "--port", free_port(), "--timeout", 120]
    place += ["--zero.stage", 2, "--precision", "bf16"]
    second = start(config, *place, "--rank", 1)
    status, out, err = ended(start(config, *place, "--rank", 0))
    assert (status, err) == (0, "")
    assert ended(second) == (0, "", "")
    assert verdicts(out)["gradients"] == "ok"
    assert "bf16, 2 ranks over gloo: one step differs by 0.00" in out


def test_a_wrong_step_and_one_without_end_are_findings():
    wrong = {"passed": False, "said": "ZeRO-2 of DeepSpeed 0.18.2: one step differs by 0.56"}
    assert _finding([wrong, wrong], ["a", "b"]).verdict == "FAILED"
    failed = _finding([{"passed": True, "said": ""}, "RuntimeError: no"], ["a", "b"])
    assert (failed.verdict, failed.text) == ("FAILED", "process 1 on b: RuntimeError: no")
    late = _finding(["not done within 60 s"] * 2, ["a", "b"])
    assert late.verdict == "note"
    assert "a larger --timeout" in late.text


def test_who_does_not_come_is_named_in_time():
    began = time.monotonic()
    place = ["--processes", 3, "--address", "127.0.0.1", "--port", free_port(), "--timeout", 10]
    second = start(*place, "--rank", 2)
    for status, out, err in (ended(start(*place, "--rank", 0)), ended(second)):
        assert (status, out) == (3, "")
        (line,) = err.splitlines()
        assert "only 2 of 3 processes came" in line
        assert "missing: 1." in line
    assert time.monotonic() - began < 60


def meet_late(folder: Path, ports: list[int], delays: list[dict[int, float]]) -> list[str]:
    """What this rank is told when each rank comes so many seconds late, or not at all."""
    rank = int(os.environ["RANK"])
    text = []
    for number, (port, late) in enumerate(zip(ports, delays, strict=True)):
        (folder / f"{number}-{rank}").touch()
        while len(list(folder.glob(f"{number}-*"))) < 3:
            time.sleep(0.01)
        if rank not in late:
            text.append("")
            continue
        time.sleep(late[rank])
        try:
            Rendezvous.of(Endpoint(rank, 3, "127.0.0.1", port), timeout=4)
        except DistributedError as error:
            text.append(str(error))
    return text


def test_every_process_names_the_missing_one_whenever_it_comes(tmp_path):
    delays = [{0: 0, 2: 0}, {0: 1.5, 2: 0}, {0: 0, 2: 1.5}, {0: 0, 1: 0}]
    ports = [free_port() for _ in delays]
    text = run_ranks(3, meet_late, tmp_path, ports, delays)
    for number, late in enumerate(delays):
        (missing,) = {0, 1, 2} - late.keys()
        for rank in late:
            assert f"only 2 of 3 processes came to 127.0.0.1:{ports[number]}" in text[rank][number]
            assert f"missing: {missing}." in text[rank][number]


def test_one_that_comes_too_late_is_told(tmp_path):
    """The first process has left, or is about to and says that this one is missing."""
    port = free_port()
    text = run_ranks(3, meet_late, tmp_path, [port], [{0: 0, 1: 0, 2: 4.5}])
    assert all("missing: 2." in text[rank][0] for rank in (0, 1))
    assert "missing: 2." in text[2][0] or f"no connection to 127.0.0.1:{port}" in text[2][0]


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_first_process_that_is_lost_is_told_in_one_line(how):
    port = free_port()
    place = ["--processes", 3, "--address", "127.0.0.1", "--port", port, "--timeout", 10]
    first, second = start(*place, "--rank", 0), start(*place, "--rank", 1)
    connected = psutil.Process(second.pid).net_connections
    while not any(
        c.status == psutil.CONN_ESTABLISHED and c.raddr.port == port for c in connected()
    ):
        time.sleep(0.01)
    time.sleep(0.5)  # the first process has taken the connection, and been told who it is
    first.send_signal(how)
    try:
        status, out, err = ended(second)
    finally:
        first.kill()
        first.communicate()
    assert (status, out) == (3, "")
    (line,) = err.splitlines()
    assert "process 1 of 3" in line
    if how == signal.SIGKILL:  # the other may have been stopped before it had taken the connection
        assert f"the first process, at 127.0.0.1:{port}, has left" in line


def test_nobody_at_the_address_is_one_clear_line():
    place = ["--processes", 2, "--address", "127.0.0.1", "--port", free_port(), "--timeout", 2]
    status, out, err = ended(start(*place, "--rank", 1))
    assert (status, out) == (3, "")
    (line,) = err.splitlines()
    assert "no connection to 127.0.0.1:" in line
    assert "start preflight on the first machine too" in line


def test_a_run_folder_of_each_machine_and_lost_data_are_found(tmp_path):
    """Each process works in a folder of its own, as on a disk of its own."""
    files = [str(path) for path in write_pictures(tmp_path)]
    here, there = tmp_path / "here", tmp_path / "there"
    write_config(here, files, "runs")
    write_config(there, [*files, str(tmp_path / "lost.parquet")], "runs")
    place = ["--processes", 2, "--address", "127.0.0.1", "--port", free_port()]
    second = start("run.yaml", *place, "--rank", 1, cwd=there)
    status, out, err = ended(start("run.yaml", *place, "--rank", 0, cwd=here))
    assert status == ended(second)[0] == 3
    assert verdicts(out)["run folder"] == "FAILED"
    assert "put run.dir on a file system that all machines share" in out
    assert "not ready to train: run folder" in err


def test_data_that_cannot_be_read_is_found(tmp_path, here):
    config = write_config(tmp_path, str(tmp_path / "lost.parquet"), str(tmp_path / "runs"))
    status, out, err = here(config)
    assert status == 3
    assert verdicts(out)["data.labeled"] == "FAILED"
    assert "lost.parquet" in out
    assert "Traceback" not in err


def test_a_first_row_is_looked_for_where_the_run_will_read(tmp_path):
    """The files of the split, a slice of which a table may take; an empty file is passed over."""
    empty, full = write_pictures(tmp_path, [[0], [20, 30]])
    (tmp_path / "rows.csv").write_text("input,label\n1,0\n2,1\n")

    def first(path: str, files: object, split: str, kind: type[Source] = Labeled) -> str | None:
        return _first_row(kind(path=path, data_files=files, split=split), "data.labeled")

    files = {"train": [str(empty), str(full)], "test": str(empty)}
    assert first("parquet", files, "train[:10]+test") is None
    assert first("parquet", files, "test") == "it has no rows"
    assert "validation" in str(first("parquet", files, "validation"))
    assert first("csv", str(tmp_path / "rows.csv"), "train[:1]") is None
    full.write_bytes(full.read_bytes()[:-100])
    assert "ArrowInvalid" in str(first("parquet", files, "train"))


def test_a_precision_that_the_device_lacks_is_found(tmp_path, here, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files = [str(path) for path in write_pictures(tmp_path)]
    config = write_config(tmp_path, files, str(tmp_path / "runs"))
    status, out, err = here(config, "--precision", "fp16")
    assert status == 3, err
    assert verdicts(out)["precision"] == "FAILED"


def test_a_torch_that_cannot_shard_by_fsdp2_is_found(tmp_path, here, monkeypatch):
    files = [str(path) for path in write_pictures(tmp_path)]
    config = write_config(tmp_path, files, str(tmp_path / "runs"))
    settings = (config, "--shard.engine", "fsdp2")
    assert verdicts(here(*settings)[1])["sharding"] == "ok"
    module = "torch.distributed.fsdp.FSDPModule"
    monkeypatch.delattr(f"{module}.set_reduce_scatter_unused_params")
    status, out, err = here(*settings)
    assert status == 3, err
    assert verdicts(out)["sharding"] == "FAILED"
    assert "shard.engine: fsdp2 needs torch 2.13 or newer" in " ".join(out.split())


def test_other_versions_on_one_host_are_named():
    facts = [
        {"host": "a", "versions": {"torch": "2.13", "datasets": "5.2"}},
        {"host": "b", "versions": {"torch": "2.12", "datasets": "5.2"}},
    ]
    finding = check_versions(facts)
    assert finding.verdict == "FAILED"
    assert finding.text.splitlines()[0] == "torch: 2.13 on a, 2.12 on b"
    assert "datasets" not in finding.text
    assert check_versions(facts[:1] * 2).verdict == "ok"
    assert len(table([finding]).splitlines()) == 2


def measured_apart(port: int, seconds: float, network_of_1: str) -> object:
    rank = int(os.environ["RANK"])
    with Rendezvous.of(Endpoint(rank, 2, "127.0.0.1", port), 60) as peers:
        if rank == 1 and network_of_1:
            os.environ["GLOO_SOCKET_IFNAME"] = network_of_1
        speed = measure_in_process("gloo", "cpu", peers.endpoint, seconds)
        peers.gathered(None)
    return speed


def test_what_is_measured_beside_the_processes_is_what_they_reach():
    found = run_ranks(2, measured_apart, free_port(), 60, "")
    for speed in found:
        assert (speed.processes, speed.size) == (2, 64 << 20)
        assert 0 < speed.latency < speed.seconds
    finding = nccl_finding(found, ["a", "b"])
    assert finding.verdict == "ok"
    assert "64 MiB in" in finding.text


@pytest.mark.slow
def test_a_network_that_does_not_carry_is_found_and_ends_nobody():
    """The process beside rank 1 fails at once; the one beside rank 0 waits for it in vain."""
    found = run_ranks(2, measured_apart, free_port(), 15, "nowhere0")
    finding = nccl_finding(found, ["a", "b"])
    assert finding.verdict == "FAILED"
    assert "process 0 on a: " in finding.text
    (line,) = [line for line in finding.text.splitlines() if line.startswith("process 1 on b: ")]
    assert "nowhere0" in line
    assert "NCCL_DEBUG=INFO" in finding.text


def test_measuring_that_takes_too_long_is_given_up():
    began = time.monotonic()
    found = run_ranks(2, measured_apart, free_port(), 0.2, "")
    assert found == ["not done within 0.2 s"] * 2
    assert time.monotonic() - began < 60


def test_processes_that_share_a_gpu_are_noted():
    gpus = [{"uuid": "GPU-a"}, {"uuid": "GPU-b"}]
    facts = [{"host": host, "devices": gpus, "gpu": gpu} for host, gpu in (("n0", 0), ("n0", 1))]
    assert shared_gpus(facts) == []
    facts.append({"host": "n0", "devices": gpus, "gpu": 1})
    assert shared_gpus(facts) == ["processes 1, 2 share GPU 1 of n0"]
    assert check_nccl(facts, Rendezvous(Endpoint(0, 3), None, None), 60).verdict == "note"


def test_a_process_has_the_gpu_of_its_number(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert _own_gpu(0) is None
    assert _own_gpu(4) == 0  # one process on this host
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert _own_gpu(4) == 1
    assert _own_gpu(1) == 0  # SLURM shows each task its own
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _own_gpu(4) == 3


def test_a_launcher_says_who_is_who():
    torchrun = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    assert Endpoint.from_environment(torchrun) == Endpoint(3, 4, "n0", 29501)
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "MAIN_IP": "n0", "MAIN_PORT": "20007"}
    assert Endpoint.from_environment(slurm) == Endpoint(1, 2, "n0", 20008)
    assert Endpoint.from_environment({}) == Endpoint(0, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--processes", "2"], "go together"),
        (["--processes", "2", "--rank", "2", "--address", "a"], "--rank 2 is not one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, text, here):
    status, _, err = here(*arguments)
    assert status == 2
    assert text in err


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_two_hosts_on_a_slow_line_are_measured():
    """100 Mbit/s: what it finds is a little less than what the line carries."""
    with two_hosts("hppre") as hosts:
        hosts.limit("100mbit")
        place = ["--processes", 2, "--address", hosts.addresses[0], "--port", free_port()]
        other = start(*place, "--rank", 1, before=hosts.on(1), GLOO_SOCKET_IFNAME=LINE)
        status, out, err = ended(
            start(*place, "--rank", 0, before=hosts.on(0), GLOO_SOCKET_IFNAME=LINE)
        )
        assert status == 0, err
        assert ended(other)[0] == 0
    rate = float(re.search(r"([\d.]+) Gbit/s", out)[1])
    assert 0.05 < rate <= 0.105
