"""Settings: where they come from, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from edif_hpc import settings
from edif_hpc.errors import SettingsError
from edif_hpc.settings import ClientSettings, RelaySettings, load, load_client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_defaults(tmp_path: Path) -> None:
    found = load(RelaySettings, flags={}, environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert found == RelaySettings()
    assert found.data_dir == Path("~/.local/state/edif-hpc").expanduser()


def test_flags_over_environment_over_file_over_defaults(file: Path) -> None:
    file.write_text(
        "[relay]\nport = 1\nqueue_s = 10\nlease_s = 20\n[client]\nrelay = 'http://x'\n"
    )
    environ = {"EDIF_RELAY_PORT": "2", "EDIF_RELAY_QUEUE_S": "11", "EDIF_RELAY": "http://y"}
    found = load(RelaySettings, flags={"port": 3, "host": None}, environ=environ, file=file)
    assert (found.port, found.queue_s, found.lease_s, found.ws_grace_s) == (3, 11.0, 20.0, 60.0)
    assert isinstance(found.lease_s, float)


def test_the_file_is_found_by_the_environment(file: Path, tmp_path: Path) -> None:
    file.write_text("[relay]\nport = 7\n")
    assert load(RelaySettings, flags={}, environ={"EDIF_CONFIG": str(file)}).port == 7
    (tmp_path / "edif-hpc").mkdir()
    file.rename(tmp_path / "edif-hpc" / "config.toml")
    assert load(RelaySettings, flags={}, environ={"XDG_CONFIG_HOME": str(tmp_path)}).port == 7


@pytest.mark.parametrize(
    ("flags", "environ", "text", "words"),
    [
        ({"prot": 1}, {}, "", ["prot in the flags", "valid are", "port"]),
        ({}, {"EDIF_RELAY_PROT": "1"}, "", ["prot in the environment"]),
        ({}, {}, "[relay]\nprot = 1", ["prot in the file"]),
        ({}, {}, "[realy]\nport = 1", ["realy", "its tables are"]),
        ({}, {}, "relay = 3", ["must be a table"]),
        ({}, {}, "[relay", ["is not TOML"]),
        ({}, {"EDIF_RELAY_PORT": "many"}, "", ["port is 'many'", "int"]),
        ({}, {}, "[relay]\nport = true", ["port is True", "int"]),
        ({}, {}, "[relay]\nbehind_proxy = 'perhaps'", ["behind_proxy is 'perhaps'", "bool"]),
        ({}, {}, "[relay]\nhost = 3", ["host is 3", "str"]),
        ({"port": 70000}, {}, "", ["port is 70000"]),
        ({"queue_s": -1}, {}, "", ["queue_s is -1", "negative"]),
        ({"max_request_bytes": -1}, {}, "", ["max_request_bytes"]),
        ({"log_level": "loud"}, {}, "", ["loud", "debug"]),
        ({"public_url": "relay.example"}, {}, "", ["public_url", "http://"]),
        ({"default_wall_s": 9e9}, {}, "", ["default_wall_s", "max_wall_s"]),
        ({"lease_s": 5}, {}, "", ["lease_s", "heartbeats"]),
        ({"lead_margin_s": 90}, {}, "", ["lead_margin_s", "end_margin_s"]),
        ({"tls_cert": "a.pem"}, {}, "", ["tls_cert and tls_key"]),
        ({"s3_bucket": "b", "s3_endpoint": "http://s3"}, {}, "", ["s3_access_key, s3_secret_key"]),
        ({"s3_endpoint": "s3.example"}, {}, "", ["s3_endpoint", "http://"]),
        ({"s3_link_s": 8 * 24 * 3600}, {}, "", ["s3_link_s", "604800"]),
        ({"s3_prefix": "a"}, {}, "", ["s3_prefix is 'a'", "slash"]),
        ({"s3_prefix": "a?/"}, {}, "", ["s3_prefix"]),
        ({"request_rate": 0}, {}, "", ["request_rate is 0", "at least 1"]),
        ({}, {"EDIF_RELAY_MAX_CONNECTIONS": "-5"}, "", ["max_connections is -5"]),
    ],
)
def test_what_is_refused(
    file: Path, flags: dict[str, Any], environ: dict[str, str], text: str, words: list[str]
) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(RelaySettings, flags=flags, environ=environ, file=file)
    for word in words:
        assert word in str(caught.value)


def test_a_named_file_must_exist(file: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file"):
        load(RelaySettings, flags={}, environ={}, file=file)
    with pytest.raises(SettingsError, match="no settings file"):
        load(RelaySettings, flags={}, environ={"EDIF_CONFIG": str(file)})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.3", "relay.example"])
def test_the_open_network_needs_tls(host: str) -> None:
    with pytest.raises(SettingsError, match="TLS"):
        RelaySettings(host=host)
    assert RelaySettings(host=host, behind_proxy=True).host == host
    assert RelaySettings(host=host, tls_cert=Path("c"), tls_key=Path("k")).tls


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert not RelaySettings(host=host).tls


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("Yes", True), ("off", False), ("0", False)]
)
def test_switches(text: str, value: bool, tmp_path: Path) -> None:
    environ = {"EDIF_RELAY_BEHIND_PROXY": text, "XDG_CONFIG_HOME": str(tmp_path)}
    assert load(RelaySettings, flags={}, environ=environ).behind_proxy is value


def test_an_empty_value_unsets(file: Path) -> None:
    file.write_text("[relay]\npublic_url = 'https://a/'\n")
    assert load(RelaySettings, flags={}, environ={}, file=file).public_url == "https://a"
    environ = {"EDIF_RELAY_PUBLIC_URL": ""}
    assert load(RelaySettings, flags={}, environ=environ, file=file).public_url is None


@pytest.mark.parametrize(
    ("flags", "environ", "text", "relay", "token"),
    [
        ({}, {}, "", settings.DEFAULT_RELAY, None),
        ({}, {"NDIF_HOST": "http://n", "NDIF_API_KEY": "kn"}, "", "http://n", "kn"),
        ({}, {"NDIF_API_KEY": "kn"}, "", settings.DEFAULT_RELAY, None),
        ({}, {"EDIF_RELAY": "http://e/", "EDIF_TOKEN": "ke"}, "", "http://e", "ke"),
        # The key for one host is never sent to another.
        ({}, {"EDIF_RELAY": "http://e", "NDIF_API_KEY": "kn"}, "", "http://e", None),
        (
            {},
            {"NDIF_HOST": "http://n", "NDIF_API_KEY": "kn"},
            "relay='http://f'",
            "http://f",
            None,
        ),
        ({}, {}, "relay='http://f'\ntoken='kf'", "http://f", "kf"),
        (
            {"relay": "http://g"},
            {"EDIF_RELAY": "http://e", "EDIF_TOKEN": "ke"},
            "",
            "http://g",
            "ke",
        ),
        ({"token": "kg"}, {"NDIF_HOST": "http://n", "NDIF_API_KEY": "kn"}, "", "http://n", "kg"),
    ],
)
def test_client_settings(
    file: Path,
    flags: dict[str, Any],
    environ: dict[str, str],
    text: str,
    relay: str,
    token: str | None,
) -> None:
    file.write_text(f"[client]\n{text}")
    found = load_client(flags=flags, environ=environ, file=file)
    assert (found.relay, found.token) == (relay, token)


def test_a_bucket(tmp_path: Path) -> None:
    environ = {"EDIF_RELAY_S3_SECRET_KEY": "secret", "EDIF_CONFIG": "/dev/null"}
    flags = {
        "s3_bucket": "b",
        "s3_endpoint": "http://s3/",
        "s3_access_key": "key",
        "s3_prefix": "",
    }
    read = load(RelaySettings, flags=flags, environ=environ)
    assert (read.s3_endpoint, read.s3_secret_key) == ("http://s3", "secret")
    assert "'secret'" not in repr(read)


def test_a_repr_hides_secrets() -> None:
    shown = repr(ClientSettings(token="edif_a_b"))
    assert "edif_a_b" not in shown
    assert "token=***" in shown
    assert "port=8710" in repr(RelaySettings())


def test_every_setting_says_what_it_is() -> None:
    source = "".join(each.read_text() for each in Path(settings.__file__).parent.glob("*.py"))
    for cls in (RelaySettings, ClientSettings):
        for each in dataclasses.fields(cls):
            assert re.search(rf"    #: \S.*\n    {each.name}: ", source), each.name
