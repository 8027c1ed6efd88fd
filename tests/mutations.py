"""Small faults put into the code one at a time, and whether the default tests notice them.
Run by hand.

One file because it is one list.

    python -m tests.mutations                     every fault against the tests that should notice it first
    python -m tests.mutations --only NAME ...     those whose names contain one of these
    python -m tests.mutations --list              what there is, and whether every pattern still fits the code

Each fault is applied to a copy of the checkout, never to the checkout itself. A pattern
that does not fit exactly one place of its function is an error: the code has changed, and
the fault has to be written anew.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """A fault: in the function `scope` of `file`, `new` replaces what fits the pattern
    `old`.
    """

    name: str
    file: str
    """Below mora_ds/."""
    scope: str
    """Qualified name of a function or class; empty for the whole module."""
    tests: str
    """Files below tests/ that should notice it first, separated by blanks."""
    old: str
    new: str

    def mutated(self, root):
        """The source with the fault, without comments. Raises `LookupError` unless the
        pattern fits exactly one place.
        """
        tree = ast.parse((root / "mora_ds" / self.file).read_text())
        scope = tree
        for name in filter(None, self.scope.split(".")):
            named = (node for node in ast.walk(scope) if vars(node).get("name") == name)
            scope = next(named, ast.Pass())
        edit = Edit(self.old, self.new)
        edit.visit(scope)
        if edit.count != 1:
            raise LookupError(
                f"the pattern fits {edit.count} places of {self.scope or 'the module'} in"
                f" mora_ds/{self.file}: {self.old}"
            )
        return ast.unparse(tree)

    def problem(self, root):
        """Why the fault cannot be applied to the checkout `root`, or ""."""
        try:
            self.mutated(root)
        except (LookupError, OSError) as error:
            return str(error)
        return ""


class Edit(ast.NodeTransformer):
    """Replaces every expression or statement that fits the pattern `old`, and counts
    them.
    """

    def __init__(self, old, new):
        self.pattern = parsed(old)
        self.new = new
        self.count = 0

    def visit(self, node):
        bound = {}
        if not fits(self.pattern, node, bound):
            return self.generic_visit(node)
        self.count += 1
        new = self.new
        for name, expression in bound.items():
            new = new.replace(name, f"({expression})")
        return parsed(new)


def parsed(source):
    """One statement, or what an expression that stands alone is."""
    statement = ast.parse(source).body[0]
    return statement.value if isinstance(statement, ast.Expr) else statement


def fits(pattern, node, bound):
    """Whether two parts of syntax trees are equal. A name of the pattern that begins with
    `any_` takes any expression, everywhere the same one, which goes into `bound`.
    """
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(
            fits(*pair, bound) for pair in zip(pattern, node, strict=True)
        )
    if not isinstance(pattern, ast.AST):
        return repr(pattern) == repr(node)
    name = getattr(pattern, "id", "")
    if name.startswith("any_"):
        source = ast.unparse(node)
        return bound.setdefault(name, source) == source
    return type(pattern) is type(node) and all(
        field == "ctx" or fits(part, getattr(node, field), bound)
        for field, part in ast.iter_fields(pattern)
    )


FAULTS = r"""
# moments are not reset at a merge
remora/merge.py ReMoRA._start_cycle | remora/test_merge.py
- zero.reset_group(self.engine, 0)
+ None

# permutations are the same in every cycle
adapters/config.py MoRAConfig.in_cycle | adapters remora/test_merge.py
- permutation_seed(any_seed, layer, cycle)
+ permutation_seed(any_seed, layer, 0)

# the mean over tokens is a mean of ranks' means
train/trainer.py Trainer.train_step | train/test_pretrain.py
- max(self._next_labels, 1.0)
+ max(labels_in(batch) * self.replica.world, 1.0)

# the rule of paths counts the work over activations once
adapters/ops/linear.py cheaper_path | adapters/ops/test_linear.py
- 2 * tokens * (d_in + d_out)
+ tokens * (d_in + d_out)

# an evaluation pass reads its sequences as the batch before it
train/non_fatal.py eval_mode | train/test_eval_mode.py
- domains_of(model).using(domain)
+ nullcontext()

# evaluations drop out
train/non_fatal.py eval_mode | train/test_eval_mode.py
- model.eval()
+ None

