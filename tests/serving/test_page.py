"""The page: its files as they are served, and what a browser makes of them."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from reasonembed.config import ServeConfig
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.serving import page as page_room
from reasonembed.serving.keys import add_key, remove_key
from reasonembed.serving.middleware import SECURITY_HEADERS
from tests.serving.api import hash_client
from tests.serving.browser import (
    DOCUMENTS,
    GOLD,
    QUERIES,
    assembled,
    browsing,
    build_index,
    find_browser,
    listening,
    whole_text,
)
from tests.serving.shelf import Rewrites

QUERY = QUERIES["q1"]
PHONE = {"width": 390, "height": 844}
ALL = "bm25 dense rewritten hybrid"


# Its files.


class Seen(HTMLParser):
    """Tags and attributes of a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def text_of(name):
    return page_room.read_file(name).decode()


def test_it_is_served_with_its_types_and_the_policy():
    client = hash_client()
    paths = {"/": "index.html", "/page/style.css": "style.css", "/page/page.js": "page.js"}
    for path, name in paths.items():
        response = client.get(path)
        assert response.status_code == 200 and response.content == page_room.read_file(name)
        assert response.headers["content-type"] == f"{page_room.FILES[name]}; charset=utf-8"
        policy = response.headers["content-security-policy"]
        assert policy == SECURITY_HEADERS["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
    assert client.get("/page/__init__.py").status_code == 404
    assert "/page/page.js" not in client.get("/openapi.json").json()["paths"]


def test_nothing_of_it_is_elsewhere_or_against_the_policy():
    for name in page_room.FILES:
        assert not re.search(r"(?:\w+:)?//[\w.-]+\.\w", text_of(name)), name
    assert "url(" not in text_of("style.css") and "@import" not in text_of("style.css")
    seen = Seen(text_of("index.html"))
    for tag, attributes in seen.tags:
        assert tag != "style" and (tag != "script" or attributes.get("src")), tag
        assert not [one for one in attributes if one.startswith("on") or one == "style"], attributes
        for where in (attributes.get("src"), attributes.get("href")):
            is_known = where in (None, "docs", "openapi.json", "data:,") or (
                where.removeprefix("page/") in page_room.FILES
            )
            assert is_known, where  # relative, so that a proxy may serve it below a path


def test_texts_can_become_nothing_but_text():
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(forbidden, text_of("page.js"))


def test_every_field_has_a_label_and_every_id_is_there_once():
    seen = Seen(text_of("index.html"))
    ids, text = seen.ids(), text_of("index.html")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'byId\("([\w-]+)"\)', text_of("page.js"))) <= set(ids)
    labelled = {attributes.get("for") for tag, attributes in seen.tags if tag == "label"}
    for field in re.findall(r"<(?:input|select|textarea)[^>]*>", text):
        name = re.search(r'id="([\w-]+)"', field)
        is_inside = re.search(rf"<label[^>]*>[^<]*{re.escape(field)}", text)
        assert is_inside or (name and name[1] in labelled), field


def test_its_files_are_in_the_package():
    names = {one.name for one in files("reasonembed.serving.page").iterdir()}
    assert {one for one in names if not one.startswith("__")} == set(page_room.FILES)
    ignored = Path(__file__).parents[2].joinpath(".gitignore").read_text().splitlines()
    assert not {"*.html", "*.css", "*.js"} & set(ignored)  # the wheel leaves out what git does


# In a browser.


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (it is in the extra dev)")
    executable = find_browser()
    if executable is None:
        pytest.skip("there is no Chromium; name one in $CHROMIUM")
    with browsing(executable) as found:
        yield found


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def service(index):
    with listening(assembled(settings(index), rewriting=Rewrites())) as url:
        yield url


def settings(*indexes, **fields):
    given = {"model": "echo", "indexes": [str(one) for one in indexes]}
    return ServeConfig.model_validate(given | fields)


