"""Configuration: one validated object, from a file, `PRESORT_…` variables and arguments, later ones winning.

The file is TOML: the one `PRESORT_CONFIG` names, else `presort.toml` in the user's configuration folder. Nested
settings use two underscores in variables: `PRESORT_BATCHING__FLUSH_SECONDS=5`.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from presort.errors import ConfigurationError

KeySource = Callable[[str, str], str | None]
"""Called as (provider name, account) when a key is needed; returns the key, or `None` if it has none.

It is called on presort's own thread, and often: it should answer at once, and must not make calls that it waits for.
"""


class KeysByProvider:
    """Keys that were given as a mapping: for a provider, and thus for no particular account of it."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = dict(keys)

    def __call__(self, provider: str, _account: str) -> str | None:  # noqa: D102 - as every key source
        return self._keys.get(provider)


_OTHER_VARIABLES = {"PRESORT_CONFIG", "PRESORT_RUN"}
_OF_OUR_TESTS = "PRESORT_TEST_"
_SECRETIVE = frozenset({"account", "http", "http.proxy", "store"})
"""Settings that hold secrets, or into which people paste them: their values are never shown."""


def _as_text(path: object) -> object:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Batching(_Section):
    """When calls wait for a batch, and for how long."""

    enabled: bool = True
    """Whether anything takes the batch route."""
    min_requests: int = Field(1, ge=1)
    """A group with fewer requests than this goes by the standard route."""
    flush_requests: int = Field(100, ge=1)
    """Calls that trickle in are sent once so many wait."""
    flush_seconds: float = Field(30.0, ge=0)
    """Calls that trickle in are sent once the oldest has waited so long."""
    max_batch_requests: int = Field(10_000, ge=1)
    """No batch is larger; the vendor's own limits apply besides."""
    poll_interval_seconds: float = Field(60.0, gt=0)
    """How often a running batch is looked at."""
    deadline_seconds: float = Field(86_400.0, gt=0)
    """When a batched answer must be there, from the call; then the standard route takes over."""
    fallback: bool = True
    """Whether requests a batch could not answer go by the standard route, at list price."""


class Caching(_Section):
    """Prompt caching. The planner is not built yet: nothing is marked, requests pass as they are."""

    enabled: bool = True


class Http(_Section):
    """How the engine reaches vendors for work that has no live client to take the settings from."""

    proxy: str | None = Field(None, repr=False)
    """Proxy URL; without it the usual environment variables count."""
    ca_file: Path | None = None
    """Certificates to trust instead of the platform's."""
    connect_timeout_seconds: float = Field(15.0, gt=0)
    read_timeout_seconds: float = Field(600.0, gt=0)
    standard_concurrency: int = Field(8, ge=1)
    """Calls the engine itself has on the standard route at once."""