# a package that leaves the process ends the run
common/errors.py | train/test_trackers.py
- (Exception, SystemExit)
+ (Exception,)

# a failed evaluation ends the run
train/trainer.py Trainer._evaluate | train/test_non_fatal.py
- NON_FATAL_ERRORS
+ ImportError

# a stored operator is not compared with the live one
checkpoint/sections.py AdapterSection.load | checkpoint/test_resume_checks.py
- different_keys(adapter.layers, any_live)
+ different_keys(any_live, any_live)

# a step may be saved after a later one
train/run.py TrainingRun._check_step | train/test_run_calls.py
- max(earliest, self.state.step)
+ earliest

# True is a number
common/errors.py whole_number | common/test_errors.py
- isinstance(value, Integral) and not isinstance(value, bool)
+ isinstance(value, Integral)

# functions name flags
common/errors.py named_as_flags | common/test_errors.py
- error.args = any_named
+ _ = any_named

# an empty text is a path
common/files.py as_path | common/test_files.py
- not isinstance(path, str) or not path
+ not isinstance(path, str)

# a resume does not tell what changed
train/run_file.py changed_settings | train/test_resume.py
- before.get(name, value) != value
+ before.get(name, value) is None

# a flag without effect is taken
config/effects.py unused_options | config/test_effects.py
- not any_effect.present(arguments)
+ any_effect.present is None

# the rotation's sines are those of the CPU
adapters/ops/index_tables.py rope_table | adapters/ops/test_mora.py
- cos.float()
+ cos.acos().float().cos()

# hashes of files are not compared
common/files.py file_problem | checkpoint/test_damage.py remora/test_ledger.py
- sha256_file(path) != sha256
+ not sha256_file(path)

# the merged weight is rounded twice
adapters/ops/updates.py merged_weight | remora/test_ledger.py
- original.to(device)
+ original.to(device, dtype)

# blocks are packed one token too far apart
data/packing.py PackedDataset.block | data/test_packing.py
- index * self.seq_len
+ index * (self.seq_len + 1)

# evaluation counts some blocks twice
data/packing.py PackedDataset.eval_batches | data/test_packing.py eval/test_perplexity.py
- [padding]
+ [self.block(0)]

# the limit of evaluation batches is one of each rank
train/evaluator.py Evaluator.counted_batches | train/test_evaluator.py
- round_ * count + index >= limit
+ round_ + index >= limit * count

# the re-warmup is one step short
config/lr_schedule.py rewarmed | config/test_lr_schedule.py
- step - merged_at + 1
+ step - merged_at + 2

# the last cycle is left out of an export
deploy/export.py MergedModelSource.updates | deploy/test_export.py
- list(self.ledger.mora_matrices_of(any_module))
+ list(self.ledger.mora_matrices_of(any_module))[:-1]

# rows of a batch get each other's adapters
research/bank.py AdapterBank._terms_of | research/test_bank.py
- list(by_index.values())
+ list(by_index.values())[::-1]

# the chain of hashes is not checked
remora/ledger.py Ledger._check_records | remora/test_ledger.py
- record.chain != chain
+ not record.chain

# a merge comes before the checkpoint of its step
train/trainer.py Trainer.after_step | train/test_non_fatal.py
- any_state.merge_pending and self._save_is_due
+ False

# a merge may come between a backward pass and its step
train/run.py Run._check_step | train/test_run_calls.py
- any_gradient == self.engine.micro_steps
+ False

# a request to stop is ignored
train/trainer.py Trainer._reduce_metrics_and_stop_flag | runtime/test_signals.py
- self.replica.sum(signals.requested()) > 0
+ self.replica.sum(signals.requested()) < 0

# the checksum of base tensors is not in the fingerprint
models/base.py BaseCheckpoint._lines | models/test_base.py
- tensor_checksum(tensor)
+ 0

# micro-batches of different ranks are swapped
train/replica.py Replica.slices | train/test_replica.py
- index * self.count + self.index
+ self.index * micro_batches + index

# the tail of a stream is dropped
data/stream_source.py Shard.cuts | data/test_stream.py
- self._available <= 1
+ self._available <= self.seq_len

# Muon's learning rate is ignored
config/training.py TrainingArguments.peak_learning_rate | config/test_settings.py
- MUON_LEARNING_RATE
+ ADAMW_LEARNING_RATE

