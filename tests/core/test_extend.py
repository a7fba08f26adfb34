"""Prompt extension over HTTP: a real server on loopback that speaks both protocols, and misbehaves in every way."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.core.language_server import (
    CHINESE,
    ENGLISH,
    KEY,
    LanguageServer,
    answers,
    breaks_off,
    drips,
    endless,
    language_server,
    no_http,
    refuses,
    refuses_until,
    says,
    silent,
)
from wan_core.errors import WanError
from wan_core.prompt.extension import STOP
from wan_core.prompt.extension import post as posting
from wan_core.prompt.extension.answer import prompt_of
from wan_core.prompt.extension.endpoint import Endpoint, without_key
from wan_core.prompt.extension.extend import Extended, PromptExtender
from wan_core.prompt.extension.instructions import instructions
from wan_core.prompt.extension.picture import AREA, encoded, small_size
from wan_core.prompt.extension.question import Answer, AnswerFailed
from wan_core.prompt.extension.servers import PROTOCOLS, ServerMethod
from wan_core.prompt.vocabulary import GROUPS


@pytest.fixture(scope="module")
def running() -> Iterator[LanguageServer]:
    with language_server() as server:
        yield server


@pytest.fixture
def server(running: LanguageServer) -> LanguageServer:
    running.again()
    return running


@pytest.fixture(params=list(PROTOCOLS))
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


def method(server: LanguageServer, protocol: str, *, model: str = "some-model", seconds: float = 5) -> ServerMethod:
    return ServerMethod(PROTOCOLS[protocol], Endpoint(getattr(server, protocol), KEY), model, seconds)


def extend(server: LanguageServer, protocol: str, prompt: str = "a cat", **options: object) -> Extended:
    how = {name: options.pop(name) for name in ("model", "seconds") if name in options}
    return PromptExtender().extend(method(server, protocol, **how), prompt, **options)


# --- what is asked and what comes back


@pytest.mark.parametrize(("prompt", "language", "expected"), [
    ("a cat", "auto", ENGLISH), ("一只猫", "auto", CHINESE), ("a cat", "zh", CHINESE), ("一只猫", "en", ENGLISH),
])  # fmt: skip
def test_words_in_both_languages(server, protocol: str, prompt: str, language: str, expected: str) -> None:
    result = extend(server, protocol, prompt, language=language, seed=2**40 + 5)
    assert result == Extended(expected)
    (asked,) = server.asked
    assert asked.user == prompt
    assert asked.system == instructions(0, "zh" if expected == CHINESE else "en", empty=False)
    assert asked.body["model"] == "some-model"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    seed = asked.body["parameters"]["seed"] if protocol == "dashscope" else asked.body["seed"]
    assert seed == 5  # below 2^31: DashScope takes no more


@pytest.mark.parametrize("prompt", ["the cat jumps", ""])
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_with_and_without_words(server, protocol: str, prompt: str, count: int) -> None:
    pictures = [Image.new("RGB", (3000, 1500), colour) for colour in ("red", "blue")[:count]]
    assert extend(server, protocol, prompt, pictures=pictures) == Extended(ENGLISH)
    (asked,) = server.asked
    assert asked.system == instructions(count, "en", empty=not prompt)
    assert asked.user == (prompt or "There are no words to it: the picture alone.")
    seen = asked.pictures
    assert [picture.size for picture in seen] == [(724, 362)] * count
    assert [max(range(3), key=lambda c: picture.getpixel((9, 9))[c]) for picture in seen] == [0, 2][:count]


def test_models_are_the_official_ones_where_none_is_named(server) -> None:
    extend(server, "dashscope", model="")
    extend(server, "dashscope", model="", pictures=[Image.new("RGB", (64, 64))])
    assert [asked.body["model"] for asked in server.asked] == ["qwen-plus", "qwen-vl-max"]


@pytest.mark.parametrize("end", ["/?api-version=1#x", "/chat/completions?api-version=1"])
def test_an_address_may_have_a_query_and_the_methods_own_path(server, end: str) -> None:
    server.faults = [says(ENGLISH)]
    found = ServerMethod(PROTOCOLS["openai"], Endpoint(server.openai + end, KEY), "m")
    assert PromptExtender().extend(found, "a cat") == Extended(ENGLISH)
    assert server.asked[0].path == "/v1/chat/completions?api-version=1"


def test_no_key_is_sent_where_there_is_none(server) -> None:
    server.faults = [says(ENGLISH)]
    found = ServerMethod(PROTOCOLS["openai"], Endpoint(server.openai), "local-model")
    assert PromptExtender().extend(found, "a cat") == Extended(ENGLISH)
    assert "Authorization" not in server.asked[0].headers


# --- answers that are no prompt


@pytest.mark.parametrize(("text", "prompt"), [
    (f'  "{ENGLISH}"\n', ENGLISH),
    (f"**Prompt:** {ENGLISH}", ENGLISH),
    (f"Extended video prompt:\n\n{ENGLISH}", ENGLISH),
    (f"改写后的提示词：{CHINESE}", CHINESE),
    (f"“{CHINESE}”", CHINESE),
    (f"```text\n{ENGLISH}\n```", ENGLISH),
    (f"<think>A cat, so…\n\nWait.</think>\n\n{ENGLISH}", ENGLISH),
    ("One line.\nAnother\u200b one.\r\n\r\nThe\tthird.", "One line. Another one. The third."),
    ('"Go!" says the man, and the dog answers "No."', '"Go!" says the man, and the dog answers "No."'),
    ([{"type": "text", "text": ENGLISH[:40]}, {"text": ENGLISH[40:]}, {"image": "x"}], ENGLISH),
])  # fmt: skip
def test_what_stands_around_a_prompt_is_taken_off(server, protocol: str, text: object, prompt: str) -> None:
    server.faults = [says(text)]
    assert extend(server, protocol, language="zh" if prompt == CHINESE else "en") == Extended(prompt)


NO_PROMPTS = {
    "empty": (says(""), "the answer is empty"),
    "spaces": (says(" \n\t\u200b"), "the answer is empty"),
    "only thoughts": (says("<think>Let me see, a cat"), "the answer is empty"),
    "long": (says("word " * 1000), "the answer has 4999 characters"),
    "control characters": (says("a cat\x00\x1b[31m"), "garbled"),
    "replacement characters": (says("a c\ufffd\ufffdt"), "garbled"),
    "half a pair": (says("a cat \ud83d"), "garbled"),
    "no letters": (says("..., !!! 12 34"), "garbled"),
    "going in circles": (says("The cat walks on the beach. " * 20), "repeats itself"),
    "refusal in words": (says("I'm sorry, but I can't help with that."), "the model refuses"),
    "refusal in Chinese": (says("很抱歉，我无法提供这样的内容。"), "the model refuses"),
    "a number": (says(7), "answers without a text"),
    "none": (says(None), "answers without a text"),
    "filtered": (says("", finish_reason="content_filter"), "filter of contents"),
    "no choices": (answers({"choices": [], "output": {"choices": []}}), "answers without a text"),
    "a list": (answers([1, 2]), "answers without a text"),
    "another object": (answers({"choices": {"0": 1}, "output": "x"}), "answers without a text"),
    "an error with 200": (answers({"error": {"message": "no such model"}}), "answers without a text: no such model"),
}  # fmt: skip


@pytest.mark.parametrize("fault", NO_PROMPTS)
def test_what_is_no_prompt_leaves_the_given_one(server, protocol: str, fault: str) -> None:
    server.faults, (_, reason) = [NO_PROMPTS[fault][0]], NO_PROMPTS[fault]
    result = extend(server, protocol)
    assert result.prompt == "a cat" and result.failed and len(server.asked) == 1
    (note,) = result.notes
    assert note.startswith("The prompt could not be extended: ") and reason in note
    assert note.endswith(". The prompt is used as it was given.") and "?." not in note and ".." not in note


def test_a_refusal_of_openais(server) -> None:
    server.faults = [says(None, message={"refusal": "I cannot do that."})]
    assert "the model refuses" in extend(server, "openai").notes[0]


def test_an_answer_cut_at_the_limit_ends_with_a_sentence(server, protocol: str) -> None:
    server.faults = [says("A cat sits. It turns its head. Then it ju", finish_reason="length")]
    result = extend(server, protocol)
    assert result.prompt == "A cat sits. It turns its head." and not result.failed
    assert "cut at the model's limit" in result.notes[0]


def test_another_language_is_said(server, protocol: str) -> None:
    server.faults = [says(CHINESE)]
    result = extend(server, protocol, language="en")
    assert result.prompt == CHINESE and "not in English" in result.notes[0] and not result.failed


def test_prose_is_not_taken_for_going_in_circles() -> None:
    for text, language in ((ENGLISH, "en"), (CHINESE * 2, "zh"), (instructions(0, "en", empty=False)[:3500], "en")):
        assert prompt_of(Answer(text), language)[1] == []


# --- servers that misbehave

FAULTS = {
    "a wrong key": (refuses(401, f"Incorrect API key provided: {KEY}."), "refuses the key (HTTP 401): Incorrect API"),
    "a part of the key": (refuses(403, f"Key {KEY[:12]}***{KEY[-8:]} is disabled."), "Key …***… is disabled"),
    "no such model": (refuses(404, "The model does not exist"), "does not know the page or the model (HTTP 404)"),
    "a bad request": (refuses(400, "Too long."), "refuses the request (HTTP 400): Too long."),
    "a teapot without words": (answers(b"", "text/plain", 418), "refuses the request (HTTP 418)."),
    "a page": (answers(b"<html>Log in</html>", "text/html"), "with text/html instead of JSON"),
    "an event stream": (answers(b"data: {}", "text/event-stream"), "with text/event-stream instead of JSON"),
    "JSON that is called text": (answers({"choices": []}, "text/plain"), "with text/plain instead of JSON"),
    "half of JSON": (answers(b'{"choices": [{"mess'), "something that is no JSON"),
    "bytes": (answers(bytes(range(256))), "something that is no JSON"),
    "nothing": (answers(b""), "something that is no JSON"),
    "a deep nest": (answers(b"[" * 500_000), "something that is no JSON"),
    "a huge number": (answers(b'{"choices": ' + b"9" * 10_000 + b"}"), "something that is no JSON"),
    "two megabytes": (answers(json.dumps(says.__doc__).encode() + b" " * (2 << 20)), "more than 1 MB"),
    "an endless answer": (endless, "more than 1 MB"),
    "packed megabytes": (answers(gzip.compress(b" " * (64 << 20)), Content_Encoding="gzip"), "more than 1 MB"),
    "packing that is none": (answers(b"abc", Content_Encoding="gzip"), "broke the connection off, 4 times"),
    "no HTTP": (no_http, "something that is no HTTP"),
    "long waits": (refuses(429, Retry_After="3600"), "can be asked again in 3600 seconds only"),
    "a wait till tomorrow": (refuses_until(86_400), "seconds only"),
}  # fmt: skip


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which are not waited for."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        if seconds:
            waits.append(seconds)

    monkeypatch.setattr(posting.asyncio, "sleep", sleep)
    return waits


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_leave_the_given_prompt(server, hurried, protocol: str, fault: str, caplog) -> None:
    server.forever, reason = FAULTS[fault]
    with caplog.at_level(logging.DEBUG):
        result = extend(server, protocol, seconds=30)
    assert result.prompt == "a cat" and result.failed
    assert reason in result.notes[0] and len(result.notes[0]) < 600 and ".." not in result.notes[0]
    assert not leaks("\n".join([result.notes[0], caplog.text]))


def leaks(text: str) -> bool:
    """Whether eight characters of the key in a row stand in a text."""
    return any(KEY[i : i + 8] in text for i in range(len(KEY) - 7))


@pytest.mark.parametrize("fault", [silent, drips], ids=["silence", "a byte now and then"])
def test_time_is_bounded(server, protocol: str, fault) -> None:
    server.faults, start = [fault], time.monotonic()
    result = extend(server, protocol, seconds=0.6)
    assert result.failed and "did not answer within 0.6 seconds" in result.notes[0]
    assert 0.5 < time.monotonic() - start < 3
    assert server.broken_off.wait(3)  # the connection is closed, not left behind


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_state_that_passes_is_waited_for(server, hurried, protocol: str, status: int) -> None:
    server.faults = [refuses(status), breaks_off, refuses(status, Retry_After="7")]
    assert extend(server, protocol, seconds=30) == Extended(ENGLISH)
    assert len(server.asked) == 4 and hurried == [1.0, 2.0, 7.0]


def test_retry_after_as_a_date(server, hurried) -> None:
    server.faults = [refuses_until(20)]
    assert extend(server, "openai", seconds=30) == Extended(ENGLISH)
    assert 18 < hurried[0] <= 20


def test_a_real_wait(server) -> None:
    server.faults = [refuses(429, Retry_After="1")]
    assert extend(server, "openai") == Extended(ENGLISH)
    assert 1 <= server.asked[1].at - server.asked[0].at < 2.5


def test_it_gives_up_after_four_tries(server, hurried, protocol: str) -> None:
    server.forever = refuses(503, "Busy.")
    assert "is not ready (HTTP 503): Busy., 4 times" in extend(server, protocol, seconds=60).notes[0]
    assert len(server.asked) == 4 and hurried == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("elsewhere", ["another server", "https://evil.example/v1?key=1", "file:///etc/passwd", ""])
def test_redirects_are_not_followed(server, protocol: str, status: int, elsewhere: str) -> None:
    with language_server() as other:
        target = other.url if elsewhere == "another server" else elsewhere
        server.faults = [refuses(status, Location=target)]
        result = extend(server, protocol)
        assert result.failed and "sends on to" in result.notes[0] and "key=1" not in result.notes[0]
        assert other.asked == [] and len(server.asked) == 1


def test_nobody_listens(protocol: str) -> None:
    with language_server() as gone:
        found = method(gone, protocol)
    result = PromptExtender().extend(found, "a cat")
    assert result.failed and "could not be asked" in result.notes[0] and not leaks(result.notes[0])


def test_a_host_that_does_not_exist() -> None:
    found = ServerMethod(PROTOCOLS["openai"], Endpoint("https://no-such-host.invalid/v1", KEY), "m", 20)
    result = PromptExtender().extend(found, "a cat")
    assert result.failed and "https://no-such-host.invalid/v1 could not be asked" in result.notes[0]


def test_failing_instead(server, protocol: str) -> None:
    server.faults = [says("")]
    with pytest.raises(WanError, match="could not be extended: the answer is empty"):
        extend(server, protocol, on_failure=STOP)


def test_a_picture_alone_has_no_prompt_to_go_on_with(server, protocol: str) -> None:
    server.faults = [refuses(400)]
    with pytest.raises(WanError, match="There is no prompt to go on with"):
        extend(server, protocol, "", pictures=[Image.new("RGB", (64, 64))])


def test_cancelling_closes_the_connection(server, protocol: str) -> None:
    server.faults, start = [silent], time.monotonic()

    class Cancelled(Exception):
        pass

    def check() -> None:
        if server.asked:
            raise Cancelled

    before = threading.active_count()
    with pytest.raises(Cancelled):
        extend(server, protocol, seconds=60, check=check)
    assert time.monotonic() - start < 3 and server.broken_off.wait(3)
    assert threading.active_count() <= before + 1  # the server's own, which may still end


def test_a_name_that_nobody_answers_for_is_let_go(monkeypatch) -> None:
    """The system's look-up cannot be cancelled; nobody waits for it."""
    found, asked = threading.Event(), threading.Event()

    def look_up(*_: object, **__: object) -> None:
        asked.set()
        found.wait(20)
        raise OSError("nobody")

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    hanging = ServerMethod(PROTOCOLS["openai"], Endpoint("https://hangs.invalid/v1", KEY), "m", 0.5)
    start = time.monotonic()
    assert "did not answer within 0.5 seconds" in PromptExtender().extend(hanging, "a cat").notes[0]
    with pytest.raises(KeyboardInterrupt):
        PromptExtender().extend(hanging, "a dog", check=check)
    assert time.monotonic() - start < 5
    found.set()


