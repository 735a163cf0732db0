"""`sbrush serve`: every door gives the image of `sbrush sample`, and what is senseless is refused."""

import asyncio
import base64
import io
import json
import re
import time

import httpx2
import openai
import pytest
from PIL import Image

from conftest import sbrush
from sbrush.models.lora_request import parse_loras
from sbrush.sampling.files import SampleRequest, load_artist
from sbrush.sampling.generation import student_images
from sbrush.sampling.images import to_image
from sbrush.sampling.targets import Images, Target
from sbrush.serving.address import Access
from sbrush.serving.app import create_app
from sbrush.serving.guard import LARGEST_BODY
from sbrush.serving.server import Capacity, warm_service
from serving import listening, load

KEY = "correct-horse-battery"
IDENTIFIED = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def artist(tiny_teacher):
    return load(tiny_teacher)


@pytest.fixture(scope="module")
def service(artist):
    with warm_service(artist, Capacity()) as one:
        yield one


def ask(service, method, path, *, access=Access(), base="http://127.0.0.1:7860", **options):  # noqa: B008
    """What the whole server answers, asked without a network."""

    async def asked():
        transport = httpx2.ASGITransport(create_app(service, access))
        async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())


def draw(service, **fields):
    return ask(service, "POST", "/api/draw", json={"prompt": "a cat", "seed": 1} | fields)


def opened(data):
    return Image.open(io.BytesIO(data))


def pixels(service, prompt, seed):
    return to_image(next(student_images(service.student, [prompt], [seed]))[0]).tobytes()


def same(data, service, prompt, seed):
    """Whether a file's image is the student's, but for what another batch's rounding changes."""
    pairs = zip(opened(data).convert("RGB").tobytes(), pixels(service, prompt, seed), strict=True)
    return max(abs(a - b) for a, b in pairs) <= 2


