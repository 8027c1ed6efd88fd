"""Files with one mistake each, as users and broken transfers make them, and programs that
are called with them.
"""

import json
import shlex
import shutil
import sys
import traceback

import pytest

from mora_ds.commands import dispatch
from mora_ds.common.errors import UserError
from tests.helpers.tables import parsed, rows

NUMBER_5000 = "1" * 5_000
"""More digits than Python turns into a number."""

DEEP = "[" * 100_000 + "]" * 100_000
"""More brackets than Python's JSON reader follows."""


def answer(program, name, flags):
    """(exit code, message) of a program in this process. An error that is not the project's
    own has code 1 and a traceback, as on a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *flags])
        try:
            program()
        except UserError as error:
            return 2, str(error)
        except SystemExit as left:  # argparse has printed its message
            return (left.code if isinstance(left.code, int) else 1), str(
                left.__context__ or left
            )
        except Exception:
            return 1, traceback.format_exc()
    return 0, ""


def command(name, flags):
    """`answer` of `mora-ds NAME`."""
    return answer(lambda: dispatch.run(name), f"mora-ds {name}", flags)


def flags_of(case, defaults, paths):
    """The words of `case`, with the paths of `places` in place of {NAME}, after the flags
    `defaults`; "-FLAG" takes a flag and its value out of them. A recipe comes first, as it
    has to."""
    words = shlex.split(case.format(**paths))
    remaining = list(defaults)
    while words and words[0].startswith("-") and not words[0].startswith("--"):
        position = remaining.index(f"-{words.pop(0)}")
        del remaining[position : position + 2]
    recipe = [words.pop(0)] if words and words[0].endswith(".yaml") else []
    return [*recipe, *remaining, *words]


def write(folder, name, content):
    """Text may hold DEEP and NUMBER_5000 by their names."""
    if isinstance(content, str):
        text = content.replace("DEEP", DEEP).replace("NUMBER_5000", NUMBER_5000)
        content = text.encode()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


DEEPSPEED_FILES = """
live | {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": -5}}
bucket | {"zero_optimization": {"stage": 3, "reduce_bucket_size": "large"}}
stage | {"zero_optimization": {"stage": "3"}}
device | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}
nvme | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}}
hpz | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
activation | {"activation_checkpointing": 7}
flops | {"flops_profiler": "on"}
comms | {"comms_logger": {"enabled": "often"}}
tensorboard | {"tensorboard": 3}
checkpoint | {"checkpoint": 5}
aio | {"aio": []}
fp16 | {"fp16": {"enabled": "perhaps"}}
scale | {"fp16": {"loss_scale": -1}}
betas | {"optimizer": {"params": {"betas": 0.9}}}
optimizer | {"optimizer": {"type": "Lamb"}}
clipping | {"gradient_clipping": "much"}
rows | {"train_batch_size": 7}
several | {"zero_optimisation": {"stage": 3}, "train_micro_batch_size_per_gpu": 5, "train_batch_size": 7, \
"optimizer": {"params": {"lr": 1.0}}}
types | {"data_types": {"grad_accum_dtype": "fp8"}}
communication | {"communication_data_type": "fp99"}
scheduler | {"scheduler": {"type": "WarmupLR"}}
param | {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
typo | {"zero_optimisation": {"stage": 3}}
section | {"zero_optimization": 3}
list | [{"zero_optimization": {"stage": 3}}]
twice | {"bf16": {}, "bf16": {}}
comma | {"zero_optimization": {"stage": 3},}
number | {"zero_optimization": {"reduce_bucket_size": NUMBER_5000}}
deep | {"zero_optimization": DEEP}
"""


def deepspeed_files(folder):
    """ds/NAME.json, each with one wrong value."""
    unusual = {"empty": "", "binary": b"\x80\x02}q\x00."}
    for name, content in {**dict(rows(DEEPSPEED_FILES)), **unusual}.items():
        write(folder, f"ds/{name}.json", content)


YAML_FILES = """
recipes/empty_path | cache_dir: ''
recipes/typo | mora_rnak: 8
recipes/type | max_steps: many
recipes/list | [max_steps, 8]
recipes/twice | {seed: 1, seed: 2}
recipes/date | seed: 2024-13-45
recipes/alias | seed: *other
recipes/tag | seed: !!python/object:os.system 1
mix/no_sources | phases: []
mix/no_files | sources: {web: {weight: 1}}
mix/list | sources: [web, code]
mix/entry | sources: {web: corpus.txt}
mix/key | sources: {web: {files: a.txt, wieght: 2}}
mix/weight | sources: {web: {files: a.txt, weight: -1}}
mix/zero | sources: {web: {files: a.txt, weight: 0}}
mix/epochs | sources: {web: {files: a.txt, epochs: 0}}
mix/name | sources: {a/b: {files: a.txt}}
mix/number | {sources: {1: {files: a.txt}}, phases: [{from_step: 3, weights: {2: 1}}]}
mix/phase | {sources: {web: {files: a.txt}}, phases: [{from_step: 0, weights: {web: 1}}]}
mix/gone | sources: {web: {files: gone.txt}}
targets/list | [q_proj]
targets/other | seed: 1
targets/format | format: 99
recipes/number | seed: NUMBER_5000
recipes/deep | target_modules: DEEP
recipes/key | {[seed, bf16]: 1}
"""


def yaml_files(folder):
    """recipes/NAME.yaml, mix/NAME.yaml and targets/NAME.yaml, each with one mistake."""
    unusual = {
        "recipes/tab": "seed:\t1\n\tbf16: true\n",
        "recipes/binary": b"\x80\x02}q\x00.",
        "targets/empty": "",
        "targets/binary": b"\x80\x02}q\x00.",
    }
    for name, content in {**dict(rows(YAML_FILES)), **unusual}.items():
        write(folder, f"{name}.yaml", content)


CONFIGS = """
heads | {num_attention_heads: 5, num_key_value_heads: 5}
kv_heads | {num_key_value_heads: 3}
string | {hidden_size: "32"}
negative | {num_hidden_layers: -2}
no_heads | {num_attention_heads: 0}
float | {vocab_size: 400.5}
list | {intermediate_size: [56]}
null | {hidden_size: null}
activation | {hidden_act: swiglu9}
rope | {rope_parameters: {rope_type: spiral}}
type | {model_type: lama}
no_type | {model_type: null}
padding | {pad_token_id: 1000000}
deep | {num_hidden_layers: 1000}
bottomless | {num_hidden_layers: 16777216}
quantized | {quantization_config: {quant_method: gptq, bits: 4}}
more_layers | {num_hidden_layers: 3}
wider | {intermediate_size: 64}
code | {auto_map: {AutoModelForCausalLM: modeling.Model}, model_type: own}
"""
"""Changes of a good config."""


REPLACED = """
config_deep | config.json | {"a": DEEP}
config_number | config.json | {"model_type": "llama", "hidden_size": NUMBER_5000}
config_list | config.json | [1, 2]
weights_html | model.safetensors | <!doctype html><title>404 Not Found</title>
tokenizer_list | tokenizer_config.json | []
tokenizer_number | tokenizer_config.json | {"model_max_length": NUMBER_5000}
tokenizer_deep | tokenizer_config.json | {"a": DEEP}
tokenizer_class | tokenizer_config.json | {"tokenizer_class": "NoTokenizer"}
index_deep | model.safetensors.index.json | {"weight_map": DEEP}
index_number | model.safetensors.index.json | {"metadata": NUMBER_5000, "weight_map": {"a": "b"}}
"""
"""Files in place of the good ones."""


def model_folders(folder, user):
    """models/NAME, each a copy of the user's model with one mistake."""
    config = json.loads((user.model / "config.json").read_text())
    files = {
        name: {"config.json": json.dumps({**config, **parsed(change)})}
        for name, change in rows(CONFIGS)
    }
    tokens = json.loads((user.model / "tokenizer_config.json").read_text())
    weights = (user.model / "model.safetensors").read_bytes()
    (length,) = memoryview(weights[:8]).cast("Q")
    header = json.loads(weights[8 : 8 + length])
    tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
    names = list(tensors)
    first = next(iter(tensors))

    def with_header(content):
        return (
            len(content).to_bytes(8, "little")
            + content.encode()
            + weights[8 + length :]
        )

    def changed(**facts):
        return json.dumps({**tensors, first: {**tensors[first], **facts}})

    def index(weight_map):
        return {
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}),
            "part.safetensors": weights,
        }

    files |= {name: {file: text} for name, file, text in rows(REPLACED)}
    files |= {
        "config_empty": {"config.json": ""},
        "config_binary": {"config.json": b"\xff\xfe\x00"},
        "weights_empty": {"model.safetensors": b""},
        "weights_torn": {"model.safetensors": weights[:-100]},
        "weights_length": {"model.safetensors": b"\xff" * 8 + weights[8:]},
        "header_json": {"model.safetensors": with_header("{" + "x" * 100)},
        "header_dtype": {"model.safetensors": with_header(changed(dtype="F31"))},
        "header_offsets": {
            "model.safetensors": with_header(changed(data_offsets=[9, 1]))
        },
        "lfs": {
            "model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
        },
        "merges": {
            "tokenizer.json": broken_tokenizer(user, merges=[["a", "nowhere"], "b"])
        },
        "tokenizer_length": {
            "tokenizer_config.json": json.dumps({**tokens, "model_max_length": [1]})
        },
        "tokenizer_torn": {
            "tokenizer.json": (user.model / "tokenizer.json").read_bytes()[:200]
        },
    }
    sharded = {
        "index_lists": {name: ["part.safetensors"] for name in names},
        "index_numbers": dict.fromkeys(names, 3),
        "index_none": {},
        "index_array": names,
        "index_gone": dict.fromkeys(names, "gone.safetensors"),
        "index_key": {
            **dict.fromkeys(names, "part.safetensors"),
            "other.weight": "part.safetensors",
        },
    }
    files |= {name: index(weight_map) for name, weight_map in sharded.items()}
    for name, contents in files.items():
        shutil.copytree(user.model, folder / "models" / name)
        if name.startswith("index"):
            (folder / "models" / name / "model.safetensors").unlink()
        for file, content in contents.items():
            write(folder / "models" / name, file, content)
    for name, gone in (
        ("no_config", "config.json"),
        ("no_weights", "model.safetensors"),
        ("no_tokenizer", "tok*"),
    ):
        shutil.copytree(user.model, folder / "models" / name)
        for path in (folder / "models" / name).glob(gone):
            path.unlink()


