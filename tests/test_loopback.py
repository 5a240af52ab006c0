"""Nobody from outside: what a session of this machine listens on, and who may read the token that it asks for."""

from __future__ import annotations

import ipaddress
import socket
import stat
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from pipeline.core import session
from pipeline.core.outcome import JobError
from pipeline.core.session import keep_token_private
from pipeline.training.process_group import interface_of


def outside(processes: list[psutil.Process]) -> tuple[int, set[str]]:
    """How many sockets these processes listen on, and the addresses among them that are not loopback's."""
    heard = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            heard += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    places = {ipaddress.ip_address(each) for each in heard}
    return len(heard), {str(each) for each in places if not (getattr(each, "ipv4_mapped", None) or each).is_loopback}


@pytest.mark.usefixtures("ray_cluster")
def test_a_session_of_this_machine_listens_on_loopback_alone() -> None:
    import ray

    ray.get(ray.remote(lambda: 1).remote())  # a worker process is there
    processes = [own := psutil.Process(), *own.children(recursive=True)]
    assert {"raylet", "gcs_server"} <= {process.name() for process in processes if process.is_running()}
    sockets, places = outside(processes)
    assert sockets > 2
    assert places == set()


@pytest.mark.usefixtures("ray_cluster")
def test_the_rendezvous_of_training_workers_listens_on_loopback_alone() -> None:
    import ray

    def serve() -> tuple[int, int, set[str]]:
        from pipeline.training.process_group import _serve

        before, _ = outside([psutil.Process()])
        _serve(timedelta(seconds=60))
        return before, *outside([psutil.Process()])

    before, after, places = ray.get(ray.remote(serve).remote())
    assert (after, places) == (before + 1, set())


def test_a_token_is_made_once_for_this_user_s_eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    keep_token_private()
    token = tmp_path / ".ray" / "auth_token"
    first = token.read_text()
    assert len(first) >= 32
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o644)  # one that Ray made
    keep_token_private()
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == (first, 0o600)
    token.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    keep_token_private()
    assert not token.exists()  # one is given


def test_an_address_at_which_nobody_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REACH_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        session._reach(address)
        session._reach(f"ray://{address}")
        session._reach("auto")
    for nobody in (address, f"ray://{address}", "127.0.0.1:port"):
        with pytest.raises(JobError, match=f"RAY_ADDRESS: nothing answers at {nobody} "):
            session._reach(nobody)


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex() if name.startswith("lo")}
    assert interface_of("192.0.2.1") is None  # of documentation, RFC 5737
