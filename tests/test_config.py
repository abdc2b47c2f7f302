"""Settings: where they come from, in which order, and what a wrong one is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from pydantic import BaseModel

import presort
from presort import runtime
from presort.config import KeysByProvider, Settings, config_file, load, override
from presort.errors import ConfigurationError

SECRET = "sk-planted-secret"


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """Give each test an environment and a configuration folder without any setting."""
    for name in os.environ:
        if name.upper().startswith("PRESORT_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda *_, **__: tmp_path / "home")


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write a configuration file and have it used."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("PRESORT_CONFIG", str(path))
        return path

    return write


def refusal(**settings: Any) -> str:
    """Return what a wrong setting is told."""
    with pytest.raises(ConfigurationError) as caught:
        load(**settings)
    return str(caught.value)


# -- every setting -------------------------------------------------------------------------------------------------
VALUES: dict[str, tuple[str, Any]] = {
    "store": ("/somewhere/presort.db", "/somewhere/presort.db"),
    "account": ("acme", "acme"),
    "batching.enabled": ("false", False),
    "batching.min_requests": ("2", 2),
    "batching.flush_requests": ("3", 3),
    "batching.flush_seconds": ("4.5", 4.5),
    "batching.max_batch_requests": ("5", 5),
    "batching.poll_interval_seconds": ("6.5", 6.5),
    "batching.deadline_seconds": ("7.5", 7.5),
    "batching.fallback": ("false", False),
    "caching.enabled": ("false", False),
    "http.proxy": ("http://proxy:3128", "http://proxy:3128"),
    "http.ca_file": ("/etc/ca.pem", Path("/etc/ca.pem")),
    "http.connect_timeout_seconds": ("8.5", 8.5),
    "http.read_timeout_seconds": ("9.5", 9.5),
    "http.standard_concurrency": ("10", 10),
    "reconcile_window_seconds": ("11.5", 11.5),
    "replay_seconds": ("12.5", 12.5),
    "lease_seconds": ("13.5", 13.5),
}
"""For each setting a value, as text and as it is read."""

DEFAULTS: dict[str, Any] = {
    "store": None,
    "account": None,
    "batching.enabled": True,
    "batching.min_requests": 1,
    "batching.flush_requests": 100,
    "batching.flush_seconds": 30.0,
    "batching.max_batch_requests": 10_000,
    "batching.poll_interval_seconds": 60.0,
    "batching.deadline_seconds": 86_400.0,
    "batching.fallback": True,
    "caching.enabled": True,
    "http.proxy": None,
    "http.ca_file": None,
    "http.connect_timeout_seconds": 15.0,
    "http.read_timeout_seconds": 600.0,
    "http.standard_concurrency": 8,
    "reconcile_window_seconds": 7_200.0,
    "replay_seconds": 604_800.0,
    "lease_seconds": 15.0,
}


def names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """List every setting there is."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def value(settings: Settings, name: str) -> Any:
    """Read a setting by its dotted name."""
    found: Any = settings
    for part in name.split("."):
        found = getattr(found, part)
    return found


def nested(name: str, given: Any) -> dict[str, Any]:
    """Write a setting as an argument."""
    section, _, key = name.rpartition(".")
    return {section: {key: given}} if section else {key: given}


def variable(name: str) -> str:
    """Write a setting as an environment variable."""
    return "PRESORT_" + name.upper().replace(".", "__")


def test_every_setting_is_listed():
    """The tables of this file hold every setting there is."""
    assert sorted(VALUES) == sorted(DEFAULTS) == sorted(names())


def test_defaults():
    """Without file, variables and arguments every setting has the documented default."""
    settings = load()

    assert DEFAULTS == {name: value(settings, name) for name in DEFAULTS}


