from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from gateway.apps import App
from gateway.auth import (
    USER_ID_PATTERN,
    AuthError,
    Identity,
    Verdict,
    identity_of_token,
    own_channel_access,
    sign_channel,
    sign_user,
    user_channel,
    verify_channel_signature,
    verify_signin_signature,
)
from gateway.errors import ErrorCode
from gateway.token_keys import KeySet, public_key, secret_key
from statemachine.goal import Role

NOW = datetime(2026, 11, 22, 17, 25, tzinfo=UTC)
SECRET = "a-secret-that-is-long-enough-for-every-kind-of-hmac-there-is-in-jwt"
KEYS = KeySet({None: secret_key(SECRET)})

# The documentation's vectors (docs/pusher-compatibility.md 1.5).
DOCUMENTED = App(id="3", key="278d425bdf160c739803", secret="7ad3773142a6692b25b8")
SOCKET = "1234.1234"
PRIVATE = "58df8b0c36d6982b82c3ecf6b4662e34fe8c25bba48f5369f135bf843651c3a4"
PRESENCE = "afaed3695da2ffd16931f457e338e6c9f2921fa133ce7dac49f529792be6304c"
SIGNIN = "4708d583dada6a56435fb8bc611c77c359a31eebde13337c16ab43aa6de336ba"
MEMBER = '{"user_id":10,"user_info":{"name":"Mr. Pusher"}}'


def claims(**changes: Any) -> dict[str, Any]:
    base = {"sub": "ada", "role": "streamer", "exp": NOW.timestamp() + 60}
    return {name: value for name, value in (base | changes).items() if value is not None}


