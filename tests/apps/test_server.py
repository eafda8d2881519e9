"""The running app, over HTTP and gradio_client: results, bad input, ten users at once, cancelling, and what it does not serve."""

import base64
import contextlib
import io
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from genkit_apps import jobs
from genkit_apps.app import build, own_folder, serve
from genkit_apps.cli import login
from genkit_apps.limits import Limits
from genkit_apps.models import Models
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import genkit

ONE = {"guidances": ["CFG(2.0)"], "classes": ["cat"], "seeds": "3", "sampler": "euler", "steps": 1, "api_name": "/compare"}


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.fixture(scope="module")
def url(models):
    page = build(models, limits=Limits(images=8))
    _, local, _ = serve(page, server_port=0, prevent_thread_lock=True)
    yield local.rstrip("/")
    page.close()


@pytest.fixture(scope="module")
def client(url):
    return connect(url)


def connect(url: str, **options) -> Client:
    return Client(url, verbose=False, httpx_kwargs={"timeout": 60}, **options)


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_compare_over_the_api_gives_the_images_of_the_library(client):
    out = client.predict(
        model="builtin/cifar10",
        guidances=["none", "Interval(CFG(3.0), 0.28, 5.42)"],
        classes=["cat", "8"],
        seeds="4",
        sampler="heun",
        steps=2,
        api_name="/compare",
    )
    pipe = genkit.load("builtin/cifar10")
    for images, column in zip(out["images"], out["record"]["columns"], strict=True):
        direct = pipe([3, 8], [4, 4], column["guidance"], sampler="heun", steps=2)
        assert column["nfe"] == direct.nfe
        assert all(np.array_equal(pixels(a), np.asarray(b)) for a, b in zip(images, direct.images, strict=True))
    assert out["record"]["classes"] == [3, 8]
    assert "genkit.load('builtin/cifar10')" in out["python"]


@pytest.mark.parametrize("model", ["builtin/cifar10-next-token", "builtin/cifar10-next-scale"])
def test_models_that_draw_tokens(client, model):
    out = client.predict(**{**ONE, "model": model})
    assert pixels(out["images"][0][0]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidances": ["CFG(3.0", "none"]}, "guidance 1: "),
        ({"guidances": ["__import__('os').system('true')"]}, "guidance 1: "),
        ({"guidances": ["CFG(2.0)"] * 7}, "compare 1 to 6"),
        ({"guidances": []}, "compare 1 to 6"),
        ({"guidances": [3]}, "guidance 1: "),
        ({"guidances": 5}, "a list of expressions"),
        ({"guidances": None}, "a list of expressions"),
        ({"guidances": ["CFG(1e39)"]}, "1e+09 allowed"),
        ({"guidances": ["C" * 5000]}, "at most 2000"),
        ({"model": "../../../etc/passwd"}, "model: "),
        ({"classes": ["unicorn"]}, "classes: "),
        ({"classes": 5}, "5"),
        ({"seeds": "0-8"}, "seeds: "),
        ({"steps": 100000}, "steps: "),
        ({"steps": "many"}, "steps: "),
        ({"sampler": "restart(points=1000000)"}, "sampler: "),
        ({"sampler": None}, "sampler: "),
    ],
)
def test_bad_input_is_a_message_at_its_field(client, changes, words):
    if changes == {"classes": 5}:
        assert pixels(client.predict(**{**ONE, **changes})["images"][0][0]).shape == (32, 32, 3)  # a number is a class, too
        return
    with pytest.raises(AppError, match=r"(?s)^(?!.*Traceback)") as error:
        client.predict(**{**ONE, **changes})
    assert words in str(error.value)


def test_one_expression_is_a_list_of_one(client):
    assert len(client.predict(**{**ONE, "guidances": "CFG(2.0)"})["images"]) == 1


