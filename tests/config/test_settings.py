"""What the rest of a run gets from the settings: schedule, engine, adapter, and what a
resumed run must share.
"""

import pytest

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.config.arguments import parse
from mora_ds.config.lr_schedule import Schedule, ScheduleKind
from mora_ds.config.mixture import mixture_config
from mora_ds.engine.settings import EngineSettings, OptimizerKind
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row


def test_evaluation_sets_have_names():
    flags = "--eval_files held.txt news=b/*.txt a=b/c.txt dir/x=y.txt"
    named = parse(flags.split()).data.named_eval_files()
    assert [name for name, _ in named] == ["held", "news", "a", "x=y"]
    files = "held.txt b/*.txt b/c.txt dir/x=y.txt"
    assert [file for _, file in named] == files.split()


def test_a_file_that_is_there_is_no_source_with_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.txt:1").touch()
    (source,) = mixture_config(parse(["--train_files", "a=b.txt:1"]).data).sources
    assert source.files == ("a=b.txt:1",)


def test_a_warmup_below_1_is_a_share_of_the_run():
    assert parse(["--warmup_steps", "0.03"]).schedule_of(1000).warmup_steps == 30
    assert parse(["--warmup_steps", "0.03"]).schedule_of(1001).warmup_steps == 31, (
        "rounded up"
    )
    assert parse(["--warmup_steps", "1"]).schedule_of(1000).warmup_steps == 1
    flags = "--warmup_steps 7 --lr_scheduler_type constant_with_warmup"
    schedule = parse(flags.split()).schedule_of(1000)
    assert (schedule.warmup_steps, schedule.kind) == (7, ScheduleKind.CONSTANT)


def test_a_branch_decays_from_the_peak_whatever_its_warmup():
    for warmup in ("15", "20", "0.9"):
        schedule = parse(
            ["--lr_scheduler_type", "wsd", "--warmup_steps", warmup]
        ).schedule_of(15, 10)
        assert schedule.curve(14) == pytest.approx(schedule.peak / 5)
    with user_error("raise --max_steps"):
        parse([]).schedule_of(10, 10)


def test_the_schedule_has_every_setting_of_the_flags():
    flags = (
        "--learning_rate 0.002 --min_lr_ratio 0.1 --decay_ratio 0.3 --lr_scheduler_type wsd --warmup_steps 5 "
        "--merge_every 40 --restart_warmup_steps 7"
    )
    arguments = parse(flags.split())
    assert arguments.schedule_of(1000) == Schedule(
        kind=ScheduleKind.WARMUP_STABLE_DECAY,
        peak=0.002,
        total_steps=1000,
        warmup_steps=5,
        min_ratio=0.1,
        merge_every=40,
        restart_warmup_steps=7,
        decay_ratio=0.3,
    )


def test_the_engine_has_every_setting_of_the_flags():
    flags = (
        "--per_device_train_batch_size 3 --gradient_accumulation_steps 5 --learning_rate 0.002 --adam_beta1 0.8 "
        "--adam_beta2 0.9 --adam_epsilon 1e-6 --weight_decay 0.2 --max_grad_norm 0.5 --fp16 --optimizer muon "
        "--embedding_learning_rate 0.001 --tensor_parallel_size 2 --sequence_parallel_size 2"
    )
    training = parse(flags.split()).training
    assert training.engine_settings() == EngineSettings(
        micro_batch_size=3,
        gradient_accumulation_steps=5,
        learning_rate=0.002,
        other_learning_rate=0.001,
        betas=(0.8, 0.9),
        epsilon=1e-6,
        weight_decay=0.2,
        max_grad_norm=0.5,
        bf16=False,
        fp16=True,
        optimizer=OptimizerKind.MUON,
    )
    assert training.global_batch_size(8) == 3 * 5 * 2


def test_adapter_settings_become_the_adapters_config():
    assert parse([]).adapter.config(seed=42) == MoRAConfig()
    flags = (
        "--mora_rank 16 --operator share --grouping strided --compute weight --r_hat_multiple 2 --mora_dropout 0.1 "
        "--train_head --train_norms --train_embedding_rank 3 --base_bits 8 --target_modules q_proj"
    )
    assert parse(flags.split()).adapter.config(seed=5) == MoRAConfig(
        rank=16,
        operator="share",
        grouping="strided",
        compute="weight",
        r_hat_multiple=2,
        dropout=0.1,
        train_head=True,
        train_norms=True,
        embedding_rank=3,
        base_bits=8,
        target_modules=("q_proj",),
        seed=5,
    )
    flags = "--adapter lora --mora_rank 4 --lora_alpha 3 --mora_dropout 0.1 --train_embeddings"
    wanted = LoRAConfig(rank=4, alpha=3.0, dropout=0.1, train_embeddings=True, seed=5)
    assert parse(flags.split()).adapter.config(seed=5) == wanted


PEAKS = """
--seed 1                                         | 0.0004 | 0.0004
--learning_rate 0.001                            | 0.001  | 0.001
--embedding_learning_rate 0.001                  | 0.0004 | 0.001
--optimizer muon                                 | 0.01   | 0.0004
--optimizer muon --learning_rate 0.02            | 0.02   | 0.0004
--optimizer muon --embedding_learning_rate 0.001 | 0.01   | 0.001
"""


@each_row("flags, adapter, others", PEAKS)
def test_adapter_and_other_parameters_have_a_peak_learning_rate_each(
    flags, adapter, others
):
    training = parse(flags.split()).training
    assert training.peak_learning_rate == float(adapter)
    assert training.other_learning_rate == float(others)