@pytest.mark.parametrize("name", VALUES)
def test_sources_of_each_setting(name, monkeypatch, write):
    """Each setting is read from the file, a variable and an argument, and each of these wins over the one before."""
    text, read = VALUES[name]
    section, _, key = name.rpartition(".")
    if isinstance(read, bool):
        # there are two values only: the first source has to say the default
        write(f"[{section}]\n{key} = true")
        assert DEFAULTS[name] is value(load(), name)
        monkeypatch.setenv(variable(name), text)
        assert read is value(load(), name)
        assert True is value(load(**nested(name, given=True)), name)
        return
    others = ["1", "20"] if isinstance(read, int) else ["1.5", "20.5"] if isinstance(read, float) else ["a", "b"]
    quote = '"' if isinstance(read, str | Path) else ""
    write((f"[{section}]\n" if section else "") + f"{key} = {quote}{text}{quote}")
    assert read == value(load(), name)

    monkeypatch.setenv(variable(name), others[0])
    assert type(read)(others[0]) == value(load(), name)

    assert type(read)(others[1]) == value(load(**nested(name, type(read)(others[1]))), name)


def test_sources_mix_within_a_section(monkeypatch, write):
    """A section may be set in part by each source; none of them wipes what another said."""
    write("[batching]\nmin_requests = 2\nflush_requests = 2\nflush_seconds = 2")
    monkeypatch.setenv("PRESORT_BATCHING", '{"flush_requests": 3, "flush_seconds": 3}')
    monkeypatch.setenv("PRESORT_BATCHING__DEADLINE_SECONDS", "9")
    batching = load(batching={"flush_seconds": 4}).batching

    assert (2, 3, 4.0, 9.0) == (
        batching.min_requests,
        batching.flush_requests,
        batching.flush_seconds,
        batching.deadline_seconds,
    )


def test_override():
    """Overriding one part of a section keeps the rest of it, the other settings and the keys."""
    base = load(keys={"anthropic": SECRET}, store="x", batching={"flush_seconds": 4, "min_requests": 2})
    changed = override(base, batching={"flush_seconds": 5})

    assert (5.0, 2, "x") == (changed.batching.flush_seconds, changed.batching.min_requests, changed.store)
    assert base.keys is changed.keys
    assert 4.0 == base.batching.flush_seconds


def test_empty_variable(monkeypatch):
    """A variable that is set to nothing, as compose files do, counts as not set."""
    for name in VALUES:
        monkeypatch.setenv(variable(name), "")

    assert DEFAULTS == {name: value(load(), name) for name in DEFAULTS}


def test_variables_ignore_case(monkeypatch):
    """A variable counts in lower case as well."""
    monkeypatch.setenv("presort_lease_seconds", "7")

    assert 7.0 == load().lease_seconds


def test_store_as_path():
    """The store may be given as a path object."""
    assert str(Path("/x/presort.db")) == load(store=Path("/x/presort.db")).store


# -- the file ------------------------------------------------------------------------------------------------------
def test_usual_file(tmp_path):
    """Without `PRESORT_CONFIG` the file in the user's configuration folder counts."""
    (tmp_path / "home").mkdir()
    assert None is config_file()
    (tmp_path / "home" / "presort.toml").write_text("lease_seconds = 9")

    assert 9.0 == load().lease_seconds