def test_an_unexpected_error_shows_an_id_and_nothing_else(client, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("genkit_apps.tabs.compare.plan", broken)
    with caplog.at_level(logging.ERROR, "genkit_apps"), pytest.raises(AppError) as error:
        client.predict(**ONE)
    assert "secret" not in str(error.value)
    number = caplog.records[-1].args[0]
    assert number in str(error.value)
    assert "secret detail" in str(caplog.records[-1].exc_info[1])


def test_the_generate_button_works_over_the_api_and_says_what_is_wrong_at_the_field(url):
    client = connect(url)
    messages = client.predict(seeds="zero", guidance_2="CFG(", api_name="/compare_generate")
    assert any("zero&#x27; is no seed" in str(m) for m in messages)
    assert any("not an expression" in str(m) for m in messages)
    done = client.predict(seeds="1", classes=["cat"], steps=1, api_name="/compare_generate")
    bundle = next(
        m for m in done if str(m).endswith(".zip") or (isinstance(m, dict) and str(m.get("value", "")).endswith(".zip"))
    )
    assert Path(bundle["value"] if isinstance(bundle, dict) else bundle).stat().st_size > 1000
    shown = client.predict(view="Difference from column 1", gain=4, api_name="/compare_view")
    assert "|column 2 − column 1| × 4" in shown


def test_ten_users_at_once_are_all_served(url):
    def one(k: int) -> int:
        out = connect(url).predict(**{**ONE, "seeds": str(k)})
        return out["record"]["seeds"][0]

    with ThreadPoolExecutor(10) as users:
        assert list(users.map(one, range(10))) == list(range(10))


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_cancelling_frees_the_worker(url, client):
    before = time.process_time()
    long = client.submit(**{**ONE, "seeds": "0-7", "steps": 200, "sampler": "heun"})
    wait_until(lambda: len(long.outputs()) > 1)
    assert {"step", "total", "text"} <= set(long.outputs()[0])
    long.cancel()
    wait_until(lambda: not jobs._running)
    assert client.predict(**ONE)["record"]["seeds"] == [3]
    assert time.process_time() - before < 20  # all 200 steps take longer


def test_cancel_button_ends_only_the_work_of_its_session(url):
    mine, other = connect(url), connect(url)
    long = mine.submit(seeds="0-3", steps=200, sampler="heun", api_name="/compare_generate")
    wait_until(lambda: jobs._running)
    assert "Nothing is running" in other.predict(api_name="/compare_cancel")
    assert "Cancelled" in mine.predict(api_name="/compare_cancel")
    assert any("Cancelled." in str(part) for part in long.result(timeout=60))
    assert not jobs._running


def test_cancelling_without_a_session_leaves_the_work_of_others_alone(url, client):
    long = client.submit(**{**ONE, "steps": 60, "sampler": "heun"})
    wait_until(lambda: jobs._running)
    for name in ("compare", "trajectory", "autoregressive"):
        for sender in ({}, {"session_hash": ""}, {"session_hash": None}):
            answer = httpx.post(f"{url}/gradio_api/run/{name}_cancel", json={"data": [], **sender})
            assert "Nothing is running" in answer.text
    assert long.result(timeout=120)["images"]


ASK = {"data": ["builtin/cifar10", ["CFG(2.0)"], ["cat"], "", "3", "euler", 1]}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.org"},
        {"Origin": "https://example.org", "Host": "example.org"},  # its name has been given this machine's address
        {"Host": "example.org"},
        {"Origin": "https://example.org", "Host": "localhost."},
        {"Origin": "https://example.org", "Host": "x.localhost"},
        {"Origin": "https://example.org", "Host": "[::1]"},
        {"Origin": "https://example.org", "Host": "127.0.0.1", "X-Forwarded-Host": "localhost"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site", "Host": "localhost"},
        {"Host": "[::1"},
    ],
)
def test_pages_of_other_sites_cannot_use_the_app(url, headers):
    answers = [httpx.post(f"{url}/gradio_api/call/compare", json=ASK, headers=headers)]
    answers.append(httpx.get(f"{url}/config", headers=headers))
    assert [answer.status_code for answer in answers] == [403, 403]