def test_proxies_come_from_the_environment_but_not_for_this_machine(monkeypatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    assert posting._proxy("https://api.example/v1") == "http://proxy.example:3128"
    assert posting._proxy("https://127.0.0.1/v1") is None
    monkeypatch.setenv("no_proxy", "api.example")
    assert posting._proxy("https://api.example/v1") is None


# --- keys and addresses


@pytest.mark.parametrize(("url", "reason"), [
    ("ftp://host/v1", "begins with https:// or http://"),
    ("file:///etc/passwd", "begins with https:// or http://"),
    ("host/v1", "begins with https:// or http://"),
    ("https:///v1", "names no host"),
    ("https://user:secret@host/v1", "a user name or a password"),
    ("https://host:99999/v1", "cannot be read"),
    ("http://[::1/v1", "cannot be read"),
    ("http://api.example/v1", "unencrypted"),
    ("http://8.8.8.8/v1", "unencrypted"),
])  # fmt: skip
def test_addresses_that_are_refused(url: str, reason: str) -> None:
    with pytest.raises(WanError, match=reason) as error:
        ServerMethod(PROTOCOLS["openai"], Endpoint(url, KEY), "m").check()
    assert not leaks(str(error.value)) and "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://localhost/v1", "http://192.168.1.5:11434/v1",
                                 "http://[::1]:80/v1", "https://api.example"])  # fmt: skip
