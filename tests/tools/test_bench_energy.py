"""tools/bench/energy.py: shares of a gradient's energy that can be known without it."""

from mora_ds.common.files import read_json
from tests.helpers.errors import user_error
from tests.helpers.tools import call


def bench(user, *flags):
    toy = "--documents 2 --tokens 12 --every 1"
    call("bench/energy", "--base", user.model, "--new", user.train, toy, *flags)


def mean_shares(user, folder, rank):
    bench(user, "--rank", rank, "--json", folder / "found.json")
    rows = read_json(folder / "found.json")["tables"]["mean"][1:]
    return {span: float(cell.rstrip("%")) for span, cell in rows}


def test_a_span_as_large_as_the_weight_holds_everything(user, tmp_path):
    shares = mean_shares(user, tmp_path, rank=10_000)
    for span in ("MoRA, rotate", "LoRA at its start", "best of LoRA's rank"):
        assert shares[span] == 100.0


def test_a_smaller_span_holds_less_and_the_best_one_most(user, tmp_path):
    shares = mean_shares(user, tmp_path, rank=2)
    turned = shares["LoRA, A turned to the gradient"]
    assert shares["LoRA at its start"] < turned <= shares["best of LoRA's rank"] < 100


def test_a_text_that_is_too_short_is_named(user):
    with user_error(r"--documents: .* at least 12 tokens"):
        bench(user, "--documents 10000")
