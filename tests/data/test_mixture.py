"""Mixtures: exact shares in an order that can start at any step, phases, used-up sources,
complete runs.
"""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mora_ds.common.errors import UserError
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import mixture_config
from mora_ds.data import (
    Corpus,
    DocumentFilter,
    Mixture,
    PackedDataset,
    TokenCache,
    document_hash,
    load_corpus,
)
from mora_ds.data.mixture import SampleSchedule
from mora_ds.data.order import LONGEST_PERIOD, integer_weights, source_order
from tests.helpers.errors import user_error
from tests.helpers.jobs import curve, losses, rows, run, validation_errors_of
from tests.helpers.mixtures import mixture_flags, source_rows, write_mixture
from tests.helpers.resume import assert_one_run
from tests.helpers.tables import rows as rows_of
from tests.helpers.texts import json_lines


def order(shares, samples):
    return np.array([shares.locate(sample)[0] for sample in range(samples)])


# -- shares ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        (0.7, 0.25, 0.05),
        (1, 1, 1),
        (0.333, 0.333, 0.334),
        (math.pi, math.e, 0.01),
        (90, 9, 1),
    ],
    ids=str,
)
def test_shares_of_three_sources_are_exact_at_every_prefix(weights):
    shares = SampleSchedule([(0, weights)], [None] * 3)
    wanted = np.array(weights) / sum(weights)
    counts = np.cumsum(order(shares, 10_000)[:, None] == np.arange(3), axis=0)
    n = np.arange(1, 10_001)[:, None]
    assert np.abs(counts - n * wanted).max() < 1, (
        "no prefix, however short, is off by a whole sample"
    )
    starts = np.arange(0, 9000, 7)
    assert np.abs(counts[starts + 1000] - counts[starts] - 1000 * wanted).max() < 2, (
        "nor any window by two"
    )


def test_samples_of_a_source_are_numbered_without_a_gap_and_counts_agree():
    shares = SampleSchedule(
        [(0, (3, 1, 2)), (50, (0, 1, 1)), (77, (5, 1, 0))], [None, None, None]
    )
    seen = [0, 0, 0]
    for sample in range(500):
        assert shares.counts(sample).tolist() == seen
        source, number = shares.locate(sample)
        assert number == seen[source]
        seen[source] += 1
    assert (order(shares, 500)[50:77] != 0).all()
    assert (order(shares, 500)[77:] != 2).all()


