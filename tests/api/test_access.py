"""Who is let in: keys, the admin token, and requests that a web page could have sent."""

import pytest

from tests.api.scripted import CHAT, ask

KEYS = {"api_keys": ("key-1", "schlüssel"), "admin_token": "token"}
ALL = ["/v1/models", "/admin/status", "/openapi.json", "/nowhere"]
ADMIN = ["/admin/status", "/admin/plan"]


def status(path, authorization=None, config=KEYS, **request):
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    return ask("GET", path, config=config, headers=headers, **request).status_code


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer key-1x",
        "Bearer key-",
        "Basic key-1",
        "key-1",
        "Bearer key-1 key-1",
        "Bearer \udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_without_a_right_key(path, authorization):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    response = ask("GET", path, config=KEYS, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "authorization", ["Bearer key-1", "bearer key-1", "BEARER  key-1", "Bearer schlüssel"]
)
def test_with_a_right_key(authorization):
    assert status("/v1/models", authorization) == 200
    assert status("/admin/status", authorization) == 200
    assert status("/nowhere", authorization) == 404


def test_the_admin_token_opens_admin_alone():
    assert [status(path, "Bearer token") for path in ADMIN] == [200, 200]
    assert status("/v1/models", "Bearer token") == 401


def test_two_authorization_headers_are_refused():
    headers = [("authorization", "Bearer key-1"), ("authorization", "Bearer key-1")]
    assert ask("GET", "/v1/models", config=KEYS, headers=headers).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_is_open(path):
    assert status(path) == 200


@pytest.mark.parametrize("path", ["/health/", "/health/../v1/models", "//health", "/healthx"])
def test_nothing_else_hides_behind_health(path):
    assert status(path) == 401


def test_an_admin_key_opens_admin_in_place_of_the_api_keys():
    config = {**KEYS, "admin_keys": ("chief-1", "chief-2")}
    assert [status(path, "Bearer key-1", config) for path in ADMIN] == [401, 401]
    assert [status(path, "Bearer chief-2", config) for path in ADMIN] == [200, 200]
    assert status("/admin/status", "Bearer token", config) == 200
    assert status("/v1/models", "Bearer chief-1", config) == 401
    assert status("/v1/models", "Bearer key-1", config) == 200


def test_an_admin_key_alone_leaves_the_rest_open():
    config = {"admin_keys": ("chief",)}
    assert [status(path, config=config) for path in ALL] == [200, 401, 200, 404]


@pytest.mark.parametrize("path", [*ADMIN, "/admin", "/admin/nowhere"])
def test_a_server_open_to_the_network_keeps_admin_for_the_token(path):
    config = {"local_only": False, "admin_token": "token"}
    assert status("/v1/models", config=config) == 200
    assert status(path, config=config) == 401
    assert status(path, "Bearer token", config) in {200, 404}


@pytest.mark.parametrize("path", ["/admin/status", "/admin/"])
def test_a_server_open_to_the_network_without_any_key_has_no_admin(path):
    assert status(path, "Bearer x", {"local_only": False}) == 401


@pytest.mark.parametrize("token", [None, "", "token"])
def test_without_keys_everything_is_open(token):
    config = {"admin_token": token}
    assert [status(path, config=config) for path in ALL] == [200, 200, 200, 404]


def test_a_body_is_not_read_before_the_key_is_checked():
    async def body():
        raise AssertionError
        yield b""

    response = ask("POST", "/v1/completions", config=KEYS, content=body())
    assert response.status_code == 401


HOSTS = [
    ("localhost", True),
    ("localhost:8000", True),
    ("LOCALHOST:1", True),
    ("127.0.0.1:8000", True),
    ("[::1]:8000", True),
    ("[::1]", True),
    ("evil.example", False),
    ("evil.example:8000", False),
    ("localhost.evil.example", False),
    ("127.0.0.1.evil.example", False),
    ("localhost@evil.example", False),
    ("evil.example@localhost", False),
    ("localhost/x", False),
    ("localhost:x", False),
    ("[::1", False),
    ("192.168.0.2", False),
    ("0.0.0.0", False),
    ("", False),
]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/admin/status"])
@pytest.mark.parametrize(("host", "allowed"), HOSTS)
def test_hosts(path, host, allowed):
    response = ask("GET", path, headers={"host": host})
    assert response.status_code == (200 if allowed else 403)
    if not allowed:
        assert response.json()["error"]["code"] == "forbidden"


def test_any_host_where_the_server_is_not_local():
    headers = {"host": "gpu.example", "origin": "https://app.example"}
    config = {"local_only": False, **KEYS}
    assert ask("GET", "/health", config=config, headers=headers).status_code == 200
    headers["authorization"] = "Bearer key-1"
    response = ask("POST", "/v1/chat/completions", config=config, headers=headers, json=CHAT)
    assert response.status_code == 200


def test_two_hosts_are_refused():
    headers = [("host", "localhost"), ("host", "evil.example")]
    assert ask("GET", "/v1/models", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://[::1]:8443", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost@evil.example", False),
        ("null", False),
        ("", False),
        ("localhost", False),
        ("http://[", False),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/admin/context", "/v1/models"])
def test_origins(path, origin, allowed):
    if path == "/v1/models":
        response = ask("GET", path, headers={"origin": origin})
    else:
        body = {**CHAT, "n_ctx": 8192} if path.startswith("/v1") else {"n_ctx": 8192}
        response = ask("POST", path, headers={"origin": origin}, json=body)
    assert response.status_code == (200 if allowed else 403)
    assert "access-control-allow-origin" not in response.headers
