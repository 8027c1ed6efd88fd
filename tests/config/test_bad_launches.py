"""Launches with one mistake each: code 2, and a message that names the flag or the file. No
traceback, nothing written.

Each line of `LAUNCHES` is what follows a good command line, and what the message must
contain, separated by " | ". "-flag" takes that flag out of the good command line; a recipe
goes before it. {bad} is the folder of `tests/helpers/mistakes.py`, {user} that of a user's
own files, {tok} a good tokenizer. All run in one process, in this order.
"""

import contextlib
import importlib.util
import io
import re
from unittest import mock

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.gloo import run_alone
from tests.helpers.jobs import REPOSITORY
from tests.helpers.mistakes import answer, flags_of, make_mistakes

LAUNCHES = r"""
# -- numbers and words of flags
--mora_rank 0 | --mora_rank must be at least 1
--mora_rank 2.5 | --mora_rank | 2.5
--mora_rank 0 --adapter lora | --mora_rank must be at least 1
--lora_alpha -1 --adapter lora | --lora_alpha must be above 0
--seq_len 1 | --seq_len must be at least 2
--seq_len 4096 | --seq_len 4096 | 128 positions
--learning_rate nan | --learning_rate must be above 0
--learning_rate -1e-3 | --learning_rate must be above 0 and at most 1e+30, got -0.001
--learning_rate=-1e-3 | --learning_rate must be above 0 and at most 1e+30, got -0.001
--lr 1 --grad_accum 3 | '--learning_rate'? | '--gradient_accumulation_steps'?
--learning_rate inf | --learning_rate must be above 0
--learning_rate fast | --learning_rate | fast
--min_lr_ratio 2 | --min_lr_ratio must be at least 0 and at most 1
--decay_ratio 0 | --decay_ratio must be above 0 and at most 1
--decay_from x --lr_scheduler_type wsd --max_steps -1 | --decay_from: give the steps of the decay with --max_steps
--decay_from x | --decay_from: a run that decays from a checkpoint has --lr_scheduler_type warmup_stable_decay
--warmup_steps 1.5 | --warmup_steps must be whole, or a fraction of the run below 1, got 1.5
--warmup_steps -0.5 | --warmup_steps must be at least 0
--warmup_steps 6 | --warmup_steps 6 must be less than
--max_steps -1 --warmup_steps 5000 | --warmup_steps 5000
--weight_decay -1 | --weight_decay must be at least 0
--adam_beta1 1 | --adam_beta1 must be at least 0 and below 1
--adam_epsilon 0 | --adam_epsilon must be above 0
--max_grad_norm -1 | --max_grad_norm must be at least 0
--report_to wanb | unknown --report_to 'wanb' | 'wandb'
--eval_tasks a task.yaml | --eval_tasks: a task file can run code | --trust_remote_code
--eval_tasks a --eval_tasks_steps 3 | --eval_tasks_steps 3 | multiple of --eval_steps, 0
--eval_tasks a --eval_tasks_steps 3 --eval_steps 2 | --eval_tasks_steps 3 | multiple of --eval_steps, 2
--seed -1 | --seed must be at least 0
--seed 100000000000000000000000 | --seed must be below 9223372036854775808
--seed 281474976710656 | --seed must be at least 0 and below 281,474,976,710,656
--seed 1e23 | --seed | 1e23
--seed | --seed
--collective_timeout_s 1e-9 | --collective_timeout_s must be at least 1
--collective_timeout_s 1e30 | --collective_timeout_s must be at least 1 and at most 1,000,000,000
--max_steps 0 | --max_steps must be at least 1
--max_steps 1000000000000000000000000000000 | --max_steps must be below
--max_steps -1 --num_train_epochs 0 | --num_train_epochs must be above 0
--save_steps -1 | --save_steps must be at least 0
--save_total_limit 0 | --save_total_limit must be at least 1
--logging_steps 0 | --logging_steps must be at least 1
--profile 0 | --profile must be at least 1
--eval_steps -1 | --eval_steps must be at least 0
--max_eval_batches 0 | --max_eval_batches must be at least 1
--tensor_parallel_size 0 | --tensor_parallel_size must be at least 1
--tensor_parallel_size 3 | --tensor_parallel_size 3 does not divide
--sequence_parallel_size 2 | --sequence_parallel_size 2 does not divide
--per_device_train_batch_size 0 | --per_device_train_batch_size must be at least 1
--per_device_train_batch_size 5000 | shorter than one batch | --train_files
--per_device_eval_batch_size 2000000 | --per_device_eval_batch_size must be at least 1 and at most 1,000,000
--gradient_accumulation_steps 0 | --gradient_accumulation_steps must be at least 1
--gradient_accumulation_steps 99999999999999999999 | --gradient_accumulation_steps must be below
--optimizer sgd | --optimizer 'sgd' | adamw, muon
--lr_scheduler_type lin | --lr_scheduler_type 'lin' | Did you mean 'linear'
--log_level loud | --log_level 'loud' | debug, info
--operator turn | --operator 'turn'
--operator rotate --grouping strided | --grouping strided
--grouping alternate | --grouping alternate
--grouping odd | --grouping 'odd'
--compute fast | --compute 'fast'
--r_hat_multiple 3 | --r_hat_multiple must be 1 or even
--base_bits 5 | --base_bits
--mora_dropout 1 | --mora_dropout
--adapter mroa | unknown --adapter 'mroa'; known: mora, lora, subspace, full, none. Did you mean 'mora'?
--merge_every -1 | --merge_every must be at least 0
--restart_warmup_steps -1 | --restart_warmup_steps must be at least 0
--merge_every 3 --restart_warmup_steps 0 | --restart_warmup_steps must be at least 1
--held_out_share 1 | --held_out_share must be at least 0 and below 1
--document_start nothing | --document_start 'nothing' is not a token of the tokenizer | '</s>'
--preprocessing_workers 0 | --preprocessing_workers must be at least 1
--shuffle_buffer -1 | --shuffle_buffer must be at least 0
--text_column '' | --text_column must not be empty
--cache_dir '' | --cache_dir must not be empty: is a variable of the shell unset?
--resume_from_checkpoint= | --resume_from_checkpoint must not be empty
--train_files '' | --train_files must not be empty
-model_name_or_path -train_files --model_name_or_path '' | --model_name_or_path must not be empty
{bad}/recipes/empty_path.yaml | empty_path.yaml: cache_dir must not be empty
--train_tokenizer_vocab -1 | --train_tokenizer_vocab must be at least 0
--train_tokenizer_vocab 5 | --train_tokenizer_vocab 5: SentencePiece cannot train
--train_tokenizer_vocab 1000000000 | --train_tokenizer_vocab must be at least 0 and at most 10,000,000
--train_embeddings perhaps | --train_embeddings | perhaps
--mora_rnk 3 --sed 3 | unknown flag --mora_rnk. Did you mean '--mora_rank'? | unknown flag --sed
--max_step=5 | unknown flag --max_step. Did you mean '--max_steps'?
--max_steps ten | --max_steps | invalid int value: 'ten'
stray | 'stray'
# -- settings of adapters that do not go together
--operator decuple | Did you mean 'decouple'
--tensor_parallel_size 2 --sequence_parallel_size 2 | use one of them
--tensor_parallel_size 2 --adapter lora | --adapter lora does not support tensor parallelism
--tensor_parallel_size 2 --adapter full | --adapter full does not support tensor parallelism
--tensor_parallel_size 2 --adapter none | --adapter none does not support tensor parallelism
--tensor_parallel_size 2 --mora_dropout 0.1 | set to 0: --mora_dropout = 0.1
--tensor_parallel_size 2 --optimizer muon | which no rank has: use adamw
--sequence_parallel_size 2 --seq_len 33 | --sequence_parallel_size 2 does not divide --seq_len 33
--sequence_parallel_size 2 --attn_implementation sdpa | sdpa reads masks, which are not split over ranks
--train_embedding_rank 3 --train_embeddings | --train_embedding_rank and --train_embeddings: give one of them
--train_embedding_rank 3 --train_head | --train_embedding_rank and --train_head: give one of them
--train_new_embeddings --train_embeddings | --train_new_embeddings and --train_embeddings: give one of them
--train_new_embeddings --train_head | --train_new_embeddings and --train_head: give one of them
--train_embedding_rank 3 --train_new_embeddings | --train_new_embeddings and --train_embedding_rank: give one
--train_embedding_rank -1 | train_embedding_rank must
# -- flags that contradict each other
--push_to_hub a/b/c | --push_to_hub a/b/c
--adapter full --push_to_hub a/b | --push_to_hub | --export_merged
--bf16 --fp16 | --bf16 and --fp16
--overwrite_output_dir --resume_from_checkpoint latest | --overwrite_output_dir | --resume_from_checkpoint
--stop_when_forgotten general | --stop_when_forgotten general: must be NAME:NUMBER
--stop_when_forgotten held:inf | --stop_when_forgotten held:inf: must be NAME:NUMBER
--stop_when_forgotten held:1 --eval_steps 1 | --stop_when_forgotten held:1: must be NAME:NUMBER, with a number above 1
--stop_when_forgotten held:1.1 --eval_steps 1 --no_eval_on_start | leave out --no_eval_on_start
--best_by held:-1 --eval_steps 1 | --best_by held:-1: must be NAME:NUMBER, with a number at least 0
--best_by :1 --eval_steps 1 | --best_by :1: must be NAME:NUMBER
--best_by general:1 --eval_steps 2 | --best_by | 'general' | held, short
--optimizer muon --adapter full | --optimizer muon: --adapter full does not support Muon
--optimizer muon --adapter lora --bf16 --deepspeed configs/zero1.json | in bf16 needs ZeRO stage 2 or 3
--base_bits 8 --tensor_parallel_size 2 | --tensor_parallel_size 2: --base_bits 8
--base_bits 4 --tensor_parallel_size 2 | --tensor_parallel_size 2: --base_bits 4
--base_device disk | --base_device 'disk' | host
--base_device host --tensor_parallel_size 2 | --tensor_parallel_size 2 | --base_device host
--embedding_learning_rate 0 --train_norms true | --embedding_learning_rate must be above
--merge_every 5 --restart_warmup_steps 5 | --merge_every 5 must be more than --restart_warmup_steps 5
--streaming --max_steps -1 | --streaming: the length of a stream is unknown | --max_steps
--streaming --held_out_share 0.1 | --held_out_share reads the complete text
--streaming --shuffle_buffer -1 | --shuffle_buffer must be at least 0
--tokenizer_name x --train_tokenizer_vocab 300 | --tokenizer_name and --train_tokenizer_vocab
--model_config x.json | --model_name_or_path and --model_config
--dataset_name x | --train_files and --dataset_name
--mixture x.yaml | --mixture and --train_files: give one of them
--eval_files a/held.txt b/held.txt | --eval_files | held would name several sets
--eval_files a/*.txt | --eval_files: * would name several sets, or files; write NAME=PATH
--replay x | --replay x: must be NAME=FILES:SHARE
--train_files a=x:1 --replay a=y:0.1 | there is a source 'a' already
--train_files a=x:1 y | --train_files y | NAME=FILES:WEIGHT
--train_files a=x:1 a=y:1 | a is given twice
--train_files a=x:-1 b=y:1 | 'a' must be at least 0, got -1
--train_files a=x:inf b=y:1 | 'a' must be at least 0, got inf
--train_files a=x:-1 --replay o=y:0.1 | at least 0, got -1
--replay o=y:0.5 p=z:0.5 | the shares add up to 1
--replay old={user}/held.txt:2 | --replay | between 0 and 1
# -- settings without an effect (tests/config/test_effects.py has them all)
--lora_alpha 16 | --lora_alpha is for LoRA (--adapter lora)
--adapter full --merge_every 30 | --merge_every is for an adapter
-train_files | nothing to train on
-model_name_or_path | give --model_name_or_path or --model_config
-model_name_or_path --model_config x.json | --model_config comes without a tokenizer
# -- files that are missing or of another kind
--resume_from_checkpoint latest | names no checkpoint of this run
--resume_from_checkpoint {user}/model | --resume_from_checkpoint | no checkpoint at
--resume_from_checkpoint {user}/train.jsonl | --resume_from_checkpoint | no checkpoint at
--attn_implementation magic | --attn_implementation magic
--attn_implementation flex_attention | --attn_implementation flex_attention trains only on a GPU
--target_modules re:[ | --target_modules 're:['
--target_modules experts | --target_modules 'experts' matches no linear layer
--target_modules experts --adapter lora | --adapter lora does not support experts
--target_modules all-linear experts.down_proj --adapter lora | --adapter lora does not support experts
--target_modules experts --tensor_parallel_size 2 | --tensor_parallel_size 2 splits linear layers
--target_modules experts --optimizer muon | --optimizer muon is for single MoRA matrices
--target_modules q_prj | --target_modules 'q_prj' | Did you mean 'q_proj'
--cache_dir {user}/train.jsonl | --cache_dir | Not a directory
--cache_dir /proc/nowhere | --cache_dir | /proc/nowhere
--output_dir {user}/train.jsonl | --output_dir | another --output_dir
--output_dir /proc/nowhere | --output_dir | /proc/nowhere
--output_dir '' | --output_dir must not be empty
--output_dir ~nobody5/x | --output_dir ~nobody5/x: the home folder of ~nobody5 is unknown
--output_dir s3://key:secret@bucket/run | --output_dir: leave credentials out of the URL
--output_dir nowhere://bucket/run | --output_dir nowhere://bucket/run: | nowhere
--output_dir memory://run | --output_dir memory://run: give a bucket
--resume_from_checkpoint nowhere://bucket/run | --resume_from_checkpoint nowhere://bucket/run: | nowhere
--train_files file:///nowhere/*.txt | --train_files: no file matches 'file:///nowhere/*.txt'
--train_files s3://key:4secret@bucket/x.txt | --train_files: | leave credentials out of the URL
--train_files https://host/x?X-Signature=secret | --train_files: | leave credentials out of the URL
-train_files --dataset_name s3://bucket/corpus | --dataset_name s3://bucket/corpus: URLs are not supported
--model_name_or_path file:///nowhere/model | --model_name_or_path file:///nowhere/model: there is no such folder
--cache_dir ~nobody5/x | --cache_dir ~nobody5/x: the home folder of
--deepspeed ~nobody5/x | --deepspeed ~nobody5/x: the home folder of
--model_name_or_path ~nobody5/x | --model_name_or_path ~nobody5/x: the home folder of
--tokenizer_name ~nobody5/x | --tokenizer_name ~nobody5/x: the home folder of
--resume_from_checkpoint ~nobody5/x | --resume_from_checkpoint ~nobody5/x: the home folder of
--train_files ~nobody5/x | --train_files ~nobody5/x: the home folder of
--eval_files /nowhere | --eval_files: no file matches '/nowhere'
--train_files {bad}/emptydir | --train_files: no file matches | The folder holds no file
--train_files {bad}/empty | no file matches | Did you mean 'emptydir'
--train_files {bad}/text/empty.txt | empty.txt is empty
--eval_files {bad}/text/empty.txt | --eval_files | empty.txt is empty
--train_files {bad}/text/blank.jsonl | blank.jsonl is empty
--train_files {bad}/text/latin.txt | latin.txt, line 3 | not UTF-8
--train_files {bad}/text/latin.jsonl | latin.jsonl, line 2 | not UTF-8
--eval_files {bad}/text/latin.jsonl | --eval_files | latin.jsonl, line 2 | not UTF-8
--train_files {bad}/text/column.jsonl | column.jsonl, line 1 | 'text' | txt | --text_column
--train_files {bad}/text/short.txt | --train_files | shorter than one batch
--train_files {bad}/text/*.nothing | no file matches | *.nothing
--train_files a={user}/train.jsonl:0.5 b={bad}/text/torn.jsonl:0.5 | source 'b' | torn.jsonl, line 2 | invalid JSON
--train_files {bad}/text/torn.jsonl | torn.jsonl, line 2 | invalid JSON
--train_files {bad}/text/number.jsonl | number.jsonl, line 1 | --text_column
--train_files {bad}/text/torn.parquet | torn.parquet cannot be read
--train_files {bad}/text/torn.jsonl.gz | torn.jsonl.gz cannot be read
--train_files {bad}/text/torn.txt.zst | torn.txt.zst cannot be read
--train_files {bad}/text/notes.docx | notes.docx | .docx files are not supported
-train_files --dataset_name {bad}/emptydir | --dataset_name | emptydir
--tokenizer_name /nowhere | --tokenizer_name | '/nowhere'
--tokenizer_name {bad}/text/torn.model | --tokenizer_name | no tokenizer can be loaded from
--tokenizer_name {bad}/emptydir | --tokenizer_name | holds no tokenizer
--deepspeed {bad}/emptydir | the DeepSpeed file | Is a directory
--deepspeed {bad}/gone.json | the DeepSpeed file | gone.json
# -- DeepSpeed files
--deepspeed {bad}/ds/live.json | live.json: stage3_max_live_parameters | got -5
--deepspeed {bad}/ds/bucket.json | bucket.json: reduce_bucket_size | "large"
--deepspeed {bad}/ds/stage.json | stage.json: zero_optimization.stage must be 1, 2 or 3
--deepspeed {bad}/ds/device.json | device.json: offload_optimizer.device | "disk"
--deepspeed {bad}/ds/nvme.json | offload_optimizer.device = "nvme" | use "cpu"
--deepspeed {bad}/ds/hpz.json | hpz.json: "zero_optimization.zero_hpz_partition_size" cannot be used: ZeRO++
--deepspeed {bad}/ds/activation.json | activation.json: "activation_checkpointing" must be a JSON object | 7
--deepspeed {bad}/ds/flops.json | flops.json: "flops_profiler" must be a JSON object
--deepspeed {bad}/ds/comms.json | comms.json | enabled | often
--deepspeed {bad}/ds/tensorboard.json | tensorboard.json: "tensorboard" must be a JSON object
--deepspeed {bad}/ds/checkpoint.json | "checkpoint" cannot be used: mora_ds writes and reads checkpoints itself
--deepspeed {bad}/ds/aio.json | aio.json: "aio" cannot be used: nothing is offloaded to disks
--deepspeed {bad}/ds/fp16.json | fp16.json: fp16.enabled | --fp16
--deepspeed {bad}/ds/scale.json --fp16 | scale.json | loss_scale
--deepspeed {bad}/ds/betas.json | betas.json: optimizer.params.betas | --adam_beta1
--deepspeed {bad}/ds/optimizer.json | optimizer.json: optimizer.type must be AdamW or Muon
--deepspeed {bad}/ds/clipping.json | clipping.json: gradient_clipping | --max_grad_norm
--deepspeed {bad}/ds/rows.json | rows.json: train_batch_size = 7
--deepspeed {bad}/ds/several.json | zero_optimisation | --per_device_train_batch_size = 2 | --learning_rate
--deepspeed {bad}/ds/types.json | types.json: data_types.grad_accum_dtype = "fp8" but gradients are summed in fp32
--deepspeed {bad}/ds/communication.json | communication.json | communication_data_type | fp99
--deepspeed {bad}/ds/scheduler.json | scheduler.json: "scheduler" cannot be used
--deepspeed {bad}/ds/param.json | param.json: "zero_optimization.offload_param" cannot be used
--deepspeed {bad}/ds/typo.json | typo.json: unknown key 'zero_optimisation'
--deepspeed {bad}/ds/section.json | section.json: "zero_optimization" must be a JSON object
--deepspeed {bad}/ds/list.json | list.json must hold a JSON object
--deepspeed {bad}/ds/twice.json | twice.json: key given twice: bf16
--deepspeed {bad}/ds/comma.json | comma.json: not valid JSON: | line 1
--deepspeed {bad}/ds/empty.json | empty.json: not valid JSON: | line 1
--deepspeed {bad}/ds/number.json | number.json | more than 4300 digits
--deepspeed {bad}/ds/deep.json | deep.json | nested too deeply
--deepspeed {bad}/ds/binary.json | the DeepSpeed file | binary.json
# -- recipes
{bad}/recipes/gone.yaml | cannot read the recipe | gone.yaml
{bad}/recipes/typo.yaml | typo.yaml: unknown key 'mora_rnak'. Did you mean 'mora_rank'
{bad}/recipes/type.yaml | type.yaml: max_steps must be a whole number
{bad}/recipes/list.yaml | list.yaml must contain
{bad}/recipes/twice.yaml | twice.yaml | 'seed' is given twice
{bad}/recipes/tab.yaml | tab.yaml is not valid YAML
{bad}/recipes/number.yaml | number.yaml is not valid YAML
{bad}/recipes/deep.yaml | deep.yaml is not valid YAML | nested too deeply
{bad}/recipes/key.yaml | key.yaml is not valid YAML
{bad}/recipes/date.yaml | date.yaml is not valid YAML | month
{bad}/recipes/alias.yaml | alias.yaml is not valid YAML
{bad}/recipes/tag.yaml | tag.yaml is not valid YAML
{bad}/recipes/binary.yaml | cannot read the recipe | binary.yaml
# -- mixtures
-train_files --mixture /nowhere.yaml | cannot read --mixture /nowhere.yaml
-train_files --mixture {bad}/mix/no_sources.yaml | no_sources.yaml: `sources` must map
-train_files --mixture {bad}/mix/no_files.yaml | no_files.yaml: sources.web: give either `files` or `dataset`
-train_files --mixture {bad}/mix/list.yaml | list.yaml: sources must be
-train_files --mixture {bad}/mix/entry.yaml | entry.yaml: sources.web must be
-train_files --mixture {bad}/mix/key.yaml | key.yaml: unknown key 'sources.web.wieght'. Did you mean 'weight'
-train_files --mixture {bad}/mix/weight.yaml | weight.yaml: the weight of 'web' must be at least 0
-train_files --mixture {bad}/mix/zero.yaml | zero.yaml: the weights add up to 0
-train_files --mixture {bad}/mix/epochs.yaml | epochs.yaml: sources.web.epochs must be above 0
-train_files --mixture {bad}/mix/name.yaml | name.yaml: sources.a/b
-train_files --mixture {bad}/mix/number.yaml | number.yaml: unknown key 'phases[0].weights.2'
-train_files --mixture {bad}/mix/phase.yaml | phase.yaml: phases[0].from_step must be a step after 0
-train_files --mixture {bad}/mix/gone.yaml | source 'web': no file matches 'gone.txt'
# -- model folders
--model_name_or_path {bad}/models/heads | --model_name_or_path | config.json | not a multiple of
--model_name_or_path {bad}/models/kv_heads | --model_name_or_path | weights do not fit the config | k_proj
--model_name_or_path {bad}/models/string | --model_name_or_path | config.json | 'hidden_size' expected int, got str
--model_name_or_path {bad}/models/negative | --model_name_or_path | config.json | num_hidden_layers must be
--model_name_or_path {bad}/models/no_heads | --model_name_or_path | config.json cannot be used
--model_name_or_path {bad}/models/float | --model_name_or_path | config.json | 'vocab_size' expected int, got float
--model_name_or_path {bad}/models/list | --model_name_or_path | config.json | 'intermediate_size' expected int, got list
--model_name_or_path {bad}/models/null | --model_name_or_path | config.json | 'hidden_size' expected int, got NoneType
--model_name_or_path {bad}/models/activation | --model_name_or_path | cannot be loaded | swiglu9
--model_name_or_path {bad}/models/rope | --model_name_or_path | cannot be loaded | spiral
--model_name_or_path {bad}/models/type | --model_name_or_path | config.json | lama
--model_name_or_path {bad}/models/no_type | --model_name_or_path | config.json | model type
--model_name_or_path {bad}/models/quantized | --model_name_or_path | has quantized weights (gptq)
--model_name_or_path {bad}/models/more_layers | --model_name_or_path | weights are missing | model.layers.2
--model_name_or_path {bad}/models/wider | --model_name_or_path | weights do not fit the config | mlp
--model_name_or_path {bad}/gone | --model_name_or_path | no such folder
--model_name_or_path {user}/train.jsonl | --model_name_or_path | no such folder
--model_name_or_path {bad}/models/code | --model_name_or_path | config.json | own
--model_name_or_path {bad}/models/config_deep | --model_name_or_path | config.json | recursion
--model_name_or_path {bad}/models/config_number | --model_name_or_path | config.json | digits
--model_name_or_path {bad}/models/config_list | --model_name_or_path | config.json cannot be used
--model_name_or_path {bad}/models/config_empty | --model_name_or_path | config.json | valid JSON
--model_name_or_path {bad}/models/config_binary | --model_name_or_path | config.json | valid JSON
--model_name_or_path {bad}/models/weights_empty | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/weights_torn | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/weights_html | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/weights_length | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/header_json | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/header_dtype | --model_name_or_path | model.safetensors is truncated or damaged | F31
--model_name_or_path {bad}/models/header_offsets | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/lfs | --model_name_or_path | model.safetensors is truncated or damaged
--model_name_or_path {bad}/models/merges | --model_name_or_path | no tokenizer can be loaded | MergeType
--model_name_or_path {bad}/models/tokenizer_torn | --model_name_or_path | no tokenizer can be loaded
--model_name_or_path {bad}/models/tokenizer_list | --model_name_or_path | no tokenizer can be loaded
--model_name_or_path {bad}/models/tokenizer_number | --model_name_or_path | no tokenizer can be loaded | digits
--model_name_or_path {bad}/models/tokenizer_deep | --model_name_or_path | no tokenizer can be loaded | recursion
--model_name_or_path {bad}/models/tokenizer_class | no end-of-text token | tokenizer_config.json
--model_name_or_path {bad}/models/index_lists | --model_name_or_path | index.json | must be a text
--model_name_or_path {bad}/models/index_numbers | --model_name_or_path | index.json | must be a text
--model_name_or_path {bad}/models/index_none | --model_name_or_path | index.json is damaged: its weight_map is empty
--model_name_or_path {bad}/models/index_array | --model_name_or_path | index.json is damaged: weight_map must be a
--model_name_or_path {bad}/models/index_gone | --model_name_or_path | gone.safetensors is missing
--model_name_or_path {bad}/models/index_key | --model_name_or_path | has no tensor 'other.weight'
--model_name_or_path {bad}/models/index_deep | --model_name_or_path | index.json | brackets are nested too deeply
--model_name_or_path {bad}/models/index_number | --model_name_or_path | index.json | a number has more than 4300 digits
--model_name_or_path {bad}/models/no_config | --model_name_or_path | the folder has no config.json
--model_name_or_path {bad}/models/no_weights | --model_name_or_path | has no weights
--model_name_or_path {bad}/models/no_tokenizer | --model_name_or_path | holds no tokenizer
-model_name_or_path --model_config /nowhere.json --tokenizer_name {tok} | --model_config /nowhere.json
-model_name_or_path --model_config {bad}/text/model.json --tokenizer_name {tok} | --model_config | no model_type
-model_name_or_path --model_config {bad}/text/heads.json --tokenizer_name {tok} | --model_config | not a multiple of
-model_name_or_path --model_config {bad}/text/types.json --tokenizer_name {tok} | --model_config | 'hidden_size'
-model_name_or_path --model_config {bad}/text/deep.json --tokenizer_name {tok} | --model_config | nested too deeply
-model_name_or_path --model_config {bad}/text/digits.json --tokenizer_name {tok} | --model_config | 4300 digits
"""

