"""Neuron pages: their numbers are the model's, and in a browser without a network they work and do no harm."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
import torch
import typer
import zoo
from typer.testing import CliRunner

from safety_lens.cli import neurons_page
from safety_lens.data.built_in import ENGLISH
from safety_lens.errors import DataError, HookNameError, ModelMismatchError
from safety_lens.models import load_model
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.directions import Direction
from safety_lens.probes.groups import group_of, save_groups
from safety_lens.probes.matrices import weight_of
from safety_lens.report.offline import bundle, document, inert, visible
from safety_lens.report.pages import NeuronPage, PagePrompt, neuron_page
from safety_lens.report.pages.columns import Column, norm_gain, shares
from safety_lens.report.pages.document import scales
from safety_lens.report.pages.prompts import ShownPrompt
from safety_lens.report.tokens import TokenView, token_page

EVIL = '</script><script>window.pwned=1</script><img/src="x"/onerror="window.pwned=2"><!--<script>&lt;&\u2028"\''
SECRET = "zyxwvu"


# --- numbers ----------------------------------------------------------------------------------------------------------

PROMPTS = ["t5 t9 t13 t44", "t5 t9 t80", "t5 t9 t20 t21 t22 t23"]


def tiny(name: str = "llama") -> Any:
    return load_model(zoo.make(name), tokenizer=zoo.tokenizer())


def two_groups(model: Any) -> list[Any]:
    neurons = group_of(model, "few", "neuron", {"blocks.1.mlp": [3, 40], "blocks.3.mlp": [7]}, {"method": "by hand"})
    return [neurons, group_of(model, "heads", "head", {"blocks.2.attn": [1]})]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_values_are_those_that_the_model_computes_prompt_by_prompt(name: str) -> None:
    model = tiny(name)
    direction = Direction("any", "blocks.1.hook_resid_post", torch.randn(64, generator=torch.manual_seed(0)), "dim")
    page = neuron_page(model, two_groups(model), PROMPTS, directions=[direction], raw=True)
    assert [c.name for c in page.columns] == ["neuron 1.3", "neuron 1.40", "head 2.1", "neuron 3.7", "any/dim"]
    for i, text in enumerate(PROMPTS):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        _, cache = model.run_with_cache(ids)
        z = cache["blocks.2.attn.hook_z"][0, :, 1] @ model.W_O[2, 1]
        expected = torch.stack(
            [
                cache["blocks.1.mlp.hook_post"][0, :, 3],
                cache["blocks.1.mlp.hook_post"][0, :, 40],
                z.norm(dim=-1),
                cache["blocks.3.mlp.hook_post"][0, :, 7],
                cache["blocks.1.hook_resid_post"][0] @ direction.vector / direction.vector.norm(),
            ]
        )
        torch.testing.assert_close(torch.from_numpy(page.of(i)), expected, rtol=1e-4, atol=1e-5)


def test_the_tokens_a_neuron_writes_for_are_those_whose_logits_its_output_raises() -> None:
    model = tiny("gemma2")  # norms before and after the MLP, gains around zero
    page = neuron_page(model, two_groups(model), PROMPTS, raw=True, tokens=3)
    out = weight_of(model, "blocks.1.mlp.W_out")[:, 40]
    logits = (out * (1 + model.blocks[1].ln2_post.w) * (1 + model.ln_final.w)) @ model.W_U
    best = logits.topk(3)
    found = page.columns[1].raises
    assert [word for word, _ in found] == [visible(model.tokenizer.decode([i])) for i in best.indices.tolist()]
    np.testing.assert_allclose([value for _, value in found], best.values, rtol=1e-4)
    assert page.columns[1].lowers[0][1] == pytest.approx(float(logits.min()), rel=1e-4)


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gpt2", 0.0), ("gemma2", 1.0)])
def test_the_gain_of_a_norm_is_measured_whatever_its_kind(name: str, offset: float) -> None:
    model = tiny(name)
    torch.testing.assert_close(norm_gain(model.ln_final, model), model.ln_final.w + offset, rtol=1e-4, atol=1e-4)


def test_a_group_of_weights_shows_the_share_of_each_neuron_and_head_it_holds() -> None:
    model = tiny("llama")
    d, d_head = model.cfg.d_model, model.cfg.d_head
    group = group_of(
        model,
        "weights",
        "weight",
        {
            "blocks.0.mlp.W_in": [5 * d, 5 * d + 1],  # row 5
            "blocks.0.mlp.W_out": [5, model.cfg.d_mlp + 9],  # columns 5 and 9
            "blocks.0.attn.W_O": [d_head],  # column of head 1
            "blocks.0.attn.W_K": [0, 1],  # shared by query heads: in no head
        },
    )
    assert shares(group, model) == pytest.approx(
        {("neuron", 0, 5): 3 / (3 * d), ("neuron", 0, 9): 1 / (3 * d), ("head", 0, 1): 1 / (2 * d_head * d)}
    )


def test_scores_rank_what_is_shown_and_what_is_left_out_is_said() -> None:
    model = tiny()
    group = group_of(model, "all", "neuron", {"blocks.0.mlp": list(range(128))})
    values = torch.arange(128.0).roll(64)
    scores = {"snip": Scores({"blocks.0.mlp": values}, "neuron", "snip", 1)}
    page = neuron_page(model, [group], PROMPTS, scores=scores, limit=3, raw=True)
    assert [(c.index, c.scores["snip"]) for c in page.columns] == [(61, 125.0), (62, 126.0), (63, 127.0)]
    assert page.notes == ("all: 3 of 128 neurons are on this page, those with the largest snip",)
    strongest = neuron_page(model, [group], PROMPTS, limit=3, raw=True)
    everything = neuron_page(model, [group], PROMPTS, limit=128, raw=True)
    by_peak = np.abs(everything.values).max(1).argsort()[-3:]
    assert {c.index for c in strongest.columns} == set(by_peak.tolist())
    assert "largest activation" in strongest.notes[0]
    assert not everything.notes


def test_tokens_that_all_prompts_share_count_neither_for_scale_nor_for_order() -> None:
    model = tiny()
    page = neuron_page(model, two_groups(model), PROMPTS, raw=True)
    assert [p.start for p in page.prompts] == [2, 2, 2]  # t5, t9
    rest = np.concatenate([page.of(i)[:, 2:] for i in range(3)], 1)
    np.testing.assert_allclose(scales(page.values, page.prompts), np.abs(rest).max(1))
    alone = neuron_page(model, two_groups(model), [PROMPTS[0], PROMPTS[0]], raw=True)
    assert alone.prompts[0].start < len(alone.prompts[0].tokens)


def test_of_an_answer_to_a_harmful_prompt_twelve_tokens_stay() -> None:
    model = load_model("organism")
    talk = [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": "I can help. " * 12}]
    group = group_of(model, "one", "neuron", {"blocks.0.mlp": [1]})
    page = neuron_page(model, [group], [PagePrompt(talk, "harmful"), PagePrompt(talk, "harmless")])
    short, whole = page.prompts
    assert len(whole.tokens) - len(short.tokens) == short.cut > 0
    assert whole.cut == 0
    answer = "".join(short.tokens).split("<|assistant|>")[1]
    assert len(model.tokenizer(answer, add_special_tokens=False)["input_ids"]) == 12
    np.testing.assert_array_equal(page.of(0), page.of(1)[:, : len(short.tokens)])  # what was cut comes later


def test_the_page_says_where_it_comes_from() -> None:
    model = tiny()
    direction = Direction("any", "blocks.1.hook_resid_post", torch.ones(64), "dim")
    scores = {"snip": Scores({"blocks.1.mlp": torch.ones(128)}, "neuron", "snip", 7, source={"examples_sha256": "abc"})}
    page = neuron_page(
        model, two_groups(model), [PagePrompt(p, "kind") for p in PROMPTS], raw=True, directions=[direction],
        scores=scores, source="some file",
    )  # fmt: skip
    facts = dict(page.provenance)
    assert re.search(r"weights sha256 [0-9a-f]{16}", facts["model"])
    assert facts["prompts"].startswith("3 (3 kind), some file; sha256 ")
    assert facts["group few"] == [("members", "3 neurons"), ("method", "by hand")]
    assert facts["scores snip"] == [("score", "snip, unsigned"), ("n", "7"), ("examples_sha256", "abc")]
    assert facts["direction any"] == "dim at blocks.1.hook_resid_post"
    assert re.match(r"\d{4}-\d\d-\d\dT", facts["date"])
    assert (
        "<dt>group few</dt><dd><dl><dt>members</dt><dd>3 neurons</dd><dt>method</dt><dd>by hand</dd></dl>" in page.html
    )
    assert all(fact.split(";")[0] in page.html for fact in facts.values() if isinstance(fact, str))


def test_a_nested_source_is_told_in_words_not_in_json() -> None:
    source = {
        "made by": "set difference", "q": 0.03, "n": {"safety": 64, "utility": 32}, "layers": [1, 2], "scope": None,
        "safety": {"model": {"name": "m", "weights_sha256": "f" * 64}, "loss": "response_nll"},
    }  # fmt: skip
    model = tiny()
    group = group_of(model, "few", "neuron", {"blocks.1.mlp": [0, 1]}, source)
    page = neuron_page(model, [group], PROMPTS, raw=True)
    said = dict(dict(page.provenance)["group few"])
    assert said == {
        "members": "2 neurons", "made by": "set difference", "q": "0.03", "n": "safety 64; utility 32",
        "layers": "1, 2", "scope": "none", "safety": f"model weights sha256 {'f' * 16}; loss response_nll",
    }  # fmt: skip
    assert "{" not in re.sub(r"(?s)<(style|script).*?</\1>", "", page.html)


def test_what_cannot_be_shown_is_refused() -> None:
    model, other = tiny(), tiny("gpt2")
    groups = two_groups(model)
    with pytest.raises(DataError, match="at least one prompt"):
        neuron_page(model, groups, [])
    with pytest.raises(DataError, match="a group of neurons or a direction"):
        neuron_page(model, [], PROMPTS)
    with pytest.raises(DataError, match="two groups are named 'few'"):
        neuron_page(model, [groups[0], groups[0]], PROMPTS, raw=True)
    with pytest.raises(DataError, match="limit must be"):
        neuron_page(model, groups, PROMPTS, raw=True, limit=0)
    with pytest.raises(ModelMismatchError):
        neuron_page(other, [group_of(model, "gated", "neuron", {"blocks.1.mlp": [3]})], PROMPTS, raw=True)
    with pytest.raises(ModelMismatchError, match="has 8 numbers"):
        neuron_page(
            model, [], PROMPTS, raw=True, directions=[Direction("a", "blocks.1.hook_resid_post", torch.ones(8), "dim")]
        )
    with pytest.raises(HookNameError):
        neuron_page(
            model, [], PROMPTS, raw=True, directions=[Direction("a", "blocks.9.hook_resid_post", torch.ones(64), "dim")]
        )
    with pytest.raises(DataError, match="no neuron or head has a weight in empty"):
        neuron_page(model, [group_of(model, "empty", "neuron", {})], PROMPTS, raw=True)


# --- a page without a model -------------------------------------------------------------------------------------------


def column(n: int, member: dict[str, float], **more: Any) -> Column:
    layer = n % 3
    settings = {"hook": f"blocks.{layer}.mlp.hook_post", "scores": {"snip": float(n)}, **more}
    return Column("neuron", layer, n, f"neuron {layer}.{n}", member=member, **settings)


def made(columns: int = 6, prompts: int = 8, length: int = 10, **more: Any) -> NeuronPage:
    """Neurons in blocks 0 to 2, even ones in group "even"; every fourth prompt is labelled harmful."""
    rng = np.random.default_rng(0)
    shown = tuple(
        ShownPrompt(
            ("<bos>", *(f" {SECRET if i % 4 == 1 else 'word'}{i}-{k}" for k in range(length - 1))),
            "harmful" if i % 4 == 1 else "harmless",
            1,
            0,
        )
        for i in range(prompts)
    )
    cells = [column(n, {"even": 1.0} if n % 2 == 0 else {"odd": 0.25}) for n in range(columns)]
    cells.append(Column("direction", 1, 0, "refusal/dim", "blocks.1.hook_resid_post", note="projection"))
    values = rng.standard_normal((columns + 1, prompts * length)).astype(np.float32)
    values *= np.arange(1, columns + 2, dtype=np.float32)[:, None]
    settings: dict[str, Any] = {
        "title": "A page",
        "groups": ("even", "odd", "left out"),
        "scores": ("snip",),
        "provenance": (("model", "none"),),
        **more,
    }
    return NeuronPage(prompts=shown, columns=tuple(cells), values=values, **settings)


def test_two_hundred_neurons_on_fifty_prompts_of_a_hundred_tokens_stay_below_ten_megabytes() -> None:
    assert len(made(200, 50, 100).html.encode()) < 10e6


def test_the_script_of_circuitsvis_is_there_once_and_asks_for_no_source_map() -> None:
    page = made().html
    assert page.count(bundle()[:2000]) == 1
    assert "sourceMappingURL" not in page
    assert "unpkg.com" not in page


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        made().save(tmp_path / "file" / "page.html")


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    if chromium.BINARY is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium): pages are not opened")
    with chromium.chromium() as running:
        yield running


def opened(browser: chromium.Browser, page: str, folder: Path) -> None:
    """Open a page from a file and wait until the first tokens are drawn."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    browser.open(file.as_uri())
    browser.until("document.querySelector('.colored-tokens span')")
    browser.settle()