def test_named_file_counts_alone(tmp_path, write):
    """The file that `PRESORT_CONFIG` names is read instead of the usual one, not besides it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "presort.toml").write_text("lease_seconds = 9")
    write("replay_seconds = 8")

    assert (15.0, 8.0) == (load().lease_seconds, load().replay_seconds)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[batching\nflush_seconds = 3", "line 1"),
        ("flush_seconds 3", "line 1"),
        ("lease_seconds = 3\nlease_seconds = 4", "overwrite"),
        (b"\xff\xfe\x00", "utf-8"),
    ],
)
def test_garbled_file(write, text, hint):
    """A file that is no TOML is named, with the place of the trouble."""
    path = write(text)
    message = refusal()

    assert f"cannot read the configuration file `{path}`" in message
    assert hint in message


def test_missing_file(monkeypatch, tmp_path):
    """A file that `PRESORT_CONFIG` names and that is not there is an error, not silence."""
    monkeypatch.setenv("PRESORT_CONFIG", str(tmp_path / "nowhere.toml"))

    assert "nowhere.toml" in refusal()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(write):
    """A file that may not be read is named."""
    path = write("lease_seconds = 3")
    path.chmod(0)

    assert f"cannot read the configuration file `{path}`" in refusal()


# -- wrong names ---------------------------------------------------------------------------------------------------
WRONG_NAMES = {
    "lease_second": "lease_seconds",
    "flush_seconds": "batching.flush_seconds",
    "standard_concurrency": "http.standard_concurrency",
    "batchin": "batching",
    "batching.flush_second": "batching.flush_seconds",
    "batching.pol_interval_seconds": "batching.poll_interval_seconds",
    "http.proxi": "http.proxy",
    "caching.enable": "caching.enabled",
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_wrong_argument(name):
    """An unknown argument is named, with the nearest right one."""
    message = refusal(**nested(name, given=1))

    assert f"there is no setting `{name}`; did you mean `{WRONG_NAMES[name]}`?" == message


@pytest.mark.parametrize("name", ["lease_second", "batching.flush_second", "batchin.x"])
def test_wrong_name_in_the_file(name, write):
    """An unknown name in the file is named, with the nearest right one."""
    section, _, key = name.rpartition(".")
    write((f"[{section}]\n" if section else "") + f"{key} = 1")
    message = refusal()

    assert f"there is no setting `{name.removesuffix('.x')}`; did you mean `" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("PRESORT_LEASE_SECOND", "PRESORT_LEASE_SECONDS"),
        ("PRESORT_FLUSH_SECONDS", "PRESORT_BATCHING__FLUSH_SECONDS"),
        ("PRESORT_BATCHING_FLUSH_SECONDS", "PRESORT_BATCHING__FLUSH_SECONDS"),
        ("PRESORT_BATCHING__FLUSH_SECOND", "PRESORT_BATCHING__FLUSH_SECONDS"),
        ("PRESORT_CONFG", "PRESORT_CONFIG"),
        ("PRESORT_RUM", "PRESORT_RUN"),
        ("presort_stor", "PRESORT_STORE"),
    ],
)
def test_wrong_variable(monkeypatch, wrong, right):
    """An unknown `PRESORT_…` variable is named, with the nearest right one, and without its value."""
    monkeypatch.setenv(wrong, SECRET)
    message = refusal()

    assert f"there is no setting for the environment variable `{wrong}`; did you mean `{right}`?" == message


def test_name_like_none():
    """A name that is like none gets the list of all."""
    message = refusal(xyzzy=1)

    assert all(f"`{name}`" in message for name in VALUES)


def test_all_wrong_names_at_once():
    """Two mistakes are told in one message."""
    message = refusal(lease_second=1, batching={"flush_second": 1})

    assert "`lease_second`" in message
    assert "`batching.flush_second`" in message


# -- wrong values --------------------------------------------------------------------------------------------------
WRONG_VALUES = [
    ("batching.flush_seconds", "soon", "got 'soon'"),
    ("batching.flush_seconds", -1, "greater than or equal to 0, got -1"),
    ("batching.flush_requests", 1.5, "got 1.5"),
    ("batching.flush_requests", 0, "got 0"),
    ("batching.min_requests", 0, "got 0"),
    ("batching.max_batch_requests", 0, "got 0"),
    ("batching.poll_interval_seconds", 0, "greater than 0, got 0"),
    ("batching.deadline_seconds", None, "got None"),
    ("batching.enabled", "maybe", "got 'maybe'"),
    ("batching", 5, "got 5"),
    ("lease_seconds", 0, "got 0"),
    ("lease_seconds", float("inf"), "got inf"),
    ("replay_seconds", float("nan"), "got nan"),
    ("reconcile_window_seconds", -1, "got -1"),
    ("http.standard_concurrency", 0, "got 0"),
    ("account", "white space", "got str of 11 characters"),
    ("store", 5, "got int"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), WRONG_VALUES)
def test_wrong_value(name, wrong, hint):
    """A wrong type or value is told with the setting's name and, unless it could be a secret, the value."""
    message = refusal(**nested(name, wrong))

    assert message.startswith(f"`{name}`: ")
    assert hint in message