CASES = [line for line in LAUNCHES.splitlines() if line and not line.startswith("#")]


NEED_WEIGHTS = (
    "--model_name_or_path {bad}",
    "--target_modules",
    "--attn_implementation",
    "--max_steps -1 --w",
)
"""How launches begin whose mistake shows only when the model is loaded."""


def answers(folder, user):
    """Line -> exit code, message, whether the output folder was made, and whether weights
    were loaded.
    """
    spec = importlib.util.spec_from_file_location(
        "launch_pretrain", REPOSITORY / "launch/pretrain.py"
    )
    assert spec is not None
    assert spec.loader is not None
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    folders = {"bad": folder, "user": user.root, "tok": user.model}
    load = AutoModelForCausalLM.from_pretrained
    results = {}
    for number, line in enumerate(CASES):
        out = folder / "out" / str(number)
        case = line.split(" | ")[0]
        adapter = re.findall(r"--adapter \S+", case)
        flags = flags_of(case, user.flags(out, *" ".join(adapter).split()), folders)
        usage = contextlib.redirect_stderr(io.StringIO())  # of argparse
        with (
            usage,
            mock.patch.object(
                AutoModelForCausalLM, "from_pretrained", wraps=load
            ) as loading,
        ):
            code, message = answer(launch.main, "pretrain.py", flags)
        results[line] = code, message, out.exists(), loading.called
    return results


@pytest.fixture(scope="module")
def answered(user, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_mistakes(folder, user)
    results = run_alone(answers, folder, user)
    return results


@pytest.mark.parametrize("line", CASES)
def test_a_launch_with_a_mistake(line, answered):
    code, message, wrote, loaded = answered[line]
    assert code == 2, message
    assert [
        phrase for phrase in line.split(" | ")[1:] if phrase not in message
    ] == [], message
    assert not wrote
    assert not loaded or line.startswith(NEED_WEIGHTS), (
        "found only after the weights were loaded"
    )
