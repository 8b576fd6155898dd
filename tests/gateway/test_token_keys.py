from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from gateway import token_keys
from gateway.auth import AuthError, UnknownKeyError, VerificationKey
from gateway.errors import ErrorCode
from gateway.settings import Settings, SettingsError
from gateway.token_keys import (
    FixedAuthorizer,
    JwksAuthorizer,
    KeySet,
    authorizer_of,
    keys_of_jwks,
    public_key,
    secret_key,
)

NOW = datetime(2026, 11, 22, 17, 25, tzinfo=UTC)
CLAIMS = {"sub": "ada", "role": "streamer", "exp": NOW.timestamp() + 60}

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def pem(private: Any) -> str:
    public = private.public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def jwk(private: Any, key_id: str | None, **changes: Any) -> dict[str, Any]:
    kind: Any
    if isinstance(private, rsa.RSAPrivateKey):
        kind = RSAAlgorithm
    else:
        kind = ECAlgorithm if isinstance(private, ec.EllipticCurvePrivateKey) else OKPAlgorithm
    entry = json.loads(kind.to_jwk(private.public_key()))
    entry.pop("key_ops", None)
    return entry | ({} if key_id is None else {"kid": key_id}) | changes


class TestFixedKeys:
    @pytest.mark.parametrize(
        ("private", "algorithm"), [(RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA")]
    )
    async def test_a_public_key_has_the_one_algorithm_of_its_kind(
        self, private: Any, algorithm: str
    ) -> None:
        authorizer = FixedAuthorizer(KeySet({None: public_key(pem(private))}))

        identity = await authorizer.identity_of(jwt.encode(CLAIMS, private, algorithm), NOW)

        assert identity.user_id == "ada"

    @pytest.mark.parametrize("algorithm", ["RS512", "PS256"])
    async def test_another_algorithm_of_the_same_key_is_refused(self, algorithm: str) -> None:
        authorizer = FixedAuthorizer(KeySet({None: public_key(pem(RSA))}))

        with pytest.raises(AuthError, match="algorithm"):
            await authorizer.identity_of(jwt.encode(CLAIMS, RSA, algorithm), NOW)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no key",
            RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
            pem(ec.generate_private_key(ec.SECP384R1())),
            pem(dsa.generate_private_key(key_size=1024)),
        ],
    )
    def test_what_is_no_usable_public_key_is_refused_by_its_variable(self, text: str) -> None:
        with pytest.raises(SettingsError, match=r"^DUET_JWT_PUBLIC_KEY: "):
            public_key(text)

    def test_a_short_secret_is_refused_by_its_variable(self) -> None:
        assert secret_key("x" * 32).algorithm == "HS256"
        with pytest.raises(SettingsError, match=r"^DUET_JWT_SECRET: needs at least 32 bytes"):
            secret_key("x" * 31)

    def test_one_key_is_for_every_token_two_are_told_apart_by_name(self) -> None:
        one, other = secret_key("1" * 32), secret_key("2" * 32)

        assert KeySet({None: one}).find("any") is one
        assert KeySet({"a": one}).find(None) is one
        assert KeySet({"a": one, "b": other}).find("b") is other
        for keys, name in (
            (KeySet({"a": one}), "b"),
            (KeySet({"a": one, "b": other}), None),
            (KeySet({}), None),
        ):
            with pytest.raises(UnknownKeyError):
                keys.find(name)

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"jwt_secret": "x" * 32, "jwt_public_key": pem(RSA)},
            {"jwt_secret": "x" * 32, "jwt_jwks_url": "https://login.example/keys"},
        ],
    )
    def test_there_must_be_exactly_one_source(self, given: dict[str, str]) -> None:
        with pytest.raises(SettingsError, match="exactly one must be set"):
            authorizer_of(Settings(**given))  # type: ignore[arg-type]

    async def test_the_source_of_the_settings_is_used(self) -> None:
        assert isinstance(authorizer_of(Settings(jwt_secret="x" * 32)), FixedAuthorizer)
        assert isinstance(authorizer_of(Settings(jwt_public_key=pem(EC))), FixedAuthorizer)
        fetching = authorizer_of(Settings(jwt_jwks_url="https://login.example/keys"))
        assert isinstance(fetching, JwksAuthorizer)
        await fetching.close()