def token(secret: str = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    return jwt.encode(claims(**changes), secret, algorithm=algorithm)


class TestTokens:
    def test_a_token_proves_user_role_and_acting_app(self) -> None:
        identity = identity_of_token(token(client_id="ios"), KEYS, NOW)

        assert identity == Identity("ada", Role.STREAMER, "ios")

    def test_the_acting_app_is_optional(self) -> None:
        assert identity_of_token(token(role="viewer"), KEYS, NOW) == Identity("ada", Role.VIEWER)

    def test_a_token_is_valid_until_its_exp_and_not_a_moment_longer(self) -> None:
        expiring = token(exp=NOW.timestamp())

        assert identity_of_token(expiring, KEYS, NOW - timedelta(milliseconds=1)).user_id == "ada"
        with pytest.raises(AuthError, match="expired"):
            identity_of_token(expiring, KEYS, NOW)

    def test_a_token_may_begin_a_moment_from_now_on_another_machines_clock(self) -> None:
        assert identity_of_token(token(nbf=NOW.timestamp() + 4), KEYS, NOW).user_id == "ada"
        with pytest.raises(AuthError, match="not valid yet"):
            identity_of_token(token(nbf=NOW.timestamp() + 6), KEYS, NOW)

    def test_the_time_is_the_callers_not_the_machines(self) -> None:
        old = datetime(2001, 1, 1, tzinfo=UTC)

        assert identity_of_token(token(exp=old.timestamp() + 1), KEYS, old).user_id == "ada"

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"exp": None}, "lacks the claim exp"),
            ({"sub": None}, "lacks the claim sub"),
            ({"exp": "soon"}, "must be numbers"),
            ({"exp": True}, "must be numbers"),
            ({"exp": float("nan")}, "expired"),
            ({"nbf": [0]}, "must be numbers"),
            ({"nbf": float("nan")}, "not valid yet"),
            ({"sub": ""}, "not a user id"),
            ({"sub": "a.b"}, "not a user id"),
            ({"sub": "$where"}, "not a user id"),
            ({"sub": "a" * 65}, "not a user id"),
            ({"sub": "ada\n"}, "not a user id"),
            ({"role": None}, "must be streamer or viewer"),
            ({"role": "timer"}, "must be streamer or viewer"),
            ({"role": "system"}, "must be streamer or viewer"),
            ({"role": ["streamer"]}, "must be streamer or viewer"),
            ({"client_id": ""}, "client_id must be text"),
            ({"client_id": 7}, "client_id must be text"),
            ({"client_id": "x" * 129}, "client_id must be text"),
            ({"aud": "someone-else"}, "another audience"),
        ],
    )
    def test_a_claim_that_is_missing_or_wrong_is_refused(
        self, changes: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(AuthError, match=why) as caught:
            identity_of_token(token(**changes), KEYS, NOW)

        assert caught.value.code is ErrorCode.UNAUTHENTICATED

    def test_issuer_and_audience_are_those_of_the_settings(self) -> None:
        keys = KeySet({None: secret_key(SECRET)}, issuer="login", audience="duet")

        assert identity_of_token(token(iss="login", aud=["x", "duet"]), keys, NOW).user_id == "ada"
        with pytest.raises(AuthError, match="someone else"):
            identity_of_token(token(iss="other", aud="duet"), keys, NOW)
        with pytest.raises(AuthError, match="another audience"):
            identity_of_token(token(iss="login", aud="other"), keys, NOW)
        with pytest.raises(AuthError, match="lacks the claim aud"):
            identity_of_token(token(iss="login"), keys, NOW)
        with pytest.raises(AuthError, match="lacks the claim iss"):
            identity_of_token(token(aud="duet"), keys, NOW)

    @pytest.mark.parametrize("garbage", ["", "a", "a.b.c", "....", "é", "x" * 9000, "\ud800"])
    def test_what_is_no_token_is_refused(self, garbage: str) -> None:
        with pytest.raises(AuthError):
            identity_of_token(garbage, KEYS, NOW)

    def test_another_secret_proves_nothing_and_the_right_signature_is_not_told(self) -> None:
        forged = token("another-secret-of-more-than-32-bytes!!")

        with pytest.raises(AuthError) as caught:
            identity_of_token(forged, KEYS, NOW)

        assert caught.value.message == "The token's signature is wrong."

    def test_a_token_without_a_signature_is_refused(self) -> None:
        unsigned = jwt.encode(claims(), "", algorithm="none")

        with pytest.raises(AuthError, match="algorithm"):
            identity_of_token(unsigned, KEYS, NOW)

    def test_another_hash_than_the_keys_is_refused(self) -> None:
        with pytest.raises(AuthError, match="algorithm"):
            identity_of_token(token(algorithm="HS384"), KEYS, NOW)

    def test_a_public_key_is_never_taken_for_a_shared_secret(self) -> None:
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        keys = KeySet({None: public_key(pem.decode())})
        # PyJWT itself refuses to sign so; an attacker's own code would not.
        forged = forge_hs256(claims(), pem)

        assert identity_of_token(jwt.encode(claims(), private, "RS256"), keys, NOW).user_id == "ada"
        with pytest.raises(AuthError, match="algorithm"):
            identity_of_token(forged, keys, NOW)


def forge_hs256(payload: dict[str, Any], key: bytes) -> str:
    import base64
    import hashlib
    import hmac
    import json

    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    head = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(json.dumps(payload).encode())
    return (head + b"." + part(hmac.digest(key, head, hashlib.sha256))).decode()


class TestSignatures:
    @pytest.mark.pusher("1.5", "the documentation's vectors of channels and sign-in")
    def test_the_documented_private_channel(self) -> None:
        assert sign_channel(DOCUMENTED, SOCKET, "private-foobar") == f"{DOCUMENTED.key}:{PRIVATE}"

    @pytest.mark.pusher("1.5", "the documentation's vectors of channels and sign-in")
    def test_the_documented_presence_channel(self) -> None:
        auth = sign_channel(DOCUMENTED, SOCKET, "presence-foobar", MEMBER)

        assert auth == f"{DOCUMENTED.key}:{PRESENCE}"

    @pytest.mark.pusher("1.5", "the documentation's vectors of channels and sign-in")
    def test_the_documented_signin(self) -> None:
        assert sign_user(DOCUMENTED, SOCKET, '{"id":"12345"}') == f"{DOCUMENTED.key}:{SIGNIN}"

    def test_a_signature_opens_its_own_channel_on_its_own_socket(self) -> None:
        auth = f"{DOCUMENTED.key}:{PRIVATE}"

        assert verify_channel_signature(DOCUMENTED, SOCKET, "private-foobar", auth, None)
        assert not verify_channel_signature(DOCUMENTED, SOCKET, "private-foobaz", auth, None)
        assert not verify_channel_signature(DOCUMENTED, "1234.1235", "private-foobar", auth, None)
        assert not verify_channel_signature(DOCUMENTED, SOCKET, "private-foobar", auth, "{}")

    @pytest.mark.pusher("1.5", "channel_data is signed to the byte")
    def test_the_data_of_a_member_is_signed_to_the_byte(self) -> None:
        auth = f"{DOCUMENTED.key}:{PRESENCE}"

        assert verify_channel_signature(DOCUMENTED, SOCKET, "presence-foobar", auth, MEMBER)
        spaced = MEMBER.replace(":10", ": 10")
        assert not verify_channel_signature(DOCUMENTED, SOCKET, "presence-foobar", auth, spaced)

    def test_a_channels_signature_is_no_signin(self) -> None:
        auth = sign_channel(DOCUMENTED, SOCKET, ":user", '{"id":"12345"}')

        # The strings to sign are alike; only the empty channel name could make them the same.
        assert verify_signin_signature(
            DOCUMENTED, SOCKET, '{"id":"12345"}', f"{DOCUMENTED.key}:{SIGNIN}"
        )
        assert not verify_signin_signature(DOCUMENTED, SOCKET, '{"id":"1"}', auth)

    @pytest.mark.parametrize(
        "auth",
        [
            PRIVATE,
            f":{PRIVATE}",
            f"another-key:{PRIVATE}",
            f"{DOCUMENTED.key}:{PRIVATE.upper()}",
            f"{DOCUMENTED.key}:{PRIVATE} ",
            f"{DOCUMENTED.key}:",
            "",
            "é:ü",
            "\ud800",
        ],
    )
    def test_the_whole_of_key_and_digest_counts(self, auth: str) -> None:
        assert not verify_channel_signature(DOCUMENTED, SOCKET, "private-foobar", auth, None)

    @pytest.mark.pusher("1.5", "while a secret is rotated both are valid")
    def test_while_the_secret_is_rotated_both_are_valid(self) -> None:
        old = DOCUMENTED
        new = App(id="3", key=old.key, secret="the-new-one", previous_secret=old.secret)
        after = App(id="3", key=old.key, secret="the-new-one")

        signed = sign_channel(old, SOCKET, "private-x")

        assert verify_channel_signature(new, SOCKET, "private-x", signed, None)
        assert not verify_channel_signature(after, SOCKET, "private-x", signed, None)
        assert sign_channel(new, SOCKET, "private-x") == sign_channel(after, SOCKET, "private-x")

    @given(st.text(), st.text())
    def test_any_text_can_be_checked(self, channel: str, data: str) -> None:
        auth = sign_channel(DOCUMENTED, SOCKET, channel, data)

        assert verify_channel_signature(DOCUMENTED, SOCKET, channel, auth, data)


ADA = Identity("ada", Role.STREAMER)
BOB = Identity("bob", Role.VIEWER)
EVE = Identity("eve", Role.VIEWER)


class TestOwnChannels:
    @pytest.mark.parametrize(
        ("channel", "identity", "verdict"),
        [
            ("private-user@ada", ADA, Verdict.ALLOWED),
            ("private-user@bob", BOB, Verdict.ALLOWED),
            ("private-user@ada", BOB, Verdict.DENIED),
            ("private-user@", ADA, Verdict.DENIED),
            ("private-stream@ada", ADA, Verdict.ALLOWED),
            ("private-stream@ada", BOB, Verdict.DENIED),
            ("private-stream@bob", BOB, Verdict.DENIED),
            ("presence-stream@ada", ADA, Verdict.NEEDS_LIVE_STREAM),
            ("presence-stream@ada", BOB, Verdict.NEEDS_LIVE_STREAM),
            ("presence-stream@a.b", BOB, Verdict.DENIED),
            ("presence-stream-viewer@ada.preview.bob", ADA, Verdict.ALLOWED),
            ("presence-stream-viewer@ada.preview.bob", BOB, Verdict.ALLOWED),
            ("presence-stream-viewer@ada.preview.bob", EVE, Verdict.DENIED),
            ("presence-stream-viewer@bob.preview.ada", ADA, Verdict.DENIED),
            ("presence-stream-viewer@bob.preview.ada", BOB, Verdict.DENIED),
            ("presence-stream-viewer@ada.preview.", ADA, Verdict.DENIED),
            ("presence-stream-viewer@ada.preview.bob.preview.eve", ADA, Verdict.DENIED),
            ("presence-stream-viewer@ada", ADA, Verdict.DENIED),
            ("private-room", ADA, Verdict.NOT_OURS),
            ("x-private-user@ada", ADA, Verdict.NOT_OURS),
            ("private-users@ada", ADA, Verdict.NOT_OURS),
            ("public", None, Verdict.NOT_OURS),
        ],
    )
    def test_the_table(self, channel: str, identity: Identity | None, verdict: Verdict) -> None:
        assert own_channel_access(channel, identity).verdict is verdict

    def test_the_stream_that_must_be_live_is_named(self) -> None:
        assert own_channel_access("presence-stream@ada", BOB).streamer_id == "ada"

    @pytest.mark.parametrize(
        "channel",
        [
            "private-user@ada",
            "private-stream@ada",
            "presence-stream@ada",
            "presence-stream-viewer@ada.preview.bob",
        ],
    )
    def test_nobody_in_particular_may_join_none_of_the_families(self, channel: str) -> None:
        assert own_channel_access(channel, None).verdict is Verdict.DENIED

    def test_a_user_proved_by_a_signature_has_no_role_to_be_held_against_them(self) -> None:
        signed = replace(ADA, role=None)

        assert own_channel_access("private-stream@ada", signed).verdict is Verdict.ALLOWED
        channel = "presence-stream-viewer@bob.preview.ada"
        assert own_channel_access(channel, signed).verdict is Verdict.ALLOWED

    @given(st.from_regex(USER_ID_PATTERN, fullmatch=True))
    def test_ones_own_channel_is_always_ones_own(self, user_id: str) -> None:
        identity = Identity(user_id, Role.VIEWER)

        assert own_channel_access(user_channel(user_id), identity).verdict is Verdict.ALLOWED
