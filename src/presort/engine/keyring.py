"""Accounts and keys: who pays for a job, and with which credentials it may be touched now.

Keys live in memory only. An account is the user's alias, or an HMAC of the key with a salt that lies outside the
store. A key counts as an account's if it hashes to it, if the user's alias or key function says so, if the vendor
names the same organisation for both, or if it can see the account's batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import platformdirs

from presort.config import KeysByProvider, Settings
from presort.errors import ConfigurationError
from presort.job import Job
from presort.providers import provider
from presort.providers.base import ChannelError, Provider, Refusal, RefusedError
from presort.providers.channel import HttpChannel
from presort.request import BatchKey
from presort.telemetry import warn

if TYPE_CHECKING:
    from presort.engine.core import Core

_SALT_BYTES = 32

TransportFactory = Callable[[], httpx2.AsyncBaseTransport]
"""Makes a transport for the engine's loop with the network settings of the client that a call came from."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a live client reaches its vendor. Held in memory only."""

    key: str
    transport: TransportFactory | None = None

    def __repr__(self) -> str:
        return "Link(key=…)"


class Keyring:
    """Resolves accounts to channels, when they are used."""

    def __init__(self, settings: Settings, core: Core) -> None:
        self._settings = settings
        self._core = core
        self._live: dict[tuple[str, str, str], Link] = {}
        self._channels: dict[tuple[str, str, str, str], _Open] = {}
        self._clients: list[httpx2.AsyncClient] = []
        self._proven: dict[tuple[str, str, str], str] = {}
        self._organisations: dict[str, str] = {}
        self._accounts: dict[str, str] = {}

    def account(self, key: str) -> str:
        """Name the account a key pays for."""
        if self._settings.account is not None:
            return self._settings.account
        if key not in self._accounts:
            digest = hmac.new(_salt(), key.encode(), hashlib.sha256).hexdigest()
            self._accounts[key] = f"key-{digest[:24]}"
        return self._accounts[key]

    def remember(self, key: BatchKey, link: Link) -> None:
        """Note how a live client reaches an account."""
        self._live[key.provider, key.base_url, key.account] = link

    async def channel(self, key: BatchKey, job: Job | None = None) -> HttpChannel | None:
        """Return a channel for an account, or `None` if no key is known to be its.

        With a job that has a batch, a key that can see the batch will do.
        """
        vendor = provider(key.provider)
        where = (key.provider, key.base_url, key.account)
        live = self._live.get(where)
        if live is not None:
            return self._open(key, vendor, live.key, live.transport)
        for candidate in self._candidates(key, vendor):
            certain = candidate.certain or self.account(candidate.key) == key.account
            known = certain or self._proven.get(where) == candidate.key
            if known or await self._prove(key, vendor, candidate.key, job):
                self._proven[where] = candidate.key
                return self._open(key, vendor, candidate.key, candidate.transport)
        return None

    def reconfigure(self, settings: Settings) -> None:
        """Take other settings, and other keys with them; connections that are open stay."""
        self._settings = settings

    async def refused(self, key: BatchKey) -> None:
        """Forget what was known of an account's credentials: the vendor refused them."""
        where = (key.provider, key.base_url, key.account)
        self._live.pop(where, None)
        self._proven.pop(where, None)

    async def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            await client.aclose()
        self._clients.clear()
        self._channels.clear()

    def _candidates(self, key: BatchKey, vendor: Provider) -> list[_Candidate]:
        found: list[_Candidate] = []
        given = self._given(key)
        if given:
            found.append(_Candidate(given, certain=not isinstance(self._settings.keys, KeysByProvider)))
        for (name, base_url, _account), link in self._live.items():
            if (name, base_url) == (key.provider, key.base_url):
                found.append(_Candidate(link.key, link.transport))
        from_environment = os.environ.get(vendor.key_variable)
        if from_environment:
            found.append(_Candidate(from_environment))
        return found

    def _given(self, key: BatchKey) -> str | None:
        """Ask the user's own function."""
        if self._settings.keys is None:
            return None
        try:
            return self._settings.keys(key.provider, key.account)
        except Exception as error:  # noqa: BLE001 - it is not ours; what waits for a key goes on waiting
            # its text may hold what it was about: a key
            warn("keys", f"the `keys` function that was configured raised {type(error).__name__}")
            return None

    async def _prove(self, key: BatchKey, vendor: Provider, candidate: str, job: Job | None) -> bool:
        """Ask the vendor, by a harmless look, whether a key belongs to the account."""
        channel = self._open(key, vendor, candidate, None)
        if job is not None and job.batch_id is not None:
            try:
                await vendor.check(channel, key, job)
            except ChannelError:
                return False
            return True
        known = await self._core.db(self._core.store.organisation, key.account)
        if known is None:
            return False
        try:
            reply = await channel.send("GET", vendor.probe_path, headers=dict(vendor.standing_headers))
        except RefusedError as refusal:
            return known == vendor.organisation(refusal.headers) and vendor.classify(refusal) is not Refusal.KEY
        except ChannelError:
            return False
        return vendor.organisation(reply.headers) == known

    def _open(self, key: BatchKey, vendor: Provider, secret: str, transport: TransportFactory | None) -> HttpChannel:
        # the secret itself is part of the cache's key: a rotated one gets a channel of its own
        where = (key.provider, key.base_url, key.account, secret)
        if where not in self._channels or self._channels[where].ended:

            async def learn(response: httpx2.Response) -> None:
                await self._learn(key, vendor, response.headers)

            borrowed = None if transport is None else transport()
            client = self._client(borrowed)
            client.event_hooks = {"request": [], "response": [learn]}
            self._clients.append(client)
            channel = HttpChannel(
                key.base_url,
                vendor.key_headers(secret),
                client=client,
                connect_seconds=self._settings.http.connect_timeout_seconds,
                read_seconds=self._settings.http.read_timeout_seconds,
            )
            self._channels[where] = _Open(channel, borrowed)
        return self._channels[where].channel

    def _client(self, transport: httpx2.AsyncBaseTransport | None) -> httpx2.AsyncClient:
        headers = {"user-agent": "presort"}
        if transport is not None:
            return httpx2.AsyncClient(transport=transport, headers=headers)
        http = self._settings.http
        verify = True if http.ca_file is None else ssl.create_default_context(cafile=str(http.ca_file))
        return httpx2.AsyncClient(proxy=http.proxy, verify=verify, headers=headers)

    async def _learn(self, key: BatchKey, vendor: Provider, headers: Mapping[str, str]) -> None:
        """Remember whom the vendor says an account belongs to."""
        organisation = vendor.organisation(headers)
        if organisation and self._organisations.get(key.account) != organisation:
            self._organisations[key.account] = organisation
            await self._core.db(self._core.store.remember_organisation, key.account, organisation)