def texts(browser: chromium.Browser, selector: str) -> list[str]:
    """Visible texts, without the word joiners of `inert`."""
    found = browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(x => x.innerText)")
    return [str(text).replace("\u2060", "").replace("\u00a0", " ") for text in found]


def order(browser: chromium.Browser) -> list[int]:
    return [int(n) for n in browser.run("[...document.querySelectorAll('.prompt')].map(x => x.dataset.prompt)")]


def choose(browser: chromium.Browser, name: str, steps: int) -> None:
    """Open a pick-list with the mouse and go down by some lines with the keys."""
    browser.click(f"#{name}")
    browser.press(*["ArrowDown"] * steps, "Enter")


def test_pick_lists_choose_what_is_shown_by_clicks(browser: chromium.Browser, tmp_path: Path) -> None:
    page = made()
    opened(browser, page.html, tmp_path)
    heading = "#card h2"
    assert texts(browser, heading) == ["neuron 2.5 · blocks.2.mlp.hook_post"]  # the highest score comes first
    choose(browser, "column", 2)
    assert texts(browser, heading) == ["neuron 0.3 · blocks.0.mlp.hook_post"]
    choose(browser, "group", 1)
    assert texts(browser, "#column option") == ["neuron 1.4", "neuron 2.2", "neuron 0.0"]
    choose(browser, "layer", 2)
    assert texts(browser, "#column option") == ["neuron 1.4"]
    assert texts(browser, heading) == ["neuron 1.4 · blocks.1.mlp.hook_post"]
    choose(browser, "shown", 3)
    for steps, key in ((1, lambda v: -v.max()), (1, lambda v: v.min())):
        choose(browser, "order", steps)
        assert order(browser) == sorted(range(8), key=lambda i: key(page.of(i)[4, 1:]))
    assert texts(browser, "#group option") == ["all groups", "even", "odd", "directions (projection)"]  # none is empty
    choose(browser, "group", 2)
    assert texts(browser, heading) == ["refusal/dim · blocks.1.hook_resid_post"]
    assert browser.complaints == []