def test_wrong_value_in_a_variable(monkeypatch):
    """A wrong value in a variable is told by the setting's name."""
    monkeypatch.setenv("PRESORT_BATCHING__FLUSH_SECONDS", "soon")

    assert refusal().startswith("`batching.flush_seconds`: ")


def test_section_variable_without_json(monkeypatch):
    """A variable for a whole section that holds no JSON is told how to set the parts."""
    monkeypatch.setenv("PRESORT_HTTP", f"http://user:{SECRET}@proxy")

    assert "`PRESORT_HTTP` is no JSON object; set its parts by themselves, such as `PRESORT_HTTP__PROXY`" == refusal()


def test_wrong_keys():
    """Keys that are neither function nor mapping are refused by their type alone."""
    message = refusal(keys=SECRET)

    assert message.endswith("got str")
    assert SECRET not in message


# -- secrets -------------------------------------------------------------------------------------------------------
def test_secrets_are_not_shown():
    """Neither keys nor a store's or proxy's password appear in the settings' text or dump of keys."""
    settings = load(
        keys={"anthropic": SECRET},
        store=f"postgresql://user:{SECRET}@host/name",
        http={"proxy": f"http://user:{SECRET}@proxy"},
    )

    assert SECRET not in repr(settings) + str(settings) + repr(settings.keys) + repr(settings.http)
    assert "keys" not in settings.model_dump()


@pytest.mark.parametrize(
    "settings",
    [
        {"http": f"http://user:{SECRET}@proxy"},
        {"http": {"proxy": [f"http://user:{SECRET}@proxy"]}},
        {"store": [f"postgresql://user:{SECRET}@host/name"]},
        {"account": SECRET + "x" * 80},
    ],
)
def test_secrets_are_not_in_messages(settings):
    """A wrong value where secrets are kept, or pasted by mistake, is told without itself, causes included."""
    with pytest.raises(ConfigurationError) as caught:
        load(**settings)
    error: BaseException | None = caught.value
    told = ""
    while error is not None:
        told += repr(error)
        error = error.__cause__

    assert SECRET not in told


def test_keys():
    """Keys may be a function of provider and account, or a mapping by provider."""
    by_function = load(keys=lambda provider, account: f"{provider}-{account}").keys
    by_mapping = load(keys={"anthropic": SECRET}).keys

    assert by_function is not None
    assert "openai-acme" == by_function("openai", "acme")
    assert isinstance(by_mapping, KeysByProvider)
    assert (SECRET, None) == (by_mapping("anthropic", "acme"), by_mapping("openai", "acme"))
    assert None is load().keys


# -- configure -----------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh(monkeypatch):
    """Give the test the process's engine and settings to itself."""
    runtime.close()
    monkeypatch.setattr(runtime, "_settings", None)
    yield
    runtime.close()
    monkeypatch.setattr(runtime, "_settings", None)


def test_configure_again_while_idle(fresh, tmp_path):
    """`configure` with another store, while nothing waits, closes the old engine; the next call uses the new store."""
    presort.configure(store=tmp_path / "one.db")
    first = runtime.engine()
    presort.configure(store=tmp_path / "two.db", batching={"flush_seconds": 7})

    assert first.closed
    assert str(tmp_path / "two.db") == runtime.engine().store.location
    assert 7.0 == runtime.settings().batching.flush_seconds


def test_wrong_configure_changes_nothing(fresh, tmp_path):
    """A `configure` that is refused leaves settings and engine as they were."""
    presort.configure(store=tmp_path / "one.db")
    engine = runtime.engine()
    with pytest.raises(ConfigurationError):
        presort.configure(store=tmp_path / "two.db", nonsense=1)

    assert engine is runtime.engine()
    assert str(tmp_path / "one.db") == runtime.settings().store


def test_wrong_configuration_of_others_shows_late(fresh, monkeypatch):
    """A wrong variable does not break `import presort`, but the first call that needs the settings."""
    monkeypatch.setenv("PRESORT_NONSENSE", "1")

    with pytest.raises(ConfigurationError):
        presort.jobs()