def test_addresses_that_get_a_key(url: str) -> None:
    ServerMethod(PROTOCOLS["openai"], Endpoint(url, KEY), "m").check()


@pytest.mark.parametrize("key", ["two words", "line\r\nX-Evil: 1", "schlüssel", "tab\t"])
def test_keys_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(WanError, match="copy it again") as error:
        Endpoint("https://host/v1", key).check()
    assert key not in str(error.value)


def test_the_key_and_its_address_come_from_one_place() -> None:
    openai, dashscope = PROTOCOLS["openai"], PROTOCOLS["dashscope"]
    environment = {"OPENAI_API_KEY": " env ", "OPENAI_BASE_URL": "https://env.example/v1", "DASH_API_KEY": "dash"}
    assert openai.endpoint({}, environment) == Endpoint("https://env.example/v1", "env")
    assert openai.endpoint({"url": "https://mine/v1"}, environment) == Endpoint("https://mine/v1", "")
    assert openai.endpoint({"key": "k", "url": " "}, environment) == Endpoint("https://api.openai.com/v1", "k")
    assert dashscope.endpoint({}, environment) == Endpoint("https://dashscope.aliyuncs.com/api/v1", "dash")
    other = {"DASH_API_KEY": "k", "DASH_API_URL": "https://dashscope-intl.aliyuncs.com/api/v1"}
    assert dashscope.endpoint({}, other).url == other["DASH_API_URL"]