# a stale copy of a tied weight is exported
deploy/onto.py exported_keys | deploy/test_export.py
- key in used or key not in any_reference.keys
+ key

# a head that only the target has apart is left without the update of the tied one
deploy/export.py updated_tensors.tensor_of | deploy/test_onto.py
- run.reference.keys.get(any_key, any_key)
+ any_key

# int8 scales are those of the columns
adapters/ops/int8.py quantize | adapters/ops/test_int8.py
- torch.aminmax(chunk, dim=1)
+ torch.aminmax(chunk.view(chunk.shape[::-1]).T, dim=1)

# merged cycles with a base in 4 bits have no input gradient
adapters/nf4.py NF4Weight.input_gradient | adapters/test_nf4.py
- add_terms_gradient_(any_gradient, self.terms, g)
+ any_gradient

# a tensor-parallel window is shifted by one input
parallel/windows.py _within | parallel/test_windows.py
- inside = (table >= start) & (table < stop)
+ inside = (table > start) & (table <= stop)

# the share of replayed text is ignored
config/mixture.py _with_replay | data/test_mixture.py
- (*new, *shares)
+ (*weights, *shares)

# small token caches are not read through
data/cache.py damage | data/test_cache_damage.py
- sum(sizes.values()) <= hashed_bytes
+ False

# elements that two shards hold are accepted
checkpoint/shard_table.py _tile | engine/test_shards.py
- (number, start) != (parameter, end)
+ number != parameter or start > end

# the folder of a checkpoint is not flushed before its name
checkpoint/storage.py LocalStorage.commit | checkpoint/test_manager.py
- fsync_tree(self.root / written, with_files=False)
+ None

# the folder of all checkpoints is not flushed after the rename
checkpoint/storage.py LocalStorage.commit | checkpoint/test_manager.py
- fsync(self.root)
+ None

# the manifest of a replaced checkpoint in a bucket is copied first
checkpoint/storage.py ObjectStorage._replace | checkpoint/test_object_storage.py
- file == manifest
+ file != manifest

# a checkpoint in a bucket is replaced in place
checkpoint/storage.py ObjectStorage._key | checkpoint/test_object_storage.py
- final == folder or self._is_committed(final)
+ final == folder

# a lease is taken from a process that renews it
common/object_store.py Lease._await_expiry | common/test_object_store.py
- now != content and not is_released
+ False

# a base that is changed during the run is not noticed
models/base.py BaseCheckpoint.changed_files | models/test_base.py train/test_base_watch.py
- stat_signature(path) != before
+ not before

# auto goes on from a checkpoint after the one that latest names
checkpoint/manager.py _newest_intact | checkpoint/test_resume_checks.py
- names = names[any_limit]
+ pass

# ranks without a saved random state draw the same masks
checkpoint/sections.py RandomSection._seed | checkpoint/test_resume_checks.py
- f"{self.state.identity}/{self.state.step}/{rank}"
+ f"{self.state.identity}/{self.state.step}"

# a folder gets its name before its files are on disk
common/files.py atomic_folder | common/test_files.py
- fsync_tree(partial)
+ None

# an old checkpoint that cannot be deleted ends the run
checkpoint/storage.py LocalStorage.delete | checkpoint/test_folder.py
- OSError
+ FileNotFoundError

# a hash is of the first 4 MiB alone
common/files.py sha256_file | common/test_files.py
- return hashlib.file_digest(file, "sha256").hexdigest()
+ return hashlib.sha256(file.read(1 << 22)).hexdigest()

# what a sum of weights leaves of the base is forgotten
deploy/combine.py _Trained.tensor | deploy/test_combine.py
- 1 - math.fsum(any_weights)
+ 0.0

# logits of an export in 16 bits may differ twice as much
deploy/logits_check.py compare | deploy/test_logits_check.py
- 2 * torch.finfo(dtype).eps
+ 4 * torch.finfo(dtype).eps

# links inside a checkpoint are followed
common/untrusted.py links | checkpoint/test_crafted.py
- stat.S_ISLNK(mode)
+ stat.S_ISLNK(mode) and not parent

# a pipe in a checkpoint is read
common/untrusted.py links | checkpoint/test_crafted.py
- not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
+ stat.S_ISBLK(mode)

# what a line unpacks to has no limit
data/readers.py _lines | data/test_corpus.py
- any_stream.readline(LINE_BYTES + 1)
+ any_stream.readline()