class Visit:
    """A page of a browser, and what went wrong on it."""

    def __init__(self, context, url):
        self.url, self.page = url, context.new_page()
        self.complaints, self.hosts = [], set()
        self.page.set_default_timeout(10_000)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def _hear(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, state=""):
        self.page.goto("about:blank")
        self.page.goto(self.url + state)
        self.until("document.getElementById('status').textContent !== ''")
        self.settle()
        return self

    def until(self, condition):
        """Polls from here: the page's policy lets no string become code."""
        deadline = time.monotonic() + 10
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(20)

    def settle(self):
        """Until no column waits."""
        self.until(
            "!document.querySelector('[aria-busy=true]') &&"
            " !document.getElementById('status').textContent.startsWith('Searching')"
        )

    def search(self, query=QUERY):
        self.page.fill("#query", query)
        self.page.press("#query", "Enter")
        self.page.wait_for_selector(".column")
        self.settle()

    def ids(self, column):
        return self.page.eval_on_selector_all(
            f".column.{column} .hit", "rows => rows.map((row) => row.dataset.id)"
        )

    def texts(self, selector):
        return self.page.locator(selector).all_inner_texts()

    def status(self):
        return self.page.inner_text("#status")

    def overflow(self):
        """Pixels that the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def focused(self):
        return self.page.evaluate(
            "[document.activeElement.id, document.activeElement.closest('.column')?.classList[1],"
            " document.activeElement.closest('.hit')?.dataset.id]"
        )


@contextlib.contextmanager
def visiting(browser, url, *, may_complain=False, **options):
    options.setdefault("viewport", {"width": 1280, "height": 900})
    context = browser.new_context(**options)
    visit = Visit(context, url)
    try:
        yield visit
        assert visit.hosts <= {urlsplit(url).netloc, ""}  # "" is about:blank and data:
        assert may_complain or visit.complaints == []
    finally:
        context.close()


@pytest.fixture
def visit(browser, service):
    with visiting(browser, service) as visit:
        visit.page.goto(service)
        visit.page.wait_for_selector("#search:not([hidden])")
        yield visit


def test_a_search_fills_the_columns_side_by_side(visit):
    visit.search()
    assert visit.texts(".column h2") == ["BM25", "Dense", "Rewritten q′"]
    boxes = [one.bounding_box() for one in visit.page.locator(".column").all()]
    assert len({box["y"] for box in boxes}) == 1 and boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert visit.ids("bm25")[0] == "leaf-1"
    first = visit.page.locator(".dense .hit").first.inner_text()
    assert re.search(r"\b0\.\d{3}\b", first) and "also BM25" in first
    assert visit.texts(".dense .rank") == [str(rank) for rank in range(1, 11)]
    [times] = visit.texts(".dense header p")
    assert re.fullmatch(r"tokenising [\d.]+ ms · embedding [\d.]+ ms · search [\d.]+ ms", times)
    assert "rewriting" in visit.texts(".rewritten header p")[0]
    assert visit.status() == "BM25: 10 hits; Dense: 10 hits; Rewritten q′: 10 hits"
    visit.page.click(".rewriting summary")
    assert visit.texts(".rewriting blockquote") == [f"{QUERY} abscission layer of cells"]
    assert visit.ids("rewritten") != visit.ids("dense")


def test_another_task_gives_other_results(visit):
    visit.search()
    dense, bm25 = visit.texts(".dense .score"), visit.texts(".bm25 .score")
    before = visit.page.inner_text("#task-note")
    with visit.page.expect_response("**/v1/search"):
        visit.page.select_option("#task", "economics")
    visit.settle()
    assert visit.texts(".dense .score") != dense and visit.texts(".bm25 .score") == bm25
    assert "an Economics post" in visit.page.inner_text("#task-note") != before
    assert "task=economics" in visit.page.url
    visit.page.select_option("#task", "own instruction")
    visit.page.fill("#instruction", "Find the tax.")
    visit.page.press("#instruction", "Enter")
    visit.settle()
    assert visit.texts(".dense .score") != dense
    assert "instruction=Find+the+tax." in visit.page.url and "task=" not in visit.page.url


def test_hybrid_can_be_had_too(visit):
    visit.search()
    visit.page.check("text=Hybrid")
    visit.page.wait_for_selector(".hybrid .hit")
    assert visit.texts(".column h2")[3] == "Hybrid"
    visit.page.uncheck("text=BM25")
    visit.page.wait_for_selector(".bm25", state="detached")


def test_an_excluded_document_and_its_copies_disappear(visit):
    visit.search()
    assert {"leaf-1", "leaf-copy"} <= set(visit.ids("bm25")) & set(visit.ids("dense"))
    visit.page.click(".bm25 .hit >> nth=0 >> summary")
    visit.page.click(".bm25 .hit >> nth=0 >> text=Exclude it")
    visit.settle()
    for column in ("bm25", "dense", "rewritten"):
        assert visit.ids(column) and not {"leaf-1", "leaf-copy"} & set(visit.ids(column))
    assert visit.page.inner_text("#num-excluded") == "(1)"
    visit.page.click("#exclusion summary")
    visit.page.fill("#excluded", "leaf-1\n road \n\nnowhere\n")
    visit.page.press("#query", "Enter")
    visit.settle()
    assert "road" not in visit.ids("dense")
    assert "1 excluded id of no document here" in visit.page.inner_text(".dense header")


def test_gold_of_a_benchmark_query(visit):
    visit.page.click("#benchmark > summary")
    visit.page.wait_for_selector("#queries button")
    assert visit.page.inner_text("#found") == "3 of 3"
    visit.page.fill("#find", "TREES lose")
    assert visit.texts("#queries button") == [QUERY]
    visit.page.keyboard.press("Enter")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector(".column")
    visit.settle()
    assert visit.page.input_value("#query") == QUERY and visit.focused()[0] == "query"
    assert "★ marks its 2 gold documents" in visit.page.inner_text("#picked")
    for column in ("bm25", "dense", "rewritten"):
        ids = visit.ids(column)
        marked = visit.page.eval_on_selector_all(
            f".{column} .gold", "rows => rows.map((row) => row.dataset.id)"
        )
        assert marked == [one for one in ids if one in GOLD["q1"]] != []
        run = {"q1": {doc_id: float(-rank) for rank, doc_id in enumerate(ids)}}
        metrics = evaluate_run(run, {"q1": GOLD["q1"]}, ks=[10])
        ranks = [str(rank) for rank, doc_id in enumerate(ids, 1) if doc_id in GOLD["q1"]]
        said = visit.page.inner_text(f".{column} .gain")
        assert said.startswith(f"nDCG@10 {metrics.mean['ndcg@10']:.3f} · gold at rank")
        assert said.endswith(" " + ", ".join(ranks))
    visit.page.fill("#hits", "12")
    visit.page.press("#query", "Enter")
    visit.settle()
    badges = dict(zip(visit.ids("dense"), visit.texts(".dense .badge"), strict=True))
    assert badges["leaf-1"] == "★ gold" and badges["leaf-2"] == "★ gold 2"
    assert badges["leaf-copy"] == ""
    visit.page.fill("#hits", "1")
    visit.page.press("#query", "Enter")
    visit.settle()
    assert visit.texts(".bm25 > p a") == ["leaf-2"]
    visit.page.click("#picked button")
    assert visit.page.input_value("#query") == ""


def test_a_benchmark_querys_excluded_ids_come_along(visit):
    visit.open("#benchmark=q2")
    assert visit.page.input_value("#excluded") == "soil"
    assert "soil" not in visit.ids("bm25") and visit.ids("bm25")[0] == "root"
    visit.open("#benchmark=%3Cq3%3E")  # an id like a property of every object
    assert "Benchmark query <q3>" in visit.page.inner_text("#picked")
    assert len(visit.texts(".bm25 .gold")) == 2
    visit.open("#benchmark=none&q=trees")
    assert visit.page.is_hidden("#picked") and len(visit.ids("bm25")) == 10


def test_the_address_holds_the_whole_state(visit, browser):
    visit.open(f"#show={ALL.replace(' ', '+')}&benchmark=q1&task=pony&hits=4&excluded=soil")
    visit.search("trees & <leaves> #1+1 ümlaut")
    assert "edited" in visit.page.inner_text("#picked")
    with visiting(browser, visit.page.url) as other:
        other.open()
        for selector in ("#query", "#task", "#hits", "#excluded", "#index"):
            value = visit.page.input_value(selector)
            assert other.page.input_value(selector) == value != "", selector
        for column in ALL.split():
            assert other.ids(column) == visit.ids(column) and len(visit.ids(column)) == 4
        assert other.texts(".gold") == visit.texts(".gold")


def test_going_back_brings_the_search_before(visit):
    visit.search("soil and rain")
    first = visit.ids("bm25")
    visit.search("bark of trees")
    assert visit.ids("bm25") != first
    visit.page.go_back()
    visit.until("document.getElementById('query').value === 'soil and rain'")
    visit.settle()
    assert visit.ids("bm25") == first
    visit.page.go_back()
    visit.page.wait_for_selector(".column", state="detached")


def test_with_the_keyboard_alone(visit):
    visit.page.evaluate("document.activeElement.blur()")
    visit.page.keyboard.press("/")
    assert visit.focused()[0] == "query"
    visit.page.keyboard.type("trees/leaves")
    assert visit.page.input_value("#query") == "trees/leaves"
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector(".hit")
    visit.settle()
    bm25, dense = visit.ids("bm25"), visit.ids("dense")
    visit.page.keyboard.press("ArrowDown")
    assert visit.focused()[1:] == ["bm25", bm25[0]]
    visit.page.keyboard.press("ArrowDown")
    visit.page.keyboard.press("ArrowRight")
    assert visit.focused()[1:] == ["dense", dense[1]]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert visit.page.evaluate(outline) == "solid"
    visit.page.keyboard.press("Enter")
    whole = visit.page.locator(".dense .hit").nth(1).locator("blockquote")
    assert whole.inner_text() == whole_text(dense[1])
    visit.page.keyboard.press("End")
    assert visit.focused()[1:] == ["dense", dense[-1]]
    visit.page.keyboard.press("ArrowDown")
    assert visit.focused()[1:] == ["dense", dense[-1]]
    visit.page.keyboard.press("Home")
    visit.page.keyboard.press("ArrowUp")
    assert visit.focused()[0] == "query"
    visit.page.keyboard.press("Shift+Enter")
    assert visit.page.input_value("#query").count("\n") == 1


def test_a_document_of_several_columns_is_shown_in_all(visit):
    visit.search()
    visit.page.locator(".bm25 .hit summary").first.focus()
    same = "rows => rows.map((row) => row.dataset.id)"
    assert visit.page.eval_on_selector_all(".same", same) == ["leaf-1"] * 3
    rank = visit.ids("dense").index("leaf-1") + 1
    assert f"also Dense {rank}, Rewritten q′ " in visit.texts(".bm25 .also")[0]
    visit.page.locator(".dense .hit").nth(4).hover()
    assert set(visit.page.eval_on_selector_all(".same", same)) == {visit.ids("dense")[4]}
    visit.page.mouse.move(2, 2)
    assert visit.page.eval_on_selector_all(".same", same) == []


def test_what_is_shown_of_a_document_before_it_is_opened(visit):
    visit.open("#q=bark+keeps+insects+and+soil&hits=12&show=bm25")
    rows = dict(zip(visit.ids("bm25"), visit.page.locator(".bm25 .hit").all(), strict=True))
    for doc_id, row in rows.items():
        title, text = DOCUMENTS[doc_id]
        assert row.locator(".title").inner_text() == (title or doc_id)
        snippet = row.locator(".snippet").text_content()
        assert snippet == text if len(text) < 400 else text.startswith(snippet[:-2].rstrip())
        assert len(snippet) <= 402
    assert {"bark", "soil"} <= rows.keys()


def test_hostile_texts_stay_texts(visit):
    visit.search("leaves and right to left")
    row = visit.page.locator(".bm25 .hit", has_text="<i>Leaves</i> of trees").first
    row.locator("summary").click()
    assert row.locator("blockquote").text_content() == whole_text("<b>hostile</b>")
    assert row.locator("a").inner_text() == "<b>hostile</b>"
    assert visit.page.evaluate("window.attacked") is None
    assert visit.page.locator("main img, main script, main i, .hit b").count() == 0
    assert visit.overflow() <= 0


def test_documents_have_addresses(visit):
    visit.search("moss holds water")
    visit.page.click(".bm25 .hit >> nth=0 >> summary")
    with visit.page.context.expect_page() as opened:
        visit.page.click(".bm25 .hit >> nth=0 >> a")
    assert '"id":"moss/a b?#%2F"' in opened.value.inner_text("body")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, service):
    with visiting(browser, service, viewport=PHONE, is_mobile=True, has_touch=True) as visit:
        visit.open(f"#q=leaves+right+to+left&show={ALL.replace(' ', '+')}")
        boxes = [one.bounding_box() for one in visit.page.locator(".column").all()]
        assert len({box["x"] for box in boxes}) == 1 and len(boxes) == 4
        assert all(box["x"] + box["width"] <= 390 for box in boxes)
        for summary in visit.page.locator("summary:visible").all():
            summary.tap()
        visit.page.wait_for_selector("#queries button")
        visit.page.click("#comparison button")
        visit.page.wait_for_selector(".cosine")
        visit.page.select_option("#task", "own instruction")
        assert visit.overflow() <= 0
        assert visit.page.evaluate("visualViewport.scale") == 1
        visit.open("#benchmark=q1")
        assert visit.page.is_visible("#picked") and visit.overflow() <= 0


def test_it_is_dark_where_the_reader_wants_it(browser, service):
    found = []
    for scheme in ("light", "dark"):
        with visiting(browser, service, color_scheme=scheme) as visit:
            visit.page.goto(service)
            ground = "getComputedStyle(document.body).backgroundColor"
            found.append(sum(map(int, re.findall(r"\d+", visit.page.evaluate(ground))[:3])))
    assert found[0] > 600 and found[1] < 150


def test_a_search_under_way_is_told_and_a_newer_one_ends_it(visit):
    visit.search()
    held = []
    visit.page.route("**/v1/search", lambda route: held.append(route))
    visit.page.fill("#query", "soil")
    visit.page.press("#query", "Enter")
    visit.page.wait_for_selector(".dense[aria-busy=true]")
    assert visit.status() == "Searching …"
    visit.page.unroute("**/v1/search")
    visit.search("road and taxes")
    assert len(held) == 3 and visit.ids("bm25")[0] == "road"
    assert visit.texts("[aria-busy=true]") == []


def test_errors_are_told_in_words(browser, index):
    app = assembled(settings(index))
    with listening(app) as url, visiting(browser, url, may_complain=True) as visit:
        visit.open("#q=nan-echo+trees")
        said = visit.page.inner_text(".dense .problem")
        assert said.startswith("The service failed: ") and "{" not in said
        assert visit.ids("bm25") and "Dense: The service failed" in visit.status()
        visit.search("   ")
        assert visit.status() == "The query is empty."
        visit.search("trees " * 9_000)
        assert "its end was cut" in visit.page.inner_text(".dense header")
        visit.page.fill("#hits", "0")
        visit.page.press("#query", "Enter")
        assert visit.page.evaluate("document.activeElement.id") == "hits"
        visit.page.fill("#hits", "10")
        visit.page.route("**/v1/search", lambda route: route.abort())
        visit.search("trees")
        assert visit.texts(".bm25 .problem") == ["The service cannot be reached. Is it running?"]
        visit.page.unroute("**/v1/search")
        busy = '{"error": {"message": "the queue is full"}}'
        reply = {"status": 429, "body": busy, "headers": {"Retry-After": "7"}}
        visit.page.route("**/v1/search", lambda route: route.fulfill(**reply))
        visit.search("trees")
        expected = "The service is busy: the queue is full. (Try again in 7 seconds.)"
        assert visit.texts(".bm25 .problem") == [expected]


def test_a_service_that_cannot_rewrite_says_how_it_could(browser, index):
    with listening(assembled(settings(index))) as url, visiting(browser, url) as visit:
        visit.open("#q=trees")
        assert visit.texts(".column h2") == ["BM25", "Dense"]
        assert "--set rewrite.llm.model=NAME" in visit.page.inner_text("#no-rewriting")
        assert visit.page.locator("#shown input").count() == 3


def test_a_rewriter_that_failed_is_told(visit):
    visit.open("#q=dumb+trees&show=rewritten")
    assert "the query itself was searched for" in visit.page.inner_text(".rewritten")
    assert len(visit.ids("rewritten")) == 10


def test_without_an_index_there_are_facts_and_two_texts_to_compare(browser):
    with listening(assembled(settings())) as url, visiting(browser, url) as visit:
        visit.open()
        assert "No index is loaded" in visit.status() and visit.page.is_hidden("#search")
        facts = visit.page.inner_text("#about dl")
        assert "echo" in facts and "16,384" not in facts and "Fingerprint" in facts
        visit.page.fill("[name=query]", "trees lose leaves")
        visit.page.fill("[name=document]", "trees lose leaves")
        visit.page.fill("[name=instruction]", "Find the same.")
        visit.page.click("#comparison button")
        visit.page.wait_for_selector(".cosine")
        told, bare = visit.texts(".cosine b")
        assert float(bare) == 1 and 0.5 < float(told) < 1
        visit.page.fill("[name=document]", "taxes pay roads")
        visit.page.click("#comparison button")
        visit.until("Number(document.querySelector('.cosine:last-child b').textContent) < 0.5")


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(browser, index, tmp_path):
    file = tmp_path / "keys.txt"
    old = add_key(file, "old")
    app = assembled(settings(index, keys_file=str(file)))
    signed_in = {"http_credentials": {"username": "", "password": old}}
    with (
        listening(app) as url,
        visiting(browser, url, may_complain=True, **signed_in) as visit,
    ):
        visit.open("#q=trees")
        assert visit.ids("bm25") and visit.page.is_hidden("#key")
        new = add_key(file, "new")
        remove_key(file, "old")
        time.sleep(1.5)  # the service looks at the file once a second
        visit.search("soil")
        assert visit.page.is_visible("#key") and visit.focused()[0] == "key-field"
        assert "Not let in" in visit.page.inner_text(".bm25 .problem")
        visit.page.keyboard.type(new)
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_selector(".bm25 .hit")
        assert visit.page.is_hidden("#key")
        kept = "Object.values(sessionStorage).concat(localStorage.length, document.cookie)"
        assert visit.page.evaluate(kept) == [new, 0, ""]
        assert new not in visit.page.url
