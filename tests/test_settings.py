import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.dtypes import CachePair, KvType
from kvserve.core.machine import Backend, Build, Gpu, Host, Machine
from kvserve.core.plan import Request, Task
from kvserve.errors import UsageError
from kvserve.settings import Percent, Settings, environment_warnings, load_settings
from kvserve.units import GIB, MIB

Q8 = CachePair(KvType.Q8_0, KvType.Q8_0)
MIXED = CachePair(KvType.Q8_0, KvType.Q4_0)


@pytest.fixture
def nowhere(tmp_path):
    """A path of a settings file that does not exist."""
    return tmp_path / "absent.toml"


@pytest.fixture
def load(nowhere):
    """Loads from flags and variables alone."""

    def from_flags(flags=(), environ=()):
        return load_settings(dict(flags), environ=dict(environ), default_config=nowhere)

    return from_flags


@pytest.fixture
def write(tmp_path):
    """Writes a settings file."""

    def to_file(text: str):
        path = tmp_path / "kvserve.toml"
        path.write_text(text)
        return path

    return to_file


def refusal(flags=(), environ=(), config=None, default_config=None) -> str:
    with pytest.raises(UsageError) as error:
        load_settings(
            dict(flags), config=config, environ=dict(environ), default_config=default_config
        )
    assert "\n" not in error.value.message
    assert error.value.exit_code == 2
    return error.value.message


def test_the_defaults(load):
    settings = load()
    assert settings.model is None
    assert settings.ctx == 8192
    assert settings.parallel == 4
    assert settings.cache_type == "auto"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.request_timeout == 600
    assert settings.state_dir.name == "kvserve"


def test_flags_win_over_variables_over_the_profile_over_the_file(write):
    path = write(
        "ctx = 1000\nparallel = 1\nport = 1\nbatch = 1\n"
        "[profiles.a]\nctx = 2000\nport = 2\nparallel = 2\n"
    )
    environ = {"KVSERVE_CTX": "3000", "KVSERVE_PARALLEL": "3", "KVSERVE_PROFILE": "a"}
    settings = load_settings({"ctx": 4000, "port": None}, config=path, environ=environ)
    assert settings.ctx == 4000
    assert settings.parallel == 3
    assert settings.port == 2
    assert settings.batch == 1
    assert (settings.config, settings.profile) == (path, "a")


def test_the_file_can_come_from_a_variable_or_be_the_users_own(write, nowhere):
    path = write("ctx = 1000")
    named = load_settings({}, environ={"KVSERVE_CONFIG": str(path)}, default_config=nowhere)
    own = load_settings({}, environ={}, default_config=path)
    flag = load_settings({"config": str(path)}, environ={}, default_config=nowhere)
    assert (named.ctx, own.ctx, flag.ctx) == (1000, 1000, 1000)