# pickled weights are kept in the precision of the run
models/load.py original_tensors | models/test_load.py
- torch.promote_types(stored, dtype) != dtype
+ torch.promote_types(stored, dtype) != dtype and not own_base

# the place of the merged model is looked at after training
train/output_folder.py Reservation.prepare | train/test_output_folder.py
- check_merged(any_folder)
+ None

# a text may stand where a number belongs
common/untrusted.py typed | checkpoint/test_crafted.py
- any_adapter.validate_json(text, strict=True, extra="forbid")
+ any_adapter.validate_json(text, extra="forbid")

# step counts that differ between two shards are accepted
checkpoint/shard_table.py EngineShards.state | engine/test_shards.py
- first is not None and state != first
+ first is None and state == first

# secrets of the DeepSpeed file are written
train/run_file.py write_run_file | train/test_run_file.py
- masked(any_settings)
+ any_settings

# an own base is private whatever the umask is
models/base.py write_own_base | train/test_output_run.py
- path.chmod(any_mode)
+ None

# a disk that hangs in the background is forgotten
checkpoint/manager.py Background.wait | checkpoint/test_async_save.py
- any_thread.is_alive() and timeout_s is not None
+ any_thread.is_alive()

# a rank that fails between two checks does not say so
runtime/ranks.py Ranks.abort | runtime/test_ranks.py train/test_agreement.py
- self._meet(None, None, error)
+ None

# settings are not compared
runtime/ranks.py Ranks.same | train/test_agreement.py
- len(ranks_with) > 1
+ len(ranks_with) > 9

# a file that shared storage shows late is not waited for
common/files.py await_file | common/test_files.py
- time.monotonic() > deadline
+ True

# a rank joins the store of another run
runtime/rendezvous.py meet | runtime/test_rendezvous.py
- holder != this_process.encode()
+ False

# each task of srun trains a run of its own
runtime/launchers.py adopt | runtime/test_launchers.py
- os.environ.get(names[1], "1") != "1"
+ False

# a node with other sources trains
train/setup.py _sources_digest | train/test_agreement.py
- sha256_file(path)
+ ""

# an input inside the output folder is taken
train/inputs.py check_inputs | train/test_inputs.py
- any(path in outputs for path in any_parents)
+ any(False for output in outputs)

# a run writes into the folder of its model
train/inputs.py check_inputs | train/test_inputs.py
- real == output_dir and flag != _CACHE
+ False

# a run writes into the folder of its text
train/inputs.py _matches_output | train/test_inputs.py
- ("", *NAMES)
+ ()

# a folder with names of a run and no run is taken
train/output_folder.py _check_owned | train/test_output_folder.py
- present and not has_run
+ present and has_run

# a model folder that one node does not have is waited for
models/load.py resolve_folder | train/test_agreement.py
- ranks.same(any_what, any_kinds)
+ None

# names in a file become paths
common/untrusted.py file_name | checkpoint/test_crafted.py
- text in any_special or "/" in text or "\\" in text or not text.isprintable()
+ text == ""

# a copy of a checkpoint is taken for a checkpoint
checkpoint/layout.py is_step_name | checkpoint/test_folder.py
- return _STEP_NAME.fullmatch(name) is not None
+ return _STEP_NAME.match(name) is not None

# a JSON line takes many times its size
data/readers.py _parse | data/test_corpus.py
- line.decode()
+ "".join(list(line.decode()))

# the seed of an operator has no bounds
adapters/ops/mora.py OperatorSpec.__post_init__ | checkpoint/test_crafted.py
- not 0 <= self.seed < any_limit
+ self.seed < 0

# whole numbers of any length are taken
common/errors.py | config/test_bad_launches.py
- 2**63
+ 2**200

# a number of too many digits is a raw error
common/untrusted.py parse_json | config/test_bad_launches.py
- raise ValueError(f"a number has more than {any_limit} digits") from None
+ raise

# nested brackets are a raw error
common/untrusted.py parse_json | config/test_bad_launches.py
- RecursionError
+ ArithmeticError

# values of the DeepSpeed file are left to DeepSpeed
engine/ds_config.py resolve_ds_config | config/test_bad_launches.py
- _refused_by_deepspeed(resolved)
+ []

