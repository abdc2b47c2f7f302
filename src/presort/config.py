"""Configuration: one validated object, from a file, `PRESORT_…` variables and arguments, later ones winning.

The file is TOML: the one `PRESORT_CONFIG` names, else `presort.toml` in the user's configuration folder. Nested
settings use two underscores in variables: `PRESORT_BATCHING__FLUSH_SECONDS=5`.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from presort.errors import ConfigurationError

KeySource = Callable[[str, str], str | None]
"""Called as (provider name, account) when a key is needed; returns the key, or `None` if it has none."""

_OTHER_VARIABLES = {"PRESORT_CONFIG", "PRESORT_RUN"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
        env_prefix="PRESORT_", env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=True
    )

    store: str | None = None
    """SQLAlchemy URL or file path of the store; by default a SQLite file in the user's state folder."""
    account: str | None = Field(None, pattern=r"^[A-Za-z0-9._@-]{1,64}$")
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
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
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
    except (TypeError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
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
        return Path(named)
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
        by_provider = dict(keys)
        return lambda provider, _account: by_provider.get(provider)
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


def _nearest(name: str, known: list[str]) -> str:
    # "flush_second" is near "batching.flush_seconds": compare last parts too
    by_tail = {item.rpartition(".")[2]: item for item in known}
    near = difflib.get_close_matches(name, known, 1) or [
        by_tail[tail] for tail in difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), 1)
    ]
    return f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(f'`{item}`' for item in known)}"


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            parts.append(f"there is no setting `{name}`{_nearest(name, list(_names(Settings)))}")
        else:
            shown = problem["input"]
            parts.append(f"`{name}`: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {shown!r}")
    return "; ".join(parts)


def _check_variables() -> None:
    known = {"PRESORT_" + name.upper().replace(".", "__") for name in _names(Settings)} | _OTHER_VARIABLES
    for variable in os.environ:
        if variable.upper().startswith("PRESORT_") and variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), sorted(known), 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigurationError(f"there is no setting for the environment variable `{variable}`{hint}")