def test_the_page_itself_can_whatever_the_name_of_this_machine(url):
    port = httpx.URL(url).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        for site in ({}, {"Sec-Fetch-Site": "same-origin"}):
            headers = {"Host": host, "Origin": f"http://{host}", **site}
            assert httpx.get(f"{url}/config", headers=headers).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}  # a link in another page
    assert httpx.get(url + "/", headers=link).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=%2fetc%2fpasswd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=HTTPS://example.org/",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/proxy=https://example.hf.space/",
        "/static/../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/theme.css/../../etc/passwd",
        "/openapi.json",
        "/docs",
    ],
)
def test_nothing_outside_is_served(url, path):
    answer = httpx.get(httpx.URL(url + path), follow_redirects=False)
    assert answer.status_code in (307, 400, 403, 404, 405, 422) or "root:" not in answer.text
    assert "root:x" not in answer.text
    assert answer.status_code != 200 or "<html" in answer.text.lower()


@pytest.mark.parametrize("place", ["pyproject.toml", "genkit/__init__.py", "."])
def test_the_working_directory_is_not_served(url, place):
    assert httpx.get(f"{url}/gradio_api/file={Path(place).resolve()}").status_code == 403


def test_only_the_apps_own_folder_is_served(url, tmp_path):
    inside, outside = own_folder() / "note.txt", tmp_path / "note.txt"
    for path in (inside, outside):
        path.write_text("hello")
    (own_folder() / "link.txt").symlink_to(outside)
    assert httpx.get(f"{url}/gradio_api/file={inside}").text == "hello"
    assert httpx.get(f"{url}/gradio_api/file={outside}").status_code == 403
    assert httpx.get(f"{url}/gradio_api/file={own_folder()}/link.txt").status_code == 403


def test_uploads_are_refused(url):
    for place in ("/gradio_api/upload", "/upload", "/gradio_api/upload/", "/gradio_api/process_recording"):
        answer = httpx.post(url + place, files={"files": ("x.html", b"<script>alert(1)</script>", "text/html")})
        assert answer.status_code in (403, 404, 405)
    assert not list(own_folder().rglob("x.html"))


def test_long_bodies_are_refused(url):
    body = b'{"data": ["' + b"x" * (2 << 20) + b'"]}'
    assert httpx.post(f"{url}/gradio_api/queue/join", content=body).status_code == 413

    def chunks():
        for _ in range(64):
            yield b"x" * (1 << 16)

    with contextlib.suppress(httpx.HTTPError):  # cut off
        assert httpx.post(f"{url}/gradio_api/queue/join", content=chunks()).status_code >= 400


def test_the_page_asks_no_other_host_for_anything(url):
    answer = httpx.get(url + "/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.googleapis" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_public_event_is_documented_with_typed_parameters(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {"/compare", "/compare_cancel"} <= set(named)
    names = [p["parameter_name"] for p in named["/compare"]["parameters"]]
    assert names == ["model", "guidances", "classes", "prompt", "seeds", "sampler", "steps"]


def test_a_password_is_asked_for(models):
    page = build(models)
    _, url, _ = serve(page, server_port=0, prevent_thread_lock=True, auth=login("the password"))
    try:
        assert httpx.get(url + "config").status_code == 401
        asked = httpx.get(url).text
        assert "auth_required" in asked
        assert "builtin/cifar10" not in asked
        assert httpx.post(url + "gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}).status_code == 401
        with pytest.raises(Exception, match=r"(?i)auth|credential|login"):
            connect(url, auth=("any", "wrong password"))
        named = {"Host": "example.org", "Origin": "https://example.org"}  # behind a name of its own
        assert httpx.get(url + "config", headers=named).status_code == 401
        assert httpx.get(url + "config", headers={**named, "Origin": "https://example.net"}).status_code == 403
        client = connect(url, auth=("any", "the password"))
        assert client.predict(**ONE)["record"]["seeds"] == [3]
    finally:
        page.close()
