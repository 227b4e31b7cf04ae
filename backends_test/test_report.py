"""Reports say what was measured, alone, and nothing from a file runs."""

import json
from html.parser import HTMLParser

import pytest
from test_ranking import timed

from multilstm.bench import BENCH_SCHEMA
from multilstm.errors import UserError
from multilstm.ranking import rank
from multilstm.report import (
    bench_tables,
    html_page,
    markdown,
    read_results,
    write_report,
)
from multilstm.selection import COMPARISON_SCHEMA

EVIL = '"><script>alert(1)</script>|<img src=x>);a:url(//x)![](//x)'


def bench_result(device="Chip", **about):
    records = [
        timed("jax", windows=(10, 12, 14)),
        timed("torch", windows=(20, 24, 28)),
        timed("tensorflow", agrees=False, disagrees="its losses are 2e-2 off"),
        {
            **{k: timed()[k] for k in ("shape", "dtype", "variant", "rank")},
            "backend": "jax",
            "variant": "native",
            "reason": "its process was ended by SIGKILL, perhaps for memory",
        },
    ]
    rank(records)
    return {
        "schema": BENCH_SCHEMA,
        "device": device,
        "driver": None,
        "dtype": "float32",
        "model": None,
        "protocol": {"rounds": 3},
        "results": records,
        **about,
    }


def comparison():
    history = [
        {"epoch": 1, "valid_perplexity": 300.0, "seconds": 10.0},
        {"epoch": 2, "valid_perplexity": 200.0, "seconds": 12.0},
    ]
    return {
        "schema": COMPARISON_SCHEMA,
        "results": {
            "jax": {
                "device": "Chip",
                "preset": "small",
                "corpus": "python-docs",
                "history": history,
                "valid_perplexity": 200.0,
                "test_perplexity": 210.0,
                "tokens_per_second": 4321.0,
            },
            "torch": {"error": "ended with status 1"},
        },
        "seconds_to_target": {"jax": 22.0},
    }


class Tags(HTMLParser):
    """The tags and attributes of a page, and whether they are closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.open = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "path", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)


def test_page_holds_all_and_needs_nothing_else():
    page = html_page([bench_result(), comparison()])
    tags = Tags(page)
    assert tags.open == []
    assert tags.links == []
    assert "url(" not in page
    assert "@import" not in page
    assert {"table", "svg", "polyline"} <= tags.tags
    for said in (
        "tiny: LSTM 6+6",
        "1,000",  # tokens a second: 12 words in 12 ms
        "its losses are 2e-2 off",
        "ended by SIGKILL",
        "200.0",
        "ended with status 1",
        "color-scheme: light dark",
    ):
        assert said in page, said


def test_text_of_files_is_escaped():
    evil = bench_result(EVIL, model=EVIL)
    for record in evil["results"]:
        record |= {"backend": EVIL, "kernel": EVIL, "disagrees": EVIL}
    training = comparison()
    training["results"][EVIL] = training["results"].pop("jax") | {
        "device": EVIL,
        "preset": EVIL,
    }
    page = html_page([evil, training])
    assert "<script" not in page
    assert 'style="stroke:currentColor' in page
    assert not {"script", "img"} & Tags(page).tags
    text = markdown([evil, training])
    assert "<script" not in text
    assert "<img" not in text
    assert "![" not in text
    table_rows = [line for line in text.splitlines() if "&gt;" in line]
    assert all("\\|" in line for line in table_rows if line.startswith("|"))


def test_devices_are_kept_apart():
    page = html_page([bench_result("One"), bench_result("Two")])
    assert page.index("<h2>One</h2>") < page.index("<h2>Two</h2>")
    text = markdown([bench_result("One"), bench_result("Two", driver="580.1")])
    assert "## One\n" in text
    assert "## Two, driver 580.1\n" in text
    same = html_page([bench_result("One"), bench_result("One")])
    assert same.count("<h2>") == 1


def test_markdown_has_the_fastest_first():
    lines = markdown([bench_result()]).splitlines()
    first = next(line for line in lines if line.startswith("| 1 |"))
    assert first.startswith("| 1 | jax | multilstm | 1,000 | 12 | ")


def test_terminal_table_names_what_is_not_ranked():
    [table] = bench_tables(bench_result())
    cells = [str(cell) for cell in table.columns[-1].cells]
    assert any(cell.startswith("NOT RANKED: its losses") for cell in cells)


def test_files_of_other_schemas_are_not_mixed(tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(bench_result()))
    bad.write_text(json.dumps(bench_result() | {"schema": "multilstm-bench-0"}))
    assert len(read_results([good, good])) == 2
    with pytest.raises(UserError, match=r"multilstm-bench-0.*of this version"):
        read_results([good, bad])
    bad.write_text("{")
    with pytest.raises(UserError, match="broken"):
        read_results([bad])
    with pytest.raises(UserError, match="none was given"):
        read_results([])


def test_losses_that_were_no_numbers_are_left_out():
    lost = bench_result()
    lost["results"][2]["losses"] = [None] * 6
    assert "its losses are 2e-2 off" in html_page([lost])


def test_report_is_three_files_even_of_failures(tmp_path):
    failed = bench_result()
    failed["results"] = failed["results"][-1:]
    for name, results in (
        ("all", [bench_result(), comparison()]),
        ("failed", [failed]),
    ):
        paths = write_report(results, tmp_path / name)
        assert [path.suffix for path in paths] == [".html", ".md", ".png"]
        assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("speed", "ms"), [(100.1, 1.5), (100.2, 1.3)])
def test_windows_that_took_the_same_are_drawn(tmp_path, speed, ms):
    """By rounding the spread ends an ulp below the middle, or begins above."""
    assert speed * ms / ms != speed
    steady = bench_result()
    for record in steady["results"][:3]:
        record["tokens_per_second"] = speed
        record["step_time_ms"] = dict.fromkeys(record["step_time_ms"], ms)
    *_, drawn = write_report([steady], tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_names_are_no_formulas(tmp_path):
    named = bench_result("GPU $x_{$ y", model="$\\frac$.keras")
    named["results"][0]["variant"] = "$\\frac$"
    *_, drawn = write_report([named], tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")