def test_a_source_that_is_used_up_leaves_its_share_to_the_others():
    shares = SampleSchedule([(0, (0.5, 0.25, 0.25))], [None, 10, 40])
    drawn = order(shares, 1000)
    assert (drawn == 1).sum() == 10
    assert (drawn == 2).sum() == 40
    last = int(np.flatnonzero(drawn == 1)[-1])
    assert 36 <= last <= 40, "after 10 / 0.25 samples"
    later = drawn[last + 1 :][:30]
    assert (later == 0).sum() == 20, "what is left shares as 0.5 to 0.25"
    assert shares.limit is None
    ending = SampleSchedule([(0, (1, 1))], [3, 4])
    assert ending.limit == 7
    assert sorted(order(ending, 7).tolist()) == [0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(IndexError):
        ending.locate(7)
    # With the last sample of a phase
    phases = [(0, (1, 0)), (3, (0, 1))]
    assert SampleSchedule(phases, [3, 4]).limit == 7


def test_a_place_far_out_is_found_without_a_walk():
    shares = SampleSchedule([(0, (0.61, 0.29, 0.1))], [None] * 3)
    far = 10**12
    source, number = shares.locate(far)
    assert number == shares.counts(far)[source]
    assert abs(int(shares.counts(far)[0]) - 61 * far // 100) <= 1


def test_epochs_that_never_end_are_no_limit():
    for cap in (1 << 50, 10**24):
        shares = SampleSchedule([(0, (1, 65_535))], [cap, None])
        assert shares.limit is None
        assert shares.counts(1 << 17).tolist() == [2, 131_070]


def test_weights_become_whole_numbers():
    assert integer_weights((0.7, 0.25, 0.05)) == (14, 5, 1)
    assert integer_weights((0.1, 0.2)) == (1, 2), (
        "decimals, not what a float makes of them"
    )
    crooked = integer_weights((math.pi, math.e, 1e-9))
    assert sum(crooked) == LONGEST_PERIOD
    assert crooked[2] == 1
    large = (0.6, 0.4)
    rounded = integer_weights((*large, *[1e-7] * 6))
    assert sum(rounded) == LONGEST_PERIOD
    assert rounded[2:] == (1,) * 6
    assert all(
        abs(have - want * LONGEST_PERIOD) < 4
        for have, want in zip(rounded, large, strict=False)
    )


def tijdeman(weights):
    """Tijdeman's rule, sample by sample, in fractions."""
    sources = [source for source, weight in enumerate(weights) if weight]
    slack = max(2 * len(sources) - 2, 1)
    period = sum(weights)
    drawn = dict.fromkeys(sources, 0)
    order = []
    for sample in range(period):
        deficits = {
            source: Fraction((sample + 1) * weights[source], period) - drawn[source]
            for source in sources
        }
        ready = [source for source in sources if deficits[source] * slack >= 1]
        last = 1 - Fraction(1, slack)
        pick = min(
            ready, key=lambda source: (last - deficits[source]) / weights[source]
        )
        order.append((pick, drawn[pick]))
        drawn[pick] += 1
    return order


@pytest.mark.parametrize("sources", [1, 2, 3, 7, 20])
def test_the_order_is_that_of_tijdemans_rule(sources):
    random = np.random.RandomState(sources)
    for most in (1, 4, 30):
        weights = tuple(random.randint(0, most + 1, sources).tolist())
        weights = weights if any(weights) else (1,) * sources
        integers = integer_weights(weights)
        shares = SampleSchedule([(0, weights)], [None] * sources)
        located = [shares.locate(sample) for sample in range(sum(integers))]
        assert located == tijdeman(integers)


def test_many_sources_with_epochs_end_with_their_last_sample():
    """Uneven weights and caps, two phases: every sample of every source is drawn once."""
    random = np.random.RandomState(5)
    weights = random.rand(2, 120).tolist()
    caps = random.randint(1, 90, 120).tolist()
    shares = SampleSchedule([(0, weights[0]), (2000, weights[1])], caps)
    assert shares.limit == sum(caps)
    seen = [0] * 120
    for sample in range(shares.limit):
        source, number = shares.locate(sample)
        assert number == seen[source]
        seen[source] += 1
    assert seen == caps


def test_sources_that_are_left_keep_their_proportion_to_one_sample_each():
    caps = [9, 23, 50, None, None, 80]
    weights = (5, 1, 7, 3, 4, 2)
    drawn = order(SampleSchedule([(0, weights)], caps), 2000)
    counts = np.cumsum(drawn[:, None] == np.arange(6), axis=0)
    assert np.abs(counts[:, 3] * 4 - counts[:, 4] * 3).max() < 3 + 4


def test_a_thousand_sources_take_one_order_a_phase():
    """A start costs as much as the phases do, however many sources are used up."""
    random = np.random.RandomState(6)
    weights = random.rand(1000).tolist()
    caps = random.randint(1, 10**6, 1000).tolist()
    before = source_order.cache_info().misses
    shares = SampleSchedule([(0, weights)], caps)
    assert source_order.cache_info().misses == before + 1
    assert shares.limit == sum(caps)
    assert shares.counts(shares.limit).tolist() == caps


def test_the_order_never_changes():
    """Recorded: a run of today must resume tomorrow."""
    assert (
        order(SampleSchedule([(0, (0.5, 0.3, 0.2))], [None] * 3), 12).tolist()
        == RECORDED
    )


RECORDED = [0, 1, 0, 2, 0, 1, 0, 2, 1, 0, 0, 1]


# -- batches ---------------------------------------------------------------------------


def source(first, blocks, name):
    """Blocks of 4 tokens; `first` marks whose they are."""
    tokens = np.arange(first, first + 4 * blocks + 1, dtype=np.uint32)
    settings = {"eos_id": 0}
    ends = np.array([len(tokens)])
    cache = TokenCache(Path(name), {"settings": settings}, tokens, ends)
    return PackedDataset(cache, 4, f"7/{name}")


def mixture(rows=12, phases=((0, (0.6, 0.4)),), epochs=(None, None), cache="b"):
    """`cache`: the name of the second source's."""
    sources = {"a": source(10_000, 31, "a"), "b": source(20_000, 9, cache)}
    return Mixture(sources, phases, epochs, 4, rows)


def test_sources_keep_their_own_order_and_epochs():
    data = mixture()
    drawn = torch.cat([data.batch(step)["input_ids"][:, 0] for step in range(60)])
    marks = torch.tensor([data.sources_of(step) for step in range(60)]).flatten()
    assert torch.equal((drawn >= 20_000).long(), marks)
    for first, blocks, mark in ((10_000, 31, 0), (20_000, 9, 1)):
        mine = (drawn[marks == mark] - first) // 4
        epochs = [
            sorted(mine[start : start + blocks].tolist())
            for start in range(0, len(mine) - blocks, blocks)
        ]
        assert len(epochs) > 5
        assert all(epoch == list(range(blocks)) for epoch in epochs)
    assert data.tokens(60) == {"a": 4 * 432, "b": 4 * 288}
    alone = PackedDataset(data.sources[1].cache, 4, "7/b")
    wanted = [int(alone.sample(n)["input_ids"][0]) for n in range(9)]
    assert drawn[marks == 1][:9].tolist() == wanted, (
        "another source does not reorder it"
    )
    measured = data.first_sequences(33)["input_ids"][:, 0].tolist()
    assert measured == [10_000 + 4 * (index % 31) for index in range(33)], (
        "of the first source, from its start"
    )


def test_identity_depends_on_sources_weights_and_epochs():
    identity = mixture().identity
    assert mixture().identity == identity
    for changes in (
        {"phases": ((0, (1, 1)),)},
        {"phases": ((0, (0.6, 0.4)), (9, (1, 0)))},
        {"epochs": (2, None)},
        {"cache": "c"},
    ):
        assert mixture(**changes).identity != identity, changes


def test_the_end_of_capped_sources_is_known_beforehand():
    assert mixture(epochs=(2, 1)).max_steps == (62 + 9) // 12
    assert mixture(epochs=(2, None)).max_steps is None
    assert mixture(epochs=(1.5, 1)).schedule.limit == 46 + 9, "of 31 and 9 sequences"
    capped = Mixture({"a": source(0, 100, "a")}, ((0, (1,)),), (0.29,), 4, 12)
    assert capped.schedule.limit == 29, "although 0.29 * 100 < 29 in floats"
    with user_error("shorter than one batch"):
        mixture(rows=100, epochs=(1, 1)).check_batch_size()


# -- what the user writes --------------------------------------------------------------


def mixture_of(tmp_path, text="", **flags):
    if text:
        (tmp_path / "mix.yaml").write_text(text)
        flags["mixture"] = str(tmp_path / "mix.yaml")
    return mixture_config(DataArguments(**flags))


def test_plain_files_are_no_mixture(tmp_path):
    odd = tmp_path / "a=b:1"
    odd.write_text("text")
    for files in (
        ["a.txt", "b.txt"],
        ["x=y.txt"],
        ["s3://bucket:9000/x"],
        [str(odd)],
        ["a.txt:b"],
    ):
        assert mixture_of(tmp_path, train_files=files).is_plain


def test_flags_and_file_say_the_same(tmp_path):
    replay = ["old=o.txt:0.1"]
    files = ["web=w/*.txt:0.7", "code=c.py:0.3"]
    by_flags = mixture_of(tmp_path, train_files=files, replay=replay)
    text = "{sources: {web: {files: w/*.txt, weight: 7}, code: {files: [c.py], weight: 3}}}"
    by_file = mixture_of(tmp_path, text, replay=replay)
    for flags, file in zip(by_flags.sources, by_file.sources, strict=True):
        assert replace(file, flag=flags.flag) == flags
    assert by_flags.phases == by_file.phases == ((0, (0.63, 0.27, 0.1)),)


def test_replay_takes_its_share_of_every_phase(tmp_path):
    text = (
        "sources:\n  web: {files: w, weight: 3}\n  code: {files: c, weight: 1, epochs: 2}\n"
        "phases:\n  - {from_step: 10, weights: {code: 1}}\n"
    )
    config = mixture_of(tmp_path, text, replay=["old=o:0.2"])
    assert config.phases == ((0, (0.6, 0.2, 0.2)), (10, (0.0, 0.8, 0.2)))
    assert config.sources[1].epochs == 2
    plain = mixture_of(tmp_path, train_files=["new.txt"], replay=["old=o:0.05"])
    assert [source.name for source in plain.sources] == ["train", "old"]
    assert plain.phases == ((0, (0.95, 0.05)),)


WRONG = """
{sources: {a: {files: x, weight: 1}}, phases: [{from_step: 5, weights: {a: 0}}]} | from step 5 | add up to 0
{sources: {a: {files: x, weight: much}}} | sources.a.weight must be a number, got 'much'
{sources: {a: {files: x, weight: .nan}}} | 'a' must be at least 0, got nan
{sources: {a: {files: x}, a: {files: y}}} | 'a' is given twice
{sources: {1: {files: x}, '1': {files: y}}} | '1' is given twice
{sources: {'1': {files: x}, 1: {files: y}}} | 1 is given twice
{sources: {1: {files: x}}, phases: [{from_step: 5, weights: {1: 1, '1': 2}}]} | '1' is given twice
"""
"""Wrong flags of mixtures are in tests/config/test_bad_launches.py."""


@pytest.mark.parametrize(
    "text, phrases", [(text, phrases) for text, *phrases in rows_of(WRONG)]
)
def test_what_is_wrong_is_named(tmp_path, text, phrases):
    with pytest.raises(UserError) as error:
        mixture_of(tmp_path, text)
    assert all(phrase in str(error.value) for phrase in phrases), str(error.value)


def test_a_stream_has_no_epochs(tmp_path):
    with user_error(r"sources\.a\.epochs is for text in a cache"):
        mixture_of(tmp_path, "{sources: {a: {files: x, epochs: 2}}}", streaming=True)


# -- complete runs ---------------------------------------------------------------------


PHASES = "phases:\n  - {from_step: 4, weights: {new: 0.25, old: 0.75}}\n"


def test_a_mixed_run_is_the_same_on_more_ranks_and_resumed(user, tmp_path, out):
    """Per-source losses included: exact over ranks and micro-batches."""
    mix = write_mixture(user, tmp_path / "mix.yaml", PHASES)
    more = "--save_steps 2 --merge_every 3 --restart_warmup_steps 1"

    def flags(folder, *batch):
        return mixture_flags(user, folder, mix, more, *batch)

    assert_one_run(flags, tmp_path)
    reference = tmp_path / "reference"
    wide = tmp_path / "wide"
    for one, another in zip(source_rows(wide), source_rows(reference), strict=True):
        for name in ("new", "old"):
            assert one[name]["tokens"] == another[name]["tokens"]
            assert one[name]["loss"] == pytest.approx(another[name]["loss"], rel=1e-5)
    shown = source_rows(reference)
    assert [row["new"]["tokens"] for row in shown] == [64, 128, 192, 256, 288, 320]
    for folder in (reference, out):
        board = EventAccumulator(str(folder / "tensorboard")).Reload()
        points = board.Scalars("8_sources/old/perplexity")
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    write_mixture(user, mix)  # without the phase
    resumed = flags(
        out, "--per_device_train_batch_size 4 --resume_from_checkpoint auto"
    )
    assert (
        "weights of --mixture, --train_files or --replay, from_step_4.old"
        in validation_errors_of(resumed)
    )


def test_the_loss_of_a_source_is_that_of_its_rows(user, tmp_path):
    """In the first step, the loss that a run reports of one source is the loss of a run on
    that source alone; and each source has an order of its own.
    """
    more = "--max_steps 1 --warmup_steps 0 --seq_len 16 --per_device_train_batch_size"
    mix = write_mixture(user, tmp_path / "mix.yaml")
    with mix.open("a") as file:
        file.write(f"  again: {{files: '{user.train}', weight: 0.5}}\n")
    run(1, mixture_flags(user, tmp_path / "mixed", mix, more, 12))
    (facts,) = source_rows(tmp_path / "mixed")
    assert facts["again"]["loss"] != facts["new"]["loss"]
    for name, files in (("new", user.train), ("old", user.held)):
        alone = tmp_path / f"{name}.yaml"
        alone.write_text(f"sources:\n  {name}: {{files: '{files}'}}\n")
        run(1, mixture_flags(user, tmp_path / name, alone, more, 4))
        assert facts[name]["loss"] == pytest.approx(
            float(losses(tmp_path / name)[0]), rel=1e-6
        )
    assert not source_rows(tmp_path / "new"), (
        "one source has its loss in the step's row"
    )


def test_used_up_sources_end_the_run_early_and_say_so(user, tmp_path):
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"sources:\n  a: {{files: '{user.train}', epochs: 1}}\n  b: {{files: '{user.held}', epochs: 1}}\n"
    )
    too_many = mixture_flags(user, tmp_path / "out", mix, "--max_steps", 10_000)
    assert "--max_steps 10000: all sources are used up after" in validation_errors_of(
        too_many
    )
    all_of_it = "--max_steps -1 --per_device_train_batch_size 128 --logging_steps 4"
    summary = run(1, mixture_flags(user, tmp_path / "out", mix, all_of_it))
    assert summary["steps"] == 6, "(819 + 62) sequences // 128"
    steps = [row["step"] for row in curve(tmp_path / "out") if "loss" in row]
    assert steps == [4, 6], "every --logging_steps, and the last one"


# -- held out --------------------------------------------------------------------------


def test_no_held_out_document_is_trained_on(user, tmp_path):
    """The hash of a document decides, in every source: also for a document that is in
    two sources, with other case or white space."""
    texts = user.texts()
    assert document_hash("Caf\u00e9 au\nlait") == document_hash(" cafe\u0301 AU lait ")
    again = tmp_path / "again.jsonl"
    again.write_text(json_lines(f" {text}\n" for text in texts[::2]))
    share = 0.3
    hashes = map(document_hash, texts)
    held_out = {document for document in hashes if document < share * 2**64}
    assert 5 < len(held_out) < 40
    for path in (user.train, again):
        members = load_corpus([str(path)]).members
        trained, evaluated = (
            {*map(document_hash, Corpus(members, keep=kept_documents).texts())}
            for kept_documents in (DocumentFilter(share), DocumentFilter(share, True))
        )
        assert trained
        assert evaluated
        assert not trained & held_out
        assert evaluated <= held_out
    sources = ("--train_files", f"a={user.train}:0.5", f"b={again}:0.5")
    more = ("--held_out_share", share, "--eval_files", f"mine={user.held}")
    run(1, user.flags(tmp_path / "out", *sources, *more))
    (after,) = [
        row["eval_perplexity"]
        for row in rows(tmp_path / "out")
        if "eval_perplexity" in row and row["step"] == 6
    ]
    assert set(after) == {"mine", "held_out_a", "held_out_b"}


def test_a_plain_run_may_hold_out_too(user, tmp_path):
    summary = run(1, user.flags(tmp_path / "out", "--held_out_share 0.2 --max_steps 2"))
    assert set(summary["perplexity_after"]) == {"held", "short", "held_out"}
    nothing = user.flags(tmp_path / "no", "--held_out_share 1e-09")
    assert (
        "every document is empty, or excluded by --held_out_share 1e-09"
        in validation_errors_of(nothing)
    )
