"""tools/bench/report.py: what is printed is what the file holds, and tools/docs.py makes
the pages' tables from it.
"""

from mora_ds.common.files import read_json
from tools import docs_results, plans
from tools.bench.report import Report, bench_parser


def test_a_file_holds_what_is_printed_and_a_page_shows_it(
    tmp_path, monkeypatch, capsys
):
    flags = ["--rows", "2", "--json", str(tmp_path / "new/bench.json")]
    monkeypatch.setattr("sys.argv", [str(plans.ROOT / "tools/bench/loss.py"), *flags])
    report = Report(bench_parser("Rows.").parse_known_args()[0])
    report.say("Two rows.")
    report.show("times", [["what", "seconds"], ["a step", "0.5"]])
    report.write()
    assert capsys.readouterr().out.split("\n") == [
        "Two rows.",
        "  what  seconds",
        "a step      0.5",
        "",
    ]
    written = read_json(tmp_path / "new/bench.json")
    assert written["command"] == "python tools/bench/loss.py --rows 2"
    assert written["tables"] == {"times": [["what", "seconds"], ["a step", "0.5"]]}
    assert written["sentences"] == ["Two rows."]
    assert written["measured_on"]["cores"] > 0
    assert written["measured_on"]["versions"]["torch"]

    monkeypatch.setattr(plans, "DATA", tmp_path / "new")
    old = "<!-- bench.json times, by tools/docs.py -->\nold\n<!-- end of bench.json times -->"
    page = docs_results.with_tables(f"# Title\n\n{old}\n\nText.")
    assert "|what |seconds|\n|---|---:|\n|a step |0.5|" in page
    assert "old" not in page
    assert "`python tools/bench/loss.py --rows 2` on " in page
    assert page.endswith("\n\nText.")