def refusal(answer, status):
    """The message of an answer that refuses, which is the same for both doors' clients."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["error"]["message"] == body["detail"]
    return body["detail"]


# ---- the images


def test_the_image_and_its_metadata_are_those_of_sbrush_sample(service, tiny_teacher, tmp_path):
    answer = draw(service)
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-sbrush-seeds"] == "1"
    done = sbrush(
        "sample", "a cat", "--seed", 1, "--student", tiny_teacher, "--device", "cpu", "-o", tmp_path / "x.png"
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x.png") as theirs:
        ours = opened(answer.content)
        assert ours.tobytes() == theirs.tobytes()
        assert ours.text == theirs.text


def test_a_negative_prompt_is_that_of_sbrush_sample(service, tiny_teacher, tmp_path):
    answer = draw(service, negative="a dog")
    arguments = ["--negative", "a dog", "--seed", 1, "--student", tiny_teacher, "--device", "cpu"]
    done = sbrush("sample", "a cat", *arguments, "-o", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x.png") as theirs:
        ours = opened(answer.content)
        assert ours.tobytes() == theirs.tobytes() and ours.text == theirs.text
    assert ours.tobytes() != opened(draw(service).content).tobytes()
    assert draw(service, negative=" ").content == draw(service).content
    assert "longer than the 16 tokens" in refusal(draw(service, negative="dog " * 60), 400)


def test_a_lora_is_in_the_students_weights_and_in_what_it_says_of_itself():
    request = SampleRequest(Images(["a cat"], [0]), Target(None), loras=parse_loras(["blueprint"]))
    with warm_service(load_artist(request), Capacity()) as service:
        assert ask(service, "GET", "/api/info").json()["loras"] == ["blueprint"]
        assert json.loads(opened(draw(service).content).text["sbrush"])["loras"][0]["name"] == "blueprint"


def test_onnx_graphs_draw_and_take_no_negative_prompt():
    with warm_service(load(None, "onnx"), Capacity()) as service:
        assert ask(service, "GET", "/api/info").json()["negative"] is False
        answer = draw(service, prompt="a small red cat on fire")
        assert json.loads(answer.headers["x-sbrush-notes"]) == ["the built-in world has never seen: fire"]
        assert "--runtime torch" in refusal(draw(service, negative="a dog"), 400)
        sent = {"prompt": "a cat", "negative_prompt": "ugly"}
        info = json.loads(ask(service, "POST", "/sdapi/v1/txt2img", json=sent).json()["info"])
        assert info["notes"] == ["without effect: negative_prompt"] and info["negative_prompt"] == ""


def test_a_seed_that_nobody_chose_is_told(service):
    seeds = [draw(service, seed=None).headers["x-sbrush-seeds"] for _ in range(2)]
    assert seeds[0] != seeds[1] and all(seed.isdecimal() for seed in seeds)


def test_what_a_client_should_know_is_in_a_header(service):
    notes = json.loads(draw(service, prompt="a cat " * 60).headers["x-sbrush-notes"])
    assert notes == ["the prompt is longer than the 16 tokens read; its end is cut off"]
    assert "x-sbrush-notes" not in draw(service).headers


def test_the_page_and_what_it_asks_of_the_server(service):
    page = ask(service, "GET", "/")
    assert (
        page.headers["content-type"] == "text/html; charset=utf-8"
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert link == "data:," or ask(service, "GET", f"/{link}").status_code == 200
    script = ask(service, "GET", "/page.js").text
    assert not re.search(r"https?://", page.text + script + ask(service, "GET", "/page.css").text)
    about = ask(service, "GET", "/api/info").json()
    assert (about["width"], about["height"], about["steps"], about["built_in_world"]) == (32, 32, [1], False)


def test_openapi_describes_every_route(service):
    paths = ask(service, "GET", "/openapi.json").json()["paths"]
    assert {"/api/draw", "/api/info", "/health", "/metrics", "/v1/images/generations", "/sdapi/v1/txt2img"} <= set(
        paths
    )


# ---- OpenAI's door, by its own client


async def generate(service, **fields):
    transport = httpx2.ASGITransport(create_app(service, Access(KEY)))
    async with httpx2.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(
            api_key=fields.pop("api_key", KEY), base_url="http://127.0.0.1:7860/v1", http_client=http, max_retries=0
        )
        return await client.images.generate(prompt="a cat", **fields)


def test_openais_client_gets_images(service):
    answer = asyncio.run(generate(service, model=service.student.name, n=2, size="32x32", extra_body={"seed": 5}))
    assert answer.size == "32x32" and answer.output_format == "png" and answer.created > 1.7e9
    for image, seed in zip(answer.data, (5, 6), strict=True):
        assert image.seed == seed and same(base64.b64decode(image.b64_json), service, "a cat", seed)


def test_openais_client_gets_other_formats(service):
    for kind in ("jpeg", "webp"):
        answer = asyncio.run(generate(service, output_format=kind, output_compression=80, quality="auto"))
        assert opened(base64.b64decode(answer.data[0].b64_json)).format == kind.upper()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "1024x1024"}, "mages are 32x32 pixels"),
        ({"size": "31623x31623"}, "mages are 32x32 pixels"),
        ({"n": 17}, "n: "),
        ({"response_format": "url"}, "response_format: "),
        ({"background": "transparent"}, "background: "),
        ({"extra_body": {"steps": 4}}, "this student does not draw in 4 steps"),
        ({"extra_body": {"seed": -1}}, "seed: "),
    ],
)
def test_openais_client_is_told_what_cannot_be_done(service, fields, said):
    with pytest.raises(openai.BadRequestError) as problem:
        asyncio.run(generate(service, **fields))
    assert said in str(problem.value)


def test_openais_client_is_told_of_a_wrong_key(service):
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        asyncio.run(generate(service, api_key="wrong-horse"))


def test_a_model_and_a_quality_that_there_are_not_are_noted(service):
    answer = ask(
        service, "POST", "/v1/images/generations", json={"prompt": "a cat", "model": "dall-e-3", "quality": "hd"}
    )
    notes = json.loads(answer.headers["x-sbrush-notes"])
    assert notes == ["without effect: quality", f"drawn by {service.student.name}: there is no other model"]
    assert ask(service, "GET", "/v1/models").json()["data"][0]["id"] == service.student.name


# ---- AUTOMATIC1111's door


def test_what_a1111s_front_ends_send(service):
    sent = {
        "prompt": "a cat", "negative_prompt": "ugly", "seed": 3, "steps": 20, "cfg_scale": 7, "width": 32, "height": 32,
        "sampler_name": "Euler a", "batch_size": 2, "n_iter": 1, "enable_hr": False, "eta": 0.1,
        "override_settings": {},
    }  # fmt: skip
    answer = ask(service, "POST", "/sdapi/v1/txt2img", json=sent).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [3, 4] and info["steps"] == 1 and info["sd_model_name"] == service.student.name
    assert info["notes"] == [
        "drawn in 1 steps: this student does not take 20",
        "without effect: cfg_scale, sampler_name, eta",
    ]
    assert info["negative_prompt"] == "ugly" and "Negative prompt: ugly" in info["infotexts"][0]
    for image, seed, text in zip(answer["images"], (3, 4), info["infotexts"], strict=True):
        assert opened(base64.b64decode(image)).size == (32, 32) and f"Seed: {seed}," in text
        assert opened(base64.b64decode(image)).text["parameters"] == text
    assert answer["parameters"]["width"] == 32


def test_a1111s_front_ends_choose_the_model(service):
    (model,) = ask(service, "GET", "/sdapi/v1/sd-models").json()
    options = ask(service, "GET", "/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == model["title"] and model["hash"] in options["sd_checkpoint_hash"]
    assert ask(service, "GET", "/sdapi/v1/samplers").json()[0]["name"] == "sbrush"
    assert ask(service, "POST", "/sdapi/v1/options", json=options).status_code == 200  # as Open WebUI sends them back
    answer = ask(service, "POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "another"})
    assert "'sd_model_checkpoint' cannot be changed" in refusal(answer, 400)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 512, "height": 512}, "mages are 32x32 pixels"),
        ({"width": 31623, "height": 31623}, "mages are 32x32 pixels"),
        ({"width": 10**400}, "mages are 32x32 pixels"),
        ({"enable_hr": True}, "enable_hr cannot be done"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts cannot be done"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "override_settings"),
        ({"override_settings": [1]}, "override_settings"),
        ({"batch_size": 16, "n_iter": 16}, "256 images in one request"),
        ({"seed": -2}, "seed: "),
        ({"sampler_name": "\ud800"}, "sampler_name: "),
    ],
)
def test_a1111s_front_ends_are_told_what_cannot_be_done(service, fields, said):
    content, kind = json.dumps({"prompt": "a cat"} | fields), {"content-type": "application/json"}
    assert said in refusal(ask(service, "POST", "/sdapi/v1/txt2img", content=content, headers=kind), 400)


# ---- what is senseless

BOMB = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Field required"),
        (b"{", "the body is no JSON"),
        (b"null", "valid dictionary"),
        (b"[]", "valid dictionary"),
        (BOMB, "error parsing the body"),
        (b'{"prompt": ' + BOMB + b"}", "error parsing the body"),
        (b'{"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}", "error parsing the body"),
        (b'{"prompt": "a cat", "seed": 1e400}', "seed: "),
        (b'{"prompt": "a cat", "seed": NaN}', "seed: "),
        (b'{"prompt": "a cat", "seed": -1}', "seed: "),
        (b'{"prompt": "a cat", "seed": 1.5}', "seed: "),
        (b'{"prompt": "a cat", "steps": 9999999999999999999}', "does not draw in"),
        (b'{"prompt": "a cat", "turn": -1}', "turn: "),
        (b'{"prompt": "a cat", "client": ""}', "client: "),
        (b'{"prompt": "a cat", "width": 1000000000}', "width: "),
        (b'{"prompt": 7}', "prompt: "),
        (b'{"prompt": " "}', "an empty prompt"),
        (b'{"prompt": "\\ud800"}', "prompt is not text"),
        (b'{"prompt": "' + b"a" * 10_001 + b'"}', "10,001 characters is too long"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"\x00" * 1000, "the body is no JSON"),
    ],
    ids=range(21),
)
def test_bodies_that_make_no_sense(service, body, said):
    before = service.counters.registry.get_sample_value("sbrush_images_total")
    answer = ask(service, "POST", "/api/draw", content=body, headers={"content-type": "application/json"})
    assert said in refusal(answer, 400)
    assert len(answer.content) < 1000  # what was sent is not sent back
    assert service.counters.registry.get_sample_value("sbrush_images_total") == before


def test_prompts_with_odd_characters_are_drawn(service):
    for prompt in ("a\x00cat", "猫 🐈", "‮cat", "a\ncat", "<script>alert(1)</script>"):
        answer = draw(service, prompt=prompt)
        assert answer.status_code == 200 and json.loads(opened(answer.content).text["sbrush"])["prompt"] == prompt


def test_bodies_that_are_too_large_or_packed(service):
    large = b'{"prompt": "' + b"a" * LARGEST_BODY + b'"}'
    json_ = {"content-type": "application/json"}
    assert "more than" in refusal(ask(service, "POST", "/api/draw", content=large, headers=json_), 413)

    async def pieces():
        for _ in range(20):
            yield b" " * (LARGEST_BODY // 10)

    assert "more than" in refusal(ask(service, "POST", "/api/draw", content=pieces(), headers=json_), 413)
    answer = ask(service, "POST", "/api/draw", content=b"{}", headers=json_ | {"content-encoding": "gzip"})
    assert "packed" in refusal(answer, 415)
    for length in ("-1", "1e9", "9" * 4000, "²"):
        answer = ask(service, "POST", "/api/draw", content=b"", headers={"content-length": length.encode()})
        refusal(answer, 413)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/index.html", "/docs"]
)
def test_paths_that_there_are_not(service, path):
    assert "/openapi.json" in refusal(ask(service, "GET", path), 404)
    assert service.counters.registry.get_sample_value(
        "sbrush_requests_total", {"route": "other", "status": "404"}
    )  # no counter of its own for whatever is asked


def test_other_methods_and_content_types(service):
    refusal(ask(service, "GET", "/api/draw"), 405)
    refusal(ask(service, "DELETE", "/v1/models"), 405)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        # What a page of another site could send without asking first.
        answer = ask(service, "POST", "/api/draw", content=b'{"prompt": "a cat"}', headers={"content-type": kind})
        refusal(answer, 400)


# ---- who may ask


@pytest.mark.parametrize(
    ("headers", "access", "status"),
    [
        ({"host": "127.0.0.1:7860"}, Access(), 200),
        ({"host": "localhost:8080"}, Access(), 200),
        ({"host": "[::1]:7860"}, Access(), 200),
        ({"host": "[::1]"}, Access(), 200),
        ({"host": "192.168.1.7"}, Access(), 200),
        ({"host": "evil.example"}, Access(), 403),
        ({"host": "evil.example:7860"}, Access(), 403),
        ({"host": "127.0.0.1.evil.example"}, Access(), 403),
        ({"host": ""}, Access(), 403),
        ({"host": "Proxy.example"}, Access(hosts=("proxy.example",)), 200),
        ({"origin": "http://127.0.0.1:7860"}, Access(), 200),
        ({"origin": "https://evil.example"}, Access(), 403),
        ({"origin": "http://127.0.0.1:3000"}, Access(), 403),
        ({"origin": "null"}, Access(), 403),
        ({"origin": "https://front.example"}, Access(origins=("https://front.example",)), 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, Access(), 403),
        ({"sec-fetch-site": "same-origin"}, Access(), 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, Access(), 200),
        ({}, Access(KEY), 401),
        ({"authorization": f"Bearer {KEY}"}, Access(KEY), 200),
        ({"authorization": f"Basic {base64.b64encode(b'me:' + KEY.encode()).decode()}"}, Access(KEY), 200),
        ({"authorization": f"Basic {base64.b64encode(KEY.encode() + b':').decode()}"}, Access(KEY), 401),
        ({"authorization": "Basic ?"}, Access(KEY), 401),
        ({"authorization": f"Bearer {KEY}x"}, Access(KEY), 401),
        ({"authorization": KEY}, Access(KEY), 401),
        ({"x-api-key": KEY}, Access(KEY), 401),
        ({"authorization": "Bearer ä".encode()}, Access(KEY), 401),
    ],
)
def test_who_may_ask(service, headers, access, status):
    answer = ask(service, "GET", "/api/info", access=access, headers=headers)
    assert answer.status_code == status
    if status != 200:
        refusal(answer, status)


def test_a_key_in_the_url_is_in_the_wrong_place(service):
    for name in ("api_key", "key", "token"):
        answer = ask(service, "GET", f"/api/info?{name}={KEY}", access=Access(KEY))
        assert "not in the URL" in refusal(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Basic")  # so that a browser asks for it


def test_health_needs_no_key_and_the_rest_does(service):
    assert ask(service, "GET", "/health", access=Access(KEY)).json()["status"] == "ok"
    for path in ("/", "/page.js", "/metrics", "/openapi.json", "/v1/models", "/sdapi/v1/options", "/nowhere"):
        refusal(ask(service, "GET", path, access=Access(KEY)), 401)


def test_pages_of_an_allowed_origin_can_read_the_answer(service):
    access = Access(origins=("https://front.example",))
    headers = {"origin": "https://front.example"}
    answer = ask(service, "GET", "/api/info", access=access, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://front.example"
    assert "access-control-allow-origin" not in ask(service, "GET", "/api/info").headers


# ---- counters


def test_counters(service):
    draw(service)
    text = ask(service, "GET", "/metrics").text
    for name in ("sbrush_images_total", 'sbrush_requests_total{route="/api/draw",status="200"}', "sbrush_waiting 0.0"):
        assert f"\n{name}" in text
    assert "sbrush_request_seconds_count" in text and "process_resident_memory_bytes" in text and "a cat" not in text


# ---- over a real port


def test_openais_client_over_a_real_port(artist):
    with listening(artist) as (address, service), openai.OpenAI(api_key="any", base_url=f"{address}v1") as client:
        answer = client.images.generate(prompt="a cat", size="auto", extra_body={"seed": 9})
        assert same(base64.b64decode(answer.data[0].b64_json), service, "a cat", 9)


def test_prompts_are_logged_only_if_asked(artist, capfd):
    for log_prompts in (False, True):
        with warm_service(artist, Capacity(), log_prompts=log_prompts) as service:
            draw(service, prompt="a secret cat")
            draw(service, prompt="a secret cat", steps=3)
        assert ("a secret cat" in capfd.readouterr().err) == log_prompts


def test_many_at_once_get_their_own_images(artist):
    """Sixty clients of one server, each with its own prompt and seed."""
    prompts = ["a cat", "a red dog", "a fish", "a blue car on a mint background"]

    async def all_of_them(address):
        async with httpx2.AsyncClient(base_url=address, timeout=60) as client:
            sent = [{"prompt": prompts[seed % 4], "seed": seed} for seed in range(60)]
            return await asyncio.gather(*(client.post("/api/draw", json=one) for one in sent))

    with listening(artist, capacity=Capacity(batch=8)) as (address, service):
        start = time.monotonic()
        answers = asyncio.run(all_of_them(address))
        assert time.monotonic() - start < 60
        for seed, answer in enumerate(answers):
            assert same(answer.content, service, prompts[seed % 4], seed)
        sizes = service.counters.registry.get_sample_value("sbrush_batch_size_bucket", {"le": "1.0"})
        assert sizes < 30  # most were drawn with others