class Settings(BaseSettings):
    """Everything that can be set. Unknown names and wrong values raise `ConfigurationError`."""

    model_config = SettingsConfigDict(
        env_prefix="PRESORT_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    store: Annotated[str, BeforeValidator(_as_text)] | None = Field(None, repr=False)
    """SQLAlchemy URL or file path of the store; by default a SQLite file in the user's state folder."""
    account: str | None = Field(None, pattern=r"^[A-Za-z0-9._@-]{1,64}$", repr=False)
    """A name for who pays. With it a changed key stays the same account."""
    batching: Batching = Batching()
    caching: Caching = Caching()
    http: Http = Http()
    reconcile_window_seconds: float = Field(7_200.0, ge=0)
    """How long a create whose answer was lost is searched for before it counts as never made."""
    replay_seconds: float = Field(604_800.0, gt=0)
    """How long a named run's answers are kept if the run is never finished."""
    lease_seconds: float = Field(15.0, gt=0)
    """How long a process that went silent keeps its work; then another takes over."""

    _keys: KeySource | None = PrivateAttr(None)

    @property
    def keys(self) -> KeySource | None:
        """Where keys come from besides live clients and the environment."""
        return self._keys

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over variables over the file; nothing else is read."""
        return init_settings, env_settings, _FileSource(settings_cls)


class _FileSource(PydanticBaseSettingsSource):
    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return _read_file()


def load(keys: KeySource | Mapping[str, str] | None = None, **settings: Any) -> Settings:
    """Read the configuration.

    Args:
        keys: A function (provider, account) -> key, or a mapping from provider names to keys. Never stored.
        **settings: Settings by name; sections as mappings, as in `batching={"flush_seconds": 5}`.

    Raises:
        ConfigurationError: A name is unknown or a value wrong; the message names it and the nearest right one.
    """
    _check_variables()
    try:
        loaded = Settings(**settings)
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None
    except SettingsError:
        raise ConfigurationError(_unreadable_variable()) from None
    loaded._keys = _key_source(keys)  # noqa: SLF001 - a private attribute of our own class, kept out of dumps and reprs
    return loaded


def override(base: Settings, **settings: Any) -> Settings:
    """Return the settings with some replaced; a section's mapping replaces only what it names."""
    merged: dict[str, Any] = base.model_dump()
    for name, value in settings.items():
        section = merged.get(name)
        if isinstance(section, dict) and isinstance(value, Mapping):
            merged[name] = {**section, **value}
        else:
            merged[name] = value
    changed = load(**merged)
    changed._keys = base.keys  # noqa: SLF001
    return changed


def config_file() -> Path | None:
    """Return the configuration file that applies, if any."""
    named = os.environ.get("PRESORT_CONFIG")
    if named:
        return Path(named).expanduser()
    usual = platformdirs.user_config_path("presort") / "presort.toml"
    return usual if usual.is_file() else None


def _read_file() -> dict[str, Any]:
    path = config_file()
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read the configuration file `{path}`: {error}") from error


def _key_source(keys: KeySource | Mapping[str, str] | None) -> KeySource | None:
    if keys is None or callable(keys):
        return keys
    if isinstance(keys, Mapping):
        return KeysByProvider(keys)
    raise ConfigurationError(
        f"`keys` must be a function (provider, account) or a mapping from providers, got {type(keys).__name__}"
    )


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        kinds = (field.annotation, *get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names(kind, f"{prefix}{name}.")


def _nearest(name: str, known: Iterable[str], separator: str = ".") -> str | None:
    # "flush_seconds" means "batching.flush_seconds", whatever else looks like it: last parts count first
    by_tail = {item.rpartition(separator)[2]: item for item in known}
    tail = name.rpartition(separator)[2]
    near = [by_tail[tail]] if tail in by_tail else difflib.get_close_matches(name, list(known), 1)
    near = near or [by_tail[each] for each in difflib.get_close_matches(tail, list(by_tail), 1)]
    return near[0] if near else None


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = list(_names(Settings))
            near = _nearest(name, known)
            hint = f"did you mean `{near}`?" if near else f"there are {', '.join(f'`{item}`' for item in known)}"
            parts.append(f"there is no setting `{name}`; {hint}")
        else:
            shown = _shown(name, problem["input"])
            parts.append(f"`{name}`: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {shown}")
    return "; ".join(parts)


def _shown(name: str, value: object) -> str:
    """Describe a wrong value without giving a secret away."""
    if name in _SECRETIVE:
        size = f" of {len(value)} characters" if isinstance(value, str) else ""
        return f"{type(value).__name__}{size}"
    return repr(value)


def _variables() -> dict[str, str]:
    """Return the settings by the environment variables that set them."""
    return {"PRESORT_" + name.upper().replace(".", "__"): name for name in _names(Settings)}


def _check_variables() -> None:
    known = [*_variables(), *sorted(_OTHER_VARIABLES)]
    for variable in os.environ:
        upper = variable.upper()
        if upper in known or not upper.startswith("PRESORT_") or upper.startswith(_OF_OUR_TESTS):
            continue
        tail = upper.removeprefix("PRESORT_")
        near = next((item for item in known if item.endswith(f"__{tail}")), None) or _nearest(upper, known, "__")
        hint = f"; did you mean `{near}`?" if near else ""
        raise ConfigurationError(f"there is no setting for the environment variable `{variable}`{hint}")


def _unreadable_variable() -> str:
    """Say which variable of a whole section holds no JSON."""
    for variable in os.environ:
        name = _variables().get(variable.upper())
        if name is not None and name in Settings.model_fields:
            kind = Settings.model_fields[name].annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                try:
                    json.loads(os.environ[variable])
                except ValueError:
                    example = f"{variable.upper()}__{next(iter(kind.model_fields)).upper()}"
                    return f"`{variable}` is no JSON object; set its parts by themselves, such as `{example}`"
    return "an environment variable of presort cannot be read"