def test_settings_are_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().ctx = 1


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("ctx", "32K", 32768),
        ("ctx", "max", "max"),
        ("ctx", 1, 1),
        ("max_ctx", "none", None),
        ("cache_type", "q8_0", Q8),
        ("cache_type", "Q8_0:Q4_0", MIXED),
        ("cache_type", "AUTO", "auto"),
        ("kv_floor", "q8_0", Q8),
        ("kv_floor", "none", None),
        ("max_kld", "0.01", 0.01),
        ("max_kld", "none", None),
        ("min_top1", "95%", 0.95),
        ("min_top1", 0.95, 0.95),
        ("task", "math", Task.MATH),
        ("task", "none", None),
        ("device", "CPU", "cpu"),
        ("gpu_layers", "0", 0),
        ("threads", "8", 8),
        ("reserve", "256MiB", 256 * MIB),
        ("reserve", "3%", Percent(3.0)),
        ("reserve", 1024, 1024),
        ("vram_free", "7.6GiB", 8160437862),
        ("port", "0", 0),
        ("insecure", "yes", True),
        ("insecure", False, False),
        ("request_timeout", "10m", 600.0),
        ("request_timeout", "0", None),
        ("request_timeout", "none", None),
        ("drain_timeout", "500ms", 0.5),
        ("drain_timeout", 0, 0.0),
        ("reasoning_format", "deepseek", "deepseek"),
        ("load_timeout", "1.5h", 5400.0),
        ("step_timeout", 2.5, 2.5),
        ("log_level", "DEBUG", "debug"),
        ("model", " demo ", "demo"),
    ],
)
def test_values_are_read(load, field, value, read):
    assert getattr(load({field: value}), field) == read


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "ctx",
            0,
            "--ctx: 0 is not a number of tokens: write one from 1 up, as 8192 or 32K, or max",
        ),
        ("ctx", -1, "--ctx: -1 is not a number of tokens"),
        ("ctx", "lots", "--ctx: 'lots' is not"),
        ("ctx", True, "--ctx: True is not"),
        ("ctx", 2**31, "--ctx: 2147483648 is not a number of tokens"),
        ("max_ctx", 4096, "--max-ctx: 4096 is below the context of 8192"),
        ("parallel", 500, "--parallel: 500 is out of range: write a whole number, from 1 to 256"),
        ("parallel", "x", "--parallel: 'x' is not a whole number"),
        (
            "threads",
            "none",
            "--threads: 'none' is not a whole number: write one, from 1 to 1024, or",
        ),
        ("parallel", 1.5, "--parallel: 1.5 is not a whole number"),
        ("cache_type", "q3_0", "--cache-type: 'q3_0' is not a cache type: write one of f32, f16"),
        ("cache_type", "q8_0:", "--cache-type: 'q8_0:' is not a cache type"),
        ("kv_floor", 8, "--kv-floor: 8 is not a cache type"),
        ("max_kld", "-1", "--max-kld: -1.0 is not a number"),
        ("min_top1", "95", "--min-top1: '95' is not a share: write it as 0.95 or 95%"),
        ("task", "poetry", "--task: 'poetry' is unknown here: write one of math, code"),
        ("device", "tpu", "--device: 'tpu' is unknown here: write one of auto, cpu, cuda"),
        (
            "gpu_layers",
            -1,
            "--gpu-layers: -1 is out of range: write a whole number, 0 or more, or auto",
        ),
        ("threads", 0, "--threads: 0 is out of range"),
        ("reserve", "99%", "--reserve: '99%' leaves nothing for the model"),
        ("reserve", "3 parsecs", "--reserve: '3 parsecs' is not a size"),
        ("vram_free", -5, "--vram-free: '-5' is not a size"),
        ("port", 70000, "--port: 70000 is out of range"),
        ("insecure", "perhaps", "--insecure: 'perhaps' is neither true nor false"),
        ("request_timeout", "soon", "--request-timeout: 'soon' is not a duration"),
        ("step_timeout", 0, "--step-timeout: 0 would end everything at once"),
        ("load_timeout", float("nan"), "--load-timeout: nan is not a duration"),
        ("log_level", "loud", "--log-level: 'loud' is unknown here"),
        ("model", "  ", "--model: '  ' is not a text, or is empty"),
        ("state_dir", "", "--state-dir: '' is not a path"),
    ],
)
def test_a_bad_flag_is_one_line_with_the_fix(nowhere, field, value, words):
    message = refusal({field: value}, default_config=nowhere)
    assert message.startswith(words)


def test_the_line_names_the_source(write, nowhere):
    assert refusal(environ={"KVSERVE_CTX": "0"}, default_config=nowhere).startswith("KVSERVE_CTX: ")
    path = write("ctx = 0\n[profiles.a]\nport = -1\n")
    assert refusal(config=path).startswith(f"{path}: ctx: 0 is not")
    assert refusal({"ctx": 1, "profile": "a"}, config=path).startswith(
        f"{path}: profiles.a.port: -1"
    )