def test_what_is_missing_is_said_before_anything_is_sent() -> None:
    for name, protocol in PROTOCOLS.items():
        with pytest.raises(WanError, match="needs a key") as error:
            ServerMethod(protocol, protocol.endpoint({}, {}), "m").check()
        assert error.value.details["variable"] == protocol.key_variable, name
    with pytest.raises(WanError, match="needs the name of a model"):
        ServerMethod(PROTOCOLS["openai"], Endpoint("http://127.0.0.1:1/v1")).check()


def test_a_key_is_not_in_what_python_shows(server) -> None:
    found = method(server, "openai")
    assert not leaks(repr(found)) and not leaks(str(found.identity)) and not leaks(repr(vars(found)["endpoint"]))


@pytest.mark.parametrize(("text", "shown"), [
    (f"Bearer {KEY}!", "Bearer …!"), (f"{KEY[3:]} and {KEY[:9]}", "… and …"), ("no key", "no key"),
    (KEY[:5], KEY[:5]), (KEY * 2, "……"), ("", ""),
])  # fmt: skip
def test_pieces_of_a_key_are_taken_out(text: str, shown: str) -> None:
    assert without_key(text, KEY) == shown
    assert without_key(text, "") == text


# --- the cache


def test_a_question_is_asked_once(server, protocol: str) -> None:
    extender, found = PromptExtender(), method(server, protocol)
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    different = [
        {"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": "a cat", "seed": 1}, {"prompt": "a cat", "language": "zh"},
        {"prompt": "a cat", "pictures": [red]}, {"prompt": "a cat", "pictures": [blue]},
        {"prompt": "", "pictures": [red]}, {"prompt": "a cat", "pictures": [red, blue]},
    ]  # fmt: skip
    for _ in range(2):
        for question in different:
            extender.extend(found, **question)
        assert len(server.asked) == len(different)
    extender.extend(method(server, protocol, model="another"), "a cat")
    assert len(server.asked) == len(different) + 1


