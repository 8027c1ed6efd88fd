"""Calls of the tools with one mistake each: code 2, and a message that names the flag or
the file. No traceback.

Each line of `CALLS` is a tool with its flags, and what the message must contain, separated
by " | ". {bad} is the folder of `tests/helpers/mistakes.py`, {user} that of a user's own
files, {run} an output folder, {step} its checkpoint, {link} a link to that, {new} a path where nothing is, {tiny}
a config. Damaged checkpoints, which end with code 1, are in tests/checkpoint/.
"""

import shlex
import shutil

import pytest

from mora_ds.common.files import write_manifest
from tests.helpers.exports import fake_run
from tests.helpers.jobs import REPOSITORY
from tests.helpers.mistakes import answer, make_mistakes
from tests.helpers.tools import tool

CALLS = r"""
plan --gpus 8 --model {bad}/gone.json | --model | gone.json
plan --gpus 8 --model {bad}/text/types.json | --model {bad}/text/types.json | 'hidden_size'
plan --gpus 8 --model {bad}/text/model.json | no model_type
plan --gpus 8 --model {bad}/text/deep.json | nested too deeply
plan --gpus 8 --model {bad}/models/bottomless | num_hidden_layers must be at most 2,048, got 16,777,216
plan --gpus 8 --model {bad}/models/heads | --model | config.json
plan --gpus 8 --model {bad}/models/activation | swiglu9
plan --gpus 0 --model {tiny} | --gpus must be above 0
plan --gpus 8 --model {tiny} --seq_len -1 | --seq_len must be at least 2
plan --gpus 8 --model {tiny} --base_device host --adapter full | --base_device is for an adapter
plan --gpus 8 --model {tiny} --adapter none | --adapter none trains nothing
plan --gpus 8 --model {tiny} --gpu_memori 8 | unknown flag --gpu_memori
plan --gpus 6 --model {tiny} --tensor_parallel_size 4 | --tensor_parallel_size 4 does not divide the 6
plan --gpus 6 --model {tiny} --micro_batch 1 --sequence_parallel_size 4 | --sequence_parallel_size 4 does not divide
plan --gpus 8 --model {tiny} --micro_batch 0 | --micro_batch must be above 0
plan --gpus 8 --model {tiny} --gpu_memory nan | --gpu_memory must be above 0
plan --gpus 8 --model {tiny} --deepspeed {bad}/ds/live.json | live.json | got -5
plan --gpus 8 --model {tiny} --deepspeed {bad}/ds/deep.json | deep.json | nested too deeply
plan --gpus 8 --model {tiny} --mora_rank 0 | --mora_rank
export_hf --checkpoint {bad}/gone --output {new} | --checkpoint | gone
export_hf --checkpoint {bad}/emptydir --output {new} | --checkpoint | emptydir
export_hf --checkpoint {bad}/full --output {new} | --adapter full | --export_merged
convert_checkpoint adapter {bad}/full --output {new} | --adapter full | --export_merged
evaluate {bad}/full --sets a={user}/held.txt | --adapter full | --export_merged
export_hf --checkpoint {run} --output {user} | --output
export_hf --checkpoint {run} --output {tiny}/x | --output {tiny}/x cannot be made | tiny_llama.json is no folder
convert_checkpoint adapter {run} --output {tiny}/x/y | --output {tiny}/x/y cannot be made
export_hf --checkpoint {run} --output /proc/x | --output /proc/x cannot be made
convert_checkpoint adapter {run} --output /proc/x | --output /proc/x cannot be made
evaluate {user}/model --sets a={user}/held.txt --json /proc/x.json | --json /proc/x.json: name a file in a folder
export_hf --checkpoint {run} --output {new} --dtype int3 | --dtype | int3
export_hf --checkpoint {run} --output {new} --domain code | --domain
export_hf --checkpoint {run} --output {new} --delta_scale nan | --delta_scale
export_hf --checkpoint {run} --output {new} --delta_scale 0.5 --verify | --verify
export_hf --checkpoint {run} --output {new} --base {bad}/models/index_lists | index.json
export_hf --checkpoint {run} --output {new} --base {user}/model | {user}/model
export_hf --checkpoint {run} --output {new} --delta_scale half | --delta_scale
export_hf --checkpoint {run} --output {new} --delta_scale inf --onto {user}/model | --delta_scale
export_hf --checkpoint {run} --output {new} --onto {bad}/gone | --onto | gone
export_hf --checkpoint {run} --output {new} --onto {user} | --onto | no config.json
export_hf --checkpoint {run} --output {new} --push_to_hub a/b/c | --push_to_hub a/b/c
verify_checkpoint {bad}/gone | gone
verify_checkpoint ~nobody5/x | ~nobody5/x: the home folder of
plan --gpus 8 --model ~nobody5/x | --model ~nobody5/x: the home folder of
plan --gpus 8 --model {tiny} --deepspeed ~nobody5/x | --deepspeed ~nobody5/x: the home folder of
verify_checkpoint {bad}/emptydir | emptydir
verify_checkpoint {run} --base {bad}/gone | --base | gone
convert_checkpoint adapter {bad}/emptydir --output {new} | emptydir
convert_checkpoint adapter {run} --output {user} | {user}
convert_checkpoint peft {bad}/emptydir --output {new} | emptydir
convert_checkpoint peft {run} --output {new} | --rank is missing
convert_checkpoint peft {run} --output {new} --rank 0 | --rank must be at least 1
convert_checkpoint peft {run} --output {user} --rank 4 | {user}
convert_checkpoint peft {run} --output {new} --rank 4 --base {bad}/gone | --base | gone
convert_checkpoint peft {run} --output {new} --rank 4 --domain code | --domain
convert_checkpoint adapter {run} --output {step}/new | --output {step}/new lies in the checkpoint
convert_checkpoint peft {run} --output {step}/new --rank 4 | --output {step}/new lies in the checkpoint
ledger combine {step} {run} --weights 1 1 --output {link}/ledger/new | --output {link}/ledger/new lies in the checkpoint
evaluate {user}/model --sets a={user}/held.txt --json /dev/null | --json /dev/null: name a file
convert_checkpoint melt {run} --output {new} | melt
ledger show {bad}/gone | gone
ledger show {bad}/ledger_deep | ledger.json
ledger combine {step} --weights 1 2 --output {new} | --weights
ledger combine {step} --weights inf --output {new} | --weights
ledger combine {step} {bad}/gone --weights 1 1 --output {new} | gone
ledger combine {step} --weights 0.5 --output {user} | --output
verify_checkpoint {step}/ledger --base {bad}/gone | --base | gone
evaluate {bad}/gone --sets a={user}/held.txt | gone
evaluate {bad}/models/heads --sets a={user}/held.txt | models/heads | not a multiple of
evaluate {bad}/models/padding --sets a={user}/held.txt | models/padding | Padding_idx
evaluate {bad}/models/deep --sets a={user}/held.txt | weights are missing: 1,000 layers
evaluate {bad}/models/more_layers --sets a={user}/held.txt | models/more_layers | weights are missing
evaluate {bad}/models/wider --sets a={user}/held.txt | models/wider | weights do not fit the config
evaluate {bad}/models/merges --sets a={user}/held.txt | MergeType
evaluate {bad}/models/index_lists --sets a={user}/held.txt | index.json
evaluate {run} --sets a={user}/held.txt --base {bad}/emptydir | --base: the folder {bad}/emptydir holds no tokenizer
evaluate {user}/model | --sets
evaluate {user}/model --sets {bad}/text/empty.txt | --sets
evaluate {user}/model --sets a={bad}/emptydir | --sets a | emptydir
evaluate {user}/model --sets a={user}/held.txt --batch_size 0 | --batch_size
evaluate {user}/model --sets a={user}/held.txt --window 1 | --window
evaluate {user}/model --sets a={user}/held.txt --window 8 --stride 9 | --stride
evaluate {user}/model --sets a={user}/held.txt --device warp | --device
evaluate {user}/model --sets a={user}/held.txt --delta_scale 0.5 | --delta_scale | {user}/model
evaluate {user}/model --sets a={user}/held.txt --delta_scale nan | --delta_scale
extend_vocab {bad}/gone --corpus {user}/held.txt --pieces 8 --output {new} | gone
extend_vocab {user}/model --corpus {bad}/gone.txt --pieces 8 --output {new} | --corpus
extend_vocab {user}/model --corpus {user}/held.txt --pieces 8 --output {tiny}/x | --output {tiny}/x cannot be made
extend_vocab {user}/model --corpus {user}/held.txt --pieces 1000000000 --output {new} | --pieces 4000000512
extend_vocab {user}/model --corpus {user}/held.txt --pieces 0 --output {new} | --pieces
extend_vocab {bad}/models/merges --corpus {user}/held.txt --pieces 8 --output {new} | MODEL | MergeType
extend_vocab {bad}/models/tokenizer_length --corpus {user}/held.txt --pieces 8 --output {new} | MODEL | 'list'
extend_vocab {bad}/models/padding --corpus {user}/held.txt --pieces 8 --output {new} | no model can be created from this
extend_vocab {bad}/models/string --corpus {user}/held.txt --pieces 8 --output {new} | config.json
"""