def broken_tokenizer(user, **model):
    content = json.loads((user.model / "tokenizer.json").read_text())
    content["model"].update({"type": "BPE", "vocab": {"a": 0, "b": 1}, **model})
    return json.dumps(content)


def text_files(folder):
    """text/NAME, each with one mistake."""
    contents = {
        "empty.txt": b"",
        "torn.jsonl": b'{"text": "fine"}\n{"text": "torn\n',
        "column.jsonl": b'{"txt": "fine"}\n',
        "number.jsonl": b'{"text": 7}\n',
        "list.jsonl": b"[1, 2]\n",
        "blank.jsonl": b"\n\n",
        "short.txt": b"a",
        "latin.txt": b"one\ntwo\nna\xefve\n",
        "latin.jsonl": b'{"text": "fine"}\n{"text": "na\xefve"}\n',
        "torn.parquet": b"PAR1 and nothing else",
        "torn.jsonl.gz": b"\x1f\x8b\x08\x00 and nothing else",
        "torn.txt.zst": b"(\xb5/\xfd and nothing else",
        "notes.docx": b"PK",
        "torn.model": b"\x0a\x07not sentencepiece",
        "model.json": '{"hidden_size": 32}',
        "heads.json": '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}',
        "types.json": '{"model_type": "llama", "hidden_size": "32", "num_hidden_layers": 1}',
        "deep.json": '{"model_type": DEEP}',
        "digits.json": '{"model_type": "llama", "hidden_size": NUMBER_5000}',
    }
    for name, content in contents.items():
        write(folder, f"text/{name}", content)
    (folder / "emptydir").mkdir()


def make_mistakes(folder, user):
    """All of the files above, in `folder`."""
    deepspeed_files(folder)
    yaml_files(folder)
    model_folders(folder, user)
    text_files(folder)