# gradients of whole buckets are divided after their sum
engine/ds_config.py _avoid_slices_of_buckets | engine/test_collectives.py
- ds_config["prescale_gradients"] = True
+ ds_config["prescale_gradients"] = False

# a section of the DeepSpeed file may be a number
engine/ds_config.py resolve_ds_config | config/test_bad_launches.py
- clean_sections(resolved)
+ []

# a tokenizer that cannot be loaded is a raw error
data/tokenizer.py load_tokenizer | config/test_bad_launches.py
- Exception
+ OSError

# a config that makes no model is a raw error
models/load.py folder_config | config/test_bad_launches.py
- raise any_error from error
+ raise

# an index may name its shards by lists
models/base.py _weight_map | config/test_bad_launches.py
- dict[str, FileName]
+ dict[str, Any]

# an empty folder of text is no match
data/corpus.py _hint | config/test_bad_launches.py
- os.path.isdir(any_path)
+ not pattern

# plan names a flag that was not given
models/load.py named_config | config/test_bad_tool_calls.py
- read_model_config(path, flag=flag)
+ read_model_config(path)

# ranks that are left are not waited for
train/output_folder.py _lock | train/test_output_folder.py
- not _try_lock(file, fcntl.LOCK_EX, _OTHERS)
+ False

# a window that a run has made longer is not exported
models/rope.py change_file | models/test_rope.py
- text.update(changes)
+ None

# a decay begins at a checkpoint at which one has begun
train/pretrain.py _branch | train/test_decay_from.py
- not state.at_peak
+ state.at_peak is None

# a branch goes on in its parent's folder
train/pretrain.py _branch | train/test_decay_from.py
- checkpoint.parent.resolve() == root.resolve()
+ False

# scales that are cut off are not missed
models/dequantize.py _require_scales | models/test_dequantize.py
- actual == shape and dtype.is_floating_point is is_floating
+ dtype.is_floating_point is is_floating

# a resumed run keeps the weights of other files
models/dequantize.py dequantized_base.write | models/test_dequantize.py
- read_json(any_record) != record
+ False

# rank 0 alone holds the output folder
train/pretrain.py _output_folder | train/test_output_run.py
- join(root)
+ None

# a pipe below /dev/shm is read
common/untrusted.py _is_shell_pipe | common/test_files.py
- path == any_stdin or path.parent == any_fd
+ path.parts[:2] == ("/", "dev")

# a tokenizer is not tried where it is loaded
data/tokenizer.py load_tokenizer | config/test_bad_tool_calls.py
- tokenizer("a")
+ None

# layers that no file has are made
models/load.py load_model | config/test_bad_tool_calls.py
- layers > count
+ layers > MAX_LAYERS

# tools take a model that lacks weights
models/load.py load_model | config/test_bad_tool_calls.py
- info.get(what)
+ info.get(what) and flag == MODEL_FLAG

# experts are imported before ranks meet
adapters/experts.py | test_imports.py
- import torch.nn.functional as F
+ import torch.nn.functional as F, transformers.integrations.moe

# a product of low rank that is weighted twice in a sum
adapters/low_rank_embeddings.py sum_of_products | adapters/test_embeddings.py
- low[tokens:].double()
+ low[tokens:].double() * weight

# a tied head has a product of its own
adapters/new_embeddings.py replace_tables | adapters/test_embeddings.py
- head.weight is not embedding.weight
+ True

# the host waits for reduced gradients in every backward pass
engine/zero.py Stage3View._order_reductions | engine/test_streams.py
- stream is not None and not any_is_offloaded
+ False

# a GPU that the process does not see is taken
engine/device.py take_device | engine/test_device.py
- local_rank >= count
+ local_rank > count

# grouped heads make torch keep all scores
models/attention.py _sdpa | gpu/test_fake_cuda.py
- is_grouped and query.is_cuda
+ is_grouped and query.is_meta

# a merge casts an original before it copies it to the GPU
adapters/ops/updates.py merged_weight | gpu/test_fake_cuda.py
- original.to(device)
+ original

# model FLOPs of a rotated layer count one block
adapters/ops/mora.py OperatorSpec.multiplications | planning/test_utilization.py
- self.r_hat**2 * self.blocks
+ self.r_hat**2

# an update put onto another model replaces the tensors that were trained
deploy/export.py updated_tensors.tensor_of | deploy/test_onto.py
- run.is_onto
+ False