class TestKeySets:
    def test_the_keys_of_a_set_are_found_by_name(self) -> None:
        keys = keys_of_jwks({"keys": [jwk(RSA, "r"), jwk(EC, "e"), jwk(ED, "d")]})

        assert {name: key.algorithm for name, key in keys.items()} == {
            "r": "RS256",
            "e": "ES256",
            "d": "EdDSA",
        }

    def test_keys_that_are_not_for_us_are_left_out(self) -> None:
        entries = [
            {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"},
            jwk(RSA, "encryption", use="enc"),
            jwk(RSA, "another-algorithm", alg="RS512"),
            jwk(EC, "broken", x="!"),
            {"kty": "RSA", "kid": "empty"},
            "no key",
            jwk(RSA, "good", use="sig", alg="RS256"),
        ]

        assert list(keys_of_jwks({"keys": entries})) == ["good"]

    @pytest.mark.parametrize(
        "document",
        [None, [], {}, {"keys": {}}, {"keys": []}, {"keys": [{"kty": "oct", "k": "eA"}]}],
    )
    def test_a_set_without_a_usable_key_is_unavailable(self, document: Any) -> None:
        with pytest.raises(AuthError) as caught:
            keys_of_jwks(document)

        assert caught.value.code is ErrorCode.UNAVAILABLE


class KeyServer:
    """A real HTTP server with a key set that can be changed, broken or made slow."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0
        self.answering = asyncio.Event()
        self.answering.set()
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        await self.answering.wait()
        body = json.dumps({"keys": self.keys}).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            % (self.status, len(body))
            + body
        )
        writer.close()


@pytest.fixture
async def server() -> Any:
    keys = KeyServer()
    listening = await asyncio.start_server(keys.answer, "127.0.0.1", 0)
    keys.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/keys"
    async with listening:
        yield keys


@pytest.fixture
async def authorizer(server: KeyServer) -> Any:
    fetching = JwksAuthorizer(server.url, None, None, httpx.AsyncClient())
    yield fetching
    await fetching.close()


def token(private: Any = RSA, algorithm: str = "RS256", key_id: str = "r1") -> str:
    return jwt.encode(CLAIMS, private, algorithm, headers={"kid": key_id})


class TestFetching:
    async def test_the_set_is_fetched_once_for_many_tokens(
        self, server: KeyServer, authorizer: JwksAuthorizer
    ) -> None:
        server.keys = [jwk(RSA, "r1")]

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(authorizer.identity_of(token(), NOW)) for _ in range(20)]

        assert {task.result().user_id for task in asked} == {"ada"}
        assert server.asked == 1

    async def test_a_key_that_is_new_is_fetched(
        self,
        server: KeyServer,
        authorizer: JwksAuthorizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(token_keys, "JWKS_MIN_INTERVAL_S", 0.0)
        server.keys = [jwk(RSA, "r1")]
        await authorizer.identity_of(token(), NOW)
        server.keys = [jwk(EC, "e1")]

        identity = await authorizer.identity_of(token(EC, "ES256", "e1"), NOW)

        assert identity.user_id == "ada"
        with pytest.raises(UnknownKeyError):
            await authorizer.identity_of(token(), NOW)

    async def test_made_up_key_names_do_not_make_us_fetch_again_and_again(
        self, server: KeyServer, authorizer: JwksAuthorizer
    ) -> None:
        server.keys = [jwk(RSA, "r1"), jwk(EC, "e1")]
        await authorizer.identity_of(token(), NOW)

        for number in range(5):
            with pytest.raises(UnknownKeyError):
                await authorizer.identity_of(token(key_id=f"made-up-{number}"), NOW)

        assert server.asked == 1

    async def test_a_key_that_was_taken_away_is_gone_once_the_set_is_old(
        self,
        server: KeyServer,
        authorizer: JwksAuthorizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        server.keys = [jwk(RSA, "r1"), jwk(EC, "e1")]
        await authorizer.identity_of(token(), NOW)
        server.keys = [jwk(EC, "e1"), jwk(ED, "d1")]
        monkeypatch.setattr(token_keys, "JWKS_MAX_AGE_S", 0.0)
        monkeypatch.setattr(token_keys, "JWKS_MIN_INTERVAL_S", 0.0)

        with pytest.raises(UnknownKeyError):
            await authorizer.identity_of(token(), NOW)

    async def test_while_the_set_can_not_be_fetched_the_known_keys_go_on(
        self,
        server: KeyServer,
        authorizer: JwksAuthorizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        server.keys = [jwk(RSA, "r1")]
        await authorizer.identity_of(token(), NOW)
        server.status = 500
        monkeypatch.setattr(token_keys, "JWKS_MAX_AGE_S", 0.0)
        monkeypatch.setattr(token_keys, "JWKS_MIN_INTERVAL_S", 0.0)

        assert (await authorizer.identity_of(token(), NOW)).user_id == "ada"
        assert server.asked == 2

    async def test_without_any_key_a_token_can_not_be_judged_now(
        self, server: KeyServer, authorizer: JwksAuthorizer
    ) -> None:
        server.status = 503

        with pytest.raises(AuthError) as caught:
            await authorizer.identity_of(token(), NOW)

        assert caught.value.code is ErrorCode.UNAVAILABLE

    async def test_a_key_server_that_does_not_answer_is_given_up_on(
        self,
        server: KeyServer,
        authorizer: JwksAuthorizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(token_keys, "JWKS_TIMEOUT_S", 0.05)
        server.answering.clear()

        with pytest.raises(AuthError) as caught:
            await authorizer.identity_of(token(), NOW)
        server.answering.set()

        assert caught.value.code is ErrorCode.UNAVAILABLE


def test_a_key_is_for_one_algorithm() -> None:
    assert secret_key("x" * 32) == VerificationKey("HS256", "x" * 32)