def test_a_bad_value_that_is_overridden_does_no_harm(write):
    path = write("ctx = 0")
    assert load_settings({"ctx": 1}, config=path, environ={}).ctx == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cachetype = 'q8_0'", "cachetype is not a setting; did you mean cache_type?"),
        ("cache-type = 'q8_0'", "cache-type is not a setting; did you mean cache_type?"),
        ("zzz = 1", "zzz is not a setting; known are model, ctx, parallel"),
        ("config = 'x'", "config is not a setting"),
        ("[profile.a]\nctx = 1", "write [profiles.NAME]"),
        ("[profiless.a]\nctx = 1", "profiless is not a setting; did you mean profiles?"),
        ("[profiles.a]\nctxx = 1", "profiles.a.ctxx is not a setting; did you mean ctx?"),
        ("[profiles.a]\nprofile = 'b'", "profiles.a.profile is not a setting"),
        ("profiles = 3", "write [profiles.NAME]"),
        ("[profiles]\nctx = 3", "write [profiles.NAME]"),
        ("ctx = ", "not TOML: "),
        ("[ctx]\na = 1", "ctx: {'a': 1} is not a number of tokens"),
    ],
)
def test_a_bad_file_is_one_line_with_the_fix(write, text, words):
    path = write(text)
    message = refusal(config=path)
    assert str(path) in message
    assert words in message


def test_a_file_that_is_not_there_or_not_text(tmp_path, nowhere):
    assert f"--config: {nowhere} does not exist" in refusal(config=nowhere)
    environ = {"KVSERVE_CONFIG": str(tmp_path)}
    assert f"KVSERVE_CONFIG: {tmp_path} is not a file" in refusal(environ=environ)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"model = '\xe9'")
    assert "not UTF-8" in refusal(config=path)


def test_an_unknown_profile_lists_the_known_ones(write, nowhere):
    path = write("[profiles.b]\n[profiles.a]\n")
    message = refusal({"profile": "c"}, config=path)
    assert message == f"--profile: {path} has no profile 'c': it has a, b"
    assert "it has no profiles" in refusal({"profile": "c"}, config=write("ctx = 1"))
    message = refusal(environ={"KVSERVE_PROFILE": "c"}, default_config=nowhere)
    assert message.startswith("KVSERVE_PROFILE: 'c' needs a settings file")


def test_the_file_may_choose_its_profile(write):
    path = write("profile = 'a'\n[profiles.a]\nctx = 5\n[profiles.b]\nctx = 6\n")
    assert load_settings({}, config=path, environ={}).ctx == 5
    assert load_settings({"profile": "b"}, config=path, environ={}).ctx == 6
    assert load_settings({"profile": "none"}, config=path, environ={}).ctx == 8192


def test_unknown_variables_are_warnings():
    warnings = environment_warnings({"KVSERVE_CTXX": "1", "KVSERVE_PORT": "1", "HOME": "/"})
    assert warnings == (
        "KVSERVE_CTXX is not a setting of kvserve and is ignored; did you mean KVSERVE_CTX?",
    )


def test_an_empty_variable_is_unset(load):
    assert load(environ={"KVSERVE_CTX": "", "KVSERVE_TASK": ""}).ctx == 8192


def test_api_keys_from_all_sources(load, write):
    one, two, three = "a-secret-1", "a-secret-2", "a-secret-3"
    assert load(environ={"KVSERVE_API_KEY": f"{one}, {two}"}).api_keys == (one, two)
    assert load({"api_key": [one, f"{two},{three}"]}).api_keys == (one, two, three)
    path = write(f"api_key = ['{one}', '{two}']\nadmin_key = '{three}'")
    settings = load_settings({}, config=path, environ={})
    assert (settings.api_keys, settings.admin_keys) == ((one, two), (three,))


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
@pytest.mark.parametrize("value", ["k", "1234567", ["long-enough", "short"], "long-enough,short"])
def test_a_short_key_is_refused(nowhere, name, value):
    message = refusal({name: value}, default_config=nowhere)
    assert message.startswith(f"--{name.replace('_', '-')}: a key must have 8 characters")
    assert "short" not in message


@pytest.mark.parametrize(
    "value", ["top secret", ["top secret"], "topsecret,", ["topsecret", 3], "töpsecret"]
)
def test_no_line_repeats_a_key(nowhere, value):
    message = refusal({"api_key": value}, default_config=nowhere)
    assert message.startswith("--api-key: ")
    assert "secret" not in message