# tokens whose ids differ from the base's are no reason to refuse a model
models/vocabulary.py check_same_tokens | deploy/test_onto.py
- ids_here.get(token) != index
+ token not in ids_here

# adapters of kongds's PEFT that drop inputs are read
deploy/fork_adapters.py convert_fork | deploy/test_fork_adapters.py
- spec.blocks_in > spec.blocks_out
+ spec.blocks_in > 2 * spec.blocks_out

# the gradient of M is that of a micro-batch's last tokens
adapters/ops/mora.py mora_matrix_gradient | adapters/ops/test_linear.py
- products.baddbmm_(any_c, any_z)
+ products.baddbmm_(any_c, any_z, beta=0)

# a sum of many terms is rounded after each of them
adapters/ops/index_tables.py IndexMap.__call__ | adapters/ops/test_mora.py
- len(self.additions) > 1 and x.dtype in LOW_PRECISION
+ len(self.additions) > 9 and x.dtype in LOW_PRECISION

# Muon's momentum takes in gradients that are not finite
engine/muon.py _repair_stage_3.clip_and_orthogonalize | engine/test_muon.py
- if factor is None: return
+ factor = factor or 1.0

# the loss scaler forgets its last overflow at a resume
engine/shards.py | checkpoint/test_elastic.py
- "last_overflow_iter"
+ "cur_iter"

# the seed may change at a resume
train/training_setup.py TrainingSetup._common_identity | train/test_pretrain.py
- training.seed
+ None

# text that is held out has the tokens of what is trained on
data/cache.py _settings | data/test_cache.py
- None if corpus.keep is None else corpus.keep.identity
+ None

# ids wrap around in a vocabulary of one id more than two bytes hold
data/tokenizer.py Encoder.of | data/test_tokenizer.py
- any_largest < 1 << 16
+ any_largest <= 1 << 16

# merged cycles with a base in 4 bits are summed in the dtype of the run
adapters/nf4.py NF4Weight.dense | adapters/test_nf4.py
- self._original(torch.float32)
+ self._original(dtype)

# Muon takes LoRA's two factors for one matrix
engine/muon.py muon_groups.tag | engine/test_muon.py
- Columns(any_inputs) if spec and has_factors else None
+ None
"""
"""A name; the file below mora_ds/, the function in it, and the tests that should notice the
fault first; a pattern of Python and what replaces it. A name that begins with `any_` stands
for any expression."""

FAULT = re.compile(r"# (.+)\n(\S+) ?(\S*) \| (.+)\n- (.+)\n\+ (.+)")

MUTATIONS = [
    Mutation(*FAULT.fullmatch(fault).groups()) for fault in FAULTS.strip().split("\n\n")
]


def copy_of_checkout(target):
    """Every file that git tracks or would track, as it is now."""
    listed = "git ls-files -z --cached --others --exclude-standard"
    copied = f"xargs -0 cp -d --parents --target-directory={target}"
    subprocess.run(f"{listed} | {copied}", shell=True, cwd=ROOT, check=True)


def is_noticed(fault, root):
    """Whether the default tests that `fault` names fail with it in the copy `root`, which is
    sound again afterwards.
    """
    path = root / "mora_ds" / fault.file
    sound = path.read_text()
    path.write_text(fault.mutated(root))
    files = [f"tests/{name}" for name in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True)
    path.write_text(sound)
    # 2: the tests cannot even be imported; other codes are those of no test at all
    return done.returncode in (1, 2)


def list_faults(chosen):
    """Print them with what is wrong with their patterns. Returns how many do not fit."""
    problems = [fault.problem(ROOT) for fault in chosen]
    for fault, problem in zip(chosen, problems, strict=True):
        print(f"{fault.name}: {problem or f'mora_ds/{fault.file}, {fault.tests}'}")
    return sum(map(bool, problems))


def try_faults(chosen):
    """Run the tests with each of them. Returns how many the tests do not notice."""
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy_of_checkout(folder)
        for fault in chosen:
            noticed = is_noticed(fault, Path(folder))
            unnoticed += not noticed
            print(
                f"{fault.name}: {'noticed' if noticed else 'NOT NOTICED'}", flush=True
            )
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return unnoticed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [
        fault for fault in MUTATIONS if any(word in fault.name for word in options.only)
    ]
    failed = list_faults(chosen) if options.list else try_faults(chosen)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
