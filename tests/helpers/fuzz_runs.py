"""Random settings over tiny models of five families, each run in this process and judged.

A case is one seed: a model, a text, and up to nine settings. What is refused must name a
setting that was given, and leave nothing behind; that one is taken away, and the rest is
tried again, until a run comes to its end. A fault is everything else.
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import traceback
from pathlib import Path

import yaml

from mora_ds.checkpoint.manager import CheckpointManager, complete_checkpoints
from mora_ds.commands.pretrain import train
from mora_ds.common.errors import RunError, UserError
from mora_ds.config.arguments import parse
from mora_ds.data import load_tokenizer
from mora_ds.train.replica import NotFinite
from tests.helpers.fuzz import judged_in_processes
from tests.helpers.jobs import REPOSITORY, VOCABULARY
from tests.helpers.models import tiny_model
from tests.helpers.tables import rows

MODELS = ("llama", "qwen3", "gemma2", "gpt2", "mixtral")

SETTINGS = """
adapter                     | mora | mora | mora | lora | subspace | full | none | mroa
mora_rank                   | 1 | 2 | 3 | 8 | 64 | 0 | 100000
r_hat_multiple              | 1 | 2 | 8 | 3 | 1000
lora_alpha                  | 1 | 1e-30 | 0
operator                    | truncate | share | decouple | rotate | turn
grouping                    | alternate | plain | strided | contiguous-strided
target_modules              | q_proj | *_proj | re:.*(q|v)_proj | experts | all-linear experts | c_attn | nothing
compute                     | activation | weight | fast
base_bits                   | 8 | 4 | 16 | 5
mora_dropout                | 0.1 | 0.999 | 1
train_embeddings            | true
train_new_embeddings        | true
train_embedding_rank        | 2 | 1000 | -1
train_norms                 | true
train_head                  | true
merge_every                 | 1 | 2 | 3 | 100
restart_warmup_steps        | 1 | 2 | 0
replay                      | old={user}/held.txt:0.5 | old={user}/held.txt:1
held_out_share              | 0.1 | 0.9 | 1
streaming                   | true
shuffle_buffer              | 0 | 1 | 100000
eval_files                  | a={user}/held.txt | a={user}/other.txt b={user}/held.txt | {user}/gone.txt
text_column                 | text | column
document_start              | none | </s> | <odd>
seq_len                     | 2 | 3 | 16 | 128 | 129
document_mask               | false
preprocessing_workers       | 2
tokenizer_name              | {user}/model | {user}/gone
train_tokenizer_vocab       | 300 | 5
trust_remote_code           | true
rope_scaling                | {{"rope_type":"yarn","factor":4.0}} | {{"rope_type":"dynamic","factor":2}} | {{}}
attn_implementation         | sdpa | eager | flex_attention | flash_attention_2
overwrite_output_dir        | true
resume_from_checkpoint      | auto | latest
deepspeed                   | {configs}/zero1.json | {configs}/zero2.json | {configs}/zero3_offload_optimizer.json
tensor_parallel_size        | 2
base_device                 | host | device
dry_run                     | true
max_steps                   | 1 | 2 | 5 | 0
num_train_epochs            | 0.01 --max_steps -1 | 1e-9 --max_steps -1 | 0 --max_steps -1
per_device_train_batch_size | 1 | 3 | 700
per_device_eval_batch_size  | 1 | 2 | 64
gradient_accumulation_steps | 2 | 3
sequence_parallel_size      | 2
optimizer                   | muon
learning_rate               | 1e-30 | 1e4 | 1e25 | 1e38 | 0
embedding_learning_rate     | 1e-3
min_lr_ratio                | 0.1 | 1 | 2
lr_scheduler_type           | cosine | constant | wsd | warmup_stable_decay | lin
decay_ratio                 | 0.5 | 1 | 0
decay_from                  | {user}/gone/step-000002
warmup_steps                | 0 | 1 | 3 | 0.5 | 1.5
weight_decay                | 0.1 | 1e9
adam_beta1                  | 0 | 0.99999999
adam_beta2                  | 0 | 1
adam_epsilon                | 1e-30 | 1e30
max_grad_norm               | 0 | 1e-30
bf16                        | true
fp16                        | true
deterministic               | true
gradient_checkpointing      | true
chunked_loss                | true
log_level                   | debug | error
report_to                   | tensorboard
logging_steps               | 2 | 100
profile                     | 1 | 100 | 0
eval_steps                  | 1 | 2 | 3
eval_on_start               | false
eval_tasks                  | no_such_task
eval_tasks_steps            | 2
stop_when_forgotten         | held:1.0001 | a:2
best_by                     | held:1 | held:1 short:0.5
max_eval_batches            | 1 | 1000
save_steps                  | 0 | 1 | 2 | 3
save_total_limit            | 1 | 2
async_save                  | true
seed                        | 0 | 281474976710655
export_merged               | true
collective_timeout_s        | 1 | 0.5
research.domain_adapters    | true
research.alignment_weight   | 0.1 | 100 | 1e30 | -1
research.alignment_rank     | 1 | 4 | 1000 | 0
research.sides              | gradient | weight | both
"""
"""A setting and its values, legal ones and such as lie at an edge."""

TEXTS = (
    ("train_files", "{user}/train.jsonl"),
    ("train_files", "new={user}/train.jsonl:0.5 old={user}/held.txt:0.5"),
    ("mixture", "{user}/mixture.yaml"),
)

SMALL = {
    "output_dir": "out",
    "cache_dir": "{user}/cache",
    "eval_files": "held={user}/held.txt short={user}/other.txt",
    "seq_len": "32",
    "max_steps": "4",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-2",
    "save_steps": "2",
    "report_to": "none",
}
"""The default of each setting of a case."""

SECONDS = 60
"""The limit of one run, on a machine that others use too."""

CASES_OF_A_PROCESS = 20


def prepare(user):
    """Write a model of each family, of one layer and one vocabulary, and a mixture into the
    user's folder.
    """
    for family in MODELS:
        layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
        tiny_model(family, vocab_size=VOCABULARY, **{layers: 1}).save_pretrained(
            user.root / family
        )
        load_tokenizer(user.model).save_pretrained(user.root / family)
    sources = {
        name: {"files": str(path), "weight": 1}
        for name, path in (("new", user.train), ("old", user.held))
    }
    (user.root / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources}))


def argv_of(settings, user):
    """The command line; those of `mora_ds.research` stand in a recipe."""
    research = {}
    flags = []
    for name, text in settings.items():
        if name.startswith("research."):
            research[name.removeprefix("research.")] = yaml.safe_load(text)
        else:
            flags += [
                f"--{name}",
                *text.format(user=user.root, configs=REPOSITORY / "configs").split(),
            ]
    recipe = user.root / "research.yaml"
    recipe.write_text(yaml.safe_dump({"research": research} if research else {}))
    return [str(recipe), *flags]


def named_in(message, settings):
    names = {
        flag or key for flag, key in re.findall(r"--(\w+)|(research\.\w+)", message)
    }
    return [name for name in settings if name in names]


def attempt(settings, user):
    """(ok, diverged, refused or fault; what was printed or said) of one run, which writes
    `out` alone.
    """
    entries = set(os.listdir("."))
    printed = io.StringIO()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            summary = train(parse(argv_of(settings, user))) or {}  # of a dry run
        assert summary.get("base_bytes_gathered", 0) == 0
        assert not any(
            CheckpointManager.verify(folder)
            for folder in complete_checkpoints(Path("out/checkpoints"))[-1:]
        )
        assert set(os.listdir(".")) <= {*entries, "out"}
    except UserError as error:
        is_clear = named_in(str(error), settings) and set(os.listdir(".")) == entries
        return ("refused" if is_clear else "fault"), str(error)
    except RunError as error:
        return ("diverged" if isinstance(error.__cause__, NotFinite) else "fault"), str(
            error
        )
    except BaseException:
        return "fault", traceback.format_exc(limit=-8)
    finally:
        signal.alarm(0)
    return "ok", printed.getvalue()


def _too_long(_, __):
    raise TimeoutError(f"more than {SECONDS} s")


def attempts(seed, user):
    """Every run of a case, without a refused setting each time."""
    draw = random.Random(seed)
    text = dict([draw.choice(TEXTS)])
    base = {"model_name_or_path": "{user}/" + draw.choice(MODELS), **text, **SMALL}
    table = {name: values for name, *values in rows(SETTINGS)}
    settings = {
        **base,
        **{
            name: draw.choice(table[name])
            for name in draw.sample(sorted(table), draw.randint(1, 9))
        },
    }
    while True:
        kind, said = attempt(settings, user)
        yield kind, said, dict(settings)
        removable = [
            name
            for name in named_in(said, settings)
            if settings[name] != base.get(name)
        ]
        if kind != "refused" or not removable:
            break
        name = draw.choice(removable)
        settings.pop(name)
        settings |= {name: base[name]} if name in base else {}


def _judged(user, seeds, scratch):
    """Every attempt of the cases with these seeds, on one rank."""
    findings = []
    for seed in seeds:
        (scratch / "seed").write_text(str(seed))
        shutil.rmtree(scratch / "case", ignore_errors=True)
        (scratch / "case").mkdir()
        os.chdir(scratch / "case")
        findings += [(seed, *attempted) for attempted in attempts(seed, user)]
    return findings


def fuzz(user, seeds, scratch):
    """Every attempt of the cases with these seeds: seed; ok, diverged, refused or fault;
    what was said; the settings.
    """
    return judged_in_processes(
        _judged,
        user,
        seeds,
        scratch,
        CASES_OF_A_PROCESS,
        lambda seed, message: (seed, "fault", message, {}),
    )