@dataclass(frozen=True, slots=True)
class _Open:
    """A channel, and the live client's transport it goes through."""

    channel: HttpChannel
    transport: httpx2.AsyncBaseTransport | None

    @property
    def ended(self) -> bool:
        """Whether it goes through a user's own transport whose loop has ended."""
        return bool(getattr(self.transport, "ended", False))


@dataclass(frozen=True, slots=True)
class _Candidate:
    key: str = field(repr=False)
    transport: TransportFactory | None = None
    certain: bool = False


def _salt() -> bytes:
    """Read, or make, the salt: 32 bytes in the user's configuration folder, for this user only."""
    path = platformdirs.user_config_path("presort") / "salt"
    try:
        salt = path.read_bytes()
    except FileNotFoundError:
        salt = _new_salt(path)
    except OSError as error:
        raise _no_salt(path, error.strerror) from error
    if len(salt) != _SALT_BYTES:
        raise _no_salt(path, f"it has {len(salt)} bytes, not {_SALT_BYTES}: somebody has changed it")
    return salt


def _new_salt(path: Path) -> bytes:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f"salt.{secrets.token_hex(8)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_SALT_BYTES))
        _put_in_place(draft, path)
        return path.read_bytes()
    except OSError as error:
        raise _no_salt(path, error.strerror) from error


def _put_in_place(draft: Path, path: Path) -> None:
    """Give a finished file its name, unless another process was first: its salt counts then."""
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except (AttributeError, OSError):  # no hard links here: Android, FAT
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # Windows does not replace
                draft.rename(path)
    draft.unlink(missing_ok=True)


def _no_salt(path: Path, why: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"cannot keep the salt for account names in `{path}` ({why}); name the account yourself: "
        "PRESORT_ACCOUNT=… or `presort.configure(account=…)`"
    )