def test_failures_are_not_remembered(server, protocol: str) -> None:
    extender, found = PromptExtender(), method(server, protocol)
    server.faults = [refuses(400)]
    assert extender.extend(found, "a cat").failed and extender.failures == {found.identity: 1}
    assert extender.extend(found, "a cat") == Extended(ENGLISH) and extender.failures == {found.identity: 1}
    server.faults = [says("A cat sits. It", finish_reason="length")]
    notes = extender.extend(found, "a dog").notes
    assert notes and extender.extend(found, "a dog").notes == notes and len(server.asked) == 3


def test_the_cache_is_bounded(server) -> None:
    extender, found = PromptExtender(kept=3), method(server, "openai")
    for number in range(5):
        extender.extend(found, f"cat {number}")
    assert len(extender._answers) == 3
    extender.extend(found, "cat 4")
    assert len(server.asked) == 5
    extender.extend(found, "cat 0")
    assert len(server.asked) == 6


# --- what is refused before it is asked


def test_nothing_to_extend(server, protocol: str) -> None:
    with pytest.raises(WanError, match="nothing to extend"):
        extend(server, protocol, " \n")
    with pytest.raises(WanError, match="language of a prompt 'fr'"):
        extend(server, protocol, language="fr")
    with pytest.raises(WanError, match="choice for a failure 'perhaps'"):
        extend(server, protocol, on_failure="perhaps")
    result = extend(server, protocol, "word " * 3000)
    assert result.failed and result.prompt == "word " * 3000 and "15000 characters already" in result.notes[0]
    assert server.asked == []


