"""virtvdpad's control socket with clients good and bad, and the command lines of virtvdpad and virt-vdpa."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from libvirt_vdpa.client import ControlError
from libvirt_vdpa.metadata import xml_folder
from tests.harness.daemon_host import PROGRAMS, DaemonHost

MAC = "52:54:00:76:64:01"


class TestControlSocket:
    """QMP, from clients good and bad."""

    def test_only_root_may_use_it(self, host: DaemonHost) -> None:
        assert host.socket.stat().st_mode & 0o777 == 0o600

    def test_commands_need_no_newline_and_answers_come_in_order(self, host: DaemonHost) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(host.socket))
            answers = client.makefile("r")
            assert "QMP" in json.loads(answers.readline())
            client.sendall(b'{"execute":"query-status","id":0}{"execute":"qmp_capabilities","id":1}')
            client.sendall(b'{"execute":"query-commands","id":[2]} {"execute":"no-such"}{"execute":')
            assert json.loads(answers.readline())["error"]["class"] == "CommandNotFound"
            assert json.loads(answers.readline()) == {"return": {}, "id": 1}
            commands = json.loads(answers.readline())
            assert {"name": "hook"} in commands["return"]
            assert commands["id"] == [2]
            assert json.loads(answers.readline())["error"]["class"] == "CommandNotFound"

    @pytest.mark.parametrize(
        "garbage",
        [
            b"garbage\n",
            b"\x00\xff" * 100,
            b"[" * 100_000,
            b'{"a":' * 50_000 + b"}" * 50_000,
            b'{"x": "' + b"a" * 9_000_000,
        ],
        ids=["text", "bytes", "brackets", "nested", "endless"],
    )
    def test_garbage_ends_its_connection_and_nothing_else(self, host: DaemonHost, garbage: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(host.socket))
            try:
                client.sendall(garbage)
                answers = client.makefile("rb").read()
                assert b'"error"' in answers
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert host.answers()

    def test_a_client_that_does_not_read_holds_nobody_up(self, host: DaemonHost) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(host.socket))
            client.sendall(b'{"execute":"qmp_capabilities"}')
            client.settimeout(1)
            with pytest.raises(TimeoutError):
                client.sendall(b'{"execute":"query-commands"}' * 100_000)
            host.hook(host.domain(), "prepare")
            assert host.stop() == 0

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"domain": 1, "operation": "prepare", "xml": ""}, {"domain": "a", "operation": "prepare"}],
    )
    def test_a_hook_command_with_wrong_arguments(
        self, host: DaemonHost, arguments: dict[str, object]
    ) -> None:
        with pytest.raises(ControlError, match=r"hook: argument '\w+' must be a string"):
            host.ask("hook", arguments=arguments)

    def test_events_tell_what_becomes_of_a_port(self, host: DaemonHost) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(host.socket))
            lines = client.makefile("r")
            lines.readline()
            client.sendall(b'{"execute":"qmp_capabilities"}')
            lines.readline()
            host.hook(host.domain(), "prepare")
            states = []
            while "serving" not in states:
                event = json.loads(lines.readline())
                assert event["event"] == "PORT_STATE_CHANGE"
                states.append(event["data"]["state"])
            assert states == ["starting", "serving"]


class TestPrograms:
    """virtvdpad's and virt-vdpa's own mistakes and output."""

    def run(self, name: str, *words: Path | str) -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAMS / name), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    def test_a_second_daemon_is_refused(self, host: DaemonHost) -> None:
        done = self.run("virtvdpad", f"--config={host.configuration}")
        assert host.daemon is not None
        message = f"another virtvdpad (pid {host.daemon.pid}) serves it; stop that one first"
        assert (done.returncode, done.stderr) == (1, f"virtvdpad: {host.folder}: {message}\n")
        assert host.answers()

    def test_a_configuration_that_cannot_be_read(self, tmp_path: Path) -> None:
        done = self.run("virtvdpad", f"--config={tmp_path}/no.toml")
        assert (done.returncode, done.stderr) == (
            1,
            f"virtvdpad: {tmp_path}/no.toml: No such file or directory\n",
        )

    @pytest.mark.parametrize("name", ["virtvdpad.lock", "virtvdpad.sock"])
    def test_a_folder_where_a_file_should_be(self, idle: DaemonHost, name: str) -> None:
        (idle.folder / name).mkdir()
        configuration = idle.folder / "other.toml"
        configuration.write_text(
            f'run-folder = "{idle.folder}"\nlog-folder = "{idle.folder}"\nlibvirt-uri = ""'
        )
        done = self.run("virtvdpad", f"--config={configuration}", "--log-level=error")
        assert done.returncode == 1
        assert done.stderr.startswith("virtvdpad: ")
        assert f"{idle.folder / name}: " in done.stderr
        assert done.stderr.count("\n") == 1

    def test_tables(self, host: DaemonHost) -> None:
        host.hook(host.domain(), "prepare")
        for command, words in (
            ("status", ["default", "ifcvf", "2", "1"]),
            ("ports", ["vdpa-demo", MAC, "serving"]),
            ("devices", ["vf0.sock", "lent", "vf1.sock", "free"]),
        ):
            done = self.run("virt-vdpa", f"--socket={host.socket}", command)
            assert done.returncode == 0
            # On a host without a ConnectX devices says why it has none.
            assert [line for line in done.stderr.splitlines() if "mlx5 is off: " not in line] == []
            assert all(word in done.stdout for word in words)
            as_json = self.run("virt-vdpa", f"--socket={host.socket}", command, "--json")
            assert isinstance(json.loads(as_json.stdout), dict)

    def test_no_daemon_to_ask(self, idle: DaemonHost) -> None:
        done = self.run("virt-vdpa", f"--socket={idle.socket}", "ports")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("virt-vdpa: virtvdpad does not answer: ")
        assert done.stderr.count("\n") == 1

    def test_xml_check_names_the_line(self, tmp_path: Path) -> None:
        file = tmp_path / "d.xml"
        text = (xml_folder() / "vdpa-demo.xml").read_text()
        file.write_text(text)
        assert self.run("virt-vdpa", "xml", "check", file).returncode == 0
        file.write_text(text.replace("mode='shared'", "mode='private'"))
        done = self.run("virt-vdpa", "xml", "check", file)
        line = text[: text.index("<access")].count("\n") + 1
        assert done.returncode == 1
        assert done.stdout.startswith(f"{file}:{line}: guest memory is not shared")
