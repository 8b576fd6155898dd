from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlencode

import pytest

from gateway.apps import App
from gateway.signing import SignedQuery, signed_paths

# The documentation's vector (docs/pusher-compatibility.md 2.1).
APP = App(id="3", key="278d425bdf160c739803", secret="7ad3773142a6692b25b8")
BODY = b'{"name":"foo","channels":["project-3"],"data":"{\\"some\\":\\"data\\"}"}'
AT = 1353088179
PATH = "/apps/3/events"
SIGNATURE = "da454824c97ba181a32ccc17a72625ba02771f50b50e1e7430e47a1f3f457e6c"


def parameters(**changes: str | None) -> dict[str, str]:
    base = {
        "auth_key": APP.key,
        "auth_timestamp": str(AT),
        "auth_version": "1.0",
        "body_md5": hashlib.md5(BODY).hexdigest(),
    }
    return {name: value for name, value in (base | changes).items() if value is not None}


def signed(
    given: dict[str, str], path: str = PATH, method: str = "POST", secret: str = APP.secret
) -> bytes:
    text = "&".join(f"{key.lower()}={given[key]}" for key in sorted(given, key=str.lower))
    signature = hmac.new(secret.encode(), f"{method}\n{path}\n{text}".encode(), hashlib.sha256)
    return urlencode(given | {"auth_signature": signature.hexdigest()}).encode()


def fault(
    query: bytes,
    app: App | None = APP,
    method: str = "POST",
    path: str = PATH,
    body: bytes = BODY,
    now_s: float = AT,
) -> str | None:
    found = SignedQuery(query).fault(app, method, (path,), body, now_s, 600)
    return None if found is None else found.message


@pytest.mark.pusher("2.1", "the documentation's vector")
def test_the_documented_call_is_accepted() -> None:
    assert hashlib.md5(BODY).hexdigest() == "ec365a775a4cd0599faeb73354201b6f"

    query = urlencode(parameters() | {"auth_signature": SIGNATURE}).encode()

    assert fault(query) is None


@pytest.mark.pusher("2.1", "nothing about a signed call can be changed")
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"method": "PUT"}, "auth_signature"),
        ({"path": "/apps/4/events"}, "auth_signature"),
        ({"body": BODY + b" "}, "body_md5"),
        ({"body": b""}, "body_md5"),
        ({"now_s": AT + 601}, "auth_timestamp"),
        ({"now_s": AT - 601}, "auth_timestamp"),
        ({"app": App(id="3", key=APP.key, secret="another")}, "auth_signature"),
        ({"app": App(id="3", key="another", secret=APP.secret)}, "auth_key"),
        ({"app": None}, "auth_key"),
    ],
)
def test_nothing_about_a_signed_call_can_be_changed(changed: dict[str, object], why: str) -> None:
    found = fault(signed(parameters()), **changed)  # type: ignore[arg-type]

    assert found is not None
    assert why in found


@pytest.mark.pusher("2.1", "a parameter that is missing or wrong is named")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auth_key", None),
        ("auth_version", None),
        ("auth_version", "2.0"),
        ("auth_timestamp", None),
        ("auth_timestamp", ""),
        ("auth_timestamp", "now"),
        ("auth_timestamp", "-1"),
        ("auth_timestamp", "1" * 400),
        ("auth_timestamp", "²"),
        ("body_md5", None),
        ("body_md5", ""),
        ("body_md5", "é"),
    ],
)
def test_a_parameter_that_is_missing_or_wrong_is_named(name: str, value: str | None) -> None:
    found = fault(signed(parameters(**{name: value})))

    assert found is not None
    assert name in found


@pytest.mark.pusher("2.1", "the right signature is never told")
def test_the_right_signature_is_never_told() -> None:
    query = urlencode(parameters() | {"auth_signature": "0" * 64}).encode()

    found = fault(query)

    assert found == "auth_key and auth_signature don't match this call"


def test_a_key_that_is_nobodys_is_refused_like_a_wrong_signature() -> None:
    right = signed(parameters())
    wrong = urlencode(parameters() | {"auth_signature": "0" * 64}).encode()

    assert fault(right, app=None) == fault(wrong) == fault(wrong, app=None)


@pytest.mark.parametrize("signature", ["", "é", SIGNATURE.upper(), SIGNATURE[:-1]])
def test_only_the_whole_signature_counts(signature: str) -> None:
    assert fault(urlencode(parameters() | {"auth_signature": signature}).encode()) is not None


def test_a_parameter_that_was_added_later_is_noticed() -> None:
    assert fault(signed(parameters()) + b"&info=user_count") is not None


@pytest.mark.pusher("2.1", "names are signed in lower case and sorted")
def test_names_are_signed_in_lower_case_and_sorted() -> None:
    given = parameters() | {"Info": "user_count", "A": "1"}

    assert fault(signed(given)) is None


@pytest.mark.pusher("2.1", "an array is signed comma-joined (PHP)")
def test_an_array_is_signed_comma_joined() -> None:
    query = signed(parameters() | {"info": "a,b"}).replace(b"info=a%2Cb", b"info[]=a&info%5B%5D=b")

    assert fault(query) is None


@pytest.mark.pusher("2.1", "values are signed unescaped, however they came (Go, requests)")
def test_values_are_signed_unescaped_whether_they_came_escaped_or_not() -> None:
    escaped = signed(parameters() | {"filter": "presence-a,b=c;d@e"})
    plain = escaped.replace(b"%2C", b",").replace(b"%3D", b"=").replace(b"%3B", b";")

    assert fault(escaped) is None
    assert fault(plain) is None


@pytest.mark.pusher("2.1", "an empty body may have a body_md5 (Python)")
def test_an_empty_body_needs_no_digest_and_may_have_one() -> None:
    """pusher-http-python signs the digest of the empty body on GET as well."""
    without = signed(parameters(body_md5=None), method="GET")
    with_it = signed(parameters(body_md5=hashlib.md5(b"").hexdigest()), method="GET")

    assert fault(without, method="GET", body=b"") is None
    assert fault(with_it, method="GET", body=b"") is None


def test_while_the_secret_is_rotated_both_are_valid() -> None:
    rotating = App(id="3", key=APP.key, secret="the-new-one", previous_secret=APP.secret)

    assert fault(signed(parameters()), app=rotating) is None
    assert fault(signed(parameters(), secret="the-new-one"), app=rotating) is None


@pytest.mark.pusher("2.1", "the path may be signed as sent, decoded, or without our prefix")
def test_a_caller_may_have_signed_the_path_as_sent_or_decoded_or_without_our_prefix() -> None:
    paths = signed_paths("/duet/apps/3/channels/a%2Cb", "/duet/apps/3/channels/a,b", "/duet")

    assert paths == (
        "/duet/apps/3/channels/a%2Cb",
        "/duet/apps/3/channels/a,b",
        "/apps/3/channels/a%2Cb",
        "/apps/3/channels/a,b",
    )


@pytest.mark.parametrize(
    "query", [b"", b"&&&", b"=", b"a", b"%", b"%ff=%ff", b"&".join([b"a=1"] * 500)]
)
def test_any_query_can_be_read(query: bytes) -> None:
    assert fault(query) is not None