# --- instructions and pictures


@pytest.mark.parametrize("language", ["en", "zh"])
def test_instructions_are_in_wans_words(language: str) -> None:
    """Whole groups of the vocabulary; the looks where there is no picture to have them, movement everywhere."""
    told = {
        (n, empty): instructions(n, language, empty=empty)
        for n in range(3)
        for empty in (False, True)
        if n or not empty
    }
    assert len(set(told.values())) == 5
    for (pictures, _), text in told.items():
        for group in ("camera_movement", *(("light_source", "shot_size", "composition") if not pictures else ())):
            assert all(getattr(term, language) in text for term in GROUPS[group].terms)
        assert ("light_source" in text or getattr(GROUPS["light_source"], language) in text) == (not pictures)
        assert ("English" in text) == (language == "en") and ("中文" in text) == (language == "zh")


@pytest.mark.parametrize("size", [(64, 48), (4000, 3000), (3000, 4000), (512, 512), (100_000, 10), (1, 5000), (1, 1)])
def test_pictures_are_bounded(size: tuple[int, int]) -> None:
    width, height = small_size(*size)
    assert min(width, height) >= 28 and width * height <= 1.01 * AREA
    if min(size) >= 28 and max(size) / min(size) < 10:
        assert abs(width / height - size[0] / size[1]) < 0.02
        assert width <= size[0] and height <= size[1]


def test_pictures_lose_what_the_camera_wrote(tmp_path) -> None:
    noise = Image.effect_noise((900, 700), 80).convert("RGBA")
    exif = Image.Exif()
    exif[0x010F] = "the camera's maker"
    noise.convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as photograph:
        assert b"maker" not in encoded(photograph) and b"Exif" not in encoded(photograph)
    assert encoded(noise) == encoded(noise.copy()) and len(encoded(noise)) < 400_000


def test_a_question_that_fails_is_an_answer_that_failed() -> None:
    """The two errors are told apart: what the user must mend, and what happened on the way."""
    assert not issubclass(AnswerFailed, WanError)