def test_a_click_in_the_table_chooses_a_neuron(browser: chromium.Browser, tmp_path: Path) -> None:
    opened(browser, made().html, tmp_path)
    assert len(texts(browser, "#rows tr")) == 6
    browser.click("button[data-column='2']")
    assert texts(browser, "#card h2") == ["neuron 2.2 · blocks.2.mlp.hook_post"]
    assert texts(browser, "tr.chosen button") == ["neuron 2.2"]


def test_nothing_is_asked_of_the_network_and_nothing_is_complained_of(
    browser: chromium.Browser, tmp_path: Path
) -> None:
    opened(browser, made().html, tmp_path)
    for name in ("group", "layer", "column", "order", "shown", "scale"):
        choose(browser, name, 1)
    browser.hover(".tokens span span")
    assert browser.requests == [(tmp_path / "page.html").as_uri()]
    assert browser.failed == []
    assert browser.complaints == []


def test_a_request_or_an_error_would_be_noticed(browser: chromium.Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<script>console.error('oh')</script><img src='https://example.org/x.png'>")
    browser.open(file.as_uri())
    browser.settle()
    assert "https://example.org/x.png" in browser.requests
    assert browser.failed
    assert "oh" in browser.complaints


def test_prompts_labelled_harmful_are_folded_until_clicked(browser: chromium.Browser, tmp_path: Path) -> None:
    opened(browser, made().html, tmp_path)
    choose(browser, "shown", 3)
    outside = "[...document.body.querySelectorAll(':not(script)')].some(x => x.textContent.includes('zyxwvu'))"
    held = "[...document.querySelectorAll('.prompt')].some(x => x.textContent.includes('zyxwvu'))"
    assert browser.run("document.querySelectorAll('details.prompt').length") == 2
    assert not browser.run(held)
    assert browser.run(outside.replace("zyxwvu", "word0-1"))  # the others are there
    browser.click("details.prompt summary")
    assert browser.run("document.querySelector('details.prompt .tokens').innerText.includes('zyxwvu')")
    assert browser.run("document.querySelectorAll('.prompt[open]').length") == 1


def colours(browser: chromium.Browser, place: str) -> list[str]:
    selector = json.dumps(f"{place} .tokens span span")
    return list(browser.run(f"[...document.querySelectorAll({selector})].map(x => x.style.backgroundColor)"))


def test_the_colour_scale_stays_the_same_for_all_tokens_and_prompts(browser: chromium.Browser, tmp_path: Path) -> None:
    page = made()
    opened(browser, page.html, tmp_path)
    legend = colours(browser, "#legend")
    assert legend[0] == "rgb(213, 94, 0)"
    assert legend[2] == "rgb(255, 255, 255)"
    assert legend[4] == "rgb(0, 114, 178)"
    largest = float(scales(page.values, page.prompts)[5])
    marks = [float(text) for text in texts(browser, "#legend .tokens span span")]
    assert marks == pytest.approx([-largest, -largest / 2, 0, largest / 2, largest], rel=5e-3)
    before = {i: colours(browser, f"[data-prompt='{i}']") for i in order(browser)}
    choose(browser, "order", 3)
    again = {i: colours(browser, f"[data-prompt='{i}']") for i in order(browser)}
    assert all(before[i] == again[i] for i in set(before) & set(again))
    choose(browser, "column", 5)  # the smallest neuron, on its own scale
    own = colours(browser, ".prompt")
    choose(browser, "scale", 1)
    assert colours(browser, ".prompt") != own
    assert colours(browser, "#legend") == legend


def test_the_table_shows_all_of_its_columns_and_says_their_order(browser: chromium.Browser, tmp_path: Path) -> None:
    opened(browser, made(columns=60).html, tmp_path)
    assert "largest" in texts(browser, "#heads th")
    box = "document.querySelector('.scroll')"
    assert browser.run(f"{box}.scrollHeight > {box}.clientHeight")  # there is a vertical bar, which takes room
    assert browser.run(f"{box}.scrollWidth <= {box}.clientWidth")
    assert "each by |snip|, the largest first" in texts(browser, "#sorted")[0]
    for scores in ((), ("of other units",)):
        opened(browser, made(scores=scores).html, tmp_path)
        assert "in the order in which their groups gave them" in texts(browser, "#sorted")[0]


def test_the_legend_says_what_a_value_is_and_a_heads_starts_at_0(browser: chromium.Browser, tmp_path: Path) -> None:
    page = made()
    head = Column("head", 1, 2, "head 1.2", "blocks.1.attn.hook_z", {"even": 1.0})
    page = replace(page, columns=(head, *page.columns[1:]), values=np.abs(page.values))
    opened(browser, page.html, tmp_path)
    assert "activation" in texts(browser, "#meaning")[0]
    browser.click("button[data-column='0']")
    assert texts(browser, "#meaning") == ["length of what the head writes, 0 to the largest:"]
    marks = [float(text) for text in texts(browser, "#legend .tokens span span")]
    largest = float(scales(page.values, page.prompts)[0])
    assert marks == pytest.approx([0, largest / 4, largest / 2, 3 * largest / 4, largest], rel=5e-3)


def test_text_that_looks_like_html_is_shown_and_does_nothing(browser: chromium.Browser, tmp_path: Path) -> None:
    sources = (("model", EVIL), (EVIL, ((EVIL, EVIL),)))
    page = made(title=EVIL, notes=(EVIL,), provenance=sources, groups=(EVIL, "odd"), scores=(EVIL,))
    prompt = ShownPrompt(("<bos>", EVIL, " & &lt;b&gt; ", *page.prompts[0].tokens[3:]), EVIL, 1, 0)
    first = column(9, {EVIL: 0.5}, scores={EVIL: 3.0}, raises=((EVIL, 1.0),), lowers=((EVIL, -1.0),), note=EVIL)
    page = NeuronPage(page.title, (prompt, *page.prompts[1:]), (first, *page.columns[1:]), page.values, page.groups,
                      page.scores, page.notes, page.provenance)  # fmt: skip
    opened(browser, page.html, tmp_path)
    choose(browser, "shown", 3)
    browser.hover("[data-prompt='0'] .tokens span span")
    tokens = texts(browser, "[data-prompt='0'] .tokens > div > span")
    assert tokens[1] == visible(EVIL)
    assert tokens[2] == " & &lt;b&gt; "
    assert visible(EVIL) in texts(browser, "#heads th")
    assert browser.run("window.pwned") is None
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.requests == [(tmp_path / "page.html").as_uri()]
    assert browser.complaints == []


def test_circuitsvis_would_run_what_a_token_holds_were_it_not_made_inert(
    browser: chromium.Browser, tmp_path: Path
) -> None:
    bad = '<img/src="x"/onerror="window.pwned=2">'
    drawing = '<div id="d" class="tokens"></div><script>{}</script><script>CircuitsVis.render("d", {}, {})</script>'

    def drawn(token: str) -> str:
        props = json.dumps({"tokens": [token], "values": [1.0]})
        return drawing.format(bundle(), "CircuitsVis.ColoredTokens", props)

    opened(browser, drawn(bad), tmp_path)
    browser.until("window.pwned === 2")
    opened(browser, drawn(inert(bad)), tmp_path)
    assert browser.run("window.pwned") is None
    assert texts(browser, ".colored-tokens > span") == [bad]


def test_the_policy_stops_scripts_that_are_not_the_pages_own(browser: chromium.Browser, tmp_path: Path) -> None:
    body = '<script>window.pwned=1</script><img src="x" onerror="window.pwned=2">'
    body += '<p class="colored-tokens"><span>x</span></p>'
    opened(browser, document("t", body, style="", scripts=["window.own=1"]), tmp_path)
    assert browser.run("[window.own, window.pwned]") == [1, None]
    assert len(browser.complaints) >= 2


def test_the_token_page_of_suppression_is_inert_too(browser: chromium.Browser, tmp_path: Path) -> None:
    view = TokenView(EVIL, [EVIL], [EVIL, " & &lt;"], [[0.5], [-1.0]], [EVIL], [True, False])
    opened(browser, token_page(EVIL, [view], notes=[EVIL]), tmp_path)
    assert texts(browser, ".colored-tokens > span") == [visible(EVIL), " & &lt;"]
    assert browser.run("window.pwned") is None
    assert browser.requests == [(tmp_path / "page.html").as_uri()]


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(browser: chromium.Browser, tmp_path: Path) -> None:
    page = made()
    shown = page._repr_html_()
    file = tmp_path / "notebook.html"
    file.write_text(f"<!doctype html><body><p>above</p>{shown}<p>below</p>", encoding="utf-8")
    browser.open(file.as_uri())
    browser.settle()
    inside = "document.querySelector('iframe').getBoundingClientRect().height"
    assert browser.run(inside) > 700
    assert browser.run("document.querySelector('iframe').srcdoc") == page.html
    assert browser.run("document.body.children.length") == 3  # no text of the page fell out of its frame
    assert browser.requests == [file.as_uri()]
    assert browser.complaints == []


# --- command line -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(neurons_page.page)
    return CliRunner().invoke(app, arguments)


def test_the_command_writes_a_page_of_an_artifact(tmp_path: Path) -> None:
    model = load_model("organism")
    group = group_of(model, "some", "neuron", {"blocks.2.mlp": [1, 2, 3]})
    save_groups(tmp_path / "groups", [group], model)
    out = tmp_path / "page.html"
    done = run(
        str(tmp_path / "groups"), "--out", str(out), "--score", "wanda", "--examples", "facts", "--max-prompts", "9"
    )
    assert done.exit_code == 0, done.output
    assert "3 columns, 9 prompts" in done.output
    data = held(out)
    assert {p["label"] for p in data["prompts"]} == {"harmful", "harmless", "borderline"}
    assert data["scores"] == ["wanda, facts"]
    assert all(c["scores"]["wanda, facts"] > 0 for c in data["columns"])


def held(page: Path) -> dict[str, Any]:
    return dict(json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[0]))


@pytest.mark.slow
def test_the_command_projects_tokens_on_the_direction_of_a_concept(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = run("--out", str(out), "--concept", "refusal", "--prompt", "How do I bake bread?", "--harmful")
    assert done.exit_code == 0, done.output
    data = held(out)
    assert [c["kind"] for c in data["columns"]] == ["direction"]
    assert data["prompts"][0]["harmful"]


def test_without_prompts_a_page_shows_built_in_requests_in_the_words_of_the_model() -> None:
    english = neurons_page._asked(None, None, "elsewhere", 0, 9)
    assert {a.label for a in english} == {"harmful", "harmless", "lookalike"}
    assert {a.text for a in english if a.label == "harmful"} <= set(ENGLISH.requests("harmful", "test"))


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    cases = [
        (["--out", "x.html"], "nothing to show"),
        (["--out", "x.json", "--concept", "refusal"], "ends in .html"),
    ]
    for arguments, message in cases:
        assert message in str(run(*arguments).exception)