def test_keys_are_not_in_the_text_of_the_settings(load):
    settings = load({"api_key": "topsecret", "admin_key": "topsecret"})
    assert "topsecret" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    ("host", "exposed"),
    [
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.5", True),
        ("box.example", True),
    ],
)
def test_an_open_address_needs_a_key(load, host, exposed):
    assert load({"host": host}).exposed is exposed
    load({"host": host, "api_key": "12345678"}).check_exposure()
    load({"host": host, "insecure": True}).check_exposure()
    if exposed:
        with pytest.raises(
            UsageError, match="set KVSERVE_API_KEY or --api-key KEY, or add --insecure"
        ):
            load({"host": host}).check_exposure()
    else:
        load({"host": host}).check_exposure()


def machine(n_gpus: int = 1) -> Machine:
    gpus = tuple(Gpu(i, f"GPU-{i}", "x", 8 * GIB, 7 * GIB) for i in range(n_gpus))
    return Machine(Host(32 * GIB, 20 * GIB, 6), gpus, Build("1", cuda=True))


def test_the_request_of_the_defaults(load):
    assert load().to_request(machine()) == Request(n_ctx=8192, n_draft=16)


def test_the_request_of_everything(load):
    flags = {
        "ctx": "max",
        "parallel": 2,
        "device": "cuda",
        "cache_type": "q8_0:q4_0",
        "kv_floor": "q8_0",
        "task": "code",
        "gpu_layers": 20,
        "batch": 256,
        "ubatch": 300,
        "reserve": "1GiB",
        "draft_max": 5,
    }
    assert load(flags).to_request(machine()) == Request(
        n_ctx=None,
        n_parallel=2,
        backend=Backend.CUDA,
        pair=MIXED,
        floor=Q8,
        task=Task.CODE,
        n_gpu_layers=20,
        n_batch=256,
        n_ubatch=256,
        reserve_bytes=GIB,
        n_draft=10,
    )


def test_logits_of_drafted_tokens_have_a_bound(load):
    def n_draft(**given):
        return load(given).to_request(machine()).n_draft

    assert n_draft(speculate="off") == 0
    assert n_draft(parallel=1) == 8
    assert n_draft(parallel=200) == 16
    assert n_draft(parallel=200, draft_max=40) == 40


@pytest.mark.parametrize(
    ("device", "n_gpus", "total_gib"),
    [("auto", 2, 16), ("cuda", 1, 8), ("cpu", 2, 32), ("auto", 0, 32)],
)
def test_a_reserve_in_percent_is_of_the_deciding_memory(load, device, n_gpus, total_gib):
    request = load({"reserve": "50%", "device": device}).to_request(machine(n_gpus))
    assert request.reserve_bytes == total_gib * GIB // 2


def test_threads_default_to_the_cores(load):
    host = machine().host
    assert load().n_threads(host) == 6
    assert load({"threads": 3}).n_threads(host) == 3


@given(
    st.sampled_from(sorted(set(Settings.model_fields) - {"config", "profile"})),
    st.text(max_size=12),
)
def test_any_text_is_a_value_or_one_line(field, text):
    absent = Path("absent.toml")
    with contextlib.suppress(UsageError):
        load_settings({field: text}, environ={}, default_config=absent)
        return
    message = refusal({field: text}, default_config=absent)
    assert message.startswith("--" + field.replace("_", "-") + ": ")


def test_the_module_prints_the_table():
    run = subprocess.run(
        [sys.executable, "-m", "kvserve.settings"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert run.stdout.startswith("| TOML key | Flag |")


@pytest.mark.parametrize("table", ["", "[profiles.big]\n"])
def test_the_size_to_plan_with_has_no_place_in_a_file(tmp_path, table):
    path = tmp_path / "config.toml"
    path.write_text(f'{table}vram_free = "7.6GiB"\n')
    message = refusal(config=path)
    assert "vram_free is for `kvserve plan --vram-free SIZE` alone" in message
    assert message.startswith(f"{path}: ")