CASES = [line for line in CALLS.splitlines() if line]


@pytest.fixture(scope="module")
def paths(user, tmp_path_factory):
    bad = tmp_path_factory.mktemp("bad")
    make_mistakes(bad, user)
    run = fake_run(tmp_path_factory.mktemp("run"))
    shutil.copytree(run.checkpoint, bad / "ledger_deep")
    path = bad / "ledger_deep/ledger/ledger.json"
    path.unlink()  # it is a link
    path.write_text("[" * 100_000)
    (bad / "full").mkdir()
    (bad / "full/trainer_state.json").write_text(
        '{"identity": {"adapter": {"kind": "full"}}}'
    )
    write_manifest(bad / "full")
    (bad / "link").symlink_to(run.checkpoint)
    tiny = REPOSITORY / "configs/models/tiny_llama.json"
    return {
        "bad": bad,
        "user": user.root,
        "run": run.output,
        "step": run.checkpoint,
        "link": bad / "link",
        "new": bad / "new",
        "tiny": tiny,
    }


@pytest.mark.parametrize("line", CASES)
def test_a_call_with_a_mistake(line, paths):
    case, *phrases = line.format(**paths).split(" | ")
    name, *flags = shlex.split(case)
    code, message = answer(tool(name).main, f"{name}.py", flags)
    assert code == 2, message
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert not paths["new"].exists()
